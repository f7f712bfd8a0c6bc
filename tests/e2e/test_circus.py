"""circus.ini: it serves, and replaces its servers without a lost request.

It is the shipped file. Only the port is replaced, in a copy: a developer's own server may be using it.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import Address, check_samples, load
from .processes import STARTED, Process, copy, eventually, free_port, listens, run, started, tool

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def circus(folder: Path) -> Iterator[tuple[Process, Address]]:
    """circusd with the shipped file, its servers up."""
    tool("circusd")
    port = free_port()
    copy(folder, "circus.ini", "port = 8000\n", f"port = {port}\n")
    with started(folder, str(folder / ".venv/bin/circusd"), "circus.ini") as manager:
        manager.wait_for_log(STARTED, 2)
        yield manager, ("127.0.0.1", port)
    assert not listens(("127.0.0.1", port))


async def test_circus_serves(circus: tuple[Process, Address]) -> None:
    """circus.ini: every sample sent to its TCP socket comes back as its digit."""
    await check_samples(circus[1])


async def test_circus_replaces_its_servers_under_load(folder: Path, circus: tuple[Process, Address]) -> None:
    """`circusctl reload`: both servers are new, no request fails, no connection is refused."""
    manager, address = circus
    before, begun = set(manager.alive()), manager.log().count(STARTED)
    async with load(address) as tally:
        await tally.more(20)
        control = str(folder / ".venv/bin/circusctl"), "--endpoint", "ipc://run/circus.endpoint"
        ended = await asyncio.to_thread(run, folder, *control, "reload")
        assert ended.stdout.strip() == "ok", ended
        await asyncio.to_thread(manager.wait_for_log, STARTED, begun + 2)
        await asyncio.to_thread(eventually, lambda: set(manager.alive()) & before == {manager.pid}, "new servers only")
        await tally.more(20)
    assert not tally.failures, tally.failures
    assert (tally.refused, tally.wrong, set(tally.statuses)) == (0, 0, {200}), tally
