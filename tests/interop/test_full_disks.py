"""No room for old contents or for the copy: the policy decides who loses, and the cause is named.

`break-snapshot`: client writes go on, the point in time is lost. `break-guest-write`: the client's
write fails, the point in time stays whole.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, sha256
from tests.support.peers import require, require_root
from tests.support.processes import attempt, run, wait_until
from tests.support.pushes import jobs
from tests.support.raw_client import CMD_FLUSH, CMD_READ, CMD_WRITE, EIO, ENOSPC, RawClient
from tests.support.server import Server

SIZE = 32 * MIB
NO_ROOM = "No space left on device"


@pytest.fixture
def server(tmp_path: Path, serve: ServeFunction) -> Server:
    return serve(disk=make_disk(tmp_path / "disk.img", SIZE))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 2 MiB."""
    require_root("mounts a tmpfs")
    directory = tmp_path / "small"
    directory.mkdir()
    run(require("mount"), "-t", "tmpfs", "-o", "size=2M", "tmpfs", directory)
    yield directory
    run(require("umount"), "-l", directory)


@pytest.fixture(params=["tmpfs", "limit"])
def scratch(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Options for a scratch that holds 2 MiB: a small file system, or a limit."""
    if request.param == "tmpfs":
        return ["--scratch", str(request.getfixturevalue("small"))]
    (tmp_path / "scratch").mkdir()
    return ["--scratch", str(tmp_path / "scratch"), "--scratch-max", "2M"]


def write_everything(server: Server) -> list[int]:
    """Write the whole disk in pieces of 64 KiB over one connection; the error of each."""
    errors = []
    with RawClient(server) as client:
        client.go("disk")
        for offset in range(0, SIZE, 65536):
            client.request(CMD_WRITE, offset, 65536, b"w" * 65536)
            errors.append(client.simple_reply().error)
        client.request(CMD_FLUSH)
        assert client.simple_reply().error == 0
    return errors


def state(server: Server) -> dict[str, str]:
    (snapshot,) = json.loads(server.cli("snapshot", "list", "--json").stdout)
    return dict(snapshot)


@pytest.mark.root
def test_full_scratch_breaks_the_snapshot_and_its_readers_get_eio(server: Server, scratch: list[str]) -> None:
    server.cli("snapshot", "create", "disk", "--name", "s", *scratch)
    with RawClient(server) as reader:
        reader.go("disk@s")
        assert set(write_everything(server)) == {0}
        assert state(server)["state"] == "broken"
        reader.request(CMD_READ, 0, 4096)
        assert reader.simple_reply().error == EIO
        reader.request(CMD_READ, SIZE - 4096, 4096)
        assert reader.simple_reply().error == EIO
    assert attempt(require("nbdcopy"), server.uri("disk@s"), "null:").returncode != 0
    assert server.sources["disk"].read_bytes() == b"w" * SIZE


@pytest.mark.root
def test_full_scratch_fails_the_clients_write_when_asked_and_keeps_the_view(
    server: Server, scratch: list[str], tmp_path: Path
) -> None:
    before = sha256(server.sources["disk"])
    server.cli("snapshot", "create", "disk", "--name", "s", "--on-cbw-error", "break-guest-write", *scratch)
    errors = write_everything(server)
    assert errors[0] == 0
    assert set(errors) == {0, ENOSPC}
    run(require("nbdcopy"), server.uri("disk@s"), tmp_path / "pull.img")
    assert sha256(tmp_path / "pull.img") == before
    server.cli("snapshot", "drop", "disk@s")
    assert set(write_everything(server)) == {0}


def start_backup(server: Server, target: Path, *options: str) -> "subprocess.Popen[str]":
    """A slow backup whose point in time is taken."""
    command = server.cli_command("backup", "disk", str(target), "-r", "1M", "--job-id", "b", *options)
    backup = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "b" in jobs(server), "the backup has begun")
    return backup


@pytest.mark.root
def test_full_scratch_fails_the_backup_and_not_the_client(
    server: Server, scratch: list[str], tmp_path: Path
) -> None:
    target = tmp_path / "push.img"
    with start_backup(server, target, *scratch) as backup:
        assert set(write_everything(server)) == {0}
        _, complaint = backup.communicate(timeout=60)
    assert backup.returncode == 1
    assert len(complaint.splitlines()) == 1
    assert "scratch" in complaint or NO_ROOM in complaint
    assert not target.exists()
    assert not target.with_name("push.img.partial").exists()


@pytest.mark.root
def test_full_scratch_fails_the_clients_write_when_asked_and_the_backup_completes(
    server: Server, scratch: list[str], tmp_path: Path
) -> None:
    before = sha256(server.sources["disk"])
    target = tmp_path / "push.img"
    with start_backup(server, target, "--on-cbw-error", "break-guest-write", *scratch) as backup:
        assert ENOSPC in write_everything(server)
        server.cli("job", "set-speed", "b", "0")
        assert backup.wait(60) == 0
    assert sha256(target) == before
    assert set(write_everything(server)) == {0}


@pytest.mark.root
@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_a_full_target_fails_the_backup_with_its_cause_while_a_client_writes(
    server: Server, small: Path, policy: str
) -> None:
    command = server.cli_command(
        "backup", "disk", str(small / "push.img"), "--scratch", "none", "-r", "512K", "--on-cbw-error", policy
    )
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as backup:
        wait_until((small / "push.img.partial").exists, "the backup has begun")
        errors = write_everything(server)
        _, complaint = backup.communicate(timeout=60)
    assert set(errors) <= ({0} if policy == "break-snapshot" else {0, ENOSPC})
    assert backup.returncode == 1
    assert NO_ROOM in complaint
    assert "push.img" in complaint
    assert list(small.iterdir()) == []
    assert set(write_everything(server)) == {0}


def fill(path: Path) -> None:
    """Leave no room where `path` is."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.root
def test_no_room_in_the_state_directory_is_one_line_for_each_command_and_leaves_nothing(
    serve: ServeFunction, small: Path, tmp_path: Path
) -> None:
    server = serve(state_dir=small / "state", disk=make_disk(tmp_path / "disk.img", SIZE))
    server.cli("checkpoint", "create", "disk", "c1")
    server.cli("snapshot", "drop", "disk@c1")
    kept = sorted(path for path in (small / "state").rglob("*"))
    room = small / "filler"
    fill(room)
    commands = (
        ("snapshot", "create", "disk", "--name", "s"),
        ("checkpoint", "create", "disk", "c2"),
        ("bitmap", "add", "disk", "b"),
    )
    for command in commands:
        result = server.cli(*command, check=False)
        assert result.returncode == 1, command
        assert len(result.stderr.splitlines()) == 1
        assert NO_ROOM in result.stderr
        assert sorted(path for path in (small / "state").rglob("*")) == kept
    assert set(write_everything(server)) == {0}
    room.unlink()
    for command in commands:
        server.cli(*command)
    # The file system goes before the server that the fixture stops.
    server.stop()
