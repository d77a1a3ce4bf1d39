"""Backups as steps of transactions: one instant for all, and nothing has changed after a refusal."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from nbdbackup.bitmap import dirty
from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.daemon.transaction import Action, Transactions
from nbdbackup.errors import ConflictError, NbdBackupError
from nbdbackup.job.job import CANCELLED_TEXT
from nbdbackup.job.sync import BitmapSyncMode, Sync, SyncMode
from nbdbackup.monitor.services_backup import BackupRequest, TargetNode, TargetPath
from tests.support.daemon import Daemon, Leftovers, composed
from tests.support.fleecing import make_gate, noise, open_all_gates
from tests.support.gated import settle
from tests.support.jobs import EventLog

SIZE = 3 * 65536 + 513
CLUSTER = 65536
REFUSAL = ConflictError("Transaction aborted using Abort action")


@pytest.fixture(autouse=True)
async def _gates_are_opened() -> AsyncIterator[None]:
    yield
    await open_all_gates()


class Bench:
    """Two disks with a bitmap b0 each, whose clusters 1 and 3 are dirty, and targets for them."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.bitmaps: dict[tuple[str, str], DirtyBitmap] = {}
        self.transactions = Transactions()
        self.sources = {name: self._add(name, noise(SIZE)) for name in ("a", "b")}
        self.targets = {name: self._add(name, b"\xee" * SIZE) for name in ("ta", "tb")}
        self.target_gate = make_gate(self.targets["tb"])
        self.daemon.add("slow", self.target_gate)
        for name in ("a", "b"):
            bitmap = DirtyBitmap("b0", SIZE, CLUSTER)
            bitmap.mark(CLUSTER, 1)
            bitmap.mark(3 * CLUSTER, 1)
            self.bitmaps[name, "b0"] = bitmap
            daemon.graph.entry(name).bitmaps.add(bitmap)

    def _add(self, name: str, content: bytes) -> MemoryDevice:
        device = MemoryDevice(SIZE, name)
        device.data[:] = content
        self.daemon.add(name, device)
        return device

    async def run(self, *requests: BackupRequest, fail: bool = False, grouped: bool = False) -> None:
        steps = [self.daemon.backups.action(request) for request in requests]
        failing = [self.transactions.failing(REFUSAL)] if fail else []
        await self.transactions.run([*steps, *failing], grouped=grouped)

    async def end(self, job_id: str) -> str | None:
        job = self.daemon.jobs.get(job_id)
        async with asyncio.timeout(20):
            await job.wait_concluded()
        return job.error

    def dirty(self, name: str) -> list[int]:
        bitmap = self.bitmaps[name, "b0"]
        return [run.offset // CLUSTER for run in bitmap.dirty_runs()]

    def assert_untouched(self) -> None:
        assert self.daemon.is_quiet()
        for name in ("a", "b"):
            assert not self.bitmaps[name, "b0"].busy
            assert self.dirty(name) == [1, 3]
        for entry in ("a", "b", "ta", "tb", "slow"):
            assert self.daemon.graph.entry(entry).users == []


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with composed(tmp_path) as daemon:
        yield Bench(daemon)


def to_node(name: str, target: str | None = None) -> BackupRequest:
    return BackupRequest(
        name,
        TargetNode(target or f"t{name}"),
        Sync(SyncMode.INCREMENTAL, "b0"),
        job_id=f"j{name}",
        auto_dismiss=False,
    )


async def test_incremental_backups_of_two_disks_are_of_one_instant(bench: Bench) -> None:
    await bench.run(to_node("a"), to_node("b"))
    for name in ("a", "b"):
        assert await bench.end(f"j{name}") is None
        source, target = bench.sources[name].data, bench.targets[f"t{name}"].data
        for number in range(4):
            piece = slice(number * CLUSTER, min((number + 1) * CLUSTER, SIZE))
            assert (target[piece] == source[piece]) == (number in (1, 3))
        assert bench.dirty(name) == []
        assert bench.daemon.graph.entry(f"t{name}").users == []


async def test_a_later_step_that_fails_undoes_the_backups(bench: Bench, tmp_path: Path) -> None:
    log = EventLog(bench.daemon.jobs)
    before = Leftovers(tmp_path, bench.daemon.scratch)
    to_path = replace(
        to_node("b"), target=TargetPath(str(tmp_path / "new.img")), scratch=str(bench.daemon.scratch)
    )
    with pytest.raises(ConflictError, match="aborted using Abort action"):
        await bench.run(to_node("a"), to_path, fail=True)
    bench.assert_untouched()
    await before.assert_none()
    assert log.summary == ["created", "created", *["aborting", "concluded", "null"] * 2]
    await bench.run(to_node("a"), to_node("b"))
    assert await bench.end("ja") is None


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (replace(to_node("b"), job_id="ja"), "Job ID 'ja' already in use"),
        (to_node("b", "ta"), "Node 'ta' is busy"),
        (replace(to_node("a"), target=TargetNode("tb"), job_id="j2"), "'b0' is currently in use"),
        (replace(to_node("b"), target=TargetNode("b")), "Source and target cannot be the same"),
        (replace(to_node("b"), speed=-1), "non-negative"),
    ],
)
async def test_what_the_second_is_refused_for_undoes_the_first(
    bench: Bench, second: BackupRequest, text: str
) -> None:
    with pytest.raises(NbdBackupError, match=text):
        await bench.run(to_node("a"), second)
    bench.assert_untouched()


NEVER = BitmapSyncMode.NEVER

IN_ORDER: list[tuple[dict[str, object], str]] = [
    ({"node": "none"}, "Cannot find device='none' nor node-name='none'"),
    ({"target": TargetNode("no")}, "Cannot find device='no' nor node-name='no'"),
    ({"sync": Sync(SyncMode.INCREMENTAL, None)}, "must provide a valid bitmap name"),
    ({"sync": Sync(SyncMode.INCREMENTAL, "no")}, "Bitmap 'no' could not be found"),
    ({"sync": Sync(SyncMode.FULL, "b0", NEVER)}, "Bitmap sync mode 'never' has no meaningful effect"),
    ({"target": TargetNode("a")}, "Source and target cannot be the same"),
    ({"compress": True}, "Compression is not supported for this drive"),
    ({"target": TargetNode("used")}, "Node 'used' is busy: block device is in use by block job: backup"),
    ({"workers": 0}, "max-workers must be between"),
    ({"target": TargetNode("small")}, "Source and target image have different sizes"),
    ({"target": TargetNode("read-only")}, "Could not create node: Block node is read-only"),
    ({"filter_node_name": "a"}, "Could not create node: Duplicate nodes with node-name='a'"),
    ({"job_id": "0"}, "Invalid job ID '0'"),
    ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
]


@pytest.mark.parametrize("first", range(len(IN_ORDER)))
async def test_of_several_reasons_to_refuse_the_user_hears_qemus_first(bench: Bench, first: int) -> None:
    bench.daemon.graph.insert("small", MemoryDevice(SIZE - 1), "raw", "", False)
    bench.daemon.graph.insert("read-only", MemoryDevice(SIZE), "raw", "", True)
    bench.daemon.graph.insert("used", MemoryDevice(SIZE), "raw", "", False)
    bench.daemon.graph.entry("used").users.append("a backup's target")
    changes, text = IN_ORDER[first]
    for later, _ in IN_ORDER[first + 1 :]:
        # Where two are about the same argument, the first one counts.
        changes = later | changes
    request = replace(to_node("a"), **changes)
    with pytest.raises(NbdBackupError) as caught:
        await bench.daemon.backups.start(request)
    assert str(caught.value).startswith(text)
    bench.assert_untouched()


@pytest.mark.parametrize("grouped", [True, False])
async def test_with_grouped_completion_one_failure_leaves_both_bitmaps_as_they_were(
    bench: Bench, grouped: bool
) -> None:
    bench.target_gate.kinds.add("write")
    await bench.run(to_node("a"), to_node("b", "slow"), grouped=grouped)
    write = await bench.target_gate.wait_pending("write")
    await settle()
    bench.target_gate.fail(write, 5)
    bench.target_gate.open_gate()
    error = await bench.end("jb")
    assert error is not None
    assert error.startswith("writing the target failed")
    assert bench.dirty("b") == [1, 3]
    if grouped:
        assert await bench.end("ja") == CANCELLED_TEXT
        assert bench.dirty("a") == [1, 3]
    else:
        assert await bench.end("ja") is None
        assert bench.dirty("a") == []


async def test_a_fleecing_incremental_saves_only_what_it_will_copy(bench: Bench, tmp_path: Path) -> None:
    node = bench.daemon.graph.get("a")
    before = bytes(bench.sources["a"].data)
    target = TargetPath(str(tmp_path / "new.img"))
    request = replace(
        to_node("a"), target=target, scratch=str(bench.daemon.scratch), speed=1, chunk_bytes_max=CLUSTER
    )
    await bench.daemon.backups.start(request)
    job = bench.daemon.jobs.get("ja")
    for number in range(4):
        await node.write(number * CLUSTER, b"new")
    snapshot = job._snapshot  # type: ignore[attr-defined]
    assert [snapshot.block_copy.done.any(number * CLUSTER, 1) for number in (0, 2)] == [False, False]
    assert snapshot.plan.scratch.bytes_used <= 2 * CLUSTER
    job.set_speed(0)
    assert await bench.end("ja") is None
    copied = (tmp_path / "new.img").read_bytes()
    assert copied[CLUSTER : 2 * CLUSTER] == before[CLUSTER : 2 * CLUSTER]
    assert copied[3 * CLUSTER :] == before[3 * CLUSTER :]
    assert copied[:CLUSTER] == bytes(CLUSTER)


class Slow(Action):
    """A step that takes its time to get ready."""

    def __init__(self) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def ready(self) -> None:
        self.reached.set()
        await self.go_on.wait()


@pytest.mark.parametrize("scratch", ["none", "directory"])
@pytest.mark.parametrize("change", ["written", "cleared", "much written", "written in many places"])
async def test_what_becomes_dirty_before_the_instant_is_copied_too(
    bench: Bench, tmp_path: Path, change: str, scratch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "much written":
        monkeypatch.setattr(dirty, "FREEZE_CHANGES_MAX", 1)
    elif change == "written in many places":
        monkeypatch.setattr(dirty, "RUNS_MAX", 1)
    new = TargetPath(str(tmp_path / "new.img"))
    place = str(bench.daemon.scratch) if scratch == "directory" else scratch
    step, slow = bench.daemon.backups.action(replace(to_node("a"), target=new, scratch=place)), Slow()
    running = asyncio.ensure_future(bench.transactions.run([step, slow]))
    await asyncio.wait_for(slow.reached.wait(), 10)
    bitmap = bench.bitmaps["a", "b0"]
    if change == "cleared":
        bitmap.clear()
    bitmap.mark(0, 1)
    bitmap.mark(2 * CLUSTER, 1)
    slow.go_on.set()
    await asyncio.wait_for(running, 10)
    assert await bench.end("ja") is None
    copied, content = (tmp_path / "new.img").read_bytes(), bytes(bench.sources["a"].data)
    if change == "cleared":
        content = b"".join(
            content[number * CLUSTER : (number + 1) * CLUSTER] if number in (0, 2) else bytes(CLUSTER)
            for number in range(4)
        )[:SIZE]
    assert copied == content
    assert bench.dirty("a") == []
    assert not bitmap._freezes


async def test_sync_none_has_no_use_for_scratch(bench: Bench) -> None:
    request = replace(to_node("a"), sync=Sync(SyncMode.NONE), scratch=str(bench.daemon.scratch))
    with pytest.raises(NbdBackupError, match="no use for scratch"):
        await bench.daemon.backups.start(request)
    bench.assert_untouched()


async def test_a_start_that_is_cancelled_while_the_disk_is_drained_leaves_nothing(bench: Bench) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    node = bench.daemon.add("busy", gate)
    gate.kinds.add("write")
    writing = asyncio.ensure_future(node.write(0, b"x"))
    await gate.wait_pending("write")
    starting = asyncio.ensure_future(bench.run(to_node("a"), BackupRequest("busy", TargetNode("tb"))))
    await settle()
    assert bench.daemon.graph.entry("ta").users
    starting.cancel()
    await asyncio.wait([starting])
    gate.open_gate()
    await writing
    bench.assert_untouched()
