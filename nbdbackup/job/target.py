"""Where a backup goes, and when it may be called one.

A new file is written as `TARGET.partial` and gets its name only when it is complete and on
the disk: a file called TARGET is a whole backup. An existing image or device is written in place.
"""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable

from nbdbackup.block.absent import AbsentDevice
from nbdbackup.block.device import BlockDevice
from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.file import FileDevice
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.block.open import is_remote, open_device
from nbdbackup.crash_points import reach
from nbdbackup.errors import ConflictError, DeviceError, UsageError

BACKUP_USER = "a backup's target"


class Target(ABC):
    """`device` to write to; `zeroed` if it reads as zeroes where nothing was written.

    `outlives_failure`: what was copied is still there when the backup has failed.
    """

    device: BlockDevice
    zeroed: bool = False
    outlives_failure: bool = False

    @abstractmethod
    async def complete(self) -> None:
        """Everything is written: make it durable, and a backup.

        Raises:
            OSError, ConflictError: it could not be made durable, or not be given its name.
        """

    @abstractmethod
    async def discard(self) -> None:
        """The backup failed: remove what only a whole backup is good for."""

    async def close(self) -> None:
        """Give up the device."""
        await self.device.close()


class ExistingTarget(Target):
    """A device or image that is there already; what the backup does not reach keeps its bytes."""

    outlives_failure = True

    def __init__(self, device: BlockDevice, *, users: list[str] | None = None) -> None:
        """`device` is the target's to close, unless `users` is given: the list of who needs the device."""
        self.device = device
        self._users = users
        if users is not None:
            users.append(BACKUP_USER)

    async def complete(self) -> None:
        await self.device.flush()

    async def discard(self) -> None:
        """Nothing: it is not ours to remove."""

    async def close(self) -> None:
        if self._users is None:
            await self.device.close()
        else:
            self._users.remove(BACKUP_USER)


class RemoteTarget(ExistingTarget):
    """The export at `uri`, of `size` bytes; it may be gone, and be connected to again."""

    def __init__(self, uri: str, size: int, remote: RemoteOptions | None, device: BlockDevice | None) -> None:
        """`device` is connected to it, and this object's to close; None: nobody has connected yet."""
        super().__init__(device or AbsentDevice(uri, size))
        self._uri = uri
        self._remote = remote

    @property
    def is_absent(self) -> bool:
        """Whether there is no connection, nor an attempt at one."""
        return isinstance(self.device, AbsentDevice)

    async def reconnect(self) -> None:
        """Connect anew, whatever the connection is like. Nothing may be in flight.

        What was written and not flushed may be lost.

        Raises:
            NbdBackupError: it cannot be connected to, or is another disk now; `is_absent` holds then.
        """
        before, self.device = self.device, AbsentDevice(self._uri, self.device.size)
        await before.close()
        self.device = await _open_existing(self._uri, self.device.size, self._remote)


def partial_path(path: str) -> str:
    """Where the backup to be called `path` is made."""
    return f"{path}.partial"


class NewFileTarget(Target):
    """A new raw file at `path`."""

    zeroed = True

    def __init__(self, path: str, size: int, *, begun: bool = False) -> None:
        """Create `path`.partial, or open the one that was `begun`; blocks as open(2) does.

        Raises:
            ConflictError: `path`, or `path`.partial, exists. NotFoundError: there is no such directory.
            DeviceError: it can't be created, or opened.
        """
        self.path = path
        self.partial = partial_path(path)
        self._executor = IoExecutor("target", threads_max=1)
        self._named = False
        if begun:
            self.device = FileDevice.open(self.partial)
            return
        if os.path.lexists(path):
            raise ConflictError(f"{path} exists already: choose another target, or write into it with -n")
        self.device = FileDevice.create(self.partial, size)

    async def complete(self) -> None:
        await self.device.flush()
        reach("target.complete.flushed")
        await self._executor.run(self._give_name)
        reach("target.complete.named")

    async def discard(self) -> None:
        await self._executor.run(self._remove)

    async def close(self) -> None:
        await super().close()
        self._executor.shutdown()

    def _give_name(self) -> None:
        try:
            # Not rename: that would replace a file that came into being meanwhile.
            os.link(self.partial, self.path)
        except FileExistsError:
            raise self._name_taken() from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise DeviceError(
                    error.errno or errno.EIO, f"cannot name the backup {self.path}: {error.strerror}"
                ) from error
            # No hard links here.
            if os.path.lexists(self.path):
                raise self._name_taken() from None
            os.rename(self.partial, self.path)
            self._named = True
        else:
            self._named = True
            reach("target.complete.linked")
            os.unlink(self.partial)
        reach("target.complete.unlinked")
        _sync_directory(os.path.dirname(self.path) or ".")

    def _name_taken(self) -> ConflictError:
        return ConflictError(f"{self.path} came into being while its backup was made, and is left as it is")

    def _remove(self) -> None:
        for path in (self.path, self.partial) if self._named else (self.partial,):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
        reach("target.discard.removed")


async def open_target(
    path: str,
    size: int,
    *,
    existing: bool,
    remote: RemoteOptions | None = None,
    make: Callable[[str, int], NewFileTarget] = NewFileTarget,
) -> Target:
    """Open the target of a backup of `size` bytes: a new file, or with `existing` what is there.

    An NBD URI always stands for what is there; it is used as `remote` says. `make` makes a new file.

    Raises:
        UsageError: an existing target has another size. Others: see `NewFileTarget` and `open_device`.
    """
    if not existing and not is_remote(path):
        return make(path, size)
    device = await _open_existing(path, size, remote)
    return RemoteTarget(path, size, remote, device) if is_remote(path) else ExistingTarget(device)


async def _open_existing(path: str, size: int, remote: RemoteOptions | None) -> BlockDevice:
    device = await open_device(path, "raw", remote=remote)
    if device.size != size:
        await device.close()
        raise UsageError(
            f"Source and target image have different sizes: {size} and {device.size} bytes ({path})"
        )
    return device


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
