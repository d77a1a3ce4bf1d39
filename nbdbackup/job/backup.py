"""The backup job: copies one point in time of a node to a target, all of it (sync=full).

Two shapes, one engine. In both, the job drives a BlockCopy over every cluster.

- direct, the seed's: a copy-before-write filter on the node shares the job's BlockCopy. What a
  client is about to overwrite goes straight to the target, and counts as the job's progress.
- fleecing: a snapshot keeps old clusters in scratch; the job's BlockCopy reads the snapshot's
  view, and gives scratch back as it goes. A slow target never slows a client.

Invariant 5: a job that succeeds has copied every cluster. Workers take each once, in order; the
sweep at the end finds any whose copy failed in somebody else's hands.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.node import Node, drained
from nbdbackup.errors import ConflictError, CopyError, Side
from nbdbackup.extents import Allocation, Extent
from nbdbackup.fleece.block_copy import CHUNK_BYTES_MAX, CLUSTER_BYTES_DEFAULT, BlockCopy
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdbackup.fleece.snapshots import Snapshot
from nbdbackup.job.job import Job
from nbdbackup.job.target import Target

WORKERS_DEFAULT = 8
WORKERS_MAX = 64
ZEROES_BYTES_MAX = 32 << 20
"""Zeroes written at once to a target that holds old bytes: a client write to that range waits for them."""


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """What can be chosen; `speed` in bytes per second (0: no limit)."""

    speed: int = 0
    workers: int = WORKERS_DEFAULT
    chunk_bytes_max: int = CHUNK_BYTES_MAX
    cluster_bytes: int = CLUSTER_BYTES_DEFAULT
    use_copy_range: bool = True
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout_s: float = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True


class BackupJob(Job):
    """One backup of `node` to `target`; `hold_direct` or `hold_fleecing` chooses the shape."""

    type = "backup"

    def __init__(
        self,
        job_id: str,
        node: Node,
        target: Target,
        options: BackupOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            job_id,
            node.name,
            speed=options.speed,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
            clock=clock,
        )
        self.node = node
        self.target = target
        self.options = options
        self.progress_set_total(node.size)
        self._copy: BlockCopy
        self._filter: CopyBeforeWrite | None = None
        self._snapshot: Snapshot | None = None
        self._steps: AsyncGenerator[Extent, None]
        self._steps_lock = asyncio.Lock()
        self._broken = asyncio.Event()

    # Keeping the point in time: one of these, once, when the backup is accepted.

    def hold_direct(self) -> None:
        """Put a filter on the node that saves straight to the target. Only while it is drained."""
        below = self.node.child
        self._copy = self._make_copy(below)
        self._filter = CopyBeforeWrite(
            below,
            self._copy,
            title=f"backup {self.id} of {self.node}",
            on_cbw_error=self.options.on_cbw_error,
            cbw_timeout_s=self.options.cbw_timeout_s,
            on_broken=lambda cause: self._broken.set(),
        )
        self.node.push(self._filter)

    def hold_fleecing(self, snapshot: Snapshot) -> None:
        """Read `snapshot`, which is the job's from now on, and give its scratch back while copying."""
        self._snapshot = snapshot
        self._copy = self._make_copy(snapshot.access)

    def _make_copy(self, source: BlockDevice) -> BlockCopy:
        return BlockCopy(
            source,
            self.target.device,
            self.options.cluster_bytes,
            target_zeroed=self.target.zeroed,
            use_copy_range=self.options.use_copy_range,
            chunk_bytes_max=self.options.chunk_bytes_max,
            on_copied=self._note_copied,
        )

    # The job.

    async def run(self) -> None:
        self._steps = self._plan()
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(self._watch_broken())
                await asyncio.wait(
                    [group.create_task(self._work_steps()) for _ in range(self.options.workers)]
                )
                await self._copy.copy(Extent(0, self._copy.size))
                watcher.cancel()
        finally:
            await self._steps.aclose()
        self._check_whole()

    async def prepare(self) -> None:
        self._check_whole()
        await self._let_go()
        await self.target.complete()

    async def abort(self) -> None:
        await self._let_go()
        await self.target.discard()

    async def clean(self) -> None:
        await self._copy.close()
        await self.target.close()

    async def _work_steps(self) -> None:
        with self.worker():
            while (run := await self._next_step()) is not None:
                await self.throttle(run.length)
                try:
                    await self._copy.copy(run)
                finally:
                    # What was really copied, by us or for a client, is accounted as it happens.
                    self.account(-run.length)
                if self._snapshot is not None:
                    await self._snapshot.access.trim(run.offset, run.length)

    async def _next_step(self) -> Extent | None:
        async with self._steps_lock:
            return await anext(self._steps, None)

    async def _plan(self) -> AsyncGenerator[Extent, None]:
        """Every run of clusters that has to be read, in order; known zeroes are copied on the way."""
        position, size = 0, self._copy.size
        while position < size:
            window = await self._copy_known_zeroes(position)
            rest = window.aligned_out(self._copy.cluster_bytes, size)
            while rest.length:
                run = self._copy.dirty.next_set(rest, self._copy.chunk_bytes_max)
                if run is None:
                    break
                yield run
                rest = Extent(run.end, max(0, rest.end - run.end))
            position = max(window.end, rest.offset)

    async def _copy_known_zeroes(self, offset: int) -> Extent:
        """Ask what the source knows from `offset` on, copy its zeroes; returns the range it knew of."""
        try:
            known = await self._copy.source.block_status(offset, self._copy.size - offset)
        except OSError as error:
            raise CopyError(Side.SOURCE, offset, self._copy.size - offset, error) from error
        position = offset
        for extent in known:
            if extent.flags & Allocation.ZERO:
                await self._copy_zeroes(Extent(position, extent.length))
            position += extent.length
        return Extent(offset, position - offset)

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

    def _note_copied(self, length: int) -> None:
        self.progress_add(length)
        self.account(length)

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
