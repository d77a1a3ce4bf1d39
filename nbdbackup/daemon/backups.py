"""Starting backups: everything that can be refused is refused before anything has changed."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.block.node import Node, drained
from nbdbackup.block.open import is_remote
from nbdbackup.daemon.graph import Graph, is_same_server, refuse_same_file
from nbdbackup.errors import ConflictError, UsageError
from nbdbackup.fleece.block_copy import CHUNK_BYTES_MAX, CLUSTER_BYTES_DEFAULT
from nbdbackup.fleece.scratch import open_scratch
from nbdbackup.fleece.snapshots import SnapshotPlan, take_snapshots
from nbdbackup.job.backup import WORKERS_MAX, BackupJob, BackupOptions
from nbdbackup.job.events import Event
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.target import BACKUP_USER, ExistingTarget, Target, open_target
from nbdbackup.monitor.context import BackupRequest, TargetNode

logger = logging.getLogger(__name__)

CLUSTER_BYTES_MAX = 64 << 20


class Backups:
    """Implements the monitor's `BackupService`."""

    def __init__(
        self,
        graph: Graph,
        jobs: JobRegistry,
        scratch_directory: Path,
        remote: RemoteOptions,
        own_uris: Callable[[], Sequence[str]],
    ) -> None:
        """`remote` is how remote targets are used; `own_uris` are those that this daemon listens on."""
        self._graph = graph
        self._jobs = jobs
        self._scratch_directory = scratch_directory
        self._remote = remote
        self._own_uris = own_uris

    async def start(self, request: BackupRequest) -> str:
        """Take the point in time and start the job; its id."""
        node = self._graph.get(request.node)
        self._graph.check_point_in_time(node)
        options = _options(request)
        job_id = self._jobs.new_id(request.job_id)
        target = await self._open_target(node, request)
        try:
            job = BackupJob(job_id, node, target, options)
            self._jobs.add(job)
        except BaseException:
            await _give_up(target)
            raise
        try:
            await self._take_point_in_time(job, request)
        except BaseException:
            self._jobs.discard(job)
            await _give_up(target)
            raise
        self._jobs.start(job)
        logger.info("%s: backup of %s to %s started", job_id, node, target.device)
        return job_id

    @staticmethod
    def log_event(event: Event) -> None:
        """Tell the log how a job ended; a listener for `JobRegistry.subscribe`."""
        if event.name == "BLOCK_JOB_CANCELLED":
            logger.info("%s: cancelled", event.data["device"])
        elif event.name == "BLOCK_JOB_COMPLETED" and "error" in event.data:
            logger.error("%s: failed: %s", event.data["device"], event.data["error"])
        elif event.name == "BLOCK_JOB_COMPLETED":
            logger.info("%s: complete", event.data["device"])

    async def _open_target(self, node: Node, request: BackupRequest) -> Target:
        target = request.target
        if isinstance(target, TargetNode):
            return self._existing_node(node, target.node)
        if is_remote(target.path):
            self._refuse_own(node, target.path)
        elif not os.path.isabs(target.path):
            raise UsageError(f"{target.path} is no absolute path")
        refuse_same_file(node.root, target.path)
        return await open_target(target.path, node.size, existing=target.existing, remote=self._remote)

    def _refuse_own(self, node: Node, uri: str) -> None:
        if str(node.root) == uri:
            raise UsageError("Source and target cannot be the same")
        for own in self._own_uris():
            # It could be the source by another name, and writing to that would destroy it.
            if is_same_server(uri, own):
                raise UsageError(f"{uri} is an export of this very server: choose another target")

    def _existing_node(self, node: Node, name: str) -> Target:
        entry = self._graph.entry(name)
        if entry.node is node or entry.node.root is node.root:
            raise UsageError("Source and target cannot be the same")
        refuse_same_file(node.root, entry.filename)
        if BACKUP_USER in entry.users:
            raise ConflictError(f"Node '{name}' is in use: by {BACKUP_USER}")
        if entry.node.read_only:
            raise ConflictError(f"Block node '{name}' is read-only")
        if entry.node.size != node.size:
            raise UsageError("Source and target image have different sizes")
        return ExistingTarget(entry.node, users=entry.users)

    async def _take_point_in_time(self, job: BackupJob, request: BackupRequest) -> None:
        place = self._scratch_place(request)
        if place is None:
            async with drained(job.node):
                job.hold_direct()
            return
        title = f"scratch of backup {job.id}"
        scratch = open_scratch(place, job.node.size, CLUSTER_BYTES_DEFAULT, request.scratch_bytes_max, title)
        plan = SnapshotPlan(job.node, job.id, scratch, request.on_cbw_error, job.options.cbw_timeout_s)
        try:
            [snapshot] = await take_snapshots([plan])
        except BaseException:
            await scratch.close()
            raise
        self._graph.announcer.watch(snapshot)
        job.hold_fleecing(snapshot)

    def _scratch_place(self, request: BackupRequest) -> Path | None:
        """Where old clusters are saved; None: straight in the target."""
        if request.scratch not in ("none", "auto"):
            return Path(request.scratch)
        # Across a network, every client write would wait for the target.
        remote = not isinstance(request.target, TargetNode) and is_remote(request.target.path)
        return self._scratch_directory if request.scratch == "auto" and remote else None


def _options(request: BackupRequest) -> BackupOptions:
    if request.sync != "full":
        raise UsageError(f"sync={request.sync} is not available in this version: only full is")
    if not 1 <= request.workers <= WORKERS_MAX:
        raise UsageError(f"max-workers must be from 1 to {WORKERS_MAX}")
    cluster_bytes = max(CLUSTER_BYTES_DEFAULT, request.cluster_bytes_min)
    if cluster_bytes & (cluster_bytes - 1) or cluster_bytes > CLUSTER_BYTES_MAX:
        raise UsageError(f"min-cluster-size must be a power of two up to {CLUSTER_BYTES_MAX}")
    if 0 < request.chunk_bytes_max < cluster_bytes:
        raise UsageError(
            f"Required max-chunk ({request.chunk_bytes_max}) is less than "
            f"backup cluster size ({cluster_bytes})"
        )
    return BackupOptions(
        speed=request.speed,
        workers=request.workers,
        chunk_bytes_max=request.chunk_bytes_max or CHUNK_BYTES_MAX,
        cluster_bytes=cluster_bytes,
        use_copy_range=request.use_copy_range,
        on_cbw_error=request.on_cbw_error,
        auto_finalize=request.auto_finalize,
        auto_dismiss=request.auto_dismiss,
    )


async def _give_up(target: Target) -> None:
    await target.discard()
    await target.close()
