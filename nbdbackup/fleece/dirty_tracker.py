"""Dirty tracker: the filter that marks what clients change in the node's dirty bitmaps.

Invariant 4: a bit is set before the change is forwarded, and stays set if that fails: what a failed
write left behind nobody knows. A crash can only over-report.

Bitmaps that outlive a loss of power ask for more: a write waits until its new bits are on disk.

It is on a node while the node has bitmaps, and looks at nothing but them. Where in the stack of
filters it is makes no difference: points in time are taken while nothing is in flight.
"""

import asyncio
from collections.abc import Iterable

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.block.device import BlockDevice, ReadableBuffer
from nbdbackup.block.filter import FilterDevice


class DirtyTracker(FilterDevice):
    """`bitmaps` may be replaced at any time; what is in flight then was marked in the old ones."""

    def __init__(self, child: BlockDevice, bitmaps: Iterable[DirtyBitmap] = ()) -> None:
        super().__init__(child)
        self.bitmaps = tuple(bitmaps)

    @property
    def bitmaps(self) -> tuple[DirtyBitmap, ...]:
        """Where changes are marked."""
        return self._bitmaps

    @bitmaps.setter
    def bitmaps(self, bitmaps: tuple[DirtyBitmap, ...]) -> None:
        self._bitmaps = bitmaps
        self._durable = tuple(
            bitmap for bitmap in bitmaps if isinstance(bitmap, StoredBitmap) and bitmap.durable
        )

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        await self._mark(offset, len(data))
        await self.child.write(offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        await self._mark(offset, length)
        await self.child.write_zeroes(offset, length, may_unmap, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        await self._mark(offset, length)
        await self.child.trim(offset, length, fua)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        # Marked also if the write then takes the long way, where it would be anyhow.
        length = len(data)
        if length:
            for durable in self._durable:
                if not durable.is_settled(offset, length):
                    return False
            for bitmap in self._bitmaps:
                bitmap.mark(offset, length)
        return self.child.write_nowait(offset, data)

    async def _mark(self, offset: int, length: int) -> None:
        if not length:
            return
        # No await before all of `settle`: until then nobody else knows which bits are not on disk.
        unsettled = [durable for durable in self._durable if not durable.is_settled(offset, length)]
        for bitmap in self._bitmaps:
            bitmap.mark(offset, length)
        if unsettled:
            await asyncio.gather(*[durable.settle(offset, length) for durable in unsettled])
