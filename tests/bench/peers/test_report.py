"""The page: every experiment has its table, and what was wanted is judged by its median."""

import pytest

from bench.peers.__main__ import FULL, QUICK
from bench.peers.report import render
from bench.peers.restart import WAYS
from bench.peers.results import Cell, Results
from bench.peers.survey import FAULTY, LEAVING_SHARE, POISONED_SHARE, Extent
from bench.peers.wanted import WANTED, cell

LATENCIES = {"p50": 1.0, "p99": 2.0, "p99.9": 3.0}


def closed(peer: str, *rates: float) -> list[Cell]:
    figures = {"cpu": 15.0, "refused": 0.0, **LATENCIES}
    return [Cell("closed", "mlp", peer, 128, number, {"rate": rate, **figures}) for number, rate in enumerate(rates)]


def judged(results: Results, what: str) -> list[str]:
    (row,) = [row for each in WANTED if what in (row := each.render(results))[0]]
    return row


def test_what_was_wanted_is_reached_by_the_median_of_the_ratios() -> None:
    """Three rounds at 3, 2.5 and 1 times the peer: the median is just enough, and the spread is told."""
    results = Results(cells=[*closed("millrace", 300, 250, 100), *closed("triton", 100, 100, 100)])
    assert judged(results, "128 connections: answers/s, of Triton's")[1:] == [
        "at least 2.5", "2.50 (1.00 to 3.00)", "reached",
    ]  # fmt: skip


def test_what_is_missed_or_not_measured_is_said() -> None:
    results = Results(cells=[*closed("millrace", 240), *closed("triton", 100)])
    assert judged(results, "128 connections: answers/s, of Triton's")[2:] == ["2.40", "**not reached**"]
    assert judged(results, "128 connections: answers/s, of mosec's")[2:] == ["", "not measured"]


def test_an_upper_bound_is_one() -> None:
    """15 us of CPU are within 20, p99 is twice the p50."""
    results = Results(cells=closed("millrace", 100))
    assert judged(results, "server CPU")[3] == "reached"
    assert judged(results, "p99, of p50")[2:] == ["2.00", "reached"]


@pytest.mark.parametrize(("values", "text"), [([], ""), ([1.0], "1.0"), ([3.0, 1.0, 2.0], "2.0 (1.0 to 3.0)")])
def test_one_round_has_no_spread(values: list[float], text: str) -> None:
    assert cell(values, ".1f") == text


def test_the_page_has_a_row_for_each_cell_and_a_reason_for_each_failure() -> None:
    """A table for each experiment that was made, none for those that were not; the reason on one line."""
    idle = [Cell("idle", "mlp", peer, 0, 0, {"cpu": 0.1, "memory": 99.0}) for peer in ("millrace", "triton")]
    results = Results(heading="- Date: today", cells=[*idle, *closed("millrace", 1234, 1236), *closed("triton", 10)])
    results.drop("mosec", "mlp", "no answer:\na | b")
    page = render(results, {"mlp": "img/mlp.png"})
    assert "| 128 | Millrace | 1,235 (1,234 to 1,236) | 1.00 (1.00 to 1.00) |" in page
    assert "| Triton | 99 | 0.10 |" in page
    assert "| mosec | mlp | no answer: a / b |" in page
    assert "](img/mlp.png)" in page
    assert "of its capacity |" not in page
    assert "## A restart" not in page


def test_what_poison_cost_is_told_next_to_what_leaving_clients_did() -> None:
    """The lost of all rounds are added up; the p99 stands beside that of the same load without either."""
    lost = [
        Cell("poisoned", "mlp", "mosec", POISONED_SHARE, number, {"sent": 100.0, "lost": number + 1.0, **LATENCIES})
        for number in range(2)
    ]
    well = Cell("open", "mlp", "mosec", FAULTY, 0, {"p99": 4.0})
    leaving = Cell("leaving", "mlp", "mosec", LEAVING_SHARE, 0, {"p99": 5.0})
    assert "| mosec | 200 | 3 | 1.5% | 4.00 | 5.00 |" in render(Results(cells=[*lost, well, leaving]), {})


@pytest.mark.parametrize("extent", [*FULL.values(), *QUICK.values()])
def test_where_faults_are_measured_there_is_a_load_to_compare_with(extent: Extent) -> None:
    assert not extent.faults or FAULTY in extent.shares


def test_how_each_was_restarted_is_told() -> None:
    figures = {"took": 3.14, "sent": 900.0, "lost": 7.0, **LATENCIES}
    page = render(Results(cells=[Cell("restart", "mlp", "mosec", 0, 0, figures)]), {})
    assert f"| mosec | {WAYS['mosec'].how} | 3.1 | 900 | 7 | 1.0 | 2.0 | 3.0 |" in page
