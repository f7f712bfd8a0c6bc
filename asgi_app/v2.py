"""Open Inference Protocol handlers (PROTOCOL.md section 1)."""

import orjson

from engine.errors import NotReady

from .messages import JSON, Request, Response, client, deadline, read_body, while_connected
from .v2_codec import decode_request, encode_response

EXTENSIONS = ["binary_tensor_data"]
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
    return Response(200, orjson.dumps({"name": "millrace", "version": VERSION, "extensions": EXTENSIONS}), JSON)


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
    request.engine.metadata(request.path["model"], request.path.get("version", ""))
    return await ready(request)


async def batching(request: Request) -> Response:
    """Ours: what the model's queue does, and why."""
    report = request.engine.batching(request.path["model"], request.path.get("version", ""))
    return Response(200, orjson.dumps(report), JSON)


async def infer(request: Request) -> Response:
    until = deadline(request)
    body = await read_body(request)
    name, version = request.path["model"], request.path.get("version", "")
    request.engine.check_room(name, version)
    wanted = decode_request(
        name,
        version,
        body,
        request.headers.get(b"inference-header-content-length"),
    )
    wanted.request.deadline = until
    if header := request.settings.client_header:
        wanted.request.client = client(request, header)
    response = await while_connected(request, request.engine.infer(wanted.request))
    answer, header_length = encode_response(response, wanted)
    if header_length:
        return Response(200, answer, OCTETS, ((b"inference-header-content-length", b"%d" % header_length),))
    return Response(200, answer, JSON)
