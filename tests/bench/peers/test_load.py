"""The generator of load: its schedule, its percentiles, and what it counts of servers that behave in every way."""

import asyncio
import math
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from bench.client import encode
from bench.peers.load import Load
from bench.peers.plan import POISONED, Outcome, Plan, quantile, schedule

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
GOOD, BAD = encode("POST", "/", b"good").decode(), encode("POST", "/", b"bad").decode()


async def run(answer: Answer, rate: float = 200.0, **more: float) -> tuple[Outcome, Counter[bytes]]:
    """The outcome of a short plan, and what the server saw, by body."""
    seen: Counter[bytes] = Counter()
    served = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
                seen[body] += 1
                await answer(body, writer)
        except (EOFError, OSError):
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        plan = Plan(port, [GOOD], rate, 4, 0.5, [BAD], warm=0.1, **more)  # type: ignore[arg-type]
        outcome = await Load(plan).run()
        await asyncio.gather(*(task for task in served if task))
    return outcome, seen


def reply(writer: asyncio.StreamWriter, status: int, more: str = "") -> None:
    writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: 4\r\n{more}\r\nbody".encode())


async def judge(body: bytes, writer: asyncio.StreamWriter) -> None:
    """What a good server does."""
    reply(writer, 200 if body == b"good" else 400)


def test_the_schedule_is_a_poisson_process() -> None:
    """Mean and deviation of the gaps are both those of the rate; it is the same for a seed, and another for another."""
    dues = list(schedule(1000.0, 20.0, 1))
    gaps = [late - early for early, late in zip([0.0, *dues], dues, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(1e-3, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1e-3, rel=0.05)
    assert dues == sorted(dues)
    assert dues[-1] < 20.0
    assert dues == list(schedule(1000.0, 20.0, 1)) != list(schedule(1000.0, 20.0, 2))


def test_a_quantile_is_one_of_the_values() -> None:
    """The smallest that so many do not exceed: of a thousand, p99.9 is the second slowest."""
    ranked = [float(number) for number in range(1, 1001)]
    assert [quantile(ranked, share) for share in (0.5, 0.99, 0.999, 1.0)] == [500.0, 990.0, 999.0, 1000.0]
    assert quantile([3.0], 0.5) == 3.0
    assert math.isnan(quantile([], 0.5))


async def test_every_request_that_was_due_is_sent_and_counted() -> None:
    """With 4 connections and a server that answers, all that the schedule has after the warm-up are good."""
    outcome, seen = await run(judge)
    due = [each for each in schedule(200.0, 0.6, 0) if each >= 0.1]
    assert outcome.sent == len(due)
    assert outcome.answers == [(0, 200, "body", len(due))]
    assert outcome.broken == 0
    assert seen[b"good"] == len(list(schedule(200.0, 0.6, 0)))


async def test_a_closed_loop_asks_again_when_it_is_answered() -> None:
    """There is no schedule: what is sent is what was answered."""
    outcome, _ = await run(judge, rate=0.0)
    assert outcome.sent == outcome.answers[0][3] > 4
    assert outcome.broken == 0


async def test_poisoned_requests_are_not_good_ones() -> None:
    """They are told apart in the answers, and not counted as sent, or lost."""
    outcome, seen = await run(judge, poisoned_share=0.3)
    counts = {(index, status): count for index, status, _, count in outcome.answers}
    assert counts.keys() == {(0, 200), (POISONED, 400)}
    assert counts[0, 200] == outcome.sent
    assert seen[b"bad"] >= counts[POISONED, 400] > 0


async def test_clients_who_leave_are_not_counted() -> None:
    """The server sees their requests; nobody expects an answer, so none is lost."""
    outcome, seen = await run(judge, leaving_share=0.5)
    assert outcome.answers == [(0, 200, "body", outcome.sent)]
    assert outcome.broken == 0
    assert seen[b"good"] > outcome.sent * 1.2


async def test_an_answer_may_come_in_pieces() -> None:
    """Byte by byte it is one answer."""

    async def dribble(body: bytes, writer: asyncio.StreamWriter) -> None:
        for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nbody":
            writer.write(bytes([byte]))
            await asyncio.sleep(0)

    outcome, _ = await run(dribble, rate=50.0)
    assert outcome.answers == [(0, 200, "body", outcome.sent)]


async def test_a_request_whose_connection_ends_is_broken_and_the_next_gets_a_new_one() -> None:
    """A server that hangs up on every third request loses those, and no other."""
    asked = 0

    async def hang_up(body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        if asked % 3:
            await judge(body, writer)
        else:
            writer.close()

    outcome, _ = await run(hang_up)
    good = sum(count for _, _, _, count in outcome.answers)
    assert outcome.broken == outcome.sent - good
    assert outcome.broken == pytest.approx(outcome.sent / 3, abs=2)


async def test_a_connection_that_the_server_will_close_is_not_used_again() -> None:
    """With Connection: close in every answer nothing is lost."""

    async def close(body: bytes, writer: asyncio.StreamWriter) -> None:
        reply(writer, 200, "Connection: close\r\n")
        writer.close()

    outcome, _ = await run(close)
    assert outcome.answers == [(0, 200, "body", outcome.sent)]
    assert outcome.broken == 0
