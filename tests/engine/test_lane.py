"""Lane: one coroutine, the most urgent batch of all models, as late as possible."""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from batching import Batcher, CannotMeetDeadline, Cost, Policy
from batching.pending import WORTH_PREPARING
from engine.errors import NotReady
from engine.lane import Lane
from tests.timing import Clock, Timers, settle


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    lane = Lane("test")
    yield lane
    await lane.stop(10)


class Runner:
    """A model that answers what it is asked, when its gate is open."""

    def __init__(self) -> None:
        self.preparation = Cost()
        self.batches: list[list[Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def prepare(self, payloads: Sequence[Any], rows: int, length: int) -> object:
        return list(payloads)

    async def run(self, payloads: Sequence[Any], rows: int, length: int, prepared: object = None) -> Sequence[Any]:
        self.batches.append(list(payloads))
        await self.gate.wait()
        return payloads


class Timed(Runner):
    """One that takes its time, and whose batcher knows how long: so much to stack a batch, so much to run it.

    Attributes:
        log: what began when, in seconds since it was made, and with which batch.
    """

    def __init__(self, timers: Timers, stacking: float, running: float) -> None:
        super().__init__()
        self.log: list[tuple[str, float, list[Any]]] = []
        self.timers = timers
        self.start = timers()
        self.stacking = stacking
        self.running = running
        self.preparation.learn(1, stacking)

    async def prepare(self, payloads: Sequence[Any], rows: int, length: int) -> object:
        self._note("stack", payloads)
        await asyncio.sleep(self.stacking)
        return list(payloads)

    async def run(self, payloads: Sequence[Any], rows: int, length: int, prepared: object = None) -> Sequence[Any]:
        assert prepared in (None, payloads)
        self._note("run" if prepared else "stack and run", payloads)
        await asyncio.sleep(self.running + (0 if prepared else self.stacking))
        return payloads

    def _note(self, what: str, payloads: Sequence[Any]) -> None:
        self.log.append((what, round(self.timers() - self.start, 6), list(payloads)))


def attach(
    lane: Lane, runner: Runner, clock: Clock | None = None, max_rows: int = 4, **knobs: Any
) -> Batcher[Any, Any]:
    policy = Policy(max_rows, **knobs)
    free_at = lambda: lane.free_at  # noqa: E731
    batcher: Batcher[Any, Any] = (
        Batcher(policy, runner, lane.wake, free_at, clock) if clock else Batcher(policy, runner, lane.wake, free_at)
    )
    if isinstance(runner, Timed):
        batcher.pending.cost.learn(1, runner.running)
    lane.attach(batcher)
    return batcher


async def submit(batcher: Batcher[Any, Any], *payloads: Any, **item: Any) -> list[asyncio.Task[Any]]:
    """One caller for each payload, all of whom wait."""
    callers = [asyncio.create_task(batcher.submit(payload, **item)) for payload in payloads]
    await settle()
    return callers


# Which batch, and when.


async def test_a_lone_request_waits_for_no_timer(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a free lane a request is answered without the event loop ever being asked for a timer."""
    batcher = attach(lane, Runner())
    lane.start()
    await settle()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda *_: pytest.fail("a timer"))
    monkeypatch.setattr(loop, "call_at", lambda *_: pytest.fail("a timer"))
    (caller,) = await submit(batcher, 1)
    assert caller.done()
    assert caller.result() == 1
    monkeypatch.undo()


async def test_what_arrives_while_the_lane_is_busy_shares_the_next_batch(lane: Lane) -> None:
    """A batch is sealed when the lane is free, not when its first item comes."""
    runner = Runner()
    runner.gate.clear()
    batcher = attach(lane, runner)
    lane.start()
    callers = [(await submit(batcher, number))[0] for number in range(4)]
    assert runner.batches == [[0]]
    runner.gate.set()
    assert await asyncio.gather(*callers) == [0, 1, 2, 3]
    assert runner.batches == [[0], [1, 2, 3]]


async def test_models_on_one_lane_take_turns_by_age(lane: Lane) -> None:
    """Of equally urgent models the one whose oldest request is the oldest of all goes next; no two run at once."""
    running, order = 0, []

    class Named(Runner):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        async def run(self, payloads: Sequence[Any], *_: Any) -> Sequence[Any]:
            nonlocal running
            assert running == 0
            running += 1
            await asyncio.sleep(0)
            running -= 1
            order.append(self.name)
            return payloads

    clock = Clock()
    batchers = {name: attach(lane, Named(name), clock, max_rows=1) for name in "ab"}
    callers = []
    for name in "abba":
        callers += await submit(batchers[name], 1)
        clock.advance(0.001)
    lane.start()
    await asyncio.gather(*callers)
    assert "".join(order) == "abba"


async def test_the_most_urgent_model_goes_first(lane: Lane) -> None:
    """A model whose request has little time left goes before one that has waited for longer."""
    clock, runner = Clock(), Runner()
    patient, urgent = (attach(lane, runner, clock) for _ in range(2))
    callers = await submit(patient, "no deadline")
    callers += await submit(urgent, "far", deadline=clock() + 60)
    callers += await submit(patient, "near", deadline=clock() + 0.5)
    callers += await submit(urgent, "nearest", deadline=clock() + 0.1)
    lane.start()
    await asyncio.gather(*callers)
    assert runner.batches == [["nearest", "far"], ["near", "no deadline"]]


async def test_a_configured_delay_is_waited_for_and_a_full_batch_is_not(lane: Lane) -> None:
    """With a delay a batch that is not full waits for company, and leaves at once when it is full."""
    runner = Runner()
    batcher = attach(lane, runner, max_rows=2, max_delay=30.0)
    lane.start()
    first = await submit(batcher, 1)
    assert runner.batches == []
    assert await batcher.submit(2) == 2
    assert await first[0] == 1
    assert runner.batches == [[1, 2]]


async def test_a_delay_ends_without_another_request() -> None:
    """A lone request under a delay is served when the delay is over, and not before."""
    timers, runner = Timers(), Runner()
    lane = Lane("test", timers)
    batcher = attach(lane, runner, timers, max_delay=5.0)
    lane.start()
    (caller,) = await submit(batcher, 1)
    await timers.elapse(4.9)
    assert runner.batches == []
    await timers.elapse(0.1)
    assert caller.done()
    await lane.stop(10)


async def test_an_inline_model_does_not_hold_the_loop_between_batches(lane: Lane) -> None:
    """After each batch everybody else gets a turn, however long the queue is."""
    turns, batches = 0, []

    class Inline(Runner):
        async def run(self, payloads: Sequence[Any], *_: Any) -> Sequence[Any]:
            batches.append(turns)
            return payloads

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    batcher = attach(lane, Inline(), max_rows=1)
    callers = await submit(batcher, *range(10))
    counter = asyncio.create_task(count())
    lane.start()
    await asyncio.gather(*callers)
    counter.cancel()
    assert len(batches) == len(set(batches)) == 10


async def test_free_at_says_when_the_lane_is_expected_to_be_free() -> None:
    """While a batch runs it is the end that it should have, and in the past as soon as it has ended."""
    timers = Timers()
    lane = Lane("test", timers)
    runner = Timed(timers, stacking=0.25, running=1.0)
    batcher = attach(lane, runner, timers)
    lane.start()
    assert lane.free_at < timers()
    (caller,) = await submit(batcher, 1)
    assert lane.free_at == timers() + 1.25
    await timers.elapse(1.2)
    assert lane.free_at == pytest.approx(timers() + 0.05)
    await timers.elapse(0.05)
    assert caller.done()
    runner.running = 0.5
    (caller,) = await submit(batcher, 2)
    assert lane.free_at == timers() + 1.25
    await timers.elapse(0.75)
    assert caller.done()
    assert lane.free_at < timers()
    await lane.stop(10)


# Looking ahead.


async def test_a_long_preparation_is_done_while_the_batch_before_runs() -> None:
    """The next batch is sealed when the lane should be free by the time it is stacked, with all who came until then."""
    timers = Timers()
    lane = Lane("test", timers)
    runner = Timed(timers, stacking=0.25, running=1.0)
    batcher = attach(lane, runner, timers)
    lane.start()
    callers = await submit(batcher, 1)
    callers += await submit(batcher, 2)
    await timers.elapse(0.99)  # it will be free at 1.25
    callers += await submit(batcher, 3)
    assert runner.log == [("stack and run", 0.0, [1])]
    await timers.elapse(0.02)
    callers += await submit(batcher, 4)
    await timers.elapse(10)
    assert runner.log == [
        ("stack and run", 0.0, [1]),
        ("stack", 1.0, [2, 3]),
        ("run", 1.25, [2, 3]),
        ("stack", 2.0, [4]),
        ("run", 2.25, [4]),
    ]
    assert await asyncio.gather(*callers) == [1, 2, 3, 4]
    assert batcher.pending.cost.seconds(1) == pytest.approx(1.0)
    assert timers.armed == []
    await lane.stop(10)


async def test_a_short_preparation_is_done_when_the_lane_is_free() -> None:
    """Where stacking takes less than a timer is precise, who comes until the very end is aboard."""
    timers = Timers()
    lane = Lane("test", timers)
    runner = Timed(timers, stacking=WORTH_PREPARING * 0.99, running=1.0)
    batcher = attach(lane, runner, timers)
    lane.start()
    callers = await submit(batcher, 1)
    callers += await submit(batcher, 2)
    assert timers.armed == [pytest.approx(timers() + 1.00099)]  # the model's own
    await timers.elapse(1.0009)
    callers += await submit(batcher, 3)
    await timers.elapse(10)
    assert [(what, batch) for what, _, batch in runner.log] == [("stack and run", [1]), ("stack and run", [2, 3])]
    await asyncio.gather(*callers)
    await lane.stop(10)


async def test_a_batch_that_ends_early_is_followed_by_one_that_is_sealed_then() -> None:
    """If the lane is free before it was expected to be, nothing was sealed ahead, and the timer for it is off."""
    timers = Timers()
    lane = Lane("test", timers)
    runner = Timed(timers, stacking=0.25, running=1.0)
    batcher = attach(lane, runner, timers)
    runner.running = 0.1
    lane.start()
    callers = await submit(batcher, 1)
    await timers.elapse(0.3)
    callers += await submit(batcher, 2)
    await timers.elapse(0.1)
    assert len(timers.armed) == 2  # of the model that runs 2, and for whoever comes while it does
    await timers.elapse(10)
    assert runner.log == [("stack and run", 0.0, [1]), ("stack and run", 0.35, [2])]
    assert timers.armed == []
    await asyncio.gather(*callers)
    await lane.stop(10)


async def ahead(
    timers: Timers, running: float = 1.0, stacking: float = 0.25, **knobs: Any
) -> tuple[Lane, Timed, Batcher[Any, Any], list[asyncio.Task[Any]]]:
    """It is 1.1: 1 runs since 0.0, expected until 1.25, and 2 is being stacked since 1.0. They take what is said."""
    lane = Lane("test", timers)
    runner = Timed(timers, stacking=0.25, running=1.0)
    batcher = attach(lane, runner, timers, **knobs)
    lane.start()
    runner.running = running
    callers = await submit(batcher, 1) + await submit(batcher, 2)
    runner.stacking = stacking
    await timers.elapse(1.1)
    assert runner.log == [("stack and run", 0.0, [1]), ("stack", 1.0, [2])]
    return lane, runner, batcher, callers


async def test_what_was_stacked_is_run_next() -> None:
    """However urgent somebody is who comes after it was sealed."""
    timers = Timers()
    lane, runner, batcher, callers = await ahead(timers)
    callers += await submit(batcher, 3, deadline=timers() + 3)
    await timers.elapse(10)
    assert runner.log[2:] == [("run", 1.25, [2]), ("stack", 2.0, [3]), ("run", 2.25, [3])]
    assert await asyncio.gather(*callers) == [1, 2, 3]
    await lane.stop(10)


async def test_nothing_to_stack_is_no_reason_to_wait() -> None:
    """If nobody waits when a batch could be stacked, whoever comes later finds the lane free."""
    timers = Timers()
    lane = Lane("test", timers)
    runner = Timed(timers, stacking=0.25, running=1.0)
    batcher = attach(lane, runner, timers)
    lane.start()
    callers = await submit(batcher, 1)
    await timers.elapse(1.2)
    callers += await submit(batcher, 2)
    await timers.elapse(10)
    assert runner.log == [("stack and run", 0.0, [1]), ("stack and run", 1.25, [2])]
    await asyncio.gather(*callers)
    await lane.stop(10)


async def test_the_lane_waits_for_a_stacking_that_takes_longer() -> None:
    """A batch whose stacking has begun is not stacked twice; what comes meanwhile is in the next one."""
    timers = Timers()
    lane, runner, batcher, callers = await ahead(timers, stacking=0.5)
    await timers.elapse(0.3)
    callers += await submit(batcher, 3)
    await timers.elapse(10)
    assert runner.log[2:4] == [("run", 1.5, [2]), ("stack", 2.25, [3])]
    assert await asyncio.gather(*callers) == [1, 2, 3]
    await lane.stop(10)


async def test_a_lane_that_waits_for_a_stacking_is_not_free() -> None:
    """When the batch before has ended the prediction still counts the one that is stacked, and its stacking."""
    timers = Timers()
    lane, runner, _, callers = await ahead(timers, stacking=0.5)
    await timers.elapse(0.3)
    assert [caller.done() for caller in callers] == [True, False]
    assert lane.free_at == pytest.approx(runner.start + 1.25 + 1.25)
    await timers.elapse(10)
    assert await asyncio.gather(*callers) == [1, 2]
    assert lane.free_at < timers()
    await lane.stop(10)


async def test_a_stacked_batch_counts_in_the_prediction() -> None:
    """Who comes while one batch runs and another is stacked waits for both, and is told so."""
    timers = Timers()
    lane, runner, batcher, callers = await ahead(timers)
    assert lane.free_at == pytest.approx(runner.start + 2.25)
    with pytest.raises(CannotMeetDeadline):
        await batcher.submit(3, deadline=runner.start + 3.0)
    callers += await submit(batcher, 4, deadline=runner.start + 3.5)
    await timers.elapse(10)
    assert await asyncio.gather(*callers) == [1, 2, 4]
    await lane.stop(10)


async def test_a_stacked_batch_whose_callers_left_is_not_run() -> None:
    """The lane goes on with the next one."""
    timers = Timers()
    lane, runner, batcher, callers = await ahead(timers)
    callers.pop().cancel()
    callers += await submit(batcher, 3)
    await timers.elapse(10)
    assert runner.log[2:] == [("stack and run", 1.25, [3])]
    assert await asyncio.gather(*callers) == [1, 3]
    assert batcher.journal.left["preparing"] == 1
    await lane.stop(10)


async def test_stop_while_one_is_stacked_answers_it() -> None:
    """Stopping runs what is stacked, and what waits behind it."""
    timers = Timers()
    lane, _, batcher, callers = await ahead(timers, max_rows=1)
    callers += await submit(batcher, 3)
    stopping = asyncio.create_task(lane.stop(60))
    await timers.elapse(30)
    assert await asyncio.gather(*callers) == [1, 2, 3]
    await stopping
    assert not lane.alive(60)


async def test_stop_while_one_is_stacked_behind_a_batch_that_never_ends_answers_it() -> None:
    """What runs, what is stacked and what waits is answered when the time to stop is over."""
    timers = Timers()
    lane, runner, batcher, callers = await ahead(timers, running=1e9, max_rows=1)
    callers += await submit(batcher, 3)
    stopping = asyncio.create_task(lane.stop(5))
    await timers.elapse(5)
    await stopping
    for caller in callers:
        with pytest.raises(NotReady, match="shutting down"):
            await caller
    assert runner.log[2:] == []


@pytest.mark.parametrize("seconds", [0.0, 0.3], ids=["while the batch before runs", "while the lane waits for it"])
async def test_a_lane_cancelled_while_one_is_stacked_answers_it(seconds: float) -> None:
    """The batch that runs, the one that is stacked and what waits: everybody hears of the end."""
    timers = Timers()
    lane, _, batcher, callers = await ahead(timers, stacking=0.5, max_rows=1)
    callers += await submit(batcher, 3)
    await timers.elapse(seconds)
    assert lane._task is not None
    lane._task.cancel()
    await settle()
    first, stacked, waiting = await asyncio.gather(*callers, return_exceptions=True)
    assert first == 1 if seconds else isinstance(first, RuntimeError)
    for error in (stacked, waiting):
        assert isinstance(error, NotReady)
    await timers.elapse(10)
    await lane.stop(10)


async def test_the_heartbeat_stops_in_a_stacking_that_does_not_end() -> None:
    """A lane that waits for a batch to be stacked is busy."""
    timers = Timers()
    lane, runner, _, callers = await ahead(timers, stacking=1e9)
    await timers.elapse(61)
    assert [caller.done() for caller in callers] == [True, False]
    assert runner.log[2:] == []
    assert not lane.alive(60)
    assert lane.alive(90)
    stopping = asyncio.create_task(lane.stop(5))
    await timers.elapse(5)
    await stopping
    with pytest.raises(NotReady, match="shutting down"):
        await callers[1]


async def test_nothing_is_stacked_ahead_of_a_more_urgent_model() -> None:
    """The model that runs does not take the next turn from another one, of which nobody knows what stacking takes."""
    timers = Timers()
    lane = Lane("test", timers)
    patient, urgent = Timed(timers, stacking=0.25, running=1.0), Timed(timers, stacking=0.25, running=1.0)
    one, other = attach(lane, patient, timers, patience=100.0), attach(lane, urgent, timers)
    lane.start()
    callers = await submit(one, 1) + await submit(one, 2) + await submit(other, 3, deadline=timers() + 10)
    await timers.elapse(10)
    assert patient.log == [("stack and run", 0.0, [1]), ("stack", 2.25, [2]), ("run", 2.5, [2])]
    assert urgent.log == [("stack and run", 1.25, [3])]
    assert await asyncio.gather(*callers) == [1, 2, 3]
    await lane.stop(10)


async def test_models_that_take_turns_are_stacked_ahead_of_each_other() -> None:
    """Each by what its own stacking takes: the lane is never idle for it, and what stacks quickly is sealed late."""
    timers = Timers()
    lane = Lane("test", timers)
    slow, quick = Timed(timers, stacking=0.5, running=1.0), Timed(timers, stacking=0.125, running=1.0)
    one, other = attach(lane, slow, timers, max_rows=1), attach(lane, quick, timers, max_rows=1)
    lane.start()
    callers = []
    for number in range(3):
        for batcher in (one, other):
            callers += await submit(batcher, number)
            await timers.elapse(0.001)
    await timers.elapse(10)
    assert [(what, batch) for what, _, batch in slow.log[1:]] == [
        ("stack", [1]),
        ("run", [1]),
        ("stack", [2]),
        ("run", [2]),
    ]
    assert [(what, batch) for what, _, batch in quick.log[1:]] == [
        ("stack", [1]),
        ("run", [1]),
        ("stack", [2]),
        ("run", [2]),
    ]
    times = sorted((at, what) for log in (slow.log, quick.log) for what, at, _ in log)
    runs = [at for at, what in times if what == "run"]
    assert [later - at for at, later in pairwise(runs)] == pytest.approx([1.0] * 3)  # one after the other
    stacked = {at: runs[runs.index(next(run for run in runs if run > at))] for at, what in times if what == "stack"}
    assert [round(run - at, 3) for at, run in stacked.items()] == [0.5, 0.125, 0.5, 0.125]
    assert await asyncio.gather(*callers) == [0, 0, 1, 1, 2, 2]
    await lane.stop(10)


async def test_a_lane_with_nothing_to_do_keeps_nothing(lane: Lane) -> None:
    """What the last batch was made of, and what came of it, is not kept until the next one."""

    class Large:
        pass

    lane.start()
    question, answer = Large(), Large()
    kept = [weakref.ref(question), weakref.ref(answer)]
    results = [answer]
    del answer
    assert type(await lane.call(lambda given: results.pop(), question)) is Large
    del question
    await lane.call(int, "7")
    assert [ref() for ref in kept] == [None, None]


async def test_a_model_that_waits_for_company_keeps_nothing_from_being_stacked() -> None:
    """However urgent its request is: it is not its turn yet."""
    timers = Timers()
    lane = Lane("test", timers)
    busy, waiting = Timed(timers, stacking=0.25, running=1.0), Timed(timers, stacking=0.25, running=1.0)
    one, other = attach(lane, busy, timers, patience=100.0), attach(lane, waiting, timers, max_delay=50.0)
    lane.start()
    callers = await submit(other, 3) + await submit(one, 1) + await submit(one, 2)
    await timers.elapse(10)
    assert busy.log == [("stack and run", 0.0, [1]), ("stack", 1.0, [2]), ("run", 1.25, [2])]
    assert waiting.log == []
    await timers.elapse(50)
    assert await asyncio.gather(*callers) == [3, 1, 2]
    await lane.stop(10)


async def stop_while_it_runs(timers: Timers, *order: int) -> tuple[Timed, Timed]:
    """Two models that wait for company until the lane stops; the first one runs 0 then. The requests' order of coming.

    2 is for the first model, 3 for the other one.
    """
    lane = Lane("test", timers)
    runners = [Timed(timers, stacking=0.25, running=1.0) for _ in range(2)]
    batchers = [attach(lane, runner, timers, max_rows=2, max_delay=1000.0) for runner in runners]
    lane.start()
    callers = await submit(batchers[0], 0, rows=2)
    for number in order:
        await timers.elapse(0.01)
        callers += await submit(batchers[number - 2], number)
    stopping = asyncio.create_task(lane.stop(60))
    await timers.elapse(30)
    await stopping
    assert await asyncio.gather(*callers) == [0, *order]
    return runners[0], runners[1]


async def test_a_lane_that_stops_stacks_ahead_what_waits_for_company() -> None:
    """It waits no more, and is the most urgent."""
    first, other = await stop_while_it_runs(Timers(), 2, 3)
    assert [(what, batch) for what, _, batch in first.log] == [("stack and run", [0]), ("stack", [2]), ("run", [2])]
    assert [(what, batch) for what, _, batch in other.log] == [("stack and run", [3])]


async def test_a_lane_that_stops_stacks_nothing_ahead_of_a_more_urgent_model() -> None:
    """Who waited for company for longer goes first, as ever."""
    first, other = await stop_while_it_runs(Timers(), 3, 2)
    assert [(what, batch) for what, _, batch in first.log] == [("stack and run", [0]), ("stack", [2]), ("run", [2])]
    assert [(what, batch) for what, _, batch in other.log] == [("stack and run", [3])]
    assert other.log[0][1] < first.log[1][1]


# The lane's life.


async def test_call_runs_in_the_lanes_one_thread(lane: Lane) -> None:
    """Whatever is called runs off the event loop's thread, always in the same one, and its error comes back."""
    lane.start()
    threads = {await lane.call(threading.get_ident) for _ in range(5)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    with pytest.raises(ZeroDivisionError):
        await lane.call(lambda: 1 // 0)


async def test_call_whose_caller_left_harms_nobody(lane: Lane, caplog: pytest.LogCaptureFixture) -> None:
    """The result of a call that was cancelled is dropped, and the thread goes on."""
    lane.start()
    release = threading.Event()
    caller = asyncio.create_task(lane.call(release.wait, 10))
    await settle()
    caller.cancel()
    await asyncio.wait([caller])
    release.set()
    assert await lane.call(int, "7") == 7
    assert caplog.text == ""


def test_a_call_that_outlives_the_event_loop_ends_in_silence() -> None:
    """A model that returns when the process is ending has nobody to answer, and says nothing."""
    release = threading.Event()

    async def main() -> Lane:
        lane = Lane("test")
        lane.start()
        asyncio.create_task(lane.call(release.wait, 10))  # noqa: RUF006 - cancelled with the loop
        await settle()
        await lane.stop(10)
        return lane

    lane = asyncio.run(main())
    release.set()
    lane._thread.join(10)
    assert not lane._thread.is_alive()


async def test_the_heartbeat_stops_in_a_batch_that_does_not_end() -> None:
    """A lane is alive while idle however long, and no longer when one batch has taken more than the bound."""
    clock, runner = Clock(), Runner()
    runner.gate.clear()
    lane = Lane("test", clock)
    batcher = attach(lane, runner)
    assert not lane.alive(60)
    lane.start()
    clock.advance(1e6)
    assert lane.alive(60)
    (caller,) = await submit(batcher, 1)
    clock.advance(60)
    assert lane.alive(60)
    clock.advance(0.1)
    assert not lane.alive(60)
    runner.gate.set()
    await caller
    await settle()
    assert lane.alive(60)
    await lane.stop(10)
    assert not lane.alive(60)


async def test_a_lane_that_dies_answers_everybody(lane: Lane, caplog: pytest.LogCaptureFixture) -> None:
    """If the coroutine itself fails, what waits and what comes gets NotReady, and the lane is not alive."""
    batcher = attach(lane, Runner())
    batcher.seal = lambda drain=False: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    lane.start()
    with pytest.raises(NotReady, match="died"):
        await batcher.submit(1)
    with pytest.raises(NotReady, match="died"):
        await batcher.submit(2)
    assert not lane.alive(60)
    assert "nothing on it will be served" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_lane_whose_device_is_lost_answers_everybody(lane: Lane) -> None:
    """What waits and what comes is refused with the reason, and the lane is not alive although its coroutine is."""
    runner = Runner()
    runner.gate.clear()
    batcher = attach(lane, runner, max_rows=1)
    lane.start()
    running, waiting = await submit(batcher, 1, 2)
    lane.lose("the device fell off the bus")
    with pytest.raises(NotReady, match="fell off the bus"):
        await waiting
    with pytest.raises(NotReady, match="fell off the bus"):
        await batcher.submit(3)
    assert not lane.alive(60)
    runner.gate.set()
    assert await running == 1


async def test_a_lane_that_dies_while_it_stops_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """An error is no orderly end, whenever it comes."""
    lane = Lane("test")
    batcher = attach(lane, Runner())
    lane.start()
    await settle()
    batcher.seal = lambda drain=False: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    await lane.stop(10)
    with pytest.raises(NotReady, match="died"):
        await batcher.submit(1)
    assert "ZeroDivisionError" in caplog.text


async def test_a_lane_that_is_cancelled_leaves_nobody_waiting(lane: Lane, caplog: pytest.LogCaptureFixture) -> None:
    """However the coroutine ends, what waits and what comes later is answered."""
    runner = Runner()
    runner.gate.clear()
    batcher = attach(lane, runner, max_rows=1)
    lane.start()
    callers = await submit(batcher, 1, 2, 3)
    assert lane._task is not None
    lane._task.cancel()
    await asyncio.wait(callers, timeout=10)
    assert all(isinstance(caller.exception(), NotReady | RuntimeError) for caller in callers)
    with pytest.raises(NotReady, match="died"):
        await asyncio.wait_for(batcher.submit(9), 10)
    assert "nothing on it will be served" in caplog.text


async def test_stop_does_not_wait_for_a_batch_that_never_ends(caplog: pytest.LogCaptureFixture) -> None:
    """A stuck batch is given up after the time it gets: all callers are answered, and the coroutine ends."""
    lane, runner = Lane("test"), Runner()
    runner.gate.clear()
    batcher = attach(lane, runner, max_rows=1)
    lane.start()
    callers = await submit(batcher, 1, 2)
    await lane.stop(0.01)
    for caller in callers:
        with pytest.raises(NotReady, match="shutting down"):
            await caller
    with pytest.raises(NotReady, match="shutting down"):
        await batcher.submit(3)
    assert "stuck in a batch" in caplog.text
    assert "died" not in caplog.text
    assert not lane.alive(60)


async def test_stop_does_not_wait_for_a_delay(lane: Lane) -> None:
    """What waits for company when the lane stops is run at once, whichever model it is for."""
    batchers = [attach(lane, Runner(), max_delay=1000.0) for _ in range(3)]
    lane.start()
    callers = [(await submit(batcher, number))[0] for number, batcher in enumerate(batchers)]
    await asyncio.wait_for(lane.stop(30), 10)
    assert [caller.done() for caller in callers] == [True] * 3
    assert await asyncio.gather(*callers) == [0, 1, 2]


async def test_stop_runs_the_most_urgent_first(lane: Lane) -> None:
    """Of models that waited for company the one whose request is the oldest goes first, then the other."""
    clock, runner = Clock(), Runner()
    first, second = (attach(lane, runner, clock, max_delay=1000.0) for _ in range(2))
    lane.start()
    callers = await submit(second, "old")
    clock.advance(1)
    callers += await submit(first, "new")
    assert runner.batches == []
    await lane.stop(10)
    assert await asyncio.gather(*callers) == ["old", "new"]
    assert runner.batches == [["old"], ["new"]]


async def test_stop_runs_what_is_queued_first(lane: Lane) -> None:
    """Stopping drains: everything that was queued is answered, then the coroutine ends, and what comes is refused."""
    runner = Runner()
    runner.gate.clear()
    batcher = attach(lane, runner, max_rows=1)
    lane.start()
    callers = await submit(batcher, *range(5))
    stopping = asyncio.create_task(lane.stop(10))
    await settle()
    assert not any(caller.done() for caller in callers)
    runner.gate.set()
    await stopping
    assert await asyncio.gather(*callers) == list(range(5))
    with pytest.raises(NotReady, match="shutting down"):
        await batcher.submit(6)


async def test_stop_of_a_lane_that_never_started_returns() -> None:
    """There is nothing to wait for."""
    await asyncio.wait_for(Lane("test").stop(10), 10)
