"""The requests that are written down: every endpoint, every rule of the protocol, good and bad."""

import base64
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .exchange import NUMPY, Request, Tensor, binary, compact, get, infer, post, raw
from .repository import DATATYPES, MODELS

# What models of the source `gate` wait for.
GATE = Path(tempfile.gettempdir()) / f"differential-gate-{os.getpid()}"
MEMORY = f"differential-memory-{os.getpid()}"


@dataclass(frozen=True)
class Together:
    """Requests sent one after another, without waiting for the answers.

    Attributes:
        gap: seconds between two of them.
        gate_after: answers to wait for before the gate is opened to the model; -1 if it stays shut.
    """

    requests: tuple[Request, ...]
    gap: float = 0.0
    gate_after: int = -1


@dataclass(frozen=True)
class Change:
    """A change of the repository, made once: both servers serve it. `text` None takes the file away."""

    path: str
    text: str | None


@dataclass(frozen=True)
class Pause:
    """Something both servers need time for that nothing tells of."""

    seconds: float


Step = Request | Together | Change | Pause


@dataclass(frozen=True)
class Case:
    id: str
    steps: tuple[Step, ...]


def all_cases() -> Iterator[Case]:
    """Every case, in the order in which they run: what is counted comes before what counts it."""
    for group in GROUPS:
        for name, *steps in group():
            yield Case(f"{group.__name__}/{name}", tuple(steps))


Group = Callable[[], Iterator[tuple[Any, ...]]]
GROUPS: list[Group] = []


def group(function: Group) -> Group:
    GROUPS.append(function)
    return function


VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False, True],
    **{name: [0, 1, 100] for name in NUMPY if "INT" in name},
    "UINT64": [0, 1, 2**64 - 1],
    "INT64": [-(2**63), 0, 2**63 - 1],
    "INT8": [-128, 0, 127],
    "FP32": [0.5, -1.25, 3.4e38],
    "FP64": [0.1, -0.0, 1e308],
    "FP16": [0.5, -1.25, 65504.0],
    "BYTES": ["", "ab", "é€"],
}
OTHERS: tuple[Any, ...] = (None, 1, -1, 1.5, True, "x", [], {}, ["x"], [1, -1], [1.5], [True], [None], [[1, 4]])
RESERVED = "sequence_id sequence_start sequence_end priority timeout binary_data_output headers".split()
ONES = (Tensor("INPUT0", "FP32", [1, 4], [1, 2, 3, 4.5]), Tensor("INPUT1", "FP32", [1, 4], [4, 3, 2, 1]))
# Their first bytes are not 0: Triton's parser takes that for the end of the JSON.
BINARY_ONES = (binary("INPUT0", "FP32", [1, 4], [0.1, 2, 3, 4.5]), binary("INPUT1", "FP32", [1, 4], [0.3, 3, 2, 1]))
PLAIN = Tensor("INPUT0", "FP32", [1], [1.0])
add = partial(infer, "add_sub")
fp32 = partial(infer, "identity_fp32")


def in_binary(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": {"binary_data": True, **parameters}}


def text(name: str, value: str) -> Tensor:
    return Tensor(name, "BYTES", [1], [value])


@group
def server() -> Iterator[tuple[Any, ...]]:
    """The first case of all: nothing has been counted yet."""
    yield "metrics_at_start", get("/metrics", metrics=True)
    yield "statistics_at_start", get("/v2/models/stats")
    yield "index", post("/v2/repository/index")
    for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/add_sub/ready"):
        yield f"get {path}", get(path)
        yield f"post {path}", post(path)
        yield f"slash {path}", get(path + "/")
        yield f"query {path}", get(path + "?a=b&c")
    yield "head", Request("HEAD", "/v2/health/live")
    for path in (
        "/", "/v1", "/v2/", "/v2/models", "/v2/models/", "/v2/model/add_sub", "/v2/health", "/v2/models/add_sub/other",
        "/v2/models/add_sub/versions", "/v2/models/add_sub/versions/1/other", "/v2/models/add_sub/versions/x",
        "/v2/models/add_sub/versions/x/ready", "/v2/models/add_sub/versions/1/trace/setting", "/v2/models//ready",
        "/v2/repository", "/v2/repository/models", "/v2/repository/models/add_sub", "/v2/systemsharedmemory",
        "/v2/systemsharedmemory/region/a", "/v2/trace", "/metrics", "/v2/models/add_sub/1/infer",
    ):  # fmt: skip
        yield f"unknown {path}", get(path)
    for method, path in (
        ("GET", "/v2/models/add_sub/infer"), ("PUT", "/v2/models/add_sub/infer"), ("DELETE", "/v2/models/add_sub"),
        ("POST", "/v2/models/add_sub"), ("POST", "/v2/models/add_sub/config"), ("POST", "/v2/models/stats"),
        ("POST", "/v2/models/add_sub/stats"), ("GET", "/v2/repository/index"), ("GET", "/v2/models/add_sub/generate"),
        ("GET", "/v2/models/add_sub/generate_stream"), ("GET", "/v2/repository/models/add_sub/load"),
        ("GET", "/v2/repository/models/add_sub/unload"), ("PUT", "/v2/logging"), ("PUT", "/v2/trace/setting"),
        ("POST", "/v2/systemsharedmemory/status"), ("GET", "/v2/systemsharedmemory/unregister"),
        ("GET", "/v2/systemsharedmemory/region/a/register"), ("GET", "/v2/cudasharedmemory/unregister"),
    ):  # fmt: skip
        yield f"method {method} {path}", Request(method, path)
    yield "metrics_other_path", get("/other", metrics=True)
    yield "metrics_other_method", post("/metrics", b"x", metrics=True)


@group
def models() -> Iterator[tuple[Any, ...]]:
    for name, model in MODELS.items():
        if model.loaded:
            for what in ("", "/config", "/ready"):
                yield f"{name}{what}", get(f"/v2/models/{name}{what}")
    for name, version in (
        ("versions_latest", "1"), ("versions_latest", "3"), ("versions_latest", "10"), ("versions_latest", "2"),
        ("versions_latest", "02"), ("versions_latest", "03"), ("versions_specific", "2"), ("versions_specific", "3"),
        ("versions_all", "1"), ("versions_all", "0"), ("versions_all", "9223372036854775807"),
        ("versions_all", "99999999999999999999"), ("absent", "1"), ("later", "1"), ("add_sub", "-1"),
    ):  # fmt: skip
        for what in ("", "/config", "/ready", "/stats"):
            yield f"{name} version {version}{what}", get(f"/v2/models/{name}/versions/{version}{what}")
        request = infer(name, PLAIN)
        path = f"/v2/models/{name}/versions/{version}/infer"
        yield f"{name} version {version}/infer", Request("POST", path, request.body)
    for name in ("absent", "later", "broken"):
        for what in ("", "/config", "/ready", "/stats", "/trace/setting"):
            yield f"{name}{what}", get(f"/v2/models/{name}{what}")
        for what in ("infer", "generate", "generate_stream"):
            yield f"{name}/{what}", post(f"/v2/models/{name}/{what}", {"inputs": []})
    for name in ("versions_latest", "versions_specific", "versions_all"):
        yield f"{name} without a version", infer(name, PLAIN)


@group
def datatypes() -> Iterator[tuple[Any, ...]]:
    for name in DATATYPES:
        model, values = f"identity_{name.lower()}", VALUES[name]
        tensor, packed = Tensor("INPUT0", name, [1, 3], values), binary("INPUT0", name, [1, 3], values)
        yield f"{name} json", infer(model, tensor)
        yield f"{name} binary to json", infer(model, packed)
        yield f"{name} binary", infer(model, packed, outputs=[in_binary("OUTPUT0")])
        yield f"{name} all outputs binary", infer(model, packed, parameters={"binary_data_output": True})
        if name != "FP16":
            yield f"{name} empty json", infer(model, Tensor("INPUT0", name, [1, 0], []))
        yield (
            f"{name} empty binary",
            infer(model, binary("INPUT0", name, [1, 0], []), outputs=[in_binary("OUTPUT0")], header_length=None),
        )
        yield f"{name} rows", infer(model, binary("INPUT0", name, [3, 1], values), outputs=[in_binary("OUTPUT0")])
        for kind, data in {
            "null": [None] * 3, "boolean": [True] * 3, "float": [1.5] * 3, "string": ["1"] * 3, "object": [{}] * 3,
            "minus": [-1] * 3, "huge": [2**64] * 3, "large": [300] * 3, "larger": [70000] * 3,
            "large float": [1e39] * 3,
        }.items():  # fmt: skip
            yield f"{name} of {kind}", infer(model, Tensor("INPUT0", name, [1, 3], data))
        yield f"{name} declared BF16", infer(model, Tensor("INPUT0", "BF16", [1, 3], raw=b"\0" * 6))
        short = raw(name, values)[:-1]
        yield f"{name} binary short", infer(model, Tensor("INPUT0", name, [1, 3], raw=short))
        yield f"{name} binary one too many", infer(model, binary("INPUT0", name, [1, 2], values))
    for value in (0.1, 1 / 3, 16777217.0, 1e-45, 1.17549435e-38, 123456789.125, -0.0):
        for datatype in ("fp32", "fp64"):
            tensor = Tensor("INPUT0", datatype.upper(), [1, 1], [value])
            yield f"{datatype} exactly {value!r}", infer(f"identity_{datatype}", tensor)
    special = [float("nan"), float("inf"), float("-inf")]
    for datatype in ("FP32", "FP64"):
        yield (
            f"{datatype} special binary",
            infer(f"identity_{datatype.lower()}", binary("INPUT0", datatype, [1, 3], special)),
        )
        yield (
            f"{datatype} special json",
            infer(f"identity_{datatype.lower()}", Tensor("INPUT0", datatype, [1, 3], special)),
        )
    yield "BOOL any byte is true", infer("identity_bool", Tensor("INPUT0", "BOOL", [1, 3], raw=b"\0\x02\xff"))
    for name, data in {
        "not utf-8": raw("BYTES", [b"\xff\xfe"]), "zero": raw("BYTES", [b"\0"]), "quotes": raw("BYTES", [b'"\\\n\x1f']),
        "cut in the length": b"\1\0", "cut in the text": b"\5\0\0\0ab", "length only": b"\4\0\0\0",
        "two": raw("BYTES", [b"a", b"b"]), "none": b"", "tail": raw("BYTES", [b"a"]) + b"\0",
    }.items():  # fmt: skip
        tensor = Tensor("INPUT0", "BYTES", [1, 1], raw=data)
        yield f"BYTES {name}", infer("identity_bytes", tensor, header_length=None if not data else "")
        yield f"BYTES {name} binary", infer("identity_bytes", tensor, outputs=[in_binary("OUTPUT0")])


@group
def parsing() -> Iterator[tuple[Any, ...]]:
    path = "/v2/models/add_sub/infer"
    for name, body in {
        "empty": b"", "not json": b"{nope}", "cut": b'{"inputs":[', "array": b"[]", "number": b"1", "string": b'"a"',
        "null": b"null", "object": b"{}", "two values": b"{} {}", "trailing comma": b'{"inputs":[],}',
        "not utf-8": b"\xff",
        "deep": b'{"inputs":' + b"[" * 60 + b"]" * 60 + b"}", "inputs null": b'{"inputs":null}',
        "inputs object": b'{"inputs":{}}', "inputs empty": b'{"inputs":[]}', "input number": b'{"inputs":[1]}',
        "input empty": b'{"inputs":[{}]}', "single quotes": b"{'inputs':[]}", "comment": b'{"inputs":[] /* x */}',
        "byte order mark": b'\xef\xbb\xbf{"inputs":[]}',
    }.items():  # fmt: skip
        yield f"body {name}", post(path, body)
    good = ONES[0].json()
    for key in ("name", "datatype", "shape", "data"):
        yield (
            f"input without {key}",
            post(path, {"inputs": [{k: v for k, v in good.items() if k != key}, ONES[1].json()]}),
        )
        for value in OTHERS:
            changed = {**good, key: value}
            yield f"input {key} {value!r}", post(path, {"inputs": [changed, ONES[1].json()]})
    members: dict[str, tuple[Any, ...]] = {
        "id": (1, None, "", "é", "a" * 300, [], True),
        "parameters": (None, [], "x", {}, {"a": None}, {"a": []}, {"a": {}}, {"a": 1.5}, {"a": True}, {"triton_x": 1}),
        "outputs": (None, {}, "x", [1], [{}], [{"name": 1}], [{"name": "OTHER"}], [], [{"name": "OUTPUT0"}] * 2),
        "other": (1, {"a": []}),
    }  # fmt: skip
    for key, values in members.items():
        for value in values:
            shown = repr(value)[:40]
            yield f"{key} {shown}", post(path, {"inputs": [t.json() for t in ONES], key: value})
    for name in RESERVED:
        for value in (0, 1, -1, 1.5, "x", "1", True, None, []):
            yield f"parameter {name} {value!r}", add(*ONES, parameters={name: value})
    of_output: tuple[dict[str, Any], ...] = (
        {"binary_data": 1}, {"binary_data": "true"}, {"binary_data": None}, {"other": 1}, {"classification": "x"},
        {"classification": 0}, {"classification": -1}, {"shared_memory_region": "none"}, {"shared_memory_region": 1},
        {"shared_memory_region": "none", "shared_memory_byte_size": 4}, {"shared_memory_byte_size": 4},
        {"shared_memory_region": "none", "shared_memory_byte_size": 4, "binary_data": True},
        {"shared_memory_region": "none", "shared_memory_byte_size": 4, "classification": 1},
    )  # fmt: skip
    for parameters in of_output:
        yield f"output with {parameters}", add(*ONES, outputs=[{"name": "OUTPUT0", "parameters": parameters}])
    yield "output parameters array", add(*ONES, outputs=[{"name": "OUTPUT0", "parameters": []}])
    of_input: tuple[dict[str, Any], ...] = (
        {"binary_data_size": 16}, {"binary_data_size": -1}, {"binary_data_size": "16"}, {"binary_data_size": 1.5},
        {"binary_data_size": 0}, {"binary_data_size": None}, {"shared_memory_region": "none"}, {"other": 1},
        {"shared_memory_region": "none", "shared_memory_byte_size": 16},
        {"shared_memory_region": "none", "shared_memory_byte_size": 16, "binary_data_size": 16},
    )  # fmt: skip
    for parameters in of_input:
        yield (
            f"input with data and {parameters}",
            add(Tensor("INPUT0", "FP32", [1, 4], [1.0] * 4, None, parameters), ONES[1]),
        )
        yield f"input with {parameters}", add(Tensor("INPUT0", "FP32", [1, 4], None, None, parameters), ONES[1])
    yield "nested data", add(Tensor("INPUT0", "FP32", [1, 4], [[1.0, 2.0], [3.0, 4.0]]), ONES[1])
    yield "deeply nested data", add(Tensor("INPUT0", "FP32", [1, 4], [[[[1]]], 2, [3, [4]]]), ONES[1])
    yield "nested strings", infer("strings", Tensor("TEXT", "BYTES", [1, 2], [["a", ["b"]]]))
    yield "same key twice", post(path, b'{"id":"a","id":"b","inputs":' + compact([t.json() for t in ONES]) + b"}")
    yield "escaped text", post(path, compact({"id": "\u2028\n", "inputs": [t.json() for t in ONES]}))
    yield (
        "escaped surrogates",
        post(path, b'{"id":"\\ud83d\\ude00","inputs":' + compact([t.json() for t in ONES]) + b"}"),
    )
    yield "lone surrogate", post(path, b'{"id":"\\ud83d","inputs":' + compact([t.json() for t in ONES]) + b"}")
    yield "integer as 1.0", post(path, {"inputs": [{**good, "shape": [1.0, 4]}, ONES[1].json()]})
    yield (
        "integer as 1e0",
        post(path, b'{"inputs":[{"name":"INPUT0","datatype":"FP32","shape":[1e0,4],"data":[1,2,3,4]}]}'),
    )


@group
def framing() -> Iterator[tuple[Any, ...]]:
    header = add(*BINARY_ONES)
    for length in ("0", "1", "-1", "xx", "", "100000", "99999999999999999999", "+10", " 50", "0x10", "1.5", "10x"):
        yield f"header length {length!r}", add(*BINARY_ONES, header_length=length)
    yield "no header length", add(*BINARY_ONES, header_length=None)
    yield "header length of json alone", add(*ONES, header_length=str(len(add(*ONES).body)))
    yield "header length one short", add(*BINARY_ONES, header_length=str(len(header.body) - 33))
    yield "header length one long", add(*BINARY_ONES, header_length=str(len(header.body) - 31))
    yield "additional bytes", add(*BINARY_ONES, tail=b"xyz")
    yield "additional bytes after json", add(*ONES, tail=b"xyz")
    yield "missing bytes", Request("POST", header.path, header.body[:-3], header.headers)
    for size in (0, 15, 17, 32, 2**40):
        first = Tensor("INPUT0", "FP32", [1, 4], None, BINARY_ONES[0].raw, {"binary_data_size": size})
        yield f"binary_data_size {size}", add(first, BINARY_ONES[1])
    yield "json and binary inputs", add(ONES[0], BINARY_ONES[1])
    yield "binary and json inputs", add(BINARY_ONES[0], ONES[1])
    wishes: tuple[list[Any], ...] = (
        ["OUTPUT0"], ["OUTPUT1"], ["OUTPUT1", "OUTPUT0"], [in_binary("OUTPUT1"), "OUTPUT0"], [in_binary("OUTPUT1")],
        [in_binary("OUTPUT1"), in_binary("OUTPUT0")], [{"name": "OUTPUT0", "parameters": {"binary_data": False}}], [],
        ["OUTPUT0", "OTHER"], ["INPUT0"],
    )  # fmt: skip
    for outputs in wishes:
        for wanted in (None, True, False):
            parameters: dict[str, Any] = {} if wanted is None else {"parameters": {"binary_data_output": wanted}}
            shown = ",".join(str(o) if isinstance(o, str) else o["name"] + "*" for o in outputs)
            yield f"outputs [{shown}] binary_data_output {wanted}", add(*ONES, outputs=outputs, **parameters)
    zero = "/v2/models/{}/infer"
    deduced = ("Inference-Header-Content-Length", "0")
    for model, body in {
        "identity_single": raw("FP32", [1, 2, 3]), "identity_fp32": raw("FP32", [1, 2]), "identity_fixed": bytes(48),
        "identity_text": b"text", "variable": bytes(24), "variable_two": bytes(24), "add_sub": bytes(16),
        "identity_bool": b"\1\0", "identity_bytes": b"text", "identity_fp16": b"\0\0", "classes_single": bytes(16),
        "reshaped_scalar": bytes(4), "absent": b"x", "repeat": bytes(4), "identity_int64": bytes(8),
    }.items():  # fmt: skip
        yield f"raw {model}", post(zero.format(model), body, deduced)
        yield f"raw {model} one byte more", post(zero.format(model), body + b"\0", deduced)
    yield "raw, of nothing", post(zero.format("identity_fp32"), b"", deduced)
    yield "raw, of nothing, without a length", post(zero.format("identity_fp32"), b"")
    yield "raw text, of nothing", post(zero.format("identity_text"), b"", deduced)
    yield "raw with the version", post("/v2/models/identity_fp32/versions/1/infer", raw("FP32", [1]), deduced)


@group
def compression() -> Iterator[tuple[Any, ...]]:
    request = add(*BINARY_ONES)
    codings: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}
    for coding, pack in codings.items():
        headers = (*request.headers, ("Content-Encoding", coding))
        yield f"request {coding}", Request("POST", request.path, pack(request.body), headers)
        both = (*headers, ("Accept-Encoding", coding))
        yield f"both {coding}", Request("POST", request.path, pack(request.body), both)
        yield f"request {coding} json", Request("POST", request.path, pack(add(*ONES).body), headers[-1:])
        yield f"error {coding}", Request("POST", request.path, pack(b"{}"), both[-2:])
    plain = zlib.compressobj(wbits=-15)
    raw_deflate = plain.compress(request.body) + plain.flush()
    for name, coding, body in (
        ("raw deflate", "deflate", raw_deflate), ("no gzip", "gzip", request.body),
        ("cut gzip", "gzip", gzip.compress(request.body)[:-12]),
        ("unknown", "br", request.body), ("capitals", "GZIP", gzip.compress(request.body)), ("empty", "", request.body),
        ("two", "gzip, deflate", request.body), ("gzip of nothing", "gzip", gzip.compress(b"")),
        ("nothing", "gzip", b""),
    ):  # fmt: skip
        yield f"request {name}", Request("POST", request.path, body, (*request.headers, ("Content-Encoding", coding)))
    for accept in (
        "gzip", "deflate", "identity", "*", "br", "gzip, deflate", "deflate, gzip", "gzip;q=0.5, deflate;q=0.8",
        "gzip;q=0",
        "GZIP", "identity;q=1, gzip;q=0.5", "gzip;q=x", "", "gzip;q=0.5,*", " gzip ", "deflate;q=1.0,gzip;q=1.0", ",",
        "br, gzip",
    ):  # fmt: skip
        yield f"accept {accept!r}", add(*BINARY_ONES, headers=(("Accept-Encoding", accept),))
        yield (
            f"accept {accept!r} binary",
            add(*BINARY_ONES, outputs=[in_binary("OUTPUT0")], headers=(("Accept-Encoding", accept),)),
        )
    yield "metadata is not compressed", Request("GET", "/v2/models/add_sub", headers=(("Accept-Encoding", "gzip"),))


@group
def validation() -> Iterator[tuple[Any, ...]]:
    one, two = ONES
    ids: tuple[dict[str, Any], ...] = ({}, {"id": "mine"})
    for named in ids:
        suffix = " with an id" if named else ""
        yield f"no inputs{suffix}", add(**named)
        yield f"one missing{suffix}", add(one, **named)
        yield f"one too many{suffix}", add(one, two, Tensor("INPUT2", "FP32", [1, 4], [1.0] * 4), **named)
        yield f"other name{suffix}", add(one, Tensor("OTHER", "FP32", [1, 4], [1.0] * 4), **named)
        yield f"same twice{suffix}", add(one, one, **named)
        yield f"unknown output{suffix}", add(*ONES, outputs=["OTHER"], **named)
        yield f"unknown output and missing input{suffix}", add(one, outputs=["OTHER"], **named)
        yield f"other datatype{suffix}", add(one, Tensor("INPUT1", "INT32", [1, 4], [1] * 4), **named)
        for shape in ([4], [1, 3], [1, 4, 1], [], [0, 4], [9, 4], [1, 0], [2, 2]):
            count = 1
            for size in shape:
                count *= size
            bad = Tensor("INPUT0", "FP32", shape, [1.0] * count)
            yield f"shape {shape}{suffix}", add(bad, two, **named)
            yield f"both shapes {shape}{suffix}", add(bad, Tensor("INPUT1", "FP32", shape, [1.0] * count), **named)
        yield f"rows differ{suffix}", add(one, Tensor("INPUT1", "FP32", [2, 4], [1.0] * 8), **named)
        single = [Tensor(n, "INT32", [2, 3], [1] * 6) for n in ("INPUT0", "INPUT1")]
        yield f"shape without batching{suffix}", infer("add_sub_single", *single, **named)
        yield (
            f"rank without batching{suffix}",
            infer("add_sub_single", *[Tensor(n, "INT32", [1, 2, 2], [1] * 4) for n in ("INPUT0", "INPUT1")], **named),
        )
    yield "most rows", add(*(Tensor(t.name, "FP32", [8, 4], [0.5] * 32) for t in ONES))
    yield "inputs in another order", add(two, one)
    yield (
        "without batching",
        infer("add_sub_single", *[Tensor(n, "INT32", [2, 2], [1, -2, 3, 4]) for n in ("INPUT0", "INPUT1")]),
    )
    for shape in ([2**62, 4], [2**63, 1], [2**64, 1], [2**32, 2**32], [2**61, 4]):  # not [1, 2**62]: Triton dies of it
        yield f"huge shape {shape}", fp32(Tensor("INPUT0", "FP32", shape, [1.0]))
        yield f"huge shape {shape} binary", fp32(binary("INPUT0", "FP32", shape, [1.0]))
    for datatype in ("FLOAT", "fp32", "", "STRING", "TYPE_FP32", "FP8", "INT4"):
        yield f"datatype {datatype!r}", fp32(Tensor("INPUT0", datatype, [1, 1], [1.0]))
    for shape in ([1, 3], [2, 3], [0, 3], [3], [1, 2, 3], [1, 4]):
        count = 1
        for size in shape:
            count *= size
        yield f"variable {shape}", infer("variable", Tensor("INPUT0", "FP32", shape, [0.25] * count))
        yield f"variable_two {shape}", infer("variable_two", Tensor("INPUT0", "FP32", shape, [0.25] * count))
    yield "strings", infer("strings", Tensor("TEXT", "BYTES", [2, 2], ["a", "bc", "", "é"]))
    yield (
        "strings binary",
        infer(
            "strings", binary("TEXT", "BYTES", [2, 2], ["a", "bc", "", "é"]), parameters={"binary_data_output": True}
        ),
    )
    yield (
        "two inputs of any size",
        infer(
            "identity_two",
            Tensor("INPUT0", "INT32", [2, 3], list(range(6))),
            Tensor("INPUT1", "BYTES", [2, 1], ["x", "y"]),
        ),
    )
    yield "reshaped", infer("reshaped", Tensor("INPUT0", "FP32", [2, 4], [0.5] * 8))
    yield "reshaped as the model sees it", infer("reshaped", Tensor("INPUT0", "FP32", [1, 2, 2], [0.5] * 4))
    yield "reshaped to a scalar", infer("reshaped_scalar", Tensor("INPUT0", "FP32", [3, 1], [0.5] * 3))
    yield "reshaped to a scalar, without", infer("reshaped_scalar", Tensor("INPUT0", "FP32", [3], [0.5] * 3))
    a, b, c = (
        Tensor("A", "FP32", [1, 2], [1.0, 2.0]),
        Tensor("B", "FP32", [1, 2], [3.0, 4.0]),
        Tensor("C", "INT32", [1, 1], [5]),
    )
    for given in ((a,), (a, b), (a, c), (a, b, c), (b,), (), (b, c), (a, b, c, PLAIN), (a, PLAIN)):
        yield f"optional {'+'.join(t.name for t in given)}", infer("optional", *given)
    yield "optional of another shape", infer("optional", a, Tensor("B", "FP32", [1, 3], [1.0] * 3))
    yield "auto complete", infer("auto", Tensor("INPUT0", "FP32", [1, 2, 2], [0.5] * 4))
    yield "auto complete in part", infer("auto_partial", Tensor("INPUT0", "FP32", [1, 1, 2], [0.5] * 2))
    for name in ("args", "args_named"):
        yield f"initialize of {name}", infer(name, PLAIN)

    yield "sixty-four dimensions", infer("variable", Tensor("INPUT0", "FP32", [1] * 64, [1.0]))


@group
def parameters() -> Iterator[tuple[Any, ...]]:
    echo = partial(infer, "echo", Tensor("INPUT0", "FP32", [1, 1], [1.0]))
    yield "none", echo()
    yield "id", echo(id="my id é")
    yield "of every kind", echo(parameters={"text": 'é"', "whole": -5, "yes": True, "no": False, "zero": 0, "": "x"})
    yield "a double", echo(parameters={"half": 0.5})
    yield "large whole number", echo(parameters={"large": 2**62, "larger": 2**63 - 1})
    yield "unsigned", echo(parameters={"large": 2**63})
    yield "beyond", echo(parameters={"large": 2**64})
    yield "nothing", echo(parameters={})
    yield "of the protocol", echo(parameters={"priority": 1, "timeout": 5, "binary_data_output": False, "own": 1})
    yield "sequence", echo(parameters={"sequence_id": 5, "sequence_start": True, "sequence_end": True})
    yield "sequence text", echo(parameters={"sequence_id": "five", "sequence_start": True})
    yield "sequence end", echo(parameters={"sequence_id": 5, "sequence_end": True})
    yield "sequence too large", echo(parameters={"sequence_id": 2**64})
    yield "headers", echo(headers=(("X-Own", "1"),))
    yield "input parameters", infer("echo", Tensor("INPUT0", "FP32", [1, 1], [1.0], None, {"own": 1}))
    for outputs in (["OTHER"], ["REQUEST", "OTHER"], ["OTHER", "REQUEST"]):
        yield f"outputs {outputs}", echo(outputs=outputs)


@group
def classification() -> Iterator[tuple[Any, ...]]:
    values = Tensor("INPUT0", "FP32", [2, 4], [1.5, 3.25, -1.0, 2.0, 0.0, 0.0, 7.0, 1e-3])
    whole = Tensor("INPUT1", "INT32", [2, 2, 2], [1, 5, -3, 7, 4, 3, 2, 1])
    for count in (1, 2, 4, 10):
        for form in ({}, {"binary_data": True}):
            wanted = [{"name": n, "parameters": {"classification": count, **form}} for n in ("OUTPUT0", "OUTPUT1")]
            yield f"{count} {'binary' if form else 'json'}", infer("classes", values, whole, outputs=wanted)
    one = {"name": "OUTPUT0", "parameters": {"classification": 2}}
    yield "one output of two", infer("classes", values, whole, outputs=[one, in_binary("OUTPUT1")])
    for data in ([1.5, -2.5], [1.0], [float(i) for i in range(5)], [1e20, 1e-20, 123456.789]):
        yield (
            f"without batching {data}",
            infer("classes_single", Tensor("INPUT0", "FP64", [len(data)], data), outputs=[one]),
        )
    yield "ties", infer("classes_single", Tensor("INPUT0", "FP64", [4], [1.0, 2.0, 2.0, 1.0]), outputs=[one])
    yield "of FP16", infer("classes_half", binary("INPUT0", "FP16", [3], [1, 2, 3]), outputs=[one])
    for name in ("BOOL", "UINT8", "INT8", "UINT64", "INT64"):
        tensor = Tensor("INPUT0", name, [1, 3], VALUES[name])
        yield f"of {name}", infer(f"identity_{name.lower()}", tensor, outputs=[one])


@group
def failures() -> Iterator[tuple[Any, ...]]:
    modes = (
        "good", "ValueError", "KeyError", "TritonModelException", "error", "error with outputs", "too few", "too many",
        "not a list", "a tuple", "wrong element", "no outputs", "another name", "an extra output", "another datatype",
        "another shape", "nothing in it", "strings",
        "code:UNKNOWN", "code:INTERNAL", "code:NOT_FOUND", "code:INVALID_ARG", "code:UNAVAILABLE", "code:UNSUPPORTED",
        "code:ALREADY_EXISTS", "code:CANCELLED",
    )  # fmt: skip
    for mode in modes:
        yield mode, infer("failing", text("MODE", mode), id="me")
        yield f"{mode}, output named", infer("failing", text("MODE", mode), outputs=["OUTPUT0"])
        yield f"{mode}, generate", post("/v2/models/failing/generate", {"MODE": mode})
        yield f"{mode}, stream", post("/v2/models/failing/generate_stream", {"MODE": mode})
    for mode in ("nothing", "unknown flag", "final first", "other"):
        yield f"sender {mode}", infer("sender", text("MODE", mode))


@group
def bls() -> Iterator[tuple[Any, ...]]:
    for mode in (
        "one", "one output", "a version", "an unknown version", "an unknown model", "a wrong input",
        "an unknown output",
        "failing", "no outputs", "no model", "decoupled", "decoupled none", "decoupled as one", "one as decoupled",
        "echo",
        "ready",
    ):  # fmt: skip
        yield mode, infer("bls", text("MODE", mode))
    for name in ("add_sub", "absent"):
        yield f"async {name}", infer("bls_async", text("MODEL", name))


@group
def generate() -> Iterator[tuple[Any, ...]]:
    bodies: dict[str, tuple[str, Any]] = {
        "text": ("strings", {"TEXT": "hello"}), "texts": ("strings", {"TEXT": ["a", "b"]}),
        "id": ("strings", {"TEXT": "a", "id": "x"}),
        "id number": ("strings", {"TEXT": "a", "id": 5}), "id empty": ("strings", {"TEXT": "a", "id": ""}),
        "parameters": ("echo", {"INPUT0": 1.5, "id": "x", "own": "a", "whole": 3, "yes": True, "half": 0.5}),
        "parameters object": ("echo", {"INPUT0": 1.5, "parameters": {"own": "a", "whole": 3}}),
        "inputs in parameters": ("echo", {"parameters": {"INPUT0": 2, "own": "a"}}), "empty": ("echo", {}),
        "parameters number": ("echo", {"INPUT0": 1, "parameters": 5}),
        "nested": ("echo", {"INPUT0": 1, "parameters": {"nested": {}}}),
        "null": ("echo", {"INPUT0": 1, "own": None}), "array parameter": ("echo", {"INPUT0": 1, "own": [1]}),
        "null input": ("echo", {"INPUT0": None}), "string for a number": ("echo", {"INPUT0": "1"}),
        "boolean": ("echo", {"INPUT0": True}),
        "two for one": ("echo", {"INPUT0": [1.0, 2.0]}), "three for one": ("echo", {"INPUT0": [1.0, 2.0, 3.0]}),
        "nested array": ("echo", {"INPUT0": [[1.0]]}), "object": ("echo", {"INPUT0": {}}),
        "no elements": ("echo", {"INPUT0": []}),
        "divisible": ("add_sub", {"INPUT0": [1, 2, 3, 4], "INPUT1": [1, 2, 3, 4]}),
        "two rows": ("add_sub", {"INPUT0": [1] * 8, "INPUT1": [2] * 8}),
        "not divisible": ("add_sub", {"INPUT0": [1, 2, 3], "INPUT1": [1] * 4}),
        "one missing": ("add_sub", {"INPUT0": [1, 2, 3, 4]}), "variable": ("variable", {"INPUT0": [0.5] * 6}),
        "variable not divisible": ("variable", {"INPUT0": [0.5] * 5}),
        "variable two": ("variable_two", {"INPUT0": [0.5] * 6}),
        "fixed": ("identity_fixed", {"INPUT0": list(range(6))}), "bool": ("identity_bool", {"INPUT0": [True, False]}),
        "half": ("identity_fp16", {"INPUT0": [1.0]}), "uint8 too large": ("identity_uint8", {"INPUT0": [300]}),
        "floats for whole numbers": ("identity_int32", {"INPUT0": [1.5]}), "optional": ("optional", {"A": [1, 2]}),
        "sequence": ("echo", {"INPUT0": 1, "sequence_id": 5, "sequence_start": True}),
        "priority": ("echo", {"INPUT0": 1, "priority": 1, "timeout": 5}),
        "triton_ prefix": ("echo", {"INPUT0": 1, "triton_x": 1}),
        "inputs as in infer": ("echo", {"inputs": [PLAIN.json()]}), "unknown": ("absent", {"INPUT0": 1}),
        "reshaped": ("reshaped", {"INPUT0": [1, 2, 3, 4]}), "versions": ("versions_all", {"INPUT0": 1}),
    }  # fmt: skip
    for name, (model, body) in bodies.items():
        for kind in ("generate", "generate_stream"):
            yield f"{kind} {name}", post(f"/v2/models/{model}/{kind}", body)
    for kind in ("generate", "generate_stream"):
        path = f"/v2/models/strings/{kind}"
        yield f"{kind} same key twice", post(path, b'{"TEXT":"a","TEXT":"b"}')
        yield f"{kind} same parameter twice", post(path, b'{"TEXT":"a","x":1,"x":2}')
        for name, body in {"not json": b"nope", "array": b"[]", "nothing": b"", "number": b"5"}.items():
            yield f"{kind} {name}", post(path, body)
        for coding in ("identity", "gzip"):
            yield f"{kind} encoded {coding}", post(path, {"TEXT": "a"}, ("Content-Encoding", coding))
        yield f"{kind} accept gzip", post(path, {"TEXT": "a"}, ("Accept-Encoding", "gzip"))
        yield f"{kind} version", post(f"/v2/models/versions_all/versions/1/{kind}", {"INPUT0": 1})
        yield f"{kind} version unknown", post(f"/v2/models/versions_all/versions/9/{kind}", {"INPUT0": 1})
        for count in (0, 1, 2, 5):
            for more in ({}, {"ALONE": 0}, {"FAIL_AT": 0}, {"FAIL_AT": 1}, {"id": "x", "own": 1}):
                shown = f"{kind} repeat {count} {more or ''}"
                yield shown, post(f"/v2/models/repeat/{kind}", {"COUNT": count, **more})
    yield "infer of a decoupled model", infer("repeat", Tensor("COUNT", "INT32", [1], [1]))


@group
def shared_memory() -> Iterator[tuple[Any, ...]]:
    base = "/v2/systemsharedmemory"
    key = f"/{MEMORY}"
    status, unregister = get(f"{base}/status"), post(f"{base}/unregister")

    def register(name: str, **body: Any) -> Request:
        return post(f"{base}/region/{name}/register", body)

    yield "none", status
    yield (
        "register",
        register("a", key=key, offset=0, byte_size=128),
        status,
        get(f"{base}/region/a/status"),
        unregister,
        status,
    )
    yield "register with an offset", register("b", key=key, offset=4096, byte_size=32), status, unregister
    yield "register with any offset", register("b", key=key, offset=16, byte_size=32), unregister
    yield "register without an offset", register("b", key=key, byte_size=32), get(f"{base}/region/b/status"), unregister
    yield "register twice", register("a", key=key, byte_size=32), register("a", key=key, byte_size=32), unregister
    yield "two", register("a", key=key, byte_size=32), register("b", key=key, byte_size=16), unregister
    yield (
        "unregister one", register("a", key=key, byte_size=32), post(f"{base}/region/a/unregister"), status,
        post(f"{base}/region/a/unregister"), get(f"{base}/region/a/status"),
    )  # fmt: skip
    wrong: dict[str, dict[str, Any]] = {
        "no key": {"byte_size": 8}, "no size": {"key": key}, "unknown key": {"key": "/not-there", "byte_size": 8},
        "too large": {"key": key, "byte_size": 10**6},
        "offset too large": {"key": key, "byte_size": 8, "offset": 10**6},
        "key number": {"key": 1, "byte_size": 8}, "size text": {"key": key, "byte_size": "8"},
        "size minus": {"key": key, "byte_size": -8},
        "size 0": {"key": key, "byte_size": 0},
        "reserved": {"key": "triton_python_backend_shm_region_1", "byte_size": 8},
        "offset text": {"key": key, "byte_size": 8, "offset": "x"}, "more": {"key": key, "byte_size": 8, "other": 1},
        "path": {"key": "/../../etc/hostname", "byte_size": 1}, "empty key": {"key": "", "byte_size": 8},
        "null offset": {"key": key, "byte_size": 8, "offset": None}, "no slash": {"key": MEMORY, "byte_size": 8},
    }  # fmt: skip
    for name, body in wrong.items():
        yield f"register {name}", register("bad", **body), status, unregister
    yield "register not json", post(f"{base}/region/bad/register", b"nope")
    yield "register nothing", post(f"{base}/region/bad/register")
    yield "status of unknown", get(f"{base}/region/none/status")
    yield "unregister unknown", post(f"{base}/region/none/unregister")
    yield "register without a name", post(f"{base}/register", {"key": key, "byte_size": 8})

    def at(region: str, size: int, offset: int | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {"shared_memory_region": region, "shared_memory_byte_size": size}
        return found if offset is None else {**found, "shared_memory_offset": offset}

    def placed(size: int, offset: int | None = None, region: str = "a", shape: tuple[int, ...] = (1, 4)) -> Tensor:
        return Tensor("INPUT0", "FP32", list(shape), None, None, at(region, size, offset))

    region = register("a", key=key, byte_size=128)
    yield "input", region, fp32(placed(16)), unregister
    yield "input with an offset", region, fp32(placed(16, 32)), unregister
    yield "input binary out", region, fp32(placed(16, 32), outputs=[in_binary("OUTPUT0")]), unregister
    yield "input too short", region, fp32(placed(12)), unregister
    yield "input too long", region, fp32(placed(20)), unregister
    yield "input beyond", region, fp32(placed(16, 120)), unregister
    yield "input far beyond", region, fp32(placed(16, 10000)), unregister
    yield "input unknown region", region, fp32(placed(16, region="z")), unregister
    yield "input minus", region, fp32(placed(16, -1)), unregister
    yield (
        "input without a size",
        region,
        fp32(Tensor("INPUT0", "FP32", [1, 4], None, None, {"shared_memory_region": "a"})),
        unregister,
    )
    yield "input with data", region, fp32(Tensor("INPUT0", "FP32", [1, 4], [1.0] * 4, None, at("a", 16))), unregister
    for size, offset in ((16, None), (16, 64), (32, 0), (8, 0), (16, 120), (16, 10000)):
        output = {"name": "OUTPUT0", "parameters": at("a", size, offset)}
        yield f"output of {size} at {offset}", region, fp32(placed(16), outputs=[output], memory=MEMORY), unregister
    output = {"name": "OUTPUT0", "parameters": at("z", 16)}
    yield "output unknown region", region, fp32(placed(16), outputs=[output]), unregister
    output = {"name": "OUTPUT0", "parameters": at("a", 16, 64)}
    yield (
        "output of json data",
        region,
        fp32(Tensor("INPUT0", "FP32", [1, 4], [1.0, 2.0, 3.0, 4.0]), outputs=[output], memory=MEMORY),
        unregister,
    )
    strings = {"name": "OUTPUT0", "parameters": at("a", 64, 64)}
    yield (
        "strings", region,
        infer("identity_bytes", Tensor("INPUT0", "BYTES", [1, 2], ["ab", "c"]), outputs=[strings], memory=MEMORY),
        unregister,
    )  # fmt: skip
    yield "unregistered", region, unregister, fp32(placed(16))
    cuda = "/v2/cudasharedmemory"
    yield "cuda none", get(f"{cuda}/status")
    yield "cuda status of unknown", get(f"{cuda}/region/none/status")
    yield "cuda unregister", post(f"{cuda}/unregister"), post(f"{cuda}/region/none/unregister")
    yield (
        "cuda status of system",
        region,
        get(f"{cuda}/region/a/status"),
        post(f"{cuda}/region/a/unregister"),
        status,
        unregister,
    )
    handle = {"b64": base64.b64encode(bytes(64)).decode()}
    handles: dict[str, dict[str, Any]] = {
        "no handle": {"device_id": 0, "byte_size": 8},
        "handle text": {"raw_handle": "x", "device_id": 0, "byte_size": 8},
        "short handle": {"raw_handle": {"b64": "AAAA"}, "device_id": 0, "byte_size": 8},
        "no size": {"raw_handle": handle, "device_id": 0},
        "no device": {"raw_handle": handle, "byte_size": 8},
        "bad handle": {"raw_handle": handle, "device_id": 0, "byte_size": 8},
    }  # fmt: skip
    for name, body in handles.items():
        yield f"cuda register {name}", post(f"{cuda}/region/c/register", body), get(f"{cuda}/status")


@group
def settings() -> Iterator[tuple[Any, ...]]:
    trace, logging = "/v2/trace/setting", "/v2/logging"
    model = "/v2/models/add_sub/trace/setting"
    reset = post(trace, {"trace_level": None, "trace_rate": None, "trace_count": None, "log_frequency": None})
    yield "trace", get(trace), get(model)
    for name, body in {
        "rate": {"trace_rate": "5"}, "count": {"trace_count": "7"}, "frequency": {"log_frequency": "3"},
        "off": {"trace_level": ["OFF"]},
        "nothing": {}, "unknown": {"other": "1"}, "file": {"trace_file": "x"}, "rate number": {"trace_rate": 5},
        "rate text": {"trace_rate": "x"},
        "count -1": {"trace_count": "-1"}, "count -2": {"trace_count": "-2"},
        "count text": {"trace_count": "x"},
        "frequency text": {"log_frequency": "x"}, "level text": {"trace_level": "OFF"},
        "levels": {"trace_level": ["TIMESTAMPS"]},
        "off and more": {"trace_level": ["OFF", "TIMESTAMPS"]}, "unknown level": {"trace_level": ["OTHER"]},
        "mode": {"trace_mode": "triton"},
        "rate huge": {"trace_rate": "99999999999999999999"}, "level numbers": {"trace_level": [1]},
        "file null": {"trace_file": None},
    }.items():  # fmt: skip
        yield f"trace {name}", post(trace, body), get(trace), reset
        clear = {"trace_level": None, "trace_rate": None, "trace_count": None, "log_frequency": None}
        yield f"trace of a model {name}", post(model, body), get(model), get(trace), post(model, clear)
    for name, raw_body in {"nothing": b"", "not json": b"nope", "array": b"[]"}.items():
        yield f"trace body {name}", post(trace, raw_body)
        yield f"logging body {name}", post(logging, raw_body)
    yield "trace rate minus", post(trace, {"trace_rate": "-5"}), reset
    yield "trace of unknown", post("/v2/models/absent/trace/setting", {"trace_rate": "5"})
    yield "logging", get(logging)
    back = post(
        logging,
        {"log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0, "log_format": "default"},
    )
    for name, body in {
        "info": {"log_info": False}, "warning": {"log_warning": False}, "error": {"log_error": False},
        "verbose": {"log_verbose_level": 1},
        "format": {"log_format": "ISO8601"}, "bad format": {"log_format": "zzz"}, "file": {"log_file": "x"},
        "unknown": {"log_infos": True},
        "info text": {"log_info": "x"}, "info null": {"log_info": None}, "verbose text": {"log_verbose_level": "x"},
        "info number": {"log_info": 1},
        "verbose minus": {"log_verbose_level": -1}, "verbose float": {"log_verbose_level": 1.5},
        "format number": {"log_format": 1}, "nothing": {},
    }.items():  # fmt: skip
        yield f"logging {name}", post(logging, body), get(logging), back


@group
def batching() -> Iterator[tuple[Any, ...]]:
    def waiting(model: str, path: str = str(GATE)) -> Request:
        return infer(model, Tensor("FILE", "BYTES", [1, 1], [path]))

    free = partial(waiting, path="")
    stats = get("/v2/models/batched/stats")
    yield "four at once", Together((free("batched"),) * 4), Pause(0.2), stats
    yield "one row after the delay", free("batched"), Pause(0.2), stats
    yield "six rows at once", infer("batched", Tensor("FILE", "BYTES", [6, 1], [""] * 6)), Pause(0.2), stats
    yield (
        "queue full", Together((waiting("queue_short"),) * 4, gap=0.3, gate_after=2), Pause(0.2),
        get("/v2/models/queue_short/stats"),
    )  # fmt: skip
    yield (
        "timeout in the queue", Together((waiting("queue_timeout"),) * 2, gap=0.3, gate_after=1), Pause(0.2),
        get("/v2/models/queue_timeout/stats"),
    )  # fmt: skip


@group
def statistics() -> Iterator[tuple[Any, ...]]:
    """Models that only these requests are for: whatever else differs does not change their counts."""

    def counted(rows: int) -> Request:
        return infer("counted", *(Tensor(n, "FP32", [rows, 4], [1.0] * 4 * rows) for n in ("INPUT0", "INPUT1")))

    wait = Pause(0.2)
    yield "warm-up counts", get("/v2/models/warm/stats")
    yield (
        "good and refused", counted(1), counted(3), counted(3), infer("counted", ONES[0]),
        infer("counted", *ONES, outputs=["OTHER"]),
        wait, get("/v2/models/counted/stats"), get("/v2/models/counted/versions/1/stats"),
        get("/v2/models/counted/versions/2/stats"),
    )  # fmt: skip
    yield (
        "failures",
        *(infer("failing_counted", text("MODE", mode)) for mode in ("good", "ValueError", "error", "too few",
        "code:CANCELLED")),
        wait, get("/v2/models/failing_counted/stats"),
    )  # fmt: skip
    stream = "/v2/models/repeat_counted/generate_stream"
    yield "streams", *(post(stream, {"COUNT": n}) for n in (0, 1, 3)), wait, get("/v2/models/repeat_counted/stats")
    yield "streams, last is final", post(stream, {"COUNT": 2, "ALONE": 0}), wait, get("/v2/models/repeat_counted/stats")
    yield "streams, failing", post(stream, {"COUNT": 3, "FAIL_AT": 1}), wait, get("/v2/models/repeat_counted/stats")
    same = infer("cached", Tensor("INPUT0", "FP32", [1, 2], [1.0, 2.0]), id="x")
    other = infer("cached", Tensor("INPUT0", "FP32", [1, 2], [1.0, 2.5]))
    yield (
        "cache",
        same,
        wait,
        same,
        other,
        wait,
        infer("cached", Tensor("INPUT0", "FP32", [1, 2], [1.0, 2.0]), outputs=["OUTPUT0"]),
        wait,
        get("/v2/models/cached/stats"),
    )
    yield "custom metrics", *(infer("metrics", PLAIN),) * 2
    yield "of unknown", get("/v2/models/absent/stats")


@group
def control() -> Iterator[tuple[Any, ...]]:
    def load(name: str, body: Any = None) -> Request:
        return post(f"/v2/repository/models/{name}/load", body)

    def unload(name: str, body: Any = None) -> Request:
        return post(f"/v2/repository/models/{name}/unload", body)

    def gone(name: str) -> Request:
        return get(f"/v2/models/{name}/ready", until="(?!200)")

    def listed(name: str) -> Request:
        """What the index says of a model, when it is no longer being unloaded."""
        return post("/v2/repository/index", until="(?!.*UNLOADING)", only=name)

    index = listed("later")
    config = get("/v2/models/later/config")
    path = "/v2/repository/models/later/load"
    ask = infer("later", *ONES)
    for name, body in {
        "true": {"ready": True}, "false": {"ready": False}, "number": {"ready": 1}, "text": {"ready": "x"},
        "nothing": {},
        "null": {"ready": None}, "other": {"a": 1},
    }.items():  # fmt: skip
        yield f"index ready {name}", post("/v2/repository/index", body)
    yield "index not json", post("/v2/repository/index", b"nope")
    yield "index of a repository", post("/v2/repository/any/index")
    yield (
        "load in a repository",
        post("/v2/repository/any/models/later/load"),
        post("/v2/repository/any/models/later/unload"),
    )
    yield "load", load("later"), get("/v2/models/later/ready"), config, index
    # The first one finds what python wrote into the folder, and loads it anew.
    again = (load("later", {}), ask)
    yield "load again", *again, *again, Pause(0.2), get("/v2/models/later/stats")
    changed = json.dumps({
        "backend": "python", "max_batch_size": 3,
        "input": [{"name": n, "data_type": "TYPE_FP32", "dims": [4]} for n in ("INPUT0", "INPUT1")],
        "output": [{"name": n, "data_type": "TYPE_FP32", "dims": ["4"]} for n in ("OUTPUT0", "OUTPUT1")],
    })  # fmt: skip
    yield (
        "load with a config",
        load("later", {"parameters": {"config": changed}}),
        config,
        ask,
        Pause(0.2),
        get("/v2/models/later/stats"),
    )
    yield "plain load keeps the config", load("later"), config
    for name, parameters_ in {
        "config not json": {"config": "nope"}, "config number": {"config": 1},
        "config unknown field": {"config": '{"nope":1}'},
        "config bad value": {"config": '{"backend":"python","max_batch_size":-1}'}, "unknown key": {"other": "x"},
        "file without a config": {"file:1/model.py": "AAAA"}, "parameters array": [], "config object": {"config": {}},
    }.items():  # fmt: skip
        yield (
            f"load with {name}",
            load("later", {"parameters": parameters_}),
            get("/v2/models/later/ready"),
            config,
            ask,
        )
    for name, body in {"not json": b"nope", "array": b"[]", "cut": b"{", "number": b"5"}.items():
        yield f"load body {name}", post(path, body), get("/v2/models/later/ready")
    version = base64.b64encode(
        (Path(__file__).parent / "models/add_sub.py").read_bytes().replace(b"a + b", b"a * b")
    ).decode()
    yield (
        "load with a file", load("later", {"parameters": {"config": changed, "file:7/model.py": version}}),
        get("/v2/models/later"), ask, index,
    )  # fmt: skip
    yield (
        "load with a file outside",
        load("later", {"parameters": {"config": changed, "file:../x.py": version}}),
        get("/v2/models/later"),
    )
    yield (
        "unload",
        unload("later"),
        gone("later"),
        index,
        get("/v2/models/later"),
        ask,
        config,
        get("/v2/models/later/stats"),
    )
    yield "ready after an unload", get("/v2/health/ready")
    yield "unload again", unload("later"), unload("absent"), unload("broken")
    yield "load restores the disk", load("later"), config, ask, Pause(0.2), get("/v2/models/later/stats")
    wider = MODELS["later"].text()
    assert wider is not None
    yield (
        "load of a changed config",
        Change("later/config.pbtxt", wider.replace("max_batch_size: 8", "max_batch_size: 5")),
        load("later"),
        config,
    )
    yield (
        "load of a broken config",
        Change("later/config.pbtxt", "backend: }"),
        load("later"),
        config,
        ask,
        index,
    )
    yield "load of a config without a file", Change("later/config.pbtxt", None), load("later"), config, ask
    broken = "import absent_module\n"
    source = (Path(__file__).parent / "models/add_sub.py").read_text()
    yield (
        "load of a broken model", Change("later/config.pbtxt", wider), Change("later/1/model.py", broken),
        load("later"),
        ask, index,
    )  # fmt: skip
    yield "load of a mended model", Change("later/1/model.py", source), load("later"), config, ask, index
    yield (
        "load of a version more",
        Change("later/2/model.py", source),
        load("later"),
        get("/v2/models/later"),
        ask,
    )
    yield "unload dependents", unload("later", {"parameters": {"unload_dependents": True}}), gone("later"), index
    for name, body in {
        "not boolean": {"parameters": {"unload_dependents": "x"}},
        "unknown": {"parameters": {"a": 1}},
        "nothing": {},
    }.items():
        yield f"unload parameter {name}", unload("later", body)
    yield "unload not json", unload("later", b"nope")
    yield (
        "auto complete",
        load("later_auto"),
        get("/v2/models/later_auto/config"),
        unload("later_auto"),
        gone("later_auto"),
    )
    yield "versions", load("later_versions"), get("/v2/models/later_versions"), infer("later_versions", PLAIN)
    only = json.dumps({"backend": "python", "version_policy": {"specific": {"versions": [1]}},
        "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [1]}],
        "output": [{"name": "VERSION", "data_type": "TYPE_INT32", "dims": [1]}]})  # fmt: skip
    yield (
        "versions, policy changed", load("later_versions", {"parameters": {"config": only}}),
        get("/v2/models/later_versions"),
        get("/v2/models/later_versions/versions/2/ready", until="(?!200)"), infer("later_versions", PLAIN),
        listed("later_versions"),
    )  # fmt: skip
    yield (
        "versions unloaded",
        unload("later_versions"),
        gone("later_versions"),
        infer("later_versions", PLAIN),
        listed("later_versions"),
    )
    for name in ("absent", "broken", "bad_text", "bad_field", "bad_dims", "bad_name", "no_tensors", "no_versions"):
        yield f"load {name}", load(name), get(f"/v2/models/{name}/ready"), get(f"/v2/models/{name}"), listed(name)
    bad = {"parameters": {"config": changed, "file:1/model.py": "!!"}}
    yield "load with a bad file", load("later", bad), get("/v2/models/later/ready")
    yield "load unfinished", load("unfinished")
    yield "ready after what could not be loaded", get("/v2/health/ready"), get("/v2/health/live")
    for name in ("%20", "..%2fadd_sub", "%2e%2e"):
        yield f"load {name}", load(name)
    yield "statistics after all", get("/v2/models/later_versions/stats")


@group
def metrics() -> Iterator[tuple[Any, ...]]:
    """Of the models whose counts no other case could have changed by going wrong in its own way."""
    for name in ("counted", "failing_counted", "repeat_counted", "warm", "cached", "metrics"):
        yield name, get("/metrics", metrics=True, only=name)
