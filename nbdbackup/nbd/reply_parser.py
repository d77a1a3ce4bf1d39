"""Replies of the transmission phase, client role: from chunks in any order to whole answers.

Each request is announced with `expect` before it is sent; `receive` returns the replies that became
complete. Chunks of different requests may be mixed, replies come in any order.

Invariant: a reply without an error is whole. A READ's buffer was filled exactly once over, and a
BLOCK_STATUS was answered for at least one context. Whatever does not fit its request (an
unknown cookie, data outside the range or twice, a chunk that the command has no use for) is a
`ProtocolError`: nothing behind it can be trusted.

Source: the NBD specification, "Structured reply chunk message".
"""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import layout, messages, replies
from nbdbackup.nbd.constants import (
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

_MAGIC_BYTES = 4
_ERROR_BYTES_MAX = 16 + STRING_BYTES_MAX
_STATUS_BYTES_MAX = layout.BLOCK_STATUS_HEAD.size + STATUS_EXTENTS_MAX * layout.BLOCK_STATUS_EXTENT.size


@dataclass(frozen=True, slots=True)
class Reply:
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
    PAYLOAD = auto()
    OFFSET = auto()
    DATA = auto()


class ReplyParser:
    """The server's side of one connection after negotiation.

    Keeps at most one chunk's payload besides what one call brings; a READ's data goes straight on
    to its buffer.
    """

    def __init__(self, *, structured: bool, context_ids: Collection[int] = ()) -> None:
        # Set once.
        self._structured = structured
        self._context_ids = frozenset(context_ids)

        # Changes with each request and reply.
        self._outstanding: dict[int, _Outstanding] = {}
        self._complete: list[Reply] = []

        # The chunk that is being received.
        self._state = _State.HEAD
        self._pending = bytearray()
        self._type = 0
        self._done = False
        self._cookie = 0
        self._payload_bytes = 0
        self._unfilled = memoryview(b"")

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
            buffer = memoryview(b"")
        elif buffer is None:
            buffer = memoryview(bytearray(length))
        assert command != Command.READ or len(buffer) == length
        self._outstanding[cookie] = _Outstanding(command, offset, length, buffer)

    def receive(self, data: bytes | bytearray | memoryview) -> list[Reply]:
        """Take any number of bytes from the server; the replies that they complete.

        Raises:
            ProtocolError: the server broke the protocol; the connection is of no more use.
        """
        self._pending += data
        while self._step():
            pass
        complete, self._complete = self._complete, []
        return complete

    # The machine: each step consumes one unit, or returns False for want of bytes.

    def _step(self) -> bool:
        match self._state:
            case _State.HEAD:
                return self._step_head()
            case _State.PAYLOAD:
                return self._step_payload()
            case _State.OFFSET:
                return self._step_offset()
            case _State.DATA:
                return self._step_data()

    def _step_head(self) -> bool:
        if len(self._pending) < _MAGIC_BYTES:
            return False
        magic = int.from_bytes(self._pending[:_MAGIC_BYTES], "big")
        if magic == SIMPLE_REPLY_MAGIC:
            return self._step_simple_head()
        if magic == STRUCTURED_REPLY_MAGIC and self._structured:
            return self._step_chunk_head()
        raise ProtocolError(f"the server sent a reply with wrong magic {magic:#010x}")

    def _step_simple_head(self) -> bool:
        raw = self._take(layout.SIMPLE_REPLY.size)
        if raw is None:
            return False
        _, error, self._cookie = layout.SIMPLE_REPLY.unpack(raw)
        request = self._request()
        self._done = True
        if error:
            request.error = messages.ErrorChunk(error, "")
        elif request.command == Command.READ and self._structured:
            raise ProtocolError(
                "the server answered READ with a simple reply after structured ones were agreed"
            )
        elif request.command == Command.READ and request.length:
            self._begin_data(request.claim(request.offset, request.length))
            return True
        self._end_chunk()
        return True

    def _step_chunk_head(self) -> bool:
        raw = self._take(layout.STRUCTURED_REPLY.size)
        if raw is None:
            return False
        _, flags, self._type, self._cookie, self._payload_bytes = layout.STRUCTURED_REPLY.unpack(raw)
        self._done = bool(flags & ReplyFlags.DONE)
        self._check_chunk(self._request())
        self._state = _State.OFFSET if self._type == ReplyType.OFFSET_DATA else _State.PAYLOAD
        return True

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
        elif kind == ReplyType.BLOCK_STATUS:
            fits = request.command == Command.BLOCK_STATUS and length <= _STATUS_BYTES_MAX
        else:
            fits = False
        if not fits:
            raise ProtocolError(
                f"the server sent a chunk of type {kind} with {length} bytes "
                f"in answer to command {request.command:d}, which makes no sense"
            )

    def _step_payload(self) -> bool:
        payload = self._take(self._payload_bytes)
        if payload is None:
            return False
        request = self._request()
        if self._type & REPLY_TYPE_ERROR:
            request.error = request.error or replies.parse_error(self._type, payload)
        elif self._type == ReplyType.OFFSET_HOLE:
            hole = messages.OFFSET_HOLE.parse(payload)
            part = request.claim(hole.offset, hole.length)
            part[:] = bytes(len(part))
        elif self._type == ReplyType.BLOCK_STATUS:
            self._on_status(request, payload)
        self._end_chunk()
        return True

    def _on_status(self, request: _Outstanding, payload: bytes) -> None:
        context_id, extents = replies.parse_block_status(payload)
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
        raw = self._take(layout.OFFSET_DATA_HEAD.size)
        if raw is None:
            return False
        (offset,) = layout.OFFSET_DATA_HEAD.unpack(raw)
        self._begin_data(self._request().claim(offset, self._payload_bytes - layout.OFFSET_DATA_HEAD.size))
        return True

    def _begin_data(self, part: memoryview) -> None:
        self._unfilled = part
        self._state = _State.DATA

    def _step_data(self) -> bool:
        taken = min(len(self._unfilled), len(self._pending))
        with memoryview(self._pending) as view:
            self._unfilled[:taken] = view[:taken]
        del self._pending[:taken]
        self._unfilled = self._unfilled[taken:]
        if self._unfilled:
            return False
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

    def _take(self, count: int) -> bytes | None:
        if len(self._pending) < count:
            return None
        taken = bytes(memoryview(self._pending)[:count])
        del self._pending[:count]
        return taken
