"""The state directory: what the daemon keeps on disk, one daemon at a time.

lock        the daemon that uses it: its process id and its command line
version     of all that is in here; another version's is not touched
bitmaps/    persistent bitmaps and the chain of checkpoints
jobs/       backup jobs that outlive the daemon, and their maps
partials/   which partial files of backups were made
scratch/    clusters that snapshots have saved
snapshots/  what else is known of the snapshots that outlive the daemon
"""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from nbdbackup.crash_points import reach
from nbdbackup.errors import ConflictError, DeviceError

VERSION = 1
OWNER_BYTES_MAX = 300


class StateDirectory:
    """`path`, locked from `open` to `close`."""

    def __init__(self, path: Path, if_used: str = "name another with --state-dir") -> None:
        """`if_used` is what to do if another daemon has it, for the error's text."""
        self.path = path
        self._if_used = if_used
        self.scratch = path / "scratch"
        self.snapshots = path / "snapshots"
        self.bitmaps = path / "bitmaps"
        self.jobs = path / "jobs"
        self.partials = path / "partials"
        self._lock_fd = -1

    def open(self) -> None:
        """Make and lock it.

        Raises:
            ConflictError: another daemon has it. DeviceError: it cannot be made or written, or is of another
            version.
        """
        try:
            self._open()
        except OSError as error:
            self.close()
            if isinstance(error, DeviceError):
                raise
            hint = "name another with --state-dir"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = f"make room there, or {hint}"
            raise DeviceError(
                error.errno or errno.EIO, f"cannot use state directory {self.path}: {error.strerror}; {hint}"
            ) from error
        except ConflictError:
            self.close()
            raise

    def _open(self) -> None:
        self.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock_fd, OWNER_BYTES_MAX, 0).decode("utf8", "replace").strip()
            process, _, command = owner.partition("\n")
            raise ConflictError(
                f"state directory {self.path} is used by another nbdbackup "
                f"(process {process or 'unknown'}{': ' if command else ''}{command}): "
                f"{self._if_used}"
            ) from None
        self._check_version()
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n{_command_line()}\n".encode(errors="replace"), 0)

    def _check_version(self) -> None:
        path = self.path / "version"
        try:
            found = path.read_bytes()[:64].decode(errors="replace").strip()
        except FileNotFoundError:
            self._write_version(path)
            return
        if found != str(VERSION):
            raise DeviceError(
                errno.EINVAL,
                f"cannot use state directory {self.path}: it is of version {found!r}, and this nbdbackup "
                f"knows version {VERSION}; use the nbdbackup that made it, or name another with --state-dir",
            )

    def _write_version(self, path: Path) -> None:
        new = path.with_name("version.new")
        try:
            with new.open("w") as file:
                file.write(f"{VERSION}\n")
                file.flush()
                os.fsync(file.fileno())
            reach("state.version.written")
            new.rename(path)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise

    def close(self) -> None:
        """Let go of the lock; the kernel does so too when the process dies."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def is_state_directory(path: Path) -> bool:
    """Whether a daemon has made `path` one."""
    return (path / "version").exists()


def _command_line() -> str:
    """This process's, in one line of no more than `OWNER_BYTES_MAX`."""
    words = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
    line = "".join(char if char.isprintable() else "?" for char in " ".join(words).strip())
    return line.encode()[: OWNER_BYTES_MAX - 20].decode(errors="ignore")
