"""Image locks, the way QEMU takes them, so that QEMU and we respect each other.

Each holder of an image says two things with shared OFD locks on single bytes of the
file (the file's contents have nothing to do with it):

    byte 100 + n    I use permission n
    byte 200 + n    nobody else may use permission n

A holder first takes its locks, then looks for one in its way: somebody who forbids what
it uses, or uses what it forbids. Two who start at once may both give up, but never both
go on. OFD locks belong to the open file: they end with its last descriptor, and two
openings in one process conflict like any others.

We use consistent-read, and write unless read-only. Readers forbid resizing, as
qemu-nbd does; a writer also forbids other writers: a second one would change the disk
behind a snapshot's back.
"""

import errno
import fcntl
import os
import struct
from enum import IntEnum
from pathlib import Path

from nbdbackup.errors import ConflictError

USED_BASE = 100
FORBIDDEN_BASE = 200
COMMAND_LINE_CHARACTERS_MAX = 200

# struct flock: l_type, l_whence, l_start, l_len, l_pid, padding
_FLOCK = struct.Struct("@hhqqi0q")
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


class Permission(IntEnum):
    """What can be done with an image; the number is its place in both rows of lock bytes."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


def lock_image(fd: int, path: str, *, writable: bool) -> None:
    """Lock the image open as `fd` until the last descriptor of that open file is closed.

    Does nothing where the file system has no OFD locks.

    Raises:
        ConflictError: somebody has it locked against this use; no lock is held then.
    """
    used = {Permission.CONSISTENT_READ}
    forbidden = {Permission.RESIZE}
    if writable:
        used.add(Permission.WRITE)
        forbidden.add(Permission.WRITE)
    held = [USED_BASE + permission for permission in used]
    held += [FORBIDDEN_BASE + permission for permission in forbidden]
    rivals = [FORBIDDEN_BASE + permission for permission in used]
    rivals += [USED_BASE + permission for permission in forbidden]
    try:
        conflict = not _take(fd, held) or any(_is_locked(fd, byte) for byte in rivals)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return
        raise
    if conflict:
        _release(fd, held)
        raise ConflictError(_conflict_message(fd, path, writable))


def _take(fd: int, places: list[int]) -> bool:
    """Lock single bytes, shared; False if somebody holds one of them exclusively."""
    try:
        for place in places:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, place))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _release(fd: int, places: list[int]) -> None:
    for place in places:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, place))


def _is_locked(fd: int, place: int) -> bool:
    """Whether somebody else holds a lock on the byte, shared or not."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, place))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _flock(kind: int, place: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)


def _conflict_message(fd: int, path: str, writable: bool) -> str:
    holder = _find_holder(fd)
    if holder == os.getpid():
        return f"{path} is already open in this server, and cannot be used twice at once: leave one out"
    who = "another process (another nbdbackup, or QEMU?)"
    if holder is not None:
        who = f"{_process_name(holder)} (process {holder}{_command_line(holder)})"
    hint = ", or open the image read-only (--read-only)" if writable else ""
    return f"{path} is locked by {who}: stop that one first{hint}"


def _find_holder(fd: int) -> int | None:
    """The process with an OFD lock on the file, of those that we may look into.

    The kernel names no process for an OFD lock, but shows it beside each descriptor.
    """
    status = os.fstat(fd)
    file_id = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for process in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        directory = Path(f"/proc/{process}/fdinfo")
        for descriptor in _names_in(directory):
            if process == os.getpid() and descriptor == str(fd):
                continue
            if _shows_lock(directory / descriptor, file_id):
                return process
    return None


def _names_in(directory: Path) -> list[str]:
    """What is in it; nothing if it may not be looked into, or its process has ended."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _shows_lock(info: Path, file_id: str) -> bool:
    try:
        text = info.read_text()
    except OSError:
        return False
    return any("OFDLCK" in line and file_id in line.split() for line in text.splitlines())


def _command_line(process: int) -> str:
    """`: COMMAND LINE` of a process, cut short, if we may see it."""
    content = _content(Path(f"/proc/{process}/cmdline"))
    words = content.replace(b"\0", b" ").decode(errors="replace").strip()
    line = "".join(char if char.isprintable() else "?" for char in words[:COMMAND_LINE_CHARACTERS_MAX])
    return f": {line}{'...' if len(words) > len(line) else ''}" if line else ""


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _process_name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return "another process"
