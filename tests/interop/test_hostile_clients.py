"""Clients that break the rules: they get the protocol's error or are closed, others notice nothing.

Each test keeps a well-behaved client on the same server, which must go on working, and looks
at the server's memory and its log: at most one line for one bad client, and never a traceback.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, make_sparse
from tests.support.processes import wait_until
from tests.support.raw_client import (
    CMD_FLUSH,
    CMD_READ,
    CMD_STATUS,
    CMD_TRIM,
    CMD_WRITE,
    CMD_ZEROES,
    EINVAL,
    ENOSPC,
    EPERM,
    IHAVEOPT,
    OPT_GO,
    OPT_LIST,
    REP_ACK,
    REP_ERROR,
    RawClient,
    go_data,
)
from tests.support.server import Server

SIZE = 4 * MIB
# The buffers of a connection may stay allocated; what a client announces may not be.
MEMORY_GROWTH_BYTES_MAX = 96 * MIB

transports = pytest.mark.parametrize("transport", ["unix", "tcp"])


@pytest.fixture
def server(tmp_path: Path, serve: ServeFunction) -> Server:
    return serve(disk=make_disk(tmp_path / "disk.img", SIZE))


def complaints(server: Server) -> list[str]:
    """The lines of the log that are warnings or worse."""
    return [line for line in server.log().splitlines() if not (" INFO " in line or " DEBUG " in line)]


def still_served(client: RawClient, server: Server) -> None:
    """The well-behaved client's requests are answered."""
    client.request(CMD_READ, 4096, 8192, cookie=77)
    reply = client.simple_reply(8192)
    assert (reply.cookie, reply.error) == (77, 0)
    assert reply.data == server.sources["disk"].read_bytes()[4096 : 4096 + 8192]


@contextmanager
def nobody_else_notices(
    server: Server, transport: str, lines_max: int = 1, lines_min: int = 0
) -> Iterator[None]:
    """What happens inside disturbs neither another client nor the server's memory nor its log.

    For a client that is closed for breaking the rules, `lines_min` is 1: somebody has to hear of it.
    """
    with RawClient(server, transport) as good:
        good.go("disk")
        still_served(good, server)
        memory = server.rss_bytes()
        yield
        still_served(good, server)
        assert server.rss_bytes() - memory < MEMORY_GROWTH_BYTES_MAX
    with RawClient(server, transport) as newcomer:
        newcomer.go("disk")
        still_served(newcomer, server)
    wait_until(lambda: len(complaints(server)) >= lines_min, "a line in the log")
    assert len(complaints(server)) <= lines_max, server.log()
    assert "Traceback" not in server.log()


@transports
@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 4096,
        b"\xff" * 4096,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01" * 100,
    ],
    ids=["zeroes", "ones", "http", "tls"],
)
def test_garbage_instead_of_a_handshake_closes_that_client(
    server: Server, transport: str, garbage: bytes
) -> None:
    with nobody_else_notices(server, transport, lines_min=1), RawClient(server, transport) as bad:
        bad.receive(18)
        bad.send(garbage)
        bad.socket.shutdown(1)
        while bad.socket.recv(65536):
            pass


@transports
def test_a_wrong_option_magic_closes_that_client(server: Server, transport: str) -> None:
    with nobody_else_notices(server, transport, lines_min=1), RawClient(server, transport) as bad:
        bad.greet()
        bad.send(struct.pack(">QII", IHAVEOPT ^ 1, OPT_LIST, 0))
        assert bad.is_closed()


@transports
def test_an_unknown_client_flag_closes_that_client(server: Server, transport: str) -> None:
    with nobody_else_notices(server, transport, lines_min=1), RawClient(server, transport) as bad:
        bad.greet(flags=0x80000003)
        assert bad.is_closed()


@transports
def test_an_option_of_four_gib_is_not_buffered(server: Server, transport: str) -> None:
    with nobody_else_notices(server, transport, lines_min=1), RawClient(server, transport) as bad:
        bad.greet()
        bad.send_option(OPT_GO, length=0xFFFFFFFF)
        # A well-known limit: what is over it ends the connection, now or while it pours in.
        for _ in range(256):
            bad.send(bytes(MIB))
            if server.rss_bytes() > 2**30:
                pytest.fail("the option is being collected")
        reply = bytearray()
        while part := _receive_or_end(bad):
            reply += part
        assert not reply or struct.unpack_from(">QII", reply)[2] & REP_ERROR


def _receive_or_end(client: RawClient) -> bytes:
    try:
        return client.socket.recv(65536)
    except ConnectionResetError:
        return b""


@transports
def test_endless_options_close_that_client(server: Server, transport: str) -> None:
    with nobody_else_notices(server, transport), RawClient(server, transport) as bad:
        bad.greet()
        answered = 0
        while answered < 100_000:
            bad.send_option(OPT_LIST)
            if not _receive_or_end(bad):
                break
            answered += 1
        assert answered < 100_000


@transports
def test_a_wrong_request_magic_closes_that_client(server: Server, transport: str) -> None:
    with nobody_else_notices(server, transport, lines_min=1), RawClient(server, transport) as bad:
        bad.go("disk")
        bad.request(CMD_READ, 0, 512, magic=0x12345678)
        assert bad.is_closed()


@transports
@pytest.mark.parametrize("sent", [1, 17, 27])
def test_half_a_request_and_then_nothing_holds_up_nobody(server: Server, transport: str, sent: int) -> None:
    with RawClient(server, transport) as bad, nobody_else_notices(server, transport):
        bad.go("disk")
        bad.send(struct.pack(">IHHQQI", 0x25609513, 0, CMD_READ, 1, 0, 512)[:sent])


@transports
def test_half_a_write_and_then_hanging_up_changes_only_its_own_range(server: Server, transport: str) -> None:
    before = server.sources["disk"].read_bytes()
    with nobody_else_notices(server, transport), RawClient(server, transport) as bad:
        bad.go("disk")
        bad.request(CMD_WRITE, MIB, MIB, b"x" * (MIB // 2))
    after = server.sources["disk"].read_bytes()
    assert after[:MIB] == before[:MIB]
    assert after[2 * MIB :] == before[2 * MIB :]


@transports
@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE])
def test_a_length_beyond_the_limit_is_refused_without_memory(
    server: Server, transport: str, command: int
) -> None:
    with nobody_else_notices(server, transport), RawClient(server, transport) as bad:
        bad.go("disk")
        bad.request(command, 0, 0xFFFFFFFF)
        if command == CMD_READ:
            assert bad.simple_reply().error == EINVAL
            still_served(bad, server)
            return
        # Nobody can skip 4 GiB in reasonable time: an error reply, or the connection ends.
        bad.send(bytes(MIB))
        bad.socket.shutdown(1)
        reply = b""
        while part := _receive_or_end(bad):
            reply += part
        assert len(reply) in {0, 16}


@transports
@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (CMD_READ, SIZE, 1, EINVAL),
        (CMD_READ, SIZE - 1, 2, EINVAL),
        (CMD_READ, 2**64 - 1, 2, EINVAL),
        (CMD_WRITE, SIZE - 1, 2, ENOSPC),
        (CMD_WRITE, 2**64 - 512, 1024, ENOSPC),
        (CMD_ZEROES, SIZE - 512, 1024, ENOSPC),
        (CMD_ZEROES, 2**64 - 1, 2**32 - 1, ENOSPC),
        (CMD_TRIM, SIZE, 512, EINVAL),
        (CMD_TRIM, 2**64 - 512, 2**32 - 512, EINVAL),
        (CMD_STATUS, 0, 512, EINVAL),
        (CMD_FLUSH, 1, 0, EINVAL),
        (99, 0, 0, EINVAL),
    ],
)
def test_a_request_past_the_end_gets_its_error_and_the_client_stays(
    server: Server, transport: str, command: int, offset: int, length: int, error: int
) -> None:
    before = server.sources["disk"].read_bytes()
    with nobody_else_notices(server, transport, lines_max=0), RawClient(server, transport) as bad:
        bad.go("disk")
        bad.request(command, offset, length, bytes(length) if command == CMD_WRITE else b"")
        assert bad.simple_reply().error == error
        still_served(bad, server)
    assert server.sources["disk"].read_bytes() == before


@transports
def test_writes_to_a_read_only_export_get_eperm_and_stay_in_step(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", SIZE), options=["-r"])
    before = server.sources["disk"].read_bytes()
    with RawClient(server, transport) as client:
        client.go("disk")
        client.request(CMD_WRITE, 0, 512, b"x" * 512)
        assert client.simple_reply().error == EPERM
        for command in (CMD_ZEROES, CMD_TRIM):
            client.request(command, 0, 512)
            assert client.simple_reply().error == EPERM
        still_served(client, server)
    assert server.sources["disk"].read_bytes() == before


@transports
def test_a_client_that_never_reads_its_replies_costs_bounded_memory(
    tmp_path: Path, serve: ServeFunction, transport: str
) -> None:
    server = serve(disk=make_sparse(tmp_path / "disk.img", 64 * MIB))
    with RawClient(server, transport) as bad, RawClient(server, transport) as good:
        bad.go("disk")
        good.go("disk")
        memory = server.rss_bytes()
        bad.socket.settimeout(0.5)
        asked = 0
        try:
            while asked < 2000:
                bad.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, CMD_READ, asked, 0, 32 * MIB))
                asked += 1
        except TimeoutError:
            pass
        for _ in range(5):
            good.request(CMD_READ, 0, MIB, cookie=5)
            assert good.simple_reply(MIB).error == 0
        assert server.rss_bytes() - memory < 256 * MIB


@transports
def test_connecting_and_hanging_up_leaves_no_line_and_no_descriptor(server: Server, transport: str) -> None:
    with RawClient(server, transport) as first:
        first.go("disk")
        descriptors = server.descriptors()
        for _ in range(50):
            with RawClient(server, transport):
                pass
        wait_until(lambda: server.descriptors() <= descriptors, "every connection is given up")
        still_served(first, server)
    assert not complaints(server)


def test_random_bytes_after_the_handshake_never_bring_the_server_down(server: Server) -> None:
    with nobody_else_notices(server, "unix", lines_max=40):
        for _ in range(20):
            with RawClient(server) as bad:
                bad.greet()
                bad.send(os.urandom(2000))
            with RawClient(server) as bad:
                bad.go("disk")
                bad.send(os.urandom(2000))


def test_a_missing_export_gets_an_error_and_negotiation_goes_on(server: Server) -> None:
    with RawClient(server) as client:
        client.greet()
        (refusal,) = client.option(OPT_GO, go_data("nosuch"))
        assert refusal.kind & REP_ERROR
        assert client.option(OPT_GO, go_data("disk"))[-1].kind == REP_ACK
        still_served(client, server)
