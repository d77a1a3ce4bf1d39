"""A large push under load: killed, started again, resumed; what was copied twice is printed."""

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, allocated_bytes, make_disk, make_sparse, sha256
from tests.support.foreign_servers import ForeignServer, nbdkit
from tests.support.peers import require
from tests.support.processes import wait_until
from tests.support.pushes import jobs, progress, rest_of, restarted
from tests.support.qmp import execute
from tests.support.server import Server

SIZE = 2048 * MIB
SPEED = 128 * MIB
WAIT_S = 300.0
COPIED_TWICE_MAX = 160 * MIB
"""What waits for a flush, 64 MiB or 5 s, and what was in flight; with room for a slow machine."""


@contextmanager
def load(server: Server) -> Iterator[None]:
    """fio writes at random until the block ends; it may lose its server."""
    fio = subprocess.Popen(
        [
            *(
                require("fio"),
                "--ioengine=nbd",
                f"--uri={server.uri('disk')}",
                "--name=load",
                "--rw=randwrite",
            ),
            *("--bs=4k", "--iodepth=16", f"--size={SIZE}", "--time_based", "--runtime=600"),
            *("--randrepeat=0", "--rate_iops=2000", "--thread"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        # Asked nicely, it may wait for a server that is gone.
        fio.kill()
        fio.wait(60)


def push_until_killed(server: Server, target: str) -> None:
    """Push to `target` under load until half of it is done, and kill the server."""
    words = {"node": "disk", "target": target, "sync": "full", "job_id": "j", "speed": SPEED}
    execute(server, "x-nbdbackup-backup", **words)
    with load(server):
        wait_until(lambda: progress(server) > SIZE // 2, "half of it", WAIT_S)
        server.kill()


def resume_until_over(server: Server) -> int:
    """Start the server again, and let the job come to its end under load; how much was done before."""
    restarted(server)
    assert jobs(server)["j"]["status"] == "paused"
    done = progress(server)
    with load(server):
        execute(server, "block-job-set-speed", device="j", speed=0)
        execute(server, "job-resume", id="j")
        wait_until(lambda: "j" not in jobs(server), "the end of the job", WAIT_S)
    return done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_direct_push_of_2_gib_is_whole_and_little_was_copied_twice(
    tmp_path: Path, serve: ServeFunction
) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    expected = sha256(disk)
    server = serve(disk=disk, tcp=False)
    target = tmp_path / "target.img"
    push_until_killed(server, str(target))
    written = allocated_bytes(Path(f"{target}.partial"))
    done = resume_until_over(server)
    twice = written - done
    print(f"killed after {done} of {SIZE} bytes; {twice} bytes were copied twice, {SIZE - done} afterwards")
    assert 0 <= twice < COPIED_TWICE_MAX
    assert sha256(target) == expected
    assert rest_of(server) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_remote_push_of_2_gib_is_whole_and_little_was_copied_twice(
    tmp_path: Path, serve: ServeFunction
) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    expected = sha256(disk)
    image = make_sparse(tmp_path / "target.img", SIZE)
    statistics = tmp_path / "stats"
    server = serve(disk=disk, tcp=False)
    with ForeignServer(nbdkit("--filter=stats", "file", image, f"statsfile={statistics}")) as remote:
        push_until_killed(server, remote.uri())
        done = resume_until_over(server)
        assert sha256(image) == expected
        assert rest_of(server) == []
        server.stop()
        remote.process.send_signal(signal.SIGTERM)
        remote.process.wait(60)
    twice = written_bytes(statistics.read_text()) - SIZE
    print(f"killed after {done} of {SIZE} bytes were safe; {twice} bytes were copied twice")
    assert 0 <= twice < COPIED_TWICE_MAX


def written_bytes(statistics: str) -> int:
    """How much the filter counted of writes, to a MiB or so."""
    units = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    found = re.search(r"^write: \d+ ops, [\d.]+ s, ([\d.]+) (\w+)", statistics, re.MULTILINE)
    assert found is not None, statistics
    return int(float(found[1]) * units[found[2]])
