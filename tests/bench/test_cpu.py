"""The benchmark of options on the CPU, on models so small that they take no time: what is asked, and what is told."""

from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from bench import cpu
from bench.cpu import SHAPES, batch_of, batches_of, compare, config_of, export, load_of, loop
from bench.servers import BenchError
from bench.shapes import Size, encoder, mlp
from engine.backends.pytorch import PyTorchBackend

TINY = Size(width=8, heads=2, inner=16, layers=1, vocabulary=30522, longest=512)
MLP = SHAPES["mlp"]._replace(sizes=((2, 1),))
ENCODER = SHAPES["encoder"]._replace(
    make=lambda: encoder(TINY), io=SHAPES["encoder"].io.replace("384", "8"), sizes=((2, 16),)
)


def test_every_option_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time, its gain over the plain model, and how far its answer is from that one's."""
    options = {cpu.PLAIN: {}, "INFERENCE_MODE false": {"INFERENCE_MODE": "false"}, "channels_last": {}}
    monkeypatch.setattr(cpu, "OPTIONS", options)
    export(MLP, tmp_path / "model.pt2")
    rows = compare(MLP, tmp_path / "model.pt2", tuple(options), 2, 0)
    assert [row[:2] for row in rows] == [[cpu.PLAIN, "2 rows"], ["INFERENCE_MODE false", "2 rows"]]
    assert len(compare(MLP, tmp_path / "model.pt2", (), 2, 0)) == 1
    assert [rows[0][3], rows[0][4], rows[1][4]] == ["1", "0e+00", "0e+00"]


def test_the_loop_runs_batches_of_similar_lengths(tmp_path: Path) -> None:
    """Sorted, all of one number of rows, padded to the longest with what the mask leaves out."""
    export(ENCODER, tmp_path / "model.pt2")
    backend = PyTorchBackend(config_of(ENCODER, 8, {}), tmp_path / "model.pt2")
    load = load_of(ENCODER, 10)
    batches = batches_of(load, 4)
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4]
    alone = {tensors["input_ids"].shape[1]: tensors for tensors in load.inputs}
    row = int(batches[0]["attention_mask"][2].sum())
    np.testing.assert_allclose(backend.run(batches[0])["y"][2], backend.run(alone[row])["y"][0], atol=1e-5)
    assert loop(backend, batches, 4, 0) > 0


def test_what_is_posted_is_what_the_loop_runs() -> None:
    """A request in the binary form, with every tensor of a row."""
    load = load_of(ENCODER, 1)
    head, _, body = load.posts[0].partition(b"\r\n\r\n")
    length = int(next(line.split()[1] for line in head.split(b"\r\n") if line.startswith(b"inference-header")))
    described, tensors = orjson.loads(body[:length])["inputs"], load.inputs[0]
    assert [(each["name"], tuple(each["shape"])) for each in described] == [
        (name, array.shape) for name, array in tensors.items()
    ]
    assert body[length:] == b"".join(array.tobytes() for array in tensors.values())


def test_rates_are_taken_between_ends_of_batches() -> None:
    """Answers come in bunches: whole batches are counted, and what came after the time is not."""
    ended = [batch + row / 1000 for batch in range(1, 12) for row in range(4)]
    assert cpu._rate(ended, stop=11) == pytest.approx(4, rel=0.01)
    with pytest.raises(BenchError, match="only 4 answers came in time; give --seconds more"):
        cpu._rate(ended, stop=2)


def test_shapes_are_the_same_every_time() -> None:
    """Equal seeds, equal weights; no gradients."""
    one, other = mlp(), mlp()
    for weight, same in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same)
        assert not weight.requires_grad
    assert batch_of(SHAPES["resnet18"], 2, 1)["input"].shape == (2, 3, 224, 224)
