#!/usr/bin/env python3
"""Replace the workers, and the engine too if asked, without a lost request, under supervisor or under circus.

    .venv/bin/python deploy/roll.py                      the workers, one after the other
    .venv/bin/python deploy/roll.py --engine             then the engine: a second one loads its models beside it, and
                                                         takes over when it is ready (memory for both)
    .venv/bin/python deploy/roll.py --engine-in-place    then the engine: it stops, and starts again; meanwhile requests
                                                         wait in the workers, for MILLRACE_ENGINE_WAIT at most

To be run in the folder from which supervisord or circusd was started; which of them it is, their sockets in run/ say.
Each step waits until what it started is ready: a worker is connected to the engine, an engine answers for its models
and has the workers. If that does not come in time, the roll ends with exit code 1, and what is old serves on.
"""

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

WORKERS = "millrace"  # the program's name in supervisord.conf, and the watcher's in circus.ini
SLOTS = ("engine-a", "engine-b")
SUPERVISOR = Path("run/supervisor.sock")
CIRCUS = Path("run/circus.endpoint")
BIN = Path(sys.executable).parent
NOT_RUNNING = 70  # supervisor.xmlrpc.Faults


class NotReady(Exception):
    """What was started is not ready in time, or the manager does not do as it is told; the text says what."""


class Manager(Protocol):
    """Whoever starts and stops the processes."""

    def workers(self) -> list[int]:
        """Process ids, in the order in which they are to be replaced."""
        ...

    def replace(self, worker: int, ready: Callable[[int], bool]) -> None:
        """Put another worker in the place of this one; `ready` tells whether a process id is that of a ready one."""
        ...

    def engine(self, slot: str) -> int:
        """The process id of the engine in a slot, 0 if none is there."""
        ...

    def start(self, slot: str) -> None: ...

    def stop(self, slot: str) -> None:
        """End when it has ended."""
        ...


class Supervisor:
    """supervisord, by XML-RPC over its unix socket."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._seconds = seconds
        self._call: Any = xmlrpc.client.ServerProxy("http://localhost", transport=_Unix(path)).supervisor

    def workers(self) -> list[int]:
        # Slot 0 only holds the socket.
        return [slot["pid"] for slot in self._workers() if slot["pid"] and not slot["name"].endswith("-0")]

    def replace(self, worker: int, ready: Callable[[int], bool]) -> None:
        name = next(f"{slot['group']}:{slot['name']}" for slot in self._workers() if slot["pid"] == worker)
        self.stop(name)
        self.start(name)
        wait_until(lambda: ready(self._pid(name)), f"{name} is ready", self._seconds)

    def engine(self, slot: str) -> int:
        return self._pid(slot)

    def start(self, slot: str) -> None:
        self._call.startProcess(slot, False)

    def stop(self, slot: str) -> None:
        try:
            self._call.stopProcess(slot)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != NOT_RUNNING:
                raise

    def _workers(self) -> list[dict[str, Any]]:
        return [slot for slot in self._call.getAllProcessInfo() if slot["group"] == WORKERS]

    def _pid(self, name: str) -> int:
        return cast("int", self._call.getProcessInfo(name)["pid"])


class _Unix(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _UnixConnection(self._path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


class Circus:
    """circusd, by circusctl."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._seconds = seconds
        command = str(BIN / "circusctl"), "--json", "--timeout", f"{seconds:g}", "--endpoint", f"ipc://{path}"
        self._command = command

    def workers(self) -> list[int]:
        # The oldest first: that is whom `decr` stops.
        return sorted(self._pids(WORKERS), key=_started)

    def replace(self, worker: int, ready: Callable[[int], bool]) -> None:
        before = set(self._pids(WORKERS))
        self._tell("incr", WORKERS)
        wait_until(
            lambda: any(map(ready, set(self._pids(WORKERS)) - before)),
            f"one more worker is ready (look after it: `circusctl set {WORKERS} numprocesses {len(before)}`)",
            self._seconds,
        )
        # Until that is done circus would lose a SIGTERM.
        self._tell("decr", WORKERS, "--waiting")

    def engine(self, slot: str) -> int:
        return next(iter(self._pids(slot)), 0)

    def start(self, slot: str) -> None:
        self._tell("start", slot)

    def stop(self, slot: str) -> None:
        self._tell("stop", slot, "--waiting")

    def _pids(self, watcher: str) -> list[int]:
        return cast("list[int]", self._tell("list", watcher).get("pids", []))

    def _tell(self, *words: str) -> dict[str, Any]:
        """One command; while circus is busy with another one, again."""
        limit = time.monotonic() + self._seconds
        while True:
            ended = subprocess.run([*self._command, *words], capture_output=True, text=True, check=False)
            try:
                answer = json.loads(ended.stdout)
            except ValueError:
                raise NotReady(f"circusctl {' '.join(words)}: {ended.stdout}{ended.stderr}") from None
            if answer.get("status") != "error":
                return cast("dict[str, Any]", answer)
            if "already running" not in answer.get("reason", "") or time.monotonic() > limit:
                raise NotReady(f"circusctl {' '.join(words)}: {answer.get('reason')}")
            time.sleep(0.2)


def _started(pid: int) -> int:
    """When a process was started, in ticks since the machine was."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait for `condition`.

    Raises:
        NotReady: it has not come after `seconds`.
    """
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise NotReady(f"not after {seconds:g} s: {what}")
        time.sleep(0.1)


class Service:
    """What a roll must know of the service: where its engine listens, and what the engine says of itself."""

    def __init__(self, worker: int) -> None:
        """As one of its workers sees it."""
        variables = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
        self._environment = dict(os.fsdecode(variable).partition("=")[::2] for variable in variables if variable)
        self.folder = Path(os.readlink(f"/proc/{worker}/cwd"))
        names = "MILLRACE_ENGINE_SOCKET", "ENGINE_SOCKET"
        self.separate = any(self._environment.get(name) for name in names)

    def status(self) -> dict[str, Any]:
        """What the engine says; nothing if none answers."""
        command = [sys.executable, "-m", "engine", "status"]
        ended = subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True, check=False
        )
        return cast("dict[str, Any]", json.loads(ended.stdout)) if ended.stdout else {}

    def connected(self) -> set[int]:
        """The process ids of the engine's workers."""
        return {worker["pid"] for worker in self.status().get("workers", ())}

    def worker_ready(self, pid: int) -> bool:
        """Whether a worker serves: it has the engine, or, without one, has loaded its models and takes connections."""
        return pid in self.connected() if self.separate else _accepts(pid)

    def engine_ready(self, pid: int, workers: list[int]) -> bool:
        """Whether the engine `pid` has the socket, its models and the workers."""
        status = self.status()
        return (
            bool(pid)
            and status.get("pid") == pid
            and status["ready"]
            and {worker["pid"] for worker in status["workers"]} >= set(workers)
        )


def _accepts(pid: int) -> bool:
    """Whether a process waits for connections on a listening socket: its epoll set holds one."""
    try:
        listening = {
            int(descriptor.name)
            for descriptor in Path(f"/proc/{pid}/fd").iterdir()
            if (target := os.readlink(descriptor)).startswith("socket:[") and target[8:-1] in _listeners()
        }
        return any(
            line.startswith("tfd:") and int(line.split()[1]) in listening
            for info in Path(f"/proc/{pid}/fdinfo").iterdir()
            for line in info.read_text().splitlines()
        )
    except OSError:  # it has ended
        return False


def _listeners() -> set[str]:
    """The inodes of every listening socket, TCP and unix."""
    found = set()
    for table, state, inode, listening in (("tcp", 3, 9, "0A"), ("tcp6", 3, 9, "0A"), ("unix", 3, 6, "00010000")):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[state] == listening:
                found.add(fields[inode])
    return found


def roll_workers(manager: Manager, service: Service) -> None:
    for worker in manager.workers():
        say(f"worker {worker}: another one takes its place")
        manager.replace(worker, service.worker_ready)
    say(f"workers: {manager.workers()}")


def roll_engine(manager: Manager, service: Service, seconds: float) -> None:
    """Start the engine's other slot, and stop the one that runs when the other has the socket."""
    old = _running(manager, service)
    new = SLOTS[1 - SLOTS.index(old)]
    if manager.engine(new):
        raise NotReady(f"{new} runs as well, and should not: stop whichever is not the engine at the socket")
    say(f"engine: {new} loads its models, {old} serves on")
    ticket = Path(f"run/{new}.takeover")
    ticket.touch()
    try:
        manager.start(new)
        wait_until(_comes_up(manager, service, new), f"{new} is ready", seconds)
    except NotReady:
        if service.status().get("pid") == manager.engine(old):
            say(f"engine: {new} is stopped again, {old} serves on")
            manager.stop(new)
        raise
    finally:
        ticket.unlink(missing_ok=True)
    say(f"engine: {new} has taken over, {old} ends")
    manager.stop(old)


def roll_engine_in_place(manager: Manager, service: Service, seconds: float) -> None:
    slot = _running(manager, service)
    say(f"engine: {slot} stops and starts again, requests wait")
    manager.stop(slot)
    manager.start(slot)
    wait_until(_comes_up(manager, service, slot), f"{slot} is ready", seconds)


def _comes_up(manager: Manager, service: Service, slot: str) -> Callable[[], bool]:
    """Whether the engine in a slot, which was just started, is ready; it raises NotReady if that has ended."""
    first = 0

    def ready() -> bool:
        nonlocal first
        pid = manager.engine(slot)
        first = first or pid
        if pid != first:
            raise NotReady(f"{slot} ended before it was ready; why, the lines of process {first} in the log say")
        return service.engine_ready(pid, manager.workers())

    return ready


def _running(manager: Manager, service: Service) -> str:
    """The slot of the engine that has the socket."""
    pid = service.status().get("pid")
    for slot in SLOTS:
        if pid and manager.engine(slot) == pid:
            return slot
    raise NotReady(f"no engine of {' or '.join(SLOTS)} answers at the socket, but process {pid}")


def say(line: str) -> None:
    print(line, flush=True)


def manager_here(seconds: float) -> Manager:
    if _answers(SUPERVISOR):
        return Supervisor(SUPERVISOR, seconds)
    if _answers(CIRCUS):
        return Circus(CIRCUS, seconds)
    raise NotReady(f"neither supervisord ({SUPERVISOR}) nor circusd ({CIRCUS}) runs here")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--engine", action="store_true", help="the engine, too; for a while there are two")
    which.add_argument("--engine-in-place", action="store_true", help="the engine, too; for a while there is none")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each step; longer than a model loads")
    typed = parser.parse_args()
    try:
        manager = manager_here(typed.timeout)
        workers = manager.workers()
        if not workers:
            raise NotReady("no worker runs")
        service = Service(workers[0])
        if (typed.engine or typed.engine_in_place) and not service.separate:
            raise NotReady("there is no engine to replace: MILLRACE_ENGINE_SOCKET is empty, each worker has its own")
        roll_workers(manager, service)
        if typed.engine:
            roll_engine(manager, service, typed.timeout)
        elif typed.engine_in_place:
            roll_engine_in_place(manager, service, typed.timeout)
    except (NotReady, OSError, xmlrpc.client.Error) as error:
        print(f"roll: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
