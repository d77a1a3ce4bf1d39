"""What is told of a node's dirty bitmaps."""

from nbdbackup.bitmap.node_bitmaps import NodeBitmaps
from nbdbackup.monitor.services_bitmaps import BitmapInfo


def bitmap_infos(bitmaps: NodeBitmaps) -> list[BitmapInfo]:
    """`bitmaps`, the newest first, each successor before its bitmap, as QEMU shows them."""
    found: list[BitmapInfo] = []
    for bitmap in bitmaps:
        unit = bitmap.granularity
        if bitmap.is_frozen:
            dirty = bitmap.successor_count * unit
            found.append(BitmapInfo(None, unit, dirty, bitmap.enabled, busy=False, persistent=False))
        found.append(
            BitmapInfo(
                bitmap.name,
                unit,
                bitmap.count * unit,
                bitmap.enabled,
                bitmap.busy,
                bitmap.persistent,
                bitmap.inconsistent,
            )
        )
    return found
