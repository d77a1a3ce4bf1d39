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

from nbdbackup.errors import NotFoundError, ProtocolError
from nbdbackup.nbd.agreement import TlsMode
from nbdbackup.server.budget import SharedBudget
from nbdbackup.server.exports import ExportTable
from nbdbackup.server.handshake import Agreement, Handshake
from nbdbackup.server.listener import AddressRange, Listener, is_allowed
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


class Server:
    """Serves `exports` on `listeners`, at most `clients_max` clients at once (0: no limit).

    TCP clients must be in one of the `allowed` ranges, if there are any; `tls` None: none is offered.
    `last_client_left` is set when a client leaves and none remains.
    """

    def __init__(
        self,
        exports: ExportTable,
        listeners: Sequence[Listener],
        clients_max: int = 0,
        allowed: Sequence[AddressRange] = (),
        tls: ServerTls | None = None,
    ) -> None:
        self.exports = exports
        self.listeners = list(listeners)
        self._tls = tls
        self._allowed = tuple(allowed)
        self._budget = SharedBudget()
        self._slots = asyncio.Semaphore(clients_max) if clients_max else None
        # Changing while running.
        self._accepting: list[asyncio.Task[None]] = []
        self._clients: set[asyncio.Task[None]] = set()
        self._handshakes: set[Handshake] = set()
        self._sessions: set[Session] = set()
        self._stopping = False
        self.last_client_left = asyncio.Event()

    @property
    def client_count(self) -> int:
        """Connected clients, negotiating ones too."""
        return len(self._clients)

    def requests_in_flight(self) -> dict[str, int]:
        """How many requests the devices are busy with, for each export that has any."""
        counts: dict[str, int] = {}
        for session in self._sessions:
            if session.requests_in_flight:
                name = session.export_name
                counts[name] = counts.get(name, 0) + session.requests_in_flight
        return counts

    def uris(self, export: str = "") -> list[str]:
        """The URI of `export` on each listener."""
        tls = self._tls is not None and self._tls.mode is TlsMode.REQUIRE
        return [listener.uri(export, tls=tls) for listener in self.listeners]

    async def run(self) -> None:
        """Accept and serve until `stop`; ends when the last client is gone."""
        async with asyncio.TaskGroup() as group:
            self._accepting = [
                group.create_task(self._accept(group, listener)) for listener in self.listeners
            ]

    def stop(self) -> None:
        """Stop accepting; sessions finish what is in flight and end, negotiating clients are refused."""
        self._stopping = True
        for accepting in self._accepting:
            accepting.cancel()
        for session in self._sessions:
            session.shut_down()
        for handshake in self._handshakes:
            handshake.shut_down()

    async def _accept(self, group: asyncio.TaskGroup, listener: Listener) -> None:
        try:
            await self._accept_for_ever(group, listener)
        finally:
            # Here, and not in `stop`: the event loop must have let go of the socket first.
            listener.close()

    async def _accept_for_ever(self, group: asyncio.TaskGroup, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._slots is not None:
                await self._slots.acquire()
            try:
                sock, address = await loop.sock_accept(listener.sock)
            except BaseException as error:
                if self._slots is not None:
                    self._slots.release()
                if not isinstance(error, OSError):
                    raise
                if error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    logger.error("cannot accept a client on %s: %s", listener.uri(), error.strerror)
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if not is_allowed(sock.family, address, self._allowed):
                logger.warning("client %s refused: no --allow range has it", _describe_peer(sock, listener))
                sock.close()
                if self._slots is not None:
                    self._slots.release()
                continue
            client = group.create_task(self._serve_client(sock, listener))
            self._clients.add(client)
            client.add_done_callback(self._forget_client)

    def _forget_client(self, client: asyncio.Task[None]) -> None:
        self._clients.discard(client)
        if self._slots is not None:
            self._slots.release()
        if not self._clients:
            self.last_client_left.set()

    async def _serve_client(self, sock: socket.socket, listener: Listener) -> None:
        """One client from accept to close. Its faults, and our bugs with it, end here."""
        peer = _describe_peer(sock, listener)
        try:
            with sock:
                _tune(sock)
                await self._negotiate_and_serve(sock, peer)
        except ProtocolError as error:
            logger.warning("client %s disconnected: %s", peer, error)
        except NotFoundError as error:
            logger.info("client %s disconnected: %s", peer, error)
        except OSError as error:
            logger.info("connection to client %s broke: %s", peer, error.strerror or error)
        except Exception:
            logger.exception("client %s disconnected by an internal error", peer)

    async def _negotiate_and_serve(self, sock: socket.socket, peer: str) -> None:
        handshake = Handshake(sock, self.exports, self._tls)
        self._handshakes.add(handshake)
        try:
            if self._stopping:
                handshake.shut_down()
            agreement = await handshake.run()
        except ConnectionError:
            agreement = None  # a probe, most likely: it did not wait for our greeting
        finally:
            self._handshakes.discard(handshake)
        if agreement is None:
            logger.debug("client %s left without choosing an export", peer)
            return
        export = self.exports.get(agreement.negotiated.export.name)
        session = Session(agreement.stream, export, agreement.negotiated, self._budget)
        logger.info("client %s uses export %s (%s)", peer, export.name, _describe_agreement(agreement))
        self._sessions.add(session)
        try:
            if self._stopping:
                session.shut_down()
            await session.run(agreement.leftover)
        finally:
            self._sessions.discard(session)
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
