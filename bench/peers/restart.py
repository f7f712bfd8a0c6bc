"""What clients see while a server is replaced, by what it offers for that. The load is the same for all, and light."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..client import Client, encode
from ..report import progress
from ..servers import ROOT, BenchError, free_port
from .peers import MILLRACE, OIP_READY, TRITON, Start, Starter
from .repositories import write_millrace
from .results import Cell, Failure, Results
from .targets import Target, run_load, serving

MODEL = "mlp"
RATE = 100.0  # requests a second
POOL = 32  # connections
BEFORE = 2.0  # seconds of load before the restart, and at least after it
IDLE = 0.25  # seconds after which a client uses no connection again: see bench.survival
PATIENCE = 60.0  # seconds for a restart
LINKS = ("asgi_app", "batching", "engine", "deploy")


class Instance:
    """A server on a port, which may be stopped and started again there."""

    def __init__(self, stack: ExitStack, name: str, folder: Path, start: Starter | None) -> None:
        self.name, self.folder, self._start = name, folder, start
        self.port = free_port()
        self._running = stack.enter_context(ExitStack())
        self.target = self.start()

    def start(self) -> Target:
        self.target = self._running.enter_context(serving(self.name, MODEL, self.folder, self.port, self._start))
        return self.target

    def stop(self) -> None:
        """As an operator would; what is left after that is killed."""
        process = self.target.server.process
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            progress(f"{self.name} still runs ten seconds after SIGTERM")
        self._running.close()


def _restart(instance: Instance) -> None:
    instance.stop()
    instance.start()


def _reload(instance: Instance) -> None:
    for path in instance.folder.rglob("model.py"):
        path.touch()  # or Triton would see nothing to load
    with Client(("127.0.0.1", instance.port), timeout=60) as client:
        answer = client.ask(encode("POST", f"/v2/repository/models/{MODEL}/load", b"{}"))
    if answer.status != 200:
        raise BenchError(f"loading the model again was answered {answer.status}: {answer.body[:200]!r}")


def _redeploy(instance: Instance) -> None:
    os.kill(instance.target.server.process.pid, signal.SIGHUP)
    done = instance.folder / "redeployed"
    limit = time.monotonic() + PATIENCE
    while not done.exists():
        if time.monotonic() > limit or instance.target.server.process.poll() is not None:
            raise BenchError("it was not deployed again, or not in time")
        time.sleep(0.1)


def _roll(instance: Instance) -> None:
    command = ["env", "-C", str(instance.folder), sys.executable, "deploy/roll.py", "--engine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise BenchError(f"deploy/roll.py ended with {done.returncode}: {done.stdout}{done.stderr}")


def _start_circus(name: str, port: int, folder: Path) -> Start:
    """One engine and two workers, as circus.ini has them, in a folder with a run/ of its own."""
    for link in LINKS:
        (folder / link).symlink_to(ROOT / link)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "run").mkdir()
    text = (ROOT / "circus.ini").read_text()
    (folder / "circus.ini").write_text(text.replace("port = 8000", f"port = {port}"))
    write_millrace(folder / "models", name)
    circus = shutil.which("circusd", path=str(Path(sys.executable).parent)) or "circusd"
    return Start(("env", "-C", str(folder), "MILLRACE_CLASSIFIER=", circus, "circus.ini"), OIP_READY)


class Way(NamedTuple):
    """Attributes:
    how: for the report.
    seconds: of load; the restart must be over well before.
    start: another way to start it than in the other measurements.
    """

    how: str
    seconds: float
    act: Callable[[Instance], None]
    start: Starter | None = None


STOPPED = "the process is stopped, and started again"
RELOADED = "the model alone is loaded again; the process stays"
WAYS = {
    MILLRACE: Way("circus: `make roll ENGINE=1`, engine and both workers are new", 30, _roll, _start_circus),
    TRITON: Way(RELOADED, 12, _reload),
    "mosec": Way(STOPPED, 18, _restart),
    "litserve": Way(STOPPED, 18, _restart),
    "mlserver": Way(RELOADED, 12, _reload),
    "bentoml": Way(STOPPED, 18, _restart),
    "ray": Way("deployed again: the replica is new, the proxy stays", 18, _redeploy),
}


def survey(names: Sequence[str], results: Results) -> None:
    """Those of the names that are restarted in some way, one after the other."""
    for name in (name for name in names if name in WAYS):
        progress(f"restart: {name}")
        try:
            figures = _measure(name, WAYS[name])
        except (BenchError, OSError, subprocess.SubprocessError) as error:
            results.failures.append(Failure(name, "restart", str(error)))
        else:
            results.cells.append(Cell("restart", MODEL, name, 0, 0, figures))


def _measure(name: str, way: Way) -> dict[str, float]:
    """What `run_load` says, and how long the restart took, `took`, in seconds."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mr-")))  # short: sockets are in it
        instance = Instance(stack, name, folder, way.start)
        plan = instance.target.plan(RATE, POOL, way.seconds, idle=IDLE)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        load = pool.submit(run_load, instance.target, plan)
        time.sleep(BEFORE)
        began = time.monotonic()
        way.act(instance)
        took = time.monotonic() - began
        figures = load.result()
        if took > way.seconds - 2 * BEFORE:
            raise BenchError(f"it took {took:.0f} s, longer than the load")
        return figures | {"took": took}
