"""Dirty bitmaps as QMP's users change them: QEMU's checks and texts, and nothing changes if one fails."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.daemon.transaction import Failing, run_transaction
from nbdbackup.errors import ConflictError, DeviceError, NbdBackupError
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from nbdbackup.monitor.services_backup import BackupRequest, TargetNode
from nbdbackup.monitor.services_bitmaps import (
    BitmapAdd,
    BitmapChange,
    BitmapClear,
    BitmapEnable,
    BitmapInfo,
    BitmapMerge,
    BitmapRemove,
)
from nbdbackup.monitor.services_graph import RawNode
from nbdbackup.monitor.services_snapshots import SnapshotOptions
from nbdbackup.server.contexts import SelectedContexts
from tests.support.daemon import Daemon, composed
from tests.support.fleecing import end, start
from tests.support.gated import GatedDevice, settle

SIZE = 10 * 65536 + 513
BUSY = "Bitmap 'busy' is currently in use by another operation and cannot be used"


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with composed(tmp_path) as daemon:
        daemon.add("disk", MemoryDevice(SIZE))
        daemon.add("same", MemoryDevice(SIZE))
        daemon.add("short", MemoryDevice(4097))
        yield daemon


async def do(daemon: Daemon, *changes: BitmapChange) -> None:
    """All of `changes` at one instant."""
    await run_transaction([daemon.bitmaps.action(change) for change in changes])


async def write(daemon: Daemon, node: str, *numbers: int) -> None:
    """Change one byte in each of these granules of 64 KiB."""
    for number in numbers:
        await daemon.graph.get(node).write(number * 65536, b"x")


def find(daemon: Daemon, node: str, name: str) -> DirtyBitmap:
    return daemon.graph.entry(node).bitmaps.get(name)


def dirty(daemon: Daemon, node: str, name: str) -> list[int]:
    """The dirty granules."""
    bitmap = find(daemon, node, name)
    return [
        run.offset // bitmap.granularity + number
        for run in bitmap.dirty_runs()
        for number in range(-(-run.length // bitmap.granularity))
    ]


def everything(daemon: Daemon) -> object:
    """All that a change may change."""
    return [
        (node.name, node.bitmaps, [dirty(daemon, node.name, b.name) for b in node.bitmaps if b.name])
        for node in daemon.graph.nodes()
    ]


async def test_a_bitmap_records_from_when_it_was_added(daemon: Daemon) -> None:
    await write(daemon, "disk", 1)
    await do(daemon, BitmapAdd("disk", "b"))
    await write(daemon, "disk", 2, 10)
    await daemon.graph.get("disk").trim(65536 * 4 - 1, 2)
    await daemon.graph.get("disk").write_zeroes(65536 * 6, 65536)
    await write(daemon, "same", 5)
    assert dirty(daemon, "disk", "b") == [2, 3, 4, 6, 10]
    (disk, *_) = daemon.graph.nodes()
    assert disk.bitmaps == [
        BitmapInfo("b", 65536, 5 * 65536, recording=True, busy=False, persistent=False, inconsistent="")
    ]


async def test_writes_through_a_node_above_are_recorded_below(daemon: Daemon) -> None:
    await daemon.graph.add(RawNode("above", "disk"))
    await do(daemon, BitmapAdd("disk", "b"), BitmapAdd("above", "b"))
    await write(daemon, "above", 3)
    assert dirty(daemon, "disk", "b") == dirty(daemon, "above", "b") == [3]


async def test_the_newest_is_shown_first_and_a_successor_before_its_bitmap(daemon: Daemon) -> None:
    for name in ("a", "b", "c"):
        await do(daemon, BitmapAdd("disk", name))
    await daemon.snapshots.create(["disk"], SnapshotOptions(name="s", bitmap="b"))
    await write(daemon, "disk", 1)
    shown = [(info.name, info.count, info.busy) for info in daemon.graph.nodes()[0].bitmaps]
    assert shown == [("c", 65536, False), (None, 65536, False), ("b", 0, True), ("a", 65536, False)]


@pytest.mark.parametrize("granularity", [512, 4096, 1 << 31])
async def test_granularity(daemon: Daemon, granularity: int) -> None:
    await do(daemon, BitmapAdd("disk", "b", granularity))
    await write(daemon, "disk", 1)
    (disk, *_) = daemon.graph.nodes()
    assert disk.bitmaps[0].granularity == disk.bitmaps[0].count == granularity


async def test_the_tracker_is_there_while_there_are_bitmaps(daemon: Daemon) -> None:
    node = daemon.graph.get("disk")
    await do(daemon, BitmapAdd("disk", "a"))
    await daemon.snapshots.create(["disk"], SnapshotOptions(name="s"))
    await do(daemon, BitmapAdd("disk", "b"), BitmapRemove("disk", "a"))
    assert [type(device) for device in node.filters].count(DirtyTracker) == 1
    await write(daemon, "disk", 1)
    assert dirty(daemon, "disk", "b") == [1]
    await do(daemon, BitmapRemove("disk", "b"))
    assert not any(isinstance(device, DirtyTracker) for device in node.filters)
    await write(daemon, "disk", 2)
    await daemon.snapshots.drop(["disk@s"])
    assert daemon.is_quiet()


async def test_a_bitmap_is_added_between_writes(daemon: Daemon) -> None:
    gate = GatedDevice(MemoryDevice(SIZE), {"write"})
    daemon.add("gated", gate)
    early = start(write(daemon, "gated", 1))
    await settle()
    adding = start(do(daemon, BitmapAdd("gated", "b")))
    await settle()
    late = start(write(daemon, "gated", 2))
    await settle()
    assert not adding.done()
    gate.open_gate()
    for task in (early, adding, late):
        await end(task)
    assert dirty(daemon, "gated", "b") == [2]


async def test_a_disabled_bitmap_records_when_it_is_enabled(daemon: Daemon) -> None:
    await do(daemon, BitmapAdd("disk", "b", enabled=False))
    await write(daemon, "disk", 1)
    await do(daemon, BitmapEnable("disk", "b"))
    await write(daemon, "disk", 2)
    await do(daemon, BitmapEnable("disk", "b", enabled=False), BitmapEnable("disk", "b", enabled=False))
    await write(daemon, "disk", 3)
    assert dirty(daemon, "disk", "b") == [2]
    await do(daemon, BitmapClear("disk", "b"))
    assert dirty(daemon, "disk", "b") == []


async def test_merge_takes_in_bitmaps_of_other_nodes_and_granularities(daemon: Daemon) -> None:
    await do(
        daemon,
        BitmapAdd("disk", "target"),
        BitmapAdd("disk", "fine", 512),
        BitmapAdd("same", "coarse", 131072),
    )
    await do(daemon, BitmapEnable("disk", "target", enabled=False))
    await write(daemon, "disk", 1)
    await write(daemon, "same", 4)
    await do(daemon, BitmapMerge("disk", "target", [("disk", "fine"), ("same", "coarse")]))
    assert dirty(daemon, "disk", "target") == [1, 4, 5]
    await do(daemon, BitmapMerge("disk", "target", [("disk", "target")]), BitmapMerge("disk", "target", []))
    assert dirty(daemon, "disk", "target") == [1, 4, 5]
    await do(daemon, BitmapMerge("disk", "fine", [("disk", "target")]))
    assert len(dirty(daemon, "disk", "fine")) == 3 * 128


UNIT = "Granularity must be power of 2 and at least 512"
NO_NODE = "Node 'no' not found"
NO_BITMAP = "Dirty bitmap 'no' not found"
BAD = "Bitmap 'bad' is inconsistent and cannot be used"
LONG, LONG_IN_BYTES = "x" * 1024, "\u00e4" * 512
REFUSED: list[tuple[BitmapChange, str]] = [
    (BitmapAdd("no", "b"), "Cannot find device='no' nor node-name='no'"),
    (BitmapAdd("no", ""), "Bitmap name cannot be empty"),
    (BitmapAdd("disk", "b", 256), UNIT),
    (BitmapAdd("disk", "b", 0), UNIT),
    (BitmapAdd("disk", "a", 1000), UNIT),
    (BitmapAdd("disk", "b", 1 << 32), UNIT),
    (BitmapAdd("disk", "a"), "Bitmap already exists: a"),
    (BitmapAdd("disk", LONG), f"Bitmap name too long: {LONG}"),
    (BitmapAdd("disk", LONG_IN_BYTES), f"Bitmap name too long: {LONG_IN_BYTES}"),
    (BitmapAdd("disk", "a\nb"), "Bitmap name has characters that cannot be shown: 'a\\nb'"),
    (
        BitmapAdd("disk", "a", persistent=True),
        "Can't store persistent bitmaps to disk: Operation not supported",
    ),
    (BitmapRemove("no", "a"), NO_NODE),
    (BitmapClear("no", "a"), NO_NODE),
    (BitmapEnable("no", "a"), NO_NODE),
    (BitmapMerge("no", "a", []), NO_NODE),
    (BitmapMerge("disk", "a", [("no", "a")]), NO_NODE),
    (BitmapRemove("disk", "no"), NO_BITMAP),
    (BitmapClear("disk", "no"), NO_BITMAP),
    (BitmapEnable("disk", "no"), NO_BITMAP),
    (BitmapMerge("disk", "no", [("disk", "busy")]), NO_BITMAP),
    (BitmapMerge("disk", "busy", [("disk", "a"), ("disk", "no")]), NO_BITMAP),
    (BitmapRemove("disk", "busy"), BUSY),
    (BitmapClear("disk", "busy"), BUSY),
    (BitmapEnable("disk", "busy", enabled=False), BUSY),
    (BitmapMerge("disk", "busy", [("disk", "a")]), BUSY),
    (BitmapMerge("disk", "a", [("disk", "busy"), ("disk", "no")]), BUSY),
    (BitmapClear("disk", "bad"), BAD),
    (BitmapEnable("disk", "bad"), BAD),
    (BitmapMerge("disk", "bad", [("disk", "a")]), BAD),
    (BitmapMerge("disk", "a", [("disk", "bad")]), BAD),
    (
        BitmapMerge("disk", "a", [("short", "a")]),
        "Bitmaps are of different sizes (destination size is 655873, source size is 4097) "
        "and can't be merged",
    ),
]


async def make_bitmaps(daemon: Daemon) -> None:
    await do(
        daemon,
        BitmapAdd("disk", "a"),
        BitmapAdd("disk", "busy"),
        BitmapAdd("disk", "bad"),
        BitmapAdd("short", "a"),
    )
    await write(daemon, "disk", 1, 2)
    find(daemon, "disk", "busy").users.append("a test")
    find(daemon, "disk", "bad").inconsistent = "for a test"


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_is_refused_is_refused_in_qemu_words_and_undoes_the_rest(
    daemon: Daemon, change: BitmapChange, text: str
) -> None:
    await make_bitmaps(daemon)
    before = everything(daemon)
    with pytest.raises(NbdBackupError, match=f"^{re.escape(text)}$"):
        await do(daemon, change)
    assert everything(daemon) == before
    with pytest.raises(NbdBackupError, match=f"^{re.escape(text)}$"):
        await do(daemon, BitmapClear("disk", "a"), BitmapAdd("same", "new"), change)
    assert everything(daemon) == before
    assert not list(daemon.graph.get("same").filters)


async def test_an_inconsistent_bitmap_can_be_removed(daemon: Daemon) -> None:
    await make_bitmaps(daemon)
    await do(daemon, BitmapRemove("disk", "bad"))
    assert daemon.graph.entry("disk").bitmaps.find("bad") is None


@pytest.mark.parametrize(
    "change",
    [
        BitmapAdd("disk", "new"),
        BitmapAdd("same", "new"),
        BitmapRemove("disk", "a"),
        BitmapRemove("short", "a"),
        BitmapClear("disk", "a"),
        BitmapEnable("disk", "a", enabled=False),
        BitmapMerge("disk", "a", [("disk", "other")]),
    ],
    ids=str,
)
async def test_a_change_is_undone_exactly_when_a_later_step_fails(
    daemon: Daemon, change: BitmapChange
) -> None:
    await do(daemon, BitmapAdd("disk", "other"))
    await write(daemon, "disk", 7)
    await make_bitmaps(daemon)
    contexts = daemon.exports.get("disk").contexts.names
    before = everything(daemon)
    failing = Failing(ConflictError("no"))
    with pytest.raises(ConflictError, match="no"):
        await run_transaction([daemon.bitmaps.action(change), failing])
    assert everything(daemon) == before
    assert daemon.exports.get("disk").contexts.names == contexts
    await write(daemon, "disk", 9)
    assert dirty(daemon, "disk", "a") == [1, 2, 9]


async def test_steps_of_a_transaction_see_what_those_before_did(daemon: Daemon) -> None:
    await do(daemon, BitmapAdd("disk", "a"))
    await write(daemon, "disk", 1)
    await do(
        daemon, BitmapAdd("disk", "b"), BitmapMerge("disk", "b", [("disk", "a")]), BitmapClear("disk", "a")
    )
    assert (dirty(daemon, "disk", "a"), dirty(daemon, "disk", "b")) == ([], [1])
    # A bitmap that is to be removed is there, and in use, until the end: QEMU's ways.
    with pytest.raises(ConflictError, match="'a' is currently in use"):
        await do(daemon, BitmapRemove("disk", "a"), BitmapClear("disk", "a"))
    with pytest.raises(ConflictError, match="already exists: a"):
        await do(daemon, BitmapRemove("disk", "a"), BitmapAdd("disk", "a"))
    assert dirty(daemon, "disk", "b") == [1]


async def test_a_node_with_bitmaps_can_be_deleted_and_takes_them_along(daemon: Daemon) -> None:
    await daemon.graph.add(RawNode("above", "disk"))
    await do(daemon, BitmapAdd("above", "b"))
    await daemon.graph.delete("above")
    await daemon.graph.add(RawNode("above", "disk"))
    assert list(daemon.graph.entry("above").bitmaps) == []


async def test_exports_show_bitmaps_as_they_come_and_go(daemon: Daemon) -> None:
    export = daemon.exports.get("disk")
    always = export.contexts.names
    await do(daemon, BitmapAdd("disk", "b"))
    name = "qemu:dirty-bitmap:b"
    assert export.contexts.names == (*always, name)
    assert daemon.exports.get("same").contexts.names == always
    await write(daemon, "disk", 10)
    selected = SelectedContexts(export.contexts, {1: name})
    told = await selected.get(1).status(65536, SIZE - 65536)
    assert [(extent.length, extent.status) for extent in told] == [(9 * 65536, 0), (513, 1)]
    find(daemon, "disk", "b").inconsistent = "for a test"
    with pytest.raises(DeviceError, match="b is inconsistent: for a test"):
        await selected.get(1).status(0, SIZE)
    find(daemon, "disk", "b").inconsistent = ""
    await do(daemon, BitmapRemove("disk", "b"))
    assert export.contexts.names == always
    with pytest.raises(DeviceError, match="no longer there"):
        selected.get(1)


async def test_a_client_is_not_told_of_another_bitmap_of_the_name(daemon: Daemon) -> None:
    export, name = daemon.exports.get("disk"), "qemu:dirty-bitmap:b"
    await do(daemon, BitmapAdd("disk", "b"))
    before = SelectedContexts(export.contexts, {1: name})
    await do(daemon, BitmapRemove("disk", "b"))
    await do(daemon, BitmapAdd("disk", "b"))
    with pytest.raises(DeviceError, match="is another one since"):
        before.get(1)
    await SelectedContexts(export.contexts, {1: name}).get(1).status(0, SIZE)


async def test_a_backup_into_a_node_is_recorded_in_its_bitmaps(daemon: Daemon, tmp_path: Path) -> None:
    daemon.add_file("source", tmp_path / "source.img", b"s" * SIZE)
    daemon.add_file("target", tmp_path / "target.img", b"t" * SIZE)
    await do(daemon, BitmapAdd("target", "b"))
    await daemon.backups.start(BackupRequest("source", TargetNode("target"), job_id="j", auto_dismiss=False))
    await daemon.jobs.get("j").wait_concluded()
    assert dirty(daemon, "target", "b") == list(range(11))
