"""The launcher: what it hands to uvicorn and to the application, and how it refuses."""

import os
import socket
from pathlib import Path

import pytest
import uvicorn

from asgi_app.__main__ import Server, main
from engine.settings import FIELDS, read_settings


def test_print_config_shows_where_each_value_came_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option wins over the variable, the variable over the default, and the page says which it was."""
    monkeypatch.setenv("MILLRACE_PORT", "9000")
    monkeypatch.setenv("MILLRACE_BACKLOG", "64")
    assert main(["--print-config", "--port", "9001"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["port"] == ["9001", "--port"]
    assert lines["backlog"] == ["64", "MILLRACE_BACKLOG"]
    assert lines["uds"] == ["''", "default"]
    assert set(lines) == set(FIELDS)


@pytest.mark.parametrize("arguments", [["--port", "web"], ["--nope"], ["--fd", "99"], ["--uds", "/nowhere/x.sock"],
                                       ["--host", "203.0.113.1"]])  # fmt: skip
def test_a_mistake_is_exit_code_2_and_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with an option is said in one line, without a traceback."""
    assert main(arguments) == 2
    output = capsys.readouterr().err
    assert output.startswith("millrace: ")
    assert output.count("\n") == 1


def test_options_reach_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given as an option is in the environment that the application reads."""
    assert launch(monkeypatch, "--port", "0", "--queue-rows", "99").workers == 1
    assert read_settings(os.environ).queue_rows == 99


def test_options_reach_uvicorn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What uvicorn has to know is handed on, and a forwarded address is believed only from a proxy on a unix socket."""
    config = launch(monkeypatch, "--port", "0", "--keep-alive", "7", "--graceful-timeout", "8", "--backlog", "9")
    assert (config.timeout_keep_alive, config.timeout_graceful_shutdown, config.backlog) == (7, 8, 9)
    assert (config.http, config.access_log, config.limit_concurrency) == ("asgi_app.protocol:Protocol", False, None)
    assert config.forwarded_allow_ips == "127.0.0.1"
    assert launch(monkeypatch, "--uds", str(tmp_path / "s")).forwarded_allow_ips == "*"


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> uvicorn.Config:
    """Run the launcher up to the server, and return what it would have run with."""
    configs: list[uvicorn.Config] = []

    def run(self: Server, sockets: list[socket.socket]) -> None:
        configs.append(self.config)
        self.started = True
        sockets[0].close()

    monkeypatch.setattr(Server, "run", run)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(arguments) == 0
    return configs[0]
