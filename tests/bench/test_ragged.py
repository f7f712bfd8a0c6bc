"""The benchmark of mixed lengths, on a model and a load so small that it takes no time: what runs, and what is told."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import ragged
from bench.ragged import Ids, Measured, in_order, make_sequences, measure, notes, render, write_repository
from bench.servers import BenchError
from bench.shapes import Size
from bench.shapes import encoder as make_encoder

TINY = Size(width=8, heads=2, inner=16, layers=1, vocabulary=50, longest=24)
VARIANTS = {
    "by length": {"max_batch_tokens": "96", "max_padding": "0.1"},
    "by length, fixed grid": {"max_batch_tokens": "96", "padded_lengths": "12 24", "padded_rows": "1 4 32"},
}


def of_lengths(*lengths: int) -> list[Ids]:
    return [np.arange(length) for length in lengths]


def lengths_of(batches: Sequence[Sequence[Ids]]) -> list[list[int]]:
    return [[len(sequence) for sequence in batch] for batch in batches]


async def test_everybody_answers_what_the_model_answers_alone(tmp_path: Path) -> None:
    """Two rounds of each: every answer is checked, every request counted, every row in the table."""
    encoder, configs = write_repository(tmp_path, TINY, VARIANTS)
    sequences = make_sequences(70, TINY, 14, 0.8)
    found = await measure(tmp_path, encoder, configs, sequences, 64, 2)
    assert list(found) == ["first come", "first come, 1024", "one by one", *VARIANTS]
    for measured in found.values():
        assert measured.apart < 1e-4
        assert (len(measured.rates), len(measured.latencies)) == (2, 140)
        assert 0 <= measured.padding < 1
        assert 1 <= measured.rows <= 32
        assert measured.oldest < max(measured.latencies)
    assert found["by length"].padding < 0.1
    table = render(found, sequences).splitlines()
    assert [line.split("|")[1].strip() for line in table] == ["batches", "---", *found]
    assert len({line.count("|") for line in table}) == 1
    below = notes(found, configs, VARIANTS, sequences, 64).splitlines()
    assert [line.partition(":")[0] for line in below[2:]] == [f"- {name}" for name in VARIANTS]
    assert all("Ageing bound (`patience_ms`): 1,000 ms" in line for line in below[2:])


def test_batches_in_the_order_of_arrival() -> None:
    """A batch ends when it is full, or before its padded tokens are too many; a long sequence goes alone."""
    assert lengths_of(in_order(of_lengths(*[8] * 33, 9), 0)) == [[8] * 32, [8, 9]]
    assert lengths_of(in_order(of_lengths(8, 8, 9, 30, 3, 3, 9, 9), 27)) == [[8, 8, 9], [30], [3, 3, 9], [9]]
    assert lengths_of(in_order(of_lengths(3, 1, 1), 1)) == [[3], [1], [1]]


def test_lengths_are_mixed_and_bounded() -> None:
    """Equal seeds give equal sequences; 8 to 512 tokens, half of them below the median."""
    sequences = make_sequences(2000, Size(), 64, 1.0)
    lengths = [len(sequence) for sequence in sequences]
    assert (min(lengths), max(lengths)) == (8, 512)
    assert np.median(lengths) == pytest.approx(64, rel=0.1)
    assert all(map(np.array_equal, sequences, make_sequences(2000, Size(), 64, 1.0)))


@pytest.mark.parametrize("wrong", [1.1, np.nan])
def test_a_wrong_answer_ends_it(wrong: float) -> None:
    """No figures for a model that answers something else in a batch than alone."""
    expected = np.ones((2, 3), np.float32)
    with pytest.raises(BenchError, match="first come: an answer is .* off"):
        Measured().check("first come", np.where([[True], [False]], expected, wrong), expected)


def test_a_model_that_was_exported_wrong_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one shape only: nothing is measured."""
    encoder = make_encoder(TINY)
    monkeypatch.setattr(torch.export, "Dim", lambda name, **bounds: {"rows": 3, "length": 7}[name])
    with pytest.raises(BenchError, match=r"takes input_ids of size \[3, 7\] only"):
        ragged.export(encoder, TINY.longest, tmp_path / "model.pt2")
