"""A server and all that it started: what they cost, and how to keep them from costing anything while others are asked.

Peers are many processes, some in sessions of their own, so what belongs to a server is found by who started whom.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..servers import Server

STEP = 0.2  # seconds
QUIET = 0.3  # of a core: less, and a server works no more on what it was asked
SETTLE = 10.0  # seconds that it may take until then


class Stat(NamedTuple):
    """Of one process; times in clock ticks, those of the children it has waited for included."""

    parent: int
    session: int
    ticks: int


def read_stats() -> dict[int, Stat]:
    """Every process of the machine, by its id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since it was listed
            found[int(path.parent.name)] = parse_stat(path.read_text())
    return found


def parse_stat(text: str) -> Stat:
    fields = text.rpartition(")")[2].split()  # from the third on: the second, its name, may hold anything
    return Stat(int(fields[1]), int(fields[3]), sum(map(int, fields[11:15])))


def family(root: int, stats: dict[int, Stat]) -> set[int]:
    """The process `root`, its session, and all that any of them started."""
    members = {pid for pid, stat in stats.items() if pid == root or stat.session == root}
    grown = True
    while grown:
        more = {pid for pid, stat in stats.items() if stat.parent in members} - members
        members |= more
        grown = bool(more)
    return members


class Family:
    """The processes of a running server."""

    def __init__(self, server: Server) -> None:
        self._root = server.process.pid

    def cpu_seconds(self) -> float:
        """User and system time so far, of all of them and of those they have waited for."""
        stats = read_stats()
        return sum(stats[pid].ticks for pid in family(self._root, stats)) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> float:
        """MiB in memory; a page that several share is divided among them."""
        kilobytes = 0
        for pid in family(self._root, read_stats()):
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                kilobytes += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
        return kilobytes / 1024

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to each."""
        for pid in family(self._root, read_stats()):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def settle(self) -> None:
        """Wait until they are nearly idle."""
        until, before = time.monotonic() + SETTLE, self.cpu_seconds()
        while time.monotonic() < until:
            time.sleep(STEP)
            now = self.cpu_seconds()
            if now - before < QUIET * STEP:
                return
            before = now

    def freeze(self) -> None:
        """Stop them where they are, as soon as they have nothing to do.

        What wrk leaves behind when it ends most servers still compute.
        """
        self.settle()
        self.tell(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let them run, frozen as they are."""
        self.tell(signal.SIGCONT)
        time.sleep(STEP)
        try:
            yield
        finally:
            self.freeze()


@contextmanager
def killed_at_the_end(server: Server) -> Iterator[Family]:
    """Its processes, of which none is left: `running` would miss those in sessions of their own."""
    members = Family(server)
    try:
        yield members
    finally:
        members.tell(signal.SIGKILL)
