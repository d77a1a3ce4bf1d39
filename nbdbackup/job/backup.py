"""The backup job: copies one point in time of a node to a target, as its sync mode says (job/sync.py).

Two shapes, one engine. In both, the job drives a BlockCopy over every cluster that is wanted.

- direct, the seed's: a copy-before-write filter on the node shares the job's BlockCopy. What a
  client is about to overwrite goes straight to the target, and counts as the job's progress.
- fleecing: a snapshot keeps old clusters in scratch; the job's BlockCopy reads the snapshot's
  view, and gives scratch back as it goes. A slow target never slows a client.

With sync=none, which is always direct, the clients' writes do all the copying.

A job that outlives its process is a KeptBackup (job/kept_backup.py).

Invariant 5: a job that succeeds has copied every cluster that was wanted. Workers take each once, in
order; the sweep at the end finds any whose copy failed in somebody else's hands.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.block.device import BlockDevice
from nbdbackup.block.node import Node, drained
from nbdbackup.crash_points import reach
from nbdbackup.errors import ConflictError, CopyError, Side, UsageError
from nbdbackup.extents import Allocation, Extent
from nbdbackup.fleece.block_copy import CHUNK_BYTES_MAX, CLUSTER_BYTES_DEFAULT, BlockCopy
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdbackup.fleece.snapshots import Snapshot
from nbdbackup.job.error_policy import REPORT_ERRORS, ErrorPolicies
from nbdbackup.job.job import Job
from nbdbackup.job.sync import FrozenBitmap, SyncMode
from nbdbackup.job.target import Target
from nbdbackup.job.transaction import JobTransaction

T = TypeVar("T")

WORKERS_DEFAULT = 8
WORKERS_MAX = 64
ZEROES_BYTES_MAX = 32 << 20
"""Zeroes written at once to a target that holds old bytes: a client write to that range waits for them."""
AHEAD_BYTES_MAX = 1 << 36
"""The plan looks so far ahead at once; on a disk of many TiB, looking to the end takes too long."""


class BackupOptions(msgspec.Struct, frozen=True):
    """What can be chosen; `speed` in bytes per second (0: no limit)."""

    sync: SyncMode = SyncMode.FULL
    speed: int = 0
    workers: int = WORKERS_DEFAULT
    chunk_bytes_max: int = CHUNK_BYTES_MAX
    cluster_bytes: int = CLUSTER_BYTES_DEFAULT
    use_copy_range: bool = True
    discard_source: bool = False
    """Trim in the source, which must be nobody's data, what was copied."""
    policies: ErrorPolicies = REPORT_ERRORS
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout_s: float = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True


class BackupJob(Job):
    """One backup of `node` to `target`; `hold_direct` or `hold_fleecing` chooses the shape.

    Making one takes memory and time on a large disk; holding the point in time, while clients wait,
    does not.
    """

    type = "backup"

    def __init__(
        self,
        job_id: str,
        node: Node,
        target: Target,
        options: BackupOptions,
        clock: Callable[[], float] = time.monotonic,
        transaction: JobTransaction | None = None,
    ) -> None:
        super().__init__(
            job_id,
            node.name,
            speed=options.speed,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
            policies=options.policies,
            transaction=transaction,
            clock=clock,
        )
        self.node = node
        self.target = target
        self.options = options
        self.progress_set_total(node.size)
        self._copy = BlockCopy(
            node.child,
            target.device,
            options.cluster_bytes,
            target_zeroed=target.zeroed,
            use_copy_range=options.use_copy_range,
            chunk_bytes_max=options.chunk_bytes_max,
            all_wanted=not options.sync.copies_dirty,
            skip_unallocated=options.sync is SyncMode.TOP,
            on_copied=self._note_copied,
            on_skipped=self._note_skipped,
        )
        self._frozen: FrozenBitmap | None = None
        self._filter: CopyBeforeWrite | None = None
        self._snapshot: Snapshot | None = None
        self._steps: AsyncGenerator[Extent, None]
        self._steps_lock = asyncio.Lock()
        self._broken = asyncio.Event()

    # Keeping the point in time: one of these, once, when the backup is accepted.

    def expect(self, clusters: ClusterBitmap, snapshot: Snapshot | None) -> None:
        """`clusters` will be wanted, or most of them, of the node or of `snapshot`: get ready for that."""
        self._copy.want(clusters)
        if snapshot is not None:
            snapshot.block_copy.want(clusters.copy())

    def hold_direct(
        self, frozen: FrozenBitmap | None = None, unexpected: Sequence[Extent] | None = None
    ) -> None:
        """Put a filter on the node that saves straight to the target. Only while it is drained.

        `frozen` is the bitmap of the backup, the job's from now on. `unexpected` is what is wanted beside
        what was expected; None: `frozen` says what is.
        """
        self._want(frozen, self.node.child, unexpected)
        self._filter = self._push_filter()

    def _push_filter(self) -> CopyBeforeWrite:
        below = self._copy.source = self.node.child
        pushed = CopyBeforeWrite(
            below,
            self._copy,
            title=f"backup {self.id} of {self.node}",
            on_cbw_error=self.options.on_cbw_error,
            cbw_timeout_s=self.options.cbw_timeout_s,
            on_broken=lambda cause: self._broken.set(),
        )
        self.node.push(pushed)
        return pushed

    def hold_fleecing(
        self,
        snapshot: Snapshot,
        frozen: FrozenBitmap | None = None,
        unexpected: Sequence[Extent] | None = None,
    ) -> None:
        """Read `snapshot`, which is the job's from now on, and give its scratch back while copying.

        It was taken at this instant, or everything is wanted: from now on it saves only what the job
        will read.
        """
        assert self.options.sync is not SyncMode.NONE
        self._want(frozen, snapshot.access, unexpected)
        self._use_snapshot(snapshot)
        if self.options.sync.copies_dirty and unexpected is None:
            snapshot.block_copy.want(self._copy.dirty.copy())
        for area in unexpected or ():
            snapshot.block_copy.want_more(area)

    def _use_snapshot(self, snapshot: Snapshot) -> None:
        self._copy.source = snapshot.access
        self._snapshot = snapshot
        snapshot.block_copy.skip_unallocated = self._copy.skip_unallocated

    def let_go(self) -> None:
        """Undo `hold_direct` or `hold_fleecing` before the job is started, while the node is still drained.

        The snapshot is left to who took it.
        """
        if self._filter is not None:
            self.node.remove(self._filter)
            self._filter = None
        if self._frozen is not None:
            self._frozen.thaw()
            self._frozen = None

    def _want(
        self, frozen: FrozenBitmap | None, source: BlockDevice, unexpected: Sequence[Extent] | None
    ) -> None:
        self._frozen = frozen
        self._copy.source = source
        if not self.options.sync.copies_dirty:
            return
        assert frozen is not None
        if unexpected is None:
            self._copy.want(frozen.bitmap.clusters(self.options.cluster_bytes))
        for area in unexpected or ():
            self._copy.want_more(area)
        self.progress_set_total(self._copy.dirty.total_bytes)

    # The job.

    async def run(self) -> None:
        self._steps = self._plan()
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(self._watch_broken())
                if self.options.sync is SyncMode.NONE:
                    await self.wait_cancelled()
                await asyncio.wait(
                    [group.create_task(self._work_steps()) for _ in range(self.options.workers)]
                )
                await self._sweep()
                watcher.cancel()
        finally:
            # Not before the workers have ended: one may be in it.
            await self._steps.aclose()
        self._check_whole()
        reach("job.finish.copied")

    async def prepare(self) -> None:
        self._check_whole()
        await self._let_go()
        await self._settle_source()
        reach("job.finish.let-go")
        await self.target.complete()
        reach("job.finish.complete")

    async def commit(self) -> None:
        if self._frozen is not None:
            self._frozen.succeed()
        reach("job.finish.committed")

    async def abort(self) -> None:
        try:
            await self._let_go()
        finally:
            await self._settle_bitmap_after_failure()
        reach("job.abort.let-go")
        await self.target.discard()
        reach("job.abort.discarded")

    async def clean(self) -> None:
        await self._copy.close()
        await self.target.close()

    async def give_up(self) -> None:
        """The job was made, and will not be started: remove what only a backup is good for."""
        await self.target.discard()
        await self.clean()

    async def _settle_source(self) -> None:
        """If the bitmap outlives a loss of power: what was copied is on the source's disk too.

        Else the source could lose it, and differ from the backup where the bitmap is clean.
        """
        if self._frozen is not None and self._frozen.durable:
            await self.node.flush()

    async def _settle_bitmap_after_failure(self) -> None:
        if self._frozen is None:
            return
        is_kept = self._frozen.counts_what_was_copied and self.target.outlives_failure
        if is_kept:
            try:
                await self._settle_source()
                await self.target.device.flush()
            except OSError:
                # Nobody knows what is there.
                is_kept = False
        self._frozen.fail(self._copy.dirty if is_kept else None)

    async def _work_steps(self) -> None:
        with self.worker():
            await self.pause_point()
            while (run := await self._next_step()) is not None:
                await self._copy_step(run)
                await self._give_back(run)

    async def _give_back(self, run: Extent) -> None:
        """`run` was copied: give up in the source what the backup alone needed."""
        if self._snapshot is not None or self.options.discard_source:
            await self._copy.source.trim(run.offset, run.length)

    async def _sweep(self) -> None:
        everything = Extent(0, self._copy.size)
        while True:
            run = self._copy.dirty.next_set(everything, self._copy.chunk_bytes_max)
            if run is not None:
                await self._copy_step(run)
                continue
            conflict = self._copy.in_flight.find_conflict(everything)
            if conflict is None:
                return
            await conflict.wait_ended()

    async def _copy_step(self, run: Extent) -> None:
        async def copy() -> None:
            await self.throttle(run.length)
            try:
                await self._copy.copy(run)
            finally:
                # What was really copied, by us or for a client, is accounted as it happens.
                self.account(-run.length)

        await self._persist(copy)

    async def _persist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Do `step` until it succeeds, or the error policy says that the job has failed.

        Raises:
            CopyError: it has. ConflictError: the point in time is lost.
        """
        failures = 0
        while True:
            try:
                await self._reach_target()
                return await step()
            except CopyError as error:
                failure = error
            if self._snapshot is not None and self._snapshot.broken is not None:
                # No policy brings it back.
                raise failure
            self._check_whole()
            failures += 1
            await self.settle_error(failure, failures)

    async def _reach_target(self) -> None:
        """Before each step. Raises CopyError if it would fail anyway."""

    # What is copied, in which order.

    async def _next_step(self) -> Extent | None:
        with self.waiting_for_worker():
            await self._steps_lock.acquire()
        try:
            return await anext(self._steps, None)
        finally:
            self._steps_lock.release()

    async def _plan(self) -> AsyncGenerator[Extent, None]:
        """Every run of clusters that has to be read, in order; known zeroes are copied on the way."""
        position, size = 0, self._copy.size
        while position < size:
            ahead = self._copy.dirty.next_set(Extent(position, size - position), AHEAD_BYTES_MAX)
            if ahead is None:
                return
            known = await self._persist(lambda area=ahead: self._look_ahead(area))  # type: ignore[misc]
            rest = known.aligned_out(self._copy.cluster_bytes, size)
            while rest.length:
                run = self._copy.dirty.next_set(rest, self._copy.chunk_bytes_max)
                if run is None:
                    break
                yield run
                rest = Extent(run.end, max(0, rest.end - run.end))
            position = max(known.end, rest.offset)

    async def _look_ahead(self, area: Extent) -> Extent:
        """Deal with what needs no reading at the beginning of `area`; returns how much of it is known."""
        known, is_wanted = await self._copy.look_ahead(area)
        if not is_wanted:
            self._copy.skip(known)
            return known
        if known.length <= self._copy.chunk_bytes_max:
            # One read tells whether it is zero, and asking takes as long.
            return known
        return await self._copy_known_zeroes(known)

    async def _copy_known_zeroes(self, area: Extent) -> Extent:
        """Ask what the source knows of `area`, copy its zeroes; returns the range it knew of."""
        try:
            known = await self._copy.source.block_status(area.offset, area.length)
        except OSError as error:
            raise CopyError(Side.SOURCE, area.offset, area.length, error) from error
        position = area.offset
        for extent in known:
            if extent.flags & Allocation.ZERO:
                await self._copy_zeroes(Extent(position, extent.length))
                self._note_zeroes(Extent(position, extent.length))
            position += extent.length
        return Extent(area.offset, position - area.offset)

    async def _copy_zeroes(self, area: Extent) -> None:
        if not self.target.zeroed:
            whole = area.aligned_in(self._copy.cluster_bytes, self._copy.size)
            for piece in whole.split(max(ZEROES_BYTES_MAX, self._copy.cluster_bytes)):
                await self._copy.copy_zeroes(piece)
            return
        before = self.current_progress
        await self._copy.copy_zeroes(area)
        # Nothing was read or written: a hole of 1 TiB must not hold up what follows it for days.
        self.account(before - self.current_progress)

    def _note_zeroes(self, area: Extent) -> None:
        """What was to be copied of the whole clusters of `area` was zero, and is so in the target."""

    def _note_copied(self, length: int) -> None:
        self.progress_add(length)
        self.account(length)

    def _note_skipped(self, length: int) -> None:
        self.progress_set_total(self.total_progress - length)

    # For those who read the target while the job goes on (sync=none).

    async def checkpoint(self) -> None:
        """The point in time is now: everything that clients overwrite from now on is copied again.

        Raises:
            UsageError: the job has another sync mode. ConflictError: it is over.
        """
        if self.options.sync is not SyncMode.NONE:
            raise UsageError("The backup job only supports block checkpoint in sync=none mode")
        async with drained(self.node):
            if self._filter is None or self.is_failing:
                raise ConflictError(f"Job '{self.id}' is coming to its end: there is no checkpoint to be had")
            await self.wait_overlapping_cow(Extent(0, self._copy.size))
            self._copy.want_again()
            self.progress_set_total(self.current_progress + self._copy.size)

    async def wait_overlapping_cow(self, area: Extent) -> None:
        """Return at a moment when nothing is being copied to the target in the clusters of `area`."""
        await self._copy.in_flight.wait_no_conflict(self._copy.clusters(area))

    @asynccontextmanager
    async def hold(self, area: Extent) -> AsyncIterator[None]:
        """Inside, nothing is copied to the target in the clusters of `area`; client writes there wait."""
        area = self._copy.clusters(area)
        with self._copy.holds.hold(area):
            # Held first: a client that writes there all the time must not keep us waiting.
            await self.wait_overlapping_cow(area)
            yield

    # The point in time may be lost (break-snapshot); then the job has failed.

    async def _watch_broken(self) -> None:
        await self._broken.wait()
        self._check_whole()

    def _check_whole(self) -> None:
        cause = self._filter.broken if self._filter is not None else None
        if cause is not None:
            raise ConflictError(f"the point in time was lost: {cause.strerror or cause}")

    async def _let_go(self) -> None:
        """Stop keeping the point in time; client writes are no longer held up by this job."""
        # Forgotten only when gone: a job that is cancelled meanwhile comes here again.
        if self._snapshot is not None:
            await self._snapshot.drop()
            self._snapshot = None
        if self._filter is not None:
            async with drained(self.node):
                if self._filter in self.node.filters:
                    self.node.remove(self._filter)
            await self._filter.wait_copies_ended()
            self._filter = None
