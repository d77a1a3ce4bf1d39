"""The three ways to write a reply, read back by hand; and the parsers of extended requests."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import layout, messages
from nbdbackup.nbd.constants import PAYLOAD_BYTES_ACCEPTED, Command, CommandFlags, Errno, TransmissionFlags
from nbdbackup.nbd.negotiation import ExportInfo, Negotiated
from nbdbackup.nbd.reply_encoding import ExtendedReplies, StructuredReplies
from nbdbackup.nbd.requests import Refusal, Request, StatusQuery
from nbdbackup.nbd.transmission import EXTENDED_REQUEST_BYTES, Transmission

SIZE = 1 << 62
U64 = (1 << 64) - 1
FLAGS = (
    TransmissionFlags.HAS_FLAGS
    | TransmissionFlags.SEND_FLUSH
    | TransmissionFlags.SEND_FUA
    | TransmissionFlags.SEND_TRIM
    | TransmissionFlags.SEND_WRITE_ZEROES
    | TransmissionFlags.SEND_DF
    | TransmissionFlags.SEND_CACHE
    | TransmissionFlags.SEND_FAST_ZERO
)
u64s = st.integers(0, U64)


def extended(size: int = SIZE) -> Transmission:
    export = ExportInfo("disk", "", size, FLAGS)
    return Transmission(Negotiated(export, "disk", True, ((1, "base:allocation"), (2, "x:y")), True))


@given(
    flags=st.integers(0, 0xFFFF),
    command=st.integers(0, 0xFFFF),
    cookie=u64s,
    offset=u64s,
    length=u64s,
    before=st.binary(max_size=40),
)
def test_48_extended_head_means_what_its_definition_says(
    flags: int, command: int, cookie: int, offset: int, length: int, before: bytes
) -> None:
    record = messages.Request(CommandFlags(flags), command, cookie, offset, length)
    head = messages.EXTENDED_REQUEST.build(record)
    assert len(head) == EXTENDED_REQUEST_BYTES == 32
    unpacked = Transmission.unpack_extended_request(bytearray(before + head), len(before))
    expected_flags = flags & ~0x20 if command == Command.WRITE else flags
    assert unpacked == (expected_flags, command, cookie, offset, length)


@given(head=st.binary(min_size=32, max_size=32))
def test_any_32_bytes_are_a_request_or_a_protocol_error(head: bytes) -> None:
    judge = extended()
    try:
        request = judge.unpack(bytearray(head), 0)
    except ProtocolError:
        assert head[:4] != bytes.fromhex("21e41c71")
        return
    judge.check(request)


@given(
    command=st.integers(0, 12),
    offset=u64s | st.integers(0, SIZE),
    length=u64s | st.integers(0, SIZE),
    flags=st.integers(0, 0x3F) | st.integers(0, 0xFFFF),
)
def test_nothing_extended_that_check_lets_through_is_outside_the_device(
    command: int, offset: int, length: int, flags: int
) -> None:
    judge = extended()
    request = Request(flags, command, 1, offset, length)
    if judge.check(request) is None and command != Command.DISC:
        assert 0 <= offset <= offset + length <= SIZE
        assert not flags & 0x20, "a payload length was taken for a range"
        if command in (Command.READ, Command.WRITE):
            assert length <= PAYLOAD_BYTES_ACCEPTED


@given(command=st.integers(0, 12), length=u64s | st.integers(0, 1 << 27), flags=st.integers(0, 0x3F))
def test_49_50_payload_is_told_by_the_flag_and_bounded(command: int, length: int, flags: int) -> None:
    judge = extended()
    request = Request(flags, command, 1, 0, length)
    try:
        told = judge.payload_bytes(request)
    except ProtocolError:
        assert length > PAYLOAD_BYTES_ACCEPTED
        return
    assert told == (length if command == Command.WRITE or flags & 0x20 else 0)


@given(payload=st.binary(max_size=64) | st.binary(min_size=8, max_size=20))
def test_52_any_status_payload_is_a_query_for_selected_contexts_or_refused(payload: bytes) -> None:
    request = Request(0x20, Command.BLOCK_STATUS, 1, 0, len(payload))
    found = extended().parse_status_query(request, payload)
    if isinstance(found, Refusal):
        assert found.error == Errno.EINVAL
        return
    assert isinstance(found, StatusQuery)
    assert found.request.flags == 0
    assert found.request.length == struct.unpack_from(">Q", payload)[0]
    assert set(found.context_ids) <= {1, 2}
    assert len(set(found.context_ids)) == len(found.context_ids) == (len(payload) - 8) // 4


@given(count=st.integers(1, 2), length=u64s)
def test_52_status_payload_is_read_as_it_is_written(count: int, length: int) -> None:
    payload = messages.BLOCK_STATUS_QUERY.build(messages.BlockStatusQuery(length, (2, 1)[:count]))
    assert payload == struct.pack(f">Q{count}I", length, *(2, 1)[:count])
    found = extended().parse_status_query(Request(0x28, 7, 3, 512, len(payload)), payload)
    assert found == StatusQuery(Request(8, 7, 3, 512, length), (2, 1)[:count])


@given(cookie=u64s, offset=u64s, extents=st.lists(st.tuples(u64s, u64s), min_size=1, max_size=5))
def test_51_status_chunks_have_64_bit_extents(
    cookie: int, offset: int, extents: list[tuple[int, int]]
) -> None:
    request = Request(0, Command.BLOCK_STATUS, cookie, offset, 1)
    reply = ExtendedReplies().reply_status(request, [(7, extents), (9, extents[:1])])
    for number, expected, done in ((7, extents, 0), (9, extents[:1], 1)):
        head = struct.unpack_from(">IHHQQQ", reply)
        assert head == (0x6E8A278C, done, 6, cookie, offset, 8 + 16 * len(expected))
        assert struct.unpack_from(">II", reply, 32) == (number, len(expected))
        end = 32 + head[-1]
        assert list(struct.iter_unpack(">QQ", reply[40:end])) == expected
        reply = reply[end:]
    assert reply == b""


@given(cookie=u64s, offset=st.integers(0, SIZE), length=st.integers(1, 1 << 26))
def test_62_read_heads_and_holes_are_laid_out_as_the_specification_says(
    cookie: int, offset: int, length: int
) -> None:
    request = Request(0, Command.READ, cookie, offset, length)
    encoder = ExtendedReplies()
    packed = bytearray(encoder.read_head_bytes)
    encoder.pack_read_head(packed, 0, request)
    assert packed == struct.pack(">IHHQQQQ", 0x6E8A278C, 1, 1, cookie, offset, 8 + length, offset)
    assert encoder.data_head(request, offset, length, done=True) == packed
    assert encoder.hole(request, offset + 1, length, done=False) == struct.pack(
        ">IHHQQQQI", 0x6E8A278C, 0, 2, cookie, offset, 12, offset + 1, length
    )
    structured = StructuredReplies()
    assert structured.hole(request, offset + 1, length, done=True) == struct.pack(
        ">IHHQIQI", 0x668E33EF, 1, 2, cookie, 12, offset + 1, length
    )


@pytest.mark.parametrize("offset", [None, 5000])
def test_64_extended_error_has_its_text_and_perhaps_an_offset(offset: int | None) -> None:
    request = Request(0, Command.READ, 3, 4096, 4096)
    reply = ExtendedReplies().reply_error(request, Refusal(Errno.EIO, "bad\0" + "x" * 5000, offset))
    magic, flags, kind, cookie, told, length = struct.unpack_from(">IHHQQQ", reply)
    assert (magic, flags, cookie, told) == (0x6E8A278C, 1, 3, 4096)
    assert length == len(reply) - 32
    error, text_bytes = struct.unpack_from(">IH", reply, 32)
    assert (error, text_bytes) == (5, 4096)
    assert b"\0" not in reply[38 : 38 + text_bytes]
    assert kind == (0x8001 if offset is None else 0x8002)
    assert reply[38 + text_bytes :] == (b"" if offset is None else struct.pack(">Q", 5000))


def test_layouts_of_status_agree_with_their_definitions() -> None:
    assert layout.BLOCK_STATUS_EXT_HEAD.size == messages.BLOCK_STATUS_EXT_HEAD.sizeof() == 8
    assert layout.BLOCK_STATUS_EXT_EXTENT.size == messages.BLOCK_STATUS_EXT_EXTENT.sizeof() == 16
