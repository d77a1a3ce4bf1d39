"""A device in memory: for tests, demonstrations and scratch that may vanish.

Every operation is a copy between memory and memory, so all of them finish in place and
both `_nowait` twins always succeed.
"""

from nbdbackup.block.device import BlockDevice, Features, ReadableBuffer, WritableBuffer
from nbdbackup.extents import Allocation, Extent, StatusExtent, merge_status

STATUS_BLOCK_BYTES = 4096
STATUS_BYTES_MAX = 16 << 20
_ZERO_BLOCK = bytes(STATUS_BLOCK_BYTES)
_ZERO_BYTES_MAX = 1 << 20
_ZEROES = bytes(_ZERO_BYTES_MAX)


class MemoryDevice(BlockDevice):
    """`size` bytes, zero at first, gone with the object; `data` is a view of all of them."""

    def __init__(self, size: int, name: str = "memory") -> None:
        assert size > 0
        self.size = size
        self.features = Features(trim=True, fast_zero=True)
        self.data = memoryview(bytearray(size))
        self._name = name

    def __str__(self) -> str:
        return self._name

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        end = offset + len(buffer)
        assert 0 <= offset <= end <= self.size
        buffer[:] = self.data[offset:end]
        return True

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        end = offset + len(data)
        assert 0 <= offset <= end <= self.size
        self.data[offset:end] = data
        return True

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        self.read_nowait(offset, buffer)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self.write_nowait(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        for piece in Extent(offset, length).split(_ZERO_BYTES_MAX):
            self.write_nowait(piece.offset, memoryview(_ZEROES)[: piece.length])

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        await self.write_zeroes(offset, length)

    async def flush(self) -> None:
        """Nothing to do: memory is as durable as it gets."""

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        """Blocks of zeroes are ZERO; answers for at most `STATUS_BYTES_MAX` bytes."""
        assert 0 <= offset <= offset + length <= self.size
        area = Extent(offset, min(length, STATUS_BYTES_MAX))
        return merge_status(
            StatusExtent(block.length, Allocation.ZERO if self._is_zero(block) else Allocation.DATA)
            for block in area.split(STATUS_BLOCK_BYTES)
        )

    def _is_zero(self, block: Extent) -> bool:
        return bytes(self.data[block.offset : block.end]) == _ZERO_BLOCK[: block.length]
