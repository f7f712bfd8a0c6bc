"""The binary form of a tensor: what follows the JSON of a request, and what lies in shared memory. Pure.

The elements in row-major order, little-endian, nothing between them. An element of BYTES is its length, four bytes, and
then itself (PROTOCOL.md section 2.2).
"""

import struct
from itertools import chain
from typing import Any

import numpy as np

from engine.errors import InvalidInput
from engine.types import DATATYPES, Array, InferRequest

# How deep JSON may be nested, as in Triton.
MAX_DEPTH = 100  # of objects and arrays in one another
TOO_DEEP = f"JSON nesting depth exceeds maximum allowed limit ({MAX_DEPTH})"

# Datatype -> the struct module's code for an element, of those that JSON has a form for.
PACKED = {
    "BOOL": "?", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H", "UINT32": "I",
    "UINT64": "Q", "FP32": "f", "FP64": "d",
}  # fmt: skip

Buffer = bytes | bytearray | memoryview

_LENGTH = struct.Struct("<I")


def read_tensor(buffer: Buffer, datatype: str, count: int, name: str, request: InferRequest) -> Array:
    """Read the tensor that fills `buffer`.

    Args:
        count: elements that its shape promises.
        name, request: whose input it is, for the error's text.

    Returns:
        Shape (count,), of the datatype's dtype; a view of `buffer` where that is possible.

    Raises:
        InvalidInput: with Triton's text, if the buffer holds something else than `count` elements.
    """
    if datatype == "BYTES":
        return np.array(_elements(bytes(buffer), count, name, request), object)
    dtype = DATATYPES[datatype]
    if len(buffer) != count * dtype.itemsize:
        raise InvalidInput(
            f"{request_prefix(request)}input byte size mismatch for input '{name}' for model '{request.model}'. "
            f"Expected {count * dtype.itemsize}, got {len(buffer)}"
        )
    if dtype.kind == "b":  # any byte but 0 is true on the wire, in numpy it would be neither
        return np.frombuffer(buffer, np.uint8).astype(np.bool_)
    return np.frombuffer(buffer, dtype)


def write_tensor(array: Array) -> bytes | memoryview:
    """The binary form of a C-contiguous array of a dtype of DATATYPES; a view of it where that is possible."""
    if array.dtype != object:
        return array.reshape(-1).view(np.uint8).data
    elements = array.reshape(-1).tolist()
    return b"".join(chain.from_iterable(zip(map(_LENGTH.pack, map(len, elements)), elements, strict=True)))


def miscounted(got: int, count: int, name: str, request: InferRequest) -> InvalidInput:
    """What Triton says of an input of BYTES that has another number of elements than its shape."""
    of = f"for inference input '{name}' for model '{request.model}'"
    if got > count:
        return InvalidInput(
            f"{request_prefix(request)}unexpected number of string elements {count + 1} {of}, expecting {count}"
        )
    return InvalidInput(f"{request_prefix(request)}expected {count} string elements {of}, got {got}")


def request_prefix(request: InferRequest) -> str:
    """How Triton begins the text of an error that is about one request."""
    return f"[request id: {request.id or '<id_unknown>'}] "


def _elements(data: bytes, count: int, name: str, request: InferRequest) -> list[bytes]:
    """The elements of BYTES. What `count` only claims costs nothing: the walk ends where the data do."""
    elements: list[bytes] = []
    start = position = 0
    try:
        for _ in range(count):
            (size,) = _LENGTH.unpack_from(data, position)
            start = position + 4
            position = start + size
            elements.append(data[start:position])
    except struct.error:
        pass  # there is no length at `position`
    left = len(data) - position
    if left == 0 and len(elements) == count:
        return elements
    if left < 0 and len(elements) == count:
        raise InvalidInput(
            f"incomplete string data for inference input '{name}', expecting string of length {position - start} "
            f"but only {len(data) - start} bytes available"
        )
    if 0 < left < 4:
        raise InvalidInput(
            f"{request_prefix(request)}incomplete string length indicator for inference input '{name}' for model "
            f"'{request.model}', expecting 4 bytes but only {left} bytes available. "
            "Please make sure the string length indicator is in one buffer."
        )
    raise miscounted(count + 1 if left > 0 else len(elements), count, name, request)


def flatten(data: list[Any], levels: int) -> list[Any]:
    """The elements of nested lists, in order, in a time that grows with their number alone.

    Raises:
        InvalidInput: they are nested in each other more than `levels` deep.
    """
    while set(map(type, data)) == {list}:  # even nesting, the usual case: a level at a time
        levels -= 1
        if levels < 0:
            raise InvalidInput(TOO_DEEP)
        data = list(chain.from_iterable(data))
    elements: list[Any] = []
    nested = [iter(data)]
    while nested:
        for element in nested[-1]:
            if type(element) is list:
                if len(nested) > levels:
                    raise InvalidInput(TOO_DEEP)
                nested.append(iter(element))
                break
            elements.append(element)
        else:
            nested.pop()
    return elements
