"""Memory that all clients of a server share: what their requests and unsent replies may hold.

Every session has bounds of its own; a thousand sessions at their bounds would still be too much.
So each tells the budget how many bytes it holds, and receives nothing more while the budget is
used up and it holds much. Who holds little can always go on with short requests: an honest client
is never shut out, and the whole stays below `bytes_max`, one request, and a little for each client.

Who uses the budget up and then, while others wait for it, sends and receives next to nothing of what it
holds in `STALL_S` is disconnected: a byte now and then must not keep the memory for ever. A client
that stands still while nobody is in need (a stopped virtual machine) is left alone.
"""

import asyncio
from typing import Protocol

BYTES_MAX = 256 << 20
FREE_BYTES = 1 << 20
"""A request no longer than this starts in any case, if its session holds no more than this."""
STALL_S = 30.0
MOVED_SHARE_MIN = 1 / 16
"""Of what a session holds, so much has to move in `STALL_S`."""


class Holder(Protocol):
    """A session, as its budget sees it."""

    @property
    def moved_bytes(self) -> int:
        """How much it has sent and received in its life."""

    def wake(self) -> None:
        """There is room again."""

    def disconnect(self, reason: str) -> None:
        """End it."""


class SharedBudget:
    """`used` bytes of at most `bytes_max` are held by all sessions together."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.used = 0
        self._held: dict[Holder, int] = {}
        self._waiting: set[Holder] = set()
        self._check: asyncio.TimerHandle | None = None
        self._moved_before: dict[Holder, int] = {}
        """How much each had moved when `_check` was set."""

    @property
    def is_full(self) -> bool:
        """Whether sessions have to stop."""
        return self.used >= self.bytes_max

    def hold(self, holder: Holder, held_bytes: int) -> None:
        """`holder` holds `held_bytes` now; 0 forgets it."""
        self.used += held_bytes - self._held.pop(holder, 0)
        if held_bytes:
            self._held[holder] = held_bytes
        if self._waiting and not self.is_full:
            waiting, self._waiting = self._waiting, set()
            for waiter in waiting:
                waiter.wake()

    def wait(self, holder: Holder) -> None:
        """Wake `holder` when there is room."""
        self._waiting.add(holder)
        if self._check is None:
            self._check_later()

    def leave(self, holder: Holder) -> None:
        """`holder` has ended."""
        self._waiting.discard(holder)
        self.hold(holder, 0)
        if self._check is not None and not self._held and not self._waiting:
            self._check.cancel()
            self._check = None

    def _end_stalled(self) -> None:
        self._check = None
        if not self._waiting:
            return
        for holder, held_bytes in tuple(self._held.items()):
            if holder not in self._moved_before or held_bytes <= FREE_BYTES:
                continue
            moved = holder.moved_bytes - self._moved_before[holder]
            if moved < held_bytes * MOVED_SHARE_MIN:
                holder.disconnect(
                    f"it kept {held_bytes} bytes that others need, and moved {moved} in {STALL_S:.0f} s"
                )
        self._check_later()

    def _check_later(self) -> None:
        self._moved_before = {holder: holder.moved_bytes for holder in self._held}
        self._check = asyncio.get_running_loop().call_later(STALL_S, self._end_stalled)
