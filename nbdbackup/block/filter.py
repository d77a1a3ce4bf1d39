"""A device that forwards to one child and adds one behaviour.

A subclass overrides only what it changes; for reading that is `read`, `read_sparse` and
`read_nowait`, each of which reaches the child by a way of its own. The child is replaced when a
filter below is removed (`Node.remove`), so use `self.child` at the moment of the call and never keep it.
"""

from nbdbackup.block.device import BlockDevice, ReadableBuffer, WritableBuffer
from nbdbackup.extents import ContextExtent, StatusExtent


class FilterDevice(BlockDevice):
    """Forwards everything to `child`."""

    def __init__(self, child: BlockDevice) -> None:
        self.child = child
        self.size = child.size
        self.read_only = child.read_only
        self.features = child.features

    def __str__(self) -> str:
        return str(self.child)

    def relink(self, child: BlockDevice) -> None:
        """Forward to `child` from now on. Only while the node is drained."""
        self.child = child

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        await self.child.read(offset, buffer)

    async def read_sparse(self, offset: int, buffer: WritableBuffer) -> list[StatusExtent]:
        return await self.child.read_sparse(offset, buffer)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        await self.child.write(offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        await self.child.write_zeroes(offset, length, may_unmap, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        await self.child.trim(offset, length, fua)

    async def flush(self) -> None:
        await self.child.flush()

    async def cache(self, offset: int, length: int) -> None:
        await self.child.cache(offset, length)

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        return await self.child.block_status(offset, length)

    async def allocation_depth(self, offset: int, length: int) -> list[ContextExtent]:
        return await self.child.allocation_depth(offset, length)

    async def is_allocated(self, offset: int, length: int) -> list[ContextExtent]:
        return await self.child.is_allocated(offset, length)

    async def close(self) -> None:
        await self.child.close()

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        return self.child.read_nowait(offset, buffer)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return self.child.write_nowait(offset, data)

    def offload_fd(self) -> int | None:
        return self.child.offload_fd()
