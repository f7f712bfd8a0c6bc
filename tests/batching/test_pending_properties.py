"""Pending: whatever is pushed, forgotten, late and sealed, in whatever order, against a list that is searched in full.

Times and costs are sums of powers of two, so that both sides compute the same numbers exactly.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batching import Batch, CannotMeetDeadline, DeadlineExceeded, Item, Level, Pending, Policy, QueueFull
from batching.pending import HASTE, PROBE, WORTH_PREPARING

from .waiting import assert_empty, cost, queue, sealed

Request = Item[int, None]
NEVER = math.inf


@dataclass(eq=False)
class Stand:
    """What the naive queue knows of one item that waits."""

    item: Request
    level: int
    group: Hashable  # those of the same may share a batch
    length: int
    turn: float
    number: int
    alone: bool
    late_at: float = NEVER
    times_out_at: float = NEVER
    delayed_at: float = NEVER
    ripens_at: float = NEVER
    demoted: bool = False
    ripe: str = ""

    def place(self, policy: Policy) -> tuple[int, bool, float, float, int]:
        due = min(self.item.deadline, self.times_out_at)
        due = self.item.enqueued + policy.patience if due == NEVER or policy.ordered else due
        return self.level, self.demoted, self.turn, due, self.number


@dataclass
class Naive:
    """The queue as its docstring has it: one list, and everything else is found by looking."""

    policy: Policy
    a: float
    b: float
    prepare_a: float = 0.0
    prepare_b: float = 0.0
    deviation: float = 0.0
    largest: float = NEVER
    waiting: list[Stand] = field(default_factory=list)
    turn: float = 0.0
    next_turns: dict[Hashable, float] = field(default_factory=dict)
    paid: dict[Hashable, float] = field(default_factory=dict)
    refused: int = 0
    pushed: int = 0

    # What things cost.

    def padded(self, rows: int) -> int:
        return min(grid for grid in self.policy.row_grid if grid >= rows) if self.policy.row_grid else rows

    def seconds(self, rows: int, length: int) -> float:
        return self.a + self.b * self.padded(rows) * length

    def stacking(self, rows: int, length: int) -> float:
        seconds = self.prepare_a + self.prepare_b * self.padded(rows) * length
        return seconds if seconds >= WORTH_PREPARING else 0.0

    def done(self, rows: int, length: int, now: float, free_at: float) -> float:
        """When a batch that is sealed now is answered."""
        return max(now + self.stacking(rows, length), free_at) + self.seconds(rows, length)

    def cap(self, stand: Stand) -> int:
        fits = [n for n in range(1, self.policy.max_rows + 1) if self.padded(n) * stand.length <= self.largest]
        return stand.item.rows if stand.alone else max(fits, default=1)

    def group(self, stand: Stand) -> list[Stand]:
        """Those it may share a batch with, itself included, in line."""
        return self.line([each for each in self.waiting if (each.group, each.length) == (stand.group, stand.length)])

    def line(self, stands: list[Stand]) -> list[Stand]:
        return sorted(stands, key=lambda each: each.place(self.policy))

    def rounds(self, key: object) -> int:
        """The batches that the items of this key make; those of several lengths are taken to share them."""
        members = [each for each in self.waiting if each.group == key]
        if len({each.length for each in members}) > 1:
            return math.ceil(sum(each.item.rows for each in members) / self.policy.max_rows)
        return sum(math.ceil(sum(each.item.rows for each in members) / self.cap(first)) for first in members[:1])

    def work(self, among: list[Stand]) -> int:
        """The padded size of all the batches of these groups together."""
        total = 0
        for first in {(each.group, each.length): each for each in among}.values():
            rows, cap = sum(each.item.rows for each in self.group(first)), self.cap(first)
            while rows > 0:
                total += self.padded(min(rows, cap)) * first.length
                rows -= cap
        return total

    def takes(self, rounds: int, work: int) -> float:
        """What batches take one after the other, each stacked while the one before runs."""
        stacking = self.prepare_a * rounds + self.prepare_b * work
        return max(self.a * rounds + self.b * work, stacking if stacking >= WORTH_PREPARING * rounds else 0.0)

    def drain(self) -> float:
        """What all the batches of all that waits take."""
        keys = {each.group for each in self.waiting}
        return self.takes(sum(self.rounds(key) for key in keys), self.work(self.waiting))

    def ahead(self, stand: Stand) -> int:
        """The rows of its own group that stand before it, by their mean."""
        members = self.group(stand)
        place = stand.place(self.policy)
        before = sum(each.place(self.policy) < place for each in members)
        return sum(each.item.rows for each in members) * before // len(members) if before else 0

    def seal_by(self, stand: Stand) -> float:
        """When its batch is to be sealed at the latest: those with deadlines share it, and those before it."""
        due = sum(each.item.rows for each in self.group(stand) if each is not stand and each.item.deadline < NEVER)
        rows = min(stand.item.rows + max(due, self.ahead(stand) % self.cap(stand)), self.cap(stand))
        margin = 2 * self.deviation
        return stand.item.deadline - self.seconds(rows, stand.length) - margin - self.stacking(rows, stand.length)

    def start(self, stand: Stand, free_at: float) -> float:
        """When its batch is expected to start; it need not be queued."""
        own = [each for each in self.group(stand) if each is not stand]
        others = [each for each in self.waiting if each not in own and each is not stand]
        place = stand.place(self.policy)
        if others:
            ahead = sum(each.place(self.policy) < place for each in others)
            rounds = sum(self.rounds(key) for key in {each.group for each in self.waiting})
            mine = math.ceil(sum(each.item.rows for each in self.group(stand)) / self.cap(stand))
            rounds -= min(mine, self.rounds(stand.group))
            free_at += ahead / len(others) * self.takes(rounds, self.work(others))
        batches = self.ahead(stand) // self.cap(stand)
        return free_at + self.takes(batches, batches * self.padded(self.cap(stand)) * stand.length)

    # What happens.

    def push(self, item: Request, free_at: float) -> type[Exception] | None:
        policy, now = self.policy, item.enqueued
        index = item.priority - 1 if 1 <= item.priority <= len(policy.levels) else policy.default_level
        level = policy.levels[index]
        if item.deadline <= now:
            return DeadlineExceeded
        mine = [each.item for each in self.waiting if policy.fair and each.item.client == item.client]
        if item.rows + sum(each.rows for each in mine) > policy.capacity - sum(each.item.rows for each in self.waiting):
            return QueueFull
        left = policy.capacity_bytes - sum(each.item.nbytes for each in self.waiting)
        if item.nbytes and item.nbytes + sum(each.nbytes for each in mine) > left:
            return QueueFull
        if level.max_items and sum(each.level == index for each in self.waiting) >= level.max_items:
            return QueueFull
        self.pushed += 1
        length = min((step for step in policy.lengths if step >= item.length), default=item.length)
        alone = item.bucket is None
        owed = self.next_turns.get(item.client, self.paid.get(item.client, 0.0))
        turn = max(self.turn, owed) if policy.fair else 0.0
        stand = Stand(item, index, item if alone else item.bucket, length, turn, self.pushed, alone)
        timeout = level.timeout
        if level.override and 0 < item.timeout < timeout < NEVER:
            timeout = item.timeout
        if level.delay:
            stand.delayed_at = now + timeout
        else:
            stand.times_out_at = now + timeout
        if item.deadline < NEVER:
            stand.late_at = seal_by = self.seal_by(stand)
            free = self.start(stand, max(now, free_at))
            due = sum(each.item.rows for each in self.group(stand) if each.item.deadline < NEVER)
            rows = min(item.rows + max(due, self.ahead(stand) % self.cap(stand)), self.cap(stand))
            if max(free, now + self.stacking(rows, length)) >= stand.late_at + self.stacking(rows, length):
                if free > now and (self.waiting or self.refused < PROBE):
                    self.refused += 1
                    return CannotMeetDeadline
                stand.late_at = item.deadline
        else:
            seal_by = NEVER
        if policy.max_delay:
            rows = item.rows + sum(each.item.rows for each in self.group(stand))
            objective = now + policy.objective - self.seconds(min(rows, self.cap(stand)), length)
            stacking = self.stacking(min(rows, self.cap(stand)), length)
            ripe = min(seal_by, stand.times_out_at, objective - stacking) - HASTE
            stand.ripens_at = min(now + policy.max_delay, ripe)
        self.waiting.append(stand)
        self.next_turns[item.client] = turn + item.rows * length
        return None

    def take(self, stands: list[Stand], served: bool) -> None:
        for stand in stands:
            self.waiting.remove(stand)
        clients = {each.item.client for each in self.waiting}
        for stand in stands:
            client, finish = stand.item.client, stand.turn + stand.item.rows * stand.length
            if served and self.policy.fair:
                self.paid[client] = max(self.paid.get(client, 0.0), finish)
            if not served and client in self.next_turns:
                self.next_turns[client] -= stand.item.rows * stand.length
            if client not in clients:
                self.next_turns.pop(client, None)
        if served and self.policy.fair and not self.waiting:
            self.turn = max(self.turn, *self.paid.values())

    def advance(self, now: float) -> list[tuple[Request, bool]]:
        """Who is late, and whether its timeout made it so."""
        due = [(each.late_at, each.number, 0, each) for each in self.waiting if each.late_at <= now]
        due += [(each.times_out_at, each.number, 1, each) for each in self.waiting if each.times_out_at <= now]
        due += [(each.delayed_at, each.number, 3, each) for each in self.waiting if each.delayed_at <= now]
        late: dict[Stand, bool] = {}
        for _, _, what, each in sorted(due, key=lambda timer: timer[:3]):
            each.demoted = each.demoted or what == 3
            if each in late or what == 3:
                continue
            if what == 0:
                each.late_at = self.seal_by(each)  # by what waits now
            if each.late_at <= now or what == 1:
                self.take([each], served=False)
                late[each] = what == 1
        for each in self.waiting:
            if each.ripens_at <= now and not each.ripe:
                each.ripe = "delay" if each.item.enqueued + self.policy.max_delay <= now else "deadline"
        return [(each.item, timed_out) for each, timed_out in late.items()]

    def promise(self, stand: Stand, done: float) -> float:
        """The earlier of its two promises that can be kept; after its deadline it is owed nothing."""
        promises = (stand.item.enqueued + self.policy.objective, stand.item.deadline)
        return min((promise for promise in promises if done <= promise <= stand.item.deadline), default=NEVER)

    def form(self, group: list[Stand], now: float, free_at: float) -> tuple[int, str, float]:
        """How many of a group make a batch, why it is not to wait for more, and until when it should be done."""
        preferred, cap = self.policy.preferred, self.cap(group[0])
        rows, taken, mark, cut, until = 0, 0, 0, "", NEVER
        for each in group:
            after = rows + each.item.rows
            done = self.done(min(after, cap), each.length, now, free_at)
            if rows:
                if preferred and after > max(preferred) and mark == 0:
                    mark = taken
                promised = min(each.item.deadline, self.policy.objective) < NEVER
                if after > cap or done + self.deviation * (1 if promised else 2) > until:
                    cut = "full" if after > cap else "deadline"
                    break
            rows, taken, until = after, taken + 1, min(until, self.promise(each, done))
            if rows in preferred:
                mark = taken
        if mark and not any(each.ripe for each in group):
            return mark, "preferred", until
        if rows >= cap:
            cut = "full"
        if not cut and preferred and rows >= max(preferred):
            cut = "preferred"
        return taken, cut, until

    def next_batch(self, now: float, drain: bool, free_at: float) -> tuple[list[Stand], str]:
        for leader in self.line(self.waiting):
            group = self.group(leader)
            if group[0] is not leader:
                continue
            count, reason, until = self.form(group, now, free_at)
            if reason or drain or not self.policy.max_delay or any(each.ripe for each in group):
                ripe = next((each.ripe for each in group if each.ripe), "free")
                batch = group[:count]
                self.turn, self.refused = max(self.turn, leader.turn), 0
                merge = count == len(group) and not leader.alone and not self.policy.preferred
                joined = self.joining(group, until, now, free_at) if merge else []
                for part in (batch, *joined):
                    self.take(part, served=True)
                return sum(joined, batch), reason or ("drain" if drain else ripe)
        return [], ""

    def joining(self, leaders: list[Stand], until: float, now: float, free_at: float) -> list[list[Stand]]:
        """The groups of neighbouring lengths that join a batch."""
        joined = [leaders]
        while True:
            aboard = [each for part in joined for each in part]
            rows, length = sum(each.item.rows for each in aboard), max(each.length for each in aboard)
            work = self.padded(rows) * length
            same = [each for each in self.waiting if each.group == leaders[0].group and each not in aboard]
            shorter = [each for each in same if each.length < min(one.length for one in aboard)]
            longer = [each for each in same if each.length > length]
            best: tuple[int, int, int, list[Stand]] | None = None
            for side in (
                max(shorter, key=lambda each: each.length, default=None),
                min(longer, key=lambda each: each.length, default=None),
            ):
                if side is not None:
                    other = self.group(side)
                    more = sum(each.item.rows for each in other)
                    if rows + more <= self.policy.max_rows:
                        together = self.padded(rows + more) * max(length, side.length)
                        padding = together - work - self.padded(more) * side.length
                        if together <= self.largest and (best is None or padding < best[0]):
                            best = padding, together, rows + more, other
            if best is None:
                return joined[1:]
            padding, together, rows, other = best
            tokens = sum(each.item.rows * each.item.length for each in aboard + other)
            done = self.done(rows, together // self.padded(rows), now, free_at)
            late = done + self.deviation > until
            if self.b * padding >= self.a or late or together - tokens > self.policy.max_padding * together:
                return joined[1:]
            joined.append(other)
            until = min([until, *(self.promise(each, done) for each in other)])


def quarters(least: int, most: int) -> st.SearchStrategy[float]:
    return st.integers(least, most).map(lambda number: number / 4)


def grid(most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(1, most), max_size=3).map(lambda steps: tuple(sorted(steps)))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    max_rows = draw(st.sampled_from([8, 8, 6, 4, 2, 1]))
    levels = st.builds(
        Level,
        max_items=st.sampled_from([0, 0, 5]),
        timeout=st.one_of(st.just(NEVER), quarters(1, 12)),
        delay=st.booleans(),
        override=st.booleans(),
    )
    count = draw(st.sampled_from([1, 1, 2, 3]))
    lengths = draw(st.one_of(st.just(()), st.just(()), grid(8)))
    row_grid = draw(st.one_of(st.just(()), grid(max_rows).map(lambda steps: tuple(sorted({*steps, max_rows})))))
    max_cost = draw(st.sampled_from([0, 0, 12, 40]))
    if max_cost < max((*lengths, 1)) * (*row_grid, 1)[0]:
        max_cost = 0  # else it is refused
    return Policy(
        max_rows,
        preferred=draw(st.one_of(st.just(()), st.just(()), grid(max_rows))),
        max_delay=draw(st.one_of(st.just(0.0), quarters(1, 8))),
        objective=draw(st.one_of(st.just(NEVER), quarters(1, 20))),
        patience=draw(quarters(1, 12)),
        capacity=max_rows * draw(st.sampled_from([8, 16, 3, 1])),
        capacity_bytes=draw(st.sampled_from([1 << 30, 1 << 30, 60])),
        levels=tuple(draw(st.lists(st.one_of(st.just(Level()), levels), min_size=count, max_size=count))),
        default_level=draw(st.integers(0, count - 1)),
        fair=draw(st.booleans()),
        max_cost=max_cost,
        lengths=lengths,
        row_grid=row_grid,
        max_padding=draw(st.sampled_from([1.0, 1.0, 0.5, 0.25, 0.125])),
    )


ITEMS = {
    "left": st.one_of(st.just(NEVER), quarters(0, 40)),
    "busy": st.one_of(st.just(-NEVER), quarters(-4, 8)),
    "rows": st.sampled_from([1, 1, 1, 1, 2, 3]),
    "bucket": st.sampled_from(["a", "a", "a", "a", "b", None]),
    "length": st.sampled_from([2, 2, 2, 3, 4, 1, 5]),
    "nbytes": st.sampled_from([0, 1, 10]),
    "priority": st.integers(0, 4),
    "client": st.sampled_from("ABC"),
    "timeout": st.one_of(st.just(0.0), quarters(1, 8)),
}
COSTS = st.sampled_from([(0.0, 0.0), (0.25, 0.0), (0.25, 0.015625), (0.0, 0.0625), (0.5, 0.0625), (1.0, 0.125)])


PREPARATIONS = st.sampled_from(
    [(0.0, 0.0), (0.0, 0.0), (0.25, 0.0), (0.0, 0.015625), (0.0009765625, 0.0), (1.0, 0.125)]
)


class Queue(RuleBasedStateMachine):
    """Any interleaving of pushes, departures, time and batches."""

    @initialize(policy=policies(), costs=COSTS, preparation=PREPARATIONS)
    def begin(self, policy: Policy, costs: tuple[float, float], preparation: tuple[float, float]) -> None:
        self.pending: Pending[int, None] = Pending(policy, cost(*costs), cost(*preparation))
        self.naive = Naive(policy, *costs, *preparation, largest=policy.max_cost or NEVER)
        self.policy, self.now = policy, 0.0
        self.accepted: list[Request] = []
        self.gone: list[Request] = []  # once for each way out it took

    @rule(requests=st.lists(st.fixed_dictionaries(ITEMS), min_size=3, max_size=12))
    def push(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            self.push_one(**request)

    def push_one(self, left: float, busy: float, rows: int, **more: Any) -> None:
        new: Request = Item(len(self.accepted), None, min(rows, self.policy.max_rows), enqueued=self.now,
                            deadline=self.now + left, **more)  # fmt: skip
        expected = self.naive.push(new, self.now + busy)
        refused: QueueFull | DeadlineExceeded | None = None
        try:
            self.pending.push(new, self.now + busy)
        except (QueueFull, DeadlineExceeded) as error:
            refused = error
        else:
            self.accepted.append(new)
        assert (None if refused is None else type(refused)) is expected
        assert new.queued is (refused is None)
        if type(refused) is QueueFull:
            assert refused.retry_after == max(0.0, busy) + self.naive.drain()

    @rule(
        request=st.fixed_dictionaries({**ITEMS, "left": st.sampled_from([NEVER, NEVER, NEVER, 4.0])}),
        count=st.integers(1, 9),
    )
    def push_alike(self, request: dict[str, Any], count: int) -> None:
        more = {**request, "enqueued": self.now, "rows": min(request["rows"], self.policy.max_rows)}
        busy, more["deadline"] = more.pop("busy"), self.now + more.pop("left")
        first = len(self.accepted)
        news: list[Request] = [Item(first + index, None, **more) for index in range(count)]
        if self.pending.push_alike(news):
            assert [self.naive.push(new, self.now + busy) for new in news] == [None] * count
            assert all(new.queued for new in news)
            self.accepted += news
            return
        assert not any(new.queued for new in news)
        self.what_is_counted_is_there()
        for _ in news:
            self.push_one(**request)

    @precondition(lambda self: self.accepted)
    @rule(which=st.integers(0, 10**6))
    def forget(self, which: int) -> None:
        gone = self.accepted[which % len(self.accepted)]
        stands = [each for each in self.naive.waiting if each.item is gone]
        assert self.pending.forget(gone) == bool(stands)
        self.naive.take(stands, served=False)
        self.gone += [each.item for each in stands]

    @rule(seconds=quarters(1, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def advance(self) -> None:
        late = self.pending.advance(self.now)
        expected = self.naive.advance(self.now)
        assert sorted((each.payload, each.timed_out) for each in late) == sorted(
            (each.payload, timed_out) for each, timed_out in expected
        )
        for each in late:  # nobody who is not late is taken out, by what was predicted when it came
            assert each.deadline <= self.now or each.timed_out or each.deadline - self.now < NEVER
        assert self.pending.next_timer() > self.now
        self.gone += late

    @rule(drain=st.booleans(), busy=ITEMS["busy"])
    def seal_twice(self, drain: bool, busy: float) -> None:
        self.seal(drain, busy)
        self.seal(drain, busy)

    @rule(drain=st.booleans(), busy=ITEMS["busy"])
    def seal(self, drain: bool, busy: float) -> None:
        self.advance()
        line = self.naive.line(self.naive.waiting)
        head = self.pending.head(self.now, drain, self.now + busy)
        stands, reason = self.naive.next_batch(self.now, drain, self.now + busy)
        batch = self.pending.next_batch(self.now, drain, self.now + busy)
        if batch is None:
            assert not stands
            assert head == NEVER
            assert not line or (self.policy.max_delay and not drain)
            return
        assert [each.payload for each in batch.items] == [each.item.payload for each in stands]
        assert batch.reason == reason
        assert head == stands[0].place(self.policy)[3]
        self.check(batch, line, stands)
        self.gone += batch.items

    def check(self, batch: Batch[int, None], line: list[Stand], stands: list[Stand]) -> None:
        """What holds for every batch, whoever is right about which it is."""
        policy, items = self.policy, batch.items
        assert all(not each.queued and each.deadline > self.now for each in items)
        assert len({stand.group for stand in stands}) == 1
        assert batch.rows == sum(each.rows for each in items) <= policy.max_rows
        assert batch.length == max(stand.length for stand in stands)
        assert batch.padded_rows == self.naive.padded(batch.rows)
        assert batch.tokens == sum(each.rows * each.length for each in items) <= batch.cost
        assert batch.cost == batch.padded_rows * batch.length
        assert batch.cost <= self.pending.largest or len(items) == 1
        assert batch.predicted == self.pending.cost.seconds(batch.cost)
        assert batch.stacking == self.naive.stacking(batch.padded_rows, batch.length)
        assert batch.expected == batch.predicted + batch.stacking
        assert batch.sealed == self.now
        if batch.reason in ("free", "drain", "delay") or not policy.max_delay:
            assert stands[0] in line[:1] or policy.max_delay
        for length in {stand.length for stand in stands}:  # of each length, those who were first, and in their order
            mine = [stand for stand in stands if stand.length == length]
            assert mine == [each for each in line if (each.group, each.length) == (mine[0].group, length)][: len(mine)]
            assert all(one.place(policy) < two.place(policy) for one, two in pairwise(mine))

    @rule(largest=st.sampled_from([NEVER, 64, 40, 24, 12, 0]))
    def shrink(self, largest: float) -> None:
        self.naive.largest = largest
        self.pending.bound(largest)

    @rule(costs=COSTS, deviation=st.sampled_from([0.0, 0.0, 0.25, 1.0]))
    def learn(self, costs: tuple[float, float], deviation: float) -> None:
        self.naive.a, self.naive.b = self.pending.cost.a, self.pending.cost.b = costs
        self.naive.deviation = self.pending.cost.deviation = deviation

    @invariant()
    def what_is_counted_is_there(self) -> None:
        pending, waiting = self.pending, self.naive.waiting
        assert len(pending) == len(waiting)
        assert pending.rows == sum(each.item.rows for each in waiting)
        assert pending.nbytes == sum(each.item.nbytes for each in waiting)
        assert all(each.item.queued for each in waiting)
        assert len(self.accepted) == len(waiting) + len(self.gone)  # nothing is lost, and nothing leaves twice
        assert len(set(map(id, self.gone))) == len(self.gone)
        timers = [
            time
            for each in waiting
            for time, pends in (
                (each.late_at, True),
                (each.times_out_at, True),
                (each.delayed_at, not each.demoted),
                (each.ripens_at, not each.ripe),
            )
            if pends
        ]
        assert pending.next_timer() == min(timers, default=NEVER)
        if not waiting:
            assert_empty(pending)

    @rule()
    def predict(self) -> None:
        assert self.pending.drain_seconds() == self.naive.drain()
        for each in self.naive.waiting:
            rows = sum(one.item.rows for one in self.naive.group(each))
            start = self.naive.start(each, self.now)
            answered = self.naive.done(min(rows, self.naive.cap(each)), each.length, self.now, start)
            assert self.pending.answered_at(each.item, self.now) == answered

    def teardown(self) -> None:
        """Whatever waits in the end is sealed or late: all of it has left, once."""
        if not hasattr(self, "pending"):
            return
        while self.naive.waiting:
            self.seal(drain=True, busy=-NEVER)
            self.now += 0.25
        assert sorted(map(id, self.gone)) == sorted(map(id, self.accepted))
        assert_empty(self.pending)


TestQueue = Queue.TestCase
TestQueue.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, report_multiple_bugs=False
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    stream=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 4), st.integers(1, 6), quarters(1, 3)), min_size=60, max_size=60
    ),
    delay=st.sampled_from([0.0, 0.5]),
    patience=quarters(1, 8),
)
def test_no_stream_of_urgent_items_starves_one_that_is_not(
    stream: list[tuple[str, int, int, float]], delay: float, patience: float
) -> None:
    """Of all that is pushed after it, only what comes within its patience may go before it, whatever keeps coming."""
    pending = queue(max_delay=delay, patience=patience, capacity=10**6, costs=cost(0.0, 0.0))
    lone: Item[str, None] = Item("lone", None, 4, "lone", 0.0)
    pending.push(lone)
    overtakers, now = 0, 0.0
    for number in range(400):
        now = number / 4
        for bucket, rows, length, left in (stream[2 * number % 60], stream[(2 * number + 1) % 60]):  # more than served
            pending.push(Item("", None, rows, bucket, now, now + 50 * left if number % 3 else now + left, length))
        pending.advance(now)
        if (batch := pending.next_batch(now)) is not None:
            if lone in batch.items:
                break
            assert all(each.enqueued < patience for each in batch.items[:1])
            overtakers += 1
    assert not lone.queued
    assert overtakers <= 2 * 4 * patience


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 4), min_size=40, max_size=40),
    alone=st.booleans(),
    backlog=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
)
def test_clients_that_always_wait_get_equal_shares(rows: list[int], alone: bool, backlog: tuple[int, ...]) -> None:
    """However many requests each has waiting, and however large: no two are served more than some items apart."""
    pending = queue(fair=True, capacity=1000)
    served = dict.fromkeys(range(3), 0)
    numbers = iter(rows * 100)

    def push(client: int) -> None:
        pending.push(Item("", None, next(numbers), None if alone else "", 0.0, client=client))

    for client, count in enumerate(backlog):
        for _ in range(count + 1):
            push(client)
    for _ in range(200):
        for each in sealed(pending).items:
            assert isinstance(each.client, int)
            served[each.client] += each.rows
            push(each.client)
        assert max(served.values()) - min(served.values()) <= 4 + 4 + 4
