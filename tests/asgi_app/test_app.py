"""The application: every request gets one answer, every error its status and text, whatever the client does."""

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from asgi_app import app
from asgi_app.app import _show_log
from asgi_app.messages import WATCH_AFTER
from batching import Cost
from engine.errors import Cancelled, LoadFailed, Unimplemented
from engine.settings import Settings
from engine.types import Array, InferRequest
from tests.client import Client
from tests.conftest import StartEngine, StartLocal
from tests.forms import hear, owner
from tests.scripted import CONFIG, Gate, Scripted, add_model, double
from tests.timing import until

INFER = "/v2/models/m/infer"
ClientOf = Callable[..., Client]
in_memory = pytest.mark.in_memory


def body(value: float = 1.0, rows: int = 1, **more: Any) -> bytes:
    data = [[value] * 4] * rows
    return orjson.dumps({"inputs": [{"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": data}], **more})


async def test_a_request_in_an_answer_out(start_engine: StartEngine, client_of: ClientOf) -> None:
    """JSON in, JSON out, in the protocol's form."""
    client = client_of(await start_engine(m=double))
    answer = await client("POST", INFER, body(1.5, id="r1"))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == {
        "id": "r1",
        "model_name": "m",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [3.0] * 4}],
    }
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert "connection" not in answer.headers


async def test_binary_in_binary_out(start_engine: StartEngine, client_of: ClientOf) -> None:
    """The binary extension in both directions, with its header."""
    client = client_of(await start_engine(m=double))
    tensor = np.arange(8, dtype="<f4").reshape(2, 4)
    head = orjson.dumps(
        {
            "inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": 32}}],
            "parameters": {"binary_data_output": True},
        }
    )
    answer = await client(
        "POST", "/v2/models/m/versions/1/infer", [head, tensor.tobytes()[:5], tensor.tobytes()[5:]],
        {"Inference-Header-Content-Length": str(len(head))},
    )  # fmt: skip
    length = int(answer.headers["inference-header-content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert orjson.loads(answer.body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 32}
    np.testing.assert_array_equal(np.frombuffer(answer.body[length:], "<f4"), tensor.ravel() * 2)


async def test_server_and_model_metadata(start_engine: StartEngine, client_of: ClientOf, tmp_path: Path) -> None:
    """What clients ask first: the server's name and extensions, the model's tensors with their batch dimension."""
    add_model(tmp_path, "m", CONFIG + "version_policy { all { } }", ("1", "3"))
    client = client_of(await start_engine(m=double))
    server = (await client("GET", "/v2")).json
    assert server["name"] == "millrace"
    assert "binary_tensor_data" in server["extensions"]
    model = (await client("GET", "/v2/models/m")).json
    assert model == {
        "name": "m", "versions": ["1", "3"], "platform": "pytorch",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
    }  # fmt: skip
    assert (await client("GET", "/v2/models/m/versions/1")).json["versions"] == ["1"]
    for path in ("/v2/models/m/ready", "/v2/models/m/versions/3/ready"):
        assert (await client("GET", path)).status == 200


@pytest.mark.parametrize("path", ["x", "x/ready", "m/versions/9/ready", "%2e%2e", "a%2Fb/ready"])
async def test_unknown_models_are_404(path: str, start_engine: StartEngine, client_of: ClientOf) -> None:
    """A model or version that is not served is 404, with Triton's words; its name is never used as a path."""
    answer = await client_of(await start_engine(m=double))("GET", f"/v2/models/{path}")
    assert answer.status == 404
    assert answer.json["error"].startswith("Request for unknown model: '")


async def test_a_name_that_is_not_text_is_400(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Bytes in the path that are no UTF-8 are the client's error."""
    answer = await client_of(await start_engine(m=double))("POST", "/v2/models/%ff%fe/infer", body())
    assert (answer.status, answer.error) == (400, "the model's name in the path is not UTF-8")


HEALTH = ["/v2/health/ready", "/health", "/healthz", "/readyz", "/ping", "/v2/models/m/ready"]


async def test_health_and_its_aliases(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Ready while warm, 503 with Retry-After while draining; alive all the same; answers say that connections end."""
    engine = await start_engine(m=double)
    client = client_of(engine)
    for path in [*HEALTH, "/v2/health/live", "/livez"]:
        answer = await client("GET", path)
        assert (answer.status, answer.body) == (200, b"")
    engine.draining = True
    for path in HEALTH:
        answer = await client("GET", path)
        assert (answer.status, answer.headers["retry-after"], answer.error) == (503, "1", "the service is draining")
        assert answer.headers["connection"] == "close"
    assert (await client("GET", "/livez")).status == 200
    answer = await client("POST", INFER, body())
    assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_a_stuck_lane_is_not_live(start_engine: StartEngine, client_of: ClientOf) -> None:
    """A model that hangs turns liveness and readiness to 503."""
    gate = threading.Event()
    gate.set()

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        assert gate.wait(30)
        return double(inputs)

    engine = await start_engine({"inline_ms": 0, "stuck_after": 0.01}, m=run)
    client = client_of(engine)
    gate.clear()
    task = asyncio.ensure_future(client("POST", INFER, body()))
    await until(lambda: not owner(engine).live())
    await hear(engine)
    for path in ("/v2/health/live", "/livez", "/v2/health/ready"):
        assert (await client("GET", path)).status == 503
    gate.set()
    assert (await task).status == 200


async def test_methods(start_engine: StartEngine, client_of: ClientOf) -> None:
    """HEAD is GET without a body; OPTIONS tells the methods; a wrong or unknown one is 405 and tells them too."""
    client = client_of(await start_engine(m=double))
    get, head = await client("GET", "/v2"), await client("HEAD", "/v2")
    assert (head.status, head.body) == (200, b"")
    assert head.headers == get.headers
    options = await client("OPTIONS", INFER)
    assert (options.status, options.headers["allow"], options.body) == (204, "POST, OPTIONS", b"")
    assert "content-length" not in options.headers
    put = await client("PUT", INFER, body())
    assert (put.status, put.headers["allow"]) == (405, "POST, OPTIONS")
    assert (await client("DELETE", "/v2")).headers["allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("method", ["BREW", "get", "HEAD"])
@in_memory("servers refuse methods that HTTP does not have, or write them in capitals; an answer to HEAD has no body")
async def test_methods_that_are_none(method: str, start_engine: StartEngine, client_of: ClientOf) -> None:
    """They are wrong ones like any other."""
    answer = await client_of(await start_engine(m=double))(method, INFER, body())
    assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")


async def test_not_found_in_the_words_of_its_place(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Below /v2 an error is under `error`, as the protocol's clients expect; elsewhere under `detail`."""
    client = client_of(await start_engine(m=double))
    for path, key in (("/v2/nope", "error"), ("/nope", "detail"), ("/classify/", "detail")):
        answer = await client("GET", path)
        assert (answer.status, answer.json) == (404, {key: "Not Found"})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "failed to parse the request JSON buffer"),
        (body()[:-3], "failed to parse the request JSON buffer"),
        (b"[" * 5000, "JSON nesting depth exceeds maximum allowed limit (100)"),
        (body(rows=33), "batch-size must be <= 32"),
        (body(rows=0), "zero rows"),
        (body().replace(b'"x"', b'"z"'), "unexpected inference input 'z'"),
        (body().replace(b"FP32", b"INT32").replace(b"1.0", b"1"), "data-type is 'INT32', but model 'm' expects 'FP32'"),
        (body().replace(b"[1,4]", b"[4,1]"), "unexpected shape for input 'x'"),
        (body().replace(b"[1,4]", b"[-1,4]"), "Unable to parse 'shape': attempt to access JSON non-unsigned-integer"),
        (body().replace(b"[1,4]", b"[99999999999,99999999999]"), "causes total element count to exceed maximum"),
        (body().replace(b"1.0", b"nan", 1), "failed to parse the request JSON buffer"),
        (body().replace(b"1.0", b"1e300", 1), "input 'x' holds a number that does not fit FP32"),
        (body(outputs=[{"name": "q"}]), "unexpected inference output 'q'"),
        (b'{"inputs":[]}', "expected 1 inputs but got 0 inputs"),
    ],
)  # fmt: skip
async def test_bad_input_is_400_and_harms_nobody(
    content: bytes, text: str, start_engine: StartEngine, client_of: ClientOf
) -> None:
    """Whatever is wrong with a request is a 400 that names the field; the model never runs; the next one is served."""
    client = client_of(await start_engine(m=double))
    answer = await client("POST", INFER, content)
    assert answer.status == 400
    assert text in answer.json["error"]
    assert "Traceback" not in answer.error
    assert Scripted.calls == []
    assert (await client("POST", INFER, body())).status == 200


async def test_an_encoded_body_is_415(start_engine: StartEngine, client_of: ClientOf) -> None:
    """A content encoding that is not served is refused by name."""
    client = client_of(await start_engine(m=double))
    answer = await client("POST", INFER, body(), {"Content-Encoding": "br"})
    assert (answer.status, "'br'" in answer.error) == (415, True)
    assert answer.headers["accept-encoding"] == "gzip, deflate"
    answer = await client("POST", "/v2/repository/index", b"", {"Content-Encoding": "gzip"})
    assert (answer.status, answer.headers["accept-encoding"]) == (415, "identity")
    assert (await client("POST", "/classify", b"", {"Content-Encoding": "gzip"})).status == 404  # no such model here
    assert (await client("POST", INFER, body(), {"Content-Encoding": "identity"})).status == 200


async def test_bodies_over_the_limit_are_413(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Announced or streamed, one byte too many is 413, names the bound and ends the connection; the limit is fine."""
    size = len(body())
    client = client_of(await start_engine(m=double), max_body=size)
    assert (await client("POST", INFER, body())).status == 200
    assert (await client("POST", INFER, body(), {"Content-Length": str(size)})).status == 200
    for content, headers in (
        (body() + b" ", {"Content-Length": str(size + 1)}),
        ([body(), b" "], {}),
        ([b" " * 50] * 1000, {}),
        (body() + b" ", {}),
    ):
        answer = await client("POST", INFER, content, headers)
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert f"over the limit of {size} bytes" in answer.error
    assert len(Scripted.calls) == 2


@pytest.mark.parametrize("sizes", [[11], [5, 6], [10, 1, 0]])
async def test_a_body_over_the_limit_is_refused_when_it_has_ended(sizes: list[int], local_engine: StartLocal) -> None:
    """The answer does not wait for more of a body of which the last piece has come."""
    engine, sent = await local_engine(m=double), []
    pieces = [b" " * size for size in sizes]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": INFER, "raw_path": INFER.encode(), "query_string": b"",
        "headers": [],
        "state": {"engine": engine, "settings": Settings(max_body=10), "loop": asyncio.get_running_loop()},
    }  # fmt: skip
    await app(scope, receive, send)
    assert (sent[0]["status"], pieces) == (413, [])


@pytest.mark.parametrize(
    "headers", [{"Content-Length": "9" * 30}, {"Content-Length": "99999", "Expect": "100-continue"}]
)
@in_memory("a server may refuse the one itself, and ask for the body of the other")
async def test_a_body_that_is_announced_over_the_limit_is_413(
    headers: dict[str, str], start_engine: StartEngine, client_of: ClientOf
) -> None:
    """However large it says that it is, and whether it comes or not."""
    answer = await client_of(await start_engine(m=double), max_body=10)("POST", INFER, b"", headers)
    assert (answer.status, answer.headers["connection"]) == (413, "close")


@in_memory("it counts what the application reads of the body, not what a server does")
async def test_a_stream_without_end_is_not_read_to_its_end(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Past the bound as much again is read, so that the answer is not lost in a reset, and no more."""
    client = client_of(await start_engine(m=double), max_body=1000)
    read = 0

    class Pieces(list[bytes]):
        def pop(self, index: Any = 0) -> bytes:
            nonlocal read
            read += 1
            return b" " * 100

    answer = await client("POST", INFER, Pieces([b""] * 100_000))
    assert answer.status == 413
    assert read <= 25


@in_memory("it counts what the application asks for")
async def test_expect_is_refused_without_inviting_the_body(start_engine: StartEngine) -> None:
    """A client that waits for 100-continue with a body that is too large is never told to go on."""
    engine = await start_engine(m=double)
    sent = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("invited")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": INFER, "raw_path": INFER.encode(), "query_string": b"",
        "headers": [(b"content-length", b"99999"), (b"expect", b"100-continue")],
        "state": {"engine": engine, "settings": Settings(max_body=10), "loop": asyncio.get_running_loop()},
    }  # fmt: skip
    await app(scope, receive, send)
    assert sent[0]["status"] == 413


async def test_a_client_that_stalls_is_408(start_engine: StartEngine, client_of: ClientOf) -> None:
    """A body that does not come is given up after its time, and the connection ends."""
    client = client_of(await start_engine(m=double), body_timeout=0.02)
    answer = await client("POST", INFER, [body()[:10], body()[10:]], stall=True)
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert "not complete after 0.02 s" in answer.error


async def test_a_client_that_leaves_in_its_body_gets_nothing(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Nothing is answered to nobody, and nothing is run."""
    leave = asyncio.Event()
    leave.set()
    client = client_of(await start_engine(m=double))
    answer = await client("POST", INFER, [body()[:10], body()[10:]], leave=leave, stall=True)
    assert answer.status == 0
    assert Scripted.calls == []


async def test_100_clients_that_leave_cost_the_next_one_nothing(start_engine: StartEngine, client_of: ClientOf) -> None:
    """100 requests whose clients disconnect while they wait: the live one behind them runs next, they never do."""
    gate = Gate()
    engine = await start_engine({"inline_ms": 0}, m=gate)
    client = client_of(engine)
    gate.open.clear()
    busy = asyncio.ensure_future(client("POST", INFER, body()))
    await until(lambda: bool(Scripted.calls))
    leave = asyncio.Event()
    gone = [asyncio.ensure_future(client("POST", INFER, body(n), leave=leave)) for n in range(100)]
    live = asyncio.ensure_future(client("POST", INFER, body(7)))
    waiting = owner(engine)._models["m", ""].batcher.pending
    await until(lambda: waiting.rows == 101)
    leave.set()
    await asyncio.wait_for(asyncio.gather(*gone), 10 + WATCH_AFTER)
    await until(lambda: waiting.rows == 1)
    gate.open.set()
    assert (await live).json["outputs"][0]["data"] == [14.0] * 4
    assert (await busy).status == 200
    assert Scripted.calls == [("m", (1, 4)), ("m", (1, 4))]
    assert all(task.result().status == 0 for task in gone)


async def test_a_full_queue_is_429_with_retry_after(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Past its bound the answer is 429, says which bound, and when to come back in whole seconds."""
    gate = Gate()
    engine = await start_engine({"inline_ms": 0, "queue_rows": 32}, m=gate)
    cost = owner(engine)._models["m", ""].batcher.pending.cost = Cost()
    for _ in range(2):
        cost.learn(32, 400.0)  # seconds of a batch, as if measured
    client = client_of(engine)
    gate.open.clear()
    tasks = [asyncio.ensure_future(client("POST", INFER, body()))]
    await until(lambda: bool(Scripted.calls))
    tasks.append(asyncio.ensure_future(client("POST", INFER, body(rows=32))))
    await until(lambda: owner(engine)._models["m", ""].batcher.pending.rows == 32)
    answer = await client("POST", INFER, body())
    assert answer.status == 429
    assert 700 <= int(answer.headers["retry-after"]) <= 801  # what is left of the batch that runs, and the next one
    assert answer.error.startswith("the queue is full: 32 of 32 rows wait")
    gate.open.set()
    assert [task.status for task in await asyncio.gather(*tasks)] == [200, 200]


@pytest.mark.parametrize(
    ("setting", "headers", "client"),
    [
        ("", {"X-Client": "a"}, ""),
        ("X-Client", {"x-cLIENT": "a"}, "a"),
        ("X-Client", {"X-Client": "\xe9" * 300}, "\xe9" * 200),
        ("X-Client", {}, ""),
    ],
)
async def test_the_client_header_names_who_asks(
    setting: str,
    headers: dict[str, str],
    client: str,
    start_engine: StartEngine,
    client_of: ClientOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `client_header` set, a request counts against its value, at most 200 characters of it; without, nobody's."""
    engine = await start_engine(m=double)
    asked, infer = [], engine.infer

    def record(request: InferRequest) -> Any:
        asked.append((request.client, request.priority, request.timeout))
        return infer(request)

    monkeypatch.setattr(engine, "infer", record)
    answer = await client_of(engine, client_header=setting)("POST", INFER, body(parameters={"priority": 2}), headers)
    assert (answer.status, asked) == (200, [(client, 2, 0.0)])


@pytest.mark.parametrize("header", ["X-Request-Timeout-Ms", "X-Envoy-Expected-RQ-Timeout-Ms"])
async def test_a_passed_deadline_is_504(header: str, start_engine: StartEngine, client_of: ClientOf) -> None:
    """Behind a busy lane a request with a time budget is answered when it is over, and the model never runs for it."""
    gate = Gate()
    client = client_of(await start_engine({"inline_ms": 0}, m=gate))
    assert (await client("POST", INFER, body(), {header: "30000"})).status == 200
    gate.open.clear()
    Scripted.calls.clear()
    busy = asyncio.ensure_future(client("POST", INFER, body()))
    await until(lambda: bool(Scripted.calls))
    answer = await client("POST", INFER, body(), {header: "15"})
    assert answer.status == 504
    assert "deadline passed" in answer.error
    gate.open.set()
    assert (await busy).status == 200
    assert len(Scripted.calls) == 1


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", ""])
async def test_a_deadline_that_is_no_time_is_400(value: str, start_engine: StartEngine, client_of: ClientOf) -> None:
    """The header is named, with what it may be."""
    client = client_of(await start_engine(m=double))
    answer = await client("POST", INFER, body(), {"X-Request-Timeout-Ms": value})
    assert answer.status == 400
    assert answer.error == f"header x-request-timeout-ms: must be a positive number of milliseconds, got {value!r}"


async def test_a_model_that_fails_is_500_in_one_line(start_engine: StartEngine, client_of: ClientOf) -> None:
    """The client learns what failed, never a traceback; the next request is served."""

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        if (inputs["x"] == 13).any():
            raise ValueError("unlucky\nFile /secret/path.py")
        return double(inputs)

    client = client_of(await start_engine(m=run))
    answer = await client("POST", INFER, body(13))
    assert (answer.status, answer.error) == (500, "model 'm' failed: ValueError: unlucky")
    assert (await client("POST", INFER, body())).status == 200


@pytest.mark.parametrize(
    ("error", "status"), [(Unimplemented("not here"), 501), (LoadFailed("no"), 400), (Cancelled("taken back"), 400)]
)
async def test_what_an_engine_refuses_has_its_status(
    error: Exception, status: int, start_engine: StartEngine, client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not done is 501, what cannot be loaded or was taken back is 400, with the engine's words."""
    engine = await start_engine(m=double)

    async def infer(request: InferRequest) -> None:
        raise error

    monkeypatch.setattr(engine, "infer", infer)
    answer = await client_of(engine)("POST", INFER, body())
    assert (answer.status, answer.json) == (status, {"error": str(error)})


async def test_the_engine_is_behind_every_endpoint(start_engine: StartEngine, client_of: ClientOf) -> None:
    """The real engine answers what the endpoints about models ask it, and generates from an ordinary model."""
    client = client_of(await start_engine(m=double))
    assert (await client("GET", "/v2/models/m/config")).json["max_batch_size"] == 32
    for path in ("/v2/models/m/generate", "/v2/models/m/generate_stream"):
        answer = await client("POST", path, b'{"x":[1,2,3,4],"id":"r"}')
        content = orjson.loads(answer.body.removeprefix(b"data: "))
        assert content == {"id": "r", "model_name": "m", "model_version": "1", "y": [2.0, 4.0, 6.0, 8.0]}
    (statistics,) = (await client("GET", "/v2/models/stats")).json["model_stats"]
    assert (statistics["name"], statistics["inference_stats"]["success"]["count"]) == ("m", 2)
    assert (await client("GET", "/v2/models/nope/stats")).error == "requested model 'nope' is not available"
    assert b'nv_inference_request_success{model="m",version="1"} 2' in (await client("GET", "/metrics")).body
    index = (await client("POST", "/v2/repository/index")).json
    assert index == [{"name": "m", "version": "1", "state": "READY"}]
    assert (await client("POST", "/v2/repository/models/m/load")).status == 503
    assert (await client("GET", "/v2/systemsharedmemory/status")).json == []


async def test_a_path_cannot_write_lines_into_the_log(
    start_engine: StartEngine, client_of: ClientOf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a client puts into its path appears in the log as it came, encoded, on one line."""
    engine = await start_engine(m=double)
    monkeypatch.setattr(engine, "check_room", lambda model, version: 1 / 0)
    await client_of(engine)("POST", "/v2/models/m%0aCRITICAL:%20forged/infer", body())
    assert caplog.messages == ["POST b'/v2/models/m%0aCRITICAL:%20forged/infer' failed"]


async def test_an_answer_before_the_body_ends_the_connection(start_engine: StartEngine, client_of: ClientOf) -> None:
    """A request refused without reading its body leaves nobody to read it: the connection is not used again."""
    client = client_of(await start_engine(m=double))
    assert (await client("POST", "/nowhere", body())).headers["connection"] == "close"
    assert (await client("PUT", INFER, body())).headers["connection"] == "close"
    assert "connection" not in (await client("GET", "/nowhere")).headers
    assert "connection" not in (await client("POST", INFER, b"{}")).headers


async def test_the_endpoints_are_listed(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Who asks for / learns what answers here, and of nothing that only refuses."""
    engine = await start_engine(m=double)
    answer = await client_of(engine)("GET", "/")
    assert answer.status == 200
    assert b"/v2/models/{model}/infer" in answer.body
    needs = (b"/classify", b"/v2/repository/models/{model}/load", b"/v2/systemsharedmemory/region/{region}/register")
    assert not any(path in answer.body for path in (*needs, b"/v2/cudasharedmemory/register", b"/{repository}/models"))
    settings = {"model_control": "explicit", "shared_memory": True, "classifier": "m"}
    able = (await client_of(engine, **settings)("GET", "/")).body
    assert [path in able for path in needs] == [False, True, True]  # m does not classify


async def test_a_mistake_of_ours_is_500_and_logged(
    start_engine: StartEngine, client_of: ClientOf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is none of ours to tell goes to the log with its traceback; the client learns nothing of it."""
    engine = await start_engine(m=double)
    monkeypatch.setattr(engine, "infer", lambda request: 1 / 0)
    answer = await client_of(engine)("POST", INFER, body())
    assert (answer.status, answer.error) == (500, "internal error; the server's log says more")
    assert "ZeroDivisionError" in caplog.text


@in_memory("it cancels the application as a server would")
async def test_a_server_that_gives_up_waiting_still_answers(start_engine: StartEngine, client_of: ClientOf) -> None:
    """When the server cancels a request at the end of its graceful time, the client gets 503, not silence."""
    gate = Gate()
    client = client_of(await start_engine({"inline_ms": 0}, m=gate))
    gate.open.clear()
    answers: list[Any] = []
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append("body")
            return {"type": "http.request", "body": body(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": INFER, "raw_path": INFER.encode(), "query_string": b"",
             "headers": [], "state": {**client.state, "loop": asyncio.get_running_loop()}}  # fmt: skip
    task = asyncio.ensure_future(app(scope, receive, send))
    await until(lambda: bool(Scripted.calls))
    task.cancel()
    await asyncio.wait([task])
    assert (answers[0]["status"], (b"connection", b"close") in answers[0]["headers"]) == (503, True)
    gate.open.set()


@in_memory("it cancels the application as a server would")
async def test_a_server_that_gives_up_in_a_body_still_answers(start_engine: StartEngine, client_of: ClientOf) -> None:
    """The same for a request whose body has not come yet: 503, and it is not mistaken for a slow client."""
    client = client_of(await start_engine(m=double))
    waiting, sent = asyncio.Event(), []

    async def receive() -> dict[str, Any]:
        waiting.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": INFER, "raw_path": INFER.encode(), "query_string": b"",
             "headers": [], "state": {**client.state, "loop": asyncio.get_running_loop()}}  # fmt: skip
    task = asyncio.ensure_future(app(scope, receive, send))
    await waiting.wait()
    task.cancel()
    await asyncio.wait([task])
    assert sent[0]["status"] == 503
    assert Scripted.calls == []


async def test_without_an_engine_it_says_so() -> None:
    """On a server without lifespan every request is a 503 that names the cause."""
    answer = await Client(None, Settings())("GET", "/v2/health/live")
    assert answer.status == 503
    assert "lifespan" in answer.error


async def lifespan(state: dict[str, Any] | None, during: Callable[[], Any] = lambda: None) -> list[Any]:
    """Run the application's lifespan, and return what it sent."""
    sent: list[Any] = []
    events = ["lifespan.startup"]

    async def receive() -> dict[str, Any]:
        if not events:
            during()
            return {"type": "lifespan.shutdown"}
        return {"type": events.pop()}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "lifespan"}
    if state is not None:
        scope["state"] = state
    await app(scope, receive, send)
    return sent


async def test_lifespan(scripted: type[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine starts with the lifespan, is in its state while it lasts, and stops with it; the log is as before."""
    add_model(tmp_path, "m")
    monkeypatch.setenv("MILLRACE_MODELS", str(tmp_path))
    state: dict[str, Any] = {}
    ready = []
    logger = logging.getLogger("millrace")
    level = logger.level

    def during() -> None:
        ready.append(state["engine"].ready())
        state["engine"]._log.update({"log_info": False})

    sent = await lifespan(state, during)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert ready == [True]
    assert not state["engine"].ready()
    assert (logger.level, logger.filters) == (level, [])


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("MILLRACE_MODELS", "/nowhere", "/nowhere: the model repository is no folder"),
        ("MILLRACE_MODLES", "models", "did you mean MILLRACE_MODELS?"),
    ],
)
async def test_a_start_that_fails_says_why(
    variable: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A setting or repository that does not fit ends the start with one line, without a traceback."""
    monkeypatch.setenv(variable, value)
    caplog.set_level(logging.ERROR)
    (failed,) = await lifespan({})
    assert failed["type"] == "lifespan.startup.failed"
    assert text in failed["message"]
    assert caplog.text == ""


async def test_a_start_that_fails_late_leaves_nothing_behind(
    scripted: type[Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a model fails its warm-up, the lane that ran it is stopped before the start is given up."""
    add_model(tmp_path, "m")
    scripted.behaviours["m"] = lambda inputs: {}
    monkeypatch.setenv("MILLRACE_MODELS", str(tmp_path))
    (failed,) = await lifespan({})
    assert "gives no output 'y'" in failed["message"]
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("lane")] == []


async def test_a_server_without_state_is_refused() -> None:
    """A server whose lifespan has no state is told so at start."""
    (failed,) = await lifespan(None)
    assert "no lifespan state" in failed["message"]


async def test_websockets_are_closed() -> None:
    """There is none to talk to: the handshake is refused, not left hanging."""
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await app({"type": "websocket", "path": "/"}, receive, send)
    assert sent == ["websocket.close"]


@pytest.mark.parametrize(("configured", "shown"), [(False, True), (True, False)])
async def test_under_plain_uvicorn_its_log_is_ours(
    configured: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody else set up logging, what is loaded is told where the server tells its own; else all stays."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    ours, servers = logging.getLogger("millrace"), logging.getLogger("uvicorn")
    for name, value in (("handlers", []), ("level", logging.NOTSET)):
        monkeypatch.setattr(ours, name, value)
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()] if configured else [])
    monkeypatch.setattr(servers, "handlers", [handler])
    monkeypatch.setattr(servers, "level", logging.INFO)
    _show_log()
    logging.getLogger("millrace").info("model m: ready")
    assert (lines == ["model m: ready"]) is shown
