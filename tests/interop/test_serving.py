"""Odd sizes, untouched images, and what a server leaves behind."""

import json
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, allocated_bytes, make_disk, make_sparse, sha256
from tests.support.peers import require
from tests.support.processes import attempt, run
from tests.support.server import COMMAND

ODD_SIZES = (1, 511, 512, 4095, 4096, 4097, 65536, 65537, 3 * MIB + 1)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_serving_and_reading_leave_the_image_untouched(
    tmp_path: Path, serve: ServeFunction, size: int
) -> None:
    disk = make_disk(tmp_path / "disk.img", size)
    before = sha256(disk)
    server = serve(disk=disk, tcp=False)
    run(require("nbdinfo"), "--map", server.uri("disk"))
    server.stop()
    assert disk.stat().st_size == size
    assert sha256(disk) == before


@pytest.mark.parametrize("size", ODD_SIZES)
def test_view_and_backup_of_an_odd_size_are_byte_exact(
    tmp_path: Path, serve: ServeFunction, size: int
) -> None:
    disk = make_disk(tmp_path / "disk.img", size)
    before = sha256(disk)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    # nbdcopy keeps the exact size; qemu-img rounds up to whole sectors.
    pulled, pushed = tmp_path / "pulled.img", tmp_path / "pushed.img"
    run(require("nbdcopy"), server.uri("disk@s"), pulled)
    server.cli("backup", "disk", str(pushed))
    assert pulled.stat().st_size == pushed.stat().st_size == size
    assert sha256(pulled) == sha256(pushed) == before


@pytest.mark.parametrize("size", [511, 4097, 65537])
def test_tail_of_an_odd_size_is_saved_before_it_is_overwritten(
    tmp_path: Path, serve: ServeFunction, size: int
) -> None:
    disk = make_disk(tmp_path / "disk.img", size, seed=1)
    other = make_disk(tmp_path / "other.img", size, seed=2)
    before = sha256(disk)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    run(require("nbdcopy"), other, server.uri("disk"))
    pulled = tmp_path / "pulled.img"
    run(require("nbdcopy"), server.uri("disk@s"), pulled)
    assert sha256(pulled) == before
    assert sha256(disk) == sha256(other)


def test_an_empty_image_is_refused_in_one_line(tmp_path: Path) -> None:
    disk = make_sparse(tmp_path / "empty.img", 0)
    where = [
        "-k",
        str(tmp_path / "s"),
        "--control",
        str(tmp_path / "c"),
        "--state-dir",
        str(tmp_path / "state"),
    ]
    result = attempt(*COMMAND, "serve", *where, f"disk={disk}")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "empty.img" in result.stderr


def test_a_sparse_image_past_a_tebibyte_is_viewed_and_backed_up_sparse(
    tmp_path: Path, serve: ServeFunction
) -> None:
    size = 2**40 + 513
    disk = make_sparse(tmp_path / "huge.img", size)
    with disk.open("r+b") as file:
        file.write(b"head")
        file.seek(2**39 + 12345)
        file.write(b"middle")
        file.seek(size - 4)
        file.write(b"tail")
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    pushed = tmp_path / "pushed.img"
    server.cli("backup", "disk", str(pushed))
    assert pushed.stat().st_size == size
    assert allocated_bytes(pushed) < 4 * MIB
    info = json.loads(run(require("nbdinfo"), "--json", "--no-content", server.uri("disk@s")))
    assert info["exports"][0]["export-size"] == size
    with pushed.open("rb") as file:
        assert file.read(4) == b"head"
        file.seek(2**39 + 12345)
        assert file.read(6) == b"middle"
        file.seek(size - 4)
        assert file.read() == b"tail"
