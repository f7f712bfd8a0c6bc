"""What happened to a queue's batches and items: the figures that say why a batch was the size it was, and left when.

Written by the batcher, where a batch ends and where an item is refused, expires or is left by its caller, and nowhere
else. Bounded: histograms, and a ring of the latest batches.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Hashable
from typing import Any, NamedTuple

from .items import STAGES, Batch

# Upper bounds of the histograms' buckets, in seconds: 1, 2, 5 in each decade from 50 us to 10 s.
SECONDS = tuple(digit * 10.0**decade for decade in range(-5, 2) for digit in (1, 2, 5))[2:-2]

KEPT = 128  # batches in the ring


class Histogram:
    """Counts of observations by upper bound, the last one without any.

    Attributes:
        total: sum of all observations.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def report(self) -> dict[str, Any]:
        """Counts by upper bound, those of zero left out."""
        bounds = [*self.bounds, "more"]
        return {
            "count": sum(self.counts),
            "total": self.total,
            "up_to": {str(bound): count for bound, count in zip(bounds, self.counts, strict=True) if count},
        }


class Ended(NamedTuple):
    """One batch that ran. Times in seconds.

    Attributes:
        sealed: by the batcher's clock.
        waited: from its oldest item's push until it was sealed.
        padding: share of the work that was padding.
        split: whether it raised, and was run again in parts.
    """

    sealed: float
    items: int
    rows: int
    bucket: Hashable
    length: int
    padding: float
    reason: str
    waited: float
    predicted: float
    took: float
    split: bool


class Journal:
    """What happened so far.

    Attributes:
        sizes: batches by their rows.
        reasons: batches by why they were released.
        split: batches of several that raised, and were run again in parts.
        tokens, cost: work that was asked for, and that was done: the difference is padding.
        waits: of items, from push until their batch was sealed.
        times: of batches, from the lane's turn to them until their answers.
        left: callers who left, by how far their item had come.
        refused: items that were not queued, by the error's name.
        expired: items taken out because their deadline, or their level's timeout, was over.
        latest: the batches that ended last.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.reasons: dict[str, int] = {}
        self.split = 0
        self.tokens = 0
        self.cost = 0
        self.waits = Histogram(SECONDS)
        self.times = Histogram(SECONDS)
        self.left = dict.fromkeys(STAGES, 0)
        self.refused: dict[str, int] = {}
        self.expired = 0
        self.latest: deque[Ended] = deque(maxlen=KEPT)

    def ended(self, batch: Batch[Any, Any], took: float, split: bool) -> None:
        """A batch ran for `took` seconds."""
        sealed, rows, reason = batch.sealed, batch.rows, batch.reason
        self.sizes[rows] = self.sizes.get(rows, 0) + 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.split += split
        self.tokens += batch.tokens
        self.cost += batch.cost
        self.times.observe(took)
        counts, total, oldest = self.waits.counts, 0.0, 0.0
        enqueued, waited, bound = math.nan, 0.0, 0
        for item in batch.items:
            if item.enqueued != enqueued:  # many come together
                enqueued = item.enqueued
                waited = sealed - enqueued
                bound = bisect_left(SECONDS, waited)
                if waited > oldest:
                    oldest = waited
            counts[bound] += 1
            total += waited
        self.waits.total += total
        self.latest.append(
            Ended(
                sealed, len(batch.items), rows, batch.items[0].bucket, batch.length, 1 - batch.tokens / batch.cost,
                reason, oldest, batch.predicted, took, split,
            )
        )  # fmt: skip

    def was_refused(self, error: Exception, count: int = 1) -> None:
        """So many items were not queued because of `error`, or of its like."""
        name = type(error).__name__
        self.refused[name] = self.refused.get(name, 0) + count

    def report(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "batches": {
                "by_rows": {str(rows): count for rows, count in sorted(self.sizes.items())},
                "by_reason": dict(self.reasons),
                "split": self.split,
                "padding": 1 - self.tokens / self.cost if self.cost else 0.0,
                "seconds": self.times.report(),
                "latest": [{**batch._asdict(), "bucket": str(batch.bucket)} for batch in self.latest],
            },
            "items": {
                "wait_seconds": self.waits.report(),
                "left": dict(self.left),
                "refused": dict(self.refused),
                "expired": self.expired,
            },
        }
