"""Copy-before-write filter.

Before a client write, write_zeroes or trim reaches the source, every cluster it touches is
copied to the block copy's target, unless it was copied already or the point in time no
longer wants it. Then the write waits for frozen reads of its range: snapshot reads that are
reading the *source* at this moment.

Invariants 1 and 2 live here. The order in `_save` is the proof: copies first, then frozen
reads, then, without an `await` in between, the write. A frozen read that starts after
that finds the cluster done and reads the copy instead.

What happens when a copy fails is `on_cbw_error`:
- `break-guest-write`: the client's write fails; the point in time stays whole.
- `break-snapshot`: the client's write goes on; the point in time is `broken`, for good.

Follows QEMU's block/copy-before-write.c; the terms are the same.
"""

import asyncio
import errno
import logging
from collections.abc import Callable
from enum import Enum

from nbdbackup.block.device import BlockDevice, ReadableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.errors import CopyError, DeviceError
from nbdbackup.extents import Allocation, Extent
from nbdbackup.fleece.block_copy import BlockCopy
from nbdbackup.fleece.request_list import RequestList

ASK_ZEROES_BYTES_MIN = 1 << 20
"""A change of so many bytes first asks what is zero: discarding an empty disk must not read all of it."""
LATE_COPIES_MAX = 64
"""Copies that go on after their writes gave up; a client that repeats its write adds no more than these."""
ZEROES_BYTES_MAX = 32 << 20
"""Zeroes written to the copy's target at once."""

logger = logging.getLogger(__name__)


class OnCbwError(Enum):
    """Who loses when a cluster cannot be saved before a client write."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class CopyBeforeWrite(FilterDevice):
    """Set once: `block_copy`, whose source is this filter's child; the policy; the timeout.

    `title` is what a person calls the point in time ("snapshot disk@s1"). `on_broken(cause)`
    is called once, when it breaks, before the write that broke it goes on.
    """

    def __init__(
        self,
        child: BlockDevice,
        block_copy: BlockCopy,
        *,
        title: str,
        on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE,
        cbw_timeout_s: float = 0,
        on_broken: Callable[[OSError], None] | None = None,
    ) -> None:
        super().__init__(child)
        assert block_copy.source is child
        self.block_copy = block_copy
        self.title = title
        self.on_cbw_error = on_cbw_error
        self.cbw_timeout_s = cbw_timeout_s
        self.on_broken = on_broken
        # Changing while running.
        self.frozen_reads = RequestList()
        self.broken: OSError | None = None
        self.notes_of_breaking: list[Callable[[OSError], None]] = []
        """Called with the cause before the write that breaks it is forwarded: whoever must know even after a
        crash. Must not fail or wait."""
        self._late_copies: set[asyncio.Task[None]] = set()

    def relink(self, child: BlockDevice) -> None:
        super().relink(child)
        self.block_copy.source = child

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        await self._save(Extent(offset, len(data)))
        await self.child.write(offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        await self._save(Extent(offset, length))
        await self.child.write_zeroes(offset, length, may_unmap, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        await self._save(Extent(offset, length))
        await self.child.trim(offset, length, fua)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return self._save_nowait(offset, len(data)) and self.child.write_nowait(offset, data)

    def break_snapshot(self, cause: OSError) -> None:
        """Stop saving clusters; reads of the point in time fail with `cause` from now on."""
        if self.broken is None:
            self.broken = cause
            for note in self.notes_of_breaking:
                note(cause)
            logger.error("%s is broken, client writes go on: %s", self.title, cause.strerror or cause)
            if self.on_broken is not None:
                self.on_broken(cause)

    async def wait_copies_ended(self) -> None:
        """Return when no copy runs on behalf of a write that stopped waiting for it."""
        while self._late_copies:
            await asyncio.wait(self._late_copies)

    def _save_nowait(self, offset: int, length: int) -> bool:
        if self.broken is not None or not length:
            return True
        copy = self.block_copy
        if copy.in_flight or copy.holds or copy.dirty.any(offset, length):
            try:
                if not copy.copy_nowait(Extent(offset, length)):
                    return False
            except CopyError as error:
                self._settle_failure(Extent(offset, length), error, error.errno)
        return not self.frozen_reads or self.frozen_reads.find_conflict(Extent(offset, length)) is None

    async def _save(self, area: Extent) -> None:
        """Return at a moment when a write to `area` may be forwarded; see the module's docstring."""
        if self.broken is not None or not area.length:
            return
        try:
            await self._wait_copied(area)
        except CopyError as error:
            self._settle_failure(area, error, error.errno)
        except TimeoutError as error:
            self._settle_failure(area, error, errno.ETIMEDOUT)
        if self.broken is None:
            await self.frozen_reads.wait_no_conflict(area)

    async def _wait_copied(self, area: Extent) -> None:
        if not self.cbw_timeout_s:
            await self._copy(area)
            return
        copying = asyncio.get_running_loop().create_task(self._copy(area))
        copying.add_done_callback(_look_at_result)
        try:
            await asyncio.wait({copying}, timeout=self.cbw_timeout_s)
        finally:
            if not copying.done():
                self._let_outlive(copying)
        if not copying.done():
            raise TimeoutError(f"no copy within {self.cbw_timeout_s:g} s (cbw-timeout)")
        copying.result()

    def _let_outlive(self, copying: "asyncio.Task[None]") -> None:
        """The write waits no longer, but the copy's I/O cannot be taken back: it goes on in flight."""
        if len(self._late_copies) >= LATE_COPIES_MAX:
            # One that only waits for the others ends at once. I/O of its own ends first, for nothing.
            copying.cancel()
        self._late_copies.add(copying)
        copying.add_done_callback(self._late_copies.discard)

    async def _copy(self, area: Extent) -> None:
        if area.length >= ASK_ZEROES_BYTES_MIN:
            await self._copy_known_zeroes(area)
        await self.block_copy.copy(area)

    async def _copy_known_zeroes(self, area: Extent) -> None:
        area = self.block_copy.clusters(area)
        position = area.offset
        while position < area.end and self.block_copy.dirty.any(position, area.end - position):
            try:
                known = await self.child.block_status(position, area.end - position)
            except OSError:
                # Reading meets the error again, if it matters, and says whose it is.
                return
            for extent in known:
                if extent.flags & Allocation.ZERO:
                    for piece in self._whole_clusters(position, extent.length).split(ZEROES_BYTES_MAX):
                        await self.block_copy.copy_zeroes(piece)
                position += extent.length

    def _whole_clusters(self, offset: int, length: int) -> Extent:
        return Extent(offset, length).aligned_in(self.block_copy.cluster_bytes, self.size)

    def _settle_failure(self, area: Extent, error: CopyError | TimeoutError, code: int) -> None:
        """Apply the policy: raise what the client gets, or break the point in time."""
        if self.broken is not None:
            return
        if self.on_cbw_error is OnCbwError.BREAK_SNAPSHOT:
            self.break_snapshot(DeviceError(code, str(error)))
            return
        logger.error("client write at %d refused to keep %s whole: %s", area.offset, self.title, error)
        raise DeviceError(code, f"{self.title} could not save the old contents: {error}") from error


def _look_at_result(task: "asyncio.Task[None]") -> None:
    """A failure that nobody waits for any more (too late, or the write was cancelled) is no bug."""
    if not task.cancelled():
        task.exception()
