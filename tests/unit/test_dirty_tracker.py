"""The dirty tracker marks before it forwards, and also what then fails."""

import errno
from collections.abc import Callable, Coroutine

import pytest

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.extents import Extent
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from tests.support.fleecing import end, start
from tests.support.gated import GatedDevice, settle

SIZE = 8 * 4096 + 7
Change = Callable[[DirtyTracker, int, int], Coroutine[object, object, None]]
CHANGES: dict[str, Change] = {
    "write": lambda tracker, offset, length: tracker.write(offset, bytes(length)),
    "write_zeroes": lambda tracker, offset, length: tracker.write_zeroes(offset, length),
    "trim": lambda tracker, offset, length: tracker.trim(offset, length),
}
EACH_CHANGE = pytest.mark.parametrize("kind", CHANGES)


def make(*kinds: str) -> tuple[GatedDevice, DirtyTracker, DirtyBitmap, DirtyBitmap]:
    gate = GatedDevice(MemoryDevice(SIZE), kinds)
    fine, disabled = DirtyBitmap("fine", SIZE, 4096), DirtyBitmap("disabled", SIZE, 512, enabled=False)
    return gate, DirtyTracker(gate, [fine, disabled]), fine, disabled


@EACH_CHANGE
async def test_a_change_is_marked_before_it_is_forwarded(kind: str) -> None:
    gate, tracker, bitmap, disabled = make(kind)
    changing = start(CHANGES[kind](tracker, 4095, 2))
    await settle()
    assert len(gate.pending) == 1
    assert list(bitmap.dirty_runs()) == [Extent(0, 8192)]
    gate.open_gate()
    await end(changing)
    assert disabled.count == 0


@EACH_CHANGE
async def test_a_change_that_fails_stays_marked(kind: str) -> None:
    gate, tracker, bitmap, _ = make(kind)
    changing = start(CHANGES[kind](tracker, SIZE - 1, 1))
    await settle()
    gate.fail(gate.pending[0], errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await end(changing)
    assert list(bitmap.dirty_runs()) == [Extent(8 * 4096, 7)]


async def test_a_write_done_on_the_spot_is_marked() -> None:
    _, tracker, bitmap, _ = make()
    assert tracker.write_nowait(5 * 4096, b"new")
    assert list(bitmap.dirty_runs()) == [Extent(5 * 4096, 4096)]
    buffer = bytearray(3)
    await tracker.read(5 * 4096, buffer)
    assert buffer == b"new"


@EACH_CHANGE
async def test_nothing_is_marked_for_a_change_of_no_length(kind: str) -> None:
    _, tracker, bitmap, _ = make()
    await CHANGES[kind](tracker, SIZE, 0)
    assert tracker.write_nowait(SIZE, b"")
    assert bitmap.count == 0


async def test_reading_marks_nothing() -> None:
    _, tracker, bitmap, _ = make()
    await tracker.read(0, bytearray(SIZE))
    await tracker.read_sparse(0, bytearray(SIZE))
    await tracker.block_status(0, SIZE)
    await tracker.cache(0, SIZE)
    await tracker.flush()
    tracker.read_nowait(0, bytearray(10))
    assert bitmap.count == 0
