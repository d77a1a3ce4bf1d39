"""A control socket over services that do nothing but remember, and a client that hides nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from nbdbackup.daemon.transaction import Action, Transactions
from nbdbackup.errors import NotFoundError
from nbdbackup.job.events import Json
from nbdbackup.job.registry import JobRegistry
from nbdbackup.monitor.context import (
    Services,
)
from nbdbackup.monitor.server import MonitorServer, monitor
from nbdbackup.monitor.services_backup import BackupRequest
from nbdbackup.monitor.services_bitmaps import BitmapChange
from nbdbackup.monitor.services_exports import ExportInfo, ExportRequest, ServerRequest
from nbdbackup.monitor.services_graph import NodeDefinition, NodeInfo
from nbdbackup.monitor.services_snapshots import CheckpointInfo, SnapshotInfo, SnapshotOptions
from nbdbackup.monitor.services_state import LeftoverInfo
from nbdbackup.monitor.steps import Step
from tests.support.jobs import WAIT_S_MAX, ScriptedJob

CREATED = datetime(2026, 11, 23, 3, 4, 5, tzinfo=UTC)


@dataclass
class FakeSnapshots:
    taken: list[tuple[list[str], SnapshotOptions]] = field(default_factory=list)
    infos: list[SnapshotInfo] = field(default_factory=list)
    drops_pulled: list[bool] = field(default_factory=list)

    async def create(self, nodes: Sequence[str], options: SnapshotOptions) -> Sequence[SnapshotInfo]:
        self.taken.append((list(nodes), options))
        name = options.name or "20261123T030405Z"
        made = [
            SnapshotInfo(
                node,
                name,
                f"{node}@{name}",
                (f"nbd://127.0.0.1:10809/{node}%40{name}",),
                CREATED,
                1 << 20,
                65536,
                0,
                options.scratch_bytes_max,
            )
            for node in nodes
        ]
        self.infos += made
        return made

    async def drop(self, exports: Sequence[str], *, pulled: bool = False) -> None:
        self.drops_pulled.append(pulled)
        for export in exports:
            if export not in [info.export for info in self.infos]:
                raise NotFoundError(f"No snapshot is called '{export}'")
        self.infos = [info for info in self.infos if info.export not in exports]

    def list(self) -> Sequence[SnapshotInfo]:
        return self.infos


@dataclass
class FakeBackups:
    """Starts a `ScriptedJob` for each request; `failure` is raised instead."""

    jobs: JobRegistry
    requests: list[BackupRequest] = field(default_factory=list)
    started: list[ScriptedJob] = field(default_factory=list)
    failure: Exception | None = None
    steps_allowed: int = 0
    """How far a new job goes without being told."""
    steps_in_all: int = 1

    def action(self, request: BackupRequest) -> "FakeBackupAction":
        return FakeBackupAction(self, request)

    async def start(self, request: BackupRequest) -> str:
        return self.begin(request)

    def begin(self, request: BackupRequest) -> str:
        self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        job = ScriptedJob(
            self.jobs.new_id(request.job_id),
            steps=self.steps_in_all,
            speed=request.speed,
            auto_finalize=request.auto_finalize,
            auto_dismiss=request.auto_dismiss,
        )
        self.jobs.add(job)
        self.jobs.start(job)
        job.step(self.steps_allowed)
        self.started.append(job)
        return job.id


@dataclass(eq=False)
class FakeBackupAction(Action):
    backups: FakeBackups
    request: BackupRequest

    def prepare(self) -> None:
        self.backups.begin(self.request)


@dataclass
class FakeGraph:
    added: list[NodeDefinition] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    thresholds: dict[str, int] = field(default_factory=dict)

    def nodes(self) -> Sequence[NodeInfo]:
        return [NodeInfo("disk", "raw", "/srv/disk.img", 1 << 20, False, 4096)]

    async def add(self, node: NodeDefinition) -> None:
        self.added.append(node)

    async def delete(self, name: str) -> None:
        self.deleted.append(name)

    async def set_write_threshold(self, name: str, threshold: int) -> None:
        self.thresholds[name] = threshold


@dataclass
class FakeExports:
    """Says back what it was asked for."""

    asked: list[ExportRequest | ServerRequest | tuple[str, bool] | None] = field(default_factory=list)

    def exports(self) -> Sequence[ExportInfo]:
        return [ExportInfo("disk", "disk")]

    async def add(self, request: ExportRequest) -> None:
        self.asked.append(request)

    async def delete(self, export_id: str, *, hard: bool) -> None:
        self.asked.append((export_id, hard))

    async def start_server(self, request: ServerRequest) -> None:
        self.asked.append(request)

    async def stop_server(self) -> None:
        self.asked.append(None)


@dataclass
class FakeBitmaps:
    changes: list[BitmapChange] = field(default_factory=list)

    def action(self, change: BitmapChange) -> Step:
        self.changes.append(change)
        return Action()


@dataclass
class FakeCheckpoints:
    """Those of `infos`; what it creates is a snapshot."""

    snapshots: FakeSnapshots
    infos: list[CheckpointInfo] = field(default_factory=list)
    deleted: list[tuple[list[str], str]] = field(default_factory=list)

    async def create(self, nodes: Sequence[str], options: SnapshotOptions) -> Sequence[SnapshotInfo]:
        return await self.snapshots.create(nodes, options)

    async def delete(self, nodes: Sequence[str], name: str) -> Sequence[CheckpointInfo]:
        self.deleted.append((list(nodes), name))
        return [info for info in self.infos if info.name == name]

    def list(self) -> Sequence[CheckpointInfo]:
        return self.infos


class QmpClient:
    """Sends bytes or messages; gives back every message, events and answers apart."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.events: list[dict[str, Json]] = []

    async def send_bytes(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self) -> dict[str, Json] | None:
        """The next message; None when the server has hung up."""
        async with asyncio.timeout(WAIT_S_MAX):
            line = await self._reader.readline()
        if not line:
            return None
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def receive_answer(self) -> dict[str, Json]:
        """The next answer; events before it go to `events`."""
        while (message := await self.receive()) is not None and "event" in message:
            self.events.append(message)
        assert message is not None, "the server has hung up"
        return message

    async def execute(self, name: str, arguments: Mapping[str, Json] | None = None) -> Json:
        """What the command returns; AssertionError if it failed."""
        answer = await self.ask({"execute": name, "arguments": arguments or {}})
        assert "error" not in answer, answer
        return answer["return"]

    async def fail(self, name: str, arguments: Mapping[str, Json] | None = None) -> tuple[str, str]:
        """The class and text of the error that the command answers with."""
        answer = await self.ask({"execute": name, "arguments": arguments or {}})
        assert "error" in answer, answer
        error = answer["error"]
        assert isinstance(error, dict)
        return str(error["class"]), str(error["desc"])

    async def ask(self, message: Json) -> dict[str, Json]:
        """The whole answer to `message`."""
        await self.send_bytes(json.dumps(message).encode())
        return await self.receive_answer()

    async def wait_event(self, name: str) -> dict[str, Json]:
        """The next event called `name`."""
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(index)
            message = await self.receive()
            assert message is not None, "the server has hung up"
            assert "event" in message, message
            self.events.append(message)


class FakeState:
    """No leftovers."""

    async def leftovers(self) -> Sequence[LeftoverInfo]:
        return ()

    async def clean(self, paths: Sequence[str] | None, *, everything: bool = False) -> Sequence[LeftoverInfo]:
        assert not paths
        return ()


@dataclass
class Bench:
    """A control socket, and what is behind it."""

    path: Path
    server: MonitorServer
    jobs: JobRegistry
    snapshots: FakeSnapshots
    backups: FakeBackups
    graph: FakeGraph
    exports: FakeExports
    shutdown: asyncio.Event
    bitmaps: FakeBitmaps
    checkpoints: FakeCheckpoints

    @asynccontextmanager
    async def connected(self, negotiate: bool = True) -> AsyncIterator[QmpClient]:
        """A client that has been greeted."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        client = QmpClient(reader, writer)
        try:
            greeting = await client.receive()
            assert greeting is not None
            assert "QMP" in greeting
            if negotiate:
                assert await client.execute("qmp_capabilities") == {}
            yield client
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except OSError:
                pass


@asynccontextmanager
async def bench(path: Path) -> AsyncIterator[Bench]:
    """A control socket at `path` for the duration."""
    async with asyncio.timeout(WAIT_S_MAX * 3), asyncio.TaskGroup() as tasks:
        jobs = JobRegistry(tasks)
        snapshots, backups, graph = FakeSnapshots(), FakeBackups(jobs), FakeGraph()
        exports = FakeExports()
        shutdown = asyncio.Event()
        bitmaps, checkpoints = FakeBitmaps(), FakeCheckpoints(snapshots)
        services = Services(
            jobs,
            snapshots,
            backups,
            graph,
            Transactions(),
            shutdown.set,
            exports=exports,
            bitmaps=bitmaps,
            checkpoints=checkpoints,
            state=FakeState(),
        )
        async with monitor(path, services) as server:
            try:
                yield Bench(
                    path, server, jobs, snapshots, backups, graph, exports, shutdown, bitmaps, checkpoints
                )
            finally:
                await jobs.cancel_all()
