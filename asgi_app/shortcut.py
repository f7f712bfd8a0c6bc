"""The shortcut of an infer request that looks like one before it: from its bytes into the queue, and from there into
its answer, without a coroutine, a task or a future.

Such a request has a head whose headers ask for nothing special, which is looked at once for each head; a body with a
Template; and a model that knows what the template's tensors come to, because it answered one like it. Everything else,
and the first of each kind, takes the long way through `app`, which answers the same bytes: tests hold that. It costs
a third of the long way's time (docs/performance.md).

Only `Protocol` takes it, only in front of our own application, with nothing in between that would want to see requests.
"""

from dataclasses import dataclass
from functools import lru_cache

from engine.errors import EngineError
from engine.settings import Settings
from engine.types import Array, Asked, Engine, InferRequest, InferResponse

from . import templates, v2
from .compression import preferred
from .exchange import WORTH_JOINING, Application, Connection, Exchange
from .failures import failure
from .heads import Head, answer_head
from .messages import DEADLINE_HEADERS, JSON, Response, head_of
from .routes import match
from .templates import Template
from .v2_codec import Decoded, encode_numbers, encode_response

# Headers with which `infer` does something that is not done here.
SPECIAL = frozenset({*DEADLINE_HEADERS, b"content-encoding"})
LENGTH = b"inference-header-content-length"
MOST_DIGITS = 18

# Heads of which is kept what they come to.
KEPT = 1024


@dataclass(slots=True)
class Route:
    """What a head comes to.

    Attributes:
        end: where the body's JSON ends; -1 if it does not say, and is JSON alone.
        latest: the template of the latest such body.
    """

    model: str
    version: str
    end: int
    latest: Template | None = None


class Shortcut:
    """What takes requests from the connections of a process.

    Attributes:
        application: in whose place it answers.
    """

    def __init__(self, engine: Engine, settings: Settings, application: Application) -> None:
        self.application = application
        self.engine = engine
        self._settings = settings
        self._routes: dict[Head, Route | None] = {}

    def take(self, protocol: Connection, head: Head, body: bytes) -> Exchange | None:
        """What stands for the request on its connection; None if it has to take the long way."""
        try:
            route = self._routes[head]
        except KeyError:
            route = self._look(head)
        if route is None:
            return None
        template, end = route.latest, route.end
        inputs = templates.read_like(template, body) if template is not None else None
        if inputs is None:
            found = templates.read_json(body) if end < 0 else templates.read_binary(body, end)
            if found is None:
                return None
            template, inputs = found
            if end < 0:
                route.latest = template
        assert template is not None
        query = Query(protocol, head, self.engine, route.model, template)
        asked = self.engine.ask(route.model, route.version, template, inputs, query)
        if asked is None:
            return None
        query.asked = asked
        return query

    def _look(self, head: Head) -> Route | None:
        route = self._route(head)
        if head.kept:  # else it does not come again, and may be large
            if len(self._routes) >= KEPT:
                self._routes.clear()
            self._routes[head] = route
        return route

    def _route(self, head: Head) -> Route | None:
        scope, headers, settings = head.scope, dict(head.scope["headers"]), self._settings
        if settings.client_header or settings.forward_headers or head.length > settings.max_body:
            return None
        if head.expects or not head.keep_alive or scope["http_version"] != "1.1":
            return None
        if not SPECIAL.isdisjoint(headers) or preferred(headers.get(b"accept-encoding", b"")):
            return None
        try:
            handler, path = match(scope["method"], scope["raw_path"])
        except EngineError:
            return None
        end = headers.get(LENGTH, b"")
        if handler is not v2.infer or (end and not _is_length(end, head.length)):
            return None
        return Route(path["model"], path.get("version", ""), int(end) if end else -1)


def _is_length(text: bytes, most: int) -> bool:
    return text.isdigit() and len(text) <= MOST_DIGITS and 0 < int(text) <= most


class Query(Exchange):
    """A request that took the shortcut: to its connection an exchange, to the queue whoever waits for the answer.

    Attributes:
        asked: who has it.
    """

    asked: Asked
    complete = True

    def __init__(self, protocol: Connection, head: Head, engine: Engine, model: str, template: Template) -> None:
        self.scope = head.scope
        self.keep_alive = head.keep_alive
        self._protocol = protocol
        self._engine = engine
        self._model = model
        self._template = template

    def done(self) -> bool:
        return self.left or self.answered

    def set_result(self, outputs: dict[str, Array]) -> None:
        self.asked.answered()
        template, version = self._template, self.asked.version
        try:
            if template.outputs is None and not template.binary_default:
                body = encode_numbers(self._model, version, outputs)
                if body is not None:
                    self._answer_with_json(body)
                    return
            decoded = Decoded(InferRequest(self._model, version, {}), template.binary, template.binary_default)
            body, length = encode_response(InferResponse(self._model, version, outputs), decoded)
            self._answer_with(v2.answer(body, length))
        except Exception as error:
            self._fail(error)

    def set_exception(self, error: BaseException) -> None:
        self.asked.answered()
        self._fail(error)

    def leave(self, cancel: bool) -> None:
        if not self.done():
            self.left = True
            self.asked.withdraw(self)

    def _fail(self, error: BaseException) -> None:
        self._answer_with(failure(self.scope, error))

    def _answer_with_json(self, body: bytes) -> None:
        """What `_answer_with` does for nearly all."""
        if not self.keep_alive or self._engine.draining or len(body) > WORTH_JOINING:
            self._answer_with(Response(200, body, JSON))
            return
        protocol = self._protocol
        protocol.transport.write(b"%b%b\r\n%b" % (_json_head(len(body)), protocol.default_lines(), body))
        self.begun = self.answered = True
        protocol.answered(self)

    def _answer_with(self, response: Response) -> None:
        self._start(response.status, head_of(response, self._engine.draining))
        self._send(response.body, False)


@lru_cache(maxsize=KEPT)
def _json_head(length: int) -> bytes:
    return answer_head(200, head_of(Response(200, bytes(length), JSON), False)).text
