"""Memory, files, loop devices, filters and nodes keep the promises of `BlockDevice`."""

import itertools
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.file import FileDevice
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.ignore_discard import IgnoreDiscard
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.block.window import WindowDevice
from nbdbackup.block.write_threshold import WriteThreshold
from nbdbackup.block.write_through import WriteThrough
from tests.conformance.device_suite import MIB, DeviceSuite, MakeDevice
from tests.support.peers import require, require_root

SHARED_MEMORY = Path("/dev/shm")


@asynccontextmanager
async def making(
    open_blank: Callable[[int, AsyncExitStack], BlockDevice],
) -> AsyncIterator[MakeDevice]:
    """A maker of devices that fills what `open_blank(size, stack)` returns, and closes it at the end."""
    async with AsyncExitStack() as stack:

        async def make(size: int, content: Mapping[int, bytes]) -> BlockDevice:
            device = open_blank(size, stack)
            stack.push_async_callback(device.close)
            for offset, data in content.items():
                await device.write(offset, data)
            return device

        yield make


class FileSuite(DeviceSuite):
    """Files below the directory that `directory` gives."""

    @pytest.fixture
    async def make_device(self, directory: Path) -> AsyncIterator[MakeDevice]:
        numbers = itertools.count()
        async with making(lambda size, _: FileDevice.create(f"{directory}/{next(numbers)}", size)) as make:
            yield make


class TestFileOnDisk(FileSuite):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path


class TestFileOnTmpfs(FileSuite):
    @pytest.fixture
    def directory(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as name:
            yield Path(name)


class TestFileThatKeepsItsSpace(DeviceSuite):
    """With `discard=False`."""

    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        numbers = itertools.count()

        def open_blank(size: int, stack: AsyncExitStack) -> FileDevice:
            path = tmp_path / str(next(numbers))
            with path.open("wb") as file:
                file.truncate(size)
            return FileDevice.open(str(path), discard=False)

        async with making(open_blank) as make:
            yield make


@pytest.mark.root
class TestLoopDevice(DeviceSuite):
    sizes: ClassVar[tuple[int, ...]] = (512, 4608, MIB + 512)
    sparse_size: ClassVar[int] = 2**40 + 512

    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        require_root("loop devices")
        losetup = require("losetup")
        numbers = itertools.count()

        def open_blank(size: int, stack: AsyncExitStack) -> FileDevice:
            path = tmp_path / str(next(numbers))
            with path.open("wb") as file:
                file.truncate(size)
            attach = [losetup, "--find", "--show", str(path)]
            name = subprocess.run(
                attach, check=True, capture_output=True, text=True, timeout=60
            ).stdout.strip()
            stack.callback(subprocess.run, [losetup, "--detach", name], check=True, timeout=60)
            return FileDevice.open(name)

        async with making(open_blank) as make:
            yield make


class TestMemory(DeviceSuite):
    sparse_size: ClassVar[int] = 64 * MIB + 513

    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        async with making(lambda size, _: MemoryDevice(size)) as make:
            yield make


class TestFilter(TestMemory):
    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        async with making(lambda size, _: FilterDevice(MemoryDevice(size))) as make:
            yield make


class TestNode(TestMemory):
    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        def open_blank(size: int, stack: AsyncExitStack) -> Node:
            return Node("disk", FilterDevice(MemoryDevice(size)))

        async with making(open_blank) as make:
            yield make


def _assert_edges(around: MemoryDevice) -> None:
    assert bytes(around.data[:600]) == b"<" * 600
    assert bytes(around.data[-400:]) == b">" * 400


class TestWindow(TestMemory):
    """A part of a device; what is around it is not touched."""

    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        def open_blank(size: int, stack: AsyncExitStack) -> WindowDevice:
            around = MemoryDevice(600 + size + 400)
            around.data[:600] = b"<" * 600
            around.data[600 + size :] = b">" * 400
            stack.callback(_assert_edges, around)
            return WindowDevice(around, 600, size)

        async with making(open_blank) as make:
            yield make


class TestWriteThreshold(TestMemory):
    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        def open_blank(size: int, stack: AsyncExitStack) -> WriteThreshold:
            return WriteThreshold(MemoryDevice(size), 1, lambda amount, threshold: None)

        async with making(open_blank) as make:
            yield make


class TestIgnoreDiscard(TestMemory):
    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        async with making(lambda size, _: IgnoreDiscard(MemoryDevice(size))) as make:
            yield make


class TestWriteThrough(TestMemory):
    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        async with making(lambda size, _: WriteThrough(MemoryDevice(size))) as make:
            yield make
