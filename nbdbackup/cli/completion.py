"""`nbdbackup completion`: completion for the shell, made from the parsers themselves."""

import argparse

import msgspec

from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.parser import Verbs


class CompletionOptions(msgspec.Struct, frozen=True):
    """What `completion` was told."""

    shell: str


def add_parser(verbs: Verbs) -> None:
    """Add `completion`."""
    parser = verbs.add_parser(
        "completion",
        help="print a completion script for the shell",
        epilog="to use it now: source <(nbdbackup completion bash)",
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """`completion`."""
    # Imported here: main imports this module by its name, and shtab takes its time.
    import shtab

    from nbdbackup.cli.main import build_parser

    options = CompletionOptions(namespace.shell)
    print(shtab.complete(build_parser(), options.shell))
    return ExitStatus.DONE
