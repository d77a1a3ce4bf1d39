"""Extended requests and replies in the client role, and where the parser wants bytes to be received."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import replies
from nbdbackup.nbd.client import encode_request
from nbdbackup.nbd.constants import Command, CommandFlags, Errno
from nbdbackup.nbd.messages import BlockStatusExtent
from nbdbackup.nbd.reply_parser import DIRECT_BYTES_MIN, RECEIVE_BYTES, Reply, ReplyParser

COOKIE = 0x0123456789ABCDEF
OFFSET = 5 << 40
LENGTH = 6 << 30
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR = 0, 1, 2, 5, 6, 0x8001
KIB = 1 << 10


def chunk(kind: int, payload: bytes = b"", *, done: bool = True, offset: int = OFFSET) -> bytes:
    return struct.pack(">IHHQQQ", 0x6E8A278C, done, kind, COOKIE, offset, len(payload)) + payload


def data(offset: int, content: bytes) -> bytes:
    return struct.pack(">Q", offset) + content


def status(context: int, *extents: tuple[int, int], count: int | None = None) -> bytes:
    head = struct.pack(">II", context, len(extents) if count is None else count)
    return head + b"".join(struct.pack(">QQ", *extent) for extent in extents)


def parser(command: Command = Command.READ, length: int = 8) -> ReplyParser:
    made = ReplyParser(structured=True, extended=True, context_ids=[3, 4])
    made.expect(command, COOKIE, OFFSET, length)
    return made


def only(answers: list[Reply]) -> Reply:
    (reply,) = answers
    return reply


# Requests.


def test_48_extended_request_is_32_bytes_with_a_length_of_64_bits() -> None:
    raw = encode_request(Command.TRIM, COOKIE, OFFSET, LENGTH, CommandFlags.FUA, extended=True)
    assert raw == struct.pack(">IHHQQQ", 0x21E41C71, 1, 4, COOKIE, OFFSET, LENGTH)


def test_49_extended_write_says_that_its_length_is_that_of_its_payload() -> None:
    raw = encode_request(Command.WRITE, COOKIE, OFFSET, 512, CommandFlags.FUA, extended=True)
    assert raw == struct.pack(">IHHQQQ", 0x21E41C71, 1 | 1 << 5, 1, COOKIE, OFFSET, 512)


# Replies.


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
def test_read_in_extended_chunks_is_whole(piece_bytes: int) -> None:
    raw = (
        chunk(DATA, data(OFFSET + 4, b"EF"), done=False)
        + chunk(HOLE, struct.pack(">QI", OFFSET + 6, 2), done=False)
        + chunk(DATA, data(OFFSET, b"ABCD"), done=False)
        + chunk(NONE)
    )
    client, answers = parser(), []
    for position in range(0, len(raw), piece_bytes):
        answers += client.receive(raw[position : position + piece_bytes])
    assert bytes(only(answers).data) == b"ABCDEF" + bytes(2)


@pytest.mark.parametrize("command", [Command.WRITE, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES])
def test_success_and_failure_of_other_commands(command: Command) -> None:
    assert only(parser(command, LENGTH).receive(chunk(NONE))).error == 0
    error = struct.pack(">IH", Errno.ENOSPC, 4) + b"full"
    reply = only(parser(command, LENGTH).receive(chunk(ERROR, error)))
    assert (reply.error, reply.text) == (Errno.ENOSPC, "full")


def test_block_status_has_lengths_and_flags_of_64_bits() -> None:
    raw = chunk(STATUS_EXT, status(3, (5 << 30, 0), (9 << 30, 3)), done=False)
    raw += chunk(STATUS_EXT, status(4, (LENGTH, 1 << 40)))
    assert only(parser(Command.BLOCK_STATUS, LENGTH).receive(raw)).status == {
        3: (BlockStatusExtent(5 << 30, 0), BlockStatusExtent(9 << 30, 3)),
        4: (BlockStatusExtent(LENGTH, 1 << 40),),
    }


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (replies.simple_reply(COOKIE, 0), "wrong magic 0x67446698"),
        (replies.none_chunk(COOKIE), "wrong magic 0x668e33ef"),
        (chunk(NONE, offset=OFFSET + 1), "as if it were at"),
        (chunk(DATA, data(OFFSET, b"12345678"), offset=0), "as if it were at"),
        (chunk(NONE), "missing"),
        (chunk(DATA, data(OFFSET - 1, b"12345678")), "outside"),
        (chunk(DATA, data(OFFSET + 1, b"12345678")), "outside"),
        (chunk(DATA, data(OFFSET, b"1234")) + chunk(NONE), "missing"),
        (chunk(DATA, data(OFFSET, b"1234"), done=False) * 2, "twice"),
        (struct.pack(">IHHQQQ", 0x6E8A278C, 1, DATA, COOKIE, OFFSET, 1 << 63), "no sense"),
        (struct.pack(">IHHQQQ", 0x6E8A278C, 1, NONE, COOKIE, OFFSET, 1), "no sense"),
        (struct.pack(">IHHQQQ", 0x6E8A278C, 1, ERROR, COOKIE, OFFSET, 1 << 32), "no sense"),
        (struct.pack(">IHHQQQ", 0x6E8A278C, 1, NONE, 1, OFFSET, 0), "nobody asked"),
        (chunk(STATUS_EXT, status(3, (8, 0))), "no sense"),
    ],
)
def test_48_reply_that_does_not_fit_its_read_is_a_breach(raw: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        parser().receive(raw)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (chunk(STATUS, struct.pack(">III", 3, 8, 0)), "no sense"),
        (chunk(NONE), "without any status"),
        (chunk(STATUS_EXT, status(9, (8, 0))), "not agreed"),
        (chunk(STATUS_EXT, status(3, (8, 0)), done=False) * 2, "twice"),
        (chunk(STATUS_EXT, status(3, (LENGTH, 0), (1, 0))), "behind the end"),
        (chunk(STATUS_EXT, status(3, (0, 0))), "no length"),
        (chunk(STATUS_EXT, status(3)), "malformed"),
        (chunk(STATUS_EXT, b"123"), "malformed"),
        (chunk(STATUS_EXT, status(3, (8, 0)) + b"x"), "malformed"),
        (chunk(STATUS_EXT, status(3, (8, 0), count=2)), "says that it has 2 extents and has 1"),
        (struct.pack(">IHHQQQ", 0x6E8A278C, 1, STATUS_EXT, COOKIE, OFFSET, 1 << 40), "no sense"),
    ],
)
def test_51_status_that_does_not_fit_its_request_is_a_breach(raw: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        parser(Command.BLOCK_STATUS, LENGTH).receive(raw)


def test_51_status_with_64_bit_extents_is_not_for_structured_replies() -> None:
    client = ReplyParser(structured=True, context_ids=[3])
    client.expect(Command.BLOCK_STATUS, COOKIE, 0, 8)
    payload = status(3, (8, 0))
    with pytest.raises(ProtocolError, match="no sense"):
        client.receive(struct.pack(">IHHQI", 0x668E33EF, 1, STATUS_EXT, COOKIE, len(payload)) + payload)


CHUNKS = st.builds(
    chunk,
    st.sampled_from([NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR, 0x8002, 0x8099, 77]),
    st.one_of(
        st.binary(max_size=30),
        st.just(struct.pack(">QI", OFFSET, 8)),
        st.just(status(3, (4, 0), (8, 3))),
        st.just(data(OFFSET, b"12345678")),
    ),
    done=st.booleans(),
    offset=st.sampled_from([OFFSET, 0]),
)


@given(
    command=st.sampled_from([Command.READ, Command.BLOCK_STATUS, Command.WRITE]),
    raw=st.lists(st.one_of(CHUNKS, st.binary(max_size=40)), max_size=6).map(b"".join),
)
def test_garbage_ends_only_in_a_protocol_error(command: Command, raw: bytes) -> None:
    with suppress(ProtocolError):
        parser(command).receive(raw)


# Where bytes are received.


def deliver(client: ReplyParser, raw: bytes, piece_bytes: int) -> list[Reply]:
    """What a transport does: at most `piece_bytes` at once to where the parser says."""
    answers = []
    view = memoryview(raw)
    while view:
        buffer = client.get_buffer()
        count = min(len(buffer), piece_bytes, len(view))
        assert count
        buffer[:count] = view[:count]
        answers += client.received(count)
        view = view[count:]
    return answers


@pytest.mark.parametrize("extended", [False, True])
def test_data_of_a_large_read_is_received_into_the_readers_own_memory(extended: bool) -> None:
    target = bytearray(512 * KIB)
    client = ReplyParser(structured=True, extended=extended)
    client.expect(Command.READ, COOKIE, OFFSET, len(target), memoryview(target))
    if extended:
        head = struct.pack(">IHHQQQQ", 0x6E8A278C, 1, DATA, COOKIE, OFFSET, 8 + len(target), OFFSET)
    else:
        head = replies.offset_data_head(COOKIE, OFFSET, len(target))
    assert deliver(client, head + b"a" * KIB, 1 << 20) == []
    rest = client.get_buffer()
    assert len(rest) == len(target) - KIB
    rest[:] = b"b" * len(rest)
    assert target == b"a" * KIB + b"b" * len(rest)
    assert only(client.received(len(rest))).error == 0
    assert len(client.get_buffer()) == RECEIVE_BYTES
    del rest
    target.extend(b"nothing holds on to it")


@given(
    lengths=st.lists(st.sampled_from([1, 512, DIRECT_BYTES_MIN, 3 * DIRECT_BYTES_MIN + 1]), max_size=5),
    piece_bytes=st.sampled_from([1000, DIRECT_BYTES_MIN - 1, 65536, 1 << 20]),
)
def test_reads_large_and_small_are_whole_however_they_arrive(lengths: list[int], piece_bytes: int) -> None:
    client = ReplyParser(structured=True)
    raw = b""
    expected: dict[int, bytes] = {}
    for cookie, length in enumerate(lengths):
        content = bytes([cookie + 1]) * length
        client.expect(Command.READ, cookie, 0, length)
        client.expect(Command.WRITE, 100 + cookie, 0, length)
        expected |= {cookie: content, 100 + cookie: b""}
        half = length // 2
        if half:
            raw += replies.offset_data_head(cookie, half, length - half, done=False) + content[half:]
        raw += replies.simple_reply(100 + cookie, 0)
        raw += replies.offset_data_head(cookie, 0, half or length) + content[: half or length]
    answers = deliver(client, raw, piece_bytes)
    assert {reply.cookie: bytes(reply.data) for reply in answers} == expected
    assert client.outstanding == 0
