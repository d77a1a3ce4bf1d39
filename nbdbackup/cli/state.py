"""`nbdbackup state list|clean`."""

import argparse
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from nbdbackup.cli.control import Control, connected, run_async
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.output import print_json, print_table, say
from nbdbackup.cli.parser import (
    Parser,
    Verbs,
    add_control,
    control_path,
    is_control_given,
    state_directory,
)
from nbdbackup.cli.sizes import format_size
from nbdbackup.daemon.state_at_rest import leftovers_at_rest
from nbdbackup.daemon.state_dir import is_state_directory
from nbdbackup.errors import NotFoundError, UsageError
from nbdbackup.monitor.services_state import LeftoverInfo, StateService

DESCRIPTION = """\
Files that servers of a state directory made and that nobody needs now:

  partial   TARGET.partial of a backup that did not end, because its server was killed
  scratch   a scratch file whose server was killed in the moment of making it, or whose snapshot is lost
  bitmap    a persistent bitmap of a node that is not served
  snapshot  a stored snapshot of a node that is not served

A running server removes what is its own; these are removed by 'state clean' alone. The server at the control
socket is asked; if there is none, the state directory itself is looked at, and no node is served then."""

CLEAN_DESCRIPTION = """\
Remove leftovers for good: those that nobody can use any more, or only PATHs. Bitmaps and snapshots, and
scratch whose snapshot cannot be read by this version, are kept unless they are named or --all is given:
without its bitmap the next backup of a node has to be full. Prints what was removed."""


def add_parser(verbs: Verbs) -> None:
    """Add `state`."""
    group = verbs.add_parser(
        "state", help="list and remove files that nobody needs any more", description=DESCRIPTION
    )
    actions = group.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    listing = actions.add_parser("list", help="list leftovers", description=DESCRIPTION)
    _add_place(listing)
    listing.set_defaults(run=run_list)
    clean = actions.add_parser("clean", help="remove leftovers", description=CLEAN_DESCRIPTION)
    clean.add_argument("paths", nargs="*", metavar="PATH", help="default: what is not kept")
    clean.add_argument("--all", action="store_true", help="what is kept as well")
    _add_place(clean)
    clean.set_defaults(run=run_clean)


def _add_place(parser: Parser) -> None:
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="the state directory of a server that is not running (default: that of 'serve', if no server is "
        "at the control socket and --control is not given)",
    )
    add_control(parser)


class StateOptions(msgspec.Struct, frozen=True):
    """Which state directory is meant, as far as somebody said so, and how to print."""

    control: Path | None
    state_dir: Path | None
    as_json: bool


def _options(namespace: argparse.Namespace) -> StateOptions:
    return StateOptions(namespace.control, namespace.state_dir, namespace.json)


def run_list(namespace: argparse.Namespace) -> int:
    """`state list`."""
    return run_async(_list(_options(namespace)))


async def _list(options: StateOptions) -> int:
    async with _state(options) as state:
        found = await state.leftovers()
    _print(options, found)
    return ExitStatus.DONE


def run_clean(namespace: argparse.Namespace) -> int:
    """`state clean`."""
    if namespace.all and namespace.paths:
        raise UsageError("either PATHs or --all, not both")
    paths = [os.path.abspath(path) for path in namespace.paths]
    return run_async(_clean(_options(namespace), paths or None, namespace.all))


async def _clean(options: StateOptions, paths: list[str] | None, everything: bool) -> int:
    async with _state(options) as state:
        removed = await state.clean(paths, everything=everything)
        kept = [] if paths else await state.leftovers()
    _print(options, removed)
    if kept:
        say(f"{len(kept)} kept (see nbdbackup state list): name them, or say --all")
    return ExitStatus.DONE


class _RunningState:
    """The state directory of the server behind `control`."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def leftovers(self) -> Sequence[LeftoverInfo]:
        return await self._ask("x-nbdbackup-query-leftovers", {})

    async def clean(self, paths: Sequence[str] | None, *, everything: bool = False) -> Sequence[LeftoverInfo]:
        arguments: dict[str, object] = {}
        if paths is not None:
            arguments["paths"] = list(paths)
        elif everything:
            arguments["all"] = True
        return await self._ask("x-nbdbackup-clean-leftovers", arguments)

    async def _ask(self, command: str, arguments: dict[str, object]) -> Sequence[LeftoverInfo]:
        return await self._control.query(command, list[LeftoverInfo], arguments)


@asynccontextmanager
async def _state(options: StateOptions) -> AsyncIterator[StateService]:
    """Of the server that is meant; of the directory itself if that is meant, or if there is no server."""
    async with AsyncExitStack() as stack:
        control = await _control(options, stack)
        if control is not None:
            yield _RunningState(control)
        else:
            directory = state_directory(options.state_dir)
            yield await stack.enter_async_context(leftovers_at_rest(directory.absolute()))


async def _control(options: StateOptions, stack: AsyncExitStack) -> Control | None:
    """A connection to the server; None: a directory is meant, or there is no server."""
    if options.state_dir is not None and options.control is None:
        return None
    try:
        return await stack.enter_async_context(connected(control_path(options.control)))
    except NotFoundError:
        if options.state_dir is not None:
            return None
        if is_control_given(options.control) or not is_state_directory(state_directory(None)):
            raise
        return None


def _print(options: StateOptions, found: Sequence[LeftoverInfo]) -> None:
    if options.as_json:
        print_json([msgspec.structs.asdict(info) for info in found])
    elif found:
        print_table(
            ("KIND", "SIZE", "PATH", "WHAT"),
            [(info.kind, format_size(info.size), info.path, info.reason) for info in found],
        )
