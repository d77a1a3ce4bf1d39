"""Asking a server what it has, without choosing an export.

    greeting --> LIST --> EXTENDED_HEADERS --> STRUCTURED_REPLY --> LIST_META_CONTEXT of each export --> ABORT
                 (if wanted)                   (if that was refused) (if either was granted)

Extended headers come first because a server does not show others the contexts that need them.

Each question may be refused without harm but LIST, which is refused with its reason: what the
server does not tell is not there.
"""

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import messages
from nbdbackup.nbd.client_options import OptionExchange, error_name, reason
from nbdbackup.nbd.constants import HandshakeFlags, Option, OptionReply

CONTEXTS_MAX = 4096
"""Of all exports together."""


class ClientInquiry(OptionExchange):
    """Asks about `export_names`, or about every export that the server lists.

    When it `is_over`: `descriptions` has each export's name and description in the server's order,
    and `contexts` the names of the meta contexts of each. The server gets its ABORT and need not answer.
    """

    def __init__(self, export_names: tuple[str, ...] | None = None, *, tls: bool = False) -> None:
        super().__init__(tls=tls)
        self.descriptions: dict[str, str] = dict.fromkeys(export_names or (), "")
        self.contexts: dict[str, list[str]] = {}
        self._want_list = export_names is None
        self._to_ask: list[str] = []
        self._asked = ""
        self._contexts_count = 0

    def _on_greeting(self, flags: HandshakeFlags) -> None:
        if not flags & HandshakeFlags.FIXED_NEWSTYLE:
            raise ProtocolError("the server is too old to be asked what it has")
        self._send(Option.LIST if self._want_list else Option.EXTENDED_HEADERS)

    def _on_item(self, reply: int, payload: bytes) -> bool:
        if reply == OptionReply.SERVER and self._option is Option.LIST:
            entry = messages.SERVER_ENTRY.parse(payload)
            self.descriptions[entry.name] = entry.description
        elif reply == OptionReply.META_CONTEXT and self._option is Option.LIST_META_CONTEXT:
            self._contexts_count += 1
            if self._contexts_count > CONTEXTS_MAX:
                raise ProtocolError(f"the server has more than {CONTEXTS_MAX} meta contexts")
            self.contexts[self._asked].append(messages.META_CONTEXT.parse(payload).name)
        else:
            return False
        return True

    def _on_ack(self) -> None:
        if self._option is Option.LIST:
            self._send(Option.EXTENDED_HEADERS)
        else:
            if self._option in (Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY):
                self._to_ask = list(reversed(self.descriptions))
            self._ask_next()

    def _on_error(self, reply: int, payload: bytes) -> None:
        if self._option is Option.LIST:
            raise ProtocolError(f"the server does not list its exports: {error_name(reply)}{reason(payload)}")
        if self._option is Option.EXTENDED_HEADERS:
            self._send(Option.STRUCTURED_REPLY)
        else:
            self._ask_next()

    def _ask_next(self) -> None:
        if not self._to_ask:
            self._send(Option.ABORT)
            self._end()
            return
        self._asked = self._to_ask.pop()
        self.contexts[self._asked] = []
        request = messages.MetaContextRequest(self._asked, ())
        self._send(Option.LIST_META_CONTEXT, messages.META_CONTEXT_REQUEST.build(request))
