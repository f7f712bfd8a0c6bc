"""The HTTP/1.1 protocol class that the launcher gives uvicorn; plain uvicorn takes it with `--http`, too.

What uvicorn's own does, and:

    one write    head and body of an answer leave together, in one system call
    no task      an application's coroutine is run by its Exchange, see there
    no watcher   in front of our own application the client's leaving cancels its exchange; the scope's extension
                 `millrace.guard` says so, and that the time a body may take is bounded here
    bounds       of a head's bytes, headers and time, a body's time, idle time, connections. One timer a connection,
                 which is moved when it fires, not with each request
    strict       what two servers could understand in two ways is refused, see heads.py

A connection has one request under way. What comes behind it is kept until that is answered, and no more is read before.
"""

import asyncio
import logging
import math
from contextvars import copy_context
from typing import Any

import orjson
from uvicorn.config import Config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.utils import get_client_addr, get_local_addr, get_path_with_query_string, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from engine.settings import Settings

from .chunked import ChunkReader
from .exchange import Exchange, Scope
from .heads import CHUNKED, Head, HeadError, check_beginning, read_head, without_empty_line
from .shortcut import Shortcut

# Bytes of a body that the application has not taken, above which no more are read; while it waits for them, and will
# take them in the next turn of the loop, and else.
HIGH_WATER = {True: 1 << 20, False: 128 << 10}

GUARD: dict[str, Any] = {"millrace.guard": {}}
RETRY = b"retry-after: 1\r\n"
(_CR,) = b"\r"

logger = logging.getLogger("uvicorn.error")
access_logger = logging.getLogger("uvicorn.access")


class Protocol(asyncio.Protocol):
    """One connection.

    Attributes:
        transport: None before there is a connection.
        writable: set while the client takes what it is sent too slowly.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        # For life.
        self.loop = _loop or asyncio.get_event_loop()
        self.config = config
        self.tasks: set[Any] = server_state.tasks
        self.access_log = access_logger.hasHandlers()
        self._server_state = server_state
        self._connections: set[Any] = server_state.connections
        self._app_state = app_state
        self._guards = "settings" in app_state  # our own application's, and it knows of the extension
        self._settings: Settings = app_state.get("settings") or Settings()
        self._max_head = self._settings.max_head
        self._shortcut = self._find_shortcut()
        self._context = copy_context()  # of no request
        self._base: dict[str, Any] = {}  # what every request's scope says
        # Now.
        self._exchange: Exchange | None = None
        self._left = 0  # bytes of its body that are still to come
        self._chunks: ChunkReader | None = None  # or whoever knows
        self._unread = b""  # the beginning of a head; or, while there is an exchange, what comes after its body
        self._paused = False
        self.writable: asyncio.Future[None] | None = None
        self._stopping = False
        # The client has until then, to do what it is waited for.
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    def _find_shortcut(self) -> Shortcut | None:
        """Its own application's, if nothing stands before that."""
        shortcut: Shortcut | None = self._app_state.get("shortcut")
        app: Any = self.config.loaded_app
        if type(app) is ProxyHeadersMiddleware:  # which only tells the application who is behind a proxy
            app = app.app
        plain = not (self.access_log or self.config.root_path or self.config.limit_concurrency)
        return shortcut if plain and shortcut is not None and shortcut.application is app else None

    # What the transport says.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self._connections.add(self)
        self._base = {
            "asgi": {"version": self.config.asgi_version, "spec_version": "2.3"},
            "server": get_local_addr(transport),
            "client": get_remote_addr(transport),
            "scheme": "https" if is_ssl(transport) else "http",
            "root_path": self.config.root_path,
            "extensions": GUARD if self._guards else {},
        }
        limit = self._settings.max_connections
        if len(self._connections) > limit:
            self.refuse(b"503 Service Unavailable", f"the server has {limit} connections open, as many as it takes")
        else:
            self._wait_for_client(self._settings.head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.resume_writing()
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange.leave(self._guards)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        exchange = self._exchange
        if exchange is None:
            self._begin(self._unread + data if self._unread else data)
        elif not exchange.complete:
            self._body(exchange, data)
        else:
            self._unread += data
            self._pause()

    def pause_writing(self) -> None:
        if self.writable is None:
            self.writable = self.loop.create_future()

    def resume_writing(self) -> None:
        writable, self.writable = self.writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def shutdown(self) -> None:
        """uvicorn stops: the connection ends with the answer that is due, or now."""
        self._stopping = True
        if self._exchange is None or self._exchange.answered:
            self.transport.close()
        else:
            self._exchange.keep_alive = False

    # A request.

    def _next(self) -> None:
        """Begin with what came before it was wanted."""
        if self._unread and self._exchange is None and not self.transport.is_closing():
            data, self._unread = self._unread, b""
            self._begin(data)
        if self._exchange is None:
            self.read_on()

    def _begin(self, data: bytes) -> None:
        """A request's first bytes: `_unread`, and what has just come."""
        end = data.find(b"\r\n\r\n")
        try:
            if data[0] == _CR:
                whole, data = data, without_empty_line(data)
                end = data.find(b"\r\n\r\n")
                if end < 0:
                    self._incomplete(data, whole)
                    return
            elif end < 0:
                self._incomplete(data, data)
                return
            if end + 4 > self._max_head:
                raise self._oversized()
            head = read_head(data[: end + 4])
        except HeadError as error:
            self.refuse(error.status, str(error))
            return
        self._unread = b""
        if head.websocket and self.config.ws_protocol_class is not None:
            self._upgrade(data)
            return
        length, arrived = head.length, len(data) - end - 4
        if length == arrived:  # as most do
            self._deadline = math.inf
            # Which waits for nobody: who reads too slowly what is sent would be sent more and more.
            if self._shortcut is not None and self.writable is None:
                self._exchange = self._shortcut.take(self, head, data[end + 4 :])
                if self._exchange is not None:
                    return
        exchange = self._exchange = Exchange(self, head, self._scope(head))
        if length == arrived:
            exchange.arrived(data[end + 4 :], True)
        else:
            self._left = length
            self._chunks = ChunkReader(self._settings.max_head) if length == CHUNKED else None
            self._wait_for_client(self._settings.body_timeout)
            self._body(exchange, data[end + 4 :])
            if exchange.left:
                return
        config = self.config
        limit, app = config.limit_concurrency, config.loaded_app
        if limit is not None and (len(self._connections) >= limit or len(self.tasks) >= limit):
            app = service_unavailable
        exchange.start(app)

    def _incomplete(self, data: bytes, whole: bytes) -> None:
        """The head has not ended yet. What cannot become one is refused now: its end may never come.

        Args:
            whole: `data` with the empty line before it.
        """
        if len(data) > self._settings.max_head:
            raise self._oversized()
        check_beginning(data, len(self._unread) - len(whole) + len(data))
        if not self._unread and data:
            self._wait_for_client(self._settings.head_timeout)
        self._unread = whole

    def _oversized(self) -> HeadError:
        return HeadError(
            f"the head is over {self._settings.max_head} bytes (MILLRACE_MAX_HEAD)",
            b"431 Request Header Fields Too Large",
        )

    def _scope(self, head: Head) -> Scope:
        scope = {**head.scope, **self._base, "state": self._app_state.copy()}
        for key in ("headers", "asgi", "extensions"):  # what the application does to them is no other request's matter
            scope[key] = scope[key].copy()
        if root := self.config.root_path:
            scope["path"] = root + scope["path"]
            scope["raw_path"] = root.encode("ascii") + scope["raw_path"]
        return scope

    def _body(self, exchange: Exchange, data: bytes) -> None:
        """A piece of the body, and perhaps what comes after it."""
        if self._chunks is not None:
            try:
                body = self._chunks.feed(data)
            except HeadError as error:
                self.refuse(error.status, str(error))
                return
            complete, self._unread = self._chunks.done, self._chunks.rest
        else:
            body = data if len(data) <= self._left else data[: self._left]
            self._left -= len(body)
            complete, self._unread = not self._left, data[len(body) :]
        exchange.arrived(body, complete)
        if complete:
            self._chunks = None
            self._deadline = math.inf
            if exchange.answered:
                self._done()
            elif self._unread:
                self._pause()
        elif exchange.waiting > HIGH_WATER[exchange.reading]:
            self._pause()

    def answered(self, exchange: Exchange) -> None:
        """The whole answer to what was under way has been sent."""
        self._server_state.total_requests += 1
        if not exchange.keep_alive or self._stopping:
            self.transport.close()
        elif exchange is self._exchange:
            if exchange.complete:
                self._done()
            else:  # its body is not wanted, but has to be read to find the end of it
                self.read_on()

    def _done(self) -> None:
        """The connection is free for another request."""
        self._exchange = None
        self._wait_for_client(self.config.timeout_keep_alive)
        if self._unread or self._paused:  # not at once: the application may still be in the middle of its last step
            self.loop.call_soon(self._next, context=self._context)

    # Flow.

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self.transport.pause_reading()
            self._deadline = math.inf  # it is us who are waited for

    def read_on(self) -> None:
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
            if self._exchange is not None and not self._exchange.complete:
                self._wait_for_client(self._settings.body_timeout)

    # Time.

    def _wait_for_client(self, seconds: float) -> None:
        self._deadline = deadline = self.loop.time() + seconds
        if deadline < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._arm(deadline)

    def _arm(self, when: float) -> None:
        self._timer, self._timer_at = self.loop.call_at(when, self._on_timer), when

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, math.inf
        if self.loop.time() < self._deadline:  # it was moved
            if self._deadline != math.inf:
                self._arm(self._deadline)
            return
        settings, exchange = self._settings, self._exchange
        if exchange is not None and not exchange.answered:
            what, seconds, name = "body", settings.body_timeout, "MILLRACE_BODY_TIMEOUT"
        elif self._unread:
            what, seconds, name = "head", settings.head_timeout, "MILLRACE_HEAD_TIMEOUT"
        else:  # it asks nothing: there is nothing to answer
            self.transport.close()
            return
        self.refuse(b"408 Request Timeout", f"the {what} was not complete after {seconds:g} s ({name})")

    # Answers that are not the application's.

    def refuse(self, status: bytes, text: str) -> None:
        """Answer in the application's place, unless it has begun to, and close."""
        exchange, self._exchange = self._exchange, None
        if exchange is None or not exchange.begun:
            # What the clients of the path look for, as in `failure`.
            elsewhere = exchange is not None and not exchange.scope["path"].startswith("/v2")
            body = orjson.dumps({"detail" if elsewhere else "error": text})
            more = self.default_lines() + (RETRY if status[:3] == b"503" else b"")
            self.transport.write(
                b"HTTP/1.1 %b\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
                % (status, more, len(body), body)
            )
        self._unread = b""
        self.transport.close()
        if exchange is not None:
            exchange.leave(self._guards)

    def default_lines(self) -> bytes:
        """The lines that uvicorn puts into each answer: the date, and whatever it was told to."""
        global _defaults
        defaults = self._server_state.default_headers  # a new list each second
        if _defaults[0] is not defaults:
            _defaults = defaults, b"".join([b"%b: %b\r\n" % header for header in defaults])
        return _defaults[1]

    def log_access(self, scope: Scope, status: int) -> None:
        access_logger.info(
            '%s - "%s %s HTTP/%s" %d',
            get_client_addr(scope),  # type: ignore[arg-type]
            scope["method"],
            get_path_with_query_string(scope),  # type: ignore[arg-type]
            scope["http_version"],
            status,
        )

    def _upgrade(self, data: bytes) -> None:
        """To uvicorn's WebSocket class, which reads the head itself."""
        self._connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        make: Any = self.config.ws_protocol_class
        protocol = make(config=self.config, server_state=self._server_state, app_state=self._app_state)
        protocol.connection_made(self.transport)
        protocol.data_received(data)
        self.transport.set_protocol(protocol)


# The latest list of default headers, and its lines.
_defaults: tuple[list[tuple[bytes, bytes]], bytes] = ([], b"")
