"""A remote export as a device.

`NbdDevice` cuts operations to what the server takes, and makes up for what it does not offer:

- Nothing is read or written that is longer than the server's maximum payload, nor longer than
  `PIECE_BYTES_MAX`; the pieces of one operation are under way at the same time.
- Requests without payload are cut to lengths of 32 bits, but for a server with extended headers.
- Where the server's minimum block size is more than a byte, reads are widened, and a write that
  begins or ends inside a block reads that block first. Such a write has the device to itself while
  it is done: another write to the same block would be undone.
- No WRITE_ZEROES: zeroes are written. No FUA: a flush follows the write. No TRIM or CACHE: these
  hints do nothing. No FLUSH: the server is taken at its word that what it acknowledged is safe.
- No block status: everything is data.

What happens when the connection is lost is in `block/nbd_session.py`.
"""

import asyncio
import errno
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager

from nbdbackup.block.device import BlockDevice, Features, ReadableBuffer, WritableBuffer
from nbdbackup.block.nbd_connection import Operation
from nbdbackup.block.nbd_session import RemoteOptions, RemoteSession, reason
from nbdbackup.errors import DeviceError
from nbdbackup.extents import Allocation, ContextExtent, Extent, StatusExtent, merge_status
from nbdbackup.nbd import uri as nbd_uri
from nbdbackup.nbd.client import RemoteExport
from nbdbackup.nbd.constants import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    Command,
    CommandFlags,
    Errno,
    TransmissionFlags,
)
from nbdbackup.nbd.reply_parser import Reply
from nbdbackup.nbd.uri import NbdUri

PIECE_BYTES_MAX = 4 << 20
"""Of a READ or WRITE."""
ZERO_BYTES_MAX = 32 << 20
"""Of a WRITE_ZEROES, which a server may carry out by writing; longer if it can do it fast."""
FAST_ZERO_BYTES_MAX = 512 << 20
RANGE_BYTES_MAX = 1 << 30
"""Of a TRIM, CACHE or BLOCK_STATUS without extended headers."""
CACHE_BYTES_MAX = 8 << 30
"""Of a CACHE with them, which reads all of it before it is answered; the others have no limit."""
PIECES_AT_ONCE = 16

_ZEROES = bytes(1 << 20)
_ERRNOS = frozenset(int(number) for number in Errno if number)


class NbdDevice(BlockDevice):
    """An export of an NBD server; made by `open`."""

    def __init__(self, session: RemoteSession, *, read_only: bool, discard: bool) -> None:
        # Set once.
        export = session.export
        self.size = export.size
        self.read_only = read_only
        self._session = session
        self._name = str(session.uri)
        self._flags = export.flags
        self._block_bytes = export.block_size_min
        self._discard = discard
        self._piece_bytes = self._whole_blocks(min(export.payload_bytes_max, PIECE_BYTES_MAX))
        self._range_bytes = self.size if export.extended_headers else RANGE_BYTES_MAX
        self._cache_bytes = min(self._range_bytes, self._whole_blocks(CACHE_BYTES_MAX))
        fast_zero = TransmissionFlags.SEND_FAST_ZERO | TransmissionFlags.SEND_WRITE_ZEROES
        self.features = Features(
            trim=discard and self._offers(TransmissionFlags.SEND_TRIM),
            fast_zero=self._flags & fast_zero == fast_zero,
            rotational=self._offers(TransmissionFlags.ROTATIONAL),
        )
        self._edges = _EdgeLock()

    @classmethod
    async def open(
        cls,
        uri: str,
        *,
        read_only: bool = False,
        discard: bool = True,
        options: RemoteOptions | None = None,
    ) -> "NbdDevice":
        """Connect to the export that `uri` names.

        Without `discard`, `trim` does nothing and zeroed ranges stay allocated.

        Raises:
            UsageError: `uri` is no NBD URI, or what it names for TLS is unfit.
            NotFoundError: nobody listens there, or has no such export.
            ProtocolError: the server refuses the export, or breaks the protocol.
            DeviceError: it cannot be reached, is empty, cannot be written to, or is of odd length.
        """
        parsed = nbd_uri.parse(uri)
        session = RemoteSession(parsed, options or RemoteOptions())
        await session.open()
        try:
            _check_usable(parsed, session.export, read_only)
        except BaseException:
            await session.close()
            raise
        return cls(session, read_only=read_only, discard=discard)

    def __str__(self) -> str:
        return self._name

    @property
    def export(self) -> RemoteExport:
        """What the server said about it."""
        return self._session.export

    async def close(self) -> None:
        await self._session.close()

    # Reading.

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        length = len(buffer)
        assert 0 <= offset <= offset + length <= self.size
        area = Extent(offset, length)
        whole = self._whole(area)
        if whole == area:
            await self._read_blocks(area, memoryview(buffer))
            return
        around = bytearray(whole.length)
        await self._read_blocks(whole, memoryview(around))
        start = offset - whole.offset
        buffer[:] = memoryview(around)[start : start + length]

    async def _read_blocks(self, area: Extent, buffer: memoryview) -> None:
        pieces = (
            Operation(
                Command.READ,
                piece.offset,
                piece.length,
                buffer=buffer[piece.offset - area.offset : piece.end - area.offset],
            )
            for piece in area.split(self._piece_bytes)
        )
        await self._do_all(pieces)

    # Writing.

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        area = Extent(offset, len(data))
        assert 0 <= offset <= area.end <= self.size
        whole = self._whole(area)
        async with self._edges.held(alone=whole != area):
            if whole == area:
                await self._write_blocks(area, memoryview(data), fua)
            else:
                await self._write_around(area, whole, memoryview(data), fua)

    async def _write_around(self, area: Extent, whole: Extent, data: memoryview, fua: bool) -> None:
        """Write `data` at `area` and what is there already in the rest of `whole`."""
        around = bytearray(whole.length)
        block = self._block_bytes
        first, last = Extent(whole.offset, block), Extent(whole.end - block, block)
        for edge in {first, last}:
            start = edge.offset - whole.offset
            await self._read_blocks(edge, memoryview(around)[start : start + block])
        start = area.offset - whole.offset
        around[start : start + area.length] = data
        await self._write_blocks(whole, memoryview(around), fua)

    async def _write_blocks(self, area: Extent, data: memoryview, fua: bool) -> None:
        flags = CommandFlags.FUA if fua and self._offers(TransmissionFlags.SEND_FUA) else 0
        pieces = (
            Operation(
                Command.WRITE,
                piece.offset,
                piece.length,
                flags,
                data[piece.offset - area.offset : piece.end - area.offset],
            )
            for piece in area.split(self._piece_bytes)
        )
        await self._do_all(pieces)
        if fua and not flags:
            await self.flush()

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        area = Extent(offset, length)
        assert 0 <= offset <= area.end <= self.size
        inner = self._whole_inside(area)
        if fast and not (self.features.fast_zero and inner == area):
            raise self._not_fast()
        if not length:
            return
        if not inner.length:
            await self.write(offset, bytes(length), fua)
            return
        for edge in (
            Extent(offset, inner.offset - offset),
            Extent(inner.end, area.end - inner.end),
        ):
            if edge.length:
                await self.write(edge.offset, bytes(edge.length))
        async with self._edges.held(alone=False):
            await self._zero_blocks(inner, may_unmap and self._discard, fast)
        if fua:
            await self.flush()

    async def _zero_blocks(self, area: Extent, may_unmap: bool, fast: bool) -> None:
        if not self._offers(TransmissionFlags.SEND_WRITE_ZEROES):
            await self._write_zero_bytes(area)
            return
        flags = 0 if may_unmap else CommandFlags.NO_HOLE
        length_max = FAST_ZERO_BYTES_MAX if self.features.fast_zero else ZERO_BYTES_MAX
        if self.features.fast_zero and self.export.extended_headers and area.length > length_max:
            # All at once, if that is fast; else it is cut, or the server would be thought dead.
            if await self._zero_piece(area, flags, fast=True):
                return
            if fast:
                raise self._not_fast()
        for number, piece in enumerate(area.split(self._whole_blocks(length_max))):
            # Only the first piece may say that it cannot be fast: then nothing has changed yet.
            is_fast = fast and not number
            if await self._zero_piece(piece, flags, is_fast):
                continue
            if is_fast:
                raise self._not_fast()
            await self._write_zero_bytes(piece)

    async def _zero_piece(self, piece: Extent, flags: int, fast: bool) -> bool:
        """Zero it in one request; False: the server does not, or not fast, and nothing has changed."""
        flags |= CommandFlags.FAST_ZERO if fast else 0
        operation = Operation(Command.WRITE_ZEROES, piece.offset, piece.length, flags)
        [reply] = await self._session.perform(operation)
        if reply.error and reply.error != Errno.ENOTSUP:
            raise self._failed(operation, reply)
        return not reply.error

    def _not_fast(self) -> DeviceError:
        return DeviceError(errno.ENOTSUP, f"{self._name} cannot zero this range fast")

    async def _write_zero_bytes(self, area: Extent) -> None:
        length_max = min(self._piece_bytes, len(_ZEROES))
        zeroes = memoryview(_ZEROES)
        await self._do_all(
            Operation(Command.WRITE, piece.offset, piece.length, payload=zeroes[: piece.length])
            for piece in area.split(length_max)
        )

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        assert 0 <= offset <= offset + length <= self.size
        area = self._whole_inside(Extent(offset, length))
        if self.features.trim and area.length:
            await self._do_all(
                Operation(Command.TRIM, piece.offset, piece.length) for piece in area.split(self._range_bytes)
            )
        if fua:
            await self.flush()

    async def flush(self) -> None:
        await self._session.flush()

    # Hints and knowledge.

    async def cache(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= self.size
        area = self._whole(Extent(offset, length))
        if not self._offers(TransmissionFlags.SEND_CACHE):
            return
        try:
            await self._cache_blocks(area)
        except DeviceError as error:
            # QEMU takes no more at once than it takes of a READ.
            length_max = self._whole_blocks(min(self.export.payload_bytes_max, self._cache_bytes))
            if error.errno != errno.EINVAL or area.length <= length_max:
                raise
            self._cache_bytes = length_max
            await self._cache_blocks(area)

    async def _cache_blocks(self, area: Extent) -> None:
        pieces = area.split(self._cache_bytes)
        await self._do_all(Operation(Command.CACHE, piece.offset, piece.length) for piece in pieces)

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        assert 0 <= offset <= offset + length <= self.size
        if not length:
            return []
        if not self._knows(BASE_ALLOCATION):
            return [StatusExtent(length, Allocation.DATA)]
        found = await self.context_status(offset, length, BASE_ALLOCATION)
        known = Allocation.HOLE | Allocation.ZERO
        return merge_status(StatusExtent(length, Allocation(flags) & known) for length, flags in found)

    async def allocation_depth(self, offset: int, length: int) -> list[ContextExtent]:
        assert 0 <= offset <= offset + length <= self.size
        if not length or not self._knows(ALLOCATION_DEPTH):
            return await super().allocation_depth(offset, length)
        found = await self.context_status(offset, length, ALLOCATION_DEPTH)
        return [ContextExtent(extent_length, depth) for extent_length, depth in found]

    async def context_status(self, offset: int, length: int, context: str) -> list[tuple[int, int]]:
        """(length in bytes, flags) of the extents from `offset` on, in `context`, which the server has.

        Answers for at least one byte, and perhaps for less than `length`.
        """
        area = Extent(offset, length)
        whole = self._whole(Extent(offset, min(length, self._range_bytes)))
        operation = Operation(Command.BLOCK_STATUS, whole.offset, whole.length)
        [reply] = await self._session.perform(operation)
        if reply.error:
            raise self._failed(operation, reply)
        extents = reply.status.get({name: number for number, name in operation.contexts}.get(context, -1))
        if extents is None:
            raise DeviceError(errno.EIO, f"{self._name} told nothing of {context} at offset {offset}")
        found: list[tuple[int, int]] = []
        position = whole.offset
        for extent in extents:
            start, position = max(position, area.offset), position + extent.length
            if min(position, area.end) > start:
                found.append((min(position, area.end) - start, extent.flags))
        if not found:
            raise DeviceError(errno.EIO, f"{self._name} told nothing about offset {offset}")
        return found

    # Below.

    def _knows(self, context: str) -> bool:
        return context in {name for _, name in self.export.contexts}

    def _offers(self, flag: TransmissionFlags) -> bool:
        return bool(self._flags & flag)

    def _whole_blocks(self, length: int) -> int:
        """The largest multiple of the block size up to `length`."""
        return length // self._block_bytes * self._block_bytes

    def _whole(self, area: Extent) -> Extent:
        return area.aligned_out(self._block_bytes, self.size) if area.length else area

    def _whole_inside(self, area: Extent) -> Extent:
        return area.aligned_in(self._block_bytes, self.size)

    async def _do_all(self, operations: Iterable[Operation]) -> None:
        """Carry out `operations`, some at a time, until one fails."""
        iterator: Iterator[Operation] = iter(operations)
        while batch := list(itertools.islice(iterator, PIECES_AT_ONCE)):
            replies = await self._session.perform(*batch)
            for operation, reply in zip(batch, replies, strict=True):
                if reply.error:
                    raise self._failed(operation, reply)

    def _failed(self, operation: Operation, reply: Reply) -> DeviceError:
        number = reply.error if reply.error in _ERRNOS else errno.EIO
        if number == Errno.ENOTSUP and not operation.flags & CommandFlags.FAST_ZERO:
            number = errno.EINVAL
        return DeviceError(number, f"{self._name} failed to {_VERBS[operation.command]}: {reason(reply)}")


_VERBS = {
    Command.READ: "read",
    Command.WRITE: "write",
    Command.TRIM: "trim",
    Command.CACHE: "cache",
    Command.WRITE_ZEROES: "write zeroes",
    Command.BLOCK_STATUS: "tell its block status",
}


class _EdgeLock:
    """Held by writes together, or by one that reads a block's other bytes first, alone."""

    def __init__(self) -> None:
        self._together = 0
        self._alone = asyncio.Lock()
        self._nobody = asyncio.Event()
        self._nobody.set()

    @asynccontextmanager
    async def held(self, *, alone: bool) -> AsyncIterator[None]:
        async with self._alone:
            if alone:
                await self._nobody.wait()
                yield
                return
            self._together += 1
            self._nobody.clear()
        try:
            yield
        finally:
            self._together -= 1
            if not self._together:
                self._nobody.set()


def _check_usable(uri: NbdUri, export: RemoteExport, read_only: bool) -> None:
    if not export.size:
        raise DeviceError(errno.EINVAL, f"{uri} is empty: a disk needs at least one byte")
    if export.size % export.block_size_min:
        raise DeviceError(
            errno.EINVAL,
            f"{uri} has {export.size} bytes, no multiple of its server's block size of "
            f"{export.block_size_min}: its end could not be read",
        )
    if export.flags & TransmissionFlags.READ_ONLY and not read_only:
        raise DeviceError(errno.EROFS, f"{uri} can only be read: try --read-only")
