"""The server's handshake; a number in a name or docstring is that of the conformance list."""

import contextlib
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nbdbackup.errors import ProtocolError, UsageError
from nbdbackup.nbd.agreement import ExportInfo
from nbdbackup.nbd.constants import (
    OPTION_BUFFER_BYTES_MAX,
    OPTION_BYTES_MAX,
    OPTIONS_MAX,
    TransmissionFlags,
)
from nbdbackup.nbd.negotiation import HandshakeError, ServerNegotiation
from tests.support import nbd_wire as wire

FLAGS = TransmissionFlags.SEND_FLUSH | TransmissionFlags.SEND_FUA | TransmissionFlags.SEND_DF
FLAGS_TOLD = 0b1101
"""HAS_FLAGS, SEND_FLUSH and SEND_FUA."""
SEND_DF = 1 << 7

DISK = ExportInfo(
    "disk",
    "the first disk",
    (1 << 40) + 513,
    FLAGS,
    contexts=("base:allocation", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1", "qemu:allocation-depth"),
)
PLAIN = ExportInfo("plänty", "", 4097, TransmissionFlags.READ_ONLY)


class Catalog:
    def __init__(self, exports: Sequence[ExportInfo] = (DISK, PLAIN)) -> None:
        self.offered = list(exports)

    def exports(self) -> Sequence[ExportInfo]:
        return self.offered

    def find(self, name: str) -> ExportInfo | None:
        if not name:
            return self.offered[0] if self.offered else None
        return next((export for export in self.offered if export.name == name), None)


def begin(flags: int = 3, catalog: Catalog | None = None) -> ServerNegotiation:
    server = ServerNegotiation(catalog or Catalog())
    assert server.receive(wire.client_flags(flags)) == b""
    return server


def ask(server: ServerNegotiation, code: int, payload: bytes = b"") -> list[wire.OptionAnswer]:
    """Send one option; its answers, each of which must echo it, the only final one at the end (6)."""
    answers = wire.split_answers(server.receive(wire.option(code, payload)))
    assert {answer.option for answer in answers} == {code}
    final = [answer for answer in answers if answer.reply == wire.ACK or answer.reply >> 31]
    assert final == answers[-1:]
    return answers


def ask_structured(flags: int = 3, catalog: Catalog | None = None) -> ServerNegotiation:
    server = begin(flags, catalog)
    assert wire.kinds(ask(server, wire.STRUCTURED_REPLY)) == [wire.ACK]
    return server


def assert_error(answers: list[wire.OptionAnswer], reply: int) -> str:
    """One error reply with a text for display (11)."""
    assert wire.kinds(answers) == [reply]
    text = answers[0].payload.decode()
    assert text
    assert "\0" not in text
    assert len(answers[0].payload) <= 4096
    return text


def assert_in_step(server: ServerNegotiation) -> None:
    assert wire.kinds(ask(server, wire.LIST)) == [wire.SERVER, wire.SERVER, wire.ACK]


def infos(answers: list[wire.OptionAnswer]) -> dict[int, bytes]:
    assert wire.kinds(answers) == [wire.INFO_REPLY] * (len(answers) - 1) + [wire.ACK]
    assert answers[-1].payload == b""
    return {struct.unpack_from(">H", item.payload)[0]: item.payload[2:] for item in answers[:-1]}


# Greeting and framing.


def test_01_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    assert ServerNegotiation(Catalog()).greeting() == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("flags", [4, 7, 1 << 31, 0xFFFFFFFF])
def test_02_client_flag_that_was_not_offered_disconnects(flags: int) -> None:
    with pytest.raises(HandshakeError, match="not offered"):
        ServerNegotiation(Catalog()).receive(wire.client_flags(flags))


@pytest.mark.parametrize("flags", [0, wire.NO_ZEROES])
def test_03_without_fixed_newstyle_only_export_name_is_valid(flags: int) -> None:
    server = begin(flags)
    server.receive(wire.option(wire.EXPORT_NAME, b"disk"))
    assert server.result is not None
    for code in (wire.ABORT, wire.LIST, wire.GO, 77):
        with pytest.raises(HandshakeError, match="fixed newstyle"):
            begin(flags).receive(wire.option(code))


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_04_and_15_export_name_answers_with_zeroes_unless_they_were_declined(flags: int) -> None:
    server = begin(flags)
    reply = server.receive(wire.option(wire.EXPORT_NAME, b"disk"))
    expected = struct.pack(">QH", DISK.size, FLAGS_TOLD)
    assert reply == expected + (b"" if flags & wire.NO_ZEROES else bytes(124))


def test_06_several_options_in_one_packet_are_answered_in_order() -> None:
    server = begin()
    data = wire.option(wire.LIST) + wire.option(99, b"abc") + wire.option(wire.STRUCTURED_REPLY)
    answers = wire.split_answers(server.receive(data))
    assert [(answer.option, answer.reply) for answer in answers] == [
        (wire.LIST, wire.SERVER),
        (wire.LIST, wire.SERVER),
        (wire.LIST, wire.ACK),
        (99, wire.ERR_UNSUP),
        (wire.STRUCTURED_REPLY, wire.ACK),
    ]


@pytest.mark.parametrize("code", [0, wire.PEEK_EXPORT, 12, 0xFFFFFFFF])
@pytest.mark.parametrize("payload", [b"", b"x", wire.option(wire.ABORT), bytes(300_000)])
def test_07_unknown_option_is_consumed_and_refused_in_step(code: int, payload: bytes) -> None:
    server = begin()
    assert_error(ask(server, code, payload), wire.ERR_UNSUP)
    assert not server.aborted
    assert_in_step(server)


def test_08_wrong_option_magic_disconnects() -> None:
    with pytest.raises(HandshakeError, match="magic"):
        begin().receive(b"IHAVEOPS" + struct.pack(">II", wire.LIST, 0))


@pytest.mark.parametrize("code", [wire.ABORT, wire.LIST, wire.GO, wire.STARTTLS, 99])
def test_09_option_that_claims_too_much_disconnects(code: int) -> None:
    for length in (OPTION_BYTES_MAX + 1, 0xFFFFFFFF):
        with pytest.raises(HandshakeError, match=f"claims {length} bytes"):
            begin().receive(wire.option(code, length=length))


def test_09_too_many_options_disconnect_after_the_last_answer() -> None:
    server = begin()
    data = wire.option(wire.STRUCTURED_REPLY) * (OPTIONS_MAX + 1)
    with pytest.raises(HandshakeError, match="more than") as caught:
        server.receive(data)
    assert len(wire.split_answers(caught.value.reply)) == OPTIONS_MAX


def test_09_replies_to_pipelined_options_are_bounded() -> None:
    exports = [ExportInfo(f"e{number}", "x" * 4000, 1, FLAGS) for number in range(100)]
    with pytest.raises(HandshakeError, match="more replies"):
        begin(catalog=Catalog(exports)).receive(wire.option(wire.LIST) * 1000)


@pytest.mark.parametrize("code", [wire.LIST, wire.ABORT, wire.STARTTLS, wire.GO, 99])
def test_09_large_payload_that_nobody_needs_is_never_kept(code: int) -> None:
    server = begin()
    server.receive(wire.option(code, length=OPTION_BYTES_MAX))
    piece = bytes(1 << 20)
    for _ in range(OPTION_BYTES_MAX // len(piece) - 1):
        assert server.receive(piece) == b""
        assert len(server._pending) == 0
    (answer,) = wire.split_answers(server.receive(piece))
    assert (
        answer.reply
        == {
            wire.LIST: wire.ERR_INVALID,
            wire.ABORT: wire.ACK,
            wire.STARTTLS: wire.ERR_INVALID,
            wire.GO: wire.ERR_TOO_BIG,
            99: wire.ERR_UNSUP,
        }[code]
    )
    if code != wire.ABORT:
        assert_in_step(server)


BAD_STRINGS = [b"\xff", b"caf\xe9", b"disk\0", b"x" * 4097, b"\xed\xa0\x80"]


@pytest.mark.parametrize("name", BAD_STRINGS)
def test_10_bad_export_name_is_invalid_and_keeps_step(name: bytes) -> None:
    server = ask_structured()
    assert_error(ask(server, wire.INFO, wire.info_payload(name)), wire.ERR_INVALID)
    assert_error(ask(server, wire.GO, wire.info_payload(name)), wire.ERR_INVALID)
    assert_error(ask(server, wire.SET_META_CONTEXT, wire.meta_payload(name)), wire.ERR_INVALID)
    assert_error(ask(server, wire.LIST_META_CONTEXT, wire.meta_payload("", [name])), wire.ERR_INVALID)
    assert server.result is None
    assert_in_step(server)


@pytest.mark.parametrize("name", BAD_STRINGS)
def test_10_bad_name_in_export_name_disconnects(name: bytes) -> None:
    with pytest.raises(HandshakeError):
        begin().receive(wire.option(wire.EXPORT_NAME, name))


def test_10_longest_name_is_looked_up_and_the_error_fits_a_string() -> None:
    server = begin()
    assert_error(ask(server, wire.GO, wire.info_payload("é" * 2048)), wire.ERR_UNKNOWN)


def test_12_while_shutting_down_only_abort_is_accepted() -> None:
    server = begin()
    server.shutting_down = True
    for code in (wire.LIST, wire.GO, wire.STRUCTURED_REPLY, wire.STARTTLS, 99):
        assert_error(ask(server, code, b"anything"), wire.ERR_SHUTDOWN)
    assert wire.kinds(ask(server, wire.ABORT)) == [wire.ACK]
    assert server.aborted


def test_12_while_shutting_down_export_name_disconnects() -> None:
    server = begin()
    server.shutting_down = True
    with pytest.raises(HandshakeError, match="shutting down"):
        server.receive(wire.option(wire.EXPORT_NAME, b"disk"))


# EXPORT_NAME, ABORT, LIST, STARTTLS.


def test_15_export_name_of_a_missing_export_disconnects_without_a_byte() -> None:
    with pytest.raises(HandshakeError, match="no export named 'nope'") as caught:
        begin().receive(wire.option(wire.EXPORT_NAME, b"nope"))
    assert caught.value.reply == b""


def test_15_answers_given_before_the_breach_are_still_to_be_sent() -> None:
    with pytest.raises(HandshakeError) as caught:
        begin().receive(wire.option(wire.STRUCTURED_REPLY) + wire.option(wire.EXPORT_NAME, b"nope"))
    assert wire.kinds(wire.split_answers(caught.value.reply)) == [wire.ACK]


@pytest.mark.parametrize("payload", [b"", b"bye", bytes(100_000)])
def test_16_abort_is_acknowledged_whatever_its_data(payload: bytes) -> None:
    server = begin()
    assert wire.kinds(ask(server, wire.ABORT, payload)) == [wire.ACK]
    assert server.aborted
    assert server.result is None


def test_16_options_behind_abort_are_not_answered() -> None:
    server = begin()
    answers = wire.split_answers(server.receive(wire.option(wire.ABORT) + wire.option(wire.LIST)))
    assert wire.kinds(answers) == [wire.ACK]


def test_17_and_19_list_tells_every_export_each_time_it_is_asked() -> None:
    server = begin()
    for _ in range(2):
        answers = ask(server, wire.LIST)
        assert wire.kinds(answers) == [wire.SERVER, wire.SERVER, wire.ACK]
        assert answers[0].payload == wire.string("disk") + b"the first disk"
        assert answers[1].payload == wire.string("plänty")
        assert answers[2].payload == b""


def test_17_list_of_no_exports_is_just_acknowledged() -> None:
    assert wire.kinds(ask(begin(catalog=Catalog([])), wire.LIST)) == [wire.ACK]


def test_18_list_with_data_is_invalid_and_keeps_step() -> None:
    server = begin()
    assert_error(ask(server, wire.LIST, b"junk"), wire.ERR_INVALID)
    assert_in_step(server)


def test_20_starttls_is_refused_by_policy() -> None:
    server = begin()
    assert_error(ask(server, wire.STARTTLS), wire.ERR_POLICY)
    assert_in_step(server)


# INFO and GO.


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0\0\0",
        wire.string("disk"),
        wire.string("disk") + b"\0",
        wire.info_payload("disk") + b"\0",
        struct.pack(">I", 5) + b"disk",
        struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
        wire.string("disk") + struct.pack(">HH", 2, 0),
        wire.string("disk") + struct.pack(">HHH", 1, 0, 1),
    ],
)
@pytest.mark.parametrize("code", [wire.INFO, wire.GO])
def test_28_malformed_info_payload_is_invalid_and_keeps_step(code: int, payload: bytes) -> None:
    server = begin()
    assert_error(ask(server, code, payload), wire.ERR_INVALID)
    assert server.result is None
    assert_in_step(server)


def test_29_go_tells_the_export_then_begins_transmission() -> None:
    server = begin()
    told = infos(ask(server, wire.GO, wire.info_payload("disk")))
    assert told[wire.INFO_EXPORT] == struct.pack(">QH", DISK.size, FLAGS_TOLD)
    assert server.result is not None
    assert server.result.export == replace(DISK, flags=TransmissionFlags(FLAGS_TOLD))
    assert server.leftover == b""


def test_29_bytes_behind_go_belong_to_the_transmission_phase() -> None:
    server = begin()
    server.receive(wire.option(wire.GO, wire.info_payload("disk")) + b"\x25\x60\x95\x13rest")
    assert server.leftover == b"\x25\x60\x95\x13rest"


def test_30_unknown_and_repeated_info_types_are_tolerated() -> None:
    server = begin()
    told = infos(ask(server, wire.INFO, wire.info_payload("disk", [1, 1, 0, 3, 3, 9, 0xFFFF])))
    assert set(told) == {wire.INFO_EXPORT, wire.INFO_NAME, wire.INFO_BLOCK_SIZE}


def test_30_as_many_info_types_as_can_be_asked_for_are_answered() -> None:
    payload = wire.info_payload("disk", range(65535))
    assert len(payload) < OPTION_BUFFER_BYTES_MAX
    assert len(infos(ask(begin(), wire.INFO, payload))) == 4


def test_31_name_and_description_are_told_on_request_only() -> None:
    server = begin()
    assert set(infos(ask(server, wire.INFO, wire.info_payload("disk")))) == {0, 3}
    told = infos(ask(server, wire.INFO, wire.info_payload("", [wire.INFO_NAME, wire.INFO_DESCRIPTION])))
    assert told[wire.INFO_NAME] == b"disk"
    assert told[wire.INFO_DESCRIPTION] == b"the first disk"


def test_32_block_size_is_always_told() -> None:
    odd = replace(DISK, block_size_min=512, block_size_preferred=65536, payload_bytes_max=1 << 20)
    told = infos(ask(begin(catalog=Catalog([odd])), wire.GO, wire.info_payload("disk")))
    assert told[wire.INFO_BLOCK_SIZE] == struct.pack(">III", 512, 65536, 1 << 20)


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 4096, 1 << 25),
        (3, 4096, 1 << 25),
        (1 << 17, 1 << 17, 1 << 25),
        (1, 256, 1 << 25),
        (1, 5000, 1 << 25),
        (4096, 2048, 1 << 25),
        (1, 4096, 2048),
    ],
)
def test_33_block_sizes_that_no_client_may_be_told_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="block size"):
        ExportInfo("disk", "", 1, FLAGS, *sizes)


@pytest.mark.parametrize("text", ["a\0b", "x" * 4097, "\udcff"])
def test_10_names_and_descriptions_that_cannot_be_sent_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="name"):
        ExportInfo(text, "", 1, FLAGS)
    with pytest.raises(UsageError, match="description"):
        ExportInfo("disk", text, 1, FLAGS)


@pytest.mark.parametrize("code", [wire.INFO, wire.GO])
def test_34_missing_export_is_unknown_and_negotiation_goes_on(code: int) -> None:
    server = begin()
    text = assert_error(ask(server, code, wire.info_payload("nope", [0, 1])), wire.ERR_UNKNOWN)
    assert "'nope'" in text
    infos(ask(server, wire.GO, wire.info_payload("disk")))
    assert server.result is not None


def test_36_info_and_then_go_tell_the_same() -> None:
    server = ask_structured()
    payload = wire.info_payload("", [wire.INFO_NAME, wire.INFO_DESCRIPTION, wire.INFO_BLOCK_SIZE])
    told = infos(ask(server, wire.INFO, payload))
    assert server.result is None
    assert infos(ask(server, wire.GO, payload)) == told


def test_37_empty_name_is_the_default_export() -> None:
    server = begin()
    infos(ask(server, wire.GO, wire.info_payload("")))
    assert server.result is not None
    assert (server.result.requested_name, server.result.export.name) == ("", "disk")
    server = begin()
    server.receive(wire.option(wire.EXPORT_NAME))
    assert server.result is not None
    assert server.result.export.name == "disk"


def test_37_without_any_export_there_is_no_default() -> None:
    answers = ask(begin(catalog=Catalog([])), wire.GO, wire.info_payload(""))
    assert "no default export" in assert_error(answers, wire.ERR_UNKNOWN)


# Structured replies and meta contexts.


def test_38_structured_reply_is_acknowledged() -> None:
    server = ask_structured()
    infos(ask(server, wire.GO, wire.info_payload("disk")))
    assert server.result is not None
    assert server.result.structured_replies


def test_38_structured_reply_with_data_is_invalid_and_changes_nothing() -> None:
    server = begin()
    assert_error(ask(server, wire.STRUCTURED_REPLY, b"x"), wire.ERR_INVALID)
    infos(ask(server, wire.GO, wire.info_payload("disk")))
    assert server.result is not None
    assert not server.result.structured_replies


@pytest.mark.parametrize("structured", [False, True])
def test_56_df_is_offered_exactly_with_structured_replies(structured: bool) -> None:
    server = ask_structured() if structured else begin()
    told = infos(ask(server, wire.INFO, wire.info_payload("disk")))
    flags = FLAGS_TOLD | (SEND_DF if structured else 0)
    assert told[wire.INFO_EXPORT] == struct.pack(">QH", DISK.size, flags)
    assert server.receive(wire.option(wire.EXPORT_NAME, b"disk")) == struct.pack(">QH", DISK.size, flags)
    assert server.result is not None
    assert server.result.export.flags == flags


@pytest.mark.parametrize("code", [wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT])
def test_40_meta_context_before_structured_replies_is_invalid(code: int) -> None:
    server = begin()
    answers = ask(server, code, wire.meta_payload("disk", ["base:allocation"]))
    assert "STRUCTURED_REPLY" in assert_error(answers, wire.ERR_INVALID)
    assert_in_step(server)


def contexts(answers: list[wire.OptionAnswer]) -> list[tuple[int, str]]:
    assert wire.kinds(answers) == [wire.META_CONTEXT] * (len(answers) - 1) + [wire.ACK]
    return [(struct.unpack_from(">I", item.payload)[0], item.payload[4:].decode()) for item in answers[:-1]]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], list(DISK.contexts)),
        (["base:"], ["base:allocation"]),
        (["base:allocation"], ["base:allocation"]),
        (["base:allocation", "base:", "base:allocation"], ["base:allocation"]),
        (["qemu:"], list(DISK.contexts[1:])),
        (["qemu:dirty-bitmap:"], list(DISK.contexts[1:3])),
        (["qemu:dirty-bitmap:b1"], ["qemu:dirty-bitmap:b1"]),
        (["base:alloc", "base", "", ":", "x-other:", "x-other:y"], []),
        (["qemu:dirty-bitmap"], []),
    ],
)
def test_41_list_meta_context_answers_queries_with_id_0(queries: list[str], expected: list[str]) -> None:
    answers = ask(ask_structured(), wire.LIST_META_CONTEXT, wire.meta_payload("disk", queries))
    assert contexts(answers) == [(0, name) for name in expected]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], []),
        (["base:allocation"], ["base:allocation"]),
        (["base:allocation"] * 3, ["base:allocation"]),
        (["base:", "qemu:", "x-other:y", ""], []),
        (["qemu:dirty-bitmap:b1", "x:y", "base:allocation"], ["base:allocation", "qemu:dirty-bitmap:b1"]),
    ],
)
def test_42_set_meta_context_selects_each_once_with_its_own_id(
    queries: list[str], expected: list[str]
) -> None:
    server = ask_structured()
    selected = contexts(ask(server, wire.SET_META_CONTEXT, wire.meta_payload("disk", queries)))
    assert [name for _, name in selected] == expected
    assert len({number for number, _ in selected}) == len(selected)
    infos(ask(server, wire.GO, wire.info_payload("disk")))
    assert server.result is not None
    assert server.result.contexts == tuple(selected)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        wire.string("disk"),
        wire.meta_payload("disk") + b"\0",
        wire.string("disk") + struct.pack(">I", 1),
        wire.string("disk") + struct.pack(">I", 0xFFFFFFFF),
        wire.string("disk") + struct.pack(">II", 1, 0xFFFFFFFF) + b"base:",
        struct.pack(">I", 100) + b"disk" + struct.pack(">I", 0),
        wire.meta_payload("disk", ["x" * 4097]),
    ],
)
@pytest.mark.parametrize("code", [wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT])
def test_43_malformed_meta_context_payload_is_invalid(code: int, payload: bytes) -> None:
    server = ask_structured()
    assert_error(ask(server, code, payload), wire.ERR_INVALID)
    assert_in_step(server)


def selected_at_go(server: ServerNegotiation, name: str) -> tuple[tuple[int, str], ...]:
    infos(ask(server, wire.GO, wire.info_payload(name)))
    assert server.result is not None
    return server.result.contexts


SET_BASE = wire.meta_payload("disk", ["base:allocation"])


@pytest.mark.parametrize(
    "payload",
    [
        wire.meta_payload("disk"),
        wire.meta_payload("disk", ["x:y"]),
        wire.meta_payload("nope", ["base:allocation"]),
        b"broken",
        bytes(OPTION_BUFFER_BYTES_MAX + 1),
    ],
)
def test_44_every_set_meta_context_replaces_the_selection_also_a_failed_one(payload: bytes) -> None:
    server = ask_structured()
    assert contexts(ask(server, wire.SET_META_CONTEXT, SET_BASE))
    ask(server, wire.SET_META_CONTEXT, payload)
    assert selected_at_go(server, "disk") == ()


def test_44_go_for_another_export_voids_the_selection() -> None:
    server = ask_structured()
    ask(server, wire.SET_META_CONTEXT, SET_BASE)
    assert selected_at_go(server, "plänty") == ()


def test_44_export_name_for_another_export_voids_the_selection() -> None:
    server = ask_structured()
    ask(server, wire.SET_META_CONTEXT, SET_BASE)
    server.receive(wire.option(wire.EXPORT_NAME, "plänty".encode()))
    assert server.result is not None
    assert server.result.contexts == ()


@pytest.mark.parametrize(("code", "payload"), [(wire.LIST_META_CONTEXT, wire.meta_payload("disk"))])
def test_44_listing_and_asking_for_information_leave_the_selection_alone(code: int, payload: bytes) -> None:
    server = ask_structured()
    ask(server, wire.SET_META_CONTEXT, SET_BASE)
    ask(server, code, payload)
    ask(server, wire.INFO, wire.info_payload("plänty"))
    ask(server, wire.GO, wire.info_payload("nope"))
    assert selected_at_go(server, "disk") == ((1, "base:allocation"),)


def test_44_default_export_by_either_name_is_the_same_export() -> None:
    server = ask_structured()
    ask(server, wire.SET_META_CONTEXT, wire.meta_payload("", ["base:allocation"]))
    assert selected_at_go(server, "disk") == ((1, "base:allocation"),)


def test_44_context_that_vanished_before_go_is_not_selected() -> None:
    catalog = Catalog()
    server = ask_structured(catalog=catalog)
    ask(server, wire.SET_META_CONTEXT, wire.meta_payload("disk", ["qemu:dirty-bitmap:b0"]))
    catalog.offered[0] = replace(DISK, contexts=("base:allocation",))
    assert selected_at_go(server, "disk") == ()


@pytest.mark.parametrize("code", [wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT])
def test_45_meta_context_of_a_missing_export_is_unknown(code: int) -> None:
    server = ask_structured()
    assert_error(ask(server, code, wire.meta_payload("nope", ["base:allocation"])), wire.ERR_UNKNOWN)
    assert_in_step(server)


# However the bytes arrive.

OPTIONS = st.one_of(
    st.sampled_from([wire.LIST, wire.STRUCTURED_REPLY, wire.STARTTLS, 99]).map(wire.option),
    st.builds(wire.option, st.sampled_from([wire.LIST, wire.INFO, wire.GO, 0, 99]), st.binary(max_size=50)),
    st.builds(
        wire.option,
        st.sampled_from([wire.INFO, wire.GO]),
        st.builds(wire.info_payload, st.sampled_from(["", "disk", "nope"]), st.lists(st.integers(0, 5))),
    ),
    st.builds(
        wire.option,
        st.sampled_from([wire.LIST_META_CONTEXT, wire.SET_META_CONTEXT]),
        st.builds(
            wire.meta_payload,
            st.sampled_from(["", "disk", "plänty", "nope"]),
            st.lists(st.sampled_from(["base:", "base:allocation", "qemu:", "x"])),
        ),
    ),
    st.sampled_from([wire.option(wire.ABORT), wire.option(wire.EXPORT_NAME, b"disk"), b"garbage-garbage!"]),
)


def outcome(data: bytes, piece_bytes: int) -> tuple[object, ...]:
    """Everything that a client sees and the session learns from `data`, fed in pieces."""
    server = ServerNegotiation(Catalog())
    sent = server.greeting()
    for position in range(0, len(data), piece_bytes):
        try:
            sent += server.receive(data[position : position + piece_bytes])
        except HandshakeError as error:
            return sent + error.reply, str(error)
        assert len(server._pending) <= OPTION_BUFFER_BYTES_MAX
        if server.aborted:
            return sent, "aborted"
        if server.result is not None:
            leftover = server.leftover + data[position + piece_bytes :]
            return sent, server.result, leftover
    return sent, "unfinished"


@settings(deadline=None)
@given(options=st.lists(OPTIONS, max_size=8), flags=st.integers(0, 3), piece_bytes=st.integers(1, 40))
def test_bytes_in_any_pieces_give_the_same_handshake(
    options: list[bytes], flags: int, piece_bytes: int
) -> None:
    data = wire.client_flags(flags) + b"".join(options) + b"tail"
    whole = outcome(data, len(data))
    assert outcome(data, 1) == whole
    assert outcome(data, piece_bytes) == whole


@settings(deadline=None)
@given(data=st.binary(max_size=300), begun=st.booleans(), code=st.integers(0, 12))
def test_garbage_ends_only_in_a_protocol_error(data: bytes, begun: bool, code: int) -> None:
    server = begin()
    if begun:
        data = wire.option(code, data)
    with contextlib.suppress(ProtocolError):
        server.receive(data)
    assert len(server._pending) <= max(len(data), OPTION_BUFFER_BYTES_MAX)


# Extended headers and block sizes.


def ask_extended(catalog: Catalog | None = None) -> ServerNegotiation:
    server = begin(catalog=catalog)
    assert wire.kinds(ask(server, wire.EXTENDED_HEADERS)) == [wire.ACK]
    return server


def test_46_extended_headers_are_granted_with_and_without_structured_replies() -> None:
    for server in (ask_extended(), ask_structured()):
        assert wire.kinds(ask(server, wire.EXTENDED_HEADERS)) == [wire.ACK]
        told = infos(ask(server, wire.GO, wire.info_payload("disk")))
        flags = struct.unpack(">QH", told[wire.INFO_EXPORT])[1]
        assert flags == FLAGS_TOLD | SEND_DF | 1 << 12
        assert server.result is not None
        assert server.result.extended_headers
        assert server.result.structured_replies


def test_46_extended_headers_with_data_are_invalid_and_keep_step() -> None:
    server = begin()
    assert_error(ask(server, wire.EXTENDED_HEADERS, b"x"), wire.ERR_INVALID)
    assert_in_step(server)
    infos(ask(server, wire.GO, wire.info_payload("disk")))
    assert server.result is not None
    assert not server.result.extended_headers


def test_46_structured_replies_after_extended_headers_are_refused() -> None:
    server = ask_extended()
    assert_error(ask(server, wire.STRUCTURED_REPLY), wire.ERR_EXT_HEADER_REQD)
    assert_in_step(server)


def test_47_export_name_after_extended_headers_disconnects() -> None:
    with pytest.raises(HandshakeError, match="EXPORT_NAME after EXTENDED_HEADERS"):
        ask_extended().receive(wire.option(wire.EXPORT_NAME, b"disk"))


def test_40_extended_headers_are_enough_for_meta_contexts() -> None:
    server = ask_extended()
    assert contexts(ask(server, wire.SET_META_CONTEXT, SET_BASE)) == [(1, "base:allocation")]
    assert selected_at_go(server, "disk") == ((1, "base:allocation"),)


def test_53_wide_contexts_are_hidden_without_extended_headers() -> None:
    wide = replace(DISK, wide_contexts=frozenset({"qemu:dirty-bitmap:b0"}))
    payload = wire.meta_payload("disk", ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"])
    for server, expected in (
        (ask_structured(catalog=Catalog([wide])), 1),
        (ask_extended(Catalog([wide])), 2),
    ):
        assert len(contexts(ask(server, wire.SET_META_CONTEXT, payload))) == expected
        names = [name for _, name in contexts(ask(server, wire.LIST_META_CONTEXT, wire.meta_payload("disk")))]
        assert ("qemu:dirty-bitmap:b0" in names) == (expected == 2)


@pytest.mark.parametrize("code", [wire.INFO, wire.GO])
def test_35_large_minimum_is_insisted_on_only_to_clients_that_did_not_ask(code: int) -> None:
    coarse = replace(DISK, block_size_min=4096)
    server = begin(catalog=Catalog([coarse]))
    answers = ask(server, code, wire.info_payload("disk", [wire.INFO_NAME]))
    assert wire.kinds(answers) == [wire.INFO_REPLY, wire.ERR_BLOCK_SIZE_REQD]
    assert answers[0].payload == struct.pack(">HIII", 3, 4096, 4096, 32 << 20)
    assert b"4096" in answers[1].payload
    assert server.result is None
    infos(ask(server, code, wire.info_payload("disk", [wire.INFO_BLOCK_SIZE])))
    assert (server.result is not None) == (code == wire.GO)


def test_35_a_sector_is_not_insisted_on() -> None:
    server = begin(catalog=Catalog([replace(DISK, block_size_min=512)]))
    infos(ask(server, wire.GO, wire.info_payload("disk")))
    assert server.result is not None
