"""Sync modes: what is copied, what is counted, and what becomes of the bitmap."""

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import ConflictError, NbdBackupError, UsageError
from nbdbackup.extents import ContextExtent, Extent
from nbdbackup.job.backup import BackupJob
from nbdbackup.job.states import JobStatus
from nbdbackup.job.sync import BitmapSyncMode, Sync, SyncMode
from nbdbackup.job.target import ExistingTarget
from tests.support.backups import SHAPES, end_of, start_backup, with_options
from tests.support.bitmaps import dirty_in, record
from tests.support.faults import FaultyDevice
from tests.support.fleecing import CLUSTER, SIZE, Disk, make_gate, open_all_gates
from tests.support.gated import settle
from tests.support.jobs import job_registry

LAST = SIZE // CLUSTER
OLD = 0xEE


@pytest.fixture(autouse=True)
async def _gates_are_opened() -> AsyncIterator[None]:
    yield
    await open_all_gates()


class OldTarget(ExistingTarget):
    """A target in memory, full of old bytes, behind faults and a gate."""

    def __init__(self) -> None:
        self.memory = MemoryDevice(SIZE)
        self.memory.data[:] = bytes([OLD]) * SIZE
        self.faults = FaultyDevice(self.memory)
        self.gate = make_gate(self.faults)
        super().__init__(self.gate)

    def assert_holds(self, clusters: set[int], content: bytes) -> None:
        """`clusters` are those of `content`, and the others were left alone."""
        for number in range(LAST + 1):
            piece = slice(number * CLUSTER, min((number + 1) * CLUSTER, SIZE))
            expected = content[piece] if number in clusters else bytes([OLD]) * (piece.stop - piece.start)
            assert self.memory.data[piece] == expected, f"cluster {number}"


async def dirtied(disk: Disk, clusters: set[int], granularity: int = CLUSTER) -> DirtyBitmap:
    """A bitmap of `disk` after clients wrote a byte into each of `clusters`."""
    bitmap = await record(disk, granularity=granularity)
    for number in clusters:
        await disk.node.write(min(number * CLUSTER + 100, SIZE - 1), b"x")
    return bitmap


# incremental and bitmap.


@SHAPES
@pytest.mark.parametrize("mode", [SyncMode.INCREMENTAL, SyncMode.BITMAP])
@pytest.mark.parametrize("clusters", [set[int](), {0}, {LAST}, {1, 2, 5, LAST}, set(range(LAST + 1))])
async def test_what_is_dirty_is_copied_and_nothing_else(
    shape: str, mode: SyncMode, clusters: set[int]
) -> None:
    """Defect i with the short last cluster: progress fell below nothing."""
    disk, target = Disk(), OldTarget()
    bitmap = await dirtied(disk, clusters)
    before = disk.content
    async with job_registry() as (registry, _):
        options = with_options(sync=mode)
        job = await start_backup(registry, disk, target, shape, options, bitmap=bitmap)
        assert job.total_progress == sum(min(CLUSTER, SIZE - number * CLUSTER) for number in clusters)
        assert job.current_progress == 0
        assert await end_of(job) is None
    target.assert_holds(clusters, before)
    assert job.current_progress == job.total_progress
    assert dirty_in(bitmap) == set()


@pytest.mark.parametrize(
    ("granularity", "cluster_bytes", "clusters"),
    [(CLUSTER, 2 * CLUSTER, {2, 3, 8, 9}), (4 * CLUSTER, CLUSTER, {0, 1, 2, 3, 8, 9, 10})],
)
async def test_granules_are_rounded_out_to_clusters(
    granularity: int, cluster_bytes: int, clusters: set[int]
) -> None:
    disk, target = Disk(), OldTarget()
    bitmap = await dirtied(disk, {3, 9}, granularity)
    async with job_registry() as (registry, _):
        options = with_options(sync=SyncMode.INCREMENTAL, cluster_bytes=cluster_bytes)
        job = await start_backup(registry, disk, target, "direct", options, bitmap=bitmap)
        assert await end_of(job) is None
    target.assert_holds(clusters, disk.content)


@SHAPES
async def test_clients_go_on_writing_during_an_incremental_backup(shape: str) -> None:
    disk, target = Disk(), OldTarget()
    bitmap = await dirtied(disk, {1, 6, LAST})
    before = disk.content
    target.gate.kinds.add("write")
    async with job_registry() as (registry, _):
        options = with_options(sync=SyncMode.INCREMENTAL)
        job = await start_backup(registry, disk, target, shape, options, bitmap=bitmap)
        await target.gate.wait_pending("write")
        reads_before = len(disk.faults.operations)
        await asyncio.wait_for(disk.node.write(3 * CLUSTER, b"new" * 50), 10)
        kinds = {operation.kind for operation in disk.faults.operations[reads_before:]}
        assert kinds == {"write"}, "nobody wants what cluster 3 held"
        writing = asyncio.ensure_future(disk.node.write(6 * CLUSTER, b"new" * 50))
        await settle()
        target.gate.open_gate()
        await asyncio.wait_for(writing, 10)
        assert await end_of(job) is None
    target.assert_holds({1, 6, LAST}, before)
    assert dirty_in(bitmap) == {3, 6}


# What becomes of the bitmap.

FIRST, LATER = {1, 2, 7}, {2, 9}


async def _run_to(outcome: str, disk: Disk, target: OldTarget, job: BackupJob) -> None:
    """Let the job, of one worker, copy cluster 1 and 2; clients write LATER; then it ends as told."""
    write = await target.gate.wait_pending("write", CLUSTER)
    for number in LATER:
        await disk.node.write(number * CLUSTER, b"later")
    if outcome == "failed":
        target.faults.inject("write", errno.EIO, Extent(7 * CLUSTER, 1))
    target.gate.release(write)
    write = await target.gate.wait_pending("write", 7 * CLUSTER)
    if outcome == "cancelled":
        job.cancel()
    elif outcome == "unsynced":
        target.faults.inject("flush", errno.EIO)
    target.gate.open_gate()
    error = await end_of(job)
    assert (error is None) == (outcome == "done"), error


@pytest.mark.parametrize(
    ("mode", "outcome", "left"),
    [
        (BitmapSyncMode.ON_SUCCESS, "done", LATER),
        (BitmapSyncMode.ON_SUCCESS, "failed", FIRST | LATER),
        (BitmapSyncMode.ON_SUCCESS, "cancelled", FIRST | LATER),
        (BitmapSyncMode.NEVER, "done", FIRST | LATER),
        (BitmapSyncMode.NEVER, "failed", FIRST | LATER),
        (BitmapSyncMode.NEVER, "cancelled", FIRST | LATER),
        (BitmapSyncMode.ALWAYS, "done", LATER),
        (BitmapSyncMode.ALWAYS, "failed", {7} | LATER),
        (BitmapSyncMode.ALWAYS, "cancelled", {7} | LATER),
        (BitmapSyncMode.ALWAYS, "unsynced", FIRST | LATER),
    ],
)
async def test_the_bitmap_has_what_the_next_backup_needs(
    mode: BitmapSyncMode, outcome: str, left: set[int]
) -> None:
    # In the fleecing shape no client waits for the target.
    disk, target = Disk(), OldTarget()
    bitmap = await dirtied(disk, FIRST)
    target.gate.kinds.add("write")
    async with job_registry() as (registry, _):
        options = with_options(sync=SyncMode.BITMAP)
        job = await start_backup(registry, disk, target, "fleecing", options, bitmap=bitmap, bitmap_mode=mode)
        assert bitmap.busy
        await _run_to(outcome, disk, target, job)
    assert dirty_in(bitmap) == left
    assert not bitmap.busy
    await disk.node.write(4 * CLUSTER, b"x")
    assert dirty_in(bitmap) == left | {4}


@pytest.mark.parametrize(
    ("mode", "outcome", "left"),
    [
        (BitmapSyncMode.ON_SUCCESS, "done", set[int]()),
        (BitmapSyncMode.ALWAYS, "done", set[int]()),
        (BitmapSyncMode.ON_SUCCESS, "failed", FIRST),
        (BitmapSyncMode.ALWAYS, "failed", set(range(4, LAST + 1))),
    ],
)
async def test_a_full_backup_settles_a_bitmap_too(mode: BitmapSyncMode, outcome: str, left: set[int]) -> None:
    disk, target = Disk(), OldTarget()
    bitmap = await dirtied(disk, FIRST)
    if outcome == "failed":
        target.faults.inject("write", errno.EIO, Extent(4 * CLUSTER, 1))
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, "direct", bitmap=bitmap, bitmap_mode=mode)
        assert (await end_of(job) is None) == (outcome == "done")
    assert dirty_in(bitmap) == left


async def test_a_disabled_bitmap_stays_disabled() -> None:
    disk, target = Disk(), OldTarget()
    bitmap = await dirtied(disk, {1})
    bitmap.enabled = False
    async with job_registry() as (registry, log):
        options = with_options(sync=SyncMode.INCREMENTAL, auto_finalize=False)
        job = await start_backup(registry, disk, target, "direct", options, bitmap=bitmap)
        await disk.node.write(3 * CLUSTER, b"x")
        await log.wait_status(job, JobStatus.PENDING)
        job.finalize()
        assert await end_of(job) is None
    assert dirty_in(bitmap) == set()


async def test_no_hole_is_left_where_a_clients_copy_failed() -> None:
    """Defect h: the job passed by a client's copy in flight, which then failed; the bitmap was dropped."""
    disk, target = Disk(), OldTarget()
    bitmap = await dirtied(disk, {0, LAST})
    before = disk.content
    target.gate.kinds.add("write")
    async with job_registry() as (registry, _):
        options = with_options(sync=SyncMode.INCREMENTAL)
        job = await start_backup(registry, disk, target, "direct", options, bitmap=bitmap)
        mine = await target.gate.wait_pending("write", 0)
        writing = asyncio.ensure_future(disk.node.write(LAST * CLUSTER, b"new"))
        theirs = await target.gate.wait_pending("write", LAST * CLUSTER)
        target.gate.release(mine)
        await settle()
        target.gate.kinds.clear()
        target.gate.fail(theirs, errno.EIO)
        with pytest.raises(OSError, match="could not save"):
            await asyncio.wait_for(writing, 10)
        assert await end_of(job) is None
    target.assert_holds({0, LAST}, before)


# What is refused.


@pytest.mark.parametrize("mode", list(SyncMode))
@pytest.mark.parametrize("bitmap", [None, "b0"])
@pytest.mark.parametrize("bitmap_mode", [None, *BitmapSyncMode])
def test_modes_that_do_not_go_together_are_refused_as_by_qemu(
    mode: SyncMode, bitmap: str | None, bitmap_mode: BitmapSyncMode | None
) -> None:
    assert _refusal(mode, bitmap, bitmap_mode) == _qemus_refusal(mode, bitmap, bitmap_mode)


def _refusal(mode: SyncMode, bitmap: str | None, bitmap_mode: BitmapSyncMode | None) -> str | None:
    try:
        sync = Sync(mode, bitmap, bitmap_mode).checked()
        sync.check_bitmap(None if bitmap is None else DirtyBitmap("b0", SIZE, 512))
    except NbdBackupError as error:
        return str(error)
    return None


def _qemus_refusal(mode: SyncMode, bitmap: str | None, bitmap_mode: BitmapSyncMode | None) -> str | None:
    """As qemu-storage-daemon 7.2 answered each of them."""
    if mode.copies_dirty and bitmap is None:
        return f"must provide a valid bitmap name for '{mode.value}' sync mode"
    if mode is SyncMode.INCREMENTAL:
        if bitmap_mode in (None, BitmapSyncMode.ON_SUCCESS):
            return None
        return "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"
    if bitmap is None:
        return None if bitmap_mode is None else "Cannot specify bitmap sync mode without a bitmap"
    if bitmap_mode is None:
        return "Bitmap sync mode must be given when providing a bitmap"
    if mode is SyncMode.NONE:
        return "sync mode 'none' does not produce meaningful bitmap outputs"
    if mode in (SyncMode.FULL, SyncMode.TOP) and bitmap_mode is BitmapSyncMode.NEVER:
        return (
            f"Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{mode.value}'"
        )
    return None


def test_a_bitmap_in_use_or_inconsistent_is_refused() -> None:
    sync = Sync(SyncMode.INCREMENTAL, "b0").checked()
    bitmap = DirtyBitmap("b0", SIZE, 512)
    bitmap.inconsistent = "the server was killed"
    with pytest.raises(ConflictError, match="'b0' is inconsistent and cannot be used"):
        sync.check_bitmap(bitmap)
    bitmap.create_successor()
    with pytest.raises(ConflictError, match="'b0' is currently in use by another operation and cannot be"):
        sync.check_bitmap(bitmap)


def test_the_bitmap_of_a_checkpoint_is_only_read() -> None:
    bitmap = DirtyBitmap("c1", SIZE, 512)
    bitmap.checkpoint = True
    with pytest.raises(ConflictError, match="'c1' belongs to the checkpoint of that name"):
        Sync(SyncMode.INCREMENTAL, "c1").checked().check_bitmap(bitmap)
    Sync(SyncMode.BITMAP, "c1", BitmapSyncMode.NEVER).checked().check_bitmap(bitmap)


# top.


class Layered(FaultyDevice):
    """Its top layer holds some clusters only; what clients write is held from then on."""

    def __init__(self, child: MemoryDevice, held: set[int]) -> None:
        super().__init__(child)
        self.held = set(held)

    async def is_allocated(self, offset: int, length: int) -> list[ContextExtent]:
        self._arrive("is_allocated", offset, length)
        numbers = range(offset // CLUSTER, -(-(offset + length) // CLUSTER))
        return [
            ContextExtent(
                min((number + 1) * CLUSTER, offset + length) - max(number * CLUSTER, offset),
                int(number in self.held),
            )
            for number in numbers
        ]

    async def write(self, offset: int, data: bytes | bytearray | memoryview, fua: bool = False) -> None:
        self.held |= set(range(offset // CLUSTER, -(-(offset + len(data)) // CLUSTER)))
        await super().write(offset, data, fua)

    def write_nowait(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        del offset, data
        return False


def layered_disk(held: set[int]) -> tuple[Disk, Layered]:
    disk = Disk()
    layered = Layered(disk.memory, held)
    disk.faults = layered
    disk.source.child = layered
    return disk, layered


@SHAPES
@pytest.mark.parametrize("held", [set[int](), {0}, {LAST}, {1, 2, 6, LAST}, set(range(LAST + 1))])
async def test_top_copies_what_the_top_layer_holds(shape: str, held: set[int]) -> None:
    disk, _ = layered_disk(held)
    target = OldTarget()
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, shape, with_options(sync=SyncMode.TOP, workers=3))
        assert job.total_progress == SIZE
        assert await end_of(job) is None
    target.assert_holds(held, disk.content)
    copied = sum(min(CLUSTER, SIZE - number * CLUSTER) for number in held)
    assert (job.current_progress, job.total_progress) == (copied, copied)


@SHAPES
async def test_top_saves_nothing_that_the_top_layer_does_not_hold(shape: str) -> None:
    """Defect f: a client's write had clusters of the lower layers copied."""
    disk, layered = layered_disk({1, 6})
    target = OldTarget()
    before = disk.content
    target.gate.kinds.add("write")
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, shape, with_options(sync=SyncMode.TOP))
        await target.gate.wait_pending("write", CLUSTER)
        for number in (3, 6, LAST):
            # As the server does it.
            assert not disk.node.write_nowait(number * CLUSTER, b"new")
            writing = asyncio.ensure_future(disk.node.write(number * CLUSTER, b"new"))
            await settle()
            if number == 6 and shape == "direct":
                target.gate.release(await target.gate.wait_pending("write", 6 * CLUSTER))
            await asyncio.wait_for(writing, 10)
        assert {3, LAST} <= layered.held
        target.gate.open_gate()
        assert await end_of(job) is None
    target.assert_holds({1, 6}, before)
    assert job.current_progress == job.total_progress == 2 * CLUSTER


@SHAPES
async def test_top_blames_the_source_when_it_cannot_say_what_it_holds(shape: str) -> None:
    """Defect g: it was an error of neither end."""
    disk, layered = layered_disk({1, 6})
    layered.inject("is_allocated", errno.EIO)
    async with job_registry() as (registry, log):
        job = await start_backup(registry, disk, OldTarget(), shape, with_options(sync=SyncMode.TOP))
        error = await end_of(job)
        assert error is not None
        assert error.startswith("reading the source failed")
        assert log.find("BLOCK_JOB_ERROR").data["operation"] == "read"


async def test_top_fails_the_clients_write_as_for_any_copy_when_the_source_cannot_say() -> None:
    disk, layered = layered_disk({1, 6})
    layered.inject("is_allocated", errno.EIO, Extent(6 * CLUSTER, CLUSTER))
    async with job_registry() as (registry, _):
        options = with_options(sync=SyncMode.TOP, speed=1)
        job = await start_backup(registry, disk, OldTarget(), "direct", options)
        with pytest.raises(OSError, match="could not save the old contents: reading the source failed"):
            await asyncio.wait_for(disk.node.write(6 * CLUSTER, b"new"), 10)
        job.cancel()
        await end_of(job)


# none.


async def test_none_saves_what_clients_overwrite_until_it_is_cancelled() -> None:
    disk, target = Disk(), OldTarget()
    before = disk.content
    async with job_registry() as (registry, log):
        job = await start_backup(registry, disk, target, "direct", with_options(sync=SyncMode.NONE))
        await disk.node.write(3 * CLUSTER + 9, b"new")
        await disk.node.write(LAST * CLUSTER, b"new")
        await disk.node.write(3 * CLUSTER + 9, b"newer")
        target.assert_holds({3, LAST}, before)
        assert (job.current_progress, job.total_progress) == (CLUSTER + SIZE % CLUSTER, SIZE)
        job.pause()
        await log.wait_status(job, JobStatus.PAUSED)
        await disk.node.write(5 * CLUSTER, b"new")
        target.assert_holds({3, 5, LAST}, before)
        job.resume()
        job.cancel()
        assert await end_of(job) == "Operation canceled"
        await disk.node.write(0, b"new")
    target.assert_holds({3, 5, LAST}, before)
    assert not list(disk.node.filters)


async def test_a_checkpoint_makes_it_now() -> None:
    disk, target = Disk(), OldTarget()
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, "direct", with_options(sync=SyncMode.NONE))
        await disk.node.write(3 * CLUSTER, b"one")
        await job.checkpoint()
        between = disk.content
        await disk.node.write(3 * CLUSTER, b"two")
        await disk.node.write(4 * CLUSTER, b"two")
        target.assert_holds({3, 4}, between)
        assert (job.current_progress, job.total_progress) == (3 * CLUSTER, CLUSTER + SIZE)
        job.cancel()
        await end_of(job)
        with pytest.raises(ConflictError, match="no checkpoint to be had"):
            await job.checkpoint()


async def test_a_checkpoint_is_taken_between_client_writes() -> None:
    disk, target = Disk(), OldTarget()
    disk.source.kinds.add("write")
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, "direct", with_options(sync=SyncMode.NONE))
        writing = asyncio.ensure_future(disk.node.write(3 * CLUSTER, b"one"))
        write = await disk.source.wait_pending("write")
        taking = asyncio.ensure_future(job.checkpoint())
        await settle()
        assert not taking.done(), "the write may land before it or after it, but not across"
        disk.source.release(write)
        await asyncio.wait_for(asyncio.gather(writing, taking), 10)
        between = disk.content
        disk.source.open_gate()
        await disk.node.write(3 * CLUSTER, b"two")
        target.assert_holds({3}, between)
        job.cancel()
        await end_of(job)


@pytest.mark.parametrize("mode", [SyncMode.FULL, SyncMode.TOP])
async def test_other_modes_have_no_checkpoints(mode: SyncMode) -> None:
    disk = Disk()
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, OldTarget(), "direct", with_options(sync=mode, speed=1))
        with pytest.raises(UsageError, match="only supports block checkpoint in sync=none mode"):
            await job.checkpoint()
        job.cancel()
        await end_of(job)


# Outside readers of the target.


async def test_a_held_range_is_neither_copied_nor_written_until_it_is_let_go() -> None:
    disk, target = Disk(), OldTarget()
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, "direct", with_options(sync=SyncMode.NONE))
        await disk.node.write(4 * CLUSTER, b"new")
        async with job.hold(Extent(3 * CLUSTER + 1, CLUSTER)):
            writes = [
                asyncio.ensure_future(disk.node.write(number * CLUSTER, b"newer")) for number in (3, 4, 5)
            ]
            await settle()
            assert [write.done() for write in writes] == [False, False, True]
            assert not disk.node.write_nowait(4 * CLUSTER, b"newest")
            target.assert_holds({4, 5}, Disk().content)
        await asyncio.wait_for(asyncio.gather(*writes), 10)
        target.assert_holds({3, 4, 5}, Disk().content)
        job.cancel()
        await end_of(job)


async def test_a_hold_waits_for_a_copy_in_flight_and_not_for_those_that_come_later() -> None:
    disk, target = Disk(), OldTarget()
    target.gate.kinds.add("write")
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, "direct", with_options(sync=SyncMode.NONE))
        first = asyncio.ensure_future(disk.node.write(3 * CLUSTER, b"new"))
        copy = await target.gate.wait_pending("write")
        held, leave = asyncio.Event(), asyncio.Event()

        async def read_outside() -> None:
            async with job.hold(Extent(3 * CLUSTER, 2 * CLUSTER)):
                held.set()
                await leave.wait()

        reading = asyncio.ensure_future(read_outside())
        waiting = asyncio.ensure_future(job.wait_overlapping_cow(Extent(3 * CLUSTER, 1)))
        second = asyncio.ensure_future(disk.node.write(4 * CLUSTER, b"new"))
        await settle()
        assert not held.is_set()
        assert not waiting.done()
        assert target.gate.find("write", 4 * CLUSTER) is None
        await asyncio.wait_for(job.wait_overlapping_cow(Extent(5 * CLUSTER, 1)), 10)
        target.gate.open_gate()
        assert copy.finished.is_set()
        await asyncio.wait_for(asyncio.gather(held.wait(), waiting), 10)
        assert not second.done()
        leave.set()
        await asyncio.wait_for(asyncio.gather(first, second, reading), 10)
        job.cancel()
        await end_of(job)


async def test_a_worker_of_the_job_respects_a_hold_too() -> None:
    disk, target = Disk(), OldTarget()
    async with job_registry() as (registry, _):
        job = await start_backup(registry, disk, target, "direct", with_options(speed=1))
        async with job.hold(Extent(5 * CLUSTER, CLUSTER)):
            job.set_speed(0)
            await settle()
            assert job.status is JobStatus.RUNNING
            assert target.memory.data[5 * CLUSTER] == OLD
        assert await end_of(job) is None
    target.assert_holds(set(range(LAST + 1)), disk.content)
