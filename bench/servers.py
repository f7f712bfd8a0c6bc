"""Start a server for a measurement, wait until it answers, and leave no process behind."""

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from engine.ipc.client import ask_status
from engine.ipc.frames import FrameError

from .client import Address, Client, encode

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = (sys.executable, "-m", "asgi_app", "--models", "models")
ENGINE = (sys.executable, "-m", "engine")
UVICORN = (sys.executable, "-m", "uvicorn", "--loop", "uvloop", "--http", "httptools", "--no-access-log")

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class BenchError(Exception):
    """There is no measurement; the text says why."""


class Server:
    """A server that runs in a session of its own: itself, and whatever it starts."""

    def __init__(self, process: subprocess.Popen[str], address: Address, log: IO[str]) -> None:
        self.process = process
        self.address = address
        self._log = log

    def cpu_seconds(self) -> float:
        """User and system time so far, of all processes of the session and of those they have waited for."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()  # from the third on: the second may hold anything
            except OSError:  # it has ended since it was listed
                continue
            if int(fields[3]) == self.process.pid:
                ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self, seconds: float = 10) -> int:
        """Send SIGTERM and return the exit code, negative if a signal ended it.

        Raises:
            BenchError: it still ran after `seconds`.
        """
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise BenchError(f"the server still runs {seconds:g} s after SIGTERM") from None

    def said(self) -> str:
        """The end of what it has printed."""
        self._log.seek(0)
        return self._log.read()[-4000:]


@contextmanager
def running(
    command: Sequence[str],
    address: Address,
    *,
    ready: str,
    fd: int | None = None,
    seconds: float = 120,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run `command` in the checkout's root until the block is left; then kill it and all that it started.

    No MILLRACE_ variable of ours is passed on, so that the command and `environment` say all there is to say about the
    server. What it prints is shown on stderr if the block fails.

    Args:
        address: where it will listen; of an engine, its socket's path.
        ready: path that it answers with 200 once it serves; "" of an engine, which is asked for its status.
        fd: descriptor that it inherits, under the same number.

    Raises:
        BenchError: it ended, or was not ready after `seconds`.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MILLRACE_", "ENGINE_SOCKET"))}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**clean, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
            pass_fds=() if fd is None else (fd,),
        )
        server = Server(process, address, log)
        try:
            _await_ready(server, ready, time.monotonic() + seconds)
            yield server
        except Exception:
            print(f"--- {shlex.join(command)} printed:\n{server.said()}---", file=sys.stderr)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _await_ready(server: Server, path: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        if (code := server.process.poll()) is not None:
            raise BenchError(f"the server ended with {code} instead of starting")
        if _serves(server.address, path):
            return
        time.sleep(0.01)
    raise BenchError("the server was not ready in time")


def _serves(address: Address, path: str) -> bool:
    # An inherited socket accepts before the server does: connecting says nothing, only the answer does.
    with suppress(OSError, FrameError):
        if not path:
            return bool(ask_status(str(address))["ready"])
        with Client(address, timeout=1) as client:
            return client.ask(encode("GET", path)).status == 200
    return False


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel kills the child when this process ends, even by SIGKILL."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def unwind_on_signals() -> None:
    """Let SIGTERM and SIGINT leave every `with` block properly, and say nothing."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, _: sys.exit(128 + number))
