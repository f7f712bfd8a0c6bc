"""Shared memory of clients: what is mapped, what is refused, and that nothing is unmapped under anybody."""

import mmap
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.errors import EngineError, InvalidInput, NotFound, Unimplemented
from engine.regions import MAX_REGIONS, SHM, SystemRegions

SIZE = 3 * mmap.PAGESIZE


@pytest.fixture
def file() -> Iterator[Path]:
    """A client's file of three pages, byte i of which is i % 251."""
    path = Path(SHM, f"millrace_test_{uuid.uuid4().hex}")
    path.write_bytes(bytes(i % 251 for i in range(SIZE)))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def regions() -> SystemRegions:
    return SystemRegions(enabled=True)


def maps(file: Path) -> int:
    """How often this process has the file mapped."""
    return Path("/proc/self/maps").read_text().count(file.name)


async def test_disabled_registers_nothing(file: Path) -> None:
    """Unless the operator enables it, registering and unregistering say which option would; nothing is there."""
    regions = SystemRegions(enabled=False)
    disabled = "^Client shared memory is disabled. .*'--shared-memory=true'"
    with pytest.raises(Unimplemented, match=disabled):
        await regions.register("a", file.name, 0, 4)
    with pytest.raises(Unimplemented, match=disabled):
        await regions.unregister()
    assert await regions.status() == []
    with pytest.raises(NotFound):
        regions.view("a", 0, 1)


async def check_refused(regions: SystemRegions, key: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        await regions.register("a", key, 0, 4)
    assert str(refused.value) == (
        f"failed to register shared memory region 'a': Unable to open shared memory region: '{key}'"
    )
    assert await regions.status() == []


@pytest.mark.parametrize(
    "key",
    ["", "/", "//", ".", "..", "/..", "../shm/{}", "/../shm/{}", "/dev/shm/{}", "x/../{}", "//{}", "{}/", "absent",
     "a\0b", "x" * 256, "\ud800"],
)  # fmt: skip
async def test_a_key_is_a_name_and_no_path(key: str, file: Path, regions: SystemRegions) -> None:
    """Nothing leads out of /dev/shm, and a name that no file has is refused in the same words."""
    await check_refused(regions, key.format(file.name))


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
async def test_a_key_is_the_name_of_a_plain_file(kind: str, file: Path, regions: SystemRegions) -> None:
    """A link is not followed, a pipe does not keep the server waiting, and neither is mapped."""
    other = file.with_name(f"{file.name}_{kind}")
    if kind == "folder":
        other.mkdir()
    elif kind == "link":
        other.symlink_to(file)
    else:
        os.mkfifo(other)
    try:
        await check_refused(regions, other.name)
    finally:
        (other.rmdir if kind == "folder" else other.unlink)()


@pytest.mark.parametrize("key", ["triton_python_backend_shm_region_1", "/triton_python_backend_shm_region_"])
async def test_triton_keeps_its_own_keys(key: str, regions: SystemRegions) -> None:
    """Memory between a Triton server and its Python models is not for clients."""
    with pytest.raises(InvalidInput, match="reserved prefix 'triton_python_backend_shm_region_'"):
        await regions.register("a", key, 0, 4)


@pytest.mark.parametrize(
    ("offset", "byte_size"),
    [(0, SIZE + 1), (1, SIZE), (SIZE, 1), (0, 0), (-1, 4), (0, -4), (2**70, 1), (0, 2**70), (-(2**70), 2**70)],
)
async def test_a_region_lies_within_its_file(offset: int, byte_size: int, file: Path, regions: SystemRegions) -> None:
    """What is not in the file, or is nothing, cannot be mapped, however large the number; no descriptor is left."""
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InvalidInput, match="^failed to register shared memory region 'a': invalid args: "):
        await regions.register("a", file.name, offset, byte_size)
    assert await regions.status() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_name_is_given_once(file: Path, regions: SystemRegions) -> None:
    """A second region of a name is refused, and the first stays."""
    await regions.register("a", file.name, 0, 4)
    with pytest.raises(InvalidInput, match="^shared memory region 'a' already in manager$"):
        await regions.register("a", file.name, 4, 4)
    assert await regions.status("a") == [{"name": "a", "key": file.name, "offset": 0, "byte_size": 4}]


async def test_there_is_a_bound_on_regions(file: Path, regions: SystemRegions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions hold files open, of which a process has only so many: past the bound one more is refused."""
    assert MAX_REGIONS >= 256
    monkeypatch.setattr("engine.regions.MAX_REGIONS", 2)
    for name in ("a", "b"):
        await regions.register(name, file.name, 0, 4)
    with pytest.raises(InvalidInput, match="2 regions are registered, no room for another"):
        await regions.register("c", file.name, 0, 4)


@pytest.mark.parametrize(
    ("offset", "byte_size", "error"),
    [(8, 0, "offset"), (9, 1, "offset"), (-1, 1, "offset"), (2**70, 1, "offset"), (0, 9, "offset + byte size"),
     (7, 2, "offset + byte size"), (0, -1, "offset + byte size"), (1, 2**70, "offset + byte size")],
)  # fmt: skip
async def test_a_view_lies_within_its_region(
    offset: int, byte_size: int, error: str, file: Path, regions: SystemRegions
) -> None:
    """Bytes of the file before or behind the region are nobody's to see."""
    await regions.register("a", file.name, 8, 8)
    with pytest.raises(InvalidInput) as refused:
        regions.view("a", offset, byte_size)
    assert str(refused.value) == f"Invalid {error} for shared memory region: 'a'"


async def test_what_is_not_registered_is_not_found(file: Path, regions: SystemRegions) -> None:
    """A region that was never there, or is no longer, is not found, in Triton's two texts."""
    await regions.register("a", file.name, 0, 4)
    await regions.unregister("a")
    with pytest.raises(NotFound, match="^Unable to find shared memory region: 'a'$"):
        regions.view("a", 0, 1)
    with pytest.raises(NotFound, match="^Unable to find system shared memory region: 'a'$"):
        await regions.status("a")
    await regions.unregister("a")


@pytest.mark.parametrize("offset", [0, 7, mmap.PAGESIZE, mmap.PAGESIZE + 7])
async def test_a_view_is_the_clients_memory(offset: int, file: Path, regions: SystemRegions) -> None:
    """At any offset, what the client wrote is read, and what is written is in the client's file."""
    await regions.register("a", f"/{file.name}", offset, 100)
    view = regions.view("a", 5, 10)
    assert view.tobytes() == file.read_bytes()[offset + 5 : offset + 15]
    np.frombuffer(view, np.uint8)[:] = 255
    content = file.read_bytes()
    assert content[offset + 5 : offset + 15] == b"\xff" * 10
    assert content.count(255) == 10
    assert regions.view("a", 0, 100).nbytes == 100
    assert regions.view("a", 3, 0).nbytes == 0


async def test_nothing_is_unmapped_under_a_view(file: Path, regions: SystemRegions) -> None:
    """Unregistered and unlinked, a region that is read from stays; with its last view it goes; the file is left."""
    await regions.register("a", file.name, 0, 8)
    await regions.register("b", file.name, 0, 8)
    array = np.frombuffer(regions.view("a", 0, 8), np.uint8)
    await regions.unregister()
    assert await regions.status() == []
    assert maps(file) == 1
    assert array.tolist() == list(range(8))
    assert file.exists()
    file.unlink()
    assert array.tolist() == list(range(8))
    del array
    assert maps(file) == 0


async def test_unregistering_one_leaves_the_others(file: Path, regions: SystemRegions) -> None:
    """By name one goes, and can be registered anew."""
    await regions.register("a", file.name, 0, 8)
    await regions.register("b", file.name, 8, 8)
    await regions.unregister("a")
    assert [region["name"] for region in await regions.status()] == ["b"]
    await regions.register("a", file.name, 1, 8)
    assert regions.view("a", 0, 2).tobytes() == b"\1\2"


async def test_a_file_that_shrank_is_refused(file: Path, regions: SystemRegions) -> None:
    """Touching memory behind a file's end would end the process: a file that is too short by now gives no view."""
    await regions.register("a", file.name, 0, SIZE)
    os.truncate(file, mmap.PAGESIZE)
    with pytest.raises(EngineError, match="^Invalid offset \\+ byte size for shared memory region: 'a'$"):
        regions.view("a", SIZE - 1, 1)


async def test_whoever_wants_to_know_hears_of_each_change(file: Path) -> None:
    """After it was made; what is refused is no change."""
    seen: list[list[str]] = []
    watched = SystemRegions(enabled=True, changed=lambda: seen.append(sorted(watched._regions)))
    await watched.register("a", file.name, 0, 8)
    with pytest.raises(InvalidInput):
        await watched.register("a", file.name, 0, 8)
    await watched.register("b", file.name, 0, 8)
    await watched.unregister("a")
    await watched.unregister()
    assert seen == [["a"], ["a", "b"], ["b"], []]
