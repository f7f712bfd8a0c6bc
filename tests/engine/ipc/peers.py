"""A worker and an engine that say whatever a test wants: each is one end of a socket, frame by frame."""

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from engine.ipc import frames
from engine.ipc.arena import Arena
from engine.ipc.frames import Frame, Reader, Writer
from engine.ipc.server import SLOTS, greeting
from engine.types import Array, ModelMetadata, TensorSpec

PATIENCE = 10.0  # seconds after which something that a test waits for will not come any more


class Peer:
    """One end of a connection."""

    def __init__(self, sock: socket.socket, reader: Reader, first: Sequence[Frame], memory: Arena) -> None:
        """`memory` is that of the other side."""
        self.sock = sock
        self.writer = Writer()
        self.memory = memory
        self._reader = reader
        self._frames = list(first)
        self._answers: list[tuple[int, list[Array]]] = []  # of a frame for many, that were not looked at yet
        self._asked: list[Asked] = []
        self._loop = asyncio.get_running_loop()

    def write(self, kind: int, id: int = 0, flags: int = 0, meta: bytes = b"", **rest: Any) -> None:
        self.writer.write(kind, id, flags, meta, **rest)

    async def flush(self) -> None:
        await self.send(self.writer.take())

    async def send(self, data: bytes) -> None:
        await asyncio.wait_for(self._loop.sock_sendall(self.sock, data), PATIENCE)

    async def next(self, *kinds: int) -> Frame:
        """The next frame of one of these kinds; others before it are passed over. EOFError: there is none."""
        while True:
            while self._frames:
                frame = self._frames.pop(0)
                if frame[0] in kinds:
                    return frame
            await self._read()

    async def rest(self) -> list[Frame]:
        """Every frame that still comes, until the other side closes the connection."""
        while True:
            try:
                await self._read()
            except EOFError:
                return self._frames

    async def _read(self) -> None:
        try:
            data = await asyncio.wait_for(self._loop.sock_recv(self.sock, 1 << 18), PATIENCE)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        self._frames += self._reader.feed(data)

    def close(self) -> None:
        self.sock.close()
        self.memory.close()


def tensors(arrays: Sequence[Array]) -> tuple[bytes, list[bytes | memoryview], int]:
    """Descriptors, contents and bytes of tensors in the frame; the index of each is its place."""
    inline = [frames.elements(array) for array in arrays]
    described = b"".join(
        frames.describe(index, array.dtype, array.shape, len(inline[index])) for index, array in enumerate(arrays)
    )
    return described, inline, sum(map(len, inline))


def each_of(frame: Frame, arrays: Sequence[tuple[int, Array]]) -> list[tuple[int, list[Array]]]:
    """Whom a frame is about, each with its own of the frame's tensors."""
    ids = frames.read_ids(frame)
    if not frame[1] & frames.MANY:
        return [(ids[0], [array for _, array in arrays])]
    return [(about, [array[place] for _, array in arrays]) for place, about in enumerate(ids)]


class Worker(Peer):
    """In front of a real engine.

    Attributes:
        own: its memory.
        number: of the first copy in the catalogue that it read last.
    """

    own: Arena
    number: int
    catalogue: dict[str, Any]

    @classmethod
    async def connect(cls, path: Path, nbytes: int = 1 << 20) -> "Worker":
        own = Arena.create(SLOTS + nbytes)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with ExitStack() as opened:
            opened.callback(sock.close)
            opened.callback(own.close)
            sock.connect(str(path))
            writer, reader = Writer(), Reader()
            writer.write(frames.HELLO, meta=orjson.dumps({"version": frames.VERSION, "pid": os.getpid()}))
            socket.send_fds(sock, [writer.take()], [own.descriptor])
            (_, *first), (descriptor,) = await asyncio.wait_for(greeting(sock, reader), PATIENCE)
            worker = cls(sock, reader, first, Arena(descriptor, writable=False))
            worker.writer, worker.own = writer, own
            opened.pop_all()
        await worker.learn()
        return worker

    async def learn(self) -> None:
        """Read the next catalogue, and say so."""
        frame = await self.next(frames.CATALOGUE)
        self.catalogue = orjson.loads(frame[4][frame[5] : frame[6]])
        if self.catalogue["copies"]:
            self.number = self.catalogue["copies"][0]["number"]
        self.write(frames.SEEN, frame[3])
        await self.flush()

    def ask(self, id: int, *arrays: Array, kind: int = frames.INFER, number: int = 0, **rest: Any) -> None:
        """Write a request; its first tensor is the model's first, and so on."""
        said: dict[str, Any] = {"rows": len(arrays[0]), "deadline": float("inf"), "more": b"", "flags": 0, **rest}
        descriptors, inline, nbytes = tensors(arrays)
        meta = frames.request_meta(
            number or self.number, said["rows"], said["deadline"], 0, 0, descriptors, said["more"]
        )  # fmt: skip
        self.write(kind, id, said["flags"], meta, tensors=len(arrays), inline=inline, nbytes=nbytes)

    def ask_many(self, ids: Sequence[int], of_each: Sequence[Array]) -> None:
        """Write one frame with requests for the model's only input, which look alike."""
        first = of_each[0]
        described = frames.describe(0, first.dtype, first.shape, first.nbytes)
        inline = [frames.write_ids(ids), *[array.tobytes() for array in of_each]]
        meta = frames.request_meta(self.number, len(first), float("inf"), 0, 0, described, b"")
        self.write(
            frames.INFER, len(ids), frames.MANY, meta, tensors=1, inline=inline, nbytes=sum(map(len, inline))
        )  # fmt: skip

    async def answer(self) -> "tuple[int, list[Array] | Exception]":
        """The next answer: whose it is, and its arrays or its error."""
        if not self._answers:
            frame = await self.next(frames.RESPONSE, frames.ERROR)
            if frame[0] == frames.ERROR:
                return frame[3], frames.read_error(frame)
            self._answers += each_of(frame, frames.read_response(frame, self.memory)[0])
        return self._answers.pop(0)

    def close(self) -> None:
        super().close()
        self.own.close()


def metadata(name: str = "m", **rest: Any) -> ModelMetadata:
    inputs = {"x": TensorSpec("x", "FP32", (-1, 4))}
    outputs = {"y": TensorSpec("y", "FP32", (-1, 4))}
    return ModelMetadata(**{
        "name": name, "versions": ("1",), "platform": "p", "max_batch_size": 32, "inputs": inputs, "outputs": outputs,
        **rest,
    })  # fmt: skip


def catalogue(models: Mapping[int, ModelMetadata], **rest: Any) -> bytes:
    """A catalogue of copies by their number, all of version 1."""
    copies = [
        {"number": number, "version": "1", "latest": True, "metadata": model} for number, model in models.items()
    ]  # fmt: skip
    return orjson.dumps({"copies": copies, "states": {}, "regions": [], "log": None, **rest})


class Engine(Peer):
    """What a real worker meets at a path; it speaks to one of them at a time.

    Attributes:
        answers: its memory for what it answers.
    """

    answers: Arena

    @classmethod
    async def accept(cls, listener: socket.socket, nbytes: int = 1 << 20) -> "Engine":
        """The next worker, after its greeting, which is answered."""
        loop = asyncio.get_running_loop()
        sock, _ = await asyncio.wait_for(loop.sock_accept(listener), PATIENCE)
        reader = Reader()
        first, (descriptor,) = await asyncio.wait_for(greeting(sock, reader), PATIENCE)
        engine = cls(sock, reader, first[1:], Arena(descriptor))
        engine.answers = Arena.create(nbytes)
        engine.write(frames.WELCOME, meta=orjson.dumps({"version": frames.VERSION, "pid": os.getpid()}))
        socket.send_fds(sock, [engine.writer.take()], [engine.answers.descriptor])
        return engine

    async def serve(self, models: Mapping[int, ModelMetadata] | None = None, generation: int = 1) -> None:
        """Say what is served, and that all is well; the model m, as copy 1, unless something else is."""
        self.write(frames.CATALOGUE, generation, meta=catalogue({1: metadata()} if models is None else models))
        self.write(frames.BEAT, flags=frames.LIVE | frames.READY)
        await self.flush()

    async def asked(self) -> "Asked":
        """The next request."""
        if not self._asked:
            frame = await self.next(frames.INFER, frames.STREAM)
            number, rows, _deadline, _timeout, _priority, arrays, more = frames.read_request(frame, self.memory)
            said = orjson.loads(more or b"{}")
            self._asked += [
                Asked(about, frame[1], number, rows, own, said) for about, own in each_of(frame, arrays)
            ]  # fmt: skip
        return self._asked.pop(0)

    def board(self, id: int) -> None:
        """A batch with this request is about to run."""
        self.memory.put(id & (SLOTS - 1), b"\1")

    def respond(self, id: int, *arrays: Array) -> None:
        descriptors, inline, nbytes = tensors(arrays)
        meta = frames.response_meta(descriptors, b"")
        self.write(frames.RESPONSE, id, 0, meta, tensors=len(arrays), inline=inline, nbytes=nbytes)

    def fail(self, id: int, error: Exception) -> None:
        flags, meta = frames.error_meta(error)
        self.write(frames.ERROR, id, flags, meta)

    def close(self) -> None:
        """As a process that is killed does."""
        super().close()
        self.answers.close()


class Asked:
    """A request as the engine read it."""

    def __init__(
        self, id: int, flags: int, number: int, rows: int, arrays: list[Array], more: dict[str, Any]
    ) -> None:  # fmt: skip
        self.id = id
        self.alone = bool(flags & frames.ALONE)
        self.number = number
        self.rows = rows
        self.x = arrays[0]
        self.more = more


def listen(path: Path) -> socket.socket:
    """What a test's engine listens with; a path that is there is taken over."""
    beside = path.with_name(path.name + ".beside")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(str(beside))
    listener.listen(8)
    beside.rename(path)
    return listener


def x(value: float = 1, rows: int = 1) -> Array:
    """The input of the model m."""
    return np.full((rows, 4), value, "<f4")


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))
