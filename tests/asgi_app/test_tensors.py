"""The binary form of tensors: every element counted, every byte accounted for."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_app.tensors import flatten, read_tensor, request_prefix, write_tensor
from engine.errors import InvalidInput
from engine.types import InferRequest

REQUEST = InferRequest("m", "", {}, id="r7")


def read(data: bytes, datatype: str, count: int) -> Any:
    return read_tensor(data, datatype, count, "x", REQUEST).tolist()


@pytest.mark.parametrize(
    ("data", "count", "text"),
    [
        (b"", 1, "[request id: r7] expected 1 string elements for inference input 'x' for model 'm', got 0"),
        (b"\0\0\0\0", 3, "[request id: r7] expected 3 string elements for inference input 'x' for model 'm', got 1"),
        (b"\0\0\0\0" * 2, 1,
         "[request id: r7] unexpected number of string elements 2 for inference input 'x' for model 'm', expecting 1"),
        (b"\0\0\0\0", 0,
         "[request id: r7] unexpected number of string elements 1 for inference input 'x' for model 'm', expecting 0"),
        *[
            (data, count,
             "[request id: r7] incomplete string length indicator for inference input 'x' for model 'm', expecting 4 "
             "bytes but only 2 bytes available. Please make sure the string length indicator is in one buffer.")
            for data, count in ((b"\1\0", 1), (b"\1\0\0\0a\1\0", 2), (b"\1\0\0\0a\1\0", 1))
        ],
        (b"\5\0\0\0ab", 1,
         "incomplete string data for inference input 'x', expecting string of length 5 but only 2 bytes available"),
        (b"\5\0\0\0ab", 9, "[request id: r7] expected 9 string elements for inference input 'x' for model 'm', got 1"),
        (b"\xff\xff\xff\xff", 1, "incomplete string data for inference input 'x', expecting string of length "
         "4294967295 but only 0 bytes available"),
    ],
)  # fmt: skip
def test_texts_that_do_not_add_up(data: bytes, count: int, text: str) -> None:
    """Too few, too many and cut elements of BYTES are told apart, in Triton's words."""
    with pytest.raises(InvalidInput) as refused:
        read(data, "BYTES", count)
    assert str(refused.value) == text


def test_a_number_of_texts_that_is_only_claimed() -> None:
    """A shape of nearly 2**60 elements costs what the bytes that are there cost."""
    with pytest.raises(InvalidInput, match=f"expected {2**60} string elements .* got 2$"):
        read(b"\0\0\0\0" * 2, "BYTES", 2**60)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_numbers_that_do_not_add_up(size: int) -> None:
    """A fixed-size datatype takes its count times its width, no byte more or less."""
    with pytest.raises(InvalidInput) as refused:
        read(bytes(size), "FP32", 2)
    text = f"[request id: r7] input byte size mismatch for input 'x' for model 'm'. Expected 8, got {size}"
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("datatype", "data", "values"),
    [
        ("BOOL", b"\0\1\xff", [False, True, True]),
        ("UINT8", b"\xff", [255]),
        ("INT16", b"\xfe\xff", [-2]),
        ("UINT32", b"\1\0\0\x80", [2**31 + 1]),
        ("FP16", b"\x00\x3c", [1.0]),
        ("BF16", b"\x80\x3f", [1.0]),
        ("FP64", b"\0\0\0\0\0\0\xf0\x3f", [1.0]),
        ("BYTES", b"\2\0\0\0ab\0\0\0\0", [b"ab", b""]),
        ("BYTES", b"", []),
        ("FP32", b"", []),
    ],
)
def test_the_layout(datatype: str, data: bytes, values: list[Any]) -> None:
    """Each datatype has the bytes that the protocol gives it, in every kind of buffer."""
    for buffer in (data, bytearray(data), memoryview(data)):
        array = read_tensor(buffer, datatype, len(values), "x", REQUEST)
        assert array.tolist() == values
    if datatype != "BOOL":
        assert bytes(write_tensor(array)) == data


def test_any_shape_is_written_in_its_order() -> None:
    """Row by row; a scalar and an array of nothing have a form too."""
    array = np.arange(6, dtype="<i2").reshape(2, 3)
    assert bytes(write_tensor(array)) == b"\0\0\1\0\2\0\3\0\4\0\5\0"
    assert bytes(write_tensor(np.array(2, "<i2"))) == b"\2\0"
    assert bytes(write_tensor(np.zeros((0, 3), ml_dtypes.bfloat16))) == b""
    assert bytes(write_tensor(np.array([[b"a"], [b""]], object))) == b"\1\0\0\0a\0\0\0\0"


@given(elements=st.lists(st.binary(max_size=9), max_size=9))
def test_texts_are_exact_both_ways(elements: list[bytes]) -> None:
    """What is written is read again as the same elements."""
    array = np.array([*elements, None], object)[:-1]  # so that equal lengths do not become an array of bytes
    assert read(bytes(write_tensor(array)), "BYTES", len(elements)) == elements


def test_whose_request_it_is() -> None:
    """The id, or that there is none."""
    assert request_prefix(REQUEST) == "[request id: r7] "
    assert request_prefix(InferRequest("m", "", {})) == "[request id: <id_unknown>] "


def test_nesting_costs_what_its_elements_do() -> None:
    """One deep element among many does not have the others looked at once for each of its levels."""

    class Counting(list):  # type: ignore[type-arg]
        looks = 0

        def __iter__(self) -> Any:
            Counting.looks += 1
            return super().__iter__()

    deep: Any = [1]
    for _ in range(90):
        deep = [deep]
    many = Counting([*range(1000), deep])
    assert flatten(many, 96) == [*range(1000), 1]
    assert Counting.looks <= 2
    assert flatten([[[[1], [2]]], [[[3], [4]]]], 3) == [1, 2, 3, 4]
    assert flatten([], 0) == flatten([[], []], 1) == []


@pytest.mark.parametrize("data", [[[[1]]], [1, [[2]]], [[1], [[2]]]])
def test_nesting_has_a_limit(data: Any) -> None:
    assert flatten(data, 2) == sorted(flatten(data, 2))
    with pytest.raises(InvalidInput, match="JSON nesting depth exceeds maximum allowed limit"):
        flatten(data, 1)
