"""Replies of the transmission phase: encoders for the server, decoders for the client.

A chunk carries DONE unless the caller says that more of the same reply follows. What has to be
fast (heads, hole and status chunks) uses `layout`; the rest goes through `messages`.

`wire_errno` is the one place where a host's errno becomes one that NBD knows.

Source: the NBD specification, "Structured reply chunk message" and "Error values".
"""

import errno as host
from collections.abc import Sequence

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import layout, messages
from nbdbackup.nbd.constants import (
    SIMPLE_REPLY_MAGIC,
    STATUS_EXTENTS_MAX,
    STRING_BYTES_MAX,
    STRUCTURED_REPLY_MAGIC,
    Errno,
    ReplyFlags,
    ReplyType,
)

_WIRE_ERRNO = {
    host.EPERM: Errno.EPERM,
    host.EACCES: Errno.EPERM,
    host.EROFS: Errno.EPERM,
    host.EIO: Errno.EIO,
    host.ENOMEM: Errno.ENOMEM,
    host.EINVAL: Errno.EINVAL,
    host.ENOSPC: Errno.ENOSPC,
    host.EDQUOT: Errno.ENOSPC,
    host.EFBIG: Errno.ENOSPC,
    host.EOPNOTSUPP: Errno.EINVAL,
    host.EOVERFLOW: Errno.EINVAL,
    host.ESHUTDOWN: Errno.ESHUTDOWN,
}


def wire_errno(errno: int | None, *, fast_zero: bool = False, df: bool = False) -> Errno:
    """The NBD error for a Linux `errno`; EIO for one that NBD has no word for.

    ENOTSUP reaches a client only in answer to a request with FAST_ZERO, and EOVERFLOW only to
    one with DF: elsewhere the specification gives them no meaning.
    """
    if fast_zero and errno == host.EOPNOTSUPP:
        return Errno.ENOTSUP
    if df and errno == host.EOVERFLOW:
        return Errno.EOVERFLOW
    return _WIRE_ERRNO.get(errno or host.EIO, Errno.EIO)


def display_text(text: str) -> str:
    """`text` as the protocol's strings must be: no NUL, no lone surrogate, at most 4096 bytes of UTF-8."""
    encoded = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "backslashreplace")
    return encoded[:STRING_BYTES_MAX].decode("utf-8", "ignore")


def shown_text(text: str) -> str:
    """A peer's words as a person may be shown them: one line, and nothing that a terminal obeys."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


# Encoders.


def simple_reply(cookie: int, error: int) -> bytes:
    """A simple reply; after a READ with `error` 0 the caller sends the data behind it."""
    return layout.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def none_chunk(cookie: int) -> bytes:
    """The end of a reply that has nothing to add; always DONE."""
    return _head(ReplyType.NONE, cookie, 0, done=True)


def offset_data_head(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    """What goes in front of `length` bytes (at least 1) of data read at `offset`."""
    assert length > 0
    return layout.OFFSET_DATA_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC,
        ReplyFlags.DONE if done else 0,
        ReplyType.OFFSET_DATA,
        cookie,
        layout.OFFSET_DATA_HEAD.size + length,
        offset,
    )


def offset_hole_chunk(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    """`length` bytes (at least 1) at `offset` read as zeroes."""
    assert length > 0
    head = _head(ReplyType.OFFSET_HOLE, cookie, layout.OFFSET_HOLE.size, done=done)
    return head + layout.OFFSET_HOLE.pack(offset, length)


def block_status_chunk(
    cookie: int, context_id: int, extents: Sequence[tuple[int, int]], *, done: bool = True
) -> bytes:
    """(length in bytes, flags) of neighbouring extents, the first one at the request's offset."""
    assert 0 < len(extents) <= STATUS_EXTENTS_MAX
    payload = layout.BLOCK_STATUS_HEAD.pack(context_id) + b"".join(
        layout.BLOCK_STATUS_EXTENT.pack(length, flags) for length, flags in extents
    )
    return _head(ReplyType.BLOCK_STATUS, cookie, len(payload), done=done) + payload


def error_chunk(cookie: int, error: Errno, text: str, *, done: bool = True) -> bytes:
    """The request failed; `text` is shown to a person and is cut at the protocol's limit."""
    payload = messages.ERROR_CHUNK.build(messages.ErrorChunk(error, display_text(text)))
    return _head(ReplyType.ERROR, cookie, len(payload), done=done) + payload


def error_offset_chunk(cookie: int, error: Errno, text: str, offset: int, *, done: bool = True) -> bytes:
    """The request failed at `offset`, a byte inside its range."""
    chunk = messages.ErrorOffsetChunk(error, display_text(text), offset)
    payload = messages.ERROR_OFFSET_CHUNK.build(chunk)
    return _head(ReplyType.ERROR_OFFSET, cookie, len(payload), done=done) + payload


def _head(kind: ReplyType, cookie: int, length: int, *, done: bool) -> bytes:
    flags = ReplyFlags.DONE if done else 0
    return layout.STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


# Decoders.


def parse_block_status(
    payload: bytes | bytearray, *, extended: bool = False
) -> tuple[int, tuple[messages.BlockStatusExtent, ...]]:
    """The context id and the extents of a BLOCK_STATUS (or BLOCK_STATUS_EXT) chunk, extents at least one.

    Raises:
        ProtocolError: the payload is no such thing, or has more extents than the limit.
    """
    head, extent = layout.BLOCK_STATUS_HEAD, layout.BLOCK_STATUS_EXTENT
    if extended:
        head, extent = layout.BLOCK_STATUS_EXT_HEAD, layout.BLOCK_STATUS_EXT_EXTENT
    count, rest = divmod(len(payload) - head.size, extent.size)
    if count < 1 or rest:
        raise ProtocolError(f"BLOCK_STATUS chunk of {len(payload)} bytes is malformed")
    if count > STATUS_EXTENTS_MAX:
        raise ProtocolError(
            f"BLOCK_STATUS chunk with {count} extents, over the limit of {STATUS_EXTENTS_MAX}"
        )
    context_id, *told = head.unpack_from(payload)
    if extended and told != [count]:
        raise ProtocolError(f"BLOCK_STATUS chunk says that it has {told[0]} extents and has {count}")
    pairs = extent.iter_unpack(memoryview(payload)[head.size :])
    return context_id, tuple(messages.BlockStatusExtent(length, flags) for length, flags in pairs)


def parse_error(kind: int, payload: bytes) -> messages.ErrorChunk:
    """Error number and text of any error chunk; one of a type that is not known has no text.

    Raises:
        ProtocolError: the payload is malformed, or the error is 0.
    """
    if kind == ReplyType.ERROR:
        chunk = messages.ERROR_CHUNK.parse(payload)
    elif kind == ReplyType.ERROR_OFFSET:
        with_offset = messages.ERROR_OFFSET_CHUNK.parse(payload)
        chunk = messages.ErrorChunk(with_offset.error, with_offset.text)
    else:
        chunk = messages.ErrorChunk(messages.ERROR_HEAD.parse(payload).error, "")
    if chunk.error == 0:
        raise ProtocolError("error chunk with error 0")
    return chunk
