"""Where we differ from QEMU on purpose: what, and why. The one list of it.

A step of a script names the entry: `both.differing(differences.X).fail(...)`. There the two sides must
differ, and only as the entry says; a step that no longer does fails, and so does an entry that no script
names (test_harness.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

from nbdbackup.job.events import Json


def _anyhow(qemu: Json, ours: Json) -> bool:
    del qemu, ours
    return True


def _reversed(qemu: Json, ours: Json) -> bool:
    return isinstance(qemu, list) and isinstance(ours, list) and ours == qemu[::-1]


def _is_extended(qemu: Json, ours: Json) -> bool:
    """Whether our error says what QEMU's does, and then more."""
    assert isinstance(qemu, dict)
    assert isinstance(ours, dict)
    return str(ours["desc"]).startswith(str(qemu["desc"])) and ours["class"] == qemu["class"]


@dataclass(frozen=True, slots=True)
class Difference:
    """`qemu` and `ours` say what each does; `why` is the reason; `holds` is what is true all the same."""

    qemu: str
    ours: str
    why: str
    holds: Callable[[Json, Json], bool] = _anyhow


JOB_ID_DEFAULT = Difference(
    qemu="refuses a job without job-id on a node that no drive has: Invalid job ID ''",
    ours="calls it as its node",
    why="there are no drives here, and a node's name is as good as a drive's",
)
LIST_ORDER = Difference(
    qemu="query-jobs, query-block-jobs and query-block-exports list the newest first",
    ours="lists the oldest first",
    why="`job list` and its readers want the order of starting; QMP promises none",
    holds=_reversed,
)
REFUSED_JOB_EVENTS = Difference(
    qemu="says of a job that it refuses, for its speed or because another action of its transaction failed, "
    "that it was created and is gone",
    ours="tells of no job that it has refused",
    why="nothing has happened that anybody could act on",
)
WRITABLE_LATE = Difference(
    qemu="refuses a writable export of a node while it is backed up: its filter shares no writing",
    ours="lets it in: its writes pass the same filter",
    why="the filter is in the node, so no export of it can write past it, whenever it was made",
)
SHUTDOWN = Difference(
    qemu="qemu-storage-daemon says nothing when it ends; qemu-system says SHUTDOWN",
    ours="says SHUTDOWN",
    why="clients can tell an orderly end from a crash",
)
