"""circus.ini: what is circus's own; what holds under supervisor as well is in test_service.py."""

import asyncio
from pathlib import Path

import pytest

from .client import load
from .processes import STARTED, by_circus, eventually, listens, run

pytestmark = pytest.mark.e2e


async def test_circus_replaces_its_servers_under_load(folder: Path) -> None:
    """`circusctl reload`, without the engine's being asked: all workers are new, no request fails, none is refused."""
    with by_circus(folder) as (manager, address):
        before, begun = set(manager.alive()), manager.log().count(STARTED)
        control = str(folder / ".venv/bin/circusctl"), "--endpoint", "ipc://run/circus.endpoint"
        async with load(address) as tally:
            await tally.more(20)
            ended = await asyncio.to_thread(run, folder, *control, "reload", "millrace")
            assert ended.stdout.strip() == "ok", ended
            await asyncio.to_thread(manager.wait_for_log, STARTED, begun + 2)
            await asyncio.to_thread(manager.wait_for_log, "millrace reloaded")
            # circusd and the engine stay.
            await asyncio.to_thread(eventually, lambda: len(set(manager.alive()) & before) == 2, "new workers only")
            await tally.more(20)
    assert not tally.failures, tally.failures
    assert (tally.refused, tally.wrong, set(tally.statuses)) == (0, 0, {200}), tally
    assert not listens(address)
