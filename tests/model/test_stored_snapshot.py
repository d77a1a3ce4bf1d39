"""Snapshots that outlive the server, killed at any store: what is loaded then is their point in time.

Every change of the source, of scratch, of a map and of a header, and the middle of each, is a *moment* at
which the process may die. The files' bytes at that moment are loaded as a later server would load them.
"""

import asyncio
import errno
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.bitmap.identity import SourceIdentity, SourceKind
from nbdbackup.block.device import BlockDevice, ReadableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node, drained
from nbdbackup.daemon.stored_snapshots import plan_of
from nbdbackup.errors import DeviceError
from nbdbackup.extents import Extent
from nbdbackup.fleece import snapshot_store
from nbdbackup.fleece.snapshot_file import SnapshotFile
from nbdbackup.fleece.snapshot_format import SnapshotFlags
from nbdbackup.fleece.snapshot_store import NewSnapshot, SnapshotStore, StoredSnapshot
from nbdbackup.fleece.snapshots import Snapshot, make_snapshot_now

CLUSTER = 512
SIZE = 23 * CLUSTER - 7
MEMORY = "/dev/shm"
IDENTITY = SourceIdentity(SourceKind.REMOTE, SIZE, lasting_id="memory")
LIMIT_S = 60.0

Moment = Callable[[], None]
Step = tuple[str, int, int, int]


class WatchedDevice(FilterDevice):
    """Tells of the moments before, in and after each write; every second one has to be awaited."""

    def __init__(self, child: BlockDevice, moment: Moment) -> None:
        super().__init__(child)
        self.moment = moment
        self.fails = False
        self._writes = 0

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        if self.fails:
            raise DeviceError(errno.EIO, "the scratch is dead")
        half = len(data) // 2
        for start, piece in ((offset, data[:half]), (offset + half, data[half:])):
            self.moment()
            await asyncio.sleep(0)
            if len(piece):
                await self.child.write(start, piece, fua)
            self.moment()

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        self._writes += 1
        if self.fails or self._writes % 2:
            return False
        self.moment()
        done = self.child.write_nowait(offset, data)
        self.moment()
        return done


class World:
    """A node over memory, with snapshots in `directory`; `expected` has the bytes of each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.memory = MemoryDevice(SIZE)
        for cluster in range(0, SIZE, 2 * CLUSTER):
            area = Extent(cluster, min(CLUSTER, SIZE - cluster))
            self.memory.write_nowait(area.offset, bytes([cluster // CLUSTER + 1]) * area.length)
        self.node = Node("disk", WatchedDevice(self.memory, self.moment))
        self.expected: dict[str, bytes] = {}
        self.promised: set[str] = set()
        """Those whose `create` has returned, and whose `drop` has not begun."""
        self.discarded: dict[str, set[int]] = {}
        self.live: list[tuple[StoredSnapshot, Snapshot, WatchedDevice]] = []
        self.store = SnapshotStore(directory / "snapshots", boot_id=b"b" * 16)
        self.store.open()
        self.made = 0
        self.moments = 0

    def moment(self) -> None:
        """The process may die here."""
        self.moments += 1
        found = set()
        for path in (self.directory / "snapshots").iterdir():
            copy = self.directory / "copy"
            copy.write_bytes(path.read_bytes())
            if self.check(copy):
                found.add(path.stem.partition("@")[2])
        assert self.promised <= found

    def check(self, sidecar: Path) -> bool:
        """Whether it is of a live snapshot; then it has to show its bytes, or to be broken."""
        try:
            file = SnapshotFile.open(sidecar)
        except DeviceError:
            # Half made; one that was promised is missed by the caller.
            return False
        header, done, access = file.header, file.done(), file.access()
        file.close()
        if SnapshotFlags.LIVE not in header.flags:
            return False
        if header.broken:
            assert "dead" in header.broken
            return True
        scratch, expected = Path(header.scratch.path).read_bytes(), self.expected[header.name]
        for cluster in Extent(0, SIZE).split(CLUSTER):
            where = slice(cluster.offset, cluster.end)
            if access.any(cluster.offset, 1):
                held = scratch if done.any(cluster.offset, 1) else self.memory.data
                assert bytes(held[where]) == expected[where]
            else:
                assert cluster.offset in self.discarded[header.name]
        return True

    async def take(self) -> None:
        name = f"s{self.made}"
        self.made += 1
        new = NewSnapshot("disk", name, CLUSTER, self.directory, None, "break-snapshot", 0)
        stored = self.store.create(new, IDENTITY)
        scratch = WatchedDevice(stored.scratch.child, self.moment)
        stored.scratch.relink(scratch)
        snapshot = make_snapshot_now(plan_of(self.node, stored))
        snapshot.filter.notes_of_breaking.append(stored.note_broken)
        self.discarded[name] = set()
        async with drained(self.node):
            snapshot.insert()
            self.expected[name] = bytes(self.memory.data)
            stored.go_live(snapshot.created)
        self.promised.add(name)
        self.live.append((stored, snapshot, scratch))

    async def drop(self, index: int) -> None:
        stored, snapshot, _ = self.live.pop(index % len(self.live))
        self.promised.discard(stored.header.name)
        stored.withdraw()
        self.moment()
        await snapshot.drop()
        # Nobody saves for it any more.
        await self.write(0, SIZE, 255)
        self.moment()
        stored.remove()
        self.store.retire(stored)
        stored.close()
        self.moment()

    async def write(self, offset: int, length: int, value: int) -> None:
        area = Extent(offset, min(length, SIZE - offset))
        middle = area.offset + area.length // 2
        await asyncio.gather(
            self._write_one(area, value), self._write_one(Extent(middle, area.end - middle), value + 1)
        )

    async def _write_one(self, area: Extent, value: int) -> None:
        data = bytes([value % 256]) * area.length
        if area.length and not self.node.write_nowait(area.offset, data):
            await self.node.write(area.offset, data)

    async def do(self, step: Step) -> None:
        what, first, second, value = step
        match what:
            case "take" if len(self.live) < 3:
                await self.take()
            case "drop" if self.live:
                await self.drop(first)
            case "discard" if self.live:
                stored, snapshot, _ = self.live[value % len(self.live)]
                area = Extent(first, min(second, SIZE - first)).aligned_in(CLUSTER, SIZE)
                if area.length:
                    pieces = {cluster.offset for cluster in area.split(CLUSTER)}
                    self.discarded[stored.header.name] |= pieces
                    await snapshot.view.trim(area.offset, area.length)
            case "fail" if self.live and value % 2:
                self.live[first % len(self.live)][2].fails = True
            case "alive":
                self.store.give_sign_of_life()
            case "write":
                await self.write(first, second, value)
        self.moment()


class WatchedMap(ClusterBitmap):
    """A map that changes half by half."""

    world: World

    def set(self, area: Extent) -> None:
        for piece in self._halves(area):
            super().set(piece)
            self.world.moment()

    def clear(self, area: Extent) -> None:
        for piece in self._halves(area):
            super().clear(piece)
            self.world.moment()

    def _halves(self, area: Extent) -> list[Extent]:
        middle = area.offset + area.length // 2 // CLUSTER * CLUSTER
        return [Extent(area.offset, middle - area.offset), Extent(middle, area.end - middle)]


def watched_file(world: World) -> type[SnapshotFile]:
    """What the store is to use, so that `world` is told of the moments."""

    class WatchedFile(SnapshotFile):
        map_type = type("Map", (WatchedMap,), {"world": world}).over  # type: ignore[attr-defined]

        def _store(self, number: int, slot: bytes) -> None:
            world.moment()
            super()._store(number, slot[:100] + bytes(len(slot) - 100))
            world.moment()
            super()._store(number, slot)
            world.moment()

    return WatchedFile


steps = st.tuples(
    st.sampled_from(["take", "drop", "discard", "fail", "alive", "write", "write", "write", "write"]),
    st.integers(0, SIZE - 1),
    st.integers(1, 5 * CLUSTER),
    st.integers(1, 254),
)


@settings(
    max_examples=25,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(steps, min_size=3, max_size=12))
def test_killed_at_any_store_every_snapshot_shows_its_point_in_time(script: list[Step]) -> None:
    async def play(world: World) -> None:
        async with asyncio.timeout(LIMIT_S):
            await world.take()
            for step in script:
                await world.do(step)
            while world.live:
                await world.drop(0)
        assert not list((world.directory / "snapshots").iterdir())

    with (
        TemporaryDirectory(prefix="stored-snapshot-", dir=MEMORY) as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        world = World(Path(name))
        patch.setattr(snapshot_store, "SnapshotFile", watched_file(world))
        asyncio.run(play(world))
        assert world.moments > 10
