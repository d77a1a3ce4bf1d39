"""The partial files of backups that this state directory has made, so that a later server knows them.

Each is a symbolic link in a directory of its own, to TARGET.partial: made before the file is, so that no
crash can leave a file that nobody knows, and named with the file's identity once that is known, so that a
file which somebody else makes there later is not taken for ours. What is gone is forgotten when somebody
looks.
"""

import os
import stat
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from nbdbackup.bitmap.file import failed
from nbdbackup.crash_points import reach
from nbdbackup.job.target import NewFileTarget, partial_path


class PartialFiles:
    """The records in `directory`. Every method blocks for some file operations."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._targets: WeakSet[NewFileTarget] = WeakSet()
        """Those of backups that somebody may still be at."""
        self.owners: list[Callable[[], Iterable[str]]] = []
        """Each gives the paths of partial files that are nobody's leftovers."""

    def make(self, path: str, size: int) -> NewFileTarget:
        """A new target at `path`, whose partial file is known from before it is there.

        Raises:
            DeviceError: it cannot be recorded. Others: see `NewFileTarget`.
        """
        self.leftovers()
        try:
            record = self._record(partial_path(path))
        except OSError as error:
            raise failed(error, f"cannot record the backup {path} in {self._directory}") from error
        reach("partial.record.made")
        try:
            target = NewFileTarget(path, size)
        except BaseException:
            _remove(record)
            raise
        self._targets.add(target)
        reach("partial.file.made")
        with suppress(OSError):
            status = os.stat(target.partial)
            os.rename(record, f"{record}.{status.st_dev:x}.{status.st_ino:x}")
        reach("partial.record.named")
        return target

    def take_over(self, path: str, size: int) -> NewFileTarget:
        """The target at `path` that an earlier process began.

        Raises:
            NbdBackupError: see `NewFileTarget`.
        """
        target = NewFileTarget(path, size, begun=True)
        self._targets.add(target)
        return target

    def _record(self, partial: str) -> Path:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        record = self._directory / uuid.uuid4().hex
        os.symlink(partial, record)
        return record

    def leftovers(self) -> list[Path]:
        """The partial files that are there still, and that no backup of this process is at."""
        owned = {target.partial for target in self._targets}
        for owner in self.owners:
            owned.update(owner())
        found = []
        for record in _entries(self._directory):
            if not record.is_symlink():
                continue
            partial = os.readlink(record)
            if partial in owned and os.path.lexists(partial):
                continue
            if _is_the_one(record.name, partial):
                found.append(Path(partial))
            else:
                _remove(record)
        return sorted(set(found))

    def known_directories(self) -> set[Path]:
        """Where recorded files are."""
        links = [record for record in _entries(self._directory) if record.is_symlink()]
        return {Path(os.readlink(link)).parent for link in links}


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def _is_the_one(record: str, partial: str) -> bool:
    """Whether the file at `partial` is the one that was made when `record` was."""
    try:
        status = os.lstat(partial)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # Nobody can tell: do not forget it.
    if not stat.S_ISREG(status.st_mode):
        return False
    _, _, identity = record.partition(".")
    if not identity:
        # The server died in the moment between the two: nothing was written yet.
        return status.st_blocks == 0
    return identity == f"{status.st_dev:x}.{status.st_ino:x}"


def _remove(record: Path) -> None:
    with suppress(OSError):
        record.unlink()
