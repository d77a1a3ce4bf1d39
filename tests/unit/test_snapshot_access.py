"""The view of a point in time: its bytes or an error, never newer bytes."""

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest

from nbdbackup.errors import DeviceError, SnapshotError
from nbdbackup.extents import Allocation, Extent, StatusExtent
from tests.support.fleecing import CLUSTER, SIZE, Disk, end, open_all_gates, start
from tests.support.gated import settle


@pytest.fixture(autouse=True)
async def _gates_open_at_the_end() -> AsyncIterator[None]:
    yield
    await open_all_gates()


async def test_a_read_puts_together_saved_and_unsaved_pieces() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    for number in (0, 3, 4, 10):
        await disk.node.write(number * CLUSTER + 5, b"x" * 20)
    assert await taken.read() == before
    assert await taken.read(CLUSTER - 7, 3 * CLUSTER) == before[CLUSTER - 7 : 4 * CLUSTER - 7]
    assert await taken.read(SIZE - 1, 1) == before[-1:]
    assert await taken.read(5, 0) == b""


async def test_the_quick_read_puts_pieces_together_and_leaves_what_has_to_wait() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    for number in (0, 3, 4):
        await disk.node.write(number * CLUSTER, b"x")
    buffer = bytearray(4 * CLUSTER)
    for offset in (0, 1, CLUSTER, 3 * CLUSTER, 5 * CLUSTER):
        assert taken.view.read_nowait(offset, buffer)
        assert bytes(buffer) == before[offset : offset + len(buffer)]
    assert taken.view.read_nowait(0, bytearray(0))
    disk.source.kinds.add("read")
    assert not taken.view.read_nowait(0, buffer)
    assert taken.view.read_nowait(3 * CLUSTER, memoryview(buffer)[: 2 * CLUSTER])


@pytest.mark.parametrize("sparse", [False, True])
async def test_a_read_under_way_when_the_snapshot_breaks_fails_with_the_cause(sparse: bool) -> None:
    """Defect j: QEMU 10 returns the newer bytes as success."""
    disk = Disk()
    taken = await disk.take()
    disk.source.kinds.add("read")
    read = taken.view.read_sparse if sparse else taken.view.read
    reading: asyncio.Task[object] = start(read(0, bytearray(CLUSTER)))
    frozen_read = await disk.source.wait_pending("read")
    taken.parts.faults.inject("write", errno.ENOSPC)
    disk.source.kinds.clear()
    await end(start(disk.node.write(0, b"newer")))
    assert disk.content.startswith(b"newer")
    disk.source.release(frozen_read)
    with pytest.raises(SnapshotError, match=r"disk@s1 is broken: writing the target failed.*No space left"):
        await end(reading)


async def test_block_status_under_way_when_the_snapshot_breaks_fails() -> None:
    disk = Disk()
    taken = await disk.take()
    disk.source.kinds.add("block_status")
    asking = start(taken.view.block_status(0, SIZE))
    op = await disk.source.wait_pending("block_status")
    taken.snapshot.filter.break_snapshot(OSError(errno.EIO, "cause"))
    disk.source.release(op)
    with pytest.raises(SnapshotError, match="broken: cause"):
        await end(asking)


async def test_what_the_top_layer_holds_is_not_told_of_a_snapshot_that_broke_meanwhile() -> None:
    """A backup with sync=top would leave out what a client trimmed after the break, and succeed."""
    disk = Disk()
    taken = await disk.take()
    disk.source.kinds.add("is_allocated")
    asking = start(taken.view.is_allocated(0, SIZE))
    op = await disk.source.wait_pending("is_allocated")
    taken.snapshot.filter.break_snapshot(OSError(errno.EIO, "cause"))
    disk.source.release(op)
    with pytest.raises(SnapshotError, match="broken: cause"):
        await end(asking)
    with pytest.raises(SnapshotError, match="broken: cause"):
        await taken.view.is_allocated(0, SIZE)


async def test_a_client_write_waits_for_block_status_of_the_source() -> None:
    """Defect m: what is called zero must still be zero when it is read."""
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    disk.source.kinds.add("block_status")
    asking = start(taken.view.block_status(0, SIZE))
    op = await disk.source.wait_pending("block_status")
    writing = start(disk.node.write(0, b"new"))
    await settle()
    assert disk.content == before
    disk.source.release(op)
    await end(asking)
    await end(writing)
    assert disk.content.startswith(b"new")


async def test_block_status_is_that_of_the_point_in_time() -> None:
    disk = Disk(size=3 * 4096 + 100)
    disk.memory.data[4096:8192] = bytes(4096)
    taken = await disk.take()
    await disk.node.write(4096, b"x" * 4096)
    await disk.node.write_zeroes(0, 4096)
    found = await taken.view.block_status(0, disk.memory.size)
    assert found == [
        StatusExtent(4096, Allocation.DATA),
        StatusExtent(4096, Allocation.ZERO),
        StatusExtent(4096 + 100, Allocation.DATA),
    ]


async def test_a_view_refuses_to_be_written() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    for change in (taken.view.write(0, b"x"), taken.view.write_zeroes(0, 1)):
        with pytest.raises(DeviceError, match="snapshot disk@s1 is read-only") as caught:
            await change
        assert caught.value.errno == errno.EROFS
    assert not taken.view.write_nowait(0, b"x")
    await taken.view.flush()
    assert taken.view.read_only
    assert disk.content == before


async def test_discarding_gives_scratch_back_and_ends_copy_before_write_there() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    await disk.node.write(0, b"x" * 4 * CLUSTER)
    assert taken.parts.scratch.bytes_used == 4 * CLUSTER
    # Whole clusters of the range only: 1, 2 and 3, and 5 up to the short last one.
    await taken.view.trim(CLUSTER // 2, 4 * CLUSTER)
    await taken.view.trim(5 * CLUSTER, SIZE - 5 * CLUSTER)
    assert taken.parts.scratch.bytes_used == CLUSTER
    assert not any(taken.parts.memory.data[CLUSTER : 4 * CLUSTER])
    taken.parts.faults.operations.clear()
    await disk.node.write(2 * CLUSTER, b"y")
    await disk.node.write(SIZE - 1, b"y")
    assert taken.parts.faults.operations == []
    assert await taken.read(0, CLUSTER) == before[:CLUSTER]
    assert await taken.read(4 * CLUSTER, CLUSTER) == before[4 * CLUSTER : 5 * CLUSTER]


@pytest.mark.parametrize(("offset", "length"), [(CLUSTER, 1), (0, SIZE), (2 * CLUSTER - 1, CLUSTER)])
async def test_reading_what_was_discarded_is_an_error_that_says_so(offset: int, length: int) -> None:
    disk = Disk()
    taken = await disk.take()
    await taken.view.trim(CLUSTER, CLUSTER)
    with pytest.raises(SnapshotError, match=rf"disk@s1 was discarded at offset {offset}, {length} bytes"):
        await taken.read(offset, length)
    with pytest.raises(SnapshotError, match="was discarded"):
        taken.view.read_nowait(offset, bytearray(length))
    with pytest.raises(SnapshotError, match="was discarded"):
        await taken.view.block_status(offset, length)


@pytest.mark.parametrize("saved", [False, True])
async def test_a_read_under_way_when_its_range_is_discarded_fails(saved: bool) -> None:
    disk = Disk()
    taken = await disk.take()
    gate = disk.source
    if saved:
        await disk.node.write(0, b"x")
        gate = taken.parts.gate
    gate.kinds.add("read")
    reading = start(taken.read(0, CLUSTER))
    op = await gate.wait_pending("read")
    await end(start(taken.view.trim(0, CLUSTER)))
    gate.release(op)
    with pytest.raises(SnapshotError, match="was discarded"):
        await end(reading)


async def test_a_copy_in_flight_when_its_cluster_is_discarded_takes_no_scratch() -> None:
    disk = Disk()
    taken = await disk.take()
    taken.parts.gate.kinds.add("write")
    writing = start(disk.node.write(0, b"x" * 2 * CLUSTER))
    op = await taken.parts.gate.wait_pending("write")
    discarding = start(taken.view.trim(0, CLUSTER))
    await settle()
    assert not discarding.done()
    taken.parts.gate.release(op)
    await end(discarding)
    await end(writing)
    assert taken.parts.scratch.bytes_used == CLUSTER
    assert not any(taken.parts.memory.data[:CLUSTER])
    assert any(taken.parts.memory.data[CLUSTER : 2 * CLUSTER])


async def test_a_source_error_is_passed_on_as_it_is() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    disk.faults.inject("read", errno.EIO, Extent(0, 1))
    with pytest.raises(OSError, match="Input/output error") as caught:
        await taken.read()
    assert not isinstance(caught.value, SnapshotError)
    assert await taken.read(CLUSTER, CLUSTER) == before[CLUSTER : 2 * CLUSTER]
    taken.assert_nothing_in_flight()
