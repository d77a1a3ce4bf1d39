"""libnbd's programs as clients: nbdinfo, and nbdcopy on four connections both ways."""

import json
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, make_sparse, sha256
from tests.support.peers import require
from tests.support.processes import run

transports = pytest.mark.parametrize("transport", ["unix", "tcp"])


@transports
def test_nbdinfo_sees_what_the_export_can_do(tmp_path: Path, serve: ServeFunction, transport: str) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", MIB + 1), options=["-D", "a disk of tests"])
    info = json.loads(run(require("nbdinfo"), "--json", "--no-content", server.uri("disk", transport)))
    (export,) = info["exports"]
    assert info["protocol"] == "newstyle-fixed"
    assert info["structured"]
    assert export["export-size"] == MIB + 1
    assert export["description"] == "a disk of tests"
    assert export["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    abilities = ("can_cache", "can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero")
    assert all(export[ability] for ability in abilities)
    assert not export["is_read_only"]
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 32 * MIB


@transports
def test_nbdinfo_lists_every_export_and_view(tmp_path: Path, serve: ServeFunction, transport: str) -> None:
    server = serve({"a": make_disk(tmp_path / "a.img", MIB), "b": make_disk(tmp_path / "b.img", 2 * MIB)})
    server.cli("snapshot", "create", "b", "--name", "s")
    listed = json.loads(run(require("nbdinfo"), "--list", "--json", server.uri("", transport)))
    exports = {export["export-name"]: export for export in listed["exports"]}
    assert set(exports) == {"a", "b", "b@s"}
    assert exports["b@s"]["export-size"] == 2 * MIB
    assert exports["b@s"]["is_read_only"]


@transports
def test_nbdinfo_map_follows_the_image(tmp_path: Path, serve: ServeFunction, transport: str) -> None:
    disk = make_sparse(tmp_path / "disk.img", 16 * MIB)
    with disk.open("r+b") as file:
        file.seek(4 * MIB)
        file.write(b"x" * MIB)
    server = serve(disk=disk)
    extents = json.loads(run(require("nbdinfo"), "--map", "--json", server.uri("disk", transport)))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
        (0, 4 * MIB, 3),
        (4 * MIB, MIB, 0),
        (5 * MIB, 11 * MIB, 3),
    ]


@transports
def test_nbdcopy_on_four_connections_is_byte_exact_both_ways(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    image = make_disk(tmp_path / "image.img", 64 * MIB + 77, seed=2)
    disk = make_sparse(tmp_path / "disk.img", 64 * MIB + 77)
    server = serve(disk=disk)
    four = ("--connections=4", "--requests=64", "--flush")
    run(require("nbdcopy"), *four, image, server.uri("disk", transport))
    assert sha256(disk) == sha256(image)
    server.cli("snapshot", "create", "disk", "--name", "s")
    run(require("nbdcopy"), *four, server.uri("disk@s", transport), tmp_path / "copy.img")
    assert sha256(tmp_path / "copy.img") == sha256(image)


def test_nbdcopy_from_one_export_to_another_of_the_same_server(tmp_path: Path, serve: ServeFunction) -> None:
    server = serve(
        {"a": make_disk(tmp_path / "a.img", 16 * MIB), "b": make_sparse(tmp_path / "b.img", 16 * MIB)}
    )
    run(require("nbdcopy"), "--connections=4", "--flush", server.uri("a", "tcp"), server.uri("b", "unix"))
    assert sha256(tmp_path / "b.img") == sha256(tmp_path / "a.img")


def test_pulling_a_view_again_and_again_always_ends(tmp_path: Path, serve: ServeFunction) -> None:
    """A reply that is never sent shows up only now and then: in one pull of ten or so."""
    disk = make_disk(tmp_path / "disk.img", 32 * MIB)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    for number in range(30):
        connections = f"--connections={1 + number % 4}"
        run(require("nbdcopy"), connections, server.uri("disk@s"), tmp_path / "copy.img", timeout_s=20)
    assert sha256(tmp_path / "copy.img") == sha256(disk)
