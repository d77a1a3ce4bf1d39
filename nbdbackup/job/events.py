"""What jobs tell the world: QMP events, with QEMU's names and members.

In the BLOCK_JOB events, `device` is the job's id, as in QEMU.
"""

from collections.abc import Mapping, Sequence

import msgspec

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


class Event(msgspec.Struct, frozen=True):
    """One QMP event; the time stamp is added where it leaves."""

    name: str
    data: Mapping[str, Json]


def job_status_change(job_id: str, status: str) -> Event:
    """The job has entered `status`."""
    return Event("JOB_STATUS_CHANGE", {"status": status, "id": job_id})


def block_job_pending(job_id: str, job_type: str) -> Event:
    """The job waits for job-finalize."""
    return Event("BLOCK_JOB_PENDING", {"type": job_type, "id": job_id})


def block_job_error(job_id: str, operation: str, action: str) -> Event:
    """A "read" of the source or a "write" of the target failed; `action` is what the job does about it."""
    return Event("BLOCK_JOB_ERROR", {"device": job_id, "operation": operation, "action": action})


class JobFigures(msgspec.Struct, frozen=True):
    """The members that BLOCK_JOB_COMPLETED and BLOCK_JOB_CANCELLED share."""

    job_id: str
    job_type: str
    total_bytes: int
    done_bytes: int
    speed: int

    def _data(self) -> dict[str, Json]:
        return {
            "device": self.job_id,
            "len": self.total_bytes,
            "offset": self.done_bytes,
            "speed": self.speed,
            "type": self.job_type,
        }

    def completed(self, error: str | None) -> Event:
        """The job is over by itself; without `error` it succeeded."""
        data = self._data()
        if error is not None:
            data["error"] = error
        return Event("BLOCK_JOB_COMPLETED", data)

    def cancelled(self) -> Event:
        """The job is over because it was cancelled."""
        return Event("BLOCK_JOB_CANCELLED", self._data())
