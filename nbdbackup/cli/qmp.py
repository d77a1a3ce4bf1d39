"""`nbdbackup qmp`: one QMP command by hand."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import msgspec

from nbdbackup.cli.control import CommandError, connected, run_async
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.output import print_json
from nbdbackup.cli.parser import Verbs, add_control, control_path
from nbdbackup.errors import NbdBackupError, UsageError


class QmpOptions(msgspec.Struct, frozen=True):
    """What `qmp` was told."""

    control: Path
    command: str
    arguments: Mapping[str, object]


def add_parser(verbs: Verbs) -> None:
    """Add `qmp`."""
    parser = verbs.add_parser(
        "qmp",
        help="send one QMP command to a running server, print what it returns",
        epilog="examples:\n  nbdbackup qmp query-jobs\n"
        '  nbdbackup qmp \'{"execute": "job-cancel", "arguments": {"id": "job0"}}\'\n\n'
        "qmp-shell and every other QMP client can connect to the control socket, too.",
    )
    parser.add_argument(
        "command", metavar="COMMAND|JSON", help="the name of a command, or a whole QMP message"
    )
    add_control(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """`qmp`."""
    command, arguments = parse_message(namespace.command)
    return run_async(_execute(QmpOptions(control_path(namespace.control), command, arguments)))


def parse_message(text: str) -> tuple[str, Mapping[str, object]]:
    """The command and its arguments that `text`, a name or a JSON message, stands for.

    Raises:
        UsageError: it is JSON, but not a message.
    """
    if not text.lstrip().startswith("{"):
        return text, {}
    try:
        message = json.loads(text)
    except ValueError as error:
        raise UsageError(f"this is not JSON: {error}: {text}") from error
    command = message.pop("execute", None)
    arguments = message.pop("arguments", {})
    message.pop("id", None)
    if not isinstance(command, str) or not isinstance(arguments, dict) or message:
        raise UsageError('a QMP message is {"execute": "COMMAND", "arguments": {...}}')
    return command, arguments


async def _execute(options: QmpOptions) -> int:
    async with connected(options.control) as control:
        try:
            answer = await control.execute(options.command, options.arguments)
        except CommandError as error:
            raise NbdBackupError(f"{error.error_class}: {error}") from error
    print_json(answer)
    return ExitStatus.DONE
