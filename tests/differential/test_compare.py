"""That a difference is found: the comparison itself, without a server."""

import json
from typing import Any

import pytest

from .allowed import explain
from .compare import differences, summary
from .exchange import Answer, Request, get

ASK = get("/v2/models/m")


def answer(said: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(said).encode())


def framed(header: Any, data: bytes) -> Answer:
    text = json.dumps(header).encode()
    return Answer(200, {"inference-header-content-length": str(len(text))}, text + data)


OUTPUT = {"outputs": [{"name": "O", "parameters": {"binary_data_size": 2}}]}


@pytest.mark.parametrize(
    ("theirs", "ours", "place"),
    [
        (answer({}), answer({}, 400), "status"),
        (answer({"a": 1}), answer({"a": 1.0}), "json.a"),
        (answer({"a": 1}), answer({"a": True}), "json.a"),
        (answer({"a": 0.0}), answer({"a": -0.0}), "json.a"),
        (answer({"a": None}), answer({}), "json.a"),
        (answer({}), answer({"a": None}), "json.a"),
        (answer({"a": [1]}), answer({"a": [1, 2]}), "json.a[1]"),
        (answer({"ns": 5}), answer({"ns": -5}), "json.ns"),
        (answer({"ns": 5}), answer({"ns": 5.0}), "json.ns"),
        (answer({"last_inference": 5}), answer({"last_inference": 0}), "json.last_inference"),
        (answer({"error": "['a','b']"}), answer({"error": "['a','c']"}), "json.error"),
        (answer({}, content_type="a"), answer({}, content_type="b"), "content-type"),
        (answer({}), answer({}, content_encoding="identity"), "content-encoding"),
        (framed(OUTPUT, b"ab"), framed(OUTPUT, b"ac"), "tensors.O"),
        (framed(OUTPUT, b"ab"), framed(OUTPUT, b"abc"), "tensors.left over"),
        (Answer(200, {}, b"{}", b"ab"), Answer(200, {}, b"{}", b"ac"), "memory"),
        (Answer(200, {}, b"not json"), Answer(200, {}, b"nor this"), "json.text"),
    ],
)
def test_what_differs_is_found(theirs: Answer, ours: Answer, place: str) -> None:
    """A difference in the status, a header, a value, its type, a tensor or the memory is one place of that name."""
    found = differences(ASK, theirs, ours)
    assert [name for name, _, _ in found] == [place]
    assert explain(ASK, theirs, ours, found)[0] == found


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (answer({"a": float("nan")}), answer({"a": float("nan")})),
        (answer({"ns": 5, "last_inference": 7}), answer({"ns": 9, "last_inference": 8})),
        (answer({"error": "['a','b']"}), answer({"error": "['b','a']"})),
        (framed({**OUTPUT, "id": "x"}, b"ab"), framed({"id": "x", **OUTPUT}, b"ab")),
    ],
)
def test_what_cannot_be_equal_is_not_compared(theirs: Answer, ours: Answer) -> None:
    """NaN equals NaN; how long something took, and in which order a hash map prints its names, says nothing."""
    assert differences(ASK, theirs, ours) == []


def test_metrics_are_compared_by_series() -> None:
    """A count that differs and a series that is missing are found; durations and what is not of models are not."""
    request = Request("GET", "/metrics", metrics=True)
    text = (
        'nv_inference_count{{model="m",version="1"}} {}\nnv_cpu_utilization {}\nnv_inference_queue_duration_us{{}} {}\n'
    )
    theirs, ours = Answer(200, {}, text.format(1, 1, 1).encode()), Answer(200, {}, text.format(2, 2, 2).encode())
    assert [name for name, _, _ in differences(request, theirs, ours)] == [
        'metrics.nv_inference_count model="m" version="1"'
    ]
    assert len(differences(request, theirs, Answer(200, {}, b""))) == 2


def test_an_entry_allows_what_it_describes_and_no_more() -> None:
    """The status and the text of both sides must be those of the entry."""
    theirs = answer({"error": "Request timeout expired"}, 503)
    late, other = answer({"error": "too late"}, 504), answer({"error": "too late"}, 500)
    assert explain(ASK, theirs, late, differences(ASK, theirs, late))[0] == []
    assert explain(ASK, theirs, other, differences(ASK, theirs, other))[0] != []
    assert summary(theirs) == "503 Request timeout expired"
