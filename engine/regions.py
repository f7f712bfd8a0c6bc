"""SystemRegions: parts of files in /dev/shm that clients on this machine pass tensors in (PROTOCOL.md section 1.11).

A region is mapped while it is registered, and for as long as anybody holds a view of it: nothing is ever unmapped
under a request. What a client names is one file's name in /dev/shm, never a path; links are not followed.

Not `multiprocessing.shared_memory`: its resource tracker would unlink the client's file when this process ends.

A client that makes its file shorter while the server reads from it can end the server (SIGBUS), as with any server
that maps it; so this is off unless the operator says otherwise, for clients that are trusted. A file that is shorter
when a view is asked for is refused.
"""

import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import InvalidInput, NotFound, Unimplemented

SHM = "/dev/shm/"
MAX_NAME = 255  # bytes of a file's name
MAX_REGIONS = 1024  # each holds a file open
RESERVED = "triton_python_backend_shm_region_"  # Triton keeps its Python models' memory under these names


@dataclass(frozen=True, slots=True)
class _Region:
    """Bytes `offset` to `offset + byte_size` of a file; they begin at `skip` in `mapping`."""

    key: str
    offset: int
    byte_size: int
    mapping: mmap.mmap
    skip: int


class SystemRegions:
    """The regions that are registered, by name: an `engine.types.Regions`."""

    def __init__(self, enabled: bool, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called after each change of what is registered."""
        self._enabled = enabled
        self._changed = changed
        self._regions: dict[str, _Region] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._regions

    async def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """`map`, and say so."""
        self.map(name, key, offset, byte_size)
        self._changed()

    def map(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Map `byte_size` bytes, from `offset` on, of the file that `shm_open(key)` means.

        Raises:
            Unimplemented: shared memory is disabled.
            InvalidInput: the name is in use, or the key, or what it names, cannot be mapped.
        """
        self._check_enabled()
        if name in self._regions:
            raise InvalidInput(f"shared memory region '{name}' already in manager")
        failed = f"failed to register shared memory region '{name}': "
        if len(self._regions) >= MAX_REGIONS:
            raise InvalidInput(f"{failed}{MAX_REGIONS} regions are registered, no room for another")
        file = key.removeprefix("/")
        if file.startswith(RESERVED):
            raise InvalidInput(
                f"cannot register shared memory region '{name}' with key '{key}' as the key contains the reserved "
                f"prefix '{RESERVED}'"
            )
        if offset < 0 or byte_size < 1:
            raise InvalidInput(f"{failed}invalid args: offset must be at least 0 and byte_size at least 1")
        descriptor = _open(file)
        if descriptor is None:
            raise InvalidInput(f"{failed}Unable to open shared memory region: '{key}'")
        skip = offset % mmap.ALLOCATIONGRANULARITY
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidInput(f"{failed}Unable to open shared memory region: '{key}'")
            if offset + byte_size > status.st_size:
                raise InvalidInput(
                    f"{failed}invalid args: offset + byte_size is {offset + byte_size}, but '{key}' has "
                    f"{status.st_size} bytes"
                )
            mapping = mmap.mmap(descriptor, skip + byte_size, offset=offset - skip)
        except (OSError, ValueError):  # no room in the address space, or it shrank just now
            raise InvalidInput(f"{failed}unable to process address space") from None
        finally:
            os.close(descriptor)  # the mapping has its own
        self._regions[name] = _Region(key, offset, byte_size, mapping, skip)

    async def unregister(self, name: str = "") -> None:
        """Forget one region, or, without a name, all. One that is not registered is fine.

        It is not closed, which would fail while a view exists: with its last view it is unmapped.

        Raises:
            Unimplemented: shared memory is disabled.
        """
        self._check_enabled()
        for each in [name] if name else list(self._regions):
            self.forget(each)
        self._changed()

    def forget(self, name: str) -> None:
        self._regions.pop(name, None)

    async def status(self, name: str = "") -> list[dict[str, Any]]:
        return self.registered(name)

    def registered(self, name: str = "") -> list[dict[str, Any]]:
        """Name, key, offset and byte_size of one region, or of all. Raises NotFound."""
        if name and name not in self._regions:
            raise NotFound(f"Unable to find system shared memory region: '{name}'")
        return [
            {"name": each, "key": region.key, "offset": region.offset, "byte_size": region.byte_size}
            for each, region in self._regions.items()
            if name in ("", each)
        ]

    def view(self, name: str, offset: int, byte_size: int) -> memoryview:
        """`byte_size` bytes of a region, from its `offset` on; the region stays mapped as long as the view is held.

        Raises:
            NotFound: there is no such region.
            InvalidInput: the region has no such bytes, or its file no longer has them.
        """
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        if not 0 <= offset < region.byte_size:
            raise InvalidInput(f"Invalid offset for shared memory region: '{name}'")
        shrank = region.mapping.size() < region.offset + region.byte_size  # the size is the file's
        if not 0 <= byte_size <= region.byte_size - offset or shrank:
            raise InvalidInput(f"Invalid offset + byte size for shared memory region: '{name}'")
        start = region.skip + offset
        return memoryview(region.mapping)[start : start + byte_size]

    def _check_enabled(self) -> None:
        if not self._enabled:
            raise Unimplemented(
                "Client shared memory is disabled. Start the server with '--shared-memory=true' to enable."
            )


def _open(file: str) -> int | None:
    """A descriptor of the file of that name in /dev/shm; None if there is none that may be opened."""
    try:
        if not file or "/" in file or ".." in file or file == "." or len(file.encode()) > MAX_NAME:
            return None
        # A pipe must not keep us waiting; what is no plain file is refused once it is open.
        return os.open(SHM + file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):  # not there, not ours, a link; or a name that no file can have
        return None
