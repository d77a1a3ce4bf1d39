"""KeptBackup: a backup job that outlives its process, at the same point in time.

Its maps are in a file: those of a direct job are its own, those of a fleecing one its snapshot's (`keeping`
has why that is enough). Invariant 1 holds for them at any moment (`fleece/block_copy.py`), so a later process
that puts the same filter in place, with the same maps, before anybody writes to the node, can go on.

    start     kept on disk, not live; then, at the instant and while the node is drained: filter, live
    success   all copied (fleecing: and flushed, and given back); filter out; target complete; bitmap ended;
              withdrawn; removed
    failure   withdrawn; filter out; bitmap ended; target discarded; removed
    leaving   workers stopped; when no client is there any more: target flushed; filter out; saved

The filter goes before the job is withdrawn only when nothing is left to be copied: then nobody needs it.

Out of reach of its target's server the job waits for a user, whatever its error policy; resumed, it connects
anew, and copies once more what the server may not have flushed.
"""

import asyncio
import errno
from collections.abc import Callable
from contextlib import suppress

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.block.absent import AbsentDevice
from nbdbackup.block.node import Node
from nbdbackup.crash_points import reach
from nbdbackup.errors import CopyError, NbdBackupError, Side, UnreachableError
from nbdbackup.extents import Extent
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite
from nbdbackup.fleece.snapshots import Snapshot
from nbdbackup.job.backup import BackupJob, BackupOptions
from nbdbackup.job.error_policy import ErrorAction
from nbdbackup.job.keeping import GivingBack, Keeper
from nbdbackup.job.states import JobStatus
from nbdbackup.job.sync import FrozenBitmap, SyncMode
from nbdbackup.job.target import RemoteTarget, Target

FLUSH_TO_LEAVE_S_MAX = 5.0
"""A target that takes longer for a flush when the process ends is written to again."""

_AT_WORK = frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.WAITING, JobStatus.PENDING})


class KeptBackup(BackupJob):
    """A backup that `keeper` keeps on disk."""

    def __init__(
        self,
        job_id: str,
        node: Node,
        target: Target,
        options: BackupOptions,
        keeper: Keeper,
        make_maps: Callable[[], tuple[ClusterBitmap, ClusterBitmap]] | None,
    ) -> None:
        """`make_maps` gives access and done of a direct job, as they stand; None: it is a fleecing one."""
        super().__init__(job_id, node, target, options)
        self._keeper = keeper
        if make_maps is not None:
            self._copy.adopt(*make_maps())
        # Changing while running.
        self._giving_back: GivingBack | None = None
        self._reaching = asyncio.Lock()
        self._is_target_lost = isinstance(target.device, AbsentDevice)

    # Keeping the point in time.

    def _push_filter(self) -> CopyBeforeWrite:
        pushed = super()._push_filter()
        pushed.notes_of_breaking.append(self._keeper.note_broken)
        return pushed

    def _use_snapshot(self, snapshot: Snapshot) -> None:
        super()._use_snapshot(snapshot)
        snapshot.filter.notes_of_breaking.append(self._keeper.note_broken)
        self._giving_back = GivingBack(snapshot.access, self.target, snapshot.plan.scratch.bytes_max)

    def hold_direct_again(self, frozen: FrozenBitmap | None) -> None:
        """As `hold_direct`, where an earlier process stopped; nobody has written to the node since."""
        self._filter = self._push_filter()
        self._go_on(frozen, self._copy.access.total_bytes)

    def hold_fleecing_again(self, snapshot: Snapshot, frozen: FrozenBitmap | None) -> None:
        """As `hold_fleecing`: copy what `snapshot`, which is in place again, still offers."""
        self._copy.want(snapshot.block_copy.access.copy())
        self._use_snapshot(snapshot)
        total = self._copy.dirty.total_bytes
        if self.options.sync is SyncMode.FULL:
            total = self._copy.size
        elif frozen is not None:
            total = max(total, frozen.bitmap.clusters(self.options.cluster_bytes).total_bytes)
        self._go_on(frozen, total)

    def _go_on(self, frozen: FrozenBitmap | None, total: int) -> None:
        self._frozen = frozen
        self.progress_set_total(total)
        self.progress_add(total - self._copy.dirty.total_bytes)

    # Copying.

    async def run(self) -> None:
        await super().run()
        while self._giving_back is not None:
            # Also what turned out to be zero: all is copied.
            self._giving_back.note(Extent(0, self._copy.size))
            await self._persist(self._giving_back.settle)
            if not len(self._copy.dirty):
                return
            # The target was lost with what it had not flushed.
            await super().run()

    async def _give_back(self, run: Extent) -> None:
        if self._giving_back is None:
            return
        self._giving_back.note(run)
        if self._giving_back.is_due:
            await self._persist(self._giving_back.settle)

    def _note_zeroes(self, area: Extent) -> None:
        whole = area.aligned_in(self._copy.cluster_bytes, self._copy.size)
        if self._giving_back is not None and whole.length:
            self._giving_back.note(whole)

    # Losing the target, and reaching it again.

    def action_for(self, error: CopyError) -> ErrorAction:
        # A server that is gone has refused nothing: the same clusters can still be copied, later.
        is_gone = error.side is Side.TARGET and isinstance(error.cause, UnreachableError)
        if not is_gone or not isinstance(self.target, RemoteTarget):
            return super().action_for(error)
        self._is_target_lost = True
        return ErrorAction.STOP

    async def _reach_target(self) -> None:
        if not self._is_target_lost:
            return
        assert isinstance(self.target, RemoteTarget)
        assert self._giving_back is not None
        async with self._reaching, self._giving_back.lock:
            if not self._is_target_lost:
                return
            # From here on no copy begins that uses the old connection; then those that do come to their ends.
            self._copy.target = AbsentDevice(str(self.target.device), self._copy.size)
            await self._copy.in_flight.wait_no_conflict(Extent(0, self._copy.size))
            try:
                await self.target.reconnect()
            except (NbdBackupError, OSError) as error:
                cause = UnreachableError(errno.EIO, str(error))
                raise CopyError(Side.TARGET, 0, self._copy.size, cause) from error
            self._copy_again()
            self._giving_back.forget()
            self._copy.target = self.target.device
            self._is_target_lost = False

    def _copy_again(self) -> None:
        """Want all that was not given back: nobody knows whether what was copied of it was flushed."""
        assert self._snapshot is not None
        before = self._copy.dirty.total_bytes
        given_back = self._copy.access.minus(self._snapshot.block_copy.access)
        self._copy.want_rest(self._copy.access.minus(given_back))
        self.progress_add(before - self._copy.dirty.total_bytes)

    # The end of the job.

    async def abort(self) -> None:
        self._keeper.withdraw()
        reach("job.abort.withdrawn")
        await super().abort()

    async def clean(self) -> None:
        self._keeper.withdraw()
        await super().clean()
        await self._keeper.remove()

    async def give_up(self) -> None:
        self._keeper.withdraw()
        await super().give_up()

    # The end of the process.

    @property
    def is_kept(self) -> bool:
        return True

    @property
    def can_be_left(self) -> bool:
        is_over = self.is_failing or self.is_committing or self.is_left
        return self.status in _AT_WORK and not is_over

    async def put_by(self) -> None:
        """The job was left, and nobody uses the node any more: save everything for a later process."""
        assert self.is_left
        reach("job.leave.stopped")
        if self._giving_back is not None and not self._is_target_lost:
            with suppress(CopyError, TimeoutError):
                async with asyncio.timeout(FLUSH_TO_LEAVE_S_MAX):
                    await self._giving_back.settle()
        await self._let_go()
        if not isinstance(self.target, RemoteTarget):
            try:
                await self.target.device.flush()
            except OSError as error:
                # Nobody knows what is in it, and done says that all of it is.
                self._keeper.note_broken(error)
        reach("job.leave.flushed")
        await self._copy.close()
        await self.target.close()
        await self._keeper.leave()
        reach("job.leave.saved")
