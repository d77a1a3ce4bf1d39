"""An event loop that goes on only when the test says so, with a clock that the test moves."""

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple, Unpack

ROUNDS_MAX = 10_000

Ts = TypeVarTuple("Ts")


class Livelock(AssertionError):
    """Tasks keep waking each other and never come to wait for the test."""


class SteppedLoop(asyncio.SelectorEventLoop):
    """Runs in `settle` alone; `time` stands still but for `advance`. Deterministic."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._callbacks = 0
        super().__init__()

    def time(self) -> float:
        return self._now_s

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        self._callbacks += 1
        return super().call_soon(callback, *args, context=context)

    def settle(self) -> None:
        """Run every task until it waits for something that only the test can give."""
        for _ in range(ROUNDS_MAX):
            before = self._callbacks
            # One round: whatever was ready at its start.
            self.stop()
            self.run_forever()
            if self._callbacks == before:
                return
        raise Livelock

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self._now_s += seconds
        self.settle()
