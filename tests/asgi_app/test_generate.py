"""generate and generate_stream: free-form JSON becomes the tensors that it means, and responses become JSON again."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import ml_dtypes
import numpy as np
import orjson
import pytest

from asgi_app import app
from asgi_app.generate import decode, encode
from batching import QueueFull
from engine.errors import DeviceLost, InvalidInput, ModelError, NotFound
from engine.settings import Settings
from engine.types import DATATYPES, Array, Engine, InferRequest, InferResponse, ModelMetadata, TensorSpec
from tests.asgi_app.conftest import FrontOf
from tests.client import Answer, Client
from tests.forms import Unloaded
from tests.timing import until

GENERATE, STREAM = "/v2/models/m/generate", "/v2/models/m/generate_stream"
in_memory = pytest.mark.in_memory
NOT_ONE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various number "
    "of responses"
)


def metadata(**inputs: tuple[Any, ...]) -> ModelMetadata:
    """metadata(NAME=(datatype, size, ...)) of a model called m."""
    specs = {name: TensorSpec(name, datatype, tuple(shape)) for name, (datatype, *shape) in inputs.items()}
    return ModelMetadata("m", ("1",), "python", 0, specs, {})


MODEL = metadata(PROMPT=("BYTES", -1, 1), N=("INT32", -1, 1))


def decoded(body: bytes, model: ModelMetadata = MODEL) -> InferRequest:
    return decode(model, "", body)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "failed to parse the request JSON buffer: "),
        (b"x", "failed to parse the request JSON buffer: "),
        (b'{"N":1} x', "failed to parse the request JSON buffer: "),
        (b'{"N":1', "failed to parse the request JSON buffer: "),
        (b'{"PROMPT":"\xff"}', "failed to parse the request JSON buffer: "),
        (b'{"PROMPT":"\\ud800"}', "failed to parse the request JSON buffer: "),
        (b'{"p":"\\uDC00"}', "failed to parse the request JSON buffer: "),
        (b'{"N":%b}' % (b"1" * 5000), "failed to parse the request JSON buffer: "),
        (b"[" * 100_000, "failed to parse the request JSON buffer: "),
        (b'{"a":' * 100_000, "failed to parse the request JSON buffer: "),
        (b"[]", "attempt to get members for non-object"),
        (b"3", "attempt to get members for non-object"),
        (b"null", "attempt to get members for non-object"),
        (b'{"id":3}', "Unable to parse 'id': attempt to access JSON non-string as string"),
        (b'{"id":null}', "Unable to parse 'id': attempt to access JSON non-string as string"),
        (b'{"N":1,"N":2}', "[request id: <id_unknown>] input 'N' already exists in request"),
        (b'{"N":1,"N":"x","id":"r"}', "[request id: r] input 'N' already exists in request"),
        (b'{"parameters":{"N":1},"N":2}', "[request id: <id_unknown>] input 'N' already exists in request"),
        (b'{"N":1,"parameters":{"N":2}}', "Converting keyword: 'parameters': [request id: <id_unknown>] input 'N'"),
        (b'{"p":{}}', "parameter 'p' has invalid type. It should be either 'int', 'bool', or 'string'."),
        (b'{"p":[1]}', "parameter 'p' has invalid type. It should be either 'int', 'bool', or 'string'."),
        (b'{"p":null}', "parameter 'p' has invalid type. It should be either 'int', 'bool', or 'string'."),
        (b'{"p":18446744073709551616}', "parameter 'p' has invalid type. "),
        (b'{"parameters":3}', "Expected JSON object for keyword: 'parameters': attempt to access JSON non-obj"),
        (b'{"parameters":[["N",1]]}', "Expected JSON object for keyword: 'parameters': attempt to access JSON non-obj"),
        (b'{"parameters":{"p":{}}}', "Converting keyword: 'parameters': parameter 'p' has invalid type. "),
        (b'{"parameters":{"parameters":{}}}', "Converting keyword: 'parameters': parameter 'parameters' has invalid t"),
        (b'{"p":null,"N":"x"}', "parameter 'p' has invalid type. "),
        (b'{"N":"x","p":null}', "Unable to parse 'data': attempt to access JSON non-signed-integer as signed-integer"),
    ],
)  # fmt: skip
def test_what_is_no_request(body: bytes, text: str) -> None:
    """It is refused in Triton's words, for the first key that does not fit."""
    with pytest.raises(InvalidInput) as refused:
        decoded(body)
    assert str(refused.value)[: len(text)] == text


SIGNED = "Unable to parse 'data': attempt to access JSON non-signed-integer as signed-integer"
UNSIGNED = "Unable to parse 'data': attempt to access JSON non-unsigned-integer as unsigned-integer"
NUMBER = "Unable to parse 'data': attempt to access JSON non-number as double"
BOOLEAN = "Unable to parse 'data': attempt to access JSON non-boolean as boolean"
STRING = "Unable to parse JSON bytes array: attempt to access JSON non-string as string"


@pytest.mark.parametrize(
    ("datatype", "value", "text"),
    [
        ("INT32", "1.0", SIGNED), ("INT32", '"1"', SIGNED), ("INT32", "true", SIGNED), ("INT64", "null", SIGNED),
        ("INT32", "{}", SIGNED), ("INT32", "[1,false]", SIGNED), ("INT32", "NaN", SIGNED),
        ("UINT8", "1.0", UNSIGNED), ("UINT8", "-1", UNSIGNED), ("UINT64", "[1,-1]", UNSIGNED),
        ("FP32", '"1"', NUMBER), ("FP64", "true", NUMBER), ("FP64", "null", NUMBER), ("FP32", '{"a":1}', NUMBER),
        ("BOOL", "1", BOOLEAN), ("BOOL", '"true"', BOOLEAN),
        ("BYTES", "1", STRING), ("BYTES", "null", STRING), ("BYTES", '["a",1]', STRING),
        ("INT8", "128", "Unable to parse 'data': input 'X' holds a number that does not fit INT8"),
        ("UINT64", str(2**64), "Unable to parse 'data': input 'X' holds a number that does not fit UINT64"),
        ("FP32", "1e39", "Unable to parse 'data': input 'X' holds a number that does not fit FP32"),
        ("FP64", "1" + "0" * 400, "Unable to parse 'data': input 'X' holds a number that does not fit FP64"),
        ("FP16", "1", "receiving FP16 data via JSON is not supported. Please use the binary data format for input X"),
        ("BF16", "1", "receiving BF16 data via JSON is not supported. Please use the binary data format for input X"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind(datatype: str, value: str, text: str) -> None:
    """Each datatype takes what it can hold, and says in Triton's words what it got instead."""
    with pytest.raises(InvalidInput) as refused:
        decoded(b'{"X":%b}' % value.encode(), metadata(X=(datatype, -1)))
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("INT32", "[[1,[2]],3]", [1, 2, 3]), ("BYTES", '["a",["b"]]', [b"a", b"b"]),
        ("BOOL", "[true,false]", [True, False]), ("INT8", "[-128,127]", [-128, 127]),
        ("UINT64", f"[0,{2**64 - 1}]", [0, 2**64 - 1]), ("INT64", f"[{-(2**63)}]", [-(2**63)]),
        ("FP32", "[1,0.5]", [1.0, 0.5]), ("FP64", "[0.1,1e300]", [0.1, 1e300]), ("FP32", "Infinity", [float("inf")]),
        ("BYTES", '["a","\u00e9","","\\u00e9\\ud83d\\ude00"]', [b"a", "é".encode(), b"", "é😀".encode()]),
        ("BYTES", "[]", []), ("FP32", "[]", []), ("UINT8", "[]", []),
    ],
)  # fmt: skip
def test_a_value_becomes_a_tensor(datatype: str, value: str, expected: list[Any]) -> None:
    """A scalar or a flat array, of every datatype that JSON has."""
    request = decoded(b'{"X":%b}' % value.encode(), metadata(X=(datatype, -1)))
    array = request.inputs["X"]
    assert (array.dtype, array.shape, array.tolist()) == (DATATYPES[datatype], (len(expected),), expected)


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        ((1,), 1, (1,)), ((2, 3), 6, (2, 3)), ((), 1, ()), ((-1,), 5, (5,)), ((-1,), 0, (0,)), ((-1, 1), 2, (2, 1)),
        ((-1, -1), 4, (1, 4)), ((-1, 2, -1, 3), 12, (1, 2, 2, 3)), ((-1, 16), 32, (2, 16)), ((-1, -1), 0, (1, 0)),
        ((-1, 3), 0, (0, 3)), ((0,), 0, (0,)), ((-1, 0), 0, (1, 0)),
        ((1,), 2, None), ((1,), 0, None), ((2, 3), 5, None), ((2, 3), 12, None), ((), 2, None), ((-1, 2), 3, None),
        ((0,), 1, None), ((-1, 0), 1, None),
    ],
)  # fmt: skip
def test_the_elements_make_the_shape(shape: tuple[int, ...], count: int, expected: tuple[int, ...] | None) -> None:
    """The innermost free size is what makes the elements fit, other free ones are 1; what cannot fit is refused."""
    body = orjson.dumps({"X": list(range(count))})
    if expected is None:
        with pytest.raises(InvalidInput, match="^The schema can not convert input 'X' to tensor with proper shape$"):
            decoded(body, metadata(X=("INT32", *shape)))
    else:
        array = decoded(body, metadata(X=("INT32", *shape))).inputs["X"]
        assert (array.shape, array.ravel().tolist()) == (expected, list(range(count)))


def test_other_keys_are_parameters() -> None:
    """They are so at the top and in `parameters`, which may hold inputs as well; an id is both."""
    request = decoded(
        b'{"PROMPT":["hi"],"id":"r1","s":"\xc3\xa9","i":-1,"b":true,"f":1.5,"parameters":{"N":7,"x":0,"id":"other"},'
        b'"u":18446744073709551615,"priority":2}'
    )
    assert {name: array.tolist() for name, array in request.inputs.items()} == {"PROMPT": [[b"hi"]], "N": [[7]]}
    assert request.id == "r1"
    assert request.priority == 0
    assert request.parameters == {
        "id": "other", "s": "é", "i": -1, "b": True, "f": 1.5, "x": 0, "u": 2**64 - 1, "priority": 2
    }  # fmt: skip
    assert (request.model, request.version, request.outputs) == ("m", "", None)


def test_an_id_is_at_the_top() -> None:
    """In `parameters` it is a parameter, and nothing else."""
    request = decoded(b'{"N":1,"parameters":{"id":"r"}}')
    assert (request.id, request.parameters) == ("", {"id": "r"})


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[7]], np.int64), b"7"), (np.array([1, 2], np.uint8), b"[1,2]"), (np.zeros((0, 3), "f4"), b"[]"),
        (np.array([[1, 2], [3, 4]], "f8"), b"[1.0,2.0,3.0,4.0]"), (np.array([True, False]), b"[true,false]"),
        (np.array(0.1, "<f4"), b"0.10000000149011612"), (np.array(2**64 - 1, "u8"), b"18446744073709551615"),
        (np.array([np.nan, np.inf, -np.inf], "<f4"), b"[NaN,Infinity,-Infinity]"),
        (np.array([b"a", "é\n".encode()], object), '["a","é\\n"]'.encode()),
        (np.array([b"a\xff\n"], object), b'"a\xff\\n"'),
    ],
)  # fmt: skip
def test_an_output_becomes_a_value(array: Array, expected: bytes) -> None:
    """One element is a scalar, any other number a flat array; bytes that are not UTF-8 go out as they are."""
    response = InferResponse("m", "3", {"Y": array})
    assert encode(response, "") == b'{"model_name":"m","model_version":"3","Y":%b}' % expected


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "FP16"), (ml_dtypes.bfloat16, "BF16")])
def test_an_output_that_has_no_json(dtype: Any, name: str) -> None:
    """The protocol has none for it, and says so."""
    with pytest.raises(InvalidInput, match=f"^sending {name} data via JSON is not supported. .* for output Y$"):
        encode(InferResponse("m", "1", {"Y": np.zeros(1, dtype)}), "")


def test_a_response_says_whose_it_is() -> None:
    """The request's id if it has one, the model and version that ran, and what the model says besides."""
    response = InferResponse("m", "1", {"Y": np.array([1], "<i4")}, {"a": "b", "n": 2})
    assert orjson.loads(encode(response, "r")) == {
        "id": "r", "model_name": "m", "model_version": "1", "Y": 1, "a": "b", "n": 2
    }  # fmt: skip


Step = int | Exception | asyncio.Event


class Loaded:
    """The one version of the model, as an engine keeps it."""

    number = 1
    version = "1"
    stacked = False
    metadata = replace(
        MODEL, decoupled=True, inputs={name: replace(spec, optional=True) for name, spec in MODEL.inputs.items()}
    )


class FakeEngine(Unloaded):
    """A model whose responses, errors and waits are written down; remembers what it was asked, and how that ended."""

    def __init__(self, *steps: Step) -> None:
        self.steps: Sequence[Step] = steps
        self.asked: list[InferRequest] = []
        self.given: list[int] = []
        self.closed = 0
        self.full: Exception | None = None

    def copies(self) -> list[Any]:
        return [Loaded()]

    def catalogue(self) -> dict[str, Any]:
        copy = Loaded()
        entry = {"number": copy.number, "version": copy.version, "latest": True, "metadata": copy.metadata}
        return {**super().catalogue(), "copies": [entry]}

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        if model != "m" or version not in ("", "1"):
            raise NotFound(f"Request for unknown model: '{model}' is not found")
        return MODEL

    def check_room(self, model: str, version: str) -> None:
        if self.full is not None:
            raise self.full

    async def stream(self, request: InferRequest) -> AsyncIterator[InferResponse]:
        if self.full is not None:
            raise self.full
        self.asked.append(request)
        try:
            for step in self.steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    self.given.append(step)
                    yield InferResponse("m", "1", {"Y": np.array([step], "<i4")})
        finally:
            self.closed += 1


def here(engine: FakeEngine) -> Client:
    """A client in front of it, in this process."""
    return Client(cast("Engine", engine), Settings())


def value(number: int, **more: Any) -> dict[str, Any]:
    return {"model_name": "m", "model_version": "1", "Y": number, **more}


def event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(content)


@pytest.mark.parametrize("path", [GENERATE, STREAM])
@pytest.mark.parametrize(
    ("where", "body", "status"),
    [("m", b"x", 400), ("m", b'{"N":"a"}', 400), ("nope", b"{}", 404), ("m/versions/9", b"{}", 404)],
)
async def test_what_is_refused_before_it_runs(
    where: str, body: bytes, status: int, path: str, front_of: FrontOf
) -> None:
    """The answer is an error like any other, in JSON, and the model never hears of it."""
    engine = FakeEngine(1)
    answer = await (await front_of(engine))("POST", path.replace("/m/", f"/{where}/"), body)
    assert (answer.status, list(answer.json), answer.headers["content-type"]) == (status, ["error"], "application/json")
    assert engine.asked == []


@pytest.mark.parametrize("path", [GENERATE, STREAM])
async def test_bounds_hold_here_too(path: str, front_of: FrontOf) -> None:
    """A body over the limit, one that is encoded, a deadline that is none, and a full queue."""
    engine = FakeEngine(1)
    client = await front_of(engine, max_body=20)
    assert (await client("POST", path, b" " * 21)).status == 413
    encoded = await client("POST", path, b"{}", {"Content-Encoding": "gzip"})
    assert (encoded.status, encoded.headers["accept-encoding"]) == (415, "identity")
    assert encoded.error.startswith("Unsupported content-encoding, only 'identity' is supported.")
    assert (await client("POST", path, b"{}", {"X-Request-Timeout-Ms": "soon"})).status == 400
    engine.full = QueueFull("the queue is full", retry_after=3)
    full = await client("POST", path, b"{}")
    assert (full.status, full.headers["retry-after"]) == (429, "3")
    assert engine.asked == []
    assert (await client("GET", path)).status == 405


@pytest.mark.parametrize("path", [GENERATE, STREAM, "/v2/models/m/versions/1/generate"])
async def test_a_request_is_all_that_an_inference_is(path: str, front_of: FrontOf) -> None:
    """It has its deadline, counts for its client, and carries the headers that models are given."""
    engine = FakeEngine(1)
    client = await front_of(engine, client_header="X-Client", forward_headers="^x-for-")
    headers = {"X-Request-Timeout-Ms": "60000", "X-Client": "a", "X-For-Model": "b", "Other": "c"}
    assert (await client("POST", path, b'{"N":3,"id":"r","p":1}', headers)).status == 200
    (asked,) = engine.asked
    assert asked.deadline < float("inf")
    assert (asked.client, asked.id, asked.inputs["N"].tolist()) == ("a", "r", [[3]])
    assert asked.version in (["1"] if "versions" in path else ["", "1"])  # a worker knows which is the highest
    assert asked.parameters == {"id": "r", "p": 1, "x-for-model": "b"}


@pytest.mark.parametrize(
    ("steps", "status", "content"),
    [
        ((), 200, {"error": NOT_ONE}),
        ((7,), 200, value(7, id="r")),
        ((7, 8), 200, {"error": NOT_ONE}),
        ((7, 8, 9), 200, {"error": NOT_ONE}),
        ((ModelError("it failed"),), 500, {"error": "it failed"}),
        ((InvalidInput("it says"),), 400, {"error": "it says"}),
        ((7, ModelError("it failed")), 200, {"error": NOT_ONE}),
    ],
)
async def test_generate_gives_exactly_one(
    steps: tuple[Step, ...], status: int, content: dict[str, Any], front_of: FrontOf
) -> None:
    """One response is the answer; none, or several, are an error with 200, as in Triton; an error has its status."""
    engine = FakeEngine(*steps)
    answer = await (await front_of(engine))("POST", GENERATE, b'{"N":1,"id":"r"}')
    assert (answer.status, answer.json, answer.headers["content-type"]) == (status, content, "application/json")
    assert int(answer.headers["content-length"]) == len(answer.body)
    await until(lambda: engine.closed == 1)


async def test_two_responses_are_enough_to_know_better() -> None:
    """A third is not asked for."""
    engine = FakeEngine(7, 8, 9)
    assert (await here(engine)("POST", GENERATE, b"{}")).json == {"error": NOT_ONE}
    assert (engine.given, engine.closed) == ([7, 8], 1)


@pytest.mark.parametrize(
    ("steps", "body"),
    [
        ((), b""),
        ((7,), event(value(7))),
        ((7, 8, 9), event(value(7)) + event(value(8)) + event(value(9))),
        ((7, ModelError("it\nfailed")), event(value(7)) + event({"error": "it\nfailed"})),
        ((7, InvalidInput("it says")), event(value(7)) + event({"error": "it says"})),
    ],
)
async def test_a_stream_gives_any_number(steps: tuple[Step, ...], body: bytes, front_of: FrontOf) -> None:
    """Each response is an event; an error that comes later is the last one, for the status is out."""
    engine = FakeEngine(*steps)
    answer = await (await front_of(engine))("POST", STREAM, b'{"N":1}')
    assert (answer.status, answer.body) == (200, body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    # Nobody knows beforehand how long it will be, except that a server may see that nothing comes.
    assert answer.headers.get("content-length") in ((None,) if body else (None, "0"))
    await until(lambda: engine.closed == 1)


async def test_a_stream_that_begins_with_an_error(front_of: FrontOf) -> None:
    """It has the error's status: as an event if the model failed, in JSON if it is the request that is wrong."""
    for error, status in ((ModelError("it failed"), 500), (DeviceLost("gone"), 503)):
        answer = await (await front_of(FakeEngine(error)))("POST", STREAM, b"{}")
        assert (answer.status, answer.body) == (status, event({"error": str(error)}))
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    answer = await (await front_of(FakeEngine(InvalidInput("expected 2 inputs"))))("POST", STREAM, b"{}")
    assert (answer.status, answer.json) == (400, {"error": "expected 2 inputs"})
    assert answer.headers["content-type"] == "application/json"


async def test_a_mistake_of_ours_in_a_stream(caplog: pytest.LogCaptureFixture, front_of: FrontOf) -> None:
    """The client learns nothing of it, the log everything."""
    caplog.set_level(logging.ERROR)
    answer = await (await front_of(FakeEngine(7, ZeroDivisionError("secret"))))("POST", STREAM, b"{}")
    assert answer.body == event(value(7)) + event({"error": "internal error; the server's log says more"})
    assert "ZeroDivisionError: secret" in caplog.text


async def test_draining_ends_the_connection_of_a_stream(front_of: FrontOf) -> None:
    """A stream is served while the service drains, and says that its connection ends with it."""
    client = await front_of(FakeEngine(7))
    assert client.engine is not None
    client.engine.draining = True
    answer = await client("POST", STREAM, b"{}")
    assert (answer.status, answer.headers["connection"], answer.body) == (200, "close", event(value(7)))


@in_memory("it looks at ASGI messages")
async def test_events_are_sent_as_they_come(front_of: FrontOf) -> None:
    """The first is on its way before there is a second."""
    more = asyncio.Event()
    engine = FakeEngine(7, more, 8)
    sent: list[Any] = []
    task = asyncio.ensure_future(call(await front_of(engine), sent, asyncio.Event()))
    await until(lambda: len(sent) == 2)
    assert (sent[0]["status"], sent[1]["body"], sent[1]["more_body"]) == (200, event(value(7)), True)
    more.set()
    await task
    assert [message["body"] for message in sent[1:]] == [event(value(7)), event(value(8)), b""]
    assert not sent[-1].get("more_body", False)


async def test_events_reach_the_client_as_they_come(front_of: FrontOf) -> None:
    """No server keeps one back: the second is only given when the client has got the first."""
    more = asyncio.Event()

    def heard(data: bytes) -> None:
        if event(value(7)) in data:
            more.set()

    client = await front_of(FakeEngine(7, more, 8))
    answer: Answer = await asyncio.wait_for(client("POST", STREAM, b"{}", heard=heard), 10)
    assert answer.body == event(value(7)) + event(value(8))


@pytest.mark.parametrize(
    ("path", "steps"),
    [(GENERATE, lambda never: (never,)), (STREAM, lambda never: (never,)), (STREAM, lambda never: (7, never))],
)
async def test_a_caller_who_leaves_ends_it(
    path: str, steps: Callable[[asyncio.Event], tuple[Step, ...]], front_of: FrontOf
) -> None:
    """Before the first response or after it, the engine's iterator is closed."""
    await leaves(path, FakeEngine(*steps(asyncio.Event())), front_of)


@pytest.mark.parametrize(("path", "steps"), [(GENERATE, ()), (STREAM, ()), (STREAM, (7,))])
@in_memory("what a client got before it closed its socket is not known")
async def test_nothing_is_said_to_a_caller_who_left(path: str, steps: tuple[Step, ...], front_of: FrontOf) -> None:
    """Nothing but what was said before."""
    engine = FakeEngine(*steps, asyncio.Event())
    answer = await leaves(path, engine, front_of)
    assert answer.status == (200 if engine.given else 0)
    assert answer.body == b"".join(event(value(number)) for number in engine.given)


async def leaves(path: str, engine: FakeEngine, front_of: FrontOf) -> Answer:
    """Ask, and leave when the engine has been asked."""
    leave = asyncio.Event()
    task = asyncio.ensure_future((await front_of(engine))("POST", path, b"{}", leave=leave))
    await until(lambda: len(engine.asked) == 1)
    leave.set()
    answer: Answer = await asyncio.wait_for(task, 10)
    await until(lambda: engine.closed == 1)
    return answer


async def test_a_caller_who_does_not_read_ends_it_by_leaving() -> None:
    """While a piece cannot be sent, the caller is watched as well."""
    engine = FakeEngine(7, 8)
    leave, stuck = asyncio.Event(), asyncio.Event()

    async def send(message: Any) -> None:
        if message.get("body"):
            stuck.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(call(here(engine), send, leave))
    await asyncio.wait_for(stuck.wait(), 10)
    leave.set()
    await asyncio.wait_for(task, 10)
    assert (engine.given, engine.closed) == ([7], 1)


@pytest.mark.parametrize(("steps", "status"), [((), 503), ((7,), 200)])
@in_memory("it cancels the application as a server would")
async def test_a_server_that_gives_up_ends_it(steps: tuple[Step, ...], status: int, front_of: FrontOf) -> None:
    """At the end of its graceful time it says so: with the status, or, if that is out, with the last event."""
    engine = FakeEngine(*steps, asyncio.Event())
    sent: list[Any] = []
    task = asyncio.ensure_future(call(await front_of(engine), sent, asyncio.Event()))
    await until(lambda: len(engine.asked) == 1 and len(sent) == 2 * len(steps))
    task.cancel()
    await asyncio.wait([task])
    error = event({"error": "the service is shutting down"})
    assert sent[0]["status"] == status
    assert [message["body"] for message in sent[1:]] == [*(event(value(step)) for step in engine.given), error]
    assert not sent[-1].get("more_body", False)
    await until(lambda: engine.closed == 1)


async def call(client: Client, send: Any, leave: asyncio.Event) -> None:
    """Ask for a stream, with a `send` of one's own, or a list for what is sent."""
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await leave.wait()
        return {"type": "http.disconnect"}

    async def keep(message: Any) -> None:
        send.append(message)

    scope = {
        "type": "http", "method": "POST", "path": STREAM, "raw_path": STREAM.encode(), "query_string": b"",
        "headers": [], "state": {**client.state, "loop": asyncio.get_running_loop()},
    }  # fmt: skip
    await app(scope, receive, keep if isinstance(send, list) else send)
