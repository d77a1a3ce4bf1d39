"""Chains of incremental backups (QEMU's test 124): what is copied, and what a failure leaves."""

import pytest

from nbdbackup.job.events import Json
from tests.oracle.backups import BY_HAND, HELD, ONE_BY_ONE, finish, start
from tests.oracle.both import CLUSTER, KIB, MIB, Both
from tests.oracle.masks import LENGTH, PROGRESS
from tests.oracle.script import script
from tests.oracle.test_errors import faulty


async def _chain(both: Both, size: int, **bitmap: Json) -> None:
    """`disk` with a bitmap `b` since a full backup to `target`."""
    await both.disk("disk", size, (0, size, 1))
    await both.disk("target", size)
    await both.serve("disk")
    full: dict[str, Json] = {"device": "disk", "target": "target", "job-id": "full", "sync": "full"}
    await both.run("block-dirty-bitmap-add", node="disk", name="b", **bitmap)
    await both.run("blockdev-backup", **full)
    await both.wait("full", "null")


@pytest.mark.parametrize("granularity", [512, 4 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, MIB])
@script()
async def test_incremental_onto_the_full_one(both: Both, granularity: int) -> None:
    await _chain(both, 2 * MIB, granularity=granularity)
    for byte, writes in (
        (2, ["0 512", "100k 1k", "1M 200k"]),
        (3, ["65535 2", "2047k 1k"]),
        (4, []),
        (5, ["0 2M"]),
    ):
        if writes:
            await both.io("disk", *(f"write -P {byte} {write}" for write in writes))
        await start(both, sync="incremental", bitmap="b", **BY_HAND)
        await both.wait("j", "pending")
        # What was copied, and of how much: the dirty ranges, rounded out to clusters.
        await both.run("query-jobs")
        await both.run("query-block-jobs")
        await both.bitmaps()
        await both.run("job-finalize", id="j")
        await both.wait("j", "concluded")
        await both.run("job-dismiss", id="j")
        await both.wait("j", "null")
        await both.bitmaps()
        both.expect_content("target.img", both.content("disk.img"))


@pytest.mark.parametrize("size", [65537, 4097, 3 * CLUSTER - 512])
@script()
async def test_incremental_of_an_odd_size(both: Both, size: int) -> None:
    for job in ("full", "j"):
        both.imprecise(job, LENGTH, PROGRESS)
    await _chain(both, size, granularity=4096)
    await both.io("disk", f"write -P 2 {size - 1} 1")
    await start(both, sync="incremental", bitmap="b", **BY_HAND)
    await finish(both)
    both.expect_content("target.img", both.content("disk.img", size))
    await both.bitmaps()


@script()
async def test_only_what_the_bitmap_says_is_copied(both: Both) -> None:
    await both.disk("disk", MIB, (0, MIB, 1))
    await both.disk("target", MIB, (0, MIB, 9))
    await both.serve("disk")
    await both.run("block-dirty-bitmap-add", node="disk", name="b", granularity=512)
    await both.io("disk", "write -P 2 100k 512", "write -z 512k 1k")
    await start(both, sync="incremental", bitmap="b")
    await both.wait("j", "null")
    expected = bytearray(bytes([9]) * MIB)
    disk = both.content("disk.img")
    for cluster in (1, 8):
        place = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
        expected[place] = disk[place]
    both.expect_content("target.img", bytes(expected))


@script()
async def test_a_failed_incremental_can_be_repeated(both: Both) -> None:
    both.imprecise("j", PROGRESS)
    await both.disk("disk", MIB, (0, MIB, 1))
    await both.file("target.img", MIB)
    await faulty(both, "target", "EIO", "pwrite", "zero")
    await both.serve("disk")
    await both.run("block-dirty-bitmap-add", node="disk", name="b")
    await both.io("disk", "write -P 2 0 64k", "write -P 3 512k 128k")
    both.touch("fail")
    await start(both, sync="incremental", bitmap="b", **ONE_BY_ONE)
    await both.wait("j", "null")
    await both.bitmaps()
    await both.bitmap("disk", "b")
    both.remove("fail")
    await both.io("disk", "write -P 4 256k 64k")
    await start(both, sync="incremental", bitmap="b", **ONE_BY_ONE)
    await both.wait("j", "null")
    await both.bitmaps()
    both.content("target.img")


@script()
async def test_writes_while_an_incremental_is_paused(both: Both) -> None:
    both.imprecise("j", PROGRESS)
    await _chain(both, MIB)
    await both.io("disk", "write -P 2 0 512k")
    before = both.content("disk.img")
    await start(both, sync="incremental", bitmap="b", **BY_HAND, **HELD)
    await both.wait("j", "running")
    await both.run("job-pause", id="j")
    await both.wait_query("j", "paused")
    await both.io("disk", "write -P 3 256k 512k")
    await both.run("job-resume", id="j")
    await both.run("block-job-set-speed", device="j", speed=0)
    await finish(both)
    both.expect_content("target.img", before)
    assert await both.bitmap("disk", "b") == [(256 * KIB, 512 * KIB)]


@script()
async def test_two_bitmaps_of_one_disk_go_their_own_ways(both: Both) -> None:
    await _chain(both, MIB)
    await both.run("block-dirty-bitmap-add", node="disk", name="c")
    await both.io("disk", "write -P 2 0 64k")
    await start(both, sync="incremental", bitmap="b")
    await both.wait("j", "null")
    await both.io("disk", "write -P 3 128k 64k")
    await both.bitmaps()
    await start(both, sync="incremental", bitmap="c")
    await both.wait("j", "null")
    await both.bitmaps()
    assert await both.bitmap("disk", "b") == [(128 * KIB, 64 * KIB)]


@script()
async def test_none_with_a_bitmap_is_refused(both: Both) -> None:
    await _chain(both, MIB)
    backup: dict[str, Json] = {"device": "disk", "target": "target", "job-id": "j", "bitmap": "b"}
    for mode in ("on-success", "never", "always"):
        await both.fail("blockdev-backup", **backup, sync="none", **{"bitmap-mode": mode})
    await both.bitmaps()
