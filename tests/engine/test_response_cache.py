"""response_cache { enable: true }: equal requests are computed once, and nobody gets another's answer."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching import DeadlineExceeded, QueueFull
from engine.errors import InvalidInput, ModelError
from engine.types import Array, Engine, InferRequest
from tests.conftest import StartEngine, StartLocal
from tests.scripted import CONFIG, Gate, Scripted, add_model, double
from tests.timing import settle, until

CACHED = CONFIG + "response_cache { enable: true }\n"
TWO_OF_ANY_SIZE = CACHED.replace(
    '{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] }',
    '{ name: "x" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "z" data_type: TYPE_FP32 dims: [ -1 ] }',
).replace("[ 4 ]", "[ -1 ]")
IN_A_THREAD = {"inline_ms": 0}


def request(value: float = 1.0, rows: int = 1, model: str = "m", **more: Any) -> InferRequest:
    return InferRequest(model, "", {"x": np.full((rows, 4), value, "<f4")}, **more)


def two(x: Any, z: Any) -> InferRequest:
    return InferRequest("m", "", {"x": np.array(x, "<f4"), "z": np.array(z, "<f4")})


async def ask(engine: Engine, *requests: InferRequest) -> list[Any]:
    return await asyncio.gather(*map(engine.infer, requests), return_exceptions=True)


async def counts(engine: Engine, *names: str, model: str = "m") -> list[int]:
    report = (await engine.batching(model))["cache"]
    return [report[name] for name in names]


async def test_equal_requests_are_computed_once(start_engine: StartEngine, tmp_path: Path) -> None:
    """Together or later: the model sees one row for all of them, and the report says how it came."""
    add_model(tmp_path, "m", CACHED)
    engine = await start_engine(m=double)
    for value in [*await ask(engine, *(request(3) for _ in range(10))), await engine.infer(request(3))]:
        np.testing.assert_array_equal(value.outputs["y"], np.full((1, 4), 6, "<f4"))
    assert Scripted.calls == [("m", (1, 4))]
    assert await counts(engine, "entries", "misses", "joined", "hits", "waiting") == [1, 1, 9, 1, 0]


async def test_different_requests_are_all_computed(start_engine: StartEngine, tmp_path: Path) -> None:
    """Another value, or another number of rows, is another request; so is the sign of a zero."""
    add_model(tmp_path, "m", CACHED)
    engine = await start_engine(m=double)
    requests = [request(1), request(2), request(1, rows=2), request(0.0), request(-0.0)]
    for asked, answer in zip(requests, await ask(engine, *requests), strict=True):
        np.testing.assert_array_equal(answer.outputs["y"], asked.inputs["x"] * 2)
    assert Scripted.calls == [("m", (6, 4))]


async def test_without_it_nothing_is_kept(start_engine: StartEngine) -> None:
    """A model that does not ask for it computes every time, and reports no cache."""
    engine = await start_engine(m=double)
    await ask(engine, request(), request())
    await engine.infer(request())
    assert Scripted.calls == [("m", (2, 4)), ("m", (1, 4))]
    assert "cache" not in await engine.batching("m")


async def test_models_and_versions_are_kept_apart(start_engine: StartEngine, tmp_path: Path) -> None:
    """The same input to another model or version is another request; no number is the highest version."""
    for name in ("m", "n"):
        add_model(tmp_path, name, CACHED + "version_policy { all { } }", ("1", "2"))
    engine = await start_engine(m=double, n=lambda inputs: {"y": inputs["x"] * 3})
    x = {"x": np.ones((1, 4), "<f4")}
    asked = [("m", "1"), ("m", "2"), ("m", ""), ("n", "1"), ("n", "2")]
    answers = await ask(engine, *(InferRequest(model, version, x) for model, version in asked))
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [2, 2, 2, 3, 3]
    assert [(answer.model, answer.version) for answer in answers] == [
        ("m", "1"), ("m", "2"), ("m", "2"), ("n", "1"), ("n", "2"),
    ]  # fmt: skip
    assert len(Scripted.calls) == 4


async def test_shapes_and_names_are_part_of_the_key(start_engine: StartEngine, tmp_path: Path) -> None:
    """The same bytes in another shape, or under each other's names, are another request; their order is not."""
    add_model(tmp_path, "m", TWO_OF_ANY_SIZE)
    engine = await start_engine(m=lambda inputs: {"y": inputs["x"] - inputs["z"].sum(1, keepdims=True)})
    requests = [
        two([[1, 2, 3, 4]], [[5, 6]]),
        two([[1, 2], [3, 4]], [[5], [6]]),
        two([[5, 6]], [[1, 2, 3, 4]]),
        two([[1, 2]], [[3, 4, 5, 6]]),
        two([[1, 2, 3, 4, 5]], [[6]]),
        two([[1, 2]], [[]]),
        two([[]], [[1, 2]]),
    ]
    answers = await ask(engine, *requests)
    for asked, answer in zip(requests, answers, strict=True):
        x, z = asked.inputs["x"], asked.inputs["z"]
        np.testing.assert_array_equal(answer.outputs["y"], x - z.sum(1, keepdims=True))
    Scripted.calls.clear()
    turned = InferRequest("m", "", dict(reversed(requests[0].inputs.items())))
    np.testing.assert_array_equal((await engine.infer(turned)).outputs["y"], answers[0].outputs["y"])
    assert Scripted.calls == []


async def test_another_datatype_is_no_hit(start_engine: StartEngine, tmp_path: Path) -> None:
    """Equal bytes of a datatype that the model does not take are refused, cached or not; so is an unknown output."""
    add_model(tmp_path, "m", CACHED)
    engine = await start_engine(m=double)
    await engine.infer(request(0))
    with pytest.raises(InvalidInput, match="data-type is 'INT32'"):
        await engine.infer(InferRequest("m", "", {"x": np.zeros((1, 4), "<i4")}))
    with pytest.raises(InvalidInput, match="unexpected inference output 'q'"):
        await engine.infer(request(0, outputs=("q",)))


async def test_memory_order_is_no_part_of_the_key(start_engine: StartEngine, tmp_path: Path) -> None:
    """An array that is not contiguous is the values that it shows."""
    add_model(tmp_path, "m", CACHED)
    engine = await start_engine(m=double)
    values = np.arange(8, dtype="<f4").reshape(2, 4)
    for x in (values, np.asfortranarray(values), np.repeat(values, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal((await engine.infer(InferRequest("m", "", {"x": x}))).outputs["y"], values * 2)
    assert len(Scripted.calls) == 1


async def test_a_cached_answer_owns_its_memory(local_engine: StartLocal, tmp_path: Path) -> None:
    """It is no view of its batch, which would live as long; and its bytes are counted."""
    add_model(tmp_path, "m", CACHED)
    engine = await local_engine(m=double)
    for answer in await ask(engine, *(request(n) for n in range(32))):
        assert answer.outputs["y"].base is None
    assert Scripted.calls == [("m", (32, 4))]
    entries, nbytes = await counts(engine, "entries", "bytes")
    assert entries == 32
    assert 32 * 16 < nbytes < 32 * 2000


async def test_a_leader_that_fails_fails_alone(start_engine: StartEngine, tmp_path: Path) -> None:
    """Its followers have the next one of them compute, and that answer is the one that is kept."""
    failures = 1

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        nonlocal failures
        if (inputs["x"] == 13).any() and failures:
            failures -= 1
            raise ValueError("not today")
        return double(inputs)

    add_model(tmp_path, "m", CACHED)
    engine = await start_engine(m=run)
    error, *answers = await ask(engine, *(request(13) for _ in range(5)))
    assert isinstance(error, ModelError)
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [26.0] * 4
    assert Scripted.calls == [("m", (1, 4))] * 2
    await engine.infer(request(13))
    assert len(Scripted.calls) == 2


async def test_errors_are_not_kept(start_engine: StartEngine, tmp_path: Path) -> None:
    """Whoever asks again has it computed again."""
    add_model(tmp_path, "m", CACHED)
    engine = await start_engine(m=double)
    Scripted.behaviours["m"] = lambda inputs: {"y": inputs["nope"]}
    for _ in range(2):
        with pytest.raises(ModelError):
            await engine.infer(request())
    Scripted.behaviours["m"] = double
    assert (await engine.infer(request())).outputs["y"][0, 0] == 2


async def test_a_leader_who_leaves_takes_nobody_along(start_engine: StartEngine, tmp_path: Path) -> None:
    """Behind a busy lane its caller leaves: who followed it leads, and the model sees one row for both."""
    add_model(tmp_path, "m", CACHED)
    gate = Gate()
    engine = await start_engine(IN_A_THREAD, m=gate)
    gate.open.clear()
    busy = asyncio.ensure_future(engine.infer(request(1)))
    await until(lambda: bool(Scripted.calls))
    leader, follower = (asyncio.ensure_future(engine.infer(request(2))) for _ in range(2))
    await settle()
    assert await counts(engine, "waiting", "joined") == [1, 1]
    leader.cancel()
    await settle()
    assert await counts(engine, "waiting", "handed_over") == [0, 1]
    gate.open.set()
    assert (await follower).outputs["y"][0, 0] == 4
    await busy
    assert Scripted.calls == [("m", (1, 4))] * 2


async def test_a_followers_deadline_is_its_own(start_engine: StartEngine, tmp_path: Path) -> None:
    """It is answered when its time is over, while the leader, who gave none, waits on."""
    add_model(tmp_path, "m", CACHED)
    gate = Gate()
    engine = await start_engine(IN_A_THREAD, m=gate)
    gate.open.clear()
    leader = asyncio.ensure_future(engine.infer(request()))
    await until(lambda: bool(Scripted.calls))
    with pytest.raises(DeadlineExceeded, match="waited for another's answer"):
        await engine.infer(request(deadline=asyncio.get_running_loop().time() + 0.01))
    assert await counts(engine, "late", "waiting", "waiting_bytes") == [1, 0, 0]
    gate.open.set()
    assert (await leader).outputs["y"][0, 0] == 2


async def test_followers_are_bounded_as_the_queue_is(start_engine: StartEngine, tmp_path: Path) -> None:
    """MILLRACE_QUEUE_ROWS is how many wait for others' answers; one more is refused, and the report counts it."""
    add_model(tmp_path, "m", CACHED)
    gate = Gate()
    engine = await start_engine({**IN_A_THREAD, "queue_rows": 32}, m=gate)
    gate.open.clear()
    waiting = [asyncio.ensure_future(engine.infer(request())) for _ in range(1 + 32)]
    await until(lambda: bool(Scripted.calls))
    refused = asyncio.ensure_future(engine.infer(request()))
    await settle()
    assert refused.done()
    with pytest.raises(QueueFull, match="32 requests wait for others' answers already"):
        refused.result()
    assert await counts(engine, "joined", "waiting", "refused") == [32, 32, 1]
    gate.open.set()
    await asyncio.gather(*waiting)
    assert await counts(engine, "waiting", "refused", "late") == [0, 1, 0]


async def test_followers_bytes_are_bounded_as_the_queues_are(start_engine: StartEngine, tmp_path: Path) -> None:
    """MILLRACE_QUEUE_BYTES is what their tensors hold, 16 bytes each here; what does not fit is refused at once."""
    add_model(tmp_path, "m", CACHED)
    gate = Gate()
    engine = await start_engine({**IN_A_THREAD, "queue_bytes": 40}, m=gate)
    gate.open.clear()
    waiting = [asyncio.ensure_future(engine.infer(request())) for _ in range(3)]
    await until(lambda: bool(Scripted.calls))
    refused = asyncio.ensure_future(engine.infer(request()))
    await settle()
    assert refused.done()
    with pytest.raises(QueueFull, match="32 of 40 bytes wait for others' answers already, no room for 16 more"):
        refused.result()
    assert await counts(engine, "waiting", "waiting_bytes", "refused") == [2, 32, 1]
    gate.open.set()
    await asyncio.gather(*waiting)
    assert await counts(engine, "waiting", "waiting_bytes", "refused") == [0, 0, 1]


async def test_a_bound_on_bytes_of_0_still_shares_flights(start_engine: StartEngine, tmp_path: Path) -> None:
    """MILLRACE_CACHE_BYTES 0: those who ask together are computed once, and nothing is kept."""
    add_model(tmp_path, "m", CACHED)
    engine = await start_engine({"cache_bytes": 0}, m=double)
    await ask(engine, request(), request())
    await engine.infer(request())
    assert Scripted.calls == [("m", (1, 4))] * 2
    assert await counts(engine, "entries", "bytes") == [0, 0]


async def test_what_is_kept_is_given_from_a_full_queue(start_engine: StartEngine, tmp_path: Path) -> None:
    """No door closes before an answer that is there; what has to be computed is refused, and counted."""
    add_model(tmp_path, "m", CACHED)
    gate = Gate()
    engine = await start_engine({**IN_A_THREAD, "queue_rows": 32}, m=gate)
    await engine.infer(request(1))
    gate.open.clear()
    busy = asyncio.ensure_future(engine.infer(request(2)))
    await until(lambda: len(Scripted.calls) == 2)
    waiting = asyncio.ensure_future(engine.infer(request(3, rows=32)))
    await settle()
    engine.check_room("m", "")
    assert (await engine.infer(request(1))).outputs["y"][0, 0] == 2
    with pytest.raises(QueueFull):
        await engine.infer(request(4))
    assert (await engine.batching("m"))["items"]["refused"] == {"QueueFull": 1}
    gate.open.set()
    await asyncio.gather(busy, waiting)


async def test_what_the_model_writes_to_is_no_part_of_the_key(start_engine: StartEngine, tmp_path: Path) -> None:
    """A model that overwrites its inputs changes neither what was asked nor what is kept."""

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        inputs["x"][:] *= 2
        return {"y": inputs["x"]}

    add_model(tmp_path, "m", CACHED)
    engine = await start_engine(m=run)
    asked = request(3)
    for _ in range(2):
        assert (await engine.infer(asked)).outputs["y"][0, 0] == 6
    assert asked.inputs["x"][0, 0] == 3
    assert len(Scripted.calls) == 1


async def test_a_request_that_must_be_alone_is_computed(local_engine: StartLocal, tmp_path: Path) -> None:
    """Its answer is nobody else's, neither one that is kept nor one to keep."""
    add_model(tmp_path, "m", CACHED)
    engine = await local_engine(m=double)
    await engine.infer(request())
    for _ in range(2):
        assert (await engine.infer(request(alone=True))).outputs["y"][0, 0] == 2
    assert len(Scripted.calls) == 3
    assert await counts(engine, "entries", "misses", "hits") == [1, 1, 0]
