"""What a server is asked without choosing an export, and what it may answer."""

import struct

import pytest

from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import client_inquiry
from nbdbackup.nbd.client_inquiry import ClientInquiry
from tests.support import nbd_wire as wire

GREETING = b"NBDMAGIC" + wire.OPTION_MAGIC + struct.pack(">H", wire.FIXED_NEWSTYLE | wire.NO_ZEROES)


def reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    return wire.REPLY_MAGIC + struct.pack(">III", option, kind, len(payload)) + payload


def entry(name: bytes, description: bytes = b"") -> bytes:
    return reply(wire.LIST, wire.SERVER, struct.pack(">I", len(name)) + name + description)


def context(name: bytes) -> bytes:
    return reply(wire.LIST_META_CONTEXT, wire.META_CONTEXT, struct.pack(">I", 0) + name)


ANSWERS = [
    GREETING,
    entry(b"a", b"first") + entry(b"b") + reply(wire.LIST, wire.ACK),
    reply(wire.EXTENDED_HEADERS, wire.ERR_UNSUP),
    reply(wire.STRUCTURED_REPLY, wire.ACK),
    context(b"base:allocation") + context(b"x:y") + reply(wire.LIST_META_CONTEXT, wire.ACK),
    reply(wire.LIST_META_CONTEXT, wire.ERR_UNKNOWN),
]


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
def test_every_export_and_its_contexts_are_asked_for(piece_bytes: int) -> None:
    inquiry = ClientInquiry()
    sent = b""
    for answer in ANSWERS:
        assert not inquiry.is_over
        for start in range(0, len(answer), piece_bytes):
            sent += inquiry.receive(answer[start : start + piece_bytes])
    assert inquiry.is_over
    assert inquiry.descriptions == {"a": "first", "b": ""}
    assert inquiry.contexts == {"a": ["base:allocation", "x:y"], "b": []}

    def option(number: int, payload: bytes = b"") -> bytes:
        return wire.OPTION_MAGIC + struct.pack(">II", number, len(payload)) + payload

    def query(name: bytes) -> bytes:
        return option(wire.LIST_META_CONTEXT, struct.pack(">I", len(name)) + name + struct.pack(">I", 0))

    assert sent == (
        wire.client_flags()
        + option(wire.LIST)
        + option(wire.EXTENDED_HEADERS)
        + option(wire.STRUCTURED_REPLY)
        + query(b"a")
        + query(b"b")
        + option(wire.ABORT)
    )


def test_a_named_export_is_asked_about_without_a_list() -> None:
    inquiry = ClientInquiry(("disk",))
    inquiry.receive(GREETING + reply(wire.EXTENDED_HEADERS, wire.ACK))
    inquiry.receive(context(b"base:allocation") + reply(wire.LIST_META_CONTEXT, wire.ACK))
    assert inquiry.is_over
    assert inquiry.contexts == {"disk": ["base:allocation"]}


def test_server_without_structured_replies_has_no_contexts() -> None:
    inquiry = ClientInquiry()
    inquiry.receive(GREETING + entry(b"a") + reply(wire.LIST, wire.ACK))
    inquiry.receive(reply(wire.EXTENDED_HEADERS, wire.ERR_UNSUP))
    inquiry.receive(reply(wire.STRUCTURED_REPLY, wire.ERR_UNSUP))
    assert inquiry.is_over
    assert (inquiry.descriptions, inquiry.contexts) == ({"a": ""}, {})


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (reply(wire.LIST, wire.ERR_POLICY, b"not for you"), "does not list its exports: ERR_POLICY: not for"),
        (reply(wire.LIST, wire.ERR_TLS_REQD), "wants TLS"),
        (reply(wire.LIST, wire.META_CONTEXT, bytes(5)), "reply type 4"),
        (reply(wire.GO, wire.ACK), "answered option 7"),
        (reply(wire.LIST, wire.SERVER, b"\0\0\0\x09short"), "LIST entry"),
        (entry(b"x") * 1025, "does not end"),
        (entry(b"x" * 4097), "LIST entry"),
    ],
)
def test_refusals_and_breaches_are_protocol_errors(answer: bytes, complaint: str) -> None:
    inquiry = ClientInquiry()
    with pytest.raises(ProtocolError, match=complaint):
        inquiry.receive(GREETING + answer)


def test_old_server_cannot_be_asked() -> None:
    with pytest.raises(ProtocolError, match="too old"):
        ClientInquiry().receive(GREETING[:-2] + bytes(2))


def test_contexts_of_all_exports_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_inquiry, "CONTEXTS_MAX", 3)
    inquiry = ClientInquiry(("a", "b"))
    inquiry.receive(GREETING + reply(wire.EXTENDED_HEADERS, wire.ACK))
    inquiry.receive(context(b"x:1") + context(b"x:2") + reply(wire.LIST_META_CONTEXT, wire.ACK))
    with pytest.raises(ProtocolError, match="more than 3 meta contexts"):
        inquiry.receive(context(b"x:1") + context(b"x:2"))
