"""A remote export that outlives its connections: many at once, and new ones when they are lost.

When one connection is lost, all are given up: the server has most likely ended. What is promised
from then on, with R the reconnect delay in seconds:

- Operations wait for a new connection, those in flight as well as new ones, and are sent (again)
  on it. Reads, writes, zeroes, trims and flushes may all be done twice.
- Writes that the old server acknowledged and no flush has covered are written again first, from
  the journal (`block/nbd_journal.py`): a read never sees the disk as it was before them, and a
  flush that succeeds covers them. For that a copy of at most 64 MiB of writes is kept.
- After R seconds without a connection, whatever waits fails with EIO, and so does everything new,
  at once, until a connection is made: attempts go on in the background.
- With R = 0, and with a server that offers no FLUSH, no journal is kept. If a connection is lost
  after unflushed writes were acknowledged, these may be lost, and every later flush says so.
- A flush that failed, or a write that could not be written again, fails every later flush too.
- An export that comes back with another size, other flags or other block sizes is another disk:
  everything fails from then on.

What cannot be promised: a server that lost what it had flushed (one that keeps its disk in memory)
is not found out; a server that still works on requests of a connection that it knows is gone could
carry out an old write after a newer one; and another client's write to the same bytes, made while
the connection was away, may be overwritten by the journal's.
"""

import asyncio
import errno
import logging
import os
from collections import deque
from collections.abc import Sequence

import msgspec

from nbdbackup.block.nbd_connection import Connection, Limits, Operation, connect
from nbdbackup.block.nbd_journal import BYTES_MAX as JOURNAL_BYTES_MAX
from nbdbackup.block.nbd_journal import Journal
from nbdbackup.block.nbd_tls import client_tls
from nbdbackup.errors import DeviceError, NbdBackupError, NotFoundError, ProtocolError, UnreachableError
from nbdbackup.nbd.client import ClientNegotiation, RemoteExport
from nbdbackup.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, Command, Errno, TransmissionFlags
from nbdbackup.nbd.replies import shown_text
from nbdbackup.nbd.reply_parser import Reply
from nbdbackup.nbd.uri import NbdUri

logger = logging.getLogger(__name__)

RECONNECT_DELAY_S = 30.0
CONNECTIONS_MAX = 4
TRIES_MAX = 4
"""An operation whose connection was lost so often is likely what kills the server: it fails."""
CANCEL_PATIENCE_S = 20.0
"""A cancelled operation waits so long for its reply; then the connection is given up."""
PAUSE_MIN_S = 0.05
PAUSE_MAX_S = 1.0

STEADY_S = 10.0
"""A connection that lived shorter is not followed by the next at once."""

_SHUTTING_DOWN = "the server is shutting down"
_JOURNALED = frozenset({Command.WRITE, Command.WRITE_ZEROES})
_NOBODY = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK})


class RemoteOptions(msgspec.Struct, frozen=True):
    """How a remote export is used."""

    reconnect_delay_s: float = RECONNECT_DELAY_S
    """How long operations wait for a lost server to come back; 0: they fail at once."""
    connections_max: int = CONNECTIONS_MAX
    """At once, if the server allows more than one."""
    contexts: tuple[str, ...] = (BASE_ALLOCATION, ALLOCATION_DEPTH)
    structured_replies: bool = True
    extended_headers: bool = True
    """Whether to ask for them; a server may have less."""
    limits: Limits = msgspec.field(default_factory=Limits)
    journal_bytes_max: int = JOURNAL_BYTES_MAX


class RemoteSession:
    """The export at `uri`. `await open()` first, `await close()` last. Set by `open`: `export`."""

    export: RemoteExport

    def __init__(self, uri: NbdUri, options: RemoteOptions) -> None:
        # Set once.
        self.uri = uri
        self.options = options
        self._tls = client_tls(uri)
        self._loop = asyncio.get_running_loop()
        self._journal = Journal(0)
        self._keeper: asyncio.Task[None]
        # Changing while running.
        self._connections: list[Connection] = []
        self._replaying: Connection | None = None
        self._waiting: deque[Operation] = deque()
        self._room = asyncio.Event()
        self._lost = asyncio.Event()
        self._cause: Exception = ConnectionError("not connected")
        self._deadline: asyncio.TimerHandle | None = None
        self._connected_at = float("-inf")
        self._is_refusing = False
        """Whether operations fail at once; if not, they are sent, or wait."""
        self._is_other_disk = False
        self._checkpoint: Operation | None = None
        self._unsafe: DeviceError | None = None
        """Why flush cannot succeed any more."""

    async def open(self) -> None:
        """Connect.

        Raises:
            NotFoundError: nobody listens there, or has no such export.
            ProtocolError: the server refuses the export, or breaks the protocol.
            DeviceError: it cannot be reached.
        """
        try:
            connection = await self._connect()
        except (OSError, NbdBackupError) as error:
            raise cannot_connect(self.uri, error) from error
        self.export = connection.export
        flags = self.export.flags
        keeps = self.options.reconnect_delay_s > 0 and flags & TransmissionFlags.SEND_FLUSH
        self._journal = Journal(self.options.journal_bytes_max if keeps else 0)
        self._connections = [connection]
        self._keeper = self._loop.create_task(self._keep_connected())

    async def close(self) -> None:
        """Take leave. Nothing may be in flight."""
        self._keeper.cancel()
        await asyncio.wait([self._keeper])
        if not self._keeper.cancelled():
            self._keeper.result()  # a bug is not to be passed over
        if self._deadline is not None:
            self._deadline.cancel()
        connections, self._connections = self._connections, []
        for connection in connections:
            await connection.close()

    async def perform(self, *operations: Operation) -> list[Reply]:
        """Carry out `operations`, in any order; their replies, which may be errors.

        On return, also by an exception, none of them is under way any more.

        Raises:
            UnreachableError: the server is gone for longer than the reconnect delay.
            DeviceError: it is gone for good: another disk came back.
        """
        try:
            for operation in operations:
                if operation.command in _JOURNALED:
                    await self._wait_journal_room(operation)
                self._submit(operation)
            await asyncio.wait([operation.outcome for operation in operations])
        except asyncio.CancelledError:
            await self._cancel(operations)
            raise
        replies: list[Reply] = []
        for operation in operations:
            outcome = operation.outcome.result()
            if isinstance(outcome, OSError):
                raise outcome
            replies.append(outcome)
        return replies

    async def flush(self) -> None:
        """Make durable whatever was acknowledged before this call.

        Raises:
            DeviceError: that can't be done, or something acknowledged is known to be lost.
        """
        offered = bool(self.export.flags & TransmissionFlags.SEND_FLUSH)
        if self._unsafe is None and offered and not self._journal.is_clean:
            await self.perform(Operation(Command.FLUSH))
        if self._unsafe is not None:
            raise type(self._unsafe)(errno.EIO, str(self._unsafe))

    # Operations.

    async def _wait_journal_room(self, operation: Operation) -> None:
        while not self._is_refusing and not self._journal.has_room(operation):
            self._room.clear()
            await self._room.wait()

    def _submit(self, operation: Operation) -> None:
        if self._is_refusing:
            operation.end(self._refusal())
            return
        if operation.command in _JOURNALED:
            self._journal.reserve(operation)
            operation.outcome.add_done_callback(lambda _: self._release(operation))
        self._waiting.append(operation)
        self._dispatch()

    def _release(self, operation: Operation) -> None:
        self._journal.release(operation)
        self._room.set()

    def _dispatch(self) -> None:
        """Send what waits, as far as connections take it."""
        while self._waiting and self._connections:
            connection = min(self._connections, key=_load)
            if connection.is_full:
                return
            operation = self._waiting.popleft()
            operation.journal_mark = self._journal.mark
            connection.start(operation)

    async def _cancel(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            if operation.connection is not None:
                operation.is_cancelled = True
                self._loop.call_later(CANCEL_PATIENCE_S, _cut_off, operation)
            else:
                # Not submitted yet, or waiting for a connection.
                if operation in self._waiting:
                    self._waiting.remove(operation)
                operation.end(DeviceError(errno.ECANCELED, "cancelled"))
        while not all(operation.outcome.done() for operation in operations):
            try:
                await asyncio.wait([operation.outcome for operation in operations])
            except asyncio.CancelledError:
                continue

    def on_reply(self, operation: Operation, reply: Reply) -> None:
        """See `nbd_connection.Owner`."""
        if reply.error == Errno.ESHUTDOWN and self.options.reconnect_delay_s and self._connections:
            self._give_up_connections(ConnectionResetError(_SHUTTING_DOWN), operation)
            return
        if operation.command == Command.FLUSH:
            self._take_flush_reply(operation, reply)
        elif operation.command in _JOURNALED and not reply.error and self._replaying is None:
            self._journal.add(operation)
        elif operation.command == Command.TRIM and not reply.error:
            self._journal.note_hint()
        operation.end(reply)
        self._flush_in_time()
        self._dispatch()

    def on_room(self) -> None:
        """See `nbd_connection.Owner`."""
        self._dispatch()

    def _take_flush_reply(self, operation: Operation, reply: Reply) -> None:
        if reply.error:
            self._note_unsafe(f"it failed to flush: {reason(reply)}")
        else:
            self._journal.forget(operation.journal_mark)
            self._room.set()

    def _flush_in_time(self) -> None:
        """Keep the journal from filling up."""
        if self._checkpoint is None and self._journal.wants_flush and not self._is_refusing:
            self._checkpoint = Operation(Command.FLUSH)
            self._checkpoint.outcome.add_done_callback(self._end_checkpoint)
            self._submit(self._checkpoint)

    def _end_checkpoint(self, outcome: object) -> None:
        del outcome
        self._checkpoint = None

    def _note_unsafe(self, what: str, kind: type[DeviceError] = DeviceError) -> None:
        if self._unsafe is None:
            self._unsafe = kind(errno.EIO, f"writes to {self.uri} may be lost: {what}")
            logger.error("%s", self._unsafe)
        self._journal.clear()
        self._room.set()

    # Losing connections.

    def on_lost(self, connection: Connection, cause: Exception) -> None:
        """See `nbd_connection.Owner`."""
        if connection is self._replaying:
            for operation in connection.abandon():
                operation.end(ConnectionResetError(str(cause)))
        elif connection in self._connections:
            self._give_up_connections(cause)

    def _give_up_connections(self, cause: Exception, *rejected: Operation) -> None:
        """Go on without connections until there are new ones; `rejected` is to be done there too."""
        logger.warning("%s: connection lost: %s", self.uri, _text(cause))
        orphans = list(rejected)
        for connection in self._connections:
            orphans += connection.abandon()
        self._connections = []
        self._cause = cause
        if not self._journal.bytes_max and self._journal.unsafe:
            line = f"the connection was lost ({_text(cause)}) before they were flushed"
            self._note_unsafe(line, UnreachableError)
        again: list[Operation] = []
        for operation in orphans:
            if operation.is_cancelled:
                operation.end(DeviceError(errno.ECANCELED, "cancelled"))
            elif operation.tries >= TRIES_MAX:
                line = f"{self.uri}: {operation.command.name} failed {operation.tries} times: {_text(cause)}"
                operation.end(UnreachableError(errno.EIO, line))
            else:
                again.append(operation)
        self._waiting.extendleft(reversed(again))
        if self.options.reconnect_delay_s:
            self._deadline = self._loop.call_later(self.options.reconnect_delay_s, self._refuse)
        else:
            self._refuse()
        self._lost.set()

    def _refuse(self) -> None:
        """Let everything that waits fail, and whatever comes, until there is a connection again."""
        self._is_refusing = True
        while self._waiting:
            self._waiting.popleft().end(self._refusal())
        self._room.set()

    def _refusal(self) -> DeviceError:
        if self._is_other_disk:
            return DeviceError(errno.EIO, f"{self.uri}: {_text(self._cause)}")
        delay_s = self.options.reconnect_delay_s
        within = f" and could not be made again within {delay_s:g} s" if delay_s else ""
        return UnreachableError(
            errno.EIO, f"{self.uri}: the connection to the server was lost{within}: {_text(self._cause)}"
        )

    # Making connections.

    async def _keep_connected(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while not self._is_other_disk:
                adding = tasks.create_task(self._add_connections())
                await self._lost.wait()
                adding.cancel()
                await asyncio.wait([adding])
                self._lost.clear()
                await self._reconnect()

    async def _add_connections(self) -> None:
        """As many as make sense; a server that takes fewer is content with fewer."""
        if not self.export.flags & TransmissionFlags.CAN_MULTI_CONN:
            return
        while len(self._connections) < self.options.connections_max:
            try:
                connection = await self._connect()
            except (OSError, NbdBackupError) as error:
                logger.debug("%s: no further connection: %s", self.uri, _text(error))
                return
            if _difference(self.export, connection.export):
                await connection.close()
                return
            self._connections.append(connection)
            self._dispatch()

    async def _reconnect(self) -> None:
        pause_s = PAUSE_MIN_S
        if self._loop.time() - self._connected_at < STEADY_S:
            await asyncio.sleep(PAUSE_MAX_S)
        while True:
            try:
                connection = await self._connect()
                await self._replay(connection)
            except (OSError, NbdBackupError) as error:
                self._cause = error
            else:
                break
            if self._is_other_disk:
                self._refuse()
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MAX_S)
        if self._deadline is not None:
            self._deadline.cancel()
        logger.warning("%s: connected again", self.uri)
        self._is_refusing = False
        self._connected_at = self._loop.time()
        self._connections = [connection]
        self._flush_in_time()
        self._dispatch()

    async def _replay(self, connection: Connection) -> None:
        """Make sure that it is the same disk, and write again what is in the journal."""
        self._replaying = connection
        try:
            difference = _difference(self.export, connection.export)
            if difference:
                self._is_other_disk = True
                raise ProtocolError(f"another disk came back after the connection was lost: {difference}")
            for batch in self._journal.batches():
                operations = [entry.again() for entry in batch]
                for operation in operations:
                    connection.start(operation)
                await asyncio.wait([operation.outcome for operation in operations])
                for operation in operations:
                    self._check_replayed(operation)
            if connection.is_lost:
                raise ConnectionResetError("the server closed the connection")
        except BaseException:
            connection.abandon()
            raise
        finally:
            self._replaying = None

    def _check_replayed(self, operation: Operation) -> None:
        outcome = operation.outcome.result()
        if isinstance(outcome, OSError):
            raise outcome
        if outcome.error == Errno.ESHUTDOWN:
            raise ConnectionResetError(_SHUTTING_DOWN)
        if outcome.error:
            self._note_unsafe(f"a write failed when it was done again after a reconnect: {reason(outcome)}")

    async def _connect(self) -> Connection:
        negotiation = ClientNegotiation(
            self.uri.export,
            want_structured=self.options.structured_replies,
            want_extended=self.options.extended_headers,
            contexts=self.options.contexts,
            tls=self.uri.tls,
        )
        return await connect(self.uri, self._tls, negotiation, self.options.limits, self)


def cannot_connect(uri: NbdUri, error: Exception) -> NbdBackupError:
    """Why there is no connection to `uri`, for a person."""
    if isinstance(error, NotFoundError | ProtocolError):
        return type(error)(f"{uri}: {error}")
    line = f"cannot connect to {uri}: {_text(error)}"
    if isinstance(error, OSError) and error.errno in _NOBODY:
        return NotFoundError(f"{line}: is the server running, and is this its address?")
    return DeviceError(errno.EIO, line)


def reason(reply: Reply) -> str:
    """Why the server says that an operation failed."""
    try:
        name = f"{Errno(reply.error).name}, {os.strerror(reply.error)}"
    except ValueError:
        name = f"error {reply.error}"
    return f"{shown_text(reply.text)} ({name})" if reply.text else name


def _load(connection: Connection) -> tuple[bool, int]:
    return connection.is_full, connection.in_flight


def _cut_off(operation: Operation) -> None:
    if operation.connection is not None:
        operation.connection.fail(TimeoutError("a cancelled request got no reply"))


def _difference(before: RemoteExport, after: RemoteExport) -> str:
    """How `after` is another disk than `before`; "" if it is the same."""
    if after.size != before.size:
        return f"it has {after.size} bytes, not {before.size}"
    forms = [(export.structured_replies, export.extended_headers) for export in (before, after)]
    if forms[0] != forms[1]:
        return "its kind of replies has changed"
    if after.flags != before.flags:
        return f"its flags are {after.flags!r}, not {before.flags!r}"
    if (before.block_size_min, before.payload_bytes_max) != (after.block_size_min, after.payload_bytes_max):
        return "its block sizes have changed"
    if {name for _, name in before.contexts} != {name for _, name in after.contexts}:
        return "its meta contexts have changed"
    return ""


def _text(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
