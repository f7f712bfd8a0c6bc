"""What a Triton model.py imports as `triton_python_backend_utils`, or pb_utils (PROTOCOL.md sections 7.3 to 7.9).

Names, arguments, constants and texts are Triton's, so that a model.py runs as it is. What a model may not do raises
TritonModelException, or ValueError in `auto_complete_config`. What is Millrace's own here: ModelHost, the instance that
stands behind the calls of its model, and ReceivedRequest.

Every instance sees this one module. Whose call it is, is told by whose code is on the stack (python_module.caller).
"""

import asyncio
import enum
import json
import logging
import queue
import struct
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import numpy as np

from batching.errors import DeadlineExceeded, QueueFull

from .. import custom_metrics
from ..errors import (
    Cancelled,
    EngineError,
    InvalidInput,
    ModelError,
    NotFound,
    NotReady,
    RequestError,
    Unimplemented,
)
from ..types import DATATYPES, Array, Call, Engine, InferRequest, InferResponse, Parameter
from .python_module import caller

T = TypeVar("T")

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_RELEASE_ALL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2


class TritonModelException(Exception):
    """The module was used in a way that it does not allow; a model may raise it to fail a batch."""


# Datatypes

# Triton's number of each datatype.
_NUMBERS = {
    name: number
    for number, name in enumerate(
        "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 BYTES BF16".split(), 1
    )
}
_DATATYPE_OF = {dtype: name for name, dtype in DATATYPES.items()}
_NUMPY_TYPES: dict[int, type[Any]] = {_NUMBERS[name]: dtype.type for name, dtype in DATATYPES.items() if name != "BF16"}
TRITON_STRING_TO_NUMPY: dict[str, type[Any]] = {
    f"TYPE_{name.replace('BYTES', 'STRING')}": bool if name == "BOOL" else dtype.type
    for name, dtype in DATATYPES.items()
    if name != "BF16"
}


def triton_string_to_numpy(triton_type_string: str) -> type[Any]:
    """ "TYPE_FP32" -> numpy.float32. Raises KeyError for what has no numpy type."""
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def triton_to_numpy_type(data_type: int) -> type[Any] | None:
    """Triton's number of a datatype -> numpy type, or None."""
    return _NUMPY_TYPES.get(data_type)


def numpy_to_triton_type(data_type: Any) -> int | None:
    """A numpy type or dtype -> Triton's number of it, or None."""
    return _NUMBERS.get(_datatype(np.dtype(data_type)) or "")


def serialize_byte_tensor(input_tensor: Array) -> bytes | tuple[()] | None:
    """The elements of an array of bytes or of objects, each behind its length in 4 bytes; () if there are none.

    None for an array of numbers. What is not bytes goes as the UTF-8 of its str().
    """
    if input_tensor.size == 0:
        return ()
    if input_tensor.dtype.kind not in "OS":
        return None
    elements = _as_bytes(input_tensor).ravel()
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def deserialize_bytes_tensor(encoded_tensor: bytes) -> Array:
    """The bytes that serialize_byte_tensor gives -> flat array of bytes. Raises struct.error if they end early."""
    data, elements, offset = memoryview(encoded_tensor), [], 0
    while offset < len(data):
        (length,) = struct.unpack_from("<I", data, offset)
        offset += 4 + length
        if offset > len(data):
            raise struct.error(f"an element of {length} bytes ends behind the end of the data")
        elements.append(bytes(data[offset - length : offset]))
    return np.array(elements, dtype=np.object_)


def _datatype(dtype: np.dtype[Any]) -> str | None:
    return "BYTES" if dtype.kind in "OSU" else _DATATYPE_OF.get(dtype.newbyteorder("="))


def _as_bytes(array: Array) -> Array:
    """An array of objects, bytes or str -> a new one of bytes objects."""
    elements = (item if type(item) is bytes else str(item).encode() for item in array.ravel().tolist())
    return np.fromiter(elements, dtype=object, count=array.size).reshape(array.shape)


# The model's config


def get_input_tensor_by_name(inference_request: "InferenceRequest", name: str) -> "Tensor | None":
    """The request's input of that name, or None."""
    return next((tensor for tensor in inference_request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(inference_response: "InferenceResponse", name: str) -> "Tensor | None":
    """The response's output of that name, or None."""
    return next((tensor for tensor in inference_response.output_tensors() if tensor.name() == name), None)


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What `json.loads(args["model_config"])` says about an input, or None."""
    return next((entry for entry in model_config.get("input", ()) if entry["name"] == name), None)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What `json.loads(args["model_config"])` says about an output, or None."""
    return next((entry for entry in model_config.get("output", ()) if entry["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    """Whether a request to the model of this config may have any number of responses."""
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


class ModelConfig:
    """What `auto_complete_config` is given, and returns: the config, to be completed. What the file says stays."""

    def __init__(self, model_config: str) -> None:
        self._model_config: dict[str, Any] = json.loads(model_config)

    def as_dict(self) -> dict[str, Any]:
        """The config as JSON; `name`, `max_batch_size`, `input` and `output` are always there."""
        return self._model_config

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """Raises ValueError if the config says more."""
        given = self._model_config["max_batch_size"]
        if given > max_batch_size:
            raise ValueError(
                f"configuration specified max_batch_size {given}, but in {self._function} "
                f"specified max_batch_size {max_batch_size}"
            )
        self._model_config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        """Raises ValueError if the config has a scheduler of another kind."""
        for other in ("sequence_batching", "ensemble_scheduling"):
            if other in self._model_config:
                raise ValueError(
                    f"Configuration specified scheduling_choice as '{other}', but {self._function} "
                    "tries to set scheduling_choice as 'dynamic_batching'"
                )
        self._model_config.setdefault("dynamic_batching", {})

    def add_input(self, input: dict[str, Any]) -> None:
        """Add an input, `{"name", "data_type", "dims"}` and perhaps "optional", or complete it.

        Raises:
            ValueError: something is missing, or too much, or says otherwise than the config.
        """
        self._add("input", input, "'name', 'data_type', 'dims' and 'optional'", {"optional"})

    def add_output(self, output: dict[str, Any]) -> None:
        """Add an output, `{"name", "data_type", "dims"}`, or complete it. Raises ValueError like add_input."""
        self._add("output", output, "'name', 'data_type' and 'dims'", set())

    def set_model_transaction_policy(self, transaction_policy_dict: dict[str, Any]) -> None:
        """`{"decoupled": bool}`. Raises ValueError if the config says otherwise."""
        model = self._model_config["name"]
        if not transaction_policy_dict.keys() <= {"decoupled"}:
            raise ValueError(
                f"model transaction property in {self._function} contains property other than 'decoupled'."
            )
        policy = self._model_config.setdefault("model_transaction_policy", {})
        for key, value in transaction_policy_dict.items():
            if policy.setdefault(key, value) != value:
                raise ValueError(
                    f"trying to change decoupled property in auto-complete-config for model '{model}', which is "
                    f"already set to '{policy[key]}'."
                )

    @property
    def _function(self) -> str:
        return f"auto-complete-config function for model '{self._model_config['name']}'"

    def _add(self, field: str, tensor: dict[str, Any], known: str, optional: set[str]) -> None:
        name, model, needed = tensor.get("name"), self._model_config["name"], ("name", "data_type", "dims")
        if not tensor.keys() <= {*needed, *optional}:
            raise ValueError(f"{field} '{name}' in {self._function} contains property other than {known}.")
        for key in needed:
            if key not in tensor:
                named = "" if key == "name" else f" '{name}'"
                raise ValueError(f"{field}{named} in {self._function} is missing '{key}' property.")
        given = next((entry for entry in self._model_config[field] if entry["name"] == name), None)
        if given is None:
            self._model_config[field].append(tensor)
            return
        if given["data_type"] not in ("TYPE_INVALID", tensor["data_type"]):
            raise ValueError(
                f"unable to load model '{model}', configuration expects datatype {given['data_type']} for {field} "
                f"'{name}', model provides {tensor['data_type']}"
            )
        for key in ("dims", *optional):
            if given.get(key, []) not in ([], tensor.get(key, given.get(key))):
                raise ValueError(
                    f"model '{model}', tensor '{name}': the model expects {key} {tensor[key]} "
                    f"but the model configuration specifies {key} {given[key]}"
                )
        given.update(tensor)


# Tensors

_CPU_DEVICES = (1, 3)  # DLPack's: main memory, and main memory that is pinned


class Tensor:
    """A named tensor, in main memory or, from DLPack, on a device.

    What a model is given it may write to: it is copied when the model first asks for it.
    """

    def __init__(self, name: str, numpy_array: Array) -> None:
        """Raises TritonModelException if the name is empty or no datatype is like the array's."""
        if not isinstance(numpy_array, np.ndarray):
            raise TypeError(f"numpy_array must be a numpy.ndarray, found type '{type(numpy_array)}'")
        datatype = _datatype(numpy_array.dtype)
        if datatype is None:
            raise TritonModelException("NumPy dtype is not supported.")
        self._set(name, datatype, array=np.asarray(numpy_array, order="C"))

    def _set(
        self, name: str, datatype: str, array: Array | None = None, received: Array | None = None, on_device: Any = None
    ) -> None:
        if name == "":
            raise TritonModelException("Tensor name cannot be an empty string.")
        self._name, self._datatype = name, datatype
        self._array = array  # what the model has, or may have, in its hands
        self._received = received  # the engine's, which the model never sees
        self._on_device = on_device  # a torch.Tensor

    @classmethod
    def received(cls, name: str, array: Array) -> Self:
        """A tensor of the engine's, for the model. `array` is one of DATATYPES."""
        tensor = cls.__new__(cls)
        tensor._set(name, _DATATYPE_OF[array.dtype], received=array)
        return tensor

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> "Tensor":
        """A tensor of another library, without a copy: a DLPack capsule, or an object that gives one.

        Raises:
            TritonModelException: it is none, is not contiguous in C order, or has a dtype that is none of DATATYPES.
        """
        if type(tensor).__name__ == "PyCapsule":
            tensor = _Capsule(tensor)
        elif not (hasattr(tensor, "__dlpack__") and hasattr(tensor, "__dlpack_device__")):
            raise TritonModelException(
                "Provided tensor is not supported. Tensor must be a DLPack capsule or have `__dlpack__` and "
                "`__dlpack_device__` attributes"
            )
        array, on_device = _open_dlpack(tensor)
        if not (array.flags.c_contiguous if on_device is None else on_device.is_contiguous()):
            raise TritonModelException(
                "DLPack tensor is not contiguous. Only contiguous DLPack tensors that are stored in C-Order are "
                "supported."
            )
        datatype = _DATATYPE_OF.get(array.dtype)
        if datatype is None:
            raise TritonModelException(f"DType {array.dtype} is not supported.")
        made = Tensor.__new__(Tensor)
        made._set(name, datatype, array if on_device is None else None, on_device=on_device)
        return made

    def name(self) -> str:
        return self._name

    def triton_dtype(self) -> int:
        """Triton's number of the datatype."""
        return _NUMBERS[self._datatype]

    def shape(self) -> list[int]:
        if self._on_device is not None:
            return list(self._on_device.shape)
        return list(self._host().shape)

    def is_cpu(self) -> bool:
        return self._on_device is None

    def as_numpy(self) -> Array:
        """The array, of bytes objects where the datatype is BYTES and the tensor was received.

        Raises:
            TritonModelException: it is on a device, or has no numpy form: DLPack gives it.
        """
        if self._on_device is not None:
            raise TritonModelException("Tensor is stored in GPU and cannot be converted to NumPy.")
        if self._datatype == "BF16":
            raise TritonModelException(
                "Tensor dtype is BF16 and cannot be converted to NumPy. Use to_dlpack() and from_dlpack() instead."
            )
        return self._handed()

    def to_dlpack(self) -> Any:
        """A DLPack capsule of the same memory."""
        return self.__dlpack__()

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        if self._datatype == "BYTES":
            raise TritonModelException("DLPack does not have support for string tensors.")
        if self._on_device is not None:
            return self._on_device.__dlpack__(stream=stream)
        array = self._handed()
        if not array.flags.writeable:  # DLPack cannot say so
            array = self._array = array.copy()
        if self._datatype == "BF16":
            import torch

            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).__dlpack__()
        return array.__dlpack__(stream=stream, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU_DEVICES[0], 0) if self._on_device is None else self._on_device.__dlpack_device__()

    def detached(self) -> Array:
        """The array as the engine wants it, of one of DATATYPES, and nothing that the model may write to later."""
        if self._on_device is not None:
            return _numpy(self._on_device.detach().cpu())
        if self._array is None:
            return self._host()
        if self._datatype == "BYTES":
            return _as_bytes(self._array)
        return np.array(self._array, DATATYPES[self._datatype], order="C")

    def _handed(self) -> Array:
        if self._array is None:
            self._array = self._host().copy()
        return self._array

    def _host(self) -> Array:
        array = self._received if self._array is None else self._array
        assert array is not None
        return array


class _Capsule:
    """A bare DLPack capsule as an object that gives it: only whoever opens it learns where its memory is."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU_DEVICES[0], 0


def _open_dlpack(tensor: Any) -> tuple[Array, Any]:
    """What is in main memory as an array; else an empty array of the same dtype, and a torch tensor on the device."""
    # With torch, where it is there: numpy lets nobody write to what it reads.
    if "torch" not in sys.modules or isinstance(tensor, np.ndarray):
        try:
            if tensor.__dlpack_device__()[0] in _CPU_DEVICES:
                return np.from_dlpack(tensor), None
        except (BufferError, RuntimeError):  # bfloat16, or a capsule from a device: numpy has neither
            pass
    import torch

    opened: Any = torch.utils.dlpack.from_dlpack(tensor.capsule if isinstance(tensor, _Capsule) else tensor)
    if opened.device.type == "cpu":
        return _numpy(opened), None
    return _numpy(opened.new_empty(0, device="cpu")), opened


def _numpy(tensor: Any) -> Array:
    """A torch tensor on the CPU -> an array of the same memory."""
    import torch

    if tensor.dtype is torch.bfloat16:
        return cast(Array, tensor.view(torch.int16).numpy().view(DATATYPES["BF16"]))
    return cast(Array, tensor.numpy())


# Errors


class TritonErrorCode(enum.IntEnum):
    """Whose fault an error is, in Triton's numbers."""

    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7

    __str__ = enum.Enum.__str__  # with its name


# What a model's error is to the caller.
_ERRORS: dict[TritonErrorCode, type[EngineError]] = {
    TritonErrorCode.UNKNOWN: InvalidInput,
    TritonErrorCode.INTERNAL: ModelError,
    TritonErrorCode.NOT_FOUND: NotFound,
    TritonErrorCode.INVALID_ARG: InvalidInput,
    TritonErrorCode.UNAVAILABLE: NotReady,
    TritonErrorCode.UNSUPPORTED: Unimplemented,
    TritonErrorCode.ALREADY_EXISTS: InvalidInput,
    TritonErrorCode.CANCELLED: Cancelled,
}

# What an error of the engine is to a model that called another; the first that fits. A request that did not get as far
# as the other model is INTERNAL, as in Triton.
_CODES: tuple[tuple[type[Exception], TritonErrorCode], ...] = (
    (Cancelled, TritonErrorCode.CANCELLED),
    (NotReady, TritonErrorCode.UNAVAILABLE),
    (QueueFull, TritonErrorCode.UNAVAILABLE),
    (DeadlineExceeded, TritonErrorCode.UNAVAILABLE),
    (Exception, TritonErrorCode.INTERNAL),
)


class TritonError:
    """The error of one response; its text goes to the client as it is."""

    UNKNOWN: ClassVar = TritonErrorCode.UNKNOWN
    INTERNAL: ClassVar = TritonErrorCode.INTERNAL
    NOT_FOUND: ClassVar = TritonErrorCode.NOT_FOUND
    INVALID_ARG: ClassVar = TritonErrorCode.INVALID_ARG
    UNAVAILABLE: ClassVar = TritonErrorCode.UNAVAILABLE
    UNSUPPORTED: ClassVar = TritonErrorCode.UNSUPPORTED
    ALREADY_EXISTS: ClassVar = TritonErrorCode.ALREADY_EXISTS
    CANCELLED: ClassVar = TritonErrorCode.CANCELLED

    def __init__(self, message: str, code: TritonErrorCode = TritonErrorCode.INTERNAL) -> None:
        self._message, self._code = message, TritonErrorCode(code)

    def message(self) -> str:
        return self._message

    def code(self) -> TritonErrorCode:
        return self._code

    def to_engine(self) -> EngineError:
        """What the caller gets; `from_engine` gives a model that called this error's very code and text."""
        error = _ERRORS[self._code](self._message)
        vars(error)["triton_error"] = self
        return error

    @classmethod
    def from_engine(cls, error: Exception, model: str) -> "TritonError":
        """How a call of `model` failed, for the model that called."""
        said = vars(error).get("triton_error")
        if isinstance(said, TritonError):
            return said
        refused = f"Model {model} - Error when running inference: " if isinstance(error, RequestError) else ""
        return cls(f"{refused}{error}", next(code for kind, code in _CODES if isinstance(error, kind)))


# Requests and responses


class MemoryType(enum.IntEnum):
    """Where a model wants the outputs of a model that it calls."""

    TRITONSERVER_MEMORY_GPU = 0
    TRITONSERVER_MEMORY_CPU = 1


TRITONSERVER_MEMORY_GPU = MemoryType.TRITONSERVER_MEMORY_GPU
TRITONSERVER_MEMORY_CPU = MemoryType.TRITONSERVER_MEMORY_CPU


class PreferredMemory:
    """A wish. Outputs are in main memory here."""

    def __init__(self, preferred_memory_type: MemoryType, preferred_device_id: int = 0) -> None:
        self.preferred_memory_type, self.preferred_device_id = preferred_memory_type, preferred_device_id


class InferenceTrace:
    """A request's trace. There is none here."""

    def get_context(self) -> str:
        return ""


class InferenceResponse:
    """An answer: outputs, or an error; a model makes it, or gets it from a model that it called."""

    def __init__(
        self,
        output_tensors: Iterable[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Parameter] | None = None,
    ) -> None:
        """Raises TritonModelException if a tensor or a parameter is none."""
        self._output_tensors = list(output_tensors)
        for tensor in self._output_tensors:
            if tensor is None:
                raise TritonModelException("Output tensor for inference response should not be empty.")
            _expect(tensor, Tensor, "output_tensors")
        if error is not None:
            _expect(error, TritonError, "error")
        self._error = error
        self._parameters = _parameters(parameters)

    @classmethod
    def received(cls, response: InferResponse) -> Self:
        """The engine's response, for the model that asked for it."""
        made = cls([Tensor.received(name, array) for name, array in response.outputs.items()])
        made._parameters = dict(response.parameters)
        return made

    def output_tensors(self) -> list[Tensor]:
        return self._output_tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        """A JSON object."""
        return _json(self._parameters)

    def to_engine(self, model: str, version: str, wanted: Sequence[str] | None) -> InferResponse | EngineError:
        """What the caller gets: of the outputs, those that it wants."""
        if self._error is not None:
            return self._error.to_engine()
        outputs = {
            tensor.name(): tensor.detached()
            for tensor in self._output_tensors
            if wanted is None or tensor.name() in wanted
        }
        return InferResponse(model, version, outputs, dict(self._parameters))


class InferenceRequest:
    """A request that a model makes, to call another model; the one that it is given is a ReceivedRequest."""

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Sequence[Tensor] | None = None,
        requested_output_names: Iterable[str] | None = None,
        model_name: str | None = None,
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: Mapping[str, Parameter] | None = None,
    ) -> None:
        """A call of `model_name`; a version of -1 is the highest, `timeout` is in microseconds.

        Raises:
            TypeError: `inputs`, `requested_output_names` or `model_name` is missing.
            TritonModelException: an input, an output's name or a parameter is none.
        """
        if inputs is None or requested_output_names is None or model_name is None:
            raise TypeError("InferenceRequest() needs inputs, requested_output_names and model_name")
        if not isinstance(correlation_id, int | str):
            raise TritonModelException("Correlation ID must be integer or string")
        self._inputs, self._requested_output_names = list(inputs), set(requested_output_names)
        whose = f"for request with id '{request_id}' and model name '{model_name}' should not be empty."
        for tensor in self._inputs:
            if tensor is None:
                raise TritonModelException(f"Input tensor {whose}")
            _expect(tensor, Tensor, "inputs")
        if "" in self._requested_output_names:
            raise TritonModelException(f"Requested output name {whose}")
        self._model_name, self._model_version = model_name, model_version
        self._request_id, self._correlation_id = request_id, correlation_id
        self._flags, self._timeout = flags, timeout
        self._preferred_memory = preferred_memory or PreferredMemory(TRITONSERVER_MEMORY_CPU)
        self._trace = trace or InferenceTrace()
        self._parameters = _parameters(parameters)
        # Asked here already: `exec` may be handed to a thread on whose stack nothing of the model is.
        self._host = _host()

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._request_id

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def requested_output_names(self) -> set[str]:
        return self._requested_output_names

    def flags(self) -> int:
        """TRITONSERVER_REQUEST_FLAG_SEQUENCE_START, _END."""
        return self._flags

    def set_flags(self, flags: int) -> None:
        self._flags = flags

    def timeout(self) -> int:
        """Microseconds; 0 if there is none."""
        return self._timeout

    def parameters(self) -> str:
        """A JSON object."""
        return _json(self._parameters)

    def preferred_memory(self) -> PreferredMemory:
        return self._preferred_memory

    def trace(self) -> InferenceTrace:
        return self._trace

    def is_cancelled(self) -> bool:
        return False

    def set_release_flags(self, flags: int) -> None:
        """Raises TritonModelException for anything but TRITONSERVER_REQUEST_RELEASE_ALL."""
        if flags == TRITONSERVER_REQUEST_RELEASE_RESCHEDULE:
            raise TritonModelException(
                "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE is not served: it is for iterative sequences only"
            )
        if flags != TRITONSERVER_REQUEST_RELEASE_ALL:
            raise TritonModelException(f"Unsupported release flags {flags}.")

    def get_response_sender(self) -> "InferenceResponseSender":
        raise TritonModelException("a request that the model made itself has no response sender")

    def exec(self, decoupled: bool = False) -> "InferenceResponse | ResponseIterator":
        """Call the model and wait. Errors do not raise: the response has them.

        Args:
            decoupled: take any number of responses: gives an iterator of them.

        Raises:
            TritonModelException: not during `execute`, or on the server's own event loop, which would wait for itself.
        """
        host = _running(self._host or _host())
        if decoupled:
            return ResponseIterator(host, self._to_engine())
        return host.wait(host.infer(self._to_engine()))

    def async_exec(self, decoupled: bool = False) -> "asyncio.Future[Any]":
        """Like `exec`, to be awaited; the call is on its way at once."""
        host = _running(self._host or _host())
        if decoupled:
            started = asyncio.get_running_loop().create_future()
            started.set_result(ResponseIterator(host, self._to_engine()))
            return started
        return asyncio.wrap_future(host.submit(host.infer(self._to_engine())))

    def _to_engine(self) -> InferRequest:
        return InferRequest(
            self._model_name,
            "" if self._model_version == -1 else str(self._model_version),
            {tensor.name(): tensor.detached() for tensor in self._inputs},
            tuple(sorted(self._requested_output_names)) or None,
            id=self._request_id,
            timeout=self._timeout / 1e6,
            parameters=dict(self._parameters),
            correlation_id=self._correlation_id,
            flags=self._flags,
        )


class ReceivedRequest(InferenceRequest):
    """A request that the model is given.

    Attributes:
        taken: whether the model has asked for the response sender.
    """

    def __init__(self, call: Call, host: "ModelHost") -> None:
        request = call.request
        self._call, self._of = call, host
        self._host = host
        self._inputs = [Tensor.received(name, array) for name, array in request.inputs.items()]
        self._requested_output_names = set(host.outputs if request.outputs is None else request.outputs)
        self._model_name, self._model_version = request.model, int(host.version)
        self._request_id, self._correlation_id = request.id, request.correlation_id
        self._flags, self._timeout = request.flags, round(request.timeout * 1e6)
        self._preferred_memory = PreferredMemory(TRITONSERVER_MEMORY_CPU)
        self._trace = InferenceTrace()
        self._parameters = dict(request.parameters)
        self._sender: InferenceResponseSender | None = None

    @property
    def taken(self) -> bool:
        return self._sender is not None

    @property
    def wanted(self) -> Sequence[str] | None:
        """The outputs that the client wants; None for all."""
        return self._call.request.outputs

    def is_cancelled(self) -> bool:
        """Whether the client left."""
        return self._call.cancelled()

    def get_response_sender(self) -> "InferenceResponseSender":
        if self._sender is None:
            self._sender = InferenceResponseSender(self._call, self._of)
        return self._sender

    def end(self) -> bool:
        """Let the model send nothing more; whether its last response was still to come."""
        return self._sender is None or self._sender.end()

    def fail(self, error: Exception) -> None:
        """Answer with an error, if the last response was still to come."""
        if self.end():
            self._call.respond(error, True)


class InferenceResponseSender:
    """Sends the responses to one request, from any thread, also after `execute` returned.

    If the model lets go of it before the last response, the caller gets an error in its place.
    """

    def __init__(self, call: Call, host: "ModelHost") -> None:
        self._call, self._host = call, host
        self._lock = threading.Lock()
        self._sent = False
        self._closed = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Send a response, with TRITONSERVER_RESPONSE_COMPLETE_FINAL in `flags` if it is the last, or that alone.

        Raises:
            TritonModelException: the flags are none, nothing may follow, or a model that is not decoupled says more, or
                less, than one response.
        """
        if flags not in (0, TRITONSERVER_RESPONSE_COMPLETE_FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if response is None and not flags:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        if response is not None:
            _expect(response, InferenceResponse, "response")
        answer = None if response is None else self._host.answer(response, self._call.request.outputs)
        with self._lock:  # held while it is given on, for the order of two threads
            self._check(response)
            self._closed = self._closed or bool(flags)
            # One response is all that a model which is not decoupled has: nobody waits for it to say so.
            final = not self._host.decoupled or bool(flags)
            if self._host.decoupled or not self._sent:
                self._call.respond(answer, final)
            self._sent = True

    def is_cancelled(self) -> bool:
        """Whether the client left."""
        return self._call.cancelled()

    def end(self) -> bool:
        """Let nothing more through; whether the last response was still to come."""
        with self._lock:
            was_open = not (self._closed or (self._sent and not self._host.decoupled))
            self._closed = True
            return was_open

    def _check(self, response: InferenceResponse | None) -> None:
        if not self._host.decoupled and self._sent and response is not None:
            raise TritonModelException(
                "Unable to send response. Non-decoupled model cannot send more than one response."
            )
        if self._closed:
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        if not self._host.decoupled and not self._sent and response is None:
            raise TritonModelException(
                "Unable to send response. Non-decoupled model cannot send complete final before sending a response."
            )

    def __del__(self) -> None:
        if self.end():
            name = self._host.instance
            self._call.respond(ModelError(f"model '{name}' let go of a request without its last response"), True)


# Responses of a called model that come before the caller asks for them; the others wait where they are counted, and no
# more than MILLRACE_QUEUE_BYTES of them.
AHEAD = 16


class ResponseIterator:
    """The responses of a model that was called with `decoupled=True`, as they come; once over, it can be run again."""

    def __init__(self, host: "ModelHost", request: InferRequest) -> None:
        self._host = host
        self._queue: queue.SimpleQueue[InferenceResponse | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(AHEAD)  # of the engine's event loop
        self._responses: list[InferenceResponse] = []
        self._next = 0
        self._finished = False
        self._model = request.model
        self._task: Future[None] = host.submit(host.stream(request, self._queue.put, self._room))

    def __iter__(self) -> Self:
        if self._finished and self._next >= len(self._responses):
            self._next = 0
        return self

    def __next__(self) -> InferenceResponse:
        if not self._finished and self._next == len(self._responses):
            response = self._queue.get()
            self._host.soon(self._room.release)
            self._finished = response is None
            if response is None and self._task.cancelled():
                error = TritonError(f"the request to model '{self._model}' was cancelled", TritonError.CANCELLED)
                response = InferenceResponse(error=error)
            if response is not None:
                self._responses.append(response)
        if self._next == len(self._responses):
            raise StopIteration("Iteration is done for the responses.")
        self._next += 1
        return self._responses[self._next - 1]

    def cancel(self) -> None:
        """Take the request back: the last response is an error, CANCELLED, unless it is over already."""
        if self._task.cancel():
            self._queue.put(None)  # it may not even have begun

    def __del__(self) -> None:
        if "_task" in vars(self):  # else it could not be submitted
            self._task.cancel()


class ModelHost:
    """The instance that stands behind the calls of its model.

    Attributes:
        model, version, instance: their names.
        folder: the version's.
        outputs: names of all outputs.
        decoupled: whether a request may have any number of responses.
        running: between `initialize` and `finalize`.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        model: str,
        version: str,
        instance: str,
        folder: Path,
        outputs: tuple[str, ...],
        decoupled: bool,
    ) -> None:
        self._engine, self._loop = engine, loop
        self.model, self.version, self.instance, self.folder = model, version, instance, folder
        self.outputs, self.decoupled = outputs, decoupled
        self.running = False

    def answer(self, response: InferenceResponse, wanted: Sequence[str] | None) -> InferResponse | EngineError:
        """What the caller gets for what this model answers."""
        return response.to_engine(self.model, self.version, wanted)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run it on the engine's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def soon(self, callback: Callable[[], object]) -> None:
        """Call it on the engine's event loop, unless that is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it on the engine's event loop, and wait here. Raises TritonModelException if here is that loop."""
        try:
            is_ours = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_ours = False
        if is_ours:
            coroutine.close()
            raise TritonModelException("this call waits for the server's event loop, and was made on it")
        return self.submit(coroutine).result()

    async def infer(self, request: InferRequest) -> InferenceResponse:
        """The one response of another model."""
        try:
            self._check(request, decoupled=False)
            return InferenceResponse.received(await self._engine.infer(request))
        except Exception as error:  # whatever it is, it is the model's to see
            return InferenceResponse(error=TritonError.from_engine(error, request.model))

    async def stream(
        self, request: InferRequest, put: Callable[[InferenceResponse | None], None], room: asyncio.Semaphore
    ) -> None:
        """Put the responses of another model, as they come and there is `room` for them, and None at their end."""
        try:
            self._check(request, decoupled=True)
            async with aclosing(self._engine.stream(request)) as responses:
                async for response in responses:
                    await room.acquire()
                    put(InferenceResponse.received(response))
        except Exception as error:
            put(InferenceResponse(error=TritonError.from_engine(error, request.model)))
        finally:
            put(None)

    async def load(self, model: str, config: str | None, files: Mapping[str, bytes] | None) -> None:
        await self._engine.load(model, config, files)

    async def unload(self, model: str, dependents: bool) -> None:
        try:
            await self._engine.unload(model, dependents)
        except Exception as error:
            _log.error("Failed to unload model: %s", error)

    async def model_ready(self, model: str, version: str) -> bool:
        try:
            return await self._engine.model_ready(model, version)
        except (NotFound, NotReady):
            return False

    def _check(self, request: InferRequest, decoupled: bool) -> None:
        """Raises NotFound, Unimplemented, if the model does not take such a request."""
        model = request.model
        try:
            metadata = self._engine.metadata(model, request.version)
        except (NotFound, NotReady):
            raise NotFound(f"Failed for execute the inference request. Model '{model}' is not ready.") from None
        if metadata.decoupled and not decoupled:
            raise Unimplemented(
                f"Model {model} is using the decoupled. The current BLS request call doesn't support models using the "
                "decoupled transaction policy. Please use 'decoupled=True' argument to the 'exec' or 'async_exec' "
                "calls for decoupled models.'"
            )


def _host() -> ModelHost | None:
    """The instance whose code calls; None in `auto_complete_config`."""
    module = caller(only=True)
    return cast("ModelHost | None", module.owner) if module is not None else None


def _running(host: ModelHost | None) -> ModelHost:
    if host is None or not host.running:
        raise TritonModelException("BLS is only supported during the 'execute' function.")
    return host


def _hosted(function: str) -> ModelHost:
    host = _host()
    if host is None:
        raise TritonModelException(f"{function} was not called by a loaded model")
    return host


def _parameters(given: Mapping[str, Parameter] | None) -> dict[str, Parameter]:
    for name, value in (given or {}).items():
        if not isinstance(name, str):
            raise TritonModelException(f"Expect parameters keys to have type str, found type {type(name)}")
        if not isinstance(value, bool | int | str):
            raise TritonModelException(f"Expect parameters values to have type bool/int/str, found type {type(value)}")
    return dict(given or {})


def _json(parameters: Mapping[str, Parameter]) -> str:
    return json.dumps(parameters, separators=(",", ":"), ensure_ascii=False)


def _expect(value: object, kind: type[object], where: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{where}: expected {kind.__name__}, found type '{type(value)}'")


# The server


def get_model_dir() -> str:
    """The folder of the version whose model calls."""
    return str(_hosted("get_model_dir").folder)


def load_model(model_name: str, config: str = "", files: Mapping[str, bytes] | None = None) -> None:
    """Load a model, and wait for it.

    Args:
        config: its config as JSON, instead of the file in the repository.
        files: `file:<path in the model's folder>` -> content.

    Raises:
        TritonModelException: it cannot be loaded, or `files` is no dictionary.
    """
    if files is not None and not isinstance(files, dict):
        raise TritonModelException(
            f"failed to load model '{model_name}', files should be a dictionary of file paths and file contents"
        )
    paths = {path.removeprefix("file:"): content for path, content in (files or {}).items()}
    host = _hosted("load_model")
    try:
        host.wait(host.load(model_name, config or None, paths or None))
    except EngineError as error:
        failed = f"Failed to process the request for model '{host.instance}', message: {error}"
        raise TritonModelException(f"Failed to load model: {failed}") from None


def unload_model(model_name: str, unload_dependents: bool = False) -> None:
    """Unload a model, without waiting for it."""
    host = _hosted("unload_model")
    host.submit(host.unload(model_name, unload_dependents))


def is_model_ready(model_name: str, model_version: str = "") -> bool:
    """Whether a model can be called now."""
    host = _hosted("is_model_ready")
    return host.wait(host.model_ready(model_name, model_version))


_log = logging.getLogger("millrace.model")


class LogLevel(enum.IntEnum):
    """Of `Logger.log`; the value is what Python's logging calls it."""

    INFO = logging.INFO
    WARNING = logging.WARNING
    ERROR = logging.ERROR
    VERBOSE = logging.DEBUG


class Logger:
    """Writes to the server's log, as `millrace.model`."""

    INFO: ClassVar = LogLevel.INFO
    WARNING: ClassVar = LogLevel.WARNING
    ERROR: ClassVar = LogLevel.ERROR
    VERBOSE: ClassVar = LogLevel.VERBOSE

    @staticmethod
    def log(message: str, level: LogLevel = LogLevel.INFO) -> None:
        _log.log(level, "%s", message)

    @staticmethod
    def log_info(message: str) -> None:
        Logger.log(message, LogLevel.INFO)

    @staticmethod
    def log_warn(message: str) -> None:
        Logger.log(message, LogLevel.WARNING)

    @staticmethod
    def log_error(message: str) -> None:
        Logger.log(message, LogLevel.ERROR)

    @staticmethod
    def log_verbose(message: str) -> None:
        Logger.log(message, LogLevel.VERBOSE)


logger = Logger


class Metric(custom_metrics.Metric):
    """One value that the model counts; `MetricFamily.Metric` makes it."""


class MetricFamily(custom_metrics.MetricFamily):
    """Metrics of one name. Misuse raises TritonModelException."""

    error: ClassVar[type[Exception]] = TritonModelException
    metric: ClassVar[type[custom_metrics.Metric]] = Metric
