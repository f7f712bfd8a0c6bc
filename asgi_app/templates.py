"""Infer requests that look alike: what was read from one is known of the next, and only the elements are read. Pure.

A client sends the same request again and again, with other numbers in it. So a body is taken apart at its elements
first, which takes no parsing; what is around them is the key by which the request's Template is found.

    JSON      what stands before the first element of the only input's `data`, and what stands behind the last. That
              this is where it can be cut was checked when the template was made: with one element put there, the JSON
              reads as before, and the data are that element. So with any JSON array put there it reads the same.
    binary    nothing, and the JSON in front of the tensors, as it is: no key of JSON begins with nothing

Whatever does not fit its template is read as if there were none, which finds the error's text: see `v2_codec.py`.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson

from engine.types import DATATYPES, Array, InferRequest

from .tensors import MAX_DEPTH, PACKED, flatten

# Templates that are kept, and the bytes that the key of one may have: 1 MiB at most.
KEPT = 1024
LONGEST = 1024

# What a client may say in a request with a template; all else is looked at each time.
SAID = frozenset({"inputs", "outputs", "parameters"})
SAID_OF_JSON = frozenset({"name", "datatype", "shape", "data"})
SAID_OF_BINARY = frozenset({"name", "datatype", "shape", "parameters"})
# Whose elements are looked at one by one.
LOOKED_AT = frozenset({"BOOL", "BYTES"})
# What is put in the place of the elements, one after the other, to see that they are what is read. Of two members with
# one name the last is, and it may hold one of these numbers, but not both.
PROBES = (0, 1)

Body = bytes | bytearray


class Tensor(NamedTuple):
    """An input of a template.

    Attributes:
        number: of its elements.
        offset: where its elements begin among the binary ones.
        packed: how its elements lie in memory; None of binary ones.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    number: int
    offset: int = 0
    packed: struct.Struct | None = None


@dataclass(slots=True, eq=False)
class Template:
    """What requests that look alike have in common; compared by identity.

    Attributes:
        before, after: what a request's text is made of, besides its elements.
        size: bytes of all binary elements.
        outputs: as of an InferRequest.
        binary, binary_default: as of a Decoded.
    """

    before: bytes
    after: bytes
    inputs: tuple[Tensor, ...]
    size: int
    outputs: tuple[str, ...] | None
    binary: Mapping[str, bool]
    binary_default: bool


_by_text: dict[tuple[bytes, bytes], Template] = {}


def read_json(body: bytes) -> tuple[Template, dict[str, Array]] | None:
    """The template of a JSON body, and its only input; None if it has none, or its elements do not fit."""
    at, end = _find_elements(body)
    if end < 0:
        return None
    template = _by_text.get((body[:at], body[end:]))
    if template is None:
        return None
    inputs = _read_elements(template, body[at:end])
    return None if inputs is None else (template, inputs)


def read_like(template: Template, body: bytes) -> dict[str, Array] | None:
    """What `read_json` would find, in less time, if it is this template; None if not, or its elements do not fit."""
    before, after = template.before, template.after
    if not (body.startswith(before) and body.endswith(after)):
        return None
    return _read_elements(template, body[len(before) : len(body) - len(after)])


def _read_elements(template: Template, elements: bytes) -> dict[str, Array] | None:
    """The only input, whose elements are a JSON array of one row, or, if they are anything else, None."""
    if elements[:1] != b"[":
        return None
    # true and false, which would pass for numbers, have an e; and so has 1e-5, but no u or l.
    if elements.find(_E) >= 0 and (elements.find(_U) >= 0 or elements.find(_L) >= 0):
        return None
    (tensor,) = template.inputs
    assert tensor.packed is not None
    try:
        packed = tensor.packed.pack(*orjson.loads(elements))
    except (ValueError, OverflowError, struct.error):
        return None
    return {tensor.name: np.ndarray(tensor.shape, tensor.dtype, packed)}


_E, _U, _L = b"eul"


def _find_elements(body: bytes) -> tuple[int, int]:
    """Where the elements of the first `data` seem to be, as an array of one row; -1 as its end if nowhere."""
    key = body.find(b'"data"')
    at = body.find(b"[", key)
    while body.startswith(b"[", at + 1):
        at += 1
    end = body.find(b"]", at) + 1
    if not 0 <= key < at < end or at + len(body) - end > LONGEST:
        return 0, -1
    return at, end


def read_binary(body: Body, start: int) -> tuple[Template, dict[str, Array]] | None:
    """The same of a body whose JSON ends where `start` says."""
    template = _by_text.get((b"", bytes(body[:start]))) if start <= LONGEST else None
    if template is None or len(body) - start != template.size:
        return None
    return template, {
        tensor.name: np.frombuffer(body, tensor.dtype, tensor.number, start + tensor.offset).reshape(tensor.shape)
        for tensor in template.inputs
    }


def remember_json(
    body: bytes, head: Mapping[str, Any], request: InferRequest, binary: Mapping[str, bool], default: bool
) -> None:
    """Make a template of a request that was read, if it is one of those that have one."""
    at, end = _find_elements(body)
    if end < 0 or len(head["inputs"]) != 1 or not _plain(head):
        return
    before, after = body[:at], body[end:]
    (entry,) = head["inputs"]
    code = PACKED.get(entry["datatype"])
    if entry.keys() != SAID_OF_JSON or entry["datatype"] in LOOKED_AT or code is None:
        return
    if not all(_is_data(b"[%d]" % number, number, before, after, head) for number in PROBES):
        return
    ((name, array),) = request.inputs.items()
    tensor = Tensor(name, array.dtype, array.shape, array.size, 0, struct.Struct(f"<{array.size}{code}"))
    _keep(Template(before, after, (tensor,), 0, request.outputs, binary, default))


def _is_data(elements: bytes, number: int, before: bytes, after: bytes, head: Mapping[str, Any]) -> bool:
    """Whether the JSON reads as `head`, but for its data, which are this number, with these elements put there."""
    try:
        skeleton = orjson.loads(b"%b%b%b" % (before, elements, after))
        (entry,), (alone,) = head["inputs"], skeleton["inputs"]
        return (
            flatten(alone["data"], MAX_DEPTH) == [number]
            and {**alone, "data": None} == {**entry, "data": None}
            and {**skeleton, "inputs": None} == {**head, "inputs": None}
        )
    except (ValueError, TypeError, LookupError):
        return False


def remember_binary(
    text: bytes, head: Mapping[str, Any], request: InferRequest, binary: Mapping[str, bool], default: bool
) -> None:
    """The same of one with binary inputs alone."""
    tensors, offset = [], 0
    for entry in head["inputs"]:
        name, datatype = entry["name"], entry["datatype"]
        if entry.keys() != SAID_OF_BINARY or entry["parameters"].keys() != {"binary_data_size"}:
            return
        if datatype in LOOKED_AT:
            return
        array = request.inputs[name]
        tensors.append(Tensor(name, DATATYPES[datatype], array.shape, array.size, offset))
        offset += array.nbytes
    if tensors and len(text) <= LONGEST and _plain(head):
        _keep(Template(b"", text, tuple(tensors), offset, request.outputs, binary, default))


def _plain(head: Mapping[str, Any]) -> bool:
    """Whether nothing is said that another request would not say."""
    parameters = head.get("parameters")
    outputs = head.get("outputs") or ()
    return (
        head.keys() <= SAID
        and (parameters is None or parameters.keys() <= {"binary_data_output"})
        and all((output.get("parameters") or {}).keys() <= {"binary_data"} for output in outputs)
    )


def _keep(template: Template) -> None:
    if len(_by_text) >= KEPT:
        _by_text.clear()  # whose requests all differ gains nothing here; the others make theirs again
    _by_text[template.before, template.after] = template
