"""A port for /metrics and nothing else, as Triton has one: for monitoring that must not reach the service itself."""

import asyncio

from engine.errors import ConfigError
from engine.settings import Settings
from engine.types import Engine

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

# Bytes of a request's head, seconds to send it and to read the answer, and connections at a time.
MOST_HEAD = 8192
WITHIN = 5.0
MOST_CONNECTIONS = 32


async def listen(engine: Engine, settings: Settings) -> asyncio.Server | None:
    """Serve /metrics on `metrics_port`; None if there is none.

    Several processes may listen there if each tells the counts of all: with `metrics_dir` or `engine_socket`.

    Raises:
        ConfigError: the port cannot be had.
    """
    if not settings.metrics_port:
        return None

    open_connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_connections
        if open_connections >= MOST_CONNECTIONS:
            writer.transport.abort()
            return
        open_connections += 1
        try:
            async with asyncio.timeout(WITHIN):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await _response(engine, head))
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        finally:
            open_connections -= 1

    shared = bool(settings.metrics_dir or settings.engine_socket)
    try:
        return await asyncio.start_server(
            answer, settings.host, settings.metrics_port, limit=MOST_HEAD, reuse_port=shared
        )
    except OSError as error:
        raise ConfigError(
            f"MILLRACE_METRICS_PORT: {settings.host} port {settings.metrics_port}: {error.strerror or error}; "
            "processes of one service share it with MILLRACE_METRICS_DIR, or with MILLRACE_ENGINE_SOCKET"
        ) from None


async def _response(engine: Engine, head: bytes) -> bytes:
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    status, body = "404 Not Found", b"Not Found\n"
    if path == b"/metrics":
        status, body = "405 Method Not Allowed", b"Method Not Allowed\n"
        if method in (b"GET", b"HEAD"):
            status, body = "200 OK", (await engine.metrics()).encode()
    start = (
        f"HTTP/1.1 {status}\r\ncontent-type: {PROMETHEUS}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return start.encode() + (b"" if method == b"HEAD" else body)
