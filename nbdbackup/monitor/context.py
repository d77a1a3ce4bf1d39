"""What command handlers are given: requests, answers, and the services that do the work.

The handlers translate between QMP and these plain types, and do nothing else. The daemon
implements the services; a service raises NbdBackupError or OSError for whatever a user
can cause, with a line for that user, and has then changed nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdbackup.errors import NbdBackupError
from nbdbackup.job.registry import JobRegistry
from nbdbackup.monitor.services_backup import BackupService
from nbdbackup.monitor.services_bitmaps import BitmapInfo, BitmapService
from nbdbackup.monitor.services_snapshots import CheckpointService, SnapshotService
from nbdbackup.monitor.steps import Step as Step


@dataclass(frozen=True, slots=True)
class FileNode:
    """A new node `name` on the file or block device `filename`."""

    name: str
    filename: str
    driver: str = "file"
    """What the node says it is: file or raw."""
    read_only: bool = False
    unmap: bool = True
    """Whether trim and write_zeroes may give space back."""


@dataclass(frozen=True, slots=True)
class RawNode:
    """A new node `name` that passes everything on to the node `child`."""

    name: str
    child: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node as it stands. Sizes are bytes."""

    name: str
    driver: str
    filename: str
    size: int
    read_only: bool
    allocated: int | None = None
    """What it takes up on its file system, where that is known."""
    bitmaps: Sequence[BitmapInfo] = ()


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An NBD export."""

    name: str
    node: str


class GraphService(Protocol):
    """Nodes and exports."""

    def nodes(self) -> Sequence[NodeInfo]:
        """Every node."""

    def exports(self) -> Sequence[ExportInfo]:
        """Every export."""

    async def add(self, node: FileNode | RawNode) -> None:
        """Open a node."""

    async def delete(self, name: str) -> None:
        """Close the node `name`, which nothing may use."""


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
    bitmaps: BitmapService
    checkpoints: CheckpointService
