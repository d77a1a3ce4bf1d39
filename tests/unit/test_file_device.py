"""FileDevice: what opening refuses, what runs in place, and honest errors."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nbdbackup.block import file as file_module
from nbdbackup.block.file import BACKOFF_MAX_S, BACKOFF_MIN_S, SLOW_WRITE_S, FileDevice, WriteGuard
from nbdbackup.block.linux import Falloc, Locality, file_locality
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError
from nbdbackup.extents import Allocation, StatusExtent
from tests.support.disks import MIB, allocated_bytes, make_disk, make_sparse
from tests.support.peers import require_root

HOLE = Allocation.HOLE | Allocation.ZERO


class Clock:
    """Time that passes only when told to; each reading adds `step_s`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.step_s = 0.0

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


def open_unhurried(path: Path, clock: Clock | None = None) -> FileDevice:
    """A device for which no write is slow, however busy the machine."""
    fd = os.open(path, os.O_RDWR)
    return FileDevice(fd, str(path), os.fstat(fd).st_size, clock=clock or Clock())


# Opening and creating.


def test_missing_file_is_named() -> None:
    with pytest.raises(NotFoundError, match=r"/nowhere/disk\.img does not exist: check the path"):
        FileDevice.open("/nowhere/disk.img")


def test_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="is a directory: name an image file or a block device"):
        FileDevice.open(str(tmp_path))


def test_fifo_is_refused_without_waiting_for_its_other_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DeviceError, match="is neither a file nor a block device"):
        FileDevice.open(str(tmp_path / "fifo"))


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(DeviceError, match="is empty: a disk needs at least one byte"):
        FileDevice.open(str(tmp_path / "empty"))


def test_too_long_a_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"^cannot open .*: File name too long$"):
        FileDevice.open(str(tmp_path / ("x" * 300)))


@pytest.mark.root
def test_unwritable_file_suggests_read_only(tmp_path: Path) -> None:
    require_root("becoming a user who may not write")
    image = make_disk(tmp_path / "disk.img", 4096)
    image.chmod(0o444)
    tmp_path.chmod(0o755)
    script = (
        "import os, sys\n"
        "from nbdbackup.block.file import FileDevice\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.seteuid(65534)\n"
        "FileDevice.open(f'/proc/self/fd/{fd}')\n"
    )
    run = [sys.executable, "-c", script, str(image)]
    failed = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert "for writing; it can be read: try --read-only: Permission denied" in failed.stderr


def test_failed_opening_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(DeviceError):
            FileDevice.open(str(tmp_path / "empty"))
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_opening_changes_nothing_about_the_file(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", 4096)
    os.utime(path, (1, 1))
    before = os.stat(path)
    device = FileDevice.open(str(path))
    await device.block_status(0, 4096)
    await device.close()
    after = os.stat(path)
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


async def test_created_file_is_sparse_and_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "target.img"
    device = FileDevice.create(str(path), 2**40 + 513)
    try:
        status = os.stat(path)
        assert status.st_size == device.size == 2**40 + 513
        assert status.st_blocks == 0
        assert stat.S_IMODE(status.st_mode) == 0o600
    finally:
        await device.close()


def test_existing_file_is_not_created_again(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "target.img", 512)
    before = path.read_bytes()
    with pytest.raises(ConflictError, match="exists already"):
        FileDevice.create(str(path), 4096)
    assert path.read_bytes() == before


def test_file_in_a_missing_directory_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no directory"):
        FileDevice.create(str(tmp_path / "nowhere" / "target.img"), 4096)


def test_too_large_a_file_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="File too large"):
        FileDevice.create(str(tmp_path / "target.img"), 2**62)
    assert os.listdir(tmp_path) == []


async def test_anonymous_file_can_be_adopted(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.ftruncate(fd, 4096)
    device = FileDevice(fd, "scratch", 4096)
    await device.write(0, b"kept")
    assert os.pread(fd, 4, 0) == b"kept"
    assert device.offload_fd() == fd
    await device.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# In place or in a thread.


def test_guard_closes_after_a_slow_write_and_opens_again() -> None:
    guard = WriteGuard(Clock())
    guard.slow_write_ended(10.0)
    assert guard.open_from == 10.0 + BACKOFF_MIN_S


def test_guard_doubles_its_backoff_while_writes_stay_slow() -> None:
    guard = WriteGuard(Clock())
    now, backoffs = 10.0, []
    for _ in range(10):
        guard.slow_write_ended(now)
        backoffs.append(round(guard.open_from - now, 6))
        now = guard.open_from + 0.001
    assert backoffs[:3] == [BACKOFF_MIN_S, 2 * BACKOFF_MIN_S, 4 * BACKOFF_MIN_S]
    assert backoffs[-1] == BACKOFF_MAX_S
    guard.slow_write_ended(now + 60.0)
    assert guard.open_from == now + 60.0 + BACKOFF_MIN_S


async def test_slow_write_sends_the_next_ones_to_the_executor(tmp_path: Path) -> None:
    clock = Clock()
    path = make_disk(tmp_path / "disk.img", MIB)
    device = open_unhurried(path, clock)
    fd = device.offload_fd()
    assert device.write_nowait(0, bytes(4096))
    clock.step_s = SLOW_WRITE_S * 2
    assert device.write_nowait(4096, b"slow" * 1024)
    clock.step_s = 0.0
    assert not device.write_nowait(8192, b"next" * 1024)
    assert os.pread(fd, 4, 8192) != b"next"
    await device.write(8192, b"next" * 1024)
    clock.now += BACKOFF_MIN_S
    assert device.write_nowait(12288, b"last" * 1024)
    assert os.pread(fd, 4, 12288) == b"last"
    await device.close()


async def test_cached_bytes_are_read_and_written_in_place(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", MIB)
    device = open_unhurried(path)
    if file_locality(device.offload_fd()) is Locality.UNKNOWN:
        pytest.skip("the temporary directory's file system is not known to be local")
    assert device.read_nowait(5, bytearray(4096))
    assert device.write_nowait(4096, bytes(4096))
    assert device.write_nowait(5, bytes(10))
    await device.close()


async def test_part_of_a_page_that_is_not_cached_is_not_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_disk(tmp_path / "disk.img", MIB)
    device = open_unhurried(path)
    if file_locality(device.offload_fd()) is not Locality.LOCAL:
        pytest.skip("the temporary directory's file system has no cache to be cold")
    # A real cold page would not do: the look at it starts reading it ahead, and soon it is there.
    cold = {512 * 1024 // 4096, 512 * 1024 // 4096 + 1}
    preadv = os.preadv

    def preadv_of_cold_pages(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and offset // 4096 in cold:
            raise BlockingIOError
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv_of_cold_pages)
    assert not device.read_nowait(512 * 1024, bytearray(512))
    assert not device.write_nowait(512 * 1024 + 5, b"part")
    assert not device.write_nowait(512 * 1024, bytes(4096 + 5))
    assert device.write_nowait(512 * 1024, b"w" * 4096)
    assert device.write_nowait(256 * 1024 + 5, b"part")
    cold.clear()
    assert device.write_nowait(512 * 1024 + 100, b"part")
    await device.close()


async def test_file_system_that_may_hang_is_never_touched_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "file_locality", lambda fd: Locality.UNKNOWN)
    path = make_disk(tmp_path / "disk.img", 8192)
    device = FileDevice.open(str(path))
    assert not device.write_nowait(0, b"x" * 4096)
    await device.write(0, b"x" * 4096)
    buffer = bytearray(4096)
    await device.read(0, buffer)
    assert buffer == b"x" * 4096
    await device.close()


async def test_unknown_rwf_nowait_is_learned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_disk(tmp_path / "disk.img", 8192)
    device = FileDevice.open(str(path))
    calls: list[int] = []

    def refuse(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        calls.append(flags)
        raise OSError(errno.EOPNOTSUPP, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        assert not device.read_nowait(0, bytearray(512))
        assert not device.read_nowait(0, bytearray(512))
    assert len(calls) == 1
    await device.close()


async def test_write_that_would_wait_is_left_to_the_executor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As XFS and btrfs answer RWF_NOWAIT: EAGAIN where they would have to wait."""

    def would_wait(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        assert flags == os.RWF_NOWAIT
        raise BlockingIOError(errno.EAGAIN, "would wait")

    monkeypatch.setattr(file_module, "file_locality", lambda fd: Locality.LOCAL)
    path = make_disk(tmp_path / "disk.img", 8192)
    before = path.read_bytes()
    device = open_unhurried(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", would_wait)
        assert not device.write_nowait(0, b"x" * 4096)
        assert not device.write_nowait(4096, b"x" * 4096)
    assert path.read_bytes() == before
    await device.close()


async def test_write_done_in_part_without_waiting_is_finished_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.pwritev

    def write_some(fd: int, buffers: list[bytes], offset: int, flags: int = 0) -> int:
        return real_write(fd, [memoryview(buffers[0])[:1000]], offset)

    monkeypatch.setattr(file_module, "file_locality", lambda fd: Locality.LOCAL)
    path = make_disk(tmp_path / "disk.img", 8192)
    device = open_unhurried(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", write_some)
        assert device.write_nowait(4096, b"x" * 4096)
    assert path.read_bytes()[4096:] == b"x" * 4096
    await device.close()


# Errors and what is where.


async def test_file_cut_off_by_others_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", 8192)
    device = FileDevice.open(str(path))
    os.truncate(path, 4096)
    assert not device.read_nowait(4000, bytearray(512))
    with pytest.raises(DeviceError, match=r"ends at byte 4096 but was 8192 bytes long") as caught:
        await device.read(4000, bytearray(512))
    assert caught.value.errno == errno.EIO
    (answer,) = await device.block_status(4096, 4096)
    assert answer.flags == Allocation.DATA
    await device.close()


async def test_failed_sync_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of lost writes once; a later success would be a lie."""
    device = FileDevice.create(str(tmp_path / "disk.img"), 4096)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="lost"):
            await device.flush()
    with pytest.raises(DeviceError, match=r"an earlier flush of .* failed"):
        await device.flush()
    await device.close()


async def test_failed_fua_write_may_have_used_up_the_kernels_only_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FileDevice.create(str(tmp_path / "disk.img"), 4096)

    def fail(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, "lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(OSError, match="lost"):
            await device.write(0, b"x", fua=True)
    with pytest.raises(DeviceError, match=r"an earlier flush of .* failed"):
        await device.flush()
    await device.close()


async def test_fua_syncs_where_rwf_dsync_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FileDevice.create(str(tmp_path / "disk.img"), 4096)
    real_write, real_sync, synced = os.pwritev, os.fdatasync, []

    def write(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real_write(fd, buffers, offset)

    def sync(fd: int) -> None:
        synced.append(fd)
        real_sync(fd)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "fdatasync", sync)
    await device.write(0, b"x")
    assert not synced
    await device.write(0, b"y", fua=True)
    assert len(synced) == 1
    await device.close()


async def test_zeroing_gives_space_back_only_if_it_may(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", MIB)
    device = FileDevice.open(str(path))
    if file_locality(device.offload_fd()) is not Locality.LOCAL:
        pytest.skip("the temporary directory's file system is not known to zero in both ways")
    await device.flush()
    await device.write_zeroes(0, MIB // 2, may_unmap=False)
    assert allocated_bytes(path) == MIB
    await device.write_zeroes(0, MIB // 2, may_unmap=True)
    assert allocated_bytes(path) == MIB // 2
    await device.trim(MIB // 2, MIB // 4)
    assert allocated_bytes(path) == MIB // 4
    await device.close()


async def test_ignored_discard_keeps_the_space_and_the_bytes(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", MIB)
    content = path.read_bytes()
    device = FileDevice.open(str(path), discard=False)
    assert not device.features.trim
    await device.trim(0, MIB)
    assert path.read_bytes() == content
    await device.write_zeroes(0, MIB, may_unmap=True)
    await device.flush()
    assert allocated_bytes(path) == MIB
    assert not any(path.read_bytes())
    await device.close()


async def test_zeroing_without_help_from_the_file_system_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Falloc] = []

    def refuse(fd: int, mode: Falloc, offset: int, length: int) -> None:
        calls.append(mode)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(file_module, "fallocate", refuse)
    path = make_disk(tmp_path / "disk.img", 6 * MIB + 17)
    content = path.read_bytes()
    device = FileDevice.open(str(path))
    with pytest.raises(OSError, match="as long as writing") as caught:
        await device.write_zeroes(3, 5 * MIB, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    assert path.read_bytes() == content
    await device.write_zeroes(3, 5 * MIB)
    await device.trim(6 * MIB, 17)
    assert path.read_bytes() == content[:3] + bytes(5 * MIB) + content[5 * MIB + 3 :]
    assert len(calls) == 2
    await device.close()


async def test_full_file_system_is_an_error_to_zeroing_and_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(fd: int, mode: Falloc, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    device = FileDevice.create(str(tmp_path / "disk.img"), 8192)
    monkeypatch.setattr(file_module, "fallocate", fill)
    with pytest.raises(OSError, match="No space left"):
        await device.write_zeroes(0, 4096, may_unmap=False)
    await device.close()


async def test_holes_are_reported_as_holes(tmp_path: Path) -> None:
    path = make_sparse(tmp_path / "disk.img", MIB)
    device = FileDevice.open(str(path))
    assert await device.block_status(0, MIB) == [StatusExtent(MIB, HOLE)]
    await device.write(65536, b"d" * 65536)
    assert await device.block_status(0, MIB) == [
        StatusExtent(65536, HOLE),
        StatusExtent(65536, Allocation.DATA),
        StatusExtent(MIB - 131072, HOLE),
    ]
    assert await device.block_status(70000, 5) == [StatusExtent(5, Allocation.DATA)]
    await device.close()


async def test_block_status_answers_with_a_bounded_number_of_extents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "STATUS_EXTENTS_MAX", 8)
    device = FileDevice.open(str(make_sparse(tmp_path / "disk.img", MIB)))
    for offset in range(0, MIB, 32768):
        await device.write(offset, b"d" * 4096)
    answer = await device.block_status(0, MIB)
    assert 1 < len(answer) <= 8
    assert sum(extent.length for extent in answer) < MIB
    await device.close()
