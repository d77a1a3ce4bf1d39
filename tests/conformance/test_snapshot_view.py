"""A snapshot's view reads like any device: while nothing is saved yet, and after clients wrote everywhere."""

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.file import FileDevice
from nbdbackup.block.node import Node
from nbdbackup.fleece.scratch import open_scratch
from nbdbackup.fleece.snapshots import SnapshotPlan, take_snapshots
from tests.conformance.device_suite import MakeDevice, ReadSuite

CLUSTER = 65536
STRIPE = 5 * CLUSTER // 2


@asynccontextmanager
async def making_views(directory: Path, write_after: bool) -> AsyncIterator[MakeDevice]:
    """A maker of views of files; clients overwrite what the files held afterwards if `write_after`."""
    numbers = itertools.count()
    async with AsyncExitStack() as stack:

        async def make(size: int, content: Mapping[int, bytes]) -> BlockDevice:
            disk = FileDevice.create(str(directory / f"{next(numbers)}.img"), size)
            stack.push_async_callback(disk.close)
            for offset, data in content.items():
                await disk.write(offset, data)
            node = Node("disk", disk)
            scratch = open_scratch(directory, size, CLUSTER, None, "scratch")
            (snapshot,) = await take_snapshots([SnapshotPlan(node, "s", scratch)])
            stack.push_async_callback(snapshot.drop)
            if write_after:
                for offset, data in content.items():
                    # In stripes, so that the view is made of saved and of unsaved clusters.
                    for start in range(0, len(data), 2 * STRIPE):
                        length = min(STRIPE, len(data) - start)
                        await node.write(offset + start, b"\xbb" * length)
            return snapshot.view

        yield make


class TestViewOfAnUntouchedDisk(ReadSuite):
    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        async with making_views(tmp_path, write_after=False) as make:
            yield make


class TestViewOfAnOverwrittenDisk(ReadSuite):
    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        async with making_views(tmp_path, write_after=True) as make:
            yield make
