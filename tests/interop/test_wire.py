"""The protocol's rules for requests and replies, checked on the wire with a client that shares no code.

Section names are those of the NBD specification (doc/proto.md).
"""

import random
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, make_sparse
from tests.support.raw_client import (
    CMD_CACHE,
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_STATUS,
    CMD_TRIM,
    CMD_WRITE,
    CMD_ZEROES,
    EINVAL,
    ENOSPC,
    EPERM,
    FLAG_DF,
    FLAG_FAST_ZERO,
    FLAG_FUA,
    FLAG_NO_HOLE,
    FLAG_REQ_ONE,
    OPT_GO,
    REP_ACK,
    Chunk,
    RawClient,
    go_data,
)
from tests.support.server import Server

SIZE = 8 * MIB
KIND_NONE, KIND_DATA, KIND_HOLE, KIND_STATUS, KIND_ERROR, KIND_ERROR_OFFSET = 0, 1, 2, 5, 0x8001, 0x8002
ON_THE_WIRE = {0, 1, 5, 12, 22, 28, 75, 95, 108}

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM = (1 << bit for bit in range(6))
SEND_ZEROES, SEND_DF, MULTI_CONN = 1 << 6, 1 << 7, 1 << 8
SEND_CACHE, SEND_FAST_ZERO = 1 << 10, 1 << 11


@pytest.fixture
def server(tmp_path: Path, serve: ServeFunction) -> Server:
    return serve(disk=make_disk(tmp_path / "disk.img", SIZE))


@pytest.fixture
def plain(server: Server) -> Iterator[RawClient]:
    """A client that has not asked for structured replies."""
    with RawClient(server) as client:
        client.go("disk")
        yield client


@pytest.fixture
def structured(server: Server) -> Iterator[RawClient]:
    """A client with structured replies and `base:allocation`."""
    with RawClient(server) as client:
        client.go("disk", structured=True, contexts=("base:allocation",))
        yield client


def content(server: Server) -> bytes:
    return server.sources["disk"].read_bytes()


def transmission_flags(server: Server, export: str = "disk", structured: bool = True) -> int:
    with RawClient(server) as client:
        client.greet()
        if structured:
            client.option(8)
        replies = client.option(OPT_GO, go_data(export))
        assert replies[-1].kind == REP_ACK
        (flags,) = [
            struct.unpack_from(">HQH", reply.data)[2] for reply in replies[:-1] if reply.data[:2] == b"\0\0"
        ]
        return int(flags)


def assert_in_step(client: RawClient, server: Server) -> None:
    """The next request is understood: nothing of the one before is left in the stream."""
    client.request(CMD_READ, 512, 100, cookie=0xABCDEF)
    magic = client.receive(4)
    if magic == struct.pack(">I", 0x67446698):
        error, cookie = struct.unpack(">IQ", client.receive(12))
        assert (error, cookie) == (0, 0xABCDEF)
        data = client.receive(100)
    else:
        _, kind, cookie, length = struct.unpack(">HHQI", client.receive(16))
        assert (kind, cookie) == (KIND_DATA, 0xABCDEF)
        data = client.receive(length)[8:]
    assert data == content(server)[512:612]


def read_back(client: RawClient, offset: int, length: int, flags: int = 0) -> tuple[bytes, list[Chunk]]:
    """The bytes of a structured read; its content must cover the range once, within it."""
    client.request(CMD_READ, offset, length, flags=flags, cookie=9)
    chunks = client.chunks()
    buffer = bytearray(length)
    covered = []
    for chunk in chunks:
        assert chunk.cookie == 9
        assert not chunk.error
        if chunk.kind == KIND_DATA:
            (at,) = struct.unpack_from(">Q", chunk.data)
            data = chunk.data[8:]
        elif chunk.kind == KIND_HOLE:
            at, size = struct.unpack(">QI", chunk.data)
            data = bytes(size)
        else:
            assert chunk.kind == KIND_NONE
            assert not chunk.data
            continue
        assert data
        covered.append((at, at + len(data)))
        buffer[at - offset : at - offset + len(data)] = data
    assert len(buffer) == length
    covered.sort()
    assert covered[0][0] == offset
    assert covered[-1][1] == offset + length
    assert all(one[1] == two[0] for one, two in pairwise(covered))
    return bytes(buffer), chunks


# Transmission flags


def test_flags_say_what_works(server: Server) -> None:
    flags = transmission_flags(server)
    wanted = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_ZEROES | SEND_DF | MULTI_CONN | SEND_CACHE
    assert flags & wanted == wanted
    assert not flags & READ_ONLY
    assert flags & ~(wanted | ROTATIONAL | SEND_FAST_ZERO) == 0


def test_df_is_offered_with_structured_replies_alone(server: Server) -> None:
    assert transmission_flags(server, structured=True) & SEND_DF
    assert not transmission_flags(server, structured=False) & SEND_DF


def test_a_view_is_read_only(server: Server) -> None:
    server.cli("snapshot", "create", "disk", "--name", "s")
    assert transmission_flags(server, "disk@s") & READ_ONLY
    with RawClient(server) as client:
        client.go("disk@s")
        client.request(CMD_WRITE, 0, 4, b"abcd")
        assert client.simple_reply().error == EPERM
        client.request(CMD_ZEROES, 0, 4096)
        assert client.simple_reply().error == EPERM
        assert_in_step(client, server)


# Requests and replies


def test_cookies_come_back_as_they_were(plain: RawClient) -> None:
    for cookie in (0, 1, 2**63, 2**64 - 1):
        plain.request(CMD_READ, 0, 16, cookie=cookie)
        assert plain.simple_reply(16).cookie == cookie


def test_many_requests_in_one_packet_are_all_answered(plain: RawClient, server: Server) -> None:
    disk = content(server)
    for cookie in range(200):
        plain.request(CMD_READ, cookie * 1000, 100, cookie=cookie)
    data = {}
    for _ in range(200):
        reply = plain.simple_reply(100)
        data[reply.cookie] = reply.data
    assert data == {cookie: disk[cookie * 1000 : cookie * 1000 + 100] for cookie in range(200)}


def test_a_request_sent_byte_by_byte_is_understood(plain: RawClient, server: Server) -> None:
    request = struct.pack(">IHHQQI", 0x25609513, 0, CMD_WRITE, 5, 1000, 3) + b"abc"
    for position in range(len(request)):
        plain.send(request[position : position + 1])
    assert plain.simple_reply() == Chunk(5)
    assert content(server)[1000:1003] == b"abc"


def test_structured_reads_are_chunks_that_cover_the_range(structured: RawClient, server: Server) -> None:
    disk = content(server)
    generator = random.Random(1)
    for _ in range(50):
        length = generator.randrange(1, 100_000)
        offset = generator.randrange(0, SIZE - length)
        assert read_back(structured, offset, length)[0] == disk[offset : offset + length]


def test_structured_reads_fail_in_chunks_too(structured: RawClient, server: Server) -> None:
    structured.request(CMD_READ, SIZE, 1, cookie=4)
    (chunk,) = structured.chunks()
    assert chunk.kind in {KIND_ERROR, KIND_ERROR_OFFSET}
    error, text_length = struct.unpack_from(">IH", chunk.data)
    assert (error, chunk.cookie) == (EINVAL, 4)
    assert 0 < text_length <= 4096
    chunk.data[6 : 6 + text_length].decode()
    assert_in_step(structured, server)


def test_df_gives_one_content_chunk(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_sparse(tmp_path / "disk.img", SIZE)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(b"x" * 4096)
    server = serve(disk=disk)
    with RawClient(server) as client:
        client.go("disk", structured=True)
        data, chunks = read_back(client, MIB - 32768, 65536, FLAG_DF)
        assert len([chunk for chunk in chunks if chunk.kind != KIND_NONE]) == 1
        assert data == bytes(32768) + b"x" * 4096 + bytes(65536 - 36864)


def test_an_announced_disconnect_comes_after_every_reply(plain: RawClient) -> None:
    for cookie in range(32):
        plain.request(CMD_READ, cookie * 65536, 65536, cookie=cookie)
    plain.request(CMD_DISC)
    assert {plain.simple_reply(65536).cookie for _ in range(32)} == set(range(32))
    assert plain.is_closed()


def test_large_writes_and_reads_of_the_reference_tester_are_served(
    tmp_path: Path, serve: ServeFunction
) -> None:
    server = serve(disk=make_sparse(tmp_path / "disk.img", 64 * MIB))
    length = 49_865_728
    pattern = random.Random(3).randbytes(length)
    with RawClient(server) as client:
        client.go("disk")
        client.request(CMD_WRITE, 7, length, pattern)
        assert client.simple_reply().error == 0
        client.request(CMD_READ, 7, length)
        assert client.simple_reply(length).data == pattern


# Commands


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE, CMD_TRIM, CMD_ZEROES, CMD_CACHE, CMD_FLUSH])
def test_length_zero_does_not_end_the_connection(plain: RawClient, server: Server, command: int) -> None:
    plain.request(command, 0, 0)
    assert plain.simple_reply().error in {0, EINVAL}
    assert_in_step(plain, server)


@pytest.mark.parametrize("command", [CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_ZEROES, CMD_CACHE, CMD_READ])
def test_fua_is_accepted_on_every_command(plain: RawClient, server: Server, command: int) -> None:
    length = 0 if command == CMD_FLUSH else 512
    plain.request(command, 0, length, bytes(512) if command == CMD_WRITE else b"", flags=FLAG_FUA)
    assert plain.simple_reply(length if command == CMD_READ else 0).error == 0
    assert_in_step(plain, server)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (CMD_WRITE, FLAG_NO_HOLE),
        (CMD_WRITE, 1 << 9),
        (CMD_READ, FLAG_REQ_ONE),
        (CMD_TRIM, FLAG_FAST_ZERO),
        (CMD_CACHE, FLAG_NO_HOLE),
        (CMD_FLUSH, FLAG_DF),
        (CMD_ZEROES, FLAG_DF),
        (CMD_ZEROES, 1 << 15),
    ],
)
def test_a_flag_that_does_not_belong_there_is_einval_and_changes_nothing(
    plain: RawClient, server: Server, command: int, flags: int
) -> None:
    before = content(server)
    length = 0 if command == CMD_FLUSH else 512
    plain.request(command, 0, length, b"x" * 512 if command == CMD_WRITE else b"", flags=flags)
    assert plain.simple_reply().error == EINVAL
    assert_in_step(plain, server)
    assert content(server) == before


def test_a_flush_with_offset_or_length_is_einval(plain: RawClient, server: Server) -> None:
    for offset, length in ((512, 0), (0, 512)):
        plain.request(CMD_FLUSH, offset, length)
        assert plain.simple_reply().error == EINVAL
    assert_in_step(plain, server)


def test_an_unknown_command_is_einval_and_has_no_payload(plain: RawClient, server: Server) -> None:
    for command in (8, 9, 255, 65535):
        plain.request(command, 0, 512)
        assert plain.simple_reply().error == EINVAL
    assert_in_step(plain, server)


def test_the_payload_of_a_refused_write_is_consumed(plain: RawClient, server: Server) -> None:
    plain.request(CMD_WRITE, SIZE - 10, 100_000, bytes(100_000))
    assert plain.simple_reply().error == ENOSPC
    assert_in_step(plain, server)


@pytest.mark.parametrize("flags", [0, FLAG_NO_HOLE, FLAG_FUA, FLAG_FUA | FLAG_NO_HOLE])
def test_zeroed_ranges_read_back_zero_and_leave_their_neighbours(
    plain: RawClient, server: Server, flags: int
) -> None:
    before = content(server)
    plain.request(CMD_ZEROES, 12345, 3 * MIB, flags=flags)
    assert plain.simple_reply().error == 0
    after = content(server)
    assert after[12345 : 12345 + 3 * MIB] == bytes(3 * MIB)
    assert after[:12345] == before[:12345]
    assert after[12345 + 3 * MIB :] == before[12345 + 3 * MIB :]


def test_fast_zero_is_zero_or_refused_without_a_change(server: Server) -> None:
    before = content(server)
    offered = transmission_flags(server) & SEND_FAST_ZERO
    with RawClient(server) as client:
        client.go("disk")
        client.request(CMD_ZEROES, 0, MIB, flags=FLAG_FAST_ZERO)
        error = client.simple_reply().error
        assert error in ({0, 95} if offered else {EINVAL})
        assert content(server)[:MIB] == (bytes(MIB) if error == 0 else before[:MIB])


@pytest.mark.parametrize("command", [CMD_TRIM, CMD_ZEROES, CMD_CACHE])
def test_commands_without_payload_may_be_longer_than_the_largest_payload(
    tmp_path: Path, serve: ServeFunction, command: int
) -> None:
    server = serve(disk=make_sparse(tmp_path / "disk.img", 5 * 1024 * MIB))
    with RawClient(server) as client:
        client.go("disk")
        client.request(command, 0, 2**32 - 512)
        assert client.simple_reply().error == 0


def test_block_status_without_negotiation_or_past_the_end_is_einval(
    plain: RawClient, structured: RawClient, server: Server
) -> None:
    plain.request(CMD_STATUS, 0, 512)
    assert plain.simple_reply().error == EINVAL
    structured.request(CMD_STATUS, SIZE - 1, 2)
    assert structured.chunks()[-1].error == EINVAL
    assert_in_step(structured, server)


def status(client: RawClient, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
    """The extents of the only context."""
    client.request(CMD_STATUS, offset, length, flags=flags, cookie=3)
    chunks = client.chunks()
    (chunk,) = [chunk for chunk in chunks if chunk.kind == KIND_STATUS]
    return list(struct.iter_unpack(">II", chunk.data[4:]))


def test_block_status_follows_the_image_and_merges_neighbours(tmp_path: Path, serve: ServeFunction) -> None:
    disk = make_sparse(tmp_path / "disk.img", SIZE)
    with disk.open("r+b") as file:
        for place in (MIB, 3 * MIB):
            file.seek(place)
            file.write(b"x" * MIB)
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    for export in ("disk", "disk@s"):
        with RawClient(server) as client:
            client.go(export, contexts=("base:allocation",))
            extents = status(client, 0, SIZE)
            assert extents == [(MIB, 3), (MIB, 0), (MIB, 3), (MIB, 0), (4 * MIB, 3)]
            # All but the last sum to less than was asked; neighbours differ.
            extents = status(client, MIB + 512, MIB)
            assert sum(length for length, _ in extents[:-1]) < MIB
            assert extents[0] == (MIB - 512, 0)
            (only,) = status(client, 512, 2 * MIB, FLAG_REQ_ONE)
            assert only == (MIB - 512, 3)
            (only,) = status(client, 512, 4096, FLAG_REQ_ONE)
            assert only[0] <= 4096


# Errors and flush


def test_only_the_protocols_error_numbers_travel(server: Server) -> None:
    generator = random.Random(11)
    with RawClient(server) as client:
        client.go("disk")
        for cookie in range(300):
            command = generator.choice([CMD_TRIM, CMD_FLUSH, CMD_CACHE, CMD_ZEROES, CMD_STATUS, 40])
            offset = generator.choice([0, 1, SIZE - 1, SIZE, 2**63, 2**64 - 1])
            length = generator.choice([0, 1, 512, SIZE, 2**32 - 1])
            client.request(
                command, offset, length, flags=generator.choice([0, 1, 2, 3, 4, 8, 16, 32, 0xFFFF])
            )
            assert client.simple_reply().error in ON_THE_WIRE, cookie
        assert_in_step(client, server)


def test_what_one_connection_wrote_and_another_flushed_is_in_the_image(server: Server) -> None:
    with RawClient(server) as writer, RawClient(server, "tcp") as flusher:
        writer.go("disk")
        flusher.go("disk")
        writer.request(CMD_WRITE, 4096, 4096, b"w" * 4096)
        assert writer.simple_reply().error == 0
        flusher.request(CMD_FLUSH)
        assert flusher.simple_reply().error == 0
        flusher.request(CMD_READ, 4096, 4096)
        assert flusher.simple_reply(4096).data == b"w" * 4096
    assert content(server)[4096:8192] == b"w" * 4096


def test_stopping_answers_what_is_in_flight(server: Server) -> None:
    with RawClient(server) as client:
        client.go("disk")
        for cookie in range(64):
            client.request(CMD_WRITE, cookie * 4096, 4096, bytes([cookie]) * 4096, cookie=cookie)
        assert client.simple_reply().error == 0
        server.stop()
        answered = 1
        while (part := client.socket.recv(16, 0x100)) and len(part) == 16:
            _, error, cookie = struct.unpack(">IIQ", part)
            assert error in {0, 108}
            if error == 0:
                assert content(server)[cookie * 4096 : cookie * 4096 + 4096] == bytes([cookie]) * 4096
            answered += 1
    assert answered >= 1
