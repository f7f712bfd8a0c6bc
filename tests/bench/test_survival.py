"""What the survival benchmark makes of the requests that it sent."""

import math

import pytest

from bench.survival import Asked, Event, bins, render


def test_a_request_counts_where_it_was_due_and_its_answer_where_it_came() -> None:
    """One that waited over an edge is slow in the bin where it was sent, and an answer in the other; failures apart."""
    asked = [Asked(0.0, 0.1, ""), Asked(0.5, 1.6, ""), Asked(1.1, 1.2, "reset")]
    first, second = bins(asked, [0.0, 1.0, 2.0])
    assert (first.sent, first.answered, first.failed) == (2, 1, 0)
    assert (first.median, first.p99) == pytest.approx((0.1, 1.1))
    assert (second.sent, second.answered, second.failed) == (1, 1, 1)


def test_a_bin_in_which_nothing_was_sent_has_no_latency() -> None:
    (only,) = bins([], [0.0, 1.0])
    assert math.isnan(only.median)
    assert math.isnan(only.p99)


def test_p99_is_the_third_slowest_of_two_hundred() -> None:
    (only,) = bins([Asked(0.0, float(number), "") for number in range(1, 201)], [0.0, 1.0])
    assert (only.median, only.p99) == (100.0, 198.0)


def test_the_tables_name_what_happened_and_the_first_failure() -> None:
    """A row for each event and the time before the first; the failures are counted, one of them is told."""
    events, summary, _ = render([Asked(0.0, 0.1, ""), Asked(1.0, 1.5, "reset by peer")], [Event(0.9, "a kill")])
    assert [line.split(" |")[0] for line in events.splitlines()[2:]] == ["| all is well", "| a kill"]
    assert summary == "2 requests, 1 failed: reset by peer."
