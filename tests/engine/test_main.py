"""python -m engine: what it refuses, in which order it starts and stops, and what its status is worth."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest

from engine import __main__ as program
from engine.__main__ import CannotStart, main, serve
from engine.errors import ConfigError
from engine.ipc.frames import FrameError
from engine.local import LocalEngine
from engine.settings import FIELDS, Settings
from tests.scripted import Gate, Scripted, add_model


class Recorder:
    """In the place of the workers' server: writes down what it is asked, and says when it has started."""

    said: ClassVar[list[str]] = []
    started: ClassVar[asyncio.Event]
    drained: ClassVar[asyncio.Event]

    def __init__(self, engine: LocalEngine, settings: Settings, takeover: bool = False) -> None:
        self._engine = engine
        self._path = settings.engine_socket
        self._takeover = takeover
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        assert self._engine.ready()
        if Path(self._path).name == "taken":
            raise ConfigError("MILLRACE_ENGINE_SOCKET: another engine, process 1, serves there")
        self.said.append("takes over" if self._takeover else "starts")
        self.started.set()

    async def drain(self) -> None:
        assert not self._engine.ready()
        self.said.append("drains")
        await self.drained.wait()

    async def stop(self) -> None:
        self.said.append("stops")


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch, scripted: type[Scripted]) -> type[Recorder]:
    """A Recorder where the server would be; last orders are at once, and what is drained is drained."""
    monkeypatch.setattr(program, "Server", Recorder)
    monkeypatch.setattr(program, "LAST_ORDERS", 0)
    monkeypatch.setattr(Recorder, "said", [])
    monkeypatch.setattr(Recorder, "started", asyncio.Event(), raising=False)
    monkeypatch.setattr(Recorder, "drained", asyncio.Event(), raising=False)
    Recorder.drained.set()
    return Recorder


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """settings(name="engine"): of an engine with one model, at a socket of that name."""
    add_model(tmp_path / "models", "m")
    return lambda name="engine", **more: Settings(
        models=str(tmp_path / "models"), engine_socket=str(tmp_path / name), **more
    )


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Whatever handles them is put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tell(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("takeover", [False, True])
async def test_it_serves_until_it_is_told_to_stop(
    server: type[Recorder], settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture,
    number: signal.Signals, takeover: bool,
) -> None:  # fmt: skip
    """The models first, then the socket; readiness goes first, then what is under way, then the connections."""
    caplog.set_level("INFO")
    serving = asyncio.create_task(serve(settings(), takeover))
    async with asyncio.timeout(10):
        await server.started.wait()
        tell(number)
        await serving
    assert server.said == ["takes over" if takeover else "starts", "drains", "stops"]
    assert f"ready: 1 models at {settings().engine_socket}" in caplog.text


async def test_a_second_signal_does_not_wait(server: type[Recorder], settings: Callable[..., Settings]) -> None:
    """What is under way is given up."""
    server.drained.clear()
    serving = asyncio.create_task(serve(settings(), False))
    async with asyncio.timeout(10):
        await server.started.wait()
        tell()
        while "drains" not in server.said:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not serving.done()
        tell()
        await serving
    assert server.said[-1] == "stops"


async def test_a_signal_ends_the_loading(
    server: type[Recorder], settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for, nobody is served, and the exit code is 0."""

    class Ended(BaseException):
        pass

    def end(code: int) -> NoReturn:
        raise Ended(code)

    monkeypatch.setattr(program, "end", end)
    gate = Gate()
    gate.open.clear()
    Scripted.behaviours["m"] = gate
    loading = asyncio.create_task(serve(settings(inline_ms=0), False))
    await asyncio.sleep(0.05)
    tell()
    asyncio.get_running_loop().call_later(0.1, gate.open.set)
    with pytest.raises(Ended, match="^0$"):
        async with asyncio.timeout(30):
            await loading
    assert server.said == []


async def test_a_model_that_cannot_be_served_is_no_wrong_option(
    server: type[Recorder], settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """It ends the start, is named, and nothing is published."""
    (tmp_path / "models/m/config.pbtxt").write_text("max_batch_size: -1")
    with pytest.raises(CannotStart, match="ConfigError: .*/models/m/"):
        await serve(settings(), False)
    assert server.said == []


async def test_a_path_that_is_taken_meanwhile_is_refused(
    server: type[Recorder], settings: Callable[..., Settings]
) -> None:
    """The server finds out when it binds; the models are let go."""
    with pytest.raises(ConfigError, match="another engine, process 1"):
        await serve(settings("taken"), False)
    assert server.said == []


async def test_company_is_refused_before_anything_is_loaded(
    server: type[Recorder], settings: Callable[..., Settings]
) -> None:
    """Whoever listens at the path is named; with takeover it does not matter."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(settings().engine_socket)
        other.listen()
        with pytest.raises(ConfigError, match=f"another engine, process {os.getpid()}, serves at .*--takeover"):
            await serve(settings(), False)
        assert Scripted.calls == []
        serving = asyncio.create_task(serve(settings(), True))
        async with asyncio.timeout(10):
            await server.started.wait()
            tell()
            await serving


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "MILLRACE_ENGINE_SOCKET: must be the path"),
        (["status"], "MILLRACE_ENGINE_SOCKET: must be the path"),
        (["--prot", "1"], "--prot: no such option; did you mean --port?"),
        (["status", "--takeover"], "--takeover: no such option"),
        (["start"], "start: everything is said by options; `python -m engine --help`"),
        (["--engine-socket", "/no/such/folder/engine.sock", "--models", ""], "--models: must not be empty"),
    ],
)
def test_a_mistake_is_exit_code_2_and_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong with an option or setting is said in one line, without a traceback."""
    assert main(arguments) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"millrace: {text}")
    assert output.count("\n") == 1


def test_a_file_is_not_mistaken_for_a_socket(
    scripted: type[Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What else lies at the path is refused, and stays."""
    (tmp_path / "notes").write_text("mine")
    add_model(tmp_path / "models", "m")
    assert main(["--engine-socket", str(tmp_path / "notes"), "--models", str(tmp_path / "models")]) == 2
    assert f"--engine-socket: {tmp_path}/notes: is there, and is no socket" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == "mine"


def test_print_config_is_that_of_the_other_program(capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting, and where it came from; nothing is started."""
    assert main(["--print-config", "--engine-socket", "x"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["engine_socket"] == ["'x'", "--engine-socket"]
    assert set(lines) == set(FIELDS)


@pytest.mark.parametrize(("ready", "code"), [(True, 0), (False, 1)])
def test_status_prints_what_the_engine_says(
    ready: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As JSON; the exit code says whether it is ready."""
    answer: dict[str, Any] = {"pid": 7, "ready": ready, "live": True, "workers": [], "models": []}
    monkeypatch.setattr(program, "ask_status", lambda path: answer | {"path": path})
    assert main(["status", "--engine-socket", "x"]) == code
    assert json.loads(capsys.readouterr().out) == answer | {"path": "x"}


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), FrameError("it says nothing")])
def test_status_of_nobody_is_3(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is printed where the JSON would be."""

    def ask(path: str) -> NoReturn:
        raise error

    monkeypatch.setattr(program, "ask_status", ask)
    assert main(["status", "--engine-socket", "x"]) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert f"no engine answers at x: {error}" in output.err


def test_an_error_that_nobody_foresaw_is_never_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The process ends at once, with 1, whatever threads it has, and the log says where it was."""

    class Ended(BaseException):
        pass

    def end(code: int) -> NoReturn:
        raise Ended(code)

    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(program, "end", end)
    monkeypatch.setattr(program, "serve", fail)
    with pytest.raises(Ended, match="^1$"):
        main(["--engine-socket", str(tmp_path / "x")])
    assert "ZeroDivisionError" in caplog.text
