"""KeptJobs: backup jobs that outlive the daemon. Made for a backup, put back for a node, left at the end.

A job is put back as it was, on a node that nobody could write to yet: the filter is in place before the first
client is, and the job rests until a user resumes it (`job resume`), unless all are to be resumed at once. One
that cannot go on is listed as a job that has failed, with the reason, until it is dismissed.
"""

import asyncio
import errno
import logging
import os
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.file import FileDevice
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.block.node import Node, drained
from nbdbackup.block.open import is_remote
from nbdbackup.crash_points import reach
from nbdbackup.daemon.graph import Entry, Graph
from nbdbackup.daemon.jobs.record import JobRecord
from nbdbackup.daemon.jobs.store import JobStore, LostJob
from nbdbackup.daemon.partials import PartialFiles
from nbdbackup.daemon.stored_bitmaps import SIGN_OF_LIFE_S, source_identity
from nbdbackup.daemon.stored_snapshots import plan_of
from nbdbackup.errors import ConflictError, DeviceError, NbdBackupError
from nbdbackup.fleece.snapshot_format import SnapshotFlags
from nbdbackup.fleece.snapshot_store import NewSnapshot, StoredSnapshot
from nbdbackup.fleece.snapshots import INLINE_CLUSTERS_MAX, make_snapshot
from nbdbackup.job.backup import BackupOptions
from nbdbackup.job.job import Job
from nbdbackup.job.kept_backup import KeptBackup
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.sync import FrozenBitmap, Sync, SyncMode
from nbdbackup.job.target import ExistingTarget, RemoteTarget, Target
from nbdbackup.monitor.services_backup import BackupRequest, TargetPath

logger = logging.getLogger(__name__)

INTERRUPTED = "interrupted"


class NewJob(msgspec.Struct, frozen=True):
    """A backup that is to be kept; with `scratch` None old clusters go straight to the target."""

    node: Node
    job_id: str
    request: BackupRequest
    sync: Sync
    options: BackupOptions
    target: Target
    scratch: Path | None


class KeptJob:
    """One job on disk, in use; the `job.keeping.Keeper` of that job."""

    def __init__(self, jobs: "KeptJobs", record: JobRecord, stored: StoredSnapshot, node: Node) -> None:
        self.record = record
        self.stored = stored
        self._jobs = jobs
        self._node = node

    @property
    def uuid(self) -> bytes:
        """Of the job; the holder of its bitmap."""
        return self.stored.header.uuid

    def maps(self) -> tuple[ClusterBitmap, ClusterBitmap]:
        """Access and done, as they stand in the file."""
        return self.stored.file.access(), self.stored.file.done()

    def go_live(self) -> None:
        """This is the instant, and the filter is in place. Cannot fail."""
        self.stored.go_live(datetime.now(UTC))
        reach("job.start.live")

    def withdraw(self) -> None:
        if SnapshotFlags.LIVE in self.stored.header.flags:
            self.stored.withdraw()

    def note_broken(self, cause: OSError) -> None:
        self.stored.note_broken(cause)

    async def remove(self) -> None:
        await self._jobs.remove(self)

    async def leave(self) -> None:
        await self._jobs.save(self, self._node)


class KeptJobs:
    """The jobs whose files are in `directory`; `resumes`: those that are put back go on at once."""

    def __init__(
        self,
        directory: Path,
        graph: Graph,
        jobs: JobRegistry,
        partials: PartialFiles,
        remote: RemoteOptions,
        *,
        resumes: bool,
    ) -> None:
        # Set once.
        self._graph = graph
        self._jobs = jobs
        self._partials = partials
        self._remote = remote
        self._resumes = resumes
        # One thread: two jobs of one name must not be made at the same time.
        self._executor = IoExecutor("jobs", threads_max=1)
        self.store = JobStore(directory)
        jobs.is_reserved = self.store.waits
        partials.owners.append(self.store.partials_at_rest)
        # Changing while running.
        self._kept: list[KeptBackup] = []

    async def open(self) -> None:
        """Look at what is there. Raises what `JobStore.open` does."""
        await self._executor.run(self.store.open)

    async def close(self) -> None:
        """Save the jobs that were left, when nobody uses their nodes any more."""
        for job in self._kept:
            if job.is_left:
                await self._put_by(job)
        self._executor.shutdown()

    async def _put_by(self, job: KeptBackup) -> None:
        try:
            await job.put_by()
        except (NbdBackupError, OSError) as error:
            logger.error("backup %s of %s is as after a crash: %s", job.id, job.node, error)
            return
        logger.info(
            "backup %s of %s is kept, %d of %d bytes done: the next server of %s goes on with it",
            job.id,
            job.node,
            job.current_progress,
            job.total_progress,
            job.node,
        )

    async def keep_alive(self) -> None:
        """Give signs of life, until cancelled."""
        while True:
            self.store.give_sign_of_life()
            await asyncio.sleep(SIGN_OF_LIFE_S)

    # New jobs.

    @staticmethod
    def can_keep(request: BackupRequest, sync: Sync, node: Node, scratch: Path | None) -> bool:
        """Whether such a backup can be kept."""
        if not isinstance(request.target, TargetPath) or sync.mode is SyncMode.NONE or not node.size:
            return False
        # A client's write would wait for a server that may be gone.
        return scratch is not None or not is_remote(request.target.path)

    async def create(self, new: NewJob) -> KeptJob | None:
        """Keep a job from its beginning; None, and a warning, if that cannot be."""
        making = asyncio.ensure_future(self._executor.run(self._create, new))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            with suppress(NbdBackupError, OSError):
                kept = await making
                if new.scratch is not None:
                    await kept.stored.scratch.close()
                await self.remove(kept)
            raise
        except (NbdBackupError, OSError) as error:
            logger.warning("backup %s of %s would end with the server: %s", new.job_id, new.node, error)
            return None

    def _create(self, new: NewJob) -> KeptJob:
        own_id = uuid.uuid4()
        record = _record_of(new, own_id)
        held_fd = None
        if record.is_direct:
            held_fd = new.target.device.offload_fd()
            if held_fd is None:
                raise DeviceError(errno.ENOTSUP, f"{new.target.device} is no file")
        snapshot = NewSnapshot(
            record.node,
            record.job_id,
            record.cluster_bytes,
            new.scratch or Path(record.written_path),
            None if record.is_direct else new.request.scratch_bytes_max,
            record.on_cbw_error.value,
            record.cbw_timeout_s,
            held_fd=held_fd,
            is_target=record.is_direct,
            access_all=not record.sync.copies_dirty,
            own_id=own_id,
        )
        stored = self.store.create_job(record, snapshot, source_identity(new.node.bottom))
        if not record.is_direct:
            _ = stored.scratch  # made here, in a thread
        return KeptJob(self, record, stored, new.node)

    def note_job(self, job: KeptBackup) -> None:
        """`job` is kept from now on."""
        self._kept.append(job)

    async def remove(self, kept: KeptJob) -> None:
        """Remove the files of a job that was withdrawn. A failure is logged: the next start will."""
        self.store.retire(kept.stored)
        try:
            await self._executor.run(self.store.remove_job, kept.record, kept.stored)
        except OSError as error:
            logger.error(
                "cannot remove the files of backup %s (%s): %s",
                kept.record.job_id,
                kept.stored.file.path,
                error.strerror or error,
            )
        kept.stored.close()

    async def save(self, kept: KeptJob, node: Node) -> None:
        """Save `kept`, whose filter is out. A failure is logged: it is as after a crash then."""
        self.store.retire(kept.stored)
        try:
            await self._executor.run(
                lambda: self.store.release_job(kept.record, kept.stored, source_identity(node.bottom))
            )
        except OSError as error:
            logger.error(
                "backup %s cannot be saved in %s: %s; it is as after a crash",
                kept.record.job_id,
                kept.stored.file.path,
                error.strerror or error,
            )
        kept.stored.close()

    # Jobs of an earlier process.

    async def load(self, entry: Entry) -> None:
        """Put the node's stored jobs in place, before anybody writes to it.

        Raises:
            NbdBackupError: a file cannot be used.
        """
        for record in self.store.of_node(entry.node.name):
            if record.is_complete():
                await self._finish(entry, record)
            else:
                await self._put_back(entry, record)

    async def release(self, entry: Entry) -> None:
        """Nothing: a node with a job on it stays."""
        del entry

    async def _finish(self, entry: Entry, record: JobRecord) -> None:
        """The process died when the target had its name, and did the rest no more."""
        bitmap = _frozen_bitmap(entry, record)
        if bitmap is not None:
            bitmap.succeed()
        with suppress(OSError):
            os.unlink(record.written_path)
        try:
            await self._executor.run(self.store.remove_at_rest, record.export_name)
        except OSError as error:
            logger.error("cannot remove what is left of backup %s: %s", record.job_id, error.strerror)
        logger.info(
            "backup %s of %s to %s was complete when its server died",
            record.job_id,
            record.node,
            record.target,
        )

    async def _put_back(self, entry: Entry, record: JobRecord) -> None:
        node = entry.node
        taken = await self._executor.run(lambda: self.store.take_job(record, source_identity(node.bottom)))
        if isinstance(taken, LostJob):
            self._list_lost(taken)
            return
        kept = KeptJob(self, record, taken, node)
        try:
            target = await self._open_target(record, node.size)
        except (NbdBackupError, OSError) as error:
            reason = f"its target cannot be used: {error}"
            kept.note_broken(DeviceError(errno.EIO, reason))
            self.store.retire(taken)
            await self._executor.run(self.store.release, taken, source_identity(node.bottom))
            taken.close()
            self._list_lost(LostJob(record, reason))
            return
        job = await self._make_job(kept, node, target)
        await self._hold_again(job, kept, entry)
        self._jobs.add(job)
        self.note_job(job)
        if not self._resumes:
            job.pause(INTERRUPTED)
        self._jobs.start(job)
        logger.info(
            "backup %s of %s to %s, which was interrupted, %s: %d of %d bytes done",
            job.id,
            node,
            record.target,
            "goes on" if self._resumes else f"waits for: nbdbackup job resume {job.id}",
            job.current_progress,
            job.total_progress,
        )

    async def _open_target(self, record: JobRecord, size: int) -> Target:
        if record.is_remote:
            # Whether it is there is found out when the job goes on: nobody waits for it now.
            return RemoteTarget(record.target, size, self._remote, None)
        if record.existing:
            return ExistingTarget(await self._executor.run(FileDevice.open, record.target))
        return await self._executor.run(self._partials.take_over, record.target, size)

    async def _make_job(self, kept: KeptJob, node: Node, target: Target) -> KeptBackup:
        record = kept.record

        def make() -> KeptBackup:
            make_maps = kept.maps if record.is_direct else None
            return KeptBackup(record.job_id, node, target, record.options(), kept, make_maps)

        if node.size // record.cluster_bytes <= INLINE_CLUSTERS_MAX:
            return make()
        return await self._executor.run(make)

    async def _hold_again(self, job: KeptBackup, kept: KeptJob, entry: Entry) -> None:
        frozen = _frozen_bitmap(entry, kept.record)
        if kept.record.is_direct:
            async with drained(entry.node):
                job.hold_direct_again(frozen)
            return
        await self._executor.run(lambda: kept.stored.scratch)
        snapshot = await make_snapshot(plan_of(entry.node, kept.stored))
        async with drained(entry.node):
            snapshot.insert()
            job.hold_fleecing_again(snapshot, frozen)
        snapshot.created = kept.stored.header.created
        self._graph.announcer.watch(snapshot)

    def _list_lost(self, lost: LostJob) -> None:
        job = LostBackup(self, lost)
        self._jobs.add(job)
        self._jobs.start(job)

    async def remove_lost(self, record: JobRecord) -> None:
        """Remove what is left of a job that cannot go on. A failure is logged: the next start will."""
        try:
            await self._executor.run(self.store.remove_at_rest, record.export_name)
        except OSError as error:
            logger.error(
                "cannot remove what is left of backup %s: %s", record.job_id, error.strerror or error
            )


class LostBackup(Job):
    """A job of an earlier process that cannot go on: it has failed, and is listed until it is dismissed."""

    def __init__(self, jobs: KeptJobs, lost: LostJob) -> None:
        super().__init__(lost.record.job_id, lost.record.node, auto_dismiss=False)
        self._jobs = jobs
        self._lost = lost

    async def run(self) -> None:
        raise ConflictError(f"its point in time is lost: {self._lost.reason}")

    async def abort(self) -> None:
        await self._jobs.remove_lost(self._lost.record)


def _frozen_bitmap(entry: Entry, record: JobRecord) -> FrozenBitmap | None:
    """The bitmap that was found frozen for the job, as its from now on."""
    bitmap = entry.bitmaps.held_by(bytes.fromhex(record.uuid))
    if not isinstance(bitmap, StoredBitmap) or record.bitmap_mode is None:
        return None
    return FrozenBitmap.adopt(bitmap, record.bitmap_mode)


def _record_of(new: NewJob, own_id: uuid.UUID) -> JobRecord:
    request, options = new.request, new.options
    assert isinstance(request.target, TargetPath)
    target = request.target
    remote = is_remote(target.path)
    record = JobRecord(
        uuid=own_id.hex,
        node=new.node.name,
        job_id=new.job_id,
        target=target.path,
        existing=target.existing,
        is_remote=remote,
        is_direct=new.scratch is None,
        sync=new.sync.mode,
        bitmap=new.sync.bitmap,
        bitmap_mode=new.sync.bitmap_mode,
        speed=options.speed,
        workers=options.workers,
        chunk_bytes_max=options.chunk_bytes_max,
        cluster_bytes=options.cluster_bytes,
        use_copy_range=options.use_copy_range,
        on_source_error=options.policies.on_source_error,
        on_target_error=options.policies.on_target_error,
        on_cbw_error=options.on_cbw_error,
        cbw_timeout_s=float(options.cbw_timeout_s),
        auto_finalize=options.auto_finalize,
        auto_dismiss=options.auto_dismiss,
    )
    return record if remote else record.written_to(os.stat(record.written_path))
