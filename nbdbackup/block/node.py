"""Node: a named slot in the block graph, a device with filters on top.

Clients of a node (the server above all) hold the node and see every filter that is
pushed onto it later. Changing the filters, or taking a point in time, happens inside
`drained(...)`: there, no operation that came through the node is in flight, and new
ones wait outside.

Law for whoever edits this: every way down from a node to its devices is counted in
`_in_flight`, or finishes without an `await` (the `_nowait` twins).
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from nbdbackup.block.device import BlockDevice, ReadableBuffer, WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.extents import ContextExtent, StatusExtent


class Node(FilterDevice):
    """`name` for people and QMP; `child` is the top of the stack of filters."""

    def __init__(self, name: str, device: BlockDevice, read_only: bool = False) -> None:
        super().__init__(device)
        self.name = name
        self.read_only = read_only or device.read_only
        self.root = device
        # Changing while running.
        self._in_flight = 0
        self._quiesced = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = asyncio.Event()
        self._running.set()

    def __str__(self) -> str:
        return self.name

    @property
    def filters(self) -> Iterator[FilterDevice]:
        """The filters on this node, the top one first."""
        device = self.child
        while device is not self.root:
            assert isinstance(device, FilterDevice)
            yield device
            device = device.child

    @property
    def is_drained(self) -> bool:
        """Whether nothing is in flight and nothing can start."""
        return bool(self._quiesced) and not self._in_flight

    @property
    def bottom(self) -> BlockDevice:
        """What is below all filters, and below the nodes that this one stands on."""
        device = self.root
        while isinstance(device, Node):
            device = device.root
        return device

    def push(self, new_filter: FilterDevice) -> None:
        """Put `new_filter`, whose child is this node's top, on top. Only while drained."""
        assert self.is_drained
        assert new_filter.child is self.child
        self.relink(new_filter)

    def remove(self, old_filter: FilterDevice) -> None:
        """Take `old_filter` out, wherever in the stack it is. Only while drained."""
        assert self.is_drained
        above: FilterDevice = self
        while above.child is not old_filter:
            assert above.child is not self.root, "the filter is not on this node"
            assert isinstance(above.child, FilterDevice)
            above = above.child
        above.relink(old_filter.child)

    # Operations: each is counted, and none starts while the node is quiesced.

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        await self._wait_running()
        with self._counted():
            await self.child.read(offset, buffer)

    async def read_sparse(self, offset: int, buffer: WritableBuffer) -> list[StatusExtent]:
        await self._wait_running()
        with self._counted():
            return await self.child.read_sparse(offset, buffer)

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        await self._wait_running()
        with self._counted():
            await self.child.write(offset, data, fua)

    async def write_zeroes(
        self, offset: int, length: int, may_unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        await self._wait_running()
        with self._counted():
            await self.child.write_zeroes(offset, length, may_unmap, fast, fua)

    async def trim(self, offset: int, length: int, fua: bool = False) -> None:
        await self._wait_running()
        with self._counted():
            await self.child.trim(offset, length, fua)

    async def flush(self) -> None:
        await self._wait_running()
        with self._counted():
            await self.child.flush()

    async def cache(self, offset: int, length: int) -> None:
        await self._wait_running()
        with self._counted():
            await self.child.cache(offset, length)

    async def block_status(self, offset: int, length: int) -> list[StatusExtent]:
        await self._wait_running()
        with self._counted():
            return await self.child.block_status(offset, length)

    async def allocation_depth(self, offset: int, length: int) -> list[ContextExtent]:
        await self._wait_running()
        with self._counted():
            return await self.child.allocation_depth(offset, length)

    async def is_allocated(self, offset: int, length: int) -> list[ContextExtent]:
        await self._wait_running()
        with self._counted():
            return await self.child.is_allocated(offset, length)

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        return not self._quiesced and self.child.read_nowait(offset, buffer)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return not self._quiesced and self.child.write_nowait(offset, data)

    def offload_fd(self) -> int | None:
        """None: what goes round the node is not counted, and seen by no filter."""
        return None

    # Draining.

    async def _wait_running(self) -> None:
        while self._quiesced:
            await self._running.wait()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        # No await between _wait_running's last look at _quiesced and this: `await` of a
        # coroutine that does not suspend runs straight on.
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _quiesce(self) -> None:
        self._quiesced += 1
        self._running.clear()

    def _resume(self) -> None:
        self._quiesced -= 1
        if not self._quiesced:
            self._running.set()


@asynccontextmanager
async def drained(*nodes: Node) -> AsyncIterator[None]:
    """Hold all `nodes` still at one instant: nothing in flight on any, nothing starts.

    All are quiesced before any is waited for: a client that writes to one node after
    its write to another was answered cannot slip in between. Nests, and may be held by
    several tasks at once.
    """
    for node in nodes:
        node._quiesce()
    try:
        for node in nodes:
            await node._idle.wait()
        yield
    finally:
        for node in nodes:
            node._resume()
