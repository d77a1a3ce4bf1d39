"""Requests as fuzzed clients send them, and what a server has to make of a stream of them.

The reading of both directions is spelt from the specification, with nothing of the package's.
"""

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from tests.fuzz.decoder import FuzzInput
from tests.support.nbd_session import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    DONE,
    EXTENDED_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    FLUSH,
    PAYLOAD_LEN,
    READ,
    REQUEST_MAGIC,
    SIMPLE_MAGIC,
    STRUCTURED_MAGIC,
    TRIM,
    WRITE,
    WRITE_ZEROES,
)

SIZE = 300_000
"""Of the export, in bytes: no multiple of any block size."""
PAYLOAD_BYTES_MAX = 64 << 20
CONTEXT_IDS = (1, 2)

_COMPACT, _EXTENDED = struct.Struct(">IHHQQI"), struct.Struct(">IHHQQQ")
_COMMANDS = (READ, WRITE, BLOCK_STATUS, WRITE_ZEROES, TRIM, CACHE, FLUSH, READ, WRITE, WRITE, DISC, 8, 0xFFFF)
_FLAGS = (0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 3, 33, 1 << 15)
_PLACES = (0, 0, 1, 4096, 65_536, SIZE - 1, SIZE, SIZE + 1, (1 << 63) - 1, (1 << 64) - 1)
_LENGTHS = (0, 1, 100, 4096, 65_536, 65_537, 131_072, 250_000, SIZE, PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX + 1)


class Mode(Enum):
    """How requests and replies look."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2

    @property
    def head(self) -> struct.Struct:
        """Of a request."""
        return _EXTENDED if self is Mode.EXTENDED else _COMPACT


class Asked(NamedTuple):
    """A request that has arrived with all of its payload."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes


@dataclass(slots=True)
class Asking:
    """A stream of requests as a server must read it; `end` is "broken", "DISC", "cut short" or "closed"."""

    asked: list[Asked]
    end: str


def request_stream(source: FuzzInput, mode: Mode) -> bytes:
    """What a client sends after the negotiation, mostly requests with a cookie of their own."""
    stream = bytearray()
    cookie = 0
    while source.has_more:
        cookie += 1
        kind = source.below(16)
        if kind == 15:
            stream += source.some_bytes()
            continue
        command = source.choose(_COMMANDS)
        flags = source.number(16) if kind == 14 else source.choose(_FLAGS)
        offset = source.number_like(_PLACES, 64)
        length = source.number_like(_LENGTHS, 64 if mode is Mode.EXTENDED else 32)
        payload = b""
        if mode is Mode.EXTENDED and command == BLOCK_STATUS and flags & PAYLOAD_LEN:
            payload = status_query(source, length)
            length = len(payload)
        elif command == WRITE or (mode is Mode.EXTENDED and flags & PAYLOAD_LEN):
            if kind >= 8:  # the payload tells the length; else the length is what it is, and may lie
                payload = source.some_bytes()
                length = len(payload)
            else:
                payload = source.take(1).ljust(1, b"w") * min(length, SIZE)
        magic = EXTENDED_REQUEST_MAGIC if mode is Mode.EXTENDED else REQUEST_MAGIC
        stream += mode.head.pack(magic, flags, command, cookie, offset, length) + payload
    return bytes(stream)


def status_query(source: FuzzInput, effect_length: int) -> bytes:
    """The payload of a BLOCK_STATUS that names contexts."""
    ids = [source.choose((*CONTEXT_IDS, 3, 0)) for _ in range(source.below(4))]
    query = struct.pack(f">Q{len(ids)}I", effect_length, *ids)
    return query[: -1 - source.below(4)] if source.below(8) == 7 else query


def read_asking(stream: bytes, mode: Mode) -> Asking:
    """What a server finds in `stream`."""
    asked: list[Asked] = []
    at, head = 0, mode.head
    while at < len(stream):
        if at + head.size > len(stream):
            return Asking(asked, "cut short")
        magic, flags, command, cookie, offset, length = head.unpack_from(stream, at)
        if magic != (EXTENDED_REQUEST_MAGIC if mode is Mode.EXTENDED else REQUEST_MAGIC):
            return Asking(asked, "broken")
        has_payload = command == WRITE or (mode is Mode.EXTENDED and flags & PAYLOAD_LEN)
        payload_bytes = length if has_payload else 0
        if mode is Mode.EXTENDED and payload_bytes > PAYLOAD_BYTES_MAX:
            return Asking(asked, "broken")
        at += head.size
        if at + payload_bytes > len(stream):
            return Asking(asked, "cut short")
        asked.append(Asked(flags, command, cookie, offset, length, stream[at : at + payload_bytes]))
        at += payload_bytes
        if command == DISC and not payload_bytes:
            return Asking(asked, "DISC")
    return Asking(asked, "closed")


def count_replies(sent: bytes, mode: Mode, asked: Sequence[Asked]) -> Counter[int] | None:
    """How many whole replies each cookie got; None where cookies were used twice, so that nobody can know.

    Fails if `sent` is anything but replies of this mode.
    """
    commands = {request.cookie: request for request in asked}
    if len(commands) < len(asked):
        return None
    counts: Counter[int] = Counter()
    at = 0
    while at < len(sent):
        (magic,) = struct.unpack_from(">I", sent, at)
        if magic == SIMPLE_MAGIC and mode is not Mode.EXTENDED:
            error, cookie = struct.unpack_from(">IQ", sent, at + 4)
            request = commands[cookie]
            at += 16 + (request.length if request.command == READ and not error else 0)
            flags = DONE
        elif magic == STRUCTURED_MAGIC and mode is Mode.STRUCTURED:
            flags, _, cookie, length = struct.unpack_from(">HHQI", sent, at + 4)
            at += 20 + length
        else:
            assert magic == EXTENDED_MAGIC, hex(magic)
            assert mode is Mode.EXTENDED
            flags, _, cookie, offset, length = struct.unpack_from(">HHQQQ", sent, at + 4)
            assert offset == commands[cookie].offset
            at += 32 + length
        assert cookie in commands
        counts[cookie] += bool(flags & DONE)
    assert at == len(sent)
    return counts
