"""Commands about nodes and exports."""

from enum import Enum
from typing import Annotated, cast

import msgspec

from nbdbackup.errors import UsageError
from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.commands_bitmaps import bitmap_info
from nbdbackup.monitor.context import ExportInfo, FileNode, NodeInfo, RawNode, Services
from nbdbackup.monitor.schema import Arguments, NoArguments


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
