"""Events put in a form in which two daemons can be compared.

QEMU pauses a job for a moment whenever it drains its nodes, and says so: `paused` and `running` with no
command in between. Such a pair says nothing to a user and is left out; a pause that somebody asked
for, or that an error brought, has a command or its error beside it and stays.
"""

import json
from collections.abc import Iterable, Sequence

from nbdbackup.job.events import Json
from tests.oracle.masks import Mask, without
from tests.oracle.side import Event, Marker

PAUSED, RUNNING = "status paused", "status running"
MARKER = "marker"
IGNORED = '"action": "ignore"'
PAUSING = {f"{prefix}{verb}" for prefix in ("job-", "block-job-") for verb in ("pause", "resume", "cancel")}


def job_of(event: Event) -> str | None:
    """The id of the job that the event is about; None: it is about none."""
    data = event["data"]
    assert isinstance(data, dict)
    if not str(event["event"]).startswith(("JOB_", "BLOCK_JOB_")):
        return None
    return str(data.get("id", data.get("device")))


def jobs_in(history: Iterable[Event | Marker]) -> set[str]:
    """Every job that has an event."""
    found = {job_of(entry) for entry in history if not isinstance(entry, Marker)}
    return {job for job in found if job is not None}


def life(history: Iterable[Event | Marker], job: str, masks: Sequence[Mask]) -> list[str]:
    """All that was said of `job`, less QEMU's pauses for drains."""
    words: list[str] = []
    for entry in history:
        if isinstance(entry, Marker):
            if entry.command in PAUSING:
                words.append(MARKER)
        elif job_of(entry) == job:
            words.append(_word(entry, masks))
            if words[-2:] == [PAUSED, RUNNING]:
                del words[-2:]
                words += [] if words[-1:] == [RUNNING] else [RUNNING]
    words = [word for word in words if word != MARKER]
    repeats = [RUNNING, *(word for word in words if word.startswith("BLOCK_JOB_ERROR") and IGNORED in word)]
    return [
        word for place, word in enumerate(words) if word not in repeats or words[place - 1 : place] != [word]
    ]


def of_no_job(history: Iterable[Event | Marker]) -> list[str]:
    """The events that are about no job, by name; those of one name in their order."""
    words = [_word(entry, ()) for entry in history if not isinstance(entry, Marker) and job_of(entry) is None]
    return sorted(words, key=lambda word: word.split()[0])


def _word(event: Event, masks: Sequence[Mask]) -> str:
    data: Json = event["data"]
    if event["event"] == "JOB_STATUS_CHANGE":
        assert isinstance(data, dict)
        return f"status {data['status']}"
    return f"{event['event']} {json.dumps(without(data, masks), sort_keys=True)}"
