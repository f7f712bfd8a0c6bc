"""RemoteEngine: the worker's end. An engine like the one in its own process, but for where the models are.

The engine may die at any time, and another one takes its place. What a worker has not had an answer to is its own until
then: the next engine is sent it again, unless that could change something twice. What was in a batch that ran when an
engine died may be why: it is sent again alone, and if that ends an engine too, it is not tried a third time.
"""

import asyncio
import logging
import math
import os
import socket
import stat
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from batching.errors import DeadlineExceeded, QueueFull

from .. import garbage
from ..diagnostics import LogSettings
from ..errors import NOT_DECOUPLED, ModelError, NotReady, TooLarge, TooSlow, Unimplemented
from ..settings import Settings
from ..types import Array, Caller, InferRequest, InferResponse, ModelMetadata, Parameter, TensorSpec
from ..validate import check_request, not_served
from . import frames
from .arena import ALIGNMENT, Allocator, Arena
from .frames import Frame, FrameError, Reader, Writer, describe, elements
from .link import Link
from .regions import RemoteRegions
from .server import BEAT, GREETING, INLINE, PEER, SLOTS, greeting, json_of

RETRY = 0.05  # seconds between two looks for an engine
START = 1.0  # seconds that a starting worker waits for an engine before it takes requests without one
SILENT = 3 * BEAT + 0.5  # seconds without a beat after which an engine does not count as ready
FULL_FOR = 0.005  # seconds; a queue of which a batch has left since is asked again
SWEEP = 0.1  # seconds between two looks at what waits
LATE = 1.0  # seconds past its deadline after which a request is not waited for, whatever the engine does

logger = logging.getLogger("millrace")


class _Stale(Exception):
    """The copy of the model that was asked is not served any more; another one may be."""


@dataclass(slots=True)
class Copy:
    """A loaded version of a model, as the catalogue has it.

    Attributes:
        full: until when its queue counts as full, and what the engine said.
    """

    number: int
    version: str
    metadata: ModelMetadata
    inputs: dict[str, int]
    outputs: tuple[str, ...]
    full: tuple[float, QueueFull] | None = None


@dataclass(slots=True)
class Pending:
    """A request that has had no answer yet, or no last one.

    Attributes:
        id: a count, and in its lowest bits the slot that it has on the board.
        blocks: offsets in the worker's memory, its own until the answer has come.
        connection: to the engine that has it; None while none has.
        once: why it is not sent again, "" if it is.
        alone: whether it must not share a batch.
        crashes: how often it was in a batch when an engine died.
        together: whether it may share a frame with others.
        held: whether it waited for this engine: a queue that is full gets it again, and it is not refused.
        abandoned: nobody waits for it; the engine has not said yet that it has done with its memory.
    """

    id: int
    kind: int
    model: str
    version: str
    copy: Copy
    rows: int
    deadline: float
    timeout: float
    priority: int
    descriptors: bytes
    tensors: int
    more: bytes
    inline: list[bytes | memoryview]
    nbytes: int
    blocks: list[int]
    answer: asyncio.Future[Any]
    once: str
    together: bool
    responses: "_Responses | None" = None
    connection: "Connection | None" = None
    alone: bool = False
    crashes: int = 0
    abandoned: bool = False
    held: bool = False

    def follows(self, before: "Pending") -> None:
        """It is the same request again, for another copy of the model: what is known of it still holds."""
        self.crashes, self.alone, self.held = before.crashes, before.alone, True
        self.together = self.together and not self.alone


class _Responses:
    """The responses to a stream that nobody has taken yet, bounded in bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._arrived: deque[InferResponse | Exception | None] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def add(self, response: InferResponse | Exception | None) -> bool:
        """None is the end. Whether it was taken: else there are too many."""
        if isinstance(response, InferResponse):
            self._held += _size(response)
        taken = self._held <= self._most or not self._arrived  # one alone always fits
        if not taken:
            self._arrived.clear()
            response = TooSlow("the responses were not read as fast as they came (MILLRACE_QUEUE_BYTES)")
        self._arrived.append(response)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return taken

    async def next(self) -> InferResponse | None:
        while not self._arrived:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        response = self._arrived.popleft()
        if isinstance(response, Exception):
            try:
                raise response
            finally:  # its traceback holds this frame
                del response
        if response is not None:
            self._held -= _size(response)
        return response


class Connection(Link):
    """To one engine.

    Attributes:
        requests: that are not in a frame yet.
        drains: whether that is going to stop: it only answers what it has.
        busy: questions that it has.
        heard: when it last said how it is, by `time.monotonic`.
        health: what it said then.
        size: bytes of the memory in which its responses lie.
    """

    def __init__(
        self, engine: "RemoteEngine", answers: Arena, pid: int, reader: Reader, writer: Writer, first: list[Frame]
    ) -> None:
        """`first` are the frames that came with its greeting."""
        super().__init__("an engine", pid, reader, writer)
        self.requests: list[Pending] = []
        self.drains = False
        self.busy = 0
        self.heard = time.monotonic()
        self.health = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.size = answers.size
        self.engine = engine
        self._answers = answers
        self._first = first
        self._freed: deque[int] = deque()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.engine.made(self)
        first, self._first = self._first, []
        try:
            self.receive(first)
        except FrameError as error:
            self.end(error)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._answers.close()
        if not self.ended.done():
            self.ended.set_result(None)
        self.engine.lost(self)

    def write_rest(self) -> None:
        if self.requests:
            self._write_requests()
        if self._freed:
            freed = [self._freed.popleft() for _ in range(len(self._freed))]  # other threads may add to them
            self.writer.write(frames.FREE, meta=frames.offsets_meta(freed))

    def _write_requests(self) -> None:
        """Write frames for what was sent with this turn of the loop; requests that look alike share one."""
        requests, self.requests = self.requests, []
        groups: list[list[Pending]] = []
        latest: dict[tuple[Any, ...], list[Pending]] = {}
        for pending in requests:
            key = (
                pending.copy.number, pending.descriptors, pending.rows, pending.deadline, pending.timeout,
                pending.priority, pending.more, 0 if pending.together else pending.id,
            )  # fmt: skip
            group = latest.get(key)
            if group is None or len(group) == frames.MOST:
                group = latest[key] = []
                groups.append(group)
            group.append(pending)
        for group in groups:
            first = group[0]
            meta = frames.request_meta(
                first.copy.number, first.rows, first.deadline, first.timeout, first.priority, first.descriptors,
                first.more,
            )  # fmt: skip
            if len(group) == 1:
                flags = frames.ALONE if first.alone else 0
                self.writer.write(first.kind, first.id, flags, meta, first.tensors, first.inline, first.nbytes)
                continue
            inline: list[bytes | memoryview] = [frames.write_ids([pending.id for pending in group])]
            for tensor in range(first.tensors):
                inline += [pending.inline[tensor] for pending in group]
            nbytes = len(inline[0]) + len(group) * first.nbytes
            self.writer.write(first.kind, len(group), frames.MANY, meta, first.tensors, inline, nbytes)

    # The engine's memory: a response is a view of it, and gives it back when it is let go of.

    def view(self, offset: int, nbytes: int) -> Array:
        block = np.frombuffer(self._answers.view(offset, nbytes), np.uint8)
        weakref.finalize(block, self._give_back, offset).atexit = False
        return block

    def _give_back(self, offset: int) -> None:
        """In whatever thread the response was let go of."""
        self._freed.append(offset)
        if self._transport is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.wake)


class RemoteEngine:
    """The engine at the other end of a socket: an `engine.types.Engine`. To be made on a running event loop."""

    def __init__(self, settings: Settings) -> None:
        self.draining = False
        self.regions = RemoteRegions(settings.shared_memory, self.call)
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._memory = Arena.create(SLOTS + settings.arena_bytes)
        self._allocator = Allocator(self._memory.size, SLOTS)
        self._board = self._memory.view(0, SLOTS)
        self._slots = list(range(SLOTS - 1, -1, -1))
        self._count = 0
        self._pending: dict[int, Pending] = {}
        self._calls: dict[int, tuple[asyncio.Future[Any], Connection]] = {}
        self._connection: Connection | None = None  # to the engine that new requests go to
        self._connections: set[Connection] = set()
        self._gone = time.monotonic()  # since when there is none
        self._copies: dict[tuple[str, str], Copy] | None = None  # None before the first catalogue
        self._states: dict[str, dict[str, tuple[str, str]]] = {}
        self._log = LogSettings()
        self._known = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # The process.

    async def start(self) -> None:
        """Look for the engine, from now on. One that is not there yet is waited for by the requests."""
        self._tasks = [self._loop.create_task(self._connect()), self._loop.create_task(self._sweep())]
        try:
            await asyncio.wait_for(self._known.wait(), START)
        except TimeoutError:
            logger.warning("no engine at %s yet: requests wait for it", self._settings.engine_socket)
        garbage.freeze()

    async def stop(self) -> None:
        """Whoever still waits is told that the service ends."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        self._known.set()  # for those who wait for the first engine
        for pending in list(self._pending.values()):
            self._fail(pending, NotReady("the service is shutting down"))
        for connection in list(self._connections):
            connection.close()
        await asyncio.sleep(0)
        self._memory.close()
        self._log.restore()

    def live(self) -> bool:
        connection = self._connection
        if connection is None:  # being restarted, let us hope
            return time.monotonic() - self._gone < self._settings.stuck_after
        if time.monotonic() - connection.heard > self._settings.stuck_after:
            return False
        return bool(connection.health & frames.LIVE)

    def ready(self) -> bool:
        connection = self._connection
        if connection is None or self.draining or time.monotonic() - connection.heard > SILENT:
            return False
        return bool(connection.health & frames.READY)

    # What is known of a model.

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        return self._find(model, version).metadata

    def _find(self, model: str, version: str) -> Copy:
        if self._copies is None:
            raise NotReady("the engine is not there yet")
        try:
            return self._copies[model, version]
        except KeyError:
            raise not_served(self._states.get(model), (model, "") in self._copies, model, version) from None

    async def model_ready(self, model: str, version: str = "") -> bool:
        return bool(await self.call("model_ready", model=model, version=version)) and not self.draining

    async def config(self, model: str, version: str = "") -> dict[str, Any]:
        found: dict[str, Any] = await self.call("config", model=model, version=version)
        return found

    async def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self.call("statistics", model=model, version=version)
        return found

    async def metrics(self) -> str:
        return str(await self.call("metrics"))

    async def batching(self, model: str, version: str = "") -> dict[str, Any]:
        found: dict[str, Any] = await self.call("batching", model=model, version=version)
        return found

    async def index(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = await self.call("index")
        return found

    async def load(self, model: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        await self.call("load", files, model=model, config=config)

    async def unload(self, model: str, dependents: bool = False) -> None:
        await self.call("unload", model=model, dependents=dependents)

    async def trace(self, model: str = "", changes: Mapping[str, object] | None = None) -> dict[str, Any]:
        found: dict[str, Any] = await self.call("trace", model=model, changes=changes)
        return found

    async def log(self, changes: Mapping[str, object] | None = None) -> dict[str, Any]:
        found: dict[str, Any] = await self.call("log", changes=changes)
        return found

    async def call(self, method: str, files: Mapping[str, bytes] | None = None, /, **arguments: object) -> Any:
        """Ask the engine anything but an inference.

        Raises:
            NotReady: there is none, or it ends before it answers.
            EngineError: what the engine raised.
        """
        connection = self._connection
        if connection is None:
            raise NotReady("the engine is not there: it is being started, or restarted")
        said: dict[str, Any] = {"method": method, "arguments": arguments}
        content: list[bytes] = []
        if files is not None:
            said["files"] = [[path, len(data)] for path, data in files.items()]
            content = list(files.values())
        self._count += 1
        number = self._count << 16
        nbytes = sum(map(len, content))
        if nbytes > frames.MAX_FRAME // 2:
            raise TooLarge(f"files of {nbytes} bytes, at most {frames.MAX_FRAME // 2} are taken")
        question = orjson.dumps(said)
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._calls[number] = answer, connection
        connection.busy += 1
        connection.writer.write(frames.CALL, number, 0, question, 0, content, nbytes)
        connection.wake()
        try:
            return await answer  # if the caller leaves, what is answered is dropped
        finally:  # an error's traceback holds this frame, which must not hold the error
            del answer

    # Inference.

    def check_room(self, model: str, version: str) -> None:
        """As of `LocalEngine`, but for FULL_FOR seconds after the engine said so."""
        if not self._slots:
            raise QueueFull(f"{SLOTS} requests of this worker are with the engine, no room for another", 1)
        copy = self._copies.get((model, version)) if self._copies is not None else None
        if copy is not None and copy.full is not None:
            until, error = copy.full
            if time.monotonic() >= until:
                copy.full = None
            else:
                if self._connection is not None:
                    self._connection.writer.write(frames.REFUSED, copy.number, 1)
                    self._connection.wake()
                raise QueueFull(str(error), error.retry_after)

    async def infer(self, request: InferRequest) -> InferResponse:
        before: Pending | None = None
        while True:
            copy = self._copies.get((request.model, request.version)) if self._copies is not None else None
            pending = self._prepare(frames.INFER, request, copy or await self._copy(request))
            if before is not None:
                pending.follows(before)
                before = None
            self._send(pending)
            try:
                response: InferResponse = await pending.answer
                return response
            except _Stale:
                before = pending
            except asyncio.CancelledError:
                self._abandon(pending)
                raise
            finally:  # an error's traceback holds this frame, which must not hold the error
                del pending

    def ask(self, model: str, version: str, like: object, inputs: dict[str, Array], caller: Caller) -> None:
        """What is sent may have to be sent again, to another engine: that takes `infer`."""

    async def stream(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        before: Pending | None = None
        while True:
            copy = await self._copy(request)
            if not copy.metadata.decoupled:
                yield await self.infer(request)
                return
            pending = self._prepare(frames.STREAM, request, copy)
            if before is not None:
                pending.follows(before)
            responses = pending.responses = _Responses(self._settings.queue_bytes)
            self._send(pending)
            try:
                while (response := await responses.next()) is not None:
                    yield response
                return
            except _Stale:
                before = pending
            finally:
                self._abandon(pending)

    async def _copy(self, request: InferRequest) -> Copy:
        """The copy of the model that is asked, as soon as anything is known of any."""
        if self._copies is None:
            until = min(request.deadline, time.monotonic() + self._settings.engine_wait)
            try:
                await asyncio.wait_for(self._known.wait(), until - time.monotonic())
            except TimeoutError:
                raise self._waited(request.deadline) from None
        return self._find(request.model, request.version)

    def _waited(self, deadline: float) -> Exception:
        """Why a request that waited for an engine is not waited for any more."""
        if deadline <= time.monotonic():
            return DeadlineExceeded("the deadline passed while the request waited for the engine to come back")
        seconds = self._settings.engine_wait
        return NotReady(f"the engine has been gone for {seconds:g} seconds (MILLRACE_ENGINE_WAIT)")

    def _prepare(self, kind: int, request: InferRequest, copy: Copy) -> Pending:
        """Check a request, and put its tensors where the engine finds them.

        Raises:
            InvalidInput, Unimplemented, TooLarge, QueueFull.
        """
        metadata = copy.metadata
        if metadata.decoupled and kind == frames.INFER:
            raise Unimplemented(NOT_DECOUPLED)
        rows = check_request(metadata, request)
        self.check_room(request.model, request.version)
        descriptors: list[bytes] = []
        inline: list[bytes | memoryview] = []
        blocks: list[int] = []
        nbytes = 0
        together = True
        said = request.id or request.parameters or request.client or request.correlation_id or request.flags
        more = _more(request) if said or request.outputs is not None else b""
        try:
            for name, array in request.inputs.items():
                small = array.nbytes <= frames.COPIED and not array.dtype.hasobject
                together = together and small
                data = array.tobytes() if small else elements(array)
                size, offset = len(data), -1
                if size > INLINE:
                    offset = self._place(data, blocks)
                else:
                    inline.append(data)
                    nbytes += size
                descriptors.append(describe(copy.inputs[name], array.dtype, array.shape, size, offset))
        except BaseException:
            for block in blocks:
                self._allocator.free(block)
            raise
        self._count += 1
        number = self._count << 16 | self._slots.pop()
        pending = Pending(
            number, kind, request.model, request.version, copy, rows, request.deadline, request.timeout,
            request.priority, b"".join(descriptors), len(descriptors), more, inline, nbytes, blocks,
            self._loop.create_future(), "", together and kind == frames.INFER and not request.alone,
        )  # fmt: skip
        pending.alone = request.alone
        if request.correlation_id:
            pending.once = "it belongs to a sequence"
        elif not metadata.resend:
            pending.once = "its model may not be asked twice"
        self._pending[number] = pending
        return pending

    def _place(self, data: bytes | memoryview, blocks: list[int]) -> int:
        """Write a tensor into shared memory. `blocks` are its request's. Raises TooLarge, QueueFull."""
        offset = self._allocator.allocate(len(data))
        if offset >= 0:
            self._memory.put(offset, data)
            blocks.append(offset)
            return offset
        most, nbytes = self._settings.arena_bytes, len(data) + sum(map(self._allocator.size_of, blocks))
        if nbytes > most // ALIGNMENT * ALIGNMENT:
            raise TooLarge(f"tensors of {nbytes} bytes are over the limit of {most} bytes (MILLRACE_ARENA_BYTES)")
        raise QueueFull(
            f"the memory shared with the engine is full: {self._allocator.used} of {most} bytes are in use "
            "(MILLRACE_ARENA_BYTES)", 1,
        )  # fmt: skip

    def _send(self, pending: Pending) -> None:
        """Give a request to the engine, or, while there is none, keep it for the next."""
        connection = self._connection
        if connection is None:
            return
        pending.connection = connection
        connection.busy += 1
        self._board[pending.id & (SLOTS - 1)] = 0
        connection.requests.append(pending)
        if not connection.flushing:
            connection.wake()

    def _release(self, pending: Pending) -> None:
        """Nobody looks at the memory of a request any more."""
        if self._pending.pop(pending.id, None) is None:
            return
        self._slots.append(pending.id & (SLOTS - 1))
        for block in pending.blocks:
            self._allocator.free(block)
        connection = pending.connection
        if connection is not None:
            connection.busy -= 1
            if connection.drains and not connection.busy:
                connection.close()

    def _abandon(self, pending: Pending) -> None:
        """Its caller left, or has had enough. The engine says when it has done with its memory."""
        if pending.id not in self._pending or pending.abandoned:
            return
        if pending.connection is None:
            self._release(pending)
            return
        pending.abandoned = True
        pending.connection.writer.write(frames.CANCEL, pending.id)
        pending.connection.wake()

    def _fail(self, pending: Pending, error: Exception) -> None:
        """End a request, which no engine has, with an error."""
        self._release(pending)
        self._tell(pending, error)

    def _tell(self, pending: Pending, error: Exception) -> None:
        if pending.responses is not None:
            pending.responses.add(error)
        elif not pending.answer.done():
            pending.answer.set_exception(error)

    # What the engine says.

    def _answered(self, connection: Connection, frame: Frame) -> Pending:
        """The request that a frame is about. Raises FrameError if this engine does not have it."""
        pending = self._pending.get(frame[3])
        if pending is None or pending.connection is not connection:
            raise _not_asked(frame[3])
        return pending

    def _on_response(self, connection: Connection, frame: Frame) -> None:
        arrays, more = frames.read_response(frame, connection)
        ids = frames.read_ids(frame)
        # orjson reads numbers where they lie, and frames do not begin at any place in particular.
        columns = [array if array.flags.aligned else array.copy() for _, array in arrays]
        rows: Iterable[Any] = zip(*columns, strict=True) if frame[1] & frames.MANY and columns else [columns] * len(ids)
        names: Any = None
        parameters: dict[str, Parameter] = {}
        try:
            if more:
                said = _json(more)
                names, parameters = said.get("names"), said.get("parameters", parameters)
            for about, row in zip(ids, rows, strict=True):
                pending = self._pending.get(about)
                if pending is None or pending.connection is not connection:
                    raise _not_asked(about)
                called = names or pending.copy.outputs
                outputs = {called[index]: array for (index, _), array in zip(arrays, row, strict=True)}
                self._respond(pending, InferResponse(pending.model, pending.copy.version, outputs, parameters))
        except (AttributeError, LookupError, TypeError):
            raise FrameError("an output that the model does not have") from None

    def _respond(self, pending: Pending, response: InferResponse) -> None:
        if pending.responses is None:
            self._release(pending)
            if not pending.answer.done():
                pending.answer.set_result(response)
        elif not pending.abandoned:
            pending.once = "some of its responses have been given"
            if not pending.responses.add(response):
                self._abandon(pending)

    def _on_error(self, connection: Connection, frame: Frame) -> None:
        if frame[3] in self._calls:
            self._on_reply(connection, frame)
            return
        pending = self._answered(connection, frame)
        error = frames.read_error(frame)
        if isinstance(error, QueueFull) and frame[1] & frames.FULL:
            pending.copy.full = time.monotonic() + FULL_FOR, error
            if pending.held and not pending.abandoned and not connection.drains:
                pending.connection = None  # it was taken before: whatever came back with it does not displace it
                connection.busy -= 1
                return
        self._release(pending)
        if not pending.abandoned:
            self._tell(pending, error)

    def _on_end(self, connection: Connection, frame: Frame) -> None:
        pending = self._answered(connection, frame)
        if pending.responses is None:
            raise FrameError("an end of what is no stream")
        self._release(pending)
        pending.responses.add(None)

    def _on_stale(self, connection: Connection, frame: Frame) -> None:
        pending = self._answered(connection, frame)
        self._release(pending)
        if not pending.abandoned:
            self._tell(pending, _Stale())

    def _on_reply(self, connection: Connection, frame: Frame) -> None:
        answer, asked = self._calls.get(frame[3], (None, None))
        if answer is None or asked is not connection:
            raise _not_asked(frame[3])
        said = frames.read_error(frame) if frame[0] == frames.ERROR else _json(frame[4][frame[5] : frame[6]])
        del self._calls[frame[3]]
        connection.busy -= 1
        if connection.drains and not connection.busy:
            connection.close()
        if answer.done():  # its caller left
            return
        if isinstance(said, Exception):
            answer.set_exception(said)
        else:
            answer.set_result(said)

    def _on_catalogue(self, connection: Connection, frame: Frame) -> None:
        if not connection.drains:
            try:
                self._learn(json_of(frame))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise FrameError(f"a catalogue that cannot be read: {error!r}") from None
            if connection is not self._connection:
                self._take(connection)
        connection.writer.write(frames.SEEN, frame[3])
        connection.wake()

    def _learn(self, said: dict[str, Any]) -> None:
        copies: dict[tuple[str, str], Copy] = {}
        for entry in said["copies"]:
            copy = _copy_of(entry)
            copies[copy.metadata.name, copy.version] = copy
            if entry["latest"]:
                copies[copy.metadata.name, ""] = copy
        self._copies = copies
        self._states = said["states"]
        self.regions.learn(said["regions"])
        if said["log"] is None:  # of an engine whose predecessor may have been told otherwise
            self._log.restore()
        elif not self._log.set or said["log"] != self._log.values:
            self._log.apply(said["log"])
        self._known.set()

    def _on_beat(self, connection: Connection, frame: Frame) -> None:
        connection.heard = time.monotonic()
        connection.health = frame[1]

    def _on_drain(self, connection: Connection, frame: Frame) -> None:
        """New requests go to whoever is at the path next."""
        connection.drains = True
        if connection is self._connection:
            self._connection = None
            self._gone = time.monotonic()
        if not connection.ended.done():
            connection.ended.set_result(None)
        if not connection.busy:
            connection.close()

    # Engines come and go.

    async def _connect(self) -> None:
        """Look for an engine whenever there is none."""
        told = ""
        while True:
            try:
                connection = await self._greet()
            except (OSError, FrameError, TimeoutError) as error:
                text = str(error) or type(error).__name__
                absent = isinstance(error, FileNotFoundError | ConnectionRefusedError | BlockingIOError)
                if text != told and not absent:
                    logger.error("the engine at %s cannot be used: %s", self._settings.engine_socket, text)
                told = text
                await asyncio.sleep(RETRY if absent or isinstance(error, ConnectionError) else BEAT)
                continue
            told = ""
            await connection.ended
            if not connection.drains:  # one that ends at once would be looked for without a pause
                await asyncio.sleep(RETRY)

    async def _greet(self) -> Connection:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        descriptors: list[int] = []
        try:
            sock.connect(self._settings.engine_socket)
            _check_peer(sock, self._settings)
            writer, reader = Writer(), Reader()
            writer.write(frames.HELLO, meta=orjson.dumps({"version": frames.VERSION, "pid": os.getpid()}))
            socket.send_fds(sock, [writer.take()], [self._memory.descriptor])
            async with asyncio.timeout(GREETING):
                (welcome, *more), descriptors = await greeting(sock, reader)
            if welcome[0] == frames.ERROR:
                raise FrameError(f"it says: {frames.read_error(welcome)}")
            said = json_of(welcome)
            if said.get("version") != frames.VERSION:
                raise FrameError(f"it speaks version {said.get('version')}, this worker {frames.VERSION}")
            pid = said.get("pid")
            if welcome[0] != frames.WELCOME or type(pid) is not int or len(descriptors) != 1:
                raise FrameError("what listens there is no engine")
            connection = Connection(self, Arena(descriptors.pop(), writable=False), pid, reader, writer, more)
            await self._loop.create_unix_connection(lambda: connection, sock=sock)
        except BaseException:
            sock.close()
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return connection

    def made(self, connection: Connection) -> None:
        """An engine is there; it has said nothing yet."""
        self._connections.add(connection)

    def _take(self, connection: Connection) -> None:
        """A new engine has said what it serves: it gets what no other answered, and everything that comes."""
        self._connection = connection
        self._gone = math.inf
        logger.info("engine %d serves", connection.pid)
        self._send_waiting()

    def _send_waiting(self) -> None:
        """Give the engine what no other has answered."""
        for pending in list(self._pending.values()):
            if pending.connection is not None or pending.abandoned:
                continue
            copy, before = self._copies.get((pending.model, pending.version)) if self._copies else None, pending.copy
            if copy is not None and (copy.metadata, copy.inputs, copy.outputs) == (
                before.metadata, before.inputs, before.outputs,
            ):  # fmt: skip
                pending.copy, pending.held = copy, True
                self._send(pending)
            else:  # another model by that name, or none: it is looked at anew
                self._release(pending)
                self._tell(pending, _Stale())

    def lost(self, connection: Connection) -> None:
        """An engine is gone. What it had is kept for the next one, unless that could do something twice."""
        self._connections.discard(connection)
        if connection is self._connection:
            self._connection = None
            self._gone = time.monotonic()
            if not self.draining:
                seconds = self._settings.engine_wait
                logger.warning("engine %d is gone: requests wait up to %g s for the next", connection.pid, seconds)
        for number, (answer, asked) in list(self._calls.items()):
            if asked is connection:
                del self._calls[number]
                if not answer.done():
                    answer.set_exception(NotReady("the engine ended before it answered"))
        for pending in list(self._pending.values()):
            if pending.connection is connection:
                pending.connection = None
                self._keep(pending)
        if self._connection is not None:  # it was one that drained
            self._send_waiting()

    def _keep(self, pending: Pending) -> None:
        if pending.abandoned:
            self._release(pending)
            return
        if pending.once:
            self._fail(pending, NotReady(f"the engine ended while it had the request, and {pending.once}: it may "
                                         "have been done, and is not sent again"))  # fmt: skip
            return
        if self._board[pending.id & (SLOTS - 1)]:
            pending.crashes += 1
            pending.alone, pending.together = True, False
        if pending.crashes > 1:
            text = f"model '{pending.model}': the engine ended twice while it ran this request; it is not tried again"
            logger.error("%s", text)
            self._fail(pending, ModelError(text))

    async def _sweep(self) -> None:
        """Requests that wait for an engine, or for one that does not answer, do so until their time is over."""
        while True:
            await asyncio.sleep(SWEEP)
            self._give_up()  # not here: the last request, and its response, would be held until the next

    def _give_up(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections):
            if now - connection.heard > self._settings.stuck_after + SILENT:  # its own watchdog had ended it by now
                logger.error("engine %d has said nothing for %g s; it is left", connection.pid, now - connection.heard)
                connection.abort()
        if self._connection is not None:
            self._send_waiting()  # what the queue had no room for when its engine came
        waited = now - self._gone > self._settings.engine_wait
        for pending in list(self._pending.values()):
            if pending.abandoned:
                continue
            if pending.connection is None:
                if waited or pending.deadline <= now:
                    self._fail(pending, self._waited(pending.deadline))
            elif pending.deadline + LATE <= now and not self._board[pending.id & (SLOTS - 1)]:
                self._tell(pending, DeadlineExceeded("the deadline passed, and the engine did not say so"))
                self._abandon(pending)


def _of_engine(take: Callable[[RemoteEngine, Connection, Frame], None]) -> Callable[[Connection, Frame], None]:
    return lambda connection, frame: take(connection.engine, connection, frame)


Connection.receivers = {
    kind: _of_engine(take)
    for kind, take in {
        frames.RESPONSE: RemoteEngine._on_response,
        frames.ERROR: RemoteEngine._on_error,
        frames.END: RemoteEngine._on_end,
        frames.STALE: RemoteEngine._on_stale,
        frames.REPLY: RemoteEngine._on_reply,
        frames.CATALOGUE: RemoteEngine._on_catalogue,
        frames.BEAT: RemoteEngine._on_beat,
        frames.DRAIN: RemoteEngine._on_drain,
    }.items()
}


def _not_asked(about: int) -> FrameError:
    return FrameError(f"an answer to {about}, which was not asked")


def _more(request: InferRequest) -> bytes:
    """What a request says besides, as JSON; b"" if nothing."""
    said: dict[str, Any] = {
        name: value
        for name, value in (
            ("id", request.id),
            ("client", request.client),
            ("parameters", request.parameters),
            ("correlation_id", request.correlation_id),
            ("flags", request.flags),
        )
        if value
    }
    if request.outputs is not None:
        said["outputs"] = request.outputs
    return orjson.dumps(said) if said else b""


def _json(text: bytes) -> Any:
    """Raises FrameError."""
    try:
        return orjson.loads(text)
    except ValueError:
        raise FrameError("a frame whose JSON is none") from None


def _size(response: InferResponse) -> int:
    """The bytes that it holds, its strings included."""
    arrays = response.outputs.values()
    return sum(array.nbytes + (sum(map(len, array.flat)) if array.dtype.hasobject else 0) for array in arrays)


def _copy_of(entry: dict[str, Any]) -> Copy:
    """One of the catalogue's copies. Raises KeyError, TypeError: it is none."""
    said = entry["metadata"]
    for key in ("inputs", "outputs"):
        said[key] = {name: TensorSpec(**_tuples(spec)) for name, spec in said[key].items()}
    metadata = ModelMetadata(**_tuples(said))
    inputs = {name: index for index, name in enumerate(metadata.inputs)}
    return Copy(entry["number"], entry["version"], metadata, inputs, tuple(metadata.outputs))


def _tuples(said: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, only lists."""
    return {field: tuple(value) if isinstance(value, list) else value for field, value in said.items()}


def _check_peer(sock: socket.socket, settings: Settings) -> None:
    """Raises FrameError if somebody else listens where the engine should."""
    pid, uid, _gid = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    shared = int(settings.engine_mode, 8) & (stat.S_IWGRP | stat.S_IWOTH)
    if uid not in (0, os.geteuid()) and not shared:
        raise FrameError(f"process {pid} of user {uid} listens there, which is not this one's (MILLRACE_ENGINE_MODE)")


def ask_status(path: str) -> dict[str, Any]:
    """What the engine at a socket's path says of itself, see `Server`. Raises OSError, FrameError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(GREETING)
        sock.connect(path)
        writer, reader = Writer(), Reader()
        writer.write(frames.HELLO, meta=orjson.dumps({"version": frames.VERSION, "ask": "status"}))
        sock.sendall(writer.take())
        while data := sock.recv(1 << 16):
            for frame in reader.feed(data):
                return json_of(frame)
    raise FrameError("the engine did not answer")
