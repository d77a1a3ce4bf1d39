"""The control socket: a Unix socket on which each client has a QMP conversation.

A client's commands run one after the other; a command that has begun goes on to its end when the
client hangs up. Events go to every client that has negotiated, between its answers. A client
that does not read is waited for before its next command, and dropped when the events for it
pile up: nobody waits for it.
"""

import asyncio
import errno
import json
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from nbdbackup.errors import ConflictError, UsageError
from nbdbackup.job.events import Event, Json
from nbdbackup.monitor import (
    commands_backup,
    commands_bitmaps,
    commands_block,
    commands_checkpoints,
    commands_core,
    commands_exports,
    commands_jobs,
    commands_snapshots,
    commands_state,
    commands_transaction,
)
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.errors import QmpError
from nbdbackup.monitor.framing import JsonStream, JsonStreamError
from nbdbackup.monitor.session import QmpSession, error_answer, greeting

__all__ = ["MonitorServer", "monitor"]

logger = logging.getLogger(__name__)

COMMAND_MODULES = (
    commands_backup,
    commands_bitmaps,
    commands_block,
    commands_checkpoints,
    commands_core,
    commands_exports,
    commands_jobs,
    commands_snapshots,
    commands_state,
    commands_transaction,
)
"""Importing them is what fills the table of commands."""

CLIENTS_MAX = 64
UNREAD_BYTES_MAX = 1 << 20
RECEIVE_BYTES = 1 << 16
GOODBYE_S = 1.0
"""How long the last words to a client may take when the daemon leaves."""


class MonitorServer:
    """The clients of one control socket; made by `monitor`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._clients: set[_Client] = set()

    def publish(self, event: Event) -> None:
        """Send `event` to every client that has negotiated."""
        if not self._clients:
            return
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        message: dict[str, Json] = {
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
            "event": event.name,
            "data": event.data,
        }
        for client in list(self._clients):
            client.send_event(message)

    async def accept(self, listener: socket.socket, tasks: asyncio.TaskGroup) -> None:
        """Give each client a task of `tasks`, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, most likely; others will go.
                logger.error("cannot accept a client on the control socket: %s", error)
                await asyncio.sleep(GOODBYE_S)
                continue
            if len(self._clients) >= CLIENTS_MAX:
                logger.warning("refused a client on the control socket: there are %d", CLIENTS_MAX)
                connection.close()
                continue
            tasks.create_task(self._serve(connection), name="monitor-client")

    async def _serve(self, connection: socket.socket) -> None:
        """One client's life; whatever goes wrong ends that client alone."""
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        client = _Client(QmpSession(self._services), reader, writer)
        self._clients.add(client)
        try:
            await client.converse()
        except OSError as error:
            logger.debug("a client of the control socket went away: %s", error)
        except Exception:
            logger.exception("internal error in the control socket; its client is dropped")
        finally:
            self._clients.discard(client)
            await client.close()


class _Client:
    """A session and its streams."""

    def __init__(
        self, session: QmpSession, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._session = session
        self._reader = reader
        self._writer = writer

    async def converse(self) -> None:
        """Greet, then answer until the client is done."""
        await self._send(greeting())
        stream = JsonStream()
        while data := await self._reader.read(RECEIVE_BYTES):
            for message in stream.feed(data):
                # Neither reading nor answering need ever wait; the other clients must not starve.
                await asyncio.sleep(0)
                if not isinstance(message, JsonStreamError):
                    await self._send(await self._session.answer(message))
                    continue
                await self._send(error_answer(QmpError(str(message))))
                if message.fatal:
                    return

    def send_event(self, message: Json) -> None:
        """Send an event if the client wants events, and drop the client if it reads none."""
        if not self._session.is_negotiated or self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            logger.warning("dropped a client of the control socket that does not read its events")
            self._writer.transport.abort()
            return
        self._writer.write(_line(message))

    async def _send(self, message: Json) -> None:
        self._writer.write(_line(message))
        await self._writer.drain()

    async def close(self) -> None:
        """Hang up once the client has what was sent, or after a short time."""
        self._writer.close()
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            self._writer.transport.abort()


def _line(message: Json) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


@asynccontextmanager
async def monitor(path: Path, services: Services) -> AsyncIterator[MonitorServer]:
    """Serve QMP on a Unix socket at `path` (mode 0600) for the duration; then the path is gone.

    The clients get the events of `services.jobs`, and whatever else is published.

    Raises:
        ConflictError: something else is at `path`, or listens there.
        UsageError: `path` is too long for a socket, or its directory does not exist.
        OSError: the socket cannot be made there.
    """
    server = MonitorServer(services)
    with _listening(path) as listener:
        unsubscribe = services.jobs.subscribe(server.publish)
        try:
            async with asyncio.TaskGroup() as tasks:
                accepting = tasks.create_task(_accept(server, listener), name="monitor")
                try:
                    yield server
                finally:
                    accepting.cancel()
        finally:
            unsubscribe()


async def _accept(server: MonitorServer, listener: socket.socket) -> None:
    async with asyncio.TaskGroup() as clients:
        await server.accept(listener, clients)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A listening socket at `path`, which is removed at the end if it is still ours."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with listener:
        _make_way(path)
        _bind(listener, path)
        ours = os.lstat(path)
        try:
            listener.listen()
            yield listener
        finally:
            try:
                found = os.lstat(path)
                if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
                    path.unlink()
            except FileNotFoundError:
                pass


def _bind(listener: socket.socket, path: Path) -> None:
    # The mask, and not a chmod afterwards: nobody may connect in between.
    previous_mask = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    except OSError as error:
        if error.errno is None:
            raise UsageError(
                f"The control socket's path is too long ({path}); give a shorter one with --control"
            ) from error
        if error.errno == errno.EADDRINUSE:
            raise ConflictError(f"The control socket {path} was taken just now by another server") from error
        if error.errno == errno.ENOENT:
            raise UsageError(
                f"There is no directory {path.parent} for the control socket; "
                "make it, or give another path with --control"
            ) from error
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.umask(previous_mask)


def _make_way(path: Path) -> None:
    """Remove a socket that a server left behind when it died."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConflictError(
            f"{path} exists and is not a socket; remove it, or give another path with --control"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
    raise ConflictError(f"Another server listens on {path}; stop it, or give another path with --control")
