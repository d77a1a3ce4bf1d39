"""Backups of a `Disk` without a daemon around them, in both shapes.

async with job_registry() as (registry, log):
    job = await start_backup(registry, disk, NewFileTarget(path, disk.node.size), "direct")
    await job.wait_concluded()
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.node import drained
from nbdbackup.fleece.snapshots import make_snapshot_now
from nbdbackup.job.backup import BackupJob, BackupOptions
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.sync import BitmapSyncMode, FrozenBitmap
from nbdbackup.job.target import NewFileTarget, Target
from tests.support.faults import FaultyDevice
from tests.support.fleecing import CLUSTER, Disk, make_gate
from tests.support.gated import GatedDevice

WAIT_S = 20.0
OPTIONS = BackupOptions(workers=1, cluster_bytes=CLUSTER, chunk_bytes_max=2 * CLUSTER, auto_dismiss=False)
SHAPES = pytest.mark.parametrize("shape", ["direct", "fleecing"])


class Clock:
    """Time that stands still until the test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class WatchedJob(BackupJob):
    """Checks at every step that progress is never over the total."""

    def progress_add(self, length: int) -> None:
        super().progress_add(length)
        assert length > 0
        assert self.current_progress <= self.total_progress


async def start_backup(
    registry: JobRegistry,
    disk: Disk,
    target: Target,
    shape: str,
    options: BackupOptions = OPTIONS,
    clock: Callable[[], float] | None = None,
    bitmap: DirtyBitmap | None = None,
    bitmap_mode: BitmapSyncMode = BitmapSyncMode.ON_SUCCESS,
) -> WatchedJob:
    """Take the point in time of `disk` and start the job."""
    job = (
        WatchedJob("b1", disk.node, target, options)
        if clock is None
        else WatchedJob("b1", disk.node, target, options, clock)
    )
    registry.add(job)
    async with drained(disk.node):
        frozen = None if bitmap is None else FrozenBitmap(bitmap, bitmap_mode)
        if shape == "direct":
            job.hold_direct(frozen)
        else:
            plan, _ = disk.plan("b1")
            snapshot = make_snapshot_now(plan)
            snapshot.insert()
            job.hold_fleecing(snapshot, frozen)
    registry.start(job)
    return job


async def end_of(job: BackupJob) -> str | None:
    """Wait for the end of `job`; its error."""
    async with asyncio.timeout(WAIT_S):
        await job.wait_concluded()
    return job.error


def gated_target(path: Path, size: int) -> tuple[NewFileTarget, GatedDevice, FaultyDevice]:
    """A new file as a target, with a gate that is open and faults of which there are none."""
    target = NewFileTarget(str(path), size)
    faults = FaultyDevice(target.device)
    gate = make_gate(faults)
    target.device = gate
    return target, gate, faults


def with_options(**changes: object) -> BackupOptions:
    """`OPTIONS`, changed."""
    return replace(OPTIONS, **changes)
