"""What a request does to a device when it cannot be done on the spot: one coroutine, one reply."""

from collections.abc import Sequence

from nbdbackup.block.device import BlockDevice, ReadableBuffer
from nbdbackup.extents import Allocation, StatusExtent
from nbdbackup.nbd import replies
from nbdbackup.nbd.constants import Command, CommandFlags
from nbdbackup.nbd.requests import Refusal, Request
from nbdbackup.nbd.transmission import Transmission
from nbdbackup.server.contexts import SelectedContexts

HOLE_BYTES_MIN = 64 << 10
"""A READ this long may be answered with holes; for less, looking costs more than it saves."""
STATUS_EXTENTS_MAX = 1 << 16
"""Extents in one reply to BLOCK_STATUS, over all its contexts; a client asks again for the rest."""


def explain(error: OSError, request: Request) -> Refusal:
    """The protocol's error for a device's failure to do `request`, and its cause in words."""
    fast_zero = bool(request.flags & CommandFlags.FAST_ZERO)
    text = error.strerror or str(error)
    offset: int | None = getattr(error, "offset", None)
    if offset is not None and not request.offset <= offset < request.offset + request.length:
        offset = None  # what failed was something else, on behalf of this request
    return Refusal(replies.wire_errno(error.errno, fast_zero=fast_zero), text, offset)


async def perform(
    device: BlockDevice, protocol: Transmission, request: Request, data: ReadableBuffer = b""
) -> Sequence[ReadableBuffer]:
    """Carry out `request`, which `protocol.check` let through; the reply, in pieces to be sent in order.

    `data` is a WRITE's payload, or the rest of it: it ends where the request ends.
    """
    try:
        if request.command == Command.READ:
            return await _read(device, protocol, request)
        await _change(device, request, data)
    except OSError as error:
        return (protocol.reply_error(request, explain(error, request)),)
    return (protocol.reply_done(request),)


async def tell_status(
    contexts: SelectedContexts, protocol: Transmission, request: Request, ids: Sequence[int]
) -> Sequence[ReadableBuffer]:
    """The reply to BLOCK_STATUS, which `protocol.check` let through, for the contexts `ids`."""
    extents_max = 1 if request.flags & CommandFlags.REQ_ONE else max(1, STATUS_EXTENTS_MAX // len(ids))
    statuses = []
    try:
        for number in ids:
            provider = contexts.get(number)
            extents = await provider.status(request.offset, request.length)
            statuses.append((number, [(extent.length, extent.status) for extent in extents[:extents_max]]))
    except OSError as error:
        return (protocol.reply_error(request, explain(error, request)),)
    return (protocol.reply_status(request, statuses),)


async def _read(device: BlockDevice, protocol: Transmission, request: Request) -> Sequence[ReadableBuffer]:
    length = request.length
    if not length:
        return (protocol.reply_done(request),)
    head_bytes = protocol.read_head_bytes
    reply = bytearray(head_bytes + length)
    data = memoryview(reply)[head_bytes:]
    if length >= HOLE_BYTES_MIN and protocol.has_chunks and not request.flags & CommandFlags.DF:
        extents = await device.read_sparse(request.offset, data)
        if any(extent.flags & Allocation.ZERO for extent in extents):
            return _pieces(protocol, request, data, extents)
    else:
        await device.read(request.offset, data)
    protocol.pack_read_head(reply, 0, request)
    return (reply,)


def _pieces(
    protocol: Transmission, request: Request, data: memoryview, extents: Sequence[StatusExtent]
) -> Sequence[ReadableBuffer]:
    """A READ's reply of data and holes, which cover it (62)."""
    pieces: list[ReadableBuffer] = []
    position = 0
    for extent in extents:
        end = position + extent.length
        offset, done = request.offset + position, end == request.length
        if extent.flags & Allocation.ZERO:
            pieces.append(protocol.hole(request, offset, extent.length, done=done))
        else:
            pieces.append(protocol.data_head(request, offset, extent.length, done=done))
            pieces.append(data[position:end])
        position = end
    assert position == request.length, "read_sparse must cover the whole range"
    return pieces


async def _change(device: BlockDevice, request: Request, data: ReadableBuffer) -> None:
    offset, length = request.offset, request.length
    fua = bool(request.flags & CommandFlags.FUA)
    match request.command:
        case Command.WRITE:
            await device.write(offset + length - len(data), data, fua)
        case Command.FLUSH:
            await device.flush()
        case Command.TRIM:
            await device.trim(offset, length, fua)
        case Command.CACHE:
            await device.cache(offset, length)
        case Command.WRITE_ZEROES:
            await device.write_zeroes(
                offset,
                length,
                may_unmap=not request.flags & CommandFlags.NO_HOLE,
                fast=bool(request.flags & CommandFlags.FAST_ZERO),
                fua=fua,
            )
        case _:
            raise AssertionError(f"command {request.command} has no operation")
