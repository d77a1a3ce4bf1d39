"""The checkpoint chains of all nodes, in one file of the directory that their bitmaps are in.

    {"version": 1, "sha256": "...",
     "checkpoints": [{"node", "name", "uuid", "parent", "created", "state"}, ...]}

The oldest of each node comes first; `uuid` is also that of the checkpoint's bitmap. The file is replaced as a
whole, so a crash leaves the old one or the new one, and `state` says what a crash would interrupt:

    making     the bitmap is about to begin; the checkpoint before still has to know what it knows
    made       it is a checkpoint
    removed    it was deleted, and its bitmap has yet to go
"""

import errno
import hashlib
import os
from contextlib import suppress
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from uuid import UUID

import msgspec

from nbdbackup.bitmap.file import failed
from nbdbackup.bitmap.store import NEW_SUFFIX
from nbdbackup.crash_points import reach
from nbdbackup.errors import DeviceError

FILE_NAME = "checkpoints.json"
VERSION = 1
FILE_BYTES_MAX = 64 << 20


class State(StrEnum):
    """How far a checkpoint is."""

    MAKING = "making"
    MADE = "made"
    REMOVED = "removed"


class ChainRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One checkpoint of one node. `parent` is the uuid of the one before it; `created` is in UTC."""

    node: str
    name: str
    uuid: UUID
    parent: UUID | None
    created: datetime
    state: State


class _Envelope(msgspec.Struct, frozen=True):
    version: int
    sha256: str
    checkpoints: msgspec.Raw


class _Version(msgspec.Struct, frozen=True):
    version: int


class ChainFile:
    """The file in `directory`. Every method blocks as file operations do."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self._new = directory / f"{FILE_NAME}{NEW_SUFFIX}"

    def read(self) -> list[ChainRecord]:
        """What is in it; nothing if there is none.

        Raises:
            DeviceError: it cannot be read, is damaged or of another version. It is left as it is.
        """
        try:
            with self.path.open("rb") as file:
                data = file.read(FILE_BYTES_MAX)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise failed(error, f"cannot read checkpoint file {self.path}") from error
        try:
            return _parse(data)
        except (ValueError, OverflowError) as error:
            raise DeviceError(
                errno.EIO,
                f"cannot use checkpoint file {self.path}: {error}; move it away together with the bitmap "
                "files of its checkpoints, and back up in full",
            ) from error

    def write_new(self, records: list[ChainRecord]) -> None:
        """Put `records` beside it, on disk, for `replace`.

        Raises:
            DeviceError: there is no room, or it cannot be written.
        """
        try:
            with self._new.open("wb") as file:
                file.write(_build(records))
                file.flush()
                os.fsync(file.fileno())
                reach("checkpoint.file.written")
        except OSError as error:
            with suppress(OSError):
                self._new.unlink()
            raise DeviceError(
                error.errno or errno.EIO, f"cannot write checkpoint file {self._new}: {error.strerror}"
            ) from error

    def replace(self) -> None:
        """What was written last is the file from now on; on disk after its directory was synced.

        Raises:
            DeviceError: it cannot be renamed; the file is as it was.
        """
        try:
            os.replace(self._new, self.path)
        except OSError as error:
            raise failed(error, f"cannot write checkpoint file {self.path}") from error
        reach("checkpoint.file.replaced")


def _build(records: list[ChainRecord]) -> bytes:
    body = msgspec.json.encode(records)
    return (
        msgspec.json.encode(_Envelope(VERSION, hashlib.sha256(body).hexdigest(), msgspec.Raw(body))) + b"\n"
    )


def _parse(data: bytes) -> list[ChainRecord]:
    version = msgspec.json.decode(data, type=_Version).version
    if version != VERSION:
        raise ValueError(f"it is of version {version}, and this nbdbackup knows version {VERSION} alone")
    envelope = msgspec.json.decode(data, type=_Envelope)
    if hashlib.sha256(envelope.checkpoints).hexdigest() != envelope.sha256:
        raise ValueError("it was damaged")
    records = msgspec.json.decode(envelope.checkpoints, type=list[ChainRecord])
    last: dict[str, UUID] = {}
    for record in records:
        if record.state is State.REMOVED:
            continue
        if record.parent != last.get(record.node):
            raise ValueError(f"checkpoint {record.name} of node {record.node} does not follow its parent")
        last[record.node] = record.uuid
    return records
