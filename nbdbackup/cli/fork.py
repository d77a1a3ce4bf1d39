"""`serve --fork`: a server in the background, whose start-up is still the caller's business.

The child runs the server with its standard output in a pipe. The parent passes on what
comes (the `listening on URI` lines) and leaves with status 0 when the child says that it
is ready, or with the child's own status if that ends before; so a failure to start is
seen by whoever started it, on standard error and in the status.

Ready is when the first line was printed and the event loop has come round once: the
server prints all its lines in one go, once every listener is bound.
"""

import asyncio
import io
import os
import stat
import sys
from collections.abc import Callable

READY = b"\0"


def run_detached(run: Callable[[], int]) -> int:
    """Run `run` in a detached child; returns in the parent, once the child is ready or has failed.

    Must be called while the process has no other thread and no event loop.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        if _relayed_until_ready(read_end):
            return 0
        _, wait_status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(wait_status)
    status = 1
    try:
        os.close(read_end)
        os.setsid()
        _point_at_null(0)
        os.dup2(write_end, 1)
        os.close(write_end)
        sys.stdout = _ReadyStream()
        status = run()
    finally:
        sys.stderr.flush()
        os._exit(status)


class _ReadyStream(io.TextIOBase):
    """Standard output of the child: passes lines to the parent, then tells it that all is ready."""

    def __init__(self) -> None:
        self._detaching = False
        self._detached = False

    def write(self, text: str) -> int:
        if not self._detached:
            os.write(1, text.encode())
            if not self._detaching:
                self._detaching = True
                asyncio.get_running_loop().call_soon(self._detach)
        return len(text)

    def _detach(self) -> None:
        os.write(1, READY)
        self._detached = True
        _point_at_null(1)
        # A log file goes on; a terminal or a pipe belongs to whoever started us, and must not be kept open.
        if not stat.S_ISREG(os.fstat(2).st_mode):
            _point_at_null(2)


def _relayed_until_ready(read_end: int) -> bool:
    """Copy what the child prints to standard output until it ends; whether the child became ready."""
    ready = False
    while chunk := os.read(read_end, 65536):
        ready = ready or READY in chunk
        sys.stdout.write(chunk.replace(READY, b"").decode(errors="replace"))
        sys.stdout.flush()
    os.close(read_end)
    return ready


def _point_at_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)
