"""A disk in memory with gates on everything, and points in time of it.

    disk = Disk()
    taken = await disk.take("s1")
    disk.source.kinds.add("read")       # from now on the test decides when source reads go on

A test module that uses gates needs a fixture that calls `open_all_gates` at its end, pass or fail:
a held operation does not let its task be cancelled.

Clusters are small, and the last one is short, so that every test meets the odd tail.
"""

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TypeVar

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.scratch import Scratch
from nbdbackup.fleece.snapshots import Snapshot, SnapshotPlan, take_snapshots
from tests.support.faults import FaultyDevice
from tests.support.gated import GatedDevice, settle

CLUSTER = 512
SIZE = 10 * CLUSTER + 77
WAIT_S = 10.0

T = TypeVar("T")

_gates: list[GatedDevice] = []


def make_gate(child: BlockDevice) -> GatedDevice:
    """A gate that holds nothing yet, and is opened by `open_all_gates`."""
    gate = GatedDevice(child, kinds=())
    _gates.append(gate)
    return gate


async def open_all_gates() -> None:
    """Let every operation that is still held go on."""
    while _gates:
        _gates.pop().open_gate()
    await settle()


def start(coroutine: Coroutine[object, object, T]) -> "asyncio.Task[T]":
    """Run `coroutine` beside the test."""
    return asyncio.get_running_loop().create_task(coroutine)


async def end(task: "asyncio.Task[T]") -> T:
    """The result of `task`, which has to come within `WAIT_S` seconds."""
    async with asyncio.timeout(WAIT_S):
        return await task


def noise(length: int, seed: int = 1) -> bytes:
    """Random bytes, none of them zero."""
    generator = random.Random(seed)
    return bytes(generator.randrange(1, 256) for _ in range(length))


class Disk:
    """A node over a gated, faulty device in memory, full of noise."""

    def __init__(self, name: str = "disk", size: int = SIZE, seed: int = 1) -> None:
        self.memory = MemoryDevice(size, name)
        self.memory.data[:] = noise(size, seed)
        self.faults = FaultyDevice(self.memory)
        self.source = make_gate(self.faults)
        self.node = Node(name, self.source)

    @property
    def content(self) -> bytes:
        """What the device holds now."""
        return bytes(self.memory.data)

    def plan(
        self,
        name: str,
        on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT,
        cbw_timeout_s: float = 0,
        scratch_bytes_max: int | None = None,
    ) -> tuple[SnapshotPlan, "ScratchParts"]:
        """A plan for a snapshot with scratch in memory, and the devices that scratch is made of."""
        memory = MemoryDevice(self.memory.size, f"scratch of {name}")
        faults = FaultyDevice(memory)
        gate = make_gate(faults)
        scratch = Scratch(gate, CLUSTER, scratch_bytes_max, f"scratch of {name}")
        plan = SnapshotPlan(self.node, name, scratch, on_cbw_error, cbw_timeout_s)
        return plan, ScratchParts(scratch, gate, faults, memory)

    async def take(
        self,
        name: str = "s1",
        on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT,
        cbw_timeout_s: float = 0,
        scratch_bytes_max: int | None = None,
    ) -> "Taken":
        """Take a snapshot of this disk alone."""
        plan, parts = self.plan(name, on_cbw_error, cbw_timeout_s, scratch_bytes_max)
        (snapshot,) = await take_snapshots([plan])
        return Taken(snapshot, parts)


@dataclass(frozen=True, slots=True)
class ScratchParts:
    """The devices below a snapshot's scratch, from the top down."""

    scratch: Scratch
    gate: GatedDevice
    faults: FaultyDevice
    memory: MemoryDevice


@dataclass(frozen=True, slots=True)
class Taken:
    """A live snapshot and what its scratch is made of."""

    snapshot: Snapshot
    parts: ScratchParts

    @property
    def view(self) -> Node:
        """The node to read it from."""
        return self.snapshot.view

    async def read(self, offset: int = 0, length: int = SIZE) -> bytes:
        """Bytes of the view."""
        buffer = bytearray(length)
        async with asyncio.timeout(WAIT_S):
            await self.view.read(offset, buffer)
        return bytes(buffer)

    def assert_nothing_in_flight(self) -> None:
        """No copy, frozen read or buffer is held."""
        assert len(self.snapshot.block_copy.in_flight) == 0
        assert len(self.snapshot.filter.frozen_reads) == 0
        assert self.snapshot.block_copy._memory.bytes_used == 0
