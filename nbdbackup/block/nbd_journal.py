"""What a server has acknowledged but need not have on stable storage yet.

A server that dies may take with it every write that it acknowledged since the last flush, and a
later flush on a new connection would succeed all the same: it covers what the new server has
seen. So the writes are kept here, in the order of their acknowledgement, until a flush that was
sent after it has succeeded; after a reconnect they are written once more, before anything else.

Memory: at most `bytes_max`, with the writes in flight. At half of it the session flushes of its
own accord, so that a long stream of writes goes on without waiting.

With `bytes_max` 0 nothing is kept: then `unsafe` still tells whether a loss would matter.
"""

from collections import deque
from collections.abc import Iterator

import msgspec

from nbdbackup.block.nbd_connection import Operation
from nbdbackup.extents import Extent
from nbdbackup.nbd.constants import Command, CommandFlags

BYTES_MAX = 64 << 20
ENTRY_BYTES = 256
"""What an entry takes besides its data."""
BATCH_MAX = 32

_FLAGS_KEPT = ~CommandFlags.FUA & ~CommandFlags.FAST_ZERO


class Entry(msgspec.Struct, frozen=True):
    """A WRITE or WRITE_ZEROES that was acknowledged."""

    number: int
    command: Command
    area: Extent
    flags: int
    data: bytes

    def again(self) -> Operation:
        """The operation that does it once more."""
        return Operation(self.command, self.area.offset, self.area.length, self.flags, self.data)


def cost(operation: Operation) -> int:
    """The memory that `operation` takes here, in bytes."""
    return ENTRY_BYTES + len(operation.payload)


class Journal:
    """Acknowledged writes that no flush has covered yet."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        # Changing while running.
        self._entries: deque[Entry] = deque()
        self._number = 0
        self._unsafe_number = 0
        self._hint_number = 0
        self._safe_number = 0
        self._bytes_kept = 0
        self._bytes_reserved = 0

    @property
    def mark(self) -> int:
        """For `forget`: stands for everything that was added so far."""
        return self._number

    @property
    def unsafe(self) -> bool:
        """Whether anything was acknowledged that no flush has covered."""
        return self._unsafe_number > self._safe_number

    @property
    def is_clean(self) -> bool:
        """Whether a flush would have nothing to do."""
        return max(self._unsafe_number, self._hint_number) <= self._safe_number

    @property
    def bytes_kept(self) -> int:
        """Memory that the entries take."""
        return self._bytes_kept

    @property
    def wants_flush(self) -> bool:
        """Whether it is time to flush, before there is no more room."""
        return bool(self.bytes_max) and self._bytes_kept >= self.bytes_max // 2

    def has_room(self, operation: Operation) -> bool:
        """Whether `operation` may be sent, with what is kept and what is in flight."""
        taken = self._bytes_kept + self._bytes_reserved
        return not self.bytes_max or taken + cost(operation) <= self.bytes_max or not taken

    def reserve(self, operation: Operation) -> None:
        """`operation` is going to be sent; `release` it when it has ended, however it ended."""
        self._bytes_reserved += cost(operation)

    def release(self, operation: Operation) -> None:
        """`operation` is not in flight any more."""
        self._bytes_reserved -= cost(operation)

    def add(self, operation: Operation) -> None:
        """`operation`, a WRITE or WRITE_ZEROES, has just been acknowledged."""
        self._number += 1
        if not operation.flags & CommandFlags.FUA:
            self._unsafe_number = self._number
        if not self.bytes_max:
            return
        # Also one with FUA: replaying an older write of the same range must not undo it.
        area = Extent(operation.offset, operation.length)
        flags = operation.flags & int(_FLAGS_KEPT)
        self._entries.append(Entry(self._number, operation.command, area, flags, bytes(operation.payload)))
        self._bytes_kept += cost(operation)

    def note_hint(self) -> None:
        """A TRIM has been acknowledged: no loss, if it is undone, but a flush covers it."""
        self._number += 1
        self._hint_number = self._number

    def forget(self, mark: int) -> None:
        """A flush that was sent at `mark` has succeeded."""
        self._safe_number = max(self._safe_number, mark)
        while self._entries and self._entries[0].number <= mark:
            self._bytes_kept -= ENTRY_BYTES + len(self._entries.popleft().data)

    def clear(self) -> None:
        """Keep nothing any more, from now on: what was kept is known to be lost."""
        self.bytes_max = 0
        self._entries.clear()
        self._bytes_kept = 0

    def batches(self) -> Iterator[list[Entry]]:
        """The entries in order, in batches whose entries do not overlap and may land in any order."""
        batch: list[Entry] = []
        for entry in list(self._entries):
            if len(batch) >= BATCH_MAX or any(entry.area.overlaps(other.area) for other in batch):
                yield batch
                batch = []
            batch.append(entry)
        if batch:
            yield batch
