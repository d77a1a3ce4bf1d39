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

    @property
    def bytes_used(self) -> int:
        """How much is handed out now."""
        return self.bytes_max - self._free

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
        self._waiting.append((length, granted))
        try:
            await granted
        except asyncio.CancelledError:
            # Granted in the same turn of the loop: nobody will use it. Otherwise those behind may fit now.
            self._give_back(0 if granted.cancelled() else length)
            raise

    def _give_back(self, length: int) -> None:
        self._free += length
        while self._waiting:
            wanted, granted = self._waiting[0]
            # Whose task is cancelled leaves its future cancelled before it runs again itself.
            if not granted.cancelled():
                if wanted > self._free:
                    return
                self._free -= wanted
                granted.set_result(None)
            self._waiting.popleft()
