"""Everything about models but inference: config, statistics, metrics, the repository, and shared memory.

The engine does the work; here is what it looks like over HTTP (PROTOCOL.md sections 1.6 to 1.8, 1.11, 1.14). Where
Triton answers 500 for a mistake in a request's JSON, it is 400 here, in the same words.
"""

import binascii
from typing import Any

import orjson

from engine.errors import InvalidInput, NotFound, Unimplemented
from engine.validate import typed

from .messages import JSON, Request, Response, read_body

PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"


async def read_object(request: Request, optional: bool = False) -> dict[str, Any]:
    """The body as a JSON object; if it is `optional`, an empty body is {}.

    Raises:
        InvalidInput: it is none; and whatever read_body raises.
    """
    body = await read_body(request)
    if optional and not body:
        return {}
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"failed to parse the request JSON buffer: {error}") from None
    return typed(dict, document)


def answer(value: object) -> Response:
    """200 with `value` as JSON."""
    return Response(200, orjson.dumps(value), JSON)


async def config(request: Request) -> Response:
    return answer(await request.engine.config(request.path["model"], request.path.get("version", "")))


async def statistics(request: Request) -> Response:
    found = await request.engine.statistics(request.path.get("model", ""), request.path.get("version", ""))
    return answer({"model_stats": found})


async def metrics(request: Request) -> Response:
    return Response(200, (await request.engine.metrics()).encode(), PROMETHEUS)


# The repository.


async def index(request: Request) -> Response:
    ready = (await read_object(request, optional=True)).get("ready", False)
    if type(ready) is not bool:
        raise InvalidInput("Invalid value for 'ready': expected a boolean")
    return answer([entry for entry in await request.engine.index() if not ready or entry.get("state") == "READY"])


async def load(request: Request) -> Response:
    name = request.path["model"]
    if not name.strip():
        raise InvalidInput("Model name cannot be empty. Please enter a valid name to deploy.")
    if "/" in name or ".." in name:
        raise InvalidInput(f"invalid model name '{name}', model name must not contain path traversal characters")
    model_config: str | None = None
    files: dict[str, bytes] = {}
    for key, value in (await _parameters(request)).items():
        if key == "config":
            model_config = typed(str, value)
        elif key.startswith("file:"):
            files[key.removeprefix("file:")] = _decode(key, typed(str, value))
        else:
            raise InvalidInput(
                f"unexpected error on creating Triton parameter: '{key[:200]}' is neither 'config' nor 'file:<path>'"
            )
    # Nothing is cancelled when the caller leaves: models are not left half loaded.
    await request.engine.load(name, model_config, files or None)
    return Response()


async def unload(request: Request) -> Response:
    dependents = typed(bool, (await _parameters(request)).get("unload_dependents", False))
    await request.engine.unload(request.path["model"], dependents)
    return Response()


async def in_repository(request: Request) -> Response:
    raise Unimplemented("'repository_name' specification is not supported")


async def _parameters(request: Request) -> dict[str, Any]:
    return typed(dict, (await read_object(request, optional=True)).get("parameters", {}))


def _decode(key: str, text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise InvalidInput(f"parameter '{key[:200]}' is not valid base64: {error}") from None


# Shared memory: of the system here, of GPUs not at all.


async def region_status(request: Request) -> Response:
    return answer(await request.engine.regions.status(request.path.get("region", "")))


async def register_region(request: Request) -> Response:
    if "region" not in request.path:
        raise InvalidInput("'region name' is necessary to register system shared memory region")
    wanted = await read_object(request)
    for field in ("key", "byte_size"):
        if field not in wanted:
            raise InvalidInput(f"Shared memory register request has no '{field}' field")
    key, byte_size = typed(str, wanted["key"]), typed(int, wanted["byte_size"])
    offset = typed(int, wanted.get("offset", 0))
    await request.engine.regions.register(request.path["region"], key, offset, byte_size)
    return Response()


async def unregister_region(request: Request) -> Response:
    await read_body(request)  # of which nothing is expected
    await request.engine.regions.unregister(request.path.get("region", ""))
    return Response()


async def cuda_region_status(request: Request) -> Response:
    name = request.path.get("region", "")
    if not name:
        return answer([])
    if any(region["name"] == name for region in await request.engine.regions.status()):
        raise NotFound(f"The region named '{name}' is registered as system shared memory, not CUDA shared memory")
    raise NotFound(f"Unable to find cuda shared memory region: '{name}'")


async def register_cuda_region(request: Request) -> Response:
    raise Unimplemented("CUDA shared memory is not served; use system shared memory, or send the tensors")


async def unregister_cuda_region(request: Request) -> Response:
    """There is none, so none is left: clients that unregister everything before they begin may do so."""
    await read_body(request)
    return Response()
