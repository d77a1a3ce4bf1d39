"""`backup` and `job`: following a job of the server to its end."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdbackup.cli.main import main
from tests.support.fake_qmp import Arguments, Connection, constant, fake_qmp, refusal


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
def socket_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "c"
    monkeypatch.setenv("NBDBACKUP_CONTROL", str(path))
    return path


class FakeJob:
    """Job `j` of a server: `start` begins it; each poll moves it on; it ends at the third with `error`."""

    def __init__(self, error: str | None = None, dismissed: bool = True, polls: int = 3) -> None:
        self.error = error
        self.dismissed = dismissed
        self.polls_left = polls
        self.cancelled = False
        self.status = "undefined"

    def start(self, connection: Connection, arguments: Arguments) -> object:
        self.status = "running"
        connection.status("j", "created", "running")
        return {"job-id": "j"}

    def query(self, connection: Connection, arguments: Arguments) -> object:
        if self.status == "running":
            self.polls_left -= 1
            if not self.polls_left:
                self.end(connection)
        if self.status == "null":
            return []
        job = {
            "id": "j",
            "type": "backup",
            "status": self.status,
            "current-progress": 50,
            "total-progress": 100,
        }
        if self.error is not None and self.status == "concluded":
            job["error"] = self.error
        return [job]

    def cancel(self, connection: Connection, arguments: Arguments) -> object:
        assert arguments == {"id": "j"}
        self.cancelled = True
        self.end(connection)
        return {}

    def end(self, connection: Connection) -> None:
        data: dict[str, object] = {"type": "backup", "device": "j", "len": 100, "offset": 50, "speed": 0}
        if self.cancelled:
            connection.status("j", "aborting")
            connection.event("BLOCK_JOB_CANCELLED", **data)
        elif self.error is not None:
            connection.status("j", "aborting")
            connection.event("BLOCK_JOB_COMPLETED", error=self.error, **data)
        else:
            connection.status("j", "waiting", "pending")
            connection.event("BLOCK_JOB_COMPLETED", **data | {"offset": 100})
        connection.status("j", "concluded")
        self.status = "concluded"
        if self.dismissed:
            connection.status("j", "null")
            self.status = "null"


def test_backup_waits_for_the_job_and_exits_with_0(
    socket_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    job = FakeJob()
    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=job.query) as fake:
        arguments = ["-r", "1M", "-m", "3", "--scratch", "scr", "--scratch-max", "2M", "--job-id", "j"]
        assert main(["backup", "disk", "push.img", *arguments]) == 0
    assert job.status == "null"
    assert fake.arguments_of("x-nbdbackup-backup") == [
        {
            "node": "disk",
            "target": str(tmp_path / "push.img"),
            "existing": False,
            "sync": "full",
            "speed": 1 << 20,
            "workers": 3,
            "scratch": str(tmp_path / "scr"),
            "scratch-max": 2 << 20,
            "on-source-error": "report",
            "on-target-error": "report",
            "on-cbw-error": "break-snapshot",
            "job-id": "j",
            "auto-finalize": True,
            "auto-dismiss": True,
        }
    ]
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path}/push.img: complete, 100 of disk\n"
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        (["--sync", "top"], {"sync": "top"}),
        (["--sync", "incremental", "--bitmap", "b0"], {"sync": "incremental", "bitmap": "b0"}),
        (
            ["--sync", "bitmap", "--bitmap", "b0", "--bitmap-mode", "always"],
            {"sync": "bitmap", "bitmap": "b0", "bitmap-mode": "always"},
        ),
        (["--bitmap", "b0", "--bitmap-mode", "on-success"], {"sync": "full", "bitmap-mode": "on-success"}),
        (["--sync", "none", "-n"], {"sync": "none", "existing": True}),
        (
            ["--on-source-error", "ignore", "--on-target-error", "enospc"],
            {"on-source-error": "ignore", "on-target-error": "enospc"},
        ),
        (["--on-cbw-error", "break-guest-write"], {"on-cbw-error": "break-guest-write"}),
    ],
)
def test_what_to_copy_and_what_to_do_about_errors_is_passed_on(
    socket_path: Path, arguments: list[str], sent: dict[str, object]
) -> None:
    job = FakeJob()
    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=job.query) as fake:
        assert main(["backup", "disk", "/t", *arguments]) == 0
    (received,) = fake.arguments_of("x-nbdbackup-backup")
    assert sent.items() <= received.items()


def _with_errors(job: FakeJob, *errors: tuple[str, str, str]) -> Callable[[Connection, Arguments], object]:
    """Start `job`, and tell of errors: job, operation, action."""

    def start(connection: Connection, arguments: Arguments) -> object:
        started = job.start(connection, arguments)
        for device, operation, action in errors:
            connection.event("BLOCK_JOB_ERROR", device=device, operation=operation, action=action)
        return started

    return start


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ([("j", "read", "ignore"), ("j", "read", "ignore")], 3),
        ([("j", "write", "ignore"), ("other", "read", "ignore"), ("j", "read", "stop")], 0),
    ],
)
def test_backup_that_ignored_errors_of_the_source_exits_with_3(
    socket_path: Path, capsys: pytest.CaptureFixture[str], errors: list[tuple[str, str, str]], status: int
) -> None:
    job = FakeJob()
    start = _with_errors(job, *errors)
    with fake_qmp(socket_path, x_nbdbackup_backup=start, query_jobs=job.query):
        assert main(["backup", "disk", "/t", "--json"]) == status
    assert json.loads(capsys.readouterr().out)["source-errors-ignored"] == (2 if status else 0)


def test_failed_backup_exits_with_1_also_if_it_ignored_errors(socket_path: Path) -> None:
    job = FakeJob(error="No space left on device")
    start = _with_errors(job, ("j", "read", "ignore"))
    with fake_qmp(socket_path, x_nbdbackup_backup=start, query_jobs=job.query):
        assert main(["backup", "disk", "/t"]) == 1


def test_an_error_that_stops_the_job_is_told_with_what_to_do(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = FakeJob()
    start = _with_errors(job, ("j", "write", "stop"))
    with fake_qmp(socket_path, x_nbdbackup_backup=start, query_jobs=job.query):
        assert main(["backup", "disk", "/t"]) == 0
    assert capsys.readouterr().err == (
        "job j is stopped: writing the target failed; mend that and use: nbdbackup job resume j\n"
    )


@pytest.mark.parametrize("dismissed", [True, False])
def test_failed_job_exits_with_1_and_says_why(
    socket_path: Path, capsys: pytest.CaptureFixture[str], dismissed: bool
) -> None:
    job = FakeJob(error="No space left on device", dismissed=dismissed)
    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=job.query):
        assert main(["backup", "disk", "/t"]) == 1
    assert capsys.readouterr().err == (
        "nbdbackup: the backup of disk to /t failed: No space left on device\n"
    )


def test_end_is_the_jobs_own_also_when_it_was_told_long_before_the_job_is_gone(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = FakeJob(polls=1000)
    data: dict[str, object] = {"type": "backup", "len": 100, "offset": 100, "speed": 0}
    queried = 0

    def query(connection: Connection, arguments: Arguments) -> object:
        nonlocal queried
        queried += 1
        if queried == 1:
            connection.event("BLOCK_JOB_COMPLETED", device="other", error="not ours", **data)
            connection.event("BLOCK_JOB_COMPLETED", device="j", **data)
            connection.event("BLOCK_JOB_COMPLETED", device="other", error="not ours", **data)
            connection.status("other", "concluded")
        if queried < 4:
            return job.query(connection, arguments)
        return []

    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=query):
        assert main(["backup", "disk", "/t"]) == 0
    assert "complete" in capsys.readouterr().out


def test_json_tells_the_end_on_standard_output_alone(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = FakeJob()
    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=job.query):
        assert main(["backup", "disk", "/t", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "job-id": "j",
        "outcome": "completed",
        "offset": 100,
        "len": 100,
        "error": None,
        "source-errors-ignored": 0,
    }


def test_progress_without_a_terminal_is_a_line_now_and_then(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = FakeJob()
    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=job.query):
        assert main(["backup", "disk", "/t", "-p"]) == 0
    assert capsys.readouterr().err == "j: 50% (50 of 100), running\n"


def test_no_wait_prints_the_id_and_keeps_the_job_listed(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = FakeJob()
    with fake_qmp(socket_path, x_nbdbackup_backup=job.start) as fake:
        assert main(["backup", "disk", "/t", "--no-wait"]) == 0
    assert capsys.readouterr().out == "j\n"
    assert fake.arguments_of("x-nbdbackup-backup")[0]["auto-dismiss"] is False


def test_refused_backup_is_one_line(socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_qmp(
        socket_path,
        x_nbdbackup_backup=refusal("/t exists already"),
        query_named_block_nodes=constant([{"node-name": "disk"}]),
    ):
        assert main(["backup", "disk", "/t"]) == 1
        assert capsys.readouterr().err == "nbdbackup: /t exists already\n"
        assert main(["backup", "disc", "/t"]) == 10
        assert "no node 'disc'; it has disk" in capsys.readouterr().err


def test_server_that_goes_away_during_the_backup_is_told(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = FakeJob()

    def die(connection: Connection, arguments: Arguments) -> object:
        connection.hang_up()
        return []

    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=die):
        assert main(["backup", "disk", "/t"]) == 1
    assert "went away" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_without_a_terminal_cancels_the_job(
    socket_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    job = FakeJob(polls=1000)
    queried = 0

    def query(connection: Connection, arguments: Arguments) -> object:
        nonlocal queried
        queried += 1
        if queried == 2:
            os.kill(os.getpid(), number)
        return job.query(connection, arguments)

    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=query, job_cancel=job.cancel):
        assert main(["backup", "disk", "/t"]) == 130
    assert job.cancelled
    assert "the backup of disk was cancelled; /t was not made" in capsys.readouterr().err


def test_ignored_interrupt_stays_ignored(socket_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = FakeJob()

    def start(connection: Connection, arguments: Arguments) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return job.start(connection, arguments)

    with fake_qmp(socket_path, x_nbdbackup_backup=start, query_jobs=job.query, job_cancel=job.cancel):
        assert main(["backup", "disk", "/t"]) == 0
    assert not job.cancelled


def test_closed_terminal_leaves_the_job_alone(socket_path: Path) -> None:
    job = FakeJob(polls=1000)

    hang_ups = iter([signal.SIGHUP])

    def query(connection: Connection, arguments: Arguments) -> object:
        # Once: a second one may come when the command is over, and nobody handles it any more.
        for number in hang_ups:
            os.kill(os.getpid(), number)
        return job.query(connection, arguments)

    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=query, job_cancel=job.cancel):
        assert main(["backup", "disk", "/t"]) == 130
    assert not job.cancelled


def test_interrupt_while_the_server_starts_the_job_cancels_it(socket_path: Path) -> None:
    job = FakeJob(polls=1000)

    def start(connection: Connection, arguments: Arguments) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return job.start(connection, arguments)

    with fake_qmp(socket_path, x_nbdbackup_backup=start, query_jobs=job.query, job_cancel=job.cancel):
        assert main(["backup", "disk", "/t"]) == 130
    assert job.cancelled


def test_interrupt_that_comes_too_late_leaves_the_jobs_own_end(socket_path: Path) -> None:
    job = FakeJob(polls=1000)

    def cancel(connection: Connection, arguments: Arguments) -> object:
        job.end(connection)
        return refusal("Job 'j' in state 'concluded' cannot accept command verb 'cancel'")(connection, {})

    def query(connection: Connection, arguments: Arguments) -> object:
        if job.polls_left == 999:
            os.kill(os.getpid(), signal.SIGINT)
        return job.query(connection, arguments)

    with fake_qmp(socket_path, x_nbdbackup_backup=job.start, query_jobs=query, job_cancel=cancel):
        assert main(["backup", "disk", "/t"]) == 0


def test_interrupt_of_another_command_is_130(socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = threading.Event()

    def slow(connection: Connection, arguments: Arguments) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        release.wait(30)
        return []

    with fake_qmp(socket_path, query_named_block_nodes=slow):
        try:
            assert main(["node", "list"]) == 130
        finally:
            release.set()
    assert capsys.readouterr().err == "nbdbackup: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sync", "incremental"], "--sync incremental needs --bitmap"),
        (["--sync", "some"], "invalid choice: 'some'"),
        (["--sync", "none"], "--sync none never completes a new file"),
        (["--bitmap-mode", "never"], "name it with --bitmap"),
        (["--on-source-error", "pray"], "invalid choice: 'pray'"),
        (["-O", "qcow2"], "this version does not do target format 'qcow2' yet"),
        (["-r", "fast"], "not a size"),
        (["-m", "0"], "1 to 64"),
        (["--bitmap", "b"], "--bitmap needs --bitmap-mode with --sync full"),
    ],
)
def test_what_backup_does_not_do_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main(["backup", "disk", "/t", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "told"),
    [("http://h/x", "the scheme must be one of nbd"), ("/backups/", "chains"), ("", "empty")],
)
def test_target_of_a_kind_to_come_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], target: str, told: str
) -> None:
    assert main(["backup", "disk", target]) == 2
    assert told in capsys.readouterr().err


# job


@pytest.mark.parametrize(
    ("verb", "command", "sent"),
    [
        (["pause", "j"], "job-pause", {"id": "j"}),
        (["resume", "j"], "job-resume", {"id": "j"}),
        (["cancel", "j"], "job-cancel", {"id": "j"}),
        (["finalize", "j"], "job-finalize", {"id": "j"}),
        (["dismiss", "j"], "job-dismiss", {"id": "j"}),
        (["set-speed", "j", "2M"], "block-job-set-speed", {"device": "j", "speed": 2 << 20}),
    ],
)
def test_job_verbs_are_qmps(
    socket_path: Path, verb: list[str], command: str, sent: dict[str, object]
) -> None:
    with fake_qmp(socket_path, **{command: constant({})}) as fake:
        assert main(["job", *verb]) == 0
    assert fake.calls == [(command, sent)]


def test_job_that_does_not_exist_is_10_and_one_that_cannot_is_1(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = FakeJob(polls=1000)
    job.status = "running"
    with fake_qmp(
        socket_path, job_dismiss=refusal("Job 'j' in state 'running' cannot"), query_jobs=job.query
    ):
        assert main(["job", "dismiss", "k"]) == 10
        assert "no job 'k'; it has j" in capsys.readouterr().err
        assert main(["job", "dismiss", "j"]) == 1
        assert "in state 'running' cannot" in capsys.readouterr().err
        assert main(["job", "watch", "k"]) == 10


def test_job_list_shows_progress_and_limit(socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = FakeJob(polls=1000)
    job.status = "paused"
    with fake_qmp(
        socket_path, query_jobs=job.query, query_block_jobs=constant([{"device": "j", "speed": 1 << 20}])
    ):
        assert main(["job", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "j",
        "backup",
        "paused",
        "50",
        "of",
        "100",
        "1M/s",
    ]


@pytest.mark.parametrize(("error", "status"), [(None, 0), ("No space left on device", 1)])
@pytest.mark.parametrize("concluded", [False, True])
def test_job_watch_tells_how_a_job_ends_or_ended(
    socket_path: Path, capsys: pytest.CaptureFixture[str], error: str | None, status: int, concluded: bool
) -> None:
    job = FakeJob(error=error, dismissed=False)
    job.status = "concluded" if concluded else "running"
    with fake_qmp(socket_path, query_jobs=job.query):
        assert main(["job", "watch", "j", "--json"]) == status
    end = json.loads(capsys.readouterr().out)
    assert end["outcome"] == ("failed" if error else "completed")
    assert end["error"] == error


def test_job_watch_tells_of_errors_that_were_ignored_before_it_watched(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"id": "j", "type": "backup", "status": "concluded", "x-nbdbackup-source-errors-ignored": 4}
    with fake_qmp(socket_path, query_jobs=constant([job])):
        assert main(["job", "watch", "j", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["source-errors-ignored"] == 4


def test_job_watch_without_jobs_is_done_at_once(socket_path: Path) -> None:
    with fake_qmp(socket_path, query_jobs=constant([])):
        assert main(["job", "watch"]) == 0
