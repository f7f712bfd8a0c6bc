"""The codec: bytes in, a request or an error that names the field, nothing else; arrays out, exact."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asgi_app.v2_codec import Decoded, decode_request, encode_response
from engine.errors import EngineError, InvalidInput, ModelError, NotFound
from engine.types import (
    DATATYPES,
    SEQUENCE_END,
    SEQUENCE_START,
    Array,
    Engine,
    InferRequest,
    InferResponse,
    ModelMetadata,
    TensorSpec,
)


@dataclass
class Memory:
    """What the codec asks of an engine: shared memory by name, and a model's metadata."""

    contents: dict[str, bytearray] = field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "FP32", (2,)),)
    outputs: tuple[TensorSpec, ...] = ()
    rows: int = 0

    @property
    def regions(self) -> "Memory":
        return self

    def view(self, name: str, offset: int, byte_size: int) -> memoryview:
        if name not in self.contents:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        if offset + byte_size > len(self.contents[name]):
            raise InvalidInput(f"Invalid offset + byte size for shared memory region: '{name}'")
        return memoryview(self.contents[name])[offset : offset + byte_size]

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        inputs, outputs = ({spec.name: spec for spec in specs} for specs in (self.inputs, self.outputs))
        return ModelMetadata(model, ("1",), "p", self.rows, inputs, outputs)


def engine_of(memory: Memory | None = None) -> Engine:
    return cast(Engine, memory or Memory())


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


def decode(*inputs: Any, binary: bytes | None = None, memory: Memory | None = None, **head: Any) -> Decoded:
    text = json.dumps({"inputs": list(inputs), **head}).encode()
    if binary is None:
        return decode_request(engine_of(memory), "m", "", text)
    return decode_request(engine_of(memory), "m", "", text + binary, b"%d" % len(text))


def sized(size: Any) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": size}}


def shared(region: Any = "r", size: Any = 8, **more: Any) -> dict[str, Any]:
    parameters = {"shared_memory_region": region, "shared_memory_byte_size": size, **more}
    return {"parameters": {key: value for key, value in parameters.items() if value is not None}}


def answer(response: InferResponse, decoded: Decoded, metadata: ModelMetadata | None = None) -> Any:
    """The JSON of an answer without binary outputs."""
    body, length = encode_response(response, decoded, metadata)
    assert length == 0
    return json.loads(body)


def unsigned(key: str, got: str) -> str:
    text = f"Unable to parse '{key}': attempt to access JSON non-unsigned-integer as unsigned-integer (got {got})"
    return f"^{re.escape(text)}$"


NOT_JSON = "^failed to parse the request JSON buffer: "
TOO_DEEP = r"^JSON nesting depth exceeds maximum allowed limit \(100\)$"
TYPES = "It should be either 'int', 'bool', or 'string'.$"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", NOT_JSON),
        (b'{"inputs":[', NOT_JSON),
        (b"[" * 100_000, TOO_DEEP),
        (b'{"inputs":' + b"[" * 1500 + b"]" * 1500 + b"}", TOO_DEEP),
        (b'{"inputs":[],"more":' + b"[" * 100 + b"]" * 100 + b"}", TOO_DEEP),
        (b'{"inputs":[],"more":' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}", TOO_DEEP),
        (b"[]", "must be a JSON object, got an array"),
        (b"null", "must be a JSON object, got null"),
        (b"\xff", NOT_JSON),
        (b"{}", "^Unable to parse 'inputs': attempt to access non-existing object member 'inputs'$"),
        (b'{"inputs":{}}', r"'inputs': attempt to access JSON non-array as array \(got {}\)"),
        (b'{"inputs":[1]}', r"inputs\[0\]: must be an object, got an integer"),
        (b'{"inputs":[{}]}', r"'name': attempt to access non-existing object member 'name' \(inputs\[0\]\)"),
        (b'{"inputs":[{"name":1}]}', r"'name': attempt to access JSON non-string as string \(inputs\[0\]: got 1\)"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[nan]}]}', NOT_JSON),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[-NaN]}]}', NOT_JSON),
        (b'{"inputs":[{"name":"x","datatype":"INT32","shape":[1],"data":[NaN]}]}', "non-signed-integer .* got a float"),
        (b'{"inputs":[],"more":[NaN,"\\ud800"]}', NOT_JSON),
        (b'{"inputs":[],"more":[NaN,123456789012345678901234567890]}', NOT_JSON),
        (b'{"inputs":[],"more":[NaN,"\xff"]}', NOT_JSON),
        (b'{"inputs":[],"more":[NaN,' + b"[" * 100_000, NOT_JSON),
        (b'{"inputs":[],"more":[NaN,' + b"[" * 100 + b"]" * 100 + b"]}", TOO_DEEP),
        (b'{"inputs":[],"parameters":{"priority":NaN}}', unsigned("priority", "null")),
        ('{"inputs":[],"more":[NaN]}'.encode("utf-16"), NOT_JSON),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1e999]}]}', "JSON buffer: number is infinity"),
        (b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}', NOT_JSON),
        (b'{"inputs":[],"outputs":7}', r"'outputs': attempt to access JSON non-array as array \(got 7\)"),
        (b'{"inputs":[],"outputs":[{}]}', r"'name': attempt to access non-existing .* \(outputs\[0\]\)"),
        (b'{"inputs":[],"outputs":[{"name":"y"},{"name":"y"}]}',
         r"^\[request id: <id_unknown>\] output 'y' already exists in request$"),
        (b'{"inputs":[],"outputs":[{"name":"y","parameters":{"binary_data":1}}]}',
         r"'binary_data': attempt to access JSON non-boolean as boolean \(output 'y': got 1\)"),
        (b'{"inputs":[],"outputs":[{"name":"y","parameters":[]}]}', r"'parameters': .* non-object as object \(output"),
        (b'{"inputs":[],"outputs":[{"name":"y","parameters":{"classification":-1}}]}',
         r"'classification': .* non-unsigned-integer as unsigned-integer \(output 'y': got -1\)"),
        (b'{"inputs":[],"outputs":[{"name":"y","parameters":{"classification":"3"}}]}', "'classification': attempt"),
        (b'{"inputs":[],"id":7}', r"'id': attempt to access JSON non-string as string \(got 7\)"),
        (b'{"inputs":[],"id":null}', "'id': attempt to access JSON non-string as string"),
        (b'{"inputs":[],"parameters":[]}', r"'parameters': attempt to access JSON non-object as object \(got \[\]\)"),
        (b'{"inputs":[],"parameters":{"binary_data_output":"yes"}}', "'binary_data_output': .* non-boolean as boolean"),
        (b'{"inputs":[],"parameters":{"priority":-1}}', unsigned("priority", "-1")),
        (b'{"inputs":[],"parameters":{"priority":"1"}}', unsigned("priority", '"1"')),
        (b'{"inputs":[],"parameters":{"priority":true}}', unsigned("priority", "true")),
        (b'{"inputs":[],"parameters":{"priority":1.0}}', unsigned("priority", "1.0")),
        (b'{"inputs":[],"parameters":{"priority":null}}', unsigned("priority", "null")),
        (b'{"inputs":[],"parameters":{"timeout":-5}}', unsigned("timeout", "-5")),
        (b'{"inputs":[],"parameters":{"timeout":18446744073709551616}}', unsigned("timeout", "1.8446744073709552e+19")),
        (b'{"inputs":[],"parameters":{"sequence_id":-1}}', r"'sequence_id': .* non-string as string \(got -1\)"),
        (b'{"inputs":[],"parameters":{"sequence_id":true}}', r"'sequence_id': .* non-string as string \(got true\)"),
        (b'{"inputs":[],"parameters":{"sequence_start":1}}', "'sequence_start': .* non-boolean as boolean"),
        (b'{"inputs":[],"parameters":{"sequence_end":"x"}}', "'sequence_end': .* non-boolean as boolean"),
        (b'{"inputs":[],"parameters":{"mine":null}}', f"^parameter 'mine' has invalid type. {TYPES}"),
        (b'{"inputs":[],"parameters":{"mine":[1]}}', f"^parameter 'mine' has invalid type. {TYPES}"),
        (b'{"inputs":[],"parameters":{"mine":{}}}', f"^parameter 'mine' has invalid type. {TYPES}"),
        (b'{"inputs":[],"parameters":{"triton_enable_empty_final_response":true}}',
         "^parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified.$"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(body: bytes, text: str) -> None:
    """Each malformed body gives an error that names the field, in Triton's words where it has some."""
    with pytest.raises(InvalidInput, match=text):
        decode_request(engine_of(), "m", "", body)


ONE_PAYLOAD = (
    "^Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. But "
)
FLOATS = r"^Unable to parse 'data': attempt to access JSON non-number as double \(input 'x': FP32, got "
COUNT = "^Unable to parse 'data': Shape does not match true shape of 'data' field "
TOO_MANY = "causes total element count to exceed maximum size of 9223372036854775807$"


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (tensor([1, 2], datatype="FLOAT"), r"^invalid datatype for input x \(got \"FLOAT\", there are BOOL, "),
        (tensor([1, 2], datatype="STRING"), "^invalid datatype for input x"),
        (tensor([1, 2], datatype=["FP32"]), r"'datatype': attempt to access JSON non-string as string \(input 'x': "),
        ({"name": "x", "shape": [1], "data": [1]}, r"non-existing object member 'datatype' \(input 'x'\)"),
        ({"name": "x", "datatype": "FP32", "data": [1]}, r"non-existing object member 'shape' \(input 'x'\)"),
        (tensor([1, 2], shape=None), r"'shape': attempt to access JSON non-array as array \(input 'x': got null\)"),
        (tensor([1, 2], shape=[-1, 2]),
         r"'shape': .* non-unsigned-integer as unsigned-integer \(input 'x': got \[-1,2\]\)"),
        (tensor([1, 2], shape=[1.0, 2]), r"'shape': .* got \[1.0,2\]"),
        (tensor([1, 2], shape=[True, 2]), r"'shape': .* got \[true,2\]"),
        (tensor([1, 2], shape="12"), "'shape': attempt to access JSON non-array"),
        (tensor([1], shape=""), "'shape': attempt to access JSON non-array"),
        (tensor([1], shape={}), "'shape': attempt to access JSON non-array"),
        (tensor([1, 2], shape=[2**62, 2**62]), f"^invalid shape for input 'x': shape .* {TOO_MANY}"),
        (tensor([], shape=[0, 2**62, 2**62]), f"^invalid shape for input 'x': shape .* {TOO_MANY}"),
        (tensor([1, 2], shape=[2**63 - 1] * 64), TOO_MANY),
        (tensor([1, 2], shape=[2**63]), TOO_MANY),
        (tensor([], shape=[0, 2**63]), TOO_MANY),
        (tensor([1, 2], shape=[2**62]),
         r"^byte size overflow for input 'x': element count \(4611686018427387904\) \* data type size \(4\) exceeds "
         r"maximum allowed size \(9223372036854775807\)$"),
        (tensor([1, 2], shape=[1] * 65), "^invalid shape for input 'x': more than 64 dimensions$"),
        (tensor([1, 2], shape=[2**63] * 100_000), "^invalid shape for input 'x': more than 64 dimensions$"),
        (tensor([1, 2], shape=[2**40]), COUNT),
        (tensor([1, 2], shape=deep(300)), TOO_DEEP),
        (tensor([1, 2], datatype=deep(300)), TOO_DEEP),
        (tensor(deep(97)), TOO_DEEP),
        (tensor(deep(300)), TOO_DEEP),
        (tensor(deep(96)), rf"{COUNT}\(input 'x': 0 elements, its shape makes 2\)$"),
        (tensor([1, 2, 3]), rf"{COUNT}\(input 'x': 3 elements, its shape makes 2\)$"),
        (tensor([[1], [2, 3]]), COUNT),
        (tensor(["a"], datatype="BYTES", shape=[2], name="é"),
         r"^\[request id: <id_unknown>\] expected 2 string elements for inference input 'é' for model 'm', got 1$"),
        (tensor(["a", "b"], datatype="BYTES", shape=[1]),
         "unexpected number of string elements 2 for inference input 'x' for model 'm', expecting 1$"),
        (tensor([1, "2"]), rf"{FLOATS}a string\)$"),
        (tensor([1, None]), rf"{FLOATS}null\)$"),
        (tensor([1, True]), rf"{FLOATS}a boolean\)$"),
        (tensor([1, {}]), rf"{FLOATS}an object\)$"),
        (tensor("12"), r"'data': attempt to access JSON non-array as array \(input 'x': got \"12\"\)"),
        (tensor([1, 1e39]), "'data': input 'x' holds a number that does not fit FP32$"),
        (tensor([1, 1.5], datatype="INT32"), "non-signed-integer as signed-integer .*: INT32, got a float"),
        (tensor([1, 1.5], datatype="UINT32"), "non-unsigned-integer as unsigned-integer .*: UINT32, got a float"),
        (tensor([1, 300], datatype="UINT8"), "input 'x' holds a number that does not fit UINT8"),
        (tensor([1, -1], datatype="UINT64"), "input 'x' holds a number that does not fit UINT64"),
        (tensor([1, 2**63], datatype="INT64"), "input 'x' holds a number that does not fit INT64"),
        (tensor([1, 0], datatype="BOOL"), "attempt to access JSON non-boolean as boolean .*: BOOL, got an integer"),
        (tensor(["a", 1], datatype="BYTES"),
         r"^Unable to parse JSON bytes array: attempt to access JSON non-string as string \(input 'x': BYTES, got an "),
        (tensor([1, 2], datatype="FP16"),
         "^receiving FP16 data via JSON is not supported. Please use the binary data format for input x$"),
        (tensor([1, 2], datatype="BF16"), "^receiving BF16 data via JSON is not supported"),
        (tensor(), f"{ONE_PAYLOAD}no field is set$"),
        (tensor(parameters={}), f"{ONE_PAYLOAD}no field is set$"),
        (tensor([1, 2], **sized(8)), f"{ONE_PAYLOAD}set 'data' 'binary_data_size'$"),
        (tensor([1, 2], **shared()), f"{ONE_PAYLOAD}set 'data' 'shared_memory_region'$"),
        (tensor(parameters={**shared()["parameters"], "binary_data_size": 8}),
         f"{ONE_PAYLOAD}set 'binary_data_size' 'shared_memory_region'$"),
        (tensor(**sized(8)), "^unexpected size for input 'x', expecting 8 additional bytes for model 'm' .*Length is"),
        (tensor([1, 2], parameters=3), r"'parameters': attempt to access JSON non-object as object \(input 'x': got 3"),
        (tensor([1, 2], parameters=[]), "'parameters': attempt to access JSON non-object as object"),
    ],
)  # fmt: skip
def test_inputs_that_are_no_tensor(entry: dict[str, Any], text: str) -> None:
    """Each malformed input gives an error that names it and what is wrong with it."""
    with pytest.raises(InvalidInput, match=text):
        decode(entry)


@pytest.mark.parametrize("shape", [[True, 2], [1.0, 2]])
def test_a_shape_that_equals_a_good_one_is_no_better_for_it(shape: list[Any]) -> None:
    """What is remembered of [1, 2] is not taken for what JSON has as a boolean or a float."""
    decode(tensor([1, 2], shape=[1, 2]))
    with pytest.raises(InvalidInput, match="non-unsigned-integer"):
        decode(tensor([1, 2], shape=shape))
    decode(tensor([1, 2], shape=[1, 2]))


def test_the_same_input_twice() -> None:
    """A name that comes twice is refused; the text says whose request it is."""
    with pytest.raises(InvalidInput, match=r"^\[request id: r7\] input 'x' already exists in request$"):
        decode(tensor([1, 2]), tensor([1, 2]), id="r7")


@pytest.mark.parametrize(
    ("entry", "binary", "text"),
    [
        (tensor(**sized(8)), b"1234567", "^unexpected size for input 'x', expecting 1 additional bytes for model 'm'$"),
        (tensor(**sized(8)), b"123456789", "^unexpected additional input data for model 'm'$"),
        (tensor(**sized(7)), b"1234567",
         r"^\[request id: <id_unknown>\] input byte size mismatch for input 'x' for model 'm'. Expected 8, got 7$"),
        (tensor(**sized(-8)), b"12345678", r"'binary_data_size': .* \(input 'x': got -8\)"),
        (tensor(**sized("8")), b"12345678", r"'binary_data_size': .* \(input 'x': got \"8\"\)"),
        (tensor(**sized(True)), b"1", r"'binary_data_size': .* \(input 'x': got true\)"),
        (tensor(**sized(None)), b"1", r"'binary_data_size': .* \(input 'x': got null\)"),
        (tensor(shape=[2**40], **sized(8)), b"12345678", "Expected 4398046511104, got 8"),
        (tensor(**sized(2**70)), b"12345678", "'binary_data_size': attempt"),
        (tensor(**sized(2**60)), b"12345678", f"expecting {2**60 - 8} additional bytes"),
        (tensor([1, 2]), b"1", "unexpected additional input data"),
        (tensor(shape=[2], datatype="BYTES", **sized(5)), b"\1\0\0\0a", "expected 2 string elements .* got 1"),
    ],
)  # fmt: skip
def test_binary_sizes_that_do_not_add_up(entry: dict[str, Any], binary: bytes, text: str) -> None:
    """Claimed size, shape and bytes that are there must agree; nothing is allocated before they do."""
    with pytest.raises(InvalidInput, match=text):
        decode(entry, binary=binary)


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (b"", "^Unable to parse Inference-Header-Content-Length, got: $"),
        (b"xx", "^Unable to parse Inference-Header-Content-Length, got: xx$"),
        (b"1.5", "got: 1.5"),
        (b"+5", "got: "),
        (b"\xb2", "got: "),
        (b"x" * 5000, "got: x{40}$"),
        (b"9" * 10, r"^Unable .*, value is out of range \[ -2147483648, 2147483647 \], got: 9999999999$"),
        (b"9" * 5000, "value is out of range .*, got: 9{40}$"),
        (b"-1", r"^inference header size should be in range \(0, 13\), got: -1$"),
        (b"14", r"^inference header size should be in range \(0, 13\), got: 14$"),
    ],
)
def test_header_lengths_that_cannot_be(length: bytes, text: str) -> None:
    """Inference-Header-Content-Length must be a whole number within the body, and is named."""
    with pytest.raises(InvalidInput, match=text):
        decode_request(engine_of(), "m", "", b'{"inputs":[]}', length)


def test_a_header_length_that_cuts_the_json() -> None:
    """A length that ends within the JSON is a JSON error, not a wrong answer."""
    with pytest.raises(InvalidInput, match=NOT_JSON):
        decode_request(engine_of(), "m", "", b'{"inputs":[]}', b"5")


def test_many_brackets_are_not_depth() -> None:
    """Depth counts what is in one another: a hundred rows are fine, and so are brackets in a text."""
    assert decode(tensor([[n] for n in range(200)], shape=[200])).request.inputs["x"].shape == (200,)
    decode(tensor(["[" * 200], shape=[1], datatype="BYTES"), more=[[], []] * 200)
    decode(more=deep(97))


def test_nesting_means_nothing_but_order() -> None:
    """Flat and nested data of the same order are the same tensor; integers are fine for floats."""
    nested, flat = decode(tensor([[1, 2.5]])), decode(tensor([1, 2.5], parameters={"mine": 1}))
    uneven = decode(tensor([[[1]], 2.5]))
    for decoded in (nested, flat, uneven):
        assert decoded.request.inputs["x"].tolist() == [[1.0, 2.5]]
        assert decoded.request.inputs["x"].dtype == np.float32


def test_literals_that_json_does_not_have() -> None:
    """NaN and the infinities are read, as Triton's clients write them; in a text they are text."""
    data = [float("nan"), float("inf"), -float("inf"), 1]
    texts = tensor(["NaN", "é"], shape=[2], datatype="BYTES", name="t")
    inputs = decode(tensor(data, shape=[4]), texts).request.inputs
    np.testing.assert_array_equal(inputs["x"], np.array(data, "<f4"))
    assert inputs["t"].tolist() == [b"NaN", "é".encode()]


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
        tensor(shape=[2], datatype="BYTES", name="d", **sized(10)),
        tensor(shape=[0], datatype="BYTES", name="e", **sized(0)),
        binary=b"\x01\x00\x02\x00\x09\x02\x00\x00\x00ab\x00\x00\x00\x00",
    ).request
    assert {name: array.tolist() for name, array in request.inputs.items()} == {
        "a": [1, 2], "b": [[7, 8]], "c": [9], "d": [b"ab", b""], "e": [],
    }  # fmt: skip


def test_an_empty_binary_input_needs_no_header() -> None:
    """Nothing is missing of a tensor of no bytes."""
    assert decode(tensor(shape=[0, 2], **sized(0))).request.inputs["x"].shape == (0, 2)


def arrays(datatype: str) -> st.SearchStrategy[Array]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    if datatype == "BYTES":
        return hnp.arrays(object, shapes, elements=st.binary(max_size=6), fill=st.nothing())
    if datatype == "BF16":
        return hnp.arrays(np.uint16, shapes).map(lambda array: array.view(ml_dtypes.bfloat16))
    return hnp.arrays(DATATYPES[datatype], shapes)


TENSORS = st.sampled_from(list(DATATYPES)).flatmap(lambda name: st.tuples(st.just(name), arrays(name)))


def wire(array: Array) -> bytes:
    """The binary form, made the slow way."""
    if array.dtype != object:
        return array.tobytes()
    return b"".join(len(element).to_bytes(4, "little") + element for element in array.ravel().tolist())


@given(case=TENSORS)
def test_binary_is_exact_both_ways(case: tuple[str, Array]) -> None:
    """Every datatype, shape and bit pattern comes out as it went in, NaN and infinities included."""
    datatype, array = case
    data = wire(array)
    entry = tensor(shape=list(array.shape), datatype=datatype, **sized(len(data)))
    decoded = decode(entry, binary=data, parameters={"binary_data_output": True})
    back = decoded.request.inputs["x"]
    assert (back.shape, back.dtype, wire(back)) == (array.shape, array.dtype, data)
    body, length = encode_response(InferResponse("m", "1", {"y": back}), decoded)
    head = json.loads(body[: length or None])
    assert head["outputs"] == [
        {"name": "y", "datatype": datatype, "shape": list(array.shape), "parameters": {"binary_data_size": len(data)}}
    ]
    assert (body[length:] if length else b"") == data


@given(case=TENSORS.filter(lambda case: case[0] not in ("FP16", "BF16")))
def test_json_is_exact_both_ways(case: tuple[str, Array]) -> None:
    """What is encoded as JSON decodes to the same bits, but for the payload of a NaN."""
    datatype, array = case
    decoded = Decoded(InferRequest("m", "", {}, id="r"))
    body, length = encode_response(InferResponse("m", "1", {"y": np.asarray(array, order="C")}), decoded)
    assert length == 0
    try:
        head = json.loads(body)  # reads NaN and Infinity too, as Triton's clients do
    except UnicodeDecodeError:
        head = json.loads(body.decode("utf-8", "surrogateescape"))
    assert (head["id"], head["model_name"], head["model_version"]) == ("r", "m", "1")
    data = head["outputs"][0]["data"]
    if datatype == "BYTES":
        assert [text.encode("utf-8", "surrogateescape") for text in data] == array.ravel().tolist()
        if any("\udc80" <= character <= "\udcff" for text in data for character in text):
            return  # no JSON comes in like that
    else:
        np.testing.assert_array_equal(np.array(data, array.dtype), array.reshape(-1))
    again = decode({**head["outputs"][0], "name": "x", "datatype": datatype}).request.inputs["x"]
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
    assert (again.shape, wire(again)) == (array.shape, wire(array))


def test_bytes_that_are_not_text_go_out_as_they_are() -> None:
    """Triton writes them into the JSON string unchanged; what JSON must escape is escaped all the same."""
    response = InferResponse("m", "1", {"y": np.array([b'\xff"', "é\n".encode()], object)})
    body, _ = encode_response(response, Decoded(InferRequest("m", "", {})))
    assert b'"data":["\xff\\"","\xc3\xa9\\n"]' in body


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


@pytest.mark.parametrize(
    ("parameters", "correlation", "flags"),
    [
        ({}, 0, 0),
        ({"sequence_id": 7, "sequence_start": True}, 7, SEQUENCE_START),
        ({"sequence_id": "seven", "sequence_end": True}, "seven", SEQUENCE_END),
        ({"sequence_id": 2**64 - 1, "sequence_start": True, "sequence_end": True}, 2**64 - 1,
         SEQUENCE_START | SEQUENCE_END),
        ({"sequence_id": 0, "sequence_start": False, "sequence_end": False}, 0, 0),
    ],
)  # fmt: skip
def test_sequences(parameters: dict[str, Any], correlation: int | str, flags: int) -> None:
    """A sequence has a number or a name; where it starts and ends are flags."""
    request = decode(parameters=parameters).request
    assert (request.correlation_id, request.flags, request.parameters) == (correlation, flags, {})


def test_other_parameters_are_the_models() -> None:
    """Texts, whole numbers, booleans and doubles reach the model as they are; the protocol's own do not."""
    mine = {"text": "é", "number": -7, "flag": False, "double": 2.5, "headers": "mine"}
    request = decode(parameters={**mine, "priority": 1, "binary_data_output": True}).request
    assert request.parameters == mine
    assert [type(value) for value in request.parameters.values()] == [str, int, bool, float, str]


def test_what_the_model_says_besides() -> None:
    """Response parameters are a member of the answer; without any there is no such member."""
    y = {"y": np.zeros(1, "<f4")}
    assert answer(InferResponse("m", "1", y, {"cost": 2, "who": "é"}), decode())["parameters"] == {
        "cost": 2,
        "who": "é",
    }
    assert answer(InferResponse("m", "1", y, {"large": 2**70}), decode())["parameters"] == {"large": 2**70}
    assert "parameters" not in answer(InferResponse("m", "1", y), decode())


def test_only_the_outputs_asked_for_each_in_its_form() -> None:
    """Listed outputs come in the model's order, each as JSON or binary as it asked; the default does not touch them."""
    outputs = {name: np.full((1, 2), n, "<f4") for n, name in enumerate("abc")}
    decoded = decode(
        outputs=[{"name": "c", "parameters": {"binary_data": True}}, {"name": "a"}],
        parameters={"binary_data_output": True},
    )
    assert decoded.request.outputs == ("c", "a")
    body, length = encode_response(InferResponse("m", "1", outputs), decoded)
    a, c = json.loads(body[:length])["outputs"]
    assert (a["name"], a["data"]) == ("a", [0.0, 0.0])
    assert (c["name"], c["parameters"]) == ("c", {"binary_data_size": 8})
    assert body[length:] == outputs["c"].tobytes()


def test_no_outputs_listed_are_all() -> None:
    """An empty list asks for what no list asks for."""
    assert decode(outputs=[]).request.outputs is None


@pytest.mark.parametrize(("datatype", "dtype"), [("FP16", "<f2"), ("BF16", ml_dtypes.bfloat16)])
def test_half_precision_has_no_json_form(datatype: str, dtype: Any) -> None:
    """FP16 and BF16 go out in binary; as JSON they are refused, as Triton does."""
    response = InferResponse("m", "1", {"y": np.ones(2, dtype)})
    text = f"^sending {datatype} data via JSON is not supported. Please use the binary data format for output y$"
    with pytest.raises(InvalidInput, match=text):
        encode_response(response, decode())
    body, length = encode_response(response, decode(parameters={"binary_data_output": True}))
    assert body[length:] == {"FP16": b"\x00\x3c", "BF16": b"\x80\x3f"}[datatype] * 2


# Shared memory.


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        (shared("zz"), NotFound, "^Unable to find shared memory region: 'zz'$"),
        (shared(size=None), InvalidInput, "^'shared_memory_byte_size' must be specified along with .* for tensor 'x'$"),
        (shared(7), InvalidInput, "'shared_memory_region': attempt to access JSON non-string as string"),
        (shared(size=-1), InvalidInput, r"'shared_memory_byte_size': .* \(input 'x': got -1\)"),
        (shared(size="8"), InvalidInput, "'shared_memory_byte_size': "),
        (shared(shared_memory_offset=-1), InvalidInput, "'shared_memory_offset': "),
        (shared(shared_memory_offset=9), InvalidInput, r"Invalid offset \+ byte size"),
        (shared(size=4), InvalidInput, "input byte size mismatch for input 'x' for model 'm'. Expected 8, got 4$"),
    ],
)
def test_shared_memory_that_does_not_hold_the_input(
    parameters: dict[str, Any], error: type[Exception], text: str
) -> None:
    """An unknown region, a bad size or place, and one that does not fit the shape are refused."""
    with pytest.raises(error, match=text):
        decode(tensor(**parameters), memory=Memory({"r": bytearray(16)}))


@given(case=TENSORS, offset=st.integers(0, 3))
def test_shared_memory_is_exact_both_ways(case: tuple[str, Array], offset: int) -> None:
    """Every datatype is read from its place in a region, and written to one; the answer holds no data."""
    datatype, array = case
    data = wire(array)
    memory = Memory({"in": bytearray(offset) + data, "out": bytearray(offset + len(data) + 2)})
    place = shared("out", len(data) + 1, shared_memory_offset=offset)
    decoded = decode(
        tensor(shape=list(array.shape), datatype=datatype, **shared("in", len(data), shared_memory_offset=offset)),
        outputs=[{"name": "y", "parameters": {**place["parameters"], "binary_data": False}}],
        memory=memory,
    )
    memory.contents["in"][offset:] = bytes(len(data))  # the client goes on: nobody looks at it any more
    back = decoded.request.inputs["x"]
    assert (back.shape, wire(back)) == (array.shape, data)
    assert answer(InferResponse("m", "1", {"y": back}), decoded)["outputs"] == [
        {"name": "y", "datatype": datatype, "shape": list(array.shape)}
    ]
    assert bytes(memory.contents["out"]) == bytes(offset) + data + bytes(2)


def test_an_output_larger_than_its_shared_memory() -> None:
    """It is refused with both sizes, and nothing is written."""
    memory = Memory({"r": bytearray(16)})
    decoded = decode(outputs=[{"name": "y", **shared()}], memory=memory)
    text = r"for output 'y' \(8 bytes\) should be at least 16 bytes to hold the results$"
    with pytest.raises(ModelError, match=f"^shared memory size specified with the request {text}"):
        encode_response(InferResponse("m", "1", {"y": np.ones(4, "<f4")}), decoded)
    assert not any(memory.contents["r"])


@pytest.mark.parametrize("other", [{"binary_data": True}, {"classification": 1}])
def test_an_output_in_two_places(other: dict[str, Any]) -> None:
    """Shared memory excludes binary data and classes; the region must be there before the model runs."""
    memory = Memory({"r": bytearray(16)})
    with pytest.raises(InvalidInput, match=f"^Output can't set both 'shared_memory_region' and '{next(iter(other))}'$"):
        decode(outputs=[{"name": "y", "parameters": {**shared()["parameters"], **other}}], memory=memory)
    with pytest.raises(NotFound, match="'zz'"):
        decode(outputs=[{"name": "y", **shared("zz")}], memory=memory)


# Classification.


def classes(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"name": "y", "parameters": {"classification": count, **more}}]


def test_classes_instead_of_numbers() -> None:
    """The best classes of a row with the output's labels, as BYTES, in JSON or binary."""
    memory = Memory(rows=8, outputs=(TensorSpec("y", "FP32", (-1, 3), ("apple", "pear")),))
    response = InferResponse("m", "1", {"y": np.array([[1, 3.3, 2]], "<f4")})
    (output,) = answer(response, decode(outputs=classes(2)), memory.metadata("m"))["outputs"]
    assert output == {"name": "y", "datatype": "BYTES", "shape": [1, 2], "data": ["3.300000:1:pear", "2.000000:2"]}
    body, length = encode_response(response, decode(outputs=classes(1, binary_data=True)), memory.metadata("m"))
    assert json.loads(body[:length])["outputs"][0]["datatype"] == "BYTES"
    assert body[length:] == len("3.300000:1:pear").to_bytes(4, "little") + b"3.300000:1:pear"


def test_no_classes_are_the_numbers() -> None:
    """A client that asks for 0 classes wants none."""
    decoded = decode(outputs=classes(0))
    assert answer(InferResponse("m", "1", {"y": np.ones(2, "<f4")}), decoded)["outputs"][0]["data"] == [1, 1]


def test_classes_of_an_output_that_the_config_does_not_name() -> None:
    """A model's own outputs have no labels, and classes all the same."""
    response = InferResponse("m", "1", {"y": np.array([3, 4], "<i8")})
    (output,) = answer(response, decode(outputs=classes(9)), Memory().metadata("m"))["outputs"]
    assert (output["shape"], output["data"]) == ([2], ["4:1", "3:0"])


# A body that is a tensor.


def raw(body: bytes, *inputs: TensorSpec, rows: int = 0) -> Decoded:
    return decode_request(engine_of(Memory(inputs=inputs, rows=rows)), "m", "", body, b"0")


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), r"^\[request id: <id_unknown>\] Raw request must only have 1 input .found 1. to be deduced but got 0 "),
        ((TensorSpec("x", "FP32", (2,)), TensorSpec("z", "FP32", (2,))), "but got 2 inputs in 'm' model configuration"),
        ((TensorSpec("x", "FP32", (-1, -1)),),
         "The shape of the raw input 'x' can not be deduced because there are more than one variable-sized dim"),
        ((TensorSpec("x", "BYTES", (2,)),),
         r"^\[request id: <id_unknown>\] For BYTE datatype raw input 'x', the model must have input shape \[1\]$"),
        ((TensorSpec("x", "BYTES", (-1,)),), r"must have input shape \[1\]"),
        ((TensorSpec("x", "FP32", (3,)),), "input byte size mismatch for input 'x' for model 'm'. Expected 12, got 8"),
        ((TensorSpec("x", "FP64", (-1, 3)),), "input byte size mismatch .* Expected 0, got 8"),
    ],
)  # fmt: skip
def test_models_that_take_no_raw_body(inputs: tuple[TensorSpec, ...], text: str) -> None:
    """Only one input whose shape follows from the body's size can be sent without JSON."""
    with pytest.raises(InvalidInput, match=text):
        raw(b"12345678", *inputs)


@pytest.mark.parametrize(
    ("spec", "rows", "shape"),
    [
        (TensorSpec("x", "INT16", (4,)), 0, (4,)),
        (TensorSpec("x", "INT16", (-1, 2)), 0, (2, 2)),
        (TensorSpec("x", "INT16", (-1, 4)), 8, (1, 4)),
        (TensorSpec("x", "INT16", (-1, 2, -1)), 8, (1, 2, 2)),
        (TensorSpec("x", "BYTES", (1,)), 0, (1,)),
        (TensorSpec("x", "BYTES", (-1, 1)), 8, (1, 1)),
    ],
)
def test_a_body_that_is_the_only_input(spec: TensorSpec, rows: int, shape: tuple[int, ...]) -> None:
    """Its one variable dimension is what is left, its batch one row, a text is whole; the answer is binary."""
    decoded = raw(b"12345678", spec, rows=rows)
    array = decoded.request.inputs["x"]
    assert (array.shape, array.dtype) == (shape, DATATYPES[spec.datatype])
    assert (array.item() if spec.datatype == "BYTES" else array.tobytes()) == b"12345678"
    _, length = encode_response(InferResponse("m", "1", {"y": array}), decoded)
    assert length


# Anything.

HEADS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**64) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["x", "r", *DATATYPES]),
    lambda children: st.lists(children, max_size=4)
    | st.dictionaries(
        st.sampled_from(["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id", "binary_data",
                         "binary_data_size", "binary_data_output", "priority", "timeout", "classification",
                         "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "sequence_id",
                         "sequence_start", "headers", "triton_x", "mine"]),
        children,
        max_size=6,
    ),
    max_leaves=25,
)  # fmt: skip


@st.composite
def likely(draw: st.DrawFn) -> Any:
    """A request that is nearly right: every part is either as it should be or anything."""

    def maybe(right: st.SearchStrategy[Any]) -> Any:
        return draw(st.one_of(right, right, right, HEADS))

    def parameters() -> Any:
        keys = {
            "binary_data_size": st.integers(0, 12), "shared_memory_region": st.just("r"), "binary_data": st.booleans(),
            "shared_memory_byte_size": st.integers(0, 12), "shared_memory_offset": st.integers(0, 12),
            "classification": st.integers(0, 3),
        }  # fmt: skip
        return {key: maybe(right) for key, right in keys.items() if draw(st.integers(0, 2)) == 0}

    entry: dict[str, Any] = {
        "name": maybe(st.sampled_from(["x", "z"])),
        "datatype": maybe(st.sampled_from(list(DATATYPES))),
        "shape": maybe(st.lists(st.integers(0, 3), max_size=2)),
    }
    if draw(st.booleans()):
        entry["data"] = maybe(st.lists(st.integers(0, 1) | st.text(max_size=2), max_size=4))
    if draw(st.booleans()):
        entry["parameters"] = parameters()
    return {"inputs": maybe(st.just([entry])), "outputs": maybe(st.just([{"name": "y", "parameters": parameters()}]))}


@given(head=HEADS | likely(), tail=st.binary(max_size=20), length=st.none() | st.integers(0, 400) | st.just(-1))
def test_any_json_is_a_request_or_an_error_of_ours(head: Any, tail: bytes, length: int | None) -> None:
    """Accepted, or an error of engine/errors.py; nothing else. -1 stands for the right length."""
    text = json.dumps(head).encode()
    length = len(text) if length == -1 else length
    try:
        decode_request(
            engine_of(Memory({"r": bytearray(12)})), "m", "", text + tail, None if length is None else b"%d" % length
        )
    except EngineError as error:
        assert str(error)  # noqa: PT017


@given(body=st.binary(max_size=100), length=st.none() | st.binary(max_size=5))
def test_any_bytes_are_a_request_or_an_error_of_ours(body: bytes, length: bytes | None) -> None:
    """The same for bytes that are no JSON at all."""
    try:
        decode_request(engine_of(), "m", "", body, length)
    except EngineError as error:
        assert str(error)  # noqa: PT017
