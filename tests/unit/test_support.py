"""The devices that other tests rely on: gated and faulty."""

import asyncio
import errno

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.extents import Extent
from tests.support.faults import FaultyDevice
from tests.support.gated import GatedDevice, settle


async def read(device: MemoryDevice | GatedDevice | FaultyDevice, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await device.read(offset, buffer)
    return bytes(buffer)


async def test_gated_write_lands_only_when_released() -> None:
    memory = MemoryDevice(4096)
    gated = GatedDevice(memory)
    assert not gated.write_nowait(0, b"new")
    async with asyncio.TaskGroup() as tasks:
        write = tasks.create_task(gated.write(0, b"new"))
        op = await gated.wait_pending("write", 0)
        assert bytes(memory.data[:3]) == bytes(3)
        gated.perform(op)
        await settle()
        assert bytes(memory.data[:3]) == b"new"
        assert not write.done()
        gated.release(op)
    assert not gated.pending


async def test_gated_operations_complete_in_the_order_of_release() -> None:
    gated = GatedDevice(MemoryDevice(4096))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(gated.write(0, b"first"))
        tasks.create_task(gated.write(0, b"other"))
        await settle()
        first, other = gated.pending
        gated.release(other)
        await settle()
        gated.release(first)
    gated.open_gate()
    assert await read(gated, 0, 5) == b"first"


async def test_gated_failure_has_no_effect() -> None:
    gated = GatedDevice(MemoryDevice(4096), kinds={"write"})
    write = asyncio.create_task(gated.write(0, b"new"))
    gated.fail(await gated.wait_pending("write"), errno.ENOSPC)
    with pytest.raises(OSError, match="No space left") as caught:
        await write
    assert caught.value.errno == errno.ENOSPC
    assert await read(gated, 0, 3) == bytes(3)


async def test_cancelled_gated_write_ends_when_released() -> None:
    memory = MemoryDevice(4096)
    gated = GatedDevice(memory)
    write = asyncio.create_task(gated.write(0, b"new"))
    op = await gated.wait_pending("write")
    write.cancel()
    await settle()
    assert not write.done()
    gated.release(op)
    with pytest.raises(asyncio.CancelledError):
        await write
    assert bytes(memory.data[:3]) == b"new"


async def test_fault_hits_its_range_as_often_as_asked() -> None:
    faulty = FaultyDevice(MemoryDevice(4096))
    faulty.inject("write", errno.ENOSPC, Extent(1024, 512), count=1)
    assert faulty.write_nowait(0, b"x")
    assert not faulty.write_nowait(1500, b"x")
    with pytest.raises(OSError, match="No space left"):
        await faulty.write(1500, b"x")
    await faulty.write(1500, b"x")
    assert [operation.area.offset for operation in faulty.operations] == [0, 1500, 1500]


async def test_torn_write_changes_the_first_half() -> None:
    faulty = FaultyDevice(MemoryDevice(4096))
    faulty.inject("write", errno.EIO, torn=True)
    with pytest.raises(OSError, match="Input/output"):
        await faulty.write(0, b"new!")
    assert await read(faulty, 0, 4) == b"ne\0\0"
