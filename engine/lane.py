"""One inference coroutine per device: it takes the most urgent batch of all models on that device.

The lane seals a batch only when it is free to run it, so whatever arrives until then gets aboard (late binding). Where
stacking a batch takes long, it is sealed that much earlier, when the lane is expected to be free by the time it is
stacked. With nothing to run the lane sleeps, and has no timer of its own.

A model runs either inline, on the event loop, or in the lane's one thread; `call` does the latter. Inline is for models
that were measured to be shorter than a thread switch is worth: see LocalModel.warm.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, TypeVar

from batching import Batch, Batcher
from batching.pending import WORTH_PREPARING

from .errors import NotReady

T = TypeVar("T")
# The lane in whose coroutine the caller is: whoever runs a batch for it uses what belongs to this lane.
CURRENT: ContextVar["Lane"] = ContextVar("CURRENT")

_Job = tuple[asyncio.Future[Any], Callable[..., object], tuple[object, ...]]
_Sealed = tuple[Batcher[Any, Any], Batch[Any, Any]]

logger = logging.getLogger("millrace")


class Lane:
    """The batchers that share a device, and the one coroutine that runs their batches.

    Attributes:
        free_at: when what was sealed is expected to be done; in the past if nothing runs.
        lost: why nothing on it will be served any more, whatever comes; empty while that is not so.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """To be made on a running event loop, which it stays with."""
        # For life.
        self.name = name
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._batchers: list[Batcher[Any, Any]] = []
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        # A daemon: a model that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"lane-{name}", daemon=True)
        self._task: asyncio.Task[None] | None = None
        # Now.
        self.free_at = -math.inf
        self._ahead: _Sealed | None = None  # the batch that is stacked while another one runs
        self._stacking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None  # for sealing the next batch
        self._sleep: asyncio.Future[None] | None = None  # set while the coroutine has nothing to do
        self._busy_since = math.inf
        self._stopping = False
        self.lost = ""

    def attach(self, batcher: Batcher[Any, Any]) -> None:
        self._batchers.append(batcher)

    def detach(self, batcher: Batcher[Any, Any]) -> None:
        """It has nothing to run any more, and never will."""
        self._batchers.remove(batcher)

    def start(self) -> None:
        self._thread.start()
        self._task = self._loop.create_task(self._serve(), name=f"lane-{self.name}")
        self._task.add_done_callback(self._ended)

    def wake(self) -> None:
        """Something was queued."""
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)

    @property
    def busy(self) -> bool:
        """Whether a batch runs."""
        return self._busy_since != math.inf

    def alive(self, stuck_after: float) -> bool:
        """Whether the coroutine runs and no batch has been on the device for more than `stuck_after` seconds."""
        if self.lost or self._task is None or self._task.done():
            return False
        return self._clock() - self._busy_since <= stuck_after

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run `function` in the lane's thread. If the caller is cancelled, its result is dropped."""
        answer: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((answer, function, arguments))
        try:
            return await answer
        finally:  # an error's traceback holds this frame, which must not hold the error
            del answer, arguments

    def lose(self, reason: str) -> None:
        """The device is beyond repair: nobody waits for it any more, and the lane is not alive."""
        logger.critical("the lane of %s ends: %s", self.name, reason)
        self.lost = reason
        self._close(reason)

    async def stop(self, seconds: float, *last: Callable[[], object]) -> None:
        """Run what is queued, then end; after `seconds` answer what is left with NotReady, and end all the same.

        `last` is called in the lane's thread before that ends, unless it is stuck.
        """
        self._stopping = True
        self.wake()
        if self._task is not None:
            done, _ = await asyncio.wait([self._task], timeout=seconds)
            if not done:
                logger.critical("the lane of %s is stuck in a batch; the process ends without it", self.name)
                self._close("the service is shutting down")
                self._task.cancel()
                await asyncio.wait([self._task])
            elif last:
                await asyncio.wait([self._loop.create_task(self._call_each(last))], timeout=seconds)
        self._jobs.put(None)

    async def _call_each(self, functions: Sequence[Callable[[], object]]) -> None:
        for function in functions:
            try:
                await self.call(function)
            except Exception:
                logger.exception("the lane of %s: closing failed", self.name)

    async def _serve(self) -> None:
        CURRENT.set(self)
        while True:
            sealed, self._ahead = self._ahead or self._seal(), None
            if sealed is not None:
                await self._run(*sealed)
                # An inline model never suspends: let the loop read the sockets, so that the next batch is not smaller
                # than it could be, and nobody waits for more than one batch to be heard.
                await asyncio.sleep(0)
            elif self._stopping:
                return
            else:
                self._sleep = self._loop.create_future()
                await self._sleep
                self._sleep = None

    def _seal(self) -> _Sealed | None:
        """The most urgent batch of all models."""
        batchers = self._batchers
        if len(batchers) > 1:
            batchers = sorted(batchers, key=lambda batcher: batcher.urgency(self._stopping))
        for batcher in batchers:
            batch = batcher.seal(self._stopping)
            if batch is not None:
                return batcher, batch
        return None

    async def _run(self, batcher: Batcher[Any, Any], batch: Batch[Any, Any]) -> None:
        self._busy_since = self._clock()
        if self._stacking is not None:
            await self._stacking
            self._stacking = None
        self.free_at = self._clock() + batch.expected
        stacking = max([other.stacking for other in self._batchers], default=0.0)
        if stacking:
            self._timer = self._loop.call_later(max(0.0, batch.expected - stacking), self._seal_ahead)
        try:
            await batcher.run(batch)
        finally:
            self._busy_since = math.inf
            self.free_at = self._clock() + self._ahead[1].expected if self._ahead is not None else -math.inf
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _seal_ahead(self) -> None:
        """Stack the most urgent batch, if that takes as long as it is until the lane is free; else look again then."""
        self._timer = None
        batcher = min(self._batchers, key=lambda batcher: batcher.urgency(self._stopping))
        if not batcher.stacking:
            return
        early = self.free_at - self._clock() - batcher.stacking
        if early > WORTH_PREPARING:
            self._timer = self._loop.call_later(early, self._seal_ahead)
            return
        batch = batcher.seal(self._stopping)
        if batch is not None:
            self._ahead = batcher, batch
            self.free_at = max(self.free_at, self._clock() + batch.stacking) + batch.predicted
            self._stacking = self._loop.create_task(batcher.prepare(batch))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            answer, function, arguments = job
            try:
                outcome: tuple[object, BaseException | None] = function(*arguments), None
            except StopIteration as error:  # a future does not take it
                outcome = None, RuntimeError(f"{function} raised {error!r}")
            except BaseException as error:
                outcome = None, error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                self._loop.call_soon_threadsafe(_resolve, answer, *outcome)
            del job, answer, function, arguments, outcome  # else they live until the next job comes

    def _ended(self, task: asyncio.Task[None]) -> None:
        """However the coroutine ended, nobody is left waiting for it, now or later."""
        error = None if task.cancelled() else task.exception()
        if self._stopping and error is None:
            self._close("the service is shutting down")
            return
        logger.critical("the lane of %s died: nothing on it will be served any more", self.name, exc_info=error)
        self.lost = f"the inference lane of {self.name} died; restart the process"
        self._close(self.lost)

    def _close(self, reason: str) -> None:
        for batcher in self._batchers:
            batcher.close(lambda: NotReady(reason))


def _resolve(answer: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)
