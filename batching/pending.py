"""What waits for one model, and what goes next.

This file alone decides which items share a batch, in which order, and when a batch may be sealed. It knows no clock
(time is an argument, in monotonic seconds), no event loop, no tensor and no answer: `Item.answer` is the batcher's.

An item is queued by `push` and leaves the queue in exactly one of three ways:

    push ──> queued ──> sealed     next_batch: it is part of a batch, its batcher owes it an answer
                    ├─> expired    expire: its deadline passed, the model must not run for it
                    └─> forgotten  forget: its caller left; it takes up no room from this moment on

Rules.
1. Items of equal `bucket` may share a batch. An item whose bucket is None goes alone.
2. A bucket is first come, first served. The bucket whose oldest item is the oldest of all goes next, so that no shape
   starves another; but a bucket that can fill a batch does not wait for `max_delay`.
3. A batch holds at most `max_rows` rows; an item is never split.
4. Without `max_delay` whatever waits may be sealed at once: how late that happens is for the caller to decide, and
   the later the better, since what arrives until then still gets aboard. With it, a batch that is not full waits until
   its oldest item is `max_delay` old, counted from `push`.
5. `rows` counts the queued rows exactly. Items that expired or were forgotten are only marked, and dropped when they
   come to the head of their bucket, or all at once when they outnumber the capacity: nothing is ever searched for in
   the middle of a queue, and a queue whose callers come and go does not grow.
"""

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from .errors import DeadlineExceeded, QueueFull

P = TypeVar("P")  # payload: what the model is given for an item
A = TypeVar("A")  # answer: where the item's caller waits


@dataclass(frozen=True, slots=True)
class Policy:
    """How a model's requests are batched.

    Attributes:
        max_rows: most rows of a batch, and of an item.
        max_delay: seconds a batch that is not full waits for company, from its oldest item's push. 0: never.
        capacity: most rows that may wait.
    """

    max_rows: int
    max_delay: float = 0.0
    capacity: int = 1024

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {self.max_rows}")
        if not 0 <= self.max_delay < math.inf:
            raise ValueError(f"max_delay must be a number of seconds, at least 0, got {self.max_delay}")
        if self.capacity < self.max_rows:
            raise ValueError(f"capacity ({self.capacity} rows) must hold at least one batch ({self.max_rows} rows)")


@dataclass(slots=True, eq=False)
class Item(Generic[P, A]):
    """One request in the queue.

    Attributes:
        rows: 1 to max_rows.
        bucket: items of equal buckets may share a batch; None goes alone.
        enqueued: when it was pushed.
        deadline: when it is too late to start the model for it; math.inf if never.
        queued: False once it was sealed, expired or forgotten.
    """

    payload: P
    answer: A
    rows: int
    bucket: Hashable
    enqueued: float
    deadline: float = math.inf
    queued: bool = True


@dataclass(slots=True)
class _Bucket(Generic[P, A]):
    items: deque[Item[P, A]] = field(default_factory=deque)
    rows: int = 0  # of the queued ones


Batch = list[Item[P, A]]


class Pending(Generic[P, A]):
    """The queue of one model. Not thread-safe: one task owns it."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.rows = 0
        self._buckets: dict[Hashable, _Bucket[P, A]] = {}
        # (deadline, number, item) of items that have one; those no longer queued are dropped when they surface.
        self._deadlines: list[tuple[float, int, Item[P, A]]] = []
        self._pushes = 0
        self._marked = 0

    def push(self, item: Item[P, A], retry_after: float = 0.0) -> None:
        """Queue `item`.

        Raises:
            QueueFull: its rows do not fit; `retry_after` is passed on in it.
            DeadlineExceeded: its deadline is over already.
        """
        if item.deadline <= item.enqueued:
            raise DeadlineExceeded("the deadline passed before the request reached the queue")
        if self.rows + item.rows > self.policy.capacity:
            raise QueueFull(
                f"the queue is full: {self.rows} of {self.policy.capacity} rows wait, no room for {item.rows} more",
                retry_after,
            )
        if max(self._marked, len(self._deadlines) // 2) > self.policy.capacity:
            self._compact()
        bucket = self._buckets.get(item.bucket)
        if bucket is None:
            bucket = self._buckets[item.bucket] = _Bucket()
        bucket.items.append(item)
        bucket.rows += item.rows
        self.rows += item.rows
        if item.deadline != math.inf:
            self._pushes += 1
            heappush(self._deadlines, (item.deadline, self._pushes, item))

    def forget(self, item: Item[P, A]) -> bool:
        """Take an item out because its caller left. False if it was not queued any more."""
        if item.queued:
            self._mark(item)
            return True
        return False

    def expire(self, now: float) -> Batch[P, A]:
        """Take out, and return, every item whose deadline is `now` or earlier."""
        expired: Batch[P, A] = []
        heap = self._deadlines
        while heap and (heap[0][0] <= now or not heap[0][2].queued):
            item = heappop(heap)[2]
            if item.queued:
                self._mark(item)
                expired.append(item)
        return expired

    def next_deadline(self) -> float:
        """The earliest deadline of a queued item, math.inf if none has one."""
        heap = self._deadlines
        while heap and not heap[0][2].queued:
            heappop(heap)
        return heap[0][0] if heap else math.inf

    def ready_at(self) -> float:
        """When the next batch may be sealed: in the past if it may be now, math.inf if nothing waits.

        Among several queues, the one with the smallest value is the one whose turn it is.
        """
        return self._next()[1]

    def next_batch(self) -> Batch[P, A]:
        """Seal the next batch and return it, oldest item first; empty if nothing waits.

        Whoever has deadlines calls `expire` first: what is left in the queue then is worth running.
        """
        batch: Batch[P, A] = []
        bucket = self._next()[0]
        if bucket is None:
            return batch
        items, rows = bucket.items, 0
        while items:
            item = items[0]
            if item.queued:
                if rows + item.rows > self.policy.max_rows or (rows and item.bucket is None):
                    break
                item.queued = False
                rows += item.rows
                batch.append(item)
            items.popleft()
        bucket.rows -= rows
        self.rows -= rows
        return batch

    def _next(self) -> tuple[_Bucket[P, A] | None, float]:
        """The bucket whose turn it is, a queued item at its head, and when it may be sealed. Drops empty buckets."""
        chosen: _Bucket[P, A] | None = None
        chosen_at = math.inf
        empty: list[Hashable] = []
        for key, bucket in self._buckets.items():
            if not bucket.rows:
                empty.append(key)
                continue
            items = bucket.items
            while not items[0].queued:
                items.popleft()
            at = items[0].enqueued
            if key is not None and bucket.rows < self.policy.max_rows:
                at += self.policy.max_delay
            if at < chosen_at:
                chosen, chosen_at = bucket, at
        for key in empty:
            del self._buckets[key]
        return chosen, chosen_at

    def _mark(self, item: Item[P, A]) -> None:
        """Count an item out, and leave it where it is."""
        item.queued = False
        self.rows -= item.rows
        self._buckets[item.bucket].rows -= item.rows
        self._marked += 1

    def _compact(self) -> None:
        """Let go of every item that is only marked, and of the deadlines of those that were sealed long before."""
        for bucket in self._buckets.values():
            bucket.items = deque(item for item in bucket.items if item.queued)
        self._deadlines = [entry for entry in self._deadlines if entry[2].queued]
        heapify(self._deadlines)
        self._marked = 0
