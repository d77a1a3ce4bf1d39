"""A disk whose clients' writes are recorded in dirty bitmaps."""

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.device import BlockDevice, ReadableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.node import drained
from tests.support.fleecing import CLUSTER, Disk

GRANULARITY = CLUSTER


class Recorder(FilterDevice):
    """Marks what clients write in `bitmaps`, before it is written."""

    def __init__(self, child: BlockDevice) -> None:
        super().__init__(child)
        self.bitmaps: list[DirtyBitmap] = []

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        for bitmap in self.bitmaps:
            bitmap.mark(offset, len(data))
        await self.child.write(offset, data, fua)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        del offset, data
        return False


async def record(disk: Disk, name: str = "b0", granularity: int = GRANULARITY) -> DirtyBitmap:
    """A new bitmap that records what is written to `disk` from now on."""
    bitmap = DirtyBitmap(name, disk.node.size, granularity)
    async with drained(disk.node):
        recorder = Recorder(disk.node.child)
        recorder.bitmaps.append(bitmap)
        disk.node.relink(recorder)
        disk.node.root = recorder
    return bitmap


def dirty_in(bitmap: DirtyBitmap) -> set[int]:
    """The numbers of the dirty granules, those of the successor left out."""
    found: set[int] = set()
    for run in bitmap.dirty_runs():
        found |= set(range(run.offset // bitmap.granularity, -(-run.end // bitmap.granularity)))
    return found
