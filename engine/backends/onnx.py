"""ONNX models (model.onnx), run by ONNX Runtime on the CPU, on one CUDA device, or by an accelerator the config names.

The file is opened by its path, so weights that it keeps in other files beside it are found; ONNX Runtime lets them lie
nowhere else. Nothing in an ONNX file is code of its own: operators are those of the installed build.

The package onnxruntime is an extra, and only imported when a model needs it. Which devices and accelerators there are
is decided by the build that is installed (onnxruntime, onnxruntime-gpu, onnxruntime-openvino, ...).
"""

import ctypes
import importlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from batching.errors import OutOfMemory

from ..config import ModelConfig
from ..errors import ConfigError, DeviceLost, InvalidInput
from ..types import DATATYPES, Array, TensorSpec
from . import autofill

# ONNX Runtime's name of a type -> datatype.
TYPES = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
    "tensor(string)": "BYTES", "tensor(bfloat16)": "BF16",
}  # fmt: skip
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16

# Parameter, whose text the config has checked -> attribute of SessionOptions, how the text is read.
_PARAMETERS: dict[str, tuple[str, Callable[[str], int]]] = {
    "intra_op_thread_count": ("intra_op_num_threads", int),
    "inter_op_thread_count": ("inter_op_num_threads", int),
    "enable_mem_arena": ("enable_cpu_mem_arena", "1".__eq__),
    "enable_mem_pattern": ("enable_mem_pattern", "1".__eq__),
}
# optimization.graph.level -> GraphOptimizationLevel
_LEVELS = {-1: "ORT_ENABLE_BASIC", 0: "ORT_ENABLE_ALL", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}

# Where a config lists accelerators, and what it calls them -> ONNX Runtime's execution provider.
_ACCELERATORS = {
    "gpu_execution_accelerator": {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider"},
    "cpu_execution_accelerator": {"openvino": "OpenVINOExecutionProvider"},
}
# Triton's parameters of the TensorRT accelerator -> the provider's options; others are passed on as they are.
_TENSORRT = {
    ("precision_mode", "FP16"): ("trt_fp16_enable", "1"),
    ("precision_mode", "INT8"): ("trt_int8_enable", "1"),
    ("precision_mode", "FP32"): ("trt_fp16_enable", "0"),
}
_TENSORRT_NAMES = {"max_workspace_size_bytes": "trt_max_workspace_size"}

_ERROR = re.compile(r"\[ONNXRuntimeError\] : (\d+) : \w+ : (.*)", re.DOTALL)
_INVALID_ARGUMENT = 2
_MEMORY = re.compile(r"Failed to allocate memory[^\n]*|CUDA failure 2:[^\n]*|CUBLAS_STATUS_ALLOC_FAILED|bad_alloc")
# Errors of CUDA after which nothing runs in this process any more.
_LOST = re.compile(r"CUDA failure (?:46|700|702|709|710|714|715|716|717|718|719|720|999):[^\n]*")


class OnnxBackend:
    """One loaded model version.

    Attributes:
        device: "cpu" or "cuda:N".
    """

    def __init__(self, config: ModelConfig, file: Path) -> None:
        """Load `file`, or the model.onnx in it if it is a folder, onto the device that the config names.

        Raises:
            ConfigError: ONNX Runtime or a part of it is not installed, the file is no model, or the config says
                something else than the model.
        """
        runtime = _onnxruntime()
        self._runtime = runtime
        self.device = choose_device(config, runtime.get_available_providers())
        providers = _providers(config, self.device, runtime.get_available_providers())
        self._session = _load(runtime, file, _options(runtime, config), providers)
        missing = {name for name, _ in providers} - set(self._session.get_providers())
        if config.device == "auto" and "CUDAExecutionProvider" in missing:  # a build for GPUs, and no GPU
            self.device = "cpu"
        elif missing:
            raise ConfigError(f"model '{config.name}': ONNX Runtime could not start {', '.join(sorted(missing))}")
        self._run_options = _run_options(runtime, config)
        given = {node.name: node for node in self._session.get_inputs()}
        yielded = {node.name: node for node in self._session.get_outputs()}
        _check_inputs(config, given)
        _check_outputs(config, yielded)
        self._outputs = list(config.outputs)
        # A tensor without dimensions: a config has no such thing, and says [ 1 ].
        self._scalars = {name for name, node in given.items() if not node.shape}
        self._texts = {name for name, spec in config.inputs.items() if spec.datatype == "BYTES"}
        specs = (*config.inputs.values(), *config.outputs.values())
        self._bf16 = any(spec.datatype == "BF16" for spec in specs)
        if self._bf16 and self.device != "cpu":
            raise ConfigError(
                f"model '{config.name}': BF16 inputs and outputs of ONNX models are served on the CPU only"
            )

    def enter(self, inline: bool) -> None:
        pass  # its threads are the session's own

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.empty(shape, dtype)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feed = {name: self._given(name, array) for name, array in inputs.items()}
        try:
            outputs = (self._run_values if self._bf16 else self._run_arrays)(feed)
        except Exception as error:
            explained = _explained(str(error), self.device)
            if explained is None:
                raise
            raise explained from error
        return {name: self._yielded(name, array) for name, array in zip(self._outputs, outputs, strict=True)}

    def close(self) -> None:
        del self._session

    def _run_arrays(self, feed: dict[str, Array]) -> list[Array]:
        outputs: list[Array] = self._session.run(self._outputs, feed, self._run_options)
        return outputs

    def _run_values(self, feed: dict[str, Array]) -> list[Array]:
        """The same for BF16, which ONNX Runtime knows and its Python arrays do not."""
        values = {name: _to_value(self._runtime, array) for name, array in feed.items()}
        return [
            _from_value(value) for value in self._session.run_with_ort_values(self._outputs, values, self._run_options)
        ]

    def _given(self, name: str, array: Array) -> Array:
        if name in self._texts:
            array = _decoded(name, array)
        return array.reshape(()) if name in self._scalars else array

    def _yielded(self, name: str, array: Any) -> Array:
        array = np.asarray(array)
        if array.dtype.kind in "OU":
            array = _encoded(array)
        return np.ascontiguousarray(array)  # at least one dimension: a scalar is a tensor of [ 1 ]


def complete(message: Any, file: Path) -> None:
    """Fill in what the config leaves out, from the graph: inputs, outputs, max_batch_size, dynamic_batching.

    Args:
        message: a protobuf ModelConfig, changed in place.

    Raises:
        ConfigError: the file cannot be read, or the graph does not batch and the config says that it does.
    """
    if autofill.is_complete(message):
        return
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = _load(runtime, file, options, [("CPUExecutionProvider", {})])
    inputs = [_spec(message.name, node) for node in session.get_inputs()]
    outputs = [_spec(message.name, node) for node in session.get_outputs()]
    batches = all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs))
    autofill.fill(message, inputs, outputs, batches)


def choose_device(config: ModelConfig, available: list[str]) -> str:
    """The device that the config asks for, as far as the build of ONNX Runtime knows: "cpu" or "cuda:N".

    Raises:
        ConfigError: it asks for a GPU, and the build knows none.
    """
    cuda = "CUDAExecutionProvider" in available
    if config.device == "auto":
        return "cuda:0" if cuda else "cpu"
    if config.device.startswith("cuda") and not cuda:
        raise ConfigError(
            f"model '{config.name}': instance_group asks for {config.device}, but the installed ONNX Runtime has no "
            f"CUDAExecutionProvider; it has {', '.join(available)}"
        )
    return config.device


def _onnxruntime() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        raise ConfigError("backend: onnxruntime needs the package onnxruntime: pip install onnxruntime") from None


def _load(runtime: ModuleType, file: Path, options: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
    path = file / "model.onnx" if file.is_dir() else file
    try:
        return runtime.InferenceSession(str(path), sess_options=options, providers=providers)
    except Exception as error:
        found = _ERROR.search(str(error))
        text = (found[2] if found else str(error)).strip().splitlines()[0]
        raise ConfigError(f"{path}: cannot be loaded: {text}") from error


def _options(runtime: ModuleType, config: ModelConfig) -> Any:
    """A session's options: the config's, and one thread less than there are cores, for the event loop's sake."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, and logged by who catches it
    options.intra_op_num_threads = max(1, (os.cpu_count() or 1) - 1)
    for key, (attribute, read) in _PARAMETERS.items():
        if key in config.parameters:
            setattr(options, attribute, read(config.parameters[key]))
    if config.parameters.get("execution_mode") == "1":
        options.execution_mode = runtime.ExecutionMode.ORT_PARALLEL
    for key, value in config.parameters.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    level = config.document.get("optimization", {}).get("graph", {}).get("level", 0)
    if level not in _LEVELS:
        raise ConfigError(
            f"model '{config.name}': optimization.graph.level: must be one of {list(_LEVELS)}, got {level}"
        )
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _LEVELS[level])
    return options


def _run_options(runtime: ModuleType, config: ModelConfig) -> Any:
    options = runtime.RunOptions()
    options.log_severity_level = 4
    key = "memory.enable_memory_arena_shrinkage"
    if key in config.parameters:
        options.add_run_config_entry(key, config.parameters[key])
    return options


def _providers(config: ModelConfig, device: str, available: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Execution providers and their options, the preferred one first; the CPU's is always the last."""
    wanted: dict[str, dict[str, str]] = {}
    accelerators = config.document.get("optimization", {}).get("execution_accelerators", {})
    for field, known in _ACCELERATORS.items():
        for accelerator in accelerators.get(field, []):
            name = accelerator["name"]
            if name not in known:
                raise ConfigError(f"model '{config.name}': unknown Execution Accelerator '{name}' is requested")
            provider = known[name]
            if provider not in available:
                raise ConfigError(
                    f"model '{config.name}': optimization.execution_accelerators.{field}: the installed ONNX Runtime "
                    f"has no {provider} for '{name}'; it has {', '.join(available)}"
                )
            if field.startswith("cpu") or device != "cpu":
                wanted[provider] = _accelerator_options(accelerator.get("parameters", {}))
    if device != "cpu":
        number = device.partition(":")[2] or "0"
        wanted["CUDAExecutionProvider"] = wanted.get("CUDAExecutionProvider", {})
        for provider in _ACCELERATORS["gpu_execution_accelerator"].values():
            if provider in wanted:
                wanted[provider]["device_id"] = number
    wanted["CPUExecutionProvider"] = {}
    return list(wanted.items())


def _accelerator_options(parameters: Mapping[str, str]) -> dict[str, str]:
    return dict(_TENSORRT.get(pair, (_TENSORRT_NAMES.get(pair[0], pair[0]), pair[1])) for pair in parameters.items())


def _spec(model: str, node: Any) -> TensorSpec:
    """Of a graph's input or output; a symbolic dimension is -1."""
    if node.type not in TYPES:
        raise ConfigError(f"model '{model}': Unsupported ONNX Type '{node.type}' for I/O '{node.name}'")
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    return TensorSpec(node.name, TYPES[node.type], shape)


def _check_inputs(config: ModelConfig, given: Mapping[str, Any]) -> None:
    """Refuse, with Triton's words (onnxruntime.cc, ValidateInputs), a config that is not the graph's."""
    if len(config.inputs) != len(given):
        raise ConfigError(
            f"unable to load model '{config.name}', configuration expects {len(config.inputs)} inputs, model provides "
            f"{len(given)}"
        )
    for spec in config.inputs.values():
        _check_tensor(config, "input", spec, given)


def _check_outputs(config: ModelConfig, yielded: Mapping[str, Any]) -> None:
    for spec in config.outputs.values():
        _check_tensor(config, "output", spec, yielded)


def _check_tensor(config: ModelConfig, field: str, spec: TensorSpec, nodes: Mapping[str, Any]) -> None:
    if spec.name not in nodes:
        raise ConfigError(
            f"unexpected inference {field} '{spec.name}', allowed {field}s are: {', '.join(sorted(nodes))}"
        )
    provided = _spec(config.name, nodes[spec.name])
    if provided.datatype != spec.datatype:
        raise ConfigError(
            f"unable to load model '{config.name}', configuration expects datatype "
            f"TYPE_{spec.datatype.replace('BYTES', 'STRING')} for {field} '{spec.name}', model provides "
            f"TYPE_{provided.datatype}"
        )
    _check_dims(config, spec, provided.shape)


def _check_dims(config: ModelConfig, spec: TensorSpec, model: tuple[int, ...]) -> None:
    full = spec.shape if spec.reshape is None else spec.reshape
    tensor = f"model '{config.name}', tensor '{spec.name}': "
    if not model and not config.max_batch_size:
        if any(dim != 1 for dim in full):
            raise ConfigError(
                f"unable to load model '{config.name}', scalar tensor '{spec.name}', should only provide 1 in the "
                "model configuration when the model doesn't support batching. Model configuration provided: "
                f"{_shape(full)}."
            )
        return
    if config.max_batch_size and model[:1] != (-1,):
        raise ConfigError(
            f"{tensor}for the model to support batching the shape should have at least 1 dimension and the first "
            f"dimension must be -1; but shape expected by the model is {_shape(model)}"
        )
    if len(model) != len(full):
        explained = (
            "an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, making "
            f"complete shape {_shape(full)}"
            if config.max_batch_size
            else f"shape {_shape(full)}"
        )
        raise ConfigError(
            f"{tensor}the model expects {len(model)} dimensions (shape {_shape(model)}) but the model configuration "
            f"specifies {len(full)} dimensions ({explained})"
        )
    if any(dim not in (-1, want) for dim, want in zip(model, full, strict=True)):
        skip = 1 if config.max_batch_size else 0  # what a config says goes without the batch dimension
        raise ConfigError(
            f"{tensor}the model expects dims {_shape(model[skip:])} but the model configuration specifies dims "
            f"{_shape(full[skip:])}"
        )


def _shape(dims: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, dims))}]"


def _decoded(name: str, array: Array) -> Array:
    """ONNX's strings are texts: `bytes` elements as `str` ones. Raises InvalidInput if they are no UTF-8."""
    try:
        texts = [element.decode() for element in array.flat]
    except UnicodeDecodeError:
        raise InvalidInput(f"input '{name}' is a text of the model: its elements must be UTF-8") from None
    return np.array(texts, object).reshape(array.shape)


def _encoded(array: Array) -> Array:
    return np.array([element.encode() for element in array.flat], object).reshape(array.shape)


def _to_value(runtime: ModuleType, array: Array) -> Any:
    make: Callable[..., Any] = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
    if array.dtype == DATATYPES["BF16"]:
        return make(array.view(np.uint16), _ONNX_BFLOAT16)
    return runtime.OrtValue.ortvalue_from_numpy(array)


def _from_value(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    array = np.empty(value.shape(), DATATYPES["BF16"])
    ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array


def _explained(text: str, device: str) -> Exception | None:
    """What a text of ONNX Runtime's errors means; None if it is not one."""
    if memory := _MEMORY.search(text):
        return OutOfMemory(memory[0])
    if lost := _LOST.search(text):
        return DeviceLost(f"{device} is lost: {lost[0]}")
    if (found := _ERROR.search(text)) is None:
        return None
    reason = " ".join(found[2].split())
    return InvalidInput(reason) if int(found[1]) == _INVALID_ARGUMENT else RuntimeError(reason)
