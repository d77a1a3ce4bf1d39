"""From names to devices: raw is never guessed, and refusals say what to do."""

import asyncio
import os
from pathlib import Path

import pytest

from nbdbackup.block.open import open_device
from nbdbackup.errors import ConflictError, NotFoundError, UsageError
from tests.support.disks import make_disk

HEADERS = {
    "qcow2": b"QFI\xfb\0\0\0\3",
    "vmdk": b"KDMV\1\0\0\0",
    "vhdx": b"vhdxfile",
    "vpc": b"conectix",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(0x40, b"\0") + b"\x7f\x10\xda\xbe",
}


def make_container(path: Path, name: str) -> Path:
    path.write_bytes(HEADERS[name].ljust(65536, b"\0"))
    return path


async def test_raw_file_is_served_without_saying_so(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", 4097)
    device = await open_device(str(path))
    assert device.size == 4097
    assert str(device) == str(path)
    assert not device.read_only
    await device.close()


@pytest.mark.parametrize("size", [1, 3, 4, 100])
async def test_tiny_raw_file_is_served(tmp_path: Path, size: int) -> None:
    device = await open_device(str(make_disk(tmp_path / "disk.img", size)), read_only=True)
    assert device.size == size
    assert device.read_only
    await device.close()


@pytest.mark.parametrize("name", sorted(HEADERS))
async def test_container_is_refused_with_both_ways_to_say_what_is_meant(tmp_path: Path, name: str) -> None:
    path = make_container(tmp_path / "disk.img", name)
    with pytest.raises(UsageError) as caught:
        await open_device(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path} looks like a {name} image: ")
    assert "-f raw" in message
    assert "qemu-nbd" in message
    assert "\n" not in message


async def test_container_is_served_as_its_bytes_when_called_raw(tmp_path: Path) -> None:
    path = make_container(tmp_path / "disk.img", "qcow2")
    device = await open_device(str(path), "raw")
    buffer = bytearray(4)
    await device.read(0, buffer)
    assert buffer == b"QFI\xfb"
    await device.close()


async def test_refused_container_is_closed_and_unlocked(tmp_path: Path) -> None:
    path = make_container(tmp_path / "disk.img", "qcow2")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError):
        await open_device(str(path))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    device = await open_device(str(path), "raw")
    await device.close()


async def test_qcow2_is_refused_with_a_way_around(tmp_path: Path) -> None:
    path = make_container(tmp_path / "disk.img", "qcow2")
    with pytest.raises(
        UsageError, match=r"^format qcow2 cannot be served: attach it with `qemu-nbd -f qcow2"
    ):
        await open_device(str(path), "qcow2")


@pytest.mark.parametrize("uri", ["nbd://localhost/disk", "nbds+unix:///disk?socket=/run/x", "http://x/y"])
async def test_uri_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="only files and block devices can be served"):
        await open_device(uri)


async def test_missing_and_locked_files_are_refused_as_by_the_device(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        await open_device(str(tmp_path / "missing"))
    path = make_disk(tmp_path / "disk.img", 512)
    device = await open_device(str(path))
    with pytest.raises(ConflictError):
        await open_device(str(path))
    await device.close()


async def test_cancelled_opening_leaves_nothing_open(tmp_path: Path) -> None:
    path = make_disk(tmp_path / "disk.img", 512)
    for rounds in (0, 1, 2, 5, 10):
        task = asyncio.create_task(open_device(str(path)))
        for _ in range(rounds):
            await asyncio.sleep(0)
        task.cancel()
        try:
            device = await task
        except asyncio.CancelledError:
            continue
        await device.close()
    # A device left open would hold its lock.
    device = await open_device(str(path))
    await device.close()
