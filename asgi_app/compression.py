"""Content codings of bodies: gzip, and deflate, which is zlib's format (RFC 9110, 8.4; PROTOCOL.md 2.5). Pure."""

import zlib

from engine.errors import InvalidInput, TooLarge

from .tensors import Buffer

# Content coding -> zlib's name for its format.
CODINGS = {b"gzip": 31, b"deflate": 15}

CHUNK = 64 << 10
LEVEL = 1  # of answers: a tensor's numbers compress little however long one tries


def decompress(body: Buffer, coding: bytes, limit: int) -> bytearray:
    """Undo a content coding, in memory for the result and one chunk.

    Args:
        limit: the most bytes that may come out.

    Raises:
        TooLarge: more would come out.
        InvalidInput: the body is not what its coding says, or it is cut off.
    """
    name = coding.decode()
    stream = zlib.decompressobj(CODINGS[coding])
    plain = bytearray()
    rest = memoryview(body)
    try:
        while not stream.eof and (rest or stream.unconsumed_tail):
            chunk, rest = (stream.unconsumed_tail, rest) if stream.unconsumed_tail else (rest[:CHUNK], rest[CHUNK:])
            plain += stream.decompress(chunk, CHUNK)
            if len(plain) > limit:
                raise TooLarge(f"the decompressed body is over the limit of {limit} bytes (MILLRACE_MAX_BODY)")
    except zlib.error:
        raise InvalidInput(f"Content-Encoding: the body is not valid {name}") from None
    if not stream.eof:
        raise InvalidInput(f"Content-Encoding: the {name} body is cut off")
    if stream.unused_data or rest:
        raise InvalidInput(f"Content-Encoding: the body goes on after its {name} data")
    return plain


def compress(body: Buffer, coding: bytes) -> bytes:
    """Apply a content coding."""
    return zlib.compress(body, LEVEL, CODINGS[coding])


def preferred(accepted: bytes) -> bytes:
    """The coding that the header Accept-Encoding asks for, as Triton reads it; b"" for none.

    The highest weight wins, of equal ones the first. What is not gzip, deflate or identity, in these very letters, and
    what has no positive weight, counts for nothing.
    """
    best, chosen = 0.0, b""
    for entry in accepted.split(b","):
        name, _, parameter = entry.partition(b";")
        coding = name.strip()
        key, _, text = parameter.partition(b"=")
        try:
            weight = float(text) if key.strip() == b"q" else 1.0
        except ValueError:
            continue
        if (coding in CODINGS or coding == b"identity") and weight > best:
            best, chosen = weight, coding
    return chosen if chosen in CODINGS else b""
