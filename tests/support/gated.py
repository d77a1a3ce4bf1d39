"""A device whose operations go on only when the test says so.

Every operation waits in `pending` until the test calls `release` or `fail` on it, so a
test decides in which order operations in flight take effect and complete:

    perform(op)     let it take effect on the child, but not return yet
    release(op)     let it take effect (if it has not) and return
    fail(op, e)     let it raise OSError(e) without an effect

After each of these the event loop must run for the waiting task to notice:
`await settle()`. Like a real device, an operation does not end early when its task is
cancelled: it takes effect when released and raises CancelledError then.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from nbdbackup.block.device import BlockDevice, ReadableBuffer, WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.extents import ContextExtent, StatusExtent

KINDS = frozenset({"read", "write", "write_zeroes", "trim", "flush", "cache", "block_status", "is_allocated"})
WAIT_S = 10.0
CANCELLED_WAIT_S = 2.0
_SETTLE_ROUNDS = 50


@dataclass(slots=True, eq=False)
class PendingOp:
    """An operation in flight: `kind` is the name of the device's method; flush has no length."""

    kind: str
    offset: int
    length: int
    started: asyncio.Event = field(default_factory=asyncio.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    errno: int | None = None

    def __repr__(self) -> str:
        return f"<{self.kind} [{self.offset}, {self.offset + self.length})>"


class GatedDevice(FilterDevice):
    """Holds the operations of `kinds` until released; passes the others on at once.

    The `_nowait` twins of held kinds return False.
    """

    def __init__(self, child: BlockDevice, kinds: Collection[str] = KINDS) -> None:
        super().__init__(child)
        self.kinds = set(kinds)
        self.pending: list[PendingOp] = []
        self._arrived = asyncio.Condition()

    def perform(self, op: PendingOp) -> None:
        """Let `op` take effect; it stays in `pending` until released."""
        op.started.set()

    def release(self, op: PendingOp) -> None:
        """Let `op` take effect and return."""
        self.pending.remove(op)
        op.started.set()
        op.finished.set()

    def fail(self, op: PendingOp, errno: int) -> None:
        """Let `op` raise OSError(`errno`); it must not have been performed."""
        assert not op.started.is_set()
        op.errno = errno
        self.release(op)

    def release_all(self) -> None:
        """Release what is pending now."""
        for op in list(self.pending):
            self.release(op)

    def open_gate(self) -> None:
        """Release what is pending, and hold nothing from now on."""
        self.kinds.clear()
        self.release_all()

    def find(self, kind: str, offset: int | None = None) -> PendingOp | None:
        """The oldest pending operation of `kind`, at `offset` if given."""
        for op in self.pending:
            if op.kind == kind and offset in (None, op.offset):
                return op
        return None

    async def wait_pending(self, kind: str, offset: int | None = None) -> PendingOp:
        """Wait for such an operation to arrive; TimeoutError after `WAIT_S` seconds."""
        async with asyncio.timeout(WAIT_S), self._arrived:
            while (op := self.find(kind, offset)) is None:
                await self._arrived.wait()
        return op

    @asynccontextmanager
    async def _gate(self, kind: str, offset: int, length: int) -> AsyncIterator[None]:
        if kind not in self.kinds:
            yield
            return
        op = PendingOp(kind, offset, length)
        self.pending.append(op)
        async with self._arrived:
            self._arrived.notify_all()
        cancelled = await _wait_through(op.started)
        if op.errno is not None and not cancelled:
            raise OSError(op.errno, os.strerror(op.errno))
        try:
            if op.errno is None:
                yield
        finally:
            cancelled |= await _wait_through(op.finished)
        if cancelled:
            raise asyncio.CancelledError

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        async with self._gate("read", offset, len(buffer)):
            await self.child.read(offset, buffer)

    async def read_sparse(self, offset: int, buffer: WritableBuffer) -> list[StatusExtent]:
        async with self._gate("read", offset, len(buffer)):
            return await self.child.read_sparse(offset, buffer)
        raise AssertionError("the gate lets through or raises")

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        async with self._gate("write", offset, len(data)):
            await self.child.write(offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        async with self._gate("write_zeroes", offset, length):
            await self.child.write_zeroes(offset, length, may_unmap, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        async with self._gate("trim", offset, length):
            await self.child.trim(offset, length, fua)

    async def flush(self) -> None:
        async with self._gate("flush", 0, 0):
            await self.child.flush()

    async def cache(self, offset: int, length: int) -> None:
        async with self._gate("cache", offset, length):
            await self.child.cache(offset, length)

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        async with self._gate("block_status", offset, length):
            return await self.child.block_status(offset, length)
        raise AssertionError("the gate lets through or raises")

    async def is_allocated(self, offset: int, length: int) -> list[ContextExtent]:
        async with self._gate("is_allocated", offset, length):
            return await self.child.is_allocated(offset, length)
        raise AssertionError("the gate lets through or raises")

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        return "read" not in self.kinds and self.child.read_nowait(offset, buffer)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return "write" not in self.kinds and self.child.write_nowait(offset, data)

    def offload_fd(self) -> int | None:
        """None: offloaded copies would pass the gate by."""
        return None


async def _wait_through(event: asyncio.Event) -> bool:
    """Wait for `event` however often the task is cancelled; whether it was.

    A failed test cancels its tasks and releases nothing: once cancelled, wait no longer than
    `CANCELLED_WAIT_S` seconds.
    """
    cancelled = False
    while not event.is_set():
        try:
            async with asyncio.timeout(CANCELLED_WAIT_S if cancelled else None):
                await event.wait()
        except asyncio.CancelledError:
            cancelled = True
        except TimeoutError:
            raise AssertionError("a cancelled operation was never released") from None
    return cancelled


async def settle() -> None:
    """Let every task run until it waits for something that only the test can give."""
    for _ in range(_SETTLE_ROUNDS):
        await asyncio.sleep(0)
