"""An error becomes an answer in one place: each class has a status, and what a client needs to go on."""

import logging
from typing import Any

import orjson
import pytest

from asgi_app.failures import STATUS, failure
from batching import errors as queue_errors
from batching.errors import CannotMeetDeadline, DeadlineExceeded, OutOfMemory, QueueFull
from engine import errors
from engine.errors import (
    Cancelled,
    ConfigError,
    DeviceLost,
    EngineError,
    InvalidInput,
    LoadFailed,
    MethodNotAllowed,
    ModelError,
    NotFound,
    NotReady,
    RequestError,
    ServiceError,
    TooLarge,
    TooSlow,
    Unimplemented,
    Unsupported,
)

SCOPE: dict[str, Any] = {
    "method": "POST", "path": "/v2/models/m/infer", "raw_path": b"/v2/models/m%0A/infer", "headers": [],
}  # fmt: skip

# Every error that a client may meet -> its status, and the headers that go with it.
ERRORS: list[tuple[Exception, int, dict[bytes, bytes]]] = [
    (InvalidInput("why"), 400, {}),
    (LoadFailed("why"), 400, {}),
    (Cancelled("why"), 400, {}),
    (NotFound("why"), 404, {}),
    (MethodNotAllowed("why", "GET, HEAD"), 405, {b"allow": b"GET, HEAD"}),
    (TooSlow("why"), 408, {}),
    (TooLarge("why"), 413, {}),
    (Unsupported("why"), 415, {}),
    (QueueFull("why", 2.1), 429, {b"retry-after": b"3"}),
    (CannotMeetDeadline("why", 0.0), 429, {b"retry-after": b"1"}),
    (ModelError("why"), 500, {}),
    (OutOfMemory("why"), 500, {}),
    (Unimplemented("why"), 501, {}),
    (NotReady("why"), 503, {b"retry-after": b"1"}),
    (DeviceLost("why"), 503, {b"retry-after": b"1"}),
    (DeadlineExceeded("why"), 504, {}),
]
# Which nobody raises for a request: the roots, and what an operator meets at start.
OTHERS = {EngineError, RequestError, ServiceError, ConfigError}


def classes() -> set[type[BaseException]]:
    """Every class of both packages' errors."""
    return {
        each
        for module in (errors, queue_errors)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, BaseException) and each.__module__ == module.__name__
    }


def test_every_error_has_a_status() -> None:
    """Whoever adds a class of errors says what a client is told of it; and each row is of a class that there is."""
    assert {type(error) for error, _, _ in ERRORS} == set(STATUS) == classes() - OTHERS


@pytest.mark.parametrize(("error", "status", "headers"), ERRORS, ids=lambda value: type(value).__name__)
def test_what_a_client_is_told(error: Exception, status: int, headers: dict[bytes, bytes]) -> None:
    """The status, the error's own text under the protocol's key, and when or how to try again."""
    answer = failure(SCOPE, error)
    assert (answer.status, dict(answer.headers), answer.content_type) == (status, headers, b"application/json")
    assert orjson.loads(answer.body) == {"error": "why"}
    assert orjson.loads(failure({**SCOPE, "path": "/classify"}, error).body) == {"detail": "why"}


@pytest.mark.parametrize(
    ("path", "headers", "accepted"),
    [
        ("/v2/models/m/infer", [(b"content-encoding", b"br")], b"gzip, deflate"),
        ("/classify", [(b"content-encoding", b"gzip")], b"identity"),
        ("/classify", [(b"content-type", b"text/plain")], None),
    ],
)
def test_which_codings_are_taken(path: str, headers: list[tuple[bytes, bytes]], accepted: bytes | None) -> None:
    """Whose coding is not served is told which are; whose media type is not has no use for that."""
    answer = failure({**SCOPE, "path": path, "headers": headers}, Unsupported("why"))
    assert dict(answer.headers).get(b"accept-encoding") == accepted


def test_options() -> None:
    """It asks which methods there are, and that is what it is told: it is no error."""
    answer = failure({**SCOPE, "method": "OPTIONS"}, MethodNotAllowed("why", "POST"))
    assert (answer.status, answer.body, answer.content_type) == (204, b"", b"")
    assert answer.headers == ((b"allow", b"POST"),)


@pytest.mark.parametrize(
    "error", [ValueError("secret"), ConfigError("secret"), KeyError("secret"), EngineError("secret")]
)
def test_what_nobody_foresaw(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """The client hears nothing of it, the operator all: on one line, whatever the path holds, and the traceback."""
    with caplog.at_level(logging.ERROR, "millrace"):
        answer = failure(SCOPE, error)
    assert (answer.status, answer.headers) == (500, ())
    assert orjson.loads(answer.body) == {"error": "internal error; the server's log says more"}
    (record,) = caplog.records
    assert record.getMessage() == "POST b'/v2/models/m%0A/infer' failed"
    assert record.exc_info is not None
    assert record.exc_info[1] is error
