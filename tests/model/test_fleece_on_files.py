"""Real files and real threads: clients write all over a disk while snapshots come, are read, and go.

The state machine decides every interleaving by itself; here the kernel and the threads do.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdbackup.block.device import BlockDevice, ReadableBuffer, WritableBuffer
from nbdbackup.block.file import FileDevice
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import SnapshotError
from nbdbackup.extents import Allocation
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.scratch import open_scratch
from nbdbackup.fleece.snapshots import Snapshot, SnapshotPlan, take_snapshots

CLUSTER = 65536
SIZE = 40 * CLUSTER + 333
CLIENTS = 4
TURNS = 6
READS_PER_TURN = 40
JITTER_S = 0.002
LIMIT_S = 100.0


class JitteryDevice(FilterDevice):
    """Takes up to `JITTER_S` before and after each operation, and often declines to be quick."""

    def __init__(self, child: BlockDevice, generator: random.Random) -> None:
        super().__init__(child)
        self._generator = generator

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        async with self._jitter():
            await self.child.read(offset, buffer)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        async with self._jitter():
            await self.child.write(offset, data, fua)

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        return self._generator.random() < 0.3 and self.child.read_nowait(offset, buffer)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return self._generator.random() < 0.3 and self.child.write_nowait(offset, data)

    def offload_fd(self) -> int | None:
        return None

    @asynccontextmanager
    async def _jitter(self) -> AsyncIterator[None]:
        await asyncio.sleep(self._generator.random() * JITTER_S)
        yield
        await asyncio.sleep(self._generator.random() * JITTER_S)


async def keep_writing(node: Node, generator: random.Random) -> None:
    """One client, with one request in flight, until it is cancelled."""
    while True:
        offset = generator.randrange(SIZE)
        length = min(SIZE - offset, generator.choice((1, 512, 4096, CLUSTER, 5 * CLUSTER)))
        kind = generator.choice(("write", "write", "quick", "write_zeroes", "trim"))
        data = generator.randbytes(length)
        if kind == "write_zeroes":
            await node.write_zeroes(offset, length)
        elif kind == "trim":
            await node.trim(offset, length)
        elif kind == "write" or not node.write_nowait(offset, data):
            await node.write(offset, data)
        await asyncio.sleep(0)


async def check_view(snapshot: Snapshot, content: bytes, generator: random.Random) -> None:
    """Read here and there, as the server does; every answer is that of the point in time."""
    for _ in range(READS_PER_TURN):
        offset = generator.randrange(SIZE)
        buffer = bytearray(min(SIZE - offset, generator.choice((1, 4096, CLUSTER, 3 * CLUSTER))))
        if generator.random() < 0.5 or not snapshot.view.read_nowait(offset, buffer):
            await snapshot.view.read(offset, buffer)
        assert buffer == content[offset : offset + len(buffer)], f"newer bytes at {offset}"
        position = 0
        for extent in await snapshot.view.block_status(offset, len(buffer)):
            if extent.flags & Allocation.ZERO:
                assert not any(buffer[position : position + extent.length])
            position += extent.length
    whole = bytearray(SIZE)
    await snapshot.view.read(0, whole)
    assert whole == content


@pytest.mark.parametrize("seed", range(3))
async def test_views_hold_while_threads_write(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    path = tmp_path / "disk.img"
    path.write_bytes(generator.randbytes(SIZE))
    disk = FileDevice.open(str(path))
    node = Node("disk", JitteryDevice(disk, generator))

    async def take(name: str) -> tuple[Snapshot, bytes]:
        scratch = open_scratch(tmp_path, SIZE, CLUSTER, None, f"scratch of {name}")
        plan = SnapshotPlan(node, name, scratch, OnCbwError.BREAK_GUEST_WRITE)
        (snapshot,) = await take_snapshots([plan])
        # No await since the node went on: what the file holds now is the point in time.
        return snapshot, path.read_bytes()

    async with asyncio.timeout(LIMIT_S):
        clients = [
            asyncio.get_running_loop().create_task(keep_writing(node, random.Random(f"{seed}/{number}")))
            for number in range(CLIENTS)
        ]
        live = [await take("first")]
        for turn in range(TURNS):
            live.append(await take(f"s{turn}"))
            async with asyncio.TaskGroup() as group:
                for snapshot, content in live:
                    group.create_task(check_view(snapshot, content, random.Random(generator.random())))
            dropped, _ = live.pop(generator.randrange(len(live)))
            await dropped.drop()
            with pytest.raises(SnapshotError):
                await dropped.view.read(0, bytearray(1))
        assert all(not client.done() for client in clients)
        for client in clients:
            client.cancel()
        await asyncio.wait(clients)
        for snapshot, content in live:
            await check_view(snapshot, content, generator)
            await snapshot.drop()
        await disk.close()
