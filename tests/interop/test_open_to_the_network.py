"""A server that strangers can reach: idle clients, addresses that may not connect, fixed exports."""

import json
import resource
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk
from tests.support.peers import require
from tests.support.processes import attempt, run

IDLE_CLIENTS = 1000
STALL_S = 2.0
GONE_AFTER_S = 60.0
# An honest beginning, so that only its slowness ends the client: flags, and an option with a payload.
SLOW_BYTES = struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 3, 1000) + bytes(1000)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE_CLIENTS + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this process may not open {wanted} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def chosen(port: int, export: bytes) -> socket.socket:
    """A client that has chosen `export` by its name alone."""
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    client.recv(18, socket.MSG_WAITALL)
    client.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, len(export)) + export)
    client.recv(10, socket.MSG_WAITALL)
    return client


@pytest.mark.slow
@pytest.mark.parametrize("is_dripping", [False, True], ids=["silent", "one-byte-a-second"])
def test_thousand_clients_that_do_not_get_on_hinder_nobody_and_are_gone_after_the_limit(
    tmp_path: Path, serve: ServeFunction, many_descriptors: None, is_dripping: bool
) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", MIB), options=["-v"])
    assert server.port
    descriptors, before = server.descriptors(), server.rss_bytes()
    with ExitStack() as stack:
        honest = stack.enter_context(chosen(server.port, b"disk"))
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            for _ in range(IDLE_CLIENTS)
        ]
        begun = time.monotonic()
        during, slowest, reads, dripped = server.rss_bytes(), 0.0, 0, 0
        while server.descriptors() > descriptors + 1:
            assert time.monotonic() < begun + GONE_AFTER_S, "idle clients are still there"
            if is_dripping and time.monotonic() > begun + dripped:
                drip(idle, SLOW_BYTES[dripped : dripped + 1])
                dripped += 1
            slowest = max(slowest, read_4_kib(honest))
            reads += 1
            during = max(during, server.rss_bytes())
        taken = time.monotonic() - begun
        after = server.rss_bytes()
    print(
        f"resident: {before >> 10} KiB before, {during >> 10} during, {after >> 10} after; "
        f"gone after {taken:.1f} s, slowest of {reads} reads {slowest * 1000:.0f} ms"
    )
    assert "internal error" not in server.log()
    assert server.log().count("no export chosen within 10 s") >= IDLE_CLIENTS
    assert slowest < STALL_S
    assert during - before < 64 * MIB
    assert after - before < 64 * MIB


def drip(clients: list[socket.socket], byte: bytes) -> None:
    """Send `byte` from each; those that the server has left do not mind."""
    for client in clients:
        try:
            client.send(byte)
        except OSError:
            pass


def read_4_kib(client: socket.socket) -> float:
    """How long it takes."""
    started = time.monotonic()
    client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 4096))
    assert len(client.recv(16 + 4096, socket.MSG_WAITALL)) == 16 + 4096
    return time.monotonic() - started


def test_address_outside_the_allowed_ranges_is_closed_at_once(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    refusing = serve(disk=disk, options=["--allow", "192.0.2.0/24", "--allow", "::1"])
    assert attempt(require("nbdinfo"), "--size", refusing.uri("disk", "tcp")).returncode != 0
    assert run(require("nbdinfo"), "--size", refusing.uri("disk", "unix")) == f"{MIB}\n"
    assert "refused: no --allow range has it" in refusing.log()
    refusing.stop()
    letting = serve(disk=disk, options=["--allow", "127.0.0.0/8"])
    assert run(require("nbdinfo"), "--size", letting.uri("disk", "tcp")) == f"{MIB}\n"


def test_one_export_is_read_only_beside_one_that_is_not(tmp_path: Path, serve: ServeFunction) -> None:
    server = serve(
        fixed=make_disk(tmp_path / "a.img", MIB),
        free=make_disk(tmp_path / "b.img", MIB),
        options=["--read-only-export", "fixed"],
    )
    for name, expected in (("fixed", True), ("free", False)):
        (export,) = json.loads(run(require("nbdinfo"), "--json", server.uri(name)))["exports"]
        assert export["is_read_only"] is expected


def test_address_that_others_can_reach_is_warned_of_once(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB)
    # The harness gives -b 127.0.0.1 first; the last one counts.
    public = serve(disk=disk, options=["-b", "0.0.0.0"])
    assert public.log().count("can be reached from other machines without TLS") == 1
    public.stop()
    assert "other machines" not in serve(disk=disk).log()
