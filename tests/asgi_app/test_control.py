"""The endpoints about models: each says what the engine says, passes on what it was asked, and refuses the rest."""

import base64
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from engine.errors import Cancelled, EngineError, InvalidInput, LoadFailed, NotFound, NotReady
from engine.regions import SHM, SystemRegions
from tests.asgi_app.conftest import FrontOf
from tests.client import Answer, Client
from tests.forms import Unloaded

UNKNOWN = "Request for unknown model: 'x' is not found"


class FakeEngine(Unloaded):
    """Knows one model, `m`, and writes down what it is asked to do."""

    def __init__(self, shared_memory: bool = False) -> None:
        self.changed = lambda: None
        self.regions = SystemRegions(shared_memory, lambda: self.changed())
        self.asked: list[tuple[Any, ...]] = []
        self.answers: bool | EngineError = True

    def catalogue(self) -> dict[str, Any]:
        return {**super().catalogue(), "regions": self.regions.registered()}

    async def config(self, model: str, version: str = "") -> dict[str, Any]:
        if model != "m":
            raise NotFound(UNKNOWN)
        return {"name": model, "max_batch_size": 8, "version": version}

    async def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        if model not in ("", "m"):
            raise InvalidInput(f"requested model '{model}' is not available")
        return [{"name": "m", "version": version or "1", "asked": model}]

    async def metrics(self) -> str:
        return '# HELP nv_inference_count é\nnv_inference_count{model="m",version="1"} 3\n'

    async def model_ready(self, model: str, version: str = "") -> bool:
        if model != "m":
            raise NotFound(UNKNOWN)
        if isinstance(self.answers, EngineError):
            raise self.answers
        return self.answers

    async def index(self) -> list[dict[str, str]]:
        return [
            {"name": "m", "version": "1", "state": "READY"},
            {"name": "m", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"},
            {"name": "never"},
        ]

    async def load(self, model: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        if isinstance(self.answers, EngineError):
            raise self.answers
        self.asked.append(("load", model, config, files))

    async def unload(self, model: str, dependents: bool = False) -> None:
        self.asked.append(("unload", model, dependents))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine, front_of: FrontOf) -> Client:
    return await front_of(engine)


def refused(answer: Answer) -> tuple[int, str]:
    """Status and text of a refusal that is in the protocol's form."""
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json) == ["error"]
    return answer.status, answer.json["error"]


async def test_config(client: Client) -> None:
    """The engine's config of a model or of one version, as JSON; an unknown model is 404."""
    assert refused(await client("GET", "/v2/models/x/config")) == (404, UNKNOWN)
    for version in ("", "3"):
        path = f"/v2/models/m{f'/versions/{version}' if version else ''}/config"
        assert (await client("GET", path)).json == {"name": "m", "max_batch_size": 8, "version": version}


async def test_statistics(client: Client) -> None:
    """Of all models, of one, of one version; of an unknown one it is 400, as in Triton."""
    assert refused(await client("GET", "/v2/models/x/stats")) == (400, "requested model 'x' is not available")
    for path, model, version in (("stats", "", "1"), ("m/stats", "m", "1"), ("m/versions/7/stats", "m", "7")):
        answer = await client("GET", f"/v2/models/{path}")
        assert (answer.status, answer.json) == (
            200, {"model_stats": [{"name": "m", "version": version, "asked": model}]}
        )  # fmt: skip


async def test_metrics(client: Client, engine: FakeEngine) -> None:
    """What the engine counts, in the format that Prometheus asks for."""
    answer = await client("GET", "/metrics")
    assert (answer.status, answer.body.decode()) == (200, await engine.metrics())
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert (await client("POST", "/metrics")).status == 405


@pytest.mark.parametrize("path", ["/v2/models/m/ready", "/v2/models/m/versions/1/ready"])
async def test_a_model_that_is_not_ready_is_503(path: str, client: Client, engine: FakeEngine) -> None:
    """Not ready is what the model says of itself, what its state is, or that the service drains; else it is 200."""
    assert (await client("GET", path)).status == 200
    engine.answers = False
    assert refused(await client("GET", path)) == (503, "Model version not ready")
    engine.answers = NotReady("it is loading")
    assert refused(await client("GET", path)) == (503, "it is loading")
    engine.answers = True
    assert client.engine is not None
    client.engine.draining = True  # the worker, that is
    assert refused(await client("GET", path)) == (503, "the service is draining")
    assert (await client("GET", path.replace("/m/", "/x/"))).status == 404


@pytest.mark.parametrize("enabled", [False, True])
async def test_the_server_lists_what_it_serves(enabled: bool, engine: FakeEngine, front_of: FrontOf) -> None:
    """Shared memory is among the extensions where it is enabled; what is not served at all never is."""
    answer = await (await front_of(engine, shared_memory=enabled))("GET", "/v2")
    extensions = answer.json["extensions"]
    assert answer.json["name"] == "millrace"
    assert ("system_shared_memory" in extensions) is enabled
    assert {"classification", "model_repository", "model_configuration", "binary_tensor_data", "parameters",
            "schedule_policy", "statistics", "trace", "logging"} <= set(extensions)  # fmt: skip
    assert not {"sequence", "cuda_shared_memory"} & set(extensions)


@pytest.mark.parametrize("path", ["/v2/repository/index", "/v2/repository/R/index"])
async def test_index(path: str, client: Client, engine: FakeEngine) -> None:
    """All models with their states, or, if that is asked for, those that are ready; a repository's name is ignored."""
    for body in (b"", b"{}", b'{"ready":false}'):
        assert (await client("POST", path, body)).json == await engine.index()
    ready = (await client("POST", path, b'{"ready":true}')).json
    assert ready == [{"name": "m", "version": "1", "state": "READY"}]
    for body in (b'{"ready":1}', b'{"ready":null}', b'{"ready":"true"}'):
        answer = await client("POST", path, body)
        assert refused(answer) == (400, "Invalid value for 'ready': expected a boolean")
    assert (await client("GET", path)).status == 405


LOAD = "/v2/repository/models/m/load"


@pytest.mark.parametrize("body", [b"", b"{}", b'{"parameters":{}}', b'{"other":1}'])
async def test_load_without_parameters(body: bytes, client: Client, engine: FakeEngine) -> None:
    """A plain load answers 200 and nothing more."""
    answer = await client("POST", LOAD, body)
    assert (answer.status, answer.body) == (200, b"")
    assert engine.asked == [("load", "m", None, None)]


async def test_load_with_a_config_and_files(client: Client, engine: FakeEngine) -> None:
    """The config is passed on as it is, a file's content as the bytes that it stands for."""
    content = bytes(range(256))
    parameters = {"config": '{"backend":"onnxruntime"}', "file:1/model.onnx": base64.b64encode(content).decode(),
                  "file:labels.txt": ""}  # fmt: skip
    assert (await client("POST", LOAD, orjson.dumps({"parameters": parameters}))).status == 200
    assert engine.asked == [
        ("load", "m", '{"backend":"onnxruntime"}', {"1/model.onnx": content, "labels.txt": b""})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"x", "failed to parse the request JSON buffer: "),
        (b"[]", "attempt to access JSON non-object as object"),
        (b'{"parameters":3}', "attempt to access JSON non-object as object"),
        (b'{"parameters":null}', "attempt to access JSON non-object as object"),
        (b'{"parameters":{"config":3}}', "attempt to access JSON non-string as string"),
        (b'{"parameters":{"config":null}}', "attempt to access JSON non-string as string"),
        (b'{"parameters":{"config":{}}}', "attempt to access JSON non-string as string"),
        (b'{"parameters":{"file:1/a":3}}', "attempt to access JSON non-string as string"),
        (b'{"parameters":{"file:1/a":"!!!!"}}', "parameter 'file:1/a' is not valid base64: "),
        (b'{"parameters":{"file:1/a":"AAA"}}', "parameter 'file:1/a' is not valid base64: "),
        ('{"parameters":{"file:1/a":"é"}}'.encode(), "parameter 'file:1/a' is not valid base64: "),
        (b'{"parameters":{"foo":"x"}}', "unexpected error on creating Triton parameter: 'foo' is neither "),
        (b'{"parameters":{"files:a":"x"}}', "unexpected error on creating Triton parameter: 'files:a' is neither "),
    ],
)  # fmt: skip
async def test_a_load_that_makes_no_sense(body: bytes, text: str, client: Client, engine: FakeEngine) -> None:
    """What is wrong with the request is 400 in Triton's words, and the engine never hears of it."""
    status, error = refused(await client("POST", LOAD, body))
    assert (status, error[: len(text)]) == (400, text)
    assert engine.asked == []


@pytest.mark.parametrize("name", ["..", "%2e%2e", "a%2Fb", "..%2Fm", "%2Fetc"])
async def test_a_name_that_is_a_path_is_not_loaded(name: str, client: Client, engine: FakeEngine) -> None:
    """A model's name is the name of a folder, never a way to another."""
    status, error = refused(await client("POST", f"/v2/repository/models/{name}/load"))
    assert (status, error.endswith("model name must not contain path traversal characters")) == (400, True)
    assert engine.asked == []


async def test_a_name_that_is_blank_is_not_loaded(client: Client, engine: FakeEngine) -> None:
    """It is refused in Triton's words; without any name there is no such path."""
    blank = await client("POST", "/v2/repository/models/%20/load")
    assert refused(blank) == (400, "Model name cannot be empty. Please enter a valid name to deploy.")
    assert (await client("POST", "/v2/repository/models//load")).status == 404
    assert engine.asked == []


@pytest.mark.parametrize(
    ("error", "status"),
    [(LoadFailed("it is broken"), 400), (NotReady("not allowed"), 503), (Cancelled("as said"), 400)],
)
async def test_a_load_that_fails(error: EngineError, status: int, client: Client, engine: FakeEngine) -> None:
    """A model that cannot be loaded is 400, a repository that is not the callers' to change is 503, with the text."""
    engine.answers = error
    assert refused(await client("POST", LOAD)) == (status, str(error))


async def test_a_load_over_the_limit_is_413(engine: FakeEngine, front_of: FrontOf) -> None:
    """The bound on a body holds for files as well."""
    answer = await (await front_of(engine, max_body=10))("POST", LOAD, b'{"parameters":{}}')
    assert answer.status == 413
    assert engine.asked == []


@pytest.mark.parametrize(
    ("body", "dependents"),
    [(b"", False), (b"{}", False), (b'{"parameters":{"unload_dependents":true}}', True),
     (b'{"parameters":{"unload_dependents":false}}', False), (b'{"parameters":{"other":1}}', False)],
)  # fmt: skip
async def test_unload(body: bytes, dependents: bool, client: Client, engine: FakeEngine) -> None:
    """Unloading answers 200 and nothing more, of whatever model, and says whether its dependents go as well."""
    answer = await client("POST", "/v2/repository/models/x/unload", body)
    assert (answer.status, answer.body) == (200, b"")
    assert engine.asked == [("unload", "x", dependents)]


@pytest.mark.parametrize("value", ["1", '"true"', "null", "[]"])
async def test_an_unload_that_makes_no_sense(value: str, client: Client, engine: FakeEngine) -> None:
    """`unload_dependents` is true or false."""
    body = b'{"parameters":{"unload_dependents":%b}}' % value.encode()
    answer = await client("POST", "/v2/repository/models/m/unload", body)
    assert refused(answer) == (400, "attempt to access JSON non-boolean as boolean")
    assert engine.asked == []


@pytest.mark.parametrize("action", ["load", "unload"])
async def test_a_named_repository_is_501(action: str, client: Client, engine: FakeEngine) -> None:
    """Triton serves none by name either."""
    answer = await client("POST", f"/v2/repository/R/models/m/{action}")
    assert refused(answer) == (501, "'repository_name' specification is not supported")
    assert engine.asked == []


@pytest.fixture
def key() -> Iterator[str]:
    """The key of 100 bytes of a client's shared memory."""
    path = Path(SHM, f"millrace_test_{uuid.uuid4().hex}")
    path.write_bytes(bytes(range(100)))
    yield f"/{path.name}"
    path.unlink()


@pytest.fixture
async def sharing(front_of: FrontOf) -> Client:
    return await front_of(FakeEngine(shared_memory=True), shared_memory=True)


SYSTEM, CUDA = "/v2/systemsharedmemory", "/v2/cudasharedmemory"


async def test_a_region_is_registered_and_forgotten(sharing: Client, key: str) -> None:
    """Register, status of one and of all, unregister one and all, as the clients do it."""
    for name, offset in (("a", 0), ("b", 40)):
        body = orjson.dumps({"key": key, "offset": offset, "byte_size": 60})
        answer = await sharing("POST", f"{SYSTEM}/region/{name}/register", body)
        assert (answer.status, answer.body) == (200, b"")
    a, b = ({"name": name, "key": key, "offset": offset, "byte_size": 60} for name, offset in (("a", 0), ("b", 40)))
    assert (await sharing("GET", f"{SYSTEM}/status")).json == [a, b]
    assert (await sharing("GET", f"{SYSTEM}/region/b/status")).json == [b]
    for path, left in (("/region/a/unregister", [b]), ("/region/zz/unregister", [b]), ("/unregister", [])):
        answer = await sharing("POST", SYSTEM + path)
        assert (answer.status, answer.body) == (200, b"")
        assert (await sharing("GET", f"{SYSTEM}/status")).json == left
    answer = await sharing("GET", f"{SYSTEM}/region/a/status")
    assert refused(answer) == (404, "Unable to find system shared memory region: 'a'")


async def test_an_offset_may_be_left_out(sharing: Client, key: str) -> None:
    """Without one, a region begins where the memory does."""
    await sharing("POST", f"{SYSTEM}/region/a/register", orjson.dumps({"key": key, "byte_size": 1}))
    assert (await sharing("GET", f"{SYSTEM}/status")).json[0]["offset"] == 0


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "failed to parse the request JSON buffer: "),
        (b"{}", "Shared memory register request has no 'key' field"),
        (b'{"key":"/k"}', "Shared memory register request has no 'byte_size' field"),
        (b'{"key":3,"byte_size":3}', "attempt to access JSON non-string as string"),
        (b'{"key":"/k","byte_size":"3"}', "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (b'{"key":"/k","byte_size":-3}', "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (b'{"key":"/k","byte_size":3.0}', "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (b'{"key":"/k","byte_size":true}', "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (b'{"key":"/k","byte_size":3,"offset":-1}', "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (b'{"key":"/k","byte_size":3,"offset":null}', "attempt to access JSON non-unsigned-integer as unsigned-int"),
        (b'{"key":"/../k","byte_size":3}', "failed to register shared memory region 'a': Unable to open shared memory"),
    ],
)
async def test_a_region_that_cannot_be_registered(body: bytes, text: str, sharing: Client) -> None:
    """What is wrong is 400 and names it."""
    status, error = refused(await sharing("POST", f"{SYSTEM}/region/a/register", body))
    assert (status, error[: len(text)]) == (400, text)
    assert (await sharing("GET", f"{SYSTEM}/status")).json == []


async def test_a_region_has_a_name(sharing: Client) -> None:
    """Registering without one is refused in Triton's words."""
    answer = await sharing("POST", f"{SYSTEM}/register", b"{}")
    assert refused(answer) == (400, "'region name' is necessary to register system shared memory region")


async def test_disabled_shared_memory_is_501(client: Client, key: str) -> None:
    """Unless the operator enables it nothing is mapped; the status says that nothing is."""
    body = orjson.dumps({"key": key, "byte_size": 1})
    for path in ("/region/a/register", "/region/a/unregister", "/unregister"):
        status, error = refused(await client("POST", SYSTEM + path, body))
        assert (status, error.startswith("Client shared memory is disabled.")) == (501, True)
    assert (await client("GET", f"{SYSTEM}/status")).json == []


async def test_the_memory_of_gpus_is_not_shared(sharing: Client, key: str) -> None:
    """Nothing is registered, nothing can be, and who unregisters everything first may do so."""
    assert (await sharing("GET", f"{CUDA}/status")).json == []
    for path in ("/region/a/register", "/register"):
        status, error = refused(await sharing("POST", CUDA + path, b"{}"))
        assert (status, error.startswith("CUDA shared memory is not served")) == (501, True)
    for path in ("/region/a/unregister", "/unregister"):
        answer = await sharing("POST", CUDA + path)
        assert (answer.status, answer.body) == (200, b"")
    missing = await sharing("GET", f"{CUDA}/region/a/status")
    assert refused(missing) == (404, "Unable to find cuda shared memory region: 'a'")
    await sharing("POST", f"{SYSTEM}/region/a/register", orjson.dumps({"key": key, "byte_size": 1}))
    other = await sharing("GET", f"{CUDA}/region/a/status")
    assert refused(other) == (
        404, "The region named 'a' is registered as system shared memory, not CUDA shared memory"
    )  # fmt: skip
