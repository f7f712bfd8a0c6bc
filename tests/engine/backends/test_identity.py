"""The identity backend: what goes in comes out under the number's other name, and what cannot be paired is refused."""

import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from engine.backends.identity import IdentityBackend
from engine.config import ModelConfig, parse_config
from engine.errors import ConfigError
from engine.types import DATATYPES

NOWHERE = Path("/nowhere/m/1")


def config(*pairs: tuple[str, str, str, str], extra: str = "") -> ModelConfig:
    """Of (input's name, output's name, type, dims)."""
    inputs = ", ".join(f'{{ name: "{name}" data_type: {kind} dims: {dims} }}' for name, _, kind, dims in pairs)
    outputs = ", ".join(f'{{ name: "{name}" data_type: {kind} dims: {dims} }}' for _, name, kind, dims in pairs)
    text = f'backend: "identity" max_batch_size: 8 input [ {inputs} ] output [ {outputs} ] {extra}'
    return parse_config(text, "m", "config.pbtxt")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('input { name: "INPUT0" data_type: TYPE_FP32 dims: 4 } '
         'output { name: "OUTPUT1" data_type: TYPE_FP32 dims: 4 }',
         "needs an output for each input"),
        ('input { name: "INPUT0" data_type: TYPE_FP32 dims: 4 } '
         'output { name: "OUTPUT0" data_type: TYPE_INT8 dims: 4 }',
         r"output 'OUTPUT0' is INT8 \[4\], but input 'INPUT0' is FP32 \[4\]"),
        ('input { name: "INPUT0" data_type: TYPE_FP32 dims: 4 } '
         'output { name: "OUTPUT0" data_type: TYPE_FP32 dims: 5 }',
         r"output 'OUTPUT0' is FP32 \[5\], but input 'INPUT0' is FP32 \[4\]"),
        ('input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "OUTPUT0" data_type: TYPE_FP32 dims: 4 }',
         "end in a number of their own, as in INPUT0 and OUTPUT0, got 'x'"),
        ('input [ { name: "A0" data_type: TYPE_FP32 dims: 4 }, { name: "B0" data_type: TYPE_FP32 dims: 4 } ] '
         'output { name: "OUTPUT0" data_type: TYPE_FP32 dims: 4 }', "got 'B0'"),
    ],
)  # fmt: skip
def test_what_cannot_be_paired_is_refused(text: str, match: str) -> None:
    """Every input needs the output of its number, with its datatype and dims."""
    with pytest.raises(ConfigError, match=match):
        IdentityBackend(parse_config(f'backend: "identity" {text}', "m", "config.pbtxt"), NOWHERE)


def test_dims_are_compared_as_the_model_sees_them() -> None:
    """After reshape, which the engine does before and after the model."""
    text = (
        'backend: "identity" max_batch_size: 8 '
        'input { name: "INPUT0" data_type: TYPE_FP32 dims: [ 4 ] reshape { shape: [ 2, 2 ] } } '
        'output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 2, 2 ] }'
    )
    IdentityBackend(parse_config(text, "m", "config.pbtxt"), NOWHERE)


def test_outputs_are_the_inputs_of_their_numbers() -> None:
    """Whatever the order, and without a copy."""
    backend = IdentityBackend(
        config(("INPUT1", "OUTPUT1", "TYPE_INT32", "2"), ("INPUT0", "OUTPUT0", "TYPE_FP32", "-1")), NOWHERE
    )
    first, second = np.ones((3, 5), "<f4"), np.arange(6, dtype="<i4").reshape(3, 2)
    outputs = backend.run({"INPUT1": second, "INPUT0": first})
    assert outputs["OUTPUT0"] is first
    assert outputs["OUTPUT1"] is second


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype(datatype: str) -> None:
    """BYTES and BF16 too."""
    kind = "TYPE_" + datatype.replace("BYTES", "STRING")
    backend = IdentityBackend(config(("INPUT0", "OUTPUT0", kind, "2")), NOWHERE)
    given = backend.empty((1, 2), DATATYPES[datatype])
    given[:] = [[b"a\xff", b""]] if datatype == "BYTES" else [[1, 0]]
    backend.enter(True)
    yielded = backend.run({"INPUT0": given})["OUTPUT0"]
    assert yielded.dtype == DATATYPES[datatype]
    np.testing.assert_array_equal(yielded, given)
    assert datatype != "BF16" or yielded.dtype == ml_dtypes.bfloat16
    backend.close()


def test_a_batch_takes_as_long_as_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """execute_delay_ms, once for a batch; without it there is no delay at all."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    extra = 'parameters { key: "execute_delay_ms" value { string_value: "250" } }'
    pair = ("INPUT0", "OUTPUT0", "TYPE_FP32", "1")
    IdentityBackend(config(pair), NOWHERE).run({"INPUT0": np.ones((4, 1), "<f4")})
    assert slept == []
    IdentityBackend(config(pair, extra=extra), NOWHERE).run({"INPUT0": np.ones((4, 1), "<f4")})
    assert slept == [0.25]
