"""What a connection does in time: order, flow, faults, ends. By our class and, where it does the same, uvicorn's.

The cases of tests/asgi_app/protocol_cases.py are about what one client says; these are about who waits for whom.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from asgi_app.messages import Message, Receive, Scope, Send
from asgi_app.protocol import Protocol
from tests.timing import LoopTime

from .protocol_cases import AFTER, BEFORE, SMUGGLED, chunked, get, request
from .wire import Answer, Application, Echo, Gated, Wire, answer, connect, read_answers

both = pytest.mark.parametrize("protocol", [Protocol, HttpToolsProtocol], ids=["ours", "uvicorns"])

GET = get(b"GET / HTTP/1.1")
OLD = get(b"GET / HTTP/1.0")
HEAD = get(b"HEAD / HTTP/1.1")
HELLO = request(b"Content-Length: 5", body=b"hello")
MOST_HELD = 1 << 18  # bytes that a connection may take from a client to whom nobody listens

ServerApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def answers(wire: Wire, *methods: str) -> list[Answer]:
    """Everything that came back, for requests of these methods; GET, if there are more."""
    return read_answers(wire.written, [*methods, *["GET"] * 10_000], wire.closing)


def statuses(wire: Wire) -> list[int]:
    return [each.status for each in answers(wire)]


def bodies(wire: Wire) -> list[bytes]:
    return [each.body for each in answers(wire)]


def sending(*messages: Message) -> ServerApp:
    """An application that reads the body and sends these messages."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        for message in messages:
            await send(message)

    return app


def start(*headers: tuple[bytes, bytes], status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes = b"", more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def length(size: int) -> tuple[bytes, bytes]:
    return (b"content-length", b"%d" % size)


async def exchange(protocol: type[Any], app: Application, *pieces: bytes, **more: Any) -> Wire:
    """Send pieces over a new connection, and let happen what will."""
    wire = connect(protocol, app, **more)
    wire.send(*pieces)
    await wire.quiet()
    return wire


# Order.


@both
async def test_pipelined_requests_wait_for_each_other(protocol: type[Any]) -> None:
    """One call of the application at a time, however many requests came at once, and the answers in their order."""
    app = Gated()
    wire = await exchange(protocol, app, GET * 3)
    for number in range(3):
        assert len(app.gates) == number + 1
        assert len(answers(wire)) == number
        app.gates[number].set()
        await wire.quiet()
    assert bodies(wire) == [b"0", b"1", b"2"]
    assert not wire.closing


@both
async def test_a_connection_is_used_again_and_again(protocol: type[Any]) -> None:
    """Request after request, with and without bodies, each answered before the next is sent."""
    app, state = Echo(), ServerState()
    wire = connect(protocol, app, state)
    requests = [GET, HELLO, chunked(b"5\r\nhello\r\n0\r\n\r\n"), HEAD] * 8
    for number, sent in enumerate(requests):
        wire.send(sent)
        await wire.quiet()
        assert len(app.seen) == number + 1
    got = answers(wire, *(seen.method for seen in app.seen))
    assert [each.status for each in got] == [200] * len(requests)
    assert state.total_requests == len(requests)
    assert not wire.closing


@both
async def test_thousands_of_requests_in_one_piece(protocol: type[Any]) -> None:
    """They are answered one by one, without one call inside the other."""
    app = Echo()
    wire = await exchange(protocol, app, GET * 3000)
    assert bodies(wire) == [b"%d" % number for number in range(1, 3001)]


@both
async def test_a_body_that_nobody_reads(protocol: type[Any]) -> None:
    """The application answers without it; what follows it is in step."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await answer(send)

    bodied = request(b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED)
    chunks = chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED))
    wire = await exchange(protocol, app, bodied + AFTER + chunks + AFTER)
    assert statuses(wire) == [200] * 4
    assert seen == ["/", "/after"] * 2


@both
@pytest.mark.parametrize("head", [b"Content-Length: %d" % len(SMUGGLED), b"Transfer-Encoding: chunked"])
async def test_a_body_that_comes_after_its_answer(protocol: type[Any], head: bytes) -> None:
    """It is read and dropped, or the connection is closed; it is never taken for a request."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await answer(send)

    wire = await exchange(protocol, app, request(head))
    assert statuses(wire) == [200]
    late = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED) if b"chunked" in head else SMUGGLED
    wire.send(late, AFTER)
    await wire.quiet()
    assert seen in (["/"], ["/", "/after"])
    assert wire.closing == (seen == ["/"])


# What is written.


async def test_a_plain_answer_is_one_write() -> None:
    """Head and body leave together: one system call, and one packet."""
    for sent in (GET, HELLO, OLD, HEAD):
        wire = await exchange(Protocol, Echo(), sent)
        assert len(wire.writes) == 1
        assert b"200 OK" in wire.writes[0]


@both
async def test_an_answer_without_a_length_is_chunked(protocol: type[Any]) -> None:
    """Its pieces are chunks, of which an empty one is none, and the last is there once."""
    app = sending(start(), body(b"a", True), body(b"", True), body(b"bc" * 5000, True), body(), body())
    wire = await exchange(protocol, app, GET)
    (got,) = answers(wire)
    assert (got.status, got.body, got.whole) == (200, b"a" + b"bc" * 5000, True)
    assert got.header(b"transfer-encoding") == b"chunked"


@both
async def test_an_answer_in_pieces_may_have_a_length(protocol: type[Any]) -> None:
    """Then it is not chunked."""
    wire = await exchange(protocol, sending(start(length(3)), body(b"a", True), body(b"bc")), GET + GET)
    assert bodies(wire) == [b"abc", b"abc"]
    assert answers(wire)[0].header(b"transfer-encoding") is None


@both
async def test_an_application_may_say_that_it_is_chunked(protocol: type[Any]) -> None:
    """It is said once."""
    app = sending(start((b"transfer-encoding", b"chunked")), body(b"a", True), body(b"b"))
    wire = await exchange(protocol, app, GET + GET)
    assert bodies(wire) == [b"ab", b"ab"]


@both
@pytest.mark.parametrize(
    "messages",
    [
        (start(length(5)), body(b"hello")),
        (start(length(5)), body(b"he", True), body(b"llo")),
        (start(length(5)), body()),
        (start(), body(b"hello", True), body()),
        (start(), body()),
    ],
)
async def test_an_answer_to_head_has_no_body(protocol: type[Any], messages: Iterable[Message]) -> None:
    """Whatever the application sends, and the next answer is in step."""
    wire = await exchange(protocol, sending(*messages), HEAD + HEAD)
    got = answers(wire, "HEAD", "HEAD")
    assert [each.status for each in got] == [200, 200]
    assert wire.written.endswith(b"\r\n\r\n")
    assert not wire.closing


@both
@pytest.mark.parametrize("status", [204, 304])
async def test_statuses_without_a_body(protocol: type[Any], status: int) -> None:
    """They have none, and no coding that would announce one."""
    wire = await exchange(protocol, sending(start(status=status), body()), GET + GET)
    assert statuses(wire) == [status, status]
    assert b"chunked" not in wire.written
    assert not wire.closing


async def test_what_has_not_changed_has_a_length() -> None:
    """A 304 may say how long the body is that it does not have (RFC 9110, 8.6)."""
    wire = await exchange(Protocol, sending(start(length(5), status=304), body()), GET + GET)
    assert statuses(wire) == [304, 304]
    assert answers(wire)[0].header(b"content-length") == b"5"
    assert not wire.closing


@both
async def test_an_application_may_close(protocol: type[Any]) -> None:
    """With `Connection: close`, which is said once, and nothing behind it is read."""
    app = sending(start((b"Connection", b"close"), length(2)), body(b"ok"))
    wire = await exchange(protocol, app, GET + GET)
    assert bodies(wire) == [b"ok"]
    assert wire.written.lower().count(b"connection: close") == 1
    assert wire.closing


@both
async def test_default_headers(protocol: type[Any]) -> None:
    """Those of the server are in every answer."""
    state = ServerState()
    state.default_headers = [(b"server", b"mine")]
    wire = await exchange(protocol, Echo(), GET + GET, state=state)
    assert [each.header(b"server") for each in answers(wire)] == [b"mine", b"mine"]


async def test_an_old_client_gets_no_chunks() -> None:
    """An answer without a length ends with the connection, kept alive or not."""
    app = sending(start(), body(b"a", True), body(b"bc"))
    for sent in (OLD, request(b"Connection: keep-alive", line=b"GET / HTTP/1.0")):
        wire = await exchange(Protocol, app, sent)
        (got,) = answers(wire)
        assert (got.body, got.header(b"transfer-encoding"), got.header(b"content-length")) == (b"abc", None, None)
        assert wire.closing


async def test_an_old_client_is_told_that_it_is_kept() -> None:
    """`Connection: keep-alive` for who asked for it, without which it would not send another request."""
    wire = await exchange(Protocol, Echo(), request(b"Connection: keep-alive", line=b"GET / HTTP/1.0"))
    assert answers(wire)[0].header(b"connection") == b"keep-alive"
    assert not wire.closing


# Expect: 100-continue.

EXPECTING = request(b"Content-Length: 5", b"Expect: 100-continue")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@both
async def test_who_reads_the_body_asks_for_it(protocol: type[Any]) -> None:
    """100 is sent when the application first reads, not before, and once."""
    gate = asyncio.Event()
    echo = Echo()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        await echo(scope, receive, send)

    wire = await exchange(protocol, app, EXPECTING)
    assert wire.written == b""
    gate.set()
    await wire.quiet()
    assert wire.written == CONTINUE
    wire.send(b"he", b"llo")
    await wire.quiet()
    assert statuses(wire) == [100, 200]
    assert echo.seen[0].body == b"hello"


@both
async def test_who_does_not_read_the_body_does_not_ask_for_it(protocol: type[Any]) -> None:
    """There is no 100 before, or after, an answer that did not need the body."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, status=401)

    wire = await exchange(protocol, app, EXPECTING)
    assert statuses(wire) == [401]


async def test_an_old_client_is_not_asked() -> None:
    """HTTP/1.0 has no 100: whoever says so is not answered with one (RFC 9110, 10.1.1)."""
    old = request(b"Content-Length: 5", b"Expect: 100-continue", line=b"POST / HTTP/1.0")
    wire = await exchange(Protocol, Echo(), old, b"hello")
    assert statuses(wire) == [200]


async def test_who_is_refused_is_not_asked() -> None:
    """There is no 100 for a request that is refused."""
    wire = await exchange(Protocol, Echo(), request(b"Content-Length: +5", b"Expect: 100-continue"))
    assert statuses(wire) == [400]


# Refusals among answers.


async def test_a_refusal_waits_for_the_answers_before_it() -> None:
    """What was asked before is answered first, however long that takes, and nothing behind the refusal is read."""
    app = Gated()
    wire = await exchange(Protocol, app, BEFORE + BEFORE + b"rubbish\r\n\r\n" + SMUGGLED)
    for number in range(2):
        assert len(answers(wire)) == number
        app.gates[number].set()
        await wire.quiet()
    assert statuses(wire) == [200, 200, 400]
    assert wire.lost
    assert len(app.gates) == 2


@both
async def test_a_body_that_turns_out_bad(protocol: type[Any]) -> None:
    """Who reads it is told that it is over, or cancelled, and only the refusal is sent."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
            await answer(send)
        finally:
            ended.append(True)

    wire = await exchange(protocol, app, chunked(b"5\r\nhello\r\n"), b"x\r\n", b"0\r\n\r\n" + SMUGGLED)
    assert statuses(wire) == [400]
    assert wire.lost
    assert ended == [True]


@pytest.mark.parametrize("complete", [False, True])
async def test_a_body_that_turns_out_bad_when_it_is_being_answered(complete: bool) -> None:
    """A refusal cannot follow: it would stand in the middle of the answer, or be taken for that to another request."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(start(length(4)))
            await send(body(b"ok", True))
            if complete:
                await send(body(b"ok"))
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            ended.append(True)

    wire = await exchange(Protocol, app, chunked(b"5\r\nhello\r\n"), b"x\r\n", SMUGGLED)
    (got,) = answers(wire)
    assert (got.status, got.body, got.whole) == (200, b"okok" if complete else b"ok", complete)
    assert wire.lost
    assert ended == [True]


async def test_a_connection_too_many() -> None:
    """It is refused at once and its request never read; those that are open do not notice, and make room in time."""
    app, state = Echo(), ServerState()
    inside = [await exchange(Protocol, app, GET, state=state, max_connections=2) for _ in range(2)]
    outside = await exchange(Protocol, app, GET, state=state, max_connections=2)
    assert statuses(outside) == [503]
    assert answers(outside)[0].header(b"connection") == b"close"
    assert outside.lost
    inside[0].send(GET)
    await inside[0].quiet()
    assert statuses(inside[0]) == [200, 200]
    inside[0].vanish()
    await inside[0].quiet()
    assert statuses(await exchange(Protocol, app, GET, state=state, max_connections=2)) == [200]


# Applications that fail.


async def _raises(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("at once")


async def _raises_after_reading(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await asyncio.sleep(0)
    raise RuntimeError("after reading")


def _raising(*messages: Message) -> ServerApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await sending(*messages)(scope, receive, send)
        raise RuntimeError("after all this")

    return app


# Application -> what may come of it: the answer 500; one that is cut, or none, and a closed connection; its own, whole.
FAILING: dict[str, tuple[ServerApp, set[str]]] = {
    "raises": (_raises, {"500"}),
    "raises after reading": (_raises_after_reading, {"500"}),
    "returns": (sending(), {"500"}),
    "raises after the start": (_raising(start(length(5))), {"500", "cut"}),
    "returns after the start": (sending(start(length(5))), {"500", "cut"}),
    "raises in the body": (_raising(start(length(5)), body(b"he", True)), {"500", "cut"}),
    "returns in the body": (sending(start(length(5)), body(b"he", True)), {"500", "cut"}),
    "raises between chunks": (_raising(start(), body(b"he", True)), {"500", "cut"}),
    "returns between chunks": (sending(start(), body(b"he", True)), {"500", "cut"}),
    "raises after the end": (_raising(start(length(5)), body(b"hello")), {"whole"}),
    "sends after the end": (sending(start(length(5)), body(b"hello"), body(b"more")), {"whole"}),
    "starts after the end": (sending(start(length(5)), body(b"hello"), start()), {"whole"}),
    "sends a body first": (sending(body(b"hello")), {"500"}),
    "sends nonsense first": (sending({"type": "http.response.nonsense"}), {"500"}),
    "starts twice": (sending(start(), start(), body(b"hello")), {"500", "cut"}),
    "sends too much": (sending(start(length(3)), body(b"hello")), {"500", "cut"}),
    "sends too much in pieces": (sending(start(length(3)), body(b"he", True), body(b"llo")), {"cut"}),
    "sends too much for none": (sending(start(length(0)), body(b"hello")), {"500", "cut", "whole"}),
    "sends too little": (sending(start(length(9)), body(b"hello")), {"500", "cut"}),
    "sends too little in pieces": (sending(start(length(9)), body(b"he", True), body(b"llo")), {"cut"}),
    "sends nothing of it": (sending(start(length(5)), body()), {"500", "cut"}),
    "announces nonsense": (sending(start((b"content-length", b"x")), body(b"hello")), {"500", "cut"}),
    "splits the response": (sending(start((b"a", b"b\r\nx-injected: 1")), body(b"hello")), {"500", "cut"}),
    "splits it in a name": (sending(start((b"a: b\r\nx-injected", b"1")), body(b"hello")), {"500", "cut"}),
    "splits it with LF": (sending(start((b"a", b"b\nx-injected: 1")), body(b"hello")), {"500", "cut"}),
    "has NUL in a value": (sending(start((b"a", b"b\0x-injected")), body(b"hello")), {"500", "cut"}),
}  # fmt: skip


@both
@pytest.mark.parametrize("failure", FAILING)
async def test_applications_that_fail(protocol: type[Any], failure: str) -> None:
    """They are answered for with 500, or the connection is closed: never is a response taken for what it is not."""
    app, may_be = FAILING[failure]
    wire = await exchange(protocol, app, GET)
    got = answers(wire)
    if not got or not got[-1].whole:
        outcome = "cut"
        assert wire.closing
    else:
        outcome = "500" if got[-1].status == 500 else "whole"
        assert len(got) == 1
    assert outcome in may_be
    assert b"x-injected" not in wire.written
    wire.vanish()
    await wire.quiet()


@pytest.mark.parametrize("value", [b"-1", b"+5", b"5, 5", b"", b" 5", b"0x5"])
async def test_a_length_that_is_none(value: bytes) -> None:
    """An application that announces one is answered for with 500, or the connection closed; nothing of it is sent."""
    wire = await exchange(Protocol, sending(start((b"content-length", value)), body(b"hello")), GET)
    assert statuses(wire) in ([500], [])
    assert statuses(wire) or wire.closing
    assert b"hello" not in wire.written


@both
async def test_a_failure_is_told_to_the_operator(protocol: type[Any], caplog: pytest.LogCaptureFixture) -> None:
    """With its traceback, and not to the client."""
    wire = await exchange(protocol, _raises, GET)
    assert statuses(wire) == [500]
    assert b"at once" not in wire.written
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]
    assert "at once" in caplog.text


# Clients who leave.

LEAVE = {"vanish": Wire.vanish, "end": Wire.end}


@both
@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("sent", [GET, HELLO, request(b"Content-Length: 5", body=b"he"), chunked(b"5\r\nhe")])
async def test_who_reads_is_told_that_the_client_left(protocol: type[Any], leave: str, sent: bytes) -> None:
    """By `http.disconnect`, or by cancellation: one of them, and then nothing is answered."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
            ended.append("told")
            await answer(send)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    state = ServerState()
    wire = await exchange(protocol, app, sent, state=state)
    assert ended == []
    LEAVE[leave](wire)
    await wire.quiet()
    assert ended in (["told"], ["cancelled"])
    assert (wire.writes, wire.wasted) == ([], [])
    assert (state.connections, state.tasks) == (set(), set())


@pytest.mark.parametrize("leave", LEAVE)
async def test_who_waits_for_something_else_is_cancelled(leave: str) -> None:
    """The application need not watch for the client: what it waits for is given up, and nothing is answered."""
    app, state = Gated(), ServerState()
    wire = await exchange(Protocol, app, GET, state=state)
    LEAVE[leave](wire)
    await wire.quiet()
    assert app.ended == [(0, "cancelled")]
    assert (wire.writes, wire.wasted) == ([], [])
    assert (state.connections, state.tasks) == (set(), set())


async def test_who_will_not_be_cancelled_answers_nobody() -> None:
    """An application that goes on, and sends, does no harm."""
    done = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await answer(send)
        done.append(True)

    wire = await exchange(Protocol, app, GET)
    wire.vanish()
    await wire.quiet()
    assert (wire.writes, wire.wasted) == ([], [])


@both
async def test_what_waits_behind_who_left_is_never_begun(protocol: type[Any]) -> None:
    """Pipelined requests go with their client."""
    app = Gated()
    wire = await exchange(protocol, app, GET * 3)
    wire.vanish()
    await wire.quiet()
    app.gates[0].set()
    await wire.quiet()
    assert len(app.gates) == 1
    assert wire.writes == []


async def test_who_reads_is_told_that_the_client_left_whatever_waits_behind() -> None:
    """Of pipelined requests it is the one that is being answered who is told, and not only the last that came."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            ended.append(scope["path"])

    state = ServerState()
    wire = await exchange(Protocol, app, BEFORE + AFTER + AFTER, state=state)
    wire.vanish()
    await wire.quiet()
    assert ended == ["/before"]
    assert state.tasks == set()


@both
async def test_the_end_of_a_request_is_told_to_who_listens(protocol: type[Any]) -> None:
    """A `receive` that another task waits in returns when the answer is complete, and takes nothing of the next one."""
    heard = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append((await receive())["type"])
        listener = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        await answer(send)
        heard.append((await listener)["type"])

    wire = connect(protocol, app)
    for _ in range(2):
        wire.send(HELLO)
        await wire.quiet()
    assert statuses(wire) == [200, 200]
    assert heard == ["http.request", "http.disconnect"] * 2


# Flow.


@both
async def test_who_writes_waits_for_a_slow_client(protocol: type[Any]) -> None:
    """Above the transport's high-water mark `send` waits, until it is below the low one."""
    sent = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        for number in range(100):
            await send(body(b"x" * 1000, number < 99))
            sent.append(number)

    wire = connect(protocol, app)
    wire.get_protocol().pause_writing()
    wire.send(GET)
    await wire.quiet()
    assert len(sent) <= 1
    wire.get_protocol().resume_writing()
    await wire.quiet()
    assert len(sent) == 100
    assert bodies(wire) == [b"x" * 100_000]


@both
async def test_who_waits_for_a_slow_client_is_told_when_it_left(protocol: type[Any]) -> None:
    """A `send` that waits ends with the connection."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            for message in (start(), *[body(b"x", True)] * 5):
                await send(message)
        finally:
            ended.append(True)

    wire = connect(protocol, app)
    wire.get_protocol().pause_writing()
    wire.send(GET)
    await wire.quiet()
    assert ended == []
    wire.vanish()
    await wire.quiet()
    assert ended == [True]


def pieces_of(data: bytes, size: int = 1 << 14) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@both
@pytest.mark.parametrize("coding", ["length", "chunks"])
async def test_a_body_waits_for_who_reads_it(protocol: type[Any], coding: str) -> None:
    """No more of it is taken than a bound, until the application reads; then all of it comes, in order."""
    gate, got = asyncio.Event(), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        while True:
            message = await receive()
            got.append(message["body"])
            if not message["more_body"]:
                break
        await answer(send)

    content = bytes(range(256)) * 4096
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces_of(content, 5000)) + b"0\r\n\r\n"
    sent = {"length": request(b"Content-Length: %d" % len(content), body=content), "chunks": chunked(chunks)}[coding]
    wire = await exchange(protocol, app, *pieces_of(sent + AFTER))
    assert not wire.reading
    assert wire.delivered <= MOST_HELD
    gate.set()
    await wire.quiet()
    assert b"".join(got[:-1]) == content
    assert statuses(wire) == [200, 200]


@both
async def test_requests_wait_for_the_first_of_them(protocol: type[Any]) -> None:
    """Of those behind a slow one no more are taken than a bound."""
    app = Gated()
    wire = await exchange(protocol, app, *pieces_of(GET * 50_000))
    assert not wire.reading
    assert wire.delivered <= MOST_HELD
    assert len(app.gates) == 1
    wire.vanish()
    await wire.quiet()


# The end of the process.


@both
@pytest.mark.parametrize("sent", [b"", GET], ids=["nothing", "answered"])
async def test_a_drain_closes_who_waits_for_nothing(protocol: type[Any], sent: bytes) -> None:
    """A connection that is not being answered is closed at once, without a word."""
    wire = await exchange(protocol, Echo(), *pieces_of(sent))
    before = wire.written
    wire.get_protocol().shutdown()  # type: ignore[attr-defined]
    await wire.quiet()
    assert wire.lost
    assert wire.written == before


@both
async def test_a_drain_lets_who_is_being_answered_be_answered(protocol: type[Any]) -> None:
    """With `Connection: close`, and then it is closed."""
    app = Gated()
    wire = await exchange(protocol, app, GET)
    wire.get_protocol().shutdown()  # type: ignore[attr-defined]
    await wire.quiet()
    assert not wire.closing
    app.gates[0].set()
    await wire.quiet()
    (got,) = answers(wire)
    assert (got.status, got.header(b"connection")) == (200, b"close")
    assert wire.lost


async def test_a_drain_leaves_what_waits_behind_who_is_being_answered() -> None:
    """Pipelined requests that were not begun are not: their client sends them again."""
    app = Gated()
    wire = await exchange(Protocol, app, GET * 3)
    wire.get_protocol().shutdown()  # type: ignore[attr-defined]
    app.gates[0].set()
    await wire.quiet()
    assert len(app.gates) == 1
    assert len(answers(wire)) == 1
    assert wire.lost


@both
async def test_a_drain_in_the_middle_of_an_answer(protocol: type[Any]) -> None:
    """An answer that has begun is completed, and the connection closed, although its head did not say so."""
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(length(4)))
        await send(body(b"a" * 2, True))
        await gate.wait()
        await send(body(b"b" * 2))

    wire = await exchange(protocol, app, GET)
    wire.get_protocol().shutdown()  # type: ignore[attr-defined]
    gate.set()
    await wire.quiet()
    assert bodies(wire) == [b"aabb"]
    assert wire.lost


# Another protocol.

HANDSHAKE = request(
    b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13", line=b"GET /socket?a=b HTTP/1.1",
)  # fmt: skip
FRAME = b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58"  # "Hello", as a client writes it: RFC 6455, 5.7


async def websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Accept, and send back what comes first; answer requests as well."""
    if scope["type"] == "http":
        await answer(send)
        return
    assert (scope["path"], scope["query_string"]) == ("/socket", b"a=b")
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": (await receive())["text"]})
    await receive()


async def shook_hands(wire: Wire, frames: bytes) -> None:
    """The other protocol's class has the connection, accepted, and sent `frames`."""
    (got,) = answers(wire)
    assert (got.status, got.header(b"Sec-WebSocket-Accept")) == (101, b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    assert got.body == frames
    assert not isinstance(wire.get_protocol(), HttpToolsProtocol | Protocol)
    wire.vanish()
    await wire.quiet()


@both
@pytest.mark.parametrize("size", [1, 100, 1000])
async def test_a_websocket_is_handed_over(protocol: type[Any], size: int) -> None:
    """To uvicorn's class for them, with the whole handshake, however it came."""
    state = ServerState()
    wire = await exchange(protocol, websocket, *pieces_of(HANDSHAKE, size), ws="websockets-sansio", state=state)
    assert state.connections == {wire.get_protocol()}
    wire.send(FRAME)
    await wire.quiet()
    await shook_hands(wire, b"\x81\x05Hello")


async def test_what_comes_with_the_handshake_is_handed_over() -> None:
    """A message in the same piece as the handshake, or in the middle of it, is not lost."""
    for pieces in ([HANDSHAKE + FRAME], [HANDSHAKE[:-9], HANDSHAKE[-9:] + FRAME], [HANDSHAKE + FRAME[:4], FRAME[4:]]):
        wire = await exchange(Protocol, websocket, *pieces, ws="websockets-sansio")
        await shook_hands(wire, b"\x81\x05Hello")


async def test_a_websocket_has_no_time_limits_of_requests() -> None:
    """What is handed over is left alone: no timer of ours closes it."""
    time = LoopTime()
    wire = await exchange(Protocol, websocket, HANDSHAKE, ws="websockets-sansio", head_timeout=5, keep_alive=5)
    await time.elapse(15)
    assert not wire.closing
    await shook_hands(wire, b"")


# Time.


async def test_silence_is_closed() -> None:
    """A connection that says nothing is closed after the head's time, and not before, without an answer to nothing."""
    time = LoopTime()
    wire = connect(Protocol, Echo(), head_timeout=10)
    await time.elapse(9)
    assert not wire.closing
    await time.elapse(2)
    assert wire.lost
    assert wire.writes == []


@pytest.mark.parametrize("begun", [b"G", GET[:-2], GET[:-1]])
@pytest.mark.parametrize("before", [b"", GET])
async def test_a_head_that_does_not_end(begun: bytes, before: bytes) -> None:
    """It is 408 after its time, from its first byte on, on a new connection and on a kept one."""
    time = LoopTime()
    wire = await exchange(Protocol, Echo(), before + begun, head_timeout=10, keep_alive=100)
    await time.elapse(9)
    assert not wire.closing
    await time.elapse(2)
    assert statuses(wire)[-1] == 408
    assert answers(wire)[-1].header(b"connection") == b"close"
    assert wire.lost


async def test_a_head_that_drips() -> None:
    """A byte now and then gives it no more time."""
    time = LoopTime()
    wire = await exchange(Protocol, Echo(), GET[:1], head_timeout=10)
    for index in range(1, 12):
        assert wire.closing == (index > 10)
        wire.send(GET[index : index + 1])
        await time.elapse(1)
    assert statuses(wire) == [408]


@pytest.mark.parametrize("begun", [request(b"Content-Length: 9", body=b"he"), chunked(b"9\r\nhe"), chunked(b"")])
async def test_a_body_that_does_not_end(begun: bytes) -> None:
    """It is 408 after its time, however it drips, and the application is let go, without an answer of its own."""
    time, app, state = LoopTime(), Echo(), ServerState()
    wire = await exchange(Protocol, app, begun, body_timeout=10, head_timeout=1000, state=state)
    await time.elapse(8)
    assert not wire.closing
    await time.elapse(3)
    assert statuses(wire) == [408]
    assert wire.lost
    assert app.seen == []
    assert state.tasks == set()


async def test_an_application_takes_its_time() -> None:
    """That of the head, of the body and between requests are the client's: an answer may take longer."""
    time, app = LoopTime(), Gated()
    wire = await exchange(Protocol, app, HELLO + GET, head_timeout=1, body_timeout=1, keep_alive=1)
    await time.elapse(100)
    app.gates[0].set()
    await wire.quiet()
    await time.elapse(100)
    app.gates[1].set()
    await wire.quiet()
    assert statuses(wire) == [200, 200]
    assert not wire.closing


@both
async def test_a_kept_connection_is_not_kept_for_ever(protocol: type[Any]) -> None:
    """After each answer it has the time of `keep_alive` for the next request, and is then closed without a word."""
    time = LoopTime()
    wire = connect(protocol, Echo(), keep_alive=10)
    for _ in range(3):
        wire.send(GET)
        await wire.quiet()
        await time.elapse(9)
        assert not wire.closing
    await time.elapse(2)
    assert wire.lost
    assert statuses(wire) == [200] * 3


# What an application may rely on.


@pytest.mark.parametrize(
    ("protocol", "pieces"),
    [(Protocol, [GET, GET, GET]), (Protocol, [GET * 3]), (HttpToolsProtocol, [GET, GET, GET])],
    ids=["ours", "ours, pipelined", "uvicorns"],
)
async def test_requests_do_not_share_context(protocol: type[Any], pieces: list[bytes]) -> None:
    """A context variable that one request sets, the next does not see, and nobody else."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    found = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(variable.get())
        variable.set(1)
        await answer(send)

    wire = connect(protocol, app)
    for piece in pieces:
        wire.send(piece)
        await wire.quiet()
    assert statuses(wire) == [200] * 3
    assert found == [0, 0, 0]
    assert variable.get() == 0


@both
async def test_requests_do_not_share_state(protocol: type[Any]) -> None:
    """Each has a copy of the lifespan's state."""
    found = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(scope["state"].get("mine"))
        scope["state"]["mine"] = "changed"
        await answer(send)

    await exchange(protocol, app, GET, GET, app_state={"mine": "given"})
    assert found == ["given", "given"]


@both
async def test_an_application_is_in_a_task(protocol: type[Any]) -> None:
    """What asyncio offers to tasks works from its first line on: time limits, and groups."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            assert asyncio.current_task() is not None
            group.create_task(answer(send))

    wire = await exchange(protocol, app, GET, GET)
    assert statuses(wire) == [200, 200]


@both
async def test_a_request_without_a_body_has_an_empty_one(protocol: type[Any]) -> None:
    """In one message, which says that it is the last."""
    got = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.append(await receive())
        await answer(send)

    await exchange(protocol, app, GET, request(b"Content-Length: 0"))
    assert got == [{"type": "http.request", "body": b"", "more_body": False}] * 2


@both
async def test_two_connections_do_not_wait_for_each_other(protocol: type[Any]) -> None:
    """A slow answer on one is no reason to wait on another."""
    app, state = Gated(), ServerState()
    first = await exchange(protocol, app, BEFORE, state=state)
    second = await exchange(protocol, app, BEFORE, state=state)
    app.gates[1].set()
    await second.quiet()
    assert (bodies(first), bodies(second)) == ([], [b"1"])
    assert len(state.connections) == 2
    for wire in (first, second):
        wire.vanish()
        await wire.quiet()
    assert state.connections == set()
