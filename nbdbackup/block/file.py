"""A device over a regular file or a block device.

Where an operation runs decides how fast the server is and whom a slow disk can hurt:

- What may block for long goes to the device's own executor: cold reads, syncs, zeroing,
  discards, and everything on file systems that are not known to be local (FUSE, NFS):
  they are never touched from the event loop's thread.
- A read of cached bytes is done in place with RWF_NOWAIT, which gives up where it would
  wait. tmpfs knows no RWF_NOWAIT, but waits for nobody either.
- A small write is done in place too: it is a copy into the page cache, several times
  cheaper than a trip to a thread. Most file systems refuse RWF_NOWAIT for it, so it is a
  plain write with two safeguards. Part of a page that is not cached goes to the executor,
  because the rest of the page would be read first. And each write is timed: one that
  took long (dirty pages are being throttled, or allocation is slow) sends the
  following writes to the executor for a while (`WriteGuard`).

A failed sync is remembered and fails every later flush: the kernel reports lost writes
once and then forgets them, and a later success would be a lie.
"""

import errno
import os
import stat
import time
from collections.abc import Callable

from nbdbackup.block.device import BlockDevice, Features, ReadableBuffer, WritableBuffer
from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.linux import (
    Falloc,
    Locality,
    block_device_size,
    discard_blocks,
    fallocate,
    file_locality,
    logical_block_bytes,
    queue_attribute,
)
from nbdbackup.block.locks import lock_image
from nbdbackup.crash_points import reach
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError
from nbdbackup.extents import Allocation, ContextExtent, Extent, StatusExtent, merge_status

IN_PLACE_BYTES_MAX = 1 << 20
STATUS_EXTENTS_MAX = 1024
ZERO_PIECE_BYTES = 4 << 20
SLOW_WRITE_S = 0.010
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 5.0

_PAGE_MASK = os.sysconf("SC_PAGESIZE") - 1
_ZEROES = bytes(1 << 20)
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY, errno.EINVAL})


class WriteGuard:
    """Decides whether a write may be done in place, from how long the ones before it took.

    A slow write closes the guard for a backoff time, which doubles each time that the
    guard closes again soon after it opened, up to `BACKOFF_MAX_S`.
    """

    __slots__ = ("_backoff_s", "clock", "open_from")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.open_from = float("-inf")
        self._backoff_s = 0.0

    def slow_write_ended(self, now: float) -> None:
        """A write took longer than `SLOW_WRITE_S`; `now` is the clock's time in seconds."""
        relapse = now - self.open_from <= max(self._backoff_s, BACKOFF_MIN_S)
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S) if relapse else BACKOFF_MIN_S
        self.open_from = now + self._backoff_s


class FileDevice(BlockDevice):
    """A file or block device that is open as `fd`; the device owns the descriptor."""

    def __init__(
        self,
        fd: int,
        path: str,
        size: int,
        *,
        read_only: bool = False,
        discard: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take over `fd`, an open file of `size` bytes that people know as `path`.

        Without `discard`, `trim` does nothing and zeroed ranges stay allocated.
        """
        # Set once.
        status = os.fstat(fd)
        self.size = size
        self.read_only = read_only
        self._fd = fd
        self._path = path
        self._is_block_device = stat.S_ISBLK(status.st_mode)
        self._block_bytes = logical_block_bytes(fd) if self._is_block_device else 1
        self._discard = discard
        self._executor = IoExecutor(os.path.basename(path))
        locality = file_locality(fd)
        self._nowait_flags = 0 if locality is Locality.MEMORY else os.RWF_NOWAIT
        self._write_in_place = locality is not Locality.UNKNOWN and not read_only
        self._guard = WriteGuard(clock)
        # Learned while running; a mode that failed once is not tried again.
        self._read_in_place = True
        self._write_nowait_works = locality is Locality.LOCAL
        self._missing_modes: set[Falloc] = set()
        self._sync_error: OSError | None = None
        self.features = self._find_features(status, locality)

    @classmethod
    def open(
        cls, path: str, *, read_only: bool = False, lock: bool = True, discard: bool = True
    ) -> "FileDevice":
        """Open what is there; blocks as open(2) does.

        Raises:
            NotFoundError: there is nothing at `path`.
            ConflictError: it is locked (`block/locks.py`).
            DeviceError: it cannot be opened, is no file or block device, or is empty.
        """
        fd = _open_existing(path, read_only)
        try:
            if lock:
                lock_image(fd, path, writable=not read_only)
            size = _size(fd)
            if not size:
                raise DeviceError(errno.EINVAL, f"{path} is empty: a disk needs at least one byte")
            return cls(fd, path, size, read_only=read_only, discard=discard)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(cls, path: str, size: int, *, lock: bool = True) -> "FileDevice":
        """Create a sparse file of `size` bytes, readable by its owner alone; blocks as open(2) does.

        Raises:
            ConflictError: `path` exists.
            NotFoundError: its directory does not.
            DeviceError: it cannot be created; nothing is left of it.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ConflictError(f"{path} exists already: remove it or choose another name") from None
        except FileNotFoundError:
            parent = os.path.dirname(path) or "."
            raise NotFoundError(f"cannot create {path}: there is no directory {parent}") from None
        except OSError as error:
            raise _failed(error, f"cannot create {path}") from error
        try:
            if lock:
                lock_image(fd, path, writable=True)
            reach("partial.file.opened")
            os.ftruncate(fd, size)
            return cls(fd, path, size)
        except BaseException as error:
            os.unlink(path)
            os.close(fd)
            if isinstance(error, OSError):
                raise _failed(error, f"cannot make {path} {size} bytes long") from error
            raise

    def __str__(self) -> str:
        return self._path

    # Reading.

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        length = len(buffer)
        assert 0 <= offset <= self.size - length
        if length > IN_PLACE_BYTES_MAX or not self._read_in_place:
            return False
        try:
            return os.preadv(self._fd, (buffer,), offset, self._nowait_flags) == length
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._read_in_place = False
            return False

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        assert 0 <= offset <= offset + len(buffer) <= self.size
        await self._executor.run(self._read_all, offset, memoryview(buffer))

    def _read_all(self, offset: int, rest: memoryview) -> None:
        while rest:
            try:
                count = os.preadv(self._fd, (rest,), offset)
            except OSError as error:
                # What could be read before the bad place was: this is where it begins.
                raise DeviceError(
                    error.errno or errno.EIO,
                    f"reading {self._path} failed at byte {offset}: {error.strerror}",
                    offset,
                ) from error
            if not count:
                raise DeviceError(
                    errno.EIO,
                    f"{self._path} ends at byte {offset} but was {self.size} bytes long when it was opened: "
                    "something else has cut it off",
                    offset,
                )
            offset += count
            rest = rest[count:]

    async def read_sparse(self, offset: int, buffer: WritableBuffer) -> list[StatusExtent]:
        """Holes of the file are not read."""
        assert 0 <= offset <= offset + len(buffer) <= self.size
        return await self._executor.run(self._read_sparse, offset, memoryview(buffer))

    def _read_sparse(self, offset: int, buffer: memoryview) -> list[StatusExtent]:
        # A write into a hole after it was looked at has not returned yet when this read began, so
        # that reading zeroes there is right.
        if self._is_block_device:
            self._read_all(offset, buffer)
            return [StatusExtent(len(buffer), Allocation.DATA)]
        extents: list[StatusExtent] = []
        covered = 0
        for extent in self._status(Extent(offset, len(buffer))):
            if not extent.flags & Allocation.ZERO:
                self._read_all(offset + covered, buffer[covered : covered + extent.length])
            extents.append(extent)
            covered += extent.length
        if covered < len(buffer):
            # Too many extents to look at all: the rest is read.
            self._read_all(offset + covered, buffer[covered:])
            extents.append(StatusExtent(len(buffer) - covered, Allocation.DATA))
        return merge_status(extents)

    # Writing.

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        length = len(data)
        assert 0 <= offset <= self.size - length
        guard = self._guard
        started = guard.clock()
        if length > IN_PLACE_BYTES_MAX or not self._write_in_place or started < guard.open_from:
            return False
        if (offset | length) & _PAGE_MASK and not self._edges_are_cached(offset, length):
            return False
        if self._write_nowait_works:
            count = self._write_without_waiting(offset, data)
            if count < 0:
                return False
        else:
            count = os.pwrite(self._fd, data, offset)
        if count < length:
            # A part is written already: only the rest is missing, and "nothing done" would be a lie.
            self._write_all(offset + count, memoryview(data)[count:])
        ended = guard.clock()
        if ended - started > SLOW_WRITE_S:
            guard.slow_write_ended(ended)
        return True

    def _write_without_waiting(self, offset: int, data: ReadableBuffer) -> int:
        """Write with RWF_NOWAIT, or plainly from the day on that it turns out to be unknown.

        Returns how many bytes were written, -1 if it would have had to wait.
        """
        try:
            return os.pwritev(self._fd, (data,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return -1
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._write_nowait_works = False
            return os.pwrite(self._fd, data, offset)

    def _edges_are_cached(self, offset: int, length: int) -> bool:
        """Whether the pages that a write covers in part can be had without reading them."""
        if not self._nowait_flags:
            return True
        end = offset + length
        probe = bytearray(1)
        pages = [offset & ~_PAGE_MASK] if offset & _PAGE_MASK else []
        # Where the file ends inside the last page, the write covers all that is to be kept.
        if end & _PAGE_MASK and end < self.size and not (pages and pages[0] == end & ~_PAGE_MASK):
            pages.append(end & ~_PAGE_MASK)
        return all(self.read_nowait(page, probe) for page in pages)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        assert 0 <= offset <= offset + len(data) <= self.size
        await self._executor.run(self._write_all, offset, memoryview(data), fua)

    def _write_all(self, offset: int, rest: memoryview, fua: bool = False) -> None:
        flags = os.RWF_DSYNC if fua else 0
        while rest:
            try:
                count = os.pwritev(self._fd, (rest,), offset, flags)
            except OSError as error:
                if not flags or error.errno not in _UNSUPPORTED:
                    if flags and error.errno == errno.EIO:
                        self._sync_error = error
                    raise
                flags = 0
                continue
            offset += count
            rest = rest[count:]
        if fua and not flags:
            self._sync()

    async def flush(self) -> None:
        await self._executor.run(self._sync)

    def _sync(self) -> None:
        if self._sync_error is not None:
            raise DeviceError(
                self._sync_error.errno or errno.EIO,
                f"an earlier flush of {self._path} failed, and what was written before it may be lost: "
                f"{self._sync_error.strerror}",
            )
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._sync_error = error
            raise

    # Zeroing and discarding.

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        assert 0 <= offset <= offset + length <= self.size
        area = Extent(offset, length)
        if not length:
            return
        if not await self._executor.run(self._zero_quickly, area, may_unmap and self._discard, fast):
            if fast:
                raise OSError(errno.ENOTSUP, "zeroing would take as long as writing")
            # Piece by piece, so that a long range does not keep one of the few threads to itself.
            for piece in area.split(ZERO_PIECE_BYTES):
                await self._executor.run(self._write_zeroes_plainly, piece)
        if fua:
            await self.flush()

    def _zero_quickly(self, area: Extent, may_unmap: bool, fast: bool) -> bool:
        """Zero by telling the file system or disk to; False if it cannot: nothing is changed then."""
        # The kernel does ZERO_RANGE on a block device by writing if need be: right, but not fast.
        modes = [Falloc.PUNCH_HOLE] if may_unmap else []
        if not (self._is_block_device and fast):
            modes.append(Falloc.ZERO_RANGE)
        body = area.aligned_in(self._block_bytes, self.size)
        if body.length and not any(self._fallocate(mode, body) for mode in modes):
            return False
        self._write_zeroes_plainly(Extent(area.offset, body.offset - area.offset))
        self._write_zeroes_plainly(Extent(body.end, area.end - body.end))
        return True

    def _fallocate(self, mode: Falloc, area: Extent) -> bool:
        if mode in self._missing_modes:
            return False
        try:
            fallocate(self._fd, mode | Falloc.KEEP_SIZE, area.offset, area.length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._missing_modes.add(mode)
            return False
        return True

    def _write_zeroes_plainly(self, area: Extent) -> None:
        zeroes = memoryview(_ZEROES)
        for piece in area.split(len(zeroes)):
            self._write_all(piece.offset, zeroes[: piece.length])

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        assert 0 <= offset <= offset + length <= self.size
        area = Extent(offset, length).aligned_in(self._block_bytes, self.size)
        if not area.length or not self.features.trim:
            return
        await self._executor.run(self._trim, area)
        if fua:
            await self.flush()

    def _trim(self, area: Extent) -> None:
        if not self._is_block_device:
            self._fallocate(Falloc.PUNCH_HOLE, area)
            return
        try:
            discard_blocks(self._fd, area.offset, area.length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise

    # What is where.

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        """Holes of the file are holes and zero; answers with at most `STATUS_EXTENTS_MAX` extents."""
        assert 0 <= offset <= offset + length <= self.size
        if self._is_block_device or not length:
            return merge_status([StatusExtent(length, Allocation.DATA)])
        return await self._executor.run(self._status, Extent(offset, length))

    async def is_allocated(self, offset: int, length: int) -> list[ContextExtent]:
        """A file holds its data extents."""
        known = await self.block_status(offset, length)
        return [ContextExtent(extent.length, int(not extent.flags & Allocation.HOLE)) for extent in known]

    def _status(self, area: Extent) -> list[StatusExtent]:
        extents: list[StatusExtent] = []
        position = area.offset
        while position < area.end and len(extents) < STATUS_EXTENTS_MAX:
            try:
                data = min(self._seek_data(position), area.end)
                hole = os.lseek(self._fd, data, os.SEEK_HOLE) if data < area.end else data
            except OSError as error:
                if error.errno not in (errno.ENXIO, *_UNSUPPORTED):
                    raise
                data, hole = position, area.end
            extents.append(StatusExtent(data - position, Allocation.HOLE | Allocation.ZERO))
            extents.append(StatusExtent(min(hole, area.end) - data, Allocation.DATA))
            position = min(hole, area.end)
        return merge_status(extents) or [StatusExtent(area.length, Allocation.DATA)]

    def _seek_data(self, position: int) -> int:
        try:
            return os.lseek(self._fd, position, os.SEEK_DATA)
        except OSError as error:
            # No data from here on; but what is past an early end is no hole, reading it fails.
            if error.errno == errno.ENXIO and os.fstat(self._fd).st_size >= self.size:
                return self.size
            raise

    async def cache(self, offset: int, length: int) -> None:
        if not length:
            return  # To posix_fadvise that means everything from `offset` on.
        await self._executor.run(os.posix_fadvise, self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def offload_fd(self) -> int:
        return self._fd

    async def close(self) -> None:
        try:
            await self._executor.run(os.close, self._fd)
        finally:
            self._executor.shutdown()

    def _find_features(self, status: os.stat_result, locality: Locality) -> Features:
        rotational = queue_attribute(status, "rotational") == 1
        if self.read_only:
            return Features(rotational=rotational)
        if self._is_block_device:
            trim = queue_attribute(status, "discard_max_bytes") > 0
            fast_zero = queue_attribute(status, "write_zeroes_max_bytes") > 0 and self._discard
        else:
            # Known, not probed: even a hole behind the end changes the file's times.
            trim = True
            fast_zero = locality is Locality.LOCAL or (locality is Locality.MEMORY and self._discard)
        return Features(trim=trim and self._discard, fast_zero=fast_zero, rotational=rotational)


def _open_existing(path: str, read_only: bool) -> int:
    try:
        mode = os.stat(path).st_mode
        # Looked at before it is opened: opening a FIFO would wait for its other end.
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
            raise DeviceError(errno.EINVAL, f"{path} is {what}: name an image file or a block device")
        return os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist: check the path") from None
    except DeviceError:
        raise
    except OSError as error:
        hint = ""
        if not read_only and os.access(path, os.R_OK):
            hint = " for writing; it can be read: try --read-only"
        raise _failed(error, f"cannot open {path}{hint}") from error


def _size(fd: int) -> int:
    status = os.fstat(fd)
    return block_device_size(fd) if stat.S_ISBLK(status.st_mode) else status.st_size


def _failed(error: OSError, what: str) -> DeviceError:
    return DeviceError(error.errno or errno.EIO, f"{what}: {error.strerror}")
