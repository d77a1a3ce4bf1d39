"""Bitmap files for tests: stores in a directory, and sources that they could speak of."""

import os
from collections.abc import Callable
from pathlib import Path

from nbdbackup.bitmap.identity import SourceIdentity, SourceKind
from nbdbackup.bitmap.store import BitmapStore

GRANULE = 65536
SIZE = 1000 * GRANULE - 7
BOOT, NEXT_BOOT = b"b" * 16, b"c" * 16
NOW_NS = 1_800_000_000 * 10**9

SOURCE = SourceIdentity(SourceKind.LOCAL_FILE, SIZE, device=5, inode=77, mtime_ns=NOW_NS, ctime_ns=NOW_NS)


async def run_here(function: Callable[[], None]) -> None:
    """Run what should go to a thread at once."""
    function()


def make_store(
    directory: Path, boot_id: bytes = BOOT, power: bool = False, now_ns: int = NOW_NS
) -> BitmapStore:
    """An open store, of a server that was started on the boot of that id."""
    store = BitmapStore(directory, run_here, power=power, boot_id=boot_id, now_ns=lambda: now_ns)
    store.open()
    return store


def identity_of(path: Path) -> SourceIdentity:
    """A file's as it is now."""
    status = os.stat(path)
    return SourceIdentity(
        SourceKind.LOCAL_FILE,
        status.st_size,
        status.st_dev,
        status.st_ino,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
