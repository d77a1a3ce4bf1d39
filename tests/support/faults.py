"""A device that fails when the test wants it to.

    disk = FaultyDevice(MemoryDevice(1 << 20))
    disk.inject("write", errno.ENOSPC, Extent(65536, 65536), count=1)
    disk.inject("read", errno.EIO)          # every read, until clear()

A torn write or write_zeroes changes the first half of its range and then fails.
`operations` records what arrived, failed or not.
"""

import os
from dataclasses import dataclass

from nbdbackup.block.device import BlockDevice, ReadableBuffer, WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.extents import ContextExtent, Extent, StatusExtent


@dataclass(slots=True, eq=False)
class Fault:
    """Operations of `kind` that touch `area` fail with `errno`, `count` times (None: always)."""

    kind: str
    errno: int
    area: Extent
    count: int | None
    torn: bool


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that arrived; `kind` is the name of the device's method."""

    kind: str
    area: Extent


class FaultyDevice(FilterDevice):
    """Forwards to `child`, but for the faults that were injected."""

    def __init__(self, child: BlockDevice) -> None:
        super().__init__(child)
        self.operations: list[Operation] = []
        self._faults: list[Fault] = []

    def inject(
        self, kind: str, errno: int, area: Extent | None = None, count: int | None = None, torn: bool = False
    ) -> None:
        """Let operations of `kind` (a method's name) fail; `area` None is everywhere, flush included."""
        self._faults.append(Fault(kind, errno, area or Extent(0, self.size), count, torn))

    def clear(self) -> None:
        """Fail no more."""
        self._faults.clear()

    def _find(self, kind: str, area: Extent) -> Fault | None:
        for fault in self._faults:
            everywhere = fault.area == Extent(0, self.size)
            if fault.kind == kind and fault.count != 0 and (everywhere or fault.area.overlaps(area)):
                return fault
        return None

    def _arrive(self, kind: str, offset: int, length: int) -> Fault | None:
        area = Extent(offset, length)
        self.operations.append(Operation(kind, area))
        fault = self._find(kind, area)
        if fault is None:
            return None
        if fault.count is not None:
            fault.count -= 1
        if not fault.torn:
            raise _error(fault)
        return fault

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        self._arrive("read", offset, len(buffer))
        await self.child.read(offset, buffer)

    async def read_sparse(self, offset: int, buffer: WritableBuffer) -> list[StatusExtent]:
        self._arrive("read", offset, len(buffer))
        return await self.child.read_sparse(offset, buffer)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        if fault := self._arrive("write", offset, len(data)):
            await self.child.write(offset, memoryview(data)[: len(data) // 2])
            raise _error(fault)
        await self.child.write(offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        if fault := self._arrive("write_zeroes", offset, length):
            await self.child.write_zeroes(offset, length // 2)
            raise _error(fault)
        await self.child.write_zeroes(offset, length, may_unmap, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        self._arrive("trim", offset, length)
        await self.child.trim(offset, length, fua)

    async def flush(self) -> None:
        self._arrive("flush", 0, 0)
        await self.child.flush()

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        self._arrive("block_status", offset, length)
        return await self.child.block_status(offset, length)

    async def is_allocated(self, offset: int, length: int) -> list[ContextExtent]:
        self._arrive("is_allocated", offset, length)
        return await self.child.is_allocated(offset, length)

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        area = Extent(offset, len(buffer))
        if self._find("read", area) or not self.child.read_nowait(offset, buffer):
            return False
        self.operations.append(Operation("read", area))
        return True

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        area = Extent(offset, len(data))
        if self._find("write", area) or not self.child.write_nowait(offset, data):
            return False
        self.operations.append(Operation("write", area))
        return True

    def offload_fd(self) -> int | None:
        """None: offloaded copies would pass the faults by."""
        return None


def _error(fault: Fault) -> OSError:
    return OSError(fault.errno, os.strerror(fault.errno))
