"""python -m engine: own the device and every model, and serve the HTTP workers that connect to MILLRACE_ENGINE_SOCKET.

`python -m engine status` prints what the engine there says of itself, as JSON: its process, whether it is ready, its
workers, its models. Exit codes are those of `engine.options.Exit`; of `status` 0 if it is ready, 1 if not, 3 if nobody
answers.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop

from .errors import ConfigError, EngineError
from .ipc.client import ask_status
from .ipc.frames import FrameError
from .ipc.server import Server, serving
from .local import LocalEngine
from .options import NOTHING, Exit, log_to_stderr, parse_arguments, print_config
from .settings import PREFIX, Settings
from .watchdog import Watchdog, end, leave_stuck_models

# Whoever stops a whole service (a terminal's Ctrl-C, circus, the death of either supervisor) stops the workers at the
# same moment. They accept for half a second more; this is how long the engine serves on until it turns to its own end.
LAST_ORDERS = 1.0

NOT_READY = 1  # exit codes of `status`, besides 0 and 2
NOBODY = 3

PROGRAM = "python -m engine"
FLAGS = {"takeover": "load the models, then take the socket over from the engine that has it: it serves on until then"}

logger = logging.getLogger("millrace")


class CannotStart(Exception):
    """The models cannot be served; the text says why."""


class Signals:
    """SIGTERM and SIGINT: the first asks the process to stop, the second to do it now."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.now = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received)

    def _received(self) -> None:
        (self.now if self.stop.is_set() else self.stop).set()


async def serve(settings: Settings, takeover: bool) -> None:
    """Load the models and serve the workers until a signal comes and everything is answered.

    Raises:
        ConfigError: another engine lives at the socket's path, or it cannot be listened on.
        CannotStart.
    """
    signals = Signals()
    engine = LocalEngine(settings)
    server = Server(engine, settings, takeover=takeover)
    _look_at_place(settings.engine_socket, takeover)
    logger.info("loading %s", settings.models)
    try:
        loaded = await _unless(signals.stop, engine.start())
    except EngineError as error:  # a ConfigError of a model's, too, which is none of the command line's
        await engine.stop()
        raise CannotStart(f"{type(error).__name__}: {error}") from None
    if not loaded:
        await engine.stop()
        end(Exit.STOPPED)  # a thread may still be loading
    watchdog = Watchdog(engine, settings.stuck_after)
    try:
        await server.start()
        logger.info("ready: %d models at %s", await _count(engine), settings.engine_socket)
        server.failed.add_done_callback(lambda _: signals.stop.set())
        await signals.stop.wait()
        if server.failed.done():
            await server.failed
        logger.info("stopping")
        engine.draining = True
        await _unless(signals.now, _finish(server, LAST_ORDERS + settings.drain_delay))
        await server.stop()
    finally:
        watchdog.stop()
        await engine.stop()


def _look_at_place(path: str, takeover: bool) -> None:
    """The server does so, too, but only when all models were loaded, beside those of whoever is there.

    Raises:
        ConfigError.
    """
    try:
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{PREFIX}ENGINE_SOCKET: {path}: its folder does not exist")
        if Path(path).exists() and not Path(path).is_socket():
            raise ConfigError(f"{PREFIX}ENGINE_SOCKET: {path}: is there, and is no socket")
        owner = serving(Path(path))
    except OSError as error:
        raise ConfigError(f"{PREFIX}ENGINE_SOCKET: {path}: {error.strerror or error}") from None
    if owner and not takeover:
        raise ConfigError(
            f"{PREFIX}ENGINE_SOCKET: another engine, process {owner}, serves at {path}; stop it, or start this one "
            "with --takeover"
        )


async def _count(engine: LocalEngine) -> int:
    return len({entry["name"] for entry in await engine.index() if entry.get("state") == "READY"})


async def _finish(server: Server, last_orders: float) -> None:
    await asyncio.sleep(last_orders)
    await server.drain()


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work, but give it up when the event comes first. Returns whether it was done."""
    tasks = task, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    waiting.cancel()
    await asyncio.wait(tasks)
    if task.cancelled():
        return False
    task.result()
    return True


def main(arguments: Sequence[str]) -> int:
    typed = NOTHING
    asked = list(arguments[:1]) == ["status"]
    try:
        typed = parse_arguments(
            PROGRAM,
            "Own the device and every model, and serve the HTTP workers that connect to the engine's socket. "
            f"`{PROGRAM} status` says how the engine there is.",
            arguments[1:] if asked else arguments,
            {} if asked else FLAGS,
        )
        settings = typed.settings()
        if "print_config" in typed.flags:
            print_config(settings, typed)
            return Exit.STOPPED
        if not settings.engine_socket:
            raise ConfigError(f"{PREFIX}ENGINE_SOCKET: must be the path of the socket at which workers find the engine")
        if asked:
            return status(settings.engine_socket)
        log_to_stderr(settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, "takeover" in typed.flags))
    except ConfigError as error:
        return typed.complain(error)
    except CannotStart as error:
        logger.critical("the engine cannot start: %s", error)
        return Exit.CANNOT_START
    except Exception:
        logger.critical("the engine ends, of an error that is a defect", exc_info=True)
        end(1)  # not by a return: threads that somebody would have stopped may still run
    leave_stuck_models()
    return Exit.STOPPED


def status(path: str) -> int:
    try:
        answer = ask_status(path)
    except (OSError, FrameError) as error:
        loading = (
            "; one that still loads its models does not answer yet" if isinstance(error, FileNotFoundError) else ""
        )
        print(f"millrace: no engine answers at {path}: {error}{loading}", file=sys.stderr)
        return NOBODY
    try:
        print(json.dumps(answer, indent=2), flush=True)
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if answer["ready"] else NOT_READY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
