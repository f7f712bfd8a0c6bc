"""The requests that a config's `model_warmup` asks for (PROTOCOL.md section 5.7)."""

import math
from pathlib import Path

import numpy as np

from .config import WarmupInput, WarmupSample
from .errors import ConfigError
from .types import DATATYPES, Array


def sample_requests(sample: WarmupSample, batches: bool, folder: Path) -> list[dict[str, Array]]:
    """The inputs of each request of a sample, which are run together.

    Args:
        batches: whether the model's tensors have a batch dimension; it is 1 in each request.
        folder: the model's, with `warmup/` in it.

    Raises:
        ConfigError: a file is missing or too short; names it.
    """
    request = {}
    for name, given in sample.inputs.items():
        shape = (1, *given.dims) if batches else given.dims
        request[name] = _tensor(sample.name, given, shape, folder / "warmup" / given.file)
    return [request] * sample.batch_size


def _tensor(sample: str, given: WarmupInput, shape: tuple[int, ...], file: Path) -> Array:
    dtype, count = DATATYPES[given.datatype], math.prod(shape)
    if given.source == "file":
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"model_warmup '{sample}': {file}: cannot be read: {error.strerror}") from None
        if given.datatype == "BYTES":
            return np.array(_strings(sample, content, count, file), dtype).reshape(shape)
        if len(content) < count * dtype.itemsize:
            raise ConfigError(
                f"model_warmup '{sample}': warmup setting expects {count * dtype.itemsize} bytes, but the data "
                f"provided from {file} only has {len(content)} bytes"
            )
        return np.frombuffer(content, dtype, count).reshape(shape)
    if given.datatype == "BYTES":  # random ones are empty too, as in Triton
        return np.full(shape, b"", dtype)
    if given.source == "zero":
        return np.zeros(shape, dtype)
    noise = np.random.default_rng(0)
    if dtype.kind in "iub":
        return noise.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)
    return noise.random(shape).astype(dtype)


def _strings(sample: str, content: bytes, count: int, file: Path) -> list[bytes]:
    """Length-prefixed elements."""
    strings: list[bytes] = []
    at = 0
    for _ in range(count):
        size = int.from_bytes(content[at : at + 4], "little")
        at += 4
        if at + size > len(content):
            raise ConfigError(f"model_warmup '{sample}': {file}: ends within string {len(strings)} of {count}")
        strings.append(content[at : at + size])
        at += size
    return strings
