"""Commands about jobs: job-* and their older twins, block-job-*.

The twins differ in the argument's name, in the error for a job that does not exist, and in
that block-job-cancel wants `force` for a paused job.
"""

from collections.abc import Callable

from nbdbackup.errors import ConflictError, NotFoundError
from nbdbackup.job.events import Json
from nbdbackup.job.job import Job
from nbdbackup.monitor.commands import command
from nbdbackup.monitor.context import Services
from nbdbackup.monitor.errors import DeviceNotActiveError
from nbdbackup.monitor.schema import Arguments, NoArguments


class JobArguments(Arguments, frozen=True, kw_only=True):
    id: str


class BlockJobArguments(Arguments, frozen=True, kw_only=True):
    device: str


class BlockJobCancelArguments(Arguments, frozen=True, kw_only=True):
    device: str
    force: bool = False


class BlockJobSpeedArguments(Arguments, frozen=True, kw_only=True):
    device: str
    speed: int


Verb = Callable[[Job], None]

_VERBS: dict[str, Verb] = {
    "cancel": Job.cancel,
    "pause": Job.pause,
    "resume": Job.resume,
    "complete": Job.complete,
    "finalize": Job.finalize,
    "dismiss": Job.dismiss,
}


def _block_job(services: Services, job_id: str) -> Job:
    try:
        return services.jobs.get(job_id)
    except NotFoundError:
        raise DeviceNotActiveError(f"Block job '{job_id}' not found") from None


def _add_job_command(name: str, verb: Verb) -> None:
    @command(f"job-{name}", JobArguments)
    async def run_verb(services: Services, arguments: JobArguments) -> Json:
        verb(services.jobs.get(arguments.id))
        return {}


def _add_block_job_command_by_device(name: str, verb: Verb) -> None:
    @command(f"block-job-{name}", BlockJobArguments)
    async def run_verb(services: Services, arguments: BlockJobArguments) -> Json:
        verb(_block_job(services, arguments.device))
        return {}


def _add_block_job_command_by_id(name: str, verb: Verb) -> None:
    @command(f"block-job-{name}", JobArguments)
    async def run_verb(services: Services, arguments: JobArguments) -> Json:
        verb(_block_job(services, arguments.id))
        return {}


for _name, _verb in _VERBS.items():
    _add_job_command(_name, _verb)
for _name in ("pause", "resume", "complete"):
    _add_block_job_command_by_device(_name, _VERBS[_name])
for _name in ("finalize", "dismiss"):
    _add_block_job_command_by_id(_name, _VERBS[_name])


@command("block-job-cancel", BlockJobCancelArguments)
async def block_job_cancel(services: Services, arguments: BlockJobCancelArguments) -> Json:
    job = _block_job(services, arguments.device)
    if job.is_paused and not arguments.force:
        raise ConflictError(f"The block job for device '{arguments.device}' is currently paused")
    job.cancel()
    return {}


@command("block-job-set-speed", BlockJobSpeedArguments)
async def block_job_set_speed(services: Services, arguments: BlockJobSpeedArguments) -> Json:
    _block_job(services, arguments.device).set_speed(arguments.speed)
    return {}


@command("query-jobs", NoArguments)
async def query_jobs(services: Services, arguments: NoArguments) -> Json:
    del arguments
    return [_with_error(job, _job_info(job)) for job in services.jobs]


@command("query-block-jobs", NoArguments)
async def query_block_jobs(services: Services, arguments: NoArguments) -> Json:
    del arguments
    return [_with_error(job, _block_job_info(job)) for job in services.jobs]


def _job_info(job: Job) -> dict[str, Json]:
    return {
        "id": job.id,
        "type": job.type,
        "status": job.status.value,
        "current-progress": job.current_progress,
        "total-progress": job.total_progress,
    }


def _block_job_info(job: Job) -> dict[str, Json]:
    return {
        "type": job.type,
        "device": job.id,
        "len": job.total_progress,
        "offset": job.current_progress,
        "busy": job.is_busy,
        "paused": job.is_paused,
        "speed": job.speed,
        "io-status": job.io_status.value,
        "ready": False,
        "status": job.status.value,
        "auto-finalize": job.auto_finalize,
        "auto-dismiss": job.auto_dismiss,
    }


def _with_error(job: Job, info: dict[str, Json]) -> dict[str, Json]:
    """`info`, with what is only told if there is something to tell."""
    if job.is_kept:
        info["x-nbdbackup-kept"] = True
    if job.paused_because:
        info["x-nbdbackup-paused-because"] = job.paused_because
    if job.source_errors_ignored:
        info["x-nbdbackup-source-errors-ignored"] = job.source_errors_ignored
    return info if job.error is None else info | {"error": job.error}
