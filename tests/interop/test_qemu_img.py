"""qemu-img as a client: info, convert both ways, compare, map."""

import json
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, allocated_bytes, make_disk, make_sparse, sha256
from tests.support.peers import require
from tests.support.processes import attempt, run

transports = pytest.mark.parametrize("transport", ["unix", "tcp"])


@transports
def test_info_shows_the_size(tmp_path: Path, serve: ServeFunction, transport: str) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", 8 * MIB))
    info = json.loads(run(require("qemu-img"), "info", "--output=json", server.uri("disk", transport)))
    assert info["virtual-size"] == 8 * MIB
    assert info["format"] == "raw"


@transports
def test_the_empty_export_name_is_the_first_source(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    server = serve({"a": make_disk(tmp_path / "a.img", MIB), "b": make_disk(tmp_path / "b.img", 2 * MIB)})
    info = json.loads(run(require("qemu-img"), "info", "--output=json", server.uri("", transport)))
    assert info["virtual-size"] == MIB


@transports
def test_convert_from_the_live_export_and_a_view_is_byte_exact(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    disk = make_disk(tmp_path / "disk.img", 32 * MIB)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    for export in ("disk", "disk@s"):
        copy = tmp_path / f"copy of {export}.img"
        # 16 requests in flight, out of order
        run(
            require("qemu-img"), "convert", "-m", "16", "-W", "-O", "raw", server.uri(export, transport), copy
        )
        assert sha256(copy) == sha256(disk)
        run(require("qemu-img"), "compare", "-f", "raw", "-F", "raw", server.uri(export, transport), disk)


@transports
def test_convert_into_an_export_writes_data_and_zeroes(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    image = make_disk(tmp_path / "image.img", 16 * MIB, seed=2)
    with image.open("r+b") as file:
        file.seek(4 * MIB)
        file.write(bytes(8 * MIB))
    disk = make_disk(tmp_path / "disk.img", 16 * MIB, seed=1)
    server = serve(disk=disk)
    run(require("qemu-img"), "convert", "-n", "-f", "raw", "-O", "raw", image, server.uri("disk", transport))
    assert sha256(disk) == sha256(image)


def test_convert_of_a_view_ignores_what_is_written_later(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", 16 * MIB)
    before = sha256(disk)
    later = make_disk(tmp_path / "later.img", 16 * MIB, seed=2)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    run(require("qemu-img"), "convert", "-n", "-f", "raw", "-O", "raw", later, server.uri("disk"))
    pulls = [tmp_path / "pull1.img", tmp_path / "pull2.img"]
    for pull in pulls:
        run(require("qemu-img"), "convert", "-O", "raw", server.uri("disk@s"), pull)
    assert [sha256(pull) for pull in pulls] == [before, before]
    assert sha256(disk) == sha256(later)


def test_convert_of_a_view_to_qcow2_compares_equal(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", 8 * MIB)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    copy = tmp_path / "copy.qcow2"
    run(require("qemu-img"), "convert", "-c", "-O", "qcow2", server.uri("disk@s"), copy)
    run(require("qemu-img"), "compare", "-f", "raw", "-F", "qcow2", disk, copy)


@transports
def test_map_shows_holes_and_data_where_the_image_has_them(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    disk = make_sparse(tmp_path / "disk.img", 64 * MIB)
    with disk.open("r+b") as file:
        file.seek(16 * MIB)
        file.write(b"x" * (4 * MIB))
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    for export in ("disk", "disk@s"):
        listed = run(require("qemu-img"), "map", "--output=json", server.uri(export, transport))
        extents = [(extent["start"], extent["length"], extent["zero"]) for extent in json.loads(listed)]
        assert extents == [(0, 16 * MIB, True), (16 * MIB, 4 * MIB, False), (20 * MIB, 44 * MIB, True)]


def test_convert_of_a_sparse_view_stays_sparse(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_sparse(tmp_path / "disk.img", 2**36)
    with disk.open("r+b") as file:
        file.seek(2**35)
        file.write(b"x" * MIB)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    copy = tmp_path / "copy.img"
    run(require("qemu-img"), "convert", "-O", "raw", server.uri("disk@s"), copy)
    assert copy.stat().st_size == 2**36
    assert allocated_bytes(copy) < 4 * MIB


def test_writing_to_a_view_is_refused_and_leaves_it_as_it_was(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", 2 * MIB)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    image = make_disk(tmp_path / "image.img", 2 * MIB, seed=3)
    refused = attempt(
        require("qemu-img"), "convert", "-n", "-f", "raw", "-O", "raw", image, server.uri("disk@s")
    )
    assert refused.returncode != 0
    run(require("qemu-img"), "compare", "-f", "raw", "-F", "raw", server.uri("disk@s"), disk)


@transports
def test_an_unknown_export_is_named_in_the_clients_error(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", MIB))
    refused = attempt(require("qemu-img"), "info", server.uri("nosuch", transport))
    assert refused.returncode != 0
    assert "nosuch" in refused.stderr
