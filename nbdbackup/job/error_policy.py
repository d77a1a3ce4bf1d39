"""What a job does when reading the source or writing the target fails; the words are QMP's.

    report          the job fails
    ignore          it tries the same clusters again, for as long as it takes
    stop            it pauses; when it is resumed it tries the same clusters again
    enospc, auto    stop if there is no space left, else report

Whatever the policy, nothing is left out: a job that succeeds has copied every cluster. A client's
own copy-before-write is never subject to these policies; see `fleece/copy_before_write.py`.

Source: QEMU's BlockdevOnError, BlockErrorAction and BlockDeviceIoStatus.
"""

import errno
from enum import Enum

import msgspec

from nbdbackup.errors import CopyError, Side

RETRY_FIRST_S = 0.01
RETRY_LAST_S = 1.0
"""An ignored error is retried after this long at the latest, so that a dead end is no busy loop."""


class OnError(Enum):
    """A user's choice for one end of the job."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class ErrorAction(Enum):
    """What is done about one error."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


class IoStatus(Enum):
    """How a job's I/O is, as far as errors stopped it; back to ok when it is resumed."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"

    @classmethod
    def of(cls, code: int) -> "IoStatus":
        """What the errno `code` makes of it."""
        return cls.NOSPACE if code == errno.ENOSPC else cls.FAILED


class ErrorPolicies(msgspec.Struct, frozen=True):
    """One choice for each end."""

    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT

    def action(self, error: CopyError) -> ErrorAction:
        """What to do about `error`."""
        policy = self.on_source_error if error.side is Side.SOURCE else self.on_target_error
        if policy in (OnError.ENOSPC, OnError.AUTO):
            return ErrorAction.STOP if error.errno == errno.ENOSPC else ErrorAction.REPORT
        return ErrorAction(policy.value)


REPORT_ERRORS = ErrorPolicies()
"""What holds when nobody chose anything else."""


def retry_delay_s(failures: int) -> float:
    """How long to wait after so many failures in a row, one or more."""
    return min(RETRY_FIRST_S * 2.0 ** min(failures - 1, 16), RETRY_LAST_S)
