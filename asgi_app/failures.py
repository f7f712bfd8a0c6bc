"""STATUS: error -> status, one row for each. failure(): the one place where an error becomes an answer."""

import logging
import math

import orjson

from batching.errors import CannotMeetDeadline, DeadlineExceeded, OutOfMemory, QueueFull
from engine.errors import (
    Cancelled,
    DeviceLost,
    InvalidInput,
    LoadFailed,
    MethodNotAllowed,
    ModelError,
    NotFound,
    NotReady,
    TooLarge,
    TooSlow,
    Unimplemented,
    Unsupported,
)

from .messages import JSON, Response, Scope

STATUS: dict[type[BaseException], int] = {
    InvalidInput: 400,
    LoadFailed: 400,
    Cancelled: 400,
    NotFound: 404,
    MethodNotAllowed: 405,
    TooSlow: 408,
    TooLarge: 413,
    Unsupported: 415,
    QueueFull: 429,
    CannotMeetDeadline: 429,
    ModelError: 500,
    OutOfMemory: 500,
    Unimplemented: 501,
    NotReady: 503,
    DeviceLost: 503,
    DeadlineExceeded: 504,
}

logger = logging.getLogger("millrace")


def failure(scope: Scope, error: BaseException) -> Response:
    """What the caller is told of an error."""
    status = STATUS.get(type(error))
    text = str(error)
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if status is None:
        # As it came, percent-encoded: a decoded path could hold line breaks, and write lines of its own.
        logger.error("%s %r failed", scope["method"], scope.get("raw_path") or scope["path"], exc_info=error)
        status, text = 500, "internal error; the server's log says more"
    if isinstance(error, MethodNotAllowed):
        headers = ((b"allow", error.allow.encode()),)
        if scope["method"] == "OPTIONS":
            return Response(204, headers=headers)
    elif isinstance(error, QueueFull):
        headers = ((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))),)
    elif status == 415 and any(name == b"content-encoding" for name, _ in scope["headers"]):
        served = b"gzip, deflate" if scope["path"].endswith("/infer") else b"identity"
        headers = ((b"accept-encoding", served),)
    elif status == 503:
        headers = ((b"retry-after", b"1"),)
    # What the endpoint's own clients look for: the Open Inference Protocol's key, elsewhere the one of the web's.
    key = "error" if scope["path"].startswith("/v2") else "detail"
    return Response(status, orjson.dumps({key: text}), JSON, headers)
