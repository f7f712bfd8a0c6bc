"""Four workers in front of one engine: whatever is changed through one of them, all of them tell at once, and the same.

No test waits between a change and a question: who had the answer to the one may ask the other of any worker.
"""

import asyncio
import dataclasses
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from engine.ipc.server import Server
from engine.local import LocalEngine
from engine.settings import Settings
from tests.client import Answer, Client
from tests.forms import Workers, in_form
from tests.scripted import CONFIG, Behaviour, Gate, Scripted, add_model, double
from tests.timing import settle, until

INFER = "/v2/models/m/infer"
INDEX, STATS, LOG, TRACE = "/v2/repository/index", "/v2/models/stats", "/v2/logging", "/v2/trace/setting"
REGIONS = "/v2/systemsharedmemory"

Start = Callable[..., Awaitable[list[Client]]]


@pytest.fixture
async def start(scripted: type[Scripted], tmp_path: Path) -> AsyncIterator[Start]:
    """start(settings...): a client of each worker, in front of the models in tmp_path."""
    async with AsyncExitStack() as stack:

        async def make(**more: Any) -> list[Client]:
            chosen = {"models": str(tmp_path), "model_control": "explicit", "load_models": "*", **more}
            settings = Settings(**chosen)
            engine = LocalEngine(settings)
            stack.push_async_callback(engine.stop)
            await engine.start()
            scripted.calls.clear()
            front = await stack.enter_async_context(in_form("four workers", engine, settings))
            assert isinstance(front, Workers)
            return [Client(each, settings) for each in front.all]

        yield make
        Gate.open_all()


async def all_say(workers: Sequence[Client], method: str, path: str, body: bytes = b"") -> Answer:
    """What each of them answers, which must be the same."""
    first, *others = [await worker(method, path, body) for worker in workers]
    for other in others:
        assert (other.status, other.body) == (first.status, first.body)
    return first


async def change(worker: Client, path: str, value: object = None) -> None:
    answer = await worker("POST", path, b"" if value is None else orjson.dumps(value))
    assert answer.status == 200, answer.body


def body(value: float = 1.0, **more: Any) -> bytes:
    return orjson.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}], **more})


async def doubled(worker: Client, value: float = 1.0) -> float:
    answer = await worker("POST", INFER, body(value))
    assert answer.status == 200, answer.body
    return float(answer.json["outputs"][0]["data"][0])


def times(factor: float) -> Behaviour:
    return lambda inputs: {"y": inputs["x"] * np.float32(factor)}


def rows(count: int) -> str:
    return CONFIG.replace("max_batch_size: 32", f"max_batch_size: {count}")


async def test_a_model_comes_and_goes_for_all_at_once(start: Start, tmp_path: Path) -> None:
    """Through whichever worker: metadata, config, readiness, the index and inference say so at the next one."""
    add_model(tmp_path, "m")
    workers = await start(load_models="")
    for worker in workers:
        assert (await all_say(workers, "GET", "/v2/models/m")).status == 404
        await change(worker, "/v2/repository/models/m/load")
        for path in ("/v2/models/m", "/v2/models/m/config", "/v2/models/m/ready", "/v2/models/m/batching"):
            assert (await all_say(workers, "GET", path)).status == 200
        assert (await all_say(workers, "POST", INDEX)).json == [{"name": "m", "version": "1", "state": "READY"}]
        assert [await doubled(each, 3) for each in workers] == [6.0] * 4
        await change(worker, "/v2/repository/models/m/unload")
        for path in ("/v2/models/m/config", "/v2/models/m/ready"):
            assert (await all_say(workers, "GET", path)).status == 404
        assert (await all_say(workers, "POST", INFER, body())).status == 404
        (entry,) = (await all_say(workers, "POST", INDEX, b'{"ready":false}')).json
        assert entry["state"] in ("UNLOADING", "UNAVAILABLE")


async def test_a_model_that_is_replaced_is_so_for_all(start: Start, tmp_path: Path) -> None:
    """Another config, other versions: nobody is told of the old one any more, nor answered by it."""
    add_model(tmp_path, "m", rows(1))
    workers = await start()
    for number, worker in enumerate(workers, 2):
        shutil.rmtree(tmp_path / "m")
        add_model(tmp_path, "m", rows(number), (str(number),))
        await change(worker, "/v2/repository/models/m/load")
        assert (await all_say(workers, "GET", "/v2/models/m")).json["versions"] == [str(number)]
        assert (await all_say(workers, "GET", "/v2/models/m/config")).json["max_batch_size"] == number
        answer = await all_say(workers, "POST", INFER, body())
        assert answer.json["model_version"] == str(number)
        old = await all_say(workers, "POST", f"/v2/models/m/versions/{number - 1}/infer", body())
        assert old.status == 404


async def test_a_reload_fails_no_request_of_any_worker(start: Start, tmp_path: Path) -> None:
    """While callers of all ask without a pause. Each worker's answers are those of one copy, then of the next."""
    add_model(tmp_path, "m", rows(1))
    workers = await start()
    answers: list[list[float]] = [[] for _ in workers]
    stop = False

    async def ask(worker: Client, told: list[float]) -> None:
        while not stop:
            told.append(await doubled(worker))
            await asyncio.sleep(0)

    asking = [asyncio.create_task(ask(*each)) for each in zip(workers, answers, strict=True)]
    for number, worker in enumerate(workers, 2):
        Scripted.behaviours["m"] = times(number)
        add_model(tmp_path, "m", rows(number))
        await change(worker, "/v2/repository/models/m/load")
        assert [await doubled(each) for each in workers] == [number] * 4
    stop = True
    await asyncio.gather(*asking)
    for told in answers:
        assert told == sorted(told)


async def test_a_model_that_cannot_be_loaded_says_why_everywhere(start: Start, tmp_path: Path) -> None:
    """In the words that whoever tried was told."""
    workers = await start(load_models="")
    add_model(tmp_path, "m")
    Scripted.behaviours["m"] = lambda inputs: {}
    refused = await workers[0]("POST", "/v2/repository/models/m/load")
    assert (refused.status, "gives no output 'y'" in refused.error) == (400, True)
    (entry,) = (await all_say(workers, "POST", INDEX)).json
    assert (entry["state"], "gives no output 'y'" in entry["reason"]) == ("UNAVAILABLE", True)
    answer = await all_say(workers, "POST", INFER, body())
    assert (answer.status, "'m' has no available versions" in answer.error) == (404, True)


@pytest.fixture
def regions(tmp_path: Path) -> Any:
    """Two files where shared memory lives: four numbers each, and as many zeros."""
    paths = [Path(f"/dev/shm/millrace_test_workers_{id(tmp_path)}_{number}") for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(np.full(4, number + 1, "<f4").tobytes() + bytes(16))
    yield paths
    for path in paths:
        path.unlink()


async def test_regions_are_registered_for_all(start: Start, tmp_path: Path, regions: list[Path]) -> None:
    """Any worker reads and writes what another one was told of, and nothing of what is forgotten or replaced."""
    add_model(tmp_path, "m")
    workers = await start(shared_memory=True)
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 16}
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": place}
    output = {"name": "y", "parameters": {**place, "shared_memory_offset": 16}}
    content = orjson.dumps({"inputs": [entry], "outputs": [output]})
    for turn, worker in enumerate(workers):
        path, value = regions[turn % 2], turn % 2 + 1
        assert (await all_say(workers, "POST", INFER, content)).status == 404
        region = {"key": f"/{path.name}", "offset": 0, "byte_size": 32}
        await change(worker, f"{REGIONS}/region/r/register", region)
        assert (await all_say(workers, "GET", f"{REGIONS}/status")).json == [{"name": "r", **region}]
        again = await all_say(workers, "POST", f"{REGIONS}/region/r/register", orjson.dumps(region))
        assert (again.status, again.error) == (400, "shared memory region 'r' already in manager")
        for each in workers:
            assert (await each("POST", INFER, content)).status == 200
            assert np.frombuffer(path.read_bytes(), "<f4")[4:].tolist() == [2.0 * value] * 4
            path.write_bytes(np.full(4, value, "<f4").tobytes() + bytes(16))
        await change(worker, f"{REGIONS}/unregister" if turn % 2 else f"{REGIONS}/region/r/unregister")
        assert (await all_say(workers, "GET", f"{REGIONS}/region/r/status")).status == 404


async def test_trace_and_log_settings_are_one(start: Start, tmp_path: Path) -> None:
    """What one worker was told all tell, of all models and of one; and what is refused changes nothing anywhere."""
    add_model(tmp_path, "m")
    workers = await start()
    for number, worker in enumerate(workers, 1):
        await change(worker, LOG, {"log_verbose_level": number})
        assert (await all_say(workers, "GET", LOG)).json["log_verbose_level"] == number
        await change(worker, TRACE, {"trace_rate": str(number)})
        assert (await all_say(workers, "GET", TRACE)).json["trace_rate"] == str(number)
        await change(worker, "/v2/models/m/trace/setting", {"trace_rate": str(100 + number)})
        assert (await all_say(workers, "GET", "/v2/models/m/trace/setting")).json["trace_rate"] == str(100 + number)
        assert (await worker("POST", LOG, b'{"log_info":3}')).status == 400
        assert (await all_say(workers, "GET", LOG)).json["log_verbose_level"] == number


async def test_every_worker_writes_what_the_log_settings_say(start: Start, tmp_path: Path) -> None:
    """Its own records are meant as much as the engine's."""
    add_model(tmp_path, "m")
    workers = await start()
    logger = logging.getLogger("millrace")
    filters = list(logger.filters)
    await change(workers[0], LOG, {"log_info": False})
    added = [each for each in logger.filters if each not in filters]
    record = logger.makeRecord("millrace", logging.INFO, "", 0, "text", (), None)
    assert len(added) == 1 + len(workers)
    assert not any(each.filter(record) for each in added if isinstance(each, logging.Filter))


async def test_counts_are_one(start: Start, tmp_path: Path) -> None:
    """A request through any worker is counted once, and every worker tells of it."""
    add_model(tmp_path, "m")
    workers = await start()
    for number, worker in enumerate(workers, 1):
        await doubled(worker)
        assert (await worker("POST", INFER, body(id="bad", outputs=[{"name": "q"}]))).status == 400
        (told,) = (await all_say(workers, "GET", STATS)).json["model_stats"]
        assert told["inference_stats"]["success"]["count"] == number
        assert (await all_say(workers, "GET", "/v2/models/m/stats")).json["model_stats"] == [told]
        for each in workers:
            text = (await each("GET", "/metrics")).body.decode()
            assert f'nv_inference_request_success{{model="m",version="1"}} {number}\n' in text


async def test_requests_of_all_workers_share_batches(start: Start, tmp_path: Path) -> None:
    """It is why there is one engine: what arrives meanwhile, wherever, is the next batch."""
    add_model(tmp_path, "m")
    gate = Gate()
    Scripted.behaviours["m"] = gate
    workers = await start(inline_ms=0)
    gate.open.clear()
    busy = asyncio.create_task(doubled(workers[0]))
    await until(lambda: bool(Scripted.calls))
    waiting = [asyncio.create_task(doubled(worker, value)) for value, worker in enumerate(workers)]
    await settle()
    assert (await all_say(workers, "GET", "/v2/models/m/batching")).json["queue"]["rows"] == 4
    gate.open.set()
    assert await asyncio.gather(busy, *waiting) == [2.0, 0.0, 2.0, 4.0, 6.0]
    assert Scripted.calls == [("m", (1, 4)), ("m", (4, 4))]


async def test_the_bound_on_what_waits_is_one(start: Start, tmp_path: Path) -> None:
    """What one worker's clients left of the queue is all that the others' have."""
    add_model(tmp_path, "m", rows(1))
    gate = Gate()
    Scripted.behaviours["m"] = gate
    workers = await start(inline_ms=0, queue_rows=4)
    gate.open.clear()
    busy = asyncio.create_task(doubled(workers[0]))
    await until(lambda: bool(Scripted.calls))
    waiting = [asyncio.create_task(doubled(workers[0])) for _ in range(4)]
    await settle()
    answer = await workers[3]("POST", INFER, body())
    assert (answer.status, answer.error[:45]) == (429, "the queue is full: 4 of 4 rows wait, no room ")
    gate.open.set()
    assert await asyncio.gather(busy, *waiting) == [2.0] * 5


async def test_an_answer_is_computed_once_for_all(start: Start, tmp_path: Path) -> None:
    """Where the model's answers are kept, whoever asked first."""
    add_model(tmp_path, "m", CONFIG + "response_cache { enable: true }")
    Scripted.behaviours["m"] = double
    workers = await start()
    assert [await doubled(worker, 5) for worker in workers] == [10.0] * 4
    assert Scripted.calls == [("m", (1, 4))]


async def test_a_change_is_answered_when_every_worker_knows_of_it(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the answer may ask any of them."""
    monkeypatch.setattr("engine.ipc.server.SEEN_WITHIN", 30.0)
    add_model(tmp_path, "m")
    workers = await start(load_models="")
    busy: Any = workers[3].engine
    busy._connection._transport.pause_reading()
    loading = asyncio.create_task(change(workers[0], "/v2/repository/models/m/load"))
    asked: Any = workers[0].engine
    await until(lambda: ("m", "1") in asked._copies)
    await settle()
    assert not loading.done()
    busy._connection._transport.resume_reading()
    await loading
    assert (await all_say(workers, "GET", "/v2/models/m")).status == 200


async def test_a_worker_that_does_not_read_keeps_nobody_waiting(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process, say: the load is answered a moment later, and once it goes on it knows what the others do."""
    monkeypatch.setattr("engine.ipc.server.SEEN_WITHIN", 0.02)
    add_model(tmp_path, "m")
    workers = await start(load_models="")
    stopped: Any = workers[3].engine
    transport = stopped._connection._transport
    transport.pause_reading()
    await change(workers[0], "/v2/repository/models/m/load")
    assert [await doubled(each) for each in workers[:3]] == [2.0] * 3
    assert (await workers[3]("GET", "/v2/models/m")).status == 404
    transport.resume_reading()
    await until(lambda: stopped._copies != {})
    assert (await all_say(workers, "GET", "/v2/models/m")).status == 200


async def test_all_tell_what_the_next_engine_tells(start: Start, tmp_path: Path) -> None:
    """Once it has taken the place over: what it serves, and that nobody told it of regions, or what to log."""
    add_model(tmp_path, "m")
    workers = await start(shared_memory=True)
    first: Any = workers[0].engine
    logger = logging.getLogger("millrace")
    await change(workers[0], LOG, {"log_info": False})
    filters = list(logger.filters)
    add_model(tmp_path, "n")
    settings = dataclasses.replace(workers[0].settings, engine_socket=first._settings.engine_socket)
    engine = LocalEngine(settings)
    await engine.start()
    server = Server(engine, settings, takeover=True)
    await server.start()
    try:
        for worker in workers:
            remote: Any = worker.engine
            await until(lambda remote=remote: ("n", "1") in remote._copies)  # type: ignore[misc]
        assert [entry["name"] for entry in (await all_say(workers, "POST", INDEX)).json] == ["m", "n"]
        assert (await all_say(workers, "GET", "/v2/models/n")).status == 200
        await all_say(workers, "GET", LOG)
        assert len(filters) - len(logger.filters) == len(workers)  # what is left is the first engine's
    finally:
        for worker in workers:
            assert worker.engine is not None
            await worker.engine.stop()
        await server.stop()
        await engine.stop()


async def test_a_worker_that_leaves_takes_nobody_along(start: Start, tmp_path: Path) -> None:
    """What it asked for is not run; the others' requests are, and changes do not wait for it."""
    add_model(tmp_path, "m")
    gate = Gate()
    Scripted.behaviours["m"] = gate
    workers = await start(inline_ms=0)
    gate.open.clear()
    busy = asyncio.create_task(doubled(workers[0]))
    await until(lambda: bool(Scripted.calls))
    left = asyncio.create_task(workers[1]("POST", INFER, body()))
    stays = asyncio.create_task(doubled(workers[2], 4))
    await settle()
    assert workers[1].engine is not None
    await workers[1].engine.stop()
    assert (await left).status == 503
    await settle()
    gate.open.set()
    assert (await busy, await stays) == (2.0, 8.0)
    assert Scripted.calls == [("m", (1, 4))] * 2
    await change(workers[3], "/v2/repository/models/m/unload")
    assert (await all_say([workers[0], workers[2], workers[3]], "GET", "/v2/models/m")).status == 404
