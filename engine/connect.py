"""connect(settings) -> Engine: whoever owns the models, the callers need not know."""

from .settings import Settings
from .types import Engine


def connect(settings: Settings) -> Engine:
    """The engine that the settings ask for, not started."""
    from .local import LocalEngine  # late: an HTTP worker in front of a separate engine must not import what it needs

    return LocalEngine(settings)
