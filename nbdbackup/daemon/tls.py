"""From the options for TLS to what the server needs, and a word on doing without."""

import logging
from collections.abc import Iterable

from nbdbackup.daemon.options import TlsOptions
from nbdbackup.errors import UsageError
from nbdbackup.nbd.negotiation import TlsMode
from nbdbackup.server.listener import Listener
from nbdbackup.server.tls import ServerTls
from nbdbackup.tls import names
from nbdbackup.tls.credentials import server_context, server_psk_context

logger = logging.getLogger(__name__)


def server_tls(options: TlsOptions | None) -> ServerTls | None:
    """Load the credentials.

    Raises:
        UsageError: a file is missing or unfit.
    """
    if options is None:
        return None
    mode = TlsMode.REQUIRE if options.required else TlsMode.ON
    if options.keys is not None:
        return ServerTls(mode, server_psk_context(options.keys))
    assert options.certificates is not None
    context = server_context(options.certificates, verify_peer=options.verify_peer)
    return ServerTls(mode, context, _authorised(options))


def _authorised(options: TlsOptions) -> tuple[names.DistinguishedName, ...] | None:
    if not options.authorised and options.authorised_file is None:
        return None
    allowed = [names.parse(text) for text in options.authorised]
    if options.authorised_file is not None:
        allowed += names.load(options.authorised_file)
        if not allowed:
            raise UsageError(f"{options.authorised_file} has no names in it: nobody could connect")
    return tuple(allowed)


def warn_if_open(listeners: Iterable[Listener], options: TlsOptions | None) -> None:
    """Say it once if other machines can connect without TLS."""
    public = [listener.uri() for listener in listeners if listener.is_public]
    if not public or (options is not None and options.required):
        return
    logger.warning(
        "%s: other machines can connect without encryption or authentication, and read and write the disks; "
        "use --tls require, or bind to 127.0.0.1 or a Unix socket",
        ", ".join(public),
    )
