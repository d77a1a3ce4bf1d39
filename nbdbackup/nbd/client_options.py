"""Options from the client's side: one is asked at a time, and its replies are read until it is answered.

What every conversation with a server has in common, up to the transmission phase: the greeting, and
replies that fit the option that was asked. What is asked, and what the answers mean, is the
subclass's: `nbd/client.py` negotiates an export, `nbd/client_inquiry.py` asks what there is.

With `tls`, STARTTLS comes before everything else, and there is no going on without it. Whoever can
change the clear text before it must gain nothing: bytes behind its answer are a breach.

The server is not trusted: what it sends is bounded, and a breach is a `ProtocolError`.

Source: the NBD specification, "Handshake phase".
"""

from abc import ABC, abstractmethod
from enum import Enum, auto

from nbdbackup.errors import NbdBackupError, ProtocolError
from nbdbackup.nbd import messages
from nbdbackup.nbd.constants import (
    OLDSTYLE_MAGIC,
    OPTION_REPLY_ERROR,
    STRING_BYTES_MAX,
    ClientFlags,
    HandshakeFlags,
    Option,
    OptionReply,
)
from nbdbackup.nbd.replies import shown_text

REPLY_BYTES_MAX = 64 << 10
"""Payload of one option reply; the longest that is legal holds two strings."""

REPLIES_PER_OPTION_MAX = 1024


class _State(Enum):
    GREETING = auto()
    OPTION_REPLY_HEAD = auto()
    OPTION_REPLY_PAYLOAD = auto()
    TLS = auto()
    OVER = auto()
    BROKEN = auto()


_GREETING_BYTES = messages.GREETING.sizeof()
_REPLY_HEAD_BYTES = messages.OPTION_REPLY_HEAD.sizeof()


class OptionExchange(ABC):
    """One conversation. Feed `receive` and send what it returns until `is_over`."""

    def __init__(self, *, tls: bool = False) -> None:
        self.leftover = b""
        """Bytes behind the end of the conversation."""
        # Set once.
        self._want_tls = tls
        # Set by the greeting.
        self._server_flags = HandshakeFlags(0)
        self._no_zeroes = False
        # Changes with each message.
        self._state = _State.GREETING
        self._pending = bytearray()
        self._requests = bytearray()
        self._option = Option.ABORT
        self._replies = 0
        self._head = messages.OptionReplyHead(0, 0, 0)

    @property
    def is_over(self) -> bool:
        """Whether everything has been asked and answered."""
        return self._state is _State.OVER

    @property
    def wants_tls(self) -> bool:
        """Do the TLS handshake, then call `tls_started`."""
        return self._state is _State.TLS

    def tls_started(self) -> bytes:
        """The bytes to send next; they, and all that is received from now on, go by way of TLS."""
        assert self.wants_tls
        self._on_greeting(self._server_flags)
        return self._take_requests()

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take any number of bytes from the server; the bytes to send to it.

        Must not be called while it `wants_tls`, nor any more once it `is_over`, or after an error.

        Raises:
            NotFoundError: the server has no such export.
            ProtocolError: the server refuses what was asked, or breaks the protocol.
        """
        assert self._state not in (_State.OVER, _State.BROKEN, _State.TLS)
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
        if self.is_over:
            self.leftover = bytes(self._pending)
            self._pending.clear()
        return self._take_requests()

    def closed(self) -> NbdBackupError:
        """What it means that the server closed the connection now."""
        return ProtocolError("the server closed the connection during negotiation")

    # For subclasses: what happened.

    @abstractmethod
    def _on_greeting(self, flags: HandshakeFlags) -> None:
        """The server can be asked; without FIXED_NEWSTYLE among `flags` it knows EXPORT_NAME alone."""

    @abstractmethod
    def _on_item(self, reply: int, payload: bytes) -> bool:
        """A reply that is no final one; False if `reply` does not go with the option."""

    @abstractmethod
    def _on_ack(self) -> None:
        """The option was granted."""

    @abstractmethod
    def _on_error(self, reply: int, payload: bytes) -> None:
        """The option was refused."""

    # For subclasses: what to do about it.

    def _send(self, option: Option, payload: bytes = b"") -> None:
        self._option = option
        self._replies = 0
        self._requests += messages.OPTION_HEAD.build(messages.OptionHead(option, len(payload))) + payload
        self._state = _State.OPTION_REPLY_HEAD

    def _take_requests(self) -> bytes:
        requests = bytes(self._requests)
        self._requests.clear()
        return requests

    def _end(self) -> None:
        self._state = _State.OVER

    def _take(self, count: int) -> bytes | None:
        if len(self._pending) < count:
            return None
        taken = bytes(memoryview(self._pending)[:count])
        del self._pending[:count]
        return taken

    # The machine: each step consumes one unit, or returns False for want of bytes.

    def _step(self) -> bool:
        match self._state:
            case _State.GREETING:
                return self._step_greeting()
            case _State.OPTION_REPLY_HEAD:
                return self._step_reply_head()
            case _State.OPTION_REPLY_PAYLOAD:
                return self._step_reply_payload()
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
        self._server_flags = flags
        if not self._want_tls:
            self._on_greeting(flags)
        elif flags & HandshakeFlags.FIXED_NEWSTYLE:
            self._send(Option.STARTTLS)
        else:
            raise ProtocolError("the server is too old for TLS")
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
            if self._option is Option.STARTTLS:
                self._state = _State.TLS
            else:
                self._on_ack()
        elif self._option is Option.STARTTLS and reply & OPTION_REPLY_ERROR:
            raise ProtocolError(
                f"the server does not offer TLS{reason(payload)}; an nbd:// URI would do without it"
            )
        elif reply == OptionReply.ERR_TLS_REQD:
            raise ProtocolError("the server wants TLS: use an nbds:// or nbds+unix:// URI")
        elif reply & OPTION_REPLY_ERROR:
            self._on_error(reply, payload)
        elif not self._on_item(reply, payload):
            raise ProtocolError(f"the server answered {self._option.name} with reply type {reply:d}")
        return True


def reason(payload: bytes) -> str:
    """The server's own words in an error reply, with a colon before them, if it has any that are legal."""
    try:
        text = messages.OPTION_ERROR_TEXT.parse(payload[:STRING_BYTES_MAX]).text
    except ProtocolError:
        return ""
    shown = shown_text(text)
    return f": {shown}" if shown else ""


def error_name(reply: int) -> str:
    """What the protocol calls an error reply."""
    return reply.name if isinstance(reply, OptionReply) else f"error {reply & ~OPTION_REPLY_ERROR}"
