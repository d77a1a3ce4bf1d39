"""The transmission phase, server role: which requests are refused and how.

`Transmission.check` is the only judge of a request: what it lets through is inside the
device, permitted by the export and has only flags that its command knows. A refused request
still carries its payload (`payload_bytes`); the caller consumes it to stay in step.

How the answer is written is `reply_encoding`'s; the encoder's methods are reached through here.

Source: the NBD specification's "Transmission phase"; numbers in comments are the
requirements of the protocol's conformance list that the tests name.
"""

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import layout, messages
from nbdbackup.nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    PAYLOAD_BYTES_ACCEPTED,
    REQUEST_MAGIC,
    Command,
    CommandFlags,
    Errno,
    TransmissionFlags,
)
from nbdbackup.nbd.negotiation import Negotiated
from nbdbackup.nbd.reply_encoding import ExtendedReplies, ReplyEncoder, SimpleReplies, StructuredReplies
from nbdbackup.nbd.requests import Refusal, Request, StatusQuery

REQUEST_BYTES = layout.REQUEST.size
EXTENDED_REQUEST_BYTES = layout.EXTENDED_REQUEST.size

_WRITE = int(Command.WRITE)
_PAYLOAD_LEN = int(CommandFlags.PAYLOAD_LEN)

_WRITES = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})

_FLAGS_KNOWN = {
    Command.READ: CommandFlags.DF,
    Command.WRITE: CommandFlags(0),
    Command.DISC: CommandFlags(0),
    Command.FLUSH: CommandFlags(0),
    Command.TRIM: CommandFlags(0),
    Command.CACHE: CommandFlags(0),
    Command.WRITE_ZEROES: CommandFlags.NO_HOLE | CommandFlags.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlags.REQ_ONE,
}
"""Besides FUA, which any command may carry where it is advertised (76)."""

_ADVERTISED_BY = {
    Command.FLUSH: TransmissionFlags.SEND_FLUSH,
    Command.TRIM: TransmissionFlags.SEND_TRIM,
    Command.CACHE: TransmissionFlags.SEND_CACHE,
    Command.WRITE_ZEROES: TransmissionFlags.SEND_WRITE_ZEROES,
}


class Transmission:
    """What was negotiated with one client, applied to its requests."""

    def __init__(self, negotiated: Negotiated) -> None:
        export = negotiated.export
        self.size = export.size
        self.structured = negotiated.structured_replies
        self.extended = negotiated.extended_headers
        self.contexts = dict(negotiated.contexts)
        """Name by id of those that BLOCK_STATUS may be asked for."""
        self.read_only = bool(export.flags & TransmissionFlags.READ_ONLY)
        self.request_bytes = EXTENDED_REQUEST_BYTES if self.extended else REQUEST_BYTES
        """Of a request's head."""
        self.unpack = self.unpack_extended_request if self.extended else self.unpack_request
        """Reads one."""
        self._flags = export.flags
        self._align_mask = export.block_size_min - 1

        encoder: ReplyEncoder
        if self.extended:
            encoder = ExtendedReplies()
        else:
            encoder = StructuredReplies() if self.structured else SimpleReplies()
        self.has_chunks = encoder.has_chunks
        self.read_head_bytes = encoder.read_head_bytes
        self.pack_read_head = encoder.pack_read_head
        self.reply_done = encoder.reply_done
        self.reply_error = encoder.reply_error
        self.reply_status = encoder.reply_status
        self.data_head = encoder.data_head
        self.hole = encoder.hole

    @staticmethod
    def unpack_request(buffer: bytearray | memoryview, position: int) -> Request:
        """The compact request head at `position`.

        Raises:
            ProtocolError: wrong magic; nothing after it can be understood (58).
        """
        magic, flags, command, cookie, offset, length = layout.REQUEST.unpack_from(buffer, position)
        if magic != REQUEST_MAGIC:
            raise ProtocolError(f"wrong request magic {magic:#010x}")
        return Request(flags, command, cookie, offset, length)

    @staticmethod
    def unpack_extended_request(buffer: bytearray | memoryview, position: int) -> Request:
        """The extended request head at `position`.

        A WRITE's length is its payload's with and without PAYLOAD_LEN, so that flag is dropped (49).

        Raises:
            ProtocolError: wrong magic (58).
        """
        magic, flags, command, cookie, offset, length = layout.EXTENDED_REQUEST.unpack_from(buffer, position)
        if magic != EXTENDED_REQUEST_MAGIC:
            raise ProtocolError(f"wrong extended request magic {magic:#010x}")
        if command == _WRITE:
            flags &= ~_PAYLOAD_LEN
        return Request(flags, command, cookie, offset, length)

    def payload_bytes(self, request: Request) -> int:
        """How many bytes follow the head, whether or not the request is refused (67).

        Raises:
            ProtocolError: more than anyone may send (50): 64-bit lengths cannot all be consumed.
        """
        has_payload = request.command == _WRITE or (self.extended and request.flags & _PAYLOAD_LEN)
        length = request.length if has_payload else 0
        if self.extended and length > PAYLOAD_BYTES_ACCEPTED:
            raise ProtocolError(f"a payload of {length} bytes is over the limit of {PAYLOAD_BYTES_ACCEPTED}")
        return length

    def parse_status_query(self, request: Request, payload: bytes) -> StatusQuery | Refusal:
        """What a BLOCK_STATUS with PAYLOAD_LEN asks for; its range is for `check` to judge (52)."""
        try:
            query = messages.BLOCK_STATUS_QUERY.parse(payload)
        except ProtocolError as error:
            return Refusal(Errno.EINVAL, str(error))
        ids = query.context_ids
        if not ids:
            return Refusal(Errno.EINVAL, "BLOCK_STATUS names no meta context")
        if len(set(ids)) < len(ids):
            return Refusal(Errno.EINVAL, "BLOCK_STATUS names a meta context twice")
        if not self.contexts.keys() >= set(ids):
            return Refusal(Errno.EINVAL, "BLOCK_STATUS names a meta context that was not selected")
        effective = request._replace(flags=request.flags & ~_PAYLOAD_LEN, length=query.length)
        return StatusQuery(effective, ids)

    def check(self, request: Request) -> Refusal | None:
        """Why `request` must be refused, or None."""
        offset, length = request.offset, request.length
        if (
            request.command <= Command.WRITE
            and not request.flags
            and offset + length <= self.size
            and length <= PAYLOAD_BYTES_ACCEPTED
            and not (offset | length) & self._align_mask
            and not (request.command and self.read_only)
        ):
            return None  # nearly always; the rest finds out what is wrong, if anything is
        try:
            command = Command(request.command)
            flags_known = _FLAGS_KNOWN[command]
        except (ValueError, KeyError):
            return Refusal(Errno.EINVAL, f"unknown command {request.command}")
        return (
            self._check_flags(request, command, flags_known)
            or self._check_allowed(command)
            or self._check_range(request, command)
        )

    def _check_flags(self, request: Request, command: Command, flags_known: CommandFlags) -> Refusal | None:
        flags = request.flags
        if self._flags & TransmissionFlags.SEND_FUA:
            flags_known |= CommandFlags.FUA
        # Not `~flags_known`: the complement of an IntFlag has only the bits that it defines.
        if flags & ~int(flags_known):
            return Refusal(Errno.EINVAL, f"flags {flags:#x} do not go with {command.name}")
        if flags & CommandFlags.DF and not self._flags & TransmissionFlags.SEND_DF:
            return Refusal(Errno.EINVAL, "DF was not offered")
        if flags & CommandFlags.FAST_ZERO and not self._flags & TransmissionFlags.SEND_FAST_ZERO:
            return Refusal(Errno.EINVAL, "FAST_ZERO was not offered")  # 72
        return None

    def _check_allowed(self, command: Command) -> Refusal | None:
        if self.read_only and command in _WRITES:
            return Refusal(Errno.EPERM, "the export is read-only")  # 79
        needed = _ADVERTISED_BY.get(command)
        if needed is not None and not self._flags & needed:
            return Refusal(Errno.EINVAL, f"{command.name} was not offered")
        if command is Command.BLOCK_STATUS and not self.contexts:
            return Refusal(Errno.EINVAL, "no meta context was negotiated")  # 75
        return None

    def _check_range(self, request: Request, command: Command) -> Refusal | None:
        offset, length = request.offset, request.length
        if command is Command.DISC:
            return None
        if command is Command.FLUSH:
            return Refusal(Errno.EINVAL, "FLUSH takes no range") if offset or length else None  # 68
        if offset + length > self.size:
            error = Errno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL
            return Refusal(error, f"{command.name} past the end: {offset}+{length} of {self.size}")  # 78
        if (offset | length) & self._align_mask:
            return Refusal(Errno.EINVAL, f"{command.name} must be aligned to {self._align_mask + 1}")  # 80
        if command in (Command.READ, Command.WRITE) and length > PAYLOAD_BYTES_ACCEPTED:
            return Refusal(Errno.EINVAL, f"{command.name} of {length} is over {PAYLOAD_BYTES_ACCEPTED} bytes")
        if command is Command.BLOCK_STATUS and not length:
            return Refusal(Errno.EINVAL, "BLOCK_STATUS of nothing")
        return None
