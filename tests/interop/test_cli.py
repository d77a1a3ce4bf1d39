"""The commands against a real server, as processes: what they do, say and exit with."""

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, sha256
from tests.support.peers import require, unavailable
from tests.support.processes import attempt, run
from tests.support.server import COMMAND, Server

WAIT_S = 30.0
SLOW = ("-r", "256K")
"""At this rate the backup of a 16 MiB disk outlives every test that wants it to be running."""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT and SIGHUP have their usual effect, also where the tests run in the background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def server(serve: ServeFunction, tmp_path: Path) -> Server:
    return serve(disk=make_disk(tmp_path / "disk.img", 16 * MIB), tcp=False)


def refused(server: Server, *arguments: str, status: int = 1) -> str:
    """The one line on standard error of a command that ends with `status`."""
    result = server.cli(*arguments, check=False)
    assert result.returncode == status, result
    assert result.stdout == ""
    assert result.stderr.startswith("nbdbackup: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def jobs(server: Server) -> dict[str, str]:
    """The status of each job."""
    return {job["id"]: job["status"] for job in json.loads(server.cli("job", "list", "--json").stdout)}


def wait_until_copying(server: Server, job_id: str) -> None:
    """Wait until the job has made progress."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        listed = json.loads(server.cli("job", "list", "--json").stdout)
        if any(job["id"] == job_id and job["current-progress"] for job in listed):
            return
    raise AssertionError(f"job {job_id} makes no progress: {listed}")


@contextmanager
def started(server: Server, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A command that is running; it is killed at the end if it still is."""
    with subprocess.Popen(
        server.cli_command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


# Snapshots and backups.


def test_snapshot_and_backup_are_the_point_in_time(server: Server, tmp_path: Path) -> None:
    before = sha256(server.sources["disk"])
    uri = server.cli("snapshot", "create", "disk", "--name", "s1").stdout.strip()
    assert uri == server.uri("disk@s1")
    push = tmp_path / "push.img"
    with started(server, "backup", "disk", str(push), "--job-id", "j", "-r", "8M") as backup:
        wait_until_copying(server, "j")
        run(require("qemu-io"), "-f", "raw", server.uri("disk"), "-c", "write -P 7 0 16M")
        out, err = backup.communicate(timeout=WAIT_S)
    assert (backup.returncode, err) == (0, "")
    assert out == f"{push}: complete, 16M of disk\n"
    pull = tmp_path / "pull.img"
    run(require("qemu-img"), "convert", "-f", "raw", "-O", "raw", uri, pull)
    assert sha256(pull) == sha256(push) == before
    assert sha256(server.sources["disk"]) != before
    server.cli("snapshot", "drop", "disk@s1")
    assert server.snapshots() == []
    assert not [path for path in (server.state_dir / "scratch").iterdir() if path.is_file()]


def test_target_that_exists_is_not_touched(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "t.img"
    target.write_text("precious")
    line = refused(server, "backup", "disk", str(target))
    assert f"{target} exists already" in line
    assert target.read_text() == "precious"
    assert jobs(server) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "t.img"]


def test_existing_target_is_written_in_place_with_n(server: Server, tmp_path: Path) -> None:
    target = make_disk(tmp_path / "t.img", 16 * MIB, seed=9)
    inode = target.stat().st_ino
    server.cli("backup", "disk", str(target), "-n")
    assert sha256(target) == sha256(server.sources["disk"])
    assert target.stat().st_ino == inode


def test_existing_target_of_another_size_is_refused(server: Server, tmp_path: Path) -> None:
    target = make_disk(tmp_path / "t.img", MIB, seed=9)
    before = sha256(target)
    assert "size" in refused(server, "backup", "disk", str(target), "-n")
    assert sha256(target) == before


def test_missing_target_is_refused_with_n(server: Server, tmp_path: Path) -> None:
    refused(server, "backup", "disk", str(tmp_path / "t.img"), "-n", status=1)
    assert not (tmp_path / "t.img").exists()


def test_target_in_a_directory_that_does_not_exist(server: Server, tmp_path: Path) -> None:
    assert str(tmp_path / "no") in refused(server, "backup", "disk", str(tmp_path / "no" / "t.img"))
    assert not (tmp_path / "no").exists()


def test_source_as_its_own_target_is_refused(server: Server) -> None:
    before = sha256(server.sources["disk"])
    refused(server, "backup", "disk", str(server.sources["disk"]), "-n")
    assert sha256(server.sources["disk"]) == before


@contextmanager
def small_tmpfs(directory: Path, size: str) -> Iterator[Path]:
    """A file system with room for `size`."""
    if os.geteuid() != 0:
        unavailable("mounting needs root")
    directory.mkdir()
    run(require("mount"), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory)
    try:
        yield directory
    finally:
        run(require("umount"), directory)


@pytest.mark.root
@pytest.mark.parametrize("scratch", ["none", "auto"])
def test_full_target_directory_fails_the_backup_and_keeps_nothing(
    server: Server, tmp_path: Path, scratch: str
) -> None:
    with small_tmpfs(tmp_path / "small", "4M") as small:
        line = refused(server, "backup", "disk", str(small / "t.img"), "--scratch", scratch)
        assert f"{small}/t.img" in line
        assert "No space left on device" in line
        assert list(small.iterdir()) == []
    assert jobs(server) == {}
    run(require("qemu-io"), "-f", "raw", server.uri("disk"), "-c", "write -P 7 0 1M")


@pytest.mark.root
def test_full_scratch_breaks_the_snapshot_and_not_the_client(server: Server, tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "small", "1M") as small:
        server.cli("snapshot", "create", "disk", "--name", "s", "--scratch", str(small))
        run(require("qemu-io"), "-f", "raw", server.uri("disk"), "-c", "write -P 7 0 8M")
        (snapshot,) = json.loads(server.cli("snapshot", "list", "--json").stdout)
        assert snapshot["state"] == "broken"
        assert "No space left on device" in snapshot["cause"]
        assert "broken: " in server.cli("snapshot", "list").stdout
        server.cli("snapshot", "drop", "disk@s")
        assert list(small.iterdir()) == []


# What does not exist.


@pytest.mark.parametrize(
    "arguments",
    [
        ["backup", "disc", "/nonexistent/t.img"],
        ["snapshot", "create", "disc"],
        ["snapshot", "create", "disk", "disc"],
        ["snapshot", "drop", "disk@s"],
        ["node", "info", "disc"],
        ["job", "watch", "j"],
        ["job", "cancel", "j"],
        ["job", "pause", "j"],
        ["job", "resume", "j"],
        ["job", "dismiss", "j"],
        ["job", "finalize", "j"],
        ["job", "set-speed", "j", "1M"],
    ],
)
def test_unknown_node_snapshot_or_job_exits_with_10(server: Server, arguments: list[str]) -> None:
    refused(server, *arguments, status=10)
    assert server.snapshots() == []
    assert jobs(server) == {}


def test_no_server_exits_with_10(tmp_path: Path) -> None:
    result = attempt(*COMMAND, "node", "list", "--control", tmp_path / "c")
    assert result.returncode == 10
    assert result.stderr.count("\n") == 1


# Interrupts, and the jobs that they leave or end.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_without_a_terminal_cancels_the_job(
    server: Server, tmp_path: Path, number: signal.Signals
) -> None:
    with started(server, "backup", "disk", str(tmp_path / "t.img"), "--job-id", "j", *SLOW) as backup:
        wait_until_copying(server, "j")
        backup.send_signal(number)
        _, err = backup.communicate(timeout=WAIT_S)
    assert backup.returncode == 130
    assert err.startswith("nbdbackup: interrupted")
    assert err.count("\n") == 1
    assert jobs(server) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["disk.img"]


class Terminal:
    """`nbdbackup ARGUMENTS` on a terminal of its own, but for `stdout` if that is given."""

    def __init__(self, server: Server, *arguments: str, stdout: IO[bytes] | None = None) -> None:
        self._master, slave = os.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [require("setsid"), "--ctty", *server.cli_command(*arguments)],
            stdin=slave,
            stdout=stdout or slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> None:
        """Wait until `text` has appeared since the last such wait."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.text:
            readable, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"no {text!r} on the terminal: {self.text!r}"
            try:
                self.text += os.read(self._master, 65536).decode(errors="replace")
            except OSError as error:  # EIO: the other end is closed
                raise AssertionError(f"ended without {text!r}: {self.text!r}") from error
        self.text = self.text.partition(text)[2]

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(WAIT_S)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        os.close(self._master)


CTRL_C = "\x03"


def test_bars_stay_out_of_a_redirected_result(server: Server, tmp_path: Path) -> None:
    with (
        (tmp_path / "result").open("wb") as result,
        Terminal(server, "backup", "disk", str(tmp_path / "t.img"), "--json", stdout=result) as terminal,
    ):
        terminal.wait_for("16.0/16.0 MiB")
        assert terminal.wait() == 0
    assert json.loads((tmp_path / "result").read_text())["outcome"] == "completed"


def test_ctrl_c_on_a_terminal_asks_and_cancels(server: Server, tmp_path: Path) -> None:
    with Terminal(server, "backup", "disk", str(tmp_path / "t.img"), "--job-id", "j", *SLOW) as terminal:
        terminal.wait_for("/16.0 MiB")
        terminal.type(CTRL_C)
        terminal.wait_for("[d/c/W]")
        terminal.type("c\n")
        terminal.wait_for("interrupted")
        assert terminal.wait() == 130
    assert jobs(server) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["disk.img"]


def test_ctrl_c_on_a_terminal_can_detach_and_the_job_goes_on(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "t.img"
    with Terminal(server, "backup", "disk", str(target), "--job-id", "j", *SLOW) as terminal:
        terminal.wait_for("/16.0 MiB")
        terminal.type(CTRL_C)
        terminal.wait_for("[d/c/W]")
        terminal.type("d\n")
        terminal.wait_for("the job goes on")
        assert terminal.wait() == 130
    assert jobs(server) == {"j": "running"}
    server.cli("job", "set-speed", "j", "0")
    server.cli("job", "watch", check=False)
    assert sha256(target) == sha256(server.sources["disk"])


def test_ctrl_c_on_a_terminal_and_enter_waits_on(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "t.img"
    with Terminal(server, "backup", "disk", str(target), "--job-id", "j", *SLOW) as terminal:
        terminal.wait_for("/16.0 MiB")
        terminal.type(CTRL_C)
        terminal.wait_for("[d/c/W]")
        terminal.type("\n")
        server.cli("job", "set-speed", "j", "0")
        terminal.wait_for("complete, 16M of disk")
        assert terminal.wait() == 0
    assert sha256(target) == sha256(server.sources["disk"])


def test_second_ctrl_c_cancels(server: Server, tmp_path: Path) -> None:
    with Terminal(server, "backup", "disk", str(tmp_path / "t.img"), "--job-id", "j", *SLOW) as terminal:
        terminal.wait_for("/16.0 MiB")
        terminal.type(CTRL_C)
        terminal.wait_for("[d/c/W]")
        terminal.type(CTRL_C)
        assert terminal.wait() == 130
    assert jobs(server) == {}


def test_job_outlives_a_killed_client(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "t.img"
    with started(server, "backup", "disk", str(target), "--job-id", "j", *SLOW) as backup:
        wait_until_copying(server, "j")
        backup.kill()
        backup.wait(WAIT_S)
    assert jobs(server) == {"j": "running"}
    server.cli("job", "set-speed", "j", "0")
    deadline = time.monotonic() + WAIT_S
    while jobs(server):
        assert time.monotonic() < deadline
    assert sha256(target) == sha256(server.sources["disk"])


def test_server_that_dies_during_a_backup_is_told_on_one_line(server: Server, tmp_path: Path) -> None:
    with started(server, "backup", "disk", str(tmp_path / "t.img"), "--job-id", "j", *SLOW) as backup:
        wait_until_copying(server, "j")
        server.kill()
        _, err = backup.communicate(timeout=WAIT_S)
    assert backup.returncode == 1
    assert "went away" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "t.img").exists()
    # The server had no time to remove what is not a backup. The next one leaves it alone, and says so.
    partial = tmp_path / "t.img.partial"
    assert partial.exists()
    with Server(server.sources, tcp=False) as successor:
        assert str(partial) in refused(successor, "backup", "disk", str(tmp_path / "t.img"))
        partial.unlink()
        successor.cli("backup", "disk", str(tmp_path / "t.img"))


# Jobs.


def test_job_that_nobody_waits_for_stays_listed_until_dismissed(server: Server, tmp_path: Path) -> None:
    job_id = server.cli("backup", "disk", str(tmp_path / "t.img"), "--no-wait").stdout.strip()
    assert server.cli("job", "watch", job_id).returncode == 0
    assert jobs(server) == {job_id: "concluded"}
    assert json.loads(server.cli("job", "watch", job_id, "--json").stdout)["outcome"] == "completed"
    server.cli("job", "dismiss", job_id)
    assert jobs(server) == {}


def test_failed_job_that_nobody_waited_for_can_be_asked_why(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "t.img"
    server.cli("backup", "disk", str(target), "--no-wait", "--job-id", "j", *SLOW)
    # Somebody takes the name before the backup is complete.
    target.write_text("precious")
    server.cli("job", "set-speed", "j", "0")
    result = server.cli("job", "watch", "j", check=False)
    assert result.returncode == 1
    assert str(target) in result.stderr
    assert target.read_text() == "precious"


def test_job_is_paused_resumed_sped_up_and_cancelled(server: Server, tmp_path: Path) -> None:
    server.cli("backup", "disk", str(tmp_path / "t.img"), "--no-wait", "--job-id", "j", *SLOW)
    server.cli("job", "pause", "j")
    deadline = time.monotonic() + WAIT_S
    while jobs(server)["j"] != "paused":
        assert time.monotonic() < deadline
    server.cli("job", "resume", "j")
    server.cli("job", "set-speed", "j", "2M")
    assert "2M/s" in server.cli("job", "list").stdout
    server.cli("job", "cancel", "j")
    result = server.cli("job", "watch", "j", check=False)
    assert result.returncode == 1
    assert "cancelled" in result.stderr
    assert "cannot accept command verb 'pause'" in refused(server, "job", "pause", "j")


def test_second_job_of_the_same_id_is_refused(server: Server, tmp_path: Path) -> None:
    server.cli("backup", "disk", str(tmp_path / "t.img"), "--no-wait", "--job-id", "j", *SLOW)
    assert "'j'" in refused(server, "backup", "disk", str(tmp_path / "u.img"), "--job-id", "j")
    assert not (tmp_path / "u.img").exists()
    assert not (tmp_path / "u.img.partial").exists()


# The rest.


def test_qmp_speaks_to_the_server(server: Server) -> None:
    commands = {entry["name"] for entry in json.loads(server.cli("qmp", "query-commands").stdout)}
    assert {"x-nbdbackup-backup", "query-jobs", "quit"} <= commands
    assert "CommandNotFound" in refused(server, "qmp", "frobnicate")


def test_node_info_shows_exports_and_snapshots(server: Server) -> None:
    server.cli("snapshot", "create", "disk", "--name", "s1")
    shown = server.cli("node", "info", "disk").stdout
    assert "16777216 bytes" in shown
    assert "disk@s1" in shown


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """An empty directory whose path is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="nbdbackup-test-", dir="/tmp") as directory:
        yield Path(directory)


def test_demo_shows_equal_hashes_and_leaves_nothing(short_directory: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "demo"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(short_directory)},
    )
    assert result.returncode == 0, result
    hashes = [word for word in result.stdout.split() if len(word) == 64]
    assert len(hashes) == 4
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]
    assert "nbdbackup snapshot create disk" in result.stdout
    assert list(short_directory.iterdir()) == []


def test_interrupted_demo_leaves_nothing(short_directory: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(short_directory), "PYTHONUNBUFFERED": "1"},
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "keeps writing" in line:
                break
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=WAIT_S)
    assert demo.returncode == 130
    assert err == "nbdbackup: interrupted\n"
    assert list(short_directory.iterdir()) == []
