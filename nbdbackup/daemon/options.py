"""Everything that `nbdbackup serve` can be told, as plain data."""

from pathlib import Path

import msgspec

from nbdbackup.block.nbd_session import RECONNECT_DELAY_S
from nbdbackup.server.listener import AddressRange
from nbdbackup.server.polling import POLL_MAX_US

STOP_TIMEOUT_S = 60.0
"""Less than service managers wait before they kill."""


class SourceSpec(msgspec.Struct, frozen=True):
    """One disk to serve: the node and export `name`, from `path` (a path or an NBD URI) in `format`."""

    name: str
    path: str
    format: str | None = None
    """"raw", or None for raw after checking that the content does not look like another format."""
    read_only: bool = False
    """Refuse every write to this one, whatever holds for the others."""
    authorised: tuple[str, ...] = ()
    """Distinguished names, or names of pre-shared keys: nobody else is shown it; none: all are."""


class TcpAddress(msgspec.Struct, frozen=True):
    """Listen on `host`:`port`; port 0 picks a free one."""

    host: str
    port: int


class UnixAddress(msgspec.Struct, frozen=True):
    """Listen on a Unix socket at `path`."""

    path: str


class TlsOptions(msgspec.Struct, frozen=True):
    """TLS for clients: with `certificates`, a directory, or with `keys`, a file; one of the two."""

    required: bool
    """Whether every client must use it."""
    certificates: Path | None = None
    keys: Path | None = None
    verify_peer: bool = False
    authorised: tuple[str, ...] = ()
    """Distinguished names; with these and `authorised_file` empty, whoever has a certificate may come in."""
    authorised_file: Path | None = None


class InheritedSocket(msgspec.Struct, frozen=True):
    """Listen on a socket that whoever started us has opened as `descriptor`."""

    descriptor: int
    name: str = ""
    """What the service manager calls it; for messages."""


class ServeOptions(msgspec.Struct, frozen=True):
    """Everything that `serve` can be told."""

    sources: tuple[SourceSpec, ...]
    listeners: tuple[TcpAddress | UnixAddress | InheritedSocket, ...]
    control: Path
    state_dir: Path
    makes_control_directory: bool = False
    """Whether the control socket's directory is made if it is missing."""
    read_only: bool = False
    clients_max: int = 0
    """0: no limit."""
    allowed: tuple[AddressRange, ...] = ()
    """Where TCP clients may come from; none means from anywhere."""
    poll_max_us: int = POLL_MAX_US
    """So many microseconds a client is looked at for its next request before it is waited for; 0: never."""
    description: str = ""
    discard: str = "unmap"
    """"unmap", or "ignore": trim does nothing and zeroes stay allocated."""
    tls: TlsOptions | None = None
    tls_only: frozenset[str] = frozenset()
    """Sources that clients without TLS cannot use."""
    bitmap_durability: str = "process"
    """What persistent bitmaps outlive: "process", its end; "power", the machine's as well."""
    reconnect_delay_s: float = RECONNECT_DELAY_S
    """How long requests to a remote source or target wait for its server to come back; 0: not at all."""
    pid_file: Path | None = None
    run_command: str | None = None
    """Shell command to run with `$uri` set; serve until it ends and exit with its status."""
    exit_on_last: bool = False
    resume_jobs: bool = False
    """Whether backups that were interrupted go on at once, and do not wait to be resumed."""
    stop_timeout_s: float = STOP_TIMEOUT_S
    """Once it shall end, it does within this time, whatever it has to leave undone; 0: no limit."""
