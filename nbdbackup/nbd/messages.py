"""Every NBD message, defined once with construct, for both roles.

A `Message` pairs a construct definition with the frozen dataclass that it parses to and is
built from; the dataclass's fields are the definition's, less magics and padding. Nothing else
in the package describes a byte on the wire: `layout` derives its fast `struct.Struct`s from here.

Numbers that a peer may choose freely (option codes, info types, chunk types) parse to the
enumeration's member where there is one and to the plain int otherwise: an unknown code is
for the state machine to answer, not a parse error.

A message that ends in `Terminated` is a payload whose length was told before it: bytes too few
or too many are a `ProtocolError`.

Source: the NBD project's doc/proto.md.
"""

from collections.abc import Mapping
from enum import IntEnum, IntFlag
from typing import Any, Generic, TypeVar

import construct
import msgspec
from construct import (
    Const,
    GreedyBytes,
    GreedyRange,
    Int16ub,
    Int32ub,
    Int64ub,
    Padding,
    Prefixed,
    PrefixedArray,
    Terminated,
)

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.constants import (
    EXPORT_NAME_PADDING_BYTES,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    GREETING_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRING_BYTES_MAX,
    STRUCTURED_REPLY_MAGIC,
    ClientFlags,
    Command,
    CommandFlags,
    HandshakeFlags,
    InfoType,
    Option,
    OptionReply,
    ReplyFlags,
    ReplyType,
    TransmissionFlags,
)

T = TypeVar("T", bound=msgspec.Struct)


class Code(construct.Adapter):  # type: ignore[misc]
    """An integer that reads as a member of `enumeration`, or as itself when it is none.

    construct's own Enum yields strings that do not compare equal to an IntEnum's members.
    """

    def __init__(self, subcon: Any, enumeration: type[IntEnum] | type[IntFlag]) -> None:
        super().__init__(subcon)
        self.enumeration = enumeration

    def _decode(self, obj: int, context: Any, path: Any) -> int:
        try:
            return self.enumeration(obj)
        except ValueError:
            return obj

    def _encode(self, obj: int, context: Any, path: Any) -> int:
        return int(obj)


class Text(construct.Adapter):  # type: ignore[misc]
    """A string of the protocol: UTF-8 without NUL, at most `STRING_BYTES_MAX` bytes."""

    def _decode(self, obj: bytes, context: Any, path: Any) -> str:
        _check_string(obj)
        try:
            return obj.decode("utf-8")
        except UnicodeDecodeError:
            raise construct.StringError("a string is not UTF-8") from None

    def _encode(self, obj: str, context: Any, path: Any) -> bytes:
        encoded = obj.encode("utf-8")
        _check_string(encoded)
        return encoded


def _check_string(encoded: bytes) -> None:
    if len(encoded) > STRING_BYTES_MAX:
        raise construct.StringError(f"a string is longer than {STRING_BYTES_MAX} bytes")
    if b"\0" in encoded:
        raise construct.StringError("a string has a NUL in it")


class Message(Generic[T]):
    """A construct definition and the record that it reads and writes."""

    def __init__(self, title: str, record: type[T], **definition: Any) -> None:
        """`title` names the message in errors; `definition` is its fields in wire order."""
        self.title = title
        self.record = record
        self.definition = construct.Struct(*(name / subcon for name, subcon in definition.items()))
        self._names = record.__struct_fields__

    def parse(self, data: bytes | bytearray | memoryview) -> T:
        """Read the record from the head of `data`.

        Raises:
            ProtocolError: `data` is too short, has a wrong magic, a bad string, or bytes left over.
        """
        try:
            values: Mapping[str, Any] = self.definition.parse(data)
        except construct.ConstructError as error:
            raise ProtocolError(f"{self.title}: {_reason(error)}") from None
        return self.record(**{name: _plain(values[name]) for name in self._names})

    def build(self, record: T) -> bytes:
        """The bytes of `record`; the values are ours and must fit their fields."""
        built: bytes = self.definition.build({name: getattr(record, name) for name in self._names})
        return built

    def sizeof(self) -> int:
        """Length in bytes of a message of fixed size."""
        size: int = self.definition.sizeof()
        return size


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, construct.ListContainer) else value


def _reason(error: construct.ConstructError) -> str:
    if isinstance(error, construct.ConstError):
        return "wrong magic"
    if isinstance(error, construct.TerminatedError):
        return "bytes left over at its end"
    if isinstance(error, construct.StreamError):
        return "cut short"
    return str(error).splitlines()[-1]


_STRING = Text(Prefixed(Int32ub, GreedyBytes))
_STRING_SHORT = Text(Prefixed(Int16ub, GreedyBytes))
_STRING_REST = Text(GreedyBytes)


# --- Handshake -----------------------------------------------------------------------------------


class Greeting(msgspec.Struct, frozen=True):
    """The server's first 18 bytes."""

    flags: HandshakeFlags


class GreetingHead(msgspec.Struct, frozen=True):
    """The first 16 bytes of any server; `second_magic` tells newstyle from oldstyle."""

    second_magic: int


class ClientHello(msgspec.Struct, frozen=True):
    """The client's answer to the greeting."""

    flags: ClientFlags


class OptionHead(msgspec.Struct, frozen=True):
    """In front of an option's payload of `length` bytes."""

    option: int
    length: int


class OptionReplyHead(msgspec.Struct, frozen=True):
    """In front of an option reply's payload of `length` bytes; `option` echoes the client's."""

    option: int
    reply: int
    length: int


class ExportNameReply(msgspec.Struct, frozen=True):
    """The whole answer to EXPORT_NAME: size in bytes and flags."""

    size: int
    flags: TransmissionFlags


class ExportName(msgspec.Struct, frozen=True):
    """Payload of EXPORT_NAME."""

    name: str


class ServerEntry(msgspec.Struct, frozen=True):
    """One export in the answer to LIST."""

    name: str
    description: str


class InfoRequest(msgspec.Struct, frozen=True):
    """Payload of INFO and GO."""

    name: str
    types: tuple[int, ...]


class InfoHead(msgspec.Struct, frozen=True):
    """Any payload of an INFO reply; `rest` is for the message of that type."""

    type: int
    rest: bytes


class InfoExport(msgspec.Struct, frozen=True):
    """Size in bytes and flags of the export."""

    size: int
    flags: TransmissionFlags


class InfoName(msgspec.Struct, frozen=True):
    """The export's canonical name."""

    name: str


class InfoDescription(msgspec.Struct, frozen=True):
    """A line for people."""

    description: str


class InfoBlockSize(msgspec.Struct, frozen=True):
    """Sizes in bytes; `payload_max` bounds READ and WRITE."""

    minimum: int
    preferred: int
    payload_max: int


class MetaContextRequest(msgspec.Struct, frozen=True):
    """Payload of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


class MetaContext(msgspec.Struct, frozen=True):
    """One meta context in the answer; `id` is 0 for LIST_META_CONTEXT."""

    id: int
    name: str


class OptionErrorText(msgspec.Struct, frozen=True):
    """Payload of an option's error reply."""

    text: str


GREETING = Message(
    "greeting",
    Greeting,
    magic=Const(GREETING_MAGIC, Int64ub),
    option_magic=Const(OPTION_MAGIC, Int64ub),
    flags=Code(Int16ub, HandshakeFlags),
)
GREETING_HEAD = Message("greeting", GreetingHead, magic=Const(GREETING_MAGIC, Int64ub), second_magic=Int64ub)
CLIENT_HELLO = Message("client flags", ClientHello, flags=Code(Int32ub, ClientFlags))
OPTION_HEAD = Message(
    "option", OptionHead, magic=Const(OPTION_MAGIC, Int64ub), option=Code(Int32ub, Option), length=Int32ub
)
OPTION_REPLY_HEAD = Message(
    "option reply",
    OptionReplyHead,
    magic=Const(OPTION_REPLY_MAGIC, Int64ub),
    option=Code(Int32ub, Option),
    reply=Code(Int32ub, OptionReply),
    length=Int32ub,
)
EXPORT_NAME_REPLY = Message(
    "answer to EXPORT_NAME", ExportNameReply, size=Int64ub, flags=Code(Int16ub, TransmissionFlags)
)
EXPORT_NAME_REPLY_PADDED = Message(
    "answer to EXPORT_NAME",
    ExportNameReply,
    size=Int64ub,
    flags=Code(Int16ub, TransmissionFlags),
    zeroes=Padding(EXPORT_NAME_PADDING_BYTES),
)
EXPORT_NAME_REQUEST = Message("EXPORT_NAME", ExportName, name=_STRING_REST, end=Terminated)
SERVER_ENTRY = Message("LIST entry", ServerEntry, name=_STRING, description=_STRING_REST, end=Terminated)
INFO_REQUEST = Message(
    "payload of INFO or GO",
    InfoRequest,
    name=_STRING,
    types=PrefixedArray(Int16ub, Code(Int16ub, InfoType)),
    end=Terminated,
)
INFO_HEAD = Message("info item", InfoHead, type=Code(Int16ub, InfoType), rest=GreedyBytes)
INFO_EXPORT = Message(
    "NBD_INFO_EXPORT",
    InfoExport,
    type=Const(InfoType.EXPORT, Int16ub),
    size=Int64ub,
    flags=Code(Int16ub, TransmissionFlags),
    end=Terminated,
)
INFO_NAME = Message(
    "NBD_INFO_NAME", InfoName, type=Const(InfoType.NAME, Int16ub), name=_STRING_REST, end=Terminated
)
INFO_DESCRIPTION = Message(
    "NBD_INFO_DESCRIPTION",
    InfoDescription,
    type=Const(InfoType.DESCRIPTION, Int16ub),
    description=_STRING_REST,
    end=Terminated,
)
INFO_BLOCK_SIZE = Message(
    "NBD_INFO_BLOCK_SIZE",
    InfoBlockSize,
    type=Const(InfoType.BLOCK_SIZE, Int16ub),
    minimum=Int32ub,
    preferred=Int32ub,
    payload_max=Int32ub,
    end=Terminated,
)
META_CONTEXT_REQUEST = Message(
    "payload of LIST_META_CONTEXT or SET_META_CONTEXT",
    MetaContextRequest,
    name=_STRING,
    queries=PrefixedArray(Int32ub, _STRING),
    end=Terminated,
)
META_CONTEXT = Message("meta context", MetaContext, id=Int32ub, name=_STRING_REST, end=Terminated)
OPTION_ERROR_TEXT = Message("error text of an option", OptionErrorText, text=_STRING_REST, end=Terminated)


# --- Transmission --------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True):
    """A request's head; `length` bytes of payload follow a WRITE. Offset and length in bytes."""

    flags: CommandFlags
    command: int
    cookie: int
    offset: int
    length: int


class ExtendedReply(msgspec.Struct, frozen=True):
    """Head of one chunk once extended headers were negotiated; `length` bytes of payload follow."""

    flags: ReplyFlags
    type: int
    cookie: int
    offset: int
    length: int


class SimpleReply(msgspec.Struct, frozen=True):
    """A simple reply; the data follows a READ that succeeded (`error` 0)."""

    error: int
    cookie: int


class StructuredReply(msgspec.Struct, frozen=True):
    """Head of one chunk; `length` bytes of payload follow."""

    flags: ReplyFlags
    type: int
    cookie: int
    length: int


class OffsetDataHead(msgspec.Struct, frozen=True):
    """In front of the data of an OFFSET_DATA chunk."""

    offset: int


class OffsetHole(msgspec.Struct, frozen=True):
    """Whole payload of an OFFSET_HOLE chunk: `length` bytes at `offset` read as zeroes."""

    offset: int
    length: int


class BlockStatusHead(msgspec.Struct, frozen=True):
    """In front of the extents of a BLOCK_STATUS chunk."""

    context_id: int


class BlockStatusExtent(msgspec.Struct, frozen=True):
    """`length` bytes with the context's `flags`; its offset follows from those before it."""

    length: int
    flags: int


class BlockStatusExtHead(msgspec.Struct, frozen=True):
    """In front of the `count` extents of a BLOCK_STATUS_EXT chunk."""

    context_id: int
    count: int


class BlockStatusQuery(msgspec.Struct, frozen=True):
    """Payload of a BLOCK_STATUS request with PAYLOAD_LEN: `length` bytes, told of these contexts only."""

    length: int
    context_ids: tuple[int, ...]


class ErrorChunk(msgspec.Struct, frozen=True):
    """Payload of an ERROR chunk."""

    error: int
    text: str


class ErrorHead(msgspec.Struct, frozen=True):
    """What every error chunk begins with, also those of types not known; a text may follow."""

    error: int


class ErrorOffsetChunk(msgspec.Struct, frozen=True):
    """Payload of an ERROR_OFFSET chunk: the failure was at `offset` (bytes)."""

    error: int
    text: str
    offset: int


REQUEST = Message(
    "request",
    Request,
    magic=Const(REQUEST_MAGIC, Int32ub),
    flags=Code(Int16ub, CommandFlags),
    command=Code(Int16ub, Command),
    cookie=Int64ub,
    offset=Int64ub,
    length=Int32ub,
)
EXTENDED_REQUEST = Message(
    "extended request",
    Request,
    magic=Const(EXTENDED_REQUEST_MAGIC, Int32ub),
    flags=Code(Int16ub, CommandFlags),
    command=Code(Int16ub, Command),
    cookie=Int64ub,
    offset=Int64ub,
    length=Int64ub,
)
SIMPLE_REPLY = Message(
    "simple reply",
    SimpleReply,
    magic=Const(SIMPLE_REPLY_MAGIC, Int32ub),
    error=Int32ub,
    cookie=Int64ub,
)
STRUCTURED_REPLY = Message(
    "structured reply",
    StructuredReply,
    magic=Const(STRUCTURED_REPLY_MAGIC, Int32ub),
    flags=Code(Int16ub, ReplyFlags),
    type=Code(Int16ub, ReplyType),
    cookie=Int64ub,
    length=Int32ub,
)
EXTENDED_REPLY = Message(
    "extended reply",
    ExtendedReply,
    magic=Const(EXTENDED_REPLY_MAGIC, Int32ub),
    flags=Code(Int16ub, ReplyFlags),
    type=Code(Int16ub, ReplyType),
    cookie=Int64ub,
    offset=Int64ub,
    length=Int64ub,
)
OFFSET_DATA_HEAD = Message("OFFSET_DATA chunk", OffsetDataHead, offset=Int64ub)
OFFSET_HOLE = Message("OFFSET_HOLE chunk", OffsetHole, offset=Int64ub, length=Int32ub)
BLOCK_STATUS_HEAD = Message("BLOCK_STATUS chunk", BlockStatusHead, context_id=Int32ub)
BLOCK_STATUS_EXTENT = Message(
    "extent of a BLOCK_STATUS chunk", BlockStatusExtent, length=Int32ub, flags=Int32ub
)
BLOCK_STATUS_EXT_HEAD = Message(
    "BLOCK_STATUS_EXT chunk", BlockStatusExtHead, context_id=Int32ub, count=Int32ub
)
BLOCK_STATUS_EXT_EXTENT = Message(
    "extent of a BLOCK_STATUS_EXT chunk", BlockStatusExtent, length=Int64ub, flags=Int64ub
)
BLOCK_STATUS_QUERY = Message(
    "payload of BLOCK_STATUS",
    BlockStatusQuery,
    length=Int64ub,
    context_ids=GreedyRange(Int32ub),
    end=Terminated,
)
ERROR_HEAD = Message("error chunk", ErrorHead, error=Int32ub)
ERROR_CHUNK = Message("ERROR chunk", ErrorChunk, error=Int32ub, text=_STRING_SHORT, end=Terminated)
ERROR_OFFSET_CHUNK = Message(
    "ERROR_OFFSET chunk", ErrorOffsetChunk, error=Int32ub, text=_STRING_SHORT, offset=Int64ub, end=Terminated
)
