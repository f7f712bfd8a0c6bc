"""RemoteRegions: the shared memory that clients registered, as each worker knows it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import InvalidInput, NotFound, Unimplemented
from tests.scripted import double

from .conftest import Remote, Serve


@pytest.fixture
def shm() -> Iterator[Path]:
    """A file of 64 bytes in /dev/shm, each of which says where it is."""
    path = Path(f"/dev/shm/millrace-test-{os.getpid()}")
    path.write_bytes(bytes(range(64)))
    yield path
    path.unlink(missing_ok=True)


async def test_what_one_worker_registers_all_can_see(remote: Remote, serve: Serve, shm: Path) -> None:
    """As soon as the client has its answer, from whichever worker; and it is one memory."""
    await serve({"shared_memory": True}, m=double)
    one, other = await remote(shared_memory=True), await remote(shared_memory=True)
    await one.regions.register("r", f"/{shm.name}", 8, 32)
    entry = {"name": "r", "key": f"/{shm.name}", "offset": 8, "byte_size": 32}
    assert await other.regions.status() == await one.regions.status("r") == [entry]
    assert bytes(other.regions.view("r", 4, 2)) == bytes([12, 13])
    one.regions.view("r", 4, 2)[:] = b"ab"
    assert bytes(other.regions.view("r", 4, 2)) == b"ab"
    await other.regions.unregister("r")
    for worker in (one, other):
        with pytest.raises(NotFound):
            worker.regions.view("r", 0, 1)
        with pytest.raises(NotFound):
            await worker.regions.status("r")


async def test_a_name_that_is_registered_anew(remote: Remote, serve: Serve, shm: Path) -> None:
    """Means the new part, or the new file, to those that had looked at the old one as well."""
    await serve({"shared_memory": True}, m=double)
    one, other = await remote(shared_memory=True), await remote(shared_memory=True)
    await one.regions.register("r", shm.name, 0, 8)
    assert bytes(other.regions.view("r", 0, 1)) == b"\0"
    await one.regions.unregister()
    await one.regions.register("r", shm.name, 16, 8)
    assert bytes(other.regions.view("r", 0, 1)) == b"\x10"
    shm.unlink()
    shm.write_bytes(b"z" * 64)
    await one.regions.unregister("r")
    await one.regions.register("r", shm.name, 16, 8)
    assert bytes(other.regions.view("r", 0, 1)) == b"z"


async def test_what_is_refused(remote: Remote, serve: Serve, shm: Path) -> None:
    """A name twice, a file that is not there, bytes that it does not have."""
    await serve({"shared_memory": True}, m=double)
    worker = await remote(shared_memory=True)
    await worker.regions.register("r", shm.name, 0, 64)
    with pytest.raises(InvalidInput, match="already in manager"):
        await worker.regions.register("r", shm.name, 0, 64)
    with pytest.raises(InvalidInput, match="Unable to open"):
        await worker.regions.register("s", "nowhere", 0, 64)
    with pytest.raises(InvalidInput, match="Invalid offset"):
        worker.regions.view("r", 64, 1)
    with pytest.raises(InvalidInput, match="Invalid offset"):
        worker.regions.view("r", 63, 2)


async def test_a_file_that_went_away(remote: Remote, serve: Serve, shm: Path) -> None:
    """Before a worker first looked at it: that is the client's error, not the service's."""
    await serve({"shared_memory": True}, m=double)
    one, other = await remote(shared_memory=True), await remote(shared_memory=True)
    await one.regions.register("r", shm.name, 0, 64)
    one.regions.view("r", 0, 1)
    shm.unlink()
    assert bytes(one.regions.view("r", 1, 1)) == b"\1"
    with pytest.raises(InvalidInput, match="Unable to open"):
        other.regions.view("r", 0, 1)


async def test_a_new_engine_knows_of_none(remote: Remote, serve: Serve, shm: Path) -> None:
    """As after any restart; workers do not remember what it does not."""
    await serve({"shared_memory": True}, m=double)
    worker = await remote(shared_memory=True)
    await worker.regions.register("r", shm.name, 0, 64)
    worker.regions.view("r", 0, 1)
    before = worker._connection
    started, _ = await serve({"shared_memory": True}, takeover=True)
    assert before is not None
    before.abort()
    await before.ended
    while worker._connection in (None, before):
        await worker._loop.run_in_executor(None, os.getpid)
    assert await worker.regions.status() == []
    with pytest.raises(NotFound):
        worker.regions.view("r", 0, 1)
    assert started.published()


async def test_without_the_setting(remote: Remote, serve: Serve, shm: Path) -> None:
    """Nothing can be registered, by any worker."""
    await serve(m=double)
    worker = await remote(shared_memory=True)
    with pytest.raises(Unimplemented, match="Client shared memory is disabled"):
        await worker.regions.register("r", shm.name, 0, 64)
