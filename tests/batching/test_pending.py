"""Pending: what shares a batch, in which order, and what never gets there."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batching import DeadlineExceeded, Item, Pending, Policy, QueueFull

Waiting = Pending[str, None]


def item(name: str, rows: int = 1, bucket: object = "", at: float = 0.0, deadline: float = math.inf) -> Item[str, None]:
    return Item(name, None, rows, bucket, at, deadline)


def queue(*items: Item[str, None], max_rows: int = 4, max_delay: float = 0.0, capacity: int = 100) -> Waiting:
    pending: Waiting = Pending(Policy(max_rows, max_delay, capacity))
    for each in items:
        pending.push(each)
    return pending


def names(batch: list[Item[str, None]]) -> str:
    return "".join(each.payload for each in batch)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((0,), "max_rows"), ((1, -1.0), "max_delay"), ((1, math.nan), "max_delay"), ((1, math.inf), "max_delay"),
     ((8, 0.0, 7), "capacity")],
)  # fmt: skip
def test_policy_refuses_what_cannot_be(arguments: tuple[float, ...], word: str) -> None:
    """A policy under which nothing could ever be batched is refused, and the text names the field."""
    with pytest.raises(ValueError, match=word):
        Policy(*arguments)  # type: ignore[arg-type]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    """One row too many is QueueFull with the prediction it was given; the queue is as it was."""
    pending = queue(item("a", 4), item("b", 2), capacity=6)
    with pytest.raises(QueueFull, match=r"6 of 6 rows wait, no room for 1 more") as refused:
        pending.push(item("c"), retry_after=2.5)
    assert refused.value.retry_after == 2.5
    assert pending.rows == 6
    assert names(pending.next_batch()) == "a"
    pending.push(item("c", 4))
    assert pending.rows == 6


@pytest.mark.parametrize("deadline", [5.0, 4.9])
def test_a_deadline_that_is_over_is_refused_at_the_door(deadline: float) -> None:
    """An item whose deadline is now or earlier is never queued."""
    pending = queue()
    with pytest.raises(DeadlineExceeded):
        pending.push(item("a", at=5.0, deadline=deadline))
    assert pending.rows == 0
    assert pending.ready_at() == math.inf


def test_expire_takes_out_what_is_late_and_nothing_else() -> None:
    """At its deadline an item is out, in order of deadline; a later one, and one without, stay."""
    pending = queue(item("a", deadline=3.0), item("b", deadline=2.0), item("c", deadline=3.1), item("d"))
    assert pending.expire(1.9) == []
    assert pending.next_deadline() == 2.0
    assert names(pending.expire(3.0)) == "ba"
    assert pending.next_deadline() == 3.1
    assert pending.rows == 2
    assert names(pending.next_batch()) == "cd"
    assert pending.next_deadline() == math.inf


def test_a_forgotten_item_makes_room_at_once_and_is_never_sealed() -> None:
    """Forgetting frees the item's rows before any batch is formed; forgetting twice does nothing."""
    a, b, c = item("a", 2), item("b", 2), item("c", 2)
    pending = queue(a, b, c, capacity=6)
    assert pending.forget(b)
    assert not pending.forget(b)
    assert pending.rows == 4
    pending.push(item("d", 2))
    assert names(pending.next_batch()) == "ac"
    assert not pending.forget(a)
    assert names(pending.next_batch()) == "d"
    assert pending.rows == 0


def test_forgotten_heads_do_not_make_a_queue_look_old() -> None:
    """ready_at is that of the oldest item that is still there."""
    a, b = item("a", at=1.0), item("b", at=2.0)
    pending = queue(a, b)
    assert pending.ready_at() == 1.0
    pending.forget(a)
    assert pending.ready_at() == 2.0
    pending.forget(b)
    assert pending.ready_at() == math.inf
    assert pending.next_batch() == []


def test_a_batch_is_first_come_first_served_up_to_max_rows() -> None:
    """Items leave in order of arrival; one that does not fit waits, and those behind it with it."""
    pending = queue(item("a"), item("b", 2), item("c", 2), item("d"), max_rows=4)
    assert names(pending.next_batch()) == "ab"
    assert names(pending.next_batch()) == "cd"
    assert pending.next_batch() == []


def test_only_equal_buckets_share_a_batch_and_the_oldest_goes_next() -> None:
    """Interleaved buckets form one batch each, the one with the oldest item first."""
    pending = queue(*(item(name, bucket=name.lower(), at=at) for at, name in enumerate("xyXyxY")))
    assert names(pending.next_batch()) == "xXx"
    assert names(pending.next_batch()) == "yyY"


def test_an_item_without_bucket_goes_alone() -> None:
    """Items whose bucket is None are sealed one by one, whatever their rows, and without delay."""
    pending = queue(item("a", bucket=None), item("b", bucket=None, at=1.0), max_delay=9.0)
    assert pending.ready_at() == 0.0
    assert names(pending.next_batch()) == "a"
    assert pending.ready_at() == 1.0
    assert names(pending.next_batch()) == "b"


def test_delay_runs_from_the_oldest_push_and_a_full_batch_does_not_wait() -> None:
    """A batch that is not full is ready max_delay after its oldest item; one that is full is ready at once."""
    pending = queue(item("a", at=10.0), item("b", at=12.0), max_rows=4, max_delay=5.0)
    assert pending.ready_at() == 15.0
    pending.push(item("c", 2, at=13.0))
    assert pending.ready_at() == 10.0


def test_a_full_bucket_overtakes_one_that_waits_for_company() -> None:
    """With a delay, a bucket that fills a batch goes before an older one that does not, and that one still goes."""
    pending = queue(item("a", bucket=1, at=10.0), max_rows=2, max_delay=5.0)
    pending.push(item("b", bucket=2, at=11.0))
    pending.push(item("c", bucket=2, at=11.5))
    assert pending.ready_at() == 11.0
    assert names(pending.next_batch()) == "bc"
    assert pending.ready_at() == 15.0
    assert names(pending.next_batch()) == "a"


def test_a_queue_whose_callers_come_and_go_does_not_grow() -> None:
    """Behind a stuck lane, forgotten items are let go of when they outnumber the capacity; so are their deadlines."""
    keep = item("k", deadline=9.0)
    pending = queue(keep, max_rows=1, capacity=10)
    for number in range(1000):
        left = item("x", deadline=5.0 + number)
        pending.push(left)
        pending.forget(left)
    assert sum(len(bucket.items) for bucket in pending._buckets.values()) <= 2 * 10 + 2
    assert len(pending._deadlines) <= 2 * 10 + 2
    assert names(pending.next_batch()) == "k"


class Model(RuleBasedStateMachine):
    """Any interleaving of pushes, departures, expiry and batches against a list that is searched in full."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy(max_rows=4, capacity=12)
        self.pending: Waiting = Pending(self.policy)
        self.now = 0.0
        self.waiting: list[Item[str, None]] = []

    @rule(
        rows=st.integers(1, 4), bucket=st.sampled_from(["a", "b", None]), patience=st.sampled_from([0.5, 2.0, math.inf])
    )
    def push(self, rows: int, bucket: str | None, patience: float) -> None:
        new = item("", rows, bucket, self.now, self.now + patience)
        room = sum(each.rows for each in self.waiting) + rows <= 12
        try:
            self.pending.push(new)
        except QueueFull:
            assert not room
        else:
            assert room
            self.waiting.append(new)

    @rule(seconds=st.sampled_from([0.1, 0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        assert self.pending.forget(gone)
        self.waiting.remove(gone)

    @rule()
    def expire(self) -> None:
        late = [each for each in self.waiting if each.deadline <= self.now]
        assert sorted(map(id, self.pending.expire(self.now))) == sorted(map(id, late))
        self.waiting = [each for each in self.waiting if each not in late]

    @rule()
    def seal(self) -> None:
        batch = self.pending.next_batch()
        if not self.waiting:
            assert batch == []
            return
        oldest = min(self.waiting, key=lambda each: each.enqueued)
        assert batch[0].enqueued == oldest.enqueued
        mates = [each for each in self.waiting if each.bucket == batch[0].bucket]
        expected, room = [], 4
        for each in mates[: 1 if batch[0].bucket is None else None]:
            room -= each.rows
            if room < 0:
                break
            expected.append(each)
        assert batch == expected
        self.waiting = [each for each in self.waiting if each not in batch]

    @invariant()
    def counts(self) -> None:
        assert self.pending.rows == sum(each.rows for each in self.waiting)
        assert self.pending.ready_at() == min((each.enqueued for each in self.waiting), default=math.inf)
        assert self.pending.next_deadline() == min((each.deadline for each in self.waiting), default=math.inf)
        assert all(each.queued for each in self.waiting)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
