"""Arithmetic of ranges."""

from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.extents import Allocation, Extent, StatusExtent, merge_status

LIMIT = 1000
extents = st.integers(0, LIMIT).flatmap(
    lambda start: st.builds(Extent, st.just(start), st.integers(0, LIMIT - start))
)
granularities = st.sampled_from([1, 2, 16, 64, 512])


def bytes_of(extent: Extent) -> set[int]:
    return set(range(extent.offset, extent.end))


@given(extents, extents)
def test_overlap_is_a_common_byte(one: Extent, other: Extent) -> None:
    if one.length and other.length:
        assert one.overlaps(other) == bool(bytes_of(one) & bytes_of(other))


@given(extents, granularities)
def test_aligned_out_is_the_granules_touched(extent: Extent, granularity: int) -> None:
    grown = extent.aligned_out(granularity, LIMIT)
    assert bytes_of(extent) <= bytes_of(grown)
    assert grown.offset % granularity == 0
    assert grown.end % granularity == 0 or grown.end == LIMIT
    if extent.length:
        touched = {byte // granularity for byte in bytes_of(extent)}
        assert {byte // granularity for byte in bytes_of(grown)} == touched


@given(extents, granularities)
def test_aligned_in_is_the_granules_covered(extent: Extent, granularity: int) -> None:
    shrunk = extent.aligned_in(granularity, LIMIT)
    covered = set()
    for start in range(0, LIMIT, granularity):
        granule = set(range(start, min(start + granularity, LIMIT)))
        if granule <= bytes_of(extent):
            covered |= granule
    assert bytes_of(shrunk) == covered
    assert extent.offset <= shrunk.offset <= extent.end


@given(extents, st.integers(1, 300))
def test_split_covers_the_extent_in_order(extent: Extent, length_max: int) -> None:
    pieces = list(extent.split(length_max))
    assert [byte for piece in pieces for byte in range(piece.offset, piece.end)] == sorted(bytes_of(extent))
    assert all(0 < piece.length <= length_max for piece in pieces)


def test_merge_joins_equal_neighbours_and_drops_empty_ones() -> None:
    data, zero = Allocation.DATA, Allocation.ZERO
    merged = merge_status(
        [
            StatusExtent(1, data),
            StatusExtent(0, zero),
            StatusExtent(2, data),
            StatusExtent(4, zero),
            StatusExtent(8, zero),
        ]
    )
    assert merged == [StatusExtent(3, data), StatusExtent(12, zero)]
