"""Classification: the best of each row, written as Triton writes them."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asgi_app.classification import MAX_ELEMENTS, classify
from engine.errors import InvalidInput
from engine.types import DATATYPES, Array


@pytest.mark.parametrize(
    ("datatype", "dtype"), [("FP16", "<f2"), ("BF16", ml_dtypes.bfloat16), ("BOOL", "?"), ("BYTES", object)]
)
def test_datatypes_that_have_no_classes(datatype: str, dtype: Any) -> None:
    """They are refused by name."""
    with pytest.raises(InvalidInput) as refused:
        classify(np.zeros((1, 3), dtype), datatype, 1, (), True)
    assert str(refused.value) == f"class result not available for output due to unsupported type '{datatype}'"


def test_too_many_classes() -> None:
    """A row has a bound, a batch of rows below it has none."""
    with pytest.raises(InvalidInput, match="^classification output tensor too large"):
        classify(np.zeros((1, MAX_ELEMENTS + 1), "i1"), "INT8", 1, (), True)
    with pytest.raises(InvalidInput, match="^classification output tensor too large"):
        classify(np.zeros((2, MAX_ELEMENTS // 2 + 1), "i1"), "INT8", 1, (), False)
    assert classify(np.zeros((2, MAX_ELEMENTS // 2 + 1), "i1"), "INT8", 1, (), True).shape == (2, 1)


@pytest.mark.parametrize(
    ("array", "count", "batched", "texts"),
    [
        (np.array([[1, 3.3, 2], [9, 7, 8]], "<f4"), 2, True,
         [[b"3.300000:1:pear", b"2.000000:2"], [b"9.000000:0:apple", b"8.000000:2"]]),
        (np.array([0.1, 1e20], "<f8"), 5, False, [b"100000000000000000000.000000:1:pear", b"0.100000:0:apple"]),
        (np.array([np.inf, -np.inf], "<f4"), 5, False, [b"inf:0:apple", b"-inf:1:pear"]),
        (np.array([[[1, 2], [5, 4]]], "<i4"), 3, True, [[b"5:2", b"4:3", b"2:1:pear"]]),
        (np.array([[1, 2], [5, 4]], "<i4"), 3, False, [b"5:2", b"4:3", b"2:1:pear"]),
        (np.array([2**64 - 1, 0], "<u8"), 1, False, [b"18446744073709551615:0:apple"]),
        (np.array([-1, 0, 0, -1, 0], "i1"), 4, False, [b"0:1:pear", b"0:2", b"0:4:plum", b"-1:0:apple"]),
        (np.zeros((0, 3), "<f4"), 2, True, []),
        (np.zeros((2, 0), "<f4"), 2, True, [[], []]),
        (np.array(7, "<i4"), 2, False, [b"7:0:apple"]),
        (np.array([3, 4], "<i4"), 2, True, [[b"3:0:apple"], [b"4:0:apple"]]),
    ],
)  # fmt: skip
def test_the_best_of_each_row(array: Array, count: int, batched: bool, texts: list[Any]) -> None:
    """Descending, the lower class first among equals; floats with six decimals; a class without a name has none."""
    (datatype,) = [name for name, dtype in DATATYPES.items() if dtype == array.dtype]
    got = classify(array, datatype, count, ("apple", "pear", "", "", "plum"), batched)
    assert got.dtype == object
    assert got.tolist() == texts


@given(array=hnp.arrays("<i2", hnp.array_shapes(min_dims=2, max_dims=3, max_side=5)), count=st.integers(1, 6))
def test_as_sorting_would(array: Array, count: int) -> None:
    """The same as sorting each row's numbers and indices."""
    rows = array.reshape(len(array), -1).tolist()
    pairs = [sorted((-value, index) for index, value in enumerate(row)) for row in rows]
    texts = classify(array, "INT16", count, (), True).tolist()
    assert [[int(text.decode().partition(":")[2]) for text in row] for row in texts] == [
        [index for _, index in row[:count]] for row in pairs
    ]
