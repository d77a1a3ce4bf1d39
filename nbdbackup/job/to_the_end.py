"""Work that no cancellation may cut short."""

import asyncio
from collections.abc import Awaitable


async def to_the_end(work: Awaitable[None]) -> None:
    """Await `work` to its end however often this task is cancelled; then let the cancel through."""
    task = asyncio.ensure_future(work)
    torn_down: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            torn_down = error
    task.result()
    if torn_down is not None:
        raise torn_down
