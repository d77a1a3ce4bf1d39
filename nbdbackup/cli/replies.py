"""What the server's answers look like, as far as the commands here read them.

Fields that a newer server adds are ignored; what an older one leaves out has a default.
"""

import msgspec


class SnapshotInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """One snapshot: an entry of `x-nbdbackup-query-snapshots`. Sizes are bytes."""

    node: str
    name: str
    export: str
    uris: list[str] = []
    created: str = ""
    size: int = 0
    scratch_used: int = 0
    scratch_max: int | None = None
    state: str = "ok"
    cause: str | None = None


class JobInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """An entry of `query-jobs`. Progress is in bytes."""

    id: str
    status: str
    type: str = ""
    current_progress: int = 0
    total_progress: int = 0
    error: str | None = None
    kept: bool = msgspec.field(name="x-nbdbackup-kept", default=False)
    """It outlives the server."""
    paused_because: str = msgspec.field(name="x-nbdbackup-paused-because", default="")
    source_errors_ignored: int = msgspec.field(name="x-nbdbackup-source-errors-ignored", default=0)


class BlockJobInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """An entry of `query-block-jobs`; `device` is the job's id. The speed is bytes a second, 0 no limit."""

    device: str
    speed: int = 0
    io_status: str = "ok"


class StartedBackup(msgspec.Struct, frozen=True, rename="kebab"):
    """What `x-nbdbackup-backup` returns."""

    job_id: str


class ImageInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """The `image` of a node."""

    virtual_size: int = 0


class ChildInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """A node that another one is made of."""

    child: str = ""
    node_name: str = ""


class BitmapInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """One of the `dirty-bitmaps` of a node; without a name it is a successor. Sizes are bytes."""

    granularity: int
    count: int
    name: str | None = None
    recording: bool = False
    busy: bool = False
    persistent: bool = False
    inconsistent: bool = False
    reason: str = msgspec.field(default="", name="x-nbdbackup-inconsistent-because")


class CheckpointInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """An entry of `x-nbdbackup-query-checkpoints`. `dirty` is in bytes."""

    node: str
    name: str
    uuid: str = ""
    parent: str | None = None
    created: str = ""
    dirty: int = 0
    inconsistent: bool = False
    reason: str = msgspec.field(default="", name="x-nbdbackup-inconsistent-because")


class NodeInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """An entry of `query-named-block-nodes`."""

    node_name: str
    drv: str = ""
    file: str = ""
    ro: bool = False
    image: ImageInfo = ImageInfo()
    write_threshold: int = msgspec.field(default=0, name="write_threshold")
    children: list[ChildInfo] = []
    dirty_bitmaps: list[BitmapInfo] = []


class ExportInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """An entry of `query-block-exports`."""

    id: str
    node_name: str = ""
    shutting_down: bool = False
