"""STARTTLS in both roles' handshakes; a number in a name is that of the conformance list."""

from collections.abc import Sequence

import pytest

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.client import ClientNegotiation
from nbdbackup.nbd.constants import TransmissionFlags
from nbdbackup.nbd.negotiation import ExportInfo, HandshakeError, ServerNegotiation, TlsMode
from tests.support import nbd_wire as wire

FLAGS = TransmissionFlags.HAS_FLAGS | TransmissionFlags.SEND_FLUSH
OPEN = ExportInfo("open", "", 4096, FLAGS)
SECRET = ExportInfo("secret", "", 8192, FLAGS, tls_only=True)
GREETING = b"NBDMAGICIHAVEOPT"


class Catalog:
    def exports(self) -> Sequence[ExportInfo]:
        return [OPEN, SECRET]

    def find(self, name: str) -> ExportInfo | None:
        return {"": OPEN, "open": OPEN, "secret": SECRET}.get(name)


def begin(mode: TlsMode) -> ServerNegotiation:
    server = ServerNegotiation(Catalog(), mode)
    assert server.receive(wire.client_flags()) == b""
    return server


def ask(server: ServerNegotiation, code: int, payload: bytes = b"") -> list[int]:
    answers = wire.split_answers(server.receive(wire.option(code, payload)))
    assert {answer.option for answer in answers} == {code}
    return wire.kinds(answers)


def start_tls(server: ServerNegotiation) -> None:
    assert ask(server, wire.STARTTLS) == [wire.ACK]
    assert server.wants_tls
    server.tls_started()
    assert not server.wants_tls


PAYLOADS = {
    wire.LIST: b"",
    wire.INFO: wire.info_payload("open"),
    wire.GO: wire.info_payload("open"),
    wire.STRUCTURED_REPLY: b"",
    wire.LIST_META_CONTEXT: wire.meta_payload("open"),
    wire.SET_META_CONTEXT: wire.meta_payload("open"),
    wire.EXTENDED_HEADERS: b"",
    wire.PEEK_EXPORT: b"junk",
    99: b"what is that",
}


def test_20_server_without_tls_refuses_starttls_by_policy_and_never_asks_for_tls() -> None:
    server = begin(TlsMode.OFF)
    assert ask(server, wire.STARTTLS) == [wire.ERR_POLICY]
    for code, payload in PAYLOADS.items():
        if code != wire.GO:
            assert wire.ERR_TLS_REQD not in ask(server, code, payload)


@pytest.mark.parametrize("code", PAYLOADS)
def test_21_server_that_requires_tls_answers_nothing_else_before_it(code: int) -> None:
    server = begin(TlsMode.REQUIRE)
    assert ask(server, code, PAYLOADS[code]) == [wire.ERR_TLS_REQD]
    assert ask(server, code, b"x" * 4096) == [wire.ERR_TLS_REQD]
    start_tls(server)
    assert wire.ERR_TLS_REQD not in ask(server, code, PAYLOADS[code])


def test_21_server_that_requires_tls_disconnects_export_name_and_lets_abort_go() -> None:
    with pytest.raises(HandshakeError, match="STARTTLS"):
        begin(TlsMode.REQUIRE).receive(wire.option(wire.EXPORT_NAME, b"open"))
    server = begin(TlsMode.REQUIRE)
    assert ask(server, wire.ABORT) == [wire.ACK]
    assert server.aborted


def test_21_client_that_gave_up_on_fixed_newstyle_cannot_get_round_tls() -> None:
    server = ServerNegotiation(Catalog(), TlsMode.REQUIRE)
    with pytest.raises(HandshakeError, match="STARTTLS"):
        server.receive(wire.client_flags(0) + wire.option(wire.EXPORT_NAME, b"open"))


@pytest.mark.parametrize(
    ("code", "payload"),
    [
        (wire.INFO, wire.info_payload("secret")),
        (wire.GO, wire.info_payload("secret")),
        (wire.LIST_META_CONTEXT, wire.meta_payload("secret")),
        (wire.SET_META_CONTEXT, wire.meta_payload("secret")),
    ],
)
def test_22_export_for_tls_alone_tells_others_nothing_but_that(code: int, payload: bytes) -> None:
    server = begin(TlsMode.ON)
    assert ask(server, wire.STRUCTURED_REPLY) == [wire.ACK]
    assert ask(server, code, payload) == [wire.ERR_TLS_REQD]
    start_tls(server)
    assert ask(server, wire.STRUCTURED_REPLY) == [wire.ACK]
    assert ask(server, code, payload)[-1] == wire.ACK


def test_22_export_for_tls_alone_is_hidden_in_the_clear_and_export_name_of_it_disconnects() -> None:
    server = begin(TlsMode.ON)
    assert ask(server, wire.LIST) == [wire.SERVER, wire.ACK]
    start_tls(server)
    assert ask(server, wire.LIST) == [wire.SERVER, wire.SERVER, wire.ACK]
    with pytest.raises(HandshakeError, match="TLS"):
        begin(TlsMode.ON).receive(wire.option(wire.EXPORT_NAME, b"secret"))


def test_22_other_exports_go_without_tls_where_it_is_only_offered() -> None:
    server = begin(TlsMode.ON)
    assert ask(server, wire.GO, wire.info_payload("open"))[-1] == wire.ACK
    assert server.result is not None


@pytest.mark.parametrize("mode", [TlsMode.ON, TlsMode.REQUIRE])
def test_24_second_starttls_is_invalid(mode: TlsMode) -> None:
    server = begin(mode)
    start_tls(server)
    assert ask(server, wire.STARTTLS) == [wire.ERR_INVALID]
    assert not server.wants_tls
    assert ask(server, wire.LIST)[-1] == wire.ACK


@pytest.mark.parametrize("mode", list(TlsMode))
def test_24_starttls_with_data_is_invalid_and_keeps_step(mode: TlsMode) -> None:
    server = begin(mode)
    assert ask(server, wire.STARTTLS, b"data") == [wire.ERR_INVALID]
    assert not server.wants_tls
    assert ask(server, wire.ABORT) == [wire.ACK]


def test_25_starttls_forgets_structured_replies_and_meta_contexts() -> None:
    server = begin(TlsMode.ON)
    assert ask(server, wire.STRUCTURED_REPLY) == [wire.ACK]
    query = wire.meta_payload("open", ["base:allocation"])
    assert ask(server, wire.SET_META_CONTEXT, query) == [wire.META_CONTEXT, wire.ACK]
    start_tls(server)
    assert ask(server, wire.SET_META_CONTEXT, query) == [wire.ERR_INVALID]
    assert ask(server, wire.GO, wire.info_payload("open"))[-1] == wire.ACK
    assert server.result is not None
    assert not server.result.structured_replies
    assert server.result.contexts == ()


@pytest.mark.parametrize("early", [b"\x16", wire.option(wire.GO, wire.info_payload("open"))])
def test_27_bytes_in_the_clear_behind_starttls_disconnect_without_an_answer(early: bytes) -> None:
    server = begin(TlsMode.REQUIRE)
    with pytest.raises(HandshakeError, match="in the clear") as caught:
        server.receive(wire.option(wire.STARTTLS) + early)
    assert caught.value.reply == b""


# The client.


def converse(client: ClientNegotiation, server: ServerNegotiation) -> None:
    """Let both talk until neither has anything to say, TLS included."""
    to_server = client.receive(server.greeting())
    while to_server:
        to_client = server.receive(to_server)
        to_server = client.receive(to_client) if to_client else b""
        if server.wants_tls:
            assert client.wants_tls
            assert to_server == b""
            server.tls_started()
            to_server = client.tls_started()


@pytest.mark.parametrize("mode", [TlsMode.ON, TlsMode.REQUIRE])
@pytest.mark.parametrize("structured", [True, False])
def test_client_starts_tls_before_it_says_what_it_wants(mode: TlsMode, structured: bool) -> None:
    client = ClientNegotiation("secret", want_structured=structured, tls=True)
    server = ServerNegotiation(Catalog(), mode)
    assert client.receive(server.greeting()) == wire.client_flags() + wire.option(wire.STARTTLS)
    client = ClientNegotiation("secret", want_structured=structured, tls=True)
    converse(client, ServerNegotiation(Catalog(), mode))
    assert client.result is not None
    assert client.result.size == 8192
    assert client.result.structured_replies == structured


def test_client_gives_up_where_tls_is_not_offered_and_never_goes_on_in_the_clear() -> None:
    client = ClientNegotiation("open", tls=True)
    with pytest.raises(ProtocolError, match=r"does not offer TLS.*nbd://"):
        converse(client, ServerNegotiation(Catalog(), TlsMode.OFF))


@pytest.mark.parametrize("flags", [b"\0\0", b"\0\2"])
def test_client_gives_up_on_servers_too_old_for_tls(flags: bytes) -> None:
    with pytest.raises(ProtocolError, match="too old for TLS"):
        ClientNegotiation("open", tls=True).receive(GREETING + flags)


def test_27_client_refuses_bytes_in_the_clear_behind_the_ack() -> None:
    client = ClientNegotiation("open", tls=True)
    client.receive(GREETING + b"\0\3")
    injected = wire.option_reply(wire.STRUCTURED_REPLY, wire.ACK)
    with pytest.raises(ProtocolError, match="in the clear"):
        client.receive(wire.option_reply(wire.STARTTLS, wire.ACK) + injected)


def test_client_refuses_an_answer_to_starttls_that_is_none() -> None:
    for answer in (
        wire.option_reply(wire.STARTTLS, wire.ACK, b"data"),
        wire.option_reply(wire.GO, wire.ACK),
        wire.option_reply(wire.STARTTLS, wire.INFO_REPLY, b"\0\0"),
    ):
        client = ClientNegotiation("open", tls=True)
        client.receive(GREETING + b"\0\3")
        with pytest.raises(ProtocolError):
            client.receive(answer)
        assert not client.wants_tls
