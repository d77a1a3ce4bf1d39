"""BitmapFile: one bitmap's file, open and mapped.

The bits are a shared mapping: what is set in it is in the kernel's hands at once, and outlives this process
however it ends. It is on disk after `sync`.

The whole file is allocated when it is made, because a store into a mapping has no way to report "no space
left": the process gets SIGBUS. On btrfs that takes a file without copy-on-write too.

Law for whoever edits this: header and planes change in an order in which a crash between any two stores
leaves a file that says dirty of all that is; `StoredBitmap` has the orders.
"""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bitarray import bitarray
from msgspec.structs import replace

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
from nbdbackup.crash_points import reach
from nbdbackup.errors import ConflictError, DeviceError

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000


class BitmapFile:
    """The bitmap file at `path`. Changing while running: `header`, as it is in the file."""

    plane_type: Callable[..., bitarray] = bitarray

    def __init__(self, path: Path, fd: int, header: Header, stale_slot: int) -> None:
        """Take over `fd`, whose file is as long as `header` says; `stale_slot` is the one to write first."""
        self.path = path
        self.header = header
        self._fd = fd
        self._stale_slot = stale_slot
        self._map = mmap.mmap(fd, header.file_bytes)

    @classmethod
    def create(cls, path: Path, header: Header, *, sync: bool = True) -> "BitmapFile":
        """Make the file, every bit clear; blocks as fsync(2) does, and with `sync` it is on disk on return.

        Raises:
            ConflictError: `path` exists. DeviceError: it cannot be made; nothing is left of it.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except FileExistsError:
            raise ConflictError(f"bitmap file {path} exists already") from None
        except OSError as error:
            raise failed(error, f"cannot make bitmap file {path}") from error
        try:
            reach("bitmap.create.opened")
            _disable_copy_on_write(fd)
            os.posix_fallocate(fd, 0, header.file_bytes)
            reach("bitmap.create.allocated")
            file = cls(path, fd, header, stale_slot=0)
            file.write_header(header, sync=sync)
            return file
        except OSError as error:
            _discard(path, fd)
            raise failed(error, f"cannot make bitmap file {path} of {header.file_bytes} bytes") from error
        except BaseException:
            _discard(path, fd)
            raise

    @classmethod
    def open(cls, path: Path) -> "BitmapFile":
        """Open what is there and change nothing.

        Raises:
            DeviceError: it cannot be opened, or is no whole bitmap file of this version.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise failed(error, f"cannot open bitmap file {path}") from error
        try:
            header, stale_slot = _read_header(fd)
            size = os.fstat(fd).st_size
            if size != header.file_bytes:
                raise HeaderError(f"it is {size} bytes long and should be {header.file_bytes}")
            return cls(path, fd, header, stale_slot)
        except HeaderError as error:
            os.close(fd)
            raise DeviceError(
                errno.EINVAL,
                f"cannot use bitmap file {path}: {error}; move it away (the next backup of its disk is full)",
            ) from error
        except OSError as error:
            os.close(fd)
            raise failed(error, f"cannot read bitmap file {path}") from error

    def plane(self, number: int) -> bitarray:
        """Plane 0 or 1: a bitarray whose bits are the file's."""
        start = self.header.plane_offset(number)
        bits = memoryview(self._map)[start : start + self.header.bits_bytes]
        return self.plane_type(buffer=bits, endian="big")

    def bits_checksum(self) -> bytes:
        """The checksum of every plane that counts, the bitmap's own first, as they are."""
        header = self.header
        planes = [header.own_plane]
        if HeaderFlags.BOTH in header.flags:
            planes.append(1 - header.own_plane)
        starts = [header.plane_offset(plane) for plane in planes]
        with memoryview(self._map) as whole:
            return checksum(*(whole[start : start + header.bits_bytes] for start in starts))

    def write_header(self, header: Header, *, sync: bool) -> None:
        """Let `header` be the file's, with the generation counted up.

        With `sync` it, and every bit that was set before, are on disk on return.

        Raises:
            OSError: only with `sync`.
        """
        self.header = replace(header, generation=self.header.generation + 1)
        slot = build(self.header)
        if sync and self._stale_slot:
            # The sign of life in slot 0 may be half on disk.
            self.sync()
        self._store(self._stale_slot, slot)
        if sync:
            self.sync()
        reach("bitmap.header.between")
        self._store(1 - self._stale_slot, slot)
        self._stale_slot = 0
        if sync:
            self.sync()

    def write_sign_of_life(self, now_ns: int) -> None:
        """Note the time, in nanoseconds since 1970: always in slot 0, so that slot 1 stays whole."""
        self.header = replace(self.header, alive_ns=now_ns, generation=self.header.generation + 1)
        self._store(0, build(self.header))
        self._stale_slot = 1

    def sync(self) -> None:
        """Everything that was stored before this call is on disk; blocks as fdatasync(2) does.

        (msync would do the same, but Python's keeps all other threads from running.)
        """
        os.fdatasync(self._fd)

    def rename(self, path: Path) -> None:
        """Give it another name; there must be nothing of that name yet. Not on disk yet."""
        os.rename(self.path, path)
        self.path = path

    def remove(self) -> None:
        """Take away its name; the planes can be used until `close`. Nothing happens if it has none."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Give up the file, for good. The mapping goes with the last plane that is in use."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._map

    def _store(self, number: int, slot: bytes) -> None:
        self._map[number * SLOT_BYTES : (number + 1) * SLOT_BYTES] = slot


def sync_directory(path: Path) -> None:
    """Whatever was made, renamed or removed in `path` is so on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def failed(error: OSError, what: str) -> DeviceError:
    """`error` with the one line that says what failed."""
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = ": make room there, or take a coarser granularity"
    return DeviceError(error.errno or errno.EIO, f"{what}: {error.strerror}{hint}")


def _read_header(fd: int) -> tuple[Header, int]:
    """The header that counts, and the number of the slot that does not hold it.

    Raises:
        HeaderError: there is none in either slot.
    """
    data = os.pread(fd, PLANES_OFFSET, 0)
    if len(data) < PLANES_OFFSET:
        raise HeaderError(f"it is {len(data)} bytes long, too short for its header")
    headers: list[tuple[Header, int]] = []
    reasons: list[str] = []
    for number in (0, 1):
        try:
            header = parse(data[number * SLOT_BYTES : (number + 1) * SLOT_BYTES])
            headers.append((header, 1 - number))
        except HeaderError as error:
            reasons.append(str(error))
    if not headers:
        # A version that is not known says more than damage.
        raise HeaderError(next((reason for reason in reasons if "version" in reason), reasons[0]))
    return max(headers, key=lambda found: found[0].generation)


def _disable_copy_on_write(fd: int) -> None:
    """Where blocks are written elsewhere each time (btrfs), keep them in place; elsewhere it fails."""
    with suppress(OSError):
        flags = struct.unpack("l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(struct.calcsize("l"))))[0]
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("l", flags | _FS_NOCOW_FL))


def _discard(path: Path, fd: int) -> None:
    with suppress(OSError):
        path.unlink()
    os.close(fd)
