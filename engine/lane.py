"""One inference coroutine per device: it takes the next ready batch of all models on that device.

The lane seals a batch only when it is free to run it, so whatever arrives until then gets aboard (late binding). It
takes the queue whose oldest item is the oldest, sleeps without a timer when none has any, and with one timer when all
of them wait for a configured delay.

A model runs either inline, on the event loop, or in the lane's one thread; `call` does the latter. Inline is for models
that were measured to be shorter than a thread switch is worth: see LocalEngine.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from batching import Batcher

from .errors import NotReady

T = TypeVar("T")

logger = logging.getLogger("millrace")


class Lane:
    """The batchers that share a device, and the one coroutine that drains them."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._clock = clock
        self._batchers: list[Batcher[Any, Any]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"lane-{name}")
        self._task: asyncio.Task[None] | None = None
        self._sleep: asyncio.Future[None] | None = None  # set while the coroutine has nothing to do
        self._busy_since = math.inf
        self._stopping = False

    def attach(self, batcher: Batcher[Any, Any]) -> None:
        self._batchers.append(batcher)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._serve(), name=f"lane-{self.name}")
        self._task.add_done_callback(self._ended)

    def wake(self) -> None:
        """Something was queued."""
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)

    def alive(self, stuck_after: float) -> bool:
        """Whether the coroutine runs and no batch has been on the device for more than `stuck_after` seconds."""
        return self._task is not None and not self._task.done() and self._clock() - self._busy_since <= stuck_after

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run `function` in the lane's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def stop(self) -> None:
        """Run what is queued, then end the coroutine and the thread."""
        self._stopping = True
        self.wake()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._thread.shutdown(wait=False)

    async def _serve(self) -> None:
        while True:
            chosen, ready_at = None, math.inf
            for batcher in self._batchers:
                at = batcher.pending.ready_at()
                if at < ready_at:
                    chosen, ready_at = batcher, at
            now = self._clock()
            if chosen is not None and ready_at <= now:
                self._busy_since = now
                await chosen.drain()
                self._busy_since = math.inf
                # An inline model never suspends: let the loop read the sockets, so that the next batch is not smaller
                # than it could be, and nobody waits for more than one batch to be heard.
                await asyncio.sleep(0)
            elif chosen is None and self._stopping:
                return
            else:
                await self._rest(ready_at)

    async def _rest(self, until: float) -> None:
        """Sleep until woken, or until the clock says `until`."""
        loop = asyncio.get_running_loop()
        self._sleep = loop.create_future()
        timer = None if until == math.inf else loop.call_later(until - self._clock(), self.wake)
        try:
            await self._sleep
        finally:
            self._sleep = None
            if timer is not None:
                timer.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("the lane of %s died: nothing on it will be served any more", self.name, exc_info=error)
            for batcher in self._batchers:
                batcher.close(lambda: NotReady(f"the inference lane of {self.name} died; restart the process"))
