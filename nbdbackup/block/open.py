"""From what a person names to a device.

The format is never guessed. Whoever can write to a raw disk can put the header of a
qcow2 image on it, with any file of the host as its backing file; a server that guessed
would then serve that file. So a source whose format was not given is raw, and is refused
if its first bytes look like an image container: then the person has to say which is meant.
"""

import re

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.file import FileDevice
from nbdbackup.errors import UsageError

# Offset, bytes there, name of the format.
_CONTAINERS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
)
_HEAD_BYTES = 128
_URI = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


async def open_device(
    path: str, format: str | None = None, *, read_only: bool = False, discard: bool = True, lock: bool = True
) -> BlockDevice:
    """Open the file or block device at `path`; `format` is "raw", or None (see above).

    Without `discard`, trim does nothing and zeroed ranges stay allocated.

    Raises:
        UsageError: the source or its format is of a kind that cannot be served.
        NotFoundError, ConflictError, DeviceError: see `FileDevice.open`.
    """
    if uri := _URI.match(path):
        raise UsageError(
            f"{path} is a {uri[1]} URI, and only files and block devices can be served: "
            f"for a remote disk, attach it first (nbd-client) and name its block device"
        )
    if format not in (None, "raw"):
        raise UsageError(f"format {format} cannot be served: {_way_around(format or '', path)}")
    # Opening may wait for a network or a disk that spins up.
    executor = IoExecutor("open", threads_max=1)
    opened: list[FileDevice] = []
    try:
        await executor.run(
            lambda: opened.append(FileDevice.open(path, read_only=read_only, discard=discard, lock=lock))
        )
        if format is None:
            await _refuse_container(opened[0], path)
    except BaseException:
        for device in opened:
            await device.close()
        raise
    finally:
        executor.shutdown()
    return opened[0]


async def _refuse_container(device: FileDevice, path: str) -> None:
    head = bytearray(min(_HEAD_BYTES, device.size))
    await device.read(0, head)
    for offset, magic, name in _CONTAINERS:
        if head[offset : offset + len(magic)] == magic:
            raise UsageError(
                f"{path} looks like a {name} image: to serve its bytes as they are, say -f raw; "
                f"to serve the disk inside, {_way_around(name, path)}"
            )


def _way_around(format: str, path: str) -> str:
    return (
        f"attach it with `qemu-nbd -f {format} -c /dev/nbd0 {path}` and serve /dev/nbd0, "
        f"or convert it with `qemu-img convert -O raw`"
    )
