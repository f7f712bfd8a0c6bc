"""Frames: what a worker and the engine say to each other over a stream socket. Pure.

    checksum  u32   CRC-32 of the rest of the header and of the meta part
    size      u32   bytes of the whole frame
    sequence  u32   one more than that of the frame before it, in this direction of this connection
    kind      u8    one of the constants below
    flags     u8    bits whose meaning is the kind's
    tensors   u16   descriptors at the end of what the kind has in its meta part
    meta      u32   bytes of the meta part: what the kind says, and a descriptor for each tensor
    id        u64   the request that it is about; 0 if none
    ...             the meta part, then the inline tensors, one after the other

All numbers are little-endian. A tensor lies in the frame, or in the shared memory of whoever sent it (`arena.py`). A
frame that is cut, damaged in its header or meta part, doubled, out of order, too large, or that does not say what its
length promises is a FrameError: whoever meets one closes the connection, since nothing after it can be trusted. The
elements of tensors are not summed: sockets of one machine do not damage bytes, and it would cost more than the rest.
"""

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from batching.errors import CannotMeetDeadline, DeadlineExceeded, OutOfMemory, QueueFull

from ..errors import (
    Cancelled,
    ConfigError,
    DeviceLost,
    InvalidInput,
    LoadFailed,
    ModelError,
    NotFound,
    NotReady,
    TooLarge,
    TooSlow,
    Unimplemented,
)
from ..types import DATATYPES, Array

VERSION = 1  # of all this; both sides must have the same

# From a worker to the engine.
HELLO = 1  # JSON; with it comes the descriptor of the worker's arena
INFER = 2
STREAM = 3
CANCEL = 4
CALL = 5  # JSON and bytes: any other method of the engine
SEEN = 6  # the catalogue of which the id is the number was read
FREE = 7  # offsets of responses that are no longer looked at
REFUSED = 8  # the worker refused as many requests as the flags say (1 to 255): the queue of the copy, the id, was full
# From the engine to a worker.
WELCOME = 16  # JSON; with it comes the descriptor of the engine's arena for this worker
RESPONSE = 17
ERROR = 18
END = 19  # a stream has no more responses
STALE = 20  # the copy of the model that INFER or STREAM named is not served any more
REPLY = 21  # to CALL: JSON
CATALOGUE = 22  # JSON: what is served; the id is its number
BEAT = 23  # the flags say how the engine is
DRAIN = 24  # the engine is going to stop: send new requests to its successor

# Flags.
ALONE = 1  # INFER, STREAM: never in a batch with others
MANY = 2  # INFER, RESPONSE: for several that look alike. The id is their number; the inline part begins with their ids
TRITON_ERROR = 1  # ERROR: a Python model's own
FULL = 2  # ERROR: at the moment the queue would refuse any request
LIVE, READY = 1, 2  # BEAT

MAX_FRAME = 256 << 20  # bytes
MAX_DIMENSIONS = 64
MOST = 256  # in a frame for many
COPIED = 4096  # bytes: copying as many takes less time than making a view

_CHECKSUM = struct.Struct("<I")
_REST = struct.Struct("<IIBBHIQ")  # what follows the checksum
_WHOLE = struct.Struct("<IIIBBHIQ")
HEADER = _WHOLE.size

# Request: number of the model's copy, rows, deadline, timeout, priority, bytes of JSON at the end of the meta part.
_REQUEST = struct.Struct("<IIddQI")
# Response: bytes of JSON at the end of the meta part.
_RESPONSE = struct.Struct("<I")
# Error: code, seconds after which to try again. The text follows.
_ERROR = struct.Struct("<Bd")
# Tensor: its index among the model's, its datatype's code, its number of dimensions and IN_ARENA, bytes, offset. The
# sizes of its dimensions follow.
_TENSOR = struct.Struct("<HBBQQ")
_OFFSET = struct.Struct("<Q")
_SIZES = [struct.Struct(f"<{dimensions}q") for dimensions in range(MAX_DIMENSIONS + 1)]
_DESCRIPTORS = [struct.Struct(f"<HBBQQ{dimensions}q") for dimensions in range(MAX_DIMENSIONS + 1)]
IN_ARENA = 0x80

_DTYPES = list(DATATYPES.values())
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_OBJECT = np.dtype(object)
_BOOL = np.dtype("?")
TOGETHER = frozenset(_CODES) - {_OBJECT}  # of tensors in a frame for many

# An error's code is its index. What is not in the table is INTERNAL: the engine's log has it, the client does not.
ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    InvalidInput,
    NotFound,
    TooLarge,
    Unimplemented,
    LoadFailed,
    Cancelled,
    TooSlow,
    ModelError,
    NotReady,
    DeviceLost,
    ConfigError,
    QueueFull,
    CannotMeetDeadline,
    DeadlineExceeded,
    OutOfMemory,
)
INTERNAL = 0
_ERROR_CODES = {error: code for code, error in enumerate(ERRORS)}

# kind, flags, tensors, id, the bytes that it lies in, and where in them its meta part and its inline tensors begin,
# and where it ends
Frame = tuple[int, int, int, int, bytes, int, int, int]


class FrameError(Exception):
    """What came is no frame, or not the one that was next."""


class Memory(Protocol):
    """Shared memory; see `arena.Arena`."""

    @property
    def size(self) -> int: ...

    def view(self, offset: int, nbytes: int) -> "memoryview | Array": ...


class Writer:
    """The frames of one direction of one connection, until they are sent together."""

    def __init__(self) -> None:
        self._sequence = 0
        self._parts: list[bytes | memoryview] = []
        self.nbytes = 0

    def write(
        self,
        kind: int,
        id: int = 0,
        flags: int = 0,
        meta: bytes = b"",
        tensors: int = 0,
        inline: Sequence[bytes | memoryview] = (),
        nbytes: int = 0,
    ) -> None:
        """Add a frame; `nbytes` is what `inline` has together."""
        size = HEADER + len(meta) + nbytes
        rest = _REST.pack(size, self._sequence, kind, flags, tensors, len(meta), id) + meta
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._parts += (_CHECKSUM.pack(crc32(rest)), rest, *inline)
        self.nbytes += size

    def take(self) -> bytes:
        """Everything that was written since it was last taken."""
        parts, self._parts, self.nbytes = self._parts, [], 0
        return b"".join(parts)


class Reader:
    """Bytes -> frames, for one direction of one connection."""

    def __init__(self, most: int = MAX_FRAME) -> None:
        """`most` bytes are taken for a frame."""
        self._most = most
        self._sequence = 0
        self._parts: list[bytes] = []  # of a frame that has not come whole
        self._have = 0
        self._need = HEADER

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are whole with `data`. What is left over is kept for the next time.

        Raises:
            FrameError: nothing that comes after it can be trusted.
        """
        if self._have:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._parts)
            self._parts.clear()
        frames: list[Frame] = []
        start, end = 0, len(data)
        while end - start >= HEADER:
            checksum, size, sequence, kind, flags, tensors, meta, about = _WHOLE.unpack_from(data, start)
            if not HEADER + meta <= size <= self._most:
                raise FrameError(f"a frame of {size} bytes, {meta} of them meta; at most {self._most} are taken")
            stop, inline = start + size, start + HEADER + meta
            if inline > end:  # what is summed comes first: no more is waited for because a damaged size says so
                self._need = HEADER + meta
                break
            if crc32(data[start + _CHECKSUM.size : inline]) != checksum:
                raise FrameError("a frame's checksum is wrong")
            if sequence != self._sequence:
                raise FrameError(f"frame {sequence} came where {self._sequence} was next")
            if stop > end:
                self._need = size
                break
            self._sequence = (sequence + 1) & 0xFFFFFFFF
            frames.append((kind, flags, tensors, about, data, start + HEADER, inline, stop))
            start = stop
        else:
            self._need = HEADER
        self._have = end - start
        if self._have:
            self._parts.append(data[start:] if start else data)
        return frames


def request_meta(
    number: int, rows: int, deadline: float, timeout: float, priority: int, descriptors: bytes, more: bytes
) -> bytes:
    """The meta part of INFER and STREAM; `more` is JSON, b"" for none."""
    return _REQUEST.pack(number, rows, deadline, timeout, priority, len(more)) + descriptors + more


def read_request(frame: Frame, memory: Memory) -> tuple[int, int, float, float, int, list[tuple[int, Array]], bytes]:
    """Number, rows, deadline, timeout, priority, (index, array) of each tensor, JSON.

    The arrays are views of the frame or of `memory`, but for those of BYTES and BOOL. Those of a frame for many have
    one dimension more, the first: by request, as in `read_ids`.

    Raises:
        FrameError.
    """
    meta, inline = frame[5], frame[6]
    if inline - meta < _REQUEST.size:
        raise FrameError("a request without its beginning")
    number, rows, deadline, timeout, priority, more = _REQUEST.unpack_from(frame[4], meta)
    arrays = _read_tensors(frame, meta + _REQUEST.size, inline - more, memory)
    return number, rows, deadline, timeout, priority, arrays, frame[4][inline - more : inline] if more else b""


def read_ids(frame: Frame) -> tuple[int, ...]:
    """Whom a frame is about; of one for many that `read_request` or `read_response` has read."""
    return _ids(frame[3]).unpack_from(frame[4], frame[6]) if frame[1] & MANY else (frame[3],)


def write_ids(ids: Sequence[int]) -> bytes:
    """The beginning of the inline part of a frame for many."""
    return _ids(len(ids)).pack(*ids)


@lru_cache(maxsize=MOST + 1)
def _ids(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


def response_meta(descriptors: bytes, more: bytes) -> bytes:
    """The meta part of RESPONSE; `more` is JSON, b"" for none."""
    return _RESPONSE.pack(len(more)) + descriptors + more


def read_response(frame: Frame, memory: Memory) -> tuple[list[tuple[int, Array]], bytes]:
    """(index, array) of each tensor, and JSON; as `read_request`.

    Raises:
        FrameError.
    """
    meta, inline = frame[5], frame[6]
    if inline - meta < _RESPONSE.size:
        raise FrameError("a response without its beginning")
    (more,) = _RESPONSE.unpack_from(frame[4], meta)
    arrays = _read_tensors(frame, meta + _RESPONSE.size, inline - more, memory)
    return arrays, frame[4][inline - more : inline] if more else b""


def error_meta(error: Exception) -> tuple[int, bytes]:
    """The flags and the meta part of ERROR. What the table does not have says nothing of itself."""
    code = _ERROR_CODES.get(type(error), INTERNAL)
    text = (str(error) if code != INTERNAL else "the engine's log says more").encode(errors="replace")
    after = error.retry_after if isinstance(error, QueueFull) else 0.0
    return TRITON_ERROR if hasattr(error, "triton_error") else 0, _ERROR.pack(code, after) + text


def read_error(frame: Frame) -> Exception:
    """Raises FrameError."""
    _kind, flags, _tensors, _id, data, meta, inline, _end = frame
    if inline - meta < _ERROR.size:
        raise FrameError("an error without its beginning")
    code, after = _ERROR.unpack_from(data, meta)
    if code >= len(ERRORS):
        raise FrameError(f"error code {code} is not known")
    text = data[meta + _ERROR.size : inline].decode(errors="replace")
    kind = ERRORS[code]
    error: Exception = kind(text, after) if issubclass(kind, QueueFull) else kind(text)
    if flags & TRITON_ERROR:
        vars(error)["triton_error"] = True
    return error


def offsets_meta(offsets: Sequence[int]) -> bytes:
    """The meta part of FREE."""
    return struct.pack(f"<{len(offsets)}Q", *offsets)


def read_offsets(frame: Frame) -> list[int]:
    """Raises FrameError."""
    _kind, _flags, _tensors, _id, data, meta, inline, _end = frame
    if (inline - meta) % _OFFSET.size:
        raise FrameError("offsets that are not whole")
    return [offset for (offset,) in _OFFSET.iter_unpack(data[meta:inline])]


@lru_cache(maxsize=1024)
def describe(index: int, dtype: np.dtype[Any], shape: tuple[int, ...], nbytes: int, offset: int = -1) -> bytes:
    """A tensor's descriptor; it lies at `offset` of the sender's shared memory, or, at -1, in the frame."""
    place = len(shape) if offset < 0 else len(shape) | IN_ARENA
    return _DESCRIPTORS[len(shape)].pack(index, _CODES[dtype], place, nbytes, max(0, offset), *shape)


def elements(array: Array) -> bytes | memoryview:
    """The elements of an array as they travel; those of BYTES are preceded by the lengths of all."""
    if array.dtype != _OBJECT:
        return array.tobytes() if array.nbytes <= COPIED else array.ravel().view(np.uint8).data
    items = array.reshape(-1).tolist()
    lengths = np.fromiter(map(len, items), "<u4", len(items)).tobytes()
    return b"".join([lengths, *items])


def _read_tensors(frame: Frame, start: int, stop: int, memory: Memory) -> list[tuple[int, Array]]:
    """The tensors of a frame whose descriptors lie from `start` to `stop`."""
    _kind, flags, tensors, count, data, _meta, position, end = frame
    if stop < start:
        raise FrameError("a frame with more JSON than meta part")
    plan, inline, shared = _plan(data[start:stop], tensors)
    many: tuple[int, ...] = ()
    if flags & MANY:
        if not 0 < count <= MOST or shared or any(dtype == _OBJECT for _, dtype, *_ in plan):
            raise FrameError(f"a frame for {count} whose tensors do not go together")
        many = (count,)
        position += _OFFSET.size * count
        inline *= count
    if position + inline != end:
        raise FrameError("a frame of another size than its tensors'")
    if shared > memory.size:
        raise FrameError("a tensor beyond the end of shared memory")
    arrays: list[tuple[int, Array]] = []
    for index, dtype, shape, nbytes, offset in plan:
        source: bytes | memoryview | Array = data
        if offset >= 0:
            source, begin = memory.view(offset, nbytes), 0
        else:
            begin = position
            shape = many + shape
            position += nbytes * count if many else nbytes
        array: Array
        if dtype == _OBJECT:
            array = _strings(source, begin, nbytes, math.prod(shape)).reshape(shape)
        elif dtype == _BOOL:  # any byte but 0 and 1 would be neither true nor false
            array = np.ndarray(shape, np.uint8, source, begin) != 0
        else:
            array = np.ndarray(shape, dtype, source, begin)
        arrays.append((index, array))
    return arrays


@lru_cache(maxsize=1024)
def _plan(
    descriptors: bytes, tensors: int
) -> tuple[list[tuple[int, np.dtype[Any], tuple[int, ...], int, int]], int, int]:
    """What descriptors say: index, dtype, shape, bytes and offset of each tensor, the last -1 for those in the frame.

    And the bytes that the frame must have for those, and the shared memory for the others. Most requests look alike.
    """
    plan = []
    position = inline = shared = 0
    for _ in range(tensors):
        if len(descriptors) - position < _TENSOR.size:
            raise FrameError("a tensor without its description")
        index, code, place, nbytes, offset = _TENSOR.unpack_from(descriptors, position)
        position += _TENSOR.size
        dimensions = place & ~IN_ARENA
        if code >= len(_DTYPES) or dimensions > MAX_DIMENSIONS or len(descriptors) - position < 8 * dimensions:
            raise FrameError("a tensor that cannot be")
        shape = _SIZES[dimensions].unpack_from(descriptors, position)
        position += 8 * dimensions
        if place & IN_ARENA:
            shared = max(shared, offset + nbytes)
        else:
            offset = -1
            inline += nbytes
        _check_shape(_DTYPES[code], shape, nbytes)
        plan.append((index, _DTYPES[code], shape, nbytes, offset))
    if position != len(descriptors):
        raise FrameError("more descriptions than tensors")
    return plan, inline, shared


def _check_shape(dtype: np.dtype[Any], shape: tuple[int, ...], nbytes: int) -> None:
    """Raises FrameError if no array of that shape fills as many bytes."""
    count = math.prod(shape)
    if min(shape, default=0) < 0:
        raise FrameError("a tensor with a dimension below 0")
    if 4 * count > nbytes if dtype == _OBJECT else count * dtype.itemsize != nbytes:
        raise FrameError(f"a tensor of another size than its shape's, {nbytes} bytes")
    try:
        np.broadcast_to(np.empty((), dtype), shape)
    except ValueError:  # 0 elements, and others that no array can have
        raise FrameError("a tensor with a shape that cannot be") from None


def _strings(data: "bytes | memoryview | Array", start: int, nbytes: int, count: int) -> Array:
    first = 4 * count
    ends = first + np.frombuffer(data, "<u4", count, start).cumsum(dtype=np.int64)
    if (int(ends[-1]) if count else 0) != nbytes:
        raise FrameError("strings that do not fill their tensor")
    text = bytes(data[start : start + nbytes])
    array = np.empty(count, object)
    begin = first
    for number, stop in enumerate(ends.tolist()):
        array[number] = text[begin:stop]
        begin = stop
    return array
