"""How each peer is asked: where, in which JSON, and how its answer reads. One row per request, as clients send them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from .models import MODELS, Row

Floats = NDArray[np.float32]

JSON = {"content-type": "application/json"}


class Dialect(NamedTuple):
    """Attributes:
    path: where a model is asked, by its name.
    encode: the body that asks a model about a row, which may have a wrong number of numbers.
    decode: `y` out of the body of a good answer; raises ValueError, KeyError or TypeError for any other.
    """

    path: Callable[[str], str]
    encode: Callable[[str, Row], bytes]
    decode: Callable[[bytes], Floats]


def _numbers(row: Row) -> list[Any]:
    """As JSON has them: nested as the row is, and no longer than they need be."""
    numbers: list[Any] = (row if row.dtype.kind == "i" else row.astype(np.float64).round(2)).tolist()
    return numbers


def _open_inference(name: str, row: Row) -> bytes:
    data = _numbers(row.reshape(-1))
    tensor = {"name": "x", "shape": [1, *row.shape], "datatype": MODELS[name].datatype, "data": data}
    return orjson.dumps({"inputs": [tensor]})


def _open_inference_answer(body: bytes) -> Floats:
    (output,) = orjson.loads(body)["outputs"]
    return np.array(output["data"], np.float32)


def _plain(_: str, row: Row) -> bytes:
    return orjson.dumps({"x": _numbers(row)})


def _plain_answer(body: bytes) -> Floats:
    return np.array(orjson.loads(body)["y"], np.float32)


def _batch_of_one(_: str, row: Row) -> bytes:
    return orjson.dumps({"x": [_numbers(row)]})


def _batch_of_one_answer(body: bytes) -> Floats:
    (answer,) = orjson.loads(body)
    return np.array(answer, np.float32)


def plain(path: str) -> Dialect:
    """{"x": row} -> {"y": row}: what people write where the server leaves it to them."""
    return Dialect(lambda _: path, _plain, _plain_answer)


OPEN_INFERENCE = Dialect(lambda name: f"/v2/models/{name}/infer", _open_inference, _open_inference_answer)
BENTOML = Dialect(lambda _: "/predict", _batch_of_one, _batch_of_one_answer)
