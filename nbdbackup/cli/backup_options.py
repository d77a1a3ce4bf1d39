"""What `nbdbackup backup` can be told: its parser, and the options that come out of it."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from nbdbackup.block.open import is_remote
from nbdbackup.cli.parser import (
    Verbs,
    absolute_place,
    add_control,
    add_on_cbw_error,
    control_path,
    count,
    only,
    size,
)
from nbdbackup.errors import UsageError

WORKERS_MAX = 64
SYNC_MODES = ("full", "top", "incremental", "bitmap", "none")
BITMAP_MODES = ("on-success", "never", "always")
ON_ERROR = ("report", "ignore", "stop", "enospc", "auto")

DESCRIPTION = """\
Copy NODE, as it is at the moment when the command is accepted, to TARGET, while clients go
on writing. TARGET is a new raw file: the copy is called TARGET.partial until it is complete
and on stable storage, so a file called TARGET is a whole backup. An existing file is never
touched, unless -n is given. Or TARGET is the URI of another NBD server's export, of NODE's
size: that is overwritten in place, as with -n.

Ctrl-C asks whether to detach (the job goes on) or to cancel it; with no terminal it cancels,
and so does SIGTERM. The exit status is the job's: 0 complete, 1 failed, 3 complete after
errors of the source that were ignored, 130 interrupted."""


class SyncOptions(msgspec.Struct, frozen=True):
    """What is copied, and what becomes of the bitmap."""

    mode: str = "full"
    bitmap: str | None = None
    bitmap_mode: str | None = None


class BackupOptions(msgspec.Struct, frozen=True):
    """What `backup` was told; `target` is absolute, or a URI."""

    control: Path
    json: bool
    node: str
    target: str
    existing: bool
    sync: SyncOptions
    speed: int
    workers: int
    scratch: str
    scratch_bytes_max: int | None
    on_source_error: str
    on_target_error: str
    on_cbw_error: str
    job_id: str | None
    progress: bool | None
    wait: bool

    def arguments(self) -> dict[str, object]:
        """Those of `x-nbdbackup-backup`."""
        arguments: dict[str, object] = {
            "node": self.node,
            "target": self.target,
            "existing": self.existing,
            "sync": self.sync.mode,
            "bitmap": self.sync.bitmap,
            "bitmap-mode": self.sync.bitmap_mode,
            "speed": self.speed,
            "workers": self.workers,
            "scratch": self.scratch,
            "scratch-max": self.scratch_bytes_max,
            "on-source-error": self.on_source_error,
            "on-target-error": self.on_target_error,
            "on-cbw-error": self.on_cbw_error,
            "job-id": self.job_id,
            "auto-finalize": True,
            # A job that nobody waits for stays listed, so that `job watch` can tell how it ended.
            "auto-dismiss": self.wait,
        }
        return {name: value for name, value in arguments.items() if value is not None}


def add_parser(verbs: Verbs, run: Callable[[argparse.Namespace], int]) -> None:
    """Add `backup`, which `run` runs."""
    parser = verbs.add_parser(
        "backup",
        help="copy a node's present point in time to a file, a device or another NBD server",
        description=DESCRIPTION,
    )
    parser.add_argument("node", metavar="NODE")
    parser.add_argument("target", metavar="TARGET", help="a path, as this machine sees it, or an NBD URI")
    _add_what(parser)
    _add_target(parser)
    _add_pace(parser)
    _add_errors(parser)
    parser.add_argument("--job-id", metavar="ID", help="default: the server picks one")
    parser.add_argument(
        "-p",
        "--progress",
        action="store_true",
        default=None,
        help="show progress also when there is no terminal",
    )
    parser.add_argument(
        "--no-wait",
        action="store_true",
        help="print the job's id and leave; see 'job watch' and, when it is over, 'job dismiss'",
    )
    add_control(parser)
    parser.set_defaults(run=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sync",
        choices=SYNC_MODES,
        default="full",
        help="what to copy. full (default): everything. top: what NODE's top layer holds; of a sparse file, "
        "its data. incremental: what is dirty in --bitmap, which has only what changed since if the backup "
        "succeeds. bitmap: the same, and --bitmap-mode says what becomes of the bitmap. none: nothing but "
        "what clients overwrite, from now until the job is cancelled (needs -n or a URI). What is not "
        "copied reads as zeroes in a new TARGET, and stays as it is in an existing one",
    )
    parser.add_argument("--bitmap", metavar="B", help="a dirty bitmap of NODE (see 'bitmap list')")
    parser.add_argument(
        "--bitmap-mode",
        choices=BITMAP_MODES,
        help="what becomes of the bitmap. on-success: it forgets what was copied, if the backup succeeds. "
        "always: also if it fails, but for what was not copied. never: it forgets nothing. Implied by "
        "--sync incremental: on-success",
    )


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-O",
        "--target-format",
        type=only("target format", "raw", ("qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed")),
        default="raw",
        metavar="raw",
        help="the default, and all that this version does",
    )
    parser.add_argument(
        "-n",
        "--existing",
        action="store_true",
        help="overwrite TARGET, an existing file or device of NODE's size, in place; "
        "until the job is complete its contents are a mix",
    )


def _add_pace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-r", "--rate", type=size, default=0, metavar="RATE", help="bytes a second (default 0: no limit)"
    )
    parser.add_argument(
        "-m",
        "--workers",
        type=count,
        default=8,
        metavar="WORKERS",
        help="copies in flight at once (default 8)",
    )
    parser.add_argument(
        "--scratch",
        default="auto",
        metavar="auto|none|DIR",
        help="where the old contents go that a client's write is about to replace. none: straight to TARGET, "
        "so a slow TARGET slows clients. DIR: a file in DIR. auto (default): none for a path, the server's "
        "state directory for a URI",
    )
    parser.add_argument(
        "--scratch-max",
        type=size,
        metavar="SIZE",
        help="at most so many bytes of scratch, then --on-cbw-error",
    )


def _add_errors(parser: argparse.ArgumentParser) -> None:
    for side, what in (("source", "reading NODE"), ("target", "writing TARGET")):
        parser.add_argument(
            f"--on-{side}-error",
            choices=ON_ERROR,
            default="report",
            help=f"when {what} fails. report (default): the backup fails. ignore: try again until it works. "
            "stop: pause the job until 'job resume', then try again. enospc, auto: stop if there is no space "
            "left, else report. Nothing is ever left out",
        )
    add_on_cbw_error(parser, "backup")


def backup_options(namespace: argparse.Namespace) -> BackupOptions:
    """The options that `namespace` stands for.

    Raises:
        UsageError: one asks for what this version does not do, or for the impossible.
    """
    remote = is_remote(namespace.target)
    if namespace.target.endswith("/") and not remote:
        raise UsageError(
            f"this version does not make chains of backups yet; TARGET is a file: {namespace.target}"
        )
    if not namespace.target:
        raise UsageError("TARGET is empty")
    if not 1 <= namespace.workers <= WORKERS_MAX:
        raise UsageError(f"-m/--workers is 1 to {WORKERS_MAX}, not {namespace.workers}")
    scratch = namespace.scratch
    return BackupOptions(
        control=control_path(namespace.control),
        json=namespace.json,
        node=namespace.node,
        target=absolute_place(namespace.target),
        existing=namespace.existing or remote,
        sync=_sync_options(namespace),
        speed=namespace.rate,
        workers=namespace.workers,
        scratch=scratch if scratch in ("auto", "none") else os.path.abspath(scratch),
        scratch_bytes_max=namespace.scratch_max,
        on_source_error=namespace.on_source_error,
        on_target_error=namespace.on_target_error,
        on_cbw_error=namespace.on_cbw_error,
        job_id=namespace.job_id,
        progress=namespace.progress,
        wait=not namespace.no_wait,
    )


def _sync_options(namespace: argparse.Namespace) -> SyncOptions:
    mode, bitmap, bitmap_mode = namespace.sync, namespace.bitmap, namespace.bitmap_mode
    if mode in ("incremental", "bitmap") and bitmap is None:
        raise UsageError(f"--sync {mode} needs --bitmap, which says what is to be copied")
    if bitmap is None and bitmap_mode is not None:
        raise UsageError("--bitmap-mode is about a bitmap: name it with --bitmap")
    if bitmap is not None and bitmap_mode is None and mode != "incremental":
        raise UsageError(f"--bitmap needs --bitmap-mode with --sync {mode}")
    if mode == "none" and not namespace.existing and not is_remote(namespace.target):
        raise UsageError("--sync none never completes a new file: write into an existing TARGET with -n")
    return SyncOptions(mode, bitmap, bitmap_mode)
