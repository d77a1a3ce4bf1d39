"""ClusterBitmap against a plain set of cluster numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.extents import Extent

CLUSTER = 64


class ClusterBitmapMachine(RuleBasedStateMachine):
    """Random changes and queries; `model` holds the numbers of the set clusters."""

    @initialize(size=st.integers(1, 40 * CLUSTER), all_set=st.booleans())
    def make(self, size: int, all_set: bool) -> None:
        self.size = size
        self.clusters = -(-size // CLUSTER)
        self.bitmap = ClusterBitmap(size, CLUSTER, all_set)
        self.model = set(range(self.clusters)) if all_set else set[int]()

    def area(self, data: st.DataObject) -> tuple[Extent, set[int]]:
        """Some aligned range, possibly empty, and the clusters in it."""
        first = data.draw(st.integers(0, self.clusters))
        last = data.draw(st.integers(first, self.clusters))
        start = min(first * CLUSTER, self.size)
        if start % CLUSTER:
            start, first = (self.clusters - 1) * CLUSTER, self.clusters - 1
        return Extent(start, min(last * CLUSTER, self.size) - start), set(range(first, last))

    @rule(data=st.data())
    def set_area(self, data: st.DataObject) -> None:
        area, clusters = self.area(data)
        self.bitmap.set(area)
        self.model |= clusters

    @rule(data=st.data())
    def clear_area(self, data: st.DataObject) -> None:
        area, clusters = self.area(data)
        self.bitmap.clear(area)
        self.model -= clusters

    @rule(data=st.data())
    def query_bytes(self, data: st.DataObject) -> None:
        """`any` and `all` round a range of any alignment out to clusters."""
        offset = data.draw(st.integers(0, self.size - 1))
        length = data.draw(st.integers(1, self.size - offset))
        touched = set(range(offset // CLUSTER, (offset + length - 1) // CLUSTER + 1))
        assert self.bitmap.any(offset, length) == bool(touched & self.model)
        assert self.bitmap.all(offset, length) == (touched <= self.model)

    @rule(data=st.data(), length_max=st.none() | st.integers(1, 5 * CLUSTER))
    def find_run(self, data: st.DataObject, length_max: int | None) -> None:
        area, clusters = self.area(data)
        clear = set(range(self.clusters)) - self.model
        self.check_run(self.bitmap.next_set(area, length_max), clusters & self.model, length_max)
        self.check_run(self.bitmap.next_clear(area, length_max), clusters & clear, length_max)

    def check_run(self, run: Extent | None, wanted: set[int], length_max: int | None) -> None:
        if not wanted:
            assert run is None
            return
        first = last = min(wanted)
        limit = None if length_max is None else max(1, length_max // CLUSTER)
        while last in wanted and (limit is None or last - first < limit):
            last += 1
        assert run == Extent(first * CLUSTER, min(last * CLUSTER, self.size) - first * CLUSTER)

    @rule(data=st.data())
    def count_bytes(self, data: st.DataObject) -> None:
        area, clusters = self.area(data)
        expected = sum(min(CLUSTER, self.size - number * CLUSTER) for number in clusters & self.model)
        assert self.bitmap.bytes_set(area) == expected

    @invariant()
    def count_is_kept(self) -> None:
        if hasattr(self, "bitmap"):
            assert len(self.bitmap) == len(self.model)


TestClusterBitmap = ClusterBitmapMachine.TestCase


@given(st.integers(1, 2**41))
def test_last_cluster_of_any_size_counts_only_its_bytes(size: int) -> None:
    bitmap = ClusterBitmap(size, 1 << 36, all_set=True)
    assert bitmap.bytes_set(Extent(0, size)) == size


@pytest.mark.parametrize("size", [4 * 512, 4 * 512 - 1, 3 * 512 + 1])
def test_total_bytes_knows_how_short_the_last_cluster_is(size: int) -> None:
    clusters = ClusterBitmap(size, 512)
    assert clusters.total_bytes == 0
    clusters.set(Extent(0, 512))
    assert clusters.total_bytes == 512
    clusters.set(Extent(3 * 512, size - 3 * 512))
    assert clusters.total_bytes == clusters.bytes_set(Extent(0, size)) == size - 2 * 512


def test_a_map_over_memory_keeps_its_bits_there() -> None:
    size, memory = 19 * CLUSTER - 1, bytearray(3)
    first = ClusterBitmap.over(size, CLUSTER, memoryview(memory))
    first.set_all()
    assert (len(first), bytes(memory)) == (19, b"\xff\xff\xe0")
    first.clear(Extent(2 * CLUSTER, CLUSTER))
    again = ClusterBitmap.over(size, CLUSTER, memoryview(memory))
    assert len(again) == 18
    assert list(again.runs()) == list(first.runs())
    rest = first.minus(again)
    assert (len(rest), rest.next_set(Extent(0, size))) == (0, None)
    again.clear(Extent(0, 2 * CLUSTER))
    assert memory[0] == 0x1F


def test_what_is_done_in_pieces_is_done_to_the_last_cluster() -> None:
    clusters = (1 << 22) * 2 + 5
    size = clusters * 512 - 100
    memory = bytearray(-(-clusters // 8))
    full = ClusterBitmap.over(size, 512, memoryview(memory))
    full.set_all()
    done = ClusterBitmap(size, 512)
    for offset in (0, (1 << 22) * 512, (clusters - 1) * 512):
        done.set(Extent(offset, min(512, size - offset)))

    rest = full.minus(done)

    assert len(full) == len(ClusterBitmap.over(size, 512, memoryview(memory))) == clusters
    assert memory[-1] == 0b1111_1000
    assert len(rest) == clusters - 3 == rest.bits.count(1)
    assert not any(rest.any(offset, 1) for offset in (0, (1 << 22) * 512, (clusters - 1) * 512))
    assert rest.all(512, ((1 << 22) - 1) * 512)
