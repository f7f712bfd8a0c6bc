"""Cache: one computation for all who ask at the same time, nobody left waiting, and no more bytes than promised."""

import asyncio
import gc
import hashlib
import math
import tracemalloc
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batching.cache import ENTRY_BYTES, Cache
from batching.errors import DeadlineExceeded, QueueFull
from tests.timing import Clock, settle


def size(answer: Any) -> int:
    return 0 if answer is None else len(answer)


def make(
    entries: int = 100, seconds: float = math.inf, clock: Clock | None = None, max_waiting: int = 1024, **bounds: int
) -> Cache[Any]:
    """A cache with room for that many entries of 100 bytes."""
    return Cache(entries * (ENTRY_BYTES + 100), seconds, clock or Clock(), max_waiting, **bounds)


class Answer:
    """An answer of 50 bytes whose end can be seen."""

    def __len__(self) -> int:
        return 50


class Model:
    """Stands for what computes: records for whom it runs, and answers each when told."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.under_way: dict[str, asyncio.Future[Any]] = {}

    def of(self, caller: str) -> Callable[[], Awaitable[Any]]:
        async def compute() -> Any:
            self.runs.append(caller)
            self.under_way[caller] = asyncio.get_running_loop().create_future()
            try:
                return await self.under_way[caller]
            finally:
                del self.under_way[caller]

        return compute

    def answers(self, caller: str, answer: Any) -> None:
        self.under_way[caller].set_result(answer)

    def fails(self, caller: str) -> None:
        self.under_way[caller].set_exception(ValueError(f"failed for {caller}"))


async def ask(
    cache: Cache[Any], model: Model, callers: str, key: str = "k", deadline: float = math.inf, nbytes: int = 0
) -> list[asyncio.Task[Any]]:
    """A task for each caller, in this order; all have asked when this returns."""
    tasks = [asyncio.create_task(cache.answer(key, model.of(caller), size, deadline, nbytes)) for caller in callers]
    await settle()
    return tasks


async def answers(*tasks: asyncio.Task[Any]) -> list[Any]:
    """Their answers, which must have come by now."""
    await settle()
    return [task.result() for task in tasks]


async def put(cache: Cache[Any], key: str, answer: Any = bytes(100)) -> bool:
    """Ask for `key`, which is `answer`. True if it had to be computed."""
    misses = cache.misses

    async def compute() -> Any:
        return answer

    assert await cache.answer(key, compute, size) == answer
    return cache.misses > misses


async def decided(cache: Cache[Any], follower: asyncio.Task[Any]) -> None:
    """Return in the very turn in which a follower's wait ends, before its task runs."""
    waiting, turns = cache.waiting, 0
    while cache.waiting == waiting and turns < 20:
        await asyncio.sleep(0)
        turns += 1
    assert cache.waiting < waiting
    assert not follower.done()


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of the event loop's timers too."""
    clock = Clock()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)
    return clock


async def test_a_leader_that_fails_alone_gets_its_error() -> None:
    """The follower who waited longest computes for itself; the others get its answer, and it is stored."""
    cache, model = make(), Model()
    a, b, c, d = await ask(cache, model, "abcd")
    model.fails("a")
    await settle()
    with pytest.raises(ValueError, match="failed for a"):
        a.result()
    assert model.runs == ["a", "b"]
    assert cache.waiting == 2
    model.answers("b", b"right")
    assert await answers(b, c, d) == [b"right"] * 3
    assert not await put(cache, "k", b"right")
    assert (cache.misses, cache.joined, cache.handed_over, cache.hits) == (1, 3, 1, 1)


async def test_all_fail_in_turn_each_with_its_own_error() -> None:
    """If every computation fails, each caller gets the error of its own, and nothing is stored."""
    cache, model = make(), Model()
    tasks = await ask(cache, model, "abc")
    for caller in "abc":
        model.fails(caller)
        await settle()
    assert [str(task.exception()) for task in tasks] == ["failed for a", "failed for b", "failed for c"]
    assert model.runs == ["a", "b", "c"]
    assert cache.handed_over == 2
    assert len(cache) == cache.bytes == cache.waiting == len(cache._flights) == 0
    assert await put(cache, "k")


async def test_a_leader_that_is_cancelled_hands_over() -> None:
    """A leader whose caller leaves takes nobody with it."""
    cache, model = make(), Model()
    a, b, c = await ask(cache, model, "abc")
    a.cancel()
    await settle()
    assert a.cancelled()
    assert model.runs == ["a", "b"]
    model.answers("b", b"right")
    assert await answers(b, c) == [b"right"] * 2


async def test_a_leader_alone_that_fails_or_leaves_leaves_nothing() -> None:
    """A flight's record ends with the last who is in it."""
    cache, model = make(), Model()
    (a,) = await ask(cache, model, "a")
    model.fails("a")
    await settle()
    assert isinstance(a.exception(), ValueError)
    (b,) = await ask(cache, model, "b")
    b.cancel()
    await settle()
    assert not cache._flights
    assert cache.misses == 2


@pytest.mark.parametrize("first", ["cancelled", "chosen"])
async def test_chosen_and_cancelled_in_the_same_turn_the_flight_goes_on(first: str) -> None:
    """A follower that is cancelled in the turn in which it is to lead, before or after, hands over to the next."""
    cache, model = make(), Model()
    a, b, c, d = await ask(cache, model, "abcd")
    if first == "cancelled":
        b.cancel()
        model.fails("a")
    else:
        model.fails("a")
        await decided(cache, b)
        b.cancel()
    await settle()
    assert isinstance(a.exception(), ValueError)
    assert b.cancelled()
    assert model.runs == ["a", "c"]
    model.answers("c", b"right")
    assert await answers(c, d) == [b"right"] * 2
    assert cache.handed_over == 1


async def test_all_cancelled_in_the_same_turn_leave_nothing() -> None:
    """When the leader and everybody behind it leave at once, nobody is called and nothing is kept."""
    cache, model = make(), Model()
    tasks = await ask(cache, model, "abcde")
    for task in tasks:
        task.cancel()
    await settle()
    assert all(task.cancelled() for task in tasks)
    assert model.runs == ["a"]
    assert not cache._flights
    assert cache.waiting == 0


async def test_chosen_and_all_cancelled_one_after_another() -> None:
    """Each that is chosen is cancelled before it runs: the flight ends when none is left."""
    cache, model = make(), Model()
    tasks = await ask(cache, model, "abcd")
    model.fails("a")
    await decided(cache, tasks[1])
    for task in tasks[1:]:
        task.cancel()
    await settle()
    assert isinstance(tasks[0].exception(), ValueError)
    assert model.runs == ["a"]
    assert not cache._flights
    assert cache.waiting == 0


async def test_a_follower_that_leaves_disturbs_nobody() -> None:
    """Its place is free at once; the others wait on, and it is never asked to lead."""
    cache, model = make(max_waiting=2), Model()
    a, b, c = await ask(cache, model, "abc")
    b.cancel()
    await settle()
    assert b.cancelled()
    assert cache.waiting == 1
    (d,) = await ask(cache, model, "d")
    model.answers("a", b"right")
    assert await answers(a, c, d) == [b"right"] * 3
    assert model.runs == ["a"]


async def test_cancelled_in_the_very_turn_of_its_answer_disturbs_nobody() -> None:
    """A follower whose answer came in the turn in which it was cancelled just leaves; nothing is computed again."""
    cache, model = make(), Model()
    a, b, c = await ask(cache, model, "abc")
    model.answers("a", b"right")
    await decided(cache, b)
    b.cancel()
    assert await answers(a, c) == [b"right"] * 2
    await settle()
    assert b.cancelled()
    assert model.runs == ["a"]
    assert not cache._flights


async def test_a_followers_deadline_is_its_own(clock: Clock) -> None:
    """Whose deadline passes gets DeadlineExceeded then; the flight goes on for the others, and so does its leader."""
    cache, model = make(clock=clock), Model()
    (a,) = await ask(cache, model, "a", deadline=clock() + 1)
    (b,) = await ask(cache, model, "b", deadline=clock() + 5)
    (c,) = await ask(cache, model, "c", deadline=clock() + 10)
    (d,) = await ask(cache, model, "d")
    clock.advance(4.9)
    await settle()
    assert not b.done()
    clock.advance(0.1)
    await settle()
    assert isinstance(b.exception(), DeadlineExceeded)
    assert (cache.waiting, cache.late) == (2, 1)
    model.answers("a", b"right")
    assert await answers(a, c, d) == [b"right"] * 3
    clock.advance(10)
    await settle()
    assert model.runs == ["a"]


async def test_a_deadline_that_was_met_holds_nothing() -> None:
    """Whose answer came in time leaves no timer behind that would keep the answer until the deadline."""
    cache, model = make(), Model()
    tasks = await ask(cache, model, "ab", deadline=cache._clock() + 3600)
    answer = Answer()
    seen = weakref.ref(answer)
    model.answers("a", answer)
    await settle()
    cache.clear()
    del answer, tasks
    assert seen() is None


async def test_a_deadline_that_is_over_is_refused_at_the_door(clock: Clock) -> None:
    """Nobody begins to wait who is late already; what is stored is given even then."""
    cache, model = make(clock=clock), Model()
    (a,) = await ask(cache, model, "a")
    (b,) = await ask(cache, model, "b", deadline=clock())
    assert isinstance(b.exception(), DeadlineExceeded)
    assert (cache.joined, cache.late, cache.refused) == (0, 1, 0)
    model.answers("a", b"right")
    await a
    (c,) = await ask(cache, model, "c", deadline=clock() - 1)
    assert await answers(c) == [b"right"]


@pytest.mark.parametrize("first", ["cancelled", "late"])
async def test_late_and_cancelled_in_the_same_turn_leaves_no_trace(
    first: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A follower whose deadline passes in the turn in which it is cancelled leaves once, and no unread error."""
    cache, model = make(clock=clock), Model()
    (a,) = await ask(cache, model, "a")
    (b,) = await ask(cache, model, "b", deadline=clock() + 5)
    clock.advance(5)
    if first == "late":
        await decided(cache, b)
    b.cancel()
    await settle()
    assert b.cancelled()
    assert cache.waiting == cache.late == 0
    del b
    gc.collect()
    assert caplog.text == ""
    model.answers("a", b"right")
    assert await answers(a) == [b"right"]


async def test_late_and_cancelled_and_its_timer_before_its_task(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A timer that finds its follower cancelled, not yet gone, takes it out and answers nobody."""
    cache, model = make(clock=clock), Model()
    await ask(cache, model, "a")
    (b,) = await ask(cache, model, "b", deadline=clock() + 5)
    # The timer is due in the next turn, and is made ready before what this callback makes ready.
    asyncio.get_running_loop().call_at(clock() + 4, b.cancel)
    clock.advance(5)
    await settle()
    assert b.cancelled()
    assert cache.waiting == 0
    assert caplog.text == ""
    model.answers("a", b"right")


async def test_a_follower_too_many_is_refused_at_once() -> None:
    """At most max_waiting follow, in all flights together; leaders and stored answers are not counted."""
    cache, model = make(max_waiting=2), Model()
    await put(cache, "stored")
    a, b = await ask(cache, model, "ab", key="one")
    c, d = await ask(cache, model, "cd", key="two")
    (e,) = await ask(cache, model, "e", key="one")
    with pytest.raises(QueueFull, match="2 requests wait for others' answers already") as refused:
        e.result()
    assert refused.value.retry_after == 0.0
    assert cache.refused == 1
    assert not await put(cache, "stored")
    assert await put(cache, "three")
    model.answers("a", b"1")
    assert await answers(a, b) == [b"1"] * 2
    (f,) = await ask(cache, model, "f", key="two")
    model.answers("c", b"2")
    assert await answers(c, d, f) == [b"2"] * 3
    assert cache.joined == 3


async def test_a_follower_of_too_many_bytes_is_refused_at_once() -> None:
    """The requests of all followers hold at most max_waiting_bytes together; leaders' are not counted."""
    cache, model = make(max_waiting_bytes=100), Model()
    (a,) = await ask(cache, model, "a", key="one", nbytes=1000)
    (b,) = await ask(cache, model, "b", key="two", nbytes=1000)
    (c,) = await ask(cache, model, "c", key="one", nbytes=60)
    (d,) = await ask(cache, model, "d", key="two", nbytes=41)
    with pytest.raises(
        QueueFull, match="^60 of 100 bytes wait for others' answers already, no room for 41 more$"
    ) as refused:
        d.result()
    assert refused.value.retry_after == 0.0
    (e,) = await ask(cache, model, "e", key="two", nbytes=40)
    (f,) = await ask(cache, model, "f", key="two", nbytes=1)
    (g,) = await ask(cache, model, "g", key="two")
    assert isinstance(f.exception(), QueueFull)
    assert (cache.waiting, cache.waiting_bytes, cache.refused) == (3, 100, 2)
    model.answers("a", b"1")
    assert await answers(a, c) == [b"1"] * 2
    (h,) = await ask(cache, model, "h", key="two", nbytes=60)
    assert cache.waiting_bytes == 100
    model.answers("b", b"2")
    assert await answers(b, e, g, h) == [b"2"] * 4
    assert cache.waiting == cache.waiting_bytes == 0


async def test_a_bound_of_no_bytes_lets_those_follow_who_hold_none() -> None:
    """0 is a bound like any other."""
    cache, model = make(max_waiting_bytes=0), Model()
    a, b = await ask(cache, model, "ab")
    (c,) = await ask(cache, model, "c", nbytes=1)
    assert isinstance(c.exception(), QueueFull)
    model.answers("a", b"right")
    assert await answers(a, b) == [b"right"] * 2


@pytest.mark.parametrize("how", ["lands", "leaves", "late", "handed over", "chosen and cancelled", "cleared", "all go"])
async def test_whoever_no_longer_follows_holds_nothing(how: str, clock: Clock) -> None:
    """On every way out of a flight, exactly the bytes of those who went are free, and all in the end."""
    cache, model = make(clock=clock), Model()
    (a,) = await ask(cache, model, "a", nbytes=1000)
    (b,) = await ask(cache, model, "b", deadline=clock() + 5, nbytes=100)
    (c,) = await ask(cache, model, "c", nbytes=10)
    (d,) = await ask(cache, model, "d", nbytes=1)
    assert (cache.waiting, cache.waiting_bytes) == (3, 111)
    leader, left = "a", (2, 11)
    if how == "lands":
        left = (3, 111)
    elif how == "leaves":
        b.cancel()
    elif how == "late":
        clock.advance(5)
    elif how == "handed over":
        model.fails("a")
        leader = "b"
    elif how == "chosen and cancelled":
        model.fails("a")
        await decided(cache, b)
        assert (cache.waiting, cache.waiting_bytes) == left
        b.cancel()
        leader, left = "c", (1, 1)
    elif how == "cleared":
        cache.clear()
        left = (3, 111)
    else:
        for task in (a, b, c, d):
            task.cancel()
        leader, left = "", (0, 0)
    await settle()
    assert (cache.waiting, cache.waiting_bytes) == left
    if leader:
        model.answers(leader, b"right")
    await settle()
    assert all(task.done() for task in (a, b, c, d))
    assert cache.waiting == cache.waiting_bytes == cache.refused == 0
    assert cache.late == (how == "late")
    report = cache.report()
    assert [report[name] for name in ("waiting", "waiting_bytes", "refused", "late")] == [0, 0, 0, how == "late"]


async def test_the_report_counts_who_was_refused_and_who_was_late(clock: Clock) -> None:
    """Each in its own count, under its own name, and at once."""
    cache, model = make(clock=clock, max_waiting=2, max_waiting_bytes=100), Model()
    (a,) = await ask(cache, model, "a")
    await ask(cache, model, "b", nbytes=101)
    await ask(cache, model, "c", nbytes=7, deadline=clock() + 1)
    await ask(cache, model, "d", deadline=clock())
    await ask(cache, model, "efg", nbytes=7)
    clock.advance(1)
    await settle()
    report = cache.report()
    assert {name: report[name] for name in ("joined", "waiting", "waiting_bytes", "refused", "late")} == {
        "joined": 2, "waiting": 1, "waiting_bytes": 7, "refused": 3, "late": 2,
    }  # fmt: skip
    model.answers("a", b"right")
    assert await answers(a) == [b"right"]


async def test_a_leader_who_is_late_is_not_counted_here() -> None:
    """What a computation raises is whoever computes' to count, though it be DeadlineExceeded or QueueFull."""
    cache, model = make(), Model()
    a, b = await ask(cache, model, "ab")
    model.under_way["a"].set_exception(DeadlineExceeded())
    await settle()
    model.under_way["b"].set_exception(QueueFull("", 0.0))
    await settle()
    assert [type(task.exception()) for task in (a, b)] == [DeadlineExceeded, QueueFull]
    assert cache.refused == cache.late == 0


async def test_an_answer_that_cannot_be_sized_is_an_error_of_one() -> None:
    """If `size` raises, the leader gets that, the others their answer, and nothing is stored."""
    cache, model = make(), Model()

    def broken(answer: Any) -> int:
        raise TypeError("no size")

    a = asyncio.create_task(cache.answer("k", model.of("a"), broken))
    await settle()
    (b,) = await ask(cache, model, "b")
    model.answers("a", b"right")
    assert await answers(b) == [b"right"]
    with pytest.raises(TypeError, match="no size"):
        a.result()
    assert len(cache) == len(cache._flights) == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((-1, 1.0), "capacity"),
        ((1, -1.0), "seconds"),
        ((1, math.nan), "seconds"),
        ((1, 1.0, Clock(), -1), "max_waiting must"),
        ((1, 1.0, Clock(), 1, -1), "max_waiting_bytes must"),
    ],
)
async def test_bounds_that_cannot_be_are_refused(arguments: tuple[int, float], word: str) -> None:
    """A bound below nothing is refused, and the text names it."""
    with pytest.raises(ValueError, match=word):
        Cache(*arguments)


async def test_a_hundred_identical_callers_one_computation() -> None:
    """100 callers at once: it is computed once, everybody gets the same object, and the next one from the store."""
    cache, model = make(), Model()
    tasks = await ask(cache, model, "a" * 100)
    model.answers("a", b"right")
    objects = await answers(*tasks)
    assert model.runs == ["a"]
    assert len(set(map(id, objects))) == 1
    assert not await put(cache, "k", b"right")
    assert (cache.misses, cache.joined, cache.hits, cache.handed_over) == (1, 99, 1, 0)
    assert cache.waiting == len(cache._flights) == 0


async def test_different_keys_share_nothing() -> None:
    """Each key has its own flight and its own answer."""
    cache, model = make(), Model()
    (a,) = await ask(cache, model, "a", key="one")
    (b,) = await ask(cache, model, "b", key="two")
    model.answers("b", b"2")
    assert await answers(b) == [b"2"]
    assert not a.done()
    model.answers("a", b"1")
    assert await answers(a) == [b"1"]
    assert not await put(cache, "one", b"1")
    assert not await put(cache, "two", b"2")
    assert len(cache) == 2
    assert cache.bytes == 2 * (ENTRY_BYTES + 1)


async def test_none_is_an_answer() -> None:
    """An answer that is None is followed, stored and given like any other."""
    cache, model = make(), Model()
    tasks = await ask(cache, model, "ab")
    model.answers("a", None)
    assert await answers(*tasks) == [None, None]
    assert not await put(cache, "k", None)
    assert model.runs == ["a"]


async def test_who_was_not_used_longest_makes_room() -> None:
    """Past the capacity the least recently used answer goes, however old the others are; the sum never exceeds it."""
    cache = make(entries=3)
    for key in "abc":
        assert await put(cache, key)
    assert cache.bytes == 3 * (ENTRY_BYTES + 100)
    assert not await put(cache, "a")
    assert await put(cache, "d")
    assert cache.bytes == 3 * (ENTRY_BYTES + 100)
    assert [await put(cache, key) for key in "acd"] == [False] * 3
    assert await put(cache, "b")
    assert await put(cache, "a")
    assert (len(cache), cache.hits, cache.misses, cache.evicted, cache.expired) == (3, 4, 6, 3, 0)


async def test_a_large_answer_takes_the_room_of_several() -> None:
    """As many go as its bytes need, and no more."""
    cache = make(entries=4)
    for key in "abcd":
        await put(cache, key)
    await put(cache, "large", bytes(ENTRY_BYTES + 201))  # one byte more than two of the others free
    assert cache.evicted == 3
    assert [await put(cache, "d"), await put(cache, "large", bytes(ENTRY_BYTES + 201))] == [False, False]
    assert cache.bytes == 3 * (ENTRY_BYTES + 100) + 1


async def test_an_answer_over_the_capacity_is_given_and_not_stored() -> None:
    """One byte too many evicts nobody; exactly the capacity is stored."""
    cache = make(entries=2)
    await put(cache, "a")
    most = 2 * (ENTRY_BYTES + 100) - ENTRY_BYTES
    assert await put(cache, "large", bytes(most + 1))
    assert await put(cache, "large", bytes(most + 1))
    assert not await put(cache, "a")
    assert cache.evicted == 0
    assert await put(cache, "large", bytes(most))
    assert not await put(cache, "large", bytes(most))
    assert (len(cache), cache.evicted) == (1, 1)


async def test_without_capacity_only_flights_are_shared() -> None:
    """A capacity of 0 stores nothing, and who asks at the same time shares all the same."""
    cache, model = make(entries=0), Model()
    tasks = await ask(cache, model, "ab")
    model.answers("a", b"right")
    assert await answers(*tasks) == [b"right"] * 2
    assert model.runs == ["a"]
    assert await put(cache, "k")
    assert len(cache) == cache.bytes == 0


async def test_an_answer_is_given_until_it_is_too_old() -> None:
    """Exactly `seconds` after its computation ended it is still given, any later it is not; use does not renew it."""
    clock = Clock()
    cache, model = make(seconds=60, clock=clock), Model()
    (a,) = await ask(cache, model, "a")
    clock.advance(100)  # what the computation takes does not count
    model.answers("a", b"right")
    await a
    clock.advance(60)
    assert not await put(cache, "k", b"right")
    clock.advance(0.001)
    assert await put(cache, "k", b"new")
    assert (cache.expired, cache.evicted, cache.hits) == (1, 0, 1)
    assert not await put(cache, "k", b"new")


async def test_what_is_too_old_leaves_when_another_is_stored() -> None:
    """Nobody need ask for an old answer again: its memory is free as soon as something else is stored, or too large."""
    clock = Clock()
    cache = make(entries=10, seconds=60, clock=clock)
    seen = []
    for key in "abc":
        answer = Answer()
        seen.append(weakref.ref(answer))
        await put(cache, key, answer)
        del answer
        clock.advance(20)
    assert await cache.answer("a", Model().of("a"), size) is seen[0]()  # the oldest is the most recently used
    clock.advance(20)
    await put(cache, "d")
    assert [ref() is None for ref in seen] == [True, False, False]
    assert cache.bytes == 2 * (ENTRY_BYTES + 50) + ENTRY_BYTES + 100
    clock.advance(60)
    await put(cache, "too large", bytes(10_000))
    assert [ref() is None for ref in seen] == [True, True, True]
    assert (len(cache), cache.expired) == (1, 3)


async def test_an_old_answer_is_dropped_before_a_young_one_makes_room() -> None:
    """Room that the too old leave is room: nothing is evicted for it."""
    clock = Clock()
    cache = make(entries=2, seconds=60, clock=clock)
    await put(cache, "young")
    clock.advance(60)
    await put(cache, "middle")
    clock.advance(0.001)
    await put(cache, "new")
    assert [await put(cache, "middle"), await put(cache, "new")] == [False, False]
    assert (cache.expired, cache.evicted) == (1, 0)


async def test_clear_forgets_what_is_stored() -> None:
    """After clear everything is computed anew; no byte is held."""
    cache = make()
    answer = Answer()
    seen = weakref.ref(answer)
    await put(cache, "a", answer)
    del answer
    cache.clear()
    assert seen() is None
    assert len(cache) == cache.bytes == 0
    assert await put(cache, "a", b"new")
    assert not await put(cache, "a", b"new")


async def test_clear_in_flight_keeps_old_answers_from_new_callers() -> None:
    """Who asked before clear gets the old answer, which is not stored; who asks after it starts anew at once."""
    cache, model = make(), Model()
    a, b = await ask(cache, model, "ab")
    cache.clear()
    c, d = await ask(cache, model, "cd")
    assert model.runs == ["a", "c"]
    model.answers("a", b"old")
    assert await answers(a, b) == [b"old"] * 2
    assert len(cache) == 0
    (e,) = await ask(cache, model, "e")
    model.answers("c", b"new")
    assert await answers(c, d, e) == [b"new"] * 3
    assert not await put(cache, "k", b"new")
    assert (cache.misses, cache.joined) == (2, 3)


async def test_clear_in_flight_ends_no_wait() -> None:
    """A flight that was cleared still goes to the next when its leader fails, and ends without harm to the new one."""
    cache, model = make(), Model()
    a, b = await ask(cache, model, "ab")
    cache.clear()
    (c,) = await ask(cache, model, "c")
    model.fails("a")
    await settle()
    assert model.runs == ["a", "c", "b"]
    model.fails("b")
    await settle()
    assert [str(task.exception()) for task in (a, b)] == ["failed for a", "failed for b"]
    (d,) = await ask(cache, model, "d")
    model.answers("c", b"new")
    assert await answers(c, d) == [b"new"] * 2
    assert cache.waiting == len(cache._flights) == 0


@pytest.mark.parametrize("entries", [100, 1366, 2740])  # dictionaries in between, full, and just enlarged
async def test_an_entry_costs_no_more_than_it_is_counted_for(entries: int) -> None:
    """What a cache takes, while it is full and answers come and go, is at most what it says it holds."""

    async def compute() -> Any:
        return None

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        cache: Cache[Any] = Cache(entries * ENTRY_BYTES, 3600.0)
        for n in range(3 * entries):
            await cache.answer(("digits", "1", hashlib.sha256(b"%d" % n).digest()), compute, size)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(cache) == entries
    assert cache.evicted == 2 * entries
    assert taken <= cache.bytes


@dataclass
class Caller:
    """One who asked. `asked` and `clears` are of when the cache heard of it, `outcome` is its answer or error."""

    key: str
    deadline: float
    nbytes: int
    asked: float = -1.0
    clears: int = -1
    outcome: "Made | BaseException | None" = None
    cancelled: bool = False


@dataclass
class Made:
    """One answer, with all that can be wrong about it."""

    key: str
    clears: int
    bytes: int
    ended: float = math.inf


class Failed(Exception):
    """Whose computation it was is in it."""


CAPACITY, SECONDS, MAX_WAITING, MAX_WAITING_BYTES = 3 * (ENTRY_BYTES + 100), 10.0, 4, 100


@settings(max_examples=200, stateful_step_count=40, deadline=None)
class AnyInterleaving(RuleBasedStateMachine):
    """Whatever happens in one turn of the event loop, and in which order: turns are a rule of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.loop.time = self.clock  # type: ignore[method-assign]
        self.cache = self.loop.run_until_complete(self.make())
        self.callers: list[Caller] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.running: list[tuple[Caller, Made, asyncio.Future[None]]] = []
        self.computed = 0
        self.clears = 0

    async def make(self) -> Cache[Made]:
        return Cache(CAPACITY, SECONDS, self.clock, MAX_WAITING, MAX_WAITING_BYTES)

    async def call(self, caller: Caller) -> None:
        caller.asked, caller.clears = self.clock(), self.clears
        try:
            made = await self.cache.answer(
                caller.key, partial(self.compute, caller), lambda made: made.bytes, caller.deadline, caller.nbytes
            )
            assert made.key == caller.key
            assert made.clears >= caller.clears, "computed before a clear that came before it was asked for"
            assert made.ended >= caller.asked - SECONDS, "too old"
            caller.outcome = made
        except (Failed, QueueFull, DeadlineExceeded, asyncio.CancelledError) as error:
            caller.outcome = error

    async def compute(self, caller: Caller) -> Made:
        self.computed += 1
        for other, _, _ in self.running:
            assert (other.key, other.clears) != (caller.key, caller.clears), "computed twice at a time"
        entry = (caller, Made(caller.key, self.clears, 0), self.loop.create_future())
        self.running.append(entry)
        try:
            await entry[2]
        except Failed:
            raise Failed(caller) from None
        finally:
            self.running.remove(entry)
        entry[1].ended = self.clock()
        return entry[1]

    @rule(
        key=st.sampled_from("abcde"),
        seconds=st.sampled_from([math.inf, math.inf, 0.0, 2.0, 5.0]),
        nbytes=st.sampled_from([0, 1, 60, 100, 101]),
    )
    def ask(self, key: str, seconds: float, nbytes: int) -> None:
        self.callers.append(Caller(key, self.clock() + seconds, nbytes))
        self.tasks.append(self.loop.create_task(self.call(self.callers[-1])))

    @rule(n=st.integers(2, 4), key=st.sampled_from("ab"), nbytes=st.sampled_from([0, 10, 40]))
    def ask_together(self, n: int, key: str, nbytes: int) -> None:
        for _ in range(n):
            self.ask(key, math.inf, nbytes)

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiting = [n for n, task in enumerate(self.tasks) if not task.done()]
        if waiting:
            n = data.draw(st.sampled_from(waiting))
            self.callers[n].cancelled = self.tasks[n].cancel() or self.callers[n].cancelled

    @precondition(lambda self: self.running)
    @rule(data=st.data(), size=st.sampled_from([0, 100, 100, 1000, 10**6]), fails=st.booleans())
    def end(self, data: st.DataObject, size: int, fails: bool) -> None:
        _, made, gate = data.draw(st.sampled_from(self.running))
        made.bytes = size
        if not gate.done():
            if fails:
                gate.set_exception(Failed())
            else:
                gate.set_result(None)

    @rule()
    def turn(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    @rule()
    def turns(self) -> None:
        for _ in range(10):
            self.turn()
        # Nothing is left to happen by itself: whoever waits has somebody who computes for it.
        computing = {(caller.key, caller.clears) for caller, _, _ in self.running}
        for caller, task in zip(self.callers, self.tasks, strict=True):
            assert task.done() or (caller.key, caller.clears) in computing, "left waiting"
        asking = [caller for caller, task in zip(self.callers, self.tasks, strict=True) if not task.done()]
        leading = [caller for caller, _, _ in self.running]
        assert self.cache.waiting == len(asking) - len(leading)
        assert self.cache.waiting_bytes == sum(c.nbytes for c in asking) - sum(c.nbytes for c in leading)

    @rule(seconds=st.sampled_from([1.0, 2.0, SECONDS, SECONDS + 0.1]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.clears += 1
        assert len(self.cache) == self.cache.bytes == 0

    @invariant()
    def bounds(self) -> None:
        cache = self.cache
        assert cache.bytes <= CAPACITY
        assert cache.bytes == sum(entry.size for entry in cache._by_use.values())
        assert cache._by_use.keys() == cache._by_age.keys()
        assert not cache._by_use.keys() & cache._flights.keys()
        assert 0 <= cache.waiting <= MAX_WAITING
        assert 0 <= cache.waiting_bytes <= MAX_WAITING_BYTES
        assert cache.misses + cache.handed_over == self.computed
        expires = [entry.expires for entry in cache._by_age.values()]
        assert expires == sorted(expires)

    def teardown(self) -> None:
        """Let every computation end: then everybody has been answered, each as it must be, and nothing is held."""
        self.turns()
        while self.running:
            for _, _, gate in self.running:
                if not gate.done():
                    gate.set_result(None)
            self.turns()
        refused = 0
        for caller, task in zip(self.callers, self.tasks, strict=True):
            assert task.done()
            if task.cancelled():  # before it ran at all
                assert caller.cancelled
                assert caller.asked == -1.0
                refused += 1
                continue
            task.result()  # an assertion that failed in it
            error = caller.outcome
            if isinstance(error, Failed):
                assert error.args == (caller,), "another's error"
            elif isinstance(error, asyncio.CancelledError):
                assert caller.cancelled, "cancelled by nobody"
            elif isinstance(error, DeadlineExceeded):
                assert caller.deadline <= self.clock()
            refused += isinstance(error, QueueFull) or (
                isinstance(error, DeadlineExceeded) and caller.deadline <= caller.asked
            )
        cache = self.cache
        assert cache.hits + cache.misses + cache.joined + refused == len(self.callers)
        outcomes = [type(caller.outcome) for caller in self.callers]
        assert (cache.refused, cache.late) == (outcomes.count(QueueFull), outcomes.count(DeadlineExceeded))
        assert not cache._flights
        assert cache.waiting == cache.waiting_bytes == 0
        self.loop.close()


TestAnyInterleaving = AnyInterleaving.TestCase
