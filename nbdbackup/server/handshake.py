"""Negotiation over a socket: moves bytes between it, or TLS on it, and `nbd.negotiation`."""

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.negotiation import ExportCatalog, HandshakeError, Negotiated, ServerNegotiation, TlsMode
from nbdbackup.server.tls import ServerTls
from nbdbackup.tls.stream import TlsStream

HANDSHAKE_TIMEOUT_S = 10
RECEIVE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Agreement:
    """The end of a negotiation, and what the session goes on with."""

    negotiated: Negotiated
    leftover: bytes
    """What the client sent behind its last option."""
    stream: socket.socket | TlsStream


async def negotiate(
    sock: socket.socket, catalog: ExportCatalog, tls: ServerTls | None = None
) -> Agreement | None:
    """Agree with the client on an export, and before that on TLS if either wants it.

    None if the client left without an export.

    Raises:
        ProtocolError: the client broke the protocol, failed to set up TLS, or took longer than
            `HANDSHAKE_TIMEOUT_S` for all of it.
        OSError: the connection broke.
    """
    negotiation = ServerNegotiation(catalog, TlsMode.OFF if tls is None else tls.mode)
    stream: socket.socket | TlsStream = sock
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            await _send(stream, negotiation.greeting())
            while negotiation.result is None and not negotiation.aborted:
                data = await _receive(stream)
                if not data:
                    return None
                await _send(stream, negotiation.receive(data))
                if negotiation.wants_tls:
                    assert tls is not None
                    stream = await tls.accept(sock)
                    negotiation.tls_started()
    except HandshakeError as error:
        # A last word, as far as the socket takes it: the client may not be listening.
        with suppress(OSError):
            stream.send(memoryview(error.reply))
        raise
    except TimeoutError:
        raise ProtocolError(f"no export chosen within {HANDSHAKE_TIMEOUT_S} s") from None
    finally:
        if negotiation.result is None and isinstance(stream, TlsStream):
            stream.close()
    if negotiation.result is None:
        return None
    return Agreement(negotiation.result, negotiation.leftover, stream)


async def _receive(stream: socket.socket | TlsStream) -> bytes:
    if isinstance(stream, TlsStream):
        return await stream.receive(RECEIVE_BYTES)
    return await asyncio.get_running_loop().sock_recv(stream, RECEIVE_BYTES)


async def _send(stream: socket.socket | TlsStream, data: bytes) -> None:
    if isinstance(stream, TlsStream):
        await stream.send_all(data)
    else:
        await asyncio.get_running_loop().sock_sendall(stream, data)
