"""One kept-alive HTTP/1.1 connection and nothing around it: what it measures is the server and the kernel."""

import socket
from types import TracebackType
from typing import NamedTuple, Self

Address = tuple[str, int] | str
"""TCP, or the path of a unix socket."""


class Answer(NamedTuple):
    """Attributes:
    headers: by lower-case name.
    """

    status: int
    headers: dict[str, str]
    body: bytes


def encode(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """A request as one piece of bytes: sent at once, it never waits for an acknowledgement."""
    lines = [f"{method} {path} HTTP/1.1", "host: bench", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "\r\n"]).encode() + body


class Client:
    """A connection. It sets no socket option: the kernel delays its acknowledgements as it does for any client."""

    def __init__(self, address: Address, timeout: float = 10) -> None:
        self._sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self._sock.settimeout(timeout)
        try:
            self._sock.connect(address)
        except OSError:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sock.close()

    def ask(self, request: bytes) -> Answer:
        """Send `request` and read its whole answer, which must have a Content-Length.

        Raises:
            OSError: the connection failed, closed early or stalled.
        """
        self._sock.sendall(request)
        received = self._read()
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._read()
        status, *lines = received[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = end + 4 + int(headers.get("content-length", 0))
        while len(received) < size:
            received += self._read()
        return Answer(int(status.split()[1]), headers, received[end + 4 :])

    def _read(self) -> bytes:
        chunk = self._sock.recv(65536)
        if not chunk:
            raise ConnectionError("the server closed the connection")
        return chunk
