"""Models come, change and go while others are served: no request fails, nothing half-loaded stays, memory is let go."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from engine import loading, repository
from engine.errors import ConfigError, InvalidInput, LoadFailed, NotFound, NotReady
from engine.loading import Loader
from engine.local import LocalEngine
from engine.model import LocalModel
from engine.settings import Settings
from engine.types import Array, Engine, InferRequest
from tests.conftest import InForm
from tests.forms import owner
from tests.scripted import CONFIG, Gate, Scripted, add_model
from tests.timing import settle, until

Start = Callable[..., Awaitable[LocalEngine]]
Serve = Callable[..., Awaitable[Engine]]


def times(factor: float) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    return lambda inputs: {"y": inputs["x"] * np.float32(factor)}


def request(version: str = "", value: float = 1.0, name: str = "m") -> InferRequest:
    return InferRequest(name, version, {"x": np.full((1, 4), value, "<f4")})


async def ask(engine: Engine, version: str = "", name: str = "m") -> float:
    return float((await engine.infer(request(version, name=name))).outputs["y"][0, 0])


def touch(root: Path, name: str = "m", config: str = CONFIG, versions: tuple[str, ...] = ("1",)) -> None:
    """Change something in a model's folder."""
    add_model(root, name, config + f"\n# {len((root / name / 'config.pbtxt').read_text())}", versions)


@pytest.fixture
async def start(scripted: type[Scripted], tmp_path: Path) -> AsyncIterator[Start]:
    """start(**settings): an engine in this process, under control of its callers, on the repository in tmp_path."""
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


@pytest.fixture
def serve(start: Start, put_in_form: InForm) -> Serve:
    """As `start`, in each form of the service."""

    async def make(**settings: Any) -> Engine:
        engine = await start(**settings)
        return await put_in_form(engine, engine._settings)

    return make


async def test_only_what_was_asked_for_is_loaded(serve: Serve, tmp_path: Path) -> None:
    """With explicit control nothing is, but for the models that the setting names."""
    for name in "ab":
        add_model(tmp_path, name)
    engine = await serve(load_models="b")
    assert await engine.index() == [{"name": "a"}, {"name": "b", "version": "1", "state": "READY"}]
    with pytest.raises(NotFound, match="Request for unknown model: 'a' is not found"):
        engine.metadata("a")
    await engine.load("a")
    assert await ask(engine, name="a") == 2.0
    with pytest.raises(ConfigError, match="model 'c' is in no repository .MILLRACE_LOAD_MODELS."):
        await serve(load_models="b, c")


@pytest.mark.parametrize("mode", ["none", "poll"])
async def test_only_explicit_control_takes_orders(serve: Serve, tmp_path: Path, mode: str) -> None:
    """The answer is Triton's, a 503."""
    add_model(tmp_path, "m")
    engine = await serve(model_control=mode)
    for order in (engine.load("m"), engine.unload("m")):
        with pytest.raises(NotReady, match="explicit model load / unload is not allowed if polling is enabled"):
            await order
    assert await ask(engine) == 2.0


async def test_a_model_that_is_not_there_cannot_be_loaded(serve: Serve, tmp_path: Path) -> None:
    """Nor can one whose config is bad; what was served before is served on."""
    add_model(tmp_path, "m")
    engine = await serve()
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
    serve: Serve, scripted: type[Scripted], tmp_path: Path
) -> None:
    add_model(tmp_path, "a")
    engine = await serve()
    add_model(tmp_path, "m")
    scripted.behaviours["m"] = lambda inputs: {}
    with pytest.raises(LoadFailed):
        await engine.load("m")
    entry = (await engine.index())[1]
    assert (entry["name"], entry["version"], entry["state"]) == ("m", "1", "UNAVAILABLE")
    assert "gives no output 'y'" in entry["reason"]
    with pytest.raises(NotFound, match="Request for unknown model: 'm' has no available versions"):
        engine.metadata("m")


async def test_versions_come_and_go_with_a_reload(serve: Serve, tmp_path: Path) -> None:
    """The highest is what a request without a version gets; one that is not chosen any more is unloaded."""
    add_model(tmp_path, "m")
    engine = await serve()
    assert engine.metadata("m").versions == ("1",)
    touch(tmp_path, versions=("1", "2"))
    await engine.load("m")
    assert engine.metadata("m").versions == ("2",)
    assert (await engine.infer(request())).version == "2"
    with pytest.raises(NotFound, match="version 1 is not found"):
        await ask(engine, "1")
    assert [entry["state"] for entry in await engine.index()] == ["UNAVAILABLE", "READY"]


async def test_unloading_waits_for_requests_under_way(serve: Serve, scripted: type[Scripted], tmp_path: Path) -> None:
    """New requests are refused at once; those that came before are answered, and only then it is unavailable."""
    add_model(tmp_path, "m")
    gate = scripted.behaviours["m"] = Gate()
    engine = await serve(inline_ms=0)
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
    await until(lambda: not owner(engine)._retiring)
    assert await engine.index() == [{"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}]
    await engine.unload("m")
    await engine.unload("never there")
    await engine.load("m")
    assert await ask(engine) == 2.0


async def test_a_config_given_with_the_request_replaces_the_files(serve: Serve, tmp_path: Path) -> None:
    """It is not undone by a load without one; unloading, or a change of the file, does that. Numbers may be strings."""
    add_model(tmp_path, "m")
    engine = await serve()
    io = {"data_type": "TYPE_FP32", "dims": [4]}
    config = {
        "backend": "pytorch",
        "max_batch_size": "16",
        "input": [{"name": "x", **io}],
        "output": [{"name": "y", **io}],
    }
    await engine.load("m", json.dumps(config))
    assert engine.metadata("m").max_batch_size == 16
    assert (await engine.config("m"))["max_batch_size"] == 16
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


async def test_a_model_in_two_repositories_is_in_none(serve: Serve, tmp_path: Path) -> None:
    for root in "ab":
        add_model(tmp_path / root, "m")
    add_model(tmp_path / "b", "other")
    engine = await serve(models=f"{tmp_path / 'a'}:{tmp_path / 'b'}", load_models="other")
    assert await ask(engine, name="other") == 2.0
    with pytest.raises(LoadFailed, match="it is in two repositories"):
        await engine.load("m")
    assert (await engine.index())[0]["state"] == "UNAVAILABLE"


async def test_what_is_served_is_ready_though_a_second_repository_has_its_name(serve: Serve, tmp_path: Path) -> None:
    """The index says what answers. It cannot be loaded again while it is in two, nor once it is unloaded."""
    add_model(tmp_path / "a", "m")
    (tmp_path / "b").mkdir()
    engine = await serve(models=f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    add_model(tmp_path / "b", "m", versions=("5",))
    assert await engine.index() == [{"name": "m", "version": "1", "state": "READY"}]
    with pytest.raises(LoadFailed, match="it is in two repositories"):
        await engine.load("m")
    assert await engine.index() == [{"name": "m", "version": "1", "state": "READY"}]
    assert await ask(engine) == 2.0
    await engine.unload("m")
    await until(lambda: not owner(engine)._retiring)
    (entry,) = await engine.index()
    assert entry == {"name": "m", "state": "UNAVAILABLE", "reason": "model appears in two or more repositories"}


async def test_the_index_forgets_versions_whose_files_came_with_a_request(serve: Serve, tmp_path: Path) -> None:
    """Once they are unloaded nobody can load them again; what the repository holds stays listed, and so does a name."""
    add_model(tmp_path, "m", versions=("1",))
    engine = await serve()
    io = {"data_type": "TYPE_FP32", "dims": [4]}
    config = json.dumps(
        {"backend": "pytorch", "max_batch_size": 8, "input": [{"name": "x", **io}], "output": [{"name": "y", **io}]}
    )
    unloaded = {"name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
    for version in ("7", "8"):
        await engine.load("m", config, {f"{version}/model.pt2": b""})
        assert await engine.index() == [unloaded, {"name": "m", "version": version, "state": "READY"}]
    await engine.load("m", config, {"1/model.pt2": b""})
    assert await engine.index() == [{"name": "m", "version": "1", "state": "READY"}]
    await engine.load("new", config, {"3/model.pt2": b""})
    assert (await engine.index())[1:] == [{"name": "new", "version": "3", "state": "READY"}]
    for name in ("m", "new"):
        await engine.unload(name)
    await until(lambda: not owner(engine)._retiring)
    assert await engine.index() == [unloaded]
    await engine.load("m")
    assert await engine.index() == [{"name": "m", "version": "1", "state": "READY"}]


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
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything of it is read: its file is larger than what the machine has left."""
    add_model(tmp_path, "m")
    engine = await serve()
    add_model(tmp_path, "large")
    (tmp_path / "large" / "1" / "model.pt2").write_bytes(bytes(11))
    monkeypatch.setattr(loading, "available_memory", lambda: 10)
    with pytest.raises(LoadFailed, match="model 'large': model.pt2 is 11 bytes, and 10 bytes of memory are available"):
        await engine.load("large")


async def test_statistics_begin_again_with_a_reload_and_metrics_do_not(serve: Serve, tmp_path: Path) -> None:
    """As in Triton; with an unload both are gone."""
    add_model(tmp_path, "m")
    engine = await serve()

    async def counted() -> tuple[int, str]:
        series = [
            line for line in (await engine.metrics()).splitlines() if line.startswith("nv_inference_request_success{")
        ]
        return (await engine.statistics("m"))[0]["inference_stats"]["success"]["count"], "".join(series)

    for _ in range(3):
        await ask(engine)
    assert await counted() == (3, 'nv_inference_request_success{model="m",version="1"} 3')
    touch(tmp_path)
    await engine.load("m")
    await ask(engine)
    assert await counted() == (1, 'nv_inference_request_success{model="m",version="1"} 4')
    await engine.unload("m")
    with pytest.raises(InvalidInput, match="requested model 'm' is not available"):
        await engine.statistics("m")
    assert 'model="m"' not in await engine.metrics()
    await engine.load("m")
    assert await counted() == (0, 'nv_inference_request_success{model="m",version="1"} 0')
    with pytest.raises(InvalidInput, match="requested model version is not available for model 'm'"):
        await engine.statistics("m", "7")


async def test_answers_of_a_version_that_was_replaced_are_not_in_the_cache(
    serve: Serve, scripted: type[Scripted], tmp_path: Path
) -> None:
    add_model(tmp_path, "m", CONFIG + "response_cache { enable: true }")
    engine = await serve()
    assert [await ask(engine), await ask(engine)] == [2.0, 2.0]
    hits = (await engine.statistics("m"))[0]["inference_stats"]
    assert (hits["cache_hit"]["count"], hits["cache_miss"]["count"], hits["success"]["count"]) == (1, 1, 2)
    scripted.behaviours["m"] = times(9)
    touch(tmp_path, config=CONFIG + "response_cache { enable: true }")
    await engine.load("m")
    assert await ask(engine) == 9.0


async def test_instances_run_side_by_side(serve: Serve, scripted: type[Scripted], tmp_path: Path) -> None:
    """Two copies of a model answer two requests at a time; they share one queue."""
    alone = CONFIG.replace("max_batch_size: 32", "max_batch_size: 1").replace("dynamic_batching { }", "")
    add_model(tmp_path, "m", alone + "instance_group [ { count: 2 kind: KIND_CPU } ]")
    gates = [Gate(), Gate()]
    free = list(gates)
    engine = await serve(inline_ms=0)
    for gate in gates:
        gate.open.clear()
    scripted.behaviours["m"] = lambda inputs: free.pop()(inputs)
    callers = [asyncio.create_task(ask(engine)) for _ in range(2)]
    await until(lambda: not free)
    for gate in gates:
        gate.open.set()
    assert await asyncio.gather(*callers) == [2.0, 2.0]


async def test_an_empty_repository_cannot_be_served(serve: Serve, tmp_path: Path) -> None:
    """But for explicit control, where everything may come later."""
    with pytest.raises(ConfigError, match="the model repository holds no model"):
        await serve(model_control="none")
    engine = await serve(load_models="")
    assert engine.ready()


async def test_a_bad_model_may_be_left_out_at_the_start(serve: Serve, scripted: type[Scripted], tmp_path: Path) -> None:
    """Where `exit_on_error` is off the others are served, and the index says what is wrong with it."""
    for name in ("a", "bad", "worse"):
        add_model(tmp_path, name)
    (tmp_path / "bad" / "config.pbtxt").write_text("nonsense: 1")
    scripted.behaviours["worse"] = lambda inputs: {}
    with pytest.raises(ConfigError, match="no field named"):
        await serve()
    engine = await serve(exit_on_error=False)
    assert await ask(engine, name="a") == 2.0
    assert engine.ready()
    assert {entry["name"]: entry.get("state") for entry in await engine.index()} == {
        "a": "READY", "bad": None, "worse": "UNAVAILABLE",
    }  # fmt: skip


async def test_models_load_side_by_side_and_one_of_them_once_at_a_time(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that loads another one, or waits for it, while it is loaded, does not wait for ever; nor for itself."""
    add_model(tmp_path, "a")
    add_model(tmp_path, "b")
    engine = await serve(load_models="", stuck_after=0.2)
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
    assert series + "2\n" in await engine.metrics()
    old.model.statistics.success.add(0.0)
    assert series + "3\n" in await engine.metrics()
    old.active -= 1
    old.left()
    await until(lambda: not engine._retiring)
    assert series + "3\n" in await engine.metrics()


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


async def test_no_client_is_told_where_the_repository_is(serve: Serve, tmp_path: Path) -> None:
    add_model(tmp_path, "bad", "nonsense: 1")
    engine = await serve(load_models="")
    with pytest.raises(LoadFailed, match="bad/config.pbtxt: .*no field named") as refused:
        await engine.load("bad")
    assert str(tmp_path) not in str(refused.value) + str(await engine.index())


async def test_whoever_wants_to_know_hears_of_each_change(
    start: Start, scripted: type[Scripted], tmp_path: Path
) -> None:
    """Of models' states, at each step, and of the log; when it hears, what it can ask for is so."""
    add_model(tmp_path, "m")
    engine = await start(load_models="", shared_memory=True)
    heard: list[str] = []

    def hear() -> None:
        state = engine._states.get("m", {}).get("1", ("", ""))[0]
        assert (("m", "1") in engine._models) == (state == "READY")
        heard.append(state)

    engine.changed = hear
    await engine.load("m")
    assert heard == ["LOADING", "READY"]
    await engine.load("m")
    assert heard == ["LOADING", "READY"]
    heard.clear()
    touch(tmp_path)
    await engine.load("m")
    assert heard == ["READY"]
    heard.clear()
    await engine.unload("m")
    await until(lambda: not engine._retiring)
    assert heard == ["UNLOADING", "UNAVAILABLE"]
    await engine.unload("m")
    assert len(heard) == 2
    heard.clear()
    scripted.behaviours["m"] = lambda inputs: {}
    with pytest.raises(LoadFailed):
        await engine.load("m")
    assert heard == ["LOADING", "UNAVAILABLE"]
    heard.clear()
    touch(tmp_path, config="nonsense")
    with pytest.raises(LoadFailed):
        await engine.load("m")
    assert heard == ["UNAVAILABLE"]
    await engine.log({"log_info": True})
    await engine.regions.unregister()
    assert len(heard) == 3
    await engine.log()
    with pytest.raises(InvalidInput):
        await engine.log({"log_info": 1})
    assert len(heard) == 3


CACHED = CONFIG + "response_cache { enable: true }"


async def gone(engine: Engine) -> None:
    """What was replaced or unloaded has been let go of."""
    await until(lambda: not owner(engine)._retiring)


async def test_no_copy_answers_from_another_ones_cache(serve: Serve, scripted: type[Scripted], tmp_path: Path) -> None:
    """However many came and went before it, in the same place in memory."""
    add_model(tmp_path, "m", CACHED)
    engine = await serve(load_models="", cache_seconds=60.0)
    for number in range(20):
        scripted.behaviours["m"] = times(number)
        await engine.load("m")
        assert await ask(engine) == number
        await engine.unload("m")
        await gone(engine)


async def test_the_files_of_two_versions_stay_until_both_are_gone(start: Start) -> None:
    engine = await start(load_models="")
    io = {"data_type": "TYPE_FP32", "dims": [4]}
    config = {
        "backend": "pytorch",
        "max_batch_size": 8,
        "input": [{"name": "x", **io}],
        "output": [{"name": "y", **io}],
        "version_policy": {"all": {}},
    }
    await engine.load("m", json.dumps(config), {"1/model.pt2": b"", "2/model.pt2": b""})
    (folder,) = engine._folders
    first = engine._models["m", "1"]
    first.active += 1  # somebody's request
    await engine.unload("m")
    await until(lambda: len(engine._retiring) == 1)
    assert folder.is_dir()
    first.active -= 1
    first.left()
    await gone(engine)
    assert not folder.exists()


async def test_what_failed_is_tried_again_when_it_changes_or_comes_back(
    start: Start, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also if it then looks as it did when it failed: what was in its way may be gone."""
    stamps = {"m": 1, "other": 1}
    monkeypatch.setattr("engine.local.fingerprint", lambda folder: stamps[folder.name])
    add_model(tmp_path, "other")
    engine = await start()
    failed: dict[str, Any] = {}
    tried: list[str] = []

    async def look(*expected: str) -> None:
        tried.clear()
        await engine._poll_once(failed)
        assert tuple(tried) == expected

    def refuse(inputs: Mapping[str, Array]) -> dict[str, Array]:
        tried.append("refused")
        return {}

    def accept(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if "loaded" not in tried:
            tried.append("loaded")
        return times(2)(inputs)

    add_model(tmp_path, "m")
    scripted.behaviours["m"] = refuse
    await look("refused")
    await look()
    (tmp_path / "m").rename(tmp_path.parent / "away")
    await look()
    (tmp_path.parent / "away").rename(tmp_path / "m")
    await look("refused")
    scripted.behaviours["m"] = accept
    for stamps["m"] in (2, 1):
        await look("loaded")


async def test_no_model_is_taken_out_while_it_is_changed(start: Start, tmp_path: Path) -> None:
    """By request, or because its folder went: it waits until whoever changes it is done."""
    for name in "ab":
        add_model(tmp_path, name)
    engine = await start()
    (tmp_path / "b").rename(tmp_path.parent / "away")
    for name, take_out in (("a", engine.unload("a")), ("b", engine._poll_once({}))):
        async with engine._change(name):
            waits = asyncio.ensure_future(take_out)
            await asyncio.to_thread(lambda: None)
            await settle()
            assert (name, "1") in engine._models
            assert not waits.done()
        await waits
        assert (name, "1") not in engine._models


async def test_a_name_that_was_asked_for_leaves_nothing(start: Start, tmp_path: Path) -> None:
    """Whether there is a model of that name or not."""
    add_model(tmp_path, "m")
    engine = await start()
    await engine.unload("m")
    await engine.unload("none")
    with pytest.raises(LoadFailed):
        await engine.load("none")
    await engine.load("m")
    assert not list(engine._changing)


async def test_the_process_ends_after_what_was_unloaded(start: Start, tmp_path: Path) -> None:
    """It lets its requests finish, and is closed."""
    add_model(tmp_path, "m")
    engine = await start()
    old = engine._models["m", "1"]
    old.active += 1  # somebody's request
    await engine.unload("m")
    stopping = asyncio.create_task(engine.stop())
    (lane,) = engine._loader.lanes.values()
    await until(lambda: lane._task is not None and lane._task.done())
    await settle()
    assert not stopping.done()
    old.active -= 1
    old.left()
    old.model.instances = ()  # the lane's thread has ended
    await stopping
    assert not engine._retiring


async def test_the_process_ends_after_what_polling_loads(
    start: Start, scripted: type[Scripted], tmp_path: Path
) -> None:
    """It is given up, and what there is of it is closed, before the lanes end."""
    add_model(tmp_path, "m")
    engine = await start(model_control="poll", poll_seconds=0.1)
    gate = scripted.behaviours["new"] = Gate()
    gate.open.clear()
    runs = len(scripted.calls)
    add_model(tmp_path, "new")
    await until(lambda: len(scripted.calls) > runs)
    stopping = asyncio.create_task(engine.stop())
    await settle()
    assert not stopping.done()
    gate.open.set()
    await stopping
    assert engine._polling is not None
    assert engine._polling.cancelled()
    assert ("new", "1") not in engine._models


async def test_what_changes_during_the_start_is_seen(serve: Serve, scripted: type[Scripted], tmp_path: Path) -> None:
    """A config that was read, and is another one when its model is loaded."""
    for name in "ab":
        add_model(tmp_path, name)

    def change_b(inputs: Mapping[str, Array]) -> dict[str, Array]:
        config = tmp_path / "b" / "config.pbtxt"
        config.write_text(CONFIG.replace("32", "128", 1))
        return times(2)(inputs)

    scripted.behaviours["a"] = change_b
    engine = await serve(model_control="poll", poll_seconds=0.1)
    await until(lambda: engine.metadata("b").max_batch_size == 128)


async def test_polling_looks_at_the_others_whatever_one_does(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that nobody thought of is told once, until the folder changes; it ends neither the round nor polling."""
    add_model(tmp_path, "m")
    engine = await start()
    read = repository.read_model

    def fail(folder: Path, *more: Any, **others: Any) -> Any:
        if folder.name == "a":
            raise ValueError("unthought of")
        return read(folder, *more, **others)

    monkeypatch.setattr("engine.local.read_model", fail)
    add_model(tmp_path, "a")
    add_model(tmp_path, "z")
    failed: dict[str, Any] = {}
    for _ in range(2):
        await engine._poll_once(failed)
    assert await ask(engine, name="z") == 2.0
    assert caplog.text.count("ValueError: unthought of") == 1


async def test_counts_of_all_copies_before_add_up(serve: Serve, tmp_path: Path) -> None:
    add_model(tmp_path, "m")
    engine = await serve()
    for _ in range(3):
        await ask(engine)
        touch(tmp_path)
        await engine.load("m")
        await gone(engine)
    assert 'nv_inference_count{model="m",version="1"} 3\n' in await engine.metrics()


async def test_a_version_that_vanished_begins_at_0(start: Start, tmp_path: Path) -> None:
    """Also if a copy of it, which had been replaced before, was still answering then; or if it had been reloaded."""
    add_model(tmp_path, "m")
    engine = await start()
    for busy in (1, 0):
        await ask(engine)
        old = engine._models["m", "1"]
        old.active += busy
        touch(tmp_path)
        await engine.load("m")
        if not busy:
            await gone(engine)
        (tmp_path / "m" / "1").rename(tmp_path / "m" / "2")
        await engine.load("m")
        old.active -= busy
        old.left()
        await gone(engine)
        (tmp_path / "m" / "2").rename(tmp_path / "m" / "1")
        await engine.load("m")
        assert 'nv_inference_count{model="m",version="1"} 0\n' in await engine.metrics()


class Weights:
    """What only the garbage collector frees."""

    def __init__(self) -> None:
        self.me = self


def hang_weights(engine: LocalEngine, name: str) -> "weakref.ref[Weights]":
    """Give a loaded copy something to hold until it is closed."""
    weights = Weights()
    ((backend, _),) = engine._models[name, "1"].model.instances
    vars(backend)["weights"] = weights
    return weakref.ref(weights)


@pytest.fixture
def dropping(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is closed lets go of its weights."""

    def close(self: Any) -> None:
        self.weights = None

    monkeypatch.setattr(scripted, "close", close)


@pytest.mark.usefixtures("dropping")
async def test_what_was_loaded_before_another_went_is_freed(start: Start, tmp_path: Path) -> None:
    """With that one all was taken out of the collector's sight."""
    for name in "ab":
        add_model(tmp_path, name)
    engine = await start(load_models="a")
    await engine.load("b")
    weights = hang_weights(engine, "b")
    for name in "ab":
        await engine.unload(name)
        await gone(engine)
    assert weights() is None


@pytest.mark.usefixtures("dropping")
async def test_what_goes_while_another_goes_is_freed(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each takes all out of the collector's sight at its end, while the other is not closed yet."""
    for name in "ab":
        add_model(tmp_path, name)
    engine = await start()
    weights = hang_weights(engine, "b")
    close, closing, may_close = loading._close, asyncio.Event(), asyncio.Event()

    async def wait(name: str, instances: Any) -> None:
        if name == "b":
            closing.set()
            await may_close.wait()
        await close(name, instances)

    monkeypatch.setattr(loading, "_close", wait)
    await engine.unload("b")
    await closing.wait()
    await engine.unload("a")
    await until(lambda: len(engine._retiring) == 1)
    may_close.set()
    await gone(engine)
    assert weights() is None


async def test_a_reason_that_no_encoding_has(start: Start, tmp_path: Path) -> None:
    """Why a model cannot be loaded may name a file whose name is no text; whoever asks is told as much as can be."""

    def fail(inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise RuntimeError("cannot open caf\udce9")

    add_model(tmp_path, "m")
    Scripted.behaviours["m"] = fail
    engine = await start(load_models="")
    with pytest.raises(LoadFailed, match=r"cannot open caf\?"):
        await engine.load("m")
    (entry,) = orjson.loads(orjson.dumps(await engine.index()))
    assert "cannot open caf?" in entry["reason"]
    assert orjson.loads(orjson.dumps(engine.catalogue()))["states"]["m"]["1"][0] == "UNAVAILABLE"
