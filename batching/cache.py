"""Answers by key: bounded in bytes, kept for a time, and computed once however many ask at the same time.

Whoever asks first for a key leads a flight: it computes. Whoever asks for the same key meanwhile follows: it waits for
that result. Everything runs on one event loop: there is no lock, and no task.

    the leader has a result           everybody in the flight gets it, and it is stored
    the leader fails or is cancelled  it alone gets its error; the follower who waited longest leads, with its own
                                      computation, and the others wait on
    a follower's deadline passes      DeadlineExceeded, for it alone
    a follower's caller is cancelled  it leaves; if it had just been chosen to lead, the next one is

Rules.
1. An answer is held until it is `seconds` old, counted from the end of its computation, or until room is needed and it
   is the one that was not used for the longest time. All entries live equally long, so the oldest is the first to
   expire: it is looked at whenever another is stored. No timer: a cache that nobody asks holds what it has.
2. A flight is in the table as long as somebody leads it. `clear` takes it out: those in it get their answer, but it is
   not stored, and whoever asks from then on starts another.
3. A follower's turn is done as soon as it is decided what becomes of it, before its task runs again. What is decided
   then is not decided twice, and a decision that nobody is there to follow is passed on.
4. Who follows holds its own request meanwhile: followers are bounded in number and in the bytes of their requests. Who
   leads is counted by whoever computes, and no longer here.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import DeadlineExceeded, QueueFull

R = TypeVar("R")

# What a follower waits for: the result, in a tuple, since it may be None; or None: it is to lead.
_Turn = asyncio.Future[tuple[R] | None]
# Those who follow, longest waiting first, and the bytes of their requests. Its identity is the flight's.
_Flight = dict[_Turn[R], int]

# Bytes that an entry costs beside its result: the record, its two numbers, its places in two ordered dictionaries and
# a key that is a tuple of two names and a digest of 32 bytes. CPython 3.11 takes 370 to 600, by how full the
# dictionaries are. `test_an_entry_costs_no_more_than_it_is_counted_for` measures it.
ENTRY_BYTES = 640


@dataclass(slots=True, eq=False)
class _Entry(Generic[R]):
    result: R
    size: int
    expires: float


class Cache(Generic[R]):
    """Answers of one model, or of several whose keys differ.

    Attributes:
        hits: answers from the store.
        misses: flights started. The computations are these and `handed_over`.
        joined: callers who followed a flight.
        handed_over: followers who led in the end, since whoever led before them failed or left.
        evicted: entries that made room for others.
        expired: entries dropped because of their age.
        bytes: what the entries hold now, at most the capacity.
        waiting: followers now.
        waiting_bytes: what their requests hold.
        refused: callers who would have followed, and for whom there was no room.
        late: callers who got DeadlineExceeded while they followed, or since they would have had to.
    """

    def __init__(
        self,
        capacity: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        max_waiting: int = 1024,
        max_waiting_bytes: int = 1 << 30,
    ) -> None:
        """To be made on a running event loop, which it stays with.

        Args:
            capacity: most bytes of all entries. 0: nothing is stored, only flights are shared.
            seconds: how old an answer may be when it is given; math.inf for any age.
            max_waiting: most followers of all flights.
            max_waiting_bytes: most bytes of their requests.
        """
        if capacity < 0:
            raise ValueError(f"capacity must be a number of bytes, at least 0, got {capacity}")
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {seconds}")
        if max_waiting < 0:
            raise ValueError(f"max_waiting must be at least 0, got {max_waiting}")
        if max_waiting_bytes < 0:
            raise ValueError(f"max_waiting_bytes must be at least 0, got {max_waiting_bytes}")
        self._loop = asyncio.get_running_loop()  # each call of that is a system call in Python 3.11
        self._capacity = capacity
        self._seconds = seconds
        self._clock = clock
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        # The same entries twice: least recently used first, and oldest first. A plain dict is slow at its front.
        self._by_use: OrderedDict[Hashable, _Entry[R]] = OrderedDict()
        self._by_age: OrderedDict[Hashable, _Entry[R]] = OrderedDict()
        self._flights: dict[Hashable, _Flight[R]] = {}
        self.hits = self.misses = self.joined = self.handed_over = self.evicted = self.expired = 0
        self.refused = self.late = 0
        self.bytes = 0
        self.waiting = self.waiting_bytes = 0

    def __len__(self) -> int:
        return len(self._by_use)

    async def answer(
        self,
        key: Hashable,
        compute: Callable[[], Awaitable[R]],
        size: Callable[[R], int],
        deadline: float = math.inf,
        nbytes: int = 0,
    ) -> R:
        """The answer to `key`: the stored one, the one that is being computed, or `compute()`.

        The very same object is given to everybody who asks for the key: it is to be read, never changed.

        Args:
            compute: is not to ask for the same key: it would wait for itself. Its deadlines are its own.
            size: bytes that a result holds. A result that does not fit is given, and not stored.
            deadline: clock seconds until which it follows another's computation.
            nbytes: bytes that the request holds while it follows.

        Raises:
            QueueFull: at once, too many follow already, or there is no room for its bytes among theirs.
            DeadlineExceeded: the deadline passed while it followed.
            Exception: whatever its own `compute` raised.
        """
        entry = self._by_use.get(key)
        if entry is not None:
            now = self._clock()
            if now <= entry.expires:
                self._by_use.move_to_end(key)
                self.hits += 1
                return entry.result
            self._expire(now)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = {}
            self.misses += 1
        else:
            landed = await self._follow(key, flight, deadline, nbytes)
            if landed is not None:
                return landed[0]
            self.handed_over += 1
        try:
            result = await compute()
        except BaseException:
            self._hand_over(key, flight)
            raise
        for turn in flight:
            if not turn.done():  # cancelled in this turn of the event loop
                turn.set_result((result,))
        self.waiting -= len(flight)
        self.waiting_bytes -= sum(flight.values())
        flight.clear()
        if self._close(key, flight):
            self._store(key, result, size(result) + ENTRY_BYTES)
        return result

    def clear(self) -> None:
        """Forget every answer, those too that are being computed: what they are computed with is no longer right."""
        self._by_use.clear()
        self._by_age.clear()
        self._flights.clear()
        self.bytes = 0

    def report(self) -> dict[str, int]:
        """The counters as plain values."""
        names = (
            "hits", "misses", "joined", "handed_over", "evicted", "expired", "bytes", "waiting", "waiting_bytes",
            "refused", "late",
        )  # fmt: skip
        return {"entries": len(self), **{name: getattr(self, name) for name in names}}

    async def _follow(self, key: Hashable, flight: _Flight[R], deadline: float, nbytes: int) -> tuple[R] | None:
        """Wait for what the flight brings; None if it is for this follower now to lead it."""
        left = deadline - self._clock()
        if left <= 0:
            self.late += 1
            raise DeadlineExceeded("the deadline passed before the request could wait for another's answer")
        self._check_room(nbytes)
        turn: _Turn[R] = self._loop.create_future()
        timer = self._loop.call_later(left, self._on_deadline, flight, turn) if left != math.inf else None
        flight[turn] = nbytes
        self.waiting += 1
        self.waiting_bytes += nbytes
        self.joined += 1
        try:
            return await turn
        except DeadlineExceeded:
            self.late += 1
            raise
        except BaseException:
            # False if it was decided already: then it may have been chosen in the very turn in which it was cancelled.
            if not self._leave(flight, turn) and not turn.cancelled() and not turn.exception() and not turn.result():
                self._hand_over(key, flight)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            del turn  # an error's traceback holds this frame, which must not hold the error

    def _check_room(self, nbytes: int) -> None:
        room = self._max_waiting_bytes
        if self.waiting >= self._max_waiting:
            text = f"{self.waiting} requests wait for others' answers already, no room for another"
        elif nbytes > room - self.waiting_bytes:
            text = f"{self.waiting_bytes} of {room} bytes wait for others' answers already, no room for {nbytes} more"
        else:
            return
        self.refused += 1
        raise QueueFull(text, 0.0)  # one computation that ends may make room for all: nothing is predicted

    def _on_deadline(self, flight: _Flight[R], turn: _Turn[R]) -> None:
        if self._leave(flight, turn) and not turn.done():
            turn.set_exception(DeadlineExceeded("the deadline passed while the request waited for another's answer"))

    def _leave(self, flight: _Flight[R], turn: _Turn[R]) -> bool:
        """Take a follower out. False if it does not wait any more."""
        if turn in flight:
            self.waiting_bytes -= flight.pop(turn)
            self.waiting -= 1
            return True
        return False

    def _hand_over(self, key: Hashable, flight: _Flight[R]) -> None:
        """Nobody leads: let the follower who waited longest do it, and end the flight if there is none."""
        for turn in flight:
            if not turn.done():  # those who are were cancelled, and leave when their tasks run
                self._leave(flight, turn)
                turn.set_result(None)
                return
        self._close(key, flight)

    def _close(self, key: Hashable, flight: _Flight[R]) -> bool:
        """Take a flight out of the table. False if `clear` did that before."""
        if self._flights.get(key) is flight:
            del self._flights[key]
            return True
        return False

    def _store(self, key: Hashable, result: R, size: int) -> None:
        """Keep an answer, if it can fit. There is none of that key: who has one starts no flight."""
        now = self._clock()
        self._expire(now)
        if size > self._capacity:
            return
        while self.bytes + size > self._capacity:
            old, entry = self._by_use.popitem(last=False)
            del self._by_age[old]
            self.bytes -= entry.size
            self.evicted += 1
        self._by_use[key] = self._by_age[key] = _Entry(result, size, now + self._seconds)
        self.bytes += size

    def _expire(self, now: float) -> None:
        """Drop every entry that is too old."""
        while self._by_age:
            key = next(iter(self._by_age))
            entry = self._by_age[key]
            if now <= entry.expires:
                return
            del self._by_age[key], self._by_use[key]
            self.bytes -= entry.size
            self.expired += 1
