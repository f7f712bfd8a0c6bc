"""The repository: which models and versions there are, and what is wrong with a folder."""

from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.repository import read_repository
from tests.scripted import CONFIG, add_model


def test_models_and_versions(tmp_path: Path) -> None:
    """Models by name; version folders are positive numbers without leading zeros, everything else is not looked at."""
    add_model(tmp_path, "b", CONFIG + "version_policy { all { } }", ("1", "10", "2"))
    add_model(tmp_path, "a", versions=("3", "7"))
    for name in ("01", "0", "x", "-1", "1.5", "²"):
        (tmp_path / "b" / name).mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.md").touch()
    models = read_repository(tmp_path)
    assert [(m.config.name, list(m.files)) for m in models] == [("a", [7]), ("b", [1, 2, 10])]


@pytest.mark.parametrize(
    ("policy", "served"),
    [("latest { num_versions: 2 }", [4, 9]), ("latest { }", [9]), ("specific { versions: [1, 4, 77] }", [1, 4])],
)
def test_version_policy(tmp_path: Path, policy: str, served: list[int]) -> None:
    """latest counts from the highest number, specific takes those that exist."""
    add_model(tmp_path, "m", CONFIG + f"version_policy {{ {policy} }}", ("1", "4", "9"))
    assert list(read_repository(tmp_path)[0].files) == served


def test_labels(tmp_path: Path) -> None:
    """An output's labels come from the file its config names, a line each."""
    folder = add_model(tmp_path, "m", CONFIG.replace('name: "y"', 'name: "y" label_filename: "l.txt"'))
    (folder / "l.txt").write_text("zero\neins\n", "utf-8")
    assert read_repository(tmp_path)[0].config.outputs["y"].labels == ("zero", "eins")


def test_a_link_to_a_model_is_a_model(tmp_path: Path) -> None:
    """Folders and files may be links, as release tools make them."""
    add_model(tmp_path / "store", "m")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "m").symlink_to(tmp_path / "store" / "m")
    assert len(read_repository(tmp_path / "repository")) == 1


def spoil(tmp_path: Path, case: str) -> str:
    folder = add_model(tmp_path, "m")
    if case == "no repository":
        return "nowhere: the model repository is no folder"
    if case == "empty":
        (tmp_path / "empty").mkdir()
        return "holds no model"
    if case == "no config":
        (folder / "config.pbtxt").unlink()
        return "config.pbtxt: no such file"
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


@pytest.mark.parametrize(
    "case", ["no repository", "empty", "no config", "config no text", "no version", "no file", "no labels"]
)
def test_what_is_missing_is_named(tmp_path: Path, case: str) -> None:
    """Each way in which a repository can be unfit gives an error that names the folder or file."""
    text = spoil(tmp_path, case)
    root = {"no repository": tmp_path / "nowhere", "empty": tmp_path / "empty"}.get(case, tmp_path)
    with pytest.raises(ConfigError, match=text):
        read_repository(root)
