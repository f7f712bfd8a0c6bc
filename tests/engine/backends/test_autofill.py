"""Auto-complete: what the config says wins, what it does not is filled in from the model's file."""

from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from engine.backends.autofill import fill, is_complete
from engine.errors import ConfigError
from engine.types import TensorSpec

X = TensorSpec("x", "FP32", (-1, 3))
Y = TensorSpec("y", "BYTES", (-1,))


def message(text: str = "") -> Any:
    return text_format.Parse(f'name: "m" {text}', model_config_pb2.ModelConfig())


def test_a_batch_size_for_a_model_without_batches_is_refused() -> None:
    """With Triton's text."""
    with pytest.raises(
        ConfigError,
        match=r"^autofill failed for model 'm': model does not support batching while non-zero max_batch_size is "
        r"specified$",
    ):
        fill(message("max_batch_size: 2"), [X], [Y], batches=False)


def test_everything_is_filled_in() -> None:
    """The batch dimension is not written in dims; what remains of [batch] is [ 1 ], reshaped to nothing."""
    config = message()
    fill(config, [X], [Y], batches=True)
    assert config == message(
        "max_batch_size: 4 dynamic_batching { } "
        'input { name: "x" data_type: TYPE_FP32 dims: 3 } '
        'output { name: "y" data_type: TYPE_STRING dims: 1 reshape { } }'
    )


def test_without_batches_the_dims_are_all_of_them() -> None:
    """A tensor without dimensions is [ 1 ]: a config has no empty dims."""
    config = message()
    fill(config, [X], [TensorSpec("z", "BF16", ())], batches=False)
    assert config == message(
        'input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] } output { name: "z" data_type: TYPE_BF16 dims: 1 }'
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("max_batch_size: 16", "max_batch_size: 16 dynamic_batching { }"),
        ("max_batch_size: 1", "max_batch_size: 1"),
        ("sequence_batching { }", "max_batch_size: 4 sequence_batching { }"),
        (
            "dynamic_batching { preserve_ordering: true }",
            "max_batch_size: 4 dynamic_batching { preserve_ordering: true }",
        ),
    ],
)
def test_what_the_config_says_wins(given: str, expected: str) -> None:
    """Its size of a batch, its scheduler, and the side of the model that it describes."""
    inputs = 'input { name: "mine" data_type: TYPE_INT8 dims: 7 }'
    config = message(f"{given} {inputs}")
    fill(config, [X], [X], batches=True)
    assert config == message(f'{expected} {inputs} output {{ name: "x" data_type: TYPE_FP32 dims: 3 }}')


def test_a_complete_config_needs_no_file() -> None:
    """Both sides, not one."""
    one = 'input { name: "x" data_type: TYPE_FP32 dims: 3 }'
    assert not is_complete(message(one))
    assert is_complete(message(one + one.replace("input", "output")))
