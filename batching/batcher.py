"""The queue of one model, with callers on one side and the lane that runs the model on the other.

`submit` is awaited by any number of callers; `enqueue` is for those that wait in a way of their own. The lane seals a
batch when it is about to be free, and runs it. All live on one event loop: there is no lock. Every item in the queue
gets exactly one answer, whatever happens to its batch:

    the model answers it      its result
    the model fails           its error, after it failed alone too: a batch that raises is halved, and its halves are
                              run again, until only what is guilty is left
    memory runs out           the same, and no batch is made as large again, until many have fitted
    its deadline passes       DeadlineExceeded, from a timer, not only when the lane next looks
    its caller is cancelled   nothing: its rows leave the queue at once, or its result is dropped
    the queue is closed       the error given to `close`
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from .cost import Cost
from .errors import DeadlineExceeded, OutOfMemory, QueueFull
from .items import Answer, Batch, Item
from .journal import Journal
from .pending import Pending
from .policy import Policy

# Batches that fit after which a larger one is tried again, once memory ran out; twice as many after each time it does.
RETRY_AFTER = 128

P = TypeVar("P")
R = TypeVar("R")
P_contra = TypeVar("P_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class Counts(Protocol):
    """Who counts what becomes of requests. Moments are by the batcher's clock."""

    def ran(self, items: Sequence[Item[Any, Any]], results: Sequence[object] | None, started: float) -> None:
        """The model ran on a batch since `started`: its items' results, or exceptions in their place.

        None: it raised for all of them together, and its halves are run again.
        """
        ...

    def lost(self, reason: str, seconds: float) -> None:
        """An item was not run, so many seconds after it came: "REJECTED" for its time, "CANCELED" by its caller."""
        ...


class Runner(Protocol[P_contra, R_co]):
    """Whoever runs the model on a batch.

    Attributes:
        preparation: what `prepare` takes, by the batch's cost.
    """

    preparation: Cost

    async def prepare(self, payloads: Sequence[P_contra], rows: int, length: int) -> object:
        """Stack a batch, padded to `rows` rows of `length`, while another one runs. What it returns goes to `run`."""
        ...

    async def run(
        self, payloads: Sequence[P_contra], rows: int, length: int, prepared: object = None
    ) -> Sequence[R_co | Exception]:
        """One result, or the exception that stands for it, for each payload in turn.

        If it raises, all of them failed together. OutOfMemory says that fewer might not.
        """
        ...


class Batcher(Generic[P, R]):
    """Dynamic batching for one model.

    Attributes:
        pending: what waits. To be read; only this batcher changes it.
        journal: what happened so far.
        runner: who runs the batches.
        stacking: seconds that stacking the latest batch should take, where it is worth doing ahead of time; else 0.
    """

    def __init__(
        self,
        policy: Policy,
        runner: Runner[P, R],
        wake: Callable[[], None],
        free_at: Callable[[], float] = lambda: -math.inf,
        clock: Callable[[], float] = time.monotonic,
        counts: Counts | None = None,
    ) -> None:
        """To be made on a running event loop, which it stays with.

        `wake` is called whenever a batch may have become ready: whoever seals may have something to do. `free_at` says
        when the lane is expected to be free: any time in the past if it is.
        """
        # For life.
        self._loop = asyncio.get_running_loop()  # each call of that is a system call in Python 3.11
        self.runner = runner
        self._wake = wake
        self._free_at = free_at
        self._clock = clock
        self._counts = counts
        # What came in this turn of the event loop, all with the same `_alike`, and is queued before anybody looks.
        self._answers: list[Answer[R]] = []
        self._payloads: list[P] = []
        self._alike: tuple[Any, ...] = ()
        # What waits, and what is under way: the batch that runs, and one that is prepared meanwhile.
        self.pending: Pending[P, Answer[R]] = Pending(policy, None, runner.preparation)
        self._largest = self.pending.largest  # as it was before memory ever ran out
        self._failed = 0  # the largest that ran out
        self._fitted = 0  # batches that fitted since the bound was last moved
        self._retry_after = RETRY_AFTER // 2
        self.stacking = 0.0
        self._flights: list[Batch[P, Answer[R]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._closed: Callable[[], Exception] | None = None
        # Where answers keep the order of their questions: those not answered yet, and results whose turn is to come.
        self._unanswered: OrderedDict[Item[P, Answer[R]], None] = OrderedDict()
        self._held: dict[Item[P, Answer[R]], R | Exception] = {}
        self._in_turn = policy.ordered
        # What was.
        self.journal = Journal()

    async def submit(
        self,
        payload: P,
        rows: int = 1,
        bucket: Hashable = (),
        deadline: float = math.inf,
        length: int = 1,
        nbytes: int = 0,
        priority: int = 0,
        timeout: float = 0.0,
        client: Hashable = None,
        boarding: Callable[[Any], None] | None = None,
    ) -> R:
        """Queue `payload` and wait for its result. The arguments are those of `Item`.

        Raises:
            DeadlineExceeded: the deadline passed, or could no longer be met, while it waited.
            Exception: whatever the model raised for it; or what `enqueue` raises, at once.
        """
        answer: asyncio.Future[R] = self._loop.create_future()
        item = self.enqueue(
            answer, payload, rows, bucket, deadline, length, nbytes, priority, timeout, client, boarding
        )  # fmt: skip
        try:
            return await answer
        except asyncio.CancelledError:
            self.forget(item)
            raise
        finally:  # an error's traceback holds this frame, which must hold neither the error nor what was asked
            del answer, item, payload

    def enqueue_alike(self, answer: Answer[R], payload: P, alike: tuple[Any, ...]) -> None:
        """`enqueue(answer, payload, *alike)` by the end of this turn of the event loop.

        What comes with the same object in the same turn is queued at once, which takes less time. What `enqueue` would
        raise goes to `answer`. Whoever does not want it any more says so with `withdraw`.
        """
        if alike is not self._alike or not self._answers:
            self._admit()
            self._alike = alike
            self._wake()  # first: whoever seals then finds all that came meanwhile
            self._loop.call_soon(self._admit)
        self._answers.append(answer)
        self._payloads.append(payload)

    def withdraw(self, answer: Answer[R]) -> None:
        """As `forget`, for what came with `enqueue_alike`."""
        self._admit()
        known = chain(self.pending, *[batch.items for batch in self._flights], self._unanswered)
        for item in known:
            if item.answer is answer:
                self.forget(item)
                return
        self.journal.left["answered"] += 1

    def _admit(self) -> None:
        """Queue what came in this turn."""
        answers = self._answers
        if not answers:
            return
        payloads, self._answers, self._payloads = self._payloads, [], []
        for answer, outcome in zip(answers, self.enqueue_all(answers, payloads, *self._alike), strict=True):
            if isinstance(outcome, Exception) and not answer.done():
                answer.set_exception(outcome)

    def enqueue(
        self,
        answer: Answer[R],
        payload: P,
        rows: int = 1,
        bucket: Hashable = (),
        deadline: float = math.inf,
        length: int = 1,
        nbytes: int = 0,
        priority: int = 0,
        timeout: float = 0.0,
        client: Hashable = None,
        boarding: Callable[[Any], None] | None = None,
    ) -> Item[P, Answer[R]]:
        """Queue `payload`; its result, or what `submit` would raise later on, goes to `answer`.

        Whoever does not want it any more says so with `forget`.

        Raises:
            QueueFull: there is no room.
            CannotMeetDeadline: too much is ahead of it.
            Exception: the error given to `close`.
        """
        pending = self.pending
        if self._answers:
            self._admit()
        if self._closed is not None or not (1 <= rows <= pending.policy.max_rows and length >= 1):
            raise self._refusal(rows, length)
        item = Item(
            payload, answer, rows, bucket, self._clock(), deadline, length, nbytes, priority, timeout, client, boarding
        )  # fmt: skip
        try:
            pending.push(item, self._free_at())
        except Exception as error:
            self.journal.was_refused(error)
            raise
        if self._in_turn:
            self._unanswered[item] = None
        if (pending.timed or deadline != math.inf) and pending.next_timer() < self._timer_at:
            self._set_timer()
        self._wake()
        return item

    def enqueue_all(
        self,
        answers: Sequence[Answer[R]],
        payloads: Sequence[P],
        rows: int = 1,
        bucket: Hashable = (),
        deadline: float = math.inf,
        *rest: Any,
    ) -> list[Item[P, Answer[R]] | Exception]:
        """Queue several that differ in nothing but payload and answer, in less time than one by one.

        Args:
            rest: the arguments of `enqueue` after `deadline`.

        Returns:
            What `enqueue` would return for each, or, where it would raise, the exception.
        """
        pending, length = self.pending, rest[0] if rest else 1
        if not answers:
            return []
        self._admit()
        if self._closed is not None or not (1 <= rows <= pending.policy.max_rows and length >= 1):
            return [self._refusal(rows, length) for _ in answers]
        now = self._clock()
        items = [
            Item(payload, answer, rows, bucket, now, deadline, *rest)
            for answer, payload in zip(answers, payloads, strict=True)
        ]
        outcome: list[Item[P, Answer[R]] | Exception] = [*items]
        if not pending.push_alike(items):
            free_at = self._free_at()
            for number, item in enumerate(items):
                try:
                    pending.push(item, free_at)
                except Exception as error:
                    self.journal.was_refused(error)
                    outcome[number] = error.with_traceback(None)  # which holds this frame, and all that was asked
        if self._in_turn:
            self._unanswered.update((item, None) for item in outcome if isinstance(item, Item))
        if (pending.timed or deadline != math.inf) and pending.next_timer() < self._timer_at:
            self._set_timer()
        self._wake()
        return outcome

    def _refusal(self, rows: int, length: int) -> Exception:
        """Why nothing, or nothing like this, is queued."""
        if self._closed is not None:
            return self._closed()
        if length < 1:
            return ValueError(f"length must be at least 1, got {length}")
        return ValueError(f"rows must be 1 to {self.pending.policy.max_rows}, got {rows}")

    def forget(self, item: Item[P, Answer[R]]) -> bool:
        """Its caller left, and its answer says that it is done. Whether nobody will answer it any more.

        It waited in the queue, and is not run; or its answer waited for its turn. If not, a batch has it, or had it.
        One that has not begun is not run if all of its answers are done.
        """
        self._unanswered.pop(item, None)
        held = self._held.pop(item, None) is not None
        waited, stage = self.pending.forget(item), "queued"
        if not waited:
            stage = next((batch.stage for batch in self._flights if item in batch.items), "answered")
        elif self._counts is not None:
            self._counts.lost("CANCELED", self._clock() - item.enqueued)
        self.journal.left[stage] += 1
        self._release()
        return waited or held

    def urgency(self, drain: bool = False) -> float:
        """How urgent the batch is that `seal` would give, see `Pending.head`; math.inf if it would give none."""
        self._admit()
        now = self._clock()
        if self._timer is not None:
            self._advance(now)
        return self.pending.head(now, drain, self._free_at())

    def seal(self, drain: bool = False) -> Batch[P, Answer[R]] | None:
        """Take the next batch out of the queue, to be given to `run`; None if none may be sealed yet."""
        self._admit()
        now = self._clock()
        if self._timer is not None:
            self._advance(now)
        batch = self.pending.next_batch(now, drain, self._free_at())
        if batch is not None:
            self.stacking = batch.stacking
            self._flights.append(batch)
        return batch

    async def prepare(self, batch: Batch[P, Answer[R]]) -> None:
        """Stack a sealed batch while another one runs. If that fails, `run` will meet the error, and deal with it."""
        batch.stage = "preparing"
        payloads = [item.payload for item in batch.items]
        try:
            batch.prepared = await self.runner.prepare(payloads, batch.padded_rows, batch.length)
            batch.expected = batch.predicted
        except Exception:
            batch.prepared = None
        batch.stage = "sealed"

    async def run(self, batch: Batch[P, Answer[R]]) -> None:
        """Run a sealed batch and answer its items. Raises no Exception."""
        started = self._clock()
        items = batch.items
        batch.stage = "running"
        try:
            if batch.stacking:  # it may have waited for the lane, and its items have no timers any more
                self._expire([item for item in items if item.deadline <= started])
                self._release()
            if all(item.answer.done() for item in items):
                return
            for item in items:
                if item.boarding is not None and not item.answer.done():
                    item.boarding(item.answer)
            whole = await self._run(items, batch.padded_rows, batch.length, batch)
        except BaseException:
            # The task that runs is being ended. These have left the queue: nobody else will answer them.
            self._fail(items, self._closed or _interrupted)
            raise
        finally:
            self._flights.remove(batch)
        took = self._clock() - started
        if whole:
            self.pending.cost.learn(batch.cost, max(0.0, took - batch.expected + batch.predicted))
            if self.pending.largest < self._largest:
                self._fitted += 1
                if self._fitted >= self._retry_after:  # perhaps another process had the memory
                    self._fitted = 0
                    larger = 2 * self.pending.largest
                    self.pending.bound(larger if larger <= self._failed else self._largest)
        self.journal.ended(batch, took, not whole and len(items) > 1)

    @property
    def full(self) -> bool:
        """Whether there is no room for anything at all."""
        pending = self.pending
        return pending.rows >= pending.policy.capacity or pending.nbytes >= pending.policy.capacity_bytes

    def refuse(self) -> NoReturn:
        """Say that the queue is full: it has no room for anything at all.

        Raises:
            QueueFull.
        """
        pending, policy = self.pending, self.pending.policy
        text = f"{pending.nbytes} of {policy.capacity_bytes} bytes wait"
        if pending.rows >= policy.capacity:
            text = f"{pending.rows} of {policy.capacity} rows wait"
        wait = max(0.0, self._free_at() - self._clock()) + pending.drain_seconds()
        error = QueueFull(f"the queue is full: {text}", wait)
        self.journal.was_refused(error)
        raise error

    def report(self) -> dict[str, Any]:
        """What the queue does, and why: plain values, times in seconds. Costs what it costs; not for every request."""
        self._admit()
        pending, journal = self.pending, self.journal
        return {
            "queue": {
                "items": len(pending),
                "rows": pending.rows,
                "bytes": pending.nbytes,
                "drain_seconds": pending.drain_seconds(),
            },
            "cost": {
                "seconds_per_batch": pending.cost.a,
                "seconds_per_unit": pending.cost.b,
                "batches_learned_from": pending.cost.samples,
                "largest": None if pending.largest == math.inf else pending.largest,
            },
            **journal.report(),
        }

    def close(self, error: Callable[[], Exception]) -> None:
        """Answer everything that waits with an `error()`, and every later submit.

        One of its own for each: an exception keeps the traceback of every place where it was ever raised.
        """
        self._admit()
        self._closed = error
        if self._timer is not None:
            self._timer.cancel()
        while batch := self.pending.next_batch(self._clock(), drain=True):
            self._fail(batch.items, error)
        for batch in self._flights:
            if batch.stage != "running":
                self._fail(batch.items, error)

    async def _run(
        self,
        items: list[Item[P, Answer[R]]],
        rows: int,
        length: int,
        whole: Batch[P, Answer[R]] | None = None,
    ) -> bool:
        """Run items together and answer them, or, if that raises, each half of them. Whether it did not.

        `whole` is the batch, unless they are a part of it: nobody else holds what was stacked for it.
        """
        prepared, started, counts = None, self._clock(), self._counts
        if whole is not None:
            prepared, whole.prepared = whole.prepared, None
        try:
            if len(items) > 1 and rows * length > self.pending.largest:
                raise OutOfMemory("larger than what did not fit before")
            results = await self.runner.run([item.payload for item in items], rows, length, prepared)
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results for a batch of {len(items)} items")
        except Exception as error:
            # Its traceback holds this frame, which holds who is told of it.
            error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
            if counts is not None:
                counts.ran(items, [error] if len(items) == 1 else None, started)
            if len(items) == 1:
                self._answer(items[0], error)
                return False
            too_large = isinstance(error, OutOfMemory)
        else:
            if counts is not None:
                counts.ran(items, results, started)
            for item, result in zip(items, results, strict=True):
                if self._in_turn:
                    self._answer(item, result)
                elif not item.answer.done():  # what `_answer` does, without a call for each item
                    if isinstance(result, Exception):
                        item.answer.set_exception(result)
                    else:
                        item.answer.set_result(result)
            return True
        # The error is let go of: its traceback holds what was stacked.
        prepared, middle, halves = None, len(items) // 2, True
        for half in (items[:middle], items[middle:]):
            waiting = [item for item in half if not item.answer.done()]
            if waiting:
                padded_rows = self.pending.policy.padded_rows(sum(item.rows for item in waiting))
                halves = await self._run(waiting, padded_rows, length) and halves
        # If one of the halves failed too, it was not, or not only, their being together that was too much.
        if too_large and halves and rows * length <= self.pending.largest:
            self.pending.bound(rows * length // 2)
            self._failed = max(self._failed, rows * length)
            self._fitted, self._retry_after = 0, 2 * self._retry_after
        return False

    def _answer(self, item: Item[P, Answer[R]], result: R | Exception) -> None:
        if not self._in_turn or item not in self._unanswered:  # its caller has left its place in the order
            settle(item, result)
        elif not item.answer.done():
            self._held[item] = result
            self._release()

    def _release(self) -> None:
        """Give the answers that are next in order."""
        while self._unanswered:
            item = next(iter(self._unanswered))
            if not item.answer.done() and item not in self._held:
                return
            del self._unanswered[item]
            if item in self._held:
                settle(item, self._held.pop(item))

    def _fail(self, items: Sequence[Item[P, Answer[R]]], error: Callable[[], Exception]) -> None:
        for item in items:
            settle(item, error())
        self._release()

    def _advance(self, now: float) -> None:
        self._expire(self.pending.advance(now))
        self._release()

    def _expire(self, items: Sequence[Item[P, Answer[R]]]) -> None:
        for item in items:
            if item.answer.done():  # its caller left
                continue
            self._unanswered.pop(item, None)
            self.journal.expired += 1
            if self._counts is not None:
                self._counts.lost("REJECTED", self._clock() - item.enqueued)
            text = "the deadline passed, or could no longer be met, while the request waited in the queue"
            if item.timed_out:
                text = "Request timeout expired"  # Triton's words
            settle(item, DeadlineExceeded(text))

    def _set_timer(self) -> None:
        """Arm the one timer for whatever has to be done first."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = self.pending.next_timer()
        if self._timer_at != math.inf:
            self._timer = self._loop.call_later(max(0.0, self._timer_at - self._clock()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._advance(self._clock())
        self._set_timer()
        self._wake()  # an item may have ripened


def settle(item: Item[Any, Any], result: Any) -> None:
    """Answer an item, unless its caller left."""
    if item.answer.done():
        return
    if isinstance(result, Exception):
        item.answer.set_exception(result)
    else:
        item.answer.set_result(result)


def _interrupted() -> Exception:
    return RuntimeError("the batch was interrupted")
