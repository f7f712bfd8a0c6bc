"""LocalModel: a batch stacked, padded to its longest or to a grid, run, split, cut back. The models here are ragged."""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from batching import Cost
from engine.errors import ConfigError, InvalidInput, ModelError
from engine.local import LocalEngine
from engine.model import LocalModel
from engine.settings import Settings
from engine.types import Array, InferRequest
from tests.conftest import StartLocal
from tests.scripted import Gate, Scripted, add_model
from tests.timing import Clock, until

PAD = -7.0
RAGGED = """
backend: "pytorch"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "mean" data_type: TYPE_FP32 dims: [ 1 ] } ]
dynamic_batching { }
"""
IN_A_THREAD = {"inline_ms": 0}


def stacked_model(engine: LocalEngine) -> LocalModel:
    model = engine._models["m", ""].model
    assert isinstance(model, LocalModel)
    return model


def config(text: str = RAGGED, **parameters: Any) -> str:
    """RAGGED with parameters; a name's two underscores are a dot."""
    values = {"pad.x": PAD, **{key.replace("__", "."): value for key, value in parameters.items()}}
    return text + "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n' for key, value in values.items()
    )


def masked(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Each row's distance from its mean, and that mean, of what is no padding."""
    x = inputs["x"]
    real = x != PAD
    mean = np.where(real, x, 0).sum(1, dtype="<f4", keepdims=True) / real.sum(1, dtype="<f4", keepdims=True)
    return {"y": np.where(real, x - mean, np.nan).astype("<f4"), "mean": mean.astype("<f4")}


class Seen:
    """The masked model, which remembers what it was given; `Scripted` is asked for the shapes."""

    def __init__(self) -> None:
        self.batches: list[Array] = []

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.batches.append(inputs["x"].copy())
        return masked(inputs)


def request(length: int, rows: int = 1, seed: int = 0) -> InferRequest:
    values = np.random.default_rng(seed + length).integers(0, 100, (rows, length)).astype("<f4")
    return InferRequest("m", "", {"x": values})


async def ask(engine: LocalEngine, requests: list[InferRequest]) -> list[dict[str, Array]]:
    """The answers to requests that are all there before the lane looks."""
    answers = await asyncio.gather(*(engine.infer(each) for each in requests))
    return [answer.outputs for answer in answers]


def share_a_batch(engine: LocalEngine) -> None:
    """Let a batch cost so much that padding is always cheaper than another batch."""
    cost = engine._models["m", ""].batcher.pending.cost
    cost.a, cost.b = 1.0, 0.0


async def test_requests_of_different_lengths_share_a_batch(local_engine: StartLocal, tmp_path: Path) -> None:
    """They are padded with the pad value up to the longest, and each gets back as much as it sent; the mean stays."""
    add_model(tmp_path, "m", config())
    seen = Seen()
    engine = await local_engine(m=seen)
    share_a_batch(engine)
    seen.batches.clear()
    requests = [request(2), request(5), request(3, rows=2)]
    answers = await ask(engine, requests)
    (batch,) = seen.batches
    assert batch.shape == (4, 5)
    rows = sorted(map(tuple, batch.tolist()))
    assert rows == sorted(tuple(row + [PAD] * (5 - len(row))) for each in requests for row in each.inputs["x"].tolist())
    for asked, answer in zip(requests, answers, strict=True):
        assert answer["y"].shape == asked.inputs["x"].shape
        assert answer["mean"].shape == (len(asked.inputs["x"]), 1)
        assert answer["y"].flags.c_contiguous


async def test_a_ragged_batch_is_padded_with_zeros_without_a_pad_value(
    local_engine: StartLocal, tmp_path: Path
) -> None:
    """Without a `pad.` parameter the padding is 0."""
    add_model(tmp_path, "m", RAGGED)
    seen = Seen()
    engine = await local_engine(m=seen)
    share_a_batch(engine)
    seen.batches.clear()
    await ask(engine, [request(1), request(3)])
    (batch,) = seen.batches
    assert batch[:, 1:].tolist().count([0, 0]) == 1


GRID = {"padded_lengths": "4 8 16", "padded_rows": "1 4 8"}


@pytest.mark.parametrize("parameters", [{}, GRID, {"max_batch_tokens": 24}, {**GRID, "max_batch_tokens": 64}])
async def test_alone_equals_in_a_ragged_batch(
    parameters: dict[str, Any], local_engine: StartLocal, tmp_path: Path
) -> None:
    """Whatever shared the batch, and however it was padded, a masked model's answer is the one it gives alone."""
    add_model(tmp_path, "m", config(**parameters))
    engine = await local_engine(m=masked)
    share_a_batch(engine)
    rng = np.random.default_rng(1)
    requests = [request(int(rng.integers(1, 13)), int(rng.integers(1, 3)), seed) for seed in range(40)]
    together = await ask(engine, requests)
    assert len(Scripted.calls) < 30
    for asked, answer in zip(requests, together, strict=True):
        alone, bare = (await engine.infer(asked)).outputs, masked(asked.inputs)
        for name in ("y", "mean"):
            np.testing.assert_array_equal(answer[name], alone[name])
            np.testing.assert_allclose(answer[name], bare[name], rtol=1e-5, atol=1e-4)


async def test_only_what_padding_is_cheaper_for_shares_a_batch(local_engine: StartLocal, tmp_path: Path) -> None:
    """Where every token costs and a batch does not, each length runs by itself; `max_padding` bounds it as well."""
    add_model(tmp_path, "m", config())
    engine = await local_engine(m=masked)
    cost = engine._models["m", ""].batcher.pending.cost
    cost.a, cost.b = 0.0, 1.0
    await ask(engine, [request(2), request(5), request(2)])
    assert sorted(Scripted.calls) == [("m", (1, 5)), ("m", (2, 2))]


async def test_max_padding_keeps_far_lengths_apart(local_engine: StartLocal, tmp_path: Path) -> None:
    """A share of padding above `max_padding` is never paid, however much a batch costs."""
    add_model(tmp_path, "m", config(max_padding=0.3))
    engine = await local_engine(m=masked)
    share_a_batch(engine)
    await ask(engine, [request(1), request(20), request(18)])
    assert sorted(Scripted.calls) == [("m", (1, 1)), ("m", (2, 20))]


SEVERAL = """
backend: "pytorch"
max_batch_size: 8
input [
  { name: "x" data_type: TYPE_FP32 dims: [ 2, -1 ] allow_ragged_batch: true },
  { name: "mask" data_type: TYPE_BOOL dims: [ -1 ] allow_ragged_batch: true },
  { name: "scale" data_type: TYPE_FP32 dims: [ 1 ] }
]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 2, -1 ] }, { name: "square" data_type: TYPE_FP32 dims: [ -1, -1 ] } ]
dynamic_batching { }
"""


async def test_ragged_inputs_beside_others(local_engine: StartLocal, tmp_path: Path) -> None:
    """The axis may be any, there may be several, of other datatypes, with inputs beside that are not ragged."""

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        x = np.where(inputs["mask"][:, None], inputs["x"] * inputs["scale"][..., None], 0)
        return {"y": x, "square": x[:, 0, :, None] * x[:, 0, None]}

    add_model(tmp_path, "m", config(SEVERAL, pad__mask=0))
    engine = await local_engine(m=run)
    share_a_batch(engine)
    scale = np.full((1, 1), 2, "<f4")
    requests = [
        InferRequest("m", "", {"x": np.full((1, 2, n), n, "<f4"), "mask": np.ones((1, n), "?"), "scale": scale})
        for n in (3, 1, 4)
    ]
    answers = await ask(engine, requests)
    assert Scripted.calls == [("m", (3, 2, 4))]
    for n, answer in zip((3, 1, 4), answers, strict=True):
        np.testing.assert_array_equal(answer["y"], np.full((1, 2, n), 2 * n, "<f4"))
        np.testing.assert_array_equal(answer["square"], np.full((1, n, n), 4 * n * n, "<f4"))


async def test_an_output_that_follows_the_length_otherwise_is_refused(local_engine: StartLocal, tmp_path: Path) -> None:
    """An axis that is one longer than the inputs cannot be told from its padding: the model is not served."""

    def one_more(inputs: Mapping[str, Array]) -> dict[str, Array]:
        y = np.pad(inputs["x"], ((0, 0), (0, 1)))
        return {"y": y, "mean": y[:, :1]}

    add_model(tmp_path, "m", config())
    with pytest.raises(ModelError, match=r"output 'y': dimension 1 changes with the ragged inputs' and is not as long"):
        await local_engine(m=one_more)


@pytest.mark.parametrize(
    ("shape", "length"),
    [(lambda x: np.maximum(x.shape[1], 3), 1), (lambda x: np.minimum(x.shape[1], 64), 70)],
    ids=["never below 3", "never above 64"],
)
async def test_an_output_that_does_not_follow_the_length_everywhere_is_an_error(
    shape: Any, length: int, local_engine: StartLocal, tmp_path: Path
) -> None:
    """What is as long as the inputs at the lengths that warmed the model, and not at others, is never cut wrongly."""

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        x = inputs["x"]
        return {"y": np.resize(x, (len(x), int(shape(x)))), "mean": x[:, :1]}

    add_model(tmp_path, "m", config())
    engine = await local_engine(m=run)
    assert (await engine.infer(request(9))).outputs["y"].shape == (1, 9)
    with pytest.raises(ModelError, match="dimension 1 is .* for ragged inputs of .*: what of it is padding cannot"):
        await engine.infer(request(length))


async def test_without_a_grid_a_length_that_the_model_takes_is_found(local_engine: StartLocal, tmp_path: Path) -> None:
    """A model that takes no more than 20 is warmed at lengths that it does take, and serves them."""
    seen = Seen()

    def short(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if inputs["x"].shape[1] > 20:
            raise InvalidInput("the model was exported for inputs with x.size()[1] <= 20")
        return seen(inputs)

    add_model(tmp_path, "m", config())
    engine = await local_engine(m=short)
    assert {batch.shape[1] for batch in seen.batches} == {1, 16}
    assert (await engine.infer(request(20))).outputs["y"].shape == (1, 20)
    with pytest.raises(InvalidInput, match="<= 20"):
        await engine.infer(request(21))


async def test_one_length_alone_cannot_tell_what_follows_it(local_engine: StartLocal, tmp_path: Path) -> None:
    """With one length in the grid an output of any size may be as long by chance: the config is to give two."""
    add_model(tmp_path, "m", config(padded_lengths="8"))
    with pytest.raises(ModelError, match="output 'y': has a dimension of any size; give parameters.padded_lengths two"):
        await local_engine(m=masked)


async def test_a_length_that_the_model_does_not_take_ends_the_start(local_engine: StartLocal, tmp_path: Path) -> None:
    """What the config allows and the model does not is found while it is loaded, and named."""

    def short(inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert inputs["x"].shape[1] <= 16, "too long for me"
        return masked(inputs)

    add_model(tmp_path, "m", config(padded_lengths="8 32"))
    with pytest.raises(ModelError, match="model 'm' does not take a batch of . rows of length 32, .*too long for me"):
        await local_engine(m=short)


VARIABLE_TOO = RAGGED.replace("input [ ", 'input [ { name: "z" data_type: TYPE_FP32 dims: [ -1 ] }, ')


async def test_another_input_of_any_size_still_separates(local_engine: StartLocal, tmp_path: Path) -> None:
    """Only ragged inputs are padded: requests that differ in another input's shape do not meet."""
    add_model(tmp_path, "m", config(VARIABLE_TOO))
    engine = await local_engine(m=masked)
    share_a_batch(engine)
    await ask(
        engine,
        [InferRequest("m", "", {"x": np.ones((1, n), "<f4"), "z": np.ones((1, z), "<f4")})
         for n, z in ((2, 1), (3, 2), (4, 1))],
    )  # fmt: skip
    assert sorted(Scripted.calls) == [("m", (1, 2)), ("m", (2, 1))]  # the shapes of z, the first input


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [(rows, tokens) for rows in ("1 2 8", "4 8", "8") for tokens in (0, 16, 20, 64, 128, 1000)
     if not tokens or tokens >= 16 * int(rows[0])],
)  # fmt: skip
async def test_a_grid_of_shapes_is_all_that_the_model_meets(
    rows: str, tokens: int, local_engine: StartLocal, tmp_path: Path
) -> None:
    """With `padded_lengths` and `padded_rows` no batch has a shape that the model did not see while it warmed up."""
    budget: dict[str, Any] = {"max_batch_tokens": tokens} if tokens else {}
    add_model(tmp_path, "m", config(padded_lengths="4 16", padded_rows=rows, **budget))
    seen = Seen()
    engine = await local_engine(m=seen)
    warmed = {batch.shape for batch in seen.batches}
    assert warmed <= {(n, length) for n in map(int, rows.split()) for length in (4, 16)}
    assert {shape[1] for shape in warmed} == {4, 16}
    seen.batches.clear()
    rng = np.random.default_rng(2)
    answered = 0
    for turn in range(30):
        share_a_batch(engine)
        requests = [request(int(rng.integers(1, 17)), int(rng.integers(1, 9)), seed) for seed in range(turn % 7 + 1)]
        answers = await asyncio.gather(*(engine.infer(each) for each in requests), return_exceptions=True)
        answered += sum(not isinstance(answer, InvalidInput) for answer in answers)
        assert not [each for each in answers if isinstance(each, Exception) and not isinstance(each, InvalidInput)]
    assert answered > 10
    assert {batch.shape for batch in seen.batches} <= warmed


async def test_rows_are_padded_with_copies_of_the_last(local_engine: StartLocal, tmp_path: Path) -> None:
    """Padding rows are rows that the model is known to take; nobody gets an answer for them."""
    add_model(tmp_path, "m", config(padded_rows="4 8"))
    seen = Seen()
    engine = await local_engine(m=seen)
    seen.batches.clear()
    first, second = request(3, rows=1), request(3, rows=4, seed=1)
    answers = await ask(engine, [first, second])
    (batch,) = seen.batches
    assert batch.shape == (8, 3)
    np.testing.assert_array_equal(batch[:5], np.concatenate([first.inputs["x"], second.inputs["x"]]))
    np.testing.assert_array_equal(batch[5:], np.broadcast_to(batch[4], (3, 3)))
    assert [answer["y"].shape for answer in answers] == [(1, 3), (4, 3)]


async def test_rows_are_padded_without_ragged_inputs_too(local_engine: StartLocal, tmp_path: Path) -> None:
    """`padded_rows` is for any model that batches."""
    plain = RAGGED.replace(" allow_ragged_batch: true", "").replace("-1", "4")
    add_model(tmp_path, "m", plain + 'parameters { key: "padded_rows" value { string_value: "4 8" } }')
    engine = await local_engine(m=masked)
    await ask(engine, [request(4, rows=3)])
    assert Scripted.calls == [("m", (4, 4))]


async def test_a_budget_of_tokens_bounds_a_batch(local_engine: StartLocal, tmp_path: Path) -> None:
    """`max_batch_tokens`: rows times padded length of no batch are more."""
    add_model(tmp_path, "m", config(max_batch_tokens=12))
    engine = await local_engine(m=masked)
    share_a_batch(engine)
    await ask(engine, [request(5, seed=n) for n in range(4)] + [request(2, seed=n) for n in range(8)])
    shapes = [shape for _, shape in Scripted.calls]
    assert sum(rows for rows, _ in shapes) == 12
    assert max(rows * length for rows, length in shapes) <= 12
    assert len(shapes) <= 5


async def test_a_grid_that_no_budget_can_hold_is_refused(local_engine: StartLocal, tmp_path: Path) -> None:
    """A length that every request would be refused for ends the start, by the parameter's name."""
    add_model(tmp_path, "m", config(padded_lengths="4 16", max_batch_tokens=15))
    with pytest.raises(ConfigError, match=r"parameters.max_batch_tokens: .*16, got 15"):
        await local_engine(m=masked)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (request(0), "size of ragged input 'x' must be at least 1"),
        (request(17), "size 17 of ragged input 'x' must be <= 16"),
        (request(9, rows=5), "rows times padded size, 5 x 16, must be <= 64"),
    ],
)
async def test_lengths_that_do_not_fit(bad: InferRequest, text: str, local_engine: StartLocal, tmp_path: Path) -> None:
    """None at all, one beyond the grid, too many tokens: the caller's error, and the model does not run."""
    add_model(tmp_path, "m", config(padded_lengths="4 16", max_batch_tokens=64))
    engine = await local_engine(m=masked)
    with pytest.raises(InvalidInput, match=text):
        await engine.infer(bad)
    assert Scripted.calls == []


@pytest.mark.parametrize("parameters", [{}, {"padded_lengths": "4 8"}])
async def test_an_axis_that_is_not_the_length_is_not_cut(
    parameters: dict[str, Any], local_engine: StartLocal, tmp_path: Path
) -> None:
    """An output of any size that does not follow the length stays whole, even if it is as long as the padding."""

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {**masked(inputs), "pooled": np.ones((len(inputs["x"]), 8), "<f4")}

    pooled = '{ name: "pooled" data_type: TYPE_FP32 dims: [ -1 ] }, '
    add_model(tmp_path, "m", config(RAGGED.replace("output [ ", "output [ " + pooled), **parameters))
    engine = await local_engine(m=run)
    share_a_batch(engine)
    for answer, length in zip(await ask(engine, [request(3), request(8)]), (3, 8), strict=True):
        assert answer["y"].shape == (1, length)
        assert answer["pooled"].shape == (1, 8)
    assert Scripted.calls == [("m", (2, 8))]


async def test_a_failed_ragged_batch_is_halved(local_engine: StartLocal, tmp_path: Path) -> None:
    """The halves of a batch are padded like the whole, and the innocent get what they get alone."""

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if (inputs["x"] == 13.5).any():
            raise ValueError("unlucky")
        return masked(inputs)

    add_model(tmp_path, "m", config())
    engine = await local_engine(m=run)
    share_a_batch(engine)
    requests = [request(n) for n in (1, 2, 3, 4, 5)]
    requests[2].inputs["x"][0, 1] = 13.5
    answers = await asyncio.gather(*(engine.infer(each) for each in requests), return_exceptions=True)
    assert [isinstance(answer, Exception) for answer in answers] == [False, False, True, False, False]
    for asked, answer in zip(requests, answers, strict=True):
        if not isinstance(answer, BaseException):
            np.testing.assert_array_equal(answer.outputs["y"], (await engine.infer(asked)).outputs["y"])


async def test_a_batch_stacked_ahead_gives_the_same(local_engine: StartLocal, tmp_path: Path) -> None:
    """`LocalModel.prepare` stacks what `run` would: the answers, and what the model is given, are equal."""
    add_model(tmp_path, "m", config(padded_rows="4 8"))
    seen = Seen()
    engine = await local_engine(IN_A_THREAD, m=seen)
    seen.batches.clear()
    model = stacked_model(engine)
    batch = [request(n).inputs for n in (2, 5, 1)]
    prepared = await model.prepare(batch, 4, 5)
    assert seen.batches == []
    ahead, plain = await model.run(batch, 4, 5, prepared), await model.run(batch, 4, 5)
    np.testing.assert_array_equal(seen.batches[0], seen.batches[1])
    for one, other in zip(ahead, plain, strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        assert one.keys() == other.keys() == {"y", "mean"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


async def test_the_next_batch_is_stacked_while_one_runs(
    local_engine: StartLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where stacking is worth it the lane seals ahead: each batch is stacked once."""
    monkeypatch.setattr("batching.pending.WORTH_PREPARING", 0.0)
    gate = Gate()
    engine = await local_engine(IN_A_THREAD, m=gate)
    model, stacked = stacked_model(engine), list[int]()
    stack = model._stack

    def record(backend: Any, batch: Any, rows: int, length: int) -> Any:
        stacked.append(rows)
        return stack(backend, batch, rows, length)

    monkeypatch.setattr(model, "_stack", record)
    gate.open.clear()
    first = asyncio.ensure_future(engine.infer(request(4)))
    tasks = [asyncio.ensure_future(engine.infer(request(4, seed=n))) for n in range(3)]
    await until(lambda: sum(stacked) == 4)
    assert Scripted.calls == [("m", (stacked[0], 4))]  # the others are stacked, and not run yet
    gate.open.set()
    await first
    answers = [(await task).outputs for task in tasks]
    assert [shape for _, shape in Scripted.calls] == [(rows, 4) for rows in stacked]
    for n, answer in enumerate(answers):
        np.testing.assert_array_equal(answer["y"], 2 * request(4, seed=n).inputs["x"])


class Pool(torch.nn.Module):
    """What a sentence encoder ends with: each token, and their mean, of those that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 4)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (tokens != 0).unsqueeze(-1)
        vectors = self.table(tokens) * mask
        return vectors, vectors.sum(1) / mask.sum(1).clamp(min=1)


ENCODER = """
backend: "pytorch"
max_batch_size: 4
input [ { name: "tokens" data_type: TYPE_INT64 dims: [ -1 ] allow_ragged_batch: true } ]
output [ { name: "each" data_type: TYPE_FP32 dims: [ -1, 4 ] }, { name: "mean" data_type: TYPE_FP32 dims: [ 4 ] } ]
dynamic_batching { }
instance_group { kind: KIND_CPU }
"""


@pytest.mark.parametrize("grid", [{}, {"padded_lengths": "4 8", "padded_rows": "2 4"}], ids=["any length", "grid"])
async def test_an_exported_encoder(grid: dict[str, str], tmp_path: Path) -> None:
    """A real model: sentences of several lengths, together and alone, get what the module gives each of them."""
    torch.manual_seed(0)
    module = Pool().eval()
    sizes = ({0: torch.export.Dim("rows", min=1, max=4), 1: torch.export.Dim("length", min=1, max=512)},)
    program = torch.export.export(module, (torch.ones(2, 5, dtype=torch.int64),), dynamic_shapes=sizes)
    (tmp_path / "m" / "1").mkdir(parents=True)
    torch.export.save(program, tmp_path / "m" / "1" / "model.pt2")
    parameters = "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in grid.items())
    (tmp_path / "m" / "config.pbtxt").write_text(ENCODER + parameters)
    engine = LocalEngine(Settings(models=str(tmp_path)))
    try:
        await engine.start()
        share_a_batch(engine)
        rng = np.random.default_rng(3)
        requests = [InferRequest("m", "", {"tokens": rng.integers(1, 50, (1, n))}) for n in (3, 8, 1, 5)]
        answers = await ask(engine, requests)
        assert (await engine.batching("m"))["batches"]["by_rows"] == {"4": 1}
        for asked, answer in zip(requests, answers, strict=True):
            with torch.inference_mode():
                each, mean = module(torch.from_numpy(asked.inputs["tokens"]))
            np.testing.assert_allclose(answer["each"], each.numpy(), rtol=1e-5)
            np.testing.assert_allclose(answer["mean"], mean.numpy(), rtol=1e-5)
    finally:
        await engine.stop()


# What a batch counts for, and takes.

ANY_SHAPE = """
backend: "pytorch"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "z" data_type: TYPE_FP32 dims: [ -1, 3 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
dynamic_batching { }
"""
FIXED = ANY_SHAPE.replace("-1", "2")


def double_x(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": inputs["x"] * 2}


@pytest.mark.parametrize(
    ("text", "x", "z", "length"),
    [(ANY_SHAPE, 5, 2, 5 + 2 * 3), (ANY_SHAPE, 0, 0, 1), (FIXED, 2, 2, 1)],
    ids=["any shape", "nothing at all", "one shape"],
)
async def test_where_shapes_vary_the_elements_of_a_row_are_its_length(
    text: str, x: int, z: int, length: int, local_engine: StartLocal, tmp_path: Path
) -> None:
    """Of all its inputs, 1 at least; where they do not vary, a row is a row."""
    add_model(tmp_path, "m", text)
    engine = await local_engine(m=double_x)
    await engine.infer(InferRequest("m", "", {"x": np.ones((4, x), "<f4"), "z": np.ones((4, z, 3), "<f4")}))
    (batch,) = (await engine.batching("m"))["batches"]["latest"]
    assert (batch["rows"], batch["length"]) == (4, length)


@pytest.mark.parametrize(
    ("text", "costs"),
    [(ANY_SHAPE, [1 + 3, 8 * (1 + 3)]), (FIXED, [1, 8]), (RAGGED, [7, 8 * 7, 64, 8 * 64])],
    ids=["any shape", "one shape", "ragged"],
)
async def test_a_batch_that_warms_counts_for_what_a_request_of_its_size_does(
    text: str, costs: list[int], local_engine: StartLocal, tmp_path: Path
) -> None:
    """Elements where shapes vary, rows where they do not, tokens of a ragged model."""
    add_model(tmp_path, "m", text)
    engine = await local_engine(m=masked if text == RAGGED else double_x)
    assert [cost for cost, _ in engine._models["m", ""].model.measured] == costs


@pytest.mark.parametrize(
    ("text", "inline_ms", "sizes"),
    [(RAGGED, 0, [4 * 5]), (FIXED, 0, [4]), (FIXED, 1e6, [])],
    ids=["ragged", "in a thread", "inline"],
)
async def test_stacking_is_learned_by_the_cost_where_it_can_be_done_ahead(
    text: str, inline_ms: float, sizes: list[int], local_engine: StartLocal, tmp_path: Path
) -> None:
    """Padded rows times length; nothing while a model runs on the event loop, where there is no meanwhile."""

    class Learning(Cost):
        def learn(self, size: float, seconds: float) -> None:
            learned.append(size)

    learned: list[float] = []
    add_model(tmp_path, "m", config(text, padded_rows="4 8") if text == RAGGED else text)
    engine = await local_engine({"inline_ms": inline_ms}, m=masked if text == RAGGED else double_x)
    model = engine._models["m", ""].model
    model.preparation = Learning()
    if text == RAGGED:
        await engine.infer(request(5, rows=3))
    else:
        await engine.infer(InferRequest("m", "", {"x": np.ones((4, 2), "<f4"), "z": np.ones((4, 2, 3), "<f4")}))
    assert learned == sizes


@pytest.mark.parametrize("text", [FIXED, ANY_SHAPE], ids=["one shape", "any shape"])
async def test_a_backend_enters_each_thread_before_the_model_runs_there(
    text: str, local_engine: StartLocal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane's, and the event loop's where the model may run on it, and is told which."""
    first: dict[int, object] = {}

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        first.setdefault(threading.get_ident(), "run")
        return double_x(inputs)

    def enter(_: Scripted, inline: bool) -> None:
        first.setdefault(threading.get_ident(), "inline" if inline else "in a thread")

    monkeypatch.setattr(Scripted, "enter", enter)
    add_model(tmp_path, "m", text)
    engine = await local_engine({"inline_ms": 1e6}, m=run)
    here, there = threading.get_ident(), await stacked_model(engine).lane.call(threading.get_ident)
    assert first == {there: "in a thread", **({here: "inline"} if text == FIXED else {})}


@pytest.mark.parametrize(
    ("alone", "inline", "measured"), [(6.0, True, [(1, 2.0), (8, 6.0)]), (11.0, False, [(1, 3.0), (8, 7.0)])]
)
async def test_the_best_run_after_the_first_third_is_what_a_batch_takes(
    alone: float,
    inline: bool,
    measured: list[tuple[int, float]],
    local_engine: StartLocal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the lane's thread, or on the event loop if the largest batch is below the bound there, here of 10 s."""
    clock = Clock()
    monkeypatch.setattr("engine.model.time", SimpleNamespace(perf_counter=clock))
    in_the_thread = [1.0, 5.0, 3.0, 2.0, 9.0, 7.0]  # three times 1 row, three times 8
    on_the_loop = [1.0, 1.0, 4.0, 3.0, 2.0, 3.0, 4.0, 1.0, 1.0, 14.0, 13.0, alone, 13.0, 14.0]  # seven times
    seconds = iter([*in_the_thread, *on_the_loop])

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        clock.advance(next(seconds))
        return double_x(inputs)

    add_model(tmp_path, "m", FIXED)
    engine = await local_engine({"inline_ms": 10_000}, m=run)
    model = engine._models["m", ""].model
    assert model.inline == inline
    assert model.measured == measured
    assert list(seconds) == []
