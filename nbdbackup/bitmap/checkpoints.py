"""Checkpoints: the points in time of a node since which changes are known.

    checkpoint   c1 ---------> c2 ---------> c3 ---------> now
    its bitmap       c1's bits     c2's bits     c3's bits, recording

Each has a bitmap of its own name that records from its instant to that of the next one. What changed
since c1 is what is dirty in any of c1, c2 and c3. Deleting a checkpoint gives its bits to the one
before it, so that the others still say the truth; what the oldest one knew, nobody needs.

The model is libvirt's.
"""

from collections.abc import Iterator
from datetime import datetime
from uuid import UUID

import msgspec

from nbdbackup.bitmap.dirty import DirtyBitmap


class Checkpoint(msgspec.Struct, frozen=True, eq=False):
    """`bitmap` says what changed from `created` (UTC) to the next checkpoint."""

    bitmap: DirtyBitmap
    created: datetime
    uuid: UUID

    @property
    def name(self) -> str:
        """The bitmap's, too."""
        return self.bitmap.name


class CheckpointChain:
    """The checkpoints of one node; iterating gives the oldest first. Only the last one records."""

    def __init__(self) -> None:
        self._checkpoints: list[Checkpoint] = []

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(tuple(self._checkpoints))

    @property
    def last(self) -> Checkpoint | None:
        """The newest."""
        return self._checkpoints[-1] if self._checkpoints else None

    def find(self, name: str) -> Checkpoint | None:
        """The checkpoint called `name`, if there is one."""
        return next((found for found in self._checkpoints if found.name == name), None)

    def parent(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The one before `checkpoint`."""
        index = self._checkpoints.index(checkpoint)
        return self._checkpoints[index - 1] if index else None

    def first_inconsistent(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The first from `checkpoint` on with useless bits: nobody knows what changed since."""
        index = self._checkpoints.index(checkpoint)
        return next((found for found in self._checkpoints[index:] if found.bitmap.inconsistent), None)

    def append(self, checkpoint: Checkpoint) -> None:
        """`checkpoint` is the newest."""
        self._checkpoints.append(checkpoint)

    def remove(self, checkpoint: Checkpoint) -> int:
        """Take `checkpoint` out; where it was, for `insert`."""
        index = self._checkpoints.index(checkpoint)
        del self._checkpoints[index]
        return index

    def insert(self, index: int, checkpoint: Checkpoint) -> None:
        """Undo `remove`."""
        self._checkpoints.insert(index, checkpoint)
