"""Every job of the daemon by its id, and who listens to their events."""

import asyncio
import re
from collections.abc import Callable, Iterator

from nbdbackup.errors import ConflictError, NotFoundError, UsageError
from nbdbackup.job.events import Event
from nbdbackup.job.job import Job
from nbdbackup.job.states import JobStatus

Listener = Callable[[Event], None]

JOBS_MAX = 1024
"""More live and undismissed jobs than this are refused."""

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


class JobRegistry:
    """The jobs from created to null; each runs as a task of `tasks`."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._jobs: dict[str, Job] = {}
        self._listeners: list[Listener] = []
        self._next_number = 1
        self.is_reserved: Callable[[str], bool] = lambda _: False
        """Whether a job of that id waits for its node, and will be one of these when there is that."""
        self._is_closing = False

    def __iter__(self) -> Iterator[Job]:
        """The jobs, the oldest first."""
        return iter(list(self._jobs.values()))

    def new_id(self, requested: str | None = None) -> str:
        """`requested` if a new job may be called that, or a free id if it is None.

        Raises:
            UsageError: it is not well-formed.
            ConflictError: there is such a job, there are too many jobs, or the daemon is leaving.
        """
        if requested is not None:
            self._check(requested)
            if self.is_reserved(requested):
                raise _in_use(requested)
            return requested
        while (generated := f"backup-{self._next_number}") in self._jobs or self.is_reserved(generated):
            self._next_number += 1
        self._next_number += 1
        self._check(generated)
        return generated

    def _check(self, job_id: str) -> None:
        if self._is_closing:
            raise ConflictError("The server is shutting down; no job can be started")
        if len(self._jobs) >= JOBS_MAX:
            raise ConflictError(f"There are {JOBS_MAX} jobs already; dismiss some (job-dismiss)")
        if not _WELL_FORMED.fullmatch(job_id):
            raise UsageError(f"Invalid job ID '{job_id}'")
        if job_id in self._jobs:
            raise _in_use(job_id)

    def add(self, job: Job) -> None:
        """List `job` as created, reserved or not. `start` or `discard` must follow.

        Raises:
            UsageError, ConflictError: as `new_id`.
        """
        self._check(job.id)
        self._jobs[job.id] = job
        job.attach(self._publish, self._spawn, self._forget)

    def start(self, job: Job) -> None:
        """Let a created job run; one that was cancelled meanwhile aborts and cleans up instead."""
        job.begin()

    def discard(self, job: Job) -> None:
        """Drop a created job that will not be started; none of its hooks is called."""
        job.discard()

    def get(self, job_id: str) -> Job:
        """The job called `job_id`.

        Raises:
            NotFoundError: there is none.
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError("Job not found")
        return job

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every event from now on, until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def end_all(self) -> None:
        """As `cancel_all`, but those jobs that a later process can go on with are left for it."""
        for job in self._jobs.values():
            if job.can_be_left:
                job.leave()
        await self.cancel_all()

    async def cancel_all(self) -> None:
        """Accept no more jobs, cancel what can be cancelled, and return when every job is over and gone."""
        self._is_closing = True
        jobs = list(self._jobs.values())
        for job in jobs:
            if job.is_cancellable:
                job.cancel()
        for job in jobs:
            if job.status is not JobStatus.NULL:
                await job.wait_concluded()
            if job.status is JobStatus.CONCLUDED:
                job.dismiss()

    def _publish(self, event: Event) -> None:
        for listener in list(self._listeners):
            listener(event)

    def _spawn(self, job: Job) -> None:
        task = self._tasks.create_task(job.drive(), name=f"job-{job.id}")
        task.add_done_callback(lambda _: job.note_task_ended())

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]


def _in_use(job_id: str) -> ConflictError:
    return ConflictError(f"Job ID '{job_id}' already in use")
