"""Write threshold: says once that somebody writes behind a certain byte.

For whoever grows the disk below in time (a thin logical volume, say). A write that ends behind the
threshold is forwarded like any other; the filter tells of it, and then says nothing more until
a new threshold is set.

Follows QEMU's block/write-threshold.c; the terms are the same.
"""

from collections.abc import Callable

from nbdbackup.block.device import BlockDevice, ReadableBuffer
from nbdbackup.block.filter import FilterDevice


class WriteThreshold(FilterDevice):
    """`threshold` is in bytes; 0, also after it was exceeded: none.

    `on_exceeded(amount, threshold)` gets by how many bytes the write went beyond it.
    """

    def __init__(self, child: BlockDevice, threshold: int, on_exceeded: Callable[[int, int], None]) -> None:
        super().__init__(child)
        self.threshold = threshold
        self._on_exceeded = on_exceeded

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self._look_at(offset + len(data))
        await self.child.write(offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        self._look_at(offset + length)
        await self.child.write_zeroes(offset, length, may_unmap, fast, fua)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        self._look_at(offset + len(data))
        return self.child.write_nowait(offset, data)

    def offload_fd(self) -> int | None:
        """None while there is a threshold: what is written must be seen."""
        return None if self.threshold else self.child.offload_fd()

    def _look_at(self, end: int) -> None:
        threshold = self.threshold
        if threshold and end > threshold:
            self.threshold = 0
            self._on_exceeded(end - threshold, threshold)
