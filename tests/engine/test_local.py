"""LocalEngine: models from a repository, batched on a lane, one answer for each request."""

import asyncio
import gc
import logging
import math
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching import Cost, DeadlineExceeded, QueueFull
from engine.errors import ConfigError, DeviceLost, InvalidInput, ModelError, NotFound, NotReady
from engine.local import LocalEngine
from engine.model import LocalModel
from engine.settings import Settings
from engine.types import Array, InferRequest
from tests.conftest import StartEngine, StartLocal
from tests.forms import hear, owner
from tests.scripted import CONFIG, Gate, Scripted, add_model, double
from tests.timing import settle, until


def request(value: float = 1.0, rows: int = 1, deadline: float = math.inf, model: str = "m") -> InferRequest:
    return InferRequest(model, "", {"x": np.full((rows, 4), value, "<f4")}, deadline=deadline)


IN_A_THREAD = {"inline_ms": 0}


async def test_200_concurrent_clients_form_batches(
    start_engine: StartEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a batch runs the next one gathers: 200 requests take far fewer batches, each answer its own request's."""
    gate = Gate()
    engine = await start_engine(IN_A_THREAD, m=gate)
    gate.open.clear()
    tasks = [asyncio.ensure_future(engine.infer(request(n))) for n in range(200)]
    await until(lambda: bool(Scripted.calls))
    gate.open.set()
    answers = await asyncio.gather(*tasks)
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [2.0 * n for n in range(200)]
    sizes = {int(rows): count for rows, count in (await engine.batching("m"))["batches"]["by_rows"].items()}
    with capsys.disabled():
        print("\n200 clients at once; rows of a batch: number of batches")
        for rows, count in sorted(sizes.items()):
            print(f"{rows:4}: {'#' * count} {count}")
    assert sum(rows * count for rows, count in sizes.items()) == 200
    assert max(sizes) == 32
    assert sum(sizes.values()) <= 8


async def test_alone_equals_in_a_batch(start_engine: StartEngine) -> None:
    """The answer alone is the answer in a batch, whatever shared it, for requests of several rows too."""
    engine = await start_engine(m=double)
    requests = [request(n, rows) for n, rows in ((1, 3), (2, 1), (3, 5))]
    together = await asyncio.gather(*(engine.infer(r) for r in requests))
    assert Scripted.calls == [("m", (9, 4))]
    for asked, answer in zip(requests, together, strict=True):
        alone = await engine.infer(asked)
        np.testing.assert_array_equal(answer.outputs["y"], alone.outputs["y"])
        np.testing.assert_array_equal(answer.outputs["y"], asked.inputs["x"] * 2)
        assert (answer.model, answer.version) == ("m", "1")


@pytest.mark.parametrize("settings", [{}, IN_A_THREAD], ids=["inline", "in a thread"])
async def test_what_failed_is_let_go_of_without_the_collector(
    start_engine: StartEngine, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Once its caller has seen the error, nothing keeps what was asked, however large: no cycle holds it."""

    def fail(inputs: dict[str, Array]) -> dict[str, Array]:
        if inputs["x"].any():
            raise ValueError("no")
        return double(inputs)

    engine = await start_engine(settings, m=fail)
    caplog.set_level(logging.CRITICAL, "millrace")  # what pytest has seen logged, it keeps
    asked = request()
    gone = weakref.ref(asked.inputs["x"])
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ModelError, match="no"):
            await engine.infer(asked)
        del asked
        await until(lambda: gone() is None)
    finally:
        gc.enable()


async def test_one_poisoned_item_among_24(start_engine: StartEngine) -> None:
    """One row that the model cannot take: 23 right answers and one error that says why, without a traceback."""

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        if (inputs["x"] == 13).any():
            raise ValueError("13 is unlucky\nsecret second line")
        return double(inputs)

    engine = await start_engine(m=run)
    results = await asyncio.gather(*(engine.infer(request(n)) for n in range(24)), return_exceptions=True)
    error = results.pop(13)
    assert isinstance(error, ModelError)
    assert str(error) == "model 'm' failed: ValueError: 13 is unlucky"
    assert len(results) == 23
    assert all(not isinstance(result, BaseException) for result in results)


async def test_a_model_that_exits_does_not_take_the_server_along(start_engine: StartEngine) -> None:
    """sys.exit() in a model is that request's error; the next request is served."""

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        if (inputs["x"] == 13).any():
            raise SystemExit(1)
        return double(inputs)

    for settings in ({}, IN_A_THREAD):
        engine = await start_engine(settings, m=run)
        with pytest.raises(ModelError, match="SystemExit: 1"):
            await engine.infer(request(13))
        assert (await engine.infer(request(1))).outputs["y"][0, 0] == 2


async def test_the_model_never_sees_rows_of_callers_who_left(start_engine: StartEngine) -> None:
    """100 callers leave while the lane is busy: the live request behind them is in the very next batch, alone."""
    gate = Gate()
    engine = await start_engine(IN_A_THREAD, m=gate)
    gate.open.clear()
    busy = asyncio.ensure_future(engine.infer(request()))
    await until(lambda: bool(Scripted.calls))
    gone = [asyncio.ensure_future(engine.infer(request(n))) for n in range(100)]
    await settle()
    live = asyncio.ensure_future(engine.infer(request(7)))
    await settle()
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    await settle()
    gate.open.set()
    assert (await live).outputs["y"][0, 0] == 14
    await busy
    assert Scripted.calls == [("m", (1, 4)), ("m", (1, 4))]


async def test_a_passed_deadline_never_runs_the_model(start_engine: StartEngine) -> None:
    """A request whose deadline passes behind a busy lane is answered while the lane is still busy, and never run."""
    gate = Gate()
    engine = await start_engine(IN_A_THREAD, m=gate)
    gate.open.clear()
    busy = asyncio.ensure_future(engine.infer(request()))
    await until(lambda: bool(Scripted.calls))
    with pytest.raises(DeadlineExceeded):
        await engine.infer(request(deadline=time.monotonic() + 0.01))
    gate.open.set()
    await busy
    assert len(Scripted.calls) == 1


async def test_a_full_queue_refuses(start_engine: StartEngine) -> None:
    """Past its rows the queue of a model refuses, and predicts; what it had accepted is answered."""
    gate = Gate()
    engine = await start_engine({**IN_A_THREAD, "queue_rows": 32}, m=gate)
    await engine.infer(request())
    gate.open.clear()
    Scripted.calls.clear()
    busy = asyncio.ensure_future(engine.infer(request()))
    await until(lambda: bool(Scripted.calls))
    waiting = [asyncio.ensure_future(engine.infer(request(n, 8))) for n in range(4)]
    await settle()
    with pytest.raises(QueueFull) as refused:
        await engine.infer(request())
    assert refused.value.retry_after > 0
    gate.open.set()
    await asyncio.gather(busy, *waiting)


async def test_a_slow_model_runs_in_the_lanes_thread_and_a_fast_one_inline(local_engine: StartLocal) -> None:
    """Where a model runs is decided by measuring it: this one, slower than the bound, never blocks the event loop."""
    threads = {}

    def slow(inputs: dict[str, Array]) -> dict[str, Array]:
        threads["slow"] = threading.get_ident()
        time.sleep(0.01)
        return double(inputs)

    def fast(inputs: dict[str, Array]) -> dict[str, Array]:
        threads["fast"] = threading.get_ident()
        return double(inputs)

    engine = await local_engine({"inline_ms": 5}, slow=slow, fast=fast)
    await engine.infer(request(model="slow"))
    await engine.infer(request(model="fast"))
    assert threads["slow"] != threading.get_ident()
    assert threads["fast"] == threading.get_ident()


async def test_only_equal_shapes_share_a_batch(start_engine: StartEngine, tmp_path: Path) -> None:
    """Requests of a model with a variable dimension are batched by shape; never inline: its time is unknown."""
    add_model(tmp_path, "v", CONFIG.replace("[ 4 ]", "[ -1 ]"))
    threads = set()

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        threads.add(threading.get_ident())
        return double(inputs)

    engine = await start_engine({"inline_ms": 1000}, v=run)
    widths = [2, 3, 2, 3, 2]
    answers = await asyncio.gather(
        *(engine.infer(InferRequest("v", "", {"x": np.ones((1, width), "<f4")})) for width in widths)
    )
    assert [answer.outputs["y"].shape for answer in answers] == [(1, width) for width in widths]
    assert sorted(Scripted.calls) == [("v", (2, 3)), ("v", (3, 2))]
    assert threading.get_ident() not in threads


async def test_a_request_that_must_be_alone_shares_no_batch(start_engine: StartEngine) -> None:
    """Not even with another one that must be alone; the others share theirs."""
    engine = await start_engine(m=double)
    requests = [request(n) for n in range(5)]
    for number in (1, 3):
        requests[number].alone = True
    answers = await asyncio.gather(*(engine.infer(each) for each in requests))
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [0, 2, 4, 6, 8]
    assert sorted(Scripted.calls) == [("m", (1, 4)), ("m", (1, 4)), ("m", (3, 4))]


async def test_a_request_is_told_when_its_batch_is_about_to_run(local_engine: StartLocal) -> None:
    """Not while it waits, and not if its caller left; what its model has not begun with is not aboard."""
    gate, boarded = Gate(), list[int]()
    engine = await local_engine(IN_A_THREAD, m=gate)
    gate.open.clear()
    requests = [request(n) for n in range(3)]
    for number, each in enumerate(requests):
        each.boarding = lambda _, number=number: boarded.append(number)
    first = asyncio.create_task(engine.infer(requests[0]))
    await until(lambda: bool(Scripted.calls))
    others = [asyncio.create_task(engine.infer(each)) for each in requests[1:]]
    await settle()
    assert boarded == [0]
    others[0].cancel()
    gate.open.set()
    await asyncio.gather(first, others[1])
    assert boarded == [0, 2]


NO_BATCHING = CONFIG.replace("dynamic_batching { }", "")
NO_ROWS = NO_BATCHING.replace("max_batch_size: 32", "")


@pytest.mark.parametrize(
    ("config", "shape"), [(NO_BATCHING, (1, 4)), (NO_ROWS, (4,))], ids=["no dynamic_batching", "no rows"]
)
async def test_without_dynamic_batching_requests_run_alone(
    start_engine: StartEngine, tmp_path: Path, config: str, shape: tuple[int, ...]
) -> None:
    """As in Triton: no dynamic_batching, or no batch dimension, and each request is one run."""
    add_model(tmp_path, "m", config)
    engine = await start_engine(m=double)
    answers = await asyncio.gather(
        *(engine.infer(InferRequest("m", "", {"x": np.full(shape, n, "<f4")})) for n in range(3))
    )
    assert [float(answer.outputs["y"].ravel()[0]) for answer in answers] == [0.0, 2.0, 4.0]
    assert Scripted.calls == [("m", shape)] * 3


async def test_a_request_that_does_not_fit_never_reaches_the_queue(start_engine: StartEngine) -> None:
    """Validation comes first: nothing is queued, nothing is run."""
    engine = await start_engine(m=double)
    with pytest.raises(InvalidInput):
        await engine.infer(request(rows=33))
    with pytest.raises(NotFound, match="unknown model: 'nope' is not found"):
        await engine.infer(request(model="nope"))
    with pytest.raises(NotFound, match="unknown model: 'm' version 2 is not found"):
        await engine.infer(InferRequest("m", "2", {}))
    assert Scripted.calls == []


async def test_wrong_rows_from_the_model_are_the_models_error(start_engine: StartEngine) -> None:
    """A model that loses rows of a batch fails those requests; nobody gets another's row."""

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        x = inputs["x"]
        return {"y": x[:-1] if (x == 5).any() else x}

    engine = await start_engine(m=run)
    results = await asyncio.gather(engine.infer(request(5)), engine.infer(request(6)), return_exceptions=True)
    assert isinstance(results[0], ModelError)
    assert not isinstance(results[1], BaseException)
    assert results[1].outputs["y"][0, 0] == 6


async def test_versions(start_engine: StartEngine, tmp_path: Path) -> None:
    """Each served version answers under its number, the highest without one."""
    config = CONFIG + "version_policy { all { } }"
    add_model(tmp_path, "m", config, ("1", "3", "12"))
    engine = await start_engine(m=double)
    assert engine.metadata("m").versions == ("1", "3", "12")
    assert (await engine.infer(request())).version == "12"
    assert (await engine.infer(InferRequest("m", "3", {"x": np.ones((1, 4), "<f4")}))).version == "3"


async def test_a_delay_in_the_config_gathers_a_batch(start_engine: StartEngine, tmp_path: Path) -> None:
    """max_queue_delay_microseconds reaches the queue: two requests that come apart share a batch."""
    config = CONFIG.replace("batching { }", "batching { max_queue_delay_microseconds: 60000000 }").replace(
        "max_batch_size: 32", "max_batch_size: 2"
    )
    add_model(tmp_path, "m", config)
    engine = await start_engine(m=double)
    first = asyncio.ensure_future(engine.infer(request()))
    await settle()
    assert Scripted.calls == []
    await engine.infer(request())
    await first
    assert Scripted.calls == [("m", (2, 4))]


async def test_every_input_counts_for_the_bucket(start_engine: StartEngine, tmp_path: Path) -> None:
    """Requests whose second input differs in shape do not meet, although their first is the same."""
    second = '{ name: "x" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "z" data_type: TYPE_FP32 dims: [ -1 ] }'
    add_model(
        tmp_path,
        "m",
        CONFIG.replace('{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] }', second).replace("[ 4 ]", "[ -1 ]"),
    )
    engine = await start_engine(m=double)
    await asyncio.gather(
        *(
            engine.infer(InferRequest("m", "", {"x": np.ones((1, 4), "<f4"), "z": np.ones((1, n), "<f4")}))
            for n in (1, 2, 1)
        )
    )
    assert sorted(Scripted.calls) == [("m", (1, 4)), ("m", (2, 4))]


async def test_a_lost_device_is_neither_live_nor_asked_again(local_engine: StartLocal) -> None:
    """When a backend says that its device is beyond repair, health says so, and every later request is told at once."""

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if (inputs["x"] == 13).any():
            raise DeviceLost("cuda:0 is lost: CUDA error: device-side assert triggered")
        return double(inputs)

    engine = await local_engine(m=run)
    with pytest.raises(DeviceLost):
        await engine.infer(request(13))
    assert not engine.live()
    assert not engine.ready()
    Scripted.calls.clear()
    with pytest.raises(NotReady, match="cuda:0 is lost"):
        await engine.infer(request(1))
    assert Scripted.calls == []


async def test_a_batch_that_loses_the_device_is_not_run_in_halves(local_engine: StartLocal) -> None:
    """Everybody aboard is told, each with an error of its own, after one run."""

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if (inputs["x"] == 13).any():
            raise DeviceLost("cuda:0 is lost")
        return double(inputs)

    engine = await local_engine(m=run)
    answers = await asyncio.gather(*(engine.infer(request(n)) for n in (12, 13, 14)), return_exceptions=True)
    assert [(type(answer), str(answer)) for answer in answers] == [(DeviceLost, "cuda:0 is lost")] * 3
    assert len({id(answer) for answer in answers}) == 3
    assert Scripted.calls == [("m", (3, 4))]


async def test_what_was_measured_is_learned_twice_before_the_first_request(local_engine: StartLocal) -> None:
    """The first batch of all counts for nothing: after two rounds both sizes are in what is known."""
    engine = await local_engine(m=double)
    served = engine._models["m", ""]
    model, batcher = served.model, served.batcher
    assert [cost for cost, _ in model.measured] == [1, 32]
    known = Cost()
    for cost, seconds in [*model.measured, *model.measured]:
        known.learn(cost, seconds)
    learned = batcher.pending.cost
    assert (learned.samples, learned.a, learned.b) == (4, known.a, known.b)


@pytest.mark.parametrize(
    ("behave", "text"),
    [
        (lambda inputs: {}, "gives no output 'y'"),
        (lambda inputs: {"y": inputs["x"].astype("<f8")}, "promises FP32"),
        (lambda inputs: {"y": inputs["x"][:, :2]}, r"promises FP32 \[-1, 4\], the model gives float32 \[1, 2\]"),
        (lambda inputs: 1 // 0, "ZeroDivisionError"),
    ],
)  # fmt: skip
async def test_a_model_that_breaks_its_promise_is_not_served(
    local_engine: StartLocal, behave: object, text: str
) -> None:
    """Warm-up compares what the model gives with what its config promises; a difference ends the start."""
    with pytest.raises(ModelError, match=text):
        await local_engine(m=behave)


async def test_a_queue_smaller_than_a_batch_is_refused(local_engine: StartLocal) -> None:
    """The setting that is too small is named, with the model that needs more."""
    with pytest.raises(ConfigError, match=r"MILLRACE_QUEUE_ROWS.*'m', 32 rows, got 31"):
        await local_engine({"queue_rows": 31}, m=double)


async def test_stacking_that_was_measured_is_not_counted_twice(
    local_engine: StartLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that took 5 seconds, 2 of them stacking, is predicted to run for 3, and to be done after 5."""

    async def warm(self: LocalModel, inline_seconds: float) -> float:
        self.preparation.learn(32, 2.0)
        self.measured = [(32, 5.0)]
        return 5.0

    monkeypatch.setattr(LocalModel, "warm", warm)
    engine = await local_engine(m=double)
    pending = engine._models["m", "1"].batcher.pending
    assert pending.cost.seconds(32) == 3.0
    assert pending._done(32, 0.0, -math.inf) == 5.0


async def test_a_queue_smaller_than_a_row_is_refused(local_engine: StartLocal) -> None:
    """Four numbers of four bytes: nothing would ever fit into less."""
    with pytest.raises(ConfigError, match=r"MILLRACE_QUEUE_BYTES.*'m', 16 bytes, got 15"):
        await local_engine({"queue_bytes": 15}, m=double)
    await local_engine({"queue_bytes": 16}, m=double)


async def test_ready_tells_the_truth(local_engine: StartLocal, tmp_path: Path) -> None:
    """Not ready before the start, nor while draining; draining it serves, stopped it refuses."""
    gc.unfreeze()
    add_model(tmp_path, "m")
    engine = LocalEngine(Settings(models=str(tmp_path)))
    assert not engine.ready()
    await engine.start()
    assert engine.ready()
    assert engine.live()
    assert gc.get_freeze_count() > 1000
    engine.draining = True
    assert not engine.ready()
    assert (await engine.infer(request())).outputs["y"][0, 0] == 2
    await engine.stop()
    with pytest.raises(NotReady):
        await engine.infer(request())
    assert not engine.live()


async def test_a_stuck_model_is_neither_live_nor_ready(start_engine: StartEngine) -> None:
    """Health comes from the lane: a batch that does not end turns it false, and its end turns it true again."""
    gate = Gate()
    engine = await start_engine({**IN_A_THREAD, "stuck_after": 0.5}, m=gate)
    gate.open.clear()
    task = asyncio.ensure_future(engine.infer(request()))
    await until(lambda: not owner(engine).live())
    await hear(engine)
    assert not engine.live()
    assert not engine.ready()
    gate.open.set()
    await task
    await until(owner(engine).ready)
    await hear(engine)
    assert engine.ready()
