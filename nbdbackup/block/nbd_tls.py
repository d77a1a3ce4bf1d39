"""TLS in the client role: from what a URI says to credentials, and from a socket to where TLS begins.

tls-certificates=DIR    ca-cert.pem, and client-cert.pem with client-key.pem for a server that wants them;
                        without it, the system's authorities vouch for the server
tls-hostname=NAME       whom the server's certificate must be for (default: the host of the URI; on a
                        Unix socket there is none, and any name that the authority vouches for will do)
tls-verify-peer=0       take any certificate: encrypted, but with whom?
tls-psk-file=FILE       a key in place of certificates, of the user before the @
"""

import asyncio
import socket
import ssl
from pathlib import Path

import msgspec

from nbdbackup.errors import UsageError
from nbdbackup.nbd.client_options import OptionExchange
from nbdbackup.nbd.uri import NbdUri
from nbdbackup.tls.credentials import client_context, client_psk_context

RECEIVE_BYTES = 4 << 10


class ClientTls(msgspec.Struct, frozen=True):
    """With what to shake hands, and with whom; `hostname` None: whoever has a good certificate."""

    context: ssl.SSLContext
    hostname: str | None


def client_tls(uri: NbdUri) -> ClientTls | None:
    """What `uri` says about TLS; None: nothing.

    Raises:
        UsageError: a file that it names is missing or unfit.
    """
    if not uri.tls:
        return None
    if uri.tls_psk_file is not None:
        if uri.username is None:
            raise UsageError(f"{uri} does not say whose key is meant: write NAME@ before the host")
        return ClientTls(client_psk_context(Path(uri.tls_psk_file), uri.username), None)
    hostname = (uri.tls_hostname or uri.host) if uri.tls_verify_peer else None
    context = client_context(
        None if uri.tls_certificates is None else Path(uri.tls_certificates),
        verify_peer=uri.tls_verify_peer,
        check_hostname=hostname is not None,
    )
    return ClientTls(context, hostname)


async def reach_tls(sock: socket.socket, exchange: OptionExchange) -> None:
    """Converse on `sock` up to where `exchange` wants TLS; the caller limits the time.

    Raises:
        ProtocolError: the server does not offer TLS, or breaks the protocol. OSError: the connection broke.
    """
    loop = asyncio.get_running_loop()
    while not exchange.wants_tls:
        data = await loop.sock_recv(sock, RECEIVE_BYTES)
        if not data:
            raise exchange.closed()
        await loop.sock_sendall(sock, exchange.receive(data))
