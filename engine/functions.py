"""A Python function as a model: for those who have no repository, the same signature, policy and validation.

    @model(max_batch_size=32, input={"x": ("FP32", [4])}, output={"y": ("FP32", [4])})
    def double(x):
        return 2 * x

The keywords are the fields of config.pbtxt. The function is given stacked numpy arrays by the names of its inputs, the
batch dimension first, and returns its outputs: an array, a tuple in the order of `output`, or a dict by name.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelConfig, configure, deduce, read_json
from .errors import ConfigError
from .repository import StoredModel
from .types import DATATYPES, Array

# name -> (datatype, dims)
Tensors = Mapping[str, tuple[str, list[int]]]


@dataclass(frozen=True)
class Function:
    """A function that is a model. Calling it calls the function.

    Attributes:
        config: the model's, as JSON.
    """

    name: str
    config: str
    call: Callable[..., Any]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.call(*arguments, **named)

    def parsed(self) -> ModelConfig:
        """Raises ConfigError, which names the field that cannot be served."""
        where = f"@model {self.name}"
        message = read_json(self.config, where)
        return configure(message, deduce(message, self.name, (), where), where, None)


def model(
    *,
    input: Tensors,
    output: Tensors,
    name: str = "",
    max_batch_size: int = 0,
    **fields: Any,
) -> Callable[[Callable[..., Any]], Function]:
    """Make a model of a function.

    Args:
        input, output: name -> (datatype, dims), as in config.pbtxt: without the batch dimension.
        name: of the model; the function's if it is not given.
        max_batch_size: rows of a batch; 0 for a function whose arrays have no batch dimension.
        fields: further fields of config.pbtxt. Unless `dynamic_batching` is given, requests share batches wherever
            max_batch_size is not 0.

    Raises:
        ConfigError: a field cannot be served.
    """

    def make(function: Callable[..., Any]) -> Function:
        own = name or function.__name__
        if inspect.iscoroutinefunction(function):
            raise ConfigError(f"@model {own}: must be an ordinary function, which runs in a thread; this is async def")
        for tensor, (datatype, _) in (*input.items(), *output.items()):
            if datatype not in DATATYPES:
                raise ConfigError(
                    f"@model {own}: the datatype of '{tensor}' must be one of {', '.join(DATATYPES)}, got {datatype!r}"
                )
        config: dict[str, Any] = {
            "name": own,
            "backend": "function",
            "max_batch_size": max_batch_size,
            "input": [_tensor(*item) for item in input.items()],
            "output": [_tensor(*item) for item in output.items()],
        }
        if max_batch_size:
            config["dynamic_batching"] = {}
        made = Function(own, json.dumps(config | fields), function)
        made.parsed()
        return made

    return make


def _tensor(name: str, spec: tuple[str, list[int]]) -> dict[str, Any]:
    datatype, dims = spec
    return {"name": name, "data_type": f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}", "dims": list(dims)}


class FunctionBackend:
    """Runs a Function: an `engine.types.Backend`."""

    device = "cpu"

    def __init__(self, function: Function) -> None:
        self._outputs = list(function.parsed().outputs)
        self._function: Callable[..., Any] | None = function.call

    def enter(self, inline: bool) -> None:
        """A function is the same in every thread."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.empty(shape, dtype)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert self._function is not None
        result = self._function(**inputs)
        if isinstance(result, Mapping):
            return dict(result)
        if not isinstance(result, tuple):
            result = (result,)
        return dict(zip(self._outputs, result, strict=True))

    def close(self) -> None:
        self._function = None


def as_stored(functions: Sequence[Function]) -> list[StoredModel]:
    """The functions as models of a repository, all of version 1.

    Raises:
        ConfigError: two have the same name.
    """
    names = [function.name for function in functions]
    if twice := {own for own in names if names.count(own) > 1}:
        raise ConfigError(f"@model {twice.pop()}: two functions have this name; give one of them another with name=")
    return [StoredModel(function.parsed(), NOWHERE, {1: NOWHERE}) for function in functions]


# Where the model of a function has its folder.
NOWHERE = Path("/nonexistent")
