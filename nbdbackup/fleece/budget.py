"""ByteBudget: at most so many bytes of buffers at once; later takers wait in order."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """`bytes_max` bytes to hand out. Who asks for more than all of them gets all of them."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._free = bytes_max
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, length: int) -> AsyncIterator[None]:
        """Hold `length` bytes for the length of the block."""
        length = min(length, self.bytes_max)
        await self._wait_taken(length)
        try:
            yield
        finally:
            self._give_back(length)

    async def _wait_taken(self, length: int) -> None:
        if not self._waiting and length <= self._free:
            self._free -= length
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (length, granted)
        self._waiting.append(entry)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._give_back(length)
            else:
                self._waiting.remove(entry)
            raise

    def _give_back(self, length: int) -> None:
        self._free += length
        while self._waiting and self._waiting[0][0] <= self._free:
            taken, granted = self._waiting.popleft()
            self._free -= taken
            granted.set_result(None)
