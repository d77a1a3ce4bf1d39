"""Other people's servers as sources and as targets of a backup: what arrives is the point in time."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, make_sparse, sha256
from tests.support.foreign_servers import ForeignServer, nbdkit, qemu_nbd
from tests.support.peers import require
from tests.support.processes import attempt, run, wait_until
from tests.support.server import Server

SIZE = 16 * MIB + 4608
WAIT_S = 60.0
WAITS_LONG = ("--reconnect-delay", "60")


def make_qcow2(path: Path, size: int, content: Path | None = None) -> Path:
    """A qcow2 image, empty or with the content of a raw file."""
    qemu_img = require("qemu-img")
    if content is None:
        run(qemu_img, "create", "-q", "-f", "qcow2", path, str(size))
    else:
        run(qemu_img, "convert", "-O", "qcow2", content, path)
    return path


def are_identical(raw: Path, other: Path, format: str) -> bool:
    """What `qemu-img compare` says."""
    return attempt(require("qemu-img"), "compare", "-f", "raw", "-F", format, raw, other).returncode == 0


def wait_until_partly_done(server: Server, job_id: str) -> None:
    """Until the job has copied something, and not all."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        [job] = [j for j in _jobs(server) if j["id"] == job_id]
        if 0 < int(str(job["current-progress"])) < int(str(job["total-progress"])):
            return
        time.sleep(0.02)
    raise AssertionError("the job does not get on")


def _jobs(server: Server) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = json.loads(server.cli("qmp", "query-jobs").stdout)
    return listed


def test_qcow2_behind_qemu_nbd_is_served_written_and_snapshot(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, disk)
    with ForeignServer(qemu_nbd(image, format="qcow2")) as remote:
        server = serve({"disk": remote.uri("disk")}, tcp=False)
        server.cli("snapshot", "create", "disk", "--name", "s")
        run(require("qemu-io"), "-f", "raw", "-c", "write -P 7 1M 3M", "-c", "flush", server.uri("disk"))
        run(require("qemu-img"), "convert", "-O", "raw", server.uri("disk@s"), tmp_path / "pull.img")
        run(require("qemu-img"), "convert", "-O", "raw", server.uri("disk"), tmp_path / "live.img")
        server.cli("backup", "disk", str(tmp_path / "push.img"))
        server.stop()
    assert sha256(tmp_path / "pull.img") == sha256(disk)
    assert sha256(tmp_path / "push.img") == sha256(tmp_path / "live.img") != sha256(disk)
    assert are_identical(tmp_path / "live.img", image, "qcow2")


def test_backup_to_a_new_qcow2_behind_qemu_nbd_is_identical(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    image = make_qcow2(tmp_path / "backup.qcow2", SIZE)
    server = serve(disk=disk, tcp=False)
    with ForeignServer(qemu_nbd(image, format="qcow2")) as remote:
        told = server.cli("backup", "disk", remote.uri("disk")).stdout
    assert "complete" in told
    assert are_identical(disk, image, "qcow2")


@pytest.mark.parametrize("rate", ["5%", "100%"])
def test_backup_to_a_target_with_errors_is_complete_only_if_it_is(
    tmp_path: Path, serve: ServeFunction, rate: str
) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    image = make_sparse(tmp_path / "backup.img", SIZE)
    server = serve(disk=disk, tcp=False)
    with ForeignServer(
        nbdkit("--filter=error", "file", image, "error=ENOSPC", f"error-pwrite-rate={rate}")
    ) as remote:
        ended = server.cli("backup", "disk", remote.uri(), check=False)
    if ended.returncode == 0:
        assert rate != "100%"
        assert sha256(image) == sha256(disk)
    else:
        assert ended.returncode == 1
        assert "complete" not in ended.stdout
        assert re.search(
            r"failed: writing the target failed at offset \d+, \d+ bytes: .* failed to write: .*ENOSPC",
            ended.stderr,
        )
    assert server.snapshots() == []
    run(require("qemu-io"), "-f", "raw", "-c", "write 0 64k", server.uri("disk"))


def test_backup_goes_on_when_its_target_is_killed_and_started_again(
    tmp_path: Path, serve: ServeFunction
) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    image = make_sparse(tmp_path / "backup.img", SIZE)
    server = serve({"disk": disk}, WAITS_LONG, tcp=False)
    with ForeignServer(nbdkit("file", image)) as remote:
        job_id = server.cli("backup", "disk", remote.uri(), "-r", "8M", "--no-wait").stdout.strip()
        wait_until_partly_done(server, job_id)
        remote.kill()
        remote.start()
        server.cli("job", "watch", job_id)
        assert "connected again" in server.log()
    assert sha256(image) == sha256(disk)


def test_backup_stops_when_its_target_does_not_come_back(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    image = make_sparse(tmp_path / "backup.img", SIZE)
    server = serve({"disk": disk}, ("--reconnect-delay", "0.5"), tcp=False)
    with ForeignServer(nbdkit("file", image)) as remote:
        job_id = server.cli("backup", "disk", remote.uri(), "-r", "8M", "--no-wait").stdout.strip()
        wait_until_partly_done(server, job_id)
        remote.kill()
        wait_until(lambda: _jobs(server)[0]["status"] == "paused", "the job to stop")
    assert "was lost and could not be made again within 0.5 s: " in server.cli("job", "list").stdout
    run(require("qemu-io"), "-f", "raw", "-c", "write 0 64k", server.uri("disk"))


def test_slow_remote_target_does_not_slow_clients(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", 8 * MIB)
    image = make_sparse(tmp_path / "backup.img", 8 * MIB)
    server = serve(disk=disk, tcp=False)
    before = sha256(disk)
    with ForeignServer(nbdkit("--filter=delay", "file", image, "wdelay=1")) as remote:
        job_id = server.cli("backup", "disk", remote.uri(), "-m", "1", "--no-wait").stdout.strip()
        run(require("qemu-io"), "-f", "raw", "-c", "write -P 9 6M 2M", "-c", "flush", server.uri("disk"))
        # The write is done, and what it replaced is not in the target yet: nobody waited for that.
        assert not any(image.read_bytes()[6 * MIB :])
        server.cli("job", "watch", job_id)
    assert sha256(image) == before != sha256(disk)


def refused(server: Server, *arguments: str) -> str:
    """The one line of a backup that is refused."""
    result = server.cli("backup", *arguments, check=False)
    assert result.returncode == 1, result
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_unfit_remote_targets_are_refused_in_one_line(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    server = serve(disk=disk)
    with ForeignServer(nbdkit("memory", "1M")) as small:
        assert "have different sizes" in refused(server, "disk", small.uri())
    with ForeignServer(nbdkit("-r", "memory", str(SIZE))) as read_only:
        assert "can only be read" in refused(server, "disk", read_only.uri())
    gone = f"nbd+unix:///?socket={tmp_path}/gone"
    assert f"cannot connect to {gone}" in refused(server, "disk", gone)
    for transport in ("unix", "tcp"):
        own = server.uri("disk", transport)
        assert "this very server" in refused(server, "disk", own)
    no_files = f"nbds://localhost/x?tls-certificates={tmp_path}/nowhere"
    assert "there is no directory of certificates" in refused(server, "disk", no_files)
    assert sha256(disk) == sha256(make_disk(tmp_path / "again.img", SIZE))


def test_source_is_not_its_own_target(tmp_path: Path, serve: ServeFunction) -> None:
    image = make_disk(tmp_path / "disk.img", SIZE)
    with ForeignServer(nbdkit("file", image)) as remote:
        server = serve({"disk": remote.uri()}, tcp=False)
        assert "cannot be the same" in refused(server, "disk", remote.uri())


def test_serve_of_a_missing_server_is_refused_in_one_line(tmp_path: Path) -> None:
    gone = f"nbd+unix:///disk?socket={tmp_path}/gone"
    server = Server({}, [f"disk={gone}"])
    try:
        ended = subprocess.run(server.command(), capture_output=True, text=True, timeout=60, check=False)
    finally:
        server.close()
    assert ended.returncode == 1
    assert ended.stderr == (
        f"nbdbackup: cannot connect to {gone}: No such file or directory: "
        "is the server running, and is this its address?\n"
    )


def test_remote_source_that_dies_is_waited_for(tmp_path: Path, serve: ServeFunction) -> None:
    image = make_disk(tmp_path / "disk.img", SIZE)
    with ForeignServer(nbdkit("file", image)) as remote:
        server = serve({"disk": remote.uri()}, WAITS_LONG, tcp=False)
        run(require("qemu-io"), "-f", "raw", "-c", "write -P 5 0 64k", server.uri("disk"))
        remote.kill()
        reading = subprocess.Popen(
            [require("qemu-io"), "-f", "raw", "-c", "read -P 5 0 64k", server.uri("disk")],
            stdout=subprocess.PIPE,
            text=True,
        )
        with reading:
            with pytest.raises(subprocess.TimeoutExpired):
                reading.wait(1)
            remote.start()
            told, _ = reading.communicate(timeout=WAIT_S)
        assert reading.returncode == 0
        assert "Pattern verification failed" not in told
        server.stop()


def test_backup_goes_to_another_nbdbackup_over_tcp(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    image = make_sparse(tmp_path / "backup.img", SIZE)
    target = serve(target=image, unix=False)
    source = serve(disk=disk)
    source.cli("backup", "disk", target.uri("target"))
    assert sha256(image) == sha256(disk)


def test_read_only_source_is_served_with_read_only_alone(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    with ForeignServer(nbdkit("-r", "file", disk)) as remote:
        server = Server({}, [f"disk={remote.uri()}"])
        try:
            ended = attempt(*server.command())
        finally:
            server.close()
        assert ended.returncode == 1
        assert ended.stderr == f"nbdbackup: {remote.uri()} can only be read: try --read-only\n"
        server = serve({"disk": remote.uri()}, ["-r"], tcp=False)
        run(require("qemu-img"), "convert", "-O", "raw", server.uri("disk"), tmp_path / "copy.img")
        assert sha256(tmp_path / "copy.img") == sha256(disk)
        assert attempt(require("qemu-io"), "-f", "raw", "-c", "write 0 512", server.uri("disk")).returncode
        [node] = json.loads(server.cli("node", "list", "--json").stdout)
        assert (node["drv"], node["ro"], node["file"]) == ("nbd", True, remote.uri())
        server.stop()
