"""Points in time of nodes that users put together: copy-before-write, snapshot-access, and who may write."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.daemon.graph import Graph
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError, SnapshotError, UsageError
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.monitor.services_backup import BackupRequest, TargetPath
from nbdbackup.monitor.services_exports import ExportRequest
from nbdbackup.monitor.services_graph import (
    BitmapRef,
    CopyBeforeWriteNode,
    NodeDefinition,
    NullNode,
    RawNode,
    SnapshotAccessNode,
)
from nbdbackup.monitor.services_snapshots import SnapshotOptions
from nbdbackup.server.exports import Export, ExportTable
from tests.support.daemon import Daemon, composed
from tests.support.faults import FaultyDevice
from tests.support.gated import GatedDevice

CLUSTER = 64 << 10
SIZE = 4 * CLUSTER
OLD, NEW = b"o" * CLUSTER, b"n" * CLUSTER
CBW = CopyBeforeWriteNode("cbw", "disk", "tmp")
VIEW = SnapshotAccessNode("view", "cbw")


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with composed(tmp_path) as daemon:
        daemon.add_file("disk", tmp_path / "disk.img", b"o" * SIZE)
        daemon.graph.insert("tmp", MemoryDevice(SIZE), "file", "tmp.img", False)
        yield daemon


async def _read(graph: Graph, name: str, offset: int, length: int = CLUSTER) -> bytes:
    buffer = bytearray(length)
    await graph.get(name).read(offset, buffer)
    return bytes(buffer)


async def test_point_in_time_is_the_moment_the_filter_is_added(daemon: Daemon) -> None:
    graph = daemon.graph
    await graph.get("disk").write(CLUSTER, NEW)
    await graph.add(CBW)
    await graph.add(VIEW)
    await graph.get("cbw").write(0, NEW)
    await graph.get("cbw").write(CLUSTER, b"3" * CLUSTER)
    assert [await _read(graph, "view", offset) for offset in (0, CLUSTER, 2 * CLUSTER)] == [OLD, NEW, OLD]
    assert [await _read(graph, "cbw", offset) for offset in (0, CLUSTER)] == [NEW, b"3" * CLUSTER]


@pytest.mark.parametrize("writer", ["disk", "other-name", "cbw"])
async def test_a_write_under_any_name_of_the_disk_is_seen(daemon: Daemon, writer: str) -> None:
    graph = daemon.graph
    await graph.add(RawNode("other-name", "disk"))
    await graph.add(CopyBeforeWriteNode("cbw", "other-name", "tmp"))
    await graph.add(VIEW)
    await graph.get(writer).write(0, NEW)
    assert await _read(graph, "view", 0) == OLD
    assert await _read(graph, "disk", 0) == NEW


async def test_a_client_that_was_there_before_goes_on_and_is_seen(daemon: Daemon) -> None:
    served = next(iter(daemon.exports)).node
    await daemon.graph.add(CBW)
    await daemon.graph.add(VIEW)
    await served.write(0, NEW)
    assert await _read(daemon.graph, "view", 0) == OLD


async def test_without_the_filter_nothing_is_saved_any_more(daemon: Daemon) -> None:
    graph = daemon.graph
    await graph.add(CBW)
    await graph.delete("cbw")
    await graph.get("disk").write(0, NEW)
    assert await _read(graph, "tmp", 0) == bytes(CLUSTER)
    assert daemon.is_quiet()


async def test_discarding_through_the_view_ends_it_there(daemon: Daemon) -> None:
    graph = daemon.graph
    await graph.add(CBW)
    await graph.add(VIEW)
    assert not graph.get("view").read_only
    await graph.get("view").trim(0, CLUSTER)
    with pytest.raises(SnapshotError, match="discarded"):
        await _read(graph, "view", 0)
    with pytest.raises(DeviceError, match="read-only"):
        await graph.get("view").write(0, NEW)


async def test_discarding_is_ignored_unless_it_was_permitted(daemon: Daemon) -> None:
    graph = daemon.graph
    await graph.add(CBW)
    await graph.add(SnapshotAccessNode("view", "cbw", unmap=False))
    await graph.get("view").trim(0, SIZE)
    assert await _read(graph, "view", 0) == OLD


async def test_only_what_the_bitmap_has_is_saved(tmp_path: Path) -> None:
    bitmap = DirtyBitmap("b0", SIZE, CLUSTER)
    bitmap.mark(CLUSTER, 1)

    async with composed(tmp_path) as daemon:
        graph = daemon.graph
        daemon.add("disk", MemoryDevice(SIZE))
        graph.entry("disk").bitmaps.add(bitmap)
        graph.insert("tmp", MemoryDevice(SIZE), "file", "", False)
        await graph.add(CopyBeforeWriteNode("cbw", "disk", "tmp", BitmapRef("disk", "b0")))
        await graph.add(VIEW)
        await graph.get("disk").write(0, b"n" * SIZE)
        assert await _read(graph, "view", CLUSTER) == bytes(CLUSTER)
        for offset in (0, 2 * CLUSTER):
            with pytest.raises(SnapshotError):
                await _read(graph, "view", offset)
        with pytest.raises(NotFoundError, match="Dirty bitmap 'nope' not found"):
            await graph.add(CopyBeforeWriteNode("other", "disk", "tmp", BitmapRef("disk", "nope")))


@pytest.mark.parametrize("policy", OnCbwError)
async def test_policy_says_who_loses_when_the_target_fails(daemon: Daemon, policy: OnCbwError) -> None:
    graph = daemon.graph
    target = FaultyDevice(MemoryDevice(SIZE))
    graph.insert("bad", target, "file", "", False)
    await graph.add(CopyBeforeWriteNode("cbw", "disk", "bad", on_cbw_error=policy))
    await graph.add(VIEW)
    target.inject("write", errno.EIO)
    if policy is OnCbwError.BREAK_GUEST_WRITE:
        with pytest.raises(OSError, match="could not save"):
            await graph.get("cbw").write(0, NEW)
        assert await _read(graph, "view", 0) == OLD
    else:
        await graph.get("cbw").write(0, NEW)
        with pytest.raises(SnapshotError, match="broken"):
            await _read(graph, "view", CLUSTER)
        assert await _read(graph, "cbw", 0) == NEW


@pytest.mark.parametrize("policy", OnCbwError)
async def test_a_target_that_hangs_holds_a_client_for_the_timeout_only(
    daemon: Daemon, policy: OnCbwError
) -> None:
    graph = daemon.graph
    target = GatedDevice(MemoryDevice(SIZE))
    graph.insert("slow", target, "file", "", False)
    await graph.add(CopyBeforeWriteNode("cbw", "disk", "slow", on_cbw_error=policy, cbw_timeout_s=1))
    await graph.add(VIEW)
    async with asyncio.timeout(20):
        if policy is OnCbwError.BREAK_GUEST_WRITE:
            with pytest.raises(OSError, match="cbw-timeout"):
                await graph.get("cbw").write(0, NEW)
        else:
            await graph.get("cbw").write(0, NEW)
            with pytest.raises(SnapshotError, match="cbw-timeout"):
                await _read(graph, "view", 0)
    target.open_gate()


# Who may write.


async def _refuse(daemon: Daemon, definition: NodeDefinition, match: str) -> None:
    before = [node.name for node in daemon.graph.nodes()]
    filters = [list(node.filters) for node in daemon.graph]
    with pytest.raises((ConflictError, UsageError), match=match):
        await daemon.graph.add(definition)
    assert [node.name for node in daemon.graph.nodes()] == before
    assert [list(node.filters) for node in daemon.graph] == filters


async def test_a_target_that_somebody_writes_to_is_refused(daemon: Daemon) -> None:
    daemon.exports.add(Export("tmp", daemon.graph.get("tmp")))
    await _refuse(daemon, CBW, r"on node 'tmp': permissions 'write' .* export 'tmp' .* node 'cbw'")


async def test_nobody_else_may_write_to_a_target(daemon: Daemon) -> None:
    await daemon.graph.add(CBW)
    with pytest.raises(ConflictError, match="on node 'tmp'"):
        await daemon.export_service.add(ExportRequest("e", "tmp", writable=True))
    assert "tmp" not in daemon.exports
    await daemon.export_service.add(ExportRequest("e", "tmp"))
    await _refuse(daemon, CopyBeforeWriteNode("second", "disk", "tmp"), "node 'cbw' .* node 'second'")


async def test_writing_past_a_filter_is_refused(daemon: Daemon) -> None:
    graph = daemon.graph
    await graph.add(RawNode("part", "disk", offset=CLUSTER))
    graph.insert("tmp3", MemoryDevice(SIZE - CLUSTER), "file", "", False)
    past = CopyBeforeWriteNode("cbw", "part", "tmp3")
    await _refuse(daemon, past, "on node 'disk': .* export 'disk' .* node 'part'")
    await daemon.export_service.delete("disk", hard=False)
    await graph.add(past)
    with pytest.raises(ConflictError, match="on node 'disk'"):
        await daemon.export_service.add(ExportRequest("disk", "disk", writable=True))
    await daemon.export_service.add(ExportRequest("part", "part", writable=True))
    await graph.add(VIEW)
    await graph.get("part").write(0, NEW)
    assert await _read(graph, "view", 0) == OLD


@pytest.mark.parametrize("name", ["other-name", "part"])
async def test_snapshots_and_backups_that_could_be_written_past_are_refused(
    daemon: Daemon, name: str, tmp_path: Path
) -> None:
    offset = 0 if name == "part" else None
    await daemon.graph.add(RawNode(name, "disk", offset=offset))
    match = f"on node 'disk': .* export 'disk' .* node '{name}'"
    with pytest.raises(ConflictError, match=match):
        await daemon.snapshots.create([name], SnapshotOptions(name="s1"))
    with pytest.raises(ConflictError, match=match):
        await daemon.backups.start(BackupRequest(name, TargetPath(str(tmp_path / "t.img"))))
    await daemon.export_service.delete("disk", hard=False)
    await daemon.snapshots.create([name], SnapshotOptions(name="s1"))
    with pytest.raises(ConflictError, match="on node 'disk'"):
        await daemon.export_service.add(ExportRequest("e", "disk", writable=True))


@pytest.mark.parametrize("target", ["disk", "name", "part", "cbw"])
async def test_a_target_that_is_the_source_is_refused(daemon: Daemon, target: str) -> None:
    await daemon.graph.add(RawNode("name", "disk"))
    await daemon.graph.add(RawNode("part", "disk", offset=0))
    await daemon.graph.add(CBW)
    await _refuse(daemon, CopyBeforeWriteNode("new", "disk", target), "cannot be the same")


async def test_other_targets_that_will_not_do(daemon: Daemon) -> None:
    graph = daemon.graph
    graph.insert("small", MemoryDevice(SIZE - 1), "file", "", False)
    graph.insert("ro", MemoryDevice(SIZE), "file", "", True)
    await _refuse(daemon, CopyBeforeWriteNode("cbw", "disk", "small"), "different sizes")
    await _refuse(daemon, CopyBeforeWriteNode("cbw", "disk", "ro"), "Block node is read-only")
    await _refuse(daemon, CopyBeforeWriteNode("cbw", "disk", "tmp", cluster_bytes_min=3), "power of 2")
    await _refuse(daemon, SnapshotAccessNode("view", "disk"), "has no point in time")


# Nodes that were defined in place.


async def test_what_was_defined_in_place_goes_with_its_parent(daemon: Daemon) -> None:
    inner = CopyBeforeWriteNode("inner", "disk", NullNode("", SIZE))
    await daemon.graph.add(SnapshotAccessNode("view", inner))
    names = [node.name for node in daemon.graph.nodes()]
    assert names == ["disk", "tmp", "#block001", "inner", "view"]
    with pytest.raises(ConflictError, match="Node inner is not owned by the monitor"):
        await daemon.graph.delete("inner")
    with pytest.raises(ConflictError, match="Node disk is in use: by export 'disk'"):
        await daemon.graph.delete("disk")
    await daemon.graph.delete("view")
    assert [node.name for node in daemon.graph.nodes()] == ["disk", "tmp"]
    assert daemon.is_quiet()


async def test_a_failure_half_way_leaves_nothing_open(daemon: Daemon) -> None:
    inner = CopyBeforeWriteNode("inner", "disk", NullNode("scratch", SIZE))
    await _refuse(daemon, RawNode("top", SnapshotAccessNode("view", inner), offset=2 * SIZE), "Offset")
    assert daemon.is_quiet()


async def test_raw_shows_a_part(daemon: Daemon) -> None:
    graph = daemon.graph
    await graph.get("disk").write(CLUSTER, NEW)
    await graph.add(RawNode("part", "disk", offset=CLUSTER, size=CLUSTER))
    assert graph.get("part").size == CLUSTER
    assert await _read(graph, "part", 0) == NEW
    await _refuse(daemon, RawNode("odd", "disk", size=1000), "not multiple of 512")
    await _refuse(daemon, RawNode("long", "disk", offset=512, size=SIZE), "sum of offset")


# Write thresholds.


async def test_threshold_is_told_once(daemon: Daemon) -> None:
    graph, disk = daemon.graph, daemon.graph.get("disk")
    await graph.set_write_threshold("disk", 2 * CLUSTER)
    assert graph.nodes()[0].write_threshold == 2 * CLUSTER
    await disk.write(CLUSTER, NEW)
    assert daemon.announced == []
    await disk.write(2 * CLUSTER, NEW)
    await disk.write(3 * CLUSTER, NEW)
    (event,) = daemon.announced
    assert (event.name, event.data) == (
        "BLOCK_WRITE_THRESHOLD",
        {"node-name": "disk", "amount-exceeded": CLUSTER, "write-threshold": 2 * CLUSTER},
    )
    assert graph.nodes()[0].write_threshold == 0
    await graph.set_write_threshold("disk", 0)
    assert daemon.is_quiet()


async def test_node_with_a_threshold_can_be_deleted() -> None:
    graph = Graph(ExportTable())
    graph.insert("disk", MemoryDevice(SIZE), "file", "", False)
    await graph.set_write_threshold("disk", 1)
    await graph.delete("disk")
    with pytest.raises(NotFoundError, match="Device 'disk' not found"):
        await graph.set_write_threshold("disk", 1)
