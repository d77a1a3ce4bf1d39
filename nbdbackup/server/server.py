"""The NBD server: accepts clients on every listener and runs a session for each.

Whoever can connect is not trusted: what all clients hold in memory has one budget, TCP clients
must come from an allowed address and are looked after by keepalive, and a handshake has a time limit.
So has being asked to stop: who does not read its last replies is disconnected.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

from nbdbackup.errors import NotFoundError, ProtocolError
from nbdbackup.nbd.agreement import TlsMode
from nbdbackup.server import handshake
from nbdbackup.server.budget import SharedBudget
from nbdbackup.server.exports import ExportTable
from nbdbackup.server.handshake import Agreement, Handshake
from nbdbackup.server.listener import AddressRange, Listener, is_allowed
from nbdbackup.server.polling import Poller
from nbdbackup.server.session import Session
from nbdbackup.server.tls import ServerTls
from nbdbackup.tls.stream import TlsStream

logger = logging.getLogger(__name__)

ACCEPT_PAUSE_S = 0.1
SOCKET_BUFFER_BYTES = 1 << 20
KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 15
KEEPALIVE_PROBES = 4
"""A TCP client whose machine is gone is noticed after two minutes."""


@dataclass(slots=True, eq=False)
class _Entrance:
    """A listener and who came in there. `slots` None: no limit but the server's."""

    listener: Listener
    slots: asyncio.Semaphore | None = None
    handshake_s: float | None = field(default_factory=lambda: handshake.HANDSHAKE_TIMEOUT_S)
    accepting: asyncio.Task[None] | None = None
    clients: set[asyncio.Task[None]] = field(default_factory=set)
    connections: set[Handshake | Session] = field(default_factory=set)


class Server:
    """Serves `exports` on `listeners`, at most `clients_max` clients at once (0: no limit).

    TCP clients must be in one of the `allowed` ranges, if there are any; `tls` None: none is offered.
    `poll_max_s`: see `Poller`.
    `last_client_left` is set when a client leaves and none remains.
    """

    def __init__(
        self,
        exports: ExportTable,
        listeners: Sequence[Listener],
        clients_max: int = 0,
        allowed: Sequence[AddressRange] = (),
        tls: ServerTls | None = None,
        poll_max_s: float = 0.0,
    ) -> None:
        self.exports = exports
        self._entrances = [_Entrance(listener) for listener in listeners]
        self._tls = tls
        self._allowed = tuple(allowed)
        self._budget = SharedBudget()
        self._poller = Poller(poll_max_s)
        self._slots = asyncio.Semaphore(clients_max) if clients_max else None
        # Changing while running.
        self._group: asyncio.TaskGroup | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._stop_asked = asyncio.Event()
        self.last_client_left = asyncio.Event()

    @property
    def listeners(self) -> list[Listener]:
        """Where it listens."""
        return [entrance.listener for entrance in self._entrances]

    @property
    def sessions(self) -> set[Session]:
        """Of the clients that have chosen an export."""
        return {
            connection
            for entrance in self._entrances
            for connection in entrance.connections
            if isinstance(connection, Session)
        }

    @property
    def client_count(self) -> int:
        """Connected clients, negotiating ones too."""
        return len(self._clients)

    def requests_in_flight(self) -> dict[str, int]:
        """How many requests the devices are busy with, for each export that has any."""
        counts: dict[str, int] = {}
        for session in self.sessions:
            if session.requests_in_flight:
                name = session.export_name
                counts[name] = counts.get(name, 0) + session.requests_in_flight
        return counts

    def uris(self, export: str = "") -> list[str]:
        """The URI of `export` on each listener."""
        tls = self._tls is not None and self._tls.mode is TlsMode.REQUIRE
        return [listener.uri(export, tls=tls) for listener in self.listeners]

    async def run(self) -> None:
        """Accept and serve until `stop`, then until the last client is gone. Listeners may come and go."""
        async with asyncio.TaskGroup() as self._group:
            for entrance in self._entrances:
                self._open(entrance, self._group)
            await self._stop_asked.wait()

    def add_listener(self, listener: Listener, clients_max: int, handshake_s: float | None) -> None:
        """Listen there as well, for at most `clients_max` clients at once (0: no limit of its own).

        The server runs. `handshake_s` is how long a client may take to choose an export (None: for ever).
        """
        assert self._group is not None
        slots = asyncio.Semaphore(clients_max) if clients_max else None
        entrance = _Entrance(listener, slots, handshake_s)
        self._entrances.append(entrance)
        self._open(entrance, self._group)

    async def remove_listener(self, listener: Listener) -> None:
        """Stop listening there and disconnect who came in there; on return they are gone."""
        entrance = next(entrance for entrance in self._entrances if entrance.listener is listener)
        self._entrances.remove(entrance)
        assert entrance.accepting is not None
        entrance.accepting.cancel()
        for connection in tuple(entrance.connections):
            if isinstance(connection, Session):
                connection.disconnect("the server no longer listens at its address")
            else:
                connection.shut_down()
        await asyncio.wait([entrance.accepting, *entrance.clients])

    def stop(self) -> None:
        """Stop accepting; sessions finish what is in flight and end, negotiating clients are refused."""
        self._stop_asked.set()
        for entrance in self._entrances:
            if entrance.accepting is not None:
                entrance.accepting.cancel()
            for connection in entrance.connections:
                connection.shut_down()

    def _open(self, entrance: _Entrance, group: asyncio.TaskGroup) -> None:
        entrance.accepting = group.create_task(self._accept_for_ever(group, entrance))
        # Not in `stop`: the event loop must have let go of the socket first. Nor at the end of the task: one
        # that is cancelled before it has begun has no end.
        entrance.accepting.add_done_callback(lambda _: entrance.listener.close())
        if self._stop_asked.is_set():
            entrance.accepting.cancel()

    async def _accept_for_ever(self, group: asyncio.TaskGroup, entrance: _Entrance) -> None:
        loop = asyncio.get_running_loop()
        listener = entrance.listener
        slots = [slots for slots in (entrance.slots, self._slots) if slots is not None]
        while True:
            async with AsyncExitStack() as taken:
                for semaphore in slots:
                    await taken.enter_async_context(semaphore)
                try:
                    sock, address = await loop.sock_accept(listener.sock)
                except OSError as error:
                    if error.errno not in (errno.ECONNABORTED, errno.EINTR):
                        logger.error("cannot accept a client on %s: %s", listener.uri(), error.strerror)
                        await asyncio.sleep(ACCEPT_PAUSE_S)
                    continue
                if not is_allowed(sock.family, address, self._allowed):
                    peer = _describe_peer(sock, listener)
                    logger.warning("client %s refused: no --allow range has it", peer)
                    sock.close()
                    continue
                client = group.create_task(self._serve_client(sock, entrance))
                self._clients.add(client)
                entrance.clients.add(client)
                client.add_done_callback(partial(self._forget_client, entrance, slots))
                taken.pop_all()

    def _forget_client(
        self, entrance: _Entrance, slots: Sequence[asyncio.Semaphore], client: asyncio.Task[None]
    ) -> None:
        self._clients.discard(client)
        entrance.clients.discard(client)
        for semaphore in slots:
            semaphore.release()
        if not self._clients:
            self.last_client_left.set()

    async def _serve_client(self, sock: socket.socket, entrance: _Entrance) -> None:
        """One client from accept to close. Its faults, and our bugs with it, end here."""
        peer = _describe_peer(sock, entrance.listener)
        try:
            with sock:
                _tune(sock)
                await self._negotiate_and_serve(sock, peer, entrance)
        except ProtocolError as error:
            logger.warning("client %s disconnected: %s", peer, error)
        except NotFoundError as error:
            logger.info("client %s disconnected: %s", peer, error)
        except OSError as error:
            logger.info("connection to client %s broke: %s", peer, error.strerror or error)
        except Exception:
            logger.exception("client %s disconnected by an internal error", peer)

    async def _negotiate_and_serve(self, sock: socket.socket, peer: str, entrance: _Entrance) -> None:
        negotiation = Handshake(sock, self.exports, self._tls, entrance.handshake_s)
        entrance.connections.add(negotiation)
        try:
            if self._stop_asked.is_set() or entrance not in self._entrances:
                negotiation.shut_down()
            agreement = await negotiation.run()
        except ConnectionError:
            agreement = None  # a probe, most likely: it did not wait for our greeting
        finally:
            entrance.connections.discard(negotiation)
        if agreement is None:
            logger.debug("client %s left without choosing an export", peer)
            return
        export = self.exports.get(agreement.negotiated.export.name)
        session = Session(agreement.stream, export, agreement.negotiated, self._budget, self._poller)
        logger.info("client %s uses export %s (%s)", peer, export.name, _describe_agreement(agreement))
        entrance.connections.add(session)
        try:
            if self._stop_asked.is_set() or entrance not in self._entrances:
                session.shut_down()
            await session.run(agreement.leftover)
        finally:
            entrance.connections.discard(session)
            if isinstance(agreement.stream, TlsStream):
                agreement.stream.close()
        logger.info("client %s left export %s", peer, export.name)


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A client whose machine has died says nothing; without this its session would stay for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def _describe_agreement(agreement: Agreement) -> str:
    """How the two talk to each other, for whoever wonders why a client is slow, or in the clear."""
    negotiated, stream = agreement.negotiated, agreement.stream
    replies = "structured" if negotiated.structured_replies else "simple"
    if negotiated.extended_headers:
        replies = "extended"
    return f"{replies} replies, {stream.version if isinstance(stream, TlsStream) else 'no TLS'}"


def _describe_peer(sock: socket.socket, listener: Listener) -> str:
    if sock.family == socket.AF_UNIX:
        return f"on {listener.path}"
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "(gone)"
    return f"{host}:{port}"
