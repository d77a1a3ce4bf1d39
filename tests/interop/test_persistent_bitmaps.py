"""Bitmaps that outlive the server: stopped, killed in the middle of writes, its disk changed meanwhile."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.conftest import ServeFunction
from tests.support.control import execute, execute_at
from tests.support.disks import make_sparse
from tests.support.peers import require, require_root
from tests.support.processes import attempt, run, wait_until
from tests.support.raw_client import CMD_FLUSH, CMD_WRITE, RawClient
from tests.support.server import Server, ServerFailed

GRANULE = 65536
SIZE = 256 * GRANULE
POWER = ("--bitmap-durability", "power")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_sparse(tmp_path / "disk.img", SIZE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def bitmaps(server: Server) -> dict[str, dict[str, object]]:
    """What `bitmap list` says of the disk's, by name."""
    answer = json.loads(server.cli("bitmap", "list", "disk", "--json").stdout)
    return {bitmap["name"]: bitmap for bitmap in answer["disk"]}


def dirty(server: Server, name: str = "b0") -> set[int]:
    """The dirty granules as nbdinfo sees them."""
    found = json.loads(
        run(require("nbdinfo"), "--json", f"--map=qemu:dirty-bitmap:{name}", server.uri("disk"))
    )
    return {
        granule
        for extent in found
        if extent["type"]
        for granule in range(
            extent["offset"] // GRANULE, -(-(extent["offset"] + extent["length"]) // GRANULE)
        )
    }


def write(server: Server, *granules: int) -> None:
    with RawClient(server) as client:
        client.go("disk")
        for granule in granules:
            client.request(CMD_WRITE, granule * GRANULE + 512, 512, b"w" * 512)
            assert client.simple_reply().error == 0


def restarted(serve: ServeFunction, server: Server, *options: str) -> Server:
    """Another server of the same disk and state directory."""
    return serve(server.sources, options, state_dir=server.state_dir)


@pytest.mark.parametrize("options", [(), POWER], ids=["process", "power"])
def test_bitmap_outlives_a_stop_and_a_kill(
    serve: ServeFunction, disk: Path, state: Path, options: tuple[str, ...]
) -> None:
    server = serve(options=options, state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    server.cli("bitmap", "add", "disk", "still", "--disabled")
    server.cli("bitmap", "add", "disk", "t0", "--temporary")
    write(server, 3, 7)
    server.stop()
    server = restarted(serve, server, *options)
    assert set(bitmaps(server)) == {"b0", "still"}
    assert bitmaps(server)["b0"]["persistent"] is True
    assert (bitmaps(server)["b0"]["recording"], bitmaps(server)["still"]["recording"]) == (True, False)
    assert dirty(server) == {3, 7}
    write(server, 9, 7)
    server.kill()
    server = restarted(serve, server, *options)
    assert dirty(server) == {3, 7, 9}
    server.cli("bitmap", "clear", "disk", "b0")
    write(server, 20)
    server.kill()
    assert dirty(restarted(serve, server, *options)) == {20}


@pytest.mark.parametrize("options", [(), POWER], ids=["process", "power"])
def test_every_write_that_was_acknowledged_before_a_kill_is_dirty(
    serve: ServeFunction, disk: Path, state: Path, options: tuple[str, ...]
) -> None:
    server = serve(options=options, state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    expected: set[int] = set()
    for turn in range(3):
        acknowledged: list[int] = []
        done = threading.Event()

        def write_until_killed(
            server: Server, turn: int, acknowledged: list[int], done: threading.Event
        ) -> None:
            with RawClient(server) as client:
                client.go("disk")
                try:
                    for granule in range(turn, 256, 3):
                        client.request(CMD_WRITE, granule * GRANULE, 4096, bytes([turn + 1]) * 4096)
                        assert client.simple_reply().error == 0
                        acknowledged.append(granule)
                except (OSError, EOFError, AssertionError):
                    pass
            done.set()

        writer = threading.Thread(target=write_until_killed, args=(server, turn, acknowledged, done))
        writer.start()
        wait_until(lambda seen=acknowledged: len(seen) > 20, "some writes")  # type: ignore[misc]
        server.kill()
        writer.join(20)
        expected |= set(acknowledged)
        server = restarted(serve, server, *options)
        assert expected <= dirty(server)
        changed = {n for n in range(256) if disk.read_bytes()[n * GRANULE : n * GRANULE + 4096].strip(b"\0")}
        assert changed <= dirty(server)
        assert len(dirty(server) - expected) <= 1 + turn


@pytest.mark.parametrize("end", ["killed", "stopped", "pulled"])
def test_bits_frozen_for_a_temporary_snapshot_are_dirty_again_unless_they_were_pulled(
    serve: ServeFunction, disk: Path, state: Path, end: str
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    write(server, 1, 2)
    server.cli("snapshot", "create", "disk", "--name", "s", "--bitmap", "b0", "--temporary")
    write(server, 9)
    if end == "pulled":
        server.cli("snapshot", "drop", "disk@s", "--pulled")
    if end == "stopped":
        server.stop()
    else:
        server.kill()
    again = restarted(serve, server)
    assert bitmaps(again)["b0"]["busy"] is False
    assert dirty(again) == ({9} if end == "pulled" else {1, 2, 9})
    write(again, 30)
    again.cli("snapshot", "create", "disk", "--name", "s2", "--bitmap", "b0")
    again.cli("snapshot", "drop", "disk@s2", "--pulled")
    assert dirty(again) == set()


def test_removed_bitmap_does_not_come_back(serve: ServeFunction, disk: Path, state: Path) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    assert [path.name for path in (state / "bitmaps").iterdir()] == ["disk:b0.bitmap"]
    server.cli("bitmap", "remove", "disk", "b0")
    assert list((state / "bitmaps").iterdir()) == []
    server.cli("bitmap", "add", "disk", "b0")
    server.kill()
    assert dirty(restarted(serve, server)) == set()


def checkpoints(server: Server) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(server.cli("checkpoint", "list", "--json").stdout)
    return found


def test_checkpoints_outlive_a_kill_with_their_uuids_and_what_changed_since(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    for number, name in enumerate(("c1", "c2")):
        server.cli("checkpoint", "create", "disk", name)
        write(server, number)
    before = checkpoints(server)
    server.kill()
    server = restarted(serve, server)
    assert checkpoints(server) == before
    assert [(found["name"], found["parent"], found["dirty"]) for found in before] == [
        ("c1", None, GRANULE),
        ("c2", "c1", GRANULE),
    ]
    table = server.cli("checkpoint", "list").stdout.splitlines()
    assert str(before[0]["uuid"]) in table[1]
    assert table[2].endswith("  ok")
    server.cli("checkpoint", "delete", "disk", "c2")
    write(server, 9)
    server.kill()
    assert dirty(restarted(serve, server), "c1") == {0, 1, 9}


def test_checkpoint_of_a_disk_changed_behind_the_servers_back_asks_for_a_full_backup(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("checkpoint", "create", "disk", "c1")
    server.stop()
    with disk.open("r+b") as file:
        file.write(b"somebody else")
    again = restarted(serve, server)
    assert "changed while no server recorded it): back up in full" in again.cli("checkpoint", "list").stdout
    again.cli("checkpoint", "create", "disk", "c2")
    assert [found.get("inconsistent") for found in checkpoints(again)] == [True, None]


def test_disk_changed_behind_the_servers_back_makes_its_bitmap_inconsistent_and_says_why(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    server.stop()
    with disk.open("r+b") as file:
        file.write(b"somebody else")
    again = restarted(serve, server)
    assert bitmaps(again)["b0"]["inconsistent"] is True
    assert "bitmap 'b0' of node 'disk' is inconsistent: the disk was changed while no server" in again.log()
    refused = again.cli("bitmap", "enable", "disk", "b0", check=False)
    assert "inconsistent and cannot be used" in refused.stderr
    assert "changed while no server recorded it" in again.cli("bitmap", "list", "disk").stdout
    again.cli("bitmap", "remove", "disk", "b0")
    again.cli("bitmap", "add", "disk", "b0")
    write(again, 5)
    assert dirty(again) == {5}


def test_copy_of_the_disk_under_its_name_is_another_disk(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    server.stop()
    shutil.copy2(disk, tmp_path / "copy.img")
    os.replace(tmp_path / "copy.img", disk)
    again = restarted(serve, server)
    assert bitmaps(again)["b0"]["inconsistent"] is True
    assert "the disk is another file" in again.log()


def test_bitmap_of_a_disk_that_was_resized_is_inconsistent_and_can_be_removed(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    server.stop()
    make_sparse(disk, SIZE + 2 * GRANULE)
    again = restarted(serve, server)
    assert f"the disk was {SIZE} bytes long" in str(bitmaps(again)["b0"])
    write(again, SIZE // GRANULE + 1)
    again.cli("bitmap", "remove", "disk", "b0")
    again.cli("bitmap", "add", "disk", "b0")
    write(again, SIZE // GRANULE)
    assert dirty(again) == {SIZE // GRANULE}


@pytest.mark.parametrize("damage", ["header", "version", "cut"])
def test_server_does_not_start_on_a_bitmap_file_that_it_does_not_understand(
    serve: ServeFunction, disk: Path, state: Path, damage: str
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    server.stop()
    path = state / "bitmaps" / "disk:b0.bitmap"
    data = bytearray(path.read_bytes())
    for slot in (0, 4096):
        if damage == "header":
            data[slot + 100] ^= 1
        elif damage == "version":
            data[slot + 11] = 9
    if damage == "cut":
        del data[-1:]
    path.write_bytes(data)
    with pytest.raises(ServerFailed, match=r"disk:b0\.bitmap: .*; move it away") as caught:
        restarted(serve, server)
    assert "Traceback" not in str(caught.value)
    assert path.read_bytes() == data


def test_transaction_that_fails_leaves_no_file_and_takes_nothing_away(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    write(server, 4)
    actions = [
        {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b1", "persistent": True}},
        {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": "b0"}},
        {"type": "block-dirty-bitmap-remove", "data": {"node": "disk", "name": "b0"}},
        {"type": "abort", "data": {}},
    ]
    command = json.dumps({"execute": "transaction", "arguments": {"actions": actions}})
    assert server.cli("qmp", command, check=False).returncode == 1
    assert [path.name for path in (state / "bitmaps").iterdir()] == ["disk:b0.bitmap"]
    assert dirty(server) == {4}
    server.kill()
    again = restarted(serve, server)
    assert set(bitmaps(again)) == {"b0"}
    assert dirty(again) == {4}


def test_bitmap_of_a_node_that_is_deleted_and_added_again_is_there_again(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    other = make_sparse(tmp_path / "other.img", SIZE)
    server = serve(state_dir=state, disk=disk)

    def qmp(command: str, **arguments: object) -> subprocess.CompletedProcess[str]:
        return server.cli("qmp", json.dumps({"execute": command, "arguments": arguments}))

    node = {"driver": "file", "node-name": "other", "filename": str(other)}
    qmp("blockdev-add", **node)
    server.cli("bitmap", "add", "other", "b0")
    qmp("blockdev-del", **{"node-name": "other"})
    qmp("blockdev-add", **node)
    (found,) = json.loads(server.cli("bitmap", "list", "other", "--json").stdout)["other"]
    assert (found["name"], found["persistent"], "inconsistent" in found) == ("b0", True, False)
    qmp("blockdev-del", **{"node-name": "other"})
    other.write_bytes(b"x" * SIZE)
    qmp("blockdev-add", **node)
    (found,) = json.loads(server.cli("bitmap", "list", "other", "--json").stdout)["other"]
    assert found["inconsistent"] is True


def test_with_durability_power_many_writes_at_once_are_all_recorded_and_answered(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    server = serve(options=POWER, state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    with RawClient(server) as client:
        client.go("disk")
        for _ in range(3):
            for granule in range(32):
                client.request(CMD_WRITE, granule * GRANULE, 512, b"p" * 512)
            for _ in range(32):
                assert client.simple_reply().error == 0
            client.request(CMD_FLUSH)
            assert client.simple_reply().error == 0
    assert dirty(server) == set(range(32))


@pytest.mark.root
def test_no_room_for_a_bitmap_is_one_clear_line_and_a_coarser_one_fits(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    require_root("mounts a tmpfs")
    state.mkdir()
    run(require("mount"), "-t", "tmpfs", "-o", "size=256k", "tmpfs", state)
    try:
        server = serve(state_dir=state, disk=make_sparse(disk, 1 << 30))
        refused = server.cli("bitmap", "add", "disk", "b0", "-g", "512", check=False)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1
        assert "No space left on device: make room there, or take a coarser granularity" in refused.stderr
        assert bitmaps(server) == {}
        assert list((state / "bitmaps").iterdir()) == []
        server.cli("bitmap", "add", "disk", "b0", "-g", "64K")
        write(server, 3)
        assert dirty(server) == {3}
        server.stop()
    finally:
        run(require("umount"), "-l", state)


@contextmanager
def storage_daemon(image: Path, directory: Path) -> Iterator[tuple[str, Path]]:
    """qemu-storage-daemon with the qcow2 `image`, for kill -9: its export's URI, and its control socket."""
    socket, control = directory / "q.sock", directory / "q.qmp"
    for path in (socket, control):
        path.unlink(missing_ok=True)
    daemon = subprocess.Popen(
        [
            require("qemu-storage-daemon"),
            *("--blockdev", f"driver=file,node-name=file,filename={image}"),
            *("--blockdev", "driver=qcow2,node-name=disk,file=file"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
            *("--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"),
            *("--chardev", f"socket,path={control},server=on,wait=off,id=control"),
            *("--monitor", "chardev=control"),
        ]
    )
    uri = f"nbd+unix:///disk?socket={socket}"
    try:
        wait_until(lambda: attempt(require("nbdinfo"), uri).returncode == 0, "qemu-storage-daemon")
        yield uri, control
    finally:
        daemon.kill()
        daemon.wait(20)


def test_after_kill_9_the_next_incremental_is_right_where_qemus_bitmap_is_inconsistent(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    """Side by side with qemu-storage-daemon and a bitmap in a qcow2 image."""
    write_there = (require("qemu-io"), "-f", "raw", "-c", f"write -P 7 {3 * GRANULE + 512} 512")
    image = tmp_path / "disk.qcow2"
    run(require("qemu-img"), "create", "-f", "qcow2", image, str(SIZE))
    run(require("qemu-img"), "bitmap", "--add", image, "b0")
    with storage_daemon(image, tmp_path) as (uri, _):
        run(*write_there, uri)
    with storage_daemon(image, tmp_path) as (_, control):
        nodes = execute_at(control, "query-named-block-nodes")
    theirs = [
        bitmap for node in cast(list[dict[str, Any]], nodes) for bitmap in node.get("dirty-bitmaps", [])
    ]
    assert [(bitmap["name"], bitmap["inconsistent"]) for bitmap in theirs] == [("b0", True)]

    server = serve(state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    backup = tmp_path / "backup.img"
    shutil.copyfile(disk, backup)
    for granule in (3, 200):
        run(*write_there[:-1], f"write -P 7 {granule * GRANULE + 512} 512", server.uri("disk"))
        server.kill()
        server = restarted(serve, server)
        assert dirty(server) == {granule}
        assert "inconsistent" not in str(execute(server, "query-named-block-nodes"))
        server.cli("backup", "disk", str(backup), "-n", "--sync", "incremental", "--bitmap", "b0")
        assert backup.read_bytes() == disk.read_bytes()
        assert dirty(server) == set()
