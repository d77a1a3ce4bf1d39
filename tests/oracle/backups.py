"""What many scripts do: start backups in one way or another, hold them in the middle, end them."""

from nbdbackup.job.events import Json
from tests.oracle.both import CLUSTER, MIB, Both
from tests.oracle.masks import PROGRESS

ONE_BY_ONE: dict[str, Json] = {"x-perf": {"max-workers": 1, "max-chunk": CLUSTER}}
"""Copies cluster by cluster in order: when one fails, it is known what was copied."""
HELD: dict[str, Json] = {"speed": 1, **ONE_BY_ONE}
"""Copies a cluster or two and then waits longer than any test."""
BY_HAND: dict[str, Json] = {"auto-finalize": False, "auto-dismiss": False}


async def disks(both: Both, size: int = MIB) -> None:
    """The node `disk` with data here and there, and the node `target` of the same size."""
    fill = (0, size // 2, 1), (size // 2, 512, 2), (size - 512, 512, 3)
    await both.disk("disk", size, *fill, discard="unmap")
    await both.disk("target", size)


async def start(both: Both, job: str = "j", /, **options: Json) -> None:
    """Start a backup of `disk` to `target`, in mode full if `options` do not say otherwise."""
    arguments: dict[str, Json] = {"device": "disk", "target": "target", "sync": "full", "job-id": job}
    await both.run("blockdev-backup", **{**arguments, **options})


async def finish(both: Both, job: str = "j") -> None:
    """Bring a job that is started by hand from pending to its end."""
    await both.wait(job, "pending")
    await both.run("job-finalize", id=job)
    await both.wait(job, "concluded")
    await both.run("job-dismiss", id=job)
    await both.wait(job, "null")


async def cancel(both: Both, job: str = "j") -> None:
    """Cancel a job that goes away by itself."""
    both.imprecise(job, PROGRESS)
    await both.run("job-cancel", id=job)
    await both.wait(job, "null")
