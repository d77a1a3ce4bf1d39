"""Copies of bitmaps in files of a snapshot: what is loaded is what was dirty at the instant, or nothing."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from nbdbackup.bitmap.dirty import FREEZE_CHANGES_MAX, DirtyBitmap, Freeze
from nbdbackup.errors import ConflictError
from nbdbackup.fleece.frozen_copies import BitmapToCopy, FrozenCopies
from nbdbackup.fleece.snapshot_format import ScratchIdentity, SnapshotFlags, SnapshotHeader
from tests.support.stored_bitmaps import BOOT, GRANULE, SIZE, SOURCE

SNAPSHOT = SnapshotHeader(
    b"s" * 16,
    "disk",
    "s",
    GRANULE,
    SOURCE,
    ScratchIdentity("/nowhere"),
    None,
    "break-snapshot",
    0.0,
    SnapshotFlags.LIVE,
    boot_id=BOOT,
)
SIDECAR = "disk@s.snapshot"


def copies_for(directory: Path, *names: str) -> FrozenCopies:
    return FrozenCopies.create(directory / SIDECAR, SNAPSHOT, [BitmapToCopy(name, GRANULE) for name in names])


def loaded(directory: Path) -> dict[str, list[int]]:
    """The first granule of each dirty run, by the bitmaps' names."""
    copies = FrozenCopies.load(directory / SIDECAR, SNAPSHOT)
    copies.close()
    return {bitmap.name: [run.offset // GRANULE for run in bitmap.dirty_runs()] for bitmap in copies.bitmaps}


def persistent(name: str, granularity: int = GRANULE) -> DirtyBitmap:
    return DirtyBitmap(name, SIZE, granularity, persistent=True)


@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "killed"])
def test_a_copy_has_what_was_dirty_at_the_instant_and_nothing_later(tmp_path: Path, clean: bool) -> None:
    copies, bitmap = copies_for(tmp_path, "b0"), persistent("b0")
    bitmap.mark(3 * GRANULE, 1)
    freeze = Freeze(bitmap, copies.plane_for(bitmap))
    for _ in freeze.pieces():
        bitmap.mark(7 * GRANULE, 1)
    frozen = freeze.finish()
    bitmap.mark(9 * GRANULE, 1)
    assert [run.offset // GRANULE for run in frozen.dirty_runs()] == [3, 7]
    if clean:
        copies.save_clean()
    copies.close()
    assert loaded(tmp_path) == {"b0": [3, 7]}


@pytest.mark.parametrize("change", ["cleared", "many writes"])
def test_what_was_taken_back_before_the_instant_is_not_in_the_copy(tmp_path: Path, change: str) -> None:
    copies, bitmap = copies_for(tmp_path, "b0"), persistent("b0")
    bitmap.mark(3 * GRANULE, 1)
    freeze = Freeze(bitmap, copies.plane_for(bitmap))
    for _ in freeze.pieces():
        pass
    if change == "cleared":
        bitmap.forget(bitmap.clear())
    else:
        for number in range(FREEZE_CHANGES_MAX + 1):
            freeze.note(number % 5, number % 5 + 1)
        bitmap.clear()
    bitmap.mark(4 * GRANULE, 1)
    freeze.finish()
    copies.close()
    assert loaded(tmp_path) == {"b0": [4]}


def test_copies_that_were_not_made_at_the_instant_are_not_shown(tmp_path: Path) -> None:
    copies, bitmap = copies_for(tmp_path, "b0", "gone", "other"), persistent("b0")
    assert copies.plane_for(persistent("other", 2 * GRANULE)) is None
    assert copies.plane_for(DirtyBitmap("gone", SIZE, GRANULE)) is None
    bitmap.mark(3 * GRANULE, 1)
    Freeze(bitmap, copies.plane_for(bitmap)).finish()
    copies.give_up_others({"b0"})
    assert loaded(tmp_path) == {"b0": [3]}
    copies.save_clean()
    copies.close()
    assert loaded(tmp_path) == {"b0": [3]}


def test_copies_of_another_snapshot_are_left_out(tmp_path: Path) -> None:
    copies_for(tmp_path, "b0").close()
    assert FrozenCopies.load(tmp_path / SIDECAR, replace(SNAPSHOT, uuid=b"t" * 16)).bitmaps == []


def test_when_one_cannot_be_made_none_is_left(tmp_path: Path) -> None:
    (tmp_path / f"{SIDECAR}.bitmap1").mkdir()
    with pytest.raises(ConflictError, match="exists already"):
        copies_for(tmp_path, "b0", "b1")
    assert not (tmp_path / f"{SIDECAR}.bitmap0").exists()
