"""Every interleaving of clients, snapshots, views and jobs, against a model (`world.py`).

`test_machine_finds_...` takes one wait or check out of the engine and expects the machine to notice:
a model that cannot fail proves nothing.
"""

import logging
import math
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from nbdbackup.fleece import copy_before_write
from nbdbackup.fleece.copy_before_write import OnCbwError
from tests.model.backups import BackupChoice, BackupWorld
from tests.model.expected import CLUSTER, SIZE, Violation
from tests.model.world import GATED_KINDS, JOBS_MAX, SNAPSHOTS_MAX
from tests.support import gated
from tests.support.mutations import MUTATIONS, Mutation

indexes = st.integers(0, 30)
offsets = st.integers(0, SIZE - 1)
lengths = st.integers(1, 3 * CLUSTER)
disks = st.sampled_from([0, 0, 0, 1])
policies = st.sampled_from(OnCbwError)
timeouts = st.sampled_from([0, 0, 5, 3600])


class FleeceMachine(RuleBasedStateMachine):
    """Thin: each rule is a step of the world."""

    world_type: type[BackupWorld] = BackupWorld

    def __init__(self) -> None:
        super().__init__()
        self.world = self.world_type()

    def teardown(self) -> None:
        self.world.finish()

    def _something_pending(self) -> bool:
        return any(True for _ in self.world.pending())

    def _points(self) -> bool:
        return bool(self.world.points)

    def _live_points(self) -> bool:
        return bool(self.world.live_points())

    @precondition(_something_pending)
    @rule(index=indexes)
    def perform(self, index: int) -> None:
        self.world.perform(index)

    @precondition(_something_pending)
    @rule(index=indexes)
    def release(self, index: int) -> None:
        self.world.release(index)

    @precondition(_something_pending)
    @rule(picked=st.lists(indexes, min_size=1, max_size=6))
    def release_several(self, picked: list[int]) -> None:
        for index in picked:
            if self._something_pending():
                self.world.release(index)

    @precondition(_something_pending)
    @rule(index=indexes)
    def fail(self, index: int) -> None:
        self.world.fail(index)

    @rule(index=indexes, kind=st.sampled_from(GATED_KINDS))
    def toggle(self, index: int, kind: str) -> None:
        self.world.toggle(index, kind)

    @rule(seconds=st.sampled_from([1, 5, 3600]))
    def advance(self, seconds: int) -> None:
        self.world.advance(seconds)

    @precondition(lambda self: bool(self.world.tasks))
    @rule(index=indexes)
    def cancel(self, index: int) -> None:
        self.world.cancel(index)

    @rule(
        disk=disks,
        offset=offsets,
        length=lengths,
        kind=st.sampled_from(["write", "write", "write_zeroes", "trim"]),
        quick=st.booleans(),
    )
    def client_write(self, disk: int, offset: int, length: int, kind: str, quick: bool) -> None:
        self.world.write(disk, offset, length, kind, quick)

    @precondition(lambda self: len(self.world.live_points()) < SNAPSHOTS_MAX)
    @rule(
        disks=st.sampled_from([[0], [0], [1], [0, 1], [1, 0]]),
        policy=policies,
        timeout=timeouts,
        scratch=st.sampled_from([None, None, 3]),
    )
    def take(self, disks: list[int], policy: OnCbwError, timeout: float, scratch: int | None) -> None:
        self.world.take(disks, policy, timeout, scratch)

    @precondition(_points)
    @rule(index=indexes, offset=offsets, length=lengths, quick=st.booleans())
    def view_read(self, index: int, offset: int, length: int, quick: bool) -> None:
        self.world.read(index, offset, length, quick)

    @precondition(_points)
    @rule(index=indexes, offset=offsets, length=lengths, discarding=st.booleans())
    def collide(self, index: int, offset: int, length: int, discarding: bool) -> None:
        self.world.collide(index, offset, length, discarding)

    @precondition(_points)
    @rule(index=indexes, offset=offsets, length=lengths)
    def view_status(self, index: int, offset: int, length: int) -> None:
        self.world.ask_status(index, offset, length)

    @precondition(_points)
    @rule(index=indexes, offset=offsets, length=lengths)
    def discard(self, index: int, offset: int, length: int) -> None:
        self.world.discard(index, offset, length)

    @precondition(_live_points)
    @rule(index=indexes, breaking=st.sampled_from([False, False, True]))
    def end_point(self, index: int, breaking: bool) -> None:
        if breaking:
            self.world.break_point(index)
        else:
            self.world.drop(index)

    @precondition(lambda self: len(self.world.jobs) < JOBS_MAX)
    @rule(disk=disks, policy=policies, timeout=timeouts, zeroed=st.booleans())
    def start_direct_job(self, disk: int, policy: OnCbwError, timeout: float, zeroed: bool) -> None:
        self.world.start_direct_job(disk, policy, timeout, zeroed)

    @precondition(lambda self: len(self.world.jobs) < JOBS_MAX and bool(self.world.live_points()))
    @rule(index=indexes, discarding=st.booleans(), zeroed=st.booleans())
    def start_view_job(self, index: int, discarding: bool, zeroed: bool) -> None:
        self.world.start_view_job(index, discarding, zeroed)

    @precondition(lambda self: len(self.world.backups) < JOBS_MAX)
    @rule(
        disk=disks,
        fleecing=st.booleans(),
        policy=policies,
        timeout=timeouts,
        zeroed=st.booleans(),
        speed=st.sampled_from([0, 0, 4 * CLUSTER]),
    )
    def start_backup(
        self, disk: int, fleecing: bool, policy: OnCbwError, timeout: float, zeroed: bool, speed: int
    ) -> None:
        self.world.start_backup(disk, BackupChoice(fleecing, policy, timeout, zeroed, speed))

    @precondition(lambda self: bool(self.world.backups))
    @rule(index=indexes, verb=st.sampled_from(["cancel", "pause", "resume", "resume", "speed up"]))
    def command_backup(self, index: int, verb: str) -> None:
        self.world.command_backup(index, verb)

    @precondition(lambda self: bool(self.world.jobs))
    @rule(index=indexes)
    def cancel_job(self, index: int) -> None:
        self.world.cancel_job(index)


@pytest.fixture(autouse=True)
def _machine_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time is the machine's own; and breaking snapshots is logged as an error, thousands of times here."""
    monkeypatch.setattr(gated, "CANCELLED_WAIT_S", math.inf)
    monkeypatch.setattr(copy_before_write, "ASK_ZEROES_BYTES_MIN", 5 * CLUSTER // 2)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


COMMON = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    database=None,
)


def test_views_and_jobs_show_their_point_in_time_whatever_happens() -> None:
    run_state_machine_as_test(
        FleeceMachine, settings=settings(COMMON, max_examples=300, stateful_step_count=50)
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_views_and_jobs_show_their_point_in_time_for_a_long_time() -> None:
    run_state_machine_as_test(
        FleeceMachine, settings=settings(COMMON, max_examples=3000, stateful_step_count=80)
    )


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_machine_finds_what_is_missing(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    searching = settings(
        COMMON, max_examples=1500, stateful_step_count=45, derandomize=True, phases=[Phase.generate]
    )
    with pytest.raises(Violation):
        run_state_machine_as_test(FleeceMachine, settings=searching)
