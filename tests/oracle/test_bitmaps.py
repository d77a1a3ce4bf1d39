"""The commands for dirty bitmaps, and bitmaps as NBD clients see them (QEMU's tests 124, 209, 223, 236)."""

import pytest

from nbdbackup.job.events import Json
from tests.oracle import differences
from tests.oracle.backups import HELD, cancel, disks, start
from tests.oracle.both import CLUSTER, KIB, MIB, Both
from tests.oracle.script import script


@script()
async def test_adding_and_removing(both: Both) -> None:
    await disks(both)
    for arguments in (
        {"node": "nope", "name": "b"},
        {"node": "disk", "name": ""},
        {"node": "disk", "name": "b" * 1024},
        {"node": "disk", "name": "b", "granularity": 0},
        {"node": "disk", "name": "b", "granularity": 3},
        {"node": "disk", "name": "b", "granularity": 256},
        {"node": "disk", "name": "b", "granularity": 1 << 32},
        {"node": "disk", "name": "b", "granularity": -512},
        {"node": "disk", "name": "b", "granularity": 65537},
        {"node": "disk"},
        {"name": "b"},
        {"node": "disk", "name": "b", "bogus": 1},
    ):
        await both.fail("block-dirty-bitmap-add", **arguments)
    await both.bitmaps()
    await both.run("block-dirty-bitmap-add", node="disk", name="b0")
    await both.fail("block-dirty-bitmap-add", node="disk", name="b0")
    await both.run("block-dirty-bitmap-add", node="disk", name="small", granularity=512)
    await both.run("block-dirty-bitmap-add", node="disk", name="large", granularity=1 << 31)
    await both.run("block-dirty-bitmap-add", node="disk", name="off", disabled=True)
    await both.run("block-dirty-bitmap-add", node="disk", name="b" * 1023)
    await both.run("block-dirty-bitmap-add", node="target", name="b0")
    await both.bitmaps()
    for command in ("remove", "clear", "enable", "disable"):
        await both.fail(f"block-dirty-bitmap-{command}", node="disk", name="nope")
        await both.fail(f"block-dirty-bitmap-{command}", node="nope", name="b0")
        await both.fail(f"block-dirty-bitmap-{command}", node="disk")
    await both.run("block-dirty-bitmap-remove", node="disk", name="b0")
    await both.fail("block-dirty-bitmap-remove", node="disk", name="b0")
    await both.bitmaps()


@pytest.mark.parametrize("granularity", [512, 4 * KIB, 64 * KIB, 256 * KIB, MIB])
@script()
async def test_every_way_to_change_a_disk_sets_bits(both: Both, granularity: int) -> None:
    await both.disk("disk", 4 * MIB, (0, 4 * MIB, 1), discard="unmap")
    await both.serve("disk")
    await both.run("block-dirty-bitmap-add", node="disk", name="b", granularity=granularity)
    await both.io(
        "disk",
        "write -P 2 1024 512",
        f"write -P 2 {MIB - 512} 1024",
        f"write -z {2 * MIB + 4096} 8192",
        f"write -z -u {2 * MIB + 65536} 65536",
        f"discard {3 * MIB} 65536",
        f"read {3 * MIB + 65536} 65536",
        "flush",
    )
    await both.bitmaps()
    await both.bitmap("disk", "b")
    both.content("disk.img")


@script()
async def test_clear_enable_disable(both: Both) -> None:
    await disks(both)
    await both.serve("disk")
    await both.run("block-dirty-bitmap-add", node="disk", name="b")
    await both.io("disk", "write 0 64k")
    await both.run("block-dirty-bitmap-disable", node="disk", name="b")
    await both.run("block-dirty-bitmap-disable", node="disk", name="b")
    await both.io("disk", "write 128k 64k")
    await both.bitmaps()
    await both.run("block-dirty-bitmap-enable", node="disk", name="b")
    await both.run("block-dirty-bitmap-enable", node="disk", name="b")
    await both.io("disk", "write 256k 64k")
    await both.bitmaps()
    await both.bitmap("disk", "b")
    await both.run("block-dirty-bitmap-clear", node="disk", name="b")
    await both.bitmaps()
    assert await both.bitmap("disk", "b") == []
    await both.run("block-dirty-bitmap-disable", node="disk", name="b")
    await both.run("block-dirty-bitmap-clear", node="disk", name="b")
    await both.bitmaps()


async def _bitmap_with(both: Both, node: str, name: str, granularity: int, *writes: str) -> None:
    """A disabled bitmap with the bits of `writes`."""
    await both.run("block-dirty-bitmap-add", node=node, name=name, granularity=granularity)
    await both.io(node, *writes)
    await both.run("block-dirty-bitmap-disable", node=node, name=name)


@script()
async def test_merging(both: Both) -> None:
    await disks(both)
    for node in ("disk", "target"):
        await both.serve(node)
    await _bitmap_with(both, "disk", "a", 64 * KIB, "write 0 64k", "write 512k 64k")
    await _bitmap_with(both, "disk", "b", 64 * KIB, "write 64k 64k")
    await _bitmap_with(both, "disk", "fine", 512, "write 200k 512", "write 1048064 512")
    await _bitmap_with(both, "target", "other", 4 * KIB, "write 900k 1k")
    for name, granularity in (("into", 64 * KIB), ("into-fine", 512), ("into-coarse", 256 * KIB)):
        await both.run(
            "block-dirty-bitmap-add", node="disk", name=name, granularity=granularity, disabled=True
        )
        sources: list[Json] = ["a", "b", "fine", {"node": "target", "name": "other"}]
        await both.run("block-dirty-bitmap-merge", node="disk", target=name, bitmaps=sources)
        await both.bitmap("disk", name)
    await both.bitmaps()
    await both.run("block-dirty-bitmap-merge", node="disk", target="a", bitmaps=["a"])
    await both.run("block-dirty-bitmap-merge", node="disk", target="a", bitmaps=["b", "b"])
    await both.bitmap("disk", "a")
    await both.bitmaps()


@script()
async def test_merges_that_are_refused_change_nothing(both: Both) -> None:
    await disks(both)
    await both.disk("small", MIB // 2)
    for node in ("disk", "small"):
        await both.serve(node)
    await _bitmap_with(both, "disk", "a", 64 * KIB, "write 0 64k")
    await _bitmap_with(both, "disk", "b", 64 * KIB, "write 64k 64k")
    await _bitmap_with(both, "small", "s", 64 * KIB, "write 64k 64k")
    refused: tuple[dict[str, Json], ...] = (
        {"node": "disk", "target": "nope", "bitmaps": ["a"]},
        {"node": "nope", "target": "a", "bitmaps": ["b"]},
        {"node": "disk", "target": "a", "bitmaps": ["b", "nope"]},
        {"node": "disk", "target": "a", "bitmaps": ["b", {"node": "small", "name": "s"}]},
        {"node": "disk", "target": "a", "bitmaps": ["b", {"node": "nope", "name": "s"}]},
        {"node": "disk", "target": "a", "bitmaps": ["b", {"node": "small", "name": "nope"}]},
        {"node": "disk", "target": "a", "bitmaps": ["b", {"node": "small"}]},
        {"node": "disk", "target": "a", "bitmaps": "b"},
        {"node": "disk", "target": "a"},
    )
    for arguments in refused:
        await both.fail("block-dirty-bitmap-merge", **arguments)
    await both.fail("block-dirty-bitmap-merge", node="disk", target="a", bitmaps=["b", 5])
    await both.bitmaps()
    assert await both.bitmap("disk", "a") == [(0, CLUSTER)]


@script()
async def test_a_bitmap_that_a_backup_uses_is_left_alone(both: Both) -> None:
    await disks(both)
    await both.disk("other", MIB)
    await both.serve("disk")
    await both.run("block-dirty-bitmap-add", node="disk", name="b")
    await both.run("block-dirty-bitmap-add", node="disk", name="c")
    await both.io("disk", "write 0 512k")
    await start(both, sync="incremental", bitmap="b", **HELD)
    await both.wait("j", "running")
    for command in ("remove", "clear", "enable", "disable"):
        await both.fail(f"block-dirty-bitmap-{command}", node="disk", name="b")
    await both.fail("block-dirty-bitmap-merge", node="disk", target="b", bitmaps=["c"])
    await both.either("block-dirty-bitmap-merge", node="disk", target="c", bitmaps=["b"])
    again: dict[str, Json] = {"device": "disk", "target": "other", "sync": "incremental", "job-id": "k"}
    await both.fail("blockdev-backup", **again, bitmap="b")
    await both.fail("block-dirty-bitmap-add", node="disk", name="b")
    await both.bitmaps()
    await cancel(both)
    await both.bitmaps()


@script()
async def test_a_disabled_bitmap_stays_disabled_through_a_backup(both: Both) -> None:
    await disks(both)
    await both.serve("disk")
    await both.run("block-dirty-bitmap-add", node="disk", name="b")
    await both.io("disk", "write 0 512k")
    await both.run("block-dirty-bitmap-disable", node="disk", name="b")
    await start(both, sync="bitmap", bitmap="b", **{"bitmap-mode": "on-success"}, **HELD)
    await both.wait("j", "running")
    await both.io("disk", "write 768k 64k")
    await both.bitmaps()
    await both.run("block-job-set-speed", device="j", speed=0)
    await both.wait("j", "null")
    await both.bitmaps()
    await both.io("disk", "write 832k 64k")
    await both.bitmaps()


@script()
async def test_a_bitmap_that_is_exported_is_left_alone(both: Both) -> None:
    await disks(both)
    await both.serve("disk")
    await both.run("block-dirty-bitmap-add", node="disk", name="b")
    await both.run("block-dirty-bitmap-add", node="disk", name="c")
    await both.serve("disk", export="e", bitmaps=["b"])
    await both.bitmaps()
    for command in ("remove", "clear", "enable", "disable"):
        await both.fail(f"block-dirty-bitmap-{command}", node="disk", name="b")
    await both.fail("block-dirty-bitmap-merge", node="disk", target="b", bitmaps=["c"])
    await both.fail(
        "blockdev-backup", device="disk", target="target", sync="incremental", job_id="k", bitmap="b"
    )
    # Once more is refused too.
    await both.either(
        "block-export-add", type="nbd", id="f", node_name="disk", name="f", writable=True, bitmaps=["b"]
    )
    await both.io("e", "write 0 4k")
    await both.map("e", "qemu:dirty-bitmap:b")
    await both.unserve("e")
    await both.bitmaps()
    await both.run("block-dirty-bitmap-clear", node="disk", name="b")


@script()
async def test_several_bitmaps_over_nbd(both: Both) -> None:
    await disks(both)
    await both.serve("disk")
    for name, granularity in (("fine", 512), ("coarse", 256 * KIB), ("never used", 64 * KIB)):
        await both.run("block-dirty-bitmap-add", node="disk", name=name, granularity=granularity)
        await both.io("disk", "write 512 512", "write 300k 100k")
    await both.serve("disk", export="e", bitmaps=["fine", "coarse", "never used"])
    for name in ("fine", "coarse", "never used"):
        await both.map("e", f"qemu:dirty-bitmap:{name}")
    await both.io("e", "write 1000k 1k")
    for name in ("fine", "coarse"):
        await both.map("e", f"qemu:dirty-bitmap:{name}")


@script()
async def test_exports_with_bitmaps_that_are_refused(both: Both) -> None:
    await disks(both)
    await both.disk("frozen", MIB, read_only=True)
    await both.start_nbd()
    await both.run("block-dirty-bitmap-add", node="disk", name="on")
    await both.run("block-dirty-bitmap-add", node="disk", name="off", disabled=True)
    await both.either("block-dirty-bitmap-add", node="frozen", name="on")
    export: dict[str, Json] = {"type": "nbd", "id": "e", "name": "e"}
    for node, writable, bitmaps in (
        ("disk", True, ["nope"]),
        ("disk", False, ["on"]),
        ("disk", False, ["off", "nope"]),
        ("disk", True, [{"node": "target", "name": "on"}]),
        ("disk", True, [{"node": "nope", "name": "on"}]),
        ("disk", False, ["off"]),
        ("frozen", False, ["on"]),
    ):
        listed: Json = [*bitmaps]
        more: dict[str, Json] = {"node-name": node, "writable": writable, "bitmaps": listed}
        error = await both.either("block-export-add", **export, **more)
        await both.bitmaps()
        if not error:
            await both.run("block-export-del", id="e")
            await both.wait_event("BLOCK_EXPORT_DELETED")


@script()
async def test_an_export_with_a_bitmap_listed_twice(both: Both) -> None:
    await disks(both)
    await both.start_nbd()
    await both.run("block-dirty-bitmap-add", node="disk", name="b")
    export: dict[str, Json] = {"type": "nbd", "id": "e", "node-name": "disk", "writable": True}
    await both.part(differences.BITMAP_TWICE, "refused", "block-export-add", **export, bitmaps=["b", "b"])
