"""Persistent bitmaps of the daemon: a file for each in the state directory (`bitmap.store`)."""

import asyncio
import logging
import os
import stat
from pathlib import Path

from nbdbackup.bitmap.file import failed
from nbdbackup.bitmap.file_format import TEXT_BYTES_MAX, cut
from nbdbackup.bitmap.identity import SourceIdentity, SourceKind
from nbdbackup.bitmap.store import BitmapStore
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.block.device import BlockDevice
from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.linux import Locality, block_device_id, file_locality
from nbdbackup.block.node import Node
from nbdbackup.daemon.graph import Entry

logger = logging.getLogger(__name__)

SIGN_OF_LIFE_S = 10.0
"""Every so often; less than a third of what `identity` allows for."""


class ReclaimUnheld:
    """The last watcher of nodes: bitmaps whose holder none of those before it found are frozen no longer."""

    async def load(self, entry: Entry) -> None:
        for bitmap in entry.bitmaps:
            if isinstance(bitmap, StoredBitmap) and bitmap.awaits_holder:
                bitmap.reclaim()
                logger.warning(
                    "bitmap '%s' of node '%s' is not frozen any more, and has all its bits again: "
                    "what it was frozen for is gone or broken",
                    bitmap.name,
                    entry.node.name,
                )

    async def release(self, entry: Entry) -> None:
        """Nothing: the bitmaps are saved by others."""


class StoredBitmaps:
    """The bitmaps in `directory`; with `power`, they outlive a loss of power."""

    def __init__(self, directory: Path, *, power: bool) -> None:
        self.directory = directory
        self.power = power
        self._executor = IoExecutor("bitmaps")
        self.run = self._executor.run
        """Runs functions that block, in threads."""
        self._store = BitmapStore(directory, self._executor.run, power=power)

    async def open(self) -> None:
        """Look at what is there. Raises what `BitmapStore.open` does."""
        await self._executor.run(self._store.open)

    def close(self) -> None:
        """Let the threads end; every bitmap was released or removed."""
        self._executor.shutdown()

    async def keep_alive(self) -> None:
        """Give signs of life, until cancelled."""
        while True:
            self._store.give_sign_of_life()
            await asyncio.sleep(SIGN_OF_LIFE_S)

    async def create(self, node: Node, name: str, granularity: int, *, enabled: bool) -> StoredBitmap:
        """A new bitmap; `publish` or `remove` has to follow. Raises what `BitmapStore.create` does."""
        return await self._executor.run(
            lambda: self._store.create(
                node.name, name, granularity, source_identity(node.bottom), enabled=enabled
            )
        )

    def publish(self, bitmap: StoredBitmap) -> None:
        """Let the bitmap be there for good. Raises what `BitmapStore.publish` does."""
        self._store.publish(bitmap)

    async def sync(self) -> None:
        """What was published or removed is so on disk."""
        await self._executor.run(self._store.sync_directory)

    def at_rest(self) -> list[tuple[str, str, Path]]:
        """Node, name and file of each bitmap whose node there is not."""
        return self._store.at_rest()

    async def remove_at_rest(self, path: Path) -> str:
        """Remove the file of such a bitmap; its node. Raises what `BitmapStore.remove_at_rest` does."""
        node = self._store.remove_at_rest(path)
        await self.sync()
        return node

    async def load(self, node: Node) -> list[StoredBitmap]:
        """The bitmaps of `node`, in use from now on. Raises what `BitmapStore.load` does."""
        bitmaps = await self._executor.run(lambda: self._store.load(node.name, source_identity(node.bottom)))
        for bitmap in bitmaps:
            if bitmap.inconsistent:
                logger.warning(
                    "bitmap '%s' of node '%s' is inconsistent: %s; remove it, and back up in full",
                    bitmap.name,
                    node.name,
                    bitmap.inconsistent,
                )
        return bitmaps

    async def release(self, node: Node, bitmap: StoredBitmap) -> None:
        """Save `bitmap`, whose node goes. A failure is logged: the file is as after a crash then."""
        self._store.retire(bitmap)
        try:
            # First: a clean bit says that what a backup has is on the disk too.
            await flush_source(node)
            await self._executor.run(lambda: self._store.release(bitmap, source_identity(node.bottom)))
        except OSError as error:
            logger.error(
                "bitmap '%s' of node '%s' cannot be saved in %s: %s; it is as after a crash",
                bitmap.name,
                node.name,
                bitmap.file.path,
                error.strerror or error,
            )
        await bitmap.close()

    async def remove(self, bitmap: StoredBitmap) -> None:
        """Remove the file of `bitmap`, which nobody marks any more.

        Raises:
            DeviceError: it cannot be removed.
        """
        self._store.retire(bitmap)
        path = bitmap.file.path
        try:
            await self._executor.run(self._store.remove, bitmap)
            await self.sync()
        except OSError as error:
            raise failed(error, f"cannot remove bitmap file {path}") from error
        finally:
            await bitmap.close()


async def flush_source(node: Node) -> None:
    """What was written to the source of `node` is on its disk; works also while the node stands still.

    Raises:
        OSError: it is not.
    """
    if not node.bottom.read_only:
        await node.bottom.flush()


def source_identity(device: BlockDevice) -> SourceIdentity:
    """What can be known of `device`, as it is now."""
    fd = device.offload_fd()
    if fd is None:
        return SourceIdentity(SourceKind.REMOTE, device.size, lasting_id=cut(str(device), TEXT_BYTES_MAX))
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        lasting_id = cut(block_device_id(status.st_rdev), TEXT_BYTES_MAX)
        return SourceIdentity(SourceKind.BLOCK_DEVICE, device.size, status.st_rdev, lasting_id=lasting_id)
    is_local = file_locality(fd) is not Locality.UNKNOWN
    return SourceIdentity(
        SourceKind.LOCAL_FILE if is_local else SourceKind.SHARED_FILE,
        device.size,
        status.st_dev,
        status.st_ino,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
