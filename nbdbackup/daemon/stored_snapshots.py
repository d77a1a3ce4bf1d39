"""Snapshots of the daemon that outlive it: scratch and a sidecar for each (`fleece.snapshot_store`)."""

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from nbdbackup.bitmap.file import failed
from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.node import Node, drained
from nbdbackup.crash_points import reach
from nbdbackup.daemon.stored_bitmaps import SIGN_OF_LIFE_S, flush_source, source_identity
from nbdbackup.errors import ConflictError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.lost_scratch import LostScratch, lost_scratch
from nbdbackup.fleece.snapshot_store import (
    NewSnapshot,
    SnapshotAtRest,
    SnapshotStore,
    StoredSnapshot,
)
from nbdbackup.fleece.snapshots import Snapshot, SnapshotPlan, make_snapshot
from nbdbackup.fleece.stored_scratch import scratch_bytes_used
from nbdbackup.monitor.services_snapshots import SnapshotInfo

logger = logging.getLogger(__name__)


class StoredSnapshots:
    """The snapshots whose sidecars are in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._executor = IoExecutor("snapshots")
        self._store = SnapshotStore(directory)

    async def open(self) -> None:
        """Look at what is there. Raises what `SnapshotStore.open` does."""
        await self._executor.run(self._store.open)

    def close(self) -> None:
        """Let the threads end; every snapshot was released or removed."""
        self._executor.shutdown()

    async def keep_alive(self) -> None:
        """Give signs of life, until cancelled."""
        while True:
            self._store.give_sign_of_life()
            await asyncio.sleep(SIGN_OF_LIFE_S)

    def at_rest(self) -> Sequence[SnapshotAtRest]:
        """Those that nobody can read: broken, or without their node; the oldest first."""
        found = self._store.at_rest.values()
        return sorted(
            found, key=lambda snapshot: snapshot.header.created.timestamp() if snapshot.header else 0
        )

    def has_at_rest(self, export_name: str) -> bool:
        """Whether there is one of that name that nobody can read."""
        return export_name in self._store.at_rest

    async def lost_scratch(self, own: Path, sidecars: Sequence[Path] = ()) -> list[LostScratch]:
        """Scratch files in `own`, the state directory's, and in other places that no sidecar owns.

        There are sidecars in the directories `sidecars` as well.
        """
        places = self._store.scratch_directories()
        return await self._executor.run(lost_scratch, (self._store.directory, *sidecars), own, places)

    async def create(self, node: Node, new: NewSnapshot) -> StoredSnapshot:
        """Make what `new` needs. Raises what `SnapshotStore.create` does."""
        return await self._executor.run(lambda: self._store.create(new, source_identity(node.bottom)))

    async def sync(self, snapshots: Sequence[StoredSnapshot]) -> None:
        """These are listed even after a loss of power, as broken.

        Raises:
            OSError: perhaps they are not.
        """
        for snapshot in snapshots:
            await self._executor.run(snapshot.file.sync)
        await self._executor.run(self._store.sync_directory)

    async def restore(self, node: Node) -> list[tuple[StoredSnapshot, Snapshot]]:
        """Put in place what is stored of `node`, which nobody has written to yet.

        Raises:
            DeviceError: a sidecar cannot be written.
        """
        restored: list[tuple[StoredSnapshot, Snapshot]] = []
        for stored in await self._executor.run(
            lambda: self._store.load(node.name, source_identity(node.bottom))
        ):
            snapshot = await make_snapshot(plan_of(node, stored))
            snapshot.filter.notes_of_breaking.append(stored.note_broken)
            async with drained(node):
                snapshot.insert()
            snapshot.created = stored.header.created
            restored.append((stored, snapshot))
        return restored

    async def release(self, node: Node, stored: StoredSnapshot) -> None:
        """Save `stored`, whose filter is out. A failure is logged: it is as after a crash then."""
        self._store.retire(stored)
        try:
            # First: what was not saved is in the source.
            await flush_source(node)
            await self._executor.run(lambda: self._store.release(stored, source_identity(node.bottom)))
            logger.info("snapshot %s is kept", stored.header.export_name)
        except OSError as error:
            logger.error(
                "snapshot %s cannot be saved in %s: %s; it is as after a crash",
                stored.header.export_name,
                stored.file.path,
                error.strerror or error,
            )
        stored.close()

    async def free_scratch(self, stored: StoredSnapshot) -> None:
        """Give back what the scratch of a broken snapshot takes, once it is closed.

        Raises:
            OSError: it stays until the snapshot is dropped.
        """
        scratch_fd = stored.dup_scratch()
        if scratch_fd is None:
            return
        try:
            await self._executor.run(os.ftruncate, scratch_fd, 0)
            reach("snapshot.break.freed")
        finally:
            os.close(scratch_fd)

    async def remove(self, stored: StoredSnapshot) -> None:
        """Remove the files of `stored`, which was withdrawn. A failure is logged: the next start will."""
        self._store.retire(stored)
        try:
            await self._executor.run(stored.remove)
            await self._executor.run(self._store.sync_directory)
        except OSError as error:
            logger.error(
                "cannot remove the files of snapshot %s (%s): %s",
                stored.header.export_name,
                stored.file.path,
                error.strerror or error,
            )
        stored.close()

    async def remove_at_rest(self, export_name: str) -> None:
        """Remove one that nobody can read.

        Raises:
            DeviceError: it cannot be removed.
        """
        try:
            await self._executor.run(self._store.remove_at_rest, export_name)
            await self._executor.run(self._store.sync_directory)
        except OSError as error:
            raise failed(error, f"cannot remove snapshot {export_name}") from error
        except KeyError:
            raise ConflictError(f"snapshot {export_name} is being dropped already") from None


def plan_of(node: Node, stored: StoredSnapshot) -> SnapshotPlan:
    """How the snapshot is to be made again, or for the first time."""
    header = stored.header
    return SnapshotPlan(
        node,
        header.name,
        stored.scratch,
        OnCbwError(header.on_cbw_error),
        header.cbw_timeout_s,
        stored.file,
    )


def info_at_rest(found: SnapshotAtRest) -> SnapshotInfo:
    """What users see of one that nobody can read."""
    header = found.header
    if header is None:
        node, _, name = found.export_name.rpartition("@")
        return SnapshotInfo(
            node, name, found.export_name, (), None, 0, 0, 0, None, found.cause, persistent=True
        )
    return SnapshotInfo(
        node=header.node,
        name=header.name,
        export=header.export_name,
        uris=(),
        created=header.created,
        size=header.identity.size,
        cluster_size=header.cluster_bytes,
        scratch_used=scratch_bytes_used(header),
        scratch_max=header.scratch_bytes_max,
        cause=found.cause or f"there is no node {header.node}",
        persistent=True,
    )
