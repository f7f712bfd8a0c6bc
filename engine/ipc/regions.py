"""RemoteRegions: the shared memory that clients registered, as a worker knows it.

The engine keeps the list, and workers are told of it with its catalogue. Each maps what its own requests name, when one
first does.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import NotFound
from ..regions import SystemRegions


class RemoteRegions:
    """An `engine.types.Regions` whose list is the engine's."""

    def __init__(self, enabled: bool, call: Callable[..., Awaitable[Any]]) -> None:
        """`call(method, **arguments)` asks the engine."""
        self._call = call
        self._mapped = SystemRegions(enabled)
        self._entries: dict[str, dict[str, Any]] = {}  # as the engine has them

    def learn(self, entries: list[dict[str, Any]]) -> None:
        """What is registered now. What is not, or otherwise, is mapped no longer."""
        before, self._entries = self._entries, {entry["name"]: entry for entry in entries}
        for name, entry in before.items():
            if self._entries.get(name) != entry:
                self._mapped.forget(name)

    async def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        await self._call("register", name=name, key=key, offset=offset, byte_size=byte_size)

    async def unregister(self, name: str = "") -> None:
        await self._call("unregister", name=name)

    async def status(self, name: str = "") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self._call("status", name=name)
        return found

    def view(self, name: str, offset: int, byte_size: int) -> memoryview:
        """As of `SystemRegions`; it fails, too, if the file that was registered is gone."""
        entry = self._entries.get(name)
        if entry is None:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        if name not in self._mapped:
            self._mapped.map(**entry)
        return self._mapped.view(name, offset, byte_size)
