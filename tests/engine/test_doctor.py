"""The doctor: each thing that will not work is found, with its reason and what to do; what works is let alone."""

import resource
import socket
import warnings
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from engine import doctor, loading
from engine.config import ModelConfig
from engine.doctor import Finding, examine, report
from engine.loading import BACKENDS
from engine.settings import Settings
from tests.scripted import CONFIG, add_model

PYTHON = CONFIG.replace("pytorch", "python")

pytestmark = pytest.mark.usefixtures("scripted")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def findings(root: Path, grade: str = "error", **settings: Any) -> list[Finding]:
    chosen = Settings(**{"models": str(root), "port": free_port(), "max_connections": 64, "backlog": 16, **settings})
    return [finding for finding in examine(chosen) if finding.grade == grade]


def python_model(root: Path, source: str) -> None:
    add_model(root, "p", PYTHON)
    (root / "p" / "1" / "model.pt2").unlink()
    (root / "p" / "1" / "model.py").write_text(source)


def test_a_sound_repository_is_sound(tmp_path: Path) -> None:
    """Each model is listed with its backend and versions; nothing stands in the way."""
    add_model(tmp_path, "m", versions=("1", "2"))
    python_model(
        tmp_path, "import json\nimport numpy\nimport triton_python_backend_utils\nclass TritonPythonModel: pass\n"
    )
    assert findings(tmp_path) == []
    assert [finding.where for finding in findings(tmp_path, "ok")][:2] == ["m", "p"]
    lines: list[str] = []
    settings = Settings(models=str(tmp_path), port=free_port(), max_connections=64, backlog=16)
    assert report(settings, lines.append) == 0
    assert lines[-1] == "nothing stands in the way"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("nonsense { }", "no field named"),
        (CONFIG + "sequence_batching { }", "sequence_batching"),
        (CONFIG.replace("TYPE_FP32", "TYPE_FP31", 1), "TYPE_FP31"),
        (CONFIG.replace("pytorch", "tensorrt"), "tensorrt"),
        (CONFIG + "version_policy { specific { versions: [ 7 ] } }", "at least one version"),
        (CONFIG.replace('name: "y"', 'name: "y" label_filename: "none.txt"'), "none.txt"),
    ],
)
def test_a_config_that_cannot_be_served_is_told_as_at_start(tmp_path: Path, config: str, text: str) -> None:
    add_model(tmp_path, "m", config)
    (found,) = findings(tmp_path)
    assert found.where == "m"
    assert text in found.text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def (", "SyntaxError: invalid syntax"),
        ("x = 1", "has no attribute 'TritonPythonModel'"),
        ("import absent_one.part\nclass TritonPythonModel: pass", "No module named 'absent_one'"),
        (
            "from absent_one import x\nclass TritonPythonModel: pass",
            "No module named 'absent_one'",
        ),
    ],
)
def test_a_python_models_source_is_read_and_not_run(tmp_path: Path, source: str, text: str) -> None:
    python_model(tmp_path, source)
    assert any(text in found.text for found in findings(tmp_path)), findings(tmp_path)


def test_what_lies_beside_a_python_model_may_be_imported(tmp_path: Path) -> None:
    python_model(tmp_path, "import net\nimport package.part\nclass TritonPythonModel: pass")
    (tmp_path / "p" / "1" / "net.py").write_text("")
    (tmp_path / "p" / "1" / "package").mkdir()
    (tmp_path / "p" / "1" / "package" / "part.py").write_text("")
    assert findings(tmp_path) == []


def test_a_backend_that_is_not_installed_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(tmp_path, "m")
    monkeypatch.setitem(doctor.NEEDS, "pytorch", ("absent_one", "pip install it"))
    (found,) = findings(tmp_path)
    assert "needs absent_one, which is not installed: pip install it" in found.text


def test_repositories_that_are_not_there_or_share_a_name(tmp_path: Path) -> None:
    """Each is named; a model in two of them is served by neither."""
    (found, empty) = findings(tmp_path / "none")
    assert (found.where, "is no folder" in found.text) == (str(tmp_path / "none"), True)
    assert "holds no model" in empty.text
    for root in "ab":
        add_model(tmp_path / root, "m")
    (found,) = findings(tmp_path, models=f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert "is in two repositories" in found.text


def test_models_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error if they cannot fit, a warning if there is no room for two copies."""
    add_model(tmp_path, "m")
    (tmp_path / "m" / "1" / "model.pt2").write_bytes(bytes(100))
    for free, grade in ((99, "error"), (199, "warning")):
        monkeypatch.setattr(doctor, "available_memory", lambda free=free: free)
        assert [found.where for found in findings(tmp_path, grade)] == ["memory"]
    monkeypatch.setattr(doctor, "available_memory", lambda: 200)
    assert findings(tmp_path) == findings(tmp_path, "warning") == []


def test_sockets_that_cannot_be_had(tmp_path: Path) -> None:
    """A port that is taken, a folder that is not there, a path too long or of a file, a descriptor that is none."""
    add_model(tmp_path, "m")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (found,) = findings(tmp_path, port=taken.getsockname()[1])
    assert "--port takes another" in found.text
    (tmp_path / "file").write_text("")
    for settings, text in (
        ({"uds": str(tmp_path / "none" / "s")}, "is no folder"),
        ({"uds": str(tmp_path / ("s" * 120))}, "107 are possible"),
        ({"uds": str(tmp_path / "file")}, "exists and is no socket"),
        ({"fd": 1000}, "Bad file descriptor"),
    ):
        (found,) = findings(tmp_path, **settings)
        assert (found.where, text in found.text) == ("socket", True), found
    with (tmp_path / "file").open() as file:
        (found,) = findings(tmp_path, fd=file.fileno())
    assert "is no socket" in found.text
    assert findings(tmp_path, uds=str(tmp_path / "s")) == []


def test_limits_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few descriptors for the connections, and how to get more."""
    add_model(tmp_path, "m")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    (found,) = findings(tmp_path, "warning", max_connections=8192)
    assert "1024 may be open" in found.text
    assert "ulimit -n 8256" in found.text
    monkeypatch.setattr(resource, "getrlimit", lambda what: (200, 4096))
    assert [found.where for found in findings(tmp_path, max_connections=8192)] == ["descriptors"]


def test_rows_without_batching_are_pointed_out(tmp_path: Path) -> None:
    add_model(tmp_path, "m", CONFIG.replace("dynamic_batching { }", ""))
    (found,) = findings(tmp_path, "warning")
    assert "requests run one by one" in found.text


def test_a_file_that_is_not_what_its_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model is loaded for a moment: what is no model, and one that takes other inputs, are told."""
    monkeypatch.setitem(BACKENDS, "pytorch", "engine.backends.pytorch:PyTorchBackend")
    script(tmp_path)
    assert findings(tmp_path) == []
    (tmp_path / "s" / "config.pbtxt").write_text(SCRIPT.replace('name: "x"', 'name: "x__1"'))
    (found,) = findings(tmp_path)
    assert (found.where, "lack one that ends in __0" in found.text) == ("s", True), found
    (tmp_path / "s" / "config.pbtxt").write_text(SCRIPT)
    (tmp_path / "s" / "1" / "model.pt").write_bytes(b"junk")
    (found,) = findings(tmp_path)
    assert "s/1/model.pt: cannot be loaded" in found.text


class Heavy:
    """A model full of cycles, which only the garbage collector frees."""

    there: ClassVar[list["weakref.ref[Heavy]"]] = []
    most = 0
    closed = 0

    def __init__(self, config: ModelConfig, file: Path) -> None:
        self.me = self
        self.there.append(weakref.ref(self))
        Heavy.most = max(Heavy.most, sum(heavy() is not None for heavy in self.there))
        if config.name == "bad":
            raise ValueError("not me")

    def close(self) -> None:
        Heavy.closed += 1


def test_one_model_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is closed and freed before the next is loaded, also one that fails."""
    monkeypatch.setitem(BACKENDS, "pytorch", "tests.engine.test_doctor:Heavy")
    for name in ("a", "bad", "c", "d"):
        add_model(tmp_path, name, versions=("1",))
    assert ["not me" in found.text for found in findings(tmp_path)] == [True]
    assert (len(Heavy.there), Heavy.most, Heavy.closed) == (4, 1, 3)


def test_no_model_is_loaded_that_is_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_model(tmp_path, "m")
    (tmp_path / "m" / "1" / "model.pt2").write_bytes(bytes(8))
    monkeypatch.setattr(loading, "available_memory", lambda: 7)
    (found,) = findings(tmp_path)
    assert "model.pt2 is 8 bytes, and 7 bytes of memory are available" in found.text


SCRIPT = CONFIG


def script(root: Path) -> None:
    """A model of TorchScript that doubles."""
    (root / "s" / "1").mkdir(parents=True)
    (root / "s" / "config.pbtxt").write_text(SCRIPT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Double()), str(root / "s" / "1" / "model.pt"))


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x
