"""SIGTERM ends the server in time, with clients that do not read and with disks that do not answer."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import MIB, make_disk, make_sparse
from tests.support.foreign_servers import ForeignServer, nbdkit
from tests.support.processes import wait_until
from tests.support.raw_client import CMD_READ, CMD_WRITE, RawClient
from tests.support.server import Server

LIMIT_S = 8.0
SLACK_S = 12.0
PATIENCE_S = 10.0
"""With a client that leaves its replies unread."""


@pytest.fixture
def remote() -> Iterator[ForeignServer]:
    with ForeignServer(nbdkit("memory", "16M")) as server:
        yield server
        os.kill(server.process.pid, signal.SIGCONT)


def stopped(server: Server, limit_s: float) -> int:
    """The status that SIGTERM ends it with, in `limit_s` and a little."""
    server._ended_by_test = True
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    status = server.process.wait(limit_s + SLACK_S)
    print(f"ended with status {status} after {time.monotonic() - begun:.1f} s")
    assert "Traceback" not in server.log()
    return status


@pytest.mark.parametrize("in_flight", [0, 3])
def test_disk_that_hangs_holds_up_the_end_no_longer_than_the_limit(
    tmp_path: Path, remote: ForeignServer, in_flight: int
) -> None:
    # A URI is no path, but what the harness does with a source is to write it behind NAME=.
    sources = {"local": make_disk(tmp_path / "disk.img", MIB), "hung": remote.uri()}
    options = ["--stop-timeout", f"{LIMIT_S:g}", "--pid-file", str(tmp_path / "pid")]
    with Server(sources, options) as server:  # type: ignore[arg-type]
        with RawClient(server) as local, RawClient(server) as hung:
            for client, export in ((local, "local"), (hung, "hung")):
                client.go(export)
                client.request(CMD_WRITE, 0, 512, b"x" * 512)
                assert client.simple_reply().error == 0
            os.kill(remote.process.pid, signal.SIGSTOP)
            for cookie in range(in_flight):
                hung.request(CMD_READ, 0, 4096, cookie=cookie)
            # Refused without the disk, so that the answer says that the others are under way.
            hung.request(CMD_READ, 1 << 40, 4096, cookie=77)
            assert hung.simple_reply().cookie == 77
            assert stopped(server, LIMIT_S) == 1
        (line,) = [line for line in server.log().splitlines() if "abandoned" in line]
        assert "the flush of hung, which may lose what was written to it (no answer)" in line
        assert ("3 requests of clients of hung" in line) == (in_flight == 3)
        assert "local" not in line
        assert not server.control.exists()
        assert not (tmp_path / "pid").exists()


def test_disk_that_is_slow_and_not_hung_is_flushed_and_nothing_abandoned(tmp_path: Path) -> None:
    with (
        ForeignServer(nbdkit("--filter=delay", "memory", "16M", "wdelay=1")) as remote,
        Server({"slow": remote.uri()}) as server,  # type: ignore[dict-item]
    ):
        with RawClient(server) as client:
            client.go("slow")
            client.request(CMD_WRITE, 0, 512, b"x" * 512)
            wait_until(lambda: "uses export slow" in server.log(), "the client is known")
            assert stopped(server, 30) == 0
            assert client.simple_reply().error == 0
        assert "abandoned" not in server.log()


def test_flush_that_fails_at_the_end_is_told_and_changes_the_status(tmp_path: Path) -> None:
    shell = ("get_size=echo 1M", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null")
    flush = "flush=echo ENOSPC full >&2; exit 1"
    with (
        ForeignServer(nbdkit("eval", *shell, flush)) as remote,
        Server({"full": remote.uri(), "disk": make_disk(tmp_path / "disk.img", MIB)}) as server,  # type: ignore[dict-item]
    ):
        with RawClient(server) as client:
            client.go("full")
            client.request(CMD_WRITE, 0, 512, b"x" * 512)
            assert client.simple_reply().error == 0
        assert stopped(server, 10) == 1
        line = server.log().splitlines()[-1]
        assert line.startswith(f"nbdbackup: writes to {remote.uri()} may be lost: it failed to flush")


def test_program_of_run_that_ignores_the_end_holds_it_up_no_longer(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    ready = tmp_path / "ready"
    command = f"trap '' TERM; echo $$ >{ready}.new; mv {ready}.new {ready}; exec tail -f /dev/null"
    with Server({"disk": disk}, ["--stop-timeout", "2", "--run", command]) as server:
        wait_until(ready.exists, "the program runs")
        try:
            assert stopped(server, 2) == 1
        finally:
            os.kill(int(ready.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_client_that_leaves_its_replies_unread_is_left_after_ten_seconds(
    tmp_path: Path, transport: str
) -> None:
    with Server({"disk": make_sparse(tmp_path / "disk.img", 64 * MIB)}) as server:
        with RawClient(server, transport) as client:
            client.go("disk")
            for cookie in range(8):
                client.request(CMD_READ, 0, 32 * MIB, cookie=cookie)
            # So much that it cannot all be in the socket; its beginning is there.
            client.receive(16)
            assert stopped(server, PATIENCE_S) == 0
        assert "abandoned" not in server.log()
