"""Server: what workers may say to it, what comes back, and that no worker's end is another one's business."""

import asyncio
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from batching.errors import QueueFull
from engine.errors import Cancelled, ConfigError, LoadFailed, ModelError, NotFound, TooLarge
from engine.ipc import frames, server
from engine.ipc.arena import Arena
from engine.ipc.client import ask_status
from engine.ipc.frames import Reader, Writer
from engine.ipc.server import SLOTS, Connection, Server
from engine.types import Array, InferResponse
from tests.engine.test_calls import DECOUPLED, Instance, answer
from tests.scripted import CONFIG, Gate, Scripted, add_model, double
from tests.timing import settle, until

from .conftest import Connect, Serve, add_instance
from .peers import PATIENCE, Worker, descriptors, x

LARGE = CONFIG.replace("dims: [ 4 ]", "dims: [ 8192 ]")  # 32 KiB of FP32 for each row: more than travels inline


def connections(of: Server) -> list[Connection]:
    return sorted(of._connections, key=lambda connection: connection.since)


def used(of: Server) -> int:
    """Bytes of shared memory that answers are in."""
    return sum(connection._allocator.used for connection in of._connections)


async def arrays_of(worker: Worker) -> list[list[float]]:
    """The values of the next answer's first output."""
    _, got = await worker.answer()
    assert isinstance(got, list), got
    return [list(map(float, row)) for row in got[0]]


# Requests and answers.


async def test_workers_share_one_queue(serve: Serve, connect: Connect) -> None:
    """Requests of two workers run in one batch, and each gets its own answer, under its own id."""
    gate = Gate()
    await serve(m=gate)
    one, other = await connect(), await connect()
    gate.open.clear()
    one.ask(1 << 16, x(1))
    await one.flush()
    await until(lambda: bool(Scripted.calls))
    one.ask(2 << 16, x(2))
    other.ask(2 << 16, x(3))
    await one.flush()
    await other.flush()
    await asyncio.sleep(0.05)
    gate.open.set()
    assert await arrays_of(one) == [[2] * 4]
    about, got = await one.answer()
    assert (about, await arrays_of(other)) == (2 << 16, [[6] * 4])
    assert isinstance(got, list)
    assert got[0].tolist() == [[4] * 4]
    assert Scripted.calls == [("m", (1, 4)), ("m", (2, 4))]


async def test_the_board_says_what_is_aboard(serve: Serve, connect: Connect) -> None:
    """The byte of a request is set when its batch is about to run, and not while it is queued."""
    gate = Gate()
    await serve(m=gate)
    worker = await connect()
    gate.open.clear()
    worker.ask(1 << 16 | 5, x())
    await worker.flush()
    await until(lambda: bool(Scripted.calls))
    worker.ask(2 << 16 | 7, x())
    worker.write(frames.CALL, 3 << 16, 0, orjson.dumps({"method": "metrics"}))
    await worker.flush()
    await worker.next(frames.REPLY)
    board = worker.own.view(0, SLOTS)
    assert (board[5], board[7]) == (1, 0)
    gate.open.set()
    await worker.answer()
    await worker.answer()
    assert (board[5], board[6], board[7]) == (1, 0, 1)


async def test_one_that_wants_to_be_alone_is(serve: Serve, connect: Connect) -> None:
    """In a batch of its own, between two that share theirs."""
    gate = Gate()
    await serve(m=gate)
    worker = await connect()
    gate.open.clear()
    worker.ask(1 << 16, x())
    await worker.flush()
    await until(lambda: bool(Scripted.calls))
    for number, flags in ((2, 0), (3, frames.ALONE), (4, 0)):
        worker.ask(number << 16, x(number), flags=flags)
    await worker.flush()
    await asyncio.sleep(0.05)
    gate.open.set()
    answers = {(await worker.answer())[0] for _ in range(4)}
    assert answers == {number << 16 for number in (1, 2, 3, 4)}
    assert sorted(Scripted.calls) == [("m", (1, 4)), ("m", (1, 4)), ("m", (2, 4))]


async def test_a_copy_that_is_not_served_is_stale(serve: Serve, connect: Connect) -> None:
    """A request that names one is told so, and not run; the connection goes on."""
    await serve(m=double)
    worker = await connect()
    worker.ask(1 << 16, x(), number=worker.number + 1000)
    worker.ask(2 << 16, x())
    await worker.flush()
    assert (await worker.next(frames.STALE))[3] == 1 << 16
    assert (await worker.answer())[0] == 2 << 16
    assert Scripted.calls == [("m", (1, 4))]


async def test_requests_that_the_queue_refuses(serve: Serve, connect: Connect) -> None:
    """They get its error, and leave nothing behind: rows that no batch has, and what is over the queue's bounds."""
    started, engine = await serve({"queue_bytes": 40}, m=double)
    worker = await connect()
    worker.ask(1 << 16, x(), rows=0)
    worker.ask(2 << 16, x(rows=3))
    worker.ask(3 << 16, x())
    await worker.flush()
    assert isinstance((await worker.answer())[1], RuntimeError)
    assert isinstance((await worker.answer())[1], TooLarge)
    assert await arrays_of(worker) == [[2] * 4]
    assert connections(started)[0].busy == 0
    assert engine.copies()[0].active == 0


async def test_a_queue_without_any_room_says_so(serve: Serve, connect: Connect) -> None:
    """With its refusals, until there is some; what a worker refused itself for that counts here."""
    gate = Gate()
    started, engine = await serve({"queue_rows": 32}, m=gate)
    worker = await connect()
    gate.open.clear()
    worker.ask(1 << 16, x())
    await worker.flush()
    await until(lambda: engine.copies()[0].batcher.pending.rows == 0 and engine.copies()[0].active == 1)
    worker.ask(2 << 16, x(rows=31))
    worker.ask(3 << 16, x(rows=2))
    worker.ask(4 << 16, x())
    worker.ask(5 << 16, x())
    await worker.flush()
    refused = [await worker.next(frames.ERROR) for _ in range(2)]
    assert [(frame[3] >> 16, frame[1], type(frames.read_error(frame))) for frame in refused] == [
        (3, 0, QueueFull), (5, frames.FULL, QueueFull),
    ]  # fmt: skip
    worker.write(frames.REFUSED, worker.number, 3)
    await worker.flush()
    await until(lambda: engine.copies()[0].batcher.journal.refused == {"QueueFull": 5})
    gate.open.set()
    assert len([await worker.answer() for _ in range(3)]) == 3
    assert connections(started)[0].busy == 0


async def test_answers_that_do_not_look_alike(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """Of two models, and of other shapes, in one turn: each has its own, in frames of their own."""
    any_size = CONFIG.replace("dims: [ 4 ]", "dims: [ -1 ]")
    add_model(tmp_path, "a", any_size)
    add_model(tmp_path, "b", any_size)
    started, _ = await serve(a=double, b=lambda inputs: {"y": inputs["x"] * 3})
    worker = await connect()
    numbers = {entry["metadata"]["name"]: entry["number"] for entry in worker.catalogue["copies"]}
    expected: dict[int, list[float]] = {}
    for place in range(12):
        name, size = "ab"[place % 2], 1 + place % 3
        about = (place + 1) << 16
        worker.ask(about, np.full((1, size), place, "<f4"), number=numbers[name])
        expected[about] = [place * (2 if name == "a" else 3)] * size
    await worker.flush()
    answers = dict([await worker.answer() for _ in expected])
    got = {about: arrays[0][0].tolist() for about, arrays in answers.items() if isinstance(arrays, list)}
    assert got == expected
    assert connections(started)[0].busy == 0


async def test_an_engine_that_is_lost_refuses_nobody(serve: Serve, connect: Connect) -> None:
    """Its process is about to end, and the next one may do better: workers keep what they have no answer to."""
    _, engine = await serve({"queue_bytes": 40}, m=double)
    worker = await connect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "lost", lambda: "the device is gone")
        worker.ask(1 << 16, x(rows=3))  # too large for the queue
        await worker.flush()
        await settle()
    worker.ask(2 << 16, x(rows=3))
    await worker.flush()
    assert (await worker.answer())[0] == 2 << 16


ORDERED = CONFIG.replace("dynamic_batching { }", "dynamic_batching { preserve_ordering: true }") + (
    "instance_group [ { count: 2 kind: KIND_CPU } ]"
)


@pytest.mark.parametrize("what", ["cancels", "dies"])
async def test_a_caller_who_leaves_while_its_answer_waits_for_its_turn(
    serve: Serve, connect: Connect, tmp_path: Path, what: str
) -> None:
    """Where answers keep the order of their requests, one that is there may have to wait; its caller need not."""
    gate = Gate()

    def behaviour(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return gate(inputs) if (inputs["x"] == 1).any() else double(inputs)

    add_model(tmp_path, "m", ORDERED)
    started, engine = await serve(m=behaviour)
    worker = await connect()
    gate.open.clear()
    (copy,) = engine.copies()
    worker.ask(1 << 16, x(1))
    await worker.flush()
    await until(lambda: len(copy.batcher._flights) == 1)
    worker.ask(2 << 16, x(2))
    await worker.flush()
    await until(lambda: len(copy.batcher._held) == 1)
    if what == "cancels":
        worker.write(frames.CANCEL, 2 << 16)
        await worker.flush()
        about, error = await worker.answer()
        assert (about, type(error)) == (2 << 16, Cancelled)
        gate.open.set()
        assert await arrays_of(worker) == [[2] * 4]
    else:
        worker.close()
        await until(lambda: not connections(started))
        gate.open.set()
    await until(lambda: copy.active == 0)
    assert [connection.busy for connection in connections(started)] in ([], [0])


async def test_a_child_that_a_model_forks_keeps_nothing_open(serve: Serve, connect: Connect) -> None:
    """Else nobody would see this process end. Here everything goes on."""
    started, _ = await serve(m=double)
    worker = await connect()
    assert started._listener is not None
    (connection,) = connections(started)
    assert connection._transport is not None
    ours = [started._listener.fileno(), connection._transport.get_extra_info("socket").fileno()]
    child = os.fork()
    if not child:
        os._exit(sum(os.path.exists(f"/proc/self/fd/{descriptor}") for descriptor in ours))
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert status == 0
    worker.ask(1 << 16, x())
    await worker.flush()
    assert await arrays_of(worker) == [[2] * 4]


async def test_requests_for_many(serve: Serve, connect: Connect) -> None:
    """In one frame, each is a request: it is answered, fails and is cancelled for itself; twice the same is refused."""

    def behaviour(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if (inputs["x"] < 0).any():
            raise ValueError("negative")
        return double(inputs)

    started, engine = await serve(m=behaviour)
    worker, twice = await connect(), await connect()
    ids = [number << 16 for number in range(1, 6)]
    for each, of in ((worker, ids), (twice, [ids[0], ids[0], *ids[2:]])):
        each.ask_many(of, [x(value) for value in (1, 2, -3, 4, 5)])
        await each.flush()
    answers = dict([await worker.answer() for _ in ids])
    assert isinstance(answers.pop(ids[2]), ModelError)
    assert {about: float(arrays[0][0, 0]) for about, arrays in answers.items() if isinstance(arrays, list)} == {
        ids[0]: 2, ids[1]: 4, ids[3]: 8, ids[4]: 10,
    }  # fmt: skip
    assert [frame for frame in await twice.rest() if frame[0] in (frames.RESPONSE, frames.ERROR)] == []
    await until(lambda: engine.copies()[0].active == 0)
    assert [connection.busy for connection in connections(started)] == [0]


async def test_what_only_the_log_may_say(serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """An error that clients are not told of is in the engine's log, whatever class it has."""

    def wrong(inputs: Any) -> dict[str, Array]:
        raise AssertionError

    _, engine = await serve(m=double)
    worker = await connect()
    for error in (RuntimeError("secret 1"), KeyError("secret 2")):
        copy: Any = engine.copies()[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copy.model, "run", _raising(error))
            worker.ask(1 << 16, x())
            await worker.flush()
            assert str((await worker.answer())[1]) == "the engine's log says more"
        assert str(error) in caplog.text


def _raising(error: Exception) -> Callable[..., Any]:
    async def run(*arguments: object) -> None:
        raise error

    return run


async def test_an_output_that_cannot_be_sent(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """Its request fails, those in the same batch do not matter, and no memory stays taken."""
    add_model(tmp_path, "m", LARGE)
    wrong = False

    def behaviour(inputs: Any) -> dict[str, Array]:
        outputs = {"y": inputs["x"] * 2}
        return {**outputs, "z": inputs["x"].astype("c8")} if wrong else outputs

    started, _ = await serve(m=behaviour)
    worker = await connect()
    wrong = True
    worker.ask(1 << 16, np.ones((1, 8192), "<f4"))
    await worker.flush()
    assert isinstance((await worker.answer())[1], RuntimeError)
    assert used(started) == 0
    wrong = False
    worker.ask(2 << 16, np.ones((1, 8192), "<f4"))
    await worker.flush()
    assert (await worker.answer())[0] == 2 << 16


async def test_outputs_of_one_shape_in_another_order(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """Are told apart by their names, however the model orders them."""
    add_model(tmp_path, "m", CONFIG + 'output [ { name: "z" data_type: TYPE_FP32 dims: [ 4 ] } ]')

    def behaviour(inputs: Any) -> dict[str, Array]:
        outputs = [("y", inputs["x"] * 2), ("z", inputs["x"] * 3)]
        return dict(reversed(outputs) if len(Scripted.calls) > 1 else outputs)

    await serve(m=behaviour)
    worker = await connect()
    for _ in range(2):
        worker.ask(1 << 16, x(1))
        await worker.flush()
        frame = await worker.next(frames.RESPONSE)
        arrays, _ = frames.read_response(frame, worker.memory)
        assert {index: float(array[0, 0]) for index, array in arrays} == {0: 2, 1: 3}


# Memory.


async def test_large_answers_lie_in_shared_memory(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """Until the worker gives them back, and not a byte of them is written meanwhile."""
    add_model(tmp_path, "m", LARGE)
    started, _ = await serve(m=double)
    worker = await connect()
    rows = [np.full((1, 8192), number, "<f4") for number in range(5)]
    held = []
    for number, row in enumerate(rows):
        worker.ask(number << 16, row)
        await worker.flush()
        frame = await worker.next(frames.RESPONSE)
        held.append(frames.read_response(frame, worker.memory)[0][0][1])
        assert frame[7] - frame[6] == 0
    for row, array in zip(rows, held, strict=True):
        assert np.array_equal(array, 2 * row)
    assert used(started) == 5 * 32768
    worker.write(frames.FREE, meta=frames.offsets_meta([32768, 0]))
    worker.write(frames.FREE, meta=frames.offsets_meta([2 * 32768, 4 * 32768, 3 * 32768]))
    await worker.flush()
    await until(lambda: used(started) == 0)


async def test_an_answer_larger_than_shared_memory(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """Travels in the frame, as do all while that is full; nothing waits for memory."""
    add_model(tmp_path, "m", CONFIG.replace("dims: [ 4 ]", "dims: [ 524288 ]").replace("size: 32", "size: 1"))
    started, _ = await serve(m=double)
    worker = await connect(nbytes=4 << 20)
    row = np.arange(524288, dtype="<f4")[None]
    worker.ask(1 << 16, row)
    await worker.flush()
    frame = await worker.next(frames.RESPONSE)
    assert frame[7] - frame[6] == 2 << 20
    assert np.array_equal(frames.read_response(frame, worker.memory)[0][0][1], 2 * row)
    assert used(started) == 0


async def test_an_answer_that_no_frame_can_have(
    serve: Serve, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is an error of its own, and its connection goes on."""
    add_model(tmp_path, "m", CONFIG.replace("dims: [ 4 ]", "dims: [ 524288 ]").replace("size: 32", "size: 1"))
    await serve(m=double)
    worker = await connect(nbytes=4 << 20)
    monkeypatch.setattr(frames, "MAX_FRAME", 1 << 20)
    for number in (1, 2):
        offset = 1 << 16
        worker.own.put(offset, bytes(2 << 20))
        described = frames.describe(0, np.dtype("<f4"), (1, 524288), 2 << 20, offset)
        meta = frames.request_meta(worker.number, 1, float("inf"), 0, 0, described, b"")
        worker.write(frames.INFER, number << 16, 0, meta, tensors=1)
        await worker.flush()
        about, error = await worker.answer()
        assert (about, type(error)) == (number << 16, TooLarge)
        assert "MILLRACE_ARENA_BYTES" in str(error)


# Workers that go.


async def test_what_was_queued_of_a_worker_that_is_gone_is_not_run(serve: Serve, connect: Connect) -> None:
    """What was in a batch is run with it, and its mates in it get their answers."""
    gate = Gate()
    started, engine = await serve(m=gate)
    gone, other = await connect(), await connect()
    gate.open.clear()
    gone.ask(1 << 16, x())
    await gone.flush()
    await until(lambda: bool(Scripted.calls))
    for worker in (gone, other):
        worker.ask(2 << 16, x(rows=2))
    await gone.flush()
    await other.flush()
    await until(lambda: sum(each.busy for each in connections(started)) == 3)
    gone.close()
    await until(lambda: len(connections(started)) == 1)
    gate.open.set()
    assert await arrays_of(other) == [[2] * 4] * 2
    assert Scripted.calls == [("m", (1, 4)), ("m", (2, 4))]
    await until(lambda: engine.copies()[0].active == 0)


async def test_batch_mates_of_a_worker_that_is_gone(serve: Serve, connect: Connect) -> None:
    """A batch that runs is not disturbed by the end of one of those in it."""
    gate, second = Gate(), Gate()
    started, engine = await serve(m=lambda inputs: second(inputs) if (inputs["x"] == 2).any() else gate(inputs))
    gone, other = await connect(), await connect()
    gate.open.clear()
    second.open.clear()
    other.ask(1 << 16, x())
    await other.flush()
    await until(lambda: len(Scripted.calls) == 1)
    for value, worker in ((2, gone), (3, other)):
        worker.ask(2 << 16, x(value))
        await worker.flush()
    await until(lambda: sum(each.busy for each in connections(started)) == 3)
    gate.open.set()
    await other.answer()
    await until(lambda: len(Scripted.calls) == 2)
    gone.close()
    await until(lambda: len(connections(started)) == 1)
    second.open.set()
    assert await arrays_of(other) == [[6] * 4]
    assert Scripted.calls == [("m", (1, 4)), ("m", (2, 4))]
    await until(lambda: engine.copies()[0].active == 0)


async def test_a_cancelled_request_is_answered_once(serve: Serve, connect: Connect) -> None:
    """Queued: at once, and it is not run. In a batch: when that has ended. Unknown: not at all."""
    gate = Gate()
    started, engine = await serve(m=gate)
    worker = await connect()
    gate.open.clear()
    worker.ask(1 << 16, x())
    await worker.flush()
    await until(lambda: bool(Scripted.calls))
    worker.ask(2 << 16, x(rows=2))
    for about in (2 << 16, 1 << 16, 9 << 16):
        worker.write(frames.CANCEL, about)
    await worker.flush()
    assert [(about, type(error)) for about, error in [await worker.answer()]] == [(2 << 16, Cancelled)]
    gate.open.set()
    assert [(about, type(error)) for about, error in [await worker.answer()]] == [(1 << 16, Cancelled)]
    worker.ask(3 << 16, x())
    await worker.flush()
    assert (await worker.answer())[0] == 3 << 16
    assert Scripted.calls == [("m", (1, 4)), ("m", (1, 4))]
    assert (connections(started)[0].busy, engine.copies()[0].active) == (0, 0)


async def test_a_request_that_is_cancelled_before_it_began(
    serve: Serve, connect: Connect, instance: type[Instance], tmp_path: Path
) -> None:
    """One that comes with its cancellation, to a model that is given requests: it is answered all the same."""
    add_instance(tmp_path, "m", DECOUPLED)
    started, engine = await serve()
    worker = await connect()
    for kind, about in ((frames.INFER, 1 << 16), (frames.STREAM, 2 << 16)):
        worker.ask(about, x(), kind=kind)
        worker.write(frames.CANCEL, about)
    await worker.flush()
    answers = [await worker.answer(), await worker.answer()]
    assert [(about, type(error)) for about, error in answers] == [(1 << 16, Cancelled), (2 << 16, Cancelled)]
    assert connections(started)[0].busy == 0
    await until(lambda: engine.copies()[0].active == 0)


# Workers that are wrong.


def damaged(worker: Worker) -> bytes:
    worker.ask(1 << 16, x())
    data = bytearray(worker.writer.take())
    data[30] ^= 1
    return bytes(data)


def cut(worker: Worker) -> bytes:
    worker.ask(1 << 16, x())
    return worker.writer.take()[:-1]


def doubled(worker: Worker) -> bytes:
    worker.write(frames.SEEN, 1)
    return 2 * worker.writer.take()


def left_out(worker: Worker) -> bytes:
    worker.write(frames.SEEN, 1)
    worker.writer.take()
    worker.write(frames.SEEN, 1)
    return worker.writer.take()


def oversized(worker: Worker) -> bytes:
    return struct.pack("<IIIBBHIQ", 0, frames.MAX_FRAME + 1, 0, frames.CALL, 0, 0, 0, 0)


def said(kind: int, id: int = 1 << 16, meta: bytes = b"", **rest: Any) -> Callable[[Worker], bytes]:
    def say(worker: Worker) -> bytes:
        worker.write(kind, id, meta=meta, **rest)
        return worker.writer.take()

    return say


def twice(worker: Worker) -> bytes:
    worker.ask(1 << 16, x())
    worker.ask(1 << 16, x())
    return worker.writer.take()


def another_input(worker: Worker) -> bytes:
    worker.ask(1 << 16, x(), x())
    return worker.writer.take()


def beyond_its_memory(worker: Worker) -> bytes:
    meta = frames.request_meta(
        worker.number, 1, 0, 0, 0, frames.describe(0, np.dtype("<f4"), (1, 4), 16, worker.own.size - 15), b""
    )
    worker.write(frames.INFER, 1 << 16, meta=meta, tensors=1)
    return worker.writer.take()


def json_that_is_none(worker: Worker) -> bytes:
    worker.ask(1 << 16, x(), more=b"{")
    return worker.writer.take()


def json_of_another_kind(worker: Worker) -> bytes:
    worker.ask(1 << 16, x(), more=b"7")
    return worker.writer.take()


WRONG: dict[str, Callable[[Worker], bytes]] = {
    "damaged": damaged,
    "cut": cut,
    "doubled": doubled,
    "left out": left_out,
    "oversized": oversized,
    "no frame at all": lambda worker: b"GET / HTTP/1.1\r\nhost: millrace\r\n\r\n",
    "a second greeting": said(frames.HELLO, meta=b'{"version":1}'),
    "what an engine says": said(frames.BEAT),
    "a kind that there is not": said(99),
    "a request twice": twice,
    "a request without its beginning": said(frames.INFER, meta=b"short"),
    "an input that the model does not have": another_input,
    "a tensor beyond its memory": beyond_its_memory,
    "JSON that is none": json_that_is_none,
    "JSON of another kind": json_of_another_kind,
    "memory that it was not given": said(frames.FREE, meta=frames.offsets_meta([64])),
    "half an offset": said(frames.FREE, meta=b"1234"),
    "a question without JSON": said(frames.CALL),
    "a question whose JSON is a list": said(frames.CALL, meta=b"[]"),
    "a question that there is not": said(frames.CALL, meta=b'{"method":"stop"}'),
    "a question with an argument that there is not": said(frames.CALL, meta=b'{"method":"index","arguments":{"x":1}}'),
    "a question with no arguments": said(frames.CALL, meta=b'{"method":"metrics","arguments":7}'),
    "files that are not there": said(
        frames.CALL, meta=b'{"method":"load","arguments":{"model":"m"},"files":[["x",1]]}'
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
async def test_a_worker_that_is_wrong_loses_its_connection(serve: Serve, connect: Connect, what: str) -> None:
    """And what it has under way; another worker, and what that has in the queue, do not notice."""
    gate = Gate()
    started, engine = await serve(m=gate)
    wrong, right = await connect(), await connect()
    gate.open.clear()
    right.ask(1 << 16, x())
    await right.flush()
    await until(lambda: bool(Scripted.calls))
    right.ask(2 << 16, x(2))
    wrong.ask(7 << 16, x(7))
    await right.flush()
    await wrong.flush()
    await until(lambda: sum(each.busy for each in connections(started)) == 3)
    await wrong.send(WRONG[what](wrong))
    if what == "cut":
        wrong.sock.shutdown(socket.SHUT_WR)
    assert [frame for frame in await wrong.rest() if frame[0] not in (frames.BEAT, frames.CATALOGUE)] == []
    await until(lambda: len(connections(started)) == 1)
    gate.open.set()
    assert (await arrays_of(right), await arrays_of(right)) == ([[2] * 4], [[4] * 4])
    assert Scripted.calls == [("m", (1, 4)), ("m", (1, 4))]
    again = await connect()
    again.ask(1 << 16, x(3))
    await again.flush()
    assert await arrays_of(again) == [[6] * 4]
    await until(lambda: engine.copies()[0].active == 0)


async def test_every_byte_of_a_request_may_be_damaged(serve: Serve, connect: Connect) -> None:
    """In its header and its meta part: the connection ends, and the model never sees it."""
    await serve(m=double)
    pattern = await connect()
    pattern.ask(1 << 16, x())
    length = len(pattern.writer.take()) - 16
    for place in range(length):
        worker = await connect()
        worker.ask(1 << 16, x())
        data = bytearray(worker.writer.take())
        data[place] ^= 0x55
        await worker.send(bytes(data))
        assert [frame[0] for frame in await worker.rest() if frame[0] != frames.BEAT] == [], place
        worker.close()
    assert Scripted.calls == []


async def test_a_request_that_does_not_fit_its_model(serve: Serve, connect: Connect) -> None:
    """A worker would have refused it; whatever becomes of it here, those in the same batch get their own answers."""
    gate = Gate()
    started, _ = await serve(m=gate)
    worker = await connect()
    gate.open.clear()
    worker.ask(1 << 16, x())
    await worker.flush()
    await until(lambda: bool(Scripted.calls))
    worker.ask(2 << 16, x(2))
    worker.ask(3 << 16, np.ones((1, 5), "<f4"))
    worker.ask(4 << 16, np.array([[b"x"] * 4], object))
    worker.ask(5 << 16, x(5))
    await worker.flush()
    await until(lambda: connections(started)[0].busy == 5)
    gate.open.set()
    answers = dict([await worker.answer() for _ in range(5)])
    assert isinstance(answers[4 << 16], ModelError)
    for number, value in ((1, 1), (2, 2), (5, 5)):
        got = answers[number << 16]
        assert isinstance(got, list)
        assert got[0].tolist() == [[2 * value] * 4]


# Streams.


async def test_a_stream_waits_for_a_worker_that_does_not_read(
    serve: Serve, connect: Connect, instance: type[Instance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not take does not heap up without a bound: its stream ends, and the engine goes on."""
    add_instance(tmp_path, "m", DECOUPLED)

    flooding: list[Any] = []

    def flood(calls: Any) -> list[None]:
        flooding.extend(calls)
        for call in calls:
            given = 0
            while not call.cancelled() and given < 10_000:
                call.respond(InferResponse("m", "1", {"y": np.ones((1, 4000), "<f4")}), False)
                given += 1
                time.sleep(0.0001)
            call.respond(None, True)
        return [None] * len(calls)

    monkeypatch.setattr(instance, "behaviour", staticmethod(flood))
    started, engine = await serve({"queue_bytes": 4 << 20})
    slow, other = await connect(), await connect()
    slow.ask(1 << 16, x(), kind=frames.STREAM)
    await slow.flush()
    connection = connections(started)[0]
    await until(lambda: bool(flooding) and flooding[0].cancelled())
    other.write(frames.CALL, 1 << 16, 0, orjson.dumps({"method": "metrics"}))
    await other.flush()
    await other.next(frames.REPLY)
    assert connection._transport is not None
    assert connection._transport.get_write_buffer_size() < 1 << 20
    count, last = 0, await slow.next(frames.RESPONSE, frames.ERROR, frames.END)
    while last[0] == frames.RESPONSE:
        count, last = count + 1, await slow.next(frames.RESPONSE, frames.ERROR, frames.END)
    assert last[0] == frames.ERROR
    assert "MILLRACE_QUEUE_BYTES" in str(frames.read_error(last))
    assert 0 < count < 10_000
    await until(lambda: engine.copies()[0].active == 0)


async def test_a_stream_of_a_worker_that_is_gone(
    serve: Serve, connect: Connect, instance: type[Instance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is told that nobody listens."""
    add_instance(tmp_path, "m", DECOUPLED)
    held: list[Any] = []

    def keep(calls: Any) -> list[None]:
        held.extend(calls)
        for call in calls:
            call.respond(answer(call), False)
        return [None] * len(calls)

    monkeypatch.setattr(instance, "behaviour", staticmethod(keep))
    _, engine = await serve()
    worker = await connect()
    worker.ask(1 << 16, x(), kind=frames.STREAM)
    await worker.flush()
    await worker.next(frames.RESPONSE)
    worker.close()
    await until(lambda: held[0].cancelled())
    held[0].respond(None, True)
    await until(lambda: engine.copies()[0].active == 0)


# Other questions.


def call(worker: Worker, about: int, method: str, **arguments: object) -> None:
    worker.write(frames.CALL, about, 0, orjson.dumps({"method": method, "arguments": arguments}))


async def test_an_answer_waits_until_everybody_knows(serve: Serve, connect: Connect) -> None:
    """Whoever asked for a change is answered when all workers have read what follows from it."""
    await serve({"model_control": "explicit", "load_models": "*"}, m=double)
    one, other = await connect(), await connect()
    call(one, 1 << 16, "unload", model="m")
    one.write(frames.SEEN, 1000)
    await one.flush()
    frame = await other.next(frames.CATALOGUE)
    assert orjson.loads(frame[4][frame[5] : frame[6]])["copies"] == []
    await asyncio.sleep(0.1)
    call(one, 2 << 16, "index")
    await one.flush()
    assert (await one.next(frames.REPLY))[3] == 2 << 16
    other.write(frames.SEEN, 1000)
    await other.flush()
    assert (await one.next(frames.REPLY))[3] == 1 << 16


async def test_a_worker_that_does_not_read_keeps_nobody_waiting(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For ever: after a while whoever asked is answered all the same. One that leaves is not waited for."""
    monkeypatch.setattr(server, "SEEN_WITHIN", 0.05)
    await serve({"model_control": "explicit", "load_models": "*"}, m=double)
    one, _silent = await connect(), await connect()
    call(one, 1 << 16, "unload", model="m")
    await one.flush()
    assert (await one.next(frames.REPLY))[3] == 1 << 16
    monkeypatch.setattr(server, "SEEN_WITHIN", 60)
    call(one, 2 << 16, "load", model="m")
    await one.flush()
    await one.learn()
    one.write(frames.SEEN, 1000)
    await one.flush()
    _silent.close()
    assert (await one.next(frames.REPLY))[3] == 2 << 16


async def test_errors_of_questions(serve: Serve, connect: Connect) -> None:
    """What the engine raises goes to whoever asked, and the connection goes on."""
    await serve({"model_control": "explicit", "load_models": "*"}, m=double)
    worker = await connect()
    call(worker, 1 << 16, "config", model="nobody")
    call(worker, 2 << 16, "load", model="nobody")
    await worker.flush()
    answers = dict([await worker.answer(), await worker.answer()])
    assert isinstance(answers[1 << 16], NotFound)
    assert isinstance(answers[2 << 16], LoadFailed)


async def test_a_change_goes_on_when_its_worker_leaves(serve: Serve, connect: Connect) -> None:
    """No model is left half loaded, and nobody is answered."""
    _, engine = await serve({"model_control": "explicit"}, m=double)
    worker = await connect()
    assert worker.catalogue["copies"] == []
    call(worker, 1 << 16, "load", model="m")
    await worker.flush()
    worker.close()
    await until(lambda: bool(engine.copies()))


async def test_files_come_with_the_request_to_load(serve: Serve, connect: Connect) -> None:
    """Each with its bytes, cut out of the frame in their order."""
    _, engine = await serve({"model_control": "explicit"}, m=double)
    worker = await connect()
    config = orjson.dumps({
        "backend": "pytorch", "max_batch_size": 4, "version_policy": {"all": {}},
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}],
    }).decode()  # fmt: skip
    said = {
        "method": "load", "arguments": {"model": "new", "config": config},
        "files": [["1/model.pt2", 5], ["2/model.pt2", 0]],
    }  # fmt: skip
    worker.write(frames.CALL, 1 << 16, meta=orjson.dumps(said), inline=[b"bytes"], nbytes=5)
    worker.write(frames.SEEN, 1000)
    await worker.flush()
    frame = await worker.next(frames.REPLY, frames.ERROR)
    assert frame[0] == frames.REPLY, frames.read_error(frame)
    assert [copy.version for copy in engine.copies()] == ["1", "2"]


# Greetings.


async def refused(path: Path, hello: dict[str, Any] | None, *given: int, also: bytes = b"") -> list[int]:
    """The kinds of frames that come in answer to a greeting until the connection ends. Closes `given`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(str(path))
        writer, reader = Writer(), Reader()
        if hello is not None:
            writer.write(frames.HELLO, meta=orjson.dumps(hello))
        data = writer.take() + also
        if data:
            socket.send_fds(sock, [data], given)
        for descriptor in given:
            os.close(descriptor)
        found: list[int] = []
        loop = asyncio.get_running_loop()
        try:
            while data := await asyncio.wait_for(loop.sock_recv(sock, 1 << 16), PATIENCE):
                found += [frame[0] for frame in reader.feed(data)]
        except ConnectionResetError:
            pass
        return found


def sealed(size: int) -> int:
    arena = Arena.create(size)
    descriptor = os.dup(arena.descriptor)
    arena.close()
    return descriptor


HELLO = {"version": frames.VERSION, "pid": 1}
REFUSED: dict[str, tuple[dict[str, Any] | None, Callable[[], list[int]], bytes, str]] = {
    "another version": ({"version": 2}, lambda: [sealed(1 << 20)], b"", "the worker speaks version 2, this engine 1"),
    "no version": ({}, lambda: [sealed(1 << 20)], b"", "the worker speaks version None"),
    "no memory": (HELLO, list, b"", "the worker brings no memory"),
    "two memories": (HELLO, lambda: [sealed(1 << 20), sealed(1 << 20)], b"", "brings no memory"),
    "memory without a board": (HELLO, lambda: [sealed(SLOTS - 1)], b"", "no room for its board"),
    "a file": (HELLO, lambda: [os.open("/dev/null", os.O_RDWR)], b"", "no shared memory"),
    "bytes": (None, list, b"x" * 100, "at most"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
async def test_workers_that_are_refused(
    serve: Serve, connect: Connect, path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """The log says why, the connection is closed, nothing of it stays open, and others can come."""
    started, _ = await serve(m=double)
    before = descriptors()
    hello, made, also, why = REFUSED[what]
    assert await refused(path, hello, *made(), also=also) in ([frames.ERROR], [])
    await until(lambda: not started._greeting)
    assert why in caplog.text
    assert descriptors() == before
    assert connections(started) == []
    worker = await connect()
    worker.ask(1 << 16, x())
    await worker.flush()
    assert await arrays_of(worker) == [[2] * 4]


async def test_a_worker_that_does_not_wait_for_the_answer(
    serve: Serve, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To its greeting is refused: what it says could be about anything."""
    started, _ = await serve(m=double)
    writer = Writer()
    writer.write(frames.HELLO, meta=orjson.dumps(HELLO))
    writer.write(frames.SEEN, 1)
    assert await refused(path, None, sealed(1 << 20), also=writer.take()) == [frames.ERROR]
    assert "a worker says hello first" in caplog.text
    assert connections(started) == []


async def test_workers_that_leave_before_they_are_there(serve: Serve, connect: Connect, path: Path) -> None:
    """At once, or right after their greeting: nothing of them stays."""
    started, _ = await serve(m=double)
    before = descriptors()
    for hello in (None, HELLO):
        for _ in range(20):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
                sock.connect(str(path))
                if hello is not None:
                    writer = Writer()
                    writer.write(frames.HELLO, meta=orjson.dumps(hello))
                    memory = sealed(1 << 20)
                    socket.send_fds(sock, [writer.take()], [memory])
                    os.close(memory)
            if hello is not None:
                await settle()
    await until(lambda: not started._greeting and not started._connections)
    await until(lambda: descriptors() == before)
    await connect()


async def test_a_worker_that_says_nothing(
    serve: Serve, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is not waited for."""
    monkeypatch.setattr(server, "GREETING", 0.05)
    await serve(m=double)
    assert await refused(path, None) == []
    assert "a worker was refused: it did not say who it is" in caplog.text


async def test_the_engine_stops_while_it_is_being_greeted(serve: Serve, path: Path) -> None:
    """By somebody who says nothing: the socket is closed."""
    started, _ = await serve(m=double)
    before = descriptors()
    waiting = asyncio.create_task(refused(path, None))
    await until(lambda: bool(started._greeting))
    await started.stop()
    assert await waiting == []
    assert descriptors() == before - 1  # the one that it listened on


class Foreign:
    """SO_PEERCRED of somebody else."""

    def __init__(self, uid: int, gid: int) -> None:
        self.size = 12
        self._peer = (4711, uid, gid)

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        return self._peer


STRANGER = os.geteuid() + 1000


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "also", "welcome"),
    [
        ("600", STRANGER, os.getegid(), (os.getegid(),), False),
        ("600", 0, STRANGER, (), True),
        ("600", os.geteuid(), STRANGER, (), True),
        ("660", STRANGER, os.getegid(), (), True),
        ("660", STRANGER, STRANGER, (STRANGER, os.getegid()), True),
        ("660", STRANGER, STRANGER, (STRANGER,), False),
        ("666", STRANGER, STRANGER, (), True),
    ],
)
async def test_whose_workers_are_taken(
    serve: Serve,
    path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    uid: int,
    gid: int,
    also: tuple[int, ...],
    welcome: bool,
) -> None:
    """The engine's own user's, root's, and whose the socket's mode says, whoever gets as far as to connect."""
    await serve({"engine_mode": mode}, m=double)
    monkeypatch.setattr(server, "PEER", Foreign(uid, gid))
    monkeypatch.setattr(server, "_groups", lambda sock: also)
    if welcome:
        (await Worker.connect(path)).close()
    else:
        assert await refused(path, HELLO, sealed(1 << 20)) == [frames.ERROR]
        assert f"process 4711 of user {STRANGER} may not use this engine (MILLRACE_ENGINE_MODE)" in caplog.text


async def test_the_groups_of_whoever_connects() -> None:
    """Those that it has besides its own first one."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, other:
        assert sorted(server._groups(one)) == sorted(os.getgroups())


async def test_more_workers_than_are_taken(
    serve: Serve, connect: Connect, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more is refused, and those that are there stay."""
    monkeypatch.setattr(server, "MAX_WORKERS", 2)
    started, _ = await serve(m=double)
    workers = [await connect(), await connect()]
    assert await refused(path, HELLO, sealed(1 << 20)) == [frames.ERROR]
    assert len(connections(started)) == 2
    workers[0].close()
    await until(lambda: len(connections(started)) == 1)
    await connect()


async def test_status(serve: Serve, connect: Connect, path: Path) -> None:
    """Whoever asks is told what the engine is, and is no worker."""
    started, _ = await serve(m=double)
    worker = await connect()
    status = await asyncio.to_thread(ask_status, str(path))
    assert status["models"] == [{"name": "m", "version": "1", "state": "READY"}]
    assert (status["pid"], status["live"], status["ready"]) == (os.getpid(), True, True)
    assert [(each["pid"], each["busy"]) for each in status["workers"]] == [(os.getpid(), 0)]
    assert len(connections(started)) == 1
    worker.close()


async def test_descriptors_do_not_leak(serve: Serve, path: Path) -> None:
    """Of workers that come, work and go, by themselves or because they were wrong."""
    started, _ = await serve(m=double)
    before = descriptors()
    for number in range(30):
        worker = await Worker.connect(path)
        worker.ask(1 << 16, x())
        await worker.flush()
        await worker.answer()
        if number % 2:
            await worker.send(bytes(100))
            await worker.rest()
        worker.close()
        del worker
    await until(lambda: not connections(started))
    assert descriptors() == before


# The path.


@pytest.mark.parametrize("mode", ["600", "660", "0666"])
async def test_the_sockets_mode(serve: Serve, path: Path, mode: str) -> None:
    """Is what the setting says, whatever the umask is; nothing else lies beside it but the lock."""
    mask = os.umask(0o077)
    try:
        await serve({"engine_mode": mode}, m=double)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == int(mode, 8)
    assert sorted(each.name for each in path.parent.iterdir()) == ["engine", "engine.lock"]


async def test_the_socket_is_for_the_owner_alone_by_default(serve: Serve, path: Path) -> None:
    """Whatever the umask lets others do."""
    mask = os.umask(0)
    try:
        await serve(m=double)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_socket_that_is_left_over(serve: Serve, connect: Connect, path: Path) -> None:
    """Of an engine that was killed: it is replaced."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    await serve(m=double)
    await connect()


@pytest.mark.parametrize("takeover", [False, True])
async def test_a_file_that_is_no_socket(serve: Serve, path: Path, takeover: bool) -> None:
    """Is not replaced, with --takeover neither: it is somebody's."""
    path.write_text("mine")
    with pytest.raises(ConfigError, match="MILLRACE_ENGINE_SOCKET: .*: is there, and is no socket"):
        await serve(m=double, takeover=takeover)
    assert path.read_text() == "mine"


async def test_a_place_where_no_socket_can_be(serve: Serve, path: Path) -> None:
    """It is the operator's error."""
    with pytest.raises(ConfigError, match="MILLRACE_ENGINE_SOCKET: .*: No such file or directory"):
        await serve({"engine_socket": str(path / "nowhere" / "engine")}, m=double)


async def test_another_engine_that_serves(serve: Serve, connect: Connect, path: Path) -> None:
    """Is left alone, and so are its workers; the second one says whose the path is."""
    await serve(m=double)
    worker = await connect()
    before = descriptors()
    with pytest.raises(ConfigError, match=f"another engine, process {os.getpid()}, serves at .* --takeover"):
        await serve(m=double)
    assert sorted(each.name for each in path.parent.iterdir()) == ["engine", "engine.lock"]
    worker.ask(1 << 16, x())
    await worker.flush()
    assert await arrays_of(worker) == [[2] * 4]
    assert descriptors() >= before  # the second engine's own; its listener is closed, or the test ends with a warning


async def test_an_engine_whose_path_is_taken_over(
    serve: Serve, connect: Connect, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It tells its workers to go there, answers what it has, and leaves the path alone when it stops."""
    monkeypatch.setattr(server, "BEAT", 0.02)
    gate = Gate()
    first, _ = await serve(m=gate)
    worker = await connect()
    gate.open.clear()
    worker.ask(1 << 16, x())
    await worker.flush()
    await until(lambda: bool(Scripted.calls))
    second, _ = await serve(takeover=True, m=double)
    await worker.next(frames.DRAIN)
    assert (first.published(), second.published()) == (False, True)
    assert "another engine serves at" in caplog.text
    gate.open.set()
    assert await arrays_of(worker) == [[2] * 4]
    await first.stop()
    assert second.published()
    await connect()
    assert len(connections(second)) == 1


# The end.


async def test_draining(serve: Serve, connect: Connect, path: Path) -> None:
    """The path is gone, workers are sent away, and what they sent is answered before the engine ends."""
    gate = Gate()
    started, engine = await serve(m=gate)
    worker = await connect()
    gate.open.clear()
    worker.ask(1 << 16, x())
    await worker.flush()
    await until(lambda: bool(Scripted.calls))
    draining = asyncio.create_task(started.drain())
    await worker.next(frames.DRAIN)
    assert not path.exists()
    assert not engine.ready()
    await settle()
    assert not draining.done()
    gate.open.set()
    assert await arrays_of(worker) == [[2] * 4]
    worker.close()
    await asyncio.wait_for(draining, PATIENCE)


async def test_draining_does_not_take_for_ever(serve: Serve, connect: Connect) -> None:
    """A worker that stays is waited for as long as the setting says; `stop` ends its connection."""
    started, _ = await serve({"graceful_timeout": 0}, m=double)
    worker = await connect()
    await asyncio.wait_for(started.drain(), PATIENCE)
    await started.stop()
    assert frames.DRAIN in [frame[0] for frame in await worker.rest()]


async def test_the_path_of_a_successor_stays(serve: Serve, path: Path) -> None:
    """An engine that stops removes its own socket, and no other."""
    first, _ = await serve(m=double)
    second, _ = await serve(takeover=True)
    await first.stop()
    assert path.is_socket()
    await second.stop()
    assert not path.exists()
