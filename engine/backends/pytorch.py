"""PyTorch models: `torch.export` archives (model.pt2) and TorchScript (model.pt), on the CPU or one CUDA device.

Neither form needs the code that made it. But both are programs, and torch's own readers can be led to unpickle or to
evaluate what a crafted file says (torch 2.13, `torch.export.load`): trust a model file as you trust code.

Inputs are matched to the arguments of the module's `forward` by name, or by Triton's `<anything>__<index>`, or by the
order of the config. Outputs: a dict by name; a tensor or a sequence by `__<index>` or by the order of the config.

On CUDA a batch is stacked in pinned memory, copied without blocking on a stream of the backend's own, and the results
come back to pinned memory the same way; the caller waits for one event of that stream, never for the device.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batching.errors import OutOfMemory

from ..config import ModelConfig
from ..errors import ConfigError, DeviceLost, InvalidInput
from ..types import DATATYPES, Array

# Threads of an operator in the lane's thread: one core is the event loop's. An operator that shares its work with a
# thread whose core is taken waits for that thread: on two busy cores a convolution of 1 ms was seen to take 100.
_THREADS = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() - 1)


class PyTorchBackend:
    """One loaded model version."""

    def __init__(self, config: ModelConfig, file: Path) -> None:
        """Load `file` onto the device that the config names.

        Raises:
            ConfigError: the file is no model, its inputs do not match the config, or the device is not there.
        """
        self.device = choose_device(config)
        load = {".pt2": _load_exported, ".pt": _load_torchscript}.get(file.suffix)
        if load is None:
            raise ConfigError(f"{file}: a PyTorch model is a .pt2 (torch.export) or .pt (TorchScript) file")
        try:
            self._module, arguments = load(file, self.device, config)
        except ConfigError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ConfigError(
                f"{file}: cannot be loaded: {text}; a .pt2 file is written by torch.export.save, a .pt file by "
                "torch.jit.save (torch.save makes neither)"
            ) from error
        self._inputs = _by_position(list(config.inputs), arguments, file)
        self._outputs = _by_position(list(config.outputs), [], file)
        self._cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None

    def enter(self, inline: bool) -> None:
        # torch keeps the number of threads of an operator for each calling thread. A model short enough for the event
        # loop gains nothing from a second core, and waits for it a thousand times longer when that core is busy.
        torch.set_num_threads(1 if inline else _THREADS)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if not self._cuda:
            return np.empty(shape, dtype)
        return torch.empty(shape, dtype=_torch_dtype(dtype), pin_memory=True).numpy()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return self._run(inputs)
        except AssertionError as error:  # how a guard of torch.export says so
            if not str(error).startswith("Guard failed: "):
                raise
            limit = str(error).removeprefix("Guard failed: ").splitlines()[0]
            raise InvalidInput(f"the model was exported for inputs with {limit}") from None
        except torch.OutOfMemoryError as error:
            text = str(error).splitlines()[0]
        except torch.AcceleratorError as error:
            raise DeviceLost(f"{self.device} is lost: {str(error).splitlines()[0]}") from error
        except (torch.jit.Error, RuntimeError) as error:  # what an operator raises in a script comes as a plain one
            if "TorchScript interpreter" not in str(error).partition("\n")[0]:
                raise
            # Its first lines are about the interpreter, its last one is what the model, or the operator, said.
            raise RuntimeError(
                str(error).strip().splitlines()[-1].removeprefix("builtins.").removeprefix("RuntimeError: ")
            ) from error
        # Out of memory. Not before torch's error is let go: its traceback holds every tensor that was on its way.
        torch.cuda.empty_cache()  # blocks of the sizes that did not fit are no use to a smaller batch
        raise OutOfMemory(text)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            if self._stream is None:
                return self._named(self._module(*(torch.from_numpy(inputs[name]) for name in self._inputs)), _to_numpy)
            with torch.cuda.stream(self._stream):
                arguments = [torch.from_numpy(inputs[name]).to(self.device, non_blocking=True) for name in self._inputs]
                outputs = self._named(self._module(*arguments), _to_pinned)
                done = torch.cuda.Event(blocking=True)
                done.record(self._stream)
            done.synchronize()
        return outputs

    def _named(self, result: Any, to_host: Callable[[torch.Tensor], Array]) -> dict[str, Array]:
        if isinstance(result, Mapping):
            return {name: to_host(result[name]) for name in self._outputs if name in result}
        if isinstance(result, torch.Tensor):
            result = (result,)
        return {name: to_host(tensor) for name, tensor in zip(self._outputs, result, strict=False)}


def choose_device(config: ModelConfig) -> torch.device:
    """The device that the config asks for, if it is there.

    Raises:
        ConfigError: it is not.
    """
    if config.device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ConfigError(
            f"model '{config.name}': instance_group asks for {config.device}, but "
            f"{torch.cuda.device_count()} CUDA devices are available"
        )
    return device


def _load_exported(file: Path, device: torch.device, config: ModelConfig) -> tuple[Callable[..., Any], list[str]]:
    program = torch.export.load(file)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module, arguments = program.module(), list(program.graph_signature.user_inputs)
    if set(arguments) == set(config.inputs) and config.max_batch_size and not config.variable and not config.ragged:
        # Its guards cost 0.1 ms a call. Where only the rows vary, the fewest and the most that a batch can have pass
        # them here, once; the engine lets nothing else through to the model.
        specs = [config.inputs[name] for name in arguments]
        for rows in (1, config.max_batch_size):
            zeros = [np.zeros((rows, *spec.shape[1:]), DATATYPES[spec.datatype]) for spec in specs]
            try:
                module(*(torch.from_numpy(array).to(device) for array in zeros))
            except AssertionError as error:
                raise ConfigError(
                    f"{file}: the model does not take inputs of shape {[list(array.shape) for array in zeros]}, as its "
                    f"config says with max_batch_size {config.max_batch_size}: {str(error).splitlines()[0]}; export it "
                    "with dynamic_shapes for dimension 0, from 1 to max_batch_size"
                ) from None
        module = program.module(check_guards=False)
        module.validate_inputs = False  # type: ignore[assignment]
    return module, arguments


def _load_torchscript(file: Path, device: torch.device, config: ModelConfig) -> tuple[Callable[..., Any], list[str]]:
    with warnings.catch_warnings():
        # torch 2.13 deprecates TorchScript; people have such files, and keep their server to run them.
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(str(file), map_location=device).eval()
        return module, [argument.name for argument in module.forward.schema.arguments[1:]]


def _by_position(names: list[str], arguments: Sequence[str], file: Path) -> list[str]:
    """The config's tensor names in the order in which the module takes or gives them."""
    if arguments and len(arguments) != len(names):
        raise ConfigError(f"{file}: the model takes {list(arguments)}, but its config lists the inputs {names}")
    if set(names) == set(arguments):
        return list(arguments)
    indices = [name.rpartition("__")[2] if "__" in name else "" for name in names]
    if all(index.isdecimal() for index in indices):
        if sorted(map(int, indices)) != list(range(len(names))):
            raise ConfigError(f"{file}: the config's names {names} must end in __0 to __{len(names) - 1}, each once")
        return sorted(names, key=lambda name: int(name.rpartition("__")[2]))
    return names


def _to_numpy(tensor: torch.Tensor) -> Array:
    # A copy: the module may answer with a buffer of its own, and write the next batch into it.
    return np.array(tensor.numpy(), order="C")


def _to_pinned(tensor: torch.Tensor) -> Array:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return np.asarray(host.copy_(tensor, non_blocking=True))


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
