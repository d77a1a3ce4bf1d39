"""Snapshots as users make, list and drop them: all of a set or nothing, and nothing is left over."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import ConflictError, NbdBackupError, NotFoundError, SnapshotError, UsageError
from nbdbackup.monitor.services_snapshots import SnapshotOptions
from nbdbackup.nbd.constants import Command
from tests.support.daemon import Daemon, Leftovers, composed
from tests.support.fleecing import make_gate, open_all_gates
from tests.support.gated import settle
from tests.support.sessions import serving

SIZE = 3 * 65536 + 513
S1 = SnapshotOptions(name="s1")


@pytest.fixture(autouse=True)
async def _gates_are_opened() -> AsyncIterator[None]:
    yield
    await open_all_gates()


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with composed(tmp_path) as daemon:
        daemon.add_file("a", tmp_path / "a.img", b"a" * SIZE)
        daemon.add_file("b", tmp_path / "b.img", b"b" * SIZE)
        yield daemon


async def read(node: Node, length: int = SIZE) -> bytes:
    buffer = bytearray(length)
    async with asyncio.timeout(10):
        await node.read(0, buffer)
    return bytes(buffer)


def export_names(daemon: Daemon) -> list[str]:
    return [export.name for export in daemon.exports]


async def test_a_set_is_exported_under_one_name_and_shows_one_instant(daemon: Daemon) -> None:
    made = await daemon.snapshots.create(["a", "b"], S1)
    assert [info.export for info in made] == ["a@s1", "b@s1"]
    assert [(info.node, info.name, info.size, info.cause) for info in made] == [
        ("a", "s1", SIZE, None),
        ("b", "s1", SIZE, None),
    ]
    assert list(daemon.snapshots.list()) == list(made)
    assert export_names(daemon) == ["a", "b", "a@s1", "b@s1"]
    for name in ("a", "b"):
        await daemon.graph.get(name).write(0, b"new" * 1000)
        assert await read(daemon.exports.get(f"{name}@s1").node) == name.encode() * SIZE
    assert daemon.snapshots.list()[0].scratch_used == 65536


async def test_without_a_name_it_is_the_time(daemon: Daemon) -> None:
    (made,) = await daemon.snapshots.create(["a"], SnapshotOptions())
    assert re.fullmatch(r"\d{8}T\d{6}Z", made.name)


async def test_several_snapshots_of_a_node_are_dropped_in_any_order(daemon: Daemon) -> None:
    node, expected = daemon.graph.get("a"), {}
    for name in ("s1", "s2", "s3"):
        await daemon.snapshots.create(["a"], SnapshotOptions(name=name))
        expected[name] = await read(node)
        await node.write(0, name.encode() * 30000)
    for dropped in ("s2", "s1", "s3"):
        for name, content in expected.items():
            assert await read(daemon.exports.get(f"a@{name}").node) == content
        await daemon.snapshots.drop([f"a@{dropped}"])
        del expected[dropped]
        await node.write(SIZE - 10, dropped.encode())
    assert daemon.is_quiet()


@pytest.mark.parametrize(
    ("nodes", "options", "error", "text"),
    [
        ([], S1, UsageError, "at least one node"),
        (["a", "a"], S1, UsageError, "named twice"),
        (["a", "c"], S1, NotFoundError, "node-name='c'"),
        *(
            (["a"], SnapshotOptions(name=name), UsageError, "cannot name")
            for name in ("", "a@b", "a/b", "a b")
        ),
        (["a"], SnapshotOptions(name="x" * 256), UsageError, "1 to 255"),
        (["a"], SnapshotOptions(name="a\nb"), UsageError, "printable"),
        (["a", "b"], SnapshotOptions(name="s1", scratch="/no/such"), UsageError, "needs one"),
        (["a"], SnapshotOptions(name="s1", scratch="/no/such/place"), NotFoundError, "/no/such/place"),
    ],
)
async def test_what_is_refused_changes_nothing(
    daemon: Daemon,
    tmp_path: Path,
    nodes: list[str],
    options: SnapshotOptions,
    error: type[NbdBackupError],
    text: str,
) -> None:
    before = Leftovers(tmp_path, daemon.scratch)
    with pytest.raises(error, match=text):
        await daemon.snapshots.create(nodes, options)
    assert daemon.is_quiet()
    assert export_names(daemon) == ["a", "b"]
    await before.assert_none()


async def test_a_name_that_is_taken_is_refused_for_the_whole_set(daemon: Daemon) -> None:
    await daemon.snapshots.create(["b"], S1)
    with pytest.raises(ConflictError, match="b@s1 exists already"):
        await daemon.snapshots.create(["a", "b"], S1)
    assert export_names(daemon) == ["a", "b", "b@s1"]
    assert not list(daemon.graph.get("a").filters)


async def test_a_name_that_no_client_could_ask_for_is_refused(daemon: Daemon) -> None:
    daemon.add("c" * 4000, MemoryDevice(SIZE))
    with pytest.raises(UsageError, match="too long"):
        await daemon.snapshots.create(["a", "c" * 4000], SnapshotOptions(name="x" * 255))
    assert daemon.is_quiet()


async def test_scratch_that_fails_for_the_second_node_undoes_the_first(
    daemon: Daemon, tmp_path: Path
) -> None:
    daemon.add("huge", MemoryDeviceOfSize(1 << 62))
    before = Leftovers(tmp_path, daemon.scratch)
    with pytest.raises(NbdBackupError, match="cannot make scratch"):
        await daemon.snapshots.create(["a", "huge"], S1)
    assert daemon.is_quiet()
    await before.assert_none()


class MemoryDeviceOfSize(MemoryDevice):
    """Claims to be larger than it is."""

    def __init__(self, size: int) -> None:
        super().__init__(512)
        self.size = size


async def test_of_two_creates_of_one_name_at_once_one_is_refused(daemon: Daemon) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    node = daemon.add("c", gate)
    gate.kinds.add("write")
    writing = asyncio.ensure_future(node.write(0, b"x"))
    await gate.wait_pending("write")
    # Both have to wait for the client's write to end.
    creating = [asyncio.ensure_future(daemon.snapshots.create(["c"], S1)) for _ in range(2)]
    await settle()
    gate.open_gate()
    results = await asyncio.gather(*creating, return_exceptions=True)
    await writing
    assert sorted(isinstance(result, ConflictError) for result in results) == [False, True]
    assert [info.export for info in daemon.snapshots.list()] == ["c@s1"]
    assert len(list(node.filters)) == 1


async def test_a_create_that_is_cancelled_leaves_nothing(daemon: Daemon, tmp_path: Path) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    node = daemon.add("c", gate)
    gate.kinds.add("write")
    writing = asyncio.ensure_future(node.write(0, b"x"))
    await gate.wait_pending("write")
    before = Leftovers(tmp_path, daemon.scratch)
    creating = asyncio.ensure_future(daemon.snapshots.create(["a", "c"], S1))
    await settle()
    creating.cancel()
    await asyncio.wait([creating])
    await before.assert_none()
    gate.open_gate()
    await writing
    assert daemon.is_quiet()
    await daemon.snapshots.create(["a", "c"], S1)


# Dropping.


async def test_a_drop_with_an_unknown_name_drops_none(daemon: Daemon) -> None:
    await daemon.snapshots.create(["a"], S1)
    with pytest.raises(NotFoundError, match="a@s2"):
        await daemon.snapshots.drop(["a@s1", "a@s2"])
    assert [info.export for info in daemon.snapshots.list()] == ["a@s1"]
    await daemon.snapshots.drop(["a@s1", "a@s1"])
    assert daemon.is_quiet()


async def test_drops_of_the_same_snapshots_at_once_do_not_meet(daemon: Daemon) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    node = daemon.add("c", gate)
    await daemon.snapshots.create(["c"], S1)
    await daemon.snapshots.create(["a"], S1)
    gate.kinds.add("read")
    reading = asyncio.ensure_future(daemon.exports.get("c@s1").node.read(0, bytearray(512)))
    await gate.wait_pending("read")
    first = asyncio.ensure_future(daemon.snapshots.drop(["c@s1", "a@s1"]))
    await settle()
    with pytest.raises(NotFoundError):
        await daemon.snapshots.drop(["a@s1"])
    gate.open_gate()
    async with asyncio.timeout(10):
        await first
    with pytest.raises(SnapshotError, match="was dropped"):
        await reading
    assert daemon.is_quiet()
    assert not list(node.filters)


async def test_a_drop_that_is_cut_short_is_finished_at_the_end(tmp_path: Path) -> None:
    before = Leftovers()
    async with composed(tmp_path) as daemon:
        gate = make_gate(MemoryDevice(SIZE))
        node = daemon.add("c", gate)
        await daemon.snapshots.create(["c"], S1)
        gate.kinds.add("read")
        reading = asyncio.ensure_future(daemon.exports.get("c@s1").node.read(0, bytearray(512)))
        await gate.wait_pending("read")
        dropping = asyncio.ensure_future(daemon.snapshots.drop(["c@s1"]))
        await settle()
        dropping.cancel()
        await asyncio.wait([dropping])
        gate.open_gate()
        await asyncio.wait([reading])
        assert isinstance(reading.exception(), SnapshotError)
    assert not list(node.filters)
    await before.assert_none()


class FakeClient:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def disconnect(self, reason: str) -> None:
        self.reasons.append(reason)


async def test_a_drop_disconnects_the_views_readers(daemon: Daemon) -> None:
    await daemon.snapshots.create(["a"], S1)
    client = FakeClient()
    daemon.exports.get("a@s1").clients.add(client)
    await daemon.snapshots.drop(["a@s1"])
    assert client.reasons == ["snapshot a@s1 was dropped"]


@pytest.mark.parametrize("saved", [True, False])
async def test_a_drop_ends_the_connection_of_a_reader_in_the_middle_of_a_read(
    saved: bool, daemon: Daemon, tmp_path: Path
) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    node = daemon.add("c", gate)
    before = Leftovers(tmp_path, daemon.scratch)
    await daemon.snapshots.create(["c"], S1)
    if saved:
        await node.write(0, b"new" * 100)
    async with serving(daemon.exports.get("c@s1")) as reader:
        gate.kinds.add("read")
        await reader.client.ask(Command.READ, 0, SIZE)
        frozen = await gate.wait_pending("read")
        # The client's write waits for the frozen read, and the drop for both.
        writing = asyncio.ensure_future(node.write(SIZE - 512, b"x" * 512))
        dropping = asyncio.ensure_future(daemon.snapshots.drop(["c@s1"]))
        await settle()
        assert not dropping.done()
        gate.release(frozen)
        gate.open_gate()
        async with asyncio.timeout(10):
            await dropping
            await writing
        with pytest.raises(ConnectionAbortedError, match="was dropped"):
            await reader.wait_ended()
    assert daemon.is_quiet()
    assert await read(node, 3) == (b"new" if saved else bytes(3))
    await before.assert_none()


async def test_fifty_rounds_leave_no_descriptor_thread_or_file(daemon: Daemon, tmp_path: Path) -> None:
    node = daemon.graph.get("a")
    await node.write(0, b"warm")
    await node.flush()
    before = Leftovers(tmp_path, daemon.scratch)
    for index in range(50):
        await daemon.snapshots.create(["a", "b"], S1)
        await node.write(0, b"%d" % index * 50000)
        await read(daemon.exports.get("a@s1").node)
        await daemon.snapshots.drop(["b@s1", "a@s1"])
    assert daemon.is_quiet()
    await before.assert_none()


async def test_a_full_scratch_breaks_its_snapshot_alone_and_the_list_says_why(daemon: Daemon) -> None:
    await daemon.snapshots.create(["a"], SnapshotOptions(name="s1", scratch_bytes_max=65536))
    await daemon.snapshots.create(["a"], SnapshotOptions(name="s2"))
    await daemon.graph.get("a").write(0, b"x" * SIZE)
    small, large = daemon.snapshots.list()
    assert small.cause is not None
    assert "is full" in small.cause
    assert large.cause is None
    with pytest.raises(SnapshotError, match="is full"):
        await read(daemon.exports.get("a@s1").node)
    assert await read(daemon.exports.get("a@s2").node) == b"a" * SIZE


async def test_scratch_can_be_put_elsewhere_and_never_shows(daemon: Daemon, tmp_path: Path) -> None:
    elsewhere = make_directory(tmp_path / "elsewhere")
    await daemon.snapshots.create(["a", "b"], SnapshotOptions(name="s1", scratch=str(elsewhere)))
    await daemon.snapshots.create(["a"], SnapshotOptions(name="s2", scratch=str(elsewhere / "file")))
    await daemon.graph.get("a").write(0, b"new")
    assert os.listdir(elsewhere) == []


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path
