"""A peer that serves a model: started, checked, asked, and frozen while others are asked."""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..client import Client, encode
from ..servers import ROOT, BenchError, Server, die_with_parent, free_port, running
from .dialects import JSON, Floats
from .load import PATIENCE as DRAIN
from .models import Predictor, make_rows, spoil
from .peers import CONSTANT, ENVIRONMENT, PEERS, Starter
from .plan import POISONED, Outcome, Plan
from .processes import Family, killed_at_the_end

PATIENCE = 120.0  # seconds until one serves
ANSWER = 45.0  # seconds for an answer, and for the first right one after that
TOLERANCE = 1e-3  # of an answer, in float32, from batches of different shapes


class Target:
    """A peer that serves a model, with the requests to it and what must come back.

    Attributes:
        bodies, expected: of good requests, in order.
        spoilt: bodies that it must refuse.
    """

    def __init__(self, name: str, model: str, server: Server, port: int, family: Family) -> None:
        self.name, self.model = name, model
        self.server, self.port, self.family = server, port, family
        self.dialect = PEERS[name].dialect
        self.path = self.dialect.path(model)
        rows = make_rows(model)
        self.bodies = [self.dialect.encode(model, row) for row in rows]
        self.spoilt = [self.dialect.encode(model, spoil(model, row)) for row in rows]
        self.expected = expected(model)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def plan(self, rate: float, connections: int, seconds: float, **more: Any) -> Plan:
        """A load of good requests; of others too if `more` says so."""
        requests, spoilt = (
            [encode("POST", self.path, body, JSON).decode("latin-1") for body in bodies]
            for bodies in (self.bodies, self.spoilt)
        )
        return Plan(self.port, requests, rate, connections, seconds, poisoned=spoilt, **more)

    def fault(self, number: int, status: int, body: bytes) -> str:
        """What is wrong with the answer to a good request, or an empty string."""
        if status != 200:
            return f"status {status}: {body[:200]!r}"
        if self.name == CONSTANT:
            return ""
        try:
            answer = self.dialect.decode(body)
        except (ValueError, KeyError, TypeError) as error:
            return f"{error!r}: {body[:200]!r}"
        right = self.expected[number]
        if answer.shape != right.shape or not np.allclose(answer, right, rtol=TOLERANCE, atol=TOLERANCE):
            return f"other numbers than the model's: {body[:200]!r}"
        return ""

    def check(self, at_once: int = 16) -> None:
        """Ask everything, several at once, so that it comes in batches, and look at every answer.

        Raises:
            BenchError: an answer was wrong.
        """

        def ask(number: int) -> str:
            with Client(("127.0.0.1", self.port), timeout=ANSWER) as client:
                answer = client.ask(encode("POST", self.path, self.bodies[number], JSON))
            return self.fault(number, answer.status, answer.body)

        with ThreadPoolExecutor(at_once) as pool:
            for wrong in pool.map(ask, range(len(self.bodies))):
                if wrong:
                    raise BenchError(f"a good request was answered with {wrong}")


@functools.cache
def expected(model: str) -> list[Floats]:
    """The model's own answers to the rows, one by one."""
    predict = Predictor(model)
    return [predict.run(predict.stack([row]))[0] for row in make_rows(model)]


@contextmanager
def serving(name: str, model: str, folder: Path, port: int = 0, start: Starter | None = None) -> Iterator[Target]:
    """Start a peer with a model, and wait for its first right answer.

    Args:
        folder: empty, for what it reads.
        port: 0 for a free one.
        start: another way to start it than the one in the table.

    Raises:
        BenchError: it does not serve, or another model than this.
    """
    port = port or free_port()
    command, ready = (start or PEERS[name].start)(model, port, folder)
    environment = ENVIRONMENT | {"PEER_MODEL": model, "PEER_FOLDER": str(folder)}
    address = ("127.0.0.1", port)
    with (
        running(command, address, ready=ready, environment=environment, seconds=PATIENCE) as server,
        killed_at_the_end(server) as members,
    ):
        target = Target(name, model, server, port, members)
        _await_answer(target, time.monotonic() + ANSWER)
        target.check()
        yield target


def _await_answer(target: Target, deadline: float) -> None:
    """Some say that they are ready when their front is, and the model is not."""
    wrong = ""
    while time.monotonic() < deadline:
        try:
            with Client(("127.0.0.1", target.port), timeout=ANSWER) as client:
                answer = client.ask(encode("POST", target.path, target.bodies[0], JSON))
            wrong = target.fault(0, answer.status, answer.body)
        except OSError as error:
            wrong = repr(error)
        if not wrong:
            return
        time.sleep(0.1)
    raise BenchError(f"no right answer in {ANSWER:g} s: {wrong}")


def run_load(target: Target, plan: Plan) -> dict[str, float]:
    """Run the generator's process once, and look at all answers that differ.

    Returns:
        `offered` and `rate` of good requests and good answers a second, `p50`, `p99`, `p99.9` and `late` in
        milliseconds, `lost` and `sent` good requests, and the generator's `busy` share of a core.

    Raises:
        BenchError: the generator failed, there was no good answer, or a wrong one with status 200.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench.peers.load"], input=json.dumps(asdict(plan)), capture_output=True, text=True,
        cwd=ROOT, timeout=plan.warm + plan.seconds + DRAIN + 30, check=False, preexec_fn=die_with_parent,
    )  # fmt: skip
    if done.returncode:
        raise BenchError(f"the generator of load failed: {done.stderr[-2000:]}")
    outcome = Outcome(**json.loads(done.stdout))
    good = 0
    for index, status, body, count in outcome.answers:
        if index != POISONED and status == 200:
            if wrong := target.fault(index, status, body.encode("latin-1")):
                raise BenchError(f"{count} good requests were answered with {wrong}")
            good += count
    if not good:
        raise BenchError(f"no good answer to {outcome.sent} requests")
    return {
        "offered": outcome.sent / outcome.seconds,
        "rate": good / outcome.seconds,
        **{f"p{float(share) * 100:g}": latency for share, latency in outcome.latencies.items()},
        "sent": outcome.sent,
        "lost": outcome.sent - good,
        "late": outcome.late,
        "busy": outcome.busy,
    }
