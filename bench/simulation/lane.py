"""The one device, what it is measured by, and the clock that drives a policy in front of it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

import numpy as np

from .workload import CHUNK, Floats, Request


class Service(NamedTuple):
    """What a batch of n rows takes: fixed + per_row n seconds, times a factor of mean 1 that is lognormal.

    Attributes:
        noise: standard deviation of the factor's logarithm.
    """

    fixed: float = 0.004
    per_row: float = 0.0001
    max_rows: int = 32
    noise: float = 0.0

    def seconds(self, rows: int) -> float:
        return self.fixed + self.per_row * rows

    @property
    def capacity(self) -> float:
        """Most requests a second: full batches, one after the other."""
        return self.max_rows / self.seconds(self.max_rows)

    def factors(self, seed: int) -> Iterator[float]:
        """What the times of the batches are multiplied with, one after the other, without end."""
        if not self.noise:
            yield from repeat(1.0)
        rng = np.random.default_rng([seed, 3])
        while True:
            yield from rng.lognormal(-(self.noise**2) / 2, self.noise, CHUNK).tolist()


class Histogram:
    """Durations from a microsecond to a day, in bins that grow by 0.1 %: a quantile is exact to half of that."""

    LOW, HIGH, GROWTH = 1e-6, 1e5, 1.001

    def __init__(self) -> None:
        self._counts = np.zeros(math.ceil(math.log(self.HIGH / self.LOW, self.GROWTH)), np.int64)
        self._sum = 0.0

    def add(self, seconds: Floats) -> None:
        bins = (np.log(np.maximum(seconds, self.LOW) / self.LOW) / math.log(self.GROWTH)).astype(np.intp)
        size = len(self._counts)
        self._counts += np.bincount(np.minimum(bins, size - 1), minlength=size)
        self._sum += float(seconds.sum())

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    def mean(self) -> float:
        return self._sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The least duration that at least `share` of all do not exceed; nan if there are none."""
        if not self.count:
            return math.nan
        at = np.searchsorted(np.cumsum(self._counts), max(1, math.ceil(share * self.count)))
        return float(self.LOW * self.GROWTH ** (at + 0.5))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the requests; times in seconds.

    Attributes:
        offered: refused at the door, dropped later, or answered: each is one of these.
        in_time: answered by their deadlines.
        elapsed: from the first moment until all is done.
        busy: of that, how long the lane ran.
        demand, served: requests and answers of each client.
    """

    offered: int
    refused: int
    dropped: int
    answered: int
    in_time: int
    batches: int
    elapsed: float
    busy: float
    mean: float
    p99: float
    demand: tuple[int, ...]
    served: tuple[int, ...]

    @property
    def utilisation(self) -> float:
        return self.busy / self.elapsed

    @property
    def rows(self) -> float:
        """In a batch, in the mean."""
        return self.answered / self.batches if self.batches else math.nan


class Lane:
    """Runs one batch at a time, and counts what becomes of the requests.

    Attributes:
        free: when it has finished what it was given.
    """

    def __init__(self, service: Service, clients: int = 1, seed: int = 1) -> None:
        self.service = service
        self.free = 0.0
        self._factors = service.factors(seed)
        self._latencies: list[float] = []  # not yet in the histogram
        self._histogram = Histogram()
        self._served = [0] * clients
        self._refused = self._dropped = self._late = self._batches = 0
        self._busy = 0.0

    def run(self, batch: Sequence[Request], now: float) -> float:
        """Start a batch on the lane, which is free, and return the seconds that it takes."""
        seconds = self.service.seconds(len(batch)) * next(self._factors)
        self.free = done = now + seconds
        self._busy += seconds
        self._batches += 1
        self._latencies += [done - arrived for arrived, _, _ in batch]
        self._late += sum([done > deadline for _, deadline, _ in batch])
        served = self._served
        for _, _, client in batch:
            served[client] += 1
        if len(self._latencies) >= CHUNK:
            self._flush()
        return seconds

    def refuse(self) -> None:
        """A request was turned away as it came."""
        self._refused += 1

    def drop(self, count: int) -> None:
        """So many had been let in, and will not be run."""
        self._dropped += count

    def outcome(self, demand: Sequence[int], last: float) -> Outcome:
        """Of all, now that nothing waits any more; `last` is when the last of them arrived."""
        self._flush()
        answered = self._histogram.count
        return Outcome(
            offered=sum(demand),
            refused=self._refused,
            dropped=self._dropped,
            answered=answered,
            in_time=answered - self._late,
            batches=self._batches,
            elapsed=max(self.free, last),
            busy=self._busy,
            mean=self._histogram.mean(),
            p99=self._histogram.quantile(0.99),
            demand=tuple(demand),
            served=tuple(self._served),
        )

    def _flush(self) -> None:
        self._histogram.add(np.array(self._latencies))
        self._latencies.clear()


class Batching(Protocol):
    """A policy in front of a lane. Both of its methods say when it wants to be woken if nothing arrives before.

    What arrives at the very moment it is to be woken arrives first.
    """

    lane: Lane

    def arrive(self, request: Request) -> float:
        """`request` is here: queue it, or refuse it."""

    def wake(self, now: float) -> float:
        """The time has come: run a batch, or look again later."""


def simulate(batching: Batching, requests: Iterable[Request], clients: int = 1) -> Outcome:
    """Let all requests arrive, and everything that waits be served."""
    arrive, wake = batching.arrive, batching.wake
    due, now = math.inf, 0.0
    demand = [0] * clients
    for request in requests:
        now, _, client = request
        demand[client] += 1
        while due < now:
            due = wake(due)
        due = arrive(request)
    while due < math.inf:
        due = wake(due)
    return batching.lane.outcome(demand, now)
