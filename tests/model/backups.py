"""The world of `world.py` with real backup jobs in it, commanded at any moment."""

from dataclasses import dataclass

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.node import drained
from nbdbackup.errors import ConflictError
from nbdbackup.fleece import snapshots as fleece_snapshots
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.job.backup import BackupJob, BackupOptions
from nbdbackup.job.target import Target
from tests.model.expected import CLUSTER, Disk, FineMemory, Violation
from tests.model.world import JOB_CHUNK, World

WORKERS = 3
END_ROUNDS_MAX = 1000
REASONS = ("Remote I/O error", "is full", "cbw-timeout", "the point in time was lost", "is broken")
"""One of these is in the error of every backup that failed without being cancelled."""


class ModelTarget(Target):
    """A gated device, and what the job made of it in the end."""

    def __init__(self, device: BlockDevice, zeroed: bool) -> None:
        self.device = device
        self.zeroed = zeroed
        self.completed = False

    async def complete(self) -> None:
        await self.device.flush()
        self.completed = True

    async def discard(self) -> None:
        """A failed backup leaves nothing that could be taken for one."""
        self.completed = False


@dataclass(frozen=True, slots=True)
class BackupChoice:
    """How a backup is started."""

    fleecing: bool
    policy: OnCbwError
    timeout_s: float
    zeroed: bool
    speed: int


class BackupWorld(World):
    """Starts and commands backups."""

    def __init__(self) -> None:
        super().__init__()
        self.backups: list[BackupJob] = []
        self._backups_started = 0

    def start_backup(self, disk_index: int, choice: BackupChoice) -> None:
        """A backup of a node begins as soon as the node is drained."""
        disk = self.disks[disk_index % len(self.disks)]
        self._backups_started += 1
        disk.guest_writes_may_break |= choice.policy is OnCbwError.BREAK_GUEST_WRITE
        gate, memory = self._make_target(choice.zeroed)
        options = BackupOptions(
            speed=choice.speed,
            workers=WORKERS,
            chunk_bytes_max=JOB_CHUNK,
            cluster_bytes=CLUSTER,
            on_cbw_error=choice.policy,
            cbw_timeout_s=choice.timeout_s,
        )
        target = ModelTarget(gate, choice.zeroed)
        name = f"backup{self._backups_started}"
        job = BackupJob(name, disk.node, target, options, clock=self.loop.time)
        self._start(self._run_backup(disk, job, choice, memory))

    async def _run_backup(self, disk: Disk, job: BackupJob, choice: BackupChoice, memory: FineMemory) -> None:
        content = await self._hold(disk, job, choice)
        self.copies.append(job._copy)
        self.backups.append(job)
        job.attach(lambda event: None, lambda job: None, lambda job: None)
        job.begin()
        try:
            await job.drive()
        finally:
            self.backups.remove(job)
            self._check_backup(job, memory, content)

    async def _hold(self, disk: Disk, job: BackupJob, choice: BackupChoice) -> bytes:
        if not choice.fleecing:
            async with drained(disk.node):
                job.hold_direct()
                assert job._filter is not None
                self.filters.append(job._filter)
                return bytes(disk.memory.data)
        plan, _ = self._plan(disk, choice.policy, choice.timeout_s, None)
        (snapshot,) = await fleece_snapshots.take_snapshots([plan])
        self.copies.append(snapshot.block_copy)
        self.filters.append(snapshot.filter)
        job.hold_fleecing(snapshot)
        return bytes(disk.memory.data)

    def _check_backup(self, job: BackupJob, memory: FineMemory, content: bytes) -> None:
        assert isinstance(job.target, ModelTarget)
        if job.target.completed != (job.error is None):
            raise Violation(f"{job} ended with {job.error}, and its target says otherwise")
        if job.error is None and memory.data != content:
            raise Violation(f"{job} succeeded, and its target is not the point in time")
        if job.error is not None and not job.is_cancelled and not any(part in job.error for part in REASONS):
            raise Violation(f"{job} failed for no reason: {job.error}")

    def command_backup(self, index: int, verb: str) -> None:
        """Cancel, pause, resume or speed up a backup; what its state forbids is refused."""
        job = self.backups[index % len(self.backups)]
        try:
            if verb == "cancel":
                job.cancel()
            elif verb == "pause":
                job.pause()
            elif verb == "resume":
                job.resume()
            else:
                job.set_speed(0)
        except ConflictError:
            pass
        self.step()

    def _end_everything(self) -> None:
        super()._end_everything()
        for _ in range(END_ROUNDS_MAX):
            for index, job in enumerate(list(self.backups)):
                if job.is_paused:
                    self.command_backup(index, "resume")
            if not self.tasks:
                return
            self.advance(1)
