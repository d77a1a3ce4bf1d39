"""Negotiation over a socket: moves bytes between it, or TLS on it, and `nbd.negotiation`."""

import asyncio
import socket
from contextlib import suppress

import msgspec

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.agreement import Negotiated, TlsMode
from nbdbackup.nbd.negotiation import HandshakeError, ServerNegotiation
from nbdbackup.server.exports import ClientCatalog, ExportTable
from nbdbackup.server.tls import ServerTls
from nbdbackup.tls.stream import TlsStream

HANDSHAKE_TIMEOUT_S = 10.0
SHUTDOWN_TIMEOUT_S = 1.0
"""How long a client that is still negotiating may take to hear that the server is shutting down."""
RECEIVE_BYTES = 64 << 10


class Agreement(msgspec.Struct, frozen=True):
    """The end of a negotiation, and what the session goes on with."""

    negotiated: Negotiated
    leftover: bytes
    """What the client sent behind its last option."""
    stream: socket.socket | TlsStream


class Handshake:
    """One client's negotiation on `sock` (connected, non-blocking).

    It takes at most `limit_s` seconds (None: there is no limit).
    """

    def __init__(
        self,
        sock: socket.socket,
        exports: ExportTable,
        tls: ServerTls | None = None,
        limit_s: float | None = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        # Set once.
        self._sock = sock
        self._tls = tls
        self._limit_s = limit_s
        self._catalog = ClientCatalog(exports)
        self._negotiation = ServerNegotiation(self._catalog, TlsMode.OFF if tls is None else tls.mode)
        # Changes while running.
        self._stream: socket.socket | TlsStream = sock
        self._timeout: asyncio.Timeout | None = None

    def shut_down(self) -> None:
        """Refuse every option from now on, and end soon (12)."""
        self._negotiation.shutting_down = True
        if self._timeout is not None:
            due = self._timeout.when()
            soon = asyncio.get_running_loop().time() + SHUTDOWN_TIMEOUT_S
            if due is None or due > soon:
                self._timeout.reschedule(soon)

    async def run(self) -> Agreement | None:
        """Agree with the client on an export, and before that on TLS if either wants it.

        None if it left without an export.

        Raises:
            ProtocolError: the client broke the protocol, failed to set up TLS, or took too long.
            OSError: the connection broke.
        """
        limit_s = SHUTDOWN_TIMEOUT_S if self._negotiation.shutting_down else self._limit_s
        try:
            async with asyncio.timeout(limit_s) as self._timeout:
                return await self._exchange()
        except HandshakeError as error:
            # A last word, as far as the socket takes it: the client may not be listening.
            with suppress(OSError):
                self._stream.send(memoryview(error.reply))
            raise
        except TimeoutError:
            if self._negotiation.shutting_down:
                return None
            raise ProtocolError(f"no export chosen within {self._limit_s:g} s") from None
        finally:
            if self._negotiation.result is None and isinstance(self._stream, TlsStream):
                self._stream.close()

    async def _exchange(self) -> Agreement | None:
        negotiation = self._negotiation
        await self._send(negotiation.greeting())
        while negotiation.result is None and not negotiation.aborted:
            data = await self._receive()
            if not data:
                return None
            await self._send(negotiation.receive(data))
            if negotiation.wants_tls:
                assert self._tls is not None
                self._stream = await self._tls.accept(self._sock)
                self._catalog.identify(self._stream.peer_name)
                negotiation.tls_started()
        if negotiation.result is None:
            return None
        return Agreement(negotiation.result, negotiation.leftover, self._stream)

    async def _receive(self) -> bytes:
        if isinstance(self._stream, TlsStream):
            return await self._stream.receive(RECEIVE_BYTES)
        return await asyncio.get_running_loop().sock_recv(self._stream, RECEIVE_BYTES)

    async def _send(self, data: bytes) -> None:
        if isinstance(self._stream, TlsStream):
            await self._stream.send_all(data)
        else:
            await asyncio.get_running_loop().sock_sendall(self._stream, data)
