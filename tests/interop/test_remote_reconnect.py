"""A server that goes away under load: requests wait and are done again, or fail; flush never lies."""

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from nbdbackup.block import nbd_session
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.nbd import NbdDevice
from nbdbackup.block.nbd_connection import Limits
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.errors import DeviceError
from tests.support.disks import make_sparse
from tests.support.foreign_servers import ForeignServer, nbdkit, newer_qemu_nbd, qemu_nbd
from tests.support.own_server import serving

MIB = 1 << 20
SIZE = 16 * MIB
BLOCK = 8192
LIMIT_S = 60.0


@asynccontextmanager
async def opened(uri: str, reconnect_delay_s: float = LIMIT_S, **more: object) -> AsyncIterator[NbdDevice]:
    options = RemoteOptions(reconnect_delay_s=reconnect_delay_s, **more)  # type: ignore[arg-type]
    device = await NbdDevice.open(uri, options=options)
    try:
        yield device
    finally:
        await device.close()


async def read(device: NbdDevice, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    async with asyncio.timeout(LIMIT_S):
        await device.read(offset, buffer)
    return bytes(buffer)


class Load:
    """Workers that write, read back and compare, each in its own part of the disk."""

    def __init__(self, device: NbdDevice, workers: int = 8, block_bytes: int = BLOCK) -> None:
        self.device = device
        self.model = bytearray(device.size)
        self.count = 0
        self._workers = workers
        self._block_bytes = block_bytes
        self._is_over = False
        self._progress = asyncio.Event()

    async def wait_progress(self, operations: int) -> None:
        """Until so many more operations are done."""
        wanted = self.count + operations
        async with asyncio.timeout(LIMIT_S):
            while self.count < wanted:
                self._progress.clear()
                await self._progress.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ends with everything checked against the model."""
        async with asyncio.TaskGroup() as tasks:
            for worker in range(self._workers):
                tasks.create_task(self._work(worker))
            yield
            self._is_over = True
        async with asyncio.timeout(LIMIT_S):
            await self.device.flush()
        assert await read(self.device, 0, self.device.size) == self.model

    async def _work(self, worker: int) -> None:
        chance = random.Random(worker)
        part = self.device.size // self._workers
        size = self._block_bytes
        while not self._is_over:
            offset = worker * part + chance.randrange(part - size)
            area = slice(offset, offset + size)
            kind = chance.choice(("write", "write", "zero", "read", "flush"))
            if kind == "write":
                data = chance.randbytes(size)
                await self.device.write(offset, data, fua=chance.random() < 0.1)
                self.model[area] = data
            elif kind == "zero":
                await self.device.write_zeroes(offset, size)
                self.model[area] = bytes(size)
            elif kind == "read":
                assert await read(self.device, offset, size) == self.model[area]
            elif chance.random() < 0.1:
                await self.device.flush()
            self.count += 1
            self._progress.set()


@pytest.mark.parametrize("program", ["nbdkit", "qemu-nbd"])
async def test_load_survives_a_server_that_is_killed_and_started_again(tmp_path: Path, program: str) -> None:
    image = make_sparse(tmp_path / "disk.img", SIZE)
    command = nbdkit("file", image) if program == "nbdkit" else qemu_nbd(image, "-e", "8")
    with ForeignServer(command) as server:
        async with opened(server.uri("" if program == "nbdkit" else "disk")) as device:
            load = Load(device)
            async with load.running():
                for _ in range(3):
                    await load.wait_progress(300)
                    server.kill()
                    await asyncio.to_thread(server.start)
                await load.wait_progress(300)


async def test_load_survives_a_server_that_shuts_down_in_order_and_is_started_again(tmp_path: Path) -> None:
    # Ours answers what it has not begun with ESHUTDOWN.
    memory = MemoryDevice(SIZE)
    path = str(tmp_path / "s")
    first = serving({"disk": memory}, path=path)
    uri = await first.__aenter__()
    async with opened(uri) as device:
        load = Load(device)
        async with load.running():
            await load.wait_progress(300)
            await first.__aexit__(None, None, None)
            async with serving({"disk": memory}, path=path):
                await load.wait_progress(300)
            async with serving({"disk": memory}, path=path):
                await load.wait_progress(300)
            second = serving({"disk": memory}, path=path)
            await second.__aenter__()
            await load.wait_progress(300)
    await second.__aexit__(None, None, None)


async def test_writes_that_a_dead_server_took_with_it_are_written_again(tmp_path: Path) -> None:
    # nbdkit's memory plugin forgets everything when it dies, as a machine forgets its page cache.
    with ForeignServer(nbdkit("memory", str(SIZE))) as server:
        async with opened(server.uri()) as device:
            load = Load(device)
            device_flush = device.flush

            async def no_flush() -> None:
                """So that everything written is still unflushed when the server dies."""

            device.flush = no_flush  # type: ignore[method-assign]
            async with load.running():
                await load.wait_progress(500)
                server.kill()
                await asyncio.to_thread(server.start)
                await load.wait_progress(500)
            await device_flush()


async def test_overlapping_writes_are_written_again_in_their_order() -> None:
    with ForeignServer(nbdkit("memory", str(SIZE))) as server:
        async with opened(server.uri()) as device:
            for number in range(200):
                await device.write(number * 100, bytes([number]) * BLOCK)
            await device.write_zeroes(500, 1000)
            before = await read(device, 0, MIB)
            server.kill()
            await asyncio.to_thread(server.start)
            assert await read(device, 0, MIB) == before


async def test_past_the_limit_requests_fail_and_say_so_until_the_server_is_back(tmp_path: Path) -> None:
    image = make_sparse(tmp_path / "disk.img", SIZE)
    with ForeignServer(nbdkit("file", image)) as server:
        async with opened(server.uri(), reconnect_delay_s=0.3) as device:
            await device.write(0, b"before")
            server.kill()
            async with asyncio.timeout(LIMIT_S):
                with pytest.raises(
                    DeviceError, match=r"lost and could not be made again within 0\.3 s"
                ) as caught:
                    await device.write(100, b"waits")
                assert caught.value.errno == errno.EIO
                assert server.uri() in str(caught.value)
                with pytest.raises(DeviceError):
                    await device.flush()
                await asyncio.to_thread(server.start)
                while True:
                    with suppress(DeviceError):
                        await device.write(200, b"after")
                        break
                    await asyncio.sleep(0.01)
                await device.flush()
            assert await read(device, 0, 6) == b"before"
            assert await read(device, 200, 5) == b"after"


async def test_without_reconnect_delay_flush_says_that_unflushed_writes_may_be_lost() -> None:
    with ForeignServer(nbdkit("memory", str(SIZE))) as server:
        async with opened(server.uri(), reconnect_delay_s=0) as device:
            await device.write(0, b"flushed")
            await device.flush()
            await device.write(0, b"not yet")
            server.kill()
            with pytest.raises(DeviceError, match="connection to the server was lost: "):
                await read(device, 0, 7)
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(LIMIT_S):
                while True:
                    with suppress(DeviceError):
                        await read(device, 0, 7)
                        break
                    await asyncio.sleep(0.01)
                for _ in range(2):
                    with pytest.raises(DeviceError, match="may be lost"):
                        await device.flush()


async def test_another_disk_that_comes_back_is_refused_for_good() -> None:
    size = SIZE
    with ForeignServer(lambda path: nbdkit("memory", str(size))(path)) as server:
        async with opened(server.uri()) as device:
            await device.write(0, b"mine")
            server.kill()
            size = SIZE * 2
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(LIMIT_S):
                for _ in range(2):
                    with pytest.raises(
                        DeviceError, match=rf"another disk .* it has {size} bytes, not {SIZE}"
                    ):
                        await device.read(0, bytearray(4))
                with pytest.raises(DeviceError):
                    await device.flush()


async def test_server_that_comes_back_without_extended_headers_is_refused(tmp_path: Path) -> None:
    # Requests may be under way that only these can express.
    image = make_sparse(tmp_path / "disk.img", SIZE)
    commands = [newer_qemu_nbd(image), qemu_nbd(image)]
    with ForeignServer(lambda path: commands.pop(0)(path)) as server:
        async with opened(server.uri("disk")) as device:
            assert device.export.extended_headers
            server.kill()
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(LIMIT_S):
                with pytest.raises(DeviceError, match=r"another disk .* its kind of replies has changed"):
                    await device.read(0, bytearray(4))


async def test_journal_flushes_by_itself_and_stays_within_its_bound() -> None:
    memory = MemoryDevice(SIZE)
    flushes = 0

    async def flush() -> None:
        nonlocal flushes
        flushes += 1

    memory.flush = flush  # type: ignore[method-assign]
    async with serving({"disk": memory}) as uri, opened(uri, journal_bytes_max=MIB) as device:
        journal = device._session._journal
        most = 0

        async def write(part: int) -> None:
            nonlocal most
            for number in range(100):
                await device.write(part * 2 * MIB + number * BLOCK, b"j" * BLOCK)
                most = max(most, journal.bytes_kept)

        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            for part in range(8):
                tasks.create_task(write(part))
        assert flushes >= 8 * 100 * BLOCK // MIB
        assert MIB // 2 <= most <= MIB
        await device.flush()
        assert journal.bytes_kept == 0


async def test_failed_flush_is_remembered() -> None:
    memory = MemoryDevice(SIZE)
    fails = True

    async def flush() -> None:
        if fails:
            raise OSError(errno.EIO, "the disk is gone")

    memory.flush = flush  # type: ignore[method-assign]
    async with serving({"disk": memory}) as uri, opened(uri) as device:
        await device.write(0, b"x")
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"may be lost: it failed to flush: the disk is gone"):
                await device.flush()
            fails = False


async def test_server_that_never_answers_is_given_up() -> None:
    gate = asyncio.Event()
    memory = MemoryDevice(SIZE)
    answered = memory.read
    silent = True

    async def hang(offset: int, buffer: bytearray | memoryview) -> None:
        if silent:
            await gate.wait()
        await answered(offset, buffer)

    memory.read = hang  # type: ignore[method-assign]
    memory.read_nowait = lambda offset, buffer: False  # type: ignore[method-assign]
    limits = Limits(reply_timeout_s=0.2)
    async with serving({"disk": memory}) as uri, opened(uri, limits=limits) as device:
        with pytest.raises(DeviceError, match=r"READ failed 4 times: the server has not answered for 0\.2 s"):
            await read(device, 0, 10)
        silent = False
        gate.set()
        assert await read(device, 0, 10) == bytes(10)


async def test_cancelled_request_to_a_silent_server_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_session, "CANCEL_PATIENCE_S", 0.1)
    gate = asyncio.Event()
    arrived = asyncio.Event()
    memory = MemoryDevice(SIZE)

    async def hang(offset: int, buffer: bytearray | memoryview) -> None:
        arrived.set()
        await gate.wait()

    memory.read = hang  # type: ignore[method-assign]
    memory.read_nowait = lambda offset, buffer: False  # type: ignore[method-assign]
    async with serving({"disk": memory}) as uri, opened(uri) as device:
        async with asyncio.timeout(LIMIT_S):
            task = asyncio.create_task(read(device, 0, 10))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.set()


async def test_cancelled_request_without_a_server_ends_at_once() -> None:
    with ForeignServer(nbdkit("memory", str(SIZE))) as server:
        async with opened(server.uri()) as device:
            server.kill()
            tasks = [asyncio.create_task(read(device, 0, 10)), asyncio.create_task(device.write(0, b"x"))]
            await asyncio.wait(tasks, timeout=0.2)
            async with asyncio.timeout(5):
                for task in tasks:
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
