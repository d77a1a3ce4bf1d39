"""Which requests the server refuses, and with what; a number is that of the conformance list."""

import pytest

from nbdbackup.nbd.constants import Command, CommandFlags, Errno, TransmissionFlags
from nbdbackup.nbd.negotiation import ExportInfo, Negotiated
from nbdbackup.nbd.requests import Request
from nbdbackup.nbd.transmission import Transmission

EVERYTHING = (
    TransmissionFlags.HAS_FLAGS
    | TransmissionFlags.SEND_FLUSH
    | TransmissionFlags.SEND_FUA
    | TransmissionFlags.SEND_TRIM
    | TransmissionFlags.SEND_WRITE_ZEROES
    | TransmissionFlags.SEND_DF
    | TransmissionFlags.SEND_CACHE
    | TransmissionFlags.SEND_FAST_ZERO
)


def transmission(
    flags: TransmissionFlags = EVERYTHING, size: int = 1 << 20, minimum: int = 1
) -> Transmission:
    export = ExportInfo("disk", "", size, flags, minimum, max(4096, minimum))
    return Transmission(Negotiated(export, "disk", True, ((1, "base:allocation"),)))


def error_of(judge: Transmission, command: int, offset: int, length: int, flags: int = 0) -> Errno | None:
    refusal = judge.check(Request(flags, command, 7, offset, length))
    return None if refusal is None else refusal.error


@pytest.mark.parametrize("command", [*range(2), *range(3, 8)])
@pytest.mark.parametrize("bit", range(5, 16))
def test_76_flag_that_the_protocol_does_not_define_is_invalid(command: int, bit: int) -> None:
    length = 0 if command == Command.FLUSH else 512
    assert error_of(transmission(), command, 0, length) is None
    assert error_of(transmission(), command, 0, length, 1 << bit) is Errno.EINVAL


@pytest.mark.parametrize("command", [*range(2), *range(3, 8)])
def test_76_fua_is_accepted_on_any_command_where_it_is_offered(command: int) -> None:
    length = 0 if command == Command.FLUSH else 512
    assert error_of(transmission(), command, 0, length, CommandFlags.FUA) is None
    without = transmission(EVERYTHING & ~TransmissionFlags.SEND_FUA)
    assert error_of(without, command, 0, length, CommandFlags.FUA) is Errno.EINVAL


@pytest.mark.parametrize("command", [8, 9, 255, 0xFFFF])
def test_77_unknown_command_is_invalid_and_has_no_payload(command: int) -> None:
    assert error_of(transmission(), command, 0, 512) is Errno.EINVAL
    assert transmission().payload_bytes(Request(0, command, 7, 0, 512)) == 0


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (Command.READ, Errno.EINVAL),
        (Command.WRITE, Errno.ENOSPC),
        (Command.TRIM, Errno.EINVAL),
        (Command.CACHE, Errno.EINVAL),
        (Command.WRITE_ZEROES, Errno.ENOSPC),
        (Command.BLOCK_STATUS, Errno.EINVAL),
    ],
)
@pytest.mark.parametrize(("offset", "length"), [((1 << 20) - 1, 2), (1 << 20, 1), ((1 << 64) - 1, 1)])
def test_78_request_past_the_end_gets_its_command_s_error(
    command: Command, expected: Errno, offset: int, length: int
) -> None:
    assert error_of(transmission(), command, offset, length) is expected


@pytest.mark.parametrize("command", [Command.WRITE, Command.WRITE_ZEROES, Command.TRIM])
def test_79_writing_to_a_read_only_export_is_not_permitted(command: Command) -> None:
    read_only = transmission(EVERYTHING | TransmissionFlags.READ_ONLY)
    assert error_of(read_only, command, 0, 512) is Errno.EPERM
    assert error_of(read_only, Command.READ, 0, 512) is None


def test_80_request_not_aligned_to_the_minimum_is_invalid() -> None:
    judge = transmission(minimum=512)
    assert error_of(judge, Command.READ, 512, 512) is None
    assert error_of(judge, Command.READ, 1, 512) is Errno.EINVAL
    assert error_of(judge, Command.WRITE, 512, 511) is Errno.EINVAL


def test_68_flush_with_a_range_is_invalid() -> None:
    assert error_of(transmission(), Command.FLUSH, 0, 0) is None
    assert error_of(transmission(), Command.FLUSH, 0, 1) is Errno.EINVAL
    assert error_of(transmission(), Command.FLUSH, 1, 0) is Errno.EINVAL
