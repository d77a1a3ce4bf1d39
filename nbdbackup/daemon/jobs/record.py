"""What was asked for of a job that outlives the daemon: a small file of JSON.

    {"version": 1, "checksum": "SHA-256 of the job as msgspec writes it", "job": {...}}

Only the version keeps its place in other versions.
"""

import hashlib
import os
from pathlib import Path

import msgspec

from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.backup import BackupOptions
from nbdbackup.job.error_policy import ErrorPolicies, OnError
from nbdbackup.job.sync import BitmapSyncMode, SyncMode
from nbdbackup.job.target import partial_path

VERSION = 1
FILE_BYTES_MAX = 1 << 16


class RecordError(Exception):
    """A file is no record of a job; the text says why."""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """One job of `node`; sizes are bytes, the speed is bytes a second."""

    uuid: str
    """Of the sidecar too, and of the bitmap's holder; hexadecimal."""
    node: str
    job_id: str
    target: str
    """An absolute path or a URI."""
    existing: bool
    is_remote: bool
    is_direct: bool
    """Old clusters go straight to the target."""
    target_device: int = 0
    target_inode: int = 0
    """Of the file that is written to."""
    target_mtime_ns: int = 0
    target_ctime_ns: int = 0
    """At the clean stop."""
    sync: SyncMode
    bitmap: str | None
    bitmap_mode: BitmapSyncMode | None
    speed: int
    workers: int
    chunk_bytes_max: int
    cluster_bytes: int
    use_copy_range: bool
    on_source_error: OnError
    on_target_error: OnError
    on_cbw_error: OnCbwError
    cbw_timeout_s: float
    auto_finalize: bool
    auto_dismiss: bool

    @property
    def export_name(self) -> str:
        """What the sidecar calls it: `NODE@JOB`."""
        return f"{self.node}@{self.job_id}"

    @property
    def written_path(self) -> str:
        """The file that is written to, of a target that is none of another server."""
        return self.target if self.existing else partial_path(self.target)

    def options(self) -> BackupOptions:
        """For the job that goes on."""
        return BackupOptions(
            sync=self.sync,
            speed=self.speed,
            workers=self.workers,
            chunk_bytes_max=self.chunk_bytes_max,
            cluster_bytes=self.cluster_bytes,
            use_copy_range=self.use_copy_range,
            policies=ErrorPolicies(self.on_source_error, self.on_target_error),
            on_cbw_error=self.on_cbw_error,
            cbw_timeout_s=self.cbw_timeout_s,
            auto_finalize=self.auto_finalize,
            auto_dismiss=self.auto_dismiss,
        )

    def written_to(self, status: os.stat_result, *, is_left: bool = False) -> "JobRecord":
        """The same, of a job that writes to the file that `status` is of, and `is_left` at rest."""
        return msgspec.structs.replace(
            self,
            target_device=status.st_dev,
            target_inode=status.st_ino,
            target_mtime_ns=status.st_mtime_ns if is_left else 0,
            target_ctime_ns=status.st_ctime_ns if is_left else 0,
        )

    def is_written(self, status: os.stat_result) -> bool:
        """Whether `status` is of the file that is written to."""
        return (status.st_dev, status.st_ino) == (self.target_device, self.target_inode)

    def is_complete(self) -> bool:
        """Whether the backup has its name already."""
        if self.existing or self.is_remote:
            return False
        try:
            return self.is_written(os.lstat(self.target))
        except OSError:
            return False

    def remove_partial(self) -> None:
        """Remove the file of a backup that comes to nothing, if what has its name is surely that.

        Raises:
            OSError: it cannot be removed.
        """
        if self.existing or self.is_remote:
            return
        try:
            if self.is_written(os.lstat(self.written_path)):
                os.unlink(self.written_path)
        except FileNotFoundError:
            return


def write_record(path: Path, record: JobRecord) -> None:
    """Let the file at `path` hold `record`, as a whole or not at all; its bytes are on disk on return.

    Raises:
        OSError: it cannot be written; nothing has changed.
        UnicodeEncodeError: a name cannot be stored.
    """
    new = path.with_name(f"{path.name}.new")
    document = {"version": VERSION, "checksum": _checksum(record), "job": record}
    try:
        with new.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(document)))
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def read_record(path: Path) -> JobRecord:
    """The record in the file at `path`.

    Raises:
        RecordError: it cannot be read, is damaged, or of another version.
    """
    try:
        with path.open("rb") as file:
            document = msgspec.json.decode(file.read(FILE_BYTES_MAX))
    except OSError as error:
        raise RecordError(error.strerror or str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"it is damaged ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("version"), int):
        raise RecordError("it is damaged, or no job of nbdbackup")
    if document["version"] != VERSION:
        raise RecordError(
            f"it is of version {document['version']}, and this nbdbackup knows version {VERSION} alone"
        )
    try:
        record = msgspec.convert(document.get("job"), JobRecord)
    except msgspec.ValidationError as error:
        raise RecordError(f"it is damaged ({error})") from error
    if document.get("checksum") != _checksum(record):
        raise RecordError("it is damaged")
    return record


def _checksum(record: JobRecord) -> str:
    return hashlib.sha256(msgspec.json.encode(record)).hexdigest()
