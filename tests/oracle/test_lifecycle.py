"""The life of a backup job: states, verbs, events (QEMU's test 219)."""

import pytest

from nbdbackup.job.events import Json
from tests.oracle import differences
from tests.oracle.backups import BY_HAND, HELD, cancel, disks, finish, start
from tests.oracle.both import CLUSTER, MIB, Both
from tests.oracle.masks import BUSY, PROGRESS
from tests.oracle.script import script

VERBS = ("cancel", "pause", "resume", "complete", "finalize", "dismiss")
BY_ID = {"finalize", "dismiss"}


@script()
async def test_full_backup(both: Both) -> None:
    await both.disk("disk", MIB, (0, 3 * CLUSTER, 1), (8 * CLUSTER, 512, 2))
    await both.disk("target", MIB)
    await start(both)
    await both.wait("j", "null")
    both.expect_content("target.img", both.content("disk.img"))


@pytest.mark.parametrize("finalize", [True, False])
@pytest.mark.parametrize("dismiss", [True, False])
@pytest.mark.parametrize("end", ["complete", "cancel", "cancel pending"])
@script()
async def test_what_is_automatic_at_the_end(both: Both, finalize: bool, dismiss: bool, end: str) -> None:
    await disks(both)
    options: dict[str, Json] = {"auto-finalize": finalize, "auto-dismiss": dismiss}
    if end == "cancel":
        both.imprecise("j", PROGRESS)
        await start(both, **options, **HELD)
        await both.wait("j", "running")
        await both.run("job-cancel", id="j")
    else:
        await start(both, **options)
        if not finalize:
            await both.wait("j", "pending")
            await both.run("query-jobs")
            await both.run("query-block-jobs")
            verb = "job-finalize" if end == "complete" else "job-cancel"
            await both.run(verb, id="j")
    if not dismiss:
        await both.wait("j", "concluded")
        await both.less(PROGRESS).run("query-jobs")
        await both.less(PROGRESS).run("query-block-jobs")
        await both.fail("job-finalize", id="j")
        await both.run("job-dismiss", id="j")
    await both.wait("j", "null")
    await both.run("query-jobs")
    await both.fail("job-dismiss", id="j")


AFTER = {
    ("running", "pause"): "paused",
    ("running", "cancel"): "concluded",
    ("paused", "resume"): "running",
    ("paused", "cancel"): "concluded",
    ("pending", "finalize"): "concluded",
    ("pending", "cancel"): "concluded",
}
"""The state that a verb leads to from another; where it stays as it is left out."""


async def _reach(both: Both, job: str, status: str) -> None:
    """Start `job` and bring it to `status`."""
    both.imprecise(job, PROGRESS)
    await start(both, job, **BY_HAND, **({} if status == "pending" else HELD))
    if status == "paused":
        await both.run("job-pause", id=job)
    if status == "concluded":
        await both.run("job-cancel", id=job)
    await both.wait_query(job, status)


async def _end(both: Both, job: str, status: str) -> None:
    """From `status` to its end."""
    if status != "concluded":
        await both.run("job-cancel", id=job)
        await both.wait_query(job, "concluded")
    await both.run("job-dismiss", id=job)
    await both.wait(job, "null")


@pytest.mark.parametrize("status", ["running", "paused", "pending", "concluded"])
@script()
async def test_every_verb_in_a_state(both: Both, status: str) -> None:
    await disks(both)
    for family in ("job", "block-job"):
        for verb in VERBS:
            job = f"{family}-{verb}"
            await _reach(both, job, status)
            name = "device" if family == "block-job" and verb not in BY_ID else "id"
            error = await both.either(f"{family}-{verb}", **{name: job})
            after = status if error else AFTER.get((status, verb), status)
            if (status, verb) == ("concluded", "dismiss"):
                await both.wait(job, "null")
                continue
            await both.wait_query(job, after)
            await _end(both, job, after)


@script()
async def test_every_verb_of_a_job_that_does_not_exist(both: Both) -> None:
    for verb in VERBS:
        await both.fail(f"job-{verb}", id="nope")
        await both.fail(f"block-job-{verb}", **{"id" if verb in BY_ID else "device": "nope"})
    await both.fail("block-job-set-speed", device="nope", speed=1)


@pytest.mark.parametrize("pause", ["job-pause", "block-job-pause"])
@pytest.mark.parametrize("resume", ["job-resume", "block-job-resume"])
@script()
async def test_pause_and_resume(both: Both, pause: str, resume: str) -> None:
    await disks(both)
    await start(both, **BY_HAND, **HELD)
    await both.wait("j", "running")
    await both.run(pause, **{"id" if pause == "job-pause" else "device": "j"})
    await both.wait_query("j", "paused")
    await both.less(PROGRESS).run("query-jobs")
    await both.less(PROGRESS, BUSY).run("query-block-jobs")
    await both.run("block-job-set-speed", device="j", speed=0)
    await both.fail(pause, **{"id" if pause == "job-pause" else "device": "j"})
    await both.run(resume, **{"id" if resume == "job-resume" else "device": "j"})
    await both.fail("job-resume", id="j")
    await finish(both)
    both.expect_content("target.img", both.content("disk.img"))


@script()
async def test_a_job_paused_twice_by_both_families_is_resumed_once(both: Both) -> None:
    await disks(both)
    await start(both, **HELD)
    await both.wait("j", "running")
    await both.run("job-pause", id="j")
    await both.wait_query("j", "paused")
    await both.either("block-job-pause", device="j")
    await both.run("block-job-resume", device="j")
    await both.wait_query("j", "running")
    await both.either("job-resume", id="j")
    await cancel(both)


@script()
async def test_speed(both: Both) -> None:
    await disks(both)
    await start(both, **HELD)
    await both.wait("j", "running")
    for speed in (1, 2, 3):
        await both.run("block-job-set-speed", device="j", speed=speed)
        await both.less(PROGRESS, BUSY).run("query-block-jobs")
    for bad in (-1, -(1 << 63)):
        await both.fail("block-job-set-speed", device="j", speed=bad)
    await both.less(PROGRESS, BUSY).run("query-block-jobs")
    await both.run("block-job-set-speed", device="j", speed=0)
    await both.wait("j", "null")
    both.expect_content("target.img", both.content("disk.img"))


@script()
async def test_starting_with_a_bad_speed_or_id(both: Both) -> None:
    await disks(both)
    backup: dict[str, Json] = {"device": "disk", "target": "target", "sync": "full"}
    both.events_differ("bad", differences.REFUSED_JOB_EVENTS)
    await both.fail("blockdev-backup", **backup, job_id="bad", speed=-1)
    for bad in ("", "1", "-j", "j j", "j/j", "\u00e4", "j@k"):
        await both.fail("blockdev-backup", **backup, job_id=bad)
    await both.run("query-jobs")
    await start(both, **HELD)
    await both.disk("other", MIB)
    await both.fail("blockdev-backup", **{**backup, "target": "other"}, job_id="j")
    await cancel(both)


@script()
async def test_the_job_is_called_as_its_device_if_nobody_names_it(both: Both) -> None:
    await disks(both)
    await both.part(
        differences.JOB_ID_DEFAULT, "accepted", "blockdev-backup", device="disk", target="target", sync="full"
    )


@script()
async def test_two_jobs_at_once(both: Both) -> None:
    await disks(both)
    await both.disk("other", MIB)
    for job, target in (("first", "target"), ("second", "other")):
        both.imprecise(job, PROGRESS)
        await start(both, job, target=target, **HELD)
        await both.wait(job, "running")
    await both.less(PROGRESS).differing(differences.LIST_ORDER).run("query-jobs")
    await both.less(PROGRESS, BUSY).differing(differences.LIST_ORDER).run("query-block-jobs")
    for job in ("first", "second"):
        await cancel(both, job)


@script()
async def test_what_a_running_job_uses_cannot_be_removed(both: Both) -> None:
    await disks(both)
    await start(both, **HELD)
    await both.wait("j", "running")
    for node in ("disk", "target"):
        await both.fail("blockdev-del", node_name=node)
    await both.fail("blockdev-backup", device="disk", target="target", sync="full", job_id="k")
    await both.fail("blockdev-backup", device="target", target="disk", sync="full", job_id="k")
    await cancel(both)
    await both.run("blockdev-del", node_name="target")
    await both.run("blockdev-del", node_name="disk")
