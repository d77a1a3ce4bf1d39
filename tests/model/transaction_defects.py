"""Defects of transactions, jobs and bitmaps, to be put in one at a time: a model must find each."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import pytest

from nbdbackup.bitmap.dirty import DirtyBitmap
from nbdbackup.block.device import ReadableBuffer
from nbdbackup.block.node import Node
from nbdbackup.daemon import transaction
from nbdbackup.daemon.backups import BackupAction
from nbdbackup.daemon.bitmaps import ClearBitmap, EnableBitmap, MergeBitmaps
from nbdbackup.daemon.transaction import Action
from nbdbackup.errors import CopyError
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite
from nbdbackup.fleece.dirty_tracker import DirtyTracker
from nbdbackup.job.backup import BackupJob
from nbdbackup.job.sync import FrozenBitmap

T = TypeVar("T")

Defect = Callable[[pytest.MonkeyPatch], None]


def reclaim_without_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed backup forgets what clients wrote while it ran."""

    def reclaim(self: DirtyBitmap) -> None:
        self._planes.spare.setall(0)
        self._end_successor()

    monkeypatch.setattr(DirtyBitmap, "reclaim", reclaim)


def reclaim_without_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed backup forgets what it was to copy."""
    monkeypatch.setattr(DirtyBitmap, "reclaim", DirtyBitmap.abdicate)


def abdicate_whatever_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with bitmap-mode never, a backup takes what it copied out of its bitmap."""

    def succeed(self: FrozenBitmap) -> None:
        self._end()
        self.bitmap.abdicate()

    monkeypatch.setattr(FrozenBitmap, "succeed", succeed)


def always_without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bitmap-mode always, a failed backup forgets what it did not copy."""
    monkeypatch.setattr(DirtyBitmap, "merge_clusters", lambda self, clusters: None)


def abort_keeps_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """An undone transaction leaves a bitmap cleared."""
    monkeypatch.setattr(ClearBitmap, "abort", lambda self: None)


def abort_keeps_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """An undone transaction leaves bitmaps merged."""
    monkeypatch.setattr(MergeBitmaps, "abort", lambda self: None)


def abort_keeps_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An undone transaction leaves a bitmap enabled, or disabled."""
    monkeypatch.setattr(EnableBitmap, "abort", lambda self: None)


def abort_keeps_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An undone backup keeps its bitmap."""
    monkeypatch.setattr(FrozenBitmap, "thaw", lambda self: None)


def grouped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a group fails, and the others do not hear of it."""
    monkeypatch.setattr(BackupAction, "join", lambda self, together: None)


def instant_without_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients' writes are in flight at the instant."""

    @asynccontextmanager
    async def nothing(*nodes: Node) -> AsyncIterator[None]:
        yield

    monkeypatch.setattr(transaction, "drained", nothing)


def commit_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are final before the later ones were prepared."""

    def take(actions: Sequence[Action], failure: Exception | None) -> None:
        for action in actions:
            action.prepare()
            action.commit()
        if failure is not None:
            raise failure

    monkeypatch.setattr(transaction, "_take", take)


def bit_after_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit is set only when the write has returned."""

    async def write(self: DirtyTracker, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        await self.child.write(offset, data, fua)
        await self._mark(offset, len(data))

    monkeypatch.setattr(DirtyTracker, "write", write)


def quick_write_without_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The write that does not wait sets no bit."""
    monkeypatch.setattr(
        DirtyTracker, "write_nowait", lambda self, offset, data: self.child.write_nowait(offset, data)
    )


def write_before_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients' writes do not wait for the old bytes to be copied."""

    async def write(self: CopyBeforeWrite, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        await self.child.write(offset, data, fua)

    monkeypatch.setattr(CopyBeforeWrite, "write", write)
    monkeypatch.setattr(CopyBeforeWrite, "write_nowait", lambda self, offset, data: False)


def bitmap_changed_before_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the same transaction changes the bitmap that a backup has looked at before."""
    monkeypatch.setattr(DirtyBitmap, "_changed", lambda self: None)


def ignored_means_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be copied is left out when errors are ignored."""

    async def persist(self: BackupJob, step: Callable[[], Awaitable[T]]) -> T:
        with suppress(CopyError):
            return await step()
        return None  # type: ignore[return-value]

    async def nothing(self: BackupJob) -> None:
        """No sweep either."""

    monkeypatch.setattr(BackupJob, "_persist", persist)
    monkeypatch.setattr(BackupJob, "_sweep", nothing)


def skipped_stays_in_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """With sync=top, what is not copied is waited for in vain."""
    monkeypatch.setattr(BackupJob, "_note_skipped", lambda self, length: None)


DEFECTS: list[Defect] = [
    reclaim_without_successor,
    reclaim_without_bits,
    abort_keeps_clear,
    abort_keeps_merge,
    abort_keeps_enabled,
    abort_keeps_frozen,
    grouped_alone,
    instant_without_drain,
    commit_one_by_one,
    skipped_stays_in_total,
    ignored_means_left_out,
    bitmap_changed_before_instant,
    write_before_copy,
    bit_after_forward,
]
RARE_DEFECTS: list[Defect] = [
    abdicate_whatever_mode,
    always_without_rest,
    quick_write_without_bit,
]
"""These take a longer search."""
