"""What a client sends before there is an export: `nbd/negotiation.py`."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from nbdbackup.nbd.agreement import ExportCatalog, ExportInfo, TlsMode
from nbdbackup.nbd.constants import (
    BASE_ALLOCATION,
    OPTION_BUFFER_BYTES_MAX,
    OPTION_BYTES_MAX,
    Option,
    OptionReply,
    TransmissionFlags,
)
from nbdbackup.nbd.negotiation import HandshakeError, ServerNegotiation
from tests.fuzz.decoder import Cut, FuzzInput, in_pieces, is_time_to_measure, kept_bytes, whole
from tests.support import nbd_wire as wire

KEPT_BYTES_MAX = OPTION_BUFFER_BYTES_MAX + (8 << 10)
"""One option's payload, and a little for the state and the names in it."""

_FLAGS = TransmissionFlags.HAS_FLAGS | TransmissionFlags.SEND_FLUSH | TransmissionFlags.SEND_DF
_NAMES = (b"disk", b"", b"coarse", b"secret", b"none", b"d\0", b"\xff", b"\xc3\xa9" * 2049)
_QUERIES = (
    BASE_ALLOCATION.encode(),
    b"base:",
    b"qemu:",
    b"qemu:dirty-bitmap:b0",
    b"x-wide:y",
    b"",
    b"other:",
)
_CODES = (*Option, 0, 12, 0xFFFFFFFF)
_LENGTHS = (0, 4, 100, OPTION_BUFFER_BYTES_MAX, OPTION_BUFFER_BYTES_MAX + 1, 32 << 20, (32 << 20) + 1)


class _Catalog(ExportCatalog):
    """One export of each kind."""

    def __init__(self) -> None:
        contexts = (BASE_ALLOCATION, "qemu:dirty-bitmap:b0", "x-wide:y")
        self._exports = (
            ExportInfo(
                "disk", "a disk", 1 << 20, _FLAGS, contexts=contexts, wide_contexts=frozenset(["x-wide:y"])
            ),
            ExportInfo("coarse", "", 1 << 30, _FLAGS, block_size_min=4096),
            ExportInfo("secret", "", 1 << 20, _FLAGS, tls_only=True),
        )

    def exports(self) -> Sequence[ExportInfo]:
        return self._exports

    def find(self, name: str) -> ExportInfo | None:
        return next((export for export in self._exports if name in ("", export.name)), None)


@dataclass(slots=True)
class _Outcome:
    """What the client was sent, and how it ended."""

    end: str = "waiting"
    answers: bytearray = field(default_factory=bytearray)
    leftover: bytes = b""
    reason: str = ""


def negotiation(data: bytes) -> str:
    """Any client against any TLS mode."""
    source = FuzzInput(data)
    tls = source.choose(tuple(TlsMode))
    shutting_down = source.below(16) == 15
    clear, encrypted = negotiation_stream(source), b""
    if source.has_more:
        encrypted = _options(source)
    outcomes = [_run(tls, shutting_down, (clear, encrypted), cut) for cut in (whole, in_pieces)]
    assert outcomes[0] == outcomes[1]
    _check_answers(clear + encrypted, outcomes[0])
    return outcomes[0].end


def negotiation_stream(source: FuzzInput) -> bytes:
    """A client's flags and options, up to one that asks for TLS."""
    hello = source.choose((3, 3, 3, 1, 2, 0, 4, 0x80000003))
    return wire.client_flags(hello) + _options(source)


def _options(source: FuzzInput) -> bytes:
    """Options, up to one that asks for TLS."""
    stream = bytearray()
    while source.has_more:
        kind = source.below(8)
        if kind == 7:
            stream += source.some_bytes()
            continue
        code = source.choose(_CODES)
        payload = _payload(source, code) if kind < 5 else source.some_bytes()
        length = source.number_like(_LENGTHS, 32) if kind == 6 else None
        stream += wire.option(code, payload, length=length)
        if code == Option.STARTTLS and source.below(4):
            break
    return bytes(stream)


def _payload(source: FuzzInput, code: int) -> bytes:
    """Payload that goes with the option."""
    if code in (Option.INFO, Option.GO):
        types = tuple(source.take(source.below(6)))
        return wire.info_payload(source.choose(_NAMES), types)
    if code in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        queries = [source.choose(_QUERIES) for _ in range(source.below(5))]
        return wire.meta_payload(source.choose(_NAMES), queries)
    return source.choose(_NAMES) if code == Option.EXPORT_NAME else b""


def _run(tls: TlsMode, shutting_down: bool, parts: Sequence[bytes], cut: Cut) -> _Outcome:
    catalog = _Catalog()
    machine = ServerNegotiation(catalog, tls)
    machine.shutting_down = shutting_down
    outcome = _Outcome()
    for part in parts:
        for number, piece in enumerate(cut(part)):
            if machine.wants_tls:
                return _Outcome("bytes before TLS")
            if machine.result is not None or machine.aborted:
                outcome.leftover += piece
                continue
            try:
                outcome.answers += machine.receive(piece)
            except HandshakeError as error:
                if "in the clear" in str(error):
                    return _Outcome("bytes before TLS")
                return _Outcome("broken", outcome.answers + error.reply, reason=str(error))
            assert (
                not is_time_to_measure(number)
                or kept_bytes(machine, [catalog, machine.leftover]) <= KEPT_BYTES_MAX
            )
            outcome.leftover = machine.leftover
        if machine.wants_tls:
            machine.tls_started()
            outcome.end = "waiting with TLS"
    if machine.aborted:
        outcome.end, outcome.leftover = "aborted", b""
    elif machine.result is not None:
        outcome.end = "agreed"
    return outcome


def _check_answers(stream: bytes, outcome: _Outcome) -> None:
    """What the client was sent is option replies, the answer to EXPORT_NAME perhaps behind them.

    As long as nothing ended the negotiation, each whole option has exactly one final one; and nothing
    in the payload of an option that cannot fail otherwise ends it.
    """
    assert outcome.end != "broken" or not _is_sound(stream), outcome.reason
    if outcome.end == "bytes before TLS":
        return
    answers = bytes(outcome.answers)
    tails = (0, 10, 134) if outcome.end == "agreed" else (0,)
    readable = [found for tail in tails if (found := _split(answers, tail)) is not None]
    assert readable, f"no option replies: {answers[:100]!r}"
    if outcome.end == "waiting":
        final = [a for a in readable[0] if a.reply == OptionReply.ACK or a.reply >> 31]
        assert [answer.option for answer in final] == _whole_options(stream)


def _split(answers: bytes, tail: int) -> list[wire.OptionAnswer] | None:
    try:
        return wire.split_answers(answers[: len(answers) - tail])
    except (AssertionError, struct.error):
        return None


def _is_sound(stream: bytes) -> bool:
    """Whether a client that sends `stream` breaks no rule that it could be disconnected for."""
    at = 4
    while at + 16 <= len(stream):
        magic, code, length = struct.unpack_from(">8sII", stream, at)
        if magic != wire.OPTION_MAGIC or code == Option.EXPORT_NAME or length > OPTION_BYTES_MAX:
            return False
        at += 16 + length
    return stream[:4] in (wire.client_flags(1), wire.client_flags(3))


def _whole_options(stream: bytes) -> list[int]:
    """The codes of the options that `stream`, from the client flags on, has all bytes of."""
    codes, at = [], 4
    while at + 16 <= len(stream):
        code, length = struct.unpack_from(">II", stream, at + 8)
        at += 16 + length
        if at <= len(stream):
            codes.append(code)
    return codes
