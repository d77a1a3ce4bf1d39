"""What a job does when a disk fails it: the error policies, and what they tell (QEMU's tests 055, 056)."""

import pytest

from nbdbackup.job.events import Json
from tests.oracle.backups import BY_HAND, ONE_BY_ONE, start
from tests.oracle.both import CLUSTER, MIB, Both
from tests.oracle.masks import BUSY, PROGRESS
from tests.oracle.script import script

POLICIES = ("report", "ignore", "stop", "enospc", "auto")
ERRORS = ("EIO", "ENOSPC")

OUTCOME = {
    **{("report", error): "report" for error in ERRORS},
    **{("ignore", error): "ignore" for error in ERRORS},
    **{("stop", error): "stop" for error in ERRORS},
    **{(policy, "EIO"): "report" for policy in ("enospc", "auto")},
    **{(policy, "ENOSPC"): "stop" for policy in ("enospc", "auto")},
}


async def faulty(both: Both, node: str, error: str, *operations: str) -> None:
    """The node `node` on nbdkit, whose `operations` fail as long as the file `fail` is there."""
    options = [
        word
        for operation in operations
        for word in (
            f"error-{operation}={error}",
            f"error-{operation}-rate=100%",
            f"error-{operation}-file={{dir}}/fail",
        )
    ]
    await both.nbdkit(node, "--filter=error", "file", f"{{dir}}/{node}.img", *options)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["source", "target"])
@script()
async def test_error_policy(both: Both, policy: str, error: str, where: str) -> None:
    both.imprecise("j", PROGRESS)
    for node, operations in (("disk", ["pread"]), ("target", ["pwrite", "zero"])):
        if where == ("source" if node == "disk" else "target"):
            await both.file(f"{node}.img", MIB, *([(0, MIB, 1)] if node == "disk" else []))
            await faulty(both, node, error, *operations)
        else:
            await both.disk(node, MIB, *([(0, MIB, 1)] if node == "disk" else []))
    both.touch("fail")
    options: dict[str, Json] = {f"on-{where}-error": policy, **BY_HAND, **ONE_BY_ONE}
    await start(both, **options)
    await both.wait_event("BLOCK_JOB_ERROR", "j")
    outcome = OUTCOME[policy, error]
    if outcome == "report":
        await both.wait("j", "concluded")
        await both.less(PROGRESS).run("query-jobs")
        await both.less(PROGRESS).run("query-block-jobs")
    else:
        if outcome == "stop":
            await _stopped(both)
            # The error is still there: it comes again.
            await both.run("job-resume", id="j")
            await both.wait_event("BLOCK_JOB_ERROR", "j")
            await _stopped(both)
        both.remove("fail")
        if outcome == "stop":
            await both.run("job-resume", id="j")
        await both.wait("j", "pending")
        await both.run("query-block-jobs")
        await both.run("job-finalize", id="j")
        await both.wait("j", "concluded")
        both.expect_content("target.img", bytes([1]) * MIB)
    await both.run("job-dismiss", id="j")
    await both.wait("j", "null")


async def _stopped(both: Both) -> None:
    await both.wait_query("j", "paused")
    await both.less(PROGRESS, BUSY).run("query-block-jobs")
    await both.less(PROGRESS).run("query-jobs")


@pytest.mark.parametrize("how", ["cancel", "pause"])
@script()
async def test_a_job_stopped_by_an_error(both: Both, how: str) -> None:
    both.imprecise("j", PROGRESS)
    await both.disk("disk", MIB, (0, MIB, 1))
    await both.file("target.img", MIB)
    await faulty(both, "target", "ENOSPC", "pwrite", "zero")
    both.touch("fail")
    options: dict[str, Json] = {"on-target-error": "stop", **ONE_BY_ONE}
    await start(both, **options)
    await both.wait_event("BLOCK_JOB_ERROR", "j")
    await _stopped(both)
    if how == "pause":
        # Two reasons to be paused: one resume ends both.
        await both.either("job-pause", id="j")
        await both.less(PROGRESS, BUSY).run("query-block-jobs")
        both.remove("fail")
        await both.run("job-resume", id="j")
    else:
        await both.run("job-cancel", id="j")
    await both.wait("j", "null")


@script()
async def test_a_client_write_that_cannot_be_saved_fails(both: Both) -> None:
    await both.disk("disk", MIB, (0, MIB, 1))
    await both.file("target.img", MIB)
    await faulty(both, "target", "EIO", "pwrite", "zero")
    await both.serve("disk")
    both.imprecise("j", PROGRESS)
    await start(both, sync="none", **BY_HAND)
    await both.wait("j", "running")
    await both.io("disk", "write -P 2 0 64k")
    both.touch("fail")
    await both.io("disk", "write -P 3 128k 64k", fails=True)
    # What is saved needs no saving.
    await both.io("disk", "write -P 3 0 64k")
    both.remove("fail")
    await both.io("disk", "write -P 4 128k 64k")
    await both.run("job-cancel", id="j")
    await both.wait("j", "concluded")
    await both.run("job-dismiss", id="j")
    expected = bytes([1]) * CLUSTER + bytes(CLUSTER) + bytes([1]) * CLUSTER + bytes(MIB - 3 * CLUSTER)
    both.expect_content("target.img", expected)
    both.content("disk.img")


@script()
async def test_policies_that_are_refused(both: Both) -> None:
    await both.disk("disk", MIB)
    await both.disk("target", MIB)
    backup: dict[str, Json] = {"device": "disk", "target": "target", "sync": "full", "job-id": "j"}
    for which in ("source", "target"):
        for policy in ("bogus", "", 5):
            await both.fail("blockdev-backup", **backup, **{f"on-{which}-error": policy})
