"""RemoteEngine: an engine like any other, whatever becomes of the one at the other end of its socket."""

import asyncio
import contextlib
import gc
import random
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest

from batching.errors import DeadlineExceeded, QueueFull
from engine.errors import (
    InvalidInput,
    LoadFailed,
    ModelError,
    NotFound,
    NotReady,
    TooLarge,
    TooSlow,
    Unimplemented,
)
from engine.ipc import client, frames
from engine.ipc.client import RemoteEngine
from engine.ipc.frames import Frame
from engine.ipc.server import SLOTS, Server
from engine.types import DATATYPES, SEQUENCE_START, Array, InferRequest, InferResponse, TensorSpec
from tests.engine.test_calls import CONFIG as GIVEN
from tests.engine.test_calls import DECOUPLED, Instance, answer
from tests.scripted import CONFIG, Gate, Scripted, add_model, double
from tests.timing import settle, until

from .conftest import Fake, Remote, Serve, add_instance
from .peers import Asked, Engine, catalogue, descriptors, each_of, listen, metadata, x
from .test_server import LARGE, STRANGER, Foreign, used

SMALL = 1 << 20  # bytes of shared memory, in most tests


def request(value: float = 1, rows: int = 1, **rest: Any) -> InferRequest:
    return InferRequest("m", "", {"x": x(value, rows)}, **rest)


async def meet(remote: Remote, fake: Fake, models: Any = None, **settings: Any) -> tuple[RemoteEngine, Engine]:
    """A worker's engine, and what is at its other end."""
    starting = asyncio.ensure_future(remote(**settings))
    engine = await fake()
    await engine.serve(models)
    return await starting, engine


async def next_engine(fake: Fake, models: Any = None) -> Engine:
    """Who comes after the one that is gone."""
    engine = await fake()
    await engine.serve(models)
    return engine


def first(response: InferResponse) -> float:
    """The first element of the first output."""
    return float(next(iter(response.outputs.values())).flat[0])


def assert_idle(worker: RemoteEngine) -> None:
    """Nothing is under way: all memory and all slots are back."""
    assert worker._pending == {}
    assert worker._allocator.used == 0
    assert sorted(worker._slots) == list(range(SLOTS))


async def ask(worker: RemoteEngine, *requests: InferRequest) -> list["asyncio.Task[InferResponse]"]:
    """Requests on their way."""
    tasks = [asyncio.create_task(worker.infer(each)) for each in requests]
    await settle()
    return tasks


# Requests and answers.


async def test_answers_find_their_requests(remote: Remote, fake: Fake) -> None:
    """In whatever order they come; what a request says besides gets there."""
    worker, engine = await meet(remote, fake)
    tasks = await ask(worker, request(1), request(2, id="r", parameters={"a": 1}, client="c"), request(3, rows=2))
    asked = [await engine.asked() for _ in tasks]
    assert [(each.number, each.rows, float(each.x[0, 0]), each.alone) for each in asked] == [
        (1, 1, 1, False), (1, 1, 2, False), (1, 2, 3, False),
    ]  # fmt: skip
    assert asked[1].more == {"id": "r", "client": "c", "parameters": {"a": 1}}
    assert len({each.id for each in asked}) == len({each.id & (SLOTS - 1) for each in asked}) == 3
    for each in reversed(asked):
        engine.respond(each.id, each.x * 10)
    await engine.flush()
    assert [first(response) for response in await asyncio.gather(*tasks)] == [10, 20, 30]
    assert {(task.result().model, task.result().version) for task in tasks} == {("m", "1")}
    assert_idle(worker)


async def test_requests_of_one_turn_leave_in_one_write(
    remote: Remote, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are."""
    worker, engine = await meet(remote, fake)
    assert worker._connection is not None
    writes: list[int] = []
    transport: Any = worker._connection._transport
    real = transport.write
    monkeypatch.setattr(worker._connection, "_transport", Recorded(transport, writes))
    tasks = await ask(worker, *(request() for _ in range(50)))
    assert len(writes) == 1
    assert real is not None
    for _ in tasks:
        asked = await engine.asked()
        engine.respond(asked.id, asked.x)
    await engine.flush()
    await asyncio.gather(*tasks)


async def test_requests_that_look_alike_share_a_frame(remote: Remote, fake: Fake) -> None:
    """Others have one of their own; so do answers."""
    worker, engine = await meet(remote, fake)
    alike = [asyncio.create_task(worker.infer(request(value))) for value in range(300)]
    other = asyncio.create_task(worker.infer(request(7, rows=2)))
    said = asyncio.create_task(worker.infer(request(8, id="r")))
    await settle()
    frames_ = [await engine.next(frames.INFER) for _ in range(4)]
    assert [(frame[0], len(frames.read_ids(frame))) for frame in frames_] == [
        (frames.INFER, frames.MOST), (frames.INFER, 300 - frames.MOST), (frames.INFER, 1), (frames.INFER, 1),
    ]  # fmt: skip
    for frame in frames_:
        *_, arrays, _more = frames.read_request(frame, engine.memory)
        mine = each_of(frame, arrays)
        if len(mine) == 1:
            engine.respond(mine[0][0], mine[0][1][0])
            continue
        row = mine[0][1][0]
        meta = frames.response_meta(frames.describe(0, row.dtype, row.shape, row.nbytes), b"")
        inline = [frames.write_ids([about for about, _ in mine]), *[own.tobytes() for _, (own,) in mine]]
        engine.write(
            frames.RESPONSE, len(mine), frames.MANY, meta, tensors=1, inline=inline, nbytes=sum(map(len, inline))
        )  # fmt: skip
    await engine.flush()
    assert [first(response) for response in await asyncio.gather(*alike, other, said)] == [*range(300), 7, 8]
    assert_idle(worker)


@pytest.mark.parametrize(
    "different",
    [{"deadline": 1e12}, {"priority": 2}, {"timeout": 3.0}, {"rows": 2}, {"parameters": {"a": 1}}, {"alone": True}],
    ids=str,
)
async def test_requests_that_do_not_look_alike(remote: Remote, fake: Fake, different: dict[str, Any]) -> None:
    """Have a frame each: what is said of one is not said of the other."""
    worker, engine = await meet(remote, fake)
    tasks = await ask(worker, request(1), request(2, **different))
    frames_ = [await engine.next(frames.INFER) for _ in tasks]
    assert [len(frames.read_ids(frame)) for frame in frames_] == [1, 1]
    plain, other = (frames.read_request(frame, engine.memory) for frame in frames_)
    assert (plain[1:5], plain[6]) == ((1, float("inf"), 0, 0), b"")
    assert other[1:5] == (
        different.get("rows", 1), different.get("deadline", float("inf")), different.get("timeout", 0),
        different.get("priority", 0),
    )  # fmt: skip
    assert bool(other[6]) == ("parameters" in different)
    assert bool(frames_[1][1] & frames.ALONE) == ("alone" in different)
    for frame, sent in zip(frames_, (1, different.get("rows", 1)), strict=True):
        engine.respond(frame[3], x(rows=sent))
    await engine.flush()
    await asyncio.gather(*tasks)


async def test_numbers_as_large_as_json_has_them(remote: Remote, fake: Fake) -> None:
    """What a client says of its own request never stands in the way of others that leave in the same turn."""
    worker, engine = await meet(remote, fake)
    tasks = await ask(worker, request(1), request(2, priority=2**64 - 1, timeout=1e300), request(3))
    for _ in tasks:
        asked = await engine.asked()
        engine.respond(asked.id, asked.x)
    await engine.flush()
    assert sorted([first(response) for response in await asyncio.gather(*tasks)]) == [1, 2, 3]


async def test_what_waited_is_not_refused(
    remote: Remote, fake: Fake, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that has no room for all that waited for its engine gets the rest later."""
    monkeypatch.setattr(client, "SWEEP", 0.01)
    worker, engine = await meet(remote, fake)
    tasks = await ask(worker, *(request(value) for value in range(100)))
    engine.close()
    await until(lambda: worker._connection is None)
    gate = Gate()
    _, local = await serve({"queue_rows": 32}, takeover=True, m=gate)
    gate.open.clear()
    await until(lambda: local.copies()[0].batcher.journal.refused.get("QueueFull", 0) > 0)
    gate.open.set()
    assert [first(response) for response in await asyncio.gather(*tasks)] == [2 * value for value in range(100)]
    assert_idle(worker)


async def test_a_crash_is_not_forgotten_with_the_copy(remote: Remote, fake: Fake) -> None:
    """What was aboard stays alone when the model is another one by then; and a second crash is its last."""
    worker, engine = await meet(remote, fake)
    (task,) = await ask(worker, request())
    engine.board((await engine.asked()).id)
    engine.close()
    engine = await next_engine(fake, {1: metadata(platform="another")})
    asked = await engine.asked()
    assert asked.alone
    engine.write(frames.CATALOGUE, 2, meta=catalogue({2: metadata()}))
    engine.write(frames.STALE, asked.id)
    await engine.flush()
    asked = await engine.asked()
    assert (asked.number, asked.alone) == (2, True)
    engine.board(asked.id)
    engine.close()
    with pytest.raises(ModelError, match="ended twice"):
        await task


async def test_an_engine_that_says_nothing_any_more(
    remote: Remote, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is left after `stuck_after`: its own watchdog would have ended it. What it had waits for another."""
    monkeypatch.setattr(client, "SILENT", 0.05)
    worker, engine = await meet(remote, fake, stuck_after=0.05)
    (task,) = await ask(worker, request())
    await engine.asked()
    await engine.rest()  # until the worker closes the connection
    engine = await next_engine(fake)
    engine.respond((await engine.asked()).id, x(5))
    await engine.flush()
    assert first(await task) == 5


async def test_outputs_are_aligned(remote: Remote, fake: Fake) -> None:
    """Wherever in a frame they lay: who writes them as JSON reads them as numbers of their size."""
    worker, engine = await meet(remote, fake)
    for odd in range(8):
        (task,) = await ask(worker, request())
        asked = await engine.asked()
        engine.write(frames.CATALOGUE, 2, meta=catalogue({1: metadata(platform="p" * odd)}))  # so long is what is ahead
        engine.respond(asked.id, np.arange(4, dtype="<f8").reshape(1, 4))
        await engine.flush()
        (array,) = (await task).outputs.values()
        assert array.flags.aligned
        assert array.tolist() == [[0, 1, 2, 3]]


async def test_a_queue_that_is_full_is_believed_for_a_moment(
    remote: Remote, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nobody decodes what it would refuse; the engine hears of each such refusal, and is asked again soon."""
    monkeypatch.setattr(client, "FULL_FOR", 60)
    worker, engine = await meet(remote, fake)
    tasks = await ask(worker, request(), request())
    for flags in (0, frames.FULL):  # the first was only too large for what is left
        worker.check_room("m", "")
        error_flags, meta = frames.error_meta(QueueFull("the queue is full: 8 of 8 rows wait", 1.5))
        engine.write(frames.ERROR, (await engine.asked()).id, error_flags | flags, meta)
        await engine.flush()
        with pytest.raises(QueueFull):
            await tasks.pop(0)
    with pytest.raises(QueueFull, match="8 of 8 rows wait") as full:
        worker.check_room("m", "")
    assert full.value.retry_after == 1.5
    frame = await engine.next(frames.REFUSED)
    assert (frame[1], frame[3]) == (1, 1)
    assert worker._copies is not None
    copy = worker._copies["m", ""]
    assert copy.full is not None
    copy.full = (time.monotonic() - 1, copy.full[1])
    worker.check_room("m", "")


class Recorded:
    """A transport, and what was written to it."""

    def __init__(self, transport: Any, writes: list[int]) -> None:
        self._transport = transport
        self._writes = writes

    def write(self, data: bytes) -> None:
        self._writes.append(len(data))
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_what_does_not_fit_the_model_stays_here(remote: Remote, fake: Fake) -> None:
    """It is refused as the engine would, and nothing is sent or kept of it."""
    worker, engine = await meet(remote, fake, {1: metadata(), 2: metadata("d", decoupled=True)})
    for wrong, error in (
        (InferRequest("m", "", {}), InvalidInput),
        (InferRequest("m", "", {"x": np.ones((1, 5), "<f4")}), InvalidInput),
        (InferRequest("m", "", {"x": np.ones((33, 4), "<f4")}), InvalidInput),
        (InferRequest("m", "2", {"x": x()}), NotFound),
        (InferRequest("nobody", "", {"x": x()}), NotFound),
        (InferRequest("d", "", {"x": x()}), Unimplemented),
    ):
        with pytest.raises(error):
            await worker.infer(wrong)
    assert_idle(worker)
    (task,) = await ask(worker, request(7))
    assert (await engine.asked()).x[0, 0] == 7
    task.cancel()


async def test_an_input_that_cannot_be_sent(remote: Remote, fake: Fake) -> None:
    """Keeps neither memory nor a slot: text where there should be bytes, beside what is in shared memory."""
    inputs = {"a": TensorSpec("a", "FP32", (-1, 8192)), "s": TensorSpec("s", "BYTES", (-1, 1))}
    worker, _ = await meet(remote, fake, {1: metadata(inputs=inputs)})
    with pytest.raises(TypeError):
        await worker.infer(
            InferRequest("m", "", {"a": np.ones((1, 8192), "<f4"), "s": np.array([["text"]], object)})
        )  # fmt: skip
    with pytest.raises(TypeError):
        await worker.infer(
            InferRequest(
                "m", "", {"a": np.ones((1, 8192), "<f4"), "s": np.array([[b"x"]], object)},
                parameters={"too": 2**70},
            )
        )  # fmt: skip
    assert_idle(worker)


async def test_a_caller_who_leaves(remote: Remote, fake: Fake, tmp_path: Path) -> None:
    """The engine is told; the request's memory is its own until it says that it has done with it."""
    worker, engine = await meet(remote, fake, {1: metadata(inputs={"x": TensorSpec("x", "FP32", (-1, 8192))})})
    (task,) = await ask(worker, InferRequest("m", "", {"x": np.ones((1, 8192), "<f4")}))
    asked = await engine.asked()
    task.cancel()
    assert (await engine.next(frames.CANCEL))[3] == asked.id
    assert worker._allocator.used == 32768
    assert len(worker._slots) == SLOTS - 1
    engine.respond(asked.id, x())
    await engine.flush()
    await until(lambda: not worker._pending)
    assert_idle(worker)


# The bounds.


async def test_shared_memory_that_is_full(remote: Remote, fake: Fake) -> None:
    """Is no room for another, and names the setting; when there is room again, there is."""
    model = metadata(inputs={"x": TensorSpec("x", "FP32", (-1, -1))})
    worker, engine = await meet(remote, fake, {1: model})
    large = {"x": np.ones((1, 160_000), "<f4")}
    (task,) = await ask(worker, InferRequest("m", "", large))
    with pytest.raises(QueueFull, match=r"640000 of 1048576 bytes are in use \(MILLRACE_ARENA_BYTES\)") as full:
        await worker.infer(InferRequest("m", "", large))
    assert full.value.retry_after == 1
    asked = await engine.asked()
    engine.respond(asked.id, x())
    await engine.flush()
    await task
    assert_idle(worker)
    (task,) = await ask(worker, InferRequest("m", "", large))
    asked = await engine.asked()
    engine.respond(asked.id, x())
    await engine.flush()
    await task


@pytest.mark.parametrize("sizes", [(262_145,), (200_000, 100_000), (100_000, 100_000, 100_000)])
async def test_tensors_that_shared_memory_never_has_room_for(
    remote: Remote, fake: Fake, sizes: tuple[int, ...]
) -> None:
    """One, or several of one request together: it is too large, and trying again would not help."""
    names = "abc"[: len(sizes)]
    worker, _ = await meet(
        remote, fake, {1: metadata(inputs={name: TensorSpec(name, "FP32", (-1, -1)) for name in names})}
    )
    inputs = {name: np.ones((1, size), "<f4") for name, size in zip(names, sizes, strict=True)}
    with pytest.raises(TooLarge, match=r"over the limit of 1048576 bytes \(MILLRACE_ARENA_BYTES\)"):
        await worker.infer(InferRequest("m", "", inputs))
    assert_idle(worker)


async def test_a_tensor_as_large_as_shared_memory(remote: Remote, fake: Fake) -> None:
    """Is not too large."""
    worker, engine = await meet(remote, fake, {1: metadata(inputs={"x": TensorSpec("x", "UINT8", (-1, -1))})})
    (task,) = await ask(worker, InferRequest("m", "", {"x": np.full((1, SMALL), 7, "u1")}))
    asked = await engine.asked()
    assert asked.x.shape == (1, SMALL)
    assert (asked.x == 7).all()
    engine.respond(asked.id, x())
    await engine.flush()
    await task


async def test_more_requests_than_there_are_slots(remote: Remote, fake: Fake) -> None:
    """One more is refused before anybody decodes it; slots come back with the answers."""
    worker, engine = await meet(remote, fake)
    del worker._slots[2:]
    tasks = await ask(worker, request(), request())
    with pytest.raises(QueueFull):
        worker.check_room("m", "")
    with pytest.raises(QueueFull):
        await worker.infer(request())
    for _ in tasks:
        engine.respond((await engine.asked()).id, x())
    await engine.flush()
    await asyncio.gather(*tasks)
    worker.check_room("m", "")
    assert len(worker._slots) == 2


# Engines that are wrong.


def anew(engine: Engine, asked: Asked) -> bytes:
    return engine.writer.take()


def damaged(engine: Engine, asked: Asked) -> bytes:
    engine.respond(asked.id, asked.x)
    data = bytearray(engine.writer.take())
    data[30] ^= 1
    return bytes(data)


def cut(engine: Engine, asked: Asked) -> bytes:
    engine.respond(asked.id, asked.x)
    return engine.writer.take()[:-1]


def doubled(engine: Engine, asked: Asked) -> bytes:
    engine.write(frames.BEAT)
    return 2 * engine.writer.take()


def reordered(engine: Engine, asked: Asked) -> bytes:
    engine.write(frames.BEAT)
    beat = engine.writer.take()
    engine.respond(asked.id, asked.x)
    return engine.writer.take() + beat


def another_id(engine: Engine, asked: Asked) -> bytes:
    engine.respond(asked.id + (1 << 16), asked.x)
    return engine.writer.take()


def another_slot(engine: Engine, asked: Asked) -> bytes:
    engine.respond(asked.id ^ 1, asked.x)
    return engine.writer.take()


def answered_twice(engine: Engine, asked: Asked) -> bytes:
    engine.fail(asked.id + (5 << 16), NotReady("whose is it?"))
    return engine.writer.take()


def another_output(engine: Engine, asked: Asked) -> bytes:
    engine.respond(asked.id, asked.x, asked.x)
    return engine.writer.take()


def wrote(kind: int, meta: bytes = b"", **rest: Any) -> Callable[[Engine, Asked], bytes]:
    def write(engine: Engine, asked: Asked) -> bytes:
        engine.write(kind, asked.id, meta=meta, **rest)
        return engine.writer.take()

    return write


WRONG: dict[str, Callable[[Engine, Asked], bytes]] = {
    "damaged": damaged,
    "cut": cut,
    "doubled": doubled,
    "reordered": reordered,
    "no frame": lambda engine, asked: bytes(64),
    "for an id that was not asked": another_id,
    "for another slot": another_slot,
    "an error for an id that was not asked": answered_twice,
    "an output that the model does not have": another_output,
    "an answer without its beginning": wrote(frames.RESPONSE, b"x"),
    "an answer whose JSON is none": wrote(frames.RESPONSE, frames.response_meta(b"", b"{")),
    "an answer whose JSON is a list": wrote(frames.RESPONSE, frames.response_meta(b"", b"[]")),
    "a tensor beyond its memory": wrote(
        frames.RESPONSE,
        frames.response_meta(frames.describe(0, np.dtype("<f4"), (1, 4), 16, SMALL - 8), b""), tensors=1,
    ),
    "an error that there is not": wrote(frames.ERROR, b"\xff" + bytes(8)),
    "the end of what is no stream": wrote(frames.END),
    "a reply to a request": wrote(frames.REPLY, b"{}"),
    "a catalogue without JSON": wrote(frames.CATALOGUE),
    "a catalogue without copies": wrote(frames.CATALOGUE, b"{}"),
    "a catalogue of something else": wrote(frames.CATALOGUE, b'{"copies":["x"],"states":{},"regions":[]}'),
    "what a worker says": wrote(frames.INFER),
    "a kind that there is not": wrote(77),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
async def test_an_engine_that_is_wrong_loses_its_worker(remote: Remote, fake: Fake, what: str) -> None:
    """The connection ends, and what it was asked is sent to the next one: no caller gets an error, or a lie."""
    worker, engine = await meet(remote, fake)
    one, other = await ask(worker, request(1), request(2))
    asked = await engine.asked()
    await engine.send(WRONG[what](engine, asked))
    if what == "cut":
        engine.close()
    else:
        await engine.rest()
    again = await next_engine(fake)
    for _ in range(2):
        each = await again.asked()
        again.respond(each.id, each.x * 10)
    await again.flush()
    assert [first(response) for response in await asyncio.gather(one, other)] == [10, 20]
    assert_idle(worker)


async def test_every_byte_of_an_answer_may_be_damaged(remote: Remote, fake: Fake) -> None:
    """In its header and its meta part: the request is sent again, and its answer is never wrong."""
    worker, engine = await meet(remote, fake)
    (task,) = await ask(worker, request(3))
    asked = await engine.asked()
    engine.respond(asked.id, asked.x)
    length = len(engine.writer.take()) - 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "RETRY", 0)
        for place in range(length):
            engine.close()
            engine = await next_engine(fake)
            asked = await engine.asked()
            engine.respond(asked.id, asked.x)
            data = bytearray(engine.writer.take())
            data[place] ^= 0x21
            await engine.send(bytes(data))
            await engine.rest()
            assert not task.done(), place
    engine = await next_engine(fake)
    asked = await engine.asked()
    engine.respond(asked.id, asked.x)
    await engine.flush()
    assert first(await task) == 3


async def test_an_engine_that_is_wrong_at_once_is_not_asked_without_a_pause(remote: Remote, fake: Fake) -> None:
    """However often it lets itself be found."""
    starting = asyncio.ensure_future(remote())
    count, until_then = 0, time.monotonic() + 0.5
    while time.monotonic() < until_then:
        engine = await fake()
        await engine.send(bytes(64))
        engine.close()
        count += 1
    assert count < 25
    await starting


async def test_what_listens_there_and_is_no_engine(
    remote: Remote, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, and a real one is found all the same when it comes."""
    monkeypatch.setattr(client, "BEAT", 0.01)
    loop = asyncio.get_running_loop()
    listener = listen(path)
    starting = asyncio.ensure_future(remote())
    greetings = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3,
        _frame(frames.WELCOME, b'{"version":1,"pid":1}'),  # without memory
        _frame(frames.WELCOME, b"{"),
        _frame(frames.WELCOME, b"[]"),
        _frame(frames.BEAT),
        b"",
    ]
    before = 0
    for number, data in enumerate(2 * greetings):
        sock, _ = await asyncio.wait_for(loop.sock_accept(listener), 10)
        await loop.sock_sendall(sock, data)
        sock.close()
        if number == 0:
            before = descriptors()
    assert descriptors() <= before + 1
    assert "what listens there is no engine" in caplog.text
    engine = await Engine.accept(listener)
    await engine.serve()
    worker = await starting
    await until(worker.ready)
    engine.close()
    listener.close()


def _frame(kind: int, meta: bytes = b"") -> bytes:
    writer = frames.Writer()
    writer.write(kind, meta=meta)
    return writer.take()


async def test_somebody_elses_engine(
    remote: Remote, serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gets nothing from a worker, unless the socket's mode says that others may be there."""
    monkeypatch.setattr(client, "PEER", Foreign(STRANGER, STRANGER))
    await serve(m=double)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "START", 0.1)
        worker = await remote()
    assert not worker.ready()
    assert f"process 4711 of user {STRANGER} listens there" in caplog.text
    shared = await remote(engine_mode="660")
    assert first(await shared.infer(request())) == 2


async def test_an_engine_of_another_version(
    remote: Remote, serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuses the worker, whose requests wait, as for an engine that is not there."""
    await serve(m=double)
    real, version = frames.Writer.write, frames.VERSION

    def write(self: frames.Writer, kind: int, *arguments: Any, **rest: Any) -> None:
        if kind == frames.HELLO:
            rest["meta"] = orjson.dumps({"version": version + 1, "pid": 1})
        real(self, kind, *arguments, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames.Writer, "write", write)
        patch.setattr(client, "START", 0.1)
        worker = await remote(engine_wait=0.2)
        with pytest.raises(NotReady, match="MILLRACE_ENGINE_WAIT"):
            await worker.infer(request())
    assert caplog.text.count("the worker speaks version 2, this engine 1") > 1  # here, and there


async def test_frames_that_come_with_the_greeting(remote: Remote, fake: Fake) -> None:
    """Are read before those that come later: the newest catalogue is the one that counts."""
    starting = asyncio.ensure_future(remote())
    engine = await fake()
    engine.write(frames.CATALOGUE, 1, meta=catalogue({1: metadata("old")}))
    engine.write(frames.CATALOGUE, 2, meta=catalogue({2: metadata("new")}))
    await engine.flush()
    worker = await starting
    assert [await _seen(engine), await _seen(engine)] == [1, 2]
    assert worker.metadata("new").name == "new"
    with pytest.raises(NotFound):
        worker.metadata("old")


async def _seen(engine: Engine) -> int:
    return (await engine.next(frames.SEEN))[3]


# Engines that go.


async def test_what_was_queued_is_sent_to_the_next_engine(remote: Remote, fake: Fake) -> None:
    """In its order, sharing batches as before, with the number that its model has there."""
    worker, engine = await meet(remote, fake)
    tasks = await ask(worker, request(1), request(2))
    for _ in tasks:
        await engine.asked()
    engine.close()
    await until(lambda: not worker.ready())
    tasks += await ask(worker, request(3))
    again = await next_engine(fake, {9: metadata()})
    for value in (1, 2, 3):
        asked = await again.asked()
        assert (asked.number, asked.alone, asked.x[0, 0]) == (9, False, value)
        again.respond(asked.id, asked.x * 10)
    await again.flush()
    assert [first(response) for response in await asyncio.gather(*tasks)] == [10, 20, 30]
    assert_idle(worker)


async def test_what_was_aboard_is_sent_again_alone(remote: Remote, fake: Fake) -> None:
    """Once; those that were queued at the same time are sent as they were."""
    worker, engine = await meet(remote, fake)
    tasks = await ask(worker, request(1), request(2))
    asked = await engine.asked()
    await engine.asked()
    engine.board(asked.id)
    engine.close()
    again = await next_engine(fake)
    one, other = await again.asked(), await again.asked()
    assert (one.x[0, 0], one.alone, other.x[0, 0], other.alone) == (1, True, 2, False)
    again.respond(one.id, one.x)
    again.respond(other.id, other.x)
    await again.flush()
    assert [first(response) for response in await asyncio.gather(*tasks)] == [1, 2]
    assert_idle(worker)


async def test_what_was_aboard_twice_is_not_tried_again(
    remote: Remote, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that ends while it only has it in its queue does not count."""
    worker, engine = await meet(remote, fake)
    poison, harmless = await ask(worker, request(1), request(2))
    for aboard in (True, False, True):
        for _ in range(2):
            asked = await engine.asked()
            if asked.x[0, 0] == 1 and aboard:
                engine.board(asked.id)
        engine.close()
        engine = await next_engine(fake)
    with pytest.raises(ModelError, match="model 'm': the engine ended twice while it ran this request"):
        await poison
    assert "the engine ended twice" in caplog.text
    asked = await engine.asked()
    assert (asked.x[0, 0], asked.alone) == (2, False)
    engine.respond(asked.id, asked.x)
    await engine.flush()
    assert first(await harmless) == 2
    assert_idle(worker)


@pytest.mark.parametrize("aboard", [False, True])
async def test_a_sequence_is_never_sent_again(remote: Remote, fake: Fake, aboard: bool) -> None:
    """Nor what a model must not see twice: the caller is told why."""
    worker, engine = await meet(remote, fake, {1: metadata(), 2: metadata("learns", resend=False)})
    sequence, learning = await ask(
        worker, request(correlation_id=7, flags=SEQUENCE_START), InferRequest("learns", "", {"x": x()})
    )
    for _ in range(2):
        asked = await engine.asked()
        if aboard:
            engine.board(asked.id)
    engine.close()
    with pytest.raises(NotReady, match="it belongs to a sequence: it may have been done, and is not sent again"):
        await sequence
    with pytest.raises(NotReady, match="its model may not be asked twice"):
        await learning
    assert_idle(worker)


async def test_a_sequence_that_no_engine_had(remote: Remote, fake: Fake) -> None:
    """Waits for one like all others: nothing can have been done with it."""
    worker, engine = await meet(remote, fake)
    engine.close()
    await until(lambda: not worker.ready())
    (task,) = await ask(worker, request(correlation_id="s"))
    again = await next_engine(fake)
    asked = await again.asked()
    assert asked.more["correlation_id"] == "s"
    again.respond(asked.id, asked.x)
    await again.flush()
    await task


async def test_a_caller_who_left_is_forgotten_with_the_engine(remote: Remote, fake: Fake) -> None:
    """And so is one who leaves while there is none: nothing of theirs is sent to the next."""
    worker, engine = await meet(remote, fake)
    one, other, stays = await ask(worker, request(1), request(2), request(3))
    await engine.asked()
    one.cancel()
    await settle()
    engine.close()
    await until(lambda: not worker.ready())
    other.cancel()
    await settle()
    again = await next_engine(fake)
    asked = await again.asked()
    assert asked.x[0, 0] == 3
    again.respond(asked.id, asked.x)
    await again.flush()
    assert first(await stays) == 3
    assert_idle(worker)


async def test_the_deadline_passes_while_there_is_no_engine(remote: Remote, fake: Fake) -> None:
    """The request is not waited for any longer, whether an engine had it or not."""
    worker, engine = await meet(remote, fake)
    (had,) = await ask(worker, request(deadline=time.monotonic() + 0.2))
    await engine.asked()
    engine.close()
    await until(lambda: not worker.ready())
    (never,) = await ask(worker, request(deadline=time.monotonic() + 0.2))
    for task in (had, never):
        with pytest.raises(DeadlineExceeded, match="waited for the engine to come back"):
            await task
    assert_idle(worker)


async def test_no_engine_comes(remote: Remote, fake: Fake) -> None:
    """For as long as the setting says; then requests are told so."""
    worker, engine = await meet(remote, fake, engine_wait=0.2)
    (task,) = await ask(worker, request())
    await engine.asked()
    engine.close()
    with pytest.raises(NotReady, match=r"the engine has been gone for 0.2 seconds \(MILLRACE_ENGINE_WAIT\)"):
        await task
    assert_idle(worker)


async def test_there_never_was_an_engine(
    remote: Remote, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker starts without it, is not ready, and its requests wait as long as they may."""
    monkeypatch.setattr(client, "START", 0.05)
    worker = await remote(engine_wait=0.2)
    assert "no engine at" in caplog.text
    assert (worker.ready(), worker.live()) == (False, True)
    with pytest.raises(NotReady, match="the engine is not there yet"):
        worker.metadata("m")
    with pytest.raises(NotReady, match="MILLRACE_ENGINE_WAIT"):
        await worker.infer(request())
    with pytest.raises(DeadlineExceeded):
        await worker.infer(request(deadline=time.monotonic() + 0.05))
    with pytest.raises(NotReady, match="the engine is not there"):
        await worker.index()


async def test_requests_wait_for_the_first_engine(remote: Remote, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are answered when it comes."""
    monkeypatch.setattr(client, "START", 0.01)
    worker = await remote()
    (task,) = await ask(worker, request(4))
    listener = listen(path)
    engine = await Engine.accept(listener)
    await engine.serve()
    asked = await engine.asked()
    engine.respond(asked.id, asked.x)
    await engine.flush()
    assert first(await task) == 4
    engine.close()
    listener.close()


async def test_an_engine_that_does_not_answer(remote: Remote, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its deadline a request that is not aboard is given up, and the engine is told."""
    monkeypatch.setattr(client, "LATE", 0.05)
    worker, engine = await meet(remote, fake)
    soon = time.monotonic() + 0.1
    queued, aboard = await ask(worker, request(1, deadline=soon), request(2, deadline=soon))
    asked = [await engine.asked(), await engine.asked()]
    engine.board(asked[1].id)
    with pytest.raises(DeadlineExceeded, match="the engine did not say so"):
        await queued
    assert (await engine.next(frames.CANCEL))[3] == asked[0].id
    await asyncio.sleep(0.3)
    assert not aboard.done()  # a model that began in time may take its time
    for each in asked:
        engine.respond(each.id, each.x)
    await engine.flush()
    assert first(await aboard) == 2
    await until(lambda: not worker._pending)
    assert_idle(worker)


async def test_an_engine_that_is_silent_is_not_ready(
    remote: Remote, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is heard again; if that takes too long, it is not alive either. What it says of itself counts."""
    monkeypatch.setattr(client, "SILENT", 0.1)
    worker, engine = await meet(remote, fake, stuck_after=0.3)
    await until(worker.ready)
    await until(lambda: not worker.ready())
    assert worker.live()
    await until(lambda: not worker.live())
    engine.write(frames.BEAT, flags=frames.LIVE)
    await engine.flush()
    await until(worker.live)
    assert not worker.ready()
    engine.write(frames.BEAT, flags=frames.READY)
    await engine.flush()
    await until(worker.ready)
    assert not worker.live()


async def test_whoever_waits_when_the_worker_stops(remote: Remote, fake: Fake) -> None:
    """Is told that the service ends: requests and questions, whether an engine has them or not."""
    worker, engine = await meet(remote, fake)
    (had,) = await ask(worker, request())
    question = asyncio.create_task(worker.index())
    await engine.next(frames.CALL)
    await worker.stop()
    for task in (had, question):
        with pytest.raises(NotReady):
            await task


async def test_descriptors_do_not_leak(remote: Remote, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many engines come and go."""
    monkeypatch.setattr(client, "RETRY", 0)
    worker, engine = await meet(remote, fake)
    counts = []
    for _ in range(20):
        (task,) = await ask(worker, request())
        asked = await engine.asked()
        engine.respond(asked.id, asked.x)
        await engine.flush()
        await task
        engine.close()
        engine = await next_engine(fake)
        await until(lambda: len(worker._connections) == 1 and worker.ready())
        counts.append(descriptors())
    assert counts[-1] - counts[4] <= 15 * 2  # the fake engines' own mappings, until their test ends


# Models that change.


async def test_a_copy_that_is_not_served_any_more(remote: Remote, fake: Fake) -> None:
    """The request is sent to the one that is; its caller does not notice."""
    worker, engine = await meet(remote, fake)
    (task,) = await ask(worker, request(5))
    asked = await engine.asked()
    engine.write(frames.CATALOGUE, 2, meta=catalogue({2: metadata()}))
    engine.write(frames.STALE, asked.id)
    await engine.flush()
    again = await engine.asked()
    assert (again.number, again.x[0, 0]) == (2, 5)
    engine.respond(again.id, again.x)
    await engine.flush()
    assert first(await task) == 5
    assert_idle(worker)


async def test_a_model_that_is_not_what_it_was(remote: Remote, fake: Fake) -> None:
    """The request is checked anew: it may not fit any more, or be about nothing."""
    worker, engine = await meet(remote, fake)
    other = metadata(inputs={"z": TensorSpec("z", "FP32", (-1, 4))})
    (task,) = await ask(worker, request())
    asked = await engine.asked()
    engine.write(frames.CATALOGUE, 2, meta=catalogue({2: other}))
    engine.write(frames.STALE, asked.id)
    await engine.flush()
    with pytest.raises(InvalidInput, match="unexpected inference input 'x'"):
        await task
    assert_idle(worker)


@pytest.mark.parametrize("models", [{}, {4: metadata(inputs={"z": TensorSpec("z", "FP32", (-1, 4))})}])
async def test_the_next_engine_serves_something_else(remote: Remote, fake: Fake, models: Any) -> None:
    """What waited for it is told so, and not sent to another model by that name."""
    worker, engine = await meet(remote, fake)
    (task,) = await ask(worker, request())
    await engine.asked()
    engine.close()
    await next_engine(fake, models)
    with pytest.raises((NotFound, InvalidInput)):
        await task
    assert_idle(worker)


async def test_why_a_model_is_not_served(remote: Remote, fake: Fake) -> None:
    """A worker says what the engine would."""
    worker, engine = await meet(remote, fake)
    states = {"m": {"1": ["LOADING", ""]}, "gone": {"1": ["UNAVAILABLE", "x"]}}
    engine.write(frames.CATALOGUE, 2, meta=catalogue({}, states=states))
    await engine.flush()
    await until(lambda: worker._copies == {})
    with pytest.raises(NotReady, match="is not at ready state"):
        worker.metadata("m", "1")
    with pytest.raises(NotFound, match="has no available versions"):
        worker.metadata("gone")


# Engines that drain.


async def test_an_engine_that_drains(remote: Remote, fake: Fake) -> None:
    """It answers what it has; what comes is for its successor; its connection ends with its last answer."""
    worker, engine = await meet(remote, fake)
    (old,) = await ask(worker, request(1))
    asked = await engine.asked()
    engine.write(frames.DRAIN)
    await engine.flush()
    await until(lambda: not worker.ready())
    (new,) = await ask(worker, request(2))
    again = await next_engine(fake)
    later = await again.asked()
    assert later.x[0, 0] == 2
    engine.respond(asked.id, asked.x)
    again.respond(later.id, later.x)
    await engine.flush()
    await again.flush()
    assert (first(await old), first(await new)) == (1, 2)
    assert frames.INFER not in [frame[0] for frame in await engine.rest()]
    assert_idle(worker)


async def test_an_engine_that_drains_and_has_nothing(remote: Remote, fake: Fake) -> None:
    """Is left at once; what it still says of models is not listened to."""
    worker, engine = await meet(remote, fake)
    engine.write(frames.DRAIN)
    engine.write(frames.CATALOGUE, 2, meta=catalogue({}))
    await engine.flush()
    await engine.rest()
    assert worker.metadata("m").name == "m"
    await next_engine(fake)
    await until(worker.ready)


async def test_an_engine_that_dies_while_it_drains(remote: Remote, fake: Fake) -> None:
    """What it had goes to its successor, which has been there for a while."""
    worker, engine = await meet(remote, fake)
    queued, aboard = await ask(worker, request(1), request(2))
    await engine.asked()
    engine.board((await engine.asked()).id)
    engine.write(frames.DRAIN)
    await engine.flush()
    again = await next_engine(fake)
    await until(worker.ready)
    engine.close()
    for value, alone in ((1, False), (2, True)):
        asked = await again.asked()
        assert (asked.x[0, 0], asked.alone) == (value, alone)
        again.respond(asked.id, asked.x)
    await again.flush()
    assert [first(response) for response in await asyncio.gather(queued, aboard)] == [1, 2]
    assert_idle(worker)


async def test_a_question_keeps_a_draining_engine(remote: Remote, fake: Fake) -> None:
    """Until it is answered, as a request does."""
    worker, engine = await meet(remote, fake)
    question = asyncio.create_task(worker.index())
    frame = await engine.next(frames.CALL)
    engine.write(frames.DRAIN)
    engine.write(frames.REPLY, frame[3], meta=b'[{"name":"m"}]')
    await engine.flush()
    assert await question == [{"name": "m"}]
    await engine.rest()


# Questions.


def question(frame: Frame) -> dict[str, Any]:
    said: dict[str, Any] = orjson.loads(frame[4][frame[5] : frame[6]])
    return said


async def test_questions(remote: Remote, fake: Fake) -> None:
    """Each method asks with its arguments; files go behind the JSON, in their order."""
    worker, engine = await meet(remote, fake)
    asking: list[tuple[Callable[[], Awaitable[Any]], dict[str, Any], Any]] = [
        (lambda: worker.model_ready("m", "1"), {"method": "model_ready", "arguments": {"model": "m", "version": "1"}},
         True),
        (lambda: worker.config("m"), {"method": "config", "arguments": {"model": "m", "version": ""}}, {"name": "m"}),
        (lambda: worker.metrics(), {"method": "metrics", "arguments": {}}, "# HELP"),
        (lambda: worker.log({"log_info": False}), {"method": "log", "arguments": {"changes": {"log_info": False}}}, {}),
        (lambda: worker.unload("m", True), {"method": "unload", "arguments": {"model": "m", "dependents": True}}, None),
        (lambda: worker.load("m", "{}", {"a": b"1", "b": b"", "c": b"23"}),
         {"method": "load", "arguments": {"model": "m", "config": "{}"}, "files": [["a", 1], ["b", 0], ["c", 2]]},
         None),
    ]  # fmt: skip
    for method, expected, reply in asking:
        task = asyncio.ensure_future(method())
        frame = await engine.next(frames.CALL)
        assert question(frame) == expected
        assert frame[4][frame[6] : frame[7]] == (b"123" if "files" in expected else b"")
        engine.write(frames.REPLY, frame[3], meta=orjson.dumps(reply))
        await engine.flush()
        assert await task == reply
    assert worker._calls == {}


async def test_questions_that_fail(remote: Remote, fake: Fake) -> None:
    """With what the engine raised; or because it is gone: they are not asked again, since they may change something."""
    worker, engine = await meet(remote, fake)
    task = asyncio.create_task(worker.load("m"))
    engine.fail((await engine.next(frames.CALL))[3], LoadFailed("it is broken"))
    await engine.flush()
    with pytest.raises(LoadFailed, match="it is broken"):
        await task
    task = asyncio.create_task(worker.load("m"))
    await engine.next(frames.CALL)
    engine.close()
    with pytest.raises(NotReady, match="the engine ended before it answered"):
        await task
    with pytest.raises(NotReady, match="the engine is not there"):
        await worker.index()
    assert worker._calls == {}


async def test_a_question_whose_caller_left(remote: Remote, fake: Fake) -> None:
    """Its answer is dropped, an error too, and nobody else is harmed."""
    worker, engine = await meet(remote, fake)
    (other,) = await ask(worker, request())
    for error in (False, True):
        task = asyncio.create_task(worker.load("m"))
        frame = await engine.next(frames.CALL)
        task.cancel()
        await settle()
        if error:
            engine.fail(frame[3], LoadFailed("x"))
        else:
            engine.write(frames.REPLY, frame[3], meta=b"null")
        await engine.flush()
    await until(lambda: worker._calls == {})
    assert not other.done()
    assert worker.ready()


async def test_a_reply_that_is_none(remote: Remote, fake: Fake) -> None:
    """Ends the connection, and whoever asked is told that there was no answer."""
    worker, engine = await meet(remote, fake)
    task = asyncio.create_task(worker.index())
    engine.write(frames.REPLY, (await engine.next(frames.CALL))[3], meta=b"{")
    await engine.flush()
    with pytest.raises(NotReady):
        await task
    await engine.rest()


async def test_files_that_no_frame_has_room_for(remote: Remote, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are refused here."""
    worker, _ = await meet(remote, fake)
    monkeypatch.setattr(frames, "MAX_FRAME", 100)
    with pytest.raises(TooLarge, match="files of 51 bytes, at most 50 are taken"):
        await worker.load("m", "{}", {"a": bytes(51)})
    assert worker._calls == {}


# Streams.

STREAMS = {1: metadata(decoupled=True)}


async def test_a_stream(remote: Remote, fake: Fake) -> None:
    """Responses come as they are sent, and end when the engine says so; of another model there is one."""
    worker, engine = await meet(remote, fake, {1: metadata(decoupled=True), 2: metadata("one")})
    stream = worker.stream(request())
    pulled = asyncio.ensure_future(anext(stream))
    asked = await engine.asked()
    for value in (1, 2):
        engine.respond(asked.id, x(value))
    await engine.flush()
    assert first(await pulled) == 1
    assert first(await anext(stream)) == 2
    engine.write(frames.END, asked.id)
    await engine.flush()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert_idle(worker)
    pulled = asyncio.ensure_future(anext(worker.stream(InferRequest("one", "", {"x": x()}))))
    asked = await engine.asked()
    engine.respond(asked.id, x(7))
    await engine.flush()
    assert first(await pulled) == 7


async def test_a_stream_that_fails(remote: Remote, fake: Fake) -> None:
    """After what it gave."""
    worker, engine = await meet(remote, fake, STREAMS)
    stream = worker.stream(request())
    pulled = asyncio.ensure_future(anext(stream))
    asked = await engine.asked()
    engine.respond(asked.id, x())
    engine.fail(asked.id, ModelError("no more"))
    await engine.flush()
    await pulled
    with pytest.raises(ModelError, match="no more"):
        await anext(stream)
    assert_idle(worker)


async def test_a_stream_that_began_is_not_sent_again(remote: Remote, fake: Fake) -> None:
    """One that has given nothing yet is."""
    worker, engine = await meet(remote, fake, STREAMS)
    began, waits = worker.stream(request(1)), worker.stream(request(2))
    one, other = asyncio.ensure_future(anext(began)), asyncio.ensure_future(anext(waits))
    engine.respond((await engine.asked()).id, x())
    await engine.asked()
    await engine.flush()
    await one
    engine.close()
    with pytest.raises(NotReady, match="some of its responses have been given: it may have been done"):
        await anext(began)
    again = await next_engine(fake, STREAMS)
    asked = await again.asked()
    assert asked.x[0, 0] == 2
    again.respond(asked.id, x(3))
    again.write(frames.END, asked.id)
    await again.flush()
    assert first(await other) == 3
    with pytest.raises(StopAsyncIteration):
        await anext(waits)
    assert_idle(worker)


async def test_a_stream_whose_caller_leaves(remote: Remote, fake: Fake) -> None:
    """The engine is told, and what still comes is dropped."""
    worker, engine = await meet(remote, fake, STREAMS)
    stream = worker.stream(request())
    pulled = asyncio.ensure_future(anext(stream))
    asked = await engine.asked()
    engine.respond(asked.id, x())
    await engine.flush()
    await pulled
    await stream.aclose()
    assert (await engine.next(frames.CANCEL))[3] == asked.id
    engine.respond(asked.id, x())
    engine.write(frames.END, asked.id)
    await engine.flush()
    await until(lambda: not worker._pending)
    assert_idle(worker)


@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
async def test_a_stream_that_is_read_too_slowly(remote: Remote, fake: Fake, datatype: str) -> None:
    """What nobody has read is bounded in bytes, those of strings too: it ends with an error, and the engine is told."""
    model = metadata(decoupled=True, outputs={"y": TensorSpec("y", datatype, (-1,))})
    worker, engine = await meet(remote, fake, {1: model}, queue_bytes=20_000)
    stream = worker.stream(request())
    pulled = asyncio.ensure_future(anext(stream))
    asked = await engine.asked()
    large = np.ones(1000, "<f4") if datatype == "FP32" else np.array([b"x" * 4000], object)
    for _ in range(8):
        engine.respond(asked.id, large)
    await engine.flush()
    assert (await engine.next(frames.CANCEL))[3] == asked.id
    with pytest.raises(TooSlow, match="MILLRACE_QUEUE_BYTES"):
        await pulled
    engine.write(frames.END, asked.id)
    await engine.flush()
    await until(lambda: not worker._pending)
    assert_idle(worker)


async def test_a_stream_of_a_copy_that_is_stale(remote: Remote, fake: Fake) -> None:
    """Begins anew with the one that is served."""
    worker, engine = await meet(remote, fake, STREAMS)
    pulled = asyncio.ensure_future(anext(worker.stream(request())))
    asked = await engine.asked()
    engine.write(frames.CATALOGUE, 2, meta=catalogue({2: metadata(decoupled=True)}))
    engine.write(frames.STALE, asked.id)
    await engine.flush()
    again = await engine.asked()
    assert again.number == 2
    engine.respond(again.id, x(6))
    await engine.flush()
    assert first(await pulled) == 6


# The engine's memory.


async def test_what_is_held_stays_as_it_is(remote: Remote, serve: Serve, tmp_path: Path) -> None:
    """An answer in shared memory is not written over while anybody has it, whatever comes; then it is given back."""
    add_model(tmp_path, "m", LARGE)
    started, _ = await serve(m=double)
    worker = await remote()

    async def infer(value: float) -> InferResponse:
        return await worker.infer(InferRequest("m", "", {"x": np.full((1, 8192), value, "<f4")}))

    held = [await infer(value) for value in range(8)]
    for value in range(100, 200):
        assert first(await infer(value)) == 2 * value
    for value, response in enumerate(held):
        assert (response.outputs["y"] == 2 * value).all()
        assert not response.outputs["y"].flags.writeable
    part = held[3].outputs["y"][:, 4000:4001].T
    del held, response

    await until(lambda: used(started) == 32768)
    assert part[0, 0] == 6
    del part
    await until(lambda: used(started) == 0)
    assert_idle(worker)


async def test_what_is_let_go_of_in_another_thread(remote: Remote, serve: Serve, tmp_path: Path) -> None:
    """Is given back all the same."""
    add_model(tmp_path, "m", LARGE)
    started, _ = await serve(m=double)
    worker = await remote()
    held = [await worker.infer(InferRequest("m", "", {"x": np.ones((1, 8192), "<f4")})) for _ in range(16)]
    threads = [threading.Thread(target=held[number::4].clear) for number in range(4)]
    keep = [held[number::4] for number in range(4)]
    held.clear()
    threads = [threading.Thread(target=part.clear) for part in keep]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    await until(lambda: used(started) == 0)


async def test_an_answer_that_outlives_its_engine(remote: Remote, serve: Serve, tmp_path: Path) -> None:
    """Can still be read; letting go of it then is nothing."""
    add_model(tmp_path, "m", LARGE)
    started, _ = await serve(m=double)
    worker = await remote()
    response = await worker.infer(InferRequest("m", "", {"x": np.full((1, 8192), 3, "<f4")}))
    await started.stop()
    await until(lambda: not worker.ready())
    assert (response.outputs["y"] == 6).all()
    del response
    gc.collect()
    await settle()


async def test_a_response_larger_than_the_engines_memory(remote: Remote, serve: Serve, tmp_path: Path) -> None:
    """Arrives; and so do many at once that have no room together."""
    add_model(tmp_path, "m", CONFIG.replace("dims: [ 4 ]", "dims: [ 100000 ]"))
    started, _ = await serve(m=double)
    worker = await remote(arena_bytes=16 << 20)
    big = InferRequest("m", "", {"x": np.arange(400_000, dtype="<f4").reshape(4, 100_000)})
    assert np.array_equal((await worker.infer(big)).outputs["y"], 2 * big.inputs["x"])
    many = [InferRequest("m", "", {"x": np.full((1, 100_000), value, "<f4")}) for value in range(8)]
    responses = await asyncio.gather(*map(worker.infer, many))
    assert [first(response) for response in responses] == [2 * value for value in range(8)]
    assert all((response.outputs["y"] == response.outputs["y"][0, 0]).all() for response in responses)
    del responses
    await until(lambda: used(started) == 0)
    assert_idle(worker)


# With a real engine.


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("datatype", DATATYPES)
async def test_every_datatype(remote: Remote, serve: Serve, tmp_path: Path, datatype: str, rows: int) -> None:
    """To the model and back, small and large, side by side."""
    kind = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    add_model(tmp_path, "m", CONFIG.replace("TYPE_FP32", kind).replace("dims: [ 4 ]", "dims: [ -1 ]"))
    started, _ = await serve(m=lambda inputs: {"y": inputs["x"]})
    worker = await remote(arena_bytes=8 << 20)
    for size in (1, 7, 30_000):
        numbers = np.arange(rows * size) % 2
        if datatype == "BYTES":
            array = np.array([b"\xff\0" * int(number) for number in numbers], object).reshape(rows, size)
        else:
            array = numbers.astype(DATATYPES[datatype]).reshape(rows, size)
        got = (await worker.infer(InferRequest("m", "", {"x": array}))).outputs["y"]
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert np.array_equal(got, array)
        del got
    assert ml_dtypes.bfloat16 in [dtype.type for dtype in DATATYPES.values()]
    await until(lambda: used(started) == 0)
    assert_idle(worker)


async def test_inputs_of_any_layout(remote: Remote, serve: Serve, tmp_path: Path) -> None:
    """Small and large ones whose elements do not lie one behind the other."""
    add_model(tmp_path, "m", CONFIG.replace("dims: [ 4 ]", "dims: [ -1 ]"))
    await serve(m=double)
    worker = await remote()
    for size in (4, 9000):
        wide = np.arange(2 * size * 3, dtype="<f4").reshape(size * 2, 3)
        for array in (wide.T, wide.T[:, ::2], wide.T[::-1]):
            got = (await worker.infer(InferRequest("m", "", {"x": array}))).outputs["y"]
            assert np.array_equal(got, 2 * array)


async def test_what_the_engine_raises(remote: Remote, serve: Serve) -> None:
    """Is raised in the worker, with its class and its text, for the request that is guilty alone."""

    def behaviour(inputs: Any) -> dict[str, Array]:
        if (inputs["x"] == 13).any():
            raise ValueError("unlucky")
        return double(inputs)

    started, _ = await serve(m=behaviour)
    worker = await remote()
    tasks = await ask(worker, *(request(value) for value in (1, 13, 2)))
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(done[1], ModelError)
    assert "unlucky" in str(done[1])
    assert [first(each) for each in (done[0], done[2]) if isinstance(each, InferResponse)] == [2, 4]
    assert started._connections
    assert_idle(worker)


async def test_the_same_answers_as_the_engines_own(remote: Remote, serve: Serve) -> None:
    """Of every question, whichever worker is asked."""
    _, engine = await serve({"model_control": "explicit", "load_models": "*"}, m=double)
    one, other = await remote(), await remote()
    await one.infer(request())
    for worker in (one, other):
        assert worker.metadata("m") == engine.metadata("m")
        assert worker.metadata("m", "1") == engine.metadata("m", "1")
        assert await worker.config("m") == orjson.loads(orjson.dumps(await engine.config("m")))
        assert await worker.statistics() == orjson.loads(orjson.dumps(await engine.statistics()))
        assert await worker.index() == await engine.index()
        assert (await worker.batching("m"))["model"] == (await engine.batching("m"))["model"]
        assert await worker.model_ready("m")
        assert (await worker.trace("m")) == orjson.loads(orjson.dumps(await engine.trace("m")))
        assert (await worker.log()) == orjson.loads(orjson.dumps(await engine.log()))
        assert 'nv_inference_request_success{model="m",version="1"} 1' in await worker.metrics()


async def test_what_one_worker_changes_all_know_at_once(remote: Remote, serve: Serve) -> None:
    """As soon as the one that asked is answered: load, unload, and what a load that failed leaves behind."""
    await serve({"model_control": "explicit", "load_models": "*"}, m=double, n=double)
    one, other = await remote(), await remote()
    for _ in range(5):
        await one.unload("m")
        with pytest.raises(NotFound):
            other.metadata("m")
        with pytest.raises(NotFound):
            await other.infer(request())
        await other.load("m")
        assert one.metadata("m").name == "m"
        assert first(await one.infer(request(4))) == 8
    with pytest.raises(LoadFailed):
        await one.load("nobody")


async def test_a_model_is_loaded_again_under_load(remote: Remote, serve: Serve) -> None:
    """Requests of two workers go on meanwhile, and not one fails."""
    _, engine = await serve({"model_control": "explicit", "load_models": "*"}, m=double)
    workers = [await remote(), await remote()]
    stopped, count = False, 0

    async def load(worker: RemoteEngine) -> None:
        nonlocal count
        while not stopped:
            values = [random.Random(count).random() * 1000 for _ in range(8)]
            responses = await asyncio.gather(*(worker.infer(request(value)) for value in values))
            assert [first(each) for each in responses] == [2 * float(np.float32(value)) for value in values]
            count += len(values)

    running = [asyncio.create_task(load(worker)) for worker in workers]
    config = orjson.dumps(await engine.config("m")).decode()
    numbers = set()
    for _ in range(15):
        await workers[0].load("m", config)
        numbers.add(engine.copies()[0].number)
        await asyncio.sleep(0.02)
    stopped = True
    await asyncio.gather(*running)
    assert len(numbers) == 15
    assert count > 100
    for worker in workers:
        assert_idle(worker)


async def test_an_engine_is_replaced_under_load(remote: Remote, serve: Serve, path: Path) -> None:
    """By one that takes its path over, again and again: every request is answered, once, and rightly."""
    started, _ = await serve(m=double)
    worker = await remote()
    stopped, count = False, 0

    async def load() -> None:
        nonlocal count
        while not stopped:
            assert first(await worker.infer(request(count))) == 2 * count
            count += 1
            await asyncio.sleep(0)

    running = [asyncio.create_task(load())]
    for _ in range(4):
        before = count
        successor, _ = await serve(takeover=True)
        await started.drain()
        await started.stop()
        started = successor
        await until(lambda before=before: count > before + 5)  # type: ignore[misc]
    stopped = True
    await asyncio.gather(*running)
    assert_idle(worker)


def kill(server: Server) -> None:
    """What the end of its process does to an engine's connections, and to its path: nothing is tidied up."""
    assert server._listener is not None
    server._tasks[0].cancel()
    server._listener.close()
    server._listener = None
    for connection in list(server._connections):
        connection.abort()


async def test_an_engine_is_killed_under_a_batch(remote: Remote, serve: Serve) -> None:
    """What was in the batch is run by the next engine, each alone; what was queued is run together."""
    gate, second = Gate(), Gate()
    started, engine = await serve(m=lambda inputs: second(inputs) if (inputs["x"] == 1).any() else gate(inputs))
    worker = await remote()
    gate.open.clear()
    second.open.clear()
    (leader,) = await ask(worker, request(0))
    await until(lambda: len(Scripted.calls) == 1)
    aboard = await ask(worker, request(1), request(2))
    await until(lambda: next(iter(started._connections)).busy == 3)
    gate.open.set()
    await leader
    await until(lambda: len(Scripted.calls) == 2)
    queued = await ask(worker, request(3), request(4), request(5))
    await until(lambda: next(iter(started._connections)).busy == 5)
    kill(started)
    await until(lambda: not worker.ready())
    second.open.set()
    await until(lambda: engine.copies()[0].active == 0)
    await serve(m=double)  # and a clean record
    responses = await asyncio.gather(*aboard, *queued)
    assert [first(each) for each in responses] == [2, 4, 6, 8, 10]
    shapes = sorted(shape for _, shape in Scripted.calls)
    assert shapes[:2] == [(1, 4), (1, 4)]
    assert sum(rows for rows, _ in shapes) == 5
    assert shapes[2:] in ([(3, 4)], [(1, 4), (2, 4)])
    assert_idle(worker)


async def test_models_that_are_given_requests(
    remote: Remote, serve: Serve, instance: type[Instance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Get what the client said, and their answers come with what they say besides; arrays they keep stay theirs."""
    add_instance(tmp_path, "m", GIVEN)
    kept: list[Any] = []

    def behaviour(calls: Any) -> list[Any]:
        kept.extend(calls)
        return [
            InferResponse("m", "1", {"y": call.request.inputs["x"] * np.float32(3)}, {"said": call.request.id})
            for call in calls
        ]

    monkeypatch.setattr(instance, "behaviour", staticmethod(behaviour))
    started, _ = await serve()
    worker = await remote()
    large = np.arange(9000, dtype="<f4")[None]
    response = await worker.infer(
        InferRequest("m", "", {"x": large, "s": np.array([[b"t"]], object)}, ("y",), "r", parameters={"n": 1})
    )
    assert response.parameters == {"said": "r"}
    assert np.array_equal(response.outputs["y"], 3 * large)
    await worker.infer(InferRequest("m", "", {"x": -large}, correlation_id=5, flags=SEQUENCE_START))
    assert np.array_equal(kept[0].request.inputs["x"], large)
    assert kept[0].request.inputs["s"].tolist() == [[b"t"]]
    assert (kept[0].request.outputs, kept[0].request.parameters) == (("y",), {"n": 1})
    assert (kept[1].request.correlation_id, kept[1].request.flags) == (5, SEQUENCE_START)
    del response
    await until(lambda: used(started) == 0)
    assert_idle(worker)


async def test_streams_of_a_model(
    remote: Remote, serve: Serve, instance: type[Instance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All responses, small and large, in their order; a caller who leaves is seen by the model."""
    add_instance(tmp_path, "m", DECOUPLED)
    calls_seen: list[Any] = []

    def behaviour(calls: Any) -> list[None]:
        calls_seen.extend(calls)
        for call in calls:
            count = int(call.request.inputs["x"][0, 0])
            for number in range(count):
                size = 20_000 if number % 3 == 0 else 2
                call.respond(InferResponse("m", "1", {"y": np.full((1, size), number, "<f4")}), False)
            if count < 1000:
                call.respond(None, True)
        return [None] * len(calls)

    monkeypatch.setattr(instance, "behaviour", staticmethod(behaviour))
    started, engine = await serve()
    worker = await remote()

    async def values(count: float) -> list[float]:
        return [
            first(response)
            async for response in worker.stream(InferRequest("m", "", {"x": np.full((1, 4), count, "<f4")}))
        ]

    assert list(await asyncio.gather(values(0), values(1), values(40))) == [[], [0], [*map(float, range(40))]]
    async with contextlib.aclosing(worker.stream(InferRequest("m", "", {"x": np.full((1, 4), 1000, "<f4")}))) as stream:
        assert first(await anext(stream)) == 0
    await until(lambda: calls_seen[-1].cancelled())
    calls_seen[-1].respond(None, True)
    await until(lambda: not worker._pending)
    await until(lambda: engine.copies()[0].active == 0)
    del stream
    await until(lambda: used(started) == 0)
    assert_idle(worker)


OPERATIONS = 1000


@pytest.mark.parametrize("seed", range(2))
async def test_any_operations(
    remote: Remote, serve: Serve, instance: type[Instance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Requests of any size, cancelled or not, errors, streams, reloads: each is answered rightly, nothing is left."""
    chance = random.Random(seed)
    add_model(tmp_path, "m", CONFIG.replace("dims: [ 4 ]", "dims: [ -1 ]"))
    add_instance(tmp_path, "d", DECOUPLED)

    def behaviour(inputs: Any) -> dict[str, Array]:
        if (inputs["x"] < 0).any():
            raise ValueError("negative")
        return double(inputs)

    def respond(calls: Any) -> list[None]:
        for call in calls:
            for _ in range(3):
                call.respond(answer(call), False)
            call.respond(None, True)
        return [None] * len(calls)

    monkeypatch.setattr(instance, "behaviour", staticmethod(respond))
    started, engine = await serve({"model_control": "explicit", "load_models": "*"}, m=behaviour)
    workers = [await remote(arena_bytes=4 << 20), await remote(arena_bytes=4 << 20)]
    config = orjson.dumps(await engine.config("m")).decode()
    outcomes: dict[str, int] = {}

    async def infer(worker: RemoteEngine, value: float, size: int) -> None:
        array = np.full((1, size), value, "<f4")
        try:
            got = (await worker.infer(InferRequest("m", "", {"x": array}))).outputs["y"]
        except ModelError:
            assert value < 0
        except QueueFull:
            outcomes["full"] = outcomes.get("full", 0) + 1
            return
        else:
            assert value >= 0
            assert got.shape == (1, size)
            assert (got == 2 * np.float32(value)).all()
        outcomes["answered"] = outcomes.get("answered", 0) + 1

    async def stream(worker: RemoteEngine, value: float, size: int, most: int) -> None:
        found = 0
        source = worker.stream(InferRequest("d", "", {"x": np.full((1, size), value, "<f4")}))
        async with contextlib.aclosing(source) as responses:
            async for response in responses:
                assert (response.outputs["y"] == 2 * np.float32(value)).all()
                found += 1
                if found == most:
                    break
        assert found == min(most, 3)
        outcomes["streamed"] = outcomes.get("streamed", 0) + 1

    tasks: list[asyncio.Task[None]] = []
    for number in range(OPERATIONS):
        worker = chance.choice(workers)
        size = chance.choice([1, 4, 100, 5000, 30_000])
        value = number if chance.random() < 0.9 else -1 - number
        what = chance.random()
        if what < 0.8:
            tasks.append(asyncio.create_task(infer(worker, value, size)))
        else:
            with contextlib.suppress(QueueFull):
                tasks.append(asyncio.create_task(stream(worker, number, size, chance.randint(1, 4))))
        if chance.random() < 0.1:
            chance.choice(tasks).cancel()
        if number % 200 == 100:
            tasks.append(asyncio.create_task(worker.load("m", config)))
        if chance.random() < 0.2:
            await asyncio.sleep(chance.choice([0, 0, 0.002]))
    done = await asyncio.gather(*tasks, return_exceptions=True)
    wrong = [each for each in done if each is not None and not isinstance(each, asyncio.CancelledError | QueueFull)]
    assert wrong == []
    assert min(outcomes["answered"], 5 * outcomes["streamed"]) > OPERATIONS / 3
    del done, tasks
    await until(lambda: not any(worker._pending for worker in workers))
    for worker in workers:
        assert_idle(worker)
    await until(lambda: used(started) == 0)
    await until(lambda: all(copy.active == 0 for copy in engine.copies()))
    assert all(connection.busy == 0 for connection in started._connections)


async def test_who_asks_without_a_coroutine_is_sent_the_long_way(remote: Remote, fake: Fake) -> None:
    """A request may have to be sent again, to the next engine: nobody is taken in whom `infer` would not look after."""
    worker, _ = await meet(remote, fake)
    answer = asyncio.get_running_loop().create_future()
    assert worker.ask("m", "", object(), {"x": x(1)}, answer) is None  # type: ignore[func-returns-value]
    assert not answer.done()
    assert_idle(worker)
