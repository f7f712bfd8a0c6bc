"""One server and its clients: Triton's own, slow ones, greedy ones, and such as do not speak HTTP."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from asgi_app.pictures import ink, open_picture

from .client import SAMPLES, Address, Connection, check_samples, request
from .processes import Process, on_port

pytestmark = pytest.mark.e2e

MAX_BODY = 100_000


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[tuple[Process, tuple[str, int]]]:
    with on_port(folder, {"MILLRACE_BODY_TIMEOUT": "1", "MILLRACE_MAX_BODY": str(MAX_BODY)}) as server:
        yield server


@pytest.fixture
def address(running: tuple[Process, tuple[str, int]]) -> Address:
    return running[1]


@pytest.fixture(autouse=True)
def unharmed(running: tuple[Process, tuple[str, int]]) -> Iterator[None]:
    """After each test the same process still runs, and has logged no traceback."""
    yield
    server, _ = running
    assert server.alive() == [server.pid]
    assert "Traceback" not in server.log(), server.log()


@pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "JSON out"])
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary in", "JSON in"])
def test_tritons_client_infers(running: tuple[Process, tuple[str, int]], binary_in: bool, binary_out: bool) -> None:
    """Triton's own client, unmodified, gets the right digits for a batch, as JSON and as binary tensors."""
    pixels = np.stack([ink(open_picture(picture, 10**6), 8, 8) for picture in SAMPLES.values()])
    tensor = triton.InferInput("pixels", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels.astype(np.float32), binary_data=binary_in)
    output = triton.InferRequestedOutput("probabilities", binary_data=binary_out)
    with triton.InferenceServerClient("{}:{}".format(*running[1])) as client:
        result = client.infer("digits", [tensor], outputs=[output], request_id="batch 1")
        probabilities = result.as_numpy("probabilities")
    assert [str(digit) for digit in probabilities.argmax(axis=1)] == list(SAMPLES)
    assert result.get_response()["id"] == "batch 1"


def test_tritons_client_asks_for_health_and_metadata(running: tuple[Process, tuple[str, int]]) -> None:
    """Triton's own client reads liveness, readiness and metadata; what is not there is an error it understands."""
    with triton.InferenceServerClient("{}:{}".format(*running[1])) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert client.is_model_ready("digits", "1")
        assert not client.is_model_ready("nobody")
        assert client.get_server_metadata()["name"] == "millrace"
        metadata = client.get_model_metadata("digits")
        assert metadata["versions"] == ["1"]
        assert metadata["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
        with pytest.raises(triton.InferenceServerException, match="unknown model: 'nobody'"):
            client.get_model_metadata("nobody")


async def test_a_client_that_stalls_in_its_body_gets_408(address: Address) -> None:
    """A body that stops arriving is answered 408 after MILLRACE_BODY_TIMEOUT, and the connection is closed."""
    async with await Connection.open(address) as connection:
        await connection.send(b"POST /classify HTTP/1.1\r\nHost: millrace\r\nContent-Length: 1000\r\n\r\nabc")
        answer = await connection.answer()
        assert answer.status == 408
        assert "MILLRACE_BODY_TIMEOUT" in str(answer.json()["detail"])
        assert answer.closes
        assert await connection.ended()
    await check_samples(address)


async def test_a_body_announced_as_too_large_gets_413(address: Address) -> None:
    """The announcement is enough: the answer comes although the body never does."""
    async with await Connection.open(address) as connection:
        await connection.send(b"POST /classify HTTP/1.1\r\nHost: millrace\r\nContent-Length: 100001\r\n\r\nabc")
        answer = await connection.answer()
        assert answer.status == 413
        assert "MILLRACE_MAX_BODY" in str(answer.json()["detail"])
        assert answer.closes
        assert await connection.ended()
    await check_samples(address)


async def test_a_client_that_asks_first_is_spared_the_upload(address: Address) -> None:
    """`Expect: 100-continue` with too large a body is answered 413 and never 100."""
    async with await Connection.open(address) as connection:
        head = b"POST /classify HTTP/1.1\r\nHost: millrace\r\nExpect: 100-continue\r\nContent-Length: 100001\r\n\r\n"
        await connection.send(head)
        answer = await connection.answer()
        assert answer.status == 413
        assert answer.closes
    await check_samples(address)


async def test_a_client_that_asks_first_is_told_to_go_on(address: Address) -> None:
    """`Expect: 100-continue` with a body that fits is answered 100, then with the result."""
    body = SAMPLES["7"]
    async with await Connection.open(address) as connection:
        head = (
            f"POST /classify HTTP/1.1\r\nHost: millrace\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        await connection.send(head.encode())
        await connection.interim()
        await connection.send(body)
        answer = await connection.answer()
        assert answer.json()["class_name"] == "7"


@pytest.mark.parametrize("size", [MAX_BODY + 1, MAX_BODY + MAX_BODY // 2])
async def test_a_body_streamed_beyond_the_limit_gets_413(address: Address, size: int) -> None:
    """A chunked body announces no size: it is counted as it comes."""
    async with await Connection.open(address) as connection:
        await connection.send(b"POST /classify HTTP/1.1\r\nHost: millrace\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, size, 10_000):
            part = b"x" * min(10_000, size - start)
            await connection.send(b"%x\r\n%b\r\n" % (len(part), part))
        await connection.send(b"0\r\n\r\n")
        answer = await connection.answer()
        assert answer.status == 413
        assert answer.closes
        assert await connection.ended()
    await check_samples(address)


async def test_a_chunked_picture_is_as_good_as_any(address: Address) -> None:
    """A body sent in chunks of one byte gives the same digit."""
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in SAMPLES["7"])
    async with await Connection.open(address) as connection:
        await connection.send(b"POST /classify HTTP/1.1\r\nHost: millrace\r\nTransfer-Encoding: chunked\r\n\r\n")
        await connection.send(body + b"0\r\n\r\n")
        assert (await connection.answer()).json()["class_name"] == "7"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"\x00" * 1000,
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        "GET /v2/models/zürich HTTP/1.1\r\nHost: millrace\r\n\r\n".encode(),
        b"GET /v2/\xff\xfe HTTP/1.1\r\nHost: millrace\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: millrace\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: millrace\r\nContent-Length: -1\r\n\r\n",
        b"BREW /classify HTTP/1.1\r\nHost: millrace\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: millrace\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: millrace\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=[
        "a TLS hello", "zeros", "no request line", "no header", "UTF-8 in the target", "no UTF-8 in the target",
        "no URL", "a negative length", "no method",
        "two lengths", "no chunk",
    ],
)  # fmt: skip
async def test_what_is_not_http_is_refused_and_harms_nobody(address: Address, data: bytes) -> None:
    """Rubbish is answered with a status from 400 to 499 and a closed connection, or with the latter alone."""
    async with await Connection.open(address) as connection:
        await connection.send(data)
        if not await connection.ended():
            answer = await connection.answer()
            assert 400 <= answer.status < 500 or answer.status == 501
            assert answer.closes
            assert await connection.ended()
    await check_samples(address)


async def test_a_client_that_leaves_in_its_body_harms_nobody(address: Address) -> None:
    """A connection that ends in the middle of a body, or of a head, leaves no trace."""
    for data in (b"POST /classify HTTP/1.1\r\nHost: millrace\r\nContent-Length: 1000\r\n\r\nabc", b"POST /class"):
        async with await Connection.open(address) as connection:
            await connection.send(data)
    await check_samples(address)


async def test_a_connection_serves_many_requests(address: Address) -> None:
    """Keep-alive: answers of every kind leave the connection usable, errors included."""
    async with await Connection.open(address) as connection:
        for digit, picture in SAMPLES.items():
            answer = await connection.request("POST", "/classify", picture)
            assert answer.json()["class_name"] == digit
            assert (await connection.request("GET", "/nowhere")).status == 404
            assert (await connection.request("POST", "/classify", b"no picture")).status in (400, 415)
            assert not answer.closes
    assert (await request(address, "GET", "/v2/health/live")).status == 200


@pytest.mark.parametrize(
    ("name", "status"), [("..", 404), ("%2e%2e", 404), ("a%2fb", 404), ("%ff", 400), ("100%", 404)]
)
async def test_a_models_name_is_a_name_and_nothing_else(address: Address, name: str, status: int) -> None:
    """Dots, an encoded slash, a stray percent sign, bytes that are no text: not found or refused, and never a path."""
    body = b'{"inputs":[]}'
    answer = await request(address, "POST", f"/v2/models/{name}/infer", body)
    assert answer.status == status
    assert "error" in answer.json()
