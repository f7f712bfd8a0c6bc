"""Pending: who is let in, who stands where in line, and how an item leaves without being sealed.

What is sealed, and when, is in test_pending_batches.py; test_pending_properties.py does both at random.
"""

import gc
import math
import weakref
from typing import Any

import pytest

from batching import CannotMeetDeadline, DeadlineExceeded, Item, Level, QueueFull
from batching.pending import PROBE, REMEMBERED, WORTH_PREPARING

from .waiting import assert_empty, cost, item, leave, names, queue, sealed

TWO = (Level(), Level())


# The door.


def test_a_queue_full_of_rows_refuses_and_says_when_to_come_back() -> None:
    """One row too many is QueueFull, to come back when what waits is served; the last row that fits is let in."""
    pending = queue(item("a", 4), item("b"), capacity=6, costs=cost(1.0, 0.5))
    for free_at, retry_after in ((-math.inf, 4.5), (2.0, 4.5), (5.5, 7.0)):
        with pytest.raises(QueueFull) as refused:
            pending.push(item("c", 2, at=3.0), free_at)
        assert str(refused.value) == "the queue is full: 5 of 6 rows wait, no room for 2 more"
        assert refused.value.retry_after == retry_after
    assert pending.rows == 5
    pending.push(item("d"))
    with pytest.raises(QueueFull):
        pending.push(item("e"))
    assert leave(pending) == ["a", "bd"]
    assert_empty(pending)


def test_a_queue_full_of_bytes_refuses() -> None:
    """Bytes are counted like rows, and the text says which of the two there were too many of."""
    pending = queue(item("a", nbytes=6), capacity_bytes=10)
    with pytest.raises(QueueFull, match="^the queue is full: 6 of 10 bytes wait, no room for 5 more$"):
        pending.push(item("b", nbytes=5))
    pending.push(item("c", nbytes=4))
    assert pending.nbytes == 10
    with pytest.raises(QueueFull, match="10 of 10 bytes"):
        pending.push(item("d", nbytes=1))
    pending.push(item("e"))
    assert leave(pending) == ["ace"]
    assert_empty(pending)


def test_a_full_level_refuses_and_the_others_do_not() -> None:
    """max_items counts the items of one level, whatever their rows; the words are Triton's; who leaves makes room."""
    pending = queue(levels=(Level(max_items=2), Level()), default_level=1)
    high = [item(name, 2, priority=1) for name in "abc"]
    pending.push(high[0])
    pending.push(high[1])
    with pytest.raises(QueueFull, match="^Exceeds maximum queue size: 2 requests of priority level 1 wait$") as refused:
        pending.push(high[2], 2.0)
    assert refused.value.retry_after == 2.0
    for name in "xyz":
        pending.push(item(name))
    assert pending.forget(high[0])
    pending.push(high[2])
    assert leave(pending) == ["bc", "xyz"]
    assert_empty(pending)


def alike(count: int, first: str = "a", **more: Any) -> list[Item[str, None]]:
    return [item(chr(ord(first) + index), **more) for index in range(count)]


def test_items_that_are_alike_are_queued_together_up_to_the_last_row_and_byte() -> None:
    """They stand in line as if they had come one by one, with those before and after them."""
    pending = queue(item("x", nbytes=2), capacity=7, capacity_bytes=14)
    assert pending.push_alike(alike(3, rows=2, nbytes=4))
    assert (len(pending), pending.rows, pending.nbytes) == (4, 7, 14)
    with pytest.raises(QueueFull, match="7 of 7 rows"):
        pending.push(item("z"))
    assert leave(pending) == ["xa", "bc"]
    pending.push(item("y"))
    assert leave(pending) == ["y"]
    assert_empty(pending)


@pytest.mark.parametrize(
    ("knobs", "more"),
    [
        ({"capacity": 5}, {"rows": 2}),
        ({"capacity_bytes": 11}, {"nbytes": 4}),
        ({}, {"bucket": None}),
        ({}, {"deadline": 5.0}),
        ({"max_delay": 1.0}, {}),
        ({"fair": True}, {}),
        ({"levels": (Level(timeout=1.0),)}, {}),
        ({"levels": (Level(max_items=9),)}, {}),
    ],
    ids=lambda values: " ".join(map(str, values)) or "-",
)
def test_what_has_to_be_looked_at_one_by_one_is_not_queued_together(
    knobs: dict[str, Any], more: dict[str, Any]
) -> None:
    """Whoever asked is told so, and none of the items is queued."""
    pending = queue(**knobs)
    items = alike(3, **more)
    assert not pending.push_alike(items)
    assert not any(each.queued for each in items)
    assert_empty(pending)


def test_items_that_are_alike_stand_where_their_level_says() -> None:
    """Behind a level above theirs and before one below, each of them; and they leave one by one like any others."""
    pending = queue(item("z", priority=3), item("h", priority=1), levels=(Level(), Level(), Level()), default_level=2)
    items = alike(3, priority=2)
    assert pending.push_alike(items)
    assert pending.push_alike(alike(1, "y"))
    assert pending.push_alike(alike(1, "i", priority=1))
    assert pending.forget(items[1])
    assert not pending.forget(items[1])
    assert leave(pending) == ["hiac", "zy"]
    assert_empty(pending)


def test_items_that_are_alike_keep_the_objective() -> None:
    """Their batch is as small as the latency objective makes it, as for any others; other queues have no promises."""
    for objective, expected in ((2.5, ["ab", "c"]), (math.inf, ["abc"])):
        pending = queue(costs=cost(0.0, 1.0), objective=objective)
        assert pending.push_alike(alike(3))
        assert leave(pending) == expected
        assert_empty(pending)


def test_items_that_are_alike_share_a_bucket_with_their_padded_length() -> None:
    """Their length is that of the grid."""
    pending = queue(item("x", length=3), lengths=(4, 8))
    assert pending.push_alike(alike(2, length=2))
    assert pending.push_alike(alike(1, "d", length=5))
    for expected in (("xab", 4, 7), ("d", 8, 5)):
        batch = sealed(pending)
        assert (names(batch.items), batch.length, batch.tokens) == expected
    assert_empty(pending)


def test_a_level_may_hold_hundreds() -> None:
    """And not one more."""
    pending = queue(*(item("a") for _ in range(300)), levels=(Level(max_items=300),))
    with pytest.raises(QueueFull, match="Exceeds"):
        pending.push(item("b"))


def test_a_level_that_limits_its_items_is_still_bounded_in_rows_and_bytes() -> None:
    """The queue's own bounds come first."""
    pending = queue(item("a", 4, nbytes=3), capacity=5, capacity_bytes=5, levels=(Level(max_items=9),))
    with pytest.raises(QueueFull, match="4 of 5 rows wait, no room for 2 more"):
        pending.push(item("b", 2))
    with pytest.raises(QueueFull, match="3 of 5 bytes wait, no room for 3 more"):
        pending.push(item("b", nbytes=3))
    pending.push(item("c", nbytes=2))
    assert (pending.rows, pending.nbytes) == (5, 5)


def test_one_client_may_not_fill_more_than_what_is_left() -> None:
    """Where shares are fair, a client's rows are at most the rows that nobody has taken: others still find room."""
    pending = queue(item("a", 2, client="A"), item("b", 2, client="A"), capacity=8, fair=True)
    with pytest.raises(QueueFull) as refused:
        pending.push(item("c", client="A"))
    text = "this client has its share of the queue: 4 rows of its own wait, and the last 4 are for others"
    assert str(refused.value) == text
    pending.push(item("d", 4, client="B"))
    with pytest.raises(QueueFull, match="8 of 8 rows wait, no room for 1 more"):
        pending.push(item("e", client="C"))


def test_who_brings_no_bytes_needs_no_room_for_them() -> None:
    """A client that holds most of the bytes may still ask for what holds none."""
    pending = queue(item("a", nbytes=8, client="A"), capacity_bytes=9, fair=True)
    pending.push(item("b", nbytes=0, client="A"))
    assert len(pending) == 2


def test_one_clients_rows_may_be_exactly_what_is_left() -> None:
    """Half of the room is one's own to take, and not a row more; the same goes for bytes."""
    pending = queue(item("a", 2, client="A"), capacity=8, fair=True)
    pending.push(item("b", 2, client="A"))
    assert pending.rows == 4
    pending = queue(item("a", 3, client="A"), capacity=8, fair=True)
    with pytest.raises(QueueFull, match="3 rows of its own wait, and the last 5 are for others"):
        pending.push(item("b", 3, client="A"))
    pending = queue(item("a", nbytes=3, client="A"), capacity_bytes=9, fair=True)
    with pytest.raises(QueueFull, match="3 bytes of its own wait, and the last 6 are for others"):
        pending.push(item("b", nbytes=4, client="A"))
    with pytest.raises(QueueFull, match="3 of 9 bytes wait, no room for 7 more"):
        pending.push(item("b", nbytes=7, client="A"))
    pending.push(item("b", nbytes=3, client="A"))
    with pytest.raises(QueueFull, match="6 bytes of its own wait, and the last 3 are for others"):
        pending.push(item("c", nbytes=1, client="A"))
    pending.push(item("e", nbytes=3, client="B"))
    with pytest.raises(QueueFull, match="9 of 9 bytes wait, no room for 1 more"):
        pending.push(item("f", nbytes=1, client="B"))
    assert leave(pending) == ["aeb"]
    assert_empty(pending)


def test_without_shares_one_client_may_take_all_the_room() -> None:
    """Clients are not looked at unless shares are fair."""
    pending = queue(item("a", 4, client="A"), item("b", 4, client="A"), capacity=8)
    assert pending.rows == 8


@pytest.mark.parametrize("deadline", [5.0, 4.9])
def test_a_deadline_that_is_over_is_refused_at_the_door(deadline: float) -> None:
    """An item whose deadline is now or earlier is never queued, whatever else is wrong with it."""
    pending = queue(item("x", 4), capacity=4)
    with pytest.raises(DeadlineExceeded):
        pending.push(item("a", at=5.0, deadline=deadline))
    assert leave(pending) == ["x"]
    assert_empty(pending)


def test_an_answer_that_would_come_too_late_is_refused_at_the_door() -> None:
    """A lane that is busy until 3, then 1 second for the batch: 4 is too late to be in time at 4."""
    for deadline, retry_after in ((3.5, 0.5), (4.0, 0.0)):
        pending = queue(costs=cost(1.0))
        late = item("a", at=1.0, deadline=deadline)
        with pytest.raises(CannotMeetDeadline) as refused:
            pending.push(late, 3.0)
        assert str(refused.value) == f"the deadline is {deadline - 1:.3g} s away, the answer is expected in 3 s"
        assert refused.value.retry_after == retry_after
        assert not late.queued
        assert_empty(pending)
    pending.push(item("b", at=1.0, deadline=4.25), 3.0)
    assert pending.next_timer() == 3.25


def test_the_rows_that_share_the_batch_count_against_a_deadline() -> None:
    """Its own batch takes what its rows and those that wait in its bucket take, no more than a full one."""
    pending = queue(item("a", 2), costs=cost(0.0, 1.0), max_rows=4)
    for rows, deadline in ((1, 4.0), (2, 5.0)):
        with pytest.raises(CannotMeetDeadline):
            pending.push(item("b", rows, deadline=deadline), 1.0)
    pending.push(item("c", 4, deadline=5.5), 1.0)
    assert pending.next_timer() == 1.5


def test_those_behind_without_a_deadline_do_not_count_against_one() -> None:
    """Its batch takes no more of them than the deadline allows: it is the same whether they came before it or after."""
    for order in ("before", "after"):
        pending = queue(costs=cost(4.0, 1.0), max_rows=32, patience=100.0)
        if order == "after":
            pending.push(item("d", deadline=40.0), 10.0)
        for _ in range(31):
            pending.push(item("x"))
        if order == "before":
            pending.push(item("d", deadline=40.0), 10.0)
        assert pending.next_timer() == 35.0
        assert pending.advance(10.0) == []
        batch = sealed(pending, 10.0)
        assert names(batch.items) == "d" + "x" * 25
        assert batch.reason == "deadline"


def test_those_who_left_do_not_count_against_a_deadline() -> None:
    """What was expected to share its batch is gone when its time comes: it waits for its own last moment."""
    others = [item("x", 2, deadline=20.0) for _ in range(3)]
    pending = queue(*others, costs=cost(0.0, 1.0), max_rows=8)
    waits = item("d", 2, deadline=20.0)
    pending.push(waits)
    assert pending.next_timer() == 12.0
    for each in others[1:]:
        pending.forget(each)
    assert pending.advance(13.0) == []
    assert pending.next_timer() == 16.0
    pending.forget(others[0])
    assert pending.advance(16.0) == []
    assert pending.next_timer() == 18.0
    assert pending.advance(18.0) == [waits]
    assert_empty(pending)


def test_those_with_deadlines_behind_count_against_one_as_long_as_they_wait() -> None:
    """They will want to share its batch. Who has none, who was sealed and who left does not count."""
    pending = queue(costs=cost(0.0, 1.0), max_rows=8, patience=100.0, capacity=100)

    def sealed_by(deadline: float) -> float:
        """When a request of one row would be sealed at the latest; it leaves again."""
        asks = item("?", deadline=deadline)
        pending.push(asks)
        timer = pending.next_timer()
        pending.forget(asks)
        return timer

    assert sealed_by(20.0) == 19.0
    behind = [item("d", 2, deadline=50.0), item("d", 1, deadline=60.0), item("x", 3), item("x", 2)]
    for each in behind:
        pending.push(each)
    assert sealed_by(20.0) == 20.0 - 1 - 3
    pending.forget(behind[2])
    assert sealed_by(20.0) == 20.0 - 1 - 3
    pending.forget(behind[0])
    assert sealed_by(20.0) == 20.0 - 1 - 1
    for _ in range(4):
        pending.push(item("e", 2, deadline=55.0))
    assert sealed_by(20.0) == 20.0 - 8
    assert names(sealed(pending).items) == "eeee"
    assert sealed_by(20.0) == 20.0 - 1 - 1
    assert names(sealed(pending).items) == "dx"
    for each in (item("x", 6), item("d", 2, deadline=150.0), item("d", 1, deadline=160.0)):
        pending.push(each)
    assert names(sealed(pending).items) == "xd"
    assert sealed_by(20.0) == 20.0 - 1 - 1


def test_rounds_ahead_take_what_stacking_takes_where_that_is_longer() -> None:
    """While one batch runs for 1 second the next one is stacked for 3: a batch leaves every 3 seconds."""
    pending = queue(*(item("x") for _ in range(9)), costs=cost(1.0), stacking=cost(3.0))
    assert pending.drain_seconds() == 9.0
    with pytest.raises(CannotMeetDeadline, match="the answer is expected in 7 s"):
        pending.push(item("a", deadline=7.0))
    pending.push(item("b", bucket="b", deadline=10.5))
    assert pending.drain_seconds() == 12.0
    for running, stacking, takes in (
        (2.0, 1.0, 2.0),
        (0.0, WORTH_PREPARING, WORTH_PREPARING),
        (0.0, 0.9 * WORTH_PREPARING, 0.0),  # not worth doing ahead of time: a part of running
    ):
        waits = queue(*(item("x") for _ in range(9)), costs=cost(running), stacking=cost(stacking))
        assert waits.drain_seconds() == 3 * takes


def test_stacking_counts_against_a_deadline_where_no_other_batch_hides_it() -> None:
    """A batch that is stacked for 2 seconds and runs for 1, on a lane that is busy until 3 or until 1."""
    for free_at, deadline, late_at in ((3.0, 4.5, 1.5), (1.0, 3.5, 0.5)):
        pending = queue(costs=cost(1.0), stacking=cost(2.0))
        with pytest.raises(CannotMeetDeadline, match=f"the answer is expected in {deadline - 0.5:.3g} s"):
            pending.push(item("a", deadline=deadline - 0.5), free_at)
        waits = item("b", deadline=deadline)
        pending.push(waits, free_at)
        assert pending.next_timer() == late_at
        assert pending.answered_at(waits, 0.0, free_at) == deadline - 0.5
    pending = queue(costs=cost(1.0), stacking=cost(2.0))
    pending.push(item("c", deadline=0.5))  # it would lead at once: the model may be quicker than that
    assert pending.next_timer() == 0.5


def test_a_stacking_that_is_not_worth_doing_ahead_of_time_counts_as_running() -> None:
    """A batch's time was learned with it."""
    for seconds, late_at in ((0.9 * WORTH_PREPARING, 4.0), (WORTH_PREPARING, 4.0 - WORTH_PREPARING)):
        pending = queue(item("a", deadline=5.0), costs=cost(1.0), stacking=cost(seconds))
        assert pending.next_timer() == late_at
        batch = sealed(pending)
        assert batch.expected == 1.0 + batch.stacking
        assert batch.stacking == (WORTH_PREPARING if seconds == WORTH_PREPARING else 0.0)


def test_every_full_batch_ahead_counts_against_a_deadline() -> None:
    """Nine rows ahead are two batches and one row: the tenth starts after two, and is done after its own."""
    pending = queue(*(item("x") for _ in range(9)), costs=cost(1.0, 0.25))
    with pytest.raises(CannotMeetDeadline, match="deadline is 5.5 s away, the answer is expected in 5.5 s"):
        pending.push(item("a", deadline=5.5))
    pending.push(item("b", deadline=6.0))
    assert pending.next_timer() == 4.5


def test_whoever_would_lead_at_once_is_never_refused() -> None:
    """A prediction that no deadline can meet is put to the test: the item is late at its deadline only."""
    pending = queue(costs=cost(100.0))
    pending.push(item("a", deadline=1.0), 0.0)
    assert pending.next_timer() == 1.0
    assert pending.advance(0.99) == []
    assert leave(pending, 0.99) == ["a"]
    pending.push(item("b", at=5.0, deadline=6.0), 5.0)
    with pytest.raises(CannotMeetDeadline):
        pending.push(item("c", at=5.0, deadline=6.0), 5.25)
    assert names(pending.advance(6.0)) == "b"
    assert_empty(pending)


def test_whoever_would_get_aboard_at_once_is_not_refused_either() -> None:
    """There is room in the first batch: as good as to lead it. There is none: the model need not show anything."""
    pending = queue(item("x", 3), costs=cost(100.0))
    pending.push(item("a", deadline=50.0))
    with pytest.raises(CannotMeetDeadline):
        pending.push(item("b", at=0.0, deadline=50.0))
    assert leave(pending) == ["xa"]


def test_after_many_refusals_one_is_let_in_to_learn_from() -> None:
    """On a lane that others keep busy a wrong prediction would refuse all there is, and never be corrected."""
    pending = queue(costs=cost(9.0))
    for _ in range(2):
        for _ in range(PROBE):
            with pytest.raises(CannotMeetDeadline):
                pending.push(item("a", deadline=5.0), free_at=1.0)
        pending.push(item("a", deadline=5.0), free_at=1.0)
        with pytest.raises(CannotMeetDeadline):
            pending.push(item("b", deadline=5.0), free_at=1.0)
        assert leave(pending) == ["a"]


def test_lengths_that_may_share_a_batch_are_not_counted_as_batches_of_their_own() -> None:
    """31 items of 31 lengths make one batch of 5 seconds: who comes then has 10 to wait, not 160."""
    pending = queue(*(item("a", length=n) for n in range(1, 32)), costs=cost(5.0), max_rows=32)
    assert pending.drain_seconds() == 5.0
    pending.push(item("b", length=32, deadline=10.5))
    for _ in range(2):
        pending.push(item("c", bucket="other"))
    assert pending.drain_seconds() == 10.0
    assert len(sealed(pending).items) == 32
    assert pending.drain_seconds() == 5.0
    pending = queue(*(item("a", 2, length=n) for n in range(1, 21)), costs=cost(5.0), max_rows=32)
    assert pending.drain_seconds() == 10.0


def test_ordered_items_stand_by_arrival() -> None:
    """An answer that is early would only wait for its turn, so a deadline is no way to the front."""
    pending = queue(item("a"), item("b"), costs=cost(1.0), max_rows=1, ordered=True)
    with pytest.raises(CannotMeetDeadline):
        pending.push(item("c", deadline=2.5))
    pending.push(item("d", deadline=3.5))
    assert leave(pending) == ["a", "b", "d"]


def test_nothing_is_refused_before_anything_was_learned() -> None:
    """Costs of 0 keep every deadline, however many wait."""
    pending = queue(*(item("x") for _ in range(50)))
    pending.push(item("a", deadline=1e-9))
    assert leave(pending)[0][0] == "a"


# Predictions.


def test_an_answer_is_expected_after_the_full_batches_of_its_bucket() -> None:
    """The k-th of ten single rows starts after k // 4 batches of 4; its own may yet be filled."""
    waiting = [item(str(number)) for number in range(10)]
    pending = queue(*waiting, costs=cost(1.0, 0.25))
    answers = [pending.answered_at(each, 10.0) for each in waiting]
    assert answers == [10 + 2 * (1 + number // 4) for number in range(10)]
    assert pending.answered_at(waiting[0], 10.0, 12.0) == 14.0
    assert pending.answered_at(waiting[0], 10.0, 9.0) == 12.0
    assert pending.drain_seconds() == 3 + 2.5


def test_items_of_several_rows_count_with_their_mean() -> None:
    """Six items of 12 rows: after three of them, six rows are ahead, which is one batch of 4."""
    waiting = [item(str(number), rows) for number, rows in enumerate((3, 1, 3, 1, 3, 1))]
    pending = queue(*waiting, costs=cost(1.0))
    assert [pending.answered_at(each, 0.0) for each in waiting] == [1, 1, 2, 2, 3, 3]


def test_other_buckets_count_with_the_share_of_them_that_is_ahead() -> None:
    """Half of the other items stand ahead: half of what they take is waited for."""
    others = [item("x", bucket="x", deadline=deadline) for deadline in (100, 101, 200, 201)]
    pending = queue(*others, costs=cost(1.0, 0.25))
    middle = item("m", 2, "m", deadline=150.0)
    pending.push(middle)
    assert pending.answered_at(middle, 0.0) == 1.0 + 1.5
    assert pending.answered_at(others[0], 0.0) == 2.0
    assert pending.answered_at(others[2], 0.0) == 1.5 + 2.0
    first, last = item("f", bucket="f", deadline=50.0), item("l", bucket="l", deadline=250.0)
    pending.push(first)
    pending.push(last)
    assert pending.answered_at(first, 0.0) == 1.25
    assert pending.answered_at(last, 0.0) == 2.0 + 1.5 + 1.25 + 1.25


def test_other_buckets_count_against_a_deadline_at_the_door() -> None:
    """An item with a deadline stands before those with a later one, and only what is ahead of it is waited for."""
    pending = queue(*(item("x", 4, "x", deadline=20.0) for _ in range(2)), costs=cost(1.0))
    with pytest.raises(CannotMeetDeadline):
        pending.push(item("a", bucket="a", deadline=21.0), 18.0 + 0.5)
    pending.push(item("b", bucket="b", deadline=19.0), 17.5)
    assert leave(pending)[0] == "b"


def test_items_that_go_alone_are_a_batch_each_in_every_prediction() -> None:
    """Three single rows without bucket take three batches, each padded to the grid on its own."""
    waiting = [item(name, bucket=None) for name in "abc"]
    pending = queue(*waiting, max_rows=8, row_grid=(4, 8), costs=cost(1.0, 0.25))
    assert pending.drain_seconds() == 6.0
    assert [pending.answered_at(each, 0.0) for each in waiting] == [2.0, 4.0, 6.0]


def test_what_waits_is_counted_with_its_padding() -> None:
    """Two batches of 8 rows of 10, and three rows that are padded to 4: the work of 20 rows."""
    pending = queue(*(item("x", length=9) for _ in range(19)), max_rows=8, row_grid=(4, 8), lengths=(10,))
    pending.cost.a, pending.cost.b = 1.0, 0.5
    assert pending.drain_seconds() == 3 + 0.5 * 20 * 10
    assert leave(pending) == ["x" * 8, "x" * 8, "xxx"]
    assert_empty(pending)


# The line.


def test_a_higher_level_goes_first() -> None:
    """Levels in order, 1 first; 0 and one too many are the default; inside a level the line goes on as ever."""
    pending = queue(levels=(Level(), Level(), Level()), default_level=1, max_rows=1)
    for name, priority, deadline in (("d", 3, 1.0), ("c", 0, 9.0), ("b", 2, 8.0), ("e", 7, 9.5), ("a", 1, 99.0)):
        pending.push(item(name, priority=priority, deadline=deadline))
    assert leave(pending) == list("abced")


def test_the_earlier_deadline_goes_first_and_then_the_earlier_arrival() -> None:
    """Equal deadlines, and none, in the order of their pushes."""
    deadlines = (("d", 0.9), ("e", 0.9), ("b", 0.5), ("c", 0.5), ("f", math.inf), ("g", math.inf), ("a", 0.25))
    pending = queue(*(item(name, deadline=deadline) for name, deadline in deadlines), max_rows=1)
    assert leave(pending) == list("abcdefg")


def test_an_item_without_deadline_stands_where_its_patience_puts_it() -> None:
    """Before those whose deadline is later than `patience` seconds after its push, or as late but pushed later."""
    pending = queue(item("l", at=2.0, deadline=7.25), item("b", at=2.0, deadline=7.0), max_rows=1, patience=5.0)
    pending.push(item("p", at=2.0))
    pending.push(item("c", at=2.0, deadline=7.0))
    pending.push(item("a", at=2.0, deadline=6.75))
    assert leave(pending) == list("abpcl")


def test_an_item_whose_level_times_out_stands_where_its_timeout_puts_it() -> None:
    """To be refused after 2 seconds is a deadline, though not one the model's time counts against."""
    pending = queue(levels=(Level(timeout=2.0, override=True),), max_rows=1, costs=cost(100.0))
    pending.push(item("b"))
    pending.push(item("c", at=0.5))
    pending.push(item("a", timeout=1.5))
    assert pending.head(0.0) == 1.5
    assert leave(pending) == list("abc")


def test_fair_shares_are_of_rows_and_lengths_not_of_requests() -> None:
    """One client's rows of length 2 count half as much as the other's of 4, rows and lengths being one."""
    pending = queue(fair=True)
    for _ in range(6):
        pending.push(item("a", bucket=None, length=2, client="A"))
    for _ in range(3):
        pending.push(item("b", 4, bucket=None, client="B"))
    assert "".join(leave(pending)) == "abaabaaba"


def test_who_sends_most_does_not_get_most() -> None:
    """A client that comes with its second request when another has forty waiting goes second, not forty-first."""
    pending = queue(*(item("a", client="A") for _ in range(40)), max_rows=1, fair=True)
    pending.push(item("b", client="B"))
    pending.push(item("b", client="B"))
    assert leave(pending)[:6] == list("ababaa")


def test_a_deadline_does_not_buy_more_than_a_fair_share() -> None:
    """The turn comes before the deadline: urgent requests of the busy client wait for its own turn."""
    pending = queue(*(item("a", client="A", deadline=0.5) for _ in range(3)), max_rows=1, fair=True)
    pending.push(item("b", client="B", deadline=0.9))
    assert leave(pending) == list("abaa")


def test_a_newcomer_starts_at_the_present_turn() -> None:
    """What it did not ask for while others were served is not owed to it."""
    pending = queue(*(item("a", client="A") for _ in range(10)), max_rows=1, fair=True)
    assert "".join(names(sealed(pending).items) for _ in range(5)) == "aaaaa"
    for _ in range(5):
        pending.push(item("b", client="B"))
    assert "".join(leave(pending)) == "bababababa"


def test_who_gives_up_is_not_charged_for_it() -> None:
    """A client whose callers leave before they are served is owed its share all the same: `c` is no stranger's."""
    pending = queue(max_rows=1, fair=True)
    stays = [item("a", client="A") for _ in range(2)]
    gone = [item("a", 1, client="A") for _ in range(50)]
    for each in (stays[0], *gone, stays[1]):
        pending.push(each)
    for _ in range(4):
        pending.push(item("b", client="B"))
    for each in gone:
        pending.forget(each)
    pending.push(item("c", client="A"))
    assert "".join(leave(pending)).index("c") < 5


def test_who_waited_in_a_lower_level_does_not_bring_the_past_back() -> None:
    """Served last, its turn is long ago; who comes then starts at the present one all the same."""
    pending = queue(*(item("a", client="A", priority=1) for _ in range(4)), max_rows=1, fair=True, levels=TWO)
    for client in "AB":
        pending.push(item(client.lower(), client=client, priority=2))
        pending.push(item(client.lower(), client=client, priority=2))
    assert "".join(names(sealed(pending).items) for _ in range(5)) == "aaaab"
    for _ in range(4):
        pending.push(item("c", client="C", priority=2))
    assert "".join(leave(pending)) == "bcacacc"


@pytest.mark.parametrize("outstanding", [1, 2, 3])
def test_who_comes_back_at_once_does_not_starve_who_waits(outstanding: int) -> None:
    """A client whose requests are never all queued at a time pays for those that were sealed, all the same."""
    pending = queue(*(item("b", client="B") for _ in range(40)), max_rows=4, fair=True)
    for _ in range(outstanding):
        pending.push(item("a", 4, client="A"))
    served = {"a": 0, "b": 0}
    while served["b"] < 40:
        batch = sealed(pending)
        for each in batch.items:
            served[each.payload] += each.rows
            if each.payload == "a":
                pending.push(item("a", 4, client="A"))
        assert abs(served["a"] - served["b"]) <= 4 + 4
    assert len(pending) == outstanding


def test_who_leaves_after_being_served_pays_all_the_same() -> None:
    """To cancel what still waits and to ask again is no way to the front of the line."""
    pending = queue(*(item("b", client="B") for _ in range(60)), fair=True, capacity=1000)
    served = {"a": 0, "b": 0}
    while served["b"] < 40:
        burst = [item("a", client="A") for _ in range(20)]
        for each in burst:
            pending.push(each)
        for each in sealed(pending).items:
            served[each.payload] += 1
        for each in burst:
            pending.forget(each)
    assert abs(served["a"] - served["b"]) <= 4


def test_what_others_were_served_is_no_debt_of_a_newcomers() -> None:
    """After a client with long items, a third one does not stand behind the second one's whole backlog."""
    pending = queue(*(item("a", client="A", bucket="long", length=500) for _ in range(4)), fair=True, capacity=1000)
    for _ in range(100):
        pending.push(item("b", client="B"))
    assert names(sealed(pending).items) == "aaaa"
    pending.push(item("c", client="C"))
    assert "c" in names(sealed(pending).items)


def test_so_many_names_are_no_clients() -> None:
    """A name for each request does not grow what is remembered of those who left."""
    pending = queue(item("b", client="B", bucket="other", deadline=1e9), fair=True, capacity=1000, max_rows=8)
    for number in range(3 * REMEMBERED):
        pending.push(item("a", client=number, deadline=1.0))
        assert sealed(pending).items[0].payload == "a"
        assert len(pending._paid) == (number + 1) % (REMEMBERED + 1)
    assert len(pending) == 1


def test_who_rides_along_pays_too() -> None:
    """A batch that another client leads is no free ride."""
    pending = queue(*(item("b", client="B") for _ in range(40)), max_rows=4, fair=True)
    served = {"a": 0, "b": 0}
    pending.push(item("a", 3, client="A"))
    while served["b"] < 40:
        for each in sealed(pending).items:
            served[each.payload] += each.rows
            if each.payload == "a":
                pending.push(item("a", 3, client="A"))
        assert abs(served["a"] - served["b"]) <= 3 + 4


def test_the_present_turn_never_goes_back() -> None:
    """What one client was served is no debt of those who come after it: they start where the leaders are."""
    pending = queue(*(item("b", client="B", bucket=None) for _ in range(6)), fair=True)
    pending.push(item("a", 4, client="A"))
    assert [names(sealed(pending).items) for _ in range(3)] == ["b", "a", "b"]
    pending.push(item("c", client="C", bucket=None))
    assert leave(pending) == list("cbbbb")


def test_a_client_of_whom_nothing_waits_is_forgotten() -> None:
    """A thousand clients that come and go leave nothing behind."""
    pending = queue(fair=True, max_rows=1)
    for number in range(1000):
        pending.push(item("a", client=number))
        pending.push(item("b", client=number))
        assert leave(pending) == ["a", "b"]
    assert_empty(pending)


# Leaving.


def test_a_forgotten_item_makes_room_at_once_and_is_never_sealed() -> None:
    """Forgetting frees rows and bytes before any batch is formed; forgetting twice, or a stranger, does nothing."""
    a, b, c = (item(name, 2, nbytes=1) for name in "abc")
    pending = queue(a, b, c, capacity=6, capacity_bytes=3)
    assert not pending.forget(item("x"))
    assert pending.forget(b)
    assert not pending.forget(b)
    assert not b.queued
    assert (pending.rows, pending.nbytes, len(pending)) == (4, 2, 2)
    pending.push(item("d", 2, nbytes=1))
    assert leave(pending) == ["ac", "d"]
    assert not pending.forget(a)
    assert not b.timed_out
    assert_empty(pending)


def test_late_is_who_could_not_be_answered_in_time() -> None:
    """Taken out at the deadline less what the batch takes, in this order; the later and those without stay."""
    pending = queue(costs=cost(1.0))
    for name, deadline in (("a", 3.0), ("b", 2.0), ("c", 3.5), ("d", math.inf)):
        pending.push(item(name, deadline=deadline))
    assert pending.advance(0.99) == []
    assert pending.next_timer() == 1.0
    late = pending.advance(2.0)
    assert names(late) == "ba"
    assert not any(each.queued or each.timed_out for each in late)
    assert pending.next_timer() == 2.5
    assert pending.rows == 2
    assert leave(pending, 2.0) == ["dc"]
    assert_empty(pending)


def test_an_item_whose_two_timers_are_due_is_late_once() -> None:
    """The first that was due says why; those behind it are not mixed up with theirs."""
    pending = queue(levels=(Level(timeout=2.0),), max_delay=1.0, costs=cost(0.5))
    for name, deadline in (("a", 2.25), ("b", 3.0), ("c", 9.0)):
        pending.push(item(name, deadline=deadline))
    pending.push(item("d", at=1.5))
    late = pending.advance(2.5)
    assert [(each.payload, each.timed_out) for each in late] == [("a", False), ("b", True), ("c", True)]
    assert pending.next_timer() == 3.5
    assert names(sealed(pending, 2.5).items) == "d"
    assert_empty(pending)


def test_a_sealed_item_is_not_late_afterwards() -> None:
    """Its timers left with it; so did those of who was forgotten."""
    a, b = item("a", deadline=1.0), item("b", deadline=2.0)
    pending = queue(a, b, max_rows=1)
    assert leave(pending) == ["a", "b"]
    pending = queue(a := item("a", deadline=1.0), item("b", deadline=2.0))
    pending.forget(a)
    assert pending.next_timer() == 2.0
    assert names(pending.advance(3.0)) == "b"
    assert_empty(pending)


def test_who_waited_longer_than_its_level_allows_is_late() -> None:
    """Triton's REJECT: at the timeout, marked as such; the deadline, if it is earlier, is not the timeout's doing."""
    pending = queue(levels=(Level(timeout=2.0),))
    pending.push(item("a"))
    pending.push(item("b", deadline=1.5))
    pending.push(item("c", deadline=2.5))
    assert pending.advance(1.49) == []
    (b,) = pending.advance(1.5)
    assert (b.payload, b.timed_out) == ("b", False)
    assert [(each.payload, each.timed_out) for each in pending.advance(2.0)] == [("a", True), ("c", True)]
    assert_empty(pending)


@pytest.mark.parametrize(
    ("override", "own", "at"),
    [(False, 1.0, 2.0), (True, 0.0, 2.0), (True, -1.0, 2.0), (True, 3.0, 2.0), (True, 2.0, 2.0), (True, 1.0, 1.0)],
)
def test_an_item_may_shorten_its_timeout_where_its_level_lets_it(override: bool, own: float, at: float) -> None:
    """Never lengthen it; 0 is none of its own."""
    pending = queue(levels=(Level(timeout=2.0, override=override),))
    pending.push(item("a", timeout=own))
    assert pending.next_timer() == at
    assert pending.advance(at - 0.01) == []
    assert names(pending.advance(at)) == "a"


@pytest.mark.parametrize("timeout", [math.inf, 9.0])
def test_an_item_cannot_bring_a_timeout_into_a_level_that_has_none(timeout: float) -> None:
    """As in Triton, it shortens what is there, whether or not another level has one."""
    pending = queue(levels=(Level(override=True), Level(timeout=timeout)))
    pending.push(item("a", timeout=1.0))
    assert pending.next_timer() == math.inf


def test_a_level_that_delays_puts_who_waited_too_long_behind_its_others() -> None:
    """Triton's DELAY: behind all of its level, before the next level, and never refused for it."""
    pending = queue(levels=(Level(timeout=2.0, delay=True), Level()), max_rows=1)
    pending.push(item("a"))
    pending.push(item("b", at=1.0))
    pending.push(item("z", at=1.0, priority=2))
    assert pending.next_timer() == 2.0
    assert pending.advance(1.99) == []
    assert pending.advance(2.0) == []
    pending.push(item("c", at=2.5, deadline=99.0))
    assert pending.next_timer() == 3.0
    assert leave(pending, 2.5) == list("bcaz")
    assert_empty(pending)


def test_a_delayed_item_keeps_its_deadline_its_bucket_and_its_place_in_the_count() -> None:
    """It is late when it is late, and counts in its level until it is."""
    pending = queue(levels=(Level(max_items=1, timeout=1.0, delay=True), Level()))
    pending.push(item("a", deadline=3.0))
    assert pending.advance(1.0) == []
    with pytest.raises(QueueFull, match="Exceeds"):
        pending.push(item("b", at=1.0))
    assert pending.next_timer() == 3.0
    (late,) = pending.advance(3.0)
    assert not late.timed_out
    pending.push(item("c", at=3.0))
    assert leave(pending, 3.0) == ["c"]
    assert_empty(pending)


def test_callers_that_come_and_go_leave_nothing() -> None:
    """Behind a stuck lane, thousands of forgotten items leave no trace, timers included."""
    keep = item("k", deadline=90.0, client="k")
    pending = queue(keep, max_rows=1, capacity=10, fair=True, max_delay=5.0, levels=(Level(timeout=50.0),))
    for number in range(1000):
        left = item("x", bucket=number % 7, deadline=60.0 + number, length=1 + number % 5, client=number)
        pending.push(left)
        assert pending.forget(left)
    assert (len(pending._line), len(pending._buckets), len(pending._families), len(pending._clients)) == (1, 1, 1, 1)
    assert len(pending._timers) == 3
    assert leave(pending) == ["k"]
    assert_empty(pending)


@pytest.mark.parametrize("bucket", ["", None])
@pytest.mark.parametrize("deadline", [1.0, math.inf])
@pytest.mark.parametrize("way", ["sealed", "late", "forgotten"])
def test_what_left_is_kept_by_nobody(bucket: object, deadline: float, way: str) -> None:
    """The payload of an item that left is freed with it, without a pass of the garbage collector."""

    class Payload(str):
        """A text whose end can be seen."""

    gc.disable()
    try:
        pending = queue(item("k", at=0.5, deadline=9.0), max_rows=1, levels=(Level(timeout=2.0),))
        gone = item(Payload(), bucket=bucket, deadline=deadline)
        payload = weakref.ref(gone.payload)
        pending.push(gone)
        if way == "sealed":
            assert sealed(pending).items == [gone]
        elif way == "late":
            assert gone in pending.advance(2.0)
        else:
            assert pending.forget(gone)
        assert payload() is not None
        del gone
        assert payload() is None
    finally:
        gc.enable()


# What the batcher asks.


def test_infinity_is_never() -> None:
    """Whoever computed it: no deadline and no timeout are no timer, and patience stands for both."""
    never = float("inf") + 1
    assert never is not math.inf
    for level in (Level(timeout=never, override=True), Level(timeout=never, delay=True)):
        pending = queue(levels=(level, Level(timeout=5.0)), patience=3.0)
        pending.push(item("a", deadline=never, timeout=2.0))
        assert pending._timers == []
        assert pending.head(0.0) == 3.0
        assert leave(pending) == ["a"]
        assert_empty(pending)


def test_the_next_timer_is_the_earliest_of_all() -> None:
    """It is infinity when time changes nothing: no deadline, no timeout, no delay."""
    pending = queue(item("a"))
    assert pending.next_timer() == math.inf
    pending.push(item("b", deadline=9.0))
    pending.push(item("c", deadline=7.0))
    pending.push(item("d", deadline=8.0))
    assert pending.next_timer() == 7.0


def test_a_queue_says_whether_items_without_deadline_have_timers() -> None:
    """A delay or a timeout gives every item one; deadlines are each item's own matter."""
    never = float("inf") + 1
    assert not queue(levels=(Level(), Level(timeout=never))).timed
    assert queue(max_delay=0.5).timed
    assert queue(levels=(Level(), Level(timeout=9.0))).timed


def test_the_head_is_as_urgent_as_who_leads() -> None:
    """Its deadline, or what stands for one; infinity when nothing may be sealed yet."""
    pending = queue(patience=5.0)
    assert pending.head(0.0) == math.inf
    pending.push(item("a", at=1.0))
    assert pending.head(1.0) == 6.0
    pending.push(item("b", at=1.0, deadline=4.0))
    assert pending.head(1.0) == 4.0
    pending = queue(item("a"), patience=5.0, max_delay=2.0)
    assert pending.head(0.0) == math.inf
    assert pending.head(0.0, drain=True) == 5.0
    pending.advance(2.0)
    assert pending.head(2.0) == 5.0


def test_the_length_is_of_items_and_the_rows_are_of_rows() -> None:
    """Both are exact at any time."""
    pending = queue(item("a", 3), item("b", 2))
    assert (len(pending), pending.rows) == (2, 5)
