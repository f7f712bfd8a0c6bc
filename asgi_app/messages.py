"""Read a request under its bounds, send a response, and notice a caller who leaves."""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from engine.errors import InvalidInput, TooLarge, TooSlow, Unsupported
from engine.settings import Settings
from engine.types import Engine, Parameter

from .compression import CODINGS, compress, decompress, preferred

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")

JSON = b"application/json"
CLOSE = (b"connection", b"close")
MOST_CLIENT = 200  # characters of the name by which a client's fair share is counted
DEADLINE_HEADERS = (b"x-request-timeout-ms", b"x-envoy-expected-rq-timeout-ms")
_DEADLINES = frozenset(DEADLINE_HEADERS)

# How long a request may be in the engine before anybody looks whether its caller is still there. Most are answered
# sooner, and are spared the task that watches.
WATCH_AFTER = 0.025

# Bytes of a body, uncompressed, above which it is compressed or decompressed in a thread: the event loop has others to
# serve.
MOST_INLINE = 64 << 10


class Disconnected(Exception):
    """The caller left; there is nobody to answer."""


@dataclass(slots=True)
class Request:
    """What a handler is given.

    Attributes:
        loop: the running one; asking for it costs a system call in Python 3.11, so it is asked for once, at start.
        headers: by lower-case name.
        path: the path's variable parts by name, percent-decoded.
        guarded: whether the server bounds the time that the body takes, and cancels the request when its client
            leaves: see `asgi_app/protocol.py`.
        unread: whether the body may still be on its way.
    """

    engine: Engine
    settings: Settings
    loop: asyncio.AbstractEventLoop
    scope: Scope
    receive: Receive
    headers: dict[bytes, bytes]
    path: dict[str, str]
    guarded: bool
    unread: bool = True


class Response(NamedTuple):
    """What a handler answers."""

    status: int = 200
    body: bytes = b""
    content_type: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()


async def read_body(request: Request, codings: Collection[bytes] = ()) -> bytes:
    """The whole body, as it was sent.

    Args:
        codings: the content codings that the caller undoes, with `decompressed`.

    Raises:
        Unsupported: it is encoded in another way.
        TooLarge: it is over `max_body`, as announced or as received.
        TooSlow: it was not complete after `body_timeout`.
        Disconnected: the caller left before its end.
    """
    headers, limit = request.headers, request.settings.max_body
    if b"content-encoding" in headers:
        _check_coding(headers[b"content-encoding"], codings)
    announced = headers.get(b"content-length")
    if announced is not None and int(announced) > limit:
        if b"expect" not in headers:  # else the client waits for our word, and will not send it
            await _discard(request)
        raise TooLarge(f"the body of {int(announced)} bytes is over the limit of {limit} bytes (MILLRACE_MAX_BODY)")
    if request.guarded:
        message = await request.receive()
        if not message.get("more_body", True) and len(message["body"]) <= limit:  # most come in one piece
            request.unread = False
            return message["body"]  # type: ignore[no-any-return]
        body, whole = await _gather(request.receive, limit, message)
    else:
        try:
            async with asyncio.timeout(request.settings.body_timeout):
                body, whole = await _gather(request.receive, limit, await request.receive())
        except TimeoutError:
            raise TooSlow(
                f"the body was not complete after {request.settings.body_timeout:g} seconds (MILLRACE_BODY_TIMEOUT)"
            ) from None
    if len(body) > limit:
        if not whole:
            await _discard(request)
        raise TooLarge(f"the body is over the limit of {limit} bytes (MILLRACE_MAX_BODY)")
    request.unread = False
    return body


def _check_coding(coding: bytes, codings: Collection[bytes]) -> None:
    if coding not in (b"identity", b"") and coding not in codings:
        got = repr(coding.decode("latin-1")[:40])
        if codings:
            raise Unsupported(f"Unsupported compression type {got}")
        raise Unsupported(f"Unsupported content-encoding, only 'identity' is supported. (got {got})")


async def _gather(receive: Receive, limit: int, message: Message) -> tuple[bytes, bool]:
    """The body, which begins with `message`, or as much of it as is above the limit; whether that is all of it.

    It is copied once, if at all.
    """
    pieces, size = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise Disconnected
        piece, more = message.get("body", b""), message.get("more_body", False)
        pieces.append(piece)
        size += len(piece)
        if not more or size > limit:
            return piece if len(piece) == size else b"".join(pieces), not more
        message = await receive()


async def _discard(request: Request) -> None:
    """Read on for a moment: a connection closed in the middle of an upload loses the answer on its way.

    For less than the body may take: a server that bounds it would answer in our place.
    """
    read = 0
    try:
        async with asyncio.timeout(min(2, request.settings.body_timeout / 2)):
            while read <= request.settings.max_body:
                message = await request.receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def decompressed(request: Request, body: bytes | bytearray) -> bytes | bytearray:
    """The body without its content coding, which is one of CODINGS or none.

    Raises:
        TooLarge: it is over `max_body`.
        InvalidInput: it is not what its header says.
    """
    coding, limit = request.headers[b"content-encoding"], request.settings.max_body
    if coding not in CODINGS:
        return body
    if len(body) <= MOST_INLINE:
        try:
            return decompress(body, coding, min(limit, MOST_INLINE))
        except TooLarge:
            pass  # a small body may become a large one: that takes longer
    return await asyncio.to_thread(decompress, body, coding, limit)


async def compressed(request: Request, body: bytes) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """The body in the content coding that the caller prefers, and the header that says so."""
    coding = preferred(request.headers[b"accept-encoding"])
    if not coding:
        return body, ()
    header = ((b"content-encoding", coding),)
    if len(body) <= MOST_INLINE:
        return compress(body, coding), header
    return await asyncio.to_thread(compress, body, coding), header


def forwarded(request: Request, pattern: str) -> dict[str, Parameter]:
    """The request's headers that a model is given: those in whose name `pattern` is found, in either case."""
    search = re.compile(pattern, re.IGNORECASE).search
    return {
        name: value.decode("latin-1")
        for name, value in ((name.decode("latin-1"), value) for name, value in request.headers.items())
        if search(name)
    }


def deadline(request: Request) -> float:
    """The monotonic time at which the caller's time budget is over; math.inf if it gave none.

    Raises:
        InvalidInput: the header is no positive number of milliseconds.
    """
    if _DEADLINES.isdisjoint(request.headers):
        return math.inf
    for name in DEADLINE_HEADERS:
        text = request.headers.get(name)
        if text is not None:
            try:
                milliseconds = float(text)
            except ValueError:
                milliseconds = math.nan
            if not 0 < milliseconds < math.inf:
                raise InvalidInput(
                    f"header {name.decode()}: must be a positive number of milliseconds, got {text.decode('latin-1')!r}"
                )
            return time.monotonic() + milliseconds / 1000
    return math.inf


def client(request: Request, header: str) -> str:
    """Whose fair share the request counts against: what the header says, "" if it says nothing."""
    return request.headers.get(header.lower().encode(), b"")[:MOST_CLIENT].decode("latin-1")


def while_connected(request: Request, answer: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """To be awaited: `answer`, cancelled if the caller leaves first. The request's body must have been read.

    Raises:
        Disconnected: the caller left.
    """
    return answer if request.guarded else _watched(request, answer)


async def _watched(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """On a server that only says who left to those who ask."""
    loop = request.loop
    task = asyncio.current_task(loop)
    assert task is not None
    watcher: asyncio.Task[None] | None = None

    def watch() -> None:
        nonlocal watcher
        watcher = loop.create_task(_cancel_on_disconnect(request.receive, task))

    timer = loop.call_later(WATCH_AFTER, watch)
    try:
        return await answer
    except asyncio.CancelledError:
        if watcher is not None and watcher.done() and not watcher.cancelled() and not task.uncancel():
            raise Disconnected from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()


async def _cancel_on_disconnect(receive: Receive, task: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def head_of(response: Response, close: bool) -> tuple[tuple[bytes, bytes], ...]:
    """An answer's headers; `close` tells the caller that the connection ends here."""
    status, body, content_type, headers = response
    head: tuple[tuple[bytes, bytes], ...] = ()
    if status != 204:
        head = ((b"content-length", b"%d" % len(body)),)
    if content_type:
        head += ((b"content-type", content_type),)
    if close:
        head += (CLOSE,)
    return head + headers


async def send_response(scope: Scope, send: Send, response: Response, close: bool) -> None:
    """Send the head and the body."""
    await send({"type": "http.response.start", "status": response.status, "headers": head_of(response, close)})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else response.body})
