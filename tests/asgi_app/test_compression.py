"""Content codings: exact, bounded, and chosen as Triton chooses them."""

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_app.compression import CHUNK, CODINGS, compress, decompress, preferred
from engine.errors import InvalidInput, TooLarge


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK])
def test_exact_up_to_the_limit(coding: bytes, size: int) -> None:
    """What comes out is what went in, at every size around the chunk's; one byte over the limit is refused."""
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    packed = compress(body, coding)
    assert decompress(packed, coding, size) == body
    assert decompress(bytearray(packed), coding, size) == body
    if size:
        with pytest.raises(TooLarge, match=rf"over the limit of {size - 1} bytes \(MILLRACE_MAX_BODY\)"):
            decompress(packed, coding, size - 1)


@given(body=st.binary(max_size=300), repeat=st.integers(1, 2000), coding=st.sampled_from(list(CODINGS)))
def test_any_body_is_exact(body: bytes, repeat: int, coding: bytes) -> None:
    """Whatever the bytes, and however well they compress."""
    assert decompress(compress(body * repeat, coding), coding, 1 << 20) == body * repeat


@given(body=st.binary(max_size=200), coding=st.sampled_from(list(CODINGS)))
def test_any_bytes_are_a_body_or_an_error_of_ours(body: bytes, coding: bytes) -> None:
    """Bytes that nobody compressed are refused, if they are not by chance a whole stream."""
    try:
        decompress(body, coding, 1000)
    except (InvalidInput, TooLarge) as error:
        assert str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("body", "coding", "text"),
    [
        (b"", b"gzip", "^Content-Encoding: the gzip body is cut off$"),
        (gzip.compress(b"abc" * 99)[:-1], b"gzip", "gzip body is cut off"),
        (zlib.compress(b"abc" * 99)[:9], b"deflate", "^Content-Encoding: the deflate body is cut off$"),
        (b"plain text", b"gzip", "^Content-Encoding: the body is not valid gzip$"),
        (gzip.compress(b"abc")[:-8] + bytes(8), b"gzip", "not valid gzip"),  # a wrong checksum
        (zlib.compress(b"abc"), b"gzip", "not valid gzip"),
        (gzip.compress(b"abc"), b"deflate", "^Content-Encoding: the body is not valid deflate$"),
        (zlib.compress(b"abc", wbits=-15), b"deflate", "not valid deflate"),  # without zlib's wrapper
        (gzip.compress(b"abc") + b"more", b"gzip", "^Content-Encoding: the body goes on after its gzip data$"),
        (gzip.compress(b"") + bytes(CHUNK), b"gzip", "the body goes on after"),
    ],
)
def test_bodies_that_are_not_what_they_say(body: bytes, coding: bytes, text: str) -> None:
    """Cut, corrupt, of another format, or followed by something else."""
    with pytest.raises(InvalidInput, match=text):
        decompress(body, coding, 1 << 20)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_takes_no_more_memory_than_the_limit(coding: bytes) -> None:
    """256 MiB in 256 KiB are refused with little more than the limit of 1 MiB in memory."""
    bomb, limit = compress(bytes(1 << 28), coding), 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decompress(bomb, coding, limit)
        assert tracemalloc.get_traced_memory()[1] < limit * 5 // 4 + 4 * CHUNK
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("coding", CODINGS)
def test_compress_makes_the_standard_formats(coding: bytes) -> None:
    """Others read it: gzip's, and zlib's for deflate."""
    packed = compress(b"abc" * 99, coding)
    assert (gzip.decompress(packed) if coding == b"gzip" else zlib.decompress(packed)) == b"abc" * 99


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (b"", b""),
        (b"gzip", b"gzip"),
        (b"deflate", b"deflate"),
        (b"gzip, deflate", b"gzip"),
        (b"deflate, gzip", b"deflate"),
        (b"gzip;q=0.5, deflate;q=0.8", b"deflate"),
        (b"gzip ; q=0.5,deflate", b"deflate"),
        (b"identity, gzip", b""),
        (b"identity;q=0.5, gzip", b"gzip"),
        (b"gzip;q=0", b""),
        (b"gzip;q=-1", b""),
        (b"gzip;q=nan", b""),
        (b"gzip;q=x, deflate;q=0.1", b"deflate"),
        (b"gzip;level=9", b"gzip"),
        (b"GZIP, br, zstd, *", b""),
        (b",,;q=1,=", b""),
    ],
)
def test_what_a_client_prefers(accepted: bytes, coding: bytes) -> None:
    """The highest weight, of equal ones the first; what is not known, and weight 0, counts for nothing."""
    assert preferred(accepted) == coding


@given(accepted=st.binary(max_size=60))
def test_any_preference_is_a_coding_or_none(accepted: bytes) -> None:
    """No header makes it fail."""
    assert preferred(accepted) in {b"", *CODINGS}
