"""A connection in memory, for tests of a protocol class: its transport, the client behind it, and what came back.

A `Wire` is to the protocol what asyncio's transports are: each piece arrives in a turn of the event loop of its own,
none while reading is paused, none after the connection closed; and `connection_lost` comes after the call that closed.
"""

import asyncio
import copy
import functools
import re
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import uvicorn
from uvicorn.server import ServerState

from asgi_app.messages import Receive, Scope, Send
from engine.settings import Settings

Headers = tuple[tuple[bytes, bytes], ...]

QUIET = 12  # turns of the event loop in which nothing happens, after which nothing will
MOST_TURNS = 100_000

_HEAD = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) ([ -~]*)\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [^\r\n\0]*\r\n)*)\r\n")
_CHUNK = re.compile(rb"([0-9a-f]+)\r\n")


class Answer(NamedTuple):
    """One response, as a client reads it that forgives nothing.

    Attributes:
        headers: names as they were written.
        whole: nothing of it is missing.
    """

    status: int
    headers: Headers
    body: bytes
    whole: bool

    def header(self, name: bytes) -> bytes | None:
        """Its value; None if there is no such field, or several."""
        values = [value for field_name, value in self.headers if field_name == name]
        return values[0] if len(values) == 1 else None


class Wire(asyncio.Transport):
    """A transport whose other end is this object as well: `send`, `end` and `vanish` are what a client does."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 8000), "peername": ("127.0.0.1", 50000)})
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.Protocol | None = None
        # What the client sent, and has not arrived; None is the end of it.
        self._under_way: deque[bytes | None] = deque()
        self.writes: list[bytes] = []
        self.wasted: list[bytes] = []  # written when the connection was closed: nobody reads it
        self.delivered = 0  # bytes
        self.reading = True
        self.closing = False
        self.lost = False
        self._fault: Exception | None = None  # what a protocol raised, which no transport would forgive

    # What a client does.

    def send(self, *pieces: bytes) -> None:
        """Each piece arrives alone, and as soon as it may."""
        self._under_way.extend(pieces)
        self._loop.call_soon(self._deliver)

    def end(self) -> None:
        """Nothing else will come: the client closed its side."""
        self._under_way.append(None)
        self._loop.call_soon(self._deliver)

    def vanish(self) -> None:
        """The client is gone, and the network says so."""
        self.closing = True
        self._loop.call_soon(self._lose, ConnectionResetError("gone"))

    @property
    def written(self) -> bytes:
        return b"".join(self.writes)

    @property
    def arriving(self) -> bool:
        """Whether something is on its way, and nothing keeps it."""
        return bool(self._under_way) and self.reading and not self.closing

    async def quiet(self) -> None:
        """Let everything happen that will happen without time passing.

        Raises:
            Exception: one that the protocol let out.
        """
        calm, before = 0, None
        for _ in range(MOST_TURNS):
            await asyncio.sleep(0)
            now = (len(self.writes), self.delivered, self.reading, self.closing, self.lost)
            calm, before = 0 if self.arriving or now != before else calm + 1, now
            if self._fault:
                raise self._fault
            if calm > QUIET:
                return
        raise AssertionError(f"no rest in {MOST_TURNS} turns of the event loop")

    # What a protocol does.

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.Protocol:
        assert self._protocol is not None
        return self._protocol

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        assert isinstance(data, bytes | bytearray | memoryview)
        (self.wasted if self.closing else self.writes).append(bytes(data))

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        self._loop.call_soon(self._deliver)

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        self.close()

    def _deliver(self) -> None:
        if not self.arriving:
            return
        piece = self._under_way.popleft()
        try:
            if piece is not None:
                self.delivered += len(piece)
                self.get_protocol().data_received(piece)
            elif not self.get_protocol().eof_received():
                self.close()
        except Exception as error:
            self._fault = error
        if self.arriving:
            self._loop.call_soon(self._deliver)

    def _lose(self, exc: Exception | None) -> None:
        if self.lost:
            return
        self.lost = True
        try:
            self.get_protocol().connection_lost(exc)
        except Exception as error:
            self._fault = error


class Seen(NamedTuple):
    """A request as an application saw it.

    Attributes:
        headers: None where a test has no opinion on them.
    """

    method: str
    raw_path: bytes
    query: bytes = b""
    body: bytes = b""
    headers: Headers | None = None


@dataclass
class Echo:
    """An application that reads every request to its end, and then answers 200 with its number.

    Attributes:
        scopes: of every call.
        seen: what was read to its end, and answered.
    """

    scopes: list[Scope] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        number, body = len(self.scopes), bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
        self.seen.append(Seen(scope["method"], scope["raw_path"], scope["query_string"], bytes(body), headers))
        await answer(send, b"%d" % number)


class Gated:
    """An application of which each call waits until it is let through, and then answers with its number.

    Attributes:
        gates: one for each call so far, open when set.
        ended: numbers of the calls that ended, and how: "answered", or "cancelled".
    """

    def __init__(self) -> None:
        self.gates: list[asyncio.Event] = []
        self.ended: list[tuple[int, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = len(self.gates)
        self.gates.append(asyncio.Event())
        try:
            await self.gates[number].wait()
            await answer(send, b"%d" % number)
        except asyncio.CancelledError:
            self.ended.append((number, "cancelled"))
            raise
        self.ended.append((number, "answered"))


async def answer(
    send: Send, body: bytes = b"ok", status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """A plain one, whose length is announced."""
    fields = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


Application = Callable[[Scope, Receive, Send], Any]


@functools.cache
def _loaded(ws: str) -> uvicorn.Config:
    config = uvicorn.Config(Echo(), lifespan="off", log_config=None, proxy_headers=False, interface="asgi3", ws=ws)
    config.load()
    return config


def connect(
    protocol: type[Any],
    app: Application,
    state: ServerState | None = None,
    ws: str = "none",
    app_state: MutableMapping[str, Any] | None = None,
    **settings: Any,
) -> Wire:
    """Open a connection to a server that has one application.

    Args:
        protocol: the class, which is asked as uvicorn asks it.
        state: what the connections of one server share.
        ws: uvicorn's name of the class for websockets.
        app_state: the lifespan's, besides the settings.
    """
    given = Settings(**settings)
    config = copy.copy(_loaded(ws))
    config.loaded_app, config.timeout_keep_alive = app, given.keep_alive
    wire = Wire()
    shared = {"settings": given, **(app_state or {})}
    made = protocol(config=config, server_state=state or ServerState(), app_state=shared)
    wire.set_protocol(made)
    made.connection_made(wire)
    return wire


def read_answers(data: bytes, methods: Iterable[str], closed: bool) -> list[Answer]:
    """Everything that was written, with interim answers.

    Args:
        methods: of the requests that are answered, in their order: an answer to HEAD has no body.
        closed: nothing follows, which is what ends a body without a length.

    Raises:
        AssertionError: this is not what HTTP/1.1 allows.
    """
    answers: list[Answer] = []
    at, asked = 0, iter(methods)
    while at < len(data):
        head = _HEAD.match(data, at)
        assert head is not None, f"no head: {data[at : at + 200]!r}"
        status, at = int(head[1]), head.end()
        fields: Headers = tuple(line.split(b": ", 1) for line in head[3].split(b"\r\n") if line)  # type: ignore[misc]
        length, coding = _framing(fields)
        whole, body = True, b""
        if status == 101:
            at, body = len(data), data[at:]
        elif status < 200:
            assert (length, coding) == (None, None), f"an interim answer with a body: {head[0]!r}"
        elif next(asked, "") == "HEAD" or status in (204, 304):
            assert status != 204 or (length, coding) == (None, None), f"204 with a length: {head[0]!r}"
        elif coding is not None:
            at, body, whole = _read_chunks(data, at)
        elif length is not None:
            body = data[at : at + length]
            at, whole = at + len(body), len(body) == length
        else:
            at, body, whole = len(data), data[at:], closed
        answers.append(Answer(status, fields, body, whole))
    return answers


def _framing(fields: Headers) -> tuple[int | None, bytes | None]:
    """The length that a response announces, and the coding of its body."""
    lengths = [value for name, value in fields if name.lower() == b"content-length"]
    codings = [value for name, value in fields if name.lower() == b"transfer-encoding"]
    assert len(lengths) + len(codings) <= 1, f"two ways to find the end: {fields!r}"
    assert codings in ([], [b"chunked"]), codings
    assert not lengths or lengths[0].isdigit(), lengths
    return int(lengths[0]) if lengths else None, codings[0] if codings else None


def _read_chunks(data: bytes, at: int) -> tuple[int, bytes, bool]:
    """Where the chunks end, what they hold, and whether the last is among them."""
    body = b""
    while chunk := _CHUNK.match(data, at):
        size = int(chunk[1], 16)
        piece = data[chunk.end() : chunk.end() + size + 2]
        if len(piece) < size + 2:
            return len(data), body + piece[:size], False
        assert piece.endswith(b"\r\n"), f"a chunk that does not end: {piece[-20:]!r}"
        at, body = chunk.end() + size + 2, body + piece[:-2]
        if size == 0:
            return at, body, True
    assert re.fullmatch(rb"[0-9a-f]*\r?", data[at:]), f"no chunk: {data[at : at + 20]!r}"
    return len(data), body, False
