"""pb_utils by itself: tensors and their other forms, conversions, responses, and what is refused with which text."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from engine.backends import triton_python_backend_utils as pb_utils
from engine.errors import ModelError
from engine.types import DATATYPES, InferRequest, InferResponse

NUMPY = [name for name in DATATYPES if name not in ("BYTES", "BF16")]


def example(datatype: str) -> Any:
    """Two rows of a datatype."""
    values = [[b"a", b"\xff\0"], [b"", b"long"]] if datatype == "BYTES" else [[0, 1], [2, 3]]
    return np.array(values, DATATYPES[datatype])


# Datatypes


@pytest.mark.parametrize("datatype", [*NUMPY, "BYTES"])
def test_conversions_of_datatypes(datatype: str) -> None:
    """Between Triton's number, its name in a config, and numpy's type."""
    number = pb_utils.numpy_to_triton_type(DATATYPES[datatype].type)
    assert number == [*NUMPY, "BYTES"].index(datatype) + 1
    assert pb_utils.triton_to_numpy_type(number) is DATATYPES[datatype].type
    name = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    assert np.dtype(pb_utils.triton_string_to_numpy(name)) == DATATYPES[datatype]


def test_datatypes_without_numpy_type() -> None:
    """TYPE_BF16 and what nobody knows."""
    for name in ("TYPE_BF16", "FP32", "TYPE_INVALID"):
        with pytest.raises(KeyError):
            pb_utils.triton_string_to_numpy(name)
    assert pb_utils.triton_to_numpy_type(14) is None
    assert pb_utils.numpy_to_triton_type(np.complex64) is None
    assert pb_utils.numpy_to_triton_type(np.bytes_) == 13


@pytest.mark.parametrize(
    ("array", "blob"),
    [
        (example("BYTES"), b"\x01\0\0\0a\x02\0\0\0\xff\0\0\0\0\0\x04\0\0\0long"),
        (np.array(["é", 3], object), b"\x02\0\0\0\xc3\xa9\x01\0\0\x003"),
        (np.array([b"ab"]), b"\x02\0\0\0ab"),
        (np.array([], object), ()),
        (np.zeros(1), None),
    ],
)
def test_serialized_bytes(array: Any, blob: Any) -> None:
    """Each element behind its length; back it comes flat."""
    assert pb_utils.serialize_byte_tensor(array) == blob
    if blob:
        back = pb_utils.deserialize_bytes_tensor(blob)
        assert back.dtype == np.object_
        assert back.tolist() == [item if type(item) is bytes else str(item).encode() for item in array.ravel().tolist()]


@pytest.mark.parametrize("blob", [b"\x02\0\0\0a", b"\x02\0", b"\x01\0\0\0a\xff\xff\xff\xff"])
def test_bytes_that_end_early(blob: bytes) -> None:
    """A length that leads behind the end is an error."""
    with pytest.raises(Exception, match="unpack_from requires|ends behind the end"):
        pb_utils.deserialize_bytes_tensor(blob)


def test_tensors_of_a_config() -> None:
    """By name, or None; whether it is decoupled."""
    config = {"input": [{"name": "x"}], "output": [{"name": "y"}], "model_transaction_policy": {"decoupled": True}}
    assert pb_utils.get_input_config_by_name(config, "x") == {"name": "x"}
    assert pb_utils.get_output_config_by_name(config, "y") == {"name": "y"}
    assert pb_utils.get_input_config_by_name(config, "y") is None
    assert pb_utils.get_output_config_by_name({}, "y") is None
    assert pb_utils.using_decoupled_model_transaction_policy(config)
    assert not pb_utils.using_decoupled_model_transaction_policy({})


# Tensors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: pb_utils.Tensor("", np.zeros(1)), "Tensor name cannot be an empty string."),
        (lambda: pb_utils.Tensor("a", np.zeros(1, "c8")), "NumPy dtype is not supported."),
        (lambda: pb_utils.Tensor("a", np.zeros(1, "M8[s]")), "NumPy dtype is not supported."),
        (lambda: pb_utils.Tensor("a", cast(Any, [1])), "numpy_array must be a numpy.ndarray, found type '<class 'lis"),
        (lambda: pb_utils.Tensor.from_dlpack("", np.zeros(1)), "Tensor name cannot be an empty string."),
        (lambda: pb_utils.Tensor.from_dlpack("a", [1]), "Tensor must be a DLPack capsule or have"),
        (lambda: pb_utils.Tensor.from_dlpack("a", torch.zeros(2, 3).T), "DLPack tensor is not contiguous. Only"),
        (lambda: pb_utils.Tensor.from_dlpack("a", np.zeros(1, "c8")), "DType complex64 is not supported."),
        (lambda: pb_utils.Tensor("a", example("BYTES")).to_dlpack(), "DLPack does not have support for string"),
        (lambda: pb_utils.Tensor("a", example("BF16")).as_numpy(), "Tensor dtype is BF16 and cannot be converted to"),
    ],
)  # fmt: skip
def test_what_is_no_tensor(make: Any, text: str) -> None:
    """Triton's texts."""
    with pytest.raises((pb_utils.TritonModelException, TypeError)) as raised:
        make()
    assert text in str(raised.value)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_a_tensor_of_each_datatype(datatype: str) -> None:
    """Made by a model or received: name, shape, number, array; what leaves is of the datatype and contiguous."""
    array = example(datatype)
    for tensor in (pb_utils.Tensor("a", array.T), pb_utils.Tensor.received("a", array.T.copy())):
        assert (tensor.name(), tensor.shape(), tensor.is_cpu()) == ("a", [2, 2], True)
        assert tensor.triton_dtype() == list(DATATYPES).index(datatype) + 1
        if datatype != "BF16":
            np.testing.assert_array_equal(tensor.as_numpy(), array.T)
        left = tensor.detached()
        np.testing.assert_array_equal(left, array.T)
        assert left.dtype == DATATYPES[datatype]
        assert left.flags.c_contiguous
    assert pb_utils.Tensor("a", np.array(1, "f4")).shape() == []


def test_text_becomes_bytes() -> None:
    """str, bytes_ and objects of any kind, when the tensor leaves."""
    for array in (np.array(["a", "é"]), np.array(["a", "é".encode()], object), np.array([b"a", "é".encode()])):
        assert pb_utils.Tensor("a", array).detached().tolist() == [b"a", "é".encode()]
    assert pb_utils.Tensor("a", np.array([[3, None]], object)).detached().tolist() == [[b"3", b"None"]]
    assert pb_utils.Tensor("a", np.zeros((0, 2), object)).detached().shape == (0, 2)
    assert pb_utils.Tensor("a", np.array([1, 2], ">i4")).detached().dtype == DATATYPES["INT32"]


def test_nobody_writes_into_anothers_memory() -> None:
    """Not the model into what it received, not into what it sent; what it did not touch is not copied."""
    array = np.zeros(3, "f4")
    array.flags.writeable = False
    received = pb_utils.Tensor.received("a", array)
    assert received.detached() is array
    received.as_numpy()[:] = 1
    assert received.as_numpy()[0] == 1
    assert array[0] == 0
    mine = np.zeros(3, "f4")
    sent = pb_utils.Tensor("a", mine).detached()
    mine[:] = 5
    assert sent[0] == 0


@pytest.mark.parametrize("datatype", [*NUMPY, "BF16"])
def test_dlpack_there_and_back(datatype: str) -> None:
    """To torch, as an object and as a capsule, and from it, without a copy."""
    array = example(datatype)
    array.flags.writeable = False
    for made in (pb_utils.Tensor("a", array), pb_utils.Tensor.received("a", array)):
        assert made.__dlpack_device__() == (1, 0)
        opened = from_dlpack(made)
        capsule = from_dlpack(made.to_dlpack())
        assert opened.data_ptr() == capsule.data_ptr()
        assert opened.tolist() == array.tolist()
    for give in (lambda: opened, lambda: to_dlpack(opened)):
        back = pb_utils.Tensor.from_dlpack("b", give())
        np.testing.assert_array_equal(back.detached(), array)
        assert back.detached().dtype == array.dtype
        assert back.triton_dtype() == list(DATATYPES).index(datatype) + 1
        assert (back.name(), back.shape(), back.is_cpu()) == ("b", [2, 2], True)
        assert from_dlpack(back).data_ptr() == opened.data_ptr()


def test_dlpack_keeps_its_owner() -> None:
    """The memory outlives the tensor that it came from."""
    back = pb_utils.Tensor.from_dlpack("a", torch.arange(1000, dtype=torch.float32))
    junk = [torch.full((1000,), 7.0) for _ in range(50)]
    assert back.as_numpy()[999] == 999
    assert len(junk) == 50


def test_dlpack_without_torch() -> None:
    """Importing it takes seconds: tensors of numpy alone, and capsules, do without."""
    code = """
import sys
import numpy as np
from engine.backends import python, triton_python_backend_utils as pb_utils
array = np.arange(4.0)
for given in (array, array.__dlpack__(), pb_utils.Tensor("b", array), pb_utils.Tensor("b", array).to_dlpack()):
    tensor = pb_utils.Tensor.from_dlpack("a", given)
    assert tensor.as_numpy().tolist() == [0, 1, 2, 3]
    array[1] = 1
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_on_a_device() -> None:
    """No numpy form; DLPack gives it back there; it leaves through main memory."""
    for given in (torch.arange(4, device="cuda"), to_dlpack(torch.arange(4, device="cuda"))):
        tensor = pb_utils.Tensor.from_dlpack("a", given)
        assert (tensor.is_cpu(), tensor.shape(), tensor.triton_dtype()) == (False, [4], 9)
        with pytest.raises(pb_utils.TritonModelException, match="Tensor is stored in GPU and cannot be converted"):
            tensor.as_numpy()
        assert from_dlpack(tensor).device.type == "cuda"
        assert tensor.detached().tolist() == [0, 1, 2, 3]


# Requests and responses


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"output_tensors": [None]}, "Output tensor for inference response should not be empty."),
        ({"output_tensors": ["a"]}, "output_tensors: expected Tensor, found type '<class 'str'>'"),
        ({"error": "text"}, "error: expected TritonError, found type '<class 'str'>'"),
        ({"parameters": {1: "a"}}, "Expect parameters keys to have type str, found type <class 'int'>"),
        ({"parameters": {"a": 1.5}}, "Expect parameters values to have type bool/int/str, found type <class 'float'>"),
    ],
)
def test_what_is_no_response(arguments: Any, text: str) -> None:
    """Triton's texts."""
    with pytest.raises((pb_utils.TritonModelException, TypeError)) as raised:
        pb_utils.InferenceResponse(**arguments)
    assert str(raised.value) == text


def test_a_response() -> None:
    """Tensors, parameters as JSON, an error with its code."""
    tensor = pb_utils.Tensor("y", np.zeros(1))
    response = pb_utils.InferenceResponse([tensor], parameters={"a": True})
    assert (response.output_tensors(), response.has_error(), response.error()) == ([tensor], False, None)
    assert response.parameters() == '{"a":true}'
    assert pb_utils.InferenceResponse().parameters() == "{}"
    failed = pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError("text"))
    assert failed.has_error()
    assert failed.error().message() == "text"  # type: ignore[union-attr]
    assert failed.error().code() == pb_utils.TritonError.INTERNAL  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_name": None}, "InferenceRequest() needs inputs, requested_output_names and model_name"),
        ({"inputs": None}, "InferenceRequest() needs inputs, requested_output_names and model_name"),
        ({"inputs": [None], "request_id": "i"},
         "Input tensor for request with id 'i' and model name 'm' should not be empty."),
        ({"inputs": [1]}, "inputs: expected Tensor, found type '<class 'int'>'"),
        ({"requested_output_names": [""]},
         "Requested output name for request with id '' and model name 'm' should not be empty."),
        ({"correlation_id": 1.5}, "Correlation ID must be integer or string"),
        ({"parameters": {"a": None}},
         "Expect parameters values to have type bool/int/str, found type <class 'NoneType'>"),
    ],
)  # fmt: skip
def test_what_is_no_request(change: Any, text: str) -> None:
    """Triton's texts."""
    arguments = {"model_name": "m", "inputs": [], "requested_output_names": ["y"]} | change
    with pytest.raises((pb_utils.TritonModelException, TypeError)) as raised:
        pb_utils.InferenceRequest(**arguments)
    assert str(raised.value) == text


def test_a_request_of_a_models_own() -> None:
    """What was said is read back; it has no sender, nobody cancels it, and outside a model nothing runs it."""
    request = pb_utils.InferenceRequest(
        model_name="m", inputs=[], requested_output_names=["y", "y"], request_id="i", correlation_id="c", flags=2,
        timeout=3,
    )  # fmt: skip
    assert (request.request_id(), request.correlation_id(), request.flags(), request.timeout()) == ("i", "c", 2, 3)
    assert (request.requested_output_names(), request.inputs(), request.parameters()) == ({"y"}, [], "{}")
    assert not request.is_cancelled()
    for call, text in (
        (request.get_response_sender, "has no response sender"),
        (request.exec, "BLS is only supported during the 'execute' function."),
        (request.async_exec, "BLS is only supported during the 'execute' function."),
    ):
        with pytest.raises(pb_utils.TritonModelException, match=text):
            call()


class Call:
    """A call that remembers."""

    decoupled = True

    def __init__(self) -> None:
        self.request = InferRequest("m", "", {})
        self.answers: list[tuple[Any, bool]] = []

    def respond(self, response: InferResponse | Exception | None, final: bool) -> None:
        self.answers.append((response, final))

    def cancelled(self) -> bool:
        return False


def host(decoupled: bool) -> pb_utils.ModelHost:
    return pb_utils.ModelHost(None, None, "m", "1", "m_0", Path(), ("y",), decoupled)  # type: ignore[arg-type]


def test_two_threads_send() -> None:
    """Every response goes out once, and none after the last."""
    call, refused = Call(), []
    sender = pb_utils.InferenceResponseSender(call, host(decoupled=True))

    def work() -> None:
        for i in range(200):
            try:
                sender.send(pb_utils.InferenceResponse(), int(i == 150))
            except pb_utils.TritonModelException as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [final for _, final in call.answers] == [False] * (len(call.answers) - 1) + [True]
    assert len(call.answers) + len(refused) == 400
    assert set(refused) == {"Unable to send response. Response sender has been closed."}


def test_a_sender_that_is_let_go_of() -> None:
    """The caller gets an error, unless it had its last response."""
    for decoupled in (True, False):
        call = Call()
        sender = pb_utils.InferenceResponseSender(call, host(decoupled))
        sender.send(pb_utils.InferenceResponse(), 1)
        del sender
        assert [final for _, final in call.answers] == [True]
        pb_utils.InferenceResponseSender(call, host(decoupled))
        error, final = call.answers[1]
        assert isinstance(error, ModelError)
        assert final


def test_metrics_raise_what_models_catch() -> None:
    """Misuse is a TritonModelException."""
    with pytest.raises(pb_utils.TritonModelException, match="Error when creating MetricFamily"):
        pb_utils.MetricFamily("a b", "d", pb_utils.MetricFamily.COUNTER)
    metric = pb_utils.MetricFamily("u_counter", "d", pb_utils.MetricFamily.COUNTER).Metric(labels={"a": "1"})
    assert isinstance(metric, pb_utils.Metric)
    with pytest.raises(pb_utils.TritonModelException, match="TRITONSERVER_METRIC_KIND_COUNTER does not support Set"):
        metric.set(1)


def test_constants() -> None:
    """Triton's numbers."""
    assert (pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START, pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END) == (
        1,
        2,
    )
    assert pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL == 1
    assert (pb_utils.TRITONSERVER_REQUEST_RELEASE_ALL, pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE) == (1, 2)
    codes = "UNKNOWN INTERNAL NOT_FOUND INVALID_ARG UNAVAILABLE UNSUPPORTED ALREADY_EXISTS CANCELLED".split()
    assert [getattr(pb_utils.TritonError, code) for code in codes] == list(range(8))
    assert str(pb_utils.TritonError.NOT_FOUND).endswith(".NOT_FOUND")
    assert ml_dtypes.bfloat16 is DATATYPES["BF16"].type
