"""CallModel and LocalCall: requests given one by one, and answered once, later, or many times."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from engine import loading
from engine.calls import LocalCall, size_of
from engine.errors import ModelError, TooSlow, Unimplemented
from engine.local import LocalEngine
from engine.settings import Settings
from engine.types import Call, Engine, InferRequest, InferResponse
from tests.conftest import InForm
from tests.scripted import add_model
from tests.timing import settle, until

CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
input [ { name: "s" data_type: TYPE_STRING dims: [ 1 ] optional: true } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
dynamic_batching { }
"""
DECOUPLED = CONFIG + "model_transaction_policy { decoupled: true }"

Behaviour = Callable[[Sequence[Call]], Sequence[InferResponse | Exception | None]]


def answer(call: Call, value: float = 2.0) -> InferResponse:
    return InferResponse(call.request.model, "1", {"y": call.request.inputs["x"] * np.float32(value)})


class Instance:
    """An instance that does what the test says, and remembers who called it."""

    behaviour: ClassVar[Behaviour]
    calls: ClassVar[list[tuple[str, int]]] = []
    ready: ClassVar[bool] = True

    def __init__(self, config: Any, file: Path, instance: Any, version: str, engine: Any, loop: Any) -> None:
        self.device = "cpu"
        self.name = instance.name

    def _record(self, what: str) -> None:
        self.calls.append((f"{self.name} {what}", threading.get_ident()))

    def initialize(self) -> None:
        self._record("initialize")

    def execute(self, calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        self._record(f"execute {len(calls)}")
        return type(self).behaviour(calls)

    asks = True

    def is_ready(self) -> bool:
        return self.ready

    def finalize(self) -> None:
        self._record("finalize")


Start = Callable[..., Awaitable[LocalEngine]]
Serve = Callable[..., Awaitable[Engine]]


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Start]:
    """start(config, settings...): an engine in this process that serves `Instance` as model m."""
    monkeypatch.setitem(loading.BACKENDS, "python", "tests.engine.test_calls:Instance")
    monkeypatch.setattr(
        Instance, "behaviour", staticmethod(lambda calls: [answer(call) for call in calls]), raising=False
    )
    monkeypatch.setattr(Instance, "calls", [])
    engines = []

    async def make(config: str = CONFIG, **settings: Any) -> LocalEngine:
        add_model(tmp_path, "m", config)
        (tmp_path / "m" / "1" / "model.pt2").unlink(missing_ok=True)
        (tmp_path / "m" / "1" / "model.py").write_text("class TritonPythonModel:\n    pass\n")
        engine = LocalEngine(Settings(models=str(tmp_path), model_control="explicit", load_models="*", **settings))
        engines.append(engine)
        await engine.start()
        return engine

    yield make
    for engine in engines:
        await engine.stop()


@pytest.fixture
def serve(start: Start, put_in_form: InForm) -> Serve:
    """As `start`, in each form of the service."""

    async def make(config: str = CONFIG, **settings: Any) -> Engine:
        engine = await start(config, **settings)
        return await put_in_form(engine, engine._settings)

    return make


def request(size: int = 2, **more: Any) -> InferRequest:
    return InferRequest("m", "", {"x": np.ones((1, size), "<f4"), **more})


def behave(monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour) -> None:
    monkeypatch.setattr(Instance, "behaviour", staticmethod(behaviour))


async def test_an_instance_is_called_in_one_thread_of_its_own(serve: Serve) -> None:
    """From its beginning to its end, and it is not the event loop's."""
    engine = await serve(CONFIG + "instance_group [ { count: 2 kind: KIND_CPU } ]")
    assert float((await engine.infer(request())).outputs["y"][0, 0]) == 2.0
    await engine.unload("m")
    await until(lambda: sum("finalize" in what for what, _ in Instance.calls) == 2)
    for name in ("m_0_0", "m_0_1"):
        threads = {thread for what, thread in Instance.calls if what.startswith(name)}
        assert len(threads) == 1
        assert threads != {threading.get_ident()}
    assert len({thread for _, thread in Instance.calls}) == 2


async def test_the_process_ends_with_the_models_own_end(start: Start) -> None:
    engine = await start()
    await engine.stop()
    assert [what.rpartition(" ")[2] for what, _ in Instance.calls] == ["initialize", "finalize"]


async def test_requests_share_a_batch_if_their_inputs_are_alike(serve: Serve) -> None:
    """Equal shapes and the same inputs: an optional one that is left out makes a difference."""
    engine = await serve()
    text = np.array([[b"t"]], object)
    tasks = [
        asyncio.create_task(engine.infer(each))
        for each in (request(), request(), request(3), request(s=text), request(), request(s=text))
    ]
    await asyncio.gather(*tasks)
    assert sorted(what for what, _ in Instance.calls[1:]) == ["m_0 execute 1", "m_0 execute 2", "m_0 execute 3"]


async def test_a_request_may_want_to_be_alone_and_to_know_when_it_boards(start: Start) -> None:
    """For any model: it shares no batch, and hears when its own is about to run."""
    engine = await start()
    alone, together = request(), [request(), request()]
    alone.alone = True
    boarded: list[str] = []
    alone.boarding, together[1].boarding = (lambda _: boarded.append("alone")), (lambda _: boarded.append("together"))
    await asyncio.gather(*(engine.infer(each) for each in (alone, *together)))
    assert [what for what, _ in Instance.calls[1:]] == ["m_0 execute 1", "m_0 execute 2"]
    assert boarded == ["alone", "together"]


async def test_an_answer_may_come_later_from_another_thread(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instance is free meanwhile: the second request is answered before the first."""
    held: list[Call] = []

    def later(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        held.extend(calls)
        return [None] * len(calls)

    behave(monkeypatch, later)
    engine = await serve()
    first = asyncio.create_task(engine.infer(request()))
    await until(lambda: len(held) == 1)
    second = asyncio.create_task(engine.infer(request()))
    await until(lambda: len(held) == 2)
    threading.Thread(target=held[1].respond, args=(answer(held[1], 5.0), True)).start()
    assert float((await second).outputs["y"][0, 0]) == 5.0
    assert not first.done()
    held[0].respond(ModelError("sorry"), True)
    with pytest.raises(ModelError, match="sorry"):
        await first


async def test_one_bad_request_fails_alone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the list is one request's; a batch that raises is halved."""
    poison = 7

    def picky(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        if any(call.request.inputs["x"][0, 0] == poison for call in calls):
            raise ModelError("poison")
        return [ModelError("just me") if call.request.inputs["x"][0, 0] == 3 else answer(call) for call in calls]

    behave(monkeypatch, picky)
    engine = await serve()
    asked = [InferRequest("m", "", {"x": np.full((1, 2), value, "<f4")}) for value in (1, 2, 3, poison, 5)]
    results = await asyncio.gather(*(engine.infer(each) for each in asked), return_exceptions=True)
    assert [str(each) if isinstance(each, BaseException) else float(each.outputs["y"][0, 0]) for each in results] == [
        2.0, 4.0, "just me", "poison", 10.0,
    ]  # fmt: skip
    assert (await engine.statistics("m"))[0]["inference_stats"]["fail"]["count"] == 2


async def test_a_decoupled_model_answers_as_often_as_it_likes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, while it runs and after it returned; none is fine too."""

    def count(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        for call in calls:
            assert call.decoupled
            number = int(call.request.inputs["x"][0, 0])
            for value in range(number):
                call.respond(answer(call, value), False)
            threading.Timer(0.01, call.respond, (None, True)).start()
        return [None] * len(calls)

    behave(monkeypatch, count)
    engine = await serve(DECOUPLED)
    for number in (0, 1, 3):
        asked = InferRequest("m", "", {"x": np.full((1, 2), number, "<f4")})
        values = [float(response.outputs["y"][0, 0]) async for response in engine.stream(asked)]
        assert values == [float(number * value) for value in range(number)]
    with pytest.raises(Unimplemented, match="decoupled transaction policy"):
        await engine.infer(request())
    assert engine.metadata("m").decoupled


async def test_a_decoupled_batch_that_raises_is_not_run_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses may be out already: each request gets the error instead of more of them."""

    def fail(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        calls[0].respond(answer(calls[0]), False)
        raise ModelError("broken")

    behave(monkeypatch, fail)
    engine = await serve(DECOUPLED)

    async def all_of_them() -> list[InferResponse]:
        return [response async for response in engine.stream(request())]

    with pytest.raises(ModelError, match="broken"):
        await all_of_them()
    assert sum("execute" in what for what, _ in Instance.calls) == 1


async def test_a_model_can_see_that_its_caller_left(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one answer was waited for, or many."""
    held: list[Call] = []

    def hold(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        held.extend(calls)
        for call in calls:
            call.respond(answer(call), False)
        return [None] * len(calls)

    behave(monkeypatch, hold)
    engine = await start(DECOUPLED)
    responses = engine.stream(request())
    await anext(responses)
    assert not held[0].cancelled()
    await responses.aclose()
    assert held[0].cancelled()
    held[0].respond(None, True)
    await settle()
    assert engine._models["m", ""].active == 0


async def test_an_ordinary_model_streams_its_one_answer(serve: Serve) -> None:
    engine = await serve()
    assert [float(each.outputs["y"][0, 0]) async for each in engine.stream(request())] == [2.0]


async def test_a_model_may_say_that_it_is_not_ready(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start()
    assert await engine.model_ready("m")
    monkeypatch.setattr(Instance, "ready", False)
    assert not await engine.model_ready("m")


async def test_warm_up_samples_run_on_every_instance_and_count(serve: Serve) -> None:
    """Three requests of a sample are one execution, twice; the server is ready after that."""
    engine = await serve(
        CONFIG + 'instance_group [ { count: 2 kind: KIND_CPU } ] model_warmup [ { name: "w" batch_size: 3 count: 2 '
        'inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 2 ] random_data: true } } } ]'
    )
    assert [what for what, _ in Instance.calls if "execute" in what] == ["m_0_0 execute 3"] * 2 + [
        "m_0_1 execute 3"
    ] * 2
    told = (await engine.statistics("m"))[0]
    assert (told["inference_count"], told["execution_count"]) == (12, 4)


async def test_a_model_without_a_say_is_ready_and_one_that_is_busy_says_what_it_said(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long batch makes nobody take a healthy model out of service; questions do not pile up meanwhile."""
    monkeypatch.setattr("engine.calls.READY_WITHIN", 0.05)
    release = threading.Event()

    def hold(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        assert release.wait(30)
        return [answer(call) for call in calls]

    behave(monkeypatch, hold)
    engine = await start()
    assert await engine.model_ready("m")
    running = asyncio.create_task(engine.infer(request()))
    await until(lambda: any("execute" in what for what, _ in Instance.calls))
    assert await engine.model_ready("m")
    assert await engine.model_ready("m")
    lane = engine._models["m", ""].lanes[0]
    assert lane._jobs.qsize() == 1
    monkeypatch.setattr(Instance, "asks", False)
    monkeypatch.setattr(Instance, "ready", False)
    assert await engine.model_ready("m")
    release.set()
    await running


async def test_responses_that_nobody_reads_are_not_kept(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of who left nothing is; of who reads slowly as much as a queue may hold, and then it ends with an error."""
    held: list[Call] = []

    def hold(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        held.extend(calls)
        for call in calls:
            call.respond(answer(call), False)
        return [None] * len(calls)

    behave(monkeypatch, hold)
    engine = await serve(DECOUPLED, queue_bytes=100)
    responses = engine.stream(request())
    await anext(responses)
    call = held[0]
    assert isinstance(call, LocalCall)
    for _ in range(20):
        call.respond(answer(call), False)
    await settle()
    assert call.cancelled()
    with pytest.raises(TooSlow, match="not read as fast as they came .MILLRACE_QUEUE_BYTES."):
        await anext(responses)
    call.respond(answer(call), True)
    await settle()
    assert not call._arrived


async def outcomes(engine: Engine) -> dict[str, dict[str, int]]:
    """Index of a response -> what was counted of it, and how often."""
    told = (await engine.statistics("m"))[0]["response_stats"]
    return {
        index: {name: span["count"] for name, span in spans.items() if span["count"]} for index, spans in told.items()
    }


COMPUTED = {"compute_infer": 1, "compute_output": 1}


async def test_responses_of_a_decoupled_model_are_counted_by_index(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Triton names them: one with tensors, one that is an error, and the end that comes alone."""

    def say(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        for call in calls:
            call.respond(answer(call), False)
            call.respond(answer(call), False)
            call.respond(None, True)
        return [None] * len(calls)

    behave(monkeypatch, say)
    engine = await serve(DECOUPLED)
    assert await outcomes(engine) == {}
    for _ in range(2):
        assert len([response async for response in engine.stream(request())]) == 2
    twice = {"compute_infer": 2, "compute_output": 2, "success": 2}
    assert await outcomes(engine) == {"0": twice, "1": twice, "2": {"compute_infer": 2, "empty_response": 2}}
    (told,) = await engine.statistics("m")
    assert all(spans["success"]["ns"] > 0 for spans in list(told["response_stats"].values())[:2])


async def test_what_a_decoupled_model_raises_is_a_response_that_failed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after those that were out already; a response that is an error counts the same."""

    def fail(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        calls[0].respond(answer(calls[0]), False)
        if calls[0].request.inputs["x"].shape[1] == 3:
            calls[0].respond(ModelError("given"), True)
            return [None]
        raise ModelError("raised")

    behave(monkeypatch, fail)
    engine = await serve(DECOUPLED)
    for size, said in ((2, "raised"), (3, "given")):
        with pytest.raises(ModelError, match=said):
            [response async for response in engine.stream(request(size))]
    twice = {"compute_infer": 2, "compute_output": 2}
    assert await outcomes(engine) == {"0": {**twice, "success": 2}, "1": {**twice, "fail": 2}}


async def test_a_response_that_nobody_waits_for_counts_as_cancelled(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Call] = []

    def hold(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        held.extend(calls)
        calls[0].respond(answer(calls[0]), False)
        return [None]

    behave(monkeypatch, hold)
    engine = await start(DECOUPLED)
    responses = engine.stream(request())
    await anext(responses)
    await responses.aclose()
    held[0].respond(answer(held[0]), True)
    await settle()
    assert await outcomes(engine) == {"0": {**COMPUTED, "success": 1}, "1": {"cancel": 1}}


async def test_responses_of_other_models_are_not_told_apart(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are returned, or given later: each of their requests has one."""

    def later(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        calls[0].respond(answer(calls[0]), True)
        return [None]

    behave(monkeypatch, later)
    engine = await serve()
    await engine.infer(request())
    assert await outcomes(engine) == {}


async def test_the_cache_knows_which_outputs_were_asked_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python model may compute only those; and what it is told besides."""
    seen: list[tuple[Any, Any]] = []

    def some(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        seen.extend((call.request.outputs, call.request.parameters) for call in calls)
        return [answer(call) for call in calls]

    behave(monkeypatch, some)
    engine = await serve(CONFIG.replace("dynamic_batching", "response_cache { enable: true } dynamic_batching"))
    for parameters in ({}, {}, {"user": "me"}):
        await engine.infer(InferRequest("m", "", {"x": np.ones((1, 2), "<f4")}, parameters=dict(parameters)))
    assert len(seen) == 2


def test_a_string_counts_as_what_it_holds() -> None:
    assert size_of(np.array([b"abc", b""], object)) == 2 * 8 + 3
    assert size_of(np.zeros((2, 3), "<f4")) == 24


async def test_one_response_may_be_larger_than_the_queue(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there already: to keep it until it is read takes nothing more."""

    def say(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        calls[0].respond(InferResponse("m", "1", {"y": np.zeros((1, 1000), "<f4")}), True)
        return [None]

    behave(monkeypatch, say)
    engine = await serve(DECOUPLED, queue_bytes=100)
    assert [response.outputs["y"].nbytes async for response in engine.stream(request())] == [4000]


async def test_a_reader_who_keeps_up_may_have_any_number_of_bytes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read counts no more: ten times what a queue may hold, in all."""
    held: list[Call] = []

    def hold(calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        held.extend(calls)
        calls[0].respond(answer(calls[0]), False)
        return [None]

    behave(monkeypatch, hold)
    engine = await serve(DECOUPLED, queue_bytes=20)
    responses = engine.stream(request())
    await anext(responses)
    for _ in range(13):
        for _ in range(2):
            held[0].respond(answer(held[0]), False)
        await settle()
        for _ in range(2):
            assert (await anext(responses)).outputs["y"].nbytes == 8
    await responses.aclose()


async def test_a_hook_that_hangs_is_not_ready(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch runs that it could wait for: what it said before does not count."""
    monkeypatch.setattr("engine.calls.READY_WITHIN", 0.05)
    release = threading.Event()
    engine = await serve()
    assert await engine.model_ready("m")
    monkeypatch.setattr(Instance, "is_ready", lambda self: release.wait(30))
    try:
        assert not await engine.model_ready("m")
    finally:
        release.set()
