"""SnapshotFile: the sidecar of one snapshot, open and mapped.

The maps are a shared mapping: a bit that is set is in the kernel's hands at once, and outlives this process
however it ends. So a snapshot outlives `kill -9` with no sync at all, as its scratch is written with plain
writes, which the kernel keeps as well. A loss of power it does not outlive: nobody knows then which of
source, scratch and maps had reached the disk.

The whole file is allocated when it is made: a store into a mapping cannot report "no space left".
"""

import errno
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.bitmap.file import failed
from nbdbackup.bitmap.file_format import HeaderError, checksum
from nbdbackup.crash_points import reach
from nbdbackup.errors import ConflictError, DeviceError
from nbdbackup.fleece.snapshot_format import MAPS_OFFSET, SLOT_BYTES, SnapshotHeader, build, parse


class SnapshotFile:
    """The sidecar at `path`. Changing while running: `header`, as it is in the file."""

    map_type: Callable[[int, int, memoryview], ClusterBitmap] = ClusterBitmap.over

    def __init__(self, path: Path, fd: int, header: SnapshotHeader, stale_slot: int) -> None:
        """Take over `fd`, whose file is as long as `header` says; `stale_slot` is the one to write first."""
        self.path = path
        self.header = header
        self._fd = fd
        self._stale_slot = stale_slot
        self._map = mmap.mmap(fd, header.file_bytes)

    @classmethod
    def create(cls, path: Path, header: SnapshotHeader) -> "SnapshotFile":
        """Make the file, every bit clear, on disk when this returns; blocks as fsync(2) does.

        Raises:
            ConflictError: `path` exists. DeviceError: it cannot be made; nothing is left of it.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except FileExistsError:
            raise ConflictError(f"snapshot file {path} exists already: move it away") from None
        except OSError as error:
            raise failed(error, f"cannot make snapshot file {path}") from error
        try:
            reach("snapshot.create.opened")
            os.posix_fallocate(fd, 0, header.file_bytes)
            reach("snapshot.create.allocated")
            file = cls(path, fd, header, stale_slot=0)
            file.write_header(header, sync=True)
            return file
        except BaseException as error:
            with suppress(OSError):
                path.unlink()
            os.close(fd)
            if isinstance(error, OSError):
                raise failed(
                    error, f"cannot make snapshot file {path} of {header.file_bytes} bytes"
                ) from error
            raise

    @classmethod
    def open(cls, path: Path) -> "SnapshotFile":
        """Open what is there and change nothing.

        Raises:
            DeviceError: it cannot be opened, or is no whole snapshot file of this version.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise failed(error, f"cannot open snapshot file {path}") from error
        try:
            header, stale_slot = _read_header(fd)
            size = os.fstat(fd).st_size
            if size != header.file_bytes:
                raise HeaderError(f"it is {size} bytes long and should be {header.file_bytes}")
            return cls(path, fd, header, stale_slot)
        except HeaderError as error:
            os.close(fd)
            raise DeviceError(errno.EINVAL, f"cannot use snapshot file {path}: {error}") from error
        except OSError as error:
            os.close(fd)
            raise failed(error, f"cannot read snapshot file {path}") from error

    def done(self) -> ClusterBitmap:
        """The clusters that are in scratch: a map whose bits are the file's."""
        return self._cluster_map(0)

    def access(self) -> ClusterBitmap:
        """The clusters that the snapshot still offers: a map whose bits are the file's."""
        return self._cluster_map(1)

    def maps_checksum(self) -> bytes:
        """The checksum of both maps as they are."""
        with memoryview(self._map)[MAPS_OFFSET:] as bits:
            return checksum(bits)

    def write_header(self, header: SnapshotHeader, *, sync: bool = False) -> None:
        """Let `header` be the file's, with the generation counted up; killed in the middle, it is or is not.

        With `sync` it, and all that was stored before, are on disk on return.

        Raises:
            OSError: only with `sync`.
        """
        self.header = replace(header, generation=self.header.generation + 1)
        slot = build(self.header)
        for _ in range(2):
            if sync:
                # The slot that is about to be written may be the only one that is not whole on disk.
                self.sync()
            self._store(self._stale_slot, slot)
            self._stale_slot = 1 - self._stale_slot
            reach("snapshot.header.between")
        if sync:
            self.sync()

    def write_sign_of_life(self, now_ns: int) -> None:
        """Note the time, in nanoseconds since 1970, in one slot: the other one stays whole."""
        self.header = replace(self.header, alive_ns=now_ns, generation=self.header.generation + 1)
        self._store(self._stale_slot, build(self.header))
        self._stale_slot = 1 - self._stale_slot

    def sync(self) -> None:
        """Everything that was stored before this call is on disk; blocks as fdatasync(2) does."""
        os.fdatasync(self._fd)

    def rename(self, path: Path) -> None:
        """Give it another name; there must be nothing of that name yet. Not on disk yet."""
        os.rename(self.path, path)
        self.path = path

    def remove(self) -> None:
        """Take away its name; the maps can be used until `close`. Nothing happens if it has none."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Give up the file, for good. The mapping goes with the last map that is in use."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._map

    def _cluster_map(self, number: int) -> ClusterBitmap:
        header = self.header
        start = header.map_offset(number)
        bits = memoryview(self._map)[start : start + header.map_bytes]
        return self.map_type(header.identity.size, header.cluster_bytes, bits)

    def _store(self, number: int, slot: bytes) -> None:
        self._map[number * SLOT_BYTES : (number + 1) * SLOT_BYTES] = slot


def _read_header(fd: int) -> tuple[SnapshotHeader, int]:
    """The header that counts, and the number of the slot that does not hold it.

    Raises:
        HeaderError: there is none in either slot.
    """
    data = os.pread(fd, MAPS_OFFSET, 0)
    if len(data) < MAPS_OFFSET:
        raise HeaderError(f"it is {len(data)} bytes long, too short for its header")
    headers: list[tuple[SnapshotHeader, int]] = []
    reasons: list[str] = []
    for number in (0, 1):
        try:
            headers.append((parse(data[number * SLOT_BYTES : (number + 1) * SLOT_BYTES]), 1 - number))
        except HeaderError as error:
            reasons.append(str(error))
    if not headers:
        # A version that is not known says more than damage.
        raise HeaderError(next((reason for reason in reasons if "version" in reason), reasons[0]))
    return max(headers, key=lambda found: found[0].generation)
