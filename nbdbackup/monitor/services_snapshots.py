"""What the commands about snapshots and checkpoints ask for, and what they are told."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from nbdbackup.fleece.copy_before_write import OnCbwError


class SnapshotOptions(msgspec.Struct, frozen=True):
    """How a snapshot is kept."""

    name: str | None = None
    """None: the UTC time, as 20261123T030405Z."""
    scratch: str | None = None
    """A directory or file for the saved clusters; None: the state directory."""
    scratch_bytes_max: int | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout_s: float = 0.0
    """0: no limit."""
    bitmap: str | None = None
    """A bitmap of each node that is frozen from that instant on, until the snapshot is dropped."""
    temporary: bool = False
    """It ends with the server."""


class SnapshotInfo(msgspec.Struct, frozen=True):
    """One point in time, live or broken. Sizes are bytes."""

    node: str
    name: str
    export: str
    """`NODE@NAME`."""
    uris: Sequence[str]
    created: datetime | None
    """UTC; None: its file is damaged, and nobody knows, nor the sizes, which are 0."""
    size: int
    cluster_size: int
    scratch_used: int
    scratch_max: int | None
    cause: str | None = None
    """Why it is broken; None: it is not."""
    bitmap: str | None = None
    """The bitmap that is frozen with it, if any."""
    persistent: bool = False
    """Whether it outlives the server."""


class SnapshotService(Protocol):
    """Points in time of nodes."""

    async def create(self, nodes: Sequence[str], options: SnapshotOptions) -> Sequence[SnapshotInfo]:
        """Take one instant of all `nodes`; all of them or none."""

    async def drop(self, exports: Sequence[str], *, pulled: bool = False) -> None:
        """End the snapshots called `NODE@NAME`; none if one of them does not exist.

        `pulled`: somebody has a whole copy of each. Then what was dirty in a bitmap frozen with it is
        dealt with; else the bitmap has it again.
        """

    def list(self) -> Sequence[SnapshotInfo]:
        """Every snapshot."""


class CheckpointInfo(msgspec.Struct, frozen=True):
    """One checkpoint of one node."""

    node: str
    name: str
    uuid: str
    parent: str | None
    """The checkpoint before it; None: there is none."""
    created: datetime
    """UTC."""
    dirty: int
    """Bytes that changed from this checkpoint to the next one, or to now, in whole granules."""
    granularity: int
    inconsistent: str = ""
    """Why nobody knows what changed since, so that the next backup has to be full; "": it is known."""


class CheckpointService(Protocol):
    """Checkpoints: points in time since which changes are known."""

    async def create(self, nodes: Sequence[str], options: SnapshotOptions) -> Sequence[SnapshotInfo]:
        """A checkpoint of all `nodes` at one instant, and a snapshot of the same; all of them or none."""

    async def delete(self, nodes: Sequence[str], name: str) -> Sequence[CheckpointInfo]:
        """Forget the checkpoint `name` of `nodes`, or of all that have it; those that there were."""

    def list(self) -> Sequence[CheckpointInfo]:
        """Every checkpoint, the oldest of each node first."""
