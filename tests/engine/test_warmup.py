"""The requests that `model_warmup` asks for."""

from pathlib import Path

import numpy as np
import pytest

from engine.config import WarmupInput, WarmupSample
from engine.errors import ConfigError
from engine.warmup import sample_requests


def sample(
    source: str, datatype: str = "FP32", dims: tuple[int, ...] = (2, 3), file: str = "", rows: int = 1
) -> WarmupSample:
    return WarmupSample("s", rows, 1, {"x": WarmupInput(datatype, dims, source, file)})


@pytest.mark.parametrize("datatype", ["BOOL", "INT8", "UINT64", "FP16", "FP32", "BF16", "BYTES"])
@pytest.mark.parametrize("source", ["zero", "random"])
def test_each_request_has_a_batch_dimension_of_one(tmp_path: Path, datatype: str, source: str) -> None:
    """Where the model has one; random data is not all zeros, but for strings, which are empty."""
    requests = sample_requests(sample(source, datatype, rows=3), True, tmp_path)
    assert [request["x"].shape for request in requests] == [(1, 2, 3)] * 3
    array = sample_requests(sample(source, datatype, (64,)), False, tmp_path)[0]["x"]
    assert array.shape == (64,)
    if datatype == "BYTES":
        assert set(array.tolist()) == {b""}
    else:
        assert bool(array.astype("<f8").any()) == (source == "random")


def test_a_file_is_raw_little_endian_data(tmp_path: Path) -> None:
    """Strings are length-prefixed. What is too short, or not there, is named with what was needed."""
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "raw").write_bytes(np.arange(6, dtype="<f4").tobytes())
    (tmp_path / "warmup" / "text").write_bytes(b"\x02\0\0\0ab\0\0\0\0")
    (tmp_path / "warmup" / "short").write_bytes(b"\x02\0\0\0a")
    raw = sample_requests(sample("file", file="raw"), True, tmp_path)[0]["x"]
    assert raw.tolist() == [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]
    text = sample_requests(sample("file", "BYTES", (2,), "text"), True, tmp_path)[0]["x"]
    assert text.tolist() == [[b"ab", b""]]
    for bad, message in (
        (sample("file", file="none"), "model_warmup 's': .*none: cannot be read"),
        (
            sample("file", dims=(7,), file="raw"),
            "warmup setting expects 28 bytes, but the data provided from .* only has 24",
        ),
        (sample("file", "BYTES", (1,), "short"), "short: ends within string 0 of 1"),
        (sample("file", "BYTES", (3,), "text"), "text: ends within string 2 of 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample_requests(bad, True, tmp_path)
