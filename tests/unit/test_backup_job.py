"""The backup job in both shapes: what it copies, what it counts, and how it fails."""

import asyncio
import errno
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdbackup.block.file import FileDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node, drained
from nbdbackup.extents import Extent
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.scratch import open_scratch
from nbdbackup.fleece.snapshots import Snapshot, SnapshotPlan, take_snapshots
from nbdbackup.job import backup
from nbdbackup.job.backup import BackupJob, BackupOptions
from nbdbackup.job.states import JobStatus
from nbdbackup.job.target import ExistingTarget, NewFileTarget
from tests.support.backups import (
    OPTIONS,
    SHAPES,
    Clock,
    end_of,
    gated_target,
    start_backup,
    with_options,
)
from tests.support.disks import allocated_bytes, make_sparse
from tests.support.faults import FaultyDevice
from tests.support.fleecing import CLUSTER, SIZE, Disk, noise, open_all_gates
from tests.support.gated import settle
from tests.support.jobs import job_registry

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
async def _gates_are_opened() -> AsyncIterator[None]:
    yield
    await open_all_gates()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "backup.img"


def partial_of(path: Path) -> Path:
    return Path(f"{path}.partial")


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def assert_nothing_left(disk: Disk, path: Path) -> None:
    """The backup failed, and the world is as if it had never been."""
    assert not path.exists()
    assert not partial_of(path).exists()
    assert not list(disk.node.filters)
    assert disk.node.write_nowait(0, b"still writable")


# What is copied.


@SHAPES
@pytest.mark.parametrize("size", [1, 511, CLUSTER, 4097, SIZE])
@pytest.mark.parametrize("workers", [1, 8])
async def test_the_backup_is_the_disk_to_the_byte(shape: str, size: int, workers: int, path: Path) -> None:
    disk = Disk(size=size)
    async with job_registry() as (registry, _):
        options = with_options(workers=workers)
        job = await start_backup(registry, disk, NewFileTarget(str(path), size), shape, options)
        assert await end_of(job) is None
    assert content_of(path) == disk.content
    assert not partial_of(path).exists()
    assert not list(disk.node.filters)
    assert (job.current_progress, job.total_progress) == (size, size)


@SHAPES
async def test_what_clients_write_meanwhile_is_not_in_the_backup(shape: str, path: Path) -> None:
    disk = Disk()
    before = disk.content
    target, gate, _ = gated_target(path, SIZE)
    gate.kinds.add("write")
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, shape)
        await gate.wait_pending("write")
        writes = [
            asyncio.ensure_future(disk.node.write(offset, b"new" * 100)) for offset in range(0, 4500, 700)
        ]
        await settle()
        gate.open_gate()
        async with asyncio.timeout(10):
            await asyncio.gather(*writes)
        assert await end_of(job) is None
    assert content_of(path) == before
    assert disk.content != before
    assert job.current_progress == SIZE


@SHAPES
async def test_zeroes_replace_what_an_existing_target_held(shape: str) -> None:
    size = 16 * 4096 + 77
    disk = Disk(size=size)
    disk.memory.data[4096 : 9 * 4096] = bytes(8 * 4096)
    disk.memory.data[size - 77 :] = bytes(77)
    target = MemoryDevice(size)
    target.data[:] = b"\xff" * size
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, ExistingTarget(target), shape)
        assert await end_of(job) is None
    assert bytes(target.data) == disk.content


async def test_known_zeroes_are_written_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "ZEROES_BYTES_MAX", 4 * CLUSTER)
    size = 16 * 4096 + 77
    disk = Disk(size=size)
    disk.memory.data[:] = bytes(size)
    memory = MemoryDevice(size)
    memory.data[:] = b"\xff" * size
    target = FaultyDevice(memory)
    async with job_registry() as (registry, _):
        assert await end_of(await start_backup(registry, disk, ExistingTarget(target), "direct")) is None
    assert bytes(memory.data) == disk.content
    zeroed = [operation.area.length for operation in target.operations if operation.kind == "write_zeroes"]
    assert max(zeroed) <= 4 * CLUSTER


@SHAPES
async def test_a_huge_sparse_disk_takes_seconds_and_stays_sparse(shape: str, tmp_path: Path) -> None:
    size = (1 << 40) + 513
    source = make_sparse(tmp_path / "disk.img", size)
    places = {0: b"begin", (1 << 39) + 12345: b"middle", size - 3: b"end"}
    with source.open("r+b") as file:
        for offset, data in places.items():
            file.seek(offset)
            file.write(data)
    device = FileDevice.open(str(source))
    node = Node("disk", device)
    target = NewFileTarget(str(tmp_path / "backup.img"), size)
    job = BackupJob("b1", node, target, BackupOptions(auto_dismiss=False))
    started = time.monotonic()
    async with job_registry() as (registry, _):
        registry.add(job)
        if shape == "direct":
            async with drained(node):
                job.hold_direct()
        else:
            job.hold_fleecing(await _snapshot_of(node, tmp_path))
        registry.start(job)
        assert await end_of(job) is None
    assert time.monotonic() - started < 15
    await device.close()
    copied = tmp_path / "backup.img"
    assert copied.stat().st_size == size
    assert allocated_bytes(copied) < MIB
    with copied.open("rb") as file:
        for offset, data in places.items():
            file.seek(offset)
            assert file.read(len(data)) == data


async def _snapshot_of(node: Node, directory: Path) -> Snapshot:
    scratch = open_scratch(directory, node.size, 64 * KIB, None, "scratch")
    (snapshot,) = await take_snapshots([SnapshotPlan(node, "b1", scratch)])
    return snapshot


# What is counted.


@SHAPES
async def test_what_a_client_had_saved_counts_once(shape: str, path: Path) -> None:
    disk = Disk()
    before = disk.content
    disk.source.kinds.add("read")
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, NewFileTarget(str(path), SIZE), shape)
        await disk.source.wait_pending("read", 0)
        writing = asyncio.ensure_future(disk.node.write(5 * CLUSTER, b"new"))
        disk.source.release(await disk.source.wait_pending("read", 5 * CLUSTER))
        async with asyncio.timeout(10):
            await writing
        # Direct, it is in the target now; otherwise in scratch, and not in the target yet.
        assert job.current_progress == (CLUSTER if shape == "direct" else 0)
        disk.source.open_gate()
        assert await end_of(job) is None
    assert job.current_progress == SIZE
    assert content_of(path) == before


async def test_the_rate_limit_lets_one_slice_through_at_a_time(path: Path) -> None:
    disk, clock, speed = Disk(), Clock(), 10 * 2 * CLUSTER
    async with job_registry() as (registry, _):
        options = with_options(speed=speed)
        target = NewFileTarget(str(path), SIZE)
        job = await start_backup(registry, disk, target, "direct", options, clock)

        async def progress_at(now_s: float) -> int:
            clock.now_s = now_s
            job.set_speed(speed)  # wakes who waits
            await settle()
            return job.current_progress // CLUSTER

        assert await progress_at(0.05) == 2
        assert await progress_at(0.101) == 4
        # A client's cluster uses the quota of the job, and is not held up by it.
        await disk.node.write(9 * CLUSTER, b"new")
        assert job.current_progress == 5 * CLUSTER
        assert await progress_at(0.24) == 5
        assert await progress_at(0.26) == 7
        job.set_speed(0)
        assert await end_of(job) is None
    assert content_of(path)[SIZE - CLUSTER :] == disk.content[SIZE - CLUSTER :]


async def test_a_hole_costs_nothing_of_the_rate_limit(path: Path) -> None:
    size = 1024 * 4096
    disk, clock = Disk(size=size), Clock()
    disk.memory.data[: size - 4096] = bytes(size - 4096)
    async with job_registry() as (registry, _):
        options = with_options(speed=10 * 4096, chunk_bytes_max=4096)
        job = await start_backup(registry, disk, NewFileTarget(str(path), size), "direct", options, clock)
        assert await end_of(job) is None, "time stood still, and it was done all the same"
    assert content_of(path) == disk.content


async def test_scratch_is_given_back_while_the_target_is_written(path: Path) -> None:
    disk = Disk()
    before = disk.content
    target, gate, _ = gated_target(path, SIZE)
    gate.kinds.add("write")
    async with job_registry() as (registry, _):
        taken = await disk.take("b1")
        await disk.node.write(0, b"x" * SIZE)
        scratch = taken.parts.scratch
        assert scratch.bytes_used == 11 * CLUSTER
        job = BackupJob("b1", disk.node, target, OPTIONS)
        registry.add(job)
        job.hold_fleecing(taken.snapshot)
        registry.start(job)
        used = []
        for offset in range(0, SIZE, 2 * CLUSTER):
            write = await gate.wait_pending("write", offset)
            used.append(scratch.bytes_used // CLUSTER)
            gate.release(write)
        assert await end_of(job) is None
    assert used == [11, 9, 7, 5, 3, 1]
    assert content_of(path) == before


# How it fails.


@SHAPES
@pytest.mark.parametrize(("side", "kind"), [("source", "read"), ("target", "write")])
async def test_a_failure_names_its_side_and_place(shape: str, side: str, kind: str, path: Path) -> None:
    disk = Disk()
    target, _, faults = gated_target(path, SIZE)
    failing = disk.faults if side == "source" else faults
    failing.inject(kind, errno.EIO, Extent(5 * CLUSTER, 1))
    async with job_registry() as (registry, log):
        job = await start_backup(registry, disk, target, shape)
        error = await end_of(job)
    verb = "reading the source" if side == "source" else "writing the target"
    assert error == f"{verb} failed at offset {4 * CLUSTER}, {2 * CLUSTER} bytes: Input/output error"
    assert log.find("BLOCK_JOB_ERROR").data["operation"] == kind
    assert_nothing_left(disk, path)


async def test_a_source_that_cannot_say_what_it_holds_fails_the_job(path: Path) -> None:
    disk = Disk()
    disk.faults.inject("block_status", errno.EIO)
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, NewFileTarget(str(path), SIZE), "direct")
        error = await end_of(job)
    assert error is not None
    assert error.startswith("reading the source failed at offset 0")
    assert_nothing_left(disk, path)


@SHAPES
async def test_a_target_that_cannot_be_synced_is_no_backup(shape: str, path: Path) -> None:
    disk = Disk()
    target, _, faults = gated_target(path, SIZE)
    faults.inject("flush", errno.ENOSPC)
    async with job_registry() as (registry, _):
        assert await end_of(await start_backup(registry, disk, target, shape)) == "No space left on device"
    assert_nothing_left(disk, path)


@SHAPES
async def test_a_cancel_in_the_middle_leaves_nothing(shape: str, path: Path) -> None:
    disk = Disk()
    target, gate, _ = gated_target(path, SIZE)
    gate.kinds.add("write")
    async with job_registry() as (registry, log):
        job = await start_backup(registry, disk, target, shape)
        gate.release(await gate.wait_pending("write", 0))
        write = await gate.wait_pending("write", 2 * CLUSTER)
        assert partial_of(path).exists()
        job.cancel()
        await settle()
        assert job.status is JobStatus.RUNNING, "the write in flight is waited for"
        gate.release(write)
        assert await end_of(job) == "Operation canceled"
    assert "BLOCK_JOB_CANCELLED" in log.summary
    assert_nothing_left(disk, path)


@SHAPES
async def test_a_cancel_while_the_last_client_write_is_waited_for_leaves_nothing(
    shape: str, path: Path
) -> None:
    disk = Disk()
    disk.source.kinds.add("write")
    async with job_registry() as (registry, log):
        job = await start_backup(registry, disk, NewFileTarget(str(path), SIZE), shape, with_options(speed=1))
        writing = asyncio.ensure_future(disk.node.write(0, b"new"))
        write = await disk.source.wait_pending("write")
        job.set_speed(0)
        # Everything is copied; the filter can go as soon as the client's write has ended.
        await log.wait_status(job, JobStatus.PENDING)
        await settle()
        assert list(disk.node.filters)
        job.cancel()
        await settle()
        disk.source.open_gate()
        assert write.finished.is_set()
        assert await end_of(job) == "Operation canceled"
        async with asyncio.timeout(10):
            await writing
    assert_nothing_left(disk, path)


async def test_a_broken_point_in_time_fails_the_job_and_lets_the_client_go_on(path: Path) -> None:
    disk = Disk()
    disk.source.kinds.add("read")
    target, _, faults = gated_target(path, SIZE)
    faults.inject("write", errno.ENOSPC, Extent(8 * CLUSTER, 1))
    async with job_registry() as (registry, _):
        options = with_options(on_cbw_error=OnCbwError.BREAK_SNAPSHOT)
        job = await start_backup(registry, disk, target, "direct", options)
        first = await disk.source.wait_pending("read", 0)
        writing = asyncio.ensure_future(disk.node.write(8 * CLUSTER, b"new"))
        disk.source.release(await disk.source.wait_pending("read", 8 * CLUSTER))
        async with asyncio.timeout(10):
            await writing
        disk.source.release(first)
        error = await end_of(job)
    assert error is not None
    assert error.startswith("the point in time was lost: writing the target failed")
    assert "No space left on device" in error
    assert disk.content[8 * CLUSTER : 8 * CLUSTER + 3] == b"new"
    assert_nothing_left(disk, path)


async def test_a_point_in_time_that_breaks_before_the_job_is_finalized_fails_it(path: Path) -> None:
    disk = Disk()
    async with job_registry() as (registry, log):
        options = with_options(auto_finalize=False)
        job = await start_backup(registry, disk, NewFileTarget(str(path), SIZE), "direct", options)
        await log.wait_status(job, JobStatus.PENDING)
        (filter_,) = disk.node.filters
        filter_.break_snapshot(OSError(errno.EIO, "lost"))  # type: ignore[attr-defined]
        job.finalize()
        assert await end_of(job) == "the point in time was lost: lost"
    assert_nothing_left(disk, path)


async def test_a_refused_client_write_leaves_its_cluster_to_the_job(path: Path) -> None:
    disk = Disk()
    before = disk.content
    disk.source.kinds.add("read")
    target, _, faults = gated_target(path, SIZE)
    faults.inject("write", errno.ENOSPC, Extent(8 * CLUSTER, 1), count=1)
    async with job_registry() as (registry, _):
        options = with_options(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
        job = await start_backup(registry, disk, target, "direct", options)
        await disk.source.wait_pending("read", 0)
        writing = asyncio.ensure_future(disk.node.write(8 * CLUSTER, b"new"))
        disk.source.release(await disk.source.wait_pending("read", 8 * CLUSTER))
        with pytest.raises(OSError, match="could not save the old contents") as caught:
            async with asyncio.timeout(10):
                await writing
        assert caught.value.errno == errno.ENOSPC
        disk.source.open_gate()
        assert await end_of(job) is None
    assert content_of(path) == before == disk.content
    assert job.current_progress == SIZE


async def test_the_job_copies_what_a_client_failed_to_after_the_job_had_passed(path: Path) -> None:
    disk = Disk()
    before = disk.content
    target, gate, _ = gated_target(path, SIZE)
    gate.kinds.add("write")
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, "direct")
        await gate.wait_pending("write", 0)
        # The client's copy of the last cluster is in flight when the job comes by, and fails later.
        writing = asyncio.ensure_future(disk.node.write(10 * CLUSTER, b"new"))
        last = await gate.wait_pending("write", 10 * CLUSTER)
        for offset in range(0, 10 * CLUSTER, 2 * CLUSTER):
            gate.release(await gate.wait_pending("write", offset))
        await settle()
        gate.kinds.clear()
        gate.fail(last, errno.EIO)
        with pytest.raises(OSError, match="could not save"):
            async with asyncio.timeout(10):
                await writing
        assert await end_of(job) is None
    assert content_of(path) == before


async def test_a_snapshot_that_breaks_fails_the_fleecing_job_with_the_cause(path: Path) -> None:
    disk = Disk()
    async with job_registry() as (registry, _):
        taken = await disk.take("b1", scratch_bytes_max=CLUSTER)
        job = BackupJob("b1", disk.node, NewFileTarget(str(path), SIZE), OPTIONS)
        registry.add(job)
        job.hold_fleecing(taken.snapshot)
        await disk.node.write(0, b"x" * (3 * CLUSTER))
        registry.start(job)
        error = await end_of(job)
    assert error is not None
    assert "reading the source failed" in error
    assert "is full" in error
    assert_nothing_left(disk, path)


@SHAPES
async def test_a_target_that_came_into_being_meanwhile_is_left_as_it_is(shape: str, path: Path) -> None:
    disk = Disk()
    async with job_registry() as (registry, log):
        options = with_options(auto_finalize=False)
        job = await start_backup(registry, disk, NewFileTarget(str(path), SIZE), shape, options)
        await log.wait_status(job, JobStatus.PENDING)
        put(path, b"somebody else's")
        job.finalize()
        error = await end_of(job)
    assert error == f"{path} came into being while its backup was made, and is left as it is"
    assert content_of(path) == b"somebody else's"
    assert not partial_of(path).exists()
    assert not list(disk.node.filters)


@SHAPES
async def test_an_existing_target_stays_where_it_is_when_the_backup_fails(shape: str) -> None:
    disk = Disk()
    disk.faults.inject("read", errno.EIO, Extent(0, 1))
    target = MemoryDevice(SIZE)
    target.data[:] = noise(SIZE, seed=2)
    async with job_registry() as (registry, _):
        assert await end_of(await start_backup(registry, disk, ExistingTarget(target), shape)) is not None
    assert bytes(target.data[: 2 * CLUSTER]) == noise(SIZE, seed=2)[: 2 * CLUSTER]
    assert not list(disk.node.filters)
