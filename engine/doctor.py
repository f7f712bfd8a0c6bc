"""What will not work, and why: the repository, the models in it and the machine, looked at before anything is served.

Each model is loaded for a moment, one after the other, and not run: that shows whether its file is what its config
says.
Of a Python model only the file and the config hook are run; what it does in `initialize` shows at start.
"""

import ast
import gc
import importlib
import importlib.util
import os
import resource
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .config import ModelConfig
from .errors import ConfigError, EngineError
from .loading import BACKENDS, available_memory, check_memory
from .repository import StoredModel, read_model, scan
from .settings import Settings
from .warmup import sample_requests

Grade = Literal["ok", "warning", "error"]

# What Python models import from this server.
PROVIDED = ("triton_python_backend_utils", "c_python_backend_utils")

# backend -> (module that it needs, what to install)
NEEDS = {
    "pytorch": ("torch", "pip install torch"),
    "onnxruntime": ("onnxruntime", "pip install onnxruntime"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        grade: "error" will not work, "warning" may not, or not well.
        where: the model, the setting or the part of the machine.
        text: what was found and, unless it is fine, what to do.
    """

    grade: Grade
    where: str
    text: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything, one thing after the other."""
    yield from _repository(settings)
    for look in (_socket, _descriptors, _backlog, _shared_memory):
        yield from look(settings)


def _repository(settings: Settings) -> Iterator[Finding]:
    roots = [Path(root) for root in settings.models.split(":")]
    for root in roots:
        if not root.is_dir():
            yield Finding("error", str(root), "is no folder; --models (MILLRACE_MODELS) names the model repository")
    folders = scan([root for root in roots if root.is_dir()])
    if not folders:
        yield Finding("error", settings.models, "holds no model: no folder in it is one")
    weights = 0
    for name, places in folders.items():
        if len(places) > 1:
            yield Finding("error", name, f"is in two repositories, {places[0]} and {places[1]}: neither is served")
            continue
        try:
            stored = read_model(places[0], auto_complete=settings.auto_complete)
        except EngineError as error:
            yield Finding("error", name, str(error))
            continue
        found = list(_model(stored))
        yield from found
        weights += sum(file.stat().st_size for file in stored.files.values() if file.is_file())
        if not found:
            config = stored.config
            versions = ", ".join(map(str, stored.files))
            yield Finding(
                "ok", name, f"{config.backend}, version {versions}, batches of {config.max_batch_size or 'none'}"
            )
    free = available_memory()
    if weights > free:
        yield Finding(
            "error", "memory", f"the models' files are {_size(weights)}, {_size(free)} of memory are available"
        )
    elif weights > free / 2:
        yield Finding("warning", "memory", f"the models' files are {_size(weights)}, {_size(free)} are available: a "
                      "reload needs room for two copies")  # fmt: skip


def _model(stored: StoredModel) -> Iterator[Finding]:
    config = stored.config
    module, remedy = NEEDS.get(config.backend, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        yield Finding(
            "error", config.name, f"backend {config.backend} needs {module}, which is not installed: {remedy}"
        )
        return
    for instance in config.instances:
        if instance.kind == "GPU" and (missing := _missing_gpu(instance.device)):
            yield Finding("error", config.name, f"instance_group asks for {instance.device}: {missing}")
            return
    for file in stored.files.values():
        if not os.access(file, os.R_OK):
            yield Finding("error", config.name, f"{file} cannot be read by this user; chmod or chown it")
        elif config.backend == "python":
            yield from _python(config.name, file)
        elif config.backend in BACKENDS:
            yield from _loaded(config, file)
    for sample in config.warmup:
        try:
            sample_requests(sample, config.max_batch_size > 0, stored.folder)
        except ConfigError as error:
            yield Finding("error", config.name, str(error))
    if config.max_batch_size > 1 and not config.batching and config.backend != "python":
        yield Finding("warning", config.name, "has max_batch_size and no dynamic_batching { }: requests run one by one")


def _loaded(config: ModelConfig, file: Path) -> Iterator[Finding]:
    """Whether a model's file can be loaded, and is what its config says."""
    try:
        check_memory(file, config)
        module, _, name = BACKENDS[config.backend].partition(":")
        backend = getattr(importlib.import_module(module), name)(config, file)
        backend.close()
    except Exception as error:
        text = str(error)
        if not isinstance(error, EngineError):  # of the backend's library
            text = f"{file}: {type(error).__name__}: {error}".splitlines()[0]
        yield Finding("error", config.name, text)
    finally:
        backend = None
        gc.collect()  # what it had is full of cycles, and the next model needs the memory


def _missing_gpu(device: str) -> str:
    """Why a device is not there; "" if it may be."""
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    if torch is None:
        return "" if Path("/dev/nvidia0").exists() else "there is no /dev/nvidia0"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0) if device.startswith("cuda") else 0
    return "" if index < count else f"torch {torch.__version__} sees {count} CUDA devices"


def _python(model: str, file: Path) -> Iterator[Finding]:
    """A Python model's source: whether it parses, and imports what is there."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        yield Finding("error", model, f"{file}{f', line {line}' if line else ''}: {getattr(error, 'msg', error)}")
        return
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for top in {name.partition(".")[0] for name in names}:
            beside = any((folder / top).exists() or (folder / f"{top}.py").exists() for folder in file.parents[:2])
            if beside or top in PROVIDED or top in sys.stdlib_module_names:
                continue
            if importlib.util.find_spec(top) is None:
                yield Finding("error", model, f"{file}, line {node.lineno}: imports {top}, which is not installed")


def _socket(settings: Settings) -> Iterator[Finding]:
    if settings.fd >= 0:
        yield from _inherited(settings.fd)
    elif settings.uds:
        folder = Path(settings.uds).absolute().parent
        if not folder.is_dir():
            yield Finding("error", "socket", f"{folder} is no folder (MILLRACE_UDS {settings.uds}); make it")
        elif not os.access(folder, os.W_OK | os.X_OK):
            yield Finding("error", "socket", f"{folder} cannot be written by this user (MILLRACE_UDS {settings.uds})")
        elif len(os.fsencode(settings.uds)) > 107:
            yield Finding("error", "socket", f"MILLRACE_UDS is {len(settings.uds)} characters long, 107 are possible")
        elif Path(settings.uds).exists() and not stat.S_ISSOCK(os.stat(settings.uds).st_mode):
            yield Finding("error", "socket", f"{settings.uds} exists and is no socket; remove it")
        else:
            yield Finding("ok", "socket", settings.uds)
    else:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((settings.host, settings.port))
            except OSError as error:
                yield Finding(
                    "error", "socket", f"{settings.host} port {settings.port}: {error.strerror}; --port takes another"
                )
                return
        yield Finding("ok", "socket", f"{settings.host} port {settings.port} is free")


def _inherited(fd: int) -> Iterator[Finding]:
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        yield Finding("error", "socket", f"MILLRACE_FD {fd}: {error.strerror}; supervisor and circus hand it over")
        return
    if not stat.S_ISSOCK(mode):
        yield Finding("error", "socket", f"MILLRACE_FD {fd} is no socket")


def _descriptors(settings: Settings) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = settings.max_connections + 64
    if soft < need:
        yield Finding(
            "error" if soft < 256 else "warning", "descriptors",
            f"{soft} may be open, {settings.max_connections} connections need {need}: ulimit -n {need} (at most {hard} "
            "here), minfds in supervisord.conf, or a smaller --max-connections",
        )  # fmt: skip
    else:
        yield Finding("ok", "descriptors", f"{soft} may be open, {need} are needed")


def _backlog(settings: Settings) -> Iterator[Finding]:
    limit = Path("/proc/sys/net/core/somaxconn")
    if limit.exists() and int(limit.read_text()) < settings.backlog:
        yield Finding(
            "warning", "backlog",
            f"the kernel holds {limit.read_text().strip()} connections, --backlog asks for {settings.backlog}: "
            f"sysctl net.core.somaxconn={settings.backlog}",
        )  # fmt: skip


def _shared_memory(settings: Settings) -> Iterator[Finding]:
    if not settings.shared_memory:
        return
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("error", "shared memory", "/dev/shm is not there; clients cannot pass tensors in it")
        return
    free = shutil.disk_usage(folder).free
    grade: Grade = "ok" if free >= 64 << 20 else "warning"
    yield Finding(grade, "shared memory", f"/dev/shm has {_size(free)} free; in Docker --shm-size sets its size")


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"


def report(settings: Settings, write: Callable[[str], object]) -> int:
    """Write a line for each finding. Returns the number of errors."""
    errors = 0
    for finding in examine(settings):
        errors += finding.grade == "error"
        write(f"{finding.grade:8} {finding.where}: {finding.text}")
    write(f"{errors} errors" if errors else "nothing stands in the way")
    return errors
