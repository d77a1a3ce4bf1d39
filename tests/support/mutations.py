"""Ways to take one wait or check out of the copy-on-write engine, to see whether the tests notice."""

import errno
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from nbdbackup.block.device import WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import SnapshotError
from nbdbackup.extents import Extent
from nbdbackup.fleece import snapshots
from nbdbackup.fleece.block_copy import BlockCopy
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite
from nbdbackup.fleece.request_list import RequestList
from nbdbackup.fleece.snapshot_access import SnapshotAccess
from nbdbackup.fleece.snapshots import Snapshot, SnapshotPlan, take_snapshots

Mutation = Callable[[pytest.MonkeyPatch], None]


class DeafRequestList(RequestList):
    """Nobody waits for what is in it."""

    __slots__ = ()

    def find_conflict(self, area: Extent) -> None:
        del area


def without_frozen_read_wait(patch: pytest.MonkeyPatch) -> None:
    """Client writes don't wait for snapshot reads that are reading the source."""
    initialise = CopyBeforeWrite.__init__

    def deaf(self: CopyBeforeWrite, *args: object, **kwargs: object) -> None:
        initialise(self, *args, **kwargs)  # type: ignore[arg-type]
        self.frozen_reads = DeafRequestList()

    patch.setattr(CopyBeforeWrite, "__init__", deaf)


def without_drain(patch: pytest.MonkeyPatch) -> None:
    """Snapshots are taken while writes are in flight."""

    @asynccontextmanager
    async def at_once(*nodes: Node) -> AsyncIterator[None]:
        for node in nodes:
            node._quiesce()
        yield
        for node in nodes:
            node._resume()

    patch.setattr(snapshots, "drained", at_once)
    patch.setattr(Node, "is_drained", True)


def without_copy_wait(patch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a copy that somebody else has begun."""
    initialise = BlockCopy.__init__

    def deaf(self: BlockCopy, *args: object, **kwargs: object) -> None:
        initialise(self, *args, **kwargs)  # type: ignore[arg-type]
        self.in_flight = DeafRequestList()

    patch.setattr(BlockCopy, "__init__", deaf)


def without_retry(patch: pytest.MonkeyPatch) -> None:
    """Who waited for somebody else's copy believes that it succeeded."""

    async def copy(self: BlockCopy, area: Extent) -> None:
        area = self.clusters(area)
        while (run := self.dirty.next_set(area, self.chunk_bytes_max)) is not None:
            await self._copy_run(run)
        await self.in_flight.wait_no_conflict(area)

    patch.setattr(BlockCopy, "copy", copy)


def without_common_instant(patch: pytest.MonkeyPatch) -> None:
    """Each node is drained for its own snapshot alone."""

    async def take_in_turn(plans: Sequence[SnapshotPlan]) -> list[Snapshot]:
        return [(await take_snapshots([plan]))[0] for plan in plans]

    patch.setattr(snapshots, "take_snapshots", take_in_turn)


def without_second_look(patch: pytest.MonkeyPatch) -> None:
    """A view's read looks at the state of the snapshot before it reads, and never again."""

    async def read(self: SnapshotAccess, offset: int, buffer: WritableBuffer) -> None:
        check = self._check_readable
        check(Extent(offset, len(buffer)))
        self._check_readable = lambda area: None  # type: ignore[method-assign]
        try:
            await original(self, offset, buffer)
        finally:
            self._check_readable = check  # type: ignore[method-assign]

    original = SnapshotAccess.read
    patch.setattr(SnapshotAccess, "read", read)


def without_wait_before_trim(patch: pytest.MonkeyPatch) -> None:
    """Discarding gives scratch back while a copy is still filling it."""

    async def trim(self: SnapshotAccess, offset: int, length: int, fua: bool = False) -> None:
        if self._dropped:
            raise SnapshotError(errno.EIO, "dropped")
        area = self._copy.discard(Extent(offset, length))
        if area.length:
            await self._scratch.trim(area.offset, area.length)

    patch.setattr(SnapshotAccess, "trim", trim)


def without_dirty_again(patch: pytest.MonkeyPatch) -> None:
    """A copy that failed is forgotten."""
    patch.setattr(BlockCopy, "_set_dirty_again", lambda self, run: None)


def without_zero_and_trim_interception(patch: pytest.MonkeyPatch) -> None:
    """Only plain writes save what they change."""
    patch.setattr(CopyBeforeWrite, "write_zeroes", FilterDevice.write_zeroes)
    patch.setattr(CopyBeforeWrite, "trim", FilterDevice.trim)


MUTATIONS: list[Mutation] = [
    without_frozen_read_wait,
    without_drain,
    without_copy_wait,
    without_retry,
    without_second_look,
    without_wait_before_trim,
    without_dirty_again,
    without_zero_and_trim_interception,
]
"""What the state machine has to find; a common instant needs two nodes, and a test of its own."""
