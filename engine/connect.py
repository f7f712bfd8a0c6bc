"""connect(settings) -> Engine: whoever owns the models, the callers need not know."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .settings import Settings
from .types import Engine

if TYPE_CHECKING:
    from .functions import Function


def connect(settings: Settings, functions: Sequence["Function"] = ()) -> Engine:
    """The engine that the settings ask for, not started; with functions, one that serves these instead."""
    from .local import LocalEngine  # late: an HTTP worker in front of a separate engine must not import what it needs

    return LocalEngine(settings, functions)


def examine(settings: Settings, write: Callable[[str], object]) -> int:
    """Write what will not work with these settings, and why. Returns the number of errors."""
    from .doctor import report

    return report(settings, write)
