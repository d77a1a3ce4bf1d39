"""Fixed newstyle negotiation, client role: what a server is asked, in order, and what it answers.

    greeting --> STRUCTURED_REPLY --> SET_META_CONTEXT --> GO --> result
                 (if wanted)          (if that was granted) \\-- ERR_UNSUP --> EXPORT_NAME --> result

With `tls`, STARTTLS comes before all of these, and there is no going on without it.

A server may refuse the first two: the result says what it granted. One that is too old for GO,
or for options at all, is asked with EXPORT_NAME.

The server is not trusted: what it sends is bounded, checked against what was asked, and a
breach is a `ProtocolError`.

Source: the NBD specification, "Handshake phase"; the messages are those of the server role.
"""

from dataclasses import dataclass
from enum import Enum, auto

from nbdbackup.errors import NbdBackupError, NotFoundError, ProtocolError
from nbdbackup.nbd import layout, messages
from nbdbackup.nbd.constants import (
    BASE_ALLOCATION,
    BLOCK_SIZE_MIN_LARGEST,
    OLDSTYLE_MAGIC,
    OPTION_REPLY_ERROR,
    PAYLOAD_BYTES_ADVERTISED,
    REQUEST_MAGIC,
    STRING_BYTES_MAX,
    ClientFlags,
    Command,
    HandshakeFlags,
    InfoType,
    Option,
    OptionReply,
    TransmissionFlags,
)

REPLY_BYTES_MAX = 64 << 10
"""Payload of one option reply; the longest that is legal holds two strings."""

REPLIES_PER_OPTION_MAX = 1024

SIZE_MAX = (1 << 63) - 1
"""Bytes; no system addresses a larger device."""


@dataclass(frozen=True, slots=True)
class RemoteExport:
    """What a server said about one of its exports. Sizes are in bytes."""

    name: str
    """Its canonical name if the server told it, else the name that it was asked for by."""
    description: str
    size: int
    flags: TransmissionFlags
    structured_replies: bool
    contexts: tuple[tuple[int, str], ...]
    """(id, name) of each meta context that BLOCK_STATUS will answer."""
    block_size_min: int = 1
    block_size_preferred: int = 4096
    payload_bytes_max: int = PAYLOAD_BYTES_ADVERTISED


class _State(Enum):
    GREETING = auto()
    OPTION_REPLY_HEAD = auto()
    OPTION_REPLY_PAYLOAD = auto()
    EXPORT_NAME_REPLY = auto()
    TLS = auto()
    READY = auto()
    BROKEN = auto()


_GREETING_BYTES = messages.GREETING.sizeof()
_REPLY_HEAD_BYTES = messages.OPTION_REPLY_HEAD.sizeof()


class ClientNegotiation:
    """The handshake for one connection. Feed `receive` and send what it returns until there is a `result`."""

    def __init__(
        self,
        export_name: str,
        *,
        want_structured: bool = True,
        contexts: tuple[str, ...] = (BASE_ALLOCATION,),
        tls: bool = False,
    ) -> None:
        """`contexts` are asked for only where `want_structured`, which they need. `tls`: or nothing."""
        self.result: RemoteExport | None = None
        self.leftover = b""
        """Bytes behind the handshake; they belong to the transmission phase."""

        # Set once.
        self._export_name = export_name
        self._want_structured = want_structured
        self._want_contexts = contexts
        self._want_tls = tls
        self._no_zeroes = False

        # Changes with each message.
        self._state = _State.GREETING
        self._pending = bytearray()
        self._requests = bytearray()
        self._option = Option.ABORT
        self._replies = 0
        self._head = messages.OptionReplyHead(0, 0, 0)

        # What was learnt.
        self._structured = False
        self._contexts: dict[int, str] = {}
        self._name: str | None = None
        self._description = ""
        self._export: messages.InfoExport | None = None
        self._block_size = messages.InfoBlockSize(1, 4096, PAYLOAD_BYTES_ADVERTISED)

    @property
    def wants_tls(self) -> bool:
        """Do the TLS handshake, then call `tls_started`."""
        return self._state is _State.TLS

    def tls_started(self) -> bytes:
        """The bytes to send next; they, and all that is received from now on, go by way of TLS."""
        assert self.wants_tls
        self._send_first()
        return self._take_requests()

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take any number of bytes from the server; the bytes to send to it.

        Must not be called while `wants_tls`, nor any more once there is a `result`, or after an error.

        Raises:
            NotFoundError: the server has no such export.
            ProtocolError: the server refuses the export, or breaks the protocol.
        """
        assert self._state not in (_State.READY, _State.BROKEN, _State.TLS)
        self._pending += data
        try:
            while self._step():
                pass
            if self.wants_tls and self._pending:
                raise ProtocolError(
                    "bytes came in the clear behind the server's answer to STARTTLS; "
                    "somebody may have put them there"
                )
        except NbdBackupError:
            self._state = _State.BROKEN
            raise
        if self.result is not None:
            self.leftover = bytes(self._pending)
            self._pending.clear()
        return self._take_requests()

    def closed(self) -> NbdBackupError:
        """What it means that the server closed the connection now."""
        if self._state is _State.EXPORT_NAME_REPLY:
            # EXPORT_NAME has no other way to say no.
            return NotFoundError(f"the server closed the connection: has it an export named {self._shown}?")
        return ProtocolError("the server closed the connection during negotiation")

    @property
    def _shown(self) -> str:
        return repr(self._export_name[:100])

    # The machine: each step consumes one unit, or returns False for want of bytes.

    def _step(self) -> bool:
        match self._state:
            case _State.GREETING:
                return self._step_greeting()
            case _State.OPTION_REPLY_HEAD:
                return self._step_reply_head()
            case _State.OPTION_REPLY_PAYLOAD:
                return self._step_reply_payload()
            case _State.EXPORT_NAME_REPLY:
                return self._step_export_name_reply()
            case _:
                return False

    def _step_greeting(self) -> bool:
        raw = self._take(_GREETING_BYTES)
        if raw is None:
            return False
        if messages.GREETING_HEAD.parse(raw).second_magic == OLDSTYLE_MAGIC:
            raise ProtocolError("the server speaks only the oldstyle protocol, which is not supported")
        flags = messages.GREETING.parse(raw).flags
        self._no_zeroes = bool(flags & HandshakeFlags.NO_ZEROES)
        answer = ClientFlags(flags & (HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES))
        self._requests += messages.CLIENT_HELLO.build(messages.ClientHello(answer))
        if self._want_tls:
            if not flags & HandshakeFlags.FIXED_NEWSTYLE:
                raise ProtocolError("the server is too old for TLS")
            self._send(Option.STARTTLS)
        elif not flags & HandshakeFlags.FIXED_NEWSTYLE:
            self._send_export_name()
        else:
            self._send_first()
        return True

    def _step_reply_head(self) -> bool:
        raw = self._take(_REPLY_HEAD_BYTES)
        if raw is None:
            return False
        head = messages.OPTION_REPLY_HEAD.parse(raw)
        if head.option != self._option:
            raise ProtocolError(f"the server answered option {head.option:d} instead of {self._option.name}")
        if head.length > REPLY_BYTES_MAX:
            raise ProtocolError(f"the server's answer to {self._option.name} claims {head.length} bytes")
        self._replies += 1
        if self._replies > REPLIES_PER_OPTION_MAX:
            raise ProtocolError(f"the server's answer to {self._option.name} does not end")
        self._head = head
        self._state = _State.OPTION_REPLY_PAYLOAD
        return True

    def _step_reply_payload(self) -> bool:
        payload = self._take(self._head.length)
        if payload is None:
            return False
        self._state = _State.OPTION_REPLY_HEAD
        reply = self._head.reply
        if reply == OptionReply.ACK:
            if payload:
                raise ProtocolError(f"the server's ACK to {self._option.name} has a payload")
            self._on_ack()
        elif reply & OPTION_REPLY_ERROR:
            self._on_error(reply, payload)
        elif reply == OptionReply.INFO and self._option is Option.GO:
            self._on_info(payload)
        elif reply == OptionReply.META_CONTEXT and self._option is Option.SET_META_CONTEXT:
            self._on_meta_context(payload)
        else:
            raise ProtocolError(f"the server answered {self._option.name} with reply type {reply:d}")
        return True

    def _step_export_name_reply(self) -> bool:
        message = messages.EXPORT_NAME_REPLY if self._no_zeroes else messages.EXPORT_NAME_REPLY_PADDED
        raw = self._take(message.sizeof())
        if raw is None:
            return False
        reply = message.parse(raw)
        self._export = messages.InfoExport(reply.size, reply.flags)
        self._finish()
        return True

    def _take(self, count: int) -> bytes | None:
        if len(self._pending) < count:
            return None
        taken = bytes(memoryview(self._pending)[:count])
        del self._pending[:count]
        return taken

    # What is sent.

    def _take_requests(self) -> bytes:
        requests = bytes(self._requests)
        self._requests.clear()
        return requests

    def _send_first(self) -> None:
        if self._want_structured:
            self._send(Option.STRUCTURED_REPLY)
        else:
            self._send_go()

    def _send(self, option: Option, payload: bytes = b"") -> None:
        self._option = option
        self._replies = 0
        self._requests += messages.OPTION_HEAD.build(messages.OptionHead(option, len(payload))) + payload
        self._state = _State.OPTION_REPLY_HEAD

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
        self._state = _State.EXPORT_NAME_REPLY

    # What is answered.

    def _on_ack(self) -> None:
        if self._option is Option.STARTTLS:
            self._state = _State.TLS
        elif self._option is Option.STRUCTURED_REPLY:
            self._structured = True
            if self._want_contexts:
                self._send_set_meta_context()
            else:
                self._send_go()
        elif self._option is Option.SET_META_CONTEXT:
            self._send_go()
        else:
            self._finish()

    def _on_error(self, reply: int, payload: bytes) -> None:
        if reply == OptionReply.ERR_TLS_REQD:
            raise ProtocolError("the server wants TLS: use an nbds:// or nbds+unix:// URI")
        if self._option is Option.STARTTLS:
            raise ProtocolError(
                f"the server does not offer TLS{_reason(payload)}; an nbd:// URI would do without it"
            )
        if self._option is not Option.GO:
            self._contexts.clear()
            self._send_go()
        elif reply == OptionReply.ERR_UNSUP:
            self._send_export_name()
        elif reply == OptionReply.ERR_UNKNOWN:
            raise NotFoundError(f"the server has no export named {self._shown}{_reason(payload)}")
        else:
            name = reply.name if isinstance(reply, OptionReply) else f"error {reply & ~OPTION_REPLY_ERROR}"
            raise ProtocolError(f"the server refuses export {self._shown} with {name}{_reason(payload)}")

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
        )
        self._state = _State.READY


def _reason(payload: bytes) -> str:
    """The server's own words, if they are fit to be shown."""
    try:
        text = messages.OPTION_ERROR_TEXT.parse(payload[:STRING_BYTES_MAX]).text
    except ProtocolError:
        return ""
    return f": {' '.join(text.split())}" if text else ""


def encode_request(command: Command, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    """A request's head with CommandFlags `flags`; the `length` bytes of a WRITE go right behind it."""
    return layout.REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
