"""What DESIGN promises of the code's shape: who may import whom, no cycles, and how far it is from socket to model."""

import ast
import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import orjson
import pytest

from asgi_app import app
from engine.settings import Settings
from engine.types import Array
from tests.conftest import StartEngine
from tests.scripted import double

PACKAGES = ("asgi_app", "batching", "engine")
MODULES = {str(path.with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
           for package in PACKAGES for path in sorted(Path(package).rglob("*.py"))}  # fmt: skip

# Who may import whom. A key is a module or a package with everything below it, the longest that fits counts.
MAY_IMPORT = {
    "batching": ("batching",),
    "engine": ("engine", "batching"),
    "engine.types": (),
    "engine.errors": (),
    "engine.settings": ("engine.errors",),
    "engine.config": ("engine.errors", "engine.types"),
    "engine.validate": ("engine.errors", "engine.types"),
    "engine.backends": ("engine.config", "engine.errors", "engine.types"),
    "asgi_app": ("asgi_app", "engine.types", "engine.errors", "engine.settings", "engine.connect", "batching.errors"),
}
# Pure files know no event loop, no socket and no clock.
PURE = ("batching.pending", "asgi_app.v2_codec", "asgi_app.pictures", "engine.config", "engine.validate")
IMPURE = {"asyncio", "socket", "time", "datetime", "threading"}


def imports(module: str) -> Iterator[str]:
    """Every module that `module` imports, inside functions too."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in MODULES else source


@pytest.mark.parametrize("module", MODULES)
def test_who_may_import_whom(module: str) -> None:
    """No module imports one of ours that the table does not let it; batching imports the standard library alone."""
    rule = MAY_IMPORT[max((key for key in MAY_IMPORT if f"{module}.".startswith(f"{key}.")), key=len)]
    for imported in imports(module):
        if imported.split(".")[0] in PACKAGES:
            assert any(f"{imported}.".startswith(f"{allowed}.") for allowed in rule), f"{module} imports {imported}"
        elif module.startswith("batching"):
            assert imported.split(".")[0] in sys.stdlib_module_names
        assert not (module in PURE and imported.split(".")[0] in IMPURE), f"{module} imports {imported}"
        assert imported.split(".")[0] != "torch" or module.startswith("engine.backends"), f"{module} imports torch"


def test_no_import_cycles() -> None:
    """Late imports included."""
    graph = {module: {name for name in imports(module) if name in MODULES and name != module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_front_never_imports_torch() -> None:
    """Importing the application loads neither torch nor a model's config: that is for whoever owns the models."""
    code = "import sys, asgi_app; print([m for m in ('torch', 'engine.local', 'google.protobuf') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_source_file_has_its_test_file() -> None:
    """tests/ mirrors the packages; the exceptions are this list."""
    without = {
        "asgi_app/__init__.py",  # a name
        "asgi_app/messages.py",  # test_app: what it does is only seen through the application
        "asgi_app/v2.py",  # test_app
        "batching/__init__.py",
        "batching/errors.py",  # two classes without behaviour
        "engine/__init__.py",
        "engine/backends/__init__.py",
        "engine/connect.py",  # one line, behind every lifespan test
        "engine/errors.py",  # classes without behaviour
        "engine/types.py",  # values
    }
    for path in map(str, MODULES.values()):
        folder, _, file = path.rpartition("/")
        test = Path("tests", folder, "test_" + file.strip("_").replace("main__", "main"))
        assert test.exists() != (path in without), path


async def test_the_route_from_socket_to_model_is_short(start_engine: StartEngine) -> None:
    """One inference, in process: at most 25 of our functions in 11 files between the server and the model."""
    seen: set[tuple[str, str]] = set()
    root = str(Path.cwd())

    def model(inputs: dict[str, Array]) -> dict[str, Array]:
        return double(inputs)

    engine = await start_engine(m=model)
    content = orjson.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]})
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    def trace(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(tuple(f"{root}/{package}/" for package in PACKAGES)):
            seen.add((file.removeprefix(root + "/"), frame.f_code.co_qualname))

    scope = {
        "type": "http", "method": "POST", "path": "/v2/models/m/infer", "raw_path": b"/v2/models/m/infer",
        "query_string": b"", "headers": [],
        "state": {"engine": engine, "settings": Settings(), "loop": asyncio.get_running_loop()},
    }  # fmt: skip
    await app(scope, receive, send)  # once, so that what a process does once is not counted
    sys.setprofile(trace)
    try:
        await asyncio.ensure_future(app(scope, receive, send))
    finally:
        sys.setprofile(None)
    np.testing.assert_array_equal(orjson.loads(sent[-1]["body"])["outputs"][0]["data"], [2, 4, 6, 8])
    functions = {entry for entry in seen if "<" not in entry[1].rpartition(".")[2]}
    files = {file for file, _ in functions}
    print(f"{len(functions)} functions in {len(files)} files:", *sorted(functions), sep="\n  ")
    assert ("batching/pending.py", "Pending.next_batch") in functions
    assert len(files) <= 11
    assert len(functions) <= 25
