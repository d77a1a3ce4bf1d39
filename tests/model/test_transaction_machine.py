"""Every interleaving of clients, transactions and jobs, with errors, against a model (`transactions.py`)."""

import gc
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from msgspec.structs import replace

from nbdbackup.bitmap import dirty, node_bitmaps
from nbdbackup.daemon import backups
from nbdbackup.fleece import copy_before_write
from nbdbackup.fleece.copy_before_write import OnCbwError
from nbdbackup.fleece.scratch import Scratch
from nbdbackup.job.error_policy import ErrorPolicies, OnError
from nbdbackup.job.sync import BitmapSyncMode, Sync, SyncMode
from nbdbackup.monitor.services_backup import BackupRequest, TargetNode
from nbdbackup.monitor.services_bitmaps import (
    BitmapAdd,
    BitmapClear,
    BitmapEnable,
    BitmapMerge,
    BitmapRemove,
)
from tests.model.expected import CLUSTER, Violation
from tests.model.steps import DISKS, Abort, Change
from tests.model.test_fleece_machine import COMMON, disks, indexes, lengths, offsets, policies
from tests.model.transaction_defects import DEFECTS, RARE_DEFECTS, Defect
from tests.model.transactions import MODEL_SCRATCH, TARGETS, TransactionWorld
from tests.model.world import GATED_KINDS, JOB_CHUNK
from tests.support import gated

NAMES = ("x", "x", "y", "z")
JOBS_MAX = 4
TRANSACTIONS_MAX = 3

nodes = st.sampled_from(DISKS)
names = st.sampled_from(NAMES)
SYNCS = st.one_of(
    st.just(Sync(SyncMode.FULL)),
    st.just(Sync(SyncMode.TOP)),
    st.just(Sync(SyncMode.NONE)),
    st.builds(Sync, st.just(SyncMode.INCREMENTAL), names),
    st.builds(Sync, st.just(SyncMode.BITMAP), names, st.sampled_from(BitmapSyncMode)),
    st.builds(Sync, st.sampled_from([SyncMode.FULL, SyncMode.TOP]), names, st.sampled_from(BitmapSyncMode)),
)
on_errors = st.sampled_from([OnError.REPORT, OnError.REPORT, OnError.IGNORE, OnError.STOP])


def _backup(
    node: str,
    target: str,
    sync: Sync,
    policies: ErrorPolicies,
    on_cbw: OnCbwError,
    more: list[bool],
    speed: int,
) -> BackupRequest:
    finalize, dismiss, fleecing, same_id = more
    return BackupRequest(
        node,
        TargetNode(target),
        sync,
        "same" if same_id and finalize and not dismiss else None,
        speed=speed,
        workers=3,
        chunk_bytes_max=JOB_CHUNK,
        scratch=MODEL_SCRATCH if fleecing and sync.mode is not SyncMode.NONE else "none",
        policies=policies,
        on_cbw_error=on_cbw,
        auto_finalize=finalize,
        auto_dismiss=dismiss,
    )


requests = st.builds(
    _backup,
    nodes,
    st.sampled_from(TARGETS),
    SYNCS,
    st.builds(ErrorPolicies, on_errors, on_errors),
    policies,
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.sampled_from([0, 0, 4 * CLUSTER]),
)
bitmap_changes = st.one_of(
    st.builds(
        BitmapAdd,
        nodes,
        names,
        st.sampled_from([CLUSTER // 2, CLUSTER, 2 * CLUSTER]),
        st.just(False),
        st.sampled_from([True, True, False]),
    ),
    st.builds(BitmapClear, nodes, names),
    st.builds(BitmapEnable, nodes, names, st.booleans()),
    st.builds(BitmapMerge, nodes, names, st.lists(st.tuples(nodes, names), min_size=1, max_size=2)),
    st.builds(BitmapRemove, nodes, names),
)
CHANGES: st.SearchStrategy[Change] = st.one_of(bitmap_changes, requests, requests, bitmap_changes)


class TransactionMachine(RuleBasedStateMachine):
    """Thin: each rule is a step of the world."""

    def __init__(self) -> None:
        super().__init__()
        self.world = TransactionWorld()
        # So that there is something to begin with.
        for node in DISKS:
            self.world.transact([BitmapAdd(node, "x", CLUSTER), BitmapAdd(node, "y", CLUSTER // 2)], False)

    def teardown(self) -> None:
        self.world.finish()

    def _something_pending(self) -> bool:
        return any(True for _ in self.world.pending())

    @precondition(_something_pending)
    @rule(index=indexes)
    def perform(self, index: int) -> None:
        self.world.perform(index)

    @precondition(_something_pending)
    @rule(picked=st.lists(indexes, min_size=1, max_size=8))
    def release(self, picked: list[int]) -> None:
        for index in picked:
            if self._something_pending():
                self.world.release(index)

    @precondition(_something_pending)
    @rule(held=st.sampled_from(["nothing", "nothing", "flush"]))
    def flow(self, held: str) -> None:
        self.world.flow(held)

    @precondition(lambda self: any(op.kind == "flush" for _, op in self.world.pending()))
    @rule(index=indexes)
    def fail_flush(self, index: int) -> None:
        self.world.fail_flush(index)

    @precondition(_something_pending)
    @rule(index=indexes)
    def fail(self, index: int) -> None:
        self.world.fail(index)

    @rule(index=indexes, kind=st.sampled_from(GATED_KINDS))
    def toggle(self, index: int, kind: str) -> None:
        self.world.toggle(index, kind)

    @rule(seconds=st.sampled_from([1, 5]))
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

    def _may_begin(self) -> bool:
        running = self.world.transactions_running
        return running < TRANSACTIONS_MAX and len(self.world.jobs_of_daemon) < JOBS_MAX

    @precondition(_may_begin)
    @rule(change=CHANGES)
    def alone(self, change: Change) -> None:
        self.world.transact([change], grouped=False)

    @precondition(_may_begin)
    @rule(
        changes=st.lists(CHANGES, min_size=2, max_size=4),
        grouped=st.booleans(),
        aborted=st.sampled_from([False, False, True]),
    )
    def together(self, changes: list[Change], grouped: bool, aborted: bool) -> None:
        self.world.transact([*changes, Abort()] if aborted else changes, grouped)

    @precondition(_may_begin)
    @rule(
        change=st.one_of(st.none(), bitmap_changes),
        requests=st.tuples(requests, requests),
        grouped=st.sampled_from([True, True, False]),
    )
    def both_disks(
        self,
        change: Change | None,
        requests: tuple[BackupRequest, BackupRequest],
        grouped: bool,
    ) -> None:
        changes: list[Change] = [] if change is None else [change]
        for node, target, request in zip(DISKS, TARGETS, requests, strict=False):
            changes.append(replace(request, node=node, target=TargetNode(target)))
        self.world.transact(changes, grouped)

    @precondition(_may_begin)
    @rule(
        node=nodes,
        clearing=st.booleans(),
        request=requests,
        mode=st.sampled_from(BitmapSyncMode),
        aborted=st.sampled_from([False, False, True]),
    )
    def change_and_use(
        self, node: str, clearing: bool, request: BackupRequest, mode: BitmapSyncMode, aborted: bool
    ) -> None:
        change = BitmapClear(node, "x") if clearing else BitmapMerge(node, "x", [(node, "y")])
        backup = replace(request, node=node, sync=Sync(SyncMode.BITMAP, "x", mode))
        self.world.transact([change, backup, *([Abort()] if aborted else [])], grouped=False)

    @precondition(lambda self: bool(self.world.jobs_of_daemon))
    @rule(
        index=indexes,
        verb=st.sampled_from(
            ["cancel", "pause", "resume", "resume", "finalize", "finalize", "dismiss", "dismiss", "speed"]
        ),
    )
    def command(self, index: int, verb: str) -> None:
        self.world.command(index, verb)


def _open_scratch(place: Path, size: int, cluster_bytes: int, bytes_max: int | None, title: str) -> Scratch:
    assert (str(place), cluster_bytes, bytes_max) == (MODEL_SCRATCH, CLUSTER, None)
    return TransactionWorld.current.open_scratch(size, title)


@pytest.fixture(autouse=True)
def _machine_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time is the machine's own; clusters and granules are small, and scratch is memory."""
    monkeypatch.setattr(gated, "CANCELLED_WAIT_S", math.inf)
    monkeypatch.setattr(copy_before_write, "ASK_ZEROES_BYTES_MIN", 5 * CLUSTER // 2)
    for module in (dirty, node_bitmaps):
        monkeypatch.setattr(module, "GRANULARITY_MIN", CLUSTER // 2)
    monkeypatch.setattr(backups, "CLUSTER_BYTES_DEFAULT", CLUSTER)
    monkeypatch.setattr(backups, "open_scratch", _open_scratch)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_transactions_are_all_or_nothing_and_bitmaps_never_lie_whatever_happens() -> None:
    run_state_machine_as_test(
        TransactionMachine, settings=settings(COMMON, max_examples=100, stateful_step_count=40)
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_machine_finds_what_is_wrong(defect: Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    defect(monkeypatch)
    _search(examples_max=1500)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("defect", RARE_DEFECTS, ids=lambda defect: defect.__name__)
def test_machine_finds_what_is_rarely_wrong(defect: Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    defect(monkeypatch)
    _search(examples_max=10_000)


def _search(examples_max: int) -> None:
    searching = settings(
        COMMON, max_examples=examples_max, stateful_step_count=40, derandomize=True, phases=[Phase.generate]
    )
    try:
        with pytest.raises(Violation):
            run_state_machine_as_test(TransactionMachine, settings=searching)
    finally:
        # A defect may leave tasks that never end: they are destroyed here, and not in another test.
        gc.collect()
