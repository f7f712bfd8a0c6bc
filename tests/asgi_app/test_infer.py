"""Infer over HTTP, beyond plain JSON: content codings, shared memory, classes, headers for the model."""

import asyncio
import gzip
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from asgi_app import messages
from engine.types import InferRequest, InferResponse
from tests.client import Client
from tests.conftest import StartEngine
from tests.scripted import CONFIG, Scripted, add_model, double

INFER = "/v2/models/m/infer"
ClientOf = Callable[..., Client]

PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}


def body(value: float = 1.0, rows: int = 1, **more: Any) -> bytes:
    data = [value] * 4 * rows
    return orjson.dumps({"inputs": [{"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": data}], **more})


def large() -> bytes:
    """A body that is handed to a thread, whatever its coding."""
    noise = np.random.default_rng(0).random(1 << 15).tolist()
    content = body(more=noise)
    assert len(gzip.compress(content)) > messages.MOST_INLINE
    return content


@pytest.mark.parametrize(
    ("content", "coding", "status", "text"),
    [
        (b"plain", "gzip", 400, "Content-Encoding: the body is not valid gzip"),
        (PACK["gzip"](body())[:-1], "gzip", 400, "Content-Encoding: the gzip body is cut off"),
        (PACK["deflate"](body()), "gzip", 400, "not valid gzip"),
        (zlib.compress(body(), wbits=-15), "deflate", 400, "not valid deflate"),
        (PACK["gzip"](bytes(20_001)), "gzip", 413, "over the limit of 20000 bytes (MILLRACE_MAX_BODY)"),
        (PACK["gzip"](bytes(1 << 24)), "gzip", 413, "over the limit of 20000 bytes (MILLRACE_MAX_BODY)"),
        (PACK["deflate"](bytes(1 << 24)), "deflate", 413, "(MILLRACE_MAX_BODY)"),
        (body(), "br", 415, "Unsupported compression type 'br'"),
        (PACK["gzip"](body()), "GZIP", 415, "Unsupported compression type 'GZIP'"),
        (PACK["gzip"](PACK["gzip"](body())), "gzip, gzip", 415, "Unsupported compression type"),
    ],
)
async def test_bodies_in_a_coding_that_is_not_theirs(
    content: bytes, coding: str, status: int, text: str, start_engine: StartEngine, client_of: ClientOf
) -> None:
    """What is not what it says is 400, a bomb 413 naming the bound, another coding 415; the model never runs."""
    client = client_of(await start_engine(m=double), max_body=20_000)
    answer = await client("POST", INFER, content, {"Content-Encoding": coding})
    assert (answer.status, text in answer.error) == (status, True)
    assert Scripted.calls == []
    assert "content-encoding" not in answer.headers
    if status == 415:
        assert answer.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize("coding", PACK)
@pytest.mark.parametrize("size", ["small", "large", "large once it is unpacked"])
async def test_a_body_in_a_coding(coding: str, size: str, start_engine: StartEngine, client_of: ClientOf) -> None:
    """It is read as if it had come plain, whatever its size."""
    plain = {"small": body(), "large": large()}.get(size) or body(more=[0.5] * messages.MOST_INLINE)
    client = client_of(await start_engine(m=double))
    answer = await client("POST", INFER, PACK[coding](plain), {"Content-Encoding": coding})
    assert (answer.status, answer.json["outputs"][0]["data"]) == (200, [2.0] * 4)


@pytest.mark.parametrize("coding", PACK)
async def test_lengths_count_plain_bytes(coding: str, start_engine: StartEngine, client_of: ClientOf) -> None:
    """Inference-Header-Content-Length is about the uncompressed body in both directions, Content-Length is not."""
    client = client_of(await start_engine(m=double))
    tensor = np.arange(4, dtype="<f4")
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
    head = orjson.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}})
    headers = {"Content-Encoding": coding, "Accept-Encoding": coding, "Inference-Header-Content-Length": str(len(head))}
    answer = await client("POST", INFER, PACK[coding](head + tensor.tobytes()), headers)
    assert answer.headers["content-encoding"] == coding
    assert answer.headers["content-type"] == "application/octet-stream"
    assert int(answer.headers["content-length"]) == len(answer.body)
    plain = UNPACK[coding](answer.body)
    length = int(answer.headers["inference-header-content-length"])
    assert orjson.loads(plain[:length])["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert np.frombuffer(plain[length:], "<f4").tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("rows", [1, 4000])
@pytest.mark.parametrize(
    ("accepted", "coding"),
    [("gzip, deflate", "gzip"), ("deflate;q=0.9, gzip;q=0.1", "deflate"), ("br", ""), ("identity", "")],
)
async def test_the_answer_in_the_coding_that_is_preferred(
    accepted: str, coding: str, rows: int, start_engine: StartEngine, client_of: ClientOf, tmp_path: Path
) -> None:
    """Small or large, it is what it is without the header, in its coding."""
    add_model(tmp_path, "m", CONFIG.replace("32", "4000").replace("TYPE_FP4000", "TYPE_FP32"))
    client = client_of(await start_engine({"queue_rows": 4000}, m=double))
    plain = await client("POST", INFER, body(rows=rows))
    answer = await client("POST", INFER, body(rows=rows), {"Accept-Encoding": accepted})
    assert (answer.status, answer.headers.get("content-encoding", "")) == (200, coding)
    assert (UNPACK[coding](answer.body) if coding else answer.body) == plain.body
    assert "content-encoding" not in plain.headers


async def test_errors_and_other_endpoints_are_not_compressed(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Only what a model answered is."""
    client = client_of(await start_engine(m=double))
    for answer in (
        await client("POST", INFER, b"{}", {"Accept-Encoding": "gzip"}),
        await client("GET", "/v2/models/m", b"", {"Accept-Encoding": "gzip"}),
    ):
        assert "content-encoding" not in answer.headers
        assert answer.json


async def test_what_is_large_is_not_unpacked_on_the_event_loop(
    start_engine: StartEngine, client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor packed: the loop has others to serve meanwhile. What is small is, which is sooner done."""
    client = client_of(await start_engine(m=double))
    threads: list[tuple[str, bool]] = []
    for name in ("compress", "decompress"):
        function = getattr(messages, name)

        def seen(*args: Any, name: str = name, function: Any = function) -> Any:
            result = function(*args)
            threads.append((name, threading.current_thread() is threading.main_thread()))
            return result

        monkeypatch.setattr(messages, name, seen)
    for content in (body(), large()):
        headers = {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
        assert (await client("POST", INFER, gzip.compress(content), headers)).status == 200
    assert threads == [("decompress", True), ("compress", True), ("decompress", False), ("compress", True)]
    answer = "x" * messages.MOST_INLINE
    monkeypatch.setattr("asgi_app.v2.encode_response", lambda *_: (answer.encode() + b"x", 0))
    await client("POST", INFER, body(), {"Accept-Encoding": "gzip"})
    assert threads[-1] == ("compress", False)


LABELS = CONFIG.replace('name: "y"', 'name: "y" label_filename: "fruit.txt"')


async def test_classes(start_engine: StartEngine, client_of: ClientOf, tmp_path: Path) -> None:
    """The best classes of each row, with the labels of the model's folder."""
    (add_model(tmp_path, "m", LABELS) / "fruit.txt").write_text("apple\npear\n\nplum\n")
    client = client_of(await start_engine(m=double))
    entry = {"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [1, 2, 3, 4, 4, 3, 2, 1]}
    outputs = [{"name": "y", "parameters": {"classification": 2}}]
    answer = await client("POST", INFER, orjson.dumps({"inputs": [entry], "outputs": outputs}))
    assert answer.json["outputs"] == [
        {
            "name": "y",
            "datatype": "BYTES",
            "shape": [2, 2],
            "data": ["8.000000:3:plum", "6.000000:2", "8.000000:0:apple", "6.000000:1:pear"],
        }
    ]


async def test_a_body_without_json(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Inference-Header-Content-Length: 0 makes the body the tensor, one row of it, and the answer binary."""
    client = client_of(await start_engine(m=double))
    headers = {"Inference-Header-Content-Length": "0"}
    answer = await client("POST", INFER, np.arange(4, dtype="<f4").tobytes(), headers)
    length = int(answer.headers["inference-header-content-length"])
    assert orjson.loads(answer.body[:length])["outputs"][0]["shape"] == [1, 4]
    assert np.frombuffer(answer.body[length:], "<f4").tolist() == [0, 2, 4, 6]
    assert (await client("POST", INFER, b"12", headers)).status == 400
    assert (await client("POST", "/v2/models/none/infer", b"12", headers)).status == 404


@pytest.fixture
def shared_file() -> Iterator[Path]:
    """A file where shared memory lives."""
    path = Path(f"/dev/shm/millrace_test_infer_{threading.get_native_id()}")
    path.write_bytes(np.arange(4, dtype="<f4").tobytes() + bytes(16))
    yield path
    path.unlink()


def in_shared_memory(size: int = 16) -> bytes:
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 16}
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": place}
    output = {"name": "y", "parameters": {**place, "shared_memory_byte_size": size, "shared_memory_offset": 16}}
    return orjson.dumps({"inputs": [entry], "outputs": [output]})


async def test_tensors_in_shared_memory(start_engine: StartEngine, client_of: ClientOf, shared_file: Path) -> None:
    """Read from its place and written to its place; the answer says what is there. An unknown region is 404."""
    engine = await start_engine({"shared_memory": True}, m=double)
    client = client_of(engine)
    answer = await client("POST", INFER, in_shared_memory())
    assert (answer.status, answer.error) == (404, "Unable to find shared memory region: 'r'")
    await engine.regions.register("r", f"/{shared_file.name}", 0, 32)
    answer = await client("POST", INFER, in_shared_memory(15))
    assert (answer.status, "(15 bytes) should be at least 16 bytes" in answer.error) == (500, True)
    answer = await client("POST", INFER, in_shared_memory())
    assert answer.json["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4]}]
    assert np.frombuffer(shared_file.read_bytes(), "<f4").tolist() == [0, 1, 2, 3, 0, 2, 4, 6]


async def test_a_region_that_is_unregistered_meanwhile(
    start_engine: StartEngine, client_of: ClientOf, shared_file: Path
) -> None:
    """A request that was accepted writes to the memory that it was promised."""
    engine = await start_engine({"shared_memory": True}, m=double)
    client = client_of(engine)
    await engine.regions.register("r", shared_file.name, 0, 32)
    run = engine.infer

    async def unregister_first(request: InferRequest) -> InferResponse:
        await engine.regions.unregister()
        return await run(request)

    engine.infer = unregister_first  # type: ignore[method-assign]
    assert (await client("POST", INFER, in_shared_memory())).status == 200
    assert np.frombuffer(shared_file.read_bytes(), "<f4")[4:].tolist() == [0, 2, 4, 6]
    assert (await client("POST", INFER, in_shared_memory())).status == 404


class Spy:
    """An engine's `infer` that remembers what it was asked, and says something besides."""

    def __init__(self, engine: Any, **says: str | int | bool | float) -> None:
        self.asked: list[InferRequest] = []
        self._run, self._says = engine.infer, says
        engine.infer = self

    async def __call__(self, request: InferRequest) -> InferResponse:
        self.asked.append(request)
        response: InferResponse = await self._run(request)
        response.parameters.update(self._says)
        return response


async def test_parameters_in_and_out(start_engine: StartEngine, client_of: ClientOf) -> None:
    """The model's own reach it, and what it says reaches the client."""
    engine = await start_engine(m=double)
    spy, client = Spy(engine, cost=3), client_of(engine)
    headers = {"X-Trace": "abc"}  # not forwarded unless the operator says so
    answer = await client("POST", INFER, body(parameters={"mine": "x", "sequence_id": 7}), headers)
    assert answer.json["parameters"] == {"cost": 3}
    assert (spy.asked[0].parameters, spy.asked[0].correlation_id) == ({"mine": "x"}, 7)


async def test_headers_for_the_model(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Those whose name the pattern is found in, in either case, become parameters; they win over the client's."""
    engine = await start_engine(m=double)
    spy, client = Spy(engine), client_of(engine, forward_headers="^X-(User|Tenant)")
    headers = {"X-User": "anna", "x-tenant-id": "é", "X-Other": "no", "My-X-User": "no"}
    await client("POST", INFER, body(parameters={"x-user": "mallory", "mine": 1}), headers)
    assert spy.asked[0].parameters == {"x-user": "anna", "mine": 1, "x-tenant-id": "é"}


async def test_many_at_once_in_every_form(start_engine: StartEngine, client_of: ClientOf) -> None:
    """Each gets its own answer in the form that it asked for."""
    client = client_of(await start_engine(m=double))

    async def one(n: int) -> None:
        coding = ("gzip", "deflate", "")[n % 3]
        content = PACK[coding](body(n)) if coding else body(n)
        headers = {"Content-Encoding": coding, "Accept-Encoding": coding} if coding else {}
        answer = await client("POST", INFER, content, headers)
        plain = UNPACK[coding](answer.body) if coding else answer.body
        assert orjson.loads(plain)["outputs"][0]["data"] == [2.0 * n] * 4

    await asyncio.gather(*(one(n) for n in range(60)))
