"""The state directory: what the daemon keeps on disk, one daemon at a time."""

import errno
import fcntl
import os
from pathlib import Path

from nbdbackup.errors import ConflictError, DeviceError


class StateDirectory:
    """`path`, locked from `open` to `close`; `scratch` is for the snapshots' saved clusters, `snapshots` for
    what else is known of them, `bitmaps` for persistent bitmaps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scratch = path / "scratch"
        self.snapshots = path / "snapshots"
        self.bitmaps = path / "bitmaps"
        self._lock_fd = -1

    def open(self) -> None:
        """Make and lock it.

        Raises:
            ConflictError: another daemon has it. DeviceError: it can't be made or written.
        """
        try:
            self.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DeviceError(
                error.errno or errno.EIO,
                f"cannot use state directory {self.path}: {error.strerror}; name another with --state-dir",
            ) from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock_fd, 32, 0).decode("ascii", "replace").strip()
            self.close()
            raise ConflictError(
                f"state directory {self.path} is used by another nbdbackup (process {owner or 'unknown'}): "
                "name another with --state-dir"
            ) from None
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let go of the lock; the kernel does so too when the process dies."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
