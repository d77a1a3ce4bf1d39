"""StoredBitmap: a dirty bitmap whose bits and state are in a file at every instant.

If the process is killed between any two stores, the file says dirty of everything that is. In order:

    mark              the bit; the client's write
    create_successor  (the spare plane is clear) BOTH planes count, for the holder; the first bit in the spare
    abdicate          the spare plane is the bitmap's own, and counts alone; the frozen bits are cleared
    reclaim           no holder; the successor's bits to the own plane; the spare one is cleared;
                      the own one counts alone
    clear             a copy to the spare plane; BOTH count; the own plane is cleared;
      and `forget`    the own one counts alone; the spare one is cleared
    remove            the header says REMOVED; (writes go on unrecorded;) the file goes

What a crash interrupts is found undone: frozen bits and the successor's together, cleared bits set again.

A freeze with a *holder*, something that outlives the server and is known by its uuid, outlives it too, in a
crash or a clean stop: the bitmap is loaded frozen, own plane and successor as they were. As long as the
holder is in the file, the own plane has the frozen bits and no others, and the spare one all that was
recorded since. Who finds the holder says so (`claim`); if nobody does, `reclaim` makes one of both, and
nothing is lost.

With `durable`, the same holds for a loss of power: each of these steps is on disk before one that relies on
it (the event loop waits for that, some milliseconds: they are rare), and marks settle before their writes are
begun (`DurableMarks`). A step that cannot be put there was not taken, and from then on no other is, and no
write passes: on disk there may be the state before the step or after it, and both are right for what was
written until then.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from msgspec.structs import replace

from nbdbackup.bitmap.bits import clear_plane
from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.bitmap.dirty import DirtyBitmap, Planes, SavedBits
from nbdbackup.bitmap.durable_marks import DurableMarks
from nbdbackup.bitmap.file import BitmapFile
from nbdbackup.bitmap.file_format import NO_HOLDER, HeaderFlags
from nbdbackup.bitmap.identity import SourceIdentity
from nbdbackup.crash_points import reach

Sync = Callable[[Callable[[], None]], Awaitable[None]]
"""Runs a function that blocks, in a thread."""


class StoredBitmap(DirtyBitmap):
    """The bitmap in `file`; unless it is held, the plane that is not the own one is clear and not counted."""

    __slots__ = ("_cleared", "_marks", "awaits_holder", "file")

    def __init__(self, file: BitmapFile, run: Sync) -> None:
        header = file.header
        assert header.is_held or HeaderFlags.BOTH not in header.flags
        own = header.own_plane
        super().__init__(
            header.name,
            header.identity.size,
            header.granularity,
            enabled=HeaderFlags.ENABLED in header.flags and not header.inconsistent,
            persistent=True,
            planes=Planes(file.plane(own), file.plane(1 - own)),
        )
        self.inconsistent = header.inconsistent
        self.file = file
        self.awaits_holder = header.is_held
        """Whether it was loaded frozen, and nobody knows yet if its holder is there as well."""
        if header.is_held:
            self._has_successor = True
            self._successor_count = self._planes.spare.count(1)
            self._choose_plane()
        self._marks: DurableMarks | None = None
        if HeaderFlags.POWER in header.flags:
            self._marks = DurableMarks(lambda: run(file.sync))
        self._cleared: SavedBits | None = None
        """What `clear` took away and is in the spare plane still."""

    @property
    def durable(self) -> bool:
        """Whether it outlives a loss of power: writes have to wait until `settle` returns."""
        return self._marks is not None

    # Marks that have to be on disk.

    def is_settled(self, offset: int, length: int) -> bool:
        """Whether a write to the non-empty range may pass at once: it needs no new bit on disk."""
        bits = self._recording
        if self._marks is None or bits is None:
            return True
        first = offset >> self._shift
        stop = ((offset + length - 1) >> self._shift) + 1
        if not bits[first] or (stop - first > 1 and bits.find(0, first, stop) >= 0):
            return False
        return not self._marks.has_pending(first, stop)

    def settle(self, offset: int, length: int) -> Awaitable[None]:
        """The range was marked, and `is_settled` said False before that: await its bits' being on disk.

        To be called with no await since `is_settled`; other writes to the range wait from now on.

        Raises, when awaited:
            DeviceError: they cannot be put there; the write must not pass.
        """
        assert self._marks is not None
        first = offset >> self._shift
        return self._marks.settle(first, ((offset + length - 1) >> self._shift) + 1)

    # Changes of its state; the order of the steps is in the module's docstring.

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        if enabled == self._enabled:
            return
        header = self.file.header
        if enabled:
            # That may be to undo something: should it not reach the disk, no write passes either.
            with suppress(OSError):
                self._write(header.flags | HeaderFlags.ENABLED, header.holder)
        else:
            self._write(header.flags & ~HeaderFlags.ENABLED, header.holder)
        self._enabled = enabled
        self._choose_plane()

    @property
    def holder(self) -> bytes | None:
        header = self.file.header
        return header.holder if header.is_held else None

    def claim(self) -> None:
        """The holder that it was loaded with is there: it stays frozen."""
        assert self.holder is not None
        self.awaits_holder = False

    def create_successor(self, holder: bytes | None = None) -> None:
        if self._cleared is not None:
            # In the transaction that cleared it: the spare plane is needed before all of it is final.
            self.forget(self._cleared)
        self._write(self.file.header.flags | HeaderFlags.BOTH, holder or NO_HOLDER)
        reach("bitmap.create-successor.both")
        super().create_successor()

    def abdicate(self) -> None:
        # First: nobody may find part of the frozen bits, and take it for all of them.
        self._write((self.file.header.flags & ~HeaderFlags.BOTH) ^ HeaderFlags.SECOND_PLANE)
        reach("bitmap.abdicate.alone")
        super().abdicate()
        self.awaits_holder = False

    def reclaim(self) -> None:
        try:
            if self.holder is not None:
                # First: from now on the planes are not what a holder takes them for.
                self._write(self.file.header.flags)
                reach("bitmap.reclaim.not-held")
            if self.durable:
                self._planes.own |= self._planes.spare
                self._sync()
                reach("bitmap.reclaim.merged")
        except OSError:
            # In the file both planes stay, and both count.
            self._planes.own |= self._planes.spare
            self._planes = Planes(self._planes.own, clear_plane(len(self._planes.own)))
        super().reclaim()
        self.awaits_holder = False
        reach("bitmap.reclaim.cleared")
        with suppress(OSError):
            self._write(self.file.header.flags & ~HeaderFlags.BOTH)

    def clear(self) -> SavedBits:
        if self._cleared is not None or not self.count:
            return super().clear()
        self._planes.spare |= self._planes.own
        reach("bitmap.clear.saved")
        try:
            self._write(self.file.header.flags | HeaderFlags.BOTH)
        except OSError:
            self._planes.spare.setall(0)
            raise
        reach("bitmap.clear.both")
        self._cleared = super().clear()
        reach("bitmap.clear.cleared")
        return self._cleared

    def restore(self, saved: SavedBits) -> None:
        super().restore(saved)
        with suppress(OSError):
            self._sync()
            reach("bitmap.restore.restored")
            if saved is self._cleared:
                self.forget(saved)

    def forget(self, saved: SavedBits) -> None:
        if saved is not self._cleared:
            return
        self._cleared = None
        # If it fails, they are dirty again when the bitmap is loaded.
        with suppress(OSError):
            self._write(self.file.header.flags & ~HeaderFlags.BOTH)
            reach("bitmap.forget.alone")
            self._planes.spare.setall(0)

    def merge(self, sources: Sequence[DirtyBitmap]) -> None:
        super().merge(sources)
        reach("bitmap.merge.merged")
        self._sync()

    def merge_clusters(self, clusters: ClusterBitmap) -> None:
        super().merge_clusters(clusters)
        reach("bitmap.merge-clusters.merged")
        self._sync()

    def invalidate(self, reason: str) -> None:
        """Its bits are of no use from now on, and say so also when they are loaded again. Never fails."""
        self._give_up(reason, self.file.header.flags)

    def withdraw(self) -> None:
        """It is to be removed: whatever befalls that, nobody finds it again. Never fails."""
        self._give_up("it was being removed", self.file.header.flags | HeaderFlags.REMOVED)
        reach("bitmap.remove.withdrawn")

    def _give_up(self, reason: str, flags: HeaderFlags) -> None:
        self.inconsistent = reason
        self._enabled = False
        self._choose_plane()
        # A disk that fails to sync loses what it may; nobody could do more about it.
        with suppress(OSError):
            self.file.write_header(
                replace(self.file.header, inconsistent=reason, flags=flags), sync=self.durable
            )

    def _write(self, flags: HeaderFlags, holder: bytes = NO_HOLDER) -> None:
        """Take a step.

        Raises:
            DeviceError: it cannot be put on disk, and was not taken; nor is any other from now on.
        """
        before = self.file.header
        if self._marks is not None and self._marks.failure is not None:
            raise self._marks.failure
        try:
            self.file.write_header(replace(before, flags=flags, holder=holder), sync=self.durable)
        except OSError as error:
            assert self._marks is not None
            self.file.write_header(before, sync=False)
            raise self._marks.fail(error) from error

    def _sync(self) -> None:
        """What was stored is on disk, if it has to be. Raises what `_write` does."""
        if self._marks is None:
            return
        try:
            self.file.sync()
        except OSError as error:
            raise self._marks.fail(error) from error

    # Its end.

    def save_clean(self, identity: SourceIdentity) -> None:
        """The server stops: put everything on disk as the bits of the source that `identity` is of now.

        Nothing may be marked from now on; what is held stays frozen. Blocks as fsync(2) does.

        Raises:
            OSError: it cannot be put there; it counts as in use until the next boot.
        """
        if self.is_frozen and self.holder is None:
            self.reclaim()
        if self._cleared is not None:
            self.forget(self._cleared)
        self.file.sync()
        reach("bitmap.save.synced")
        header = replace(
            self.file.header,
            identity=identity,
            flags=self.file.header.flags & ~HeaderFlags.IN_USE,
            bits_checksum=self.file.bits_checksum(),
        )
        self.file.write_header(header, sync=True)
        reach("bitmap.save.saved")

    async def close(self) -> None:
        """Give up the file; nobody may use the bitmap any more."""
        if self._marks is not None:
            await self._marks.close()
        self._recording = None
        self._planes = Planes.in_memory(0)
        self.file.close()
