"""A part of a device as a device of its own: `offset` and `size` of QEMU's raw driver."""

from nbdbackup.block.device import BlockDevice, ReadableBuffer, WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.extents import ContextExtent, StatusExtent


class WindowDevice(FilterDevice):
    """The bytes `[start, start + size)` of `child`, which has all of them."""

    def __init__(self, child: BlockDevice, start: int, size: int) -> None:
        super().__init__(child)
        assert 0 <= start <= start + size <= child.size
        self.start = start
        self.size = size

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        await self.child.read(self.start + offset, buffer)

    async def read_sparse(self, offset: int, buffer: WritableBuffer) -> list[StatusExtent]:
        return await self.child.read_sparse(self.start + offset, buffer)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        await self.child.write(self.start + offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        await self.child.write_zeroes(self.start + offset, length, may_unmap, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        await self.child.trim(self.start + offset, length, fua)

    async def cache(self, offset: int, length: int) -> None:
        await self.child.cache(self.start + offset, length)

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        return await self.child.block_status(self.start + offset, length)

    async def allocation_depth(self, offset: int, length: int) -> list[ContextExtent]:
        return await self.child.allocation_depth(self.start + offset, length)

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        return self.child.read_nowait(self.start + offset, buffer)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return self.child.write_nowait(self.start + offset, data)

    def offload_fd(self) -> int | None:
        """None: the offsets are not the file's."""
        return None
