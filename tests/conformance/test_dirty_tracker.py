"""A node with dirty bitmaps keeps the device contract."""

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.device import BlockDevice
from nbdbackup.block.file import FileDevice
from nbdbackup.block.node import Node, drained
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from tests.conformance.device_suite import DeviceSuite, MakeDevice


class TestNodeWithBitmaps(DeviceSuite):
    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        numbers = itertools.count()
        async with AsyncExitStack() as stack:

            async def make(size: int, content: Mapping[int, bytes]) -> BlockDevice:
                disk = FileDevice.create(str(tmp_path / f"{next(numbers)}.img"), size)
                stack.push_async_callback(disk.close)
                node = Node("disk", disk)
                bitmaps = [DirtyBitmap("fine", size, 512), DirtyBitmap("off", size, 65536, enabled=False)]
                async with drained(node):
                    node.push(DirtyTracker(node.child, bitmaps))
                for offset, data in content.items():
                    await node.write(offset, data)
                return node

            yield make
