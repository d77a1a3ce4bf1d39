"""qemu-io as a client: patterns written and verified, zeroes, discards, flush and FUA."""

from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, allocated_bytes, make_disk, sha256
from tests.support.peers import require
from tests.support.processes import attempt, run
from tests.support.server import Server

transports = pytest.mark.parametrize("transport", ["unix", "tcp"])


def qemu_io(server: Server, transport: str, *commands: str, export: str = "disk", options: str = "") -> str:
    """Run qemu-io commands; every pattern must verify."""
    words = [word for command in commands for word in ("-c", command)]
    output = run(require("qemu-io"), "-f", "raw", *options.split(), *words, server.uri(export, transport))
    assert "failed" not in output.lower(), output
    return output


@transports
def test_patterns_written_at_odd_places_read_back(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    disk = make_disk(tmp_path / "disk.img", 8 * MIB)
    server = serve(disk=disk)
    qemu_io(
        server,
        transport,
        "write -P 0x5a 1000 70000",
        "write -P 0xa5 65535 2",
        "flush",
        "read -P 0x5a 1000 64535",
        "read -P 0xa5 65535 2",
        "read -P 0x5a 65537 5463",
    )
    content = disk.read_bytes()
    assert content[1000:65535] == b"\x5a" * 64535
    assert content[65535:65537] == b"\xa5\xa5"


@transports
def test_a_view_keeps_the_bytes_that_every_kind_of_write_replaced(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    disk = make_disk(tmp_path / "disk.img", 8 * MIB)
    before = sha256(disk)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    qemu_io(
        server,
        transport,
        "write -P 1 0 100000",
        "write -f -P 2 1M 4096",
        "write -z 2M 100k",
        "write -z -u 3M 1M",
        "discard 5M 1M",
        "flush",
    )
    run(require("nbdcopy"), server.uri("disk@s", transport), tmp_path / "pulled.img")
    assert sha256(tmp_path / "pulled.img") == before
    assert sha256(disk) != before


@transports
def test_zeroes_read_back_and_give_space_back_only_when_allowed(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    disk = make_disk(tmp_path / "disk.img", 8 * MIB)
    full = allocated_bytes(disk)
    server = serve(disk=disk)
    qemu_io(server, transport, "write -z 0 2M", "read -P 0 0 2M", "flush")
    assert allocated_bytes(disk) == full
    qemu_io(server, transport, "write -z -u 2M 2M", "read -P 0 2M 2M", "flush", options="-d unmap")
    assert allocated_bytes(disk) <= full - 2 * MIB
    assert disk.read_bytes()[: 4 * MIB] == bytes(4 * MIB)


@transports
def test_discard_gives_space_back(tmp_path: Path, serve: ServeFunction, transport: str) -> None:
    disk = make_disk(tmp_path / "disk.img", 8 * MIB)
    full = allocated_bytes(disk)
    server = serve(disk=disk)
    qemu_io(server, transport, "discard 0 4M", "flush", options="-d unmap")
    assert allocated_bytes(disk) <= full - 4 * MIB


def test_discard_is_ignored_when_serve_was_told_so(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", 4 * MIB)
    full, before = allocated_bytes(disk), sha256(disk)
    server = serve(disk=disk, options=["--discard", "ignore"])
    attempt(*(require("qemu-io"), "-f", "raw", "-d", "unmap", "-c", "discard 0 4M", server.uri("disk")))
    assert allocated_bytes(disk) == full
    assert sha256(disk) == before


@transports
def test_many_writes_in_flight_all_land(tmp_path: Path, serve: ServeFunction, transport: str) -> None:
    disk = make_disk(tmp_path / "disk.img", 8 * MIB)
    server = serve(disk=disk)
    writes = [f"aio_write -q -P {1 + index % 250} {index * 65536} 65536" for index in range(100)]
    reads = [f"read -P {1 + index % 250} {index * 65536} 65536" for index in range(100)]
    qemu_io(server, transport, *writes, "aio_flush", *reads)


def test_writing_to_a_read_only_export_is_refused(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    before = sha256(disk)
    server = serve(disk=disk, options=["-r"])
    refused = attempt(require("qemu-io"), "-f", "raw", "-c", "write 0 512", server.uri("disk"))
    assert refused.returncode != 0
    qemu_io(server, "unix", "read 0 1M", options="-r")
    assert sha256(disk) == before
