"""Time for tests: a clock that stands still, and a way to let the event loop do what it has to do."""

import asyncio
from collections.abc import Callable
from typing import Any


class Clock:
    """A monotonic clock that moves only when told."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Timers(Clock):
    """A clock that has the event loop's timers with it: they fire when a test lets time pass. `asyncio.sleep` too."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._handles: list[asyncio.TimerHandle] = []
        self._loop.call_later = self._call_later  # type: ignore[assignment,method-assign]

    @property
    def armed(self) -> list[float]:
        """When those that are armed will fire."""
        return sorted(handle.when() for handle in self._handles if not handle.cancelled())

    async def elapse(self, seconds: float) -> None:
        """Let `seconds` pass, and all that happens in them happen, each at its time."""
        end = self.now + seconds
        await settle()
        while self.armed and self.armed[0] <= end:
            handle = min(handle for handle in self._handles if not handle.cancelled())
            self._handles.remove(handle)
            self.now = max(self.now, handle.when())
            handle._run()
            await settle()
        self.now = end

    def _call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        self._handles.append(asyncio.TimerHandle(self.now + delay, callback, args, self._loop))
        return self._handles[-1]


class LoopTime:
    """The event loop's own time, ahead by what it is told: for `call_later`, `call_at` and `asyncio.timeout` alike."""

    def __init__(self) -> None:
        self._ahead = 0.0
        loop = asyncio.get_running_loop()
        real = loop.time
        loop.time = lambda: real() + self._ahead  # type: ignore[method-assign]

    async def elapse(self, seconds: float, steps: int = 50) -> None:
        """Let `seconds` pass, in steps, and all that happens in them happen."""
        for _ in range(steps):
            self._ahead += seconds / steps
            await settle()


async def settle() -> None:
    """Let everything that can run without waiting run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for `condition`, and fail when it has not come after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of many kinds, of threads too
            await asyncio.sleep(0.001)
