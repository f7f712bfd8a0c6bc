"""Two answers to one request -> every place in which they differ.

Nothing is left out silently. What cannot be equal is reduced to what can: durations to their presence, the order of
names that Triton prints in a hash map's order to the alphabet's.
"""

import json
import math
import re
import zlib
from collections.abc import Iterator
from typing import Any

from .exchange import Answer, Request

HEADERS = ("content-type", "content-encoding", "accept-encoding", "inference-header-content-length")
METRICS = ("nv_inference_", "custom_")
TIMES = ("_duration_us", "_summary_us")

Difference = tuple[str, Any, Any]  # place, Triton's, ours


def differences(request: Request, theirs: Answer, ours: Answer) -> list[Difference]:
    """Every place where they differ, with both values; empty if they agree."""
    return places(read(request, theirs), read(request, ours))


def places(theirs: Any, ours: Any) -> list[Difference]:
    """Every place where two structures of dicts and lists differ."""
    return list(_walk("", theirs, ours))


def summary(answer: Answer) -> str:
    """An answer's status and, if there is one, its error's text."""
    try:
        said = json.loads(answer.body)
    except ValueError:
        return f"{answer.status} {'' if answer.status == 200 else answer.body.decode(errors='replace')}".strip()
    text = said.get("error", "") if isinstance(said, dict) else ""
    return f"{answer.status} {_names_sorted(text)}".strip()


def read(request: Request, answer: Answer) -> dict[str, Any]:
    """An answer as one structure of dicts and lists, for comparing."""
    said: dict[str, Any] = {"status": answer.status}
    for name in HEADERS:
        if name in answer.headers:
            said[name] = answer.headers[name]
    said.update(_body(answer))
    if request.only and isinstance(said.get("json"), list):
        said["json"] = [model for model in said["json"] if model.get("name") == request.only]
    if answer.memory:
        said["memory"] = answer.memory.hex()
    if request.metrics and request.path == "/metrics":
        series = _metrics(answer.body.decode())
        label = f'model="{request.only}"' if request.only else ""
        return {"status": answer.status, "metrics": {name: value for name, value in series.items() if label in name}}
    # The JSON of two servers may be spelled differently: then its length says nothing.
    said.pop("inference-header-content-length", None)
    said["framed"] = "inference-header-content-length" in answer.headers
    return said


def _body(answer: Answer) -> dict[str, Any]:
    body = answer.body
    match answer.headers.get("content-encoding"):
        case "gzip":
            body = zlib.decompress(body, 31)
        case "deflate":
            body = zlib.decompress(body)
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        events = body.decode("utf-8", "surrogateescape").split("\n\n")
        return {"events": [_json(event.removeprefix("data: ")) for event in events]}
    length = int(answer.headers.get("inference-header-content-length", len(body)))
    parsed = _json(body[:length].decode("utf-8", "surrogateescape"))
    return {"json": parsed, "tensors": dict(_tensors(parsed, body[length:]))}


def _tensors(parsed: Any, data: bytes) -> Iterator[tuple[str, str]]:
    """The binary outputs, as hexadecimal text, and what is left over behind them."""
    for output in parsed.get("outputs", ()) if isinstance(parsed, dict) else ():
        size = output.get("parameters", {}).get("binary_data_size") if isinstance(output, dict) else None
        if size is not None:
            yield output["name"], data[:size].hex()
            data = data[size:]
    if data:
        yield "left over", data.hex()


def _json(text: str) -> Any:
    if not text:
        return None
    try:
        return reduce(json.loads(text))
    except ValueError:
        return {"text": text}


def reduce(value: Any) -> Any:
    """A structure with its durations and points in time reduced to being whole numbers, and lists of names sorted."""
    if isinstance(value, dict):
        return {
            key: _time(key, item) if key in ("ns", "last_inference") else reduce(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [reduce(item) for item in value]
    return _names_sorted(value) if isinstance(value, str) else value


def _time(key: str, value: Any) -> Any:
    if type(value) is not int or value < 0:
        return value
    return "a time" if key == "ns" or value else 0


def _names_sorted(text: str) -> str:
    return re.sub(r"\[('[^\]]*)\]", lambda names: str(sorted(re.findall(r"'([^']*)'", names[1]))), text)


def _metrics(text: str) -> dict[str, Any]:
    """The series, and the HELP and TYPE lines, of what models count; the machine's own figures cannot be equal."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if match := re.match(r"# (HELP|TYPE) (\S+) (.*)", line):
            kind, name, value = match.groups()
            series = f"{kind} {name}"
        elif match := re.match(r"(\w+)(?:\{(.*)\})? (\S+)$", line):
            name, labels, value = match.groups()
            series = f"{name} {' '.join(sorted((labels or '').split(',')))}"
            value = "a time" if name.endswith(TIMES) else float(value)
        else:
            continue
        if name.startswith(METRICS):
            found[series] = value
    return found


def _walk(place: str, theirs: Any, ours: Any) -> Iterator[Difference]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            yield from _walk(f"{place}.{key}" if place else key, theirs.get(key, ABSENT), ours.get(key, ABSENT))
    elif isinstance(theirs, list) and isinstance(ours, list):
        for index in range(max(len(theirs), len(ours))):
            pair = [side[index] if index < len(side) else ABSENT for side in (theirs, ours)]
            yield from _walk(f"{place}[{index}]", *pair)
    elif not _equal(theirs, ours):
        yield place, theirs, ours


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


def _equal(a: Any, b: Any) -> bool:
    """Equal in type too: 1 is not 1.0, and not true. NaN equals itself."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return type(a) is type(b) and a == b and repr(a) == repr(b)  # the last for -0.0
