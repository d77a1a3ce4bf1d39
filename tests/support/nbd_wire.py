"""NBD messages for tests, spelt by hand from the specification.

Nothing here uses the package's own definitions: a number that is wrong there is wrong in a test too.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OPTION_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = bytes.fromhex("0003e889045565a9")

FIXED_NEWSTYLE = 1
NO_ZEROES = 2

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = range(1, 8)
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = range(8, 12)

ACK, SERVER, INFO_REPLY, META_CONTEXT = range(1, 5)
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM, ERR_TLS_REQD = range(0x80000001, 0x80000006)
ERR_UNKNOWN, ERR_SHUTDOWN, ERR_BLOCK_SIZE_REQD, ERR_TOO_BIG, ERR_EXT_HEADER_REQD = range(
    0x80000006, 0x8000000B
)

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)


@dataclass(frozen=True, slots=True)
class OptionAnswer:
    """One option reply."""

    option: int
    reply: int
    payload: bytes


def client_flags(flags: int = FIXED_NEWSTYLE | NO_ZEROES) -> bytes:
    return struct.pack(">I", flags)


def option(code: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """An option; `length` lies about the payload's."""
    return OPTION_MAGIC + struct.pack(">II", code, len(payload) if length is None else length) + payload


def string(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(encoded)) + encoded


def info_payload(name: str | bytes, types: Sequence[int] = ()) -> bytes:
    return string(name) + struct.pack(f">H{len(types)}H", len(types), *types)


def meta_payload(name: str | bytes, queries: Sequence[str | bytes] = ()) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(string(query) for query in queries)


def option_reply(code: int, reply: int, payload: bytes = b"") -> bytes:
    return REPLY_MAGIC + struct.pack(">III", code, reply, len(payload)) + payload


def split_answers(data: bytes) -> list[OptionAnswer]:
    """Every option reply in `data`, which must hold nothing else and no part of one."""
    answers = []
    while data:
        assert data[:8] == REPLY_MAGIC, data[:20]
        code, reply, length = struct.unpack_from(">III", data, 8)
        assert len(data) >= 20 + length
        answers.append(OptionAnswer(code, reply, data[20 : 20 + length]))
        data = data[20 + length :]
    return answers


def kinds(answers: Iterable[OptionAnswer]) -> list[int]:
    return [answer.reply for answer in answers]
