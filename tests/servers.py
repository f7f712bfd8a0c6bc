"""Servers that the application is tested on besides memory: each in this process, on the test's own event loop.

So a test has its engine, its gates and its scripts at hand, and what it asks goes through a socket and somebody's HTTP.
Servers as people start them, with the lifespan that the application has, are in tests/e2e/test_servers.py.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import hypercorn
import hypercorn.asyncio
import uvicorn
from granian.constants import Interfaces
from granian.server.embed import Server as Granian

from asgi_app import app
from asgi_app.app import Application
from asgi_app.messages import Receive, Scope, Send
from asgi_app.shortcut import Shortcut
from engine.settings import Settings
from engine.types import Engine

from .e2e.client import Answer, Connection, Failed
from .e2e.processes import listens
from .timing import until

Serve = Callable[[Application, Path], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def on_uvicorn(app: Application, path: Path, http: str) -> AsyncIterator[None]:
    """On one of its protocol classes, or ours."""
    config = uvicorn.Config(app, uds=str(path), http=http, lifespan="on", log_config=None, access_log=False)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    yield
    # As its `shutdown`, which pauses for a tenth of a second.
    for listener in server.servers:
        listener.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    await until(lambda: not server.server_state.connections and not server.server_state.tasks)
    await server.lifespan.shutdown()


@asynccontextmanager
async def on_hypercorn(app: Application, path: Path) -> AsyncIterator[None]:
    config = hypercorn.Config()
    config.bind = f"unix:{path}"
    config.errorlog = None
    stop = asyncio.Event()
    serving = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait))  # type: ignore[arg-type]
    await _listening(path, serving)
    yield
    stop.set()
    await serving


@asynccontextmanager
async def on_granian(app: Application, path: Path) -> AsyncIterator[None]:
    server = Granian(app, uds=path, interface=Interfaces.ASGI, log_enabled=False)
    serving = asyncio.create_task(server.serve())
    await _listening(path, serving)
    yield
    server.stop()  # type: ignore[no-untyped-call]
    await serving


async def _listening(path: Path, serving: asyncio.Task[None]) -> None:
    await until(lambda: serving.done() or listens(path))
    assert not serving.done(), serving


# Form of the service -> the server that its only worker runs on.
SERVERS: dict[str, Serve] = {
    "our protocol": partial(on_uvicorn, http="asgi_app.protocol:Protocol"),
    "uvicorn on httptools": partial(on_uvicorn, http="httptools"),
    "uvicorn on h11": partial(on_uvicorn, http="h11"),
    "hypercorn": on_hypercorn,
    "granian": on_granian,
}


def serving(engine: Engine, settings: Settings) -> Application:
    """The application, with a lifespan that finds this engine running."""

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await receive()
        shortcut = Shortcut(engine, settings, served)
        scope["state"].update(engine=engine, settings=settings, loop=asyncio.get_running_loop(), shortcut=shortcut)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    return served


class Front:
    """What stands between the clients of one engine and the application: a server for each of their settings."""

    def __init__(self, serve: Serve, engine: Engine) -> None:
        self._serve = serve
        self._engine = engine
        self._folder = ""
        self._starting = asyncio.Lock()
        self._paths: dict[Settings, Path] = {}
        self._idle: dict[Settings, list[Connection]] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Front":
        # Not where other temporary files are: a socket's path must be short.
        self._folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="front-", dir="/tmp"))
        FRONTS[id(self._engine)] = self
        return self

    async def __aexit__(self, *_: object) -> None:
        del FRONTS[id(self._engine)]
        for connection in (each for idle in self._idle.values() for each in idle):
            await connection.close()
        await self._stack.aclose()

    async def ask(
        self,
        settings: Settings,
        method: str,
        target: str,
        pieces: Sequence[bytes],
        headers: dict[str, str],
        leave: asyncio.Event | None,
        stall: bool,
        heard: Callable[[bytes], object],
    ) -> Answer | None:
        """Send one request, and read its answer; None if the client left before it was whole, or none came.

        A connection whose answer does not end it is used again: whatever was answered, its next request is understood.
        """
        connection = await self._connection(settings)
        connection.heard = heard
        names = {name.lower() for name in headers}
        lines = [f"{method} {target} HTTP/1.1", "Host: millrace", *(f"{name}: {headers[name]}" for name in headers)]
        chunked = "content-length" not in names and (len(pieces) > 1 or stall)
        if chunked:
            lines.append("Transfer-Encoding: chunked")
        elif "content-length" not in names and (pieces[0] or method not in ("GET", "HEAD", "OPTIONS", "DELETE")):
            lines.append(f"Content-Length: {len(pieces[0])}")

        async def send() -> None:
            await connection.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
            for piece in pieces[:-1] if stall else pieces:
                await connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked and piece else piece)
            if chunked and not stall:
                await connection.send(b"0\r\n\r\n")

        sending = asyncio.create_task(send())
        answering = asyncio.create_task(connection.answer(method == "HEAD"))
        leaving = asyncio.create_task(leave.wait() if leave else asyncio.Event().wait())
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                await connection.close()
                return None
            answer = answering.result()
        except Failed:
            await connection.close()
            return None
        finally:
            for task in (sending, answering, leaving):
                task.cancel()
            await asyncio.wait((sending, answering, leaving))
        if answer.closes or stall or not sending.done() or sending.cancelled():
            await connection.close()
        else:
            self._idle[settings].append(connection)
        return answer

    async def _connection(self, settings: Settings) -> Connection:
        async with self._starting:
            if settings not in self._paths:
                path = Path(self._folder, str(len(self._paths)))
                await self._stack.enter_async_context(self._serve(serving(self._engine, settings), path))
                self._paths[settings], self._idle[settings] = path, []
        if self._idle[settings]:
            return self._idle[settings].pop()
        return await Connection.open(self._paths[settings])


# By the id of the engine that they are in front of.
FRONTS: dict[int, Front] = {}
