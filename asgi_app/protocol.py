"""The uvicorn HTTP protocol class that the launcher names: uvicorn's own, with a bound on what a connection may cost.

uvicorn bounds neither a request's head, nor the time it takes, nor a connection that never says anything; and its bound
on connections answers those that are already inside. Plain uvicorn takes this class too, with
`--http asgi_app.protocol:Protocol`.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.settings import Settings


class Protocol(HttpToolsProtocol):
    """Refuses a connection above `max_connections`, a head above `max_head` bytes, and one that takes too long."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._settings: Settings = self.app_state.get("settings") or Settings()
        self._in_head = (
            True  # until the first request's headers are complete, and again from the first byte of the next
        )
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        limit = self._settings.max_connections
        if len(self.connections) > limit:
            self._refuse(b"503 Service Unavailable", f"the server has {limit} connections open, as many as it takes")
        else:
            self._head_timer = self.loop.call_later(self._settings.head_timeout, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes = self._head_bytes or 1  # it began in this piece, somewhere
        limit = self._settings.max_head
        if self._head_bytes > limit:
            self._refuse(b"431 Request Header Fields Too Large", f"the head is over {limit} bytes (MILLRACE_MAX_HEAD)")
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._settings.head_timeout, self._late)

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_done()
        super().on_headers_complete()

    def _head_done(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        if not self._head_bytes:
            self.transport.close()  # it never asked anything: there is nothing to answer
            return
        seconds = self._settings.head_timeout
        self._refuse(b"408 Request Timeout", f"the head was not complete after {seconds:g} s (MILLRACE_HEAD_TIMEOUT)")

    def _refuse(self, status: bytes, text: str) -> None:
        """Answer before there is a request, and close."""
        self._head_done()
        body = b'{"error":"%b"}' % text.encode()
        self.transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nretry-after: 1\r\n"
            b"connection: close\r\n\r\n%b" % (status, len(body), body)
        )
        self.transport.close()
