"""Jobs that outlive their process: who keeps one, and what of its snapshot may be given back when.

A fleecing job that is kept has no map of its own on disk. What is still to be copied is what its snapshot
still offers, so a cluster may be given back only when the target has it for sure: copied, then flushed, then
given back. Whatever a crash interrupts, and whatever the target's server loses in one of its own, a cluster
that is not safe in the target is still in the snapshot, and is copied again.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from nbdbackup.block.device import BlockDevice
from nbdbackup.crash_points import reach
from nbdbackup.errors import CopyError, Side
from nbdbackup.extents import Extent
from nbdbackup.job.target import Target

UNFLUSHED_BYTES_MAX = 32 << 20
"""So much may have to be copied once more after a crash; each flush keeps the job waiting."""
UNFLUSHED_S_MAX = 5.0
SCRATCH_SHARE = 4
"""Of a bounded scratch, so many-th part at most waits for a flush."""


class Keeper(Protocol):
    """Keeps one job on disk, from before its point in time until it is over; `daemon/jobs/store.py`."""

    def withdraw(self) -> None:
        """The job is over, or given up: no later process finds it. Cannot fail."""

    def note_broken(self, cause: OSError) -> None:
        """The point in time is lost, whatever happens from now on. Cannot fail."""

    async def remove(self) -> None:
        """Remove all files of the job, which was withdrawn. Must not fail."""

    async def leave(self) -> None:
        """Nobody uses the job or its node any more: save it for a later process. Must not fail."""


class GivingBack:
    """Gives clusters of `view` back that `target` has, flushed."""

    def __init__(
        self,
        view: BlockDevice,
        target: Target,
        scratch_bytes_max: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view = view
        self._target = target
        self._bytes_max = UNFLUSHED_BYTES_MAX
        if scratch_bytes_max is not None:
            self._bytes_max = min(self._bytes_max, scratch_bytes_max // SCRATCH_SHARE)
        self._clock = clock
        # Changing while running.
        self.lock = asyncio.Lock()
        """Held while the target is being flushed, and by whoever puts another device in its place."""
        self._runs: list[Extent] = []
        self._bytes = 0
        self._settled_at = clock()

    def note(self, run: Extent) -> None:
        """Whole clusters `run` were copied."""
        self._runs.append(run)
        self._bytes += run.length

    @property
    def is_due(self) -> bool:
        """Whether it is time to `settle`, and nobody is at it."""
        waited_s = self._clock() - self._settled_at
        return not self.lock.locked() and (self._bytes >= self._bytes_max or waited_s >= UNFLUSHED_S_MAX)

    async def settle(self) -> None:
        """Flush the target, and give back what was copied before.

        Raises:
            CopyError: it could not be flushed; nothing was given back.
        """
        async with self.lock:
            runs, self._runs, self._bytes = self._runs, [], 0
            self._settled_at = self._clock()
            try:
                await self._target.device.flush()
            except BaseException as error:
                self._runs = runs + self._runs
                if isinstance(error, OSError):
                    raise CopyError(Side.TARGET, 0, self._target.device.size, error) from error
                raise
            reach("job.give-back.flushed")
            for run in runs:
                await self._view.trim(run.offset, run.length)

    def forget(self) -> None:
        """What was copied and not flushed may be lost, and will be copied again."""
        self._runs, self._bytes = [], 0
