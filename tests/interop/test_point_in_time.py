"""The main job as a user sees it, under load: pull and push of one point in time, two disks in one instant.

Each runs at a modest size, and at 2 GiB as a slow variant.
"""

import random
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, make_sparse, sha256
from tests.support.peers import require
from tests.support.processes import run, wait_until
from tests.support.raw_client import CMD_READ, CMD_WRITE, RawClient
from tests.support.server import Server

sizes = pytest.mark.parametrize(
    "size",
    [
        pytest.param(128 * MIB, id="128m"),
        pytest.param(2048 * MIB, id="2g", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
LONG_S = 600.0


@contextmanager
def fio_writes(server: Server, directory: Path, size: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Random 4 KiB writes at depth 16, without end."""
    command = [
        *(require("fio"), "--name=writer", "--ioengine=nbd", f"--uri={server.uri('disk')}"),
        *("--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={size}", "--time_based", "--runtime=3600"),
        *("--randrepeat=0", "--norandommap", "--thread", f"--output={directory / 'fio.out'}"),
    ]
    before = server.sources["disk"].stat().st_mtime_ns
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: server.sources["disk"].stat().st_mtime_ns != before, "fio writes")
            yield process
            assert process.poll() is None, "the writer ended early"
        finally:
            process.kill()


@sizes
def test_two_pulls_of_a_view_are_identical_while_a_client_writes(
    tmp_path: Path, serve: ServeFunction, size: int
) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", size))
    hashes: list[str] = []
    with fio_writes(server, tmp_path, size):
        server.cli("snapshot", "create", "disk", "--name", "s1")
        for pull in (tmp_path / "pull1.img", tmp_path / "pull2.img"):
            run(require("qemu-img"), "convert", "-O", "raw", server.uri("disk@s1"), pull, timeout_s=LONG_S)
            hashes.append(sha256(pull))
            pull.unlink()
        server.cli("backup", "disk", str(tmp_path / "push.img"), timeout_s=LONG_S)
    assert hashes[0] == hashes[1]
    assert (tmp_path / "push.img").stat().st_size == size
    assert not (tmp_path / "push.img.partial").exists()


class PacedWriter:
    """Writes random blocks over NBD at a depth of 16; pauses with nothing in flight, and goes on."""

    def __init__(self, server: Server, size: int) -> None:
        self._server = server
        self._size = size
        self._may_write = threading.Event()
        self._is_quiet = threading.Event()
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self.batches = 0

    def __enter__(self) -> "PacedWriter":
        self._may_write.set()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._may_write.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def pause(self) -> None:
        """On return every write was answered and no other comes before `go_on`."""
        self._is_quiet.clear()
        self._may_write.clear()
        assert self._is_quiet.wait(60)

    def go_on(self) -> None:
        """Write again."""
        self._may_write.set()

    def wait_for_batches(self, count: int) -> None:
        """Wait until so many more batches of 16 writes were answered."""
        wanted = self.batches + count
        wait_until(lambda: self.batches >= wanted or self._failure is not None, "the writer writes")

    def _run(self) -> None:
        try:
            generator = random.Random(7)
            with RawClient(self._server) as client:
                client.go("disk")
                while not self._ended.is_set():
                    if not self._may_write.is_set():
                        self._is_quiet.set()
                        self._may_write.wait(60)
                        continue
                    for cookie in range(16):
                        offset = generator.randrange(0, self._size - 20000)
                        length = generator.randrange(1, 20000)
                        client.request(CMD_WRITE, offset, length, generator.randbytes(length), cookie=cookie)
                    for _ in range(16):
                        assert client.simple_reply().error == 0
                    self.batches += 1
        except BaseException as error:
            self._failure = error
            self._is_quiet.set()


@sizes
@pytest.mark.parametrize("scratch", ["none", "auto", "dir"])
def test_pull_and_push_equal_the_disk_at_the_moment_of_the_point_in_time(
    tmp_path: Path, serve: ServeFunction, size: int, scratch: str
) -> None:
    disk = make_disk(tmp_path / "disk.img", size)
    push, pull = tmp_path / "push.img", tmp_path / "pull.img"
    server = serve(disk=disk)
    where = str(tmp_path) if scratch == "dir" else scratch
    with PacedWriter(server, size) as writer:
        writer.wait_for_batches(5)
        writer.pause()
        # A rate that leaves most of the disk to be copied while the writer writes again.
        rate = str(size // 300)
        job = ("--job-id", "push", "--no-wait", "-r", rate, "--scratch", where)
        server.cli("backup", "disk", str(push), *job)
        server.cli("snapshot", "create", "disk", "--name", "s")
        reference = sha256(disk)
        writer.go_on()
        writer.wait_for_batches(20)
        server.cli("job", "set-speed", "push", "0")
        run(require("qemu-img"), "convert", "-O", "raw", server.uri("disk@s"), pull, timeout_s=LONG_S)
        server.cli("job", "watch", "push", timeout_s=LONG_S)
    assert sha256(push) == reference
    assert sha256(pull) == reference
    assert sha256(disk) != reference


def test_two_disks_of_one_snapshot_share_one_instant(tmp_path: Path, serve: ServeFunction) -> None:
    """A counter is written to a, and after its reply to b: no view may show b ahead of a."""
    server = serve({"a": make_sparse(tmp_path / "a.img", MIB), "b": make_sparse(tmp_path / "b.img", MIB)})
    stop = threading.Event()
    written: list[int] = [0]

    def count() -> None:
        with RawClient(server) as a, RawClient(server) as b:
            a.go("a")
            b.go("b")
            while not stop.is_set():
                value = written[0] + 1
                for client in (a, b):
                    client.request(CMD_WRITE, 4096, 8, struct.pack(">Q", value))
                    assert client.simple_reply().error == 0
                written[0] = value

    thread = threading.Thread(target=count)
    thread.start()
    try:
        seen: list[tuple[int, int]] = []
        for number in range(12):
            before = written[0]
            wait_until(lambda start=before: written[0] > start + 10, "the counter moves")  # type: ignore[misc]
            server.cli("snapshot", "create", "a", "b", "--name", f"s{number}")
            seen.append((_counter(server, f"a@s{number}"), _counter(server, f"b@s{number}")))
            server.cli("snapshot", "drop", f"a@s{number}", f"b@s{number}")
    finally:
        stop.set()
        thread.join(60)
    assert all(b <= a <= b + 1 for a, b in seen), seen
    assert seen == sorted(seen)
    assert seen[-1][0] > seen[0][0]


def _counter(server: Server, export: str) -> int:
    with RawClient(server) as client:
        client.go(export)
        client.request(CMD_READ, 4096, 8)
        value: int = struct.unpack(">Q", client.simple_reply(8).data)[0]
        return value


@sizes
def test_killing_clients_and_the_command_line_harms_nobody(
    tmp_path: Path, serve: ServeFunction, size: int
) -> None:
    disk = make_disk(tmp_path / "disk.img", size)
    server = serve(disk=disk)
    with RawClient(server) as idle:
        idle.go("disk")
        # What is made once and kept is there after the first snapshot.
        server.cli("snapshot", "create", "disk", "--name", "first")
        server.cli("snapshot", "drop", "disk@first")
        memory, descriptors = server.rss_bytes(), server.descriptors()
        server.cli("snapshot", "create", "disk", "--name", "s")
        before = sha256(disk)

        with fio_writes(server, tmp_path, size):
            pull = ("convert", "-r", "64M", "-O", "raw", server.uri("disk@s"))
            puller = subprocess.Popen([require("qemu-img"), *pull, str(tmp_path / "killed.img")])
            wait_until(lambda: (tmp_path / "killed.img").exists(), "the pull has begun")
            puller.kill()
            puller.wait(30)
            run(require("qemu-img"), *pull, tmp_path / "pull.img", timeout_s=LONG_S)
        # leaving the block has killed the writer with -9
        assert sha256(tmp_path / "pull.img") == before

        killed = subprocess.Popen(
            server.cli_command(
                "backup", "disk", str(tmp_path / "detached.img"), "--job-id", "k", "-r", str(size // 20)
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        wait_until(lambda: (tmp_path / "detached.img.partial").exists(), "the backup has begun")
        killed.kill()
        killed.wait(30)
        server.cli("job", "set-speed", "k", "0")
        # The job goes on by itself; nobody is left to watch it.
        wait_until((tmp_path / "detached.img").exists, "the backup is complete", timeout_s=LONG_S)
        assert sha256(tmp_path / "detached.img") == sha256(disk)

        server.cli("snapshot", "drop", "disk@s")
        assert server.snapshots() == []
        wait_until(lambda: server.descriptors() <= descriptors, "every descriptor is given up")
        assert not [
            path for path in server.state_dir.rglob("*") if path.is_file() and path.stat().st_blocks > 64
        ]
        assert server.rss_bytes() - memory < 64 * MIB


def test_interrupting_a_backup_cancels_its_job_and_removes_the_target(
    tmp_path: Path, serve: ServeFunction
) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", 32 * MIB))
    target = tmp_path / "push.img"
    command = server.cli_command("backup", "disk", str(target), "-r", "1M")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as backup:
        wait_until(lambda: target.with_name("push.img.partial").exists(), "the backup has begun")
        backup.send_signal(signal.SIGINT)
        assert backup.wait(60) == 130
    assert not target.exists()
    wait_until(lambda: not target.with_name("push.img.partial").exists(), "the unfinished target is removed")
    wait_until(lambda: "[]" in server.cli("job", "list", "--json").stdout, "the job is gone")
