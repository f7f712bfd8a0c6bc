"""The launcher: options and variables are twins, the socket keeps its true family, mistakes are named."""

import os
import socket
from pathlib import Path

import pytest

from asgi_app.__main__ import describe, listen, main, parse_arguments
from engine.errors import ConfigError
from engine.settings import FIELDS, Settings, read_settings


def test_every_setting_is_an_option() -> None:
    """Each field's option sets the field's variable."""
    for name in FIELDS:
        options, _ = parse_arguments([f"--{name.replace('_', '-')}", "7"])
        assert options == {f"MILLRACE_{name.upper()}": "7"}
    assert parse_arguments(["--access-log"])[0] == {"MILLRACE_ACCESS_LOG": "true"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prot", "1"], r"--prot: no such option; did you mean --port\?"),
        (["--body-time=1"], r"--body-time=1: no such option; did you mean --body-timeout\?"),
        (["serve"], "serve: no such option"),
    ],
)
def test_an_unknown_option_names_the_nearest(arguments: list[str], text: str) -> None:
    """No option is guessed from its beginning; a typo is an error with a suggestion."""
    with pytest.raises(ConfigError, match=text):
        parse_arguments(arguments)


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


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_an_inherited_socket_keeps_its_family(family: socket.AddressFamily, tmp_path: Path) -> None:
    """TCP stays TCP, with TCP_NODELAY on what it accepts; unix stays unix."""
    with socket.socket(family) as given:
        try:
            given.bind({socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0)}.get(family, str(tmp_path / "s")))
        except OSError as error:
            pytest.skip(f"this machine has no such address: {error}")
        given.listen()
        with listen(Settings(fd=os.dup(given.fileno()))) as sock:
            assert sock.family == family
            if family != socket.AF_UNIX:
                assert "curl http://" in describe(sock)
                with socket.create_connection(given.getsockname()[:2]):
                    given.settimeout(10)
                    accepted, _ = given.accept()
                    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                    accepted.close()
            else:
                assert "--unix-socket" in describe(sock)


def test_a_descriptor_that_does_not_listen_is_refused(tmp_path: Path) -> None:
    """A file, and a socket that is not listening, are named for what they are."""
    with (
        (tmp_path / "f").open("w") as file,
        pytest.raises(ConfigError, match="MILLRACE_FD: descriptor .* is no socket"),
    ):
        listen(Settings(fd=file.fileno()))
    with socket.socket() as sock, pytest.raises(ConfigError, match="is a socket that does not listen"):
        listen(Settings(fd=os.dup(sock.fileno())))


def test_a_unix_path(tmp_path: Path) -> None:
    """A dead run's socket is replaced, a live one's and any other file are not."""
    path = tmp_path / "s.sock"
    settings = read_settings({"MILLRACE_UDS": str(path)})
    first = listen(settings)
    with pytest.raises(ConfigError, match="another process listens on"):
        listen(settings)
    first.close()
    listen(settings).close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="MILLRACE_UDS: cannot listen on"):
        listen(settings)
    assert path.read_text() == "precious"


def test_a_port_that_is_taken_is_named() -> None:
    """The address that could not be had is in the error."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=str(taken.getsockname()[1])):
        listen(Settings(port=taken.getsockname()[1]))


def test_options_reach_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given as an option is in the environment that the application reads."""
    monkeypatch.setattr("asgi_app.__main__.Server.run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["--port", "0", "--queue-rows", "99"]) == 0
    assert read_settings(os.environ).queue_rows == 99
