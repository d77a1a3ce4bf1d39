"""Snapshots that outlive the server: killed under writes, stopped, their disk or files changed meanwhile."""

import json
import os
import random
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from nbdbackup.fleece.snapshot_file import SnapshotFile
from nbdbackup.fleece.snapshot_format import SnapshotFlags
from tests.conftest import ServeFunction
from tests.support.control import execute
from tests.support.disks import MIB, allocated_bytes, make_disk
from tests.support.peers import require
from tests.support.processes import run, wait_until
from tests.support.raw_client import CMD_READ, CMD_WRITE, RawClient
from tests.support.server import Server

CLUSTER = 65536
SIZE = 2 * MIB + 4096


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SIZE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def restarted(serve: ServeFunction, server: Server) -> Server:
    """Another server of the same disks and state directory."""
    return serve(server.sources, server.options, state_dir=server.state_dir)


def view(server: Server, export: str) -> bytes:
    """The bytes of the export."""
    with RawClient(server) as client:
        client.go(export)
        client.request(CMD_READ, 0, SIZE)
        reply = client.simple_reply(SIZE)
        assert reply.error == 0
        return reply.data


def listed(server: Server) -> dict[str, dict[str, object]]:
    """What `snapshot list` says, by export."""
    found = execute(server, "x-nbdbackup-query-snapshots")
    assert isinstance(found, list)
    return {info["export"]: info for info in found}


def write(server: Server, offset: int, data: bytes, export: str = "disk") -> None:
    with RawClient(server) as client:
        client.go(export)
        client.request(CMD_WRITE, offset, len(data), data)
        assert client.simple_reply().error == 0


def files(state: Path) -> list[str]:
    """Every file that there is of snapshots."""
    places = (state / "scratch", state / "snapshots")
    return sorted(path.name for place in places if place.exists() for path in place.iterdir())


class Writer:
    """Writes at random, at a depth of 8, until the server is gone."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._run)
        self.answered = 0

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def wait_answered(self, count: int) -> None:
        """Return when so many writes were answered."""
        wait_until(lambda: self.answered >= count, f"{count} writes")

    def _run(self) -> None:
        try:
            with RawClient(self._server) as client:
                client.go("disk")
                while True:
                    for cookie in range(8):
                        length = self._random.randrange(1, 100_000)
                        offset = self._random.randrange(0, SIZE - length)
                        data = self._random.randbytes(length)
                        client.request(CMD_WRITE, offset, length, data, cookie=cookie)
                    for _ in range(8):
                        assert client.simple_reply().error == 0
                        self.answered += 1
        except (OSError, EOFError, AssertionError):
            pass


def test_snapshots_show_their_points_in_time_after_kills_under_writes(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    """Ten kills; there are two snapshots from the second one on, and they are dropped in either order."""
    server = serve(state_dir=state, disk=disk)
    expected: dict[str, bytes] = {}
    created: dict[str, object] = {}
    for seed in range(10):
        name = f"disk@s{seed}"
        expected[name] = disk.read_bytes()
        execute(server, "x-nbdbackup-snapshot-create", nodes=["disk"], name=f"s{seed}")
        with Writer(server, seed) as writer:
            writer.wait_answered(2 * seed + 1)
            server.kill()
        assert disk.read_bytes() != expected[name]
        server = restarted(serve, server)
        found = {export: info["created"] for export, info in listed(server).items()}
        assert set(found) == set(expected)
        assert created.items() <= found.items()
        created = found
        write(server, random.Random(seed).randrange(SIZE - CLUSTER), b"x" * CLUSTER)
        for export, content in expected.items():
            assert view(server, export) == content
        if len(expected) > 1:
            dropped = sorted(expected)[seed % 2]
            execute(server, "x-nbdbackup-snapshot-drop", snapshots=[dropped])
            del expected[dropped], created[dropped]
    assert len(files(state)) == 2


def test_a_snapshot_outlives_a_stop_and_goes_on_counting(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    reference = disk.read_bytes()
    (tmp_path / "elsewhere").mkdir()
    place = ("--scratch", str(tmp_path / "elsewhere"))
    options = ("--scratch-max", "1M", "--on-cbw-error", "break-guest-write", "--cbw-timeout", "7")
    server.cli("snapshot", "create", "disk", "--name", "s1", *place, *options)
    server.cli("snapshot", "create", "disk", "--name", "file", "--scratch", str(tmp_path / "s.scratch"))
    server.cli("snapshot", "create", "disk", "--name", "gone", "--temporary")
    for cluster in (0, 5, SIZE // CLUSTER):
        write(server, cluster * CLUSTER, b"new")
    before = listed(server)
    assert before["disk@gone"]["persistent"] is False
    server.stop()
    server = restarted(serve, server)
    after = listed(server)
    del before["disk@gone"]
    for info in (*before.values(), *after.values()):
        del info["uris"]
    assert after == before
    write(server, 9 * CLUSTER, b"new")
    for name in ("disk@s1", "disk@file"):
        assert view(server, name) == reference
    server.cli("snapshot", "drop", "disk@file", "disk@s1")
    assert files(state) == []
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "s.scratch").exists()


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_snapshot_of_a_disk_that_others_changed_is_broken_for_good(
    serve: ServeFunction, disk: Path, state: Path, end: str
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s1")
    (server.stop if end == "stopped" else server.kill)()
    with disk.open("r+b") as file:
        file.write(b"behind its back")
    status = disk.stat()
    later_ns = 3600 * 10**9 if end == "killed" else 0
    os.utime(disk, ns=(status.st_atime_ns, status.st_mtime_ns + later_ns))
    for _ in range(2):
        server = restarted(serve, server)
        info = listed(server)["disk@s1"]
        assert info["state"] == "broken"
        assert "the disk was changed" in str(info["cause"])
        with pytest.raises(AssertionError, match="disk@s1"):
            run(require("nbdinfo"), server.uri("disk@s1"))
        complaint = server.cli("snapshot", "create", "disk", "--name", "s1", check=False).stderr
        assert "exists already" in complaint
        server.stop()
    server = restarted(serve, server)
    server.cli("snapshot", "drop", "disk@s1")
    assert listed(server) == {}
    assert files(state) == []


def test_a_damaged_sidecar_is_refused_by_name_and_the_rest_is_served(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    reference = disk.read_bytes()
    for name in ("good", "header", "short", "newer", "noscratch", "maps"):
        server.cli("snapshot", "create", "disk", "--name", name)
    write(server, 0, b"new")
    server.stop()
    sidecars = state / "snapshots"
    for name in ("header", "newer", "maps"):
        with (sidecars / f"disk@{name}.snapshot").open("r+b") as file:
            for slot in (0, 8192):
                at = {"header": slot + 300, "newer": slot + 11, "maps": 2 * 8192}[name]
                file.seek(at)
                file.write(b"\x09")
    os.truncate(sidecars / "disk@short.snapshot", 20000)
    next((state / "scratch").glob("disk@noscratch.*")).unlink()
    server = restarted(serve, server)
    causes = {name: str(info["cause"]) for name, info in listed(server).items()}
    assert causes.pop("disk@good") == "None"
    for name, cause in {
        "header": "its header is damaged",
        "short": "20000 bytes long",
        "newer": "version",
        "noscratch": "cannot be opened",
        "maps": "were damaged",
    }.items():
        assert cause in causes[f"disk@{name}"]
        assert f"disk@{name}" in causes[f"disk@{name}"]
    assert view(server, "disk@good") == reference
    server.cli("snapshot", "drop", *causes)
    assert list(listed(server)) == ["disk@good"]
    assert view(server, "disk@good") == reference


def test_a_snapshot_that_broke_is_broken_after_a_kill(serve: ServeFunction, disk: Path, state: Path) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s1", "--scratch-max", "64K")
    write(server, 0, b"new" * CLUSTER)
    assert listed(server)["disk@s1"]["state"] == "broken"
    (scratch,) = (state / "scratch").iterdir()
    wait_until(lambda: allocated_bytes(scratch) == 0, "scratch is given back")
    server.kill()
    info = listed(restarted(serve, server))["disk@s1"]
    assert (info["state"], "is full" in str(info["cause"])) == ("broken", True)


def test_a_snapshot_waits_for_its_node(serve: ServeFunction, disk: Path, state: Path, tmp_path: Path) -> None:
    other = make_disk(tmp_path / "other.img", SIZE, seed=2)
    server = serve(state_dir=state, disk=disk, other=other)
    reference = disk.read_bytes()
    server.cli("snapshot", "create", "disk", "other", "--name", "s1")
    write(server, 0, b"new")
    server.stop()
    server = serve(state_dir=state, other=other)
    info = listed(server)
    assert "no node disk" in str(info["disk@s1"]["cause"])
    assert info["other@s1"]["state"] == "ok"
    node = {"driver": "file", "node-name": "disk", "filename": str(disk)}
    server.cli("qmp", json.dumps({"execute": "blockdev-add", "arguments": node}))
    assert listed(server)["disk@s1"]["state"] == "ok"
    assert view(server, "disk@s1") == reference


def test_a_create_that_fails_leaves_nothing(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    server = serve(state_dir=state, disk=disk, other=make_disk(tmp_path / "other.img", SIZE))
    taken = tmp_path / "taken"
    taken.write_text("somebody's")
    for options in (
        ("disk", "--scratch", str(taken)),
        ("disk", "--scratch", str(tmp_path / "no" / "where")),
        ("disk", "other", "--bitmap", "none"),
    ):
        server.cli("snapshot", "create", "--name", "s1", *options, check=False)
        assert (files(state), listed(server)) == ([], {})
    assert taken.read_text() == "somebody's"


def test_what_a_crash_left_half_made_is_removed_at_the_next_start(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s1", "--scratch", str(tmp_path))
    server.kill()
    (sidecar,) = (state / "snapshots").iterdir()
    file = SnapshotFile.open(sidecar)
    file.write_header(replace(file.header, flags=SnapshotFlags.IN_USE))
    file.close()
    assert list(tmp_path.glob("*.scratch"))
    server = restarted(serve, server)
    assert listed(server) == {}
    assert (files(state), list(tmp_path.glob("*.scratch"))) == ([], [])


def test_after_a_loss_of_power_a_snapshot_is_broken(serve: ServeFunction, disk: Path, state: Path) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s1")
    server.kill()
    (sidecar,) = (state / "snapshots").iterdir()
    file = SnapshotFile.open(sidecar)
    file.write_header(replace(file.header, boot_id=b"the boot before."))
    file.close()
    info = listed(restarted(serve, server))["disk@s1"]
    assert "the machine went down" in str(info["cause"])
