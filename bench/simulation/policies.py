"""When a batch is sealed: ours, which is `batching.Pending` itself, and models of how others do it.

The models are of batching alone, with the lane free of everything else: no parsing, no hops between processes, nothing
that a peer does on the same cores. Windows and polls are of 5 ms. Each peer's queue is first come, first served.

Triton's `max_queue_delay_microseconds` may be 0, its default: then it binds late, as ours does, and the latency of ours
without deadlines is its latency too.
"""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from batching import Cost, DeadlineExceeded, Item, Pending, Policy, QueueFull

from .lane import Batching, Lane
from .workload import Request

WINDOW = 0.005


class Ours:
    """Sealed when the lane is free, never before; no timer.

    What the lane takes is learned from the batches that ran, and so is when it will be free.
    """

    def __init__(self, lane: Lane, capacity: int, fair: bool = False) -> None:
        self.lane = lane
        self._cost = Cost()
        policy = Policy(max_rows=lane.service.max_rows, capacity=capacity, fair=fair)
        self._pending: Pending[Request, None] = Pending(policy, self._cost)
        self._free_at = 0.0  # predicted
        self._ran: tuple[int, float] | None = None  # a batch's cost and seconds, not learned from yet

    def arrive(self, request: Request) -> float:
        now, deadline, client = request
        if self._ran and self.lane.free <= now:
            self._learn(self._ran)
        if self._pending.next_timer() <= now:
            self.lane.drop(len(self._pending.advance(now)))
        try:
            self._pending.push(Item(request, None, 1, (), now, deadline, client=client), self._free_at)
        except (QueueFull, DeadlineExceeded):
            self.lane.refuse()
        return self._due(now)

    def wake(self, now: float) -> float:
        if self._ran:
            self._learn(self._ran)
        self.lane.drop(len(self._pending.advance(now)))
        batch = self._pending.next_batch(now)
        if batch is not None:
            self._free_at = now + self._cost.seconds(batch.cost)
            self._ran = batch.cost, self.lane.run([item.payload for item in batch.items], now)
        return self._due(now)

    def _learn(self, ran: tuple[int, float]) -> None:
        self._cost.learn(*ran)
        self._ran = None

    def _due(self, now: float) -> float:
        return max(self.lane.free, now) if self._pending.rows else math.inf


class Peer:
    """One bounded queue, first come, first served: what the peers have in common.

    Attributes:
        margin: seconds before its deadline from which a request is dropped when its turn comes; None: all are run.
    """

    def __init__(self, lane: Lane, capacity: int, margin: float | None = None) -> None:
        self.lane = lane
        self.queue: deque[Request] = deque()
        self.capacity = capacity
        self.margin = margin

    def arrive(self, request: Request) -> float:
        if len(self.queue) < self.capacity:
            self.queue.append(request)
        else:
            self.lane.refuse()
        return self.due(request[0])

    def wake(self, now: float) -> float:
        raise NotImplementedError

    def due(self, now: float) -> float:
        raise NotImplementedError

    def full(self) -> bool:
        """Whether a full batch waits."""
        return len(self.queue) >= self.lane.service.max_rows

    def take(self, aboard: int = 0) -> list[Request]:
        """As much as a batch holds that has so many already."""
        popleft = self.queue.popleft
        return [popleft() for _ in range(min(len(self.queue), self.lane.service.max_rows - aboard))]

    def in_time(self, batch: list[Request], now: float) -> list[Request]:
        """Of a batch, what is still to be run."""
        if self.margin is None:
            return batch
        after = now + self.margin
        kept = [request for request in batch if request[1] > after]
        self.lane.drop(len(batch) - len(kept))
        return kept


class WindowFromEnqueue(Peer):
    """Sealed when the lane is free, and a full batch waits or the oldest has waited for the window: Triton.

    What is over its deadline is dropped as it is met, and the batch filled up from behind it.
    """

    def due(self, now: float) -> float:
        if not self.queue:
            return math.inf
        return max(self.lane.free, now if self.full() else self.queue[0][0] + WINDOW)

    def wake(self, now: float) -> float:
        batch: list[Request] = []
        while more := self.take(len(batch)):
            batch += self.in_time(more, now)
        if batch:
            self.lane.run(batch, now)
        return self.due(now)


class WindowFromDequeue(Peer):
    """The free lane takes the first request, and waits for others until a batch is full or the window is over.

    Mosec, LitServe and MLServer. What is over its deadline then is dropped from the batch, as in Mosec.
    """

    def due(self, now: float) -> float:
        if not self.queue:
            return math.inf
        opened = max(self.lane.free, self.queue[0][0])
        return max(opened, now) if self.full() else opened + WINDOW

    def wake(self, now: float) -> float:
        batch = self.in_time(self.take(), now)
        if batch:
            self.lane.run(batch, now)
        else:
            self.lane.free = now  # a new window
        return self.due(now)


class SleepPoll(Peer):
    """Sleeps for the window unless a full batch waits, and then commits all full batches, or all there is: batched."""

    def __init__(self, lane: Lane, capacity: int) -> None:
        super().__init__(lane, capacity)
        self._committed: deque[list[Request]] = deque()
        self._asleep = True
        self._until = WINDOW  # when it looks next, or would have looked if there had been anything

    def due(self, now: float) -> float:
        if not self._asleep:
            return self.lane.free
        if not self.queue:
            return math.inf
        if self._until < now:
            self._until += math.ceil((now - self._until) / WINDOW) * WINDOW
        return self._until

    def wake(self, now: float) -> float:
        if not self._committed:
            if not self._asleep and not self.full():
                self._asleep, self._until = True, now + WINDOW
                return self.due(now)
            self._asleep = False
            for _ in range(max(1, len(self.queue) // self.lane.service.max_rows)):
                self._committed.append(self.take())
        self.lane.run(self._committed.popleft(), now)
        return self.lane.free


class Ahead(Peer):
    """Sealed, with whatever there is, as long as fewer than `depth` batches wait for the lane.

    TEI: one, and the next as soon as that one has started. Infinity: five, of which three wait between its threads, one
    is in the hands of the thread that tokenises, and one is published; while there are that many, it looks every `poll`
    seconds whether there is room. Its pause of 5 ms after the model is left out.
    """

    def __init__(self, lane: Lane, capacity: int, depth: int, poll: float = 0.0) -> None:
        super().__init__(lane, capacity)
        self._sealed: deque[list[Request]] = deque()
        self._depth = depth
        self._poll = poll
        self._look = -math.inf  # while there was no room: when it looks again whether there is

    def due(self, now: float) -> float:
        if self.queue and self._look <= now and len(self._sealed) < self._depth:
            return now
        start = self.lane.free if self._sealed else math.inf
        return min(start, self._look) if self._look > now else start

    def wake(self, now: float) -> float:
        while True:
            while self.queue and self._look <= now and len(self._sealed) < self._depth:
                self._sealed.append(self.take())
            if self._poll and self._look <= now and len(self._sealed) >= self._depth:
                self._look = now + self._poll
            if not self._sealed or self.lane.free > now:
                return self.due(now)
            self.lane.run(self._sealed.popleft(), now)


class Row(NamedTuple):
    """A policy to compare.

    Attributes:
        build: makes it, in front of a lane, with room for so many requests.
    """

    label: str
    build: Callable[[Lane, int], Batching]


def _tuned(lane: Lane, capacity: int) -> Batching:
    """Triton's timeout is one of waiting. Here somebody has measured a full batch, and takes that off the deadline."""
    return WindowFromEnqueue(lane, capacity, lane.service.seconds(lane.service.max_rows))


POLICIES = {
    "ours": Row("late binding, no timer (Millrace)", Ours),
    "ours-fair": Row("late binding, fair shares (Millrace)", partial(Ours, fair=True)),
    "enqueue": Row("window from enqueue (Triton)", partial(WindowFromEnqueue, margin=0.0)),
    "enqueue-tuned": Row("window from enqueue, tuned timeout (Triton)", _tuned),
    "dequeue": Row("window from dequeue (Mosec, LitServe, MLServer)", partial(WindowFromDequeue, margin=0.0)),
    "poll": Row("sleep, then all that waits (batched)", SleepPoll),
    "ahead": Row("sealed one batch ahead (TEI)", partial(Ahead, depth=1)),
    "far-ahead": Row("sealed up to five ahead (Infinity)", partial(Ahead, depth=5, poll=WINDOW)),
}
