"""The scratch file of a stored snapshot: whether it is still that, and what becomes of it.

The sidecar says where it is and which file; whatever else is found in its place is left alone. A backup's
target that stands in for scratch is not freed or removed here.
"""

import logging
import os
import stat
from pathlib import Path

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.bitmap.identity import was_changed_after
from nbdbackup.block.linux import Locality, file_locality
from nbdbackup.extents import Extent
from nbdbackup.fleece.snapshot_format import ScratchIdentity, SnapshotFlags, SnapshotHeader

logger = logging.getLogger(__name__)

SCRATCH_SUFFIX = ".scratch"


def scratch_identity(path: str, status: os.stat_result) -> ScratchIdentity:
    """Of the file at `path`, as it is now."""
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    return ScratchIdentity(path, device, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def open_stored_scratch(header: SnapshotHeader, same_boot: bool, noun: str = "scratch") -> tuple[int, str]:
    """The scratch of `header`, which a person calls `noun`, open, and ""; or -1 and why it cannot be used."""
    path = header.scratch.path
    # A user may have named a target by a link.
    nofollow = 0 if SnapshotFlags.TARGET in header.flags else os.O_NOFOLLOW
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | nofollow)
    except OSError as error:
        return -1, f"its {noun} {path} cannot be opened: {error.strerror}"
    doubt = _doubt(header, fd, same_boot)
    if doubt:
        os.close(fd)
        return -1, f"its {noun} {path} {doubt}"
    return fd, ""


def _doubt(header: SnapshotHeader, fd: int, same_boot: bool) -> str:
    """What is wrong with the scratch, open as `fd`; "" if nothing is."""
    status = os.fstat(fd)
    expected, size = header.scratch, header.identity.size
    if stat.S_ISBLK(status.st_mode):
        if not same_boot:
            return "is a block device, which may be another one since the machine was restarted"
        return "" if status.st_rdev == expected.device else "is another block device"
    if status.st_ino != expected.inode or (same_boot and status.st_dev != expected.device):
        return "is another file"
    if status.st_size != size:
        return f"was {size} bytes long, and is {status.st_size}"
    if SnapshotFlags.IN_USE in header.flags:
        is_later = _was_changed_after(fd, status, header.alive_ns)
        return "was changed after the server that used it had died" if is_later else ""
    if (status.st_mtime_ns, status.st_ctime_ns) != (expected.mtime_ns, expected.ctime_ns):
        return "was changed while no server used it"
    return ""


def _was_changed_after(fd: int, status: os.stat_result, alive_ns: int) -> bool:
    # Times from another machine's clock tell nothing.
    return file_locality(fd) is not Locality.UNKNOWN and was_changed_after(status.st_mtime_ns, alive_ns)


def scratch_bytes_used(header: SnapshotHeader) -> int:
    """What the scratch of a snapshot at rest takes."""
    try:
        return os.stat(header.scratch.path).st_blocks * 512
    except OSError:
        return 0


def remove_scratch(header: SnapshotHeader) -> None:
    """Remove the scratch of `header`, if what has its name is surely that.

    Raises:
        OSError: it cannot be removed.
    """
    path = Path(header.scratch.path)
    if SnapshotFlags.TARGET in header.flags:
        return
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    # Killed between making it and noting which one it is, nobody knows its inode.
    if status.st_ino == header.scratch.inode or _has_our_name(header):
        path.unlink()
    else:
        logger.warning("%s may be scratch of snapshot %s: left as it is", path, header.export_name)


def free_scratch(header: SnapshotHeader) -> None:
    """Give back what the scratch of a broken snapshot takes, if it is surely that. Never fails."""
    expected = header.scratch
    if SnapshotFlags.TARGET in header.flags:
        return
    try:
        fd = os.open(expected.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        status = os.fstat(fd)
        is_surely_it = _has_our_name(header) or status.st_dev == expected.device
        if is_surely_it and status.st_ino == expected.inode and status.st_size:
            os.ftruncate(fd, 0)
            logger.info("scratch %s of snapshot %s is given back", expected.path, header.export_name)
    except OSError as error:
        logger.warning("scratch %s: %s", expected.path, error.strerror)
    finally:
        os.close(fd)


def stored_clusters(fd: int, header: SnapshotHeader) -> ClusterBitmap:
    """The clusters that take room in the file."""
    size, cluster = header.identity.size, header.cluster_bytes
    stored = ClusterBitmap(size, cluster)
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:
            break
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        stored.set(Extent(start, position - start).aligned_out(cluster, size))
    return stored


def _has_our_name(header: SnapshotHeader) -> bool:
    """Whether nobody else makes files of that name: it has the snapshot's uuid."""
    return header.scratch.path.endswith(f".{header.uuid.hex()}{SCRATCH_SUFFIX}")
