"""DirtyBitmap against sets of granules: whatever is done to it, in whatever order."""

from itertools import pairwise

from bitarray import bitarray
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from nbdbackup.bitmap import dirty
from nbdbackup.bitmap.bits import rescale
from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.bitmap.dirty import DirtyBitmap, Freeze, Planes, SavedBits, granules
from nbdbackup.extents import Extent

UNIT = 512
SIZES = st.integers(1, 40 * UNIT)


def touched(offset: int, length: int, unit: int) -> set[int]:
    """The granules, or clusters, that a range touches."""
    return set(range(offset // unit, (offset + length - 1) // unit + 1)) if length else set()


def bytes_of(numbers: set[int], unit: int, size: int) -> set[int]:
    """Every byte of these granules."""
    return {byte for number in numbers for byte in range(number * unit, min((number + 1) * unit, size))}


def told(bitmap: DirtyBitmap, offset: int, length: int) -> set[int]:
    """The dirty bytes of a range by `status`, asked again until all is known, as a client does."""
    found: set[int] = set()
    end = offset + length
    while offset < end:
        extents = bitmap.status(offset, end - offset)
        assert extents
        assert all(extent.length for extent in extents)
        assert all(a.status != b.status for a, b in pairwise(extents))
        for extent in extents:
            if extent.status:
                found |= set(range(offset, offset + extent.length))
            offset += extent.length
        assert offset <= end
    return found


class DirtyBitmapMachine(RuleBasedStateMachine):
    """One bitmap, and another of any granularity to merge; `own` and `successor` are what must be set."""

    saves = Bundle("saves")

    @initialize(size=SIZES, unit=st.sampled_from((512, 1024, 4096)), other=st.sampled_from((512, 2048, 8192)))
    def make(self, size: int, unit: int, other: int) -> None:
        self.size = size
        self.bitmap = DirtyBitmap("b", size, unit)
        self.other = DirtyBitmap("o", size, other)
        self.own: set[int] = set()
        self.successor: set[int] | None = None
        self.enabled = True
        self.freeze: Freeze | None = None
        self.frozen: list[tuple[DirtyBitmap, set[int]]] = []

    def all_granules(self) -> set[int]:
        return self.own | (self.successor or set())

    @rule(offset=st.integers(0, 40 * UNIT), length=st.integers(1, 40 * UNIT))
    def mark(self, offset: int, length: int) -> None:
        offset %= self.size
        length = min(length, self.size - offset)
        self.bitmap.mark(offset, length)
        if self.enabled:
            marked = touched(offset, length, self.bitmap.granularity)
            (self.own if self.successor is None else self.successor).update(marked)

    @rule(offset=st.integers(0, 40 * UNIT), length=st.integers(1, 4 * UNIT))
    def mark_other(self, offset: int, length: int) -> None:
        offset %= self.size
        self.other.mark(offset, min(length, self.size - offset))

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        self.bitmap.enabled = self.enabled = enabled

    @precondition(lambda self: self.successor is None)
    @rule()
    def create_successor(self) -> None:
        self.bitmap.create_successor()
        self.successor = set()

    @precondition(lambda self: self.successor is not None)
    @rule(keep=st.booleans())
    def end_successor(self, keep: bool) -> None:
        assert self.successor is not None
        if keep:
            self.bitmap.reclaim()
            self.own |= self.successor
        else:
            self.bitmap.abdicate()
            self.own = self.successor
        self.successor = None

    @precondition(lambda self: self.successor is None)
    @rule(target=saves)
    def clear(self) -> tuple[SavedBits, frozenset[int]]:
        before = frozenset(self.own)
        saved = self.bitmap.clear()
        self.own = set()
        return saved, before

    @rule(target=saves)
    def save(self) -> tuple[SavedBits, frozenset[int]]:
        return self.bitmap.save(), frozenset(self.own)

    @precondition(lambda self: self.successor is None)
    @rule(saved=saves)
    def restore(self, saved: tuple[SavedBits, frozenset[int]]) -> None:
        self.bitmap.restore(saved[0])
        self.own = set(saved[1])

    @precondition(lambda self: self.successor is None)
    @rule(times=st.integers(0, 2), itself=st.booleans())
    def merge(self, times: int, itself: bool) -> None:
        self.bitmap.merge([*[self.other] * times, *[self.bitmap] * itself])
        if times:
            for run in self.other.dirty_runs():
                self.own |= touched(run.offset, run.length, self.bitmap.granularity)

    @rule(target=saves, clusters=st.sets(st.integers(0, 40)), unit=st.sampled_from((512, 1024, 4096, 65536)))
    def merge_clusters(self, clusters: set[int], unit: int) -> object:
        bitmap = ClusterBitmap(self.size, unit)
        for number in clusters:
            if number * unit < self.size:
                area = Extent(number * unit, min(unit, self.size - number * unit))
                bitmap.set(area)
                marked = touched(area.offset, area.length, self.bitmap.granularity)
                (self.own if self.successor is None else self.successor).update(marked)
        self.bitmap.merge_clusters(bitmap)
        return multiple()

    @precondition(lambda self: self.freeze is None)
    @rule(pieces=st.sampled_from((0, 1, 100)))
    def begin_to_freeze(self, pieces: int) -> None:
        self.freeze = Freeze(self.bitmap)
        self.pieces = self.freeze.pieces()
        self.copy_pieces(pieces)

    @precondition(lambda self: self.freeze is not None)
    @rule(pieces=st.sampled_from((1, 100)))
    def copy_pieces(self, pieces: int) -> None:
        for _, _ in zip(range(pieces), self.pieces, strict=False):
            pass

    @rule()
    def finish_to_freeze(self) -> None:
        freeze = self.freeze or Freeze(self.bitmap)
        frozen, expected = freeze.finish(), self.all_granules()
        assert told(frozen, 0, self.size) == bytes_of(expected, frozen.granularity, self.size)
        self.frozen.append((frozen, expected))
        self.freeze = None

    @invariant()
    def counts_are_those_of_the_model(self) -> None:
        assert self.bitmap.count == len(self.own)
        assert self.bitmap.successor_count == len(self.successor or ())
        assert self.bitmap.is_frozen == (self.successor is not None)

    @rule(offset=st.integers(0, 40 * UNIT), length=st.integers(1, 40 * UNIT))
    def status_tells_of_each_byte(self, offset: int, length: int) -> None:
        offset %= self.size
        length = min(length, self.size - offset)
        everything = bytes_of(self.all_granules(), self.bitmap.granularity, self.size)
        assert told(self.bitmap, offset, length) == everything & set(range(offset, offset + length))

    @rule(unit=st.sampled_from((512, 1024, 4096, 65536)))
    def clusters_are_rounded_out(self, unit: int) -> None:
        clusters = self.bitmap.clusters(unit)
        expected = {
            cluster for run in self.bitmap.dirty_runs() for cluster in touched(run.offset, run.length, unit)
        }
        found = {n for n in range(-(-self.size // unit)) if clusters.any(n * unit, 1)}
        assert found == expected
        assert len(clusters) == len(expected)
        assert {byte for run in self.bitmap.dirty_runs() for byte in range(run.offset, run.end)} == bytes_of(
            self.own, self.bitmap.granularity, self.size
        )

    def teardown(self) -> None:
        for frozen, expected in getattr(self, "frozen", []):
            assert frozen.count == len(expected)
            frozen.mark(0, frozen.size)
            assert told(frozen, 0, frozen.size) == bytes_of(expected, frozen.granularity, frozen.size)


class SmallPiecesMachine(DirtyBitmapMachine):
    """The same with limits so small that each is met."""

    def __init__(self) -> None:
        super().__init__()
        self._limits = dirty.FREEZE_GRANULES, dirty.FREEZE_CHANGES_MAX, dirty.STATUS_GRANULES_MAX
        dirty.FREEZE_GRANULES, dirty.FREEZE_CHANGES_MAX, dirty.STATUS_GRANULES_MAX = 3, 2, 5
        self._extents_max = dirty.STATUS_EXTENTS_MAX
        self._runs_max = dirty.RUNS_MAX
        dirty.STATUS_EXTENTS_MAX = 2
        dirty.RUNS_MAX = 1

    def teardown(self) -> None:
        super().teardown()
        dirty.FREEZE_GRANULES, dirty.FREEZE_CHANGES_MAX, dirty.STATUS_GRANULES_MAX = self._limits
        dirty.STATUS_EXTENTS_MAX = self._extents_max
        dirty.RUNS_MAX = self._runs_max


TestDirtyBitmap = DirtyBitmapMachine.TestCase
TestDirtyBitmap.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestSmallPieces = SmallPiecesMachine.TestCase
TestSmallPieces.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


@given(
    st.lists(st.booleans(), max_size=300),
    st.sampled_from((1, 2, 4, 8, 16, 32, 64, 128)),
    st.sampled_from((1, 2, 4, 8, 16, 32, 64, 128)),
)
def test_bits_of_another_unit_stand_for_the_same_bytes(bits: list[bool], unit: int, new_unit: int) -> None:
    scaled = rescale(bitarray(bits), unit, new_unit)
    set_bytes = {byte for n, bit in enumerate(bits) if bit for byte in range(n * unit, (n + 1) * unit)}
    assert set(scaled.search(1)) == {byte // new_unit for byte in set_bytes}


def test_planes_may_be_given_with_bits_that_are_set_already() -> None:
    planes = Planes.in_memory(granules(10 * UNIT, UNIT))
    planes.own[3:5] = 1
    bitmap = DirtyBitmap("b", 10 * UNIT, UNIT, planes=planes)
    assert bitmap.count == 2
    assert list(bitmap.dirty_runs()) == [Extent(3 * UNIT, 2 * UNIT)]
