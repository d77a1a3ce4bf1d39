"""The power goes at any moment: no clean bit over changed data, no wrong backup, no wrong snapshot.

The daemon's own code runs over real files while `power_loss` records what of them a loss of power may leave:
the disk, the bitmaps with their mappings, the chain of checkpoints, snapshots and targets. From what may be
left at many moments a daemon is then started, on another boot, with `--bitmap-durability power`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from bitarray import bitarray
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nbdbackup.bitmap import store as bitmap_store
from nbdbackup.bitmap.file import BitmapFile
from nbdbackup.bitmap.identity import SourceIdentity, SourceKind
from nbdbackup.block.executor import IoExecutor
from nbdbackup.block.file import FileDevice
from nbdbackup.daemon import stored_bitmaps, stored_snapshots
from nbdbackup.daemon.stored_bitmaps import StoredBitmaps
from nbdbackup.daemon.stored_snapshots import StoredSnapshots
from nbdbackup.daemon.transaction import run_transaction
from nbdbackup.fleece import snapshot_store
from nbdbackup.fleece.snapshot_file import SnapshotFile
from nbdbackup.fleece.snapshot_format import SnapshotFlags
from nbdbackup.fleece.snapshot_store import SnapshotStore
from nbdbackup.job.sync import BitmapSyncMode, Sync, SyncMode
from nbdbackup.monitor.services_backup import BackupRequest, TargetPath
from nbdbackup.monitor.services_bitmaps import BitmapAdd, BitmapClear, BitmapMerge, BitmapRemove
from nbdbackup.monitor.services_snapshots import SnapshotOptions
from tests.support.daemon import Daemon, composed
from tests.support.power_loss import Platter, Tree, recording

MEMORY = "/dev/shm"
"""Where a sync costs nothing."""
GRANULE = 65536
GRANULES = 8
SIZE = GRANULES * GRANULE
BOOT, NEXT_BOOT = b"b" * 16, b"c" * 16
LIMIT_S = 100.0
IDENTITY = SourceIdentity(SourceKind.LOCAL_FILE, SIZE, device=5, inode=77, mtime_ns=1, ctime_ns=1)
"""Of the disk, whatever happens to it: its times may be as old as its content."""

Step = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Known:
    """What a loss of power must not take back."""

    claims: dict[str, bytes]
    """What a backup holds, by the checkpoint or bitmap that says what differs from it."""
    checkpoints: frozenset[str]
    snapshots: dict[str, bytes]
    """What each shows, if it can be read."""
    promised: frozenset[str]
    """Snapshots that have to be in the list, broken or not."""
    full: dict[str, bytes]
    """Backups, by their targets' names."""
    increments_valid: bool


@dataclass
class World:
    """A daemon that serves `disk` in `root`, and what its user knows."""

    root: Path
    known: Known = field(default_factory=lambda: Known({}, frozenset(), {}, frozenset(), {}, False))
    number: int = 0
    where: int = 0
    """Where the writes in the middle of a command go."""

    def note(self) -> object:
        return self.known

    async def do(self, daemon: Daemon, step: Step) -> None:
        """A command, and writes while it is carried out."""
        what, where, value = step
        self.where = where
        delays = (value % 5, 5 + value % 7, 8 + value % 11, 20 + value % 20)
        await asyncio.gather(
            self._command(daemon, what, value),
            *(
                self._write(daemon, where + number * GRANULE // 2, value + number, delay)
                for number, delay in enumerate(delays)
            ),
        )

    async def _write(self, daemon: Daemon, where: int, value: int, delay: int = 0) -> None:
        """After so many turns of the event loop."""
        for _ in range(delay):
            await asyncio.sleep(0)
        node, data = daemon.graph.get("disk"), bytes([value % 256]) * 1024
        if not node.write_nowait(where % (SIZE - 1024), data):
            await node.write(where % (SIZE - 1024), data)

    async def _command(self, daemon: Daemon, what: str, value: int) -> None:
        commands: dict[str, Callable[[Daemon, int], object]] = {
            "flush": self._flush,
            "checkpoint": self._checkpoint,
            "delete": self._delete,
            "pull": self._pull,
            "clear": self._clear,
            "remove": self._remove,
            "merge": self._merge,
            "increment": self._increment,
            "snapshot": self._snapshot,
            "drop": self._drop,
        }
        if what in commands:
            result = commands[what](daemon, value)
            assert asyncio.iscoroutine(result)
            await result

    def _name(self, kind: str) -> str:
        self.number += 1
        return f"{kind}{self.number}"

    def _claim(self, name: str, content: bytes | None) -> None:
        claims = dict(self.known.claims)
        claims.pop(name, None)
        if content is not None:
            claims[name] = content
        self.known = replace(self.known, claims=claims)

    async def _flush(self, daemon: Daemon, value: int) -> None:
        await daemon.graph.get("disk").flush()

    async def _checkpoint(self, daemon: Daemon, value: int) -> None:
        name = self._name("c")
        await daemon.checkpoints.create(["disk"], SnapshotOptions(name=name, temporary=True))
        self.known = replace(self.known, checkpoints=self.known.checkpoints | {name})
        self._claim(name, await _view(daemon, f"disk@{name}"))
        await daemon.snapshots.drop([f"disk@{name}"])

    async def _delete(self, daemon: Daemon, value: int) -> None:
        names = [info.name for info in daemon.checkpoints.list()]
        if names:
            name = names[value % len(names)]
            self.known = replace(self.known, checkpoints=self.known.checkpoints - {name})
            await daemon.checkpoints.delete([], name)

    async def _pull(self, daemon: Daemon, value: int) -> None:
        await _add(daemon, "b")
        name = self._name("s")
        await daemon.snapshots.create(["disk"], SnapshotOptions(name=name, bitmap="b", temporary=True))
        content = await _view(daemon, f"disk@{name}")
        await self._write(daemon, self.where + 3 * GRANULE, value)
        if value % 4:
            self._claim("b", content)
        await daemon.snapshots.drop([f"disk@{name}"], pulled=bool(value % 4))

    async def _merge(self, daemon: Daemon, value: int) -> None:
        """Bitmap `m` knows from now on what `b` does."""
        await _add(daemon, "b")
        await _add(daemon, "m")
        content = self.known.claims.get("b")
        await run_transaction([daemon.bitmaps.action(BitmapMerge("disk", "m", (("disk", "b"),)))])
        self._claim("m", content)

    async def _remove(self, daemon: Daemon, value: int) -> None:
        """If it comes back it has to know what it knew."""
        if "b" in [bitmap.name for bitmap in daemon.graph.entry("disk").bitmaps]:
            await run_transaction([daemon.bitmaps.action(BitmapRemove("disk", "b"))])
            self._claim("b", None)

    async def _clear(self, daemon: Daemon, value: int) -> None:
        """A full backup to a new file, and bitmap `f` knows from then on what differs from it."""
        await _add(daemon, "f")
        self._claim("f", None)
        name = self._name("full")
        backup = daemon.backups.action(
            BackupRequest("disk", TargetPath(str(self.root / "targets" / name)), auto_dismiss=False)
        )
        view = SnapshotOptions(name=self._name("v"), temporary=True)
        (take,) = daemon.snapshots.actions(["disk"], view)
        await run_transaction([daemon.bitmaps.action(BitmapClear("disk", "f")), take, backup])
        content = await _view(daemon, f"disk@{view.name}")
        self.known = replace(self.known, full={**self.known.full, name: content})
        await backup.job.wait_concluded()
        assert backup.job.error is None
        backup.job.dismiss()
        self._claim("f", content)
        await daemon.snapshots.drop([f"disk@{view.name}"])

    async def _increment(self, daemon: Daemon, value: int) -> None:
        """Bring the file `increments` up to date with bitmap `j`."""
        await _add(daemon, "j")
        sync = SyncMode.BITMAP if self.known.increments_valid else SyncMode.FULL
        mode = BitmapSyncMode.ALWAYS if value % 2 else BitmapSyncMode.ON_SUCCESS
        target = TargetPath(str(self.root / "targets" / "increments"), existing=True)
        request = BackupRequest("disk", target, Sync(sync, "j", mode), auto_dismiss=False)
        job = daemon.jobs.get(await daemon.backups.start(request))
        await self._write(daemon, self.where + 3 * GRANULE, value)
        if value % 3 == 0:
            for _ in range(value % 7):
                await asyncio.sleep(0)
            if job.is_cancellable:
                job.cancel()
        await job.wait_concluded()
        if job.error is None and not job.is_cancelled:
            self.known = replace(self.known, increments_valid=True)
        job.dismiss()

    async def _snapshot(self, daemon: Daemon, value: int) -> None:
        if len(self.known.snapshots) < 2:
            name = self._name("s")
            await daemon.snapshots.create(["disk"], SnapshotOptions(name=name))
            self.known = replace(self.known, promised=self.known.promised | {f"disk@{name}"})
            content = await _view(daemon, f"disk@{name}")
            self.known = replace(self.known, snapshots={**self.known.snapshots, f"disk@{name}": content})

    async def _drop(self, daemon: Daemon, value: int) -> None:
        if self.known.promised:
            name = sorted(self.known.promised)[value % len(self.known.promised)]
            self.known = replace(self.known, promised=self.known.promised - {name})
            await daemon.snapshots.drop([name])


async def _add(daemon: Daemon, name: str) -> None:
    if name not in [bitmap.name for bitmap in daemon.graph.entry("disk").bitmaps]:
        await run_transaction([daemon.bitmaps.action(BitmapAdd("disk", name, persistent=True))])


async def _view(daemon: Daemon, export: str) -> bytes:
    buffer = bytearray(SIZE)
    await daemon.snapshots.live[export].snapshot.view.read(0, buffer)
    return bytes(buffer)


# What is left, and what may be left.


@asynccontextmanager
async def served(root: Path) -> AsyncIterator[Daemon]:
    """A daemon over the files in `root`."""
    stored, kept = StoredBitmaps(root / "bitmaps", power=True), StoredSnapshots(root / "snapshots")
    async with composed(root, stored=stored, kept=kept) as daemon:
        daemon.add("disk", FileDevice.open(str(root / "disk"), lock=False), str(root / "disk"))
        entry = daemon.graph.entry("disk")
        await daemon.bitmaps.load(entry)
        await daemon.snapshots.load(entry)
        yield daemon


def put(tree: Tree, root: Path) -> None:
    for path, content in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def check_files(tree: Tree, known: Known, root: Path) -> None:
    """Targets and snapshots, without a daemon."""
    for name, content in known.full.items():
        assert tree.get(Path("targets", name), content) == content, f"{name} is no whole backup"
    listed = set()
    store = SnapshotStore(root / "snapshots", boot_id=NEXT_BOOT)
    store.open()
    for name, found in store.at_rest.items():
        listed.add(name)
        if found.header is not None and not found.cause:
            _check_snapshot(found.path, tree, known.snapshots.get(name))
    assert known.promised <= listed, f"{known.promised - listed} are forgotten"
    in_use = {
        name
        for name, found in store.at_rest.items()
        if found.header is not None and SnapshotFlags.IN_USE in found.header.flags
    }
    assert not in_use & {snapshot.header.export_name for snapshot in store.load("disk", IDENTITY)}


def _check_snapshot(sidecar: Path, tree: Tree, expected: bytes | None) -> None:
    """If it was saved when the server stopped, it is what it shows."""
    file = SnapshotFile.open(sidecar)
    header, done, access = file.header, file.done(), file.access()
    if SnapshotFlags.IN_USE not in header.flags and header.maps_checksum == file.maps_checksum():
        assert expected is not None
        (scratch,) = [data for path, data in tree.items() if path.name == Path(header.scratch.path).name]
        for offset in range(0, SIZE, GRANULE):
            if access.any(offset, 1):
                held = scratch if done.any(offset, 1) else tree[Path("disk")]
                assert held[offset : offset + GRANULE] == expected[offset : offset + GRANULE]
    file.close()


async def check_bitmaps(tree: Tree, known: Known, root: Path) -> None:
    """What differs from a backup is dirty; nothing is refused or inconsistent."""
    stored = StoredBitmaps(root / "bitmaps", power=True)
    async with composed(root, stored=stored) as daemon:
        daemon.add("disk", FileDevice.open(str(root / "disk"), lock=False))
        entry = daemon.graph.entry("disk")
        await daemon.bitmaps.load(entry)
        disk = tree[Path("disk")]
        chain = [info.name for info in daemon.checkpoints.list()]
        assert not [f"{bitmap}: {bitmap.inconsistent}" for bitmap in entry.bitmaps if bitmap.inconsistent]
        assert known.checkpoints <= set(chain), f"{known.checkpoints - set(chain)} are forgotten"
        claims = dict(known.claims)
        if known.increments_valid:
            claims["j"] = tree[Path("targets", "increments")]
        for name, backup in claims.items():
            names = chain[chain.index(name) :] if name in chain else [name]
            bitmaps = [bitmap for bitmap in entry.bitmaps if bitmap.name in names]
            dirty = bitarray(GRANULES)
            for bitmap in bitmaps:
                dirty |= bitmap.frozen_copy()._planes.own[:GRANULES]
            changed = {
                number
                for number in range(GRANULES)
                if backup[number * GRANULE : (number + 1) * GRANULE]
                != disk[number * GRANULE : (number + 1) * GRANULE]
            }
            clean = changed - set(dirty.search(bitarray("1")))
            assert not bitmaps or not clean, f"{name}: {clean} changed, and are clean in {names}"


class WatchedPlane(bitarray):
    """A plane that changes half by half."""

    platter: Platter

    def _in_halves(self, new: bitarray) -> None:
        half = len(self) // 2
        for piece in (slice(0, half), slice(half, len(self))):
            bitarray.__setitem__(self, piece, new[piece])
            self.platter.moment()

    def setall(self, value: int) -> None:
        self._in_halves(bitarray([value]) * len(self))

    def __ior__(self, other: bitarray) -> "WatchedPlane":
        self._in_halves(bitarray(self) | bitarray(other))
        return self


async def run_inline(
    self: IoExecutor, function: Callable[..., object], /, *args: object, **more: object
) -> object:
    """What should go to a thread, in this one, while others do something before and after it."""
    del self
    await asyncio.sleep(0)
    result = function(*args, **more)
    await asyncio.sleep(0)
    return result


def watch_stores(patch: pytest.MonkeyPatch, platter: Platter) -> None:
    for kind in (BitmapFile, SnapshotFile):
        store = kind._store

        def watched(self: object, number: int, slot: bytes, store: Callable[..., None] = store) -> None:
            store(self, number, slot)
            platter.moment()

        patch.setattr(kind, "_store", watched)
    patch.setattr(BitmapFile, "plane_type", type("Plane", (WatchedPlane,), {"platter": platter}))


def set_boot(patch: pytest.MonkeyPatch, boot: bytes) -> None:
    for module in (bitmap_store, snapshot_store):
        patch.setattr(module, "current_boot_id", lambda: boot)


async def play(root: Path, script: list[Step], seed: int, share: float) -> list[tuple[Tree, object]]:
    """What the power's going at some moments of `script` may leave in `root`."""
    for name in ("targets", "bitmaps", "snapshots", "scratch"):
        (root / name).mkdir()
    (root / "disk").write_bytes(b"".join(bytes([number + 1]) * GRANULE for number in range(GRANULES)))
    (root / "targets" / "increments").write_bytes(bytes(SIZE))
    world = World(root)
    with (
        recording(root, Random(seed), share, world.note) as platter,
        pytest.MonkeyPatch.context() as patch,
    ):
        watch_stores(patch, platter)
        async with asyncio.timeout(LIMIT_S), served(root) as daemon:
            for step in script:
                await world.do(daemon, step)
        platter.moment()
    return platter.left


def lose_power(script: list[Step], seed: int, share: float = 0.03) -> int:
    """Check what may be left of `script` at this `share` of the moments; how much that is."""
    with TemporaryDirectory(prefix="power-loss-", dir=MEMORY) as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(IoExecutor, "run", run_inline)
        for module in (stored_bitmaps, stored_snapshots):
            patch.setattr(module, "source_identity", lambda device: IDENTITY)
        set_boot(patch, BOOT)
        (Path(name) / "before").mkdir()
        left = asyncio.run(play(Path(name) / "before", script, seed, share))
        set_boot(patch, NEXT_BOOT)
        for number, (tree, known) in enumerate(left):
            assert isinstance(known, Known)
            root = Path(name) / str(number)
            put(tree, root)
            check_files(tree, known, root)
            asyncio.run(check_bitmaps(tree, known, root))
    return len(left)


steps = st.tuples(
    st.sampled_from(
        [
            "write",
            "flush",
            "checkpoint",
            "delete",
            "pull",
            "remove",
            "merge",
            "clear",
            "increment",
            "increment",
            "snapshot",
            "drop",
        ]
    ),
    st.integers(0, SIZE),
    st.integers(0, 255),
)


STORIES: dict[str, list[Step]] = {
    "pull": [("pull", 0, 3), ("pull", 2 * GRANULE, 4), ("write", 5 * GRANULE, 6)],
    "remove": [("pull", 0, 3), ("remove", 4 * GRANULE, 10), ("write", 5 * GRANULE, 9)],
    "merge": [("pull", 0, 3), ("merge", 4 * GRANULE, 9), ("pull", 5 * GRANULE, 5)],
    "delete": [("checkpoint", 0, 3), ("checkpoint", GRANULE, 7), ("delete", 4 * GRANULE, 1)],
    "increment": [("increment", 0, 2), ("increment", 2 * GRANULE, 4), ("increment", 3 * GRANULE, 3)],
    "clear": [("clear", GRANULE, 3), ("write", 3 * GRANULE, 9), ("clear", 0, 5)],
    "snapshot": [("snapshot", GRANULE, 3), ("write", 3 * GRANULE, 9), ("drop", 0, 0), ("snapshot", 9, 1)],
}


@pytest.mark.parametrize("story", STORIES)
def test_no_bit_is_clean_over_changed_data_after_a_loss_of_power(story: str) -> None:
    assert lose_power(STORIES[story], seed=2, share=0.2) > 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_bit_is_clean_over_changed_data_wherever_the_power_goes_in_a_story() -> None:
    left = sum(lose_power(story, seed, share=1.0) for seed in (1, 2) for story in STORIES.values())
    print(f"{left} states after a loss of power, 0 failures")


def scripts(examples: int) -> Callable[[Callable[[list[Step], int], None]], Callable[[], None]]:
    """The decorated test, for so many scripts and seeds."""

    def decorate(test: Callable[[list[Step], int], None]) -> Callable[[], None]:
        return settings(
            max_examples=examples,
            phases=(Phase.explicit, Phase.reuse, Phase.generate),
            suppress_health_check=[HealthCheck.too_slow],
        )(given(st.lists(steps, min_size=2, max_size=8), st.integers(0, 1 << 32))(test))

    return decorate


@scripts(examples=5)
def test_no_bit_is_clean_over_changed_data_wherever_the_power_goes(script: list[Step], seed: int) -> None:
    lose_power(script, seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@scripts(examples=60)
def test_no_bit_is_clean_over_changed_data_in_many_losses_of_power(script: list[Step], seed: int) -> None:
    lose_power(script, seed, share=0.06)
