"""The identity model: every output is the input of the same number. It needs no file; it is there to measure the rest.

    backend: "identity"
    input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 4 ] } ]
    output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 4 ] } ]
    parameters { key: "execute_delay_ms" value { string_value: "5" } }

As in Triton's backend of that name, execute_delay_ms is how long a batch takes, of whatever size.
"""

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..errors import ConfigError
from ..types import Array, TensorSpec

_NUMBER = re.compile(r"\d+$", re.ASCII)


class IdentityBackend:
    """One version of a model that answers with what it is given."""

    device = "cpu"

    def __init__(self, config: ModelConfig, file: Path) -> None:
        """Pair the tensors of the config; `file` need not exist.

        Raises:
            ConfigError: an input has no output of its number, datatype and dims.
        """
        inputs, outputs = _by_number(config, config.inputs.values()), _by_number(config, config.outputs.values())
        if inputs.keys() != outputs.keys():
            raise ConfigError(
                f"model '{config.name}': the identity backend needs an output for each input, with the same number at "
                f"the end of its name, got inputs {list(config.inputs)} and outputs {list(config.outputs)}"
            )
        for number, given in inputs.items():
            wanted = outputs[number]
            if (given.datatype, _dims(given)) != (wanted.datatype, _dims(wanted)):
                raise ConfigError(
                    f"model '{config.name}': output '{wanted.name}' is {wanted.datatype} {list(_dims(wanted))}, but "
                    f"input '{given.name}' is {given.datatype} {list(_dims(given))}"
                )
        self._pairs = [(outputs[number].name, inputs[number].name) for number in inputs]
        self._delay = (
            float(config.parameters.get("execute_delay_ms", 0)) / 1000
        )  # a number: the config has seen to that

    def enter(self, inline: bool) -> None:
        pass

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.empty(shape, dtype)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._delay:
            time.sleep(self._delay)
        return {output: inputs[name] for output, name in self._pairs if name in inputs}

    def close(self) -> None:
        pass


def _by_number(config: ModelConfig, specs: Iterable[TensorSpec]) -> dict[int, TensorSpec]:
    numbered: dict[int, TensorSpec] = {}
    for spec in specs:
        number = _NUMBER.search(spec.name)
        if number is None or int(number[0]) in numbered:
            raise ConfigError(
                f"model '{config.name}': the identity backend needs names that end in a number of their own, as in "
                f"INPUT0 and OUTPUT0, got '{spec.name}'"
            )
        numbered[int(number[0])] = spec
    return numbered


def _dims(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape if spec.reshape is None else spec.reshape
