"""Files of no known owner: what is left of crashes, and of sources that are not served any more.

    partial    TARGET.partial of a backup that a server of this state directory began and did not end
    bitmap     persistent bitmaps of a node that there is not: it may be served again one day
    scratch    a scratch file that has its name still, in the state directory or beside a partial file

Nothing of it is removed unless a user says so.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from nbdbackup.bitmap.file import failed
from nbdbackup.daemon.bitmaps import Bitmaps
from nbdbackup.daemon.partials import PartialFiles
from nbdbackup.errors import NotFoundError
from nbdbackup.fleece.scratch import NAMED_PREFIX
from nbdbackup.monitor.services_state import LeftoverInfo

BLOCK_BYTES = 512
"""The unit of `st_blocks`."""


class Leftovers:
    """Implements the monitor's `StateService`."""

    def __init__(self, scratch_directory: Path, partials: PartialFiles, bitmaps: Bitmaps) -> None:
        self._scratch_directory = scratch_directory
        self._partials = partials
        self._bitmaps = bitmaps

    async def leftovers(self) -> Sequence[LeftoverInfo]:
        """Every leftover."""
        found = [("partial", path, "of a backup that did not end") for path in self._partials.leftovers()]
        if self._bitmaps.store is not None:
            found += [
                ("bitmap", path, f"bitmap '{name}' of node '{node}', which there is not")
                for node, name, path in self._bitmaps.store.at_rest()
            ]
        for directory in (self._scratch_directory, *sorted(self._partials.known_directories())):
            found += [("scratch", path, "of a server that died") for path in _scratch_files(directory)]
        return [LeftoverInfo(kind, str(path), _size(path), reason) for kind, path, reason in found]

    async def clean(self, paths: Sequence[str] | None) -> Sequence[LeftoverInfo]:
        """Remove the leftovers at `paths` (None: all); those that were removed.

        Raises:
            NotFoundError: one of `paths` is no leftover; none was removed.
            DeviceError: one cannot be removed; those before it were.
        """
        found = await self.leftovers()
        if paths is not None:
            unknown = [path for path in paths if path not in {info.path for info in found}]
            if unknown:
                raise NotFoundError(f"{unknown[0]} is no leftover (see nbdbackup state list)")
            found = [info for info in found if info.path in paths]
        for info in found:
            try:
                if info.kind == "bitmap":
                    await self._bitmaps.remove_at_rest(Path(info.path))
                else:
                    os.unlink(info.path)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise failed(error, f"cannot remove {info.path}") from error
        self._partials.leftovers()
        return found


def _scratch_files(directory: Path) -> list[Path]:
    """Those that were to have no name, and whose process is gone."""
    found = []
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    for name in names:
        process, _, rest = name.removeprefix(NAMED_PREFIX).partition("-")
        if name.startswith(NAMED_PREFIX) and rest and not os.path.isdir(f"/proc/{process}"):
            found.append(directory / name)
    return found


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_blocks * BLOCK_BYTES
    except OSError:
        return 0
