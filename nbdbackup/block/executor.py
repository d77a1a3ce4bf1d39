"""Where blocking calls go: a bounded pool of threads for each device.

Each device has a pool of its own, so that a device that hangs can use up its own
threads and nobody else's. Threads start on demand.

A cancelled `run` still waits for its call to end. Otherwise a write could land after
everybody believes that it is over, which would break invariant 3 (snapshots are taken
drained).
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

THREADS_PER_DEVICE_MAX = 8


class IoExecutor:
    """Runs one device's blocking calls in at most `threads_max` threads."""

    def __init__(self, name: str, threads_max: int = THREADS_PER_DEVICE_MAX) -> None:
        self._pool = ThreadPoolExecutor(threads_max, thread_name_prefix=f"io-{name}")

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return `function(*args, **kwargs)` from a thread; ends only when the call has ended."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await _wait_settled(future)
            raise

    def shutdown(self) -> None:
        """Let the threads end; no call may be running."""
        self._pool.shutdown(wait=False)


async def _wait_settled(future: "asyncio.Future[R]") -> None:
    """Wait until `future` is done, however often the waiting task is cancelled."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()
