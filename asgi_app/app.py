"""async def app(scope, receive, send): the lifespan, one request, errors -> status, disconnect -> cancel.

The engine is started with the lifespan and lives in its state (`scope["state"]`), so this module holds none of its own.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from engine.connect import connect
from engine.errors import (
    EngineError,
    NotReady,
    RequestError,
)
from engine.settings import read_settings
from engine.types import Engine

from .failures import failure
from .generate import Stream
from .images import check_classifier
from .messages import Disconnected, Receive, Request, Scope, Send, send_response, while_connected
from .metrics_port import listen
from .routes import match
from .shortcut import Shortcut

if TYPE_CHECKING:
    from engine.functions import Function

Application = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("millrace")


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI 3 application."""
    if scope["type"] != "http":
        if scope["type"] == "lifespan":
            await _live(scope, receive, send, app)
        else:
            await _refuse(scope, receive, send)
        return
    state = scope.get("state", {})
    engine = state.get("engine")
    close = engine is None or engine.draining
    request: Request | None = None
    try:
        if engine is None:
            raise NotReady("the service did not start: run it on a server with ASGI lifespan state, lifespan on")
        handler, path = match(scope["method"], scope.get("raw_path") or scope["path"].encode())
        guarded = "millrace.guard" in scope.get("extensions", ())
        request = Request(
            engine, state["settings"], state["loop"], scope, receive, dict(scope["headers"]), path, guarded
        )
        response = await handler(request)
    except Disconnected:
        return
    except asyncio.CancelledError:
        # The server's graceful timeout is over. It was accepted, so it is answered; that ends its task as well.
        response, close = failure(scope, NotReady("the service is shutting down")), True
    except Exception as error:
        response = failure(scope, error)
        if request is None or request.unread:
            # The body may still be on its way, for as long as it likes: the connection is not used again.
            close = close or scope["method"] not in ("GET", "HEAD", "OPTIONS")
    if isinstance(response, Stream):
        assert request is not None
        await _send_stream(request, send, response, close)
    else:
        await send_response(scope, send, response, close)


async def _send_stream(request: Request, send: Send, stream: Stream, close: bool) -> None:
    """Send the pieces as they come. What goes wrong before the first has its status; later it is a piece of its own."""
    head = [(b"content-type", stream.content_type), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    if close:
        head.append((b"connection", b"close"))
    start = {"type": "http.response.start", "status": 200, "headers": head}
    begun = False

    async def forward() -> None:
        nonlocal begun
        async for piece in stream.pieces:
            if not begun:
                begun = True
                await send(start)
            await send({"type": "http.response.body", "body": piece, "more_body": True})

    failed: Exception | None = None
    try:
        async with aclosing(stream.pieces):
            await while_connected(request, forward())
    except Disconnected:
        return
    except asyncio.CancelledError:  # as in `app`
        failed, close = NotReady("the service is shutting down"), True
    except Exception as error:
        failed = error
    last = b""
    if failed is not None:
        response = failure(request.scope, failed)
        last = stream.error(response.body)
        if not begun:
            # Nothing is wrong with the request, or it is the model that says so: it is part of the answer.
            if not isinstance(failed, RequestError) or hasattr(failed, "triton_error"):
                response = response._replace(body=last, content_type=stream.content_type)
            await send_response(request.scope, send, response, close)
            return
    elif not begun:
        await send(start)
    await send({"type": "http.response.body", "body": last})


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """There are no WebSockets here."""
    await receive()
    await send({"type": "websocket.close", "code": 1000})


def serve(*functions: "Function") -> Application:
    """An application like `app`, for these functions (see `engine.functions.model`) instead of a repository."""

    async def serving(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(scope, receive, send, serving, functions)
        else:
            await app(scope, receive, send)

    return serving


def _show_log() -> None:
    """Where uvicorn alone set up logging, for itself, our lines go where its own go, from its level on.

    Whoever configured the root logger, or ours, has said where they go.
    """
    handlers = logging.getLogger("uvicorn").handlers
    if handlers and not logger.hasHandlers():
        logger.handlers = list(handlers)
        logger.setLevel(logging.getLogger("uvicorn.error").getEffectiveLevel())


async def _live(
    scope: Scope, receive: Receive, send: Send, application: Application, functions: Sequence["Function"] = ()
) -> None:
    await receive()
    engine: Engine | None = None
    _show_log()
    try:
        if "state" not in scope:
            raise NotReady("this server offers no lifespan state; use uvicorn, hypercorn, granian or another that does")
        settings = read_settings(os.environ)
        engine = connect(settings, functions)
        await engine.start()
        check_classifier(engine, settings)
        metrics = await listen(engine, settings)
    except Exception as error:
        if not isinstance(error, EngineError):
            logger.exception("the service cannot start")
        if engine is not None:
            await engine.stop()
        await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
        return
    shortcut = Shortcut(engine, settings, application)
    scope["state"].update(engine=engine, settings=settings, loop=asyncio.get_running_loop(), shortcut=shortcut)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    if metrics is not None:
        metrics.close()
    await engine.stop()
    await send({"type": "lifespan.shutdown.complete"})
