"""Loading one version: which lane runs it, what is refused before it is loaded, what a failure leaves behind."""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from engine import loading
from engine.config import parse_config
from engine.errors import ConfigError, ModelError
from engine.loading import available_memory, check_memory, row_bytes
from engine.types import Array, InferRequest
from tests.conftest import StartLocal
from tests.scripted import CONFIG, Gate, Scripted, add_model, double
from tests.timing import until


def request(name: str) -> InferRequest:
    return InferRequest(name, "", {"x": np.ones((1, 4), "<f4")})


async def test_models_of_one_device_share_its_lane(local_engine: StartLocal, tmp_path: Path) -> None:
    """A model that wants several copies there has a lane of its own for each but the first."""
    add_model(tmp_path, "b", CONFIG + "instance_group [ { count: 3 kind: KIND_CPU } ]")
    add_model(tmp_path, "a", CONFIG + "instance_group [ { kind: KIND_CPU } ]")
    engine = await local_engine(a=double, b=double)
    a, b = engine._models["a", "1"], engine._models["b", "1"]
    assert [lane.name for lane in a.lanes] == ["cpu"]
    assert b.lanes[0] is a.lanes[0]
    assert [lane.name for lane in b.own] == ["b_0_1", "b_0_2"]
    assert b.lanes[1:] == b.own


async def test_a_copy_runs_in_the_lane_that_took_the_batch(local_engine: StartLocal, tmp_path: Path) -> None:
    """While another model keeps the shared lane, the copy that has a lane of its own answers, in that lane's thread."""
    add_model(tmp_path, "a", CONFIG + "instance_group [ { kind: KIND_CPU } ]")
    add_model(tmp_path, "b", CONFIG + "instance_group [ { count: 2 kind: KIND_CPU } ]")
    gate, threads = Gate(), []

    def record(inputs: Mapping[str, Array]) -> dict[str, Array]:
        threads.append(threading.current_thread().name)
        return double(inputs)

    engine = await local_engine({"inline_ms": 0}, a=gate, b=record)
    gate.open.clear()
    threads.clear()
    held = asyncio.create_task(engine.infer(request("a")))
    await until(lambda: ("a", (1, 4)) in Scripted.calls)
    for _ in range(3):
        await engine.infer(request("b"))
    assert set(threads) == {"lane-b_0_1"}
    gate.open.set()
    await held


async def test_what_cannot_be_loaded_leaves_no_thread_behind(local_engine: StartLocal, tmp_path: Path) -> None:
    """Its own lanes end with it."""
    add_model(tmp_path, "m", CONFIG + "instance_group [ { count: 3 kind: KIND_CPU } ]")
    with pytest.raises(ModelError, match="gives no output 'y'"):
        await local_engine(m=lambda inputs: {})
    await until(lambda: not [each for each in threading.enumerate() if each.name.startswith("lane-m_")])


async def test_metadata_says_whether_a_request_may_be_sent_again(local_engine: StartLocal, tmp_path: Path) -> None:
    add_model(tmp_path, "never", CONFIG + 'parameters { key: "resend" value { string_value: "false" } }')
    engine = await local_engine(m=double, never=double)
    assert (engine.metadata("m").resend, engine.metadata("never").resend) == (True, False)


async def test_a_function_backend_is_not_for_repositories(local_engine: StartLocal, tmp_path: Path) -> None:
    add_model(tmp_path, "m", CONFIG.replace("pytorch", "function"))
    with pytest.raises(ConfigError, match="'function' is that of @model, not of a repository"):
        await local_engine()


def test_the_smallest_request_is_one_row_of_what_must_be_there() -> None:
    """A dimension of any size counts once, an optional input not at all, and a string as its place in an array."""
    text = """
    backend: "python" max_batch_size: 8
    input [ { name: "a" data_type: TYPE_FP32 dims: [ 3, -1 ] }, { name: "s" data_type: TYPE_STRING dims: [ 2 ] },
            { name: "o" data_type: TYPE_FP64 dims: [ 100 ] optional: true } ]
    output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
    """
    assert row_bytes(parse_config(text, "m", "f")) == 3 * 4 + 2 * 8


def test_memory_is_looked_at_before_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel says is available, in bytes; a folder is a model without weights of its own."""
    assert 1 << 20 < available_memory() < 1 << 62
    config = parse_config(CONFIG, "m", "f")
    (tmp_path / "file").write_bytes(bytes(8))
    monkeypatch.setattr(loading, "available_memory", lambda: 8)
    check_memory(tmp_path / "file", config)
    check_memory(tmp_path, config)
    monkeypatch.setattr(loading, "available_memory", lambda: 7)
    with pytest.raises(ConfigError, match="model 'm': file is 8 bytes, and 7 bytes of memory are available"):
        check_memory(tmp_path / "file", config)
