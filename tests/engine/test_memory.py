"""Out of memory: everybody is answered, and no batch is made that large again."""

import asyncio
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching import OutOfMemory
from engine.errors import ModelError
from engine.local import LocalEngine
from engine.types import Array, InferRequest
from tests.conftest import StartLocal
from tests.scripted import CONFIG, Scripted, add_model, double


class Small:
    """A model that runs out of memory above so many rows, from the moment that `room` is set."""

    def __init__(self, error: type[Exception] = OutOfMemory) -> None:
        self.room = 1 << 30
        self.error = error
        self.used: list[weakref.ref[Array]] = []

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert all(used() is None for used in self.used), "a failed batch still holds its memory"
        scratch = np.empty(len(inputs["x"]))
        self.used.append(weakref.ref(scratch))
        if len(inputs["x"]) > self.room:
            raise self.error("tried to allocate 20.00 MiB\nsecret second line")
        return double(inputs)


async def ask(engine: LocalEngine, count: int, rows: int = 1) -> list[Any]:
    """What becomes of requests that are all there before the lane looks."""
    requests = [InferRequest("m", "", {"x": np.full((rows, 4), n, "<f4")}) for n in range(count)]
    return await asyncio.gather(*map(engine.infer, requests), return_exceptions=True)


IN_A_THREAD = {"inline_ms": 0}


@pytest.mark.parametrize("error", [OutOfMemory, MemoryError])
@pytest.mark.parametrize("settings", [{"inline_ms": 1000}, IN_A_THREAD], ids=["inline", "in a thread"])
async def test_a_batch_that_does_not_fit_is_answered_in_parts(
    settings: dict[str, Any], error: type[Exception], local_engine: StartLocal
) -> None:
    """All 32 get their answers from batches that fit, and so do the next 32, at the first try."""
    model = Small(error)
    engine = await local_engine(settings, m=model)
    model.room = 5
    for turn in range(2):
        Scripted.calls.clear()
        answers = await ask(engine, 32)
        assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [2.0 * n for n in range(32)]
        sizes = [rows for _, (rows, _) in Scripted.calls]
        assert max(sizes) == (4 if turn else 32)
        assert sum(rows for rows in sizes if rows <= 5) == 32
    report = await engine.batching("m")
    assert report["cost"]["largest"] == 4
    assert report["batches"]["split"] == 1


async def test_a_request_that_does_not_fit_alone_fails_alone(
    local_engine: StartLocal, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets one line that says so; what shared its batch is answered; the log has a line, and no traceback."""
    model = Small()
    engine = await local_engine(m=model)
    model.room = 5
    caplog.set_level(logging.WARNING)
    small = [InferRequest("m", "", {"x": np.full((1, 4), n, "<f4")}) for n in range(3)]
    large = InferRequest("m", "", {"x": np.ones((8, 4), "<f4")})
    *answers, error = await asyncio.gather(*map(engine.infer, [*small, large]), return_exceptions=True)
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [0.0, 2.0, 4.0]  # type: ignore[union-attr]
    assert isinstance(error, OutOfMemory)
    assert str(error) == "model 'm' ran out of memory on this request"
    assert "model m version 1: out of memory with 8 rows" in caplog.messages
    assert "Traceback" not in caplog.text


async def test_a_grid_of_rows_stays_a_grid(local_engine: StartLocal, tmp_path: Path) -> None:
    """With `padded_rows` the parts of a batch that did not fit have rows of the grid too."""
    add_model(tmp_path, "m", CONFIG + 'parameters { key: "padded_rows" value { string_value: "2 8 32" } }')
    model = Small()
    engine = await local_engine(m=model)
    model.room = 8
    for grid in ({2, 8, 32}, {2, 8}):
        Scripted.calls.clear()
        assert not [answer for answer in await ask(engine, 30) if isinstance(answer, Exception)]
        assert {rows for _, (rows, _) in Scripted.calls} <= grid


@pytest.mark.parametrize("error", [OutOfMemory, MemoryError])
async def test_a_model_whose_largest_batch_does_not_fit_is_not_served(
    error: type[Exception], local_engine: StartLocal
) -> None:
    """Found while warming up, it ends the start, and names the model and the rows."""
    model = Small(error)
    model.room = 31
    with pytest.raises(ModelError, match="^model 'm' ran out of memory on a batch of 32 rows$"):
        await local_engine(m=model)
