"""A disk that cannot sync, under bitmaps that are to outlive a loss of power: nothing passes unrecorded.

Whatever needs the bitmap's file on disk fails with one clear line, and leaves everything as it was.
"""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nbdbackup.bitmap.file import BitmapFile
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.block.file import FileDevice
from nbdbackup.daemon.stored_bitmaps import StoredBitmaps
from nbdbackup.daemon.transaction import run_transaction
from nbdbackup.errors import DeviceError
from nbdbackup.job.sync import Sync, SyncMode
from nbdbackup.monitor.services_backup import BackupRequest, TargetPath
from nbdbackup.monitor.services_bitmaps import (
    BitmapAdd,
    BitmapChange,
    BitmapClear,
    BitmapEnable,
    BitmapRemove,
)
from nbdbackup.monitor.services_snapshots import SnapshotOptions
from tests.support.daemon import Daemon, composed

GRANULE = 65536
SIZE = 8 * GRANULE
LIMIT_S = 20.0

Fail = Callable[[str], None]


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    async with composed(tmp_path, stored=StoredBitmaps(tmp_path / "bitmaps", power=True)) as daemon:
        daemon.add("disk", FileDevice.open(str(tmp_path / "disk")), str(tmp_path / "disk"))
        await change(daemon, BitmapAdd("disk", "b0", GRANULE, persistent=True))
        await daemon.graph.get("disk").write(0, b"old" * 100)
        yield daemon


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Let syncs of "bitmaps" or of the "disk" fail from now on; "": of neither."""
    real_file_sync, real_sync = BitmapFile.sync, FileDevice._sync

    def set_failing(what: str) -> None:
        monkeypatch.setattr(BitmapFile, "sync", _fail if what == "bitmaps" else real_file_sync)
        monkeypatch.setattr(FileDevice, "_sync", _fail if what == "disk" else real_sync)

    return set_failing


def _fail(self: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


async def change(daemon: Daemon, *changes: BitmapChange) -> None:
    await run_transaction([daemon.bitmaps.action(each) for each in changes])


def bitmap_of(daemon: Daemon) -> StoredBitmap:
    bitmap = daemon.graph.entry("disk").bitmaps.get("b0")
    assert isinstance(bitmap, StoredBitmap)
    return bitmap


def dirty(bitmap: StoredBitmap) -> set[int]:
    return {run.offset // GRANULE for run in bitmap.dirty_runs()}


def incremental(tmp_path: Path) -> BackupRequest:
    return BackupRequest(
        "disk", TargetPath(str(tmp_path / "target")), Sync(SyncMode.INCREMENTAL, "b0"), auto_dismiss=False
    )


async def test_writes_fail_and_do_not_reach_the_disk_for_good(
    daemon: Daemon, fail: Fail, tmp_path: Path
) -> None:
    node = daemon.graph.get("disk")
    fail("bitmaps")
    for again in range(2):
        with pytest.raises(DeviceError, match="--bitmap-durability power"):
            await node.write(3 * GRANULE, b"new")
        assert not node.write_nowait(3 * GRANULE, b"new"), again
        fail("")
    assert (tmp_path / "disk").read_bytes()[3 * GRANULE :] == bytes(SIZE - 3 * GRANULE)


async def test_a_backup_whose_bitmap_cannot_be_frozen_is_refused_and_leaves_nothing(
    daemon: Daemon, fail: Fail, tmp_path: Path
) -> None:
    fail("bitmaps")
    with pytest.raises(OSError, match="Input/output error"):
        await daemon.backups.start(incremental(tmp_path))
    assert list(daemon.jobs) == []
    assert not bitmap_of(daemon).busy
    assert not [path for path in os.listdir(tmp_path) if path.startswith("target")]
    fail("")
    assert 0 in dirty(bitmap_of(daemon))


async def test_a_backup_whose_bitmap_cannot_be_relieved_of_its_bits_keeps_them(
    daemon: Daemon, fail: Fail, tmp_path: Path
) -> None:
    job = daemon.jobs.get(await daemon.backups.start(incremental(tmp_path)))
    fail("bitmaps")
    async with asyncio.timeout(LIMIT_S):
        await job.wait_concluded()
    fail("")
    job.dismiss()
    bitmap = bitmap_of(daemon)
    assert not bitmap.busy
    assert 0 in dirty(bitmap)


@pytest.mark.parametrize("what", ["bitmaps", "disk"])
@pytest.mark.parametrize(
    "changes",
    [
        [BitmapClear("disk", "b0")],
        [BitmapEnable("disk", "b0", enabled=False), BitmapEnable("disk", "b0")],
        [BitmapAdd("disk", "b1", GRANULE, persistent=True)],
    ],
    ids=["clear", "enable", "add"],
)
async def test_a_change_that_cannot_be_put_on_disk_is_refused_and_undone(
    daemon: Daemon, fail: Fail, what: str, changes: list[BitmapChange], tmp_path: Path
) -> None:
    files = sorted(os.listdir(tmp_path / "bitmaps"))
    fail(what)
    with pytest.raises(OSError, match="Input/output error"):
        await change(daemon, *changes)
    fail("")
    bitmap = bitmap_of(daemon)
    assert bitmap.enabled
    assert 0 in dirty(bitmap)
    assert sorted(os.listdir(tmp_path / "bitmaps")) == files
    assert len(list(daemon.graph.entry("disk").bitmaps)) == 1


@pytest.mark.parametrize("what", ["bitmaps", "disk"])
async def test_a_pull_whose_end_cannot_be_put_on_disk_keeps_the_bits(
    daemon: Daemon, fail: Fail, what: str
) -> None:
    await daemon.snapshots.create(["disk"], SnapshotOptions(name="s", bitmap="b0", temporary=True))
    fail(what)
    with pytest.raises(OSError, match="Input/output error"):
        await daemon.snapshots.drop(["disk@s"], pulled=True)
    fail("")
    if what == "disk":
        # Refused before anything was done.
        await daemon.snapshots.drop(["disk@s"])
    assert daemon.snapshots.list() == []
    assert not bitmap_of(daemon).busy
    assert 0 in dirty(bitmap_of(daemon))


@pytest.mark.parametrize("what", ["bitmaps", "disk"])
async def test_a_checkpoint_that_cannot_be_put_on_disk_is_not_made(
    daemon: Daemon, fail: Fail, what: str
) -> None:
    await daemon.checkpoints.create(["disk"], SnapshotOptions(name="c1", temporary=True))
    fail(what)
    with pytest.raises(OSError, match="Input/output error"):
        await daemon.checkpoints.create(["disk"], SnapshotOptions(name="c2", temporary=True))
    fail("")
    assert [info.name for info in daemon.checkpoints.list()] == ["c1"]
    assert [bitmap.enabled for bitmap in daemon.graph.entry("disk").bitmaps if bitmap.name == "c1"] == [True]
    assert "disk@c2" not in daemon.snapshots.live


async def test_writes_pass_again_when_the_bitmap_is_removed(
    daemon: Daemon, fail: Fail, tmp_path: Path
) -> None:
    node = daemon.graph.get("disk")
    fail("bitmaps")
    with pytest.raises(DeviceError):
        await node.write(3 * GRANULE, b"new")
    await change(daemon, BitmapRemove("disk", "b0"))
    await node.write(3 * GRANULE, b"new")
    assert (tmp_path / "disk").read_bytes()[3 * GRANULE :].startswith(b"new")
    assert os.listdir(tmp_path / "bitmaps") == []
