"""Does this request fit this model? Asked before it reaches a queue, so that a bad request never meets a batch.

The texts, and the order in which things are looked at, are Triton's (PROTOCOL.md section 1.9.2), because its users
know them and search for them.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from .errors import InvalidInput, NotFound, NotReady
from .types import DATATYPES, InferRequest, ModelMetadata

SHOWN = 200  # characters of what a client calls things that are given back to it

T = TypeVar("T")

# How Triton's JSON calls what Python calls by these names.
KINDS: dict[type, str] = {str: "string", bool: "boolean", int: "unsigned-integer", list: "array", dict: "object"}


def check_request(metadata: ModelMetadata, request: InferRequest) -> int:
    """Check a request's names, datatypes, shapes, rows and length against the model.

    Returns:
        The rows of the request; 1 for a model that has no batch dimension.

    Raises:
        InvalidInput: with Triton's text, which names the input or output.
    """
    for name in request.outputs or ():
        if name not in metadata.outputs:
            raise InvalidInput(f"unexpected inference output '{name[:SHOWN]}' for model '{metadata.name}'")
    inputs = request.inputs
    if len(inputs) != len(metadata.inputs):
        _check_count(metadata, request)
    rows = -1
    for name, array in inputs.items():
        if name not in metadata.inputs:
            raise InvalidInput(f"unexpected inference input '{name[:SHOWN]}' for model '{metadata.name}'")
        if metadata.max_batch_size:
            if not array.ndim:
                raise InvalidInput(
                    f"{_prefix(request)}input '{name}' has no shape but model requires batch dimension "
                    f"for '{metadata.name}'"
                )
            if rows not in (-1, array.shape[0]):
                raise InvalidInput(
                    f"{_prefix(request)}input '{name}' batch size does not match other inputs for '{metadata.name}'"
                )
            rows = array.shape[0]
    if metadata.max_batch_size and rows > metadata.max_batch_size:
        raise InvalidInput(
            f"{_prefix(request)}inference request batch-size must be <= {metadata.max_batch_size} for '{metadata.name}'"
        )
    if rows == 0:
        raise InvalidInput(
            f"{_prefix(request)}inference request has zero rows for '{metadata.name}': there is nothing to infer"
        )
    skip = 1 if metadata.max_batch_size else 0
    for name, array in inputs.items():
        spec = metadata.inputs[name]
        if array.dtype != DATATYPES[spec.datatype]:
            got = next(datatype for datatype, dtype in DATATYPES.items() if dtype == array.dtype)
            raise InvalidInput(
                f"{_prefix(request)}inference input '{name}' data-type is '{got}', but model '{metadata.name}' "
                f"expects '{spec.datatype}'"
            )
        if array.shape[skip:] != spec.shape[skip:] and not fits(array.shape, spec.shape):
            expected, got = (str(list(shape)).replace(" ", "") for shape in (spec.shape, array.shape))
            raise InvalidInput(
                f"{_prefix(request)}unexpected shape for input '{name}' for model '{metadata.name}'. "
                f"Expected {expected}, got {got}. " + (_BATCH_NOTE if metadata.max_batch_size else "")
            )
    if metadata.ragged:
        _check_length(metadata, request, rows)
    return max(rows, 1)


def _check_count(metadata: ModelMetadata, request: InferRequest) -> None:
    """Refuse a request with too many inputs, or without one that is not optional."""
    required = [name for name, spec in metadata.inputs.items() if not spec.optional]
    most, given = len(metadata.inputs), len(request.inputs)
    missing = [name for name in required if name not in request.inputs]
    if len(required) <= given <= most and not (missing and request.inputs.keys() <= metadata.inputs.keys()):
        return  # if one is missing, another has a name that the model does not know, and Triton names that
    expected = f"{most} inputs" if len(required) == most else f"number of inputs between {len(required)} and {most}"
    raise InvalidInput(
        f"{_prefix(request)}expected {expected} but got {given} inputs for model '{metadata.name}'. Got input(s) "
        f"{_names(request.inputs)[:SHOWN]}, but missing required input(s) {_names(missing)}. "
        "Please provide all required input(s)."
    )


def _check_length(metadata: ModelMetadata, request: InferRequest, rows: int) -> None:
    """Refuse what no batch of a model with ragged inputs could hold."""
    inputs = request.inputs
    sizes = {name: inputs[name].shape[axis] for name, axis in metadata.ragged.items() if name in inputs}
    if not sizes:
        return
    length, *others = set(sizes.values())
    if others:
        raise InvalidInput(
            f"{_prefix(request)}ragged inputs of one request must have the same size for '{metadata.name}', got "
            + ", ".join(f"{size} for '{name}'" for name, size in sizes.items())
        )
    if not length:
        raise InvalidInput(
            f"{_prefix(request)}size of ragged input '{next(iter(sizes))}' must be at least 1 for '{metadata.name}'"
        )
    if metadata.lengths:
        if length > metadata.lengths[-1]:
            raise InvalidInput(
                f"{_prefix(request)}size {length} of ragged input '{next(iter(sizes))}' must be <= "
                f"{metadata.lengths[-1]} for '{metadata.name}'"
            )
        length = metadata.lengths[bisect_left(metadata.lengths, length)]
    padded = metadata.row_grid[bisect_left(metadata.row_grid, rows)] if metadata.row_grid else rows
    if metadata.max_cost and padded * length > metadata.max_cost:
        raise InvalidInput(
            f"{_prefix(request)}inference request padded rows times padded size, {padded} x {length}, must be <= "
            f"{metadata.max_cost} for '{metadata.name}'"
        )


def _prefix(request: InferRequest) -> str:
    return f"[request id: {request.id or '<id_unknown>'}] "


def _names(names: Iterable[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether `shape` is `expected`, where -1 stands for any size."""
    return len(shape) == len(expected) and all(e in (-1, d) for d, e in zip(shape, expected, strict=True))


_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


def typed(kind: type[T], value: object) -> T:
    """`value`, if JSON has it as a `kind` of KINDS; an int is never negative. Raises InvalidInput."""
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise InvalidInput(f"attempt to access JSON non-{KINDS[kind]} as {KINDS[kind]}")
    return value


def not_served(
    states: Mapping[str, Sequence[str]] | None, others: bool, model: str, version: str
) -> NotFound | NotReady:
    """Why a model, or a version of it, is not served.

    Args:
        states: version -> its state and the reason; None if nothing is known of the model.
        others: whether other versions are served.
    """
    which = f" version {version}" if version and states else ""
    if states and not others and not version:
        return NotFound(f"Request for unknown model: '{model}' has no available versions")
    if states and states.get(version, ("",))[0] in ("LOADING", "UNLOADING"):
        return NotReady(f"Request for unknown model: '{model}'{which} is not at ready state")
    return NotFound(f"Request for unknown model: '{model}'{which} is not found")
