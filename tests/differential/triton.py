"""A real Triton Inference Server on a machine without a GPU and without containers, as the reference to compare with.

The wheel nvidia-pytriton carries tritonserver 2.51 with the python backend and the local response cache.

    python -m tests.differential.triton     install it, once per machine: Debian's python3.11 and root needed

The backend's interpreter is the system's own and looks only into the system's packages: hence the .pth file there.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HOME = Path(os.environ.get("TRITON_HOME") or Path.home() / ".cache/triton")
SITE = HOME / "venv/lib/python3.11/site-packages"
SERVER = SITE / "pytriton/tritonserver"
BACKENDS = HOME / "backends"
STUB = BACKENDS / "python/triton_python_backend_stub"
PACKAGES = ("nvidia-pytriton", "torch==2.13.0", "numpy")
SYSTEM_PYTHON = "/usr/bin/python3"


def missing() -> str:
    """Why Triton cannot be started here; "" if it can."""
    for path in (SERVER / "bin/tritonserver", STUB):
        if not path.exists():
            return f"Triton is not installed ({path} is not there): python -m tests.differential.triton"
    if str(SITE) not in {path.read_text().strip() for path in _system_packages().glob("*.pth")}:
        return f"Triton's python models would not find numpy: python -m tests.differential.triton ({SITE})"
    return ""


def install() -> None:
    """Make what `missing` asks for.

    Raises:
        subprocess.CalledProcessError: no network, or no python3.11.
        OSError: not allowed to write where the system's packages are.
    """
    venv = HOME / "venv"
    if not venv.exists():
        subprocess.run(["python3.11", "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin/pip", "install", "-q", *PACKAGES], check=True)
    shutil.copytree(SERVER / "backends/python", STUB.parent, dirs_exist_ok=True)
    shutil.copy2(SERVER / "python_backend_stubs/3.11" / STUB.name, STUB)
    _system_packages().mkdir(parents=True, exist_ok=True)
    (_system_packages() / "triton_reference.pth").write_text(f"{SITE}\n")


def command(repository: Path, http: int, grpc: int, metrics: int, options: Sequence[str]) -> list[str]:
    """What starts Triton on `repository` in the foreground; SIGTERM stops it."""
    return [
        "env",
        f"LD_LIBRARY_PATH={SITE / 'nvidia_pytriton.libs'}",
        str(SERVER / "bin/tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={BACKENDS}",
        f"--cache-directory={SERVER / 'caches'}",
        "--http-address=127.0.0.1",
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        "--exit-timeout-secs=5",
        *options,
    ]


def _system_packages() -> Path:
    """The first of the system python's folders of packages."""
    program = "import site; print(site.getsitepackages()[0])"
    if not Path(SYSTEM_PYTHON).exists():
        return Path("/nonexistent")
    return Path(
        subprocess.run([SYSTEM_PYTHON, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
    )


if __name__ == "__main__":
    if missing():
        install()
    print(missing() or f"Triton is in {HOME}")
