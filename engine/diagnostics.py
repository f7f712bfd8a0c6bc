"""What a running service is told to write about itself: trace and log settings (PROTOCOL.md sections 1.12 and 1.13).

Both are forgotten when the engine's process ends.
"""

import logging
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from .errors import InvalidInput, Unimplemented
from .validate import typed

Check = Callable[[str, object], Any]

TRACE_DEFAULTS: dict[str, Any] = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
TRACED = {"TIMESTAMPS", "TENSORS"}
RANGES = {"trace_rate": (0, 2**32 - 1), "trace_count": (-1, 2**31 - 1), "log_frequency": (0, 2**32 - 1)}
LOG_FORMATS = ("default", "ISO8601")


class TraceSettings:
    """What is to be traced, of all models and of each.

    They are kept and given back, as clients expect. There is no trace file, and none can be named over the network, so
    the level is OFF, and any other is refused.
    """

    def __init__(self) -> None:
        self._changed: dict[str, dict[str, Any]] = {}  # model, or "" for all -> settings

    def of(self, model: str = "") -> dict[str, Any]:
        """The settings of a model, or of all: what is not set for the model is as for all."""
        return {**TRACE_DEFAULTS, **self._changed.get("", {}), **self._changed.get(model, {})}

    def update(self, model: str, changes: Mapping[str, object]) -> None:
        """Set some, or, where the value is None, forget them again: all or, if one does not fit, none.

        Raises:
            InvalidInput: a value does not fit.
            Unimplemented: it names a file.
        """
        if "trace_file" in changes:
            raise Unimplemented("trace file location can not be updated through network protocol")
        checked = {
            key: None if changes[key] is None else check(key, changes[key])
            for key, check in TRACE_CHECKS.items()
            if key in changes
        }
        kept = {**self._changed.get(model, {}), **checked}
        self._changed[model] = {key: value for key, value in kept.items() if value is not None}


def _level(key: str, value: object) -> list[str]:
    levels = [typed(str, level) for level in typed(list, value)]
    if "OFF" in levels and len(levels) > 1:
        raise InvalidInput("Expect only one trace level 'OFF' is specified")
    if not TRACED.isdisjoint(levels):
        raise InvalidInput("Attempting to set invalid trace setting :trace file name is not given")
    return ["OFF"]


def _number(key: str, value: object) -> str:
    text = typed(str, value)
    if not re.fullmatch(r"-?[0-9]{1,20}", text, re.ASCII):
        raise InvalidInput(f"Unable to parse '{key}', got: {text[:200]}")
    low, high = RANGES[key]
    if key == "trace_count" and int(text) < low:
        raise InvalidInput(f"Unable to parse '{key}'. Expecting value >= {low}, got:{text}")
    if not low <= int(text) <= high:
        raise InvalidInput(f"Unable to parse '{key}', value is out of range [ {low}, {high} ], got: {text}")
    return str(int(text))


TRACE_CHECKS: dict[str, Check] = {
    "trace_level": _level,
    "trace_rate": _number,
    "trace_count": _number,
    "log_frequency": _number,
}


class LogSettings(logging.Filter):
    """Which records of the service's logger are written, and how. Until it is told otherwise it leaves that alone."""

    def __init__(self) -> None:
        super().__init__()
        self._logger = logging.getLogger("millrace")
        self._level = self._logger.level
        self.values: dict[str, Any] = {
            "log_file": "",
            "log_info": self._logger.isEnabledFor(logging.INFO),
            "log_warning": self._logger.isEnabledFor(logging.WARNING),
            "log_error": self._logger.isEnabledFor(logging.ERROR),
            "log_verbose_level": int(self._logger.isEnabledFor(logging.DEBUG)),
            "log_format": "default",
        }

    def update(self, changes: Mapping[str, object]) -> None:
        """Set some, all or none; None changes nothing.

        Raises:
            InvalidInput: a value does not fit.
            Unimplemented: it names a file.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        if "log_file" in given:
            raise Unimplemented("log file location can not be updated through network protocol")
        self.apply({key: check(key, given[key]) for key, check in LOG_CHECKS.items() if key in given})

    def apply(self, values: Mapping[str, Any]) -> None:
        """Take over settings that were checked already: here, or in another process."""
        self.values |= values
        self._logger.setLevel(logging.DEBUG if self.values["log_verbose_level"] else logging.INFO)
        self._logger.addFilter(self)  # once, however often

    @property
    def set(self) -> bool:
        """Whether anybody has set anything."""
        return self in self._logger.filters

    def restore(self) -> None:
        """Leave the logger as it was found, if anything was set."""
        if self.set:
            self._logger.removeFilter(self)
            self._logger.setLevel(self._level)

    def filter(self, record: logging.LogRecord) -> bool:
        if self.values["log_format"] == "ISO8601":
            record.msg = f"{datetime.fromtimestamp(record.created, UTC).isoformat(timespec='seconds')} {record.msg}"
        return any(self.values[key] for key, low, high in LOGGED if low <= record.levelno < high)


# Setting -> the levels that it lets through.
LOGGED = (
    ("log_verbose_level", logging.NOTSET, logging.INFO),
    ("log_info", logging.INFO, logging.WARNING),
    ("log_warning", logging.WARNING, logging.ERROR),
    ("log_error", logging.ERROR, 2 * logging.CRITICAL),
)


def _boolean(key: str, value: object) -> bool:
    return typed(bool, value)


def _verbosity(key: str, value: object) -> int:
    return typed(int, value)


def _format(key: str, value: object) -> str:
    text = typed(str, value)
    if text not in LOG_FORMATS:
        raise InvalidInput(f"invalid argument for --log_format, got: {text[:200]}")
    return text


LOG_CHECKS: dict[str, Check] = {
    "log_info": _boolean,
    "log_warning": _boolean,
    "log_error": _boolean,
    "log_verbose_level": _verbosity,
    "log_format": _format,
}
