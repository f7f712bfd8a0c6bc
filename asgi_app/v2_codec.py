"""Open Inference Protocol: body and headers <-> InferRequest and InferResponse, JSON and binary. Pure.

A request is a JSON object, or that object followed by raw tensors; the header Inference-Header-Content-Length then says
where the object ends (PROTOCOL.md sections 1.9 and 2). Whatever bytes come in, the result is a request, or InvalidInput
that names the field. A size that was only claimed allocates nothing.

Stricter than Triton, on purpose: a number that its datatype cannot hold is refused where Triton wraps it around, and so
are NaN and Infinity in JSON, which has no such values (binary data carries them). In an answer they are written as the
literals NaN, Infinity and -Infinity, as Triton does, because its clients read them.
"""

import json
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import orjson

from engine.errors import InvalidInput
from engine.types import DATATYPES, Array, InferRequest, InferResponse

# numpy kind -> the JSON types its elements may have
ELEMENTS: dict[str, tuple[frozenset[type], str]] = {
    "b": (frozenset({bool}), "booleans"),
    "i": (frozenset({int}), "integers"),
    "u": (frozenset({int}), "non-negative integers"),
    "f": (frozenset({int, float}), "numbers"),
}

# What numpy can address. A product of more, or larger, sizes would also take long to compute, and longer to print.
MAX_DIMENSIONS = 64
MAX_SIZE = 2**63 - 1


@dataclass(slots=True)
class Decoded:
    """A request, and how its answer is to be written.

    Attributes:
        binary: output name -> whether it travels as binary, for the outputs that the request lists.
        binary_default: the same for all outputs, if it lists none.
    """

    request: InferRequest
    binary: dict[str, bool]
    binary_default: bool


def decode_request(
    model: str,
    version: str,
    body: bytes | bytearray,
    header_length: bytes | None = None,
) -> Decoded:
    """Decode an infer request.

    Args:
        header_length: value of Inference-Header-Content-Length; None if the body is JSON alone.

    Raises:
        InvalidInput.
    """
    binary, offset = None, 0
    if header_length is not None:
        binary, offset = memoryview(body), _header_length(header_length, len(body))
    try:
        head = orjson.loads(body if binary is None else binary[:offset])
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the request is not valid JSON: {error}") from None
    if type(head) is not dict:
        raise InvalidInput(f"the request must be a JSON object, got {_kind(head)}")
    entries = head.get("inputs")
    if type(entries) is not list:
        raise InvalidInput(f"inputs: must be an array of tensors, got {_kind(entries)}")
    inputs: dict[str, Array] = {}
    for index, entry in enumerate(entries):
        name = entry.get("name") if type(entry) is dict else None
        if type(name) is not str or name in inputs:
            raise _misnamed(f"inputs[{index}]", "input", entry)
        inputs[name], offset = _tensor(entry, name, binary, offset)
    if binary is not None and offset != len(binary):
        raise InvalidInput(
            f"unexpected additional input data for model '{model}': the body goes on for {len(binary) - offset} bytes "
            "after the last binary tensor"
        )
    outputs = _wanted(head["outputs"]) if head.get("outputs") is not None else {}
    request_id = head.get("id", "")
    if type(request_id) is not str:
        raise InvalidInput(f"id: must be a string, got {_kind(request_id)}")
    request = InferRequest(model, version, inputs, tuple(outputs) or None, request_id)
    parameters, default = head.get("parameters"), False
    if parameters is not None:
        default = _flag(parameters, "binary_data_output", "")
        request.priority = _count(parameters, "priority")
        request.timeout = _count(parameters, "timeout") / 1e6
    return Decoded(request, outputs, default)


def encode_response(response: InferResponse, decoded: Decoded) -> tuple[bytes, int]:
    """Encode an answer in the form that its request asked for.

    Returns:
        The body, and the length of its JSON part if raw tensors follow it, else 0.

    Raises:
        InvalidInput: an FP16 output was asked for as JSON, which the protocol has no form for.
    """
    outputs: list[dict[str, Any]] = []
    buffers: list[Array] = []
    for name, array in response.outputs.items():
        if decoded.binary and name not in decoded.binary:
            continue
        datatype = _DATATYPE[array.dtype]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": array.shape}
        if decoded.binary.get(name, decoded.binary_default):
            output["parameters"] = {"binary_data_size": array.nbytes}
            buffers.append(array)
        elif datatype == "FP16":
            raise InvalidInput(
                f"sending FP16 data via JSON is not supported. Please use the binary data format for output {name}"
            )
        else:
            output["data"] = array.reshape(-1)
        outputs.append(output)
    head: dict[str, Any] = {"model_name": response.model, "model_version": response.version, "outputs": outputs}
    if decoded.request.id:
        head = {"id": decoded.request.id, **head}
    text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in text:  # what orjson makes of NaN and infinities; or somebody's model is called null
        text = json.dumps(head, default=lambda value: value.tolist(), separators=(",", ":")).encode()
    if not any(array.nbytes for array in buffers):
        return text, 0
    return b"".join([text, *(array.data for array in buffers)]), len(text)


_DATATYPE = {dtype: datatype for datatype, dtype in DATATYPES.items()}


def _header_length(text: bytes, size: int) -> int:
    if not text.isdigit():
        raise InvalidInput(f"Inference-Header-Content-Length: must be a whole number, got {_text(text)!r}")
    if len(text) > 18 or not 0 < int(text) <= size:
        raise InvalidInput(
            f"Inference-Header-Content-Length: must be from 1 to {size}, the body's length, got {_text(text)[:40]}"
        )
    return int(text)


def _misnamed(where: str, what: str, entry: Any) -> InvalidInput:
    if type(entry) is not dict:
        return InvalidInput(f"{where}: must be an object, got {_kind(entry)}")
    if type(entry.get("name")) is not str:
        return InvalidInput(f"{where}.name: must be a string, got {_kind(entry.get('name'))}")
    return InvalidInput(f"{where}.name: {what} '{entry['name']}' already exists in request")


def _flag(parameters: Any, key: str, where: str) -> bool:
    if type(parameters) is not dict:
        raise InvalidInput(f"{where}parameters: must be an object, got {_kind(parameters)}")
    value = parameters.get(key, False)
    if type(value) is not bool:
        raise InvalidInput(f"{where}parameters.{key}: must be true or false, got {_kind(value)}")
    return value


def _count(parameters: dict[str, Any], key: str) -> int:
    value = parameters.get(key, 0)
    if type(value) is not int or value < 0:
        raise InvalidInput(f"parameters.{key}: must be a whole number from 0 to {2**64 - 1}, got {_brief(value)}")
    return value


def _wanted(entries: Any) -> dict[str, bool]:
    """Name of each output that is listed -> whether it travels as binary."""
    if type(entries) is not list:
        raise InvalidInput(f"outputs: must be an array of tensors, got {_kind(entries)}")
    outputs: dict[str, bool] = {}
    for index, entry in enumerate(entries):
        name = entry.get("name") if type(entry) is dict else None
        if type(name) is not str or name in outputs:
            raise _misnamed(f"outputs[{index}]", "output", entry)
        parameters = entry.get("parameters")
        outputs[name] = parameters is not None and _flag(parameters, "binary_data", f"output '{name}': ")
        for key in ("classification", "shared_memory_region"):
            if parameters and key in parameters:
                raise InvalidInput(f"output '{name}': parameters.{key} is not served yet")
    return outputs


def _tensor(entry: dict[str, Any], name: str, binary: memoryview | None, offset: int) -> tuple[Array, int]:
    """One input, and where the next binary one begins."""
    datatype = entry.get("datatype")
    dtype = DATATYPES.get(datatype) if type(datatype) is str else None
    if dtype is None:
        raise InvalidInput(f"input '{name}': datatype must be one of {', '.join(DATATYPES)}, got {_brief(datatype)}")
    shape = entry.get("shape")
    if type(shape) is not list or any(type(size) is not int or size < 0 for size in shape):
        raise InvalidInput(f"input '{name}': shape must be an array of non-negative integers, got {_brief(shape)}")
    if len(shape) > MAX_DIMENSIONS or any(size > MAX_SIZE for size in shape):
        raise InvalidInput(
            f"input '{name}': shape must have at most {MAX_DIMENSIONS} dimensions below 2**63, got {_brief(shape)}"
        )
    count = math.prod(shape)
    size = None
    parameters = entry.get("parameters")
    if parameters is not None:
        if type(parameters) is not dict:
            raise InvalidInput(f"input '{name}': parameters: must be an object, got {_kind(parameters)}")
        if "shared_memory_region" in parameters:
            raise InvalidInput(f"input '{name}': parameters.shared_memory_region is not served yet")
        size = parameters.get("binary_data_size")
    if ("data" in entry) == (size is not None):
        got = "both" if size is not None else "neither"
        raise InvalidInput(f"input '{name}': give either 'data' or 'parameters.binary_data_size', got {got}")
    if size is None:
        array = _from_json(entry["data"], str(datatype), dtype, count, f"input '{name}'")
    else:
        array = _from_binary(size, dtype, count, f"input '{name}'", binary, offset)
        offset += size
    try:
        return array.reshape(shape), offset
    except ValueError:  # one dimension is 0 and another beyond what numpy can address
        raise InvalidInput(f"input '{name}': shape {_brief(shape)} is too big") from None


def _from_binary(
    size: Any, dtype: np.dtype[Any], count: int, where: str, binary: memoryview | None, offset: int
) -> Array:
    if type(size) is not int or size < 0:
        raise InvalidInput(f"{where}: parameters.binary_data_size must be a number of bytes, got {_brief(size)}")
    if binary is None:
        raise InvalidInput(f"{where}: binary data needs the header Inference-Header-Content-Length")
    if size != count * dtype.itemsize:
        raise InvalidInput(
            f"{where}: parameters.binary_data_size is {size}, but its shape and datatype make {count * dtype.itemsize}"
        )
    if offset + size > len(binary):
        raise InvalidInput(
            f"{where}: unexpected size, expecting {offset + size - len(binary)} additional bytes in the body"
        )
    if dtype.kind == "b":  # any byte but 0 is true on the wire, in numpy it would be neither
        return np.frombuffer(binary, np.uint8, count, offset).astype(np.bool_)
    return np.frombuffer(binary, dtype, count, offset)


def _from_json(data: Any, datatype: str, dtype: np.dtype[Any], count: int, where: str) -> Array:
    if datatype == "FP16":
        raise InvalidInput(f"{where}: receiving FP16 data via JSON is not supported. Please use the binary data format")
    if not isinstance(data, list):
        raise InvalidInput(f"{where}: data must be an array, got {_kind(data)}")
    kinds = set(map(type, data))
    while kinds == {list}:  # nesting carries no meaning beyond the order of the elements
        data = list(chain.from_iterable(data))
        kinds = set(map(type, data))
    allowed, elements = ELEMENTS[dtype.kind]
    if not kinds <= allowed:
        wrong = ", ".join(sorted(_KINDS.get(kind, kind.__name__) for kind in kinds - allowed))
        raise InvalidInput(f"{where}: data must hold {elements} for {datatype}, got {wrong}")
    if len(data) != count:
        raise InvalidInput(f"{where}: data holds {len(data)} elements, its shape makes {count}")
    try:
        with np.errstate(over="raise"):
            return np.array(data, dtype)
    except (OverflowError, FloatingPointError):
        raise InvalidInput(f"{where}: data holds a number that does not fit {datatype}") from None


_KINDS = {
    dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer", float: "a float",
    type(None): "null",
}  # fmt: skip


def _kind(value: Any) -> str:
    return _KINDS[type(value)]


def _brief(value: Any) -> str:
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # nested deeper than orjson writes, though not deeper than it reads
        text = _kind(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(header: bytes) -> str:
    return header.decode("latin-1")
