"""Snapshots as users see them: made together, exported as `NODE@NAME`, dropped by that name."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from nbdbackup.block.node import Node
from nbdbackup.daemon.graph import Graph
from nbdbackup.errors import ConflictError, NotFoundError, UsageError
from nbdbackup.fleece.block_copy import CLUSTER_BYTES_DEFAULT
from nbdbackup.fleece.scratch import open_scratch
from nbdbackup.fleece.snapshots import Snapshot, SnapshotPlan, take_snapshots
from nbdbackup.monitor.context import SnapshotInfo, SnapshotOptions
from nbdbackup.nbd.constants import STRING_BYTES_MAX
from nbdbackup.server.exports import Export
from nbdbackup.server.server import Server

logger = logging.getLogger(__name__)

NAME_CHARACTERS_MAX = 255


class Snapshots:
    """The live snapshots; implements the monitor's `SnapshotService`."""

    def __init__(self, graph: Graph, server: Server, scratch_directory: Path) -> None:
        self._graph = graph
        self._server = server
        self._scratch_directory = scratch_directory
        # Changing while running.
        self._snapshots: dict[str, Snapshot] = {}
        self._names_being_made: set[str] = set()
        self._ending: set[Snapshot] = set()

    def list(self) -> Sequence[SnapshotInfo]:
        """Every live snapshot, the oldest first."""
        return [self._info(snapshot) for snapshot in self._snapshots.values()]

    async def create(self, nodes: Sequence[str], options: SnapshotOptions) -> Sequence[SnapshotInfo]:
        """Take one instant of all `nodes`; all of them or none."""
        name = options.name if options.name is not None else f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        _check_name(name)
        found = [self._graph.get(node) for node in nodes]
        place = Path(options.scratch) if options.scratch is not None else None
        _check_set(nodes, place)
        export_names = [f"{node.name}@{name}" for node in found]
        for export_name in export_names:
            self._check_free(export_name)
        self._names_being_made.update(export_names)
        try:
            taken = await self._take(found, name, options, place)
        finally:
            self._names_being_made.difference_update(export_names)
        for snapshot in taken:
            self._offer(snapshot)
        return [self._info(snapshot) for snapshot in taken]

    async def drop(self, exports: Sequence[str]) -> None:
        """End the snapshots called `NODE@NAME`; none if one of them does not exist."""
        for export_name in exports:
            if export_name not in self._snapshots:
                raise NotFoundError(f"there is no snapshot {export_name}")
        ending = [self._snapshots.pop(export_name) for export_name in dict.fromkeys(exports)]
        # No await before all are out of the list: another drop must not find them there.
        self._ending.update(ending)
        for snapshot in ending:
            self._server.exports.remove(snapshot.export_name, f"snapshot {snapshot.export_name} was dropped")
        await self._end(ending)

    async def close(self) -> None:
        """Drop all of them, and finish every drop that was cut short."""
        await self.drop(tuple(self._snapshots))
        await self._end(tuple(self._ending))

    async def _end(self, snapshots: Sequence[Snapshot]) -> None:
        for snapshot in snapshots:
            await snapshot.drop()
            self._ending.discard(snapshot)
            logger.info("snapshot %s dropped", snapshot.export_name)

    async def _take(
        self, nodes: Sequence[Node], name: str, options: SnapshotOptions, place: Path | None
    ) -> Sequence[Snapshot]:
        plans: list[SnapshotPlan] = []
        try:
            for node in nodes:
                scratch = open_scratch(
                    place or self._scratch_directory,
                    node.size,
                    CLUSTER_BYTES_DEFAULT,
                    options.scratch_bytes_max,
                    f"scratch of {node.name}@{name}",
                )
                plans.append(SnapshotPlan(node, name, scratch, options.on_cbw_error, options.cbw_timeout_s))
            return await take_snapshots(plans)
        except BaseException:
            for plan in plans:
                await plan.scratch.close()
            raise

    def _offer(self, snapshot: Snapshot) -> None:
        self._snapshots[snapshot.export_name] = snapshot
        logger.info("snapshot %s taken", snapshot.export_name)
        description = f"{snapshot.plan.node.name} as it was at {snapshot.created.isoformat('T', 'seconds')}"
        exports = self._server.exports
        tls_only, authorised = exports.access_to(snapshot.plan.node)
        exports.add(
            Export(
                snapshot.export_name,
                snapshot.view,
                description,
                read_only=True,
                tls_only=tls_only,
                authorised=authorised,
            )
        )

    def _check_free(self, export_name: str) -> None:
        if len(export_name.encode()) > STRING_BYTES_MAX:
            raise UsageError(f"{export_name[:40]}... is too long for an export: choose a shorter --name")
        if export_name in self._snapshots or export_name in self._names_being_made:
            raise ConflictError(f"snapshot {export_name} exists already: drop it, or choose another --name")
        if export_name in self._server.exports:
            raise ConflictError(f"there is an export called {export_name} already: choose another --name")

    def _info(self, snapshot: Snapshot) -> SnapshotInfo:
        plan, broken = snapshot.plan, snapshot.broken
        return SnapshotInfo(
            node=plan.node.name,
            name=plan.name,
            export=plan.export_name,
            uris=self._server.uris(plan.export_name),
            created=snapshot.created,
            size=plan.node.size,
            cluster_size=snapshot.block_copy.cluster_bytes,
            scratch_used=plan.scratch.bytes_used,
            scratch_max=plan.scratch.bytes_max,
            cause=None if broken is None else (broken.strerror or str(broken)),
        )


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
