"""`nbdbackup checkpoint create|list|delete`."""

import argparse
from pathlib import Path

import msgspec

from nbdbackup.cli.control import CommandError, check_node, connected, explained, run_async
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.output import print_json, print_table, say
from nbdbackup.cli.parser import Parser, Verbs, add_control, control_path
from nbdbackup.cli.replies import CheckpointInfo
from nbdbackup.cli.sizes import format_size
from nbdbackup.cli.snapshot import HOOKS, add_create_arguments, create, create_options

CREATE_DESCRIPTION = """\
At one instant of every NODE: take a snapshot NODE@NAME, begin to record in a new bitmap NAME what
changes from now on, and stop recording in the bitmap of the checkpoint before, PREVIOUS. The
snapshot's qemu:dirty-bitmap:PREVIOUS is what changed from PREVIOUS to NAME; what changed since an
older checkpoint is that and the bitmaps of all checkpoints in between. Prints the snapshots' URIs.
The snapshots are dropped with 'snapshot drop' when they are backed up; the checkpoint stays, in
the state directory, and outlives restarts and crashes of the server as persistent bitmaps do."""

LIST_DESCRIPTION = """\
List the checkpoints, the oldest of each node first. DIRTY is what changed from one to the next.
A checkpoint is inconsistent if its bitmap or a later one is: then nobody knows what changed since,
and the next backup of that node has to be full, with a new checkpoint."""

DELETE_DESCRIPTION = """\
Forget a checkpoint of the NODEs. What changed from it to the next one is then known to have changed
since the one before; if there is none before, it is forgotten. To delete a checkpoint that is not
there says so, and is no error."""


class ListOptions(msgspec.Struct, frozen=True):
    """What `checkpoint list` was told; `node` None: all."""

    control: Path
    json: bool
    node: str | None


class DeleteOptions(msgspec.Struct, frozen=True):
    """What `checkpoint delete` was told."""

    control: Path
    json: bool
    nodes: tuple[str, ...]
    name: str


def add_parser(verbs: Verbs) -> None:
    """Add `checkpoint`."""
    group = verbs.add_parser(
        "checkpoint", help="mark points in time since which changes are known, for incremental backups"
    )
    actions = group.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)

    making = actions.add_parser(
        "create",
        help="switch bitmaps and take a snapshot, in one instant",
        description=CREATE_DESCRIPTION,
        epilog=HOOKS,
    )
    making.add_argument("nodes", nargs="+", metavar="NODE")
    making.add_argument("name", metavar="NAME")
    add_create_arguments(making)
    making.set_defaults(run=run_create)

    listing = actions.add_parser("list", help="list the checkpoints", description=LIST_DESCRIPTION)
    listing.add_argument("node", nargs="?", metavar="NODE", help="default: of every node")
    add_control(listing)
    listing.set_defaults(run=run_list)

    delete = actions.add_parser("delete", help="forget a checkpoint", description=DELETE_DESCRIPTION)
    delete.add_argument("nodes", nargs="*", metavar="NODE", help="default: all that have it")
    delete.add_argument("name", metavar="NAME")
    add_control(delete)
    delete.set_defaults(run=run_delete)


def run_create(namespace: argparse.Namespace) -> int:
    """`checkpoint create`."""
    namespace.bitmap = None
    return run_async(create(create_options(namespace), "x-nbdbackup-checkpoint-create"))


def run_list(namespace: argparse.Namespace) -> int:
    """`checkpoint list`."""
    return run_async(_list(ListOptions(control_path(namespace.control), namespace.json, namespace.node)))


def run_delete(namespace: argparse.Namespace) -> int:
    """`checkpoint delete`."""
    control = control_path(namespace.control)
    return run_async(_delete(DeleteOptions(control, namespace.json, tuple(namespace.nodes), namespace.name)))


async def _list(options: ListOptions) -> int:
    command = "x-nbdbackup-query-checkpoints"
    async with connected(options.control) as control:
        answers = await control.query(command, list[dict[str, object]])
        if options.node is not None:
            await check_node(control, options.node)
            answers = [answer for answer in answers if answer.get("node") == options.node]
        checkpoints = control.convert(command, answers, list[CheckpointInfo])
    if options.json:
        print_json(answers)
        return ExitStatus.DONE
    print_table(
        ("NODE", "CHECKPOINT", "UUID", "PARENT", "CREATED", "DIRTY", "STATE"),
        [
            (
                found.node,
                found.name,
                found.uuid,
                found.parent or "-",
                found.created,
                format_size(found.dirty),
                f"inconsistent ({found.reason}): back up in full" if found.inconsistent else "ok",
            )
            for found in checkpoints
        ],
    )
    return ExitStatus.DONE


async def _delete(options: DeleteOptions) -> int:
    command = "x-nbdbackup-checkpoint-delete"
    arguments: dict[str, object] = {"name": options.name}
    if options.nodes:
        arguments["nodes"] = list(options.nodes)
    async with connected(options.control) as control:
        try:
            answer = await control.execute(command, arguments)
        except CommandError as error:
            raise await explained(error, control, nodes=options.nodes) from error
        gone = [found.node for found in control.convert(command, answer, list[CheckpointInfo])]
    if options.json:
        print_json(answer)
    for node in options.nodes or ("any node",):
        if node not in gone and (options.nodes or not gone):
            say(f"there was no checkpoint {options.name} of {node}")
    return ExitStatus.DONE
