"""A backend whose behaviour a test writes down, and repositories to load it from."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from engine.config import ModelConfig
from engine.types import Array

Behaviour = Callable[[Mapping[str, Array]], dict[str, Array]]

CONFIG = """
backend: "pytorch"
max_batch_size: 32
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] } ]
dynamic_batching { }
"""


def double(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": inputs["x"] * 2}


class Scripted:
    """Runs `behaviours[model's name]`, and remembers the shapes that it was given."""

    behaviours: ClassVar[dict[str, Behaviour]] = {}
    calls: ClassVar[list[tuple[str, tuple[int, ...]]]] = []

    def __init__(self, config: ModelConfig, file: Path) -> None:
        self.device = config.device
        self._name = config.name

    def enter(self, inline: bool) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to let go of."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.empty(shape, dtype)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append((self._name, next(iter(inputs.values())).shape))
        return self.behaviours.get(self._name, double)(inputs)


class Gate:
    """A model that waits, in its thread, until the test lets it go on."""

    all: ClassVar[list["Gate"]] = []

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.all.append(self)

    @classmethod
    def open_all(cls) -> None:
        """At the end: a test that failed must not keep its engine from stopping."""
        for gate in cls.all:
            gate.open.set()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert self.open.wait(30)
        return double(inputs)


def add_model(root: Path, name: str, config: str = CONFIG, versions: tuple[str, ...] = ("1",)) -> Path:
    """Write a model that a Scripted backend takes for one of its own."""
    for version in versions:
        (root / name / version).mkdir(parents=True, exist_ok=True)
        (root / name / version / "model.pt2").write_bytes(b"")
    (root / name / "config.pbtxt").write_text(config)
    return root / name
