"""Negotiation over a socket: moves bytes between it and `nbd.negotiation`."""

import asyncio
import socket
from contextlib import suppress

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.negotiation import ExportCatalog, HandshakeError, Negotiated, ServerNegotiation

HANDSHAKE_TIMEOUT_S = 10
RECEIVE_BYTES = 64 << 10


async def negotiate(sock: socket.socket, catalog: ExportCatalog) -> tuple[Negotiated, bytes] | None:
    """Agree with the client on an export; None if it left without one.

    The bytes are what the client sent behind its last option.

    Raises:
        ProtocolError: the client broke the protocol, or took longer than `HANDSHAKE_TIMEOUT_S`.
        OSError: the connection broke.
    """
    loop = asyncio.get_running_loop()
    negotiation = ServerNegotiation(catalog)
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            await loop.sock_sendall(sock, negotiation.greeting())
            while negotiation.result is None and not negotiation.aborted:
                data = await loop.sock_recv(sock, RECEIVE_BYTES)
                if not data:
                    return None
                await loop.sock_sendall(sock, negotiation.receive(data))
    except HandshakeError as error:
        # A last word, as far as the socket takes it: the client may not be listening.
        with suppress(OSError):
            sock.send(error.reply)
        raise
    except TimeoutError:
        raise ProtocolError(f"no export chosen within {HANDSHAKE_TIMEOUT_S} s") from None
    if negotiation.result is None:
        return None
    return negotiation.result, negotiation.leftover
