"""A rate limit in slices of 100 ms.

Within a slice the quota can be used as fast as one likes; who used more has to wait as
many slices as it takes to make good. The amount is accounted when it is known, so a
single large copy goes through at once and the next one pays for it. That is also why
accounting never waits: a client's copy-before-write counts, but is never held up.
"""

import time
from collections.abc import Callable

SLICE_S = 0.1


class RateLimit:
    """`speed` bytes per second; 0 is no limit."""

    def __init__(self, speed: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._speed = speed
        self._slice_start_s = clock()
        self._used_bytes = 0

    @property
    def speed(self) -> int:
        """Bytes per second; 0 is no limit."""
        return self._speed

    def set_speed(self, speed: int) -> None:
        """Change the limit; what was used too much before is paid at the new rate."""
        self._roll()
        self._speed = speed

    def account(self, length: int) -> None:
        """`length` bytes are being copied; a negative `length` gives back what was not, after all.

        Quota of a slice that is over cannot be given back.
        """
        self._roll()
        if self._speed:
            self._used_bytes = max(0, self._used_bytes + length)

    def delay_s(self) -> float:
        """How long to wait before anything more may be copied; 0: go on."""
        self._roll()
        if not self._speed or self._used_bytes < self._quota_bytes:
            return 0.0
        return self._slice_end_s - self._clock()

    @property
    def _quota_bytes(self) -> float:
        return self._speed * SLICE_S

    @property
    def _slice_end_s(self) -> float:
        slices = max(1.0, self._used_bytes / self._quota_bytes)
        return self._slice_start_s + slices * SLICE_S

    def _roll(self) -> None:
        """Begin a new slice if there is no limit, or the present one is over."""
        now_s = self._clock()
        if not self._speed or now_s >= self._slice_end_s:
            self._slice_start_s = now_s
            self._used_bytes = 0
