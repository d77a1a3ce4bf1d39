"""SnapshotStore: the snapshots that outlive their server, a sidecar for each in one directory.

    create    the sidecar, not LIVE, under another name; its name; scratch; LIVE at the instant, while the
              node is drained
    drop      not LIVE; the filter is taken out; scratch is removed; the sidecar is removed
    stop      the filter is taken out; scratch and maps are synced; not IN_USE, with the source as it is then
    breaking  the reason is in the sidecar before the write that was not saved is forwarded

So whatever a crash interrupts, what is found is a whole snapshot, or one that is not LIVE: that is removed
when the directory is opened. A snapshot is loaded for the node of its name. It is broken, with the reason and
for good, if the machine went down while it was in use, or if its source or scratch is not what it was
(`bitmap.identity` has what can be seen of that). What it shows of bitmaps is beside it (`frozen_copies`).

A sidecar that cannot be understood is left as it is and listed with the reason; the others are served.
"""

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec
from msgspec.structs import replace

from nbdbackup.bitmap.file import failed, sync_directory
from nbdbackup.bitmap.file_format import cut
from nbdbackup.bitmap.identity import SourceIdentity
from nbdbackup.bitmap.store import NEW_SUFFIX, current_boot_id
from nbdbackup.block.file import FileDevice
from nbdbackup.crash_points import reach
from nbdbackup.errors import ConflictError
from nbdbackup.fleece.frozen_copies import BitmapToCopy, FrozenCopies, is_copy_without, remove_copies
from nbdbackup.fleece.scratch import Scratch, create_scratch_file
from nbdbackup.fleece.snapshot_file import SnapshotFile
from nbdbackup.fleece.snapshot_format import (
    REASON_BYTES_MAX,
    ScratchIdentity,
    SnapshotFlags,
    SnapshotHeader,
    check_storable,
)
from nbdbackup.fleece.stored_scratch import (
    SCRATCH_SUFFIX,
    free_scratch,
    open_stored_scratch,
    remove_scratch,
    scratch_identity,
    stored_clusters,
)

logger = logging.getLogger(__name__)

SUFFIX = ".snapshot"
NAME_PART_BYTES_MAX = 80

_WENT_DOWN = "the machine went down while it was in use, and nobody knows what had reached the disk"


class SnapshotAtRest(msgspec.Struct, frozen=True):
    """A snapshot that nobody reads: of a node that is not there, broken, or with a damaged sidecar."""

    path: Path
    export_name: str
    """`NODE@NAME`; of a damaged sidecar as its file's name says."""
    cause: str = ""
    """Why it cannot be served, "" if it can as soon as there is its node."""
    header: SnapshotHeader | None = None
    """None: damaged."""


class StoredSnapshot:
    """A snapshot in use, with its sidecar `file`."""

    def __init__(self, file: SnapshotFile, scratch_fd: int, copies: FrozenCopies) -> None:
        """`scratch_fd` is open on the scratch, and this object's to close; so are `copies`."""
        self.file = file
        self.copies = copies
        self._scratch_fd = scratch_fd

    @cached_property
    def scratch(self) -> Scratch:
        """Its scratch, its user's to close. Making it, for the first user, blocks as file I/O does."""
        header = self.file.header
        title = f"scratch of {header.export_name}"
        device = FileDevice(os.dup(self._scratch_fd), title, header.identity.size)
        scratch = Scratch(device, header.cluster_bytes, header.scratch_bytes_max, title)
        scratch.count(stored_clusters(self._scratch_fd, header))
        return scratch

    @property
    def header(self) -> SnapshotHeader:
        """As it is in the file."""
        return self.file.header

    def go_live(self, created: datetime) -> None:
        """It was taken, at `created`: from now on it is found after a crash. Cannot fail."""
        flags = self.header.flags | SnapshotFlags.LIVE
        self.file.write_header(replace(self.header, created=created, flags=flags))
        reach("snapshot.create.live")

    def withdraw(self) -> None:
        """It is given up, or was not taken: from now on it is not found after a crash. Cannot fail."""
        self.file.write_header(replace(self.header, flags=self.header.flags & ~SnapshotFlags.LIVE))
        reach("snapshot.drop.withdrawn")

    def note_broken(self, cause: OSError) -> None:
        """It is broken, whatever happens from now on. Cannot fail."""
        reason = cut(cause.strerror or str(cause), REASON_BYTES_MAX)
        self.file.write_header(replace(self.header, broken=reason))
        reach("snapshot.break.noted")

    def save_clean(self, identity: SourceIdentity) -> None:
        """Nobody uses it or its source, which is as `identity` says, any more; blocks as fsync(2) does.

        Raises:
            OSError: it cannot be put on disk; it counts as in use until the next boot.
        """
        os.fsync(self._scratch_fd)
        sync_directory(Path(self.header.scratch.path).parent)
        self.copies.save_clean()
        self.file.sync()
        reach("snapshot.save.synced")
        header = replace(
            self.header,
            identity=identity,
            scratch=scratch_identity(self.header.scratch.path, os.fstat(self._scratch_fd)),
            flags=self.header.flags & ~SnapshotFlags.IN_USE,
            maps_checksum=self.file.maps_checksum(),
        )
        self.file.write_header(header, sync=True)
        reach("snapshot.save.saved")

    def remove(self) -> None:
        """Remove scratch and sidecar, of a snapshot that was withdrawn.

        Raises:
            OSError: they cannot be removed; that is tried again when the directory is opened.
        """
        remove_scratch(self.header)
        reach("snapshot.remove.scratch")
        remove_copies(self.file.path)
        self.file.remove()
        reach("snapshot.remove.sidecar")

    def dup_scratch(self) -> int | None:
        """Another descriptor of the scratch, the caller's to close; None: it was closed."""
        return os.dup(self._scratch_fd) if self._scratch_fd >= 0 else None

    def close(self) -> None:
        """Give up the files; the snapshot was dropped, and its scratch closed."""
        if self._scratch_fd >= 0:
            os.close(self._scratch_fd)
            self._scratch_fd = -1
            self.copies.close()
            self.file.close()


class NewSnapshot(msgspec.Struct, frozen=True):
    """What a snapshot shall be; `place` is a directory for its scratch, or the new file.

    With `held_fd` it is open there, its user's to close, and saved to as it is. If it `is_target` it stays
    when the snapshot goes. With `access_all` false nothing is wanted at first.
    """

    node: str
    name: str
    cluster_bytes: int
    place: Path
    scratch_bytes_max: int | None
    on_cbw_error: str
    cbw_timeout_s: float
    bitmaps: Sequence[BitmapToCopy] = ()
    held_fd: int | None = None
    is_target: bool = False
    access_all: bool = True
    own_id: uuid.UUID = msgspec.field(default_factory=uuid.uuid4)


class SnapshotStore:
    """The snapshots in `directory`, which this process alone uses. Every method blocks as file I/O does."""

    what = "snapshot"
    """What a person calls them."""

    def __init__(
        self,
        directory: Path,
        *,
        boot_id: bytes | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.directory = directory
        self._boot_id = current_boot_id() if boot_id is None else boot_id
        self._now_ns = now_ns
        # Changing while running.
        self.at_rest: dict[str, SnapshotAtRest] = {}
        """By the name of the export that each would be."""
        self._in_use: set[StoredSnapshot] = set()

    def open(self) -> None:
        """Make the directory if need be, look at every sidecar in it, and remove what a crash left half done.

        Raises:
            DeviceError: the directory cannot be used.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            paths = sorted(self.directory.iterdir())
        except OSError as error:
            raise failed(error, f"cannot use directory {self.directory} for snapshots") from error
        for path in paths:
            if path.suffix == NEW_SUFFIX:
                self._tidy(path)
            elif path.suffix == SUFFIX:
                self._note(path)
        for path in paths:
            if is_copy_without(path, SUFFIX):
                with suppress(OSError):
                    path.unlink()

    def _tidy(self, path: Path) -> None:
        """Remove a sidecar that a crash left before it was one: there is nothing beside it yet."""
        try:
            path.unlink()
            reach("snapshot.open.tidied")
        except OSError as error:
            logger.error("cannot remove leftover %s: %s", path, error.strerror)

    def _note(self, path: Path) -> None:
        """Look at a sidecar: list it, or clear away what a crash left half done."""
        try:
            file = SnapshotFile.open(path)
        except OSError as error:
            found = SnapshotAtRest(path, unquote(path.stem), error.strerror or str(error))
        else:
            file.close()
            header = file.header
            if SnapshotFlags.LIVE not in header.flags:
                self._clear_away(path, header)
                return
            found = SnapshotAtRest(path, header.export_name, header.broken, header)
            if header.broken:
                # The crash may have come before that was done.
                free_scratch(header)
        if self.at_rest.setdefault(found.export_name, found) is not found:
            logger.error("%s is another %s %s: move one away", path, self.what, found.export_name)
        elif found.cause:
            self._tell(found)

    def _tell(self, found: SnapshotAtRest) -> None:
        logger.error("%s %s is broken: %s", self.what, found.export_name, found.cause)

    def noun_of_scratch(self, header: SnapshotHeader) -> str:
        """What a person calls the file that the clusters of the snapshot are saved in."""
        del header
        return "scratch"

    def _clear_away(self, path: Path, header: SnapshotHeader) -> None:
        try:
            remove_scratch(header)
            reach("snapshot.open.scratch")
            remove_copies(path)
            path.unlink()
            logger.info("removed %s, which a crash had left half made or half dropped", path)
        except OSError as error:
            logger.error("cannot remove leftover %s: %s", path, error.strerror)

    def scratch_directories(self) -> set[Path]:
        """Where the scratch of snapshots is, as far as that is known."""
        headers = [snapshot.header for snapshot in self._in_use]
        headers += [found.header for found in self.at_rest.values() if found.header is not None]
        return {Path(header.scratch.path).parent for header in headers}

    def create(self, new: NewSnapshot, identity: SourceIdentity) -> StoredSnapshot:
        """Make what a snapshot needs; it is one when it goes live, and gone with the process until then.

        Raises:
            UsageError: a name cannot be stored. ConflictError, NotFoundError, DeviceError: a file cannot be
            made; nothing is left.
        """
        own_id = new.own_id
        stem = stem_of(new.node, new.name)
        place = Path(os.path.abspath(new.place))
        scratch_path = place / f"{stem}.{own_id.hex}{SCRATCH_SUFFIX}" if place.is_dir() else place
        check_storable(new.node, new.name, str(scratch_path))
        header = SnapshotHeader(
            own_id.bytes,
            new.node,
            new.name,
            new.cluster_bytes,
            identity,
            ScratchIdentity(str(scratch_path)),
            new.scratch_bytes_max,
            new.on_cbw_error,
            new.cbw_timeout_s,
            SnapshotFlags.IN_USE | (SnapshotFlags.TARGET if new.is_target else SnapshotFlags(0)),
            boot_id=self._boot_id,
            alive_ns=self._now_ns(),
        )
        file = self._create_sidecar(stem, header)
        try:
            copies = FrozenCopies.create(file.path, header, new.bitmaps)
            if new.held_fd is None:
                fd = create_scratch_file(scratch_path, identity.size)
            else:
                fd = os.dup(new.held_fd)
        except BaseException:
            with suppress(OSError):
                remove_copies(file.path)
            file.remove()
            file.close()
            raise
        reach("snapshot.create.scratch")
        file.write_header(replace(header, scratch=scratch_identity(str(scratch_path), os.fstat(fd))))
        reach("snapshot.create.known")
        if new.access_all:
            file.access().set_all()
        reach("snapshot.create.made")
        snapshot = self._use(file, fd, copies)
        logger.debug("snapshot %s has its scratch in %s", header.export_name, scratch_path)
        return snapshot

    def _create_sidecar(self, stem: str, header: SnapshotHeader) -> SnapshotFile:
        """The sidecar, under its name from when it is whole on."""
        path = self.directory / f"{stem}{SUFFIX}"
        if path.exists():
            raise ConflictError(f"snapshot file {path} exists already: move it away")
        file = SnapshotFile.create(path.with_name(f"{path.name}.{header.uuid.hex()}{NEW_SUFFIX}"), header)
        reach("snapshot.create.written")
        try:
            file.rename(path)
        except OSError as error:
            file.remove()
            file.close()
            raise failed(error, f"cannot make snapshot file {path}") from error
        reach("snapshot.create.sidecar")
        return file

    def load(self, node: str, identity: SourceIdentity) -> list[StoredSnapshot]:
        """The snapshots of `node`, whose source is as `identity` says, the oldest first, in use from now on.

        Those that are broken stay at rest.

        Raises:
            DeviceError: a sidecar cannot be written; none of them is in use.
        """
        headers = [found.header for found in self.at_rest.values() if not found.cause]
        wanted = [header for header in headers if header is not None and header.node == node]
        loaded: list[StoredSnapshot] = []
        try:
            for header in sorted(wanted, key=lambda header: header.created):
                snapshot = self.take(header.export_name, identity)
                if isinstance(snapshot, StoredSnapshot):
                    loaded.append(snapshot)
                    _ = snapshot.scratch  # made here, in a thread
                else:
                    self._tell(snapshot)
        except OSError:
            for snapshot in loaded:
                with suppress(OSError):
                    self.release(snapshot, identity)
                snapshot.close()
            raise
        return loaded

    def take(self, export_name: str, identity: SourceIdentity) -> StoredSnapshot | SnapshotAtRest:
        """Take the one at rest of that name into use, or let it be broken, for good, and at rest.

        Raises:
            DeviceError: its sidecar cannot be read or written; it is as it was.
        """
        path = self.at_rest[export_name].path
        file = SnapshotFile.open(path)
        fd = -1
        try:
            header = file.header
            reason = self._doubt(file, identity)
            if not reason:
                fd, reason = open_stored_scratch(
                    header, header.boot_id == self._boot_id, self.noun_of_scratch(header)
                )
            if reason:
                broken = self._break(file, reason)
                file.close()
                return broken
            flags = header.flags | SnapshotFlags.IN_USE
            header = replace(
                header, identity=identity, flags=flags, boot_id=self._boot_id, alive_ns=self._now_ns()
            )
            # On disk before anybody writes to the source: what is there now would be believed.
            file.write_header(header, sync=True)
            reach("snapshot.load.in-use")
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            file.close()
            raise failed(error, f"cannot use snapshot file {path}") from error
        del self.at_rest[header.export_name]
        return self._use(file, fd, FrozenCopies.load(path, header))

    def _use(self, file: SnapshotFile, fd: int, copies: FrozenCopies) -> StoredSnapshot:
        """Takes over `fd`."""
        snapshot = StoredSnapshot(file, fd, copies)
        self._in_use.add(snapshot)
        return snapshot

    def _break(self, file: SnapshotFile, reason: str) -> SnapshotAtRest:
        header = file.header
        # For good: from now on the source changes and nobody saves for this snapshot what was there.
        file.write_header(replace(header, broken=cut(reason, REASON_BYTES_MAX)), sync=True)
        reach("snapshot.load.broken")
        free_scratch(header)
        found = SnapshotAtRest(file.path, header.export_name, reason, file.header)
        self.at_rest[header.export_name] = found
        return found

    def _doubt(self, file: SnapshotFile, identity: SourceIdentity) -> str:
        """Why source and maps may not be what they were; "" if they are."""
        header = file.header
        same_boot = header.boot_id == self._boot_id
        if header.broken:
            return header.broken
        if SnapshotFlags.IN_USE in header.flags and not same_boot:
            return _WENT_DOWN
        if difference := header.identity.difference(identity, same_boot):
            return difference
        if SnapshotFlags.IN_USE in header.flags:
            return header.identity.change_since_crash(identity, header.alive_ns)
        if change := header.identity.change_since_stop(identity):
            return change
        return "" if header.maps_checksum == file.maps_checksum() else f"the maps in {file.path} were damaged"

    def retire(self, snapshot: StoredSnapshot) -> None:
        """`snapshot` is about to be released or removed: no sign of life of it any more. Never blocks."""
        self._in_use.discard(snapshot)

    def release(self, snapshot: StoredSnapshot, identity: SourceIdentity) -> None:
        """The node of `snapshot` goes, with its source as `identity` says: save it, to be loaded again.

        Raises:
            OSError: it could not be saved. It is good as after a crash.
        """
        self.retire(snapshot)
        snapshot.save_clean(identity)
        header = snapshot.header
        found = SnapshotAtRest(snapshot.file.path, header.export_name, header.broken, header)
        self.at_rest[header.export_name] = found

    def remove_at_rest(self, export_name: str) -> None:
        """Remove a snapshot that nobody reads; of a damaged one the sidecar alone.

        Raises:
            OSError: it cannot be removed.
        """
        found = self.at_rest[export_name]
        if found.header is not None:
            remove_scratch(found.header)
            reach("snapshot.remove-at-rest.scratch")
        remove_copies(found.path)
        with suppress(FileNotFoundError):
            found.path.unlink()
        del self.at_rest[export_name]

    def sync_directory(self) -> None:
        """What was made or removed before is so on disk."""
        sync_directory(self.directory)

    def give_sign_of_life(self) -> None:
        """To be called every few seconds: how a later server tells our writes from those after our death."""
        now_ns = self._now_ns()
        for snapshot in tuple(self._in_use):
            snapshot.file.write_sign_of_life(now_ns)


def stem_of(node: str, name: str) -> str:
    """A file name that people recognise, and that no other snapshot has."""
    quoted = [quote(part, safe=" ") for part in (node, name)]
    if max(map(len, quoted)) <= NAME_PART_BYTES_MAX:
        return "@".join(quoted)
    digest = hashlib.sha256(f"{node}@{name}".encode()).hexdigest()[:16]
    return "@".join(part[:60] for part in quoted) + f"~{digest}"
