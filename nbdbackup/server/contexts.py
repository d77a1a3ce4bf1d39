"""Meta contexts: what a client may ask of an export with BLOCK_STATUS, and who answers.

An export has a table of contexts by name. Two are always there, answered by the device itself:
`base:allocation` and `qemu:allocation-depth`. Whoever has more to tell, such as a dirty bitmap of
the node under `qemu:dirty-bitmap:NAME`, adds a `StatusProvider` to the table and removes it again.

Negotiation shows the names that are there at that moment. A client that selected a context which
was removed since gets an error for it, never another context's answer.
"""

import errno
from collections.abc import Mapping
from typing import Protocol

from nbdbackup.block.device import BlockDevice
from nbdbackup.errors import ConflictError, DeviceError
from nbdbackup.extents import ContextExtent
from nbdbackup.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION


class StatusProvider(Protocol):
    """Answers BLOCK_STATUS for one context of one export."""

    is_wide: bool
    """Whether a status can need more than 32 bits; the context is then for extended headers only."""

    async def status(self, offset: int, length: int) -> list[ContextExtent]:
        """The status of a non-empty range of bytes inside the device, from `offset` on.

        At least one extent; none empty; neighbours differ in status; together at most `length`: the
        client asks again for what is missing.

        Raises:
            OSError: it cannot be told; the client gets this error.
        """


class _Allocation:
    """`base:allocation`: HOLE and ZERO, as the device knows them (88)."""

    is_wide = False

    def __init__(self, device: BlockDevice) -> None:
        self._device = device

    async def status(self, offset: int, length: int) -> list[ContextExtent]:
        extents = await self._device.block_status(offset, length)
        return [ContextExtent(extent.length, int(extent.flags)) for extent in extents]


class _AllocationDepth:
    """`qemu:allocation-depth`: in which layer of the backing chain the bytes are (90)."""

    is_wide = False

    def __init__(self, device: BlockDevice) -> None:
        self._device = device

    async def status(self, offset: int, length: int) -> list[ContextExtent]:
        return await self._device.allocation_depth(offset, length)


class ContextTable:
    """The contexts of one export, in the order they were added."""

    def __init__(self, device: BlockDevice) -> None:
        self._providers: dict[str, StatusProvider] = {
            BASE_ALLOCATION: _Allocation(device),
            ALLOCATION_DEPTH: _AllocationDepth(device),
        }

    @property
    def names(self) -> tuple[str, ...]:
        """What LIST_META_CONTEXT shows."""
        return tuple(self._providers)

    @property
    def wide_names(self) -> frozenset[str]:
        """Those that only clients with extended headers may have (53)."""
        return frozenset(name for name, provider in self._providers.items() if provider.is_wide)

    def add(self, name: str, provider: StatusProvider) -> None:
        """Offer `name` to clients from now on.

        Raises:
            ConflictError: there is one of that name.
        """
        if name in self._providers:
            raise ConflictError(f"there is a meta context called {name!r} already")
        self._providers[name] = provider

    def remove(self, name: str) -> None:
        """Stop offering `name`, which was added."""
        del self._providers[name]

    def find(self, name: str) -> StatusProvider | None:
        """Who answers for `name` now, if there is anybody."""
        return self._providers.get(name)

    def get(self, name: str) -> StatusProvider:
        """Who answers for `name` now.

        Raises:
            DeviceError: nobody.
        """
        provider = self._providers.get(name)
        if provider is None:
            raise DeviceError(errno.EINVAL, f"meta context {name} is no longer there")
        return provider


class SelectedContexts:
    """What one client has selected of `table`: `selected` are the names by their numbers.

    A context that was removed stays removed for it, also when there is another one of its name: a client
    that copies what a bitmap says must not be told what a newer bitmap says.
    """

    def __init__(self, table: ContextTable, selected: Mapping[int, str]) -> None:
        self._table = table
        self._selected = {number: (name, table.find(name)) for number, name in selected.items()}

    def get(self, number: int) -> StatusProvider:
        """Who answers for the context `number`.

        Raises:
            DeviceError: it was removed since the client selected it.
        """
        name, selected = self._selected[number]
        provider = self._table.get(name)
        if provider is not selected:
            raise DeviceError(errno.EINVAL, f"meta context {name} is another one since")
        return provider
