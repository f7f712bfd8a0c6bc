"""Lane: one coroutine, the next ready batch of all models, as late as possible."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from batching import Batcher, Policy
from engine.errors import NotReady
from engine.lane import Lane
from tests.timing import Clock, settle, until


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    lane = Lane("test")
    yield lane
    await lane.stop(10)


def attach(lane: Lane, run: Any, max_rows: int = 4, max_delay: float = 0.0) -> Batcher[Any, Any]:
    batcher: Batcher[Any, Any] = Batcher(Policy(max_rows, max_delay), run, lane.wake)
    lane.attach(batcher)
    return batcher


async def test_a_lone_request_waits_for_no_timer(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a free lane a request is answered without the event loop ever being asked for a timer."""

    async def run(batch: Sequence[int]) -> list[int]:
        return list(batch)

    batcher = attach(lane, run)
    lane.start()
    await settle()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda *_: pytest.fail("a timer"))
    monkeypatch.setattr(loop, "call_at", lambda *_: pytest.fail("a timer"))
    task = asyncio.ensure_future(batcher.submit(1))
    await settle()
    assert task.done()
    assert task.result() == 1


async def test_what_arrives_while_the_lane_is_busy_shares_the_next_batch(lane: Lane) -> None:
    """A batch is sealed when the lane is free, not when its first item comes."""
    gate, batches = asyncio.Event(), []

    async def run(batch: Sequence[int]) -> list[int]:
        batches.append(list(batch))
        await gate.wait()
        return list(batch)

    batcher = attach(lane, run)
    lane.start()
    tasks = []
    for number in range(4):
        tasks.append(asyncio.ensure_future(batcher.submit(number)))
        await settle()
    assert batches == [[0]]
    gate.set()
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3]
    assert batches == [[0], [1, 2, 3]]


async def test_models_on_one_lane_take_turns_by_age(lane: Lane) -> None:
    """The model whose oldest request is the oldest of all goes next; no two run at once."""
    running, order = 0, []

    def runner(name: str) -> Any:
        async def run(batch: Sequence[int]) -> list[int]:
            nonlocal running
            assert running == 0
            running += 1
            await asyncio.sleep(0)
            running -= 1
            order.append(name)
            return list(batch)

        return run

    batchers = {name: attach(lane, runner(name), max_rows=1) for name in "ab"}
    tasks = []
    for name in "abba":
        tasks.append(asyncio.ensure_future(batchers[name].submit(1)))
        await settle()
    lane.start()
    await asyncio.gather(*tasks)
    assert "".join(order) == "abba"


async def test_a_configured_delay_is_waited_for_and_a_full_batch_is_not(lane: Lane) -> None:
    """With a delay a batch that is not full waits for company, and leaves at once when it is full."""
    batches = []

    async def run(batch: Sequence[int]) -> list[int]:
        batches.append(list(batch))
        return list(batch)

    batcher = attach(lane, run, max_rows=2, max_delay=30.0)
    lane.start()
    first = asyncio.ensure_future(batcher.submit(1))
    await settle()
    assert batches == []
    assert await batcher.submit(2) == 2
    assert await first == 1
    assert batches == [[1, 2]]


async def test_a_delay_ends_without_another_request(lane: Lane) -> None:
    """A lone request under a delay is served when the delay is over."""

    async def run(batch: Sequence[int]) -> list[int]:
        return list(batch)

    batcher = attach(lane, run, max_delay=0.01)
    lane.start()
    assert await asyncio.wait_for(batcher.submit(1), 10) == 1


async def test_call_runs_in_the_lanes_one_thread(lane: Lane) -> None:
    """Whatever is called runs off the event loop's thread, always in the same one, and its error comes back."""
    lane.start()
    threads = {await lane.call(threading.get_ident) for _ in range(5)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    with pytest.raises(ZeroDivisionError):
        await lane.call(lambda: 1 // 0)


async def test_the_heartbeat_stops_in_a_batch_that_does_not_end() -> None:
    """A lane is alive while idle however long, and no longer when one batch has taken more than the bound."""
    clock, gate = Clock(), asyncio.Event()
    lane = Lane("test", clock)

    async def run(batch: Sequence[int]) -> list[int]:
        await gate.wait()
        return list(batch)

    batcher = attach(lane, run)
    assert not lane.alive(60)
    lane.start()
    clock.advance(1e6)
    assert lane.alive(60)
    task = asyncio.ensure_future(batcher.submit(1))
    await settle()
    clock.advance(60)
    assert lane.alive(60)
    clock.advance(0.1)
    assert not lane.alive(60)
    gate.set()
    await task
    await settle()
    assert lane.alive(60)
    await lane.stop(10)
    assert not lane.alive(60)


async def test_a_lane_that_dies_answers_everybody(lane: Lane, caplog: pytest.LogCaptureFixture) -> None:
    """If the coroutine itself fails, what waits and what comes gets NotReady, and the lane is not alive."""

    async def run(batch: Sequence[int]) -> list[int]:
        return list(batch)

    batcher = attach(lane, run)
    batcher.drain = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    lane.start()
    with pytest.raises(NotReady, match="died"):
        await batcher.submit(1)
    with pytest.raises(NotReady, match="died"):
        await batcher.submit(2)
    assert not lane.alive(60)
    assert "nothing on it will be served" in caplog.text


async def test_a_lane_that_is_cancelled_leaves_nobody_waiting(lane: Lane) -> None:
    """However the coroutine ends, what waits and what comes later is answered."""

    async def run(batch: Sequence[int]) -> list[int]:
        await asyncio.Event().wait()
        return list(batch)

    batcher = attach(lane, run, max_rows=1)
    lane.start()
    tasks = [asyncio.ensure_future(batcher.submit(n)) for n in range(3)]
    await settle()
    assert lane._task is not None
    lane._task.cancel()
    await asyncio.wait(tasks, timeout=10)
    assert all(isinstance(task.exception(), NotReady | RuntimeError) for task in tasks)
    with pytest.raises(NotReady):
        await asyncio.wait_for(batcher.submit(9), 10)


async def test_stop_does_not_wait_for_a_batch_that_never_ends(caplog: pytest.LogCaptureFixture) -> None:
    """A stuck batch is given up after the time it gets: its caller is answered, and the coroutine ends."""
    lane = Lane("test")

    async def run(batch: Sequence[int]) -> list[int]:
        await asyncio.Event().wait()
        return list(batch)

    batcher = attach(lane, run, max_rows=1)
    lane.start()
    tasks = [asyncio.ensure_future(batcher.submit(n)) for n in range(2)]
    await settle()
    await lane.stop(0.01)
    for task in tasks:
        with pytest.raises(NotReady, match="shutting down"):
            await task
    assert "stuck in a batch" in caplog.text
    assert not lane.alive(60)


async def test_stop_does_not_wait_for_a_delay(lane: Lane) -> None:
    """What waits for company when the lane stops is run at once."""

    async def run(batch: Sequence[int]) -> list[int]:
        return list(batch)

    batcher = attach(lane, run, max_delay=1000.0)
    lane.start()
    task = asyncio.ensure_future(batcher.submit(1))
    await settle()
    await asyncio.wait_for(lane.stop(30), 10)
    assert await task == 1


async def test_an_inline_model_does_not_hold_the_loop_between_batches(lane: Lane) -> None:
    """After each batch everybody else gets a turn, however long the queue is."""
    turns, batches = 0, []

    async def run(batch: Sequence[int]) -> list[int]:
        batches.append(turns)
        return list(batch)

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    batcher = attach(lane, run, max_rows=1)
    tasks = [asyncio.ensure_future(batcher.submit(n)) for n in range(10)]
    await settle()
    counter = asyncio.ensure_future(count())
    lane.start()
    await asyncio.gather(*tasks)
    counter.cancel()
    assert len(batches) == len(set(batches)) == 10


async def test_stop_runs_what_is_queued_first(lane: Lane) -> None:
    """Stopping drains: everything that was queued is answered, then the coroutine ends."""

    async def run(batch: Sequence[int]) -> list[int]:
        await asyncio.sleep(0.001)
        return list(batch)

    batcher = attach(lane, run, max_rows=1)
    lane.start()
    tasks = [asyncio.ensure_future(batcher.submit(n)) for n in range(5)]
    await until(lambda: batcher.pending.rows == 4)
    await lane.stop(10)
    assert await asyncio.gather(*tasks) == list(range(5))
