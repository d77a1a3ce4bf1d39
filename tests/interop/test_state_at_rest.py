"""`state list` and `state clean` of snapshots, and of a state directory that no server uses."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.control import execute
from tests.support.disks import allocated_bytes, make_disk
from tests.support.raw_client import CMD_WRITE, RawClient
from tests.support.server import COMMAND, Server

SIZE = 1 << 20
CLUSTER = 65536


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SIZE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def state_verb(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`nbdbackup state ...` with no server at the default control socket."""
    return subprocess.run(
        [*COMMAND, "state", *arguments],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def listed(tmp_path: Path, state: Path) -> dict[str, dict[str, object]]:
    """What `state list` finds in `state`, by path."""
    answer = state_verb(tmp_path, "list", "--state-dir", str(state), "--json")
    assert answer.returncode == 0, answer.stderr
    return {info["path"]: info for info in json.loads(answer.stdout)}


def write(server: Server, offset: int) -> None:
    with RawClient(server) as client:
        client.go("disk")
        client.request(CMD_WRITE, offset, 3, b"new")
        assert client.simple_reply().error == 0


def stopped_with_a_snapshot(serve: ServeFunction, disk: Path, state: Path, *more: str) -> Server:
    """A server that has stopped, with snapshot disk@s, which has one cluster in scratch, and bitmap b0."""
    server = serve(state_dir=state, disk=disk)
    execute(server, "block-dirty-bitmap-add", node="disk", name="b0", persistent=True)
    for name in ("s", *more):
        execute(server, "x-nbdbackup-snapshot-create", nodes=["disk"], name=name)
    write(server, 0)
    server.stop()
    return server


def test_without_a_server_the_state_directory_itself_is_looked_at_and_cleaned(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    stopped_with_a_snapshot(serve, disk, state)
    sidecar, bitmap = state / "snapshots" / "disk@s.snapshot", state / "bitmaps" / "disk:b0.bitmap"
    lost = state / "scratch" / ".nbdbackup-scratch-999999999-ab"
    lost.write_bytes(b"x")
    found = listed(tmp_path, state)
    assert {path: (info["kind"], info["kept"]) for path, info in found.items()} == {
        str(lost): ("scratch", False),
        str(bitmap): ("bitmap", True),
        str(sidecar): ("snapshot", True),
    }
    assert found[str(sidecar)]["reason"] == "snapshot 'disk@s' of node 'disk', which there is not"
    assert found[str(sidecar)]["size"] == allocated_bytes(sidecar) + CLUSTER
    cleaned = state_verb(tmp_path, "clean", "--state-dir", str(state))
    assert (str(lost) in cleaned.stdout, str(sidecar) in cleaned.stdout) == (True, False)
    assert cleaned.stderr == "2 kept (see nbdbackup state list): name them, or say --all\n"
    server = serve(state_dir=state, disk=disk)
    assert server.snapshots() == ["disk@s"]
    server.stop()
    assert state_verb(tmp_path, "clean", "--state-dir", str(state), str(sidecar)).returncode == 0
    assert list(listed(tmp_path, state)) == [str(bitmap)]
    assert [list((state / place).iterdir()) for place in ("snapshots", "scratch")] == [[], []]
    state_verb(tmp_path, "clean", "--state-dir", str(state), "--all")
    assert listed(tmp_path, state) == {}
    server = serve(state_dir=state, disk=disk)
    assert "dirty-bitmaps" not in str(execute(server, "query-named-block-nodes"))


def test_a_state_directory_in_use_is_refused_by_name_of_its_server(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    for verb in ("list", "clean"):
        refused = state_verb(tmp_path, verb, "--state-dir", str(state))
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
        assert f"is used by another nbdbackup (process {server.pid}:" in refused.stderr
        assert "talk to that with --control" in refused.stderr
    asked = state_verb(tmp_path, "list", "--state-dir", str(state), "--control", str(server.control))
    assert (asked.returncode, asked.stderr) == (0, "")


def test_what_is_no_state_directory_stays_as_it_is(tmp_path: Path) -> None:
    refused = state_verb(tmp_path, "clean", "--state-dir", str(tmp_path))
    assert (refused.returncode, "is no state directory of nbdbackup" in refused.stderr) == (10, True)
    nobody = state_verb(tmp_path, "list")
    assert (nobody.returncode, "control.sock" in nobody.stderr) == (10, True)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_of_a_node_that_is_not_served_is_removed_only_if_it_is_named_or_with_all(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    stopped_with_a_snapshot(serve, disk, state, "t")
    server = serve(state_dir=state, other=make_disk(tmp_path / "other.img", SIZE))
    sidecars = [str(state / "snapshots" / f"disk@{name}.snapshot") for name in ("s", "t")]
    found = json.loads(server.cli("state", "list", "--json").stdout)
    assert [info["path"] for info in found if info["kind"] == "snapshot"] == sidecars
    server.cli("state", "clean")
    assert server.snapshots() == ["disk@s", "disk@t"]
    server.cli("state", "clean", sidecars[0])
    assert server.snapshots() == ["disk@t"]
    server.cli("state", "clean", "--all")
    assert server.snapshots() == []
    assert [list((state / place).iterdir()) for place in ("snapshots", "scratch")] == [[], []]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_scratch_of_a_damaged_sidecar_is_listed_and_is_not_for_the_taking(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path, elsewhere: bool
) -> None:
    server = serve(state_dir=state, disk=disk)
    place = tmp_path / "elsewhere" if elsewhere else state / "scratch"
    place.mkdir(exist_ok=True)
    for name in ("good", "bad", "gone"):
        execute(server, "x-nbdbackup-snapshot-create", nodes=["disk"], name=name, scratch=str(place))
    write(server, 0)
    server.stop()
    sidecars = state / "snapshots"
    with (sidecars / "disk@bad.snapshot").open("r+b") as file:
        file.write(b"\0" * 16384)
    (sidecars / "disk@gone.snapshot").unlink()
    scratch = {name: str(next(place.glob(f"disk@{name}.*"))) for name in ("good", "bad", "gone")}
    server = serve(state_dir=state, disk=disk)
    found = {
        info["path"]: info["kept"]
        for info in json.loads(server.cli("state", "list", "--json").stdout)
        if info["kind"] == "scratch"
    }
    # Elsewhere, what has no sidecar may be of another state directory.
    assert found == {scratch["bad"]: True, **({} if elsewhere else {scratch["gone"]: False})}
    server.cli("state", "clean")
    assert (Path(scratch["bad"]).exists(), Path(scratch["gone"]).exists()) == (True, elsewhere)
    server.cli("state", "clean", scratch["bad"])
    assert not Path(scratch["bad"]).exists()
    assert Path(scratch["good"]).exists()


def test_a_snapshot_found_broken_gives_its_scratch_back_at_once_and_stays_listed(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    stopped_with_a_snapshot(serve, disk, state)
    (scratch,) = (state / "scratch").iterdir()
    assert allocated_bytes(scratch)
    with disk.open("r+b") as file:
        file.write(b"behind its back")
    server = serve(state_dir=state, disk=disk)
    assert (allocated_bytes(scratch), server.snapshots()) == (0, ["disk@s"])
    server.stop()
    scratch.write_bytes(b"as if a kill had come before it was given back")
    server = serve(state_dir=state, disk=disk)
    assert (scratch.stat().st_size, server.snapshots()) == (0, ["disk@s"])
    server.cli("snapshot", "drop", "disk@s")
    assert not scratch.exists()


def test_a_strangers_file_in_the_place_of_a_broken_snapshots_scratch_is_left_alone(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    stopped_with_a_snapshot(serve, disk, state)
    (scratch,) = (state / "scratch").iterdir()
    scratch.rename(state / "moved")
    scratch.write_bytes(b"a stranger's")
    server = serve(state_dir=state, disk=disk)
    info = json.loads(server.cli("snapshot", "list", "--json").stdout)[0]
    assert "is another file" in info["cause"]
    assert scratch.read_bytes() == b"a stranger's"
