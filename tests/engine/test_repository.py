"""The repository: which models and versions there are, and what is wrong with a folder."""

import os
from pathlib import Path
from typing import Any

import pytest

from engine import repository
from engine.errors import ConfigError
from engine.repository import COMPLETERS, StoredModel, fingerprint, overlay, read_model, scan
from tests.scripted import CONFIG, add_model


def read_all(*roots: Path) -> list[StoredModel]:
    """Every model, by name; each is in one of the roots."""
    return [read_model(folder) for (folder,) in scan(roots).values()]


def test_models_and_versions(tmp_path: Path) -> None:
    """Models by name; version folders are positive numbers without leading zeros, everything else is not looked at."""
    add_model(tmp_path, "b", CONFIG + "version_policy { all { } }", ("1", "10", "2"))
    add_model(tmp_path, "a", versions=("3", "7"))
    for name in ("01", "0", "x", "-1", "1.5", "²"):
        (tmp_path / "b" / name).mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.md").touch()
    models = read_all(tmp_path)
    assert [(m.config.name, list(m.files)) for m in models] == [("a", [7]), ("b", [1, 2, 10])]


@pytest.mark.parametrize(
    ("policy", "served"),
    [("latest { num_versions: 2 }", [4, 9]), ("latest { }", [9]), ("specific { versions: [1, 4, 77] }", [1, 4])],
)
def test_version_policy(tmp_path: Path, policy: str, served: list[int]) -> None:
    """latest counts from the highest number, specific takes those that exist."""
    add_model(tmp_path, "m", CONFIG + f"version_policy {{ {policy} }}", ("1", "4", "9"))
    assert list(read_all(tmp_path)[0].files) == served


def test_labels(tmp_path: Path) -> None:
    """An output's labels come from the file its config names, a line each."""
    folder = add_model(tmp_path, "m", CONFIG.replace('name: "y"', 'name: "y" label_filename: "l.txt"'))
    (folder / "l.txt").write_text("zero\neins\n", "utf-8")
    assert read_all(tmp_path)[0].config.outputs["y"].labels == ("zero", "eins")


def test_a_link_to_a_model_is_a_model(tmp_path: Path) -> None:
    """Folders and files may be links, as release tools make them."""
    add_model(tmp_path / "store", "m")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "m").symlink_to(tmp_path / "store" / "m")
    assert len(read_all(tmp_path / "repository")) == 1


def spoil(tmp_path: Path, case: str) -> str:
    folder = add_model(tmp_path, "m")
    if case == "no repository":
        return "nowhere: the model repository is no folder"
    if case == "empty":
        (tmp_path / "empty").mkdir()
        return "holds no model"
    if case == "no config":
        (folder / "config.pbtxt").unlink()
        (folder / "1" / "model.pt2").unlink()
        return r"config.pbtxt \(no such file\): backend: Invalid model name: Could not determine backend for model 'm'"
    if case == "config no text":
        (folder / "config.pbtxt").write_bytes(b"\xff\xfe")
        return "config.pbtxt: cannot be read"
    if case == "no version":
        (folder / "1").rename(folder / "one")
        return "at least one version must be available"
    if case == "no file":
        (folder / "1" / "model.pt2").unlink()
        return "1: no model file: looked for model.pt2 and model.pt"
    (folder / "config.pbtxt").write_text(CONFIG.replace('name: "y"', 'name: "y" label_filename: "l.txt"'))
    return "l.txt: label_filename of output 'y' cannot be read"


@pytest.mark.parametrize("case", ["no repository", "no config", "config no text", "no version", "no file", "no labels"])
def test_what_is_missing_is_named(tmp_path: Path, case: str) -> None:
    """Each way in which a repository can be unfit gives an error that names the folder or file."""
    text = spoil(tmp_path, case)
    root = {"no repository": tmp_path / "nowhere"}.get(case, tmp_path)
    with pytest.raises(ConfigError, match=text):
        read_all(root)


def test_models_of_several_repositories(tmp_path: Path) -> None:
    """They are one list, by name; what is in two of them is ambiguous, and named with both."""
    one, two = tmp_path / "one", tmp_path / "two"
    add_model(one, "b")
    add_model(two, "a")
    assert scan([one, two]) == {"a": [two / "a"], "b": [one / "b"]}
    assert [(model.config.name, model.folder) for model in read_all(one, two)] == [
        ("a", two / "a"),
        ("b", one / "b"),
    ]
    add_model(two, "b")
    assert scan([one, two])["b"] == [one / "b", two / "b"]
    with pytest.raises(ConfigError, match="three: the model repository is no folder"):
        scan([one, tmp_path / "three"])


def without_config(root: Path, name: str, file: str) -> Path:
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / file).touch()
    return root / name


def fill_in(message: Any, file: Path) -> None:
    for tensors in (message.input, message.output):
        if not tensors:
            tensors.add(name=f"{file.parent.name}/{file.name}", data_type="TYPE_FP32", dims=[2])


def refuse(message: Any, file: Path) -> None:
    raise ConfigError(f"{file}: asked")


@pytest.mark.parametrize(
    ("file", "platform"), [("model.onnx", "onnxruntime_onnx"), ("model.pt2", ""), ("model.py", "")]
)
def test_a_model_without_a_config(file: str, platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of it follows from the file, config.pbtxt may be missing; the file asked is the one to be served."""
    for backend in COMPLETERS:
        monkeypatch.setitem(COMPLETERS, backend, f"{__name__}:fill_in")
    folder = without_config(tmp_path, "m", file)
    without_config(tmp_path, "m/warmup", "x")  # no version: the file is looked for in the first one
    (folder / "2").mkdir()
    (folder / "2" / file).touch()
    config = read_model(folder).config
    assert (config.platform, list(config.inputs), config.max_batch_size) == (platform, [f"2/{file}"], 0)
    with pytest.raises(ConfigError, match="config.pbtxt: no such file; every model needs one"):
        read_model(folder, auto_complete=False)
    with pytest.raises(ConfigError, match="config.pbtxt: no such file"):
        read_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "auto_complete", "asked"),
    [
        (CONFIG, True, False),
        (CONFIG.replace("output", "#"), True, True),
        (CONFIG.replace("input", "#"), True, True),
        (CONFIG.replace("pytorch", "python"), True, True),
        (CONFIG.replace("pytorch", "python"), False, False),
    ],
)
def test_who_is_asked_what_is_missing(
    config: str, auto_complete: bool, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend, if inputs or outputs are missing; a Python model always, unless nobody is to be asked."""
    for backend in COMPLETERS:
        monkeypatch.setitem(COMPLETERS, backend, f"{__name__}:refuse")
    folder = add_model(tmp_path, "m", config)
    (folder / "1" / "model.py").touch()
    if asked:
        with pytest.raises(ConfigError, match=r"1/model\.p.*: asked$"):
            read_model(folder, auto_complete=auto_complete)
    else:
        assert read_model(folder, auto_complete=auto_complete).config.name == "m"


def test_what_is_missing_and_not_asked_for_is_refused(tmp_path: Path) -> None:
    """Without auto-complete, a config has to say it all."""
    folder = add_model(tmp_path, "m", CONFIG.replace("output", "#"))
    with pytest.raises(ConfigError, match="m/config.pbtxt: output: the model must have at least one output"):
        read_model(folder, auto_complete=False)


def test_a_config_in_the_place_of_the_file(tmp_path: Path) -> None:
    """It replaces all of config.pbtxt; errors name it, and no path."""
    folder = add_model(tmp_path, "m")
    given = """{"backend": "pytorch", "max_batch_size": "5", "input": [{"name": "a", "dataType": "TYPE_INT8",
        "dims": [1]}], "output": [{"name": "y", "dataType": "TYPE_INT8", "dims": [1]}]}"""
    config = read_model(folder, given).config
    assert (config.max_batch_size, list(config.inputs), config.batching) == (5, ["a"], False)
    with pytest.raises(ConfigError, match="^the given config: max_batch_size: "):
        read_model(folder, given.replace('"5"', "-5"))
    with pytest.raises(ConfigError, match="^the given config: must be a JSON object$"):
        read_model(folder, "max_batch_size: 5")


def test_files_of_a_model(tmp_path: Path) -> None:
    """An identity model is its version's folder; an ONNX one may be a folder with the file and its weights in it."""
    io = CONFIG.replace('backend: "pytorch"', "")
    folder = add_model(tmp_path, "i", 'backend: "identity"' + io)
    assert read_model(folder).files == {1: folder / "1"}
    folder = add_model(tmp_path, "o", 'platform: "onnxruntime_onnx"' + io)
    (folder / "1" / "model.onnx").mkdir()
    (folder / "1" / "model.onnx" / "weights").touch()
    with pytest.raises(ConfigError, match=r"o/1: no model file: looked for model\.onnx$"):
        read_model(folder)
    (folder / "1" / "model.onnx" / "model.onnx").touch()
    assert read_model(folder).files == {1: folder / "1" / "model.onnx" / "model.onnx"}


def test_the_devices_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances are for the GPUs that there are."""
    folder = add_model(tmp_path, "m", CONFIG + "instance_group { kind: KIND_GPU }")
    monkeypatch.setattr(repository, "cuda_devices", lambda: 2)
    assert [instance.device for instance in read_model(folder).config.instances] == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(repository, "cuda_devices", lambda: 0)
    with pytest.raises(ConfigError, match="has kind KIND_GPU but no GPUs are available"):
        read_model(folder)


class Driver:
    """Answers as CUDA's does."""

    def __init__(self, status: int) -> None:
        self.status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 3
        return 0


@pytest.mark.parametrize(("status", "count"), [(0, 3), (100, 0)])
def test_counting_devices(status: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver says how many; a driver that cannot start has none, and so has a machine without one."""
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver(status))
    assert repository.cuda_devices.__wrapped__() == count

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert repository.cuda_devices.__wrapped__() == 0


def test_a_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    """With a name, a time or a size of any file, links followed; not with what running a model leaves behind."""
    folder = add_model(tmp_path / "store", "m")
    (tmp_path / "m").symlink_to(folder)
    (folder / "loop").symlink_to(folder)
    seen = [fingerprint(tmp_path / "m")]

    def changed() -> bool:
        seen.append(fingerprint(tmp_path / "m"))
        return seen[-1] != seen[-2]

    assert not changed()
    (folder / "1" / "__pycache__").mkdir()
    (folder / "1" / "__pycache__" / "model.pyc").touch()
    assert not changed()
    (folder / "1" / "more").touch()
    assert changed()
    (folder / "1" / "more").rename(folder / "1" / "most")
    assert changed()
    (folder / "1" / "most").write_bytes(b"x")
    assert changed()
    os.utime(folder / "config.pbtxt", (1, 1))
    assert changed()
    (folder / "2").mkdir()
    assert changed()
    assert fingerprint(tmp_path / "nowhere") == ()


def test_an_overlay_is_a_model(tmp_path: Path) -> None:
    """Files that came with a request are written as a model's folder, which is read as any other."""
    files = {"1/model.pt2": b"", "config.pbtxt": CONFIG.encode(), "warmup/a/b": b"x"}
    folder = overlay("m", files, tmp_path)
    assert folder == tmp_path / "m"
    assert (folder / "warmup" / "a" / "b").read_bytes() == b"x"
    assert read_model(folder).files == {1: folder / "1" / "model.pt2"}


@pytest.mark.parametrize(
    "path",
    ["", "..", "/etc/passwd", "../m2/x", "1/../../x", "1//x", "1/./x", "a\0b", "1/", "x" * 300, "\ud800", "1/f/g"],
)
def test_an_overlay_stays_in_its_folder(path: str, tmp_path: Path) -> None:
    """Paths come from a client: one that leads out, or that is none, is refused before anything is written by it."""
    with pytest.raises(ConfigError, match="^file:"):
        overlay("m", {"1/f": b"", path: b"x"}, tmp_path / "in")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / "in" / "m" / "1" / "f"]


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "/a", "a\0"])
def test_an_overlay_has_a_plain_name(name: str, tmp_path: Path) -> None:
    """The model's name comes from a client too."""
    with pytest.raises(ConfigError, match="odel name"):
        overlay(name, {"f": b""}, tmp_path / "in")
    assert list(tmp_path.iterdir()) == []
