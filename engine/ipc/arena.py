"""Arena: memory that a worker and the engine share, for tensors that are too large for the stream between them.

It has no name: a descriptor (memfd_create(2)) that is handed over with the greeting, and that nobody else can open. The
kernel frees it with the last process that has it, however that ends, so there is nothing to clean up. It is sealed:
neither side can make it shorter under the other's feet.

Whoever made it gives its blocks out, and keeps account of them in memory of its own, so that a process that dies in the
middle of something leaves no damaged account behind. A block belongs to the reader from the frame that names it until
the frame that gives it back.
"""

import fcntl
import mmap
import os
from bisect import bisect_left, insort

from .frames import FrameError

ALIGNMENT = 64  # bytes: a cache line

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Allocator:
    """Which parts of `size` bytes are free. Pure. The lowest that is large enough is given: it is in the caches."""

    def __init__(self, size: int, first: int = 0) -> None:
        """Bytes before `first` are never given."""
        self.used = 0
        self._free: list[tuple[int, int]] = [(first, size)] if size > first else []  # start, end; ascending
        self._taken: dict[int, int] = {}  # start -> end

    def allocate(self, nbytes: int) -> int:
        """The offset of a free block, or -1 if there is none."""
        need = max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)
        for place, (start, end) in enumerate(self._free):
            if end - start >= need:
                if end - start == need:
                    del self._free[place]
                else:
                    self._free[place] = (start + need, end)
                self._taken[start] = start + need
                self.used += need
                return start
        return -1

    def size_of(self, start: int) -> int:
        """The bytes of a block that was given. Raises KeyError."""
        return self._taken[start] - start

    def free(self, start: int) -> None:
        """Take a block back. Raises KeyError if it was not given."""
        end = self._taken.pop(start)
        self.used -= end - start
        place = bisect_left(self._free, (start, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            place -= 1
            start = self._free.pop(place)[0]
        insort(self._free, (start, end))


class Arena:
    """A mapping of shared memory, in the process that made it or in the one that it was handed to.

    Attributes:
        descriptor: to be handed over; closed with `close`.
        size: bytes.
    """

    def __init__(self, descriptor: int, writable: bool = True) -> None:
        """Map what was handed over; the descriptor is the arena's from now on.

        Raises:
            FrameError: it is none of ours.
        """
        self.descriptor = descriptor
        self.size = 0
        try:
            self.size = os.fstat(descriptor).st_size
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise FrameError("the shared memory is not sealed: it could become shorter while it is read")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._memory = memoryview(mmap.mmap(descriptor, self.size, mmap.MAP_SHARED, access))
        except (OSError, ValueError) as error:
            self.close()
            raise FrameError(f"what was handed over is no shared memory: {error}") from None
        except FrameError:
            self.close()
            raise

    @classmethod
    def create(cls, size: int) -> "Arena":
        """New memory, which costs nothing until it is written to. Raises OSError."""
        descriptor = os.memfd_create("millrace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """A part of it; it stays mapped while anybody holds a view."""
        return self._memory[offset : offset + nbytes]

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Write `data` at `offset`: the one copy."""
        self._memory[offset : offset + len(data)] = data

    def close(self) -> None:
        """Close the descriptor. The mapping goes with the last view of it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
