"""A remote export keeps the promises of `BlockDevice`, whoever serves it and whatever it offers."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.file import FileDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.nbd import NbdDevice
from nbdbackup.block.nbd_session import RemoteOptions
from tests.conformance.device_suite import MIB, DeviceSuite, MakeDevice, read
from tests.support.disks import make_sparse
from tests.support.foreign_servers import (
    ForeignServer,
    MakeCommand,
    nbd_server,
    nbdkit,
    newer_qemu_nbd,
    own_server,
    qemu_nbd,
)
from tests.support.own_server import serving


@asynccontextmanager
async def making_remote(
    serve: Callable[[int], MakeCommand], export: str = "", options: RemoteOptions | None = None
) -> AsyncIterator[MakeDevice]:
    """A maker of devices, each with a server of its own: `serve(size)` is its command."""
    async with AsyncExitStack() as stack:

        async def make(size: int, content: Mapping[int, bytes]) -> BlockDevice:
            server = stack.enter_context(ForeignServer(serve(size)))
            device = await NbdDevice.open(server.uri(export), options=options)
            stack.push_async_callback(device.close)
            for offset, data in content.items():
                await device.write(offset, data)
            return device

        yield make


@asynccontextmanager
async def making_own(make_device: Callable[[int], BlockDevice]) -> AsyncIterator[MakeDevice]:
    """A maker of remote devices on our own server, in front of what `make_device(size)` returns."""
    async with AsyncExitStack() as stack:

        async def make(size: int, content: Mapping[int, bytes]) -> BlockDevice:
            behind = make_device(size)
            stack.push_async_callback(behind.close)
            device = await NbdDevice.open(await stack.enter_async_context(serving({"disk": behind})))
            stack.push_async_callback(device.close)
            for offset, data in content.items():
                await device.write(offset, data)
            return device

        yield make


class TestOwnServerOnMemory(DeviceSuite):
    sparse_size: ClassVar[int] = 64 * MIB + 513

    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        async with making_own(MemoryDevice) as make:
            yield make


class TestOwnServerOnFile(DeviceSuite):
    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        numbers = itertools.count()
        async with making_own(lambda size: FileDevice.create(f"{tmp_path}/{next(numbers)}", size)) as make:
            yield make


class TestQemuNbd(DeviceSuite):
    # QEMU rounds a raw image up to whole sectors.
    sizes: ClassVar[tuple[int, ...]] = (512, 4608, MIB + 512)
    sparse_size: ClassVar[int] = 2**40 + 512

    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        numbers = itertools.count()

        def serve(size: int) -> MakeCommand:
            return qemu_nbd(make_sparse(tmp_path / str(next(numbers)), size), "-e", "8", "--discard=unmap")

        async with making_remote(serve, "disk") as make:
            yield make


class TestNewerQemuNbd(DeviceSuite):
    """With extended headers."""

    sizes: ClassVar[tuple[int, ...]] = (512, 4608, MIB + 512)
    sparse_size: ClassVar[int] = 2**40 + 512

    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        numbers = itertools.count()

        def serve(size: int) -> MakeCommand:
            image = make_sparse(tmp_path / str(next(numbers)), size)
            return newer_qemu_nbd(image, "-e", "8", "--discard=unmap")

        async with making_remote(serve, "disk") as make:
            yield make


class TestNbdkitMemory(DeviceSuite):
    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        async with making_remote(lambda size: nbdkit("memory", str(size))) as make:
            yield make


class TestNbdkitFile(DeviceSuite):
    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        numbers = itertools.count()

        def serve(size: int) -> MakeCommand:
            return nbdkit("file", make_sparse(tmp_path / str(next(numbers)), size))

        async with making_remote(serve) as make:
            yield make


class TestOwnServerWithoutExtendedHeaders(DeviceSuite):
    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        numbers = itertools.count()

        def serve(size: int) -> MakeCommand:
            return own_server(make_sparse(tmp_path / str(next(numbers)), size))

        async with making_remote(serve, "disk", RemoteOptions(extended_headers=False)) as make:
            yield make


class TestNbdServer(DeviceSuite):
    @pytest.fixture
    async def make_device(self, tmp_path: Path) -> AsyncIterator[MakeDevice]:
        numbers = itertools.count()

        def serve(size: int) -> MakeCommand:
            return nbd_server(make_sparse(tmp_path / str(next(numbers)), size))

        async with making_remote(serve, "disk") as make:
            yield make


class TestServerWithLargeBlocks(DeviceSuite):
    """It refuses whatever is not aligned to 4 KiB, or longer than 64 KiB."""

    sizes: ClassVar[tuple[int, ...]] = (4096, 8192, MIB + 4096)
    sparse_size: ClassVar[int] = 2**40 + 4096

    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        policy = [
            "--filter=blocksize-policy",
            "blocksize-minimum=4096",
            "blocksize-preferred=4096",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ]
        async with making_remote(lambda size: nbdkit(policy[0], "memory", str(size), *policy[1:])) as make:
            yield make

    async def test_concurrent_writes_into_one_block_do_not_undo_each_other(
        self, make_device: MakeDevice
    ) -> None:
        content = random.Random(1).randbytes(64 << 10)
        device = await make_device(64 << 10, {})
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for offset in range(0, len(content), 512):
                tasks.create_task(device.write(offset, content[offset : offset + 512]))
        assert await read(device, 0, len(content)) == content


class TestServerThatOffersLittle(DeviceSuite):
    """Simple replies, one connection, no block status, no WRITE_ZEROES, no FUA, no CACHE."""

    @pytest.fixture
    async def make_device(self) -> AsyncIterator[MakeDevice]:
        filters = ["nozero", "noextents", "fua", "nocache", "multi-conn"]
        # The fua filter's mode is "none" unless told otherwise.
        parameters = ["zeromode=none", "cachemode=none", "multi-conn-mode=disable"]
        options = ["--no-sr", *(f"--filter={name}" for name in filters)]
        async with making_remote(lambda size: nbdkit(*options, "memory", str(size), *parameters)) as make:
            yield make
