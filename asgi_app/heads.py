"""HTTP/1.1 heads: a request's bytes -> Head, an answer's status and headers -> bytes. Pure; RFC 9112 and 9110.

What the grammar does not allow is refused, whatever other servers make of it: two of them that read one message in two
ways are how requests are smuggled. So a head is its lines, each ended by CRLF, and no other control character; one
host; one length, in digits, or one transfer coding, which is `chunked`, and never both.

Most heads have been seen before, to the letter: a client says the same with each request. What was read from one is
kept, and found again by its bytes, which takes a tenth of reading it (docs/performance.md).
"""

import http
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

Headers = list[tuple[bytes, bytes]]

CHUNKED = -1  # a length that is told piece by piece

MAX_HEADERS = 100
# Heads that are kept, and the bytes of the longest: with what was read from them, some 15 MiB at most.
KEPT = 1024
LONGEST_KEPT = 2048

# Those that httptools knows, as uvicorn's own classes do, but for CONNECT: it asks for a tunnel, which nobody offers.
METHODS = frozenset(
    b"ACL BIND CHECKOUT COPY DELETE GET HEAD LINK LOCK M-SEARCH MERGE MKACTIVITY MKCALENDAR MKCOL MOVE NOTIFY OPTIONS "
    b"PATCH POST PROPFIND PROPPATCH PURGE PUT QUERY REBIND REPORT SEARCH SOURCE SUBSCRIBE TRACE UNBIND UNLINK UNLOCK "
    b"UNSUBSCRIBE".split()
)

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_VALUE = rb"[\t\x20-\x7e\x80-\xff]*"
_REQUEST_LINE = re.compile(rb"(%b) ([!-\"$-~]+) HTTP/([0-9]\.[0-9])\r\n" % TOKEN)
_FIELD = re.compile(rb"(%b):(%b)\r\n" % (TOKEN, _VALUE))
FIELDS = re.compile(rb"(?:%b:%b\r\n)*\r\n" % (TOKEN, _VALUE))
_AUTHORITY = rb"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~%!$&'()*+;=-]+)(?::[0-9]*)?"
_ABSOLUTE = re.compile(rb"https?://%b(?=[/?]|$)" % _AUTHORITY, re.IGNORECASE)
_HOST = re.compile(_AUTHORITY)

# What no head may hold: a control character, half of a line's end.
_STRAY = re.compile(rb"[^\t\r\n\x20-\x7e\x80-\xff]|(?<!\r)\n|\r[^\n]")
_NAME = re.compile(TOKEN)
_CONTENT = re.compile(_VALUE)


class HeadError(Exception):
    """A head that is refused.

    Attributes:
        status: what it is answered with, and its phrase.
    """

    def __init__(self, text: str, status: bytes = b"400 Bad Request") -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True, eq=False)
class Head:
    """A request's head; compared by identity.

    Attributes:
        scope: what it says of the ASGI scope; `headers` by lower-case name, in their order. To be copied, not changed.
        length: bytes of its body, or CHUNKED.
        keep_alive: whether the client may send another request after it.
        expects: whether it waits for 100 Continue before it sends its body.
        websocket: whether it asks for one.
        kept: whether the same bytes give the same object.
    """

    scope: dict[str, Any]
    length: int
    keep_alive: bool
    expects: bool
    websocket: bool
    kept: bool = False


_kept: dict[bytes, Head] = {}


def read_head(data: bytes) -> Head:
    """Read a request's line and headers, with the empty line at their end.

    Raises:
        HeadError.
    """
    head = _kept.get(data)
    if head is None:
        head = _read(data)
        if len(data) <= LONGEST_KEPT:
            if len(_kept) >= KEPT:
                _kept.clear()  # whose heads are all different gains nothing here; the others find theirs again
            _kept[data] = head
            head.kept = True
    return head


def check_beginning(data: bytes, known: int) -> None:
    """Look for what cannot be in a head at all. The first `known` bytes have been looked at.

    Raises:
        HeadError.
    """
    if stray := _STRAY.search(data, max(0, known - 1)):
        raise HeadError(f"this is no HTTP/1.1: {_show(data[max(0, stray.start() - 20) : stray.end()])}")
    if b"\r\n" in data:
        if not _REQUEST_LINE.match(data):
            raise HeadError(_fault(data))
    elif data and not _NAME.match(data):
        raise HeadError(f"a request begins with its method, got {_show(data)}")


def without_empty_line(data: bytes) -> bytes:
    """What may be a head, without the empty line before it that some clients leave behind the request before.

    Raises:
        HeadError: there is another one.
    """
    data = data.removeprefix(b"\r\n")
    if data[:1] == b"\r" and data != b"\r":
        raise HeadError("a request begins with its line, not with empty ones")
    return data if data != b"\r" else b""


def _read(data: bytes) -> Head:
    line = _REQUEST_LINE.match(data)
    if line is None or not FIELDS.fullmatch(data, line.end()):
        raise HeadError(_fault(data))
    method, target, version = line.groups()
    if version not in (b"1.1", b"1.0"):
        raise HeadError(
            f"HTTP/{version.decode()} is not spoken here, only 1.1 and 1.0", b"505 HTTP Version Not Supported"
        )
    if method not in METHODS:
        raise HeadError(f"method {_show(method)} is not known here", b"501 Not Implemented")
    raw_path, query = _target(method, target)
    headers = [(name.lower(), value.strip(b" \t")) for name, value in _FIELD.findall(data, line.end())]
    if len(headers) > MAX_HEADERS:
        raise HeadError(f"{len(headers)} headers, more than {MAX_HEADERS}", b"431 Request Header Fields Too Large")
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        found.setdefault(name, []).append(value)
    recent = version == b"1.1"
    _check_host(found.get(b"host", []), recent)
    said = {token.strip(b" \t").lower() for value in found.get(b"connection", ()) for token in value.split(b",")}
    path = raw_path.decode()
    return Head(
        scope={
            "type": "http",
            "http_version": version.decode(),
            "method": method.decode(),
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": headers,
        },
        length=_length(found.get(b"content-length", []), found.get(b"transfer-encoding", []), recent),
        keep_alive=b"close" not in said and (recent or b"keep-alive" in said),
        expects=recent and [value.lower() for value in found.get(b"expect", ())] == [b"100-continue"],
        websocket=b"upgrade" in said and [value.lower() for value in found.get(b"upgrade", ())] == [b"websocket"],
    )


def _target(method: bytes, target: bytes) -> tuple[bytes, bytes]:
    """The path and the query."""
    if absolute := _ABSOLUTE.match(target):
        target = target[absolute.end() :]
        if target[:1] != b"/":
            target = b"/" + target
    elif target[:1] != b"/" and (target, method) != (b"*", b"OPTIONS"):
        raise HeadError(f"the target must be a path that begins with /, got {_show(target)}")
    path, _, query = target.partition(b"?")
    return path, query


def _check_host(hosts: list[bytes], needed: bool) -> None:
    if len(hosts) > 1 or (needed and not hosts):
        raise HeadError(f"there must be one Host header, got {len(hosts)}")
    if hosts and hosts[0] and not _HOST.fullmatch(hosts[0]):
        raise HeadError(f"header Host: no host and port, got {_show(hosts[0])}")


def _length(lengths: list[bytes], codings: list[bytes], recent: bool) -> int:
    if codings:
        if lengths:
            raise HeadError("Content-Length and Transfer-Encoding: give one of them, not both")
        if not recent:
            raise HeadError("header Transfer-Encoding: there is none in HTTP/1.0")
        if [coding.lower() for coding in codings] != [b"chunked"]:
            raise HeadError(f"header Transfer-Encoding: must be chunked, once, got {_show(b', '.join(codings))}")
        return CHUNKED
    if not lengths:
        return 0
    if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 19:
        raise HeadError(
            f"header Content-Length: must be one number of at most 19 digits, got {_show(b', '.join(lengths))}"
        )
    return int(lengths[0])


def _fault(data: bytes) -> str:
    """What is wrong with a head that does not follow the grammar."""
    first, *lines = data.removesuffix(b"\r\n\r\n").split(b"\r\n")
    if not _REQUEST_LINE.fullmatch(first + b"\r\n"):
        return f"the request line must be a method, a target and HTTP/1.1, one space between them, got {_show(first)}"
    for number, line in enumerate(lines, 1):
        if not _FIELD.fullmatch(line + b"\r\n"):
            return f"header {number}: must be a name, a colon and a value, on one line, got {_show(line)}"
    return "the head holds an empty line too many"


def _show(text: bytes) -> str:
    return repr(text[:40].decode("latin-1")) + ("..." if len(text) > 40 else "")


def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


_STATUS_LINES = {status: _status_line(status) for status in range(200, 600)}


class AnswerHead(NamedTuple):
    """An answer's head.

    Attributes:
        text: its lines, without the empty one at the end.
        length: bytes of the body that it announces; None if it announces none.
        chunked: whether it says itself that the body comes in chunks.
        close: whether it says that the connection ends with it.
    """

    text: bytes
    length: int | None
    chunked: bool
    close: bool


def answer_head(status: int, headers: Iterable[Iterable[bytes]]) -> AnswerHead:
    """The lines of an answer's head. Most have been written before, and are kept.

    Raises:
        RuntimeError: it is not one: the application is wrong, not its client.
    """
    fields = tuple(headers)
    try:
        return _answer_head(status, fields)
    except TypeError:  # a header may also be a list of two
        return _answer_head(status, tuple([(bytes(name), bytes(value)) for name, value in fields]))


@lru_cache(maxsize=KEPT)
def _answer_head(status: int, headers: tuple[tuple[bytes, bytes], ...]) -> AnswerHead:
    if status not in _STATUS_LINES:
        raise RuntimeError(f"status {status!r} is none of a final answer, 200 to 599")
    lines, length, chunked, close = [_STATUS_LINES[status]], None, False, False
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _CONTENT.fullmatch(value):
            raise RuntimeError(f"header {name!r}: {value!r} cannot be sent")
        name = name.lower()
        if name == b"content-length":
            if not value.isdigit() or length is not None:
                raise RuntimeError(f"content-length must be one number, got {value!r}")
            length = int(value)
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise RuntimeError(f"transfer-encoding {value!r} is not served")
            chunked = True
            continue  # whether it is, is up to what the client understands
        elif name == b"connection":
            close = close or b"close" in [token.strip().lower() for token in value.split(b",")]
        lines += [name, b": ", value, b"\r\n"]
    if chunked and length is not None:
        raise RuntimeError("an answer has a content-length or a transfer-encoding, not both")
    return AnswerHead(b"".join(lines), length, chunked, close)
