"""What is fuzzed: whatever makes values of the bytes that a client or an operator gives.

Each of TARGETS takes any bytes, and takes them apart itself. It returns, or raises an error of engine/errors.py;
anything else is a finding. What was accepted must also pass what comes next: it is checked against models, written as
an answer, and read again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import numpy as np
import orjson

from asgi_app import generate as free_form
from asgi_app.compression import CODINGS, compress, decompress, preferred
from asgi_app.failures import STATUS
from asgi_app.routes import match
from asgi_app.v2_codec import BINARY_ONLY, Decoded, decode_request, encode_response
from engine.config import ModelConfig, configure, deduce, parse_config, read_json
from engine.errors import ConfigError, EngineError, InvalidInput, NotFound
from engine.ipc.frames import (
    ERROR,
    FREE,
    INFER,
    RESPONSE,
    STREAM,
    Frame,
    FrameError,
    Reader,
    read_error,
    read_offsets,
    read_request,
    read_response,
)
from engine.types import DATATYPES, Array, Engine, InferRequest, InferResponse, ModelMetadata, TensorSpec
from engine.validate import check_request

from .connections import converse

Target = Callable[[bytes], None]
T = TypeVar("T")

LARGEST = 1 << 16  # bytes that a decompressed body may have here


def _model(rows: int, *inputs: TensorSpec) -> ModelMetadata:
    return ModelMetadata("m", ("1",), "p", rows, {spec.name: spec for spec in inputs}, {"x": inputs[0]})


# Models to send requests to, each odd in its own way. Of the first, every input is optional: one of each datatype.
MODELS = (
    _model(
        0,
        TensorSpec("x", "FP32", (-1,), ("paper", "", "rock"), optional=True),
        *(TensorSpec(datatype.lower(), datatype, (-1,), optional=True) for datatype in DATATYPES),
    ),
    _model(4, TensorSpec("x", "FP32", (-1, 2))),
    replace(
        _model(8, TensorSpec("x", "INT64", (-1, -1))), ragged={"x": 1}, lengths=(4, 8), max_cost=32, row_grid=(1, 4, 8)
    ),
    _model(0, TensorSpec("x", "UINT8", (1,)), TensorSpec("flag", "BOOL", (1,), optional=True)),
    _model(2, TensorSpec("x", "BYTES", (-1, 1))),
    _model(0, TensorSpec("x", "BF16", (2, -1))),
    _model(0, TensorSpec("x", "FP64", (-1, 3, -1))),
)

# What a machine and a version folder may hold: CUDA devices, names of files.
PLACES = tuple(
    (gpus, found)
    for gpus in (None, 0, 2)
    for found in ((), ("model.pt2",), ("model.onnx",), ("model.py", "model.pt"), ("model.plan",))
)


class Memory:
    """The part of an engine that a codec asks: one model by any name, and the shared memory `r`."""

    def __init__(self, metadata: ModelMetadata) -> None:
        self._metadata = metadata
        self._region = bytearray(range(64))

    @property
    def regions(self) -> "Memory":
        return self

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        return self._metadata

    def view(self, name: str, offset: int, byte_size: int) -> memoryview:
        if name != "r":
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        if not 0 <= offset < 64 or not 0 <= byte_size <= 64 - offset:
            raise InvalidInput(f"Invalid offset + byte size for shared memory region: '{name}'")
        return memoryview(self._region)[offset : offset + byte_size]


class SharedMemory:
    """What the tensors of frames may lie in: nobody looks beyond its end."""

    size = 64

    def view(self, offset: int, nbytes: int) -> memoryview:
        assert 0 <= offset <= offset + nbytes <= self.size
        return memoryview(bytes(range(64)))[offset : offset + nbytes]


def read_frame(frame: Frame, memory: SharedMemory) -> None:
    """Read it as what its kind says it is; other kinds have JSON, or nothing."""
    arrays: list[tuple[int, Array]] = []
    if frame[0] in (INFER, STREAM):
        arrays = read_request(frame, memory)[5]
    elif frame[0] == RESPONSE:
        arrays = read_response(frame, memory)[0]
    elif frame[0] == ERROR:
        assert str(read_error(frame)) is not None
    elif frame[0] == FREE:
        assert len(read_offsets(frame)) * 8 == frame[6] - frame[5]
    assert len(arrays) in (0, frame[2])
    assert all(array.dtype in DATATYPES.values() and array.flags.c_contiguous for _, array in arrays)


def attempt(target: Callable[[bytes], object], data: bytes) -> EngineError | None:
    """Run a target: None if `data` was accepted, the error if it was refused, and raises what is a finding.

    An error must be one that the application has a status for, or the operator's, and its text must be one that can be
    sent.
    """
    try:
        target(data)
    except EngineError as error:
        refusal = error
    else:
        return None
    orjson.dumps(str(refusal))
    assert type(refusal) in STATUS or type(refusal) is ConfigError, f"no status for {type(refusal)}"
    return refusal


def decode(data: bytes) -> None:
    r"""An infer request: HEADER \n JSON \0 BINARY, the header's value empty for none, `*` for where the JSON ends."""
    header, _, rest = data.partition(b"\n")
    text, _, binary = rest.partition(b"\0")
    length = {b"": None, b"*": b"%d" % len(text)}.get(header, header)
    _decode_infer(MODELS[0], text + binary, length)


def raw(data: bytes) -> None:
    """An infer request without JSON: MODEL (a byte) BODY."""
    _decode_infer(_choose(MODELS, data), data[1:], b"0")


def generate(data: bytes) -> None:
    """A generate request: MODEL (a byte) BODY."""
    metadata = _choose(MODELS, data)
    request = free_form.decode(metadata, "", data[1:])
    _check(metadata, request)
    response = InferResponse(metadata.name, "1", request.inputs, request.parameters)
    assert b"\n" not in free_form.encode(response, request.id)  # else it would be two lines of an event


def config(data: bytes) -> None:
    """A config.pbtxt: PLACE (a byte) TEXT. The version folder is empty."""
    gpus, _ = _choose(PLACES, data)
    text = _as_text(data[1:])
    _read_again(parse_config(text, "m", "f", gpus), (), gpus)


def config_json(data: bytes) -> None:
    """A config as the repository's load gives it: PLACE (a byte) TEXT."""
    gpus, found = _choose(PLACES, data)
    text = _as_text(data[1:])
    message = read_json(text, "f")
    files = deduce(message, "m", found, "f")
    _read_again(configure(message, files, "f", gpus), found, gpus)


def ipc(data: bytes) -> None:
    """What a worker and the engine say to each other: CUT (a byte) STREAM, which comes in pieces of that size.

    Frames, or FrameError: nothing else. A frame that is whole is read as whatever it may be.
    """
    size, memory = (data[0] if data else 0) or len(data), SharedMemory()
    reader = Reader(LARGEST)
    try:
        for start in range(1, len(data), max(1, size)):
            for frame in reader.feed(data[start : start + size]):
                read_frame(frame, memory)
    except FrameError as error:
        raise InvalidInput(str(error)) from None


def compression(data: bytes) -> None:
    r"""A body in a content coding: CODING (a byte) ACCEPT-ENCODING \n BODY."""
    coding = _choose(tuple(CODINGS), data)
    accepted, _, body = data[1:].partition(b"\n")
    assert preferred(accepted) in (b"", *CODINGS)
    plain = decompress(body, coding, LARGEST)
    assert len(plain) <= LARGEST
    assert decompress(compress(plain, coding), coding, LARGEST) == plain


def path(data: bytes) -> None:
    """A request's method and path: METHOD (a byte) PATH."""
    method = _choose(("GET", "POST", "HEAD", "OPTIONS", "DELETE"), data)
    _, variables = match(method, data[1:])
    orjson.dumps(variables)


def connection(data: bytes) -> None:
    """What a client says, to the last byte: CUT (a byte) MANNER (a byte) STREAM.

    Accepted if there was an answer, and no refusal.
    """
    by, manner = (*data[:2], 0, 0)[:2]
    statuses = set(converse(data[2:], by, manner))
    if statuses != {200}:
        raise InvalidInput(f"answered with {statuses or 'nothing'}")


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (decode, raw, generate, config, config_json, compression, path, ipc, connection)
}


def planted(data: bytes) -> None:
    """A target with a bug that is easy to find: the fuzzing itself is tested with it."""
    if data[:1] == b"!":
        raise KeyError(data)


def _choose(choices: Sequence[T], data: bytes) -> T:
    return choices[(data[0] if data else 0) % len(choices)]


def _as_text(data: bytes) -> str:
    """As the repository reads a file: what is not UTF-8 is refused there."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"f: cannot be read: {error}") from None


def _read_again(read: ModelConfig, found: Sequence[str], gpus: int | None) -> None:
    """The config in effect is a config as well: what a client is shown, it may send back."""
    message = read_json(orjson.dumps(read.document).decode(), "again")
    again = configure(message, deduce(message, "m", found, "again"), "again", gpus)
    assert again.document == read.document
    assert (again.inputs, again.outputs, again.parameters) == (read.inputs, read.outputs, read.parameters)


def _decode_infer(metadata: ModelMetadata, body: bytes, header_length: bytes | None) -> None:
    engine = cast(Engine, Memory(metadata))
    decoded = decode_request(engine, "m", "", body, header_length)
    request = decoded.request
    assert all(array.flags.c_contiguous and array.dtype in DATATYPES.values() for array in request.inputs.values())
    _check(metadata, request)
    _echo(engine, request.inputs, binary=True)
    _echo(engine, {name: array for name, array in request.inputs.items() if _in_json(array)}, binary=False)
    response = InferResponse("m", "1", request.inputs, request.parameters)
    answer, length = encode_response(response, decoded, metadata)
    assert 0 <= length <= len(answer)


def _check(metadata: ModelMetadata, request: InferRequest) -> None:
    """Against the model that was asked, whose rows it then has, and against all others."""
    for model in (metadata, *MODELS):
        try:
            rows = check_request(model, request)
        except EngineError as error:
            orjson.dumps(str(error))
        else:
            assert 1 <= rows <= max(model.max_batch_size, 1)


def _in_json(array: Array) -> bool:
    try:
        list(map(bytes.decode, array.ravel().tolist() if array.dtype == object else ()))
    except UnicodeDecodeError:
        return False
    return array.dtype not in [DATATYPES[datatype] for datatype in BINARY_ONLY]


def _echo(engine: Engine, inputs: dict[str, Array], binary: bool) -> None:
    """An answer that holds `inputs` is a request for the same tensors, to the last bit where it is binary."""
    plain = Decoded(InferRequest("m", "", {}), binary_default=binary)
    answer, length = encode_response(InferResponse("m", "1", inputs), plain)
    text = answer[:length] if length else answer
    head = json.dumps({"inputs": json.loads(text)["outputs"]}).encode()
    again = decode_request(engine, "m", "", head + answer[len(text) :], b"%d" % len(head)).request.inputs
    assert list(again) == list(inputs)
    for name, array in inputs.items():
        _assert_same(again[name], array, binary)


def _assert_same(got: Array, array: Array, exact: bool) -> None:
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    if exact and array.dtype != object:
        assert got.tobytes() == array.tobytes()
    else:
        assert np.array_equal(got, array, equal_nan=array.dtype.kind == "f")
