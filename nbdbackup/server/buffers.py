"""The two buffers of a session: requests coming in, replies going out.

Both are used in place: a request's payload is written to the device from where it was
received, and a read's data is read from the device to where it is sent from.

They are anonymous maps: a client costs the memory that its requests have touched, not what they
might grow to.
"""

import mmap
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

from nbdbackup.block.device import ReadableBuffer

RECEIVE_BYTES = 512 << 10
"""Many small requests, or two pieces of a large write."""
REPLY_BYTES = (1 << 20) + 4096
"""A batch of replies; the longest read that is served in place fits."""
REPLY_FLUSH_BYTES = 256 << 10
"""A batch this long is sent even if more requests are waiting, while it is in the cache."""
PIECES_PER_SEND_MAX = 64


class ByteStream(Protocol):
    """What is needed of a socket, or of TLS on one. No call waits: BlockingIOError instead.

    After that, what is sent next has to begin with the same bytes.
    """

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive once; the number of bytes, 0 at the end of the stream."""

    def send(self, data: memoryview, /) -> int:
        """Send some of `data`; how much."""

    def sendmsg(self, buffers: Iterable[memoryview], /) -> int:
        """Send some of `buffers`, one after another; how much."""


class ReceiveBuffer:
    """Bytes `[start, end)` of `view` were received and are not used yet."""

    __slots__ = ("end", "received_bytes", "start", "view")

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, RECEIVE_BYTES))
        self.start = 0
        self.end = 0
        self.received_bytes = 0
        """In all."""

    def __len__(self) -> int:
        return self.end - self.start

    def put(self, data: bytes) -> None:
        """Append bytes that were received elsewhere; there must be room."""
        self.view[self.end : self.end + len(data)] = data
        self.end += len(data)

    def receive(self, stream: ByteStream) -> int:
        """Receive once. Returns the number of bytes, 0 at the end of the stream.

        Raises:
            BlockingIOError: nothing there. OSError: the connection broke.
        """
        if self.start == self.end:
            self.start = self.end = 0
        elif self.end == RECEIVE_BYTES:
            self._compact()
        length = stream.recv_into(self.view[self.end :])
        self.end += length
        self.received_bytes += length
        return length

    def consume(self, length: int) -> None:
        """The next `length` bytes are used."""
        self.start += length

    def _compact(self) -> None:
        """Move what is left to the front; there is always room then, see `Session`."""
        length = len(self)
        self.view[:length] = self.view[self.start : self.end]
        self.start, self.end = 0, length
        assert self.end < RECEIVE_BYTES


class ReplyBuffer:
    """Replies in the order they leave: the batch in `view[:used]`, then the queue.

    While the socket takes no more (`is_blocked`), nothing is added to the batch; replies that
    finish meanwhile go to the queue.
    """

    __slots__ = ("_queue", "_sent", "is_blocked", "queued_bytes", "sent_bytes", "used", "view")

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, REPLY_BYTES))
        self.used = 0
        self.is_blocked = False
        self.queued_bytes = 0
        """What the queue keeps in memory."""
        self.sent_bytes = 0
        """In all."""
        self._sent = 0
        self._queue: deque[memoryview] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether everything has been sent."""
        return not self.used and not self._queue

    def has_room(self, length: int) -> bool:
        """Whether a reply of `length` bytes may be put into the batch now."""
        return not self.is_blocked and self.used + length <= REPLY_BYTES

    def put(self, reply: ReadableBuffer) -> None:
        """Add a finished reply: to the batch if it fits there, else to the queue."""
        if self.has_room(len(reply)) and len(reply) <= REPLY_FLUSH_BYTES:
            end = self.used + len(reply)
            self.view[self.used : end] = reply
            self.used = end
        else:
            self._queue.append(memoryview(reply))
            self.queued_bytes += len(reply)

    def put_pieces(self, pieces: Sequence[ReadableBuffer]) -> None:
        """Add a finished reply that is in pieces. They stay together and in order."""
        length = sum(map(len, pieces))
        if self.has_room(length) and length <= REPLY_FLUSH_BYTES:
            for piece in pieces:
                self.put(piece)
        else:
            self._queue.extend(map(memoryview, pieces))
            self.queued_bytes += length

    def send(self, stream: ByteStream) -> bool:
        """Send what the socket takes; True if nothing is left.

        Raises:
            OSError: the connection broke.
        """
        try:
            while self._sent < self.used:
                length = stream.send(self.view[self._sent : self.used])
                self._sent += length
                self.sent_bytes += length
            self.used = self._sent = 0
            while self._queue:
                self._drop(stream.sendmsg(islice(self._queue, PIECES_PER_SEND_MAX)))
        except BlockingIOError:
            self.is_blocked = True
            return False
        self.is_blocked = False
        return True

    def _drop(self, length: int) -> None:
        """The first `length` bytes of the queue were sent."""
        self.queued_bytes -= length
        self.sent_bytes += length
        while self._queue and length >= len(self._queue[0]):
            length -= len(self._queue.popleft())
        if length:
            self._queue[0] = self._queue[0][length:]
