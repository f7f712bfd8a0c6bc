"""Where the two may differ, and why. Whatever no entry describes is an error."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compare import Difference, summary
from .exchange import Answer, Request

ERROR = ""  # the place of an answer as a whole


@dataclass(frozen=True)
class Allowed:
    """One deliberate difference.

    Attributes:
        reason: what differs and why, in words for the documents.
        pair: pattern for all of "Triton's → ours". Of an answer as a whole each side is the status and the error's text
            ("400 invalid datatype for input I"), of a place in it the value there.
        place: pattern for the place (`json.version`); ERROR for the answer as a whole.
        request: pattern for the beginning of "METHOD path body".
        close: whether the two values must be the same number in single precision besides.
    """

    reason: str
    pair: str
    place: str = ERROR
    request: str = ""
    close: bool = False


MISTAKE = r"(Unable to parse |attempt to |Expected JSON object )"
AT = r"At:(\n|\\n)  "  # before the first line of a traceback, also inside JSON that is compared as text

# The first entry that fits is the one that counts.
ALLOWED: tuple[Allowed, ...] = (
    Allowed(
        "JSON that cannot be read is the caller's mistake: 400, where Triton says 500; the parser's own words differ",
        r"500 failed to parse the request JSON buffer: .* → 400 failed to parse the request JSON buffer: .*",
    ),
    Allowed(
        "JSON of another type than is wanted, or without a member, is 400 too, and the text goes on to say where",
        rf"500 (?P<text>{MISTAKE}.*) → 400 (?P=text)( \(.*\))?",
    ),
    Allowed(
        "and where something that should be an object is not, the text says so",
        r"(500 .*attempt to get members for non-object|500 Unable to parse .*|400 Input must set only one .*|200) → "
        r"400 (.*attempt to (get members for|access JSON) non-object.*|\S+ must be an? .*object.*|"
        r"the request must be a JSON object.*)",
    ),
    Allowed("a text may go on to say what was found", r"(?P<text>4.*) → (?P=text) \(.*\)"),
    Allowed(
        "of several mistakes another one may be told first: a value of the wrong type before one that is missing",
        r"(500|400) (Unable to (parse|set) '|Input must set).* → 400 Unable to parse '.*': attempt to access .*",
    ),
    Allowed(
        "binary data is measured, and JSON data counted, while it is read: before the model's inputs are looked at",
        r"400 (\[.*\] )?(unexpected (shape|number of string)|in.* '.*' (data-type|has no shape|batch size)|"
        r"inference request batch-size).* → 400 (\[.*\] input byte size mismatch .*|"
        r"Unable to parse 'data': Shape does not match .*|\[.*\] expected \d+ string elements .*)",
    ),
    Allowed(
        "and before what is left over behind it is",
        r"400 unexpected (additional input data|size) for .* → 400 \[.*\] input byte size mismatch .*",
    ),
    Allowed(
        "the input of a raw request is called by its name; Triton: raw_input",
        r"(?P<a>400 .* for input ')raw_input(?P<b>'.*) → (?P=a)\w+(?P=b)",
    ),
    Allowed(
        "of inputs that are wrong alike, another may be named: Triton takes them in the order of a hash map",
        r"(?P<a>400 (\[.*?\] )?(unexpected shape for )?input ')\w+(?P<b>'.*) → (?P=a)\w+(?P=b)",
    ),
    Allowed(
        "an empty list of missing inputs is printed whole; Triton loses its first bracket",
        r"(?P<a>.*missing required input\(s\) )\](?P<b>.*) → (?P=a)\[\](?P=b)",
    ),
    Allowed(
        "with optional inputs too, an input that is missing is noticed before the model runs",
        r"500 Failed to process .* → 400 .*expected number of inputs between .* missing required input.*",
    ),
    Allowed(
        "a whole number that its datatype cannot hold is refused, where Triton wraps it around or calls it no integer",
        r"(200|500 Unable to parse 'data': .*) → 400 .*holds a number that does not fit \w+",
    ),
    Allowed("a request of zero rows is refused", r".* → 400 \[.*\] inference request has zero rows .*"),
    Allowed(
        "a shape whose size is beyond counting is refused, as in newer Tritons", r".* → 400 invalid shape for input .*"
    ),
    Allowed(
        "an output that is asked for twice is refused, as in newer Tritons",
        r"200 → 400 .*output '.*' already exists in request",
    ),
    Allowed(
        "a header length that is no number is refused, as in newer Tritons",
        r"(200|400|500) .* → 400 Unable to parse Inference-Header-Content-Length, .*",
    ),
    Allowed(
        "an empty body is no JSON, and no raw tensor either unless Inference-Header-Content-Length is 0",
        r".* → 400 failed to parse the request JSON buffer: .*empty document.*",
    ),
    Allowed(
        "a byte order mark is not JSON",
        r".* → 400 failed to parse the request JSON buffer: .*byte order mark.*",
    ),
    Allowed("null for `parameters` or `outputs` is as if it were left out", r"500 .* → 200", request=r".*:null"),
    Allowed("of a JSON member that is given twice the last counts", r"a → b", r"json\.id"),
    Allowed(
        "a region without a size is named as such, before the region is looked for",
        r"40[04] .* → 400 'shared_memory_byte_size' must be specified .*",
    ),
    Allowed(
        "an FP32 number is written in the fewest digits that give the same FP32, where Triton widens it to FP64 first",
        r"[-+.e\d]+ → [-+.e\d]+",
        place=r"json(\.outputs\[\d+\]\.data\[\d+\]|\.OUTPUT\d)",
        close=True,
    ),
    Allowed(
        "a whole number above an INT64 among the parameters stays whole; Triton makes it a double",
        r'.*"large": 9.223372036854776e\+18.* → .*"large": 9223372036854775808.*',
        place=r"json\.outputs.*",
    ),
    Allowed(
        "an FP16 output that JSON cannot carry is named",
        r"(?P<text>400 sending FP16 data via JSON .*for output) → (?P=text) \w+",
    ),
    Allowed(
        "an unknown Content-Encoding is 415, as HTTP has it; Triton: 501, and 400 for generate",
        r"501 Unsupported compression type → 415 .*|400 (?P<text>Unsupported content-encoding.*) → 415 (?P=text).*",
    ),
    Allowed(
        "a body that is not what its Content-Encoding says is 400, with that text", r"400 .* → 400 Content-Encoding: .*"
    ),
    Allowed("an empty Content-Encoding is none", r"501 Unsupported compression type → 200"),
    Allowed("blanks around a coding in Accept-Encoding are no part of it", r"\(absent\) → gzip", "content-encoding"),
    Allowed(
        "a full queue is 429, come back later; Triton: 503",
        r"503 \[request id: .*\] Exceeds maximum queue size → 429 .*",
    ),
    Allowed("a timeout in the queue is 504; Triton: 503", r"503 Request timeout expired → 504 .*"),
    Allowed(
        "a model's traceback names its file within the repository, not where the repository is",
        rf"(?P<a>.*?{AT})/\S+?/(?P<b>\w+/\d+/model\.py\(.*) → (?P=a)(?P=b)",
    ),
    Allowed(
        "the same, in the index",
        rf"(?P<a>.*?{AT})/\S+?/(?P<b>\w+/\d+/model\.py\(.*) → (?P=a)(?P=b)",
        place=r"json\[\d+\]\.reason",
    ),
    Allowed(
        "an error of the model has its own status in generate, as in infer; Triton says 400 there whatever it was",
        r"400 (?P<text>.*?)(At:.*)? → (404|500|501|503) (?P=text)(At:.*)?",
        request=r"POST /v2/models/\w+/generate",
    ),
    Allowed(
        "an error ends the responses to generate, and is the answer; Triton goes on with those that follow",
        r"400 (generate expects model to produce exactly 1 .*|(?P<text>data: .*?)\n\ndata: .*) → "
        r"(404|500|501|503) (?(text)(?P=text)|.*)",
        request=r"POST /v2/models/repeat\w*/generate",
    ),
    Allowed(
        "the same, where responses came before the error",
        r"(\{.*\}|None) → (None|\(absent\))",
        place=r"events\[\d+\]",
        request=r"POST /v2/models/repeat\w*/generate_stream .*FAIL_AT",
    ),
    Allowed(
        "an iterator over a decoupled model's responses ends with the last of them; in Triton an empty one follows",
        r"(?P<text>.*) \|  → (?P=text)",
        place=r"json\.outputs\[0\]\.data\[0\]",
        request=r".*decoupled",
    ),
    Allowed(
        "a model whose config cannot be read is in the index, with the reason; Triton: by its name alone",
        r"404 (?P<text>Request for unknown model: '.*') is not found → 404 (?P=text) has no available versions",
        request=r"GET /v2/models/bad_\w+ ",
    ),
    Allowed("the same, in the index itself", r"\(absent\) → (1|UNAVAILABLE|Invalid argument: .*)", r"json\[0\]\.\w+"),
    Allowed(
        "the reason names the file and the field",
        r"Invalid argument: (?P<text>.*) → Invalid argument: .*(?P=text).*",
        r"json\[\d+\]\.reason",
    ),
    Allowed(
        "a model without a version is in the index, by its name",
        r"\(absent\) → \{'name': 'no_versions'\}",
        r"json\[0\]",
    ),
    Allowed(
        "and is not found",
        r"404 (?P<text>Request for unknown model: '.*') has no available versions → 404 (?P=text) is not found",
    ),
    Allowed(
        "a version whose files came with a request is forgotten when it is unloaded; Triton lists it for ever",
        r"\{'name': 'later', 'version': '7', 'state': 'UNAVAILABLE', 'reason': 'unloaded'\} → \(absent\)",
        r"json\[\d+\]",
        "POST /v2/repository/index",
    ),
    Allowed(
        "the responses of a decoupled model are told apart; Triton's Python backend reports none of them",
        r"\(absent\) → \{'compute_infer': .*",
        r"json\.model_stats\[\d+\]\.response_stats\.\d+",
        "GET /v2/models/repeat_counted/stats",
    ),
    Allowed(
        "a model that could not be loaded takes the server's other models out of no rotation: it stays ready",
        r"400 → 200",
        request="GET /v2/health/ready",
    ),
    Allowed("an extension that is not served is not listed", r".*", r"json\.extensions\[\d+\]", "GET /v2[ ?]"),
    Allowed(
        "the server's name and version are its own",
        r"triton → \w+|2\.51\.0 → .*",
        r"json\.(name|version)",
        "GET /v2[ ?]",
    ),
    Allowed(
        "every error is application/json, where some of Triton's are text/plain",
        r"text/plain → application/json",
        "content-type",
    ),
    Allowed(
        "an answer without a body has no Content-Type",
        r"(text/plain|application/json) → \(absent\)",
        "content-type",
    ),
    Allowed(
        "a model that is not there is 404 or 503 with the reason, as in newer Tritons; 2.51: 400",
        r"400 Model version not ready → (404|503) Request for unknown model: .*",
    ),
    Allowed(
        "`ready` that is no boolean is 400 with a text of its own, as in newer Tritons",
        r"500 attempt to access JSON non-boolean as boolean → 400 Invalid value for 'ready': expected a boolean",
    ),
    Allowed(
        "a model that cannot be loaded for what its folder, its config or the request says is 400, and the text says "
        "why; Triton: 500, and why is in its log",
        r"500 (?P<text>failed to load '.*', failed to poll from model repository|unexpected error on creating .*) → "
        r"400 (?P=text)(: .*)?",
    ),
    Allowed(
        "a config that cannot be served is refused as one that cannot be read",
        r"400 load failed for model '(?P<name>\w+)': .* → 400 failed to load '(?P=name)', failed to poll from .*",
    ),
    Allowed(
        "a file that is not base64 is refused; Triton takes what it can read of it",
        r"400 load failed .* → 400 parameter '.*' is not valid base64.*",
    ),
    Allowed(
        "a path that no protocol here has is refused in the words of the other front",
        r"(Not Found → \(absent\)|\(absent\) → Not Found)",
        r"json\.(error|detail)",
        "GET /v1 ",
    ),
    Allowed(
        "a name that could not be a folder's is refused, as in newer Tritons",
        r"500 failed to load .* → 400 (Model name cannot be empty|invalid model name ).*",
    ),
    Allowed(
        "a python model without `execute` cannot be loaded; Triton loads it, and every request fails",
        r"200 → 400 load failed for model 'unfinished': .*",
    ),
    Allowed(
        "what is sent to unload a model or to change a setting must make sense; Triton takes what it can use of it",
        r"200 → 400 (attempt to access JSON|failed to parse the request JSON|Unable to parse 'trace_).*",
        request="POST /v2/(repository|logging|trace|models/[^/]+/trace)",
    ),
    Allowed(
        "a log format that is none is the caller's mistake: 400, Triton: 503",
        r"503 (?P<t>invalid argument.*) → 400 (?P=t)",
    ),
    Allowed(
        "a region that cannot be registered is 400 and named, as in newer Tritons; 2.51: 500",
        r"500 (?P<text>(Unable to open|Invalid) shared memory region: .*) → "
        r"400 failed to register shared memory region '.*': (?P=text)",
    ),
    Allowed(
        "and the text says why",
        r"400 (?P<text>failed to register shared memory region '.*': )(invalid args|unable to process .*) → "
        r"400 (?P=text).*",
    ),
    Allowed(
        "a reserved key is refused by name, as in newer Tritons", r"500 Unable to open .* → 400 .*reserved prefix.*"
    ),
    Allowed(
        "a region may begin anywhere, and several of any size share a key; Triton asks for whole pages, and one size",
        r"(400 failed to register .*(unable to process address space.*|invalid args)|"
        r"500 Invalid shared memory region: .*) → 200",
    ),
    Allowed(
        "CUDA shared memory is not served: 501", r".* → 501 CUDA shared memory is not served.*", request=r"\w+ /v2/cuda"
    ),
    Allowed("/ and /metrics are served on the main port too", r"404 Not Found → 200", request=r"GET /(metrics)? "),
    Allowed(
        "the port for metrics has no other path; Triton answers any, with nothing",
        r"200 → 404 .*",
        request="GET /other",
    ),
    Allowed("HEAD works wherever GET does", r"405 → 200", request="HEAD"),
)


def explain(
    request: Request, theirs: Answer, ours: Answer, found: Sequence[Difference]
) -> tuple[list[Difference], set[Allowed]]:
    """Differences that no entry allows, and the entries that allow the others."""
    if not found:
        return [], set()
    text = f"{request.method} {request.path} {request.body.decode(errors='replace')}"
    entries = [entry for entry in ALLOWED if re.match(entry.request, text, re.S)]
    whole = [e for e in entries if e.place == ERROR and _allows(e, summary(theirs), summary(ours))]
    if whole:
        return [], {whole[0]}
    left: list[Difference] = []
    used: set[Allowed] = set()
    for place, a, b in found:
        fitting = [e for e in entries if e.place != ERROR and re.fullmatch(e.place, place) and _allows(e, a, b)]
        used.update(fitting[:1])
        if not fitting:
            left.append((place, a, b))
    return left, used


def _allows(entry: Allowed, theirs: Any, ours: Any) -> bool:
    if not re.fullmatch(entry.pair, f"{theirs} → {ours}", re.S):
        return False
    return not entry.close or bool(np.float32(theirs) == np.float32(ours))
