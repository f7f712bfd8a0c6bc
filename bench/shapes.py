"""Three models of the sizes that people serve, with random weights: a classifier of pictures, an encoder, a tiny MLP.

What a model costs follows from its shape, not from its weights. Equal seeds give equal weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

SEED = 0


def mlp() -> nn.Module:
    """float32 [batch, 64] -> float32 [batch, 10]."""
    torch.manual_seed(SEED)
    return _frozen(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))


def resnet18(classes: int = 1000) -> nn.Module:
    """float32 [batch, 3, height, width] -> float32 [batch, classes]; made for 224 x 224."""
    torch.manual_seed(SEED)
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    stages = [
        block
        for before, after in ((64, 64), (64, 128), (128, 256), (256, 512))
        for block in (Block(before, after), Block(after, after))
    ]
    return _frozen(nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)))


class Block(nn.Module):
    """Two convolutions of 3 x 3 beside a path around them; with more channels it halves the picture."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = after // before
        self.convolved = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        around = nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
        self.around = nn.Sequential(*around) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.convolved(x) + self.around(x))


class Size(NamedTuple):
    """Of an encoder."""

    width: int = 256
    heads: int = 4
    inner: int = 1024
    layers: int = 4
    vocabulary: int = 8192
    longest: int = 512


# all-MiniLM-L6's.
MINILM = Size(width=384, heads=12, inner=1536, layers=6, vocabulary=30522, longest=512)


def encoder(size: Size = MINILM) -> "Encoder":
    torch.manual_seed(SEED)
    made = Encoder(size)
    _frozen(made)
    return made


class Layer(nn.Module):
    """Self-attention and two linear layers, each after a norm and beside a path around it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.before_attention, self.before_linear = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.project, self.merge = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.linear = nn.Sequential(
            nn.Linear(size.width, size.inner), nn.GELU(), nn.Linear(size.inner, size.width)
        )  # fmt: skip

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        rows, length, width = states.shape
        projected = self.project(self.before_attention(states)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states + self.merge(attended.transpose(1, 2).reshape(rows, length, width))
        result: Tensor = states + self.linear(self.before_linear(states))
        return result


class Encoder(nn.Module):
    """int64 [batch, length] ids and mask, 1 = token and 0 = padding -> float32 [batch, width], the mean over tokens."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.longest, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        counted = attention_mask != 0
        for layer in self.layers:
            states = layer(states, counted[:, None, None, :])
        weight = counted.unsqueeze(2).to(states.dtype)
        result: Tensor = (self.norm(states) * weight).sum(1) / weight.sum(1)
        return result


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)
