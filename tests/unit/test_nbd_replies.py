"""Replies, encoded by the server and joined by the client; a number is that of the conformance list."""

import errno
import random
import struct
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import replies
from nbdbackup.nbd.client import encode_request
from nbdbackup.nbd.constants import Command, CommandFlags, Errno, ReplyType
from nbdbackup.nbd.messages import BlockStatusExtent
from nbdbackup.nbd.reply_parser import FRAGMENTS_MAX, Reply, ReplyParser

COOKIE = 0x0123456789ABCDEF


def data_chunk(offset: int, data: bytes, *, done: bool = True, cookie: int = COOKIE) -> bytes:
    return replies.offset_data_head(cookie, offset, len(data), done=done) + data


def parser(command: Command = Command.READ, offset: int = 100, length: int = 8) -> ReplyParser:
    made = ReplyParser(structured=True, context_ids=[3, 4])
    made.expect(command, COOKIE, offset, length)
    return made


def only(answers: list[Reply]) -> Reply:
    (reply,) = answers
    return reply


# Encoders, against the specification's bytes.


def test_request_is_28_bytes_in_network_order() -> None:
    raw = encode_request(Command.WRITE, COOKIE, 1 << 40, 512, CommandFlags.FUA)
    assert raw == struct.pack(">IHHQQI", 0x25609513, 1, 1, COOKIE, 1 << 40, 512)


def test_simple_reply_echoes_the_cookie() -> None:
    assert replies.simple_reply(COOKIE, Errno.ENOSPC) == struct.pack(">IIQ", 0x67446698, 28, COOKIE)


def test_61_none_chunk_is_empty_and_done() -> None:
    assert replies.none_chunk(COOKIE) == struct.pack(">IHHQI", 0x668E33EF, 1, 0, COOKIE, 0)


def test_62_data_and_hole_chunks_carry_their_offset() -> None:
    head = replies.offset_data_head(COOKIE, 7, 100)
    assert head == struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, COOKIE, 108, 7)
    hole = replies.offset_hole_chunk(COOKIE, 7, 100, done=False)
    assert hole == struct.pack(">IHHQIQI", 0x668E33EF, 0, 2, COOKIE, 12, 7, 100)


def test_64_error_chunks_carry_text_cut_to_a_legal_string() -> None:
    chunk = replies.error_chunk(COOKIE, Errno.EIO, "broken")
    assert chunk == struct.pack(">IHHQIIH", 0x668E33EF, 1, 32769, COOKIE, 12, 5, 6) + b"broken"
    chunk = replies.error_offset_chunk(COOKIE, Errno.EIO, "é" * 3000, 9)
    assert chunk == (
        struct.pack(">IHHQIIH", 0x668E33EF, 1, 32770, COOKIE, 14 + 4096, 5, 4096)
        + ("é" * 2048).encode()
        + struct.pack(">Q", 9)
    )
    assert (
        replies.parse_error(ReplyType.ERROR, replies.error_chunk(1, Errno.EIO, "a\0b")[20:]).text
        == "a\ufffdb"
    )


def test_74_block_status_chunk_lists_the_extents() -> None:
    chunk = replies.block_status_chunk(COOKIE, 3, [(512, 0), (4096, 3)])
    assert chunk == struct.pack(">IHHQIIIIII", 0x668E33EF, 1, 5, COOKIE, 20, 3, 512, 0, 4096, 3)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EPERM, 1),
        (errno.EROFS, 1),
        (errno.EACCES, 1),
        (errno.EIO, 5),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EOVERFLOW, 22),
        (errno.EOPNOTSUPP, 22),
        (errno.ESHUTDOWN, 108),
        (errno.ETIMEDOUT, 5),
        (errno.EAGAIN, 5),
        (None, 5),
        (0, 5),
    ],
)
def test_81_host_errors_become_the_protocol_s(number: int | None, expected: int) -> None:
    assert replies.wire_errno(number) == expected


def test_81_some_errors_answer_only_the_flag_that_asks_for_them() -> None:
    assert replies.wire_errno(errno.EOPNOTSUPP, fast_zero=True) is Errno.ENOTSUP
    assert replies.wire_errno(errno.EOVERFLOW, df=True) is Errno.EOVERFLOW


@given(number=st.integers(0, 200), fast_zero=st.booleans(), df=st.booleans())
def test_82_only_the_protocol_s_errors_reach_the_wire(number: int, fast_zero: bool, df: bool) -> None:
    assert replies.wire_errno(number, fast_zero=fast_zero, df=df) in {1, 5, 12, 22, 28, 75, 95, 108}


@given(text=st.text())
def test_the_words_of_a_peer_are_shown_on_one_line_and_move_no_terminal(text: str) -> None:
    assert replies.shown_text(text).isprintable()
    assert replies.shown_text("disk \u00fcber\n\x1b[2J") == "disk \u00fcber \\x1b[2J"


# The parser.


def test_simple_replies_come_in_any_order_with_their_data() -> None:
    client = ReplyParser(structured=False)
    client.expect(Command.READ, 1, 0, 4)
    client.expect(Command.WRITE, 2, 0, 4)
    client.expect(Command.READ, 3, 0, 2)
    raw = replies.simple_reply(2, 0) + replies.simple_reply(3, 0) + b"ab" + replies.simple_reply(1, Errno.EIO)
    answers = client.receive(raw)
    assert [(reply.cookie, reply.error) for reply in answers] == [(2, 0), (3, 0), (1, 5)]
    assert bytes(answers[1].data) == b"ab"
    assert client.outstanding == 0


@pytest.mark.parametrize("piece_bytes", [1, 3, 1000])
def test_59_chunks_of_different_reads_may_mix(piece_bytes: int) -> None:
    client = parser()
    target = bytearray(b"x" * 10)
    client.expect(Command.READ, 2, 0, 10, memoryview(target))
    raw = (
        data_chunk(104, b"EFGH", done=False)
        + replies.offset_hole_chunk(2, 4, 6, done=False)
        + data_chunk(100, b"ABCD", done=False)
        + data_chunk(0, b"abcd", cookie=2)
        + replies.none_chunk(COOKIE)
    )
    answers = []
    for position in range(0, len(raw), piece_bytes):
        answers += client.receive(raw[position : position + piece_bytes])
    assert [(reply.cookie, bytes(reply.data)) for reply in answers] == [
        (2, b"abcd" + bytes(6)),
        (COOKIE, b"ABCDEFGH"),
    ]
    assert target == b"abcd" + bytes(6)


def test_read_of_nothing_is_answered_by_nothing() -> None:
    assert only(parser(length=0).receive(replies.none_chunk(COOKIE))).error == 0


def test_error_after_data_makes_the_whole_read_fail_with_its_text() -> None:
    client = parser()
    raw = data_chunk(100, b"ABCD", done=False) + replies.error_offset_chunk(
        COOKIE, Errno.EIO, "bad sector", 104, done=False
    )
    assert client.receive(raw) == []
    reply = only(client.receive(replies.none_chunk(COOKIE)))
    assert (reply.error, reply.text) == (5, "bad sector")


def test_unknown_error_chunk_is_an_error_all_the_same() -> None:
    raw = struct.pack(">IHHQII", 0x668E33EF, 1, 0x8123, COOKIE, 4, 22)
    assert only(parser().receive(raw)).error == 22


@pytest.mark.parametrize("command", [Command.WRITE, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES])
def test_command_without_data_may_be_answered_either_way(command: Command) -> None:
    assert only(parser(command).receive(replies.simple_reply(COOKIE, 0))).error == 0
    assert only(parser(command).receive(replies.none_chunk(COOKIE))).error == 0
    assert only(parser(command).receive(replies.error_chunk(COOKIE, Errno.ENOSPC, "full"))).text == "full"


def test_block_status_is_joined_over_its_contexts() -> None:
    raw = replies.block_status_chunk(COOKIE, 3, [(4, 0), (100, 3)], done=False)
    raw += replies.block_status_chunk(COOKIE, 4, [(8, 1)])
    reply = only(parser(Command.BLOCK_STATUS).receive(raw))
    assert reply.status == {
        3: (BlockStatusExtent(4, 0), BlockStatusExtent(100, 3)),
        4: (BlockStatusExtent(8, 1),),
    }


def chunk(kind: int, payload: bytes, flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, COOKIE, len(payload)) + payload


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\0" * 16, "magic"),
        (replies.none_chunk(1), "nobody asked"),
        (replies.simple_reply(1, 0), "nobody asked"),
        (replies.simple_reply(COOKIE, 0) + bytes(8), "simple reply"),
        (replies.none_chunk(COOKIE), "missing"),
        (data_chunk(100, b"1234567"), "missing"),
        (data_chunk(99, b"12345678"), "outside"),
        (data_chunk(101, b"12345678"), "outside"),
        (data_chunk(100, b"123456789"), "no sense"),
        (replies.offset_hole_chunk(COOKIE, 100, 9), "outside"),
        (chunk(2, struct.pack(">QI", 100, 0)), "outside"),
        (data_chunk(100, b"1234", done=False) + data_chunk(103, b"1"), "twice"),
        (data_chunk(104, b"1234", done=False) + data_chunk(100, b"12345"), "twice"),
        (data_chunk(102, b"12", done=False) + replies.offset_hole_chunk(COOKIE, 100, 8), "twice"),
        (chunk(0, b"x"), "no sense"),
        (chunk(0, b"", flags=0), "no sense"),
        (chunk(1, bytes(8)), "no sense"),
        (chunk(2, bytes(11)), "no sense"),
        (chunk(5, bytes(12)), "no sense"),
        (chunk(6, bytes(24)), "no sense"),
        (chunk(77, b""), "no sense"),
        (chunk(0x8001, b""), "cut short"),
        (chunk(0x8001, struct.pack(">IH", 0, 0)), "error 0"),
        (chunk(0x8001, struct.pack(">IH", 5, 9)), "cut short"),
        (chunk(0x8001, bytes(5000)), "no sense"),
    ],
)
def test_62_reply_that_does_not_fit_its_read_is_a_breach(raw: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        parser().receive(raw)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (replies.none_chunk(COOKIE), "without any status"),
        (replies.simple_reply(COOKIE, 0), "without any status"),
        (replies.block_status_chunk(COOKIE, 9, [(8, 0)]), "not agreed"),
        (replies.block_status_chunk(COOKIE, 3, [(8, 0)], done=False) * 2, "twice"),
        (replies.block_status_chunk(COOKIE, 3, [(8, 0), (1, 1)]), "behind the end"),
        (replies.block_status_chunk(COOKIE, 3, [(0, 0)]), "no length"),
        (chunk(5, bytes(4)), "malformed"),
        (chunk(5, bytes(13)), "malformed"),
        (chunk(1, bytes(9)), "no sense"),
        (struct.pack(">IHHQI", 0x668E33EF, 1, 5, COOKIE, 0xFFFFFFFF), "no sense"),
    ],
)
def test_74_status_that_does_not_fit_its_request_is_a_breach(raw: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        parser(Command.BLOCK_STATUS).receive(raw)


def test_structured_chunk_that_was_not_agreed_is_a_breach() -> None:
    client = ReplyParser(structured=False)
    client.expect(Command.WRITE, COOKIE, 0, 8)
    with pytest.raises(ProtocolError, match="magic"):
        client.receive(replies.none_chunk(COOKIE))


def test_read_scattered_into_too_many_pieces_is_a_breach() -> None:
    client = parser(offset=0, length=4 * FRAGMENTS_MAX)
    raw = b"".join(data_chunk(2 * index, b"x", done=False) for index in range(FRAGMENTS_MAX + 1))
    with pytest.raises(ProtocolError, match="scattered"):
        client.receive(raw)


@settings(deadline=None)
@given(
    cuts=st.sets(st.integers(1, 63), max_size=12),
    order=st.randoms(use_true_random=False),
    piece=st.integers(1, 90),
)
def test_read_in_any_chunks_in_any_order_and_pieces_is_whole(
    cuts: set[int], order: random.Random, piece: int
) -> None:
    content = bytes(range(1, 65))
    edges = [0, *sorted(cuts), 64]
    spans = list(pairwise(edges))
    order.shuffle(spans)
    raw = b"".join(data_chunk(1000 + start, content[start:end], done=False) for start, end in spans)
    raw += replies.none_chunk(COOKIE)
    client = parser(offset=1000, length=64)
    answers = []
    for position in range(0, len(raw), piece):
        answers += client.receive(raw[position : position + piece])
    assert bytes(only(answers).data) == content


CHUNKS = st.builds(
    lambda kind, payload, flags: chunk(kind, payload, flags),
    st.sampled_from([0, 1, 2, 5, 6, 0x8001, 0x8002, 0x8099]),
    st.one_of(
        st.binary(max_size=30), st.just(struct.pack(">QI", 100, 8)), st.just(struct.pack(">III", 3, 8, 0))
    ),
    st.integers(0, 1),
)


@settings(deadline=None)
@given(
    command=st.sampled_from([Command.READ, Command.BLOCK_STATUS, Command.WRITE]),
    raw=st.lists(st.one_of(CHUNKS, st.binary(max_size=40)), max_size=6).map(b"".join),
)
def test_garbage_ends_only_in_a_protocol_error(command: Command, raw: bytes) -> None:
    with suppress(ProtocolError):
        parser(command).receive(raw)
