"""Nodes: pushing and removing filters, and holding still."""

import asyncio
import errno

import pytest

from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node, drained
from tests.support.gated import GatedDevice, settle

LIMIT_S = 5.0


def make_node(name: str = "disk") -> tuple[Node, GatedDevice]:
    gated = GatedDevice(MemoryDevice(65536))
    return Node(name, gated), gated


async def operate(node: Node, kind: str) -> None:
    """One async operation by the name of its method."""
    match kind:
        case "read":
            await node.read(0, bytearray(512))
        case "write":
            await node.write(0, bytes(512))
        case "write_zeroes":
            await node.write_zeroes(0, 512)
        case "trim":
            await node.trim(0, 512)
        case "flush":
            await node.flush()
        case "cache":
            await node.cache(0, 512)
        case "block_status":
            await node.block_status(0, 512)


ALL_KINDS = ["read", "write", "write_zeroes", "trim", "flush", "cache", "block_status"]


@pytest.mark.parametrize("kind", ALL_KINDS)
async def test_drained_waits_for_what_is_in_flight(kind: str) -> None:
    node, gated = make_node()
    entered = asyncio.Event()

    async def drain() -> None:
        async with drained(node):
            assert node.is_drained
            entered.set()

    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(operate(node, kind))
        op = await gated.wait_pending(kind)
        tasks.create_task(drain())
        await settle()
        assert not entered.is_set()
        gated.release(op)
        await entered.wait()


@pytest.mark.parametrize("kind", ALL_KINDS)
async def test_operations_wait_outside_while_drained(kind: str) -> None:
    node, gated = make_node()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        async with drained(node):
            tasks.create_task(operate(node, kind))
            await settle()
            assert not gated.pending
        gated.release(await gated.wait_pending(kind))


async def test_nowait_twins_decline_while_drained() -> None:
    node = Node("disk", MemoryDevice(4096))
    assert node.write_nowait(0, b"x")
    async with drained(node):
        assert not node.write_nowait(0, b"y")
        assert not node.read_nowait(0, bytearray(1))
    buffer = bytearray(1)
    assert node.read_nowait(0, buffer)
    assert buffer == b"x"


async def test_several_nodes_are_still_at_one_instant() -> None:
    """A writer to `b` after its write to `a` was answered cannot slip in between."""
    (a, gated_a), (b, gated_b) = make_node("a"), make_node("b")
    entered, leave = asyncio.Event(), asyncio.Event()

    async def write_both() -> None:
        await a.write(0, b"1")
        await b.write(0, b"1")

    async def drain() -> None:
        async with drained(a, b):
            entered.set()
            await leave.wait()

    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(write_both())
        op = await gated_a.wait_pending("write")
        tasks.create_task(drain())
        await settle()
        gated_a.release(op)
        await entered.wait()
        await settle()
        assert not gated_b.pending
        assert a.is_drained
        assert b.is_drained
        leave.set()
        gated_b.release(await gated_b.wait_pending("write"))


async def test_drains_nest() -> None:
    node = Node("disk", MemoryDevice(4096))
    async with drained(node):
        async with drained(node):
            pass
        assert not node.write_nowait(0, b"x")
    assert node.write_nowait(0, b"x")


async def test_cancelled_drain_lets_the_node_run_again() -> None:
    node, gated = make_node()

    async def drain() -> None:
        async with drained(node):
            pytest.fail("nothing was released")

    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(node.write(0, b"x"))
        op = await gated.wait_pending("write")
        drain_task = asyncio.create_task(drain())
        await settle()
        drain_task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drain_task
        gated.release(op)
        gated.open_gate()
        await node.write(0, b"y")


async def test_failed_and_cancelled_operations_are_no_longer_in_flight() -> None:
    node, gated = make_node()
    failing = asyncio.create_task(node.write(0, b"x"))
    gated.fail(await gated.wait_pending("write"), errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        await failing
    cancelled = asyncio.create_task(node.write(0, b"x"))
    op = await gated.wait_pending("write")
    cancelled.cancel()
    gated.release(op)
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    async with asyncio.timeout(LIMIT_S), drained(node):
        assert node.is_drained


async def test_filter_can_be_removed_from_the_middle_of_the_stack() -> None:
    node = Node("disk", MemoryDevice(4096))
    filters = []
    async with drained(node):
        for _ in range(3):
            filters.append(FilterDevice(node.child))
            node.push(filters[-1])
    bottom, middle, top = filters
    assert list(node.filters) == [top, middle, bottom]
    async with drained(node):
        node.remove(middle)
    assert list(node.filters) == [top, bottom]
    await node.write(0, b"x")
    async with drained(node):
        node.remove(top)
        node.remove(bottom)
    assert node.child is node.root
    assert list(node.filters) == []


async def test_changing_the_stack_needs_a_drain() -> None:
    node = Node("disk", MemoryDevice(4096))
    with pytest.raises(AssertionError):
        node.push(FilterDevice(node.child))


async def test_read_only_is_the_nodes_or_the_devices() -> None:
    memory = MemoryDevice(512)
    assert not Node("a", memory).read_only
    assert Node("a", memory, read_only=True).read_only
    memory.read_only = True
    assert Node("a", memory).read_only
