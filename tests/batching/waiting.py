"""What the tests of the queue build it from, and how they read what it sealed."""

import math
from typing import Any

from batching import Batch, Cost, Item, Pending, Policy

Waiting = Pending[str, None]


def item(name: str, rows: int = 1, bucket: object = "", at: float = 0.0, **more: Any) -> Item[str, None]:
    """One request; its name is its payload."""
    return Item(name, None, rows, bucket, at, **more)


def cost(a: float, b: float = 0.0) -> Cost:
    """A batch of n takes a + b n seconds."""
    known = Cost()
    known.a, known.b = a, b
    return known


def queue(
    *items: Item[str, None], costs: Cost | None = None, stacking: Cost | None = None, max_rows: int = 4, **knobs: Any
) -> Waiting:
    """A queue in which `items` wait. Batches take no time, nor does stacking them, unless these two say so."""
    pending: Waiting = Pending(Policy(max_rows, **knobs), costs, stacking)
    for each in items:
        pending.push(each)
    return pending


def names(items: list[Item[str, None]]) -> str:
    return "".join(each.payload for each in items)


def sealed(pending: Waiting, now: float = 0.0, drain: bool = False, free_at: float = -math.inf) -> Batch[str, None]:
    """The next batch, which is there."""
    batch = pending.next_batch(now, drain, free_at)
    assert batch is not None
    return batch


def leave(pending: Waiting, now: float = 0.0, drain: bool = False) -> list[str]:
    """The names in each of the batches that may leave now, one after the other."""
    batches = []
    while batch := pending.next_batch(now, drain):
        batches.append(names(batch.items))
    return batches


def assert_empty(pending: Pending[Any, None]) -> None:
    """What is not queued is nowhere."""
    assert len(pending) == pending.rows == pending.nbytes == 0
    assert pending.next_timer() == pending.head(0.0) == math.inf
    assert pending.next_batch(0.0, drain=True) is None
    assert pending.drain_seconds() == pending._rounds == pending._work == pending._promises == 0
    inside = (
        pending._line, pending._buckets, pending._families, pending._timers, pending._clients, pending._stale,
        pending._unsure, pending._ready, [waiting for waiting in pending._in_level if waiting],
    )  # fmt: skip
    assert not any(inside), inside
