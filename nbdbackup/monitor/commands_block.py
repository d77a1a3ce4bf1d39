"""Commands about nodes and exports, and blockdev-backup."""

from enum import Enum
from typing import Annotated, cast

import msgspec

from nbdbackup.errors import UsageError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.commands_bitmaps import bitmap_info
from nbdbackup.monitor.context import (
    BackupRequest,
    ExportInfo,
    FileNode,
    NodeInfo,
    RawNode,
    Services,
    TargetNode,
)
from nbdbackup.monitor.schema import Arguments, NoArguments

MAX_WORKERS_MAX = (1 << 31) - 1
WORKERS_MAX = 64
"""QMP lets clients ask for 2 billion workers; more than this would bring nothing."""


class QueryNodesArguments(Arguments, frozen=True, kw_only=True):
    flat: bool | None = None


class DiscardOption(Enum):
    IGNORE = "ignore"
    UNMAP = "unmap"


class NodeOptions(Arguments, frozen=True, kw_only=True):
    node_name: str | None = None
    discard: DiscardOption = DiscardOption.IGNORE
    read_only: bool = False


class FileOptions(NodeOptions, frozen=True, kw_only=True, tag_field="driver", tag="file"):
    filename: str


class ChildOptions(Arguments, frozen=True, kw_only=True, tag_field="driver", tag="file"):
    """A file described in place, below a raw node."""

    filename: str


class RawOptions(NodeOptions, frozen=True, kw_only=True, tag_field="driver", tag="raw"):
    file: Annotated[str | ChildOptions, msgspec.Meta(title="BlockdevRef")]


class BlockdevDelArguments(Arguments, frozen=True, kw_only=True):
    node_name: str


class SyncMode(Enum):
    """QMP's words; see `BackupRequest` for those that are served."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"

    def check_served(self) -> None:
        """Raise UsageError if there is no such backup here."""
        if self is not SyncMode.FULL:
            raise UsageError(f"Sync mode '{self.value}' is not supported; use 'full'")


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
    compress: bool = False
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    auto_finalize: bool = True
    auto_dismiss: bool = True
    x_perf: BackupPerf | None = None
    target: str


@command("query-named-block-nodes", QueryNodesArguments)
async def query_named_block_nodes(services: Services, arguments: QueryNodesArguments) -> Json:
    del arguments
    return [_node_info(node) for node in services.graph.nodes()]


def _node_info(node: NodeInfo) -> dict[str, Json]:
    image: dict[str, Json] = {
        "filename": node.filename,
        "format": node.driver,
        "virtual-size": node.size,
        "dirty-flag": False,
    }
    if node.allocated is not None:
        image["actual-size"] = node.allocated
    throttle = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    bitmaps: dict[str, Json] = {}
    if node.bitmaps:
        bitmaps["dirty-bitmaps"] = [bitmap_info(info) for info in node.bitmaps]
    return {
        "node-name": node.name,
        "drv": node.driver,
        "file": node.filename,
        "ro": node.read_only,
        "image": image,
        "encrypted": False,
        "detect_zeroes": "off",
        "backing_file_depth": 0,
        "write_threshold": 0,
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        **throttle,
        **bitmaps,
    }


@command("query-block-exports", NoArguments)
async def query_block_exports(services: Services, arguments: NoArguments) -> Json:
    del arguments
    return [_export_info(export) for export in services.graph.exports()]


def _export_info(export: ExportInfo) -> dict[str, Json]:
    return {"id": export.name, "type": "nbd", "node-name": export.node, "shutting-down": False}


@command("blockdev-add", cast("type[FileOptions | RawOptions]", FileOptions | RawOptions))
async def blockdev_add(services: Services, arguments: FileOptions | RawOptions) -> Json:
    name = arguments.node_name
    if name is None:
        raise UsageError("'node-name' must be specified for the root node")
    unmap = arguments.discard is DiscardOption.UNMAP
    node: FileNode | RawNode
    if isinstance(arguments, FileOptions):
        node = FileNode(name, arguments.filename, "file", arguments.read_only, unmap)
    elif isinstance(arguments.file, str):
        node = RawNode(name, arguments.file, arguments.read_only)
    else:
        node = FileNode(name, arguments.file.filename, "raw", arguments.read_only, unmap)
    await services.graph.add(node)
    return {}


@command("blockdev-del", BlockdevDelArguments)
async def blockdev_del(services: Services, arguments: BlockdevDelArguments) -> Json:
    await services.graph.delete(arguments.node_name)
    return {}


@command("blockdev-backup", BlockdevBackupArguments)
async def blockdev_backup(services: Services, arguments: BlockdevBackupArguments) -> Json:
    arguments.sync.check_served()
    if arguments.device == arguments.target:
        raise UsageError("Source and target cannot be the same")
    if arguments.compress:
        raise UsageError(f"Compression is not supported for this drive {arguments.target}")
    if arguments.speed < 0:
        raise UsageError("Parameter 'speed' expects a non-negative value")
    perf = arguments.x_perf or BackupPerf()
    _check_perf(perf)
    request = BackupRequest(
        node=arguments.device,
        target=TargetNode(arguments.target),
        job_id=arguments.device if arguments.job_id is None else arguments.job_id,
        speed=arguments.speed,
        workers=min(perf.max_workers, WORKERS_MAX),
        chunk_bytes_max=perf.max_chunk,
        cluster_bytes_min=perf.min_cluster_size,
        use_copy_range=perf.use_copy_range,
        on_cbw_error=arguments.on_cbw_error,
        auto_finalize=arguments.auto_finalize,
        auto_dismiss=arguments.auto_dismiss,
    )
    await services.backups.start(request)
    return {}


def _check_perf(perf: BackupPerf) -> None:
    if not 1 <= perf.max_workers <= MAX_WORKERS_MAX:
        raise UsageError(f"max-workers must be between 1 and {MAX_WORKERS_MAX}")
    if perf.max_chunk < 0:
        raise UsageError("max-chunk must be zero (which means no limit) or positive")
    if perf.min_cluster_size < 0 or perf.min_cluster_size & (perf.min_cluster_size - 1):
        raise UsageError("min-cluster-size needs to be a power of 2")
