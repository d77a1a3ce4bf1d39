"""The NBD server: accepts clients on every listener and runs a session for each."""

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence

from nbdbackup.errors import NotFoundError, ProtocolError
from nbdbackup.server.exports import ExportTable
from nbdbackup.server.handshake import negotiate
from nbdbackup.server.listener import Listener
from nbdbackup.server.session import Session

logger = logging.getLogger(__name__)

ACCEPT_PAUSE_S = 0.1
SOCKET_BUFFER_BYTES = 1 << 20


class Server:
    """Serves `exports` on `listeners`, at most `clients_max` clients at once (0: no limit).

    `last_client_left` is set when a client leaves and none remains.
    """

    def __init__(self, exports: ExportTable, listeners: Sequence[Listener], clients_max: int = 0) -> None:
        self.exports = exports
        self.listeners = list(listeners)
        self._slots = asyncio.Semaphore(clients_max) if clients_max else None
        # Changing while running.
        self._accepting: list[asyncio.Task[None]] = []
        self._clients: set[asyncio.Task[None]] = set()
        self._sessions: dict[asyncio.Task[None], Session] = {}
        self.last_client_left = asyncio.Event()

    @property
    def client_count(self) -> int:
        """Connected clients, negotiating ones too."""
        return len(self._clients)

    def uris(self, export: str = "") -> list[str]:
        """The URI of `export` on each listener."""
        return [listener.uri(export) for listener in self.listeners]

    async def run(self) -> None:
        """Accept and serve until `stop`; ends when the last client is gone."""
        async with asyncio.TaskGroup() as group:
            self._accepting = [
                group.create_task(self._accept(group, listener)) for listener in self.listeners
            ]

    def stop(self) -> None:
        """Stop accepting; sessions finish what is in flight and end, negotiating clients are dropped."""
        for accepting in self._accepting:
            accepting.cancel()
        for session in self._sessions.values():
            session.shut_down()
        for client in self._clients - self._sessions.keys():
            client.cancel()

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
                sock, _ = await loop.sock_accept(listener.sock)
            except BaseException as error:
                if self._slots is not None:
                    self._slots.release()
                if not isinstance(error, OSError):
                    raise
                if error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    logger.error("cannot accept a client on %s: %s", listener.uri(), error.strerror)
                    await asyncio.sleep(ACCEPT_PAUSE_S)
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
        try:
            agreed = await negotiate(sock, self.exports)
        except ConnectionError:
            agreed = None  # a probe, most likely: it did not wait for our greeting
        if agreed is None:
            logger.debug("client %s left without choosing an export", peer)
            return
        negotiated, leftover = agreed
        export = self.exports.get(negotiated.export.name)
        session = Session(sock, export, negotiated)
        logger.info("client %s uses export %s", peer, export.name)
        client = asyncio.current_task()
        assert client is not None
        self._sessions[client] = session
        try:
            await session.run(leftover)
        finally:
            del self._sessions[client]
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


def _describe_peer(sock: socket.socket, listener: Listener) -> str:
    if listener.path is not None:
        return f"on {listener.path}"
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "(gone)"
    return f"{host}:{port}"
