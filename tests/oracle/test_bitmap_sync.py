"""Which bitmap survives which end of a backup (QEMU's test 257): the whole matrix."""

import pytest

from nbdbackup.job.events import Json
from tests.oracle.backups import BY_HAND, HELD, start
from tests.oracle.both import CLUSTER, MIB, Both
from tests.oracle.masks import PROGRESS
from tests.oracle.script import script

BAD_CLUSTER = 9
"""The target refuses this one where a job is to fail in the middle."""

COMBINATIONS = [
    ("bitmap", "never"),
    ("bitmap", "on-success"),
    ("bitmap", "always"),
    ("full", "on-success"),
    ("full", "always"),
    ("top", "on-success"),
    ("top", "always"),
]


def at(cluster: int, clusters: int = 1) -> str:
    """Where, as qemu-io wants it."""
    return f"{cluster * CLUSTER} {clusters * CLUSTER}"


async def _target(both: Both, fails: bool) -> None:
    """The node `target`, which refuses one cluster if it `fails`."""
    if not fails:
        await both.disk("target", MIB)
        return
    await both.file("target.img", MIB)
    first = BAD_CLUSTER * CLUSTER
    protect = f"protect={first}-{first + CLUSTER - 1}"
    await both.nbdkit("target", "--filter=protect", "file", "{dir}/target.img", protect)


async def _end(both: Both, outcome: str) -> None:
    if outcome == "failed in the middle":
        await both.run("block-job-set-speed", device="j", speed=0)
    else:
        await both.wait("j", "pending")
        # Writes that come after the copying and before the end: the successor has them.
        await both.io("disk", f"write -P 6 {at(0)}", f"write -P 6 {at(13, 2)}")
        await both.bitmaps()
        verb = "job-finalize" if outcome == "finished" else "job-cancel"
        await both.run(verb, id="j")
    await both.wait("j", "concluded")
    await both.less(PROGRESS).run("query-jobs")
    await both.run("job-dismiss", id="j")
    await both.wait("j", "null")


@pytest.mark.parametrize(("sync", "mode"), COMBINATIONS)
@pytest.mark.parametrize("outcome", ["finished", "cancelled before finalize", "failed in the middle"])
@script()
async def test_which_bits_are_left(both: Both, sync: str, mode: str, outcome: str) -> None:
    fails = outcome == "failed in the middle"
    if fails or outcome == "cancelled before finalize":
        both.imprecise("j", PROGRESS)
    await both.disk("disk", MIB, (0, MIB, 1))
    await _target(both, fails)
    await both.serve("disk")
    await both.run("block-dirty-bitmap-add", node="disk", name="b0")
    await both.io("disk", f"write -P 2 {at(1, 3)}", f"write -P 3 {at(7, 5)}", f"write -P 4 {at(14)}")
    await both.bitmaps()
    options: dict[str, Json] = {"bitmap": "b0", "bitmap-mode": mode, **BY_HAND}
    await start(both, sync=sync, **options, **HELD)
    await both.wait("j", "running")
    await both.bitmaps()
    # Into the bitmap's clusters and beside them, ahead of the job.
    await both.io("disk", f"write -P 5 {at(11)}", f"write -P 5 {at(12)}")
    await both.bitmaps()
    if not fails:
        await both.run("block-job-set-speed", device="j", speed=0)
    await _end(both, outcome)
    await both.bitmaps()
    await both.bitmap("disk", "b0")
    both.content("target.img")
    await _next_backup(both)


async def _next_backup(both: Both) -> None:
    """What the bitmap says now is what the next backup copies."""
    await both.disk("second", MIB)
    await start(both, "k", sync="incremental", target="second", bitmap="b0")
    await both.wait("k", "null")
    both.content("second.img")
    await both.bitmaps()
    assert await both.bitmap("disk", "b0") == []


SYNC_MODES = ("incremental", "bitmap", "full", "top", "none")
BITMAPS = (None, "b404", "b0")
BITMAP_MODES = (None, "on-success", "never", "always", "bogus")


@pytest.mark.parametrize("sync", SYNC_MODES)
@script()
async def test_what_is_refused(both: Both, sync: str) -> None:
    await both.disk("disk", MIB, (0, MIB, 1))
    await both.disk("target", MIB)
    await both.run("block-dirty-bitmap-add", node="disk", name="b0")
    for bitmap in BITMAPS:
        for mode in BITMAP_MODES:
            job = f"{bitmap}-{mode}"
            more: dict[str, Json] = {} if bitmap is None else {"bitmap": bitmap}
            if mode is not None:
                more["bitmap-mode"] = mode
            backup: dict[str, Json] = {"device": "disk", "target": "target", "sync": sync, "job-id": job}
            both.imprecise(job, PROGRESS)
            error = await both.either("blockdev-backup", **backup, **more)
            if not error:
                if sync == "none":
                    await both.run("job-cancel", id=job)
                await both.wait(job, "null")
    await both.run("query-jobs")
    await both.bitmaps()
