"""The payload of a large write: in pieces while the device takes them, collected once it does not."""

import errno

import pytest

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.extents import Extent
from nbdbackup.nbd.constants import Command, Errno
from nbdbackup.nbd.requests import Refusal, Request
from nbdbackup.server.buffers import ReceiveBuffer
from nbdbackup.server.payload import PIECE_ALIGN_BYTES, PIECE_BYTES_MIN, Payload
from tests.support.faults import FaultyDevice
from tests.support.fleecing import noise
from tests.support.gated import GatedDevice

MIB = 1 << 20
SIZE = 2 * MIB
OFFSET = 777
DATA = noise(MIB + 55)


def payload(
    device: BlockDevice, *, refusal: Refusal | None = None, in_pieces: bool = True, length: int = len(DATA)
) -> Payload:
    return Payload(Request(0, Command.WRITE, 1, OFFSET, length), device, refusal, in_pieces=in_pieces)


def feed(target: Payload, data: bytes, step: int) -> int:
    """Let `data` arrive in steps; how many bytes were left over when it was complete."""
    received = ReceiveBuffer()
    for start in range(0, len(data), step):
        if received.start == received.end:
            received.start = received.end = 0
        elif received.end + step > len(received.view):
            received._compact()
        received.put(data[start : start + step])
        if target.feed(received):
            return len(received) + len(data) - min(len(data), start + step)
    return -1


@pytest.mark.parametrize("step", [1000, 4096, 100_000, 250_000])
@pytest.mark.parametrize("in_pieces", [True, False])
def test_every_byte_lands_however_it_arrives(step: int, in_pieces: bool) -> None:
    memory = MemoryDevice(SIZE)
    target = payload(memory, in_pieces=in_pieces)
    assert feed(target, DATA + b"the next request", step) == 16
    assert target.is_complete
    assert target.refusal is None
    if in_pieces:
        assert target.collected is None
        assert memory.data[OFFSET : OFFSET + len(DATA)] == DATA
    else:
        assert bytes(target.collected or b"") == DATA
        assert not any(memory.data)


@pytest.mark.parametrize("step", [1000, 100_000])
def test_pieces_are_long_and_end_on_pages_of_the_device(step: int) -> None:
    device = FaultyDevice(MemoryDevice(SIZE))
    feed(payload(device), DATA, step)
    pieces = [operation.area for operation in device.operations]
    assert len(pieces) > 2
    assert all(piece.length >= PIECE_BYTES_MIN - PIECE_ALIGN_BYTES for piece in pieces[:-1])
    assert all(piece.end % PIECE_ALIGN_BYTES == 0 for piece in pieces[:-1])
    assert sum(piece.length for piece in pieces) == len(DATA)


def test_the_rest_is_collected_once_the_device_would_wait() -> None:
    memory = MemoryDevice(SIZE)
    gate = GatedDevice(memory, kinds=())
    target, received = payload(gate), ReceiveBuffer()
    received.put(DATA[:200_000])
    assert not target.feed(received)
    written = 200_000 - len(received)
    assert written > 0
    gate.kinds.add("write")
    received.put(DATA[200_000:400_000])
    assert not target.feed(received)
    received.start = received.end = 0
    for start in range(400_000, len(DATA), 100_000):
        received.put(DATA[start : start + 100_000])
        target.feed(received)
        received.start = received.end = 0
    assert target.is_complete
    assert bytes(target.collected or b"") == DATA[written:]
    assert memory.data[OFFSET : OFFSET + written] == DATA[:written]


def test_a_refused_payload_is_thrown_away_and_changes_nothing() -> None:
    memory = MemoryDevice(SIZE)
    refusal = Refusal(Errno.ENOSPC, "past the end")
    # Longer than the device: nobody must look at where it would go.
    target = payload(memory, refusal=refusal, length=3 * MIB)
    assert feed(target, bytes([1]) * (3 * MIB) + b"next", 100_000) == 4
    assert target.refusal is refusal
    assert not any(memory.data)


def test_a_failure_in_the_middle_is_kept_and_the_rest_thrown_away() -> None:
    memory = MemoryDevice(SIZE)

    class FullAt(MemoryDevice):
        def write_nowait(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
            if Extent(offset, len(data)).end > MIB // 2:
                raise OSError(errno.ENOSPC, "full")
            memory.write_nowait(offset, data)
            return True

    target = payload(FullAt(SIZE))
    assert feed(target, DATA + b"next", 100_000) == 4
    assert target.refusal == Refusal(Errno.ENOSPC, "full")
    assert target.collected is None
    assert not any(memory.data[MIB // 2 :])
