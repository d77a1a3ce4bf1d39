"""JobStore: the jobs that outlive the daemon, in one directory; for each a record and a sidecar.

    start     TARGET.partial is made; the record, which has what was asked for; the sidecar with the maps, not
              LIVE, and scratch; LIVE at the instant, while the node is drained
    success   TARGET has its name; the sidecar is not LIVE; scratch, sidecar and record are removed
    failure   the sidecar is not LIVE; TARGET.partial, scratch, sidecar and record are removed
    stop      the filter is taken out; target, scratch and maps are synced; not IN_USE, with the source as it
              is then

The record is the first to come and the last to go. So whatever a crash interrupts, what is found is a job
that can go on; or a record without a LIVE sidecar, of a job that did not begin or is over: what is left of it
is removed when the directory is opened; or a job whose TARGET has its name: that was complete.

The sidecar is a snapshot's (`fleece.snapshot_format`), called NODE@JOB. Of a direct job its "scratch" is the
target. A record or a sidecar that cannot be understood is named in the log, and left as it is with all that
belongs to it.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import msgspec

from nbdbackup.bitmap.file import failed
from nbdbackup.bitmap.identity import SourceIdentity
from nbdbackup.crash_points import reach
from nbdbackup.daemon.jobs.record import JobRecord, RecordError, read_record, write_record
from nbdbackup.errors import ConflictError
from nbdbackup.fleece.snapshot_format import SnapshotFlags, SnapshotHeader
from nbdbackup.fleece.snapshot_store import (
    NewSnapshot,
    SnapshotAtRest,
    SnapshotStore,
    StoredSnapshot,
    stem_of,
)
from nbdbackup.fleece.stored_scratch import scratch_bytes_used

logger = logging.getLogger(__name__)

RECORD_SUFFIX = ".job"
BLOCK_BYTES = 512
"""The unit of `st_blocks`."""


class LostJob(msgspec.Struct, frozen=True):
    """A stored job whose point in time is lost, and why."""

    record: JobRecord
    reason: str


class JobStore(SnapshotStore):
    """The jobs in a directory that this process alone uses. Every method blocks as file I/O does."""

    what = "backup"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._records: dict[str, JobRecord] = {}
        """Of all that can be understood, by NODE@JOB."""
        self._strange: set[str] = set()
        """NODE@JOB of those that cannot."""

    def open(self) -> None:
        """As `SnapshotStore.open`."""
        try:
            paths = sorted(self.directory.glob(f"*{RECORD_SUFFIX}"))
        except OSError as error:
            raise failed(error, f"cannot use directory {self.directory} for jobs") from error
        for path in paths:
            self._note_record(path)
        super().open()
        for path in self.directory.glob(f"*{RECORD_SUFFIX}.new"):
            path.unlink(missing_ok=True)
        for export_name, record in list(self._records.items()):
            if export_name not in self.at_rest and export_name not in self._strange:
                self._clear_record_away(record)

    def _note_record(self, path: Path) -> None:
        try:
            record = read_record(path)
            if path.stem != stem_of(record.node, record.job_id):
                raise RecordError(f"its name should be {stem_of(record.node, record.job_id)}{RECORD_SUFFIX}")
        except RecordError as error:
            self._strange.add(unquote(path.stem))
            logger.error("cannot use job file %s: %s; it is left as it is", path, error)
        else:
            self._records[record.export_name] = record

    def _note(self, path: Path) -> None:
        export_name = unquote(path.stem)
        if export_name in self._strange:
            return
        if self._find_record(path) is None:
            self._strange.add(export_name)
            logger.error("%s has no job file beside it: it is left as it is", path)
            return
        super()._note(path)

    def _tell(self, found: SnapshotAtRest) -> None:
        """Why a job is lost is told when its node is there."""
        if found.header is None:
            self._strange.add(found.export_name)
            logger.error("%s; it is left as it is", found.cause)

    def _find_record(self, sidecar: Path) -> JobRecord | None:
        return next(
            (r for r in self._records.values() if stem_of(r.node, r.job_id) == sidecar.stem),
            None,
        )

    def _clear_record_away(self, record: JobRecord) -> None:
        try:
            record.remove_partial()
            self._forget(record)
            logger.info("removed what a crash had left of backup %s of %s", record.job_id, record.node)
        except OSError as error:
            logger.error(
                "cannot remove what a crash left of backup %s of %s: %s",
                record.job_id,
                record.node,
                error.strerror,
            )

    def noun_of_scratch(self, header: SnapshotHeader) -> str:
        record = self._records.get(header.export_name)
        return "target" if record is not None and record.is_direct else "scratch"

    # Jobs at rest.

    def waits(self, job_id: str) -> bool:
        """Whether a job of that id is at rest, or may be."""
        names = [*self.at_rest, *self._strange]
        return any(name.rpartition("@")[2] == job_id for name in names)

    @property
    def has_strange(self) -> bool:
        """Whether there are files that cannot be understood: nobody knows what belongs to them."""
        return bool(self._strange)

    def records_at_rest(self) -> list[tuple[JobRecord, Path, int]]:
        """Every job that can be understood, its file, and how many bytes what belongs to it takes."""
        found = []
        for name, record in sorted(self._records.items()):
            header = self.at_rest[name].header if name in self.at_rest else None
            if header is not None:
                used = scratch_bytes_used(header)
                if not record.is_direct and not record.is_remote and not record.existing:
                    used += _allocated(record.written_path)
                found.append((record, self._path(record), used))
        return found

    def partials_at_rest(self) -> Iterator[str]:
        """The unfinished files of jobs that are at rest."""
        for export_name, record in self._records.items():
            if export_name in self.at_rest and not record.is_remote and not record.existing:
                yield record.written_path

    def of_node(self, node: str) -> list[JobRecord]:
        """The jobs of `node` at rest, the oldest first."""
        found = [
            (header.created, record)
            for name, record in self._records.items()
            if record.node == node
            and name in self.at_rest
            and (header := self.at_rest[name].header) is not None
        ]
        return [record for _, record in sorted(found, key=lambda pair: pair[0])]

    def take_job(self, record: JobRecord, identity: SourceIdentity) -> StoredSnapshot | LostJob:
        """Let a job at rest be in use; its source is as `identity` says. A lost one stays at rest.

        Raises:
            DeviceError: its sidecar cannot be read or written; it is as it was.
        """
        was_in_use = self._was_in_use(record)
        taken = self.take(record.export_name, identity)
        if isinstance(taken, SnapshotAtRest):
            return LostJob(record, taken.cause)
        if taken.header.uuid.hex() != record.uuid:
            reason = f"{taken.file.path} is of another job"
        elif record.is_remote or record.is_direct:
            return taken  # such a target is checked when it is reached, or was as scratch
        else:
            reason = _target_doubt(record, identity.size, times_count=not was_in_use)
        if not reason:
            return taken
        self.retire(taken)
        broken = self._break(taken.file, reason)
        taken.close()
        return LostJob(record, broken.cause)

    def _was_in_use(self, record: JobRecord) -> bool:
        header = self.at_rest[record.export_name].header
        return header is None or SnapshotFlags.IN_USE in header.flags

    def remove_at_rest(self, export_name: str) -> None:
        """Remove all of a job at rest that can be removed without harm.

        Raises:
            OSError: something cannot be removed; that is tried again when the directory is opened.
        """
        super().remove_at_rest(export_name)
        record = self._records[export_name]
        record.remove_partial()
        self._forget(record)

    # Jobs in use.

    def create_job(self, record: JobRecord, new: NewSnapshot, identity: SourceIdentity) -> StoredSnapshot:
        """Put what is needed on disk; it is a job when it goes live.

        Raises:
            ConflictError: there are such files.
            DeviceError, UsageError: they cannot be made; nothing is left.
        """
        path = self._path(record)
        if os.path.lexists(path):
            raise ConflictError(f"job file {path} exists already: move it away")
        try:
            write_record(path, record)
        except (OSError, UnicodeEncodeError, msgspec.MsgspecError) as error:
            reason = error if isinstance(error, OSError) else OSError(0, str(error))
            raise failed(reason, f"cannot write job file {path}") from error
        reach("job.start.recorded")
        try:
            stored = self.create(new, identity)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
        self._records[record.export_name] = record
        self.sync_directory()
        reach("job.start.made")
        return stored

    def remove_job(self, record: JobRecord, stored: StoredSnapshot) -> None:
        """Remove the files of a job that was withdrawn.

        Raises:
            OSError: they cannot be removed; that is tried again when the directory is opened.
        """
        stored.remove()
        reach("job.remove.sidecar")
        self._forget(record)
        self.sync_directory()

    def release_job(self, record: JobRecord, stored: StoredSnapshot, identity: SourceIdentity) -> None:
        """Save a job for a later process.

        Raises:
            OSError: it could not be saved. It is good as after a crash.
        """
        if not record.is_remote and not record.is_direct:
            record = record.written_to(os.stat(record.written_path), is_left=True)
            write_record(self._path(record), record)
            self._records[record.export_name] = record
            reach("job.leave.recorded")
        self.release(stored, identity)
        self.sync_directory()

    def _forget(self, record: JobRecord) -> None:
        self._path(record).unlink(missing_ok=True)
        self._records.pop(record.export_name, None)

    def _path(self, record: JobRecord) -> Path:
        return self.directory / f"{stem_of(record.node, record.job_id)}{RECORD_SUFFIX}"


def _allocated(path: str) -> int:
    try:
        return os.stat(path).st_blocks * BLOCK_BYTES
    except OSError:
        return 0


def _target_doubt(record: JobRecord, size: int, *, times_count: bool) -> str:
    """Why the file that a fleecing job writes to is not what it was; "" if nothing is seen."""
    path = record.written_path
    try:
        status = os.stat(path)
    except OSError as error:
        return f"its target {path} cannot be opened: {error.strerror}"
    if not record.is_written(status):
        return f"its target {path} is another file"
    if status.st_size not in (size, 0):
        return f"its target {path} was {size} bytes long, and is {status.st_size}"
    if times_count and (status.st_mtime_ns, status.st_ctime_ns) != (
        record.target_mtime_ns,
        record.target_ctime_ns,
    ):
        return f"its target {path} was changed while no server used it"
    return ""
