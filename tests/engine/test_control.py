"""Models come, change and go while others are served: no request fails, nothing half-loaded stays, memory is let go."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import loading
from engine.errors import ConfigError, InvalidInput, LoadFailed, NotFound, NotReady
from engine.loading import Loader
from engine.local import LocalEngine
from engine.model import LocalModel
from engine.settings import Settings
from engine.types import Array, InferRequest
from tests.scripted import CONFIG, Gate, Scripted, add_model
from tests.timing import settle, until

Start = Callable[..., Awaitable[LocalEngine]]


def times(factor: float) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    return lambda inputs: {"y": inputs["x"] * np.float32(factor)}


def request(version: str = "", value: float = 1.0, name: str = "m") -> InferRequest:
    return InferRequest(name, version, {"x": np.full((1, 4), value, "<f4")})


async def ask(engine: LocalEngine, version: str = "", name: str = "m") -> float:
    return float((await engine.infer(request(version, name=name))).outputs["y"][0, 0])


def touch(root: Path, name: str = "m", config: str = CONFIG, versions: tuple[str, ...] = ("1",)) -> None:
    """Change something in a model's folder."""
    add_model(root, name, config + f"\n# {len((root / name / 'config.pbtxt').read_text())}", versions)


@pytest.fixture
async def start(scripted: type[Scripted], tmp_path: Path) -> AsyncIterator[Start]:
    """start(**settings): an engine under control of its callers, on the repository in tmp_path."""
    engines = []

    async def make(**settings: Any) -> LocalEngine:
        chosen = {"models": str(tmp_path), "model_control": "explicit", "load_models": "*", **settings}
        engine = LocalEngine(Settings(**chosen))
        engines.append(engine)
        await engine.start()
        return engine

    yield make
    for gate in Gate.all:
        gate.open.set()
    for engine in engines:
        await engine.stop()


async def test_only_what_was_asked_for_is_loaded(start: Start, tmp_path: Path) -> None:
    """With explicit control nothing is, but for the models that the setting names."""
    for name in "ab":
        add_model(tmp_path, name)
    engine = await start(load_models="b")
    assert await engine.index() == [{"name": "a"}, {"name": "b", "version": "1", "state": "READY"}]
    with pytest.raises(NotFound, match="Request for unknown model: 'a' is not found"):
        engine.metadata("a")
    await engine.load("a")
    assert await ask(engine, name="a") == 2.0
    with pytest.raises(ConfigError, match="model 'c' is in no repository .MILLRACE_LOAD_MODELS."):
        await start(load_models="b, c")


@pytest.mark.parametrize("mode", ["none", "poll"])
async def test_only_explicit_control_takes_orders(start: Start, tmp_path: Path, mode: str) -> None:
    """The answer is Triton's, a 503."""
    add_model(tmp_path, "m")
    engine = await start(model_control=mode)
    for order in (engine.load("m"), engine.unload("m")):
        with pytest.raises(NotReady, match="explicit model load / unload is not allowed if polling is enabled"):
            await order
    assert await ask(engine) == 2.0


async def test_a_model_that_is_not_there_cannot_be_loaded(start: Start, tmp_path: Path) -> None:
    """Nor can one whose config is bad; what was served before is served on."""
    add_model(tmp_path, "m")
    engine = await start()
    with pytest.raises(
        LoadFailed, match="failed to load 'x', failed to poll from model repository: no repository has it"
    ):
        await engine.load("x")
    (tmp_path / "m" / "config.pbtxt").write_text("nonsense: 1")
    with pytest.raises(LoadFailed, match="failed to load 'm', failed to poll from model repository: .*no field named"):
        await engine.load("m")
    assert await ask(engine) == 2.0
    assert await engine.index() == [{"name": "m", "version": "1", "state": "READY"}]


async def test_a_load_without_a_change_does_nothing(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "m")
    engine = await start()
    before = engine._models["m", "1"]
    await engine.load("m")
    assert engine._models["m", "1"] is before
    touch(tmp_path)
    await engine.load("m")
    assert engine._models["m", "1"] is not before


async def test_requests_under_way_are_answered_by_the_version_they_came_to(
    start: Start, scripted: type[Scripted], tmp_path: Path
) -> None:
    """While a reload takes place the old copy serves, until the new one is ready; then it finishes, and is let go."""
    add_model(tmp_path, "m")
    gate = Gate()
    scripted.behaviours["m"] = gate
    engine = await start(inline_ms=0)
    gate.open.clear()
    runs = len(scripted.calls)
    first = asyncio.create_task(ask(engine))
    await until(lambda: len(scripted.calls) > runs)
    scripted.behaviours["m"] = times(5)
    touch(tmp_path)
    old = weakref.ref(engine._models["m", "1"].model)
    loading_it = asyncio.create_task(engine.load("m"))
    await settle()
    assert not first.done()
    gate.open.set()
    await loading_it
    assert await ask(engine) == 5.0
    assert await first == 2.0
    await until(lambda: not engine._retiring)
    gc.collect()
    assert old() is None


async def test_a_reload_under_load_fails_no_request(start: Start, scripted: type[Scripted], tmp_path: Path) -> None:
    """Ten reloads while callers ask without a pause: each gets an answer of one copy or the next, never an error."""
    add_model(tmp_path, "m")
    engine = await start()
    answers: list[float] = []
    stop = False

    async def caller() -> None:
        while not stop:
            answers.append(await ask(engine))
            await asyncio.sleep(0)

    callers = [asyncio.create_task(caller()) for _ in range(8)]
    await until(lambda: 2.0 in answers)
    for number in range(3, 13):
        scripted.behaviours["m"] = times(number)
        touch(tmp_path)
        await engine.load("m")
        assert await ask(engine) == number
    stop = True
    await asyncio.gather(*callers)
    assert set(answers) >= {2.0, 12.0}
    assert answers == sorted(answers)
    await until(lambda: not engine._retiring)
    assert len(engine._loader.lanes) == 1
    assert len(next(iter(engine._loader.lanes.values()))._batchers) == 1


async def test_a_version_that_fails_takes_back_the_whole_reload(
    start: Start, scripted: type[Scripted], tmp_path: Path
) -> None:
    """Of three versions the last cannot be loaded: none of the new ones is served, all of the old are."""
    both = CONFIG + "version_policy { all { } }"
    add_model(tmp_path, "m", both, ("1", "2"))
    engine = await start()

    def fail_third(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if any(len(engine._loader.lanes["auto"]._batchers) and version == "3" for version in engine._states["m"]):
            raise ValueError("not me")
        return times(7)(inputs)

    scripted.behaviours["m"] = fail_third
    touch(tmp_path, config=both, versions=("1", "2", "3"))
    with pytest.raises(
        LoadFailed, match="load failed for model 'm': version . is at UNAVAILABLE state: Internal: .*not me"
    ):
        await engine.load("m")
    scripted.behaviours["m"] = times(2)
    assert [await ask(engine, version) for version in ("1", "2", "")] == [2.0, 2.0, 2.0]
    with pytest.raises(NotFound, match="version 3 is not found"):
        await ask(engine, "3")
    states = {entry["version"]: entry["state"] for entry in await engine.index()}
    assert states == {"1": "READY", "2": "READY"}
    assert len(engine._loader.lanes["auto"]._batchers) == 2


async def test_a_model_that_cannot_be_loaded_says_why_in_the_index(
    start: Start, scripted: type[Scripted], tmp_path: Path
) -> None:
    add_model(tmp_path, "a")
    engine = await start()
    add_model(tmp_path, "m")
    scripted.behaviours["m"] = lambda inputs: {}
    with pytest.raises(LoadFailed):
        await engine.load("m")
    entry = (await engine.index())[1]
    assert (entry["name"], entry["version"], entry["state"]) == ("m", "1", "UNAVAILABLE")
    assert "gives no output 'y'" in entry["reason"]
    with pytest.raises(NotFound, match="Request for unknown model: 'm' has no available versions"):
        engine.metadata("m")


async def test_versions_come_and_go_with_a_reload(start: Start, tmp_path: Path) -> None:
    """The highest is what a request without a version gets; one that is not chosen any more is unloaded."""
    add_model(tmp_path, "m")
    engine = await start()
    assert engine.metadata("m").versions == ("1",)
    touch(tmp_path, versions=("1", "2"))
    await engine.load("m")
    assert engine.metadata("m").versions == ("2",)
    assert (await engine.infer(request())).version == "2"
    with pytest.raises(NotFound, match="version 1 is not found"):
        await ask(engine, "1")
    assert [entry["state"] for entry in await engine.index()] == ["UNAVAILABLE", "READY"]


async def test_unloading_waits_for_requests_under_way(start: Start, scripted: type[Scripted], tmp_path: Path) -> None:
    """New requests are refused at once; those that came before are answered, and only then it is unavailable."""
    add_model(tmp_path, "m")
    gate = scripted.behaviours["m"] = Gate()
    engine = await start(inline_ms=0)
    gate.open.clear()
    waits = asyncio.create_task(ask(engine))
    await settle()
    await engine.unload("m")
    assert (await engine.index())[0]["state"] == "UNLOADING"
    with pytest.raises(NotFound):
        await ask(engine)
    with pytest.raises(NotReady, match="'m' version 1 is not at ready state"):
        await ask(engine, "1")
    gate.open.set()
    assert await waits == 2.0
    await until(lambda: not engine._retiring)
    assert await engine.index() == [{"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}]
    await engine.unload("m")
    await engine.unload("never there")
    await engine.load("m")
    assert await ask(engine) == 2.0


async def test_a_config_given_with_the_request_replaces_the_files(start: Start, tmp_path: Path) -> None:
    """It is not undone by a load without one; unloading, or a change of the file, does that. Numbers may be strings."""
    add_model(tmp_path, "m")
    engine = await start()
    io = {"data_type": "TYPE_FP32", "dims": [4]}
    config = {
        "backend": "pytorch",
        "max_batch_size": "16",
        "input": [{"name": "x", **io}],
        "output": [{"name": "y", **io}],
    }
    await engine.load("m", json.dumps(config))
    assert engine.metadata("m").max_batch_size == 16
    assert engine.config("m")["max_batch_size"] == 16
    await engine.load("m")
    assert engine.metadata("m").max_batch_size == 16
    await engine.unload("m")
    await engine.load("m")
    assert engine.metadata("m").max_batch_size == 32
    with pytest.raises(LoadFailed, match="failed to load 'm'"):
        await engine.load("m", "{")
    assert engine.metadata("m").max_batch_size == 32


async def test_files_given_with_the_request_are_the_model(start: Start, tmp_path: Path) -> None:
    """They need a config, stay in a folder of their own, and that goes with the model."""
    engine = await start(load_models="")
    io = {"data_type": "TYPE_FP32", "dims": [4]}
    config = json.dumps(
        {"backend": "pytorch", "max_batch_size": 8, "input": [{"name": "x", **io}], "output": [{"name": "y", **io}]}
    )
    with pytest.raises(LoadFailed, match="files need a config that goes with them"):
        await engine.load("new", None, {"1/model.pt2": b""})
    with pytest.raises(LoadFailed, match="failed to load 'new'"):
        await engine.load("new", config, {"../model.pt2": b""})
    await engine.load("new", config, {"1/model.pt2": b"", "3/model.pt2": b""})
    assert (await engine.infer(request(name="new"))).version == "3"
    (folder,) = engine._folders
    assert folder.is_dir()
    assert not folder.is_relative_to(tmp_path)
    await engine.unload("new")
    await until(lambda: not engine._retiring)
    assert not folder.exists()


async def test_a_model_in_two_repositories_is_in_none(start: Start, tmp_path: Path) -> None:
    for root in "ab":
        add_model(tmp_path / root, "m")
    add_model(tmp_path / "b", "other")
    engine = await start(models=f"{tmp_path / 'a'}:{tmp_path / 'b'}", load_models="other")
    assert await ask(engine, name="other") == 2.0
    with pytest.raises(LoadFailed, match="it is in two repositories"):
        await engine.load("m")
    assert (await engine.index())[0]["state"] == "UNAVAILABLE"


async def test_polling_follows_the_disk(start: Start, scripted: type[Scripted], tmp_path: Path) -> None:
    """What comes is loaded, what changes loaded again, what goes unloaded, and what is bad leaves all as it was."""
    add_model(tmp_path, "m")
    engine = await start(model_control="poll", poll_seconds=0.1)
    add_model(tmp_path, "new")
    await until(lambda: ("new", "1") in engine._models)
    scripted.behaviours["m"] = times(3)
    touch(tmp_path)
    before = engine._models["m", "1"]
    await until(lambda: engine._models["m", "1"] is not before)
    assert await ask(engine) == 3.0
    (tmp_path / "m" / "config.pbtxt").write_text("nonsense")
    for file in (tmp_path / "new" / "1" / "model.pt2", tmp_path / "new" / "config.pbtxt"):
        file.unlink()
    for folder in (tmp_path / "new" / "1", tmp_path / "new"):
        folder.rmdir()
    await until(lambda: ("new", "1") not in engine._models)
    assert await ask(engine) == 3.0


async def test_a_model_larger_than_the_memory_is_refused(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything of it is read: its file is larger than what the machine has left."""
    add_model(tmp_path, "m")
    engine = await start()
    add_model(tmp_path, "large")
    (tmp_path / "large" / "1" / "model.pt2").write_bytes(bytes(11))
    monkeypatch.setattr(loading, "available_memory", lambda: 10)
    with pytest.raises(LoadFailed, match="model 'large': model.pt2 is 11 bytes, and 10 bytes of memory are available"):
        await engine.load("large")


async def test_statistics_begin_again_with_a_reload_and_metrics_do_not(start: Start, tmp_path: Path) -> None:
    """As in Triton; with an unload both are gone."""
    add_model(tmp_path, "m")
    engine = await start()

    def counted() -> tuple[int, str]:
        series = [line for line in engine.metrics().splitlines() if line.startswith("nv_inference_request_success{")]
        return engine.statistics("m")[0]["inference_stats"]["success"]["count"], "".join(series)

    for _ in range(3):
        await ask(engine)
    assert counted() == (3, 'nv_inference_request_success{model="m",version="1"} 3')
    touch(tmp_path)
    await engine.load("m")
    await ask(engine)
    assert counted() == (1, 'nv_inference_request_success{model="m",version="1"} 4')
    await engine.unload("m")
    with pytest.raises(InvalidInput, match="requested model 'm' is not available"):
        engine.statistics("m")
    assert 'model="m"' not in engine.metrics()
    await engine.load("m")
    assert counted() == (0, 'nv_inference_request_success{model="m",version="1"} 0')
    with pytest.raises(InvalidInput, match="requested model version is not available for model 'm'"):
        engine.statistics("m", "7")


async def test_answers_of_a_version_that_was_replaced_are_not_in_the_cache(
    start: Start, scripted: type[Scripted], tmp_path: Path
) -> None:
    add_model(tmp_path, "m", CONFIG + "response_cache { enable: true }")
    engine = await start()
    assert [await ask(engine), await ask(engine)] == [2.0, 2.0]
    hits = engine.statistics("m")[0]["inference_stats"]
    assert (hits["cache_hit"]["count"], hits["cache_miss"]["count"], hits["success"]["count"]) == (1, 1, 2)
    scripted.behaviours["m"] = times(9)
    touch(tmp_path, config=CONFIG + "response_cache { enable: true }")
    await engine.load("m")
    assert await ask(engine) == 9.0


async def test_instances_run_side_by_side(start: Start, scripted: type[Scripted], tmp_path: Path) -> None:
    """Two copies of a model answer two requests at a time; they share one queue."""
    alone = CONFIG.replace("max_batch_size: 32", "max_batch_size: 1").replace("dynamic_batching { }", "")
    add_model(tmp_path, "m", alone + "instance_group [ { count: 2 kind: KIND_CPU } ]")
    gates = [Gate(), Gate()]
    free = list(gates)
    engine = await start(inline_ms=0)
    for gate in gates:
        gate.open.clear()
    scripted.behaviours["m"] = lambda inputs: free.pop()(inputs)
    callers = [asyncio.create_task(ask(engine)) for _ in range(2)]
    await until(lambda: not free)
    for gate in gates:
        gate.open.set()
    assert await asyncio.gather(*callers) == [2.0, 2.0]


async def test_an_empty_repository_cannot_be_served(start: Start, tmp_path: Path) -> None:
    """But for explicit control, where everything may come later."""
    with pytest.raises(ConfigError, match="the model repository holds no model"):
        await start(model_control="none")
    engine = await start(load_models="")
    assert engine.ready()


async def test_a_bad_model_may_be_left_out_at_the_start(start: Start, scripted: type[Scripted], tmp_path: Path) -> None:
    """Where `exit_on_error` is off the others are served, and the index says what is wrong with it."""
    for name in ("a", "bad", "worse"):
        add_model(tmp_path, name)
    (tmp_path / "bad" / "config.pbtxt").write_text("nonsense: 1")
    scripted.behaviours["worse"] = lambda inputs: {}
    with pytest.raises(ConfigError, match="no field named"):
        await start()
    engine = await start(exit_on_error=False)
    assert await ask(engine, name="a") == 2.0
    assert engine.ready()
    assert {entry["name"]: entry.get("state") for entry in await engine.index()} == {
        "a": "READY", "bad": None, "worse": "UNAVAILABLE",
    }  # fmt: skip


async def test_models_load_side_by_side_and_one_of_them_once_at_a_time(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that loads another one, or waits for it, while it is loaded, does not wait for ever; nor for itself."""
    add_model(tmp_path, "a")
    add_model(tmp_path, "b")
    engine = await start(load_models="", stuck_after=0.2)
    warm = LocalModel.warm
    asked: list[str] = []

    async def load_others(self: LocalModel, inline_seconds: float) -> float:
        if self.metadata.name == "a":
            await engine.load("b")
            try:
                await engine.load("a")
            except LoadFailed as error:
                asked.append(str(error))
        return await warm(self, inline_seconds)

    monkeypatch.setattr(LocalModel, "warm", load_others)
    await engine.load("a")
    assert asked == ["failed to load 'a': it is being loaded or unloaded already"]
    assert [await ask(engine, name=name) for name in "ab"] == [2.0, 2.0]


async def test_polling_goes_on_whatever_it_meets(
    start: Start, monkeypatch: pytest.MonkeyPatch, scripted: type[Scripted], tmp_path: Path
) -> None:
    """A library's own error, a folder whose name is no text, and a model that is moved away and back."""
    add_model(tmp_path, "m")
    engine = await start(model_control="poll", poll_seconds=0.1)
    real = Loader.load

    async def fail(self: Loader, stored: Any, number: int) -> Any:
        if stored.config.name == "broken":
            raise MemoryError("so much")
        return await real(self, stored, number)

    monkeypatch.setattr(Loader, "load", fail)
    add_model(tmp_path, "broken")
    (tmp_path / b"b\xff".decode(errors="surrogateescape")).mkdir()
    await until(lambda: "broken" in engine._states)
    assert engine._states["broken"]["1"] == (
        "UNAVAILABLE",
        "Internal: MemoryError: so much",
    )
    (tmp_path / "m").rename(tmp_path.parent / "away")
    await until(lambda: ("m", "1") not in engine._models)
    (tmp_path.parent / "away").rename(tmp_path / "m")
    await until(lambda: ("m", "1") in engine._models)
    assert await ask(engine) == 2.0
    assert [entry["name"] for entry in await engine.index()] == ["broken", "m"]


async def test_files_that_came_with_a_request_stay_as_long_as_somebody_reads_them(
    start: Start, scripted: type[Scripted], tmp_path: Path
) -> None:
    """The old copy still answers when the new one is served; what cannot be loaded leaves nothing behind."""
    gate = scripted.behaviours["new"] = Gate()
    engine = await start(load_models="", inline_ms=0)
    io = {"data_type": "TYPE_FP32", "dims": [4]}
    config = json.dumps(
        {"backend": "pytorch", "max_batch_size": 8, "input": [{"name": "x", **io}], "output": [{"name": "y", **io}]}
    )
    await engine.load("new", config, {"1/model.pt2": b"a"})
    (first,) = engine._folders
    gate.open.clear()
    runs = len(scripted.calls)
    waits = asyncio.create_task(ask(engine, name="new"))
    await until(lambda: len(scripted.calls) > runs)
    scripted.behaviours["new"] = times(3)
    loads = asyncio.create_task(engine.load("new", config, {"1/model.pt2": b"b"}))
    await settle()
    assert first.is_dir()
    gate.open.set()
    await loads
    assert await waits == 2.0
    await until(lambda: not engine._retiring)
    assert not first.exists()
    (second,) = engine._folders
    before = set(second.parent.glob("millrace-*"))
    scripted.behaviours["new"] = lambda inputs: {}
    with pytest.raises(LoadFailed):
        await engine.load("new", config, {"1/model.pt2": b"c"})
    assert set(second.parent.glob("millrace-*")) <= before
    await engine.stop()
    assert not second.exists()


async def test_what_a_replaced_copy_still_answers_is_counted(
    start: Start, scripted: type[Scripted], tmp_path: Path
) -> None:
    """While it does, and afterwards."""
    add_model(tmp_path, "m")
    gate = scripted.behaviours["m"] = Gate()
    engine = await start(inline_ms=0)
    old = engine._models["m", "1"]
    old.active += 1  # somebody's request
    await ask(engine)
    scripted.behaviours["m"] = times(3)
    gate.open.set()
    touch(tmp_path)
    await engine.load("m")
    await ask(engine)
    series = 'nv_inference_request_success{model="m",version="1"} '
    assert series + "2\n" in engine.metrics()
    old.model.statistics.success.add(0.0)
    assert series + "3\n" in engine.metrics()
    old.active -= 1
    old.left()
    await until(lambda: not engine._retiring)
    assert series + "3\n" in engine.metrics()


async def test_an_unloaded_copy_that_ends_late_says_nothing_of_the_one_after_it(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "m")
    engine = await start()
    old = engine._models["m", "1"]
    old.active += 1
    await engine.unload("m")
    await engine.load("m")
    old.active -= 1
    old.left()
    await until(lambda: not engine._retiring)
    assert await engine.index() == [{"name": "m", "version": "1", "state": "READY"}]


async def test_no_client_is_told_where_the_repository_is(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "bad", "nonsense: 1")
    engine = await start(load_models="")
    with pytest.raises(LoadFailed, match="bad/config.pbtxt: .*no field named") as refused:
        await engine.load("bad")
    assert str(tmp_path) not in str(refused.value) + str(await engine.index())
