"""The world of `backups.py` with a dirty bitmap on each disk, and chains of incremental backups.

A chain is the disk as it was when the bitmap was made, with every incremental backup laid over it, in the
way of a user: what a backup copied goes into the chain if the backup succeeded, or if the bitmap mode
is `always` and its target outlived it. Whatever happens, the next backup that succeeds makes the chain
equal to its point in time: so no bitmap ever says clean of a cluster that the chain does not have.
"""

from dataclasses import dataclass

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.node import Node, drained
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from nbdbackup.fleece.snapshots import make_snapshot_now
from nbdbackup.job.backup import BackupJob, BackupOptions
from nbdbackup.job.sync import BitmapSyncMode, FrozenBitmap, SyncMode
from tests.model.backups import WORKERS, BackupChoice, BackupWorld, ModelTarget
from tests.model.expected import CLUSTER, CLUSTERS, SIZE, Disk, FineMemory, Violation
from tests.model.world import JOB_CHUNK


@dataclass(slots=True)
class Chain:
    """What a user keeps of a disk, and the bitmap that says what is missing."""

    bitmap: DirtyBitmap
    content: bytearray

    @property
    def dirty(self) -> set[int]:
        """The clusters that the bitmap says are missing."""
        runs = self.bitmap.dirty_runs()
        return {number for run in runs for number in range(run.offset // CLUSTER, -(-run.end // CLUSTER))}

    def take(self, clusters: set[int], target: FineMemory) -> None:
        """Lay `clusters` of `target` over the chain."""
        for number in clusters:
            piece = slice(number * CLUSTER, min((number + 1) * CLUSTER, SIZE))
            self.content[piece] = target.data[piece]


class IncrementalWorld(BackupWorld):
    """Starts incremental backups; the rest is as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.chains: list[Chain] = []
        for disk in self.disks:
            bitmap = DirtyBitmap("b0", SIZE, CLUSTER)
            self.chains.append(Chain(bitmap, bytearray(disk.memory.data)))
            disk.node = Node(disk.node.name, DirtyTracker(disk.gate, [bitmap]))

    def start_incremental(
        self, disk_index: int, choice: BackupChoice, mode: BitmapSyncMode, outlives: bool
    ) -> None:
        """An incremental backup begins as soon as the node is drained, if nobody else has the bitmap."""
        index = disk_index % len(self.disks)
        disk, chain = self.disks[index], self.chains[index]
        if chain.bitmap.busy:
            return
        chain.bitmap.users.append("a backup to come")
        disk.guest_writes_may_break |= choice.policy is choice.policy.BREAK_GUEST_WRITE
        gate, memory = self._make_target(choice.zeroed)
        options = BackupOptions(
            sync=SyncMode.BITMAP,
            speed=choice.speed,
            workers=WORKERS,
            chunk_bytes_max=JOB_CHUNK,
            cluster_bytes=CLUSTER,
            on_cbw_error=choice.policy,
            cbw_timeout_s=choice.timeout_s,
        )
        target = ModelTarget(gate, choice.zeroed)
        target.outlives_failure = outlives
        self._backups_started += 1
        job = BackupJob(
            f"incremental{self._backups_started}", disk.node, target, options, clock=self.loop.time
        )
        self._start(self._run_incremental(disk, chain, job, choice, mode, memory))

    async def _run_incremental(
        self,
        disk: Disk,
        chain: Chain,
        job: BackupJob,
        choice: BackupChoice,
        mode: BitmapSyncMode,
        memory: FineMemory,
    ) -> None:
        try:
            async with drained(disk.node):
                wanted, content = chain.dirty, bytes(disk.memory.data)
                chain.bitmap.users.clear()
                self._hold_incremental(disk, job, choice, FrozenBitmap(chain.bitmap, mode))
        finally:
            chain.bitmap.users.clear()
        self.copies.append(job._copy)
        self.backups.append(job)
        job.attach(lambda event: None, lambda job: None, lambda job: None)
        job.begin()
        try:
            await job.drive()
        finally:
            self.backups.remove(job)
            self._check_incremental(chain, job, mode, memory, wanted, content)

    def _hold_incremental(
        self, disk: Disk, job: BackupJob, choice: BackupChoice, frozen: FrozenBitmap
    ) -> None:
        if not choice.fleecing:
            job.hold_direct(frozen)
            assert job._filter is not None
            self.filters.append(job._filter)
            return
        plan, _ = self._plan(disk, choice.policy, choice.timeout_s, None)
        snapshot = make_snapshot_now(plan)
        snapshot.insert()
        self.copies.append(snapshot.block_copy)
        self.filters.append(snapshot.filter)
        job.hold_fleecing(snapshot, frozen)

    def _check_incremental(
        self,
        chain: Chain,
        job: BackupJob,
        mode: BitmapSyncMode,
        memory: FineMemory,
        wanted: set[int],
        content: bytes,
    ) -> None:
        assert isinstance(job.target, ModelTarget)
        if not 0 <= job.current_progress <= job.total_progress:
            raise Violation(f"{job} did {job.current_progress} of {job.total_progress} bytes")
        if job.error is None:
            chain.take(wanted, memory)
            if chain.content != content:
                raise Violation(f"{job} succeeded, and the chain is not the point in time")
            if job.current_progress != job.total_progress:
                raise Violation(f"{job} succeeded after {job.current_progress} of {job.total_progress}")
        elif mode is BitmapSyncMode.ALWAYS and job.target.outlives_failure:
            still = {number for number in range(CLUSTERS) if job._copy.dirty.any(number * CLUSTER, 1)}
            chain.take(wanted - still, memory)
        missing = self._missing(chain, content)
        if not missing <= chain.dirty:
            raise Violation(f"after {job} the bitmap says clean of {missing - chain.dirty}")

    @staticmethod
    def _missing(chain: Chain, content: bytes) -> set[int]:
        """The clusters in which the chain is not `content`."""
        return {
            number
            for number in range(CLUSTERS)
            if chain.content[number * CLUSTER : (number + 1) * CLUSTER]
            != content[number * CLUSTER : (number + 1) * CLUSTER]
        }
