"""Snapshots with bitmaps, and checkpoints: what is frozen, what goes on, and what nothing may lose."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.daemon.transaction import Failing, run_transaction
from nbdbackup.errors import ConflictError, NbdBackupError, NotFoundError, UsageError
from nbdbackup.monitor.services_bitmaps import (
    BitmapAdd,
    BitmapChange,
    BitmapClear,
    BitmapEnable,
    BitmapMerge,
    BitmapRemove,
)
from nbdbackup.monitor.services_snapshots import SnapshotOptions
from tests.support.daemon import Daemon, Leftovers, composed
from tests.support.fleecing import end, start
from tests.support.gated import GatedDevice, settle

SIZE = 10 * 65536 + 513
WITH_B = SnapshotOptions(name="s", bitmap="b")


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with composed(tmp_path) as daemon:
        daemon.add("one", MemoryDevice(SIZE))
        daemon.add("two", MemoryDevice(SIZE))
        yield daemon


async def do(daemon: Daemon, *changes: BitmapChange) -> None:
    await run_transaction([daemon.bitmaps.action(change) for change in changes])


async def write(daemon: Daemon, node: str, *numbers: int) -> None:
    """Change one byte in each of these granules of 64 KiB."""
    for number in numbers:
        await daemon.graph.get(node).write(number * 65536, b"x")


def find(daemon: Daemon, node: str, name: str) -> DirtyBitmap:
    return daemon.graph.entry(node).bitmaps.get(name)


async def shown(daemon: Daemon, export: str, bitmap: str) -> list[int]:
    """The granules that a client of `export` is told are dirty."""
    provider = daemon.exports.get(export).contexts.get(f"qemu:dirty-bitmap:{bitmap}")
    found, offset = [], 0
    for extent in await provider.status(0, SIZE):
        found += [number // 65536 for number in range(offset, offset + extent.length, 65536) if extent.status]
        offset += extent.length
    assert offset == SIZE
    return found


async def create(daemon: Daemon, name: str, *nodes: str) -> None:
    await daemon.checkpoints.create(nodes or ("one",), SnapshotOptions(name=name))


def chain(daemon: Daemon) -> list[tuple[str, str, str | None, int]]:
    """Node, name, parent and dirty granules of each checkpoint."""
    return [
        (info.node, info.name, info.parent, info.dirty // info.granularity)
        for info in daemon.checkpoints.list()
    ]


# Snapshots.


async def test_a_snapshot_shows_all_bitmaps_as_they_were(daemon: Daemon) -> None:
    await do(daemon, BitmapAdd("one", "b"), BitmapAdd("one", "off", enabled=False))
    await write(daemon, "one", 1)
    await daemon.snapshots.create(["one"], SnapshotOptions(name="s"))
    await write(daemon, "one", 2)
    await do(daemon, BitmapClear("one", "b"), BitmapAdd("one", "late"))
    await write(daemon, "one", 3)
    assert await shown(daemon, "one@s", "b") == [1]
    assert await shown(daemon, "one@s", "off") == []
    assert await shown(daemon, "one", "b") == [3]
    assert "qemu:dirty-bitmap:late" not in daemon.exports.get("one@s").contexts.names
    await do(daemon, BitmapRemove("one", "b"))
    assert await shown(daemon, "one@s", "b") == [1]


async def test_what_is_written_while_a_snapshot_is_being_made_is_in_its_bitmap(daemon: Daemon) -> None:
    gate = GatedDevice(MemoryDevice(SIZE), {"write"})
    daemon.add("gated", gate)
    await do(daemon, BitmapAdd("gated", "b"))
    gate.kinds.clear()
    await write(daemon, "gated", 1)
    gate.kinds.add("write")
    early = start(write(daemon, "gated", 2))
    await settle()
    taking = start(daemon.snapshots.create(["gated"], WITH_B))
    await settle()
    late = start(write(daemon, "gated", 3))
    await settle()
    gate.open_gate()
    await end(early)
    await end(taking)
    await end(late)
    assert await shown(daemon, "gated@s", "b") == [1, 2]
    assert find(daemon, "gated", "b").successor_count == 1


async def test_a_pull_that_succeeded_takes_the_frozen_bits_away(daemon: Daemon) -> None:
    await do(daemon, BitmapAdd("one", "b"))
    await write(daemon, "one", 1)
    (made,) = await daemon.snapshots.create(["one"], WITH_B)
    assert made.bitmap == "b"
    await write(daemon, "one", 2)
    await daemon.snapshots.drop(["one@s"], pulled=True)
    assert await shown(daemon, "one", "b") == [2]
    await write(daemon, "one", 4)
    assert await shown(daemon, "one", "b") == [2, 4]


async def test_a_pull_that_failed_loses_nothing(daemon: Daemon) -> None:
    await do(daemon, BitmapAdd("one", "b"))
    await write(daemon, "one", 1)
    await daemon.snapshots.create(["one"], WITH_B)
    await write(daemon, "one", 2)
    await daemon.snapshots.drop(["one@s"])
    assert await shown(daemon, "one", "b") == [1, 2]
    assert not find(daemon, "one", "b").busy


async def test_a_broken_snapshot_was_not_pulled(daemon: Daemon) -> None:
    await daemon.graph.get("one").write(0, b"d" * SIZE)
    await do(daemon, BitmapAdd("one", "b"))
    await write(daemon, "one", 1)
    await daemon.snapshots.create(["one"], SnapshotOptions(name="s", bitmap="b", scratch_bytes_max=65536))
    await write(daemon, "one", 2, 3)
    with pytest.raises(ConflictError, match=r"one@s is broken \(.*is full.*\), so nobody has all of it"):
        await daemon.snapshots.drop(["one@s"], pulled=True)
    await daemon.snapshots.drop(["one@s"])
    assert await shown(daemon, "one", "b") == [1, 2, 3]


async def test_a_bitmap_in_a_snapshot_is_busy_and_a_snapshot_needs_a_free_one(daemon: Daemon) -> None:
    await do(daemon, BitmapAdd("one", "b"))
    await daemon.snapshots.create(["one"], WITH_B)
    for change in (BitmapRemove("one", "b"), BitmapClear("one", "b"), BitmapEnable("one", "b")):
        with pytest.raises(ConflictError, match="currently in use"):
            await do(daemon, change)
    with pytest.raises(ConflictError, match="'b' is currently in use"):
        await daemon.snapshots.create(["one"], SnapshotOptions(name="s2", bitmap="b"))
    await daemon.snapshots.drop(["one@s"])
    await do(daemon, BitmapRemove("one", "b"))
    with pytest.raises(NotFoundError, match="'b' not found"):
        await daemon.snapshots.create(["one"], WITH_B)
    assert daemon.is_quiet()


async def test_a_set_that_fails_at_its_second_node_leaves_the_first_as_it_was(
    daemon: Daemon, tmp_path: Path
) -> None:
    await do(daemon, BitmapAdd("one", "b"))
    await write(daemon, "one", 1)
    before = Leftovers(tmp_path, daemon.scratch)
    with pytest.raises(NotFoundError, match="'b' not found"):
        await daemon.snapshots.create(["one", "two"], WITH_B)
    assert [export.name for export in daemon.exports] == ["one", "two"]
    bitmap = find(daemon, "one", "b")
    assert (bitmap.busy, bitmap.count, len(list(daemon.graph.get("one").filters))) == (False, 1, 1)
    await before.assert_none()
    await write(daemon, "one", 2)
    await daemon.snapshots.create(["one"], WITH_B)


async def test_a_drop_that_is_cancelled_leaves_no_bitmap_frozen(daemon: Daemon) -> None:
    gate = GatedDevice(MemoryDevice(SIZE), {"read"})
    daemon.add("gated", gate)
    await do(daemon, BitmapAdd("gated", "b"))
    await daemon.snapshots.create(["gated"], WITH_B)
    reading = start(daemon.exports.get("gated@s").node.read(0, bytearray(65536)))
    await settle()
    dropping = start(daemon.snapshots.drop(["gated@s"], pulled=True))
    await settle()
    dropping.cancel()
    await asyncio.wait({dropping}, timeout=10)
    assert not find(daemon, "gated", "b").busy
    gate.open_gate()
    with pytest.raises(NbdBackupError, match="was dropped"):
        await end(reading)


# Checkpoints.


async def test_a_checkpoint_switches_bitmaps_and_takes_the_snapshot_at_one_instant(daemon: Daemon) -> None:
    await create(daemon, "c1")
    await write(daemon, "one", 1)
    await create(daemon, "c2")
    await write(daemon, "one", 2)
    await create(daemon, "c3")
    await write(daemon, "one", 3)
    assert chain(daemon) == [("one", "c1", None, 1), ("one", "c2", "c1", 1), ("one", "c3", "c2", 1)]
    assert await shown(daemon, "one@c2", "c1") == [1]
    assert await shown(daemon, "one@c3", "c2") == [2]
    assert await shown(daemon, "one@c3", "c1") == [1]
    assert await shown(daemon, "one", "c3") == [3]
    assert "qemu:dirty-bitmap:c3" not in daemon.exports.get("one@c3").contexts.names


async def test_no_write_falls_between_two_checkpoints(daemon: Daemon) -> None:
    gate = GatedDevice(MemoryDevice(SIZE), set())
    daemon.add("gated", gate)
    await create(daemon, "c1", "gated")
    gate.kinds.add("write")
    early = start(write(daemon, "gated", 1))
    await settle()
    creating = start(create(daemon, "c2", "gated"))
    await settle()
    late = start(write(daemon, "gated", 2))
    await settle()
    gate.open_gate()
    for task in (early, creating, late):
        await end(task)
    assert await shown(daemon, "gated@c2", "c1") == [1]
    assert await shown(daemon, "gated", "c1") == [1]
    assert await shown(daemon, "gated", "c2") == [2]


async def test_checkpoints_of_several_nodes_are_all_or_nothing(daemon: Daemon) -> None:
    await create(daemon, "c1", "one", "two")
    await do(daemon, BitmapAdd("two", "c2"))
    with pytest.raises(ConflictError, match="Bitmap already exists: c2"):
        await create(daemon, "c2", "one", "two")
    assert chain(daemon) == [("one", "c1", None, 0), ("two", "c1", None, 0)]
    assert find(daemon, "one", "c1").enabled
    assert [export.name for export in daemon.exports] == ["one", "two", "one@c1", "two@c1"]
    await create(daemon, "c3", "one", "two")
    assert [info[:3] for info in chain(daemon)] == [
        ("one", "c1", None),
        ("one", "c3", "c1"),
        ("two", "c1", None),
        ("two", "c3", "c1"),
    ]


@pytest.mark.parametrize("nodes", [(), ("one", "one"), ("none",)])
async def test_a_checkpoint_of_nothing_is_refused(daemon: Daemon, nodes: tuple[str, ...]) -> None:
    with pytest.raises(NbdBackupError):
        await daemon.checkpoints.create(nodes, SnapshotOptions(name="c"))
    with pytest.raises(UsageError, match="needs a name"):
        await daemon.checkpoints.create(["one"], SnapshotOptions())
    assert chain(daemon) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c1", [("c2", None, 1), ("c3", "c2", 1)]),
        ("c2", [("c1", None, 2), ("c3", "c1", 1)]),
        ("c3", [("c1", None, 1), ("c2", "c1", 2)]),
    ],
)
async def test_a_deleted_checkpoint_gives_its_bits_to_the_one_before(
    daemon: Daemon, name: str, expected: list[tuple[str, str | None, int]]
) -> None:
    for number in (1, 2, 3):
        await create(daemon, f"c{number}")
        await write(daemon, "one", number)
    (gone,) = await daemon.checkpoints.delete(["one"], name)
    assert (gone.node, gone.name) == ("one", name)
    assert [info[1:] for info in chain(daemon)] == expected
    await write(daemon, "one", 9)
    assert [info[-1] for info in chain(daemon)] == [expected[0][2], expected[1][2] + 1]
    assert daemon.graph.entry("one").bitmaps.find(name) is None
    assert f"qemu:dirty-bitmap:{name}" not in daemon.exports.get("one").contexts.names


async def test_deleting_again_says_that_there_is_none(daemon: Daemon) -> None:
    await create(daemon, "c1", "one", "two")
    assert [info.node for info in await daemon.checkpoints.delete([], "c1")] == ["one", "two"]
    assert await daemon.checkpoints.delete([], "c1") == []
    assert await daemon.checkpoints.delete(["one"], "c1") == []
    with pytest.raises(NotFoundError, match="none"):
        await daemon.checkpoints.delete(["none"], "c1")


async def test_a_deletion_that_fails_has_changed_nothing(daemon: Daemon) -> None:
    for number in (1, 2):
        await create(daemon, f"c{number}", "one", "two")
        await write(daemon, "one", number)
    find(daemon, "two", "c1").users.append("a test")
    before = chain(daemon)
    with pytest.raises(ConflictError, match="'c1' is currently in use"):
        await daemon.checkpoints.delete([], "c2")
    assert chain(daemon) == before
    bitmap = find(daemon, "one", "c2")
    assert (bitmap.enabled, bitmap.busy, find(daemon, "one", "c1").enabled) == (True, False, False)


@pytest.mark.parametrize(
    "change",
    [
        BitmapRemove("one", "c1"),
        BitmapClear("one", "c1"),
        BitmapEnable("one", "c1", enabled=False),
    ],
    ids=str,
)
async def test_what_a_checkpoint_knows_is_not_taken_from_it(daemon: Daemon, change: BitmapChange) -> None:
    await create(daemon, "c1")
    with pytest.raises(ConflictError, match="belongs to the checkpoint"):
        await do(daemon, change)
    with pytest.raises(ConflictError, match="belongs to the checkpoint"):
        await daemon.snapshots.create(["one"], SnapshotOptions(name="s", bitmap="c1"))
    await do(daemon, BitmapAdd("one", "all", enabled=False), BitmapMerge("one", "all", [("one", "c1")]))


async def test_checkpoints_go_with_their_node(daemon: Daemon) -> None:
    await create(daemon, "c1")
    await daemon.snapshots.drop(["one@c1"])
    daemon.exports.remove("one", "the test says so")
    await daemon.graph.delete("one")
    assert chain(daemon) == []
    daemon.add("one", MemoryDevice(SIZE))
    assert chain(daemon) == []


async def test_a_checkpoint_in_a_transaction_that_fails_is_undone(daemon: Daemon) -> None:
    await create(daemon, "c1")
    actions = daemon.snapshots.actions(["one"], SnapshotOptions(name="s"))
    with pytest.raises(ConflictError, match="no"):
        await run_transaction([*actions, Failing(ConflictError("no"))])
    assert [info.export for info in daemon.snapshots.list()] == ["one@c1"]
