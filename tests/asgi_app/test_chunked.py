"""Chunks: the body, however it is cut, exactly up to its end; and nothing that two servers could read in two ways."""

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asgi_app.chunked import LONGEST_LINE, ChunkReader
from asgi_app.heads import MAX_HEADERS, HeadError

MOST = 200  # bytes of trailers

GOOD = {
    b"0\r\n\r\n": b"",
    b"5\r\nhello\r\n0\r\n\r\n": b"hello",
    b"5\r\nhello\r\n1\r\n!\r\n000\r\n\r\n": b"hello!",
    b"0000000000000005\r\nhello\r\n0\r\n\r\n": b"hello",
    b"a\r\n0\r\n\r\n12345\r\n0\r\n\r\n": b"0\r\n\r\n12345",
    b"2\r\n\r\n\r\n0\r\n\r\n": b"\r\n",
    b"A;a;b=c;d=\"e;\\\"\r\"\r\n".replace(b"\r\"", b"\"") + b"0123456789\r\n0\r\n\r\n": b"0123456789",
    b"1;" + b"a" * (LONGEST_LINE - 4) + b"\r\nx\r\n0\r\n\r\n": b"x",
    b"1\r\nx\r\n0;last=1\r\n\r\n": b"x",
    b"1\r\nx\r\n0\r\na: b\r\nContent-Length: 9\r\n\r\n": b"x",
    b"0\r\n" + b"a:\r\n" * (MOST // 4 - 1) + b"\r\n": b"",
}  # fmt: skip

# What is refused -> a word of why.
BAD = {
    b"\r\n": "size",
    b"g\r\n": "size",
    b"-1\r\n": "size",
    b"+1\r\nx\r\n": "size",
    b"0x1\r\nx\r\n": "size",
    b" 1\r\nx\r\n": "size",
    b"1 \r\nx\r\n": "size",
    b"1_0\r\n": "size",
    b"\xb2\r\nxx\r\n": "size",
    b"00000000000000001\r\n": "size",
    b"1;\r\nx\r\n": "size",
    b"1;a=\r\nx\r\n": "size",
    b"1;a=\"\r\nx\r\n": "size",
    b"1;a b\r\nx\r\n": "size",
    b"1;a=\"\0\"\r\nx\r\n": "size",
    b"1;\rb\r\nx\r\n": "size",
    b"1\nx\r\n": "CRLF",
    b"\n": "CRLF",
    b"1\r\nx\n0\r\n\r\n": "CRLF",
    b"1\r\nxy\r\n0\r\n\r\n": "longer",
    b"1\r\n\r\n0\r\n\r\n": "CRLF",
    b"1\r\nx\n\n": "CRLF",
    b"1\r\nx\r0\r\n": "longer",
    b"1\r\nx0\r\n\r\n": "longer",
    b"1;" + b"a" * (LONGEST_LINE - 3) + b"\r\n": "too long",
    b"1" * LONGEST_LINE: "too long",
    b"0\r\na\r\n\r\n": "trailers",
    b"0\r\na b: c\r\n\r\n": "trailers",
    b"0\r\na: b\r\n c\r\n\r\n": "trailers",
    b"0\r\na: \0\r\n\r\n": "trailers",
    b"0\r\na: b\n\r\n\r\n": "trailers",
    b"0\r\n" + b"a:\r\n" * (MOST // 4 - 1) + b"b:\r\n\r\n": "over 200 bytes",
    b"0\r\n" + b"a" * MOST: "over 200 bytes",
}  # fmt: skip


def whole(data: bytes) -> list[bytes]:
    return [data]


def single(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


def threes(data: bytes) -> list[bytes]:
    return [data[index : index + 3] for index in range(0, len(data), 3)]


ways = pytest.mark.parametrize("cut", [whole, single, threes])
Cut = Callable[[bytes], list[bytes]]


def read(pieces: list[bytes], most: int = MOST) -> tuple[bytes, bool, bytes]:
    """The body, whether it has ended, and all that came after its end."""
    reader, body, rest = ChunkReader(most), b"", b""
    for piece in pieces:
        if reader.done:
            rest += piece
            continue
        body += reader.feed(piece)
        rest = reader.rest
    return body, reader.done, rest


@ways
@pytest.mark.parametrize("rubbish", [b"", b"\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0"])
@pytest.mark.parametrize("data", GOOD)
def test_bodies(data: bytes, rubbish: bytes, cut: Cut) -> None:
    """They end where they end, and not one byte of what follows is taken, or looked at."""
    assert read(cut(data + rubbish)) == (GOOD[data], True, rubbish)


@ways
@pytest.mark.parametrize("data", BAD)
def test_what_is_refused(data: bytes, cut: Cut) -> None:
    """Before it ends, and before anything of what follows is given to anybody."""
    with pytest.raises(HeadError, match=BAD[data]):
        read(cut(data + b"x" * 3 * LONGEST_LINE))


def test_a_chunk_that_is_too_long_is_refused_at_once() -> None:
    """Two bytes tell: nobody waits for the end of a line that cannot be one."""
    with pytest.raises(HeadError, match="longer"):
        ChunkReader(MOST).feed(b"1\r\nxyz")


@pytest.mark.parametrize("data", GOOD)
def test_no_body_ends_early(data: bytes) -> None:
    """Whatever is missing of it, it is waited for: a part is never taken for the whole."""
    for end in range(len(data)):
        body, done, rest = read([data[:end]])
        assert (done, rest) == (False, b"")
        assert GOOD[data].startswith(body)


@pytest.mark.parametrize(("count", "refused"), [(MAX_HEADERS - 1, False), (MAX_HEADERS, True)])
def test_so_many_trailers(count: int, refused: bool) -> None:
    """As many lines as a head may have, with the empty one at their end; their bytes are bounded besides."""
    data = b"0\r\n" + b"a:\r\n" * count + b"\r\n"
    if refused:
        with pytest.raises(HeadError, match="more than 100 trailers"):
            read([data], 10_000)
    else:
        assert read([data], 10_000) == (b"", True, b"")


def test_what_is_held_is_bounded() -> None:
    """Of a line or of trailers that never end; what belongs to the body is given away at once."""
    reader = ChunkReader(MOST)
    assert reader.feed(b"ffffffffffffffff\r\n" + bytes(10_000)) == bytes(10_000)
    assert reader.feed(bytes(10_000)) == bytes(10_000)
    assert not reader._held
    for start, bound in ((b"1;", LONGEST_LINE), (b"0\r\na:", MOST)):
        reader, fed = ChunkReader(MOST), 0
        with pytest.raises(HeadError):  # noqa: PT012
            reader.feed(start)
            while True:
                reader.feed(b"a")
                fed += 1
                assert len(reader._held) <= bound
        assert fed < bound


def test_a_chunk_in_one_piece_is_not_copied() -> None:
    """What is the body alone is given as it came: a large body is not taken apart and put together again."""
    reader = ChunkReader(MOST)
    assert reader.feed(b"186a0\r\n") == b""
    piece = bytes(100_000)
    assert reader.feed(piece) is piece


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=5), st.data())
@example([b"0\r\n\r\n"], None)
def test_whatever_is_written_is_read(chunks: list[bytes], data: st.DataObject | None) -> None:
    """Any body, in any chunks, in any pieces, with anything behind it."""
    text = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    behind = data.draw(st.binary(max_size=9)) if data else b"\r\n"
    sent = text + behind
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent))))) if data else [3]
    pieces = [sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    assert read(pieces) == (b"".join(chunks), True, behind)


@given(st.lists(st.sampled_from([b"0", b"1", b"2", b"a", b"\r\n", b"\r", b"\n", b";", b"x", b" ", b":"]), max_size=14))
def test_however_it_is_cut_the_same_comes_of_it(pieces: list[bytes]) -> None:
    """Anything at all: whole or byte by byte, it is the same body with the same end, or refused both times."""
    data = b"".join(pieces)
    outcomes: list[object] = []
    for cut in (whole, single):
        try:
            outcomes.append(read(cut(data)))
        except HeadError:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]
