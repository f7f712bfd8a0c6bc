"""What `python -m asgi_app` and `python -m engine` share as programs: options, errors in their words, exit codes."""

import argparse
import enum
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import ConfigError
from .settings import FIELDS, PREFIX, Settings, nearest, read_settings


class Exit(enum.IntEnum):
    """With what a process ends, and what whoever supervises it may make of that.

    1 is none of them: the event loop never returned (the log has the traces), or an error that nobody foresaw.
    """

    STOPPED = 0  # it was told to
    USAGE = 2  # a wrong option or setting, or another engine's socket: to start it again changes nothing
    CANNOT_START = 3  # a model that cannot be loaded, say
    STUCK_AT_STOP = 4  # it was told to, but a model did not return
    DEVICE_LOST = 70  # a new process may find the device mended
    STUCK = 71  # a batch ran for longer than stuck_after


# Triton's options, as people type them, and ours for them.
TRITONS = {
    "model_repository": "--models", "model_store": "--models", "model_control_mode": "--model-control",
    "load_model": "--load-models", "repository_poll_secs": "--poll-seconds", "http_port": "--port",
    "http_address": "--host", "strict_model_config": "--auto-complete", "log_verbose": "--log-level debug",
    "disable_auto_complete_config": "--auto-complete=false", "allow_client_shm": "--shared-memory",
    "http_header_forward_pattern": "--forward-headers", "cache_config": "--cache-bytes",
    "http_max_input_size": "--max-body", "exit_timeout_secs": "--graceful-timeout", "allow_metrics": "--metrics-port",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """What was typed.

    Attributes:
        variables: the settings given as options, as the environment variables that they stand for.
        flags: those given of the program's own, and "print_config".
    """

    variables: dict[str, str]
    flags: frozenset[str]

    def settings(self) -> Settings:
        """Those of the environment and the options; the option wins.

        Raises:
            ConfigError: the text names the variable.
        """
        return read_settings({**os.environ, **self.variables})

    def complain(self, error: ConfigError) -> int:
        """Say what is wrong, in the words of whoever typed it. Returns the exit code."""
        text = str(error)
        for variable in self.variables:
            text = text.replace(variable, _option(variable.removeprefix(PREFIX).lower()))
        print(f"millrace: {text}", file=sys.stderr)
        return Exit.USAGE


NOTHING = Options({}, frozenset())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_arguments(
    program: str, description: str, arguments: Sequence[str], flags: Mapping[str, str] | None = None
) -> Options:
    """Read a command line on which every setting is an option.

    Args:
        program: as it is typed, "python -m asgi_app".
        flags: the program's own, which are no settings -> what they do.

    Raises:
        ConfigError: an option is unknown; the text names the nearest one.
    """
    parser = _Parser(
        prog=program,
        description=f"{description} Every option is also the environment variable {PREFIX}<OPTION>; the option wins.",
        allow_abbrev=False,
    )
    for name, field in FIELDS.items():
        note = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        kind: Any = field.type
        form = {"nargs": "?", "const": "true"} if kind is bool else {"metavar": kind.__name__.upper()}
        parser.add_argument(_option(name), dest=name, help=note, **form)
    own = {**(flags or {}), "print_config": "print each setting, its value and where it came from"}
    for name, note in own.items():
        parser.add_argument(_option(name), dest=name, action="store_true", help=note)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(_unknown(unknown[0], program))
    given = {PREFIX + name.upper(): value for name in FIELDS if (value := getattr(parsed, name)) is not None}
    return Options(given, frozenset(name for name in own if getattr(parsed, name)))


def _unknown(option: str, program: str) -> str:
    if option[:1] != "-":
        return f"{option}: everything is said by options; `{program} --help` lists them"
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    if name in TRITONS:
        return f"{option}: no such option; here it is {TRITONS[name]}"
    return f"{option}: no such option{nearest(name, _option)}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def print_config(settings: Settings, options: Options) -> None:
    for name in FIELDS:
        variable = PREFIX + name.upper()
        origin = _option(name) if variable in options.variables else variable if variable in os.environ else "default"
        print(f"{name:18} {getattr(settings, name)!r:24} {origin}")


def log_to_stderr(settings: Settings) -> None:
    level = "DEBUG" if settings.log_level == "trace" else settings.log_level.upper()
    logging.basicConfig(level=level, format="%(levelname)s:     %(message)s")
