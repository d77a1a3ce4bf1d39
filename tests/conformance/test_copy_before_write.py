"""A node keeps the devices' promises while client writes save what they change.

At the end of each test every point in time still shows what the node held then.
"""

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.file import FileDevice
from nbdbackup.block.node import Node
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.scratch import open_scratch
from nbdbackup.fleece.snapshots import Snapshot, SnapshotPlan, take_snapshots
from tests.conformance.device_suite import MIB, DeviceSuite, MakeDevice, read

CLUSTER = 65536
COMPARED_BYTES_MAX = 16 * MIB
TIMEOUTS_S = {"old": 3600.0, "new": 0.0}
"""A snapshot before the content is written, and one after; one of each kind of waiting for copies."""


async def _check(snapshot: Snapshot, content: bytes | None) -> None:
    """Fail unless the snapshot is whole and shows `content` (None: it is too long to compare)."""
    assert snapshot.broken is None
    if content is not None:
        assert await read(snapshot.view, 0, len(content)) == content


@asynccontextmanager
async def making_nodes(directory: Path) -> AsyncIterator[MakeDevice]:
    """A maker of nodes with two snapshots each."""
    numbers = itertools.count()
    async with AsyncExitStack() as stack:

        async def take(node: Node, name: str) -> None:
            scratch = open_scratch(directory, node.size, CLUSTER, None, f"scratch of {name}")
            plan = SnapshotPlan(node, name, scratch, OnCbwError.BREAK_GUEST_WRITE, TIMEOUTS_S[name])
            content = await read(node, 0, node.size) if node.size <= COMPARED_BYTES_MAX else None
            (snapshot,) = await take_snapshots([plan])
            stack.push_async_callback(snapshot.drop)
            stack.push_async_callback(_check, snapshot, content)

        async def make(size: int, content: Mapping[int, bytes]) -> BlockDevice:
            disk = FileDevice.create(str(directory / f"{next(numbers)}.img"), size)
            stack.push_async_callback(disk.close)
            node = Node("disk", disk)
            await take(node, "old")
            for offset, data in content.items():
                await node.write(offset, data)
            await take(node, "new")
            return node

        yield make


class TestNodeWithSnapshots(DeviceSuite):
    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        async with making_nodes(tmp_path) as make:
            yield make
