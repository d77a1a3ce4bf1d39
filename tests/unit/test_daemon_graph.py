"""Nodes by name: what uses them keeps them, and every one is flushed and closed at the end."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.daemon.graph import Graph
from nbdbackup.daemon.nodes.table import Child, Entry
from nbdbackup.daemon.state_dir import StateDirectory
from nbdbackup.errors import ConflictError, DeviceError, NotFoundError
from nbdbackup.monitor.services_graph import FileNode, RawNode
from nbdbackup.monitor.services_snapshots import SnapshotOptions
from nbdbackup.server.exports import ExportTable
from tests.support.daemon import Daemon, Leftovers, composed
from tests.support.faults import FaultyDevice
from tests.support.gated import GatedDevice, settle

SIZE = 8192


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with composed(tmp_path) as daemon:
        daemon.add_file("disk", tmp_path / "disk.img", b"x" * SIZE)
        yield daemon


class Closable(FaultyDevice):
    """Knows whether it was flushed before it was closed."""

    def __init__(self, read_only: bool = False) -> None:
        super().__init__(MemoryDevice(SIZE))
        self.read_only = read_only
        self.is_closed = False

    async def close(self) -> None:
        self.is_closed = True

    @property
    def flushes(self) -> int:
        """How many flushes arrived."""
        return sum(operation.kind == "flush" for operation in self.operations)


async def test_nodes_say_what_they_are(daemon: Daemon, tmp_path: Path) -> None:
    await daemon.graph.add(RawNode("view", "disk", read_only=True))
    disk, view = daemon.graph.nodes()
    assert (disk.name, disk.filename, disk.size, disk.read_only) == (
        "disk",
        str(tmp_path / "disk.img"),
        SIZE,
        False,
    )
    assert disk.allocated == os.stat(tmp_path / "disk.img").st_blocks * 512
    assert (view.name, view.filename, view.size, view.read_only) == ("view", disk.filename, SIZE, True)
    assert view.children == (("file", "disk"),)


@pytest.mark.parametrize("name", ["disk", "view"])
async def test_a_name_can_be_used_once_and_the_second_file_is_closed(
    name: str, daemon: Daemon, tmp_path: Path
) -> None:
    await daemon.graph.add(RawNode("view", "disk"))
    other = _make(tmp_path / "other.img")
    before = Leftovers(tmp_path)
    with pytest.raises(ConflictError, match=f"node-name='{name}'"):
        await daemon.graph.add(FileNode(name, str(other)))
    await before.assert_none()


def _make(path: Path) -> Path:
    path.write_bytes(b"y" * SIZE)
    return path


async def test_of_two_adds_of_one_name_at_once_one_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    paths = [_make(tmp_path / "one.img"), _make(tmp_path / "two.img")]
    results = await asyncio.gather(
        *(daemon.graph.add(FileNode("new", str(path))) for path in paths), return_exceptions=True
    )
    assert sorted(isinstance(result, ConflictError) for result in results) == [False, True]
    before = Leftovers()
    await daemon.graph.delete("new")
    await daemon.graph.add(FileNode("new", str(paths[0])))
    await before.assert_none()


async def test_a_node_that_is_used_is_kept(daemon: Daemon, tmp_path: Path) -> None:
    graph = daemon.graph
    await graph.add(FileNode("base", str(_make(tmp_path / "base.img"))))
    await graph.add(RawNode("view", "base"))
    with pytest.raises(ConflictError, match="in use: by export 'disk'"):
        await graph.delete("disk")
    with pytest.raises(ConflictError, match="in use: by node 'view'"):
        await graph.delete("base")
    await daemon.snapshots.create(["view"], SnapshotOptions(name="s1"))
    with pytest.raises(ConflictError, match="in use"):
        await graph.delete("view")
    await daemon.snapshots.drop(["view@s1"])
    await graph.delete("view")
    await graph.delete("base")
    with pytest.raises(NotFoundError, match="base"):
        graph.get("base")


async def test_leaving_flushes_and_closes_each_device_once() -> None:
    graph = Graph(ExportTable())
    device, read_only = Closable(), Closable(read_only=True)
    graph.insert("disk", device, "raw", "", False)
    graph.insert("cd", read_only, "raw", "", False)
    await graph.add(RawNode("view", "disk"))
    await graph.close()
    assert (device.flushes, device.is_closed) == (1, True)
    assert (read_only.flushes, read_only.is_closed) == (0, True)
    assert list(graph) == []


async def test_disk_that_hangs_at_the_end_keeps_no_other_from_being_flushed_and_counts_as_open() -> None:
    graph = Graph(ExportTable())
    hung, others = GatedDevice(MemoryDevice(SIZE)), [Closable(), Closable()]
    for name, device in (("a", others[0]), ("hung", hung), ("b", others[1])):
        graph.insert(name, device, "raw", "", False)
    closing = asyncio.ensure_future(graph.close())
    await settle()
    assert [(device.flushes, device.is_closed) for device in others] == [(1, True)] * 2
    assert [node.name for node in graph] == ["hung"]
    hung.open_gate()
    async with asyncio.timeout(10):
        await closing
    assert list(graph) == []


async def test_at_the_end_a_node_is_closed_after_those_made_of_it() -> None:
    graph, closed = Graph(ExportTable()), list[str]()

    def releasing(name: str) -> Callable[[], Awaitable[None]]:
        async def release() -> None:
            if name == "top":
                await settle()
            closed.append(name)

        return release

    below = Entry(Node("below", MemoryDevice(SIZE)), "file", "", releasing("below"))
    top = Entry(Node("top", below.node), "raw", "", releasing("top"), (Child(below, "file"),))
    for entry in (below, top):
        graph.add_entry(entry)
    await graph.close()
    assert closed == ["top", "below"]


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_a_flush_that_fails_at_the_end_keeps_no_other_from_its_own(failing: int) -> None:
    graph = Graph(ExportTable())
    devices = [Closable() for _ in range(3)]
    devices[failing].inject("flush", errno.EIO)
    for index, device in enumerate(devices):
        graph.insert(str(index), device, "raw", "", False)
    told = f"{failing} could not be flushed, and what was written to it may be lost: Input/output error"
    with pytest.raises(DeviceError, match=told):
        await graph.close()
    assert [(device.flushes, device.is_closed) for device in devices] == [(1, True)] * 3


async def test_what_has_no_file_says_nothing_of_its_allocation() -> None:
    graph = Graph(ExportTable())
    graph.insert("disk", MemoryDevice(SIZE), "raw", "", False)
    (info,) = graph.nodes()
    assert info.allocated is None
    await graph.close()


# The state directory.


def test_a_state_directory_belongs_to_one_daemon(tmp_path: Path) -> None:
    first, second = StateDirectory(tmp_path / "state"), StateDirectory(tmp_path / "state")
    first.open()
    assert first.scratch.is_dir()
    with pytest.raises(
        ConflictError, match=rf"process {os.getpid()}: .*python.*\): name another with --state-dir"
    ):
        second.open()
    first.close()
    second.open()
    second.close()
    second.close()


def test_a_state_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match=r"cannot use state directory .*: Not a directory; name another"):
        StateDirectory(tmp_path / "file" / "state").open()
