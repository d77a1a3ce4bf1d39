"""fio's nbd engine verifies with crc32c what it wrote, while snapshots come and go."""

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_sparse
from tests.support.peers import require
from tests.support.server import Server


def fio_command(uri: str, size: int, jobs: int) -> list[str]:
    """Write everything in random order at depth 32 and verify it; each job has a part of its own."""
    part = size // jobs
    return [
        *(require("fio"), "--output-format=json", "--ioengine=nbd", f"--uri={uri}", "--name=verify"),
        *(f"--numjobs={jobs}", f"--size={part}", f"--offset_increment={part}", "--iodepth=32"),
        *("--rw=randrw", "--bsrange=4k-64k", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=512"),
        *("--do_verify=1", "--fsync=256", "--group_reporting"),
    ]


@contextmanager
def snapshots_that_come_and_go(server: Server) -> Iterator[list[str]]:
    """Create and drop snapshots for as long as the block runs; the list has those that have gone again."""
    stop = threading.Event()
    gone: list[str] = []
    failures: list[BaseException] = []

    def churn() -> None:
        try:
            while not stop.is_set():
                for name in ("one", "two"):
                    server.cli("snapshot", "create", "disk", "--name", name)
                for name in ("one", "two"):
                    server.cli("snapshot", "drop", f"disk@{name}")
                    gone.append(name)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        yield gone
    finally:
        stop.set()
        thread.join(120)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize(
    ("size", "transport"),
    [
        pytest.param(384 * MIB, "unix", id="unix"),
        pytest.param(384 * MIB, "tcp", id="tcp"),
        pytest.param(2048 * MIB, "unix", id="2g", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_crc_of_four_connections_at_depth_32_holds_while_snapshots_come_and_go(
    tmp_path: Path, serve: ServeFunction, size: int, transport: str
) -> None:
    server = serve(disk=make_sparse(tmp_path / "disk.img", size))
    with snapshots_that_come_and_go(server) as gone:
        finished = subprocess.run(
            fio_command(server.uri("disk", transport), size, jobs=4),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500 if size > MIB * 1024 else 100,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr
    report = json.loads(finished.stdout[finished.stdout.index("{") :])
    assert all(job["error"] == 0 for job in report["jobs"])
    assert gone
    assert server.snapshots() == []
