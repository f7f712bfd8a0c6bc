"""A whole connection for the target `connection`: what a client sends, in which pieces, and to which application.

Whatever comes: nothing is raised, what is answered is HTTP, no answer is without its request, a refusal is the last
word, the memory that the connection holds is bounded, and when the client has gone nothing of it is left.
"""

import asyncio
import gc
import logging
from collections import deque
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from uvicorn.server import ServerState

from asgi_app.messages import Receive, Scope, Send
from asgi_app.protocol import Protocol
from tests.asgi_app.protocol_cases import MAX_HEAD
from tests.asgi_app.wire import Answer, Application, Wire, answer, connect, read_answers

MOST_SENT = 1 << 18  # bytes, of which what is sent several times has no more
MOST_PIECES = 256
# Bytes that a connection may hold besides one piece: a head, the body above which it reads no further, and its scope.
MOST_HELD = MAX_HEAD + (1 << 16) + (1 << 13)
REFUSALS = frozenset({400, 408, 413, 414, 417, 431, 501, 505})


class Service:
    """The applications that a connection may have, and what they were asked.

    Attributes:
        asked: methods of the requests, in order.
        open: from when on those that wait go on.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.open = asyncio.Event()

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the body, and answers at once."""
        if await _read(receive):
            await answer(send)

    async def deaf(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers without reading."""
        await answer(send)

    async def slow(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes some turns of the event loop for everything, and answers in chunks."""
        await asyncio.sleep(0)
        if await _read(receive):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for more in (True, True, False):
                await asyncio.sleep(0)
                await send({"type": "http.response.body", "body": b"ok" * more, "more_body": more})

    async def late(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Waits until everything was sent, and reads then."""
        await self.open.wait()
        await self.echo(scope, receive, send)

    async def dumb(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers nobody."""
        while (await receive())["type"] != "http.disconnect":
            pass

    def application(self, number: int) -> Application:
        chosen = (self.echo, self.deaf, self.slow, self.late, self.dumb)[number % 5]

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self.asked.append(scope["method"])
            await chosen(scope, receive, send)

        return app


async def _read(receive: Receive) -> bool:
    """Whether the body came to its end."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        if not message["more_body"]:
            return True


def cut(data: bytes, by: int) -> Iterator[bytes]:
    """In pieces of two sizes in turn, a nibble of `by` each; 0 is what is left. Of much data, in larger ones."""
    at, least = 0, len(data) // MOST_PIECES + 1
    for size in cycle((by >> 4, by & 15)):
        if at >= len(data):
            return
        until = at + max(size, least) if size else len(data)
        yield data[at:until]
        at = until


def held(connection: object) -> int:
    """Bytes of what a protocol object refers to, through containers and objects of its own package."""
    known: set[int] = set()
    waiting: list[Any] = [connection]
    total = 0
    while waiting:
        each = waiting.pop()
        if id(each) in known:
            continue
        known.add(id(each))
        if isinstance(each, bytes | bytearray | str):
            total += len(each)
        elif isinstance(each, memoryview):
            total += each.nbytes
        elif isinstance(each, list | tuple | dict | set | deque) or _ours(type(each)):
            waiting += gc.get_referents(each)
    return total


def _ours(kind: type[object]) -> bool:
    return kind.__module__.startswith(("asgi_app.", "uvicorn.protocols.http."))


def converse(stream: bytes, by: int, manner: int) -> list[int]:
    """The statuses of the answers.

    Args:
        by: how the stream is cut.
        manner: which application, how often the stream is sent, and how the client leaves.
    """
    faults: list[dict[str, Any]] = []
    logging.disable(logging.CRITICAL)  # a line for each refusal
    try:
        with asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(lambda _, context: faults.append(context))
            statuses = runner.run(_converse(stream, by, manner))
    finally:
        logging.disable(logging.NOTSET)
    assert not faults, faults
    return statuses


async def _converse(stream: bytes, by: int, manner: int) -> list[int]:
    manner, application = divmod(manner, 5)
    leave, times = divmod(manner, 4)
    data = (stream * (1, 1, 16, 256)[times])[: max(len(stream), MOST_SENT)]
    service, state = Service(), ServerState()
    wire = connect(Protocol, service.application(application), state, max_head=MAX_HEAD)
    checked = 0
    for piece in cut(data, by):
        wire.send(piece)
        await asyncio.sleep(0)
        if wire.delivered - checked > 1024:
            checked = wire.delivered
            holds = held(wire.get_protocol())
            assert holds <= MOST_HELD + len(piece), f"{holds} bytes after {wire.delivered}"
    await wire.quiet()
    service.open.set()
    await wire.quiet()
    answers = _checked(wire, service)
    (wire.end if leave % 2 and wire.reading else wire.vanish)()  # while reading is paused, nobody sees the end
    await wire.quiet()
    assert wire.lost
    assert (state.connections, state.tasks) == (set(), set())
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return [each.status for each in answers]


def _checked(wire: Wire, service: Service) -> list[Answer]:
    """The answers, without the interim ones."""
    answers = [each for each in read_answers(wire.written, service.asked, wire.closing) if each.status >= 200]
    served = [each.status for each in answers].count(200)
    assert all(each.whole for each in answers)
    assert {each.status for each in answers[served:]} <= REFUSALS
    assert len(answers) - served <= wire.closing  # a refusal is one, and the last word
    assert served <= len(service.asked) <= served + 1
    return answers
