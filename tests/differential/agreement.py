"""Carry a case out with both servers, and say where they disagree."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .allowed import Allowed, explain
from .cases import GATE, Case, Change, Pause, Step, Together
from .compare import Difference, differences, summary
from .exchange import Answer, Request, Server
from .servers import Pair


def disagreements(case: Case, pair: Pair) -> tuple[list[str], set[Allowed]]:
    """A report of each request whose answers differ in a way that nothing allows; and what allowed the others."""
    reports = []
    met: set[Allowed] = set()
    for step in case.steps:
        for request, theirs, ours in _both(step, pair):
            left, entries = explain(request, theirs, ours, differences(request, theirs, ours))
            met |= entries
            if left:
                reports.append(report(request, theirs, ours, left))
    return reports, met


def _both(step: Step, pair: Pair) -> Iterator[tuple[Request, Answer, Answer]]:
    if isinstance(step, Change | Pause):  # for both at once
        carry_out(step, pair.theirs, pair.repository)
        return
    first, second = (carry_out(step, server, pair.repository) for server in (pair.theirs, pair.ours))
    for (request, theirs), (_, ours) in zip(first, second, strict=True):
        yield request, theirs, ours


def carry_out(step: Step, server: Server, repository: Path) -> list[tuple[Request, Answer]]:
    """Do one step with one server; its requests, each with its answer, in the order in which they are written."""
    match step:
        case Request():
            return [(step, server.ask(step))]
        case Together():
            return list(zip(step.requests, _together(step, server), strict=True))
        case Pause():
            time.sleep(step.seconds)
            return []
        case Change():
            change(step, repository)
            return []


def change(step: Change, repository: Path) -> None:
    path = repository / step.path
    if step.text is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(step.text)


def _together(step: Together, server: Server) -> list[Answer]:
    """Send all; the gate opens when `gate_after` answers have come."""
    answered = threading.Semaphore(0)
    with ThreadPoolExecutor(len(step.requests)) as pool, _shut_gate():
        futures = []
        for request in step.requests:
            futures.append(pool.submit(server.ask, request))
            futures[-1].add_done_callback(lambda _: answered.release())
            time.sleep(step.gap)
        for _ in range(step.gate_after):
            answered.acquire(timeout=10)
        if step.gate_after >= 0:
            GATE.touch()
        return [future.result() for future in futures]


@contextlib.contextmanager
def _shut_gate() -> Iterator[None]:
    GATE.unlink(missing_ok=True)
    yield
    GATE.unlink(missing_ok=True)


def report(request: Request, theirs: Answer, ours: Answer, left: list[Difference]) -> str:
    """The request, both answers in short, and each place where they differ."""
    lines = [f"{request}", f"  Triton    {summary(theirs)[:600]}", f"  Millrace  {summary(ours)[:600]}"]
    for place, a, b in left:
        lines += [f"  at {place}:", f"    Triton    {str(a)[:600]}", f"    Millrace  {str(b)[:600]}"]
    return "\n".join(lines)
