"""One connection to an NBD server: operations out, replies in, no promise beyond that.

A connection negotiates, carries operations until it is lost, and then hands back those that have
no reply yet (`abandon`): whether to send them again is for `block/nbd_session.py` to say.

asyncio's transport moves the bytes; `nbd.client` and `nbd.reply_parser` know what they mean, and the
latter where they belong: a large read goes from the socket into the reader's own buffer. What a
server may make us wait for or keep is bounded: a handshake by `connect_timeout_s`, a reply by
`reply_timeout_s` without a byte from the server while any is due, operations in flight by
`OPERATIONS_MAX`, bytes that wait for the socket by `WRITE_BUFFER_BYTES` and one operation more.
"""

import asyncio
import socket
import ssl
from dataclasses import dataclass, field
from typing import Protocol, cast

import msgspec

from nbdbackup.block.device import ReadableBuffer
from nbdbackup.block.nbd_tls import ClientTls, reach_tls
from nbdbackup.errors import NbdBackupError, ProtocolError
from nbdbackup.nbd.client import ClientNegotiation, RemoteExport, encode_request
from nbdbackup.nbd.constants import Command
from nbdbackup.nbd.reply_parser import Reply, ReplyParser
from nbdbackup.nbd.uri import NbdUri
from nbdbackup.tls.credentials import explain

RECEIVE_BYTES = 16 << 10
"""At once in the handshake, and where what is received does not matter any more."""
OPERATIONS_MAX = 64
WRITE_BUFFER_BYTES = 1 << 20
INLINE_PAYLOAD_BYTES = 64 << 10
"""A payload up to this long is joined to its head: one send is cheaper than two."""
KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_PROBES = 3

_HUNG_UP = "the server closed the connection"

Outcome = Reply | OSError


@dataclass(slots=True, eq=False)
class Operation:
    """One request, from being asked for to its outcome, over as many connections as it takes."""

    # Set once. `flags` are CommandFlags; `buffer` is what a READ fills.
    command: Command
    offset: int = 0
    length: int = 0
    flags: int = 0
    payload: ReadableBuffer = b""
    buffer: memoryview | None = None
    outcome: "asyncio.Future[Outcome]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    # Changing: how often it was sent, where it is under way, what `journal` knew then.
    tries: int = 0
    connection: "Connection | None" = None
    journal_mark: int = 0
    is_cancelled: bool = False
    contexts: tuple[tuple[int, str], ...] = ()
    """Which meta context has which number on the connection that the reply came over."""

    def end(self, outcome: Outcome) -> None:
        """Tell whoever waits; only the first outcome counts."""
        self.connection = None
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class Limits(msgspec.Struct, frozen=True):
    """How long a server may take, in seconds."""

    connect_timeout_s: float = 10.0
    """From the first packet to the end of the handshake."""
    reply_timeout_s: float = 300.0
    """Silence while a reply is due; a flush of a slow disk takes minutes."""


class Owner(Protocol):
    """Who is told what happens on a connection."""

    def on_reply(self, operation: Operation, reply: Reply) -> None:
        """`operation` has its reply."""

    def on_room(self) -> None:
        """A connection that was full because its server did not read is so no more."""

    def on_lost(self, connection: "Connection", cause: Exception) -> None:
        """A connection that had been negotiated has ended, and its owner did not end it."""


class Connection(asyncio.BufferedProtocol):
    """A connection for `owner` that begins with `negotiation`; made by `connect`.

    Set once negotiated: `export`.
    """

    export: RemoteExport

    def __init__(self, negotiation: ClientNegotiation, limits: Limits, owner: Owner) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._negotiation: ClientNegotiation | None = negotiation
        self._negotiated: asyncio.Future[Exception | None] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._parser: ReplyParser
        # Changing while running.
        self._operations: dict[int, Operation] = {}
        self._cookie = 0
        self._cause: Exception | None = None
        self._is_paused = False
        self._is_leaving = False
        self._heard_at = 0.0
        self._watchdog: asyncio.TimerHandle | None = None

    @property
    def in_flight(self) -> int:
        """How many operations have no reply yet."""
        return len(self._operations)

    @property
    def is_lost(self) -> bool:
        """Whether it has ended; what was negotiated but ended at once is not told to the owner."""
        return self._cause is not None or self._closed.done()

    @property
    def is_full(self) -> bool:
        """Whether `start` has to wait: too much is under way, or the server does not read."""
        return self._is_paused or len(self._operations) >= OPERATIONS_MAX

    def start(self, operation: Operation) -> None:
        """Send `operation`; its reply goes to the owner."""
        assert self._transport is not None
        if not self._operations:
            self._heard_at = self._loop.time()
        self._cookie += 1
        operation.tries += 1
        operation.connection = self
        self._operations[self._cookie] = operation
        command, offset, length = operation.command, operation.offset, operation.length
        self._parser.expect(command, self._cookie, offset, length, operation.buffer)
        head = encode_request(
            command, self._cookie, offset, length, operation.flags, extended=self.export.extended_headers
        )
        if len(operation.payload) <= INLINE_PAYLOAD_BYTES:
            self._transport.write(head + operation.payload)
        else:
            self._transport.write(head)
            self._transport.write(operation.payload)
        if self._watchdog is None:
            self._watchdog = self._loop.call_later(self._limits.reply_timeout_s, self._look_for_stall)

    def fail(self, cause: Exception) -> None:
        """Give the connection up because of `cause`; the owner is told soon."""
        if self._cause is None:
            self._cause = cause
        if self._transport is not None:
            self._transport.abort()

    def abandon(self) -> list[Operation]:
        """End the connection at once; the operations without reply, in the order they were sent."""
        self._is_leaving = True
        if self._transport is not None:
            self._transport.abort()
        orphans = list(self._operations.values())
        self._operations.clear()
        for operation in orphans:
            operation.connection = None
        return orphans

    async def close(self) -> None:
        """Take leave of the server; nothing may be in flight."""
        self._is_leaving = True
        if self._transport is None:
            return
        if not self._transport.is_closing():
            extended = self._negotiation is None and self.export.extended_headers
            self._transport.write(encode_request(Command.DISC, 0, 0, 0, extended=extended))
            self._transport.close()
        if not await _settled(self._closed, self._limits.connect_timeout_s):
            self._transport.abort()
            await self._closed

    async def wait_negotiated(self) -> None:
        """Wait for the end of the handshake.

        Raises:
            NotFoundError, ProtocolError, OSError: there will be no transmission.
        """
        failure = await asyncio.shield(self._negotiated)
        if failure is not None:
            raise failure

    async def start_tls(self, sock: socket.socket, tls: ClientTls) -> None:
        """Go on with `sock`, on which nothing was said yet, and TLS.

        Raises:
            ProtocolError: the server offers none, or not such that we could trust it.
            OSError: the connection broke.
        """
        assert self._negotiation is not None
        await reach_tls(sock, self._negotiation)
        try:
            await self._loop.create_connection(
                lambda: self, sock=sock, ssl=tls.context, server_hostname=tls.hostname or ""
            )
        except ssl.SSLError as error:
            raise ProtocolError(f"TLS handshake failed: {explain(error)}") from None
        except ConnectionError:
            raise ConnectionResetError("the server hung up in the TLS handshake") from None

    # asyncio.BufferedProtocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        if self._negotiation is not None and self._negotiation.wants_tls:
            self._transport.write(self._negotiation.tls_started())

    def get_buffer(self, sizehint: int) -> memoryview:
        # Once the connection is given up, its reads may be done on another, into the same memory.
        if self._is_given_up or self._negotiation is not None:
            return self._received
        return self._parser.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_given_up:
            return
        self._heard_at = self._loop.time()
        try:
            if self._negotiation is None:
                self._take_replies(self._parser.received(nbytes))
            else:
                self._negotiate(self._negotiation, self._received[:nbytes])
        except NbdBackupError as error:
            self.fail(error)

    def eof_received(self) -> None:
        # Not the transport's own close, which waits until all is sent.
        self.fail(ConnectionResetError(_HUNG_UP) if self._negotiation is None else self._negotiation.closed())

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError):
            exc = ConnectionAbortedError(f"TLS: {explain(exc)}")
        cause = self._cause or exc or ConnectionResetError(_HUNG_UP)
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not self._closed.done():
            self._closed.set_result(None)
        if not self._negotiated.done():
            self._negotiated.set_result(cause)
        elif not self._is_leaving:
            self._owner.on_lost(self, cause)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._owner.on_room()

    # Below.

    @property
    def _is_given_up(self) -> bool:
        return self._cause is not None or self._is_leaving

    def _negotiate(self, negotiation: ClientNegotiation, data: memoryview) -> None:
        assert self._transport is not None
        self._transport.write(negotiation.receive(data))
        if negotiation.result is None:
            return
        self._negotiation = None
        self.export = negotiation.result
        self._parser = ReplyParser(
            structured=self.export.structured_replies,
            extended=self.export.extended_headers,
            context_ids=[number for number, _ in self.export.contexts],
        )
        self._negotiated.set_result(None)
        self._take_replies(self._parser.receive(negotiation.leftover))

    def _take_replies(self, replies: list[Reply]) -> None:
        for reply in replies:
            operation = self._operations.pop(reply.cookie, None)
            if operation is None:
                return  # abandoned by what an earlier reply led to
            operation.connection = None
            operation.contexts = self.export.contexts
            self._owner.on_reply(operation, reply)

    def _look_for_stall(self) -> None:
        self._watchdog = None
        limit = self._limits.reply_timeout_s
        silent_s = self._loop.time() - self._heard_at
        if not self._operations:
            return  # the next `start` sets it again
        if silent_s >= limit:
            self.fail(TimeoutError(f"the server has not answered for {limit:g} s"))
        else:
            self._watchdog = self._loop.call_later(limit - silent_s, self._look_for_stall)


async def connect(
    uri: NbdUri, tls: ClientTls | None, negotiation: ClientNegotiation, limits: Limits, owner: Owner
) -> Connection:
    """Connect to `uri`, with `tls` if it says so, and negotiate; see `Connection` for the rest.

    Raises:
        OSError: nobody can be reached there, or not within `limits`.
        NotFoundError, ProtocolError: the server has no such export, refuses it, or is none.
    """
    loop = asyncio.get_running_loop()
    connection = Connection(negotiation, limits, owner)
    try:
        async with asyncio.timeout(limits.connect_timeout_s):
            sock = await connected_socket(uri)
            try:
                if tls is None:
                    await loop.create_connection(lambda: connection, sock=sock)
                else:
                    await connection.start_tls(sock, tls)
            except BaseException:
                sock.close()
                raise
            await connection.wait_negotiated()
            if connection.is_lost:
                raise ConnectionResetError(_HUNG_UP)
    except TimeoutError:
        connection.abandon()
        raise TimeoutError(f"no answer within {limits.connect_timeout_s:g} s") from None
    except BaseException:
        connection.abandon()
        raise
    return connection


async def connected_socket(uri: NbdUri) -> socket.socket:
    """A non-blocking socket that is connected to the server of `uri`; raises OSError."""
    loop = asyncio.get_running_loop()
    if uri.socket_path is not None:
        return await _try_address(socket.AF_UNIX, uri.socket_path)
    found = await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
    failure: OSError = OSError("no address")
    for family, _, _, _, address in found:
        try:
            return await _try_address(family, address)
        except OSError as error:
            failure = error
    raise failure


async def _try_address(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        await asyncio.get_running_loop().sock_connect(sock, cast(str, address))
    except BaseException:
        sock.close()
        raise
    return sock


async def _settled(future: "asyncio.Future[None]", timeout_s: float) -> bool:
    done, _ = await asyncio.wait([future], timeout=timeout_s)
    return bool(done)
