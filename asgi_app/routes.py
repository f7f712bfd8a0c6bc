"""ROUTES: one row for each endpoint. match(): which row a path and a method mean."""

from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from engine.errors import EngineError, InvalidInput, MethodNotAllowed, NotFound

from . import control, diagnostics, generate, images, v2
from .generate import Stream
from .messages import Request, Response

# Longer paths are not looked for: what was found is remembered, and must not be the memory of somebody's megabytes.
MAX_PATH = 1024
MAX_VERSION = 2**63 - 1

Handler = Callable[[Request], Awaitable[Response | Stream]]


class Route(NamedTuple):
    """One endpoint.

    Attributes:
        path: literal segments, and variable ones as {name}.
        answers: whether it does more than refuse, by the models that are served and the settings.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answers: Callable[[Request], bool] = lambda _: True


async def index(request: Request) -> Response:
    """The endpoints that answer here, one per line."""
    lines = [f"{route.method:5} {route.path:55} {route.summary}\n" for route in ROUTES if route.answers(request)]
    return Response(200, "".join(lines).encode(), b"text/plain; charset=utf-8")


def _refuses(_: Request) -> bool:
    """There for its error's text alone."""
    return False


def _explicit(request: Request) -> bool:
    return request.settings.model_control == "explicit"


def _shares(request: Request) -> bool:
    return request.settings.shared_memory


def _classifies(request: Request) -> bool:
    try:
        images.classifier(request.engine, request.settings)
    except EngineError:
        return False
    return True


ROUTES = (
    Route("GET", "/", index, "This list"),
    Route("GET", "/v2/health/live", v2.live, "Whether the process and its inference lane are alive"),
    Route("GET", "/v2/health/ready", v2.ready, "Whether every model is warm and requests are welcome"),
    Route("GET", "/v2", v2.server, "Name, version and protocol extensions of the server"),
    Route("GET", "/v2/models/stats", control.statistics, "What every model has done; no model can be called stats"),
    Route("GET", "/v2/models/{model}", v2.model, "Inputs, outputs and versions of a model"),
    Route("GET", "/v2/models/{model}/versions/{version}", v2.model, "The same, of one version"),
    Route("GET", "/v2/models/{model}/ready", v2.model_ready, "Whether a model answers"),
    Route("GET", "/v2/models/{model}/versions/{version}/ready", v2.model_ready, "The same, of one version"),
    Route("GET", "/v2/models/{model}/config", control.config, "The config of a model, with all that it left out"),
    Route("GET", "/v2/models/{model}/versions/{version}/config", control.config, "The same, of one version"),
    Route("GET", "/v2/models/{model}/stats", control.statistics, "What a model has done, and how long it took"),
    Route("GET", "/v2/models/{model}/versions/{version}/stats", control.statistics, "The same, of one version"),
    Route("GET", "/v2/models/{model}/batching", v2.batching, "What the model's queue does, and why"),
    Route("GET", "/v2/models/{model}/versions/{version}/batching", v2.batching, "The same, of one version"),
    Route("POST", "/v2/models/{model}/infer", v2.infer, "Run a model on tensors"),
    Route("POST", "/v2/models/{model}/versions/{version}/infer", v2.infer, "The same, on one version"),
    Route("POST", "/v2/models/{model}/generate", generate.generate, "Run a model on free-form JSON, for one response"),
    Route("POST", "/v2/models/{model}/versions/{version}/generate", generate.generate, "The same, on one version"),
    Route("POST", "/v2/models/{model}/generate_stream", generate.generate_stream, "The same, for any number of them"),
    Route("POST", "/v2/models/{model}/versions/{version}/generate_stream", generate.generate_stream, "On one version"),
    Route("POST", "/v2/repository/index", control.index, "Every model of the repositories, and its state"),
    Route("POST", "/v2/repository/{repository}/index", control.index, "The same"),
    Route("POST", "/v2/repository/models/{model}/load", control.load, "Load a model, or load it again", _explicit),
    Route("POST", "/v2/repository/models/{model}/unload", control.unload, "Let go of a model", _explicit),
    Route("POST", "/v2/repository/{repository}/models/{model}/load", control.in_repository, "Not served", _refuses),
    Route("POST", "/v2/repository/{repository}/models/{model}/unload", control.in_repository, "Not served", _refuses),
    Route("GET", "/v2/systemsharedmemory/status", control.region_status, "The shared memory of clients"),
    Route("GET", "/v2/systemsharedmemory/region/{region}/status", control.region_status, "The same, of one region"),
    Route("POST", "/v2/systemsharedmemory/register", control.register_region, "Says that it needs a name", _refuses),
    Route("POST", "/v2/systemsharedmemory/region/{region}/register", control.register_region, "Map some", _shares),
    Route("POST", "/v2/systemsharedmemory/unregister", control.unregister_region, "Forget all of it", _shares),
    Route("POST", "/v2/systemsharedmemory/region/{region}/unregister", control.unregister_region, "Forget it", _shares),
    Route("GET", "/v2/cudasharedmemory/status", control.cuda_region_status, "None: memory of GPUs is not shared"),
    Route("GET", "/v2/cudasharedmemory/region/{region}/status", control.cuda_region_status, "Not found", _refuses),
    Route("POST", "/v2/cudasharedmemory/register", control.register_cuda_region, "Not served", _refuses),
    Route("POST", "/v2/cudasharedmemory/region/{region}/register", control.register_cuda_region, "The same", _refuses),
    Route("POST", "/v2/cudasharedmemory/unregister", control.unregister_cuda_region, "Nothing to forget"),
    Route("POST", "/v2/cudasharedmemory/region/{region}/unregister", control.unregister_cuda_region, "The same"),
    Route("GET", "/v2/trace/setting", diagnostics.trace, "What is traced"),
    Route("POST", "/v2/trace/setting", diagnostics.update_trace, "Change that"),
    Route("GET", "/v2/models/{model}/trace/setting", diagnostics.trace, "What is traced of one model"),
    Route("POST", "/v2/models/{model}/trace/setting", diagnostics.update_trace, "Change that"),
    Route("GET", "/v2/logging", diagnostics.log, "What is logged"),
    Route("POST", "/v2/logging", diagnostics.update_log, "Change that"),
    Route("GET", "/metrics", control.metrics, "All that is counted, for Prometheus"),
    Route("POST", "/classify", images.classify, "Which class a picture shows", _classifies),
    Route("GET", "/livez", v2.live, "Alias of /v2/health/live"),
    Route("GET", "/health", v2.ready, "Alias of /v2/health/ready"),
    Route("GET", "/healthz", v2.ready, "Alias of /v2/health/ready"),
    Route("GET", "/readyz", v2.ready, "Alias of /v2/health/ready"),
    Route("GET", "/ping", v2.ready, "Alias of /v2/health/ready"),
)


@lru_cache(maxsize=1024)
def match(method: str, raw_path: bytes) -> tuple[Handler, dict[str, str]]:
    """The handler of a request, and the variable parts of its path.

    `raw_path` is percent-encoded: an encoded slash is part of a name, not a separator. Of several rows that fit, the
    first is meant.

    Raises:
        NotFound, MethodNotAllowed.
        InvalidInput: a name in the path is not UTF-8, or a version is too large to be one.
    """
    if raw_path[:1] != b"/" or len(raw_path) > MAX_PATH:
        raise NotFound("Not Found")
    methods, variables = _find(raw_path)
    handler = methods.get("GET" if method == "HEAD" else method)
    if handler is None:
        raise MethodNotAllowed("Method Not Allowed", allow=_allow(methods))
    return handler, variables


def _allow(methods: dict[str, Handler]) -> str:
    return ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])


_TREE: dict[tuple[str | None, ...], tuple[dict[str, Handler], tuple[str, ...]]] = {}
for _route in ROUTES:
    _segments = _route.path[1:].split("/")
    _key = tuple(None if segment[:1] == "{" else segment for segment in _segments)
    _names = tuple(segment[1:-1] for segment in _segments if segment[:1] == "{")
    _TREE.setdefault(_key, ({}, _names))[0][_route.method] = _route.handler


def _find(raw_path: bytes) -> tuple[dict[str, Handler], dict[str, str]]:
    segments = raw_path[1:].split(b"/")
    for key, (methods, names) in _TREE.items():
        if len(key) == len(segments) and all(
            segment if literal is None else literal.encode() == segment
            for literal, segment in zip(key, segments, strict=True)
        ):
            parts = [segment for literal, segment in zip(key, segments, strict=True) if literal is None]
            return methods, {name: _decode(name, part) for name, part in zip(names, parts, strict=True)}
    raise NotFound("Not Found")


def _decode(name: str, part: bytes) -> str:
    try:
        text = unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise InvalidInput(f"the {name}'s name in the path is not UTF-8") from None
    return _version(text) if name == "version" else text


def _version(text: str) -> str:
    """A version's number as the engine writes it, without the zeros in front."""
    if not (text.isascii() and text.isdecimal()):
        raise NotFound("Not Found")
    if int(text) > MAX_VERSION:
        raise InvalidInput(
            f"failed to get model version from specified version string '{text}' (details: stol), version should be "
            "an integral value > 0"
        )
    return str(int(text))
