"""A model's modules: its own, found by whatever way they are imported, and gone when it is."""

import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.backends.python_module import PythonModule, caller
from engine.errors import EngineError


def write(folder: Path, **files: str) -> Path:
    """A model's folder; `a__b` is b.py in the folder a. Returns model.py of version 1."""
    for name, text in files.items():
        path = folder.joinpath("1", *name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "1" / "model.py"


@pytest.fixture
def load() -> Iterator[Any]:
    modules = []

    def load(file: Path, owner: object = None) -> ModuleType:
        module = PythonModule(file, owner)
        modules.append(module)
        return module.load()

    yield load
    for module in modules:
        module.unload()


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Not in sys.modules, and not its siblings."""
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        PythonModule(write(tmp_path / "m", model="import net\n1 / 0", net="")).load()
    assert set(sys.modules) == before


def test_siblings_of_two_models_do_not_meet(tmp_path: Path, load: Any) -> None:
    """Files of one name, imported in every way, at import and while the model runs."""
    text = """
import net
from net import NAME
from lib import deep
import lib.deep as again
import lib.deep
from lib.deep import *
def late():
    import late_one
    return late_one.NAME, STAR
"""
    models = []
    for name in ("a", "b"):
        files = {
            "net": f"NAME = '{name}'",
            "late_one": "import net\nNAME = net.NAME * 2",
            "lib____init__": "",
            "lib__deep": "from . import other\nSTAR = other.STAR",
            "lib__other": f"STAR = '{name}!'",
        }
        models.append(load(write(tmp_path / name, model=text, **files)))
    assert [(m.NAME, m.net.NAME, m.deep.STAR, m.again is m.deep is m.lib.deep) for m in models] == [
        ("a", "a", "a!", True), ("b", "b", "b!", True),
    ]  # fmt: skip
    assert [model.late() for model in models] == [("aa", "a!"), ("bb", "b!")]
    assert not {"net", "lib", "late_one"} & set(sys.modules)


def test_the_models_folder_is_searched_after_the_versions(tmp_path: Path, load: Any) -> None:
    """Both are importable; a folder without __init__.py is a package as well; what is missing is missing."""
    file = write(tmp_path / "m", model="import both, above\nfrom space.inner import X", both="X = 'version'",
                 space__inner="X = 3")  # fmt: skip
    (tmp_path / "m" / "both.py").write_text("X = 'model'")
    (tmp_path / "m" / "above.py").write_text("X = 'above'")
    model = load(file)
    assert (model.both.X, model.above.X, model.X) == ("version", "above", 3)
    with pytest.raises(ModuleNotFoundError, match="No module named 'absent_one'"):
        load(write(tmp_path / "n", model="import absent_one"))


def test_nothing_of_a_model_is_in_the_way_of_libraries(tmp_path: Path, load: Any) -> None:
    """The standard library and pb_utils are themselves; a folder of weights is not taken for a library."""
    file = write(tmp_path / "m", model="import json, numpy", json="", triton_python_backend_utils="")
    (tmp_path / "m" / "numpy").mkdir()
    model = load(file)
    assert model.json is sys.modules["json"]
    assert model.numpy is sys.modules["numpy"]


def test_a_models_file_comes_before_ours(tmp_path: Path, load: Any) -> None:
    """`engine` is a package of the server; a model's engine.py is nevertheless what it imports."""
    assert load(write(tmp_path / "m", model="from engine import X", engine="X = 7")).X == 7
    assert not hasattr(sys.modules["engine"], "X")


def test_imports_on_behalf_of_a_model_find_its_files(tmp_path: Path, load: Any) -> None:
    """A pickle made elsewhere names the class's file; importlib is asked by name. The names are given back after."""
    text = """
import importlib, pickle, net
def unpickle(data):
    return pickle.loads(data)
def by_name(name):
    return importlib.import_module(name)
"""
    data = b"cnet\nNet\n."  # what pickle.dumps says of a class Net of a module net
    handles = []
    for name in ("a", "b"):
        files = {"net": f"class Net:\n    name = '{name}'", "lib____init__": "", "lib__deep": f"X = '{name}'"}
        module = PythonModule(write(tmp_path / name, model=text, **files))
        handles.append(module)
        model = module.load()
        assert model.unpickle(data) is model.net.Net
        assert name == model.by_name("lib.deep").X
        assert model.by_name("net").__spec__.name == model.net.__name__
        module.forget_aliases()
    assert not {"net", "lib", "lib.deep"} & set(sys.modules)
    for module in handles:
        module.unload()
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(data)


def test_pickles_of_two_models_that_run_at_once(tmp_path: Path, load: Any) -> None:
    """Each finds its own file, or package, while the other one's is there under the same name; libraries stay."""
    text = "import pickle\ndef unpickle(data):\n    return pickle.loads(data)"
    models = []
    for name in ("a", "b"):
        files = {"net": f"X = '{name}'", "lib____init__": "", "lib__deep": f"X = '{name}!'", "engine": "X = 1"}
        models.append(load(write(tmp_path / name, model=text, **files)))
    for _ in range(2):
        assert [model.unpickle(b"cnet\nX\n.") for model in models] == ["a", "b"]
        assert [model.unpickle(b"clib.deep\nX\n.") for model in models] == ["a!", "b!"]
    assert models[0].unpickle(b"cengine.errors\nEngineError\n.") is EngineError
    assert sys.modules["engine.errors"].EngineError is EngineError


def test_a_changed_file_is_read_again(tmp_path: Path, load: Any) -> None:
    """Within the same second and of the same size; and a file that was not there before is found. No bytecode stays."""
    file = write(tmp_path / "m", model="import net\nX = 1", net="X = 1")
    assert (load(file).X, load(file).net.X) == (1, 1)
    write(tmp_path / "m", model="import net, new\nX = 2", net="X = 2", new="")
    assert (load(file).X, load(file).net.X) == (2, 2)
    assert not list(tmp_path.rglob("__pycache__"))


def test_dataclasses_and_pickles_of_the_models_own(tmp_path: Path, load: Any) -> None:
    """A class of model.py knows its module, which is there by its name."""
    model = load(write(tmp_path / "m", model="""
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
@dataclass
class Point:
    x: int
    count: ClassVar[int] = 0
"""))  # fmt: skip
    assert pickle.loads(pickle.dumps(model.Point(3))) == model.Point(3)


def test_who_calls(tmp_path: Path, load: Any) -> None:
    """Told by the stack, in any thread, through a sibling too; without one by being the only one, if asked so."""
    text = "import net\ndef ask(f):\n    return net.ask(f)"
    a = load(write(tmp_path / "a", model=text, net="def ask(f):\n    return f()"), "a")
    assert caller() is None
    assert caller(only=True).owner == "a"  # type: ignore[union-attr]
    b = load(write(tmp_path / "b", model=text, net="def ask(f):\n    return f()"), "b")
    assert caller(only=True) is None
    found = []
    threads = [threading.Thread(target=model.ask, args=(lambda: found.append(caller().owner),)) for model in (a, b)]  # type: ignore[union-attr]
    for thread in threads:
        thread.start()
        thread.join()
    assert found == ["a", "b"]


def test_unloaded_modules_are_freed(tmp_path: Path) -> None:
    """A thousand times: neither the interpreter's tables grow, nor do modules stay."""
    file = write(tmp_path / "m", model="import net", net="class Big: pass")

    def cycle() -> "weakref.ref[type]":
        module = PythonModule(file)
        big = module.load().net.Big
        module.unload()
        return weakref.ref(big)

    cycle()
    gc.collect()
    sizes = len(sys.modules), len(sys.meta_path), len(sys.path), len(sys.path_importer_cache)
    references = [cycle() for _ in range(1000)]
    gc.collect()
    assert [reference for reference in references if reference() is not None] == []
    assert (len(sys.modules), len(sys.meta_path), len(sys.path), len(sys.path_importer_cache)) == sizes
