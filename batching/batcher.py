"""The queue of one model, with callers on one side and the model's runner on the other.

`submit` is awaited by any number of callers; `drain` by one task, the lane, once for each batch. Both run on one event
loop: there is no lock. Every submitted item gets exactly one answer, whatever happens to its batch:

    the model answers it      its result
    the model fails           its error, after it failed alone too: a batch of several that raises is run again item by
                              item, once, so that a bad item does not take the good ones with it
    its deadline passes       DeadlineExceeded, from a timer, not only when the lane next looks
    its caller is cancelled   nothing: its rows leave the queue at once, or its result is dropped
    the queue is closed       the error given to `close`
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

from .errors import DeadlineExceeded
from .pending import Batch, Item, Pending, Policy

P = TypeVar("P")
R = TypeVar("R")

# One result, or the exception that stands for it, for each payload in turn. If it raises, all of them failed together.
Run = Callable[[Sequence[P]], Awaitable[Sequence[R | Exception]]]


class Batcher(Generic[P, R]):
    """Dynamic batching for one model.

    Attributes:
        pending: what waits. To be read; only this batcher changes it.
        sizes: number of batches run, by their rows.
        service: exponentially weighted mean of the seconds a row takes, by rows; 0 before the first batch.
    """

    def __init__(
        self,
        policy: Policy,
        run: Run[P, R],
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """To be made on a running event loop, which it stays with.

        `wake` is called whenever an item was queued: whoever drains may have something to do.
        """
        # For life.
        self._loop = asyncio.get_running_loop()  # each call of that is a system call in Python 3.11
        self._run = run
        self._wake = wake
        self._clock = clock
        # What waits.
        self.pending: Pending[P, asyncio.Future[R]] = Pending(policy)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._closed: Callable[[], Exception] | None = None
        # What was.
        self.sizes: dict[int, int] = {}
        self.service = 0.0

    async def submit(self, payload: P, rows: int = 1, bucket: Hashable = (), deadline: float = math.inf) -> R:
        """Queue `payload` and wait for its result.

        Args:
            rows: what it counts for in a batch, 1 to the policy's max_rows.
            bucket: payloads of equal buckets may share a batch; None goes alone.
            deadline: clock seconds after which the model must not be started for it.

        Raises:
            QueueFull: at once, there is no room.
            DeadlineExceeded: the deadline passed while it waited.
            Exception: whatever the model raised for it.
        """
        if self._closed is not None:
            raise self._closed()
        if not 1 <= rows <= self.pending.policy.max_rows:
            raise ValueError(f"rows must be 1 to {self.pending.policy.max_rows}, got {rows}")
        answer: asyncio.Future[R] = self._loop.create_future()
        item = Item(payload, answer, rows, bucket, self._clock(), deadline)
        self.pending.push(item, self.pending.rows * self.service)
        if deadline != math.inf:
            self._watch_deadlines()
        self._wake()
        try:
            return await answer
        except asyncio.CancelledError:
            # False if it was sealed: then its answer may have come in the same turn, and nobody will look at it.
            if not self.pending.forget(item) and answer.done() and not answer.cancelled():
                answer.exception()
            raise

    async def drain(self) -> None:
        """Seal the next batch, run it, answer its items. Returns at once if nothing waits; raises no Exception."""
        started = self._clock()
        if self._timer is not None:
            self._expire(started)
        batch = self.pending.next_batch()
        if not batch:
            return
        results: Sequence[R | Exception]
        try:
            try:
                results = await self._run([item.payload for item in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"{len(results)} results for a batch of {len(batch)} items")
            except Exception as error:
                results = [error] if len(batch) == 1 else await self._run_alone(batch)
        except BaseException:
            # The task that drains is being ended. These have left the queue: nobody else will answer them.
            for item in batch:
                _fail(item, self._closed() if self._closed else RuntimeError("the batch was interrupted"))
            raise
        rows = 0
        for item, result in zip(batch, results, strict=True):
            rows += item.rows
            if isinstance(result, Exception):
                _fail(item, result)
            elif not item.answer.done():
                item.answer.set_result(result)
        per_row = (self._clock() - started) / rows
        # Full batches count most: it is in front of a full queue that somebody asks.
        weight = 0.2 * rows / self.pending.policy.max_rows if self.service else 1
        self.service += weight * (per_row - self.service)
        self.sizes[rows] = self.sizes.get(rows, 0) + 1

    def close(self, error: Callable[[], Exception]) -> None:
        """Answer everything that waits with an `error()`, and every later submit.

        One of its own for each: an exception keeps the traceback of every place where it was ever raised.
        """
        self._closed = error
        if self._timer is not None:
            self._timer.cancel()
        while batch := self.pending.next_batch():
            for item in batch:
                _fail(item, error())

    async def _run_alone(self, batch: Batch[P, asyncio.Future[R]]) -> list[R | Exception]:
        """Run the items of a batch that failed one by one, but for those whose callers left meanwhile."""
        results: list[R | Exception] = []
        for item in batch:
            if item.answer.done():
                results.append(asyncio.InvalidStateError("the caller left"))
                continue
            try:
                (result,) = await self._run([item.payload])
            except Exception as error:
                result = error
            results.append(result)
        return results

    def _expire(self, now: float) -> None:
        for item in self.pending.expire(now):
            _fail(item, DeadlineExceeded("the deadline passed while the request waited in the queue"))

    def _watch_deadlines(self) -> None:
        """Arm the one timer for the earliest deadline."""
        deadline = self.pending.next_deadline()
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline != math.inf:
            self._timer_at = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - self._clock()), self._on_deadline)

    def _on_deadline(self) -> None:
        self._timer = None
        self._expire(self._clock())
        self._watch_deadlines()


def _fail(item: Item[P, asyncio.Future[R]], error: Exception) -> None:
    if not item.answer.done():
        item.answer.set_exception(error)
