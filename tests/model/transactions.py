"""The daemon's own transactions, jobs and bitmaps on the disks of `world.py`, against `recorded.py`.

Every transaction is run between two steps that watch it. The first notes the bits at the instant, tries the
steps on the model, and, if the transaction is undone, sees that nothing has changed; the last sees that
everything has changed as the model says. Backups write to nodes with the old bytes of earlier ones.

Whenever a backup ends, its target is compared with its point in time: all that was wanted if it succeeded,
all that it says it has copied in any case, and old bytes everywhere else.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.block.node import Node
from nbdbackup.daemon.backups import BackupAction, Surroundings
from nbdbackup.daemon.bitmaps import Bitmaps
from nbdbackup.daemon.graph import Graph
from nbdbackup.daemon.transaction import Action, Transactions
from nbdbackup.errors import ConflictError, NbdBackupError
from nbdbackup.extents import Extent
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.scratch import Scratch
from nbdbackup.job.backup import BackupJob
from nbdbackup.job.events import Event
from nbdbackup.job.job import Job as AnyJob
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.states import JobStatus
from nbdbackup.job.sync import BitmapSyncMode, SyncMode
from nbdbackup.job.target import BACKUP_USER, NewFileTarget, Target
from nbdbackup.monitor.services_backup import BackupRequest, TargetNode
from nbdbackup.monitor.services_bitmaps import BitmapRemove
from nbdbackup.server.exports import ExportTable
from tests.model.backups import END_ROUNDS_MAX, REASONS
from tests.model.expected import CLUSTER, CLUSTERS, INJECTED, SIZE, FineMemory, Violation
from tests.model.recorded import Recorded, bits_of, rescaled
from tests.model.steps import DISKS, Abort, Change, Model, Refused
from tests.model.world import World

TARGETS = ("t0", "t1", "t2")
FLOW_ROUNDS_MAX = 100
MODEL_SCRATCH = "model"
"""Asks for scratch in memory."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A backup whose point in time was taken; all but the job as they were then."""

    job: BackupJob
    disk: int
    target: FineMemory
    content: bytes
    old: bytes
    wanted: set[int]
    mode: SyncMode
    group: int | None


class ModelBackup(BackupAction):
    """Told the time by the world's clock."""

    def __init__(self, world: "TransactionWorld", surroundings: Surroundings, request: BackupRequest) -> None:
        super().__init__(surroundings, request)
        self.request = request
        self._world = world

    def _new_job(self, job_id: str, target: Target) -> BackupJob:
        clock = self._world.loop.time
        return BackupJob(job_id, self._node, target, self._options(), clock=clock, transaction=self._together)


class Witness(Action):
    """The first step: what is at the instant, and that an undone transaction has left it so."""

    def __init__(self, world: "TransactionWorld", changes: Sequence[Change]) -> None:
        self._world = world
        self._changes = changes
        self.model: Model | None = None
        """As it is to be if all steps are taken; None: one is refused."""
        self.is_alone = world.transactions_running == 0
        """Nobody else can take or give back what this one needs."""

    def nodes(self) -> Sequence[Node]:
        return [disk.node for disk in self._world.disks]

    def prepare(self) -> None:
        self._world.see()
        self._before = self._world.state()
        self.model = self._world.model.copy()
        self.model.taken = self._world.taken() - self._world.claimed
        self.model.taken |= {job.id for job in self._world.jobs_of_daemon}
        try:
            for change in self._changes:
                self.model.do(change, self._world.contents(), self._world.in_flight())
        except Refused:
            self.model = None

    def abort(self) -> None:
        if self._world.state() != self._before:
            raise Violation(f"{self._changes} was undone: {self._before} became {self._world.state()}")
        if self.model is not None and self.is_alone:
            raise Violation(f"{self._changes} was refused for no reason")


class Judge(Action):
    """The last step: everything is as the model says."""

    def __init__(
        self, world: "TransactionWorld", witness: Witness, actions: Sequence[Action], group: int | None
    ) -> None:
        self._world = world
        self._witness = witness
        self._actions = actions
        self._group = group

    def commit(self) -> None:
        model = self._witness.model
        if model is None:
            if self._witness.is_alone:
                raise Violation(f"{self._witness._changes} should have been refused")
            raise Violation(f"{self._witness._changes} was accepted beside another transaction")
        model.bitmaps = {key: recorded for key, recorded in model.bitmaps.items() if not recorded.removing}
        self._world.model = model
        self._world.check_bits()
        for action in self._actions:
            if isinstance(action, ModelBackup):
                self._world.begin(action, self._group)


class TransactionWorld(World):
    """Runs transactions and commands jobs; `current` is the one that the daemon's scratch belongs to."""

    current: "TransactionWorld"

    def __init__(self) -> None:
        super().__init__()
        TransactionWorld.current = self
        self.exports = ExportTable()
        self.graph = Graph(self.exports)
        self.bitmaps = Bitmaps(self.graph, self.exports)
        self.transactions = Transactions()
        for disk in self.disks:
            disk.node = self.graph.insert(disk.node.name, disk.gate, "raw", "", False)
        self.targets: dict[str, FineMemory] = {}
        for name in TARGETS:
            gate, self.targets[name] = self._make_target(zeroed=False)
            # The last thing that may fail a job whose work is done.
            gate.kinds.add("flush")
            self.graph.insert(name, gate, "raw", "", False)
        self.model = Model()
        self.begun: dict[str, Begun] = {}
        self.ended: dict[str, tuple[bool, int | None]] = {}
        self.groups: dict[int, set[bool]] = {}
        self.transactions_running = 0
        self.claimed: set[str] = set()
        self._groups_made = 0
        self._jobs_made = 0
        self._start_registry()

    def _start_registry(self) -> None:
        self._leave = asyncio.Event()

        async def keep() -> None:
            async with asyncio.TaskGroup() as tasks:
                self.registry = JobRegistry(tasks)
                await self._leave.wait()

        self._keeper = self.loop.create_task(keep())
        self.loop.settle()
        self.registry.subscribe(self._note_event)
        self.surroundings = Surroundings(
            self.graph, self.registry, Path(MODEL_SCRATCH), RemoteOptions(), list, NewFileTarget
        )

    # What is.

    @property
    def jobs_of_daemon(self) -> list[AnyJob]:
        """Those that are not dismissed yet."""
        return list(self.registry)

    def contents(self) -> dict[str, bytes]:
        """What the disks hold now."""
        return {disk.node.name: bytes(disk.memory.data) for disk in self.disks}

    def in_flight(self) -> dict[str, list[Extent]]:
        """Where clients are writing."""
        return {disk.node.name: [write.area for write in disk.in_flight] for disk in self.disks}

    def taken(self) -> set[str]:
        """The targets of backups."""
        return {name for name in TARGETS if BACKUP_USER in self.graph.entry(name).users}

    def state(self) -> object:
        """Everything that a transaction which was undone must have left as it was."""
        return (
            [
                [
                    (
                        bitmap.name,
                        bitmap.enabled,
                        bitmap.is_frozen,
                        list(bitmap.users),
                        bits_of(bitmap._planes.own),
                        bits_of(bitmap._planes.spare),
                    )
                    for bitmap in self.graph.entry(name).bitmaps
                ]
                for name in DISKS
            ],
            [[type(device) for device in disk.node.filters] for disk in self.disks],
            [job.id for job in self.registry],
        )

    def see(self) -> None:
        """Let the model know which backups have given their bitmaps back; note the bits."""
        for (node, name), recorded in self.model.bitmaps.items():
            real = self.graph.entry(node).bitmaps.get(name)
            if recorded.frozen is not None and not real.is_frozen:
                self._give_back(recorded)
            recorded.check(real, bytes(self.disks[recorded.disk].memory.data))
            recorded.bits = bits_of(real._planes.own)

    def check_bits(self) -> None:
        """Compare every bit, at the instant."""
        for node in DISKS:
            real = {bitmap.name: bits_of(bitmap._planes.own) for bitmap in self.graph.entry(node).bitmaps}
            wanted = {name: found.bits for (of, name), found in self.model.bitmaps.items() if of == node}
            removing = {bitmap.name for bitmap in self.graph.entry(node).bitmaps if bitmap.users}
            for name in real.keys() | wanted.keys():
                if real.get(name) != wanted.get(name) and name not in removing - wanted.keys():
                    raise Violation(f"{node}/{name} is {real.get(name)}, not {wanted.get(name)}")

    def _give_back(self, recorded: Recorded) -> None:
        assert recorded.frozen is not None
        if recorded.frozen.job_id not in self.begun:
            raise Violation(f"{recorded.frozen.job_id} gave a bitmap back before it began")
        begun, mode = self.begun[recorded.frozen.job_id], recorded.frozen.mode
        real = self.graph.entry(DISKS[recorded.disk]).bitmaps.get(recorded.name)
        is_full = not begun.mode.copies_dirty
        if mode is BitmapSyncMode.ALWAYS and begun.job.error:
            # What was not copied comes in whole clusters.
            clusters = set(range(CLUSTERS)) if is_full else begun.wanted
            whole = rescaled(clusters, CLUSTER, recorded.granularity)
            recorded.may |= whole
            recorded.frozen.may |= whole
        if mode is BitmapSyncMode.NEVER or (begun.job.error and mode is BitmapSyncMode.ON_SUCCESS):
            recorded.reclaim()
        elif begun.job.error is None:
            recorded.abdicate()
        elif recorded.bits <= bits_of(real._planes.own):
            # Nothing was copied, or nobody knows what was because it could not be flushed.
            recorded.reclaim()
        else:
            recorded.abdicate()
            wanted = rescaled(begun.wanted, CLUSTER, recorded.granularity) if is_full else recorded.bits
            for number in wanted - bits_of(real._planes.own):
                piece = slice(number * recorded.granularity, (number + 1) * recorded.granularity)
                if begun.target.data[piece] != begun.content[piece]:
                    raise Violation(f"{real} forgot granule {number}, which {begun.job} did not copy")

    def check(self) -> None:
        super().check()
        self.see()
        for job in self.registry:
            if not 0 <= job.current_progress <= job.total_progress:
                raise Violation(f"{job} did {job.current_progress} of {job.total_progress} bytes")

    # Steps of users.

    def write(self, disk_index: int, offset: int, length: int, kind: str, quick: bool) -> None:
        index = disk_index % len(self.disks)
        area = Extent(offset, min(length, SIZE - offset))
        for recorded in self.model.bitmaps.values():
            if recorded.disk == index:
                recorded.note(area)
        super().write(disk_index, offset, length, kind, quick)

    def transact(self, changes: Sequence[Change], grouped: bool) -> None:
        """A transaction begins; it is taken when all of its nodes are drained."""
        self._start(self._run_transaction([self._named(change) for change in changes], grouped))

    def _named(self, change: Change) -> Change:
        if not isinstance(change, BackupRequest) or change.job_id is not None:
            return change
        self._jobs_made += 1
        return replace(change, job_id=f"job{self._jobs_made}")

    async def _run_transaction(self, changes: Sequence[Change], grouped: bool) -> None:
        self._groups_made += 1
        group = self._groups_made if grouped else None
        witness = Witness(self, changes)
        actions = [self._action(change) for change in changes]
        if self.transactions_running == 0:
            self.claimed.clear()
        self.transactions_running += 1
        # What it claims before the instant is no reason to refuse it.
        self.claimed |= {
            change.target.node
            for change in changes
            if isinstance(change, BackupRequest) and isinstance(change.target, TargetNode)
        } - self.taken()
        try:
            judge = Judge(self, witness, actions, group)
            await self.transactions.run([witness, *actions, judge], grouped=grouped)
        except NbdBackupError:
            pass
        finally:
            self.transactions_running -= 1

    def _action(self, change: Change) -> Action:
        match change:
            case Abort():
                step = self.transactions.failing(ConflictError("abort"))
                assert isinstance(step, Action)
                return step
            case BackupRequest():
                return ModelBackup(self, self.surroundings, change)
            case _:
                return self.bitmaps.action(change)

    def begin(self, action: ModelBackup, group: int | None) -> None:
        """The point in time of a backup is now."""
        job, request = action.job, action.request
        assert isinstance(request.target, TargetNode)
        index = DISKS.index(request.node)
        disk, target = self.disks[index], self.targets[request.target.node]
        disk.guest_writes_may_break |= request.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE
        content = bytes(disk.memory.data)
        wanted = set(range(CLUSTERS))
        if request.sync.mode.copies_dirty:
            assert request.sync.bitmap is not None
            recorded = self.model.bitmaps[request.node, request.sync.bitmap]
            wanted = rescaled(recorded.bits, recorded.granularity, CLUSTER)
        elif request.sync.mode is SyncMode.TOP:
            wanted = {number for number in wanted if any(content[number * CLUSTER : (number + 1) * CLUSTER])}
        self.begun[job.id] = Begun(
            job, index, target, content, bytes(target.data), wanted, request.sync.mode, group
        )
        self.copies.append(job._copy)
        if job._filter is not None:
            self.filters.append(job._filter)

    def flow(self, held: str) -> None:
        """For a while, devices do what they are asked as soon as they are asked, but for the kind `held`."""
        for _ in range(FLOW_ROUNDS_MAX):
            moving = [(gate, op) for gate, op in self.pending() if op.kind != held]
            if not moving:
                return
            for gate, op in moving:
                gate.release(op)
            self.step()

    def fail_flush(self, index: int) -> None:
        """A target cannot make durable what was written to it."""
        flushes = [
            (gate, op) for gate, op in self.pending() if op.kind == "flush" and not op.started.is_set()
        ]
        if flushes:
            gate, op = flushes[index % len(flushes)]
            gate.fail(op, INJECTED)
        self.step()

    def command(self, index: int, verb: str) -> None:
        """A user tells a job something; what its state forbids is refused."""
        jobs = self.jobs_of_daemon
        job = jobs[index % len(jobs)]
        try:
            if verb == "speed":
                job.set_speed(0)
            else:
                getattr(job, verb)()
        except ConflictError:
            pass
        self.step()

    # The ends of jobs.

    def _note_event(self, event: Event) -> None:
        if event.name == "JOB_STATUS_CHANGE" and event.data["status"] == "concluded":
            begun = self.begun.get(str(event.data["id"]))
            if begun is not None and begun.job is self.registry.get(begun.job.id):
                try:
                    self._check_end(begun)
                except Violation as violation:
                    self.errors.append(violation)

    def _check_end(self, begun: Begun) -> None:
        job = begun.job
        if job.error is not None and not job.is_cancelled and not any(part in job.error for part in REASONS):
            raise Violation(f"{job} failed for no reason: {job.error}")
        if job.error is None and job.current_progress != job.total_progress:
            raise Violation(f"{job} succeeded after {job.current_progress} of {job.total_progress} bytes")
        if begun.group is not None:
            ends = self.groups.setdefault(begun.group, set())
            ends.add(job.error is None)
            if len(ends) > 1:
                raise Violation(f"{job} ended otherwise than the others of its group")
        for number in range(CLUSTERS):
            piece = slice(number * CLUSTER, (number + 1) * CLUSTER)
            is_wanted = number in begun.wanted
            must = is_wanted and (job.error is None or job._copy.done.any(number * CLUSTER, 1))
            held = bytes(begun.target.data[piece])
            if must and held != begun.content[piece]:
                raise Violation(
                    f"{job} ended with {job.error}, and cluster {number} is not the point in time"
                )
            if not is_wanted and held != begun.old[piece]:
                raise Violation(f"{job} wrote cluster {number}, which was not wanted")

    # The end.

    def _end_everything(self) -> None:
        super()._end_everything()
        for _ in range(END_ROUNDS_MAX):
            for index, job in enumerate(self.jobs_of_daemon):
                begun = self.begun.get(job.id)
                if begun is None:
                    raise Violation(f"{job} was started by a transaction that was undone")
                if job.status is JobStatus.CONCLUDED:
                    self.command(index, "dismiss")
                elif begun.mode is SyncMode.NONE and job.is_cancellable:
                    self.command(index, "cancel")
                elif job.status is JobStatus.PENDING:
                    self.command(index, "finalize")
                elif job.is_paused:
                    self.command(index, "resume")
                if len(self.jobs_of_daemon) <= index:
                    break
            if not self.tasks and not self.jobs_of_daemon:
                return
            self.advance(1)

    def _finish(self) -> None:
        self._end_everything()
        if self.jobs_of_daemon:
            raise Violation(f"{self.jobs_of_daemon[0]} never ends")
        if self.taken():
            raise Violation(f"targets stay taken: {self.taken()}")
        for node in DISKS:
            for bitmap in self.graph.entry(node).bitmaps:
                if bitmap.busy or bitmap._freezes:
                    raise Violation(f"{bitmap} stays busy")
        self.transact([BitmapRemove(node, name) for node, name in self.model.bitmaps], grouped=False)
        super()._finish()
        self._leave.set()
        self.loop.settle()

    def open_scratch(self, size: int, title: str) -> Scratch:
        """Scratch for a backup."""
        return Scratch(self._make_gate(FineMemory(size, title)), CLUSTER, None, title)
