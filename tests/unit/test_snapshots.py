"""Taking and dropping points in time of live nodes."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from itertools import permutations
from pathlib import Path

import pytest

from nbdbackup.block.file import FileDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import SnapshotError
from nbdbackup.fleece.scratch import open_scratch
from nbdbackup.fleece.snapshots import SnapshotPlan, take_snapshots
from tests.support.fleecing import CLUSTER, SIZE, Disk, end, noise, open_all_gates, start
from tests.support.gated import settle


@pytest.fixture(autouse=True)
async def _gates_open_at_the_end() -> AsyncIterator[None]:
    yield
    await open_all_gates()


async def test_each_snapshot_of_a_node_keeps_its_own_point_in_time() -> None:
    disk = Disk()
    contents, snapshots = [], []
    for number in range(4):
        contents.append(disk.content)
        snapshots.append(await disk.take(f"s{number}"))
        await disk.node.write(number * CLUSTER + 100, noise(CLUSTER, seed=number + 10))
    for content, taken in zip(contents, snapshots, strict=True):
        assert await taken.read() == content


async def test_a_snapshot_is_named_after_its_node() -> None:
    taken = await Disk("disk").take("s1")
    assert taken.snapshot.export_name == "disk@s1"
    assert str(taken.view) == "disk@s1"
    assert taken.snapshot.broken is None


@pytest.mark.parametrize("order", list(permutations(range(3))))
async def test_snapshots_can_be_dropped_in_any_order_while_reads_and_writes_are_in_flight(
    order: tuple[int, ...],
) -> None:
    disk = Disk()
    contents, snapshots = [], []
    for number in range(3):
        contents.append(disk.content)
        snapshots.append(await disk.take(f"s{number}"))
        await disk.node.write(number * CLUSTER, noise(100, seed=number + 10))
    live = dict(enumerate(snapshots))
    for number in order:
        disk.source.kinds |= {"read", "write"}
        reads = {other: start(taken.read()) for other, taken in live.items()}
        writing = start(disk.node.write(5 * CLUSTER + number, noise(200, seed=number + 50)))
        await settle()
        dropping = start(live.pop(number).snapshot.drop())
        await settle()
        assert not dropping.done()
        disk.source.kinds.clear()
        disk.source.release_all()
        await end(dropping)
        await end(writing)
        with pytest.raises(SnapshotError, match=f"disk@s{number} was dropped"):
            await end(reads.pop(number))
        for other, reading in reads.items():
            assert await end(reading) == contents[other]
        for other, taken in live.items():
            assert await taken.read() == contents[other]
    assert disk.node.child is disk.source
    for taken in snapshots:
        taken.assert_nothing_in_flight()


async def test_a_dropped_snapshot_answers_every_request_with_an_error() -> None:
    disk = Disk()
    taken = await disk.take()
    await disk.node.write(0, b"new")
    await taken.snapshot.drop()
    taken.parts.faults.operations.clear()
    with pytest.raises(SnapshotError, match="was dropped"):
        await taken.read()
    with pytest.raises(SnapshotError, match="was dropped"):
        taken.view.read_nowait(0, bytearray(1))
    with pytest.raises(SnapshotError, match="was dropped"):
        await taken.view.block_status(0, SIZE)
    # Scratch is closed: its descriptor may be somebody else's file by now.
    with pytest.raises(SnapshotError, match="was dropped"):
        await taken.view.trim(0, SIZE)
    assert taken.parts.faults.operations == []


async def test_a_cancelled_drop_can_be_finished() -> None:
    disk = Disk()
    taken = await disk.take()
    disk.source.kinds.add("read")
    reading = start(taken.read(0, CLUSTER))
    await disk.source.wait_pending("read")
    dropping = start(taken.snapshot.drop())
    await settle()
    dropping.cancel()
    await asyncio.wait({dropping}, timeout=10)
    assert dropping.cancelled()
    disk.source.open_gate()
    with pytest.raises(SnapshotError):
        await end(reading)
    await end(start(taken.snapshot.drop()))
    await end(start(taken.snapshot.drop()))
    assert list(disk.node.filters) == []
    await disk.node.write(0, b"new")


async def test_a_write_that_waits_for_a_frozen_read_does_not_hold_up_a_drop_for_ever() -> None:
    disk = Disk()
    taken = await disk.take()
    disk.source.kinds.add("read")
    reading = start(taken.read(0, CLUSTER))
    await disk.source.wait_pending("read")
    writing = start(disk.node.write(0, b"new"))
    await settle()
    dropping = start(taken.snapshot.drop())
    await settle()
    disk.source.open_gate()
    await end(dropping)
    await end(writing)
    assert disk.content[:3] == b"new"
    with pytest.raises(SnapshotError):
        await end(reading)


async def test_writes_that_arrive_while_a_snapshot_is_being_taken_come_after_it() -> None:
    disk = Disk()
    disk.source.kinds.add("write")
    early = start(disk.node.write(0, b"early"))
    op = await disk.source.wait_pending("write")
    taking = start(disk.take())
    await settle()
    late = start(disk.node.write(CLUSTER, b"late"))
    assert not disk.node.write_nowait(2 * CLUSTER, b"late")
    await settle()
    assert len(disk.source.pending) == 1
    before = disk.content
    disk.source.release(op)
    taken = await end(taking)
    disk.source.open_gate()
    await end(early)
    await end(late)
    assert await taken.read() == b"early" + before[5:]
    assert disk.content[CLUSTER : CLUSTER + 4] == b"late"


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _io_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("io-")]


async def test_nothing_is_left_of_a_dropped_snapshot_on_files(tmp_path: Path) -> None:
    size = 64 * 1024 * 9 + 333
    path = tmp_path / "disk.img"
    before = noise(size)
    path.write_bytes(before)
    node = Node("disk", FileDevice.open(str(path)))
    descriptors = _descriptors()
    for number in range(3):
        scratch = open_scratch(tmp_path, size, 64 * 1024, None, "scratch of disk@s1")
        (snapshot,) = await take_snapshots([SnapshotPlan(node, "s1", scratch)])
        for offset in (0, 70_000, size - 100):
            await node.write(offset, noise(100, seed=number + 7))
        buffer = bytearray(size)
        await snapshot.view.read(0, buffer)
        assert bytes(buffer) == before
        await snapshot.drop()
        before = path.read_bytes()
    assert _descriptors() == descriptors
    assert os.listdir(tmp_path) == ["disk.img"]
    await node.close()
    for thread in _io_threads():
        thread.join(timeout=10)
    assert _io_threads() == []


async def test_scratch_of_a_broken_snapshot_is_kept_while_a_read_of_it_is_under_way() -> None:
    disk = Disk()
    taken = await disk.take()
    await disk.node.write(0, b"x" * 2 * CLUSTER)
    taken.parts.gate.kinds.add("read")
    reading = start(taken.read(0, CLUSTER))
    op = await taken.parts.gate.wait_pending("read")
    taken.snapshot.filter.break_snapshot(OSError(errno.EIO, "cause"))
    freeing = start(taken.snapshot.free_scratch())
    await settle()
    assert taken.parts.scratch.bytes_used == 2 * CLUSTER
    taken.parts.gate.release(op)
    with pytest.raises(SnapshotError, match="broken: cause"):
        await end(reading)
    await end(freeing)
    assert taken.parts.scratch.bytes_used == 0
    # The file is closed, and its descriptor may be somebody else's by now.
    await taken.snapshot.view.trim(0, CLUSTER)
    with pytest.raises(SnapshotError, match="broken: cause"):
        await taken.read(0, CLUSTER)
    await end(start(taken.snapshot.drop()))


async def test_scratch_of_a_broken_snapshot_is_kept_while_a_copy_into_it_is_under_way() -> None:
    disk = Disk()
    taken = await disk.take()
    taken.parts.gate.kinds.add("write")
    writing = start(disk.node.write(0, b"x" * 2 * CLUSTER))
    op = await taken.parts.gate.wait_pending("write")
    taken.snapshot.filter.break_snapshot(OSError(errno.EIO, "cause"))
    freeing = start(taken.snapshot.free_scratch())
    await settle()
    assert not freeing.done()
    taken.parts.gate.release(op)
    await end(freeing)
    taken.parts.gate.kinds.clear()
    await end(writing)
    assert disk.content.startswith(b"x" * 2 * CLUSTER)
    assert taken.parts.scratch.bytes_used == 0
    taken.assert_nothing_in_flight()
