"""Both servers on one repository, started once for a module of tests."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.processes import free_port

from . import triton
from .exchange import PATIENCE, Request, Server

START = 240.0  # seconds; Triton starts a process for each model, twice
CACHE = 1 << 20


@dataclass(frozen=True)
class Pair:
    """The reference, ours, and the folder that both serve."""

    theirs: Server
    ours: Server
    repository: Path


@contextlib.contextmanager
def start_pair(repository: Path, logs: Path, control: str, models: list[str]) -> Iterator[Pair]:
    """Start both. `models` are loaded at the start where `control` is explicit.

    Without a Triton the test is skipped, but fails where CI is set.
    """
    reason = triton.missing()
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    explicit = control == "explicit"
    theirs_http, theirs_grpc, theirs_metrics, ours_http, ours_metrics = (free_port() for _ in range(5))
    options = [f"--model-control-mode={control}", "--exit-on-error=false", f"--cache-config=local,size={CACHE}"]
    options += [f"--load-model={name}" for name in models] if explicit else []
    reference = triton.command(repository, theirs_http, theirs_grpc, theirs_metrics, options)
    millrace = [
        *(sys.executable, "-m", "asgi_app", "--models", str(repository), "--model-control", control),
        *("--port", str(ours_http), "--metrics-port", str(ours_metrics), "--shared-memory", "true"),
        *("--classifier", "", "--cache-bytes", str(CACHE)),
        *(("--load-models", ",".join(models)) if explicit else ()),
    ]
    pair = Pair(Server(theirs_http, theirs_metrics), Server(ours_http, ours_metrics), repository)
    logs_of = (logs / "triton.log", logs / "millrace.log")
    with _running(reference, logs_of[0]) as first, _running(millrace, logs_of[1]) as second:
        _wait(pair.theirs, first, logs_of[0])
        _wait(pair.ours, second, logs_of[1])
        yield pair


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, in which Triton's models are processes too: nothing of it is left."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it is ready.

    Raises:
        AssertionError: it ended, or is not ready after START seconds; the text is the end of its log.
    """
    limit = time.monotonic() + START
    ready = (Request("GET", "/v2/health/ready"), Request("GET", "/metrics", metrics=True))  # Triton opens them in turn
    while time.monotonic() < limit and process.poll() is None:
        if all(server.ask(request).status == 200 for request in ready):
            return
        time.sleep(0.1)
    raise AssertionError(f"not ready:\n{log.read_text(errors='replace')[-4000:]}")
