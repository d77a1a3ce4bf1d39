"""Fleecing put together by hand, as in QEMU's documentation (its tests image-fleecing, copy-before-write).

The client writes through a copy-before-write filter; snapshot-access shows what was there before.
"""

import pytest

from nbdbackup.job.events import Json
from tests.oracle import differences
from tests.oracle.both import CLUSTER, KIB, MIB, Both
from tests.oracle.script import script
from tests.oracle.side import NewerQemuSide
from tests.oracle.test_errors import faulty

SIZE = 4 * MIB
PATTERNS = [(0x5D, 0), (0xD5, MIB), (0xDC, 2 * MIB), (0xCD, SIZE - CLUSTER)]
"""What the disk holds, a cluster each."""
OVERWRITES = [
    f"write -P 0xab 0 {CLUSTER}",  # full
    f"write -P 0xad {MIB - 32 * KIB} {CLUSTER}",  # its left half
    f"write -P 0x1d {2 * MIB + 32 * KIB} {CLUSTER}",  # its right half
    f"write -P 0xea {SIZE - 2 * CLUSTER} {CLUSTER}",  # beside it
    f"write -z {3 * MIB} {2 * CLUSTER}",
    f"discard {MIB + 8 * CLUSTER} {CLUSTER}",
]


async def fleece(both: Both, *, bitmap: str = "", **options: Json) -> None:
    """`disk` behind the filter `cbw`, which is exported; its point in time as `view`."""
    fill = [(offset, CLUSTER, byte) for byte, offset in PATTERNS]
    await both.disk("disk", SIZE, *fill, discard="unmap")
    await both.disk("scratch", SIZE)
    if bitmap:
        await both.run("block-dirty-bitmap-add", node="disk", name=bitmap)
        await both.serve("disk", export="before")
        await both.io("before", f"write -P 0xd5 {MIB} 64k", "write -P 1 256k 128k")
        await both.unserve("before")
        await both.run("block-dirty-bitmap-disable", node="disk", name=bitmap)
        options["bitmap"] = {"node": "disk", "name": bitmap}
    filter_options: dict[str, Json] = {"driver": "copy-before-write", "file": "disk", "target": "scratch"}
    await both.run("blockdev-add", node_name="cbw", **filter_options, **options)
    await both.run("blockdev-add", driver="snapshot-access", node_name="view", file="cbw")
    await both.serve("cbw")
    await both.serve("view", writable=False)


async def unfleece(both: Both) -> None:
    """Take it apart from the top."""
    for export in ("view", "cbw"):
        await both.unserve(export)
    for node in ("view", "cbw", "scratch", "disk"):
        await both.run("blockdev-del", node_name=node)


READS = [f"read -P {byte:#x} {offset} {CLUSTER}" for byte, offset in PATTERNS]


@script()
async def test_the_view_stays_while_clients_overwrite(both: Both) -> None:
    await fleece(both)
    await both.io("view", *READS)
    for overwrite in OVERWRITES:
        await both.io("cbw", overwrite)
        await both.io("view", *READS, f"read -P 0 {3 * MIB} {2 * CLUSTER}")
    await both.io("cbw", *OVERWRITES)
    await both.io("view", *READS, f"read -P 0 {MIB + 8 * CLUSTER} {CLUSTER}")
    for node in ("cbw", "scratch"):
        await both.differing(differences.NAMES_USERS).fail("blockdev-del", node_name=node)
    await unfleece(both)
    both.content("disk.img")
    both.content("scratch.img")


@script()
async def test_backup_of_the_view(both: Both) -> None:
    await fleece(both)
    before = both.content("disk.img")
    await both.disk("target", SIZE)
    await both.io("cbw", *OVERWRITES[:3])
    await both.run(
        "blockdev-backup",
        device="view",
        target="target",
        sync="full",
        job_id="j",
        speed=1,
        auto_dismiss=False,
    )
    await both.wait("j", "running")
    await both.io("cbw", *OVERWRITES[3:])
    await both.run("block-job-set-speed", device="j", speed=0)
    await both.wait("j", "concluded")
    await both.run("job-dismiss", id="j")
    both.expect_content("target.img", before)


@script(reference=NewerQemuSide)
async def test_backup_that_gives_scratch_back(both: Both) -> None:
    await both.disk("disk", SIZE, (0, SIZE, 1))
    await both.disk("scratch", SIZE, discard="unmap")
    await both.disk("target", SIZE)
    nodes: dict[str, Json] = {"file": "disk", "target": "scratch"}
    await both.run("blockdev-add", driver="copy-before-write", node_name="cbw", **nodes)
    await both.run("blockdev-add", driver="snapshot-access", node_name="view", file="cbw", discard="unmap")
    await both.serve("cbw")
    await both.io("cbw", "write -P 2 0 1M")
    backup: dict[str, Json] = {"device": "view", "target": "target", "sync": "full", "job-id": "j"}
    await both.run("blockdev-backup", **backup, **{"discard-source": True})
    await both.wait("j", "null")
    both.expect_content("target.img", bytes([1]) * SIZE)
    # What was backed up is saved no more.
    await both.io("cbw", "write -P 3 2M 64k", "write -P 3 0 64k")
    both.expect_content("scratch.img", bytes(SIZE))


@script()
async def test_a_bitmap_limits_what_is_saved(both: Both) -> None:
    await fleece(both, bitmap="b")
    await both.io("cbw", *OVERWRITES)
    await both.io("view", f"read -P 0xd5 {MIB} 64k", "read -P 1 256k 128k")
    await both.io("view", "read 0 64k", fails=True, differs=differences.VIEW_REFUSES)
    await unfleece(both)
    both.content("scratch.img")


@pytest.mark.parametrize("policy", [None, "break-guest-write", "break-snapshot"])
@script()
async def test_a_scratch_that_fails(both: Both, policy: str | None) -> None:
    await both.disk("disk", MIB, (0, MIB, 1))
    await both.file("scratch.img", MIB)
    await faulty(both, "scratch", "EIO", "pwrite", "zero")
    options: dict[str, Json] = {} if policy is None else {"on-cbw-error": policy}
    nodes: dict[str, Json] = {"file": "disk", "target": "scratch", **options}
    await both.run("blockdev-add", driver="copy-before-write", node_name="cbw", **nodes)
    await both.run("blockdev-add", driver="snapshot-access", node_name="view", file="cbw")
    await both.serve("cbw")
    await both.serve("view", writable=False)
    await both.io("cbw", "write -P 2 0 64k")
    both.touch("fail")
    breaks_view = policy == "break-snapshot"
    await both.io("cbw", "write -P 2 128k 64k", fails=not breaks_view)
    both.remove("fail")
    await both.io("cbw", "write -P 3 256k 64k")
    if not breaks_view:
        await both.io("view", "read -P 1 0 1M")
    both.content("disk.img")
    both.content("scratch.img")


@script(reference=NewerQemuSide)
async def test_a_scratch_that_is_slow(both: Both) -> None:
    await both.disk("disk", MIB, (0, MIB, 1))
    await both.file("scratch.img", MIB)
    slow = ["--filter=delay", "file", "{dir}/scratch.img", "wdelay=3"]
    await both.nbdkit("scratch", *slow)
    nodes: dict[str, Json] = {"file": "disk", "target": "scratch", "cbw-timeout": 1}
    await both.run("blockdev-add", driver="copy-before-write", node_name="cbw", **nodes)
    await both.serve("cbw")
    await both.io("cbw", "write -P 2 0 64k", fails=True, differs=differences.TIMEOUT_ERROR)
    both.content("disk.img")


@script()
async def test_nodes_that_are_refused(both: Both) -> None:
    await both.disk("disk", MIB)
    await both.disk("scratch", MIB)
    refused: tuple[dict[str, Json], ...] = (
        {"driver": "copy-before-write"},
        {"driver": "copy-before-write", "file": "disk"},
        {"driver": "copy-before-write", "file": "nope", "target": "scratch"},
        {"driver": "copy-before-write", "file": "disk", "target": "nope"},
        {"driver": "copy-before-write", "file": "disk", "target": "scratch", "on-cbw-error": "bogus"},
        {"driver": "copy-before-write", "file": "disk", "target": "scratch", "cbw-timeout": -1},
        {"driver": "copy-before-write", "file": "disk", "target": "scratch", "bogus": 1},
        {
            "driver": "copy-before-write",
            "file": "disk",
            "target": "scratch",
            "bitmap": {"node": "disk", "name": "nope"},
        },
        {
            "driver": "copy-before-write",
            "file": "disk",
            "target": "scratch",
            "bitmap": {"node": "nope", "name": "b"},
        },
        {"driver": "snapshot-access"},
        {"driver": "snapshot-access", "file": "nope"},
        {"driver": "snapshot-access", "file": "disk", "bogus": 1},
    )
    for options in refused:
        await both.either("blockdev-add", **{"node-name": "new", **options})


@script()
async def test_a_scratch_of_another_size(both: Both) -> None:
    await both.disk("disk", MIB)
    await both.disk("small", MIB // 2)
    nodes: dict[str, Json] = {"driver": "copy-before-write", "file": "disk", "target": "small"}
    await both.part(differences.SCRATCH_SIZE, "refused", "blockdev-add", node_name="cbw", **nodes)
