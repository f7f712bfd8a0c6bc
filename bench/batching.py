"""What batching costs in Python: `python -m bench.batching` prints microseconds a request, step by step.

A batch is made again and again: its items are pushed, sealed, answered and recorded, the model takes no time. Each step
is timed for the batch and divided by its items; the best of several rounds is shown, since the rest says how busy the
machine was. `whole` is all of it through `Batcher.submit`, with the tasks and futures of asyncio, by the median.
"""

import argparse
import asyncio
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from batching import Batcher, Cost, Item, Level, Pending, Policy
from batching.batcher import settle
from batching.journal import Journal

from .report import heading, publish, table

ROUNDS, BATCHES = 7, 300
STEPS = ("item", "push", "form", "answer", "record")

# What waits already, and what the items bring with them.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "plain": ({}, {}, 0),
    "1000 waiting": ({}, {}, 1000),
    "deadlines": ({}, {"deadline": 1e9}, 0),
    "deadlines, 1000 waiting": ({}, {"deadline": 1e9}, 1000),
    "fair shares": ({"fair": True}, {"client": "c"}, 0),
    "two levels, timeouts": ({"levels": (Level(), Level(timeout=1e6))}, {"priority": 2}, 0),
    "max_delay": ({"max_delay": 1e-6}, {}, 0),
}


class Echo:
    """A model that takes no time."""

    preparation = Cost()

    async def prepare(self, payloads: Sequence[int], rows: int, length: int) -> object:
        return None

    async def run(self, payloads: Sequence[int], rows: int, length: int, prepared: object = None) -> Sequence[int]:
        return payloads


def steps(policy: Policy, arguments: dict[str, Any], waiting: int, size: int) -> dict[str, float]:
    """Microseconds an item by step, the best of ROUNDS."""
    loop = asyncio.new_event_loop()
    pending: Pending[int, asyncio.Future[int]] = Pending(policy)
    for rows in (1, size):
        pending.cost.learn(rows, 0.004 + 0.0001 * rows)
    journal, now, clock = Journal(), 1.0, time.perf_counter
    best = dict.fromkeys(STEPS, math.inf)

    def item() -> Item[int, asyncio.Future[int]]:
        return Item(1, loop.create_future(), 1, (), now, **arguments)

    for _ in range(waiting):
        pending.push(item())
    for _ in range(ROUNDS):
        spent = dict.fromkeys(STEPS, 0.0)
        for _ in range(BATCHES):
            now += 0.001
            marks = [clock()]
            items = [item() for _ in range(size)]
            marks.append(clock())
            for each in items:
                pending.push(each)
            marks.append(clock())
            pending.advance(now)
            batch = pending.next_batch(now + 0.0001, drain=True)
            marks.append(clock())
            assert batch is not None
            assert len(batch.items) == size
            for each in batch.items:
                settle(each, 1)
            marks.append(clock())
            journal.ended(batch, 0.001, False)
            marks.append(clock())
            for index, step in enumerate(STEPS):
                spent[step] += marks[index + 1] - marks[index]
        for step in STEPS:
            best[step] = min(best[step], spent[step] / BATCHES / size * 1e6)
    loop.close()
    return best


async def whole(policy: Policy, arguments: dict[str, Any], size: int) -> float:
    """Microseconds an item through `Batcher.submit`, by `size` callers at a time."""
    wake: Callable[[], None] = lambda: None  # noqa: E731
    batcher: Batcher[int, int] = Batcher(policy, Echo(), wake)
    if "deadline" in arguments:
        arguments = {**arguments, "deadline": time.monotonic() + 1e6}
    loop, times = asyncio.get_running_loop(), []
    for _ in range(BATCHES):
        started = time.perf_counter()
        tasks = [loop.create_task(batcher.submit(1, **arguments)) for _ in range(size)]
        await asyncio.sleep(0)
        batcher.urgency(drain=True)
        batch = batcher.seal(drain=True)
        assert batch is not None
        await batcher.run(batch)
        await asyncio.gather(*tasks)
        times.append((time.perf_counter() - started) / size * 1e6)
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.batching", description=__doc__)
    parser.add_argument("--size", type=int, default=32, help="items of a batch (32)")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    rows = []
    for name, (knobs, brings, waiting) in CASES.items():
        policy = Policy(max_rows=options.size, capacity=100_000, **knobs)
        cost = steps(policy, brings, waiting, options.size)
        total = sum(cost[step] for step in STEPS[:4])
        through = "" if waiting else f"{asyncio.run(whole(policy, brings, options.size)):.2f}"
        figures = [*(cost[step] for step in STEPS[:4]), total, cost[STEPS[4]]]
        rows.append([name, *(f"{figure:.2f}" for figure in figures), through])
    header = ["microseconds a request", *STEPS[:4], "sum", STEPS[4], "whole"]
    publish(
        f"# What batching costs, at batches of {options.size}\n\n"
        f"{heading('bench.batching', arguments)}\n\n{table(header, rows, 1)}\n",
        options.output,
    )


if __name__ == "__main__":
    main()
