"""From what a person names to a device.

The format is never guessed. Whoever can write to a raw disk can put the header of a
qcow2 image on it, with any file of the host as its backing file; a server that guessed
would then serve that file. So a source whose format was not given is raw, and is refused
if its first bytes look like an image container: then the person has to say which is meant. That goes
for the export of a remote server as well: its bytes are what a client of that server wrote.
"""

import re

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.file import FileDevice
from nbdbackup.block.nbd import NbdDevice
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.errors import UsageError
from nbdbackup.nbd.uri import SCHEMES

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


def is_remote(path: str) -> bool:
    """Whether `path` is an NBD URI and not a path."""
    uri = _URI.match(path)
    return uri is not None and uri[1].lower() in SCHEMES


async def open_device(
    path: str,
    format: str | None = None,
    *,
    read_only: bool = False,
    discard: bool = True,
    lock: bool = True,
    remote: RemoteOptions | None = None,
) -> BlockDevice:
    """Open the file or block device at `path`, or the export of an NBD URI, used as `remote` says.

    `format` is "raw", or None (see above). Without `discard`, trim does nothing and zeroed ranges stay
    allocated. `lock` is for files: nobody can lock a remote export.

    Raises:
        UsageError: the source or its format is of a kind that cannot be served.
        NotFoundError, ConflictError, DeviceError: see `FileDevice.open` and `NbdDevice.open`.
        ProtocolError: see `NbdDevice.open`.
    """
    uri = _URI.match(path)
    if uri and not is_remote(path):
        raise UsageError(
            f"{path} is a {uri[1]} URI, and only files, block devices and NBD exports can be served: "
            f"for another kind of remote disk, put nbdkit or qemu-nbd before it and name their NBD URI"
        )
    if format not in (None, "raw"):
        raise UsageError(f"format {format} cannot be served: {_way_around(format or '', path)}")
    device: BlockDevice
    if uri:
        device = await NbdDevice.open(path, read_only=read_only, discard=discard, options=remote)
    else:
        device = await _open_file(path, read_only, discard, lock)
    try:
        if format is None:
            await _refuse_container(device, path)
    except BaseException:
        await device.close()
        raise
    return device


async def _open_file(path: str, read_only: bool, discard: bool, lock: bool) -> FileDevice:
    # Opening may wait for a network file system or a disk that spins up.
    executor = IoExecutor("open", threads_max=1)
    opened: list[FileDevice] = []
    try:
        await executor.run(
            lambda: opened.append(FileDevice.open(path, read_only=read_only, discard=discard, lock=lock))
        )
    except BaseException:
        for device in opened:
            await device.close()
        raise
    finally:
        executor.shutdown()
    return opened[0]


async def _refuse_container(device: BlockDevice, path: str) -> None:
    head = bytearray(min(_HEAD_BYTES, device.size))
    await device.read(0, head)
    for offset, magic, name in _CONTAINERS:
        if head[offset : offset + len(magic)] == magic:
            raise UsageError(
                f"{path} looks like a {name} image: to serve its bytes as they are, say -f raw; "
                f"to serve the disk inside, {_way_around(name, path)}"
            )


def _way_around(format: str, path: str) -> str:
    if is_remote(path):
        return f"let its server open it: `qemu-nbd -f {format}`"
    return (
        f"attach it with `qemu-nbd -f {format} -c /dev/nbd0 {path}` and serve /dev/nbd0, "
        f"or convert it with `qemu-img convert -O raw`"
    )
