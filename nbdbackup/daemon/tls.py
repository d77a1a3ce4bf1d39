"""From the options for TLS to what the server needs, and a word on doing without.

Credentials are read from their files at the start, where what is unfit ends it, and again when a client
comes and the files have changed: a certificate that is renewed, a revocation, a key or a name that is
added count for the next connection. What is unfit then (or is being replaced, one file after another)
leaves the old ones in use.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nbdbackup.daemon.options import ServeOptions, SourceSpec, TlsOptions
from nbdbackup.errors import UsageError
from nbdbackup.nbd.agreement import TlsMode
from nbdbackup.server.listener import Listener
from nbdbackup.server.tls import Credentials, ServerTls
from nbdbackup.tls import names
from nbdbackup.tls.credentials import server_context, server_files, server_psk_context
from nbdbackup.tls.names import PeerName

logger = logging.getLogger(__name__)


class ReloadedCredentials:
    """What `load` makes of the files at `paths`, made anew when one of them has changed."""

    def __init__(self, load: Callable[[], Credentials], paths: Sequence[Path]) -> None:
        """Load them.

        Raises:
            UsageError: they are unfit.
        """
        self._load = load
        self._paths = paths
        # Changing while running. Looked at before loading: what changes meanwhile is loaded again.
        self._seen = self._look()
        self._current = load()

    def __call__(self) -> Credentials:
        """Those to use now; the last good ones if the files are unfit."""
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            where = self._paths[0]
            try:
                self._current = self._load()
                logger.info("TLS credentials have changed, and new clients get the new ones (%s)", where)
            except (UsageError, OSError) as error:
                logger.warning("TLS credentials have changed and are unfit, the old ones stay: %s", error)
        return self._current

    def _look(self) -> list[tuple[int, ...] | None]:
        """What tells a changed file from an unchanged one, for each path; None: it is not there."""
        return [_identity(path) for path in self._paths]


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def server_tls(options: ServeOptions) -> ServerTls | None:
    """Load the credentials.

    Raises:
        UsageError: a file is missing or unfit.
    """
    tls = options.tls
    if tls is None:
        return None
    mode = TlsMode.REQUIRE if tls.required else TlsMode.ON
    keys = tls.keys
    if keys is not None:
        return ServerTls(mode, ReloadedCredentials(lambda: Credentials(server_psk_context(keys)), [keys]))
    directory = tls.certificates
    assert directory is not None
    ask_peer = any(source.authorised for source in options.sources)

    def load() -> Credentials:
        context = server_context(directory, verify_peer=tls.verify_peer, ask_peer=ask_peer)
        return Credentials(context, _authorised(tls))

    paths = server_files(directory)
    if tls.authorised_file is not None:
        paths.append(tls.authorised_file)
    return ServerTls(mode, ReloadedCredentials(load, paths))


def clients_of(source: SourceSpec, tls: TlsOptions | None) -> tuple[PeerName, ...] | None:
    """Whom the export of `source` is for; None: everybody.

    Raises:
        UsageError: a name is none.
    """
    if not source.authorised:
        return None
    assert tls is not None
    if tls.keys is not None:
        return source.authorised
    return tuple(names.parse(text) for text in source.authorised)


def _authorised(options: TlsOptions) -> tuple[names.DistinguishedName, ...] | None:
    if not options.authorised and options.authorised_file is None:
        return None
    allowed = [names.parse(text) for text in options.authorised]
    if options.authorised_file is not None:
        allowed += names.load(options.authorised_file)
        if not allowed:
            raise UsageError(f"{options.authorised_file} has no names in it: nobody could connect")
    return tuple(allowed)


def warn_if_open(listeners: Iterable[Listener], options: ServeOptions) -> None:
    """Say it once if other machines can connect without TLS."""
    public = [listener.uri() for listener in listeners if listener.is_public]
    if not public or (options.tls is not None and options.tls.required):
        return
    logger.warning(
        "%s can be reached from other machines without TLS: whoever can connect, or listens in on the "
        "way, can read and change the disks; --tls require encrypts%s",
        ", ".join(public),
        "" if options.allowed else ", --allow limits who can connect",
    )
