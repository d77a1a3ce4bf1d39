"""Writes that are durable before they return: `writethrough` of an export."""

from nbdbackup.block.device import ReadableBuffer
from nbdbackup.block.filter import FilterDevice


class WriteThrough(FilterDevice):
    """Forwards every write and write_zeroes with FUA."""

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        del fua
        await self.child.write(offset, data, fua=True)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        del fua
        await self.child.write_zeroes(offset, length, may_unmap, fast, fua=True)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        """Never: to make it durable takes time."""
        del offset, data
        return False
