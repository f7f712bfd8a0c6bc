"""What one engine behind N workers costs and gains: `python -m bench.engine`.

Four tables, from one run:

    engine CPU per request   one worker keeps 8 batches of 32 full; the model copies its input (backend `identity`), so
                             what is left is reading frames, queueing, stacking, splitting, and writing frames
    workers                  wrk loads the digits model through 1, 2 and 4 workers on one listening socket: with one
                             engine behind them, and with a model, a queue and a truth in each
    large tensors            600 KB there and back, several at a time, next to copying as many bytes in this process
    a worker                 its memory, and its time from the start to ready, with the engine up

The rows of a table are loaded in turn, round after round; a cell is the median, with the smallest and the largest.
CPU is user and system time (/proc) of the processes that are named, divided by the answered requests.
"""

import argparse
import asyncio
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop

from engine.ipc.client import RemoteEngine
from engine.settings import Settings
from engine.types import InferRequest

from .http import SCRIPT, Target, _lua, check, load
from .report import heading, progress, publish, spread, table
from .samples import INFER, binary_post, json_post, read_samples
from .servers import ENGINE, LAUNCHER, BenchError, Server, running, unwind_on_signals

SMALL, LARGE = 64, 150_000  # FP32 elements: 256 bytes, 600 KB
BATCH = 32
AT_ONCE = 8 * BATCH  # small requests under way
READY = "/v2/health/ready"

IDENTITY = """
backend: "identity"
max_batch_size: {rows}
input [ {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ {size} ] }} ]
output [ {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ {size} ] }} ]
dynamic_batching {{ }}
"""


class Row(NamedTuple):
    """So many workers, and what is behind them."""

    workers: int
    target: Target
    processes: list[Server]
    engine: Server | None

    @property
    def name(self) -> str:
        return "one engine" if self.engine else "a model each"


@contextmanager
def engine(models: Path, folder: Path, name: str) -> Iterator[Server]:
    """`python -m engine` on a repository, ready."""
    path = str(folder / name)
    command = (*ENGINE, "--models", str(models), "--engine-socket", path, "--classifier", "")
    with running(command, path, ready="") as server:
        yield server


def repository(folder: Path) -> Path:
    for name, size, rows in (("small", SMALL, BATCH), ("large", LARGE, 8)):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(IDENTITY.format(rows=rows, size=size))
    return folder


async def ask(remote: RemoteEngine, model: str, size: int, at_once: int, seconds: float) -> tuple[int, float]:
    """Keep so many requests under way. Returns how many were answered, and the seconds that it took."""
    tensor = np.arange(size, dtype=np.float32).reshape(1, size)
    answered = 0
    until = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal answered
        while time.perf_counter() < until:
            response = await remote.infer(InferRequest(model, "", {"INPUT0": tensor}))
            answered += 1
            if answered % 1000 == 1 and not np.array_equal(response.outputs["OUTPUT0"], tensor):
                raise BenchError(f"model {model} answered with other numbers than it was asked with")

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return answered, time.perf_counter() - began


async def engine_cost(server: Server, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """Microseconds of engine CPU per small request in full batches; GB/s of large ones, both directions together."""
    remote = RemoteEngine(Settings(engine_socket=str(server.address)))
    await remote.start()
    small, large = [], []
    try:
        for number in range(-1, rounds):  # the first does not count
            before = server.cpu_seconds()
            answered, _ = await ask(remote, "small", SMALL, AT_ONCE, seconds)
            cpu = server.cpu_seconds() - before
            count, took = await ask(remote, "large", LARGE, 4, seconds)
            if number >= 0:
                small.append(cpu / answered * 1e6)
                large.append(2 * count * LARGE * 4 / took / 1e9)
                progress(f"round {number + 1} of {rounds}: {small[-1]:.1f} us, {large[-1]:.2f} GB/s")
    finally:
        await remote.stop()
    return small, large


def memcpy(rounds: int) -> list[float]:
    """GB/s of copying 600 KB from one buffer of this process to another, two in turn, as a request and its answer."""
    source, target = bytearray(LARGE * 4), bytearray(LARGE * 4)
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(500):
            target[:] = source
            source[:] = target
        rates.append(500 * 2 * LARGE * 4 / (time.perf_counter() - began) / 1e9)
    return rates


@contextmanager
def rows(counts: Sequence[int], folder: Path, stack: ExitStack) -> Iterator[list[Row]]:
    """Every row's processes, all of them idle but those that are loaded."""
    samples = read_samples()[7:8]
    post = json_post(samples)
    script = folder / "digits.lua"
    headers = "\n".join(f"wrk.headers[{_lua(key)}] = {_lua(value)}" for key, value in post.headers.items())
    script.write_text(SCRIPT.format(body=_lua(post.body), headers=headers))
    owner = stack.enter_context(engine(Path("models"), folder, "digits.sock"))
    found = []
    for count in counts:
        for behind in (owner, None):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
            address = listener.getsockname()
            environment = {"MILLRACE_ENGINE_SOCKET": str(owner.address)} if behind else {}
            processes = []
            for number in range(count):
                progress(f"starting worker {number + 1} of {count}, {'with the engine' if behind else 'alone'}")
                command = (*LAUNCHER, "--fd", str(listener.fileno()))
                each = running(command, address, ready=READY, fd=listener.fileno(), environment=environment)
                processes.append(stack.enter_context(each))
            check(processes[0], post, binary_post(samples))
            name = f"{count} workers, {'one engine' if behind else 'a model each'}"
            url = f"http://127.0.0.1:{address[1]}{INFER}"
            found.append(Row(count, Target(name, processes[0], url, script), processes, behind))
    yield found


def cpu_of(row: Row) -> tuple[float, float]:
    """Seconds of the workers and of the engine so far."""
    return sum(each.cpu_seconds() for each in row.processes), row.engine.cpu_seconds() if row.engine else 0.0


def measure(found: list[Row], connections: int, rounds: int, seconds: int) -> str:
    results: dict[str, list[tuple[float, float, float, float]]] = {row.target.name: [] for row in found}
    for number in range(-1, rounds):
        for row in found:
            before = cpu_of(row)
            result = load(row.target, connections, seconds)
            after = cpu_of(row)
            answered = result.rate * seconds
            workers, owner = ((b - a) / answered * 1e6 for a, b in zip(before, after, strict=True))
            progress(f"round {number + 1} of {rounds}, {row.target.name}: {result.rate:,.0f} requests/s")
            if number >= 0:
                results[row.target.name].append((result.rate, result.p99, workers, owner))
    lines = []
    for row in found:
        rates, p99s, workers_cpu, owner_cpu = map(list, zip(*results[row.target.name], strict=True))
        lines.append(
            [
                str(row.workers), row.name, spread(rates, ",.0f"), spread(p99s, ".1f"), spread(workers_cpu, ".0f"),
                spread(owner_cpu, ".0f") if row.engine else "",
            ]
        )  # fmt: skip
    header = ["workers", "behind them", "requests/s", "p99 ms", "workers' CPU us/request", "engine's CPU us/request"]
    return table(header, lines, 2)


def a_worker(owner: Server, rounds: int) -> tuple[list[float], list[float]]:
    """MiB resident, and seconds from the start to ready."""
    memory, starts = [], []
    for _ in range(rounds):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            command = (*LAUNCHER, "--fd", str(listener.fileno()), "--engine-socket", str(owner.address))
            began = time.perf_counter()
            with running(command, listener.getsockname(), ready=READY, fd=listener.fileno()) as worker:
                starts.append(time.perf_counter() - began)
                status = Path(f"/proc/{worker.process.pid}/status").read_text()
                (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
                memory.append(int(line.split()[1]) / 1024)
    return memory, starts


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each load (default: 3)")
    parser.add_argument("--output", type=Path, help="write the result to this file too")
    options = parser.parse_args(arguments)
    if shutil.which("wrk") is None:
        print("bench.engine needs wrk: apt install wrk", file=sys.stderr)
        return 1
    unwind_on_signals()
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with engine(repository(folder / "models"), folder, "identity.sock") as server:
                small, large = uvloop.run(engine_cost(server, options.rounds, options.seconds))
            copied = memcpy(options.rounds)
            with engine(Path("models"), folder, "worker.sock") as server:
                memory, starts = a_worker(server, options.rounds)
            with rows(options.workers, folder, stack) as found:
                workers = measure(found, options.connections, options.rounds, options.seconds)
    except BenchError as error:
        print(f"\nbench.engine: {error}", file=sys.stderr)
        return 1
    costs = table(
        ["", "", "median (smallest to largest)"],
        [
            [f"engine CPU, 256 bytes in batches of {BATCH}, {AT_ONCE} under way", "us/request", spread(small, ".1f")],
            ["600 KB there and back through the engine", "GB/s", spread(large, ".2f")],
            ["600 KB copied twice in one process", "GB/s", spread(copied, ".2f")],
            ["a worker's resident memory", "MiB", spread(memory, ".0f")],
            ["a worker's start to ready", "s", spread(starts, ".2f")],
        ],
        2,
    )
    note = (
        f"Median of {options.rounds} interleaved rounds of {options.seconds} s each, wrk with {options.connections} "
        "connections on the same machine."
    )
    publish("\n\n".join([heading("bench.engine", arguments), costs, workers, note]), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
