"""Link: what the two ends of a connection have in common: frames in, and frames out together."""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from .frames import Frame, FrameError, Reader, Writer

logger = logging.getLogger("millrace")


class Link(asyncio.Protocol):
    """One end of a connection.

    Attributes:
        receivers: kind of frame -> what takes it. A frame of another kind is a FrameError.
        peer: what is at the other end, "a worker", and its process id, for the log.
        writer: the frames that were written, and not sent yet.
        flushing: whether they are sent with this turn of the loop anyway.
    """

    receivers: ClassVar[Mapping[int, Callable[[Any, Frame], None]]] = {}

    def __init__(self, peer: str, pid: int, reader: Reader, writer: Writer) -> None:
        self.pid = pid
        self.writer = writer
        self.flushing = False
        self._peer = peer
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.wake()

    def data_received(self, data: bytes) -> None:
        try:
            self.receive(self._reader.feed(data))
        except FrameError as error:
            self.end(error)

    def receive(self, frames: list[Frame]) -> None:
        """Raises FrameError."""
        for frame in frames:
            receiver = self.receivers.get(frame[0])
            if receiver is None:
                raise FrameError(f"it does not send frames of kind {frame[0]}")
            receiver(self, frame)

    def end(self, error: FrameError) -> None:
        """Nothing that comes from now on can be trusted."""
        logger.error("%s, process %d: %s; the connection is closed", self._peer, self.pid, str(error))
        self.abort()

    def abort(self) -> None:
        """Close at once, as a process that is killed does."""
        if self._transport is not None:
            self._transport.abort()

    def let_go(self) -> None:
        """In a child of this process: the connection is its parent's alone."""
        if self._transport is not None:
            os.close(self._transport.get_extra_info("socket").fileno())

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def close(self) -> None:
        """When everything that was written is sent."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def wake(self) -> None:
        """There are frames to send: with this turn of the loop, all of them in one write."""
        if not self.flushing:
            self.flushing = True
            self._loop.call_soon(self._flush)

    def write_rest(self) -> None:
        """Write what was kept to be written together."""

    def _flush(self) -> None:
        self.flushing = False
        self.write_rest()
        if self._transport is not None and self.writer.nbytes:
            self._transport.write(self.writer.take())
