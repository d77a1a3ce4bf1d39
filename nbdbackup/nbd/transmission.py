"""The transmission phase, server role: which requests are refused and how, and reply heads.

`Transmission.check` is the only judge of a request: what it lets through is inside the
device, permitted by the export and has only flags that its command knows. A refused WRITE
still carries its payload; the caller consumes it to stay in step.

A read's data is put by the caller right behind the head that `pack_read_head` writes, so that
it goes from the device to the socket without a copy.

Source: the NBD specification's "Transmission phase"; numbers in comments are the
requirements of the protocol's conformance list that the tests name.
"""

from collections.abc import Sequence
from typing import NamedTuple

from nbdbackup.errors import ProtocolError
from nbdbackup.extents import StatusExtent
from nbdbackup.nbd import layout, replies
from nbdbackup.nbd.constants import (
    PAYLOAD_BYTES_ACCEPTED,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlags,
    Errno,
    ReplyFlags,
    ReplyType,
    TransmissionFlags,
)
from nbdbackup.nbd.negotiation import Negotiated

REQUEST_BYTES = layout.REQUEST.size

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


class Request(NamedTuple):
    """One request's head. `flags` and `command` are plain numbers: they may be unknown ones."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int

    @property
    def payload_bytes(self) -> int:
        """How many bytes follow the head, whether or not the request is refused (67)."""
        return self.length if self.command == Command.WRITE else 0


class Refusal(NamedTuple):
    """Why a request is not carried out."""

    error: Errno
    text: str


class Transmission:
    """What was negotiated with one client, applied to its requests."""

    def __init__(self, negotiated: Negotiated) -> None:
        export = negotiated.export
        self.size = export.size
        self.structured = negotiated.structured_replies
        self.contexts = negotiated.contexts
        self.read_only = bool(export.flags & TransmissionFlags.READ_ONLY)
        self.read_head_bytes = layout.OFFSET_DATA_CHUNK.size if self.structured else layout.SIMPLE_REPLY.size
        self._flags = export.flags
        self._align_mask = export.block_size_min - 1

    @staticmethod
    def unpack_request(buffer: bytearray, position: int) -> Request:
        """The request head at `position`.

        Raises:
            ProtocolError: wrong magic; nothing after it can be understood (58).
        """
        magic, flags, command, cookie, offset, length = layout.REQUEST.unpack_from(buffer, position)
        if magic != REQUEST_MAGIC:
            raise ProtocolError(f"wrong request magic {magic:#010x}")
        return Request(flags, command, cookie, offset, length)

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

    # Replies.

    def pack_read_head(self, buffer: bytearray, position: int, request: Request) -> None:
        """Write the head of a successful READ reply, `read_head_bytes` long; its data goes behind.

        With structured replies the length must not be 0 (62): `reply_done` answers that.
        """
        if self.structured:
            layout.OFFSET_DATA_CHUNK.pack_into(
                buffer,
                position,
                STRUCTURED_REPLY_MAGIC,
                ReplyFlags.DONE,
                ReplyType.OFFSET_DATA,
                request.cookie,
                request.length + layout.OFFSET_DATA_HEAD.size,
                request.offset,
            )
        else:
            layout.SIMPLE_REPLY.pack_into(buffer, position, SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def reply_done(self, request: Request) -> bytes:
        """Success without data. A READ is always answered in chunks once these are negotiated (39)."""
        if self.structured and request.command == Command.READ:
            return replies.none_chunk(request.cookie)
        return replies.simple_reply(request.cookie, Errno.OK)

    def reply_error(self, request: Request, error: Errno, text: str) -> bytes:
        """Failure; the text reaches clients that negotiated structured replies (60)."""
        if self.structured:
            return replies.error_chunk(request.cookie, error, text)
        return replies.simple_reply(request.cookie, error)

    def reply_status(self, request: Request, extents: Sequence[StatusExtent]) -> bytes:
        """One chunk for each negotiated context, in one reply; REQ_ONE gets the first extent (74)."""
        if request.flags & CommandFlags.REQ_ONE:
            extents = extents[:1]
        pairs = [(extent.length, int(extent.flags)) for extent in extents]
        last = len(self.contexts) - 1
        return b"".join(
            replies.block_status_chunk(request.cookie, context_id, pairs, done=index == last)
            for index, (context_id, _) in enumerate(self.contexts)
        )
