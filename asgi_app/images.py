"""POST /classify: a picture in, its class out."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import orjson
from multipart import MultipartError, ParserLimitReached, PushMultipartParser, parse_options_header

from batching.errors import QueueFull
from engine.errors import ConfigError, InvalidInput, ModelError, NotFound, NotReady, TooLarge
from engine.settings import FIELDS, Settings
from engine.types import Array, Engine, InferRequest, TensorSpec

from .messages import JSON, Request, Response, client, deadline, read_body, while_connected
from .pictures import ink, open_picture

logger = logging.getLogger("millrace")

# Parts of a form: a picture is one among few.
MOST_PARTS = 32

# A picture up to these sizes is read on the event loop: handing it to a thread takes longer than that.
INLINE_BYTES = 16 << 10
INLINE_PIXELS = 128 * 128

# Larger ones are read here: on few threads, so that the event loop and the models get their share of the cores, and
# with a bound on those that wait, since a picture that is being read cannot be stopped.
MOST_PICTURES = 64
_pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pictures")
_reading = 0


async def classify(request: Request) -> Response:
    """Classify one picture: the raw body, or the multipart field `file`.

    Query: `top_k` (1 to the number of classes, default 5), `threshold` (0 to 1, default 0: below it, no class).
    """
    tensor, output = classifier(request.engine, request.settings)
    top_k, threshold = _options(request.scope["query_string"], output.shape[-1])
    until = deadline(request)
    body = await read_body(request)
    request.engine.check_room(request.settings.classifier, "")
    encoded = _picture(request.headers.get(b"content-type", b""), body)
    if len(encoded) > request.settings.max_picture:
        limit = request.settings.max_picture
        raise TooLarge(f"picture: {len(encoded)} bytes, at most {limit} are taken (MILLRACE_MAX_PICTURE)")

    async def probabilities() -> Array:
        pixels = await _read(request, encoded, *tensor.shape[-2:])
        query = InferRequest(request.settings.classifier, "", {tensor.name: pixels[np.newaxis]}, deadline=until)
        if header := request.settings.client_header:
            query.client = client(request, header)
        row: Array = (await request.engine.infer(query)).outputs[output.name][0]
        return row

    answer = _answer(await while_connected(request, probabilities()), output.labels, top_k, threshold)
    return Response(200, orjson.dumps(answer), JSON)


def classifier(engine: Engine, settings: Settings) -> tuple[TensorSpec, TensorSpec]:
    """The input and the output of the model that classifies.

    Raises:
        NotFound: there is none, or not in this repository.
        ConfigError: it takes something else than pictures of one channel, or gives something else than probabilities.
    """
    model = settings.classifier
    if not model:
        raise NotFound("no model classifies here (MILLRACE_CLASSIFIER)")
    metadata = engine.metadata(model)
    inputs, outputs = list(metadata.inputs.values()), list(metadata.outputs.values())
    takes = [(spec.datatype, len(spec.shape), spec.shape[1:2], -1 in spec.shape[1:]) for spec in inputs]
    gives = [(spec.datatype, len(spec.shape)) for spec in outputs]
    if not metadata.max_batch_size or takes != [("FP32", 4, (1,), False)] or gives != [("FP32", 2)]:
        raise ConfigError(
            f"MILLRACE_CLASSIFIER: model '{model}' does not classify pictures: it must batch, take one FP32 input "
            "with dims [1, height, width] and give one FP32 output with dims [classes]; name another, or none"
        )
    return inputs[0], outputs[0]


def check_classifier(engine: Engine, settings: Settings) -> None:
    """At start. A repository without the default model is fine, one without the model that was asked for is not.

    Of an engine that is not there yet nothing is known.

    Raises:
        ConfigError.
    """
    try:
        classifier(engine, settings)
    except NotReady:
        return
    except NotFound as error:
        if settings.classifier not in ("", FIELDS["classifier"].default):
            raise ConfigError(f"MILLRACE_CLASSIFIER: {error}") from None
        if settings.classifier:
            logger.info(
                "no model '%s': POST /classify will answer 404; MILLRACE_CLASSIFIER names another", settings.classifier
            )


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


async def _read(request: Request, encoded: bytes, height: int, width: int) -> Array:
    """The ink of a picture, read where it keeps nobody waiting.

    Raises:
        QueueFull: as many pictures as may are being read, or wait for it.
    """
    global _reading
    most = request.settings.max_pixels
    if len(encoded) <= INLINE_BYTES:
        picture = open_picture(encoded, most)
        if picture.width * picture.height <= INLINE_PIXELS:
            return ink(picture, height, width)
    if _reading >= MOST_PICTURES:
        raise QueueFull(f"{MOST_PICTURES} large pictures are being read, no room for another", retry_after=1)
    _reading += 1
    reading = request.loop.run_in_executor(_pool, lambda: ink(open_picture(encoded, most), height, width))
    reading.add_done_callback(_read_one)
    return await asyncio.shield(reading)


def _read_one(reading: asyncio.Future[Array]) -> None:
    global _reading
    _reading -= 1
    if not reading.cancelled():
        reading.exception()  # its caller may have left: then nobody else looks at it


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
        with PushMultipartParser(options.get("boundary", ""), max_segment_count=MOST_PARTS) as parser:
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
    except ParserLimitReached:
        raise InvalidInput(f"the form has more than {MOST_PARTS} parts, or a part's header is too long") from None
    except MultipartError as error:
        raise InvalidInput(f"the multipart body is malformed: {error}") from None
    if found is None:
        raise InvalidInput("file: the form has no field of this name; put the picture there")
    return bytes(found)
