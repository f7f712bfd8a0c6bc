"""The model repository: what is on disk, and which versions of it are to be served.

models/<model>/config.pbtxt
models/<model>/<labels>.txt              named by output.label_filename
models/<model>/<version>/model.pt2       version: a positive whole number without leading zeros
"""

from dataclasses import dataclass, replace
from pathlib import Path

from .config import ModelConfig, parse_config
from .errors import ConfigError


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that is to be served.

    Attributes:
        files: version -> the model's file, ascending by version.
    """

    config: ModelConfig
    files: dict[int, Path]


def read_repository(root: Path) -> list[StoredModel]:
    """Find every model below `root`, by name.

    Raises:
        ConfigError: the folder, a config or a model's file is missing or unfit; the text names it.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: the model repository is no folder (MILLRACE_MODELS, --models)")
    models = [_read_model(folder) for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name[0] != "."]
    if not models:
        raise ConfigError(f"{root}: the model repository holds no model: no folder in it")
    return models


def _read_model(folder: Path) -> StoredModel:
    path = folder / "config.pbtxt"
    try:
        config = parse_config(path.read_text("utf-8"), folder.name, str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; every model needs one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    files = {version: _model_file(folder / str(version), config) for version in _versions(folder, config)}
    return StoredModel(_with_labels(folder, config), files)


def _versions(folder: Path, config: ModelConfig) -> list[int]:
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    found = sorted(int(name) for name in names if name.isascii() and name.isdigit() and name[0] != "0")
    if config.versions:
        chosen = [version for version in found if version in config.versions]
    else:
        chosen = found[-config.latest :] if config.latest else found
    if not chosen:
        raise ConfigError(
            f"{folder}: at least one version must be available under the version policy of model '{config.name}', "
            f"found {found}"
        )
    return chosen


def _model_file(folder: Path, config: ModelConfig) -> Path:
    for name in config.files:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{folder}: no model file: looked for {' and '.join(config.files)}")


def _with_labels(folder: Path, config: ModelConfig) -> ModelConfig:
    outputs = dict(config.outputs)
    for name, file in config.label_files.items():
        try:
            labels = tuple((folder / file).read_text("utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{folder / file}: label_filename of output '{name}' cannot be read: {error}") from None
        outputs[name] = replace(outputs[name], labels=labels)
    return replace(config, outputs=outputs)
