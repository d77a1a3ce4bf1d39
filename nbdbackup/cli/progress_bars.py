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
            # Standard output may be a file: it must not be drawn around the bars.
            redirect_stdout=False,
            redirect_stderr=False,
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
        self._draw(job.id, description, job.current_progress, job.total_progress)

    def finish(self, job_id: str, done: int, total: int) -> None:
        """Draw where the job ended."""
        self._draw(job_id, job_id, done, total)

    def _draw(self, job_id: str, description: str, done: int, total: int) -> None:
        if job_id not in self._tasks:
            self._tasks[job_id] = self._progress.add_task(description)
        self._progress.update(
            self._tasks[job_id], description=description, completed=done, total=total or None
        )

    def tell(self, line: str) -> None:
        """Write the line above the bars."""
        self._progress.console.print(line, markup=False, highlight=False)

    def pause(self) -> None:
        """Leave the terminal to somebody else."""
        self._progress.stop()

    def resume(self) -> None:
        """Draw again."""
        self._progress.start()
