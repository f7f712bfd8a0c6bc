"""An engine in this process that is served at a socket, and workers that go with it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from engine import loading
from engine.ipc.client import RemoteEngine
from engine.ipc.server import Server
from engine.local import LocalEngine
from engine.settings import Settings
from tests.engine.test_calls import Instance, answer
from tests.scripted import Behaviour, Gate, Scripted, add_model

from .peers import Engine, Worker, listen

Serve = Callable[..., Awaitable[tuple[Server, LocalEngine]]]
Connect = Callable[..., Awaitable[Worker]]
Remote = Callable[..., Awaitable[RemoteEngine]]
Fake = Callable[..., Awaitable[Engine]]


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the engine's socket."""
    return tmp_path_factory.mktemp("e") / "engine"


@pytest.fixture
async def serve(scripted: type[Scripted], tmp_path: Path, path: Path) -> AsyncIterator[Serve]:
    """serve(model=behaviour, ..., settings={...}): a started engine and its server; models run in a thread.

    Models have no record of their warm-up. Those that the test has written are served too.
    """
    async with AsyncExitStack() as stack:

        async def start(
            settings: dict[str, Any] | None = None, takeover: bool = False, **models: Behaviour
        ) -> tuple[Server, LocalEngine]:
            values = {
                "models": str(tmp_path), "engine_socket": str(path), "inline_ms": 0, "arena_bytes": 1 << 20,
                "graceful_timeout": 5, **(settings or {}),
            }  # fmt: skip
            for name in models:
                if not (tmp_path / name).exists():
                    add_model(tmp_path, name)
            scripted.behaviours.update(models)
            engine = LocalEngine(Settings(**values))
            stack.push_async_callback(engine.stop)
            await engine.start()
            scripted.calls.clear()
            server = Server(engine, Settings(**values), takeover)
            stack.push_async_callback(server.stop)
            await server.start()
            return server, engine

        yield start
        for gate in Gate.all:  # a test that failed must not keep its engine from stopping
            gate.open.set()


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> type[Instance]:
    """Models that are given requests one by one do what `Instance.behaviour` does."""
    monkeypatch.setitem(loading.BACKENDS, "python", "tests.engine.test_calls:Instance")
    monkeypatch.setattr(
        Instance, "behaviour", staticmethod(lambda calls: [answer(call) for call in calls]), raising=False
    )
    monkeypatch.setattr(Instance, "calls", [])
    return Instance


def add_instance(root: Path, name: str, config: str) -> None:
    """Write a model that an Instance takes for one of its own."""
    add_model(root, name, config)
    (root / name / "1" / "model.pt2").unlink(missing_ok=True)
    (root / name / "1" / "model.py").write_text("class TritonPythonModel:\n    pass\n")


@pytest.fixture
async def connect(path: Path) -> AsyncIterator[Connect]:
    """connect(): a worker that says what the test wants."""
    workers: list[Worker] = []

    async def start(**options: Any) -> Worker:
        workers.append(await Worker.connect(path, **options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture
async def remote(path: Path) -> AsyncIterator[Remote]:
    """remote(**settings): a real worker's engine."""
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> RemoteEngine:
            engine = RemoteEngine(Settings(engine_socket=str(path), **{"arena_bytes": 1 << 20, **settings}))
            stack.push_async_callback(engine.stop)
            await engine.start()
            return engine

        yield start


@pytest.fixture
async def fake(path: Path) -> AsyncIterator[Fake]:
    """fake(): the next worker that comes, to an engine that says what the test wants."""
    listener = listen(path)
    engines: list[Engine] = []

    async def accept(**options: Any) -> Engine:
        engines.append(await Engine.accept(listener, **options))
        return engines[-1]

    yield accept
    listener.close()
    for engine in engines:
        engine.close()
