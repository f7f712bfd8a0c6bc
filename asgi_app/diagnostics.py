"""What a running service is told to write about itself: trace and log settings over HTTP (PROTOCOL.md 1.12 and 1.13).

The engine has them, so that all processes in front of one have the same.
"""

from .control import answer, read_object
from .messages import Request, Response


async def trace(request: Request) -> Response:
    return answer(await request.engine.trace(request.path.get("model", "")))


async def update_trace(request: Request) -> Response:
    return answer(await request.engine.trace(request.path.get("model", ""), await read_object(request)))


async def log(request: Request) -> Response:
    return answer(await request.engine.log())


async def update_log(request: Request) -> Response:
    return answer(await request.engine.log(await read_object(request)))
