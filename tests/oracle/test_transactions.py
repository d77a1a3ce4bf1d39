"""Transactions: all or nothing, at one instant; jobs that end together (QEMU's tests 124, 257, 056)."""

import pytest

from nbdbackup.job.events import Json
from tests.oracle import differences
from tests.oracle.backups import BY_HAND, HELD, ONE_BY_ONE
from tests.oracle.both import CLUSTER, MIB, Both
from tests.oracle.masks import PROGRESS
from tests.oracle.script import script
from tests.oracle.side import NewerQemuSide

Action = tuple[str, dict[str, Json]]

MODES = (None, "individual", "grouped")


async def pair(both: Both, *, fails: bool) -> None:
    """`disk0` and `disk1` with a bitmap `b` each, written to; `target1` refuses a cluster if it `fails`."""
    for number in (0, 1):
        await both.disk(f"disk{number}", MIB, (0, MIB, 1 + number))
        await both.serve(f"disk{number}")
        await both.run("block-dirty-bitmap-add", node=f"disk{number}", name="b")
        await both.io(f"disk{number}", "write -P 5 0 64k", "write -P 6 256k 256k")
    await both.disk("target0", MIB)
    if fails:
        await both.file("target1.img", MIB)
        protect = f"protect={5 * CLUSTER}-{6 * CLUSTER - 1}"
        await both.nbdkit("target1", "--filter=protect", "file", "{dir}/target1.img", protect)
    else:
        await both.disk("target1", MIB)


def backup(number: int, **options: Json) -> Action:
    """The backup of one of the pair, as the job jN."""
    arguments: dict[str, Json] = {
        "device": f"disk{number}",
        "target": f"target{number}",
        "job-id": f"j{number}",
        "sync": "incremental",
        "bitmap": "b",
    }
    return ("blockdev-backup", {**arguments, **options})


async def after(both: Both) -> None:
    """What is left of the pair."""
    await both.run("query-jobs")
    await both.bitmaps()
    for number in (0, 1):
        await both.bitmap(f"disk{number}", "b")
        both.content(f"target{number}.img")


@pytest.mark.parametrize("mode", MODES)
@script()
async def test_two_backups_that_succeed(both: Both, mode: str | None) -> None:
    await pair(both, fails=False)
    await both.transaction(backup(0), backup(1), mode=mode)
    await both.wait("j0", "null")
    await both.wait("j1", "null")
    await after(both)


@pytest.mark.parametrize("mode", MODES)
@script()
async def test_one_of_two_backups_fails(both: Both, mode: str | None) -> None:
    both.imprecise("j0", PROGRESS)
    both.imprecise("j1", PROGRESS)
    await pair(both, fails=True)
    # The first is held until the second has failed, lest it be a race which of them ends first.
    await both.transaction(backup(0, **HELD), backup(1, **ONE_BY_ONE), mode=mode)
    await both.wait("j1", "null")
    if mode != "grouped":
        await both.bitmaps()
        await both.run("block-job-set-speed", device="j0", speed=0)
    await both.wait("j0", "null")
    await both.run("query-jobs")
    await both.bitmaps()
    for number in (0, 1):
        await both.bitmap(f"disk{number}", "b")


@pytest.mark.parametrize("mode", MODES)
@script()
async def test_one_of_two_backups_is_cancelled(both: Both, mode: str | None) -> None:
    both.imprecise("j0", PROGRESS)
    both.imprecise("j1", PROGRESS)
    await pair(both, fails=False)
    await both.transaction(backup(0, **HELD), backup(1, **HELD), mode=mode)
    await both.wait("j0", "running")
    await both.wait("j1", "running")
    await both.io("disk0", "write -P 7 0 1M")
    await both.run("job-cancel", id="j0")
    await both.wait("j0", "null")
    if mode != "grouped":
        await both.run("job-cancel", id="j1")
    await both.wait("j1", "null")
    await both.run("query-jobs")
    await both.bitmaps()


@script()
async def test_a_job_with_nothing_to_do_waits_for_the_one_that_fails(both: Both) -> None:
    both.imprecise("j1", PROGRESS)
    await pair(both, fails=True)
    await both.run("block-dirty-bitmap-clear", node="disk0", name="b")
    await both.transaction(backup(0), backup(1, **ONE_BY_ONE), mode="grouped")
    await both.wait("j0", "null")
    await both.wait("j1", "null")
    await both.bitmaps()
    assert await both.bitmap("disk0", "b") == []


@pytest.mark.parametrize("which", [0, 1])
@script()
async def test_finalizing_one_of_a_group_finalizes_all(both: Both, which: int) -> None:
    await pair(both, fails=False)
    await both.transaction(backup(0, **BY_HAND), backup(1, **BY_HAND), mode="grouped")
    for job in ("j0", "j1"):
        await both.wait(job, "pending")
    await both.run("job-finalize", id=f"j{which}")
    for job in ("j0", "j1"):
        await both.wait(job, "concluded")
        await both.run("job-dismiss", id=job)
        await both.wait(job, "null")
    await after(both)


@pytest.mark.parametrize("which", [0, 1])
@script()
async def test_cancelling_one_of_a_pending_group_cancels_all(both: Both, which: int) -> None:
    await pair(both, fails=False)
    await both.transaction(backup(0, **BY_HAND), backup(1, **BY_HAND), mode="grouped")
    for job in ("j0", "j1"):
        await both.wait(job, "pending")
    await both.io("disk0", "write -P 7 768k 64k")
    await both.run("job-cancel", id=f"j{which}")
    for job in ("j0", "j1"):
        await both.wait(job, "concluded")
    await both.differing(differences.LIST_ORDER).run("query-jobs")
    for job in ("j0", "j1"):
        await both.run("job-dismiss", id=job)
        await both.wait(job, "null")
    await after(both)


@script()
async def test_a_group_of_which_only_one_is_finalized_by_hand(both: Both) -> None:
    await pair(both, fails=False)
    await both.transaction(backup(0), backup(1, **BY_HAND), mode="grouped")
    await both.wait("j1", "pending")
    await both.run("job-finalize", id="j1")
    await both.wait("j0", "null")
    await both.wait("j1", "concluded")
    await both.run("job-dismiss", id="j1")
    await both.wait("j1", "null")
    await after(both)


def bitmap(verb: str, name: str = "b", **more: Json) -> Action:
    """A change of a bitmap of disk0."""
    return (f"block-dirty-bitmap-{verb}", {"node": "disk0", "name": name, **more})


MERGE: Action = ("block-dirty-bitmap-merge", {"node": "disk0", "target": "c", "bitmaps": ["b"]})
ABORT: Action = ("abort", {})

CHANGES: dict[str, list[Action]] = {
    "add": [bitmap("add", "new", granularity=512)],
    "clear": [bitmap("clear")],
    "clear twice": [bitmap("clear"), bitmap("clear")],
    "enable": [bitmap("enable", "c")],
    "disable": [bitmap("disable")],
    "disable and enable": [bitmap("disable"), bitmap("enable")],
    "merge": [MERGE],
    "merge and clear": [MERGE, bitmap("clear")],
    "clear and merge": [bitmap("clear"), MERGE],
    "remove": [bitmap("remove")],
    "add and merge": [
        bitmap("add", "new", disabled=True),
        ("block-dirty-bitmap-merge", {"node": "disk0", "target": "new", "bitmaps": ["b", "c"]}),
    ],
    "switch": [bitmap("add", "new"), bitmap("disable")],
    "add and back up": [
        bitmap("add", "new"),
        backup(0, sync="full", bitmap="b", **{"bitmap-mode": "on-success"}),
    ],
    "clear and back up": [
        bitmap("clear"),
        ("blockdev-backup", {"device": "disk0", "target": "target0", "job-id": "j0", "sync": "full"}),
    ],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("aborts", [False, True], ids=["committed", "aborted"])
@script()
async def test_changes_of_bitmaps(both: Both, change: str, aborts: bool) -> None:
    await pair(both, fails=False)
    await both.run("block-dirty-bitmap-add", node="disk0", name="c", disabled=True)
    actions = CHANGES[change]
    has_job = any(name == "blockdev-backup" for name, _ in actions)
    await both.transaction(*actions, *([ABORT] if aborts else []), fails=aborts)
    if has_job and not aborts:
        await both.wait("j0", "null")
    await both.bitmaps()
    await both.io("disk0", "write -P 9 768k 64k")
    infos = await both.bitmaps()
    for info in infos["disk0"] if isinstance(infos["disk0"], list) else []:
        assert isinstance(info, dict)
        await both.bitmap("disk0", str(info["name"]))
    await both.run("query-jobs")
    both.content("target0.img")


@script()
async def test_an_aborted_backup_that_always_synchronizes(both: Both) -> None:
    await pair(both, fails=False)
    always = backup(0, sync="full", **{"bitmap-mode": "always"})
    await both.transaction(always, ABORT, fails=True)
    await both.bitmaps(differs=differences.ABORTED_ALWAYS)


REFUSED: dict[str, list[Action]] = {
    "remove and add": [bitmap("remove"), bitmap("add")],
    "remove twice": [bitmap("remove"), bitmap("remove")],
    "clear of what was removed": [bitmap("remove"), bitmap("clear")],
    "add twice": [bitmap("add", "new"), bitmap("add", "new")],
    "second merge fails": [MERGE, ("block-dirty-bitmap-merge", {**MERGE[1], "bitmaps": ["nope"]})],
    "second backup fails": [backup(0), backup(1, target="nope")],
    "same bitmap in two backups": [backup(0), backup(0, **{"job-id": "k", "target": "target1"})],
    "same job twice": [backup(0), backup(1, **{"job-id": "j0"})],
    "clear of a bitmap that a backup uses": [backup(0), bitmap("clear")],
    "unknown node": [bitmap("clear"), ("block-dirty-bitmap-clear", {"node": "nope", "name": "b"})],
    "not in a transaction": [("query-jobs", {})],
    "unknown action": [("bogus", {})],
    "bad data": [("block-dirty-bitmap-clear", {"node": "disk0"})],
    "excess data": [("abort", {"x": 1})],
    "wrong type": [("block-dirty-bitmap-clear", {"node": 5, "name": "b"})],
}


@pytest.mark.parametrize("what", REFUSED)
@script()
async def test_a_transaction_that_is_refused_changes_nothing(both: Both, what: str) -> None:
    await pair(both, fails=False)
    await both.run("block-dirty-bitmap-add", node="disk0", name="c", disabled=True)
    before = await both.bitmaps()
    await both.transaction(*REFUSED[what], fails=True)
    assert await both.bitmaps() == before
    await both.run("query-jobs")
    await both.bitmap("disk0", "b")


@script()
async def test_malformed_transactions(both: Both) -> None:
    await both.fail("transaction")
    await both.run("transaction", actions=[])
    await both.fail("transaction", actions=5)
    await both.fail("transaction", actions=[5])
    await both.fail("transaction", actions=[{}])
    await both.fail("transaction", actions=[{"type": "abort"}])
    await both.fail("transaction", actions=[{"data": {}}])
    await both.fail("transaction", actions=[{"type": "abort", "data": {}}])
    await both.fail("transaction", actions=[{"type": "abort", "data": {}, "x": 1}])
    await both.fail("transaction", actions=[], properties={"completion-mode": "bogus"})
    await both.fail("transaction", actions=[], properties={"x": 1})
    await both.run("transaction", actions=[], properties={})


@script(reference=NewerQemuSide)
async def test_grouped_completion_is_for_jobs_alone(both: Both) -> None:
    await pair(both, fails=False)
    await both.transaction(bitmap("clear"), mode="grouped", fails=True)
    await both.transaction(ABORT, mode="grouped", fails=True)
    await both.transaction(backup(0), bitmap("add", "new"), mode="grouped", fails=True)
    await both.bitmaps()
    await both.run("query-jobs")


@script()
async def test_bitmap_and_point_in_time_are_one_instant(both: Both) -> None:
    await pair(both, fails=False)
    before = both.content("disk0.img")
    full: dict[str, Json] = {"device": "disk0", "target": "target0", "sync": "full", "job-id": "j0"}
    await both.transaction(bitmap("add", "new"), ("blockdev-backup", {**full, **HELD, **BY_HAND}))
    await both.wait("j0", "running")
    await both.io("disk0", "write -P 9 512k 128k")
    await both.run("block-job-set-speed", device="j0", speed=0)
    await both.wait("j0", "pending")
    await both.run("job-finalize", id="j0")
    await both.wait("j0", "concluded")
    both.expect_content("target0.img", before)
    assert await both.bitmap("disk0", "new") == [(512 * 1024, 128 * 1024)]
    await both.run("job-dismiss", id="j0")
    await both.wait("j0", "null")
