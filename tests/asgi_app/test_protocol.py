"""The protocol class: what a connection may cost before there is a request, and who is refused."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from asgi_app.protocol import Protocol
from engine.settings import Settings

Open = Callable[[], Any]


async def app(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Open]:
    """A listener with this class; yields what opens a connection to it."""
    config = uvicorn.Config(app, lifespan="off")
    config.load()
    state = ServerState()
    app_state = {"settings": Settings(**settings)} if settings else {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Protocol(config=config, server_state=state, app_state=app_state), "127.0.0.1", 0
    )
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writers.append(writer)
        return reader, writer

    yield connect
    for writer in writers:
        writer.close()
    server.close()
    await server.wait_closed()
    for connection in list(state.connections):
        connection.transport.abort()
    await asyncio.sleep(0)


GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def ask(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], data: bytes = GET) -> bytes:
    """Send, and return the status line of what comes back; empty if the connection is closed instead."""
    reader, writer = connection
    writer.write(data)
    async with asyncio.timeout(10):
        line = await reader.readline()
        if line.startswith(b"HTTP/1.1 200"):
            await reader.readuntil(b"ok")
    return line


async def test_a_connection_too_many_is_refused_and_those_inside_are_served() -> None:
    """One above the bound gets 503 and is closed; the others never notice; when one leaves there is room again."""
    async with serving(max_connections=2) as connect:
        inside = [await connect(), await connect()]
        assert [await ask(each) for each in inside] == [b"HTTP/1.1 200 OK\r\n"] * 2
        outside = await connect()
        assert await ask(outside, b"") == b"HTTP/1.1 503 Service Unavailable\r\n"
        assert b"connection: close" in await outside[0].read()
        assert [await ask(each) for each in inside] == [b"HTTP/1.1 200 OK\r\n"] * 2
        inside[0][1].close()
        await inside[0][1].wait_closed()
        assert await ask(await connect()) == b"HTTP/1.1 200 OK\r\n"


async def test_a_connection_that_says_nothing_is_closed() -> None:
    """Silence is closed after the head's time, without an answer to nothing."""
    async with serving(head_timeout=0.02) as connect:
        assert await ask(await connect(), b"") == b""


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_end_is_408(start: bytes) -> None:
    """A head that began and does not end gets 408, on a new connection and on a kept one."""
    async with serving(head_timeout=0.05) as connect:
        assert await ask(await connect(), start) == b"HTTP/1.1 408 Request Timeout\r\n"
        kept = await connect()
        assert await ask(kept) == b"HTTP/1.1 200 OK\r\n"
        assert await ask(kept, start) == b"HTTP/1.1 408 Request Timeout\r\n"


async def test_a_head_over_the_bound_is_431() -> None:
    """Headers without end are given up at the bound, and a kept connection starts to count anew with each request."""
    async with serving(max_head=4096) as connect:
        kept = await connect()
        for _ in range(5):
            assert await ask(kept, GET[:-2] + b"a: %b\r\n\r\n" % (b"x" * 2000)) == b"HTTP/1.1 200 OK\r\n"
        writer = kept[1]
        for piece in (GET[:-2], *[b"a: %b\r\n" % (b"x" * 1000)] * 5):
            writer.write(piece)
            await asyncio.sleep(0.01)
        assert await ask(kept, b"") == b"HTTP/1.1 431 Request Header Fields Too Large\r\n"


async def test_time_in_a_body_is_not_time_in_a_head() -> None:
    """A body may take longer than a head, and pipelined requests are each answered."""
    async with serving(head_timeout=0.05) as connect:
        slow = await connect()
        slow[1].write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\na")
        await asyncio.sleep(0.1)
        assert await ask(slow, b"b") == b"HTTP/1.1 200 OK\r\n"
        piped = await connect()
        assert await ask(piped, GET + GET) == b"HTTP/1.1 200 OK\r\n"
        assert await ask(piped, b"") == b"HTTP/1.1 200 OK\r\n"


async def test_without_settings_it_serves_with_the_defaults() -> None:
    """In plain uvicorn, before a lifespan or without one, the class works all the same."""
    async with serving() as connect:
        assert await ask(await connect()) == b"HTTP/1.1 200 OK\r\n"
