"""What one request of 64 bits does for a remote device, and how it is cut where the server has 32."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.nbd import FAST_ZERO_BYTES_MAX, RANGE_BYTES_MAX, NbdDevice
from nbdbackup.block.nbd_connection import Connection, Operation
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.errors import DeviceError
from nbdbackup.extents import Allocation, StatusExtent
from nbdbackup.nbd.constants import Command
from tests.support.disks import MIB, make_sparse
from tests.support.foreign_servers import ForeignServer, newer_qemu_nbd, own_server
from tests.support.own_server import serving

GIB = 1 << 30
SIZE = 10 * GIB
LIMIT_S = 60.0

Sent = list[tuple[Command, int, int]]
"""Command, offset and length of each request."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What goes to servers."""
    requests: Sent = []
    start = Connection.start

    def noting(self: Connection, operation: Operation) -> None:
        requests.append((operation.command, operation.offset, operation.length))
        start(self, operation)

    monkeypatch.setattr(Connection, "start", noting)
    return requests


@asynccontextmanager
async def opened(uri: str, *, extended: bool = True) -> AsyncIterator[NbdDevice]:
    async with asyncio.timeout(LIMIT_S):
        options = RemoteOptions(reconnect_delay_s=0, connections_max=1, extended_headers=extended)
        device = await NbdDevice.open(uri, options=options)
        assert device.export.extended_headers is extended
        try:
            yield device
        finally:
            await device.close()


def sparse(tmp_path: Path) -> Path:
    """10 GiB: a MiB of data in the 9th, the rest a hole."""
    path = make_sparse(tmp_path / "sparse.img", SIZE)
    with path.open("r+b") as file:
        file.seek(9 * GIB)
        file.write(b"x" * MIB)
    return path


@pytest.mark.parametrize("server", ["nbdbackup", "qemu-nbd-10"])
async def test_51_73_more_than_4_gib_is_one_request_where_headers_are_extended(
    tmp_path: Path, server: str, sent: Sent
) -> None:
    image = sparse(tmp_path)
    command = own_server(image) if server == "nbdbackup" else newer_qemu_nbd(image, "--discard=unmap")
    with ForeignServer(command) as remote:
        async with opened(remote.uri("disk")) as device:
            hole = Allocation.HOLE | Allocation.ZERO
            assert await device.block_status(0, SIZE) == [
                StatusExtent(9 * GIB, hole),
                StatusExtent(MIB, Allocation.DATA),
                StatusExtent(GIB - MIB, hole),
            ]
            await device.write_zeroes(0, 8 * GIB, fast=True)
            await device.trim(GIB, 9 * GIB)
            whole = list(sent)
            await device.cache(0, 5 * GIB)
    assert whole == [
        (Command.BLOCK_STATUS, 0, SIZE),
        (Command.WRITE_ZEROES, 0, 8 * GIB),
        (Command.TRIM, GIB, 9 * GIB),
    ]
    assert sent[3] == (Command.CACHE, 0, 5 * GIB)
    # QEMU refuses that, and gets what it takes of a READ; ours does it.
    refused = [] if server == "nbdbackup" else [32 * MIB] * (5 * GIB // (32 * MIB))
    assert [length for _, _, length in sent[4:]] == refused
    assert image.stat().st_blocks == 0


async def test_more_than_4_gib_is_cut_where_headers_are_not_extended(tmp_path: Path, sent: Sent) -> None:
    image = sparse(tmp_path)
    with ForeignServer(own_server(image)) as remote:
        async with opened(remote.uri("disk"), extended=False) as device:
            position = 0
            while position < SIZE:
                extents = await device.block_status(position, SIZE - position)
                position += sum(extent.length for extent in extents)
            await device.write_zeroes(0, 5 * GIB)
            await device.trim(5 * GIB, 5 * GIB)
    assert max(length for _, _, length in sent) == RANGE_BYTES_MAX
    for command in (Command.WRITE_ZEROES, Command.TRIM):
        assert sum(length for kind, _, length in sent if kind == command) == 5 * GIB
    assert image.stat().st_blocks == 0


class SlowToZero(MemoryDevice):
    """6 GiB that cannot be zeroed fast; notes the requests that get through."""

    def __init__(self) -> None:
        super().__init__(4096)
        self.size = 6 * GIB
        self.zeroed: list[tuple[int, int]] = []

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        if fast:
            raise DeviceError(errno.ENOTSUP, "not fast")
        self.zeroed.append((offset, length))


async def test_long_range_that_is_not_zeroed_fast_is_cut_lest_the_server_seem_dead(sent: Sent) -> None:
    slow = SlowToZero()
    devices: dict[str, BlockDevice] = {"disk": slow}
    async with serving(devices) as uri, opened(uri) as device:
        with pytest.raises(DeviceError, match="cannot zero this range fast") as caught:
            await device.write_zeroes(0, 6 * GIB, fast=True)
        assert caught.value.errno == errno.ENOTSUP
        assert slow.zeroed == []
        await device.write_zeroes(0, 6 * GIB)
        pieces = [(offset, FAST_ZERO_BYTES_MAX) for offset in range(0, 6 * GIB, FAST_ZERO_BYTES_MAX)]
        assert slow.zeroed == pieces
    whole = (Command.WRITE_ZEROES, 0, 6 * GIB)
    assert sent == [whole, whole, *((Command.WRITE_ZEROES, *piece) for piece in pieces)]
