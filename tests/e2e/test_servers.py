"""`asgi_app:app` as plain ASGI: started by each server's own program, with its lifespan, it serves and stops."""

import asyncio
import contextlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import h2.connection
import h2.events
import orjson
import pytest

from .client import PATIENCE, ROOT, SAMPLES, Address, Connection, check_samples, load, request
from .processes import Process, eventually, free_port, listens, started, tool

pytestmark = pytest.mark.e2e

# Server -> its command for the application, without the address; and the options that its address is given with.
SERVERS = {
    "uvicorn": ("uvicorn asgi_app:app", "--host {} --port {}"),
    "uvicorn on our protocol": ("uvicorn --http asgi_app.protocol:Protocol asgi_app:app", "--host {} --port {}"),
    "hypercorn": ("hypercorn asgi_app:app", "--bind {}:{}"),
    "granian": ("granian --interface asgi asgi_app:app", "--host {} --port {}"),
}
WITHOUT_LIFESPAN = {
    "uvicorn": ("uvicorn --lifespan off asgi_app:app", "--host {} --port {}"),
    "granian": ("granian --interface asginl asgi_app:app", "--host {} --port {}"),
}

MAX_BODY = 100_000
REPEAT = """backend: "python"
input [ { name: "COUNT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "INDEX" data_type: TYPE_INT32 dims: [ 1 ] } ]
model_transaction_policy { decoupled: true }
"""
REPEAT_MODEL = (ROOT / "tests/differential/models/repeat.py").read_text()
SLOW = """backend: "python"
input [ { name: "x" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""
# It tells that it has begun, and ends when it is told to.
SLOW_MODEL = """
import time
from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        Path("run/begun").touch()
        while not Path("run/go").exists():
            time.sleep(0.01)
        tensors = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", 2 * tensor)]) for tensor in tensors]
"""


def add_python_model(repository: Path, name: str, config: str, code: str) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config)
    (repository / name / "1" / "model.py").write_text(code)


def command(folder: Path, form: tuple[str, str], address: tuple[str, int]) -> list[str]:
    words = form[0].split()
    tool(words[0])
    return [str(folder / ".venv/bin" / words[0]), *words[1:], *form[1].format(*address).split()]


@contextlib.contextmanager
def serving(folder: Path, form: tuple[str, str], **settings: str) -> Iterator[tuple[Process, tuple[str, int]]]:
    """The application, ready; or, without a lifespan, listening."""
    address = ("127.0.0.1", free_port())
    variables = {f"MILLRACE_{name.upper()}": value for name, value in settings.items()}
    with started(folder, *command(folder, form, address), environment=variables) as server:
        eventually(lambda: not server.alive() or listens(address), "the port")
        yield server, address
        server.signal()
        server.wait()
        eventually(lambda: not server.alive(), "what it started has ended, too")


@pytest.fixture(scope="module", params=SERVERS)
def running(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Process, tuple[str, int]]]:
    """One of the servers, with the digits and a decoupled model."""
    repository = folder / "own"
    add_python_model(repository, "repeat", REPEAT, REPEAT_MODEL)
    with serving(folder, SERVERS[request.param], models="models:own", max_body=str(MAX_BODY)) as server:
        yield server
    shutil.rmtree(repository)


@pytest.fixture
def address(running: tuple[Process, tuple[str, int]]) -> Iterator[Address]:
    """Afterwards it still runs, and has logged no traceback."""
    yield running[1]
    assert running[0].alive()
    assert "Traceback" not in running[0].log(), running[0].log()


async def test_pictures_and_tensors(address: Address) -> None:
    """Each sample is the digit that it shows; an inference is answered; the service says that it is ready."""
    assert (await request(address, "GET", "/v2/health/ready")).status == 200
    await check_samples(address)
    tensor = {"name": "pixels", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.5] * 64}
    answer = await request(address, "POST", "/v2/models/digits/infer", orjson.dumps({"inputs": [tensor]}))
    (output,) = orjson.loads(answer.body)["outputs"]
    assert (answer.status, output["name"], len(output["data"])) == (200, "probabilities", 10)


async def test_events(address: Address) -> None:
    """A decoupled model's responses come as events, one after the other; its stream ends by itself."""
    answer = await request(address, "POST", "/v2/models/repeat/generate_stream", b'{"COUNT":20}')
    events = [orjson.loads(line.removeprefix(b"data: ")) for line in answer.body.split(b"\n\n")[:-1]]
    assert (answer.status, [event["INDEX"] for event in events]) == (200, list(range(20)))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_errors(address: Address) -> None:
    """Each has its status and its text, and after it its connection either ends, as announced, or serves on."""
    infer = "/v2/models/digits/infer"
    connection = await Connection.open(address)
    for method, path, body, header, status, text in (
        ("GET", "/v2/nope", b"", "", 404, "Not Found"),
        ("GET", "/v2/models/nope%2F..", b"", "", 404, "Request for unknown model: 'nope/..' is not found"),
        ("PUT", infer, b"{}", "", 405, "Method Not Allowed"),
        ("POST", infer, b"{}", "", 400, "Unable to parse 'inputs'"),
        ("POST", infer, b" " * (MAX_BODY + 1), "", 413, f"is over the limit of {MAX_BODY} bytes"),
        ("POST", infer, b"{}", "Content-Encoding: br", 415, "Unsupported compression type 'br'"),
        ("POST", "/classify", b"GIF89a", "", 415, "picture"),
        ("POST", "/classify?top_k=0", b"", "", 400, "top_k: must be a whole number"),
        ("POST", "/v2/models/repeat/infer", b'{"inputs":[]}', "", 501, "doesn't support models with decoupled"),
        ("POST", "/v2/repository/models/digits/load", b"", "", 503, "polling is enabled"),
    ):
        answer = await connection.request(method, path, body, (header,) if header else ())
        assert (answer.status, text in str(answer.json())) == (status, True), answer
        if answer.closes:
            await connection.close()
            connection = await Connection.open(address)
    await connection.close()


async def test_many_clients(address: Address) -> None:
    """On kept connections and on new ones, all at once: nobody's request fails."""
    async with load(address) as tally:
        await tally.more(50)
    assert (tally.failures, tally.refused, tally.wrong, set(tally.statuses)) == ([], 0, 0, {200}), tally


class Http2:
    """A connection of HTTP/2, for one request after the other."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=PATIENCE)
        self._frames = h2.connection.H2Connection()
        self._frames.initiate_connection()

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        stream = self._frames.get_next_available_stream_id()
        head = {":method": "POST", ":path": path, ":scheme": "http", ":authority": "millrace"}
        self._frames.send_headers(stream, [*head.items(), ("content-length", str(len(body)))])
        self._frames.send_data(stream, body, end_stream=True)
        headers, received = {}, b""
        while True:
            self._socket.sendall(self._frames.data_to_send())
            data = self._socket.recv(1 << 16)
            assert data, "closed"
            for event in self._frames.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    headers = {bytes(name).decode(): bytes(value).decode() for name, value in event.headers}
                elif isinstance(event, h2.events.DataReceived):
                    received += event.data or b""
                elif isinstance(event, h2.events.StreamEnded):
                    return int(headers.pop(":status")), headers, received

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("name", ["hypercorn", "granian"])
def test_http_2(folder: Path, name: str) -> None:
    """Where the server speaks it, an answer that would end a connection of HTTP/1.1 ends nothing; events come, too."""
    repository = folder / "events"
    add_python_model(repository, "repeat", REPEAT, REPEAT_MODEL)
    with (
        serving(folder, SERVERS[name], models="events") as (_, address),
        contextlib.closing(Http2(address)) as connection,
    ):
        status, headers, body = connection.post("/v2/nope", SAMPLES["7"])
        assert (status, body) == (404, b'{"error":"Not Found"}')
        assert "connection" not in headers
        status, _, body = connection.post("/v2/models/repeat/generate_stream", b'{"COUNT":3}')
        assert (status, body.count(b"data: ")) == (200, 3)
    shutil.rmtree(repository)


@pytest.mark.parametrize("name", SERVERS)
async def test_a_stop_answers_what_is_under_way(folder: Path, name: str) -> None:
    """SIGTERM: idle connections are closed, who waits for an answer gets it, and the server ends."""
    repository, begun, go = folder / "slow", folder / "run/begun", folder / "run/go"
    add_python_model(repository, "slow", SLOW, SLOW_MODEL)
    body = orjson.dumps({"inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [21]}]})
    try:
        with serving(folder, SERVERS[name], models="slow") as (server, address):
            async with await Connection.open(address) as idle:
                assert (await idle.request("GET", "/livez")).status == 200
                asked = asyncio.create_task(request(address, "POST", "/v2/models/slow/infer", body))
                await asyncio.to_thread(eventually, begun.exists, "the model has begun")
                server.signal()
                assert await idle.ended()  # so it knows
                go.touch()
                answer = await asked
                assert (answer.status, orjson.loads(answer.body)["outputs"][0]["data"]) == (200, [42])
            assert await asyncio.to_thread(server.wait) in (0, -15), server.log()
            assert "Traceback" not in server.log(), server.log()
    finally:
        shutil.rmtree(repository)
        begun.unlink(missing_ok=True)
        go.unlink(missing_ok=True)


@pytest.mark.parametrize("name", SERVERS)
def test_a_start_that_fails_ends_the_server(folder: Path, name: str) -> None:
    """Whatever else it says, what is wrong is in its log, and it does not serve."""
    with serving(folder, SERVERS[name], models="no/such/folder") as (server, address):
        server.wait()
        assert "no/such/folder: the model repository is no folder (MILLRACE_MODELS, --models)" in server.log()
        assert not listens(address)


@pytest.mark.parametrize("name", WITHOUT_LIFESPAN)
async def test_a_server_without_lifespan_is_told_so(folder: Path, name: str) -> None:
    """Nothing can be served there: each answer is 503 and says what is missing."""
    with serving(folder, WITHOUT_LIFESPAN[name]) as (_, address):
        answer = await request(address, "GET", "/v2/health/ready")
        assert (answer.status, "lifespan" in str(answer.json()["error"])) == (503, True)
