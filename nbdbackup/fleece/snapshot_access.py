"""SnapshotAccess: the read-only view of one point in time.

A cluster that was saved is read from scratch. Any other is read from the source with its
range *frozen*: overlapping client writes wait until that read has ended.

Invariant 2: a read returns the bytes of the point in time or an error, never newer bytes. The
snapshot may break, or the range may be discarded, while a read is under way; so both are
looked at again *after* the read (defect j of QEMU 10's snapshot-access).

Discarding through the view gives scratch back and ends copy-before-write for the whole
clusters in the range; reading them afterwards is an error.

Follows QEMU's block/snapshot-access.c; the terms are the same.
"""

import errno

from nbdbackup.block.device import BlockDevice, Features, ReadableBuffer, WritableBuffer
from nbdbackup.errors import DeviceError, SnapshotError
from nbdbackup.extents import ContextExtent, Extent, StatusExtent, merge_status
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite

STATUS_EXTENTS_MAX = 1024


class SnapshotAccess(BlockDevice):
    """The bytes of `filter_`'s source when it was put in place; `scratch` has the saved ones."""

    def __init__(self, filter_: CopyBeforeWrite, scratch: BlockDevice) -> None:
        self.size = filter_.size
        self.read_only = True
        self.features = Features(trim=True)
        self._filter = filter_
        self._copy = filter_.block_copy
        self._scratch = scratch
        # Changes while running.
        self._dropped = False
        self._has_scratch = True

    def __str__(self) -> str:
        return self._filter.title

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        view = memoryview(buffer)
        area = Extent(offset, len(view))
        self._check_readable(area)
        position = offset
        while position < area.end:
            run, saved = self._next_run(Extent(position, area.end - position))
            piece = view[run.offset - offset : run.end - offset]
            if saved:
                await self._scratch.read(run.offset, piece)
            else:
                with self._filter.frozen_reads.hold(run):
                    await self._filter.child.read(run.offset, piece)
            position = run.end
        self._check_readable(area)

    async def read_sparse(self, offset: int, buffer: WritableBuffer) -> list[StatusExtent]:
        # As `read`; what is zero and what is read of the source are found under one freeze, so that
        # no client write can make a hole of one instant out of the bytes of another.
        view = memoryview(buffer)
        area = Extent(offset, len(view))
        self._check_readable(area)
        found: list[StatusExtent] = []
        position = offset
        while position < area.end:
            run, saved = self._next_run(Extent(position, area.end - position))
            piece = view[run.offset - offset : run.end - offset]
            if saved:
                found += await self._scratch.read_sparse(run.offset, piece)
            else:
                with self._filter.frozen_reads.hold(run):
                    found += await self._filter.child.read_sparse(run.offset, piece)
            position = run.end
        self._check_readable(area)
        return merge_status(found)

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        # Atomic: no task runs in between, and a write that is under way in a thread has
        # had its clusters saved before it started.
        if not len(buffer):
            return True
        area = Extent(offset, len(buffer))
        self._check_readable(area)
        run, saved = self._next_run(area)
        if run == area:
            return (self._scratch if saved else self._filter.child).read_nowait(offset, buffer)
        view = memoryview(buffer)
        while True:
            piece = view[run.offset - offset : run.end - offset]
            if not (self._scratch if saved else self._filter.child).read_nowait(run.offset, piece):
                return False
            if run.end == area.end:
                return True
            run, saved = self._next_run(Extent(run.end, area.end - run.end))

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        area = Extent(offset, length)
        self._check_readable(area)
        found: list[StatusExtent] = []
        position = offset
        while position < area.end and len(found) < STATUS_EXTENTS_MAX:
            run, saved = self._next_run(Extent(position, area.end - position))
            if saved:
                status = await self._scratch.block_status(run.offset, run.length)
            else:
                with self._filter.frozen_reads.hold(run):
                    status = await self._filter.child.block_status(run.offset, run.length)
            found += status
            position += sum(extent.length for extent in status)
        self._check_readable(area)
        return merge_status(found)

    async def is_allocated(self, offset: int, length: int) -> list[ContextExtent]:
        # What was not worth saving, or was discarded, is not held any more.
        area = Extent(offset, length)
        self._check_alive()
        held = self._copy.access.next_set(area)
        if held is None or held.offset >= area.end:
            return [ContextExtent(length, 0)]
        if held.offset > offset:
            return [ContextExtent(held.offset - offset, 0)]
        run, saved = self._next_run(Extent(offset, min(held.end, area.end) - offset))
        if saved:
            return [ContextExtent(run.length, 1)]
        with self._filter.frozen_reads.hold(run):
            found = await self._filter.child.is_allocated(run.offset, run.length)
        self._check_alive()
        return found

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """Give up the whole clusters of the range: see the module's docstring."""
        if self._dropped:
            raise SnapshotError(errno.EIO, f"{self} was dropped")
        area = self._copy.discard(Extent(offset, length))
        if area.length and self._has_scratch:
            # A copy in flight would fill the space again; a write that waits for it goes on after.
            await self._copy.in_flight.wait_no_conflict(area)
            await self._scratch.trim(area.offset, area.length)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        raise self._read_only_error()

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        raise self._read_only_error()

    async def flush(self) -> None:
        """Nothing is ever written here."""

    def give_up_scratch(self) -> None:
        """The snapshot is broken, and its scratch will be closed: do not touch it any more."""
        self._has_scratch = False

    def end(self) -> None:
        """The snapshot was dropped: every later read is an error, as is one under way."""
        self._dropped = True

    def _next_run(self, area: Extent) -> tuple[Extent, bool]:
        """The longest head of `area` that is all saved (True) or all not saved (False)."""
        saved = self._copy.done.any(area.offset, 1)
        find_end = self._copy.done.next_clear if saved else self._copy.done.next_set
        stop = find_end(area)
        end = min(stop.offset, area.end) if stop is not None else area.end
        return Extent(area.offset, end - area.offset), saved

    def _check_alive(self) -> None:
        if self._dropped:
            raise SnapshotError(errno.EIO, f"{self} was dropped")
        cause = self._filter.broken
        if cause is not None:
            raise SnapshotError(errno.EIO, f"{self} is broken: {cause.strerror or cause}")

    def _check_readable(self, area: Extent) -> None:
        self._check_alive()
        if area.length and not self._copy.access.all(area.offset, area.length):
            gap = self._copy.access.next_clear(area)
            assert gap is not None
            raise SnapshotError(
                errno.EACCES,
                f"{self} was discarded at offset {area.offset}, {area.length} bytes",
                max(gap.offset, area.offset),
            )

    def _read_only_error(self) -> DeviceError:
        return DeviceError(errno.EROFS, f"{self} is read-only")
