"""The numbers of the NBD protocol, one enumeration per name space.

Option codes, option replies, info types, commands and chunk types are separate name spaces
that reuse the same small integers; an enumeration each keeps one from being sent as another.

Whatever a peer can make us store or repeat has a limit here, with a name.

Source: the NBD project's doc/proto.md; extended headers from its branch extension-ext-header.
"""

from enum import IntEnum, IntFlag
from typing import Final

GREETING_MAGIC: Final = 0x4E42444D41474943
"""ASCII `NBDMAGIC`: the first eight bytes of every server."""

OPTION_MAGIC: Final = 0x49484156454F5054
"""ASCII `IHAVEOPT`: newstyle servers send it once, clients before each option."""

OLDSTYLE_MAGIC: Final = 0x00420281861253
"""In the place of `OPTION_MAGIC`: an oldstyle server, which this package does not talk to."""

OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

PORT_DEFAULT: Final = 10809

STRING_BYTES_MAX: Final = 4096
"""Export names, descriptions, meta context names and error texts (UTF-8, no NUL)."""

EXPORT_NAME_PADDING_BYTES: Final = 124
"""Zeroes behind the answer to EXPORT_NAME unless the client asked to leave them out."""

OPTION_BYTES_MAX: Final = 32 << 20
"""An option that claims more ends the connection; what is below is consumed to stay in step."""

OPTION_BUFFER_BYTES_MAX: Final = 256 << 10
"""Payload kept in memory: a GO with 65,535 info types fits. Longer ones are skipped: ERR_TOO_BIG."""

OPTIONS_MAX: Final = 1024
"""Options per handshake. `qemu-nbd --list` sends two for each export, so this is not tiny."""

OPTION_REPLIES_BYTES_MAX: Final = 32 << 20
"""Replies that one call of the negotiation may produce; a client that pipelines more is abusive."""

PAYLOAD_BYTES_ADVERTISED: Final = 32 << 20
"""Maximum payload told to clients that ask."""

PAYLOAD_BYTES_ACCEPTED: Final = 64 << 20
"""Maximum READ and WRITE length served: clients that did not ask send more than 32 MiB."""

BLOCK_SIZE_MIN_LARGEST: Final = 64 << 10
"""The advertised minimum block size may not be larger."""

BLOCK_SIZE_PREFERRED_SMALLEST: Final = 512

STATUS_EXTENTS_MAX: Final = 1 << 20
"""Extents in one BLOCK_STATUS chunk."""

STATUS_QUERY_BYTES_MAX: Final = 4096
"""Payload of a BLOCK_STATUS request: a longer one names more contexts than one client can select."""

CONTEXTS_MAX: Final = 1000
"""Meta contexts that one client can select: a BLOCK_STATUS payload can name them all."""

BLOCK_SIZE_UNASKED_MAX: Final = 512
"""A client that does not ask for block sizes reads in units of a sector: no need to insist up to here."""


class HandshakeFlags(IntFlag):
    """What the server says in its greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlags(IntFlag):
    """What the client answers to the greeting; only what was offered is legal."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client asks for during negotiation."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


OPTION_REPLY_ERROR: Final = 1 << 31
"""Set in every `OptionReply` that is an error."""


class OptionReply(IntEnum):
    """The type of an option reply; those with `OPTION_REPLY_ERROR` are errors and final."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = OPTION_REPLY_ERROR + 1
    ERR_POLICY = OPTION_REPLY_ERROR + 2
    ERR_INVALID = OPTION_REPLY_ERROR + 3
    ERR_PLATFORM = OPTION_REPLY_ERROR + 4
    ERR_TLS_REQD = OPTION_REPLY_ERROR + 5
    ERR_UNKNOWN = OPTION_REPLY_ERROR + 6
    ERR_SHUTDOWN = OPTION_REPLY_ERROR + 7
    ERR_BLOCK_SIZE_REQD = OPTION_REPLY_ERROR + 8
    ERR_TOO_BIG = OPTION_REPLY_ERROR + 9
    ERR_EXT_HEADER_REQD = OPTION_REPLY_ERROR + 10


class InfoType(IntEnum):
    """The items of INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlags(IntFlag):
    """What an export can do, told with its size."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """What a request asks for in the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlags(IntFlag):
    """Modifiers of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Errno(IntEnum):
    """The only errors that may be sent in a reply; their numbers are the protocol's, not the host's."""

    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ReplyFlags(IntFlag):
    """Flags of a structured or extended reply chunk."""

    DONE = 1 << 0


REPLY_TYPE_ERROR: Final = 1 << 15
"""Set in every `ReplyType` that is an error."""


class ReplyType(IntEnum):
    """What a structured or extended reply chunk holds."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = REPLY_TYPE_ERROR + 1
    ERROR_OFFSET = REPLY_TYPE_ERROR + 2


class AllocationFlags(IntFlag):
    """Status flags of the meta context `base:allocation`; 0 is always a safe answer."""

    HOLE = 1 << 0
    ZERO = 1 << 1


BASE_ALLOCATION: Final = "base:allocation"

ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
"""Status: 0 where nothing in the backing chain is allocated, else the layer's number, the top one 1."""

DIRTY_BITMAP_PREFIX: Final = "qemu:dirty-bitmap:"
"""In front of a bitmap's name. Status: bit 0 is set where the bitmap is."""
