"""The client's handshake: with our server, with old ones, and with one that lies."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdbackup.errors import NbdBackupError, NotFoundError, ProtocolError
from nbdbackup.nbd.agreement import ExportInfo, Negotiated
from nbdbackup.nbd.client import ClientNegotiation, RemoteExport
from nbdbackup.nbd.client_options import REPLIES_PER_OPTION_MAX, REPLY_BYTES_MAX
from nbdbackup.nbd.constants import TransmissionFlags
from nbdbackup.nbd.negotiation import ServerNegotiation
from tests.support import nbd_wire as wire

FLAGS = TransmissionFlags.HAS_FLAGS | TransmissionFlags.SEND_FLUSH | TransmissionFlags.SEND_DF
DISK = ExportInfo("disk@s1", "before the upgrade", 4097, FLAGS, 512, 65536, 1 << 20)
GREETING = b"NBDMAGICIHAVEOPT"
GO_ACK = wire.option_reply(wire.GO, wire.ACK)
EXPORT_ITEM = wire.option_reply(wire.GO, wire.INFO_REPLY, struct.pack(">HQH", 0, 4097, 1))


class OneExport:
    def exports(self) -> Sequence[ExportInfo]:
        return [DISK]

    def find(self, name: str) -> ExportInfo | None:
        return DISK if name in ("", DISK.name) else None


def negotiate(client: ClientNegotiation, piece_bytes: int = 1 << 20) -> Negotiated:
    """Let `client` talk to our server, both fed in pieces, until both have their result."""
    server = ServerNegotiation(OneExport())
    to_client, to_server = server.greeting(), b""
    while to_client or to_server:
        for _ in range(0, len(to_client), piece_bytes):
            to_server += client.receive(to_client[:piece_bytes])
            to_client = to_client[piece_bytes:]
        for _ in range(0, len(to_server), piece_bytes):
            to_client += server.receive(to_server[:piece_bytes])
            to_server = to_server[piece_bytes:]
    assert server.result is not None
    return server.result


def converse(client: ClientNegotiation, *answers: bytes) -> bytes:
    """Feed `answers` one by one; everything that the client sent."""
    return b"".join(client.receive(answer) for answer in answers)


def past_greeting(*, want_structured: bool = True) -> ClientNegotiation:
    client = ClientNegotiation("disk", want_structured=want_structured)
    client.receive(GREETING + b"\0\3")
    return client


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", ["", "disk@s1"])
def test_client_and_server_agree_on_everything(name: str, piece_bytes: int) -> None:
    client = ClientNegotiation(name)
    negotiated = negotiate(client, piece_bytes)
    assert client.result == RemoteExport(
        name="disk@s1",
        description="before the upgrade",
        size=4097,
        flags=FLAGS,
        structured_replies=True,
        contexts=((1, "base:allocation"),),
        block_size_min=512,
        block_size_preferred=65536,
        payload_bytes_max=1 << 20,
    )
    assert negotiated.contexts == client.result.contexts
    assert negotiated.requested_name == name


def test_46_client_that_wants_extended_headers_asks_for_them_first() -> None:
    client = ClientNegotiation("disk@s1", want_extended=True)
    negotiated = negotiate(client)
    assert negotiated.extended_headers
    assert client.result is not None
    assert (client.result.extended_headers, client.result.structured_replies) == (True, True)
    assert client.result.contexts == negotiated.contexts == ((1, "base:allocation"),)


@pytest.mark.parametrize("error", [wire.ERR_UNSUP, wire.ERR_POLICY, wire.ERR_INVALID, 0x80000063])
@pytest.mark.parametrize("structured", [False, True])
def test_46_server_that_refuses_extended_headers_is_used_without_them(error: int, structured: bool) -> None:
    client = ClientNegotiation("disk", want_structured=structured, want_extended=True, contexts=())
    sent = client.receive(GREETING + b"\0\3")
    assert sent == wire.client_flags() + wire.option(wire.EXTENDED_HEADERS)
    sent = client.receive(wire.option_reply(wire.EXTENDED_HEADERS, error, b"no"))
    if structured:
        assert sent == wire.option(wire.STRUCTURED_REPLY)
        client.receive(wire.option_reply(wire.STRUCTURED_REPLY, wire.ACK))
    client.receive(EXPORT_ITEM + GO_ACK)
    assert client.result is not None
    assert (client.result.extended_headers, client.result.structured_replies) == (False, structured)


def test_47_export_name_is_not_asked_for_after_extended_headers() -> None:
    client = ClientNegotiation("disk", want_extended=True, contexts=())
    client.receive(GREETING + b"\0\3" + wire.option_reply(wire.EXTENDED_HEADERS, wire.ACK))
    with pytest.raises(ProtocolError, match="refuses export 'disk' with ERR_UNSUP"):
        client.receive(wire.option_reply(wire.GO, wire.ERR_UNSUP))


def test_client_that_wants_no_structured_replies_gets_none() -> None:
    client = ClientNegotiation("disk@s1", want_structured=False)
    negotiated = negotiate(client)
    assert not negotiated.structured_replies
    assert client.result is not None
    assert (client.result.structured_replies, client.result.contexts) == (False, ())
    assert not client.result.flags & TransmissionFlags.SEND_DF


def test_missing_export_is_not_found_in_the_server_s_words() -> None:
    with pytest.raises(NotFoundError, match=r"no export named 'nope': .*LIST shows"):
        negotiate(ClientNegotiation("nope"))


def test_server_without_structured_replies_is_used_without_them() -> None:
    client = past_greeting()
    refused = wire.option_reply(wire.STRUCTURED_REPLY, wire.ERR_UNSUP, b"no")
    sent = converse(client, refused, EXPORT_ITEM + wire.option_reply(wire.GO, wire.ACK))
    assert sent.startswith(wire.option(wire.GO, wire.info_payload("disk", [1, 2, 3])))
    assert client.result is not None
    assert not client.result.structured_replies


def test_server_that_refuses_meta_contexts_is_used_without_them() -> None:
    client = past_greeting()
    selected = struct.pack(">I", 5) + b"base:allocation"
    converse(
        client,
        wire.option_reply(wire.STRUCTURED_REPLY, wire.ACK),
        wire.option_reply(wire.SET_META_CONTEXT, wire.META_CONTEXT, selected),
        wire.option_reply(wire.SET_META_CONTEXT, wire.ERR_UNSUP),
        EXPORT_ITEM + wire.option_reply(wire.GO, wire.ACK),
    )
    assert client.result is not None
    assert (client.result.structured_replies, client.result.contexts) == (True, ())


@pytest.mark.parametrize("no_zeroes", [True, False])
def test_server_without_go_is_asked_by_export_name(no_zeroes: bool) -> None:
    client = ClientNegotiation("disk", want_structured=False)
    client.receive(GREETING + (b"\0\3" if no_zeroes else b"\0\1"))
    sent = client.receive(wire.option_reply(wire.GO, wire.ERR_UNSUP))
    assert sent == wire.option(wire.EXPORT_NAME, b"disk")
    client.receive(struct.pack(">QH", 512, 1) + (b"" if no_zeroes else bytes(124)) + b"rest")
    assert client.result is not None
    assert (client.result.size, client.leftover) == (512, b"rest")


def test_server_without_fixed_newstyle_is_asked_by_export_name_at_once() -> None:
    client = ClientNegotiation("disk")
    sent = client.receive(GREETING + b"\0\0")
    assert sent == wire.client_flags(0) + wire.option(wire.EXPORT_NAME, b"disk")
    assert isinstance(client.closed(), NotFoundError)
    assert "'disk'" in str(client.closed())


def test_end_of_stream_in_the_middle_says_so() -> None:
    assert "during negotiation" in str(past_greeting().closed())


def test_unknown_info_items_are_ignored() -> None:
    client = past_greeting(want_structured=False)
    unknown = wire.option_reply(wire.GO, wire.INFO_REPLY, b"\0\x99whatever")
    converse(client, unknown + EXPORT_ITEM + wire.option_reply(wire.GO, wire.ACK))
    assert client.result is not None


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", "magic"),
        (b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(11), "magic|oldstyle"),
        (b"NBDMAGIC" + struct.pack(">Q", 0x420281861253) + bytes(10), "oldstyle"),
        (b"NBDMAGICIHAVEOPU\0\3", "magic"),
    ],
)
def test_what_is_no_newstyle_server_is_refused(greeting: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        ClientNegotiation("disk").receive(greeting)


def info(kind: int, payload: bytes) -> bytes:
    return wire.option_reply(wire.GO, wire.INFO_REPLY, struct.pack(">H", kind) + payload)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"\0" * 20, "magic"),
        (wire.option_reply(wire.LIST, wire.ACK), "instead of GO"),
        (wire.option_reply(wire.GO, wire.SERVER, b"\0\0\0\0"), "reply type 2"),
        (wire.option_reply(wire.GO, wire.META_CONTEXT, b"\0\0\0\0x"), "reply type 4"),
        (wire.option_reply(wire.GO, wire.ACK, b"x"), "payload"),
        (GO_ACK, "without telling"),
        (wire.REPLY_MAGIC + struct.pack(">III", wire.GO, 3, REPLY_BYTES_MAX + 1), "claims"),
        (info(0, b"short") + GO_ACK, "NBD_INFO_EXPORT"),
        (info(0, struct.pack(">QH", 1 << 63, 1)) + GO_ACK, "impossible size"),
        (info(1, b"\xff"), "UTF-8"),
        (EXPORT_ITEM + info(3, struct.pack(">III", 0, 4096, 4096)) + GO_ACK, "block sizes"),
        (EXPORT_ITEM + info(3, struct.pack(">III", 3, 4096, 4096)) + GO_ACK, "block sizes"),
        (EXPORT_ITEM + info(3, struct.pack(">III", 1, 4097, 8192)) + GO_ACK, "block sizes"),
        (EXPORT_ITEM + info(3, struct.pack(">III", 512, 4096, 512)) + GO_ACK, "block sizes"),
        (EXPORT_ITEM * (REPLIES_PER_OPTION_MAX + 1), "does not end"),
        (wire.option_reply(wire.GO, wire.ERR_TLS_REQD), "TLS"),
        (wire.option_reply(wire.GO, wire.ERR_POLICY, b"not\nyou"), "ERR_POLICY: not you"),
        (wire.option_reply(wire.GO, wire.ERR_POLICY, b"\x1b[2Jgone\xc2\x9b"), r": \\x1b\[2Jgone\\x9b$"),
        (wire.option_reply(wire.GO, wire.ERR_SHUTDOWN, b"\xff"), "ERR_SHUTDOWN$"),
        (wire.option_reply(wire.GO, 0x80000063), "error 99"),
    ],
)
def test_breach_or_refusal_by_the_server_is_one_clear_error(answer: bytes, reason: str) -> None:
    client = past_greeting(want_structured=False)
    with pytest.raises(ProtocolError, match=reason) as caught:
        client.receive(answer)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "items",
    [
        [(1, b"x:y")],
        [(1, b"base:allocation")] * 2,
        [(1, b"base:allocation"), (2, b"base:allocation")],
        [(1, b"base:allocation"), (1, b"qemu:allocation-depth")],
    ],
)
def test_meta_contexts_not_asked_for_or_told_twice_are_a_breach(items: list[tuple[int, bytes]]) -> None:
    client = ClientNegotiation("disk", contexts=("base:allocation", "qemu:allocation-depth"))
    client.receive(GREETING + b"\0\3")
    client.receive(wire.option_reply(wire.STRUCTURED_REPLY, wire.ACK))
    raw = b"".join(
        wire.option_reply(wire.SET_META_CONTEXT, wire.META_CONTEXT, struct.pack(">I", number) + name)
        for number, name in items
    )
    with pytest.raises(ProtocolError, match="meta context"):
        client.receive(raw)


ANSWERS = st.builds(
    wire.option_reply,
    st.sampled_from(
        [wire.GO, wire.EXTENDED_HEADERS, wire.STRUCTURED_REPLY, wire.SET_META_CONTEXT, wire.EXPORT_NAME]
    ),
    st.sampled_from([1, 2, 3, 4, 0x80000001, 0x80000006, 77]),
    st.one_of(st.just(b""), st.binary(max_size=20), st.just(struct.pack(">HQH", 0, 4097, 1))),
)


@settings(deadline=None)
@given(
    answers=st.lists(st.one_of(ANSWERS, st.binary(max_size=30)), max_size=6),
    split=st.booleans(),
    extended=st.booleans(),
)
def test_garbage_from_the_server_ends_only_in_an_error_of_ours(
    answers: list[bytes], split: bool, extended: bool
) -> None:
    client = ClientNegotiation("disk", want_extended=extended)
    client.receive(GREETING + b"\0\3")
    data = b"".join(answers)
    pieces = [data[position : position + 1] for position in range(len(data))] if split else [data]
    for piece in pieces:
        try:
            client.receive(piece)
        except NbdBackupError:
            return
        if client.result is not None:
            return
        assert len(client._pending) <= max(REPLY_BYTES_MAX, len(data))
