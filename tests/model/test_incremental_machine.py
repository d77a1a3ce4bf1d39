"""Every interleaving of clients and incremental backups, with errors, against a chain (`incrementals.py`)."""

import logging
import math
from collections.abc import Callable, Iterator

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from nbdbackup.bitmap import dirty
from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.extents import Extent
from nbdbackup.fleece import copy_before_write
from nbdbackup.fleece.block_copy import BlockCopy
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from nbdbackup.job.backup import BackupJob
from nbdbackup.job.sync import BitmapSyncMode
from tests.model.backups import BackupChoice
from tests.model.expected import CLUSTER, Violation
from tests.model.incrementals import IncrementalWorld
from tests.model.test_fleece_machine import COMMON, FleeceMachine, disks, policies, timeouts
from tests.model.world import JOBS_MAX
from tests.support import gated


class IncrementalMachine(FleeceMachine):
    """One rule more than its base."""

    world_type = IncrementalWorld

    @precondition(lambda self: len(self.world.backups) < JOBS_MAX)
    @rule(
        disk=disks,
        fleecing=st.booleans(),
        policy=policies,
        timeout=timeouts,
        zeroed=st.booleans(),
        speed=st.sampled_from([0, 0, 4 * CLUSTER]),
        mode=st.sampled_from(BitmapSyncMode),
        outlives=st.booleans(),
    )
    def start_incremental(
        self,
        disk: int,
        fleecing: bool,
        policy: OnCbwError,
        timeout: float,
        zeroed: bool,
        speed: int,
        mode: BitmapSyncMode,
        outlives: bool,
    ) -> None:
        assert isinstance(self.world, IncrementalWorld)
        choice = BackupChoice(fleecing, policy, timeout, zeroed, speed)
        self.world.start_incremental(disk, choice, mode, outlives)


@pytest.fixture(autouse=True)
def _machine_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As for the machine that this one is made of; and granules as small as its clusters."""
    monkeypatch.setattr(gated, "CANCELLED_WAIT_S", math.inf)
    monkeypatch.setattr(copy_before_write, "ASK_ZEROES_BYTES_MIN", 5 * CLUSTER // 2)
    monkeypatch.setattr(dirty, "GRANULARITY_MIN", CLUSTER)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_chains_are_points_in_time_whatever_happens() -> None:
    run_state_machine_as_test(
        IncrementalMachine, settings=settings(COMMON, max_examples=200, stateful_step_count=50)
    )


def without_reclaim(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed backup forgets what it was to copy."""
    monkeypatch.setattr(DirtyBitmap, "reclaim", DirtyBitmap.abdicate)


def without_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroes and trims are not recorded."""
    for name in ("write_zeroes", "trim"):
        monkeypatch.delattr(DirtyTracker, name)


def without_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bitmap-mode always, a failed backup forgets what it did not copy."""
    monkeypatch.setattr(DirtyBitmap, "merge_clusters", lambda self, clusters: None)


def without_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect h: what a client failed to copy after the job had passed is left out."""

    async def nothing(self: BackupJob) -> None:
        await self._copy.in_flight.wait_no_conflict(self._copy.clusters(Extent(0, self._copy.size)))

    async def once(self: BlockCopy, area: Extent) -> None:
        while (run := self.dirty.next_set(area, self.chunk_bytes_max)) is not None:
            await self._copy_run(run)

    monkeypatch.setattr(BackupJob, "_sweep", nothing)
    monkeypatch.setattr(BlockCopy, "copy", once)


@pytest.mark.parametrize(
    "mutation",
    [without_reclaim, without_tracker, without_merge, without_sweep],
    ids=lambda mutation: mutation.__name__,
)
def test_machine_finds_what_is_missing(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    searching = settings(
        COMMON, max_examples=1500, stateful_step_count=45, derandomize=True, phases=[Phase.generate]
    )
    with pytest.raises(Violation):
        run_state_machine_as_test(IncrementalMachine, settings=searching)
