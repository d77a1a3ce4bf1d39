"""What `info` and `map` share: their arguments, and opening what they look at without a server of ours."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.block.open import open_device
from nbdbackup.cli.parser import Parser, add_verbose, only
from nbdbackup.errors import NbdBackupError, NotFoundError


def add_image_arguments(parser: Parser) -> None:
    """Add FILE|URI, `-f`, `--json` and `-v`."""
    parser.add_argument(
        "image",
        metavar="FILE|URI",
        help="a raw file, a block device, or an NBD URI: nbd://HOST[:PORT]/EXPORT, "
        "nbd+unix:///EXPORT?socket=PATH",
    )
    parser.add_argument(
        "-f",
        "--format",
        type=only("format", "raw", ("qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "luks", "qed")),
        metavar="raw",
        help="look at the bytes as they are, also when they look like an image format",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else, on standard output"
    )
    add_verbose(parser)


@asynccontextmanager
async def opened_file(path: str, format: str | None) -> AsyncIterator[BlockDevice]:
    """The file or block device at `path`, to be read and not locked.

    Raises:
        NbdBackupError: it is not there, cannot be read, or is of a format that this version does not read.
    """
    try:
        device = await open_device(path, format, read_only=True, lock=False)
    except NotFoundError as error:
        # Exit status 10 means that there is no server.
        raise NbdBackupError(str(error)) from error
    try:
        yield device
    finally:
        await device.close()


def quick_to_fail(*contexts: str) -> RemoteOptions:
    """How to use a remote export for a short look at it."""
    return RemoteOptions(reconnect_delay_s=0, connections_max=1, contexts=contexts)
