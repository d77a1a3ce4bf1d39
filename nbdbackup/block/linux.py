"""What Linux can do with a file and Python's `os` does not offer.

Everything here blocks, so call it from a thread or while opening; all of it raises
OSError as the kernel says it. Offsets and lengths are bytes.
"""

import array
import ctypes
import errno
import fcntl
import os
import stat
import struct
from enum import Enum, IntFlag
from pathlib import Path

BLKGETSIZE64 = 0x80081272
BLKSSZGET = 0x1268
BLKDISCARD = 0x1277

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", _libc.fallocate)
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_STATFS_BYTES_MAX = 512


class Falloc(IntFlag):
    """Modes of fallocate(2)."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    ZERO_RANGE = 0x10


class Locality(Enum):
    """How far away the bytes of a file are; decides what may be done on the event loop's thread."""

    MEMORY = "memory"
    """Reads and writes are copies between memory and memory."""
    LOCAL = "local"
    """A cache with a disk of this machine behind it."""
    UNKNOWN = "unknown"
    """Perhaps a network or another process: any call may wait for ever."""


# linux/magic.h
_LOCALITY_BY_MAGIC = {
    0x01021994: Locality.MEMORY,  # tmpfs
    0x858458F6: Locality.MEMORY,  # ramfs
    0xEF53: Locality.LOCAL,  # ext2, ext3, ext4
    0x58465342: Locality.LOCAL,  # xfs
    0x9123683E: Locality.LOCAL,  # btrfs
    0xF2F52010: Locality.LOCAL,  # f2fs
    0xCA451A4E: Locality.LOCAL,  # bcachefs
}


def fallocate(fd: int, mode: Falloc, offset: int, length: int) -> None:
    """fallocate(2), again when a signal cut it short."""
    while _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def discard_blocks(fd: int, offset: int, length: int) -> None:
    """Tell a block device that it may forget the range, which is aligned to its logical blocks."""
    fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", offset, length))


def block_device_size(fd: int) -> int:
    """The size of a block device, in bytes."""
    size = array.array("Q", [0])
    fcntl.ioctl(fd, BLKGETSIZE64, size)
    return size[0]


def logical_block_bytes(fd: int) -> int:
    """The smallest unit that a block device reads, writes and discards."""
    size = array.array("i", [0])
    fcntl.ioctl(fd, BLKSSZGET, size)
    return size[0]


def file_locality(fd: int) -> Locality:
    """How far away an open file's bytes are, from the name of its file system."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return Locality.LOCAL
    buffer = ctypes.create_string_buffer(_STATFS_BYTES_MAX)
    if _fstatfs(fd, buffer):
        return Locality.UNKNOWN
    magic = ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF
    return _LOCALITY_BY_MAGIC.get(magic, Locality.UNKNOWN)


def queue_attribute(status: os.stat_result, name: str) -> int:
    """A number from the request queue of the disk that a file is on, or is; 0 if unknown."""
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    # A partition has no queue of its own: its parent directory, the disk, has it.
    for queue in (disk / "queue", disk.resolve().parent / "queue"):
        try:
            return int((queue / name).read_text())
        except (OSError, ValueError):
            continue
    return 0


def block_device_id(device: int) -> str:
    """What the kernel knows the block device of that number by, over restarts of the machine; "" if nothing.

    Where a disk has no id of its own, that is the place where it is attached.
    """
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    partition = _first_line(place / "partition")
    if partition:
        whole = _first_line(place.resolve().parent / "dev")
        major, _, minor = whole.partition(":")
        disk = block_device_id(os.makedev(int(major), int(minor))) if minor else ""
        return f"{disk} partition {partition}" if disk else ""
    for name in _DEVICE_IDS:
        if text := _first_line(place / name):
            return f"{name} {text}"
    path = str(place.resolve())
    return "" if path.startswith("/sys/devices/virtual/") or not place.exists() else path


_DEVICE_IDS = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "device/cid", "serial", "loop/backing_file")


def _first_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").partition("\n")[0].strip()
    except OSError:
        return ""
