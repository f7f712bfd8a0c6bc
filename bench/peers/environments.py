"""Where each peer lives: an environment of its own from PyPI, made once, and never seen by the others.

They ask for each other's dependencies in versions that exclude one another, so there is one folder for each below
.venv/peers, or below $PEERS_HOME. A stamp in it holds what was asked for: another pin makes it anew.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.differential import triton

from ..report import progress
from ..servers import ROOT, BenchError

HOME = Path(os.environ.get("PEERS_HOME") or ROOT / ".venv" / "peers")
# Alone and before all else: whatever asks for torch afterwards finds it, and brings no other build of it.
TORCH = "torch==2.13.0"
STAMP = "installed.txt"
PATIENCE = 1800.0  # seconds for one environment


class Environment(NamedTuple):
    """Attributes:
    distribution: whose version the report tells.
    pins: what pip is asked for, after torch.
    """

    distribution: str
    pins: Sequence[str]


ENVIRONMENTS = {
    "mosec": Environment("mosec", ("mosec==0.9.8", "numpy==2.4.6")),
    "litserve": Environment("litserve", ("litserve==0.2.19", "numpy==2.4.6")),
    "bentoml": Environment("bentoml", ("bentoml==1.4.39", "numpy==2.4.6")),
    # With a newer uvloop it does not start: "no current event loop".
    "mlserver": Environment("mlserver", ("mlserver==1.7.1", "uvloop==0.21.0")),
    "ray": Environment("ray", ("ray[serve]==2.60.0", "numpy==2.4.6")),
}


def python(name: str) -> str:
    """The interpreter of an environment."""
    return str(HOME / name / "bin" / "python")


def program(name: str, script: str) -> str:
    """A command that an environment's packages brought."""
    return str(HOME / name / "bin" / script)


def install(name: str) -> None:
    """Make an environment, unless it is there as its pins ask for.

    Raises:
        BenchError: pip or the network does not give it; the text ends as pip's did.
    """
    folder, environment = HOME / name, ENVIRONMENTS[name]
    asked = "\n".join((TORCH, *environment.pins))
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == asked:
        return
    shutil.rmtree(folder, ignore_errors=True)
    progress(f"installing {name}: {', '.join(environment.pins)}, and torch")
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([python(name), "-m", "pip", "install", "-q", TORCH])
    _run([python(name), "-m", "pip", "install", "-q", TORCH, *environment.pins])
    stamp.write_text(asked)


def install_triton() -> None:
    """As the differential tests do.

    Raises:
        BenchError: it cannot be had here.
    """
    if not triton.missing():
        return
    progress("installing Triton")
    try:
        triton.install()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"Triton cannot be installed: {error}") from None
    if reason := triton.missing():
        raise BenchError(reason)


def installed_version(name: str) -> str:
    """Of the peer, as its own environment tells it."""
    distribution = ENVIRONMENTS[name].distribution
    code = f"from importlib.metadata import version; print(version({distribution!r}))"
    return f"{distribution} {_run([python(name), '-c', code]).strip()}"


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise BenchError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout
