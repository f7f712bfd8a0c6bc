"""The entries of `parameters`: each sets what its name says, and a value that does not fit is named with its key."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.policy import Policy
from engine.config import ModelConfig, parse_config
from engine.errors import ConfigError
from engine.parameters import ATTRIBUTES, BACKEND_PARAMETERS, OF_THE_MODEL, PARAMETERS

IO = """
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ 1 ] } ]
"""
GOOD = 'backend: "pytorch" max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 500 }' + IO
ALONE = 'backend: "pytorch" max_batch_size: 8' + IO
RAGGED = GOOD.replace("-1 ]", "-1 ] allow_ragged_batch: true")
PYTHON = GOOD.replace("pytorch", "python")
ONNX = GOOD.replace("pytorch", "onnxruntime")
IDENTITY = GOOD.replace("pytorch", "identity")


def parse(text: str) -> ModelConfig:
    return parse_config(text, "m", "models/m/config.pbtxt")


def with_parameters(text: str, **parameters: str) -> str:
    """`text` with our parameters, a dot of their names written as two underscores."""
    for key, value in parameters.items():
        text += f"parameters {{ key: '{key.replace('__', '.')}' value {{ string_value: '{value}' }} }}\n"
    return text


@pytest.mark.parametrize(
    ("key", "value", "policy"),
    [
        ("latency_objective_ms", "12.5", {"objective": 0.0125}),
        ("patience_ms", "250", {"patience": 0.25}),
        ("max_batch_tokens", "4096", {"max_cost": 4096}),
        ("max_batch_tokens", "1", {"max_cost": 1}),
        ("max_batch_tokens", "9007199254740991", {"max_cost": 2**53 - 1}),
        ("padded_lengths", "2147483647", {"lengths": (2**31 - 1,)}),
        ("padded_lengths", " ".join(map(str, range(1, 513))), {"lengths": tuple(range(1, 513))}),
        ("padded_lengths", "16 32 64", {"lengths": (16, 32, 64)}),
        ("padded_lengths", "16, 32,64", {"lengths": (16, 32, 64)}),
        ("padded_rows", "1 4 8", {"row_grid": (1, 4, 8)}),
        ("max_padding", "0.25", {"max_padding": 0.25}),
    ],
)
def test_our_parameters(key: str, value: str, policy: dict[str, Any]) -> None:
    """Each sets one knob of the policy, and nothing else."""
    assert parse(with_parameters(RAGGED, **{key: value})).policy == Policy(8, max_delay=0.0005, **policy)


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        (GOOD, {"INFERENCE_MODE": "False", "INTRA_OP_THREAD_COUNT": "2", "DISABLE_CUDNN": "on"}),
        (GOOD, {"precision": "bf16", "channels_last": "true", "compile": "off"}),
        (GOOD, {"TORCH_COMPILE_OPTIONAL_PARAMETERS": '{"options": {"freezing": false}}'}),
        (ONNX, {"execution_mode": "1", "intra_op_thread_count": "0", "session.disable_prepacking": "1"}),
        (IDENTITY, {"execute_delay_ms": "1.5"}),
        (IDENTITY, {"execute_delay_ms": "0"}),
        (PYTHON, {"anything": "goes", "padded_lengths": "not ours", "pad.x": "nor this", "INFERENCE_MODE": "7"}),
    ],
)
def test_parameters_of_a_backend(text: str, parameters: dict[str, str]) -> None:
    """They are passed on as they are, and change nothing in the queue; a Python model has all but the queue's."""
    config = parse(with_parameters(text, **parameters))
    assert (config.parameters, config.policy) == (parameters, parse(text).policy)


def test_parameters_of_the_queue_of_a_python_model() -> None:
    """They mean the same as for any other, and the model may read them too."""
    config = parse(with_parameters(PYTHON, patience_ms="250", mine="x"))
    assert config.policy == Policy(8, max_delay=0.0005, patience=0.25)
    assert config.parameters == {"patience_ms": "250", "mine": "x"}


@pytest.mark.parametrize("text", [GOOD, ALONE, PYTHON, IDENTITY])
def test_what_must_not_be_sent_again(text: str) -> None:
    """A model of any backend may say that it must never see a request twice; without a word it may."""
    assert parse(text).resend
    for value, resend in (("false", False), ("true", True), ("False", False)):
        config = parse(with_parameters(text, resend=value))
        assert (config.resend, config.parameters) == (resend, {"resend": value})
        assert config.policy == parse(text).policy


def test_no_parameter_of_a_backend_is_one_of_ours() -> None:
    """Each key has one meaning."""
    ours = {*PARAMETERS, *OF_THE_MODEL}
    assert not any(ours & set(table) for table in BACKEND_PARAMETERS.values())
    assert not set(PARAMETERS) & set(OF_THE_MODEL)


def test_every_parameter_sets_a_field_of_the_policy() -> None:
    """The table of parameters names attributes that exist, each once."""
    attributes = [attribute for attribute, _, _ in PARAMETERS.values()]
    assert len(set(attributes)) == len(attributes)
    assert set(attributes) <= set(ATTRIBUTES) <= {field.name for field in dataclasses.fields(Policy)}


def test_rows_are_padded_without_a_dynamic_batcher_too() -> None:
    """A request that is run alone is padded as well, so the grid is honoured."""
    assert parse(with_parameters(ALONE, padded_rows="4 8")).policy == Policy(8, row_grid=(4, 8))


@pytest.mark.parametrize(
    ("datatype", "value", "pad"),
    [
        ("FP32", "-0.5", -0.5),
        ("FP32", "-inf", -math.inf),
        ("FP16", "65504", 65504.0),
        ("INT64", "-100", -100.0),
        ("UINT8", "255", 255.0),
        ("BOOL", "1", 1.0),
        ("BF16", "3e38", 3e38),
    ],
)
def test_padding_values(datatype: str, value: str, pad: float) -> None:
    """A ragged input is padded with what its config says, which its datatype can hold."""
    assert parse(with_parameters(RAGGED.replace("FP32", datatype), pad__x=value)).pad == {"x": pad}


@pytest.mark.parametrize(
    ("text", "parameters", "error"),
    [
        (GOOD, {"latency_objectiv_ms": "5"},
         r"parameters.latency_objectiv_ms: no such parameter; did you mean latency_objective_ms\?"),
        (PYTHON, {"resend": "no"}, "parameters.resend: must be true or false, got 'no'"),
        (GOOD, {"resent": "false"}, r"parameters.resent: no such parameter; did you mean resend\?"),
        (GOOD, {"patience_s": "1"}, r"patience_s: no such parameter; did you mean patience_ms\?"),
        (RAGGED, {"pad.zzzzzz": "1"}, "pad.zzzzzz: no such parameter; it names no input with allow_ragged_batch: true"),
        (GOOD, {"INFERENCE_MOD": "true"}, r"INFERENCE_MOD: no such parameter; did you mean INFERENCE_MODE\?"),
        (GOOD, {"INFERENCE_MODE": "yes"}, "parameters.INFERENCE_MODE: must be true or false, got 'yes'"),
        (GOOD, {"INTRA_OP_THREAD_COUNT": "-1"}, "INTRA_OP_THREAD_COUNT: must be a whole number, 0 or more, got '-1'"),
        (GOOD, {"execute_delay_ms": "1"}, "parameters.execute_delay_ms: no such parameter"),
        (GOOD, {"precision": "bf17"}, "precision: must be bf16, or bf16-emulated .*, got 'bf17'"),
        (GOOD, {"channel_last": "true"}, r"channel_last: no such parameter; did you mean channels_last\?"),
        (GOOD, {"compile": "yes"}, "parameters.compile: must be true or false, got 'yes'"),
        (GOOD, {"TORCH_COMPILE_OPTIONAL_PARAMETERS": "[]"}, "_PARAMETERS: must be a JSON object, .* got '"),
        (GOOD, {"TORCH_COMPILE_OPTIONAL_PARAMETERS": '{"options": 7}'}, "_PARAMETERS: must be a JSON object"),
        (ONNX, {"INFERENCE_MODE": "true"}, "parameters.INFERENCE_MODE: no such parameter"),
        (ONNX, {"execution_mode": "2"}, "parameters.execution_mode: must be 0 or 1, got '2'"),
        (IDENTITY, {"execute_delay_ms": "-1"}, "execute_delay_ms: must be a number of milliseconds, 0 or more, got"),
        (IDENTITY, {"execute_delay_ms": "inf"}, "parameters.execute_delay_ms: must be a number of .*, got 'inf'"),
        (IDENTITY, {"execute_delay_ms": "soon"}, "parameters.execute_delay_ms: must be a number of .*, got 'soon'"),
        (GOOD, {"INTER_OP_THREAD_COUNT": "2147483648"}, "INTER_OP_THREAD_COUNT: must be a whole number, 0 or more"),
        (PYTHON, {"EXECUTION_ENV_PATH": "/env"}, "EXECUTION_ENV_PATH: a Python model runs in .*, got '/env'"),
        (PYTHON, {"patience_ms": "0"}, "parameters.patience_ms: must be a positive number of milliseconds, got '0'"),
        (RAGGED.replace("FP32", "BF16"), {"pad__x": "1e39"}, "parameters.pad.x: must be a number that BF16 holds"),
        (RAGGED, {"pad__y": "1"}, r"parameters.pad.y: no such parameter; did you mean pad.x\?"),
        (GOOD, {"latency_objective_ms": "fast"},
         "parameters.latency_objective_ms: must be a positive number of milliseconds, got 'fast'"),
        (GOOD, {"latency_objective_ms": "0"}, "parameters.latency_objective_ms: must be a positive .*, got '0'"),
        (GOOD, {"latency_objective_ms": "nan"}, "parameters.latency_objective_ms: must be a positive .*, got 'nan'"),
        (GOOD, {"patience_ms": "-1"}, "parameters.patience_ms: must be a positive number of milliseconds, got '-1'"),
        (GOOD, {"patience_ms": "inf"}, "parameters.patience_ms: must be a positive number of milliseconds, got 'inf'"),
        (GOOD, {"patience_ms": ""}, "parameters.patience_ms: must be a positive number of milliseconds, got ''"),
        (RAGGED, {"max_batch_tokens": "1e3"}, "parameters.max_batch_tokens: must be a whole number .*, got '1e3'"),
        (RAGGED, {"max_batch_tokens": "-1"}, "parameters.max_batch_tokens: must be a whole number .*, got '-1'"),
        (RAGGED, {"max_batch_tokens": "0"},
         "parameters.max_batch_tokens: must be a whole number from 1 to 9007199254740991, got '0'"),
        (RAGGED, {"max_batch_tokens": "9007199254740992"}, "must be .* 1 to 9007199254740991, got '9007199254740992'"),
        (RAGGED, {"padded_lengths": "16 32", "max_batch_tokens": "31"},
         "parameters.max_batch_tokens: must hold a row of the longest of padded_lengths, 32, got 31"),
        (RAGGED, {"padded_lengths": "16 32", "padded_rows": "4 8", "max_batch_tokens": "127"},
         "parameters.max_batch_tokens: must hold the fewest rows of padded_rows times the longest of padded_lengths, "
         "4 x 32, got 127"),
        (RAGGED, {"padded_lengths": "16 x"}, "parameters.padded_lengths: must be whole numbers, .*, got '16 x'"),
        (RAGGED, {"padded_lengths": " "}, "parameters.padded_lengths: must be whole numbers, .*, got ' '"),
        (RAGGED, {"padded_lengths": "1 2147483648"},
         "parameters.padded_lengths: must be whole numbers, at most 512, none above 2147483647, with spaces or commas "
         "between them, got '1 2147483648'"),
        (RAGGED, {"padded_lengths": " ".join(map(str, range(1, 514)))},
         r"parameters.padded_lengths: must be whole numbers, at most 512, .*, got '1 2 3 .*\.\.\.$"),
        (GOOD, {"padded_rows": " ".join(map(str, range(1, 514)))},
         r"parameters.padded_rows: must be whole numbers, at most 512, .*, got '1 2 3 .*\.\.\.$"),
        (RAGGED, {"padded_lengths": "32 16"},
         r"parameters.padded_lengths: must be positive and ascending, got \[32, 16\]"),
        (RAGGED, {"padded_lengths": "0 16"}, "parameters.padded_lengths: must be positive and ascending"),
        (GOOD, {"padded_rows": "2 4"}, r"parameters.padded_rows: must end with max_batch_size \(8\), got 4"),
        (ALONE, {"latency_objective_ms": "5"},
         r"parameters.latency_objective_ms: needs dynamic_batching \{ \} and a max_batch_size of at least 1, got '5'"),
        (GOOD.replace("max_batch_size: 8", ""), {"latency_objective_ms": "5"},
         "latency_objective_ms: needs .* max_batch_size"),
        (ALONE.replace("max_batch_size: 8", ""), {"padded_rows": "1"},
         "parameters.padded_rows: needs a max_batch_size of at least 1, got '1'"),
        (RAGGED, {"max_padding": "1.5"}, "parameters.max_padding: must be a share, 0 to 1, got 1.5"),
        (RAGGED, {"max_padding": "nan"}, "parameters.max_padding: must be a share"),
        (RAGGED, {"max_padding": "half"}, "parameters.max_padding: must be a number from 0 to 1, got 'half'"),
        (GOOD, {"max_batch_tokens": "9"},
         "parameters.max_batch_tokens: needs an input with allow_ragged_batch: true, got '9'"),
        (GOOD, {"padded_lengths": "9"}, "parameters.padded_lengths: needs an input with allow_ragged_batch: true"),
        (GOOD, {"max_padding": "0"}, "parameters.max_padding: needs an input with allow_ragged_batch: true"),
        (GOOD, {"pad__x": "0"}, "parameters.pad.x: needs an input with allow_ragged_batch: true"),
        (RAGGED, {"pad__x": "none"}, "parameters.pad.x: must be a number that FP32 holds, got 'none'"),
        (RAGGED, {"pad__x": "nan"}, "parameters.pad.x: must be a number that FP32 holds, got 'nan'"),
        (RAGGED, {"pad__x": "1e39"}, "parameters.pad.x: must be a number that FP32 holds, got '1e39'"),
        (RAGGED, {"pad__x": "1e400"}, "parameters.pad.x: must be a number that FP32 holds, got '1e400'"),
        (RAGGED.replace("FP32", "FP16"), {"pad__x": "65520"}, "parameters.pad.x: must be a number that FP16 holds"),
        (RAGGED.replace("FP32", "INT32"), {"pad__x": "0.5"}, "parameters.pad.x: must be a number that INT32 holds"),
        (RAGGED.replace("FP32", "UINT8"), {"pad__x": "-1"}, "parameters.pad.x: must be a number that UINT8 holds"),
        (RAGGED.replace("FP32", "BOOL"), {"pad__x": "2"}, "parameters.pad.x: must be a number that BOOL holds"),
        (RAGGED.replace("FP32", "INT64"), {"pad__x": "9007199254740993"}, "parameters.pad.x: must be .* INT64 holds"),
        (RAGGED.replace("FP32", "INT64"), {"pad__x": "-9007199254740993"}, "parameters.pad.x: must be .* INT64 holds"),
        (RAGGED.replace("FP32", "INT64"), {"pad__x": "inf"}, "parameters.pad.x: must be a number that INT64 holds"),
    ],
)  # fmt: skip
def test_parameters_that_are_refused(text: str, parameters: dict[str, str], error: str) -> None:
    """An unknown one names the nearest; a value that does not parse, or does not fit, is named with its key."""
    with pytest.raises(ConfigError, match=error) as refused:
        parse(with_parameters(text, **parameters))
    assert str(refused.value).startswith("models/m/config.pbtxt: parameters.")


VALUES = st.sampled_from(["-1", "0", "1", "2.5", "nan", "inf", "1e400", "9" * 30, "16 32", "32,16", "DELAY", "x", ""])


@given(st.dictionaries(st.sampled_from([*PARAMETERS, "pad__x", "pad__y"]), VALUES), st.booleans())
def test_any_parameters_are_a_config_or_a_refusal(parameters: dict[str, str], ragged: bool) -> None:
    """Whatever their values: a config, or ConfigError, nothing else."""
    try:
        parse(with_parameters(RAGGED if ragged else GOOD, **parameters))
    except ConfigError as error:
        assert str(error).startswith("models/m/config.pbtxt: parameters.")  # noqa: PT017
