"""Both servers on a repository of their own, for each module once."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import repository
from .cases import MEMORY
from .exchange import SHARED
from .servers import Pair, start_pair


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """What the module's PAIR says (its control mode, the models at start, or all that there are), running."""
    control, names = getattr(request.module, "PAIR", ("explicit", None))
    memory = SHARED / MEMORY
    with tempfile.TemporaryDirectory(prefix="differential-") as folder:
        root, logs = Path(folder, "models"), Path(folder, "logs")
        logs.mkdir()
        repository.build(root, names and [*names, *LATER])
        memory.write_bytes(bytes(range(256)) * 32)
        try:
            with start_pair(root, logs, control, list(names or repository.loaded())) as pair:
                yield pair
        finally:
            memory.unlink()


# Not loaded at the start, but for the requests to load; where the control mode is none, all that is there is loaded.
LATER = ("later",)
