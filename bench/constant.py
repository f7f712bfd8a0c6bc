"""The floor of the HTTP side: an ASGI application that answers a constant."""

from typing import Any

BODY = b'{"model_name":"digits","model_version":"1","outputs":[]}'
HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-length", b"%d" % len(BODY)), (b"content-type", b"application/json")],
}


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await receive()
        await send(HEAD)
        await send({"type": "http.response.body", "body": BODY})
