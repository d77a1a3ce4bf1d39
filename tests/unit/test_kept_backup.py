"""KeptBackup without a daemon: what it gives back and when, losing its target, and being left."""

import errno
from collections.abc import AsyncIterator

import pytest

from nbdbackup.block.device import ReadableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import drained
from nbdbackup.errors import UnreachableError
from nbdbackup.fleece.snapshots import make_snapshot_now
from nbdbackup.job import keeping
from nbdbackup.job.error_policy import ErrorPolicies, IoStatus, OnError
from nbdbackup.job.kept_backup import KeptBackup
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.states import JobStatus
from nbdbackup.job.target import RemoteTarget
from tests.support.backups import end_of, with_options
from tests.support.fleecing import CLUSTER, SIZE, Disk, noise, open_all_gates
from tests.support.jobs import EventLog, job_registry


@pytest.fixture(autouse=True)
async def _two_clusters_are_flushed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(keeping, "UNFLUSHED_BYTES_MAX", 2 * CLUSTER)
    yield
    await open_all_gates()


class VolatileDevice(FilterDevice):
    """A server that keeps in memory what was not flushed, and is gone after `writes_left` writes."""

    def __init__(self, child: MemoryDevice) -> None:
        super().__init__(child)
        self.unflushed: list[tuple[int, bytes]] = []
        self.writes_left = 1 << 30
        self.flushes = 0

    def _arrive(self) -> None:
        if not self.writes_left:
            raise UnreachableError(errno.EIO, "the server is gone")
        self.writes_left -= 1

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self._arrive()
        self.unflushed.append((offset, bytes(data)))

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        await self.write(offset, bytes(length))

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return False

    async def flush(self) -> None:
        if not self.unflushed:
            return
        self._arrive()
        self.flushes += 1
        for offset, data in self.unflushed:
            await self.child.write(offset, data)
        self.unflushed.clear()


class VolatileTarget(RemoteTarget):
    """Such a server, which has forgotten what was not flushed when it is connected to again."""

    def __init__(self, size: int = SIZE) -> None:
        self.memory = MemoryDevice(size)
        self.volatile = VolatileDevice(self.memory)
        self.reconnects = 0
        self.patience = 1 << 30
        """After so many operations more it goes away again."""
        super().__init__("nbd://there/", size, None, self.volatile)

    async def reconnect(self) -> None:
        self.volatile.unflushed.clear()
        self.volatile.writes_left = self.patience
        self.reconnects += 1
        self.device = self.volatile

    @property
    def content(self) -> bytes:
        """What it has for good."""
        return bytes(self.memory.data)


class NotingKeeper:
    """Keeps nothing, and notes what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def withdraw(self) -> None:
        self.told.append("withdraw")

    def note_broken(self, cause: OSError) -> None:
        self.told.append("broken")

    async def remove(self) -> None:
        self.told.append("remove")

    async def leave(self) -> None:
        self.told.append("leave")


async def start_push(
    registry: JobRegistry, disk: Disk, target: VolatileTarget, **options: object
) -> tuple[KeptBackup, NotingKeeper]:
    """A fleecing backup of `disk` to `target`, just started."""
    keeper = NotingKeeper()
    job = KeptBackup("j", disk.node, target, with_options(**options), keeper, None)
    registry.add(job)
    async with drained(disk.node):
        plan, _ = disk.plan("j")
        snapshot = make_snapshot_now(plan)
        snapshot.insert()
        job.hold_fleecing(snapshot)
    registry.start(job)
    return job, keeper


async def stopped(job: KeptBackup, log: EventLog) -> None:
    """Wait until the job is paused."""
    await log.wait_until(lambda: job.status is JobStatus.PAUSED)


@pytest.mark.parametrize("writes_left", range(9))
async def test_whatever_a_target_that_went_away_had_not_flushed_is_copied_again(writes_left: int) -> None:
    disk, target = Disk(), VolatileTarget()
    expected = disk.content
    async with job_registry() as (registry, log):
        target.volatile.writes_left = writes_left
        job, keeper = await start_push(registry, disk, target)
        await stopped(job, log)
        assert job.io_status is IoStatus.FAILED
        assert "the server is gone" in job.paused_because
        await disk.node.write(0, noise(SIZE, seed=2))
        job.resume()
        assert job.paused_because == ""
        assert await end_of(job) is None
    assert target.content == expected
    assert target.reconnects == 1
    assert job.current_progress == job.total_progress == SIZE
    assert keeper.told == ["withdraw", "remove"]


async def test_a_target_that_goes_away_again_and_again_gets_everything_in_the_end() -> None:
    disk, target = Disk(), VolatileTarget()
    expected = disk.content
    async with job_registry() as (registry, log):
        target.patience = target.volatile.writes_left = 4
        job, _ = await start_push(registry, disk, target, workers=3)
        while not job.is_over:
            await log.wait_until(lambda: job.status in (JobStatus.PAUSED, JobStatus.CONCLUDED))
            if job.status is JobStatus.PAUSED:
                job.resume()
    assert job.error is None
    assert target.reconnects >= 2
    assert target.content == expected


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE, OnError.ENOSPC])
async def test_a_target_out_of_reach_stops_the_job_whatever_its_policy(policy: OnError) -> None:
    disk, target = Disk(), VolatileTarget()
    async with job_registry() as (registry, log):
        target.volatile.writes_left = 3
        job, _ = await start_push(registry, disk, target, policies=ErrorPolicies(on_target_error=policy))
        await stopped(job, log)
        (told,) = [event.data for event in log.events if event.name == "BLOCK_JOB_ERROR"]
        assert told == {"device": "j", "operation": "write", "action": "stop"}
        job.cancel()
        await end_of(job)


async def test_what_was_given_back_is_flushed() -> None:
    disk, target = Disk(), VolatileTarget()
    expected = disk.content
    async with job_registry() as (registry, log):
        target.volatile.writes_left = 7
        job, _ = await start_push(registry, disk, target)
        await stopped(job, log)
        snapshot = job._snapshot
        assert snapshot is not None
        kept = snapshot.block_copy.access
        assert 0 < len(kept) < -(-SIZE // CLUSTER)
        for cluster in range(0, SIZE, CLUSTER):
            if not kept.any(cluster, 1):
                assert target.content[cluster : cluster + CLUSTER] == expected[cluster : cluster + CLUSTER]
        job.cancel()
        await end_of(job)


async def test_a_job_that_is_left_stops_tells_nobody_and_keeps_the_point_in_time_until_put_by() -> None:
    disk, target = Disk(), VolatileTarget()
    async with job_registry() as (registry, log):
        target.volatile.writes_left = 5
        job, keeper = await start_push(registry, disk, target)
        await stopped(job, log)
        told = len(log.events)
        await registry.end_all()
        assert job.is_left
        assert job.is_over
        assert not job.is_cancellable
        assert len(log.events) == told
        await disk.node.write(SIZE - CLUSTER, bytes(CLUSTER))
        snapshot = job._snapshot
        assert snapshot is not None
        assert snapshot.block_copy.done.any(SIZE - CLUSTER, CLUSTER)
        assert keeper.told == []
        await job.put_by()
        assert keeper.told == ["leave"]
        assert not list(disk.node.filters)


async def test_a_job_that_failed_or_is_finished_cannot_be_left() -> None:
    disk, target = Disk(), VolatileTarget()
    async with job_registry() as (registry, _):
        job, keeper = await start_push(registry, disk, target)
        assert await end_of(job) is None
        assert not job.can_be_left
        assert keeper.told == ["withdraw", "remove"]
