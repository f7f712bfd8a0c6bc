"""The listening socket: its true family, nobody's path taken, no established connection reset."""

import os
import select
import socket
from pathlib import Path

import pytest

from asgi_app.sockets import close_door, describe, listen
from engine.errors import ConfigError
from engine.settings import Settings, read_settings


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
    with pytest.raises(ConfigError, match="is there already, and no socket"):
        listen(settings)
    assert path.read_text() == "precious"


def test_a_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    """The kernel takes some 107 bytes: a longer path is refused with the reason."""
    with pytest.raises(ConfigError, match="MILLRACE_UDS: cannot listen on .*path too long"):
        listen(Settings(uds=str(tmp_path / ("x" * 120))))


def test_a_port_that_is_taken_is_named() -> None:
    """The address that could not be had is in the error."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=str(taken.getsockname()[1])):
        listen(Settings(port=taken.getsockname()[1]))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_closed_door_keeps_who_is_inside(family: socket.AddressFamily, tmp_path: Path) -> None:
    """A connection that was established before the door closed can still be accepted; a later one gets nowhere."""
    with listen(Settings(port=0, uds=str(tmp_path / "s") if family == socket.AF_UNIX else "")) as sock:
        address = sock.getsockname()
        with socket.socket(family) as inside, socket.socket(family) as outside:
            inside.connect(address)
            inside.sendall(b"request")
            close_door(sock)
            outside.setblocking(False)
            if family == socket.AF_UNIX:
                with pytest.raises(FileNotFoundError):
                    outside.connect(address)
            else:
                with pytest.raises(BlockingIOError):
                    outside.connect(address)
                assert select.select([], [outside], [], 0.2)[1] == []
            sock.settimeout(10)
            accepted, _ = sock.accept()
            with accepted:
                assert accepted.recv(100) == b"request"
                accepted.sendall(b"answer")
                assert inside.recv(100) == b"answer"
