"""What the commands about backups ask for, and the service that does it."""

from typing import Protocol

import msgspec

from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.error_policy import REPORT_ERRORS, ErrorPolicies
from nbdbackup.job.sync import Sync
from nbdbackup.monitor.steps import Step


class TargetPath(msgspec.Struct, frozen=True):
    """Write the backup to this absolute path: a new file, or `existing` as it is; or to this NBD URI."""

    path: str
    existing: bool = False


class TargetNode(msgspec.Struct, frozen=True):
    """Write the backup to this node."""

    node: str


FULL = Sync()
"""Everything, and no bitmap."""


class BackupRequest(msgspec.Struct, frozen=True):
    """A backup of `node` as it is now. Sizes are bytes, `speed` is bytes per second (0: no limit)."""

    node: str
    target: TargetPath | TargetNode
    sync: Sync = FULL
    job_id: str | None = None
    """None: one is made up."""
    speed: int = 0
    workers: int = 8
    chunk_bytes_max: int = 0
    """0: as the engine likes."""
    cluster_bytes_min: int = 0
    """0: as the engine and the target like; else a power of two."""
    use_copy_range: bool = True
    compress: bool = False
    scratch: str = "none"
    """"none": direct; "auto": direct but for a URI, then in the state directory; or a directory."""
    scratch_bytes_max: int | None = None
    policies: ErrorPolicies = REPORT_ERRORS
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    filter_node_name: str | None = None
    discard_source: bool = False
    """Give up in the source, a snapshot's view, what was copied."""
    auto_finalize: bool = True
    auto_dismiss: bool = True


class BackupService(Protocol):
    """Backup jobs."""

    def action(self, request: BackupRequest) -> Step:
        """The step of a transaction that takes the point in time and starts the job."""

    async def start(self, request: BackupRequest) -> str:
        """Take that step alone; the job's id. The job is listed on return."""
