"""What a stored snapshot shows of dirty bitmaps: a copy of each as it was at the instant, in its own file.

    create    with the snapshot, before it is LIVE; clients go on while the bits are copied, and what they
              change meanwhile is set at the instant (`bitmap.dirty.Freeze`)
    stop      the bits are synced, then the header has their checksum, and is not IN_USE
    remove    with the snapshot, when it is LIVE no more and before its sidecar goes

So every copy of a snapshot that is LIVE is whole, and after the instant its bits do not change any more. The
files are beside the sidecar, named after it and a number. A copy that cannot be used is left out, and the log
says so: a snapshot is good without it.
"""

import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from bitarray import bitarray
from msgspec.structs import replace

from nbdbackup.bitmap.dirty import DirtyBitmap, Planes
from nbdbackup.bitmap.file import BitmapFile
from nbdbackup.bitmap.file_format import Header, HeaderFlags
from nbdbackup.crash_points import reach
from nbdbackup.fleece.snapshot_format import SnapshotHeader

logger = logging.getLogger(__name__)

_NUMBERED = ".bitmap"


class BitmapToCopy(msgspec.Struct, frozen=True):
    """A bitmap of which a new snapshot shall have a copy. `granularity` is in bytes."""

    name: str
    granularity: int


class FrozenCopies:
    """The copies of one snapshot, by their bitmaps' names."""

    def __init__(self, files: dict[str, BitmapFile], bitmaps: Sequence[DirtyBitmap] = ()) -> None:
        self._files = files
        self.bitmaps = bitmaps
        """What was loaded."""

    @classmethod
    def create(
        cls, sidecar: Path, snapshot: SnapshotHeader, wanted: Sequence[BitmapToCopy]
    ) -> "FrozenCopies":
        """Make the files, with no bit set, for the snapshot that has `sidecar`. Blocks as file I/O does.

        Raises:
            DeviceError: one cannot be made; nothing is left.
        """
        copies = cls({})
        try:
            for number, bitmap in enumerate(wanted):
                header = Header(
                    uuid.uuid4().bytes,
                    snapshot.node,
                    bitmap.name,
                    bitmap.granularity,
                    snapshot.identity,
                    HeaderFlags.COPY | HeaderFlags.IN_USE,
                    boot_id=snapshot.boot_id,
                    holder=snapshot.uuid,
                )
                path = sidecar.with_name(f"{sidecar.name}{_NUMBERED}{number}")
                # A loss of power breaks the snapshot anyhow: nothing need be on disk before a clean stop.
                copies._files[bitmap.name] = BitmapFile.create(path, header, sync=False)
                reach("snapshot.create.bitmap")
        except BaseException:
            with suppress(OSError):
                remove_copies(sidecar)
            copies.close()
            raise
        return copies

    @classmethod
    def load(cls, sidecar: Path, snapshot: SnapshotHeader) -> "FrozenCopies":
        """Those of the snapshot that has `sidecar`, which is good. Blocks as file I/O does."""
        files: dict[str, BitmapFile] = {}
        bitmaps = []
        for path in _paths(sidecar):
            try:
                file = BitmapFile.open(path)
            except OSError as error:
                _leave_out(path, snapshot, error.strerror or str(error))
                continue
            header = file.header
            if reason := _doubt(file, snapshot):
                _leave_out(path, snapshot, reason)
            if reason or header.inconsistent:
                file.close()
                continue
            files[header.name] = file
            planes = Planes(file.plane(0), bitarray())
            bitmaps.append(
                DirtyBitmap(
                    header.name, header.identity.size, header.granularity, enabled=False, planes=planes
                )
            )
        return cls(files, bitmaps)

    def plane_for(self, bitmap: DirtyBitmap) -> bitarray | None:
        """Where the bits of `bitmap` as it is at the instant belong; None: there is no file for them."""
        file = self._files.get(bitmap.name)
        if file is None or not bitmap.persistent or file.header.granularity != bitmap.granularity:
            return None
        return file.plane(0)

    def give_up_others(self, names: set[str]) -> None:
        """The bits of the bitmaps of these `names` are there; those of others never will be. Cannot fail."""
        for name, file in self._files.items():
            if name not in names:
                header = replace(file.header, inconsistent="the bitmap was gone at the instant")
                file.write_header(header, sync=False)

    def save_clean(self) -> None:
        """The server stops: put everything on disk. Blocks as fsync(2) does.

        Raises:
            OSError: it cannot be put there.
        """
        for file in self._files.values():
            if HeaderFlags.IN_USE in file.header.flags:
                file.sync()
                reach("snapshot.save.bitmap-synced")
                flags = file.header.flags & ~HeaderFlags.IN_USE
                file.write_header(
                    replace(file.header, flags=flags, bits_checksum=file.bits_checksum()), sync=True
                )

    def close(self) -> None:
        """Give up the files; bitmaps can be used until they are forgotten."""
        for file in self._files.values():
            file.close()


def remove_copies(sidecar: Path) -> None:
    """Remove the copies of the snapshot that has `sidecar`.

    Raises:
        OSError: one cannot be removed.
    """
    for path in _paths(sidecar):
        path.unlink(missing_ok=True)


def is_copy_without(path: Path, sidecar_suffix: str) -> bool:
    """Whether `path` is a copy of a snapshot that has no sidecar: nobody can use it any more."""
    stem, dot, _ = path.name.rpartition(_NUMBERED)
    return bool(dot) and stem.endswith(sidecar_suffix) and not path.with_name(stem).exists()


def _paths(sidecar: Path) -> list[Path]:
    prefix = f"{sidecar.name}{_NUMBERED}"
    return sorted(
        path
        for path in sidecar.parent.iterdir()
        if path.name.startswith(prefix) and path.name.removeprefix(prefix).isdigit()
    )


def _doubt(file: BitmapFile, snapshot: SnapshotHeader) -> str:
    """Why the bits in `file` may not be those of `snapshot`, which is good; "" if they are."""
    header = file.header
    if HeaderFlags.COPY not in header.flags or header.holder != snapshot.uuid:
        return "it is of another snapshot"
    if header.identity.size != snapshot.identity.size:
        return "it is of a disk of another size"
    if HeaderFlags.IN_USE in header.flags:
        return "" if header.boot_id == snapshot.boot_id else "the machine went down while it was being made"
    return "" if header.bits_checksum == file.bits_checksum() else "its bits were damaged"


def _leave_out(path: Path, snapshot: SnapshotHeader, reason: str) -> None:
    logger.warning("snapshot %s does not show what is in %s: %s", snapshot.export_name, path, reason)
