"""Dirty tracker: the filter that marks what clients change in the node's dirty bitmaps.

Invariant 4: a bit is set before the change is forwarded, and stays set if that fails: what a failed
write left behind nobody knows. A crash can only over-report.

It is on a node while the node has bitmaps, and looks at nothing but them. Where in the stack of
filters it is makes no difference: points in time are taken while nothing is in flight.
"""

from collections.abc import Iterable

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.device import BlockDevice, ReadableBuffer
from nbdbackup.block.filter import FilterDevice


class DirtyTracker(FilterDevice):
    """`bitmaps` may be replaced at any time; what is in flight then was marked in the old ones."""

    def __init__(self, child: BlockDevice, bitmaps: Iterable[DirtyBitmap] = ()) -> None:
        super().__init__(child)
        self.bitmaps = tuple(bitmaps)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self._mark(offset, len(data))
        await self.child.write(offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        self._mark(offset, length)
        await self.child.write_zeroes(offset, length, may_unmap, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        self._mark(offset, length)
        await self.child.trim(offset, length, fua)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        # Marked also if the write then takes the long way, where it would be anyhow.
        length = len(data)
        if length:
            for bitmap in self.bitmaps:
                bitmap.mark(offset, length)
        return self.child.write_nowait(offset, data)

    def _mark(self, offset: int, length: int) -> None:
        if length:
            for bitmap in self.bitmaps:
                bitmap.mark(offset, length)
