"""The checkpoint chains of all nodes: in memory, in their file, and after a crash.

A checkpoint begins and ends in steps, of files that change one by one. In order:

    create    the file says `making`; the new bitmap has its name; (the nodes stand still:) it records,
              the one before does not; the file says `made`
    delete    (the nodes stand still:) the bitmap before has the bits, and records if this one did; the
              file says `removed`; the bitmap's file goes

What a crash interrupts is undone up to the file's last word, and done after it; `Chains.load` sees to
that. What these steps cannot have left behind makes the bitmap in question inconsistent.
"""

import asyncio
import logging
from collections.abc import Sequence
from uuid import UUID
from weakref import WeakKeyDictionary

from msgspec.structs import replace

from nbdbackup.bitmap.checkpoints import Checkpoint, CheckpointChain
from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.bitmap.file import sync_directory
from nbdbackup.bitmap.node_bitmaps import GRANULARITY_DEFAULT
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.block.node import Node
from nbdbackup.crash_points import reach
from nbdbackup.daemon.chain_file import ChainFile, ChainRecord, State
from nbdbackup.daemon.stored_bitmaps import StoredBitmaps

logger = logging.getLogger(__name__)

_NOT_RECORDED = "it stopped recording, and nobody knows what changed since"


class Chains:
    """The checkpoints of each node. `store` keeps their bitmaps; None: they end with this process.

    Whoever changes checkpoints holds `lock` from `announce` or `propose` to `sync`.
    """

    def __init__(self, store: StoredBitmaps | None) -> None:
        self.store = store
        self.lock = asyncio.Lock()
        self._file = None if store is None else ChainFile(store.directory)
        # Changing while running.
        self._chains: WeakKeyDictionary[Node, CheckpointChain] = WeakKeyDictionary()
        self._records: list[ChainRecord] = []
        """What is in the file, less what is dealt with and may stay there until it is written again."""
        self._proposed: list[ChainRecord] = []

    def chain(self, node: Node) -> CheckpointChain:
        """The checkpoints of `node`."""
        return self._chains.setdefault(node, CheckpointChain())

    async def open(self) -> None:
        """Read what is stored.

        Raises:
            DeviceError: the file cannot be used.
        """
        if self._file is not None and self.store is not None:
            self._records = await self.store.run(self._file.read)

    # Changes.

    async def announce(self, made: Sequence[ChainRecord]) -> None:
        """The checkpoints `made` are about to begin: so says the file on disk when this returns.

        Raises:
            DeviceError: it cannot be written.
        """
        await self._write([*self._records, *(replace(record, state=State.MAKING) for record in made)])

    async def propose(self, made: Sequence[ChainRecord], removed: Sequence[UUID]) -> None:
        """Put on disk, beside the file, what it shall say after `accept`.

        Raises:
            DeviceError: it cannot be written.
        """
        if self._file is None or self.store is None:
            return
        records = [
            replace(record, state=State.REMOVED) if record.uuid in removed else record
            for record in self._records
        ]
        self._proposed = _linked([*records, *made])
        await self.store.run(self._file.write_new, self._proposed)

    def accept(self) -> None:
        """What was proposed is so; on disk after `sync`, or now if it outlives a loss of power.

        For then no write may pass that the bitmap of a checkpoint which is gone does not record. The event
        loop waits for that, some milliseconds.

        Raises:
            DeviceError: the file cannot be replaced, and is as it was.
        """
        if self._file is None or self.store is None:
            return
        self._file.replace()
        self._records = self._proposed
        if self.store.power:
            try:
                sync_directory(self.store.directory)
            except OSError as error:
                logger.error("cannot sync %s: %s", self.store.directory, error.strerror or error)

    async def sync(self) -> None:
        """What was accepted is so on disk."""
        if self.store is not None:
            await self.store.sync()

    async def recall(self) -> None:
        """None of those that were announced has begun. A failure is logged: the next start sees to it."""
        try:
            await self._write(self._records)
        except OSError as error:
            logger.warning("%s; the next start puts it right", error.strerror or error)

    def forget(self, removed: UUID) -> None:
        """The bitmap of a checkpoint that was removed is gone: nothing of it need be remembered."""
        self._records = [record for record in self._records if record.uuid != removed]

    async def forget_node(self, node: str) -> None:
        """No bitmap of `node`, which there is not, is stored any more: nor are its checkpoints.

        Raises:
            DeviceError: the file cannot be written.
        """
        rest = [record for record in self._records if record.node != node]
        if rest != self._records:
            self._records = rest
            await self._write(rest)

    async def _write(self, records: list[ChainRecord]) -> None:
        if self._file is not None and self.store is not None:
            await self.store.run(self._file.write_new, _linked(records))
            self._file.replace()
            await self.store.sync()

    # The way back from the files.

    async def load(self, node: Node, bitmaps: Sequence[StoredBitmap]) -> list[DirtyBitmap]:
        """Make the chain of `node` from what is stored, with its `bitmaps`; those that it has from now on.

        Raises:
            DeviceError: what a crash interrupted cannot be put right, because of an error.
        """
        async with self.lock:
            return await self._load(node, {UUID(bytes=bitmap.file.header.uuid): bitmap for bitmap in bitmaps})

    async def _load(self, node: Node, bitmaps: dict[UUID, StoredBitmap]) -> list[DirtyBitmap]:
        records = [record for record in self._records if record.node == node.name]
        made = [record for record in records if record.state is State.MADE]
        last = bitmaps.get(made[-1].uuid) if made else None
        for record in records:
            if record.state is State.MAKING and last is not None:
                _take_back(last, bitmaps.get(record.uuid))
                reach("checkpoint.load.taken-back")
        await self._end_bitmaps([record for record in records if record.state is not State.MADE], bitmaps)
        found: list[DirtyBitmap] = list(bitmaps.values())
        chain = self.chain(node)
        for record in made:
            bitmap = bitmaps.get(record.uuid) or _lost(record, node, found)
            bitmap.checkpoint = True
            chain.append(Checkpoint(bitmap, record.created, record.uuid))
            if not bitmap.inconsistent:
                _set_recording(bitmap, is_last=record is made[-1])
        return found

    async def _end_bitmaps(self, records: Sequence[ChainRecord], bitmaps: dict[UUID, StoredBitmap]) -> None:
        for record in records:
            bitmap = bitmaps.pop(record.uuid, None)
            if bitmap is not None and self.store is not None:
                await self.store.remove(bitmap)
                reach("checkpoint.load.removed")
            self.forget(record.uuid)
        if records:
            await self._write(self._records)


def _take_back(parent: StoredBitmap, begun: StoredBitmap | None) -> None:
    """A checkpoint after `parent` was being made, with the bitmap `begun`: `parent` knows all of it again."""
    if parent.inconsistent:
        return
    if begun is None and not parent.enabled:
        parent.invalidate(_NOT_RECORDED)
    elif begun is not None and begun.inconsistent:
        parent.invalidate(begun.inconsistent)
    elif begun is not None:
        parent.merge([begun])
    if not parent.inconsistent and not parent.enabled:
        parent.enabled = True


def _set_recording(bitmap: DirtyBitmap, *, is_last: bool) -> None:
    """The last checkpoint's bitmap records, and no other does."""
    if not is_last and bitmap.enabled:
        bitmap.enabled = False
    if is_last and not bitmap.enabled and isinstance(bitmap, StoredBitmap):
        bitmap.invalidate(_NOT_RECORDED)
        logger.warning("checkpoint '%s' is inconsistent: %s", bitmap.name, _NOT_RECORDED)


def _lost(record: ChainRecord, node: Node, found: list[DirtyBitmap]) -> DirtyBitmap:
    """What stands for the bitmap of a checkpoint whose file is not there; it is one of `found` afterwards."""
    other = next((bitmap for bitmap in found if bitmap.name == record.name), None)
    if isinstance(other, StoredBitmap):
        other.invalidate("its file is not the one of the checkpoint of that name")
        bitmap: DirtyBitmap = other
    else:
        bitmap = DirtyBitmap(record.name, node.size, GRANULARITY_DEFAULT, enabled=False)
        bitmap.inconsistent = "its file is gone"
        found.append(bitmap)
    logger.warning(
        "checkpoint '%s' of node '%s' is inconsistent: %s; back up in full",
        record.name,
        record.node,
        bitmap.inconsistent,
    )
    return bitmap


def _linked(records: Sequence[ChainRecord]) -> list[ChainRecord]:
    """`records`, each with the one before it of its node as its parent."""
    last: dict[str, UUID] = {}
    linked = []
    for record in records:
        if record.state is State.REMOVED:
            linked.append(record)
            continue
        linked.append(replace(record, parent=last.get(record.node)))
        last[record.node] = record.uuid
    return linked
