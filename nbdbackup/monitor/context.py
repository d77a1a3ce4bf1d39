"""What command handlers are given: requests, answers, and the services that do the work.

The handlers translate between QMP and these plain types, and do nothing else. The daemon
implements the services; a service raises NbdBackupError or OSError for whatever a user
can cause, with a line for that user, and has then changed nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from nbdbackup.errors import NbdBackupError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.registry import JobRegistry
from nbdbackup.monitor.services_exports import ExportService
from nbdbackup.monitor.services_graph import GraphService


@dataclass(frozen=True, slots=True)
class SnapshotOptions:
    """How a snapshot is kept."""

    name: str | None = None
    """None: the UTC time, as 20261123T030405Z."""
    scratch: str | None = None
    """A directory or file for the saved clusters; None: the state directory."""
    scratch_bytes_max: int | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout_s: float = 0.0
    """0: no limit."""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One live point in time. Sizes are bytes."""

    node: str
    name: str
    export: str
    """`NODE@NAME`."""
    uris: Sequence[str]
    created: datetime
    """UTC."""
    size: int
    cluster_size: int
    scratch_used: int
    scratch_max: int | None
    cause: str | None = None
    """Why it is broken; None: it is not."""


class SnapshotService(Protocol):
    """Points in time of nodes."""

    async def create(self, nodes: Sequence[str], options: SnapshotOptions) -> Sequence[SnapshotInfo]:
        """Take one instant of all `nodes`; all of them or none."""

    async def drop(self, exports: Sequence[str]) -> None:
        """End the snapshots called `NODE@NAME`; none if one of them does not exist."""

    def list(self) -> Sequence[SnapshotInfo]:
        """Every live snapshot."""


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


class Step(Protocol):
    """One step of a transaction; a service makes it, `TransactionService.run` takes it."""

    async def ready(self) -> None:
        """Do what takes time. The rest of a step is between the services."""


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
