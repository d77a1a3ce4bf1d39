"""Starting backups: blockdev-backup as QEMU has it, and x-nbdbackup-backup, whose target is a path or URI.

The checks of what goes together are the service's, in QEMU's order; here are only those of single arguments
that QEMU does not have.
"""

import os

from nbdbackup.block.open import is_remote
from nbdbackup.errors import UsageError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.backup import WORKERS_DEFAULT, WORKERS_MAX, BackupJob
from nbdbackup.job.error_policy import ErrorPolicies, OnError
from nbdbackup.job.events import Json
from nbdbackup.job.sync import BitmapSyncMode, Sync, SyncMode
from nbdbackup.monitor.actions import action
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.schema import Arguments
from nbdbackup.monitor.services_backup import BackupRequest, TargetNode, TargetPath
from nbdbackup.monitor.steps import Step


class BackupPerf(Arguments, frozen=True, kw_only=True):
    use_copy_range: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: int = 0


class BlockdevBackupArguments(Arguments, frozen=True, kw_only=True):
    job_id: str | None = None
    device: str
    sync: SyncMode
    speed: int = 0
    bitmap: str | None = None
    bitmap_mode: BitmapSyncMode | None = None
    compress: bool = False
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    auto_finalize: bool = True
    auto_dismiss: bool = True
    filter_node_name: str | None = None
    discard_source: bool = False
    x_perf: BackupPerf | None = None
    target: str


class BackupArguments(Arguments, frozen=True, kw_only=True):
    node: str
    target: str
    existing: bool = False
    sync: SyncMode
    bitmap: str | None = None
    bitmap_mode: BitmapSyncMode | None = None
    job_id: str | None = None
    speed: int = 0
    workers: int = WORKERS_DEFAULT
    scratch: str = "auto"
    scratch_max: int | None = None
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    auto_finalize: bool = True
    auto_dismiss: bool = True


class CheckpointArguments(Arguments, frozen=True, kw_only=True):
    id: str


@action("blockdev-backup", BlockdevBackupArguments)
def blockdev_backup(services: Services, arguments: BlockdevBackupArguments) -> Step:
    perf = arguments.x_perf or BackupPerf()
    return services.backups.action(
        BackupRequest(
            node=arguments.device,
            target=TargetNode(arguments.target),
            sync=Sync(arguments.sync, arguments.bitmap, arguments.bitmap_mode),
            job_id=arguments.device if arguments.job_id is None else arguments.job_id,
            speed=arguments.speed,
            workers=perf.max_workers,
            chunk_bytes_max=perf.max_chunk,
            cluster_bytes_min=perf.min_cluster_size,
            use_copy_range=perf.use_copy_range,
            compress=arguments.compress,
            policies=ErrorPolicies(arguments.on_source_error, arguments.on_target_error),
            on_cbw_error=arguments.on_cbw_error,
            filter_node_name=arguments.filter_node_name,
            discard_source=arguments.discard_source,
            auto_finalize=arguments.auto_finalize,
            auto_dismiss=arguments.auto_dismiss,
        )
    )


@command("x-nbdbackup-backup", BackupArguments)
async def backup(services: Services, arguments: BackupArguments) -> Json:
    _check_places(arguments)
    if arguments.speed < 0:
        raise UsageError("Parameter 'speed' expects a non-negative value")
    if not 1 <= arguments.workers <= WORKERS_MAX:
        raise UsageError(f"Parameter 'workers' expects a number between 1 and {WORKERS_MAX}")
    request = BackupRequest(
        node=arguments.node,
        target=TargetPath(arguments.target, arguments.existing),
        sync=Sync(arguments.sync, arguments.bitmap, arguments.bitmap_mode),
        job_id=arguments.job_id,
        speed=arguments.speed,
        workers=arguments.workers,
        scratch=arguments.scratch,
        scratch_bytes_max=arguments.scratch_max,
        policies=ErrorPolicies(arguments.on_source_error, arguments.on_target_error),
        on_cbw_error=arguments.on_cbw_error,
        auto_finalize=arguments.auto_finalize,
        auto_dismiss=arguments.auto_dismiss,
    )
    return {"job-id": await services.backups.start(request)}


@command("x-nbdbackup-job-checkpoint", CheckpointArguments)
async def job_checkpoint(services: Services, arguments: CheckpointArguments) -> Json:
    """The point in time of a job with sync=none is now."""
    job = services.jobs.get(arguments.id)
    if not isinstance(job, BackupJob):
        raise UsageError("The backup job only supports block checkpoint in sync=none mode")
    await job.checkpoint()
    return {}


def _check_places(arguments: BackupArguments) -> None:
    target, scratch = arguments.target, arguments.scratch
    if not os.path.isabs(target) and not is_remote(target):
        raise UsageError(f"Parameter 'target' expects an absolute path or an NBD URI, not '{target}'")
    if scratch not in ("auto", "none") and not os.path.isabs(scratch):
        raise UsageError("Parameter 'scratch' expects 'auto', 'none' or the absolute path of a directory")
    if arguments.scratch_max is not None and arguments.scratch_max <= 0:
        raise UsageError("Parameter 'scratch-max' expects a positive number of bytes")
