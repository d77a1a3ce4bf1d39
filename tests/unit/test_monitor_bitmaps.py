"""The commands about bitmaps and checkpoints: arguments as QEMU checks them, passed on as they are meant."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from nbdbackup.job.events import Json
from nbdbackup.monitor.commands_bitmaps import bitmap_info
from nbdbackup.monitor.services_bitmaps import (
    BitmapAdd,
    BitmapChange,
    BitmapClear,
    BitmapEnable,
    BitmapInfo,
    BitmapMerge,
    BitmapRemove,
)
from nbdbackup.monitor.services_snapshots import CheckpointInfo, SnapshotOptions
from tests.support.monitor import bench

BITMAP: dict[str, Json] = {"node": "disk", "name": "b"}
CREATED = datetime(2026, 11, 23, 3, 4, 5, 6, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


ASKED: list[tuple[str, dict[str, Json], BitmapChange]] = [
    ("add", BITMAP, BitmapAdd("disk", "b")),
    (
        "add",
        {**BITMAP, "granularity": 512, "persistent": True, "disabled": True},
        BitmapAdd("disk", "b", 512, persistent=True, enabled=False),
    ),
    ("remove", BITMAP, BitmapRemove("disk", "b")),
    ("clear", BITMAP, BitmapClear("disk", "b")),
    ("enable", BITMAP, BitmapEnable("disk", "b", enabled=True)),
    ("disable", BITMAP, BitmapEnable("disk", "b", enabled=False)),
    (
        "merge",
        {"node": "disk", "target": "t", "bitmaps": ["b", {"node": "other", "name": "c"}]},
        BitmapMerge("disk", "t", [("disk", "b"), ("other", "c")]),
    ),
    ("merge", {"node": "disk", "target": "t", "bitmaps": []}, BitmapMerge("disk", "t", [])),
]


@pytest.mark.parametrize(("verb", "arguments", "change"), ASKED)
async def test_a_command_and_an_action_ask_for_the_same_change(
    path: Path, verb: str, arguments: dict[str, Json], change: BitmapChange
) -> None:
    name = f"block-dirty-bitmap-{verb}"
    async with bench(path) as control, control.connected() as client:
        assert await client.execute(name, arguments) == {}
        actions: list[Json] = [{"type": name, "data": arguments}]
        assert await client.execute("transaction", {"actions": actions}) == {}
        assert control.bitmaps.changes == [change, change]


@pytest.mark.parametrize(
    ("verb", "arguments", "text"),
    [
        ("add", {"node": "disk"}, "Parameter 'name' is missing"),
        ("add", {"name": "b"}, "Parameter 'node' is missing"),
        ("add", {**BITMAP, "x": 1}, "Parameter 'x' is unexpected"),
        ("add", {**BITMAP, "granularity": "64K"}, "Parameter 'granularity' expects uint64"),
        ("add", {**BITMAP, "granularity": True}, "Parameter 'granularity' expects uint64"),
        ("add", {**BITMAP, "granularity": -1}, "Parameter 'granularity' expects uint32_t"),
        ("add", {**BITMAP, "granularity": 1 << 32}, "Parameter 'granularity' expects uint32_t"),
        ("remove", {"node": 1, "name": "b"}, "Invalid parameter type for 'node', expected: string"),
        (
            "merge",
            {"node": "disk", "target": "t", "bitmaps": "b"},
            "Invalid parameter type for 'bitmaps', expected: array",
        ),
        (
            "merge",
            {"node": "disk", "target": "t", "bitmaps": ["b", 5]},
            "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
        ),
        (
            "merge",
            {"node": "disk", "target": "t", "bitmaps": [{"node": "disk"}]},
            "Parameter 'bitmaps[0].name' is missing",
        ),
    ],
)
async def test_arguments_that_do_not_fit_are_refused(
    path: Path, verb: str, arguments: dict[str, Json], text: str
) -> None:
    async with bench(path) as control, control.connected() as client:
        assert await client.fail(f"block-dirty-bitmap-{verb}", arguments) == ("GenericError", text)
        assert control.bitmaps.changes == []


def test_a_bitmap_is_shown_with_qemus_members() -> None:
    info = BitmapInfo("b", 65536, 131072, recording=True, busy=False, persistent=False)
    shown: dict[str, Json] = {
        "name": "b",
        "count": 131072,
        "granularity": 65536,
        "recording": True,
        "busy": False,
        "persistent": False,
    }
    assert bitmap_info(info) == shown
    nameless = BitmapInfo(None, 65536, 0, recording=True, busy=False, persistent=False, inconsistent="why")
    del shown["name"]
    assert bitmap_info(nameless) == {
        **shown,
        "count": 0,
        "inconsistent": True,
        "x-nbdbackup-inconsistent-because": "why",
    }


async def test_snapshots_are_told_of_their_bitmap_and_of_the_pull(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        await client.execute("x-nbdbackup-snapshot-create", {"nodes": ["a", "b"], "name": "s", "bitmap": "b"})
        assert control.snapshots.taken == [(["a", "b"], SnapshotOptions("s", bitmap="b"))]
        await client.execute("x-nbdbackup-snapshot-drop", {"snapshots": ["a@s"], "pulled": True})
        await client.execute("x-nbdbackup-snapshot-drop", {"snapshots": ["b@s"]})
        assert control.snapshots.drops_pulled == [True, False]


async def test_checkpoints(path: Path) -> None:
    async with bench(path) as control, control.connected() as client:
        arguments: dict[str, Json] = {"nodes": ["a"], "name": "c2", "scratch": "/s", "cbw-timeout": 2}
        assert "a@c2" in str(await client.execute("x-nbdbackup-checkpoint-create", arguments))
        assert control.snapshots.taken == [(["a"], SnapshotOptions("c2", "/s", cbw_timeout_s=2))]
        control.checkpoints.infos.append(CheckpointInfo("a", "c2", "u2", "c1", CREATED, 65536, 65536))
        shown: dict[str, Json] = {
            "node": "a",
            "name": "c2",
            "uuid": "u2",
            "parent": "c1",
            "created": "2026-11-23T03:04:05.000006Z",
            "dirty": 65536,
            "granularity": 65536,
        }
        assert await client.execute("x-nbdbackup-query-checkpoints") == [shown]
        assert await client.execute("x-nbdbackup-checkpoint-delete", {"name": "c2"}) == [shown]
        assert await client.execute("x-nbdbackup-checkpoint-delete", {"name": "x", "nodes": ["a"]}) == []
        assert control.checkpoints.deleted == [([], "c2"), (["a"], "x")]
        assert await client.fail("x-nbdbackup-checkpoint-delete", {"name": ""}) == (
            "GenericError",
            "Parameter 'name' expects the name of a checkpoint",
        )
        assert await client.fail("x-nbdbackup-checkpoint-delete", {"name": "c", "nodes": []}) == (
            "GenericError",
            "Parameter 'nodes' expects at least one name",
        )
        assert await client.fail("x-nbdbackup-checkpoint-create", {"nodes": ["a"]}) == (
            "GenericError",
            "Parameter 'name' is missing",
        )
