"""`nbdbackup demo`: the main job on a temporary disk, end to end and in the open.

Everything is done with the commands that a person would type, run as processes of their
own, but for two clients: the one that keeps writing and the one that pulls the snapshot
(`demo_client.py`), so that nothing but nbdbackup itself need be installed.

The bytes of the point in time are known because the writer stands still for that moment
while the disk is hashed; then it goes on during everything else.
"""

import argparse
import hashlib
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console

from nbdbackup.cli.demo_client import DemoClient
from nbdbackup.cli.exit_status import ExitStatus
from nbdbackup.cli.parser import Verbs, add_verbose
from nbdbackup.cli.sizes import format_size
from nbdbackup.errors import NbdBackupError

DISK_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
RATE = "32M"
SEED = 20261123
COMMAND_TIMEOUT_S = 60
WRITES_BEFORE = 500
WRITES_TIMEOUT_S = 30
PACE_S = 0.001
SNAPSHOT = "disk@before"
PARENT_BYTES_MAX = 64

DESCRIPTION = """\
Serve a temporary disk of 64 MiB, keep writing to it over NBD, and meanwhile take a snapshot,
pull it through the second export and push a backup of the same moment; then prove with
hashes that both are that point in time, and that the disk has moved on. Takes some seconds,
and leaves nothing behind."""

SAME_YOURSELF = """\
The same with a disk of yours:
  nbdbackup serve -k /tmp/nbd.sock --fork disk=DISK.img
  nbdbackup snapshot create disk --name before
  qemu-img convert -O raw 'nbd+unix:///disk%40before?socket=/tmp/nbd.sock' PULL.img
  nbdbackup snapshot drop disk@before
  nbdbackup backup disk PUSH.img"""


class DemoOptions(msgspec.Struct, frozen=True):
    """What `demo` was told."""

    verbose: bool


def add_parser(verbs: Verbs) -> None:
    """Add `demo`."""
    parser = verbs.add_parser("demo", help="show the main job on a temporary disk", description=DESCRIPTION)
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """`demo`."""
    options = DemoOptions(namespace.verbose)
    # So that SIGTERM cleans up, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="nbdbackup-demo-", dir=_parent_directory()) as directory:
        return Demo(Path(directory), options).run()


def _parent_directory() -> str:
    """The usual place for temporary files, unless paths of sockets in there would be too long."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= PARENT_BYTES_MAX else "/tmp"


class Writer:
    """Writes random bytes at random places of export `disk` until stopped, in a thread."""

    def __init__(self, socket_path: Path) -> None:
        # Set once.
        self._client = DemoClient(str(socket_path), "disk")
        self._random = random.Random(SEED + 1)
        self._thread = threading.Thread(target=self._write_on, name="writer", daemon=True)
        # Changes while running; guarded by `_between`, which the thread holds while it writes.
        self._between = threading.Condition()
        self._stopping = False
        self._error: Exception | None = None
        self.writes = 0

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._between:
            self._stopping = True
        self._thread.join()
        self._client.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no write is under way and none begins."""
        with self._between:
            yield

    def wait_writes(self, count: int) -> None:
        """Wait for `count` more writes.

        Raises:
            NbdBackupError: the writer has failed, or is stuck.
        """
        with self._between:
            wanted = self.writes + count
            reached = self._between.wait_for(
                lambda: self.writes >= wanted or self._error is not None, WRITES_TIMEOUT_S
            )
            if self._error is not None:
                raise NbdBackupError(f"a client's write failed: {self._error}") from self._error
            if not reached:
                raise NbdBackupError(f"the client did not get through {count} writes in {WRITES_TIMEOUT_S} s")

    def _write_on(self) -> None:
        while True:
            length = self._random.choice((4096, 4096, 65536))
            offset = self._random.randrange(0, DISK_BYTES - length, 512)
            data = self._random.randbytes(length)
            time.sleep(PACE_S)
            with self._between:
                if self._stopping:
                    return
                try:
                    self._client.write(offset, data)
                except Exception as error:
                    self._error = error
                self.writes += 1
                self._between.notify_all()
                if self._error is not None:
                    return


class Demo:
    """One run in `directory`."""

    def __init__(self, directory: Path, options: DemoOptions) -> None:
        self._options = options
        self._console = Console(highlight=False, soft_wrap=True)
        self._disk = directory / "disk.img"
        self._pull = directory / "pull.img"
        self._push = directory / "push.img"
        self._socket = directory / "nbd.sock"
        self._state = directory / "state"
        self._log = directory / "log"
        self._directory = directory
        self._environment = {**os.environ, "NBDBACKUP_CONTROL": str(directory / "control.sock")}
        self._environment.pop("NOTIFY_SOCKET", None)

    def run(self) -> int:
        """Show everything; the exit status."""
        self._step(f"A disk of {format_size(DISK_BYTES)} of random bytes")
        disk_random = random.Random(SEED)
        with self._disk.open("wb") as disk:
            for _ in range(DISK_BYTES // CHUNK_BYTES):
                disk.write(disk_random.randbytes(CHUNK_BYTES))
        with self._server(), Writer(self._socket) as writer:
            self._step("A client connects to nbd+unix:///disk and keeps writing to it")
            writer.wait_writes(WRITES_BEFORE)
            moment = self._point_in_time(writer)
            written = writer.writes
            pulled = self._pulled()
            self._command("job", "watch", "push")
            self._command("job", "dismiss", "push")
            with writer.paused():
                live = _hash(self._disk)
                written = writer.writes - written
            self._command("snapshot", "list")
            self._command("snapshot", "drop", SNAPSHOT)
            writer.wait_writes(1)
        return self._verdict(moment, pulled, _hash(self._push), live, written)

    def _point_in_time(self, writer: Writer) -> str:
        """Take the snapshot and start the backup at one moment; the hash of the disk at that moment."""
        with writer.paused():
            self._step(f"The client pauses after {writer.writes} writes: this is the point in time")
            moment = _hash(self._disk)
            self._command("snapshot", "create", "disk", "--name", "before")
            self._command("backup", "disk", "push.img", "--job-id", "push", "-r", RATE, "--no-wait")
        self._step("The client writes on; the backup job copies in the background")
        return moment

    def _pulled(self) -> str:
        """Read the whole snapshot through its export into a file; the hash of the file."""
        self._step(f"Another client reads the whole export {SNAPSHOT} into pull.img")
        with DemoClient(str(self._socket), SNAPSHOT) as client, self._pull.open("wb") as pull:
            for offset in range(0, client.size, CHUNK_BYTES):
                pull.write(client.read(offset, min(CHUNK_BYTES, client.size - offset)))
        return _hash(self._pull)

    def _verdict(self, moment: str, pulled: str, pushed: str, live: str, written: int) -> int:
        self._console.print()
        for name, digest, verdict in (
            ("the disk at the point in time", moment, ""),
            ("pull.img, read from the snapshot", pulled, "same" if pulled == moment else "DIFFERENT"),
            ("push.img, written by the backup", pushed, "same" if pushed == moment else "DIFFERENT"),
            (f"the disk {written} writes later", live, "moved on" if live != moment else "NOT CHANGED"),
        ):
            self._console.print(f"  {name:<34}{digest}  {verdict}".rstrip(), markup=False)
        wrong = differences(moment, pulled, pushed, live)
        if wrong:
            raise NbdBackupError(f"the demo failed: {'; '.join(wrong)}")
        self._console.print(
            "\nBoth copies are the point in time; the disk has moved on.\n", style="bold green"
        )
        self._console.print(SAME_YOURSELF, markup=False)
        return ExitStatus.DONE

    @contextmanager
    def _server(self) -> Iterator[None]:
        """`nbdbackup serve`, which listens on return, and has ended after the context."""
        self._step("Serve it")
        arguments = ["serve", "-k", "nbd.sock", "--state-dir", "state", "disk=disk.img"]
        self._show(arguments)
        with self._log.open("wb") as log:
            server = subprocess.Popen(
                self._argv(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self._directory,
                env=self._environment,
                # A Ctrl-C here is not one for the server: it is stopped after its clients.
                start_new_session=True,
            )
        assert server.stdout is not None
        timer = threading.Timer(COMMAND_TIMEOUT_S, server.kill)
        timer.start()
        try:
            # One line, or the end of file if it fails to start.
            line = server.stdout.readline()
            timer.cancel()
            if not line:
                raise NbdBackupError(f"the server did not start: {self._log.read_text().strip()}")
            self._output(line)
            yield
            self._step("Stop the server")
            server.send_signal(signal.SIGTERM)
            if server.wait(COMMAND_TIMEOUT_S):
                raise NbdBackupError(f"the server ended badly: {self._log.read_text().strip()}")
        finally:
            timer.cancel()
            server.kill()
            server.wait()
            server.stdout.close()
            if self._options.verbose:
                self._output(self._log.read_text())

    def _command(self, *arguments: str) -> None:
        """Run `nbdbackup ARGUMENTS`, showing the command and what it printed.

        Raises:
            NbdBackupError: it failed.
        """
        self._show(list(arguments))
        try:
            done = subprocess.run(
                self._argv(list(arguments)),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                cwd=self._directory,
                env=self._environment,
            )
        except subprocess.TimeoutExpired as error:
            raise NbdBackupError(
                f"nbdbackup {shlex.join(arguments)} took more than {error.timeout} s"
            ) from error
        self._output(done.stdout)
        if done.returncode:
            raise NbdBackupError(f"nbdbackup {shlex.join(arguments)} failed: {done.stderr.strip()}")

    def _argv(self, arguments: list[str]) -> list[str]:
        return [sys.executable, "-m", "nbdbackup", *arguments]

    def _step(self, text: str) -> None:
        self._console.print(f"* {text}", style="bold", markup=False)

    def _show(self, arguments: list[str]) -> None:
        self._console.print(f"  $ nbdbackup {shlex.join(arguments)}", style="cyan", markup=False)

    def _output(self, text: str) -> None:
        for line in text.splitlines():
            self._console.print(f"  {line}", style="dim", markup=False)


def differences(moment: str, pulled: str, pushed: str, live: str) -> list[str]:
    """What the hashes show that must not be: both copies are the point in time, and the disk is not."""
    claims = (
        ("pull.img is not the point in time", pulled != moment),
        ("push.img is not the point in time", pushed != moment),
        ("the live disk has not changed", live == moment),
    )
    return [claim for claim, holds in claims if holds]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
