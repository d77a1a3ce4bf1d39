"""Progress of jobs: bars on a terminal, a line now and then elsewhere, or nothing.

All of it goes to standard error: standard output belongs to results.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from nbdbackup.cli.output import say
from nbdbackup.cli.replies import JobInfo
from nbdbackup.cli.sizes import format_size

LINE_EVERY_PERCENT = 10


class Progress(Protocol):
    """Shows how far jobs are."""

    def report(self, job: JobInfo) -> None:
        """Show the state of `job`."""

    def finish(self, job_id: str, done: int, total: int) -> None:
        """The job is over, after `done` of `total` bytes."""

    def tell(self, line: str) -> None:
        """Show a line that stays, whatever else is drawn."""

    def pause(self) -> None:
        """Stop drawing: somebody else writes to the terminal now."""

    def resume(self) -> None:
        """Draw again."""


class NoProgress:
    """Shows nothing."""

    def report(self, job: JobInfo) -> None:
        """Show nothing."""

    def finish(self, job_id: str, done: int, total: int) -> None:
        """Show nothing."""

    def tell(self, line: str) -> None:
        """Write the line."""
        say(line)

    def pause(self) -> None:
        """Nothing to stop."""

    def resume(self) -> None:
        """Nothing to begin again."""


class LineProgress(NoProgress):
    """A line for every tenth of the way, for logs."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def report(self, job: JobInfo) -> None:
        """Write a line if the job has passed another tenth."""
        percent = 100 * job.current_progress // job.total_progress if job.total_progress else 0
        step = percent // LINE_EVERY_PERCENT * LINE_EVERY_PERCENT
        if step > self._told.get(job.id, -1):
            self._told[job.id] = step
            total = format_size(job.total_progress)
            say(f"{job.id}: {percent}% ({format_size(job.current_progress)} of {total}), {job.status}")


@contextmanager
def shown(wanted: bool | None) -> Iterator[Progress]:
    """A Progress while in the context.

    Bars if standard error is a terminal; elsewhere lines if `wanted`, else nothing. Nothing at all
    if `wanted` is False.
    """
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield NoProgress()
    elif not sys.stderr.isatty():
        yield LineProgress()
    else:
        # Here and in progress_bars.py alone is rich imported: it is slow to.
        from nbdbackup.cli.progress_bars import BarProgress

        with BarProgress() as bars:
            yield bars
