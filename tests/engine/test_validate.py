"""Validation: what does not fit the model is refused with Triton's words, which name the input."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.errors import InvalidInput
from engine.types import DATATYPES, Array, InferRequest, ModelMetadata, TensorSpec
from engine.validate import KINDS, check_request, typed


def model(max_batch_size: int = 8) -> ModelMetadata:
    batch = (-1,) if max_batch_size else ()
    specs = (TensorSpec("a", "FP32", (*batch, 2)), TensorSpec("b", "INT64", (*batch, -1)))
    return ModelMetadata("m", ("1",), "p", max_batch_size, {s.name: s for s in specs}, {"y": specs[0]})


def request(a: Array | None = None, b: Array | None = None, **more: Array) -> InferRequest:
    inputs = {"a": np.zeros((3, 2), "<f4") if a is None else a, "b": np.zeros((3, 5), "<i8") if b is None else b}
    return InferRequest("m", "", {**inputs, **more})


def test_what_fits() -> None:
    """A request that fits gives its rows; a model without batch dimension counts one."""
    assert check_request(model(), request()) == 3
    assert check_request(model(0), request(np.zeros(2, "<f4"), np.zeros(9, "<i8"))) == 1


def with_optional(max_batch_size: int = 8, required: str = "ab") -> ModelMetadata:
    """The model, and inputs c and d that a request may leave out."""
    metadata = model(max_batch_size)
    row = TensorSpec("c", "INT32", (-1, 1) if max_batch_size else (1,))
    inputs = {**metadata.inputs, "c": row, "d": replace(row, name="d")}
    return replace(metadata, inputs={n: replace(s, optional=n not in required) for n, s in inputs.items()})


ROW = np.zeros((3, 1), "<i4")


@pytest.mark.parametrize(
    ("metadata", "names", "text"),
    [
        (with_optional(), "a", "between 2 and 4 but got 1 inputs for model 'm'. Got input(s) ['a'], but missing "
         "required input(s) ['b']. Please provide all required input(s)."),
        (with_optional(), "", "between 2 and 4 but got 0 inputs for model 'm'. Got input(s) [], but missing required "
         "input(s) ['a','b']. Please provide all required input(s)."),
        (with_optional(), "acd", "between 2 and 4 but got 3 inputs for model 'm'. Got input(s) ['a','c','d'], but "
         "missing required input(s) ['b']. Please provide all required input(s)."),
        (with_optional(), "abcde", "between 2 and 4 but got 5 inputs for model 'm'. Got input(s) "
         "['a','b','c','d','e'], but missing required input(s) []. Please provide all required input(s)."),
    ],
)  # fmt: skip
def test_how_many_inputs_there_may_be(metadata: ModelMetadata, names: str, text: str) -> None:
    """Only optional inputs may be missing, whatever else is there; the text says which are not."""
    bad = InferRequest("m", "", dict.fromkeys(names, ROW))
    with pytest.raises(InvalidInput) as refused:
        check_request(metadata, bad)
    assert str(refused.value) == f"[request id: <id_unknown>] expected number of inputs {text}"


def test_a_wrong_name_among_optional_inputs_is_named() -> None:
    """Where the number of inputs could be right, the one that the model does not know is what is wrong."""
    with pytest.raises(InvalidInput, match="^unexpected inference input 'z' for model 'm'$"):
        check_request(with_optional(), InferRequest("m", "", {"a": np.zeros((3, 2), "<f4"), "c": ROW, "z": ROW}))


def test_optional_inputs_may_be_left_out() -> None:
    """All, some or none of them; those that are there are checked like others."""
    assert check_request(with_optional(), request()) == 3
    assert check_request(with_optional(), request(d=ROW)) == 3
    assert check_request(with_optional(), request(d=ROW, c=ROW)) == 3
    assert check_request(with_optional(required=""), InferRequest("m", "", {})) == 1
    with pytest.raises(InvalidInput, match="input 'd' batch size does not match"):
        check_request(with_optional(), request(d=np.zeros((2, 1), "<i4")))


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (request(c=np.zeros(1)), "expected 2 inputs but got 3 inputs for model 'm'"),
        (InferRequest("m", "", {}), r"expected 2 inputs but got 0 .* missing required input\(s\) \['a','b'\]"),
        (InferRequest("m", "", {"a": np.zeros((1, 2), "<f4"), "z": np.zeros(1)}), "unexpected inference input 'z'"),
        (request(np.zeros((), "<f4")), "input 'a' has no shape but model requires batch dimension"),
        (request(np.zeros((2, 2), "<f4")), "input 'b' batch size does not match other inputs"),
        (request(np.zeros((9, 2), "<f4"), np.zeros((9, 1), "<i8")), "batch-size must be <= 8 for 'm'"),
        (request(np.zeros((0, 2), "<f4"), np.zeros((0, 1), "<i8")), "zero rows for 'm'"),
        (request(np.zeros((3, 2), "<f8")), "input 'a' data-type is 'FP64', but model 'm' expects 'FP32'"),
        (request(np.zeros((3, 4), "<f4")), r"shape for input 'a' for model 'm'. Expected \[-1,2\], got \[3,4\]. NOTE"),
        (request(np.zeros((3, 2, 1), "<f4")), r"Expected \[-1,2\], got \[3,2,1\]"),
    ],
)
def test_what_does_not(bad: InferRequest, text: str) -> None:
    """Each misfit has its own text, which names the input or the bound."""
    with pytest.raises(InvalidInput, match=text):
        check_request(model(), bad)


def ragged(lengths: tuple[int, ...] = (), max_cost: int = 0) -> ModelMetadata:
    specs = {s.name: s for s in (TensorSpec("a", "FP32", (-1, 2, -1)), TensorSpec("b", "INT64", (-1, -1)))}
    return ModelMetadata("m", ("1",), "p", 8, specs, {"y": specs["a"]}, {"a": 2, "b": 1}, lengths, max_cost)


def test_padded_rows_count_against_the_largest_batch() -> None:
    """What the model would be given is what the bound bounds: 3 rows run as 4."""
    metadata = replace(ragged((4,), 16), row_grid=(1, 4, 8))
    assert check_request(metadata, of_lengths(4, 4)) == 3
    with pytest.raises(InvalidInput, match="padded rows times padded size, 4 x 4, must be <= 15 for 'm'"):
        check_request(replace(metadata, max_cost=15), of_lengths(4, 4))


def of_lengths(a: int, b: int, rows: int = 3) -> InferRequest:
    return request(np.zeros((rows, 2, a), "<f4"), np.zeros((rows, b), "<i8"))


@pytest.mark.parametrize(
    ("metadata", "length", "rows"),
    [
        (ragged(), 1000, 8),
        (ragged(), 1, 1),
        (ragged((16, 32)), 32, 8),
        (ragged((16, 32), 96), 17, 3),
        (ragged((16, 32), 96), 16, 6),
        (ragged((), 96), 32, 3),
    ],
)
def test_ragged_inputs_that_fit(metadata: ModelMetadata, length: int, rows: int) -> None:
    """Any length from 1 on goes without a grid and a budget; up to both, where there are some."""
    assert check_request(metadata, of_lengths(length, length, rows)) == rows


@pytest.mark.parametrize(
    ("metadata", "bad", "text"),
    [
        (ragged(), of_lengths(4, 5), "inputs of one request must have the same size for 'm', got 4 for 'a', 5 for 'b'"),
        (ragged(), of_lengths(0, 0), "size of ragged input 'a' must be at least 1 for 'm'"),
        (ragged((16, 32)), of_lengths(33, 33), "size 33 of ragged input 'a' must be <= 32 for 'm'"),
        (ragged((16, 32), 95), of_lengths(17, 17), "rows times padded size, 3 x 32, must be <= 95 for 'm'"),
        (ragged((), 95), of_lengths(32, 32), "rows times padded size, 3 x 32, must be <= 95 for 'm'"),
        (ragged((), 31), of_lengths(32, 32, 1), "rows times padded size, 1 x 32, must be <= 31 for 'm'"),
        (ragged(), request(np.zeros((3, 1, 4), "<f4"), np.zeros((3, 4), "<i8")), r"Expected .* got \[3,1,4\]"),
    ],
)
def test_ragged_inputs_that_do_not(metadata: ModelMetadata, bad: InferRequest, text: str) -> None:
    """What no batch could ever hold is refused at once: sizes that differ, 0, one beyond the grid, too many tokens."""
    with pytest.raises(InvalidInput, match=r"^\[request id: <id_unknown>\] .*" + text):
        check_request(metadata, bad)


def test_ragged_inputs_may_be_optional() -> None:
    """The length is that of the ragged inputs that are there; without any there is none to bound."""
    metadata = ragged((16, 32))
    metadata = replace(metadata, inputs={n: replace(s, optional=True) for n, s in metadata.inputs.items()})
    assert check_request(metadata, InferRequest("m", "", {"b": np.zeros((3, 32), "<i8")})) == 3
    assert check_request(metadata, InferRequest("m", "", {})) == 1
    with pytest.raises(InvalidInput, match="size 33 of ragged input 'b' must be <= 32"):
        check_request(metadata, InferRequest("m", "", {"b": np.zeros((3, 33), "<i8")}))


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_fits_itself_alone(datatype: str) -> None:
    """Each is told from all others; the text has the protocol's names."""
    spec = TensorSpec("a", datatype, (2,))
    metadata = ModelMetadata("m", ("1",), "p", 0, {"a": spec}, {})
    for other, dtype in DATATYPES.items():
        sent = InferRequest("m", "", {"a": np.zeros(2, dtype)})
        if other == datatype:
            assert check_request(metadata, sent) == 1
        else:
            with pytest.raises(InvalidInput, match=f"data-type is '{other}', but model 'm' expects '{datatype}'$"):
                check_request(metadata, sent)


def test_the_request_id_leads_the_text() -> None:
    """Triton puts the request's id in front, and says so when there is none."""
    bad = request(np.zeros((3, 9), "<f4"))
    with pytest.raises(InvalidInput, match=r"^\[request id: <id_unknown>\] "):
        check_request(model(), bad)
    bad.id = "r7"
    with pytest.raises(InvalidInput, match=r"^\[request id: r7\] "):
        check_request(model(), bad)


def test_a_long_name_is_not_sent_back_whole() -> None:
    """A megabyte of name does not become a megabyte of error."""
    for bad in (InferRequest("m", "", {"x" * 10**6: np.zeros(1)}), InferRequest("m", "", {}, ("y" * 10**6,))):
        with pytest.raises(InvalidInput) as refused:
            check_request(model(), bad)
        assert len(str(refused.value)) < 1000


def test_an_unknown_output_is_refused() -> None:
    """A requested output that the model does not have is named."""
    bad = request()
    bad.outputs = ("y", "q")
    with pytest.raises(InvalidInput, match="unexpected inference output 'q' for model 'm'"):
        check_request(model(), bad)


def test_no_note_about_batches_without_a_batch() -> None:
    """The note on the batch dimension is only for models that have one."""
    with pytest.raises(InvalidInput, match=r"Expected \[2\], got \[3\]. $"):
        check_request(model(0), request(np.zeros(3, "<f4"), np.zeros(1, "<i8")))


@pytest.mark.parametrize(
    ("kind", "fits", "others"),
    [
        (str, ["", "x"], [1, None, b"x"]),
        (bool, [True, False], [1, 0, "true"]),
        (int, [0, 2**64], [-1, True, 1.0, "1"]),
        (list, [[], [1]], [{}, (1,)]),
        (dict, [{}], [[], None]),
    ],
)
def test_a_value_of_json_is_of_its_kind(kind: type[Any], fits: list[Any], others: list[Any]) -> None:
    """Exactly: no number is a boolean, no boolean a number, and no number negative. Refused in Triton's words."""
    for value in fits:
        assert typed(kind, value) is value
    for value in others:
        with pytest.raises(InvalidInput, match=f"^attempt to access JSON non-{KINDS[kind]} as {KINDS[kind]}$"):
            typed(kind, value)
