"""A session against a plain bytearray: any requests, arriving in any pieces, on any mix of ways.

The device takes each operation in place or not, as Hypothesis says, so that a large write goes
over from one way to the other anywhere. Refusals are those of the protocol, and garbage ends the
session with a ProtocolError and nothing else.
"""

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbdbackup.block.device import ReadableBuffer, WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import ProtocolError
from nbdbackup.nbd import messages
from nbdbackup.nbd.constants import Command, CommandFlags, Errno
from tests.support.sessions import Served, export_of, serving

SIZE = (1 << 20) + 513
MOVES = (Command.READ, Command.WRITE, Command.WRITE_ZEROES)


class Moody(FilterDevice):
    """Is in the mood to work in place or not, by turns that `moods` gives."""

    def __init__(self, moods: list[bool]) -> None:
        super().__init__(MemoryDevice(SIZE))
        self._moods = moods
        self._turn = 0

    def _is_willing(self) -> bool:
        self._turn += 1
        return self._moods[self._turn % len(self._moods)]

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        return self._is_willing() and super().read_nowait(offset, buffer)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return self._is_willing() and super().write_nowait(offset, data)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; `seed` makes a write's data."""

    command: Command
    offset: int
    length: int
    flags: CommandFlags
    seed: int

    @property
    def data(self) -> bytes:
        """What a WRITE brings."""
        return random.Random(self.seed).randbytes(self.length) if self.command is Command.WRITE else b""

    @property
    def error(self) -> Errno:
        """What the protocol says to it."""
        if self.offset + self.length <= SIZE:
            return Errno.OK
        return Errno.EINVAL if self.command is Command.READ else Errno.ENOSPC


asks = st.builds(
    Ask,
    command=st.sampled_from(MOVES),
    offset=st.integers(0, SIZE // 3) | st.sampled_from([0, 4096, SIZE - 1, SIZE - 4096]),
    length=st.integers(1, 5000) | st.integers(60_000, 70_000) | st.integers(130_000, 600_000),
    flags=st.sampled_from([CommandFlags(0), CommandFlags.FUA]),
    seed=st.integers(0, 1000),
)


async def send_in_pieces(served: Served, stream: bytes, cuts: random.Random) -> None:
    """Send `stream` cut at random, with a turn of the loop behind each piece."""
    start = 0
    while start < len(stream):
        end = start + cuts.choice([1, 27, 28, 29, 4096, 100_000, 1 << 20])
        await served.client.send(stream[start:end])
        await asyncio.sleep(0)
        start = end


@settings(deadline=None, max_examples=60)
@given(
    script=st.lists(asks, min_size=1, max_size=12),
    moods=st.lists(st.booleans(), min_size=1, max_size=5),
    structured=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
@example(
    script=[Ask(Command.WRITE, 777, 600_000, CommandFlags(0), seed=1)],
    moods=[True, False],
    structured=True,
    seed=4,
)
def test_a_session_does_what_a_bytearray_would(
    script: list[Ask], moods: list[bool], structured: bool, seed: int
) -> None:
    async def play() -> None:
        model, cuts = bytearray(SIZE), random.Random(seed)
        async with serving(export_of(Moody(moods)), structured=structured) as served:
            for ask in script:
                stream = served.client.compose(
                    ask.command, ask.offset, ask.length, flags=ask.flags, data=ask.data
                )
                await send_in_pieces(served, stream, cuts)
                reply = await served.client.reply(served.client.last_cookie)
                assert reply.error == ask.error
                end = ask.offset + ask.length
                if ask.error:
                    continue
                if ask.command is Command.READ:
                    assert reply.data == model[ask.offset : end]
                elif ask.command is Command.WRITE:
                    model[ask.offset : end] = ask.data
                else:
                    model[ask.offset : end] = bytes(ask.length)
            whole = await served.client.call(Command.READ, 0, SIZE)
            assert whole.data == model

    asyncio.run(play())


@settings(deadline=None, max_examples=100)
@given(
    garbage=st.binary(min_size=1, max_size=500),
    heads=st.lists(
        st.tuples(
            st.integers(0, 0xFFFF),
            st.integers(0, 0xFFFF),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, 99999),
        ),
        max_size=5,
    ),
)
def test_garbage_ends_a_session_with_a_protocol_error_or_nothing(
    garbage: bytes, heads: list[tuple[int, int, int, int]]
) -> None:
    async def play() -> None:
        stream = b"".join(
            messages.REQUEST.build(messages.Request(CommandFlags(flags), command, 1, offset, length))
            for flags, command, offset, length in heads
        )
        async with serving(export_of(MemoryDevice(SIZE))) as served:
            with suppress(ConnectionError):  # closed by the session before all was sent
                await served.client.send(stream + garbage)
                served.client.sock.shutdown(1)
            with suppress(ProtocolError):
                await served.wait_ended()

    asyncio.run(play())
