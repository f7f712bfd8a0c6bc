"""Start real processes in a folder that looks like the checkout, and leave nothing behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from .client import ROOT, Address

STARTED = "Application startup complete."

# In the environment of everything a test starts, so that it is found whatever session or process group it is in.
MARK = "E2E_MARK"


def eventually(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait for `condition`.

    Raises:
        AssertionError: it has not come after `seconds`.
    """
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"{what}: not after {seconds:g} s"
        time.sleep(0.02)


def tool(name: str) -> str:
    """The path of a program that a test needs. Without it the test is skipped, but fails where CI is set."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin")
    if found is None:
        message = f"{name} is not installed"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def listens(address: Address) -> bool:
    """Whether anybody accepts connections there."""
    with socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET) as sock:
        return sock.connect_ex(str(address) if isinstance(address, Path) else address) == 0


@contextlib.contextmanager
def checkout() -> Iterator[Path]:
    """A folder with the checkout's files and this interpreter's environment as .venv, but a run/ of its own.

    The path is short, since that of a unix socket must be, and open, since nginx started by root serves as nobody.
    """
    path = Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp"))
    try:
        path.chmod(0o755)
        for name in ("asgi_app", "batching", "engine", "models", "deploy", "supervisord.conf", "circus.ini"):
            (path / name).symlink_to(ROOT / name)
        (path / ".venv").symlink_to(sys.prefix)
        (path / "run").mkdir()
        yield path
    finally:
        shutil.rmtree(path)


def copy(folder: Path, name: str, old: str, new: str) -> None:
    """Replace the one `old` in one of the checkout's files, for this folder alone."""
    file = folder / name
    text = file.read_text()
    assert text.count(old) == 1, f"{name} has not exactly one {old!r}"
    if file.parent.is_symlink():
        file.parent.unlink()
        shutil.copytree((ROOT / name).parent, file.parent)
    file.unlink()
    file.write_text(text.replace(old, new))


class Process:
    """A started program, and everything that it started itself.

    Attributes:
        pid: its process id, which is also its session's.
    """

    def __init__(self, popen: subprocess.Popen[bytes], mark: str, log: Path) -> None:
        self._popen = popen
        self._mark = f"{MARK}={mark}".encode()
        self._log = log
        self.pid = popen.pid

    def log(self) -> str:
        """What it and its children wrote so far."""
        return self._log.read_text(errors="replace")

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until `text` was written `times` times.

        Raises:
            AssertionError: it was not in time, or the process ended before.
        """

        def written() -> bool:
            ended = self._popen.poll() is not None
            enough = self.log().count(text) >= times
            assert enough or not ended, f"exit code {self._popen.returncode}: {self.log()}"
            return enough

        try:
            eventually(written, f"{times} times {text!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}; the log:\n{self.log()}") from None

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self._popen.send_signal(number)

    def wait(self) -> int:
        """Its exit code."""
        return self._popen.wait(60)

    def alive(self) -> list[int]:
        """The ids of it and of what it started, as far as they run."""
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and self._owns(entry)]

    def _owns(self, entry: Path) -> bool:
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] in "ZX":
                return False
            # nginx overwrites its environment, but stays in its session; circus gives each child a session.
            return int(fields[3]) == self.pid or self._mark in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is another user's
            return False

    def stop(self) -> list[int]:
        """Ask it to stop; then kill what is left of it, and return that."""
        if self._popen.poll() is None:
            self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(60)
        left = self.alive()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._popen.wait()
        return left


@contextlib.contextmanager
def started(
    folder: Path,
    *command: str,
    environment: dict[str, str] | None = None,
    stdin: socket.socket | None = None,
    inherit: Sequence[int] = (),
) -> Iterator[Process]:
    """Run a command in `folder`, with no MILLRACE_* variables but those given; stop it at the end.

    Raises:
        AssertionError: at the end, when something that it started outlived it.
    """
    mark = uuid.uuid4().hex
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    log = folder / "run" / f"{mark}.log"
    with log.open("ab") as output:
        popen = subprocess.Popen(
            command,
            cwd=folder,
            env={**clean, **(environment or {}), MARK: mark},
            stdin=stdin.fileno() if stdin is not None else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=inherit,
            start_new_session=True,
        )
    process = Process(popen, mark, log)
    try:
        yield process
    finally:
        left = process.stop()
    assert not left, f"{command[0]} left processes behind: {left}; its log:\n{process.log()}"


def launcher(folder: Path) -> tuple[str, ...]:
    return str(folder / ".venv/bin/python"), "-m", "asgi_app"


@contextlib.contextmanager
def on_port(folder: Path, environment: dict[str, str] | None = None) -> Iterator[tuple[Process, tuple[str, int]]]:
    """`python -m asgi_app` on a free TCP port, ready."""
    with started(folder, *launcher(folder), "--port", "0", environment=environment) as server:
        server.wait_for_log("ready; ask it: curl")
        found = re.search(r"curl http://127\.0\.0\.1:(\d+)/", server.log())
        assert found, server.log()
        yield server, ("127.0.0.1", int(found[1]))


def run(folder: Path, *command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself, with no MILLRACE_* variables but those given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    return subprocess.run(
        command, cwd=folder, env={**clean, **(environment or {})}, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip


ENGINE = "run/engine.sock"  # in the shipped files


def engine_program(folder: Path, *arguments: str) -> tuple[str, ...]:
    return str(folder / ".venv/bin/python"), "-m", "engine", *arguments


def engine_status(folder: Path, path: str = ENGINE) -> dict[str, Any]:
    """What the engine at `path` says of itself; nothing if there is none."""
    ended = run(folder, *engine_program(folder, "status", "--engine-socket", path))
    return cast("dict[str, Any]", json.loads(ended.stdout)) if ended.stdout else {}


@contextlib.contextmanager
def by_supervisor(
    folder: Path, single: bool = False, environment: dict[str, str] | None = None
) -> Iterator[tuple[Process, Address]]:
    """supervisord with the shipped file, all its processes up; `single`: in the single-process form."""
    tool("supervisord")
    if single:
        copy(folder, "supervisord.conf", f'MILLRACE_ENGINE_SOCKET="{ENGINE}"', 'MILLRACE_ENGINE_SOCKET=""')
    command = str(folder / ".venv/bin/supervisord"), "-n", "-c", "supervisord.conf"
    with started(folder, *command, environment=environment) as manager:
        manager.wait_for_log("entered RUNNING state", 4)
        _wait_for_service(folder, manager, single)
        yield manager, folder / "run/millrace.sock"


@contextlib.contextmanager
def by_circus(folder: Path, single: bool = False) -> Iterator[tuple[Process, Address]]:
    """circusd with the shipped file, but on a free port: a developer's own server may be using the one it names."""
    tool("circusd")
    port = free_port()
    if (folder / "circus.ini").is_symlink():
        copy(folder, "circus.ini", "port = 8000\n", f"port = {port}\n")
    if single:
        copy(folder, "circus.ini", f"MILLRACE_ENGINE_SOCKET = {ENGINE}\n", "MILLRACE_ENGINE_SOCKET =\n")
    (found,) = re.findall(r"^port = (\d+)$", (folder / "circus.ini").read_text(), re.M)
    with started(folder, str(folder / ".venv/bin/circusd"), "circus.ini") as manager:
        _wait_for_service(folder, manager, single)
        yield manager, ("127.0.0.1", int(found))


def _wait_for_service(folder: Path, manager: Process, single: bool) -> None:
    manager.wait_for_log(STARTED, 2)
    if not single:
        manager.wait_for_log(f"ready: 1 models at {ENGINE}")
        eventually(lambda: len(engine_status(folder).get("workers", ())) == 2, "the workers have the engine")


Start = Callable[..., contextlib.AbstractContextManager[tuple[Process, Address]]]
MANAGERS: dict[str, Start] = {"supervisor": by_supervisor, "circus": by_circus}
