"""A session over a socket pair, and a client that reads only when the test wants it to.

    async with serving(export) as served:
        cookie = await served.client.ask(Command.READ, 0, 4096)
        reply = await served.client.reply(cookie)

Leaving the block closes the client's end; the session must end then, within `WAIT_S` seconds.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from msgspec.structs import replace

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import NbdBackupError
from nbdbackup.nbd.agreement import Negotiated
from nbdbackup.nbd.client import encode_request
from nbdbackup.nbd.constants import BASE_ALLOCATION, Command, CommandFlags, TransmissionFlags
from nbdbackup.nbd.reply_parser import Reply, ReplyParser
from nbdbackup.server.exports import Export
from nbdbackup.server.polling import POLL_MAX_US, Poller
from nbdbackup.server.session import Session

WAIT_S = 10.0
CONTEXT_ID = 1
NO_FLAGS = CommandFlags(0)
_RECEIVE_BYTES = 1 << 20


def export_of(device: BlockDevice, name: str = "disk") -> Export:
    """An export of a new node over `device`."""
    return Export(name, Node(name, device))


async def wait_until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition()` holds; TimeoutError after `WAIT_S` seconds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - a condition of any kind, nothing announces it
            await asyncio.sleep(0)


def open_descriptors() -> int:
    """How many file descriptors this process holds."""
    return len(os.listdir(Path("/proc/self/fd")))


class Client:
    """The client's end of `sock`. Replies are read by `reply` and `replies` alone."""

    def __init__(self, sock: socket.socket, *, structured: bool) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._parser = ReplyParser(structured=structured, context_ids=(CONTEXT_ID,))
        self._replies: dict[int, Reply] = {}
        self._next_cookie = 1

    def compose(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        *,
        flags: CommandFlags = NO_FLAGS,
        data: bytes = b"",
    ) -> bytes:
        """The bytes of a request whose reply is expected from now on; `data` is a WRITE's payload."""
        cookie = self._next_cookie
        self._next_cookie += 1
        length = len(data) or length
        if command is not Command.DISC:
            self._parser.expect(command, cookie, offset, length)
        return encode_request(command, cookie, offset, length, flags) + data

    @property
    def last_cookie(self) -> int:
        """The cookie of the request that was composed last."""
        return self._next_cookie - 1

    async def send(self, data: bytes) -> None:
        """Send all of `data`."""
        async with asyncio.timeout(WAIT_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def ask(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        *,
        flags: CommandFlags = NO_FLAGS,
        data: bytes = b"",
    ) -> int:
        """Send one request; its cookie."""
        await self.send(self.compose(command, offset, length, flags=flags, data=data))
        return self.last_cookie

    async def reply(self, cookie: int) -> Reply:
        """The reply to `cookie`.

        Raises:
            ConnectionError: the server closed the connection instead.
        """
        while cookie not in self._replies:
            await self._receive()
        return self._replies.pop(cookie)

    async def replies(self, count: int) -> dict[int, Reply]:
        """The next `count` replies, by cookie."""
        while len(self._replies) < count:
            await self._receive()
        taken, self._replies = self._replies, {}
        return taken

    async def call(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        *,
        flags: CommandFlags = NO_FLAGS,
        data: bytes = b"",
    ) -> Reply:
        """Send one request and wait for its reply."""
        return await self.reply(await self.ask(command, offset, length, flags=flags, data=data))

    async def read_to_end(self) -> dict[int, Reply]:
        """Every reply until the server closes the connection."""
        with suppress(ConnectionError):
            while True:
                await self._receive()
        taken, self._replies = self._replies, {}
        return taken

    async def _receive(self) -> None:
        async with asyncio.timeout(WAIT_S):
            data = await asyncio.get_running_loop().sock_recv(self.sock, _RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        for reply in self._parser.receive(data):
            self._replies[reply.cookie] = reply


class Served:
    """A running session: `task` is its `run`, and `client` the other end of its socket."""

    def __init__(
        self, session: Session, negotiated: Negotiated, client: Client, task: "asyncio.Task[None]"
    ) -> None:
        self.session = session
        self.negotiated = negotiated
        self.client = client
        self.task = task
        self.end_was_seen = False

    async def wait_ended(self) -> None:
        """Return when the session has ended, or raise what it ended with."""
        async with asyncio.timeout(WAIT_S):
            await asyncio.wait([self.task])
        self.end_was_seen = True
        self.task.result()


@asynccontextmanager
async def serving(
    export: Export,
    *,
    structured: bool = True,
    leftover: bytes = b"",
    socket_bytes: int | None = None,
) -> AsyncIterator[Served]:
    """Serve `export` to one client; `socket_bytes` is how much the kernel holds for each side.

    A failure of the session that the test has not looked at is no error here, unless it is a bug.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    if socket_bytes is not None:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, socket_bytes)
    info = export.info()
    if not structured:
        info = replace(info, flags=info.flags & ~TransmissionFlags.SEND_DF)
    contexts = ((CONTEXT_ID, BASE_ALLOCATION),) if structured else ()
    negotiated = Negotiated(info, export.name, structured, contexts)
    session = Session(ours, export, negotiated, poller=Poller(POLL_MAX_US / 1e6))
    client = Client(theirs, structured=structured)
    task = asyncio.get_running_loop().create_task(session.run(leftover))
    served = Served(session, negotiated, client, task)
    try:
        yield served
    finally:
        theirs.close()
        try:
            if not served.end_was_seen:
                with suppress(OSError, NbdBackupError):
                    await served.wait_ended()
        finally:
            task.cancel()
            await asyncio.wait([task], timeout=WAIT_S)
            ours.close()
