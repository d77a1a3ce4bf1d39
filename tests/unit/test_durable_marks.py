"""Marks of a bitmap that outlives a loss of power: which writes wait, and for what."""

import asyncio
import errno

import pytest

from nbdbackup.bitmap.durable_marks import DurableMarks
from nbdbackup.errors import DeviceError


class Disk:
    """A sync that ends when the test says so."""

    def __init__(self) -> None:
        self.syncs: list[asyncio.Future[None]] = []

    async def sync(self) -> None:
        self.syncs.append(asyncio.get_running_loop().create_future())
        await self.syncs[-1]


async def settle_loop() -> None:
    """Let everything that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_write_waits_until_its_bit_is_on_disk() -> None:
    disk = Disk()
    marks = DurableMarks(disk.sync)
    write = asyncio.ensure_future(marks.settle(3, 4))
    await settle_loop()
    assert (len(disk.syncs), write.done()) == (1, False)
    disk.syncs[0].set_result(None)
    await write
    assert not marks.has_pending(3, 4)


async def test_writes_during_a_sync_share_the_next_one_and_not_the_one_that_had_begun() -> None:
    disk = Disk()
    marks = DurableMarks(disk.sync)
    first = asyncio.ensure_future(marks.settle(0, 1))
    await settle_loop()
    later = [asyncio.ensure_future(marks.settle(n, n + 1)) for n in range(1, 50)]
    await settle_loop()
    disk.syncs[0].set_result(None)
    await settle_loop()
    assert first.done()
    assert not any(write.done() for write in later)
    assert len(disk.syncs) == 2
    disk.syncs[1].set_result(None)
    await asyncio.gather(*later)
    await marks.close()
    assert len(disk.syncs) == 2


async def test_a_granule_is_pending_from_its_mark_to_the_end_of_its_sync() -> None:
    disk = Disk()
    marks = DurableMarks(disk.sync)
    first = asyncio.ensure_future(marks.settle(10, 20))
    await settle_loop()
    second = asyncio.ensure_future(marks.settle(30, 31))
    await settle_loop()
    for granules in ((19, 20), (5, 11), (0, 100), (30, 31)):
        assert marks.has_pending(*granules)
    for granules in ((0, 10), (20, 30), (31, 99)):
        assert not marks.has_pending(*granules)
    disk.syncs[0].set_result(None)
    await first
    assert not marks.has_pending(10, 20)
    assert marks.has_pending(30, 31)
    await settle_loop()
    disk.syncs[1].set_result(None)
    await second


async def test_failed_sync_fails_the_writes_that_wait_and_every_later_one() -> None:
    disk = Disk()
    marks = DurableMarks(disk.sync)
    writes = [asyncio.ensure_future(marks.settle(0, 1))]
    await settle_loop()
    writes.append(asyncio.ensure_future(marks.settle(1, 2)))
    await settle_loop()
    disk.syncs[0].set_exception(OSError(errno.EIO, "Input/output error"))
    for write in (*writes, marks.settle(2, 3)):
        with pytest.raises(DeviceError, match=r"--bitmap-durability power.*: Input/output error") as caught:
            await write
        assert caught.value.errno == errno.EIO
    # The bits are set, and nobody knows whether they are on disk.
    assert marks.has_pending(0, 1)


async def test_cancelled_write_does_not_take_the_sync_from_the_others() -> None:
    disk = Disk()
    marks = DurableMarks(disk.sync)
    gone, other = (asyncio.ensure_future(marks.settle(n, n + 1)) for n in (0, 1))
    await settle_loop()
    gone.cancel()
    await settle_loop()
    assert gone.cancelled()
    assert marks.has_pending(0, 1)
    disk.syncs[0].set_result(None)
    await other


async def test_a_bug_in_a_sync_leaves_nobody_waiting() -> None:
    disk = Disk()
    marks = DurableMarks(disk.sync)
    write = asyncio.ensure_future(marks.settle(0, 1))
    await settle_loop()
    later = asyncio.ensure_future(marks.settle(1, 2))
    task = marks._task
    assert task is not None
    disk.syncs[0].set_exception(ValueError("a bug"))
    for waiting in (write, later):
        with pytest.raises(DeviceError, match="a bug"):
            await waiting
    with pytest.raises(ValueError, match="a bug"):
        await task
