"""For tests of the application: the servers that they run on besides memory, and engines of their own."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from engine.settings import Settings
from engine.types import Engine
from tests.client import Client
from tests.conftest import InForm
from tests.forms import FORMS
from tests.servers import SERVERS

FrontOf = Callable[..., Awaitable[Client]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What takes a form of the service takes those with a server as well, unless it is marked, with the reason."""
    named = (mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    own = {name for names in named for name in (names.split(",") if isinstance(names, str) else names)}
    if "form" in metafunc.fixturenames and "form" not in own:  # a picture's, for example
        marker = metafunc.definition.get_closest_marker("in_memory")
        assert marker is None or marker.args[0], "the reason is missing"
        forms = FORMS if marker is not None else (*FORMS, *SERVERS)
        metafunc.parametrize("form", forms, indirect=True, scope="module")


@pytest.fixture(scope="module")
def form(request: pytest.FixtureRequest) -> str:
    """Of the service; a module's tests run in one of them after the other."""
    return str(request.param)


@pytest.fixture
def front_of(put_in_form: InForm) -> FrontOf:
    """front_of(engine, settings...): a client of the application in front of it, in each form of the service."""

    async def make(engine: object, **more: Any) -> Client:
        settings = Settings(**more)
        return Client(await put_in_form(cast("Engine", engine), settings), settings)

    return make
