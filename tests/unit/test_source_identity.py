"""What a bitmap remembers of its source: files, block devices, remote exports."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from nbdbackup.bitmap.identity import SourceKind
from nbdbackup.block.file import FileDevice
from nbdbackup.block.linux import block_device_id
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.daemon.stored_bitmaps import source_identity
from tests.support.peers import require, require_root


async def test_a_file_is_its_inode_and_times_and_a_write_shows(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    device = FileDevice.open(str(path))
    before = source_identity(device)
    status = path.stat()
    assert before.kind in (SourceKind.LOCAL_FILE, SourceKind.SHARED_FILE)
    assert (before.size, before.inode, before.mtime_ns) == (4096, status.st_ino, status.st_mtime_ns)
    assert source_identity(device) == before
    os.utime(path, ns=(0, 1))
    after = source_identity(device)
    assert before.difference(after, same_boot=True) == ""
    assert before.change_since_stop(after)
    os.utime(path, ns=(0, before.mtime_ns))
    assert before.change_since_stop(source_identity(device)), "a clock put back does not undo it"
    await device.close()


async def test_what_has_no_descriptor_is_what_it_is_called() -> None:
    identity = source_identity(MemoryDevice(4096))
    assert (identity.kind, identity.size) == (SourceKind.REMOTE, 4096)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    require_root("attaches a loop device")
    backing = tmp_path / "backing.img"
    backing.write_bytes(bytes(1 << 20))
    attached = subprocess.run(
        [require("losetup"), "--find", "--show", backing], capture_output=True, text=True, check=False
    )
    if attached.returncode:
        pytest.skip(f"no loop device: {attached.stderr.strip()}")
    yield Path(attached.stdout.strip())
    subprocess.run([require("losetup"), "--detach", attached.stdout.strip()], check=True)


@pytest.mark.root
async def test_a_block_device_is_what_the_kernel_knows_it_by(loop_device: Path, tmp_path: Path) -> None:
    device = FileDevice.open(str(loop_device))
    identity = source_identity(device)
    assert identity.kind is SourceKind.BLOCK_DEVICE
    assert identity.lasting_id == f"loop/backing_file {tmp_path / 'backing.img'}"
    assert identity.device == os.stat(loop_device).st_rdev
    assert identity.difference(replace(identity, device=1), same_boot=False) == ""
    assert (
        identity.difference(replace(identity, device=1), same_boot=True) == "the disk is another block device"
    )
    await device.close()


def test_what_is_no_block_device_has_no_id() -> None:
    assert block_device_id(os.makedev(4095, 1)) == ""
