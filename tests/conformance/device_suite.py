"""What every device promises (`block/device.py`), as tests to inherit.

    class TestMyDevice(DeviceSuite):
        @pytest.fixture
        async def make_device(self, tmp_path):
            async with AsyncExitStack() as stack:
                async def make(size, content):
                    device = ...                      # `size` bytes; `content` maps offsets to bytes,
                    stack.push_async_callback(device.close)     # all the rest is zero
                    return device
                yield make

A read-only device (a snapshot view) inherits `ReadSuite`. `sizes` and `sparse_size` are
what the device is made in; a device that cannot be so odd, or so large, overrides them.
"""

import asyncio
import errno
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from typing import ClassVar

import pytest

from nbdbackup.block.device import BlockDevice
from nbdbackup.extents import Allocation, Extent, StatusExtent

MakeDevice = Callable[[int, Mapping[int, bytes]], Awaitable[BlockDevice]]

LIMIT_S = 60.0
MIB = 1 << 20
FLAGS = list(itertools.product((True, False), repeat=3))
AREAS = [Extent(0, 65536), Extent(65536, 131072), Extent(1, 1), Extent(511, 4098), Extent(100_000, 300_000)]


async def read(device: BlockDevice, offset: int, length: int) -> bytes:
    """The device's bytes, by the async way."""
    buffer = bytearray(b"\xee" * length)
    async with asyncio.timeout(LIMIT_S):
        await device.read(offset, buffer)
    return bytes(buffer)


async def status_of(device: BlockDevice, area: Extent) -> list[tuple[Extent, Allocation]]:
    """`block_status` asked until it has answered for all of `area`; each answer is checked."""
    found: list[tuple[Extent, Allocation]] = []
    position = area.offset
    async with asyncio.timeout(LIMIT_S):
        while position < area.end:
            answer: list[StatusExtent] = await device.block_status(position, area.end - position)
            assert answer
            assert all(extent.length > 0 for extent in answer)
            assert all(one.flags != other.flags for one, other in itertools.pairwise(answer))
            for extent in answer:
                found.append((Extent(position, extent.length), extent.flags))
                position += extent.length
            assert position <= area.end
    return found


def probe_extents(size: int) -> Iterator[Extent]:
    """Ranges that lie oddly in a device of `size` bytes: the tail, single bytes, unaligned ones."""
    for offset in {0, 1, 510, 4095, size // 2, size - 1}:
        for length in {1, 2, 511, 4096, 65537, size}:
            if 0 <= offset <= size - length:
                yield Extent(offset, length)
    yield Extent(0, 0)
    yield Extent(size, 0)


class ReadSuite:
    """What can be tested of a device that cannot be written to."""

    sizes: ClassVar[tuple[int, ...]] = (1, 511, 4097, MIB + 1)
    sparse_size: ClassVar[int] = 2**40 + 513

    @pytest.fixture
    def make_device(self) -> MakeDevice:
        """Makes a device of some size and content; to be overridden."""
        raise NotImplementedError

    async def test_reads_return_the_content(self, make_device: MakeDevice) -> None:
        for size in self.sizes:
            content = random.Random(size).randbytes(size)
            device = await make_device(size, {0: content})
            assert device.size == size
            for area in probe_extents(size):
                assert await read(device, area.offset, area.length) == content[area.offset : area.end]

    async def test_read_fills_a_part_of_a_larger_buffer(self, make_device: MakeDevice) -> None:
        device = await make_device(8192, {0: b"a" * 8192})
        buffer = bytearray(b"." * 6)
        await device.read(100, memoryview(buffer)[2:4])
        assert buffer == b"..aa.."

    async def test_read_nowait_agrees_with_read_or_declines(self, make_device: MakeDevice) -> None:
        for size in self.sizes:
            content = random.Random(size).randbytes(size)
            device = await make_device(size, {0: content})
            for area in probe_extents(size):
                buffer = bytearray(b"\xee" * area.length)
                if device.read_nowait(area.offset, buffer):
                    assert buffer == content[area.offset : area.end]

    async def test_sparse_device_reads_zeroes_beside_its_content(self, make_device: MakeDevice) -> None:
        size = self.sparse_size
        device = await make_device(size, {size // 2: b"middle", size - 4: b"tail"})
        assert await read(device, size // 2 - 1, 8) == b"\0middle\0"
        assert await read(device, size - 513, 513) == bytes(509) + b"tail"
        assert await read(device, 0, 65536) == bytes(65536)

    async def test_sparse_read_agrees_with_read_wherever_it_does_not_say_zero(
        self, make_device: MakeDevice
    ) -> None:
        size = MIB
        content = {0: b"x", 131_071: b"yy", 300_000: bytes(5000) + b"z" * 70_000, size - 1: b"t"}
        device = await make_device(size, content)
        for area in (*probe_extents(size), Extent(131_072, 500_000), Extent(1, size - 1)):
            if not area.length:
                continue
            buffer = bytearray(b"\xee" * area.length)
            async with asyncio.timeout(LIMIT_S):
                extents = await device.read_sparse(area.offset, buffer)
            assert sum(extent.length for extent in extents) == area.length
            assert all(one.flags != other.flags for one, other in itertools.pairwise(extents))
            position = 0
            for extent in extents:
                assert extent.length > 0
                if extent.flags & Allocation.ZERO:
                    buffer[position : position + extent.length] = bytes(extent.length)
                position += extent.length
            assert bytes(buffer) == await read(device, area.offset, area.length)

    async def test_allocation_depth_covers_the_range(self, make_device: MakeDevice) -> None:
        device = await make_device(MIB, {131_071: b"yy"})
        for area in (Extent(0, MIB), Extent(1, 1), Extent(MIB - 1, 1)):
            async with asyncio.timeout(LIMIT_S):
                answer = await device.allocation_depth(area.offset, area.length)
            assert 1 <= sum(extent.length for extent in answer) <= area.length
            assert all(extent.length > 0 and extent.status >= 0 for extent in answer)

    async def test_block_status_covers_the_range_and_claims_zero_only_for_zeroes(
        self, make_device: MakeDevice
    ) -> None:
        size = MIB
        content = {0: b"x", 131_071: b"yy", 300_000: bytes(5000) + b"z", size - 1: b"t"}
        device = await make_device(size, content)
        whole = await read(device, 0, size)
        for area in (Extent(0, size), Extent(1, size - 2), Extent(131_072, 1), Extent(size - 1, 1)):
            found = await status_of(device, area)
            assert sum(extent.length for extent, _ in found) == area.length
            for extent, flags in found:
                if flags & Allocation.ZERO:
                    assert not any(whole[extent.offset : extent.end])

    async def test_block_status_of_a_huge_device_ends(self, make_device: MakeDevice) -> None:
        size = self.sparse_size
        device = await make_device(size, {size - 1: b"t"})
        async with asyncio.timeout(LIMIT_S):
            answer = await device.block_status(0, size)
            assert 1 <= sum(extent.length for extent in answer) <= size
            (last,) = await device.block_status(size - 1, 1)
        assert last.length == 1
        assert not last.flags & Allocation.ZERO

    async def test_cancelled_read_has_ended(self, make_device: MakeDevice) -> None:
        size = 8 * MIB
        device = await make_device(size, {0: b"r" * size})
        for rounds in (0, 1, 2, 5, 10, 20, 50, 100):
            buffer = bytearray(size)
            task = asyncio.create_task(device.read(0, buffer))
            for _ in range(rounds):
                await asyncio.sleep(0)
            await _cancel(task)
            # A read that still runs fills the end of the buffer last.
            last = buffer[-1]
            await read(device, 0, size)
            assert buffer[-1] == last

    async def test_many_concurrent_reads(self, make_device: MakeDevice) -> None:
        content = random.Random(3).randbytes(MIB)
        device = await make_device(MIB, {0: content})
        offsets = range(0, MIB, 8192)
        async with asyncio.TaskGroup() as tasks:
            results = [tasks.create_task(read(device, offset, 8192)) for offset in offsets]
        assert b"".join(task.result() for task in results) == content

    async def test_cache_is_a_hint_that_changes_nothing(self, make_device: MakeDevice) -> None:
        device = await make_device(8192, {0: b"c" * 8192})
        async with asyncio.timeout(LIMIT_S):
            await device.cache(0, 8192)
            await device.cache(4095, 2)
        assert await read(device, 0, 8192) == b"c" * 8192


class DeviceSuite(ReadSuite):
    """What every writable device promises."""

    async def test_writes_read_back_and_leave_their_neighbours_alone(self, make_device: MakeDevice) -> None:
        for size in self.sizes:
            model = bytearray(random.Random(size).randbytes(size))
            device = await make_device(size, {0: bytes(model)})
            for number, area in enumerate(probe_extents(size)):
                data = random.Random(number).randbytes(area.length)
                await device.write(area.offset, data, fua=number % 7 == 0)
                model[area.offset : area.end] = data
                assert await read(device, 0, size) == model

    async def test_write_takes_every_kind_of_buffer(self, make_device: MakeDevice) -> None:
        device = await make_device(4096, {})
        for data in (b"bytes", bytearray(b"array"), memoryview(b"<view>")[1:5]):
            await device.write(1000, data)
            assert await read(device, 1000, len(data)) == bytes(data)
            if device.write_nowait(2000, data):
                assert await read(device, 2000, len(data)) == bytes(data)

    async def test_write_nowait_agrees_with_write_or_does_nothing(self, make_device: MakeDevice) -> None:
        for size in self.sizes:
            model = bytearray(random.Random(size).randbytes(size))
            device = await make_device(size, {0: bytes(model)})
            for number, area in enumerate(probe_extents(size)):
                data = random.Random(number).randbytes(area.length)
                if device.write_nowait(area.offset, data):
                    model[area.offset : area.end] = data
                assert await read(device, 0, size) == model

    @pytest.mark.parametrize(("may_unmap", "fast", "fua"), FLAGS)
    async def test_zeroed_range_reads_zero_or_is_unchanged_if_fast_cannot_be(
        self, make_device: MakeDevice, may_unmap: bool, fast: bool, fua: bool
    ) -> None:
        model = bytearray(random.Random(5).randbytes(MIB))
        device = await make_device(MIB, {0: bytes(model)})
        for area in [*AREAS, Extent(MIB - 4097, 4097), Extent(MIB - 1, 1)]:
            try:
                await device.write_zeroes(area.offset, area.length, may_unmap, fast, fua)
            except OSError as error:
                if not (fast and error.errno == errno.ENOTSUP):
                    raise
            else:
                model[area.offset : area.end] = bytes(area.length)
            assert await read(device, 0, MIB) == model

    async def test_zeroing_reaches_an_odd_end(self, make_device: MakeDevice) -> None:
        for size in self.sizes:
            device = await make_device(size, {0: b"o" * size})
            await device.write_zeroes(0, size)
            assert await read(device, 0, size) == bytes(size)

    async def test_empty_operations_change_nothing(self, make_device: MakeDevice) -> None:
        device = await make_device(4096, {0: b"e" * 4096})
        for offset in (0, 1, 4096):
            async with asyncio.timeout(LIMIT_S):
                await device.write(offset, b"")
                await device.write_zeroes(offset, 0)
                await device.trim(offset, 0)
                await device.read(offset, bytearray())
        assert await read(device, 0, 4096) == b"e" * 4096

    async def test_trim_leaves_its_neighbours_alone(self, make_device: MakeDevice) -> None:
        content = random.Random(6).randbytes(MIB)
        for area in AREAS:
            device = await make_device(MIB, {0: content})
            async with asyncio.timeout(LIMIT_S):
                await device.trim(area.offset, area.length)
                await device.trim(area.offset, area.length, fua=True)
            assert await read(device, 0, area.offset) == content[: area.offset]
            assert await read(device, area.end, MIB - area.end) == content[area.end :]

    async def test_flush_returns_and_keeps_what_was_written(self, make_device: MakeDevice) -> None:
        device = await make_device(8192, {})
        await device.write(1, b"one")
        async with asyncio.timeout(LIMIT_S):
            await device.flush()
            await device.write(5000, b"two", fua=True)
            await device.flush()
        assert await read(device, 0, 4) == b"\0one"
        assert await read(device, 5000, 3) == b"two"

    async def test_cancelled_write_has_ended(self, make_device: MakeDevice) -> None:
        size = 8 * MIB
        device = await make_device(size, {0: b"\xff" * size})
        for rounds in (0, 1, 2, 5, 10, 20, 50, 100):
            task = asyncio.create_task(device.write(0, bytes([rounds]) * size))
            for _ in range(rounds):
                await asyncio.sleep(0)
            await _cancel(task)
            # A write that still runs reaches the end of its range last.
            last = await read(device, size - 1, 1)
            await read(device, 0, size)
            assert await read(device, size - 1, 1) == last

    async def test_many_concurrent_writes_all_land(self, make_device: MakeDevice) -> None:
        content = random.Random(4).randbytes(MIB)
        device = await make_device(MIB, {})
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            for offset in range(0, MIB, 8192):
                tasks.create_task(device.write(offset, content[offset : offset + 8192]))
        assert await read(device, 0, MIB) == content

    async def test_far_end_of_a_sparse_device_can_be_written_and_zeroed(
        self, make_device: MakeDevice
    ) -> None:
        size = self.sparse_size
        device = await make_device(size, {})
        await device.write(size - 513, b"w" * 513)
        await device.write_zeroes(size - 100, 100)
        assert await read(device, size - 514, 514) == b"\0" + b"w" * 413 + bytes(100)
        async with asyncio.timeout(LIMIT_S):
            await device.trim(0, size)

    @pytest.mark.parametrize("seed", [1, 2, 3])
    async def test_random_operations_agree_with_a_bytearray(self, make_device: MakeDevice, seed: int) -> None:
        size = max(self.sizes)
        chance = random.Random(seed)
        model = bytearray(size)
        device = await make_device(size, {})
        for _ in range(200):
            offset = chance.randrange(size)
            length = min(chance.choice((1, 512, 4096, 70_000)), size - offset)
            kind = chance.choice(("write", "write", "nowait", "zero", "trim", "read"))
            area = slice(offset, offset + length)
            if kind == "read":
                assert await read(device, offset, length) == model[area]
            elif kind == "zero":
                await device.write_zeroes(offset, length, may_unmap=chance.random() < 0.5)
                model[area] = bytes(length)
            elif kind == "trim":
                await device.trim(offset, length)
                model[area] = await read(device, offset, length)
            else:
                data = chance.randbytes(length)
                if kind == "write" or not device.write_nowait(offset, data):
                    await device.write(offset, data)
                model[area] = data
        assert await read(device, 0, size) == model


async def _cancel(task: asyncio.Task[None]) -> None:
    """Cancel `task` and wait for its end; it may have got done before."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        async with asyncio.timeout(LIMIT_S):
            await task
