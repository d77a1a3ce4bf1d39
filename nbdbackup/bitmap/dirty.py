"""DirtyBitmap: which granules of a node were written since the bitmap was last cleared.

    recording         the clients' writes set bits (invariant 4: before the write is forwarded)
    disabled          they do not
    frozen            a backup uses the bits: they stay as they are, and a *successor* records instead
                      --> abdicate: the backup has them; the successor's bits are the bitmap's now
                      --> reclaim:  the backup failed; both together are

The object stays the same through all of it: whoever holds a bitmap need not look it up again.

Offsets and lengths are bytes. The bits are in two planes, the bitmap's own and its successor's, that
may be memory or a file (`Planes`). A map of a large disk is many MiB, and clients wait while the event
loop walks it: what is known to be empty is not looked at, and copies are made in pieces (`Freeze`).

Source: QEMU's block/dirty-bitmap.c; the terms are the same.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import msgspec
from bitarray import bitarray

from nbdbackup.bitmap.bits import clear_plane, rescale
from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.extents import ContextExtent, Extent

GRANULARITY_MIN = 512
GRANULARITY_MAX = 1 << 31
STATUS_GRANULES_MAX = 1 << 20
"""As many granules are looked at for one answer of `status`; it says less than was asked if need be."""
STATUS_EXTENTS_MAX = 1 << 14
"""An answer of `status` has no more extents."""

FREEZE_GRANULES = 1 << 22
"""As many are copied at once when a bitmap is frozen."""
FREEZE_CHANGES_MAX = 1 << 14
"""Changes noted while a bitmap is being frozen; after more than these it is copied again, at the instant."""

RUNS_MAX = 1 << 14
"""As many runs are dealt with one by one, in about 20 ms; if there are more, the whole map is."""

_PAGE_GRANULES = mmap.PAGESIZE * 8
WANTED_RUNS = 256
"""As many runs are looked at at once when clusters are made of a bitmap."""

_DIRTY = 1


def granules(size: int, granularity: int) -> int:
    """How many bits a bitmap of a device of `size` bytes has."""
    return -(-size // granularity)


@dataclass(slots=True)
class Planes:
    """Where the bits of a bitmap are: its own and its successor's, one bit for each granule.

    `spare` is the plane that is not in use, and clear. The two change places when the successor
    abdicates. A plane is a whole number of bytes long, in bitarray's default bit order; the bits past the
    last granule are clear.
    """

    own: bitarray
    spare: bitarray

    @classmethod
    def in_memory(cls, count: int) -> "Planes":
        """Planes of `count` clear bits that end with the process. They take memory as bits are set."""
        return cls(clear_plane(count), clear_plane(count))

    def swap(self) -> None:
        """Let the spare plane be the bitmap's own, and clear the other."""
        self.own, self.spare = self.spare, self.own
        if self.spare.any():
            self.spare.setall(0)


class SavedBits(msgspec.Struct, frozen=True, eq=False):
    """A bitmap's own bits as they were: how `clear` and `merge` are undone."""

    bits: bitarray | None
    """None: there were none."""
    count: int


class DirtyBitmap:
    """One bitmap of a device of `size` bytes. Set once: `size`, `granularity` (a power of two), `name`.

    Changing while running: `enabled`, `persistent`, `inconsistent` (why its bits are of no use, "" if
    they are), `users` (who needs it to stay, in words; the bitmap is `busy` then), `checkpoint` (whether
    it tells what changed since a checkpoint, so that its bits are not a user's to clear).
    """

    __slots__ = (
        "_count",
        "_enabled",
        "_freezes",
        "_has_successor",
        "_planes",
        "_recording",
        "_shift",
        "_successor_count",
        "checkpoint",
        "granularity",
        "inconsistent",
        "name",
        "persistent",
        "size",
        "users",
    )

    def __init__(
        self,
        name: str,
        size: int,
        granularity: int,
        *,
        enabled: bool = True,
        persistent: bool = False,
        planes: Planes | None = None,
    ) -> None:
        """`planes`: with the bits that are set already; None: memory, nothing dirty."""
        assert GRANULARITY_MIN <= granularity <= GRANULARITY_MAX
        assert granularity & (granularity - 1) == 0
        self.name = name
        self.size = size
        self.granularity = granularity
        self.persistent = persistent
        self.inconsistent = ""
        self.checkpoint = False
        self.users: list[str] = []
        self._shift = granularity.bit_length() - 1
        self._planes = Planes.in_memory(granules(size, granularity)) if planes is None else planes
        self._count = 0 if planes is None else planes.own.count(1)
        self._successor_count = 0
        self._has_successor = False
        self._enabled = enabled
        self._recording: bitarray | None = None
        """The plane in which writes set bits."""
        self._freezes: list[Freeze | WantedClusters] = []
        self._choose_plane()

    def __str__(self) -> str:
        return self.name

    @property
    def enabled(self) -> bool:
        """Whether clients' writes are recorded; in the successor while there is one."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        self._choose_plane()

    @property
    def is_frozen(self) -> bool:
        """Whether there is a successor."""
        return self._has_successor

    @property
    def holder(self) -> bytes | None:
        """The uuid of what froze it and outlives the process with it, if that is so."""
        return None

    @property
    def busy(self) -> bool:
        """Whether it may not be changed, used by anything else, or removed."""
        return self._has_successor or bool(self.users)

    @property
    def count(self) -> int:
        """How many granules are dirty, those in the successor left out."""
        return self._count

    @property
    def successor_count(self) -> int:
        """How many granules were written since the successor was made."""
        return self._successor_count

    def mark(self, offset: int, length: int) -> None:
        """A client is about to change this non-empty range: every granule that it touches is dirty."""
        bits = self._recording
        if bits is None:
            return
        first = offset >> self._shift
        last = (offset + length - 1) >> self._shift
        if first == last:
            if bits[first]:
                return
            bits[first] = 1
            new = 1
        else:
            new = last + 1 - first - bits.count(1, first, last + 1)
            if not new:
                return
            bits[first : last + 1] = 1
        if self._has_successor:
            self._successor_count += new
        else:
            self._count += new
        for freeze in self._freezes:
            freeze.note(first, last + 1)

    # Frozen for a backup.

    def create_successor(self, holder: bytes | None = None) -> None:
        """Freeze the bits; writes are recorded in a successor until `abdicate` or `reclaim`.

        `holder` is the uuid of what freezes them, if that outlives the process; see `StoredBitmap`.
        """
        assert not self.busy
        self._has_successor = True
        self._choose_plane()

    def abdicate(self) -> None:
        """The frozen bits were dealt with: what the successor recorded takes their place."""
        assert self._has_successor
        self._planes.swap()
        self._count = self._successor_count
        self._end_successor()

    def reclaim(self) -> None:
        """The frozen bits are needed again: they and what the successor recorded are the bitmap's."""
        assert self._has_successor
        if self._successor_count:
            self._planes.own |= self._planes.spare
            self._planes.spare.setall(0)
            self._count = self._planes.own.count(1)
        self._end_successor()

    def _end_successor(self) -> None:
        self._successor_count = 0
        self._has_successor = False
        self._choose_plane()
        self._changed()

    def _choose_plane(self) -> None:
        if not self._enabled:
            self._recording = None
        else:
            self._recording = self._planes.spare if self._has_successor else self._planes.own

    # Changes of the bitmap's own bits, by users.

    def clear(self) -> SavedBits:
        """Nothing is dirty; returns what was."""
        saved = self.save()
        if self._count:
            self._planes.own.setall(0)
            self._count = 0
            self._changed()
        return saved

    def merge(self, sources: "Sequence[DirtyBitmap]") -> None:
        """What is dirty in any of `sources`, bitmaps of the same size, is dirty here too."""
        for source in sources:
            assert source.size == self.size
            if not source.count:
                continue
            if source.granularity == self.granularity:
                _set_all(self._planes.own, source._planes.own)
            elif not self._set_few(self._planes.own, source.dirty_runs()):
                finer = rescale(source._planes.own, source.granularity, self.granularity)
                _set_all(self._planes.own, finer)
        self._recount()

    def merge_clusters(self, clusters: ClusterBitmap) -> None:
        """What is set in `clusters`, of the same size, is dirty too; in the successor if there is one."""
        plane = self._planes.spare if self._has_successor else self._planes.own
        if not self._set_few(plane, clusters.runs()):
            _set_all(plane, rescale(clusters.bits, clusters.cluster_bytes, self.granularity))
        self._recount()

    def save(self) -> SavedBits:
        """The bits as they are, for `restore`."""
        return SavedBits(self._planes.own.copy() if self._count else None, self._count)

    def restore(self, saved: SavedBits) -> None:
        """Undo what was done since `save`."""
        if saved.bits is not None:
            self._planes.own[:] = saved.bits
        elif self._count:
            self._planes.own.setall(0)
        self._count = saved.count
        self._changed()

    def forget(self, saved: SavedBits) -> None:
        """The change that `saved` is from is final: `restore` will not be called."""

    def _set_few(self, plane: bitarray, runs: Iterator[Extent]) -> bool:
        """Set the bits of `runs`; False if there are so many that it goes quicker by the whole map."""
        shift = self._shift
        for run in islice(runs, RUNS_MAX):
            plane[run.offset >> shift : ((run.end - 1) >> shift) + 1] = 1
        return next(runs, None) is None

    # What others want to know.

    def dirty_runs(self) -> Iterator[Extent]:
        """Every run of dirty granules, in order; those in the successor are left out."""
        bits, position = self._planes.own, 0
        while (first := bits.find(1, position)) >= 0:
            stop = bits.find(0, first)
            position = len(bits) if stop < 0 else stop
            start = first << self._shift
            yield Extent(start, min(position << self._shift, self.size) - start)

    def clusters(self, cluster_bytes: int) -> ClusterBitmap:
        """The clusters in which something is dirty; those in the successor are left out."""
        clusters = ClusterBitmap(self.size, cluster_bytes)
        if cluster_bytes != self.granularity:
            runs = self.dirty_runs()
            for run in islice(runs, RUNS_MAX):
                clusters.set(run.aligned_out(cluster_bytes, self.size))
            if next(runs, None) is None:
                return clusters
        clusters.load(rescale(self._planes.own, self.granularity, cluster_bytes))
        return clusters

    def frozen_bits(self) -> "DirtyBitmap":
        """A disabled bitmap with what was dirty when this one was frozen, that stays as it is."""
        assert self._has_successor
        planes = Planes(self._planes.own.copy(), bitarray())
        return DirtyBitmap(self.name, self.size, self.granularity, enabled=False, planes=planes)

    def frozen_copy(self) -> "DirtyBitmap":
        """A disabled bitmap with what is dirty now, the successor's included, that stays as it is."""
        return Freeze(self).finish()

    def status(self, offset: int, length: int) -> list[ContextExtent]:
        """What is dirty (1) and clean (0) from `offset` on, the successor's included; see BLOCK_STATUS.

        At most `length` bytes, the first extents that are known of them; neighbours differ.
        """
        first = offset >> self._shift
        last = min(((offset + length - 1) >> self._shift) + 1, first + STATUS_GRANULES_MAX)
        bits = self._planes.own[first:last]
        if self._has_successor:
            bits |= self._planes.spare[first:last]
        extents: list[ContextExtent] = []
        position, value = 0, bits[0]
        while position < len(bits) and len(extents) < STATUS_EXTENTS_MAX:
            stop = bits.find(1 - value, position)
            position = len(bits) if stop < 0 else stop
            end = min((first + position) << self._shift, offset + length)
            extents.append(ContextExtent(end - offset, _DIRTY * value))
            length -= end - offset
            offset, value = end, 1 - value
        return extents

    def _recount(self) -> None:
        self._count = self._planes.own.count(1)
        if self._has_successor:
            self._successor_count = self._planes.spare.count(1)
        self._changed()

    def _changed(self) -> None:
        """Bits changed otherwise than by `mark`."""
        for freeze in self._freezes:
            freeze.is_stale = True


def _set_all(plane: bitarray, bits: bitarray) -> None:
    """Set what is set in `bits`, which may be a few clear ones longer or shorter than `plane`."""
    count = min(len(plane), len(bits))
    if count == len(plane) == len(bits):
        plane |= bits
    else:
        plane[:count] |= bits[:count]


class Freeze:
    """A bitmap's `frozen_copy` in the making: most of the work is done before the instant.

        freeze = Freeze(bitmap)
        try:
            for _ in freeze.pieces():
                await asyncio.sleep(0)      # clients go on
            ... the node stands still ...
            frozen = freeze.finish()
        finally:
            freeze.end()

    What clients mark meanwhile is noted, and set at the instant.
    """

    def __init__(self, bitmap: DirtyBitmap, plane: bitarray | None = None) -> None:
        """`plane`: clear bits, as many as the bitmap has, where the copy shall be; None: in memory."""
        self.bitmap = bitmap
        self.plane = plane
        self.is_stale = False
        """Whether the whole copy has to be made again."""
        self._is_copied = False
        self._bits = bitarray()
        self._noted: list[tuple[int, int]] = []

    def note(self, first: int, stop: int) -> None:
        """The granules from `first` to before `stop` were marked."""
        if len(self._noted) < FREEZE_CHANGES_MAX:
            self._noted.append((first, stop))
        else:
            self.is_stale = True

    def pieces(self) -> Iterator[None]:
        """Copy, with a rest after each piece."""
        self._begin()
        self.bitmap._freezes.append(self)
        for first in self._firsts():
            self._copy(first)
            yield
        self._is_copied = True

    def finish(self) -> DirtyBitmap:
        """What is dirty at this instant; the bitmap's node stands still."""
        if self.is_stale or not self._is_copied:
            self._begin()
            for first in self._firsts():
                self._copy(first)
        for first, stop in self._noted:
            self._bits[first:stop] = 1
        self.end()
        of = self.bitmap
        frozen = DirtyBitmap(of.name, of.size, of.granularity, enabled=False)
        frozen._planes = Planes(self._bits, bitarray())
        frozen._count = of.count if not of.is_frozen else self._bits.count(1)
        frozen.inconsistent = of.inconsistent
        return frozen

    def end(self) -> None:
        """Stop taking notes; it may have happened already."""
        if self in self.bitmap._freezes:
            self.bitmap._freezes.remove(self)

    def _begin(self) -> None:
        self.is_stale = self._is_copied = False
        self._noted.clear()
        if self.plane is None:
            self._bits = clear_plane(granules(self.bitmap.size, self.bitmap.granularity))
            return
        if self._bits is self.plane:
            self.plane.setall(0)
        self._bits = self.plane

    def _firsts(self) -> range:
        of = self.bitmap
        is_empty = not of.count and not of.successor_count
        return range(0, 0 if is_empty else granules(of.size, of.granularity), FREEZE_GRANULES)

    def _copy(self, first: int) -> None:
        of = self.bitmap
        stop = min(first + FREEZE_GRANULES, granules(of.size, of.granularity))
        for plane in (of._planes.own, of._planes.spare)[: 1 + of.is_frozen]:
            position = first
            while (found := plane.find(1, position, stop)) >= 0:
                # No more than the page in which it is: pages without a bit stay no memory.
                page = found // _PAGE_GRANULES * _PAGE_GRANULES
                position = min(page + _PAGE_GRANULES, stop)
                self._bits[page:position] |= plane[page:position]


class WantedClusters:
    """What `DirtyBitmap.clusters` tells, for a moment to come: most of the work is done before the instant.

    Used as `Freeze` is. `clusters` is complete after `pieces`, but for `changes`.
    """

    def __init__(self, bitmap: DirtyBitmap, cluster_bytes: int) -> None:
        self.bitmap = bitmap
        self.clusters = ClusterBitmap(bitmap.size, cluster_bytes)
        self.is_stale = True
        """Whether `clusters` has to be made again: it was not made, or bits were changed by users."""
        self._noted: list[tuple[int, int]] = []

    def note(self, first: int, stop: int) -> None:
        """The granules from `first` to before `stop` were marked."""
        if len(self._noted) < FREEZE_CHANGES_MAX:
            self._noted.append((first, stop))
        else:
            self.is_stale = True

    def pieces(self) -> Iterator[None]:
        """Set the bits of `clusters`, with a rest after each piece."""
        self.is_stale = False
        self.bitmap._freezes.append(self)
        size, cluster_bytes = self.bitmap.size, self.clusters.cluster_bytes
        for number, run in enumerate(self.bitmap.dirty_runs()):
            if number == RUNS_MAX:
                # Run by run, so many would take minutes.
                self.clusters = self.bitmap.clusters(cluster_bytes)
                return
            self.clusters.set(run.aligned_out(cluster_bytes, size))
            if number % WANTED_RUNS == WANTED_RUNS - 1:
                yield

    def changes(self) -> list[Extent] | None:
        """At the instant: the clusters to be added to `clusters`; None if it has to be made again."""
        if self.is_stale:
            return None
        granularity, size = self.bitmap.granularity, self.bitmap.size
        noted = (Extent(first * granularity, (stop - first) * granularity) for first, stop in self._noted)
        return [extent.aligned_out(self.clusters.cluster_bytes, size) for extent in noted]

    def end(self) -> None:
        """Stop taking notes; it may have happened already."""
        if self in self.bitmap._freezes:
            self.bitmap._freezes.remove(self)
