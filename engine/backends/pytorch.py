"""PyTorch models: `torch.export` archives (model.pt2) and TorchScript (model.pt), on the CPU or one CUDA device.

Neither form needs the code that made it. But both are programs. torch's own reader of .pt2 files can be led to unpickle
or to evaluate what a crafted one says, so `archive.check_archive` reads it first and refuses that. A .pt file is read
in C++: its pickles may name only TorchScript's own types and functions, and its code is TorchScript, which is compiled
and never run by Python. That code can still call every operator there is, those that read and write files among them:
trust a .pt file as you trust code.

Inputs are matched to the arguments of the module's `forward` by name, or by Triton's `<anything>__<index>`, or by the
order of the config. Outputs: a dict by name; a tensor or a sequence by `__<index>` or by the order of the config. A
script whose `forward` takes one dict gets all inputs in it, by their names. BYTES are lists of texts, in scripts only.

On CUDA a batch is stacked in pinned memory, copied without blocking on a stream of the backend's own, and the results
come back to pinned memory the same way; the caller waits for one event of that stream, never for the device.

What a config may ask for on the CPU, `precision`, `channels_last` and `compile`, is done to the program of an archive
while it is loaded: exported.py. docs/cpu.md says what each gains.

Of the parameters of Triton's backend, ENABLE_WEIGHT_SHARING, ENABLE_JIT_EXECUTOR, ENABLE_JIT_PROFILING and
ENABLE_TENSOR_FUSER change nothing here: every instance has weights of its own, and torch's compiler of scripts works as
it does by itself. None of them changes an answer.
"""

import gc
import linecache
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from batching.errors import OutOfMemory

from ..config import ModelConfig
from ..errors import ConfigError, DeviceLost, InvalidInput
from ..types import DATATYPES, Array, TensorSpec
from . import autofill, exported
from .archive import check_archive, read_signature

# Threads of an operator in the lane's thread: one core is the event loop's. An operator that shares its work with a
# thread whose core is taken waits for that thread: on two busy cores a convolution of 1 ms was seen to take 100.
_THREADS = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() - 1)

# numpy has no bfloat16 of its own, and torch does not know the one that there is: each sees the other's as int16.
_BFLOAT16 = DATATYPES["BF16"]


class _Loaded(NamedTuple):
    """A module, as the backend calls it.

    Attributes:
        arguments: names of those of its `forward`.
        takes_dict: whether that takes one dict of tensors.
        guards: what is to be called with a batch's tensors before the module is, and says which it does not take.
    """

    module: Callable[..., Any]
    arguments: list[str]
    takes_dict: bool = False
    guards: Callable[..., Any] | None = None


# Outputs that one module may give: a bound on the numbers at the end of their names.
MOST_OUTPUTS = 1024


class PyTorchBackend:
    """One loaded model version."""

    def __init__(self, config: ModelConfig, file: Path) -> None:
        """Load `file` onto the device that the config names.

        Raises:
            ConfigError: the file is no model, its inputs do not match the config, or the device is not there.
        """
        self.device = choose_device(config)
        _check_texts(config, file)
        exported.check_options(config, file, self.device)
        load = {".pt2": _load_exported, ".pt": _load_torchscript}.get(file.suffix)
        if load is None:
            raise ConfigError(f"{file}: a PyTorch model is a .pt2 (torch.export) or .pt (TorchScript) file")
        try:
            self._module, arguments, self._takes_dict, self._guards = load(file, self.device, config)
            self._inputs = _by_position(list(config.inputs), arguments, file)
            self._outputs = _by_position(list(config.outputs), None, file)
        except Exception as error:
            _forget_sources()  # nobody closes what was never made
            if isinstance(error, ConfigError):
                raise
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ConfigError(
                f"{file}: cannot be loaded: {text}; a .pt2 file is written by torch.export.save, a .pt file by "
                "torch.jit.save (torch.save makes neither)"
            ) from error
        finally:
            _forget_sizes()
        self._cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None
        self._context = _context(config)
        self._threads = _threads(config)
        self._cleans = self._cuda and config.flag("ENABLE_CACHE_CLEANING")
        _set_interop_threads(config)

    def enter(self, inline: bool) -> None:
        # torch keeps the number of threads of an operator for each calling thread. A model short enough for the event
        # loop gains nothing from a second core, and waits for it a thousand times longer when that core is busy.
        torch.set_num_threads(1 if inline and not self._threads.asked else self._threads.most)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if not self._cuda or dtype.hasobject:
            return np.empty(shape, dtype)
        return _to_array(torch.empty(shape, dtype=_torch_dtype(dtype), pin_memory=True))

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

    def close(self) -> None:
        del self._module, self._guards
        _forget_sources()
        if self._cuda:
            gc.collect()  # a module is full of references to itself
            torch.cuda.empty_cache()

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self._context():
            if self._stream is None:
                return self._named(self._call([_to_argument(name, inputs[name]) for name in self._inputs]), _to_numpy)
            with torch.cuda.stream(self._stream):
                outputs = self._named(
                    self._call([self._on_device(name, inputs[name]) for name in self._inputs]), _to_pinned
                )
                done = torch.cuda.Event(blocking=True)
                done.record(self._stream)
            done.synchronize()
        if self._cleans:
            torch.cuda.empty_cache()
        return outputs

    def _on_device(self, name: str, array: Array) -> Any:
        argument = _to_argument(name, array)
        return argument.to(self.device, non_blocking=True) if isinstance(argument, torch.Tensor) else argument

    def _call(self, arguments: list[Any]) -> Any:
        if self._takes_dict:
            return self._module(dict(zip(self._inputs, arguments, strict=True)))
        if self._guards is not None:
            self._guards(*arguments)
        return self._module(*arguments)

    def _named(self, result: Any, to_host: Callable[[torch.Tensor], Array]) -> dict[str, Array]:
        if isinstance(result, Mapping):
            return {name: _to_output(result[name], to_host) for name in self._outputs if name in result}
        if isinstance(result, torch.Tensor) or _is_text(result):
            result = (result,)
        named = zip(self._outputs, result, strict=False)
        return {name: _to_output(value, to_host) for name, value in named if name}


def complete(message: Any, file: Path) -> None:
    """Fill in what the config leaves out, from the program that an archive holds: see autofill.fill.

    Inputs are named as the arguments of `forward`. Outputs are named by the keys if it gives a dict, else OUTPUT__0 and
    so on.

    Args:
        message: a protobuf ModelConfig, changed in place.

    Raises:
        ConfigError: the file is unfit, or it does not say what its tensors are, as no TorchScript file does.
    """
    if autofill.is_complete(message):
        return
    if file.suffix != ".pt2":
        raise ConfigError(
            f"model '{message.name}': input and output sections are required: {file.name} does not say what its "
            "tensors are; an archive of torch.export (model.pt2) does"
        )
    signature = read_signature(check_archive(file), file)
    autofill.fill(message, signature.inputs, signature.outputs, signature.most > 0, signature.most)


def _forget_sources() -> None:
    """Let go of the sources of compiled graphs, which torch.fx and linecache keep for tracebacks: 10 KB a load.

    Models that are loaded lose no more than the lines in their tracebacks.
    """
    kept = getattr(getattr(torch.fx.graph_module, "_loader", None), "eval_cache", {})
    for name in list(kept):
        linecache.cache.pop(name, None)
    kept.clear()


def _forget_sizes() -> None:
    """Let go of what torch remembers about the sizes in programs: 25 KB a load.

    Methods of ShapeEnv are memoized over all its instances, some without bound, and so each program's sizes, with all
    that is known of them, would live as long as the process. Once a program is loaded, nobody asks about them.
    """
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


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


def _context(config: ModelConfig) -> Callable[[], AbstractContextManager[Any]]:
    """What a batch runs in, as the config's parameters say."""
    contexts: list[Callable[[], AbstractContextManager[Any]]] = [
        torch.inference_mode if config.flag("INFERENCE_MODE", "true") else torch.no_grad
    ]
    if config.flag("DISABLE_CUDNN"):
        contexts.append(lambda: torch.backends.cudnn.flags(enabled=False))
    if config.flag("DISABLE_OPTIMIZED_EXECUTION"):
        contexts.append(lambda: torch.jit.optimized_execution(False))  # type: ignore[attr-defined]

    @contextmanager
    def all_of_them() -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    return contexts[0] if len(contexts) == 1 else all_of_them


class _Threads(NamedTuple):
    """Threads of an operator in the lane's thread, and whether the config asked for as many."""

    most: int
    asked: bool


def _threads(config: ModelConfig) -> _Threads:
    asked = int(config.parameters.get("INTRA_OP_THREAD_COUNT", 0))
    return _Threads(asked or _THREADS, asked > 0)


def _set_interop_threads(config: ModelConfig) -> None:
    """The number is the process's, and torch lets it be set once, before the first of these threads is used."""
    count, now = int(config.parameters.get("INTER_OP_THREAD_COUNT", 0)), torch.get_num_interop_threads()
    if count not in (0, now):
        try:
            torch.set_num_interop_threads(count)
        except RuntimeError:
            raise ConfigError(
                f"model '{config.name}': parameters.INTER_OP_THREAD_COUNT: this process runs with {now}, which cannot "
                f"change any more, got {count}"
            ) from None


def _check_texts(config: ModelConfig, file: Path) -> None:
    """BYTES exist in scripts alone, as lists of texts."""
    for kind, specs in (("input", config.inputs), ("output", config.outputs)):
        for spec in specs.values():
            if spec.datatype == "BYTES" and file.suffix == ".pt2":
                raise ConfigError(f"model '{config.name}': {kind} '{spec.name}': torch.export knows no TYPE_STRING")
            if spec.datatype == "BYTES" and len(_model_shape(spec)) != 1:
                raise ConfigError(
                    f"Triton only supports 1 dimensional List of String as {kind} for '{spec.name}' for model "
                    f"'{config.name}'"
                )


def _model_shape(spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape if spec.reshape is None else spec.reshape


def _load_exported(file: Path, device: torch.device, config: ModelConfig) -> _Loaded:
    check_archive(file)
    program = torch.export.load(file)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    arguments = list(program.graph_signature.user_inputs)
    guards = exported.guards(program)
    names = _by_position(list(config.inputs), arguments, file)
    if guards is not None and not config.variable and (config.policy.lengths or not config.ragged):
        _try_shapes(guards, [config.inputs[name] for name in names], device, config, file)
        guards = None
    return _Loaded(exported.function(program, config, _threads(config).most), arguments, guards=guards)


def _try_shapes(
    guards: Callable[..., Any], specs: Sequence[TensorSpec], device: torch.device, config: ModelConfig, file: Path
) -> None:
    """Guards cost 0.1 ms a batch. Where rows alone vary, or lengths of a grid do, they need not see each.

    The fewest and the most rows that a batch can have, and every length, pass them here, once; the engine lets nothing
    else through to the model.

    Raises:
        ConfigError: the model does not take them.
    """
    most, axes = config.max_batch_size, config.ragged
    for length in config.policy.lengths or (1,):
        for rows in sorted({1, most}) if most else (0,):
            shapes = []
            for spec in specs:
                shape = [rows, *_model_shape(spec)[1:]] if most else list(_model_shape(spec))
                if spec.name in axes:
                    shape[axes[spec.name]] = length
                shapes.append(shape)
            # One element in every place: guards look at shapes.
            dots = [torch.zeros(1, dtype=_torch_dtype(DATATYPES[spec.datatype]), device=device) for spec in specs]
            try:
                guards(*(dot.expand(shape) for dot, shape in zip(dots, shapes, strict=True)))
            except AssertionError as error:
                raise ConfigError(
                    f"{file}: the model does not take inputs of shape {shapes}, as its config says with max_batch_size "
                    f"{most}: {str(error).splitlines()[0]}; export it with dynamic_shapes for dimension 0, from 1 to "
                    "max_batch_size"
                ) from None


def _load_torchscript(file: Path, device: torch.device, config: ModelConfig) -> _Loaded:
    with warnings.catch_warnings():
        # torch 2.13 deprecates TorchScript; people have such files, and keep their server to run them.
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(str(file), map_location=device).eval()
        arguments = module.forward.schema.arguments[1:]
    if len(arguments) == 1 and arguments[0].type.kind() == "DictType":
        return _Loaded(module, [], takes_dict=True)
    return _Loaded(module, [argument.name for argument in arguments])


def _by_position(names: list[str], arguments: Sequence[str] | None, file: Path) -> list[str]:
    """The config's tensor names in the order in which the module takes or gives them.

    Args:
        arguments: the module's, of its inputs. None for its outputs: some may be left out, and "" is in their place.
    """
    if arguments and len(arguments) != len(names):
        raise ConfigError(f"{file}: the model takes {list(arguments)}, but its config lists the inputs {names}")
    if arguments is not None and set(names) == set(arguments):
        return list(arguments)
    indices = [name.rpartition("__")[2] if "__" in name else "" for name in names]
    if not all(index.isdecimal() for index in indices):
        return names
    by_index = dict(zip(map(int, indices), names, strict=True))
    if len(by_index) < len(names):
        raise ConfigError(f"{file}: the config's names {names} must each end in another number")
    missing = [index for index in range(len(names)) if index not in by_index]
    if missing and arguments is not None:
        raise ConfigError(f"{file}: the config's names {names} lack one that ends in __{missing[0]}")
    if max(by_index) >= MOST_OUTPUTS:
        raise ConfigError(f"{file}: the config's names {names} must end in a number below {MOST_OUTPUTS}")
    return [by_index.get(index, "") for index in range(max(by_index) + 1)]


def _to_argument(name: str, array: Array) -> torch.Tensor | list[str]:
    if not array.dtype.hasobject:
        return _to_tensor(array)
    try:
        return [element.decode() for element in array]
    except UnicodeDecodeError:
        raise InvalidInput(f"input '{name}' is a text of the model: its elements must be UTF-8") from None


def _to_output(value: Any, to_host: Callable[[torch.Tensor], Array]) -> Array:
    return np.array([text.encode() for text in value], object) if _is_text(value) else to_host(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(element, str) for element in value)


def _to_tensor(array: Array) -> torch.Tensor:
    """The same memory as a tensor."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_array(tensor: torch.Tensor) -> Array:
    """The same memory as an array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def _to_numpy(tensor: torch.Tensor) -> Array:
    # A copy: the module may answer with a buffer of its own, and write the next batch into it.
    return np.array(_to_array(tensor), order="C")


def _to_pinned(tensor: torch.Tensor) -> Array:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return _to_array(host.copy_(tensor, non_blocking=True))


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return _to_tensor(np.empty(0, dtype)).dtype
