"""The folder in which the end-to-end tests start things."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .processes import checkout


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Like the checkout, for this module alone."""
    with checkout() as path:
        yield path
