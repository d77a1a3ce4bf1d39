"""The end of the daemon has a limit, whatever its devices do.

Asked to stop, the daemon finishes what is in flight, ends the jobs, drops the snapshots, flushes and closes
the devices. Any of it waits for a device that hangs (a server that is there and does not answer, a dead
disk) for as long as that hangs, and a thread inside a system call cannot be called back at all.

So when most of the time is over, every device is flushed, each on its own: one that hangs must not cost
another one the writes that were acknowledged. When all of it is over, the process leaves as it stands, with
one line on what it left behind and a status that is not 0. What a crash at that moment would leave, this
does: no file is called a whole backup that is not.

Law: nothing here may wait for anything without the limit, or for a thread to end.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nbdbackup.block.node import Node
from nbdbackup.daemon.graph import Graph
from nbdbackup.job.registry import JobRegistry
from nbdbackup.job.states import JobStatus
from nbdbackup.server.server import Server

logger = logging.getLogger(__name__)

FLUSH_SHARE = 0.25
"""The part of the time that is kept for the last flush."""
STATUS_ABANDONED = 1


class Ending:
    """Ends the process `limit_s` (0: no limit) after `begin`, unless `close` comes first."""

    def __init__(self, limit_s: float, graph: Graph, leftovers: Sequence[Path]) -> None:
        """`leftovers`: files that say that the daemon is there, and must not outlive it."""
        # Set once.
        self._limit_s = limit_s
        self._graph = graph
        self._leftovers = leftovers
        # Changing while running: known as far as the daemon got when it was put together.
        self.server: Server | None = None
        self.jobs: JobRegistry | None = None
        self._watching: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """The time runs from now on, by the running event loop; once is enough."""
        if self._watching is None and self._limit_s:
            self._watching = asyncio.get_running_loop().create_task(self._watch(), name="ending")

    def close(self) -> None:
        """All is done."""
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        await asyncio.sleep(self._limit_s * (1 - FLUSH_SHARE))
        unflushed = await _flush(list(self._graph), self._limit_s * FLUSH_SHARE)
        still_open = set(self._graph)
        abandoned = [*self._unfinished(), *(what for node, what in unflushed.items() if node in still_open)]
        logger.error(
            "could not stop within %g s (--stop-timeout), and left it at that; abandoned: %s",
            self._limit_s,
            "; ".join(abandoned) or "what was still running; all disks are flushed",
        )
        for path in self._leftovers:
            with suppress(OSError):
                path.unlink()
        logging.shutdown()
        # Not sys.exit: it would wait for the threads that hang.
        os._exit(STATUS_ABANDONED)

    def _unfinished(self) -> list[str]:
        """What is still under way, in words."""
        requests = self.server.requests_in_flight() if self.server is not None else {}
        jobs = list(self.jobs) if self.jobs is not None else []
        return [
            *(f"{count} requests of clients of {export}" for export, count in requests.items()),
            *(
                f"job {job.id}"
                for job in jobs
                if not job.is_left and job.status not in (JobStatus.CONCLUDED, JobStatus.NULL)
            ),
        ]


async def _flush(nodes: Sequence[Node], limit_s: float) -> dict[Node, str]:
    """Flush all that can be written, at once, in at most `limit_s`; what could not be, with its story."""
    flushes = {node: asyncio.ensure_future(node.root.flush()) for node in nodes if not node.root.read_only}
    if not flushes:
        return {}
    await asyncio.wait(flushes.values(), timeout=limit_s)
    stories: dict[Node, str] = {}
    for node, flush in flushes.items():
        failure: object = "no answer"
        if flush.done():
            failure = "cancelled" if flush.cancelled() else flush.exception()
        if failure is not None:
            stories[node] = f"the flush of {node.name}, which may lose what was written to it ({failure})"
    return stories
