"""Open Inference Protocol handlers (PROTOCOL.md section 1)."""

import asyncio

import orjson

from engine.errors import NotReady

from .compression import CODINGS
from .messages import (
    JSON,
    Request,
    Response,
    client,
    compressed,
    deadline,
    decompressed,
    forwarded,
    read_body,
    while_connected,
)
from .v2_codec import decode_request, encode_response

# What is served, in Triton's order; shared memory only where it is enabled.
EXTENSIONS = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
VERSION = "0.1.0"
OCTETS = b"application/octet-stream"


async def live(request: Request) -> Response:
    if not request.engine.live():
        raise NotReady("the inference lane does not answer")
    return Response()


async def ready(request: Request) -> Response:
    if not request.engine.ready():
        raise NotReady("the service is draining" if request.engine.draining else "the models are not ready")
    return Response()


async def server(request: Request) -> Response:
    shared = request.settings.shared_memory
    served = [extension for extension in EXTENSIONS if shared or extension != "system_shared_memory"]
    return Response(200, orjson.dumps({"name": "millrace", "version": VERSION, "extensions": served}), JSON)


async def model(request: Request) -> Response:
    version = request.path.get("version", "")
    metadata = request.engine.metadata(request.path["model"], version)
    answer: dict[str, object] = {
        "name": metadata.name,
        "versions": [version] if version else metadata.versions,
        "platform": metadata.platform,
    }
    for key, specs in (("inputs", metadata.inputs), ("outputs", metadata.outputs)):
        answer[key] = [{"name": s.name, "datatype": s.datatype, "shape": s.shape} for s in specs.values()]
    return Response(200, orjson.dumps(answer), JSON)


async def model_ready(request: Request) -> Response:
    answers = await request.engine.model_ready(request.path["model"], request.path.get("version", ""))
    if request.engine.draining:
        raise NotReady("the service is draining")
    if not answers:
        raise NotReady("Model version not ready")
    return Response()


async def batching(request: Request) -> Response:
    """Ours: what the model's queue does, and why."""
    report = await request.engine.batching(request.path["model"], request.path.get("version", ""))
    return Response(200, orjson.dumps(report), JSON)


async def infer(request: Request) -> Response:
    until = deadline(request)
    headers, engine, settings = request.headers, request.engine, request.settings
    body: bytes | bytearray = await read_body(request, CODINGS)
    name, version = request.path["model"], request.path.get("version", "")
    engine.check_room(name, version)
    if b"content-encoding" in headers:
        body = await decompressed(request, body)
    wanted = decode_request(engine, name, version, body, headers.get(b"inference-header-content-length"))
    wanted.request.deadline = until
    if header := settings.client_header:
        wanted.request.client = client(request, header)
    if pattern := settings.forward_headers:
        wanted.request.parameters.update(forwarded(request, pattern))
    metadata = engine.metadata(name, version) if wanted.classes else None
    response = await while_connected(request, engine.infer(wanted.request))
    if metadata is None:
        written, header_length = encode_response(response, wanted)
    else:  # ranking and writing a million classes takes a while
        written, header_length = await asyncio.to_thread(encode_response, response, wanted, metadata)
    whole = answer(written, header_length)
    if b"accept-encoding" in headers:
        written, coding = await compressed(request, written)
        whole = whole._replace(body=written, headers=whole.headers + coding)
    return whole


def answer(body: bytes, header_length: int) -> Response:
    """What `encode_response` returns, as an answer."""
    if not header_length:
        return Response(200, body, JSON)
    return Response(200, body, OCTETS, ((b"inference-header-content-length", b"%d" % header_length),))
