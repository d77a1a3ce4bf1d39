"""The exit statuses that scripts rely on."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """What `nbdbackup` exits with."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    ERRORS_IGNORED = 3
    """Done, after errors of reading the source that the user wanted to be ignored."""
    NOT_FOUND = 10
    """No such server, node, snapshot or job."""
    INTERRUPTED = 130
