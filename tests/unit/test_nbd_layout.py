"""The derived struct layouts read and write exactly what the construct definitions do."""

from typing import Any

import construct
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdbackup.nbd import layout, messages
from nbdbackup.nbd.constants import Command, CommandFlags, TransmissionFlags

PAIRS = [
    (layout.REQUEST, messages.REQUEST, 28),
    (layout.EXTENDED_REQUEST, messages.EXTENDED_REQUEST, 32),
    (layout.SIMPLE_REPLY, messages.SIMPLE_REPLY, 16),
    (layout.STRUCTURED_REPLY, messages.STRUCTURED_REPLY, 20),
    (layout.EXTENDED_REPLY, messages.EXTENDED_REPLY, 32),
    (layout.OFFSET_DATA_HEAD, messages.OFFSET_DATA_HEAD, 8),
    (layout.OFFSET_HOLE, messages.OFFSET_HOLE, 12),
    (layout.BLOCK_STATUS_HEAD, messages.BLOCK_STATUS_HEAD, 4),
    (layout.BLOCK_STATUS_EXTENT, messages.BLOCK_STATUS_EXTENT, 8),
]


@pytest.mark.parametrize(("fast", "message", "size"), PAIRS, ids=lambda value: getattr(value, "title", ""))
def test_layout_has_the_size_that_the_protocol_says(fast: Any, message: Any, size: int) -> None:
    assert fast.size == message.sizeof() == size


@pytest.mark.parametrize(("fast", "message", "size"), PAIRS, ids=lambda value: getattr(value, "title", ""))
@given(data=st.data())
def test_layout_and_construct_agree_on_every_value(fast: Any, message: Any, size: int, data: Any) -> None:
    names = message.record.__struct_fields__
    raw = data.draw(st.binary(min_size=size, max_size=size))
    values = fast.unpack(raw)
    magics = len(values) - len(names)
    assert magics in (0, 1)
    record = message.record(*values[magics:])
    built = message.build(record)
    magic = fast.unpack(built)[:magics]
    assert fast.pack(*magic, *values[magics:]) == built
    parsed = message.parse(built)
    assert tuple(int(getattr(parsed, name)) for name in names) == values[magics:]


def test_parsed_codes_compare_equal_to_their_enumeration() -> None:
    raw = layout.REQUEST.pack(0x25609513, 1, 6, 7, 8, 9)
    request = messages.REQUEST.parse(raw)
    assert request.command is Command.WRITE_ZEROES
    assert request.flags is CommandFlags.FUA


def test_unknown_code_parses_to_its_number() -> None:
    request = messages.REQUEST.parse(layout.REQUEST.pack(0x25609513, 0x8000, 999, 7, 8, 9))
    assert request.command == 999
    assert int(request.flags) == 0x8000


def test_padding_and_fixed_bytes_have_a_layout() -> None:
    derived = layout.derive(messages.EXPORT_NAME_REPLY_PADDED.definition)
    built = messages.EXPORT_NAME_REPLY_PADDED.build(messages.ExportNameReply(5, TransmissionFlags(3)))
    assert derived.size == len(built) == 134
    assert derived.unpack(built) == (5, 3)
    assert layout.derive(construct.Struct("tag" / construct.Bytes(3))).unpack(b"abc") == (b"abc",)


def test_definition_without_a_fixed_layout_is_refused() -> None:
    with pytest.raises(TypeError, match="no fixed layout"):
        layout.derive(messages.ERROR_CHUNK.definition)


def test_definition_that_mixes_byte_orders_is_refused() -> None:
    with pytest.raises(TypeError, match="byte orders"):
        layout.derive(construct.Struct("a" / construct.Int16ub, "b" / construct.Int16ul))
