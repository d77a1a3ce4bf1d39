"""ClusterBitmap: one bit for each cluster of a device, with a running count.

Offsets and lengths are bytes. `set` and `clear` take cluster-aligned ranges (the last
cluster of the device may be short); queries round out to clusters.
"""

from collections.abc import Iterator

from bitarray import bitarray

from nbdbackup.bitmap.bits import clear_plane, count_set, pieces, set_plane
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

    @classmethod
    def over(cls, size: int, cluster_bytes: int, memory: memoryview) -> "ClusterBitmap":
        """One whose bits are those in `memory`, and stay there: a byte for each eight clusters.

        The bits past the last cluster must be clear.
        """
        bitmap = cls(0, cluster_bytes)
        bitmap.size, bitmap._bits = size, bitarray(buffer=memory, endian="big")
        bitmap._count = count_set(bitmap._bits)
        return bitmap

    def set_all(self) -> None:
        """Set every cluster."""
        clusters = -(-self.size // self.cluster_bytes)
        for first, stop in pieces(clusters):
            self._bits[first:stop] = 1
        self._count = clusters

    def minus(self, other: "ClusterBitmap") -> "ClusterBitmap":
        """A new one, in memory: what is set here and not in `other`, which is of the same device."""
        result = ClusterBitmap(self.size, self.cluster_bytes)
        for first, stop in pieces(len(self._bits)):
            bits = self._bits[first:stop] & ~other._bits[first:stop]
            result._bits[first:stop] = bits
            result._count += bits.count(1)
        return result

    def assign(self, other: "ClusterBitmap") -> None:
        """Let the same bits be set as in `other`, which is of the same device; they stay where they are."""
        assert (self.size, self.cluster_bytes) == (other.size, other.cluster_bytes)
        for first, stop in pieces(len(self._bits)):
            self._bits[first:stop] = other._bits[first:stop]
        self._count = other._count

    def copy(self) -> "ClusterBitmap":
        """Another one, with the same bits set now."""
        other = ClusterBitmap(0, self.cluster_bytes)
        other.size, other._bits, other._count = self.size, self._bits.copy(), self._count
        return other

    def __len__(self) -> int:
        """How many clusters are set."""
        return self._count

    @property
    def total_bytes(self) -> int:
        """How many bytes of the device lie in set clusters."""
        total = self._count * self.cluster_bytes
        if self._count and self._bits[(self.size - 1) // self.cluster_bytes]:
            total -= -self.size % self.cluster_bytes
        return total

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

    def load(self, bits: bitarray) -> None:
        """Be as `bits`: one for each cluster, perhaps with clear ones more, or fewer, at the end."""
        count = min(len(bits), len(self._bits))
        self._bits[:count] = bits[:count]
        self._bits[count:] = 0
        self._count = self._bits.count(1)

    @property
    def bits(self) -> bitarray:
        """One for each cluster, and clear ones up to a whole byte; not to be changed."""
        return self._bits

    def runs(self) -> Iterator[Extent]:
        """Every run of set clusters, in order."""
        area = Extent(0, self.size)
        while area.length and (run := self.next_set(area)) is not None:
            yield run
            area = Extent(run.end, self.size - run.end)

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
