"""The server behind ours goes away under load, and ours waits, answers and keeps its memory within bounds."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from nbdbackup.block.nbd import NbdDevice
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.errors import DeviceError
from tests.conftest import ServeFunction
from tests.interop.test_remote_reconnect import Load, read
from tests.support.disks import MIB, make_sparse
from tests.support.foreign_servers import ForeignServer, nbdkit
from tests.support.server import Server

SIZE = 64 * MIB
WORKERS = 32
BLOCK = 256 << 10
OUTAGE_S = 3.0
LIMIT_S = 60.0
MEMORY_BYTES_MAX = 160 * MIB
"""More than before the load: the journal's 64 MiB, the workers' requests on both sides of the server, and as
much again for what the allocator keeps."""


class Memory:
    """The most resident memory of `server` since this was made, looked at all the time."""

    def __init__(self, server: Server) -> None:
        self.before = self.most = server.rss_bytes()
        self._server = server

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        while True:
            self.most = max(self.most, self._server.rss_bytes())
            await asyncio.sleep(0.05)

    def check(self, when: str) -> None:
        sizes = [size >> 20 for size in (self.before, self.most, self._server.rss_bytes())]
        print("resident: {} MiB before the load, at most {}, {}".format(*sizes), when)
        assert self.most - self.before < MEMORY_BYTES_MAX


@asynccontextmanager
async def opened(server: Server) -> AsyncIterator[NbdDevice]:
    """A client of ours that does not reconnect: what waits, waits in the server."""
    device = await NbdDevice.open(server.uri("disk"), options=RemoteOptions(reconnect_delay_s=0))
    try:
        yield device
    finally:
        await device.close()


@pytest.mark.slow
async def test_load_waits_for_a_server_that_is_gone_for_three_seconds_and_nothing_is_lost(
    tmp_path: Path, serve: ServeFunction
) -> None:
    image = make_sparse(tmp_path / "disk.img", SIZE)
    with ForeignServer(nbdkit("file", image)) as remote:
        server = serve({"disk": remote.uri()}, ["--reconnect-delay", "30"], tcp=False)
        memory = Memory(server)
        async with memory.watched(), opened(server) as device:
            load = Load(device, WORKERS, BLOCK)
            async with load.running():
                for _ in range(2):
                    await load.wait_progress(500)
                    remote.kill()
                    done = load.count
                    await asyncio.sleep(OUTAGE_S)
                    # Replies under way when it died may still count; none came from nowhere.
                    assert load.count <= done + WORKERS
                    await asyncio.to_thread(remote.start)
                await load.wait_progress(500)
            memory.check("after two outages")
        server.stop()
        assert image.read_bytes() == load.model
        assert server.log().count("connected again") == 2


@pytest.mark.slow
async def test_past_the_limit_all_requests_fail_clearly_until_the_server_is_back(
    tmp_path: Path, serve: ServeFunction
) -> None:
    image = make_sparse(tmp_path / "disk.img", SIZE)
    with ForeignServer(nbdkit("file", image)) as remote:
        server = serve({"disk": remote.uri()}, ["--reconnect-delay", "1"], tcp=False)
        memory = Memory(server)
        async with asyncio.timeout(LIMIT_S), memory.watched(), opened(server) as device:
            await device.write(0, b"before")
            await device.flush()
            remote.kill()
            started = asyncio.get_running_loop().time()
            work = [device.write(number * MIB, bytes(BLOCK)) for number in range(1, WORKERS)]
            work += [device.read(number * MIB, bytearray(BLOCK)) for number in range(WORKERS)]
            outcomes = await asyncio.gather(*work, return_exceptions=True)
            waited_s = asyncio.get_running_loop().time() - started
            for outcome in outcomes:
                assert isinstance(outcome, DeviceError)
                assert outcome.errno == errno.EIO
                assert "was lost and could not be made again within 1 s" in str(outcome)
            assert 0.9 < waited_s < LIMIT_S / 2
            await asyncio.to_thread(remote.start)
            while True:
                with suppress(DeviceError):
                    await device.write(100, b"after")
                    break
                await asyncio.sleep(0.05)
            await device.flush()
            assert await read(device, 0, 6) == b"before"
            memory.check("after an outage past the limit")
        server.stop()
    assert image.read_bytes()[:105] == b"before" + bytes(94) + b"after"
