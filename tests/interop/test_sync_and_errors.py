"""Sync modes and error policies with other people's servers at either end."""

import json
import time
from pathlib import Path

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, make_sparse, sha256
from tests.support.foreign_servers import ForeignServer, nbdkit, qemu_nbd
from tests.support.peers import require
from tests.support.processes import run
from tests.support.server import Server

SIZE = 8 * MIB + 4608
CLUSTER = 65536
OLD = b"\xee"
WAIT_S = 60.0


def put_old(path: Path, size: int = SIZE) -> Path:
    """A target full of old bytes."""
    path.write_bytes(OLD * size)
    return path


def wait_status(server: Server, job_id: str, status: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        [job] = [job for job in json.loads(server.cli("qmp", "query-jobs").stdout) if job["id"] == job_id]
        if job["status"] == status:
            return
        time.sleep(0.02)
    raise AssertionError(f"job {job_id} is {job}, not {status}")


def io_status(server: Server, job_id: str) -> str:
    [job] = [
        job for job in json.loads(server.cli("qmp", "query-block-jobs").stdout) if job["device"] == job_id
    ]
    return str(job["io-status"])


def expected_top(content: bytes, clusters: set[int]) -> bytes:
    """Old bytes, but for `clusters` of `content`."""
    expected = bytearray(OLD * len(content))
    for number in clusters:
        piece = slice(number * CLUSTER, min((number + 1) * CLUSTER, len(content)))
        expected[piece] = content[piece]
    return bytes(expected)


def test_top_of_a_qcow2_overlay_behind_qemu_nbd_is_what_the_overlay_holds(
    tmp_path: Path, serve: ServeFunction
) -> None:
    base = make_disk(tmp_path / "base.img", SIZE)
    overlay = tmp_path / "overlay.qcow2"
    qemu_img, qemu_io = require("qemu-img"), require("qemu-io")
    run(qemu_img, "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    writes = ["-c", "write -P 7 128k 64k", "-c", "write -z 1M 128k", "-c", "write -P 9 8M 4608"]
    run(qemu_io, "-f", "qcow2", *writes, overlay)
    target = put_old(tmp_path / "target.img")
    with ForeignServer(qemu_nbd(overlay, "-A", format="qcow2")) as remote:
        server = serve({"disk": remote.uri("disk")}, tcp=False)
        run(qemu_img, "convert", "-O", "raw", server.uri("disk"), tmp_path / "before.img")
        server.cli(
            "backup", "disk", str(target), "--sync", "top", "-n", "-r", "1", "--no-wait", "--job-id", "j"
        )
        # What the overlay does not hold is neither saved nor copied, also when it is overwritten now.
        run(qemu_io, "-f", "raw", "-c", "write -P 3 3M 64k", "-c", "write -P 4 1M 64k", server.uri("disk"))
        server.cli("job", "set-speed", "j", "0")
        server.cli("job", "watch", "j")
        server.stop()
    content = (tmp_path / "before.img").read_bytes()
    assert target.read_bytes() == expected_top(content, {2, 16, 17, 128})


def test_top_of_a_sparse_file_is_its_data(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_sparse(tmp_path / "disk.img", SIZE)
    with disk.open("r+b") as file:
        for number in (3, 100):
            file.seek(number * CLUSTER + 5000)
            file.write(b"data")
    content = disk.read_bytes()
    target = put_old(tmp_path / "target.img")
    server = serve(disk=disk, tcp=False)
    server.cli("backup", "disk", str(target), "--sync", "top", "-n")
    assert target.read_bytes() == expected_top(content, {3, 100})


def test_errors_of_the_source_that_are_ignored_are_retried_and_told(
    tmp_path: Path, serve: ServeFunction
) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    copy = tmp_path / "copy.img"
    is_ill = tmp_path / "ill"
    faults = ("error=EIO", "error-pread-rate=50%", f"error-pread-file={is_ill}")
    with ForeignServer(nbdkit("--filter=error", "file", disk, *faults)) as remote:
        server = serve({"disk": remote.uri()}, tcp=False)
        is_ill.touch()
        result = server.cli("backup", "disk", str(copy), "--on-source-error", "ignore", "--json", check=False)
        server.stop()
    assert result.returncode == 3, result
    assert json.loads(result.stdout)["source-errors-ignored"] > 0
    assert sha256(copy) == sha256(disk)


def test_a_full_target_stops_the_job_until_there_is_room(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    image = make_sparse(tmp_path / "backup.img", SIZE)
    is_full = tmp_path / "full"
    is_full.touch()
    faults = ("error=ENOSPC", "error-pwrite-rate=100%", f"error-pwrite-file={is_full}")
    with ForeignServer(nbdkit("--filter=error", "file", image, *faults)) as remote:
        server = serve(disk=disk, tcp=False)
        server.cli(
            "backup", "disk", remote.uri(), "--on-target-error", "enospc", "--no-wait", "--job-id", "j"
        )
        wait_status(server, "j", "paused")
        assert io_status(server, "j") == "nospace"
        server.cli("job", "resume", "j")
        wait_status(server, "j", "paused")
        is_full.unlink()
        server.cli("job", "resume", "j")
        server.cli("job", "watch", "j")
        assert io_status(server, "j") == "ok"
    assert sha256(image) == sha256(disk)


def test_sync_none_saves_what_clients_overwrite_since_the_last_checkpoint(
    tmp_path: Path, serve: ServeFunction
) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    before = disk.read_bytes()
    target = put_old(tmp_path / "target.img")
    qemu_io = require("qemu-io")
    server = serve(disk=disk, tcp=False)
    server.cli("backup", "disk", str(target), "--sync", "none", "-n", "--no-wait", "--job-id", "j")
    run(qemu_io, "-f", "raw", "-c", "write -P 1 64k 64k", "-c", "write -P 1 8M 512", server.uri("disk"))
    assert target.read_bytes() == expected_top(before, {1, 128})
    server.cli("qmp", '{"execute": "x-nbdbackup-job-checkpoint", "arguments": {"id": "j"}}')
    between = disk.read_bytes()
    run(qemu_io, "-f", "raw", "-c", "write -P 2 64k 64k", server.uri("disk"))
    expected = bytearray(expected_top(before, {1, 128}))
    expected[CLUSTER : 2 * CLUSTER] = between[CLUSTER : 2 * CLUSTER]
    server.cli("job", "cancel", "j")
    wait_status(server, "j", "concluded")
    assert target.read_bytes() == bytes(expected)
