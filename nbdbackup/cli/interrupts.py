"""Ctrl-C and SIGTERM as something that a command can wait for, and a question on the terminal."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

ANSWER_BYTES_MAX = 1024


class Interrupts:
    """Counts SIGINT and SIGTERM. `wait` returns once for each; see `caught`."""

    def __init__(self) -> None:
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()

    def notice(self, number: signal.Signals) -> None:
        """A signal has come."""
        self._signals.put_nowait(number)

    async def wait(self) -> signal.Signals:
        """The next signal that comes, or came and was not waited for."""
        return await self._signals.get()


@asynccontextmanager
async def caught() -> AsyncIterator[Interrupts]:
    """Inside, SIGINT and SIGTERM do nothing but be counted; one that is ignored stays so."""
    loop = asyncio.get_running_loop()
    interrupts = Interrupts()
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if not is_ignored(number)
    }
    for number in before:
        loop.add_signal_handler(number, interrupts.notice, number)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def is_ignored(number: signal.Signals) -> bool:
    """Whether whoever started this process does not want it to notice the signal (nohup, `&` in a script)."""
    return signal.getsignal(number) is signal.SIG_IGN


def can_ask() -> bool:
    """Whether a person sits there: questions go to standard error, answers come from standard input."""
    return sys.stdin.isatty() and sys.stderr.isatty()


async def answer_to(question: str) -> str:
    """Ask on the terminal; the line that was typed, lower case; empty at end of input."""
    print(question, end="", file=sys.stderr, flush=True)
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    descriptor = sys.stdin.fileno()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
    # A terminal in its usual mode hands over whole lines.
    return os.read(descriptor, ANSWER_BYTES_MAX).decode(errors="replace").strip().lower()
