"""Frames: whatever comes is the frame that was sent, or a FrameError; never anything else, and never another frame."""

import itertools
import math
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import CannotMeetDeadline, DeadlineExceeded, QueueFull
from engine.errors import InvalidInput, ModelError, NotReady
from engine.ipc import frames
from engine.ipc.frames import Frame, FrameError, Reader, Writer
from engine.types import DATATYPES, Array

KINDS = (
    frames.HELLO, frames.INFER, frames.STREAM, frames.CANCEL, frames.CALL, frames.SEEN, frames.FREE, frames.WELCOME,
    frames.RESPONSE, frames.ERROR, frames.END, frames.STALE, frames.REPLY, frames.CATALOGUE, frames.BEAT, frames.DRAIN,
)  # fmt: skip


class Memory:
    """Shared memory in which any part may be looked at, and nobody may look beyond it."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content
        self.size = len(content)

    def view(self, offset: int, nbytes: int) -> memoryview:
        assert 0 <= offset <= offset + nbytes <= self.size
        return memoryview(self.content)[offset : offset + nbytes]


NOTHING = Memory()


@dataclass(frozen=True)
class Tensor:
    """A descriptor as it is written, and what is inline."""

    index: int = 0
    code: int = list(DATATYPES).index("FP32")
    shape: tuple[int, ...] = (1,)
    nbytes: int = 4
    offset: int = 0
    in_arena: bool = False
    inline: bytes = b"\0\0\x80\x3f"
    dimensions: int = -1

    def descriptor(self) -> bytes:
        place = (len(self.shape) if self.dimensions < 0 else self.dimensions) | frames.IN_ARENA * self.in_arena
        head = struct.pack("<HBBQQ", self.index, self.code, place, self.nbytes, self.offset)
        return head + struct.pack(f"<{len(self.shape)}q", *self.shape)


def pack(arrays: Sequence[Array]) -> tuple[bytes, list[bytes | memoryview], int]:
    """Descriptors, contents and bytes of tensors that travel in the frame; the index of each is its place."""
    inline = [frames.elements(array) for array in arrays]
    described = [
        frames.describe(index, array.dtype, array.shape, len(inline[index])) for index, array in enumerate(arrays)
    ]
    return b"".join(described), inline, sum(map(len, inline))


def write_request(writer: Writer, arrays: Sequence[Array], more: bytes = b"", id: int = 7) -> None:
    descriptors, inline, nbytes = pack(arrays)
    meta = frames.request_meta(3, 2, 1.5, 0.25, 4, descriptors, more)
    writer.write(frames.INFER, id, frames.ALONE, meta, len(arrays), inline, nbytes)


def write_response(writer: Writer, arrays: Sequence[Array], more: bytes = b"", id: int = 7) -> None:
    descriptors, inline, nbytes = pack(arrays)
    writer.write(frames.RESPONSE, id, 0, frames.response_meta(descriptors, more), len(arrays), inline, nbytes)


def one(data: bytes) -> Frame:
    (frame,) = Reader().feed(data)
    return frame


def response_of(*tensors: Tensor, more: bytes = b"", count: int = -1, beyond: bytes = b"") -> Frame:
    """A response of which everything is true but what `tensors` say."""
    writer = Writer()
    inline = [tensor.inline for tensor in tensors if not tensor.in_arena] + [beyond]
    meta = frames.response_meta(b"".join(tensor.descriptor() for tensor in tensors), more)
    writer.write(
        frames.RESPONSE, 1, 0, meta, len(tensors) if count < 0 else count, inline, sum(map(len, inline))
    )  # fmt: skip
    return one(writer.take())


def essence(frame: Frame) -> tuple[int, int, int, int, bytes, bytes]:
    """What a frame says, wherever it lies."""
    kind, flags, tensors, about, data, meta, inline, end = frame
    return kind, flags, tensors, about, data[meta:inline], data[inline:end]


def assert_same(got: Array, array: Array) -> None:
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.flags.c_contiguous
    if array.dtype == object:
        assert got.tolist() == array.tolist()
    else:
        assert got.tobytes() == array.tobytes()


def stream() -> tuple[bytes, list[tuple[int, int, int, int, bytes, bytes]]]:
    """One of each: the bytes, and what they say."""
    writer = Writer()
    writer.write(frames.HELLO, meta=b'{"version":1}')
    write_request(writer, [np.arange(3, dtype="f4"), np.array([b"ab", b""], object)], b'{"id":"r"}')
    writer.write(frames.CANCEL, 7)
    writer.write(frames.CALL, 8, 0, b"{}", 0, [b"file"], 4)
    writer.write(frames.SEEN, 2)
    writer.write(frames.FREE, meta=frames.offsets_meta([0, 64]))
    write_response(writer, [np.ones((1, 2), "?")])
    flags, meta = frames.error_meta(InvalidInput("no"))
    writer.write(frames.ERROR, 9, flags, meta)
    writer.write(frames.BEAT, flags=frames.LIVE | frames.READY)
    writer.write(frames.DRAIN)
    data = writer.take()
    return data, [essence(frame) for frame in Reader().feed(data)]


STREAM, SAID = stream()


# What is written is read.


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_round_trips(kind: int) -> None:
    """Kind, flags, number of tensors, id, meta part and inline part, whatever they are."""
    writer = Writer()
    writer.write(kind, 2**64 - 1, 255, b"meta", 65535, [b"in", memoryview(b"line")], 6)
    writer.write(kind)
    first, second = Reader().feed(writer.take())
    assert essence(first) == (kind, 255, 65535, 2**64 - 1, b"meta", b"inline")
    assert essence(second) == (kind, 0, 0, 0, b"", b"")
    assert writer.take() == b""
    assert writer.nbytes == 0


def test_kinds_are_told_apart() -> None:
    """No two have the same number, and those of the two directions lie apart."""
    assert len(set(KINDS)) == len(KINDS)
    assert {getattr(frames, name) for name in dir(frames) if name in (
        "HELLO INFER STREAM CANCEL CALL SEEN FREE WELCOME RESPONSE ERROR END STALE REPLY CATALOGUE BEAT DRAIN".split()
    )} == set(KINDS)  # fmt: skip


_SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 2), (2, 0, 5), (0,) * 64, (1,) * 63 + (2,)]


def filled(datatype: str, shape: tuple[int, ...]) -> Array:
    dtype, count = DATATYPES[datatype], math.prod(shape)
    if dtype.hasobject:
        array = np.empty(count, object)
        array[:] = [b"\xff" * (number % 5) for number in range(count)]
        return array.reshape(shape)
    return (np.arange(count) % 2).astype(dtype).reshape(shape)


@pytest.mark.parametrize("shape", _SHAPES, ids=lambda shape: f"{len(shape)} dimensions, {math.prod(shape)} elements")
@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("placed", [False, True])
def test_tensors_round_trip(datatype: str, shape: tuple[int, ...], placed: bool) -> None:
    """Every datatype, without elements, with 64 dimensions, in the frame and in shared memory."""
    array = filled(datatype, shape)
    data = bytes(frames.elements(array))
    writer, memory, offset = Writer(), NOTHING, -1
    if placed:
        memory, offset = Memory(b"before" + data + b"behind"), 6
    meta = frames.response_meta(frames.describe(9, array.dtype, shape, len(data), offset), b"")
    writer.write(frames.RESPONSE, 1, 0, meta, 1, [] if placed else [data], 0 if placed else len(data))
    ((index, got),), more = frames.read_response(one(writer.take()), memory)
    assert (index, more) == (9, b"")
    assert_same(got, array)


@pytest.mark.parametrize("rows", [3, 3000])
def test_arrays_of_any_layout_round_trip(rows: int) -> None:
    """Small and large ones whose elements do not lie one behind the other."""
    array = np.arange(rows * 8, dtype="<i8").reshape(rows, 8)
    for layout in (array.T, array[:, ::2], array[::-1], np.asfortranarray(array)):
        writer = Writer()
        write_response(writer, [layout])
        ((_, got),), _ = frames.read_response(one(writer.take()), NOTHING)
        assert_same(got, np.ascontiguousarray(layout))


def test_a_request_round_trips() -> None:
    """Numbers, times, priority, tensors in their order, and what is said besides."""
    writer = Writer()
    arrays = [np.arange(6, dtype="<f4").reshape(2, 3), np.array([b"x", b"", b"yz"], object), np.zeros(0, "<i8")]
    write_request(writer, arrays, b'{"id":"r"}')
    frame = one(writer.take())
    number, rows, deadline, timeout, priority, got, more = frames.read_request(frame, NOTHING)
    assert (number, rows, deadline, timeout, priority, more) == (3, 2, 1.5, 0.25, 4, b'{"id":"r"}')
    assert [index for index, _ in got] == [0, 1, 2]
    for (_, array), sent in zip(got, arrays, strict=True):
        assert_same(array, sent)


def write_many(ids: Sequence[int], arrays: Sequence[Array], kind: int = frames.INFER, **changed: Any) -> bytes:
    """A frame for many: `arrays` have one dimension more, by whom they are of. `changed` says what is not true."""
    each = [array[0] for array in arrays]
    described = b"".join(
        frames.describe(index, array.dtype, array.shape, array.nbytes, changed.get("offset", -1))
        for index, array in enumerate(each)
    )
    inline = [changed.get("head", frames.write_ids(ids)), *[array.tobytes() for array in arrays]]
    meta = (
        frames.request_meta(3, 1, 1.5, 0.25, 4, described, b"")
        if kind == frames.INFER
        else frames.response_meta(described, b"")
    )
    writer = Writer()
    count, nbytes = changed.get("count", len(ids)), sum(map(len, inline))
    writer.write(kind, count, frames.MANY, meta, len(each), inline, nbytes)
    return writer.take()


@pytest.mark.parametrize("kind", [frames.INFER, frames.RESPONSE])
@pytest.mark.parametrize("count", [1, 2, frames.MOST])
def test_many_round_trip(kind: int, count: int) -> None:
    """Ids in their order, and of each tensor one row for each of them."""
    ids = [1 << 60 | number for number in range(count)]
    arrays = [
        np.arange(count * 4, dtype="<f4").reshape(count, 1, 4), np.arange(count, dtype="<i8").reshape(count, 1),
        (np.arange(count) % 2 == 0).reshape(count, 1), np.zeros((count, 0, 3), "<f2"),
    ]  # fmt: skip
    frame = one(write_many(ids, arrays, kind))
    got = frames.read_request(frame, NOTHING)[5] if kind == frames.INFER else frames.read_response(frame, NOTHING)[0]
    assert frames.read_ids(frame) == tuple(ids)
    assert [index for index, _ in got] == [0, 1, 2, 3]
    for (_, array), sent in zip(got, arrays, strict=True):
        assert_same(array, sent)


def test_one_is_not_many() -> None:
    """The id of a frame for one is its own."""
    writer = Writer()
    write_response(writer, [np.zeros(3)], id=9)
    assert frames.read_ids(one(writer.take())) == (9,)


@pytest.mark.parametrize(
    "changed",
    [
        {"count": 0}, {"count": 1}, {"count": 3}, {"count": frames.MOST + 1}, {"count": 1 << 63}, {"offset": 0},
        {"head": b""}, {"head": bytes(15)}, {"head": bytes(24)},
    ],
    ids=str,
)  # fmt: skip
def test_many_that_are_not_as_many(changed: dict[str, Any]) -> None:
    """A number of ids or of rows that is not what the frame says, and tensors that lie elsewhere, are refused."""
    frame = one(write_many([5, 6], [np.zeros((2, 4), "<f4")], **changed))
    with pytest.raises(FrameError):
        frames.read_request(frame, Memory(bytes(64)))


def test_strings_do_not_go_together() -> None:
    """Their sizes differ; what says otherwise is refused."""
    described = frames.describe(0, np.dtype(object), (1,), 4)
    writer = Writer()
    inline = [frames.write_ids([5, 6]), bytes(8)]
    writer.write(frames.RESPONSE, 2, frames.MANY, frames.response_meta(described, b""), 1, inline, 24)
    with pytest.raises(FrameError):
        frames.read_response(one(writer.take()), NOTHING)


def test_numbers_are_views() -> None:
    """Of the frame's bytes, or of shared memory: nothing is copied that need not be."""
    content = np.arange(4, dtype="<f4")
    memory = Memory(content.tobytes())
    writer = Writer()
    described = frames.describe(0, content.dtype, (4,), 16, 0) + frames.describe(1, content.dtype, (4,), 16)
    writer.write(frames.RESPONSE, 1, 0, frames.response_meta(described, b""), 2, [content.tobytes()], 16)
    data = writer.take()
    ((_, placed), (_, inline)), _ = frames.read_response(one(data), memory)
    assert np.shares_memory(placed, np.frombuffer(memory.content, np.uint8))
    assert np.shares_memory(inline, np.frombuffer(data, np.uint8))


def test_a_bool_is_true_or_false() -> None:
    """A byte that is neither, which only shared memory may hold, is true."""
    tensor = Tensor(code=0, shape=(4,), inline=b"\0\1\2\xff", nbytes=4)
    ((_, got),), _ = frames.read_response(response_of(tensor), NOTHING)
    assert got.view(np.uint8).tolist() == [0, 1, 1, 1]


@given(st.lists(st.lists(st.binary(max_size=9), max_size=9), max_size=4), st.binary(max_size=30))
def test_strings_round_trip(columns: list[list[bytes]], more: bytes) -> None:
    """Of any length and number, beside each other."""
    arrays = []
    for strings in columns:
        array = np.empty(len(strings), object)
        array[:] = strings
        arrays.append(array)
    writer = Writer()
    write_request(writer, arrays, more)
    *_, got, said = frames.read_request(one(writer.take()), NOTHING)
    assert said == more
    assert [array.tolist() for _, array in got] == columns


def test_errors_round_trip() -> None:
    """Each is of the class that it was, with its text, and, where it says so, when to try again."""
    for kind in frames.ERRORS[1:]:
        error = kind("what was wrong: \u00e9", 1.5) if issubclass(kind, QueueFull) else kind("what was wrong: \u00e9")
        writer = Writer()
        flags, meta = frames.error_meta(error)
        writer.write(frames.ERROR, 1, flags, meta)
        got = frames.read_error(one(writer.take()))
        assert (type(got), str(got)) == (kind, "what was wrong: \u00e9")
        assert getattr(got, "retry_after", 1.5) == 1.5
        assert not hasattr(got, "triton_error")
    assert {QueueFull, CannotMeetDeadline, DeadlineExceeded, NotReady, ModelError} <= set(frames.ERRORS)


@pytest.mark.parametrize("error", [KeyError("/secret"), RuntimeError("/secret"), OSError(2, "/secret")])
def test_what_is_nobodys_business_is_not_said(error: Exception) -> None:
    """An error that no client may see the text of is a RuntimeError that says where the text is."""
    writer = Writer()
    flags, meta = frames.error_meta(error)
    writer.write(frames.ERROR, 1, flags, meta)
    got = frames.read_error(one(writer.take()))
    assert (type(got), str(got)) == (RuntimeError, "the engine's log says more")


def test_an_error_of_a_python_models_own_stays_one() -> None:
    """Statistics and status depend on it."""
    error = ModelError("mine")
    vars(error)["triton_error"] = object()
    writer = Writer()
    flags, meta = frames.error_meta(error)
    writer.write(frames.ERROR, 1, flags, meta)
    assert hasattr(frames.read_error(one(writer.take())), "triton_error")


def test_an_error_that_no_utf8_can_say() -> None:
    """Half a surrogate pair in its text does not keep the error from being sent."""
    writer = Writer()
    flags, meta = frames.error_meta(ModelError("half \ud800"))
    writer.write(frames.ERROR, 1, flags, meta)
    assert str(frames.read_error(one(writer.take()))) == "half ?"


def test_offsets_round_trip() -> None:
    """Any number of them."""
    for offsets in ([], [0], [2**64 - 1, 64, 0]):
        writer = Writer()
        writer.write(frames.FREE, meta=frames.offsets_meta(offsets))
        assert frames.read_offsets(one(writer.take())) == offsets


def test_sequence_numbers_begin_again() -> None:
    """After as many frames as 32 bits can count."""
    writer, reader = Writer(), Reader()
    vars(writer)["_sequence"] = vars(reader)["_sequence"] = 2**32 - 1
    for number in (1, 2, 3):
        writer.write(frames.SEEN, number)
    assert [frame[3] for frame in reader.feed(writer.take())] == [1, 2, 3]


# In pieces.


def test_a_stream_in_two_pieces() -> None:
    """Wherever it is cut, the same frames come out, none of them before it is whole."""
    for at in range(len(STREAM) + 1):
        reader = Reader()
        first, second = reader.feed(STREAM[:at]), reader.feed(STREAM[at:])
        assert [essence(frame) for frame in [*first, *second]] == SAID
        assert sum(frame[7] - frame[5] + frames.HEADER for frame in first) <= at


def test_a_stream_in_three_pieces() -> None:
    """Every pair of cuts through the first frames."""
    data = STREAM[: len(STREAM) // 2]
    expected = [essence(frame) for frame in Reader().feed(data)]
    for first, second in itertools.combinations_with_replacement(range(len(data) + 1), 2):
        reader = Reader()
        got = [*reader.feed(data[:first]), *reader.feed(data[first:second]), *reader.feed(data[second:])]
        assert [essence(frame) for frame in got] == expected


def test_a_stream_byte_by_byte() -> None:
    """And with nothing in between."""
    reader, got = Reader(), []
    for at in range(len(STREAM)):
        got += reader.feed(STREAM[at : at + 1])
        got += reader.feed(b"")
    assert [essence(frame) for frame in got] == SAID


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_in_any_pieces(cuts: list[int]) -> None:
    """The same."""
    reader, got = Reader(), []
    for start, stop in itertools.pairwise([0, *sorted(cuts), len(STREAM)]):
        got += reader.feed(STREAM[start:stop])
    assert [essence(frame) for frame in got] == SAID


# Damaged.


def survivors(data: bytes) -> list[tuple[int, int, int, int, bytes, bytes]]:
    """What is read of a stream, byte by byte, until it is found out."""
    reader, got = Reader(), []
    try:
        for at in range(len(data)):
            got += reader.feed(data[at : at + 1])
    except FrameError:
        return [essence(frame) for frame in got]
    pytest.fail("the damage was not noticed")


def summed() -> list[int]:
    """Of each byte in a header or a meta part: where it is."""
    start = 0
    places: list[int] = []
    for *_, meta, inline in SAID:
        places += range(start, start + frames.HEADER + len(meta))
        start += frames.HEADER + len(meta) + len(inline)
    return places


def test_every_byte_may_be_damaged() -> None:
    """In each bit of every header and every meta part: nothing but what came before is read, and no more awaited."""
    for place in summed():
        for bit in range(8):
            data = bytearray(STREAM)
            data[place] ^= 1 << bit
            got = survivors(bytes(data))
            assert got == SAID[: len(got)]
            whole = Reader()
            with pytest.raises(FrameError):
                whole.feed(bytes(data))


def test_a_damaged_size_is_not_waited_for() -> None:
    """With the header and the meta part it is noticed, however many bytes it promises."""
    writer = Writer()
    writer.write(frames.HELLO, meta=b"{}")
    data = bytearray(writer.take())
    struct.pack_into("<I", data, 4, frames.MAX_FRAME)
    with pytest.raises(FrameError, match="checksum"):
        Reader().feed(bytes(data))


def pieces() -> list[bytes]:
    """The stream's frames."""
    start, found = 0, []
    for *_, meta, inline in SAID:
        stop = start + frames.HEADER + len(meta) + len(inline)
        found.append(STREAM[start:stop])
        start = stop
    return found


def test_frames_may_be_doubled_left_out_or_reordered() -> None:
    """Any frame twice, not at all, or before its predecessor: nothing of it is read, and nothing after it."""
    parts = pieces()
    for place in range(len(parts)):
        for spoilt, right in (
            ([*parts[: place + 1], *parts[place:]], place + 1),
            ([*parts[:place], *parts[place + 1 :]], place),
            ([*parts[:place], *reversed(parts[place : place + 2]), *parts[place + 2 :]], place),
        ):
            if spoilt != parts[: len(spoilt)]:
                assert survivors(b"".join(spoilt)) == SAID[:right]


def test_a_frame_of_another_connection() -> None:
    """Is not the one that was next."""
    reader = Reader()
    reader.feed(pieces()[0])
    with pytest.raises(FrameError, match="frame 0 came where 1 was next"):
        reader.feed(pieces()[0])


def test_frames_that_are_too_large() -> None:
    """A size above what is taken is refused with the header, and so is one below what the frame itself needs."""
    writer = Writer()
    writer.write(frames.CALL, meta=b"{}", inline=[bytes(100)], nbytes=100)
    data = writer.take()
    with pytest.raises(FrameError, match="a frame of 130 bytes, 2 of them meta; at most 129 are taken"):
        Reader(129).feed(data[: frames.HEADER])
    assert len(Reader(130).feed(data)) == 1
    for size, meta in ((0, 0), (frames.HEADER - 1, 0), (frames.HEADER + 1, 2), (2**32 - 1, 0), (99, 2**32 - 1)):
        spoilt = bytearray(data)
        struct.pack_into("<I", spoilt, 4, size)
        struct.pack_into("<I", spoilt, 16, meta)
        with pytest.raises(FrameError, match="at most"):
            Reader().feed(bytes(spoilt))


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_any_bytes(chunks: list[bytes]) -> None:
    """Frames, or FrameError."""
    reader = Reader()
    try:
        for chunk in chunks:
            reader.feed(chunk)
    except FrameError:
        pass


# Frames that are whole, and not true.

LARGE = 2**62

UNTRUE: dict[str, Callable[[], Frame]] = {
    "beyond the frame": lambda: response_of(Tensor(shape=(2,), nbytes=8)),
    "beyond the frame by far": lambda: response_of(Tensor(shape=(LARGE,), nbytes=2**64 - 4)),
    "beyond the arena": lambda: response_of(Tensor(in_arena=True, offset=61)),
    "beyond the arena by far": lambda: response_of(Tensor(in_arena=True, offset=2**64 - 1, nbytes=2**64 - 1)),
    "larger than the arena": lambda: response_of(Tensor(in_arena=True, shape=(LARGE // 4,), nbytes=LARGE)),
    "more bytes than elements": lambda: response_of(Tensor(shape=(1,), nbytes=8, inline=bytes(8))),
    "fewer bytes than elements": lambda: response_of(Tensor(shape=(2,), nbytes=4)),
    "more elements than there are": lambda: response_of(Tensor(shape=(LARGE,) * 60, nbytes=4)),
    "a dimension below 0": lambda: response_of(Tensor(shape=(-1,), nbytes=4)),
    "two dimensions below 0": lambda: response_of(Tensor(shape=(-1, -1), nbytes=4)),
    "a dimension below 0 of nothing": lambda: response_of(Tensor(shape=(0, -1), nbytes=0, inline=b"")),
    "nothing, in dimensions that no array can have": lambda: response_of(
        Tensor(shape=(0, LARGE, LARGE), nbytes=0, inline=b"")
    ),
    "65 dimensions": lambda: response_of(Tensor(shape=(1,) * 65)),
    "127 dimensions": lambda: response_of(Tensor(shape=(1,) * 127)),
    "more dimensions than follow": lambda: response_of(Tensor(dimensions=64)),
    "a datatype that there is not": lambda: response_of(Tensor(code=len(DATATYPES))),
    "a datatype that there will never be": lambda: response_of(Tensor(code=255)),
    "more tensors than described": lambda: response_of(Tensor(), count=2),
    "fewer tensors than described": lambda: response_of(Tensor(), Tensor(), count=1),
    "many tensors, none described": lambda: response_of(count=65535),
    "more in it than its tensors": lambda: response_of(Tensor(), beyond=b"x"),
    "strings without their lengths": lambda: response_of(Tensor(code=12, shape=(2,), nbytes=4)),
    "strings beyond counting": lambda: response_of(Tensor(code=12, shape=(LARGE,), nbytes=4)),
    "strings longer than their tensor": lambda: response_of(
        Tensor(code=12, nbytes=5, inline=struct.pack("<I", 2) + b"x")
    ),
    "strings shorter than their tensor": lambda: response_of(
        Tensor(code=12, nbytes=6, inline=struct.pack("<I", 1) + b"xy")
    ),
    "no strings, and bytes": lambda: response_of(Tensor(code=12, shape=(0,), nbytes=4)),
    "strings whose lengths together are more than 32 bits": lambda: response_of(
        Tensor(code=12, shape=(2,), nbytes=9, inline=struct.pack("<II", 2**32 - 1, 2) + b"x")
    ),
}  # fmt: skip


def test_the_code_of_strings() -> None:
    """Which the frames above rely on."""
    assert list(DATATYPES)[12] == "BYTES"


@pytest.mark.parametrize("what", UNTRUE)
def test_what_is_untrue_is_refused(what: str) -> None:
    """With a FrameError and nothing else, and without memory for what it claims."""
    frame = UNTRUE[what]()
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            frames.read_response(frame, Memory(bytes(64)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def made(kind: int, meta: bytes, flags: int = 0) -> Frame:
    writer = Writer()
    writer.write(kind, 1, flags, meta)
    return one(writer.take())


@pytest.mark.parametrize(
    ("kind", "whole", "read"),
    [
        (frames.INFER, frames.request_meta(1, 1, 0, 0, 0, b"", b"{}"), lambda f: frames.read_request(f, NOTHING)),
        (frames.RESPONSE, frames.response_meta(b"", b"{}"), lambda f: frames.read_response(f, NOTHING)),
        (frames.FREE, frames.offsets_meta([64]), frames.read_offsets),
    ],
)
def test_meta_parts_that_are_cut(kind: int, whole: bytes, read: Callable[[Frame], object]) -> None:
    """Or longer than they say: refused, at every length but theirs."""
    read(made(kind, whole))
    for length in range(1, len(whole)):
        with pytest.raises(FrameError):
            read(made(kind, whole[:length]))
    with pytest.raises(FrameError):
        read(made(kind, whole + b"x"))


def test_errors_that_are_cut() -> None:
    """Without their beginning, or with a code that there is not, they are refused; what is no UTF-8 is shown so."""
    _, meta = frames.error_meta(NotReady("x"))
    for length in range(9):
        with pytest.raises(FrameError, match="without its beginning"):
            frames.read_error(made(frames.ERROR, meta[:length]))
    with pytest.raises(FrameError, match=f"error code {len(frames.ERRORS)} is not known"):
        frames.read_error(made(frames.ERROR, bytes([len(frames.ERRORS)]) + meta[1:]))
    assert str(frames.read_error(made(frames.ERROR, meta[:9] + b"\xff"))) == "\ufffd"


_U64 = st.integers(0, 2**64 - 1) | st.integers(0, 80)


@settings(max_examples=500)
@given(
    st.lists(
        st.builds(
            Tensor,
            index=st.integers(0, 65535),
            code=st.integers(0, len(DATATYPES)),
            shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4), max_size=70).map(tuple),
            nbytes=_U64,
            offset=_U64,
            in_arena=st.booleans(),
            inline=st.binary(max_size=20),
            dimensions=st.integers(-1, 127),
        ),
        max_size=3,
    ),
    st.binary(max_size=4),
)
def test_any_descriptors(tensors: list[Tensor], more: bytes) -> None:
    """Arrays that lie within the frame and the shared memory, or FrameError."""
    frame = response_of(*tensors, more=more)
    try:
        arrays, said = frames.read_response(frame, Memory(bytes(range(64))))
    except FrameError:
        return
    assert said == more
    for (index, array), tensor in zip(arrays, tensors, strict=True):
        assert (index, array.shape) == (tensor.index, tensor.shape)
        assert array.dtype == list(DATATYPES.values())[tensor.code]
