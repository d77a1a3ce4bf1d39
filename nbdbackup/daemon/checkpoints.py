"""Checkpoints as users make and delete them: switch of bitmaps and point in time in one step.

`create` makes, at one instant of all its nodes, a snapshot NODE@NAME for the backup of that instant,
and a checkpoint NAME for the next one: a new bitmap begins to record and the one before stops. The
snapshot shows the latter as it was, which is what an incremental puller has to read.

The steps of one change end with `StoreChains`, in which the change becomes true on disk as well.
"""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from nbdbackup.bitmap.checkpoints import Checkpoint, CheckpointChain
from nbdbackup.bitmap.dirty import DirtyBitmap, SavedBits
from nbdbackup.bitmap.node_bitmaps import check_usable
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.block.node import Node
from nbdbackup.crash_points import reach
from nbdbackup.daemon.bitmaps import REMOVER, AddBitmap, BitmapAction, Bitmaps
from nbdbackup.daemon.chain_file import ChainRecord, State
from nbdbackup.daemon.chains import Chains
from nbdbackup.daemon.snapshots import Snapshots
from nbdbackup.daemon.transaction import Action, run_transaction
from nbdbackup.errors import ConflictError, UsageError
from nbdbackup.monitor.services_bitmaps import BitmapAdd
from nbdbackup.monitor.services_snapshots import CheckpointInfo, SnapshotInfo, SnapshotOptions


class Checkpoints:
    """Implements the monitor's `CheckpointService`."""

    def __init__(self, bitmaps: Bitmaps, snapshots: Snapshots) -> None:
        self._bitmaps = bitmaps
        self._snapshots = snapshots
        self._chains = bitmaps.chains

    async def create(self, nodes: Sequence[str], options: SnapshotOptions) -> Sequence[SnapshotInfo]:
        """A checkpoint of all `nodes` at one instant, and a snapshot of the same; all of them or none."""
        if options.name is None:
            raise UsageError("a checkpoint needs a name")
        async with self._chains.lock:
            taking = self._snapshots.actions(nodes, options)
            switching = [TakeCheckpoint(self._bitmaps, node, options.name) for node in nodes]
            await run_transaction([*taking, *switching, StoreChains(self._chains, made=switching)])
        await self._snapshots.sync([action.snapshot for action in taking])
        return [self._snapshots.info(action.snapshot) for action in taking]

    async def delete(self, nodes: Sequence[str], name: str) -> Sequence[CheckpointInfo]:
        """Forget the checkpoint `name` of `nodes`, or of all that have it; those that there were."""
        for node in nodes:
            self._bitmaps.graph.get(node)
        async with self._chains.lock:
            wanted = nodes or [node.name for node in self._bitmaps.graph]
            gone = [info for info in self.list() if info.name == name and info.node in wanted]
            if gone:
                deleting = [DeleteCheckpoint(self._bitmaps, info.node, name) for info in gone]
                await run_transaction([*deleting, StoreChains(self._chains, removed=deleting)])
        return gone

    def list(self) -> Sequence[CheckpointInfo]:
        """Every checkpoint, the oldest of each node first."""
        return [
            self._info(chain, node, checkpoint)
            for node in self._bitmaps.graph
            for chain in [self._chains.chain(node)]
            for checkpoint in chain
        ]

    def _info(self, chain: CheckpointChain, node: Node, checkpoint: Checkpoint) -> CheckpointInfo:
        parent, bitmap = chain.parent(checkpoint), checkpoint.bitmap
        useless = chain.first_inconsistent(checkpoint)
        return CheckpointInfo(
            node=node.name,
            name=checkpoint.name,
            uuid=str(checkpoint.uuid),
            parent=None if parent is None else parent.name,
            created=checkpoint.created,
            dirty=(bitmap.count + bitmap.successor_count) * bitmap.granularity,
            granularity=bitmap.granularity,
            inconsistent="" if useless is None else f"bitmap '{useless.name}': {useless.bitmap.inconsistent}",
        )


class TakeCheckpoint(AddBitmap):
    """A new bitmap records from now on, and the one of the checkpoint before no longer.

    `StoreChains` gives the bitmap's file its name, and calls `seal` at the instant.
    """

    def __init__(self, bitmaps: Bitmaps, node: str, name: str) -> None:
        super().__init__(bitmaps, BitmapAdd(node, name, persistent=bitmaps.store is not None))
        self._chains = bitmaps.chains
        self._checkpoint: Checkpoint | None = None
        self._stopped: DirtyBitmap | None = None
        self._created = datetime.now(UTC)

    async def ready(self) -> None:
        await super().ready()
        self._created = datetime.now(UTC)

    def record(self) -> ChainRecord | None:
        """What is stored of it; known since `ready`. None: nothing is."""
        if not isinstance(self.made, StoredBitmap):
            return None
        ident = uuid.UUID(bytes=self.made.file.header.uuid)
        return ChainRecord(self._node, self.name, ident, None, self._created, State.MADE)

    def publish(self) -> None:
        """Nothing: `StoreChains` did so."""

    def publish_early(self) -> None:
        """Let the bitmap's file have its name. Raises what `BitmapStore.publish` does."""
        super().publish()

    def prepare(self) -> None:
        chain = self._chains.chain(self.entry.node)
        if chain.last is not None and chain.last.bitmap.busy:
            check_usable(chain.last.bitmap)
        super().prepare()
        self.bitmap.checkpoint = True
        record = self.record()
        ident = uuid.uuid4() if record is None else record.uuid
        self._checkpoint = Checkpoint(self.bitmap, self._created, ident)
        chain.append(self._checkpoint)

    def seal(self) -> None:
        """Every step was prepared: the checkpoint before stops to record. `abort` undoes it."""
        assert self._checkpoint is not None
        parent = self._chains.chain(self.entry.node).parent(self._checkpoint)
        if parent is not None and not parent.bitmap.inconsistent:
            self._stopped = parent.bitmap
            self._stopped.enabled = False
            reach("checkpoint.create.parent-stopped")

    def abort(self) -> None:
        assert self._checkpoint is not None
        self._chains.chain(self.entry.node).remove(self._checkpoint)
        if self._stopped is not None:
            self._stopped.enabled = True
        super().abort()


class DeleteCheckpoint(BitmapAction):
    """The checkpoint's bits go to the one before it, which records again if this one did.

    If its bits are of no use, so are those of the one before from then on.
    """

    def __init__(self, bitmaps: Bitmaps, node: str, name: str) -> None:
        super().__init__(bitmaps, node, name)
        self._chains = bitmaps.chains
        self._checkpoint: Checkpoint | None = None
        self._index = 0
        self._parent: DirtyBitmap | None = None
        self._saved: SavedBits | None = None

    @property
    def ident(self) -> uuid.UUID:
        """The checkpoint's UUID; known since `ready`."""
        checkpoint = self._checkpoint or self._chains.chain(self.entry.node).find(self.name)
        if checkpoint is None:
            raise ConflictError(f"node {self._node} was replaced while its checkpoint was being deleted")
        return checkpoint.uuid

    def prepare(self) -> None:
        chain = self._chains.chain(self.entry.node)
        checkpoint = chain.find(self.name)
        assert checkpoint is not None
        super().prepare()
        parent = chain.parent(checkpoint)
        for bitmap in (self.bitmap, *([] if parent is None else [parent.bitmap])):
            if bitmap.busy:
                check_usable(bitmap)
        if parent is not None:
            self._parent = parent.bitmap
            if not self.bitmap.inconsistent and not self._parent.inconsistent:
                self._saved = self._parent.save()
                self._parent.merge([self.bitmap])
                reach("checkpoint.delete.merged")
                self._parent.enabled = self.bitmap.enabled
                reach("checkpoint.delete.parent-records")
        self.bitmap.users.append(REMOVER)
        self._checkpoint = checkpoint
        self._index = chain.remove(checkpoint)

    def seal(self) -> None:
        """Every step was prepared: what cannot be undone, and must be so before the checkpoint is gone."""
        parent = self._parent
        if parent is None or parent.inconsistent or not self.bitmap.inconsistent:
            return
        self._bitmaps.withdraw(self.entry, parent)
        reason = f"it was merged with '{self.name}': {self.bitmap.inconsistent}"
        if isinstance(parent, StoredBitmap):
            parent.invalidate(reason)
        parent.inconsistent = reason

    def abort(self) -> None:
        assert self._checkpoint is not None
        self._chains.chain(self.entry.node).insert(self._index, self._checkpoint)
        self.bitmap.users.remove(REMOVER)
        if self._parent is not None and self._saved is not None:
            self._parent.restore(self._saved)
            self._parent.enabled = False

    def commit(self) -> None:
        if not self.bitmap.inconsistent:
            self._bitmaps.withdraw(self.entry, self.bitmap)
        self._bitmaps.take_out(self.entry, self.bitmap)
        if isinstance(self.bitmap, StoredBitmap):
            # Should its file stay, because of an error: it does not record any more.
            self.bitmap.withdraw()


class StoreChains(Action):
    """The last step of a change of checkpoints: with it, the change is true on disk."""

    def __init__(
        self,
        chains: Chains,
        *,
        made: Sequence[TakeCheckpoint] = (),
        removed: Sequence[DeleteCheckpoint] = (),
    ) -> None:
        self._chains = chains
        self._made = made
        self._removed = removed
        self._is_announced = False
        self._is_done = False

    async def ready(self) -> None:
        records = [record for action in self._made if (record := action.record()) is not None]
        if records:
            self._is_announced = True
            await self._chains.announce(records)
            reach("checkpoint.create.announced")
            for action in self._made:
                action.publish_early()
            reach("checkpoint.create.published")
            await self._chains.sync()
        await self._chains.propose(records, [action.ident for action in self._removed])

    def prepare(self) -> None:
        steps: list[TakeCheckpoint | DeleteCheckpoint] = [*self._made, *self._removed]
        for step in steps:
            step.seal()
        reach("checkpoint.change.sealed")
        self._chains.accept()
        reach("checkpoint.change.accepted")
        self._is_done = True

    async def clean(self) -> None:
        if not self._is_done:
            if self._is_announced:
                await self._chains.recall()
            return
        await self._chains.sync()
        for action in self._removed:
            if isinstance(action.bitmap, StoredBitmap) and self._chains.store is not None:
                await self._chains.store.remove(action.bitmap)
                reach("checkpoint.delete.removed")
            self._chains.forget(action.ident)
