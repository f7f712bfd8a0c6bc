"""Trace and log settings over HTTP: the engine is asked, and answers or refuses."""

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from engine.errors import InvalidInput, Unimplemented
from tests.asgi_app.conftest import FrontOf
from tests.client import Client
from tests.forms import Unloaded

TRACE, MODEL, LOG = "/v2/trace/setting", "/v2/models/m/trace/setting", "/v2/logging"
SETTINGS = {TRACE: ("trace", ""), MODEL: ("trace", "m"), LOG: ("log", "")}


class FakeEngine(Unloaded):
    """Gives back what it was asked, or the error that it was told to raise."""

    error: Exception | None = None

    async def trace(self, model: str = "", changes: Mapping[str, object] | None = None) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"asked": "trace", "model": model, "changes": changes}

    async def log(self, changes: Mapping[str, object] | None = None) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"asked": "log", "model": "", "changes": changes}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine, front_of: FrontOf) -> Client:
    return await front_of(engine)


@pytest.mark.parametrize("path", SETTINGS)
async def test_settings_are_the_engines(path: str, client: Client) -> None:
    """What it answers is the answer, to a question and to a change, be it an empty one."""
    asked, model = SETTINGS[path]
    for method, body, changes in (
        ("GET", b"", None), ("POST", b"{}", {}), ("POST", b'{"a":[1,null]}', {"a": [1, None]}),
    ):  # fmt: skip
        answer = await client(method, path, body)
        assert (answer.status, answer.json) == (200, {"asked": asked, "model": model, "changes": changes})


@pytest.mark.parametrize("path", SETTINGS)
@pytest.mark.parametrize(
    ("body", "text"),
    [(b"", "failed to parse the request JSON buffer: "), (b"[]", "attempt to access JSON non-object as object")],
)
async def test_a_change_is_a_json_object(path: str, body: bytes, text: str, client: Client) -> None:
    """Anything else is refused in Triton's words."""
    answer = await client("POST", path, body)
    assert (answer.status, answer.error[: len(text)]) == (400, text)


@pytest.mark.parametrize("path", SETTINGS)
@pytest.mark.parametrize(("error", "status"), [(InvalidInput("no"), 400), (Unimplemented("not so"), 501)])
async def test_what_the_engine_refuses(
    path: str, error: Exception, status: int, client: Client, engine: FakeEngine
) -> None:
    """Its refusal, in its words."""
    engine.error = error
    for method in ("GET", "POST"):
        answer = await client(method, path, orjson.dumps({}))
        assert (answer.status, answer.error) == (status, str(error))
