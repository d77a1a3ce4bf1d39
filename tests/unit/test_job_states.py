"""The two tables of a job's life, as QEMU documents them."""

import pytest

from nbdbackup.errors import ConflictError
from nbdbackup.job.job import Job
from nbdbackup.job.states import TRANSITIONS, VERBS, JobStatus, JobVerb
from tests.support.jobs import ScriptedJob

ORDER = list(JobStatus)
# Columns: undefined created running paused ready standby waiting pending aborting concluded null
TRANSITION_GRID = {
    JobStatus.UNDEFINED: "-X---------",
    JobStatus.CREATED:   "--X-----X-X",
    JobStatus.RUNNING:   "---XX-X-X--",
    JobStatus.PAUSED:    "--X--------",
    JobStatus.READY:     "-----XX-X--",
    JobStatus.STANDBY:   "----X------",
    JobStatus.WAITING:   "-------XX--",
    JobStatus.PENDING:   "--------XX-",
    JobStatus.ABORTING:  "--------XX-",
    JobStatus.CONCLUDED: "----------X",
    JobStatus.NULL:      "-----------",
}  # fmt: skip
VERB_GRID = {
    JobVerb.CANCEL:    "-XXXXXXX---",
    JobVerb.PAUSE:     "-XXXXX-----",
    JobVerb.RESUME:    "-XXXXX-----",
    JobVerb.SET_SPEED: "-XXXXX-----",
    JobVerb.COMPLETE:  "----X------",
    JobVerb.FINALIZE:  "-------X---",
    JobVerb.DISMISS:   "---------X-",
}  # fmt: skip

CALLS = {
    JobVerb.CANCEL: Job.cancel,
    JobVerb.PAUSE: Job.pause,
    JobVerb.RESUME: Job.resume,
    JobVerb.SET_SPEED: lambda job: job.set_speed(1),
    JobVerb.COMPLETE: Job.complete,
    JobVerb.FINALIZE: Job.finalize,
    JobVerb.DISMISS: Job.dismiss,
}
REFUSED = [
    (status, verb)
    for verb, row in VERB_GRID.items()
    for status, mark in zip(ORDER, row, strict=True)
    if mark == "-"
]


def _row(allowed: frozenset[JobStatus]) -> str:
    return "".join("X" if status in allowed else "-" for status in ORDER)


def test_transitions_are_qemus() -> None:
    assert {status: _row(allowed) for status, allowed in TRANSITIONS.items()} == TRANSITION_GRID


def test_verbs_are_accepted_in_qemus_states() -> None:
    assert {verb: _row(allowed) for verb, allowed in VERBS.items()} == VERB_GRID


@pytest.mark.parametrize(("status", "verb"), REFUSED, ids=lambda value: str(value.value))
async def test_refused_verb_names_job_state_and_verb(status: JobStatus, verb: JobVerb) -> None:
    job = ScriptedJob("job1")
    job.status = status
    with pytest.raises(ConflictError) as caught:
        CALLS[verb](job)
    if verb is JobVerb.RESUME:
        assert str(caught.value) == "Can't resume a job that was not paused"
    else:
        expected = f"Job 'job1' in state '{status.value}' cannot accept command verb '{verb.value}'"
        assert str(caught.value) == expected
    assert job.status is status
