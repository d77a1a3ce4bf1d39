"""`serve`: from arguments to ServeOptions, and what is refused as wrong usage."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdbackup import daemon
from nbdbackup.cli.main import build_parser, main
from nbdbackup.cli.serve import serve_options
from nbdbackup.daemon import ServeOptions, SourceSpec, TcpAddress, TlsOptions, UnixAddress
from nbdbackup.errors import ConflictError, NotFoundError, UsageError


def options_of(*arguments: str) -> ServeOptions:
    return serve_options(build_parser(["serve"]).parse_args(["serve", *arguments]))


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `arguments` get, with exit status 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nbdbackup: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("argument", "name", "path"),
    [
        ("/d/vm.img", "vm", "/d/vm.img"),
        ("disk=/d/vm.img", "disk", "/d/vm.img"),
        ("/d/a=b.img", "a=b", "/d/a=b.img"),
        ("disk=/d/a=b.img", "disk", "/d/a=b.img"),
        ("/dev/vdb", "vdb", "/dev/vdb"),
        ("/d/archive.tar.gz", "archive.tar", "/d/archive.tar.gz"),
    ],
)
def test_node_is_named_as_given_or_after_the_file(argument: str, name: str, path: str) -> None:
    assert options_of(argument).sources == (SourceSpec(name, path),)


@pytest.mark.parametrize(
    ("argument", "name", "uri"),
    [
        ("nbd://host/disk", "disk", "nbd://host:10809/disk"),
        ("root=nbd://host:1/disk", "root", "nbd://host:1/disk"),
        ("nbd+unix:///disk?socket=/s", "disk", "nbd+unix:///disk?socket=/s"),
        ("d=nbd+unix:///?socket=run/s", "d", f"nbd+unix:///?socket={os.getcwd()}/run/s"),
    ],
)
def test_remote_source_is_named_as_given_or_as_there(argument: str, name: str, uri: str) -> None:
    assert options_of(argument).sources == (SourceSpec(name, uri),)


def test_export_name_option_names_a_single_source() -> None:
    assert options_of("-x", "disk", "/d/vm.img").sources == (SourceSpec("disk", "/d/vm.img"),)


def test_credentials_alone_require_tls_and_a_list_of_names_wants_certificates() -> None:
    here = Path.cwd()
    assert options_of("/x").tls is None
    assert options_of("--tls", "off", "/x").tls is None
    assert options_of("--tls-creds", "d", "/x").tls == TlsOptions(True, here / "d")
    assert options_of("--tls-psk", "f", "/x").tls == TlsOptions(True, keys=here / "f")
    named = options_of("--tls-creds", "d", "--tls-authz", "CN=a", "--tls-authz", "CN=b", "/x").tls
    assert named == TlsOptions(True, here / "d", verify_peer=True, authorised=("CN=a", "CN=b"))
    listed = options_of("--tls-creds", "d", "--tls-authz-file", "n", "/x").tls
    assert listed == TlsOptions(True, here / "d", verify_peer=True, authorised_file=here / "n")
    offered = options_of("--tls", "on", "--tls-creds", "d", "--tls-only", "x", "/x", "/y")
    assert offered.tls == TlsOptions(False, here / "d")
    assert offered.tls_only == {"x"}


def test_paths_are_absolute_so_that_fork_may_change_directory() -> None:
    options = options_of("vm.img", "-k", "s", "--control", "c", "--state-dir", "st", "--pid-file", "p")
    here = Path.cwd()
    assert options.sources[0].path == str(here / "vm.img")
    assert options.listeners == (UnixAddress(str(here / "s")),)
    assert (options.control, options.state_dir, options.pid_file) == (here / "c", here / "st", here / "p")


@pytest.mark.parametrize(
    ("arguments", "listeners"),
    [
        ([], [TcpAddress("127.0.0.1", 10809)]),
        (["-p", "0"], [TcpAddress("127.0.0.1", 0)]),
        (["-b", "::1"], [TcpAddress("::1", 10809)]),
        (["-k", "/s"], [UnixAddress("/s")]),
        (["-k", "/s", "-p", "1"], [UnixAddress("/s"), TcpAddress("127.0.0.1", 1)]),
        (["-k", "/s", "-b", "::1"], [UnixAddress("/s"), TcpAddress("::1", 10809)]),
    ],
)
def test_unix_socket_replaces_tcp_unless_an_address_or_port_is_given(
    arguments: list[str], listeners: list[TcpAddress | UnixAddress]
) -> None:
    assert list(options_of("/d/vm.img", *arguments).listeners) == listeners


def test_no_more_than_a_millisecond_of_polling_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert options_of("/x").poll_max_us == 32
    assert options_of("--poll-max-us", "0", "/x").poll_max_us == 0
    for wrong in ("1001", "-1", "x"):
        assert "--poll-max-us" in usage_error(capsys, "serve", f"--poll-max-us={wrong}", "/x")


def test_without_a_source_there_is_no_listener_but_what_is_asked_for() -> None:
    assert options_of("--control", "/c").listeners == ()
    assert options_of("--control", "/c", "-k", "/s").listeners == (UnixAddress("/s"),)
    assert options_of("--control", "/c", "-p", "0").listeners == (TcpAddress("127.0.0.1", 0),)


def test_format_raw_is_passed_on_and_not_guessed() -> None:
    assert options_of("-f", "raw", "/d/vm.img").sources[0].format == "raw"
    assert options_of("/d/vm.img").sources[0].format is None


def test_control_socket_is_found_by_option_then_environment_then_runtime_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert options_of("--control", "/c", "/d").control == Path("/c")
    monkeypatch.setenv("NBDBACKUP_CONTROL", "/e")
    assert options_of("/d").control == Path("/e")
    monkeypatch.delenv("NBDBACKUP_CONTROL")
    assert options_of("/d").control == Path("/run/user/7/nbdbackup/control.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert options_of("/d").control == Path("/run/nbdbackup/control.sock")


def test_state_directory_is_found_by_option_then_environment_then_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert options_of("--state-dir", "/s", "/d").state_dir == Path("/s")
    assert options_of("/d").state_dir == Path("/x/nbdbackup")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert options_of("/d").state_dir == Path("/var/lib/nbdbackup")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/u")
    assert options_of("/d").state_dir == Path("/home/u/.local/state/nbdbackup")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-f", "qcow2", "/d"], "this version does not do format 'qcow2' yet"),
        (["d=http://host/disk"], "the scheme must be one of nbd"),
        (["d=nbd+unix:///disk"], "nbd+unix needs ?socket=PATH"),
        (["nbd://host"], "'' cannot be a NAME"),
        (["--reconnect-delay", "-1", "/x"], "not a time in seconds"),
        (["a=/x", "a=/y"], "two sources are called 'a'"),
        (["/x/vm.img", "/y/vm.img"], "two sources are called 'vm'"),
        (["-x", "n", "/x", "/y"], "NAME=SOURCE for each"),
        (["-x", "n", "m=/y"], "contradict"),
        (["=/x"], "empty NAME"),
        (["--allow", "10.0.0.0/40", "/x"], "'10.0.0.0/40' is no address range"),
        (["--read-only-export", "y", "x=/x"], "no SOURCE is called so, only x"),
        (["n="], "names no file"),
        (["n@1=/x"], "cannot be a NAME"),
        (["-x", "../n", "/x"], "cannot be a NAME"),
        (["-x", "n" * 256, "/x"], "at most 255 bytes"),
        (["-p", "65536", "/x"], "not a TCP port"),
        (["-p", "http", "/x"], "not a whole number"),
        (["-e", "-1", "/x"], "not a whole number"),
        (["-k", "/" + "s" * 108, "/x"], "Unix socket has 1 to 107 bytes"),
        (["--control", "/" + "s" * 108, "/x"], "Unix socket has 1 to 107 bytes"),
        (["-t", "--exit-on-last", "/x"], "contradict"),
        (["--fork", "--run", "true", "/x"], "contradict"),
        (["-D", "d" * 4097, "/x"], "at most 4096 bytes"),
        (["--discard", "maybe", "/x"], "invalid choice"),
        (["--tls", "on", "/x"], "--tls on needs --tls-creds DIR or --tls-psk FILE"),
        (["--tls", "require", "/x"], "--tls require needs --tls-creds DIR or --tls-psk FILE"),
        (["--tls", "off", "--tls-creds", "d", "/x"], "contradict"),
        (["--tls-creds", "d", "--tls-psk", "f", "/x"], "contradict"),
        (["--tls-verify-peer", "/x"], "need --tls-creds DIR"),
        (["--tls-authz", "CN=a", "/x"], "need --tls-creds DIR"),
        (["--tls-psk", "f", "--tls-verify-peer", "/x"], "--tls-psk goes without"),
        (["--tls-psk", "f", "--tls-authz-file", "n", "/x"], "--tls-psk goes without"),
        (["--tls-only", "x", "/x"], "--tls-only needs --tls on"),
        (["--tls", "on", "--tls-creds", "d", "--tls-only", "y", "/x"], "no source is called that"),
        (["--cache", "none", "/x"], "unrecognized arguments: --cache"),
        ([], "no SOURCE: name a disk to serve, or give --control"),
        (["-k", "/s"], "no SOURCE: name a disk to serve, or give --control"),
        (["--control", "/c", "--fork"], "--fork needs a SOURCE"),
        (["--control", "/c", "--run", "true"], "--run needs a SOURCE"),
        (["--control", "/c", "-x", "n"], "--export-name needs a SOURCE"),
    ],
)
def test_contradictory_or_unknown_arguments_are_a_usage_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert told in usage_error(capsys, "serve", *arguments)


def serving(monkeypatch: pytest.MonkeyPatch, outcome: int | Exception) -> list[ServeOptions]:
    """Make the daemon end with `outcome`; the options that it will have been started with."""
    served: list[ServeOptions] = []

    async def serve(options: ServeOptions) -> int:
        served.append(options)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(daemon, "serve", serve)
    return served


def test_exit_status_is_the_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving(monkeypatch, 7)
    assert main(["serve", "-r", "-e", "3", "--discard", "ignore", "-D", "text", "/d"]) == 7
    assert (served[0].read_only, served[0].clients_max) == (True, 3)
    assert (served[0].discard, served[0].description) == ("ignore", "text")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (NotFoundError("/d: no such file"), 1, "/d: no such file"),
        (ConflictError("/d is locked"), 1, "/d is locked"),
        (UsageError("no"), 2, "no"),
        (PermissionError(13, "Permission denied", "/d"), 1, "/d: Permission denied"),
        (ExceptionGroup("several", [ConflictError("port in use")]), 1, "port in use"),
        (RuntimeError("odd"), 1, "internal error: RuntimeError: odd"),
    ],
)
def test_failure_to_serve_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    told: str,
) -> None:
    serving(monkeypatch, error)
    assert main(["serve", "/d"]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(f"nbdbackup: {told}")
    assert captured.err.count("\n") == 1


def test_verbose_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serving(monkeypatch, RuntimeError("odd"))
    assert main(["serve", "-v", "/d"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_json_log_is_one_object_per_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(options: ServeOptions) -> int:
        logging.getLogger("nbdbackup.server").warning('client "%s"\nleft', "c1")
        return 0

    monkeypatch.setattr(daemon, "serve", serve)
    assert main(["serve", "--log-format", "json", "/d"]) == 0
    record = json.loads(capsys.readouterr().err)
    assert record["level"] == "warning"
    assert record["message"] == 'client "c1"\nleft'
    assert record["time"].endswith("Z")


FORKING = """
import asyncio, os, sys
from nbdbackup.cli.fork import run_detached

def run():
    async def serve():
        {before}
        print("listening on nbd://one", flush=True)
        print("listening on nbd://two", flush=True)
        await asyncio.sleep(0.01)
        print("too late to be seen", flush=True)
        print("nor this", file=sys.stderr, flush=True)
        open({session!r}, "w").write(str(os.getsid(0)) + " " + str(os.getpid()))
    asyncio.run(serve())
    return 0

sys.exit(run_detached(run))
"""


def fork(tmp_path: Path, before: str) -> subprocess.CompletedProcess[str]:
    """Run a detached server that runs `before` when it starts; `session` gets its session and process id."""
    session = tmp_path / "session"
    os.mkfifo(session)
    script = FORKING.format(before=before, session=str(session))
    # Both ends: opening a FIFO for reading alone would wait for the writer, should there be none.
    with open(os.open(session, os.O_RDWR), "rb", buffering=0) as reader:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
        if done.returncode == 0:
            leader, process = reader.read(100).split()
            assert leader == process, "the server leads a session of its own"
    return done


def test_fork_passes_on_the_ready_lines_and_detaches(tmp_path: Path) -> None:
    done = fork(tmp_path, "pass")
    # That run() returned at all shows that the server keeps neither of the pipes open.
    assert done.returncode == 0
    assert done.stdout == "listening on nbd://one\nlistening on nbd://two\n"
    assert done.stderr == ""


def test_fork_gives_the_status_of_a_server_that_fails_to_start(tmp_path: Path) -> None:
    done = fork(tmp_path, "print('nbdbackup: port in use', file=sys.stderr); sys.stderr.flush(); os._exit(4)")
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr == "nbdbackup: port in use\n"


def test_files_that_a_remote_source_names_are_absolute_too() -> None:
    here = Path.cwd()
    (source,) = options_of("d=nbds+unix:///x?socket=s&tls-certificates=pki").sources
    assert source.path == f"nbds+unix:///x?socket={here}/s&tls-certificates={here}/pki"
