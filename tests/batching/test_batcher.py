"""Batcher: every submitted item gets exactly one answer, whatever happens to its batch."""

import asyncio
import gc
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from batching import Batcher, DeadlineExceeded, Policy, QueueFull
from tests.timing import Clock, settle

Outcome = Sequence[Any]


def times_ten(batch: Sequence[int]) -> Outcome:
    return [n * 10 for n in batch]


class Runner:
    """Stands for the model: records each batch, and answers by `behave`."""

    def __init__(self, behave: Callable[[Sequence[int]], Outcome] = times_ten) -> None:
        self.batches: list[list[int]] = []
        self.behave = behave
        self.gate: asyncio.Event | None = None

    async def __call__(self, batch: Sequence[int]) -> Outcome:
        self.batches.append(list(batch))
        if self.gate is not None:
            await self.gate.wait()
        return self.behave(batch)


def make(
    runner: Runner, clock: Callable[[], float] | None = None, max_rows: int = 32, capacity: int = 64
) -> Batcher[int, Any]:
    return Batcher(Policy(max_rows, 0.0, capacity), runner, lambda: None, clock or Clock())


async def outcomes(*submissions: Coroutine[Any, Any, Any], batcher: Batcher[int, Any]) -> list[Any]:
    """Submit all, drain until nothing waits, and return results and errors."""
    tasks = [asyncio.ensure_future(submission) for submission in submissions]
    await settle()
    while batcher.pending.rows:
        await batcher.drain()
    return await asyncio.gather(*tasks, return_exceptions=True)


def poisoned(bad: int) -> Callable[[Sequence[int]], Outcome]:
    def behave(batch: Sequence[int]) -> Outcome:
        if bad in batch:
            raise ValueError(f"cannot take {bad}")
        return [n * 10 for n in batch]

    return behave


async def test_one_poisoned_item_among_24_fails_alone() -> None:
    """A batch that raises is run again item by item, once: 23 right answers and one error."""
    runner = Runner(poisoned(7))
    batcher = make(runner)
    results = await outcomes(*(batcher.submit(n) for n in range(24)), batcher=batcher)
    assert isinstance(results[7], ValueError)
    assert [r for n, r in enumerate(results) if n != 7] == [n * 10 for n in range(24) if n != 7]
    assert runner.batches == [list(range(24)), *([n] for n in range(24))]


async def test_an_item_alone_is_not_run_twice() -> None:
    """A batch of one that raises gives its error after one run."""
    runner = Runner(poisoned(1))
    batcher = make(runner)
    (result,) = await outcomes(batcher.submit(1), batcher=batcher)
    assert isinstance(result, ValueError)
    assert runner.batches == [[1]]


async def test_a_wrong_number_of_results_is_never_misrouted() -> None:
    """If the runner answers fewer than it was given, nobody gets somebody else's answer."""
    runner = Runner(lambda batch: [n * 10 for n in batch][: max(1, len(batch) - 1)])
    batcher = make(runner)
    assert await outcomes(batcher.submit(1), batcher.submit(2), batcher=batcher) == [10, 20]


async def test_an_error_in_the_results_is_one_items_error() -> None:
    """A runner may answer an exception in an item's place; its mates get their results, nothing is run again."""
    runner = Runner(lambda batch: [KeyError("x") if n == 2 else n for n in batch])
    batcher = make(runner)
    one, two, three = await outcomes(*(batcher.submit(n) for n in (1, 2, 3)), batcher=batcher)
    assert [one, three] == [1, 3]
    assert isinstance(two, KeyError)
    assert runner.batches == [[1, 2, 3]]


async def test_a_caller_who_left_is_never_run() -> None:
    """100 cancelled callers ahead of a live one: the model sees only the live one."""
    runner = Runner()
    batcher = make(runner, capacity=101)
    gone = [asyncio.ensure_future(batcher.submit(n)) for n in range(100)]
    live = asyncio.ensure_future(batcher.submit(100))
    await settle()
    for task in gone:
        task.cancel()
    await settle()
    assert batcher.pending.rows == 1
    await batcher.drain()
    assert await live == 1000
    assert runner.batches == [[100]]
    assert all(task.cancelled() for task in gone)


async def test_a_caller_who_leaves_while_its_batch_runs_disturbs_nobody() -> None:
    """Cancelling one item of a running batch leaves its mates their answers."""
    runner = Runner()
    runner.gate = asyncio.Event()
    batcher = make(runner)
    tasks = [asyncio.ensure_future(batcher.submit(n)) for n in (1, 2, 3)]
    await settle()
    drained = asyncio.ensure_future(batcher.drain())
    await settle()
    tasks[1].cancel()
    await settle()
    runner.gate.set()
    await drained
    assert [await tasks[0], await tasks[2]] == [10, 30]
    assert tasks[1].cancelled()


async def test_who_left_is_not_run_again_after_a_failure() -> None:
    """When a batch is run again item by item, items whose callers left meanwhile are skipped."""
    runner = Runner(poisoned(1))
    runner.gate = asyncio.Event()
    batcher = make(runner)
    tasks = [asyncio.ensure_future(batcher.submit(n)) for n in (1, 2)]
    await settle()
    drained = asyncio.ensure_future(batcher.drain())
    await settle()
    tasks[1].cancel()
    await settle()
    runner.gate.set()
    await drained
    assert runner.batches == [[1, 2], [1]]
    with pytest.raises(ValueError, match="cannot take 1"):
        await tasks[0]


async def test_cancelled_in_the_very_turn_of_its_error_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """An error that came in the turn in which its caller was cancelled is not reported as never retrieved."""
    batcher = make(Runner(poisoned(1)))
    task = asyncio.ensure_future(batcher.submit(1))
    await settle()
    await batcher.drain()  # the future has its error, the task has not yet run
    task.cancel()
    await asyncio.wait([task])
    del task
    gc.collect()
    assert caplog.text == ""


async def test_full_queue_is_refused_at_once_with_a_prediction() -> None:
    """Past its capacity a submit raises QueueFull without waiting; retry_after is rows times measured row time."""
    clock = Clock()

    def half_a_second(batch: Sequence[int]) -> Outcome:
        clock.advance(0.5)
        return batch

    runner = Runner(half_a_second)
    batcher = make(runner, clock, max_rows=2, capacity=4)
    assert await outcomes(batcher.submit(1, rows=2), batcher=batcher) == [1]
    tasks = [asyncio.ensure_future(batcher.submit(n, rows=2)) for n in (1, 2)]
    await settle()
    with pytest.raises(QueueFull) as refused:
        await batcher.submit(3)
    assert refused.value.retry_after == pytest.approx(4 * 0.25)
    await batcher.drain()
    await batcher.drain()
    assert await asyncio.gather(*tasks) == [1, 2]


async def test_a_passed_deadline_is_answered_without_running_the_model() -> None:
    """An item that is late when its batch is sealed gets DeadlineExceeded; its mates run without it."""
    clock, runner = Clock(), Runner()
    batcher = make(runner, clock)
    late = asyncio.ensure_future(batcher.submit(1, deadline=clock() + 60))
    mate = asyncio.ensure_future(batcher.submit(2, deadline=clock() + 90))
    await settle()
    clock.advance(60)
    await batcher.drain()
    with pytest.raises(DeadlineExceeded):
        await late
    assert await mate == 20
    assert runner.batches == [[2]]


async def test_draining_when_all_are_late_runs_nothing() -> None:
    """If everything that waited is late when the lane looks, the model is not called with an empty batch."""
    clock, runner = Clock(), Runner()
    batcher = make(runner, clock)
    late = asyncio.ensure_future(batcher.submit(1, deadline=clock() + 60))
    await settle()
    clock.advance(61)
    await batcher.drain()
    with pytest.raises(DeadlineExceeded):
        await late
    assert runner.batches == []


async def test_a_deadline_passes_while_the_lane_is_busy() -> None:
    """The answer to a late item does not wait for the lane: a timer gives it, one for all items."""
    loop = asyncio.get_running_loop()
    runner = Runner()
    batcher = make(runner, loop.time)
    waits = [asyncio.ensure_future(batcher.submit(n, deadline=loop.time() + s)) for n, s in ((1, 0.02), (2, 0.01))]
    stays = asyncio.ensure_future(batcher.submit(3, deadline=loop.time() + 60))
    done, _ = await asyncio.wait(waits, timeout=10)
    assert len(done) == 2
    assert all(isinstance(task.exception(), DeadlineExceeded) for task in done)
    assert runner.batches == []
    assert batcher.pending.rows == 1
    batcher.close(lambda: RuntimeError("over"))
    with pytest.raises(RuntimeError, match="over"):
        await stays


@pytest.mark.parametrize("rows", [0, -1, 33])
async def test_rows_that_no_batch_can_hold_are_refused(rows: int) -> None:
    """An item of no rows, or of more than a batch, is a mistake of the caller's, not a queue that never empties."""
    with pytest.raises(ValueError, match="rows must be 1 to 32"):
        await make(Runner()).submit(1, rows=rows)


async def test_a_drain_that_is_ended_answers_its_batch() -> None:
    """If the task that drains is cancelled in the middle of a batch, its items get an error, not silence."""
    runner = Runner()
    runner.gate = asyncio.Event()
    batcher = make(runner)
    task = asyncio.ensure_future(batcher.submit(1))
    await settle()
    drain = asyncio.ensure_future(batcher.drain())
    await settle()
    drain.cancel()
    await settle()
    with pytest.raises(RuntimeError, match="interrupted"):
        await task


async def test_close_answers_what_waits_and_what_comes() -> None:
    """After close every waiting item and every later submit gets the error it was given."""
    batcher = make(Runner())
    task = asyncio.ensure_future(batcher.submit(1))
    await settle()
    batcher.close(lambda: ConnectionError("gone"))
    with pytest.raises(ConnectionError, match="gone") as first:
        await task
    with pytest.raises(ConnectionError, match="gone") as second:
        await batcher.submit(2)
    assert first.value is not second.value


async def test_batches_are_counted_by_their_rows() -> None:
    """The histogram of batch sizes counts rows, not items."""
    batcher = make(Runner())
    await outcomes(batcher.submit(1, rows=3), batcher.submit(2), batcher=batcher)
    await outcomes(batcher.submit(1), batcher=batcher)
    assert batcher.sizes == {4: 1, 1: 1}
