"""`nbdbackup job list|watch|pause|resume|cancel|finalize|dismiss|set-speed`."""

import argparse
import asyncio
from pathlib import Path

import msgspec

from nbdbackup.cli import progress
from nbdbackup.cli.control import CommandError, Control, connected, explained, run_async
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.output import print_json, print_json_line, print_table, say
from nbdbackup.cli.parser import Parser, Verbs, add_control, control_path, size
from nbdbackup.cli.progress import Progress
from nbdbackup.cli.replies import BlockJobInfo, JobInfo
from nbdbackup.cli.sizes import format_size
from nbdbackup.cli.watch import JOB_EVENTS, JobEnd, Outcome, wait_job_end
from nbdbackup.errors import NbdBackupError, NotFoundError

ACTIONS = {
    "pause": "stop copying until resume; client writes still save old contents",
    "resume": "go on with a job that is paused, was stopped by an error, or was interrupted when its server "
    "or its target's went away: at the same point in time, from where it was",
    "cancel": "end a job, or give up an interrupted one; its unfinished target is removed",
    "finalize": "let a job that waits in 'pending' come into effect",
    "dismiss": "take a job that is over off the list",
}


class ActOptions(msgspec.Struct, frozen=True):
    """What a verb that does one thing to one job was told: a QMP command and its arguments."""

    control: Path
    json: bool
    job_id: str
    command: str
    arguments: dict[str, object]


class ListOptions(msgspec.Struct, frozen=True):
    """What `job list` was told."""

    control: Path
    json: bool


class WatchOptions(msgspec.Struct, frozen=True):
    """What `job watch` was told; no `job_id` means all jobs that there are."""

    control: Path
    json: bool
    job_id: str | None


def add_parser(verbs: Verbs) -> None:
    """Add `job`."""
    group = verbs.add_parser("job", help="list, watch and steer the jobs of a running server")
    actions = group.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)

    listing = actions.add_parser("list", help="list the jobs")
    add_control(listing)
    listing.set_defaults(run=run_list)

    watch = actions.add_parser(
        "watch",
        help="show progress until a job (or every job) is over; Ctrl-C only stops the watching",
        epilog="The exit status is 0 if every watched job completed, 3 if so after errors of a source that "
        "were ignored, else 1.",
    )
    watch.add_argument("id", nargs="?", metavar="ID", help="default: every job that there is")
    add_control(watch)
    watch.set_defaults(run=run_watch)

    for action, text in ACTIONS.items():
        parser = actions.add_parser(action, help=text)
        parser.add_argument("id", metavar="ID")
        add_control(parser)
        parser.set_defaults(run=run_action, action=action)

    speed = actions.add_parser("set-speed", help="change the rate limit of a job")
    speed.add_argument("id", metavar="ID")
    speed.add_argument("rate", type=size, metavar="RATE", help="bytes a second; 0: no limit")
    add_control(speed)
    speed.set_defaults(run=run_set_speed)


def run_list(namespace: argparse.Namespace) -> int:
    """`job list`."""
    return run_async(_list(ListOptions(control_path(namespace.control), namespace.json)))


def run_watch(namespace: argparse.Namespace) -> int:
    """`job watch`."""
    return run_async(_watch(WatchOptions(control_path(namespace.control), namespace.json, namespace.id)))


def run_action(namespace: argparse.Namespace) -> int:
    """`job pause`, `resume`, `cancel`, `finalize`, `dismiss`."""
    command = f"job-{namespace.action}"
    arguments: dict[str, object] = {"id": namespace.id}
    return run_async(
        _act(ActOptions(control_path(namespace.control), namespace.json, namespace.id, command, arguments))
    )


def run_set_speed(namespace: argparse.Namespace) -> int:
    """`job set-speed`."""
    command = "block-job-set-speed"
    arguments: dict[str, object] = {"device": namespace.id, "speed": namespace.rate}
    return run_async(
        _act(ActOptions(control_path(namespace.control), namespace.json, namespace.id, command, arguments))
    )


async def _act(options: ActOptions) -> int:
    async with connected(options.control) as control:
        try:
            answer = await control.execute(options.command, options.arguments)
        except CommandError as error:
            raise await explained(error, control, jobs=[options.job_id]) from error
    if options.json:
        print_json(answer)
    return ExitStatus.DONE


async def _list(options: ListOptions) -> int:
    async with connected(options.control) as control:
        answer = await control.execute("query-jobs")
        speeds = {
            job.device: job.speed for job in await control.query("query-block-jobs", list[BlockJobInfo])
        }
    if options.json:
        print_json(answer)
        return ExitStatus.DONE
    jobs = control.convert("query-jobs", answer, list[JobInfo])
    print_table(
        ("JOB", "TYPE", "STATUS", "PROGRESS", "LIMIT", "ERROR"),
        [
            (
                job.id,
                job.type,
                job.status,
                f"{format_size(job.current_progress)} of {format_size(job.total_progress)}",
                f"{format_size(speeds[job.id])}/s" if speeds.get(job.id) else "none",
                job.error or job.paused_because,
            )
            for job in jobs
        ],
    )
    return ExitStatus.DONE


async def _watch(options: WatchOptions) -> int:
    async with connected(options.control) as control:
        jobs = [job.id for job in await control.query("query-jobs", list[JobInfo])]
        if options.job_id is not None:
            if options.job_id not in jobs:
                raise NotFoundError(
                    f"the server on {options.control} has no job '{options.job_id}' (see nbdbackup job list)"
                )
            jobs = [options.job_id]
        with progress.shown(None) as shown:
            ends = await _ends(control, jobs, shown)
    for end in ends:
        _tell(options, end)
    statuses = {end.exit_status for end in ends}
    worst_first = (ExitStatus.FAILED, ExitStatus.ERRORS_IGNORED)
    return next((status for status in worst_first if status in statuses), ExitStatus.DONE)


async def _ends(control: Control, jobs: list[str], shown: Progress) -> list[JobEnd]:
    async def end_of(job_id: str) -> JobEnd:
        with control.events(JOB_EVENTS) as listener:
            end = await wait_job_end(control, listener, job_id, shown.report, shown.tell)
        shown.finish(job_id, end.done, end.total)
        return end

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(end_of(job_id)) for job_id in jobs]
    except* NbdBackupError as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


def _tell(options: WatchOptions, end: JobEnd) -> None:
    if options.json:
        print_json_line(end.as_json())
    elif end.outcome is Outcome.COMPLETED:
        print(f"{end.job_id}: completed, {format_size(end.total)}")
    else:
        say(f"nbdbackup: job {end.job_id} {end.outcome.value}{f': {end.error}' if end.error else ''}")
