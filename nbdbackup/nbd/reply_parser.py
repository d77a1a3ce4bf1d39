"""Replies of the transmission phase, client role: from chunks in any order to whole answers.

Each request is announced with `expect` before it is sent; `received` (or `receive`, which copies) returns
the replies that became complete. Chunks of different requests may be mixed, replies come in any order.

Bytes are received where `get_buffer` says. That is a buffer of the parser's own, from which many small
replies are taken at once; but in the middle of a large READ's data it is the rest of that READ's own
memory, so that the data goes from the socket to where it is wanted without a copy between.

Invariant: a reply without an error is whole. A READ's buffer was filled exactly once over, and a
BLOCK_STATUS was answered for at least one context. Whatever does not fit its request (an
unknown cookie, data outside the range or twice, a chunk that the command has no use for) is a
`ProtocolError`: nothing behind it can be trusted.

Source: the NBD specification, "Simple reply message" to "Extended reply chunk message".
"""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto
from struct import Struct

import msgspec

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import layout, messages, replies
from nbdbackup.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    REPLY_TYPE_ERROR,
    SIMPLE_REPLY_MAGIC,
    STATUS_EXTENTS_MAX,
    STRING_BYTES_MAX,
    STRUCTURED_REPLY_MAGIC,
    Command,
    Errno,
    ReplyFlags,
    ReplyType,
)

FRAGMENTS_MAX = 1 << 14
"""Disjoint pieces of one READ that may have arrived; a server that scatters it further is abusive."""

RECEIVE_BYTES = 256 << 10
DIRECT_BYTES_MIN = 16 << 10
"""Of a READ's data that is still to come; less is taken together with what follows it."""

_NOTHING = memoryview(b"")
_MAGIC_BYTES = 4
_ERROR_BYTES_MAX = 16 + STRING_BYTES_MAX
_STATUS_BYTES_MAX = layout.BLOCK_STATUS_HEAD.size + STATUS_EXTENTS_MAX * layout.BLOCK_STATUS_EXTENT.size
_STATUS_EXT_BYTES_MAX = (
    layout.BLOCK_STATUS_EXT_HEAD.size + STATUS_EXTENTS_MAX * layout.BLOCK_STATUS_EXT_EXTENT.size
)


class Reply(msgspec.Struct, frozen=True):
    """The whole answer to one request."""

    cookie: int
    error: int
    """0, or the NBD error; `Errno` has those that a server should send."""
    text: str
    """The server's words about an error, or ""."""
    data: memoryview
    """What a READ read; the caller's buffer if it gave one. Undefined after an error."""
    status: dict[int, tuple[messages.BlockStatusExtent, ...]]
    """Extents by context id; they start at the request's offset, and the last may run over its end."""


@dataclass(slots=True)
class _Outstanding:
    """A request that has no whole reply yet."""

    command: int
    offset: int
    length: int
    buffer: memoryview
    filled: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) in `buffer`, in order, neighbours joined."""
    status: dict[int, tuple[messages.BlockStatusExtent, ...]] = field(default_factory=dict)
    error: messages.ErrorChunk | None = None

    def claim(self, offset: int, length: int) -> memoryview:
        """The part of the buffer for `length` bytes read at `offset`, which nothing may fill again."""
        start = offset - self.offset
        end = start + length
        if start < 0 or end > self.length or not length:
            raise ProtocolError(f"the server sent {length} bytes at {offset}, outside the read's range")
        index = bisect_left(self.filled, (start, end))
        if index and self.filled[index - 1][1] > start:
            raise ProtocolError(f"the server sent the bytes at {offset} twice")
        if index < len(self.filled) and self.filled[index][0] < end:
            raise ProtocolError(f"the server sent the bytes at {offset} twice")
        joined_start, joined_end, low, high = start, end, index, index
        if index and self.filled[index - 1][1] == start:
            joined_start, low = self.filled[index - 1][0], index - 1
        if index < len(self.filled) and self.filled[index][0] == end:
            joined_end, high = self.filled[index][1], index + 1
        self.filled[low:high] = [(joined_start, joined_end)]
        if len(self.filled) > FRAGMENTS_MAX:
            raise ProtocolError(f"the server scattered a read over more than {FRAGMENTS_MAX} pieces")
        return self.buffer[start:end]


class _State(Enum):
    HEAD = auto()
    OFFSET = auto()
    DATA = auto()
    PAYLOAD = auto()


class ReplyParser:
    """The server's side of one connection after negotiation.

    Keeps at most one chunk's payload and `RECEIVE_BYTES`; a READ's data goes straight on to its buffer.
    """

    def __init__(
        self, *, structured: bool, extended: bool = False, context_ids: Collection[int] = ()
    ) -> None:
        """What was agreed on; with `extended` headers `structured` does not matter."""
        # Set once.
        self._structured = structured
        self._extended = extended
        self._context_ids = frozenset(context_ids)

        # Changes with each request and reply.
        self._outstanding: dict[int, _Outstanding] = {}
        self._complete: list[Reply] = []

        # What was received and not looked at yet.
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._start = 0
        self._end = 0

        # The chunk that is being received.
        self._state = _State.HEAD
        self._type = 0
        self._done = False
        self._cookie = 0
        self._payload_bytes = 0
        self._payload = bytearray()
        self._unfilled = _NOTHING
        """Where the rest of its data or payload belongs."""

    @property
    def outstanding(self) -> int:
        """How many requests have no whole reply yet."""
        return len(self._outstanding)

    def expect(
        self, command: Command, cookie: int, offset: int, length: int, buffer: memoryview | None = None
    ) -> None:
        """Announce a request whose `cookie` no other outstanding one has; DISC has no reply.

        A READ's data goes into `buffer`, writable and `length` bytes long, or one made here.
        """
        assert cookie not in self._outstanding
        assert command != Command.DISC
        if command != Command.READ:
            buffer = _NOTHING
        elif buffer is None:
            buffer = memoryview(bytearray(length))
        assert command != Command.READ or len(buffer) == length
        self._outstanding[cookie] = _Outstanding(command, offset, length, buffer)

    def receive(self, data: bytes | bytearray | memoryview) -> list[Reply]:
        """Take any number of bytes from the server; the replies that they complete.

        Raises: as `received`.
        """
        complete: list[Reply] = []
        view = memoryview(data)
        while view:
            buffer = self.get_buffer()
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            complete += self.received(count)
            view = view[count:]
        return complete

    def get_buffer(self) -> memoryview:
        """Where to put the next bytes from the server, at least one; then say `received`."""
        return self._unfilled if self._is_direct else self._buffer[self._end :]

    def received(self, count: int) -> list[Reply]:
        """`count` bytes are where the last `get_buffer` said; the replies that they complete.

        Raises:
            ProtocolError: the server broke the protocol; the connection is of no more use.
        """
        if self._is_direct:
            self._unfilled = self._unfilled[count:]
        else:
            self._end += count
        while self._step():
            pass
        rest = self._end - self._start
        assert not rest or self._state in (_State.HEAD, _State.OFFSET)  # less than one head
        if self._start:
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        complete, self._complete = self._complete, []
        return complete

    @property
    def _is_direct(self) -> bool:
        return self._state is _State.DATA and len(self._unfilled) >= DIRECT_BYTES_MIN

    # The machine: each step consumes one unit, or returns False for want of bytes.

    def _step(self) -> bool:
        match self._state:
            case _State.HEAD:
                return self._step_head()
            case _State.OFFSET:
                return self._step_offset()
            case _State.DATA | _State.PAYLOAD:
                return self._step_fill()

    def _step_head(self) -> bool:
        if self._end - self._start < _MAGIC_BYTES:
            return False
        magic = int.from_bytes(self._buffer[self._start : self._start + _MAGIC_BYTES], "big")
        if self._extended and magic == EXTENDED_REPLY_MAGIC:
            return self._step_extended_head()
        if not self._extended and magic == SIMPLE_REPLY_MAGIC:
            return self._step_simple_head()
        if not self._extended and self._structured and magic == STRUCTURED_REPLY_MAGIC:
            return self._step_chunk_head()
        raise ProtocolError(f"the server sent a reply with wrong magic {magic:#010x}")

    def _step_simple_head(self) -> bool:
        head = self._take(layout.SIMPLE_REPLY)
        if head is None:
            return False
        _, error, self._cookie = head
        request = self._request()
        self._done = True
        if error:
            request.error = messages.ErrorChunk(error, "")
        elif request.command == Command.READ and self._structured:
            raise ProtocolError(
                "the server answered READ with a simple reply after structured ones were agreed"
            )
        elif request.command == Command.READ and request.length:
            self._begin(_State.DATA, request.claim(request.offset, request.length))
            return True
        self._end_chunk()
        return True

    def _step_chunk_head(self) -> bool:
        head = self._take(layout.STRUCTURED_REPLY)
        if head is None:
            return False
        _, flags, self._type, self._cookie, self._payload_bytes = head
        self._begin_chunk(self._request(), flags)
        return True

    def _step_extended_head(self) -> bool:
        head = self._take(layout.EXTENDED_REPLY)
        if head is None:
            return False
        _, flags, self._type, self._cookie, offset, self._payload_bytes = head
        request = self._request()
        if offset != request.offset:
            raise ProtocolError(
                f"the server answered a request at offset {request.offset} as if it were at {offset}"
            )
        self._begin_chunk(request, flags)
        return True

    def _begin_chunk(self, request: _Outstanding, flags: int) -> None:
        self._done = bool(flags & ReplyFlags.DONE)
        self._check_chunk(request)
        if self._type == ReplyType.OFFSET_DATA:
            self._state = _State.OFFSET
        else:
            self._payload = bytearray(self._payload_bytes)
            self._begin(_State.PAYLOAD, memoryview(self._payload))

    def _check_chunk(self, request: _Outstanding) -> None:
        """Refuse a chunk that does not go with its request before any of its payload is kept."""
        kind, length = self._type, self._payload_bytes
        if kind & REPLY_TYPE_ERROR:
            fits = length <= _ERROR_BYTES_MAX
        elif kind == ReplyType.NONE:
            fits = length == 0 and self._done
        elif kind == ReplyType.OFFSET_DATA:
            head_bytes = layout.OFFSET_DATA_HEAD.size
            fits = request.command == Command.READ and head_bytes < length <= head_bytes + request.length
        elif kind == ReplyType.OFFSET_HOLE:
            fits = request.command == Command.READ and length == layout.OFFSET_HOLE.size
        elif kind == ReplyType.BLOCK_STATUS and not self._extended:
            fits = request.command == Command.BLOCK_STATUS and length <= _STATUS_BYTES_MAX
        elif kind == ReplyType.BLOCK_STATUS_EXT and self._extended:
            fits = request.command == Command.BLOCK_STATUS and length <= _STATUS_EXT_BYTES_MAX
        else:
            fits = False
        if not fits:
            raise ProtocolError(
                f"the server sent a chunk of type {kind} with {length} bytes "
                f"in answer to command {request.command:d}, which makes no sense"
            )

    def _on_payload(self, request: _Outstanding) -> None:
        payload, self._payload = self._payload, bytearray()
        if self._type & REPLY_TYPE_ERROR:
            request.error = request.error or replies.parse_error(self._type, bytes(payload))
        elif self._type == ReplyType.OFFSET_HOLE:
            part = request.claim(*layout.OFFSET_HOLE.unpack(payload))
            part[:] = bytes(len(part))
        elif self._type in (ReplyType.BLOCK_STATUS, ReplyType.BLOCK_STATUS_EXT):
            self._on_status(request, payload)

    def _on_status(self, request: _Outstanding, payload: bytearray) -> None:
        context_id, extents = replies.parse_block_status(payload, extended=self._extended)
        if context_id not in self._context_ids:
            raise ProtocolError(
                f"the server sent the status of meta context {context_id}, which was not agreed"
            )
        if context_id in request.status:
            raise ProtocolError(f"the server sent the status of meta context {context_id} twice")
        if not all(extent.length for extent in extents):
            raise ProtocolError("the server sent an extent of no length")
        if sum(extent.length for extent in extents[:-1]) >= request.length:
            raise ProtocolError("the server sent extents behind the end of the range")
        request.status[context_id] = extents

    def _step_offset(self) -> bool:
        head = self._take(layout.OFFSET_DATA_HEAD)
        if head is None:
            return False
        part = self._request().claim(head[0], self._payload_bytes - layout.OFFSET_DATA_HEAD.size)
        self._begin(_State.DATA, part)
        return True

    def _begin(self, state: _State, target: memoryview) -> None:
        self._state = state
        self._unfilled = target

    def _step_fill(self) -> bool:
        taken = min(len(self._unfilled), self._end - self._start)
        self._unfilled[:taken] = self._buffer[self._start : self._start + taken]
        self._start += taken
        self._unfilled = self._unfilled[taken:]
        if self._unfilled:
            return False
        self._unfilled = _NOTHING  # an empty slice would hold on to the memory of whoever reads
        if self._state is _State.PAYLOAD:
            self._on_payload(self._request())
        self._end_chunk()
        return True

    def _end_chunk(self) -> None:
        self._state = _State.HEAD
        if not self._done:
            return
        request = self._outstanding.pop(self._cookie)
        error = request.error or messages.ErrorChunk(Errno.OK, "")
        if not error.error:
            self._check_whole(request)
        reply = Reply(self._cookie, error.error, error.text, request.buffer, request.status)
        self._complete.append(reply)

    @staticmethod
    def _check_whole(request: _Outstanding) -> None:
        whole = [(0, request.length)] if request.length else []
        if request.command == Command.READ and request.filled != whole:
            raise ProtocolError(f"the server ended a read of {request.length} bytes with some missing")
        if request.command == Command.BLOCK_STATUS and not request.status:
            raise ProtocolError("the server ended a BLOCK_STATUS without any status")

    def _request(self) -> _Outstanding:
        request = self._outstanding.get(self._cookie)
        if request is None:
            raise ProtocolError(f"the server answered cookie {self._cookie:#x}, which nobody asked")
        return request

    def _take(self, head: Struct) -> tuple[int, ...] | None:
        """The fields of a head, once all of it is there."""
        if self._end - self._start < head.size:
            return None
        fields = head.unpack_from(self._buffer, self._start)
        self._start += head.size
        return fields
