"""What command handlers are given: requests, answers, and the services that do the work.

The handlers translate between QMP and these plain types, and do nothing else. The daemon
implements the services; a service raises NbdBackupError or OSError for whatever a user
can cause, with a line for that user, and has then changed nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdbackup.errors import NbdBackupError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.registry import JobRegistry
from nbdbackup.monitor.services_bitmaps import BitmapService
from nbdbackup.monitor.services_exports import ExportService
from nbdbackup.monitor.services_graph import GraphService
from nbdbackup.monitor.services_snapshots import CheckpointService, SnapshotService
from nbdbackup.monitor.steps import Step as Step


@dataclass(frozen=True, slots=True)
class TargetPath:
    """Write the backup to this absolute path: a new file, or `existing` as it is; or to this NBD URI."""

    path: str
    existing: bool = False


@dataclass(frozen=True, slots=True)
class TargetNode:
    """Write the backup to this node."""

    node: str


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """A backup of `node` as it is now. Sizes are bytes, `speed` is bytes per second (0: no limit)."""

    node: str
    target: TargetPath | TargetNode
    sync: str = "full"
    job_id: str | None = None
    """None: one is made up."""
    speed: int = 0
    workers: int = 8
    chunk_bytes_max: int = 0
    """0: as the engine likes."""
    cluster_bytes_min: int = 0
    """0: as the engine and the target like; else a power of two."""
    use_copy_range: bool = True
    scratch: str = "none"
    """"none": direct; "auto": direct but for a URI, then in the state directory; or a directory."""
    scratch_bytes_max: int | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    auto_finalize: bool = True
    auto_dismiss: bool = True


class BackupService(Protocol):
    """Backup jobs."""

    async def start(self, request: BackupRequest) -> str:
        """Take the point in time and start the job; its id. The job is listed on return."""


class TransactionService(Protocol):
    """Several steps at one instant."""

    async def run(self, steps: Sequence[Step], *, grouped: bool = False) -> None:
        """Take all of `steps`, or none. `grouped`: if a job of theirs fails, all are cancelled."""

    def failing(self, error: NbdBackupError) -> Step:
        """A step that fails with `error`."""


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that commands act on."""

    jobs: JobRegistry
    snapshots: SnapshotService
    backups: BackupService
    graph: GraphService
    transactions: TransactionService
    request_shutdown: Callable[[], None]
    """Begin an orderly end of the daemon; returns at once."""
    exports: ExportService
    bitmaps: BitmapService
    checkpoints: CheckpointService
