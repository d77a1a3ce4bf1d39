"""What can go wrong when a server starts: one line, the right status, and nothing changed."""

import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, make_sparse, sha256
from tests.support.peers import require
from tests.support.processes import attempt, run
from tests.support.server import COMMAND

QCOW2_MAGIC = b"QFI\xfb\x00\x00\x00\x03"


class Start:
    """Runs `serve` where it must fail, with a control socket and state of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "s"

    def command(self, *arguments: str | Path) -> list[str | Path]:
        ours: list[str | Path] = [
            "--control",
            self.directory / "c",
            "--state-dir",
            self.directory / "st",
            "-k",
            self.socket,
        ]
        # The arguments come last: where one is given twice, the last one counts.
        return [*COMMAND, "serve", *ours, *arguments]

    def refused(self, *arguments: str | Path, status: int = 1, prefix: tuple[str, ...] = ()) -> str:
        """The one line on standard error of a `serve` that ends with `status`."""
        result = attempt(*prefix, *self.command(*arguments), timeout_s=30)
        assert result.returncode == status, result
        assert result.stdout == ""
        assert result.stderr.startswith("nbdbackup: ")
        assert result.stderr.count("\n") == 1
        return result.stderr


@pytest.fixture
def start() -> Iterator[Start]:
    # Not below tmp_path: the path of a socket must fit into 107 bytes.
    with tempfile.TemporaryDirectory(prefix="nbdbackup-test-", dir="/tmp") as directory:
        yield Start(Path(directory))


def test_missing_source(start: Start, tmp_path: Path) -> None:
    assert f"{tmp_path}/nope.img does not exist" in start.refused(tmp_path / "nope.img")
    assert not start.socket.exists()
    assert not (start.directory / "c").exists()


def test_source_that_is_a_directory(start: Start, tmp_path: Path) -> None:
    assert "is a directory" in start.refused(tmp_path)


def test_source_without_a_byte(start: Start, tmp_path: Path) -> None:
    empty = make_sparse(tmp_path / "empty.img", 0)
    assert "is empty" in start.refused(empty)
    assert empty.stat().st_size == 0


def as_nobody_special() -> tuple[str, ...]:
    """A prefix that takes from root the right to read everything; nothing for other users."""
    if os.geteuid() != 0:
        return ()
    return (require("setpriv"), "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")


def test_source_that_may_not_be_read(start: Start, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    disk.chmod(0)
    line = start.refused(disk, prefix=as_nobody_special())
    assert str(disk) in line
    assert "ermission" in line
    assert disk.stat().st_mode & 0o777 == 0


def test_source_that_may_not_be_written_points_to_read_only(start: Start, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    disk.chmod(0o444)
    assert "--read-only" in start.refused(disk, prefix=as_nobody_special())


def test_source_that_looks_like_qcow2_needs_its_format_said(start: Start, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(QCOW2_MAGIC + bytes(MIB))
    before = sha256(disk)
    line = start.refused(disk, status=2)
    assert "-f raw" in line
    assert "qemu-nbd" in line
    assert sha256(disk) == before


def test_said_raw_it_is_served_as_it_is(serve: ServeFunction, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(QCOW2_MAGIC + bytes(MIB - 8))
    server = serve(disk=disk, options=["-f", "raw"])
    assert run(require("nbdinfo"), "--size", server.uri("disk")).strip() == str(MIB)


def test_source_locked_by_another_server(start: Start, serve: ServeFunction, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    server = serve(disk=disk)
    line = start.refused(disk)
    assert str(disk) in line
    assert str(server.pid) in line


def test_port_in_use(start: Start, serve: ServeFunction, tmp_path: Path) -> None:
    disk, other = make_disk(tmp_path / "disk.img", MIB), make_disk(tmp_path / "other.img", MIB)
    server = serve(disk=disk)
    assert f"127.0.0.1:{server.port}" in start.refused("-p", str(server.port), other)
    assert not start.socket.exists(), "the Unix socket that was bound first is taken back"


def test_unix_socket_of_a_live_server_is_left_to_it(
    start: Start, serve: ServeFunction, tmp_path: Path
) -> None:
    disk, other = make_disk(tmp_path / "disk.img", MIB), make_disk(tmp_path / "other.img", MIB)
    server = serve(disk=disk)
    assert server.socket_path is not None
    assert str(server.socket_path) in start.refused("-k", server.socket_path, other)
    assert run(require("nbdinfo"), "--size", server.uri("disk", "unix")).strip() == str(MIB)


def test_control_socket_of_a_live_server_is_left_to_it(
    start: Start, serve: ServeFunction, tmp_path: Path
) -> None:
    disk, other = make_disk(tmp_path / "disk.img", MIB), make_disk(tmp_path / "other.img", MIB)
    server = serve(disk=disk)
    assert str(server.control) in start.refused("--control", server.control, other)
    assert "disk" in server.cli("node", "list").stdout


def test_mistyped_directory_of_the_control_socket_is_refused_and_not_made(
    start: Start, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    told = start.refused("--control", start.directory / "nosuch" / "c", disk, status=2)
    assert "nosuch for the control socket; make it, or give another path with --control" in told
    assert not (start.directory / "nosuch").exists()


def test_directory_of_the_default_control_socket_is_made(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    with tempfile.TemporaryDirectory(prefix="nbdbackup-test-", dir="/tmp") as runtime:
        environment = {key: value for key, value in os.environ.items() if key != "NBDBACKUP_CONTROL"}
        places = ("--state-dir", str(tmp_path / "state"), "-k", f"{runtime}/s")
        found = subprocess.run(
            [*COMMAND, "serve", *places, "--run", f"stat -c %a {runtime}/nbdbackup", str(disk)],
            env={**environment, "XDG_RUNTIME_DIR": runtime},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.splitlines()[-1] == "700"


def test_file_in_place_of_the_socket_is_not_removed(start: Start, tmp_path: Path) -> None:
    precious = start.socket
    precious.write_text("precious")
    start.refused(make_disk(tmp_path / "disk.img", MIB))
    assert precious.read_text() == "precious"


def test_state_directory_of_a_live_server(start: Start, serve: ServeFunction, tmp_path: Path) -> None:
    disk, other = make_disk(tmp_path / "disk.img", MIB), make_disk(tmp_path / "other.img", MIB)
    server = serve(disk=disk)
    line = start.refused("--state-dir", server.state_dir, other)
    assert str(server.state_dir) in line
    assert str(server.pid) in line


def test_after_kill_9_a_server_starts_again_on_the_same_paths(serve: ServeFunction, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk")
    process = server.process
    process.kill()
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()
    server.start()
    assert run(require("nbdinfo"), "--size", server.uri("disk", "unix")).strip() == str(MIB)
    assert len(server.snapshots()) == 1


def test_address_that_is_not_of_this_machine(start: Start, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    assert "192.0.2.1" in start.refused("-b", "192.0.2.1", disk)


def test_pid_file_that_cannot_be_written(start: Start, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    result = attempt(*start.command("--pid-file", tmp_path / "no" / "pid", disk), timeout_s=30)
    assert result.returncode == 1
    assert f"cannot write the pid file {tmp_path}/no/pid" in result.stderr
    assert "listening" not in result.stdout


# Ways to run that are not failures.


def test_fork_leaves_when_clients_can_connect_and_writes_the_pid(start: Start, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    pid_file = tmp_path / "pid"
    # capture_output waits for the end of both pipes: the server in the background keeps neither.
    result = attempt(*start.command("--fork", "--pid-file", pid_file, disk), timeout_s=30)
    pid = int(pid_file.read_text())
    try:
        assert result.returncode == 0
        assert result.stdout == f"listening on nbd+unix:///?socket={start.socket}\n"
        assert result.stderr == ""
        uri = f"nbd+unix:///disk?socket={start.socket}"
        assert run(require("nbdinfo"), "--size", uri).strip() == str(MIB)
        run(*COMMAND, "qmp", "quit", "--control", start.directory / "c")
        wait_for_end(pid)
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    assert not pid_file.exists()


def wait_for_end(pid: int) -> None:
    """Wait until process `pid`, not a child of ours, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(descriptor, "rb") as ended:
        assert select.select([ended], [], [], 30)[0], "the server did not end"


def test_fork_passes_on_a_failure_to_start(start: Start, tmp_path: Path) -> None:
    assert "does not exist" in start.refused("--fork", tmp_path / "nope.img")


def test_run_serves_for_as_long_as_the_command_and_exits_with_its_status(
    start: Start, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    result = attempt(
        *start.command(disk, "--run", f'{require("nbdinfo")} --size "$uri"; exit 7'), timeout_s=30
    )
    assert result.returncode == 7
    assert str(MIB) in result.stdout.split()


def test_exit_on_last_leaves_with_the_last_client(start: Start, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    command = [str(word) for word in start.command(disk, "--exit-on-last")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("listening on ")
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(30)
                client.connect(str(start.socket))
                assert client.recv(8) == b"NBDMAGIC"
                assert server.poll() is None
            assert server.wait(30) == 0
        finally:
            server.kill()
