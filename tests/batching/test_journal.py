"""Journal: the figures agree with what happened, and however much happens they take up no more room."""

import json
from typing import Any

import orjson
import pytest

from batching import Batch, CannotMeetDeadline, Item, QueueFull
from batching.items import STAGES
from batching.journal import KEPT, SECONDS, Histogram, Journal


def ran(*waited: float, rows: int = 1, length: int = 1, padded_rows: int = 0, **more: Any) -> Batch[str, None]:
    """A batch of one item for each of `waited`, each of so many rows, sealed 1000 s after the clock began."""
    items = [Item("", None, rows, more.get("bucket", ()), 1000.0 - seconds) for seconds in waited]
    total = rows * len(items)
    padded_rows = padded_rows or total
    return Batch(
        items,
        total,
        length,
        padded_rows,
        total * length,
        padded_rows * length,
        more.get("reason", "free"),
        1000.0,
        0.25,
        0.25,
    )


def report(*batches: Batch[str, None], took: float = 0.5, split: bool = False) -> dict[str, Any]:
    """What a journal says after these."""
    journal = Journal()
    for batch in batches:
        journal.ended(batch, took, split)
    return journal.report()


@pytest.mark.parametrize(
    ("value", "bound"),
    [
        (-1e-9, "5e-05"),
        (0.0, "5e-05"),
        (5e-05, "5e-05"),
        (5.1e-05, "0.0001"),
        (0.1, "0.1"),
        (0.11, "0.2"),
        (10.0, "10.0"),
        (10.1, "more"),
        (1e9, "more"),
    ],
)
def test_a_value_is_counted_under_the_least_bound_that_is_not_below_it(value: float, bound: str) -> None:
    """Histograms count up to and including their bounds, and what is beyond the last one under "more"."""
    histogram = Histogram(SECONDS)
    histogram.observe(value)
    assert histogram.report() == {"count": 1, "total": value, "up_to": {bound: 1}}


def test_the_bounds_are_those_that_people_read() -> None:
    """1, 2, 5 in each decade, without the noise of floating point."""
    assert [str(bound) for bound in SECONDS] == (
        "5e-05 0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1.0 2.0 5.0 10.0".split()
    )


def test_an_empty_journal_reports_zeros() -> None:
    """Nothing happened: no division by it, and every stage is there."""
    told = Journal().report()
    assert told["batches"] == {
        "by_rows": {}, "by_reason": {}, "split": 0, "padding": 0.0, "latest": [],
        "seconds": {"count": 0, "total": 0.0, "up_to": {}},
    }  # fmt: skip
    assert told["items"] == {
        "wait_seconds": {"count": 0, "total": 0.0, "up_to": {}},
        "left": {"queued": 0, "preparing": 0, "sealed": 0, "running": 0, "answered": 0},
        "refused": {},
        "expired": 0,
    }
    assert tuple(told["items"]["left"]) == STAGES


def test_batches_are_counted_by_their_rows() -> None:
    """The histogram of batch sizes counts rows, not items, and lists them in order."""
    told = report(ran(0, 0, rows=5), ran(0), ran(0, 0), ran(0, rows=2))
    assert list(told["batches"]["by_rows"].items()) == [("1", 1), ("2", 2), ("10", 1)]


def test_batches_are_counted_by_why_they_left() -> None:
    """Each reason has its count; the counts add up to the batches."""
    told = report(*(ran(0, reason=reason) for reason in ("full", "free", "full", "delay")))
    assert told["batches"]["by_reason"] == {"full": 2, "free": 1, "delay": 1}


def test_waits_are_of_items_and_times_of_batches() -> None:
    """Every item's wait is counted, every batch's time is, and both are summed."""
    told = report(ran(0.375, 0.25, 0.0625), ran(0.125), took=0.5)
    assert told["items"]["wait_seconds"] == {
        "count": 4, "total": 0.8125, "up_to": {"0.1": 1, "0.2": 1, "0.5": 2},
    }  # fmt: skip
    assert told["batches"]["seconds"] == {"count": 2, "total": 1.0, "up_to": {"0.5": 2}}


def test_padding_is_the_share_of_the_work_that_nobody_asked_for() -> None:
    """Over all batches by their work, and in each of the latest by its own."""
    told = report(ran(0, 0, length=10, padded_rows=4), ran(*[0] * 6, length=10))
    assert told["batches"]["padding"] == pytest.approx(20 / 100)
    assert [batch["padding"] for batch in told["batches"]["latest"]] == [pytest.approx(0.5), 0.0]


def test_the_latest_batches_say_all_that_there_is_to_say() -> None:
    """One line for each: when, how large, why then, how long it waited, should have taken and took."""
    told = report(ran(0.25, 0.5, rows=2, length=16, bucket=(3, 224), reason="full"), took=0.75, split=True)
    assert told["batches"]["split"] == 1
    assert told["batches"]["latest"] == [
        {
            "sealed": 1000.0, "items": 2, "rows": 4, "bucket": "(3, 224)", "length": 16, "padding": 0.0,
            "reason": "full", "waited": 0.5, "predicted": 0.25, "took": 0.75, "split": True,
        }
    ]  # fmt: skip


@pytest.mark.parametrize("waited", [(0.5, 0.25, 0.125), (0.25, 0.5, 0.125), (0.125, 0.25, 0.5)])
def test_a_batch_waited_as_long_as_its_oldest_item(waited: tuple[float, ...]) -> None:
    """Wherever in the batch that one is: the order is that of deadlines, or of lengths."""
    (batch,) = report(ran(*waited))["batches"]["latest"]
    assert batch["waited"] == 0.5


def test_refusals_are_counted_by_their_name() -> None:
    """By the name of the error alone, whatever its text."""
    journal = Journal()
    for error in (QueueFull("a", 1.0), QueueFull("b", 2.0), CannotMeetDeadline("c", 3.0)):
        journal.was_refused(error)
    assert journal.report()["items"]["refused"] == {"QueueFull": 2, "CannotMeetDeadline": 1}


def test_a_million_batches_take_up_the_room_of_a_few() -> None:
    """The ring holds the latest ones, and everything else is counted, whatever the buckets and texts are."""
    journal = Journal()
    for n in range(3 * KEPT):
        journal.ended(ran(n / 10, rows=1 + n % 8, bucket=f"bucket {n}", reason=["full", "free"][n % 2]), n / 10, False)
        journal.was_refused(QueueFull(f"text {n}", n))
    told = journal.report()
    assert [batch["bucket"] for batch in told["batches"]["latest"]] == [
        f"bucket {n}" for n in range(2 * KEPT, 3 * KEPT)
    ]
    assert told["batches"]["by_rows"] == {str(rows): 3 * KEPT // 8 for rows in range(1, 9)}
    assert sum(told["batches"]["by_reason"].values()) == 3 * KEPT
    assert told["items"]["refused"] == {"QueueFull": 3 * KEPT}
    kept = (journal.sizes, journal.reasons, journal.waits.counts, journal.times.counts, journal.left, journal.refused)
    assert [len(each) for each in kept] == [8, 2, len(SECONDS) + 1, len(SECONDS) + 1, len(STAGES), 1]


@pytest.mark.parametrize("encode", [json.dumps, orjson.dumps])
def test_a_report_is_json(encode: Any) -> None:
    """Whatever the buckets are, it is plain values all through, under names that are text."""
    told = report(ran(0, bucket=None), ran(0, bucket=((3, 4), ())), split=True)
    assert json.loads(encode(told)) == told


def test_a_report_does_not_change_when_more_happens() -> None:
    """It is of its moment: whoever holds one may send it later."""
    journal = Journal()
    told = journal.report()
    before = json.dumps(told)
    journal.ended(ran(0), 1.0, True)
    journal.was_refused(QueueFull("", 0.0))
    journal.left["queued"] += 1
    journal.expired += 1
    assert json.dumps(told) == before
