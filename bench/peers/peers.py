"""The peers, one row each: how it is had, started and asked. Adding a row is adding a peer.

All get the same: one copy of the model, torch on one thread, one row per request as JSON, their own dynamic batching
with the same largest batch, and no access log.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.differential import triton

from ..servers import ROOT, UVICORN, free_port
from . import environments, repositories
from .dialects import BENTOML, OPEN_INFERENCE, Dialect, plain
from .environments import program, python

MILLRACE, TRITON, CONSTANT = "millrace", "triton", "uvicorn"
OIP_READY = "/v2/health/ready"

# For every server. One thread for each operator of torch: the machine's other core is for HTTP and for the load.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}


class Start(NamedTuple):
    """Attributes:
    ready: path that it answers with 200 once it serves.
    """

    command: Sequence[str]
    ready: str


# The model's name, the port, and an empty folder for what the server reads.
Starter = Callable[[str, int, Path], Start]


class Peer(NamedTuple):
    """Attributes:
    start: what starts it with a model on a port, after writing what it reads into an empty folder.
    settings: what was chosen for it, for the report.
    """

    label: str
    install: Callable[[], None]
    version: Callable[[], str]
    start: Starter
    dialect: Dialect
    settings: str


def _start_millrace(name: str, port: int, folder: Path) -> Start:
    repositories.write_millrace(folder, name)
    return Start(millrace_command(folder, port), OIP_READY)


def millrace_command(folder: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "asgi_app", "--models", str(folder), "--classifier", "", "--port", str(port)]


def _start_constant(name: str, port: int, folder: Path) -> Start:
    options = ("--lifespan", "off", "--no-server-header", "--backlog", "4096", "--port", str(port))
    return Start((*UVICORN, *options, "bench.constant:app"), "/")


def _start_triton(name: str, port: int, folder: Path) -> Start:
    repositories.write_triton(folder, name)
    return Start(triton_command(folder, port), OIP_READY)


def triton_command(folder: Path, port: int) -> list[str]:
    """Every model is loaded at the start, and may be again."""
    control = ("--model-control-mode=explicit", "--load-model=*")
    options = (*control, "--allow-grpc=false", "--allow-metrics=false", "--log-info=false")
    return triton.command(folder, port, free_port(), free_port(), options)


def _start_mlserver(name: str, port: int, folder: Path) -> Start:
    repositories.write_mlserver(folder, name, port)
    return Start((program("mlserver", "mlserver"), "start", str(folder)), OIP_READY)


def _start_bentoml(name: str, port: int, folder: Path) -> Start:
    command = (program("bentoml", "bentoml"), "serve", "bench.peers.servers.bentoml:Infer")
    return Start((*command, "--host", "127.0.0.1", "--port", str(port)), "/readyz")


def _start_module(environment: str, ready: str, name: str, port: int, folder: Path) -> Start:
    return Start((python(environment), "-m", f"bench.peers.servers.{environment}", str(port)), ready)


def _start_mosec(name: str, port: int, folder: Path) -> Start:
    options = ("--address", "127.0.0.1", "--port", str(port), "--log-level", "warning")
    return Start((python("mosec"), "-m", "bench.peers.servers.mosec", *options), "/")


def _from_pypi(environment: str, label: str, start: Starter, dialect: Dialect, settings: str) -> Peer:
    install = functools.partial(environments.install, environment)
    version = functools.partial(environments.installed_version, environment)
    return Peer(label, install, version, start, dialect, settings)


def _nothing() -> None:
    """It is here already."""


PEERS: Mapping[str, Peer] = {
    MILLRACE: Peer(
        "Millrace", _nothing, lambda: "this checkout", _start_millrace, OPEN_INFERENCE,
        "one process, `torch.export` archive; encoder: `max_batch_tokens` 1024, `max_padding` 0.1",
    ),
    TRITON: Peer(
        "Triton", environments.install_triton, lambda: "Triton 2.51 (nvidia-pytriton)", _start_triton, OPEN_INFERENCE,
        "python backend, one instance, no queue delay; encoder: ragged, padded by the model",
    ),
    "mosec": _from_pypi(
        "mosec", "mosec", _start_mosec, plain("/inference"),
        "one worker, `max_wait_time` 1 ms, the least that it takes",
    ),
    "litserve": _from_pypi(
        "litserve", "LitServe", functools.partial(_start_module, "litserve", "/health"), plain("/predict"),
        "one worker, one API server, `batch_timeout` 1 ms (0, its default, spins)",
    ),
    "mlserver": _from_pypi(
        "mlserver", "MLServer", _start_mlserver, OPEN_INFERENCE,
        "model in process, `max_batch_time` 1 ms; encoder: no batching, it joins equal lengths only",
    ),
    "bentoml": _from_pypi(
        "bentoml", "BentoML", _start_bentoml, BENTOML, "one worker, `batchable`, no limit to its predicted latency"
    ),
    "ray": _from_pypi(
        "ray", "Ray Serve", functools.partial(_start_module, "ray", "/-/healthz"), plain("/"),
        "one replica, `batch_wait_timeout_s` 1 ms, `max_ongoing_requests` 512",
    ),
    CONSTANT: Peer(
        "uvicorn, a constant", _nothing, lambda: "see above", _start_constant, OPEN_INFERENCE,
        "answers a constant: the floor",
    ),
}  # fmt: skip
