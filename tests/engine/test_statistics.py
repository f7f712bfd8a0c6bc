"""Statistics: what is counted, and for how long, where batches end and where requests leave without one."""

from typing import Any

import pytest

from batching import Item
from engine.statistics import MOST_RESPONSES, Statistics


def items(*enqueued: float, rows: int = 1) -> list[Item[Any, Any]]:
    return [Item(None, None, rows, (), at) for at in enqueued]


@pytest.fixture
def statistics(monkeypatch: pytest.MonkeyPatch) -> Statistics:
    """It is 10.0 seconds by the monotonic clock."""
    monkeypatch.setattr("engine.statistics.time.monotonic", lambda: 10.0)
    monkeypatch.setattr("engine.statistics.time.time", lambda: 1234.5678)
    return Statistics()


def test_nothing_has_happened_yet() -> None:
    """All spans are there, with nothing in them: clients read every one."""
    told = Statistics().json()
    names = "success fail queue compute_input compute_infer compute_output cache_hit cache_miss".split()
    assert list(told["inference_stats"]) == names
    assert all(span == {"count": 0, "ns": 0} for span in told["inference_stats"].values())
    assert (told["last_inference"], told["inference_count"], told["execution_count"]) == (0, 0, 0)
    assert (told["batch_stats"], told["response_stats"], told["memory_usage"]) == ([], {}, [])


def test_each_request_of_a_batch_has_all_of_its_batchs_time(statistics: Statistics) -> None:
    """Two requests that came at 6 and 7; their batch began at 8 and ended at 10."""
    statistics.spans = (0.25, 1.5, 0.125)
    statistics.ran(items(6.0, 7.0, rows=3), ["a", "b"], 8.0)
    told = statistics.json()
    assert told["inference_stats"] == {
        "success": {"count": 2, "ns": 7_000_000_000},
        "fail": {"count": 0, "ns": 0},
        "queue": {"count": 2, "ns": 3_000_000_000},
        "compute_input": {"count": 2, "ns": 500_000_000},
        "compute_infer": {"count": 2, "ns": 3_000_000_000},
        "compute_output": {"count": 2, "ns": 250_000_000},
        "cache_hit": {"count": 0, "ns": 0},
        "cache_miss": {"count": 0, "ns": 0},
    }
    assert (told["last_inference"], told["inference_count"], told["execution_count"]) == (1_234_567, 6, 1)
    parts = {"compute_input": 250_000_000, "compute_infer": 1_500_000_000, "compute_output": 125_000_000}
    assert told["batch_stats"] == [{"batch_size": 6, **{name: {"count": 1, "ns": ns} for name, ns in parts.items()}}]


def test_a_batch_that_raised_counts_as_an_execution_and_nothing_else(statistics: Statistics) -> None:
    """Its halves are run again; only what fails alone has failed."""
    statistics.ran(items(6.0, 7.0), None, 8.0)
    statistics.ran(items(6.0), ["a"], 9.0)
    statistics.ran(items(7.0), [ValueError("no")], 9.0)
    told = statistics.json()
    assert told["execution_count"] == 3
    assert told["inference_count"] == 1
    assert told["inference_stats"]["success"] == {"count": 1, "ns": 4_000_000_000}
    assert told["inference_stats"]["fail"] == {"count": 1, "ns": 3_000_000_000}
    assert told["inference_stats"]["compute_infer"]["count"] == 1
    assert statistics.failed == {"REJECTED": 0, "CANCELED": 0, "BACKEND": 1, "OTHER": 0}
    assert [entry["batch_size"] for entry in told["batch_stats"]] == [1, 2]


def test_what_never_ran_has_failed_for_its_own_reason(statistics: Statistics) -> None:
    statistics.lost("REJECTED", 0.5)
    statistics.lost("CANCELED", 0.25)
    assert statistics.json()["inference_stats"]["fail"] == {"count": 2, "ns": 750_000_000}
    assert statistics.failed == {"REJECTED": 1, "CANCELED": 1, "BACKEND": 0, "OTHER": 0}
    assert statistics.json()["execution_count"] == 0


def test_an_answer_from_the_cache_is_a_success_without_an_inference(statistics: Statistics) -> None:
    statistics.hit(0.5, 0.125)
    told = statistics.json()
    assert told["inference_stats"]["success"] == {"count": 1, "ns": 500_000_000}
    assert told["inference_stats"]["cache_hit"] == {"count": 1, "ns": 125_000_000}
    assert told["inference_stats"]["queue"]["count"] == 1
    assert told["inference_stats"]["compute_infer"]["count"] == told["inference_count"] == 0


NOTHING = {"count": 0, "ns": 0}


def test_responses_are_counted_by_their_index() -> None:
    """One that only says that it was the last has no output; one that nobody waited for counts as that alone."""
    statistics = Statistics()
    statistics.responded(0, "success", 1.0, 0.25)
    statistics.responded(0, "fail", 2.0, 0.5)
    statistics.responded(1, "empty_response", 4.0, 0.125)
    statistics.responded(2, "cancel", 8.0, 1.0)
    told = statistics.json()["response_stats"]
    assert list(told) == ["0", "1", "2"]
    assert all(list(each)[:2] == ["compute_infer", "compute_output"] for each in told.values())
    assert told["0"] == {
        "compute_infer": {"count": 2, "ns": 3_000_000_000},
        "compute_output": {"count": 2, "ns": 750_000_000},
        "success": {"count": 1, "ns": 1_250_000_000},
        "fail": {"count": 1, "ns": 2_500_000_000},
        "empty_response": NOTHING,
        "cancel": NOTHING,
    }
    assert {name: span for name, span in told["1"].items() if span["count"]} == {
        "compute_infer": {"count": 1, "ns": 4_000_000_000},
        "empty_response": {"count": 1, "ns": 4_125_000_000},
    }
    assert {name: span for name, span in told["2"].items() if span["count"]} == {
        "cancel": {"count": 1, "ns": 9_000_000_000}
    }


def test_a_stream_without_end_does_not_fill_the_memory() -> None:
    """Only so many responses of a request are told apart."""
    statistics = Statistics()
    for index in range(MOST_RESPONSES + 10):
        statistics.responded(index, "success", 0.0, 0.0)
    assert list(statistics.json()["response_stats"])[-1] == str(MOST_RESPONSES - 1)
