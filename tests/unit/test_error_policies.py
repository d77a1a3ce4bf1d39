"""on-source-error and on-target-error: what a backup does when an end of it fails."""

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import CopyError, Side
from nbdbackup.extents import Extent
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job import error_policy
from nbdbackup.job.error_policy import ErrorAction, ErrorPolicies, IoStatus, OnError, retry_delay_s
from nbdbackup.job.job import Job
from nbdbackup.job.states import JobStatus
from nbdbackup.job.target import ExistingTarget
from tests.support.backups import SHAPES, end_of, start_backup, with_options
from tests.support.faults import FaultyDevice
from tests.support.fleecing import CLUSTER, SIZE, Disk, make_gate, open_all_gates
from tests.support.gated import GatedDevice, settle
from tests.support.jobs import EventLog, job_registry

KINDS = {Side.SOURCE: "read", Side.TARGET: "write"}
PLACE = Extent(5 * CLUSTER, 1)


@pytest.fixture(autouse=True)
async def _gates_are_opened() -> AsyncIterator[None]:
    yield
    await open_all_gates()


class Ends:
    """A disk, and a target in memory; both can be made to fail."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.before = self.disk.content
        self.memory = MemoryDevice(SIZE)
        self.memory.data[:] = b"\xee" * SIZE
        self.faults = FaultyDevice(self.memory)
        self.gate: GatedDevice = make_gate(self.faults)
        self.target = ExistingTarget(self.gate)

    def fail(self, side: Side, code: int, count: int | None = None) -> None:
        """Let cluster 5 fail."""
        faults = self.disk.faults if side is Side.SOURCE else self.faults
        faults.inject(KINDS[side], code, PLACE, count)

    def mend(self) -> None:
        """Let nothing fail any more."""
        self.disk.faults.clear()
        self.faults.clear()

    @property
    def is_copied(self) -> bool:
        """Whether the target is the point in time."""
        return bytes(self.memory.data) == self.before


def policies(side: Side, choice: OnError) -> ErrorPolicies:
    """`choice` for `side` alone."""
    if side is Side.SOURCE:
        return ErrorPolicies(on_source_error=choice)
    return ErrorPolicies(on_target_error=choice)


def errors_in(log: EventLog) -> list[tuple[object, object]]:
    """Operation and action of every BLOCK_JOB_ERROR."""
    return [
        (event.data["operation"], event.data["action"])
        for event in log.events
        if event.name == "BLOCK_JOB_ERROR"
    ]


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(
    ("choice", "code", "action"),
    [
        (OnError.REPORT, errno.EIO, ErrorAction.REPORT),
        (OnError.REPORT, errno.ENOSPC, ErrorAction.REPORT),
        (OnError.IGNORE, errno.EIO, ErrorAction.IGNORE),
        (OnError.IGNORE, errno.ENOSPC, ErrorAction.IGNORE),
        (OnError.STOP, errno.EIO, ErrorAction.STOP),
        (OnError.STOP, errno.ENOSPC, ErrorAction.STOP),
        (OnError.ENOSPC, errno.EIO, ErrorAction.REPORT),
        (OnError.ENOSPC, errno.ENOSPC, ErrorAction.STOP),
        (OnError.AUTO, errno.EIO, ErrorAction.REPORT),
        (OnError.AUTO, errno.ENOSPC, ErrorAction.STOP),
    ],
)
def test_each_policy_is_qemus(side: Side, choice: OnError, code: int, action: ErrorAction) -> None:
    error = CopyError(side, 0, CLUSTER, OSError(code, "no"))
    assert policies(side, choice).action(error) is action
    other = Side.TARGET if side is Side.SOURCE else Side.SOURCE
    assert policies(other, choice).action(error) is ErrorAction.REPORT


@SHAPES
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(
    ("choice", "code", "io_status"),
    [
        (OnError.STOP, errno.EIO, IoStatus.FAILED),
        (OnError.STOP, errno.ENOSPC, IoStatus.NOSPACE),
        (OnError.ENOSPC, errno.ENOSPC, IoStatus.NOSPACE),
    ],
)
async def test_a_stopped_job_waits_and_tries_the_same_cluster_again_when_resumed(
    shape: str, side: Side, choice: OnError, code: int, io_status: IoStatus
) -> None:
    ends = Ends()
    ends.fail(side, code)
    async with job_registry() as (registry, log):
        options = with_options(policies=policies(side, choice))
        job = await start_backup(registry, ends.disk, ends.target, shape, options)
        for stops in (1, 2):
            await log.wait_status(job, JobStatus.PAUSED)
            assert errors_in(log) == [(KINDS[side], "stop")] * stops
            assert (job.io_status, job.is_paused) == (io_status, True)
            if stops == 2:
                ends.mend()
            job.resume()
            assert (job.io_status, job.is_paused) == (IoStatus.OK, False)
        assert await end_of(job) is None
        assert log.summary.count("paused") == 2
    assert ends.is_copied
    assert (job.current_progress, job.total_progress) == (SIZE, SIZE)


async def test_workers_that_fail_at_once_are_one_stop() -> None:
    ends = Ends()
    ends.gate.kinds.add("write")
    ends.faults.inject("write", errno.ENOSPC)
    async with job_registry() as (registry, log):
        options = with_options(workers=3, policies=ErrorPolicies(on_target_error=OnError.STOP))
        job = await start_backup(registry, ends.disk, ends.target, "direct", options)
        writes = [await ends.gate.wait_pending("write", number * 2 * CLUSTER) for number in range(3)]
        for write in writes:
            ends.gate.release(write)
        await log.wait_status(job, JobStatus.PAUSED)
        await settle()
        assert errors_in(log) == [("write", "stop")]
        ends.mend()
        ends.gate.open_gate()
        job.resume()
        assert await end_of(job) is None
        assert log.summary.count("paused") == 1
    assert ends.is_copied


@pytest.mark.parametrize("kind", ["block_status", "write_zeroes"])
async def test_what_fails_while_the_next_steps_are_planned_stops_all_workers(kind: str) -> None:
    ends = Ends()
    ends.disk.memory.data[: 4 * CLUSTER] = bytes(4 * CLUSTER)
    ends.before = ends.disk.content
    failing = ends.disk.faults if kind == "block_status" else ends.faults
    failing.inject(kind, errno.EIO)
    gate = ends.disk.source if kind == "block_status" else ends.gate
    gate.kinds.add(kind)
    async with job_registry() as (registry, log):
        both = ErrorPolicies(OnError.STOP, OnError.STOP)
        job = await start_backup(
            registry, ends.disk, ends.target, "direct", with_options(workers=3, policies=both)
        )
        await gate.wait_pending(kind)
        await settle()
        gate.open_gate()
        await log.wait_status(job, JobStatus.PAUSED)
        ends.mend()
        job.resume()
        assert await end_of(job) is None
    assert ends.is_copied


@SHAPES
@pytest.mark.parametrize("side", list(Side))
async def test_an_ignored_error_is_retried_until_it_is_gone(
    shape: str, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(error_policy, "RETRY_FIRST_S", 0.0)
    ends = Ends()
    ends.fail(side, errno.EIO, count=3)
    async with job_registry() as (registry, log):
        options = with_options(policies=policies(side, OnError.IGNORE))
        job = await start_backup(registry, ends.disk, ends.target, shape, options)
        assert await end_of(job) is None
        assert errors_in(log) == [(KINDS[side], "ignore")] * 3
        assert "paused" not in log.summary
    assert ends.is_copied
    assert job.source_errors_ignored == (3 if side is Side.SOURCE else 0)
    assert job.io_status is IoStatus.OK


async def test_a_dead_end_is_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_policy, "RETRY_FIRST_S", 3600.0)
    monkeypatch.setattr(error_policy, "RETRY_LAST_S", 3600.0)
    ends = Ends()
    ends.fail(Side.TARGET, errno.EIO)
    async with job_registry() as (registry, log):
        options = with_options(policies=ErrorPolicies(on_target_error=OnError.IGNORE))
        job = await start_backup(registry, ends.disk, ends.target, "direct", options)
        await log.wait_until(lambda: bool(errors_in(log)))
        await settle()
        assert len(errors_in(log)) == 1
        assert not job.is_busy
        job.pause()
        await log.wait_status(job, JobStatus.PAUSED)
        job.cancel()
        assert await end_of(job) == "Operation canceled"
        assert len(errors_in(log)) == 1


def test_retries_become_rarer_up_to_a_limit() -> None:
    delays = [retry_delay_s(failures) for failures in (1, 2, 3, 7, 8, 1000000)]
    assert delays == [0.01, 0.02, 0.04, 0.64, 1.0, 1.0]


async def test_a_stopped_job_can_be_cancelled() -> None:
    ends = Ends()
    ends.fail(Side.TARGET, errno.EIO)
    async with job_registry() as (registry, log):
        options = with_options(policies=ErrorPolicies(on_target_error=OnError.STOP))
        job = await start_backup(registry, ends.disk, ends.target, "direct", options)
        await log.wait_status(job, JobStatus.PAUSED)
        job.cancel()
        assert await end_of(job) == "Operation canceled"
        assert log.summary[-4:] == ["running", "aborting", "BLOCK_JOB_CANCELLED", "concluded"]
    assert not list(ends.disk.node.filters)


async def test_client_writes_are_never_subject_to_the_jobs_policies() -> None:
    ends = Ends()
    ends.disk.source.kinds.add("read")
    ends.fail(Side.TARGET, errno.ENOSPC, count=1)
    async with job_registry() as (registry, log):
        stop = ErrorPolicies(OnError.STOP, OnError.STOP)
        options = with_options(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE, policies=stop)
        job = await start_backup(registry, ends.disk, ends.target, "direct", options)
        await ends.disk.source.wait_pending("read", 0)
        writing = asyncio.ensure_future(ends.disk.node.write(5 * CLUSTER, b"new"))
        ends.disk.source.release(await ends.disk.source.wait_pending("read", 5 * CLUSTER))
        with pytest.raises(OSError, match="could not save"):
            async with asyncio.timeout(10):
                await writing
        assert job.status is JobStatus.RUNNING
        ends.disk.source.open_gate()
        assert await end_of(job) is None
        assert errors_in(log) == []
    assert ends.is_copied


@SHAPES
async def test_no_policy_brings_a_broken_point_in_time_back(shape: str) -> None:
    ends = Ends()
    ends.disk.source.kinds.add("read")
    async with job_registry() as (registry, log):
        ignore = ErrorPolicies(OnError.IGNORE, OnError.IGNORE)
        options = with_options(on_cbw_error=OnCbwError.BREAK_SNAPSHOT, policies=ignore)
        job = await start_backup(registry, ends.disk, ends.target, shape, options)
        await ends.disk.source.wait_pending("read", 0)
        (filter_,) = ends.disk.node.filters
        filter_.break_snapshot(OSError(errno.EIO, "lost"))  # type: ignore[attr-defined]
        ends.disk.source.open_gate()
        error = await end_of(job)
        assert error is not None
        assert "lost" in error
        assert ("read", "ignore") not in errors_in(log)


async def test_a_user_who_paused_a_stopped_job_is_told_that_it_is_paused() -> None:
    ends = Ends()
    ends.fail(Side.SOURCE, errno.EIO, count=1)
    async with job_registry() as (registry, log):
        options = with_options(policies=ErrorPolicies(on_source_error=OnError.STOP))
        job: Job = await start_backup(registry, ends.disk, ends.target, "direct", options)
        await log.wait_status(job, JobStatus.PAUSED)
        with pytest.raises(Exception, match=r"^Job is already paused$"):
            job.pause()
        job.resume()
        await job.wait_concluded()
    assert ends.is_copied
