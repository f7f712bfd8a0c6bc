"""Requests made by chance, the same in every run: good ones for every model, and good ones with one thing wrong."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .cases import Case
from .exchange import NUMPY, Request, Tensor, compact, infer, raw
from .repository import MODELS, Model
from .repository import Tensor as Spec

SEED = 20511
COUNT = 400

NAMES = (
    *(name for name in MODELS if name.startswith("identity_")),
    "variable", "variable_two", "add_sub", "add_sub_single", "strings", "reshaped", "reshaped_scalar", "optional",
    "classes",
    "classes_single", "echo", "auto_partial", "versions_all",
)  # fmt: skip
AUTO = Model(
    "auto",
    (Spec("INPUT0", "FP32", (-1, 2)), Spec("INPUT1", "BYTES", (1,), True)),
    (Spec("OUTPUT0", "FP32", (-1, 2)),),
    2,
)
LETTERS = 'aZ09 é€"\\/\n\t😀'

Inputs = list[Tensor]


def all_cases() -> Iterator[Case]:
    """COUNT cases; every second one has something wrong with it."""
    for number in range(COUNT):
        chance = random.Random(SEED + number)
        name = chance.choice(NAMES)
        model = AUTO if name == "auto_partial" else MODELS[name]
        inputs = _inputs(chance, model)
        outputs = _outputs(chance, model)
        wrong = chance.choice(list(WRONG)) if number % 2 else "good"
        request = (
            _request(chance, name, inputs, outputs) if wrong == "good" else WRONG[wrong](chance, name, inputs, outputs)
        )
        yield Case(f"generated/{number:03} {name} {wrong}", (request,))


def _inputs(chance: random.Random, model: Model) -> Inputs:
    rows = [chance.randint(1, model.rows)] if model.rows else []
    given = [spec for spec in model.inputs if not spec.optional or chance.random() < 0.5]
    chance.shuffle(given)
    return [_tensor(chance, spec, rows) for spec in given]


def _tensor(chance: random.Random, spec: Spec, rows: list[int]) -> Tensor:
    shape = rows + [chance.choice((1, 2, 3, 5)) if size < 0 else size for size in spec.dims]
    values = [_value(chance, spec.datatype) for _ in range(_count(shape))]
    if spec.datatype == "FP16" or chance.random() < 0.5:
        return Tensor(spec.name, spec.datatype, shape, raw=raw(spec.datatype, values))
    return Tensor(spec.name, spec.datatype, shape, _nested(values, shape) if chance.random() < 0.5 else values)


def _value(chance: random.Random, datatype: str) -> Any:
    """One that both JSON and the datatype hold exactly."""
    if datatype == "BOOL":
        return chance.random() < 0.5
    if datatype == "BYTES":
        return "".join(chance.choice(LETTERS) for _ in range(chance.choice((0, 1, 5, 20))))
    if datatype.startswith("FP"):
        return chance.randint(-1000, 1000) / 8
    bits = int(datatype.lstrip("UINT"))
    low, high = (0, 2**bits) if datatype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return chance.choice((chance.randrange(low, high), low, high - 1, chance.randrange(0, 100)))


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _nested(values: list[Any], shape: list[int]) -> Any:
    if len(shape) < 2:
        return values
    step = len(values) // shape[0]
    return [_nested(values[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def _outputs(chance: random.Random, model: Model) -> list[Any] | None:
    """Some of them, in any order, half of them in binary; FP16 cannot travel otherwise."""
    if chance.random() < 0.3 and not any(spec.datatype == "FP16" for spec in model.outputs):
        return None
    wanted = chance.sample(model.outputs, chance.randint(1, len(model.outputs)))
    return [_output(chance, spec) for spec in wanted]


def _output(chance: random.Random, spec: Spec) -> dict[str, Any]:
    if spec.datatype == "FP16" or chance.random() < 0.5:
        return {"name": spec.name, "parameters": {"binary_data": True}}
    if chance.random() < 0.2 and spec.datatype != "BYTES" and spec.datatype != "BOOL":
        return {"name": spec.name, "parameters": {"classification": chance.randint(1, 3)}}
    return {"name": spec.name}


def _request(chance: random.Random, name: str, inputs: Inputs, outputs: list[Any] | None) -> Request:
    more: dict[str, Any] = {"id": f"id {chance.randint(0, 99)}"} if chance.random() < 0.5 else {}
    return infer(name, *inputs, outputs=outputs, **more)


Wrong = Callable[[random.Random, str, Inputs, list[Any] | None], Request]


def _changed(change: Callable[[random.Random, Tensor], Tensor]) -> Wrong:
    """The same with one of its inputs changed."""

    def wrong(chance: random.Random, name: str, inputs: Inputs, outputs: list[Any] | None) -> Request:
        index = chance.randrange(len(inputs))
        inputs = [change(chance, tensor) if i == index else tensor for i, tensor in enumerate(inputs)]
        return _request(chance, name, inputs, outputs)

    return wrong


def _other_datatype(chance: random.Random, tensor: Tensor) -> Tensor:
    return replace(tensor, datatype=chance.choice([name for name in [*NUMPY, "BYTES"] if name != tensor.datatype]))


def _other_shape(chance: random.Random, tensor: Tensor) -> Tensor:
    shape = list(tensor.shape)
    shape[chance.randrange(len(shape))] += chance.choice((1, 9))
    return replace(tensor, shape=shape)


def _other_rank(chance: random.Random, tensor: Tensor) -> Tensor:
    return replace(tensor, shape=[1, *tensor.shape] if chance.random() < 0.5 else [*tensor.shape, 1])


def _other_count(chance: random.Random, tensor: Tensor) -> Tensor:
    if tensor.raw is not None:
        return replace(tensor, raw=tensor.raw + b"\0" if chance.random() < 0.5 else tensor.raw[:-1])
    return replace(tensor, data=[*tensor.data, tensor.data[0]] if chance.random() < 0.5 else tensor.data[:-1])


def _other_size(chance: random.Random, tensor: Tensor) -> Tensor:
    return replace(tensor, parameters={"binary_data_size": len(tensor.raw or b"") + chance.choice((-1, 1, 8))})


def _dropped(chance: random.Random, name: str, inputs: Inputs, outputs: list[Any] | None) -> Request:
    return _request(chance, name, inputs[1:], outputs)


def _added(chance: random.Random, name: str, inputs: Inputs, outputs: list[Any] | None) -> Request:
    return _request(chance, name, [*inputs, Tensor("EXTRA", "INT8", [1], [1])], outputs)


def _twice(chance: random.Random, name: str, inputs: Inputs, outputs: list[Any] | None) -> Request:
    return _request(chance, name, [*inputs, inputs[0]], outputs)


def _unknown_output(chance: random.Random, name: str, inputs: Inputs, outputs: list[Any] | None) -> Request:
    return _request(chance, name, inputs, [*(outputs or ()), "EXTRA"])


def _other_header_length(chance: random.Random, name: str, inputs: Inputs, outputs: list[Any] | None) -> Request:
    request = _request(chance, name, inputs, outputs)
    length = str(chance.choice((1, len(request.body) + 1, len(request.body) * 2)))
    return replace(request, headers=(("Inference-Header-Content-Length", length),))


def _cut(chance: random.Random, name: str, inputs: Inputs, outputs: list[Any] | None) -> Request:
    request = _request(chance, name, inputs, outputs)
    return replace(request, body=request.body[: chance.randrange(1, len(request.body))])


def _one_key_less(chance: random.Random, name: str, inputs: Inputs, outputs: list[Any] | None) -> Request:
    described = [tensor.json() for tensor in inputs]
    described[0].pop(chance.choice(list(described[0])))
    return Request("POST", f"/v2/models/{name}/infer", compact({"inputs": described}))


WRONG: dict[str, Wrong] = {
    "input dropped": _dropped,
    "input added": _added,
    "input twice": _twice,
    "input misnamed": _changed(lambda chance, tensor: replace(tensor, name=tensor.name + "X")),
    "other datatype": _changed(_other_datatype),
    "other shape": _changed(_other_shape),
    "other rank": _changed(_other_rank),
    "other count": _changed(_other_count),
    "other binary size": _changed(_other_size),
    "unknown output": _unknown_output,
    "other header length": _other_header_length,
    "body cut": _cut,
    "a key less": _one_key_less,
}
