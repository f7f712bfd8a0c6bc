"""The forms that the service has: the engine in the worker's process, apart from one worker, apart from four.

Those of SERVERS have it in the worker's process, which gets its requests from a server. In tests workers and engine
share a process and its event loop. What they say to each other goes through the socket and the shared memory all the
same.
"""

import dataclasses
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import cycle
from typing import Any, cast
from unittest import mock

from engine.ipc.client import RemoteEngine
from engine.ipc.server import Owner, Server
from engine.local import LocalEngine
from engine.settings import Settings
from engine.types import Engine

from .servers import SERVERS, Front
from .timing import until

# Form -> workers in front of a separate engine.
FORMS = {"in process": 0, "separate": 1, "four workers": 4}

BEAT = 0.02  # seconds; a test does not wait as long as the service may to hear how its engine is


class Workers:
    """The engines that workers have, all in front of one: an `Engine` each of whose answers is the next worker's.

    What is set on it is set on each of them.
    """

    all: Sequence[Engine]
    owner: Engine
    _turns: Iterator[Engine]

    def __init__(self, owner: Engine, workers: Sequence[Engine]) -> None:
        vars(self).update(owner=owner, all=workers, _turns=cycle(workers))

    def next(self) -> Engine:
        return next(self._turns)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.next(), name)

    def __setattr__(self, name: str, value: object) -> None:
        for worker in self.all:
            setattr(worker, name, value)

    def __delattr__(self, name: str) -> None:
        for worker in self.all:
            delattr(worker, name)


def owner(engine: Engine) -> LocalEngine:
    """Whose the models are: to look inside."""
    found = engine.owner if isinstance(engine, Workers) else engine
    assert isinstance(found, LocalEngine)
    return found


def next_worker(engine: Engine) -> Engine:
    """The engine of the worker that the next request comes to."""
    return engine.next() if isinstance(engine, Workers) else engine


async def hear(engine: Engine) -> None:
    """Wait until every worker says of its engine what that says of itself: they hear it with the next beat."""
    workers, truth = (engine.all, engine.owner) if isinstance(engine, Workers) else ([], engine)
    await until(lambda: all((each.live(), each.ready()) == (truth.live(), truth.ready()) for each in workers))


class Unloaded:
    """What the server asks of an engine beyond what workers do, for a test's own engine: this one serves no model."""

    draining = False
    changed: Callable[[], None]

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return not self.draining

    def lost(self) -> str:
        return ""

    def copies(self) -> list[Any]:
        return []

    def catalogue(self) -> dict[str, Any]:
        return {"copies": [], "states": {}, "regions": [], "log": None}


@asynccontextmanager
async def in_form(form: str, engine: Engine, settings: Settings) -> AsyncIterator[Engine]:
    """What requests are sent to, for an engine that has started (an `Owner`); it still runs afterwards."""
    if form in SERVERS:
        async with Front(SERVERS[form], engine):
            yield engine
        return
    if not FORMS[form]:
        yield engine
        return
    async with AsyncExitStack() as stack:
        # Not where other temporary files are: a socket's path must be short.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="form-", dir="/tmp"))
        stack.enter_context(mock.patch("engine.ipc.server.BEAT", BEAT))
        settings = dataclasses.replace(settings, engine_socket=f"{folder}/engine")
        server = Server(cast("Owner", engine), settings)
        stack.push_async_callback(server.stop)
        await server.start()
        workers = []
        for _ in range(FORMS[form]):
            workers.append(RemoteEngine(settings))
            stack.push_async_callback(workers[-1].stop)
            await workers[-1].start()
        yield cast("Engine", Workers(engine, workers))
