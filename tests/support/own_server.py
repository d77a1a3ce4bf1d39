"""Our own server inside the test's event loop, on a Unix socket: quick to start, and its devices at hand."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.node import Node
from nbdbackup.nbd.uri import format_unix
from nbdbackup.server.exports import Export, ExportTable
from nbdbackup.server.listener import listen_unix
from nbdbackup.server.server import Server

STOP_TIMEOUT_S = 30


@asynccontextmanager
async def serving(
    devices: Mapping[str, BlockDevice], *, path: str | None = None, read_only: bool = False
) -> AsyncIterator[str]:
    """Serve `devices` by name; the URI of the first one."""
    with tempfile.TemporaryDirectory(prefix="nbdbackup-own-") as directory:
        where = path or f"{directory}/s"
        exports = ExportTable()
        for name, device in devices.items():
            exports.add(Export(name, Node(name, device), "", read_only))
        listener = listen_unix(where)
        server = Server(exports, [listener], 0)
        running = asyncio.create_task(server.run())
        try:
            yield format_unix(where, next(iter(devices)))
        finally:
            server.stop()
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await running
            listener.close()
