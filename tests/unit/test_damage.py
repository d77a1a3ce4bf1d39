"""Damage to the files that outlive a server: refused, broken or inconsistent, and never taken for good.

Bits flipped at many places (that each byte of a header counts, the tests of the formats see), and files cut
at every page and beside it. What is loaded all the same has to say what it said before. A store into a
mapping of a file that is too short would end the process with SIGBUS.
"""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from nbdbackup.bitmap.file_format import SLOT_BYTES as BITMAP_SLOT_BYTES
from nbdbackup.bitmap.file_format import HeaderError
from nbdbackup.bitmap.identity import SIGN_OF_LIFE_SLACK_S
from nbdbackup.daemon.chain_file import ChainFile, ChainRecord, State
from nbdbackup.errors import DeviceError
from nbdbackup.extents import Extent
from nbdbackup.fleece import snapshot_store
from nbdbackup.fleece.frozen_copies import BitmapToCopy
from nbdbackup.fleece.snapshot_format import SLOT_BYTES, build, parse
from nbdbackup.fleece.snapshot_store import NewSnapshot, SnapshotStore, StoredSnapshot
from tests.support.stored_bitmaps import BOOT, GRANULE, NOW_NS, SOURCE, make_store

PAGE = 4096
HOLDER = b"h" * 16
CLUSTER = GRANULE
SAVED = b"saved"
SECOND_NS = 10**9
STRIDE = 41
"""Not every byte of a file is tried."""

Damage = Callable[[bytes], bytes]


def flipped(place: int, *more: int) -> Damage:
    """One bit at each place is another one."""

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        for each in (place, *more):
            changed[each] ^= 1 << place % 8
        return bytes(changed)

    return damage


def is_one_line_of(error: DeviceError, part: str) -> bool:
    return part in str(error) and "\n" not in str(error)


def cut(length: int) -> Damage:
    return lambda data: data[:length]


def damages(length: int, slot_bytes: int) -> Iterator[Damage]:
    """Of a file of two slots and planes: bits flipped in both slots or in a plane, and every page cut."""
    for place in range(0, slot_bytes, STRIDE):
        yield flipped(place, slot_bytes + place)
    for place in range(2 * slot_bytes, length, STRIDE):
        yield flipped(place)
    for stop in range(0, length, PAGE):
        yield from (cut(max(stop - 1, 0)), cut(stop), cut(min(stop + 1, length - 1)))


# Bitmaps.


def stored_bitmap(directory: Path, *, clean: bool, held: bool) -> bytes:
    """The file of a bitmap with granule 3 dirty, and if it is held, 9 in the successor."""
    store = make_store(directory)
    bitmap = store.create("disk", "b0", GRANULE, SOURCE)
    store.publish(bitmap)
    bitmap.mark(3 * GRANULE, 1)
    if held:
        bitmap.create_successor(HOLDER)
        bitmap.mark(9 * GRANULE, 1)
    if clean:
        store.release(bitmap, SOURCE)
    bitmap.file.close()
    return bitmap.file.path.read_bytes()


@pytest.mark.parametrize("held", [False, True], ids=["own plane", "held"])
def test_a_damaged_bitmap_file_is_refused_or_inconsistent_and_never_says_less(
    tmp_path: Path, held: bool
) -> None:
    data = stored_bitmap(tmp_path, clean=True, held=held)
    path = tmp_path / "disk:b0.bitmap"
    outcomes = set()
    for damage in damages(len(data), BITMAP_SLOT_BYTES):
        path.write_bytes(damage(data))
        outcomes.add(load_bitmap(tmp_path, held))
    assert outcomes == {"as it was", "inconsistent", "refused"}


def load_bitmap(directory: Path, held: bool) -> str:
    """What became of it; what is loaded for good is what was stored."""
    try:
        (bitmap,) = make_store(directory).load("disk", SOURCE)
    except DeviceError as error:
        return "refused" if is_one_line_of(error, "disk:b0.bitmap") else str(error)
    bitmap.file.close()
    if bitmap.inconsistent:
        assert not bitmap.is_frozen
        return "inconsistent"
    assert [run.offset // GRANULE for run in bitmap.dirty_runs()] == [3]
    assert (bitmap.is_frozen, bitmap.successor_count) == (held, int(held))
    return "as it was"


def test_a_bitmap_file_that_was_cut_after_a_kill_is_refused(tmp_path: Path) -> None:
    data = stored_bitmap(tmp_path, clean=False, held=True)
    path = tmp_path / "disk:b0.bitmap"
    for stop in range(0, len(data), PAGE):
        path.write_bytes(data[:stop])
        assert load_bitmap(tmp_path, True) == "refused"


# Snapshots.


def test_every_flipped_byte_of_a_snapshots_slot_is_noticed(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk:
        slot = build(disk.take().header)
    for place in range(SLOT_BYTES):
        with pytest.raises(HeaderError):
            parse(flipped(place)(slot))


class Disk:
    """A disk with room for a snapshot disk@s, which has cluster 5 saved, and granule 3 dirty in b."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sidecar = directory / "snapshots" / "disk@s.snapshot"
        self._open: list[StoredSnapshot] = []

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        for snapshot in self._open:
            snapshot.file.close()
            snapshot.close()

    def store(self) -> SnapshotStore:
        store = SnapshotStore(self.directory / "snapshots", boot_id=BOOT, now_ns=lambda: NOW_NS)
        store.open()
        return store

    def take(self, *, clean: bool = True) -> StoredSnapshot:
        store = self.store()
        scratch = self.directory / "scratch"
        scratch.mkdir()
        wanted = [BitmapToCopy("b", GRANULE)]
        new = NewSnapshot("disk", "s", CLUSTER, scratch, None, "break-snapshot", 0.0, wanted)
        snapshot = store.create(new, SOURCE)
        path = Path(snapshot.header.scratch.path)
        with path.open("r+b") as file:
            file.seek(5 * CLUSTER)
            file.write(SAVED)
        os.utime(path, ns=(NOW_NS, NOW_NS))
        area = Extent(5 * CLUSTER, CLUSTER)
        snapshot.file.done().set(area)
        next(iter(snapshot.copies._files.values())).plane(0)[3] = 1
        snapshot.go_live(snapshot.header.created)
        if clean:
            store.release(snapshot, SOURCE)
        snapshot.close()
        return snapshot

    def load(self) -> tuple[StoredSnapshot | None, str]:
        """The snapshot, or why it is not to be had."""
        store = self.store()
        loaded = store.load("disk", SOURCE)
        if loaded:
            self._open += loaded
            return loaded[0], ""
        (at_rest,) = store.at_rest.values()
        assert at_rest.cause
        assert "\n" not in at_rest.cause
        return None, at_rest.cause


def test_a_damaged_sidecar_is_broken_with_the_reason_and_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is needed for the next damage.
    monkeypatch.setattr(snapshot_store, "free_scratch", lambda header: None)
    with Disk(tmp_path) as disk:
        disk.take()
        data = disk.sidecar.read_bytes()
        for damage in damages(len(data), SLOT_BYTES):
            disk.sidecar.write_bytes(damage(data))
            snapshot, _ = disk.load()
            assert snapshot is None
        disk.sidecar.write_bytes(data)
        snapshot, cause = disk.load()
        assert snapshot is not None, cause


@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "killed"])
def test_scratch_that_was_cut_or_changed_breaks_its_snapshot(tmp_path: Path, clean: bool) -> None:
    with Disk(tmp_path) as disk:
        scratch = Path(disk.take(clean=clean).header.scratch.path)
        sidecar = disk.sidecar.read_bytes()
        size = scratch.stat().st_size
        for length in (0, PAGE, 5 * CLUSTER, size - 1, size + 1):
            disk.sidecar.write_bytes(sidecar)
            os.truncate(scratch, length)
            assert "bytes long" in disk.load()[1]
        disk.sidecar.write_bytes(sidecar)
        os.truncate(scratch, size)
        later_ns = NOW_NS + (SIGN_OF_LIFE_SLACK_S + 1) * SECOND_NS
        os.utime(scratch, ns=(later_ns, later_ns))
        assert "was changed" in disk.load()[1]


def test_a_damaged_copy_of_a_bitmap_is_left_out_and_a_whole_one_says_what_it_said(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk:
        disk.take()
        sidecar = disk.sidecar.read_bytes()
        (path,) = disk.sidecar.parent.glob("*.bitmap0")
        data = path.read_bytes()
        outcomes = set()
        for damage in (lambda whole: whole, *damages(len(data), BITMAP_SLOT_BYTES)):
            path.write_bytes(damage(data))
            disk.sidecar.write_bytes(sidecar)
            snapshot, cause = disk.load()
            assert snapshot is not None, cause
            found = [(bitmap.name, list(bitmap.dirty_runs())) for bitmap in snapshot.copies.bitmaps]
            assert found in ([], [("b", [Extent(3 * GRANULE, GRANULE)])])
            outcomes.add(len(found))
            snapshot.close()
    assert outcomes == {0, 1}


# The chain of checkpoints.


def test_a_damaged_chain_file_is_refused_wherever_it_is_damaged(tmp_path: Path) -> None:
    file = ChainFile(tmp_path)
    parent = UUID(int=7)
    created = datetime(2026, 11, 24, tzinfo=UTC)
    file.write_new(
        [
            ChainRecord("disk", "c1", parent, None, created, State.MADE),
            ChainRecord("disk", "c2", UUID(int=8), parent, created, State.MADE),
        ]
    )
    file.replace()
    records, data = file.read(), file.path.read_bytes()
    refused = 0
    for place in range(len(data)):
        for damage in (flipped(place), cut(place)):
            file.path.write_bytes(damage(data))
            try:
                assert file.read() == records
            except DeviceError as error:
                refused += is_one_line_of(error, "move it away")
    # All but the end of its last line.
    assert refused >= 2 * len(data) - 4
