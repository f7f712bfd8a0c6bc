"""Where fuzzing begins: an accepted input or several for each target, and the words that inputs are made of."""

import json
import struct
from typing import Any

import numpy as np

from asgi_app.compression import CODINGS, compress
from asgi_app.routes import ROUTES
from batching.errors import QueueFull
from engine.config import FIELDS, parse_config
from engine.ipc import frames
from engine.parameters import BACKEND_PARAMETERS, PARAMETERS
from engine.types import DATATYPES
from tests.asgi_app.protocol_cases import CASES

Tensor = dict[str, Any]


def _tensor(datatype: str, shape: list[int], data: Any = None, **parameters: Any) -> Tensor:
    entry: Tensor = {"name": datatype.lower(), "datatype": datatype, "shape": shape}
    if data is not None:
        entry["data"] = data
    if parameters:
        entry["parameters"] = parameters
    return entry


def _output(name: str, **parameters: Any) -> Tensor:
    return {"name": name, "parameters": parameters}


_NUMBERS = [name for name, dtype in DATATYPES.items() if name != "BYTES"]
_TEXT = struct.pack("<I", 3) + b"abc" + struct.pack("<I", 0)

# (the JSON of an infer request, what follows it); None: nothing, and the request does not say where the JSON ends.
REQUESTS: list[tuple[dict[str, Any], bytes | None]] = [
    ({"inputs": [_tensor("FP32", [2], [0.5, -1])]}, None),
    (
        {
            "id": "r",
            "inputs": [
                _tensor("FP64", [2, 2], [[0.25, 1e300], [3, -4.0]]), _tensor("INT8", [3], [-128, 0, 127]),
                _tensor("UINT64", [1], [2**64 - 1]), _tensor("BOOL", [2], [True, False]),
                _tensor("BYTES", [2], ["a", "\u00e9"]), _tensor("INT64", [0], []), _tensor("INT32", [], [7]),
            ],
        },
        None,
    ),
    (
        {
            "inputs": [
                _tensor(name, [1, 2], binary_data_size=2 * DATATYPES[name].itemsize) for name in _NUMBERS
            ] + [_tensor("BYTES", [2], binary_data_size=len(_TEXT))],
            "outputs": [_output(name.lower(), binary_data=True) for name in DATATYPES],
        },
        b"".join(np.ones(2, DATATYPES[name]).tobytes() for name in _NUMBERS) + _TEXT,
    ),
    (
        {
            "inputs": [_tensor("UINT8", [2, 4], shared_memory_region="r", shared_memory_byte_size=8),
                       _tensor("BYTES", [1], ["x"], mine=1)],
            "outputs": [_output("uint8", shared_memory_region="r", shared_memory_byte_size=9, shared_memory_offset=55)],
        },
        b"",
    ),
    (
        {
            "inputs": [_tensor("FP32", [2, 3], binary_data_size=24), _tensor("INT16", [3], [3, 1, 2])],
            "outputs": [_output("fp32", classification=2), _output("int16", classification=9, binary_data=True)],
        },
        np.arange(6, dtype="<f4").tobytes(),
    ),
    (
        {
            "inputs": [_tensor("FP32", [3], [1, float("nan"), float("-inf")])],
            "parameters": {
                "sequence_id": 7, "sequence_start": True, "sequence_end": False, "priority": 1, "timeout": 1000000,
                "binary_data_output": True, "temperature": 0.5, "mine": "x", "n": -3, "b": True,
            },
        },
        None,
    ),
]  # fmt: skip

# (index of the model in targets.MODELS, body)
RAW: list[tuple[int, bytes]] = [
    (1, np.ones(2, "<f4").tobytes()),
    (2, np.ones(3, "<i8").tobytes()),
    (4, b"\xff any bytes"),
    (5, bytes(12)),
]
DOCUMENTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"id": "r", "x": [0.5, 1], "parameters": {"temperature": 0.1, "n": 2, "stop": True}}),
    (2, {"x": [1, 2, 3], "mode": "fast"}),
    (3, {"x": 255, "flag": True, "nan": float("nan")}),
    (4, {"x": "text \u00e9", "id": "r"}),
    (6, {"x": [1.5, 2, 3]}),
]

_IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ 1 ] label_filename: "l.txt" } ]
"""
# (index of the place in targets.PLACES, config.pbtxt)
CONFIGS: list[tuple[int, str]] = [
    (0, 'platform: "pytorch_libtorch"' + _IO),
    (
        0,
        """
# a comment
name: 'm'  backend: "pytorch"
max_batch_size: 8;
input { name: "x", data_type: TYPE_FP32, dims: 3, dims: -1 allow_ragged_batch: true }
output: [ { name: "y" data_type: TYPE_BF16 dims: [ 2, 3 ], reshape { shape: [ 6 ] } } ]
dynamic_batching: { max_queue_delay_microseconds: 500 preferred_batch_size: [ 4, 8 ] preserve_ordering: true }
version_policy: { specific: { versions: [ 3, 1 ] } }
instance_group [ { kind: KIND_CPU count: 1 } ]
parameters { key: "padded_lengths" value { string_value: "16, 32 64" } }
parameters { key: "max_batch_tokens" value { string_value: "512" } }
parameters { key: "max_padding" value { string_value: "0.25" } }
parameters { key: "padded_rows" value { string_value: "1 2 8" } }
parameters { key: "latency_objective_ms" value { string_value: "10" } }
parameters { key: "patience_ms" value { string_value: "250" } }
parameters { key: "pad.x" value { string_value: "-inf" } }
parameters { key: "INFERENCE_MODE" value { string_value: "true" } }
parameters { key: "INTRA_OP_THREAD_COUNT" value { string_value: "2" } }
""",
    ),
    (
        10,
        """
backend: "python" max_batch_size: 4 runtime: "r"
input [
  { name: "x" data_type: TYPE_FP32 dims: [ 1, 4 ] reshape { shape: [ 4 ] } },
  { name: "z" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 1, 2, -1 ] allow_ragged_batch: true optional: true }
]
output { name: "y" data_type: TYPE_STRING dims: [ 1 ] reshape { shape: [ ] } label_filename: "l.txt" }
dynamic_batching {
  preferred_batch_size: [ 2, 4 ] max_queue_delay_microseconds: 100 priority_levels: 2 default_priority_level: 1
  default_queue_policy { max_queue_size: 3 allow_timeout_override: true }
  priority_queue_policy { key: 2 value { timeout_action: DELAY default_timeout_microseconds: 5 } }
}
metric_tags { key: "a" value: "b" }
parameters { key: "k" value { string_value: "v" } }
model_warmup {
  name: "w" batch_size: 2 count: 3 inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 1, 4 ] random_data: true } }
}
optimization {
  graph { level: 1 } eager_batching: true input_pinned_memory { enable: false }
  execution_accelerators { gpu_execution_accelerator { name: "tensorrt" parameters { key: "a" value: "b" } } }
}
instance_group [
  { kind: KIND_CPU count: 2 },
  { name: "g" rate_limiter { resources { name: "r" count: 1 } } host_policy: "hp" },
  { kind: KIND_GPU gpus: [ 0, 1 ] },
  { kind: KIND_MODEL passive: true }
]
response_cache { enable: false }
model_transaction_policy { decoupled: true }
version_policy { all { } }
""",
    ),
    (0, 'backend: "onnxruntime" response_cache { enable: true } parameters { key: "session.x" '
        'value { string_value: "1" } } parameters { key: "execution_mode" value { string_value: "1" } }' + _IO),
    (5, 'backend: "identity" max_batch_size: 2 version_policy { latest { num_versions: 2 } } '
        'parameters { key: "execute_delay_ms" value { string_value: "5" } }' + _IO),
]  # fmt: skip
CONFIG_DOCUMENTS: list[tuple[int, dict[str, Any]]] = [
    *((place, parse_config(text, "m", "f", 2 if place >= 10 else None).document) for place, text in CONFIGS),
    (2, {"maxBatchSize": "4", "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["3"]}],
         "output": [{"name": "y", "dataType": 11, "dims": [1]}]}),
]  # fmt: skip

METHODS = ("GET", "POST")


def infer(head: str | bytes, binary: bytes | None = None, header: bytes | None = None) -> bytes:
    """An input of the target `decode`; without a header, the one that `binary` needs."""
    text = head.encode("utf-8", "surrogatepass") if isinstance(head, str) else head
    line = header if header is not None else b"" if binary is None else b"*"
    return line + b"\n" + text + (b"" if binary is None else b"\0" + binary)


def numbered(index: int, text: str | bytes) -> bytes:
    """An input that begins with a choice."""
    return bytes([index]) + (text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)


# Streams that are served, and the names of their cases; those that are refused are only in strategies.py.
SERVED = {case.name: case.sent for case in CASES if case.seen and not (case.refusal or case.waits or case.other)}


def conversations() -> list[bytes]:
    """The first case that is served of each family, cut in each way, and with each application that answers."""
    families = {name.partition("/")[0]: name for name in reversed(SERVED)}
    ways = [(cut, manner) for cut in (0, 0x37) for manner in range(4)]
    return [bytes(ways[index % len(ways)]) + SERVED[name] for index, name in enumerate(families.values())]


def spoken() -> list[bytes]:
    """Streams of frames, each with all that there is of one kind, and one with one of each."""
    arrays = [np.ones((1, 2), dtype) for name, dtype in DATATYPES.items() if name != "BYTES"]
    arrays.append(np.array([[b"ab", b""]], object))
    inline = [bytes(frames.elements(array)) for array in arrays]
    described = b"".join(
        frames.describe(index, array.dtype, array.shape, len(inline[index])) for index, array in enumerate(arrays)
    )
    shared = frames.describe(0, np.dtype("<f4"), (2, 2), 16, 32)
    content = {"inline": inline, "nbytes": sum(map(len, inline))}
    flags, error = frames.error_meta(QueueFull("no room", 1.5))
    written: list[dict[str, Any]] = [
        {"kind": frames.INFER, "id": 1 << 16, "meta": frames.request_meta(1, 1, 2.0, 0.5, 1, described, b"{}"),
         "tensors": len(arrays), **content},
        {"kind": frames.RESPONSE, "id": 2, "meta": frames.response_meta(described, b""), "tensors": len(arrays),
         **content},
        {"kind": frames.STREAM, "id": 3, "meta": frames.request_meta(1, 2, 0, 0, 0, shared, b""), "tensors": 1},
        {"kind": frames.RESPONSE, "id": 4, "meta": frames.response_meta(2 * shared, b"[]"), "tensors": 2},
        {"kind": frames.ERROR, "id": 5, "flags": flags, "meta": error},
        {"kind": frames.FREE, "meta": frames.offsets_meta([0, 64])},
        {"kind": frames.BEAT, "flags": frames.LIVE},
    ]  # fmt: skip
    streams = []
    for stream in (*([each] for each in written), written):
        writer = frames.Writer()
        for each in stream:
            writer.write(**each)
        streams.append(writer.take())
    return streams


SEEDS: dict[str, list[bytes]] = {
    "decode": [infer(json.dumps(head), binary) for head, binary in REQUESTS],
    "raw": [numbered(*pair) for pair in RAW],
    "generate": [numbered(model, json.dumps(document)) for model, document in DOCUMENTS],
    "config": [numbered(*pair) for pair in CONFIGS],
    "config_json": [numbered(place, json.dumps(document)) for place, document in CONFIG_DOCUMENTS],
    "compression": [
        numbered(index, b"gzip;q=0.5, deflate, identity;q=1\n" + compress(b"plain " * 20, coding))
        for index, coding in enumerate(CODINGS)
    ],
    "path": [
        numbered(METHODS.index(route.method), route.path.replace("{version}", "1").replace("{", "%7B"))
        for route in ROUTES
        if route.method in METHODS
    ],
    "ipc": [numbered(cut, stream) for stream in spoken() for cut in (0, 7)],
    "connection": conversations(),
}

_REQUEST_WORDS = [
    *(f'"{word}"' for word in (
        "id inputs outputs parameters name datatype shape data binary_data_size binary_data binary_data_output "
        "classification shared_memory_region shared_memory_byte_size shared_memory_offset sequence_id sequence_start "
        "sequence_end priority timeout x r"
    ).split()), *(f'"{name}"' for name in DATATYPES), *(f'"{name.lower()}"' for name in DATATYPES),
    "NaN", "-Infinity", "1e999", "1e39", "-1", "18446744073709551615", "9223372036854775808", "\\ud800", "\ud800",
    "null", "true", "[[", "]]", "[]", "{}", '""', "0.5", "65536",
]  # fmt: skip
_CONFIG_WORDS = [
    *sorted(FIELDS), *PARAMETERS, *(word for known in BACKEND_PARAMETERS.values() for word in known),
    "TYPE_FP32", "TYPE_INT64", "TYPE_BF16", "TYPE_STRING", "KIND_GPU", "KIND_CPU", "KIND_AUTO", "KIND_MODEL", "DELAY",
    "pytorch", "onnxruntime", "python", "identity", "pytorch_libtorch", "dims: -1", "dims: [ -1, 2 ]", "{ }", "[ ]",
    "pad.x", "-9223372036854775808", "18446744073709551615", "2147483647", "nan", "inf", "true", "\\xff", "\\ud800",
]  # fmt: skip

WORDS: dict[str, list[str]] = {
    "decode": _REQUEST_WORDS,
    "raw": [],
    "generate": _REQUEST_WORDS,
    "config": _CONFIG_WORDS,
    "config_json": [*_CONFIG_WORDS, '":"', '","', "{}", "null", "1e999", "NaN"],
    "compression": ["gzip", "deflate", "identity", ";q=", "nan", "\x1f\u008b"],
    "path": sorted(
        {segment for route in ROUTES for segment in route.path.split("/") if segment} | {"%2F", "%00", "%ff", "%2e"}
    ),
    "ipc": [],
    "connection": [
        "GET ", "POST ", "HEAD ", "OPTIONS ", "CONNECT ", " HTTP/1.1\r\n", " HTTP/1.0\r\n", "\r\n", "\n", "\r", "\t",
        "Host: x\r\n", "Content-Length: ", "Transfer-Encoding: ", "chunked", "identity", "Connection: ", "close",
        "keep-alive", "Upgrade: ", "websocket", "h2c", "Expect: 100-continue\r\n", "0\r\n\r\n", "5\r\nhello\r\n",
        ";a=b", ": ", "\0", "ffffffffffffffff", "18446744073709551616",
    ],
}  # fmt: skip
