"""Bitmaps that are frozen with a snapshot, and stay so when the server is stopped or killed, at any step."""

import json
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from nbdbackup.crash_points import VARIABLE
from tests.conftest import ServeFunction
from tests.support.control import Refused, execute
from tests.support.disks import make_sparse
from tests.support.peers import require
from tests.support.processes import run
from tests.support.raw_client import CMD_WRITE, RawClient
from tests.support.server import Server

GRANULE = 65536
SIZE = 64 * GRANULE
KILLED = (EOFError, OSError)
"""What a client sees of a server that is killed."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_sparse(tmp_path / "disk.img", SIZE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def dirty(server: Server, export: str = "disk", name: str = "b0") -> set[int]:
    """The dirty granules as nbdinfo sees them."""
    command = (require("nbdinfo"), "--json", f"--map=qemu:dirty-bitmap:{name}")
    return {
        granule
        for extent in json.loads(run(*command, server.uri(export)))
        if extent["type"]
        for granule in range(
            extent["offset"] // GRANULE, -(-(extent["offset"] + extent["length"]) // GRANULE)
        )
    }


def write(server: Server, *granules: int) -> None:
    with RawClient(server) as client:
        client.go("disk")
        for granule in granules:
            client.request(CMD_WRITE, granule * GRANULE, 512, b"w" * 512)
            assert client.simple_reply().error == 0


def held_bitmap(server: Server, export: str = "disk@s") -> object:
    """The bitmap that is frozen with the snapshot; None: there is none, or no such snapshot."""
    listed = execute(server, "x-nbdbackup-query-snapshots")
    assert isinstance(listed, list)
    return next((info.get("bitmap") for info in listed if info["export"] == export), None)


def frozen_for_a_snapshot(
    serve: ServeFunction, disk: Path, state: Path, *options: str, kill_at: str = ""
) -> Server:
    """A server of which granules 1 and 2 were frozen as dirty with disk@s, and 9 was written after that.

    `kill_at`: the crash point at which it dies once the snapshot is being made or dropped.
    """
    server = serve(options=options, state_dir=state, disk=disk, environment={VARIABLE: kill_at})
    execute(server, "block-dirty-bitmap-add", node="disk", name="b0", persistent=True)
    write(server, 1, 2)
    with suppress(*KILLED):
        execute(server, "x-nbdbackup-snapshot-create", nodes=["disk"], name="s", bitmap="b0")
        write(server, 9)
    return server


def drop(server: Server, *, pulled: bool) -> None:
    execute(server, "x-nbdbackup-snapshot-drop", snapshots=["disk@s"], pulled=pulled)


def assert_killed_itself(server: Server) -> None:
    assert server.process.wait(30) == -signal.SIGKILL
    server.kill()


def restarted(serve: ServeFunction, server: Server) -> Server:
    """Another server of the same disk and state directory."""
    return serve(server.sources, server.options, state_dir=server.state_dir)


@pytest.mark.parametrize(
    ("durability", "end", "pulled"),
    [("process", "killed", True), ("process", "stopped", False), ("power", "killed", True)],
)
def test_an_incremental_pull_can_be_done_again_after_a_restart(
    serve: ServeFunction, disk: Path, state: Path, durability: str, end: str, pulled: bool
) -> None:
    server = frozen_for_a_snapshot(serve, disk, state, "--bitmap-durability", durability)
    for granule in (20, 21):
        (server.kill if end == "killed" else server.stop)()
        server = restarted(serve, server)
        assert held_bitmap(server) == "b0"
        assert dirty(server, "disk@s") == {1, 2}
        write(server, granule)
        assert dirty(server) == {1, 2, 9, *range(20, granule + 1)}
    with pytest.raises(Refused, match="Bitmap 'b0' is currently in use by another operation"):
        execute(server, "block-dirty-bitmap-clear", node="disk", name="b0")
    drop(server, pulled=pulled)
    expected = {9, 20, 21} if pulled else {1, 2, 9, 20, 21}
    assert dirty(server) == expected
    server.kill()
    assert dirty(restarted(serve, server)) == expected


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_bitmap_whose_snapshot_is_broken_after_the_restart_has_all_its_bits_again(
    serve: ServeFunction, disk: Path, state: Path, end: str
) -> None:
    server = frozen_for_a_snapshot(serve, disk, state)
    (server.kill if end == "killed" else server.stop)()
    next((state / "scratch").iterdir()).unlink()
    server = restarted(serve, server)
    assert "bitmap 'b0' of node 'disk' is not frozen any more" in server.log()
    assert dirty(server) == {1, 2, 9}
    refused = server.cli("snapshot", "drop", "disk@s", "--pulled", check=False)
    assert (refused.returncode, "drop it without --pulled" in refused.stderr) == (1, True)
    drop(server, pulled=False)
    execute(server, "block-dirty-bitmap-clear", node="disk", name="b0")


def test_a_bitmap_and_its_snapshot_wait_for_their_node_together(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    frozen_for_a_snapshot(serve, disk, state).stop()
    server = serve(state_dir=state, other=make_sparse(tmp_path / "other.img", SIZE))
    node = {"driver": "file", "node_name": "disk", "filename": str(disk)}
    execute(server, "blockdev-add", **node)
    assert (held_bitmap(server), dirty(server, "disk@s")) == ("b0", {1, 2})


@pytest.mark.parametrize("step", ["bitmap.create-successor.both", "snapshot.create.live"])
def test_a_kill_while_a_bitmap_is_being_frozen_leaves_it_with_its_bits(
    serve: ServeFunction, disk: Path, state: Path, step: str
) -> None:
    """Before the snapshot is live there is none, and nothing that the bitmap is frozen for."""
    server = frozen_for_a_snapshot(serve, disk, state, kill_at=step)
    assert_killed_itself(server)
    server = restarted(serve, server)
    is_taken = step.startswith("snapshot")
    assert held_bitmap(server) == ("b0" if is_taken else None)
    assert dirty(server) == {1, 2}
    if is_taken:
        drop(server, pulled=True)
        assert dirty(server) == set()


@pytest.mark.parametrize(
    ("step", "found"),
    [
        ("snapshot.drop.withdrawn", {1, 2, 9}),
        ("bitmap.abdicate.alone", {9}),
        ("bitmap.reclaim.not-held", {1, 2, 9}),
        ("bitmap.reclaim.cleared", {1, 2, 9}),
    ],
)
def test_a_kill_while_a_snapshot_is_being_dropped_costs_its_bitmap_nothing(
    serve: ServeFunction, disk: Path, state: Path, step: str, found: set[int]
) -> None:
    server = frozen_for_a_snapshot(serve, disk, state, kill_at=step)
    with pytest.raises(KILLED):
        drop(server, pulled="reclaim" not in step)
    assert_killed_itself(server)
    server = restarted(serve, server)
    assert execute(server, "x-nbdbackup-query-snapshots") == []
    assert dirty(server) == found
    execute(server, "block-dirty-bitmap-clear", node="disk", name="b0")


@pytest.mark.parametrize("step", ["bitmap.load.merged", "bitmap.load.in-use"])
def test_a_kill_while_a_frozen_bitmap_is_loaded_leaves_it_frozen(
    serve: ServeFunction, disk: Path, state: Path, step: str
) -> None:
    server = frozen_for_a_snapshot(serve, disk, state)
    server.stop()
    with pytest.raises(AssertionError, match="status -9"):
        serve(state_dir=state, disk=disk, environment={VARIABLE: step})
    server = restarted(serve, server)
    assert (held_bitmap(server), dirty(server, "disk@s"), dirty(server)) == ("b0", {1, 2}, {1, 2, 9})


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_restored_snapshot_shows_every_persistent_bitmap_as_it_was_at_the_instant(
    serve: ServeFunction, disk: Path, state: Path, end: str
) -> None:
    server = serve(state_dir=state, disk=disk)
    for name, granularity in (("b0", GRANULE), ("fine", 4096), ("still", GRANULE)):
        execute(
            server, "block-dirty-bitmap-add", node="disk", name=name, persistent=True, granularity=granularity
        )
    write(server, 1, 2)
    execute(server, "block-dirty-bitmap-disable", node="disk", name="still")
    write(server, 3)
    execute(server, "x-nbdbackup-snapshot-create", nodes=["disk"], name="s", bitmap="b0")
    write(server, 9)
    execute(server, "block-dirty-bitmap-remove", node="disk", name="fine")
    for _ in range(2):
        maps = {name: bitmap_map(server, name) for name in ("b0", "fine", "still")}
        assert [len(extents) for extents in maps.values()] == [3, 7, 3]
        (server.kill if end == "killed" else server.stop)()
        server = restarted(serve, server)
        assert {name: bitmap_map(server, name) for name in maps} == maps
    drop(server, pulled=True)
    assert list((state / "snapshots").iterdir()) == []


def bitmap_map(server: Server, name: str) -> list[str]:
    """What nbdinfo says of the bitmap that disk@s shows."""
    return run(require("nbdinfo"), f"--map=qemu:dirty-bitmap:{name}", server.uri("disk@s")).splitlines()


def test_a_damaged_copy_of_a_bitmap_is_left_out_and_the_rest_is_there(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    for name in ("bits", "cut", "good", "header"):
        execute(server, "block-dirty-bitmap-add", node="disk", name=name, persistent=True)
    write(server, 1)
    execute(server, "x-nbdbackup-snapshot-create", nodes=["disk"], name="s")
    server.stop()
    for path in (state / "snapshots").glob("disk@s.snapshot.bitmap*"):
        data = bytearray(path.read_bytes())
        if b"bits" in data:
            data[2 * 4096] ^= 1
        elif b"header" in data:
            data[40] ^= 1
            data[4096 + 40] ^= 1
        elif b"cut" in data:
            del data[-1:]
        path.write_bytes(data)
    server = restarted(serve, server)
    assert dirty(server, "disk@s", "good") == {1}
    for name, reason in {
        "bits": "its bits were damaged",
        "cut": "bytes long",
        "header": "is damaged",
    }.items():
        assert f"snapshot disk@s does not show what is in {state}" in server.log()
        assert reason in server.log()
        assert name not in run(require("nbdinfo"), server.uri("disk@s"))
    drop(server, pulled=False)
    assert list((state / "snapshots").iterdir()) == []


@pytest.mark.parametrize("step", ["snapshot.create.bitmap", "snapshot.save.bitmap-synced"])
def test_a_kill_while_copies_of_bitmaps_are_made_or_saved_leaves_all_or_nothing(
    serve: ServeFunction, disk: Path, state: Path, step: str
) -> None:
    server = serve(state_dir=state, disk=disk, environment={VARIABLE: step})
    for name in ("b0", "b1"):
        execute(server, "block-dirty-bitmap-add", node="disk", name=name, persistent=True)
    write(server, 1)
    with suppress(*KILLED):
        execute(server, "x-nbdbackup-snapshot-create", nodes=["disk"], name="s")
        write(server, 9)
        server.process.terminate()
    assert_killed_itself(server)
    server = restarted(serve, server)
    if "create" in step:
        assert (held_bitmap(server), list((state / "snapshots").iterdir())) == (None, [])
    else:
        assert [dirty(server, "disk@s", name) for name in ("b0", "b1")] == [{1}, {1}]
