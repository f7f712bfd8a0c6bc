"""Link: frames in, each to its receiver, and frames out together."""

import asyncio

import pytest

from engine.ipc import frames
from engine.ipc.frames import Frame, Reader, Writer
from engine.ipc.link import Link


class Transport:
    """Writes down what is written to it."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.ended = ""

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


class Echo(Link):
    """Answers each CANCEL with an END, which is written with the rest."""

    def __init__(self) -> None:
        super().__init__("a test", 7, Reader(), Writer())
        self.heard: list[int] = []

    def hear(self, frame: Frame) -> None:
        self.heard.append(frame[3])
        self.wake()

    def write_rest(self) -> None:
        heard, self.heard = self.heard, []
        for about in heard:
            self.writer.write(frames.END, about)


Echo.receivers = {frames.CANCEL: Echo.hear}


def link() -> tuple[Echo, Transport]:
    made, transport = Echo(), Transport()
    made.connection_made(transport)
    return made, transport


def some(*kinds: int) -> bytes:
    writer = Writer()
    for about, kind in enumerate(kinds):
        writer.write(kind, about)
    return writer.take()


async def test_what_one_turn_writes_leaves_together() -> None:
    """However often it is woken, and whatever is written at the last moment."""
    made, transport = link()
    made.writer.write(frames.STALE, 9)
    made.data_received(some(frames.CANCEL, frames.CANCEL))
    assert transport.written == []
    await asyncio.sleep(0)
    (data,) = transport.written
    assert [(frame[0], frame[3]) for frame in Reader().feed(data)] == [
        (frames.STALE, 9), (frames.END, 0), (frames.END, 1),
    ]  # fmt: skip
    await asyncio.sleep(0)
    assert len(transport.written) == 1


@pytest.mark.parametrize(
    ("data", "reason"), [(some(frames.BEAT), "does not send frames of kind 23"), (b"x" * 100, "at most")]
)
async def test_what_is_not_expected_ends_it(data: bytes, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """The log says whose fault it is."""
    made, transport = link()
    made.data_received(data)
    assert transport.ended == "aborted"
    assert "a test, process 7: " in caplog.text
    assert reason in caplog.text


async def test_closing_sends_what_was_written() -> None:
    """Even what was to leave with this turn; after the end nothing is sent, and nothing raises."""
    made, transport = link()
    made.writer.write(frames.END, 1)
    made.close()
    assert (len(transport.written), transport.ended) == (1, "closed")
    made.connection_lost(None)
    made.writer.write(frames.END, 2)
    made.wake()
    made.close()
    made.abort()
    await asyncio.sleep(0)
    assert len(transport.written) == 1
