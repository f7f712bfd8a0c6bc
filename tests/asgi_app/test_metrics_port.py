"""The port for /metrics: what monitoring asks for, and nothing of the service."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from asgi_app.metrics_port import listen
from engine.errors import ConfigError
from engine.settings import Settings
from tests.conftest import StartEngine
from tests.scripted import double

Ask = Callable[[bytes], Awaitable[bytes]]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
async def ask(start_engine: StartEngine) -> AsyncIterator[Ask]:
    """Send bytes to the port, and read what comes until it closes."""
    engine, port = await start_engine(m=double), free_port()
    server = await listen(engine, Settings(metrics_port=port))
    assert server is not None

    async def send(request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        try:
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()

    yield send
    server.close()
    await server.wait_closed()


async def test_metrics_are_answered_and_nothing_else(ask: Ask) -> None:
    """Other paths are not there, other methods are not allowed, a query is fine."""
    head, _, body = (await ask(b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-type: text/plain; version=0.0.4; charset=utf-8" in head
    assert f"content-length: {len(body)}".encode() in head
    assert b'nv_inference_request_success{model="m",version="1"} 0' in body
    only_head = await ask(b"HEAD /metrics HTTP/1.0\r\n\r\n")
    assert only_head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert only_head.endswith(b"\r\n\r\n")
    for request, status in (
        (b"GET /v2", b"404 Not Found"),
        (b"POST /metrics", b"405 Method Not Allowed"),
        (b"x", b"404"),
    ):
        assert (await ask(request + b" HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 " + status)


async def test_a_head_that_is_too_long_or_cut_gets_no_answer(ask: Ask) -> None:
    """The connection is closed, and the next one is served."""
    assert await ask(b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 5000) == b""
    assert (await ask(b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_no_port_is_no_server_and_a_taken_one_is_named(start_engine: StartEngine) -> None:
    engine = await start_engine(m=double)
    assert await listen(engine, Settings()) is None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MILLRACE_METRICS_PORT: 127.0.0.1 port {port}: "):
            await listen(engine, Settings(metrics_port=port))
