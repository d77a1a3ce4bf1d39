"""The server's TLS: for whom, with what credentials, and how a client's connection gets it."""

import logging
import socket
import ssl
from collections.abc import Callable, Sequence

import msgspec

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.agreement import TlsMode
from nbdbackup.tls.names import PeerName, is_authorised
from nbdbackup.tls.stream import TlsStream

logger = logging.getLogger(__name__)


class Credentials(msgspec.Struct, frozen=True):
    """What one connection's TLS is done with."""

    context: ssl.SSLContext
    authorised: Sequence[PeerName] | None = None
    """Clients that have not proved to be one of these are disconnected; None: no such list."""


class ServerTls(msgspec.Struct, frozen=True):
    """What STARTTLS leads to; `mode` is not OFF."""

    mode: TlsMode
    credentials: Callable[[], Credentials]
    """Asked anew for every connection, so that they can be renewed while the server runs."""

    async def accept(self, sock: socket.socket) -> TlsStream:
        """Do the handshake on `sock`, which stays the caller's to close; the caller limits the time.

        Raises:
            ProtocolError: it failed, or the client is not authorised. OSError: the connection broke.
        """
        credentials = self.credentials()
        stream = TlsStream(sock, credentials.context, server_side=True)
        await stream.handshake()
        name = stream.peer_name
        if credentials.authorised is not None and not is_authorised(name, credentials.authorised):
            stream.close()
            shown = f"its certificate is for {name}" if name is not None else "its certificate has no name"
            raise ProtocolError(f"not authorised: {shown}, which is not on the list (--tls-authz)")
        logger.debug("%s%s", stream.version, f" with {name}" if name is not None else "")
        return stream
