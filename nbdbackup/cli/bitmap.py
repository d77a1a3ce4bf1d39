"""`nbdbackup bitmap add|list|remove|clear|enable|disable|merge`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from nbdbackup.cli.control import CommandError, connected, explained, run_async
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.output import print_json, print_table
from nbdbackup.cli.parser import Parser, Verbs, add_control, control_path, size
from nbdbackup.cli.replies import BitmapInfo, NodeInfo
from nbdbackup.cli.sizes import format_size
from nbdbackup.errors import NotFoundError

DESCRIPTION = """\
A dirty bitmap says what clients changed in a node since the bitmap was added or cleared. It is
a meta context of the node's export, qemu:dirty-bitmap:NAME, for 'nbdinfo --map' and whoever
copies only what changed; a snapshot shows it as it was at that instant."""

ACTIONS = {
    "remove": "remove a bitmap; what changed is not known any more",
    "clear": "make a bitmap say that nothing has changed",
    "enable": "let a bitmap record what clients change",
    "disable": "let a bitmap stay as it is, whatever clients change",
}


class ChangeOptions(msgspec.Struct, frozen=True):
    """What a verb that changes one bitmap was told: a QMP command and its arguments; `nodes` are in them."""

    control: Path
    json: bool
    nodes: Sequence[str]
    command: str
    arguments: Mapping[str, object]


class ListOptions(msgspec.Struct, frozen=True):
    """What `bitmap list` was told; `node` None: all."""

    control: Path
    json: bool
    node: str | None


def add_parser(verbs: Verbs) -> None:
    """Add `bitmap`."""
    group = verbs.add_parser(
        "bitmap", help="record what changes in nodes, for incremental backups", description=DESCRIPTION
    )
    actions = group.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)

    add = actions.add_parser("add", help="begin to record what clients change")
    add.add_argument("node", metavar="NODE")
    add.add_argument("name", metavar="NAME")
    add.add_argument(
        "-g",
        "--granularity",
        type=size,
        metavar="SIZE",
        help="how much one bit stands for, a power of two from 512 to 2G (default: 64K)",
    )
    add.add_argument(
        "--temporary",
        action="store_true",
        help="the bitmap ends with the server (default: it is kept in the state directory, and outlives "
        "restarts and crashes; see serve --bitmap-durability)",
    )
    add.add_argument("--disabled", action="store_true", help="do not record before 'enable'")
    add_control(add)
    add.set_defaults(run=run_add)

    listing = actions.add_parser("list", help="list the bitmaps")
    listing.add_argument("node", nargs="?", metavar="NODE", help="default: of every node")
    add_control(listing)
    listing.set_defaults(run=run_list)

    for action, text in ACTIONS.items():
        parser = actions.add_parser(action, help=text)
        parser.add_argument("node", metavar="NODE")
        parser.add_argument("name", metavar="NAME")
        add_control(parser)
        parser.set_defaults(run=run_action, action=action)

    merge = actions.add_parser(
        "merge", help="what changed in any of the sources, has changed in the target as well"
    )
    merge.add_argument("node", metavar="NODE")
    merge.add_argument("target", metavar="TARGET")
    merge.add_argument(
        "sources", nargs="+", metavar="[NODE:]SOURCE", help="bitmaps of the same node, or of one as large"
    )
    add_control(merge)
    merge.set_defaults(run=run_merge)


def run_add(namespace: argparse.Namespace) -> int:
    """`bitmap add`."""
    arguments: dict[str, object] = {
        "node": namespace.node,
        "name": namespace.name,
        "disabled": namespace.disabled,
        "persistent": not namespace.temporary,
    }
    if namespace.granularity is not None:
        arguments["granularity"] = namespace.granularity
    return _run(namespace, "block-dirty-bitmap-add", arguments)


def run_action(namespace: argparse.Namespace) -> int:
    """`bitmap remove`, `clear`, `enable`, `disable`."""
    arguments = {"node": namespace.node, "name": namespace.name}
    return _run(namespace, f"block-dirty-bitmap-{namespace.action}", arguments)


def run_merge(namespace: argparse.Namespace) -> int:
    """`bitmap merge`."""
    sources = [_source(text) for text in namespace.sources]
    arguments = {"node": namespace.node, "target": namespace.target, "bitmaps": sources}
    others = [source["node"] for source in sources if isinstance(source, dict)]
    return _run(namespace, "block-dirty-bitmap-merge", arguments, others)


def run_list(namespace: argparse.Namespace) -> int:
    """`bitmap list`."""
    return run_async(_list(ListOptions(control_path(namespace.control), namespace.json, namespace.node)))


def _source(text: str) -> str | dict[str, str]:
    """`[NODE:]SOURCE` as QMP has it. The first colon counts: a name that has one needs its node before it."""
    node, colon, name = text.partition(":")
    return {"node": node, "name": name} if colon else text


def _run(
    namespace: argparse.Namespace,
    command: str,
    arguments: Mapping[str, object],
    other_nodes: Sequence[str] = (),
) -> int:
    control, nodes = control_path(namespace.control), [namespace.node, *other_nodes]
    return run_async(_change(ChangeOptions(control, namespace.json, nodes, command, arguments)))


async def _change(options: ChangeOptions) -> int:
    async with connected(options.control) as control:
        try:
            answer = await control.execute(options.command, options.arguments)
        except CommandError as error:
            raise await explained(error, control, nodes=options.nodes) from error
    if options.json:
        print_json(answer)
    return ExitStatus.DONE


async def _list(options: ListOptions) -> int:
    async with connected(options.control) as control:
        answers = await control.query("query-named-block-nodes", list[dict[str, object]])
        nodes = control.convert("query-named-block-nodes", answers, list[NodeInfo])
    if options.node is not None and options.node not in [node.node_name for node in nodes]:
        raise NotFoundError(
            f"the server on {options.control} has no node '{options.node}' (see nbdbackup node list)"
        )
    wanted = [node for node in nodes if options.node in (None, node.node_name)]
    if options.json:
        names = [node.node_name for node in wanted]
        print_json(
            {
                str(answer["node-name"]): answer.get("dirty-bitmaps", [])
                for answer in answers
                if answer["node-name"] in names
            }
        )
        return ExitStatus.DONE
    print_table(
        ("NODE", "BITMAP", "DIRTY", "GRANULARITY", "STATE"),
        [
            (
                node.node_name,
                bitmap.name,
                format_size(bitmap.count),
                format_size(bitmap.granularity),
                _state(bitmap),
            )
            for node in wanted
            for bitmap in node.dirty_bitmaps[::-1]
            if bitmap.name is not None
        ],
    )
    return ExitStatus.DONE


def _state(bitmap: BitmapInfo) -> str:
    words = ["recording" if bitmap.recording else "disabled"]
    words += [
        word
        for word, holds in (
            ("busy", bitmap.busy),
            ("persistent", bitmap.persistent),
            (f"inconsistent ({bitmap.reason})" if bitmap.reason else "inconsistent", bitmap.inconsistent),
        )
        if holds
    ]
    return ", ".join(words)
