"""What a dirty bitmap must and may say, as sets of granules.

- A granule that an enabled bitmap calls clean holds what it held when the bitmap began to watch it (`base`):
  so no bitmap says clean of what differs from the last backup that succeeded.
- A granule that it calls dirty was written, or was merged in (`may`).
- While a backup has it frozen, its own bits stay as they are.
- Whatever users do at an instant changes exactly the bits that it has to.
"""

from dataclasses import dataclass, field, replace
from typing import Self

from bitarray import bitarray

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.extents import Extent
from nbdbackup.job.sync import BitmapSyncMode
from tests.model.expected import SIZE, Violation


def granules_of(area: Extent, granularity: int) -> set[int]:
    """The granules that `area` touches."""
    return set(range(area.offset // granularity, -(-area.end // granularity)))


def rescaled(granules: set[int], granularity: int, other: int) -> set[int]:
    """The granules of `other` bytes that `granules` touch."""
    found: set[int] = set()
    for number in granules:
        start = number * granularity
        found |= granules_of(Extent(start, min(granularity, SIZE - start)), other)
    return found


def bits_of(plane: bitarray) -> set[int]:
    """The numbers of the bits that are set."""
    return set(plane.search(bitarray("1")))


@dataclass(slots=True)
class Frozen:
    """A backup has the bitmap: what it records for its successor since the point in time `base`."""

    job_id: str
    mode: BitmapSyncMode
    base: bytes
    may: set[int]


@dataclass(slots=True)
class Recorded:
    """One bitmap of a disk."""

    name: str
    disk: int
    granularity: int
    enabled: bool
    base: bytes
    may: set[int]
    bits: set[int] = field(default_factory=set)
    """What is dirty at the instant of a transaction; while frozen, all the time."""
    frozen: Frozen | None = None
    removing: bool = False

    @property
    def busy(self) -> bool:
        return self.frozen is not None or self.removing

    def copy(self) -> Self:
        """To try something on."""
        frozen = None if self.frozen is None else replace(self.frozen, may=set(self.frozen.may))
        return replace(self, bits=set(self.bits), may=set(self.may), frozen=frozen)

    def note(self, area: Extent) -> None:
        """A client wants to change `area`."""
        granules = granules_of(area, self.granularity)
        self.may |= granules
        if self.frozen is not None:
            self.frozen.may |= granules

    def clear(self, content: bytes, in_flight: set[int]) -> None:
        """From now on, what differs from `content`."""
        self.bits, self.base, self.may = set(), content, set(in_flight)

    def freeze(self, job_id: str, mode: BitmapSyncMode, content: bytes, in_flight: set[int]) -> None:
        """A backup begins."""
        self.frozen = Frozen(job_id, mode, content, set(in_flight))

    def abdicate(self) -> None:
        """The backup has all that was dirty."""
        assert self.frozen is not None
        self.base, self.may, self.frozen = self.frozen.base, self.frozen.may, None

    def reclaim(self) -> None:
        """The backup is worth nothing."""
        assert self.frozen is not None
        self.may |= self.frozen.may
        self.frozen = None

    def check(self, real: DirtyBitmap, content: bytes) -> None:
        """Compare `real` with this, while the disk holds `content`."""
        own, spare = bits_of(real._planes.own), bits_of(real._planes.spare)
        if (real.enabled, real.granularity) != (self.enabled, self.granularity):
            raise Violation(f"{real} records: {real.enabled}")
        if real.count != len(own) or real.successor_count != len(spare):
            raise Violation(f"{real} miscounts its bits")
        if self.frozen is None:
            self._check_plane(real, own, self.base, self.may, content)
        else:
            if own != self.bits:
                raise Violation(f"{real} is frozen, and changed from {self.bits} to {own}")
            self._check_plane(real, spare, self.frozen.base, self.frozen.may, content)

    def _check_plane(
        self, real: DirtyBitmap, plane: set[int], base: bytes, may: set[int], content: bytes
    ) -> None:
        if not plane <= may:
            raise Violation(f"{real} calls {plane - may} dirty, which nobody wrote")
        if not self.enabled:
            return
        for number in range(-(-SIZE // self.granularity)):
            piece = slice(number * self.granularity, (number + 1) * self.granularity)
            if number not in plane and content[piece] != base[piece]:
                raise Violation(f"{real} says clean of granule {number}, which was changed")
