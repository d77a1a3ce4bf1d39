"""The copy-before-write filter: what client writes save, and who loses when saving fails."""

import asyncio
import errno
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import DeviceError, SnapshotError
from nbdbackup.extents import Extent
from nbdbackup.fleece import copy_before_write
from nbdbackup.fleece.block_copy import BlockCopy
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite, OnCbwError
from tests.support.faults import FaultyDevice
from tests.support.fleecing import CLUSTER, SIZE, Disk, end, open_all_gates, start
from tests.support.gated import settle

Change = Callable[[Node], Awaitable[None]]


@pytest.fixture(autouse=True)
async def _gates_open_at_the_end() -> AsyncIterator[None]:
    yield
    await open_all_gates()


async def _write(node: Node) -> None:
    await node.write(CLUSTER + 10, b"x" * CLUSTER)


async def _write_fua(node: Node) -> None:
    await node.write(CLUSTER + 10, b"x" * CLUSTER, True)


async def _write_zeroes(node: Node) -> None:
    await node.write_zeroes(CLUSTER + 10, CLUSTER)


async def _trim(node: Node) -> None:
    await node.trim(CLUSTER + 10, CLUSTER)


async def _write_quickly(node: Node) -> None:
    assert node.write_nowait(CLUSTER + 10, b"x" * CLUSTER)


CHANGES = [_write, _write_fua, _write_zeroes, _trim, _write_quickly]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
async def test_every_change_saves_the_clusters_that_it_touches_and_no_others(change: Change) -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    await change(disk.node)
    assert disk.content != before
    assert disk.content[:CLUSTER] == before[:CLUSTER]
    assert taken.parts.scratch.bytes_used == 2 * CLUSTER
    assert await taken.read() == before


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
async def test_a_cluster_is_saved_before_its_first_change_only(change: Change) -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    await change(disk.node)
    taken.parts.faults.operations.clear()
    await change(disk.node)
    await disk.node.write(CLUSTER, b"y" * CLUSTER)
    assert taken.parts.faults.operations == []
    assert await taken.read() == before


async def test_reads_and_flushes_save_nothing() -> None:
    disk = Disk()
    taken = await disk.take()
    buffer = bytearray(SIZE)
    await disk.node.read(0, buffer)
    await disk.node.flush()
    await disk.node.cache(0, SIZE)
    await disk.node.block_status(0, SIZE)
    assert bytes(buffer) == disk.content
    assert taken.parts.faults.operations == []


async def test_the_short_last_cluster_is_saved_too() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    await disk.node.write(SIZE - 1, b"x")
    assert disk.content[-1:] == b"x"
    assert await taken.read(SIZE - 77, 77) == before[-77:]


async def test_an_empty_write_saves_nothing_and_is_no_error() -> None:
    disk = Disk()
    taken = await disk.take()
    await disk.node.write(CLUSTER, b"")
    assert disk.node.write_nowait(CLUSTER, b"")
    await disk.node.write_zeroes(CLUSTER, 0)
    await disk.node.trim(CLUSTER, 0)
    assert taken.parts.faults.operations == []


@pytest.mark.parametrize("change", CHANGES[:4], ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize(("side", "kind"), [("source", "read"), ("scratch", "write")])
async def test_break_guest_write_refuses_the_write_and_changes_nothing(
    change: Change, side: str, kind: str
) -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    faults = disk.faults if side == "source" else taken.parts.faults
    faults.inject(kind, errno.ENOSPC)
    with pytest.raises(DeviceError, match=r"^snapshot disk@s1 could not save the old contents: ") as caught:
        await change(disk.node)
    assert caught.value.errno == errno.ENOSPC
    assert disk.content == before
    faults.clear()
    assert taken.snapshot.broken is None
    assert await taken.read() == before
    await change(disk.node)
    assert await taken.read() == before
    taken.assert_nothing_in_flight()


@pytest.mark.parametrize("change", CHANGES[:4], ids=lambda change: change.__name__.strip("_"))
async def test_break_snapshot_lets_the_write_through_and_keeps_the_cause(
    change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take(on_cbw_error=OnCbwError.BREAK_SNAPSHOT)
    taken.parts.faults.inject("write", errno.EDQUOT)
    await change(disk.node)
    assert disk.content != before
    assert taken.snapshot.broken is not None
    assert taken.snapshot.broken.errno == errno.EDQUOT
    with pytest.raises(SnapshotError, match=r"snapshot disk@s1 is broken: writing the target .*quota"):
        await taken.read(9 * CLUSTER, 1)
    broken = [record for record in caplog.records if "disk@s1 is broken" in record.getMessage()]
    assert [record.levelno for record in broken] == [logging.ERROR]


async def test_a_snapshot_breaks_once_and_saves_nothing_from_then_on() -> None:
    disk = Disk()
    taken = await disk.take()
    causes: list[OSError] = []
    taken.snapshot.filter.on_broken = causes.append
    taken.parts.faults.inject("write", errno.ENOSPC, count=1)
    await disk.node.write(0, b"x")
    taken.parts.faults.operations.clear()
    await disk.node.write(5 * CLUSTER, b"x")
    assert disk.node.write_nowait(6 * CLUSTER, b"x")
    taken.snapshot.filter.break_snapshot(OSError(errno.EIO, "again"))
    assert taken.parts.faults.operations == []
    assert [cause.errno for cause in causes] == [errno.ENOSPC]


async def test_a_break_does_not_touch_the_other_snapshots_of_the_node() -> None:
    disk = Disk()
    before = disk.content
    old = await disk.take("old")
    new = await disk.take("new")
    new.parts.faults.inject("write", errno.EIO)
    await disk.node.write(0, b"x" * SIZE)
    assert new.snapshot.broken is not None
    assert old.snapshot.broken is None
    assert await old.read() == before


@pytest.mark.parametrize("timeout_s", [0.001, 0.01])
@pytest.mark.parametrize("policy", list(OnCbwError))
async def test_a_copy_that_takes_too_long_is_a_failed_copy(policy: OnCbwError, timeout_s: float) -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take(on_cbw_error=policy, cbw_timeout_s=timeout_s)
    taken.parts.gate.kinds.add("write")
    writing = start(disk.node.write(0, b"x"))
    if policy is OnCbwError.BREAK_GUEST_WRITE:
        with pytest.raises(DeviceError, match=r"no copy within 0\.\d+ s \(cbw-timeout\)") as caught:
            await end(writing)
        assert caught.value.errno == errno.ETIMEDOUT
        assert disk.content == before
        assert len(taken.snapshot.block_copy.in_flight) == 1
        taken.parts.gate.open_gate()
        # The late copy counts when it has come through.
        await taken.snapshot.filter.wait_copies_ended()
        await disk.node.write(0, b"x")
        assert await taken.read() == before
    else:
        await end(writing)
        assert disk.content == b"x" + before[1:]
        with pytest.raises(SnapshotError, match="cbw-timeout"):
            await taken.read()
        taken.parts.gate.open_gate()
        await taken.snapshot.filter.wait_copies_ended()
    taken.assert_nothing_in_flight()


@pytest.mark.parametrize("timeout_s", [5, 4.3, 86_400, 10**9])
async def test_long_timeouts_are_what_they_say(timeout_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect k: above four seconds it overflowed, and struck long before."""
    disk = Disk()
    before = disk.content
    taken = await disk.take(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE, cbw_timeout_s=timeout_s)
    taken.parts.gate.kinds.add("write")
    writing = start(disk.node.write(0, b"x"))
    await taken.parts.gate.wait_pending("write")
    loop = asyncio.get_running_loop()
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + timeout_s - 0.5)
    await settle()
    assert not writing.done()
    monkeypatch.setattr(loop, "time", lambda: real() + timeout_s)
    with pytest.raises(DeviceError, match="cbw-timeout"):
        await end(writing)
    monkeypatch.undo()
    taken.parts.gate.open_gate()
    await taken.snapshot.filter.wait_copies_ended()
    assert await taken.read() == before


async def test_a_dropped_snapshot_waits_for_copies_that_came_too_late() -> None:
    disk = Disk()
    taken = await disk.take(cbw_timeout_s=0.001)
    taken.parts.gate.kinds.add("write")
    await end(start(disk.node.write(0, b"x")))
    dropping = start(taken.snapshot.drop())
    await settle()
    assert not dropping.done()
    taken.parts.gate.open_gate()
    await end(dropping)
    assert not taken.snapshot.filter._late_copies
    taken.assert_nothing_in_flight()


@pytest.mark.parametrize("timeout_s", [0, 3600])
async def test_a_write_cancelled_while_it_copies_leaves_everything_whole(timeout_s: float) -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take(cbw_timeout_s=timeout_s)
    taken.parts.gate.kinds.add("write")
    writing = start(disk.node.write(0, b"x"))
    op = await taken.parts.gate.wait_pending("write")
    writing.cancel()
    await settle()
    taken.parts.gate.release(op)
    await asyncio.wait({writing}, timeout=10)
    assert writing.cancelled()
    assert disk.content == before
    await taken.snapshot.filter.wait_copies_ended()
    # Without a timeout the copy was the write's own and does not count; with one it is done.
    assert taken.snapshot.block_copy.dirty.any(0, 1) == (not timeout_s)
    assert await taken.read() == before
    taken.parts.gate.open_gate()
    await disk.node.write(0, b"y")
    assert await taken.read() == before
    taken.assert_nothing_in_flight()


async def test_the_failed_copy_of_a_cancelled_write_is_not_reported_as_lost() -> None:
    disk = Disk()
    taken = await disk.take(cbw_timeout_s=3600)
    complaints: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    taken.parts.gate.kinds.add("write")
    writing = start(disk.node.write(0, b"x"))
    op = await taken.parts.gate.wait_pending("write")
    writing.cancel()
    await settle()
    taken.parts.gate.fail(op, errno.EIO)
    await taken.snapshot.filter.wait_copies_ended()
    # The copy's task is complained of when it is collected; these two hold on to it.
    del op, writing
    gc.collect()
    await settle()
    assert complaints == []
    assert taken.snapshot.block_copy.dirty.any(0, 1)
    taken.assert_nothing_in_flight()


async def test_a_write_cancelled_while_it_waits_for_a_frozen_read_lands_nowhere() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    disk.source.kinds.add("read")
    reading = start(taken.read(0, CLUSTER))
    frozen_read = await disk.source.wait_pending("read")
    disk.source.kinds.clear()
    writing = start(disk.node.write(0, b"x"))
    await settle()
    writing.cancel()
    disk.source.release(frozen_read)
    assert await end(reading) == before[:CLUSTER]
    await asyncio.wait({writing}, timeout=10)
    assert writing.cancelled()
    assert disk.content == before
    taken.assert_nothing_in_flight()


async def test_a_client_that_repeats_its_write_does_not_pile_up_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copy_before_write, "LATE_COPIES_MAX", 3)
    disk = Disk()
    before = disk.content
    taken = await disk.take(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE, cbw_timeout_s=0.001)
    taken.parts.gate.kinds.add("write")
    for _ in range(8):
        with pytest.raises(DeviceError, match="cbw-timeout"):
            await end(start(disk.node.write(0, b"x")))
    await settle()
    assert len(taken.snapshot.filter._late_copies) == 3
    taken.parts.gate.open_gate()
    await taken.snapshot.filter.wait_copies_ended()
    assert not taken.snapshot.block_copy.dirty.any(0, 1)
    await disk.node.write(0, b"x")
    assert await taken.read() == before
    taken.assert_nothing_in_flight()


BLOCK = 4096
"""The unit in which a MemoryDevice knows zeroes."""


@pytest.mark.parametrize("timeout_s", [0, 3600])
async def test_a_large_change_does_not_read_what_is_known_to_be_zero(
    timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_before_write, "ASK_ZEROES_BYTES_MIN", BLOCK)
    disk = Disk(size=8 * BLOCK)
    disk.memory.data[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
    disk.memory.data[4 * BLOCK : 6 * BLOCK] = bytes(2 * BLOCK)
    before = disk.content
    taken = await disk.take(cbw_timeout_s=timeout_s)
    await disk.node.trim(100, 5 * BLOCK)
    read = [operation.area for operation in disk.faults.operations if operation.kind == "read"]
    assert read == [Extent(0, BLOCK), Extent(3 * BLOCK, BLOCK)]
    assert await taken.read(0, 8 * BLOCK) == before


async def test_asking_what_is_zero_may_fail_without_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_before_write, "ASK_ZEROES_BYTES_MIN", BLOCK)
    disk = Disk(size=8 * BLOCK)
    before = disk.content
    taken = await disk.take()
    disk.faults.inject("block_status", errno.EIO)
    await disk.node.write_zeroes(0, 8 * BLOCK)
    assert disk.content == bytes(8 * BLOCK)
    assert await taken.read(0, 8 * BLOCK) == before


async def test_known_zeroes_overwrite_what_an_old_target_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_before_write, "ASK_ZEROES_BYTES_MIN", BLOCK)
    monkeypatch.setattr(copy_before_write, "ZEROES_BYTES_MAX", BLOCK)
    source, memory = MemoryDevice(8 * BLOCK), MemoryDevice(8 * BLOCK)
    source.data[:BLOCK] = b"x" * BLOCK
    before = bytes(source.data)
    memory.data[:] = b"\xee" * 8 * BLOCK
    target = FaultyDevice(memory)
    block_copy = BlockCopy(source, target, CLUSTER)
    cbw_filter = CopyBeforeWrite(source, block_copy, title="backup")
    await cbw_filter.write(0, b"y" * 8 * BLOCK)
    assert memory.data == before
    zeroed = [operation.area.length for operation in target.operations if operation.kind == "write_zeroes"]
    assert zeroed == [BLOCK] * 7
