"""Errors with a QMP class of their own; every other failure is a GenericError."""

from nbdbackup.errors import NbdBackupError


class QmpError(NbdBackupError):
    """A failure to be sent as it is."""

    error_class = "GenericError"


class CommandNotFoundError(QmpError):
    """There is no such command, or not in this state of the connection."""

    error_class = "CommandNotFound"


class DeviceNotActiveError(QmpError):
    """There is no block job of that name."""

    error_class = "DeviceNotActive"
