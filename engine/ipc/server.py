"""Server: the engine's end. It takes workers on a unix socket, and gives their requests to the engine it was given.

A request that is to be stacked goes from its frame straight into the model's queue, and its answer from the batch
straight into a frame: no task, no future. All others, and every other question, are tasks that call the engine as a
worker of this process would.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import orjson

from batching.errors import QueueFull

from ..errors import Cancelled, ConfigError, EngineError, NotReady, TooLarge
from ..settings import Settings
from ..types import Array, Engine, InferRequest, InferResponse, ModelMetadata
from . import frames
from .arena import Allocator, Arena
from .frames import Frame, FrameError, Reader, Writer, describe, elements
from .link import Link

# Tensors of more bytes travel in shared memory.
INLINE = 16 << 10

SLOTS = 1 << 16  # requests of a worker that are under way; each has a byte on its board, at the start of its arena
MAX_WORKERS = 256
GREETING = 5.0  # seconds for a worker to say who it is
SEEN_WITHIN = 1.0  # seconds for the workers to read what a caller changed
BEAT = 1.0  # seconds between two beats

SO_PEERGROUPS = 59  # of Linux; Python has no name for it
MOST_GROUPS = 256  # that Python lets us ask for
PEER = struct.Struct("3i")  # pid, uid, gid: what SO_PEERCRED gives

logger = logging.getLogger("millrace")


class Copy(Protocol):
    """A loaded version of a model, as `LocalEngine` keeps it.

    Attributes:
        number: of which no other copy has had the same.
        stacked: whether its requests are stacked, and not looked up in the cache: `Owner.post` takes them.
    """

    @property
    def number(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def metadata(self) -> ModelMetadata: ...
    @property
    def stacked(self) -> bool: ...


class Owner(Engine, Protocol):
    """The engine of this process: what the server asks of it beyond what everybody does."""

    changed: Callable[[], None]

    def copies(self) -> Sequence[Copy]:
        """What is served."""
        ...

    def catalogue(self) -> dict[str, Any]:
        """What workers must know to refuse what the engine would, as values that JSON takes."""
        ...

    def post(
        self, copy: Any, request: InferRequest, rows: int, inputs: Sequence[dict[str, Array]], answers: Sequence[Any]
    ) -> list[Any]:
        """Queue requests that were checked, for a copy that is stacked: all of them `request`, but for their inputs.

        Each of `answers` is told how its request ends, as a future is. Whoever it belongs to calls `ended` then.
        Returns an item for each, or, where it never began, the exception that `infer` would have raised at once.
        """
        ...

    def take_back(self, copy: Any, item: Any) -> bool:
        """The caller of a posted request left. Whether it was still waiting: then `answer` is told nothing."""
        ...

    def ended(self, copy: Any, count: int = 1) -> None: ...

    def full(self, copy: Any) -> bool:
        """Whether the queue of a copy that is stacked has no room for any request."""
        ...

    def refused(self, copy: Any, count: int) -> None:
        """A worker refused so many requests, because that was so."""
        ...

    def lost(self) -> str:
        """Why nothing will be answered any more by this process; empty while that is not so."""
        ...


@dataclass(slots=True)
class Layout:
    """What the frames about a copy leave out.

    Attributes:
        stacked: as of the copy.
    """

    copy: Copy
    model: str
    version: str
    stacked: bool
    inputs: tuple[str, ...]
    outputs: dict[str, int]


class Reply:
    """Where the answer to one posted request goes: what a future is to others."""

    __slots__ = ("_connection", "_done", "abandoned", "id", "item", "layout")

    def __init__(self, connection: "Connection", id: int, layout: Layout) -> None:
        self._connection = connection
        self._done = False
        self.id = id
        self.layout = layout
        self.item: Any = None
        self.abandoned = False

    def done(self) -> bool:
        return self._done

    def board(self) -> None:
        """A batch with it is about to run: if that is the end of this process, its worker will know."""
        self._connection.board[self.id & (SLOTS - 1)] = 1

    def set_result(self, outputs: Mapping[str, Array]) -> None:
        """The outputs leave with this turn of the loop, unless nobody waits for them."""
        connection = self._connection
        if self.abandoned or connection.replies.pop(self.id, None) is None:
            self.set_exception(Cancelled("the caller left"))
            return
        self._done = True
        self.item = None
        connection.results.append((self.id, self.layout, outputs))
        if not connection.flushing:
            connection.wake()

    def set_exception(self, error: Exception) -> None:
        self._end()
        self._connection.failed(self, error)

    def _end(self) -> None:
        self._done = True
        self.item = None  # which has this: a cycle would keep the request's tensors, and a dead worker's memory
        self._connection.owner.ended(self.layout.copy)

    def leave(self) -> bool:
        """Nobody waits for it any more. Whether it has ended with that, and does not look at the worker's memory."""
        if self.abandoned:
            return False
        if self._connection.owner.take_back(self.layout.copy, self.item):
            self._end()
            return True
        self.abandoned = True  # a batch has it: it ends with the batch
        return False


class Connection(Link):
    """One worker.

    Attributes:
        board: a byte of the worker's memory for each of its requests under way, 1 from when a batch with it is about to
            run: if that is the end of this process, the worker knows.
        replies: its requests under way.
        results: answers that are not in a frame yet; their requests count as under way until then.
        reads: set while the worker takes what is sent.
        seen: number of the catalogue that the worker has read.
        since: when it came, by `time.time`.
    """

    def __init__(self, server: "Server", owner: Owner, memory: Arena, pid: int, reader: Reader, size: int) -> None:
        """`memory` is the worker's arena; `size` is that of the one for answers."""
        super().__init__("a worker", pid, reader, Writer())
        self.owner = owner
        self.seen = 0
        self.since = time.time()
        self.answers = Arena.create(size)
        self.board = memory.view(0, SLOTS)
        self.reads = asyncio.Event()
        self.reads.set()
        self.replies: dict[int, Reply | asyncio.Task[None]] = {}
        self.results: list[tuple[int, Layout, Mapping[str, Array]]] = []
        self._server = server
        self._memory = memory
        self._allocator = Allocator(size)

    def pause_writing(self) -> None:
        self.reads.clear()

    def resume_writing(self) -> None:
        self.reads.set()

    def connection_lost(self, error: Exception | None) -> None:
        """The worker is gone: nothing of it is run, and nobody is answered."""
        super().connection_lost(error)
        replies, self.replies = self.replies, {}
        for reply in replies.values():
            if not isinstance(reply, Reply):
                reply.cancel()
            elif not reply.done():  # where answers keep their order, that another one left may have been its turn
                reply.leave()
        for _, layout, _ in self.results:
            self.owner.ended(layout.copy)
        self.results.clear()
        self._memory.close()
        self.answers.close()
        self._server.left(self)

    @property
    def busy(self) -> int:
        """Requests under way."""
        return len(self.replies)

    # What the worker says.

    def _infer(self, frame: Frame) -> None:
        kind, flags = frame[0], frame[1]
        number, rows, deadline, timeout, priority, arrays, more = frames.read_request(frame, self._memory)
        ids = frames.read_ids(frame)
        if not self.replies.keys().isdisjoint(ids) or len(set(ids)) < len(ids):
            raise FrameError(f"a request came twice: {ids[0]}, or one that came with it")
        layout = self._server.layouts.get(number)
        if layout is None:
            for about in ids:
                self.writer.write(frames.STALE, about)
            self.wake()
            return
        try:
            names = [layout.inputs[index] for index, _ in arrays]
        except IndexError:
            raise FrameError(f"an input that model '{layout.model}' does not have") from None
        inputs: list[dict[str, Array]]
        if not flags & frames.MANY:
            inputs = [{name: array for name, (_, array) in zip(names, arrays, strict=True)}]
        elif len(arrays) == 1:  # the usual case
            (name,), ((_, rows_of_all),) = names, arrays
            inputs = [{name: array} for array in rows_of_all]
        else:
            of_each = zip(*[array for _, array in arrays], strict=True)
            inputs = [dict(zip(names, own, strict=True)) for own in of_each] if arrays else [{} for _ in ids]
        request = InferRequest(layout.model, layout.version, inputs[0], None, "", deadline, priority, timeout)
        if more:
            _complete(request, more)
        if flags & frames.ALONE:
            request.alone = True
        if kind == frames.STREAM or request.alone or not layout.stacked:
            for about, own in zip(ids, inputs, strict=True):
                self._begin(kind, about, layout, replace(request, inputs=own))
            return
        request.boarding = Reply.board
        replies = [Reply(self, about, layout) for about in ids]
        self.replies.update(zip(ids, replies, strict=True))
        items = self.owner.post(layout.copy, request, rows, inputs, replies)
        for reply, item in zip(replies, items, strict=True):
            if isinstance(item, Exception):
                self.failed(reply, item)
            else:
                reply.item = item

    def _begin(self, kind: int, about: int, layout: Layout, request: InferRequest) -> None:
        """A request that is not posted: a task."""
        slot = about & (SLOTS - 1)
        request.boarding = lambda _answer: self.board.__setitem__(slot, 1)
        # A model may keep what it is given for longer than the worker does.
        request.inputs = {name: array.copy() for name, array in request.inputs.items()}
        run = self._run_stream if kind == frames.STREAM else self._run
        task = self.replies[about] = self._loop.create_task(run(about, layout, request))
        # However it ends: one that is cancelled before it began does not get to say so itself.
        task.add_done_callback(lambda _: self._end(about, Cancelled("the caller left")))

    def _cancel(self, frame: Frame) -> None:
        reply = self.replies.get(frame[3])
        if isinstance(reply, asyncio.Task):
            reply.cancel()
        elif reply is not None and reply.leave():
            self.failed(reply, Cancelled("the caller left"))

    def _free(self, frame: Frame) -> None:
        for offset in frames.read_offsets(frame):
            try:
                self._allocator.free(offset)
            except KeyError:
                raise FrameError(f"memory at {offset} was given back, and not given") from None

    def _refused(self, frame: Frame) -> None:
        layout = self._server.layouts.get(frame[3])
        if layout is not None:
            self.owner.refused(layout.copy, frame[1])

    def _saw(self, frame: Frame) -> None:
        self.seen = frame[3]
        self._server.seen()

    def _call(self, frame: Frame) -> None:
        self._server.answer(self, frame)

    # Answers.

    def write_rest(self) -> None:
        """Write frames for what was answered; what looks alike, as the answers of one batch do, shares one."""
        results, self.results = self.results, []
        groups: list[list[tuple[int, Layout, Mapping[str, Array]]]] = []
        latest: dict[tuple[Any, ...], list[tuple[int, Layout, Mapping[str, Array]]]] = {}
        for result in results:
            _about, layout, outputs = result
            if len(outputs) == 1:  # the usual case
                ((name, array),) = outputs.items()
                key: tuple[Any, ...] = (id(layout), name, array.dtype, array.shape)
            else:
                key = (id(layout), *[(name, array.dtype, array.shape) for name, array in outputs.items()])
            group = latest.get(key)
            if group is None or len(group) == frames.MOST:
                group = latest[key] = []
                groups.append(group)
            group.append(result)
        for group in groups:
            _about, layout, outputs = group[0]
            self.owner.ended(layout.copy, len(group))
            if len(group) > 1 and _go_together(layout, outputs):
                self._respond_to_many(group)
            else:
                for about, layout, outputs in group:
                    self._respond(about, layout, outputs)

    def _respond_to_many(self, group: list[tuple[int, Layout, Mapping[str, Array]]]) -> None:
        _about, layout, first = group[0]
        descriptors = [
            describe(layout.outputs[name], array.dtype, array.shape, array.nbytes) for name, array in first.items()
        ]
        inline = [frames.write_ids([about for about, _, _ in group])]
        for name in first:
            inline += [outputs[name].tobytes() for _, _, outputs in group]
        nbytes = sum(map(len, inline))
        meta = frames.response_meta(b"".join(descriptors), b"")
        self.writer.write(frames.RESPONSE, len(group), frames.MANY, meta, len(first), inline, nbytes)

    def failed(self, reply: Reply, error: Exception) -> None:
        if self.replies.pop(reply.id, None) is not None:
            full = isinstance(error, QueueFull) and self.owner.full(reply.layout.copy)
            self._fail(reply.id, error, frames.FULL if full else 0)

    async def _run(self, id: int, layout: Layout, request: InferRequest) -> None:
        """A request that is not posted."""
        try:
            async with self._server.suspects if request.alone else contextlib.nullcontext():
                response = await self.owner.infer(request)
        except Exception as error:
            self._end(id, error)
        else:
            if self.replies.pop(id, None) is not None:
                self._respond(id, layout, response.outputs, response)

    async def _run_stream(self, id: int, layout: Layout, request: InferRequest) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                if request.alone:
                    await stack.enter_async_context(self._server.suspects)
                responses = await stack.enter_async_context(contextlib.aclosing(self.owner.stream(request)))
                async for response in responses:
                    self._respond(id, layout, response.outputs, response)
                    await self.reads.wait()  # else what the worker does not read would heap up here
        except Exception as error:
            self._end(id, error)
        else:
            if self.replies.pop(id, None) is not None:
                self.writer.write(frames.END, id)
                self.wake()

    def _end(self, id: int, error: Exception) -> None:
        if self.replies.pop(id, None) is not None:
            self._fail(id, error)

    def _respond(
        self, id: int, layout: Layout, outputs: Mapping[str, Array], response: InferResponse | None = None
    ) -> None:
        descriptors: list[bytes] = []
        inline: list[bytes | memoryview] = []
        nbytes, indices = 0, layout.outputs
        more: dict[str, Any] = {}
        blocks: list[int] = []
        try:
            if response is not None:
                if response.parameters:
                    more["parameters"] = response.parameters
                if not outputs.keys() <= indices.keys():
                    more["names"] = list(outputs)
                    indices = {name: index for index, name in enumerate(outputs)}
            for name, array in outputs.items():
                data = elements(array)
                size, offset = len(data), -1
                if size > INLINE:
                    offset = self._allocator.allocate(size)
                if offset >= 0:
                    blocks.append(offset)
                    self.answers.put(offset, data)
                else:
                    inline.append(data)
                    nbytes += size
                descriptors.append(describe(indices[name], array.dtype, array.shape, size, offset))
            meta = frames.response_meta(b"".join(descriptors), orjson.dumps(more) if more else b"")
            if frames.HEADER + len(meta) + nbytes > frames.MAX_FRAME:
                raise TooLarge(
                    f"an answer of {nbytes} bytes has no room in the memory shared with the worker "
                    f"(MILLRACE_ARENA_BYTES), and is over the limit of {frames.MAX_FRAME} bytes for what has none"
                )
        except Exception as error:  # an output that cannot be sent: it is this request's matter, not its batch's
            for block in blocks:
                self._allocator.free(block)
            self._fail(id, error)
            return
        self.writer.write(frames.RESPONSE, id, 0, meta, len(descriptors), inline, nbytes)
        if not self.flushing:
            self.wake()

    def _fail(self, id: int, error: Exception, more: int = 0) -> None:
        if self.owner.lost():
            return  # the process is about to end, and the next one may do better: the worker sends it again then
        flags, meta = frames.error_meta(error)
        if type(error) not in frames.ERRORS[1:]:
            logger.error("a request of worker %d failed", self.pid, exc_info=error)
        self.writer.write(frames.ERROR, id, flags | more, meta)
        self.wake()


Connection.receivers = {
    frames.INFER: Connection._infer,
    frames.STREAM: Connection._infer,
    frames.CANCEL: Connection._cancel,
    frames.FREE: Connection._free,
    frames.REFUSED: Connection._refused,
    frames.SEEN: Connection._saw,
    frames.CALL: Connection._call,
}


def _go_together(layout: Layout, outputs: Mapping[str, Array]) -> bool:
    """Whether outputs like these may share a frame with others."""
    return sum(array.nbytes for array in outputs.values()) <= INLINE and all(
        name in layout.outputs and array.dtype in frames.TOGETHER for name, array in outputs.items()
    )


def _complete(request: InferRequest, more: bytes) -> None:
    """Set what the client said besides."""
    try:
        said = orjson.loads(more)
        for name in ("id", "client", "parameters", "correlation_id", "flags"):
            if name in said:
                setattr(request, name, said[name])
        if "outputs" in said:
            request.outputs = tuple(said["outputs"])
    except (ValueError, TypeError):
        raise FrameError("a request whose JSON is none") from None


class Server:
    """Workers on one unix socket.

    Attributes:
        layouts: number of a copy that is served -> what frames about it leave out.
        failed: done, with the reason, when no worker can be served any more.
        suspects: held by the one that runs of those that were aboard when an engine died. Whichever model it asks, no
            other of them is aboard beside it: if this engine dies, too, none of the others is taken for the cause.
    """

    def __init__(self, engine: Owner, settings: Settings, takeover: bool = False) -> None:
        """`takeover`: take the path from a live engine, instead of refusing to start."""
        self.layouts: dict[int, Layout] = {}
        self.suspects = asyncio.Lock()
        self._engine = engine
        self._settings = settings
        self._path = Path(settings.engine_socket)
        self._takeover = takeover
        self._connections: set[Connection] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._generation = 0
        self._catalogue = b""
        self._everybody_saw: list[asyncio.Future[None]] = []
        self._listener: socket.socket | None = None
        self._inode = (0, 0)
        self._tasks: list[asyncio.Task[None]] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._greeting: set[asyncio.Task[None]] = set()
        self._empty: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Publish the started engine at its path.

        Raises:
            ConfigError: the path cannot be had; another engine serves there, say.
        """
        self._engine.changed = self._changed
        self._changed()
        try:
            self._listen()
        except OSError as error:
            raise ConfigError(f"MILLRACE_ENGINE_SOCKET: {self._path}: {error.strerror or error}") from None
        _servers.add(self)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._accept()), loop.create_task(self._beat())]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """What runs for as long as the server does must not end by itself: that is a defect, and ends the process."""
        if not task.cancelled() and not self.failed.done():
            self.failed.set_exception(task.exception() or RuntimeError("a task of the server's ended"))

    async def drain(self) -> None:
        """Send the workers to whoever comes next, and end when everything that they sent is answered.

        Nobody waits for longer than `graceful_timeout`.
        """
        self._engine.draining = True
        self._unpublish()
        self._retire()
        if self._connections:
            self._empty = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._empty], timeout=self._settings.graceful_timeout)

    async def stop(self) -> None:
        """Close every connection."""
        self._unpublish()
        for task in [*self._tasks, *self._greeting]:
            task.cancel()
        if self._calls:
            await asyncio.wait(self._calls, timeout=self._settings.graceful_timeout)
        for connection in list(self._connections):
            connection.close()
        await asyncio.sleep(0)

    # The path.

    def _listen(self) -> None:
        """Bind beside the path, and move onto it when everything is ready: nobody ever meets half an engine there."""
        path = self._path
        beside = path.with_name(f"{path.name}.new")  # one name: what a kill leaves there, the next engine removes
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with self._locked():  # two that start at once see each other
                if path.exists() and not path.is_socket():
                    raise FileExistsError(errno.EEXIST, "is there, and is no socket")
                if not self._takeover and (pid := serving(path)):
                    raise ConfigError(
                        f"MILLRACE_ENGINE_SOCKET: another engine, process {pid}, serves at {path}; stop it, or start "
                        "this one with --takeover"
                    )
                beside.unlink(missing_ok=True)
                listener.bind(str(beside))
                os.chmod(beside, int(self._settings.engine_mode, 8))
                listener.listen(MAX_WORKERS)  # before that nobody can connect, whatever the mode was
                status = os.stat(beside)
                self._inode = status.st_dev, status.st_ino
                os.rename(beside, path)
        except BaseException:
            listener.close()
            raise
        self._listener = listener

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else changes what is at the path meanwhile. Raises OSError."""
        lock = os.open(
            self._path.with_name(f"{self._path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600
        )  # fmt: skip
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def published(self) -> bool:
        """Whether it is this engine that workers meet at the path."""
        try:
            status = os.stat(self._path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    def let_go(self) -> None:
        """In a child that a model forked: as long as it had these, nobody would see this process end."""
        if self._listener is not None:
            os.close(self._listener.fileno())
        for connection in self._connections:
            connection.let_go()

    def _unpublish(self) -> None:
        if self._listener is not None:
            with self._locked():  # nobody takes it over between the look and the deed
                if self.published():
                    self._path.unlink(missing_ok=True)
            self._tasks[0].cancel()
            self._listener.close()
            self._listener = None

    def _retire(self) -> None:
        for connection in self._connections:
            connection.writer.write(frames.DRAIN)
            connection.wake()

    # Workers.

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._listener is not None
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # no descriptor is left, say
                logger.error("no worker can be taken: %s", error)
                await asyncio.sleep(BEAT)
                continue
            task = loop.create_task(self._greet(sock))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    async def _greet(self, sock: socket.socket) -> None:
        try:
            with contextlib.ExitStack() as opened:  # what is closed again if nothing comes of it
                opened.callback(sock.close)
                try:
                    async with asyncio.timeout(GREETING):
                        await self._take_in(sock, opened)
                except FrameError as error:
                    writer = Writer()
                    writer.write(frames.ERROR, meta=frames.error_meta(NotReady(str(error)))[1])
                    with contextlib.suppress(OSError):  # there is room for it, or the worker has left
                        sock.send(writer.take(), socket.MSG_DONTWAIT)
                    raise
        except ConnectionError:
            logger.debug("somebody connected, and left without a word")
        except (FrameError, OSError) as error:
            logger.error("a worker was refused: %s", str(error) or "it did not say who it is")

    async def _take_in(self, sock: socket.socket, opened: contextlib.ExitStack) -> None:
        """Raises FrameError, OSError."""
        pid = self._check_peer(sock)
        reader = Reader()
        hello, descriptors = await greeting(sock, reader)
        opened.callback(_close, descriptors)
        if hello[0][0] != frames.HELLO or len(hello) > 1:
            raise FrameError("a worker says hello first, and waits for the answer")
        said = json_of(hello[0])
        if said.get("version") != frames.VERSION:
            raise FrameError(f"the worker speaks version {said.get('version')}, this engine {frames.VERSION}")
        if said.get("ask") == "status":
            writer = Writer()
            writer.write(frames.WELCOME, meta=orjson.dumps(await self._status()))
            await asyncio.get_running_loop().sock_sendall(sock, writer.take())
            return
        if len(self._connections) >= MAX_WORKERS:
            raise FrameError(f"{MAX_WORKERS} workers are here already")
        if len(descriptors) != 1:
            raise FrameError("the worker brings no memory")
        memory = Arena(descriptors.pop())
        opened.callback(memory.close)
        if memory.size < SLOTS:
            raise FrameError("the worker's memory has no room for its board")
        connection = Connection(self, self._engine, memory, pid, reader, self._settings.arena_bytes)
        opened.callback(connection.answers.close)
        connection.writer.write(frames.WELCOME, meta=orjson.dumps({"version": frames.VERSION, "pid": os.getpid()}))
        socket.send_fds(sock, [connection.writer.take()], [connection.answers.descriptor])
        connection.writer.write(frames.CATALOGUE, self._generation, meta=self._catalogue)
        connection.writer.write(frames.BEAT, flags=self._health())
        self._connections.add(connection)
        opened.callback(self._connections.discard, connection)
        if self._listener is None:
            connection.writer.write(frames.DRAIN)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
        opened.pop_all()

    def _check_peer(self, sock: socket.socket) -> int:
        """The worker's process id. Raises FrameError if its user may not use this engine."""
        pid, uid, gid = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        shared = int(self._settings.engine_mode, 8) & stat.S_IWGRP and os.getegid() in (gid, *_groups(sock))
        anyone = int(self._settings.engine_mode, 8) & stat.S_IWOTH
        if uid not in (0, os.geteuid()) and not shared and not anyone:
            raise FrameError(f"process {pid} of user {uid} may not use this engine (MILLRACE_ENGINE_MODE)")
        return int(pid)

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._empty is not None and not self._connections:
            _set(self._empty)
        self.seen()

    # What they know.

    def _changed(self) -> None:
        """Tell every worker what is served, before any answer that follows from it."""
        copies = self._engine.copies()
        self.layouts = {
            copy.number: Layout(
                copy,
                copy.metadata.name,
                copy.version,
                copy.stacked,
                tuple(copy.metadata.inputs),
                {name: index for index, name in enumerate(copy.metadata.outputs)},
            )
            for copy in copies
        }
        self._generation += 1
        self._catalogue = orjson.dumps(self._engine.catalogue())
        for connection in self._connections:
            connection.writer.write(frames.CATALOGUE, self._generation, meta=self._catalogue)
            connection.wake()

    def seen(self) -> None:
        """A worker has read a catalogue, or has left."""
        if all(connection.seen >= self._generation for connection in self._connections):
            waiting, self._everybody_saw = self._everybody_saw, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def _wait_until_seen(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._everybody_saw.append(future)
        self.seen()
        try:
            await asyncio.wait_for(future, SEEN_WITHIN)
        except TimeoutError:  # a worker is stopped; its clients are not answered either
            self._everybody_saw.remove(future)

    def _health(self) -> int:
        return frames.LIVE * self._engine.live() | frames.READY * self._engine.ready()

    async def _beat(self) -> None:
        superseded = removed = False
        while True:
            await asyncio.sleep(BEAT)
            flags = self._health()
            for connection in self._connections:
                if connection.reads.is_set():  # else beats would heap up, and be old when they are heard
                    connection.writer.write(frames.BEAT, flags=flags)
                    connection.wake()
            if superseded or self._listener is None or self.published():
                continue
            if self._path.exists():
                superseded = True
                logger.warning("another engine serves at %s: this one has no workers any more; stop it", self._path)
                self._retire()
            elif not removed:
                removed = True
                logger.error("%s was removed: workers that are here stay, new ones will not come", self._path)

    # Every other question.

    def answer(self, connection: Connection, frame: Frame) -> None:
        """Answer CALL. It goes on when its worker leaves: no model is left half loaded. Raises FrameError."""
        said = json_of(frame)
        try:
            call, changes = CALLS[said["method"]]
            arguments = said.get("arguments", {})
            if "files" in said:
                arguments["files"] = _files(said["files"], frame)
            asked = call(self._engine, **arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise FrameError(f"a question that there is not: {error!r}") from None
        task = asyncio.get_running_loop().create_task(self._answer(connection, frame[3], asked, changes))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer(self, connection: Connection, about: int, asked: Awaitable[Any], changes: bool) -> None:
        try:
            value = await asked
            if changes:
                await self._wait_until_seen()
            connection.writer.write(frames.REPLY, about, meta=orjson.dumps(value))
        except Exception as error:
            if not isinstance(error, EngineError):
                logger.error("worker %d's question failed", connection.pid, exc_info=error)
            flags, meta = frames.error_meta(error)
            connection.writer.write(frames.ERROR, about, flags, meta)
        connection.wake()

    async def _status(self) -> dict[str, Any]:
        engine = self._engine
        workers = sorted(self._connections, key=lambda connection: connection.since)
        return {
            "version": frames.VERSION,
            "pid": os.getpid(),
            "live": engine.live(),
            "ready": engine.ready() and self.published(),
            "workers": [{"pid": worker.pid, "since": worker.since, "busy": worker.busy} for worker in workers],
            "models": await engine.index(),
        }


# Method -> how it is called, and whether it changes what workers know.
Call = Callable[..., Awaitable[Any]]
CALLS: dict[str, tuple[Call, bool]] = {
    "model_ready": (lambda engine, **arguments: engine.model_ready(**arguments), False),
    "config": (lambda engine, **arguments: engine.config(**arguments), False),
    "statistics": (lambda engine, **arguments: engine.statistics(**arguments), False),
    "metrics": (lambda engine: engine.metrics(), False),
    "batching": (lambda engine, **arguments: engine.batching(**arguments), False),
    "index": (lambda engine: engine.index(), False),
    "load": (lambda engine, **arguments: engine.load(**arguments), True),
    "unload": (lambda engine, **arguments: engine.unload(**arguments), True),
    "trace": (lambda engine, **arguments: engine.trace(**arguments), True),
    "log": (lambda engine, **arguments: engine.log(**arguments), True),
    "register": (lambda engine, **arguments: engine.regions.register(**arguments), True),
    "unregister": (lambda engine, **arguments: engine.regions.unregister(**arguments), True),
    "status": (lambda engine, **arguments: engine.regions.status(**arguments), False),
}


def _files(sizes: list[list[Any]], frame: Frame) -> dict[str, bytes]:
    """What follows the JSON of a request to load: [path, bytes] of each file in turn."""
    _kind, _flags, _tensors, _id, data, _meta, position, end = frame
    files = {}
    for path, size in sizes:
        if not 0 <= size <= end - position:
            raise FrameError("a file beyond the end of its frame")
        files[path] = data[position : position + size]
        position += size
    return files


def json_of(frame: Frame) -> dict[str, Any]:
    """The meta part of a frame that has JSON there. Raises FrameError."""
    _kind, _flags, _tensors, _id, data, meta, inline, _end = frame
    try:
        said = orjson.loads(data[meta:inline])
    except ValueError:
        raise FrameError("a frame whose JSON is none") from None
    if not isinstance(said, dict):
        raise FrameError("a frame whose JSON is no object")
    return said


async def greeting(sock: socket.socket, reader: Reader) -> tuple[list[Frame], list[int]]:
    """The first frames that come, and the descriptors that come with them, which are the caller's to close.

    Raises:
        FrameError, OSError: they do not come.
    """
    loop = asyncio.get_running_loop()
    descriptors: list[int] = []
    found: list[Frame] = []
    try:
        while not found:
            readable = loop.create_future()
            loop.add_reader(sock.fileno(), _set, readable)
            try:
                await readable
            finally:
                loop.remove_reader(sock.fileno())
            data, more, _flags, _address = socket.recv_fds(sock, 1 << 16, 4)
            descriptors += more
            if not data:
                raise ConnectionResetError("the other side closed the connection")
            found = reader.feed(data)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return found, descriptors


def _groups(sock: socket.socket) -> tuple[int, ...]:
    """The supplementary groups of whoever is at the other end; none if they are too many to be told."""
    try:
        found = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * MOST_GROUPS)
    except OSError:
        return ()
    return struct.unpack(f"{len(found) // 4}I", found)


def _close(descriptors: list[int]) -> None:
    """Those that are still in the list."""
    for descriptor in descriptors:
        os.close(descriptor)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def serving(path: Path) -> int:
    """The process id of whoever listens at a unix socket's path; 0 if nobody does. Raises OSError.

    It is -1 where that process has no id here: it is in a container of its own.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(GREETING)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return 0
        pid, _uid, _gid = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        return int(pid) or -1


_servers: "weakref.WeakSet[Server]" = weakref.WeakSet()


def _let_go() -> None:
    for server in _servers:
        server.let_go()


os.register_at_fork(after_in_child=_let_go)
