"""Ranges of bytes, and what is known about the bytes in them.

Offsets and lengths are bytes; ranges are half-open.
"""

from collections.abc import Iterable, Iterator
from enum import IntFlag

import msgspec


class Extent(msgspec.Struct, frozen=True, gc=False):
    """`[offset, offset + length)` in bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.length

    def overlaps(self, other: "Extent") -> bool:
        """Whether at least one byte is in both."""
        return self.offset < other.end and other.offset < self.end

    def aligned_out(self, granularity: int, limit: int) -> "Extent":
        """Grow to multiples of `granularity` (bytes), but not past `limit`."""
        start = self.offset // granularity * granularity
        end = min(-(-self.end // granularity) * granularity, limit)
        return Extent(start, end - start)

    def aligned_in(self, granularity: int, limit: int) -> "Extent":
        """Shrink to whole granules; a granule cut short by `limit` counts as whole.

        The result may have length 0.
        """
        start = -(-self.offset // granularity) * granularity
        end = self.end if self.end >= limit else self.end // granularity * granularity
        return Extent(min(start, self.end), max(0, end - start))

    def split(self, length_max: int) -> Iterator["Extent"]:
        """Cut into pieces of at most `length_max` bytes, in order."""
        for offset in range(self.offset, self.end, length_max):
            yield Extent(offset, min(length_max, self.end - offset))


class Allocation(IntFlag):
    """What a device knows about a range; 0 (allocated data) is always a safe answer."""

    DATA = 0
    HOLE = 1
    ZERO = 2


class StatusExtent(msgspec.Struct, frozen=True, gc=False):
    """`length` bytes that share `flags`; its offset follows from those before it."""

    length: int
    flags: Allocation


class ContextExtent(msgspec.Struct, frozen=True, gc=False):
    """`length` bytes that share `status`, a number whose meaning is its meta context's."""

    length: int
    status: int


def merge_status(extents: Iterable[StatusExtent]) -> list[StatusExtent]:
    """Join neighbours with equal flags and drop empty ones."""
    merged: list[StatusExtent] = []
    for extent in extents:
        if not extent.length:
            continue
        if merged and merged[-1].flags == extent.flags:
            merged[-1] = StatusExtent(merged[-1].length + extent.length, extent.flags)
        else:
            merged.append(extent)
    return merged
