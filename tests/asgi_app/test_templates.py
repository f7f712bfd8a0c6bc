"""Templates: whatever was read before, a body reads as it would alone; and what is kept of it is bounded."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asgi_app import templates
from asgi_app.v2_codec import Decoded, decode_request
from engine.errors import EngineError, InvalidInput
from engine.types import DATATYPES

from .test_v2_codec import engine_of


@pytest.fixture(autouse=True)
def _cold() -> Iterator[None]:
    """Nothing is known, before and after."""
    templates._by_text.clear()
    yield
    templates._by_text.clear()


@dataclass(frozen=True)
class Body:
    """An infer request; `length` as its header has it."""

    data: bytes
    length: bytes | None = None


def read(body: Body) -> Decoded:
    return decode_request(engine_of(), "m", "", body.data, body.length)


def outcome(body: Body) -> object:
    """All that a request comes to, or the text of its error, as plain values."""
    try:
        decoded = read(body)
    except EngineError as error:
        return type(error), str(error)
    request = decoded.request
    arrays = {
        name: (array.dtype, array.shape, array.tolist() if array.dtype == object else array.tobytes())
        for name, array in request.inputs.items()
    }
    return (
        list(arrays.items()), request.outputs, request.id, request.parameters, request.priority, request.timeout,
        request.correlation_id, request.flags, request.deadline, request.client, list(decoded.binary.items()),
        decoded.binary_default, list(decoded.classes.items()), list(decoded.placed),
    )  # fmt: skip


def likeness(body: Body) -> object:
    """What a request is like; None if that is not known, or it is none."""
    try:
        return read(body).request.like
    except EngineError:
        return None


def plain(data: str = "[1,2,3,4]", before: str = "", after: str = "", shape: str = "[1,4]", kind: str = "FP32") -> Body:
    """JSON with one input."""
    entry = f'{{"name":"x","shape":{shape},"datatype":"{kind}","data":{data}}}'
    return Body(f'{{{before}"inputs":[{entry}]{after}}}'.encode())


def binary(elements: bytes, text: str = "", **changes: Any) -> Body:
    """JSON, and elements behind it."""
    parameters = {"binary_data_size": len(elements)}
    entry = {"name": "x", "shape": [1, len(elements) // 4], "datatype": "FP32", "parameters": parameters, **changes}
    head = (text or json.dumps({"inputs": [entry]})).encode()
    return Body(head + elements, b"%d" % len(head))


ONE_BINARY = '{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":4}}]}'
# The only input is called data, and an array may follow.
NAMED_DATA = '{"inputs":[{"shape":[4],"datatype":"FP32","parameters":{"binary_data_size":16},"name":"data"}]}'

# The first of each line makes a template, which the others have, however they differ.
ALIKE = {
    "numbers": [plain(), plain("[5,6,7,8]"), plain("[1e3, -2.5,\n3 ,4]"), plain("[0,0,0,0]")],
    "one row": [plain("[[1,2,3,4]]"), plain("[[ 5,6,7,8 ]]")],
    "rows in rows": [plain("[" * 90 + "1" + "]" * 90, shape="[1]"), plain("[" * 90 + "7" + "]" * 90, shape="[1]")],
    "none": [plain("[]", shape="[0]"), plain("[ ]", shape="[0]")],
    "a scalar": [plain("[1]", shape="[]"), plain("[2]", shape="[]")],
    "whole numbers": [plain(kind="INT64"), plain(f"[{2**63 - 1},{-(2**63)},0,-0]", kind="INT64")],
    "outputs": [plain(after=',"outputs":[{"name":"y"}]'), plain("[5,6,7,8]", after=',"outputs":[{"name":"y"}]')],
    "binary outputs": [plain(before='"parameters":{"binary_data_output":true},')] * 2,
    "a name of data": [
        Body(b'{"inputs":[{"data":[1,2],"name":"data","shape":[2],"datatype":"FP32"}]}'),
        Body(b'{"inputs":[{"data":[3,4],"name":"data","shape":[2],"datatype":"FP32"}]}'),
    ],
    "binary": [binary(bytes(16)), binary(bytes(range(16)))],
    "binary of half": [binary(elements, shape=[8], datatype="BF16") for elements in (bytes(16), bytes(range(16)))],
    "no binary elements": [binary(b"", shape=[0, 4])] * 2,
}  # fmt: skip

# Those that are looked at whole, each time.
UNLIKE = {
    "an id": plain(before='"id":"a",'),
    "a key that is not known": plain(before='"more":1,'),
    "a parameter": plain(before='"parameters":{"priority":1},'),
    "a sequence": plain(before='"parameters":{"sequence_id":1},'),
    "classes": plain(after=',"outputs":[{"name":"y","parameters":{"classification":1}}]'),
    "an input's parameters": plain('[1],"parameters":{}', shape="[1]"),
    "two inputs": plain('[1]},{"name":"y","shape":[1],"datatype":"FP32","data":[1]', shape="[1]"),
    "two rows": plain("[[1,2],[3,4]]", shape="[2,2]"),
    "true and false": plain("[true,false]", shape="[2]", kind="BOOL"),
    "text": plain('["a","b"]', shape="[2]", kind="BYTES"),
    "data twice": (twice := plain('[5],"data":[0]', shape="[1]")),
    "data twice, the second 1": plain('[5],"data":[1]', shape="[1]"),
    "data twice, once with an escape": plain('[5],"d\\u0061ta":[0]', shape="[1]"),
    "inputs twice": plain("[0]", before='"inputs":[{"data":[9]}],', shape="[1]"),
    "an array before it": Body(b'{"inputs":[{"name":"data","shape":[1],"datatype":"FP32","data":[1]}]}'),
    "NaN beside it": plain(before='"parameters":{"binary_data_output":true,"binary_data_output":NaN},'),
    "much before it": plain(before=" " * templates.LONGEST),
    "binary text": binary(b"\1\0\0\0a", shape=[1], datatype="BYTES"),
    "binary truths": binary(b"\1\2", shape=[2], datatype="BOOL"),
    "binary and JSON": binary(bytes(4), ONE_BINARY[:-2] + ',{"name":"y","shape":[1],"datatype":"FP32","data":[1]}]}'),
    "much before binary": binary(bytes(4), ONE_BINARY + " " * templates.LONGEST),
}  # fmt: skip

# Which have the place of a template, and other elements than it takes: the long way says what is wrong with them.
MISFITS = [
    plain(data)
    for data in (
        "[1,2,3]", "[1,2,3,4,5]", "[]", "[1,2,3,true]", "[1,2,3,null]", "[1,2,3,false]", '[1,2,3,"4"]', "[1,2,3,{}]",
        "[1,2,3,[4]]", "[1,2,3,[]]", "[1,2,3,NaN]", "[1,2,3,Infinity]", "[1,2,3,1e39]", "[1,2,3,1e400]", "[1,2,3,]",
        "[1,2,3,04]", "[1 2,3,4]", "[1,2,3,4", '[1,2,3,"]"]', "[1,2,3,\x0b4]", f"[1,2,3,{10**400}]", "[ [1,2,3,4] ]",
        "[[1,2],[3,4]]", '[1,2,3,{"data":[4]}]', "[1,2,3,1e-400]",
    )
]  # fmt: skip
MISFITS += [plain(data, kind="UINT8") for data in ("[1,2,3,256]", "[1,2,3,-1]", "[1,2,3,4.0]", "[1,2,3,1e2]")]


@pytest.mark.parametrize("bodies", ALIKE.values(), ids=ALIKE)
def test_what_is_like_another(bodies: list[Body]) -> None:
    """It has that one's template, and reads as it would without: elements, names, shapes, forms of its outputs."""
    alone = []
    for body in bodies:
        templates._by_text.clear()
        alone.append(outcome(body))
    read(bodies[0])
    assert [outcome(body) for body in bodies] == alone
    (template,) = templates._by_text.values()
    assert [likeness(body) for body in bodies] == [template] * len(bodies)


@pytest.mark.parametrize("body", UNLIKE.values(), ids=UNLIKE)
def test_what_has_no_template(body: Body) -> None:
    """Requests that say more, and those in which nobody could say where the elements are."""
    assert [likeness(body), likeness(body)] == [None, None]
    assert not templates._by_text


@pytest.mark.parametrize("body", MISFITS, ids=lambda body: body.data[-40:].decode())
def test_what_does_not_fit_its_template(body: Body) -> None:
    """It reads as if there were none: an error to the letter, or elements that only the long way knows."""
    alone = outcome(body)
    templates._by_text.clear()
    for kind in ("FP32", "UINT8"):
        read(plain(kind=kind))
    assert len(templates._by_text) == 2
    assert outcome(body) == alone


def test_two_members_of_one_name() -> None:
    """The last counts, as it does in JSON, and not the one that the bytes seem to show."""
    for number in (b"5", b"7"):
        decoded = read(Body(twice.data.replace(b"[5]", b"[%b]" % number)))
        assert decoded.request.inputs["x"].tolist() == [0]


def test_the_json_of_binary_elements_is_no_beginning_of_json() -> None:
    """An array behind it is a body that is refused, though what stands before the array was seen: as a whole."""
    for text in (NAMED_DATA, NAMED_DATA[:-1] + ',"outputs":[{"name":"data"}]}'):
        read(binary(bytes(16), text))
        assert likeness(binary(bytes(16), text)) is not None
        with pytest.raises(InvalidInput, match="^failed to parse"):
            read(Body(text.encode() + b"[1,2,3,4]"))


def test_a_template_is_kept_once_and_so_many_of_them() -> None:
    """Requests that all differ fill no memory: a bounded number of templates, of keys of bounded size."""
    for number in range(3 * templates.KEPT):
        read(plain(after=f',"outputs":[{{"name":"{number}"}}]'))
        assert 0 < len(templates._by_text) <= templates.KEPT
    assert max(len(before) + len(after) for before, after in templates._by_text) <= templates.LONGEST
    count = len(templates._by_text)
    read(plain(after=f',"outputs":[{{"name":"{number}"}}]'))
    assert len(templates._by_text) == count


@pytest.mark.parametrize("size", [templates.LONGEST, templates.LONGEST + 1])
def test_the_longest_key(size: int) -> None:
    """So many bytes around the elements, or of JSON in front of them, and not one more; the elements do not count."""
    around = len(plain("", shape="[3001]").data)
    json_body = plain(f"[{'1,' * 3000}1]", before=" " * (size - around), shape="[3001]")
    head = binary(bytes(4)).data[:-4].decode()
    padded = binary(bytes(4), head + " " * (size - len(head)))
    known = size == templates.LONGEST
    for body in (json_body, padded):
        likeness(body)
        assert (likeness(body) is not None) == known


def test_arrays_are_of_one_request() -> None:
    """Elements of one are not those of another that has its template."""
    first, second = read(plain("[1,2,3,4]")), read(plain("[5,6,7,8]"))
    third = read(plain("[0,0,0,9]"))
    assert [each.request.inputs["x"].tolist() for each in (first, second, third)] == [
        [[1, 2, 3, 4]], [[5, 6, 7, 8]], [[0, 0, 0, 9]],
    ]  # fmt: skip


# The property.

blank = st.sampled_from(["", "", "", " ", "\n", "\t", "  "])
number = st.one_of(
    st.integers(-3, 300).map(str),
    st.sampled_from("0 1 -0 1.5 1e2 1E+2 -2e-3 1e39 1e400 9223372036854775808 18446744073709551616 01 +1".split()),
)  # fmt: skip
odd = st.sampled_from(
    ["true", "false", "null", "NaN", "-Infinity", '"a"', '"]"', '"[1]"', '"\\"data\\"[1]"', "{}", '{"data":[1]}', ""]
)
name = st.sampled_from(["x", "data", "y", "[1]", 'a"data', "da\\u0074a", "ü", "]", "inputs"])


@st.composite
def arrays(draw: st.DrawFn, depth: int = 3) -> str:
    """As JSON; most of them of numbers."""
    elements = []
    for _ in range(draw(st.integers(0, 4))):
        what = draw(st.integers(0, 12))
        if what == 0 and depth:
            elements.append(draw(arrays(depth - 1)))
        else:
            elements.append(draw(odd) if what == 1 else draw(number))
    around, after = draw(blank), draw(blank)
    text = f"[{around}{f',{after}'.join(elements)}{after}]"
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 12]))):
        text = f"[{draw(blank)}{text}]"
    return text


def listed(elements: list[str]) -> str:
    return f"[{','.join(elements)}]"


def string(text: str) -> str:
    """A JSON string; one with escapes is taken as it is written."""
    return '"%s"' % (text if "\\" in text else text.replace('"', '\\"'))


@st.composite
def objects(draw: st.DrawFn, members: list[tuple[str, Callable[[], str]]], extra: list[tuple[str, str]]) -> str:
    """Members in any order; now and then one of them is missing, or there twice, or another is added."""
    chosen = [(key, make()) for key, make in members]
    what = draw(st.integers(0, 15))
    if what == 0 and chosen:
        chosen.pop(draw(st.integers(0, len(chosen) - 1)))
    elif what == 1 and members:
        key, make = draw(st.sampled_from(members))
        chosen.append((key, make()))
    elif what == 2 and extra:
        chosen.append(draw(st.sampled_from(extra)))
    if draw(st.booleans()):
        chosen = draw(st.permutations(chosen))
    return "{" + ",".join([f'{draw(blank)}"{key}"{draw(blank)}:{value}' for key, value in chosen]) + draw(blank) + "}"


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    """Infer requests, and what is nearly one: JSON, or JSON with elements behind it."""
    raw = draw(st.integers(0, 2)) == 0
    elements = b""

    def input_() -> str:
        nonlocal elements
        datatype = draw(
            st.sampled_from(["FP32", "FP32", "INT8", "UINT64", "FP64", "BOOL", "BYTES", "FP16", "BF16", "FP8"])
        )
        shape = draw(st.lists(st.sampled_from([1, 1, 2, 3, 0]), max_size=3))
        count = int(np.prod(shape, dtype=int))
        parts: list[tuple[str, Callable[[], str]]] = [
            ("name", lambda: string(draw(name))),
            ("shape", lambda: json.dumps(shape)),
            ("datatype", lambda: f'"{datatype}"'),
        ]
        if raw and draw(st.integers(0, 9)):
            size = max(
                0, count * DATATYPES.get(datatype, np.dtype("u1")).itemsize + draw(st.sampled_from([0, 0, 0, 0, 1]))
            )
            elements += draw(st.binary(min_size=size, max_size=size))
            parts.append(("parameters", lambda: f'{{"binary_data_size":{size}}}'))
        elif draw(st.booleans()):
            parts.append(("data", lambda: json.dumps([draw(st.integers(0, 9)) for _ in range(count)])))
        else:
            parts.append(("data", lambda: draw(arrays())))
        return draw(
            objects(parts, [("parameters", "{}"), ("parameters", "null"), ("data", "[0]"), ("d\\u0061ta", "[1]")])
        )

    def outputs() -> str:
        forms = st.sampled_from(
            ["", ',"parameters":{"binary_data":true}', ',"parameters":{"classification":1}', ',"parameters":null']
        )
        return listed([f'{{"name":{string(draw(name))}{draw(forms)}}}' for _ in range(draw(st.integers(0, 2)))])

    parts: list[tuple[str, Callable[[], str]]] = [
        ("inputs", lambda: listed([input_() for _ in range(draw(st.sampled_from([1, 1, 1, 1, 2, 0])))]))
    ]
    if draw(st.integers(0, 3)) == 0:
        parts.append(("outputs", outputs))
    if draw(st.integers(0, 3)) == 0:
        said = st.sampled_from(
            ['{"binary_data_output":true}', '{"binary_data_output":1}', "{}", '{"a":1}', "null", '{"priority":2}']
        )
        parts.append(("parameters", lambda: draw(said)))
    if draw(st.integers(0, 9)) == 0:
        parts.append(("id", lambda: draw(st.sampled_from(['"a"', '""', '"data"', '"\\"data"', "1"]))))
    text = draw(blank) + draw(objects(parts, [("more", "[1]"), ("data", "[1]"), ("id", '"data"')])) + draw(blank)
    head = text.encode()
    if not raw:
        return Body(head)
    length = len(head) + draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1]))
    return Body(head + elements + draw(st.sampled_from([b"", b"", b"", b"", b"\0", b"[1]"])), b"%d" % length)


NUMBERS = "[0,1]"


def variants(body: Body, others: list[str]) -> list[Body]:
    """The same with other elements where its own seem to be: each is like it, or nearly."""
    if body.length is not None:
        turned = body.data[: int(body.length)] + body.data[int(body.length) :][::-1]
        return [Body(turned, body.length), Body(body.data), Body(body.data + b"\0", body.length)]
    at, end = body.data.find(b"[", body.data.find(b'"data"')), 0
    while body.data.startswith(b"[", at + 1):
        at += 1
    end = body.data.find(b"]", at) + 1
    return [Body(body.data[:at] + other.encode() + body.data[end:]) for other in others]


@settings(max_examples=400, deadline=None)
@given(before=st.lists(bodies(), max_size=3), body=bodies(), others=st.lists(arrays(), max_size=4))
@example(before=[], body=twice, others=["[7]", "[0]"])
@example(before=[], body=plain("[" * 20 + "1" + "]" * 20, shape="[1]"), others=["[2]"])
@example(before=[binary(bytes(16), NAMED_DATA)], body=Body(NAMED_DATA.encode() + b"[1,2,3,4]"), others=["[1]"])
def test_whatever_was_read_before(before: list[Body], body: Body, others: list[str]) -> None:
    """A body comes to what it comes to alone, to the last bit and letter, whatever the templates are by then."""
    asked = [*before, body, *variants(body, [*others, NUMBERS]), body, *before]
    alone = []
    for each in asked:
        templates._by_text.clear()
        alone.append(outcome(each))
    templates._by_text.clear()
    assert [outcome(each) for each in asked] == alone
    # In another order, too: what is first is what makes a template.
    templates._by_text.clear()
    assert [outcome(each) for each in reversed(asked)] == alone[::-1]
