"""A job's life: events and their order, pausing, cancelling, failing, finalizing."""

import asyncio
import logging

import pytest

from nbdbackup.errors import ConflictError, CopyError, NbdBackupError, NotFoundError, Side, UsageError
from nbdbackup.job.job import CANCELLED_TEXT, Job
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.states import JobStatus
from tests.support.jobs import WAIT_S_MAX, EventLog, ScriptedJob, job_registry, settle

SUCCESS = ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
CANCELLED = ["created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


async def _concluded(job: Job) -> None:
    async with asyncio.timeout(WAIT_S_MAX):
        await job.wait_concluded()


async def test_success_calls_the_hooks_and_sends_the_events_in_qemus_order() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob(steps=3)
        registry.add(job)
        registry.start(job)
        job.step(3)
        await _concluded(job)
        assert log.summary == SUCCESS
        assert job.calls == ["run", "prepare", "commit", "clean"]
        assert job.error is None
        assert log.find("BLOCK_JOB_COMPLETED").data == {
            "device": "job1", "len": 300, "offset": 300, "speed": 0, "type": "backup",
        }  # fmt: skip
        with pytest.raises(NotFoundError, match=r"^Job not found$"):
            registry.get("job1")


async def test_failure_aborts_and_tells_the_error() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob(failures={"run": NbdBackupError("the target is full")})
        registry.add(job)
        registry.start(job)
        await _concluded(job)
        assert log.summary == [
            "created", "running", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null",
        ]  # fmt: skip
        assert job.calls == ["run", "abort", "clean"]
        assert job.error == "the target is full"
        assert log.find("BLOCK_JOB_COMPLETED").data["error"] == "the target is full"


@pytest.mark.parametrize(("side", "operation"), [(Side.SOURCE, "read"), (Side.TARGET, "write")])
async def test_copy_error_is_announced_before_the_job_fails(side: Side, operation: str) -> None:
    cause = OSError(28, "No space left on device")
    failure = ExceptionGroup("workers", [CopyError(side, 0, 4096, cause)])
    async with job_registry() as (registry, log):
        job = ScriptedJob(failures={"run": failure})
        registry.add(job)
        registry.start(job)
        await _concluded(job)
        assert log.summary[2:4] == ["BLOCK_JOB_ERROR", "aborting"]
        assert log.find("BLOCK_JOB_ERROR").data == {
            "device": "job1", "operation": operation, "action": "report",
        }  # fmt: skip
        assert job.error == str(failure.exceptions[0])


async def test_failure_of_prepare_aborts_from_pending() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob(failures={"prepare": OSError(5, "Input/output error")})
        registry.add(job)
        registry.start(job)
        job.step()
        await _concluded(job)
        assert log.summary[2:5] == ["waiting", "pending", "aborting"]
        assert job.calls == ["run", "prepare", "abort", "clean"]
        assert job.error == "Input/output error"


async def test_bug_is_logged_with_its_traceback_and_fails_the_job(caplog: pytest.LogCaptureFixture) -> None:
    async with job_registry() as (registry, _):
        job = ScriptedJob(failures={"run": ExceptionGroup("workers", [ZeroDivisionError("oops")])})
        registry.add(job)
        registry.start(job)
        await _concluded(job)
    assert job.error is not None
    assert job.error.startswith("internal error: ExceptionGroup")
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert job.calls == ["run", "abort", "clean"]


@pytest.mark.parametrize("hook", ["commit", "clean"])
async def test_bug_in_a_hook_that_must_not_fail_is_loud_and_the_rest_still_happens(
    hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob(failures={hook: ZeroDivisionError("oops")})
        registry.add(job)
        registry.start(job)
        job.step()
        await _concluded(job)
        assert job.calls == ["run", "prepare", "commit", "clean"]
        assert log.summary == SUCCESS
    assert job.error == "internal error: oops"
    assert f"{hook} failed" in caplog.text


async def test_pause_takes_effect_at_the_next_pause_point_and_resume_goes_on() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob(steps=2)
        registry.add(job)
        registry.start(job)
        await job.wait_reached("run")
        await settle()
        job.pause()
        assert (job.status, job.is_paused) == (JobStatus.RUNNING, True)
        job.step()
        await log.wait_status(job, JobStatus.PAUSED)
        job.step()
        await settle()
        assert job.current_progress == 100
        with pytest.raises(ConflictError, match=r"^Job is already paused$"):
            job.pause()
        job.resume()
        assert job.status is JobStatus.RUNNING
        with pytest.raises(ConflictError, match=r"^Can't resume a job that was not paused$"):
            job.resume()
        await _concluded(job)
        assert log.summary == [*SUCCESS[:2], "paused", "running", *SUCCESS[2:]]


async def test_job_paused_before_its_start_does_nothing_until_resumed() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob()
        registry.add(job)
        job.pause()
        registry.start(job)
        job.step()
        await log.wait_status(job, JobStatus.PAUSED)
        assert job.current_progress == 0
        job.resume()
        await _concluded(job)
        assert job.error is None


class _WorkersJob(Job):
    """Two workers, each of which does one step when its gate opens."""

    def __init__(self) -> None:
        super().__init__("job1", "disk")
        self.gates = [asyncio.Event(), asyncio.Event()]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as workers:
            for gate in self.gates:
                workers.create_task(self._work_through(gate))

    async def _work_through(self, gate: asyncio.Event) -> None:
        with self.worker():
            await gate.wait()
            await self.pause_point()


async def test_job_is_paused_only_when_all_of_its_workers_rest() -> None:
    async with job_registry() as (registry, log):
        job = _WorkersJob()
        registry.add(job)
        registry.start(job)
        await settle()
        job.pause()
        job.gates[0].set()
        await settle()
        assert job.status is JobStatus.RUNNING
        job.gates[1].set()
        await log.wait_status(job, JobStatus.PAUSED)
        job.resume()
        await _concluded(job)
        assert log.summary == [*SUCCESS[:2], "paused", "running", *SUCCESS[2:]]


async def test_job_that_waits_for_its_rate_limit_can_be_paused() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob(steps=2, speed=1)
        registry.add(job)
        registry.start(job)
        job.step()
        await job.wait_reached("run")
        await settle()
        assert (job.status, job.is_busy) == (JobStatus.RUNNING, False)
        job.pause()
        await log.wait_status(job, JobStatus.PAUSED)
        job.resume()
        assert job.status is JobStatus.RUNNING


async def test_change_of_speed_wakes_a_job_that_waits_for_its_rate_limit() -> None:
    async with job_registry() as (registry, _):
        job = ScriptedJob(steps=2, speed=1)
        registry.add(job)
        registry.start(job)
        job.step(2)
        await job.wait_reached("run")
        await settle()
        assert job.current_progress == 100
        job.set_speed(0)
        await _concluded(job)
        assert (job.current_progress, job.error) == (200, None)


async def test_what_clients_had_copied_counts_against_the_limit_without_waiting() -> None:
    async with job_registry() as (registry, _):
        job = ScriptedJob(steps=1, speed=1)
        registry.add(job)
        job.account(1000)
        registry.start(job)
        job.step()
        await job.wait_reached("run")
        await settle()
        assert job.current_progress == 0


async def test_negative_speed_is_refused() -> None:
    text = r"^Parameter 'speed' expects a non-negative value$"
    with pytest.raises(UsageError, match=text):
        ScriptedJob(speed=-1)
    async with job_registry() as (registry, _):
        job = ScriptedJob(speed=7)
        registry.add(job)
        with pytest.raises(UsageError, match=text):
            job.set_speed(-1)
        assert job.speed == 7
        registry.discard(job)


async def test_complete_of_a_running_job_is_refused() -> None:
    async with job_registry() as (registry, _):
        job = ScriptedJob()
        registry.add(job)
        registry.start(job)
        with pytest.raises(ConflictError, match="in state 'running' cannot accept command verb 'complete'"):
            job.complete()


async def _reach(status: str, job: ScriptedJob, log: EventLog) -> None:
    """Bring `job`, which is created, to where it is to be cancelled."""
    if status == "just started":
        return
    await job.wait_reached("run")
    await settle()
    if status == "paused":
        job.pause()
        job.step()
        await log.wait_status(job, JobStatus.PAUSED)
    elif status in ("pending", "preparing"):
        job.step(2)
        await log.wait_status(job, JobStatus.PENDING)
        if status == "preparing":
            job.finalize()
            await job.wait_reached("prepare")


@pytest.mark.parametrize(
    ("status", "speed", "between"),
    [
        ("just started", 0, []),
        ("running", 0, []),
        ("throttled", 1, []),
        ("paused", 0, ["paused", "running"]),
        ("pending", 0, ["waiting", "pending", "BLOCK_JOB_PENDING"]),
        ("preparing", 0, ["waiting", "pending", "BLOCK_JOB_PENDING"]),
    ],
)
async def test_cancel_aborts_cleans_and_ends(status: str, speed: int, between: list[str]) -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob(steps=2, speed=speed, auto_finalize=False, gated_hooks=("prepare", "abort"))
        registry.add(job)
        registry.start(job)
        await _reach(status, job, log)
        job.cancel()
        job.cancel()
        await log.wait_status(job, JobStatus.ABORTING)
        await job.wait_reached("abort")
        with pytest.raises(ConflictError, match="in state 'aborting' cannot accept command verb 'cancel'"):
            job.cancel()
        job.open("abort")
        await _concluded(job)
        assert job.calls[-2:] == ["abort", "clean"]
        assert job.error == CANCELLED_TEXT
        assert log.summary == [*CANCELLED[:2], *between, *CANCELLED[2:]]


async def test_cancel_of_a_created_job_never_runs_it() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob()
        registry.add(job)
        job.cancel()
        await settle()
        assert job.status is JobStatus.CREATED
        registry.start(job)
        await _concluded(job)
        assert job.calls == ["abort", "clean"]
        assert job.error == CANCELLED_TEXT
        assert log.summary == ["created", *CANCELLED[2:]]


async def test_cancelled_job_whose_creation_fails_is_only_forgotten() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob()
        registry.add(job)
        job.cancel()
        registry.discard(job)
        await _concluded(job)
        assert job.calls == []
        assert log.summary == ["created", "aborting", "concluded", "null"]


async def test_cancel_is_refused_once_the_job_commits() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob(gated_hooks=("commit",))
        registry.add(job)
        registry.start(job)
        job.step()
        await job.wait_reached("commit")
        with pytest.raises(ConflictError, match="has succeeded already"):
            job.cancel()
        job.open("commit")
        await _concluded(job)
        assert log.summary == SUCCESS


class _StubbornJob(ScriptedJob):
    async def run(self) -> None:
        try:
            await super().run()
        except asyncio.CancelledError:
            return


async def test_cancelled_job_is_cancelled_even_if_its_work_ends_well() -> None:
    async with job_registry() as (registry, log):
        job = _StubbornJob()
        registry.add(job)
        registry.start(job)
        await job.wait_reached("run")
        job.cancel()
        await _concluded(job)
        assert log.summary == CANCELLED


async def test_job_with_manual_finalize_and_dismiss_waits_for_both() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob(auto_finalize=False, auto_dismiss=False)
        registry.add(job)
        registry.start(job)
        job.step()
        await log.wait_until(lambda: "BLOCK_JOB_PENDING" in log.summary)
        await settle()
        assert log.find("BLOCK_JOB_PENDING").data == {"type": "backup", "id": "job1"}
        assert job.calls == ["run"]
        job.finalize()
        await _concluded(job)
        assert job.status is JobStatus.CONCLUDED
        assert registry.get("job1") is job
        job.dismiss()
        assert list(registry) == []
        assert log.summary == [*SUCCESS[:4], "BLOCK_JOB_PENDING", *SUCCESS[4:]]


async def test_tearing_down_the_daemon_cleans_up_its_jobs() -> None:
    job = ScriptedJob(steps=2, gated_hooks=("abort",))

    async def daemon() -> None:
        async with asyncio.TaskGroup() as tasks:
            registry = JobRegistry(tasks)
            registry.add(job)
            registry.start(job)
            await job.wait_reached("run")
            asyncio.get_running_loop().call_later(0.01, job.open, "abort")
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await daemon()
    assert caught.group_contains(ZeroDivisionError)
    assert job.calls == ["run", "abort", "clean"]
    assert job.error == CANCELLED_TEXT


async def test_abort_runs_to_its_end_while_its_task_is_cancelled_again() -> None:
    async def scenario(job: ScriptedJob) -> None:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(job.drive())
            await job.wait_reached("run")
            task.cancel()
            await job.wait_reached("abort")
            for _ in range(3):
                task.cancel()
                await settle()
            assert job.status is JobStatus.ABORTING
            job.open("abort")

    async with job_registry() as (registry, _):
        job = ScriptedJob(gated_hooks=("abort",))
        registry.add(job)
        job._spawn = lambda _: None
        registry.start(job)
        await scenario(job)
        assert job.calls == ["run", "abort", "clean"]
        await _concluded(job)


async def test_a_job_can_be_discarded_before_it_starts() -> None:
    async with job_registry() as (registry, log):
        job = ScriptedJob()
        registry.add(job)
        registry.discard(job)
        assert log.summary == ["created", "aborting", "concluded", "null"]
        assert job.calls == []
        assert list(registry) == []


async def test_ids_are_checked_and_made_up() -> None:
    async with job_registry() as (registry, _):
        for bad in ("", "1job", "a b", "-a", "a/b", "#x", "é"):
            with pytest.raises(UsageError) as caught:
                registry.new_id(bad)
            assert str(caught.value) == f"Invalid job ID '{bad}'"
        assert registry.new_id("Az9-._") == "Az9-._"
        job = ScriptedJob("job1")
        registry.add(job)
        with pytest.raises(ConflictError, match=r"^Job ID 'job1' already in use$"):
            registry.add(ScriptedJob("job1"))
        taken = ScriptedJob("backup-1")
        registry.add(taken)
        assert registry.new_id() == "backup-2"
        assert [job.id for job in registry] == ["job1", "backup-1"]
        registry.discard(job)
        registry.discard(taken)


async def test_cancel_all_returns_when_every_job_is_over() -> None:
    async with job_registry() as (registry, _):
        jobs = [ScriptedJob("a", auto_dismiss=False), ScriptedJob("b"), ScriptedJob("c", auto_finalize=False)]
        for job in jobs:
            registry.add(job)
        registry.start(jobs[0])
        registry.start(jobs[2])
        jobs[2].step()
        await settle()
        async with asyncio.TaskGroup() as tasks:
            over = tasks.create_task(registry.cancel_all())
            await settle()
            assert not over.done()
            registry.start(jobs[1])
        assert [job.error for job in jobs] == [CANCELLED_TEXT] * 3
        assert [job.calls[-1] for job in jobs] == ["clean"] * 3
        with pytest.raises(ConflictError, match="shutting down"):
            registry.add(ScriptedJob("late"))
