"""Telling a failure, which a user can understand and mend, from a bug."""

from nbdbackup.errors import NbdBackupError

Failure = NbdBackupError | OSError


def failure_in(error: BaseException) -> Failure | None:
    """The failure that `error` is, or the first one of a group of nothing but failures.

    None for a bug: anything else, alone or anywhere in a group.
    """
    if isinstance(error, NbdBackupError | OSError):
        return error
    if isinstance(error, BaseExceptionGroup):
        failures = [failure_in(member) for member in error.exceptions]
        if all(failure is not None for failure in failures):
            return failures[0]
    return None


def describe(error: BaseException) -> str:
    """`error` in one line for a person."""
    if isinstance(error, OSError) and not isinstance(error, NbdBackupError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error) or type(error).__name__
