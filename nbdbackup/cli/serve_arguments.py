"""The command line of `nbdbackup serve`, group by group; `cli/serve.py` says what it means."""

from pathlib import Path

from nbdbackup.block.nbd_session import RECONNECT_DELAY_S
from nbdbackup.cli.parser import Parser, Verbs, add_verbose, argument_type, count, only, seconds
from nbdbackup.daemon.options import STOP_TIMEOUT_S
from nbdbackup.errors import UsageError
from nbdbackup.server.listener import parse_range
from nbdbackup.server.polling import POLL_LIMIT_US, POLL_MAX_US

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 10809

DESCRIPTION = """\
Serve files, block devices and exports of other NBD servers over NBD, until stopped by SIGTERM
or SIGINT.

Client writes go to SOURCE itself. A local SOURCE is locked against other writers (another
nbdbackup, QEMU, qemu-nbd); a remote one cannot be: let nobody else write to it. Prints
'listening on URI' for every address once clients can connect. Without --tls, nothing is
encrypted and whoever can connect can read and write; with it, everything is, and with
--tls-verify-peer only those with a certificate come in.

Started by systemd with sockets of its own (LISTEN_FDS), it serves on those, and prints nothing.

With --control and no SOURCE it serves whatever QMP clients add (blockdev-add, block-export-add) and, without
-b, -p and -k, listens where they say (nbd-server-start)."""

EPILOG = """\
examples:
  nbdbackup serve disk=/var/lib/images/vm.img
  nbdbackup serve -k /run/vm.sock root=/dev/vg/root data=/dev/vg/data
  nbdbackup serve -b 0.0.0.0 --tls require --tls-creds /etc/pki/nbd --tls-verify-peer vm.img"""


def add_serve(verbs: Verbs) -> Parser:
    """Add `serve` to `verbs`, with everything that it takes."""
    parser = verbs.add_parser("serve", help="serve disks over NBD", description=DESCRIPTION, epilog=EPILOG)
    _add_sources(parser)
    _add_addresses(parser)
    _add_tls(parser)
    _add_state(parser)
    _add_process(parser)
    add_verbose(parser)
    return parser


def _add_sources(parser: Parser) -> None:
    group = parser.add_argument_group("sources", "what is served")
    group.add_argument(
        "sources",
        nargs="*",
        metavar="[NAME=]SOURCE",
        help="a raw file, a block device or an export of another NBD server (nbd://HOST[:PORT]/EXPORT, "
        "nbd+unix:///EXPORT?socket=PATH); NAME, of the node and the export, defaults to the file's name "
        "without its extension, or to the other export's (for a path with '=' in it: NAME=PATH or ./PATH)",
    )
    group.add_argument("-x", "--export-name", metavar="NAME", help="the NAME, when there is one SOURCE")
    group.add_argument(
        "-f",
        "--format",
        type=only("format", "raw", ("qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "luks", "qed")),
        metavar="raw",
        help="serve the bytes of SOURCE as they are, also when they look like an image format",
    )
    group.add_argument(
        "-r", "--read-only", action="store_true", help="refuse every write; SOURCE is opened so"
    )
    group.add_argument(
        "--read-only-export",
        action="append",
        default=[],
        metavar="NAME",
        help="the same for the SOURCE called NAME alone; may be given several times",
    )
    group.add_argument("-D", "--description", default="", metavar="TEXT", help="told to clients that ask")
    group.add_argument(
        "--discard",
        choices=("unmap", "ignore"),
        default="unmap",
        help="unmap (default): trims give space back; ignore: they do nothing, and zeroes stay allocated",
    )
    group.add_argument(
        "--reconnect-delay",
        type=seconds,
        default=RECONNECT_DELAY_S,
        metavar="SECONDS",
        help="when the server of a remote SOURCE or of a backup's target goes away, requests wait so long "
        f"for it to come back, and are done again then; after that they fail (default {RECONNECT_DELAY_S:g}; "
        "0: they fail at once)",
    )


def _add_addresses(parser: Parser) -> None:
    group = parser.add_argument_group("clients", "who may connect, and how")
    group.add_argument("-b", "--bind", metavar="ADDR", help=f"TCP address (default {DEFAULT_HOST})")
    group.add_argument(
        "-p",
        "--port",
        type=count,
        metavar="PORT",
        help=f"TCP port (default {DEFAULT_PORT}; 0 picks a free one)",
    )
    group.add_argument(
        "-k", "--socket", metavar="PATH", help="Unix socket; then no TCP unless -b or -p is given too"
    )
    group.add_argument(
        "--allow",
        action="append",
        default=[],
        type=argument_type(parse_range, "address range"),
        metavar="CIDR",
        help="let only these addresses connect over TCP, as in 10.0.0.0/8 or ::1; "
        "may be given several times (default: any address)",
    )
    group.add_argument(
        "-e", "--shared", type=count, default=0, metavar="N", help="clients at once (default 0: no limit)"
    )
    group.add_argument(
        "--poll-max-us",
        type=argument_type(_poll_max_us, "number"),
        default=POLL_MAX_US,
        metavar="N",
        help="a single busy client is watched for its next request for up to N microseconds before the "
        f"server sleeps, while that pays: quicker at a little more processor time (default {POLL_MAX_US}; "
        "0: never)",
    )


def _add_tls(parser: Parser) -> None:
    group = parser.add_argument_group("TLS", "encryption, certificates and who may come in with them")
    group.add_argument(
        "--tls",
        choices=("off", "on", "require"),
        help="on: clients may use TLS, require: they must, or get nothing but an error "
        "(default: require with --tls-creds or --tls-psk, else off)",
    )
    group.add_argument(
        "--tls-creds",
        type=Path,
        metavar="DIR",
        help="certificates, named as QEMU and nbdkit have them: ca-cert.pem, server-cert.pem, "
        "server-key.pem, and ca-crl.pem if some are revoked; new ones count for new connections",
    )
    group.add_argument(
        "--tls-psk",
        type=Path,
        metavar="FILE",
        help="pre-shared keys in place of certificates, NAME:HEX lines as psktool makes them; whoever has "
        "one may connect (Python 3.13 or later)",
    )
    group.add_argument(
        "--tls-verify-peer",
        action="store_true",
        help="refuse TLS clients without a certificate that ca-cert.pem vouches for",
    )
    group.add_argument(
        "--tls-authz",
        action="append",
        default=[],
        metavar="DN",
        help="refuse TLS clients whose certificate is not for this distinguished name, "
        "'CN=backup,O=Example' (may be repeated; implies --tls-verify-peer)",
    )
    group.add_argument(
        "--tls-authz-file",
        type=Path,
        metavar="FILE",
        help="distinguished names as for --tls-authz, one a line",
    )
    group.add_argument(
        "--export-authz",
        action="append",
        default=[],
        metavar="EXPORT=NAME",
        help="this export and its snapshots exist only for the TLS client of this distinguished name, or, "
        "with --tls-psk, of this key's name (may be repeated, for several clients and exports)",
    )
    group.add_argument(
        "--tls-only",
        action="append",
        default=[],
        metavar="NAME",
        help="with --tls on: clients without TLS do not see this export and its snapshots (may be repeated)",
    )


def _add_state(parser: Parser) -> None:
    group = parser.add_argument_group("state", "what is kept, and how the server is told what to do")
    group.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="persistent bitmaps, scratch files of snapshots and interrupted backups live here; one server "
        "for each (default: $XDG_STATE_HOME/nbdbackup, ~/.local/state/nbdbackup, "
        "for root /var/lib/nbdbackup)",
    )
    group.add_argument(
        "--bitmap-durability",
        choices=("process", "power"),
        default="process",
        help="what persistent bitmaps outlive when the server does not stop cleanly. process (default): "
        "its being killed; when the machine goes down they become inconsistent, and the next backup is a "
        "full one. power: that as well; the first write to each granule after a backup waits for a sync of "
        "the state directory, and fails if that does; the disk is flushed before a bitmap forgets anything",
    )
    group.add_argument(
        "--resume-jobs",
        action="store_true",
        help="backups that were interrupted by the end of the last server go on at once, at the same point "
        "in time (default: they are paused, until 'job resume' or 'job cancel')",
    )
    group.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="control socket, QMP, mode 0600 (default: $NBDBACKUP_CONTROL, else "
        "$XDG_RUNTIME_DIR/nbdbackup/control.sock, else /run/nbdbackup/control.sock)",
    )


def _add_process(parser: Parser) -> None:
    group = parser.add_argument_group("process", "how it begins, logs and ends")
    group.add_argument("--pid-file", type=Path, metavar="FILE", help="write the process id here when ready")
    group.add_argument(
        "--fork",
        action="store_true",
        help="go to the background when ready; logging goes on only if standard error is a file",
    )
    group.add_argument(
        "--run",
        dest="run_command",
        metavar="CMD",
        help="run CMD in a shell with $uri set, and serve until it ends",
    )
    group.add_argument("--exit-on-last", action="store_true", help="leave when the last client has left")
    group.add_argument(
        "-t", "--persistent", action="store_true", help="go on when the last client has left (the default)"
    )
    group.add_argument(
        "--stop-timeout",
        type=seconds,
        default=STOP_TIMEOUT_S,
        metavar="SECONDS",
        help="once it is to stop, the server ends within this time: if a disk hangs, the others are flushed, "
        f"it says what it left undone, and its status is 1 (default {STOP_TIMEOUT_S:g}; 0: no limit)",
    )
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="of standard error")


def _poll_max_us(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > POLL_LIMIT_US:
        raise UsageError(f"'{text}' is no number of microseconds from 0 to {POLL_LIMIT_US}")
    return int(text)
