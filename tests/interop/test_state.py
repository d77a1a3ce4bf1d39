"""The state directory: who has it, what it refuses, and what is left in it and beside targets."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import make_disk, make_sparse
from tests.support.peers import require, require_root
from tests.support.processes import run, wait_until
from tests.support.server import Server, ServerFailed

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", 8 * MIB)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def leftovers(server: Server) -> list[tuple[str, str]]:
    return [(each["kind"], each["path"]) for each in json.loads(server.cli("state", "list", "--json").stdout)]


def killed_in_a_backup(serve: ServeFunction, disk: Path, state: Path, target: Path) -> Path:
    """The partial file of a backup that cannot go on: its server was killed, and its record is gone."""
    server = serve(state_dir=state, disk=disk)
    server.cli("backup", "disk", str(target), "-r", "1M", "--no-wait")
    partial = target.with_name(target.name + ".partial")
    wait_until(lambda: partial.stat().st_blocks > 0, "some clusters in the target")
    assert leftovers(server) == []
    server.kill()
    for path in (state / "jobs").iterdir():
        path.unlink()
    return partial


def test_partial_file_of_a_killed_server_is_listed_and_removed_by_clean_alone(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    partial = killed_in_a_backup(serve, disk, state, tmp_path / "target.img")
    (tmp_path / "other.img.partial").write_bytes(b"somebody else's")
    server = serve(state_dir=state, disk=disk)
    assert leftovers(server) == [("partial", str(partial))]
    assert "of a backup that did not end" in server.cli("state", "list").stdout
    server.cli("backup", "disk", str(tmp_path / "second.img"))
    assert leftovers(server) == [("partial", str(partial))]
    assert str(partial) in server.cli("state", "clean").stdout
    assert not partial.exists()
    assert (leftovers(server), list((state / "partials").iterdir())) == ([], [])
    assert (tmp_path / "other.img.partial").exists()
    assert server.cli("state", "clean").stdout == ""


def test_file_that_somebody_else_made_in_place_of_a_partial_one_is_not_ours(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    partial = killed_in_a_backup(serve, disk, state, tmp_path / "target.img")
    partial.rename(tmp_path / "kept")
    partial.write_bytes(b"somebody else's")
    server = serve(state_dir=state, disk=disk)
    assert leftovers(server) == []
    server.cli("state", "clean")
    assert partial.read_bytes() == b"somebody else's"


def test_bitmaps_of_a_node_that_is_not_served_are_kept_until_clean(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    other = make_sparse(tmp_path / "other.img", MIB)
    server = serve(state_dir=state, disk=disk, other=other)
    server.cli("checkpoint", "create", "disk", "other", "c1", "--temporary")
    server.cli("bitmap", "add", "other", "b0")
    server.stop()
    server = serve(state_dir=state, disk=disk)
    paths = [str(state / "bitmaps" / f"other:{name}.bitmap") for name in ("b0", "c1")]
    assert leftovers(server) == [("bitmap", path) for path in paths]
    refused = server.cli("state", "clean", str(state / "bitmaps" / "disk:c1.bitmap"), check=False)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "disk:c1.bitmap is no leftover (see nbdbackup state list)" in refused.stderr
    server.cli("state", "clean", paths[0])
    assert leftovers(server) == [("bitmap", paths[1])]
    kept = server.cli("state", "clean")
    assert (kept.stdout, kept.stderr) == ("", "1 kept (see nbdbackup state list): name them, or say --all\n")
    assert leftovers(server) == [("bitmap", paths[1])]
    server.cli("state", "clean", "--all")
    assert leftovers(server) == []
    server.stop()
    server = serve(state_dir=state, disk=disk, other=other)
    listed = json.loads(server.cli("checkpoint", "list", "--json").stdout)
    assert [(found["node"], found["name"]) for found in listed] == [("disk", "c1")]
    server.cli("checkpoint", "create", "other", "c2")


def test_checkpoint_whose_bitmap_was_cleaned_away_does_not_vanish_from_its_chain(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    other = make_sparse(tmp_path / "other.img", MIB)
    server = serve(state_dir=state, disk=disk, other=other)
    server.cli("checkpoint", "create", "other", "c1", "--temporary")
    server.cli("checkpoint", "create", "other", "c2", "--temporary")
    server.stop()
    server = serve(state_dir=state, disk=disk)
    server.cli("state", "clean", str(state / "bitmaps" / "other:c2.bitmap"))
    server.stop()
    server = serve(state_dir=state, other=other)
    listed = json.loads(server.cli("checkpoint", "list", "--json").stdout)
    assert [(found["name"], found["inconsistent"]) for found in listed] == [("c1", True), ("c2", True)]


def test_scratch_file_of_a_dead_process_is_a_leftover(serve: ServeFunction, disk: Path, state: Path) -> None:
    server = serve(state_dir=state, disk=disk)
    dead = state / "scratch" / ".nbdbackup-scratch-999999999-ab"
    alive = state / "scratch" / f".nbdbackup-scratch-{server.pid}-ab"
    for path in (dead, alive):
        path.write_bytes(b"x")
    assert leftovers(server) == [("scratch", str(dead))]
    server.cli("state", "clean")
    assert (dead.exists(), alive.exists()) == (False, True)


def test_second_server_is_told_who_has_the_state_directory_and_who_has_the_disk(
    serve: ServeFunction, disk: Path, state: Path, tmp_path: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    with pytest.raises(ServerFailed, match=rf"state directory {state} .*process {server.pid}: .* serve "):
        serve(state_dir=state, other=make_sparse(tmp_path / "other.img", MIB))
    with pytest.raises(ServerFailed, match=rf"disk.img is locked by .*process {server.pid}: .* serve "):
        serve(disk=disk)
    server.kill()
    serve(state_dir=state, disk=disk)


def test_state_directory_of_another_version_is_refused_and_left_alone(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    serve(state_dir=state, disk=disk).stop()
    assert (state / "version").read_text() == "1\n"
    (state / "version").write_text("2\n")
    (state / "bitmaps" / "future.new").write_text("of another version")
    with pytest.raises(ServerFailed, match=r"of version '2', and this nbdbackup knows version 1") as caught:
        serve(state_dir=state, disk=disk)
    assert "Traceback" not in str(caught.value)
    assert (state / "bitmaps" / "future.new").exists()


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "Read-only file system"), ("rw,size=16k", "No space left on device; make room there, or name")],
)
def test_state_directory_that_cannot_be_written_is_one_clear_line_at_the_start(
    serve: ServeFunction, disk: Path, state: Path, options: str, reason: str
) -> None:
    require_root("mounts a tmpfs")
    state.mkdir()
    run(require("mount"), "-t", "tmpfs", "-o", options, "tmpfs", state)
    try:
        if options != "ro":
            with pytest.raises(OSError, match="No space left"):
                (state / "full").write_bytes(b"x" * MIB)
        with pytest.raises(ServerFailed, match=rf"cannot use state directory {state}: {reason}") as caught:
            serve(state_dir=state, disk=disk)
        assert "Traceback" not in str(caught.value)
    finally:
        run(require("umount"), "-l", state)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, but for the lock's, in which a server notes that it was there."""
    return {
        str(path): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def refusal(serve: ServeFunction, disk: Path, state: Path, options: tuple[str, ...] = ()) -> str:
    """What a server says that does not start: one line, with status 1; nothing has changed."""
    before = contents(state)
    with pytest.raises(ServerFailed, match="ended with status 1 ") as caught:
        serve(options=options, state_dir=state, disk=disk)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith("nbdbackup: ")
    assert contents(state) == before
    return line


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("", "cannot use state directory {state}: .*; name another with --state-dir"),
        ("scratch", "cannot use state directory {state}: File exists; name another"),
        ("bitmaps", "cannot use directory {state}/bitmaps for bitmaps: File exists"),
        ("snapshots", "cannot use directory {state}/snapshots for snapshots: File exists"),
    ],
)
def test_a_file_where_a_directory_should_be_is_one_clear_line_at_the_start(
    serve: ServeFunction, disk: Path, state: Path, place: str, reason: str
) -> None:
    (state / place).parent.mkdir(parents=True, exist_ok=True)
    (state / place).write_text("somebody's")
    with pytest.raises(ServerFailed, match=reason.format(state=state)) as caught:
        serve(state_dir=state, disk=disk)
    assert "Traceback" not in str(caught.value)
    assert (state / place).read_text() == "somebody's"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("version", "cannot use state directory {state}: Is a directory"),
        ("lock", "cannot use state directory {state}: Is a directory"),
        ("bitmaps/checkpoints.json", "cannot read checkpoint file .*checkpoints.json: Is a directory"),
        ("bitmaps/disk:b0.bitmap", "cannot open bitmap file .*disk:b0.bitmap: Is a directory"),
    ],
)
def test_a_directory_where_a_file_should_be_is_one_clear_line_at_the_start(
    serve: ServeFunction, disk: Path, state: Path, place: str, reason: str
) -> None:
    (state / place).mkdir(parents=True)
    if place.startswith("bitmaps"):
        (state / "version").write_text("1\n")
    assert re.search(reason.format(state=state), refusal(serve, disk, state))


def test_what_is_stored_stays_as_it_is_when_a_server_is_refused(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    server = serve(state_dir=state, disk=disk)
    server.cli("bitmap", "add", "disk", "b0")
    server.cli("snapshot", "create", "disk", "--name", "s", "--bitmap", "b0")
    server.stop()
    (state / "version").write_text("2\n")
    assert "is of version '2'" in refusal(serve, disk, state)
    (state / "version").write_text("1\n")
    holder = serve(disk=disk)
    assert re.search(rf"disk.img is locked by .*process {holder.pid}: ", refusal(serve, disk, state))
    holder.stop()
    holder = serve(state_dir=state)
    assert f"(process {holder.pid}: " in refusal(serve, disk, state)
    holder.stop()
    assert serve(state_dir=state, disk=disk).snapshots() == ["disk@s"]


@pytest.mark.root
def test_what_is_stored_is_served_from_a_full_state_directory(
    serve: ServeFunction, disk: Path, state: Path
) -> None:
    require_root("mounts a tmpfs")
    state.mkdir()
    run(require("mount"), "-t", "tmpfs", "-o", "size=9M", "tmpfs", state)
    try:
        server = serve(state_dir=state, disk=disk)
        server.cli("bitmap", "add", "disk", "b0")
        server.cli("snapshot", "create", "disk", "--name", "s", "--bitmap", "b0")
        server.kill()
        with pytest.raises(OSError, match="No space left"):
            (state / "full").write_bytes(bytes(16 * MIB))
        server = serve(state_dir=state, disk=disk)
        assert server.snapshots() == ["disk@s"]
        refused = server.cli("snapshot", "create", "disk", "--name", "t", check=False)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
        assert "No space left on device: make room there" in refused.stderr
        server.stop()
    finally:
        run(require("umount"), "-l", state)
