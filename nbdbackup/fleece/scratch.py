"""Scratch: where saved clusters go, with a limit on how much.

A sparse file as long as the source, each cluster at its own offset. The file of a snapshot that is
temporary has no name: it is gone with the last descriptor, so that no crash can leave one behind. That of
one that outlives the server is named in its sidecar (`snapshot_store`), and is opened again from there.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.block.device import BlockDevice, ReadableBuffer
from nbdbackup.block.file import FileDevice
from nbdbackup.block.filter import FilterDevice
from nbdbackup.crash_points import reach
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError
from nbdbackup.extents import Extent

NAMED_PREFIX = ".nbdbackup-scratch-"
"""Of a scratch file that has a name for a moment; the process and some random characters follow."""
FILLING_PERCENT = 80
"""Of `bytes_max`: when it is time to say that scratch may not suffice."""


class Scratch(FilterDevice):
    """Bounds what is stored in `child` to `bytes_max` (None: no bound), in whole clusters."""

    def __init__(self, child: BlockDevice, cluster_bytes: int, bytes_max: int | None, title: str) -> None:
        super().__init__(child)
        self.bytes_max = bytes_max
        self._title = title
        self._stored = ClusterBitmap(child.size, cluster_bytes)
        # Changing while running.
        self._on_filling: Callable[[int, int, int], None] | None = None
        self._is_filling = False

    @property
    def cluster_bytes(self) -> int:
        """The unit of what is stored, and so of the copies that come here."""
        return self._stored.cluster_bytes

    @property
    def bytes_used(self) -> int:
        """Bytes of saved clusters that are held now; a short last cluster counts as whole."""
        return len(self._stored) * self.cluster_bytes

    def count(self, stored: ClusterBitmap) -> None:
        """`stored`, which become this object's, are in `child` already. Before it is used."""
        assert stored.cluster_bytes == self.cluster_bytes
        self._stored = stored

    def watch(self, on_filling: Callable[[int, int, int], None]) -> None:
        """Call `on_filling(bytes_used, threshold, bytes_max)` when 80 % of what may be stored are.

        Once; again after trims have made it less.
        """
        self._on_filling = on_filling
        self._is_filling = False
        self._look_at_level()

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self._reserve(Extent(offset, len(data)))
        await self.child.write(offset, data, fua)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        area = Extent(offset, len(data))
        self._check_room(area)
        if not self.child.write_nowait(offset, data):
            return False
        self._stored.set(area)
        self._look_at_level()
        return True

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        await self.child.trim(offset, length, fua)
        self._stored.clear(Extent(offset, length))
        self._look_at_level()

    async def close(self) -> None:
        await self.child.close()
        self._stored.clear(Extent(0, self.size))

    def offload_fd(self) -> int | None:
        """None: what is stored must be counted."""
        return None

    def _reserve(self, area: Extent) -> None:
        # Set before the write: clusters being written at the same time must fit together.
        self._check_room(area)
        self._stored.set(area)
        self._look_at_level()

    def _look_at_level(self) -> None:
        if self.bytes_max is None:
            return
        threshold = self.bytes_max * FILLING_PERCENT // 100
        was_filling, self._is_filling = self._is_filling, self.bytes_used >= threshold
        if self._is_filling and not was_filling and self._on_filling is not None:
            self._on_filling(self.bytes_used, threshold, self.bytes_max)

    def _check_room(self, area: Extent) -> None:
        if self.bytes_max is None:
            return
        clusters = -(-area.length // self.cluster_bytes)
        stored = -(-self._stored.bytes_set(area) // self.cluster_bytes)
        if self.bytes_used + (clusters - stored) * self.cluster_bytes > self.bytes_max:
            raise DeviceError(
                errno.ENOSPC,
                f"{self._title} is full: {self.bytes_used} of {self.bytes_max} bytes used (scratch-max)",
            )


def open_scratch(place: Path, size: int, cluster_bytes: int, bytes_max: int | None, title: str) -> Scratch:
    """Make scratch for a source of `size` bytes in directory `place`, or as the new file `place`.

    Raises:
        ConflictError: the file exists already. NotFoundError: there is no such directory.
        DeviceError: the file cannot be made there.
    """
    with _explained(place):
        if place.is_dir():
            fd = _open_nameless(place)
        else:
            fd = _open_new(place)
            # The name only served to say where.
            place.unlink()
    _set_size(fd, size, place)
    device = FileDevice(fd, title, size)
    return Scratch(device, cluster_bytes, bytes_max, title)


def create_scratch_file(path: Path, size: int) -> int:
    """Make the new file `path`, sparse, `size` bytes long; an open descriptor of it.

    Raises:
        As `open_scratch`; nothing is left of it.
    """
    with _explained(path):
        fd = _open_new(path)
    reach("snapshot.create.scratch-opened")
    try:
        _set_size(fd, size, path)
    except BaseException:
        path.unlink()
        raise
    return fd


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise ConflictError(f"scratch file {place} exists already: name a new file or a directory") from None
    except FileNotFoundError:
        raise NotFoundError(f"no directory for scratch at {place}: make it, or name another") from None
    except OSError as error:
        raise DeviceError(
            error.errno or errno.EIO, f"cannot make scratch in {place}: {error.strerror}"
        ) from error


def _set_size(fd: int, size: int, place: Path) -> None:
    """Make the file `fd` so long, or close it and raise DeviceError."""
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise DeviceError(
            error.errno or errno.EIO,
            f"cannot make scratch of {size} bytes in {place}: {error.strerror}; name another directory",
        ) from error


def _open_new(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _open_nameless(directory: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
    path = directory / f"{NAMED_PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
    fd = _open_new(path)
    path.unlink()
    return fd
