"""The example model under models/digits: what its card and its config promise."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from asgi_app.pictures import ink, open_picture

DIGITS = Path(__file__).parent.parent / "models" / "digits"
ARCHIVE = DIGITS / "1" / "model.pt2"
SAMPLES = sorted((DIGITS / "samples").iterdir())

Model = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def model() -> Model:
    loaded: Model = torch.export.load(ARCHIVE).module()
    return loaded


def pixels(sample: Path) -> torch.Tensor:
    return torch.from_numpy(ink(open_picture(sample.read_bytes(), 1_000_000), 8, 8)[np.newaxis])


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_the_archive_reads_each_sample_right(model: Model, sample: Path) -> None:
    """The file's name is the digit that the saved model reads in it, surely."""
    probabilities = model(pixels(sample))[0]
    labels = (DIGITS / "labels.txt").read_text().split()
    assert labels[int(probabilities.argmax())] == sample.stem
    assert float(probabilities.max()) > 0.9


def test_there_is_a_sample_of_each_digit_and_format() -> None:
    """Ten small files, 0 to 9; PNG, JPEG and WebP among them."""
    assert [sample.stem for sample in SAMPLES] == list("0123456789")
    assert {sample.suffix for sample in SAMPLES} == {".png", ".jpg", ".webp"}
    assert max(sample.stat().st_size for sample in SAMPLES) < 10_000


@pytest.mark.parametrize("rows", range(1, 33))
def test_a_batch_answers_as_each_row_alone(model: Model, rows: int) -> None:
    """Every batch from 1 to 32 runs, gives probabilities, and equals its rows one by one to 1e-5."""
    batch = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))
    together = model(batch)
    alone = torch.cat([model(row[np.newaxis]) for row in batch])
    assert together.shape == (rows, 10)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.sum(dim=1), torch.ones(rows))


def test_the_archive_is_small() -> None:
    """Below 300 KB: it lives in the repository."""
    assert ARCHIVE.stat().st_size < 300_000


def test_loading_the_archive_unpickles_nothing() -> None:
    """No example inputs, no pickled tensor, no compiled code, no path of the machine that it was made on."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        members = {member.filename.split("/", 1)[1]: member.file_size for member in archive.infolist()}
        graph = archive.read("model/models/model.json").decode()
        payloads = [
            payload
            for kind in ("weights", "constants")
            for payload in json.loads(archive.read(f"model/data/{kind}/model_{kind}_config.json"))["config"].values()
        ]
    assert members["data/sample_inputs/model.pt"] == 0
    assert payloads
    assert not any(payload["use_pickle"] for payload in payloads)
    assert not any("aotinductor" in member for member in members)
    assert ".py" not in graph


def test_the_card_states_the_accuracies() -> None:
    """Both figures are on the card, measured on hundreds of held-out digits, and are 0.98 or more."""
    card = (DIGITS / "README.md").read_text()
    for row in ("as they are, 8 x 8", "as pictures, read from their bytes"):
        found = re.search(rf"^\| \([ab]\) {row} \| (\d+) of (\d+) \| ([\d.]+) \|$", card, re.MULTILINE)
        assert found, row
        right, held_out, accuracy = int(found[1]), int(found[2]), float(found[3])
        assert held_out >= 350
        assert accuracy == round(right / held_out, 4)
        assert accuracy >= 0.98
