"""What a backup copies (QEMU's tests 055, 056, 241, 304)."""

import pytest

from nbdbackup.job.events import Json
from tests.oracle import differences
from tests.oracle.backups import BY_HAND, HELD, ONE_BY_ONE, cancel, disks, finish, start
from tests.oracle.both import CLUSTER, KIB, MIB, Both
from tests.oracle.masks import LENGTH, PROGRESS
from tests.oracle.script import script


@pytest.mark.parametrize("write", ["0 64k", "32k 64k", "480k 64k", "0 1M", "1023k 1k", "100 700"])
@pytest.mark.parametrize("kind", ["write -P 9", "write -z", "discard"])
@script()
async def test_client_writes_during_a_backup(both: Both, write: str, kind: str) -> None:
    if kind == "discard" and write == "100 700":
        kind = "write -z"
    await disks(both)
    await both.serve("disk")
    before = both.content("disk.img")
    await start(both, **BY_HAND, **HELD)
    await both.wait("j", "running")
    await both.io("disk", f"{kind} {write}")
    await both.io("disk", f"{kind} {write}")
    await both.run("block-job-set-speed", device="j", speed=0)
    await both.wait("j", "pending")
    await both.io("disk", "write -P 8 0 1M")
    await both.run("job-finalize", id="j")
    await both.wait("j", "concluded")
    await both.run("job-dismiss", id="j")
    await both.wait("j", "null")
    both.expect_content("target.img", before)
    both.content("disk.img")


@pytest.mark.parametrize("size", [512, 4097, 65536 - 512, 65537, 3 * 65536 + 100])
@pytest.mark.parametrize("sync", ["full", "none"])
@script()
async def test_sizes(both: Both, size: int, sync: str) -> None:
    await both.disk("disk", size, (0, size, 1), (size - 1, 1, 2))
    await both.disk("target", size)
    await both.serve("disk")
    both.imprecise("j", PROGRESS, LENGTH)
    await start(both, sync=sync, **BY_HAND)
    await both.wait("j", "running")
    await both.io("disk", "write -P 3 0 512", f"write -P 3 {size - 1} 1")
    if sync == "none":
        await both.run("job-cancel", id="j")
        await both.wait("j", "concluded")
        await both.run("job-dismiss", id="j")
    else:
        await finish(both)
    both.content("target.img", size)
    both.content("disk.img", size)


@script()
async def test_sync_none_saves_what_clients_overwrite(both: Both) -> None:
    await disks(both)
    await both.serve("disk")
    both.imprecise("j", PROGRESS)
    await start(both, sync="none")
    await both.wait("j", "running")
    await both.io("disk", "write -P 7 10k 1k", "write -P 7 60k 8k", "write -z 1000k 24k")
    await both.less(PROGRESS).run("query-jobs")
    await both.fail("job-complete", id="j")
    await cancel(both)
    both.content("target.img")


@script()
async def test_discard_during_a_backup(both: Both) -> None:
    await disks(both)
    await both.serve("disk")
    before = both.content("disk.img")
    await start(both, **BY_HAND, **HELD)
    await both.wait("j", "running")
    await both.io("disk", "discard 448k 128k")
    both.content_differs("disk.img", differences.DISCARD_DURING_BACKUP)
    await both.run("block-job-set-speed", device="j", speed=0)
    await finish(both)
    both.expect_content("target.img", before)


@script()
async def test_what_backup_refuses(both: Both) -> None:
    await disks(both)
    await both.disk("small", MIB // 2)
    await both.disk("large", 2 * MIB)
    await both.disk("frozen", MIB, read_only=True)
    backup: dict[str, Json] = {"device": "disk", "target": "target", "sync": "full", "job-id": "j"}
    for change in (
        {"target": "disk"},
        {"target": "nope"},
        {"device": "nope"},
        {"device": "nope", "target": "nope"},
        {"target": "small"},
        {"target": "large"},
        {"target": "frozen"},
        {"sync": "incremental"},
        {"sync": "bitmap"},
        {"sync": "incremental", "bitmap": "nope"},
        {"sync": "full", "bitmap-mode": "never"},
        {"x-perf": {"max-workers": 0}},
        {"x-perf": {"max-workers": -1}},
        {"x-perf": {"max-chunk": -1}},
        {"x-perf": {"max-chunk": 4096}},
        {"x-perf": {"bogus": 1}},
        {"filter-node-name": "disk"},
        {"filter-node-name": "1bad name"},
        {"bogus": 1},
        {"sync": "bogus"},
    ):
        await both.fail("blockdev-backup", **{**backup, **change})
        await both.run("query-jobs")
    await both.differing(differences.COMPRESS).fail("blockdev-backup", **backup, compress=True)


@script()
async def test_cancel_keeps_what_clients_wrote(both: Both) -> None:
    await disks(both)
    await both.serve("disk")
    await start(both, **HELD)
    await both.wait("j", "running")
    await both.io("disk", "write -P 7 0 1M")
    await cancel(both)
    both.content("disk.img")
    await both.io("disk", "read -P 7 0 1M")


@script()
async def test_speed_set_and_lifted_while_running(both: Both) -> None:
    await disks(both)
    await start(both, **BY_HAND, **HELD)
    await both.wait("j", "running")
    await both.run("block-job-set-speed", device="j", speed=0)
    await finish(both)
    both.expect_content("target.img", both.content("disk.img"))


@script()
async def test_top_of_a_sparse_raw_file(both: Both) -> None:
    await both.disk("disk", MIB, (0, MIB // 2, 1))
    await both.disk("target", MIB, (0, MIB, 9))
    both.imprecise("j", PROGRESS, LENGTH)
    await start(both, sync="top")
    await both.wait("j", "null")
    both.expect_content("target.img", bytes([1]) * (MIB // 2))
    both.content_differs("target.img", differences.TOP_OF_RAW)


@script()
async def test_zeroes_overwrite_what_the_target_had(both: Both) -> None:
    await both.disk("disk", MIB, (0, 100 * KIB, 1))
    await both.disk("target", MIB, (0, MIB, 9))
    await start(both)
    await both.wait("j", "null")
    both.expect_content("target.img", both.content("disk.img"))


@pytest.mark.parametrize("workers", [1, 2, 64, (1 << 31) - 1])
@pytest.mark.parametrize("chunk", [0, CLUSTER, CLUSTER + 1, 3 * CLUSTER])
@script()
async def test_perf_options(both: Both, workers: int, chunk: int) -> None:
    await disks(both)
    await start(both, **{"x-perf": {"max-workers": workers, "max-chunk": chunk, "use-copy-range": True}})
    await both.wait("j", "null")
    both.expect_content("target.img", both.content("disk.img"))


@script()
async def test_a_backup_of_a_backup_in_progress(both: Both) -> None:
    await disks(both)
    await both.disk("other", MIB)
    await start(both, **ONE_BY_ONE)
    await both.wait("j", "null")
    await both.run("blockdev-backup", device="target", target="other", sync="full", job_id="k")
    await both.wait("k", "null")
    both.expect_content("other.img", both.content("disk.img"))


@script()
async def test_two_backups_of_one_disk_keep_their_own_instants(both: Both) -> None:
    await disks(both)
    await both.disk("other", MIB)
    await both.serve("disk")
    instants = {"target": both.content("disk.img")}
    await start(both, **HELD)
    await both.wait("j", "running")
    await both.io("disk", "write -P 7 100k 300k")
    instants["other"] = both.content("disk.img")
    await start(both, "k", target="other", **HELD)
    await both.wait("k", "running")
    await both.io("disk", "write -P 8 200k 300k", "discard 900k 64k")
    for job in ("k", "j"):
        await both.run("block-job-set-speed", device=job, speed=0)
        await both.wait(job, "null")
    for target, instant in instants.items():
        both.expect_content(f"{target}.img", instant)
    both.content("disk.img")


@script()
async def test_cancelling_one_of_two_backups_leaves_the_other(both: Both) -> None:
    await disks(both)
    await both.disk("other", MIB)
    await both.serve("disk")
    before = both.content("disk.img")
    await start(both, **HELD)
    await both.wait("j", "running")
    await start(both, "k", target="other", **HELD)
    await both.wait("k", "running")
    await both.io("disk", "write -P 7 100k 300k")
    await cancel(both, "j")
    await both.io("disk", "write -P 8 600k 300k")
    await both.run("block-job-set-speed", device="k", speed=0)
    await both.wait("k", "null")
    both.expect_content("other.img", before)
