"""`nbdbackup state list|clean`."""

import argparse
import os

import msgspec

from nbdbackup.cli.control import connected, run_async
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.output import print_json, print_table
from nbdbackup.cli.parser import Parser, Verbs, add_control, control_path
from nbdbackup.cli.sizes import format_size

DESCRIPTION = """\
Files that servers of the same state directory made and that nobody needs now:

  partial   TARGET.partial of a backup that did not end, because its server was killed
  bitmap    a persistent bitmap of a node that is not served: if it will be again, keep it
  scratch   a scratch file whose server was killed in the moment of making it

A running server removes what is its own; these are removed by 'state clean' alone."""

CLEAN_DESCRIPTION = """\
Remove leftovers for good, all that 'state list' shows or only PATHs of these. Removing the bitmap of
a node means that its next backup has to be full. Prints what was removed."""


class Leftover(msgspec.Struct, frozen=True):
    """An entry of `x-nbdbackup-query-leftovers`. `size` is in bytes."""

    kind: str
    path: str
    size: int = 0
    reason: str = ""


def add_parser(verbs: Verbs) -> None:
    """Add `state`."""
    group = verbs.add_parser(
        "state", help="list and remove files that nobody needs any more", description=DESCRIPTION
    )
    actions = group.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    listing = actions.add_parser("list", help="list leftovers", description=DESCRIPTION)
    add_control(listing)
    listing.set_defaults(run=run_list)
    clean = actions.add_parser("clean", help="remove leftovers", description=CLEAN_DESCRIPTION)
    clean.add_argument("paths", nargs="*", metavar="PATH", help="default: all")
    add_control(clean)
    clean.set_defaults(run=run_clean)


def run_list(namespace: argparse.Namespace) -> int:
    """`state list`."""
    return run_async(_run(namespace, "x-nbdbackup-query-leftovers", {}))


def run_clean(namespace: argparse.Namespace) -> int:
    """`state clean`."""
    arguments: dict[str, object] = {}
    if namespace.paths:
        arguments["paths"] = [os.path.abspath(path) for path in namespace.paths]
    return run_async(_run(namespace, "x-nbdbackup-clean-leftovers", arguments))


async def _run(namespace: argparse.Namespace, command: str, arguments: dict[str, object]) -> int:
    async with connected(control_path(namespace.control)) as control:
        answer = await control.execute(command, arguments)
        found = control.convert(command, answer, list[Leftover])
    if namespace.json:
        print_json(answer)
    elif found:
        print_table(
            ("KIND", "SIZE", "PATH", "WHAT"),
            [(each.kind, format_size(each.size), each.path, each.reason) for each in found],
        )
    return ExitStatus.DONE
