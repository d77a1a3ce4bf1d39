"""Pushes that are interrupted, and go on at the same point in time: killed, stopped, out of reach."""

import json
import random
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from nbdbackup.fleece.snapshot_file import SnapshotFile
from nbdbackup.fleece.snapshot_format import SnapshotFlags
from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk
from tests.support.processes import run, wait_until
from tests.support.pushes import (
    SHAPES,
    SIZE,
    Push,
    finish,
    jobs,
    made_push,
    progress,
    rest_of,
    restarted,
    wait_over,
    write,
)
from tests.support.qmp import Refused, execute
from tests.support.raw_client import CMD_WRITE, RawClient
from tests.support.server import COMMAND, Server

WAIT_S = 30.0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SIZE)


@pytest.fixture
def server(serve: ServeFunction, disk: Path, tmp_path: Path) -> Server:
    return serve(options=["--reconnect-delay", "1"], disk=disk, state_dir=tmp_path / "state", tcp=False)


def shapes(*quick: str, of: Sequence[str] = SHAPES) -> list[object]:
    """Parameters for shapes of pushes; those that are not `quick` are tested in the slow run."""
    return [shape if shape in quick else pytest.param(shape, marks=pytest.mark.slow) for shape in of]


@pytest.fixture(params=shapes("new", "nbdkit"))
def push(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Push]:
    with made_push(request.param, tmp_path) as made:
        yield made


@pytest.fixture(params=shapes("nbdkit"))
def any_push(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Push]:
    """As `push`, for what depends less on the shape."""
    with made_push(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def new_file(tmp_path: Path) -> Iterator[Push]:
    with made_push("new", tmp_path) as made:
        yield made


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Push]:
    with made_push("nbdkit", tmp_path) as made:
        yield made


class Writer(threading.Thread):
    """Writes at random, at a depth of 8, until the server is gone."""

    def __init__(self, server: Server, seed: int) -> None:
        super().__init__()
        self._server = server
        self._random = random.Random(seed)
        self.answered = 0

    def __enter__(self) -> "Writer":
        self.start()
        wait_until(lambda: self.answered >= 40, "forty writes")
        return self

    def __exit__(self, *_: object) -> None:
        self.join(WAIT_S)
        assert not self.is_alive()

    def run(self) -> None:
        try:
            with RawClient(self._server) as client:
                client.go("disk")
                while True:
                    for cookie in range(8):
                        length = self._random.randrange(1, 50_000)
                        offset = self._random.randrange(0, SIZE - length)
                        client.request(
                            CMD_WRITE, offset, length, self._random.randbytes(length), cookie=cookie
                        )
                    for _ in range(8):
                        assert client.simple_reply().error == 0
                        self.answered += 1
        except (OSError, EOFError, AssertionError):
            pass


def assert_interrupted(server: Server) -> None:
    """Job j is there, paused because it was interrupted, and somewhere on its way.

    What the target had not flushed of a fleecing job is copied again, and this little is all of it.
    """
    job = jobs(server)["j"]
    assert (job["status"], job["x-nbdbackup-paused-because"]) == ("paused", "interrupted")
    assert 0 <= progress(server) < SIZE
    assert job["total-progress"] == SIZE


def assert_lost(server: Server, reason: str) -> None:
    """Job j is over, for that reason, and nothing is left of it once it is dismissed."""
    wait_until(lambda: jobs(server)["j"]["status"] == "concluded", "the end of a job that is lost")
    error = jobs(server)["j"]["error"]
    assert isinstance(error, str)
    assert error.startswith("its point in time is lost: ")
    assert reason in error
    execute(server, "job-dismiss", id="j")
    assert rest_of(server) == []
    server.stop()
    restarted(server)
    assert jobs(server) == {}


# Killed.


def test_push_killed_under_writes_goes_on_at_the_same_point_in_time(
    server: Server, disk: Path, push: Push
) -> None:
    expected = disk.read_bytes()
    push.start(server)
    with Writer(server, 1):
        server.kill()
    restarted(server)
    assert_interrupted(server)
    assert not [path for path in rest_of(server) if not path.startswith(str(server.state_dir))]
    with Writer(server, 2):
        finish(server)
        assert push.image.read_bytes() == expected
        assert not push.partial.exists()
        assert rest_of(server) == []
        server.stop()


def test_push_killed_three_times_while_it_goes_on_is_whole(
    server: Server, disk: Path, any_push: Push
) -> None:
    expected = disk.read_bytes()
    any_push.start(server)
    for seed in range(3):
        before = progress(server)
        if seed:
            execute(server, "job-resume", id="j")
        with Writer(server, seed):
            wait_until(lambda: progress(server) > before or not seed, "some progress")  # noqa: B023
            server.kill()
        restarted(server)
        assert_interrupted(server)
    finish(server)
    assert any_push.image.read_bytes() == expected
    assert rest_of(server) == []
    server.stop()


def test_what_is_copied_already_is_not_copied_again(server: Server, disk: Path, new_file: Push) -> None:
    new_file.start(server)
    write(server, SIZE - MIB, b"x" * MIB)
    done = progress(server)
    server.kill()
    restarted(server)
    assert progress(server) == done
    server.stop()


def test_server_told_to_resume_jobs_goes_on_by_itself(server: Server, disk: Path, any_push: Push) -> None:
    expected = disk.read_bytes()
    any_push.start(server)
    with Writer(server, 3):
        server.kill()
    # The rate limit came with the job.
    restarted(server, "--resume-jobs")
    assert jobs(server)["j"]["status"] == "running"
    execute(server, "block-job-set-speed", device="j", speed=0)
    wait_over(server)
    assert any_push.image.read_bytes() == expected
    assert rest_of(server) == []
    server.stop()


def test_cancelling_an_interrupted_push_removes_all_of_it(server: Server, push: Push) -> None:
    push.start(server)
    server.kill()
    restarted(server)
    server.cli("job", "cancel", "j")
    wait_over(server)
    assert not push.partial.exists()
    assert push.image.exists() == bool(push.remote or push.arguments.get("existing"))
    assert rest_of(server) == []
    server.stop()
    restarted(server)
    assert jobs(server) == {}
    server.stop()


def test_job_of_a_disk_that_is_not_served_waits_for_it(
    server: Server, disk: Path, tmp_path: Path, new_file: Push
) -> None:
    expected = disk.read_bytes()
    new_file.start(server)
    server.kill()
    server.sources = {"other": make_disk(tmp_path / "other.img", MIB)}
    restarted(server)
    assert jobs(server) == {}
    (left,) = json.loads(server.cli("state", "list", "--json").stdout)
    assert (left["kind"], left["kept"]) == ("job", True)
    assert left["reason"] == "interrupted backup 'j' of node 'disk', which there is not"
    assert "1 kept" in server.cli("state", "clean").stderr
    target = str(tmp_path / "o.img")
    with pytest.raises(Refused, match="Job ID 'j' already in use"):
        execute(server, "x-nbdbackup-backup", node="other", target=target, sync="full", job_id="j")
    file = {"driver": "file", "filename": str(disk)}
    execute(server, "blockdev-add", driver="raw", node_name="disk", file=file)
    assert_interrupted(server)
    finish(server)
    assert new_file.image.read_bytes() == expected
    server.stop()


def state_verb(server: Server, *arguments: str) -> str:
    """What `nbdbackup state ...` prints while there is no server."""
    return run(*COMMAND, "state", arguments[0], "--state-dir", server.state_dir, *arguments[1:])


@pytest.mark.parametrize("shape", ["new", "nbdkit"])
def test_interrupted_push_is_cleaned_away_without_a_server_only_if_that_is_asked_for(
    server: Server, tmp_path: Path, shape: str
) -> None:
    with made_push(shape, tmp_path) as push:
        push.start(server)
        write(server, SIZE - MIB, b"a" * MIB)
        server.kill()
        (left,) = json.loads(state_verb(server, "list", "--json"))
        assert (left["kind"], left["kept"]) == ("job", True)
        assert state_verb(server, "clean") == ""
        assert push.partial.exists() == (shape == "new")
        assert "job" in state_verb(server, "clean", left["path"])
        assert not push.partial.exists()
        assert state_verb(server, "list") == ""
        restarted(server)
        assert jobs(server) == {}
        assert rest_of(server) == []
        server.stop()


# Stopped.


def test_push_is_left_when_the_server_stops_and_goes_on_later(server: Server, disk: Path, push: Push) -> None:
    expected = disk.read_bytes()
    push.start(server)
    with Writer(server, 4):
        server.stop()
    assert "cancelled" not in server.log()
    assert "backup j of disk is kept" in server.log()
    restarted(server)
    assert_interrupted(server)
    write(server, 0, b"y" * MIB)
    finish(server)
    assert push.image.read_bytes() == expected
    assert rest_of(server) == []
    server.stop()


def set_boot(server: Server) -> None:
    """Let it look as if the machine had been started again since the server ended."""
    (sidecar,) = (server.state_dir / "jobs").glob("*.snapshot")
    file = SnapshotFile.open(sidecar)
    file.write_header(replace(file.header, boot_id=b"another boot...."), sync=True)
    file.close()


def test_push_that_was_left_outlives_the_machine_s_restart(
    server: Server, disk: Path, any_push: Push
) -> None:
    expected = disk.read_bytes()
    any_push.start(server)
    write(server, SIZE - MIB, b"z" * MIB)
    server.stop()
    set_boot(server)
    restarted(server)
    assert_interrupted(server)
    finish(server)
    assert any_push.image.read_bytes() == expected
    server.stop()


def test_push_in_use_does_not_outlive_a_loss_of_power(server: Server, any_push: Push) -> None:
    any_push.start(server)
    server.kill()
    set_boot(server)
    restarted(server)
    assert_lost(server, "the machine went down while it was in use")
    assert not any_push.partial.exists()
    server.stop()


def test_backup_that_cannot_go_on_is_cancelled_as_ever(server: Server, disk: Path, tmp_path: Path) -> None:
    """Nobody is there to resume sync=none, and a client's write would wait for a direct remote target."""
    with made_push("nbdkit", tmp_path) as push:
        push.start(server, scratch="none")
        server.stop()
        assert "j: cancelled" in server.log()
        restarted(server)
        assert jobs(server) == {}
        server.stop()


# Checked, not trusted.


def test_disk_changed_while_no_server_ran_loses_the_point_in_time(
    server: Server, disk: Path, any_push: Push
) -> None:
    any_push.start(server)
    server.stop()
    disk.write_bytes(disk.read_bytes())
    restarted(server)
    assert_lost(server, "the disk was changed while no server recorded it")
    assert not any_push.partial.exists()
    server.stop()


def test_partial_file_that_was_replaced_is_left_alone(server: Server, tmp_path: Path, new_file: Push) -> None:
    new_file.start(server)
    server.kill()
    new_file.partial.rename(tmp_path / "moved")
    new_file.partial.write_bytes(b"somebody else's")
    restarted(server)
    assert_lost(server, f"its target {new_file.partial} is another file")
    assert new_file.partial.read_bytes() == b"somebody else's"
    server.stop()


@pytest.mark.parametrize("shape", shapes("new", of=("new", "scratch")))
def test_partial_file_that_was_cut_short_is_not_believed(server: Server, tmp_path: Path, shape: str) -> None:
    with made_push(shape, tmp_path) as push:
        push.start(server)
        server.kill()
        with push.partial.open("r+b") as file:
            file.truncate(MIB)
        restarted(server)
        assert_lost(server, f"its target {push.partial} was {SIZE} bytes long, and is {MIB}")
        assert not push.partial.exists()
        server.stop()


@pytest.mark.parametrize("shape", shapes("new", of=("new", "existing", "scratch")))
def test_target_that_others_wrote_to_meanwhile_is_not_believed(
    server: Server, tmp_path: Path, shape: str
) -> None:
    with made_push(shape, tmp_path) as push:
        push.start(server)
        server.stop()
        written = push.image if shape == "existing" else push.partial
        with written.open("r+b") as file:
            file.write(b"mine")
        restarted(server)
        assert_lost(server, f"its target {written} was changed while no server used it")
        assert push.image.exists() == (shape == "existing")
        server.stop()


def test_scratch_that_is_gone_loses_the_point_in_time(server: Server, remote: Push) -> None:
    remote.start(server)
    server.kill()
    (scratch,) = (server.state_dir / "scratch").iterdir()
    scratch.unlink()
    restarted(server)
    assert_lost(server, f"its scratch {scratch} cannot be opened")
    server.stop()


def test_maps_that_were_damaged_are_not_believed(server: Server, new_file: Push) -> None:
    new_file.start(server)
    server.stop()
    (sidecar,) = (server.state_dir / "jobs").glob("*.snapshot")
    file = SnapshotFile.open(sidecar)
    assert SnapshotFlags.IN_USE not in file.header.flags
    offset = file.header.map_offset(0)
    file.close()
    with sidecar.open("r+b") as bits:
        bits.seek(offset)
        bits.write(b"\x5a")
    restarted(server)
    assert_lost(server, f"the maps in {sidecar} were damaged")
    server.stop()


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ('"version": 1', '"version": 2', "of version 2, and this nbdbackup knows version 1 alone"),
        ('"speed": ', '"speed": 1', "it is damaged"),
        ('"target": "', '"target": 7, "', "it is damaged"),
    ],
)
def test_record_that_cannot_be_understood_is_named_and_left(
    server: Server, new_file: Push, before: str, after: str, reason: str
) -> None:
    new_file.start(server)
    server.kill()
    (record,) = (server.state_dir / "jobs").glob("*.job")
    text = record.read_text()
    assert before in text
    record.write_text(text.replace(before, after))
    restarted(server)
    assert jobs(server) == {}
    lines = [line for line in server.log().splitlines() if f"cannot use job file {record}" in line]
    assert len(lines) == 1
    assert reason in lines[0]
    assert len(list((server.state_dir / "jobs").iterdir())) == 2
    assert "kept" in server.cli("state", "clean").stderr
    assert new_file.partial.exists()
    server.stop()


# Out of reach.


def test_push_whose_target_s_server_is_gone_waits_and_goes_on_when_it_is_back(
    server: Server, disk: Path, remote: Push
) -> None:
    expected = disk.read_bytes()
    assert remote.remote is not None
    with subprocess.Popen(
        server.cli_command("backup", "disk", remote.target, "--job-id", "j", "-r", "1M", "-m", "1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        wait_until(lambda: "j" in jobs(server) and progress(server) > 0, "the first chunk")
        write(server, SIZE - MIB, b"1" * MIB)
        remote.remote.kill()
        out, err = waiting.communicate(timeout=WAIT_S)
    assert (waiting.returncode, out) == (1, "")
    line = err.splitlines()[-1]
    assert "was interrupted, and is kept" in line
    assert "the connection to the server was lost" in line
    assert "nbdbackup job resume j" in line
    assert jobs(server)["j"]["status"] == "paused"
    # As long as it is gone, going on comes to the same.
    execute(server, "job-resume", id="j")
    wait_until(lambda: jobs(server)["j"]["status"] == "paused", "the job to stop again")
    assert "cannot connect to" in str(jobs(server)["j"]["x-nbdbackup-paused-because"])
    write(server, 0, b"2" * MIB)
    remote.remote.start()
    finish(server)
    assert remote.image.read_bytes() == expected
    assert rest_of(server) == []
    server.stop()


def test_target_out_of_reach_keeps_neither_the_server_nor_the_point_in_time(
    server: Server, disk: Path, remote: Push
) -> None:
    expected = disk.read_bytes()
    assert remote.remote is not None
    remote.start(server)
    server.kill()
    remote.remote.kill()
    restarted(server)
    assert_interrupted(server)
    write(server, 0, b"3" * SIZE)
    execute(server, "job-resume", id="j")
    wait_until(
        lambda: "cannot connect" in str(jobs(server)["j"].get("x-nbdbackup-paused-because")),
        "the job to stop again",
    )
    remote.remote.start()
    finish(server)
    assert remote.image.read_bytes() == expected
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_waiting_backup_says_how_to_go_on_when_its_server_goes_away(
    server: Server, disk: Path, new_file: Push, number: signal.Signals
) -> None:
    expected = disk.read_bytes()
    with subprocess.Popen(
        server.cli_command(
            "backup", "disk", new_file.target, "--job-id", "j", "-r", "128K", "-m", "1", "--progress"
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        wait_until(lambda: "j" in jobs(server) and progress(server) > 0, "the first chunk")
        assert waiting.stderr is not None
        assert "j" in waiting.stderr.readline()  # it watches the job
        if number is signal.SIGTERM:
            server.stop()
        else:
            server.kill()
        out, err = waiting.communicate(timeout=WAIT_S)
    assert (waiting.returncode, out) == (1, "")
    line = err.splitlines()[-1]
    assert f"the backup of disk to {new_file.target} is kept" in line
    assert "nbdbackup job resume j" in line
    restarted(server)
    finish(server)
    assert new_file.image.read_bytes() == expected
    server.stop()


# Bitmaps.


def dirty(server: Server, bitmap: str) -> int:
    """How many bytes of the disk are dirty in it."""
    nodes = execute(server, "query-named-block-nodes")
    assert isinstance(nodes, list)
    (count,) = [found["count"] for found in nodes[0]["dirty-bitmaps"] if found.get("name") == bitmap]
    assert isinstance(count, int)
    return count


def test_interrupted_incremental_goes_on_and_ends_its_bitmap(
    server: Server, disk: Path, new_file: Push
) -> None:
    execute(server, "block-dirty-bitmap-add", node="disk", name="b", persistent=True)
    write(server, 2 * MIB, b"1" * (3 * MIB))
    expected = bytearray(SIZE)
    expected[2 * MIB : 5 * MIB] = b"1" * (3 * MIB)
    new_file.start(server, sync="incremental", bitmap="b")
    write(server, 4 * MIB, b"2" * MIB)
    write(server, 6 * MIB, b"3" * MIB)
    server.kill()
    restarted(server)
    assert jobs(server)["j"]["total-progress"] == 3 * MIB
    write(server, 7 * MIB, b"4" * MIB)
    finish(server)
    assert new_file.image.read_bytes() == expected
    # What the backup has is clean; what was written since its point in time is dirty.
    assert dirty(server, "b") == 3 * MIB
    server.stop()


def test_cancelled_incremental_gives_its_bitmap_everything_back(server: Server, new_file: Push) -> None:
    execute(server, "block-dirty-bitmap-add", node="disk", name="b", persistent=True)
    write(server, 2 * MIB, b"1" * (2 * MIB))
    new_file.start(server, sync="incremental", bitmap="b")
    server.stop()
    restarted(server)
    write(server, 6 * MIB, b"3" * MIB)
    execute(server, "job-cancel", id="j")
    wait_over(server)
    assert dirty(server, "b") == 3 * MIB
    server.stop()


def test_what_the_target_has_flushed_is_not_copied_again(server: Server, disk: Path, remote: Push) -> None:
    """A bounded scratch makes the job flush, and give back, every so often."""
    expected = disk.read_bytes()
    remote.start(server, speed=MIB, scratch_max=4 * MIB)
    wait_until(lambda: progress(server) >= 3 * MIB, "three chunks")
    write(server, 0, b"5" * MIB)
    write(server, SIZE - MIB, b"6" * MIB)
    server.kill()
    restarted(server)
    assert progress(server) >= 2 * MIB
    finish(server)
    assert remote.image.read_bytes() == expected
    server.stop()


# Every step that a crash can interrupt.

STARTING = ("job.start.recorded", "job.start.made", "job.start.live")
FINISHING = (
    "job.give-back.flushed",
    "job.finish.copied",
    "job.finish.let-go",
    "job.finish.complete",
    "job.finish.committed",
    "job.remove.sidecar",
)
LEAVING = ("job.leave.stopped", "job.leave.flushed", "job.leave.recorded", "job.leave.saved")
ABORTING = ("job.abort.withdrawn", "job.abort.let-go", "job.abort.discarded", "job.remove.sidecar")


def run_into(server: Server, point: str) -> None:
    """Wait until the server was killed at that point."""
    assert server.process.wait(WAIT_S) == -signal.SIGKILL, point


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["new", "nbdkit"])
@pytest.mark.parametrize("point", STARTING)
def test_crash_while_a_push_starts_leaves_a_whole_job_or_none(
    server: Server, disk: Path, tmp_path: Path, shape: str, point: str
) -> None:
    expected = disk.read_bytes()
    server.stop()
    restarted(server, environment={"NBDBACKUP_CRASH_AT": point})
    with made_push(shape, tmp_path) as push:
        with pytest.raises((OSError, ValueError)):
            push.start(server)
        run_into(server, point)
        restarted(server)
        if point == "job.start.live":
            assert_interrupted(server)
            finish(server)
        else:
            assert jobs(server) == {}
            assert rest_of(server) == []
            assert not push.partial.exists()
            push.start(server)
            execute(server, "block-job-set-speed", device="j", speed=0)
            wait_over(server)
        assert push.image.read_bytes() == expected
        assert rest_of(server) == []
        server.stop()


@pytest.mark.parametrize("shape", shapes("new", of=("new", "existing", "scratch")))
@pytest.mark.parametrize("point", FINISHING)
def test_crash_while_a_push_ends_leaves_a_whole_target_or_a_job_that_makes_one(
    server: Server, disk: Path, tmp_path: Path, shape: str, point: str
) -> None:
    if shape != "scratch" and point == "job.give-back.flushed":
        pytest.skip("a direct job gives nothing back")
    expected = disk.read_bytes()
    server.stop()
    restarted(server, environment={"NBDBACKUP_CRASH_AT": point})
    execute(server, "block-dirty-bitmap-add", node="disk", name="b", persistent=True)
    with made_push(shape, tmp_path) as push:
        push.start(server, bitmap="b", bitmap_mode="on-success")
        write(server, 0, b"7" * MIB)
        execute(server, "block-job-set-speed", device="j", speed=0)
        run_into(server, point)
        if push.image.exists() and shape != "existing":
            assert push.image.read_bytes() == expected
        restarted(server)
        if jobs(server):
            write(server, MIB, b"8" * MIB)
            finish(server)
            assert dirty(server, "b") == 2 * MIB
        else:
            assert dirty(server, "b") == MIB
        assert push.image.read_bytes() == expected
        assert not push.partial.exists()
        assert rest_of(server) == []
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["new", "scratch", "nbdkit"])
@pytest.mark.parametrize("point", LEAVING)
def test_crash_while_a_push_is_left_loses_nothing(
    server: Server, disk: Path, tmp_path: Path, shape: str, point: str
) -> None:
    if shape != "scratch" and point == "job.leave.recorded":
        pytest.skip("only a new file that is not written to directly is recorded anew")
    expected = disk.read_bytes()
    server.stop()
    restarted(server, environment={"NBDBACKUP_CRASH_AT": point})
    with made_push(shape, tmp_path) as push:
        push.start(server)
        write(server, 0, b"9" * MIB)
        server.process.terminate()
        run_into(server, point)
        restarted(server)
        assert_interrupted(server)
        finish(server)
        assert push.image.read_bytes() == expected
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["new", "scratch"])
@pytest.mark.parametrize("point", ABORTING)
def test_crash_while_a_push_is_cancelled_leaves_nothing(
    server: Server, tmp_path: Path, shape: str, point: str
) -> None:
    server.stop()
    restarted(server, environment={"NBDBACKUP_CRASH_AT": point})
    with made_push(shape, tmp_path) as push:
        push.start(server)
        execute(server, "job-cancel", id="j")
        run_into(server, point)
        restarted(server)
        assert jobs(server) == {}
        assert rest_of(server) == []
        assert not push.partial.exists()
        assert not push.image.exists()
        server.stop()
