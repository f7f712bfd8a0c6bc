"""connect(settings) -> Engine: whoever owns the models, the callers need not know."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .settings import Settings
from .types import Engine

if TYPE_CHECKING:
    from .functions import Function


def connect(settings: Settings, functions: Sequence["Function"] = ()) -> Engine:
    """The engine that the settings ask for, not started; with functions, one in this process that serves these."""
    # Late: an HTTP worker in front of a separate engine must not import what an engine needs.
    if settings.engine_socket and not functions:
        from .ipc.client import RemoteEngine

        return RemoteEngine(settings)
    from .local import LocalEngine

    return LocalEngine(settings, functions)


def watch(engine: Engine, settings: Settings) -> Callable[[], None]:
    """End this process when its own engine is beyond repair (see engine/watchdog.py). Returns what ends the watch.

    An engine in another process is none of this one's business: whoever supervises that one starts it again.
    """
    if settings.engine_socket:
        return lambda: None
    from .local import LocalEngine
    from .watchdog import Watchdog

    assert isinstance(engine, LocalEngine)
    return Watchdog(engine, settings.stuck_after).stop


def leave_stuck_models() -> None:
    """At the end of the process: end it, with a code of its own, if a model of this process never returned."""
    from .watchdog import leave_stuck_models

    leave_stuck_models()


def examine(settings: Settings, write: Callable[[str], object]) -> int:
    """Write what will not work with these settings, and why. Returns the number of errors."""
    from .doctor import report

    return report(settings, write)
