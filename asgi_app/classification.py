"""Triton's classification extension: the best classes of an output instead of its numbers (PROTOCOL.md 3.1). Pure."""

from collections.abc import Sequence

import numpy as np

from engine.errors import InvalidInput
from engine.types import Array

MAX_ELEMENTS = 1_000_000  # of one row


def classify(array: Array, datatype: str, count: int, labels: Sequence[str], batched: bool) -> Array:
    """The `count` highest elements of each row, the highest first; of equal ones the one with the lower index.

    Args:
        array: shape (rows, ...) if `batched`, else one row of any shape; a row's dimensions are one axis of classes.
        datatype: the array's; an integer one, FP32 or FP64.
        labels: by class; there may be fewer of them than classes.

    Returns:
        Shape (rows, min(count, classes)), or (min(count, classes),), of BYTES: `value:class` or `value:class:label`,
        where a floating-point value has six decimals.

    Raises:
        InvalidInput: another datatype, or more than MAX_ELEMENTS classes.
    """
    if array.dtype.kind not in "iuf" or datatype == "FP16":
        raise InvalidInput(f"class result not available for output due to unsupported type '{datatype}'")
    rows = array.shape[0] if batched and array.ndim else 1
    classes = array.size // rows if rows else 0
    if classes > MAX_ELEMENTS:
        raise InvalidInput(f"classification output tensor too large: {classes} classes, at most {MAX_ELEMENTS}")
    table = array.reshape(rows, classes)
    # Ascending and stable from the back, and that from the back: descending and stable, whatever the datatype.
    ranked = classes - 1 - np.argsort(table[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :count]
    values = np.take_along_axis(table, ranked, axis=1)
    form = "%f:%d%s" if array.dtype.kind == "f" else "%d:%d%s"
    suffix = [f":{label}" if label else "" for label in labels]
    texts = [
        (form % (value, index, suffix[index] if index < len(suffix) else "")).encode()
        for value, index in zip(values.ravel().tolist(), ranked.ravel().tolist(), strict=True)
    ]
    return np.array(texts, object).reshape(ranked.shape if batched else ranked.shape[1:])
