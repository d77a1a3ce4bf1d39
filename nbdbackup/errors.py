"""Every error of the package, one tree; a leaf tells the handler what to do.

    NbdBackupError
    |-- UsageError           the caller asked for something malformed: say so, change nothing
    |-- NotFoundError        no such server, node, snapshot or job
    |-- ConflictError        the thing exists, is busy or is locked: say by whom
    |-- ProtocolError        a peer broke its protocol: end that peer, nobody else
    |-- CopyError            a block copy failed; `side` says whether to blame source or target
    `-- DeviceError          (also an OSError) a device operation failed with `errno`
        |-- SnapshotError    the snapshot cannot answer for this range any more; the text has the cause
        `-- UnreachableError the server behind the device is gone; it did not refuse, and may come back

The message is one line for a person: what failed, on what, and what to do.
Devices raise OSError (DeviceError where they have more to say than the kernel).
"""

import os
from enum import Enum


class NbdBackupError(Exception):
    """Root of the tree. `str(error)` is one line, ready to be shown."""


class UsageError(NbdBackupError):
    """An argument is malformed or contradicts another one."""


class NotFoundError(NbdBackupError):
    """There is no server, node, snapshot or job of that name."""


class ConflictError(NbdBackupError):
    """Something is in the way: it exists already, is in use, or is locked."""


class ProtocolError(NbdBackupError):
    """A peer broke the protocol so that its connection cannot go on."""


class DeviceError(NbdBackupError, OSError):
    """A device operation failed. `errno` is a Linux errno, `strerror` the whole line.

    `offset` is the first byte of the device that it failed at, None if nobody knows.
    """

    def __init__(self, errno: int, message: str, offset: int | None = None) -> None:
        OSError.__init__(self, errno, message)
        self.offset = offset

    def __str__(self) -> str:
        return self.strerror or os.strerror(self.errno or 0)


class SnapshotError(DeviceError):
    """The snapshot has no bytes for this range: it broke, or the range was discarded."""


class UnreachableError(DeviceError):
    """The server behind the device is gone, and did not come back in time. It has refused nothing."""


class Side(Enum):
    """Which end of a copy failed."""

    SOURCE = "source"
    TARGET = "target"


class CopyError(NbdBackupError):
    """Copying `[offset, offset + length)` (bytes) failed with `cause` on `side`."""

    def __init__(self, side: Side, offset: int, length: int, cause: OSError) -> None:
        self.side = side
        self.offset = offset
        self.length = length
        self.cause = cause
        verb = "reading the source" if side is Side.SOURCE else "writing the target"
        reason = cause.strerror or str(cause)
        super().__init__(f"{verb} failed at offset {offset}, {length} bytes: {reason}")

    @property
    def errno(self) -> int:
        """The Linux errno of the failure."""
        return self.cause.errno or 5
