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
    qemu="says of a job that it refuses for its speed that it was created and is gone",
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
NAMES_USERS = Difference(
    qemu="says that a node or an export is in use",
    ours="says the same, and by whom",
    why="whoever is told can do something about it",
    holds=_is_extended,
)
COMPRESS = Difference(
    qemu="names the drive that cannot be compressed to, and a node is none: the name is empty",
    ours="names the node",
    why="a message without the name helps nobody",
    holds=_is_extended,
)
OPEN_FAILED = Difference(
    qemu="Could not open 'PATH': and the system's words",
    ours="says what is wrong with PATH and what to do",
    why="the same words as for the same mistake on the command line",
)
TLS_CREDENTIALS = Difference(
    qemu="nbd-server-start takes credentials made by object-add",
    ours="refuses tls-creds by name: every listener has the TLS that `serve` was given",
    why="there is no object-add, and a listener in the clear by mistake would be worse than an error",
)
SCRATCH_SIZE = Difference(
    qemu="makes a copy-before-write node on a target of another size, which fails later",
    ours="refuses it: Source and target image have different sizes",
    why="a client's write is the worst moment to learn of it",
)
TIMEOUT_ERROR = Difference(
    qemu="fails a client's write that could not be saved in time with EINVAL, as NBD has no ETIMEDOUT",
    ours="fails it with EIO",
    why="the client's request was valid",
)
TOP_OF_RAW = Difference(
    qemu="takes all of a raw file for allocated in the top layer, and copies its holes as zeroes",
    ours="takes a raw file's holes for what is not in the top layer",
    why="it is the only layer that a raw file has, and a sparse disk is copied in the time its data takes",
)
BITMAP_TWICE = Difference(
    qemu="exports a bitmap twice under one name if it is listed twice",
    ours="refuses it: the bitmap is in use",
    why="no client could tell the two from each other",
)
VIEW_REFUSES = Difference(
    qemu="answers a read of what a view does not have (EACCES, which NBD has not) with EINVAL",
    ours="answers it with EPERM",
    why="the client's request was valid, but may not be",
)
ABORTED_ALWAYS = Difference(
    qemu="takes a backup with bitmap-mode=always whose transaction is aborted for a failed job: all that it "
    "would have copied is added to the bitmap",
    ours="leaves the bitmap as it was",
    why="an aborted transaction has changed nothing",
)
DISCARD_DURING_BACKUP = Difference(
    qemu="ignores clients' discards while a node is backed up: its filter does not pass them on",
    ours="saves what they touch, and discards",
    why="the seed did so, and a disk goes on giving back space however long its backup takes",
)
