"""Snapshots as users see them: made together, exported as `NODE@NAME`, dropped by that name.

A snapshot's export shows every dirty bitmap of its node as it was at the instant. One of them can be
frozen with it: its successor records from then on, and when the snapshot is dropped, either the frozen
bits are dealt with (somebody pulled them) or the bitmap has both.

A snapshot that is not temporary outlives the daemon (`stored`), with what it shows of persistent bitmaps, and
holds the bitmap that was frozen with it in the file of that one too (`bitmap.stored`): a restored one has it.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from nbdbackup.bitmap.dirty import DirtyBitmap, Freeze
from nbdbackup.bitmap.file import failed
from nbdbackup.bitmap.node_bitmaps import check_changeable
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.block.node import Node
from nbdbackup.crash_points import reach
from nbdbackup.daemon.graph import Entry, Graph
from nbdbackup.daemon.stored_bitmaps import flush_source
from nbdbackup.daemon.stored_snapshots import StoredSnapshots, info_at_rest, plan_of
from nbdbackup.daemon.transaction import Action, run_transaction
from nbdbackup.errors import ConflictError, NbdBackupError, NotFoundError, UsageError
from nbdbackup.fleece.block_copy import CLUSTER_BYTES_DEFAULT
from nbdbackup.fleece.frozen_copies import BitmapToCopy
from nbdbackup.fleece.scratch import open_scratch
from nbdbackup.fleece.snapshot_store import NewSnapshot, StoredSnapshot
from nbdbackup.fleece.snapshots import Snapshot, SnapshotPlan, make_snapshot
from nbdbackup.monitor.services_snapshots import SnapshotInfo, SnapshotOptions
from nbdbackup.nbd.constants import STRING_BYTES_MAX
from nbdbackup.server.bitmap_context import BitmapContext, context_name
from nbdbackup.server.exports import Export
from nbdbackup.server.server import Server

logger = logging.getLogger(__name__)

NAME_CHARACTERS_MAX = 255


@dataclass(slots=True, eq=False)
class KeptSnapshot:
    """A live snapshot, the node's bitmaps as they were, and `bitmap`, frozen until it is dropped."""

    snapshot: Snapshot
    frozen: list[DirtyBitmap] = field(default_factory=list)
    bitmap: DirtyBitmap | None = None
    stored: StoredSnapshot | None = None
    """None: it is temporary."""

    def freeze_bitmap(self, bitmap: DirtyBitmap) -> None:
        """From this instant on `bitmap` is frozen for the snapshot."""
        bitmap.create_successor(None if self.stored is None else self.stored.header.uuid)
        self.bitmap = bitmap

    def claim_bitmap(self, bitmap: StoredBitmap) -> None:
        """`bitmap` was found frozen for the snapshot, which was restored."""
        bitmap.claim()
        self.bitmap = bitmap
        self.frozen.append(bitmap.frozen_bits())

    def release_bitmap(self, *, pulled: bool) -> OSError | None:
        """Let the bitmap go on: without the bits that were frozen if they were `pulled`, else with them.

        Returns why it goes on with them though they were pulled, if that is so.
        """
        bitmap, self.bitmap = self.bitmap, None
        if bitmap is None:
            return None
        if pulled:
            try:
                bitmap.abdicate()
                return None
            except OSError as error:
                bitmap.reclaim()
                return error
        bitmap.reclaim()
        return None


class Snapshots:
    """The live snapshots, and those that nobody can read; implements the monitor's `SnapshotService`.

    `store` keeps them when the daemon ends; None: all are temporary.
    """

    def __init__(
        self, graph: Graph, server: Server, scratch_directory: Path, store: StoredSnapshots | None = None
    ) -> None:
        self.graph = graph
        self.server = server
        self.scratch_directory = scratch_directory
        self.store = store
        # Changing while running.
        self.live: dict[str, KeptSnapshot] = {}
        self.names_being_made: set[str] = set()
        self._ending: dict[KeptSnapshot, bool] = {}
        """Whether each shall be kept in the store."""
        self._broken: asyncio.Queue[KeptSnapshot] = asyncio.Queue()

    def list(self) -> Sequence[SnapshotInfo]:
        """Those that cannot be read, then every live snapshot, each the oldest first."""
        at_rest = self.store.at_rest() if self.store is not None else ()
        live = [self.info(kept) for kept in self.live.values()]
        return [*map(info_at_rest, at_rest), *live]

    async def create(self, nodes: Sequence[str], options: SnapshotOptions) -> Sequence[SnapshotInfo]:
        """Take one instant of all `nodes`; all of them or none."""
        actions = self.actions(nodes, options)
        await run_transaction(actions)
        await self.sync([action.snapshot for action in actions])
        return [self.info(action.snapshot) for action in actions]

    async def sync(self, taken: Sequence[KeptSnapshot]) -> None:
        """Whoever is told of `taken` now finds them in the list even after a loss of power, as broken."""
        stored = [kept.stored for kept in taken if kept.stored is not None]
        if self.store is None or not stored:
            return
        try:
            await self.store.sync(stored)
        except OSError as error:
            # They are there, and clients may use them: taking them back would be worse.
            logger.error("snapshots may be forgotten in a loss of power: %s", error.strerror or error)

    def actions(self, nodes: Sequence[str], options: SnapshotOptions) -> "Sequence[TakeSnapshot]":
        """The steps of a transaction that take a snapshot of each of `nodes`, under one name.

        Raises:
            UsageError, NotFoundError, ConflictError: they would not do.
        """
        name = options.name if options.name is not None else f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        _check_name(name)
        place = Path(options.scratch) if options.scratch is not None else self.scratch_directory
        _check_set(nodes, None if options.scratch is None else place)
        actions = [TakeSnapshot(self, node, name, place, options) for node in nodes]
        for action in actions:
            action.check_free()
        return actions

    async def drop(self, exports: Sequence[str], *, pulled: bool = False) -> None:
        """End the snapshots called `NODE@NAME`; none if one of them does not exist.

        `pulled`: what was dirty in the bitmap frozen with it is dealt with; else the bitmap has it again.
        """
        if pulled:
            await self._settle_sources(exports)
        at_rest = []
        for export_name in dict.fromkeys(exports):
            if export_name in self.live:
                self._check_pulled(export_name, pulled=pulled)
            elif self.store is not None and self.store.has_at_rest(export_name):
                if pulled:
                    raise ConflictError(
                        f"snapshot {export_name} is not being served, and its bitmap is not at hand: "
                        "drop it without --pulled"
                    )
                at_rest.append(export_name)
            else:
                raise NotFoundError(f"there is no snapshot {export_name}")
        ending = [self.live.pop(name) for name in dict.fromkeys(exports) if name in self.live]
        # No await before all are out of the list and the bitmaps are back: another drop must not find them
        # there, and one that is cut short must leave no bitmap frozen.
        self._ending.update(dict.fromkeys(ending, False))
        failures = []
        for kept in ending:
            if kept.stored is not None:
                # Before the filter goes: from then on the source changes unseen.
                kept.stored.withdraw()
            failures.append(kept.release_bitmap(pulled=pulled))
            self._hide(kept, "was dropped")
        await self._end(ending)
        for export_name in at_rest:
            assert self.store is not None
            await self.store.remove_at_rest(export_name)
        for failure in failures:
            if failure is not None:
                raise failed(
                    failure, "the snapshots were dropped, and a bitmap keeps what was pulled as dirty"
                )

    async def _settle_sources(self, exports: Sequence[str]) -> None:
        """What was pulled is on the disk as well, as far as bitmaps shall outlive a loss of power."""
        for kept in [self.live[name] for name in exports if name in self.live]:
            if isinstance(kept.bitmap, StoredBitmap) and kept.bitmap.durable:
                await flush_source(kept.snapshot.plan.node)

    def _check_pulled(self, export_name: str, *, pulled: bool) -> None:
        broken = self.live[export_name].snapshot.broken
        if pulled and broken is not None:
            raise ConflictError(
                f"snapshot {export_name} is broken ({broken.strerror or broken}), "
                "so nobody has all of it: drop it without --pulled"
            )

    def _hide(self, kept: KeptSnapshot, why: str) -> None:
        name = kept.snapshot.export_name
        self.server.exports.remove(name, f"snapshot {name} {why}")

    async def load(self, entry: Entry) -> None:
        """Put the node's stored snapshots in place, before anybody writes to it.

        Raises:
            NbdBackupError: a file cannot be used.
        """
        if self.store is None:
            return
        for stored, snapshot in await self.store.restore(entry.node):
            kept = KeptSnapshot(snapshot, list(stored.copies.bitmaps), stored=stored)
            bitmap = entry.bitmaps.held_by(stored.header.uuid)
            if isinstance(bitmap, StoredBitmap):
                kept.claim_bitmap(bitmap)
            self.offer(kept)

    async def release(self, entry: Entry) -> None:
        """The node goes: keep its stored snapshots. Nothing may be in flight on it any more."""
        await self._leave([kept for kept in self.live.values() if kept.snapshot.plan.node is entry.node])

    async def close(self) -> None:
        """Keep those that are stored, drop the others, and finish every drop that was cut short."""
        await self._leave(tuple(self.live.values()))
        await self._end(tuple(self._ending))

    async def _leave(self, leaving: Sequence[KeptSnapshot]) -> None:
        for kept in leaving:
            del self.live[kept.snapshot.export_name]
            self._ending[kept] = kept.stored is not None
            if kept.bitmap is not None and kept.bitmap.holder is None:
                kept.release_bitmap(pulled=False)
            self._hide(kept, "goes with its node")
        await self._end(leaving)

    async def _end(self, ending: Sequence[KeptSnapshot]) -> None:
        for kept in ending:
            if kept not in self._ending:
                continue
            snapshot = kept.snapshot
            await snapshot.drop()
            reach("snapshot.drop.taken-out")
            if self.store is None or kept.stored is None:
                logger.info("snapshot %s dropped", snapshot.export_name)
            elif self._ending[kept]:
                await self.store.release(snapshot.plan.node, kept.stored)
            else:
                await self.store.remove(kept.stored)
                logger.info("snapshot %s dropped", snapshot.export_name)
            self._ending.pop(kept, None)

    async def keep_alive(self) -> None:
        """What stored snapshots need to be done all the time; until cancelled."""
        if self.store is not None:
            await self.store.keep_alive()

    async def free_broken(self) -> None:
        """Give the scratch of each snapshot back when it is broken and nobody is reading it; until cancelled.

        It stays in the list, and its export goes on to fail with the cause, until it is dropped.
        """
        async with asyncio.TaskGroup() as freeing:
            while True:
                # One that somebody is still reading must not hold up the others.
                freeing.create_task(self._free_scratch(await self._broken.get()))

    async def _free_scratch(self, kept: KeptSnapshot) -> None:
        try:
            await kept.snapshot.free_scratch()
            if self.store is not None and kept.stored is not None:
                await self.store.free_scratch(kept.stored)
        except OSError as error:
            logger.warning("scratch of %s: %s", kept.snapshot.export_name, error.strerror or error)

    def offer(self, kept: "KeptSnapshot") -> None:
        """`kept` was taken: show it to clients, with the bitmaps as they were."""
        snapshot = kept.snapshot
        self.live[snapshot.export_name] = kept
        self.graph.announcer.watch(snapshot)
        snapshot.filter.on_broken = lambda cause: self._broken.put_nowait(kept)
        logger.info("snapshot %s taken", snapshot.export_name)
        description = f"{snapshot.plan.node.name} as it was at {snapshot.created.isoformat('T', 'seconds')}"
        exports = self.server.exports
        tls_only, authorised = exports.access_to(snapshot.plan.node)
        export = Export(
            snapshot.export_name,
            snapshot.view,
            description,
            read_only=True,
            tls_only=tls_only,
            authorised=authorised,
        )
        for bitmap in kept.frozen:
            export.contexts.add(context_name(bitmap.name), BitmapContext(bitmap))
        exports.add(export)

    def check_free(self, export_name: str) -> None:
        """Raises UsageError or ConflictError if there can be no new snapshot called `export_name`."""
        if len(export_name.encode()) > STRING_BYTES_MAX:
            raise UsageError(f"{export_name[:40]}... is too long for an export: choose a shorter --name")
        if export_name in self.live or export_name in self.names_being_made:
            raise ConflictError(f"snapshot {export_name} exists already: drop it, or choose another --name")
        if self.store is not None and self.store.has_at_rest(export_name):
            raise ConflictError(
                f"snapshot {export_name} exists already (and is broken): drop it, or choose another --name"
            )
        if export_name in self.server.exports:
            raise ConflictError(f"there is an export called {export_name} already: choose another --name")

    def info(self, kept: "KeptSnapshot") -> SnapshotInfo:
        """What users see of it."""
        snapshot = kept.snapshot
        plan, broken = snapshot.plan, snapshot.broken
        return SnapshotInfo(
            node=plan.node.name,
            name=plan.name,
            export=plan.export_name,
            uris=self.server.uris(plan.export_name),
            created=snapshot.created,
            size=plan.node.size,
            cluster_size=snapshot.block_copy.cluster_bytes,
            scratch_used=plan.scratch.bytes_used,
            scratch_max=plan.scratch.bytes_max,
            cause=None if broken is None else (broken.strerror or str(broken)),
            bitmap=None if kept.bitmap is None else kept.bitmap.name,
            persistent=kept.stored is not None,
        )


class TakeSnapshot(Action):
    """One node's point in time, called `name`, with scratch in `place`."""

    def __init__(
        self, snapshots: Snapshots, node: str, name: str, place: Path, options: SnapshotOptions
    ) -> None:
        self._snapshots = snapshots
        self._entry: Entry = snapshots.graph.entry(node)
        self._plan_name = name
        self._place = place
        self._options = options
        # Changing while running.
        self._has_name = False
        self._freezes: dict[DirtyBitmap, Freeze] = {}
        self._kept: KeptSnapshot | None = None
        self._is_committed = False

    @property
    def export_name(self) -> str:
        """`NODE@NAME`."""
        return f"{self._entry.node.name}@{self._plan_name}"

    @property
    def snapshot(self) -> KeptSnapshot:
        """What was taken; made by `ready`."""
        assert self._kept is not None
        return self._kept

    def check_free(self) -> None:
        """Raises UsageError or ConflictError if the name is taken, or none."""
        self._snapshots.check_free(self.export_name)

    async def ready(self) -> None:
        self.check_free()
        self._has_name = True
        self._snapshots.names_being_made.add(self.export_name)
        self._kept = await self._make()
        for bitmap in self._entry.bitmaps:
            plane = None if self._kept.stored is None else self._kept.stored.copies.plane_for(bitmap)
            freeze = self._freezes[bitmap] = Freeze(bitmap, plane)
            for _ in freeze.pieces():
                await asyncio.sleep(0)

    async def _make(self) -> KeptSnapshot:
        store = self._snapshots.store
        if store is not None and not self._options.temporary and self._entry.node.size:
            return await self._make_stored(store)
        node, options = self._entry.node, self._options
        title = f"scratch of {self.export_name}"
        scratch = open_scratch(
            self._place, node.size, CLUSTER_BYTES_DEFAULT, options.scratch_bytes_max, title
        )
        try:
            return KeptSnapshot(
                await make_snapshot(
                    SnapshotPlan(node, self._plan_name, scratch, options.on_cbw_error, options.cbw_timeout_s)
                )
            )
        except BaseException:
            await scratch.close()
            raise

    async def _make_stored(self, store: StoredSnapshots) -> KeptSnapshot:
        node, options = self._entry.node, self._options
        new = NewSnapshot(
            node.name,
            self._plan_name,
            CLUSTER_BYTES_DEFAULT,
            self._place,
            options.scratch_bytes_max,
            options.on_cbw_error.value,
            options.cbw_timeout_s,
            [
                BitmapToCopy(bitmap.name, bitmap.granularity)
                for bitmap in self._entry.bitmaps
                # The one that is frozen with it has its bits in its own file.
                if bitmap.persistent and not bitmap.inconsistent and bitmap.name != options.bitmap
            ],
        )
        # What was begun in a thread is waited for and undone, also when the command is cancelled.
        making = asyncio.ensure_future(store.create(node, new))
        try:
            stored = await asyncio.shield(making)
        except asyncio.CancelledError:
            with suppress(NbdBackupError, OSError):
                stored = await making
                await stored.scratch.close()
                await store.remove(stored)
            raise
        try:
            snapshot = await make_snapshot(plan_of(node, stored))
        except BaseException:
            await stored.scratch.close()
            await store.remove(stored)
            raise
        snapshot.filter.notes_of_breaking.append(stored.note_broken)
        return KeptSnapshot(snapshot, stored=stored)

    def nodes(self) -> Sequence[Node]:
        return [self._entry.node]

    def prepare(self) -> None:
        bitmap = None
        if self._options.bitmap is not None:
            bitmap = self._entry.bitmaps.get(self._options.bitmap)
            check_changeable(bitmap)
        kept = self.snapshot
        # A bitmap that a step before this one made has hardly anything in it yet.
        freezes = [self._freezes.get(of, Freeze(of)) for of in self._entry.bitmaps if not of.inconsistent]
        kept.frozen = [freeze.finish() for freeze in freezes]
        if kept.stored is not None:
            kept.stored.copies.give_up_others(
                {freeze.bitmap.name for freeze in freezes if freeze.plane is not None}
            )
        self._snapshots.graph.check_point_in_time(self._entry.node)
        if bitmap is not None:
            # The last thing that can fail: its file.
            kept.freeze_bitmap(bitmap)
        kept.snapshot.insert()
        reach("snapshot.create.inserted")
        if kept.stored is not None:
            kept.stored.go_live(kept.snapshot.created)

    def abort(self) -> None:
        kept = self.snapshot
        if kept.stored is not None:
            kept.stored.withdraw()
        kept.release_bitmap(pulled=False)
        kept.snapshot.take_out()

    def commit(self) -> None:
        self._snapshots.offer(self.snapshot)
        self._is_committed = True

    async def clean(self) -> None:
        for freeze in self._freezes.values():
            freeze.end()
        if self._has_name:
            self._snapshots.names_being_made.discard(self.export_name)
        if self._kept is not None and not self._is_committed:
            await self._kept.snapshot.close()
            if self._kept.stored is not None and self._snapshots.store is not None:
                await self._snapshots.store.remove(self._kept.stored)


def _check_name(name: str) -> None:
    if not 0 < len(name) <= NAME_CHARACTERS_MAX or not name.isprintable() or set(name) & set("@/ "):
        raise UsageError(
            f"{name!r} cannot name a snapshot: use 1 to {NAME_CHARACTERS_MAX} printable characters "
            "without '@', '/' and spaces"
        )


def _check_set(nodes: Sequence[str], place: Path | None) -> None:
    if not nodes:
        raise UsageError("name at least one node to take a snapshot of")
    if len(set(nodes)) < len(nodes):
        raise UsageError("a node is named twice: one snapshot of each is taken")
    if place is not None and len(nodes) > 1 and not place.is_dir():
        raise UsageError(f"{place} is no directory: scratch of several nodes needs one")
