"""The open loop: requests at random times, whatever becomes of those before them. A process of its own.

    python -m bench.peers.load < plan.json > outcome.json

The gaps are exponential, as if very many clients knew nothing of each other. A request takes one of a pool of
kept-alive connections, or waits until one is free. Its latency counts from when it was due, not from when it could be
sent: a server that stalls is charged for all who would have come meanwhile.

Some may be poisoned, so that no server can answer them, and some clients may leave: they hang up LEAVE after they
sent, and expect nothing. Without a rate the loop is closed: each connection asks again when it is answered. That is
how much a server can do beside this process, which takes a share of the machine as clients do.

Standard library and uvloop alone, so that it starts at once. It keeps each different answer, and how often it came:
whether they are right is looked at afterwards, by whoever started it.
"""

import asyncio
import ctypes
import itertools
import json
import os
import random
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict
from typing import Any, cast

import uvloop

from .plan import POISONED, SHARES, Outcome, Plan, quantile, schedule

LEAVE = 0.001  # seconds from sending to hanging up
PATIENCE = 10.0  # seconds for the last answers
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Alarm:
    """Calls back at a time. asyncio's own timers come by the millisecond, in which many requests are due."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(1, os.O_NONBLOCK)  # 1: CLOCK_MONOTONIC
        self._call = call
        self._setting = (ctypes.c_long * 4)()  # struct itimerspec: no interval, then seconds and nanoseconds
        self._loop = loop
        loop.add_reader(self._fd, self._ring)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def set(self, seconds: float) -> None:
        """In so many seconds from now."""
        self._setting[2], self._setting[3] = divmod(max(1, int(seconds * 1e9)), 1_000_000_000)
        self._libc.timerfd_settime(self._fd, 0, self._setting, None)

    def _ring(self) -> None:
        os.read(self._fd, 8)
        self._call()


class Connection(asyncio.Protocol):
    """One that is kept alive, with one request under way at most.

    Attributes:
        request: the index of the one under way, and when it was due.
        since: when it was last answered.
    """

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._received = b""
        self.request: tuple[int, float] | None = None
        self.since = 0.0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        end = data.find(b"\r\n\r\n")
        length = LENGTH.search(data, 0, end) if end >= 0 else None
        if length is None or len(data) < end + 4 + int(length[1]):
            self._received = data
            return
        self._received = b""
        if CLOSES.search(data, 0, end):
            self.transport.close()
        self._load.answered(self, int(data[9:12]), data[end + 4 :])

    def connection_lost(self, error: Exception | None) -> None:
        self._load.lost(self)


class Load:
    """One run of a plan. Times are seconds since it began."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._good = [text.encode("latin-1") for text in plan.requests]
        self._bad = [text.encode("latin-1") for text in plan.poisoned]
        self._draw = random.Random(plan.seed + 1)
        self._numbers = itertools.count()
        # Of the connections, and of the requests that have none yet, by when they were due:
        self._idle: list[Connection] = []
        self._connections: set[Connection] = set()
        self._waiting: deque[float] = deque()
        self._connecting = 0
        self._under_way = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        # Of the measured requests:
        self._sent = 0
        self._answered = 0
        self._answers: Counter[tuple[int, int, bytes]] = Counter()
        self._latencies: list[float] = []
        self._late: list[float] = []

    async def run(self) -> Outcome:
        self._loop = asyncio.get_running_loop()
        self._idle = [await self._connect() for _ in range(self.plan.connections)]
        self._began, cpu = time.monotonic(), time.process_time()
        await (self._open_loop() if self.plan.rate else self._closed_loop())
        busy = (time.process_time() - cpu) / self._now()
        self._stopped = True
        until = self._now() + PATIENCE
        while (self._under_way or self._waiting) and self._now() < until:  # noqa: ASYNC110 - once in a run
            await asyncio.sleep(0.02)
        await asyncio.gather(*self._tasks)
        for connection in self._connections:
            connection.transport.abort()
        return self._outcome(busy)

    def _now(self) -> float:
        return time.monotonic() - self._began

    async def _closed_loop(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            self._ask(connection, 0.0)
        await asyncio.sleep(self.plan.warm + self.plan.seconds)

    async def _open_loop(self) -> None:
        dues = schedule(self.plan.rate, self.plan.warm + self.plan.seconds, self.plan.seed)
        done = asyncio.Event()
        due = next(dues, None)

        def launch_what_is_due() -> None:
            nonlocal due
            while due is not None:
                wait = due - self._now()
                if wait > 0:
                    alarm.set(wait)
                    return
                self._launch(due)
                due = next(dues, None)
            done.set()

        alarm = Alarm(self._loop, launch_what_is_due)
        launch_what_is_due()
        await done.wait()
        alarm.close()

    def _launch(self, due: float) -> None:
        """A request is due: of a client who leaves, or on a connection that is idle, or else it waits for one."""
        if self.plan.leaving_share and self._draw.random() < self.plan.leaving_share:
            self._start(self._ask_and_leave())
            return
        now = self._now()
        while self._idle:
            connection = self._idle.pop()
            if not self.plan.idle or now - connection.since < self.plan.idle:
                self._late.append(now - due)
                self._ask(connection, due)
                return
            connection.transport.close()
        self._waiting.append(due)
        if len(self._connections) + self._connecting < self.plan.connections:
            self._start(self._one_more())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> Connection:
        self._connecting += 1
        try:
            _, made = await self._loop.create_connection(lambda: Connection(self), "127.0.0.1", self.plan.port)
        finally:
            self._connecting -= 1
        self._connections.add(made)
        return made

    async def _one_more(self) -> None:
        try:
            self._take(await self._connect())
        except OSError:
            if self._waiting:
                self._sent += self._measured(self._waiting.popleft())  # and it is never answered

    async def _ask_and_leave(self) -> None:
        with suppress(OSError):
            connection = await self._connect()
            connection.transport.write(self._good[next(self._numbers) % len(self._good)])
            await asyncio.sleep(LEAVE)
            connection.transport.abort()

    def _ask(self, connection: Connection, due: float) -> None:
        if self._bad and self._draw.random() < self.plan.poisoned_share:
            index, data = POISONED, self._draw.choice(self._bad)
        else:
            index = next(self._numbers) % len(self._good)
            data = self._good[index]
            self._sent += self._measured(due)
        self._under_way += 1
        connection.request = index, due
        connection.transport.write(data)

    def _take(self, connection: Connection) -> None:
        """A connection is free, for whoever waited longest."""
        if self._waiting:
            self._ask(connection, self._waiting.popleft())
        elif not self.plan.rate and not self._stopped:
            self._ask(connection, self._now())
        else:
            connection.since = self._now()
            self._idle.append(connection)

    def answered(self, connection: Connection, status: int, body: bytes) -> None:
        """Called by a connection, with the whole answer to its request."""
        if connection.request is None:  # of a client who left
            return
        (index, due), connection.request = connection.request, None
        self._under_way -= 1
        now = self._now()
        if self._measured(due if self.plan.rate else now):
            self._answers[index, status, body] += 1
            if index != POISONED:
                self._answered += 1
                if status == 200:
                    self._latencies.append(now - due)
        if not connection.transport.is_closing():
            self._take(connection)

    def lost(self, connection: Connection) -> None:
        """Called by a connection that has ended."""
        self._connections.discard(connection)
        self._under_way -= connection.request is not None
        if connection in self._idle:
            self._idle.remove(connection)

    def _measured(self, moment: float) -> bool:
        """Whether a request counts that was due then, or, in a closed loop, answered then."""
        return self.plan.warm <= moment < self.plan.warm + self.plan.seconds

    def _outcome(self, busy: float) -> Outcome:
        ranked = sorted(self._latencies)
        sent = self._sent + sum(map(self._measured, self._waiting)) if self.plan.rate else self._answered
        answers = self._answers.items()
        return Outcome(
            sent=sent,
            seconds=self.plan.seconds,
            answers=[(index, status, body.decode("latin-1"), count) for (index, status, body), count in answers],
            latencies={str(share): quantile(ranked, share) * 1e3 for share in SHARES},
            broken=sent - self._answered,
            late=quantile(sorted(self._late), 0.99) * 1e3 if self._late else 0.0,
            busy=busy,
        )


def main() -> int:
    plan = Plan(**json.load(sys.stdin))
    json.dump(asdict(uvloop.run(Load(plan).run())), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
