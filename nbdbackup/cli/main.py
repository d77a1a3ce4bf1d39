"""The entry point: picks the verb's module and runs it."""

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from nbdbackup import __version__
from nbdbackup.cli.failures import guarded
from nbdbackup.cli.parser import Parser

VERBS = (
    "serve",
    "snapshot",
    "checkpoint",
    "bitmap",
    "backup",
    "job",
    "state",
    "node",
    "info",
    "map",
    "qmp",
    "demo",
    "completion",
)

DESCRIPTION = """\
Serve disks over NBD, show them as they were at one point in time, and back that up
while their clients go on writing."""

EPILOG = """\
exit status: 0 done; 1 failed; 2 wrong usage; 10 no such server, node, snapshot or job;
130 interrupted. Sizes and rates: 512, 64K, 1M, 2G (powers of 1024).

'nbdbackup demo' shows the main job on a temporary disk, with the commands to do the same."""


def build_parser(verbs: Sequence[str] = VERBS) -> Parser:
    """The parser with the commands named in `verbs`."""
    parser = Parser("nbdbackup", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"nbdbackup {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for verb in verbs:
        _verb_module(verb).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), verbose="-v" in arguments or "--verbose" in arguments)


def _run(arguments: Sequence[str]) -> int:
    # Only the module of the verb in question is imported: starting fast matters, to scripts most.
    verbs = arguments[:1] if arguments[:1] and arguments[0] in VERBS else VERBS
    namespace = build_parser(verbs).parse_args(arguments)
    status: int = namespace.run(namespace)
    sys.stdout.flush()
    return status


def _verb_module(verb: str) -> ModuleType:
    return import_module(f"nbdbackup.cli.{verb}")
