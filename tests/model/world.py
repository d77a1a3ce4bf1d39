"""Nodes, snapshots, views and jobs on gated devices, and what a bytearray says they must show.

Everything happens in small steps that the caller chooses: start an operation, let one
device operation take effect, return or fail, move the clock, cancel. After each step `check`
compares the engine with the model:

- Devices hold what `expected.py` allows.
- A view's read that returned equals the point in time; one that failed had a reason.
- A job that succeeded has written the point in time, byte for byte.
- A client's write that failed had a reason.
"""

import asyncio
import errno
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.node import drained
from nbdbackup.errors import CopyError, DeviceError, SnapshotError
from nbdbackup.extents import Allocation, Extent
from nbdbackup.fleece import snapshots as fleece_snapshots
from nbdbackup.fleece.block_copy import BlockCopy
from nbdbackup.fleece.copy_before_write import CopyBeforeWrite, OnCbwError
from nbdbackup.fleece.scratch import Scratch
from nbdbackup.fleece.snapshots import SnapshotPlan
from tests.model.expected import CLUSTER, INJECTED, SIZE, ClientWrite, Disk, FineMemory, Point, Violation
from tests.model.stepping import SteppedLoop
from tests.support.gated import GatedDevice, PendingOp

GATED_KINDS = ("read", "write", "write_zeroes", "trim", "block_status")
SNAPSHOTS_MAX = 5
JOBS_MAX = 2
CANCELS_MAX = 20
JOB_TRIES = 3
JOB_CHUNK = 2 * CLUSTER


@dataclass(slots=True, eq=False)
class Job:
    """A job under way: cancelled at most once, and not while it puts things back."""

    task: "asyncio.Task[None]"
    cancelled: bool = False


class World:
    """The state, the steps and the checks; raises Violation."""

    def __init__(self) -> None:
        self.loop = SteppedLoop()
        self.loop.set_exception_handler(self._note_loop_error)
        self.gates: list[GatedDevice] = []
        self.disks = [Disk(name, self._make_gate) for name in ("a", "b")]
        self.points: list[Point] = []
        self.jobs: list[Job] = []
        self.finishing: set[asyncio.Task[None] | None] = set()
        self.tasks: list[asyncio.Task[None]] = []
        self.errors: list[BaseException] = []
        self.copies: list[BlockCopy] = []
        self.filters: list[CopyBeforeWrite] = []
        self._values = 0
        self._names = 0

    # Plumbing.

    def _make_gate(self, device: BlockDevice) -> GatedDevice:
        gate = GatedDevice(device, GATED_KINDS)
        self.gates.append(gate)
        return gate

    def _note_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        del loop
        error = context.get("exception")
        self.errors.append(error if isinstance(error, BaseException) else Violation(str(context["message"])))

    def _start(self, coroutine: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        async def guarded() -> None:
            try:
                await coroutine
            except Exception as error:
                self.errors.append(error)

        task = self.loop.create_task(guarded())
        self.tasks.append(task)
        self.step()
        return task

    def step(self) -> None:
        """Let everybody go as far as they can, and compare."""
        self.loop.settle()
        self.tasks = [task for task in self.tasks if not task.done()]
        self.jobs = [job for job in self.jobs if not job.task.done()]
        self.check()

    def check(self) -> None:
        """Compare the engine with the model."""
        if self.errors:
            error = self.errors[0]
            raise error if isinstance(error, Violation) else Violation(repr(error)) from error
        for disk in self.disks:
            disk.check()
        for point in self.points:
            if not point.gone:
                point.check()

    def pending(self) -> Iterator[tuple[GatedDevice, PendingOp]]:
        """The device operations that wait for the test."""
        for gate in self.gates:
            for op in gate.pending:
                yield gate, op

    def live_points(self) -> list[Point]:
        """The snapshots that nobody has begun to drop."""
        return [point for point in self.points if not point.dropping]

    # Steps of the devices, the clock and whoever gives up.

    def perform(self, index: int) -> None:
        """One device operation takes effect, but does not return yet."""
        gate, op = self._pick(index)
        gate.perform(op)
        self.step()

    def release(self, index: int) -> None:
        """One device operation takes effect and returns."""
        gate, op = self._pick(index)
        gate.release(op)
        self.step()

    def fail(self, index: int) -> None:
        """One device operation fails, unless it took effect already."""
        gate, op = self._pick(index)
        if not op.started.is_set():
            gate.fail(op, INJECTED)
        self.step()

    def _pick(self, index: int) -> tuple[GatedDevice, PendingOp]:
        pending = list(self.pending())
        return pending[index % len(pending)]

    def toggle(self, index: int, kind: str) -> None:
        """Operations of `kind` on one device are held from now on, or no longer."""
        gate = self.gates[index % len(self.gates)]
        gate.kinds ^= {kind}

    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.loop.advance(seconds)
        self.step()

    def cancel(self, index: int) -> None:
        """Some task that is not a job is cancelled."""
        jobs = {job.task for job in self.jobs}
        tasks = [task for task in self.tasks if task not in jobs]
        if tasks:
            tasks[index % len(tasks)].cancel()
        self.step()

    def cancel_job(self, index: int) -> None:
        """A job is cancelled."""
        job = self.jobs[index % len(self.jobs)]
        if not job.cancelled and job.task not in self.finishing:
            job.cancelled = True
            job.task.cancel()
        self.step()

    # Steps of clients.

    def write(self, disk_index: int, offset: int, length: int, kind: str, quick: bool) -> None:
        """A client writes, zeroes or trims; if `quick`, first without waiting, as the server does."""
        disk = self.disks[disk_index % len(self.disks)]
        area = Extent(offset, min(length, SIZE - offset))
        self._values = self._values % 255 + 1
        write = ClientWrite(area, self._values if kind == "write" else 0)
        data = bytes([write.value]) * area.length
        disk.begin(write)
        if quick and kind == "write":
            try:
                if disk.node.write_nowait(area.offset, data):
                    disk.finish(write, returned=True)
                    self.step()
                    return
            except OSError as error:
                self._check_write_error(disk, error)
                disk.finish(write, returned=False)
                self.step()
                return
        self._start(self._run_write(disk, write, kind, data))

    async def _run_write(self, disk: Disk, write: ClientWrite, kind: str, data: bytes) -> None:
        returned = False
        try:
            if kind == "write":
                await disk.node.write(write.area.offset, data)
            elif kind == "write_zeroes":
                await disk.node.write_zeroes(write.area.offset, write.area.length)
            else:
                await disk.node.trim(write.area.offset, write.area.length)
            returned = True
        except OSError as error:
            self._check_write_error(disk, error)
        finally:
            disk.finish(write, returned)

    def _check_write_error(self, disk: Disk, error: OSError) -> None:
        if isinstance(error, DeviceError):
            if disk.guest_writes_may_break and error.errno in (INJECTED, errno.ENOSPC, errno.ETIMEDOUT):
                return
        elif error.errno == INJECTED:
            return
        raise Violation(f"a client's write failed for no reason: {error}") from error

    # Steps of those who take, read, discard and drop snapshots.

    def take(
        self, disk_indexes: Sequence[int], policy: OnCbwError, timeout_s: float, scratch_clusters: int | None
    ) -> None:
        """Snapshots of one node or of several at one instant."""
        disks = [self.disks[index] for index in disk_indexes]
        parts = [self._plan(disk, policy, timeout_s, scratch_clusters) for disk in disks]
        self._start(self._run_take(disks, parts))

    def _plan(
        self, disk: Disk, policy: OnCbwError, timeout_s: float, scratch_clusters: int | None
    ) -> tuple[SnapshotPlan, FineMemory]:
        self._names += 1
        memory = FineMemory(SIZE, f"scratch {self._names}")
        limit = None if scratch_clusters is None else scratch_clusters * CLUSTER
        scratch = Scratch(self._make_gate(memory), CLUSTER, limit, f"scratch {self._names}")
        disk.guest_writes_may_break |= policy is OnCbwError.BREAK_GUEST_WRITE
        return SnapshotPlan(disk.node, f"s{self._names}", scratch, policy, timeout_s), memory

    async def _run_take(self, disks: list[Disk], parts: list[tuple[SnapshotPlan, FineMemory]]) -> None:
        taken = await fleece_snapshots.take_snapshots([plan for plan, _ in parts])
        # No await since the nodes went on: nobody has run.
        for disk, (plan, memory), snapshot in zip(disks, parts, taken, strict=True):
            # Several runs for one request.
            snapshot.block_copy.chunk_bytes_max = 3 * CLUSTER
            self.copies.append(snapshot.block_copy)
            self.filters.append(snapshot.filter)
            self.points.append(Point(disk, snapshot, plan.scratch, memory, bytes(disk.memory.data)))

    def _pick_point(self, index: int) -> Point:
        # Mostly one that can still answer.
        whole = [point for point in self.live_points() if point.snapshot.broken is None]
        points = whole if whole and index % 5 else self.points
        return points[index % len(points)]

    def read(self, index: int, offset: int, length: int, quick: bool) -> None:
        """Somebody reads a view, dropped ones too."""
        point = self._pick_point(index)
        area = Extent(offset, min(length, SIZE - offset))
        buffer = bytearray(area.length)
        if quick:
            try:
                if point.snapshot.view.read_nowait(area.offset, buffer):
                    self._check_read(point, area, buffer)
                    return
            except OSError as error:
                self._check_read_error(point, area, error)
                return
        self._start(self._run_read(point, area, buffer))

    async def _run_read(self, point: Point, area: Extent, buffer: bytearray) -> None:
        try:
            await point.snapshot.view.read(area.offset, buffer)
        except OSError as error:
            self._check_read_error(point, area, error)
        else:
            self._check_read(point, area, buffer)

    def _check_read(self, point: Point, area: Extent, buffer: bytearray) -> None:
        if buffer != point.content[area.offset : area.end]:
            raise Violation(f"{point.snapshot.filter.title} showed newer bytes in {area}")

    def _check_read_error(self, point: Point, area: Extent, error: OSError) -> None:
        if isinstance(error, SnapshotError):
            if point.dropping or point.snapshot.broken is not None or point.is_discarded(area):
                return
        elif error.errno == INJECTED:
            return
        raise Violation(f"a read of {point.snapshot.filter.title} failed for no reason: {error}") from error

    def collide(self, index: int, offset: int, length: int, discarding: bool) -> None:
        """Somebody reads or discards a part of a view, and a client writes to it."""
        point = self._pick_point(index)
        if not discarding:
            self.read(index, offset, length, quick=False)
        self.write(self.disks.index(point.disk), offset, length, "write", quick=False)
        if discarding:
            self.discard(index, offset // CLUSTER * CLUSTER, length + CLUSTER)

    def ask_status(self, index: int, offset: int, length: int) -> None:
        """Somebody asks a view what is zero."""
        point = self._pick_point(index)
        self._start(self._run_status(point, Extent(offset, min(length, SIZE - offset))))

    async def _run_status(self, point: Point, area: Extent) -> None:
        try:
            extents = await point.snapshot.view.block_status(area.offset, area.length)
        except OSError as error:
            self._check_read_error(point, area, error)
            return
        position = area.offset
        for extent in extents:
            content = point.content[position : position + extent.length]
            if extent.flags & Allocation.ZERO and any(content):
                raise Violation(f"{point.snapshot.filter.title} calls data zero at {position}")
            position += extent.length
        if not area.offset < position <= area.end:
            raise Violation(f"block status of {area} covers [{area.offset}, {position})")

    def discard(self, index: int, offset: int, length: int) -> None:
        """Somebody gives up a part of a view."""
        point = self._pick_point(index)
        self._start(self._run_discard(point, Extent(offset, min(length, SIZE - offset))))

    async def _run_discard(self, point: Point, area: Extent) -> None:
        # The view's node may make us wait; what is discarded is known from the engine's own moment on.
        inner = area.aligned_in(CLUSTER, SIZE)
        numbers = set(range(inner.offset // CLUSTER, -(-inner.end // CLUSTER))) if inner.length else set()
        if not point.dropping:
            point.discarded |= numbers
        try:
            await point.snapshot.view.trim(area.offset, area.length)
        except OSError as error:
            self._check_read_error(point, area, error)
        else:
            point.trimmed |= numbers

    def break_point(self, index: int) -> None:
        """A snapshot breaks for a reason from outside."""
        point = self._pick_point(index)
        point.broken_by_hand = True
        point.snapshot.filter.break_snapshot(OSError(errno.EIO, "broken by hand"))
        self.step()

    def drop(self, index: int) -> None:
        """A snapshot is dropped."""
        points = self.live_points()
        self._start(self._run_drop(points[index % len(points)]))

    async def _run_drop(self, point: Point) -> None:
        point.dropping = True
        await point.snapshot.drop()
        point.gone = True

    # Steps of jobs.

    def start_direct_job(self, disk_index: int, policy: OnCbwError, timeout_s: float, zeroed: bool) -> None:
        """A job whose clients' copies go straight to the target."""
        disk = self.disks[disk_index % len(self.disks)]
        disk.guest_writes_may_break |= policy is OnCbwError.BREAK_GUEST_WRITE
        target, memory = self._make_target(zeroed)
        task = self._start(self._run_direct_job(disk, target, memory, policy, timeout_s, zeroed))
        self.jobs.append(Job(task))

    def start_view_job(self, index: int, discarding: bool, zeroed: bool) -> None:
        """A job that reads a view, and gives scratch back as it goes if `discarding`."""
        points = self.live_points()
        point = points[index % len(points)]
        target, memory = self._make_target(zeroed)
        task = self._start(self._run_view_job(point, target, memory, discarding, zeroed))
        self.jobs.append(Job(task))

    def _make_target(self, zeroed: bool) -> tuple[GatedDevice, FineMemory]:
        memory = FineMemory(SIZE, "target")
        if not zeroed:
            memory.data[:] = b"\xee" * SIZE
        return self._make_gate(memory), memory

    async def _run_direct_job(
        self,
        disk: Disk,
        target: GatedDevice,
        memory: FineMemory,
        policy: OnCbwError,
        timeout_s: float,
        zeroed: bool,
    ) -> None:
        async with drained(disk.node):
            below = disk.node.child
            copy = BlockCopy(below, target, CLUSTER, target_zeroed=zeroed, chunk_bytes_max=JOB_CHUNK)
            filter_ = CopyBeforeWrite(below, copy, title="job", on_cbw_error=policy, cbw_timeout_s=timeout_s)
            disk.node.push(filter_)
            content = bytes(disk.memory.data)
        self.copies.append(copy)
        self.filters.append(filter_)
        succeeded = False
        try:
            await self._copy_zeroes(copy)
            await self._copy_all(copy)
            succeeded = filter_.broken is None
        except (CopyError, OSError) as error:
            self._check_job_error(error)
        finally:
            self.finishing.add(asyncio.current_task())
            async with drained(disk.node):
                disk.node.remove(filter_)
            await filter_.wait_copies_ended()
            await copy.close()
        if succeeded and memory.data != content:
            raise Violation("a job succeeded, and its target is not the point in time")

    async def _run_view_job(
        self, point: Point, target: GatedDevice, memory: FineMemory, discarding: bool, zeroed: bool
    ) -> None:
        view = point.snapshot.view
        copy = BlockCopy(view, target, CLUSTER, target_zeroed=zeroed, chunk_bytes_max=JOB_CHUNK)
        self.copies.append(copy)
        try:
            for piece in Extent(0, SIZE).split(JOB_CHUNK):
                await self._copy_piece(copy, piece)
                if discarding:
                    await self._run_discard(point, piece)
        except (CopyError, OSError) as error:
            self._check_job_error(error)
        else:
            if memory.data != point.content:
                raise Violation("a job succeeded, and its target is not the point in time")
        finally:
            self.finishing.add(asyncio.current_task())
            await copy.close()

    async def _copy_zeroes(self, copy: BlockCopy) -> None:
        position = 0
        while position < SIZE:
            for extent in await copy.source.block_status(position, SIZE - position):
                if extent.flags & Allocation.ZERO:
                    await copy.copy_zeroes(Extent(position, extent.length))
                position += extent.length

    async def _copy_all(self, copy: BlockCopy) -> None:
        # Two workers that meet in the middle and again over everything.
        half = JOB_CHUNK * 2
        async with asyncio.TaskGroup() as group:
            first = group.create_task(self._copy_pieces(copy, Extent(0, half)))
            second = group.create_task(self._copy_pieces(copy, Extent(CLUSTER, SIZE - CLUSTER)))
        for error in (first.result(), second.result()):
            if error is not None:
                raise error
        await self._copy_piece(copy, Extent(0, SIZE))

    async def _copy_pieces(self, copy: BlockCopy, area: Extent) -> CopyError | None:
        try:
            for piece in area.split(JOB_CHUNK):
                await self._copy_piece(copy, piece)
        except CopyError as error:
            return error
        return None

    async def _copy_piece(self, copy: BlockCopy, piece: Extent) -> None:
        for _ in range(JOB_TRIES - 1):
            try:
                return await copy.copy(piece)
            except CopyError:
                continue
        return await copy.copy(piece)

    def _check_job_error(self, error: CopyError | OSError) -> None:
        cause = error.cause if isinstance(error, CopyError) else error
        if not isinstance(cause, SnapshotError) and cause.errno != INJECTED:
            raise Violation(f"a job failed for no reason: {error}") from error

    # The end.

    def finish(self) -> None:
        """Let everything end, and see that nothing is left: no task, no request, no buffer, no filter."""
        try:
            self._finish()
        finally:
            self._close()

    def _finish(self) -> None:
        self._end_everything()
        for point in self.live_points():
            self._start(self._run_read(point, Extent(0, SIZE), bytearray(SIZE)))
        for point in self.points:
            if not point.gone:
                self._start(self._run_drop(point))
        self._end_everything()
        if self.tasks:
            raise Violation(f"{len(self.tasks)} tasks never end: {self.tasks}")
        for copy in self.copies:
            if copy.in_flight or copy._memory.bytes_used:
                raise Violation("a copy left something behind")
        for filter_ in self.filters:
            if filter_.frozen_reads or filter_._late_copies:
                raise Violation("a filter left something behind")
        for disk in self.disks:
            if disk.node._in_flight or disk.node._quiesced or disk.node.child is not disk.node.root:
                raise Violation(f"{disk.node} is not as it was")

    def _end_everything(self) -> None:
        for gate in self.gates:
            gate.open_gate()
        self.step()
        self.advance(1e6)

    def _close(self) -> None:
        for gate in self.gates:
            gate.open_gate()
        self.errors.clear()
        self.loop.set_exception_handler(lambda loop, context: None)
        for _ in range(CANCELS_MAX):
            # What has to come to its end takes more than one.
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.loop.settle()
        self.loop.close()
