"""Environment -> one frozen Settings. Every default of the service is here and nowhere else.

Each field is the environment variable MILLRACE_<FIELD> and, for `python -m asgi_app`, the option --<field>. A variable
that begins with MILLRACE_ and is no field is an error that names the nearest field: a typo is never a default. One of
them has a plain name as well, see ALIASES.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

PREFIX = "MILLRACE_"

# Plain variable -> the one of ours that it stands for.
ALIASES = {"ENGINE_SOCKET": "MILLRACE_ENGINE_SOCKET"}

# Bytes of the path of a unix socket that is bound beside its place, as `path.new`: the kernel has room for 107.
MOST_PATH = 103

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


def _setting(default: Any, help: str, low: float = -math.inf, high: float = math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True, slots=True)
class Settings:
    """How this process serves. Sizes are in bytes, times in seconds unless the name says otherwise."""

    models: str = _setting(
        "models", "the model repository: a folder with one folder for each model; several with : between"
    )
    model_control: str = _setting(
        "none", "none: serve what is there; explicit: load and unload by request; poll: follow the disk"
    )
    load_models: str = _setting("", "with explicit, models to load at start, with commas between; * for all")
    poll_seconds: float = _setting(15, "with poll, seconds between two looks at the repository", 0.1)
    exit_on_error: bool = _setting(True, "end the start if a model cannot be served; else serve the others")
    auto_complete: bool = _setting(True, "fill what a config leaves out from the model's file")
    shared_memory: bool = _setting(False, "let clients on this machine pass tensors in shared memory")
    metrics_port: int = _setting(0, "port for /metrics besides the main one, as Triton's 8002; 0 for none", 0, 65535)
    metrics_dir: str = _setting(
        "",
        "folder in which the processes of one service keep their counts, so that each can tell those of all; "
        "empty: each tells its own",
    )
    forward_headers: str = _setting("", "regular expression: request headers that models are given as parameters")
    engine_socket: str = _setting(
        "", "path of the unix socket of a separate engine (python -m engine); empty: the engine is in this process"
    )
    engine_mode: str = _setting("600", "octal mode of that socket: who may connect to the engine")
    engine_wait: float = _setting(60, "seconds that a request waits for a separate engine that is gone", 0)
    arena_bytes: int = _setting(
        256 << 20, "bytes of memory that a process and a separate engine share, in each direction", 1 << 20
    )
    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 or :: for every one")
    port: int = _setting(8000, "TCP port to listen on; 0 takes a free one", 0, 65535)
    uds: str = _setting("", "path of a unix socket to listen on instead of host and port")
    fd: int = _setting(-1, "an inherited listening socket, TCP or unix, to accept on instead", -1)
    backlog: int = _setting(4096, "connections the kernel may hold until they are accepted", 1)
    max_connections: int = _setting(8192, "open connections; one more is answered 503 and closed", 1)
    keep_alive: int = _setting(75, "seconds an idle connection stays open; longer than the proxy's in front", 1)
    graceful_timeout: int = _setting(30, "seconds that requests under way get to finish when the process stops", 0)
    drain_delay: float = _setting(0, "seconds of serving on, not ready, before a stopping process stops accepting", 0)
    max_body: int = _setting(64 << 20, "bytes of a request's body", 1)
    max_head: int = _setting(64 << 10, "bytes of a request's line and headers", 1)
    head_timeout: float = _setting(
        30, "seconds a client has to send them, from connecting or from their first byte", 0.001
    )
    body_timeout: float = _setting(30, "seconds a client has to send its body", 0.001)
    max_picture: int = _setting(16 << 20, "bytes of an uploaded picture", 1)
    max_pixels: int = _setting(40_000_000, "pixels of an uploaded picture", 1)
    classifier: str = _setting("digits", "the model behind POST /classify; empty for none")
    queue_rows: int = _setting(1024, "rows that may wait for one model", 1)
    queue_bytes: int = _setting(1 << 30, "bytes that may wait for one model", 1)
    client_header: str = _setting("", "header that names the client for fair shares; empty: no fair shares")
    cache_bytes: int = _setting(
        64 << 20,
        "bytes of answers kept for models whose config says response_cache { enable: true }; 0 keeps none",
        0,
    )
    cache_seconds: float = _setting(60, "seconds that an answer is kept", 0.001)
    inline_ms: float = _setting(2, "a model whose largest batch is measured below this runs on the event loop", 0)
    stuck_after: float = _setting(60, "seconds in one batch after which the lane no longer counts as alive", 0.001)
    access_log: bool = _setting(False, "log a line for each request")
    log_level: str = _setting("info", f"one of {', '.join(LOG_LEVELS)}")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            if not isinstance(value, str) and not low <= value <= high:
                bound = f"at least {low:.12g}" if value < low else f"at most {high:.12g}"
                raise ConfigError(f"{PREFIX}{field.name.upper()}: must be {bound}, got {value}")
        for name in ("models", "host"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{PREFIX}{name.upper()}: must not be empty")
        if self.model_control not in ("none", "poll", "explicit"):
            raise ConfigError(f"{PREFIX}MODEL_CONTROL: must be none, poll or explicit, got {self.model_control!r}")
        try:
            re.compile(self.forward_headers)
        except re.error as error:
            raise ConfigError(f"{PREFIX}FORWARD_HEADERS: must be a regular expression: {error}") from None
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"{PREFIX}LOG_LEVEL: must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]*", self.client_header):
            raise ConfigError(f"{PREFIX}CLIENT_HEADER: must be the name of a header, got {self.client_header!r}")
        if not re.fullmatch("0?6[0246]{2}", self.engine_mode):
            raise ConfigError(
                f"{PREFIX}ENGINE_MODE: must be an octal mode, 600 to 666, that lets nobody execute, "
                f"got {self.engine_mode!r}"
            )
        if len(self.engine_socket.encode(errors="surrogateescape")) > MOST_PATH or "\0" in self.engine_socket:
            raise ConfigError(
                f"{PREFIX}ENGINE_SOCKET: must be a path of at most {MOST_PATH} bytes, got {self.engine_socket!r}"
            )
        if self.uds and self.fd >= 0:
            raise ConfigError(f"{PREFIX}UDS and {PREFIX}FD: give one of them, got {self.uds!r} and {self.fd}")


FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Settings)}
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read the variables of ours from `environment`, and their aliases.

    Raises:
        ConfigError: a variable of ours is unknown, or its value does not fit, or its alias says something else; the
            text names the variable.
    """
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if variable.startswith(PREFIX):
            name = variable.removeprefix(PREFIX).lower()
            if name not in FIELDS:
                raise ConfigError(f"{variable}: no such setting{nearest(name, lambda n: PREFIX + n.upper())}")
            values[name] = _parse(variable, FIELDS[name].type, text)
    for alias, variable in ALIASES.items():
        name = variable.removeprefix(PREFIX).lower()
        if text := environment.get(alias, ""):
            value = values.setdefault(name, _parse(alias, FIELDS[name].type, text))
            if text != str(value):
                raise ConfigError(
                    f"{variable} and {alias}: mean the same, give one of them, got {value!r} and {text!r}"
                )
    return Settings(**values)


def nearest(name: str, spell: Any) -> str:
    """The end of an error's sentence that names the field most like `name`, spelled as its reader would write it."""
    close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.6)
    return f"; did you mean {spell(close[0])}?" if close else "; `python -m asgi_app --help` lists them all"


def _parse(variable: str, kind: Any, text: str) -> Any:
    try:
        if kind is bool:
            return _BOOLEANS[text.strip().lower()]
        value = kind(text)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{variable}: must be {expected}, got {text!r}") from None
    if kind is float and math.isnan(value):  # it would pass every comparison with a bound
        raise ConfigError(f"{variable}: must be a number, got {text!r}")
    return value
