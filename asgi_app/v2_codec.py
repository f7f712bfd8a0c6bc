"""Open Inference Protocol: body and headers <-> InferRequest and InferResponse, JSON and binary. Pure.

A request is a JSON object, or that object followed by raw tensors; the header Inference-Header-Content-Length then says
where the object ends (PROTOCOL.md sections 1.9 and 2). Tensors may also lie in shared memory (1.11). Whatever bytes
come in, the result is a request, or an error of engine/errors.py that names the field. A size that was only claimed
allocates nothing.

The texts are Triton's, because its users know them and search for them; what they leave out follows in brackets.
Stricter than Triton, on purpose: a number that its datatype cannot hold is refused where Triton wraps it around.
More lenient than JSON, because Triton's clients are: the literals NaN, Infinity and -Infinity are read and written.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import orjson

from engine.errors import NOT_DECOUPLED, InvalidInput, ModelError, Unimplemented
from engine.types import (
    DATATYPES,
    SEQUENCE_END,
    SEQUENCE_START,
    Array,
    Engine,
    InferRequest,
    InferResponse,
    ModelMetadata,
)

from . import templates
from .classification import classify
from .tensors import MAX_DEPTH, PACKED, TOO_DEEP, flatten, miscounted, read_tensor, request_prefix, write_tensor

# numpy kind -> the JSON types its elements may have, and what Triton says of others
ELEMENTS: dict[str, tuple[frozenset[type], str]] = {
    "b": (frozenset({bool}), "'data': attempt to access JSON non-boolean as boolean"),
    "i": (frozenset({int}), "'data': attempt to access JSON non-signed-integer as signed-integer"),
    "u": (frozenset({int}), "'data': attempt to access JSON non-unsigned-integer as unsigned-integer"),
    "f": (frozenset({int, float}), "'data': attempt to access JSON non-number as double"),
    "O": (frozenset({str}), "JSON bytes array: attempt to access JSON non-string as string"),
}
BINARY_ONLY = frozenset({"FP16", "BF16"})

# Parameters of a request that are the protocol's own: the JSON types each may have, and the word for them. All others
# are the model's.
RESERVED: dict[str, tuple[frozenset[type], str]] = {
    "sequence_id": (frozenset({int, str}), "string"),
    "sequence_start": (frozenset({bool}), "boolean"),
    "sequence_end": (frozenset({bool}), "boolean"),
    "priority": (frozenset({int}), "unsigned-integer"),
    "timeout": (frozenset({int}), "unsigned-integer"),
    "binary_data_output": (frozenset({bool}), "boolean"),
}
CUSTOM = frozenset({str, int, bool, float})

# Where an input's elements are: in itself, or where its parameters say.
PAYLOADS = ("data", "binary_data_size", "shared_memory_region")

# What numpy can address. A product of more, or larger, sizes would also take long to compute, and longer to print.
MAX_DIMENSIONS = 64
MAX_SIZE = 2**63 - 1

DATA_DEPTH = 4  # of an input's `data`: the request, its inputs, the input, the array
SHOWN = 200  # characters of what a client calls things that are given back to it


_NOTHING: Mapping[str, Any] = MappingProxyType({})


def _nothing() -> Mapping[str, Any]:
    return _NOTHING


@dataclass(slots=True)
class Decoded:
    """A request, and how its answer is to be written.

    Attributes:
        binary: output name -> whether it travels as binary, for the outputs that the request lists.
        binary_default: the same for all outputs, if it lists none.
        classes: output name -> how many of its best classes are wanted instead of its numbers.
        placed: output name -> the shared memory that it is written to.
    """

    request: InferRequest
    binary: Mapping[str, bool] = field(default_factory=_nothing)
    binary_default: bool = False
    classes: Mapping[str, int] = field(default_factory=_nothing)
    placed: Mapping[str, memoryview] = field(default_factory=_nothing)


def decode_request(
    engine: Engine,
    model: str,
    version: str,
    body: bytes | bytearray,
    header_length: bytes | None = None,
) -> Decoded:
    """Decode an infer request.

    Args:
        engine: asked for its shared memory by a request that refers to it, for its models by one without JSON.
        header_length: value of Inference-Header-Content-Length; None if the body is JSON alone. If it is 0, the body is
            the only tensor, and there is no JSON.

    Raises:
        InvalidInput.
        NotFound: the request refers to shared memory that is not registered; or, without JSON, to no model.
        NotReady: without JSON, the model cannot be asked.
    """
    binary: memoryview | None = None
    text, found = body, None
    if header_length is not None:
        length = _header_length(header_length, len(body))
        if not length:
            return _decode_raw(engine.metadata(model, version), model, version, body)
        found = templates.read_binary(body, length)
        text, binary = body[:length], memoryview(body)[length:]
    else:
        body = bytes(body)
        found = templates.read_json(body)
    if found is not None:
        template, inputs = found
        request = InferRequest(model, version, inputs, template.outputs, like=template)
        return Decoded(request, template.binary, template.binary_default, _NOTHING, _NOTHING)
    try:
        head = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        head = _load_literals(text, error)
    if type(head) is not dict:
        raise InvalidInput(f"the request must be a JSON object, got {_kind(head)}")
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH:  # else it cannot be too deep
        _check_depth(head)
    request_id = head.get("id", "")
    if type(request_id) is not str:
        raise _mistyped(head, "id", "string")
    entries = head.get("inputs")
    if type(entries) is not list:
        raise _mistyped(head, "inputs", "array")
    inputs = {}
    request = InferRequest(model, version, inputs, None, request_id)
    source = _Source(engine, request, binary)
    for index, entry in enumerate(entries):
        name = entry.get("name") if type(entry) is dict else None
        if type(name) is not str or name in inputs:
            raise _misnamed(f"inputs[{index}]", "input", entry, request)
        inputs[name] = _tensor(entry, name, source)
    if binary is not None and source.offset != len(binary):
        raise InvalidInput(f"unexpected additional input data for model '{model}'")
    decoded = Decoded(request)
    if head.get("outputs") is not None:
        _read_outputs(head, decoded, engine)
    if head.get("parameters") is not None:
        _read_parameters(head, decoded)
    if binary is not None:
        templates.remember_binary(bytes(text), head, request, decoded.binary, decoded.binary_default)
    else:
        templates.remember_json(bytes(body), head, request, decoded.binary, decoded.binary_default)
    return decoded


def encode_response(
    response: InferResponse, decoded: Decoded, metadata: ModelMetadata | None = None
) -> tuple[bytes, int]:
    """Encode an answer in the form that its request asked for; what belongs in shared memory is written there.

    Args:
        metadata: the model's; needed where `decoded.classes` names an output.

    Returns:
        The body, and the length of its JSON part if raw tensors follow it, else 0.

    Raises:
        InvalidInput: an output was asked for as JSON, or as classes, that has no such form.
        ModelError: an output is larger than the shared memory that it was to be written to.
    """
    if not (decoded.binary or decoded.binary_default or decoded.request.id or response.parameters):
        text = encode_numbers(response.model, response.version, response.outputs)
        if text is not None:
            return text, 0
    outputs: list[dict[str, Any]] = []
    buffers: list[bytes | memoryview] = []
    for name, array in response.outputs.items():
        if decoded.binary and name not in decoded.binary:
            continue
        datatype = _DATATYPE[array.dtype]
        if name in decoded.classes:
            array = _classify(array, datatype, name, decoded.classes[name], metadata)
            datatype = "BYTES"
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": array.shape}
        if name in decoded.placed:
            _place(name, write_tensor(array), decoded.placed[name])
        elif decoded.binary.get(name, decoded.binary_default):
            buffers.append(write_tensor(array))
            output["parameters"] = {"binary_data_size": len(buffers[-1])}
        elif datatype in BINARY_ONLY:
            raise InvalidInput(
                f"sending {datatype} data via JSON is not supported. Please use the binary data format for output "
                f"{name}"
            )
        elif datatype == "BYTES":
            output["data"] = _texts(array)
        else:
            output["data"] = array.reshape(-1)
        outputs.append(output)
    head: dict[str, Any] = {"model_name": response.model, "model_version": response.version, "outputs": outputs}
    if decoded.request.id:
        head = {"id": decoded.request.id, **head}
    if response.parameters:
        head["parameters"] = response.parameters
    try:
        text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # a text that is not UTF-8, a whole number of more than 64 bits
        text = _lenient(head)
    else:
        if b"null" in text:  # what orjson makes of NaN and infinities; or somebody's model is called null
            text = _lenient(head)
    if not any(map(len, buffers)):
        return text, 0
    return b"".join([text, *buffers]), len(text)


def encode_numbers(model: str, version: str, outputs: Mapping[str, Array]) -> bytes | None:
    """An answer with every output as JSON, and nothing besides.

    None if there is no output, or one that is not made of numbers that JSON has a form for.
    """
    pieces = []
    for name, array in outputs.items():
        shape = array.shape
        before = _before_numbers(name, array.dtype, shape)
        if before is None:
            return None
        if len(shape) == 2 and shape[0] == 1:  # most are one row
            numbers = orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        else:
            numbers = orjson.dumps(array.reshape(-1), option=orjson.OPT_SERIALIZE_NUMPY)
        if b"u" in numbers:  # null, which is what orjson makes of NaN and infinities; and true, of BOOL
            return None
        pieces.append(before + numbers)
    if not pieces:
        return None
    written = pieces[0] if len(pieces) == 1 else b"},".join(pieces)
    return _before_outputs(model, version) + written + b"}]}"


@lru_cache(maxsize=1024)
def _before_outputs(model: str, version: str) -> bytes:
    """Up to the first output, as `encode_response` writes it."""
    return orjson.dumps({"model_name": model, "model_version": version, "outputs": []})[:-2]


@lru_cache(maxsize=1024)
def _before_numbers(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes | None:
    """Up to an output's numbers; None if its datatype has no such form."""
    datatype = _DATATYPE[dtype]
    if datatype not in PACKED:
        return None
    return orjson.dumps({"name": name, "datatype": datatype, "shape": shape, "data": None})[:-5]


_DATATYPE = {dtype: datatype for datatype, dtype in DATATYPES.items()}


@dataclass(slots=True)
class _Source:
    """Where the elements of a request's inputs are, besides its JSON.

    Attributes:
        binary: what follows the JSON; None if the request does not say where the JSON ends.
        offset: where in it the next binary input begins.
    """

    engine: Engine
    request: InferRequest
    binary: memoryview | None
    offset: int = 0


def _header_length(text: bytes, size: int) -> int:
    name = "Inference-Header-Content-Length"
    if not text.removeprefix(b"-").isdigit():
        raise InvalidInput(f"Unable to parse {name}, got: {_text(text)}")
    if len(text) > 18 or not -(2**31) <= int(text) < 2**31:
        raise InvalidInput(
            f"Unable to parse {name}, value is out of range [ -2147483648, 2147483647 ], got: {_text(text)}"
        )
    if not 0 <= int(text) <= size:
        raise InvalidInput(f"inference header size should be in range (0, {size}), got: {int(text)}")
    return int(text)


def _load_literals(text: bytes | bytearray, error: orjson.JSONDecodeError) -> Any:
    """What orjson refused, if NaN, Infinity or -Infinity may be why. Slow, so it is tried only then.

    Raises:
        InvalidInput: with orjson's reason, if there is another.
    """
    if "ecursion limit" in str(error) or "depth limit" in str(error):
        raise InvalidInput(TOO_DEEP)
    if b"NaN" in text or b"Infinity" in text:
        try:
            head = json.loads(text.decode())
            orjson.dumps(head)  # which refuses what it would not have read: half a surrogate pair, an endless number
        except (ValueError, TypeError, RecursionError):
            pass
        else:
            return head
    raise InvalidInput(f"failed to parse the request JSON buffer: {error}")


def _check_depth(head: dict[str, Any]) -> None:
    """Refuse a request that is too deep; the elements of its tensors are looked at when they are flattened."""
    level: list[Any] = [head]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for key, child in (parent.items() if type(parent) is dict else enumerate(parent))
            if type(child) in (dict, list) and key != "data"
        ]
    if level:
        raise InvalidInput(TOO_DEEP)


def _decode_raw(metadata: ModelMetadata, model: str, version: str, body: bytes | bytearray) -> Decoded:
    """A body that is the data of the model's only input, whose shape follows from its size."""
    if metadata.decoupled:  # before its inputs are looked at, as in Triton
        raise Unimplemented(NOT_DECOUPLED)
    request = InferRequest(model, version, {})
    prefix = request_prefix(request)
    if len(metadata.inputs) != 1:
        raise InvalidInput(
            f"{prefix}Raw request must only have 1 input (found 1) to be deduced but got {len(metadata.inputs)} inputs "
            f"in '{model}' model configuration"
        )
    (spec,) = metadata.inputs.values()
    shape = list(spec.shape)
    if metadata.max_batch_size:
        shape[0] = 1
    if shape.count(-1) > 1:
        raise InvalidInput(
            f"{prefix}The shape of the raw input '{spec.name}' can not be deduced because there are more than one "
            "variable-sized dimension"
        )
    array: Array
    if spec.datatype == "BYTES":
        if shape[bool(metadata.max_batch_size) :] != [1]:
            raise InvalidInput(
                f"{prefix}For BYTE datatype raw input '{spec.name}', the model must have input shape [1]"
            )
        array = np.array([bytes(body)], object)
    else:
        if -1 in shape:
            others = math.prod(size for size in shape if size != -1)
            shape[shape.index(-1)] = len(body) // (others * DATATYPES[spec.datatype].itemsize)
        array = read_tensor(body, spec.datatype, math.prod(shape), spec.name, request)
    request.inputs[spec.name] = array.reshape(shape)
    return Decoded(request, binary_default=True)


def _misnamed(where: str, what: str, entry: Any, request: InferRequest) -> InvalidInput:
    if type(entry) is not dict:
        return InvalidInput(f"{where}: must be an object, got {_kind(entry)}")
    if type(entry.get("name")) is not str:
        return _mistyped(entry, "name", "string", f"{where}: ")
    return InvalidInput(f"{request_prefix(request)}{what} '{entry['name'][:SHOWN]}' already exists in request")


def _mistyped(parent: dict[str, Any], key: str, expected: str, where: str = "") -> InvalidInput:
    """What Triton says of a member that is missing or of another type, and whose it is, and what it is."""
    if key not in parent:
        place = f" ({where.removesuffix(': ')})" if where else ""
        return InvalidInput(f"Unable to parse '{key}': attempt to access non-existing object member '{key}'{place}")
    return InvalidInput(
        f"Unable to parse '{key}': attempt to access JSON non-{expected} as {expected} "
        f"({where}got {_brief(parent[key])})"
    )


def _read_parameters(head: dict[str, Any], decoded: Decoded) -> None:
    """The request's own parameters: those of the protocol, and those for the model."""
    parameters, request = head["parameters"], decoded.request
    if type(parameters) is not dict:
        raise _mistyped(head, "parameters", "object")
    for key, value in parameters.items():
        if key in RESERVED:
            allowed, expected = RESERVED[key]
            if type(value) not in allowed or (type(value) is int and value < 0):
                raise _mistyped(parameters, key, expected)
        elif key.startswith("triton_"):
            raise InvalidInput(
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."
            )
        elif type(value) in CUSTOM:
            request.parameters[key] = value
        else:
            raise InvalidInput(
                f"parameter '{key[:SHOWN]}' has invalid type. It should be either 'int', 'bool', or 'string'."
            )
    request.priority = parameters.get("priority", 0)
    request.timeout = parameters.get("timeout", 0) / 1e6
    request.correlation_id = parameters.get("sequence_id", 0)
    if parameters.get("sequence_start"):
        request.flags |= SEQUENCE_START
    if parameters.get("sequence_end"):
        request.flags |= SEQUENCE_END
    decoded.binary_default = parameters.get("binary_data_output", False)


def _read_outputs(head: dict[str, Any], decoded: Decoded, engine: Engine) -> None:
    """The outputs that are listed, and the form in which each travels."""
    entries = head["outputs"]
    if type(entries) is not list:
        raise _mistyped(head, "outputs", "array")
    binary: dict[str, bool] = {}
    for index, entry in enumerate(entries):
        name = entry.get("name") if type(entry) is dict else None
        if type(name) is not str or name in binary:
            raise _misnamed(f"outputs[{index}]", "output", entry, decoded.request)
        binary[name] = entry.get("parameters") is not None and _read_form(entry, name, decoded, engine)
    decoded.binary = binary
    decoded.request.outputs = tuple(binary) or None


def _read_form(entry: dict[str, Any], name: str, decoded: Decoded, engine: Engine) -> bool:
    """Whether it is to be binary; what else is said of it is kept in `decoded`."""
    parameters, where = entry["parameters"], f"output '{name[:SHOWN]}': "
    if type(parameters) is not dict:
        raise _mistyped(entry, "parameters", "object", where)
    binary, classes = parameters.get("binary_data", False), parameters.get("classification", 0)
    if type(binary) is not bool:
        raise _mistyped(parameters, "binary_data", "boolean", where)
    if type(classes) is not int or classes < 0:
        raise _mistyped(parameters, "classification", "unsigned-integer", where)
    if "shared_memory_region" in parameters:
        for key, given in (("classification", "classification" in parameters), ("binary_data", binary)):
            if given:
                raise InvalidInput(f"Output can't set both 'shared_memory_region' and '{key}'")
        decoded.placed = {**decoded.placed, name: _region(parameters, name, engine, where)}
    elif classes:
        decoded.classes = {**decoded.classes, name: classes}
    return binary


def _region(parameters: dict[str, Any], name: str, engine: Engine, where: str) -> memoryview:
    """The part of the registered shared memory that an input's or output's parameters name."""
    size, offset = parameters.get("shared_memory_byte_size"), parameters.get("shared_memory_offset", 0)
    if type(parameters["shared_memory_region"]) is not str:
        raise _mistyped(parameters, "shared_memory_region", "string", where)
    if size is None:
        raise InvalidInput(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor "
            f"'{name[:SHOWN]}'"
        )
    for key, value in (("shared_memory_byte_size", size), ("shared_memory_offset", offset)):
        if type(value) is not int or value < 0:
            raise _mistyped(parameters, key, "unsigned-integer", where)
    return engine.regions.view(parameters["shared_memory_region"], offset, size)


def _tensor(entry: dict[str, Any], name: str, source: _Source) -> Array:
    datatype, shape = entry.get("datatype"), entry.get("shape")
    try:
        if type(shape) is not list:
            raise TypeError
        layout = _layout(datatype, *shape)
    except TypeError:
        raise _misshapen(entry, datatype, shape, name) from None
    if entry.get("parameters") is None and "data" in entry:
        array = _from_json(entry["data"], layout, name, source.request)
    else:
        array = _from_elsewhere(entry, name, layout, source)
    try:
        return array.reshape(layout.shape)
    except (ValueError, OverflowError):  # one dimension is 0 and another beyond what numpy can address
        raise _oversized(shape, MAX_SIZE + 1, layout.datatype, name) from None


class _Layout(NamedTuple):
    """What a datatype and a shape come to.

    Attributes:
        elements: how many.
        packed: how they lie in memory; None for datatypes that JSON has no number for.
    """

    datatype: str
    shape: tuple[int, ...]
    elements: int
    dtype: np.dtype[Any]
    packed: struct.Struct | None


@lru_cache(maxsize=1024, typed=True)
def _layout(datatype: str, *shape: int) -> _Layout:
    """Most requests look alike. What is refused is not remembered.

    Raises:
        TypeError: that is no datatype, or no shape.
    """
    dtype = DATATYPES.get(datatype)
    if dtype is None or len(shape) > MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
        raise TypeError
    count = math.prod(shape)
    if count * dtype.itemsize > MAX_SIZE:
        raise TypeError
    code = PACKED.get(datatype)
    return _Layout(datatype, shape, count, dtype, struct.Struct(f"<{count}{code}") if code else None)


def _misshapen(entry: dict[str, Any], datatype: Any, shape: Any, name: str) -> InvalidInput:
    """Why `_layout` refused them."""
    where = f"input '{name[:SHOWN]}': "
    if type(datatype) is not str:
        return _mistyped(entry, "datatype", "string", where)
    if datatype not in DATATYPES:
        return InvalidInput(
            f"invalid datatype for input {name[:SHOWN]} (got {_brief(datatype)}, there are {', '.join(DATATYPES)})"
        )
    if type(shape) is not list or any(type(size) is not int or size < 0 for size in shape):
        return _mistyped(entry, "shape", "array" if type(shape) is not list else "unsigned-integer", where)
    if len(shape) > MAX_DIMENSIONS:
        return InvalidInput(f"invalid shape for input '{name[:SHOWN]}': more than {MAX_DIMENSIONS} dimensions")
    return _oversized(shape, math.prod(shape), datatype, name)


def _oversized(shape: list[int], count: int, datatype: str, name: str) -> InvalidInput:
    if count > MAX_SIZE:
        return InvalidInput(
            f"invalid shape for input '{name[:SHOWN]}': shape {_brief(shape)} causes total element count to exceed "
            f"maximum size of {MAX_SIZE}"
        )
    return InvalidInput(
        f"byte size overflow for input '{name[:SHOWN]}': element count ({count}) * data type size "
        f"({DATATYPES[datatype].itemsize}) exceeds maximum allowed size ({MAX_SIZE})"
    )


def _from_elsewhere(entry: dict[str, Any], name: str, layout: _Layout, source: _Source) -> Array:
    """The elements of an input that has parameters, which may say where they are."""
    datatype, count = layout.datatype, layout.elements
    where = f"input '{name[:SHOWN]}': "
    parameters = entry.get("parameters")
    if parameters is None:
        parameters = {}
    elif type(parameters) is not dict:
        raise _mistyped(entry, "parameters", "object", where)
    given = [key for key in PAYLOADS if key in (entry if key == "data" else parameters)]
    if len(given) != 1:
        raise InvalidInput(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            "'shared_memory_region' in 'parameters'. But "
            + ("set " + " ".join(f"'{key}'" for key in given) if given else "no field is set")
        )
    if given == ["data"]:
        return _from_json(entry["data"], layout, name, source.request)
    if given == ["shared_memory_region"]:  # copied at once: the client may change it
        region = _region(parameters, name, source.engine, where)
        return read_tensor(region, datatype, count, name, source.request).copy()
    size, binary, start = parameters["binary_data_size"], source.binary or b"", source.offset
    if type(size) is not int or size < 0:
        raise _mistyped(parameters, "binary_data_size", "unsigned-integer", where)
    source.offset += size
    if source.offset > len(binary):
        hint = " (the header Inference-Header-Content-Length is missing)" if source.binary is None else ""
        raise InvalidInput(
            f"unexpected size for input '{name[:SHOWN]}', expecting {source.offset - len(binary)} additional bytes for "
            f"model '{source.request.model}'{hint}"
        )
    return read_tensor(binary[start : source.offset], datatype, count, name, source.request)


def _from_json(data: Any, layout: _Layout, name: str, request: InferRequest) -> Array:
    datatype, _, count, dtype, packed = layout
    if datatype in BINARY_ONLY:
        raise InvalidInput(
            f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input "
            f"{name[:SHOWN]}"
        )
    if type(data) is not list:
        raise _mistyped({"data": data}, "data", "array", f"input '{name[:SHOWN]}': ")
    kinds = set(map(type, data))
    if list in kinds:  # nesting, even or not, carries no meaning beyond the order of the elements
        data = flatten(data, MAX_DEPTH - DATA_DEPTH)
        kinds = set(map(type, data))
    allowed, refusal = ELEMENTS[dtype.kind]
    if not kinds <= allowed:
        wrong = ", ".join(sorted(_KINDS[kind] for kind in kinds - allowed))
        raise InvalidInput(f"Unable to parse {refusal} (input '{name[:SHOWN]}': {datatype}, got {wrong})")
    if len(data) != count and datatype == "BYTES":
        raise miscounted(len(data), count, name, request)
    if len(data) != count:
        raise InvalidInput(
            "Unable to parse 'data': Shape does not match true shape of 'data' field "
            f"(input '{name[:SHOWN]}': {len(data)} elements, its shape makes {count})"
        )
    if packed is None:
        return np.array(list(map(str.encode, data)), object)
    try:  # in half the time that numpy takes, which does not refuse what does not fit unless told to
        return np.frombuffer(packed.pack(*data), dtype)
    except (OverflowError, struct.error):
        raise InvalidInput(
            f"Unable to parse 'data': input '{name[:SHOWN]}' holds a number that does not fit {datatype}"
        ) from None


def _classify(array: Array, datatype: str, name: str, count: int, metadata: ModelMetadata | None) -> Array:
    assert metadata is not None
    spec = metadata.outputs.get(name)
    return classify(array, datatype, count, spec.labels if spec else (), metadata.max_batch_size > 0)


def _place(name: str, buffer: bytes | memoryview, region: memoryview) -> None:
    if len(buffer) > len(region):
        raise ModelError(
            f"shared memory size specified with the request for output '{name}' ({len(region)} bytes) should be at "
            f"least {len(buffer)} bytes to hold the results"
        )
    region[: len(buffer)] = buffer


def _texts(array: Array) -> list[str]:
    """The elements of BYTES as text; bytes that are not UTF-8 become what `_lenient` writes as the same bytes."""
    elements: list[bytes] = array.reshape(-1).tolist()
    try:
        return list(map(bytes.decode, elements))
    except UnicodeDecodeError:
        return [element.decode("utf-8", "surrogateescape") for element in elements]


def _lenient(head: dict[str, Any]) -> bytes:
    """JSON, with what JSON has no form for as Triton writes it: NaN, Infinity, and bytes as they are."""
    text = json.dumps(head, default=lambda value: value.tolist(), separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogateescape")


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
    return header[:40].decode("latin-1")
