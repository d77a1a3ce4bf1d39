"""Commands that talk to a server: what they ask, what they print, how they fail."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import ConnectError, QMPClient

from nbdbackup.cli import control
from nbdbackup.cli.main import main
from tests.support.fake_qmp import Arguments, Connection, constant, fake_qmp, refusal

SNAPSHOT = {
    "node": "disk",
    "name": "s1",
    "export": "disk@s1",
    "uris": ["nbd://127.0.0.1:10809/disk%40s1", "nbd+unix:///disk%40s1?socket=/s"],
    "created": "2026-11-23T03:04:05Z",
    "size": 1 << 30,
    "cluster-size": 65536,
    "scratch-used": 65536,
    "scratch-max": None,
    "state": "ok",
    "cause": None,
}
NODE = {
    "node-name": "disk",
    "drv": "file",
    "file": "/d/vm.img",
    "ro": False,
    "image": {"virtual-size": 1 << 30},
}


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


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("nbdbackup: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["snapshot", "create", "disk"],
        ["snapshot", "list"],
        ["snapshot", "drop", "disk@s1"],
        ["backup", "disk", "/t"],
        ["job", "list"],
        ["job", "watch"],
        ["job", "cancel", "j"],
        ["job", "set-speed", "j", "1M"],
        ["node", "list"],
        ["node", "info", "disk"],
        ["qmp", "query-jobs"],
    ],
)
def test_without_a_server_every_verb_exits_with_10(
    socket_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 10
    assert f"no server on {socket_path}" in error_line(capsys)


def test_socket_that_nobody_listens_on_is_no_server(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(socket_path))
    assert main(["node", "list"]) == 10
    assert "no server" in error_line(capsys)


def test_control_option_goes_before_the_environment(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["node", "list", "--control", "/nonexistent/c"]) == 10
    assert "no server on /nonexistent/c" in error_line(capsys)


def test_too_long_a_control_path_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["node", "list", "--control", "/" + "c" * 108]) == 2
    assert "at most 107 bytes" in error_line(capsys)


def test_socket_of_somebody_else_is_a_failure_that_says_so(
    socket_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(client: QMPClient, address: str) -> None:
        raise ConnectError("no", PermissionError(13, "Permission denied"))

    monkeypatch.setattr(QMPClient, "connect", connect)
    assert main(["node", "list"]) == 1
    assert "may not connect" in error_line(capsys)


def test_listener_that_does_not_greet_is_given_up(
    socket_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "CONNECT_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(socket_path))
        mute.listen()
        assert main(["node", "list"]) == 1
    assert "did not greet" in error_line(capsys)


def test_server_that_hangs_up_in_the_middle_is_told_on_one_line(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(connection: Connection, arguments: Arguments) -> object:
        connection.hang_up()
        return None

    with fake_qmp(socket_path, query_named_block_nodes=die):
        assert main(["node", "list"]) == 1
    assert "went away" in error_line(capsys)


def test_answer_of_another_shape_is_a_failure_not_a_traceback(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_qmp(socket_path, query_named_block_nodes=constant([{"surprise": 1}])):
        assert main(["node", "list"]) == 1
    assert "something else than expected" in error_line(capsys)


# snapshot


def test_snapshot_create_prints_uris_alone(socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_qmp(socket_path, x_nbdbackup_snapshot_create=constant([SNAPSHOT])) as fake:
        assert main(["snapshot", "create", "disk", "--name", "s1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == SNAPSHOT["uris"]
    assert captured.err == ""
    assert fake.arguments_of("x-nbdbackup-snapshot-create") == [
        {"nodes": ["disk"], "name": "s1", "on-cbw-error": "break-snapshot", "cbw-timeout": 0.0}
    ]


def test_snapshot_create_passes_its_options_on_with_an_absolute_scratch(
    socket_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with fake_qmp(socket_path, x_nbdbackup_snapshot_create=constant([SNAPSHOT])) as fake:
        arguments = ["--scratch", "scr", "--scratch-max", "1M", "--on-cbw-error", "break-guest-write"]
        assert main(["snapshot", "create", "a", "b", *arguments, "--cbw-timeout", "2.5"]) == 0
    assert fake.arguments_of("x-nbdbackup-snapshot-create") == [
        {
            "nodes": ["a", "b"],
            "scratch": str(tmp_path / "scr"),
            "scratch-max": 1 << 20,
            "on-cbw-error": "break-guest-write",
            "cbw-timeout": 2.5,
        }
    ]


def test_snapshot_list_shows_a_broken_snapshots_cause(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = SNAPSHOT | {"state": "broken", "cause": "scratch is full", "scratch-max": 1 << 20}
    with fake_qmp(socket_path, x_nbdbackup_query_snapshots=constant([broken])):
        assert main(["snapshot", "list"]) == 0
    out = capsys.readouterr().out
    assert "64K of 1M" in out
    assert "broken: scratch is full" in out


def test_json_prints_the_answer_and_nothing_else(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_qmp(socket_path, x_nbdbackup_query_snapshots=constant([SNAPSHOT])):
        assert main(["snapshot", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [SNAPSHOT]


def test_drop_of_an_unknown_snapshot_exits_with_10(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_qmp(
        socket_path,
        x_nbdbackup_snapshot_drop=refusal("no"),
        x_nbdbackup_query_snapshots=constant([SNAPSHOT]),
    ):
        assert main(["snapshot", "drop", "disk@s2"]) == 10
        assert "no snapshot 'disk@s2'; it has disk@s1" in error_line(capsys)


def test_refused_snapshot_of_a_node_that_exists_exits_with_1(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_qmp(
        socket_path,
        x_nbdbackup_snapshot_create=refusal("snapshot 's1' of 'disk' exists already"),
        query_named_block_nodes=constant([NODE]),
    ):
        assert main(["snapshot", "create", "disk"]) == 1
        assert "nbdbackup: snapshot 's1' of 'disk' exists already" in error_line(capsys)
        assert main(["snapshot", "create", "disk", "disc"]) == 10
        assert "no node 'disc'" in error_line(capsys)


def hook(tmp_path: Path, name: str, status: int = 0) -> str:
    """A command that notes when it ran, and exits with `status`."""
    return f'echo "{name} $NBDBACKUP_NODES $NBDBACKUP_OUTCOME" >> {tmp_path}/log; exit {status}'


def test_hooks_run_before_and_after_the_point_in_time(socket_path: Path, tmp_path: Path) -> None:
    def create(connection: Connection, arguments: Arguments) -> object:
        with (tmp_path / "log").open("a") as log:
            log.write("snapshot\n")
        return [SNAPSHOT]

    hooks = ["--pre-hook", hook(tmp_path, "pre"), "--post-hook", hook(tmp_path, "post")]
    with fake_qmp(socket_path, x_nbdbackup_snapshot_create=create):
        assert main(["snapshot", "create", "a", "b", *hooks]) == 0
    assert (tmp_path / "log").read_text().splitlines() == ["pre a b ", "snapshot", "post a b created"]


def test_failing_pre_hook_means_no_snapshot_and_still_runs_the_post_hook(
    socket_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks = ["--pre-hook", hook(tmp_path, "pre", 3), "--post-hook", hook(tmp_path, "post")]
    with fake_qmp(socket_path) as fake:
        assert main(["snapshot", "create", "a", *hooks]) == 1
    assert fake.calls == []
    assert "no snapshot was made: --pre-hook exited with 3" in error_line(capsys)
    assert (tmp_path / "log").read_text().splitlines() == ["pre a ", "post a failed"]


def test_post_hook_runs_when_the_snapshot_fails(socket_path: Path, tmp_path: Path) -> None:
    hooks = ["--pre-hook", hook(tmp_path, "pre"), "--post-hook", hook(tmp_path, "post")]
    with fake_qmp(
        socket_path,
        x_nbdbackup_snapshot_create=refusal("scratch is full"),
        query_named_block_nodes=constant([{"node-name": "a"}]),
    ):
        assert main(["snapshot", "create", "a", *hooks]) == 1
    assert (tmp_path / "log").read_text().splitlines() == ["pre a ", "post a failed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_post_hook_runs_when_the_command_is_interrupted(
    socket_path: Path, tmp_path: Path, number: signal.Signals
) -> None:
    release = threading.Event()

    def create(connection: Connection, arguments: Arguments) -> object:
        os.kill(os.getpid(), number)
        release.wait(30)
        return [SNAPSHOT]

    hooks = ["--pre-hook", hook(tmp_path, "pre"), "--post-hook", hook(tmp_path, "post")]
    with fake_qmp(socket_path, x_nbdbackup_snapshot_create=create):
        try:
            assert main(["snapshot", "create", "a", *hooks]) == 130
        finally:
            release.set()
    assert (tmp_path / "log").read_text().splitlines() == ["pre a ", "post a failed"]


def test_failing_post_hook_is_a_failure_that_says_the_snapshot_exists(
    socket_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_qmp(socket_path, x_nbdbackup_snapshot_create=constant([SNAPSHOT])):
        assert main(["snapshot", "create", "a", "--post-hook", "exit 5"]) == 1
    assert "the snapshot was made, but --post-hook exited with 5" in error_line(capsys)


def test_hooks_do_not_run_without_a_server(socket_path: Path, tmp_path: Path) -> None:
    assert main(["snapshot", "create", "a", "--pre-hook", hook(tmp_path, "pre")]) == 10
    assert not (tmp_path / "log").exists()


def test_output_of_hooks_stays_out_of_the_result(
    socket_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with fake_qmp(socket_path, x_nbdbackup_snapshot_create=constant([SNAPSHOT])):
        assert main(["snapshot", "create", "a", "--json", "--pre-hook", "echo frozen"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == [SNAPSHOT]
    assert captured.err == "frozen\n"


# node, qmp, completion


def test_node_list_and_info(socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_qmp(
        socket_path,
        query_named_block_nodes=constant([NODE]),
        query_block_exports=constant(
            [{"id": "disk", "type": "nbd", "node-name": "disk", "shutting-down": False}]
        ),
        x_nbdbackup_query_snapshots=constant([SNAPSHOT]),
    ):
        assert main(["node", "list"]) == 0
        assert "disk  1G" in capsys.readouterr().out
        assert main(["node", "info", "disk"]) == 0
        out = capsys.readouterr().out
        assert "1073741824 bytes" in out
        assert "disk@s1" in out
        assert "made of" not in out
        assert main(["node", "info", "disc"]) == 10
        assert "no node 'disc'" in error_line(capsys)
        assert main(["node", "info", "disk", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == NODE


def test_node_info_shows_what_a_filter_is_made_of(
    socket_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cbw = {
        **NODE,
        "node-name": "cbw",
        "drv": "copy-before-write",
        "write_threshold": 4096,
        "children": [
            {"child": "file", "node-name": "disk"},
            {"child": "target", "node-name": "tmp"},
        ],
    }
    with fake_qmp(
        socket_path,
        query_named_block_nodes=constant([cbw]),
        query_block_exports=constant([]),
        x_nbdbackup_query_snapshots=constant([]),
    ):
        assert main(["node", "info", "cbw"]) == 0
        out = capsys.readouterr().out
        assert "made of:   disk (file) tmp (target)" in out
        assert "threshold: 4K" in out


def test_qmp_takes_a_name_or_a_message(socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_qmp(socket_path, query_jobs=constant([]), job_cancel=constant({})) as fake:
        assert main(["qmp", "query-jobs"]) == 0
        assert main(["qmp", '{"execute": "job-cancel", "arguments": {"id": "j"}}']) == 0
    assert fake.calls == [("query-jobs", {}), ("job-cancel", {"id": "j"})]
    assert capsys.readouterr().out == "[]\n{}\n"


def test_qmp_error_shows_class_and_text(socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_qmp(socket_path):
        assert main(["qmp", "frobnicate"]) == 1
    assert "CommandNotFound: The command frobnicate has not been found" in error_line(capsys)


@pytest.mark.parametrize("text", ["{", "{}", '{"execute": 1}', '{"execute": "x", "argument": {}}'])
def test_qmp_message_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["qmp", text]) == 2
    error_line(capsys)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_verb(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "snapshot" in script
    assert "--on-cbw-error" in script
    interpreter = shutil.which(shell)
    if interpreter is not None:
        subprocess.run([interpreter, "-n"], input=script, text=True, check=True, timeout=30)
