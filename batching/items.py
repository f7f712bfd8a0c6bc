"""What waits in a queue, and what leaves it together."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

# Where an item may be when its caller leaves. Only large batches are prepared (stacked) ahead of the lane's being free.
STAGES = ("queued", "preparing", "sealed", "running", "answered")

P = TypeVar("P")  # payload: what the model is given for an item
A = TypeVar("A")  # answer: where the item's caller waits
R_contra = TypeVar("R_contra", contravariant=True)  # result: what the model gives for an item


class Answer(Protocol[R_contra]):
    """Where an item's result goes, once: an `asyncio.Future` is one.

    It is set while the batcher is in the middle of something: whoever is told must not raise, nor call the batcher.
    """

    def done(self) -> bool:
        """Whether nothing more is wanted: it was set, or the caller left."""
        ...

    def set_result(self, result: R_contra, /) -> None: ...

    def set_exception(self, exception: BaseException, /) -> None: ...


@dataclass(slots=True, eq=False)
class Item(Generic[P, A]):
    """One request in the queue.

    Attributes:
        rows: 1 to max_rows.
        bucket: items of equal buckets may share a batch; None goes alone.
        enqueued: when it is pushed.
        deadline: when it is too late for an answer; math.inf if never.
        length: of each row, in the model's own units (tokens); 1 where all rows are alike.
        nbytes: memory that it holds while it waits.
        priority: 1 is the highest; 0 for the policy's default.
        timeout: seconds that it may wait, where its level lets it say so; 0 for the level's own.
        client: whose fair share it counts against.
        boarding: called with its answer right before a batch with it is run, once, if it is not answered by then. It
            must not raise.
        queued: whether it waits; False before `push` and once it was sealed, late or forgotten.
        timed_out: whether its level's timeout, not its deadline, made it late.
    """

    payload: P
    answer: A
    rows: int
    bucket: Hashable
    enqueued: float
    deadline: float = math.inf
    length: int = 1
    nbytes: int = 0
    priority: int = 0
    timeout: float = 0.0
    client: Hashable = None
    boarding: Callable[[Any], None] | None = None
    queued: bool = field(default=False, init=False)
    timed_out: bool = field(default=False, init=False)
    # Kept by Pending: its place in line, its bucket, its timers, when its batch should be done, why it cannot wait.
    _entry: Any = field(default=None, init=False)
    _home: Any = field(default=None, init=False)
    _timers: Any = field(default=(), init=False)
    _until: float = field(default=math.inf, init=False)
    _ripe: str = field(default="", init=False)


@dataclass(slots=True)
class Batch(Generic[P, A]):
    """What `next_batch` sealed, and why.

    Attributes:
        items: in the order of the line.
        rows: of all items.
        length: what each row is padded to.
        padded_rows: what the rows are padded to.
        tokens: rows times length, summed over the items: the work that was asked for.
        cost: padded_rows times length: the work that is done.
        reason: "full", "preferred", "delay", "deadline" (one of its items could not have waited, or stood no more
            company), "free" (the lane was) or "drain".
        sealed: when.
        predicted: seconds that it should take.
        expected: seconds that the lane should be busy with it: the same, and stacking, unless that was done before.
        stacking: seconds that stacking should take, where it is worth doing while another batch runs; else 0.
        stage: how far it has come, one of STAGES; an item that is in no batch is "queued" or "answered".
        prepared: what the runner made of it ahead of time, if it did.
    """

    items: list[Item[P, A]]
    rows: int
    length: int
    padded_rows: int
    tokens: int
    cost: int
    reason: str
    sealed: float
    predicted: float
    expected: float
    stacking: float = 0.0
    stage: str = "sealed"
    prepared: object = None
