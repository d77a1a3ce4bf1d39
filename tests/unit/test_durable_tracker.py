"""The dirty tracker with bitmaps that outlive a loss of power: no write passes before its bit is on disk."""

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.bitmap.store import BitmapStore
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import DeviceError
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from tests.support.stored_bitmaps import BOOT, GRANULE, SIZE, SOURCE

DATA = b"w" * 512


class Syncs:
    """Holds every sync until the test lets it go, or fails it."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []

    async def run(self, function: Callable[[], None]) -> None:
        self.waiting.append(asyncio.get_running_loop().create_future())
        await self.waiting[-1]
        function()

    async def let_go(self) -> None:
        """End the one sync that waits, and let the loop run."""
        await settle_loop()
        (sync,) = (sync for sync in self.waiting if not sync.done())
        sync.set_result(None)
        await settle_loop()


async def settle_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class World:
    """A disk with a tracker and two bitmaps: `durable`, and one in memory."""

    def __init__(self, directory: Path) -> None:
        self.syncs = Syncs()
        self.store = BitmapStore(directory, self.syncs.run, power=True, boot_id=BOOT)
        self.store.open()
        self.disk = MemoryDevice(SIZE)
        self.durable = self.bitmap("b0")
        self.plain = DirtyBitmap("m0", SIZE, GRANULE)
        self.tracker = DirtyTracker(self.disk, [self.plain, self.durable])

    def bitmap(self, name: str) -> StoredBitmap:
        return self.store.create("disk", name, GRANULE, SOURCE)

    async def on_disk(self, offset: int) -> bytes:
        data = bytearray(len(DATA))
        await self.disk.read(offset, data)
        return bytes(data)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_first_write_to_a_granule_waits_for_a_sync_and_the_next_ones_do_not(world: World) -> None:
    first = asyncio.create_task(world.tracker.write(GRANULE, DATA))
    await settle_loop()
    assert await world.on_disk(GRANULE) == bytes(512)
    await world.syncs.let_go()
    assert first.done()
    assert await world.on_disk(GRANULE) == DATA
    assert world.tracker.write_nowait(GRANULE + 512, DATA)
    await world.tracker.write(GRANULE + 4096, DATA)
    await world.tracker.trim(GRANULE, 512)
    assert len(world.syncs.waiting) == 1
    assert (world.plain.count, world.durable.count) == (1, 1)


async def test_nowait_twin_does_nothing_for_a_new_granule(world: World) -> None:
    assert not world.tracker.write_nowait(GRANULE, DATA)
    assert await world.on_disk(GRANULE) == bytes(512)
    assert (world.plain.count, world.durable.count) == (0, 0)


async def test_write_waits_for_the_bit_that_another_write_has_set(world: World) -> None:
    first = asyncio.create_task(world.tracker.write(GRANULE, DATA))
    await settle_loop()
    second = asyncio.create_task(world.tracker.write(GRANULE + 512, DATA))
    await settle_loop()
    assert not world.tracker.write_nowait(GRANULE + 1024, DATA)
    await world.syncs.let_go()
    assert first.done()
    await world.syncs.let_go()
    await second


async def test_zeroes_and_trims_wait_as_well(world: World) -> None:
    await world.disk.write(0, b"o" * SIZE)
    change = asyncio.gather(world.tracker.write_zeroes(0, 512), world.tracker.trim(5 * GRANULE, 512))
    await settle_loop()
    assert await world.on_disk(0) == b"o" * 512
    await world.syncs.let_go()
    await change
    assert world.durable.count == 2


async def test_one_bitmap_with_the_bit_on_disk_is_not_enough(world: World) -> None:
    write = asyncio.create_task(world.tracker.write(GRANULE, DATA))
    await world.syncs.let_go()
    await write
    world.tracker.bitmaps = (world.durable, world.bitmap("b1"))
    assert not world.tracker.write_nowait(GRANULE, DATA)
    again = asyncio.create_task(world.tracker.write(GRANULE, b"n" * 512))
    await settle_loop()
    assert await world.on_disk(GRANULE) == DATA
    await world.syncs.let_go()
    await again


async def test_after_a_backup_each_granule_is_synced_once_more(world: World) -> None:
    for cycle in range(3):
        write = asyncio.create_task(world.tracker.write(GRANULE, DATA))
        await world.syncs.let_go()
        await write
        assert world.tracker.write_nowait(GRANULE, DATA)
        assert len(world.syncs.waiting) == cycle + 1
        world.durable.create_successor()
        world.durable.abdicate()


async def test_failed_sync_fails_the_write_and_nothing_reaches_the_disk(world: World) -> None:
    write = asyncio.create_task(world.tracker.write(GRANULE, DATA))
    await settle_loop()
    world.syncs.waiting[0].set_exception(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(DeviceError) as caught:
        await write
    assert caught.value.errno == errno.EIO
    assert not world.tracker.write_nowait(GRANULE, DATA)
    with pytest.raises(DeviceError):
        await world.tracker.write(GRANULE, DATA)
    assert await world.on_disk(GRANULE) == bytes(512)


async def test_without_durability_power_nothing_waits(world: World, tmp_path: Path) -> None:
    store = BitmapStore(tmp_path / "other", world.syncs.run, boot_id=BOOT)
    store.open()
    world.tracker.bitmaps = (store.create("disk", "b0", GRANULE, SOURCE),)
    assert world.tracker.write_nowait(GRANULE, DATA)
    await world.tracker.write(0, DATA)
    assert world.syncs.waiting == []
