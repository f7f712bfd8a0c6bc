"""A client that calls `app(scope, receive, send)` in memory, and can misbehave like a real one.

Where the engine is in a form of the service that has a server (tests/servers.py), it sends the same through a socket.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from asgi_app import app
from engine.settings import Settings
from engine.types import Engine

from .forms import next_worker
from .servers import FRONTS

SERVERS_OWN = ("date", "server")  # headers that say nothing of the application


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> str:
        """The text of an error's body, under either of its keys."""
        (text,) = self.json.values()
        assert isinstance(text, str)
        return text


class Client:
    """Calls the application for one engine; of several workers, for each in turn."""

    def __init__(self, engine: Engine | None, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings

    @property
    def state(self) -> dict[str, Any]:
        """The lifespan's, of the worker that the next request comes to."""
        if self.engine is None:
            return {}
        engine = next_worker(self.engine)
        return {"engine": engine, "settings": self.settings, "loop": asyncio.get_running_loop()}

    async def __call__(
        self,
        method: str,
        path: str,
        body: bytes | Sequence[bytes] = b"",
        headers: dict[str, str] | None = None,
        leave: asyncio.Event | None = None,
        stall: bool = False,
        heard: Callable[[bytes], object] = len,
    ) -> Answer:
        """Send one request.

        Args:
            path: percent-encoded, with its query.
            body: in one piece, or in several.
            leave: when it is set, the client disconnects.
            stall: the last piece of the body never comes.
            heard: is called with each piece of the answer's body; over a socket, of the whole answer as it is written.

        Returns:
            What came; over a socket, nothing where the answer was not whole before the client left.
        """
        pieces = [body] if isinstance(body, bytes) else body if isinstance(body, list) else list(body)
        front = FRONTS.get(id(self.engine))
        if front is not None:
            got = await front.ask(self.settings, method, path, pieces, headers or {}, leave, stall, heard)
            if got is None:
                return Answer()
            kept = {name: value for name, value in got.headers.items() if name not in SERVERS_OWN}
            return Answer(got.status, kept, got.body)
        raw_path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": raw_path,  # close enough to the decoded one: the application reads raw_path
            "raw_path": raw_path.encode(),
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
            "state": self.state,
        }
        answer = Answer()
        done = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if pieces and not (stall and len(pieces) == 1):
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
            await (leave or done).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert not answer.status, "answered twice"
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message["body"]
                heard(message["body"])
                if not message.get("more_body", False):
                    done.set()

        await app(scope, receive, send)
        return answer
