"""What the top layer of a device holds, in whole clusters."""

from collections.abc import Iterator, Sequence

from nbdbackup.extents import ContextExtent, Extent


def allocated_head(known: Sequence[ContextExtent], area: Extent, cluster_bytes: int) -> tuple[Extent, bool]:
    """The head of cluster-aligned `area` of which every cluster is allocated (True), or none is (False).

    `known` is what `BlockDevice.is_allocated` said from the beginning of `area` on. A cluster is allocated
    if a byte of it is, and also if too little is known of it: copying too much is never wrong.
    """
    start = area.offset
    for is_allocated, end in _known_ends(known, area):
        if is_allocated:
            break
        whole_end = end if end == area.end else end // cluster_bytes * cluster_bytes
        if whole_end > start:
            return Extent(start, whole_end - start), False
    stop = min(start + cluster_bytes, area.end)
    for is_allocated, end in _known_ends(known, area):
        if is_allocated:
            stop = max(stop, min(-(-end // cluster_bytes) * cluster_bytes, area.end))
        elif end == area.end > stop or end // cluster_bytes * cluster_bytes > stop:
            break
    return Extent(start, stop - start), True


def _known_ends(known: Sequence[ContextExtent], area: Extent) -> Iterator[tuple[bool, int]]:
    """Neighbours joined: whether allocated, and where that ends."""
    position, previous = area.offset, None
    for extent in known:
        if previous is not None and previous != bool(extent.status):
            yield previous, position
        previous = bool(extent.status)
        position = min(position + extent.length, area.end)
    if previous is not None:
        yield previous, position
