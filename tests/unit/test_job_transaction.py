"""Jobs that succeed together or not at all; the order of events is qemu-storage-daemon's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from nbdbackup.errors import ConflictError, NbdBackupError
from nbdbackup.job.job import CANCELLED_TEXT, Job
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.states import JobStatus
from nbdbackup.job.transaction import JobTransaction
from tests.support.jobs import WAIT_S_MAX, EventLog, ScriptedJob, job_registry, settle

STARTED = ["a created", "b created", "a running", "b running"]


def told(log: EventLog) -> list[str]:
    """Every event with its job."""
    return [
        f"{event.data.get('id', event.data.get('device'))} "
        + str(event.data["status"] if event.name == "JOB_STATUS_CHANGE" else event.name)
        for event in log.events
    ]


@asynccontextmanager
async def pair(**options: object) -> AsyncIterator[tuple[ScriptedJob, ScriptedJob, EventLog]]:
    """Jobs a and b of one transaction, started; options that begin with a_ or b_ are for one of them."""
    async with job_registry() as (registry, log):
        together = JobTransaction()
        jobs = [_job(name, together, options) for name in ("a", "b")]
        for job in jobs:
            registry.add(job)
        for job in jobs:
            registry.start(job)
        yield jobs[0], jobs[1], log


def _job(name: str, together: JobTransaction, options: dict[str, object]) -> ScriptedJob:
    own = {
        key.removeprefix(f"{name}_"): value for key, value in options.items() if key.startswith(f"{name}_")
    }
    return ScriptedJob(name, transaction=together, **own)  # type: ignore[arg-type]


async def concluded(*jobs: Job) -> None:
    async with asyncio.timeout(WAIT_S_MAX):
        for job in jobs:
            await job.wait_concluded()


async def test_the_first_to_be_done_waits_for_the_other() -> None:
    async with pair() as (a, b, log):
        a.step()
        await log.wait_status(a, JobStatus.WAITING)
        await settle()
        assert a.calls == ["run"]
        for verb in (a.finalize, a.pause):
            with pytest.raises(ConflictError, match="in state 'waiting' cannot accept"):
                verb()
        b.step()
        await concluded(a, b)
        assert told(log) == [
            *STARTED,
            "a waiting", "b waiting", "b pending", "a pending",
            "b BLOCK_JOB_COMPLETED", "b concluded", "b null",
            "a BLOCK_JOB_COMPLETED", "a concluded", "a null",
        ]  # fmt: skip
        assert a.calls == b.calls == ["run", "prepare", "commit", "clean"]


@pytest.mark.parametrize("manual", ["a", "b", "both"])
async def test_finalizing_one_finalizes_all(manual: str) -> None:
    manually = {f"{name}_auto_finalize": manual not in (name, "both") for name in ("a", "b")}
    async with pair(**manually) as (a, b, log):
        a.step()
        b.step()
        await log.wait_status(a, JobStatus.PENDING)
        await settle()
        assert a.calls == b.calls == ["run"]
        pending = [line for line in told(log) if "PENDING" in line]
        assert pending == [f"{name} BLOCK_JOB_PENDING" for name in ("b", "a") if manual in (name, "both")]
        (b if manual == "a" else a).finalize()
        await concluded(a, b)
        assert a.error is b.error is None


async def test_a_failure_cancels_the_others_and_ends_the_newest_first() -> None:
    async with pair(a_failures={"run": NbdBackupError("no space")}) as (a, b, log):
        await concluded(a, b)
        assert told(log)[len(STARTED) :] == [
            "a aborting",
            "b aborting", "b BLOCK_JOB_CANCELLED", "b concluded", "b null",
            "a BLOCK_JOB_COMPLETED", "a concluded", "a null",
        ]  # fmt: skip
        assert (a.error, b.error) == ("no space", CANCELLED_TEXT)
        assert a.calls == b.calls == ["run", "abort", "clean"]


async def test_a_failure_undoes_who_was_done_already() -> None:
    async with pair(b_failures={"run": NbdBackupError("no space")}, b_gated_hooks=("run",)) as (a, b, log):
        a.step()
        await log.wait_status(a, JobStatus.WAITING)
        b.open("run")
        await concluded(a, b)
        assert told(log)[len(STARTED) :] == [
            "a waiting",
            "b aborting", "b BLOCK_JOB_COMPLETED", "b concluded", "b null",
            "a aborting", "a BLOCK_JOB_CANCELLED", "a concluded", "a null",
        ]  # fmt: skip
        assert a.calls == ["run", "abort", "clean"]


@pytest.mark.parametrize("failing", ["a", "b"])
async def test_a_failure_of_the_last_step_undoes_who_took_it_already(failing: str) -> None:
    options = {f"{failing}_failures": {"prepare": NbdBackupError("no sync")}}
    async with pair(**options, **{f"{failing}_gated_hooks": ("prepare",)}) as (a, b, _):
        one, other = (a, b) if failing == "a" else (b, a)
        a.step()
        b.step()
        await one.wait_reached("prepare")
        await other.wait_reached("prepare")
        await settle()
        assert other.calls == ["run", "prepare"]
        one.open("prepare")
        await concluded(a, b)
        assert other.calls == ["run", "prepare", "abort", "clean"]
        assert (one.error, other.error) == ("no sync", CANCELLED_TEXT)


@pytest.mark.parametrize("state", ["running", "waiting", "pending", "paused"])
async def test_cancelling_one_cancels_all_in_every_state(state: str) -> None:
    async with pair(a_auto_finalize=False, b_auto_finalize=False) as (a, b, log):
        await a.wait_reached("run")
        await b.wait_reached("run")
        if state == "paused":
            b.pause()
            b.step()
            await log.wait_status(b, JobStatus.PAUSED)
        elif state != "running":
            a.step()
            await log.wait_status(a, JobStatus.WAITING)
            if state == "pending":
                b.step()
                await log.wait_status(a, JobStatus.PENDING)
        a.cancel()
        await concluded(a, b)
        assert told(log)[-8:] == [
            "b aborting", "b BLOCK_JOB_CANCELLED", "b concluded", "b null",
            "a aborting", "a BLOCK_JOB_CANCELLED", "a concluded", "a null",
        ]  # fmt: skip
        assert "commit" not in a.calls + b.calls


async def test_no_cancel_comes_between_two_commits() -> None:
    async with pair(b_gated_hooks=("commit",)) as (a, b, _):
        a.step()
        b.step()
        await b.wait_reached("commit")
        for job in (a, b):
            with pytest.raises(ConflictError, match="has succeeded already"):
                job.cancel()
        b.open("commit")
        await concluded(a, b)
        assert a.error is b.error is None


async def test_a_job_cancelled_before_it_is_started_cancels_the_others() -> None:
    async with job_registry() as (registry, _):
        together = JobTransaction()
        jobs = [_job(name, together, {}) for name in ("a", "b")]
        for job in jobs:
            registry.add(job)
        jobs[1].cancel()
        for job in jobs:
            registry.start(job)
        await concluded(*jobs)
        assert [job.error for job in jobs] == [CANCELLED_TEXT] * 2
        assert jobs[1].calls == ["abort", "clean"]


async def test_a_discarded_job_is_waited_for_by_nobody() -> None:
    async with job_registry() as (registry, _):
        together = JobTransaction()
        jobs = [_job(name, together, {}) for name in ("a", "b")]
        for job in jobs:
            registry.add(job)
        registry.discard(jobs[1])
        registry.start(jobs[0])
        jobs[0].step()
        await concluded(jobs[0])
        assert jobs[0].error is None


async def test_tearing_the_daemon_down_ends_a_transaction_of_which_no_job_has_begun() -> None:
    together = JobTransaction()
    jobs = [_job(name, together, {}) for name in ("a", "b")]

    async def daemon() -> None:
        async with asyncio.TaskGroup() as tasks:
            registry = JobRegistry(tasks)
            for job in jobs:
                registry.add(job)
            for job in jobs:
                registry.start(job)
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        async with asyncio.timeout(WAIT_S_MAX):
            await daemon()
    await concluded(*jobs)
