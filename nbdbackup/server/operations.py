"""What a request does to a device when it cannot be done on the spot: one coroutine, one reply."""

from nbdbackup.block.device import BlockDevice, ReadableBuffer
from nbdbackup.extents import StatusExtent
from nbdbackup.nbd import replies
from nbdbackup.nbd.constants import Command, CommandFlags
from nbdbackup.nbd.transmission import Refusal, Request, Transmission


def explain(error: OSError, request: Request) -> Refusal:
    """The protocol's error for a device's failure to do `request`, and its cause in words."""
    fast_zero = bool(request.flags & CommandFlags.FAST_ZERO)
    return Refusal(replies.wire_errno(error.errno, fast_zero=fast_zero), error.strerror or str(error))


async def perform(
    device: BlockDevice, protocol: Transmission, request: Request, data: ReadableBuffer = b""
) -> bytes | bytearray:
    """Carry out `request`, which `protocol.check` let through, and return the whole reply.

    `data` is a WRITE's payload, or the rest of it: it ends where the request ends.
    """
    try:
        if request.command == Command.READ:
            return await _read(device, protocol, request)
        if request.command == Command.BLOCK_STATUS:
            return await _block_status(device, protocol, request)
        await _change(device, request, data)
    except OSError as error:
        return protocol.reply_error(request, *explain(error, request))
    return protocol.reply_done(request)


async def _read(device: BlockDevice, protocol: Transmission, request: Request) -> bytes | bytearray:
    if not request.length:
        return protocol.reply_done(request)
    head_bytes = protocol.read_head_bytes
    reply = bytearray(head_bytes + request.length)
    await device.read(request.offset, memoryview(reply)[head_bytes:])
    protocol.pack_read_head(reply, 0, request)
    return reply


async def _block_status(device: BlockDevice, protocol: Transmission, request: Request) -> bytes:
    extents: list[StatusExtent] = await device.block_status(request.offset, request.length)
    return protocol.reply_status(request, extents)


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
