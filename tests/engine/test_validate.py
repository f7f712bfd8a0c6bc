"""Validation: what does not fit the model is refused with Triton's words, which name the input."""

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import InvalidInput
from engine.types import Array, InferRequest, ModelMetadata, TensorSpec
from engine.validate import check_request


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


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (request(c=np.zeros(1)), "expected 2 inputs but got 3 inputs for model 'm'"),
        (InferRequest("m", "", {}), r"expected 2 inputs but got 0 .* missing required input\(s\) \['a', 'b'\]"),
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
