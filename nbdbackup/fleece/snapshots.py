"""Snapshots: taking points in time, of one node or of several at the same instant.

    client -> Node "disk" -> CopyBeforeWrite ------------> file
                                  | saved clusters          ^ frozen reads
                                  v                         |
                               Scratch <- SnapshotAccess ---' <- Node "disk@s1" <- client

Several snapshots of a node are several filters on it; the newest is on top. Each stands for
itself and can be dropped in any order.

A snapshot is made first, which takes time on a large disk, and put in place at the instant.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.node import Node, drained
from nbdbackup.extents import Extent
from nbdbackup.fleece.block_copy import BlockCopy
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdbackup.fleece.scratch import Scratch
from nbdbackup.fleece.snapshot_access import SnapshotAccess
from nbdbackup.fleece.snapshot_file import SnapshotFile

INLINE_CLUSTERS_MAX = 1 << 22
"""The maps of a disk with more clusters are made in a thread."""


class SnapshotPlan(msgspec.Struct, frozen=True):
    """What a snapshot will be: of `node`, called `name`, with `scratch` open and ready."""

    node: Node
    name: str
    scratch: Scratch
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout_s: float = 0
    file: SnapshotFile | None = None
    """Has the maps of a snapshot that outlives the server: as it was left, or as new."""

    @property
    def export_name(self) -> str:
        """`NODE@NAME`."""
        return f"{self.node.name}@{self.name}"


@dataclass(slots=True, eq=False)
class Snapshot:
    """One point in time, live from `insert` on; `view` is the node to read it from."""

    plan: SnapshotPlan
    block_copy: BlockCopy
    filter: CopyBeforeWrite
    access: SnapshotAccess
    view: Node
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    _scratch_closed: bool = field(default=False, init=False, repr=False)

    @property
    def export_name(self) -> str:
        """`NODE@NAME`."""
        return self.plan.export_name

    @property
    def broken(self) -> OSError | None:
        """Why it can't be read any more, or None."""
        return self.filter.broken

    def insert(self) -> None:
        """This is the instant. The node is drained; cannot fail."""
        self.filter.relink(self.plan.node.child)
        self.plan.node.push(self.filter)
        self.created = datetime.now(UTC)

    def take_out(self) -> None:
        """Undo `insert`, before the node goes on."""
        self.plan.node.remove(self.filter)

    async def drop(self) -> None:
        """Take the filter out, wait for everything that still uses the snapshot, free scratch.

        Whoever reads the view afterwards, or is waiting in a read, gets an error. Goes on where
        it stopped when it is called again after a cancellation.
        """
        node = self.plan.node
        self.access.end()
        # One that was never put in place must not wait for the clients' writes.
        if self.filter in node.filters:
            async with drained(node):
                if self.filter in node.filters:
                    node.remove(self.filter)
        async with drained(self.view):
            pass
        await self.close()

    async def free_scratch(self) -> None:
        """Give scratch back, as nobody will read it again: the snapshot is broken.

        Waits for reads and copies that are under way. The view goes on to fail with the cause. What reads
        `access` otherwise than through the view must have ended.
        """
        assert self.broken is not None
        # No copy begins from now on, and none that fails is repeated.
        self.block_copy.discard(Extent(0, self.block_copy.size))
        async with drained(self.view):
            self.access.give_up_scratch()
            await self._close_scratch()

    async def close(self) -> None:
        """Free what a snapshot holds that is not in place any more, or never was."""
        await self._close_scratch()
        await self.block_copy.close()

    async def _close_scratch(self) -> None:
        await self.filter.wait_copies_ended()
        await self.block_copy.in_flight.wait_no_conflict(Extent(0, self.block_copy.size))
        if not self._scratch_closed:
            self._scratch_closed = True
            await self.plan.scratch.close()


async def make_snapshot(plan: SnapshotPlan) -> Snapshot:
    """Everything that can be done before the instant. The plan's scratch is the snapshot's from now on."""
    if plan.node.size // plan.scratch.cluster_bytes <= INLINE_CLUSTERS_MAX:
        return make_snapshot_now(plan)
    executor = IoExecutor("maps", threads_max=1)
    try:
        return await executor.run(make_snapshot_now, plan)
    finally:
        executor.shutdown()


async def take_snapshots(plans: Sequence[SnapshotPlan]) -> list[Snapshot]:
    """Take one snapshot per plan, all at one instant at which no client write is in flight.

    Invariant 3. Cannot fail half way: whatever can fail (scratch) was done for the plans.
    """
    snapshots = [await make_snapshot(plan) for plan in plans]
    async with drained(*(plan.node for plan in plans)):
        for snapshot in snapshots:
            snapshot.insert()
    return snapshots


def make_snapshot_now(plan: SnapshotPlan) -> Snapshot:
    """As `make_snapshot`, where nobody can wait."""
    below = plan.node.child
    block_copy = BlockCopy(
        below,
        plan.scratch,
        plan.scratch.cluster_bytes,
        target_zeroed=True,
        all_wanted=plan.file is None,
    )
    if plan.file is not None:
        block_copy.adopt(plan.file.access(), plan.file.done())
    filter_ = CopyBeforeWrite(
        below,
        block_copy,
        title=f"snapshot {plan.export_name}",
        on_cbw_error=plan.on_cbw_error,
        cbw_timeout_s=plan.cbw_timeout_s,
    )
    access = SnapshotAccess(filter_, plan.scratch)
    return Snapshot(plan, block_copy, filter_, access, Node(plan.export_name, access, read_only=True))
