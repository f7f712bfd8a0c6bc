"""Inputs that are almost right: those of tests/fuzz/seeds.py, with a few mistakes that people and programs make."""

import json
import re
import struct
from collections.abc import Iterator
from typing import Any
from zlib import crc32

from hypothesis import strategies as st

from asgi_app.compression import CODINGS, compress
from engine.config import FIELDS
from engine.ipc.frames import HEADER
from tests.asgi_app.protocol_cases import CASES

from .seeds import CONFIG_DOCUMENTS, CONFIGS, DOCUMENTS, METHODS, RAW, REQUESTS, SEEDS, SERVED, WORDS, infer, numbered
from .targets import MODELS, PLACES


class Object(list[tuple[str, Any]]):
    """A JSON object by its members, which may be there twice."""


class Literal(str):
    """JSON as it is written."""


# What a value may be replaced by: every type, the edges of every datatype, what other parsers of JSON accept, and what
# is no JSON.
_VALUES = [
    Literal(text)
    for text in [
        *r"""
        null true false 0 -0 -1 1 2 127 128 -129 65536 2147483648 9223372036854775807 9223372036854775808
        -9223372036854775809 18446744073709551615 18446744073709551616 1e400 1e39 3.4028236e38 0.1 1e-400
        NaN Infinity -Infinity 01 +1 .5 undefined 'x' "" "x" "r" "FP32" "BYTES" "BF16" "\u0000" "\ud800" "\ud83d\ude00"
        "é" [] {} [[]] [null] [{}] [1,[2]] [[1],[2,3]] [[[1]]] {"name":"x"} {"data":[1]}
        """.split(),
        *('"\ud800"', "", "9" * 5000, "-" + "9" * 400, '"' + "x" * 5000 + '"', "[" + "1," * 99 + "1]"),
        *("[" * depth + "]" * depth for depth in (99, 3000)),
        *('{"data":' * depth + "1" + "}" * depth for depth in (98, 1200)),
        "[" * 3000,
    ]
]  # fmt: skip

_KEYS = st.sampled_from(
    "id inputs outputs parameters name datatype shape data binary_data_size binary_data classification priority "
    "timeout shared_memory_region shared_memory_byte_size shared_memory_offset sequence_id triton_x x dims "
    "data_type".split()
) | st.text(max_size=5)


def _members(value: Any) -> Any:
    if isinstance(value, dict):
        return Object((key, _members(part)) for key, part in value.items())
    return [_members(part) for part in value] if isinstance(value, list) else value


def _containers(value: Any) -> Iterator[list[Any]]:
    """Every object and array in `value` that is not empty."""
    if isinstance(value, list) and value:
        yield value
        for part in value:
            yield from _containers(part[1] if isinstance(value, Object) else part)


def _written(value: Any) -> str:
    if isinstance(value, Literal):
        return value
    if isinstance(value, Object):
        return "{" + ",".join(f"{json.dumps(key)}:{_written(part)}" for key, part in value) + "}"
    return "[" + ",".join(map(_written, value)) + "]" if isinstance(value, list) else json.dumps(value)


@st.composite
def documents(draw: st.DrawFn, document: Any) -> str:
    """`document` as JSON, with members dropped, doubled, renamed, moved or replaced."""
    root = [_members(document)]
    for _ in range(draw(st.integers(0, 3))):
        parent = draw(st.sampled_from(list(_containers(root)) or [root]))
        if not parent:
            break
        at = draw(st.integers(0, len(parent) - 1))
        was = parent[at]
        match draw(st.sampled_from(["replace", "replace", "drop", "double", "rename", "move"])):
            case "replace":
                value = draw(st.sampled_from(_VALUES))
                parent[at] = (was[0], value) if isinstance(parent, Object) else value
            case "drop":
                del parent[at]
            case "double":
                parent.insert(at, was)
            case "rename" if isinstance(parent, Object):
                parent[at] = (draw(_KEYS), was[1])
            case _:
                parent.append(parent.pop(at))
    return _written(root[0]) if root else ""


@st.composite
def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """`data`: as it is, cut, with bytes that do not belong there, or with one of its bytes changed."""
    at = draw(st.integers(0, len(data)))
    some = draw(st.binary(max_size=5) | st.just(b"\xed\xa0\x80"))  # half a surrogate pair, in what is almost UTF-8
    return draw(
        st.sampled_from([data, data, data[:at], data[:at] + some + data[at:], data[:at] + some + data[at + 1 :]])
    )


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    head, binary = draw(st.sampled_from(REQUESTS))
    length = st.sampled_from(
        [b"-1", b"5", b"007", b"99999999999999999999", b"1e3", b"\xff", b"--1", b" 1", b"2147483647"]
    )
    header = draw(st.none() | st.sampled_from([b"", b"*"]) | length)
    if binary is not None:
        binary = draw(spoilt(binary))
    text = draw(documents(head)).encode("utf-8", "surrogatepass")
    return infer(draw(st.just(text) | spoilt(text)), binary, header)


@st.composite
def raws(draw: st.DrawFn) -> bytes:
    _, body = draw(st.sampled_from(RAW))
    return numbered(draw(st.integers(0, len(MODELS) - 1)), draw(spoilt(body) | st.binary(max_size=100)))


@st.composite
def generates(draw: st.DrawFn) -> bytes:
    model, document = draw(st.sampled_from(DOCUMENTS))
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32-be"]))
    text = draw(documents(document)).encode(encoding, "surrogatepass")
    return numbered(draw(st.just(model) | st.integers(0, len(MODELS) - 1)), draw(st.just(text) | spoilt(text)))


_FRAME = struct.Struct("<IIIBBHIQ")  # a frame's header

_TOKEN = re.compile(r'"[^"]*"|[\w.-]+|\S')
_TOKENS = [
    *sorted({token for _, text in CONFIGS for token in _TOKEN.findall(text)} | FIELDS),
    *(f'"{word}"' for word in WORDS["config"] if '"' not in word),
    *r"""
    -1 0 99 2147483648 9223372036854775808 18446744073709551615 1e400 nan inf TYPE_INVALID < > ' " # [x.y]
    [type.googleapis.com/inference.ModelConfig] "\xff" "\ud800" "\000" "é" "-1e400" "../x" "a/b"
    """.split(),
    *("\0", '"' + "9" * 5000 + '"', "{ " * 200, "input { " * 200),
]  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """A config.pbtxt with tokens dropped, doubled, swapped or replaced."""
    place, text = draw(st.sampled_from(CONFIGS))
    tokens = _TOKEN.findall(re.sub("#.*", "", text))
    for _ in range(draw(st.integers(0, 3))):
        at, to = draw(st.integers(0, len(tokens) - 1)), draw(st.integers(0, len(tokens) - 1))
        match draw(st.sampled_from(["replace", "replace", "drop", "double", "swap"])):
            case "replace":
                tokens[at] = draw(st.sampled_from(_TOKENS))
            case "drop" if len(tokens) > 1:
                del tokens[at]
            case "double":
                tokens.insert(at, tokens[at])
            case _:
                tokens[at], tokens[to] = tokens[to], tokens[at]
    return numbered(draw(st.just(place) | st.integers(0, len(PLACES) - 1)), " ".join(tokens))


@st.composite
def config_documents(draw: st.DrawFn) -> bytes:
    place, document = draw(st.sampled_from(CONFIG_DOCUMENTS))
    return numbered(draw(st.just(place) | st.integers(0, len(PLACES) - 1)), draw(documents(document)))


@st.composite
def compressed(draw: st.DrawFn) -> bytes:
    index = draw(st.integers(0, len(CODINGS) - 1))
    plain = draw(st.binary(max_size=50)) * draw(st.sampled_from([1, 1, 1000, 10_000]))
    words = st.sampled_from(
        [b"gzip", b"deflate", b"identity", b";q=", b",", b"0.5", b"nan", b"-inf", b" ", b"*", b"\xff"]
    )
    accepted = b"".join(draw(st.lists(words, max_size=8)))
    return numbered(index, accepted + b"\n" + draw(spoilt(compress(plain, list(CODINGS)[index]))))


@st.composite
def paths(draw: st.DrawFn) -> bytes:
    data = draw(st.sampled_from(SEEDS["path"]))
    segments = data[1:].split(b"/")
    at = draw(st.integers(0, len(segments) - 1))
    odd = st.sampled_from(
        [b"", b"..", b"%2e%2e", b"%ff", b"%", b"%2F", b"%00", b"\xff", b"9" * 900, b"0", b"9" * 19, b"m"]
    )
    segments[at] = draw(odd | st.just(segments[at]))
    return numbered(draw(st.just(data[0]) | st.integers(0, len(METHODS) + 2)), b"/".join(segments))


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Frames with a few bytes changed, after which the checksum, and the size that a frame says, may be right again."""
    seed = draw(st.sampled_from(SEEDS["ipc"]))
    data = bytearray(draw(st.just(seed[1:]) | spoilt(seed[1:])))
    if len(data) >= HEADER and draw(st.booleans()):
        for _ in range(draw(st.integers(0, 3))):
            data[draw(st.integers(4, len(data) - 1))] = draw(st.integers(0, 255) | st.sampled_from([0, 1, 127, 255]))
        _, _, *_, meta, _ = _FRAME.unpack_from(data)
        if draw(st.booleans()):
            struct.pack_into("<I", data, 4, len(data))
        struct.pack_into("<I", data, 0, crc32(data[4 : HEADER + meta]))
    return numbered(draw(st.integers(0, 255)), bytes(data))


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """Some requests one after another, of which one may be a case of any kind, or spoilt."""
    served = st.sampled_from(list(SERVED.values()))
    requests = draw(st.lists(served, min_size=1, max_size=3))
    at = draw(st.integers(0, len(requests) - 1))
    requests[at] = draw(st.just(requests[at]) | spoilt(requests[at]) | st.sampled_from([case.sent for case in CASES]))
    return bytes([draw(st.integers(0, 255)), draw(st.integers(0, 255))]) + b"".join(requests)


# Target -> inputs that it is likely to accept, or to refuse for one reason.
LIKELY: dict[str, st.SearchStrategy[bytes]] = {
    "decode": requests(),
    "raw": raws(),
    "generate": generates(),
    "config": configs(),
    "config_json": config_documents(),
    "compression": compressed(),
    "path": paths(),
    "ipc": streams(),
    "connection": conversations(),
}
