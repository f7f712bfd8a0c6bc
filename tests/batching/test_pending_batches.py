"""Pending: what a batch holds, when it may be sealed, and why it was."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import CannotMeetDeadline, Level
from batching.pending import HASTE

from .waiting import Waiting, assert_empty, cost, item, leave, names, queue, sealed


def reasons(pending: Waiting, now: float = 0.0, drain: bool = False) -> list[tuple[str, str]]:
    """The names in each of the batches that may leave now, and why it does."""
    batches = []
    while batch := pending.next_batch(now, drain):
        batches.append((names(batch.items), batch.reason))
    return batches


# Who shares a batch.


def test_a_batch_is_filled_in_the_order_of_the_line() -> None:
    """One that does not fit waits, and those behind it with it: nothing is split, nothing overtakes."""
    pending = queue(item("a"), item("b", 2), item("c", 2), item("d"), item("e", 4))
    assert leave(pending) == ["ab", "cd", "e"]
    assert pending.next_batch(0.0) is None
    assert_empty(pending)


def test_a_batch_says_what_is_in_it() -> None:
    """Rows, padding, the work that was asked for and the work that is done, when, why, and how long it should take."""
    pending = queue(
        item("a", 2, length=3), item("b", length=7),
        max_rows=8, row_grid=(4, 8), lengths=(8,), costs=cost(1.0, 0.5),
    )  # fmt: skip
    batch = sealed(pending, 0.5)
    assert names(batch.items) == "ab"
    assert (batch.rows, batch.padded_rows) == (3, 4)
    assert (batch.length, batch.tokens, batch.cost) == (8, 2 * 3 + 7, 32)
    assert (batch.sealed, batch.reason, batch.predicted) == (0.5, "free", 17.0)
    assert not any(each.queued for each in batch.items)


def test_only_equal_buckets_share_a_batch_and_the_first_in_line_leads() -> None:
    """Interleaved buckets form one batch each, the one with the first in line before the other."""
    pending = queue(*(item(name, bucket=name.lower(), at=at) for at, name in enumerate("xyXyxY")))
    assert leave(pending) == ["xXx", "yyY"]
    pending = queue(item("b", bucket="b"), item("a", bucket="a", deadline=0.5), item("B", bucket="b"))
    assert leave(pending) == ["a", "bB"]


def test_levels_share_a_batch() -> None:
    """What is left of a batch that a higher level leads is for the lower ones."""
    pending = queue(levels=(Level(), Level()))
    for name, priority in (("c", 2), ("a", 1), ("d", 2), ("b", 1), ("e", 2)):
        pending.push(item(name, priority=priority))
    assert leave(pending) == ["abcd", "e"]


def test_an_item_without_bucket_goes_alone_and_waits_for_nobody() -> None:
    """Whatever its rows, its length and the delay; and nobody joins it, were it ever so cheap."""
    pending = queue(max_delay=9.0, max_rows=8, costs=cost(100.0, 0.001))
    for name, length in (("a", 5), ("b", 5), ("c", 6), ("d", 7)):
        pending.push(item(name, bucket=None, length=length))
    assert len({id(each[4]._home) for each in pending._line}) == 4
    assert reasons(pending) == [(name, "full") for name in "abcd"]
    assert_empty(pending)


def test_an_item_without_bucket_still_goes_alone_when_memory_is_short() -> None:
    """After `bound` as before."""
    pending = queue(item("a", 4, bucket=None), item("b", 4, bucket=None), max_delay=9.0)
    pending.bound(2)
    assert reasons(pending) == [("a", "full"), ("b", "full")]


def test_a_full_batch_is_full() -> None:
    """Exactly max_rows, however many those are, or so many that the next does not fit."""
    pending = queue(item("a", 600), item("b", 400), max_rows=1000)
    assert reasons(pending) == [("ab", "full")]
    pending = queue(item("a", 3), item("b"), item("c", 3), item("d", 2))
    assert reasons(pending) == [("ab", "full"), ("c", "full"), ("d", "free")]


# When a batch leaves: PROTOCOL.md section 6.1.

TABLE = [
    # What, sizes, delay, (rows, pushed at) ..., looked at when, what leaves then, what waits.
    ("a preferred size leaves, the rest next", (4,), 0.0, [(1, 0)] * 5, 0.0, [4, 1], 0),
    ("a preferred size leaves whatever the delay, the rest waits", (4,), 1.0, [(1, 0)] * 5, 0.0, [4], 1),
    ("it does not wait for a larger one", (4, 8), 1.0, [(1, 0)] * 5, 0.0, [4], 1),
    ("a larger one that is there wins", (4, 8), 1.0, [(1, 0)] * 9, 0.0, [8], 1),
    ("a larger one that is not there does not", (4, 8), 1.0, [(1, 0)] * 7, 0.0, [4], 3),
    ("after the delay sizes are ignored", (4,), 1.0, [(1, 0)] * 5, 1.0, [5], 0),
    ("after the delay up to max_rows leave", (4,), 1.0, [(1, 0)] * 9, 1.0, [8, 1], 0),
    ("before the delay they are not", (4,), 1.0, [(1, 0)] * 5, 0.99, [4], 1),
    ("one who would pass the largest pushes out", (4,), 1.0, [(3, 0), (3, 0)], 0.0, [3], 3),
    ("and then waits all of the delay itself", (4,), 1.0, [(3, 0), (3, 0.5)], 0.5, [3], 3),
    ("to reach the largest is not to pass it", (4,), 1.0, [(3, 0), (1, 0)], 0.0, [4], 0),
    ("one who is larger leaves at once", (4,), 1.0, [(6, 0)], 0.0, [6], 0),
    ("and so does one who is exactly that large", (4,), 1.0, [(4, 0)], 0.0, [4], 0),
    ("one who is smaller does not", (4,), 1.0, [(3, 0)], 0.0, [], 3),
    ("what passed it pushes out only those before it", (2, 4), 1.0, [(3, 0), (3, 0)], 0.0, [3], 3),
    ("an earlier size is kept when the largest is passed", (2, 4), 1.0, [(2, 0), (1, 0), (3, 0)], 0.0, [2, 4], 0),
    ("a size of 1 leaves alone", (1,), 1.0, [(1, 0), (1, 0)], 0.0, [1, 1], 0),
    ("no sizes, a delay: full", (), 1.0, [(1, 0)] * 9, 0.0, [8], 1),
    ("no sizes, a delay: wait", (), 1.0, [(1, 0)] * 7, 0.99, [], 7),
    ("no sizes, a delay: it is over", (), 1.0, [(1, 0)] * 7, 1.0, [7], 0),
    ("no sizes, a delay: cut off by one who does not fit", (), 1.0, [(5, 0), (4, 0)], 0.0, [5], 4),
    ("the delay runs from the oldest push", (), 1.0, [(1, 0), (1, 0.75)], 1.0, [2], 0),
    ("no sizes, no delay: all there is", (), 0.0, [(1, 0)] * 11, 0.0, [8, 3], 0),
    ("the size that is max_rows", (8,), 1.0, [(1, 0)] * 8, 0.0, [8], 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("preferred", "delay", "pushes", "now", "left", "waits"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_a_batch_leaves_when_tritons_would(
    preferred: tuple[int, ...], delay: float, pushes: list[tuple[int, float]], now: float, left: list[int], waits: int
) -> None:
    """The table of PROTOCOL.md 6.1, for items that may share a batch; max_rows is 8."""
    pending = queue(max_rows=8, preferred=preferred, max_delay=delay, patience=100.0)
    for rows, at in pushes:
        pending.push(item("", rows, at=at))
    pending.advance(now)
    batches = []
    while batch := pending.next_batch(now):
        batches.append(batch.rows)
    assert (batches, pending.rows) == (left, waits)


def triton(rows: list[int], preferred: tuple[int, ...], max_rows: int, delay: bool, expired: bool) -> int:
    """How many of the items with so many rows each leave now, as PROTOCOL.md 6.1 has it line by line."""
    preferred = preferred or (max_rows,)
    total, walked, mark, cut = 0, 0, None, False
    for number in rows:
        if total > 0:
            if total + number > preferred[-1] and mark is None:
                mark = walked
            if total + number > max_rows:
                cut = True
                break
        total += number
        walked += 1
        if total in preferred:
            mark = walked
    if mark and not expired:
        return mark
    if cut or total >= preferred[-1] or expired or not delay:
        return walked
    return 0


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 8), min_size=1, max_size=9),
    preferred=st.sets(st.integers(1, 8)).map(lambda sizes: tuple(sorted(sizes))),
    delay=st.sampled_from([0.0, 1.0]),
    now=st.sampled_from([0.0, 1.0]),
)
def test_any_items_leave_as_tritons_would(
    rows: list[int], preferred: tuple[int, ...], delay: float, now: float
) -> None:
    """The same as the algorithm of PROTOCOL.md 6.1, for any rows, sizes and delay."""
    pending = queue(*(item("", each) for each in rows), max_rows=8, preferred=preferred, max_delay=delay)
    pending.advance(now)
    expected = triton(rows, preferred, 8, delay > 0, expired=0 < delay <= now)
    batch = pending.next_batch(now)
    assert (0 if batch is None else len(batch.items)) == expected


def test_a_preferred_size_says_so() -> None:
    """So does one who is larger than all of them, and what pushed others out; when they are ripe the reason is that."""
    pending = queue(*(item("a") for _ in range(5)), max_rows=8, preferred=(4,), max_delay=1.0)
    assert reasons(pending) == [("aaaa", "preferred")]
    pending.advance(1.0)
    assert reasons(pending, 1.0) == [("a", "delay")]
    pending = queue(item("b", 6), item("c", 3), max_rows=8, preferred=(4,), max_delay=1.0)
    assert reasons(pending) == [("b", "preferred")]
    pending = queue(item("d", 6), item("e", 2), max_rows=8, preferred=(4,), max_delay=1.0)
    pending.advance(1.0)
    assert reasons(pending, 1.0) == [("de", "full")]
    for rows in (4, 6):
        pending = queue(item("f", rows - 1), max_rows=8, preferred=(4,), max_delay=1.0)
        pending.advance(1.0)
        pending.push(item("g"))
        assert reasons(pending, 1.0) == [("fg", "preferred")]
    pending = queue(*(item("h") for _ in range(4)), preferred=(4,), max_cost=3)
    assert reasons(pending) == [("hhh", "full"), ("h", "free")]


def test_each_bucket_waits_for_itself() -> None:
    """Unlike Triton's, an item of another shape pushes nobody out: each bucket fills, or ripens, alone."""
    pending = queue(item("a", bucket="a"), item("b", bucket="b", at=0.5), max_delay=1.0)
    assert leave(pending, 0.5) == []
    pending.advance(1.0)
    assert leave(pending, 1.0) == ["a"]
    pending.advance(1.5)
    assert leave(pending, 1.5) == ["b"]


def test_a_full_bucket_overtakes_one_that_waits_for_company() -> None:
    """Who waits is first in line all the same: of two that may leave, its bucket is the one that does."""
    pending = queue(item("a", bucket=1, at=10.0), max_rows=2, max_delay=5.0)
    for name in "bcde":
        pending.push(item(name, bucket=2, at=11.0))
    assert names(sealed(pending, 11.0).items) == "bc"
    assert pending.head(11.0) == 12.0
    pending.advance(15.0)
    assert pending.head(15.0) == 11.0
    assert reasons(pending, 15.0) == [("a", "delay"), ("de", "full")]


def test_draining_waits_for_nobody() -> None:
    """Whatever waits may leave, in the order of the line; preferred sizes are still those that leave."""
    pending = queue(item("a"), item("b", bucket="b"), item("c"), max_delay=9.0)
    assert reasons(pending, drain=True) == [("ac", "drain"), ("b", "drain")]
    pending = queue(*(item("x") for _ in range(5)), max_rows=8, preferred=(4,), max_delay=9.0)
    assert reasons(pending, drain=True) == [("xxxx", "preferred"), ("x", "drain")]
    assert_empty(pending)


def test_without_a_delay_nothing_ripens() -> None:
    """Whatever waits may leave at once: there is no timer, and the lane was free."""
    pending = queue(item("a", deadline=5.0), preferred=(4,))
    assert len(pending._timers) == 1
    assert reasons(pending, 4.9995) == [("a", "free")]


def test_an_item_about_to_miss_its_deadline_does_not_wait_for_company() -> None:
    """It ripens a moment before the last one at which its batch may start, long before the delay is over."""
    pending = queue(item("a", deadline=5.0), max_delay=9.0, costs=cost(1.0))
    assert pending.next_timer() == 4.0 - HASTE
    assert pending.advance(4.0 - 1.1 * HASTE) == []
    assert leave(pending, 4.0 - 1.1 * HASTE) == []
    assert pending.advance(4.0 - HASTE) == []
    assert reasons(pending, 4.0 - HASTE) == [("a", "deadline")]
    assert_empty(pending)


def test_stacking_is_begun_in_time_for_a_deadline_and_an_objective() -> None:
    """A batch is sealed before it is stacked: what waits for company ripens that much earlier."""
    knobs: dict[str, Any] = {"max_delay": 9.0, "costs": cost(1.0), "stacking": cost(0.5)}
    assert queue(item("a", deadline=5.0), **knobs).next_timer() == 3.5 - HASTE
    assert queue(item("a"), objective=4.0, **knobs).next_timer() == 2.5 - HASTE
    assert queue(item("a"), levels=(Level(timeout=2.0),), **knobs).next_timer() == 2.0 - HASTE


def test_whether_a_bucket_waits_on_is_known_after_every_change() -> None:
    """Full, not full since one left, full again, and full because memory ran out."""
    pending = queue(item("a", 2), item("x", bucket="other"), max_delay=9.0, max_rows=4)
    gone = item("b", 2)
    for full, change in ((False, None), (True, pending.push), (False, pending.forget), (True, pending.push)):
        if change is not None:
            change(gone)
        for _ in range(2):  # looking changes nothing
            assert (pending.head(0.0) < math.inf) is full
    assert leave(pending) == ["ab"]
    pending.push(item("c", 2))
    assert pending.head(0.0) == math.inf
    pending.bound(2)
    assert leave(pending) == ["c"]
    assert leave(pending, drain=True) == ["x"]
    assert_empty(pending)


def test_an_item_about_to_time_out_does_not_wait_for_company() -> None:
    """The timeout is a deadline for the start of its batch, whatever a batch takes."""
    pending = queue(item("a"), max_delay=9.0, costs=cost(1.0), levels=(Level(timeout=2.0),))
    assert pending.next_timer() == 2.0 - HASTE
    pending.advance(2.0 - HASTE)
    assert reasons(pending, 2.0 - HASTE) == [("a", "deadline")]


def test_an_item_about_to_miss_the_objective_does_not_wait_for_company() -> None:
    """A batch is due to start when its oldest item could just be answered within the objective."""
    pending = queue(item("a"), max_delay=9.0, costs=cost(1.0), objective=3.0)
    assert pending.next_timer() == 2.0 - HASTE
    pending.advance(2.0 - HASTE)
    assert reasons(pending, 2.0 - HASTE) == [("a", "deadline")]


def test_an_item_that_is_delayed_has_no_hurry() -> None:
    """Where who waits too long goes behind the others, only max_delay ends the wait for company."""
    for delay in (1.5, 2.5):
        pending = queue(item("a"), item("b", at=1.0), max_delay=delay, levels=(Level(timeout=2.0, delay=True),))
        assert pending.next_timer() == min(delay, 2.0)
        assert pending.advance(2.0) == []
        assert leave(pending, 2.0) == (["ba"] if delay < 2 else [])
        assert pending.advance(2.5) == []
        assert leave(pending, 2.5) == ([] if delay < 2 else ["ba"])
        assert_empty(pending)


def test_an_item_that_was_let_in_to_learn_from_leaves_at_once() -> None:
    """Its deadline cannot be met by the prediction: company would make it worse, and the prediction no better."""
    pending = queue(item("a", deadline=5.0), max_delay=9.0, costs=cost(10.0))
    assert pending.next_timer() <= 0.0
    assert pending.advance(0.0) == []
    assert pending.next_timer() == 5.0
    assert reasons(pending) == [("a", "deadline")]


def test_a_ripe_item_that_leaves_takes_its_hurry_with_it() -> None:
    """The others of its bucket wait for their own sake."""
    first = item("a")
    pending = queue(first, item("b", at=0.5), max_delay=1.0)
    pending.advance(1.0)
    assert pending.head(1.0) < math.inf
    pending.forget(first)
    assert pending.head(1.0) == math.inf
    pending.advance(1.5)
    assert reasons(pending, 1.5) == [("b", "delay")]
    pending = queue(*(item("x", 3, at=0.25 * at) for at in range(3)), max_delay=1.0)
    pending.advance(1.0)
    assert reasons(pending, 1.0) == [("x", "full"), ("x", "full")]
    pending.advance(1.5)
    assert reasons(pending, 1.5) == [("x", "delay")]


def test_what_ripened_for_its_deadline_says_so() -> None:
    """Unless it is older than the delay anyway; the first in line speaks for the batch."""
    pending = queue(item("d", deadline=2.0), item("o"), max_delay=1.75)
    pending.advance(1.75)
    assert reasons(pending, 1.75) == [("od", "delay")]
    pending = queue(item("d", deadline=1.5), item("e"), max_delay=1.75, patience=9.0)
    pending.advance(1.499)
    assert reasons(pending, 1.499) == [("de", "deadline")]
    pending = queue(item("d", deadline=1.5), max_delay=1.499)
    pending.advance(1.499)
    assert reasons(pending, 1.499) == [("d", "delay")]
    pending = queue(item("o"), max_delay=1.0)
    pending.advance(7.0)
    assert reasons(pending, 7.0) == [("o", "delay")]


# Deadlines and objectives limit a batch.


def test_a_deadline_aboard_limits_the_batch() -> None:
    """As many as it can be met with, to the very second, and the others go next."""
    pending = queue(item("a", deadline=3.0), costs=cost(0.0, 1.0), max_rows=8, patience=50.0)
    for _ in range(5):
        pending.push(item("b"))
    assert reasons(pending) == [("abb", "deadline"), ("bbb", "free")]


def test_a_deadline_aboard_counts_stacking_where_no_other_batch_hides_it() -> None:
    """Three rows are stacked by 3 and run for 1.75; a lane that is busy until then makes nothing later."""
    for free_at, deadline, batch in (
        (-math.inf, 4.75, "abb"), (-math.inf, 4.7, "ab"), (3.0, 4.75, "abb"), (3.0, 4.7, "ab"), (3.5, 4.75, "a"),
    ):  # fmt: skip
        pending = queue(item("a", deadline=deadline), costs=cost(1.0, 0.25), stacking=cost(0.0, 1.0), patience=50.0)
        for _ in range(2):
            pending.push(item("b"))
        assert names(sealed(pending, free_at=free_at).items) == batch


def test_a_merged_batch_counts_stacking() -> None:
    """16 units together: stacked by 4, running for 24, on a lane that is busy until 5 or free."""
    for free_at, deadline, batches in (
        (-math.inf, 28.0, "6 8 "), (-math.inf, 27.9, "6 "), (5.0, 29.0, "6 8 "), (5.0, 28.9, "6 "),
    ):  # fmt: skip
        pending = queue(costs=cost(8.0, 1.0), stacking=cost(0.0, 0.25), patience=100.0)
        pending.push(item("6 ", length=6, deadline=deadline))
        pending.push(item("8 ", length=8))
        assert names(sealed(pending, free_at=free_at).items) == batches


def test_company_is_taken_with_a_margin_to_the_deadline() -> None:
    """Two mean deviations of a batch's time; one for company with a deadline and for neighbours; none if alone."""
    for deviation, batch in ((0.0, "abbbb"), (0.5, "abbb"), (1.5, "ab"), (2.4, "a")):
        costs = cost(0.0, 1.0)
        costs.deviation = deviation
        pending = queue(levels=(Level(), Level()), costs=costs, max_rows=8, patience=50.0)
        pending.push(item("a", deadline=5.0))
        for _ in range(5):
            pending.push(item("b"))
        assert names(sealed(pending).items) == batch
    for deviation, batch in ((1.0, "abbbb"), (1.1, "abbb")):
        costs = cost(0.0, 1.0)
        costs.deviation = deviation
        pending = queue(item("a", deadline=6.0), costs=costs, max_rows=8)
        pending.cost.deviation = 0.0
        for _ in range(5):
            pending.push(item("b", deadline=50.0))
        pending.cost.deviation = deviation
        assert names(sealed(pending).items) == batch
    for deviation, batch in ((2.0, "6 8 "), (2.1, "6 ")):
        costs = cost(8.0, 1.0)
        costs.deviation = deviation
        pending = queue(item("6 ", length=6, deadline=26.0), costs=costs, patience=100.0)
        pending.push(item("8 ", length=8))
        assert names(sealed(pending).items) == batch


def test_the_tightest_deadline_aboard_counts() -> None:
    """Not the first in line's: a lower level's is as good, if it can be met with the rows before it."""
    pending = queue(levels=(Level(), Level()), costs=cost(0.0, 1.0), max_rows=8, patience=50.0)
    pending.push(item("a", 2, deadline=7.0, priority=1))
    pending.push(item("b", deadline=4.0, priority=2))
    for name in "cdefg":
        pending.push(item(name, priority=2))
    assert reasons(pending) == [("abc", "deadline"), ("defg", "free")]


def test_a_deadline_that_cannot_be_met_limits_nothing() -> None:
    """The batch is late for it anyway: the others need not be."""
    pending = queue(levels=(Level(), Level()), costs=cost(0.0, 1.0), max_rows=8, patience=50.0)
    pending.push(item("a", 4, priority=1))
    pending.push(item("b", deadline=4.5, priority=2))
    for name in "cdef":
        pending.push(item(name, priority=2))
    assert reasons(pending) == [("abcde", "full"), ("f", "free")]


def test_the_objective_keeps_batches_small() -> None:
    """From push to answer, waiting included; what has waited past it is no reason to be slow with the others."""
    for now, batches in ((0.0, ["xxxx", "xxxx"]), (1.5, ["xx", "xx", "xx", "xx"]), (3.0, ["x"] * 8), (3.5, ["x" * 8])):
        pending = queue(*(item("x") for _ in range(8)), objective=4.0, costs=cost(0.0, 1.0), max_rows=8)
        assert leave(pending, now) == batches
    pending = queue(*(item("x") for _ in range(8)), objective=4.0, costs=cost(0.0, 1.0), max_rows=8)
    assert reasons(pending) == [("xxxx", "deadline"), ("xxxx", "free")]


def test_an_objective_that_is_missed_does_not_hide_the_deadline() -> None:
    """What can still be met is met."""
    pending = queue(item("a", deadline=6.0), objective=1.0, costs=cost(0.0, 1.0), max_rows=8, patience=50.0)
    for _ in range(7):
        pending.push(item("b"))
    assert leave(pending, 2.0) == ["abbb", "bbbb"]
    pending = queue(item("a", 4, deadline=6.0), objective=1.0, costs=cost(0.0, 1.0), max_rows=8, patience=50.0)
    pending.push(item("b"))
    assert leave(pending, 2.0) == ["a", "b"]


def test_a_batch_that_may_not_grow_does_not_wait() -> None:
    """With a delay: once a deadline aboard stands no more company, there is nothing to wait for."""
    pending = queue(item("a", deadline=3.0), costs=cost(0.0, 1.0), max_rows=8, patience=50.0, max_delay=9.0)
    pending.push(item("b"))
    pending.push(item("b"))
    assert leave(pending) == []
    pending.push(item("b"))
    assert reasons(pending) == [("abb", "deadline")]


# Ragged lengths.


def test_lengths_of_one_step_of_the_grid_share_a_batch() -> None:
    """They are padded to the step; beyond the grid each length is its own."""
    pending = queue(*(item(str(length), length=length) for length in (3, 9, 8, 17, 16, 18)), lengths=(8, 16))
    assert [(names(batch.items), batch.length) for batch in iter(lambda: pending.next_batch(0.0), None)] == [
        ("38", 8), ("916", 16), ("17", 17), ("18", 18),
    ]  # fmt: skip


def test_no_batch_costs_more_than_max_cost() -> None:
    """As many rows as fit, to the last unit; a single item that is larger goes alone; rows count with their grid."""
    pending = queue(*(item("a", length=5) for _ in range(5)), item("b", 3, "b", length=7), max_rows=8, max_cost=20)
    pending.push(item("c", length=7, bucket="b"))
    assert reasons(pending) == [("aaaa", "full"), ("a", "free"), ("b", "full"), ("c", "free")]
    pending = queue(*(item("a", length=5) for _ in range(5)), max_rows=8, max_cost=20, row_grid=(1, 2, 8))
    assert leave(pending) == ["aa", "aa", "a"]
    pending = queue(*(item("a", length=5) for _ in range(2)), max_rows=8, max_cost=20, row_grid=(8,))
    assert leave(pending) == ["a", "a"]


def test_an_item_that_costs_more_than_max_cost_goes_alone_at_once() -> None:
    """It would find no company, however long it waited; predictions take it for as many batches as its rows make."""
    pending = queue(item("a", 4, length=9), max_cost=20, max_delay=9.0, costs=cost(1.0, 1.0))
    assert pending.drain_seconds() == 2 + 36
    assert reasons(pending) == [("a", "full")]
    pending = queue(item("b", length=21), max_cost=20, max_delay=9.0, costs=cost(1.0, 1.0))
    assert pending.drain_seconds() == 22
    assert reasons(pending) == [("b", "full")]


@pytest.mark.parametrize(
    ("length", "rows"), [(1, 8), (2, 8), (3, 6), (4, 5), (6, 3), (7, 2), (10, 2), (11, 1), (20, 1), (21, 1), (99, 1)],
)  # fmt: skip
def test_max_cost_limits_the_rows_by_the_length(length: int, rows: int) -> None:
    """20 units: so many rows of each length."""
    pending = queue(*(item("a", length=length) for _ in range(9)), max_rows=8, max_cost=20)
    assert sealed(pending).rows == rows


def test_after_memory_ran_out_batches_are_smaller() -> None:
    """`bound` holds for what waits and for what comes, is in every prediction, and leaves max_rows alone."""
    pending = queue(*(item("a", length=5) for _ in range(4)), max_rows=8, costs=cost(1.0))
    assert pending.drain_seconds() == 1.0
    pending.bound(10)
    assert pending.largest == 10
    assert pending.drain_seconds() == 2.0
    for _ in range(3):
        pending.push(item("b", bucket="b", length=5))
    pending.push(item("c", 4, "c", length=5))
    pending.push(item("d", bucket="d", length=1))
    assert leave(pending) == ["aa", "aa", "bb", "b", "c", "d"]
    pending.bound(0)
    pending.push(item("e"))
    pending.push(item("f"))
    assert leave(pending) == ["e", "f"]
    assert_empty(pending)
    pending.bound(float("inf"))
    pending.push(item("g", 8))
    assert leave(pending) == ["g"]


def test_shrinking_forgets_nothing_that_was_counted() -> None:
    """What left before is not waited for afterwards."""
    pending = queue(item("a"), item("b", bucket="b"), costs=cost(1.0, 1.0))
    assert pending.drain_seconds() == 4.0
    assert names(sealed(pending).items) == "a"
    pending.bound(8)
    assert pending.drain_seconds() == 2.0
    assert leave(pending) == ["b"]
    assert pending.drain_seconds() == 0.0
    assert_empty(pending)


# Neighbouring lengths.


def lengths(*pairs: tuple[int, int], a: float, b: float = 1.0, **knobs: Any) -> Waiting:
    """Items of (rows, length), the first of which leads; a batch of n takes a + b n. Each name is its length."""
    items = [item(f"{length} ", rows, length=length) for rows, length in pairs]
    return queue(*items, costs=cost(a, b), **{"max_rows": 8, **knobs})


@pytest.mark.parametrize(
    ("a", "batches"), [(0.0, ["10 ", "12 "]), (2.0, ["10 ", "12 "]), (2.001, ["10 12 "]), (9.0, ["10 12 "])]
)
def test_a_longer_neighbour_joins_if_the_padding_is_cheaper_than_a_batch_of_its_own(
    a: float, batches: list[str]
) -> None:
    """Two rows of 12 cost 24, alone they cost 10 and 12: two units more, or a batch more."""
    assert leave(lengths((1, 10), (1, 12), a=a)) == batches


@pytest.mark.parametrize(("a", "batches"), [(2.0, ["12 ", "10 "]), (2.001, ["12 10 "])])
def test_a_shorter_neighbour_joins_if_the_padding_is_cheaper(a: float, batches: list[str]) -> None:
    """The same with the longer in the lead."""
    assert leave(lengths((1, 12), (1, 10), a=a)) == batches


def test_before_anything_was_learned_nothing_joins() -> None:
    """Padding that costs nothing, and batches that cost nothing, are no reason."""
    assert leave(lengths((1, 10), (1, 11), a=0.0, b=0.0)) == ["10 ", "11 "]
    assert leave(lengths((1, 10), (1, 11), a=1.0, b=0.0)) == ["10 11 "]


def test_a_merged_batch_is_counted_like_any_other() -> None:
    """Its rows, its length, which is the longest, and its tokens are those of all."""
    pending = lengths((2, 10), (1, 8), (2, 13), a=50.0)
    batch = sealed(pending)
    assert names(batch.items) == "10 8 13 "
    assert (batch.rows, batch.length, batch.tokens, batch.cost, batch.predicted) == (5, 13, 54, 65, 115.0)
    assert batch.reason == "free"
    assert_empty(pending)


@pytest.mark.parametrize(
    ("a", "batches"),
    [
        (2.0, ["10 ", "8 ", "13 "]),
        (2.5, ["10 8 ", "13 "]),
        (6.0, ["10 8 ", "13 "]),
        (6.5, ["10 8 13 "]),
    ],
)
def test_the_neighbour_that_costs_the_least_padding_comes_first(a: float, batches: list[str]) -> None:
    """8 joins 10 for 2 units, 13 would for 3; 13 joins the two of them for 6."""
    assert leave(lengths((1, 10), (1, 8), (1, 13), a=a)) == batches


def test_of_two_that_cost_the_same_the_shorter_comes_first() -> None:
    """It makes the batch no longer."""
    assert leave(lengths((1, 10), (1, 12), (1, 8), a=2.5)) == ["10 8 ", "12 "]


def test_neighbours_of_neighbours_join_too() -> None:
    """One after the other on either side, as long as each is cheaper aboard."""
    assert leave(lengths((1, 10), (1, 9), (1, 8), (1, 11), (1, 12), (1, 40), a=9.0)) == ["10 9 8 11 12 ", "40 "]


def test_hundreds_of_lengths_may_join() -> None:
    """From the longest to the shortest, where a batch costs that much more than padding."""
    pending = lengths(*((1, length) for length in range(300, 0, -1)), a=1e9, max_rows=1000)
    batch = sealed(pending)
    assert (batch.rows, batch.cost, batch.tokens) == (300, 300 * 300, 300 * 301 // 2)
    assert_empty(pending)


def test_neighbours_join_with_all_of_their_items_or_none() -> None:
    """What does not fit into max_rows stays; the other side still may join, and what is behind it may not."""
    assert leave(lengths((5, 10), (3, 11), a=50.0)) == ["10 11 "]
    assert leave(lengths((6, 10), (2, 11), (1, 11), a=50.0)) == ["10 ", "11 11 "]
    assert leave(lengths((6, 10), (3, 11), (1, 12), (2, 9), a=50.0)) == ["10 9 ", "11 12 "]
    assert leave(lengths((6, 10), (3, 9), (1, 8), (2, 11), a=50.0)) == ["10 11 ", "9 8 "]


def test_only_lengths_of_the_same_bucket_join() -> None:
    """Equal lengths of other buckets do not, nor do the neighbours of a bucket that has items left."""
    pending = lengths((1, 10), (1, 11), a=50.0)
    pending.push(item("x ", bucket="x", length=10))
    pending.push(item("y ", bucket="x", length=12))
    assert leave(pending) == ["10 11 ", "x y "]
    pending = lengths((1, 10), (1, 10), (1, 10), (1, 11), a=50.0, objective=72.0)
    assert leave(pending) == ["10 10 ", "10 11 "]


def test_a_merged_batch_costs_no_more_than_max_cost() -> None:
    """To the last unit."""
    assert leave(lengths((1, 10), (1, 12), a=50.0, max_cost=24)) == ["10 12 "]
    assert leave(lengths((1, 10), (1, 12), a=50.0, max_cost=23)) == ["10 ", "12 "]
    pending = lengths((1, 10), (1, 12), a=50.0)
    pending.bound(23)
    assert leave(pending) == ["10 ", "12 "]


def test_a_merged_batch_is_not_padded_more_than_max_padding() -> None:
    """A row of 6 padded to 8, next to one of 8: two units of 16 are padding."""
    assert leave(lengths((1, 6), (1, 8), a=50.0, max_padding=0.125)) == ["6 8 "]
    assert leave(lengths((1, 6), (1, 8), a=50.0, max_padding=0.124)) == ["6 ", "8 "]
    assert leave(lengths((2, 4), (2, 8), a=50.0, max_padding=0.25)) == ["4 8 "]
    assert leave(lengths((2, 4), (2, 8), a=50.0, max_padding=0.24)) == ["4 ", "8 "]
    assert leave(lengths((1, 8), (1, 6), (1, 4), a=50.0, max_padding=0.25)) == ["8 6 4 "]
    assert leave(lengths((1, 8), (1, 6), (1, 4), a=50.0, max_padding=0.24)) == ["8 6 ", "4 "]


def test_a_merged_batch_keeps_the_deadlines_aboard() -> None:
    """14 units for 6 and 8 apart, 16 together: done at 24, in time for 24."""
    for deadline, batches in ((24.0, ["6 8 "]), (23.9, ["6 ", "8 "])):
        pending = queue(item("6 ", length=6, deadline=deadline), costs=cost(8.0, 1.0), patience=100.0)
        pending.push(item("8 ", length=8))
        assert leave(pending) == batches
    pending = queue(item("6 ", length=6, deadline=25.0), costs=cost(8.0, 1.0), patience=100.0)
    pending.push(item("8 ", length=8))
    assert leave(pending, 1.5) == ["6 ", "8 "]


def test_who_joined_is_not_made_late_by_those_who_join_after() -> None:
    """10 and 9 are done at 70; with 12 they would be at 86, too late for 9 unless it was too late for 9 anyway."""
    for deadline, batches in (
        (86.0, ["10 9 12 "]),
        (85.9, ["10 9 ", "12 "]),
        (70.0, ["10 9 ", "12 "]),
        (69.9, ["10 9 12 "]),
    ):
        pending = queue(item("10 ", length=10), item("9 ", length=9, deadline=deadline), item("12 ", length=12))
        pending.cost.a, pending.cost.b = 50.0, 1.0
        assert leave(pending) == batches


def test_with_preferred_sizes_nothing_joins() -> None:
    """They say how large a batch should be, and padding says nothing against it."""
    assert leave(lengths((1, 10), (1, 11), a=50.0, preferred=(8,))) == ["10 ", "11 "]


def test_rows_that_are_padded_anyway_are_free_for_a_neighbour() -> None:
    """Two batches of one row each, padded to 8, cost more than one of two: they join though a batch costs nothing."""
    assert leave(lengths((1, 10), (1, 12), a=0.0, row_grid=(8,), max_padding=1.0)) == ["10 12 "]
    pending = lengths((1, 10), (1, 12), a=0.0, row_grid=(4, 8), max_padding=1.0)
    assert sealed(pending).cost == 48


def test_a_ripe_batch_takes_its_neighbours_along() -> None:
    """They would wait for company of their own, and have found it."""
    pending = lengths((1, 10), a=50.0, max_delay=1.0)
    pending.push(item("11 ", at=0.5, length=11))
    pending.advance(1.0)
    assert reasons(pending, 1.0) == [("10 11 ", "delay")]
    assert_empty(pending)


def test_a_neighbour_counts_in_its_clients_share() -> None:
    """To ride along is to be served."""
    pending = lengths((1, 10), a=50.0, fair=True)
    pending.push(item("12 ", length=12, client="B"))
    assert leave(pending) == ["10 12 "]
    assert pending._turn == 12.0
    assert_empty(pending)


def test_a_deadline_is_refused_by_what_the_padded_length_takes() -> None:
    """The prediction knows the grid."""
    pending = queue(lengths=(16,), costs=cost(0.0, 1.0))
    with pytest.raises(CannotMeetDeadline):
        pending.push(item("a", length=3, deadline=16.5), 1.0)
    pending.push(item("a", length=3, deadline=17.5), 1.0)
