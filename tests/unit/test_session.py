"""A session's requests and replies, over a socket pair: what is asked is done, and answered once."""

import asyncio
import errno
import itertools
from collections.abc import AsyncIterator

import pytest

from nbdbackup.block.device import ReadableBuffer, WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.extents import Allocation, Extent, StatusExtent
from nbdbackup.nbd.client import encode_request
from nbdbackup.nbd.constants import Command, CommandFlags, Errno
from nbdbackup.server.session import BYTES_MAX, REQUESTS_MAX, TURN_BYTES_MAX, TURN_REQUESTS_MAX
from tests.support.faults import FaultyDevice, Operation
from tests.support.fleecing import make_gate, noise, open_all_gates
from tests.support.gated import settle
from tests.support.sessions import CONTEXT_ID, Client, Served, export_of, serving, wait_until

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
STRUCTURED = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])


@pytest.fixture(autouse=True)
async def _gates_are_opened() -> AsyncIterator[None]:
    yield
    await open_all_gates()


class Recorder(FilterDevice):
    """Notes the calls whose flags matter, and forwards them."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(MemoryDevice(size))
        self.calls: list[tuple[object, ...]] = []

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self.calls.append(("write", offset, len(data), fua))
        await super().write(offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        self.calls.append(("write_zeroes", offset, length, may_unmap, fast, fua))
        await super().write_zeroes(offset, length, may_unmap, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        self.calls.append(("trim", offset, length, fua))
        await super().trim(offset, length, fua)

    async def flush(self) -> None:
        self.calls.append(("flush",))
        await super().flush()

    async def cache(self, offset: int, length: int) -> None:
        self.calls.append(("cache", offset, length))
        await super().cache(offset, length)


def full_memory(size: int = SIZE) -> MemoryDevice:
    memory = MemoryDevice(size)
    pattern = noise(4099)
    memory.data[:] = (pattern * (size // len(pattern) + 1))[:size]
    return memory


def compose_everything(client: Client) -> bytes:
    """One request of every kind, refused ones among them, in one string of bytes."""
    compose, flags = client.compose, CommandFlags
    return b"".join(
        [
            compose(Command.READ, 1, 513),
            compose(Command.WRITE, 100, data=b"w" * 1000),
            compose(Command.READ, 0, 4096),
            compose(Command.WRITE, SIZE - 1, data=b"too long"),  # refused, its payload consumed
            compose(Command.READ, SIZE, 1),
            compose(Command.WRITE, 5000, data=b"f" * 700, flags=flags.FUA),
            compose(Command.FLUSH),
            compose(Command.FLUSH, 1, 1),
            compose(Command.WRITE_ZEROES, 8192, 4096, flags=flags.NO_HOLE | flags.FAST_ZERO),
            compose(Command.TRIM, 16384, 4096, flags=flags.FUA),
            compose(Command.CACHE, 0, SIZE),
            compose(Command.READ, 0, 0),
            compose(Command.WRITE, 300 * KIB, data=noise(200 * KIB)),  # longer than is waited for as a whole
            compose(Command.WRITE, SIZE, data=noise(100 * KIB)),  # refused, and longer
            compose(Command.WRITE, 600 * KIB, data=noise(100 * KIB), flags=flags.FUA),
            compose(Command.READ, 299 * KIB, 202 * KIB),
        ]
    )


def expected_errors() -> dict[int, int]:
    refused = {4: Errno.ENOSPC, 5: Errno.EINVAL, 8: Errno.EINVAL, 14: Errno.ENOSPC}
    return {cookie: refused.get(cookie, Errno.OK) for cookie in range(1, 17)}


@STRUCTURED
@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 30])
async def test_requests_mean_the_same_however_they_arrive(structured: bool, piece_bytes: int) -> None:
    memory = full_memory()
    async with serving(export_of(memory), structured=structured) as served:
        stream = compose_everything(served.client)
        if piece_bytes == 1:
            # What follows is only length; byte by byte it would take minutes to no new end.
            head, stream = stream[:8192], stream[8192:]
            for index in range(len(head)):
                await served.client.send(head[index : index + 1])
                await asyncio.sleep(0)
            piece_bytes = 1 << 30
        for start in range(0, len(stream), piece_bytes):
            await served.client.send(stream[start : start + piece_bytes])
        replies = await served.client.replies(16)
    assert {cookie: reply.error for cookie, reply in replies.items()} == expected_errors()
    assert bytes(replies[3].data)[100:1100] == b"w" * 1000
    assert bytes(replies[16].data)[KIB : 201 * KIB] == noise(200 * KIB)
    assert memory.data[600 * KIB : 700 * KIB] == noise(100 * KIB)


async def test_what_came_behind_the_negotiation_is_served_first() -> None:
    export = export_of(full_memory())
    leftover = encode_request(Command.READ, 1, 0, 512)
    async with serving(export, leftover=leftover) as served:
        served.client.compose(Command.READ, 0, 512)
        assert (await served.client.reply(1)).error == 0


@STRUCTURED
async def test_many_requests_of_one_send_are_all_answered(structured: bool) -> None:
    memory = full_memory()
    async with serving(export_of(memory), structured=structured) as served:
        stream = b"".join(served.client.compose(Command.READ, 512 * index, 512) for index in range(2000))
        await served.client.send(stream)
        replies = await served.client.replies(2000)
    assert all(
        reply.data == memory.data[512 * (cookie - 1) : 512 * cookie] for cookie, reply in replies.items()
    )


async def test_fua_and_the_other_flags_reach_the_device() -> None:
    device, flags = Recorder(), CommandFlags
    async with serving(export_of(device)) as served:
        call = served.client.call
        assert not (await call(Command.WRITE, 0, data=b"x" * 512, flags=flags.FUA)).error
        assert not (await call(Command.WRITE, 0, data=b"x" * (300 * KIB), flags=flags.FUA)).error
        assert not (await call(Command.TRIM, 1, 2, flags=flags.FUA)).error
        assert not (await call(Command.WRITE_ZEROES, 3, 4)).error
        assert not (await call(Command.WRITE_ZEROES, 3, 4, flags=flags.NO_HOLE | flags.FUA)).error
        assert not (await call(Command.WRITE_ZEROES, 3, 4, flags=flags.FAST_ZERO)).error
        assert not (await call(Command.FLUSH)).error
        assert not (await call(Command.CACHE, 5, 6)).error
    assert device.calls == [
        ("write", 0, 512, True),
        ("write", 0, 300 * KIB, True),
        ("trim", 1, 2, True),
        ("write_zeroes", 3, 4, True, False, False),
        ("write_zeroes", 3, 4, False, False, True),
        ("write_zeroes", 3, 4, True, True, False),
        ("flush",),
        ("cache", 5, 6),
    ]


async def test_65_a_read_with_df_is_one_chunk() -> None:
    memory = full_memory()
    async with serving(export_of(memory)) as served:
        reply = await served.client.call(Command.READ, 0, 2 * MIB, flags=CommandFlags.DF)
    assert reply.data == memory.data[: 2 * MIB]


class StatusDevice(MemoryDevice):
    """Alternates between data and holes every 512 bytes."""

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        return [
            StatusExtent(512, Allocation.HOLE | Allocation.ZERO if index % 2 else Allocation.DATA)
            for index in range(length // 512)
        ]


@pytest.mark.parametrize("req_one", [False, True])
async def test_74_block_status_says_what_the_device_knows(req_one: bool) -> None:
    flags = CommandFlags.REQ_ONE if req_one else CommandFlags(0)
    async with serving(export_of(StatusDevice(SIZE))) as served:
        reply = await served.client.call(Command.BLOCK_STATUS, 0, 4 * 512, flags=flags)
    found = [(extent.length, extent.flags) for extent in reply.status[CONTEXT_ID]]
    assert found == ([(512, 0)] if req_one else [(512, 0), (512, 3)] * 2)


@STRUCTURED
@pytest.mark.parametrize(
    ("kind", "command", "host_errno", "expected"),
    [
        ("read", Command.READ, errno.EIO, Errno.EIO),
        ("write", Command.WRITE, errno.EDQUOT, Errno.ENOSPC),
        ("write_zeroes", Command.WRITE_ZEROES, errno.EOPNOTSUPP, Errno.EINVAL),
        ("trim", Command.TRIM, errno.EROFS, Errno.EPERM),
        ("flush", Command.FLUSH, errno.ENOSPC, Errno.ENOSPC),
    ],
)
async def test_81_a_devices_failure_is_answered_with_the_protocols_error(
    structured: bool, kind: str, command: Command, host_errno: int, expected: Errno
) -> None:
    device = FaultyDevice(MemoryDevice(SIZE))
    device.inject(kind, host_errno, count=1)
    async with serving(export_of(device), structured=structured) as served:
        length = 0 if command is Command.FLUSH else 512
        data = b"x" * length if command is Command.WRITE else b""
        reply = await served.client.call(command, 0, length, data=data)
        assert reply.error == expected
        assert bool(reply.text) is structured
        # The next one is served as if nothing had been.
        assert (await served.client.call(Command.READ, 0, 512)).error == 0


class RaisingNowait(MemoryDevice):
    """Its twins that never wait fail."""

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        raise OSError(errno.ENOSPC, "no room to read")

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        raise OSError(errno.ENOSPC, "no room to write")


async def test_a_failure_in_place_is_answered_and_its_payload_consumed() -> None:
    async with serving(export_of(RaisingNowait(SIZE))) as served:
        assert (await served.client.call(Command.READ, 0, 512)).text == "no room to read"
        assert (await served.client.call(Command.WRITE, 0, data=b"x" * 512)).text == "no room to write"
        assert (await served.client.call(Command.WRITE, 0, data=b"x" * MIB)).text == "no room to write"
        assert (await served.client.call(Command.FLUSH)).error == 0


# Bounds.


async def test_no_more_than_requests_max_are_in_flight() -> None:
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.add("read")
    async with serving(export_of(gate)) as served:
        count = REQUESTS_MAX + 50
        await served.client.send(b"".join(served.client.compose(Command.READ, 0, 512) for _ in range(count)))
        await wait_until(lambda: len(gate.pending) >= REQUESTS_MAX)
        await settle()
        assert len(gate.pending) == REQUESTS_MAX
        gate.release(gate.pending[0])
        await settle()
        assert len(gate.pending) == REQUESTS_MAX, "one ended, so one more starts"
        gate.open_gate()
        assert all(not reply.error for reply in (await served.client.replies(count)).values())


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
async def test_no_more_than_bytes_max_are_in_flight(command: Command) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.update({"read", "write"})
    count = 2 * BYTES_MAX // MIB
    async with serving(export_of(gate)) as served:
        data = bytes(MIB) if command is Command.WRITE else b""
        requests = [served.client.compose(command, 0, MIB, data=data) for _ in range(count)]
        sending = asyncio.ensure_future(served.client.send(b"".join(requests)))
        await wait_until(lambda: len(gate.pending) >= BYTES_MAX // MIB)
        await settle()
        assert len(gate.pending) == BYTES_MAX // MIB
        gate.open_gate()
        assert len(await served.client.replies(count)) == count
        await sending


async def test_a_client_that_does_not_read_is_not_served_any_further() -> None:
    memory = full_memory()
    device = FaultyDevice(memory)
    count = 64
    async with serving(export_of(device), socket_bytes=64 * KIB) as served:
        stream = b"".join(served.client.compose(Command.READ, 0, 512 * KIB) for _ in range(count))
        await served.client.send(stream)
        await settle()
        await settle()
        served_bytes = sum(operation.area.length for operation in device.operations)
        assert served_bytes <= 4 * MIB, "more than a batch and what the kernel holds"
        replies = await served.client.replies(count)
        assert all(reply.data == memory.data[: 512 * KIB] for reply in replies.values())


async def test_replies_that_finish_while_the_client_does_not_read_arrive_later() -> None:
    gate = make_gate(full_memory())
    gate.kinds.add("read")
    async with serving(export_of(gate), socket_bytes=64 * KIB) as served:
        cookies = [await served.client.ask(Command.READ, 0, MIB) for _ in range(8)]
        await wait_until(lambda: len(gate.pending) == 8)
        gate.release_all()
        await settle()
        late = await served.client.ask(Command.FLUSH)
        await settle()
        assert gate.find("flush") is None
        replies = await served.client.replies(9)
    assert set(replies) == {*cookies, late}
    assert not any(reply.error for reply in replies.values())


async def test_one_turn_of_a_busy_client_is_bounded() -> None:
    small, large = FaultyDevice(MemoryDevice(SIZE)), FaultyDevice(MemoryDevice(SIZE))
    for device, length, count, turn_max in (
        (small, 1, 10_000, TURN_REQUESTS_MAX + 1),
        (large, 256 * KIB, 64, TURN_BYTES_MAX // (256 * KIB) + 1),
    ):
        async with serving(export_of(device)) as served:
            await served.client.send(
                b"".join(served.client.compose(Command.READ, 0, length) for _ in range(count))
            )
            receiving = asyncio.ensure_future(served.client.replies(count))
            before = len(device.operations)
            while not receiving.done():
                await asyncio.sleep(0)
                assert len(device.operations) - before <= turn_max
                before = len(device.operations)
            assert len(receiving.result()) == count


# Several sessions.


async def test_a_hung_device_does_not_hold_up_a_client_of_another_export() -> None:
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.add("read")
    async with serving(export_of(gate, "hung")) as hung, serving(export_of(MemoryDevice(SIZE))) as other:
        waiting = await hung.client.ask(Command.READ, 0, 512)
        await gate.wait_pending("read")
        assert (await other.client.call(Command.READ, 0, 512)).error == 0
        gate.open_gate()
        assert (await hung.client.reply(waiting)).error == 0


async def test_a_slow_request_does_not_hold_up_others_of_the_same_client() -> None:
    gate = make_gate(MemoryDevice(SIZE))
    async with serving(export_of(gate)) as served:
        gate.kinds.add("flush")
        slow = await served.client.ask(Command.FLUSH)
        await gate.wait_pending("flush")
        assert (await served.client.call(Command.READ, 0, 512)).error == 0
        gate.open_gate()
        assert (await served.client.reply(slow)).error == 0


async def test_57_two_clients_of_one_export_see_each_others_writes() -> None:
    device = Recorder()
    export = export_of(device)
    async with serving(export) as first, serving(export) as second:
        assert not (await first.client.call(Command.WRITE, 512, data=b"a" * 512)).error
        assert bytes((await second.client.call(Command.READ, 512, 512)).data) == b"a" * 512
        assert not (await second.client.call(Command.FLUSH)).error
        assert len(export.clients) == 2
    assert device.calls == [("flush",)], "one flush of the one device covers both"
    assert not export.clients


async def test_both_clients_are_served_while_one_never_stops_asking() -> None:
    export = export_of(full_memory())

    async def ask_for_ever(served: Served) -> None:
        while True:
            await served.client.send(
                b"".join(served.client.compose(Command.READ, 0, 64 * KIB) for _ in range(64))
            )
            await served.client.replies(64)

    async with serving(export) as greedy, serving(export) as modest:
        asking = asyncio.ensure_future(ask_for_ever(greedy))
        try:
            for _ in range(20):
                assert (await modest.client.call(Command.READ, 0, 512)).error == 0
        finally:
            asking.cancel()
            await asyncio.wait([asking])


# Large writes.


async def test_a_large_write_is_done_in_pieces_that_end_on_pages_of_the_device() -> None:
    memory = MemoryDevice(SIZE)
    device = FaultyDevice(memory)
    data = noise(MIB + 12345)
    async with serving(export_of(device)) as served:
        assert (await served.client.call(Command.WRITE, 777, data=data)).error == 0
    assert bytes(memory.data[777 : 777 + len(data)]) == data
    pieces = [operation.area for operation in device.operations]
    assert len(pieces) > 1
    assert pieces[0].offset == 777
    assert all(before.end == after.offset for before, after in itertools.pairwise(pieces))
    assert all(piece.end % 4096 == 0 for piece in pieces[:-1])
    assert pieces[-1] == Extent(pieces[-1].offset, 777 + len(data) - pieces[-1].offset)


class TurnsAsync(FilterDevice):
    """Writes in place `nowait_count` times, and from then on not."""

    def __init__(self, nowait_count: int) -> None:
        super().__init__(FaultyDevice(MemoryDevice(SIZE)))
        self.nowait_left = nowait_count
        self.async_writes: list[Operation] = []

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        if not self.nowait_left:
            return False
        self.nowait_left -= 1
        return super().write_nowait(offset, data)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        self.async_writes.append(Operation("write", Extent(offset, len(data))))
        await super().write(offset, data, fua)


@pytest.mark.parametrize("nowait_count", [0, 1, 3])
async def test_a_large_write_that_starts_to_wait_is_finished_by_one_operation(nowait_count: int) -> None:
    device = TurnsAsync(nowait_count)
    data = noise(MIB + 777)
    async with serving(export_of(device)) as served:
        assert (await served.client.call(Command.WRITE, 513, data=data)).error == 0
        back = await served.client.call(Command.READ, 513, len(data))
    assert bytes(back.data) == data
    (rest,) = device.async_writes
    assert rest.area.end == 513 + len(data)
    assert (rest.area.offset == 513) is (nowait_count == 0)


async def test_a_write_that_fails_in_the_middle_is_consumed_and_answered_once() -> None:
    device = FaultyDevice(MemoryDevice(SIZE))
    device.inject("write", errno.ENOSPC, Extent(MIB, 1))
    async with serving(export_of(device)) as served:
        reply = await served.client.call(Command.WRITE, 512 * KIB, data=noise(MIB))
        assert reply.error == Errno.ENOSPC
        assert (await served.client.call(Command.READ, 0, 512)).error == 0


async def test_a_write_that_waits_keeps_its_data_while_others_arrive() -> None:
    memory = MemoryDevice(SIZE)
    gate = make_gate(memory)
    gate.kinds.add("write")
    async with serving(export_of(gate)) as served:
        for index in range(5):
            await served.client.ask(Command.WRITE, 4096 * index, data=bytes([index + 1]) * 4096)
            await gate.wait_pending("write", 4096 * index)
        gate.open_gate()
        assert not any(reply.error for reply in (await served.client.replies(5)).values())
    assert bytes(memory.data[: 5 * 4096]) == b"".join(bytes([index + 1]) * 4096 for index in range(5))
