"""The shortcut: what takes it is answered the same bytes as on the long way, once, whatever happens meanwhile.

Each connection is one in memory (tests/asgi_app/wire.py) to our protocol class, in front of an engine in this process.
"""

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import orjson
import pytest
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from asgi_app import app, protocol, shortcut, templates
from asgi_app.exchange import Connection, Exchange
from asgi_app.heads import Head
from asgi_app.messages import Receive, Scope, Send
from asgi_app.protocol import Protocol
from asgi_app.shortcut import Query, Shortcut
from asgi_app.v2_codec import encode_numbers
from engine import loading, local
from engine.errors import InvalidInput
from engine.loading import Served
from engine.local import LocalEngine
from engine.settings import Settings
from engine.types import Array, InferRequest
from tests.conftest import StartLocal
from tests.scripted import CONFIG, Gate, Scripted, add_model, double
from tests.timing import settle, until

from .wire import Answer, Wire, connect, read_answers

INLINE = {"inline_ms": 1000.0}
THREAD = {"inline_ms": 0.0}

KINDS = """
backend: "pytorch"
max_batch_size: 32
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [
  { name: "y" data_type: TYPE_FP32 dims: [ 4 ] }, { name: "text" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "half" data_type: TYPE_FP16 dims: [ 2 ] }, { name: "brain" data_type: TYPE_BF16 dims: [ 2 ] },
  { name: "truth" data_type: TYPE_BOOL dims: [ 2 ] }, { name: "whole" data_type: TYPE_INT64 dims: [ 2 ] }
]
dynamic_batching { }
"""
PAIR = CONFIG.replace(" dims: [ 4 ] } ]\ndyn", ' dims: [ 4 ] }, { name: "z" data_type: TYPE_INT32 dims: [ 1 ] } ]\ndyn')
BAD, WRONG, NONE = 13.0, 14.0, 15.0  # what a model raises for, refuses, and has no number for


def kinds(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """An output of every kind, by the first number of each row."""
    x = inputs["x"]
    if (x[:, 0] == BAD).any():
        raise ValueError("cannot take it")
    if (x[:, 0] == WRONG).any():
        raise InvalidInput("it is wrong")
    y = np.where(x == NONE, np.float32(np.nan), x * np.float32(2))
    pair = y[:, :2]
    return {
        "y": y,
        "text": np.array([[b"row %d \xff" % row[0]] for row in x.tolist()], object),
        "half": pair.astype(np.float16),
        "brain": pair.astype(ml_dtypes.bfloat16),
        "truth": x[:, :2] > 1,
        "whole": x[:, :2].astype(np.int64),
    }


def pair(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Two outputs of numbers."""
    return {"y": inputs["x"] * 2, "z": inputs["x"][:, :1].astype(np.int32)}


def infer(
    body: bytes,
    *headers: bytes,
    path: bytes = b"/v2/models/m/infer",
    method: bytes = b"POST",
    version: bytes = b"1.1",
    length: int | None = None,
) -> bytes:
    """A request; `length` as its header says."""
    announced = b"content-length: %d" % (len(body) if length is None else length)
    lines = [b"%b %b HTTP/%b" % (method, path, version), b"host: x", announced, *headers, b""]
    return b"".join(line + b"\r\n" for line in lines) + body


def json_body(*numbers: float, more: bytes = b"") -> bytes:
    row = b",".join(b"%d" % number for number in (numbers or (1, 2, 3, 4)))
    return b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[%b]}]%b}' % (row, more)


def binary(*numbers: float, more: bytes = b"") -> tuple[bytes, bytes]:
    """A body, and the header that says where its JSON ends."""
    head = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","parameters":{"binary_data_size":16}}]%b}' % more
    return head + np.array(numbers or (1, 2, 3, 4), "<f4").tobytes(), b"inference-header-content-length: %d" % len(head)


def outputs(*names: str, **parameters: object) -> bytes:
    listed = [{"name": name, **({"parameters": parameters} if parameters else {})} for name in names]
    return b',"outputs":' + orjson.dumps(listed)


JSON_NAMES = ("y", "text", "truth", "whole")


class Counting(Shortcut):
    """Remembers who took it, as long as they live."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.taken: list[weakref.ref[Exchange]] = []

    def take(self, protocol: Connection, head: Head, body: bytes) -> Exchange | None:
        query = super().take(protocol, head, body)
        if query is not None:
            assert type(query) is Query
            self.taken.append(weakref.ref(query))
        return query


class Front:
    """Connections to the application in front of an engine, with the shortcut or without."""

    def __init__(self, engine: LocalEngine, short: bool = True, **settings: Any) -> None:
        self.engine = engine
        self._settings = Settings(**settings)
        self.shortcut = Counting(engine, self._settings, app)
        self._short = short

    def open(self, application: Any = app, made_by: Any = Protocol) -> Wire:
        given: dict[str, Any] = {
            "engine": self.engine, "settings": self._settings, "loop": asyncio.get_running_loop(),
        }  # fmt: skip
        if self._short:
            given["shortcut"] = self.shortcut
        return connect(made_by, application, app_state=given)

    async def ask(self, *requests: bytes, **more: Any) -> tuple[bytes, bool]:
        """Over one connection, one after the other: what came back, and whether it was closed."""
        wire = self.open(**more)
        for request in requests:
            before = len(wire.writes)
            wire.send(request)
            await until(lambda before=before: wire.closing or len(wire.writes) > before)  # type: ignore[misc]
            await wire.quiet()
        came = wire.written, wire.closing
        wire.vanish()
        await wire.quiet()
        return came

    @property
    def taken(self) -> int:
        return len(self.shortcut.taken)

    async def learn(self, request: bytes) -> None:
        """Answer as many as it takes until the next one is short."""
        await self.ask(request, request)
        before = self.taken
        await self.ask(request)
        assert self.taken == before + 1
        self.shortcut.taken.clear()
        Scripted.calls.clear()


def served(engine: LocalEngine, name: str = "m") -> Served:
    return engine._models[name, ""]


def left(engine: LocalEngine) -> dict[str, int]:
    return {stage: count for stage, count in served(engine).batcher.journal.left.items() if count}


def answers(wire: Wire) -> list[Answer]:
    return read_answers(wire.written, ["POST"] * 10_000, wire.closing)


def numbers(answer: Answer) -> list[float]:
    assert (answer.status, answer.whole) == (200, True), answer
    (output,) = orjson.loads(answer.body)["outputs"]
    return cast("list[float]", output["data"])


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No access log, to which pytest listens, and no templates of other tests."""
    monkeypatch.setattr(protocol, "access_logger", logging.Logger("nobody listens"))
    templates._by_text.clear()


@pytest.fixture
async def engine(local_engine: StartLocal, tmp_path: Path) -> LocalEngine:
    """With a model of every kind of outputs, and a plain one."""
    add_model(tmp_path, "kinds", KINDS)
    add_model(tmp_path, "pair", PAIR)
    add_model(tmp_path, "cached", CONFIG + "response_cache { enable: true }")
    return await local_engine(INLINE, m=double, kinds=kinds, pair=pair, cached=double)


def on_kinds(body: bytes, *headers: bytes) -> bytes:
    return infer(body, *headers, path=b"/v2/models/kinds/infer")


# What takes the shortcut, once it was asked twice.
SHORT = {
    "JSON": infer(json_body()),
    "binary": infer(*binary()),
    "a version": infer(json_body(), path=b"/v2/models/m/versions/1/infer"),
    "a query": infer(json_body(), path=b"/v2/models/m/infer?a=b"),
    "a name in escapes": infer(json_body(), path=b"/v2/models/%6d/infer"),
    "an absolute target": infer(json_body(), path=b"http://x/v2/models/m/infer"),
    "no coding is wanted": infer(json_body(), b"accept-encoding: identity, gzip;q=0"),
    "two outputs": infer(json_body(), path=b"/v2/models/pair/infer"),
    "one of two": infer(json_body(more=outputs("y")), path=b"/v2/models/pair/infer"),
    "the other of two": infer(json_body(more=outputs("z")), path=b"/v2/models/pair/infer"),
    "numbers, binary out": infer(json_body(more=b',"parameters":{"binary_data_output":true}')),
    "numbers, not binary out": infer(json_body(more=b',"parameters":{"binary_data_output":false}')),
    "one output": on_kinds(json_body(more=outputs("y"))),
    "outputs of every kind": on_kinds(json_body(more=outputs(*JSON_NAMES))),
    "outputs the other way round": on_kinds(json_body(more=outputs(*reversed(JSON_NAMES)))),
    "binary out": on_kinds(json_body(more=b',"parameters":{"binary_data_output":true}')),
    "binary in and out": on_kinds(*binary(more=b',"parameters":{"binary_data_output":true}')),
    "selected binary": on_kinds(json_body(more=outputs("half", "brain", "text", binary_data=True))),
    "no number": on_kinds(json_body(NONE, 1, 2, 3, more=outputs("y"))),
    "no number, binary": on_kinds(json_body(NONE, 1, 2, 3, more=outputs("y", binary_data=True))),
    "all as JSON, where one has no such form": on_kinds(json_body()),
    "half as JSON": on_kinds(json_body(more=outputs("half"))),
    "brain as JSON": on_kinds(json_body(more=outputs("brain"))),
    "the model raises": on_kinds(json_body(BAD, 1, 2, 3, more=outputs("y"))),
    "the model refuses": on_kinds(json_body(WRONG, 1, 2, 3, more=outputs("y"))),
    "the model raises, binary": on_kinds(*binary(BAD, 1, 2, 3)),
}

_body = json_body()
# What never does.
LONG = {
    "a deadline": infer(_body, b"x-request-timeout-ms: 60000"),
    "a deadline that is none": infer(_body, b"x-request-timeout-ms: soon"),
    "the proxy's deadline": infer(_body, b"x-envoy-expected-rq-timeout-ms: 60000"),
    "a coding": infer(_body, b"content-encoding: identity"),
    "a coding that is not served": infer(_body, b"content-encoding: br"),
    "a coding is wanted": infer(_body, b"accept-encoding: gzip"),
    "our word is waited for": infer(_body, b"expect: 100-continue"),
    "HTTP/1.0": infer(_body, version=b"1.0"),
    "HTTP/1.0, kept alive": infer(_body, b"connection: keep-alive", version=b"1.0"),
    "close": infer(_body, b"connection: close"),
    "HEAD": infer(_body, method=b"HEAD"),
    "GET": infer(_body, method=b"GET"),
    "OPTIONS": infer(_body, method=b"OPTIONS"),
    "PUT": infer(_body, method=b"PUT"),
    "chunks": infer(b"%x\r\n%b\r\n0\r\n\r\n" % (len(_body), _body), b"transfer-encoding: chunked").replace(
        b"content-length: %d\r\n" % (len(_body) + len(b"%x" % len(_body)) + 9), b""
    ),
    "an id": infer(json_body(more=b',"id":"a"')),
    "a priority": infer(json_body(more=b',"parameters":{"priority":1}')),
    "classes": infer(json_body(more=outputs("y", classification=1))),
    "no output of its": infer(json_body(more=outputs("z"))),
    "no input of its": infer(json_body().replace(b'"x"', b'"z"')),
    "another shape": infer(json_body().replace(b"[1,4]", b"[4,1]")),
    "no model": infer(_body, path=b"/v2/models/none/infer"),
    "no version": infer(_body, path=b"/v2/models/m/versions/9/infer"),
    "a version that is none": infer(_body, path=b"/v2/models/m/versions/x/infer"),
    "no path": infer(_body, path=b"/v2/models/%ff/infer"),
    "generate": infer(_body, path=b"/v2/models/m/generate"),
    "a cached model": infer(_body, path=b"/v2/models/cached/infer"),
    "no JSON": infer(b"rubbish"),
    "nothing": infer(b""),
    "elements alone": infer(bytes(16), b"inference-header-content-length: 0"),
    "JSON that ends beyond the body": infer(_body, b"inference-header-content-length: 1000"),
    "JSON of a negative length": infer(_body, b"inference-header-content-length: -1"),
    "JSON of no length": infer(_body, b"inference-header-content-length: x"),
    "JSON of a length of 5000 digits": infer(_body, b"inference-header-content-length: " + b"9" * 5000),
    "JSON that is all, and says so": infer(_body, b"inference-header-content-length: %d" % len(_body)),
}  # fmt: skip


@pytest.mark.parametrize("request_", SHORT.values(), ids=SHORT)
async def test_the_shortcut_answers_the_same_bytes(request_: bytes, engine: LocalEngine) -> None:
    """To the letter, those of the long way: heads, numbers, forms, errors; and whether the connection ends."""
    long, short = Front(engine, short=False), Front(engine)
    expected = [await long.ask(request_) for _ in range(3)]
    assert expected[1:] == expected[:1] * 2
    assert expected[0][0].startswith(b"HTTP/1.1 ")
    assert [await short.ask(request_) for _ in range(2)] == expected[:2]
    assert short.taken > 0
    assert long.taken == 0
    assert {served(engine, name).active for name in ("m", "kinds")} == {0}


@pytest.mark.parametrize("request_", LONG.values(), ids=LONG)
async def test_what_takes_the_long_way(request_: bytes, engine: LocalEngine) -> None:
    """Whoever asks for something that is not done on the shortcut gets it, however often others were short."""
    long, short = Front(engine, short=False), Front(engine)
    await short.learn(infer(json_body()))
    for _ in range(3):
        assert await short.ask(request_) == await long.ask(request_)
    assert short.taken == 0
    assert served(engine).active == 0


async def test_those_who_differ_in_their_numbers_alone_are_short(engine: LocalEngine) -> None:
    """The first of a kind is read, the second is known to fit, and from then on each gets its own answer."""
    front = Front(engine)
    ways = []
    for number in range(5):
        wire = front.open()
        before = front.taken
        wire.send(infer(json_body(number, 0, 0, 1)))
        await wire.quiet()
        ways.append(front.taken - before)
        assert [numbers(each) for each in answers(wire)] == [[2 * number, 0, 0, 2]]
    assert ways == [0, 0, 1, 1, 1]
    assert served(engine).model.statistics.json()["inference_count"] == 5
    assert len(Scripted.calls) == 5


@pytest.mark.parametrize("cut", [1, 60, -20, -1])
async def test_a_request_in_pieces(cut: int, engine: LocalEngine) -> None:
    """It takes the long way if its body came later than its head, and the answer is the same."""
    front, request = Front(engine), infer(json_body())
    await front.learn(request)
    expected, _ = await front.ask(request)
    front.shortcut.taken.clear()
    wire = front.open()
    wire.send(request[:cut], request[cut:])
    await wire.quiet()
    assert wire.written == expected
    assert front.taken == (cut < len(request) - len(json_body()) and cut > 0)


async def test_pipelined_requests(engine: LocalEngine) -> None:
    """Long and short, good and bad, in one piece: one answer to each, in their order, as on the long way."""
    short, long = Front(engine), Front(engine, short=False)
    await short.learn(infer(json_body()))
    mixed = [
        infer(json_body(1, 0, 0, 0)), infer(json_body(2, 0, 0, 0), b"accept-encoding: gzip"),
        infer(json_body(3, 0, 0, 0)), infer(b"rubbish"), infer(json_body(4, 0, 0, 0)), infer(json_body(5, 0, 0, 0)),
        infer(json_body(), method=b"GET", length=0).removesuffix(json_body()), infer(json_body(6, 0, 0, 0)),
    ]  # fmt: skip
    expected = await long.ask(b"".join(mixed))
    for pieces, taken in (([b"".join(mixed)], 1), (mixed, 5)):
        short.shortcut.taken.clear()
        wire = short.open()
        wire.send(*pieces)
        await wire.quiet()
        assert (wire.written, wire.closing) == expected
        assert short.taken == taken  # one behind which another has come is not alone in its piece
        assert [each.status for each in answers(wire)] == [200, 200, 200, 400, 200, 200, 405, 200]


async def test_a_client_that_does_not_read(engine: LocalEngine) -> None:
    """However many requests it pipelines, no answers are piled up for it: the shortcut does not take the next one."""
    front, request = Front(engine), infer(json_body())
    await front.learn(request)
    wire = front.open()
    wire.get_protocol().pause_writing()
    wire.send(*[request] * 50)
    await wire.quiet()
    assert wire.writes == []
    wire.get_protocol().resume_writing()
    await wire.quiet()
    assert [numbers(each) for each in answers(wire)] == [[2, 4, 6, 8]] * 50
    assert front.taken > 0


async def test_what_is_known_of_a_kind_is_known_once(engine: LocalEngine) -> None:
    """Whoever takes the long way all the same changes nothing: those of one turn are still queued at once."""
    front, request = Front(engine), infer(json_body())
    await front.learn(request)
    (known,) = served(engine).alike.values()
    await front.ask(infer(json_body(), b"accept-encoding: gzip"))
    (still,) = served(engine).alike.values()
    assert still is known


@pytest.mark.parametrize(
    "said",
    [{"deadline": 1e9}, {"priority": 1}, {"timeout": 1.0}, {"client": "a"}, {"alone": True}, {"boarding": print}],
)
async def test_what_says_more_is_no_example(said: dict[str, Any], engine: LocalEngine) -> None:
    """A request with a deadline, or for which anything else holds that does not hold for all, is not remembered."""
    like = object()
    inputs = {"x": np.zeros((1, 4), "<f4")}
    if "deadline" in said:
        said = {"deadline": time.monotonic() + 100}
    await engine.infer(InferRequest("m", "", inputs, like=like, **said))
    assert served(engine).alike == {}
    await engine.infer(InferRequest("m", "", inputs, like=like))
    assert list(served(engine).alike) == [like]


async def test_kinds_that_are_remembered_are_bounded(engine: LocalEngine) -> None:
    """As many as there are templates; then all are learned again."""
    inputs = {"x": np.zeros((1, 4), "<f4")}
    for _ in range(loading.MOST_ALIKE + 2):
        await engine.infer(InferRequest("m", "", inputs, like=object()))
        assert 0 < len(served(engine).alike) <= loading.MOST_ALIKE


async def test_long_heads_are_not_piled_up(engine: LocalEngine) -> None:
    """Of heads that all differ, and may be as long as a head may be, a bounded number is remembered, of short ones."""
    front, request = Front(engine), infer(json_body())
    await front.learn(request)
    for number in range(3):
        long = infer(json_body(), b"x: " + b"a" * 5000 + b"%d" % number)
        assert (await front.ask(long))[0].startswith(b"HTTP/1.1 200 ")
    assert front.taken == 3
    assert max(len(str(head.scope["headers"])) for head in front.shortcut._routes) < 5000
    for _ in range(shortcut.KEPT + 1):
        front.shortcut._look(
            Head({"headers": [], "method": "GET", "raw_path": b"/", "http_version": "1.1"}, 0, True, False, False, True)
        )
        assert len(front.shortcut._routes) <= shortcut.KEPT


# Who stands before the application.


async def _wrapped(scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


class Wrapper:
    """A middleware of the usual kind."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def configured(**changes: Any) -> Callable[..., Protocol]:
    """The protocol class, of a server that was told something more."""

    def make(config: Any, server_state: Any, app_state: Any) -> Protocol:
        vars(config).update(changes)
        return Protocol(config, server_state, app_state)

    return make


@pytest.mark.parametrize(
    ("application", "changes", "short"),
    [
        (app, {}, True),
        (ProxyHeadersMiddleware(cast(Any, app)), {}, True),
        (_wrapped, {}, False),
        (Wrapper(app), {}, False),
        (ProxyHeadersMiddleware(cast(Any, Wrapper(app))), {}, False),
        (ProxyHeadersMiddleware(cast(Any, ProxyHeadersMiddleware(cast(Any, app)))), {}, False),
        (app, {"root_path": "/api"}, False),
        (app, {"limit_concurrency": 100}, False),
    ],
    ids=["ours", "behind a proxy", "wrapped", "middleware", "both", "two proxies", "root_path", "limit_concurrency"],
)
async def test_who_stands_before_the_application(
    application: Any, changes: dict[str, Any], short: bool, engine: LocalEngine
) -> None:
    """Whoever wants to see requests sees each of them: there is a shortcut to our own application alone."""
    front, request = Front(engine), infer(json_body())
    await front.learn(request)
    await front.ask(request, application=application, made_by=configured(**changes))
    assert front.taken == short


async def test_an_access_log_sees_every_request(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each."""
    front, request = Front(engine), infer(json_body())
    await front.learn(request)
    lines: list[str] = []

    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log = logging.Logger("somebody listens")
    log.addHandler(Log())
    monkeypatch.setattr(protocol, "access_logger", log)
    await front.ask(request, request)
    assert front.taken == 0
    assert lines == ['127.0.0.1:50000 - "POST /v2/models/m/infer HTTP/1.1" 200'] * 2


@pytest.mark.parametrize("settings", [{"client_header": "x-client"}, {"forward_headers": "^x-"}], ids=str)
async def test_settings_that_look_at_every_head(settings: dict[str, Any], engine: LocalEngine) -> None:
    """Fair shares, and headers for models, are for all: nobody gets past them."""
    request = infer(json_body(), b"x-client: a")
    await Front(engine).learn(request)
    front = Front(engine, True, **settings)
    got, _ = await front.ask(request, request, request)
    assert got.count(b"HTTP/1.1 200 ") == 3
    assert front.taken == 0


async def test_a_body_over_the_bound(engine: LocalEngine) -> None:
    """It is refused as ever, though one like it was answered where the bound is higher."""
    request = infer(json_body())
    await Front(engine).learn(request)
    short, long = (Front(engine, short, max_body=len(json_body()) - 1) for short in (True, False))
    assert await short.ask(request) == await long.ask(request)
    assert (await short.ask(request))[0].startswith(b"HTTP/1.1 413 ")
    assert short.taken == 0


# When the engine does not answer.


async def test_the_engine_drains(engine: LocalEngine) -> None:
    """The answer says that the connection ends, and it does, as on the long way."""
    short, long, request = Front(engine), Front(engine, short=False), infer(json_body())
    await short.learn(request)
    engine.draining = True
    got, closed = await short.ask(request, request)
    assert (got, closed) == await long.ask(request, request)
    assert (got.count(b"HTTP/1.1 200 "), got.count(b"connection: close\r\n"), closed) == (1, 1, True)
    assert short.taken == 1


async def test_the_lane_is_dead(engine: LocalEngine) -> None:
    """503 to each, with the words of the long way."""
    short, long, request = Front(engine), Front(engine, short=False), infer(json_body())
    await short.learn(request)
    task = served(engine).lanes[0]._task
    assert task is not None
    task.cancel()
    await settle()
    got = await short.ask(request, request)
    assert got == await long.ask(request, request)
    assert got[0].count(b"HTTP/1.1 503 ") == 2
    assert short.taken == 2
    assert served(engine).active == 0


async def test_the_model_is_gone(local_engine: StartLocal) -> None:
    """Its requests are answered 404 from then on: what was known of them went with it."""
    engine = await local_engine({**INLINE, "model_control": "explicit", "load_models": "*"}, m=double)
    short, long, request = Front(engine), Front(engine, short=False), infer(json_body())
    await short.learn(request)
    await engine.unload("m")
    got = await short.ask(request)
    assert got == await long.ask(request)
    assert got[0].startswith(b"HTTP/1.1 404 ")
    assert short.taken == 0


# Waiting, in a thread that a test holds.


@pytest.fixture
async def held(local_engine: StartLocal) -> AsyncIterator[tuple[Front, Gate]]:
    """A front whose model waits for a gate, when that is closed; it knows the plain request."""
    gate = Gate()
    engine = await local_engine({**THREAD, "queue_rows": 32}, m=gate)
    front = Front(engine)
    request = infer(json_body())
    for _ in range(3):
        wire = front.open()
        wire.send(request)
        await until(lambda wire=wire: bool(wire.written))  # type: ignore[misc]
    assert front.taken == 1
    front.shortcut.taken.clear()
    Scripted.calls.clear()
    yield front, gate
    gate.open.set()


async def ask_each(front: Front, values: Iterable[float]) -> list[Wire]:
    """A connection for each, whose requests arrive in one turn of the event loop."""
    wires = [front.open() for _ in values]
    for wire, value in zip(wires, values, strict=True):
        wire.send(infer(json_body(value, 0, 0, 0)))
    await settle()
    return wires


async def hold(front: Front, gate: Gate, *values: float) -> list[Wire]:
    """Close the gate, and let these be the batch that waits there."""
    gate.open.clear()
    wires = await ask_each(front, values or (0,))
    await until(lambda: len(Scripted.calls) == 1)
    assert front.taken == len(wires)
    return wires


async def test_who_comes_in_one_turn_shares_a_batch(held: tuple[Front, Gate]) -> None:
    """Each with its own numbers in its answer."""
    front, _ = held
    wires = await ask_each(front, range(20))
    await until(lambda: all(wire.written for wire in wires))
    assert Scripted.calls == [("m", (20, 4))]
    assert [numbers(each)[0] for wire in wires for each in answers(wire)] == [2 * value for value in range(20)]
    assert front.taken == 20
    assert served(front.engine).active == 0


@pytest.mark.parametrize("how", ["vanishes", "ends"])
async def test_a_client_that_leaves_while_it_waits(held: tuple[Front, Gate], how: str) -> None:
    """It is taken out of the queue, and counted once; the others of its batch are answered."""
    front, gate = held
    (first,) = await hold(front, gate)
    wires = await ask_each(front, (1, 2, 3))
    assert served(front.engine).active == 4
    (wires[1].vanish if how == "vanishes" else wires[1].end)()
    await settle()
    assert left(front.engine) == {"queued": 1}
    assert served(front.engine).active == 3
    assert len(served(front.engine).batcher.pending) == 2
    gate.open.set()
    await until(lambda: all(wire.written for wire in (first, wires[0], wires[2])))
    assert [numbers(each) for wire in wires for each in answers(wire)] == [[2, 0, 0, 0], [6, 0, 0, 0]]
    assert Scripted.calls == [("m", (1, 4)), ("m", (2, 4))]
    assert served(front.engine).active == 0
    assert not wires[1].written


async def test_a_client_that_leaves_while_its_batch_runs(held: tuple[Front, Gate]) -> None:
    """Nothing is written to it, and its batch is nobody else's trouble."""
    front, gate = held
    wires = await hold(front, gate, 1, 2, 3)
    wires[0].vanish()
    await settle()
    assert left(front.engine) == {"running": 1}
    assert served(front.engine).active == 2
    gate.open.set()
    await until(lambda: bool(wires[1].written and wires[2].written))
    assert [numbers(each)[0] for wire in wires for each in answers(wire)] == [4, 6]
    assert not wires[0].written
    assert not wires[0].wasted
    assert served(front.engine).active == 0
    assert left(front.engine) == {"running": 1}


async def test_a_client_that_leaves_in_the_turn_in_which_it_came(held: tuple[Front, Gate]) -> None:
    """Before it was even queued: it is not run."""
    front, gate = held
    (first,) = await hold(front, gate)
    wires = [front.open() for _ in range(3)]
    for value, wire in enumerate(wires):
        wire.get_protocol().data_received(infer(json_body(value, 0, 0, 0)))
    wires[1].get_protocol().connection_lost(None)
    assert front.taken == 4
    assert left(front.engine) == {"queued": 1}
    gate.open.set()
    await until(lambda: bool(first.written and wires[0].written and wires[2].written))
    assert Scripted.calls == [("m", (1, 4)), ("m", (2, 4))]
    assert served(front.engine).active == 0


async def test_a_client_that_leaves_after_its_answer(held: tuple[Front, Gate]) -> None:
    """That is no leaving: nothing is counted."""
    front, _ = held
    (wire,) = await ask_each(front, [1])
    await until(lambda: bool(wire.written))
    wire.vanish()
    await settle()
    assert left(front.engine) == {}
    assert served(front.engine).active == 0


async def test_what_follows_one_that_waits(held: tuple[Front, Gate]) -> None:
    """It is not looked at before that is answered, however much it is; if its client leaves, never."""
    front, gate = held
    await hold(front, gate)
    stays, leaves = front.open(), front.open()
    for wire in (stays, leaves):
        second = infer(json_body(2, 0, 0, 0))
        wire.send(infer(json_body(1, 0, 0, 0)), second[:50], second[50:], b"(" * 99)
    await settle()
    assert front.taken == 3
    assert not stays.reading
    leaves.vanish()
    await settle()
    gate.open.set()
    await until(lambda: stays.closing)
    assert [each.status for each in answers(stays)] == [200, 200, 400]
    assert not leaves.written
    assert served(front.engine).active == 0


async def test_more_than_the_queue_has_room_for_in_one_turn(held: tuple[Front, Gate]) -> None:
    """429 for the rest, as on the long way, and one answer for each, no more and no less."""
    front, gate = held
    (first,) = await hold(front, gate)
    wires = await ask_each(front, range(40))
    assert front.taken == 41
    refused = [answers(wire) for wire in wires[32:]]
    assert [[each.status for each in got] for got in refused] == [[429]] * 8
    assert served(front.engine).active == 33
    assert served(front.engine).batcher.journal.refused == {"QueueFull": 8}
    (late,) = await ask_each(front, [0])  # while it is full they take the long way
    assert front.taken == 41
    assert not any(wire.written for wire in wires[:32])
    ours, theirs = refused[0][0], answers(late)[0]
    assert theirs.body == b'{"error":"the queue is full: 32 of 32 rows wait"}'
    assert ours.body == b'{"error":"the queue is full: 32 of 32 rows wait, no room for 1 more"}'
    assert [name for name, _ in ours.headers] == [name for name, _ in theirs.headers]
    assert int(ours.header(b"retry-after") or 0) >= 1
    gate.open.set()
    await until(lambda: all(wire.written for wire in [first, *wires]))
    assert [numbers(each)[0] for wire in wires[:32] for each in answers(wire)] == [2 * value for value in range(32)]
    assert served(front.engine).active == 0


async def test_the_server_stops_while_one_waits(held: tuple[Front, Gate]) -> None:
    """It is still answered, its connection ends then; and those who wait for nothing are closed at once."""
    front, gate = held
    (waits,) = await hold(front, gate, 1)
    idle = front.open()
    for wire in (waits, idle):
        cast(Protocol, wire.get_protocol()).shutdown()
    await settle()
    assert (waits.closing, idle.closing) == (False, True)
    gate.open.set()
    await until(lambda: waits.closing)
    (got,) = answers(waits)
    assert numbers(got)[0] == 2
    assert got.header(b"connection") == b"close"


async def test_the_engine_stops_while_some_wait(held: tuple[Front, Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is in a batch that never ends, and who waits behind it, is told so, once."""
    front, gate = held
    wires = await hold(front, gate, 1)
    wires += await ask_each(front, (2, 3))
    monkeypatch.setattr(local, "STOP_SECONDS", 0.01)
    await front.engine.stop()
    got = [answers(wire) for wire in wires]
    assert [[each.status for each in each_one] for each_one in got] == [[503]] * 3
    assert {each.header(b"connection") for (each,) in got} == {b"close"}
    assert served(front.engine).active == 0


async def test_a_bad_one_in_a_batch(local_engine: StartLocal, tmp_path: Path) -> None:
    """It alone gets the error; whoever shared its batch is answered."""
    add_model(tmp_path, "m", KINDS)
    engine = await local_engine(INLINE, m=kinds)
    front = Front(engine)

    def asking(value: float) -> bytes:
        return infer(json_body(value, 0, 0, 0, more=outputs("y")))

    await front.learn(asking(1))
    values = (1.0, BAD, 2.0, 3.0, 4.0, WRONG)
    wires = [front.open() for _ in values]
    for wire, value in zip(wires, values, strict=True):
        wire.send(asking(value))
    await wires[0].quiet()
    got = [answers(wire) for wire in wires]
    assert [[each.status for each in each_one] for each_one in got] == [[200], [500], [200], [200], [200], [400]]
    assert [numbers(each)[0] for (each,) in got if each.status == 200] == [2, 4, 6, 8]
    assert Scripted.calls[0] == ("m", (6, 4))
    assert served(engine).active == 0
    assert front.taken == 6


async def test_an_answer_that_cannot_be_written(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a 500 of its own, in the log with its traceback; nobody else in the batch notices, nor does the lane."""
    front = Front(engine)
    await front.learn(infer(json_body()))

    def encode(model: str, version: str, outputs: Mapping[str, Array]) -> bytes | None:
        if outputs["y"][0, 0] == 4:
            raise KeyError("a fault of ours")
        return encode_numbers(model, version, outputs)

    monkeypatch.setattr(shortcut, "encode_numbers", encode)
    for _ in range(2):
        wires = await ask_each(front, (1, 2, 3))
        await wires[0].quiet()
        got = [answers(wire) for wire in wires]
        assert [[each.status for each in each_one] for each_one in got] == [[200], [500], [200]]
        assert got[1][0].body == b'{"error":"internal error; the server\'s log says more"}'
    assert front.taken == 6
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError] * 2
    assert served(engine).active == 0
    assert engine.live()


# Models that change.


def times(factor: float) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    return lambda inputs: {"y": inputs["x"] * np.float32(factor)}


async def test_a_reload_under_load(local_engine: StartLocal, scripted: type[Scripted], tmp_path: Path) -> None:
    """Each request is answered once, by one copy or the other; the first ones of a copy take the long way to it."""
    engine = await local_engine({**INLINE, "model_control": "explicit", "load_models": "*"}, m=times(2))
    front = Front(engine)
    await front.learn(infer(json_body()))
    before, stop = served(engine), False
    wires = [front.open() for _ in range(8)]
    sent = [0] * len(wires)

    async def go_on(index: int) -> None:
        wire = wires[index]
        while not stop:
            sent[index] += 1
            wire.send(infer(json_body(1, 0, 0, 0)))
            await until(lambda: len(wire.writes) >= sent[index])

    running = [asyncio.create_task(go_on(index)) for index in range(len(wires))]
    for factor in (3, 4):
        scripted.behaviours["m"] = times(factor)
        add_model(tmp_path, "m", CONFIG + f"\n# {factor}")
        await engine.load("m")
        at = front.taken
        await until(lambda at=at: front.taken > at + 50)  # type: ignore[misc]
    stop = True
    await asyncio.gather(*running)
    for wire, count in zip(wires, sent, strict=True):
        got = [numbers(each)[0] for each in answers(wire)]
        assert len(got) == count
        assert got == sorted(got)
        assert set(got) <= {2, 3, 4}
        assert got[-1] == 4
    await until(lambda: not engine._retiring)
    assert before.active == served(engine).active == 0


async def test_a_copy_goes_when_the_last_who_waits_for_it_left(
    local_engine: StartLocal, scripted: type[Scripted], tmp_path: Path
) -> None:
    """It stays as long as somebody waits for its answer, and no longer: those who leave are counted out as well."""
    patient = CONFIG.replace("dynamic_batching { }", "dynamic_batching { max_queue_delay_microseconds: 600000000 }")
    add_model(tmp_path, "m", patient)
    engine = await local_engine({**INLINE, "model_control": "explicit", "load_models": "*"}, m=double)
    front, request = Front(engine), infer(json_body())
    full = infer(b'{"inputs":[{"name":"x","shape":[32,4],"datatype":"FP32","data":[%b]}]}' % b",".join([b"1"] * 128))
    await front.ask(full, full)  # a whole batch does not wait
    first = front.open()
    first.send(request)
    await settle()
    first.vanish()
    second = front.open()
    second.send(request)
    await settle()
    second.vanish()
    await settle()
    assert front.taken == 0
    waits, short = front.open(), served(engine)
    waits.send(request)
    await settle()
    assert front.taken == 1
    add_model(tmp_path, "m", patient + "\n# changed")
    loading = asyncio.create_task(engine.load("m"))
    await until(lambda: served(engine) is not short)
    await settle()
    assert short.active == 1
    assert engine._retiring or not loading.done()
    waits.vanish()
    await loading
    await until(lambda: not engine._retiring)
    assert short.active == 0


# What is let go of.


@pytest.mark.parametrize("how", ["answered", "failed", "refused", "left", "left in the queue", "closed"])
async def test_what_was_asked_is_let_go_of_without_the_collector(
    how: str, local_engine: StartLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever became of it: no cycle holds a request, its tensors, or its connection's answer."""
    gate = Gate()

    def behave(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if (inputs["x"][:, 0] == BAD).any():
            raise InvalidInput("it is wrong")  # which no log keeps
        return gate(inputs)

    engine = await local_engine({**THREAD, "queue_rows": 32}, m=behave)
    front = Front(engine)
    for _ in range(3):
        (wire,) = await ask_each(front, [1])
        await until(lambda wire=wire: bool(wire.written))  # type: ignore[misc]
    front.shortcut.taken.clear()
    tensors: list[weakref.ref[Any]] = []
    ask = LocalEngine.ask

    def watched(
        self: LocalEngine, model: str, version: str, like: object, inputs: dict[str, Array], caller: Any
    ) -> Any:
        tensors.extend(map(weakref.ref, inputs.values()))
        return ask(self, model, version, like, inputs, caller)

    monkeypatch.setattr(LocalEngine, "ask", watched)
    gc.collect()
    gc.disable()
    try:
        if how in ("refused", "left", "left in the queue", "closed"):
            gate.open.clear()
            Scripted.calls.clear()
            wires = await ask_each(front, [1, 2])
            await until(lambda: bool(Scripted.calls))
            if how != "left":
                wires += await ask_each(front, [2] * (40 if how == "refused" else 3))
        else:
            wires = await ask_each(front, [1, BAD] if how == "failed" else [1, 2])
        if how.startswith("left"):
            for wire in wires:
                wire.vanish()
            await settle()
        if how == "closed":
            served(engine).lanes[0].lose("it is over")
        gate.open.set()
        await until(lambda: all(wire.written or wire.lost for wire in wires))
        await until(lambda: served(engine).active == 0 and not served(engine).batcher._flights)
        (last,) = await ask_each(front, [1])  # the lane's thread lets go of a job when it has the next one
        await until(lambda: bool(last.written))
        await settle()
        wires.clear()
        last.get_protocol().connection_lost(None)
        await settle()
        assert len(front.shortcut.taken) > 1
        assert [query for query in front.shortcut.taken[:-1] if query() is not None] == []
        assert [tensor for tensor in tensors[:-1] if tensor() is not None] == []
    finally:
        gc.enable()
