"""Where a bench runs: its disks, and how they are brought into the same state before each measurement.

How the disk was written matters for small writes. The kernel keeps a file's pages in folios, as large as the
pieces that were written (so it looks, it was not traced), and a 4 KiB write into a large one costs several
times one into a small one. A virtual machine's disk is read and written in small pieces by its guest, most of
the time at random, so `4K` is the default; `1M` is a disk that was copied there as a whole just now.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KIB, MIB = 1024, 1024 * 1024
CLUSTER = 64 * KIB
FRAGMENT, FRAGMENT_EVERY = 4 * KIB, 32 * KIB
PIECES = {"4K": 4 * KIB, "1M": MIB}
DISKS_NEEDED = 3.5
"""Room for so many disks: the disk, its scratch, a copy, and what is small."""


class MeasureFailed(Exception):
    """A contender did not start, or a load on it failed; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Room:
    """What every measurement has: a directory of its own, a full disk in it, and for how long to measure.

    Set once: `seconds` of each load that runs for a time, after `ramp_s` that do not count.
    """

    directory: Path
    size: int
    seconds: float
    ramp_s: float = 1.0
    piece: int = PIECES["4K"]

    @property
    def disk(self) -> Path:
        """A file of random data, `size` bytes long."""
        return self.directory / "disk.img"

    @property
    def fragmented(self) -> Path:
        """A file as long, with 4 KiB of data in every 32 KiB and holes between."""
        path = self.directory / "fragmented.img"
        if not path.exists():
            data = random.Random(1).randbytes(FRAGMENT)
            with path.open("wb", buffering=0) as file:
                for offset in range(0, self.size, FRAGMENT_EVERY):
                    os.pwrite(file.fileno(), data, offset)
                file.truncate(self.size)
                os.fsync(file.fileno())
        return path

    @property
    def extents(self) -> int:
        """How many extents of data and holes `fragmented` has."""
        return 2 * self.size // FRAGMENT_EVERY

    def make_disk(self) -> None:
        """Write the disk, in pieces of `piece` bytes."""
        generator = random.Random(1)
        with self.disk.open("wb", buffering=0) as file:
            for _ in range(self.size // MIB):
                data = memoryview(generator.randbytes(MIB))
                for start in range(0, MIB, self.piece):
                    file.write(data[start : start + self.piece])
            os.fsync(file.fileno())

    def warm(self) -> None:
        """Bring the whole disk into the page cache, and its dirty pages out: nobody pays for another."""
        with self.disk.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            buffer = bytearray(4 * MIB)
            while file.readinto(buffer):
                pass

    def one_write_in(self, every: int) -> Path:
        """A log that fio replays: 4 KiB into one cluster of every `every`, each once, in a random order."""
        path = self.directory / f"every-{every}.iolog"
        if not path.exists():
            clusters = list(range(0, self.size // CLUSTER, every))
            random.Random(1).shuffle(clusters)
            writes = [f"disk write {cluster * CLUSTER} {4 * KIB}" for cluster in clusters]
            lines = ["fio version 2 iolog", "disk add", "disk open", *writes, "disk close"]
            path.write_text("\n".join(lines) + "\n")
        return path

    @contextmanager
    def place(self) -> Iterator[Path]:
        """A new directory for scratch, state and sockets, on the disk's file system."""
        with tempfile.TemporaryDirectory(dir=self.directory, ignore_cleanup_errors=True) as name:
            yield Path(name)


@contextmanager
def room_in(parent: Path | None, size: int, seconds: float, ramp_s: float, piece: int) -> Iterator[Room]:
    """A room below `parent` (None: the system's temporary directory), which is removed at the end.

    Raises:
        SystemExit: there is not enough space.
    """
    with tempfile.TemporaryDirectory(prefix="nbdbackup-bench-", dir=parent) as name:
        free = shutil.disk_usage(name).free
        if free < size * DISKS_NEEDED:
            needed = int(size * DISKS_NEEDED)
            raise SystemExit(
                f"bench: {Path(name).parent} has {free // MIB} MiB free, and needs {needed // MIB} MiB: "
                "make room, choose another --directory, or a smaller --size-mib"
            )
        room = Room(Path(name), size, seconds, ramp_s, piece)
        room.make_disk()
        yield room
