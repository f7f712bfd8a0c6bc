"""Heads: what is read twice is read once, what is kept is bounded, and nobody changes what others are given.

What is read and what is refused of requests is in tests/asgi_app/protocol_cases.py, each case in pieces of every kind.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asgi_app import heads
from asgi_app.heads import CHUNKED, AnswerHead, HeadError, answer_head, check_beginning, read_head, without_empty_line
from asgi_app.messages import Receive, Scope, Send
from asgi_app.protocol import Protocol

from .protocol_cases import CASES, request
from .wire import answer, connect

WHOLE = (
    b"POST /v2/models/a%20b/infer?c=d HTTP/1.1\r\nHost: x:1\r\nContent-Length: 12\r\nX-Y:  z \r\n"
    b"EXPECT: 100-Continue\r\nConnection: close, x\r\n\r\n"
)


@pytest.fixture(autouse=True)
def _none_kept() -> Iterator[None]:
    """Each test begins with none."""
    heads._kept.clear()
    yield
    heads._kept.clear()


def head(*lines: bytes, first: bytes = b"GET / HTTP/1.1") -> bytes:
    return b"".join(line + b"\r\n" for line in (first, b"Host: x", *lines, b""))


def padded(size: int, more: bytes = b"") -> bytes:
    """A head of so many bytes."""
    short = head(b"a: " + more)
    return head(b"a: " + more + b"b" * (size - len(short)))


def test_all_that_a_head_says() -> None:
    """The scope, as ASGI has it, and what the connection has to know."""
    got = read_head(WHOLE)
    assert got.scope == {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/v2/models/a b/infer",
        "raw_path": b"/v2/models/a%20b/infer", "query_string": b"c=d",
        "headers": [(b"host", b"x:1"), (b"content-length", b"12"), (b"x-y", b"z"), (b"expect", b"100-Continue"),
                    (b"connection", b"close, x")],
    }  # fmt: skip
    assert (got.length, got.keep_alive, got.expects, got.websocket) == (12, False, True, False)


@pytest.mark.parametrize(
    ("lines", "first", "expected"),
    [
        ((), b"GET / HTTP/1.1", (0, True, False, False)),
        ((), b"GET / HTTP/1.0", (0, False, False, False)),
        ((b"Connection: Keep-Alive",), b"GET / HTTP/1.0", (0, True, False, False)),
        ((b"Connection: keep-alive", b"Connection: Close"), b"GET / HTTP/1.1", (0, False, False, False)),
        ((b"Connection: not-close",), b"GET / HTTP/1.1", (0, True, False, False)),
        ((b"Transfer-Encoding: Chunked",), b"POST / HTTP/1.1", (CHUNKED, True, False, False)),
        ((b"Content-Length: 0009",), b"POST / HTTP/1.1", (9, True, False, False)),
        ((b"Expect: 100-continue",), b"POST / HTTP/1.0", (0, False, False, False)),
        ((b"Expect: 100-continue", b"Expect: 100-continue"), b"POST / HTTP/1.1", (0, True, False, False)),
        ((b"Upgrade: WebSocket", b"Connection: x, upgrade"), b"GET / HTTP/1.1", (0, True, False, True)),
        ((b"Upgrade: websocket",), b"GET / HTTP/1.1", (0, True, False, False)),
        ((b"Upgrade: h2c", b"Connection: upgrade"), b"GET / HTTP/1.1", (0, True, False, False)),
    ],
)
def test_what_the_connection_has_to_know(lines: tuple[bytes, ...], first: bytes, expected: tuple[Any, ...]) -> None:
    """Where the body ends, whether another request may follow, whether the client waits for our word."""
    got = read_head(head(*lines, first=first))
    assert (got.length, got.keep_alive, got.expects, got.websocket) == expected


def test_a_head_read_twice_is_the_same() -> None:
    """By its bytes, every one of them; and what is refused is refused again."""
    first = read_head(head(b"a: b"))
    assert read_head(bytes(bytearray(head(b"a: b")))) is first
    assert read_head(head(b"a:  b")) is not first
    for _ in range(2):
        with pytest.raises(HeadError, match="there must be one Host header, got 2"):
            read_head(head(b"Host: y"))
    assert len(heads._kept) == 2


@pytest.mark.parametrize("size", [heads.LONGEST_KEPT, heads.LONGEST_KEPT + 1])
def test_a_long_head_is_not_kept(size: int) -> None:
    """It is read each time, to the same."""
    first, again = read_head(padded(size)), read_head(padded(size))
    assert (first is again) == (size <= heads.LONGEST_KEPT) == bool(heads._kept)
    assert first.scope == again.scope


def test_so_many_are_kept() -> None:
    """Heads that all differ fill a bounded memory, and those who say the same each time are found again."""
    for number in range(3 * heads.KEPT):
        read_head(padded(200, b"%d" % number))
        assert 0 < len(heads._kept) <= heads.KEPT
    assert read_head(head()) is read_head(head())


COPIED = ("state", "asgi", "extensions")


async def test_what_an_application_does_to_its_scope() -> None:
    """No other request learns of it, though its head is the same to the letter."""
    scopes: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append({**scope, "headers": list(scope["headers"]), **{key: dict(scope[key]) for key in COPIED}})
        scope["headers"].append((b"x-injected", b"1"))
        scope["headers"][0] = (b"host", b"evil")
        scope["path"] = scope["raw_path"] = scope["method"] = "changed"
        scope["state"]["mine"] = scope["asgi"]["mine"] = scope["extensions"]["mine"] = scope["more"] = "mine"
        while (await receive()).get("more_body"):
            pass
        await answer(send)

    for _ in range(2):
        wire = connect(Protocol, app)
        wire.send(request(b"Content-Length: 0") * 2)
        await wire.quiet()
        wire.vanish()
        await wire.quiet()
    assert len(scopes) == 4
    assert scopes == [scopes[0]] * 4
    assert scopes[0]["method"] == "POST"
    assert not [key for key in COPIED if "mine" in scopes[0][key]]


# Beginnings.


def refusal(data: bytes, known: int) -> str:
    try:
        check_beginning(data, known)
    except HeadError as error:
        return str(error)
    return ""


PIECES = [b"GET", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\r", b"\n", b"a:b", b"\0", b"\x7f", b"\t"]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map(b"".join) | st.binary(max_size=20))
@example(b"GET / HTTP/1.1\r\nHost: x\r\n\n")
@example(b"GET / HTTP/1.1\r\nHost: x\r\rx")
@example(b"GET / HTTP/1.1\n")
def test_beginnings_are_looked_at_once(data: bytes) -> None:
    """Byte by byte, with those that were seen left out, the same is refused, at the same byte, as with all of them."""
    for end in range(len(data) + 1):
        if whole := refusal(data[:end], 0):
            assert refusal(data[:end], end - 1) == whole
            return
        assert refusal(data[:end], max(0, end - 1)) == ""


def test_no_beginning_of_a_head_is_refused() -> None:
    """What will be one may stop anywhere."""
    checked = 0
    for case in CASES:
        data = case.sent.removeprefix(b"\r\n")
        data = data[: data.find(b"\r\n\r\n") + 4]
        try:
            read_head(data)
        except HeadError:
            continue
        assert [end for end in range(len(data)) if refusal(data[:end], 0)] == [], case.name
        checked += 1
    assert checked > 300


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01", b"GET / HTTP/1.1\r\na\0", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\na\rb", b"GET  / HTTP/1.1\r\n",
     b"(", b" GET", b"PRI * HTTP/2.0\n"],
)  # fmt: skip
def test_what_cannot_become_a_head_is_refused_before_its_end(data: bytes) -> None:
    """TLS, NUL, half of a line's end, a line that is no request's: nobody waits for the rest."""
    with pytest.raises(HeadError) as caught:
        check_beginning(data, 0)
    assert caught.value.status == b"400 Bad Request"


def test_the_empty_line_before_a_request() -> None:
    """One is taken off, half of one is kept for later, more are refused."""
    assert without_empty_line(b"GET") == b"GET"
    assert without_empty_line(b"\r\nGET") == b"GET"
    assert without_empty_line(b"\r\n") == without_empty_line(b"\r") == without_empty_line(b"\r\n\r") == b""
    for data in (b"\r\n\r\n", b"\rG", b"\r\r"):
        with pytest.raises(HeadError, match="begins with its line"):
            without_empty_line(data)


# Answers.


def test_an_answers_head() -> None:
    """Names in lower case, values as they are; length, coding and end as the connection needs them."""
    assert answer_head(200, [(b"Content-Length", b"3"), (b"X-A", b" b\t\xff")]) == AnswerHead(
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nx-a:  b\t\xff\r\n", 3, False, False
    )
    assert answer_head(404, [(b"Transfer-Encoding", b"Chunked")]) == (b"HTTP/1.1 404 Not Found\r\n", None, True, False)
    assert answer_head(299, []).text == b"HTTP/1.1 299 \r\n"
    assert answer_head(200, [(b"Connection", b"x, Close")]).close
    assert answer_head(200, [(b"connection", b"close"), (b"connection", b"x")]).close
    assert not answer_head(200, [(b"connection", b"keep-alive, closed")]).close


def test_headers_in_lists() -> None:
    """ASGI lets a header be any iterable of two, of any kind of bytes."""
    expected = answer_head(200, [(b"a", b"b"), (b"c", b"d")])
    mixed: Any = [[b"a", b"b"], (bytearray(b"c"), memoryview(b"d"))]
    assert answer_head(200, mixed) == answer_head(200, iter(mixed)) == answer_head(200, tuple(mixed)) == expected


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (100, []), (101, []), (199, []), (600, []), (0, []), (-200, []), ("200", []), (None, []),
        (200, [(b"", b"a")]), (200, [(b"a b", b"c")]), (200, [(b"a:", b"c")]), (200, [(b"a\r\nb", b"c")]),
        (200, [(b"\xff", b"c")]), (200, [(b"a", b"b\r\nc: d")]), (200, [(b"a", b"b\nc")]), (200, [(b"a", b"b\rc")]),
        (200, [(b"a", b"\0")]), (200, [(b"a", b"\x7f")]), (200, [[b"a", b"b\r\nc: d"]]), (200, [(b"a", b"b\n")]),
        (200, [(b"a\n", b"b")]), (200, [(b"content-length", b"-1")]), (200, [(b"content-length", b"")]),
        (200, [(b"content-length", b"1, 1")]), (200, [(b"content-length", b" 1")]), (200, [(b"content-length", b"+1")]),
        (200, [(b"content-length", b"1"), (b"Content-Length", b"1")]), (200, [(b"transfer-encoding", b"gzip")]),
        (200, [(b"transfer-encoding", b"gzip, chunked")]), (200, [(b"transfer-encoding", b"")]),
        (200, [(b"transfer-encoding", b"chunked"), (b"content-length", b"1")]),
        (200, [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")]),
    ],
)  # fmt: skip
def test_no_answers_head(status: Any, headers: Any) -> None:
    """An application that splits an answer in two, or says two lengths, fails; and it fails again."""
    for _ in range(2):
        with pytest.raises(RuntimeError):
            answer_head(status, headers)
