"""argparse, taught our manners: an error is raised as one line, and exits are the caller's.

Also what several verbs share: `--control`, `--json`, `-v`, and argument types.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeVar

from msgspec.structs import replace

from nbdbackup.cli.sizes import parse_size
from nbdbackup.errors import UsageError
from nbdbackup.nbd import uri as nbd_uri

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing the usage and exiting; takes no abbreviated options."""

    def __init__(
        self,
        prog: str | None = None,
        *,
        description: str | None = None,
        help: str | None = None,
        epilog: str | None = None,
    ) -> None:
        # `help` is what the parser above prints in its list of commands; a description may say more.
        super().__init__(
            prog=prog,
            description=description or (f"{help[0].upper()}{help[1:]}." if help else None),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


# The class is generic for type checkers only.
Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


def argument_type(convert: Callable[[str], T], name: str) -> Callable[[str], T]:
    """`convert`, with its UsageError told as argparse tells a bad argument: with the option's name."""

    def converted(text: str) -> T:
        try:
            return convert(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    converted.__name__ = name
    return converted


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UsageError(f"'{text}' is not a whole number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 10**9:
        raise UsageError(f"'{text}' is not a time in seconds")
    return seconds


size = argument_type(parse_size, "size")
count = argument_type(_count, "number")
seconds = argument_type(_seconds, "seconds")


def only(name: str, supported: str, known: tuple[str, ...]) -> Callable[[str], str]:
    """A type for an option of which this version does one value, and says so of the `known` others."""

    def convert(text: str) -> str:
        if text == supported:
            return text
        if text in known:
            raise UsageError(f"this version does not do {name} '{text}' yet, only '{supported}'")
        raise UsageError(f"'{text}' is no {name}; this version has only '{supported}'")

    return argument_type(convert, name)


def absolute_place(text: str) -> str:
    """`text`, a path or an NBD URI, as it is meant in any working directory.

    Raises:
        UsageError: it is a URI, but not one of NBD, or not a usable one.
    """
    if "://" not in text or text.startswith(("/", "./")):
        return os.path.abspath(text)
    place = nbd_uri.parse(text)
    files = {
        field: os.path.abspath(path)
        for field in ("socket_path", "tls_certificates", "tls_psk_file")
        if (path := getattr(place, field)) is not None
    }
    return str(replace(place, **files))


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add `-v`."""
    parser.add_argument("-v", "--verbose", action="store_true", help="say more; show tracebacks of failures")


def add_control(parser: argparse.ArgumentParser) -> None:
    """Add what every verb that talks to a running server takes: `--control`, `--json` and `-v`."""
    parser.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="control socket of the server (default: $NBDBACKUP_CONTROL, else "
        "$XDG_RUNTIME_DIR/nbdbackup/control.sock, else /run/nbdbackup/control.sock)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else, on standard output"
    )
    add_verbose(parser)


def add_on_cbw_error(parser: argparse.ArgumentParser, victim: str) -> None:
    """Add `--on-cbw-error`; `victim` is what breaks: "snapshot" or "backup"."""
    parser.add_argument(
        "--on-cbw-error",
        choices=("break-snapshot", "break-guest-write"),
        default="break-snapshot",
        help="when old contents cannot be saved. break-snapshot (default): client writes go on; the "
        f"{victim} fails and says why. break-guest-write: the client's write fails with an error; the "
        f"{victim} stays whole",
    )


def control_path(given: Path | None) -> Path:
    """The control socket that is meant when `--control` is `given`, or is not."""
    if given is not None:
        return given
    from_environment = os.environ.get("NBDBACKUP_CONTROL")
    if from_environment:
        return Path(from_environment)
    return Path(os.environ.get("XDG_RUNTIME_DIR") or "/run") / "nbdbackup" / "control.sock"


def is_control_given(given: Path | None) -> bool:
    """Whether `control_path` is what somebody asked for, and not the default."""
    return given is not None or bool(os.environ.get("NBDBACKUP_CONTROL"))


def state_directory(given: Path | None) -> Path:
    """The state directory that is meant when `--state-dir` is `given`, or is not."""
    if given is not None:
        return given
    from_environment = os.environ.get("XDG_STATE_HOME")
    if from_environment:
        return Path(from_environment) / "nbdbackup"
    if os.geteuid() == 0:
        return Path("/var/lib/nbdbackup")
    return Path.home() / ".local" / "state" / "nbdbackup"
