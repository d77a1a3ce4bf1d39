"""What is kept of acknowledged writes until a flush covers them, and within which bounds."""

from collections.abc import Iterable

from nbdbackup.block.nbd_connection import Operation
from nbdbackup.block.nbd_journal import BATCH_MAX, ENTRY_BYTES, Entry, Journal, cost
from nbdbackup.nbd.constants import Command, CommandFlags


def write(offset: int, data: bytes = b"data", flags: int = 0) -> Operation:
    return Operation(Command.WRITE, offset, len(data), flags, data)


def offsets(batches: Iterable[list[Entry]]) -> list[list[int]]:
    return [[entry.area.offset for entry in batch] for batch in batches]


async def test_flush_covers_only_what_was_acknowledged_before_it_was_sent() -> None:
    journal = Journal()
    journal.add(write(0))
    mark = journal.mark
    journal.add(write(100))
    journal.forget(mark)
    assert offsets(journal.batches()) == [[100]]
    assert journal.unsafe
    journal.forget(journal.mark)
    assert not journal.unsafe
    assert journal.bytes_kept == 0


async def test_entries_keep_the_bytes_that_were_written_then() -> None:
    journal = Journal()
    data = bytearray(b"then")
    journal.add(Operation(Command.WRITE, 5, 4, 0, data))
    data[:] = b"late"
    [[entry]] = journal.batches()
    again = entry.again()
    assert (again.command, again.offset, again.length, again.payload) == (Command.WRITE, 5, 4, b"then")


async def test_overlapping_writes_are_never_in_one_batch_and_stay_in_order() -> None:
    journal = Journal()
    for offset in (0, 4, 2, 100, 101):
        journal.add(write(offset))
    assert offsets(journal.batches()) == [[0, 4], [2, 100], [101]]


async def test_batches_are_bounded() -> None:
    journal = Journal()
    for number in range(2 * BATCH_MAX + 1):
        journal.add(write(number * 4))
    assert [len(batch) for batch in journal.batches()] == [BATCH_MAX, BATCH_MAX, 1]


async def test_write_with_fua_is_safe_but_kept_in_its_place() -> None:
    journal = Journal()
    journal.add(write(0, b"first", CommandFlags.FUA))
    assert not journal.unsafe
    [[entry]] = journal.batches()
    assert entry.flags == 0


async def test_room_counts_what_is_in_flight_and_is_there_for_one_at_least() -> None:
    one = write(0, bytes(1000))
    journal = Journal(2 * cost(one))
    assert journal.has_room(write(0, bytes(100_000)))
    for _ in range(2):
        assert journal.has_room(one)
        journal.reserve(one)
    assert not journal.has_room(one)
    journal.add(one)
    journal.release(one)
    assert not journal.has_room(one)
    assert journal.wants_flush
    journal.release(one)
    assert journal.has_room(one)
    assert journal.bytes_kept == ENTRY_BYTES + 1000


async def test_without_bytes_nothing_is_kept_but_a_loss_is_known() -> None:
    journal = Journal(0)
    journal.add(write(0))
    assert list(journal.batches()) == []
    assert journal.bytes_kept == 0
    assert journal.has_room(write(0, bytes(1 << 20)))
    assert journal.unsafe
    journal.forget(journal.mark)
    assert not journal.unsafe


async def test_trim_wants_a_flush_but_is_no_loss() -> None:
    journal = Journal()
    assert journal.is_clean
    journal.note_hint()
    assert not journal.is_clean
    assert not journal.unsafe
    journal.forget(journal.mark)
    assert journal.is_clean
