"""BlockCopy: each cluster once, by the right way, and never more than asked for."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdbackup.block.file import FileDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import CopyError, Side
from nbdbackup.extents import Extent
from nbdbackup.fleece import block_copy
from nbdbackup.fleece.block_copy import BlockCopy
from tests.support.faults import FaultyDevice, Operation
from tests.support.fleecing import CLUSTER, SIZE, end, make_gate, noise, open_all_gates, start
from tests.support.gated import GatedDevice, settle

TAIL = Extent(10 * CLUSTER, SIZE - 10 * CLUSTER)


@pytest.fixture(autouse=True)
async def _gates_open_at_the_end() -> AsyncIterator[None]:
    yield
    await open_all_gates()


class Ends:
    """A source full of noise and an empty target, both faulty and gated, and a copy between them."""

    def __init__(self, *, target_zeroed: bool = False, chunk_bytes_max: int = 3 * CLUSTER) -> None:
        self.source_memory, self.target_memory = MemoryDevice(SIZE, "source"), MemoryDevice(SIZE, "target")
        self.source_memory.data[:] = noise(SIZE)
        self.source, self.target = FaultyDevice(self.source_memory), FaultyDevice(self.target_memory)
        self.source_gate, self.target_gate = make_gate(self.source), make_gate(self.target)
        self.progress: list[int] = []
        self.copy = BlockCopy(
            self.source_gate,
            self.target_gate,
            CLUSTER,
            target_zeroed=target_zeroed,
            chunk_bytes_max=chunk_bytes_max,
            on_copied=self.progress.append,
        )

    @property
    def writes(self) -> list[Operation]:
        """What arrived at the target."""
        return [op for op in self.target.operations if op.kind.startswith("write")]


async def test_everything_is_copied_once_and_counted_to_the_byte() -> None:
    ends = Ends()
    await ends.copy.copy(Extent(0, SIZE))
    await ends.copy.copy(Extent(0, SIZE))
    assert ends.target_memory.data == ends.source_memory.data
    assert sum(ends.progress) == SIZE
    assert sum(op.area.length for op in ends.writes) == SIZE
    assert len(ends.copy.dirty) == 0
    assert ends.copy.done.all(0, SIZE)


async def test_a_range_is_rounded_out_to_clusters() -> None:
    ends = Ends()
    await ends.copy.copy(Extent(CLUSTER - 1, 2))
    assert [op.area for op in ends.writes] == [Extent(0, 2 * CLUSTER)]
    await ends.copy.copy(Extent(SIZE - 1, 1))
    assert ends.writes[-1].area == TAIL


async def test_no_read_or_write_is_longer_than_a_chunk() -> None:
    ends = Ends(chunk_bytes_max=3 * CLUSTER)
    await ends.copy.copy(Extent(0, SIZE))
    lengths = [op.area.length for op in (*ends.source.operations, *ends.target.operations)]
    assert max(lengths) == 3 * CLUSTER


async def test_a_saved_cluster_inside_a_larger_copy_is_not_copied_again() -> None:
    """Defect a: its source may have changed since."""
    ends = Ends()
    saved = bytes(ends.source_memory.data)
    await ends.copy.copy(Extent(2 * CLUSTER, 1))
    ends.source_memory.data[2 * CLUSTER : 3 * CLUSTER] = b"\xaa" * CLUSTER
    await ends.copy.copy(Extent(0, SIZE))
    assert ends.target_memory.data == saved


async def test_ends_of_different_sizes_are_refused() -> None:
    """Defect e; who builds a BlockCopy says so to the user before."""
    with pytest.raises(AssertionError):
        BlockCopy(MemoryDevice(SIZE), MemoryDevice(SIZE + 1), CLUSTER)


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("quick", [False, True])
async def test_a_failed_copy_names_its_side_and_leaves_the_clusters_dirty(side: Side, quick: bool) -> None:
    ends = Ends()
    failing, kind = (ends.source, "read") if side is Side.SOURCE else (ends.target, "write")
    failing.inject(kind, errno.ENOSPC, Extent(4 * CLUSTER, CLUSTER), count=1)
    if quick:
        # The twins of a faulty device leave failing to the async way.
        assert not ends.copy.copy_nowait(Extent(4 * CLUSTER, CLUSTER))
    with pytest.raises(CopyError) as caught:
        await ends.copy.copy(Extent(4 * CLUSTER, CLUSTER))
    assert (caught.value.side, caught.value.errno) == (side, errno.ENOSPC)
    assert caught.value.offset == 4 * CLUSTER
    assert ends.copy.dirty.all(0, SIZE)
    assert len(ends.copy.done) == 0
    assert len(ends.copy.in_flight) == 0
    assert ends.copy._memory.bytes_used == 0
    await ends.copy.copy(Extent(0, SIZE))
    assert ends.target_memory.data == ends.source_memory.data


async def test_a_torn_target_write_is_repaired_by_the_next_copy() -> None:
    ends = Ends()
    ends.target.inject("write", errno.EIO, count=1, torn=True)
    with pytest.raises(CopyError):
        await ends.copy.copy(Extent(0, SIZE))
    await ends.copy.copy(Extent(0, SIZE))
    assert ends.target_memory.data == ends.source_memory.data


async def test_a_cancelled_copy_leaves_its_clusters_dirty() -> None:
    ends = Ends()
    ends.target_gate.kinds.add("write")
    copying = start(ends.copy.copy(Extent(0, CLUSTER)))
    op = await ends.target_gate.wait_pending("write")
    assert not ends.copy.dirty.any(0, CLUSTER)
    copying.cancel()
    await settle()
    # The write cannot be taken back; until it has ended the cluster stays in flight.
    assert len(ends.copy.in_flight) == 1
    ends.target_gate.release(op)
    await asyncio.wait({copying}, timeout=10)
    assert copying.cancelled()
    assert ends.copy.dirty.any(0, CLUSTER)
    assert len(ends.copy.in_flight) == 0
    assert ends.copy._memory.bytes_used == 0


async def test_a_second_copy_waits_for_the_first_and_does_not_repeat_it() -> None:
    ends = Ends()
    ends.source_gate.kinds.add("read")
    first = start(ends.copy.copy(Extent(0, CLUSTER)))
    op = await ends.source_gate.wait_pending("read")
    second = start(ends.copy.copy(Extent(0, CLUSTER)))
    await settle()
    assert not second.done()
    assert not ends.copy.copy_nowait(Extent(0, CLUSTER))
    ends.source_gate.release(op)
    await end(first)
    await end(second)
    assert len([op for op in ends.source.operations if op.kind == "read"]) == 1


async def test_a_second_copy_does_what_the_first_failed_to_do() -> None:
    """Defect h: the job may not succeed with a hole where a client's copy failed."""
    ends = Ends()
    ends.source_gate.kinds.add("read")
    first = start(ends.copy.copy(Extent(0, CLUSTER)))
    op = await ends.source_gate.wait_pending("read")
    second = start(ends.copy.copy(Extent(0, CLUSTER)))
    await settle()
    ends.source_gate.fail(op, errno.EIO)
    ends.source_gate.open_gate()
    await end(second)
    with pytest.raises(CopyError):
        await end(first)
    assert ends.target_memory.data[:CLUSTER] == ends.source_memory.data[:CLUSTER]


async def test_buffers_stay_within_the_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copy, "MEMORY_BYTES_MAX", 4 * CLUSTER)
    ends = Ends(chunk_bytes_max=2 * CLUSTER)
    ends.source_gate.kinds.add("read")
    copies = [start(ends.copy.copy(Extent(number * 2 * CLUSTER, 2 * CLUSTER))) for number in range(5)]
    await settle()
    assert len(ends.source_gate.pending) == 2
    ends.source_gate.open_gate()
    for copying in copies:
        await end(copying)
    assert ends.target_memory.data[: 10 * CLUSTER] == ends.source_memory.data[: 10 * CLUSTER]
    assert ends.copy._memory.bytes_used == 0


async def test_a_chunk_larger_than_the_whole_budget_still_goes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_copy, "MEMORY_BYTES_MAX", CLUSTER)
    ends = Ends()
    await end(start(ends.copy.copy(Extent(0, SIZE))))
    assert ends.target_memory.data == ends.source_memory.data


@pytest.mark.parametrize("target_zeroed", [False, True])
async def test_zero_clusters_are_zeroed_not_written(target_zeroed: bool) -> None:
    ends = Ends(target_zeroed=target_zeroed, chunk_bytes_max=SIZE)
    if not target_zeroed:
        ends.target_memory.data[:] = b"\xee" * SIZE
    for zero in (Extent(0, 2 * CLUSTER), Extent(5 * CLUSTER, CLUSTER), TAIL):
        ends.source_memory.data[zero.offset : zero.end] = bytes(zero.length)
    # Not quite zero: only the byte in the middle tells.
    ends.source_memory.data[7 * CLUSTER : 8 * CLUSTER] = bytes(CLUSTER)
    ends.source_memory.data[7 * CLUSTER + 9] = 1
    await ends.copy.copy(Extent(0, SIZE))
    assert ends.target_memory.data == ends.source_memory.data
    zeroed = [op.area for op in ends.writes if op.kind == "write_zeroes"]
    assert zeroed == ([] if target_zeroed else [Extent(0, 2 * CLUSTER), Extent(5 * CLUSTER, CLUSTER), TAIL])


async def test_known_zeroes_are_not_read_and_only_whole_dirty_clusters_count() -> None:
    ends = Ends()
    ends.target_memory.data[:] = b"\xee" * SIZE
    ends.source_memory.data[CLUSTER // 2 : 4 * CLUSTER] = bytes(4 * CLUSTER - CLUSTER // 2)
    before = bytes(ends.source_memory.data)
    await ends.copy.copy(Extent(2 * CLUSTER, 1))
    # Changed after it was saved: the old knowledge must not zero what was saved... or anything else.
    ends.source_memory.data[2 * CLUSTER] = 1
    ends.source.operations.clear()
    await ends.copy.copy_zeroes(Extent(CLUSTER // 2, 4 * CLUSTER - CLUSTER // 2))
    assert ends.source.operations == []
    assert ends.copy.dirty.any(0, 1)
    assert not ends.copy.dirty.any(CLUSTER, 3 * CLUSTER)
    await ends.copy.copy(Extent(0, SIZE))
    assert ends.target_memory.data == before


async def test_known_zeroes_that_could_not_be_written_stay_dirty() -> None:
    ends = Ends()
    ends.target.inject("write_zeroes", errno.EIO, count=1)
    with pytest.raises(CopyError, match="writing the target failed"):
        await ends.copy.copy_zeroes(Extent(0, CLUSTER))
    assert ends.copy.dirty.any(0, 1)


async def test_discarded_clusters_are_not_copied_and_not_dirty_after_a_failure() -> None:
    ends = Ends()
    ends.source_gate.kinds.add("read")
    copying = start(ends.copy.copy(Extent(0, 3 * CLUSTER)))
    op = await ends.source_gate.wait_pending("read")
    assert ends.copy.discard(Extent(CLUSTER - 1, CLUSTER + 2)) == Extent(CLUSTER, CLUSTER)
    ends.source_gate.fail(op, errno.EIO)
    with pytest.raises(CopyError):
        await end(copying)
    assert [ends.copy.dirty.any(number * CLUSTER, 1) for number in range(3)] == [True, False, True]
    assert not ends.copy.access.any(CLUSTER, CLUSTER)


def test_discarding_less_than_a_cluster_does_nothing_but_at_the_end() -> None:
    ends = Ends()
    assert ends.copy.discard(Extent(1, CLUSTER)).length == 0
    assert ends.copy.access.all(0, SIZE)
    assert ends.copy.discard(Extent(TAIL.offset - 1, TAIL.length + 1)) == TAIL


def test_the_quick_way_copies_one_by_one_and_says_when_it_cannot() -> None:
    ends = Ends()
    assert ends.copy.copy_nowait(Extent(1, 2 * CLUSTER))
    assert [op.area for op in ends.writes] == [Extent(n * CLUSTER, CLUSTER) for n in range(3)]
    ends.target_gate.kinds.add("write")
    assert not ends.copy.copy_nowait(Extent(5 * CLUSTER, 1))
    assert ends.copy.dirty.any(5 * CLUSTER, 1)


def test_the_quick_way_leaves_zeroes_to_the_slow_one_unless_the_target_is_zero() -> None:
    for target_zeroed in (False, True):
        ends = Ends(target_zeroed=target_zeroed)
        ends.source_memory.data[:CLUSTER] = bytes(CLUSTER)
        assert ends.copy.copy_nowait(Extent(0, 1)) == target_zeroed
        assert ends.writes == []


async def test_closing_waits_for_copies_in_flight() -> None:
    ends = Ends()
    ends.source_gate.kinds.add("read")
    copying = start(ends.copy.copy(Extent(0, CLUSTER)))
    op = await ends.source_gate.wait_pending("read")
    closing = start(ends.copy.close())
    await settle()
    assert not closing.done()
    ends.source_gate.release(op)
    await end(closing)
    await end(copying)


class Files:
    """Two files of `size` bytes, the source full of noise, and the calls of copy_file_range."""

    def __init__(self, source: Path, target: Path, size: int, patch: pytest.MonkeyPatch) -> None:
        self.content = noise(size)
        source.write_bytes(self.content)
        self.target_path = target
        self.source = FileDevice.open(str(source))
        self.target = FileDevice.create(str(target), size)
        self.calls: list[tuple[int, int]] = []
        real = os.copy_file_range

        def copy_file_range(
            source_fd: int, target_fd: int, count: int, source_offset: int, target_offset: int
        ) -> int:
            assert source_offset == target_offset
            self.calls.append((source_offset, count))
            return real(source_fd, target_fd, count, source_offset, target_offset)

        patch.setattr(os, "copy_file_range", copy_file_range)

    async def close(self) -> None:
        await self.source.close()
        await self.target.close()


async def test_offload_stays_inside_the_device_and_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defects b and c."""
    cluster, size = 4096, 10 * 4096 + 77
    files = Files(tmp_path / "source", tmp_path / "target", size, monkeypatch)
    copy = BlockCopy(files.source, files.target, cluster, chunk_bytes_max=3 * cluster + 1)
    await copy.copy(Extent(0, size))
    assert files.calls[0] == (0, 3 * cluster)
    assert max(count for _, count in files.calls) == 3 * cluster
    assert max(offset + count for offset, count in files.calls) == size
    await copy.close()
    await files.close()
    assert files.target_path.read_bytes() == files.content


async def test_offload_does_not_copy_a_saved_cluster_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect a as it was: a client's write to more clusters offloaded one that had changed meanwhile."""
    cluster, size = 4096, 10 * 4096 + 77
    files = Files(tmp_path / "source", tmp_path / "target", size, monkeypatch)
    copy = BlockCopy(files.source, files.target, cluster)
    await copy.copy(Extent(2 * cluster, cluster))
    await files.source.write(2 * cluster, b"newer")
    await copy.copy(Extent(0, size))
    assert sum(count for _, count in files.calls) == size
    await copy.close()
    await files.close()
    assert files.target_path.read_bytes() == files.content


async def test_offload_goes_on_where_the_kernel_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 10 * 4096 + 77
    files = Files(tmp_path / "source", tmp_path / "target", size, monkeypatch)
    whole = os.copy_file_range
    monkeypatch.setattr(
        os, "copy_file_range", lambda s, t, count, *rest: whole(s, t, min(count, 5000), *rest)
    )
    copy = BlockCopy(files.source, files.target, 4096)
    await copy.copy(Extent(4096, 4096))
    await copy.copy(Extent(0, size))
    assert len(files.calls) > size // 5000
    assert max(offset + count for offset, count in files.calls) == size
    await copy.close()
    await files.close()
    assert files.target_path.read_bytes() == files.content


async def test_offload_between_file_systems_falls_back_and_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path("/dev/shm") / f"nbdbackup-test-{os.getpid()}"
    try:
        files = Files(place, tmp_path / "target", 300_001, monkeypatch)
        copy = BlockCopy(files.source, files.target)
        await copy.copy(Extent(0, 300_001))
        await copy.close()
        await files.close()
        assert files.target_path.read_bytes() == files.content
    finally:
        place.unlink(missing_ok=True)


async def test_offload_that_failed_once_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, size = 4096, 10 * 4096 + 77
    files = Files(tmp_path / "source", tmp_path / "target", size, monkeypatch)
    attempts = []

    def refuse(*args: int) -> int:
        attempts.append(args)
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    copy = BlockCopy(files.source, files.target, cluster, chunk_bytes_max=cluster)
    await copy.copy(Extent(0, size))
    await copy.close()
    await files.close()
    assert len(attempts) == 1
    assert files.target_path.read_bytes() == files.content


async def test_a_source_that_ends_early_is_an_error_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(tmp_path / "source", tmp_path / "target", 3 * 4096, monkeypatch)
    os.truncate(tmp_path / "source", 4096)
    copy = BlockCopy(files.source, files.target, 4096)
    with pytest.raises(CopyError) as caught:
        await end(start(copy.copy(Extent(0, 3 * 4096))))
    assert caught.value.side is Side.SOURCE
    assert copy.dirty.all(0, 3 * 4096)
    await copy.close()
    await files.close()


def test_a_gate_never_offloads() -> None:
    assert GatedDevice(MemoryDevice(1)).offload_fd() is None
