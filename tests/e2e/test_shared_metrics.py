"""/metrics of several servers with one folder: each tells the sum, also after one of them is gone."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import SAMPLES, Address, request
from .processes import MANAGERS, STARTED, Process, checkout, eventually, launcher, on_port, started

pytestmark = pytest.mark.e2e

NAME = 'nv_inference_request_success{model="digits",version="1"} '


async def _successes(address: Address) -> int:
    answer = await request(address, "GET", "/metrics")
    assert answer.status == 200, answer
    (line,) = [line for line in answer.body.decode().splitlines() if line.startswith(NAME)]
    return int(line.removeprefix(NAME))


async def _classify(address: Address, times: int) -> None:
    for _ in range(times):
        assert (await request(address, "POST", "/classify", SAMPLES["7"])).status == 200


async def _told(address: Address, count: int) -> None:
    """Wait until that many are told, and never more."""
    async with asyncio.timeout(60):
        while (now := await _successes(address)) != count:
            assert now < count
            await asyncio.sleep(0.05)


@pytest.fixture
def servers(folder: Path) -> Iterator[list[tuple[Process, Address]]]:
    """Two on ports of their own, with one folder for their counts."""
    environment = {"MILLRACE_METRICS_DIR": "run/metrics"}
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(on_port(folder, environment)) for _ in range(2)]


async def test_each_server_tells_the_sum(servers: list[tuple[Process, Address]]) -> None:
    """Of both while they run; of both still when one was stopped, and when nobody had time to write."""
    (first, one), (_, two) = servers
    await _classify(one, 3)
    await _classify(two, 4)
    for address in (one, two):
        await _told(address, 7)
    await _classify(one, 2)
    first.signal(signal.SIGTERM)
    await asyncio.to_thread(first.wait)
    assert await _successes(two) == 9
    await _classify(two, 1)
    await _told(two, 10)
    assert "Traceback" not in first.log()


async def test_what_was_told_survives_a_killed_server(folder: Path) -> None:
    """On one inherited socket: whoever answers, no scrape tells less than the one before."""
    environment = {"MILLRACE_METRICS_DIR": "run/killed"}
    with socket.create_server(("127.0.0.1", 0), backlog=128) as held, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", held.getsockname()[1])
        command = *launcher(folder), "--fd", "0"
        servers = [
            stack.enter_context(started(folder, *command, environment=environment, stdin=held)) for _ in range(2)
        ]
        for server in servers:
            server.wait_for_log(STARTED)
        last = 0
        for _ in range(20):
            await _classify(address, 1)
            last, before = await _successes(address), last
            assert last >= before
        await _told(address, 20)
        servers[0].signal(signal.SIGKILL)
        await asyncio.to_thread(servers[0].wait)
        assert await _successes(address) == 20
        await asyncio.to_thread(eventually, (folder / "run/killed/ended.prom").exists, "its counts are kept")
        assert await _successes(address) == 20


@pytest.mark.parametrize("single", [False, True], ids=["with an engine", "single-process form"])
@pytest.mark.parametrize("manager", MANAGERS)
async def test_the_shipped_files_let_servers_tell_the_sum(manager: str, single: bool) -> None:
    """supervisord.conf and circus.ini: whichever of the two servers is asked, whoever it is that counts."""
    with checkout() as folder, MANAGERS[manager](folder, single) as (_, address):
        await _classify(address, 12)
        await _told(address, 12)
        assert [await _successes(address) for _ in range(8)] == [12] * 8
        assert len(list((folder / "run/metrics").glob("*-*.prom"))) == (2 if single else 1)
