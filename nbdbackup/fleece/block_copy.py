"""BlockCopy: copies clusters of one point in time from a source to a target, each once.

Client copy-before-write and the backup job use the same BlockCopy, so that what a client
write saved counts as the job's progress and nobody copies a cluster twice: a second copy
could find the client's new bytes.

Each cluster goes one way: dirty -> in flight -> done, and back to dirty if the copy fails.
`access` says which clusters the point in time still offers; `discard` takes them out. With
`skip_unallocated`, clusters that the source's top layer does not hold are discarded when they come up:
while a cluster is dirty nobody has changed it, so the answer holds however late it is asked for.

Invariant 1: a cluster in `access` and not in `done` still holds, in the source, the
bytes of the point in time. Whoever changes the source calls `copy` (or `copy_nowait`) first.

With `done` and `access` in a file that outlives the process (`adopt`), invariant 1 outlives it too, killed
between any two steps. The order proves it: the write to the target has returned, so the kernel has the
bytes (`_transfer`, `_copy_cluster_nowait`); then `_finish` sets the done bit, in the mapping and so in the
kernel's hands; then `copy` returns, and only then its caller's write is forwarded. Killed before the bit:
the source still holds the bytes, and the cluster is copied again, the same bytes to the same place. Killed
after it: the target holds them. `discard` clears the access bit before anybody frees the target's space.
Nothing that has to survive is in `dirty` or `in_flight`: dirty is what is in access and not in done.

Follows QEMU's block/block-copy.c; the terms are the same.
"""

import os
from collections.abc import Callable, Iterator

from nbdbackup.bitmap.clusters import ClusterBitmap
from nbdbackup.block.device import BlockDevice
from nbdbackup.block.executor import IoExecutor
from nbdbackup.errors import CopyError, Side
from nbdbackup.extents import Extent
from nbdbackup.fleece.allocation import allocated_head
from nbdbackup.fleece.budget import ByteBudget
from nbdbackup.fleece.request_list import RequestList

CLUSTER_BYTES_DEFAULT = 64 << 10
CHUNK_BYTES_MAX = 1 << 20
"""One copy's length: long enough to be cheap, short enough for a client that waits for it."""
MEMORY_BYTES_MAX = 64 << 20
"""Bounce buffers of one BlockCopy, all together."""
BUFFERS_KEPT_MAX = 16
"""Bounce buffers kept for the next copies."""
INLINE_BYTES_MAX = 256 << 10
"""Longer reads and writes go to a thread, where the kernel copies beside the event loop."""


class BlockCopy:
    """Set once: both ends, `cluster_bytes`, `target_zeroed`. Bitmaps change while running.

    `target_zeroed`: the target reads as zeroes wherever nothing was written yet, so that zero
    clusters need no write. `on_copied(length)` is called with the bytes of each finished run,
    `on_skipped(length)` with those of clusters that turned out not to be allocated.

    At first every cluster is wanted, unless `all_wanted` is false: then none is until `want`.
    """

    def __init__(
        self,
        source: BlockDevice,
        target: BlockDevice,
        cluster_bytes: int = CLUSTER_BYTES_DEFAULT,
        *,
        target_zeroed: bool = False,
        use_copy_range: bool = True,
        chunk_bytes_max: int = CHUNK_BYTES_MAX,
        all_wanted: bool = True,
        skip_unallocated: bool = False,
        on_copied: Callable[[int], None] | None = None,
        on_skipped: Callable[[int], None] | None = None,
    ) -> None:
        assert source.size == target.size
        self.source = source
        self.target = target
        self.size = source.size
        self.cluster_bytes = cluster_bytes
        self.chunk_bytes_max = max(chunk_bytes_max, cluster_bytes)
        self.target_zeroed = target_zeroed
        self.skip_unallocated = skip_unallocated
        self.on_copied = on_copied
        self.on_skipped = on_skipped
        self.access = ClusterBitmap(self.size, cluster_bytes, all_set=all_wanted)
        self.dirty = ClusterBitmap(self.size, cluster_bytes, all_set=all_wanted)
        self.done = ClusterBitmap(self.size, cluster_bytes)
        self.in_flight = RequestList()
        self.holds = RequestList()
        """Ranges that somebody outside holds: no copy begins there, and no client write goes on."""
        self._use_copy_range = use_copy_range
        self._offload_executor = IoExecutor("copy")
        self._memory = ByteBudget(MEMORY_BYTES_MAX)
        self._buffers: list[bytearray] = []
        self._zeroes = bytes(cluster_bytes)

    def want(self, clusters: ClusterBitmap) -> None:
        """`clusters`, which become this object's, are all that is wanted. Before anything was copied.

        `access` stays where it is, perhaps in a file.
        """
        assert clusters.cluster_bytes == self.cluster_bytes
        assert clusters.size == self.size
        self.dirty = clusters
        self.access.assign(clusters)

    def adopt(self, access: ClusterBitmap, done: ClusterBitmap) -> None:
        """Use these maps, which become this object's: go on where they stand. Before anything was copied."""
        assert access.cluster_bytes == done.cluster_bytes == self.cluster_bytes
        assert access.size == done.size == self.size
        self.access, self.done = access, done
        self.dirty = access.minus(done)

    def want_more(self, area: Extent) -> None:
        """The clusters of cluster-aligned `area` are wanted too. Before anything was copied."""
        self.dirty.set(area)
        self.access.set(area)

    def want_again(self) -> None:
        """A new point in time: every cluster is to be copied, also those copied before.

        At an instant when no client write and no copy is in flight.
        """
        assert not self.in_flight
        everything = Extent(0, self.size)
        for bitmap in (self.access, self.dirty):
            bitmap.set(everything)
        self.done.clear(everything)

    def want_rest(self, clusters: ClusterBitmap) -> None:
        """`clusters`, which become this object's, are to be copied, perhaps again, and nothing else.

        Of a source that nobody changes, and while no copy is in flight.
        """
        assert not self.in_flight
        self.done = self.done.minus(clusters)
        self.dirty = clusters
        self.access.assign(clusters)

    def clusters(self, area: Extent) -> Extent:
        """`area` rounded out to whole clusters."""
        return area.aligned_out(self.cluster_bytes, self.size)

    async def copy(self, area: Extent) -> None:
        """Copy every dirty cluster that `area` touches.

        On return no cluster of `area` is dirty or being copied by anyone. A copy of somebody
        else's that failed is done again here.

        Raises:
            CopyError: this call's own read or write failed; the cluster is dirty again.
        """
        area = self.clusters(area)
        while True:
            await self.holds.wait_no_conflict(area)
            run = self.dirty.next_set(area, self.chunk_bytes_max)
            if run is not None:
                await self._copy_run(run)
                continue
            conflict = self.in_flight.find_conflict(area)
            if conflict is None:
                return
            await conflict.wait_ended()

    def copy_nowait(self, area: Extent) -> bool:
        """`copy` as far as it goes without waiting; True if nothing in `area` is left to do.

        Raises:
            CopyError: as `copy`.
        """
        area = self.clusters(area)
        for requests in (self.in_flight, self.holds):
            if requests and requests.find_conflict(area) is not None:
                return False
        if self.skip_unallocated and self.dirty.next_set(area) is not None:
            return False
        while (run := self.dirty.next_set(area, self.cluster_bytes)) is not None:
            if not self._copy_cluster_nowait(run):
                return False
            self._finish(run)
        return True

    async def copy_zeroes(self, area: Extent) -> None:
        """The source is known to hold zeroes in `area` at the point in time: no need to read them.

        Takes only whole clusters of `area`, and only those still dirty: for these the knowledge
        holds however old it is, since nobody may have changed them.

        Raises:
            CopyError: writing zeroes to the target failed; the cluster is dirty again.
        """
        area = area.aligned_in(self.cluster_bytes, self.size)
        while area.length:
            await self.holds.wait_no_conflict(area)
            run = self.dirty.next_set(area)
            if run is None:
                return
            await self._copy_run(run, zeroes=True)

    async def look_ahead(self, run: Extent) -> tuple[Extent, bool]:
        """The longest known head of `run`, whole clusters, that is to be copied (True) or skipped (False).

        Raises:
            CopyError: the source does not know what it holds.
        """
        if not self.skip_unallocated:
            return run, True
        try:
            known = await self.source.is_allocated(run.offset, run.length)
        except OSError as error:
            raise CopyError(Side.SOURCE, run.offset, run.length, error) from error
        return allocated_head(known, run, self.cluster_bytes)

    def skip(self, area: Extent) -> None:
        """Skip what `look_ahead` said is to be skipped; what is not dirty any more was dealt with."""
        while area.length and (run := self.dirty.next_set(area)) is not None:
            self.dirty.clear(run)
            self._give_up(run)
            area = Extent(run.end, area.end - run.end)

    def discard(self, area: Extent) -> Extent:
        """Give up the whole clusters in `area`; they are no longer copied before a write.

        Returns them (perhaps length 0). Copies in flight there may still end: wait for `in_flight`.
        """
        area = area.aligned_in(self.cluster_bytes, self.size)
        if area.length:
            self.access.clear(area)
            self.dirty.clear(area)
        return area

    async def close(self) -> None:
        """Wait for copies in flight and let go of threads, buffers and maps, which may keep a file open."""
        await self.in_flight.wait_no_conflict(Extent(0, self.size))
        self._offload_executor.shutdown()
        self._buffers.clear()
        self.access = self.dirty = self.done = ClusterBitmap(self.size, self.cluster_bytes)

    # One run: claim, transfer, settle.

    async def _copy_run(self, run: Extent, zeroes: bool = False) -> None:
        # No await between finding the run dirty and this claim.
        self.dirty.clear(run)
        with self.in_flight.hold(run):
            rest = run
            try:
                while rest.length:
                    piece, is_wanted = await self.look_ahead(rest)
                    if is_wanted:
                        await self._transfer(piece, zeroes)
                        self._finish(piece)
                    else:
                        self._give_up(piece)
                    rest = Extent(piece.end, rest.end - piece.end)
            except BaseException:
                self._set_dirty_again(rest)
                raise

    async def _transfer(self, run: Extent, zeroes: bool) -> None:
        if zeroes:
            await self._write_zeroes(run)
        elif not await self._transfer_offloaded(run):
            await self._transfer_bounced(run)

    def _give_up(self, run: Extent) -> None:
        self.access.clear(run)
        if self.on_skipped is not None:
            self.on_skipped(run.length)

    def _finish(self, run: Extent) -> None:
        self.dirty.clear(run)
        self.done.set(run)
        if self.on_copied is not None:
            self.on_copied(run.length)

    def _set_dirty_again(self, run: Extent) -> None:
        """Except where somebody gave the clusters up meanwhile."""
        rest = run
        while rest.length and (wanted := self.access.next_set(rest)) is not None:
            self.dirty.set(wanted)
            rest = Extent(wanted.end, rest.end - wanted.end)

    async def _transfer_offloaded(self, run: Extent) -> bool:
        """Let the kernel copy; False if it can't: that switches it off for good, as in the seed."""
        source_fd, target_fd = self.source.offload_fd(), self.target.offload_fd()
        if not self._use_copy_range or source_fd is None or target_fd is None:
            return False
        try:
            await self._offload_executor.run(_copy_range, source_fd, target_fd, run)
        except OSError:
            # Whatever it was, the bounce buffer meets it again and can tell source from target.
            self._use_copy_range = False
            return False
        return True

    async def _transfer_bounced(self, run: Extent) -> None:
        async with self._memory.take(run.length):
            buffer = self._take_buffer(run.length)
            with memoryview(buffer)[: run.length] as view:
                await self._read(run, view)
                for piece, is_zero in self._split_zeroes(run, buffer):
                    if is_zero:
                        await self._write_zeroes(piece)
                    else:
                        await self._write(piece, view[piece.offset - run.offset : piece.end - run.offset])
            self._keep_buffer(buffer)

    def _copy_cluster_nowait(self, run: Extent) -> bool:
        buffer = self._take_buffer(run.length)
        try:
            with memoryview(buffer)[: run.length] as view:
                if not _blaming(Side.SOURCE, run, self.source.read_nowait, run.offset, view):
                    return False
                if self._is_zero(buffer, 0, run.length):
                    return self.target_zeroed
                return _blaming(Side.TARGET, run, self.target.write_nowait, run.offset, view)
        finally:
            self._keep_buffer(buffer)

    async def _read(self, run: Extent, view: memoryview) -> None:
        try:
            if run.length <= INLINE_BYTES_MAX and self.source.read_nowait(run.offset, view):
                return
            await self.source.read(run.offset, view)
        except OSError as error:
            raise CopyError(Side.SOURCE, run.offset, run.length, error) from error

    async def _write(self, piece: Extent, view: memoryview) -> None:
        try:
            if piece.length <= INLINE_BYTES_MAX and self.target.write_nowait(piece.offset, view):
                return
            await self.target.write(piece.offset, view)
        except OSError as error:
            raise CopyError(Side.TARGET, piece.offset, piece.length, error) from error

    async def _write_zeroes(self, piece: Extent) -> None:
        if self.target_zeroed:
            return
        try:
            await self.target.write_zeroes(piece.offset, piece.length, may_unmap=True)
        except OSError as error:
            raise CopyError(Side.TARGET, piece.offset, piece.length, error) from error

    # Buffers and zeroes.

    def _take_buffer(self, length: int) -> bytearray:
        while self._buffers:
            buffer = self._buffers.pop()
            if len(buffer) >= length:
                return buffer
        return bytearray(max(length, self.cluster_bytes))

    def _keep_buffer(self, buffer: bytearray) -> None:
        if len(self._buffers) < BUFFERS_KEPT_MAX:
            self._buffers.append(buffer)

    def _is_zero(self, buffer: bytearray, start: int, length: int) -> bool:
        if buffer[start] or buffer[start + length - 1]:
            return False
        zeroes = self._zeroes if length == self.cluster_bytes else self._zeroes[:length]
        return buffer[start : start + length] == zeroes

    def _split_zeroes(self, run: Extent, buffer: bytearray) -> Iterator[tuple[Extent, bool]]:
        """Cut `run`, whose bytes are in `buffer`, into maximal pieces of zero or non-zero clusters."""
        start, is_zero = run.offset, False
        for cluster in run.split(self.cluster_bytes):
            cluster_is_zero = self._is_zero(buffer, cluster.offset - run.offset, cluster.length)
            if cluster_is_zero != is_zero:
                if cluster.offset > start:
                    yield Extent(start, cluster.offset - start), is_zero
                start, is_zero = cluster.offset, cluster_is_zero
        yield Extent(start, run.end - start), is_zero


def _blaming(
    side: Side,
    run: Extent,
    operation: Callable[[int, memoryview], bool],
    offset: int,
    view: memoryview,
) -> bool:
    try:
        return operation(offset, view)
    except OSError as error:
        raise CopyError(side, run.offset, run.length, error) from error


def _copy_range(source_fd: int, target_fd: int, run: Extent) -> None:
    """Copy exactly `run` between two files; raises OSError if the kernel will not."""
    offset = run.offset
    while offset < run.end:
        copied = os.copy_file_range(source_fd, target_fd, run.end - offset, offset, offset)
        if copied == 0:
            raise OSError(5, "the source file ended early")
        offset += copied
