"""The three waits that make a point in time hold, and what happens without each.

Every scenario is a function that runs one schedule. Each runs twice: as the code is, and with
one wait taken out; then it must end in `NewerData`, or the wait proves nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from nbdbackup.extents import Extent
from nbdbackup.fleece import snapshots
from tests.support.fleecing import CLUSTER, SIZE, Disk, end, open_all_gates, start
from tests.support.gated import PendingOp, settle
from tests.support.mutations import (
    Mutation,
    without_common_instant,
    without_copy_wait,
    without_drain,
    without_frozen_read_wait,
    without_retry,
)


@pytest.fixture(autouse=True)
async def _gates_open_at_the_end() -> AsyncIterator[None]:
    yield
    await open_all_gates()


class NewerData(Exception):
    """A view showed bytes that were written after its point in time."""


def check_view(seen: bytes, expected: bytes) -> None:
    """Raise NewerData unless they are equal."""
    if seen != expected:
        raise NewerData


async def write_while_view_reads_the_source(sparse: bool = False) -> None:
    """A view's read is in the source when a client writes to the same cluster."""
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    disk.source.kinds.add("read")
    buffer = bytearray(CLUSTER)
    read = taken.view.read_sparse if sparse else taken.view.read
    reading: asyncio.Task[object] = start(read(0, buffer))
    frozen_read = await disk.source.wait_pending("read")
    writing = start(disk.node.write(100, b"new"))
    # The client's own copy-before-write read.
    copy_read = await _second_read(disk)
    disk.source.release(copy_read)
    await settle()
    landed = disk.content != before
    disk.source.open_gate()
    assert frozen_read not in disk.source.pending
    await end(reading)
    await end(writing)
    check_view(bytes(buffer), before[:CLUSTER])
    assert not landed
    assert disk.content[100:103] == b"new"
    assert await taken.read() == before


async def _second_read(disk: Disk) -> PendingOp:
    await settle()
    reads = [op for op in disk.source.pending if op.kind == "read"]
    assert len(reads) == 2
    return reads[1]


async def write_in_flight_at_the_point_in_time() -> None:
    """A client write is in the source when the snapshot is asked for."""
    disk = Disk()
    disk.source.kinds.add("write")
    writing = start(disk.node.write(100, b"new"))
    op = await disk.source.wait_pending("write")
    taking = start(disk.take())
    await settle()
    taken_early = taking.done()
    point_in_time = disk.content
    disk.source.release(op)
    await end(writing)
    taken = await end(taking)
    if not taken_early:
        point_in_time = disk.content
    check_view(await taken.read(), point_in_time)
    assert not taken_early
    assert point_in_time[100:103] == b"new"


async def write_while_a_job_copies_the_cluster() -> None:
    """A job's copy is reading the source when a client writes to the same cluster."""
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    disk.source.kinds.add("read")
    job = start(taken.snapshot.block_copy.copy(Extent(0, CLUSTER)))
    job_read = await disk.source.wait_pending("read")
    writing = start(disk.node.write(100, b"new"))
    await settle()
    landed = disk.content != before
    disk.source.open_gate()
    await end(job)
    await end(writing)
    assert not job_read.errno
    check_view(await taken.read(), before)
    assert not landed


async def several_nodes_share_one_instant() -> None:
    """A client writes a counter to `a`, then, after its reply, to `b`; meanwhile a, slow and b are taken.

    `slow` has a write in flight, which gives the client all the time in the world in the middle.
    """
    a, slow, b = Disk("a"), Disk("slow"), Disk("b")
    a.memory.data[0] = b.memory.data[0] = 0
    slow.source.kinds.add("write")
    slow_writing = start(slow.node.write(0, b"slow"))
    slow_write = await slow.source.wait_pending("write")

    async def client() -> None:
        await a.node.write(0, b"\x01")
        await b.node.write(0, b"\x01")

    taking = start(snapshots.take_snapshots([disk.plan("s")[0] for disk in (a, slow, b)]))
    await settle()
    writing = start(client())
    await settle()
    slow.source.release(slow_write)
    snapshot_a, _, snapshot_b = await end(taking)
    await end(writing)
    await end(slow_writing)
    seen_a, seen_b = bytearray(1), bytearray(1)
    await snapshot_a.view.read(0, seen_a)
    await snapshot_b.view.read(0, seen_b)
    if seen_b > seen_a:
        raise NewerData
    assert (a.content[0], b.content[0]) == (1, 1)


async def write_waits_for_a_failing_copy() -> None:
    """Somebody else's copy of the cluster fails while a client write waits for it: it must copy itself."""
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    disk.source.kinds.add("read")
    job = start(taken.snapshot.block_copy.copy(Extent(0, CLUSTER)))
    job_read = await disk.source.wait_pending("read")
    writing = start(disk.node.write(100, b"new"))
    await settle()
    disk.source.fail(job_read, 5)
    disk.source.open_gate()
    await asyncio.wait({job})
    await end(writing)
    job.exception()
    check_view(await taken.read(), before)


async def write_while_view_reads_the_source_sparsely() -> None:
    """The same while the view's read looks for holes, too."""
    await write_while_view_reads_the_source(sparse=True)


Scenario = Callable[[], Awaitable[None]]


CASES = [
    pytest.param(write_while_view_reads_the_source, without_frozen_read_wait, id="frozen-reads"),
    pytest.param(
        write_while_view_reads_the_source_sparsely, without_frozen_read_wait, id="frozen-sparse-reads"
    ),
    pytest.param(write_in_flight_at_the_point_in_time, without_drain, id="drain"),
    pytest.param(several_nodes_share_one_instant, without_common_instant, id="drain-together"),
    pytest.param(write_while_a_job_copies_the_cluster, without_copy_wait, id="copy-in-flight"),
    pytest.param(write_waits_for_a_failing_copy, without_retry, id="failed-copy-in-flight"),
]


@pytest.mark.parametrize(("scenario", "mutation"), CASES)
async def test_point_in_time_holds(scenario: Scenario, mutation: Mutation) -> None:
    del mutation
    await scenario()


@pytest.mark.parametrize(("scenario", "mutation"), CASES)
async def test_point_in_time_is_lost_without_the_wait(
    scenario: Scenario, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(NewerData):
        await scenario()


async def test_view_read_that_starts_while_a_write_waits_gets_the_copy() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    disk.source.kinds.add("read")
    first = start(taken.read(0, CLUSTER))
    frozen_read = await disk.source.wait_pending("read")
    writing = start(disk.node.write(0, b"new"))
    copy_read = await _second_read(disk)
    disk.source.release(copy_read)
    await settle()
    assert await taken.read(0, CLUSTER) == before[:CLUSTER]
    assert not writing.done()
    disk.source.release(frozen_read)
    assert await end(first) == before[:CLUSTER]
    await end(writing)


async def test_a_write_elsewhere_does_not_wait_for_a_frozen_read() -> None:
    disk = Disk()
    taken = await disk.take()
    disk.source.kinds.add("read")
    reading = start(taken.read(0, CLUSTER))
    frozen_read = await disk.source.wait_pending("read", 0)
    writing = start(disk.node.write(SIZE - 1, b"n"))
    disk.source.release(await disk.source.wait_pending("read", 10 * CLUSTER))
    await end(writing)
    assert not reading.done()
    disk.source.release(frozen_read)
    await end(reading)


async def test_the_quick_way_of_a_write_waits_for_frozen_reads_too() -> None:
    disk = Disk()
    before = disk.content
    taken = await disk.take()
    disk.source.kinds.add("read")
    reading = start(taken.read(0, CLUSTER))
    frozen_read = await disk.source.wait_pending("read", 0)
    disk.source.kinds.clear()
    assert not disk.node.write_nowait(0, b"new")
    assert disk.content == before
    disk.source.release(frozen_read)
    assert await end(reading) == before[:CLUSTER]
    assert disk.node.write_nowait(0, b"new")
    assert await taken.read() == before
