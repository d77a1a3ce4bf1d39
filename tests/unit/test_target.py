"""A backup's target: a file has its name only when it is whole, and nothing else is touched."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackup.block.file import FileDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node, drained
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError, UsageError
from nbdbackup.job.backup import BackupJob, BackupOptions
from nbdbackup.job.target import ExistingTarget, NewFileTarget, open_target
from tests.support.backups import end_of, start_backup
from tests.support.fleecing import Disk
from tests.support.jobs import job_registry
from tests.support.peers import require_root
from tests.support.sessions import open_descriptors

SIZE = 4096 + 77


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "backup.img"


def names_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


async def write_whole(target: NewFileTarget) -> None:
    await target.device.write(0, b"x" * SIZE)


async def test_a_new_file_has_its_name_only_when_it_is_complete(path: Path) -> None:
    target = NewFileTarget(str(path), SIZE)
    await write_whole(target)
    assert names_in(path.parent) == ["backup.img.partial"]
    await target.complete()
    await target.close()
    assert names_in(path.parent) == ["backup.img"]


async def test_a_new_file_that_is_discarded_leaves_nothing(path: Path) -> None:
    target = NewFileTarget(str(path), SIZE)
    await write_whole(target)
    await target.discard()
    await target.close()
    assert names_in(path.parent) == []


async def test_a_complete_file_that_is_discarded_after_all_leaves_nothing(path: Path) -> None:
    target = NewFileTarget(str(path), SIZE)
    await target.complete()
    await target.discard()
    await target.close()
    assert names_in(path.parent) == []


async def test_a_file_that_could_not_lose_its_partial_name_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = NewFileTarget(str(path), SIZE)
    unlink, failures = os.unlink, [OSError(errno.EIO, "Input/output error")]

    def failing_once(name: str) -> None:
        if failures:
            raise failures.pop()
        unlink(name)

    monkeypatch.setattr(os, "unlink", failing_once)
    with pytest.raises(OSError, match="Input/output error"):
        await target.complete()
    await target.discard()
    await target.close()
    assert names_in(path.parent) == []


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(existing: str, new: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)


async def test_a_file_is_named_where_there_are_no_hard_links(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    target = NewFileTarget(str(path), SIZE)
    await target.complete()
    await target.close()
    assert names_in(path.parent) == ["backup.img"]


@pytest.mark.parametrize("links", [True, False])
async def test_a_file_of_that_name_is_never_replaced(
    links: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        refuse_links(monkeypatch)
    target = NewFileTarget(str(path), SIZE)
    _put(path, b"precious")
    with pytest.raises(ConflictError, match="came into being"):
        await target.complete()
    await target.discard()
    await target.close()
    assert names_in(path.parent) == ["backup.img"]
    assert _content(path) == b"precious"


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _content(path: Path) -> bytes:
    return path.read_bytes()


async def test_a_directory_that_cannot_be_synced_is_a_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = NewFileTarget(str(path), SIZE)

    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        await target.complete()
    await target.discard()
    await target.close()
    assert names_in(path.parent) == []


@pytest.mark.parametrize("name", ["backup.img", "backup.img.partial"])
def test_what_is_there_already_is_refused_and_untouched(name: str, path: Path) -> None:
    there = path.with_name(name)
    there.write_bytes(b"precious")
    descriptors = open_descriptors()
    with pytest.raises(ConflictError, match="exists already"):
        NewFileTarget(str(path), SIZE)
    assert names_in(path.parent) == [name]
    assert there.read_bytes() == b"precious"
    assert open_descriptors() == descriptors


def test_a_dangling_link_of_that_name_is_refused(path: Path) -> None:
    path.symlink_to("nowhere")
    with pytest.raises(ConflictError, match="exists already"):
        NewFileTarget(str(path), SIZE)
    assert names_in(path.parent) == ["backup.img"]


def test_a_missing_directory_is_named(path: Path) -> None:
    with pytest.raises(NotFoundError, match=f"no directory {path}"):
        NewFileTarget(str(path / "backup.img"), SIZE)


def test_a_size_that_the_file_system_cannot_hold_leaves_nothing(path: Path) -> None:
    descriptors = open_descriptors()
    with pytest.raises(DeviceError):
        NewFileTarget(str(path), (1 << 63) - 1)
    assert names_in(path.parent) == []
    assert open_descriptors() == descriptors


async def test_an_existing_target_must_have_the_disks_size(path: Path) -> None:
    _put(path, b"x" * SIZE)
    descriptors = open_descriptors()
    with pytest.raises(UsageError, match="different sizes"):
        await open_target(str(path), SIZE + 1, existing=True)
    assert open_descriptors() == descriptors
    assert _content(path) == b"x" * SIZE


async def test_an_existing_target_is_written_in_place_and_never_removed(path: Path) -> None:
    _put(path, b"x" * SIZE)
    target = await open_target(str(path), SIZE, existing=True)
    await target.device.write(0, b"new")
    await target.discard()
    await target.complete()
    await target.close()
    assert _content(path) == b"new" + b"x" * (SIZE - 3)


async def test_an_existing_target_must_exist(path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        await open_target(str(path), SIZE, existing=True)
    assert names_in(path.parent) == []


async def test_a_target_that_is_somebodys_node_is_used_and_not_closed() -> None:
    users = ["export 'spare'"]
    target = ExistingTarget(Node("spare", MemoryDevice(SIZE)), users=users)
    assert len(users) == 2
    await target.complete()
    await target.close()
    assert users == ["export 'spare'"]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    require_root("mounts a tmpfs")
    mount = tmp_path / "tiny"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=True, timeout=30)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=30)


@pytest.mark.root
@pytest.mark.parametrize("shape", ["direct", "fleecing"])
async def test_a_full_target_fails_the_backup_names_the_cause_and_leaves_nothing(
    shape: str, tiny: Path
) -> None:
    disk = Disk(size=4 << 20)
    async with job_registry() as (registry, log):
        options = BackupOptions(auto_dismiss=False, cluster_bytes=65536)
        target = NewFileTarget(str(tiny / "backup.img"), disk.node.size)
        job = await start_backup(registry, disk, target, shape, options)
        error = await end_of(job)
    assert error is not None
    assert error.startswith("writing the target failed at offset")
    assert error.endswith("No space left on device")
    assert log.find("BLOCK_JOB_ERROR").data["operation"] == "write"
    assert names_in(tiny) == []
    assert not list(disk.node.filters)
    await disk.node.write(0, b"the client goes on")


@pytest.mark.root
async def test_a_full_target_is_found_by_offloaded_copies_too(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "disk.img"
    _put(source, os.urandom(4 << 20))
    device = FileDevice.open(str(source))
    node = Node("disk", device)
    async with job_registry() as (registry, _):
        target = NewFileTarget(str(tiny / "backup.img"), node.size)
        job = BackupJob("b1", node, target, BackupOptions(auto_dismiss=False))
        registry.add(job)
        async with drained(node):
            job.hold_direct()
        registry.start(job)
        error = await end_of(job)
    assert error is not None
    assert error.startswith("writing the target failed at offset")
    assert names_in(tiny) == []
    await device.close()
