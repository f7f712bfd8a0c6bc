"""The codec: bytes in, a request or an error that names the field, nothing else; arrays out, exact."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asgi_app.v2_codec import Decoded, decode_request, encode_response
from engine.errors import EngineError, InvalidInput
from engine.types import DATATYPES, InferRequest, InferResponse


def tensor(
    data: Any = None, shape: Any = (1, 2), datatype: Any = "FP32", name: Any = "x", **more: Any
) -> dict[str, Any]:
    entry = {"name": name, "shape": shape, "datatype": datatype, **more}
    return entry if data is None else {**entry, "data": data}


def deep(levels: int) -> Any:
    """An array in an array in an array."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def decode(*inputs: Any, binary: bytes | None = None, **head: Any) -> Decoded:
    text = json.dumps({"inputs": list(inputs), **head}).encode()
    if binary is None:
        return decode_request("m", "", text)
    return decode_request("m", "", text + binary, b"%d" % len(text))


def sized(size: Any) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": size}}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "not valid JSON"),
        (b'{"inputs":[', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: depth limit"),
        (b'{"inputs":' + b"[" * 1500 + b"]" * 1500 + b"}", "not valid JSON"),
        (b"[]", "must be a JSON object, got an array"),
        (b"null", "must be a JSON object, got null"),
        (b"\xff", "not valid JSON"),
        (b"{}", "inputs: must be an array of tensors, got null"),
        (b'{"inputs":{}}', "inputs: must be an array of tensors, got an object"),
        (b'{"inputs":[1]}', r"inputs\[0\]: must be an object, got an integer"),
        (b'{"inputs":[{}]}', r"inputs\[0\].name: must be a string, got null"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}', "not valid JSON"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[Infinity]}]}', "not valid JSON"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1e999]}]}', "JSON: number is infinity"),
        (b'{"inputs":[],"outputs":7}', "outputs: must be an array of tensors, got an integer"),
        (b'{"inputs":[],"outputs":[{}]}', r"outputs\[0\].name"),
        (b'{"inputs":[],"outputs":[{"name":"y"},{"name":"y"}]}', r"outputs\[1\].name: output 'y' already exists"),
        (b'{"inputs":[],"outputs":[{"name":"y","parameters":{"binary_data":1}}]}', "parameters.binary_data: must be"),
        (b'{"inputs":[],"outputs":[{"name":"y","parameters":{"classification":3}}]}', "classification is not served"),
        (b'{"inputs":[],"id":7}', "id: must be a string, got an integer"),
        (b'{"inputs":[],"parameters":[]}', "parameters: must be an object, got an array"),
        (b'{"inputs":[],"parameters":{"binary_data_output":"yes"}}', "parameters.binary_data_output: must be true"),
        (b'{"inputs":[],"parameters":{"priority":-1}}', "parameters.priority: must be .* from 0 to .*, got -1"),
        (b'{"inputs":[],"parameters":{"priority":"1"}}', 'parameters.priority: must be a whole number .*, got "1"'),
        (b'{"inputs":[],"parameters":{"priority":true}}', "parameters.priority: must be a whole number .*, got true"),
        (b'{"inputs":[],"parameters":{"priority":1.0}}', "parameters.priority: must be a whole number .*, got 1.0"),
        (b'{"inputs":[],"parameters":{"priority":null}}', "parameters.priority: must be a whole number .*, got null"),
        (b'{"inputs":[],"parameters":{"timeout":-5}}', "parameters.timeout: must be .* from 0 to .*, got -5"),
        (b'{"inputs":[],"parameters":{"timeout":2.5}}', "parameters.timeout: must be a whole number .*, got 2.5"),
        (b'{"inputs":[],"parameters":{"timeout":18446744073709551616}}',
         r"parameters.timeout: must be a whole number from 0 to 18446744073709551615, got 1.8446744073709552e\+19$"),
        (b'{"inputs":[],"parameters":{"timeout":[1]}}', r"parameters.timeout: must be a whole number .*, got \[1\]"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(body: bytes, text: str) -> None:
    """Each malformed body gives an error that names the field."""
    with pytest.raises(InvalidInput, match=text):
        decode_request("m", "", body)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (tensor([1, 2], datatype="FLOAT"), "input 'x': datatype must be one of BOOL.* got \"FLOAT\""),
        (tensor([1, 2], datatype=["FP32"]), "input 'x': datatype must be one of"),
        (tensor(["a"], datatype="BYTES", shape=[1]), "input 'x': datatype must be one of"),
        (tensor([1, 2], shape=None), "input 'x': shape must be an array of non-negative integers, got null"),
        (tensor([1, 2], shape=[-1, 2]), r"input 'x': shape must be .* got \[-1,2\]"),
        (tensor([1, 2], shape=[1.0, 2]), r"input 'x': shape must be .* got \[1.0,2\]"),
        (tensor([1, 2], shape=[True, 2]), r"input 'x': shape must be .* got \[true,2\]"),
        (tensor([1, 2], shape="12"), "input 'x': shape must be"),
        (tensor([1, 2], shape=[2**62, 2**62]), "input 'x': data holds 2 elements, its shape makes 2126"),
        (tensor([], shape=[0, 2**62, 2**62]), "input 'x': shape .* is too big"),
        (tensor([1, 2], shape=[2**63 - 1] * 64), "input 'x': data holds 2 elements, its shape makes"),
        (tensor([1, 2], shape=[2**63]), "input 'x': shape must have at most 64 dimensions below"),
        (tensor([1, 2], shape=[1] * 65), "input 'x': shape must have at most 64 dimensions"),
        (tensor([1, 2], shape=[2**63] * 100_000), "input 'x': shape must have at most 64 dimensions"),
        (tensor([1, 2], shape=deep(300)), "input 'x': shape must be an array of non-negative integers, got an array"),
        (tensor([1, 2], datatype=deep(300)), "input 'x': datatype must be one of .*, got an array"),
        (tensor(deep(300)), "input 'x': data holds 0 elements"),
        (tensor([1, 2, 3]), "input 'x': data holds 3 elements, its shape makes 2"),
        (tensor([[1], [2, 3]]), "input 'x': data holds 3 elements"),
        (tensor([[1], 2]), "input 'x': data must hold numbers for FP32, got an array"),
        (tensor([1, "2"]), "input 'x': data must hold numbers for FP32, got a string"),
        (tensor([1, None]), "input 'x': data must hold numbers for FP32, got null"),
        (tensor([1, True]), "input 'x': data must hold numbers for FP32, got a boolean"),
        (tensor([1, {}]), "input 'x': data must hold numbers for FP32, got an object"),
        (tensor("12"), "input 'x': data must be an array, got a string"),
        (tensor([1, 1e39]), "input 'x': data holds a number that does not fit FP32"),
        (tensor([1, 1.5], datatype="INT32"), "input 'x': data must hold integers for INT32, got a float"),
        (tensor([1, 300], datatype="UINT8"), "input 'x': data holds a number that does not fit UINT8"),
        (tensor([1, -1], datatype="UINT64"), "input 'x': data holds a number that does not fit UINT64"),
        (tensor([1, 2**63], datatype="INT64"), "input 'x': data holds a number that does not fit INT64"),
        (tensor([1, 0], datatype="BOOL"), "input 'x': data must hold booleans for BOOL, got an integer"),
        (tensor([1, 2], datatype="FP16"), "receiving FP16 data via JSON is not supported"),
        (tensor(), "input 'x': give either 'data' or 'parameters.binary_data_size', got neither"),
        (tensor([1, 2], **sized(8)), "input 'x': give either .* got both"),
        (tensor(**sized(8)), "input 'x': binary data needs the header Inference-Header-Content-Length"),
        (tensor([1, 2], parameters=3), "input 'x': parameters: must be an object, got an integer"),
        (tensor(parameters={"shared_memory_region": "r"}), "shared_memory_region is not served yet"),
    ],
)  # fmt: skip
def test_inputs_that_are_no_tensor(entry: dict[str, Any], text: str) -> None:
    """Each malformed input gives an error that names it and what is wrong with it."""
    with pytest.raises(InvalidInput, match=text):
        decode(entry)


def test_the_same_input_twice() -> None:
    """A name that comes twice is refused by its place."""
    with pytest.raises(InvalidInput, match=r"inputs\[1\].name: input 'x' already exists in request"):
        decode(tensor([1, 2]), tensor([1, 2]))


@pytest.mark.parametrize(
    ("entry", "binary", "text"),
    [
        (tensor(**sized(8)), b"1234567", "input 'x': unexpected size, expecting 1 additional bytes"),
        (tensor(**sized(8)), b"123456789", "unexpected additional input data for model 'm': .* 1 bytes after"),
        (tensor(**sized(7)), b"1234567", "binary_data_size is 7, but its shape and datatype make 8"),
        (tensor(**sized(-8)), b"12345678", "binary_data_size must be a number of bytes, got -8"),
        (tensor(**sized("8")), b"12345678", 'binary_data_size must be a number of bytes, got "8"'),
        (tensor(**sized(True)), b"1", "binary_data_size must be a number of bytes, got true"),
        (tensor(shape=[2**40, 2**40], **sized(8)), b"12345678", "binary_data_size is 8, but its shape"),
        (tensor([1, 2]), b"1", "unexpected additional input data"),
    ],
)
def test_binary_sizes_that_do_not_add_up(entry: dict[str, Any], binary: bytes, text: str) -> None:
    """Claimed size, shape and bytes that are there must agree; nothing is allocated before they do."""
    with pytest.raises(InvalidInput, match=text):
        decode(entry, binary=binary)


@pytest.mark.parametrize("length", [b"", b"x", b"-1", b"1.5", b"0", b"99", b"9" * 40, b"1" * 5000, b"+5", b"\xb2"])
def test_header_lengths_that_cannot_be(length: bytes) -> None:
    """Inference-Header-Content-Length must be a whole number within the body, and is named."""
    with pytest.raises(InvalidInput, match="^Inference-Header-Content-Length: must be"):
        decode_request("m", "", b'{"inputs":[]}', length)


def test_a_header_length_that_cuts_the_json() -> None:
    """A length that ends within the JSON is a JSON error, not a wrong answer."""
    with pytest.raises(InvalidInput, match="not valid JSON"):
        decode_request("m", "", b'{"inputs":[]}', b"5")


def test_nesting_means_nothing_but_order() -> None:
    """Flat and nested data of the same order are the same tensor; integers are fine for floats."""
    nested, flat = decode(tensor([[1, 2.5]])), decode(tensor([1, 2.5]))
    for decoded in (nested, flat):
        assert decoded.request.inputs["x"].tolist() == [[1.0, 2.5]]
        assert decoded.request.inputs["x"].dtype == np.float32


def test_any_byte_but_zero_is_true() -> None:
    """Binary BOOL: as in Triton, every non-zero byte is true, and numpy must see a proper boolean."""
    array = decode(tensor(shape=[3], datatype="BOOL", **sized(3)), binary=b"\x00\x02\xff").request.inputs["x"]
    assert array.view(np.uint8).tolist() == [0, 1, 1]


def test_json_and_binary_inputs_mix() -> None:
    """Binary tensors follow in the order of the inputs that have them."""
    request = decode(
        tensor(shape=[2], datatype="INT16", name="a", **sized(4)),
        tensor([7, 8], name="b"),
        tensor(shape=[1], datatype="UINT8", name="c", **sized(1)),
        binary=b"\x01\x00\x02\x00\x09",
    ).request
    assert {name: array.tolist() for name, array in request.inputs.items()} == {"a": [1, 2], "b": [[7, 8]], "c": [9]}


ARRAYS = st.sampled_from([dtype for name, dtype in DATATYPES.items()]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@given(array=ARRAYS)
def test_binary_is_exact_both_ways(array: np.ndarray[Any, Any]) -> None:
    """Every datatype, shape and bit pattern comes out as it went in, NaN and infinities included."""
    (datatype,) = [name for name, dtype in DATATYPES.items() if dtype == array.dtype]
    entry = tensor(shape=list(array.shape), datatype=datatype, **sized(array.nbytes))
    decoded = decode(entry, binary=array.tobytes(), parameters={"binary_data_output": True})
    back = decoded.request.inputs["x"]
    assert (back.shape, back.dtype, back.tobytes()) == (array.shape, array.dtype, array.tobytes())
    body, length = encode_response(InferResponse("m", "1", {"y": back}), decoded)
    head = json.loads(body[: length or None])
    assert head["outputs"] == [
        {
            "name": "y",
            "datatype": datatype,
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
    ]
    assert (body[length:] if length else b"") == array.tobytes()


@given(array=ARRAYS.filter(lambda array: array.dtype != np.float16))
def test_json_is_exact_both_ways(array: np.ndarray[Any, Any]) -> None:
    """What is encoded as JSON decodes to the same bits, but for the payload of a NaN."""
    (datatype,) = [name for name, dtype in DATATYPES.items() if dtype == array.dtype]
    decoded = Decoded(InferRequest("m", "", {}, id="r"), {}, False)
    body, length = encode_response(InferResponse("m", "1", {"y": np.asarray(array, order="C")}), decoded)
    assert length == 0
    answer = json.loads(body)  # reads NaN and Infinity too, as Triton's clients do
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("r", "m", "1")
    np.testing.assert_array_equal(np.array(answer["outputs"][0]["data"], array.dtype), array.reshape(-1))
    if array.dtype.kind != "f" or np.isfinite(array).all():
        again = decode({**answer["outputs"][0], "name": "x", "datatype": datatype}).request.inputs["x"]
        assert (again.shape, again.tobytes()) == (array.shape, array.tobytes())


@pytest.mark.parametrize(
    ("head", "priority", "timeout"),
    [
        ({}, 0, 0.0),
        ({"parameters": None}, 0, 0.0),
        ({"parameters": {"binary_data_output": True, "mine": "x"}}, 0, 0.0),
        ({"parameters": {"priority": 0, "timeout": 0}}, 0, 0.0),
        ({"parameters": {"priority": 2}}, 2, 0.0),
        ({"parameters": {"timeout": 2500}}, 0, 0.0025),
        ({"parameters": {"priority": 2**64 - 1, "timeout": 2**64 - 1}}, 2**64 - 1, (2**64 - 1) / 1e6),
    ],
)
def test_priority_and_timeout(head: dict[str, Any], priority: int, timeout: float) -> None:
    """They are the request's parameters, microseconds become seconds; without them they are the model's own."""
    request = decode(**head).request
    assert (request.priority, request.timeout, request.client) == (priority, timeout, "")


def test_only_the_outputs_asked_for_each_in_its_form() -> None:
    """Listed outputs come in the model's order, each as JSON or binary as it asked; the default does not touch them."""
    arrays = {name: np.full((1, 2), n, "<f4") for n, name in enumerate("abc")}
    decoded = decode(
        outputs=[{"name": "c", "parameters": {"binary_data": True}}, {"name": "a"}],
        parameters={"binary_data_output": True},
    )
    body, length = encode_response(InferResponse("m", "1", arrays), decoded)
    a, c = json.loads(body[:length])["outputs"]
    assert (a["name"], a["data"]) == ("a", [0.0, 0.0])
    assert (c["name"], c["parameters"]) == ("c", {"binary_data_size": 8})
    assert body[length:] == arrays["c"].tobytes()


def test_half_precision_has_no_json_form() -> None:
    """FP16 goes out in binary; as JSON it is refused, as Triton does."""
    response = InferResponse("m", "1", {"y": np.ones(2, "<f2")})
    with pytest.raises(InvalidInput, match="sending FP16 data via JSON is not supported"):
        encode_response(response, decode())
    _, length = encode_response(response, decode(parameters={"binary_data_output": True}))
    assert length


HEADS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**64) | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(["x", "FP32", "BOOL", "INT64"]),
    lambda children: st.lists(children, max_size=4)
    | st.dictionaries(
        st.sampled_from(["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id", "binary_data",
                         "binary_data_size", "binary_data_output", "priority", "timeout"]),
        children,
        max_size=6,
    ),
    max_leaves=25,
)  # fmt: skip


@given(head=HEADS, tail=st.binary(max_size=20), length=st.none() | st.integers(0, 400))
def test_any_json_is_a_request_or_an_error_of_ours(head: Any, tail: bytes, length: int | None) -> None:
    """Accepted, or an error of engine/errors.py; nothing else."""
    try:
        text = json.dumps(head).encode() + tail
        decode_request("m", "", text, None if length is None else b"%d" % length)
    except EngineError as error:
        assert str(error)  # noqa: PT017


@given(body=st.binary(max_size=100), length=st.none() | st.binary(max_size=5))
def test_any_bytes_are_a_request_or_an_error_of_ours(body: bytes, length: bytes | None) -> None:
    """The same for bytes that are no JSON at all."""
    try:
        decode_request("m", "", body, length)
    except EngineError as error:
        assert str(error)  # noqa: PT017
