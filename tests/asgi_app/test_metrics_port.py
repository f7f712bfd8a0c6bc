"""The port for /metrics: what monitoring asks for, and nothing of the service."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from asgi_app import metrics_port
from asgi_app.metrics_port import listen
from engine.errors import ConfigError
from engine.settings import Settings
from tests.conftest import StartEngine
from tests.scripted import double

Ask = Callable[[bytes], Awaitable[bytes]]

METRICS = b"GET /metrics HTTP/1.1\r\n\r\n"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
async def port(start_engine: StartEngine) -> AsyncIterator[int]:
    """That of a server in front of an engine with a model m."""
    engine, port = await start_engine(m=double), free_port()
    server = await listen(engine, Settings(metrics_port=port))
    assert server is not None
    yield port
    server.close()
    await server.wait_closed()


async def send(port: int, request: bytes) -> bytes:
    """Send bytes to the port, and read what comes until it closes, or breaks off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 20)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.fixture
def ask(port: int) -> Ask:
    return lambda request: send(port, request)


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


async def test_a_port_serves_so_many_at_a_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is closed at once; when one of them goes, there is room again."""
    monkeypatch.setattr(metrics_port, "MOST_CONNECTIONS", 2)
    monkeypatch.setattr(metrics_port, "WITHIN", 60.0)
    async with silent(port), silent(port):
        assert await send(port, METRICS) == b""
    async with asyncio.timeout(20):
        while not await send(port, METRICS):  # those two have not been seen to go yet
            continue


async def test_who_says_nothing_is_left(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the connection is closed without an answer."""
    monkeypatch.setattr(metrics_port, "WITHIN", 0.05)
    assert await ask(b"GET /metrics") == b""


@pytest.mark.parametrize("settings", [{"metrics_dir": "/tmp/any"}, {"engine_socket": "/tmp/any.sock"}])
async def test_processes_that_tell_the_same_share_the_port(settings: dict[str, Any]) -> None:
    """Each tells the counts of all; without that the second is refused."""
    engine: Any = Told()
    port = free_port()
    first = await listen(engine, Settings(metrics_port=port, **settings))
    second = await listen(engine, Settings(metrics_port=port, **settings))
    assert first is not None
    assert second is not None
    with pytest.raises(ConfigError, match="share it with MILLRACE_METRICS_DIR, or with MILLRACE_ENGINE_SOCKET"):
        await listen(engine, Settings(metrics_port=port))
    for server in (first, second):
        assert (await send(port, METRICS)).endswith(b"told 1\n")
        server.close()
        await server.wait_closed()


class Told:
    """An engine that has been counted."""

    async def metrics(self) -> str:
        return "told 1\n"


@contextlib.asynccontextmanager
async def silent(port: int) -> AsyncIterator[None]:
    """A connection that says nothing."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    yield
    writer.close()
