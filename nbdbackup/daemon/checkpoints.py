"""Checkpoints as users make and delete them: switch of bitmaps and point in time in one step.

`create` makes, at one instant of all its nodes, a snapshot NODE@NAME for the backup of that instant,
and a checkpoint NAME for the next one: a new bitmap begins to record and the one before stops. The
snapshot shows the latter as it was, which is what an incremental puller has to read.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from weakref import WeakKeyDictionary

from nbdbackup.bitmap.checkpoints import Checkpoint, CheckpointChain
from nbdbackup.bitmap.dirty import DirtyBitmap, SavedBits
from nbdbackup.bitmap.node_bitmaps import check_usable
from nbdbackup.block.node import Node
from nbdbackup.daemon.bitmaps import REMOVER, AddBitmap, BitmapAction, Bitmaps
from nbdbackup.daemon.snapshots import Snapshots
from nbdbackup.daemon.transaction import run_transaction
from nbdbackup.errors import UsageError
from nbdbackup.monitor.services_bitmaps import BitmapAdd
from nbdbackup.monitor.services_snapshots import CheckpointInfo, SnapshotInfo, SnapshotOptions


class Checkpoints:
    """Implements the monitor's `CheckpointService`."""

    def __init__(self, bitmaps: Bitmaps, snapshots: Snapshots) -> None:
        self._bitmaps = bitmaps
        self._snapshots = snapshots
        self._chains: WeakKeyDictionary[Node, CheckpointChain] = WeakKeyDictionary()

    def chain(self, node: Node) -> CheckpointChain:
        """The checkpoints of `node`."""
        return self._chains.setdefault(node, CheckpointChain())

    async def create(self, nodes: Sequence[str], options: SnapshotOptions) -> Sequence[SnapshotInfo]:
        """A checkpoint of all `nodes` at one instant, and a snapshot of the same; all of them or none."""
        if options.name is None:
            raise UsageError("a checkpoint needs a name")
        taking = self._snapshots.actions(nodes, options)
        switching = [TakeCheckpoint(self, self._bitmaps, node, options.name) for node in nodes]
        await run_transaction([*taking, *switching])
        await self._snapshots.sync([action.snapshot for action in taking])
        return [self._snapshots.info(action.snapshot) for action in taking]

    async def delete(self, nodes: Sequence[str], name: str) -> Sequence[CheckpointInfo]:
        """Forget the checkpoint `name` of `nodes`, or of all that have it; those that there were."""
        for node in nodes:
            self._bitmaps.graph.get(node)
        wanted = nodes or [node.name for node in self._bitmaps.graph]
        gone = [info for info in self.list() if info.name == name and info.node in wanted]
        await run_transaction(
            [DeleteCheckpoint(self, self._bitmaps, info.node, name) for info in gone],
        )
        return gone

    def list(self) -> Sequence[CheckpointInfo]:
        """Every checkpoint, the oldest of each node first."""
        return [
            self._info(node, checkpoint) for node in self._bitmaps.graph for checkpoint in self.chain(node)
        ]

    def _info(self, node: Node, checkpoint: Checkpoint) -> CheckpointInfo:
        parent, bitmap = self.chain(node).parent(checkpoint), checkpoint.bitmap
        return CheckpointInfo(
            node=node.name,
            name=checkpoint.name,
            parent=None if parent is None else parent.name,
            created=checkpoint.created,
            dirty=(bitmap.count + bitmap.successor_count) * bitmap.granularity,
            granularity=bitmap.granularity,
        )


class TakeCheckpoint(AddBitmap):
    """A new bitmap records from now on, and the one of the checkpoint before no longer."""

    def __init__(self, checkpoints: Checkpoints, bitmaps: Bitmaps, node: str, name: str) -> None:
        super().__init__(bitmaps, BitmapAdd(node, name))
        self._checkpoints = checkpoints
        self._checkpoint: Checkpoint | None = None
        self._previous: DirtyBitmap | None = None

    def prepare(self) -> None:
        chain = self._checkpoints.chain(self.entry.node)
        previous = chain.last
        if previous is not None:
            check_usable(previous.bitmap)
        super().prepare()
        self.bitmap.checkpoint = True
        if previous is not None:
            self._previous = previous.bitmap
            self._previous.enabled = False
        self._checkpoint = Checkpoint(self.bitmap, datetime.now(UTC))
        chain.append(self._checkpoint)

    def abort(self) -> None:
        assert self._checkpoint is not None
        self._checkpoints.chain(self.entry.node).remove(self._checkpoint)
        if self._previous is not None:
            self._previous.enabled = True
        super().abort()


class DeleteCheckpoint(BitmapAction):
    """The checkpoint's bits go to the one before it, which records again if this one did."""

    def __init__(self, checkpoints: Checkpoints, bitmaps: Bitmaps, node: str, name: str) -> None:
        super().__init__(bitmaps, node, name)
        self._checkpoints = checkpoints
        self._checkpoint: Checkpoint | None = None
        self._index = 0
        self._parent: DirtyBitmap | None = None
        self._saved: SavedBits

    def prepare(self) -> None:
        chain = self._checkpoints.chain(self.entry.node)
        checkpoint = chain.find(self.name)
        if checkpoint is None:
            return  # somebody else was quicker
        super().prepare()
        parent = chain.parent(checkpoint)
        check_usable(self.bitmap)
        if parent is not None:
            check_usable(parent.bitmap)
            self._parent = parent.bitmap
            self._saved = self._parent.save()
            self._parent.merge([self.bitmap])
            self._parent.enabled = self.bitmap.enabled
        self.bitmap.users.append(REMOVER)
        self._checkpoint = checkpoint
        self._index = chain.remove(checkpoint)

    def abort(self) -> None:
        if self._checkpoint is None:
            return
        self._checkpoints.chain(self.entry.node).insert(self._index, self._checkpoint)
        self.bitmap.users.remove(REMOVER)
        if self._parent is not None:
            self._parent.restore(self._saved)
            self._parent.enabled = False

    def commit(self) -> None:
        if self._checkpoint is not None:
            self._bitmaps.withdraw(self.entry, self.bitmap)
            self._bitmaps.take_out(self.entry, self.bitmap)
