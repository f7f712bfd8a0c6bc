"""Requests to the digits model whose right answer is known, and the check of what comes back."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from asgi_app.pictures import ink, open_picture

INFER = "/v2/models/digits/infer"
CLASSIFY = "/classify"
CLASSES = 10
LENGTH_HEADER = "inference-header-content-length"

FOLDER = Path(__file__).resolve().parent.parent / "models" / "digits" / "samples"
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}

Floats = NDArray[np.float32]


class Sample(NamedTuple):
    """A picture of a digit.

    Attributes:
        picture: the file's bytes.
        pixels: what the model gets for it, [1, 8, 8].
    """

    digit: int
    picture: bytes
    content_type: str
    pixels: Floats


class Post(NamedTuple):
    body: bytes
    headers: dict[str, str]


def read_samples() -> list[Sample]:
    """One for each digit, 0 to 9."""
    samples = []
    for path in sorted(FOLDER.iterdir()):
        picture = path.read_bytes()
        pixels = ink(open_picture(picture, 1_000_000), 8, 8)
        samples.append(Sample(int(path.stem), picture, TYPES[path.suffix], pixels))
    return samples


def json_post(samples: list[Sample]) -> Post:
    """An infer request with one row for each sample, everything as JSON."""
    rows = np.stack([sample.pixels for sample in samples])
    tensor = {"name": "pixels", "datatype": "FP32", "shape": rows.shape, "data": rows.reshape(-1)}
    body = orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Post(body, {"content-type": "application/json"})


def binary_post(samples: list[Sample]) -> Post:
    """The same with the tensors as raw bytes, in the request and in the answer."""
    rows = np.stack([sample.pixels for sample in samples])
    size = {"binary_data_size": rows.nbytes}
    tensor = {"name": "pixels", "datatype": "FP32", "shape": rows.shape, "parameters": size}
    output = {"name": "probabilities", "parameters": {"binary_data": True}}
    head = orjson.dumps({"inputs": [tensor], "outputs": [output]})
    return Post(head + rows.tobytes(), {"content-type": "application/octet-stream", LENGTH_HEADER: str(len(head))})


def read_json(body: bytes) -> Floats:
    """The probabilities in an answer.

    Raises:
        ValueError, KeyError, TypeError: it is no answer of this model.
    """
    (output,) = orjson.loads(body)["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def read_binary(body: bytes, header_length: str) -> Floats:
    """The same of a binary answer."""
    end = int(header_length)
    (output,) = orjson.loads(body[:end])["outputs"]
    if output["parameters"]["binary_data_size"] != len(body) - end:
        raise ValueError(f"{len(body) - end} bytes follow, {output} announces another number")
    return np.frombuffer(body, np.float32, offset=end).reshape(output["shape"])


def fault(probabilities: Floats, samples: list[Sample]) -> str:
    """What is wrong with the answer to `samples`, or an empty string."""
    if probabilities.shape != (len(samples), CLASSES):
        return f"shape {probabilities.shape} instead of {(len(samples), CLASSES)}"
    if not np.isfinite(probabilities).all() or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        return f"no probabilities: {probabilities.tolist()}"
    got, right = probabilities.argmax(axis=1).tolist(), [sample.digit for sample in samples]
    return "" if got == right else f"digits {got} instead of {right}"


def classify_fault(answer: dict[str, Any], sample: Sample) -> str:
    """What is wrong with the answer of POST /classify, or an empty string."""
    if answer["class_name"] != str(sample.digit):
        return f"digit {answer['class_name']!r} instead of {sample.digit}"
    if not 0 < answer["confidence"] <= 1.001 or answer["top"][0]["class_name"] != answer["class_name"]:
        return f"inconsistent: {answer}"
    return ""
