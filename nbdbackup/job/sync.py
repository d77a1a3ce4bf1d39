"""What a backup copies, and what becomes of its dirty bitmap.

    full           everything
    top            what the top layer of the source holds
    incremental    what is dirty in a bitmap; if the backup succeeds the bitmap has only what came later
    bitmap         the same, and the bitmap mode says what becomes of the bitmap
    none           nothing but what clients are about to overwrite, until the job is cancelled

    on-success     the bitmap is cleared of what was dirty at the point in time, if the backup succeeds
    always         also if it fails: then it keeps what was not copied
    never          it keeps everything

full and top may be given a bitmap too. While the job lives the bitmap is frozen, and its successor
records what clients write.

Source: QEMU's QMP reference, MirrorSyncMode and BitmapSyncMode; the texts are those that its users know.
"""

import logging
from enum import Enum

import msgspec

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.bitmap.node_bitmaps import check_no_checkpoint, check_usable
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.errors import UsageError

logger = logging.getLogger(__name__)


class SyncMode(Enum):
    """What is copied."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"

    @property
    def copies_dirty(self) -> bool:
        """Whether a bitmap says what is copied."""
        return self in (SyncMode.INCREMENTAL, SyncMode.BITMAP)


class BitmapSyncMode(Enum):
    """What becomes of the bitmap."""

    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


class Sync(msgspec.Struct, frozen=True):
    """What was asked for; see `checked`."""

    mode: SyncMode = SyncMode.FULL
    bitmap: str | None = None
    bitmap_mode: BitmapSyncMode | None = None

    def checked(self) -> "Sync":
        """The same, with the mode that incremental implies.

        Raises:
            UsageError: it needs a bitmap, or a mode for it, that was not given.
        """
        bitmap_mode = self.bitmap_mode
        if self.mode.copies_dirty and self.bitmap is None:
            raise UsageError(f"must provide a valid bitmap name for '{self.mode.value}' sync mode")
        if self.mode is SyncMode.INCREMENTAL:
            if bitmap_mode not in (None, BitmapSyncMode.ON_SUCCESS):
                raise UsageError("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
            bitmap_mode = BitmapSyncMode.ON_SUCCESS
        return Sync(self.mode, self.bitmap, bitmap_mode)

    def check_bitmap(self, bitmap: DirtyBitmap | None) -> None:
        """Refuse what makes no sense with `bitmap`, the one that was named, or without one.

        Raises:
            UsageError: the modes do not go together. ConflictError: the bitmap cannot be used.
        """
        if bitmap is None:
            if self.bitmap_mode is not None:
                raise UsageError("Cannot specify bitmap sync mode without a bitmap")
            return
        if self.bitmap_mode is None:
            raise UsageError("Bitmap sync mode must be given when providing a bitmap")
        check_usable(bitmap)
        if self.bitmap_mode is not BitmapSyncMode.NEVER:
            check_no_checkpoint(bitmap)
        if self.mode is SyncMode.NONE:
            raise UsageError("sync mode 'none' does not produce meaningful bitmap outputs")
        if not self.mode.copies_dirty and self.bitmap_mode is BitmapSyncMode.NEVER:
            raise UsageError(
                "Bitmap sync mode 'never' has no meaningful effect when combined with "
                f"sync mode '{self.mode.value}'"
            )


class FrozenBitmap:
    """The bitmap of a running backup, frozen since the point in time; ends in `succeed` or `fail`."""

    def __init__(self, bitmap: DirtyBitmap, mode: BitmapSyncMode, *, holder: bytes | None = None) -> None:
        """Freeze `bitmap`, which is not busy. At the point in time.

        `holder` is the uuid of the job, if that can be resumed: then a stored bitmap stays frozen for it when
        the process ends.
        """
        bitmap.create_successor(holder)
        self._take(bitmap, mode)

    @classmethod
    def adopt(cls, bitmap: StoredBitmap, mode: BitmapSyncMode) -> "FrozenBitmap":
        """`bitmap`, which was loaded frozen, for the job that is its holder."""
        bitmap.claim()
        frozen = cls.__new__(cls)
        frozen._take(bitmap, mode)
        return frozen

    def _take(self, bitmap: DirtyBitmap, mode: BitmapSyncMode) -> None:
        self.bitmap = bitmap
        self._mode = mode
        self._ended = False

    def succeed(self) -> None:
        """Everything that was dirty was copied."""
        if self._mode is BitmapSyncMode.NEVER:
            self.thaw()
        else:
            self._let_go()

    def fail(self, not_copied: ClusterBitmap | None) -> None:
        """The backup failed, and did not copy what is set in `not_copied` (None: nothing of it is left)."""
        if self._mode is BitmapSyncMode.ALWAYS and not_copied is not None:
            self._let_go(not_copied)
        else:
            self.thaw()

    def _let_go(self, not_copied: ClusterBitmap | None = None) -> None:
        self._end()
        try:
            if not_copied is not None:
                # First: until the frozen bits go, they have these.
                self.bitmap.merge_clusters(not_copied)
            self.bitmap.abdicate()
        except OSError as error:
            # That the next backup copies more than it has to does no harm.
            self.bitmap.reclaim()
            logger.error("bitmap '%s' keeps what was backed up: %s", self.bitmap, error.strerror or error)

    @property
    def durable(self) -> bool:
        """Whether the bitmap outlives a loss of power; what it forgets has to be on the source's disk."""
        return isinstance(self.bitmap, StoredBitmap) and self.bitmap.durable

    @property
    def counts_what_was_copied(self) -> bool:
        """Whether a failed backup is good for something."""
        return self._mode is BitmapSyncMode.ALWAYS

    def thaw(self) -> None:
        """There was no backup: the bitmap has all that was dirty, and what became so."""
        self._end()
        self.bitmap.reclaim()

    def _end(self) -> None:
        assert not self._ended
        self._ended = True
