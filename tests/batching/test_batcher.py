"""Batcher: every submitted item gets exactly one answer, whatever happens to its batch."""

import asyncio
import gc
import json
import math
import random
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import (
    Batch,
    Batcher,
    CannotMeetDeadline,
    Cost,
    DeadlineExceeded,
    Item,
    Level,
    OutOfMemory,
    Policy,
    QueueFull,
)
from batching.batcher import RETRY_AFTER
from batching.items import STAGES
from tests.timing import Clock, Timers, settle

Outcome = Sequence[Any]
Caller = asyncio.Task[Any]
Alike = tuple[Any, ...]


def times_ten(batch: Sequence[Any]) -> Outcome:
    return [n * 10 for n in batch]


def poisoned(*bad: int) -> Callable[[Sequence[int]], Outcome]:
    """Raises if it is given any of `bad`."""

    def behave(batch: Sequence[int]) -> Outcome:
        for n in batch:
            if n in bad:
                raise ValueError(f"cannot take {n}")
        return times_ten(batch)

    return behave


def fits(rows: int, bad: Sequence[int] = ()) -> Callable[[Sequence[int]], Outcome]:
    """Has memory for `rows`, and none for any of `bad`."""

    def behave(batch: Sequence[int]) -> Outcome:
        if len(batch) > rows or any(n in bad for n in batch):
            raise OutOfMemory("it did not fit")
        return times_ten(batch)

    return behave


class Runner:
    """Stands for the model: records each batch, and answers by `behave`. It goes no further than its gate."""

    def __init__(self, behave: Callable[[Sequence[Any]], Outcome] = times_ten) -> None:
        self.preparation = Cost()
        self.behave = behave
        self.gate = asyncio.Event()
        self.gate.set()
        self.batches: list[list[Any]] = []
        self.shapes: list[tuple[int, int]] = []
        self.given: list[object] = []

    async def prepare(self, payloads: Sequence[Any], rows: int, length: int) -> object:
        await self.gate.wait()
        return f"{len(payloads)} stacked to {rows} x {length}"

    async def run(self, payloads: Sequence[Any], rows: int, length: int, prepared: object = None) -> Outcome:
        self.batches.append(list(payloads))
        self.shapes.append((rows, length))
        self.given.append(prepared)
        await self.gate.wait()
        return self.behave(payloads)


class Payload:
    """Something that a weak reference can watch."""


def make(runner: Runner, clock: Callable[[], float] | None = None, **knobs: Any) -> Batcher[Any, Any]:
    policy = Policy(**{"max_rows": 32, "capacity": 64, **knobs})
    return Batcher(policy, runner, lambda: None, clock=clock or Clock())


async def submit(batcher: Batcher[Any, Any], *payloads: Any, **item: Any) -> list[Caller]:
    """One caller for each payload, all of whom wait."""
    callers = [asyncio.create_task(batcher.submit(payload, **item)) for payload in payloads]
    await settle()
    return callers


def seal(batcher: Batcher[Any, Any]) -> Batch[Any, Any]:
    """The batch that the lane would run next."""
    assert batcher.urgency() < math.inf
    batch = batcher.seal()
    assert batch is not None
    return batch


def alike(rows: int = 1, bucket: Hashable = (), deadline: float = math.inf) -> Alike:
    """What requests of one kind are queued with: compared by identity."""
    return rows, bucket, deadline


async def serve(batcher: Batcher[Any, Any]) -> None:
    """Do what a lane does, until there is nothing to run."""
    while batcher.urgency() < math.inf:
        await batcher.run(seal(batcher))


async def outcomes(callers: Sequence[Caller]) -> list[Any]:
    return await asyncio.gather(*callers, return_exceptions=True)


def done(callers: Sequence[Caller]) -> str:
    """The places of those who have their answer."""
    return "".join(str(place) for place, caller in enumerate(callers) if caller.done())


def left(**counts: int) -> dict[str, int]:
    return {**dict.fromkeys(STAGES, 0), **counts}


def assert_empty(batcher: Batcher[Any, Any]) -> None:
    """What was answered is nowhere."""
    assert len(batcher.pending) == batcher.pending.rows == batcher.pending.nbytes == 0
    assert not batcher._flights
    assert not batcher._unanswered
    assert not batcher._held


# A batch that fails.


async def test_one_poisoned_item_among_24_fails_alone() -> None:
    """A batch that raises is halved until only the guilty one is left: 23 right answers, one error, ten more runs."""
    runner = Runner(poisoned(7))
    batcher = make(runner)
    callers = await submit(batcher, *range(24))
    await serve(batcher)
    results = await outcomes(callers)
    assert isinstance(results.pop(7), ValueError)
    assert results == [n * 10 for n in range(24) if n != 7]
    assert len(runner.batches) <= 1 + 2 * math.ceil(math.log2(24))
    assert [7] in runner.batches
    assert_empty(batcher)


@given(st.integers(1, 32).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
@settings(max_examples=60, deadline=None)
def test_only_the_guilty_fail(case: tuple[int, set[int]]) -> None:
    """Whoever is guilty among n, exactly they fail, each with an error of its own, in a bounded number of runs."""
    n, guilty = case

    async def check() -> None:
        runner = Runner(poisoned(*guilty))
        batcher = make(runner)
        callers = await submit(batcher, *range(n))
        await serve(batcher)
        results = await outcomes(callers)
        assert {place for place, result in enumerate(results) if isinstance(result, ValueError)} == guilty
        assert [result for result in results if not isinstance(result, ValueError)] == [
            place * 10 for place in range(n) if place not in guilty
        ]
        assert all(str(results[place]) == f"cannot take {place}" for place in guilty)
        assert len(runner.batches) <= min(2 * n - 1, 1 + 2 * len(guilty) * math.ceil(math.log2(n)))
        assert batcher.journal.split == (bool(guilty) and n > 1)

    asyncio.run(check())


async def test_when_a_batch_fails_whatever_is_in_it_each_caller_gets_its_own_error() -> None:
    """All guilty: no two callers are given the same exception, whose traceback would grow with every raise."""
    batcher = make(Runner(poisoned(*range(24))))
    callers = await submit(batcher, *range(24))
    await serve(batcher)
    results = await outcomes(callers)
    assert len({id(result) for result in results}) == 24
    assert [str(result) for result in results] == [f"cannot take {n}" for n in range(24)]


async def test_a_half_that_is_good_waits_for_nothing_more() -> None:
    """Those in a good half have their answers before the other half is run again."""

    class Watched(Runner):
        async def run(self, payloads: Sequence[Any], *shape: Any) -> Outcome:
            await settle()
            seen.append((list(payloads), done(callers)))
            return await super().run(payloads, *shape)

    seen: list[tuple[list[int], str]] = []
    batcher = make(Watched(poisoned(3)))
    callers = await submit(batcher, 0, 1, 2, 3)
    await serve(batcher)
    assert seen == [([0, 1, 2, 3], ""), ([0, 1], ""), ([2, 3], "01"), ([2], "01"), ([3], "012")]
    await outcomes(callers)


async def test_a_half_is_padded_as_any_batch_of_its_size_is() -> None:
    """What is run again has a shape that the model was warmed with, and keeps its batch's length."""
    runner = Runner(poisoned(1))
    batcher = make(runner, max_rows=8, row_grid=(1, 2, 8), lengths=(16,))
    callers = await submit(batcher, 0, 1, 2, length=9)
    await serve(batcher)
    assert runner.batches == [[0, 1, 2], [0], [1, 2], [1], [2]]
    assert runner.shapes == [(8, 16), (1, 16), (2, 16), (1, 16), (1, 16)]
    await outcomes(callers)


async def test_an_item_alone_is_not_run_twice() -> None:
    """A batch of one that raises gives its error after one run."""
    runner = Runner(poisoned(1))
    batcher = make(runner)
    callers = await submit(batcher, 1)
    await serve(batcher)
    assert isinstance((await outcomes(callers))[0], ValueError)
    assert runner.batches == [[1]]


@pytest.mark.parametrize("wrong", [-1, 1], ids=["one too few", "one too many"])
async def test_a_wrong_number_of_results_is_never_misrouted(wrong: int) -> None:
    """If the runner answers fewer or more than it was given, nobody gets somebody else's answer."""

    def behave(batch: Sequence[int]) -> Outcome:
        return times_ten(batch) if len(batch) == 1 else [99] * (len(batch) + wrong)

    batcher = make(Runner(behave))
    callers = await submit(batcher, 1, 2, 3)
    await serve(batcher)
    assert await outcomes(callers) == [10, 20, 30]


async def test_a_wrong_number_of_results_for_one_is_its_error() -> None:
    """Two results for an item alone are none."""
    batcher = make(Runner(lambda batch: [1, 2]))
    callers = await submit(batcher, 1)
    await serve(batcher)
    with pytest.raises(RuntimeError, match="2 results for a batch of 1 items"):
        await callers[0]


async def test_an_error_in_the_results_is_one_items_error() -> None:
    """A runner may answer an exception in an item's place; its mates get their results, nothing is run again."""
    runner = Runner(lambda batch: [KeyError("x") if n == 2 else n for n in batch])
    batcher = make(runner)
    callers = await submit(batcher, 1, 2, 3)
    await serve(batcher)
    one, two, three = await outcomes(callers)
    assert [one, three] == [1, 3]
    assert isinstance(two, KeyError)
    assert runner.batches == [[1, 2, 3]]


# Memory.


async def test_out_of_memory_halves_the_batch_and_none_is_as_large_again() -> None:
    """A batch that did not fit is answered in parts that do, and the next ones are no larger than those."""
    runner = Runner(fits(5))
    batcher = make(runner)
    callers = await submit(batcher, *range(32))
    await serve(batcher)
    assert await outcomes(callers) == [n * 10 for n in range(32)]
    assert batcher.pending.largest == 4
    runner.batches.clear()
    callers = await submit(batcher, *range(11))
    await serve(batcher)
    assert await outcomes(callers) == [n * 10 for n in range(11)]
    assert [len(batch) for batch in runner.batches] == [4, 4, 3]
    assert batcher.report()["cost"]["largest"] == 4


async def test_after_many_batches_that_fit_a_larger_one_is_tried() -> None:
    """Perhaps another process had the memory. Each time that it does not fit, the next try comes half as often."""
    runner = Runner(fits(5))
    batcher = make(runner)

    async def batches_until_one_fails(limit: int) -> int:
        for number in range(limit):
            callers = await submit(batcher, *range(8))
            await serve(batcher)
            assert await outcomes(callers) == [n * 10 for n in range(8)]
            if max(map(len, runner.batches[-4:])) > 5:
                return number
        return limit

    assert await batches_until_one_fails(1) == 0
    assert batcher.pending.largest == 4
    first = await batches_until_one_fails(1000)
    assert RETRY_AFTER // 3 < first < RETRY_AFTER
    assert batcher.pending.largest == 4
    assert 1.5 * first < await batches_until_one_fails(1000) < 3 * first
    runner.behave = times_ten
    await batches_until_one_fails(1000)
    assert batcher.pending.largest >= 8


async def test_an_item_that_does_not_fit_alone_gets_out_of_memory_and_makes_no_batch_smaller() -> None:
    """One item that has no room whatever its company fails alone; that says nothing about the others' batches."""
    runner = Runner(fits(32, bad=[7]))
    batcher = make(runner)
    callers = await submit(batcher, *range(24))
    await serve(batcher)
    results = await outcomes(callers)
    assert isinstance(results.pop(7), OutOfMemory)
    assert results == [n * 10 for n in range(24) if n != 7]
    assert batcher.pending.largest == math.inf


async def test_what_is_larger_than_what_did_not_fit_is_not_tried() -> None:
    """A batch that was sealed before the bound was known is run in parts that keep to it, and does not move it."""
    runner = Runner(fits(3))
    batcher = make(runner, max_rows=8)
    large, small = await submit(batcher, *range(8)), await submit(batcher, *range(6))
    sealed = [seal(batcher), seal(batcher)]
    await batcher.run(sealed[1])
    assert [len(batch) for batch in runner.batches] == [6, 3, 3]
    assert batcher.pending.largest == 3
    await batcher.run(sealed[0])
    assert [len(batch) for batch in runner.batches[3:]] == [2, 2, 2, 2]
    assert batcher.pending.largest == 3
    assert await outcomes([*large, *small]) == [n * 10 for n in (*range(8), *range(6))]


async def test_an_item_larger_than_the_bound_is_tried_alone() -> None:
    """An item is never split: one of more rows than a batch may have goes alone, as often as it comes."""
    runner = Runner(fits(2))
    batcher = make(runner)
    callers = await submit(batcher, 1, 2, 3, 4)
    await serve(batcher)
    assert batcher.pending.largest == 2
    callers += await submit(batcher, 5, rows=3) + await submit(batcher, 6)
    await serve(batcher)
    assert runner.batches[3:] == [[5], [6]]
    assert await outcomes(callers) == [n * 10 for n in range(1, 7)]


# Callers who leave.


async def test_a_caller_who_left_is_never_run() -> None:
    """100 cancelled callers ahead of a live one: the model sees only the live one."""
    runner = Runner()
    batcher = make(runner, capacity=101)
    gone, (live,) = await submit(batcher, *range(100)), await submit(batcher, 100)
    for caller in gone:
        caller.cancel()
    await settle()
    assert batcher.pending.rows == 1
    await serve(batcher)
    assert await live == 1000
    assert runner.batches == [[100]]
    assert all(caller.cancelled() for caller in gone)
    assert batcher.journal.left == left(queued=100)


@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
@pytest.mark.parametrize("result", [times_ten, lambda batch: [ValueError(n) for n in batch]], ids=["result", "error"])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_caller_may_leave_at_any_stage(
    stage: str, result: Callable[[Sequence[int]], Outcome], ordered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever its item is when a caller leaves, it is counted there, its mate is answered, and nothing of it stays."""
    runner = Runner(result)
    batcher = make(runner, ordered=ordered)
    callers = await submit(batcher, 1, 2)

    async def reach(reached: str) -> None:
        if reached == stage:
            callers[0].cancel()
            await settle()

    await reach("queued")
    batch = seal(batcher)
    runner.gate.clear()
    preparing = asyncio.create_task(batcher.prepare(batch))
    await settle()
    await reach("preparing")
    runner.gate.set()
    await preparing
    await reach("sealed")
    if stage == "running":
        runner.gate.clear()
        running = asyncio.create_task(batcher.run(batch))
        await settle()
        await reach("running")
        runner.gate.set()
        await running
    else:
        await batcher.run(batch)  # in this very turn: the callers have their answers, and do not know it
        await reach("answered")
    await asyncio.wait(callers)
    assert callers[0].cancelled()
    assert str(callers[1].exception() or callers[1].result()) == str(result([2])[0])
    assert batcher.journal.left == left(**{stage: 1})
    assert runner.batches == [[2] if stage == "queued" else [1, 2]]
    assert_empty(batcher)
    callers.clear()
    del batch
    gc.collect()
    assert caplog.text == ""


async def test_a_caller_who_leaves_while_its_batch_runs_disturbs_nobody() -> None:
    """Cancelling one item of a running batch leaves its mates their answers."""
    runner = Runner()
    runner.gate.clear()
    batcher = make(runner)
    callers = await submit(batcher, 1, 2, 3)
    running = asyncio.create_task(batcher.run(seal(batcher)))
    await settle()
    callers[1].cancel()
    await settle()
    runner.gate.set()
    await running
    assert [await callers[0], await callers[2]] == [10, 30]
    assert callers[1].cancelled()


async def test_who_left_is_not_run_again_after_a_failure() -> None:
    """When the halves of a batch are run, items whose callers left meanwhile are not in them, nor is an empty half."""
    runner = Runner(poisoned(0))
    runner.gate.clear()
    batcher = make(runner)
    callers = await submit(batcher, 0, 1, 2, 3)
    running = asyncio.create_task(batcher.run(seal(batcher)))
    await settle()
    for place in (1, 2, 3):
        callers[place].cancel()
    await settle()
    runner.gate.set()
    await running
    assert runner.batches == [[0, 1, 2, 3], [0]]
    with pytest.raises(ValueError, match="cannot take 0"):
        await callers[0]


@pytest.mark.parametrize("how", ["sealed", "stacked", "not stacked"])
async def test_a_batch_whose_callers_all_left_is_not_run(how: str) -> None:
    """However far a batch had come: nobody waits for it, the model does not see it, and it counts as none."""
    runner = Runner()
    if how == "not stacked":
        runner.prepare = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    batcher = make(runner)
    callers = await submit(batcher, 1, 2)
    batch = seal(batcher)
    if how != "sealed":
        await batcher.prepare(batch)
    for caller in callers:
        caller.cancel()
    await batcher.run(batch)
    await asyncio.wait(callers)
    assert runner.batches == []
    assert batcher.journal.sizes == {}
    assert batcher.pending.cost.samples == 0
    assert_empty(batcher)


async def test_cancelled_in_the_very_turn_of_its_error_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """An error that came in the turn in which its caller was cancelled is not reported as never retrieved."""
    batcher = make(Runner(poisoned(1)))
    (caller,) = await submit(batcher, 1)
    await serve(batcher)  # the future has its error, the caller has not yet run
    caller.cancel()
    await asyncio.wait([caller])
    assert batcher.journal.left == left(answered=1)
    del caller
    gc.collect()
    assert caplog.text == ""


async def test_what_was_answered_is_let_go_of_at_once() -> None:
    """No cycle keeps a payload until the garbage collector comes by."""
    batcher = make(Runner(lambda batch: [None for _ in batch]))
    payload = Payload()
    gone = weakref.ref(payload)
    gc.disable()
    try:
        callers = await submit(batcher, payload)
        del payload
        await serve(batcher)
        batcher_runner: Any = batcher.runner
        batcher_runner.batches.clear()
        assert await outcomes(callers) == [None]
        del callers
        assert gone() is None
    finally:
        gc.enable()


# Stacking ahead of time.


@pytest.mark.parametrize("how", ["the model fails", "halves fail", "refused", "refused in a group", "late", "closed"])
async def test_what_failed_is_let_go_of_without_the_collector(how: str) -> None:
    """An error that its caller has seen keeps nothing alive: no cycle holds what was asked, whoever raised it."""

    def fail(batch: Sequence[Any]) -> Outcome:
        raise ValueError("cannot take it")

    clock = Clock()
    rows = 2 if how == "halves fail" else 1
    runner = Runner(fail)
    batcher = make(runner, clock, max_rows=rows, capacity=2)
    payloads: list[Payload] = [Payload() for _ in range(rows)]
    watched = [weakref.ref(payload) for payload in payloads]
    gc.collect()
    gc.disable()
    try:
        if how.startswith("refused"):
            batcher.enqueue_all(futures(2), [1, 2])
        if how == "refused in a group":
            assert isinstance(batcher.enqueue_all(futures(1), payloads)[0], QueueFull)
        else:
            callers = await submit(batcher, *payloads, deadline=clock() + 5 if how == "late" else math.inf)
            if how == "late":
                clock.now += 10
                assert batcher.urgency() == math.inf
            if how == "closed":
                batcher.close(lambda: ValueError("closed"))
            await (settle() if how == "refused" else serve(batcher))
            for error in await outcomes(callers):
                assert isinstance(error, ValueError | QueueFull | DeadlineExceeded)
            del callers, error
        payloads.clear()
        runner.batches.clear()
        await settle()  # whoever gathered the outcomes lets go of them
        assert [reference() for reference in watched] == [None] * rows
    finally:
        gc.enable()


async def test_none_are_queued_at_once_as_well() -> None:
    """A group of nobody is no error."""
    batcher = make(Runner())
    assert batcher.enqueue_all([], []) == []
    assert_empty(batcher)


async def test_what_was_stacked_is_run_once() -> None:
    """What prepare() made goes to the first run; halves of the batch are stacked anew."""
    runner = Runner(poisoned(1))
    batcher = make(runner)
    callers = await submit(batcher, 1, 2)
    batch = seal(batcher)
    await batcher.prepare(batch)
    await batcher.run(batch)
    assert runner.given == ["2 stacked to 2 x 1", None, None]
    assert (await outcomes(callers))[1] == 20


async def test_what_was_stacked_too_long_ago_is_not_run() -> None:
    """A batch sealed ahead that waited for the lane past a deadline aboard is run without that item."""
    timers, runner = Timers(), Runner()
    for _ in range(3):
        runner.preparation.learn(1, 0.5)
    batcher = make(runner, timers, ordered=True)
    late, late_too = await submit(batcher, 1, deadline=timers() + 5), await submit(batcher, 2, deadline=timers() + 5)
    batch = seal(batcher)
    await batcher.prepare(batch)
    await timers.elapse(5)
    await batcher.run(batch)
    for outcome in await outcomes(late + late_too):
        assert isinstance(outcome, DeadlineExceeded)
    assert runner.batches == []
    assert batcher.journal.expired == 2
    assert_empty(batcher)


async def test_what_prepare_raises_run_will_meet() -> None:
    """An item that cannot be stacked fails alone, as one that cannot be run does."""

    class Picky(Runner):
        async def prepare(self, payloads: Sequence[Any], rows: int, length: int) -> object:
            return poisoned(1)(payloads)

        async def run(self, payloads: Sequence[Any], rows: int, length: int, prepared: object = None) -> Outcome:
            await self.prepare(payloads, rows, length)
            return await super().run(payloads, rows, length, prepared)

    runner = Picky()
    batcher = make(runner)
    callers = await submit(batcher, 1, 2)
    batch = seal(batcher)
    await batcher.prepare(batch)
    assert batch.stage == "sealed"
    await batcher.run(batch)
    one, two = await outcomes(callers)
    assert isinstance(one, ValueError)
    assert two == 20
    assert runner.given == [None]


# Answers in order.


async def test_ordered_answers_wait_for_those_before_them() -> None:
    """Answers come in the order of the submits, across batches and buckets."""
    batcher = make(Runner(), ordered=True)
    callers = [(await submit(batcher, n, bucket=bucket))[0] for n, bucket in enumerate("abacb")]
    answered = []
    for _ in "abc":
        await batcher.run(seal(batcher))
        await settle()
        answered.append(done(callers))
    assert answered == ["0", "012", "01234"]
    assert await outcomes(callers) == [0, 10, 20, 30, 40]
    assert_empty(batcher)


async def test_ordered_errors_wait_for_those_before_them_too() -> None:
    """An item that failed hears of it when its turn comes, in halves as well."""
    batcher = make(Runner(poisoned(0, 2)), ordered=True)
    callers = [(await submit(batcher, n, bucket=bucket))[0] for n, bucket in enumerate("abaa")]
    await batcher.run(seal(batcher))
    await settle()
    assert done(callers) == "0"
    await batcher.run(seal(batcher))
    zero, one, two, three = await outcomes(callers)
    assert isinstance(zero, ValueError)
    assert isinstance(two, ValueError)
    assert [one, three] == [10, 30]
    assert_empty(batcher)


@pytest.mark.parametrize("how", ["left in the queue", "left while it ran", "expired"])
async def test_ordered_answers_do_not_wait_for_one_who_is_gone(how: str) -> None:
    """Whoever leaves or expires in front does not hold up those behind, and nothing of it stays."""
    timers, runner = Timers(), Runner()
    batcher = make(runner, timers, ordered=True)
    first = await submit(batcher, 9, bucket="b")
    (front,) = await submit(batcher, 0, bucket="a", deadline=timers() + 20)
    behind = await submit(batcher, 1, 2, bucket="b")
    await batcher.run(seal(batcher))  # they share the batch of the first
    await settle()
    assert done([front, *behind]) == ""
    runner.gate.clear()
    running = asyncio.create_task(batcher.run(seal(batcher))) if how == "left while it ran" else None
    await timers.elapse(20 if how == "expired" else 0)
    if how != "expired":
        front.cancel()
        await settle()
    assert done([front, *behind]) == "012"
    runner.gate.set()
    if running is not None:
        await running
    assert (await outcomes(first + behind)) == [90, 10, 20]
    await asyncio.wait([front])
    assert_empty(batcher)


async def test_ordered_and_interrupted_everybody_is_answered() -> None:
    """If the task that runs ends, results that waited for their turn come out behind the errors in front of them."""
    runner = Runner()
    batcher = make(runner, ordered=True)
    callers = [(await submit(batcher, n, bucket=bucket))[0] for n, bucket in enumerate("ab")]
    front, behind = seal(batcher), seal(batcher)
    await batcher.run(behind)
    await settle()
    assert done(callers) == ""
    runner.gate.clear()
    running = asyncio.create_task(batcher.run(front))
    await settle()
    running.cancel()
    interrupted, ten = await outcomes(callers)
    assert isinstance(interrupted, RuntimeError)
    assert ten == 10
    assert_empty(batcher)


# Deadlines, timeouts and delays.


async def test_full_queue_is_refused_at_once_with_a_prediction() -> None:
    """Past its capacity a submit raises QueueFull without waiting; retry_after is what the waiting batches take."""
    clock = Clock()

    def half_a_second(batch: Sequence[int]) -> Outcome:
        clock.advance(0.5)
        return batch

    batcher = make(Runner(half_a_second), clock, max_rows=2, capacity=4)
    callers = await submit(batcher, 1, rows=2)
    await serve(batcher)
    callers += await submit(batcher, 1, 2, rows=2)
    with pytest.raises(QueueFull) as refused:
        await batcher.submit(3)
    assert refused.value.retry_after == pytest.approx(2 * 0.5)
    assert batcher.journal.refused == {"QueueFull": 1}
    await serve(batcher)
    assert await outcomes(callers) == [1, 1, 2]
    assert_empty(batcher)


def futures(count: int) -> list[asyncio.Future[Any]]:
    return [asyncio.get_running_loop().create_future() for _ in range(count)]


async def test_several_are_queued_at_once_and_each_is_answered() -> None:
    """One batch, an item for each, and its own result or error for each."""
    runner = Runner(poisoned(2))
    batcher = make(runner)
    answers = futures(4)
    items = batcher.enqueue_all(answers, range(4))
    assert [isinstance(item, Item) and item.queued for item in items] == [True] * 4
    await serve(batcher)
    assert runner.batches[0] == [0, 1, 2, 3]
    assert [answer.result() for answer in answers if answer is not answers[2]] == [0, 10, 30]
    assert isinstance(answers[2].exception(), ValueError)
    assert_empty(batcher)


@pytest.mark.parametrize("bucket", ["", None])
async def test_of_several_those_that_have_room_are_queued(bucket: str | None) -> None:
    """The others are refused, each with an error of its own, and counted."""
    runner = Runner()
    batcher = make(runner, max_rows=4, capacity=5)
    answers = futures(4)
    items = batcher.enqueue_all(answers, range(4), 2, bucket)
    assert [type(item) for item in items] == [Item, Item, QueueFull, QueueFull]
    assert items[2] is not items[3]
    assert batcher.journal.refused == {"QueueFull": 2}
    await serve(batcher)
    assert [answer.done() for answer in answers] == [True, True, False, False]
    assert_empty(batcher)


async def test_several_with_a_deadline_are_late_without_a_lane() -> None:
    """Each gets DeadlineExceeded from the timer; what is late already is refused."""
    timers = Timers()
    batcher = make(Runner(), timers)
    answers = futures(2)
    batcher.enqueue_all(answers, range(2), 1, "", timers() + 1.0)
    await timers.elapse(1.0)
    assert [type(answer.exception()) for answer in answers] == [DeadlineExceeded] * 2
    assert [type(item) for item in batcher.enqueue_all(futures(1), [3], 1, "", timers())] == [DeadlineExceeded]
    assert_empty(batcher)


async def test_several_answers_keep_their_order() -> None:
    """Where the queue is ordered, those who came together are answered in their order, behind who came before."""
    batcher = make(Runner(poisoned(1)), ordered=True)
    answers, told = futures(4), []
    for answer in answers:
        answer.add_done_callback(lambda done: told.append(answers.index(done)))
    batcher.enqueue_all(answers[:1], [0])
    batcher.enqueue_all(answers[1:], [1, 2, 3])
    await serve(batcher)
    await settle()
    assert told == [0, 1, 2, 3]
    assert isinstance(answers[1].exception(), ValueError)
    assert_empty(batcher)


async def test_several_are_refused_by_a_queue_that_is_closed_or_cannot_hold_them() -> None:
    """With an error of its own for each."""
    batcher = make(Runner())
    for rows, length in ((0, 1), (33, 1), (1, 0)):
        refused = batcher.enqueue_all(futures(2), range(2), rows, "", math.inf, length)
        assert [type(each) for each in refused] == [ValueError] * 2
    batcher.close(lambda: RuntimeError("closed"))
    refused = batcher.enqueue_all(futures(2), range(2))
    assert [str(each) for each in refused] == ["closed"] * 2
    assert refused[0] is not refused[1]
    assert_empty(batcher)


async def test_a_full_queue_refuses_whoever_asks_before_submitting() -> None:
    """A front that asks first is told what a submit would be told, and it is counted."""
    clock = Clock()
    batcher = Batcher[int, int](Policy(4, capacity=4), Runner(), lambda: None, lambda: clock() + 7, clock)
    batcher.pending.cost.learn(1, 2.0)
    callers = await submit(batcher, 1, rows=4, nbytes=100)
    text = "the queue is full: 4 of 4 rows wait"
    with pytest.raises(QueueFull, match=f"^{text}$") as refused:
        batcher.refuse()
    assert refused.value.retry_after == pytest.approx(7 + 2)
    assert batcher.journal.refused == {"QueueFull": 1}
    await serve(batcher)
    await outcomes(callers)


async def test_a_deadline_that_cannot_be_met_is_refused_at_the_door() -> None:
    """Behind a lane that is busy for longer than a caller can wait it is refused, and told when it may come back."""
    clock = Clock()
    batcher = Batcher[int, int](Policy(4), Runner(), lambda: None, lambda: clock() + 7, clock)
    batcher.pending.cost.learn(1, 2.0)
    with pytest.raises(CannotMeetDeadline, match="the deadline is 8 s away, the answer is expected in 9 s") as refused:
        await batcher.submit(1, deadline=clock() + 8)
    assert refused.value.retry_after == pytest.approx(1)
    assert batcher.journal.refused == {"CannotMeetDeadline": 1}
    assert_empty(batcher)


async def test_a_deadline_that_passed_on_the_way_is_refused_at_the_door() -> None:
    """Who comes too late does not get into the queue."""
    clock = Clock()
    batcher = make(Runner(), clock)
    with pytest.raises(DeadlineExceeded):
        await batcher.submit(1, deadline=clock())
    assert batcher.journal.refused == {"DeadlineExceeded": 1}
    assert_empty(batcher)


async def test_a_passed_deadline_is_answered_without_running_the_model() -> None:
    """An item that is late when its batch is sealed gets DeadlineExceeded; its mates run without it."""
    clock, runner = Clock(), Runner()
    batcher = make(runner, clock)
    (late,) = await submit(batcher, 1, deadline=clock() + 60)
    (mate,) = await submit(batcher, 2, deadline=clock() + 90)
    clock.advance(60)
    await serve(batcher)
    with pytest.raises(DeadlineExceeded):
        await late
    assert await mate == 20
    assert runner.batches == [[2]]


async def test_when_all_are_late_nothing_is_run() -> None:
    """If everything that waited is late when the lane looks, there is no batch."""
    clock, runner = Clock(), Runner()
    batcher = make(runner, clock)
    (late,) = await submit(batcher, 1, deadline=clock() + 60)
    clock.advance(61)
    assert batcher.urgency() == math.inf
    assert batcher.seal() is None
    with pytest.raises(DeadlineExceeded):
        await late
    assert runner.batches == []
    assert_empty(batcher)


async def test_a_deadline_passes_while_the_lane_is_busy() -> None:
    """The answer to a late item does not wait for the lane: a timer gives it, one for all items."""
    timers = Timers()
    batcher = make(Runner(), timers)
    callers = [(await submit(batcher, n, deadline=timers() + s))[0] for n, s in enumerate((20, 10, 60))]
    assert timers.armed == [timers() + 10]
    await timers.elapse(9.9)
    assert done(callers) == ""
    await timers.elapse(0.1)
    assert done(callers) == "1"
    await timers.elapse(10)
    assert done(callers) == "01"
    for caller in callers[:2]:
        with pytest.raises(DeadlineExceeded, match="the deadline passed, or could no longer be met, while"):
            await caller
    assert batcher.journal.expired == 2
    await serve(batcher)
    assert await callers[2] == 20
    await timers.elapse(100)
    assert timers.armed == []
    assert_empty(batcher)


async def test_what_could_not_be_answered_in_time_is_answered_before_its_deadline() -> None:
    """A caller hears that it is too late as soon as that is so: when a batch would no longer be done in time."""
    timers, runner = Timers(), Runner()
    batcher = make(runner, timers)
    batcher.pending.cost.learn(1, 3.0)
    (caller,) = await submit(batcher, 1, deadline=timers() + 10)
    await timers.elapse(7)
    with pytest.raises(DeadlineExceeded):
        await caller
    assert runner.batches == []


async def test_a_timeout_expires_in_tritons_words() -> None:
    """What waited longer than its level allows is refused with the text that Triton's clients know."""
    timers = Timers()
    batcher = make(Runner(), timers, levels=(Level(timeout=5, override=True),))
    callers = await submit(batcher, 1) + await submit(batcher, 2, timeout=2)
    await timers.elapse(2)
    assert done(callers) == "1"
    await timers.elapse(3)
    for caller in callers:
        with pytest.raises(DeadlineExceeded, match=r"^Request timeout expired$"):
            await caller
    assert batcher.journal.expired == 2


async def test_a_short_deadline_does_not_wait_for_company() -> None:
    """Under a long delay an item whose deadline is near is run just in time, instead of being answered too late."""
    timers, wakes = Timers(), []
    policy = Policy(4, max_delay=30.0)
    batcher = Batcher[int, int](policy, Runner(), lambda: wakes.append(timers()), clock=timers)
    batcher.pending.cost.learn(1, 0.01)
    start = timers()
    (caller,) = await submit(batcher, 1, deadline=start + 0.05)
    assert batcher.urgency() == math.inf
    await timers.elapse(0.039)
    assert len(wakes) == 2
    assert wakes[1] < start + 0.04
    await batcher.run(seal(batcher))
    assert await caller == 10
    assert batcher.journal.reasons == {"deadline": 1}


@pytest.mark.parametrize("rows", [0, -1, 33])
async def test_rows_that_no_batch_can_hold_are_refused(rows: int) -> None:
    """An item of no rows, or of more than a batch, is a mistake of the caller's, not a queue that never empties."""
    with pytest.raises(ValueError, match="rows must be 1 to 32"):
        await make(Runner()).submit(1, rows=rows)


async def test_rows_of_no_length_are_refused() -> None:
    """Nor is there an item that is no work."""
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        await make(Runner()).submit(1, length=0)


# The end.


async def test_a_run_that_is_ended_answers_its_batch() -> None:
    """If the task that runs is cancelled in the middle of a batch, its items get an error, not silence."""
    runner = Runner()
    runner.gate.clear()
    batcher = make(runner)
    callers = await submit(batcher, 1, 2)
    running = asyncio.create_task(batcher.run(seal(batcher)))
    await settle()
    running.cancel()
    one, two = await outcomes(callers)
    assert isinstance(one, RuntimeError)
    assert str(one) == "the batch was interrupted"
    assert one is not two
    assert running.cancelled()
    assert batcher.pending.cost.samples == 0
    assert_empty(batcher)


async def test_a_run_that_is_ended_keeps_what_was_answered() -> None:
    """The half that was answered before the end has its results."""

    def behave(batch: Sequence[int]) -> Outcome:
        if len(batch) == 2:
            runner.gate.clear()
        return poisoned(3)(batch)

    runner = Runner(behave)
    batcher = make(runner)
    callers = await submit(batcher, 0, 1, 2, 3)
    running = asyncio.create_task(batcher.run(seal(batcher)))
    await settle()
    assert done(callers) == "01"
    running.cancel()
    await asyncio.wait([running])
    results = await outcomes(callers)
    assert [type(result) for result in results] == [int, int, RuntimeError, RuntimeError]


@pytest.mark.parametrize("max_delay", [0.0, 30.0])
async def test_close_answers_what_waits_and_what_comes(max_delay: float) -> None:
    """After close every waiting item, every prepared one and every later submit gets an error of its own."""
    timers, runner = Timers(), Runner()
    batcher = make(runner, timers, max_rows=2, max_delay=max_delay)
    callers = await submit(batcher, 0, 1, rows=2, deadline=timers() + 60)
    callers += await submit(batcher, 2, deadline=timers() + 90)
    runner.gate.clear()
    running = asyncio.create_task(batcher.run(seal(batcher)))
    ahead = seal(batcher)
    preparing = asyncio.create_task(batcher.prepare(ahead))
    await settle()
    batcher.close(lambda: ConnectionError("gone"))
    await settle()
    assert done(callers) == "12"
    assert timers.armed == []
    runner.gate.set()
    await running
    await preparing
    await batcher.run(ahead)
    answer, *errors = await outcomes([*callers, *await submit(batcher, 3)])
    assert answer == 0
    assert [str(error) for error in errors] == ["gone"] * 3
    assert len({id(error) for error in errors}) == 3
    assert runner.batches == [[0]]
    assert_empty(batcher)


async def test_what_runs_when_it_is_closed_and_is_ended_gets_that_error() -> None:
    """Who is interrupted by the end of the service is told so."""
    runner = Runner()
    runner.gate.clear()
    batcher = make(runner)
    callers = await submit(batcher, 1)
    running = asyncio.create_task(batcher.run(seal(batcher)))
    await settle()
    batcher.close(lambda: ConnectionError("gone"))
    assert done(callers) == ""
    running.cancel()
    with pytest.raises(ConnectionError, match="gone"):
        await callers[0]
    assert_empty(batcher)


# What it learns, and tells.


def takes(clock: Clock, seconds: float, behave: Callable[[Sequence[int]], Outcome] = times_ten) -> Any:
    """Each run takes that long."""

    def slow(batch: Sequence[int]) -> Outcome:
        clock.advance(seconds)
        return behave(batch)

    return slow


async def test_cost_is_learned_from_whole_batches() -> None:
    """A batch that failed, and was run in parts, says nothing about what a batch takes."""
    clock = Clock()
    batcher = make(Runner(takes(clock, 3, poisoned(1))), clock)
    callers = await submit(batcher, 1, 2)
    await serve(batcher)
    assert batcher.pending.cost.samples == 0
    assert batcher.journal.latest[-1].took == 9
    callers += await submit(batcher, 3, 4)
    await serve(batcher)
    await outcomes(callers)
    assert batcher.pending.cost.samples == 1
    assert batcher.pending.cost.seconds(2) == pytest.approx(3)


async def test_preparation_is_not_counted_twice() -> None:
    """Stacking costs what it costs, running what it costs: whether a batch was stacked ahead changes neither."""
    clock, runner = Clock(), Runner()
    runner.preparation.learn(2, 1.0)
    batcher = make(runner, clock)
    callers = []
    for ahead in (False, True, False, True):
        callers += await submit(batcher, 1, 2)
        batch = seal(batcher)
        if ahead:
            await batcher.prepare(batch)
        assert batch.expected == pytest.approx(batch.predicted + (not ahead))
        runner.behave = takes(clock, 3 if ahead else 4)
        await batcher.run(batch)
        assert batcher.pending.cost.seconds(2) == pytest.approx(3)
    await outcomes(callers)


async def test_a_batch_that_was_quicker_than_its_stacking_costs_nothing() -> None:
    """A prediction for the stacking that is too high makes no cost negative."""
    clock, runner = Clock(), Runner()
    runner.preparation.learn(1, 1.0)
    batcher = make(runner, clock)
    callers = await submit(batcher, 1)
    await serve(batcher)
    await outcomes(callers)
    assert batcher.pending.cost.seconds(1) == 0


async def test_the_report_is_plain_and_says_what_waits_and_what_it_costs() -> None:
    """What waits, what a batch costs and what happened, as JSON has it."""
    clock = Clock()
    batcher = make(Runner(takes(clock, 0.5)), clock)
    callers = await submit(batcher, 1, 2)
    await serve(batcher)
    callers += await submit(batcher, 3, rows=2, nbytes=100)
    report = batcher.report()
    assert json.loads(json.dumps(report)) == report
    assert report["queue"] == {"items": 1, "rows": 2, "bytes": 100, "drain_seconds": pytest.approx(0.5)}
    assert report["cost"]["seconds_per_batch"] + 2 * report["cost"]["seconds_per_unit"] == pytest.approx(0.5)
    assert report["cost"]["batches_learned_from"] == 1
    assert report["cost"]["largest"] is None
    assert report["batches"]["by_rows"] == {"2": 1}
    await serve(batcher)
    await outcomes(callers)


# Everything at once.


@pytest.mark.parametrize("seed", range(60))
async def test_every_submit_has_exactly_one_outcome(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever happens in whatever order: everybody gets an own result, an error or is cancelled; and nothing stays."""
    await muddle(random.Random(seed))
    gc.collect()
    assert caplog.text == ""


async def muddle(dice: random.Random) -> None:
    """Submits, cancellations, failures, batches sealed, prepared, run and interrupted, a close, as the dice fall."""
    timers = Timers()
    bad, large, left_early = set[int](), set[int](), set[int]()

    def behave(batch: Sequence[int]) -> Outcome:
        timers.advance(dice.choice([0, 0.1, 3]))
        return fits(32, bad=list(large))(batch) and poisoned(*bad)(batch)

    runner = Runner(behave)
    batcher = make(
        runner, timers, max_rows=8, capacity=20, ordered=dice.random() < 0.5, max_delay=dice.choice([0.0, 0.0, 2.0])
    )
    callers: list[Caller] = []
    sealed: list[Batch[Any, Any]] = []
    tasks: list[asyncio.Task[None]] = []
    kinds = [alike(rows, bucket) for rows in (1, 2) for bucket in ("a", "b")]
    kinds.append(alike(1, "a", timers() + 5))
    closed = False

    async def as_others(n: int, kind: Alike) -> Any:
        """Ask with `enqueue_alike`."""
        answer = asyncio.get_running_loop().create_future()
        batcher.enqueue_alike(answer, n, kind)
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled():
                answer.exception()
            else:
                batcher.withdraw(answer)
            raise

    for _ in range(dice.randrange(120)):
        match dice.choice("ssssssccbl" + "kkkk" + "aaaaprrr" + "iottgg" + "x" * (dice.random() < 0.1)):
            case "s":
                n = len(callers)
                (bad if dice.random() < 0.1 else large if dice.random() < 0.05 else set()).add(n)
                deadline = timers() + dice.choice([math.inf, math.inf, 2, 20])
                bucket, rows = dice.choice(["a", "a", "b", None]), dice.randint(1, 3)
                callers.append(asyncio.create_task(batcher.submit(n, rows, bucket, deadline, nbytes=rows)))
            case "k":
                for _ in range(dice.randint(1, 3)):
                    n = len(callers)
                    (bad if dice.random() < 0.1 else large if dice.random() < 0.05 else set()).add(n)
                    callers.append(asyncio.create_task(as_others(n, dice.choice(kinds))))
            case "c" if callers:
                n = dice.randrange(len(callers))
                callers[n].cancel()
                left_early.add(n)
            case "a" if batcher.urgency() < math.inf and (batch := batcher.seal()):
                sealed.append(batch)
            case "p" if sealed and sealed[-1].stage == "sealed":
                tasks.append(asyncio.create_task(batcher.prepare(sealed[-1])))
                await asyncio.sleep(0)
            case "r" if sealed:
                tasks.append(asyncio.create_task(batcher.run(sealed.pop(0))))
                await asyncio.sleep(0)
            case "i" if tasks and dice.random() < 0.3:
                tasks[-1].cancel()
            case "o":
                runner.gate.set() if dice.random() < 0.7 else runner.gate.clear()
            case "t":
                await timers.elapse(dice.random())
            case "g":
                await settle()
            case "x":
                closed = True
                batcher.close(lambda: ConnectionError("gone"))
    runner.gate.set()
    await settle()
    for batch in sealed:
        await batcher.run(batch)
    while batcher.urgency(drain=True) < math.inf and (batch := batcher.seal(drain=True)):
        await batcher.run(batch)
    await settle()
    assert done(callers) == "".join(map(str, range(len(callers))))
    for n, result in enumerate(await outcomes(callers)):
        match result:
            case asyncio.CancelledError():
                assert n in left_early
            case ConnectionError():
                assert closed
            case ValueError():
                assert n in bad
            case OutOfMemory():
                assert n in large
            case Exception():
                assert isinstance(result, QueueFull | DeadlineExceeded) or str(result) == "the batch was interrupted"
            case _:
                assert result == n * 10
                assert n not in bad | large
    await asyncio.gather(*tasks, return_exceptions=True)
    assert_empty(batcher)
    await timers.elapse(100)
    assert timers.armed == []


# What a lane, or a machine, makes of it.


async def test_seal_alone_takes_out_what_is_late() -> None:
    """A lane with one model does not ask how urgent it is: what is late is not run for all that."""
    clock, runner = Clock(), Runner()
    batcher = make(runner, clock)
    (late,) = await submit(batcher, 1, deadline=clock() + 60)
    (mate,) = await submit(batcher, 2, deadline=clock() + 90)
    clock.advance(60)
    batch = batcher.seal()
    assert batch is not None
    await batcher.run(batch)
    with pytest.raises(DeadlineExceeded):
        await late
    assert await mate == 20
    assert runner.batches == [[2]]


async def test_a_half_is_padded_to_the_grid_for_the_rows_that_somebody_waits_for() -> None:
    """Rows count, not items, and none of a caller who left meanwhile; what is padded is a shape of the grid."""
    runner = Runner(poisoned(0))
    runner.gate.clear()
    batcher = make(runner, max_rows=16, row_grid=(4, 8, 16))
    callers = [caller for n in range(4) for caller in await submit(batcher, n, rows=3)]
    running = asyncio.create_task(batcher.run(seal(batcher)))
    await settle()
    callers[1].cancel()
    await settle()
    runner.gate.set()
    await running
    assert runner.batches == [[0, 1, 2, 3], [0], [2, 3]]
    assert runner.shapes == [(16, 1), (4, 1), (8, 1)]
    await outcomes(callers)


async def test_a_larger_batch_is_tried_after_128_that_fit_then_after_256() -> None:
    """So many since the bound was last moved, down or up; none of those before counts."""
    runner = Runner(fits(1))
    batcher = make(runner, max_rows=4)

    async def batches(count: int, rows: int = 1) -> float:
        """What the bound is after so many."""
        for _ in range(count):
            callers = await submit(batcher, *range(rows))
            await serve(batcher)
            await outcomes(callers)
        return batcher.pending.largest

    assert await batches(1, rows=2) == 1
    assert await batches(127) == 1
    assert await batches(1) == 2
    assert await batches(100) == 2
    assert await batches(1, rows=2) == 1
    assert await batches(255) == 1
    assert await batches(1) == 2


async def test_a_bound_that_binds_nothing_any_more_is_lifted() -> None:
    """Once twice what ran out of memory would fit, it is as if memory had never run out: the report says none."""
    runner = Runner(fits(3))
    batcher = make(runner, max_rows=4)
    await submit(batcher, 1, 2, 3, 4)
    await serve(batcher)
    assert batcher.report()["cost"]["largest"] == 2
    for bound in (4, None, None):
        for _ in range(RETRY_AFTER):
            callers = await submit(batcher, 1)
            await serve(batcher)
            await outcomes(callers)
        assert batcher.report()["cost"]["largest"] == bound


@pytest.mark.parametrize("way", ["left", "expired"])
async def test_who_went_is_forgotten_though_answers_keep_their_order(way: str) -> None:
    """Behind a batch that takes long, any number may come and go: nothing of theirs is kept until it ends."""
    timers, runner = Timers(), Runner()
    batcher = make(runner, timers, ordered=True, max_rows=1)
    first = await submit(batcher, 1)
    batch = seal(batcher)
    for number in range(20):
        callers = await submit(batcher, number, deadline=timers() + (1 if way == "expired" else 1e9))
        if way == "left":
            callers[0].cancel()
        await timers.elapse(2)
        await outcomes(callers)
    assert len(batcher._unanswered) == 1
    await batcher.run(batch)
    assert await outcomes(first) == [10]
    assert_empty(batcher)


async def test_who_left_a_batch_that_was_stacked_is_not_late_as_well() -> None:
    """Each request goes one way: this one is counted where it left."""
    timers, runner = Timers(), Runner()
    runner.preparation.learn(1, 0.5)
    batcher = make(runner, timers)
    callers = await submit(batcher, 1, deadline=timers() + 5) + await submit(batcher, 2)
    batch = seal(batcher)
    await batcher.prepare(batch)
    callers[0].cancel()
    await timers.elapse(6)
    await batcher.run(batch)
    await outcomes(callers)
    assert (batcher.journal.expired, batcher.journal.left["sealed"]) == (0, 1)


async def test_what_was_stacked_is_let_go_before_the_halves_run() -> None:
    """Memory ran out: the stack of the whole batch must not be there when its halves are run."""

    class Stack:
        pass

    alive: list[bool] = []

    class Stacking(Runner):
        async def prepare(self, payloads: Sequence[Any], rows: int, length: int) -> object:
            stack = Stack()
            self.stack = weakref.ref(stack)
            return stack

        async def run(self, payloads: Sequence[Any], rows: int, length: int, prepared: object = None) -> Any:
            if prepared is not None:
                raise OutOfMemory("too much")
            alive.append(self.stack() is not None)
            return payloads

    runner = Stacking()
    runner.preparation.learn(1, 0.5)
    batcher = make(runner)
    callers = await submit(batcher, 1, 2)
    batch = seal(batcher)
    await batcher.prepare(batch)
    await batcher.run(batch)
    assert await outcomes(callers) == [1, 2]
    assert alive == [False, False]


async def test_a_lane_that_is_busy_counts_when_a_batch_is_sealed_ahead() -> None:
    """Free in 3 seconds, and each row takes one: two are answered in time, three are not. No company is waited for."""
    clock = Clock()
    policy = Policy(4, max_delay=100.0, patience=50.0)
    batcher: Batcher[Any, Any] = Batcher(policy, Runner(), lambda: None, lambda: clock() + 3, clock)
    batcher.pending.cost.b = 1.0
    callers = []
    for number in range(3):
        callers += await submit(batcher, number, deadline=clock() + 5.5 if number < 2 else math.inf)
    assert batcher.urgency() == clock() + 5.5
    batch = batcher.seal()
    assert batch is not None
    assert (len(batch.items), batch.reason) == (2, "deadline")
    batcher.close(lambda: NotImplementedError("over"))
    await outcomes(callers)


# Callers that wait in a way of their own.


class Letters:
    """An answer that is no future: whatever comes is told to `posted`, at once."""

    def __init__(self, posted: list[Any]) -> None:
        self.posted = posted
        self.gone = False

    def done(self) -> bool:
        return self.gone

    def set_result(self, result: Any) -> None:
        self.gone = True
        self.posted.append(result)

    def set_exception(self, exception: BaseException) -> None:
        self.gone = True
        self.posted.append(exception)

    def leave(self) -> None:
        self.gone = True


@pytest.mark.parametrize("ordered", [False, True])
async def test_any_answer_is_given_a_result_or_an_error(ordered: bool) -> None:
    """No task and no future is needed: what is queued with an answer is answered there, once, as its batch ends."""
    batcher, posted = make(Runner(poisoned(2)), ordered=ordered), list[Any]()
    for number in range(4):
        batcher.enqueue(Letters(posted), number)
    callers = await submit(batcher, 4)
    await batcher.run(seal(batcher))
    assert [str(each) for each in posted] == ["0", "10", "cannot take 2", "30"]
    assert await outcomes(callers) == [40]
    assert_empty(batcher)


async def test_what_is_refused_at_the_door_is_raised_and_not_answered() -> None:
    """A queue that is full, or closed, says so to whoever queues; the answer hears nothing."""
    batcher, posted = make(Runner(), capacity=32), list[Any]()
    batcher.enqueue(Letters(posted), 1, 32)
    with pytest.raises(QueueFull):
        batcher.enqueue(Letters(posted), 2)
    assert batcher.journal.refused == {"QueueFull": 1}
    batcher.close(lambda: ConnectionError("gone"))
    assert [str(each) for each in posted] == ["gone"]
    with pytest.raises(ConnectionError):
        batcher.enqueue(Letters(posted), 3)
    assert len(posted) == 1


async def test_an_answer_hears_that_its_deadline_passed() -> None:
    """From the timer, while nobody seals."""
    timers = Timers()
    batcher, posted = make(Runner(), timers), list[Any]()
    batcher.enqueue(Letters(posted), 1, deadline=timers() + 5)
    await timers.elapse(6)
    assert [type(each) for each in posted] == [DeadlineExceeded]
    assert_empty(batcher)


@pytest.mark.parametrize("ordered", [False, True])
async def test_forget_says_whether_it_waited(ordered: bool) -> None:
    """True: it is not run. False: a batch has it, whose other items never notice, or it was answered."""
    runner = Runner()
    batcher, posted = make(runner, max_rows=2, ordered=ordered), list[Any]()
    answers = [Letters(posted) for _ in range(4)]
    items = [batcher.enqueue(answer, number) for number, answer in enumerate(answers)]
    batch = seal(batcher)
    for place in (1, 2):
        answers[place].leave()
    assert [batcher.forget(items[1]), batcher.forget(items[2])] == [False, True]
    await batcher.run(batch)
    await serve(batcher)
    assert runner.batches == [[0, 1], [3]]
    assert posted == [0, 30]
    assert batcher.forget(items[0]) is False
    assert batcher.journal.left == left(queued=1, sealed=1, answered=1)
    assert_empty(batcher)


async def test_who_boards_is_told_once() -> None:
    """Right before its batch is run, not while it waits or is stacked, and not again when the halves are run."""
    boarded: list[int | str] = []

    def behave(batch: Sequence[int]) -> Outcome:
        boarded.append("run")
        return poisoned(1)(batch)

    runner = Runner(behave)
    runner.preparation.learn(1, 0.5)
    batcher = make(runner)
    callers = [(await submit(batcher, n, boarding=lambda _, n=n: boarded.append(n)))[0] for n in range(2)]
    callers += await submit(batcher, 2)
    batch = seal(batcher)
    await batcher.prepare(batch)
    assert boarded == []
    await batcher.run(batch)
    assert boarded == [0, 1, *["run"] * 5]
    assert [type(each) for each in await outcomes(callers)] == [int, ValueError, int]


async def test_who_left_or_is_late_does_not_board() -> None:
    """Whoever is answered before the batch begins is not told that it does; nobody is, if all are."""
    timers, runner, boarded = Timers(), Runner(), list[int]()
    runner.preparation.learn(1, 0.5)
    batcher = make(runner, timers)
    callers = []
    for number, deadline in enumerate((timers() + 5, math.inf, math.inf)):
        boarding = lambda _, n=number: boarded.append(n)  # noqa: E731
        callers += await submit(batcher, number, deadline=deadline, boarding=boarding)
    batch = seal(batcher)
    await batcher.prepare(batch)
    callers[1].cancel()
    await timers.elapse(6)
    await batcher.run(batch)
    assert boarded == [2]
    (alone,) = await submit(batcher, 3, boarding=lambda _: boarded.append(3))
    batch = seal(batcher)
    alone.cancel()
    await settle()
    await batcher.run(batch)
    assert boarded == [2]
    await outcomes([*callers, alone])


# What comes in one turn of the event loop.


def ask(batcher: Batcher[Any, Any], posted: list[Any], kind: Alike, *payloads: int) -> list[Letters]:
    answers = [Letters(posted) for _ in payloads]
    for answer, payload in zip(answers, payloads, strict=True):
        batcher.enqueue_alike(answer, payload, kind)
    return answers


async def test_who_comes_in_one_turn_is_queued_by_the_end_of_it() -> None:
    """At once, though nobody looks; the lane is woken by the first, so that it looks when all are there."""
    woken: list[int] = []
    posted = list[Any]()
    batcher: Batcher[Any, Any] = Batcher(Policy(32, capacity=64), Runner(), lambda: woken.append(len(batcher.pending)))
    ask(batcher, posted, alike(), 1, 2, 3)
    assert (len(batcher.pending), woken) == (0, [0])
    await asyncio.sleep(0)
    assert (len(batcher.pending), woken) == (3, [0, 3])
    await serve(batcher)
    assert posted == [10, 20, 30]
    assert_empty(batcher)


@pytest.mark.parametrize("how", ["seal", "urgency", "report", "enqueue", "enqueue_all", "submit", "another kind"])
async def test_whoever_looks_or_comes_finds_them_queued(how: str) -> None:
    """In the same turn: what came before is before it in line, and is sealed and counted as if it had waited."""
    runner, posted = Runner(), list[Any]()
    batcher = make(runner)
    ask(batcher, posted, alike(), 1, 2)
    callers: list[Caller] = []
    match how:
        case "urgency":
            assert batcher.urgency() < math.inf
        case "report":
            assert batcher.report()["queue"]["items"] == 2
        case "enqueue":
            batcher.enqueue(Letters(posted), 3)
        case "enqueue_all":
            batcher.enqueue_all([Letters(posted)], [3])
        case "submit":
            callers = [asyncio.create_task(batcher.submit(3))]
            await asyncio.sleep(0)
        case "another kind":
            ask(batcher, posted, alike(), 3)
    batch = batcher.seal()
    assert batch is not None
    assert [item.payload for item in batch.items] == [1, 2, *[3] * (how not in ("seal", "urgency", "report"))]
    await batcher.run(batch)
    assert await outcomes(callers) == [30] * len(callers)
    assert posted == [10, 20, *[30] * (len(batch.items) - 2 - len(callers))]
    assert_empty(batcher)


async def test_kinds_take_turns_in_one_turn() -> None:
    """Each is queued with its own arguments, in the order in which all of them came."""
    runner, posted = Runner(), list[Any]()
    batcher = make(runner)
    one, three = alike(), alike(3, "b")
    for number in range(6):
        ask(batcher, posted, three if number % 2 else one, number)
    await asyncio.sleep(0)
    assert [(item.payload, item.rows, item.bucket) for item in batcher.pending] == [
        (0, 1, ()), (1, 3, "b"), (2, 1, ()), (3, 3, "b"), (4, 1, ()), (5, 3, "b"),
    ]  # fmt: skip
    assert batcher.pending.rows == 12
    await serve(batcher)
    assert sorted(posted) == [0, 10, 20, 30, 40, 50]
    assert_empty(batcher)


async def test_those_without_room_are_told_so() -> None:
    """Each its own error, at the end of the turn; the others are answered. Whoever left is told nothing."""
    runner, posted, refused = Runner(), list[Any](), list[Any]()
    batcher = make(runner, max_rows=4, capacity=5)
    kind = alike(2)
    ask(batcher, posted, kind, 1, 2)
    ask(batcher, refused, kind, 3, 4)
    gone = ask(batcher, refused, kind, 5)
    gone[0].leave()
    assert refused == []
    await asyncio.sleep(0)
    assert [type(each) for each in refused] == [QueueFull] * 2
    assert refused[0] is not refused[1]
    assert batcher.journal.refused == {"QueueFull": 3}
    assert not batcher.full
    await serve(batcher)
    assert posted == [10, 20]
    assert_empty(batcher)


async def test_a_queue_is_full_when_nothing_fits_any_more() -> None:
    """By its rows, or by its bytes."""
    for knobs, kind in (({"capacity": 2, "max_rows": 2}, (1, "")), ({"capacity_bytes": 16}, (1, "", math.inf, 1, 8))):
        batcher = make(Runner(), **knobs)  # type: ignore[arg-type]
        assert not batcher.full
        ask(batcher, [], kind, 1)
        await asyncio.sleep(0)
        assert not batcher.full
        ask(batcher, [], kind, 2)
        await asyncio.sleep(0)
        assert batcher.full
        with pytest.raises(QueueFull):
            batcher.refuse()


async def test_what_no_batch_can_hold_is_told_so() -> None:
    """A kind that was known when larger batches were allowed is an error of each, not of the queue."""
    batcher, posted = make(Runner()), list[Any]()
    ask(batcher, posted, alike(33), 1, 2)
    await asyncio.sleep(0)
    assert [str(each) for each in posted] == ["rows must be 1 to 32, got 33"] * 2
    assert_empty(batcher)


@pytest.mark.parametrize("when", ["before", "in the same turn", "after"])
async def test_alike_and_a_queue_that_is_closed(when: str) -> None:
    """Whenever that is, each is told, once, with an error of its own."""
    batcher, posted = make(Runner()), list[Any]()
    if when == "before":
        batcher.close(lambda: ConnectionError("gone"))
    ask(batcher, posted, alike(), 1, 2)
    if when == "in the same turn":
        batcher.close(lambda: ConnectionError("gone"))
        assert len(posted) == 2
    await asyncio.sleep(0)
    if when == "after":
        batcher.close(lambda: ConnectionError("gone"))
    await settle()
    assert [str(each) for each in posted] == ["gone", "gone"]
    assert posted[0] is not posted[1]
    assert_empty(batcher)


async def test_alike_in_order() -> None:
    """Where answers keep the order of their questions, those of one turn do, among all others."""
    posted = list[Any]()
    batcher = make(Runner(poisoned(2)), ordered=True)
    ask(batcher, posted, alike(1, "a"), 1)
    batcher.enqueue(Letters(posted), 2, 1, "b")
    ask(batcher, posted, alike(1, "c"), 3)
    first, second, third = (seal(batcher) for _ in range(3))
    for batch in (third, second):
        await batcher.run(batch)
        assert posted == []
    await batcher.run(first)
    assert [str(each) for each in posted] == ["10", "cannot take 2", "30"]
    assert_empty(batcher)


async def test_alike_with_a_deadline_are_late_without_a_lane() -> None:
    """The timer is set for them, too."""
    timers, posted = Timers(), list[Any]()
    batcher = make(Runner(), timers)
    ask(batcher, posted, alike(deadline=timers() + 1), 1, 2)
    await timers.elapse(0.5)
    assert posted == []
    await timers.elapse(1)
    assert [type(each) for each in posted] == [DeadlineExceeded] * 2
    assert_empty(batcher)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("stage", ["in the same turn", *STAGES])
async def test_who_came_alike_may_leave_at_any_stage(stage: str, ordered: bool) -> None:
    """It is counted there, once; its mates are answered; and it is told nothing."""
    runner, posted, own = Runner(), list[Any](), list[Any]()
    batcher = make(runner, ordered=ordered)
    kind = alike()
    ask(batcher, posted, kind, 1)
    (answer,) = ask(batcher, own, kind, 2)
    ask(batcher, posted, kind, 3)

    def reach(reached: str) -> None:
        if reached == stage:
            answer.leave()
            batcher.withdraw(answer)

    reach("in the same turn")
    await asyncio.sleep(0)
    reach("queued")
    batch = seal(batcher)
    runner.gate.clear()
    preparing = asyncio.create_task(batcher.prepare(batch))
    await settle()
    reach("preparing")
    runner.gate.set()
    await preparing
    reach("sealed")
    runner.gate.clear()
    running = asyncio.create_task(batcher.run(batch))
    await settle()
    reach("running")
    runner.gate.set()
    await running
    reach("answered")
    waited = stage in ("in the same turn", "queued")
    assert batcher.journal.left == left(**{"queued" if waited else stage: 1})
    assert runner.batches == [[1, 3] if waited else [1, 2, 3]]
    assert (posted, own) == ([10, 30], [20] * (stage == "answered"))
    assert_empty(batcher)


async def test_who_leaves_while_another_comes_is_the_one_who_left() -> None:
    """Answers are told apart by themselves, though they may be equal, and their payloads may be the same."""
    posted = list[Any]()
    batcher, kind = make(Runner()), alike()

    class Equal(Letters):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    answers = [Equal(posted) for _ in range(3)]
    for answer in answers:
        batcher.enqueue_alike(answer, 1, kind)
    answers[1].leave()
    batcher.withdraw(answers[1])
    assert [item.answer is answer for item, answer in zip(batcher.pending, answers[::2], strict=True)] == [True, True]
    await serve(batcher)
    assert posted == [10, 10]


async def test_a_result_that_waits_for_its_turn_may_be_withdrawn() -> None:
    """Where answers keep their order: it is not given, and nobody waits for it any more."""
    posted, own = list[Any](), list[Any]()
    batcher = make(Runner(), ordered=True)
    ask(batcher, posted, alike(1, "a"), 1)
    (answer,) = ask(batcher, own, alike(1, "b"), 2)
    ask(batcher, posted, alike(1, "c"), 3)
    first, second, third = (seal(batcher) for _ in range(3))
    await batcher.run(second)
    await batcher.run(third)
    assert (posted, own, len(batcher._held)) == ([], [], 2)
    answer.leave()
    batcher.withdraw(answer)
    assert len(batcher._held) == 1
    assert batcher.journal.left == left(answered=1)
    await batcher.run(first)
    assert (posted, own) == ([10, 30], [])
    assert_empty(batcher)


@pytest.mark.parametrize("how", ["answered", "fails", "refused", "closed", "withdrawn"])
async def test_what_came_alike_is_let_go_of_without_the_collector(how: str) -> None:
    """Neither the queue, nor an error, nor a cycle holds what was asked, or who asked it."""

    def behave(batch: Sequence[Any]) -> Outcome:
        if how == "fails":
            raise ValueError("cannot take it")
        return [0 for _ in batch]

    runner = Runner(behave)
    batcher = make(runner, max_rows=2, capacity=2)
    watched: list[weakref.ref[Any]] = []
    gc.collect()
    gc.disable()
    try:
        if how == "refused":
            batcher.enqueue_all(futures(2), [1, 2])

        def come() -> list[Letters]:
            kind, answers = alike(), [Letters([]), Letters([])]
            for answer in answers:
                payload = Payload()
                watched.extend([weakref.ref(payload), weakref.ref(answer)])
                batcher.enqueue_alike(answer, payload, kind)
            return answers

        answers = come()
        if how == "closed":
            batcher.close(lambda: ValueError("closed"))
        if how == "withdrawn":
            for answer in answers:
                answer.leave()
                batcher.withdraw(answer)
            del answer
        await settle()
        await serve(batcher)
        assert all(answer.done() for answer in answers)
        answers.clear()
        runner.batches.clear()
        await settle()
        assert [reference() for reference in watched] == [None] * 4
    finally:
        gc.enable()


async def test_those_who_wait_can_be_looked_at() -> None:
    """`pending` gives them in the order of its line, without taking any out."""
    batcher = make(Runner())
    ask(batcher, [], alike(), 3, 1, 2)
    await asyncio.sleep(0)
    assert [item.payload for item in batcher.pending] == [3, 1, 2]
    assert len(batcher.pending) == 3
