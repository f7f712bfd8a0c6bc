"""python -m asgi_app: read the settings, take or make the listening socket, run uvicorn on it.

Exit codes are those of `engine.options.Exit`.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from engine.connect import examine, leave_stuck_models, watch
from engine.errors import ConfigError
from engine.options import NOTHING, Exit, log_to_stderr, parse_arguments, print_config
from engine.settings import Settings

from .sockets import close_door, describe, listen

# A connection that came just before the door closed, or whose next request is already on its way, gets this many
# seconds to be read; its answer then says `connection: close`. Without it such a request would be reset.
LINGER = 0.5

PROGRAM = "python -m asgi_app"

logger = logging.getLogger("millrace")


class Server(uvicorn.Server):
    """uvicorn's server, but it drains in three steps, and exits with 0 when it was asked to stop.

    A stop turns readiness false; `drain_delay` seconds later no new connection is let in; `LINGER` seconds later
    uvicorn closes the listener and idle connections, and waits for the busy ones.
    """

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings
        self._unwatch: Callable[[], None] = lambda: None

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
        self._unwatch = watch(self.lifespan.state["engine"], self._settings)
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
        self._unwatch()
        await super().shutdown(sockets)


def main(arguments: Sequence[str]) -> int:
    typed = NOTHING
    doctor = list(arguments[:1]) == ["doctor"]
    try:
        typed = parse_arguments(
            PROGRAM,
            f"Serve a model repository over HTTP. `{PROGRAM} doctor`, with the same options, says what would not work, "
            "and why.",
            arguments[1:] if doctor else arguments,
        )
        settings = typed.settings()
        if doctor:
            return _examine(settings)
        if "print_config" in typed.flags:
            print_config(settings, typed)
            return Exit.STOPPED
        sock = listen(settings)
    except ConfigError as error:
        return typed.complain(error)
    os.environ.update(typed.variables)  # the application reads its settings there, whoever launches it
    log_to_stderr(settings)
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
    source = f"connecting to {settings.engine_socket}" if settings.engine_socket else f"loading {settings.models}"
    logger.info("listening on %s, %s", sock.getsockname(), source)
    server = Server(config, settings)
    try:
        server.run(sockets=[sock])
    finally:
        if settings.uds and not server.started:
            os.unlink(settings.uds)  # later it may be a successor's
    leave_stuck_models()
    return Exit.STOPPED


def _examine(settings: Settings) -> int:
    try:
        return 1 if examine(settings, print) else 0
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
