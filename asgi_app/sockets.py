"""The listening socket: take an inherited one or make one, say how to reach it, and close the door without a reset.

uvicorn's own `--fd` takes every inherited socket for a unix one. On a TCP socket TCP_NODELAY is then never set, and
each answer on a kept-alive connection waits 40 ms for the kernel. Here a descriptor keeps its true family.
"""

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct

from engine.errors import ConfigError
from engine.settings import PREFIX, Settings

# Classic BPF over a TCP segment: load the flags, keep SYN and ACK; if that is SYN alone drop it, else let it pass.
_NO_SYN = ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_SO_ATTACH_FILTER = 26  # Linux, asm-generic/socket.h


def listen(settings: Settings) -> socket.socket:
    """The listening socket: inherited, or made.

    Raises:
        ConfigError: the descriptor is no listening stream socket, or the address cannot be bound.
    """
    if settings.fd >= 0:
        sock = _inherited(settings.fd)
    elif settings.uds:
        sock = _unix(settings.uds, settings.backlog)
    else:
        sock = _tcp(settings)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        # Accepted sockets inherit it from the listener, whoever accepts them.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


def _inherited(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"{PREFIX}FD: descriptor {fd} is no socket: {error.strerror}") from None
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise ConfigError(f"{PREFIX}FD: descriptor {fd} is a socket that does not listen")
    return sock


def _unix(path: str, backlog: int) -> socket.socket:
    """Listen at `path`. A dead run's socket there is replaced; a live one's, or any other file, is not."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise ConfigError(f"{PREFIX}UDS: {path} is there already, and no socket")
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setblocking(False)  # a full backlog says EAGAIN, and is as alive as can be
                if probe.connect_ex(path) != errno.ECONNREFUSED:
                    raise ConfigError(f"{PREFIX}UDS: another process listens on {path}")
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, 0o666)  # as open as a TCP port on loopback; the folder says who may reach it
        sock.listen(backlog)  # who connects while the models load waits for them, as on a TCP port
    except OSError as error:
        sock.close()
        raise ConfigError(f"{PREFIX}UDS: cannot listen on {path}: {error.strerror or error}") from None
    except ConfigError:
        sock.close()
        raise
    return sock


def _tcp(settings: Settings) -> socket.socket:
    address = settings.host, settings.port
    try:
        if ":" not in settings.host:
            return socket.create_server(address, backlog=settings.backlog)
        return socket.create_server(
            address,
            family=socket.AF_INET6,
            backlog=settings.backlog,
            dualstack_ipv6=settings.host == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise ConfigError(
            f"{PREFIX}HOST and {PREFIX}PORT: cannot listen on {settings.host}:{settings.port}: "
            f"{os.strerror(error.errno) if error.errno else error}"
        ) from None


def describe(sock: socket.socket) -> str:
    """How to ask whoever listens on `sock`."""
    if sock.family == socket.AF_UNIX:
        return f"curl --unix-socket {sock.getsockname()} http://millrace/v2/health/ready"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"curl http://{host}:{port}/v2/health/ready"


def close_door(sock: socket.socket) -> None:
    """From now on no new connection reaches the listener; those that the kernel has established still do.

    Closing the listener itself would reset them, requests and all. A unix socket's path goes instead; on TCP the kernel
    drops each SYN, and whoever knocks is refused when it tries again a second later, the listener being closed then.
    """
    with contextlib.suppress(OSError):  # the path is gone already, or no Linux: then those few are reset after all
        if sock.family == socket.AF_UNIX:
            os.unlink(sock.getsockname())  # only ever called by who bound it, while it still accepts
        else:
            program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in _NO_SYN))
            option = struct.pack("HL", len(_NO_SYN), ctypes.addressof(program))
            sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)
