"""POST generate and generate_stream: free-form JSON <-> tensors (PROTOCOL.md section 1.10).

A key of the request that names an input of the model is that input, its value a scalar or a flat array; every other key
is a parameter of the request. The answer is one JSON object for each response, of models that give any number of them
too: exactly one for /generate, a stream of server-sent events for /generate_stream.
"""

import json
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import numpy as np

from engine.errors import EngineError, InvalidInput
from engine.types import DATATYPES, Array, InferRequest, InferResponse, ModelMetadata, TensorSpec

from .messages import JSON, Request, Response, client, deadline, forwarded, read_body, while_connected
from .tensors import MAX_DEPTH, flatten, request_prefix
from .v2_codec import BINARY_ONLY, ELEMENTS

EVENTS = b"text/event-stream; charset=utf-8"

# With 200, as Triton has it: the model did what it was asked to.
NOT_ONE = (
    b'{"error":"generate expects model to produce exactly 1 response, use generate stream for model that generates '
    b'various number of responses"}'
)


class Stream(NamedTuple):
    """What a handler answers that gives its answer piece by piece.

    Attributes:
        pieces: closed when the caller left.
        error: the body of an error -> what is sent in its place: an answer that has begun has its status already.
    """

    pieces: AsyncGenerator[bytes, None]
    content_type: bytes
    error: Callable[[bytes], bytes]


async def generate(request: Request) -> Response:
    asked = await _ask(request)
    async with aclosing(_responses(request, asked)) as responses:
        return Response(200, await while_connected(request, _only(responses, asked.id)), JSON)


async def generate_stream(request: Request) -> Stream:
    return Stream(_events(request, await _ask(request)), EVENTS, event)


async def _ask(request: Request) -> InferRequest:
    until = deadline(request)
    body = await read_body(request)
    name, version = request.path["model"], request.path.get("version", "")
    metadata = request.engine.metadata(name, version)
    request.engine.check_room(name, version)
    asked = decode(metadata, version, body)
    asked.deadline = until
    if header := request.settings.client_header:
        asked.client = client(request, header)
    if pattern := request.settings.forward_headers:
        asked.parameters.update(forwarded(request, pattern))
    return asked


def _responses(request: Request, asked: InferRequest) -> AsyncGenerator[InferResponse, None]:
    # "Close the iterator", says Engine.stream: so it is one that can be closed.
    return request.engine.stream(asked)


async def _only(responses: AsyncGenerator[InferResponse, None], request_id: str) -> bytes:
    """The body of the only response, or the text that says that there was another number of them."""
    body = b""
    try:
        async for response in responses:
            if body:
                return NOT_ONE
            body = encode(response, request_id)
    except EngineError:
        if not body:
            raise
        return NOT_ONE  # an error is a response as well
    return body or NOT_ONE


async def _events(request: Request, asked: InferRequest) -> AsyncGenerator[bytes, None]:
    async with aclosing(_responses(request, asked)) as responses:
        async for response in responses:
            yield event(encode(response, asked.id))


def event(body: bytes) -> bytes:
    """A server-sent event. JSON has no line breaks of its own, so one line holds it."""
    return b"data: %b\n\n" % body


class _Object(list[tuple[str, Any]]):
    """A JSON object with all its pairs: a key may be there twice, and the model must not get one of the two."""


def decode(metadata: ModelMetadata, version: str, body: bytes | bytearray) -> InferRequest:
    """Map a free-form JSON object to a request to the model.

    Raises:
        InvalidInput: for the first key that does not fit.
    """
    try:
        document = json.loads(body.decode(), object_pairs_hook=_Object)
        if b"\\u" in body:  # such an escape may be half of a pair, which is no text
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"failed to parse the request JSON buffer: {error}") from None
    if type(document) is not _Object:
        raise InvalidInput("attempt to get members for non-object")
    request_id = next((value for key, value in document if key == "id"), "")
    if type(request_id) is not str:
        raise InvalidInput("Unable to parse 'id': attempt to access JSON non-string as string")
    request = InferRequest(metadata.name, version, {}, id=request_id)
    for key, value in document:
        if key == "parameters":
            _take_nested(request, metadata, value)
        else:
            _take(request, metadata, key, value)
    return request


def _take_nested(request: InferRequest, metadata: ModelMetadata, value: Any) -> None:
    if type(value) is not _Object:
        raise InvalidInput(
            "Expected JSON object for keyword: 'parameters': attempt to access JSON non-object as object"
        )
    try:
        for inner, inner_value in value:
            _take(request, metadata, inner, inner_value)
    except InvalidInput as error:
        raise InvalidInput(f"Converting keyword: 'parameters': {error}") from None


def _take(request: InferRequest, metadata: ModelMetadata, key: str, value: Any) -> None:
    """Put one pair where it belongs: with the inputs, or with the parameters."""
    if key in request.inputs:
        raise InvalidInput(f"{request_prefix(request)}input '{key}' already exists in request")
    if key in metadata.inputs:
        request.inputs[key] = _tensor(metadata.inputs[key], value)
    elif type(value) in (str, bool, float) or (type(value) is int and -(2**63) <= value < 2**64):
        request.parameters[key] = value
    else:
        raise InvalidInput(f"parameter '{key[:200]}' has invalid type. It should be either 'int', 'bool', or 'string'.")


def _tensor(spec: TensorSpec, value: Any) -> Array:
    if spec.datatype in BINARY_ONLY:
        raise InvalidInput(
            f"receiving {spec.datatype} data via JSON is not supported. Please use the binary data format for input "
            f"{spec.name}"
        )
    elements = flatten(value, MAX_DEPTH) if type(value) is list else [value]
    shape = _shape(spec, len(elements))
    dtype = DATATYPES[spec.datatype]
    allowed, refusal = ELEMENTS[dtype.kind]
    found = set(map(type, elements))
    if not found <= allowed or (dtype.kind == "u" and min(elements, default=0) < 0):
        raise InvalidInput(f"Unable to parse {refusal}")
    if dtype.kind == "O":
        elements = [element.encode() for element in elements]
    try:
        with np.errstate(over="raise"):
            return np.array(elements, dtype).reshape(shape)
    except (OverflowError, FloatingPointError):
        raise InvalidInput(
            f"Unable to parse 'data': input '{spec.name}' holds a number that does not fit {spec.datatype}"
        ) from None


def _shape(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """The shape for so many elements: the innermost size that is free is what makes them fit, the others are 1."""
    shape = list(spec.shape)
    free = [axis for axis, size in enumerate(shape) if size < 0]
    for axis in free:
        shape[axis] = 1
    fixed = math.prod(shape)
    if count % fixed if free and fixed else count != fixed:
        raise InvalidInput(f"The schema can not convert input '{spec.name}' to tensor with proper shape")
    if free:
        shape[free[-1]] = count // fixed if fixed else 1
    return tuple(shape)


def encode(response: InferResponse, request_id: str) -> bytes:
    """One response as a JSON object: an output of one element as a scalar, any other as a flat array.

    Raises:
        InvalidInput: the protocol has no JSON for the datatype of an output.
    """
    answer: dict[str, Any] = {"id": request_id} if request_id else {}
    answer.update(model_name=response.model, model_version=response.version)
    for name, array in response.outputs.items():
        datatype = _DATATYPE[array.dtype]
        if datatype in BINARY_ONLY:
            raise InvalidInput(
                f"sending {datatype} data via JSON is not supported. Please use the binary data format for output "
                f"{name}"
            )
        values = array.ravel().tolist()
        if datatype == "BYTES":  # what is not UTF-8 goes out as it is
            values = [value.decode(errors="surrogateescape") for value in values]
        answer[name] = values[0] if len(values) == 1 else values
    answer.update(response.parameters)
    text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="surrogateescape")


_DATATYPE = {dtype: datatype for datatype, dtype in DATATYPES.items()}
