"""Exports that come and go: ids, who is connected, bitmaps, and the address that is listened on besides."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.device import ReadableBuffer
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import ConflictError, NbdBackupError, NotFoundError, UsageError
from nbdbackup.extents import ContextExtent
from nbdbackup.monitor.services_exports import ExportRequest, ServerRequest
from nbdbackup.monitor.services_graph import (
    BitmapRef,
    CopyBeforeWriteNode,
    InetAddress,
    RawNode,
    SnapshotAccessNode,
    SocketPath,
)
from nbdbackup.monitor.services_snapshots import SnapshotOptions
from nbdbackup.server.exports import Export
from tests.support.daemon import Daemon, composed
from tests.support.gated import settle
from tests.support.sessions import wait_until

SIZE = 4 << 16


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with composed(tmp_path) as daemon:
        daemon.add("served", MemoryDevice(SIZE))
        daemon.graph.insert("disk", MemoryDevice(SIZE), "file", "", False)
        daemon.graph.insert("cd", MemoryDevice(SIZE), "file", "", True)
        yield daemon


@pytest.fixture(autouse=True)
def bitmap(daemon: Daemon) -> DirtyBitmap:
    """b0 of disk."""
    bitmap = DirtyBitmap("b0", SIZE, 1 << 16)
    daemon.graph.entry("disk").bitmaps.add(bitmap)
    return bitmap


class Client:
    """Uses an export until it is told to leave, and then until it is let go."""

    def __init__(self) -> None:
        self.is_told = False

    def disconnect(self, reason: str) -> None:
        self.is_told = True


def _ids(daemon: Daemon) -> list[tuple[str, bool]]:
    return [(info.id, info.shutting_down) for info in daemon.export_service.exports()]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (ExportRequest("1x", "disk"), "Invalid block export id"),
        (ExportRequest("served", "disk"), "Block export id 'served' is already in use"),
        (ExportRequest("e", "nope"), "Cannot find device='' nor node-name='nope'"),
        (ExportRequest("e", "cd", writable=True), "Cannot export read-only node as writable"),
        (ExportRequest("e", "disk", name="served"), "NBD server already has export named 'served'"),
        (ExportRequest("e", "disk", name="x" * 4097), "export name 'x+' too long"),
        (ExportRequest("e", "disk", description="x" * 4097), "description 'x+' too long"),
        (ExportRequest("e", "disk", bitmaps=("nope",)), "Bitmap 'nope' is not found"),
        (ExportRequest("e", "disk", bitmaps=(BitmapRef("x", "b0"),)), "Node 'x' not found"),
        (ExportRequest("e", "disk", bitmaps=(BitmapRef("cd", "b0"),)), "Dirty bitmap 'b0' not found"),
        (ExportRequest("e", "disk", bitmaps=("b0",)), "Enabled bitmap 'b0' incompatible with readonly"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_exported_changes_nothing(
    daemon: Daemon, request_: ExportRequest, text: str
) -> None:
    with pytest.raises(NbdBackupError, match=text):
        await daemon.export_service.add(request_)
    assert _ids(daemon) == [("served", False)]


async def test_names_and_descriptions_may_be_as_long_as_the_protocol_lets_them(daemon: Daemon) -> None:
    await daemon.export_service.add(ExportRequest("e", "disk", name="x" * 4096, description="d" * 4096))
    assert daemon.exports.get("x" * 4096).info().description == "d" * 4096


async def test_a_disk_for_some_clients_stays_theirs_by_every_name(daemon: Daemon) -> None:
    secret = Export("secret", daemon.graph.get("disk"), tls_only=True, authorised=("CN=a", "CN=b"))
    daemon.exports.add(secret)
    daemon.graph.insert("tmp", MemoryDevice(SIZE), "file", "", False)
    await daemon.graph.add(CopyBeforeWriteNode("cbw", RawNode("name", "disk"), "tmp"))
    await daemon.graph.add(SnapshotAccessNode("view", "cbw"))
    for node in ("disk", "name", "cbw", "view"):
        await daemon.export_service.add(ExportRequest(f"e-{node}", node, name=f"e-{node}"))
        export = daemon.exports.get(f"e-{node}")
        assert (export.tls_only, export.authorised) == (True, ("CN=a", "CN=b"))


async def test_export_keeps_its_node(daemon: Daemon) -> None:
    await daemon.export_service.add(
        ExportRequest("e", "disk", name="other", writethrough=True, writable=True)
    )
    with pytest.raises(ConflictError, match="Node disk is in use: by export 'other'"):
        await daemon.graph.delete("disk")
    await daemon.export_service.delete("e", hard=False)
    await daemon.graph.delete("disk")


async def test_export_ends_when_its_last_client_has_left(daemon: Daemon) -> None:
    exports = daemon.export_service
    await exports.add(ExportRequest("e", "disk"))
    export, client = daemon.exports.get("disk"), Client()
    export.join(client)
    with pytest.raises(ConflictError, match="export 'e' still in use"):
        await exports.delete("e", hard=False)
    await exports.delete("e", hard=True)
    assert client.is_told
    assert _ids(daemon) == [("served", False), ("e", True)]
    with pytest.raises(NotFoundError, match="Export 'e' is not found"):
        await exports.delete("e", hard=True)
    with pytest.raises(ConflictError, match="'e' is already in use"):
        await exports.add(ExportRequest("e", "disk"))
    with pytest.raises(ConflictError, match="is in use: by export 'e'"):
        await daemon.graph.delete("disk")
    await settle()
    assert _ids(daemon) == [("served", False), ("e", True)]
    assert daemon.announced == []
    export.leave(client)
    await wait_until(lambda: _ids(daemon) == [("served", False)])
    assert [(event.name, event.data) for event in daemon.announced] == [("BLOCK_EXPORT_DELETED", {"id": "e"})]
    await daemon.graph.delete("disk")


async def test_served_export_can_be_withdrawn_and_a_snapshot_cannot(daemon: Daemon) -> None:
    await daemon.snapshots.create(["served"], SnapshotOptions(name="s1"))
    with pytest.raises(ConflictError, match="belongs to a snapshot"):
        await daemon.export_service.delete("served@s1", hard=True)
    await daemon.export_service.delete("served", hard=False)
    assert _ids(daemon) == [("served@s1", False)]


class DurableWrites(MemoryDevice):
    """Knows which writes had to be durable."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.fuas: list[bool] = []

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self.fuas.append(fua)
        await super().write(offset, data, fua)


async def test_writethrough_makes_each_write_durable(daemon: Daemon) -> None:
    device = DurableWrites()
    daemon.graph.insert("db", device, "file", "", False)
    await daemon.export_service.add(ExportRequest("e", "db", writable=True, writethrough=True))
    node = daemon.exports.get("db").node
    assert not node.write_nowait(0, b"x")
    await node.write(0, b"x")
    assert (device.fuas, bytes(device.data[:1])) == ([True], b"x")


async def test_exported_bitmap_is_busy_until_the_export_ends(daemon: Daemon, bitmap: DirtyBitmap) -> None:
    bitmap.mark(1 << 16, 1)
    await daemon.graph.add(RawNode("name", "disk"))
    await daemon.export_service.add(ExportRequest("e", "name", writable=True, bitmaps=("b0",)))
    context = daemon.exports.get("name").contexts.get("qemu:dirty-bitmap:b0")
    assert await context.status(0, SIZE) == [
        ContextExtent(1 << 16, 0),
        ContextExtent(1 << 16, 1),
        ContextExtent(2 << 16, 0),
    ]
    with pytest.raises(ConflictError, match="Bitmap 'b0' is currently in use by another operation"):
        await daemon.export_service.add(ExportRequest("f", "disk", writable=True, bitmaps=("b0",)))
    await daemon.export_service.delete("e", hard=False)
    assert not bitmap.busy
    bitmap.enabled = False
    await daemon.export_service.add(ExportRequest("e", "disk", bitmaps=(BitmapRef("disk", "b0"),)))


async def test_bitmap_named_twice_is_free_after_the_refusal(daemon: Daemon, bitmap: DirtyBitmap) -> None:
    with pytest.raises(ConflictError, match="currently in use"):
        await daemon.export_service.add(ExportRequest("e", "disk", writable=True, bitmaps=("b0", "b0")))
    assert not bitmap.busy


# The address besides.


def _server(path: Path, **limits: int) -> ServerRequest:
    return ServerRequest(SocketPath(str(path)), **({"clients_max": 0, "handshake_s": 10} | limits))


async def test_server_is_started_and_stopped_with_its_exports(daemon: Daemon, tmp_path: Path) -> None:
    exports, path = daemon.export_service, tmp_path / "more.sock"
    with pytest.raises(ConflictError, match="NBD server not running"):
        await exports.stop_server()
    await exports.add(ExportRequest("before", "cd"))
    await exports.start_server(_server(path, handshake_s=0))
    with pytest.raises(ConflictError, match="NBD server already running"):
        await exports.start_server(_server(tmp_path / "third.sock"))
    await exports.add(ExportRequest("after", "disk"))
    reader, writer = await asyncio.open_unix_connection(path)
    assert (await reader.readexactly(8)) == b"NBDMAGIC"
    async with asyncio.timeout(20):
        await exports.stop_server()
    assert _ids(daemon) == [("served", False), ("before", False)]
    assert [event.data for event in daemon.announced] == [{"id": "after"}]
    assert not path.exists()
    async with asyncio.timeout(20):
        await reader.read()
    writer.close()
    await exports.start_server(_server(path))
    assert path.exists()


async def test_limits_of_one_address_are_its_own(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "more.sock"
    await daemon.export_service.start_server(_server(path, clients_max=1, handshake_s=1))
    first, second = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with first, second:
        loop = asyncio.get_running_loop()
        start = loop.time()
        for sock in (first, second):
            sock.setblocking(False)
            await loop.sock_connect(sock, str(path))
        async with asyncio.timeout(20):
            assert await loop.sock_recv(first, 8) == b"NBDMAGIC"
            # The first is sent away for its silence; only then is there room for the second.
            assert await loop.sock_recv(second, 8) == b"NBDMAGIC"
            assert loop.time() - start > 0.9
            while await loop.sock_recv(first, 100):
                pass


async def test_stopping_ends_sessions_that_came_in_there_and_no_others(
    daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "more.sock"
    await daemon.export_service.start_server(_server(path))
    (port,) = [uri for uri in daemon.server.uris() if uri.startswith("nbd://")]
    there = await _use_served(*await asyncio.open_unix_connection(path))
    elsewhere = await _use_served(*await asyncio.open_connection("127.0.0.1", int(port.rpartition(":")[2])))
    async with asyncio.timeout(20):
        await daemon.export_service.stop_server()
        assert await there[0].read() == b""
    assert len(daemon.server.sessions) == 1
    for _, writer in (there, elsewhere):
        writer.close()


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _use_served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
    """Negotiate as the oldest clients do: EXPORT_NAME."""
    await reader.readexactly(18)
    writer.write(b"\0\0\0\3" + b"IHAVEOPT" + b"\0\0\0\1" + b"\0\0\0\6" + b"served")
    await reader.readexactly(10)
    return reader, writer


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (InetAddress("127.0.0.1", "x1"), "address resolution failed for 127.0.0.1:x1"),
        (InetAddress("127.0.0.1", "65536"), "address resolution failed"),
        (SocketPath("/nonexistent/x"), "cannot listen on /nonexistent/x"),
    ],
)
async def test_address_that_cannot_be_had_is_one_line(
    daemon: Daemon, address: InetAddress | SocketPath, text: str
) -> None:
    with pytest.raises((UsageError, OSError), match=text):
        await daemon.export_service.start_server(ServerRequest(address, 0, 10))
    with pytest.raises(ConflictError, match="not running"):
        await daemon.export_service.stop_server()
