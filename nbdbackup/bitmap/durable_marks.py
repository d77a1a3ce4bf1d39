"""Marks that are on disk before the writes that they stand for begin: bitmaps that outlive a power loss.

Each granule costs one sync in each backup cycle, when it is first written to; after that its bit is on
disk, and writes pass at once. Those that come while a sync is under way share the next one:

    write A    mark -> begin sync 1 ................ done -> forward
    write B         mark -> wait ................... begin sync 2 ........ done -> forward
    write C              mark -> wait .............. (the same) .......... done -> forward

A write to a granule that another one has marked, and that is not on disk yet, waits as well.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable

from nbdbackup.errors import DeviceError


class _Batch:
    """Marks that one sync puts on disk."""

    __slots__ = ("done", "ranges")

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        """Granules, from the first one to before the last one."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class DurableMarks:
    """Which marks of one bitmap are not on disk yet, and who waits for them.

    `sync` puts on disk whatever was stored before it was called; it runs in a thread.
    """

    def __init__(self, sync: Callable[[], Awaitable[None]]) -> None:
        self._sync = sync
        # Changing while running.
        self._waiting: _Batch | None = None
        self._syncing: _Batch | None = None
        self._task: asyncio.Task[None] | None = None
        self._failure: DeviceError | None = None

    def has_pending(self, first: int, stop: int) -> bool:
        """Whether one of the granules from `first` to before `stop` was marked and may not be on disk yet."""
        if self._failure is not None:
            return True
        for batch in (self._syncing, self._waiting):
            if batch is not None and any(start < stop and first < end for start, end in batch.ranges):
                return True
        return False

    def settle(self, first: int, stop: int) -> Awaitable[None]:
        """The granules were just marked, and are pending from now on: await their being on disk.

        Cancelling that leaves the sync to the others that wait for it.

        Raises, when awaited:
            DeviceError: a sync failed, now or earlier. The kernel tells of a failed sync once, and a
                later success would be a lie: nothing settles any more.
        """
        if self._waiting is None:
            self._waiting = _Batch()
        batch = self._waiting
        batch.ranges.append((first, stop))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return _shielded(batch.done)

    @property
    def failure(self) -> DeviceError | None:
        """Why nothing settles any more."""
        return self._failure

    def fail(self, error: OSError) -> DeviceError:
        """The bitmap's file could not be put on disk, for whatever reason: nothing settles any more."""
        if self._failure is None:
            self._failure = _explained(error.errno or errno.EIO, error.strerror or str(error))
        return self._failure

    async def close(self) -> None:
        """Wait for the sync under way; nobody may be waiting."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while self._waiting is not None:
                self._syncing, self._waiting = self._waiting, None
                if self._failure is None:
                    await self._sync()
                self._end(self._syncing)
                self._syncing = None
        except OSError as error:
            self._fail(error.errno or errno.EIO, error.strerror or str(error))
        except BaseException as error:
            # A bug, or the end of the event loop: nobody may wait for ever.
            self._fail(errno.EIO, repr(error))
            raise
        finally:
            self._task = None

    def _fail(self, number: int, reason: str) -> None:
        self._failure = _explained(number, reason)
        for batch in (self._syncing, self._waiting):
            if batch is not None:
                self._end(batch)
        self._syncing = self._waiting = None

    def _end(self, batch: _Batch) -> None:
        if self._failure is None:
            batch.done.set_result(None)
        else:
            batch.done.set_exception(self._failure)
            # All who waited may be gone; then nobody asks for it.
            batch.done.exception()


def _explained(number: int, reason: str) -> DeviceError:
    return DeviceError(
        number,
        "a bitmap cannot be put on disk, and with --bitmap-durability power no write may pass without: "
        f"{reason}",
    )


async def _shielded(done: "asyncio.Future[None]") -> None:
    await asyncio.shield(done)
