"""A function as a model: the signature, the checks and the batching of a repository's model."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from engine.errors import ConfigError, InvalidInput, ModelError
from engine.functions import Function, model
from engine.local import LocalEngine
from engine.settings import Settings
from engine.types import Engine, InferRequest
from tests.forms import in_form

X = {"x": ("FP32", [4])}
Y = {"y": ("FP32", [4])}
Start = Callable[..., Awaitable[Engine]]


@pytest.fixture
async def start(form: str) -> AsyncIterator[Start]:
    """start(function, ..., settings...): an engine that serves these, in each form of the service."""
    async with AsyncExitStack() as stack:

        async def make(*functions: Function, **more: Any) -> Engine:
            settings = Settings(models="/nonexistent", **more)
            engine = LocalEngine(settings, functions)
            stack.push_async_callback(engine.stop)
            await engine.start()
            return await stack.enter_async_context(in_form(form, engine, settings))

        yield make


def request(name: str, value: float = 1.0, rows: int = 1) -> InferRequest:
    return InferRequest(name, "", {"x": np.full((rows, 4), value, "<f4")})


async def test_requests_share_a_call(start: Start) -> None:
    """The function sees stacked arrays; each request gets its own rows. It can still be called as what it is."""
    seen = []

    @model(max_batch_size=32, input=X, output=Y)
    def double(x: Any) -> Any:
        seen.append(np.shape(x)[:1])
        return 2 * x

    engine = await start(double)
    seen.clear()
    answers = await asyncio.gather(*(engine.infer(request("double", value)) for value in range(5)))
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert seen == [(5,)]
    assert double(21) == 42
    assert engine.metadata("double").platform == "function"


async def test_outputs_are_an_array_a_tuple_or_a_dict(start: Start) -> None:
    two = {"a": ("FP32", [4]), "b": ("INT64", [1])}

    @model(max_batch_size=4, input=X, output=two)
    def as_tuple(x: Any) -> Any:
        return x + 1, np.ones((len(x), 1), "<i8")

    @model(max_batch_size=4, input=X, output=two, name="by_name")
    def other(x: Any) -> Any:
        return {"b": np.ones((len(x), 1), "<i8"), "a": x + 1}

    engine = await start(as_tuple, other)
    for name in ("as_tuple", "by_name"):
        outputs = (await engine.infer(request(name))).outputs
        assert (float(outputs["a"][0, 0]), int(outputs["b"][0, 0])) == (2.0, 1)


async def test_what_does_not_fit_is_refused_before_the_function_sees_it(start: Start) -> None:
    """And what the function raises is that request's error."""

    @model(max_batch_size=4, input=X, output=Y)
    def picky(x: Any) -> Any:
        if (x == 7).any():
            raise ValueError("not seven")
        return x

    engine = await start(picky)
    with pytest.raises(InvalidInput, match="unexpected shape for input 'x' for model 'picky'"):
        await engine.infer(InferRequest("picky", "", {"x": np.zeros((1, 5), "<f4")}))
    good, bad = await asyncio.gather(
        engine.infer(request("picky")), engine.infer(request("picky", 7)), return_exceptions=True
    )
    assert not isinstance(good, BaseException)
    assert isinstance(bad, ModelError)
    assert "not seven" in str(bad)


async def test_a_function_without_a_batch_dimension(start: Start) -> None:
    @model(input={"x": ("FP32", [-1])}, output={"y": ("FP32", [1])})
    def total(x: Any) -> Any:
        return x.sum(keepdims=True)

    engine = await start(total)
    asked = InferRequest("total", "", {"x": np.arange(4, dtype="<f4")})
    assert float((await engine.infer(asked)).outputs["y"][0]) == 6.0


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"input": {"x": ("FP31", [4])}}, "@model f: the datatype of 'x' must be one of BOOL, .*, got 'FP31'"),
        ({"input": {"x": ("FP32", [0])}}, "@model f: input.dims: .*dimension must be integer >= 1"),
        ({"dynamic_batching": {"preferred_batch_size": [64]}}, "preferred size must be <= max batch size"),
        ({"max_queue_delay": 1}, "@model f: .*max_queue_delay"),
        (
            {"parameters": {"patience_ms": {"string_value": "soon"}}},
            "parameters.patience_ms: must be a positive number",
        ),
    ],
)
def test_a_field_that_cannot_be_served_is_named(fields: dict[str, Any], text: str) -> None:
    """At once, where the function is written."""
    keywords: dict[str, Any] = {"max_batch_size": 32, "input": X, "output": Y, **fields}
    with pytest.raises(ConfigError, match=text):
        model(**keywords)(f)


def f(x: Any) -> Any:
    return x


def test_a_coroutine_function_is_refused_where_it_is_written() -> None:
    async def waits(x: Any) -> Any:
        return x

    with pytest.raises(ConfigError, match="@model waits: must be an ordinary function.*async def"):
        model(input=X, output=Y)(waits)


async def test_a_function_that_breaks_its_promise_is_not_served(start: Start) -> None:
    @model(max_batch_size=4, input=X, output=Y)
    def wide(x: Any) -> Any:
        return x.astype("<f8")

    with pytest.raises(ModelError, match="output 'y': its config promises FP32"):
        await start(wide)


async def test_copies_of_a_function_run_side_by_side(start: Start) -> None:
    """Each call waits for the other: one after the other they would never end."""
    together = threading.Barrier(2)
    served = False

    @model(max_batch_size=1, input=X, output=Y, instance_group=[{"count": 2, "kind": "KIND_CPU"}])
    def meet(x: Any) -> Any:
        if served:
            together.wait(30)
        return x

    engine = await start(meet)
    served = True
    answers = await asyncio.gather(engine.infer(request("meet", 1)), engine.infer(request("meet", 2)))
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [1.0, 2.0]


async def test_two_functions_of_one_name_are_refused(start: Start) -> None:
    one = model(input=X, output=Y)(f)
    with pytest.raises(ConfigError, match="@model f: two functions have this name"):
        await start(one, one)
