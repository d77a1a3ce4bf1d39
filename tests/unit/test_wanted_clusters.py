"""WantedClusters and Freeze: made while clients write, they miss nothing of what was dirty at the instant."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.bitmap import dirty
from nbdbackup.bitmap.dirty import DirtyBitmap, Freeze, WantedClusters

UNIT = 512
GRANULES = 4 * dirty.WANTED_RUNS
SIZE = GRANULES * UNIT - 100
STEPS_MAX = 8

writes = st.lists(st.integers(0, GRANULES - 1), max_size=20)


def _write(bitmap: DirtyBitmap, granules: list[int]) -> None:
    for granule in granules:
        bitmap.mark(granule * UNIT, 1)


def _every_other(bitmap: DirtyBitmap) -> None:
    _write(bitmap, list(range(0, GRANULES, 2)))


def _while_clients_write(bitmap: DirtyBitmap, pieces: Iterator[None], during: list[list[int]]) -> None:
    rest = iter(during)
    for _ in pieces:
        _write(bitmap, next(rest, []))
    for granules in rest:
        _write(bitmap, granules)


@given(during=st.lists(writes, max_size=STEPS_MAX), cluster_units=st.sampled_from([1, 2, 8, 64]))
def test_what_is_written_while_they_are_made_is_wanted(during: list[list[int]], cluster_units: int) -> None:
    bitmap = DirtyBitmap("b0", SIZE, UNIT)
    _every_other(bitmap)
    wanted = WantedClusters(bitmap, cluster_units * UNIT)

    _while_clients_write(bitmap, wanted.pieces(), during)
    changes = wanted.changes()
    wanted.end()

    assert changes is not None
    for area in changes:
        wanted.clusters.set(area)
    assert wanted.clusters.bits == bitmap.clusters(cluster_units * UNIT).bits


@pytest.mark.parametrize("change", ["clear", "merge", "reclaim"])
def test_they_are_made_again_if_a_user_changed_the_bitmap_meanwhile(change: str) -> None:
    bitmap, other = DirtyBitmap("b0", SIZE, UNIT), DirtyBitmap("b1", SIZE, UNIT)
    _every_other(bitmap)
    _write(other, [1])
    wanted = WantedClusters(bitmap, UNIT)
    for _ in wanted.pieces():
        if change == "clear":
            bitmap.clear()
        elif change == "merge":
            bitmap.merge([other])
        else:
            bitmap.create_successor()
            bitmap.mark(UNIT, 1)
            bitmap.reclaim()
        break

    assert wanted.changes() is None


def test_they_are_made_again_if_too_much_was_written_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty, "FREEZE_CHANGES_MAX", 3)
    bitmap = DirtyBitmap("b0", SIZE, UNIT)
    wanted = WantedClusters(bitmap, UNIT)
    for _ in wanted.pieces():
        pass
    _write(bitmap, [1, 3, 5])
    assert wanted.changes() is not None
    _write(bitmap, [7])
    assert wanted.changes() is None


@given(during=st.lists(writes, max_size=STEPS_MAX), in_successor=st.booleans())
def test_a_frozen_copy_has_all_that_was_written_before_the_instant(
    during: list[list[int]], in_successor: bool
) -> None:
    bitmap = DirtyBitmap("b0", SIZE, UNIT)
    _every_other(bitmap)
    if in_successor:
        bitmap.create_successor()
    freeze = Freeze(bitmap)
    _while_clients_write(bitmap, freeze.pieces(), during)

    frozen = freeze.finish()
    _write(bitmap, list(range(1, GRANULES, 2)))

    written = {granule for granules in during for granule in granules} | set(range(0, GRANULES, 2))
    assert {
        run.offset // UNIT + number for run in frozen.dirty_runs() for number in range(-(-run.length // UNIT))
    } == written
