"""One client's session after negotiation: requests in, replies out.

The way of a request, and why it is quick: the socket is read into one large buffer, often
many requests at a time. A read or write that the device can do without waiting is done on the
spot, its data going straight between device and buffer; the replies of a batch leave in
one send. Everything else becomes a task that awaits the device. Who is served alone is polled for
the next request (`polling`).

A write whose payload is still arriving is written in pieces as they come, each an operation
of its own: nobody was promised that an unanswered write is all or nothing.

A READ is answered with holes where that pays: in place if all of it is zero, and by the device's
word if a task has to be made for it anyway.

Bounds (invariant 8): `REQUESTS_MAX` tasks, and `BYTES_MAX` bytes in their buffers and one request
more; while they are used up, or while the client does not read its replies, nothing is received.
What all sessions hold is bounded by the `SharedBudget`: a request with a large buffer starts only
while there is room, and what has started goes on. One turn serves at most `TURN_BYTES_MAX`, so that
other clients get theirs.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from nbdbackup.block.device import ReadableBuffer
from nbdbackup.nbd.agreement import Negotiated
from nbdbackup.nbd.constants import STATUS_QUERY_BYTES_MAX, Command, Errno
from nbdbackup.nbd.requests import Refusal, Request
from nbdbackup.nbd.transmission import Transmission
from nbdbackup.server.budget import FREE_BYTES, SharedBudget
from nbdbackup.server.buffers import REPLY_FLUSH_BYTES, ReceiveBuffer, ReplyBuffer
from nbdbackup.server.contexts import SelectedContexts
from nbdbackup.server.exports import Export
from nbdbackup.server.operations import HOLE_BYTES_MIN, explain, perform, tell_status
from nbdbackup.server.payload import WHOLE_BYTES_MAX, Payload
from nbdbackup.server.polling import Poller
from nbdbackup.tls.stream import TlsStream

logger = logging.getLogger(__name__)

REQUESTS_MAX = 256
BYTES_MAX = 16 << 20
INLINE_READ_BYTES_MAX = 1 << 20
TURN_BYTES_MAX = 4 << 20
TURN_REQUESTS_MAX = 512
SHUTDOWN_TIMEOUT_S = 10.0
"""How long a client may leave replies unread, or go on asking, once the server wants to end."""

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_BLOCK_STATUS = int(Command.BLOCK_STATUS)
_ZEROES = bytes(HOLE_BYTES_MIN)


class Session:
    """Serves `export` on `sock` (non-blocking, or TLS on such) until the client leaves or must go."""

    def __init__(
        self,
        sock: socket.socket | TlsStream,
        export: Export,
        negotiated: Negotiated,
        budget: SharedBudget | None = None,
        poller: Poller | None = None,
    ) -> None:
        """Without `budget` it has one of its own; without `poller` it never polls."""
        # Set once.
        self._sock = sock
        self._tls = sock if isinstance(sock, TlsStream) else None
        self._loop = asyncio.get_running_loop()
        self._export = export
        self._device = export.node
        self._protocol = Transmission(negotiated)
        self._contexts = SelectedContexts(export.contexts, self._protocol.contexts)
        self._head_bytes = self._protocol.request_bytes
        self._budget = SharedBudget() if budget is None else budget
        self._poller = Poller() if poller is None else poller
        self._tasks: asyncio.TaskGroup
        # Changing while running.
        self._received = ReceiveBuffer()
        self._replies = ReplyBuffer()
        self._payload: Payload | None = None
        self._in_flight: set[asyncio.Task[None]] = set()
        self._bytes_in_flight = 0
        self._bytes_held = 0
        self._lacks_room = False
        self._no_more_requests = False
        self._was_told_goodbye = False
        self._stream_ended = False
        self._shutting_down = False
        self._over: asyncio.Future[BaseException | None] = self._loop.create_future()
        self._is_reading = False
        self._is_writing = False
        self._turn_scheduled = False
        self._poll_scheduled = False
        self._patience: asyncio.TimerHandle | None = None
        self._is_patient = True

    @property
    def export_name(self) -> str:
        """What it serves."""
        return self._export.name

    @property
    def moved_bytes(self) -> int:
        """How many bytes it has received and sent."""
        return self._received.received_bytes + self._replies.sent_bytes

    @property
    def requests_in_flight(self) -> int:
        """How many requests the device has not finished."""
        return len(self._in_flight)

    async def run(self, leftover: bytes) -> None:
        """Serve; `leftover` was received behind the negotiation.

        Returns when the client has left and everything in flight is finished and, if it
        still listens, answered.

        Raises:
            ProtocolError: the client broke the protocol. OSError: the connection broke.
        """
        self._received.put(leftover)
        self._export.join(self)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._schedule_turn()
                failure = await self._over
                self._watch(reading=False, writing=False)
                # Who said DISC was promised that everything is finished, answered or not.
                if failure is not None and not self._was_told_goodbye:
                    for task in self._in_flight:
                        task.cancel()
        finally:
            self._watch(reading=False, writing=False)
            if self._patience is not None:
                self._patience.cancel()
            self._export.leave(self)
            self._budget.leave(self)
            if not self._over.done():
                self._over.set_result(None)
        if failure is not None:
            raise failure

    def shut_down(self) -> None:
        """Finish what is in flight, answer what else arrives meanwhile with ESHUTDOWN, and end."""
        self._shutting_down = True
        self._patience = self._loop.call_later(SHUTDOWN_TIMEOUT_S, self._lose_patience)
        self._schedule_turn()

    def disconnect(self, reason: str) -> None:
        """End now: what the device is doing is finished, but nothing more is answered."""
        self._end(ConnectionAbortedError(reason))

    def wake(self) -> None:
        """The shared budget has room again."""
        self._schedule_turn()

    def _lose_patience(self) -> None:
        """Whoever does not read its replies must not keep the server from ending; a slow device may."""
        self._is_patient = False
        if self._replies.is_blocked:
            self.disconnect("it does not read its replies, and the server is shutting down")
        else:
            self._patience = self._loop.call_later(SHUTDOWN_TIMEOUT_S, self._lose_patience)

    # Turns: whatever happens (bytes arrive, the socket takes more, a task ends) leads to one.

    def _on_readable(self) -> None:
        if self._receive():
            self._turn()
            self._poll_if_it_pays()

    def _poll_if_it_pays(self) -> None:
        if self._poller.pays(self) and not self._poll_scheduled:
            self._poll_scheduled = True
            self._loop.call_soon(self._poll)

    def _poll(self) -> None:
        """Look for the next request for a moment: it is quicker than to be woken for it."""
        self._poll_scheduled = False
        if not self._is_reading or self._in_flight or self._payload is not None or len(self._received):
            return  # what is on its way arrives in larger pieces if nobody is quick to take it
        limit = time.perf_counter() + self._poller.limit_s
        found = self._receive()
        while not found and self._is_reading and time.perf_counter() < limit:
            found = self._receive()
        self._poller.note(found)
        if found:
            self._turn()
            self._poll_if_it_pays()

    def _on_pending(self) -> None:
        """The socket may have nothing more, but TLS has."""
        self._turn_scheduled = False
        if not self._over.done():
            self._receive()
            self._turn()

    def _on_writable(self) -> None:
        self._turn()

    def _receive(self) -> bool:
        """Receive once; whether there is something new."""
        try:
            if not self._received.receive(self._sock):
                self._stream_ended = True
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(error)
            return False
        return True

    def _schedule_turn(self) -> None:
        if not self._turn_scheduled and not self._over.done():
            self._turn_scheduled = True
            self._loop.call_soon(self._scheduled_turn)

    def _scheduled_turn(self) -> None:
        self._turn_scheduled = False
        self._turn()

    def _turn(self) -> None:
        if self._over.done():
            return
        try:
            if not self._replies.is_blocked or self._replies.send(self._sock):
                self._serve_received()
                was_blocked = self._replies.is_blocked
                if self._replies.send(self._sock) and was_blocked:
                    # Serving stopped for the socket, which has room by now: no event will say so again.
                    self._schedule_turn()
            self._settle()
        except Exception as error:
            # Raised again by `run`: a broken connection, a client's fault, or a bug of ours.
            self._end(error)

    def _settle(self) -> None:
        """Decide what to wait for next."""
        was_full = self._lacks_room or self._is_full()
        self._hold()
        is_full = (self._lacks_room and self._budget.is_full) or self._is_full()
        if is_full and self._budget.is_full:
            self._budget.wait(self)
        elif was_full and not is_full:
            # Serving stopped for room that there is by now: no event will say so again.
            self._schedule_turn()
        is_paused = is_full or self._replies.is_blocked
        if self._stream_ended and not is_paused and not self._turn_scheduled:
            # Every whole request that had arrived was taken.
            self._no_more_requests = True
        if not self._in_flight and self._replies.is_empty and not is_paused and not self._turn_scheduled:
            # On the way down, what has arrived is answered first: to close a socket with bytes in it
            # would take away answers that the client has not read yet.
            may_receive = self._shutting_down and self._is_patient and not self._no_more_requests
            if may_receive and self._receive():
                self._schedule_turn()
            elif self._shutting_down or self._no_more_requests:
                self._end(None)
                return
        may_read = not (self._no_more_requests or self._stream_ended or self._turn_scheduled or is_paused)
        if may_read and self._tls is not None and self._tls.has_pending:
            self._turn_scheduled = True
            self._loop.call_soon(self._on_pending)
            may_read = False
        self._watch(reading=may_read, writing=self._replies.is_blocked)

    def _watch(self, *, reading: bool, writing: bool) -> None:
        if reading != self._is_reading:
            self._is_reading = reading
            if reading:
                self._loop.add_reader(self._sock, self._on_readable)
            else:
                self._loop.remove_reader(self._sock)
        if writing != self._is_writing:
            self._is_writing = writing
            if writing:
                self._loop.add_writer(self._sock, self._on_writable)
            else:
                self._loop.remove_writer(self._sock)

    def _end(self, failure: BaseException | None) -> None:
        if not self._over.done():
            self._over.set_result(failure)
            self._watch(reading=False, writing=False)

    # Serving.

    def _is_full(self) -> bool:
        if not self._bytes_held and not self._in_flight:
            return False
        return (
            len(self._in_flight) >= REQUESTS_MAX
            or self._bytes_in_flight >= BYTES_MAX
            or (self._bytes_held > FREE_BYTES and self._payload is None and self._budget.is_full)
        )

    def _hold(self) -> None:
        """Tell the shared budget what is held now."""
        held = self._bytes_in_flight + self._replies.queued_bytes
        if self._payload is not None and self._payload.refusal is None:
            held += (
                self._payload.request.length
            )  # what is thrown away is not kept, however long it says it is
        if held != self._bytes_held:
            self._bytes_held = held
            self._budget.hold(self, held)

    def _serve_received(self) -> None:
        """Take requests from the receive buffer until it runs out, or a bound says stop."""
        received, replies = self._received, self._replies
        unpack, head_bytes = self._protocol.unpack, self._head_bytes
        served_bytes = served_requests = 0
        self._lacks_room = False
        while not (self._no_more_requests or replies.is_blocked or self._is_full()):
            if served_bytes > TURN_BYTES_MAX or served_requests > TURN_REQUESTS_MAX:
                self._schedule_turn()
                return
            if self._payload is not None:
                if not self._payload.feed(received):
                    return
                self._finish_payload(self._payload)
                continue
            if received.end - received.start < head_bytes:
                return
            request = unpack(received.view, received.start)
            if request.length > FREE_BYTES and self._must_wait(request):
                return
            if request.command == _WRITE:
                if not self._take_write(request):
                    return
            elif request.flags and self._protocol.payload_bytes(request):
                if not self._take_payload(request):
                    return
            else:
                received.start += head_bytes
                self._take_request(request)
            served_requests += 1
            served_bytes += request.length
            if replies.used >= REPLY_FLUSH_BYTES:
                replies.send(self._sock)

    def _must_wait(self, request: Request) -> bool:
        """Whether `request`, a long one, has to wait for room in the shared budget."""
        if request.command not in (_READ, _WRITE) or self._shutting_down or not self._budget.is_full:
            return False
        self._lacks_room = True
        return True

    def _check(self, request: Request) -> Refusal | None:
        if self._shutting_down:
            return Refusal(Errno.ESHUTDOWN, "the server is shutting down")
        return self._protocol.check(request)

    def _take_request(self, request: Request) -> None:
        """Answer a request without payload at once, or start its task."""
        refusal = self._check(request)
        if request.command == Command.DISC:
            self._no_more_requests = self._was_told_goodbye = True
        elif refusal is not None:
            self._replies.put(self._protocol.reply_error(request, refusal))
        elif request.command == _BLOCK_STATUS:
            self._start_status(request, tuple(self._protocol.contexts))
        elif request.command != _READ or not self._read_in_place(request):
            length = request.length if request.command == _READ else 0
            self._start(partial(perform, self._device, self._protocol, request), length)

    def _read_in_place(self, request: Request) -> bool:
        """Read into the reply buffer, behind the reply's head, if the device can at once."""
        length, replies = request.length, self._replies
        total = self._protocol.read_head_bytes + length
        if not 0 < length <= INLINE_READ_BYTES_MAX:
            return False
        if not replies.has_room(total) and not (replies.send(self._sock) and replies.has_room(total)):
            return False
        start, end = replies.used, replies.used + total
        try:
            data = replies.view[end - length : end]
            if not self._device.read_nowait(request.offset, data):
                return False
        except OSError as error:
            replies.put(self._protocol.reply_error(request, explain(error, request)))
            return True
        if length >= HOLE_BYTES_MIN and not request.flags and self._protocol.has_chunks and _is_zero(data):
            replies.put(self._protocol.hole(request, request.offset, length, done=True))
            return True
        self._protocol.pack_read_head(replies.view, start, request)
        replies.used = end
        return True

    def _take_write(self, request: Request) -> bool:
        """Write the payload if it is there, else begin to receive it; False: wait for more bytes."""
        received, length = self._received, request.length
        head_end = received.start + self._head_bytes
        in_place = not request.flags
        if head_end + length > received.end:
            if length <= WHOLE_BYTES_MAX:
                return False
            self._protocol.payload_bytes(request)  # too much of it ends the connection
            received.consume(self._head_bytes)
            self._payload = Payload(request, self._device, self._check(request), in_pieces=in_place)
            self._hold()
            return True
        refusal = self._check(request)
        data = received.view[head_end : head_end + length]
        if refusal is None:
            try:
                if in_place and self._device.write_nowait(request.offset, data):
                    self._replies.put(self._protocol.reply_done(request))
                else:
                    # The buffer is used again before the task has run.
                    operation = partial(perform, self._device, self._protocol, request, bytes(data))
                    self._start(operation, length)
            except OSError as error:
                refusal = explain(error, request)
        if refusal is not None:
            self._replies.put(self._protocol.reply_error(request, refusal))
        received.consume(self._head_bytes + length)
        return True

    def _take_payload(self, request: Request) -> bool:
        """Take a request other than WRITE that has a payload (49, 52); False: wait for more bytes."""
        received, length = self._received, request.length
        if request.command == _BLOCK_STATUS and length <= STATUS_QUERY_BYTES_MAX:
            start = received.start + self._head_bytes
            if start + length > received.end:
                return False
            payload = bytes(received.view[start : start + length])
            received.consume(self._head_bytes + length)
            query = self._protocol.parse_status_query(request, payload)
            refusal = query if isinstance(query, Refusal) else self._check(query.request)
            if not isinstance(query, Refusal) and refusal is None:
                self._start_status(*query)
            else:
                assert refusal is not None
                self._replies.put(self._protocol.reply_error(request, refusal))
            return True
        received.consume(self._head_bytes)
        refusal = self._check(request) or Refusal(Errno.EINVAL, f"a payload of {length} bytes is too long")
        self._payload = Payload(request, self._device, refusal, in_pieces=False)
        return True

    def _finish_payload(self, payload: Payload) -> None:
        self._payload = None
        if payload.refusal is not None:
            self._replies.put(self._protocol.reply_error(payload.request, payload.refusal))
        elif payload.collected is not None:
            operation = partial(perform, self._device, self._protocol, payload.request, payload.collected)
            self._start(operation, len(payload.collected))
        else:
            self._replies.put(self._protocol.reply_done(payload.request))

    def _start_status(self, request: Request, ids: Sequence[int]) -> None:
        self._start(partial(tell_status, self._contexts, self._protocol, request, ids), 0)

    def _start(self, operation: Callable[[], Awaitable[Sequence[ReadableBuffer]]], buffer_bytes: int) -> None:
        """Run `operation`, whose buffers have `buffer_bytes`, and send the reply that it returns."""
        self._bytes_in_flight += buffer_bytes
        task = self._tasks.create_task(self._finish(operation, buffer_bytes))
        self._in_flight.add(task)
        if buffer_bytes:
            self._hold()

    async def _finish(
        self, operation: Callable[[], Awaitable[Sequence[ReadableBuffer]]], buffer_bytes: int
    ) -> None:
        try:
            self._replies.put_pieces(await operation())
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._in_flight.discard(task)
            self._bytes_in_flight -= buffer_bytes
            self._schedule_turn()


def _is_zero(data: memoryview) -> bool:
    """Whether `data`, at least `HOLE_BYTES_MIN` long, is all zero; quick to say no."""
    if data[0] or data[-1]:
        return False
    step = len(_ZEROES)
    whole = len(data) // step * step
    # The last piece overlaps: then each is as long as the zeroes that it is compared with.
    return bytes(data[-step:]) == _ZEROES and all(
        bytes(data[start : start + step]) == _ZEROES for start in range(0, whole, step)
    )
