"""Files of no known owner: what is left of crashes, and of sources that are not served any more.

    partial    TARGET.partial of a backup that a server of this state directory began and did not end
    scratch    a scratch file that has its name still, in the state directory or beside a partial file; or
               one of a stored snapshot whose sidecar is lost or cannot be read
    bitmap     persistent bitmaps of a node that there is not: it may be served again one day
    snapshot   a stored snapshot of such a node
    job        an interrupted backup of such a node

Nothing of it is removed unless a user says so. What somebody may still want is *kept* unless it is named, or
all is asked for: bitmaps, snapshots and jobs, scratch whose sidecar may be of a newer version, and partial
files while there are jobs that may be.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from nbdbackup.bitmap.file import failed
from nbdbackup.daemon.bitmaps import Bitmaps
from nbdbackup.daemon.jobs.store import JobStore
from nbdbackup.daemon.partials import PartialFiles
from nbdbackup.daemon.stored_snapshots import StoredSnapshots
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError
from nbdbackup.fleece.scratch import NAMED_PREFIX
from nbdbackup.fleece.stored_scratch import scratch_bytes_used
from nbdbackup.monitor.services_state import LeftoverInfo

BLOCK_BYTES = 512
"""The unit of `st_blocks`."""


class _Found(msgspec.Struct, frozen=True):
    """`export` is the snapshot's, if it is one, or what a job's sidecar is called."""

    kind: str
    path: Path
    reason: str
    kept: bool = False
    export: str = ""
    elsewhere_bytes: int = 0
    """What belongs to it takes up as much, in other files."""


class Leftovers:
    """Implements the monitor's `StateService`."""

    def __init__(
        self,
        scratch_directory: Path,
        partials: PartialFiles,
        bitmaps: Bitmaps,
        snapshots: StoredSnapshots | None = None,
        jobs: JobStore | None = None,
    ) -> None:
        self._scratch_directory = scratch_directory
        self._partials = partials
        self._bitmaps = bitmaps
        self._snapshots = snapshots
        self._jobs = jobs

    async def leftovers(self) -> Sequence[LeftoverInfo]:
        """Every leftover."""
        return [_info(found) for found in await self._look()]

    async def clean(self, paths: Sequence[str] | None, *, everything: bool = False) -> Sequence[LeftoverInfo]:
        """Remove the leftovers at `paths`; None: those that are not kept, or `everything`. What was removed.

        Raises:
            ConflictError: one of `paths` is no leftover; none was removed.
            DeviceError: one cannot be removed; those before it were.
        """
        found = await self._look()
        if paths is not None:
            unknown = [path for path in paths if path not in {str(each.path) for each in found}]
            if unknown:
                raise ConflictError(f"{unknown[0]} is no leftover (see nbdbackup state list)")
        removed = []
        for each in found:
            if everything or (not each.kept if paths is None else str(each.path) in paths):
                removed.append(_info(each))
                await self._remove(each)
        self._partials.leftovers()
        return removed

    async def _look(self) -> list[_Found]:
        has_strange_jobs = self._jobs is not None and self._jobs.has_strange
        found = [
            _Found("partial", path, "of a backup that did not end", kept=has_strange_jobs)
            for path in self._partials.leftovers()
        ]
        if self._bitmaps.store is not None:
            found += [
                _Found("bitmap", path, f"bitmap '{name}' of node '{node}', which there is not", kept=True)
                for node, name, path in self._bitmaps.store.at_rest()
            ]
        for directory in (self._scratch_directory, *sorted(self._partials.known_directories())):
            found += [_Found("scratch", path, "of a server that died") for path in _scratch_files(directory)]
        return [*found, *self._look_at_jobs(), *await self._look_at_snapshots()]

    def _look_at_jobs(self) -> list[_Found]:
        records = self._jobs.records_at_rest() if self._jobs is not None else ()
        return [
            _Found(
                "job",
                path,
                f"interrupted backup '{record.job_id}' of node '{record.node}', which there is not",
                kept=True,
                export=record.export_name,
                elsewhere_bytes=used_bytes,
            )
            for record, path, used_bytes in records
            if self._bitmaps.graph.find(record.node) is None
        ]

    async def _look_at_snapshots(self) -> list[_Found]:
        if self._snapshots is None:
            return []
        found = []
        for at_rest in self._snapshots.at_rest():
            node = at_rest.export_name.rpartition("@")[0] if at_rest.header is None else at_rest.header.node
            if self._bitmaps.graph.find(node) is None:
                reason = f"snapshot '{at_rest.export_name}' of node '{node}', which there is not"
                if at_rest.cause:
                    reason += f"; broken: {at_rest.cause}"
                used = 0 if at_rest.header is None else scratch_bytes_used(at_rest.header)
                found.append(_Found("snapshot", at_rest.path, reason, True, at_rest.export_name, used))
        sidecars = () if self._jobs is None else (self._jobs.directory,)
        for lost in await self._snapshots.lost_scratch(self._scratch_directory, sidecars):
            reason = "of a snapshot whose sidecar is gone"
            if lost.unreadable is not None:
                reason = f"of a snapshot whose sidecar {lost.unreadable} cannot be read"
            found.append(_Found("scratch", lost.path, reason, kept=lost.unreadable is not None))
        return found

    async def _remove(self, found: _Found) -> None:
        try:
            if found.kind == "bitmap":
                await self._bitmaps.remove_at_rest(found.path)
            elif found.kind == "snapshot":
                assert self._snapshots is not None
                await self._snapshots.remove_at_rest(found.export)
            elif found.kind == "job":
                assert self._jobs is not None
                self._jobs.remove_at_rest(found.export)
            else:
                os.unlink(found.path)
        except (FileNotFoundError, NotFoundError):
            pass
        except DeviceError:
            raise
        except OSError as error:
            raise failed(error, f"cannot remove {found.path}") from error


def _info(found: _Found) -> LeftoverInfo:
    size = _size(found.path) + found.elsewhere_bytes
    return LeftoverInfo(found.kind, str(found.path), size, found.reason, found.kept)


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
