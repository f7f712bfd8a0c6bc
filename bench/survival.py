"""What clients see while the engine is killed, and while all is replaced: `python -m bench.survival --out docs/img`.

One engine with the digits model, two workers on one listening socket. Requests come at a steady rate, whatever becomes
of those before them, each on a kept-alive connection or a new one; every answer is checked. Meanwhile the engine is
killed and started again, as a supervisor would; then it is replaced by a successor that takes over, and then each
worker in turn by another one.

A connection that was idle for longer than IDLE is not used again. A worker that drains reads for half a second more,
and says with each answer that the connection closes; one that was silent for as long it closes without a word, and a
request that is on its way just then is reset, as by any HTTP server.

Latency is told by when a request was sent, from when it was due; answers by when they came; both in bins of 0.25 s.
"""

import argparse
import asyncio
import itertools
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.ipc.client import ask_status
from engine.ipc.frames import FrameError

from .client import encode
from .report import heading, progress, publish, table
from .samples import INFER, fault, json_post, read_json, read_samples
from .servers import ENGINE, LAUNCHER, BenchError, Server, running, unwind_on_signals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORKERS = 2
BIN = 0.25  # seconds
IDLE = 0.25  # seconds
READY = "/v2/health/ready"
PATIENCE = 120.0  # seconds for a process to be ready


class Asked(NamedTuple):
    """A request; times in seconds since the first was due.

    Attributes:
        fault: "" if it was answered right.
    """

    due: float
    ended: float
    fault: str


class Event(NamedTuple):
    at: float
    label: str


@dataclass
class Load:
    """Requests at a steady rate, from `run` until `stop` is set; then those under way are awaited.

    Attributes:
        asked: those that ended, in that order.
    """

    address: tuple[str, int]
    rate: float
    asked: list[Asked] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    began: float = 0.0

    def __post_init__(self) -> None:
        samples = read_samples()
        posts = [json_post([sample]) for sample in samples]
        self._questions = [
            (sample, encode("POST", INFER, post.body, post.headers))
            for sample, post in zip(samples, posts, strict=True)
        ]
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []  # and since when

    def now(self) -> float:
        return time.monotonic() - self.began

    def run(self) -> None:
        self.began = time.monotonic()
        asyncio.run(self._run())

    async def _run(self) -> None:
        tasks = set()
        for number in itertools.count():
            due = number / self.rate
            await asyncio.sleep(max(0.0, due - self.now()))
            if self.stop.is_set():
                break
            task = asyncio.create_task(self._one(number, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        for _, _, writer in self._idle:
            writer.close()

    async def _one(self, number: int, due: float) -> None:
        sample, question = self._questions[number % len(self._questions)]
        try:
            async with asyncio.timeout(PATIENCE):
                status, body = await self._ask(question)
            wrong = fault(read_json(body), [sample]) if status == 200 else f"status {status}: {body[:200]!r}"
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            wrong = repr(error)
        self.asked.append(Asked(due, self.now(), wrong))

    async def _ask(self, question: bytes) -> tuple[int, bytes]:
        reader, writer = await self._connection()
        try:
            writer.write(question)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status, *lines = head.split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines if line)
            body = await reader.readexactly(int(headers["content-length"]))
        except BaseException:
            writer.close()
            raise
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((self.now(), reader, writer))
        return int(status.split()[1]), body

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle and (self._idle[0][0] < self.now() - IDLE or self._idle[0][1].at_eof()):
            self._idle.pop(0)[2].close()
        if self._idle:
            _, reader, writer = self._idle.pop()
            return reader, writer
        return await asyncio.open_connection(*self.address)


class Service:
    """The engine and its workers; what it does to them is told as events."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._path = str(folder / "engine.sock")
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._engine = self._start_engine()
        self._workers = [self._start_worker() for _ in range(WORKERS)]

    def _start_engine(self, *options: str) -> Server:
        command = (*ENGINE, "--models", "models", "--engine-socket", self._path, *options)
        # Ready says whoever is there: the one that is to be replaced, too.
        server = self._stack.enter_context(running(command, self._path, ready="", seconds=PATIENCE))
        self._until(lambda status: status["ready"] and status["pid"] == server.process.pid, "the engine serves")
        return server

    def _start_worker(self) -> Server:
        fd = self._listener.fileno()
        command = (*LAUNCHER, "--engine-socket", self._path, "--fd", str(fd))
        server = self._stack.enter_context(running(command, self.address, ready=READY, fd=fd, seconds=PATIENCE))
        self._until(lambda status: server.process.pid in _workers(status), "the worker has the engine")
        return server

    def _until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> None:
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            with suppress(OSError, FrameError):
                if condition(ask_status(self._path)):
                    return
            time.sleep(0.02)
        raise BenchError(f"not in {PATIENCE:g} s: {what}")

    def kill(self) -> Iterator[str]:
        """The engine is killed, and started again."""
        os.kill(self._engine.process.pid, signal.SIGKILL)
        yield "SIGKILL of the engine"
        self._engine = self._start_engine()
        workers = {worker.process.pid for worker in self._workers}
        self._until(lambda status: workers <= _workers(status), "the workers have the engine")
        yield "the next one serves"

    def roll(self) -> Iterator[str]:
        """A second engine is started and takes over, the first one drains; then each worker likewise."""
        yield "a successor starts"
        old, self._engine = self._engine, self._start_engine("--takeover")
        yield "it takes over"
        old.stop(60)
        yield "the old one has gone"
        for number in range(WORKERS):
            successor = self._start_worker()
            self._workers[number].stop(60)
            self._workers[number] = successor
            yield f"worker {number + 1} replaced"


def _workers(status: dict[str, Any]) -> set[int]:
    return {worker["pid"] for worker in status["workers"]}


def measure(rate: float, pause: float) -> tuple[list[Asked], list[Event]]:
    """The requests, and what happened meanwhile."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mr-")))
        service = Service(stack, folder)
        load = Load(service.address, rate)
        thread = threading.Thread(target=load.run)
        thread.start()
        events = []
        try:
            for change in (service.kill, service.roll):
                _rest(load, pause)
                for label in change():
                    events.append(Event(load.now(), label))
                    progress(f"{events[-1].at:6.2f} s: {label}")
            _rest(load, pause)
        finally:
            load.stop.set()
            thread.join()
        return load.asked, events


def _rest(load: Load, pause: float) -> None:
    """Until everything that is due is answered, and for a pause more."""
    while load.now() * load.rate - len(load.asked) > load.rate * BIN:
        time.sleep(BIN)
    time.sleep(pause)


class Bin(NamedTuple):
    """Attributes:
    sent, answered, failed: requests.
    median, p99: seconds, of those sent in it; NaN if none was.
    """

    start: float
    sent: int
    answered: int
    failed: int
    median: float
    p99: float


def bins(asked: Sequence[Asked], edges: Sequence[float]) -> list[Bin]:
    """One bin from each edge to the next."""
    found = []
    for start, end in itertools.pairwise(edges):
        waits = sorted(each.ended - each.due for each in asked if start <= each.due < end)
        came = [each for each in asked if start <= each.ended < end]
        failed = sum(bool(each.fault) for each in came)
        found.append(Bin(start, len(waits), len(came) - failed, failed, _at(waits, 0.5), _at(waits, 0.99)))
    return found


def _at(values: Sequence[float], share: float) -> float:
    """The quantile of sorted values that is one of them."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def render(asked: Sequence[Asked], events: Sequence[Event]) -> Iterator[str]:
    """The tables: one row for each event, then one for each bin."""
    end = max(each.ended for each in asked)
    header = ["from, s", "seconds", "sent", "answered", "failed", "p50, ms", "p99, ms"]
    phases = bins(asked, [0.0, *(event.at for event in events), end + BIN])
    labels = ["all is well", *(event.label for event in events)]
    stops = [*(event.at for event in events), end]
    yield table(
        ["what happened", *header],
        [
            [label, f"{each.start:.2f}", f"{stop - each.start:.2f}", *_cells(each)]
            for label, stop, each in zip(labels, stops, phases, strict=True)
        ],
        1,
    )
    wrong = [each.fault for each in asked if each.fault]
    yield f"{len(asked)} requests, {len(wrong)} failed{': ' + wrong[0] if wrong else ''}."
    per_second = ["from, s", "sent", "answered", "failed", "p50, ms", "p99, ms"]
    yield table(per_second, [[f"{each.start:.2f}", *_cells(each)] for each in bins(asked, _edges(end))], 0)


def _cells(each: Bin) -> list[str]:
    return [
        str(each.sent), str(each.answered), str(each.failed), f"{each.median * 1e3:.1f}", f"{each.p99 * 1e3:.1f}",
    ]  # fmt: skip


def _edges(end: float) -> list[float]:
    return [number * BIN for number in range(math.ceil(end / BIN) + 1)]


def draw(asked: Sequence[Asked], events: Sequence[Event], path: Path) -> None:
    """Latency above, answers and failures below, and what happened. The colours are those of bench/simulation."""
    from matplotlib.figure import Figure  # only for this
    from matplotlib.ticker import FuncFormatter

    found = bins(asked, _edges(max(each.ended for each in asked)))[:-1]  # the last is not a whole one
    times = [each.start + BIN / 2 for each in found]
    figure = Figure(figsize=(15, 8), dpi=110, layout="constrained")
    latency, answers = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    latency.plot(times, [each.p99 * 1e3 for each in found], color="#D55E00", linewidth=2.5, label="p99")
    latency.plot(times, [each.median * 1e3 for each in found], color="#0072B2", linewidth=1.6, label="median")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    latency.set_ylabel("latency of the requests sent then, ms", fontsize=12)
    for label, color, counts in (
        ("answered a second", "#009E73", [each.answered for each in found]),
        ("failed a second", "#D55E00", [each.failed for each in found]),
    ):
        answers.step(times, [count / BIN for count in counts], where="mid", color=color, label=label)
    answers.set_ylabel("requests a second", fontsize=12)
    answers.set_xlabel("seconds", fontsize=12)
    for axes in (latency, answers):
        _finish(axes, events)
    for number, event in enumerate(events):
        _name(latency, event, before=number == 0)  # what follows a kill is drawn high, and would cross its name
    failed = sum(bool(each.fault) for each in asked)
    title = f"An engine is killed, then everything is replaced: {len(asked):,} requests, {failed} failed"
    figure.suptitle(title, fontsize=15, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _finish(axes: "Axes", events: Sequence[Event]) -> None:
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=12)
    axes.legend(loc="upper right", fontsize=12)
    for event in events:
        axes.axvline(event.at, color="0.55", linestyle="--", linewidth=1)


def _name(axes: "Axes", event: Event, before: bool) -> None:
    axes.annotate(
        event.label, (event.at, 0.99), xycoords=("data", "axes fraction"), xytext=(-3 if before else 3, 0),
        textcoords="offset points", rotation=90, va="top", ha="right" if before else "left", fontsize=11, color="0.3",
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.survival", description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=100, help="requests a second (default: 100)")
    parser.add_argument("--pause", type=float, default=5, help="seconds between the events (default: 5)")
    parser.add_argument("--out", type=Path, help="draw the picture into this folder")
    parser.add_argument("--output", type=Path, help="write the tables into this file, too")
    options = parser.parse_args(arguments)
    unwind_on_signals()
    try:
        asked, events = measure(options.rate, options.pause)
    except BenchError as error:
        print(f"bench.survival: {error}", file=sys.stderr)
        return 1
    text = "\n\n".join([heading("bench.survival", arguments), *render(asked, events)])
    publish(text, options.output)
    if options.out is not None:
        draw(asked, events, options.out / "survival.png")
    return int(any(each.fault for each in asked))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
