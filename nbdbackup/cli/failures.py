"""How failures reach the person who typed the command: one line on standard error, and a status."""

import os
import sys
import traceback
from collections.abc import Callable

from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.errors import NbdBackupError, NotFoundError, UsageError


def guarded(run: Callable[[], int], verbose: bool) -> int:
    """`run()`, with whatever it raises told on one line (a traceback before it if `verbose`); the status."""
    try:
        return run()
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else ExitStatus.DONE
    except KeyboardInterrupt:
        _complain("interrupted")
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitStatus.FAILED
    except Exception as error:
        if verbose:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> ExitStatus:
    """Say on one line what failed; the exit status for it."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, NbdBackupError):
        _complain(str(error))
    elif isinstance(error, OSError):
        _complain(_os_error_text(error))
    else:
        _complain(f"internal error: {type(error).__name__}: {error} (-v shows where; please report it)")
    if isinstance(error, UsageError):
        return ExitStatus.USAGE
    if isinstance(error, NotFoundError):
        return ExitStatus.NOT_FOUND
    return ExitStatus.FAILED


def _os_error_text(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _complain(text: str) -> None:
    print(f"nbdbackup: {' '.join(text.split())}", file=sys.stderr)
