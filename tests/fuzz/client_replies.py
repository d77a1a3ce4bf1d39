"""What a server sends once there is an export: `nbd/reply_parser.py`."""

import struct
from typing import NamedTuple

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.constants import STRING_BYTES_MAX, Command, ReplyType
from nbdbackup.nbd.reply_parser import Reply, ReplyParser
from tests.fuzz.decoder import Cut, FuzzInput, in_pieces, is_one_line, is_time_to_measure, kept_bytes, whole
from tests.fuzz.requests import Mode
from tests.support.nbd_session import DONE, EXTENDED_MAGIC, SIMPLE_MAGIC, STRUCTURED_MAGIC

KEPT_BYTES_MAX = (16 << 20) + (1 << 20)
"""Besides the buffers of the reads: a chunk of 2^20 extents, and what was received at once."""

_MODES = (Mode.STRUCTURED, Mode.SIMPLE, Mode.EXTENDED, Mode.STRUCTURED)

_CONTEXT_IDS = (1, 7)
_COMMANDS = (Command.READ, Command.READ, Command.BLOCK_STATUS, Command.WRITE, Command.FLUSH)
_LENGTHS = (8, 0, 1, 4096, 70_000, (1 << 32) - 1)
_READ_LENGTHS = (8, 0, 1, 64, 4096, 70_000)
_OFFSETS = (0, 100, 1 << 40, (1 << 64) - 1)
_ERRORS = (5, 0, 22, 1, 0xFFFFFFFF)
_KINDS = (*ReplyType, 3, 0x8000, 0xFFFF)


class _Asked(NamedTuple):
    command: Command
    cookie: int
    offset: int
    length: int


def replies(data: bytes) -> str:
    """A server that answers a few requests, in chunks or not."""
    source = FuzzInput(data)
    mode = source.choose(_MODES)
    asked = [_request(source, number) for number in range(1 + source.below(4))]
    stream = _stream(source, mode, asked)
    outcomes = [_run(mode, asked, stream, cut) for cut in (whole, in_pieces)]
    assert outcomes[0] == outcomes[1]
    return outcomes[0][0]


def _request(source: FuzzInput, number: int) -> _Asked:
    command = source.choose(_COMMANDS)
    length = source.choose(_READ_LENGTHS if command is Command.READ else _LENGTHS)
    return _Asked(command, number * 0x0101_0101_0101_0101, source.choose(_OFFSETS), length)


def _stream(source: FuzzInput, mode: Mode, asked: list[_Asked]) -> bytes:
    stream = bytearray()
    while source.has_more:
        kind = source.below(16)
        request = source.choose(asked)
        cookie = source.number(64) if kind == 14 else request.cookie
        if kind == 15:
            stream += source.some_bytes()
        elif mode is Mode.SIMPLE or kind == 13:
            stream += _simple(source, request, cookie)
        else:
            stream += _chunk(source, mode if kind != 12 else source.choose(_MODES), request, cookie)
    return bytes(stream)


def _simple(source: FuzzInput, request: _Asked, cookie: int) -> bytes:
    error = source.choose((0, 0, 0, *_ERRORS))
    data = b"d" * request.length if request.command is Command.READ and not error else b""
    return struct.pack(">IIQ", SIMPLE_MAGIC, error, cookie) + data


def _chunk(source: FuzzInput, mode: Mode, request: _Asked, cookie: int) -> bytes:
    flags = source.choose((DONE, 0, DONE, 0, 0xFFFF))
    kind = source.choose(_KINDS)
    payload = _payload(source, request, kind) if source.below(8) != 7 else source.some_bytes()
    length = len(payload)
    if source.below(16) == 15:
        length = source.number_like((0, length + 1, 8 + request.length, 8 << 20, (8 << 20) + 5), 32)
    if mode is not Mode.EXTENDED:
        return struct.pack(">IHHQI", STRUCTURED_MAGIC, flags, kind, cookie, length) + payload
    offset = request.offset ^ (source.below(32) == 31)
    return struct.pack(">IHHQQQ", EXTENDED_MAGIC, flags, kind, cookie, offset, length) + payload


def _payload(source: FuzzInput, request: _Asked, kind: int) -> bytes:
    """Payload of a chunk of this type, about part of the request."""
    if kind in (ReplyType.OFFSET_DATA, ReplyType.OFFSET_HOLE):
        start = source.number_like((0, 4, request.length // 2), 32)
        length = source.number_like((request.length - min(start, request.length), 4, 1), 32)
        offset = (request.offset + start) & ((1 << 64) - 1)
        if kind == ReplyType.OFFSET_HOLE:
            return struct.pack(">QI", offset, length)
        return struct.pack(">Q", offset) + b"d" * min(length, 100_000)
    if kind in (ReplyType.BLOCK_STATUS, ReplyType.BLOCK_STATUS_EXT):
        return _status(source, request, is_wide=kind == ReplyType.BLOCK_STATUS_EXT)
    if kind & 0x8000:
        text = source.some_bytes()
        claimed = source.number(16) if source.below(8) == 7 else min(len(text), 0xFFFF)
        where = struct.pack(">Q", request.offset) if kind == ReplyType.ERROR_OFFSET else b""
        return struct.pack(">IH", source.choose(_ERRORS), claimed) + text[: STRING_BYTES_MAX + 1] + where
    return b""


def _status(source: FuzzInput, request: _Asked, *, is_wide: bool) -> bytes:
    """Extents, of 64 bits if `is_wide`."""
    context_id, times = source.choose((*_CONTEXT_IDS, 3)), source.choose((1, 1, 1, 200))
    bits, layout = (64, ">QQ") if is_wide else (32, ">II")
    lengths = [source.number_like((request.length, 1, 0, 4), bits) for _ in range(source.below(5))]
    extents = b"".join(struct.pack(layout, length, source.below(4)) for length in lengths) * times
    if not is_wide:
        return struct.pack(">I", context_id) + extents
    count = len(lengths) * times if source.below(16) != 15 else source.number(32)
    return struct.pack(">II", context_id, count) + extents


def _run(mode: Mode, asked: list[_Asked], stream: bytes, cut: Cut) -> tuple[str, list[tuple[object, ...]]]:
    """How it ended, and the replies; of a broken connection the reason alone."""
    parser = ReplyParser(
        structured=mode is not Mode.SIMPLE, extended=mode is Mode.EXTENDED, context_ids=_CONTEXT_IDS
    )
    buffers = [
        memoryview(bytearray(request.length if request.command is Command.READ else 0)) for request in asked
    ]
    for request, buffer in zip(asked, buffers, strict=True):
        parser.expect(*request, buffer if request.command is Command.READ else None)
    by_cookie = {request.cookie: request for request in asked}
    found = []
    for number, piece in enumerate(cut(stream)):
        complete = _receive(parser, piece)
        if isinstance(complete, ProtocolError):
            assert is_one_line(complete), repr(complete)
            return "broken", [(str(complete),)]
        found += [_seen(reply, by_cookie.pop(reply.cookie)) for reply in complete]
        assert parser.outstanding == len(by_cookie)
        assert not is_time_to_measure(number) or kept_bytes(parser, buffers) <= KEPT_BYTES_MAX
    if not by_cookie:
        return "all answered", found
    return ("some answered" if found else "waiting"), found


def _receive(parser: ReplyParser, piece: bytes) -> list[Reply] | ProtocolError:
    try:
        return parser.receive(piece)
    except ProtocolError as error:
        return error


def _seen(reply: Reply, request: _Asked) -> tuple[object, ...]:
    """What a caller sees of a reply, which must fit its request."""
    data = b"" if reply.error else bytes(reply.data)
    if not reply.error and request.command is Command.READ:
        assert len(data) == request.length
    if not reply.error and request.command is Command.BLOCK_STATUS:
        assert reply.status
        assert reply.status.keys() <= set(_CONTEXT_IDS)
        for extents in reply.status.values():
            assert all(extent.length > 0 for extent in extents)
            assert sum(extent.length for extent in extents[:-1]) < request.length
    return reply.cookie, reply.error, reply.text, data, tuple(sorted(reply.status.items()))
