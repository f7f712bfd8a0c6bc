"""The queue as clients meet it: priorities, timeouts, fair shares, bounds, and what /batching says of it."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from batching import Cost, OutOfMemory
from engine.types import Array, Engine
from tests.client import Answer, Client
from tests.conftest import StartEngine, StartLocal
from tests.forms import owner
from tests.scripted import CONFIG, Gate, Scripted, add_model, double
from tests.timing import settle, until

pytestmark = pytest.mark.in_memory("what waits, and in which order, is told apart by turns of the event loop")

INFER = "/v2/models/m/infer"
IN_A_THREAD = {"inline_ms": 0}
ClientOf = Callable[..., Client]


def body(value: float = 1.0, rows: int = 1, **parameters: Any) -> bytes:
    tensor = {"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": [value] * 4 * rows}
    return orjson.dumps({"inputs": [tensor], "parameters": parameters})


def config(max_batch_size: int = 1, batching: str = "", more: str = "") -> str:
    text = CONFIG.replace("dynamic_batching { }", f"dynamic_batching {{ {batching} }}")
    return text.replace("max_batch_size: 32", f"max_batch_size: {max_batch_size}") + more


class Busy:
    """A model whose lane is kept busy by one request, of the value -1; what comes then waits until `open`.

    Attributes:
        batches: the first value of each row that the model was given, batch by batch.
    """

    def __init__(self, client: Client, engine: Engine, gate: Gate, batches: list[list[float]]) -> None:
        self.client, self.engine, self.gate, self.batches = client, engine, gate, batches
        self.tasks: list[asyncio.Task[Answer]] = []
        self.pending = owner(engine)._models["m", ""].batcher.pending

    def post(self, content: bytes, headers: dict[str, str] | None = None) -> asyncio.Task[Answer]:
        self.tasks.append(asyncio.ensure_future(self.client("POST", INFER, content, headers)))
        return self.tasks[-1]

    async def open(self) -> list[int]:
        """Let the model go on, and return everybody's status."""
        await settle()
        self.gate.open.set()
        return [answer.status for answer in await asyncio.gather(*self.tasks)]


HoldM = Callable[..., Coroutine[Any, Any, Busy]]


@pytest.fixture
def hold(start_engine: StartEngine, client_of: ClientOf, tmp_path: Path) -> HoldM:
    """hold(config, settings...): a model with that config, whose lane is busy."""
    return holding(start_engine, client_of, tmp_path)


@pytest.fixture
def hold_here(local_engine: StartLocal, client_of: ClientOf, tmp_path: Path) -> HoldM:
    """As `hold`, in this process."""
    return holding(local_engine, client_of, tmp_path)


def holding(start_engine: StartEngine | StartLocal, client_of: ClientOf, tmp_path: Path) -> HoldM:
    async def start(text: str, **settings: Any) -> Busy:
        add_model(tmp_path, "m", text)
        gate = Gate()

        batches: list[list[float]] = []

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            batches.append(inputs["x"][:, 0].tolist())
            return gate(inputs)

        engine = await start_engine({**IN_A_THREAD, **settings}, m=run)
        batches.clear()
        held = Busy(client_of(engine, **settings), engine, gate, batches)
        gate.open.clear()
        held.post(body(-1))
        await until(lambda: bool(batches))
        return held

    return start


def as_if_measured(held: Busy, seconds: float) -> None:
    """Every batch is expected to take so long, whatever its size."""
    held.pending.cost = Cost()
    for _ in range(2):
        held.pending.cost.learn(1, seconds)


LEVELS = "priority_levels: 3 default_priority_level: 2"


async def test_priorities_go_first(hold: HoldM) -> None:
    """`parameters.priority`: 1 before 2 before 3; none, 0, or one that there is not, is the model's default."""
    held = await hold(config(1, LEVELS))
    for value, priority in ((1, 3), (2, 2), (3, None), (4, 1), (5, 0), (6, 99), (7, 1)):
        held.post(body(value, **({} if priority is None else {"priority": priority})))
        await settle()
    assert set(await held.open()) == {200}
    assert held.batches[1:] == [[4], [7], [2], [3], [5], [6], [1]]


@pytest.mark.parametrize("priority", [-1, 1.5, "1", True, None])
async def test_priorities_that_are_none_are_400(
    priority: object, start_engine: StartEngine, client_of: ClientOf
) -> None:
    """What is no whole number from 0 on is named; the model does not run."""
    answer = await client_of(await start_engine(m=double))("POST", INFER, body(priority=priority))
    assert answer.status == 400
    assert answer.error.startswith("Unable to parse 'priority': attempt to access JSON non-unsigned-integer")
    assert Scripted.calls == []


TIMEOUT = "default_queue_policy { default_timeout_microseconds: 60000000 allow_timeout_override: true }"


async def test_a_timeout_of_its_own_is_504(hold: HoldM) -> None:
    """`parameters.timeout`, in microseconds, where the model allows it: Triton's text, and the model does not run."""
    held = await hold(config(1, TIMEOUT))
    answer = await held.post(body(1, timeout=1000))
    assert (answer.status, answer.error) == (504, "Request timeout expired")
    held.post(body(2, timeout=30_000_000))
    held.post(body(3, timeout=0))
    assert (await held.open()).count(200) == 3
    assert held.batches == [[-1], [2], [3]]
    assert (await held.engine.batching("m"))["items"]["expired"] == 1


async def test_a_timeout_is_ignored_where_the_model_does_not_allow_it(hold: HoldM) -> None:
    """As in Triton."""
    held = await hold(config(1, TIMEOUT.replace("true", "false")))
    early = held.post(body(1, timeout=1))
    late = held.post(body(2), {"X-Request-Timeout-Ms": "100"})
    assert (await late).status == 504
    assert not early.done()
    assert (await held.open()).count(200) == 2


async def test_a_models_timeout_is_504(hold: HoldM) -> None:
    """A level's own timeout needs no parameter."""
    policy = "default_queue_policy { default_timeout_microseconds: 50000 }"
    held = await hold(config(1, policy))
    answer = await held.post(body(1))
    assert (answer.status, answer.error) == (504, "Request timeout expired")
    await held.open()


async def test_a_deadline_says_what_happened(hold: HoldM) -> None:
    """A time budget that ends while the request waits is 504, in words that are not the timeout's."""
    held = await hold(config(1))
    answer = await held.post(body(1), {"X-Request-Timeout-Ms": "100"})
    text = "the deadline passed, or could no longer be met, while the request waited in the queue"
    assert (answer.status, answer.error) == (504, text)
    assert await held.open() == [200, 504]
    assert held.batches == [[-1]]


async def test_a_deadline_that_cannot_be_met_is_429_at_once(hold: HoldM) -> None:
    """By how long batches take, and what is ahead: refused at the door, with by how much it is too late."""
    held = await hold(config(1))
    as_if_measured(held, 100.0)
    held.post(body(1))
    answer = await held.post(body(2), {"X-Request-Timeout-Ms": "150000"})
    assert answer.status == 429
    assert 40 <= int(answer.headers["retry-after"]) <= 51
    assert answer.error.startswith("the deadline is 150 s away, the answer is expected in ")
    roomy = held.post(body(3), {"X-Request-Timeout-Ms": "1000000"})
    await settle()
    assert not roomy.done()
    assert (await held.engine.batching("m"))["items"]["refused"] == {"CannotMeetDeadline": 1}
    assert sorted(await held.open()) == [200, 200, 200, 429]
    assert held.batches == [[-1], [1], [3]]


@pytest.mark.parametrize(("header", "batch"), [("X-Client", 1), ("", 11)])
async def test_a_flood_keeps_nobody_else_waiting(header: str, batch: int, hold: HoldM) -> None:
    """With MILLRACE_CLIENT_HEADER another client's request is in the next batch; without, behind the whole flood."""
    held = await hold(config(4), client_header=header)
    for value in range(40):
        held.post(body(value), {"X-Client": "flood"})
    await settle()
    held.post(body(100), {"x-client": "other"})
    assert set(await held.open()) == {200}
    assert len(held.batches) == 1 + 11
    (found,) = [number for number, values in enumerate(held.batches) if 100 in values]
    assert found == batch


async def test_a_flood_leaves_room_for_others(hold: HoldM) -> None:
    """A client may fill the queue only as far as others keep room: one of few requests is let in where it is not."""
    held = await hold(config(4), client_header="X-Client", queue_rows=10)
    flood = [held.post(body(n), {"X-Client": "flood"}) for n in range(20)]
    await settle()
    accepted = [task for task in flood if not task.done()]
    assert len(accepted) == 5
    assert all("of its own" in task.result().error for task in flood if task.done())
    other = held.post(body(100), {"X-Client": "other"})
    await settle()
    assert not other.done()
    statuses = await held.open()
    assert (statuses.count(200), statuses.count(429)) == (7, 15)


async def test_a_queue_full_of_bytes_is_429(hold: HoldM) -> None:
    """MILLRACE_QUEUE_BYTES bounds what waits: 16 bytes for each row here. The answer says which bound, and when."""
    held = await hold(config(4), queue_bytes=64)
    as_if_measured(held, 100.0)
    for value in range(3):
        held.post(body(value))
    await settle()
    tight = await held.post(body(9, rows=2))
    assert (tight.status, tight.error) == (429, "the queue is full: 48 of 64 bytes wait, no room for 32 more")
    held.post(body(3))
    await settle()
    full = await held.post(body(4))
    assert (full.status, full.error.startswith("the queue is full: 64 of 64 bytes wait")) == (429, True)
    for answer in (tight, full):  # one batch of four, behind one that began before anything was known of its time
        assert 90 <= int(answer.headers["retry-after"]) <= 101
    assert (await held.engine.batching("m"))["items"]["refused"] == {"QueueFull": 2}
    assert (await held.open()).count(200) == 5
    assert held.pending.nbytes == 0


async def test_a_request_larger_than_the_queue_is_413(hold: HoldM) -> None:
    """Tensors that could not wait even in an empty queue: to come back would not help."""
    held = await hold(config(4), queue_bytes=31)
    answer = await held.post(body(1, rows=2))
    assert (answer.status, answer.error) == (
        413,
        "the tensors of 32 bytes are over the limit of 31 bytes (MILLRACE_QUEUE_BYTES)",
    )
    assert await held.open() == [200, 413]


async def test_a_full_queue_refuses_before_it_decodes(hold_here: HoldM) -> None:
    """A body that is not even JSON is 429 while the queue is full, and 400 as soon as it is not.

    In process: a worker of a separate engine learns that the queue is full when that refuses the request.
    """
    held = await hold_here(config(4), queue_rows=4)
    for value in range(4):
        held.post(body(value))
    await settle()
    for content in (b"no JSON", body(5), body(rows=5)):
        answer = await held.client("POST", INFER, content)
        assert (answer.status, answer.error) == (429, "the queue is full: 4 of 4 rows wait")
        assert int(answer.headers["retry-after"]) >= 1
        assert "connection" not in answer.headers  # its body was read
    assert (await held.engine.batching("m"))["items"]["refused"] == {"QueueFull": 3}
    assert (await held.open()) == [200] * 5
    assert (await held.client("POST", INFER, b"no JSON")).status == 400


async def test_a_level_of_its_own_is_full(hold: HoldM) -> None:
    """`max_queue_size` counts the requests of a level; another level has room."""
    held = await hold(config(1, LEVELS + " priority_queue_policy { key: 3 value { max_queue_size: 1 } }"))
    held.post(body(1, priority=3))
    await settle()
    answer = await held.post(body(2, priority=3))
    assert (answer.status, answer.error) == (429, "Exceeds maximum queue size: 1 requests of priority level 3 wait")
    held.post(body(3, priority=2))
    assert sorted(await held.open()) == [200, 200, 200, 429]
    assert held.batches == [[-1], [3], [1]]


async def test_answers_keep_the_order_of_their_questions(hold: HoldM) -> None:
    """`preserve_ordering`: an answer is given when those asked for before it are, failed ones too."""
    held = await hold(config(2, "preserve_ordering: true"))
    order: list[int] = []

    def note(value: int, task: object) -> None:
        order.append(value)

    for value in range(6):
        held.post(body(value)).add_done_callback(partial(note, value))
        await settle()
    assert set(await held.open()) == {200}
    assert order == list(range(6))


async def test_out_of_memory_alone_is_500_in_one_line(start_engine: StartEngine, client_of: ClientOf) -> None:
    """The client learns that its request is too large for the device's memory; the next one is served."""
    room = 32

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if len(inputs["x"]) > room:
            raise OutOfMemory("CUDA out of memory.\nsecret second line")
        return double(inputs)

    client = client_of(await start_engine(m=run))
    room = 4
    answer = await client("POST", INFER, body(rows=8))
    assert (answer.status, answer.json) == (500, {"error": "model 'm' ran out of memory on this request"})
    assert (await client("POST", INFER, body(rows=4))).status == 200


async def test_a_cached_answer_has_the_askers_id(
    start_engine: StartEngine, client_of: ClientOf, tmp_path: Path
) -> None:
    """Whoever asks gets its own id, its own outputs, in its own form, from one computation."""
    add_model(tmp_path, "m", config(4, more="response_cache { enable: true }"))
    client = client_of(await start_engine(m=double))
    questions: list[dict[str, Any]] = [
        {"id": "a"}, {"id": "b"}, {}, {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]},
        {"priority": 7},
    ]  # fmt: skip
    inputs = orjson.loads(body(2))["inputs"]
    answers = await asyncio.gather(
        *(client("POST", INFER, orjson.dumps({"inputs": inputs, **question})) for question in questions)
    )
    assert [answer.status for answer in answers] == [200] * 5
    texts = [orjson.loads(answer.body.partition(b"}]}")[0] + b"}]}") for answer in answers]
    assert [text.get("id") for text in texts] == ["a", "b", None, None, None]
    assert texts[0]["outputs"][0]["data"] == [4.0] * 4
    assert answers[3].body.endswith(np.full(4, 4, "<f4").tobytes())
    assert Scripted.calls == [("m", (1, 4))]


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([1, 0], "size of ragged input 'x' must be at least 1 for 'm'"),
        ([1, 9], "size 9 of ragged input 'x' must be <= 8 for 'm'"),
    ],
)
async def test_lengths_that_do_not_fit_are_400(
    shape: list[int], text: str, start_engine: StartEngine, client_of: ClientOf, tmp_path: Path
) -> None:
    """A ragged model's request of no length, or of one beyond its grid: the field is named, the model does not run."""
    ragged = config(4, more='parameters { key: "padded_lengths" value { string_value: "4 8" } }').replace(
        "dims: [ 4 ]", "dims: [ -1 ] allow_ragged_batch: true", 1
    )
    add_model(tmp_path, "m", ragged.replace("dims: [ 4 ]", "dims: [ -1 ]"))
    client = client_of(await start_engine(m=double))
    tensor = {"name": "x", "shape": shape, "datatype": "FP32", "data": [1] * shape[1]}
    answer = await client("POST", INFER, orjson.dumps({"inputs": [tensor]}))
    assert (answer.status, answer.error) == (400, f"[request id: <id_unknown>] {text}")
    assert Scripted.calls == []


async def test_lengths_that_disagree_are_400(start_engine: StartEngine, client_of: ClientOf, tmp_path: Path) -> None:
    """All ragged inputs of a request have one length; the answer names them with theirs."""
    two = ", ".join(f'{{ name: "{name}" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }}' for name in "xz")
    text = config(4).replace('{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] }', two).replace("[ 4 ]", "[ -1 ]")
    add_model(tmp_path, "m", text)
    client = client_of(await start_engine(m=double))
    tensors = [
        {"name": name, "shape": [1, size], "datatype": "FP32", "data": [1] * size}
        for name, size in (("x", 2), ("z", 3))
    ]
    answer = await client("POST", INFER, orjson.dumps({"inputs": tensors}))
    assert answer.status == 400
    assert "must have the same size for 'm', got 2 for 'x', 3 for 'z'" in answer.error
    assert Scripted.calls == []


BATCHING = "/v2/models/m/batching"


async def test_the_batching_endpoint_tells_what_the_queue_does(hold: HoldM) -> None:
    """Queue, cost, sizes and why each batch left, waits, who left, who was refused: JSON, at any time."""
    held = await hold(config(4), queue_rows=6)
    leave = asyncio.Event()
    gone = asyncio.ensure_future(held.client("POST", INFER, body(9), leave=leave))
    await settle()
    leave.set()
    await gone
    for value in range(6):
        held.post(body(value))
    await settle()
    assert (await held.client("POST", INFER, body())).status == 429
    answer = await held.client("GET", BATCHING)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    report = answer.json
    assert report["model"] == {"name": "m", "version": "1", "inline": False}
    assert {key: report["queue"][key] for key in ("items", "rows", "bytes")} == {"items": 6, "rows": 6, "bytes": 96}
    assert report["queue"]["drain_seconds"] > 0
    assert report["cost"]["batches_learned_from"] >= 2
    assert report["cost"]["largest"] is None
    assert report["batches"]["by_rows"] == {}
    assert set(await held.open()) == {200}
    report = (await held.client("GET", "/v2/models/m/versions/1/batching")).json
    assert report["queue"] == {"items": 0, "rows": 0, "bytes": 0, "drain_seconds": 0.0}
    assert report["batches"]["by_rows"] == {"1": 1, "2": 1, "4": 1}
    assert report["batches"]["by_reason"] == {"free": 2, "full": 1}
    assert report["batches"]["seconds"]["count"] == 3
    assert [batch["rows"] for batch in report["batches"]["latest"]] == [1, 4, 2]
    assert report["items"]["wait_seconds"]["count"] == 7
    assert report["items"]["left"]["queued"] == 1
    assert report["items"]["refused"] == {"QueueFull": 1}
    assert report["items"]["expired"] == 0


async def test_a_report_of_what_never_ran(start_engine: StartEngine, client_of: ClientOf, tmp_path: Path) -> None:
    """It is there from the start; a model with a cache reports that too."""
    add_model(tmp_path, "m", config(4, more="response_cache { enable: true }"))
    client = client_of(await start_engine(m=double))
    report = (await client("GET", BATCHING)).json
    assert report["batches"]["latest"] == []
    assert report["cache"]["entries"] == 0
    assert report["cost"]["seconds_per_batch"] >= 0


async def test_the_batching_endpoint_of_no_model_is_404(start_engine: StartEngine, client_of: ClientOf) -> None:
    """An unknown model or version is 404 in Triton's words; the other methods are 405."""
    client = client_of(await start_engine(m=double))
    for path in ("/v2/models/x/batching", "/v2/models/m/versions/9/batching"):
        answer = await client("GET", path)
        assert answer.status == 404
        assert answer.error.startswith("Request for unknown model: '")
    assert (await client("POST", BATCHING, b"{}")).status == 405


async def test_head_of_the_batching_endpoint(start_engine: StartEngine, client_of: ClientOf) -> None:
    """The head alone."""
    client = client_of(await start_engine(m=double))
    get, head = await client("GET", BATCHING), await client("HEAD", BATCHING)
    assert (head.status, head.body, head.headers) == (200, b"", get.headers)
