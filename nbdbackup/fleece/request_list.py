"""RequestList: the ranges that somebody is working on, and waiting for them to end.

Two lists of this kind make the engine safe: the copies in flight, which a client write
and the job wait for, and the frozen reads, which a client write waits for.

Law: nothing may `await` between `find_conflict(...) is None` and the act that relied on it
(another `hold`, or the start of the write). asyncio runs other tasks only at an await.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from nbdbackup.extents import Extent


class Request:
    """One range being worked on; ends once."""

    __slots__ = ("_ended", "extent")

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Wake everybody who waits for this request."""
        self._ended.set()

    async def wait_ended(self) -> None:
        """Return once this request has ended; others may overlap its range by then."""
        await self._ended.wait()


class RequestList:
    """Ranges in flight. They may overlap each other; callers who mind look first."""

    __slots__ = ("_requests",)

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def find_conflict(self, area: Extent) -> Request | None:
        """A request that overlaps `area` by at least one byte, or None."""
        for request in self._requests:
            if request.extent.overlaps(area):
                return request
        return None

    @contextmanager
    def hold(self, extent: Extent) -> Iterator[None]:
        """Be in the list with `extent` for the length of the block."""
        request = Request(extent)
        self._requests.append(request)
        try:
            yield
        finally:
            self._requests.remove(request)
            request.end()

    async def wait_no_conflict(self, area: Extent) -> None:
        """Return at a moment when nothing overlaps `area`; see the law above."""
        while (request := self.find_conflict(area)) is not None:
            await request.wait_ended()
