"""The whole service as supervisord.conf and circus.ini start it: an engine and two workers, and what replaces them."""

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .client import Address, Tally, check_samples, load
from .processes import (
    ENGINE,
    MANAGERS,
    STARTED,
    Process,
    checkout,
    engine_program,
    engine_status,
    eventually,
    listens,
    run,
)

pytestmark = pytest.mark.e2e


@dataclass
class Service:
    folder: Path
    manager: Process
    address: Address

    def pids(self) -> tuple[int, set[int]]:
        """Of the engine and of its workers."""
        status = engine_status(self.folder)
        return status["pid"], {worker["pid"] for worker in status["workers"]}

    def roll(self, *arguments: str) -> tuple[int, list[str], str]:
        """Exit code, lines, and what it complained of."""
        ended = run(self.folder, str(self.folder / ".venv/bin/python"), "deploy/roll.py", *arguments)
        return ended.returncode, ended.stdout.splitlines(), ended.stderr


@pytest.fixture(scope="module", params=MANAGERS)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """The shipped files' service, ready; at the end nothing of it is left, not even a socket."""
    with checkout() as folder:
        with MANAGERS[request.param](folder) as (manager, address):
            yield Service(folder, manager, address)
        assert not listens(address)
        assert not (folder / ENGINE).exists()


def nothing_lost(tally: Tally) -> None:
    assert not tally.failures, tally.failures
    assert (tally.refused, tally.wrong, set(tally.statuses)) == (0, 0, {200}), tally


async def test_it_serves(service: Service) -> None:
    """One engine and two workers of its own: every sample comes back as its digit."""
    await check_samples(service.address)
    engine, workers = service.pids()
    assert len(workers) == 2
    assert engine not in workers


@pytest.mark.parametrize("how", ["--engine", "--engine-in-place"])
async def test_a_roll_replaces_everything_under_load(service: Service, how: str) -> None:
    """Every process is another one afterwards, no request failed, no connection was refused."""
    engine, workers = service.pids()
    async with load(service.address, clients=2) as tally:
        await tally.more(10)
        code, lines, complaint = await asyncio.to_thread(service.roll, how)
        assert (code, complaint) == (0, ""), lines
        await tally.more(10)
    nothing_lost(tally)
    now, then = service.pids()
    assert now != engine
    assert len(then) == 2
    assert not then & workers
    assert set(service.manager.alive()) & {engine, *workers} == set()
    for old in workers:
        assert f"worker {old}: another one takes its place" in lines


async def test_an_engine_that_does_not_come_up_replaces_nobody(service: Service) -> None:
    """The roll says so, with exit code 1; the old engine serves on, and the one that failed is not tried again."""
    engine, _ = service.pids()
    models = service.folder / "models"
    models.unlink()
    models.mkdir()
    try:
        async with load(service.address, clients=1) as tally:
            code, lines, complaint = await asyncio.to_thread(service.roll, "--engine", "--timeout", "20")
    finally:
        models.rmdir()
        models.symlink_to(Path(__file__).parents[2] / "models")
    assert code == 1
    assert complaint.startswith("roll: engine-")
    assert "ended before it was ready" in complaint
    assert "is stopped again" in lines[-1]
    nothing_lost(tally)
    assert service.pids()[0] == engine
    assert not list((service.folder / "run").glob("*.takeover"))
    begun = service.manager.log().count("cannot start")
    await asyncio.sleep(2)
    assert service.manager.log().count("cannot start") == begun


async def test_a_slot_that_starts_by_itself_takes_nothing(service: Service) -> None:
    """Whichever it is, the engine at the socket stays; a roll leaves no ticket that would change that."""
    engine, _ = service.pids()
    for slot in ("engine-a", "engine-b"):
        ended = run(service.folder, "deploy/engine-slot", slot, environment={"MILLRACE_ENGINE_SOCKET": ENGINE})
        assert ended.returncode == 2, ended
        assert f"another engine, process {engine}, serves at {ENGINE}" in ended.stderr
    assert service.pids()[0] == engine


async def test_a_killed_engine_costs_nobody_an_answer(service: Service) -> None:
    """Requests wait for its successor, which starts with nobody's help at the path that the dead one left behind."""
    engine, workers = service.pids()
    async with load(service.address, clients=2) as tally:
        await tally.more(10)
        os.kill(engine, signal.SIGKILL)
        await tally.more(10)
    nothing_lost(tally)
    eventually(lambda: bool(engine_status(service.folder)), "there is an engine")
    assert service.pids()[0] != engine
    eventually(lambda: service.pids()[1] == workers, "the workers are the same")


@pytest.mark.parametrize("name", MANAGERS)
async def test_nothing_outlives_a_killed_manager(name: str) -> None:
    """SIGKILL of it stops everything that it started; what lies about then does not keep the next one from serving."""
    with checkout() as folder:
        with MANAGERS[name](folder) as (manager, address):
            await check_samples(address)
            engine = engine_status(folder)["pid"]
            manager.signal(signal.SIGKILL)
            os.kill(engine, signal.SIGKILL)  # it has no time to remove its socket
            eventually(lambda: not manager.alive(), "everything has ended")
        assert (folder / ENGINE).is_socket()
        with MANAGERS[name](folder) as (_, address):
            await check_samples(address)


@pytest.mark.parametrize("name", MANAGERS)
async def test_the_engine_goes_last(name: str) -> None:
    """It is started before the workers; a stop under load answers what was accepted, and the engine ends after them."""
    with checkout() as folder:
        with MANAGERS[name](folder) as (manager, address):
            async with load(address, clients=2) as tally:
                await tally.more(10)
                manager.signal()
                await asyncio.to_thread(manager.wait)
            log = manager.log()
        assert set(tally.statuses) == {200}, tally
        # The manager has closed the listening socket with whoever was not accepted yet.
        assert all("ConnectionResetError" in failure and "after b''" in failure for failure in tally.failures), tally
        assert not tally.wrong
        if name == "supervisor":
            begins, ends, worker = "spawned: '{}'", "stopped: {} (exit status 0)", "millrace-1"
        else:
            begins, ends, worker = "{} started", "{} stopped", "millrace"
        assert log.index(begins.format("engine-a")) < log.index(begins.format(worker)), log
        assert log.index(ends.format(worker)) < log.index(ends.format("engine-a")), log
        assert not (folder / ENGINE).exists()


@pytest.mark.parametrize("name", MANAGERS)
async def test_one_line_returns_to_the_single_process_form(name: str) -> None:
    """Each worker has the models itself, there is no engine; a roll replaces both workers, and says no to --engine."""
    with checkout() as folder, MANAGERS[name](folder, single=True) as (manager, address):
        await check_samples(address)
        assert manager.log().count("model digits version 1 on cpu") == 2
        assert run(folder, *engine_program(folder, "status", "--engine-socket", ENGINE)).returncode == 3
        service, before = Service(folder, manager, address), set(manager.alive())
        begun = manager.log().count(STARTED)
        async with load(address, clients=2) as tally:
            await tally.more(10)
            code, lines, complaint = await asyncio.to_thread(service.roll)
            assert (code, complaint) == (0, ""), lines
            await tally.more(10)
        nothing_lost(tally)
        assert manager.log().count(STARTED) == begun + 2
        assert len(set(manager.alive()) - before) == 2
        code, _, complaint = service.roll("--engine")
        assert (code, "there is no engine to replace" in complaint) == (1, True)


def test_without_a_manager_there_is_nothing_to_roll() -> None:
    """Exit code 1, and it says where it looked."""
    with checkout() as folder:
        ended = run(folder, str(folder / ".venv/bin/python"), "deploy/roll.py")
        assert ended.returncode == 1
        assert "neither supervisord (run/supervisor.sock) nor circusd (run/circus.endpoint) runs here" in ended.stderr
