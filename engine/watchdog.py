"""Ends a process that is of no use any more, so that whoever supervises it starts another one.

A device that is lost, and a batch that never returns, are seen from the event loop. That the loop itself never returns,
because a model runs inline on it, say, is seen by a thread of faulthandler's, which needs no interpreter lock.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import sys
import threading
from typing import NoReturn, Protocol

from .options import Exit

INTERVAL = 1.0  # seconds between two looks

STDERR = 2  # the descriptor: whatever sys.stderr is, it is written to without the interpreter

logger = logging.getLogger("millrace")


class Watched(Protocol):
    def live(self) -> bool: ...

    def lost(self) -> str: ...


class Watchdog:
    """Looks at an engine each second, from now until `stop`. To be made on the event loop that the engine lives on."""

    def __init__(self, engine: Watched, stuck_after: float) -> None:
        self._engine = engine
        self._stuck_after = stuck_after
        self._loop = asyncio.get_running_loop()
        self._told = False  # that the device is lost
        self._look()

    def stop(self) -> None:
        """To be called before the engine is stopped: what does not run any more is not stuck."""
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        # Armed first, for longer than until the next look: should anything below raise, nobody arms it again.
        faulthandler.dump_traceback_later(self._stuck_after + INTERVAL, exit=True, file=STDERR)
        lost = self._engine.lost()
        if lost and self._told:  # those who waited had an interval's time to be told
            end(Exit.DEVICE_LOST)
        if lost:
            logger.critical("the process ends, with exit code %d: %s", Exit.DEVICE_LOST, lost)
            self._told = True
        elif not self._engine.live():
            logger.critical(
                "the process ends, with exit code %d: a batch has been running for more than %g s; its threads:",
                Exit.STUCK, self._stuck_after,
            )  # fmt: skip
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
            end(Exit.STUCK)
        self._timer = self._loop.call_later(INTERVAL, self._look)


def end(code: int) -> NoReturn:
    """End the process at once, without a word to threads that may never return."""
    logging.shutdown()
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
    os._exit(code)


def leave_stuck_models() -> None:
    """At the very end: a lane whose model never returns is left behind, which ends the process, with STUCK_AT_STOP.

    The interpreter must neither wait for it nor tear it down.
    """
    for thread in threading.enumerate():
        if thread.name.startswith("lane-"):
            thread.join(1)
            if thread.is_alive():
                end(Exit.STUCK_AT_STOP)
