"""`python -m engine`: it serves workers at a path, refuses company, is relieved, and says how it is."""

import asyncio
import contextlib
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import Address, check_samples, load, request
from .processes import Process, engine_program, engine_status, eventually, launcher, run, started

pytestmark = pytest.mark.e2e

PATH = "run/own-engine.sock"


@contextlib.contextmanager
def engine(folder: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Process]:
    """An engine that serves the shipped model at PATH."""
    command = engine_program(folder, "--engine-socket", PATH, *options)
    with started(folder, *command, environment=environment) as process:
        process.wait_for_log(f"ready: 1 models at {PATH}")
        yield process


@contextlib.contextmanager
def worker(folder: Path) -> Iterator[tuple[Process, Address]]:
    """A worker of the engine at PATH, once it has met it."""
    path = folder / "run/worker.sock"
    with started(folder, *launcher(folder), "--uds", str(path), environment={"ENGINE_SOCKET": PATH}) as process:
        process.wait_for_log("ready; ask it")
        eventually(lambda: process.pid in workers(folder), "the worker has the engine")
        yield process, path


def workers(folder: Path) -> list[int]:
    return [worker["pid"] for worker in engine_status(folder, PATH).get("workers", ())]


async def test_it_serves_workers_that_come_and_go(folder: Path) -> None:
    """The status has the process, its models and whoever is connected; the socket is nobody else's."""
    with engine(folder) as process:
        assert stat.S_IMODE((folder / PATH).stat().st_mode) == 0o600
        with worker(folder) as (front, address):
            await check_samples(address)
            status = engine_status(folder, PATH)
            assert (status["pid"], status["ready"], status["live"]) == (process.pid, True, True)
            assert [model["name"] for model in status["models"]] == ["digits"]
            assert workers(folder) == [front.pid]
        eventually(lambda: workers(folder) == [], "the worker is gone")
        process.signal()
        assert await asyncio.to_thread(process.wait) == 0
        assert not (folder / PATH).exists()


def test_a_live_engine_is_not_replaced(folder: Path) -> None:
    """The second one ends at once, with 2, and names the first, which serves on."""
    with engine(folder) as first:
        ended = run(folder, *engine_program(folder, "--engine-socket", PATH))
        assert ended.returncode == 2
        assert f"--engine-socket: another engine, process {first.pid}, serves at {PATH}" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert "loading" not in ended.stderr
        assert engine_status(folder, PATH)["pid"] == first.pid


async def test_a_successor_takes_over_under_load(folder: Path) -> None:
    """With --takeover: the workers go to it without a failed request; the first one ends and leaves its path alone."""
    with engine(folder) as first, worker(folder) as (front, address), contextlib.ExitStack() as later:
        async with load(address, clients=2) as tally:
            await tally.more(10)
            second = later.enter_context(engine(folder, "--takeover"))
            eventually(lambda: workers(folder) == [front.pid], "the worker has the successor")
            first.wait_for_log(f"another engine serves at {PATH}")
            first.signal()
            assert await asyncio.to_thread(first.wait) == 0
            assert engine_status(folder, PATH)["pid"] == second.pid
            await tally.more(10)
        assert set(tally.statuses) == {200}, tally
        assert not tally.failures, tally.failures


async def test_a_dead_engines_socket_is_replaced(folder: Path) -> None:
    """What a killed one left at the path does not keep the next one from starting; status of nobody is 3."""
    with engine(folder) as process:
        process.signal(signal.SIGKILL)
        process.wait()
    assert (folder / PATH).is_socket()
    assert run(folder, *engine_program(folder, "status", "--engine-socket", PATH)).returncode == 3
    with engine(folder) as process, worker(folder) as (_, address):
        await check_samples(address)
        assert run(folder, *engine_program(folder, "status"), environment={"ENGINE_SOCKET": PATH}).returncode == 0


def test_a_missing_repository_ends_with_3(folder: Path) -> None:
    """The engine cannot start: exit code 3, the message names the folder, and nothing is at the path."""
    ended = run(folder, *engine_program(folder, "--engine-socket", PATH, "--models", "no/such/folder"))
    assert ended.returncode == 3, ended
    assert "no/such/folder" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (folder / PATH).exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
async def test_a_second_signal_forces_the_end(folder: Path, name: str) -> None:
    """The first lets a worker that does not answer have its time; the second does not."""
    with engine(folder, "--drain-delay", "600") as process, worker(folder) as (_, address):
        process.signal(signal.Signals[name])
        process.wait_for_log("stopping")
        async with asyncio.timeout(60):
            while (await request(address, "GET", "/v2/health/ready")).status == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await check_samples(address)
        process.signal(signal.Signals[name])
        assert await asyncio.to_thread(process.wait) == 0
