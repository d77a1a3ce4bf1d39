"""Commands about nodes."""

from typing import cast

from nbdbackup.errors import UsageError
from nbdbackup.job.events import Json
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.commands_bitmaps import bitmap_info
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.node_options import BlockdevOptions, definition
from nbdbackup.monitor.schema import Arguments
from nbdbackup.monitor.services_graph import NodeInfo


class QueryNodesArguments(Arguments, frozen=True, kw_only=True):
    flat: bool | None = None


class BlockdevDelArguments(Arguments, frozen=True, kw_only=True):
    node_name: str


class WriteThresholdArguments(Arguments, frozen=True, kw_only=True):
    node_name: str
    write_threshold: int


@command("query-named-block-nodes", QueryNodesArguments)
async def query_named_block_nodes(services: Services, arguments: QueryNodesArguments) -> Json:
    del arguments
    return [_node_info(node) for node in services.graph.nodes()]


def _node_info(node: NodeInfo) -> dict[str, Json]:
    throttle = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    children: dict[str, Json] = {}
    if node.children:
        children["children"] = [{"child": role, "node-name": name} for role, name in node.children]
    bitmaps: dict[str, Json] = {}
    if node.bitmaps:
        bitmaps["dirty-bitmaps"] = [bitmap_info(info) for info in node.bitmaps]
    return {
        "node-name": node.name,
        "drv": node.driver,
        "file": node.filename,
        "ro": node.read_only,
        "image": _image(node),
        "encrypted": False,
        "detect_zeroes": "off",
        "backing_file_depth": 0 if node.backing is None else 1,
        "write_threshold": node.write_threshold,
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        **throttle,
        **children,
        **bitmaps,
    }


def _image(node: NodeInfo) -> dict[str, Json]:
    image: dict[str, Json] = {
        "filename": node.filename,
        "format": node.driver,
        "virtual-size": node.size,
    }
    if node.driver != "snapshot-access":
        image["dirty-flag"] = False
    if node.allocated is not None:
        image["actual-size"] = node.allocated
    if node.backing is not None:
        image["backing-image"] = _image(node.backing)
    return image


@command("blockdev-add", cast("type[BlockdevOptions]", BlockdevOptions))
async def blockdev_add(services: Services, arguments: BlockdevOptions) -> Json:
    if arguments.node_name is None:
        raise UsageError("'node-name' must be specified for the root node")
    await services.graph.add(definition(arguments))
    return {}


@command("blockdev-del", BlockdevDelArguments)
async def blockdev_del(services: Services, arguments: BlockdevDelArguments) -> Json:
    await services.graph.delete(arguments.node_name)
    return {}


@command("block-set-write-threshold", WriteThresholdArguments)
async def block_set_write_threshold(services: Services, arguments: WriteThresholdArguments) -> Json:
    if arguments.write_threshold < 0:
        raise UsageError("Parameter 'write-threshold' expects uint64")
    await services.graph.set_write_threshold(arguments.node_name, arguments.write_threshold)
    return {}
