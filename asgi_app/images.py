"""POST /classify: a picture in, its class out."""

import asyncio
from difflib import get_close_matches
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import orjson
from multipart import MultipartError, PushMultipartParser, parse_options_header
from PIL import Image

from engine.errors import InvalidInput, ModelError
from engine.types import Array, InferRequest

from .messages import JSON, Request, Response, deadline, read_body, while_connected
from .pictures import ink, open_picture

# Pictures up to this many pixels are decoded on the event loop: handing them to a thread takes longer.
INLINE_PIXELS = 128 * 128


async def classify(request: Request) -> Response:
    """Classify one picture: the raw body, or the multipart field `file`.

    Query: `top_k` (1 to the number of classes, default 5), `threshold` (0 to 1, default 0: below it, no class).
    """
    model = request.settings.classifier
    metadata = request.engine.metadata(model)
    (tensor,), (output,) = metadata.inputs.values(), metadata.outputs.values()
    top_k, threshold = _options(request.scope["query_string"], output.shape[-1])
    until = deadline(request)
    body = await read_body(request)
    picture = open_picture(_picture(request.headers.get(b"content-type", b""), body), request.settings.max_pixels)

    async def probabilities() -> Array:
        pixels = await _ink(picture, *tensor.shape[-2:])
        query = InferRequest(model, "", {tensor.name: pixels[np.newaxis]}, deadline=until)
        row: Array = (await request.engine.infer(query)).outputs[output.name][0]
        return row

    answer = _answer(await while_connected(request, probabilities()), output.labels, top_k, threshold)
    return Response(200, orjson.dumps(answer), JSON)


def _answer(probabilities: Array, labels: tuple[str, ...], top_k: int, threshold: float) -> dict[str, Any]:
    if not np.isfinite(probabilities).all():
        raise ModelError("the classifier answered with a number that is no probability")
    ranked = np.argsort(-probabilities, kind="stable")[:top_k]
    top = [
        {"class_name": labels[index] if index < len(labels) else str(index), "confidence": float(probabilities[index])}
        for index in ranked
    ]
    best, confidence = top[0], float(probabilities[ranked[0]])
    if confidence >= threshold:
        return {**best, "top": top}
    reason = f"no class reaches the threshold of {threshold:g}"
    return {"class_name": None, "confidence": confidence, "top": top, "reason": reason}


async def _ink(picture: Image.Image, height: int, width: int) -> Array:
    if picture.width * picture.height <= INLINE_PIXELS:
        return ink(picture, height, width)
    return await asyncio.to_thread(ink, picture, height, width)


def _options(query: bytes, classes: int) -> tuple[int, float]:
    values = {"top_k": str(min(5, classes)), "threshold": "0"}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in values:
            close = get_close_matches(name, values, n=1)
            raise InvalidInput(f"{name}: no such query parameter; there are {' and '.join(values)}"
                               + (f"; did you mean {close[0]}?" if close else ""))  # fmt: skip
        values[name] = value
    top_k, threshold = values["top_k"], values["threshold"]
    if not (top_k.isdecimal() and top_k.isascii() and len(top_k) < 10 and 1 <= int(top_k) <= classes):
        raise InvalidInput(f"top_k: must be a whole number from 1 to {classes}, got {top_k!r}")
    try:
        limit = float(threshold)
    except ValueError:
        limit = -1.0
    if not 0 <= limit <= 1:
        raise InvalidInput(f"threshold: must be a number from 0 to 1, got {threshold!r}")
    return int(top_k), limit


def _picture(content_type: bytes, body: bytes | bytearray) -> bytes:
    """The picture's bytes: of the multipart field `file`, or the body itself."""
    kind, options = parse_options_header(content_type.decode("latin-1"))
    if kind != "multipart/form-data":
        return bytes(body)
    found: bytearray | None = None
    try:
        inside = False
        # A picture is one part among few; the bounds are there for those who send a million empty ones.
        with PushMultipartParser(options.get("boundary", ""), max_segment_count=32) as parser:
            for event in parser.parse(body):
                if event is None:
                    inside = False
                elif isinstance(event, bytes | bytearray):
                    if inside and found is not None:
                        found += event
                elif event.name == "file":
                    if found is not None:
                        raise InvalidInput("file: the form has more than one field of this name")
                    inside, found = True, bytearray()
    except MultipartError as error:
        raise InvalidInput(f"the multipart body is malformed: {error}") from None
    if found is None:
        raise InvalidInput("file: the form has no field of this name; put the picture there")
    return bytes(found)
