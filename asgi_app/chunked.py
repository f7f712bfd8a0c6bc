"""The chunked transfer coding: pieces of it in, the body out. Pure; RFC 9112, section 7.1.

Strict, for the reason that heads.py gives. Extensions and trailers are read and dropped; both are bounded.
"""

import re

from .heads import FIELDS, MAX_HEADERS, TOKEN, HeadError

LONGEST_LINE = 256  # bytes of a chunk's size and its extensions

_QUOTED = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e]|\\[\t\x20-\x7e])*"'
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;%b(?:=(?:%b|%b))?)*" % (TOKEN, TOKEN, _QUOTED))


class ChunkReader:
    """Reads one body.

    Attributes:
        done: whether it has ended.
        rest: what came after its end.
    """

    def __init__(self, most: int) -> None:
        """`most` is how many bytes the trailers may have."""
        self._most = most
        self.done = False
        self.rest = b""
        self._held = b""  # the beginning of a line, or of the trailers
        self._left = 0  # bytes of the chunk that are still to come
        self._closing = False  # whether the line end behind a chunk is what comes next
        self._trailers = False

    def feed(self, data: bytes) -> bytes:
        """What `data` adds to the body.

        Raises:
            HeadError: it is not in this coding.
        """
        data, at, body = self._held + data, 0, []
        while not self.done:
            if self._left:
                piece = data[at : at + self._left]
                body.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._closing = True
            end = self._trailers_end(data, at) if self._trailers else self._line_end(data, at)
            if end < 0:
                break
            self._take(data[at:end])
            at = end
        self._held = b"" if self.done else data[at:]
        self.rest = data[at:] if self.done else b""
        return body[0] if len(body) == 1 else b"".join(body)

    def _take(self, line: bytes) -> None:
        """What was read up to the end of a line, or of the trailers."""
        if self._trailers:
            if not FIELDS.fullmatch(line):
                raise HeadError("the trailers are not a name, a colon and a value on each line")
            if line.count(b"\r\n") > MAX_HEADERS:
                raise HeadError(f"more than {MAX_HEADERS} trailers")
            self.done = True
        elif self._closing:
            if line != b"\r\n":
                raise HeadError("a chunk is longer than its size")
            self._closing = False
        else:
            size = _SIZE_LINE.fullmatch(line, 0, len(line) - 2)
            if size is None:
                raise HeadError(f"a chunk must begin with its size in hexadecimal digits, got {line[:40]!r}")
            self._left = int(size[1], 16)
            self._trailers = not self._left

    def _line_end(self, data: bytes, at: int) -> int:
        """Behind the next line, -1 if it has not come yet."""
        limit = 2 if self._closing else LONGEST_LINE
        end = data.find(b"\n", at, at + limit)
        if end < 0:
            if len(data) - at >= limit:
                raise HeadError("a chunk is longer than its size" if limit == 2 else "a chunk's first line is too long")
            return -1
        if data[end - 1 : end] != b"\r" or end == at:
            raise HeadError("a line of the body's framing ends without CRLF")
        return end + 1

    def _trailers_end(self, data: bytes, at: int) -> int:
        if data.startswith(b"\r\n", at):
            return at + 2
        end = data.find(b"\r\n\r\n", at, at + self._most)
        if end < 0:
            if len(data) - at >= self._most:
                raise HeadError(f"the trailers are over {self._most} bytes (MILLRACE_MAX_HEAD)")
            return -1
        return end + 4
