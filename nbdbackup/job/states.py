"""The states of a job, and what is possible in each: two tables, QEMU's.

    undefined -> created -> running -> waiting -> pending -> concluded -> null
                    |       |  ^  |       |          |           ^
                    |       v  |  |       |          |           |
                    |      paused |       |          |           |
                    '-------------'-------'----------'-> aborting

Running can also become ready, and ready be paused (standby), for jobs that have to be told to
complete. From created a job that is never started goes to null.

Laws: a job changes its state in `Job._enter` alone, which asserts `TRANSITIONS`; a verb
of a user is looked up in `VERBS` before anything else happens.

Source: QEMU's QMP reference, JobStatus and JobVerb.
"""

from enum import Enum


class JobStatus(Enum):
    """Where a job is in its life; the values are QMP's."""

    UNDEFINED = "undefined"
    """Not known to any registry yet."""
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    """Paused while ready."""
    WAITING = "waiting"
    """The work is done; others of the same transaction may still work."""
    PENDING = "pending"
    """Waits to be finalized, or is being finalized."""
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    """Over, for good or ill; waits to be dismissed."""
    NULL = "null"
    """Forgotten."""


class JobVerb(Enum):
    """What a user can ask of a job; the values are QMP's."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.UNDEFINED: frozenset({JobStatus.CREATED}),
    JobStatus.CREATED: frozenset({JobStatus.RUNNING, JobStatus.ABORTING, JobStatus.NULL}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.PAUSED, JobStatus.READY, JobStatus.WAITING, JobStatus.ABORTING},
    ),
    JobStatus.PAUSED: frozenset({JobStatus.RUNNING}),
    JobStatus.READY: frozenset({JobStatus.STANDBY, JobStatus.WAITING, JobStatus.ABORTING}),
    JobStatus.STANDBY: frozenset({JobStatus.READY}),
    JobStatus.WAITING: frozenset({JobStatus.PENDING, JobStatus.ABORTING}),
    JobStatus.PENDING: frozenset({JobStatus.ABORTING, JobStatus.CONCLUDED}),
    JobStatus.ABORTING: frozenset({JobStatus.ABORTING, JobStatus.CONCLUDED}),
    JobStatus.CONCLUDED: frozenset({JobStatus.NULL}),
    JobStatus.NULL: frozenset(),
}

_ALIVE = frozenset(
    {JobStatus.CREATED, JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.READY, JobStatus.STANDBY},
)

VERBS: dict[JobVerb, frozenset[JobStatus]] = {
    JobVerb.CANCEL: _ALIVE | {JobStatus.WAITING, JobStatus.PENDING},
    JobVerb.PAUSE: _ALIVE,
    JobVerb.RESUME: _ALIVE,
    JobVerb.SET_SPEED: _ALIVE,
    JobVerb.COMPLETE: frozenset({JobStatus.READY}),
    JobVerb.FINALIZE: frozenset({JobStatus.PENDING}),
    JobVerb.DISMISS: frozenset({JobStatus.CONCLUDED}),
}
