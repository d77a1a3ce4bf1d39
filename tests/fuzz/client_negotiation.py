"""What a server sends before there is an export: `nbd/client.py` and `nbd/client_inquiry.py`.

An answer has to go with what was asked, so the stream is made while a client listens; then it is
played to others, whole and in pieces.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from nbdbackup.errors import NbdBackupError, NotFoundError, ProtocolError
from nbdbackup.nbd.client import ClientNegotiation
from nbdbackup.nbd.client_inquiry import CONTEXTS_MAX, ClientInquiry
from nbdbackup.nbd.client_options import REPLIES_PER_OPTION_MAX, REPLY_BYTES_MAX, OptionExchange
from nbdbackup.nbd.constants import BASE_ALLOCATION, STRING_BYTES_MAX, OptionReply
from tests.fuzz.decoder import Cut, FuzzInput, in_pieces, is_one_line, is_time_to_measure, kept_bytes, whole
from tests.support import nbd_wire as wire

KEPT_BYTES_MAX = REPLY_BYTES_MAX + (64 << 10)
"""Of a negotiation: one reply's payload, and the strings and contexts of one export."""
INQUIRY_KEPT_BYTES_MAX = KEPT_BYTES_MAX + (2 * REPLIES_PER_OPTION_MAX + CONTEXTS_MAX) * (
    STRING_BYTES_MAX + 200
)

_REPEATED_BYTES_MAX = 300
_GREETINGS = (3, 3, 3, 3, 1, 2, 0, 0xFFFF)
_NAMES = (b"disk", b"", b"other", b"d\0", b"\xff", b"n" * 4097)
_CONTEXTS = (BASE_ALLOCATION.encode(), b"qemu:dirty-bitmap:b0", b"x:unasked", b"", b"\xff")
_ERRORS = (
    OptionReply.ERR_UNSUP,
    OptionReply.ERR_UNKNOWN,
    OptionReply.ERR_TLS_REQD,
    OptionReply.ERR_POLICY,
    OptionReply.ERR_BLOCK_SIZE_REQD,
    0xFFFFFFFF,
)
_SIZES = (1 << 20, 0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_BLOCKS = (1, 512, 4096, 65_536, 0, 3, 131_072, 1 << 25, (1 << 32) - 1)

Exchange = TypeVar("Exchange", bound=OptionExchange)


@dataclass(slots=True)
class _Outcome:
    """What the client asked, and how it ended; `learnt` is what it will tell of the server."""

    end: str
    learnt: str = ""
    asked: bytearray = field(default_factory=bytearray)
    leftover: bytes = b""


def client(data: bytes) -> str:
    """A server that negotiates an export."""
    source = FuzzInput(data)
    want_extended, want_structured, want_contexts = not source.flag(), not source.flag(), not source.flag()
    tls = source.below(8) == 7
    contexts = (BASE_ALLOCATION, "qemu:dirty-bitmap:b0") if want_contexts else ()

    def make() -> ClientNegotiation:
        return ClientNegotiation(
            "disk",
            want_structured=want_structured,
            want_extended=want_extended,
            contexts=contexts,
            tls=tls,
        )

    return _compare(source, make, lambda machine: repr(machine.result), KEPT_BYTES_MAX)


def inquiry(data: bytes) -> str:
    """A server that tells what it has."""
    source = FuzzInput(data)
    names = source.choose((None, None, ("disk",), ("disk", "", "x" * 4096), ()))
    tls = source.below(8) == 7

    def make() -> ClientInquiry:
        return ClientInquiry(names, tls=tls)

    def learnt(machine: ClientInquiry) -> str:
        return repr((machine.descriptions, machine.contexts))

    return _compare(source, make, learnt, INQUIRY_KEPT_BYTES_MAX)


def _compare(
    source: FuzzInput, make: Callable[[], Exchange], learnt: Callable[[Exchange], str], kept_max: int
) -> str:
    parts = _converse(source, make())
    outcomes = [_run(make(), parts, cut, learnt, kept_max) for cut in (whole, in_pieces)]
    assert outcomes[0] == outcomes[1]
    return outcomes[0].end


def _converse(source: FuzzInput, machine: OptionExchange) -> list[bytes]:
    """What the server sends in the clear, and behind TLS, to a client like `machine`."""
    parts = [bytearray()]
    asked = 0
    while source.has_more:
        if machine.wants_tls:
            parts.append(bytearray())
            asked = _asked_last(machine.tls_started(), asked)
        message = _message(source, asked, is_first=not parts[0])
        parts[-1] += message
        if machine.is_over:
            break
        try:
            asked = _asked_last(machine.receive(message), asked)
        except NbdBackupError:
            break
    parts[-1] += source.take(1 << 20)
    return [bytes(part) for part in parts]


def _asked_last(requests: bytes, before: int) -> int:
    """The code of the option that the client sent last."""
    at = requests.rfind(wire.OPTION_MAGIC)
    return before if at < 0 else int.from_bytes(requests[at + 8 : at + 12], "big")


def _message(source: FuzzInput, asked: int, is_first: bool) -> bytes:
    kind = source.below(16)
    if kind == 15:
        return source.some_bytes()
    if is_first:
        return b"NBDMAGIC" + wire.OPTION_MAGIC + struct.pack(">H", source.choose(_GREETINGS))
    if asked == wire.EXPORT_NAME:
        zeroes = source.choose((0, 124, 124, 123))
        return struct.pack(">QH", source.number_like(_SIZES, 64), source.number(16)) + bytes(zeroes)
    if kind == 14:
        return wire.option_reply(source.number(8), source.number(32), source.some_bytes())
    if kind == 13:
        head = wire.option_reply(asked, source.below(5))
        return (
            head[:-4] + struct.pack(">I", source.number_like((65_536, 65_537, 8), 32)) + source.some_bytes()
        )
    if kind >= 11:
        return wire.option_reply(asked, source.choose(_ERRORS), source.some_bytes())
    if kind >= 6:
        item = _item(source, asked)
        return item * 1500 if source.below(64) == 63 and len(item) < _REPEATED_BYTES_MAX else item
    return wire.option_reply(asked, wire.ACK)


def _item(source: FuzzInput, asked: int) -> bytes:
    """A reply that is no final one, and goes with the option if there is such."""
    if asked == wire.LIST:
        name = source.choose(_NAMES) if source.flag() else source.take(3)
        return wire.option_reply(asked, wire.SERVER, wire.string(name) + source.some_bytes())
    if asked in (wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT):
        name = source.choose(_CONTEXTS)
        return wire.option_reply(asked, wire.META_CONTEXT, struct.pack(">I", source.below(4)) + name)
    kind = source.below(6)
    if kind == wire.INFO_EXPORT:
        payload = struct.pack(">QH", source.number_like(_SIZES, 64), source.number(16))
    elif kind == wire.INFO_BLOCK_SIZE:
        payload = struct.pack(">III", *(source.choose(_BLOCKS) for _ in range(3)))
    elif kind in (wire.INFO_NAME, wire.INFO_DESCRIPTION):
        payload = source.choose(_NAMES)
    else:
        payload = source.some_bytes()
    return wire.option_reply(asked, wire.INFO_REPLY, struct.pack(">H", kind) + payload)


def _run(
    machine: Exchange,
    parts: Sequence[bytes],
    cut: Cut,
    learnt: Callable[[Exchange], str],
    kept_max: int,
) -> _Outcome:
    outcome = _Outcome("waiting")
    for part in parts:
        if part is not parts[0]:
            outcome.asked += machine.tls_started()
        for number, piece in enumerate(cut(part)):
            if machine.wants_tls:
                return _Outcome("bytes before TLS")
            if machine.is_over:
                outcome.leftover += piece
                continue
            try:
                outcome.asked += machine.receive(piece)
            except NbdBackupError as error:
                if "in the clear" in str(error):
                    return _Outcome("bytes before TLS")
                return _Outcome(_end_of(error), str(error))
            assert not is_time_to_measure(number) or kept_bytes(machine, [machine.leftover]) <= kept_max
            outcome.leftover = machine.leftover
    if machine.is_over:
        outcome.end, outcome.learnt = "agreed", learnt(machine)
    elif machine.wants_tls:
        outcome.end = "wants TLS"
    else:
        _end_of(machine.closed())
    return outcome


def _end_of(error: NbdBackupError) -> str:
    """The word for an error, which must be one of those that are the protocol's and fit to be shown."""
    assert type(error) in (ProtocolError, NotFoundError), repr(error)
    assert is_one_line(error), repr(error)
    return "not found" if type(error) is NotFoundError else "broken"
