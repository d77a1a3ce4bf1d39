"""BitmapStore: the bitmaps of a directory, a file for each, and what becomes of them between two servers.

    a server stops cleanly      the bits are synced, then the header says so, with the source as it was then
    the process is killed       on the same boot the mapping is as the process left it: nothing is missing
    the machine goes down       with durability `power` the bits are on disk, and nothing is missing;
                                otherwise nobody knows which ones are, and the bitmap is inconsistent

A bitmap is loaded for the node of its name, when that is made; frozen, if it has a holder (`stored`). It is
inconsistent, with the reason, if its source is not the one it was, or was changed meanwhile (`identity` has
what can be seen of that); then it is not frozen.

A file that cannot be understood is refused when the directory is opened, and left as it is: the server does
not start. Serving its disk would let writes pass unrecorded, and later somebody might take the file for good.
"""

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from msgspec.structs import replace

from nbdbackup.bitmap.file import BitmapFile, failed, sync_directory
from nbdbackup.bitmap.file_format import NO_HOLDER, TEXT_BYTES_MAX, Header, HeaderFlags
from nbdbackup.bitmap.identity import SourceIdentity
from nbdbackup.bitmap.stored import StoredBitmap, Sync
from nbdbackup.crash_points import reach
from nbdbackup.errors import ConflictError, NotFoundError, UsageError

SUFFIX = ".bitmap"
NEW_SUFFIX = ".new"
"""Of a file that is no bitmap yet; a crash may leave it behind, and it goes when the directory is opened."""
NAME_PART_BYTES_MAX = 100
BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")

_WENT_DOWN = (
    "the machine went down while the bitmap was in use, and nobody knows which bits had reached the disk "
    "(--bitmap-durability power keeps them)"
)


def current_boot_id() -> bytes:
    """What the kernel drew at this boot, 16 bytes."""
    return uuid.UUID(BOOT_ID_PATH.read_text().strip()).bytes


class BitmapStore:
    """The bitmap files in `directory`, which this process alone uses.

    With `power`, bitmaps outlive a loss of power. `run` runs blocking functions in threads. Every method
    blocks as file operations do.
    """

    def __init__(
        self,
        directory: Path,
        run: Sync,
        *,
        power: bool = False,
        boot_id: bytes | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.directory = directory
        self.power = power
        self._run = run
        self._boot_id = current_boot_id() if boot_id is None else boot_id
        self._now_ns = now_ns
        # Changing while running.
        self._at_rest: dict[str, dict[str, Path]] = {}
        """The files that no bitmap is loaded from, by the names of node and bitmap."""
        self._loaded: set[StoredBitmap] = set()

    def open(self) -> None:
        """Make the directory if need be, and look at every file in it.

        Raises:
            DeviceError: it cannot be used, or a file in it is no bitmap file, damaged or of another version.
            ConflictError: two files are of the same bitmap.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            paths = sorted(self.directory.iterdir())
            for path in paths:
                if path.suffix == NEW_SUFFIX:
                    path.unlink()
                    reach("bitmap.open.tidied")
        except OSError as error:
            raise failed(error, f"cannot use directory {self.directory} for bitmaps") from error
        for path in paths:
            if path.suffix == SUFFIX:
                self._note(path)

    def _note(self, path: Path) -> None:
        file = BitmapFile.open(path)
        file.close()
        if HeaderFlags.COPY in file.header.flags:
            raise ConflictError(f"{path} is what a snapshot shows of a bitmap, not a bitmap: move it away")
        if HeaderFlags.REMOVED in file.header.flags:
            _finish_removal(path)
            return
        names = self._at_rest.setdefault(file.header.node, {})
        if (other := names.setdefault(file.header.name, path)) != path:
            raise ConflictError(
                f"{other} and {path} are both bitmap '{file.header.name}' of node '{file.header.node}': "
                "move one away"
            )

    def nodes_at_rest(self) -> dict[str, list[str]]:
        """The names of bitmaps that are not loaded, by their nodes' names."""
        return {node: list(names) for node, names in self._at_rest.items()}

    def at_rest(self) -> list[tuple[str, str, Path]]:
        """Node, name and file of each bitmap that is not loaded."""
        return [
            (node, name, path)
            for node, names in sorted(self._at_rest.items())
            for name, path in sorted(names.items())
        ]

    def remove_at_rest(self, path: Path) -> str:
        """Remove the file of a bitmap that is not loaded; its node. On disk after `sync_directory`.

        Raises:
            NotFoundError: it is not one any more. OSError: it cannot be removed.
        """
        for node, name, known in self.at_rest():
            if known == path:
                path.unlink(missing_ok=True)
                reach("bitmap.clean.unlinked")
                del self._at_rest[node][name]
                return node
        raise NotFoundError(f"bitmap file {path} is in use, or gone")

    def create(
        self, node: str, name: str, granularity: int, identity: SourceIdentity, *, enabled: bool = True
    ) -> StoredBitmap:
        """Make a bitmap with nothing dirty; it is there for good once it was published.

        Raises:
            UsageError: a name is too long. ConflictError, DeviceError: see `BitmapFile.create`.
        """
        for what, text in (("node", node), ("bitmap", name)):
            if len(text.encode(errors="surrogateescape")) > TEXT_BYTES_MAX:
                raise UsageError(f"{what} name {text[:40]}... is too long: {TEXT_BYTES_MAX} bytes at most")
            if not text.isprintable():
                raise UsageError(f"{what} name {text!r} has characters that cannot be stored with a bitmap")
        header = Header(
            uuid.uuid4().bytes,
            node,
            name,
            granularity,
            identity,
            self._flags_in_use() | (HeaderFlags.ENABLED if enabled else HeaderFlags(0)),
            boot_id=self._boot_id,
            alive_ns=self._now_ns(),
        )
        path = self._path(header)
        file = BitmapFile.create(path.with_name(f"{path.name}.{header.uuid.hex()}{NEW_SUFFIX}"), header)
        reach("bitmap.create.made")
        bitmap = StoredBitmap(file, self._run)
        self._loaded.add(bitmap)
        return bitmap

    def publish(self, bitmap: StoredBitmap) -> None:
        """Let a new bitmap have its name in the directory; on disk after `sync_directory`.

        Raises:
            ConflictError: there is such a file. DeviceError: it cannot be renamed.
        """
        path = self._path(bitmap.file.header)
        if path.exists():
            raise ConflictError(f"bitmap file {path} exists already: move it away")
        try:
            bitmap.file.rename(path)
        except OSError as error:
            raise failed(error, f"cannot rename {bitmap.file.path} to {path}") from error
        reach("bitmap.publish.renamed")

    def load(self, node: str, identity: SourceIdentity) -> list[StoredBitmap]:
        """Every bitmap of `node`, whose source is as `identity` says, in use from now on.

        Raises:
            DeviceError: a file cannot be read or written; none of them is in use.
        """
        bitmaps: list[StoredBitmap] = []
        try:
            for _, path in sorted(self._at_rest.get(node, {}).items()):
                bitmaps.append(self._load(path, identity))
        except BaseException:
            for bitmap in bitmaps:
                with suppress(OSError):
                    self.release(bitmap, identity)
            raise
        return bitmaps

    def _load(self, path: Path, identity: SourceIdentity) -> StoredBitmap:
        file = BitmapFile.open(path)
        try:
            bitmap = self._take_into_use(file, identity)
        except OSError as error:
            file.close()
            raise failed(error, f"cannot use bitmap file {path}") from error
        self._loaded.add(bitmap)
        del self._at_rest[file.header.node][file.header.name]
        return bitmap

    def retire(self, bitmap: StoredBitmap) -> None:
        """`bitmap` is about to be released or removed: no sign of life of it any more. Never blocks."""
        self._loaded.discard(bitmap)

    def release(self, bitmap: StoredBitmap, identity: SourceIdentity) -> None:
        """The node of `bitmap` goes, with its source as `identity` says: save it, to be loaded again.

        Raises:
            OSError: it could not be saved. It is good as after a crash.
        """
        self._loaded.discard(bitmap)
        header = bitmap.file.header
        self._at_rest.setdefault(header.node, {})[header.name] = bitmap.file.path
        bitmap.save_clean(identity)

    def remove(self, bitmap: StoredBitmap) -> None:
        """Remove its file; on disk after `sync_directory`. The bitmap goes on in memory until it is closed.

        Raises:
            OSError: the file cannot be removed.
        """
        bitmap.file.remove()
        reach("bitmap.remove.unlinked")
        self._loaded.discard(bitmap)

    def sync_directory(self) -> None:
        """What was published or removed before is so on disk."""
        sync_directory(self.directory)

    def give_sign_of_life(self) -> None:
        """To be called every few seconds: how a later server tells our writes from those after our death."""
        now_ns = self._now_ns()
        for bitmap in tuple(self._loaded):
            bitmap.file.write_sign_of_life(now_ns)

    def _take_into_use(self, file: BitmapFile, identity: SourceIdentity) -> StoredBitmap:
        header = file.header
        reason = header.inconsistent or self._doubt(file, identity)
        own, spare = file.plane(header.own_plane), file.plane(1 - header.own_plane)
        stays_frozen = header.is_held and not reason
        if HeaderFlags.BOTH in header.flags and not stays_frozen:
            own |= spare
        # On disk before the header says that this plane alone counts, and that it is in use.
        file.sync()
        reach("bitmap.load.merged")
        kept = HeaderFlags.ENABLED | HeaderFlags.SECOND_PLANE
        if stays_frozen:
            kept |= HeaderFlags.BOTH
        flags = (header.flags & kept) | self._flags_in_use()
        header = replace(
            header,
            identity=header.identity if reason else identity,
            flags=flags,
            boot_id=self._boot_id,
            alive_ns=self._now_ns(),
            inconsistent=reason,
            holder=header.holder if stays_frozen else NO_HOLDER,
        )
        file.write_header(header, sync=True)
        reach("bitmap.load.in-use")
        if not stays_frozen:
            spare.setall(0)
        return StoredBitmap(file, self._run)

    def _flags_in_use(self) -> HeaderFlags:
        return HeaderFlags.IN_USE | (HeaderFlags.POWER if self.power else HeaderFlags(0))

    def _doubt(self, file: BitmapFile, identity: SourceIdentity) -> str:
        """Why the bits in `file` may not be right; "" if they are."""
        header = file.header
        same_boot = header.boot_id == self._boot_id
        if difference := header.identity.difference(identity, same_boot):
            return difference
        if HeaderFlags.IN_USE not in header.flags:
            change = header.identity.change_since_stop(identity)
            return change or ("" if header.bits_checksum == file.bits_checksum() else "its bits were damaged")
        if same_boot:
            return header.identity.change_since_crash(identity, header.alive_ns)
        return "" if HeaderFlags.POWER in header.flags else _WENT_DOWN

    def _path(self, header: Header) -> Path:
        """A name that people recognise, and that no other bitmap has."""
        node, name = quote(header.node, safe=" "), quote(header.name, safe=" ")
        if max(len(node), len(name)) > NAME_PART_BYTES_MAX:
            return self.directory / f"{node[:NAME_PART_BYTES_MAX]}:{header.uuid.hex()}{SUFFIX}"
        return self.directory / f"{node}:{name}{SUFFIX}"


def _finish_removal(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise failed(error, f"cannot remove bitmap file {path}, whose removal had begun") from error
    reach("bitmap.open.removed")
