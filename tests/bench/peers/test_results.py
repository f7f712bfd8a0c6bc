"""Cells, and what is looked up in them."""

from pathlib import Path

from bench.peers.results import Cell, Failure, Results, ratios, read_results


def results() -> Results:
    found = Results("- a heading", {"millrace": "1"})
    for number in range(2):
        for peer, rate in (("millrace", 300.0), ("mosec", 100.0)):
            figures = {"rate": rate * (number + 1), "p99": 2.0}
            found.cells.append(Cell("closed", "mlp", peer, 8, number, figures))
    return found


def test_a_figure_is_found_by_round() -> None:
    assert results().rounds("closed", "mlp", "mosec", 8, "rate") == {0: 100.0, 1: 200.0}
    assert results().values("closed", "mlp", "mosec", 8, "p50") == []
    assert results().peers("closed", "mlp") == ["millrace", "mosec"]
    assert results().loads("closed", "mlp") == [8]


def test_a_ratio_is_taken_within_a_round() -> None:
    """The second round was twice as fast for both: the ratio does not show it. A round that one lacks has none."""
    ours, theirs = (results().rounds("closed", "mlp", peer, 8, "rate") for peer in ("millrace", "mosec"))
    assert ratios(ours, theirs) == [3.0, 3.0]
    del theirs[0]
    assert ratios(ours, theirs) == [3.0]


def test_who_fails_leaves_no_cells_but_a_reason() -> None:
    found = results()
    found.drop("mosec", "mlp", "it fell over")
    assert found.peers("closed", "mlp") == ["millrace"]
    assert found.failures == [Failure("mosec", "mlp", "it fell over")]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = results()
    found.drop("triton", "mlp", "is not here")
    found.write(tmp_path / "raw.json")
    assert read_results(tmp_path / "raw.json") == found
