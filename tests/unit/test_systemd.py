"""Sockets from a service manager, and what it is told."""

import asyncio
import configparser
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdbackup.cli.main import build_parser
from nbdbackup.cli.serve import serve_options
from nbdbackup.daemon import InheritedSocket
from nbdbackup.daemon.systemd import keep_notifying, notify, take_inherited_sockets, watchdog_interval_s
from nbdbackup.errors import UsageError

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 30.0


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket that is told how things are."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(LIMIT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def environment(**more: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "PATH": "/bin", **more}


def test_inherited_sockets_begin_at_descriptor_3_and_have_names() -> None:
    given = environment(LISTEN_FDS="3", LISTEN_FDNAMES="a:b")
    assert take_inherited_sockets(given) == (
        InheritedSocket(3, "a"),
        InheritedSocket(4, "b"),
        InheritedSocket(5, ""),
    )
    assert given == {"PATH": "/bin"}, "a child would take them for its own"


def test_sockets_for_another_process_are_not_ours() -> None:
    assert take_inherited_sockets(environment(LISTEN_FDS="1", LISTEN_PID="1")) == ()
    assert take_inherited_sockets(environment()) == ()


@pytest.mark.parametrize("count", ["0", "-1", "x", "1000", "\u0663"])
def test_senseless_number_of_sockets_is_refused(count: str) -> None:
    with pytest.raises(UsageError, match="LISTEN_FDS"):
        take_inherited_sockets(environment(LISTEN_FDS=count))


@pytest.mark.parametrize("option", [["-b", "::1"], ["-p", "0"], ["-k", "/s"], ["--fork"]])
def test_listening_options_contradict_inherited_sockets(
    monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    with pytest.raises(UsageError, match="contradicts LISTEN_FDS"):
        serve_options(build_parser(["serve"]).parse_args(["serve", "/d", *option]))


def test_inherited_sockets_are_the_listeners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    options = serve_options(build_parser(["serve"]).parse_args(["serve", "/d"]))
    assert options.listeners == (InheritedSocket(3, ""),)


def test_manager_is_told(manager: socket.socket) -> None:
    notify("READY=1")
    assert manager.recv(1000) == b"READY=1"


def test_manager_that_does_not_read_holds_up_nobody(manager: socket.socket) -> None:
    for _ in range(2000):
        notify("STATUS=" + "x" * 1000)


@pytest.mark.parametrize(
    ("allowed", "process", "expected"),
    [("2000000", "", 1.0), ("2000000", "me", 1.0), ("2000000", "1", None), ("0", "", None), ("x", "", None)],
)
def test_sign_of_life_is_given_twice_in_the_time_allowed(
    monkeypatch: pytest.MonkeyPatch, allowed: str, process: str, expected: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", allowed)
    monkeypatch.setenv("WATCHDOG_PID", process.replace("me", str(os.getpid())))
    assert watchdog_interval_s() == expected


async def test_status_and_signs_of_life_go_on(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    task = asyncio.create_task(keep_notifying(lambda: "Serving"))
    for _ in range(3):
        assert await asyncio.to_thread(manager.recv, 1000) == b"STATUS=Serving\nWATCHDOG=1"
    task.cancel()


def test_whole_service_life_is_told(manager: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        # The descriptor must be 3, and LISTEN_PID the process itself: a shell that becomes it knows both.
        script = (
            f"exec 3<&{listening.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 WATCHDOG_USEC=100000 "
            f"exec {sys.executable} -m nbdbackup serve --control {tmp_path}/c --state-dir {tmp_path}/st "
            f"disk={tmp_path}/disk.img"
        )
        process = subprocess.Popen(
            ["bash", "-c", script],
            pass_fds=[listening.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        try:
            told = [manager.recv(1000)]
            while not told[-1].endswith(b"WATCHDOG=1"):
                told.append(manager.recv(1000))
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(LIMIT_S)
                client.connect(str(tmp_path / "s"))
                assert client.recv(8) == b"NBDMAGIC"
            process.terminate()
            while told[-1] != b"STOPPING=1":
                told.append(manager.recv(1000))
            output, log = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
            process.wait()
    assert told[0] == b"READY=1"
    assert told[1] == b"STATUS=Serving 1 export to 0 clients\nWATCHDOG=1"
    assert process.returncode == 0, log
    assert output == b"", "standard output may belong to whoever opened the sockets"
    assert (tmp_path / "s").exists(), "the socket is not ours to remove"


UNITS = ("nbdbackup.service", "nbdbackup.socket")


def test_unit_files_install_with_the_package_and_are_well_formed(tmp_path: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    shared = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    for unit in UNITS:
        assert shared[f"systemd/{unit}"] == f"lib/systemd/system/{unit}"
        parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read(REPOSITORY / "systemd" / unit)
        assert parser["Unit"]["Description"]
    if (analyze := shutil.which("systemd-analyze")) is not None:
        program = tmp_path / "nbdbackup"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        for unit in UNITS:
            text = (REPOSITORY / "systemd" / unit).read_text()
            (tmp_path / unit).write_text(text.replace("ExecStart=nbdbackup", f"ExecStart={program}"))
        checked = subprocess.run(
            [analyze, "verify", "--man=no", *(str(tmp_path / unit) for unit in UNITS)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        ours = [line for line in checked.stderr.splitlines() if "nbdbackup" in line]
        assert ours == []
