"""The three ways to write a reply: simple, structured and extended. One is agreed on for a connection.

    simple      16 bytes, then the data of a READ that succeeded
    structured  a READ and a BLOCK_STATUS in chunks of 20 bytes and a payload; the rest is simple
    extended    every reply in chunks of 32 bytes and a payload; lengths of extents have 64 bits

A `ReplyEncoder` turns what happened to a request into bytes. A read's data is put by the caller
right behind the head that `pack_read_head` writes, so that it goes from the device to the socket
without a copy. A READ may be answered in pieces, data and holes, that cover it in order.

Source: the NBD specification, "Simple reply message" to "Extended reply chunk message".
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from nbdbackup.nbd import layout, messages, replies
from nbdbackup.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STATUS_EXTENTS_MAX,
    STRUCTURED_REPLY_MAGIC,
    Command,
    Errno,
    ReplyFlags,
    ReplyType,
)
from nbdbackup.nbd.requests import Refusal, Request

ContextStatus = tuple[int, Sequence[tuple[int, int]]]
"""A context's id, and (length, status) of neighbouring extents from the request's offset on."""


class ReplyEncoder(ABC):
    """How replies are written on one connection."""

    read_head_bytes: int
    """What `pack_read_head` writes."""

    has_chunks: bool = True
    """Whether a READ can be answered in pieces."""

    @abstractmethod
    def pack_read_head(self, buffer: bytearray | memoryview, position: int, request: Request) -> None:
        """Write the head of a successful READ reply, `read_head_bytes` long; its data goes behind.

        The length must not be 0 (62): `reply_done` answers that.
        """

    @abstractmethod
    def reply_done(self, request: Request) -> bytes:
        """Success without data. A READ is always answered in chunks once these are negotiated (39)."""

    @abstractmethod
    def reply_error(self, request: Request, refusal: Refusal) -> bytes:
        """Failure; text and offset reach clients that get chunks (60, 64)."""

    @abstractmethod
    def data_head(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """What goes in front of `length` bytes of a READ's data."""

    @abstractmethod
    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """`length` bytes of a READ are zeroes."""

    @abstractmethod
    def reply_status(self, request: Request, statuses: Sequence[ContextStatus]) -> bytes:
        """One chunk for each context, at least one, in one reply."""


class SimpleReplies(ReplyEncoder):
    """For clients that negotiated nothing."""

    read_head_bytes = layout.SIMPLE_REPLY.size
    has_chunks = False

    def pack_read_head(self, buffer: bytearray | memoryview, position: int, request: Request) -> None:
        layout.SIMPLE_REPLY.pack_into(buffer, position, SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def reply_done(self, request: Request) -> bytes:
        return replies.simple_reply(request.cookie, Errno.OK)

    def reply_error(self, request: Request, refusal: Refusal) -> bytes:
        return replies.simple_reply(request.cookie, refusal.error)

    def data_head(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        raise AssertionError("a simple reply has no pieces")

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        raise AssertionError("a simple reply has no pieces")

    def reply_status(self, request: Request, statuses: Sequence[ContextStatus]) -> bytes:
        raise AssertionError("no meta context is selected without chunks")


class StructuredReplies(ReplyEncoder):
    """For clients with STRUCTURED_REPLY."""

    read_head_bytes = layout.OFFSET_DATA_CHUNK.size

    def pack_read_head(self, buffer: bytearray | memoryview, position: int, request: Request) -> None:
        layout.OFFSET_DATA_CHUNK.pack_into(
            buffer,
            position,
            STRUCTURED_REPLY_MAGIC,
            ReplyFlags.DONE,
            ReplyType.OFFSET_DATA,
            request.cookie,
            request.length + layout.OFFSET_DATA_HEAD.size,
            request.offset,
        )

    def reply_done(self, request: Request) -> bytes:
        if request.command == Command.READ:
            return replies.none_chunk(request.cookie)
        return replies.simple_reply(request.cookie, Errno.OK)

    def reply_error(self, request: Request, refusal: Refusal) -> bytes:
        if refusal.offset is None:
            return replies.error_chunk(request.cookie, refusal.error, refusal.text)
        return replies.error_offset_chunk(request.cookie, refusal.error, refusal.text, refusal.offset)

    def data_head(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        return replies.offset_data_head(request.cookie, offset, length, done=done)

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        return replies.offset_hole_chunk(request.cookie, offset, length, done=done)

    def reply_status(self, request: Request, statuses: Sequence[ContextStatus]) -> bytes:
        last = len(statuses) - 1
        return b"".join(
            replies.block_status_chunk(request.cookie, context_id, extents, done=index == last)
            for index, (context_id, extents) in enumerate(statuses)
        )


class ExtendedReplies(ReplyEncoder):
    """For clients with EXTENDED_HEADERS: every reply is made of chunks, and names its request's offset."""

    read_head_bytes = layout.EXTENDED_OFFSET_DATA_CHUNK.size

    def pack_read_head(self, buffer: bytearray | memoryview, position: int, request: Request) -> None:
        layout.EXTENDED_OFFSET_DATA_CHUNK.pack_into(
            buffer,
            position,
            EXTENDED_REPLY_MAGIC,
            ReplyFlags.DONE,
            ReplyType.OFFSET_DATA,
            request.cookie,
            request.offset,
            request.length + layout.OFFSET_DATA_HEAD.size,
            request.offset,
        )

    def reply_done(self, request: Request) -> bytes:
        return self._head(ReplyType.NONE, request, 0, done=True)

    def reply_error(self, request: Request, refusal: Refusal) -> bytes:
        text = replies.display_text(refusal.text)
        if refusal.offset is None:
            kind = ReplyType.ERROR
            payload = messages.ERROR_CHUNK.build(messages.ErrorChunk(refusal.error, text))
        else:
            kind = ReplyType.ERROR_OFFSET
            chunk = messages.ErrorOffsetChunk(refusal.error, text, refusal.offset)
            payload = messages.ERROR_OFFSET_CHUNK.build(chunk)
        return self._head(kind, request, len(payload), done=True) + payload

    def data_head(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        payload = layout.OFFSET_DATA_HEAD.pack(offset)
        return self._head(ReplyType.OFFSET_DATA, request, len(payload) + length, done=done) + payload

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        payload = layout.OFFSET_HOLE.pack(offset, length)
        return self._head(ReplyType.OFFSET_HOLE, request, len(payload), done=done) + payload

    def reply_status(self, request: Request, statuses: Sequence[ContextStatus]) -> bytes:
        last = len(statuses) - 1
        chunks = []
        for index, (context_id, extents) in enumerate(statuses):
            assert 0 < len(extents) <= STATUS_EXTENTS_MAX
            payload = layout.BLOCK_STATUS_EXT_HEAD.pack(context_id, len(extents)) + b"".join(
                layout.BLOCK_STATUS_EXT_EXTENT.pack(length, status) for length, status in extents
            )
            head = self._head(ReplyType.BLOCK_STATUS_EXT, request, len(payload), done=index == last)
            chunks.append(head + payload)
        return b"".join(chunks)

    @staticmethod
    def _head(kind: ReplyType, request: Request, length: int, *, done: bool) -> bytes:
        flags = ReplyFlags.DONE if done else 0
        return layout.EXTENDED_REPLY.pack(
            EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length
        )
