"""From names to devices: raw is never guessed, and refusals say what to do."""

import asyncio
import os
from pathlib import Path

import pytest

from nbdbackup.block.file import FileDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.open import open_device
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError, UsageError
from tests.support.disks import make_disk
from tests.support.own_server import serving

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


async def test_uri_of_another_scheme_is_refused_with_a_way_around() -> None:
    with pytest.raises(UsageError, match=r"only files, block devices and NBD exports .* nbdkit"):
        await open_device("http://x/y")


@pytest.mark.parametrize("uri", ["nbds://localhost/disk", "nbds+unix:///disk?socket=/run/x"])
async def test_uri_with_tls_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="TLS"):
        await open_device(uri)


async def test_malformed_uri_is_refused() -> None:
    with pytest.raises(UsageError, match="tls-verify"):
        await open_device("nbd://localhost/disk?tls-verify=no")


async def test_remote_export_is_opened_read_only_or_not(tmp_path: Path) -> None:
    content = FileDevice.open(str(make_disk(tmp_path / "disk.img", 4097)))
    async with serving({"disk": content}) as uri:
        for read_only in (True, False):
            device = await open_device(uri, read_only=read_only)
            assert (device.size, str(device), device.read_only) == (4097, uri, read_only)
            await device.close()
    await content.close()


async def test_remote_export_that_is_read_only_is_not_opened_for_writing() -> None:
    async with serving({"disk": MemoryDevice(512)}, read_only=True) as uri:
        with pytest.raises(DeviceError, match="can only be read: try --read-only"):
            await open_device(uri)
        device = await open_device(uri, read_only=True)
        await device.close()


async def test_remote_container_is_refused_unless_called_raw(tmp_path: Path) -> None:
    disk = FileDevice.open(str(make_container(tmp_path / "disk.img", "qcow2")))
    async with serving({"disk": disk}) as uri:
        with pytest.raises(
            UsageError, match=r"looks like a qcow2 image: .*say -f raw; .*`qemu-nbd -f qcow2`"
        ):
            await open_device(uri)
        device = await open_device(uri, "raw")
        await device.close()
    await disk.close()


async def test_server_that_is_not_there_or_has_no_such_export_is_not_found(tmp_path: Path) -> None:
    uri = f"nbd+unix:///disk?socket={tmp_path}/none"
    with pytest.raises(NotFoundError, match=f"cannot connect to .*{tmp_path}/none: No such file"):
        await open_device(uri)
    async with serving({"disk": MemoryDevice(512)}) as uri:
        with pytest.raises(NotFoundError, match="no export named 'other'"):
            await open_device(uri.replace("disk", "other"))


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
