"""A disk whose clients' writes are recorded in dirty bitmaps."""

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.node import drained
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from tests.support.fleecing import CLUSTER, Disk

GRANULARITY = CLUSTER


async def record(disk: Disk, name: str = "b0", granularity: int = GRANULARITY) -> DirtyBitmap:
    """A new bitmap that records what is written to `disk` from now on."""
    bitmap = DirtyBitmap(name, disk.node.size, granularity)
    async with drained(disk.node):
        disk.node.push(DirtyTracker(disk.node.child, [bitmap]))
    return bitmap


def dirty_in(bitmap: DirtyBitmap) -> set[int]:
    """The numbers of the dirty granules, those of the successor left out."""
    found: set[int] = set()
    for run in bitmap.dirty_runs():
        found |= set(range(run.offset // bitmap.granularity, -(-run.end // bitmap.granularity)))
    return found
