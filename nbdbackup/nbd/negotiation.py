"""Fixed newstyle negotiation, server role: a state machine over bytes.

    greeting() ->  CLIENT_FLAGS  --flags-->  OPTION_HEAD  --head-->  PAYLOAD (kept)  --\\
                                                  ^      \\--head-->  SKIP (thrown away) |
                                                  |                       |            |
                                                  \\-----------------------+------------/
                                                                          |
                      GO or EXPORT_NAME --> READY       ABORT --> ABORTED       a breach --> BROKEN
                               STARTTLS --> TLS --tls_started()--> OPTION_HEAD, all agreements void

Two laws. Every option that is not EXPORT_NAME gets exactly one final reply (ACK or an error), after
all of its payload was consumed: the stream stays in step whatever the payload was. And a client is
disconnected only for a breach of a MUST, for abuse, or because EXPORT_NAME has no way to fail.

Whoever can change the clear text before STARTTLS must gain nothing by it: what was learnt there is
forgotten, and bytes behind STARTTLS, which the client could not have meant for us, end the connection.

To add an option: a row in `_OPTIONS` and its handler. What a row does not keep is never buffered.

Source: the NBD specification, "Handshake phase" and "Option types".
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import messages
from nbdbackup.nbd.agreement import ExportCatalog, ExportInfo, Negotiated, TlsMode
from nbdbackup.nbd.constants import (
    BLOCK_SIZE_UNASKED_MAX,
    CONTEXTS_MAX,
    OPTION_BUFFER_BYTES_MAX,
    OPTION_BYTES_MAX,
    OPTION_REPLIES_BYTES_MAX,
    OPTIONS_MAX,
    STRING_BYTES_MAX,
    ClientFlags,
    HandshakeFlags,
    InfoType,
    Option,
    OptionReply,
    TransmissionFlags,
)
from nbdbackup.nbd.replies import display_text

T = TypeVar("T", bound=msgspec.Struct)


class HandshakeError(ProtocolError):
    """The client must be disconnected, once `reply` (bytes, mostly none) was sent."""

    def __init__(self, message: str, reply: bytes = b"") -> None:
        super().__init__(message)
        self.reply = reply


class _State(Enum):
    CLIENT_FLAGS = auto()
    OPTION_HEAD = auto()
    PAYLOAD = auto()
    SKIP = auto()
    TLS = auto()
    READY = auto()
    ABORTED = auto()
    BROKEN = auto()


class _Payload(Enum):
    """What becomes of an option's payload."""

    KEEP = auto()
    NONE = auto()
    """There must not be any: ERR_INVALID."""
    IGNORE = auto()


class _OptionError(Exception):
    """Answer the option with this error and go on."""

    def __init__(self, reply: OptionReply, text: str) -> None:
        super().__init__(text)
        self.reply = reply


class _Rule(msgspec.Struct, frozen=True):
    """How an option is treated: its payload, then its handler, which sends all but the error replies."""

    handler: "Callable[[ServerNegotiation, bytes], None]"
    payload: _Payload


_HELLO_BYTES = messages.CLIENT_HELLO.sizeof()
_HEAD_BYTES = messages.OPTION_HEAD.sizeof()
_SERVER_FLAGS = HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES
_NAME_SHOWN_MAX = 100
_WITHOUT_TLS = (Option.STARTTLS, Option.ABORT)
_HOW_TO_USE_TLS = "connect with TLS (nbds://)"
_CLIENT_FLAGS_KNOWN = ClientFlags.FIXED_NEWSTYLE | ClientFlags.NO_ZEROES


class ServerNegotiation:
    """One client's handshake. Send `greeting()`, then feed `receive` until there is a `result`.

    At most `OPTION_BUFFER_BYTES_MAX` bytes of a client are kept besides what one call brings.
    """

    def __init__(self, catalog: ExportCatalog, tls: TlsMode = TlsMode.OFF) -> None:
        self.result: Negotiated | None = None
        """Set by EXPORT_NAME or GO: the transmission phase has begun."""
        self.aborted = False
        """The client said ABORT: send what `receive` returned, then close."""
        self.leftover = b""
        """Bytes behind the last option; they belong to the transmission phase."""
        self.shutting_down = False
        """Set it to refuse every option but ABORT from now on."""

        # Set once.
        self._catalog = catalog
        self._tls = tls
        self._client_flags = ClientFlags(0)

        # Changes with each option.
        self._state = _State.CLIENT_FLAGS
        self._pending = bytearray()
        self._replies = bytearray()
        self._options = 0
        self._head = messages.OptionHead(0, 0)
        self._skip_bytes = 0
        self._refusal: _OptionError | None = None

        self._is_encrypted = False

        # What was agreed on so far; STARTTLS voids it.
        self._structured_replies = False
        self._extended_headers = False
        self._contexts: tuple[str, tuple[tuple[int, str], ...]] | None = None
        """The export that they were selected for, and (id, name) of each."""

    def greeting(self) -> bytes:
        """What the server sends first."""
        return messages.GREETING.build(messages.Greeting(_SERVER_FLAGS))

    @property
    def wants_tls(self) -> bool:
        """Send what `receive` returned, do the TLS handshake, then call `tls_started`."""
        return self._state is _State.TLS

    def tls_started(self) -> None:
        """From now on `receive` gets, and its answers go by way of, TLS."""
        assert self.wants_tls
        self._state = _State.OPTION_HEAD
        self._is_encrypted = True
        self._forget_agreements()

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take any number of bytes from the client; the bytes to send to it.

        Must not be called while `wants_tls`, nor any more once there is a `result`, or after `aborted`
        or an error.

        Raises:
            HandshakeError: the client must be disconnected; the text says why.
        """
        assert self._state not in (_State.READY, _State.ABORTED, _State.BROKEN, _State.TLS)
        self._pending += data
        try:
            while self._step():
                if len(self._replies) > OPTION_REPLIES_BYTES_MAX:
                    raise ProtocolError("the client asks for more replies than one client may have at once")
            if self.wants_tls and self._pending:
                self._replies.clear()
                raise ProtocolError(
                    "bytes came in the clear behind STARTTLS; somebody may have put them there"
                )
        except ProtocolError as error:
            self._state = _State.BROKEN
            self._pending.clear()
            raise HandshakeError(str(error), self._take_replies()) from None
        if self.result is not None:
            self.leftover = bytes(self._pending)
        if self.result is not None or self.aborted:
            self._pending.clear()
        return self._take_replies()

    def _take_replies(self) -> bytes:
        replies = bytes(self._replies)
        self._replies.clear()
        return replies

    # The machine: each step consumes one unit, or returns False for want of bytes.

    def _step(self) -> bool:
        match self._state:
            case _State.CLIENT_FLAGS:
                return self._step_client_flags()
            case _State.OPTION_HEAD:
                return self._step_option_head()
            case _State.PAYLOAD:
                return self._step_payload()
            case _State.SKIP:
                return self._step_skip()
            case _:
                return False

    def _step_client_flags(self) -> bool:
        raw = self._take(_HELLO_BYTES)
        if raw is None:
            return False
        flags = messages.CLIENT_HELLO.parse(raw).flags
        # Not `~_CLIENT_FLAGS_KNOWN`: the complement of an IntFlag has only the bits that it defines.
        if flags & ~int(_CLIENT_FLAGS_KNOWN):
            raise ProtocolError(f"the client set flags that were not offered: {int(flags):#x}")
        self._client_flags = flags
        self._state = _State.OPTION_HEAD
        return True

    def _step_option_head(self) -> bool:
        raw = self._take(_HEAD_BYTES)
        if raw is None:
            return False
        head = messages.OPTION_HEAD.parse(raw)
        name = _option_name(head.option)
        self._options += 1
        if self._options > OPTIONS_MAX:
            raise ProtocolError(f"the client sent more than {OPTIONS_MAX} options")
        if head.length > OPTION_BYTES_MAX:
            raise ProtocolError(
                f"option {name} claims {head.length} bytes, over the limit of {OPTION_BYTES_MAX}"
            )
        if head.option == Option.EXPORT_NAME:
            if head.length > STRING_BYTES_MAX:
                raise ProtocolError(f"EXPORT_NAME with a name of {head.length} bytes")
        elif not self._client_flags & ClientFlags.FIXED_NEWSTYLE:
            raise ProtocolError(f"option {name} from a client that did not negotiate fixed newstyle")
        self._head = head
        self._refusal = self._refusal_of(head)
        if self._refusal is None and _OPTIONS[head.option].payload is _Payload.KEEP:
            self._state = _State.PAYLOAD
        else:
            self._skip_bytes = head.length
            self._state = _State.SKIP
        return True

    def _refusal_of(self, head: messages.OptionHead) -> _OptionError | None:
        """Why this option fails whatever its payload says."""
        name = _option_name(head.option)
        if self.shutting_down and head.option != Option.ABORT:
            return _OptionError(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
        if self._tls is TlsMode.REQUIRE and not self._is_encrypted and head.option not in _WITHOUT_TLS:
            return _OptionError(OptionReply.ERR_TLS_REQD, f"{name} only after STARTTLS; {_HOW_TO_USE_TLS}")
        rule = _OPTIONS.get(head.option)
        if rule is None:
            return _OptionError(OptionReply.ERR_UNSUP, f"option {name} is not supported")
        if rule.payload is _Payload.NONE and head.length:
            return _OptionError(
                OptionReply.ERR_INVALID, f"{name} takes no payload, but {head.length} bytes came"
            )
        if rule.payload is _Payload.KEEP and head.length > OPTION_BUFFER_BYTES_MAX:
            return _OptionError(
                OptionReply.ERR_TOO_BIG,
                f"{name} with {head.length} bytes is over the limit of {OPTION_BUFFER_BYTES_MAX}",
            )
        return None

    def _step_payload(self) -> bool:
        payload = self._take(self._head.length)
        if payload is None:
            return False
        self._handle(payload)
        return True

    def _step_skip(self) -> bool:
        taken = min(self._skip_bytes, len(self._pending))
        del self._pending[:taken]
        self._skip_bytes -= taken
        if self._skip_bytes:
            return False
        self._handle(b"")
        return True

    def _handle(self, payload: bytes) -> None:
        self._state = _State.OPTION_HEAD
        if self._head.option == Option.SET_META_CONTEXT:
            self._contexts = None  # one that fails also ends what the last one selected
        try:
            if self._refusal is not None:
                raise self._refusal
            _OPTIONS[self._head.option].handler(self, payload)
        except _OptionError as error:
            if self._head.option == Option.EXPORT_NAME:
                raise ProtocolError(str(error)) from None
            text = messages.OptionErrorText(display_text(str(error)))
            self._reply(error.reply, messages.OPTION_ERROR_TEXT.build(text))

    def _take(self, count: int) -> bytes | None:
        if len(self._pending) < count:
            return None
        taken = bytes(memoryview(self._pending)[:count])
        del self._pending[:count]
        return taken

    def _reply(self, reply: OptionReply, payload: bytes = b"") -> None:
        head = messages.OptionReplyHead(self._head.option, reply, len(payload))
        self._replies += messages.OPTION_REPLY_HEAD.build(head) + payload

    # Options.

    def _on_export_name(self, payload: bytes) -> None:
        if self._extended_headers:
            raise ProtocolError("EXPORT_NAME after EXTENDED_HEADERS, which only GO goes with")
        name = messages.EXPORT_NAME_REQUEST.parse(payload).name
        export = self._export_as_told(name)
        reply = messages.ExportNameReply(export.size, export.flags)
        if self._client_flags & ClientFlags.NO_ZEROES:
            self._replies += messages.EXPORT_NAME_REPLY.build(reply)
        else:
            self._replies += messages.EXPORT_NAME_REPLY_PADDED.build(reply)
        self._enter_transmission(name, export)

    def _on_abort(self, payload: bytes) -> None:
        self._reply(OptionReply.ACK)
        self.aborted = True
        self._state = _State.ABORTED

    def _on_list(self, payload: bytes) -> None:
        for export in self._catalog.exports():
            if export.tls_only and not self._is_encrypted:
                continue
            entry = messages.ServerEntry(export.name, export.description)
            self._reply(OptionReply.SERVER, messages.SERVER_ENTRY.build(entry))
        self._reply(OptionReply.ACK)

    def _on_starttls(self, payload: bytes) -> None:
        if self._is_encrypted:
            raise _OptionError(OptionReply.ERR_INVALID, "STARTTLS was sent already")
        if self._tls is TlsMode.OFF:
            raise _OptionError(OptionReply.ERR_POLICY, "this server does not offer TLS")
        self._reply(OptionReply.ACK)
        self._state = _State.TLS

    def _on_info(self, payload: bytes) -> None:
        self._answer_info(_parse(messages.INFO_REQUEST, payload))

    def _on_go(self, payload: bytes) -> None:
        request = _parse(messages.INFO_REQUEST, payload)
        export = self._answer_info(request)
        self._enter_transmission(request.name, export)

    def _answer_info(self, request: messages.InfoRequest) -> ExportInfo:
        export = self._export_as_told(request.name)
        items = [messages.INFO_EXPORT.build(messages.InfoExport(export.size, export.flags))]
        if InfoType.NAME in request.types:
            items.append(messages.INFO_NAME.build(messages.InfoName(export.name)))
        if InfoType.DESCRIPTION in request.types and export.description:
            items.append(messages.INFO_DESCRIPTION.build(messages.InfoDescription(export.description)))
        # Unasked too: a client that did not ask may still use what it is told.
        sizes = messages.InfoBlockSize(
            export.block_size_min, export.block_size_preferred, export.payload_bytes_max
        )
        items.append(messages.INFO_BLOCK_SIZE.build(sizes))
        if export.block_size_min > BLOCK_SIZE_UNASKED_MAX and InfoType.BLOCK_SIZE not in request.types:
            self._reply(OptionReply.INFO, items[-1])
            raise _OptionError(
                OptionReply.ERR_BLOCK_SIZE_REQD,
                f"this export takes only requests in units of {export.block_size_min} bytes: "
                "ask for NBD_INFO_BLOCK_SIZE",
            )
        for item in items:
            self._reply(OptionReply.INFO, item)
        self._reply(OptionReply.ACK)
        return export

    def _on_structured_reply(self, payload: bytes) -> None:
        if self._extended_headers:
            raise _OptionError(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are in use already")
        self._structured_replies = True
        self._reply(OptionReply.ACK)

    def _on_extended_headers(self, payload: bytes) -> None:
        self._extended_headers = True
        self._reply(OptionReply.ACK)

    def _on_list_meta_context(self, payload: bytes) -> None:
        request, export = self._parse_meta_context(payload)
        for name in self._contexts_of(export):
            if request.queries and not _matches_any(name, request.queries):
                continue
            self._reply(OptionReply.META_CONTEXT, messages.META_CONTEXT.build(messages.MetaContext(0, name)))
        self._reply(OptionReply.ACK)

    def _on_set_meta_context(self, payload: bytes) -> None:
        request, export = self._parse_meta_context(payload)
        asked = set(request.queries)
        names = [name for name in self._contexts_of(export) if name in asked][:CONTEXTS_MAX]
        selected = tuple(enumerate(names, start=1))
        for number, name in selected:
            context = messages.MetaContext(number, name)
            self._reply(OptionReply.META_CONTEXT, messages.META_CONTEXT.build(context))
        self._reply(OptionReply.ACK)
        self._contexts = (export.name, selected)

    def _parse_meta_context(self, payload: bytes) -> tuple[messages.MetaContextRequest, ExportInfo]:
        if not self._replies_in_chunks:
            name = _option_name(self._head.option)
            raise _OptionError(
                OptionReply.ERR_INVALID, f"{name} needs STRUCTURED_REPLY or EXTENDED_HEADERS first"
            )
        request = _parse(messages.META_CONTEXT_REQUEST, payload)
        return request, self._find(request.name)

    # What several options need.

    def _forget_agreements(self) -> None:
        self._structured_replies = False
        self._extended_headers = False
        self._contexts = None

    @property
    def _replies_in_chunks(self) -> bool:
        return self._structured_replies or self._extended_headers

    def _contexts_of(self, export: ExportInfo) -> list[str]:
        """The contexts that this client can have, each once."""
        names = dict.fromkeys(export.contexts)
        return [name for name in names if self._extended_headers or name not in export.wide_contexts]

    def _find(self, name: str) -> ExportInfo:
        export = self._catalog.find(name)
        if export is None:
            shown = name if len(name) <= _NAME_SHOWN_MAX else name[:_NAME_SHOWN_MAX] + "..."
            what = f"no export named {shown!r}" if name else "no default export"
            raise _OptionError(OptionReply.ERR_UNKNOWN, f"{what}; LIST shows what there is")
        if export.tls_only and not self._is_encrypted:
            raise _OptionError(OptionReply.ERR_TLS_REQD, f"this export is only for TLS; {_HOW_TO_USE_TLS}")
        return export

    def _export_as_told(self, name: str) -> ExportInfo:
        export = self._find(name)
        flags = export.flags | TransmissionFlags.HAS_FLAGS
        if not self._replies_in_chunks:
            flags &= ~TransmissionFlags.SEND_DF
        if self._extended_headers:
            flags |= TransmissionFlags.BLOCK_STATUS_PAYLOAD
        return replace(export, flags=flags)

    def _enter_transmission(self, requested_name: str, export: ExportInfo) -> None:
        contexts: tuple[tuple[int, str], ...] = ()
        if self._contexts is not None and self._contexts[0] == export.name:
            available = self._contexts_of(export)
            contexts = tuple(pair for pair in self._contexts[1] if pair[1] in available)
        self.result = Negotiated(
            export, requested_name, self._replies_in_chunks, contexts, self._extended_headers
        )
        self._state = _State.READY


_OPTIONS: dict[int, _Rule] = {
    Option.EXPORT_NAME: _Rule(ServerNegotiation._on_export_name, _Payload.KEEP),
    Option.ABORT: _Rule(ServerNegotiation._on_abort, _Payload.IGNORE),
    Option.LIST: _Rule(ServerNegotiation._on_list, _Payload.NONE),
    Option.STARTTLS: _Rule(ServerNegotiation._on_starttls, _Payload.NONE),
    Option.INFO: _Rule(ServerNegotiation._on_info, _Payload.KEEP),
    Option.GO: _Rule(ServerNegotiation._on_go, _Payload.KEEP),
    Option.STRUCTURED_REPLY: _Rule(ServerNegotiation._on_structured_reply, _Payload.NONE),
    Option.EXTENDED_HEADERS: _Rule(ServerNegotiation._on_extended_headers, _Payload.NONE),
    Option.LIST_META_CONTEXT: _Rule(ServerNegotiation._on_list_meta_context, _Payload.KEEP),
    Option.SET_META_CONTEXT: _Rule(ServerNegotiation._on_set_meta_context, _Payload.KEEP),
}


def _option_name(option: int) -> str:
    return option.name if isinstance(option, Option) else f"{option:#x}"


def _parse(message: messages.Message[T], payload: bytes) -> T:
    try:
        return message.parse(payload)
    except ProtocolError as error:
        raise _OptionError(OptionReply.ERR_INVALID, str(error)) from None


def _matches_any(context: str, queries: tuple[str, ...]) -> bool:
    """Whether a query names `context`, or a namespace (ending in a colon) that it is in."""
    return any(query == context or (query.endswith(":") and context.startswith(query)) for query in queries)
