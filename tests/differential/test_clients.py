"""tritonclient.http and tritonclient.http.aio, unmodified: each method gives the same with both servers."""

import base64
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as sync_http
import tritonclient.http.aio as aio_http
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from .compare import places, reduce
from .exchange import Server
from .repository import MODELS
from .servers import Pair

pytestmark = pytest.mark.e2e

PAIR = ("explicit", ["add_sub", "identity_bytes", "identity_fp16", "echo", "classes", "versions_all"])

# One call after another; the result of each, or its error, is compared. An asynchronous client's are awaited.
Script = tuple[Callable[[Any], Any], ...]

A = np.arange(4, dtype=np.float32).reshape(1, 4)
REGION, KEY = "clients", "/differential-clients"


def numbers(binary: bool = True) -> list[Any]:
    inputs = [sync_http.InferInput(name, [1, 4], "FP32") for name in ("INPUT0", "INPUT1")]
    for tensor in inputs:
        tensor.set_data_from_numpy(A, binary_data=binary)
    return inputs


def strings() -> list[Any]:
    tensor = sync_http.InferInput("INPUT0", [1, 2], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"a\xff", "é".encode()]], dtype=object))
    return [tensor]


def halves() -> list[Any]:
    tensor = sync_http.InferInput("INPUT0", [1, 4], "FP16")
    tensor.set_data_from_numpy(A.astype(np.float16))
    return [tensor]


def one() -> list[Any]:
    tensor = sync_http.InferInput("INPUT0", [1, 1], "FP32")
    tensor.set_data_from_numpy(A[:, :1])
    return [tensor]


def classes() -> list[Any]:
    tensors = [sync_http.InferInput("INPUT0", [1, 4], "FP32"), sync_http.InferInput("INPUT1", [1, 2, 2], "INT32")]
    tensors[0].set_data_from_numpy(A)
    tensors[1].set_data_from_numpy(A.astype(np.int32).reshape(1, 2, 2), binary_data=False)
    return tensors


def wanted(name: str, **options: Any) -> Any:
    return sync_http.InferRequestedOutput(name, **options)


def in_region(offset: int) -> list[Any]:
    inputs = [sync_http.InferInput(name, [1, 4], "FP32") for name in ("INPUT0", "INPUT1")]
    for tensor in inputs:
        tensor.set_shared_memory(REGION, 16, offset=offset)
    return inputs


def to_region() -> list[Any]:
    output = wanted("OUTPUT0")
    output.set_shared_memory(REGION, 16, offset=32)
    return [output]


CHANGED = json.dumps({
    "backend": "python", "max_batch_size": 3,
    "input": [{"name": n, "data_type": "TYPE_FP32", "dims": [4]} for n in ("INPUT0", "INPUT1")],
    "output": [{"name": n, "data_type": "TYPE_FP32", "dims": [4]} for n in ("OUTPUT0", "OUTPUT1")],
})  # fmt: skip
WIDER = CHANGED.replace('"max_batch_size": 3', '"max_batch_size": 4')  # Triton takes no files with a config it has
SOURCE = (Path(__file__).parent / "models/add_sub.py").read_bytes().replace(b"a + b", b"a * b")

SCRIPTS: dict[str, Script] = {
    "health": (
        lambda c: c.is_server_live(),
        lambda c: c.is_server_ready(),
        lambda c: c.is_model_ready("add_sub"),
        lambda c: c.is_model_ready("versions_all", "2"),
        lambda c: c.is_model_ready("versions_all", "9"),
        lambda c: c.is_model_ready("absent"),
        lambda c: c.is_server_live(headers={"X-Own": "1"}, query_params={"a": "b", "c": [1, 2]}),
    ),
    "metadata": (
        lambda c: _without_identity(c.get_server_metadata()),
        lambda c: c.get_model_metadata("add_sub"),
        lambda c: c.get_model_metadata("versions_all", model_version="1"),
        lambda c: c.get_model_metadata("absent"),
        lambda c: c.get_model_config("add_sub"),
        lambda c: c.get_model_config("versions_all", model_version="2"),
        lambda c: c.get_model_config("absent"),
    ),
    "statistics": (
        lambda c: c.get_inference_statistics("versions_all"),
        lambda c: c.get_inference_statistics("versions_all", "1"),
        lambda c: c.get_inference_statistics("absent"),
    ),
    "repository": (
        lambda c: c.load_model("later"),
        lambda c: c.is_model_ready("later"),
        lambda c: c.infer("later", numbers()),
        lambda c: c.load_model("later", config=CHANGED),
        lambda c: c.get_model_config("later"),
        lambda c: c.load_model("later", config=WIDER, files={"file:1/model.py": SOURCE}),
        lambda c: c.infer("later", numbers()),
        lambda c: c.get_model_repository_index(),
        lambda c: c.unload_model("later", unload_dependents=True),
        lambda c: _refused(c.load_model, "absent"),
        lambda c: c.unload_model("absent"),
    ),
    "trace": (
        lambda c: c.get_trace_settings(),
        lambda c: c.get_trace_settings("add_sub"),
        lambda c: c.update_trace_settings(settings={"trace_rate": "7"}),
        lambda c: c.update_trace_settings("add_sub", {"trace_count": "5", "trace_rate": None}),
        lambda c: c.get_trace_settings("absent"),
        lambda c: c.update_trace_settings(settings={"trace_rate": None}),
        lambda c: c.update_trace_settings("add_sub", {"trace_count": None}),
    ),
    "logging": (
        lambda c: c.get_log_settings(),
        lambda c: c.update_log_settings({"log_info": False, "log_verbose_level": 1}),
        lambda c: c.update_log_settings({"log_info": True, "log_verbose_level": 0}),
    ),
    "system shared memory": (
        lambda c: c.get_system_shared_memory_status(),
        lambda c: c.register_system_shared_memory(REGION, KEY, 64),
        lambda c: c.register_system_shared_memory(REGION, KEY, 64),
        lambda c: c.get_system_shared_memory_status(REGION),
        lambda c: c.infer("add_sub", in_region(0), outputs=to_region()),
        lambda c: _contents(32),
        lambda c: c.infer("add_sub", in_region(60)),
        lambda c: c.get_system_shared_memory_status("absent"),
        lambda c: c.unregister_system_shared_memory(REGION),
        lambda c: c.register_system_shared_memory(REGION, KEY, 32, offset=4096),
        lambda c: c.unregister_system_shared_memory(),
        lambda c: c.get_system_shared_memory_status(),
    ),
    "cuda shared memory": (
        lambda c: c.get_cuda_shared_memory_status(),
        lambda c: _refused(c.register_cuda_shared_memory, REGION, base64.b64encode(bytes(64)), 0, 64),
        lambda c: c.get_cuda_shared_memory_status("absent"),
        lambda c: c.unregister_cuda_shared_memory(REGION),
        lambda c: c.unregister_cuda_shared_memory(),
    ),
    "infer": (
        lambda c: c.infer("add_sub", numbers()),
        lambda c: c.infer("add_sub", numbers(False)),
        lambda c: c.infer("add_sub", numbers(), outputs=[wanted("OUTPUT1"), wanted("OUTPUT0", binary_data=False)]),
        lambda c: c.infer("add_sub", numbers(), outputs=[wanted("OTHER")]),
        lambda c: c.infer("add_sub", numbers()[:1], request_id="mine"),
        lambda c: c.infer("absent", numbers()),
        lambda c: c.infer("add_sub", numbers(), model_version="1", request_id="mine", headers={"X-Own": "1"}),
        lambda c: c.infer("add_sub", numbers(), model_version="9"),
        lambda c: c.infer("add_sub", numbers(), query_params={"a": 1}, timeout=10_000_000, priority=1),
        lambda c: c.infer("add_sub", numbers(), request_compression_algorithm="gzip"),
        lambda c: c.infer("add_sub", numbers(), response_compression_algorithm="gzip"),
        lambda c: c.infer(
            "add_sub", numbers(), request_compression_algorithm="deflate", response_compression_algorithm="deflate"
        ),
        lambda c: c.infer("identity_bytes", strings()),
        lambda c: c.infer("identity_fp16", halves()),
        lambda c: c.infer(
            "classes", classes(), outputs=[wanted("OUTPUT0", class_count=2), wanted("OUTPUT1", class_count=3)]
        ),
        lambda c: c.infer("echo", one(), sequence_id=5, sequence_start=True, sequence_end=True),
        lambda c: c.infer("echo", one(), sequence_id="five", sequence_start=True),
        lambda c: c.infer("echo", one(), parameters={"own": "text", "whole": 3, "yes": True}),
    ),
    "infer from a body": (
        lambda c: c.generate_request_body(numbers(), outputs=[wanted("OUTPUT0")])[1],
        lambda c: c.parse_response_body(
            b'{"model_name":"m","model_version":"1","outputs":[{"name":"O","datatype":"INT32","shape":[1],"data":[3]}]}'
        ),
    ),
}  # fmt: skip
ONLY_SYNC: dict[str, Script] = {
    "async infer": (
        lambda c: c.async_infer("add_sub", numbers()).get_result(),
        lambda c: c.async_infer("absent", numbers()).get_result(),
    ),
}
KINDS = {
    "http": (sync_http.InferenceServerClient, {**SCRIPTS, **ONLY_SYNC}),
    "http.aio": (aio_http.InferenceServerClient, SCRIPTS),
}
# Both clients' health comes before anything fails to load: Triton is not ready after that.
CASES = [(kind, name) for name in {**SCRIPTS, **ONLY_SYNC} for kind, (_, scripts) in KINDS.items() if name in scripts]


@pytest.fixture(scope="module", autouse=True)
def region() -> Iterator[None]:
    handle = shm.create_shared_memory_region(REGION, KEY, 8192)
    shm.set_shared_memory_region(handle, [A, A])
    HANDLES.append(handle)
    yield
    shm.destroy_shared_memory_region(HANDLES.pop())


HANDLES: list[Any] = []


@pytest.fixture(params=[(kind, name) for kind, name in CASES], ids=lambda case: f"{case[0]}: {case[1]}")
async def results(request: pytest.FixtureRequest, pair: Pair) -> tuple[list[Any], list[Any]]:
    """What Triton gave for each step of the script, and what we did."""
    kind, name = request.param
    return await run(kind, name, pair.theirs), await run(kind, name, pair.ours)


async def test_the_same_results(results: tuple[list[Any], list[Any]]) -> None:
    """Results, errors and their statuses are equal, to the client's user."""
    theirs, ours = results
    found = [f"at {place}:\n  Triton    {a!r}\n  Millrace  {b!r}" for place, a, b in places(theirs, ours)]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_every_method_is_called() -> None:
    """A method that a client gains is a script that is missing here."""
    called = inspect.getsource(inspect.getmodule(test_every_method_is_called) or pytest)
    for client, _ in KINDS.values():
        for name, method in inspect.getmembers(client, callable):
            if not name.startswith("_") and name not in ("close", "plugin", "register_plugin", "unregister_plugin"):
                assert f"c.{name}(" in called or f"_refused(c.{name}," in called, (client, name, method)


async def run(kind: str, name: str, server: Server) -> list[Any]:
    client_of, scripts = KINDS[kind]
    client = client_of(f"127.0.0.1:{server.port}")
    try:
        return [await result(step, client) for step in scripts[name]]
    finally:
        closed = client.close()
        if inspect.isawaitable(closed):
            await closed


async def result(step: Callable[[Any], Any], client: Any) -> Any:
    """What a step gives, in a form that can be compared."""
    try:
        value = step(client)
        if inspect.isawaitable(value):
            value = await value
    except InferenceServerException as error:
        return {"status": error.status(), "message": error.message()}
    if hasattr(value, "get_response"):
        response = value.get_response()
        tensors = [(o["name"], _array(value, o["name"])) for o in response["outputs"]]
        return {"response": response, "tensors": tensors}
    return reduce(value)


def _array(value: Any, name: str) -> Any:
    output = value.get_output(name)
    if "data" not in output and not output.get("parameters"):
        return "in shared memory"
    array = value.as_numpy(name)
    return [str(array.dtype), array.tolist()]


def _contents(offset: int) -> list[float]:
    values: list[float] = shm.get_contents_as_numpy(HANDLES[0], np.float32, [4], offset=offset).tolist()
    return values


async def _without_identity(metadata: Any) -> Any:
    """Which server it is may be seen, and what it does not serve."""
    if inspect.isawaitable(metadata):
        metadata = await metadata
    return {key: value for key, value in metadata.items() if key not in ("name", "version", "extensions")}


async def _refused(call: Callable[..., Any], *arguments: Any) -> bool:
    """Of an error whose status differs deliberately, only that there is one."""
    try:
        value = call(*arguments)
        if inspect.isawaitable(value):
            await value
    except InferenceServerException:
        return True
    return False


assert set(PAIR[1]) <= set(MODELS)
