"""What a loss of power may leave of files: of everything since the last sync, any part.

    with recording(directory) as platter:
        ...                          # the code that is tested
    platter.left                     # trees of files, as the disk may have them after a loss of power

A file's sectors of 512 bytes reach the disk one by one, in any order, each as it was at the last sync or at
any moment since; so does its length. fsync and fdatasync of a file put all of it there, of a directory the
names in it. Names change in the order in which they were changed, as the journals of file systems keep it;
how far they have come is not known.

Moments are before and after each system call that changes files, and each store into a mapping that the test
tells of by `moment`. All in one thread.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random

import pytest

SECTOR = 512
COMBINATIONS_MAX = 32
"""If there are no more, all of them are tried, else some."""
SECTORS_MAX = 8
"""So many sectors are tried one by one."""
CHANGES = (
    "pwrite",
    "pwritev",
    "ftruncate",
    "posix_fallocate",
    "copy_file_range",
    "rename",
    "replace",
    "link",
    "unlink",
    "symlink",
    "mkdir",
)

Tree = dict[Path, bytes]
"""The content of each file, by its path below the directory."""


@dataclass
class _File:
    """What of one file the disk has, or may have: the first version of each sector, or one of the others.

    The last one is what it holds now. So with its lengths.
    """

    now: bytes = b""
    lengths: list[int] = field(default_factory=lambda: [0])
    sectors: list[list[bytes]] = field(default_factory=list)

    def change(self, now: bytes) -> bool:
        """It holds `now`; False if it did so before."""
        if now == self.now:
            return False
        if len(now) not in self.lengths:
            self.lengths.append(len(now))
        for number in range(-(-max(len(now), len(self.now)) // SECTOR)):
            sector = _sector(now, number)
            if number == len(self.sectors):
                self.sectors.append([bytes(SECTOR)])
            if sector in self.sectors[number][1:]:
                self.sectors[number].remove(sector)
            if sector != self.sectors[number][-1]:
                self.sectors[number].append(sector)
        self.now = now
        return True

    def settle(self) -> None:
        """All of it is on disk."""
        self.lengths = [len(self.now)]
        self.sectors = [[_sector(self.now, number)] for number in range(-(-len(self.now) // SECTOR))]

    @property
    def is_open(self) -> bool:
        """Whether the disk may have less than all of it."""
        return len(self.lengths) > 1 or any(len(versions) > 1 for versions in self.sectors)

    def oldest(self) -> bytes:
        """What the disk surely has."""
        return self.left(lambda versions: versions[0], self.lengths[0])

    def left(self, choose: Callable[[list[bytes]], bytes], length: int) -> bytes:
        """One of the contents that the disk may have."""
        if not self.is_open:
            return self.now
        return b"".join(choose(versions) for versions in self.sectors)[:length].ljust(length, b"\0")


class Platter:
    """The files below `root`. `left` has what was kept of moments, with the `note` of each."""

    def __init__(self, root: Path, random: Random, share: float, note: Callable[[], object]) -> None:
        """Of `share` of the moments it is kept what might be left; `note()` is kept beside."""
        self.root = root
        self.left: list[tuple[Tree, object]] = []
        self._random = random
        self._share = share
        self._note = note
        self._files: dict[int, _File] = {}
        self._names: dict[Path, list[dict[str, int]]] = {}
        """Of each directory, the inodes by their names: on disk, and what was changed since, in order."""
        self._is_new = True
        """Whether something has changed since what may be left was kept."""

    def moment(self) -> None:
        """The power may go here."""
        self._look(self.root)
        if self._is_new and self._random.random() < self._share:
            self._is_new = False
            self._keep()

    def synced(self, descriptor: int) -> None:
        """An fsync(2) of it begins, which may only be trusted with what was there before."""
        self._look(self.root)
        inode = os.fstat(descriptor).st_ino
        if inode in self._files:
            self._files[inode].settle()
        for directory, states in self._names.items():
            if directory.exists() and directory.stat().st_ino == inode:
                del states[:-1]

    def _look(self, directory: Path) -> None:
        names: dict[str, int] = {}
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                self._look(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                names[entry.name] = entry.inode()
                file = self._files.setdefault(entry.inode(), _File())
                self._is_new |= file.change(Path(entry.path).read_bytes())
        states = self._names.setdefault(directory, [{}])
        if states[-1] != names:
            states.append(names)
            self._is_new = True

    def settle(self) -> None:
        """Everything is on disk."""
        self._look(self.root)
        for file in self._files.values():
            file.settle()
        for states in self._names.values():
            del states[:-1]

    def _keep(self) -> None:
        self.left += [(tree, self._note()) for tree in self._trees()]

    def _trees(self) -> Iterator[Tree]:
        """Everything old, everything new, and any mixture: all of them, if they are few."""
        names = {directory: states[-1] for directory, states in self._names.items()}
        yield self._tree(names, _File.oldest)
        yield self._tree(names, lambda file: file.now)
        if any(len(states) > 1 for states in self._names.values()):
            names = {directory: states[0] for directory, states in self._names.items()}
            yield self._tree(names, _File.oldest)
            yield self._tree(names, lambda file: file.now)
        open_sectors = [
            versions for file in self._files.values() for versions in file.sectors if len(versions) > 1
        ]
        combinations = 1
        for versions in open_sectors:
            combinations *= len(versions)
        if combinations <= COMBINATIONS_MAX:
            for chosen in product(*open_sectors):
                yield self._tree(self._some_names(), _chosen(open_sectors, chosen))
            return
        for _ in range(3):
            yield self._tree(
                self._some_names(),
                lambda file: file.left(self._random.choice, self._random.choice(file.lengths)),
            )
        # One file or sector old and the others new: what an order between them would have kept from being.
        for old in self._files.values():
            if old.is_open:
                yield self._tree(self._some_names(), _all_new_but(old))
        for versions in self._random.sample(open_sectors, min(SECTORS_MAX, len(open_sectors))):
            yield self._tree(names, _all_new_but_sector(versions))

    def _some_names(self) -> dict[Path, dict[str, int]]:
        return {directory: self._random.choice(states) for directory, states in self._names.items()}

    def _tree(self, names: dict[Path, dict[str, int]], content: Callable[[_File], bytes]) -> Tree:
        return {
            (directory / name).relative_to(self.root): content(self._files[inode])
            for directory, inodes in names.items()
            for name, inode in inodes.items()
        }


@contextmanager
def recording(
    root: Path, random: Random, share: float, note: Callable[[], object] = lambda: None
) -> Iterator[Platter]:
    """Record what happens to the files below `root`, which are all on disk by now."""
    platter = Platter(root, random, share, note)
    platter.settle()

    def changing(change: Callable[..., object]) -> Callable[..., object]:
        def watched(*arguments: object, **more: object) -> object:
            platter.moment()
            try:
                return change(*arguments, **more)
            finally:
                platter.moment()

        return watched

    def syncing(sync: Callable[[int], None]) -> Callable[[int], None]:
        def watched(descriptor: int) -> None:
            platter.moment()
            platter.synced(descriptor)
            sync(descriptor)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, changing(getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, syncing(getattr(os, name)))
        yield platter


def _chosen(sectors: list[list[bytes]], chosen: tuple[bytes, ...]) -> Callable[[_File], bytes]:
    """Of a file, those of its `sectors` that were `chosen`."""
    by_identity = {id(versions): pick for versions, pick in zip(sectors, chosen, strict=True)}
    return lambda file: file.left(
        lambda versions: by_identity.get(id(versions), versions[0]), max(file.lengths)
    )


def _all_new_but(old: _File) -> Callable[[_File], bytes]:
    return lambda file: file.oldest() if file is old else file.now


def _all_new_but_sector(old: list[bytes]) -> Callable[[_File], bytes]:
    return lambda file: file.left(lambda versions: versions[0 if versions is old else -1], len(file.now))


def _sector(data: bytes, number: int) -> bytes:
    return data[number * SECTOR : (number + 1) * SECTOR].ljust(SECTOR, b"\0")
