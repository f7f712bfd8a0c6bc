"""One request and its answer: the application's coroutine, what it receives and what it sends.

To asyncio an Exchange is a task, as its documentation lets others make their own ("Extending"): `current_task()` gives
it, `asyncio.timeout` and `TaskGroup` work, uvicorn cancels it at the end of its patience. Unlike asyncio's it takes the
coroutine's first step at once, where it was made: what ends there never waited for the event loop, and what does not
has met the queue a turn earlier.

States of a request's body: arriving, `complete`, delivered. Of its answer: none, started (the head is known, and
nothing sent), begun (the head is sent), `answered`. `left` means that there is nobody to answer any more.
"""

import asyncio
import logging
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextvars import Context, copy_context
from types import CoroutineType
from typing import Any, Protocol

from .heads import AnswerHead, Head, answer_head

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]

DISCONNECT = {"type": "http.disconnect"}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# Statuses whose answers have no body, nor a header that says how long it is.
BODILESS = (204, 304)

# Bytes of a body above which the head is not copied together with it: both leave in one system call all the same.
WORTH_JOINING = 64 << 10

logger = logging.getLogger("uvicorn.error")


class Connection(Protocol):
    """What an exchange knows of its connection, which is `asgi_app.protocol.Protocol`.

    Attributes:
        tasks: those that uvicorn waits for, and ends, when it stops.
        writable: set while the client takes what it is sent too slowly.
    """

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    tasks: set[Any]
    writable: asyncio.Future[None] | None
    access_log: bool

    def read_on(self) -> None:
        """More of the body is wanted."""
        ...

    def answered(self, exchange: "Exchange") -> None: ...

    def refuse(self, status: bytes, text: str) -> None:
        """Answer in the application's place, unless it has begun to, and close."""
        ...

    def default_lines(self) -> bytes:
        """Those of the answer's head that are not the application's."""
        ...

    def log_access(self, scope: Scope, status: int) -> None: ...


class Exchange:
    """One request and its answer.

    Attributes:
        complete: whether the whole body has arrived.
        waiting: bytes of it that the application has not taken yet.
        answered: whether the answer has been sent.
        begun: whether a part of it has.
        keep_alive: whether the connection may be used again after it.
        left: whether the client is gone, or was told off.
    """

    # What most requests never change.
    _coroutine: Coroutine[Any, Any, None] | None = None
    _waits: asyncio.Future[Any] | None = None  # what it awaits
    _must_cancel = False
    _cancels = 0
    _expects = False  # the client waits for 100 Continue
    _reader: asyncio.Future[None] | None = None  # what `receive` awaits
    _delivered = False
    waiting = 0
    complete = False
    _answer: AnswerHead | None = None
    _bodiless = False
    _chunked = False
    _unsent = 0  # bytes of the answer's body
    begun = False
    answered = False
    left = False

    def __init__(self, protocol: Connection, head: Head, scope: Scope) -> None:
        self.scope = scope
        self.keep_alive = head.keep_alive
        self._protocol = protocol
        self._loop = protocol.loop
        self._context: Context = copy_context()
        self._pieces: list[bytes] = []
        if head.expects:
            self._expects = True

    # The task.

    def start(self, application: Application) -> None:
        """Run the application up to where it first waits."""
        coroutine = application(self.scope, self.receive, self.send)
        self._coroutine = coroutine if type(coroutine) is CoroutineType else _awaited(coroutine)
        if asyncio.current_task(self._loop) is not None:  # somebody else's step is not over
            self._loop.call_soon(self._step, context=self._context)
        else:
            self._context.run(self._step)
        if self._coroutine is not None:
            self._protocol.tasks.add(self)

    def _step(self, _: object = None) -> None:
        coroutine = self._coroutine
        assert coroutine is not None
        self._waits, waits = None, None
        _enter_task(self._loop, self)  # type: ignore[arg-type]
        try:
            if self._must_cancel:
                self._must_cancel = False
                waits = coroutine.throw(asyncio.CancelledError())
            else:
                waits = coroutine.send(None)
        except StopIteration as stop:
            self._ended(stop.value, None)
        except BaseException as error:
            self._ended(None, error)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
        else:
            self._wait(waits)
        finally:
            _leave_task(self._loop, self)  # type: ignore[arg-type]

    def _wait(self, waits: Any) -> None:
        if getattr(waits, "_asyncio_future_blocking", None):
            waits._asyncio_future_blocking = False
            waits.add_done_callback(self._step, context=self._context)
            self._waits = waits
            if self._must_cancel and waits.cancel():
                self._must_cancel = False
        elif waits is None:  # it only lets others have their turn
            self._loop.call_soon(self._step, context=self._context)
        else:
            self._loop.call_soon(self._throw, RuntimeError(f"the application awaited {waits!r}"), context=self._context)

    def _throw(self, error: Exception) -> None:
        """As a step."""
        coroutine, self._coroutine = self._coroutine, _raising(error)
        assert coroutine is not None
        coroutine.close()
        self._step()

    def cancel(self, msg: object = None) -> bool:
        if self._coroutine is None:
            return False
        self._cancels += 1
        if self._waits is None or not self._waits.cancel(msg=msg):
            self._must_cancel = True
        return True

    def uncancel(self) -> int:
        self._cancels = max(0, self._cancels - 1)
        return self._cancels

    def cancelling(self) -> int:
        return self._cancels

    def cancelled(self) -> bool:
        return False

    def done(self) -> bool:
        return self._coroutine is None

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def _ended(self, result: object, error: BaseException | None) -> None:
        """The coroutine has. Whatever it did, the client gets an answer, or the end of the connection."""
        self._coroutine = None
        protocol = self._protocol
        protocol.tasks.discard(self)
        if error is None and self.answered:
            if result is not None:
                logger.error("the application should return None, but returned %r", result)
            return
        if self.left and (error is None or isinstance(error, asyncio.CancelledError)):
            return
        reason = "raised an exception" if error is not None else "returned without a whole answer"
        logger.error("the ASGI application %s", reason, exc_info=error)
        if self.begun or self.left:
            protocol.transport.close()
        else:
            protocol.refuse(b"500 Internal Server Error", "Internal Server Error")

    # The request.

    def arrived(self, data: bytes, complete: bool) -> None:
        """A piece of the body; whether it was the last."""
        if data and not self.answered:
            self._pieces.append(data)
            self.waiting += len(data)
        self.complete = complete
        self._notify()

    def leave(self, cancel: bool) -> None:
        """There is nobody to answer any more: the application learns it when it asks, or, by `cancel`, at once."""
        if self.left:
            return
        self.left = True
        self._notify()
        if cancel and not self.answered:
            self.cancel()

    @property
    def reading(self) -> bool:
        """Whether the application waits for more of the body."""
        return self._reader is not None

    def _notify(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def receive(self) -> Message:
        """The ASGI callable."""
        if self._expects:
            self._expects = False
            if not (self.left or self.answered or self.complete):
                self._protocol.transport.write(CONTINUE)
        while not (self._pieces or self.left or self.answered or (self.complete and not self._delivered)):
            self._protocol.read_on()
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self.left or self.answered:
            return DISCONNECT.copy()
        # One at a time: whoever wants them together copies them once.
        body = self._pieces.pop(0) if self._pieces else b""
        self.waiting -= len(body)
        self._delivered = self.complete and not self._pieces
        return {"type": "http.request", "body": body, "more_body": not self._delivered}

    # The answer.

    async def send(self, message: Message) -> None:
        """The ASGI callable."""
        while self._protocol.writable is not None and not self.left:
            await asyncio.shield(self._protocol.writable)
        if self.left:
            return
        kind = message["type"]
        if kind == "http.response.body" and self._answer is not None and not self.answered:
            self._send(message.get("body", b""), message.get("more_body", False))
        elif kind == "http.response.start" and self._answer is None:
            self._start(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"ASGI message {kind!r} cannot be sent now")

    def _start(self, status: int, headers: Any) -> None:
        """Nothing is sent before there is a body, so both leave together."""
        self._answer = answer = answer_head(status, headers)
        if answer.length is None or status in BODILESS or self.scope["method"] == "HEAD":
            self._frame(answer, status)
        else:
            self._unsent = answer.length
        # The client waits for a word that never came, and will not send what it announced; or it has sent some.
        if answer.close or self._expects:
            self.keep_alive = False
        if self._protocol.access_log:
            self._protocol.log_access(self.scope, status)

    def _frame(self, answer: AnswerHead, status: int) -> None:
        """How the client finds the end of an answer that does not say how long it is, or has no body."""
        self._bodiless = status in BODILESS or self.scope["method"] == "HEAD"
        if answer.length is None and not self._bodiless:
            self._chunked = self.scope["http_version"] == "1.1"
            if not self._chunked:  # with the connection
                self.keep_alive = False

    def _send(self, body: bytes, more: bool) -> None:
        answer, protocol = self._answer, self._protocol
        assert answer is not None
        if self._bodiless:
            body = b""
        elif self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        elif answer.length is not None:
            self._unsent -= len(body)
            if self._unsent < 0 or (self._unsent and not more):
                raise RuntimeError(
                    f"the answer's body is {'longer' if self._unsent < 0 else 'shorter'} than its content-length"
                )
        if self.begun:
            if body:
                protocol.transport.write(body)
        else:
            self.begun = True
            head = answer.text + self._closing_lines(answer)
            if len(body) <= WORTH_JOINING:
                protocol.transport.write(head + body)
            else:
                protocol.transport.writelines((head, body))
        if not more:
            self.answered = True
            if self._reader is not None:
                self._notify()
            protocol.answered(self)

    def _closing_lines(self, answer: AnswerHead) -> bytes:
        """What only the connection knows."""
        lines = self._protocol.default_lines()
        if self._chunked:
            lines += b"transfer-encoding: chunked\r\n"
        if not self.keep_alive:
            return lines + (b"\r\n" if answer.close else b"connection: close\r\n\r\n")
        if self.scope["http_version"] == "1.0":
            lines += b"connection: keep-alive\r\n"
        return lines + b"\r\n"


async def _awaited(awaitable: Awaitable[None]) -> None:
    return await awaitable


async def _raising(error: Exception) -> None:
    raise error
