"""The daemon's services put together as `serve` does it, without sockets and a control socket.

async with composed(tmp_path) as daemon:
    daemon.add_file("disk", path)
    await daemon.snapshots.create(["disk"], SnapshotOptions(name="s1"))
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.file import FileDevice
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.block.node import Node
from nbdbackup.daemon.backups import Backups
from nbdbackup.daemon.bitmaps import Bitmaps
from nbdbackup.daemon.checkpoints import Checkpoints
from nbdbackup.daemon.events import Announcer
from nbdbackup.daemon.exports import Exports
from nbdbackup.daemon.graph import Graph
from nbdbackup.daemon.snapshots import Snapshots
from nbdbackup.daemon.stored_bitmaps import StoredBitmaps
from nbdbackup.daemon.stored_snapshots import StoredSnapshots
from nbdbackup.job.events import Event
from nbdbackup.job.registry import JobRegistry
from nbdbackup.server.exports import Export, ExportTable
from nbdbackup.server.listener import listen_tcp
from nbdbackup.server.server import Server
from tests.support.sessions import open_descriptors, wait_until

WAIT_S = 20.0
SOURCE_THREADS = ("io-disk.img", "io-a.img", "io-b.img")
"""Of disks that go on being served: they start on demand and stay."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """Everything that `serve` makes, less what is visible from outside."""

    scratch: Path
    exports: ExportTable
    graph: Graph
    snapshots: Snapshots
    backups: Backups
    jobs: JobRegistry
    announced: list[Event]
    """What the graph and the exports told the monitor's clients."""
    export_service: Exports
    server: Server
    bitmaps: Bitmaps
    checkpoints: Checkpoints

    def add(self, name: str, device: BlockDevice, filename: str = "") -> Node:
        """Serve `device` as node and export `name`."""
        node = self.graph.insert(name, device, "raw", filename, False)
        self.exports.add(Export(name, node, all_bitmaps=True))
        return node

    def add_file(self, name: str, path: Path, content: bytes) -> Node:
        """Make the file `path` with `content` and serve it."""
        path.write_bytes(content)
        return self.add(name, FileDevice.open(str(path)), str(path))

    def is_quiet(self) -> bool:
        """Whether there is no snapshot, job or filter."""
        return (
            not self.snapshots.list()
            and not list(self.jobs)
            and not any(list(node.filters) for node in self.graph)
        )


@asynccontextmanager
async def composed(
    directory: Path,
    remote: RemoteOptions | None = None,
    *,
    stored: StoredBitmaps | None = None,
    kept: StoredSnapshots | None = None,
) -> AsyncIterator[Daemon]:
    """A daemon with its scratch in `directory`; leaving ends it as SIGTERM does.

    `remote`: of its targets. `stored`: keeps persistent bitmaps; `kept`: keeps snapshots.
    """
    scratch = directory / "scratch"
    scratch.mkdir(exist_ok=True)
    exports = ExportTable()
    announcer, announced = Announcer(), list[Event]()
    announcer.subscribe(announced.append)
    graph = Graph(exports, announcer)
    bitmaps = Bitmaps(graph, exports, stored)
    graph.watchers.append(bitmaps)
    if stored is not None:
        await stored.open()
        await bitmaps.chains.open()
    server = Server(exports, [listen_tcp("127.0.0.1", 0)])
    if kept is not None:
        await kept.open()
    snapshots = Snapshots(graph, server, scratch, kept)
    checkpoints = Checkpoints(bitmaps, snapshots)
    async with asyncio.timeout(WAIT_S * 3), asyncio.TaskGroup() as tasks:
        jobs = JobRegistry(tasks)
        backups = Backups(graph, jobs, scratch, remote or RemoteOptions(), list)
        try:
            serving = tasks.create_task(server.run())
            freeing = tasks.create_task(snapshots.free_broken())
            yield Daemon(
                scratch,
                exports,
                graph,
                snapshots,
                backups,
                jobs,
                announced,
                Exports(graph, server, tasks, announcer),
                server,
                bitmaps,
                checkpoints,
            )
        finally:
            server.stop()
            await jobs.cancel_all()
            await serving
            freeing.cancel()
            await snapshots.close()
            for node in graph:
                await bitmaps.release(graph.entry(node.name))
            await graph.close()
            for threads in (stored, kept):
                if threads is not None:
                    threads.close()


class Leftovers:
    """What the process holds now, to compare with later."""

    def __init__(self, *directories: Path) -> None:
        self._directories = directories
        self._before = self._look()

    def _look(self) -> tuple[int, int, list[list[str]]]:
        names = [sorted(os.listdir(directory)) for directory in self._directories]
        threads = [thread for thread in threading.enumerate() if not thread.name.startswith(SOURCE_THREADS)]
        return open_descriptors(), len(threads), names

    def _are_none(self) -> bool:
        descriptors, threads, names = self._look()
        return descriptors <= self._before[0] and threads <= self._before[1] and names == self._before[2]

    async def assert_none(self) -> None:
        """No more descriptors and threads than before, the same files; threads may take a moment to end."""
        try:
            await wait_until(self._are_none)
        except TimeoutError:
            raise AssertionError(f"before: {self._before}, now: {self._look()}") from None
