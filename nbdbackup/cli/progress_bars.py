"""Progress bars, drawn by rich."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nbdbackup.cli.replies import JobInfo


class BarProgress:
    """A bar for each job; a context manager."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "BarProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def report(self, job: JobInfo) -> None:
        """Draw how far `job` is, and its status when that is not plain running."""
        description = job.id if job.status == "running" else f"{job.id} ({job.status})"
        if job.id not in self._tasks:
            self._tasks[job.id] = self._progress.add_task(description)
        self._progress.update(
            self._tasks[job.id],
            description=description,
            completed=job.current_progress,
            total=job.total_progress or None,
        )

    def pause(self) -> None:
        """Leave the terminal to somebody else."""
        self._progress.stop()

    def resume(self) -> None:
        """Draw again."""
        self._progress.start()
