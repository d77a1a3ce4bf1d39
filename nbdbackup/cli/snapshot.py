"""`nbdbackup snapshot create|list|drop`.

The hooks of `create` run here, not in the server: they are what the person who types the
command may do. Law: once the pre-hook was started, the post-hook runs, whatever happens
in between; a file system that the one froze must not stay frozen.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from nbdbackup.cli.control import CommandError, connected, explained, run_async
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.output import print_json, print_table
from nbdbackup.cli.parser import Parser, Verbs, add_control, add_on_cbw_error, control_path, seconds, size
from nbdbackup.cli.replies import SnapshotInfo
from nbdbackup.cli.sizes import format_size
from nbdbackup.errors import NbdBackupError

CREATE_DESCRIPTION = """\
Keep the present contents of every NODE readable, as the read-only export NODE@NAME of the
same server. Several nodes share one instant. Clients go on writing: before a write lands,
the old contents of the clusters (64K) that it touches are copied to scratch. Prints the
URIs of the new exports. A snapshot ends with 'drop'. Until then it is there again after the server
was stopped or killed, unless somebody else wrote to the disk meanwhile; --temporary ones end with the
server. After the machine went down without the server's being stopped, it is listed as broken."""

HOOKS = """\
hooks: --pre-hook runs before the point in time (fsfreeze -f, say; if it fails there is no
snapshot), --post-hook after it. Once the pre-hook has run the post-hook always does, also
when the snapshot failed. Both run here, in a shell, with NBDBACKUP_NODES set to the nodes'
names, separated by spaces; the post-hook has NBDBACKUP_OUTCOME: created or failed."""


class CreateOptions(msgspec.Struct, frozen=True):
    """What `snapshot create` was told, or `checkpoint create`."""

    control: Path
    json: bool
    nodes: tuple[str, ...]
    name: str | None
    scratch: str | None
    scratch_bytes_max: int | None
    on_cbw_error: str
    cbw_timeout_s: float
    pre_hook: str | None
    post_hook: str | None
    bitmap: str | None
    temporary: bool

    def arguments(self) -> dict[str, object]:
        """Those of `x-nbdbackup-snapshot-create`, and of `x-nbdbackup-checkpoint-create`."""
        arguments: dict[str, object] = {
            "nodes": list(self.nodes),
            "on-cbw-error": self.on_cbw_error,
            "cbw-timeout": self.cbw_timeout_s,
        }
        if self.name is not None:
            arguments["name"] = self.name
        if self.scratch is not None:
            arguments["scratch"] = self.scratch
        if self.scratch_bytes_max is not None:
            arguments["scratch-max"] = self.scratch_bytes_max
        if self.bitmap is not None:
            arguments["bitmap"] = self.bitmap
        if self.temporary:
            arguments["temporary"] = True
        return arguments


class DropOptions(msgspec.Struct, frozen=True):
    """What `snapshot drop` was told."""

    control: Path
    json: bool
    snapshots: tuple[str, ...]
    pulled: bool


class ListOptions(msgspec.Struct, frozen=True):
    """What `snapshot list` was told."""

    control: Path
    json: bool


def add_parser(verbs: Verbs) -> None:
    """Add `snapshot`."""
    group = verbs.add_parser("snapshot", help="keep points in time of nodes readable")
    actions = group.add_subparsers(metavar="ACTION", required=True)

    making = actions.add_parser(
        "create", help="make a snapshot of one or more nodes", description=CREATE_DESCRIPTION, epilog=HOOKS
    )
    making.add_argument("nodes", nargs="+", metavar="NODE")
    making.add_argument("--name", help="default: the time in UTC, 20261123T030405Z")
    making.add_argument(
        "--bitmap",
        metavar="B",
        help="freeze this dirty bitmap of each node at the same instant, to copy only what changed; "
        "from then on a successor records. It stays so with the snapshot, also over restarts of the server. "
        "See 'drop --pulled'",
    )
    add_create_arguments(making)
    making.set_defaults(run=run_create)

    listing = actions.add_parser("list", help="list the snapshots")
    add_control(listing)
    listing.set_defaults(run=run_list)

    drop = actions.add_parser(
        "drop", help="end snapshots: their exports go away, their scratch files are deleted"
    )
    drop.add_argument("snapshots", nargs="+", metavar="NODE@NAME")
    drop.add_argument(
        "--pulled",
        action="store_true",
        help="somebody has a whole copy of each: a bitmap frozen with it starts anew at its instant. Without "
        "this the bitmap keeps what it had, and nothing is lost if the copy failed",
    )
    add_control(drop)
    drop.set_defaults(run=run_drop)


def add_create_arguments(parser: Parser) -> None:
    """Add what `snapshot create` and `checkpoint create` share; see `create_options`."""
    parser.add_argument(
        "--scratch", metavar="DIR|FILE", help="where to (default: the server's state directory)"
    )
    parser.add_argument(
        "--scratch-max",
        type=size,
        metavar="SIZE",
        help="at most so many bytes of scratch, then --on-cbw-error",
    )
    parser.add_argument(
        "--temporary", action="store_true", help="the snapshot ends with the server; its scratch has no name"
    )
    add_on_cbw_error(parser, "snapshot")
    parser.add_argument(
        "--cbw-timeout",
        type=seconds,
        default=0.0,
        metavar="S",
        help="a copy that takes longer counts as failed (default 0: no limit)",
    )
    parser.add_argument("--pre-hook", metavar="CMD", help="run before the point in time; see below")
    parser.add_argument("--post-hook", metavar="CMD", help="run after it; see below")
    add_control(parser)


def create_options(namespace: argparse.Namespace) -> CreateOptions:
    """What the parser found, for `create`."""
    return CreateOptions(
        control=control_path(namespace.control),
        json=namespace.json,
        nodes=tuple(namespace.nodes),
        name=namespace.name,
        scratch=os.path.abspath(namespace.scratch) if namespace.scratch is not None else None,
        scratch_bytes_max=namespace.scratch_max,
        on_cbw_error=namespace.on_cbw_error,
        cbw_timeout_s=namespace.cbw_timeout,
        pre_hook=namespace.pre_hook,
        post_hook=namespace.post_hook,
        bitmap=namespace.bitmap,
        temporary=namespace.temporary,
    )


def run_create(namespace: argparse.Namespace) -> int:
    """`snapshot create`."""
    return run_async(create(create_options(namespace), "x-nbdbackup-snapshot-create"))


def run_list(namespace: argparse.Namespace) -> int:
    """`snapshot list`."""
    return run_async(_list(ListOptions(control_path(namespace.control), namespace.json)))


def run_drop(namespace: argparse.Namespace) -> int:
    """`snapshot drop`."""
    snapshots = tuple(namespace.snapshots)
    options = DropOptions(control_path(namespace.control), namespace.json, snapshots, namespace.pulled)
    return run_async(_drop(options))


async def create(options: CreateOptions, command: str) -> int:
    """Run the QMP `command` that takes snapshots, between the hooks, and print their URIs."""
    # Connect first: with no server there is nothing to freeze a file system for.
    async with connected(options.control) as control, _hooks(options):
        try:
            answer = await control.execute(command, options.arguments())
        except CommandError as error:
            raise await explained(error, control, nodes=options.nodes) from error
    if options.json:
        print_json(answer)
        return ExitStatus.DONE
    for snapshot in control.convert(command, answer, list[SnapshotInfo]):
        for uri in snapshot.uris:
            print(uri)
    return ExitStatus.DONE


async def _list(options: ListOptions) -> int:
    async with connected(options.control) as control:
        command = "x-nbdbackup-query-snapshots"
        answer = await control.execute(command)
    if options.json:
        print_json(answer)
        return ExitStatus.DONE
    snapshots = control.convert(command, answer, list[SnapshotInfo])
    print_table(
        ("SNAPSHOT", "CREATED", "SIZE", "SCRATCH", "STATE"),
        [
            (
                snapshot.export,
                snapshot.created,
                format_size(snapshot.size),
                _scratch_text(snapshot),
                f"{snapshot.state}: {snapshot.cause}" if snapshot.cause else snapshot.state,
            )
            for snapshot in snapshots
        ],
    )
    return ExitStatus.DONE


async def _drop(options: DropOptions) -> int:
    async with connected(options.control) as control:
        try:
            await control.execute(
                "x-nbdbackup-snapshot-drop",
                {"snapshots": list(options.snapshots), "pulled": options.pulled},
            )
        except CommandError as error:
            raise await explained(error, control, snapshots=options.snapshots) from error
    if options.json:
        print_json({"dropped": list(options.snapshots)})
    return ExitStatus.DONE


def _scratch_text(snapshot: SnapshotInfo) -> str:
    used = format_size(snapshot.scratch_used)
    return used if snapshot.scratch_max is None else f"{used} of {format_size(snapshot.scratch_max)}"


@asynccontextmanager
async def _hooks(options: CreateOptions) -> AsyncIterator[None]:
    """Inside, the pre-hook has run; on leaving, however that happens, the post-hook runs.

    Raises:
        NbdBackupError: a hook failed; it names the consequence.
    """
    outcome = "failed"
    try:
        if options.pre_hook is not None:
            status = await _run_hook(options.pre_hook, options.nodes, None)
            if status:
                raise NbdBackupError(
                    f"no snapshot was made: --pre-hook exited with {status}: {options.pre_hook}"
                )
        yield
        outcome = "created"
    finally:
        if options.post_hook is not None:
            status = await _run_hook(options.post_hook, options.nodes, outcome)
            if status and outcome == "created":
                raise NbdBackupError(
                    f"the snapshot was made, but --post-hook exited with {status}: {options.post_hook}"
                )
            if status:
                print(
                    f"nbdbackup: also, --post-hook exited with {status}: {options.post_hook}", file=sys.stderr
                )


async def _run_hook(command: str, nodes: tuple[str, ...], outcome: str | None) -> int:
    """Run `command` in a shell, its output to standard error; the exit status, negative for a signal."""
    environment = {**os.environ, "NBDBACKUP_NODES": " ".join(nodes)}
    if outcome is not None:
        environment["NBDBACKUP_OUTCOME"] = outcome
    sys.stderr.flush()
    process = await asyncio.create_subprocess_shell(command, stdout=2, env=environment)
    return await process.wait()
