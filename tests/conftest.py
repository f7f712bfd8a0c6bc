"""What tests of several packages need: an engine on scripted models, and a client that speaks ASGI in memory.

A test that takes `start_engine` runs once for each form of the service (tests/forms.py), and knows the engine by its
protocol; `owner(engine)` is whose the models are. One that is about this process alone takes `local_engine`.
"""

import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from engine import loading
from engine.local import LocalEngine
from engine.settings import Settings
from engine.types import Engine

from .client import Client
from .forms import FORMS, in_form
from .scripted import Behaviour, Gate, Scripted, add_model

StartEngine = Callable[..., Awaitable[Engine]]
StartLocal = Callable[..., Awaitable[LocalEngine]]
InForm = Callable[[Engine, Settings], Awaitable[Engine]]


@pytest.fixture(autouse=True)
def _thresholds() -> Iterator[None]:
    """How seldom the collector looks once an engine serves, ends with its test."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """What the engines of a module froze, and is garbage by then, goes with it. What all share stays out of sight."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(params=FORMS, scope="module")
def form(request: pytest.FixtureRequest) -> str:
    """Of the service; a module's tests run in one of them after the other."""
    return str(request.param)


@pytest.fixture
async def put_in_form(form: str) -> AsyncIterator[InForm]:
    """put_in_form(engine, settings): what requests are sent to, for a started engine."""
    async with AsyncExitStack() as stack:

        async def put(engine: Engine, settings: Settings) -> Engine:
            return await stack.enter_async_context(in_form(form, engine, settings))

        yield put
        Gate.open_all()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Scripted]]:
    """Scripted backends instead of PyTorch ones, with a clean record."""
    monkeypatch.setitem(loading.BACKENDS, "pytorch", "tests.scripted:Scripted")
    monkeypatch.setattr(Scripted, "behaviours", {})
    monkeypatch.setattr(Scripted, "calls", [])
    yield Scripted
    Gate.all.clear()


@pytest.fixture
async def local_engine(scripted: type[Scripted], tmp_path: Path) -> AsyncIterator[StartLocal]:
    """local_engine(settings, model=behaviour, ...): started, in process; the record begins after its warm-up."""
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
        Gate.open_all()


@pytest.fixture
def start_engine(local_engine: StartLocal, put_in_form: InForm, tmp_path: Path) -> StartEngine:
    """start_engine(settings, model=behaviour, ...): as `local_engine`, in each form of the service."""

    async def start(settings: dict[str, Any] | None = None, **models: Behaviour) -> Engine:
        engine = await local_engine(settings, **models)
        return await put_in_form(engine, Settings(models=str(tmp_path), **(settings or {})))

    return start


@pytest.fixture
def client_of() -> Callable[..., Client]:
    """client_of(engine): a client of the application in front of that engine."""
    return lambda engine, **settings: Client(engine, Settings(**settings))
