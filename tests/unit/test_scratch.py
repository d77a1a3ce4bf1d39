"""Scratch: bounded, nameless, and empty where nothing was saved."""

import errno
import os
from pathlib import Path

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError
from nbdbackup.extents import Extent
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.scratch import Scratch, open_scratch
from tests.support.faults import FaultyDevice
from tests.support.fleecing import CLUSTER, SIZE, Disk, end, start


def make_scratch(bytes_max: int | None, size: int = SIZE) -> tuple[Scratch, FaultyDevice]:
    faults = FaultyDevice(MemoryDevice(size))
    return Scratch(faults, CLUSTER, bytes_max, "scratch of disk@s1"), faults


async def test_a_write_beyond_the_limit_says_what_is_full() -> None:
    scratch, _ = make_scratch(2 * CLUSTER)
    await scratch.write(0, bytes(2 * CLUSTER))
    with pytest.raises(DeviceError, match=r"scratch of disk@s1 is full: 1024 of 1024 bytes used") as caught:
        await scratch.write(4 * CLUSTER, bytes(CLUSTER))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(DeviceError, match="is full"):
        scratch.write_nowait(4 * CLUSTER, bytes(CLUSTER))
    assert scratch.bytes_used == 2 * CLUSTER


async def test_writing_a_cluster_again_takes_no_more_room() -> None:
    scratch, _ = make_scratch(2 * CLUSTER)
    for _ in range(3):
        await scratch.write(0, bytes(2 * CLUSTER))
    assert scratch.write_nowait(CLUSTER, bytes(CLUSTER))


async def test_a_short_last_cluster_counts_as_whole_and_can_be_written_again() -> None:
    scratch, _ = make_scratch(CLUSTER)
    tail = SIZE // CLUSTER * CLUSTER
    for _ in range(2):
        await scratch.write(tail, bytes(SIZE - tail))
    assert scratch.bytes_used == CLUSTER
    tight, _ = make_scratch(CLUSTER + (SIZE - tail))
    await tight.write(0, bytes(CLUSTER))
    with pytest.raises(DeviceError, match="is full"):
        await tight.write(tail, bytes(SIZE - tail))
    await tight.write(0, bytes(CLUSTER))


async def test_trim_gives_room_back() -> None:
    scratch, _ = make_scratch(CLUSTER)
    await scratch.write(0, b"x" * CLUSTER)
    await scratch.trim(0, 4 * CLUSTER)
    assert scratch.bytes_used == 0
    await scratch.write(CLUSTER, b"x" * CLUSTER)


async def test_writes_in_flight_at_the_same_time_must_fit_together() -> None:
    disk = Disk()
    taken = await disk.take(scratch_bytes_max=CLUSTER, on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    taken.parts.gate.kinds.add("write")
    first = start(disk.node.write(0, b"x"))
    op = await taken.parts.gate.wait_pending("write")
    with pytest.raises(DeviceError, match="is full"):
        await disk.node.write(5 * CLUSTER, b"x")
    taken.parts.gate.release(op)
    await end(first)


def test_scratch_never_offloads_past_its_count(tmp_path: Path) -> None:
    scratch = open_scratch(tmp_path, SIZE, CLUSTER, None, "scratch")
    assert scratch.child.offload_fd() is not None
    assert scratch.offload_fd() is None


async def test_scratch_in_a_directory_has_no_name_and_takes_no_space(tmp_path: Path) -> None:
    scratch = open_scratch(tmp_path, 1 << 30, CLUSTER, None, "scratch")
    assert os.listdir(tmp_path) == []
    fd = scratch.child.offload_fd()
    assert fd is not None
    status = os.fstat(fd)
    assert (status.st_size, status.st_blocks, status.st_nlink) == (1 << 30, 0, 0)
    await scratch.close()


async def test_scratch_as_a_new_file_leaves_no_name_either(tmp_path: Path) -> None:
    scratch = open_scratch(tmp_path / "scratch.img", SIZE, CLUSTER, None, "scratch")
    assert os.listdir(tmp_path) == []
    await scratch.close()


def test_scratch_does_not_touch_a_file_that_exists(tmp_path: Path) -> None:
    place = tmp_path / "precious"
    place.write_bytes(b"data")
    with pytest.raises(ConflictError, match=r"precious exists already"):
        open_scratch(place, SIZE, CLUSTER, None, "scratch")
    assert place.read_bytes() == b"data"


def test_scratch_in_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no directory for scratch"):
        open_scratch(tmp_path / "missing" / "scratch", SIZE, CLUSTER, None, "scratch")


def test_scratch_larger_than_the_file_system_takes_is_refused_without_a_leak(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(DeviceError, match="cannot make scratch of"):
        open_scratch(tmp_path, 1 << 62, CLUSTER, None, "scratch")
    assert set(os.listdir("/proc/self/fd")) == before


async def test_break_snapshot_lets_the_client_go_on_when_scratch_is_full() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take(scratch_bytes_max=2 * CLUSTER, on_cbw_error=OnCbwError.BREAK_SNAPSHOT)
    await disk.node.write(0, b"x" * 2 * CLUSTER)
    assert await taken.read() == before
    await disk.node.write(3 * CLUSTER, b"third")
    assert disk.content[3 * CLUSTER :].startswith(b"third")
    with pytest.raises(OSError, match=r"snapshot disk@s1 is broken: .*is full: 1024 of 1024 bytes used"):
        await taken.read()


@pytest.mark.parametrize("quick", [False, True])
async def test_break_guest_write_keeps_the_snapshot_when_scratch_is_full(quick: bool) -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take(scratch_bytes_max=CLUSTER, on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    await disk.node.write(0, b"first")

    async def write() -> None:
        if not (quick and disk.node.write_nowait(3 * CLUSTER, b"third")):
            await disk.node.write(3 * CLUSTER, b"third")

    with pytest.raises(DeviceError, match=r"disk@s1 could not save the old contents: .*is full") as caught:
        await write()
    assert caught.value.errno == errno.ENOSPC
    assert disk.content == b"first" + before[5:]
    assert await taken.read() == before


async def test_zero_clusters_take_no_scratch() -> None:
    disk = Disk()
    disk.memory.data[CLUSTER : 4 * CLUSTER] = bytes(3 * CLUSTER)
    before = disk.content
    taken = await disk.take(scratch_bytes_max=2 * CLUSTER, on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    await disk.node.write(0, b"x" * 5 * CLUSTER)
    assert taken.parts.scratch.bytes_used == 2 * CLUSTER
    assert await taken.read() == before
    written = [
        operation.area for operation in taken.parts.faults.operations if operation.kind.startswith("write")
    ]
    assert written == [Extent(0, CLUSTER), Extent(4 * CLUSTER, CLUSTER)]


async def test_scratch_tells_once_that_it_is_filling_and_again_after_room_was_made() -> None:
    scratch = Scratch(MemoryDevice(16 * CLUSTER), CLUSTER, 10 * CLUSTER, "scratch of disk@s1")
    told: list[tuple[int, int, int]] = []
    scratch.watch(lambda used, threshold, used_max: told.append((used, threshold, used_max)))
    await scratch.write(0, bytes(7 * CLUSTER))
    assert told == []
    assert scratch.write_nowait(7 * CLUSTER, bytes(CLUSTER))
    await scratch.write(8 * CLUSTER, bytes(CLUSTER))
    assert told == [(8 * CLUSTER, 8 * CLUSTER, 10 * CLUSTER)]
    await scratch.trim(0, 4 * CLUSTER)
    await scratch.write(0, bytes(3 * CLUSTER))
    assert len(told) == 2
