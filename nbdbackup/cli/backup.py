"""`nbdbackup backup`: start a backup job on the server, and stay with it until it ends.

The job belongs to the server: if this process dies, or its terminal is closed, the job goes
on. Interrupting is another matter: Ctrl-C asks whether to leave the job alone or to cancel
it; where nobody can be asked, it is cancelled, and so it is on SIGTERM.

If the server goes away, or the one of a remote target, the job is interrupted: the command ends, and says how
to go on.
"""

import argparse
import asyncio
import signal
from collections.abc import Awaitable
from typing import TypeVar

from qemu.qmp import EventListener

from nbdbackup.cli import backup_options, interrupts, progress
from nbdbackup.cli.backup_options import BackupOptions
from nbdbackup.cli.control import (
    CommandError,
    Control,
    ServerGoneError,
    connected,
    explained,
    run_async,
)
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.interrupts import Interrupts
from nbdbackup.cli.output import print_json_line, say
from nbdbackup.cli.parser import Verbs
from nbdbackup.cli.progress import Progress
from nbdbackup.cli.replies import JobInfo, StartedBackup
from nbdbackup.cli.sizes import format_size
from nbdbackup.cli.watch import JOB_EVENTS, JobEnd, Outcome, wait_job_end
from nbdbackup.errors import NbdBackupError

T = TypeVar("T")
R = TypeVar("R")

START_TIMEOUT_S = 10
CANCEL_TIMEOUT_S = 60


def add_parser(verbs: Verbs) -> None:
    """Add `backup`."""
    backup_options.add_parser(verbs, run)


def run(namespace: argparse.Namespace) -> int:
    """`backup`."""
    return run_async(_backup(backup_options.backup_options(namespace)))


async def _backup(options: BackupOptions) -> int:
    async with connected(options.control) as control:
        if not options.wait:
            job_id = await _start(control, options)
            if options.json:
                print_json_line({"job-id": job_id})
            else:
                print(job_id)
            return ExitStatus.DONE
        with control.events(JOB_EVENTS) as listener, progress.shown(options.progress) as shown:
            async with interrupts.caught() as interrupted:
                return await _attended(control, options, listener, shown, interrupted)


async def _start(control: Control, options: BackupOptions) -> str:
    """Start the job; its id."""
    try:
        started = await control.query("x-nbdbackup-backup", StartedBackup, options.arguments())
    except CommandError as error:
        raise await explained(error, control, nodes=[options.node]) from error
    return started.job_id


async def _attended(
    control: Control,
    options: BackupOptions,
    listener: EventListener,
    shown: Progress,
    interrupted: Interrupts,
) -> int:
    """Start the job and stay with it to its end, or until an interrupt ends the waiting."""
    job_id = await _started(control, options, interrupted)
    # Not a TaskGroup: this ends by whichever comes first, and its caller wants the plain exception.
    end = asyncio.ensure_future(_end_of(control, options, listener, shown, job_id))
    try:
        while (number := await _first(end, interrupted.wait())) is not None:
            shown.pause()
            choice = "cancel"
            if number is signal.SIGINT and interrupts.can_ask():
                choice = await _asked(end, interrupted, job_id)
            if choice == "detach":
                say(f"the job goes on; see: nbdbackup job watch {job_id}")
                return ExitStatus.INTERRUPTED
            if choice == "cancel":
                return await _cancelled(control, options, job_id, end)
            shown.resume()
        job_end = await end
        shown.finish(job_id, job_end.done, job_end.total)
        shown.pause()
        return _told(options, job_end)
    finally:
        end.cancel()
        await asyncio.wait([end])


async def _end_of(
    control: Control, options: BackupOptions, listener: EventListener, shown: Progress, job_id: str
) -> JobEnd:
    """Wait for the end of the job.

    Raises:
        ServerGoneError: the server went away; if it is so, that it is kept.
    """
    is_kept = False

    def report(job: JobInfo) -> None:
        nonlocal is_kept
        is_kept = job.kept
        shown.report(job)

    waits_for_target = options.on_target_error == "stop"
    try:
        return await wait_job_end(
            control, listener, job_id, report, shown.tell, waits_for_target=waits_for_target
        )
    except ServerGoneError as error:
        if not is_kept:
            raise
        raise ServerGoneError(
            f"the server on {control.path} went away; the backup of {options.node} to {options.target} is "
            f"kept: start the server again, and {_ways_on(job_id)}"
        ) from error


def _ways_on(job_id: str) -> str:
    return f"go on with 'nbdbackup job resume {job_id}', or give it up with 'nbdbackup job cancel {job_id}'"


async def _started(control: Control, options: BackupOptions, interrupted: Interrupts) -> str:
    """`_start`, which an interrupt does not leave half done: the job is known, or it has not begun."""
    start = asyncio.ensure_future(_start(control, options))
    try:
        number = await _first(start, interrupted.wait())
        if number is not None:
            interrupted.notice(number)  # for when there is a job to cancel
            async with asyncio.timeout(START_TIMEOUT_S):
                return await asyncio.shield(start)
        return await start
    except TimeoutError as error:
        raise NbdBackupError(
            f"interrupted, but the server has not answered for {START_TIMEOUT_S} s: the backup of "
            f"{options.node} may begin yet; see nbdbackup job list"
        ) from error
    finally:
        start.cancel()
        await asyncio.wait([start])


async def _first(end: "asyncio.Future[R]", other: Awaitable[T]) -> T | None:
    """What `other` gives, or None if only `end` is done; then `other` is cancelled."""
    task = asyncio.ensure_future(other)
    either = asyncio.Event()
    end.add_done_callback(lambda _: either.set())
    task.add_done_callback(lambda _: either.set())
    try:
        await either.wait()
        # An interrupt that came together with the end counts: it would be lost otherwise.
        return task.result() if task.done() else None
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _asked(end: "asyncio.Future[JobEnd]", interrupted: Interrupts, job_id: str) -> str:
    """What to do about the running job: "detach", "cancel" or "wait"."""
    question = f"\ndetach from job {job_id} (it goes on), cancel it, or wait on? [d/c/W] "
    answer = asyncio.ensure_future(interrupts.answer_to(question))
    try:
        again = await _first(end, _first(answer, interrupted.wait()))
        if again is not None:
            say("")
            return "cancel"
        if end.done():
            say("")
            return "wait"
        return {"d": "detach", "c": "cancel"}.get(answer.result()[:1], "wait")
    finally:
        answer.cancel()
        await asyncio.wait([answer])


async def _cancelled(
    control: Control, options: BackupOptions, job_id: str, end: "asyncio.Future[JobEnd]"
) -> int:
    """Cancel the job and wait until it has ended, one way or the other."""
    try:
        await control.execute("job-cancel", {"id": job_id})
    except CommandError:
        pass  # too late: it is ending already, and how it ends is the answer
    try:
        async with asyncio.timeout(CANCEL_TIMEOUT_S):
            job_end = await asyncio.shield(end)
    except TimeoutError as error:
        raise NbdBackupError(f"job {job_id} did not stop within {CANCEL_TIMEOUT_S} s; it goes on") from error
    if job_end.outcome is not Outcome.CANCELLED:
        return _told(options, job_end)
    if options.json:
        print_json_line(job_end.as_json())
    leaves = "is a mix of old and new now" if options.existing else "was not made"
    say(f"nbdbackup: interrupted: the backup of {options.node} was cancelled; {options.target} {leaves}")
    return ExitStatus.INTERRUPTED


def _told(options: BackupOptions, end: JobEnd) -> int:
    """Say how the job ended; the exit status.

    Raises:
        NbdBackupError: it failed, or somebody else cancelled it.
    """
    if options.json:
        print_json_line(end.as_json())
    if end.outcome is Outcome.CANCELLED:
        raise NbdBackupError(f"the backup of {options.node} to {options.target} was cancelled")
    if end.outcome is Outcome.INTERRUPTED:
        raise NbdBackupError(
            f"the backup of {options.node} to {options.target} was interrupted, and is kept: {end.error}; "
            f"{_ways_on(end.job_id)}"
        )
    if end.outcome is Outcome.FAILED:
        raise NbdBackupError(f"the backup of {options.node} to {options.target} failed: {end.error}")
    if not options.json:
        print(f"{options.target}: complete, {format_size(end.total)} of {options.node}")
    return end.exit_status
