"""Trace and log settings: what is set is given back, what does not fit is refused, and what is logged changes."""

import logging
from collections.abc import Iterator
from typing import Any, cast

import orjson
import pytest

from asgi_app.diagnostics import LogSettings, TraceSettings
from engine.errors import NotFound
from engine.settings import Settings
from engine.types import Engine
from tests.client import Client

DEFAULTS = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
TRACE, MODEL, LOG = "/v2/trace/setting", "/v2/models/m/trace/setting", "/v2/logging"


class FakeEngine:
    """Knows the models `m` and `n`."""

    draining = False

    def metadata(self, model: str, version: str = "") -> None:
        if model not in ("m", "n"):
            raise NotFound(f"Request for unknown model: '{model}' is not found")


@pytest.fixture
def client() -> Iterator[Client]:
    """Its state is what the lifespan would have made; the logger is as it was afterwards."""
    logger = logging.getLogger("millrace")
    level = logger.level
    logger.setLevel(logging.INFO)
    client = Client(cast("Engine", FakeEngine()), Settings())
    log = LogSettings()
    client.state |= {"trace": TraceSettings(), "log": log}
    yield client
    log.restore()
    assert (logger.level, logger.filters) == (logging.INFO, [])
    logger.setLevel(level)


async def post(client: Client, path: str, **changes: Any) -> Any:
    answer = await client("POST", path, orjson.dumps(changes))
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.parametrize("path", [TRACE, MODEL])
@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "failed to parse the request JSON buffer: "),
        (b"[]", 400, "attempt to access JSON non-object as object"),
        (b'{"trace_level":"OFF"}', 400, "attempt to access JSON non-array as array"),
        (b'{"trace_level":[1]}', 400, "attempt to access JSON non-string as string"),
        (b'{"trace_level":["OFF","TIMESTAMPS"]}', 400, "Expect only one trace level 'OFF' is specified"),
        (b'{"trace_level":["FOO","OFF"]}', 400, "Expect only one trace level 'OFF' is specified"),
        (b'{"trace_level":["TIMESTAMPS"]}', 400, "Attempting to set invalid trace setting :trace file name is"),
        (b'{"trace_level":["FOO","TENSORS"]}', 400, "Attempting to set invalid trace setting :trace file name"),
        (b'{"trace_rate":7}', 400, "attempt to access JSON non-string as string"),
        (b'{"trace_rate":"x"}', 400, "Unable to parse 'trace_rate', got: x"),
        (b'{"trace_rate":"5x"}', 400, "Unable to parse 'trace_rate', got: 5x"),
        (b'{"trace_rate":""}', 400, "Unable to parse 'trace_rate', got: "),
        (b'{"trace_rate":"%b"}' % (b"9" * 5000), 400, "Unable to parse 'trace_rate', got: 999"),
        (b'{"trace_rate":"-1"}', 400, "Unable to parse 'trace_rate', value is out of range [ 0, 4294967295 ], got: -1"),
        (b'{"trace_rate":"4294967296"}', 400, "Unable to parse 'trace_rate', value is out of range [ 0, 4294967295 ]"),
        (b'{"trace_count":"x"}', 400, "Unable to parse 'trace_count', got: x"),
        (b'{"trace_count":"-2"}', 400, "Unable to parse 'trace_count'. Expecting value >= -1, got:-2"),
        (b'{"trace_count":"2147483648"}', 400, "Unable to parse 'trace_count', value is out of range [ -1, 2147483647"),
        (b'{"log_frequency":"y"}', 400, "Unable to parse 'log_frequency', got: y"),
        (b'{"trace_file":"a"}', 501, "trace file location can not be updated through network protocol"),
        (b'{"trace_file":null}', 501, "trace file location can not be updated through network protocol"),
        (b'{"trace_rate":"9","trace_count":"x"}', 400, "Unable to parse 'trace_count', got: x"),
    ],
)  # fmt: skip
async def test_trace_settings_that_do_not_fit(path: str, body: bytes, status: int, text: str, client: Client) -> None:
    """They are refused in Triton's words, and none of them is kept: there is no file to trace into."""
    answer = await client("POST", path, body)
    assert (answer.status, answer.error[: len(text)]) == (status, text)
    assert (await client("GET", path)).json == DEFAULTS


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_trace_settings_of_no_model(method: str, client: Client) -> None:
    """A model that is not there has none."""
    answer = await client(method, "/v2/models/nope/trace/setting", b"{}")
    assert (answer.status, answer.error) == (400, "Request for unknown model : nope")


async def test_trace_settings_are_kept(client: Client) -> None:
    """All are text, as clients expect; what is unknown is ignored; null brings back the default."""
    assert (await client("GET", TRACE)).json == DEFAULTS
    changes = {"trace_level": ["OFF"], "trace_rate": "007", "trace_count": "-1", "log_frequency": "4294967295"}
    expected = {**DEFAULTS, "trace_rate": "7", "log_frequency": "4294967295"}
    assert await post(client, TRACE, **changes, trace_mode="opentelemetry", foo=1) == expected
    assert await post(client, TRACE, trace_level=["FOO"]) == expected
    assert await post(client, TRACE) == expected
    assert (await client("GET", TRACE)).json == expected
    assert await post(client, TRACE, trace_rate=None, log_frequency=None, trace_level=None) == DEFAULTS


async def test_a_models_trace_settings_are_the_global_ones_until_they_are_set(client: Client) -> None:
    """What is set for a model is its own, the rest follows the settings of all; null follows again."""
    await post(client, TRACE, trace_rate="5", trace_count="6")
    expected = {**DEFAULTS, "trace_rate": "7", "trace_count": "6"}
    assert await post(client, MODEL, trace_rate="7") == expected
    assert (await client("GET", "/v2/models/n/trace/setting")).json == {**expected, "trace_rate": "5"}
    assert (await post(client, TRACE, trace_rate="8"))["trace_rate"] == "8"
    assert (await client("GET", MODEL)).json == expected
    assert (await post(client, MODEL, trace_rate=None))["trace_rate"] == "8"


LOGGED = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "failed to parse the request JSON buffer: "),
        (b'{"log_info":1}', 400, "attempt to access JSON non-boolean as boolean"),
        (b'{"log_warning":"true"}', 400, "attempt to access JSON non-boolean as boolean"),
        (b'{"log_error":[]}', 400, "attempt to access JSON non-boolean as boolean"),
        (b'{"log_verbose_level":-1}', 400, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (b'{"log_verbose_level":"1"}', 400, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (b'{"log_verbose_level":1.5}', 400, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (b'{"log_format":"zzz"}', 400, "invalid argument for --log_format, got: zzz"),
        (b'{"log_format":3}', 400, "attempt to access JSON non-string as string"),
        (b'{"log_file":"x"}', 501, "log file location can not be updated through network protocol"),
        (b'{"log_warning":false,"log_format":"z"}', 400, "invalid argument for --log_format, got: z"),
    ],
)
async def test_log_settings_that_do_not_fit(body: bytes, status: int, text: str, client: Client) -> None:
    """They are refused in Triton's words, and none of them is kept."""
    answer = await client("POST", LOG, body)
    assert (answer.status, answer.error[: len(text)]) == (status, text)
    assert (await client("GET", LOG)).json == LOGGED


async def test_log_settings_are_kept(client: Client) -> None:
    """What is set is given back; nulls and what is unknown are ignored."""
    assert (await client("GET", LOG)).json == LOGGED
    assert await post(client, LOG, log_info=False, log_verbose_level=3) == {
        **LOGGED, "log_info": False, "log_verbose_level": 3
    }  # fmt: skip
    assert (await post(client, LOG, log_info=None, log_file=None, foo=1))["log_info"] is False
    assert await post(client, LOG, log_info=True, log_verbose_level=0) == LOGGED


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
async def test_log_settings_take_effect(
    changes: dict[str, Any], written: list[str], client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Each switch turns its own level of the service's log on or off."""
    await post(client, LOG, **changes)
    logger = logging.getLogger("millrace")
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(logger, level)("%s", level)
    assert caplog.messages == written


async def test_the_log_tells_the_time_if_asked_to(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """With ISO8601 each line begins with when it was written, and ends with what it says."""
    logger = logging.getLogger("millrace")
    await post(client, LOG, log_format="ISO8601")
    logger.warning("%d %%", 5)
    (line,) = caplog.messages
    assert line.endswith("+00:00 5 %")
    assert line[4:5] + line[10:11] == "-T"
    await post(client, LOG, log_format="default")
    logger.warning("as it was")
    assert caplog.messages[-1] == "as it was"


@pytest.mark.parametrize(
    ("level", "expected"),
    [(logging.DEBUG, (1, True, True)), (logging.WARNING, (0, False, True)), (logging.ERROR, (0, False, False))],
)
def test_the_settings_begin_as_the_logger_is(level: int, expected: tuple[Any, ...]) -> None:
    """Until they are changed they tell what the operator chose."""
    logger = logging.getLogger("millrace")
    before = logger.level
    logger.setLevel(level)
    values = LogSettings().values
    logger.setLevel(before)
    assert (values["log_verbose_level"], values["log_info"], values["log_warning"]) == expected
