"""A device of zeroes that forgets what is written: QEMU's null-co, for tests and measurements."""

from nbdbackup.block.device import BlockDevice, Features, ReadableBuffer, WritableBuffer
from nbdbackup.extents import Allocation, StatusExtent


class NullDevice(BlockDevice):
    """`size` bytes, all zero, whatever is written."""

    def __init__(self, size: int, read_only: bool = False) -> None:
        self.size = size
        self.read_only = read_only
        self.features = Features(trim=True, fast_zero=True)

    def __str__(self) -> str:
        return "null-co://"

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        assert 0 <= offset <= self.size - len(buffer)
        buffer[:] = bytes(len(buffer))
        return True

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        assert 0 <= offset <= self.size - len(data)
        return True

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        self.read_nowait(offset, buffer)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self.write_nowait(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        assert 0 <= offset <= self.size - length

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        assert 0 <= offset <= self.size - length

    async def flush(self) -> None:
        """Nothing was kept."""

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        return [StatusExtent(length, Allocation.HOLE | Allocation.ZERO)]
