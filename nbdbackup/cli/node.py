"""`nbdbackup node list|info`."""

import argparse
from pathlib import Path

import msgspec

from nbdbackup.cli.control import connected, run_async
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.output import print_json, print_table
from nbdbackup.cli.parser import Verbs, add_control, control_path
from nbdbackup.cli.replies import ExportInfo, NodeInfo, SnapshotInfo
from nbdbackup.cli.sizes import format_size
from nbdbackup.errors import NotFoundError


class NodeOptions(msgspec.Struct, frozen=True):
    """What `node list` (`node` is None) or `node info` was told."""

    control: Path
    json: bool
    node: str | None


def add_parser(verbs: Verbs) -> None:
    """Add `node`."""
    group = verbs.add_parser("node", help="show the nodes of a running server")
    actions = group.add_subparsers(metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="list the nodes")
    add_control(listing)
    listing.set_defaults(run=run, node=None)

    info = actions.add_parser("info", help="show one node, its exports and its snapshots")
    info.add_argument("node", metavar="NODE")
    add_control(info)
    info.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """`node list` and `node info`."""
    options = NodeOptions(control_path(namespace.control), namespace.json, namespace.node)
    return run_async(_list(options) if options.node is None else _info(options, options.node))


async def _list(options: NodeOptions) -> int:
    async with connected(options.control) as control:
        command = "query-named-block-nodes"
        answer = await control.execute(command)
    if options.json:
        print_json(answer)
        return ExitStatus.DONE
    nodes = control.convert(command, answer, list[NodeInfo])
    print_table(
        ("NODE", "SIZE", "DRIVER", "MODE", "FILE"),
        [
            (node.node_name, format_size(node.image.virtual_size), node.drv, _mode(node), node.file)
            for node in nodes
        ],
    )
    return ExitStatus.DONE


async def _info(options: NodeOptions, name: str) -> int:
    async with connected(options.control) as control:
        answers = await control.query("query-named-block-nodes", list[dict[str, object]])
        exports = await control.query("query-block-exports", list[ExportInfo])
        snapshots = await control.query("x-nbdbackup-query-snapshots", list[SnapshotInfo])
    answer = next((answer for answer in answers if answer.get("node-name") == name), None)
    if answer is None:
        raise NotFoundError(f"the server on {options.control} has no node '{name}' (see nbdbackup node list)")
    if options.json:
        print_json(answer)
        return ExitStatus.DONE
    node = control.convert("query-named-block-nodes", answer, NodeInfo)
    lines = {
        "node": node.node_name,
        "file": node.file,
        "driver": node.drv,
        "size": f"{format_size(node.image.virtual_size)} ({node.image.virtual_size} bytes)",
        "mode": _mode(node),
        "made of": " ".join(f"{child.node_name} ({child.child})" for child in node.children),
        "threshold": format_size(node.write_threshold) if node.write_threshold else "",
        "exports": " ".join(export.id for export in exports if export.node_name == name) or "none",
        "snapshots": " ".join(snapshot.export for snapshot in snapshots if snapshot.node == name) or "none",
    }
    for key, value in lines.items():
        if value:
            print(f"{key + ':':<11}{value}")
    return ExitStatus.DONE


def _mode(node: NodeInfo) -> str:
    return "read-only" if node.ro else "read-write"
