"""Starting backups: a step of a transaction, so that everything that can be refused is refused first.

One whose target is a path or a URI, and that is started alone, outlives the daemon if it can (`jobs.kept`).

What is refused, and in which order, is QEMU's: the nodes, the bitmap, both ends the same, compression,
ends in use, x-perf, sizes, what a filter or a target must be, and the job's id and speed at last.
"""

import asyncio
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from nbdbackup.bitmap.dirty import DirtyBitmap, WantedClusters
from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.block.node import Node
from nbdbackup.block.open import is_remote
from nbdbackup.daemon.graph import Entry, Graph, is_same_server, refuse_same_file
from nbdbackup.daemon.jobs.kept import KeptJob, KeptJobs, NewJob
from nbdbackup.daemon.stored_snapshots import plan_of
from nbdbackup.daemon.transaction import Action, run_transaction
from nbdbackup.errors import ConflictError, NbdBackupError, NotFoundError, UsageError
from nbdbackup.fleece.block_copy import CHUNK_BYTES_MAX, CLUSTER_BYTES_DEFAULT
from nbdbackup.fleece.scratch import Scratch, open_scratch
from nbdbackup.fleece.snapshot_access import SnapshotAccess
from nbdbackup.fleece.snapshots import (
    INLINE_CLUSTERS_MAX,
    Snapshot,
    SnapshotPlan,
    make_snapshot,
    make_snapshot_now,
)
from nbdbackup.job.backup import WORKERS_MAX, BackupJob, BackupOptions
from nbdbackup.job.events import Event
from nbdbackup.job.kept_backup import KeptBackup
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.sync import FrozenBitmap, Sync, SyncMode
from nbdbackup.job.target import BACKUP_USER, ExistingTarget, NewFileTarget, Target, open_target
from nbdbackup.job.transaction import JobTransaction
from nbdbackup.monitor.services_backup import BackupRequest, TargetNode, TargetPath

T = TypeVar("T")

logger = logging.getLogger(__name__)

CLUSTER_BYTES_MAX = 64 << 20
WORKERS_ASKED_MAX = (1 << 31) - 1
"""QMP lets clients ask for 2 billion workers; more than WORKERS_MAX would bring nothing."""
NODE_NAME_CHARACTERS_MAX = 31

_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


class Surroundings(msgspec.Struct, frozen=True):
    """What a backup is started in. `own_uris` are those that this daemon listens on."""

    graph: Graph
    jobs: JobRegistry
    scratch_directory: Path
    remote: RemoteOptions
    own_uris: Callable[[], Sequence[str]]
    make_target: Callable[[str, int], NewFileTarget] = NewFileTarget
    kept: KeptJobs | None = None


class Backups:
    """Implements the monitor's `BackupService`."""

    def __init__(
        self,
        graph: Graph,
        jobs: JobRegistry,
        scratch_directory: Path,
        remote: RemoteOptions,
        own_uris: Callable[[], Sequence[str]],
        make_target: Callable[[str, int], NewFileTarget] = NewFileTarget,
        kept: KeptJobs | None = None,
    ) -> None:
        """`remote` is how remote targets are used; `own_uris` are those that this daemon listens on.

        `make_target` makes a new target of a path and a size. `kept` has those that outlive the daemon; None:
        none does.
        """
        self._surroundings = Surroundings(graph, jobs, scratch_directory, remote, own_uris, make_target, kept)

    def action(self, request: BackupRequest) -> "BackupAction":
        """The step of a transaction that starts the backup."""
        return BackupAction(self._surroundings, request)

    async def start(self, request: BackupRequest) -> str:
        """Take the point in time and start the job; its id."""
        action = BackupAction(self._surroundings, request, keeps=True)
        await run_transaction([action])
        return action.job.id

    @staticmethod
    def log_event(event: Event) -> None:
        """Tell the log how a job ended; a listener for `JobRegistry.subscribe`."""
        if event.name == "BLOCK_JOB_CANCELLED":
            logger.info("%s: cancelled", event.data["device"])
        elif event.name == "BLOCK_JOB_COMPLETED" and "error" in event.data:
            logger.error("%s: failed: %s", event.data["device"], event.data["error"])
        elif event.name == "BLOCK_JOB_COMPLETED":
            logger.info("%s: complete", event.data["device"])
        elif event.name == "BLOCK_JOB_ERROR" and event.data["action"] != "report":
            logger.warning(
                "%s: %s failed: %s", *(event.data[key] for key in ("device", "operation", "action"))
            )


class BackupAction(Action):
    """Start one backup. `job` is there once it is prepared."""

    def __init__(self, surroundings: Surroundings, request: BackupRequest, *, keeps: bool = False) -> None:
        """`keeps`: whether the job outlives the daemon, if it can."""
        self._in = surroundings
        self._request = request
        self._keeps = keeps
        self._sync: Sync
        self._node: Node
        self._target_entry: Entry | None = None
        self._target: Target | None = None
        self._scratch: Scratch | None = None
        self._snapshot: Snapshot | None = None
        self._wanted: WantedClusters | None = None
        self._kept: KeptJob | None = None
        self._job: BackupJob | None = None
        self._is_committed = False
        self._together: JobTransaction | None = None

    @property
    def job(self) -> BackupJob:
        """The job, after `prepare`."""
        assert self._job is not None
        return self._job

    def join(self, together: JobTransaction) -> None:
        self._together = together

    async def ready(self) -> None:
        request = self._request
        self._node = self._in.graph.get(request.node)
        if isinstance(request.target, TargetNode):
            self._target_entry = self._in.graph.entry(request.target.node)
        self._sync = request.sync.checked()
        if self._sync.mode is SyncMode.NONE and not _is_there_already(request.target):
            raise UsageError("sync=none never completes a new file: name an existing target")
        place = self._scratch_place()
        options = None if self._target_entry is not None else self._options()
        if isinstance(request.target, TargetPath):
            self._target = await self._open_target(request.target)
        # What is wrong now an earlier step may have mended when it is this one's turn: `prepare` looks again.
        with suppress(NbdBackupError):
            await self._keep(place)
        if place is not None and self._scratch is None:
            cluster_bytes = (options or self._options()).cluster_bytes
            title = f"scratch of a backup of {self._node}"
            self._scratch = open_scratch(
                place, self._node.size, cluster_bytes, request.scratch_bytes_max, title
            )
        with suppress(NbdBackupError):
            await self._make_job()
        if self._job is not None and self._scratch is not None:
            self._snapshot = await make_snapshot(self._plan(self._scratch))
        if self._job is not None and self._sync.mode.copies_dirty:
            await self._look_at_bitmap(self._job)

    async def _keep(self, place: Path | None) -> None:
        kept = self._in.kept
        if kept is None or not self._keeps or not kept.can_keep(self._request, self._sync, self._node, place):
            return
        self._check()
        assert self._target is not None
        job_id = self._in.jobs.new_id(self._request.job_id)
        self._kept = await kept.create(
            NewJob(self._node, job_id, self._request, self._sync, self._options(), self._target, place)
        )
        if self._kept is not None and place is not None:
            self._scratch = self._kept.stored.scratch

    async def _look_at_bitmap(self, job: BackupJob) -> None:
        """Find out what is to be copied; what clients change from now on is added at the instant."""
        bitmap = self._bitmap()
        assert bitmap is not None
        self._wanted = WantedClusters(bitmap, job.options.cluster_bytes)
        for _ in self._wanted.pieces():
            await asyncio.sleep(0)
        wanted, snapshot = self._wanted.clusters, self._snapshot
        await self._aside(lambda: job.expect(wanted, snapshot))

    def nodes(self) -> Sequence[Node]:
        return (self._node,)

    def prepare(self) -> None:
        bitmap = self._check()
        if self._job is None:
            self._job = self._new_job(*self._claim())
        if self._snapshot is None and self._scratch is not None:
            self._snapshot = make_snapshot_now(self._plan(self._scratch))
        self._in.jobs.add(self.job)
        try:
            self._hold(bitmap)
        except BaseException:
            # The bitmap's file could not be written: nothing else here fails, and nothing comes before it.
            self._in.jobs.discard(self.job)
            raise

    def _hold(self, bitmap: DirtyBitmap | None) -> None:
        """This is the instant: keep the point in time, and `bitmap` as it is."""
        expected = self._wanted is not None and self._wanted.bitmap is bitmap
        unexpected = self._wanted.changes() if self._wanted is not None and expected else None
        frozen = None
        if bitmap is not None:
            assert self._sync.bitmap_mode is not None
            holder = None if self._kept is None else self._kept.uuid
            frozen = FrozenBitmap(bitmap, self._sync.bitmap_mode, holder=holder)
        if self._snapshot is None:
            self.job.hold_direct(frozen, unexpected)
        else:
            self._snapshot.insert()
            self.job.hold_fleecing(self._snapshot, frozen, unexpected)
        if self._kept is not None:
            self._kept.go_live()

    def commit(self) -> None:
        self._is_committed = True
        if self._snapshot is not None:
            self._in.graph.announcer.watch(self._snapshot)
        if isinstance(self.job, KeptBackup) and self._in.kept is not None:
            self._in.kept.note_job(self.job)
        self._in.jobs.start(self.job)
        logger.info("%s: backup of %s to %s started", self.job.id, self._node, self.job.target.device)

    def abort(self) -> None:
        if self._kept is not None:
            self._kept.withdraw()
        self.job.let_go()
        if self._snapshot is not None:
            self._snapshot.take_out()
        self._in.jobs.discard(self.job)

    async def clean(self) -> None:
        if self._wanted is not None:
            self._wanted.end()
        if self._is_committed:
            return
        if self._snapshot is not None:
            await self._snapshot.close()
        elif self._scratch is not None:
            await self._scratch.close()
        if self._job is not None:
            await self._job.give_up()
        elif self._target is not None:
            await self._target.discard()
            await self._target.close()
            if self._kept is not None:
                await self._kept.remove()

    # Checks.

    def _check(self) -> DirtyBitmap | None:
        """Refuse whatever there is to refuse, and change nothing; the bitmap that is to be used."""
        bitmap = self._bitmap()
        entry, request = self._target_entry, self._request
        self._in.graph.check_point_in_time(self._node)
        if entry is not None and self._is_source(entry):
            raise UsageError("Source and target cannot be the same")
        if request.compress:
            name = request.target.node if isinstance(request.target, TargetNode) else request.target.path
            raise UsageError(f"Compression is not supported for this drive {name}")
        self._check_unused(entry)
        self._check_perf()
        if entry is not None and entry.node.size != self._node.size:
            raise UsageError("Source and target image have different sizes")
        self._options()
        if entry is not None and entry.node.read_only:
            raise ConflictError("Could not create node: Block node is read-only")
        self._check_filter_name()
        return bitmap

    def _bitmap(self) -> DirtyBitmap | None:
        bitmap = None
        if self._sync.bitmap is not None:
            bitmap = self._in.graph.find_bitmap(self._node.name, self._sync.bitmap)
            if bitmap is None:
                raise NotFoundError(f"Bitmap '{self._sync.bitmap}' could not be found")
        self._sync.check_bitmap(bitmap)
        return bitmap

    def _is_source(self, entry: Entry) -> bool:
        if entry.node is self._node or entry.node.root is self._node.root:
            return True
        refuse_same_file(self._node.root, entry.filename)
        return False

    def _check_unused(self, target: Entry | None) -> None:
        entries = [self._in.graph.entry(self._node.name)]
        if target is not None and self._target is None:
            entries.append(target)
        for entry in entries:
            if BACKUP_USER in entry.users:
                raise ConflictError(
                    f"Node '{entry.node}' is busy: block device is in use by block job: backup"
                )

    def _check_filter_name(self) -> None:
        name = self._request.filter_node_name
        if name is None:
            return
        if not _NODE_NAME.fullmatch(name) or len(name) > NODE_NAME_CHARACTERS_MAX:
            raise UsageError(f"Could not create node: Invalid node-name: '{name}'")
        try:
            self._in.graph.check_free(name)
        except ConflictError as error:
            raise ConflictError(f"Could not create node: {error}") from None

    def _check_perf(self) -> None:
        request = self._request
        if request.discard_source and not isinstance(self._node.root, SnapshotAccess):
            raise UsageError(
                f"discard-source would destroy data of node '{self._node}': it is for snapshot-access nodes"
            )
        if not 1 <= request.workers <= WORKERS_ASKED_MAX:
            raise UsageError(f"max-workers must be between 1 and {WORKERS_ASKED_MAX}")
        if request.chunk_bytes_max < 0:
            raise UsageError("max-chunk must be zero (which means no limit) or positive")
        smallest = request.cluster_bytes_min
        if smallest < 0 or smallest & (smallest - 1):
            raise UsageError("min-cluster-size needs to be a power of 2")
        if smallest > CLUSTER_BYTES_MAX:
            raise UsageError(f"min-cluster-size must not be more than {CLUSTER_BYTES_MAX}")

    def _options(self) -> BackupOptions:
        request = self._request
        self._check_perf()
        return BackupOptions(
            sync=self._sync.mode,
            speed=request.speed,
            workers=min(request.workers, WORKERS_MAX),
            chunk_bytes_max=request.chunk_bytes_max or CHUNK_BYTES_MAX,
            cluster_bytes=_cluster_bytes(request),
            use_copy_range=request.use_copy_range,
            discard_source=request.discard_source,
            policies=request.policies,
            on_cbw_error=request.on_cbw_error,
            auto_finalize=request.auto_finalize,
            auto_dismiss=request.auto_dismiss,
        )

    # What takes time.

    async def _make_job(self) -> None:
        self._check()
        job_id, target = self._claim()
        self._job = await self._aside(lambda: self._new_job(job_id, target))

    async def _aside(self, make: Callable[[], T]) -> T:
        """What `make` returns, which takes time with the maps of a large disk, and then has a thread."""
        if self._node.size // _cluster_bytes(self._request) <= INLINE_CLUSTERS_MAX:
            return make()
        executor = IoExecutor("maps", threads_max=1)
        try:
            return await executor.run(make)
        finally:
            executor.shutdown()

    def _claim(self) -> tuple[str, Target]:
        """A job's id, and the target, which nobody else may use from now on; `_check` found nothing wrong."""
        job_id = self._in.jobs.new_id(
            self._request.job_id if self._kept is None else self._kept.record.job_id
        )
        if self._target is None:
            assert self._target_entry is not None
            self._target = ExistingTarget(self._target_entry.node, users=self._target_entry.users)
        return job_id, self._target

    def _new_job(self, job_id: str, target: Target) -> BackupJob:
        """The job, with its maps: on a disk of many TiB these take time."""
        if self._kept is not None:
            make_maps = self._kept.maps if self._kept.record.is_direct else None
            return KeptBackup(job_id, self._node, target, self._options(), self._kept, make_maps)
        return BackupJob(job_id, self._node, target, self._options(), transaction=self._together)

    def _plan(self, scratch: Scratch) -> SnapshotPlan:
        if self._kept is not None:
            return plan_of(self._node, self._kept.stored)
        options = self.job.options
        return SnapshotPlan(self._node, self.job.id, scratch, options.on_cbw_error, options.cbw_timeout_s)

    async def _open_target(self, target: TargetPath) -> Target:
        node = self._node
        if is_remote(target.path):
            self._refuse_own(node, target.path)
        elif not os.path.isabs(target.path):
            raise UsageError(f"{target.path} is no absolute path")
        refuse_same_file(node.root, target.path)
        return await open_target(
            target.path,
            node.size,
            existing=target.existing,
            remote=self._in.remote,
            make=self._in.make_target,
        )

    def _refuse_own(self, node: Node, uri: str) -> None:
        if str(node.root) == uri:
            raise UsageError("Source and target cannot be the same")
        for own in self._in.own_uris():
            # It could be the source by another name, and writing to that would destroy it.
            if is_same_server(uri, own):
                raise UsageError(f"{uri} is an export of this very server: choose another target")

    def _scratch_place(self) -> Path | None:
        """Where old clusters are saved; None: straight in the target."""
        request = self._request
        if request.scratch not in ("none", "auto"):
            if self._sync.mode is SyncMode.NONE:
                raise UsageError("sync=none saves straight to the target: it has no use for scratch")
            return Path(request.scratch)
        # Across a network, every client write would wait for the target.
        remote = isinstance(request.target, TargetPath) and is_remote(request.target.path)
        wanted = request.scratch == "auto" and remote and self._sync.mode is not SyncMode.NONE
        return self._in.scratch_directory if wanted else None


def _is_there_already(target: TargetPath | TargetNode) -> bool:
    return isinstance(target, TargetNode) or target.existing or is_remote(target.path)


def _cluster_bytes(request: BackupRequest) -> int:
    """The unit of copying."""
    cluster_bytes = max(CLUSTER_BYTES_DEFAULT, request.cluster_bytes_min)
    if 0 < request.chunk_bytes_max < cluster_bytes:
        raise UsageError(
            f"Required max-chunk ({request.chunk_bytes_max}) is less than "
            f"backup cluster size ({cluster_bytes})"
        )
    return cluster_bytes
