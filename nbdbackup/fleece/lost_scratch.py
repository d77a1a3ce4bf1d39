"""Scratch files of stored snapshots that no sidecar owns: it was lost, or cannot be read.

Told by their names, `NODE@NAME.UUID.scratch`, in which the first part is the sidecar's. A sidecar is there
before its scratch is and goes after it, so that this can be asked at any time. A sidecar that cannot be read
may be one of a newer version, or be mended: its scratch is listed as such, and is not for the taking.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from nbdbackup.fleece.snapshot_file import SnapshotFile
from nbdbackup.fleece.snapshot_store import SUFFIX
from nbdbackup.fleece.stored_scratch import SCRATCH_SUFFIX

_NAME = re.compile(rf"(?P<stem>.+)\.(?P<uuid>[0-9a-f]{{32}}){re.escape(SCRATCH_SUFFIX)}")


class LostScratch(msgspec.Struct, frozen=True):
    """A scratch file, and the sidecar that may be its own and cannot be read; None: there is none."""

    path: Path
    unreadable: Path | None


def lost_scratch(sidecars: Sequence[Path], own: Path, others: Iterable[Path]) -> list[LostScratch]:
    """Every such file in the directory `own`, and in `others` those of sidecars that cannot be read.

    `sidecars` are the directories that these are in. `others` may be other servers' too. Blocks as file I/O
    does.
    """
    found = []
    for directory in {own, *others}:
        for path in _entries(directory):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            names = [each / f"{match['stem']}{SUFFIX}" for each in sidecars]
            uuids = {sidecar: _uuid(sidecar) for sidecar in names if sidecar.exists()}
            if match["uuid"] in uuids.values():
                continue
            unreadable = next((sidecar for sidecar, uuid in uuids.items() if uuid is None), None)
            if unreadable is not None or directory == own:
                found.append(LostScratch(path, unreadable))
    return sorted(found, key=lambda lost: lost.path)


def _entries(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if not path.is_symlink() and path.is_file()]
    except OSError:
        return []


def _uuid(sidecar: Path) -> str | None:
    """Of the snapshot of this sidecar, if that can be read."""
    try:
        file = SnapshotFile.open(sidecar)
    except OSError:
        return None
    file.close()
    return file.header.uuid.hex()
