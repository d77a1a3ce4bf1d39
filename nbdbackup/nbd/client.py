"""Fixed newstyle negotiation, client role: what a server is asked, in order, and what it answers.

    greeting --> EXTENDED_HEADERS --> STRUCTURED_REPLY --> SET_META_CONTEXT --> GO --> result
                 (if wanted)          (if wanted, and      (if either was       |
                                      that was refused)    granted)             +-- ERR_UNSUP --> EXPORT_NAME

A server may refuse all but the last: the result says what it granted. One that is too old for GO,
or for options at all, is asked with EXPORT_NAME, which extended headers do not go with.

The server is not trusted: what it sends is bounded, checked against what was asked, and a
breach is a `ProtocolError`.

Source: the NBD specification, "Handshake phase"; the messages are those of the server role.
"""

import msgspec

from nbdbackup.errors import NbdBackupError, NotFoundError, ProtocolError
from nbdbackup.nbd import layout, messages
from nbdbackup.nbd.client_options import OptionExchange, error_name, reason
from nbdbackup.nbd.constants import (
    BASE_ALLOCATION,
    BLOCK_SIZE_MIN_LARGEST,
    EXTENDED_REQUEST_MAGIC,
    PAYLOAD_BYTES_ADVERTISED,
    REQUEST_MAGIC,
    Command,
    CommandFlags,
    HandshakeFlags,
    InfoType,
    Option,
    OptionReply,
    TransmissionFlags,
)

SIZE_MAX = (1 << 63) - 1
"""Bytes; no system addresses a larger device."""


class RemoteExport(msgspec.Struct, frozen=True):
    """What a server said about one of its exports. Sizes are in bytes."""

    name: str
    """Its canonical name if the server told it, else the name that it was asked for by."""
    description: str
    size: int
    flags: TransmissionFlags
    structured_replies: bool
    """READ and BLOCK_STATUS are answered in chunks."""
    contexts: tuple[tuple[int, str], ...]
    """(id, name) of each meta context that BLOCK_STATUS will answer."""
    block_size_min: int = 1
    block_size_preferred: int = 4096
    payload_bytes_max: int = PAYLOAD_BYTES_ADVERTISED
    extended_headers: bool = False
    """Requests and replies have lengths of 64 bits; `structured_replies` is then true as well."""


class ClientNegotiation(OptionExchange):
    """The handshake for one connection. Feed `receive` and send what it returns until there is a `result`.

    `leftover` then belongs to the transmission phase.
    """

    def __init__(
        self,
        export_name: str,
        *,
        want_structured: bool = True,
        want_extended: bool = False,
        contexts: tuple[str, ...] = (BASE_ALLOCATION,),
        tls: bool = False,
    ) -> None:
        """`contexts` are asked for only where structured or extended replies were granted."""
        super().__init__(tls=tls)
        self.result: RemoteExport | None = None

        # Set once.
        self._export_name = export_name
        self._want_structured = want_structured
        self._want_extended = want_extended
        self._want_contexts = contexts

        # What was learnt.
        self._awaits_export_name_reply = False
        self._structured = False
        self._extended = False
        self._contexts: dict[int, str] = {}
        self._name: str | None = None
        self._description = ""
        self._export: messages.InfoExport | None = None
        self._block_size = messages.InfoBlockSize(1, 4096, PAYLOAD_BYTES_ADVERTISED)

    def closed(self) -> NbdBackupError:
        """What it means that the server closed the connection now."""
        if self._awaits_export_name_reply:
            # EXPORT_NAME has no other way to say no.
            return NotFoundError(f"the server closed the connection: has it an export named {self._shown}?")
        return super().closed()

    @property
    def _shown(self) -> str:
        return repr(self._export_name[:100])

    def _step(self) -> bool:
        if self._awaits_export_name_reply and not self.is_over:
            return self._step_export_name_reply()
        return super()._step()

    def _step_export_name_reply(self) -> bool:
        message = messages.EXPORT_NAME_REPLY if self._no_zeroes else messages.EXPORT_NAME_REPLY_PADDED
        raw = self._take(message.sizeof())
        if raw is None:
            return False
        reply = message.parse(raw)
        self._export = messages.InfoExport(reply.size, reply.flags)
        self._finish()
        return True

    # What is sent.

    def _ask_structured(self) -> None:
        if self._want_structured:
            self._send(Option.STRUCTURED_REPLY)
        else:
            self._send_go()

    def _send_set_meta_context(self) -> None:
        request = messages.MetaContextRequest(self._export_name, self._want_contexts)
        self._send(Option.SET_META_CONTEXT, messages.META_CONTEXT_REQUEST.build(request))

    def _send_go(self) -> None:
        types = (InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE)
        request = messages.InfoRequest(self._export_name, types)
        self._send(Option.GO, messages.INFO_REQUEST.build(request))

    def _send_export_name(self) -> None:
        payload = messages.EXPORT_NAME_REQUEST.build(messages.ExportName(self._export_name))
        self._send(Option.EXPORT_NAME, payload)
        self._awaits_export_name_reply = True

    # What is answered.

    def _on_greeting(self, flags: HandshakeFlags) -> None:
        if not flags & HandshakeFlags.FIXED_NEWSTYLE:
            self._send_export_name()
        elif self._want_extended:
            self._send(Option.EXTENDED_HEADERS)
        else:
            self._ask_structured()

    def _on_item(self, reply: int, payload: bytes) -> bool:
        if reply == OptionReply.INFO and self._option is Option.GO:
            self._on_info(payload)
        elif reply == OptionReply.META_CONTEXT and self._option is Option.SET_META_CONTEXT:
            self._on_meta_context(payload)
        else:
            return False
        return True

    def _on_ack(self) -> None:
        if self._option in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS):
            self._structured = True
            self._extended = self._option is Option.EXTENDED_HEADERS
            if self._want_contexts:
                self._send_set_meta_context()
            else:
                self._send_go()
        elif self._option is Option.SET_META_CONTEXT:
            self._send_go()
        else:
            self._finish()

    def _on_error(self, reply: int, payload: bytes) -> None:
        if self._option is Option.EXTENDED_HEADERS:
            self._ask_structured()
        elif self._option is not Option.GO:
            self._contexts.clear()
            self._send_go()
        elif reply == OptionReply.ERR_UNSUP and not self._extended:
            self._send_export_name()
        elif reply == OptionReply.ERR_UNKNOWN:
            raise NotFoundError(f"the server has no export named {self._shown}{reason(payload)}")
        else:
            raise ProtocolError(
                f"the server refuses export {self._shown} with {error_name(reply)}{reason(payload)}"
            )

    def _on_meta_context(self, payload: bytes) -> None:
        context = messages.META_CONTEXT.parse(payload)
        if context.name not in self._want_contexts:
            raise ProtocolError(
                f"the server selected meta context {context.name[:100]!r}, which nobody wanted"
            )
        if context.id in self._contexts or context.name in self._contexts.values():
            raise ProtocolError(f"the server selected meta context {context.name[:100]!r} twice")
        self._contexts[context.id] = context.name

    def _on_info(self, payload: bytes) -> None:
        match messages.INFO_HEAD.parse(payload).type:
            case InfoType.EXPORT:
                self._export = messages.INFO_EXPORT.parse(payload)
            case InfoType.NAME:
                self._name = messages.INFO_NAME.parse(payload).name
            case InfoType.DESCRIPTION:
                self._description = messages.INFO_DESCRIPTION.parse(payload).description
            case InfoType.BLOCK_SIZE:
                self._block_size = messages.INFO_BLOCK_SIZE.parse(payload)
            case _:
                pass  # a client ignores what it does not know

    def _finish(self) -> None:
        if self._export is None:
            raise ProtocolError("the server accepted GO without telling the export's size")
        if self._export.size > SIZE_MAX:
            raise ProtocolError(f"the server tells an impossible size of {self._export.size} bytes")
        sizes = self._block_size
        minimum, preferred = sizes.minimum, sizes.preferred
        if (
            not (0 < minimum <= BLOCK_SIZE_MIN_LARGEST)
            or minimum & (minimum - 1)
            or preferred & (preferred - 1)
            or not minimum <= preferred <= sizes.payload_max
        ):
            raise ProtocolError(
                f"the server tells impossible block sizes: {minimum}, {preferred}, {sizes.payload_max}"
            )
        self.result = RemoteExport(
            name=self._export_name if self._name is None else self._name,
            description=self._description,
            size=self._export.size,
            flags=self._export.flags,
            structured_replies=self._structured,
            contexts=tuple(self._contexts.items()),
            block_size_min=minimum,
            block_size_preferred=preferred,
            payload_bytes_max=sizes.payload_max,
            extended_headers=self._extended,
        )
        self._end()


def encode_request(
    command: Command, cookie: int, offset: int, length: int, flags: int = 0, *, extended: bool = False
) -> bytes:
    """A request's head with CommandFlags `flags`; the `length` bytes of a WRITE go right behind it.

    Only with `extended` headers, which say so themselves, may `length` exceed 32 bits.
    """
    if not extended:
        return layout.REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
    if command == Command.WRITE:
        flags |= CommandFlags.PAYLOAD_LEN
    return layout.EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
