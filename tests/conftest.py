"""What tests of several packages need: an engine on scripted models, and a client that speaks ASGI in memory."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from engine import loading
from engine.local import LocalEngine
from engine.settings import Settings

from .client import Client
from .scripted import Behaviour, Gate, Scripted, add_model

StartEngine = Callable[..., Awaitable[LocalEngine]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Scripted]]:
    """Scripted backends instead of PyTorch ones, with a clean record."""
    monkeypatch.setitem(loading.BACKENDS, "pytorch", "tests.scripted:Scripted")
    monkeypatch.setattr(Scripted, "behaviours", {})
    monkeypatch.setattr(Scripted, "calls", [])
    yield Scripted
    Gate.all.clear()


@pytest.fixture
async def start_engine(scripted: type[Scripted], tmp_path: Path) -> AsyncIterator[StartEngine]:
    """start_engine(model=behaviour, ..., settings={...}): a started engine; the record begins after its warm-up."""
    async with AsyncExitStack() as stack:

        async def start(settings: dict[str, Any] | None = None, **models: Behaviour) -> LocalEngine:
            for name in models:
                if not (tmp_path / name).exists():
                    add_model(tmp_path, name)
            scripted.behaviours.update(models)
            engine = LocalEngine(Settings(models=str(tmp_path), **(settings or {})))
            stack.push_async_callback(engine.stop)
            await engine.start()
            scripted.calls.clear()
            return engine

        yield start
        for gate in Gate.all:  # a test that failed must not keep its engine from stopping
            gate.open.set()


@pytest.fixture
def client_of() -> Callable[..., Client]:
    """client_of(engine): a client of the application in front of that engine."""
    return lambda engine, **settings: Client(engine, Settings(**settings))
