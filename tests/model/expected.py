"""What a bytearray says that disks and points in time must hold.

- A client's write that returned is in the device, unless a rival in flight at the same
  time overwrote it; one in flight, or failed, may have left old or new bytes.
- A point in time is the content of the device at the moment when it was taken: the node is
  drained then, so that the content is known exactly.
- Clusters not yet saved are unchanged in the source; saved ones are in scratch; discarded
  ones are in neither.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.extents import Allocation, ContextExtent, Extent, StatusExtent, merge_status
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.scratch import Scratch
from nbdbackup.fleece.snapshots import Snapshot
from tests.support.gated import GatedDevice

CLUSTER = 16
SIZE = 5 * CLUSTER + 5
CLUSTERS = -(-SIZE // CLUSTER)
INJECTED = errno.EREMOTEIO


class Violation(AssertionError):
    """The engine did what the model excludes."""


class FineMemory(MemoryDevice):
    """Knows zeroes by the half cluster, so that block status has something to say; they are not allocated."""

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        return merge_status(
            StatusExtent(
                piece.length,
                Allocation.DATA if any(self.data[piece.offset : piece.end]) else Allocation.ZERO,
            )
            for piece in Extent(offset, length).split(CLUSTER // 2)
        )

    async def is_allocated(self, offset: int, length: int) -> list[ContextExtent]:
        return [
            ContextExtent(piece.length, int(any(self.data[piece.offset : piece.end])))
            for piece in Extent(offset, length).split(CLUSTER // 2)
        ]


@dataclass(slots=True, eq=False)
class ClientWrite:
    """A write, write_zeroes or trim by a client: what it may leave behind, and beside whom."""

    area: Extent
    value: int
    rivals: set["ClientWrite"] = field(default_factory=set)


class Disk:
    """A node, its device, and for each byte the values that it may have now."""

    def __init__(self, name: str, make_gate: Callable[[BlockDevice], GatedDevice]) -> None:
        self.memory = FineMemory(SIZE, name)
        # Some clusters are zero.
        self.memory.data[:] = bytes(0 if i // CLUSTER % 4 == 1 else i % 251 + 1 for i in range(SIZE))
        self.gate = make_gate(self.memory)
        self.node = Node(name, self.gate)
        self.allowed = [{value} for value in self.memory.data]
        self.in_flight: set[ClientWrite] = set()
        self.guest_writes_may_break = False

    def begin(self, write: ClientWrite) -> None:
        for other in self.in_flight:
            if other.area.overlaps(write.area):
                other.rivals.add(write)
                write.rivals.add(other)
        self.in_flight.add(write)
        for position in range(write.area.offset, write.area.end):
            self.allowed[position].add(write.value)

    def finish(self, write: ClientWrite, returned: bool) -> None:
        self.in_flight.discard(write)
        if not returned:
            return
        for position in range(write.area.offset, write.area.end):
            rivals = {rival.value for rival in write.rivals if rival.area.offset <= position < rival.area.end}
            self.allowed[position] = {write.value} | rivals

    def check(self) -> None:
        for position, value in enumerate(self.memory.data):
            if value not in self.allowed[position]:
                raise Violation(f"a client's write is lost: {self.node} holds {value} at {position}")


@dataclass(slots=True, eq=False)
class Point:
    """A snapshot and its model."""

    disk: Disk
    snapshot: Snapshot
    scratch: Scratch
    memory: FineMemory
    content: bytes
    discarded: set[int] = field(default_factory=set)
    trimmed: set[int] = field(default_factory=set)
    broken_by_hand: bool = False
    dropping: bool = False
    gone: bool = False

    def is_discarded(self, area: Extent) -> bool:
        return any(
            number in self.discarded for number in range(area.offset // CLUSTER, -(-area.end // CLUSTER))
        )

    def check(self) -> None:
        copy = self.snapshot.block_copy
        broken = self.snapshot.broken
        if broken is not None and not self.broken_by_hand:
            if self.snapshot.plan.on_cbw_error is not OnCbwError.BREAK_SNAPSHOT:
                raise Violation(f"{self.snapshot.filter.title} broke against its policy: {broken}")
            if broken.errno not in (INJECTED, errno.ENOSPC, errno.ETIMEDOUT):
                raise Violation(f"{self.snapshot.filter.title} broke for no reason: {broken}")
        for number in range(CLUSTERS):
            area = Extent(number * CLUSTER, min(CLUSTER, SIZE - number * CLUSTER))
            if copy.access.any(area.offset, 1) == (number in self.discarded):
                raise Violation(f"access of cluster {number} is not what was discarded")
            if number in self.trimmed and self.scratch._stored.any(area.offset, 1):
                raise Violation(f"cluster {number} takes scratch after it was discarded")
            if broken is None and number not in self.discarded and not self.dropping:
                saved = copy.done.any(area.offset, 1)
                holder = self.memory if saved else self.disk.memory
                if holder.data[area.offset : area.end] != self.content[area.offset : area.end]:
                    raise Violation(f"{holder} lost cluster {number} of {self.snapshot.filter.title}")
