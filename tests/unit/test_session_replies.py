"""A client's requests, from bytes to bytes; a number in a name is that of the conformance list."""

import asyncio
import errno
import os
import random
import struct
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.file import FileDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import DeviceError
from nbdbackup.extents import ContextExtent
from nbdbackup.server.exports import Export, ExportTable
from nbdbackup.server.server import Server
from nbdbackup.server.session import REQUESTS_MAX
from tests.support import nbd_wire as wire
from tests.support.faults import FaultyDevice
from tests.support.gated import GatedDevice
from tests.support.nbd_session import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    EPERM,
    ESHUTDOWN,
    FLUSH,
    FUA,
    LIMIT_S,
    NONE,
    OFFSET_DATA,
    OFFSET_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    STATUS,
    STATUS_EXT,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    connected,
    serving,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
SIMPLE: tuple[int, ...] = ()
STRUCTURED = (wire.STRUCTURED_REPLY,)
EXTENDED = (wire.EXTENDED_HEADERS,)
ALL = [SIMPLE, STRUCTURED, EXTENDED]
CHUNKED = [STRUCTURED, EXTENDED]
names = ["simple", "structured", "extended"]

every_style = pytest.mark.parametrize("style", ALL, ids=names)
chunked_styles = pytest.mark.parametrize("style", CHUNKED, ids=names[1:])


class Bits:
    """A made-up context: the status of a byte is `value` in the second quarter of what is asked for."""

    def __init__(self, value: int = 1, is_wide: bool = False) -> None:
        self.value = value
        self.is_wide = is_wide
        self.gone = False

    async def status(self, offset: int, length: int) -> list[ContextExtent]:
        if self.gone:
            raise DeviceError(errno.EIO, "the bitmap was removed")
        quarter = length // 4
        return [ContextExtent(quarter, 0), ContextExtent(quarter, self.value), ContextExtent(length // 2, 0)]


def table(device: BlockDevice, read_only: bool = False) -> ExportTable:
    exports = ExportTable()
    exports.add(Export("disk", Node("disk", device), read_only=read_only))
    return exports


@pytest.fixture
async def memory() -> MemoryDevice:
    device = MemoryDevice(MIB)
    device.data[:] = random.Random(1).randbytes(MIB)
    return device


@pytest.fixture
async def server(memory: MemoryDevice) -> AsyncIterator[Server]:
    async with serving(table(memory)) as made:
        yield made


# The same in all three styles.


@every_style
async def test_48_reads_and_writes_are_the_same_in_every_style(
    server: Server, memory: MemoryDevice, style: tuple[int, ...]
) -> None:
    async with connected(server, style) as client:
        for offset, length in ((0, 1), (4095, 4098), (1, 200_000), (0, MIB)):
            data = random.Random(offset).randbytes(length)
            answer = await client.call(WRITE, offset, length, data=data)
            assert answer.error == 0
            assert bytes(memory.data[offset : offset + length]) == data
            answer = await client.call(READ, offset, length)
            assert answer.data(offset, length) == data
            assert answer.offsets <= {offset}


@every_style
@pytest.mark.parametrize("command", [FLUSH, TRIM, CACHE, WRITE_ZEROES])
async def test_48_61_success_without_data_is_one_message(
    server: Server, style: tuple[int, ...], command: int
) -> None:
    async with connected(server, style) as client:
        answer = await client.call(command, 0, 0 if command == FLUSH else 4096)
        assert answer.error == 0
        assert answer.kinds == ([NONE] if client.extended else [])


@every_style
async def test_67_payload_of_a_rejected_write_is_consumed(server: Server, style: tuple[int, ...]) -> None:
    async with connected(server, style) as client:
        for length in (1, 4096, 100_000, 5 * MIB):
            answer = await client.call(WRITE, MIB - 1, length + 1, data=bytes(length + 1))
            assert answer.error == ENOSPC
            assert (await client.call(READ, 0, 512)).error == 0


@every_style
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
async def test_66_length_zero_does_not_disconnect(
    server: Server, style: tuple[int, ...], command: int
) -> None:
    async with connected(server, style) as client:
        answer = await client.call(command, 0, 0)
        assert answer.error in (0, EINVAL)
        assert (await client.call(READ, 0, 512)).error == 0


@every_style
async def test_79_read_only_export_takes_no_write(memory: MemoryDevice, style: tuple[int, ...]) -> None:
    async with serving(table(memory, read_only=True)) as server, connected(server, style) as client:
        for command in (WRITE, WRITE_ZEROES, TRIM):
            data = bytes(512) if command == WRITE else b""
            assert (await client.call(command, 0, 512, data=data)).error == EPERM


async def test_85_flush_reaches_the_device_after_the_write_it_was_told_of(memory: MemoryDevice) -> None:
    device = FaultyDevice(memory)
    async with serving(table(device)) as server, connected(server) as client:
        assert (await client.call(WRITE, 0, 512, data=bytes(512))).error == 0
        assert (await client.call(FLUSH)).error == 0
        assert [operation.kind for operation in device.operations] == ["write", "flush"]


@every_style
async def test_86_disconnect_answers_what_is_outstanding(
    memory: MemoryDevice, style: tuple[int, ...]
) -> None:
    gate = GatedDevice(memory, kinds={"read"})
    async with serving(table(gate)) as server, connected(server, style) as client:
        for cookie in range(3):
            await client.request(READ, cookie, cookie * 512, 512)
        await client.request(DISC, 9)
        await gate.wait_pending("read", 1024)
        for cookie in range(3):
            gate.release(await gate.wait_pending("read", cookie * 512))
            assert (await client.reply(cookie, 512)).error == 0
        assert await client.ended() == b""


async def test_57_flush_on_one_connection_covers_writes_of_all(tmp_path: Path) -> None:
    synced: list[bytes] = []

    class Recorded(MemoryDevice):
        async def flush(self) -> None:
            synced.append(bytes(self.data[:512]))

    async with (
        serving(table(Recorded(MIB))) as server,
        connected(server, EXTENDED) as one,
        connected(server) as other,
    ):
        assert one.flags & other.flags & (1 << 8)
        assert (await one.call(WRITE, 0, 512, data=b"w" * 512)).error == 0
        assert (await other.call(FLUSH)).error == 0
    assert synced == [b"w" * 512]


# Extended headers.


async def test_46_extended_headers_go_without_structured_replies(server: Server) -> None:
    async with connected(server, EXTENDED, contexts=[BASE]) as client:
        assert (await client.call(BLOCK_STATUS, 0, MIB)).kinds == [STATUS_EXT]


async def test_48_compact_request_after_extended_headers_disconnects(server: Server) -> None:
    async with connected(server, EXTENDED) as client:
        await client.send(struct.pack(">IHHQQQ", 0x25609513, 0, READ, 1, 0, 512))
        assert await client.ended() == b""


async def test_49_write_goes_with_payload_len_and_without(server: Server, memory: MemoryDevice) -> None:
    async with connected(server, EXTENDED) as client:
        for flags in (0, PAYLOAD_LEN, PAYLOAD_LEN | FUA):
            for length in (3, 300_000):
                data = random.Random(flags + length).randbytes(length)
                assert (await client.call(WRITE, 7, length, flags, data)).error == 0
                assert bytes(memory.data[7 : 7 + length]) == data


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 8, 99])
@pytest.mark.parametrize("length", [1, 5000, 3 * MIB])
async def test_49_payload_of_another_command_is_consumed_and_invalid(
    server: Server, command: int, length: int
) -> None:
    async with connected(server, EXTENDED) as client:
        answer = await client.call(command, 0, length, PAYLOAD_LEN, b"p" * length)
        assert answer.error == EINVAL
        assert (await client.call(READ, 0, 512)).error == 0


async def test_49_without_extended_headers_payload_len_is_an_unknown_flag(server: Server) -> None:
    async with connected(server, STRUCTURED) as client:
        assert (await client.call(READ, 0, 512, PAYLOAD_LEN)).error == EINVAL
        assert (await client.call(READ, 0, 512)).error == 0


@pytest.mark.parametrize(("command", "flags"), [(WRITE, 0), (WRITE, PAYLOAD_LEN), (TRIM, PAYLOAD_LEN)])
@pytest.mark.parametrize("length", [64 * MIB + 1, 1 << 40, (1 << 64) - 1])
async def test_50_payload_over_the_limit_disconnects(
    server: Server, command: int, flags: int, length: int
) -> None:
    async with connected(server, EXTENDED) as client:
        await client.request(command, 1, 0, length, flags)
        assert await client.ended() == b""


async def test_51_73_ranges_of_64_bits_are_done_in_one_request(tmp_path: Path) -> None:
    size = 1 << 45  # more than it has
    device = FileDevice.create(str(tmp_path / "huge.img"), 10 * GIB)
    await device.write(9 * GIB, b"x" * 4096)
    async with serving(table(device)) as server, connected(server, EXTENDED, contexts=[BASE]) as client:
        (extents,) = (await client.call(BLOCK_STATUS, 0, 10 * GIB)).status().values()
        assert extents[0] == (9 * GIB, 3)
        assert sum(length for length, _ in extents) == 10 * GIB
        for command in (WRITE_ZEROES, TRIM, CACHE):
            assert (await client.call(command, 4096, 10 * GIB - 4096)).error == 0
        (extents,) = (await client.call(BLOCK_STATUS, 0, 10 * GIB)).status().values()
        assert extents == [(10 * GIB, 3)]
        for command in (WRITE_ZEROES, TRIM, CACHE, BLOCK_STATUS):
            expected = ENOSPC if command == WRITE_ZEROES else EINVAL
            assert (await client.call(command, 1, size)).error == expected
            assert (await client.call(command, (1 << 64) - 1, (1 << 64) - 1)).error == expected
    await device.close()


@chunked_styles
async def test_69_trim_of_almost_4_gib_is_done(tmp_path: Path, style: tuple[int, ...]) -> None:
    device = FileDevice.create(str(tmp_path / "d.img"), 5 * GIB)
    await device.write(4 * GIB - 8192, b"x" * 8192)
    async with serving(table(device)) as server, connected(server, style) as client:
        assert (await client.call(TRIM, 0, 4 * GIB - 512)).error == 0
        answer = await client.call(READ, 4 * GIB - 8192, 8192)
        assert answer.data(4 * GIB - 8192, 8192) == bytes(8192 - 512) + b"x" * 512
    await device.close()


async def test_48_60_64_extended_errors_have_text_and_the_offset_of_their_request(server: Server) -> None:
    async with connected(server, EXTENDED) as client:
        answer = await client.call(READ, MIB, 512)
        assert (answer.error, answer.offsets, answer.kinds) == (EINVAL, {MIB}, [])
        assert "past the end" in answer.text


# Meta contexts.


@chunked_styles
async def test_74_90_several_contexts_answer_each_in_a_chunk(
    memory: MemoryDevice, style: tuple[int, ...]
) -> None:
    exports = table(memory)
    exports.get("disk").contexts.add("qemu:dirty-bitmap:b", Bits())
    async with serving(exports) as server, connected(server, style, None) as client:
        ids = await client.set_contexts("disk", BASE, DEPTH, "qemu:dirty-bitmap:b")
        await client.go("disk")
        answer = await client.call(BLOCK_STATUS, 0, MIB)
        assert set(answer.kinds) == {STATUS_EXT if client.extended else STATUS}
        assert answer.status() == {
            ids[BASE]: [(MIB, 0)],
            ids[DEPTH]: [(MIB, 1)],
            ids["qemu:dirty-bitmap:b"]: [(MIB // 4, 0), (MIB // 4, 1), (MIB // 2, 0)],
        }


async def test_41_89_wildcards_list_the_contexts_below_them(memory: MemoryDevice) -> None:
    exports = table(memory)
    for name in ("b0", "b1"):
        exports.get("disk").contexts.add(f"qemu:dirty-bitmap:{name}", Bits())
    bitmaps = ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]
    async with serving(exports) as server, connected(server, STRUCTURED, None) as client:
        for query, expected in (
            ([], [BASE, DEPTH, *bitmaps]),
            (["base:"], [BASE]),
            (["qemu:"], [DEPTH, *bitmaps]),
            (["qemu:dirty-bitmap:"], bitmaps),
            (["qemu:dirty-bitmap:b1", "x:", "nonsense"], bitmaps[1:]),
        ):
            answers = await client.option(wire.LIST_META_CONTEXT, wire.meta_payload("disk", query))
            assert [answer.payload[4:].decode() for answer in answers[:-1]] == expected


async def test_53_wide_context_is_for_extended_headers_only(memory: MemoryDevice) -> None:
    exports = table(memory)
    exports.get("disk").contexts.add("x:wide", Bits(value=1 << 40, is_wide=True))
    async with serving(exports) as server:
        async with connected(server, STRUCTURED, None) as client:
            assert await client.set_contexts("disk", "x:wide", BASE) == {BASE: 1}
        async with connected(server, EXTENDED, None) as client:
            ids = await client.set_contexts("disk", "x:wide", BASE)
            await client.go("disk")
            found = (await client.call(BLOCK_STATUS, 0, MIB)).status()
            assert found[ids["x:wide"]][1] == (MIB // 4, 1 << 40)
            assert found[ids[BASE]] == [(MIB, 0)]


@chunked_styles
async def test_74_req_one_gets_exactly_one_extent_not_longer_than_asked(
    memory: MemoryDevice, style: tuple[int, ...]
) -> None:
    exports = table(memory)
    exports.get("disk").contexts.add("x:bits", Bits())
    async with serving(exports) as server, connected(server, style, None) as client:
        ids = await client.set_contexts("disk", "x:bits", BASE)
        await client.go("disk")
        found = (await client.call(BLOCK_STATUS, 512, 4096, REQ_ONE)).status()
        assert found == {ids["x:bits"]: [(1024, 0)], ids[BASE]: [(4096, 0)]}


async def test_75_block_status_without_context_or_past_the_end_is_invalid(server: Server) -> None:
    async with connected(server, STRUCTURED) as client:
        assert (await client.call(BLOCK_STATUS, 0, 512)).error == EINVAL
    async with connected(server, STRUCTURED, contexts=[BASE]) as client:
        assert (await client.call(BLOCK_STATUS, MIB - 1, 2)).error == EINVAL


@pytest.mark.parametrize("how", ["removed from the table", "failing"])
async def test_context_that_vanishes_is_an_error_for_its_clients_and_no_other(
    memory: MemoryDevice, how: str
) -> None:
    exports = table(memory)
    contexts, bits = exports.get("disk").contexts, Bits()
    contexts.add("x:bits", bits)
    async with (
        serving(exports) as server,
        connected(server, EXTENDED, contexts=["x:bits"]) as one,
        connected(server, EXTENDED, contexts=[BASE]) as other,
    ):
        assert (await one.call(BLOCK_STATUS, 0, MIB)).error == 0
        if how == "failing":
            bits.gone = True
        else:
            contexts.remove("x:bits")
        assert (await one.call(BLOCK_STATUS, 0, MIB)).error in (EIO, EINVAL)
        assert (await other.call(BLOCK_STATUS, 0, MIB)).error == 0


def query(length: int, *ids: int) -> bytes:
    return struct.pack(f">Q{len(ids)}I", length, *ids)


async def test_52_block_status_with_payload_answers_for_the_named_contexts_only(server: Server) -> None:
    async with connected(server, EXTENDED, None) as client:
        ids = await client.set_contexts("disk", BASE, DEPTH)
        await client.go("disk")
        assert client.flags & (1 << 12), "BLOCK_STATUS_PAYLOAD is not advertised"
        payload = query(MIB // 2, ids[DEPTH])
        answer = await client.call(BLOCK_STATUS, 512, len(payload), PAYLOAD_LEN, payload)
        assert answer.status() == {ids[DEPTH]: [(MIB // 2, 1)]}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"1234567",
        query(512),
        query(512, 1, 1),
        query(512, 9),
        query(512, 1, 9),
        query(512, 1) + b"\0",
        query(0, 1),
        query(MIB + 1, 1),
        query((1 << 64) - 1, 1),
        query(512, *range(1, 2000)),
        query(512, *range(1, 200_000)),
    ],
    ids=lambda payload: f"{len(payload)} bytes",
)
async def test_52_wrong_block_status_payload_is_consumed_and_invalid(server: Server, payload: bytes) -> None:
    async with connected(server, EXTENDED, contexts=[BASE]) as client:
        answer = await client.call(BLOCK_STATUS, 0, len(payload), PAYLOAD_LEN, payload)
        assert answer.error == EINVAL
        assert (await client.call(BLOCK_STATUS, 0, 512)).error == 0


async def test_52_block_status_payload_is_not_offered_without_extended_headers(server: Server) -> None:
    async with connected(server, STRUCTURED, contexts=[BASE]) as client:
        assert not client.flags & (1 << 12)


# Holes and errors of reads.


@chunked_styles
async def test_62_zeroes_are_sent_as_a_hole(
    server: Server, memory: MemoryDevice, style: tuple[int, ...]
) -> None:
    memory.data[: 256 * KIB] = bytes(256 * KIB)
    async with connected(server, style) as client:
        for offset, length in ((0, 64 * KIB), (1, 100_001), (0, 256 * KIB)):
            answer = await client.call(READ, offset, length)
            assert answer.kinds == [OFFSET_HOLE]
            assert answer.data(offset, length) == bytes(length)
        # One byte in it, wherever, and it is data.
        for position in (0, 1, 70_000, 131_071):
            memory.data[position] = 1
            answer = await client.call(READ, 0, 128 * KIB)
            assert answer.kinds == [OFFSET_DATA]
            assert answer.data(0, 128 * KIB)[position] == 1
            memory.data[position] = 0


@chunked_styles
async def test_62_holes_of_a_sparse_file_are_not_read_but_told(
    tmp_path: Path, style: tuple[int, ...]
) -> None:
    device = FileDevice.create(str(tmp_path / "d.img"), 8 * MIB)
    content = random.Random(3).randbytes(64 * KIB)
    await device.write(3 * MIB, content)
    async with serving(table(device)) as server, connected(server, style) as client:
        answer = await client.call(READ, 512, 6 * MIB)
        assert answer.kinds == [OFFSET_HOLE, OFFSET_DATA, OFFSET_HOLE]
        expected = bytes(3 * MIB - 512) + content + bytes(3 * MIB - 64 * KIB + 512)
        assert answer.data(512, 6 * MIB) == expected
    await device.close()


async def test_62_simple_replies_send_zeroes_as_bytes(tmp_path: Path) -> None:
    device = FileDevice.create(str(tmp_path / "d.img"), 4 * MIB)
    async with serving(table(device)) as server, connected(server) as client:
        assert (await client.call(READ, 0, 2 * MIB)).data(0, 2 * MIB) == bytes(2 * MIB)
    await device.close()


@chunked_styles
async def test_65_df_gets_one_content_chunk(tmp_path: Path, style: tuple[int, ...]) -> None:
    device = FileDevice.create(str(tmp_path / "d.img"), 8 * MIB)
    await device.write(3 * MIB, b"x" * 4096)
    async with serving(table(device)) as server, connected(server, style) as client:
        assert client.flags & (1 << 7), "DF is not advertised"
        for length in (512, 64 * KIB, 6 * MIB):
            answer = await client.call(READ, 0, length, DF)
            assert answer.kinds == [OFFSET_DATA]
            assert len(answer.data(0, length)) == length
    await device.close()


@chunked_styles
async def test_64_error_names_the_byte_where_the_device_failed(
    tmp_path: Path, style: tuple[int, ...]
) -> None:
    device = FileDevice.create(str(tmp_path / "d.img"), 8 * MIB)
    os.truncate(tmp_path / "d.img", 3 * MIB)
    async with serving(table(device)) as server, connected(server, style) as client:
        answer = await client.call(READ, MIB, 4 * MIB)
        assert (answer.error, answer.error_offset) == (EIO, 3 * MIB)
        assert "d.img ends at byte" in answer.text
    await device.close()


@chunked_styles
async def test_64_error_of_unknown_place_has_no_offset(memory: MemoryDevice, style: tuple[int, ...]) -> None:
    device = FaultyDevice(memory)
    device.inject("read", errno.EIO)
    async with serving(table(device)) as server, connected(server, style) as client:
        answer = await client.call(READ, 512, 4096)
        assert (answer.error, answer.error_offset) == (EIO, None)
        assert answer.text


async def test_63_simple_read_that_fails_has_no_success_header(tmp_path: Path) -> None:
    device = FileDevice.create(str(tmp_path / "d.img"), 8 * MIB)
    os.truncate(tmp_path / "d.img", 3 * MIB)
    async with serving(table(device)) as server, connected(server) as client:
        assert (await client.call(READ, MIB, 4 * MIB)).error == EIO
        assert (await client.call(READ, 0, 512)).error == 0
    await device.close()


# The way down.


@every_style
async def test_87_shutdown_answers_what_is_in_flight_and_refuses_what_waits(
    memory: MemoryDevice, style: tuple[int, ...]
) -> None:
    gate = GatedDevice(memory, kinds={"read"})
    async with serving(table(gate)) as server, connected(server, style) as client:
        for cookie in range(REQUESTS_MAX + 40):
            await client.request(READ, cookie, cookie * 512, 512)
        await gate.wait_pending("read", (REQUESTS_MAX - 1) * 512)
        server.stop()
        gate.open_gate()
        errors: Counter[int] = Counter()
        async with asyncio.timeout(LIMIT_S):
            while sum(errors.values()) < REQUESTS_MAX or not client.reader.at_eof():
                try:
                    _, answer = await client.any_reply(512)
                except asyncio.IncompleteReadError:
                    break
                errors[answer.error] += 1
        assert errors[0] == REQUESTS_MAX
        assert errors[ESHUTDOWN] == 40


async def test_12_negotiating_client_hears_of_the_shutdown(server: Server) -> None:
    async with connected(server, export=None) as client:
        server.stop()
        (answer,) = await client.option(wire.LIST)
        assert answer.reply == wire.ERR_SHUTDOWN
        (answer,) = await client.option(wire.ABORT)
        assert answer.reply == wire.ACK
        assert await client.ended() == b""


async def test_12_silent_client_does_not_hold_up_the_shutdown(server: Server) -> None:
    async with connected(server, export=None) as client:
        server.stop()
        async with asyncio.timeout(LIMIT_S):
            assert await client.ended() == b""
