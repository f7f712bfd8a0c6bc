"""The connection in memory that the tests of the protocol class rely on: it forgives neither end anything."""

import asyncio
from typing import Any

import pytest

from .wire import Answer, Echo, Wire, connect, read_answers

OK = b"HTTP/1.1 200 OK\r\n"

# What no server may send -> why.
NO_ANSWERS = {
    b"HTTP/1.1 200 OK\n\r\n": "a bare LF",
    b"HTTP/1.0 200 OK\r\n\r\n": "another version",
    b"HTTP/1.1 600 OK\r\n\r\n": "no status",
    b"rubbish": "no head",
    OK + b"a : b\r\n\r\n": "a blank before the colon",
    OK + b"a: b\r\n c\r\n\r\n": "a fold",
    OK + b"content-length: 1\r\ncontent-length: 1\r\n\r\na": "two lengths",
    OK + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\na": "a length and a coding",
    OK + b"content-length: +1\r\n\r\na": "a length that is none",
    OK + b"transfer-encoding: gzip\r\n\r\na": "another coding",
    OK + b"transfer-encoding: chunked\r\n\r\nx\r\n": "no size",
    OK + b"transfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n": "a chunk that is too long",
    OK + b"content-length: 1\r\n\r\nab": "a body that is too long",
    b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n": "a length where there is no body",
    b"HTTP/1.1 100 Continue\r\ncontent-length: 0\r\n\r\n": "an interim answer with a length",
}


@pytest.mark.parametrize("data", NO_ANSWERS, ids=NO_ANSWERS.values())
def test_no_answers(data: bytes) -> None:
    """What is not HTTP/1.1 fails the test that got it."""
    with pytest.raises(AssertionError):
        read_answers(data, [], closed=True)


def test_answers() -> None:
    """With a length, in chunks, interim, to HEAD, without a body, until the end."""
    data = (
        b"HTTP/1.1 100 Continue\r\n\r\n",
        OK + b"content-length: 2\r\n\r\nab",
        OK + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\na\r\n0123456789\r\n0\r\n\r\n",
        OK + b"content-length: 2\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 2\r\n\r\n",
        OK + b"\r\nab",
    )
    got = read_answers(b"".join(data), ["GET", "GET", "HEAD"], closed=True)
    assert [each.status for each in got] == [100, 200, 200, 200, 304, 200]
    assert [each.body for each in got] == [b"", b"ab", b"a0123456789", b"", b"", b"ab"]
    assert all(each.whole for each in got)


@pytest.mark.parametrize("head", [b"content-length: 20\r\n", b"transfer-encoding: chunked\r\n"])
def test_an_answer_that_is_cut(head: bytes) -> None:
    """It is no answer that is whole, wherever it ends."""
    for body in (b"", b"a", b"a\r\n0123456789"):
        (got,) = read_answers(OK + head + b"\r\n" + body, ["GET"], closed=True)
        assert not got.whole
    assert Answer(200, ((b"a", b"b"), (b"a", b"c")), b"", True).header(b"a") is None


class Careless(asyncio.Protocol):
    """Raises wherever a protocol can, one time."""

    def __init__(self, **_: Any) -> None:
        self.left = ["data", "lost"]

    def data_received(self, data: bytes) -> None:
        raise RuntimeError(self.left.pop(0))

    def connection_lost(self, exc: Exception | None) -> None:
        raise RuntimeError(self.left.pop(0))


async def test_what_a_protocol_raises_fails_the_test() -> None:
    """It is not left to the event loop, which would log it."""
    for happens in (lambda wire: wire.send(b"a"), Wire.vanish):
        wire = connect(Careless, Echo())
        happens(wire)
        with pytest.raises(RuntimeError, match="data"):
            await wire.quiet()


async def test_nothing_arrives_while_reading_is_paused() -> None:
    """Nor the end of it; a piece then comes in each turn, and none after the connection is closed."""
    got: list[bytes] = []

    class Collecting(Careless):
        def data_received(self, data: bytes) -> None:
            got.append(data)

        def connection_lost(self, exc: Exception | None) -> None:
            got.append(b"lost")

    wire = connect(Collecting, Echo())
    wire.send(b"a", b"b")
    await wire.quiet()
    wire.pause_reading()
    wire.send(b"c")
    wire.end()
    await wire.quiet()
    assert (got, wire.delivered) == ([b"a", b"b"], 2)
    wire.resume_reading()
    await wire.quiet()
    wire.send(b"d")
    wire.write(b"late")
    await wire.quiet()
    assert got == [b"a", b"b", b"c", b"lost"]
    assert (wire.writes, wire.wasted) == ([], [b"late"])
