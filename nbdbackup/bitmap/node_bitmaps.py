"""The dirty bitmaps of one node, by name, and what may be done with which.

A bitmap that is *busy* (a backup or a snapshot uses it, or it is offered to clients), one that is
*inconsistent* (its bits are of no use) and one that belongs to a *checkpoint* are left alone by whoever
wants to change bits; the functions here say so in the words that QMP's users know from QEMU.
"""

from collections.abc import Iterator

from nbdbackup.bitmap.dirty import GRANULARITY_MAX, GRANULARITY_MIN, DirtyBitmap
from nbdbackup.errors import ConflictError, NotFoundError, UsageError

NAME_BYTES_MAX = 1023
GRANULARITY_DEFAULT = 64 << 10
GRANULARITY_DEFAULT_MIN = 4 << 10


def default_granularity(cluster_bytes: int | None = None) -> int:
    """That of a bitmap of a node that allocates `cluster_bytes` at a time, if that is known."""
    if cluster_bytes is None:
        return GRANULARITY_DEFAULT
    return min(max(cluster_bytes, GRANULARITY_DEFAULT_MIN), GRANULARITY_DEFAULT)


def check_granularity(granularity: int) -> None:
    """Raises UsageError if no bitmap can have it (in bytes)."""
    is_power = granularity > 0 and granularity & (granularity - 1) == 0
    if not is_power or not GRANULARITY_MIN <= granularity <= GRANULARITY_MAX:
        raise UsageError(f"Granularity must be power of 2 and at least {GRANULARITY_MIN}")


def check_usable(bitmap: DirtyBitmap) -> None:
    """Raises ConflictError if nobody may read `bitmap` for good: it is busy or inconsistent."""
    if bitmap.busy:
        raise ConflictError(f"Bitmap '{bitmap}' is currently in use by another operation and cannot be used")
    if bitmap.inconsistent:
        raise ConflictError(f"Bitmap '{bitmap}' is inconsistent and cannot be used")


def check_changeable(bitmap: DirtyBitmap) -> None:
    """Raises ConflictError if a user may not take bits out of `bitmap`, or change whether it records."""
    check_usable(bitmap)
    check_no_checkpoint(bitmap)


def check_removable(bitmap: DirtyBitmap) -> None:
    """Raises ConflictError if a user may not remove `bitmap`; of an inconsistent one it is all they may."""
    if bitmap.busy:
        check_usable(bitmap)
    check_no_checkpoint(bitmap)


def check_no_checkpoint(bitmap: DirtyBitmap) -> None:
    """Raises ConflictError if a later backup needs `bitmap` as it is."""
    if bitmap.checkpoint:
        raise ConflictError(
            f"Bitmap '{bitmap}' belongs to the checkpoint of that name: delete that, or merge it into another"
        )


class NodeBitmaps:
    """The bitmaps of the node called `node`, of `size` bytes; iterating gives the newest first."""

    def __init__(self, node: str, size: int) -> None:
        self.node = node
        self.size = size
        # Changing while running.
        self._bitmaps: dict[str, DirtyBitmap] = {}

    def __iter__(self) -> Iterator[DirtyBitmap]:
        return iter(tuple(self._bitmaps.values())[::-1])

    def __len__(self) -> int:
        return len(self._bitmaps)

    def find(self, name: str) -> DirtyBitmap | None:
        """The bitmap called `name`, if there is one."""
        return self._bitmaps.get(name)

    def get(self, name: str) -> DirtyBitmap:
        """The bitmap called `name`.

        Raises:
            NotFoundError: there is none.
        """
        bitmap = self._bitmaps.get(name)
        if bitmap is None:
            raise NotFoundError(f"Dirty bitmap '{name}' not found")
        return bitmap

    def held_by(self, holder: bytes) -> DirtyBitmap | None:
        """The bitmap that is frozen for the one of that uuid, if there is one."""
        return next((bitmap for bitmap in self._bitmaps.values() if bitmap.holder == holder), None)

    def check_new(self, name: str) -> None:
        """Raises ConflictError or UsageError if there cannot be another bitmap called `name`."""
        if name in self._bitmaps:
            raise ConflictError(f"Bitmap already exists: {name}")
        if not name:
            raise UsageError("Bitmap name cannot be empty")
        if len(name.encode(errors="surrogatepass")) > NAME_BYTES_MAX:
            raise UsageError(f"Bitmap name too long: {name}")
        if not name.isprintable():
            raise UsageError(f"Bitmap name has characters that cannot be shown: {name!r}")

    def add(self, bitmap: DirtyBitmap) -> None:
        """Add `bitmap`, for whose name `check_new` found nothing; if inconsistent, of any size."""
        assert bitmap.name not in self._bitmaps
        assert bitmap.size == self.size or bitmap.inconsistent
        self._bitmaps[bitmap.name] = bitmap

    def remove(self, bitmap: DirtyBitmap) -> None:
        """Take out `bitmap`, which is here."""
        assert self._bitmaps[bitmap.name] is bitmap
        del self._bitmaps[bitmap.name]


def check_same_size(target: DirtyBitmap, source: DirtyBitmap) -> None:
    """Raises UsageError if `source` cannot be merged into `target`."""
    if target.size != source.size:
        raise UsageError(
            f"Bitmaps are of different sizes (destination size is {target.size}, "
            f"source size is {source.size}) and can't be merged"
        )
