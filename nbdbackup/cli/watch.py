"""Waiting for a job of the server to end, by its events.

The events say *that* something happened to a job; whether it is over is decided by
asking for the list of jobs, at every status event and once an interval. So a lost event
costs one interval, and a lost connection is noticed within one.
"""

import asyncio
from collections.abc import Callable
from enum import Enum

import msgspec
from msgspec.structs import replace
from qemu.qmp import EventListener, Message

from nbdbackup.cli.control import Control
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.output import say
from nbdbackup.cli.replies import BlockJobInfo, JobInfo

JOB_EVENTS = ("JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR")
POLL_INTERVAL_S = 0.25
CANCELLED_TEXT = "Operation canceled"


class Outcome(Enum):
    """How a job ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """It has not ended: the server of its target is gone, and it waits to be resumed."""


class JobEnd(msgspec.Struct, frozen=True):
    """The end of job `job_id`; `done` and `total` are its progress in bytes."""

    job_id: str
    outcome: Outcome
    done: int = 0
    total: int = 0
    error: str | None = None
    source_errors_ignored: int = 0

    @property
    def exit_status(self) -> ExitStatus:
        """That of a command that stayed with the job."""
        if self.outcome is not Outcome.COMPLETED:
            return ExitStatus.FAILED
        return ExitStatus.ERRORS_IGNORED if self.source_errors_ignored else ExitStatus.DONE

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "job-id": self.job_id,
            "outcome": self.outcome.value,
            "offset": self.done,
            "len": self.total,
            "error": self.error,
            "source-errors-ignored": self.source_errors_ignored,
        }


async def wait_job_end(
    control: Control,
    listener: EventListener,
    job_id: str,
    report: Callable[[JobInfo], None],
    tell: Callable[[str], None] = say,
    *,
    waits_for_target: bool = True,
) -> JobEnd:
    """Wait until job `job_id` is over; `report` gets its state time and again.

    Without `waits_for_target`, also until its target's server is gone and the job waits for that. `tell` gets
    a line for the user when an error has stopped the job. `listener` listens to JOB_EVENTS since before the
    job could end, and is used by nobody else.

    Raises:
        ServerGoneError: the server went away before.
    """
    seen = _Seen(job_id, tell, waits_for_target=waits_for_target)
    while True:
        event = await _next_event(listener)
        if event is not None:
            seen.note(event)
            if event["event"] != "JOB_STATUS_CHANGE":
                continue  # the status that belongs to it follows, or the next poll shows it
        jobs = await control.query("query-jobs", list[JobInfo])
        job = next((job for job in jobs if job.id == job_id), None)
        if job is not None:
            seen.errors_ignored = max(seen.errors_ignored, job.source_errors_ignored)
        if job is not None and job.status != "concluded":
            report(job)
            if seen.has_stopped_writing and (job.status == "paused" or not job.kept):
                if job.kept and await _is_target_lost(control, job_id):
                    return _interrupted(job)
                seen.tell_stopped()
            continue
        while not listener.empty():
            seen.note(await listener.get())
        if seen.has_stopped_writing:
            seen.tell_stopped()
        end = seen.end or (_end_shown_by(job) if job is not None else _end_unseen(job_id))
        return replace(end, source_errors_ignored=seen.errors_ignored)


class _Seen:
    """What the events told of one job."""

    def __init__(self, job_id: str, tell: Callable[[str], None], *, waits_for_target: bool) -> None:
        self.has_stopped_writing = False
        """And nobody was told yet."""
        self.end: JobEnd | None = None
        self.errors_ignored = 0
        self._job_id = job_id
        self._tell = tell
        self._waits_for_target = waits_for_target

    def note(self, event: Message) -> None:
        self.end = _end_told_by(event, self._job_id) or self.end
        data = event.get("data")
        if event["event"] != "BLOCK_JOB_ERROR" or not isinstance(data, dict):
            return
        if data.get("device") != self._job_id:
            return
        if data.get("action") == "stop" and data.get("operation") == "read":
            self.tell_stopped("reading the source")
        elif data.get("action") == "stop":
            self.has_stopped_writing = True
            if self._waits_for_target:
                self.tell_stopped()
        elif data.get("action") == "ignore" and data.get("operation") == "read":
            self.errors_ignored += 1

    def tell_stopped(self, end: str = "writing the target") -> None:
        """Tell the user that the job is stopped because that failed."""
        self.has_stopped_writing = False
        self._tell(
            f"job {self._job_id} is stopped: {end} failed; mend that and use: "
            f"nbdbackup job resume {self._job_id}"
        )


async def _is_target_lost(control: Control, job_id: str) -> bool:
    """Whether it is more than a lack of space that has stopped a job that is to stop for nothing else."""
    jobs = await control.query("query-block-jobs", list[BlockJobInfo])
    return any(job.device == job_id and job.io_status == "failed" for job in jobs)


async def _next_event(listener: EventListener) -> Message | None:
    """The next event, or None after an interval without one."""
    try:
        async with asyncio.timeout(POLL_INTERVAL_S):
            return await listener.get()
    except TimeoutError:
        return None


def _end_told_by(event: Message, job_id: str) -> JobEnd | None:
    data = event.get("data")
    if not isinstance(data, dict) or data.get("device") != job_id:
        return None
    done, total = int(data.get("offset", 0)), int(data.get("len", 0))
    if event["event"] == "BLOCK_JOB_CANCELLED":
        return JobEnd(job_id, Outcome.CANCELLED, done, total)
    if event["event"] == "BLOCK_JOB_COMPLETED":
        error = data.get("error")
        outcome = Outcome.COMPLETED if error is None else Outcome.FAILED
        return JobEnd(job_id, outcome, done, total, None if error is None else str(error))
    return None


def _interrupted(job: JobInfo) -> JobEnd:
    done, total = job.current_progress, job.total_progress
    return JobEnd(job.id, Outcome.INTERRUPTED, done, total, job.paused_because)


def _end_shown_by(job: JobInfo) -> JobEnd:
    outcome = Outcome.COMPLETED
    if job.error is not None:
        outcome = Outcome.CANCELLED if job.error == CANCELLED_TEXT else Outcome.FAILED
    return JobEnd(job.id, outcome, job.current_progress, job.total_progress, job.error)


def _end_unseen(job_id: str) -> JobEnd:
    return JobEnd(job_id, Outcome.FAILED, error="the job is gone, and how it ended was not seen")
