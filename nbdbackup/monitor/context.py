"""What command handlers are given: requests, answers, and the services that do the work.

The handlers translate between QMP and these plain types, and do nothing else. The daemon
implements the services; a service raises NbdBackupError or OSError for whatever a user
can cause, with a line for that user, and has then changed nothing.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from nbdbackup.errors import NbdBackupError
from nbdbackup.job.registry import JobRegistry
from nbdbackup.monitor.services_backup import BackupService
from nbdbackup.monitor.services_bitmaps import BitmapService
from nbdbackup.monitor.services_exports import ExportService
from nbdbackup.monitor.services_graph import GraphService
from nbdbackup.monitor.services_snapshots import CheckpointService, SnapshotService
from nbdbackup.monitor.services_state import StateService
from nbdbackup.monitor.steps import Step as Step


class TransactionService(Protocol):
    """Several steps at one instant."""

    async def run(self, steps: Sequence[Step], *, grouped: bool = False) -> None:
        """Take all of `steps`, or none. `grouped`: if a job of theirs fails, all are cancelled."""

    def failing(self, error: NbdBackupError) -> Step:
        """A step that fails with `error`."""


class Services(msgspec.Struct, frozen=True):
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
    state: StateService
