"""For tests of the application whose engine is one of their own."""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from engine.settings import Settings
from engine.types import Engine
from tests.client import Client
from tests.conftest import InForm

FrontOf = Callable[..., Awaitable[Client]]


@pytest.fixture
def front_of(put_in_form: InForm) -> FrontOf:
    """front_of(engine, settings...): a client of the application in front of it, in each form of the service."""

    async def make(engine: object, **more: Any) -> Client:
        settings = Settings(**more)
        return Client(await put_in_form(cast("Engine", engine), settings), settings)

    return make
