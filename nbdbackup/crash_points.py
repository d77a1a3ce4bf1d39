"""Crash points: the named steps of every sequence whose order keeps data safe, for tests to kill at.

    reach("snapshot.create.made")

does nothing, unless the environment has NBDBACKUP_CRASH_AT=snapshot.create.made: then the process is killed
there as by `kill -9`; with NBDBACKUP_CRASH_AT=snapshot.create.made:3, the third time that it comes there.
Names are literals, so that reading the source finds all of them.
"""

import os
import signal

VARIABLE = "NBDBACKUP_CRASH_AT"

_name, _, _number = os.environ.get(VARIABLE, "").partition(":")
_times_left = int(_number) if _number.isdigit() else 1


def reach(name: str) -> None:
    """The sequence has come to the step called `name`."""
    if name == _name:
        _count_down()


def _count_down() -> None:
    global _times_left
    _times_left -= 1
    if not _times_left:
        os.kill(os.getpid(), signal.SIGKILL)
