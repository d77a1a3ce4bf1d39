"""Which requests are refused, and how: the conformance list's numbers are in the test ids and comments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import layout, messages
from nbdbackup.nbd.client import encode_request
from nbdbackup.nbd.constants import (
    BASE_ALLOCATION,
    PAYLOAD_BYTES_ACCEPTED,
    Command,
    CommandFlags,
    Errno,
    TransmissionFlags,
)
from nbdbackup.nbd.negotiation import ExportInfo, Negotiated
from nbdbackup.nbd.reply_parser import Reply, ReplyParser
from nbdbackup.nbd.requests import Refusal, Request
from nbdbackup.nbd.transmission import REQUEST_BYTES, Transmission

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 1 * MIB + 513
COOKIE = 0xFEDCBA9876543210

ALL = (
    TransmissionFlags.HAS_FLAGS
    | TransmissionFlags.SEND_FLUSH
    | TransmissionFlags.SEND_FUA
    | TransmissionFlags.SEND_TRIM
    | TransmissionFlags.SEND_WRITE_ZEROES
    | TransmissionFlags.SEND_DF
    | TransmissionFlags.SEND_CACHE
    | TransmissionFlags.SEND_FAST_ZERO
)
FUA, DF, NO_HOLE = CommandFlags.FUA, CommandFlags.DF, CommandFlags.NO_HOLE
REQ_ONE, FAST_ZERO = CommandFlags.REQ_ONE, CommandFlags.FAST_ZERO
RANGED = (
    Command.READ,
    Command.WRITE,
    Command.TRIM,
    Command.CACHE,
    Command.WRITE_ZEROES,
    Command.BLOCK_STATUS,
)


def transmission(
    *,
    size: int = SIZE,
    flags: TransmissionFlags = ALL,
    structured: bool = True,
    contexts: tuple[tuple[int, str], ...] = ((1, BASE_ALLOCATION),),
    block_size_min: int = 1,
) -> Transmission:
    export = ExportInfo("disk", "", size, flags, block_size_min=block_size_min)
    return Transmission(Negotiated(export, "disk", structured, contexts))


def request(command: int, offset: int = 0, length: int = 512, flags: int = 0) -> Request:
    return Request(flags, command, COOKIE, offset, length)


def error_of(refusal: Refusal | None) -> Errno:
    return Errno.OK if refusal is None else refusal.error


@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        (Command.READ, FUA | DF),
        (Command.WRITE, FUA),
        (Command.TRIM, FUA),
        (Command.CACHE, FUA),  # 70
        (Command.WRITE_ZEROES, FUA | NO_HOLE | FAST_ZERO),
        (Command.BLOCK_STATUS, FUA | REQ_ONE),
        (Command.FLUSH, FUA),
    ],
)
def test_76_each_command_takes_its_own_flags_and_no_others(command: Command, allowed: CommandFlags) -> None:
    judge = transmission()
    length = 0 if command is Command.FLUSH else 512
    for bit in range(16):
        flag = 1 << bit
        expected = Errno.OK if flag & allowed else Errno.EINVAL
        assert error_of(judge.check(request(command, 0, length, flag))) == expected, f"flag {flag:#x}"
    assert judge.check(request(command, 0, length, int(allowed))) is None


@pytest.mark.parametrize("command", [*RANGED, Command.FLUSH])
def test_76_fua_is_refused_where_it_was_not_advertised(command: Command) -> None:
    judge = transmission(flags=ALL & ~TransmissionFlags.SEND_FUA)
    length = 0 if command is Command.FLUSH else 512
    assert error_of(judge.check(request(command, 0, length, FUA))) == Errno.EINVAL


@pytest.mark.parametrize(
    ("command", "flag", "advertised_by"),
    [
        (Command.READ, DF, TransmissionFlags.SEND_DF),
        (Command.WRITE_ZEROES, FAST_ZERO, TransmissionFlags.SEND_FAST_ZERO),  # 72
    ],
)
def test_72_76_a_flag_that_was_not_offered_is_refused(
    command: Command, flag: CommandFlags, advertised_by: TransmissionFlags
) -> None:
    assert transmission().check(request(command, flags=flag)) is None
    refusal = transmission(flags=ALL & ~advertised_by).check(request(command, flags=flag))
    assert error_of(refusal) == Errno.EINVAL


@pytest.mark.parametrize(
    ("command", "advertised_by"),
    [
        (Command.FLUSH, TransmissionFlags.SEND_FLUSH),
        (Command.TRIM, TransmissionFlags.SEND_TRIM),
        (Command.CACHE, TransmissionFlags.SEND_CACHE),
        (Command.WRITE_ZEROES, TransmissionFlags.SEND_WRITE_ZEROES),
    ],
)
def test_55_a_command_that_was_not_offered_is_refused(
    command: Command, advertised_by: TransmissionFlags
) -> None:
    refusal = transmission(flags=ALL & ~advertised_by).check(request(command, 0, 0))
    assert error_of(refusal) == Errno.EINVAL


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SIZE, 1),
        (SIZE - 1, 2),
        (0, SIZE + 1),
        (SIZE + 1, 0),
        ((1 << 64) - 1, 1),  # the sum would be 0 if it wrapped
        ((1 << 64) - 512, 1024),
        ((1 << 63) - 1, 4096),
        (0, (1 << 32) - 1),
        ((1 << 64) - 1, (1 << 32) - 1),
    ],
)
def test_78_a_range_past_the_end_is_refused_and_never_wraps(
    command: Command, offset: int, length: int
) -> None:
    expected = Errno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL
    assert error_of(transmission().check(request(command, offset, length))) == expected


@pytest.mark.parametrize("command", RANGED)
def test_78_the_last_byte_can_be_reached(command: Command) -> None:
    judge = transmission()
    assert judge.check(request(command, SIZE - 1, 1)) is None
    assert judge.check(request(command, 0, SIZE)) is None


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize("offset", [0, SIZE])
def test_66_length_0_is_carried_out_or_refused_but_never_more(command: Command, offset: int) -> None:
    refusal = transmission().check(request(command, offset, 0))
    # There is no status of nothing; the others have nothing to do.
    assert error_of(refusal) == (Errno.EINVAL if command is Command.BLOCK_STATUS else Errno.OK)


@pytest.mark.parametrize("command", [Command.WRITE, Command.WRITE_ZEROES, Command.TRIM])
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (0, 0), (SIZE, 512)])
def test_54_79_every_change_of_a_read_only_export_is_eperm(
    command: Command, offset: int, length: int
) -> None:
    judge = transmission(flags=ALL | TransmissionFlags.READ_ONLY)
    assert error_of(judge.check(request(command, offset, length))) == Errno.EPERM


@pytest.mark.parametrize("command", [Command.READ, Command.CACHE, Command.BLOCK_STATUS])
def test_79_a_read_only_export_can_be_read(command: Command) -> None:
    assert transmission(flags=ALL | TransmissionFlags.READ_ONLY).check(request(command)) is None


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(("offset", "length", "fits"), [(512, 512, True), (1, 512, False), (512, 511, False)])
def test_80_what_is_not_aligned_to_the_advertised_minimum_is_refused(
    command: Command, offset: int, length: int, fits: bool
) -> None:
    judge = transmission(size=MIB, block_size_min=512)
    assert error_of(judge.check(request(command, offset, length))) == (Errno.OK if fits else Errno.EINVAL)


@pytest.mark.parametrize("command", [8, 9, 0x7FFF, 0xFFFF])
def test_77_an_unknown_command_is_refused_and_has_no_payload(command: int) -> None:
    unknown = request(command, 0, 512)
    assert error_of(transmission().check(unknown)) == Errno.EINVAL
    assert transmission().payload_bytes(unknown) == 0


@pytest.mark.parametrize(("offset", "length", "fits"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_68_flush_takes_no_range(offset: int, length: int, fits: bool) -> None:
    refusal = transmission().check(request(Command.FLUSH, offset, length))
    assert error_of(refusal) == (Errno.OK if fits else Errno.EINVAL)


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
def test_83_84_a_payload_over_the_limit_is_refused_cleanly(command: Command) -> None:
    judge = transmission(size=8 * GIB)
    assert judge.check(request(command, 0, 49_865_728)) is None  # what the reference tester sends
    assert judge.check(request(command, 0, PAYLOAD_BYTES_ACCEPTED)) is None
    assert error_of(judge.check(request(command, 0, PAYLOAD_BYTES_ACCEPTED + 1))) == Errno.EINVAL


@pytest.mark.parametrize("command", [Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS])
def test_69_73_a_range_without_payload_may_be_longer_than_any_payload(command: Command) -> None:
    assert transmission(size=8 * GIB).check(request(command, 0, 4 * GIB - 512)) is None


def test_75_block_status_without_a_context_is_refused() -> None:
    assert error_of(transmission(contexts=()).check(request(Command.BLOCK_STATUS))) == Errno.EINVAL


def test_67_only_a_write_has_a_payload_refused_or_not() -> None:
    judge = transmission()
    assert judge.payload_bytes(request(Command.WRITE, SIZE, 4096)) == 4096
    assert all(judge.payload_bytes(request(command)) == 0 for command in Command if command != Command.WRITE)


def test_58_a_wrong_magic_ends_the_connection() -> None:
    head = bytearray(encode_request(Command.READ, COOKIE, 0, 512))
    head[0] ^= 1
    with pytest.raises(ProtocolError, match="magic"):
        Transmission.unpack_request(head, 0)


@given(
    flags=st.integers(0, 0xFFFF),
    command=st.integers(0, 0xFFFF),
    cookie=st.integers(0, (1 << 64) - 1),
    offset=st.integers(0, (1 << 64) - 1),
    length=st.integers(0, (1 << 32) - 1),
    before=st.binary(max_size=40),
)
def test_a_request_head_means_what_its_definition_says(
    flags: int, command: int, cookie: int, offset: int, length: int, before: bytes
) -> None:
    head = messages.REQUEST.build(messages.Request(CommandFlags(flags), command, cookie, offset, length))
    assert len(head) == REQUEST_BYTES
    unpacked = Transmission.unpack_request(bytearray(before + head), len(before))
    assert unpacked == (flags, command, cookie, offset, length)


_edges = st.sampled_from([0, 1, 511, 512, 4096, SIZE - 1, SIZE, SIZE + 1, (1 << 32) - 1])


@given(
    command=st.integers(0, 9),
    offset=_edges | st.sampled_from([(1 << 64) - 1, (1 << 64) - 512]) | st.integers(0, 2 * SIZE),
    length=_edges | st.integers(0, 2 * SIZE),
    flags=st.just(0) | st.integers(0, 0xFFFF),
    read_only=st.booleans(),
    block_size_min=st.sampled_from([1, 512, 4096]),
)
def test_the_fast_path_of_check_agrees_with_its_rules(
    command: int, offset: int, length: int, flags: int, read_only: bool, block_size_min: int
) -> None:
    advertised = ALL | TransmissionFlags.READ_ONLY if read_only else ALL
    judge = transmission(flags=advertised, block_size_min=block_size_min)
    asked = request(command, offset, length, flags)
    # A flag that never matters for READ and WRITE keeps `check` off its fast path.
    slow = judge.check(asked._replace(flags=flags | FUA))
    assert error_of(judge.check(asked)) == error_of(slow)


@given(
    command=st.integers(0, 0xFFFF),
    offset=st.integers(0, (1 << 64) - 1) | st.integers(0, SIZE),
    length=st.integers(0, (1 << 32) - 1) | st.integers(0, SIZE),
    flags=st.integers(0, 0xFFFF) | st.just(0),
    advertised=st.integers(0, 0x1FFF),
)
def test_nothing_that_check_lets_through_is_outside_the_device(
    command: int, offset: int, length: int, flags: int, advertised: int
) -> None:
    judge = transmission(flags=TransmissionFlags(advertised))
    if judge.check(request(command, offset, length, flags)) is None and command != Command.DISC:
        assert command in set(Command)
        assert 0 <= offset <= offset + length <= SIZE


# Replies, as the client role reads them.


def answer(
    judge: Transmission, asked: Request, reply: bytes, *, context_ids: tuple[int, ...] = (1,)
) -> Reply:
    """What a client understands of `reply`, which has to be one whole reply and nothing more."""
    parser = ReplyParser(structured=judge.structured, context_ids=context_ids)
    parser.expect(Command(asked.command), asked.cookie, asked.offset, asked.length)
    (understood,) = parser.receive(reply)
    return understood


@pytest.mark.parametrize("structured", [False, True])
def test_a_read_reply_carries_its_data_behind_its_head(structured: bool) -> None:
    judge = transmission(structured=structured)
    asked = request(Command.READ, 4096, 512)
    reply = bytearray(7 + judge.read_head_bytes)
    judge.pack_read_head(reply, 7, asked)
    understood = answer(judge, asked, bytes(reply[7:]) + b"x" * 512)
    assert (understood.error, bytes(understood.data)) == (0, b"x" * 512)
    if structured:
        assert len(reply) - 7 == layout.OFFSET_DATA_CHUNK.size


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM])
def test_39_61_success_without_data_is_one_whole_reply(structured: bool, command: Command) -> None:
    judge = transmission(structured=structured)
    asked = request(command, 0, 0)
    assert answer(judge, asked, judge.reply_done(asked)).error == 0


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.BLOCK_STATUS])
def test_60_errors_carry_text_where_replies_are_structured(command: Command) -> None:
    judge = transmission(structured=True)
    asked = request(command)
    understood = answer(judge, asked, judge.reply_error(asked, Refusal(Errno.ENOSPC, "the disk is full")))
    assert (understood.error, understood.text) == (Errno.ENOSPC, "the disk is full")


def test_60_errors_are_simple_where_replies_are() -> None:
    judge = transmission(structured=False)
    asked = request(Command.READ)
    understood = answer(judge, asked, judge.reply_error(asked, Refusal(Errno.EIO, "never sent")))
    assert (understood.error, understood.text) == (Errno.EIO, "")


def test_74_block_status_sends_one_chunk_for_each_context() -> None:
    judge = transmission(contexts=((1, BASE_ALLOCATION), (7, "x:y")))
    asked = request(Command.BLOCK_STATUS, 0, 2048)
    reply = judge.reply_status(asked, [(1, [(512, 0), (1024, 3)]), (7, [(2048, 9)])])
    understood = answer(judge, asked, reply, context_ids=(1, 7))
    assert {id_: [(e.length, e.flags) for e in found] for id_, found in understood.status.items()} == {
        1: [(512, 0), (1024, 3)],
        7: [(2048, 9)],
    }
