"""ClusterBitmap: one bit for each cluster of a device, with a running count.

Offsets and lengths are bytes. `set` and `clear` take cluster-aligned ranges (the last
cluster of the device may be short); queries round out to clusters.
"""

from bitarray import bitarray

from nbdbackup.bitmap.bits import clear_plane, set_plane
from nbdbackup.extents import Extent


class ClusterBitmap:
    """A bit per `cluster_bytes` of a device of `size` bytes."""

    __slots__ = ("_bits", "_count", "cluster_bytes", "size")

    def __init__(self, size: int, cluster_bytes: int, all_set: bool = False) -> None:
        self.size = size
        self.cluster_bytes = cluster_bytes
        clusters = -(-size // cluster_bytes)
        self._bits: bitarray = set_plane(clusters) if all_set else clear_plane(clusters)
        self._count = clusters if all_set else 0

    def __len__(self) -> int:
        """How many clusters are set."""
        return self._count

    def set(self, area: Extent) -> None:
        """Set every cluster of `area`."""
        first, last = self._aligned(area)
        self._count += (last - first) - self._bits.count(1, first, last)
        self._bits[first:last] = 1

    def clear(self, area: Extent) -> None:
        """Clear every cluster of `area`."""
        first, last = self._aligned(area)
        self._count -= self._bits.count(1, first, last)
        self._bits[first:last] = 0

    def any(self, offset: int, length: int) -> bool:
        """Whether a cluster that the range touches is set."""
        first = offset // self.cluster_bytes
        last = (offset + length - 1) // self.cluster_bytes
        if first == last:
            return bool(self._bits[first])
        return self._bits.find(1, first, last + 1) >= 0

    def all(self, offset: int, length: int) -> bool:
        """Whether every cluster that the range touches is set."""
        first = offset // self.cluster_bytes
        last = (offset + length - 1) // self.cluster_bytes
        if first == last:
            return bool(self._bits[first])
        return self._bits.find(0, first, last + 1) < 0

    def next_set(self, area: Extent, length_max: int | None = None) -> Extent | None:
        """The first run of set clusters in `area`, whole clusters, at most `length_max` bytes."""
        return self._next_run(1, area, length_max)

    def next_clear(self, area: Extent, length_max: int | None = None) -> Extent | None:
        """The first run of clear clusters in `area`, whole clusters, at most `length_max` bytes."""
        return self._next_run(0, area, length_max)

    def bytes_set(self, area: Extent) -> int:
        """How many bytes of the device lie in set clusters of cluster-aligned `area`."""
        first, last = self._aligned(area)
        total = self._bits.count(1, first, last) * self.cluster_bytes
        overhang = last * self.cluster_bytes - self.size
        if overhang > 0 and last > first and self._bits[last - 1]:
            total -= overhang
        return total

    def load(self, bits: bitarray, count: int) -> None:
        """Be as `bits`, of which `count` are set: one for each cluster, and perhaps clear ones behind."""
        self._bits[:] = bits[: len(self._bits)]
        self._count = count

    def add_to(self, bits: bitarray) -> None:
        """Set in `bits`, which has one for each cluster or more, what is set here."""
        bits[: len(self._bits)] |= self._bits

    def _next_run(self, value: int, area: Extent, length_max: int | None) -> Extent | None:
        cluster = self.cluster_bytes
        last = -(-area.end // cluster)
        first = self._bits.find(value, area.offset // cluster, last)
        if first < 0:
            return None
        if length_max is not None:
            last = min(last, first + max(1, length_max // cluster))
        stop = self._bits.find(1 - value, first, last)
        if stop < 0:
            stop = last
        return Extent(first * cluster, min(stop * cluster, self.size) - first * cluster)

    def _aligned(self, area: Extent) -> tuple[int, int]:
        assert area.offset % self.cluster_bytes == 0
        assert area.end % self.cluster_bytes == 0 or area.end == self.size
        return area.offset // self.cluster_bytes, -(-area.end // self.cluster_bytes)
