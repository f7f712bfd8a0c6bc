"""What DESIGN promises of the code's shape: who may import whom, no cycles, and how far it is from socket to model."""

import ast
import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import orjson
import pytest

from asgi_app import app, protocol
from asgi_app.protocol import Protocol
from asgi_app.shortcut import Shortcut
from engine.settings import Settings
from engine.types import Engine
from tests import forms
from tests.asgi_app.wire import connect
from tests.conftest import StartLocal
from tests.forms import in_form
from tests.scripted import Scripted, double

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
    "engine.config": ("engine.errors", "engine.parameters", "engine.types", "batching.policy"),
    "engine.parameters": ("engine.errors", "engine.types"),
    "engine.validate": ("engine.errors", "engine.types"),
    "engine.backends": (
        "batching.errors", "engine.backends", "engine.config", "engine.custom_metrics", "engine.errors", "engine.types",
    ),
    "asgi_app": (
        "asgi_app", "engine.types", "engine.errors", "engine.settings", "engine.options", "engine.connect",
        "batching.errors",
    ),
    "asgi_app.control": ("asgi_app", "engine.errors", "engine.validate"),
    # For annotations alone.
    "asgi_app.app": (
        "asgi_app", "engine.types", "engine.errors", "engine.settings", "engine.connect", "batching.errors",
        "engine.functions",
    ),
    "engine.connect": (
        "engine.types", "engine.settings", "engine.local", "engine.doctor", "engine.functions", "engine.watchdog",
        "engine.ipc.client",
    ),
    "engine.options": ("engine.errors", "engine.settings"),
    # Either end of a separate engine's socket: it is told which engine it serves, and knows of no model.
    "engine.ipc": (
        "batching.errors", "engine.diagnostics", "engine.errors", "engine.garbage", "engine.ipc", "engine.regions",
        "engine.settings", "engine.types", "engine.validate",
    ),
    "engine.ipc.frames": ("batching.errors", "engine.errors", "engine.types"),
    "engine.ipc.arena": ("engine.ipc.frames",),
}  # fmt: skip
# Pure files know no event loop, no socket and no clock.
PURE = (
    "batching.cost", "batching.items", "batching.journal", "batching.pending", "batching.policy", "asgi_app.v2_codec",
    "asgi_app.pictures", "asgi_app.tensors", "asgi_app.classification", "asgi_app.compression", "asgi_app.heads",
    "asgi_app.chunked", "asgi_app.templates", "engine.config", "engine.ipc.frames", "engine.parameters",
    "engine.validate",
)  # fmt: skip
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


@pytest.mark.parametrize("modules", ["asgi_app", "engine.ipc.client", "asgi_app, engine.ipc.client"])
def test_the_front_never_imports_torch(modules: str) -> None:
    """Importing the application, or what it asks a separate engine with, loads neither torch nor a model's config.

    That is for whoever owns the models.
    """
    heavy = ("torch", "onnxruntime", "engine.local", "engine.config", "engine.model", "google.protobuf", "tritonclient")
    code = f"import sys, {modules}; print([module for module in {heavy} if module in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_source_file_has_its_test_file() -> None:
    """tests/ mirrors the packages; the exceptions are this list."""
    without = {
        "asgi_app/__init__.py",  # a name
        "asgi_app/messages.py",  # test_app: what it does is only seen through the application
        "asgi_app/v2.py",  # test_app
        "batching/__init__.py",
        "batching/errors.py",  # classes without behaviour
        "batching/items.py",  # the same
        "engine/__init__.py",
        "engine/backends/__init__.py",
        "engine/connect.py",  # one line, behind every lifespan test
        "engine/errors.py",  # classes without behaviour
        "engine/ipc/__init__.py",
        "engine/types.py",  # values
    }
    for path in map(str, MODULES.values()):
        folder, _, file = path.rpartition("/")
        test = Path("tests", folder, "test_" + file.strip("_").replace("main__", "main"))
        assert test.exists() != (path in without), path


REQUESTS = 16  # more than a batch calls any function of its own


# Form -> functions for each request, files of those, and functions for each batch: the most of each. Between the two
# processes of a separate engine, what is sent together is a batch, too.
ROUTES = {"in process": (24, 11, 27), "separate": (27, 8, 57)}


class Calls:
    """Which of our functions are called, how often, while it is entered."""

    def __init__(self) -> None:
        self._frames: dict[tuple[str, str], set[FrameType]] = {}  # a coroutine's is one, however often it goes on
        self._root = str(Path.cwd())

    def __enter__(self) -> None:
        sys.setprofile(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        ours = file.startswith(tuple(f"{self._root}/{package}/" for package in PACKAGES))
        if event == "call" and ours and "<" not in name.rpartition(".")[2]:
            self._frames.setdefault((file.removeprefix(self._root + "/"), name), set()).add(frame)

    def sorted(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """File and name of those that are called for each request, and of the others."""
        for_requests = sorted(function for function, frames in self._frames.items() if len(frames) >= REQUESTS)
        for_batches = sorted(function for function, frames in self._frames.items() if len(frames) < REQUESTS)
        for what, found in (("request", for_requests), ("batch", for_batches)):
            files = {file for file, _ in found}
            print(f"for each {what} {len(found)} functions in {len(files)} files:", *found, sep="\n  ")
        return for_requests, for_batches


@pytest.mark.parametrize("form", ROUTES)
async def test_the_route_from_socket_to_model_is_short(
    form: str, local_engine: StartLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many of our functions for each request, in so many files, and so many more for each batch."""
    monkeypatch.setattr(forms, "BEAT", 60.0)  # no heartbeat comes between
    local = await local_engine({"inline_ms": 1000}, m=double)
    content = orjson.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]})
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    calls = Calls()
    async with in_form(form, local, Settings()) as engine:
        await _trace_requests(engine, content, receive, send, sent, calls)
    answers = [message["body"] for message in sent if "body" in message]
    assert [orjson.loads(answer)["outputs"][0]["data"] for answer in answers] == [[2, 4, 6, 8]] * REQUESTS
    for_requests, for_batches = calls.sorted()
    # A group of requests that look alike, as a worker sends it, is queued at once.
    queued = {"in process": ("Pending.push", for_requests), "separate": ("Pending.push_alike", for_batches)}
    function, among = queued[form]
    assert ("batching/pending.py", function) in among
    assert ("batching/pending.py", "Pending.next_batch") in for_batches
    most_functions, most_files, most_in_batches = ROUTES[form]
    assert len({file for file, _ in for_requests}) <= most_files
    assert len(for_requests) <= most_functions
    assert len(for_batches) <= most_in_batches


async def _trace_requests(
    engine: Engine, content: bytes, receive: Any, send: Any, sent: list[Any], calls: "Calls"
) -> None:
    """REQUESTS at once, for an application that has answered two before: one is read, the next is known to fit."""
    scope = {
        "type": "http", "method": "POST", "path": "/v2/models/m/infer", "raw_path": b"/v2/models/m/infer",
        "query_string": b"", "headers": [], "extensions": {"millrace.guard": {}},
        "state": {"engine": engine, "settings": Settings(), "loop": asyncio.get_running_loop()},
    }  # fmt: skip
    for _ in range(2):
        await app(scope, receive, send)
    Scripted.calls.clear()
    sent.clear()
    with calls:
        await asyncio.gather(*(app(scope, receive, send) for _ in range(REQUESTS)))
    assert Scripted.calls == [("m", (REQUESTS, 4))]


# The same of the shortcut, from the connection's bytes to its answer's: all of it, parser and protocol class included.
SHORTCUT = {"JSON": (24, 10, 31), "binary": (23, 10, 31)}


@pytest.mark.parametrize("kind", SHORTCUT)
async def test_the_shortcut_is_short(kind: str, local_engine: StartLocal, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many of our functions for each request, in so many files, and so many more for each batch; no coroutine."""
    monkeypatch.setattr(protocol, "access_logger", logging.Logger("nobody listens"))
    local = await local_engine({"inline_ms": 1000}, m=double)
    tensor: dict[str, Any] = {"name": "x", "shape": [1, 4], "datatype": "FP32"}
    head, elements = b"", b""
    if kind == "binary":
        tensor["parameters"], elements = {"binary_data_size": 16}, np.array([1, 2, 3, 4], "<f4").tobytes()
    else:
        tensor["data"] = [1, 2, 3, 4]
    content = orjson.dumps({"inputs": [tensor]})
    if kind == "binary":
        head = b"inference-header-content-length: %d\r\n" % len(content)
    request = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n%b" % (
        head, len(content + elements), content + elements,
    )  # fmt: skip
    settings = Settings()
    state = {
        "engine": local, "settings": settings, "loop": asyncio.get_running_loop(),
        "shortcut": Shortcut(local, settings, app),
    }  # fmt: skip
    wires = [connect(Protocol, app, app_state=state) for _ in range(REQUESTS)]
    for _ in range(3):  # the first is read, the second is known to fit, the third is short
        wires[0].send(request)
        await wires[0].quiet()
    wires[0].writes.clear()
    Scripted.calls.clear()
    calls = Calls()
    with calls:
        for wire in wires:
            wire.send(request)
        await wires[0].quiet()
    assert [orjson.loads(wire.written.partition(b"\r\n\r\n")[2])["outputs"][0]["data"] for wire in wires] == [
        [2, 4, 6, 8]
    ] * REQUESTS
    assert Scripted.calls == [("m", (REQUESTS, 4))]
    for_requests, for_batches = calls.sorted()
    assert ("asgi_app/shortcut.py", "Query.set_result") in for_requests
    assert not {("asgi_app/app.py", "app"), ("asgi_app/exchange.py", "Exchange.start")} & {*for_requests, *for_batches}
    most_functions, most_files, most_in_batches = SHORTCUT[kind]
    assert len({file for file, _ in for_requests}) <= most_files
    assert len(for_requests) <= most_functions
    assert len(for_batches) <= most_in_batches
