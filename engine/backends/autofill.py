"""What a model's file says of itself, filled into a config that does not say it: Triton's auto-complete.

`message` is Triton's protobuf ModelConfig. What it sets wins. Texts and rules are those of Triton's ONNX Runtime
backend (onnxruntime.cc, AutoCompleteConfig).
"""

from collections.abc import Sequence
from typing import Any

from tritonclient.grpc import model_config_pb2

from ..errors import ConfigError
from ..types import TensorSpec

# max_batch_size where neither the config nor the file says one: Triton's default for its --backend-config.
DEFAULT_MAX_BATCH_SIZE = 4


def is_complete(message: Any) -> bool:
    """Whether nothing is to be filled in: then the file need not be read."""
    return bool(message.input and message.output)


def fill(
    message: Any,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    batches: bool,
    most: int = DEFAULT_MAX_BATCH_SIZE,
) -> None:
    """Fill in the inputs, if the config names none, the outputs likewise, the size of a batch and how it is formed.

    Args:
        inputs, outputs: as in the file, with the batch dimension if the model has one.
        batches: whether the first dimension of each of them is a batch's.
        most: max_batch_size, if the config has none.

    Raises:
        ConfigError: the config has a max_batch_size, and the model no batch dimension.
    """
    if batches:
        message.max_batch_size = message.max_batch_size or most
        if message.max_batch_size > 1 and message.WhichOneof("scheduling_choice") is None:
            message.dynamic_batching.SetInParent()
    elif message.max_batch_size:
        raise ConfigError(
            f"autofill failed for model '{message.name}': model does not support batching while non-zero "
            "max_batch_size is specified"
        )
    for field, tensors in ((message.input, inputs), (message.output, outputs)):
        if not field:
            for spec in tensors:
                _add(field.add(), spec, batches)


def _add(tensor: Any, spec: TensorSpec, batches: bool) -> None:
    tensor.name = spec.name
    tensor.data_type = model_config_pb2.DataType.Value("TYPE_" + spec.datatype.replace("BYTES", "STRING"))
    dims = spec.shape[1:] if batches else spec.shape
    tensor.dims.extend(dims or (1,))
    if batches and not dims:  # a config has no empty dims
        tensor.reshape.SetInParent()
