"""python -m asgi_app: read the settings, take or make the listening socket, run uvicorn on it.

Exit codes: 0 after SIGTERM or SIGINT, 4 if a model did not return then; 2 for a wrong option or setting, 3 if the
service cannot start.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from engine.connect import examine
from engine.errors import ConfigError
from engine.settings import FIELDS, PREFIX, Settings, nearest, read_settings

from .sockets import close_door, describe, listen

# A connection that came just before the door closed, or whose next request is already on its way, gets this many
# seconds to be read; its answer then says `connection: close`. Without it such a request would be reset.
LINGER = 0.5

STUCK = 4  # exit code

logger = logging.getLogger("millrace")


class Server(uvicorn.Server):
    """uvicorn's server, but it drains in three steps, and exits with 0 when it was asked to stop.

    A stop turns readiness false; `drain_delay` seconds later no new connection is let in; `LINGER` seconds later
    uvicorn closes the listener and idle connections, and waits for the busy ones.
    """

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not handed on: the base class would raise the signal again at the end, and the process would die of it.
        lifespan = getattr(self, "lifespan", None)  # unset while uvicorn still imports the application
        engine = lifespan.state.get("engine") if lifespan is not None else None
        if engine is None or engine.draining:  # not started yet, or told twice: now
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
            return
        engine.draining = True
        asyncio.get_running_loop().call_soon_threadsafe(self._stop_later)

    def _stop_later(self) -> None:
        asyncio.get_running_loop().call_later(self._settings.drain_delay, setattr, self, "should_exit", True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            logger.info("ready; ask it: %s", describe(sock))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._settings.fd >= 0:  # whoever else holds the socket accepts what comes now
            for server in self.servers:
                server.close()
        else:
            for sock in sockets or ():
                close_door(sock)
        if not self.force_exit:
            await asyncio.sleep(LINGER)
        await super().shutdown(sockets)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], bool]:
    """The settings given as options, as the environment variables that they stand for, and whether to print them.

    Raises:
        ConfigError: an option is unknown; the text names the nearest one.
    """
    parser = _Parser(
        prog="python -m asgi_app",
        description="Serve a model repository over HTTP. Every option is also the environment variable "
        f"{PREFIX}<OPTION>; the option wins. `python -m asgi_app doctor`, with the same options, says what would not "
        "work, and why.",
        allow_abbrev=False,
    )
    for name, field in FIELDS.items():
        note = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        kind: Any = field.type
        flag = {"nargs": "?", "const": "true"} if kind is bool else {"metavar": kind.__name__.upper()}
        parser.add_argument(_option(name), dest=name, help=note, **flag)
    parser.add_argument(
        "--print-config", action="store_true", help="print each setting, its value and where it came from"
    )
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        if unknown[0][:1] != "-":
            raise ConfigError(f"{unknown[0]}: everything is said by options; `python -m asgi_app --help` lists them")
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        if name in TRITONS:
            raise ConfigError(f"{unknown[0]}: no such option; here it is {TRITONS[name]}")
        raise ConfigError(f"{unknown[0]}: no such option{nearest(name, _option)}")
    given = {PREFIX + name.upper(): value for name in FIELDS if (value := getattr(parsed, name)) is not None}
    return given, parsed.print_config


# Triton's options, as people type them, and ours for them.
TRITONS = {
    "model_repository": "--models", "model_store": "--models", "model_control_mode": "--model-control",
    "load_model": "--load-models", "repository_poll_secs": "--poll-seconds", "http_port": "--port",
    "http_address": "--host", "strict_model_config": "--auto-complete", "log_verbose": "--log-level debug",
    "disable_auto_complete_config": "--auto-complete=false", "allow_client_shm": "--shared-memory",
    "http_header_forward_pattern": "--forward-headers", "cache_config": "--cache-bytes",
    "http_max_input_size": "--max-body", "exit_timeout_secs": "--graceful-timeout", "allow_metrics": "--metrics-port",
}  # fmt: skip


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def print_config(settings: Settings, options: dict[str, str]) -> None:
    for name in FIELDS:
        variable = PREFIX + name.upper()
        origin = _option(name) if variable in options else variable if variable in os.environ else "default"
        print(f"{name:18} {getattr(settings, name)!r:24} {origin}")


def main(arguments: Sequence[str]) -> int:
    options: dict[str, str] = {}
    doctor = list(arguments[:1]) == ["doctor"]
    try:
        options, show = parse_arguments(arguments[1:] if doctor else arguments)
        settings = read_settings({**os.environ, **options})
        if doctor:
            try:
                return 1 if examine(settings, print) else 0
            except BrokenPipeError:  # whoever read it has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
        if show:
            print_config(settings, options)
            return 0
        sock = listen(settings)
    except ConfigError as error:
        text = str(error)
        for variable in options:  # in the words of whoever typed it
            text = text.replace(variable, _option(variable.removeprefix(PREFIX).lower()))
        print(f"millrace: {text}", file=sys.stderr)
        return 2
    os.environ.update(options)  # the application reads its settings there, whoever launches it
    level = "DEBUG" if settings.log_level == "trace" else settings.log_level.upper()
    logging.basicConfig(level=level, format="%(levelname)s:     %(message)s")
    unix = sock.family == socket.AF_UNIX
    config = uvicorn.Config(
        "asgi_app:app",
        http="asgi_app.protocol:Protocol",
        loop="uvloop",
        lifespan="on",
        backlog=settings.backlog,
        timeout_keep_alive=settings.keep_alive,
        timeout_graceful_shutdown=settings.graceful_timeout,
        access_log=settings.access_log,
        log_level=settings.log_level,
        server_header=False,
        # Whoever can connect to our unix socket is the proxy in front of us: one hop, and it overwrites the header.
        forwarded_allow_ips="*" if unix else "127.0.0.1",
    )
    logger.info("listening on %s, loading %s", sock.getsockname(), settings.models)
    server = Server(config, settings)
    try:
        server.run(sockets=[sock])
    finally:
        if settings.uds and not server.started:
            os.unlink(settings.uds)  # later it may be a successor's
    return _leave_stuck_models()


def _leave_stuck_models() -> int:
    """A lane whose model never returns is left behind: the interpreter must not wait for it, nor tear it down."""
    for thread in threading.enumerate():
        if thread.name.startswith("lane-"):
            thread.join(1)
            if thread.is_alive():
                logging.shutdown()
                os._exit(STUCK)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
