"""Stored bitmaps against sets of granules, killed at any store, or with the power gone at any moment.

Every change of the file, a half-done one of a plane included, is a *moment* at which the process may die:
what is loaded from the file's bytes then must be dirty wherever the model says so, and where nothing was
under way, nowhere else. If it is loaded frozen for a holder, the frozen bits are all there, and the successor
has all that was recorded since: the holder may end in either way.

For a loss of power the disk has, of each page, what the last sync put there or anything stored since.
"""

from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from bitarray import bitarray
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.bitmap.dirty import DirtyBitmap, Planes, SavedBits
from nbdbackup.bitmap.file import BitmapFile
from nbdbackup.bitmap.stored import StoredBitmap
from nbdbackup.extents import Extent
from tests.support.stored_bitmaps import BOOT, GRANULE, NEXT_BOOT, NOW_NS, SOURCE, make_store

PAGE = 4096
MEMORY = "/dev/shm"
"""Where a sync costs nothing."""
GRANULES = 1000
HOLDER = b"h" * 16


class WatchedFile(BitmapFile):
    """Tells `on_store` before and after each change of the file, and in the middle of it."""

    machine: "StoredBitmapMachine"

    def _store(self, number: int, slot: bytes) -> None:
        self.machine.moment()
        super()._store(number, slot[:60] + bytes(len(slot) - 60))
        self.machine.moment()
        super()._store(number, slot)
        self.machine.moment()

    def sync(self) -> None:
        super().sync()
        self.machine.synced()


class WatchedPlane(bitarray):
    """A plane that changes half by half."""

    machine: "StoredBitmapMachine"

    def _in_halves(self, new: bitarray) -> None:
        self.machine.moment()
        half = len(self) // 2
        bitarray.__setitem__(self, slice(0, half), new[:half])
        self.machine.moment()
        bitarray.__setitem__(self, slice(half, len(self)), new[half:])
        self.machine.moment()

    def setall(self, value: int) -> None:
        new = bitarray(len(self))
        new.setall(value)
        self._in_halves(new)

    def __ior__(self, other: bitarray) -> "WatchedPlane":
        self._in_halves(bitarray(self) | bitarray(other))
        return self

    def __setitem__(self, key: object, value: object) -> None:
        super().__setitem__(key, value)  # type: ignore[call-overload]
        self.machine.moment()


def runs() -> st.SearchStrategy[tuple[int, int]]:
    """Granules, from the first one to before the last one."""
    return st.tuples(st.integers(0, GRANULES - 1), st.integers(1, GRANULES)).map(
        lambda pair: (pair[0], min(pair[0] + pair[1], GRANULES))
    )


class StoredBitmapMachine(RuleBasedStateMachine):
    """One bitmap. `required` is what a crash must not lose; `own` and `successor` are what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.place = TemporaryDirectory(prefix="stored-bitmap-", dir=MEMORY)
        self.watching = False
        self.own: set[int] = set()
        self.successor: set[int] | None = None
        self.enabled = True
        self.holder: bytes | None = None
        self.required: set[int] = set()
        self.frozen: set[int] | None = None
        """What a holder must find of its bits, once nobody but it may end the freeze."""
        self.cleared: tuple[SavedBits, set[int]] | None = None
        self.looked_at: tuple[object, ...] = ()
        self.stored_since: list[set[bytes]] = []

    def teardown(self) -> None:
        if hasattr(self, "bitmap"):
            self.bitmap.file.close()
        self.place.cleanup()

    @initialize(power=st.booleans(), seed=st.integers(0, 1 << 32))
    def make(self, power: bool, seed: int) -> None:
        self.random = Random(seed)
        self.power = power
        store = make_store(Path(self.place.name), power=power)
        bitmap = store.create("disk", "b0", GRANULE, SOURCE)
        store.publish(bitmap)
        self.take(bitmap)

    def take(self, bitmap: StoredBitmap) -> None:
        """Watch the file of `bitmap` from now on."""
        bitmap.file.close()
        file = WatchedFile.open(bitmap.file.path)
        assert isinstance(file, WatchedFile)
        file.machine = self
        file.plane_type = type("Plane", (WatchedPlane,), {"machine": self})
        self.bitmap = StoredBitmap(file, make_store(Path(self.place.name))._run)
        self.synced()
        self.watching = True

    def pages(self) -> list[bytes]:
        data = self.bitmap.file.path.read_bytes()
        return [data[start : start + PAGE] for start in range(0, len(data), PAGE)]

    def synced(self) -> None:
        self.stored_since = [{page} for page in self.pages()]

    def moment(self) -> None:
        """The process may die here."""
        if not self.watching:
            return
        pages = self.pages()
        now = pages, self.required, frozenset(self.frozen or ()), frozenset(self.successor or ())
        if now == self.looked_at:
            return
        self.looked_at = now
        for versions, page in zip(self.stored_since, pages, strict=True):
            versions.add(page)
        self.check(b"".join(pages), BOOT)
        if self.power:
            for _ in range(2):
                left = [self.random.choice(sorted(versions)) for versions in self.stored_since]
                self.check(b"".join(left), NEXT_BOOT)

    def check(self, data: bytes, boot: bytes) -> None:
        """Nothing is lost of a bitmap whose file was left with these bytes."""
        own, successor = self.loaded(data, boot)
        if successor is None:
            assert self.required <= own
            return
        # Frozen: its holder can end that in either way.
        assert self.required <= own | successor
        if self.frozen is not None:
            assert self.frozen <= own
            assert self.successor is not None
            assert self.successor <= successor

    def loaded(self, data: bytes, boot: bytes) -> tuple[set[int], set[int] | None]:
        """What is dirty when the bytes are loaded on that boot, and in the successor if it is frozen then."""
        with TemporaryDirectory(prefix="stored-bitmap-", dir=MEMORY) as name:
            (Path(name) / "b.bitmap").write_bytes(data)
            (bitmap,) = make_store(Path(name), boot, self.power).load("disk", SOURCE)
            try:
                return what_is_loaded(bitmap, self.holder)
            finally:
                bitmap.file.close()

    # What happens.

    @rule(run=runs())
    def write(self, run: tuple[int, int]) -> None:
        first, stop = run
        offset = first * GRANULE
        area = set(range(first, stop))
        settled = self.bitmap.is_settled(offset, min(stop * GRANULE, SOURCE.size) - offset)
        if self.enabled and settled and self.power:
            assert area <= (self.own if self.successor is None else self.successor)
        self.bitmap.mark(offset, min(stop * GRANULE, SOURCE.size) - offset)
        if not settled:
            self.bitmap.file.sync()
        if self.enabled:
            (self.own if self.successor is None else self.successor).update(area)
            self.required = self.required | area
        self.moment()

    @precondition(lambda self: self.successor is None)
    @rule(holder=st.sampled_from([None, HOLDER]))
    def create_successor(self, holder: bytes | None) -> None:
        self.forget()
        self.holder = holder
        self.bitmap.create_successor(holder)
        self.successor = set()
        self.frozen = set(self.own)
        self.moment()

    @precondition(lambda self: self.successor is not None)
    @rule()
    def abdicate(self) -> None:
        # The backup is complete: what it copied is no longer needed, from before the first store on. But who
        # finds the bitmap frozen still finds all that was frozen.
        assert self.successor is not None
        self.required = set(self.successor)
        self.bitmap.abdicate()
        self.own, self.successor, self.frozen, self.holder = self.successor, None, None, None

    @precondition(lambda self: self.successor is not None)
    @rule()
    def reclaim(self) -> None:
        assert self.successor is not None
        self.bitmap.reclaim()
        self.own |= self.successor
        self.successor = self.frozen = self.holder = None

    @precondition(lambda self: self.successor is not None)
    @rule(run=runs())
    def keep_what_was_not_copied(self, run: tuple[int, int]) -> None:
        assert self.successor is not None
        clusters = ClusterBitmap(SOURCE.size, GRANULE)
        end = min(run[1] * GRANULE, SOURCE.size)
        clusters.set(Extent(run[0] * GRANULE, end - run[0] * GRANULE))
        self.bitmap.merge_clusters(clusters)
        self.successor.update(range(*run))
        self.required = self.required | self.successor

    @precondition(lambda self: self.successor is None)
    @rule(before=runs(), during=runs(), succeeds=st.booleans(), holder=st.sampled_from([None, HOLDER]))
    def back_up(
        self, before: tuple[int, int], during: tuple[int, int], succeeds: bool, holder: bytes | None
    ) -> None:
        self.enable(True)
        self.write(before)
        self.create_successor(holder)
        self.write(during)
        if succeeds:
            self.abdicate()
        else:
            self.reclaim()

    @precondition(lambda self: self.successor is None and self.cleared is None)
    @rule(before=runs())
    def fail_to_clear(self, before: tuple[int, int]) -> None:
        self.enable(True)
        self.write(before)
        self.clear()
        self.undo_clear()

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        self.bitmap.enabled = self.enabled = enabled

    @precondition(lambda self: self.successor is None and self.cleared is None)
    @rule()
    def clear(self) -> None:
        before = set(self.own)
        saved = self.bitmap.clear()
        self.own = set()
        self.cleared = saved, before

    @precondition(lambda self: self.cleared is not None)
    @rule()
    def forget(self) -> None:
        if self.cleared is None:
            return
        saved, _ = self.cleared
        self.cleared = None
        self.required = set(self.own)
        self.bitmap.forget(saved)

    @precondition(lambda self: self.cleared is not None)
    @rule()
    def undo_clear(self) -> None:
        assert self.cleared is not None
        saved, before = self.cleared
        self.cleared = None
        # Nobody writes between the two: the node is drained.
        self.own = before
        self.required = set(before)
        self.bitmap.restore(saved)

    @precondition(lambda self: self.successor is None)
    @rule(run=runs(), granularity=st.sampled_from([GRANULE, GRANULE // 2, GRANULE * 4]))
    def merge(self, run: tuple[int, int], granularity: int) -> None:
        other = DirtyBitmap("other", SOURCE.size, granularity)
        end = min(run[1] * GRANULE, SOURCE.size)
        other.mark(run[0] * GRANULE, end - run[0] * GRANULE)
        self.bitmap.merge([other])
        for area in other.dirty_runs():
            self.own.update(range(area.offset // GRANULE, -(-area.end // GRANULE)))
        self.required = self.required | self.own

    @rule(now=st.integers(NOW_NS, NOW_NS * 2))
    def show_life(self, now: int) -> None:
        self.bitmap.file.write_sign_of_life(now)

    @rule()
    def be_killed_and_start_again(self) -> None:
        self.watching = False
        held = set() if self.cleared is None else self.cleared[1]
        store = make_store(Path(self.place.name), power=self.power)
        self.bitmap.file.close()
        (bitmap,) = store.load("disk", SOURCE)
        self.own |= held
        self.cleared = None
        self.start_again_with(bitmap)

    @rule()
    def stop_and_start_again(self) -> None:
        self.forget()
        self.watching = False
        store = make_store(Path(self.place.name), power=self.power)
        store.release(self.bitmap, SOURCE)
        self.bitmap.file.close()
        (bitmap,) = make_store(Path(self.place.name), NEXT_BOOT, self.power).load("disk", SOURCE)
        # Back on the boot that the other moments are on.
        store = make_store(Path(self.place.name), BOOT, True)
        store.release(bitmap, SOURCE)
        bitmap.file.close()
        (bitmap,) = make_store(Path(self.place.name), power=self.power).load("disk", SOURCE)
        self.start_again_with(bitmap)

    def start_again_with(self, bitmap: StoredBitmap) -> None:
        """`bitmap` was loaded: frozen still if it has a holder, and that is there."""
        assert what_is_loaded(bitmap, self.holder) == self.expected()
        if self.holder is None:
            self.own |= self.successor or set()
            self.successor = self.frozen = None
        self.required = self.own | (self.successor or set())
        self.take(bitmap)

    def expected(self) -> tuple[set[int], set[int] | None]:
        """What is to be loaded while nothing is under way."""
        if self.holder is not None:
            return self.own, self.successor
        held = set() if self.cleared is None else self.cleared[1]
        return self.own | (self.successor or set()) | held, None

    @invariant()
    def says_what_the_model_says(self) -> None:
        if not self.watching:
            return
        assert granules(self.bitmap) == self.own
        assert self.bitmap.count == len(self.own)
        assert self.bitmap.successor_count == len(self.successor or ())
        assert self.loaded(b"".join(self.pages()), BOOT) == self.expected()


def what_is_loaded(bitmap: StoredBitmap, holder: bytes | None) -> tuple[set[int], set[int] | None]:
    """What is dirty in `bitmap`, and in its successor if it is frozen: for nobody but `holder`."""
    assert bitmap.inconsistent == ""
    own = granules(bitmap)
    assert bitmap.count == len(own)
    if not bitmap.is_frozen:
        return own, None
    assert bitmap.holder is not None
    assert bitmap.holder == holder
    assert bitmap.awaits_holder
    spare = Planes(bitmap._planes.spare, bitarray())
    successor = granules(DirtyBitmap("successor", bitmap.size, bitmap.granularity, planes=spare))
    assert bitmap.successor_count == len(successor)
    assert granules(bitmap.frozen_bits()) == own
    assert granules(bitmap.frozen_copy()) == own | successor
    return own, successor


def granules(bitmap: DirtyBitmap) -> set[int]:
    return {
        granule
        for run in bitmap.dirty_runs()
        for granule in range(run.offset // GRANULE, -(-run.end // GRANULE))
    }


TestStoredBitmap = StoredBitmapMachine.TestCase
TestStoredBitmap.settings = settings(
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    max_examples=60,
    stateful_step_count=15,
)
