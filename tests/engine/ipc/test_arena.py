"""Shared memory: who gives out which part of it, and what is taken for it."""

import fcntl
import gc
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.ipc.arena import ALIGNMENT, Allocator, Arena
from engine.ipc.frames import FrameError

SIZE, FIRST = 64 * ALIGNMENT, 2 * ALIGNMENT


class Blocks(RuleBasedStateMachine):
    """The allocator, against a list of who has each byte."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(SIZE, FIRST)
        self.owner = [0] * SIZE  # of each byte; 0: nobody
        self.sizes: dict[int, int] = {}

    @rule(target=taken, nbytes=st.integers(0, 12 * ALIGNMENT) | st.integers(0, 2 * ALIGNMENT))
    def allocate(self, nbytes: int) -> int:
        need = max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)
        fits = [at for at in range(FIRST, SIZE - need + 1, ALIGNMENT) if not any(self.owner[at : at + need])]
        offset = self.allocator.allocate(nbytes)
        assert offset == (fits[0] if fits else -1)
        if fits:
            self.owner[offset : offset + need] = [1] * need
            self.sizes[offset] = need
        return offset

    @rule(offset=consumes(taken))
    def free(self, offset: int) -> None:
        if offset < 0:
            with pytest.raises(KeyError):
                self.allocator.free(offset)
            return
        self.allocator.free(offset)
        need = self.sizes.pop(offset)
        self.owner[offset : offset + need] = [0] * need
        with pytest.raises(KeyError):
            self.allocator.free(offset)

    @invariant()
    def counts(self) -> None:
        assert self.allocator.used == sum(self.owner)

    def teardown(self) -> None:
        """With everything given back it is one piece again."""
        for offset in list(self.sizes):
            self.allocator.free(offset)
        assert self.allocator.used == 0
        assert self.allocator.allocate(SIZE - FIRST) == FIRST
        assert self.allocator.allocate(1) == -1


TestBlocks = Blocks.TestCase


def test_blocks_that_nobody_has() -> None:
    """What was not given is not taken back, nor what lies in the middle of a block."""
    allocator = Allocator(SIZE)
    offset = allocator.allocate(3 * ALIGNMENT)
    for wrong in (offset + ALIGNMENT, offset + 1, -1, SIZE):
        with pytest.raises(KeyError):
            allocator.free(wrong)
    assert allocator.used == 3 * ALIGNMENT


def test_nothing_to_give() -> None:
    """An allocator of no bytes gives none; one whose size is odd gives no part that is not whole."""
    assert Allocator(0).allocate(1) == -1
    assert Allocator(ALIGNMENT, ALIGNMENT).allocate(0) == -1
    odd = Allocator(ALIGNMENT + 1)
    assert odd.allocate(ALIGNMENT + 1) == -1
    assert odd.allocate(1) == 0
    assert odd.allocate(1) == -1


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(1 << 16)
    yield made
    made.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_two_mappings_of_one_memory(arena: Arena) -> None:
    """What one side puts there is what the other sees."""
    other = Arena(os.dup(arena.descriptor), writable=False)
    assert other.size == arena.size == 1 << 16
    arena.put(100, b"hello")
    assert bytes(other.view(99, 7)) == b"\0hello\0"
    other.close()


def test_a_reader_cannot_write(arena: Arena) -> None:
    """What is mapped to be read is read-only, and so is what is made of it."""
    reader = Arena(os.dup(arena.descriptor), writable=False)
    view = reader.view(0, 8)
    assert view.readonly
    with pytest.raises(TypeError):
        reader.put(0, b"x")
    array = np.frombuffer(view, np.uint8)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    reader.close()


def test_its_size_stays(arena: Arena) -> None:
    """Nobody makes it shorter while somebody reads it, nor longer, nor takes the seals away."""
    for size in (0, arena.size - 1, arena.size + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_it_has_no_name(arena: Arena) -> None:
    """And is not handed to programs that this one starts."""
    assert os.readlink(f"/proc/self/fd/{arena.descriptor}") == "/memfd:millrace (deleted)"
    assert not os.get_inheritable(arena.descriptor)


def unsealed() -> int:
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    return descriptor


def half_sealed() -> int:
    descriptor = unsealed()
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor


def without_bytes() -> int:
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


@pytest.mark.parametrize("made", [unsealed, half_sealed, without_bytes, pipe])
def test_what_is_no_arena(made: Callable[[], int]) -> None:
    """Memory that could become shorter, and what is none, is refused; its descriptor is closed."""
    before = descriptors()
    with pytest.raises(FrameError, match="shared memory"):
        Arena(made())
    assert descriptors() == before


def test_a_file_is_no_arena(tmp_path: Path) -> None:
    """It has no seals, and could be made shorter by whoever has it."""
    (tmp_path / "x").write_bytes(bytes(4096))
    before = descriptors()
    with pytest.raises(FrameError, match="no shared memory"):
        Arena(os.open(tmp_path / "x", os.O_RDWR))
    assert descriptors() == before


def test_memory_that_there_is_not() -> None:
    """A size that no process can map is an error; no descriptor is left."""
    before = descriptors()
    for size in (0, 2**63 - 1):
        with pytest.raises((OSError, FrameError)):
            Arena.create(size)
    assert descriptors() == before


def test_a_view_outlives_the_arena() -> None:
    """The memory is there as long as anybody looks at it, and then it is not."""
    arena = Arena.create(1 << 16)
    arena.put(8, b"content")
    array = np.frombuffer(arena.view(8, 7), np.uint8)
    mapping = arena.view(0, 1).obj
    assert isinstance(mapping, mmap.mmap)
    gone = weakref.ref(mapping)
    before = descriptors()
    arena.close()
    arena.close()  # twice is fine
    assert descriptors() == before - 1  # the mapping has a descriptor of its own
    del arena, mapping
    assert array.tobytes() == b"content"
    assert gone() is not None
    del array
    gc.collect()
    assert gone() is None
    assert descriptors() == before - 2
