"""Bitmap files that are damaged, foreign, cut off or in a place that is full or read-only."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from nbdbackup.bitmap.file import BitmapFile
from nbdbackup.bitmap.file_format import (
    PLANES_OFFSET,
    SLOT_BYTES,
    Header,
    HeaderError,
    HeaderFlags,
    build,
    checksum,
    parse,
)
from nbdbackup.errors import ConflictError, DeviceError
from tests.support.peers import require, require_root
from tests.support.stored_bitmaps import GRANULE, SOURCE

CHECKSUM_AT = slice(12, 44)


def header() -> Header:
    flags = HeaderFlags.ENABLED | HeaderFlags.BOTH | HeaderFlags.SECOND_PLANE
    return Header(b"u" * 16, "disk ü", "b0", GRANULE, SOURCE, flags, 7, b"b" * 16, 123, b"c" * 32, "because")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bitmap file with granule 3 of plane 1 dirty."""
    path = tmp_path / "disk:b0.bitmap"
    file = BitmapFile.create(path, header())
    file.plane(1)[3] = 1
    file.close()
    return path


def patched(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def refusal(path: Path) -> str:
    """Why `path` is not opened; it is as it was afterwards."""
    before = path.read_bytes()
    with pytest.raises(DeviceError) as caught:
        BitmapFile.open(path)
    assert path.read_bytes() == before
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_header_is_read_as_it_was_written() -> None:
    assert parse(build(header())) == header()


def test_what_was_stored_is_found_again(path: Path) -> None:
    file = BitmapFile.open(path)
    assert file.header == replace(header(), generation=8)
    assert file.plane(file.header.own_plane).find(1) == 3
    assert not file.plane(0).any()
    file.close()


def test_every_flipped_byte_of_a_slot_is_noticed() -> None:
    slot = build(header())
    for place in range(SLOT_BYTES):
        damaged = bytearray(slot)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(HeaderError):
            parse(bytes(damaged))


@pytest.mark.parametrize("slot", [0, 1])
def test_damage_to_one_slot_is_no_loss_and_is_mended_by_the_next_change(path: Path, slot: int) -> None:
    patched(path, slot * SLOT_BYTES + 50, b"damage")
    file = BitmapFile.open(path)
    assert file.header == replace(header(), generation=8)
    file.write_header(file.header, sync=False)
    file.close()
    data = path.read_bytes()
    assert parse(data[:SLOT_BYTES]) == parse(data[SLOT_BYTES:PLANES_OFFSET])


def test_a_change_cut_short_in_either_slot_leaves_the_one_before_or_after_it(path: Path) -> None:
    before = path.read_bytes()
    file = BitmapFile.open(path)
    file.write_header(replace(file.header, inconsistent="new"), sync=False)
    file.close()
    after = path.read_bytes()
    found: list[str] = []
    for cut in range(0, 2 * SLOT_BYTES + 1, 64):
        path.write_bytes(after[:cut] + before[cut:])
        file = BitmapFile.open(path)
        found.append(file.header.inconsistent)
        file.close()
    # It takes place once, when the first slot is complete up to its padding.
    assert found == sorted(found)
    assert {found[0], found[-1]} == {"because", "new"}


def test_change_after_a_torn_one_never_endangers_the_slot_that_is_whole(path: Path) -> None:
    patched(path, 50, b"torn")
    file = BitmapFile.open(path)
    stores: list[int] = []
    file._store = lambda number, slot: stores.append(number)  # type: ignore[method-assign]
    file.write_header(file.header, sync=False)
    assert stores == [0, 1]
    patched(path, 0, path.read_bytes()[SLOT_BYTES:PLANES_OFFSET])
    patched(path, SLOT_BYTES + 50, b"torn")
    file = BitmapFile.open(path)
    file._store = lambda number, slot: stores.append(number)  # type: ignore[method-assign]
    file.write_header(file.header, sync=False)
    assert stores == [0, 1, 1, 0]


def test_damage_to_both_slots_is_refused_and_the_file_left_as_it_is(path: Path) -> None:
    patched(path, 50, b"damage")
    patched(path, SLOT_BYTES + 50, b"damage")
    assert "its header is damaged; move it away (the next backup of its disk is full)" in refusal(path)


def test_newer_version_is_refused_with_both_versions(path: Path) -> None:
    for slot in (0, 1):
        patched(path, slot * SLOT_BYTES + 8, (2).to_bytes(4, "big"))
    assert "it is of version 2, and this nbdbackup knows version 1 alone" in refusal(path)
    patched(path, 0, b"damage")
    assert "it is of version 2" in refusal(path)


def test_foreign_file_is_refused(path: Path) -> None:
    path.write_bytes(os.urandom(PLANES_OFFSET))
    assert "no bitmap file of nbdbackup" in refusal(path)


@pytest.mark.parametrize("length", [0, 1, SLOT_BYTES, PLANES_OFFSET, -1, -4096])
def test_file_of_another_length_is_refused(path: Path, length: int) -> None:
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    assert "bytes long" in refusal(path)


def test_longer_file_is_refused(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")
    assert "bytes long and should be" in refusal(path)


def signed(slot: bytearray) -> bytes:
    slot[CHECKSUM_AT] = checksum(bytes(slot[:12]), bytes(slot[44:]))
    return bytes(slot)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("flags", 1 << 20, "flags that this nbdbackup does not know"),
        ("granularity", 65537, "makes no sense"),
        ("granularity", 256, "makes no sense"),
        ("kind", 99, "makes no sense"),
        ("size", 0, "makes no sense"),
        ("node length", 1 << 31, "makes no sense"),
    ],
)
def test_header_with_a_right_checksum_and_wrong_fields_is_refused(
    field: str, value: int, reason: str
) -> None:
    places = {
        "flags": (52, 4),
        "granularity": (56, 4),
        "size": (60, 8),
        "kind": (140, 4),
        "node length": (176, 4),
    }
    offset, length = places[field]
    slot = bytearray(build(header()))
    slot[offset : offset + length] = value.to_bytes(length, "big")
    with pytest.raises(HeaderError, match=reason):
        parse(signed(slot))


def test_existing_file_is_not_overwritten(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ConflictError, match="exists already"):
        BitmapFile.create(path, header())
    assert path.read_bytes() == before


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    require_root("mounts a tmpfs")
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run([require("mount"), "-t", "tmpfs", "-o", "size=1M", "tmpfs", directory], check=True)
    yield directory
    with suppress(subprocess.CalledProcessError):
        subprocess.run([require("umount"), "-l", directory], check=True)


@pytest.mark.root
def test_no_room_is_an_error_when_the_bitmap_is_made_and_never_later(small: Path) -> None:
    large = replace(header(), identity=replace(SOURCE, size=1 << 42))
    with pytest.raises(DeviceError, match=r"bytes: No space left on device: make room") as caught:
        BitmapFile.create(small / "large", large)
    assert caught.value.errno == errno.ENOSPC
    assert list(small.iterdir()) == []
    fits = replace(header(), identity=replace(SOURCE, size=1 << 37))
    file = BitmapFile.create(small / "fits", fits)
    with suppress(OSError):
        (small / "filler").write_bytes(bytes(1 << 20))
    file.plane(0).setall(1)
    file.plane(1).setall(1)
    assert file.plane(0).all()
    file.close()


@pytest.mark.root
def test_read_only_place_is_a_clear_error(small: Path) -> None:
    BitmapFile.create(small / "there", header()).close()
    subprocess.run([require("mount"), "-o", "remount,ro", small], check=True)
    with pytest.raises(DeviceError, match=r"cannot make bitmap file .*: Read-only file system"):
        BitmapFile.create(small / "new", header())
    with pytest.raises(DeviceError, match=r"cannot open bitmap file .*: Read-only file system"):
        BitmapFile.open(small / "there")
