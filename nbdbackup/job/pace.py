"""Pace: how fast the workers of a job go, and whether they go at all.

Workers come by between their steps: in `pause_point` they rest while a pause is asked for, in
`throttle` they also wait for the rate limit. Whoever changes something wakes all who wait, to look again.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from nbdbackup.job.rate_limit import RateLimit


class Pace:
    """`on_rest(resting)` is called whenever that may have changed: whether all workers rest in a pause."""

    def __init__(self, limit: RateLimit, on_rest: Callable[[bool], None]) -> None:
        self.limit = limit
        self.pause_asked = False
        self._on_rest = on_rest
        self._kick = asyncio.Event()
        self._workers = 0
        self._workers_paused = 0
        self._workers_held_up = 0

    @property
    def is_held_up(self) -> bool:
        """Whether every worker waits for the rate limit, or for a time to try again."""
        return self._workers_held_up >= max(1, self._workers)

    @contextmanager
    def worker(self) -> Iterator[None]:
        """One of several concurrent workers is between here and there."""
        self._workers += 1
        try:
            yield
        finally:
            self._workers -= 1
            self.settle()

    @contextmanager
    def waiting_for_worker(self) -> Iterator[None]:
        """This worker only waits for another one: whether all rest is the other's to say."""
        self._workers -= 1
        self.settle()
        try:
            yield
        finally:
            self._workers += 1

    async def pause_point(self) -> None:
        """Return when no pause is asked for."""
        while self.pause_asked:
            self._workers_paused += 1
            self.settle()
            try:
                await self._kick.wait()
            finally:
                self._workers_paused -= 1
                self.settle()

    async def throttle(self, length: int) -> None:
        """Return when `length` bytes may be copied, and account for them. Also a `pause_point`."""
        while True:
            await self.pause_point()
            delay_s = self.limit.delay_s()
            if delay_s <= 0:
                break
            await self.wait_kick(delay_s)
        # No await since delay_s: two workers must not use the same quota.
        self.limit.account(length)

    async def wait_for_ever(self) -> NoReturn:
        """There is nothing to do but to be paused, resumed and, at last, cancelled."""
        while True:
            await self.pause_point()
            await self.wait_kick(None)

    async def wait_kick(self, timeout_s: float | None) -> None:
        """Wait for so many seconds, or until something changes (None: only that)."""
        self._workers_held_up += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self._kick.wait()
        except TimeoutError:
            pass
        finally:
            self._workers_held_up -= 1

    def kick(self) -> None:
        """Something has changed: wake whoever waits."""
        self._kick.set()
        self._kick = asyncio.Event()

    def settle(self) -> None:
        """Tell whether all workers rest."""
        self._on_rest(self.pause_asked and 0 < self._workers_paused >= self._workers)
