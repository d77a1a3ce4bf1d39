"""`qemu:dirty-bitmap:NAME`: a dirty bitmap as a meta context, 1 where it is dirty."""

import errno

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.errors import DeviceError
from nbdbackup.extents import ContextExtent
from nbdbackup.nbd.constants import DIRTY_BITMAP_PREFIX


def context_name(bitmap: str) -> str:
    """The meta context of a bitmap called `bitmap`."""
    return DIRTY_BITMAP_PREFIX + bitmap


class BitmapContext:
    """A `StatusProvider` that tells what is dirty in `bitmap` at the time of each question."""

    is_wide = False

    def __init__(self, bitmap: DirtyBitmap) -> None:
        self._bitmap = bitmap

    async def status(self, offset: int, length: int) -> list[ContextExtent]:
        cause = self._bitmap.inconsistent
        if cause:
            raise DeviceError(errno.EINVAL, f"bitmap {self._bitmap} is inconsistent: {cause}")
        return self._bitmap.status(offset, length)
