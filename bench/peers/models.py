"""The models that every peer serves: seeded, so that all have the same weights, and of torch and numpy alone.

Each takes one input `x` and gives one output `y`, the first dimension of both being the rows of a batch.

    mlp       64 -> 256 -> 10 numbers: next to nothing to compute, so what is measured is the server
    resnet    ResNet-18's layers on 3 x 64 x 64 pixels. At 224 x 224 one picture takes a core of the machine that this
              is for forty milliseconds, and a load of seconds holds too few answers for a p99
    encoder   MiniLM's layers on 8 to 128 token ids, the mean over the tokens; 0 is padding, and is not looked at
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.shapes import MINILM, Encoder, mlp, resnet18

SEED = 7
PIXELS = 64  # a side
SHORTEST, LONGEST = 8, 128  # tokens

Row = NDArray[np.float32] | NDArray[np.int64]


class PaddedEncoder(nn.Module):
    """int64 [batch, length] ids, 0 = padding -> float32 [batch, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(MINILM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.encoder(x, x != 0)
        return result


def resnet() -> nn.Module:
    """float32 [batch, 3, side, side] -> [batch, 1000]."""
    layers = resnet18()
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):  # else the answers to different pictures are nearly the same
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layers


class Model(NamedTuple):
    """Attributes:
    datatype: of `x`, FP32 or INT64; `y` is FP32.
    dims: of a row of `x`; -1 is a length that differs from row to row.
    width: numbers in a row of `y`.
    max_rows: of a batch, for every server.
    bodies: different requests that the load is made of.
    """

    build: Callable[[], nn.Module]
    datatype: str
    dims: tuple[int, ...]
    width: int
    max_rows: int
    bodies: int


MODELS = {
    "mlp": Model(mlp, "FP32", (64,), 10, 64, 16),
    "resnet": Model(resnet, "FP32", (3, PIXELS, PIXELS), 1000, 32, 8),
    # On a CPU every token takes its time, and in larger batches of mixed lengths more and more of them are padding.
    "encoder": Model(PaddedEncoder, "INT64", (-1,), MINILM.width, 8, 64),
}


def build(name: str) -> nn.Module:
    """A model with its weights, which are the same wherever this runs."""
    torch.manual_seed(SEED)
    return MODELS[name].build().eval().requires_grad_(False)


def make_rows(name: str) -> list[Row]:
    """As many rows of `x` as there are bodies, always the same."""
    model, random = MODELS[name], np.random.default_rng(SEED)
    if model.datatype == "FP32":
        # Two decimals, as a client would send pixels or measurements.
        return [random.random(model.dims).round(2).astype(np.float32) for _ in range(model.bodies)]
    lengths = random.integers(SHORTEST, LONGEST, model.bodies, endpoint=True)
    return [random.integers(1, MINILM.vocabulary, int(length)) for length in lengths]


def spoil(name: str, row: Row) -> Row:
    """A row that cannot be answered: a number is missing, or a token is none of the vocabulary's."""
    if MODELS[name].datatype == "FP32":
        return row.reshape(-1)[1:]
    return np.full_like(row, MINILM.vocabulary)


class Predictor:
    """What a server's own code does with a batch: stack or pad it, run the model on one thread, give lists back."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        self.model = MODELS[name]
        self._run = build(name)
        self._type = np.float32 if self.model.datatype == "FP32" else np.int64

    def stack(self, rows: Sequence[Sequence[float] | Row]) -> Row:
        """Rows of any nesting as one array [batch, *dims]; ids are padded with 0 to the longest of the batch.

        Raises:
            ValueError: a row has not as many numbers as the model takes.
        """
        arrays = [np.asarray(row, self._type) for row in rows]
        if self.model.dims != (-1,):
            return np.stack([array.reshape(self.model.dims) for array in arrays])
        batch = np.zeros((len(arrays), max(map(len, arrays))), np.int64)
        for place, array in zip(batch, arrays, strict=True):
            place[: len(array)] = array
        return batch

    def run(self, batch: Row) -> NDArray[np.float32]:
        """[batch, *dims] -> [batch, width]."""
        with torch.inference_mode():
            answer: NDArray[np.float32] = self._run(torch.from_numpy(batch)).numpy()
        return answer

    def __call__(self, rows: Sequence[Sequence[float] | Row]) -> list[list[float]]:
        answers: list[list[float]] = self.run(self.stack(rows)).tolist()
        return answers
