"""What waits for one model, and what goes next.

This file alone decides which items share a batch, in which order, and when a batch may be sealed. It knows no clock
(time is an argument, in monotonic seconds), no event loop, no tensor and no answer: `Item.answer` is the batcher's.

An item is queued by `push`, or refused by it, and leaves the queue in exactly one of three ways:

    push ──> queued ──> sealed     next_batch: it is part of a batch, its batcher owes it an answer
                    ├─> late       advance: its deadline is over, or can no longer be met; the model must not run for it
                    └─> forgotten  forget: its caller left; it takes up no room from this moment on

Order. Items stand in one line, by level of priority; then, where shares are fair, by the client's turn (start-time fair
queueing: Goyal, Vin, Cheng 1996); then by deadline; then by arrival. An item without a deadline stands where one with
a deadline `patience` seconds after its arrival would, so that no stream of urgent items starves it.

Batches. The first in line leads the next batch, so no shape and no length starves another. With it go those of its own
bucket (equal `bucket`, equal padded length), in the order of the line: as many as the policy's sizes allow, and as
leave every deadline and latency objective aboard that can be met. If there is room, neighbouring lengths of the same
`bucket` join, all of their items or none, where padding takes less time than a batch of their own would cost. An item
whose bucket is None goes alone. An item is never split.

Time. Without `max_delay` whatever waits may be sealed at once: how late that happens is for the caller to decide, and
the later the better, since what arrives until then still gets aboard. With it, a bucket waits until it holds a batch
that is full or of a preferred size, or until one of its items is ripe: `max_delay` old, or about to miss its deadline.

Prediction. A batch takes `cost.seconds(its cost)`, once it is stacked and the lane is free; a queue takes what the
batches in it take. An item that cannot be answered by its deadline is refused at the door; but one that would lead a
batch at once never is, so that a wrong prediction corrects itself.

Everything is exact: a line is a sorted list, who leaves it is found by bisection, what is not queued is nowhere.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Generic

from .cost import Cost
from .errors import CannotMeetDeadline, DeadlineExceeded, QueueFull
from .items import A, Batch, Item, P
from .policy import Policy

# Seconds before the last moment at which an item that waits for company ripens: timers and lanes come a little late.
HASTE = 0.002

# Mean deviations of a batch's time that are left between its expected end and a deadline. Without them a queue in order
# of deadlines runs right along them, and what takes a little longer is too late: see `bench.simulate --noise 0.3`. A
# batch takes company that has a deadline of its own with half of that: it has as much to lose by waiting.
MARGIN = 2.0

# Seconds of stacking from which on it is worth doing while another batch runs: a timer is about as precise. What takes
# less counts as a part of running.
WORTH_PREPARING = 0.001

# After so many refusals for a deadline in a row with nothing else waiting, one is let in: the prediction may be wrong.
PROBE = 16

# Clients of whom nothing waits whose turn is remembered, so that who leaves and comes back does not go first. Of more,
# all are forgotten: so many names are no clients.
REMEMBERED = 4096

# What the timers of an item do.
_MISS, _GIVE_UP, _RIPEN, _DEMOTE = range(4)


# Level of priority (twice its index, and one more for those demoted), the client's turn, deadline, number, item.
_Entry = tuple[int, float, float, int, Item[Any, Any]]


class _Bucket:
    """The queued items of one bucket and padded length, a part of the line."""

    __slots__ = ("cap", "due", "entries", "key", "length", "ripe", "rounds", "rows", "work")

    def __init__(self, key: Hashable, length: int, cap: int) -> None:
        self.key = key
        self.length = length
        self.cap = cap  # most rows of a batch
        self.entries: list[_Entry] = []
        self.rows = 0
        self.due = 0  # those of them that have a deadline
        self.rounds = 0  # batches that they make, as of the latest count
        self.work = 0  # and their cost
        self.ripe = 0  # items that cannot wait for company any longer


class _Family:
    """The buckets of one key: one for each padded length."""

    __slots__ = ("lengths", "rounds", "rows")

    def __init__(self) -> None:
        self.lengths: list[int] = []  # ascending
        self.rows = 0
        self.rounds = 0  # batches that they make, as of the latest count


class _Client:
    """Who shares the model with others, while something of it waits."""

    __slots__ = ("nbytes", "rows", "turn")

    def __init__(self) -> None:
        self.turn = 0.0  # of its next item
        self.rows = self.nbytes = 0  # that wait


def _limit(item: Item[Any, Any], done: float) -> float:
    """Until when a batch that could be done at `done` should be: the item's objective, or its deadline, or whenever."""
    if done <= item._until:
        return item._until
    return item.deadline if done <= item.deadline else math.inf


class Pending(Generic[P, A]):
    """The queue of one model. Not thread-safe: one task owns it.

    Attributes:
        cost: what batches cost, as whoever runs them learns it.
        preparation: what stacking them takes before that, likewise.
        rows, nbytes: of all that waits.
        largest: cost that no batch may pass, because one that did ran out of memory; see `bound`.
        timed: whether `next_timer` may change with any item, not only with those that have a deadline.
    """

    def __init__(self, policy: Policy, cost: Cost | None = None, preparation: Cost | None = None) -> None:
        self.policy = policy
        self.cost = Cost() if cost is None else cost
        self.preparation = Cost() if preparation is None else preparation
        self.rows = 0
        self.nbytes = 0
        self.largest: float = policy.max_cost or math.inf
        self._line: list[_Entry] = []
        self._buckets: dict[tuple[Hashable, int], _Bucket] = {}
        self._families: dict[Hashable, _Family] = {}
        self._timers: list[tuple[float, int, int, Item[P, A]]] = []  # (when, number, what, item), ascending
        self._in_level = [0] * len(policy.levels)
        self._clients: dict[Hashable, _Client] = {}  # those who wait
        self._turn = 0.0  # of the latest leader
        self._paid: dict[Hashable, float] = {}  # where the turn of those is who were served beyond that
        self._number = 0
        self._refused = 0  # for their deadlines, since a batch was sealed
        self._rounds = 0  # batches that all of it makes
        self._work = 0  # and their cost
        self._stale: set[_Bucket] = set()  # that changed since those two were counted
        # Of those that wait for company: who need not any more, and who changed since that was looked at.
        self._ready: set[_Bucket] = set()
        self._unsure: set[_Bucket] = set()
        self._promises = 0  # items that should be answered by some time, so that time alone ends a bucket's wait
        # What most queues need not look at.
        self.timed = bool(policy.max_delay) or any(level.timeout != math.inf for level in policy.levels)
        self._limited = policy.fair or any(level.max_items for level in policy.levels)

    def __len__(self) -> int:
        """The items that wait."""
        return len(self._line)

    def __iter__(self) -> Iterator[Item[P, A]]:
        """They, in the order of the line."""
        return (entry[4] for entry in self._line)

    def push(self, item: Item[P, A], free_at: float = -math.inf) -> None:
        """Queue `item`; `free_at` says when the lane is expected to be free, if it is not.

        Raises:
            QueueFull: there is no room for its rows, its bytes, or in its level.
            CannotMeetDeadline: by the prediction it would be answered after its deadline.
            DeadlineExceeded: its deadline is over already.
        """
        policy, now, rows = self.policy, item.enqueued, item.rows
        index = policy.level(item.priority) if item.priority else policy.default_level
        if item.deadline <= now:
            raise DeadlineExceeded("the deadline passed before the request reached the queue")
        if self._limited or self.rows + rows > policy.capacity or self.nbytes + item.nbytes > policy.capacity_bytes:
            self._check_room(item, index, free_at)
        length = policy.padded_length(item.length) if policy.lengths else item.length
        if item.bucket is None:  # it goes alone: a bucket of its own, which it fills
            bucket = _Bucket(item, length, rows)
        else:
            found = self._buckets.get((item.bucket, length))
            bucket = _Bucket(item.bucket, length, self._cap(length)) if found is None else found
        turn = self._next_turn(item.client) if policy.fair else 0.0
        self._number += 1
        if item.deadline == math.inf and not self.timed:
            entry = (2 * index, turn, now + policy.patience, self._number, item)
        else:
            entry = self._set_timers(item, index, turn, bucket, max(now, free_at))
        item._until = min(item.deadline, now + policy.objective)
        if item._until != math.inf:
            self._promises += 1
        item._home = bucket
        item.queued = True
        self.rows += rows
        self.nbytes += item.nbytes
        self._in_level[index] += 1
        if policy.fair:
            client = self._clients.get(item.client)
            if client is None:
                client = self._clients[item.client] = _Client()
            client.turn = turn + rows * length
            client.rows += rows
            client.nbytes += item.nbytes
        self._stand(bucket, [entry])

    def push_alike(self, items: Sequence[Item[P, A]]) -> bool:
        """Queue items that differ in nothing but payload and answer, as `push` would one by one, in less time.

        Returns:
            False, and none of them is queued, if `push` has to look at each: there may be no room for all of them, they
            have a deadline, go alone, or the policy has timeouts, a delay, fair shares or bounds for its levels.
        """
        policy, first, count = self.policy, items[0], len(items)
        rows, nbytes, now = first.rows * count, first.nbytes * count, first.enqueued
        if (
            self.timed
            or self._limited
            or first.bucket is None
            or first.deadline != math.inf
            or self.rows + rows > policy.capacity
            or self.nbytes + nbytes > policy.capacity_bytes
        ):
            return False
        index = policy.level(first.priority) if first.priority else policy.default_level
        length = policy.padded_length(first.length) if policy.lengths else first.length
        found = self._buckets.get((first.bucket, length))
        bucket = _Bucket(first.bucket, length, self._cap(length)) if found is None else found
        due, until = now + policy.patience, now + policy.objective
        entries: list[_Entry] = [
            (2 * index, 0.0, due, number, item) for number, item in enumerate(items, self._number + 1)
        ]
        self._number += count
        for item in items:
            item._home = bucket
            item.queued = True
        if until != math.inf:
            self._promises += count
            for item in items:
                item._until = until
        self.rows += rows
        self.nbytes += nbytes
        self._in_level[index] += count
        self._stand(bucket, entries)
        return True

    def forget(self, item: Item[P, A]) -> bool:
        """Take an item out because its caller left. False if it was not queued any more."""
        if not item.queued:
            return False
        if self.policy.fair:  # what was not served is not paid for
            self._clients[item.client].turn -= item.rows * item._home.length
        self._step_out(item)
        self._leave([item])
        return True

    def advance(self, now: float) -> list[Item[P, A]]:
        """Let time pass. Takes out, and returns, the items whose answer would come too late from now on."""
        late: list[Item[P, A]] = []
        count = bisect_left(self._timers, (now, math.inf))
        due = self._timers[:count]
        del self._timers[:count]
        for timer in due:
            timer[3]._timers.remove(timer)
        for _, _, what, item in due:
            if not item.queued:  # two of its timers were due, and the first made it late
                continue
            if what == _MISS and (miss := self._seal_by(item)) > now:  # others left: it may wait longer than it could
                timer = (miss, item._entry[3], _MISS, item)
                item._timers.append(timer)
                insort(self._timers, timer)
            elif what <= _GIVE_UP:
                item.timed_out = what == _GIVE_UP
                self.forget(item)
                late.append(item)
            elif what == _RIPEN:
                item._ripe = "delay" if item.enqueued + self.policy.max_delay <= now else "deadline"
                item._home.ripe += 1
                self._unsure.add(item._home)
            else:
                self._step_out(item)
                self._stand(item._home, [(item._entry[0] + 1, *item._entry[1:])])
        return late

    def next_timer(self) -> float:
        """When `advance` has something to do; math.inf if never."""
        return self._timers[0][0] if self._timers else math.inf

    def head(self, now: float, drain: bool = False, free_at: float = -math.inf) -> float:
        """How urgent the batch is that `next_batch` would seal, math.inf if there is none. `advance` comes first.

        It is the deadline, or what stands for one, of the item that leads it: among several queues, the one with the
        smallest is the one whose turn it is.
        """
        leader = self._leader(now, drain, free_at)
        return math.inf if leader is None else leader[2]

    def next_batch(self, now: float, drain: bool = False, free_at: float = -math.inf) -> Batch[P, A] | None:
        """Seal the next batch; None if none may be sealed yet. `advance` comes first.

        `drain` waits for no company. `free_at` says when the lane is expected to be free, if it is not.
        """
        leader = self._leader(now, drain, free_at)
        if leader is None:
            return None
        self._refused = 0
        if leader[1] > self._turn:
            self._turn = leader[1]
        bucket: _Bucket = leader[4]._home
        count, rows, reason, until = self._form(bucket, now, free_at)
        if not reason:
            reason = "drain" if drain else self._hurry(bucket) if bucket.ripe else "free"
        items = self._seal(bucket, count, rows)
        length = bucket.length
        tokens = sum([item.rows * item.length for item in items]) if self.policy.lengths else rows * length
        if not bucket.entries and bucket.key in self._families and not self.policy.preferred:
            for other in self._neighbours(bucket, rows, tokens, until, now, free_at):
                rows += other.rows
                length = max(length, other.length)
                joined = self._seal(other, len(other.entries), other.rows)
                tokens += sum([item.rows * item.length for item in joined])
                items += joined
        padded_rows = self.policy.padded_rows(rows) if self.policy.row_grid else rows
        cost = padded_rows * length
        seconds, stacking = self.cost.seconds(cost), self.stacking(cost)
        return Batch(
            items, rows, length, padded_rows, tokens, cost, reason, now, seconds, seconds + stacking, stacking
        )  # fmt: skip

    def bound(self, cost: float) -> None:
        """Seal no batch above `cost` from now on, but for an item that is larger by itself."""
        self.largest = cost
        for bucket in self._buckets.values():
            if not isinstance(bucket.key, Item):  # that one goes alone, whatever its size
                bucket.cap = self._cap(bucket.length)
                self._stale.add(bucket)
                self._unsure.add(bucket)

    def drain_seconds(self) -> float:
        """What all that waits is expected to take."""
        self._count()
        return self._takes(self._rounds, self._work)

    def answered_at(self, item: Item[P, A], now: float, free_at: float = -math.inf) -> float:
        """When a queued item is expected to be answered."""
        bucket: _Bucket = item._home
        start, _ = self._predict(bucket, item._entry, max(now, free_at))
        return self._done(self._size(bucket, bucket.rows), now, start)

    def _check_room(self, item: Item[P, A], level: int, free_at: float) -> None:
        policy = self.policy
        client = self._clients.get(item.client) or _Client()  # nobody is, unless shares are fair
        most = policy.levels[level].max_items
        for need, own, held, room, what in (
            (item.rows, client.rows, self.rows, policy.capacity, "rows"),
            (item.nbytes, client.nbytes, self.nbytes, policy.capacity_bytes, "bytes"),
        ):
            if need > room - held:
                text = f"the queue is full: {held} of {room} {what} wait, no room for {need} more"
                break
            if need and need + own > room - held:
                text = (
                    f"this client has its share of the queue: {own} {what} of its own wait, and the last {room - held} "
                    "are for others"
                )
                break
        else:
            if not most or self._in_level[level] < most:
                return
            text = (
                f"Exceeds maximum queue size: {most} requests of priority level {level + 1} wait"  # begins as Triton's
            )
        raise QueueFull(text, max(0.0, free_at - item.enqueued) + self.drain_seconds())

    def _next_turn(self, client: Hashable) -> float:
        waits = self._clients.get(client)
        return max(self._turn, waits.turn if waits is not None else self._paid.get(client, 0.0))

    def _set_timers(self, item: Item[P, A], index: int, turn: float, bucket: _Bucket, free_at: float) -> _Entry:
        """Give an item its timers, and return its place in line. Raises CannotMeetDeadline."""
        policy, level, now, number = self.policy, self.policy.levels[index], item.enqueued, self._number
        timeout = level.timeout
        if level.override and 0 < item.timeout < timeout < math.inf:  # as in Triton, it cannot bring in a timeout
            timeout = item.timeout
        give_up = math.inf if level.delay else now + timeout
        due = min(item.deadline, give_up)
        if due == math.inf or policy.ordered:  # an answer that is early would only wait for its turn
            due = now + policy.patience
        entry = (2 * index, turn, due, number, item)
        seal_by = miss = math.inf
        if item.deadline != math.inf:
            miss, seal_by = self._late_at(item, bucket, entry, free_at)
        timers = item._timers = []
        if miss != math.inf:
            timers.append((miss, number, _MISS, item))
        if give_up != math.inf:
            timers.append((give_up, number, _GIVE_UP, item))
        if level.delay and timeout != math.inf:
            timers.append((now + timeout, number, _DEMOTE, item))
        if policy.max_delay:
            if policy.objective != math.inf:
                size = self._size(bucket, bucket.rows + item.rows)
                seal_by = min(seal_by, now + policy.objective - self.cost.seconds(size) - self.stacking(size))
            seal_by = min(seal_by, give_up)
            timers.append((min(now + policy.max_delay, seal_by - HASTE), number, _RIPEN, item))
        for timer in timers:
            insort(self._timers, timer)
        return entry

    def _late_at(self, item: Item[P, A], bucket: _Bucket, entry: _Entry, free_at: float) -> tuple[float, float]:
        """When it is too late for `item`, and when its batch should be sealed. Raises CannotMeetDeadline."""
        now = item.enqueued
        start, ahead = self._predict(bucket, entry, free_at)
        size = self._size(bucket, item.rows + max(bucket.due, ahead))
        stacking = self.stacking(size)
        start_by = item.deadline - self.cost.seconds(size) - MARGIN * self.cost.deviation
        seal_by = start_by - stacking
        late = max(start, now + stacking) - start_by
        if late < 0:
            return seal_by, seal_by
        # It would lead a batch at once, or nothing was ever let in: let the model show how long it takes.
        if start <= now or (not self._line and self._refused >= PROBE):
            return item.deadline, seal_by
        self._refused += 1
        raise CannotMeetDeadline(
            f"the deadline is {item.deadline - now:.3g} s away, the answer is expected in "
            f"{late + item.deadline - now:.3g} s",
            late,
        )

    def _seal_by(self, item: Item[P, A]) -> float:
        """When the batch of a queued item should be sealed for its deadline, by what waits now."""
        bucket: _Bucket = item._home
        ahead = self._predict(bucket, item._entry, 0.0)[1]
        size = self._size(bucket, max(bucket.due, item.rows + ahead))
        return item.deadline - self.cost.seconds(size) - MARGIN * self.cost.deviation - self.stacking(size)

    def _predict(self, bucket: _Bucket, entry: _Entry, free_at: float) -> tuple[float, int]:
        """When the batch of whoever stands at `entry` in line, and belongs to `bucket`, is expected to start.

        And how many rows are in it before those of whoever it is. Ahead of it are its share of the other buckets'
        batches, and the full batches of its own bucket; where the items of a bucket differ in rows, they count with
        their mean.
        """
        start = free_at
        own = bisect_left(bucket.entries, entry)
        others = len(self._line) - len(bucket.entries)
        if others:
            self._count()
            share = (bisect_left(self._line, entry) - own) / others
            family = self._families.get(bucket.key)
            rounds = self._rounds - (min(bucket.rounds, family.rounds) if family is not None else 0)
            start += share * self._takes(rounds, self._work - bucket.work)
        if not own:
            return start, 0
        batches, ahead = divmod(bucket.rows * own // len(bucket.entries), bucket.cap)
        return start + self._takes(batches, batches * self._size(bucket, bucket.cap)), ahead

    def _takes(self, rounds: int, work: int) -> float:
        """What batches take one after the other: while one runs the next is stacked, where that is worth it."""
        running = self.cost.a * rounds + self.cost.b * work
        stacking = self.preparation.a * rounds + self.preparation.b * work
        return stacking if stacking > running and stacking >= WORTH_PREPARING * rounds else running

    def _leader(self, now: float, drain: bool, free_at: float) -> _Entry | None:
        if not self.policy.max_delay or drain:
            return self._line[0] if self._line else None
        for bucket in self._buckets.values() if self._promises else self._unsure:
            if bucket.ripe or self._form(bucket, now, free_at)[2]:
                self._ready.add(bucket)
            else:
                self._ready.discard(bucket)
        self._unsure.clear()
        return min([bucket.entries[0] for bucket in self._ready], default=None)

    def _form(self, bucket: _Bucket, now: float, free_at: float) -> tuple[int, int, str, float]:
        """The batch that a bucket has: items, rows, why it waits for no more ("" if it could), when it should be done.

        The sizes are looked at as Triton does (PROTOCOL.md section 6.1).
        """
        cap, preferred = bucket.cap, self.policy.preferred
        if not preferred and not self._promises and bucket.rows == len(bucket.entries):  # one row each: no need to look
            rows = min(bucket.rows, cap)
            return rows, rows, "full" if rows >= cap else "", math.inf
        count = rows = marked = marked_rows = 0
        until, reason, done = math.inf, "", 0.0
        margin = MARGIN * self.cost.deviation
        for entry in bucket.entries:
            item = entry[4]
            total = rows + item.rows
            if until != math.inf or item._until != math.inf:
                done = self._done(self._size(bucket, total), now, free_at)
            if rows:
                if preferred and total > preferred[-1] and not marked:
                    marked, marked_rows = count, rows
                if total > cap:
                    reason = "full"
                    break
                if done + (margin if item._until == math.inf else margin / 2) > until:
                    reason = "deadline"
                    break
            rows = total
            count += 1  # noqa: SIM113 - those taken, which a break leaves as they are
            if item._until < until:
                until = min(until, _limit(item, done))
            if rows in preferred:
                marked, marked_rows = count, rows
        if rows >= cap:
            reason = "full"
        if marked and not bucket.ripe:
            count, rows, reason = marked, marked_rows, "preferred"
        elif preferred and rows >= preferred[-1]:
            reason = reason or "preferred"
        return count, rows, reason, until

    def _hurry(self, bucket: _Bucket) -> str:
        """Which reason the first ripe item has."""
        return next(str(entry[4]._ripe) for entry in bucket.entries if entry[4]._ripe)

    def _seal(self, bucket: _Bucket, count: int, rows: int) -> list[Item[P, A]]:
        """Take the first `count` items, `rows` rows, out of a bucket."""
        line, entries = self._line, bucket.entries[:count]
        if line[count - 1] is entries[-1]:  # they are the first of the line too
            del line[:count]
        else:
            for entry in entries:
                del line[bisect_left(line, entry)]
        del bucket.entries[:count]
        items = [entry[4] for entry in entries]
        ripe = sum([1 for item in items if item._ripe]) if bucket.ripe else 0
        due = sum([item.rows for item in items if item.deadline != math.inf]) if bucket.due else 0
        self._leave(items)
        if self.policy.fair:
            for entry in entries:
                client, paid = entry[4].client, entry[1] + entry[4].rows * bucket.length
                self._paid[client] = max(paid, self._paid.get(client, 0.0))
            if not self._line:  # nobody to be fair to: who comes next starts where all have been served
                self._turn = max(self._turn, *self._paid.values())
            if not self._line or len(self._paid) > REMEMBERED:
                self._paid.clear()
        self._shed(bucket, rows, ripe, due)
        return items

    def _neighbours(
        self, bucket: _Bucket, rows: int, tokens: int, until: float, now: float, free_at: float
    ) -> list[_Bucket]:
        """The buckets whose items, all of them, join a batch of `bucket` that has room and should be done by `until`.

        The one that costs the least padding comes first, and joins if the padding is cheaper than a batch of its own.
        """
        lengths, length = self._families[bucket.key].lengths, bucket.length
        chosen: list[_Bucket] = []
        above = bisect_left(lengths, length)
        below = above - 1
        cost = self.policy.padded_rows(rows) * length
        self._count()
        while True:
            best: tuple[int, int, _Bucket, int] | None = None
            for at in (below, above):
                if 0 <= at < len(lengths):
                    other = self._buckets[bucket.key, lengths[at]]
                    if rows + other.rows <= self.policy.max_rows:
                        merged = self.policy.padded_rows(rows + other.rows) * max(length, other.length)
                        padding = merged - cost - other.work
                        if merged <= self.largest and (best is None or padding < best[0]):
                            best = padding, at, other, merged
            if best is None:
                return chosen
            padding, at, other, merged = best
            done = self._done(merged, now, free_at)
            tokens += sum([entry[4].rows * entry[4].length for entry in other.entries])
            if (
                self.cost.b * padding >= self.cost.a
                or done + MARGIN * self.cost.deviation / 2 > until
                or merged - tokens > self.policy.max_padding * merged
            ):
                return chosen
            chosen.append(other)
            until = min([until, *[_limit(entry[4], done) for entry in other.entries]])
            rows, length, cost = rows + other.rows, max(length, other.length), merged
            if at == below:
                below -= 1
            else:
                above += 1

    def _size(self, bucket: _Bucket, rows: int) -> int:
        """The cost of a batch of a bucket that has `rows` rows."""
        if rows > bucket.cap:
            rows = bucket.cap
        if self.policy.row_grid:
            rows = self.policy.padded_rows(rows)
        return rows * bucket.length

    def stacking(self, size: float) -> float:
        """What stacking a batch is expected to take, where it is worth doing while another one runs; else 0."""
        seconds = self.preparation.seconds(size)
        return seconds if seconds >= WORTH_PREPARING else 0.0

    def _done(self, size: float, now: float, free_at: float) -> float:
        """When a batch that is sealed now is expected to be answered."""
        return max(now + self.stacking(size), free_at) + self.cost.seconds(size)

    def _cap(self, length: int) -> int:
        """Most rows of a batch whose rows are padded to `length`."""
        if self.largest == math.inf:
            return self.policy.max_rows
        rows = min(self.policy.max_rows, max(1, int(self.largest) // length))
        while rows > 1 and self.policy.padded_rows(rows) * length > self.largest:
            rows -= 1
        return rows

    def _stand(self, bucket: _Bucket, entries: list[_Entry]) -> None:
        """Put items that are alike, in the order of their numbers, in their places in line and in their bucket."""
        item = entries[0][4]
        rows = item.rows * len(entries)
        family = self._families.get(bucket.key)
        if family is None:
            family = self._families[bucket.key] = _Family()
        family.rows += rows
        if not bucket.entries:
            self._buckets[bucket.key, bucket.length] = bucket
            insort(family.lengths, bucket.length)
        for line in (self._line, bucket.entries):
            if not line or line[-1] < entries[0]:
                line.extend(entries)
            else:
                for entry in entries:
                    insort(line, entry)
        for entry in entries:
            entry[4]._entry = entry
        bucket.rows += rows
        if item.deadline != math.inf:
            bucket.due += rows
        if item._ripe:
            bucket.ripe += len(entries)
        self._stale.add(bucket)
        self._unsure.add(bucket)

    def _step_out(self, item: Item[P, A]) -> None:
        """Take one item out of the line and of its bucket."""
        bucket: _Bucket = item._home
        for entries in (self._line, bucket.entries):
            del entries[bisect_left(entries, item._entry)]
        self._shed(bucket, item.rows, bool(item._ripe), item.rows if item.deadline != math.inf else 0)

    def _shed(self, bucket: _Bucket, rows: int, ripe: int, due: int) -> None:
        """Count out what left a bucket, and let go of the bucket when it is empty."""
        bucket.rows -= rows
        bucket.ripe -= ripe
        bucket.due -= due
        family = self._families[bucket.key]
        family.rows -= rows
        if bucket.entries:
            self._stale.add(bucket)
            self._unsure.add(bucket)
            return
        for buckets in (self._stale, self._unsure, self._ready):
            buckets.discard(bucket)
        del self._buckets[bucket.key, bucket.length]
        del family.lengths[bisect_left(family.lengths, bucket.length)]
        self._work -= bucket.work
        self._rounds -= family.rounds
        bucket.rounds = bucket.work = family.rounds = 0
        if not family.lengths:
            del self._families[bucket.key]
            return
        self._stale.add(self._buckets[bucket.key, family.lengths[0]])  # any of them has the family counted again

    def _leave(self, items: list[Item[P, A]]) -> None:
        """Count out items that stand in no line any more."""
        self.rows -= sum([item.rows for item in items])
        self.nbytes -= sum([item.nbytes for item in items])
        if self._promises:
            self._promises -= sum([1 for item in items if item._until != math.inf])
        if len(self._in_level) == 1:
            self._in_level[0] -= len(items)
        else:
            for item in items:
                self._in_level[item._entry[0] // 2] -= 1
        if self._timers:
            for item in items:
                for timer in item._timers:
                    del self._timers[bisect_left(self._timers, timer)]
                item._timers = ()
        if self.policy.fair:
            for item in items:
                client = self._clients[item.client]
                client.rows -= item.rows
                client.nbytes -= item.nbytes
                if not client.rows:
                    del self._clients[item.client]
        for item in items:
            item.queued = False
            item._entry = item._home = None  # no cycle keeps the payload in memory

    def _count(self) -> None:
        """Bring the number of batches that wait, and their cost, up to date.

        Where items of several lengths wait, they are taken to share batches: fewer cannot be made of them.
        """
        for bucket in self._stale:
            family = self._families[bucket.key]
            self._work -= bucket.work
            full, rest = divmod(bucket.rows, bucket.cap)
            rows = full * self.policy.padded_rows(bucket.cap) + (self.policy.padded_rows(rest) if rest else 0)
            bucket.rounds = full + bool(rest)
            bucket.work = rows * bucket.length
            self._work += bucket.work
            self._rounds -= family.rounds
            family.rounds = bucket.rounds if len(family.lengths) == 1 else -(-family.rows // self.policy.max_rows)
            self._rounds += family.rounds
        self._stale.clear()
