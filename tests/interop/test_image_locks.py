"""QEMU's tools and our devices respect each other's image locks."""

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdbackup.block.file import FileDevice
from nbdbackup.block.locks import lock_image
from nbdbackup.errors import ConflictError
from tests.support.disks import MIB, make_disk, sha256
from tests.support.peers import require

LIMIT_S = 30.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", MIB)


@contextmanager
def qemu_nbd(image: Path, *options: str) -> Iterator[int]:
    """A qemu-nbd that serves `image`; its process id."""
    pid_file = image.with_suffix(".pid")
    listen = ["--socket", str(image.with_suffix(".sock")), "--pid-file", str(pid_file)]
    # With --fork the first process ends when the image is open and locked.
    started = run("qemu-nbd", "--fork", "--persistent", "-f", "raw", *listen, *options, str(image))
    assert started.returncode == 0, started.stderr
    process = int(pid_file.read_text())
    handle = os.pidfd_open(process)
    try:
        yield process
    finally:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        ended, _, _ = select.select([handle], [], [], LIMIT_S)
        os.close(handle)
        assert ended


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of QEMU's to its end."""
    return subprocess.run(
        [require(command[0]), *command[1:]], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


async def test_second_writer_in_the_same_process_is_refused(image: Path) -> None:
    first = FileDevice.open(str(image))
    with pytest.raises(ConflictError, match=r"disk\.img is already open in this server"):
        FileDevice.open(str(image))
    await first.close()
    again = FileDevice.open(str(image))
    await again.close()


async def test_two_readers_share_an_image(image: Path) -> None:
    first = FileDevice.open(str(image), read_only=True)
    second = FileDevice.open(str(image), read_only=True)
    await first.close()
    await second.close()


async def test_qemu_cannot_write_to_an_image_that_we_serve(image: Path) -> None:
    device = FileDevice.open(str(image))
    try:
        for command in (
            ("qemu-io", "-f", "raw", "-c", "write 0 512", str(image)),
            ("qemu-nbd", "-f", "raw", "-k", str(image.with_suffix(".sock")), str(image)),
        ):
            refused = run(*command)
            assert refused.returncode != 0
            assert 'Failed to get "write" lock' in refused.stderr
    finally:
        await device.close()
    assert run("qemu-io", "-f", "raw", "-c", "write 0 512", str(image)).returncode == 0


@pytest.mark.parametrize("read_only", [False, True])
async def test_qemu_can_look_at_an_image_that_we_serve(image: Path, read_only: bool) -> None:
    device = FileDevice.open(str(image), read_only=read_only)
    try:
        assert run("qemu-img", "info", str(image)).returncode == 0
        assert run("qemu-img", "info", "-U", str(image)).returncode == 0
        assert run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", str(image)).returncode == 0
    finally:
        await device.close()


async def test_qemu_cannot_resize_an_image_that_we_read(image: Path) -> None:
    before = sha256(image)
    device = FileDevice.open(str(image), read_only=True)
    try:
        refused = run("qemu-img", "resize", "-f", "raw", str(image), "2M")
        assert refused.returncode != 0
        assert 'Failed to get "resize" lock' in refused.stderr
    finally:
        await device.close()
    assert sha256(image) == before


async def test_image_that_qemu_writes_is_refused_and_the_holder_named(image: Path) -> None:
    with qemu_nbd(image) as process:
        with pytest.raises(ConflictError) as caught:
            FileDevice.open(str(image))
        text = str(caught.value)
        assert text.startswith(f"{image} is locked by qemu-nbd (process {process}: /usr/bin/qemu-nbd --fork ")
        assert text.endswith("): stop that one first, or open the image read-only (--read-only)")
        reader = FileDevice.open(str(image), read_only=True)
        await reader.close()
    writer = FileDevice.open(str(image))
    await writer.close()


async def test_image_that_qemu_only_reads_can_be_served(image: Path) -> None:
    with qemu_nbd(image, "--read-only"):
        writer = FileDevice.open(str(image))
        await writer.close()


def test_refused_lock_leaves_none_behind(image: Path) -> None:
    writer = os.open(image, os.O_RDWR)
    lock_image(writer, str(image), writable=True)
    refused = os.open(image, os.O_RDWR)
    with pytest.raises(ConflictError):
        lock_image(refused, str(image), writable=True)
    os.close(writer)
    assert run("qemu-io", "-f", "raw", "-c", "write 0 512", str(image)).returncode == 0
    os.close(refused)


async def test_lock_can_be_left_out(image: Path) -> None:
    first = FileDevice.open(str(image))
    second = FileDevice.open(str(image), lock=False)
    await second.close()
    await first.close()
