"""Job: a long operation that users can watch, pause, slow down, cancel and finalize.

A subclass does the work in `run`; everything else about being a job is here. The life
of one job, whatever happens on the way:

    run -> prepare -> commit -> clean      it succeeded
    run -> [prepare] -> abort -> clean     it failed, or was cancelled
    run -> [prepare] ->                    it was left, as the process ends: a later one goes on with it

`run` and `prepare` can be cancelled at any await. `commit`, `abort` and `clean` always run to
their ends, also when the whole daemon is being torn down around them. Jobs of one `JobTransaction`
wait for each other between these steps.

Law for whoever edits this: the state changes in `_enter` alone, and verbs act at once or
raise; none of them waits.

The states are QEMU's (`job/states.py`), and so are the events, their order and the error texts.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import NoReturn

from nbdbackup.errors import ConflictError, CopyError, Side, UsageError
from nbdbackup.job.error_policy import REPORT_ERRORS, ErrorAction, ErrorPolicies, IoStatus, retry_delay_s
from nbdbackup.job.events import Event, JobFigures, block_job_error, block_job_pending, job_status_change
from nbdbackup.job.failures import describe, failure_in
from nbdbackup.job.pace import Pace
from nbdbackup.job.rate_limit import RateLimit
from nbdbackup.job.states import TRANSITIONS, VERBS, JobStatus, JobVerb
from nbdbackup.job.to_the_end import to_the_end
from nbdbackup.job.transaction import JobTransaction

logger = logging.getLogger(__name__)

CANCELLED_TEXT = "Operation canceled"


class Job(ABC):
    """One job; create it, then `JobRegistry.add` and `JobRegistry.start` it.

    Set once: `id`, `type`, `device` (the node that it works on), `auto_finalize`, `auto_dismiss`.
    Changing while it runs: `status`, `error`, `io_status`, `current_progress` and `total_progress`
    (bytes), `source_errors_ignored` (how many).
    """

    type: str = "backup"

    def __init__(
        self,
        job_id: str,
        device: str,
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        policies: ErrorPolicies = REPORT_ERRORS,
        transaction: JobTransaction | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if speed < 0:
            _refuse_speed()
        self.id = job_id
        self.device = device
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self._policies = policies
        self._transaction = transaction or JobTransaction()
        # Changing while it runs.
        self.status = JobStatus.UNDEFINED
        self.error: str | None = None
        self.current_progress = 0
        self.total_progress = 0
        self.io_status = IoStatus.OK
        self.source_errors_ignored = 0
        self._pace = Pace(RateLimit(speed, clock), self._note_rest)
        self.paused_because = ""
        """Why it is paused, if no user asked for that."""
        self._cancel_asked = False
        self._is_left = False
        self._concluded = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        """The task inside `_work`, the stretch that a cancel may interrupt."""
        self._is_committing = False
        # Set by `attach`.
        self._emit: Callable[[Event], None] = _ignore
        self._spawn: Callable[[Job], None] = _not_registered
        self._forget: Callable[[Job], None] = _not_registered

    def __str__(self) -> str:
        return f"job '{self.id}'"

    # What a subclass does.

    @abstractmethod
    async def run(self) -> None:
        """Do the work, with a `pause_point` or `throttle` between steps.

        Raises:
            NbdBackupError, OSError: the job failed; also a group of them, from workers.
        """

    async def prepare(self) -> None:  # noqa: B027 - many jobs have nothing to do here
        """The last step that may fail the job, like `run`: what makes the result final."""

    async def commit(self) -> None:  # noqa: B027
        """The job has succeeded. Must not fail."""

    async def abort(self) -> None:  # noqa: B027
        """The job has failed or was cancelled: undo what `run` and `prepare` did. Must not fail."""

    async def clean(self) -> None:  # noqa: B027
        """Give up what is held, after `commit` or `abort`. Must not fail."""

    # For `run`.

    def worker(self) -> AbstractContextManager[None]:
        """One of several concurrent workers is between here and there.

        The job counts as paused when all of its workers wait in `pause_point`, `throttle` or
        `settle_error`; a `run` that does its steps one after the other needs no `worker`.
        """
        return self._pace.worker()

    def waiting_for_worker(self) -> AbstractContextManager[None]:
        """This worker only waits for another one: whether the job rests is the other's to say."""
        return self._pace.waiting_for_worker()

    async def pause_point(self) -> None:
        """Return when the job is not paused. No I/O of this worker may be in flight."""
        await self._pace.pause_point()

    async def throttle(self, length: int) -> None:
        """Return when `length` bytes may be copied, and account for them. Also a `pause_point`."""
        await self._pace.throttle(length)

    async def wait_cancelled(self) -> NoReturn:
        """There is nothing to do until the job is cancelled. A `pause_point` all the time."""
        await self._pace.wait_for_ever()

    async def settle_error(self, error: CopyError, failures: int) -> None:
        """Do what the policy says about `error`, the last of so many `failures` in a row of this worker.

        On return the same clusters are to be tried again. Workers that fail while the job is being
        stopped are part of the same stop: there is one event for all of them.

        Raises:
            CopyError: `error`: the job is to fail.
        """
        action = self.action_for(error)
        if action is ErrorAction.REPORT:
            raise error
        if action is ErrorAction.IGNORE:
            self.source_errors_ignored += error.side is Side.SOURCE
            self.report_error(error.side, action)
            await self._pace.wait_kick(retry_delay_s(failures))
        elif self.io_status is IoStatus.OK:
            self.report_error(error.side, action)
            self.io_status = IoStatus.of(error.errno)
            self.paused_because = str(error)
            self._pace.pause_asked = True
            self._pace.kick()
        await self.pause_point()

    def action_for(self, error: CopyError) -> ErrorAction:
        """What is to be done about `error`: what the user chose, unless a subclass knows better."""
        return self._policies.action(error)

    def account(self, length: int) -> None:
        """Count `length` bytes against the rate limit without waiting: a client had them copied."""
        self._pace.limit.account(length)

    def progress_add(self, length: int) -> None:
        """`length` bytes more are done."""
        self.current_progress += length

    def progress_set_total(self, length: int) -> None:
        """There are `length` bytes to do in all."""
        self.total_progress = length

    def report_error(self, side: Side, action: ErrorAction = ErrorAction.REPORT) -> None:
        """Tell the world of an I/O error and what the job does about it."""
        operation = "read" if side is Side.SOURCE else "write"
        self._emit(block_job_error(self.id, operation, action.value))

    # What can be asked.

    @property
    def speed(self) -> int:
        """The rate limit in bytes per second; 0 is none."""
        return self._pace.limit.speed

    @property
    def is_paused(self) -> bool:
        """Whether a user, or an error, asked for a pause; `status` says whether the job has come to rest."""
        return self._pace.pause_asked

    @property
    def is_busy(self) -> bool:
        """Whether the job is at work, and not held up by a pause or its rate limit."""
        working = self.status in (JobStatus.RUNNING, JobStatus.READY)
        return working and not self._pace.is_held_up

    @property
    def is_cancellable(self) -> bool:
        """Whether `cancel` would be accepted."""
        return self.status in VERBS[JobVerb.CANCEL] and not self._is_committing and not self._is_left

    @property
    def is_cancelled(self) -> bool:
        """Whether the job was told to cancel."""
        return self._cancel_asked

    @property
    def is_kept(self) -> bool:
        """Whether the job outlives the process."""
        return False

    @property
    def can_be_left(self) -> bool:
        """Whether `leave` would be accepted; only a job that is kept on disk can be left."""
        return False

    @property
    def is_left(self) -> bool:
        """Whether the job was left for a later process."""
        return self._is_left

    @property
    def is_over(self) -> bool:
        """Whether the job is over and cleaned up, or was left."""
        return self._concluded.is_set()

    @property
    def is_committing(self) -> bool:
        """Whether the job has succeeded, and cannot be stopped any more."""
        return self._is_committing

    async def wait_concluded(self) -> None:
        """Return when the job is over and cleaned up, or was left; `error` is None if it succeeded."""
        await self._concluded.wait()

    # Verbs: what a user may tell the job.

    def cancel(self) -> None:
        """Stop the job and undo its work; `wait_concluded` tells when that is done.

        A job that is created only is still in its creator's hands: it aborts when it is started.
        """
        self._check_verb(JobVerb.CANCEL)
        if self._is_committing:
            raise ConflictError(f"Job '{self.id}' has succeeded already and is being finalized")
        if self._is_left:
            raise ConflictError(f"Job '{self.id}' is being left for the next server: cancel it there")
        if self._cancel_asked:
            return
        self._cancel()

    def leave(self) -> None:
        """Stop working, undo nothing and tell nobody: the process ends, and a later one goes on.

        Only if `can_be_left`; `wait_concluded` tells when it has stopped.
        """
        assert self.can_be_left
        self._is_left = True
        if self._driver is not None:
            self._driver.cancel()

    def pause(self, because: str = "") -> None:
        """Come to rest at the next pause point; work in flight ends first. `because`: if no user asks."""
        self._check_verb(JobVerb.PAUSE)
        if self._pace.pause_asked:
            raise ConflictError("Job is already paused")
        self.paused_because = because
        self._pace.pause_asked = True
        self._pace.kick()

    def resume(self) -> None:
        """Go on after `pause`, or after an error stopped the job."""
        if not self._pace.pause_asked:
            raise ConflictError("Can't resume a job that was not paused")
        self._check_verb(JobVerb.RESUME)
        self.io_status = IoStatus.OK
        self.paused_because = ""
        self._pace.pause_asked = False
        self._leave_pause()
        self._pace.kick()

    def set_speed(self, speed: int) -> None:
        """Limit the job to `speed` bytes per second from now on; 0 is no limit."""
        self._check_verb(JobVerb.SET_SPEED)
        if speed < 0:
            _refuse_speed()
        self._pace.limit.set_speed(speed)
        self._pace.kick()

    def complete(self) -> None:
        """Tell a ready job to come to its end. No backup is ever ready."""
        self._check_verb(JobVerb.COMPLETE)
        raise UsageError(f"The active block job '{self.id}' cannot be completed")

    def finalize(self) -> None:
        """Let a job with `auto_finalize=False`, and all of its transaction, go on from pending."""
        self._check_verb(JobVerb.FINALIZE)
        self._transaction.finalize()

    def dismiss(self) -> None:
        """Forget a concluded job."""
        self._check_verb(JobVerb.DISMISS)
        self._forget(self)
        self._enter(JobStatus.NULL)

    # For the transaction.

    @property
    def is_failing(self) -> bool:
        """Whether the job has failed or was cancelled."""
        return self._cancel_asked or self.error is not None

    def enter_pending(self) -> None:
        """All of the transaction are waiting: become pending."""
        self._enter(JobStatus.PENDING)
        if not self.auto_finalize:
            self._emit(block_job_pending(self.id, self.type))

    def enter_committing(self) -> None:
        """All of the transaction are prepared: refuse to be cancelled from now on."""
        self._is_committing = True

    def cancel_with_others(self) -> None:
        """Another job of the transaction failed: be cancelled too, unless this one fails already."""
        assert not self._is_committing
        if not self.is_failing:
            self._cancel()

    # For the registry.

    def attach(
        self,
        emit: Callable[[Event], None],
        spawn: "Callable[[Job], None]",
        forget: "Callable[[Job], None]",
    ) -> None:
        """Become a created job of a registry."""
        self._emit = emit
        self._spawn = spawn
        self._forget = forget
        self._transaction.add(self)
        self._enter(JobStatus.CREATED)

    def discard(self) -> None:
        """Give up a job that was created but will not be started."""
        self._transaction.remove(self)
        for status in (JobStatus.ABORTING, JobStatus.CONCLUDED):
            self._enter(status)
        self._forget(self)
        self._enter(JobStatus.NULL)
        self._concluded.set()

    def begin(self) -> None:
        """Enter running, unless the job was cancelled before; `drive` follows in a task."""
        if not self._cancel_asked:
            self._enter(JobStatus.RUNNING)
        self._spawn(self)

    def note_task_ended(self) -> None:
        """The task of `drive` is over; one that was torn down before it began gets no further."""
        self._concluded.set()

    async def drive(self) -> None:
        """The job's task: from running (or cancelled while created) to concluded."""
        torn_down: asyncio.CancelledError | None = None
        try:
            succeeded = await self._works()
        except asyncio.CancelledError as error:
            torn_down, succeeded = error, False
        if self._is_left:
            self._concluded.set()
        else:
            await to_the_end(self._settle(succeeded))
        if torn_down is not None:
            raise torn_down

    # How it goes.

    async def _works(self) -> bool:
        """Run and prepare; whether that succeeded. `error` is set if not.

        Raises CancelledError only if somebody else than `cancel` cancelled the task.
        """
        if self._cancel_asked:
            self.error = CANCELLED_TEXT
        if self._cancel_asked or self._is_left:
            return False
        self._driver = asyncio.current_task()
        try:
            await self._work()
        except asyncio.CancelledError:
            if not self._cancel_asked and not self._is_left:
                self._is_left = self.can_be_left
                self._cancel_asked = not self._is_left
                self.error = None if self._is_left else CANCELLED_TEXT
                raise
        except Exception as error:
            self._is_left = False
            self._note_failure(error)
        finally:
            self._driver = None
        if self._cancel_asked:
            self.error = CANCELLED_TEXT
        return self.error is None and not self._is_left

    async def _work(self) -> None:
        await self.run()
        if self._cancel_asked:
            return
        self._pace.pause_asked = False
        self.io_status = IoStatus.OK
        self._enter(JobStatus.WAITING)
        await self._transaction.wait_finalized(self)
        await self.prepare()
        if self._cancel_asked:
            return
        await self._transaction.wait_prepared(self)

    async def _settle(self, succeeded: bool) -> None:
        """Commit or abort, clean, and conclude."""
        assert succeeded == (self.error is None)
        if not succeeded:
            if not self._cancel_asked:
                self._enter(JobStatus.ABORTING)
            self._transaction.fail(self)
        await self._transaction.wait_turn(self)
        if succeeded:
            await self._call(self.commit)
        else:
            self._enter(JobStatus.ABORTING)
            await self._call(self.abort)
        await self._call(self.clean)
        figures = JobFigures(self.id, self.type, self.total_progress, self.current_progress, self.speed)
        self._emit(figures.cancelled() if self._cancel_asked else figures.completed(self.error))
        self._enter(JobStatus.CONCLUDED)
        self._concluded.set()
        if self.auto_dismiss:
            self.dismiss()

    async def _call(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Call a hook that must not fail; if it does, be loud and go on."""
        try:
            await hook()
        except Exception as error:
            logger.exception("%s: %s failed", self, getattr(hook, "__name__", "a hook"))
            self.error = self.error or f"internal error: {describe(error)}"

    def _note_failure(self, error: Exception) -> None:
        failure = failure_in(error)
        if failure is None:
            logger.error("%s: internal error", self, exc_info=error)
            self.error = f"internal error: {type(error).__name__}: {describe(error)}"
            return
        self.error = describe(failure)
        if isinstance(failure, CopyError) and not self._cancel_asked:
            self.report_error(failure.side)

    def _cancel(self) -> None:
        self._cancel_asked = True
        self._pace.pause_asked = False
        self.io_status = IoStatus.OK
        self._leave_pause()
        if self._driver is not None:
            self._driver.cancel()

    def _enter(self, status: JobStatus) -> None:
        if status is self.status is JobStatus.ABORTING:
            return
        assert status in TRANSITIONS[self.status], f"{self}: {self.status} -> {status}"
        self.status = status
        self._emit(job_status_change(self.id, status.value))

    def _check_verb(self, verb: JobVerb) -> None:
        if self.status not in VERBS[verb]:
            raise ConflictError(
                f"Job '{self.id}' in state '{self.status.value}' cannot accept command verb '{verb.value}'"
            )

    def _note_rest(self, resting: bool) -> None:
        """Make `status` true again after a worker came to rest, went on or left."""
        if self._is_left:
            return
        if not resting:
            self._leave_pause()
        elif self.status is JobStatus.RUNNING:
            self._enter(JobStatus.PAUSED)
        elif self.status is JobStatus.READY:
            self._enter(JobStatus.STANDBY)

    def _leave_pause(self) -> None:
        if self.status is JobStatus.PAUSED:
            self._enter(JobStatus.RUNNING)
        elif self.status is JobStatus.STANDBY:
            self._enter(JobStatus.READY)


def _refuse_speed() -> NoReturn:
    raise UsageError("Parameter 'speed' expects a non-negative value")


def _ignore(event: Event) -> None:
    del event


def _not_registered(job: Job) -> None:
    raise AssertionError(f"{job} belongs to no registry")
