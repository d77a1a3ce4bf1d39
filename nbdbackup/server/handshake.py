"""Negotiation over a socket: moves bytes between it and `nbd.negotiation`."""

import asyncio
import socket
from contextlib import suppress

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.negotiation import ExportCatalog, HandshakeError, Negotiated, ServerNegotiation

HANDSHAKE_TIMEOUT_S = 10.0
SHUTDOWN_TIMEOUT_S = 1.0
"""How long a client that is still negotiating may take to hear that the server is shutting down."""
RECEIVE_BYTES = 64 << 10


class Handshake:
    """One client's negotiation on `sock` (connected, non-blocking), at most `HANDSHAKE_TIMEOUT_S` long."""

    def __init__(self, sock: socket.socket, catalog: ExportCatalog) -> None:
        # Set once.
        self._sock = sock
        self._negotiation = ServerNegotiation(catalog)
        # Changes while running.
        self._timeout: asyncio.Timeout | None = None

    def shut_down(self) -> None:
        """Refuse every option from now on, and end soon (12)."""
        self._negotiation.shutting_down = True
        if self._timeout is not None:
            due = self._timeout.when()
            soon = asyncio.get_running_loop().time() + SHUTDOWN_TIMEOUT_S
            if due is not None and due > soon:
                self._timeout.reschedule(soon)

    async def run(self) -> tuple[Negotiated, bytes] | None:
        """Agree with the client on an export; None if it left without one.

        The bytes are what the client sent behind its last option.

        Raises:
            ProtocolError: the client broke the protocol, or took too long.
            OSError: the connection broke.
        """
        limit_s = SHUTDOWN_TIMEOUT_S if self._negotiation.shutting_down else HANDSHAKE_TIMEOUT_S
        try:
            async with asyncio.timeout(limit_s) as self._timeout:
                return await self._exchange()
        except HandshakeError as error:
            # A last word, as far as the socket takes it: the client may not be listening.
            with suppress(OSError):
                self._sock.send(error.reply)
            raise
        except TimeoutError:
            if self._negotiation.shutting_down:
                return None
            raise ProtocolError(f"no export chosen within {HANDSHAKE_TIMEOUT_S:g} s") from None

    async def _exchange(self) -> tuple[Negotiated, bytes] | None:
        loop = asyncio.get_running_loop()
        negotiation = self._negotiation
        await loop.sock_sendall(self._sock, negotiation.greeting())
        while negotiation.result is None and not negotiation.aborted:
            data = await loop.sock_recv(self._sock, RECEIVE_BYTES)
            if not data:
                return None
            await loop.sock_sendall(self._sock, negotiation.receive(data))
        if negotiation.result is None:
            return None
        return negotiation.result, negotiation.leftover
