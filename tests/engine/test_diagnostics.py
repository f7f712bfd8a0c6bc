"""Trace and log settings: what is set is given back, what does not fit is refused, and what is logged changes."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from engine.diagnostics import LogSettings, TraceSettings
from engine.errors import EngineError, InvalidInput, Unimplemented
from tests.conftest import StartLocal
from tests.scripted import double

DEFAULTS = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
LOGGER = logging.getLogger("millrace")


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """Everything from INFO on is logged, and the logger is as it was afterwards."""
    level = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    yield
    assert (LOGGER.level, LOGGER.filters) == (logging.INFO, [])
    LOGGER.setLevel(level)


@pytest.fixture
def log(logger: None) -> Iterator[LogSettings]:
    settings = LogSettings()
    yield settings
    settings.restore()


@pytest.mark.parametrize("model", ["", "m"])
@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"trace_level": "OFF"}, InvalidInput, "attempt to access JSON non-array as array"),
        ({"trace_level": [1]}, InvalidInput, "attempt to access JSON non-string as string"),
        ({"trace_level": ["OFF", "TIMESTAMPS"]}, InvalidInput, "Expect only one trace level 'OFF' is specified"),
        ({"trace_level": ["FOO", "OFF"]}, InvalidInput, "Expect only one trace level 'OFF' is specified"),
        ({"trace_level": ["TIMESTAMPS"]}, InvalidInput, "Attempting to set invalid trace setting :trace file name is"),
        ({"trace_level": ["FOO", "TENSORS"]}, InvalidInput, "Attempting to set invalid trace setting :trace file name"),
        ({"trace_rate": 7}, InvalidInput, "attempt to access JSON non-string as string"),
        ({"trace_rate": "x"}, InvalidInput, "Unable to parse 'trace_rate', got: x"),
        ({"trace_rate": "5x"}, InvalidInput, "Unable to parse 'trace_rate', got: 5x"),
        ({"trace_rate": ""}, InvalidInput, "Unable to parse 'trace_rate', got: "),
        ({"trace_rate": "9" * 5000}, InvalidInput, "Unable to parse 'trace_rate', got: 999"),
        ({"trace_rate": "-1"}, InvalidInput,
         "Unable to parse 'trace_rate', value is out of range [ 0, 4294967295 ], got: -1"),
        ({"trace_rate": "4294967296"}, InvalidInput,
         "Unable to parse 'trace_rate', value is out of range [ 0, 4294967295 ]"),
        ({"trace_count": "x"}, InvalidInput, "Unable to parse 'trace_count', got: x"),
        ({"trace_count": "-2"}, InvalidInput, "Unable to parse 'trace_count'. Expecting value >= -1, got:-2"),
        ({"trace_count": "2147483648"}, InvalidInput,
         "Unable to parse 'trace_count', value is out of range [ -1, 2147483647"),
        ({"log_frequency": "y"}, InvalidInput, "Unable to parse 'log_frequency', got: y"),
        ({"trace_file": "a"}, Unimplemented, "trace file location can not be updated through network protocol"),
        ({"trace_file": None}, Unimplemented, "trace file location can not be updated through network protocol"),
        ({"trace_rate": "9", "trace_count": "x"}, InvalidInput, "Unable to parse 'trace_count', got: x"),
    ],
)  # fmt: skip
def test_trace_settings_that_do_not_fit(
    model: str, changes: dict[str, Any], error: type[EngineError], text: str
) -> None:
    """They are refused in Triton's words, and none of them is kept: there is no file to trace into."""
    settings = TraceSettings()
    with pytest.raises(error) as refused:
        settings.update(model, changes)
    assert str(refused.value).startswith(text)
    assert settings.of(model) == DEFAULTS


def test_trace_settings_are_kept() -> None:
    """All are text, as clients expect; what is unknown is ignored; None brings back the default."""
    settings = TraceSettings()
    assert settings.of() == DEFAULTS
    expected = {**DEFAULTS, "trace_rate": "7", "log_frequency": "4294967295"}
    changes = {"trace_level": ["OFF"], "trace_rate": "007", "trace_count": "-1", "log_frequency": "4294967295"}
    for more in ({**changes, "trace_mode": "opentelemetry", "foo": 1}, {"trace_level": ["FOO"]}, {}):
        settings.update("", more)
        assert settings.of() == expected
    settings.update("", {"trace_rate": None, "log_frequency": None, "trace_level": None})
    assert settings.of() == DEFAULTS


def test_a_models_trace_settings_are_the_global_ones_until_they_are_set() -> None:
    """What is set for a model is its own, the rest follows the settings of all; None follows again."""
    settings = TraceSettings()
    settings.update("", {"trace_rate": "5", "trace_count": "6"})
    settings.update("m", {"trace_rate": "7"})
    expected = {**DEFAULTS, "trace_rate": "7", "trace_count": "6"}
    assert settings.of("m") == expected
    assert settings.of("n") == {**expected, "trace_rate": "5"}
    settings.update("", {"trace_rate": "8"})
    assert settings.of()["trace_rate"] == "8"
    assert settings.of("m") == expected
    settings.update("m", {"trace_rate": None})
    assert settings.of("m")["trace_rate"] == "8"


LOGGED = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"log_info": 1}, InvalidInput, "attempt to access JSON non-boolean as boolean"),
        ({"log_warning": "true"}, InvalidInput, "attempt to access JSON non-boolean as boolean"),
        ({"log_error": []}, InvalidInput, "attempt to access JSON non-boolean as boolean"),
        ({"log_verbose_level": -1}, InvalidInput, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        ({"log_verbose_level": "1"}, InvalidInput, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        ({"log_verbose_level": 1.5}, InvalidInput, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        ({"log_format": "zzz"}, InvalidInput, "invalid argument for --log_format, got: zzz"),
        ({"log_format": 3}, InvalidInput, "attempt to access JSON non-string as string"),
        ({"log_file": "x"}, Unimplemented, "log file location can not be updated through network protocol"),
        ({"log_warning": False, "log_format": "z"}, InvalidInput, "invalid argument for --log_format, got: z"),
    ],
)
def test_log_settings_that_do_not_fit(
    changes: dict[str, Any], error: type[EngineError], text: str, log: LogSettings
) -> None:
    """They are refused in Triton's words, and none of them is kept."""
    with pytest.raises(error) as refused:
        log.update(changes)
    assert str(refused.value).startswith(text)
    assert log.values == LOGGED


def test_log_settings_are_kept(log: LogSettings) -> None:
    """What is set is given back; None and what is unknown are ignored."""
    assert log.values == LOGGED
    log.update({"log_info": False, "log_verbose_level": 3})
    assert log.values == {**LOGGED, "log_info": False, "log_verbose_level": 3}
    log.update({"log_info": None, "log_file": None, "foo": 1})
    assert log.values["log_info"] is False
    log.update({"log_info": True, "log_verbose_level": 0})
    assert log.values == LOGGED


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({}, ["info", "warning", "error", "critical"]),
        ({"log_verbose_level": 1}, ["debug", "info", "warning", "error", "critical"]),
        ({"log_info": False}, ["warning", "error", "critical"]),
        ({"log_info": False, "log_verbose_level": 1}, ["debug", "warning", "error", "critical"]),
        ({"log_warning": False}, ["info", "error", "critical"]),
        ({"log_error": False}, ["info", "warning"]),
    ],
)
def test_log_settings_take_effect(
    changes: dict[str, Any], written: list[str], log: LogSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """Each switch turns its own level of the service's log on or off, in another process that takes them over too."""

    def write() -> list[str]:
        caplog.clear()
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(LOGGER, level)("%s", level)
        return caplog.messages

    log.update(changes)
    assert write() == written
    values = dict(log.values)
    log.restore()
    assert write() == ["info", "warning", "error", "critical"]
    other = LogSettings()
    other.apply(values)
    assert write() == written
    other.restore()


def test_the_log_tells_the_time_if_asked_to(log: LogSettings, caplog: pytest.LogCaptureFixture) -> None:
    """With ISO8601 each line begins with when it was written, and ends with what it says."""
    log.update({"log_format": "ISO8601"})
    LOGGER.warning("%d %%", 5)
    (line,) = caplog.messages
    assert line.endswith("+00:00 5 %")
    assert line[4:5] + line[10:11] == "-T"
    log.update({"log_format": "default"})
    LOGGER.warning("as it was")
    assert caplog.messages[-1] == "as it was"


@pytest.mark.parametrize(
    ("level", "expected"),
    [(logging.DEBUG, (1, True, True)), (logging.WARNING, (0, False, True)), (logging.ERROR, (0, False, False))],
)
def test_the_settings_begin_as_the_logger_is(level: int, expected: tuple[Any, ...]) -> None:
    """Until they are changed they tell what the operator chose, and nothing is put back that was not changed."""
    LOGGER.setLevel(logging.CRITICAL)
    untouched = LogSettings()
    LOGGER.setLevel(level)
    values = LogSettings().values
    untouched.restore()
    assert LOGGER.level == level
    LOGGER.setLevel(logging.INFO)
    assert (values["log_verbose_level"], values["log_info"], values["log_warning"]) == expected


async def test_an_engine_has_the_settings_of_its_models(local_engine: StartLocal) -> None:
    """Those of all, and each one's own; a model that is not there has none, and nothing can be set for it."""
    engine = await local_engine(m=double)
    assert await engine.trace() == DEFAULTS
    assert await engine.trace("", {"trace_rate": "5"}) == {**DEFAULTS, "trace_rate": "5"}
    assert await engine.trace("m", {"trace_count": "6"}) == {**DEFAULTS, "trace_rate": "5", "trace_count": "6"}
    assert await engine.trace() == {**DEFAULTS, "trace_rate": "5"}
    for changes in (None, {}, {"trace_rate": "7"}):
        with pytest.raises(InvalidInput, match="^Request for unknown model : nope$"):
            await engine.trace("nope", changes)


async def test_an_engine_leaves_the_log_as_it_found_it(
    local_engine: StartLocal, caplog: pytest.LogCaptureFixture
) -> None:
    """What it is told lasts until it stops; what it tells is a copy."""
    engine = await local_engine(m=double)
    told = await engine.log()
    assert told == LOGGED
    told["log_info"] = "mine"
    assert await engine.log({"log_info": False}) == {**LOGGED, "log_info": False}
    caplog.clear()
    LOGGER.info("unheard")
    await engine.stop()
    LOGGER.info("heard")
    assert caplog.messages == ["heard"]
