"""The model repository: what is on disk, and which versions of it are to be served.

models/<model>/config.pbtxt              may be missing where all of it follows from the model's file
models/<model>/<labels>.txt              named by output.label_filename
models/<model>/<version>/model.pt2       version: a positive whole number without leading zeros
models/<model>/warmup/<file>             named by model_warmup
"""

import ctypes
import functools
import importlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import ModelConfig, choose_versions, configure, deduce, read_json, read_text
from .errors import ConfigError

# backend -> "module:function" that fills in what a config leaves out: complete(message, file) -> None. Imported only
# when it is asked, since the modules import heavy libraries.
COMPLETERS = {
    "onnxruntime": "engine.backends.onnx:complete",
    "python": "engine.backends.python:complete",
    "pytorch": "engine.backends.pytorch:complete",
}

# Models of these may say more than what is missing from the config, so they are always asked.
ALWAYS_ASKED = frozenset({"python"})


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that is to be served.

    Attributes:
        folder: the model's.
        files: version -> the model's file, ascending by version; the version's folder if the backend needs no file.
    """

    config: ModelConfig
    folder: Path
    files: dict[int, Path]


def scan(roots: Sequence[Path]) -> dict[str, list[Path]]:
    """The models below `roots`, by name, each with every folder of that name: a model with two is ambiguous.

    Raises:
        ConfigError: a root is no folder.
    """
    folders: dict[str, list[Path]] = {}
    for root in roots:
        if not root.is_dir():
            raise ConfigError(f"{root}: the model repository is no folder (MILLRACE_MODELS, --models)")
        for folder in _entries(root):
            if folder.is_dir() and folder.name[0] != "." and folder.name.isprintable():  # no surrogates, no line breaks
                folders.setdefault(folder.name, []).append(folder)
    return dict(sorted(folders.items()))


def read_model(folder: Path, config: str | None = None, auto_complete: bool = True) -> StoredModel:
    """Read one model: its config, what follows from its file, its versions and its labels.

    Args:
        config: a config as JSON, to be used in the place of the folder's config.pbtxt.
        auto_complete: whether the model's file is asked for what the config leaves out.

    Raises:
        ConfigError: something is missing or unfit; the text names file, field and value.
    """
    path = folder / "config.pbtxt"
    if config is not None:
        where, message = "the given config", read_json(config, "the given config")
    else:
        try:
            where, message = str(path), read_text(path.read_text("utf-8"), str(path))
        except FileNotFoundError:
            if not auto_complete or not folder.is_dir():
                raise ConfigError(f"{path}: no such file; every model needs one") from None
            where = f"{path} (no such file)"
            message = read_text("", where)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
    found = versions(folder)
    there = [entry.name for entry in _entries(folder / str(found[0]))] if found else ()
    names = deduce(message, folder.name, there, where)
    chosen = _choose(found, message, folder, where)
    files = {version: _model_file(folder / str(version), names) for version in chosen}
    missing = not message.input or not message.output
    if auto_complete and message.backend in COMPLETERS and (missing or message.backend in ALWAYS_ASKED):
        _load(COMPLETERS[message.backend])(message, files[chosen[0]])
    return StoredModel(_with_labels(folder, configure(message, names, where, cuda_devices())), folder, files)


def fingerprint(folder: Path) -> Hashable:
    """What changes with everything that a model's folder holds: names, times and sizes. Links are followed.

    Folders have no time of their own in it, and __pycache__ is left out: running a model must not look like a change.
    """
    return tuple(_stamps(folder, "", frozenset()))


def _stamps(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    try:
        here = folder.stat()
        entries = sorted(folder.iterdir())
    except OSError:  # it is being taken away
        return
    inode = here.st_dev, here.st_ino
    if inode in above:  # a link to a folder that it is in
        return
    for entry in entries:
        name = prefix + entry.name
        try:
            if entry.is_dir():
                if entry.name != "__pycache__":
                    yield f"{name}/", 0, 0
                    yield from _stamps(entry, f"{name}/", above | {inode})
                continue
            stat = entry.stat()
        except OSError:
            continue
        yield name, stat.st_mtime_ns, stat.st_size


def overlay(name: str, files: Mapping[str, bytes], into: Path) -> Path:
    """Write a model's folder below `into`.

    Args:
        files: path in the model's folder -> content.

    Returns:
        The model's folder.

    Raises:
        ConfigError: the name or a path leads elsewhere, or cannot be written; the text names it.
    """
    if not _stays(name) or "/" in name:
        raise ConfigError(
            f"invalid model name '{name}', model name must not contain path traversal characters"
            if name
            else "Model name cannot be empty. Please enter a valid name to deploy."
        )
    folder = into / name
    for path, content in files.items():
        if not _stays(path):
            raise ConfigError(f"file:{path}: must be the path of a file in the model's folder")
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        except (OSError, ValueError) as error:  # ValueError: text that no file can be named by
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"file:{path}: cannot be written: {reason}") from None
    return folder


def _stays(path: str) -> bool:
    """Whether a path leads to something below where it starts."""
    return "\0" not in path and not any(part in ("", ".", "..") for part in path.split("/"))


def versions(folder: Path) -> list[int]:
    """The version folders of a model, ascending."""
    names = [entry.name for entry in _entries(folder) if entry.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and name[0] != "0")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error.strerror}") from None


def _choose(found: list[int], message: Any, folder: Path, where: str) -> list[int]:
    latest, listed = choose_versions(message, where)
    chosen = [version for version in found if version in listed] if listed else found[-latest:]  # 0: all
    if not chosen:
        raise ConfigError(
            f"{folder}: at least one version must be available under the version policy of model '{message.name}', "
            f"found {found}"
        )
    return chosen


def _model_file(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        file = folder / name
        if file.is_dir():  # how an ONNX model comes whose weights are in files of their own
            file = file / name
        if file.is_file():
            return file
    if names:
        raise ConfigError(f"{folder}: no model file: looked for {' and '.join(names)}")
    return folder


def _load(path: str) -> Callable[[Any, Path], None]:
    module, _, function = path.partition(":")
    complete: Callable[[Any, Path], None] = getattr(importlib.import_module(module), function)
    return complete


@functools.cache
def cuda_devices() -> int:
    """How many CUDA devices this process may use, asked of the driver itself: the libraries take seconds to import."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


def _with_labels(folder: Path, config: ModelConfig) -> ModelConfig:
    outputs = dict(config.outputs)
    for name, file in config.label_files.items():
        try:
            labels = tuple((folder / file).read_text("utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{folder / file}: label_filename of output '{name}' cannot be read: {error}") from None
        outputs[name] = replace(outputs[name], labels=labels)
    return replace(config, outputs=outputs)
