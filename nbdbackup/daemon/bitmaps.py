"""Dirty bitmaps as users change them: each change is a step of a transaction, exactly undoable.

The order of the checks is QEMU's. A bitmap is looked up when the step is taken, so that it may have
been made by the step before; a bitmap that is to be removed stays, busy, until all steps were taken.
"""

from collections.abc import Sequence
from pathlib import Path

from nbdbackup.bitmap.dirty import DirtyBitmap, SavedBits
from nbdbackup.bitmap.node_bitmaps import (
    check_changeable,
    check_granularity,
    check_removable,
    check_same_size,
    check_usable,
    default_granularity,
)
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.block.node import Node, drained
from nbdbackup.daemon.chains import Chains
from nbdbackup.daemon.graph import Entry, Graph
from nbdbackup.daemon.stored_bitmaps import StoredBitmaps, flush_source
from nbdbackup.daemon.transaction import Action
from nbdbackup.errors import NotFoundError, UsageError
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from nbdbackup.monitor.services_bitmaps import (
    BitmapAdd,
    BitmapChange,
    BitmapClear,
    BitmapEnable,
    BitmapMerge,
    BitmapRemove,
)
from nbdbackup.server.bitmap_context import BitmapContext, context_name
from nbdbackup.server.exports import Export, ExportTable

REMOVER = "its removal"


class Bitmaps:
    """Implements the monitor's `BitmapService`; `store` keeps persistent bitmaps (None: nobody does)."""

    def __init__(self, graph: Graph, exports: ExportTable, store: StoredBitmaps | None = None) -> None:
        self.graph = graph
        self.exports = exports
        self.store = store
        self.chains = Chains(store)

    def action(self, change: BitmapChange) -> Action:
        """The step of a transaction that makes `change`."""
        match change:
            case BitmapAdd():
                return AddBitmap(self, change)
            case BitmapRemove():
                return RemoveBitmap(self, change.node, change.name)
            case BitmapClear():
                return ClearBitmap(self, change.node, change.name)
            case BitmapEnable():
                return EnableBitmap(self, change.node, change.name, enabled=change.enabled)
            case BitmapMerge():
                return MergeBitmaps(self, change)

    def entry(self, node: str) -> Entry:
        """The node called `node`, for a change of one of its bitmaps.

        Raises:
            NotFoundError: there is none.
        """
        try:
            return self.graph.entry(node)
        except NotFoundError:
            raise NotFoundError(f"Node '{node}' not found") from None

    # How bitmaps come and go: for steps of transactions, while the node is drained.

    def insert(self, entry: Entry, bitmap: DirtyBitmap) -> None:
        """Let `bitmap`, for which `NodeBitmaps.check_new` found nothing, be one of the node's."""
        entry.bitmaps.add(bitmap)
        _track(entry)

    def take_out(self, entry: Entry, bitmap: DirtyBitmap) -> None:
        """Undo `insert`."""
        entry.bitmaps.remove(bitmap)
        _track(entry)

    def offer(self, entry: Entry, bitmap: DirtyBitmap) -> None:
        """Show `bitmap` to the clients of the node's exports, as far as these show all of them."""
        for export in self._exports_of(entry):
            export.contexts.add(context_name(bitmap.name), BitmapContext(bitmap))

    async def keep_alive(self) -> None:
        """What stored bitmaps need to be done all the time; until cancelled."""
        if self.store is not None:
            await self.store.keep_alive()

    async def load(self, entry: Entry) -> None:
        """Add what is stored of the node's bitmaps, before anybody uses it.

        Raises:
            NbdBackupError: a file cannot be used.
        """
        if self.store is None:
            return
        files = await self.store.load(entry.node)
        try:
            stored = await self.chains.load(entry.node, files)
        except BaseException:
            for bitmap in files:
                await self.store.release(entry.node, bitmap)
            raise
        async with drained(entry.node):
            for each in stored:
                self.insert(entry, each)
        for each in stored:
            if not each.inconsistent:
                self.offer(entry, each)

    async def release(self, entry: Entry) -> None:
        """The node goes: save its stored bitmaps. Nothing may be in flight on it any more."""
        for bitmap in entry.bitmaps:
            if isinstance(bitmap, StoredBitmap) and self.store is not None:
                await self.store.release(entry.node, bitmap)

    async def remove_at_rest(self, path: Path) -> None:
        """Remove the file of a bitmap whose node there is not; its checkpoints go with the last one.

        Raises:
            NotFoundError: it is in use by now. OSError: it cannot be removed.
        """
        assert self.store is not None
        async with self.chains.lock:
            node = await self.store.remove_at_rest(path)
            if node not in [other for other, _, _ in self.store.at_rest()]:
                await self.chains.forget_node(node)

    def withdraw(self, entry: Entry, bitmap: DirtyBitmap) -> None:
        """Undo `offer`."""
        for export in self._exports_of(entry):
            export.contexts.remove(context_name(bitmap.name))

    def _exports_of(self, entry: Entry) -> Sequence[Export]:
        return [export for export in self.exports if export.node is entry.node and export.all_bitmaps]


def _track(entry: Entry) -> None:
    """Have a tracker on the node while it has bitmaps."""
    node, bitmaps = entry.node, entry.bitmaps
    tracker = next((device for device in node.filters if isinstance(device, DirtyTracker)), None)
    if tracker is None:
        if len(bitmaps):
            node.push(DirtyTracker(node.child, bitmaps))
    elif len(bitmaps):
        tracker.bitmaps = tuple(bitmaps)
    else:
        node.remove(tracker)


class BitmapAction(Action):
    """A step that changes one bitmap of the node called `node`; subclasses say how in `take`.

    `begins_anew`: clean bits are to mean that the disk is as at this instant, which then has to outlive
    a loss of power if the bitmap does.
    """

    begins_anew = False

    def __init__(self, bitmaps: Bitmaps, node: str, name: str) -> None:
        self.name = name
        self._bitmaps = bitmaps
        self._node = node
        self._entry: Entry | None = None
        self._bitmap: DirtyBitmap | None = None

    @property
    def entry(self) -> Entry:
        """The node; known since `ready`."""
        assert self._entry is not None
        return self._entry

    @property
    def bitmap(self) -> DirtyBitmap:
        """The bitmap; known since `prepare`."""
        assert self._bitmap is not None
        return self._bitmap

    async def ready(self) -> None:
        self._entry = self._bitmaps.entry(self._node)
        # Most of it now, while clients go on.
        await self.settle()

    async def settle(self) -> None:
        store = self._bitmaps.store
        if self.begins_anew and store is not None and store.power:
            await flush_source(self.entry.node)

    def nodes(self) -> Sequence[Node]:
        return [self.entry.node]

    def prepare(self) -> None:
        self._bitmap = self.entry.bitmaps.get(self.name)
        self.take()

    def take(self) -> None:
        """Check the bitmap and change it; see `prepare`."""


class AddBitmap(BitmapAction):
    """block-dirty-bitmap-add."""

    begins_anew = True

    def __init__(self, bitmaps: Bitmaps, request: BitmapAdd) -> None:
        super().__init__(bitmaps, request.node, request.name)
        self._request = request
        self.made: DirtyBitmap | None = None
        """Known since `ready`."""
        self._is_added = False

    async def ready(self) -> None:
        request = self._request
        if not request.name:
            raise UsageError("Bitmap name cannot be empty")
        entry = self._entry = self._bitmaps.graph.entry(request.node)
        granularity = default_granularity() if request.granularity is None else request.granularity
        check_granularity(granularity)
        if request.persistent:
            self.made = await self._make_stored(entry, granularity)
            await self.settle()
        else:
            self.made = DirtyBitmap(request.name, entry.node.size, granularity, enabled=request.enabled)

    async def _make_stored(self, entry: Entry, granularity: int) -> StoredBitmap:
        store, request = self._bitmaps.store, self._request
        if store is None:
            raise UsageError(f"Can't store persistent bitmaps to {request.node}: Operation not supported")
        # What is stored under that name must not be touched for an addition that is refused.
        entry.bitmaps.check_new(request.name)
        return await store.create(entry.node, request.name, granularity, enabled=request.enabled)

    def prepare(self) -> None:
        assert self.made is not None
        self.entry.bitmaps.check_new(self.name)
        self.publish()
        self._bitmap = self.made
        self._bitmaps.insert(self.entry, self.made)

    def publish(self) -> None:
        """Let its file, if it has one, be there for good. Raises what `BitmapStore.publish` does."""
        if isinstance(self.made, StoredBitmap) and self._bitmaps.store is not None:
            self._bitmaps.store.publish(self.made)

    def commit(self) -> None:
        self._bitmaps.offer(self.entry, self.bitmap)
        self._is_added = True

    def abort(self) -> None:
        self._bitmaps.take_out(self.entry, self.bitmap)

    async def clean(self) -> None:
        if not isinstance(self.made, StoredBitmap) or self._bitmaps.store is None:
            return
        if self._is_added:
            await self._bitmaps.store.sync()
        else:
            await self._bitmaps.store.remove(self.made)


class RemoveBitmap(BitmapAction):
    """block-dirty-bitmap-remove."""

    _is_removed = False

    def take(self) -> None:
        check_removable(self.bitmap)
        self.bitmap.users.append(REMOVER)

    def abort(self) -> None:
        self.bitmap.users.remove(REMOVER)

    def commit(self) -> None:
        self._bitmaps.take_out(self.entry, self.bitmap)
        if not self.bitmap.inconsistent:
            self._bitmaps.withdraw(self.entry, self.bitmap)
        if isinstance(self.bitmap, StoredBitmap):
            # Should its file stay, because of a crash or an error: it does not record any more.
            self.bitmap.withdraw()
        self._is_removed = True

    async def clean(self) -> None:
        if self._is_removed and isinstance(self.bitmap, StoredBitmap) and self._bitmaps.store is not None:
            await self._bitmaps.store.remove(self.bitmap)


class ClearBitmap(BitmapAction):
    """block-dirty-bitmap-clear."""

    begins_anew = True
    _saved: SavedBits

    def take(self) -> None:
        check_changeable(self.bitmap)
        self._saved = self.bitmap.clear()

    def commit(self) -> None:
        self.bitmap.forget(self._saved)

    def abort(self) -> None:
        self.bitmap.restore(self._saved)


class EnableBitmap(BitmapAction):
    """block-dirty-bitmap-enable, and with `enabled` False block-dirty-bitmap-disable."""

    def __init__(self, bitmaps: Bitmaps, node: str, name: str, *, enabled: bool) -> None:
        super().__init__(bitmaps, node, name)
        self._enabled = enabled
        self._was_enabled = False
        self.begins_anew = enabled

    def take(self) -> None:
        check_changeable(self.bitmap)
        self._was_enabled = self.bitmap.enabled
        self.bitmap.enabled = self._enabled

    def abort(self) -> None:
        self.bitmap.enabled = self._was_enabled


class MergeBitmaps(BitmapAction):
    """block-dirty-bitmap-merge: all sources are looked at before the target is."""

    _saved: SavedBits

    def __init__(self, bitmaps: Bitmaps, request: BitmapMerge) -> None:
        super().__init__(bitmaps, request.node, request.target)
        self._request = request

    def take(self) -> None:
        sources = []
        for node, name in self._request.sources:
            source = self._bitmaps.entry(node).bitmaps.get(name)
            check_usable(source)
            check_same_size(self.bitmap, source)
            sources.append(source)
        check_usable(self.bitmap)
        self._saved = self.bitmap.save()
        self.bitmap.merge(sources)

    def abort(self) -> None:
        self.bitmap.restore(self._saved)
