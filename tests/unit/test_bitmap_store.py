"""Bitmaps in files: what is loaded after a stop, a crash, a restart of the machine, of a changed disk."""

import errno
from pathlib import Path

import pytest
from msgspec.structs import replace

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.bitmap.file_format import NO_HOLDER, HeaderFlags
from nbdbackup.bitmap.identity import SIGN_OF_LIFE_SLACK_S, SourceIdentity, SourceKind
from nbdbackup.bitmap.store import BitmapStore, current_boot_id
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.errors import ConflictError, DeviceError, UsageError
from nbdbackup.extents import Extent
from nbdbackup.job.sync import BitmapSyncMode, FrozenBitmap
from tests.support.stored_bitmaps import BOOT, GRANULE, NEXT_BOOT, NOW_NS, SIZE, SOURCE, make_store

SECOND_NS = 10**9


def open_files(directory: Path) -> list[str]:
    """What this process has open or mapped in `directory`."""
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [name for name in mapped + opened if name.startswith(str(directory))]


def new_bitmap(store: BitmapStore, name: str = "b0", source: SourceIdentity = SOURCE) -> StoredBitmap:
    bitmap = store.create("disk", name, GRANULE, source)
    store.publish(bitmap)
    store.sync_directory()
    return bitmap


def load(store: BitmapStore, source: SourceIdentity = SOURCE) -> StoredBitmap:
    (bitmap,) = store.load("disk", source)
    return bitmap


def dirty(bitmap: DirtyBitmap) -> list[int]:
    """The first granule of each dirty run."""
    return [run.offset // GRANULE for run in bitmap.dirty_runs()]


def reloaded(
    directory: Path, then: SourceIdentity, now: SourceIdentity, *, clean: bool, boot: bytes
) -> StoredBitmap:
    """A bitmap with granule 3 dirty, after its server stopped, cleanly or not, and another one started."""
    store = make_store(directory)
    bitmap = new_bitmap(store, source=then)
    bitmap.mark(3 * GRANULE, 1)
    if clean:
        store.release(bitmap, then)
    return load(make_store(directory, boot), now)


@pytest.mark.parametrize("boot", [BOOT, NEXT_BOOT], ids=["same-boot", "next-boot"])
def test_bits_and_state_survive_a_clean_stop(tmp_path: Path, boot: bytes) -> None:
    store = make_store(tmp_path)
    bitmap = new_bitmap(store)
    bitmap.mark(3 * GRANULE, 5 * GRANULE)
    bitmap.mark(SIZE - 1, 1)
    bitmap.enabled = False
    store.release(bitmap, SOURCE)
    again = load(make_store(tmp_path, boot))
    assert (again.name, again.size, again.granularity) == ("b0", SIZE, GRANULE)
    assert (again.enabled, again.persistent, again.inconsistent) == (False, True, "")
    assert list(again.dirty_runs()) == [
        Extent(3 * GRANULE, 5 * GRANULE),
        Extent(999 * GRANULE, SIZE - 999 * GRANULE),
    ]


def test_a_killed_server_has_lost_no_bit_on_the_same_boot(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    bitmap.mark(3 * GRANULE, 1)
    again = load(make_store(tmp_path))
    assert (dirty(again), again.inconsistent, again.enabled) == ([3], "", True)


def test_bits_frozen_by_a_killed_server_are_dirty_again_with_those_of_the_successor(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    bitmap.mark(3 * GRANULE, 1)
    bitmap.create_successor()
    bitmap.mark(9 * GRANULE, 1)
    again = load(make_store(tmp_path))
    assert (dirty(again), again.is_frozen) == ([3, 9], False)


def test_after_abdication_only_the_successors_bits_are_loaded(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    bitmap.mark(3 * GRANULE, 1)
    bitmap.create_successor()
    bitmap.mark(9 * GRANULE, 1)
    bitmap.abdicate()
    bitmap.mark(20 * GRANULE, 1)
    assert dirty(load(make_store(tmp_path))) == [9, 20]


def test_a_successor_begins_clean_also_after_many_cycles_and_restarts(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    for cycle in range(5):
        bitmap.mark(cycle * GRANULE, 1)
        bitmap.create_successor()
        bitmap.mark((100 + cycle) * GRANULE, 1)
        bitmap.abdicate()
        assert dirty(bitmap) == [100 + cycle]
        bitmap = load(make_store(tmp_path))
        assert dirty(bitmap) == [100 + cycle]
        bitmap.clear()


def test_a_clear_that_no_one_made_final_is_undone_by_a_crash(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    bitmap.mark(3 * GRANULE, 1)
    bitmap.clear()
    assert bitmap.count == 0
    assert dirty(load(make_store(tmp_path))) == [3]


def test_what_was_cleared_twice_in_a_transaction_is_back_when_that_fails(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    bitmap.mark(3 * GRANULE, 1)
    other = DirtyBitmap("other", SIZE, GRANULE)
    other.mark(5 * GRANULE, 1)
    undo = [bitmap.clear(), bitmap.save()]
    bitmap.merge([other])
    undo.append(bitmap.clear())
    assert dirty(load(make_store(tmp_path))) == [3]
    bitmap = load(make_store(tmp_path))
    undo = [bitmap.clear(), bitmap.save()]
    bitmap.merge([other])
    undo.append(bitmap.clear())
    for saved in reversed(undo):
        bitmap.restore(saved)
    assert dirty(bitmap) == dirty(load(make_store(tmp_path))) == [3]


def test_a_final_clear_stays(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    bitmap.mark(3 * GRANULE, 1)
    bitmap.forget(bitmap.clear())
    bitmap.mark(4 * GRANULE, 1)
    assert dirty(load(make_store(tmp_path))) == [4]


def test_a_restored_clear_has_its_bits_and_a_clean_successor(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    bitmap.mark(3 * GRANULE, 1)
    bitmap.restore(bitmap.clear())
    bitmap.create_successor()
    bitmap.abdicate()
    assert (bitmap.count, dirty(load(make_store(tmp_path)))) == (0, [])


def test_merged_bits_are_loaded(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    other = DirtyBitmap("other", SIZE, GRANULE)
    other.mark(5 * GRANULE, 1)
    bitmap.merge([other])
    assert dirty(load(make_store(tmp_path))) == [5]


def test_restart_of_the_machine_makes_a_bitmap_in_use_inconsistent_for_good(tmp_path: Path) -> None:
    new_bitmap(make_store(tmp_path))
    again = load(make_store(tmp_path, NEXT_BOOT))
    assert "went down" in again.inconsistent
    assert "--bitmap-durability power" in again.inconsistent
    assert not again.enabled
    store = make_store(tmp_path, NEXT_BOOT)
    third = load(store)
    assert third.inconsistent == again.inconsistent
    store.release(third, SOURCE)
    assert load(make_store(tmp_path, NEXT_BOOT)).inconsistent == again.inconsistent


def test_with_durability_power_a_restart_of_the_machine_is_as_good_as_a_kill(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path, power=True))
    bitmap.mark(3 * GRANULE, 1)
    again = load(make_store(tmp_path, NEXT_BOOT))
    assert (dirty(again), again.inconsistent) == ([3], "")
    # This server was not told `power`: what it records does not outlive the next loss of power.
    assert "went down" in load(make_store(tmp_path, b"d" * 16)).inconsistent


OTHER_FILE = replace(SOURCE, inode=78)
RESIZED = replace(SOURCE, size=SIZE + 512)
BLOCK = SourceIdentity(SourceKind.BLOCK_DEVICE, SIZE, device=0x801, lasting_id="wwid naa.5000")
NAMELESS = replace(BLOCK, lasting_id="")
REMOTE = SourceIdentity(SourceKind.REMOTE, SIZE, lasting_id="nbd://a/disk")
SHARED = replace(SOURCE, kind=SourceKind.SHARED_FILE)
LATE_NS = NOW_NS + (SIGN_OF_LIFE_SLACK_S + 1) * SECOND_NS


@pytest.mark.parametrize(
    ("then", "now", "reason"),
    [
        (SOURCE, OTHER_FILE, "another file"),
        (SOURCE, RESIZED, f"was {SIZE} bytes long, and is {SIZE + 512} now"),
        (SOURCE, BLOCK, "a file, and is a block device"),
        (BLOCK, replace(BLOCK, device=0x802), "another block device"),
        (BLOCK, replace(BLOCK, lasting_id="wwid naa.6000"), "wwid naa.6000, not wwid naa.5000"),
        (REMOTE, replace(REMOTE, lasting_id="nbd://b/disk"), "nbd://b/disk, not nbd://a/disk"),
    ],
)
@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "killed"])
def test_bitmap_of_another_disk_is_inconsistent(
    tmp_path: Path, then: SourceIdentity, now: SourceIdentity, reason: str, clean: bool
) -> None:
    bitmap = reloaded(tmp_path, then, now, clean=clean, boot=BOOT)
    assert reason in bitmap.inconsistent
    assert not bitmap.enabled


@pytest.mark.parametrize("source", [SOURCE, SHARED])
@pytest.mark.parametrize("changed", ["mtime_ns", "ctime_ns"])
def test_a_file_touched_between_stop_and_start_makes_the_bitmap_inconsistent(
    tmp_path: Path, source: SourceIdentity, changed: str
) -> None:
    now = replace(source, **{changed: NOW_NS + 1})
    bitmap = reloaded(tmp_path, source, now, clean=True, boot=NEXT_BOOT)
    assert "changed while no server recorded it" in bitmap.inconsistent


def test_what_may_change_over_a_restart_of_the_machine_does_no_harm_after_a_clean_stop(
    tmp_path: Path,
) -> None:
    for number, (then, now) in enumerate(
        [(SOURCE, replace(SOURCE, device=6)), (BLOCK, replace(BLOCK, device=0x811)), (REMOTE, REMOTE)]
    ):
        bitmap = reloaded(tmp_path / str(number), then, now, clean=True, boot=NEXT_BOOT)
        assert (bitmap.inconsistent, dirty(bitmap)) == ("", [3])


def test_a_block_device_without_an_id_is_known_again_on_the_same_boot_alone(tmp_path: Path) -> None:
    assert reloaded(tmp_path / "0", NAMELESS, NAMELESS, clean=True, boot=BOOT).inconsistent == ""
    assert (
        "without an id"
        in reloaded(tmp_path / "1", NAMELESS, NAMELESS, clean=True, boot=NEXT_BOOT).inconsistent
    )


def test_own_writes_after_the_last_sign_of_life_are_no_strangers(tmp_path: Path) -> None:
    now = replace(SOURCE, mtime_ns=LATE_NS - 2 * SECOND_NS, ctime_ns=LATE_NS)
    assert reloaded(tmp_path, SOURCE, now, clean=False, boot=BOOT).inconsistent == ""


def test_a_write_long_after_the_last_sign_of_life_was_a_strangers(tmp_path: Path) -> None:
    now = replace(SOURCE, mtime_ns=LATE_NS)
    bitmap = reloaded(tmp_path, SOURCE, now, clean=False, boot=BOOT)
    assert "after the server that recorded it had died" in bitmap.inconsistent


def test_signs_of_life_move_the_time_from_which_writes_are_a_strangers(tmp_path: Path) -> None:
    times = iter([NOW_NS, NOW_NS + SECOND_NS, LATE_NS, LATE_NS])
    store = BitmapStore(tmp_path, lambda _: pytest.fail("no thread is needed"), now_ns=lambda: next(times))
    store.open()
    bitmap = new_bitmap(store)
    for _ in range(3):
        store.give_sign_of_life()
        bitmap.enabled = bitmap.enabled  # A change of the header in between.
    again = BitmapStore(tmp_path, lambda _: pytest.fail("no thread is needed"), now_ns=lambda: LATE_NS)
    again.open()
    assert load(again, replace(SOURCE, mtime_ns=LATE_NS)).inconsistent == ""


def test_bits_damaged_at_rest_make_the_bitmap_inconsistent(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    bitmap = new_bitmap(store)
    path, place = bitmap.file.path, bitmap.file.header.plane_offset(0)
    store.release(bitmap, SOURCE)
    data = bytearray(path.read_bytes())
    data[place + 9] ^= 4
    path.write_bytes(data)
    assert load(make_store(tmp_path)).inconsistent == "its bits were damaged"


def test_removed_bitmap_is_not_loaded_again_and_goes_on_in_memory(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    bitmap = new_bitmap(store)
    store.remove(bitmap)
    bitmap.mark(0, 1)
    assert dirty(bitmap) == [0]
    assert list(tmp_path.iterdir()) == []
    assert make_store(tmp_path).load("disk", SOURCE) == []


def test_bitmap_that_was_never_published_is_nobodys_after_a_crash(tmp_path: Path) -> None:
    make_store(tmp_path).create("disk", "b0", GRANULE, SOURCE)
    assert make_store(tmp_path).load("disk", SOURCE) == []
    assert list(tmp_path.iterdir()) == []


def test_each_node_gets_its_own_bitmaps_whatever_they_are_called(tmp_path: Path) -> None:
    names = {
        ("a", "b:c"),
        ("a:b", "c"),
        ("a", "../x/\u00a7"),
        ("ä" * 200, "ö" * 500),
        ("ä" * 200, "ö" * 499),
        ("a", "%3A"),
    }
    store = make_store(tmp_path)
    for node, name in names:
        store.publish(store.create(node, name, GRANULE, SOURCE))
    again = make_store(tmp_path)
    assert {(node, name) for node, found in again.nodes_at_rest().items() for name in found} == names
    assert {bitmap.name for bitmap in again.load("a", SOURCE)} == {"b:c", "../x/\u00a7", "%3A"}
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*"))


def test_bitmap_released_with_its_node_is_loaded_with_the_next_one_of_the_name(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    bitmap = new_bitmap(store)
    bitmap.mark(3 * GRANULE, 1)
    store.release(bitmap, SOURCE)
    assert dirty(load(store)) == [3]


async def test_closed_bitmap_gives_up_its_file(tmp_path: Path) -> None:
    store = make_store(tmp_path, power=True)
    bitmap = new_bitmap(store)
    store.release(bitmap, SOURCE)
    assert open_files(tmp_path)
    await bitmap.close()
    bitmap.mark(0, 1)
    assert not open_files(tmp_path)


def test_two_files_of_one_bitmap_are_refused_by_name(tmp_path: Path) -> None:
    bitmap = new_bitmap(make_store(tmp_path))
    copy = tmp_path / "copy.bitmap"
    copy.write_bytes(bitmap.file.path.read_bytes())
    with pytest.raises(
        ConflictError, match=r"copy\.bitmap and .*disk:b0\.bitmap are both bitmap 'b0' of node 'disk'"
    ):
        make_store(tmp_path)


def test_two_additions_of_one_name_at_a_time_do_not_hinder_each_other_before_one_is_published(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path)
    first, second = (store.create("disk", "b0", GRANULE, SOURCE) for _ in range(2))
    store.publish(first)
    with pytest.raises(ConflictError, match="exists already"):
        store.publish(second)
    store.remove(second)
    assert [path.name for path in tmp_path.iterdir()] == ["disk:b0.bitmap"]


def test_a_file_of_the_bitmaps_name_is_not_overwritten(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (tmp_path / "disk:b0.bitmap").write_text("precious")
    bitmap = store.create("disk", "b0", GRANULE, SOURCE)
    with pytest.raises(ConflictError, match="move it away"):
        store.publish(bitmap)
    assert (tmp_path / "disk:b0.bitmap").read_text() == "precious"


def test_name_that_does_not_fit_into_a_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        make_store(tmp_path).create("disk", "ö" * 512, GRANULE, SOURCE)


def test_state_that_is_no_directory_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "bitmaps").write_text("")
    with pytest.raises(DeviceError, match=r"cannot use directory .*bitmaps for bitmaps") as caught:
        make_store(tmp_path / "bitmaps")
    assert caught.value.errno == errno.EEXIST


def test_the_boot_has_an_id() -> None:
    assert len(current_boot_id()) == 16
    assert current_boot_id() == current_boot_id()


HOLDER = b"h" * 16


def held(directory: Path) -> tuple[BitmapStore, StoredBitmap]:
    """A bitmap in which granule 3 was dirty when it was frozen for HOLDER, and 9 became so after that."""
    store = make_store(directory)
    bitmap = new_bitmap(store)
    bitmap.mark(3 * GRANULE, 1)
    bitmap.create_successor(HOLDER)
    bitmap.mark(9 * GRANULE, 1)
    return store, bitmap


@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "killed"])
@pytest.mark.parametrize("succeeds", [True, False], ids=["succeeds", "fails"])
def test_a_backup_that_holds_a_bitmap_can_end_in_another_server(
    tmp_path: Path, clean: bool, succeeds: bool
) -> None:
    store, bitmap = held(tmp_path)
    if clean:
        store.release(bitmap, SOURCE)
    again = load(make_store(tmp_path))
    assert (again.holder, again.awaits_holder, again.busy) == (HOLDER, True, True)
    assert (dirty(again), again.count, again.successor_count) == ([3], 1, 1)
    frozen = FrozenBitmap.adopt(again, BitmapSyncMode.ON_SUCCESS)
    again.mark(20 * GRANULE, 1)
    if succeeds:
        frozen.succeed()
    else:
        frozen.fail(None)
    expected = [9, 20] if succeeds else [3, 9, 20]
    assert (dirty(again), again.holder, again.is_frozen) == (expected, None, False)
    assert dirty(load(make_store(tmp_path))) == expected


@pytest.mark.parametrize("plane", [0, 1])
def test_damage_of_either_plane_of_a_held_bitmap_is_seen(tmp_path: Path, plane: int) -> None:
    store, bitmap = held(tmp_path)
    path, place = bitmap.file.path, bitmap.file.header.plane_offset(plane)
    store.release(bitmap, SOURCE)
    data = bytearray(path.read_bytes())
    data[place + 9] ^= 4
    path.write_bytes(data)
    again = load(make_store(tmp_path))
    assert (again.inconsistent, again.is_frozen) == ("its bits were damaged", False)


def test_a_held_bitmap_of_a_disk_that_was_changed_is_inconsistent_and_not_frozen(tmp_path: Path) -> None:
    store, bitmap = held(tmp_path)
    store.release(bitmap, SOURCE)
    again = load(make_store(tmp_path), replace(SOURCE, mtime_ns=NOW_NS + 1))
    assert "changed while no server recorded it" in again.inconsistent
    assert (again.is_frozen, again.holder) == (False, None)


def test_what_an_always_counting_backup_did_not_copy_is_dirty_at_every_moment(tmp_path: Path) -> None:
    _, bitmap = held(tmp_path)
    frozen = FrozenBitmap.adopt(bitmap, BitmapSyncMode.ALWAYS)
    not_copied = ClusterBitmap(SIZE, GRANULE)
    not_copied.set(Extent(3 * GRANULE, GRANULE))
    seen = []

    class Watched(StoredBitmap):
        __slots__ = ()

        def _write(self, flags: HeaderFlags, holder: bytes = NO_HOLDER) -> None:
            super()._write(flags, holder)
            again = load(make_store(tmp_path))
            seen.append(dirty(again.frozen_copy()))

    bitmap.__class__ = Watched
    frozen.fail(not_copied)
    assert seen == [[3, 9]]
    assert dirty(bitmap) == [3, 9]
