"""How sessions end: the client says so, goes away, misbehaves, or the server has to go."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from nbdbackup.block.device import ReadableBuffer, WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.client import encode_request
from nbdbackup.nbd.constants import Command, Errno
from nbdbackup.server import session as session_module
from nbdbackup.server.session import REQUESTS_MAX
from tests.support.fleecing import make_gate, open_all_gates
from tests.support.gated import settle
from tests.support.sessions import Served, export_of, open_descriptors, serving, wait_until

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB


@pytest.fixture(autouse=True)
async def _gates_are_opened() -> AsyncIterator[None]:
    yield
    await open_all_gates()


async def test_86_disc_answers_everything_in_flight_before_the_end() -> None:
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.update({"read", "flush"})
    async with serving(export_of(gate)) as served:
        client = served.client
        stream = b"".join(client.compose(Command.READ, 512 * index, 512) for index in range(20))
        await client.send(stream + client.compose(Command.FLUSH) + client.compose(Command.DISC))
        await wait_until(lambda: len(gate.pending) == 21)
        await settle()
        assert not served.task.done()
        gate.open_gate()
        await served.wait_ended()
        served.session._sock.close()
        replies = await client.read_to_end()
    assert set(replies) == set(range(1, 22))
    assert not any(reply.error for reply in replies.values())


class Patient(FilterDevice):
    """Its writes wait for `go`, and can be cancelled until then."""

    def __init__(self, memory: MemoryDevice) -> None:
        super().__init__(memory)
        self.go = asyncio.Event()

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return False

    async def write(self, offset: int, data: ReadableBuffer, fua: bool = False) -> None:
        await self.go.wait()
        await super().write(offset, data, fua)


async def test_86_disc_finishes_what_is_in_flight_even_if_nobody_waits_for_the_answers() -> None:
    memory = MemoryDevice(SIZE)
    device = Patient(memory)
    async with serving(export_of(device)) as served:
        client = served.client
        requests = [client.compose(Command.WRITE, 0, data=b"x" * 512), client.compose(Command.READ, 0, 512)]
        await client.send(b"".join(requests) + client.compose(Command.DISC))
        client.sock.close()
        await settle()
        device.go.set()
        with suppress(BrokenPipeError):
            await served.wait_ended()
    assert memory.data[0] == ord("x")


async def test_a_client_that_vanishes_without_disc_is_not_waited_for() -> None:
    memory = MemoryDevice(SIZE)
    async with serving(export_of(Patient(memory))) as served:
        client = served.client
        requests = [client.compose(Command.WRITE, 0, data=b"x" * 512), client.compose(Command.READ, 0, 512)]
        await client.send(b"".join(requests))
        client.sock.close()
        with pytest.raises(BrokenPipeError):
            await served.wait_ended()


async def test_nothing_behind_disc_is_served() -> None:
    memory = MemoryDevice(SIZE)
    async with serving(export_of(memory)) as served:
        client = served.client
        await client.send(client.compose(Command.DISC) + client.compose(Command.WRITE, 0, data=b"x" * 512))
        await served.wait_ended()
    assert memory.data[0] == 0


async def test_a_client_that_closes_its_half_gets_all_its_answers() -> None:
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.add("read")
    count = REQUESTS_MAX + 20
    async with serving(export_of(gate)) as served:
        client = served.client
        await client.send(b"".join(client.compose(Command.READ, 0, 512) for _ in range(count)))
        client.sock.shutdown(socket.SHUT_WR)
        await wait_until(lambda: len(gate.pending) == REQUESTS_MAX)
        gate.open_gate()
        assert len(await client.replies(count)) == count
        await served.wait_ended()


@pytest.mark.parametrize("sent", [0, 1, 27, 28, 1000, 28 + 200 * KIB])
async def test_a_client_that_leaves_in_the_middle_of_a_write_ends_its_session(sent: int) -> None:
    async with serving(export_of(MemoryDevice(SIZE))) as served:
        await served.client.send(served.client.compose(Command.WRITE, 0, data=bytes(MIB))[:sent])
        await settle()
        served.client.sock.close()
        await served.wait_ended()


async def test_a_vanished_client_with_many_reads_in_flight_leaves_nothing_behind() -> None:
    gate = make_gate(MemoryDevice(SIZE))
    export = export_of(gate)
    descriptors, tasks = open_descriptors(), len(asyncio.all_tasks())
    gate.kinds.add("read")
    async with serving(export) as served:
        await served.client.send(
            b"".join(served.client.compose(Command.READ, 0, 64 * KIB) for _ in range(100))
        )
        await wait_until(lambda: len(gate.pending) == 100)
        served.client.sock.close()
        await settle()
        assert not served.task.done(), "the device still fills the buffers"
        gate.open_gate()
        with suppress(BrokenPipeError, ConnectionResetError):
            await served.wait_ended()
        assert not served.session._in_flight
        assert served.session._bytes_in_flight == 0
    assert not export.clients
    assert len(asyncio.all_tasks()) == tasks
    assert open_descriptors() == descriptors


async def test_58_garbage_ends_the_session_and_no_other() -> None:
    export = export_of(MemoryDevice(SIZE))
    async with serving(export) as bad, serving(export) as good:
        await bad.client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with pytest.raises(ProtocolError, match="magic"):
            await bad.wait_ended()
        assert (await good.client.call(Command.READ, 0, 512)).error == 0


async def test_what_came_before_garbage_is_carried_out() -> None:
    memory = MemoryDevice(SIZE)
    async with serving(export_of(memory)) as served:
        await served.client.send(served.client.compose(Command.WRITE, 0, data=b"x" * 512) + bytes(28))
        with pytest.raises(ProtocolError):
            await served.wait_ended()
    assert memory.data[0] == ord("x")


class Bug(FilterDevice):
    """A device with a bug, in place or in a task, at offset 0."""

    def __init__(self, in_place: bool) -> None:
        super().__init__(MemoryDevice(SIZE))
        self.in_place = in_place

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        if offset:
            return super().read_nowait(offset, buffer)
        if self.in_place:
            raise RuntimeError("a bug")
        return False

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        raise RuntimeError("a bug")


@pytest.mark.parametrize("in_place", [True, False])
async def test_a_bug_ends_its_session_loudly_and_no_other(in_place: bool) -> None:
    export = export_of(Bug(in_place))
    async with serving(export) as unlucky, serving(export) as other:
        await unlucky.client.ask(Command.READ, 0, 512)
        with pytest.raises((RuntimeError, ExceptionGroup)) as caught:
            await unlucky.wait_ended()
        assert isinstance(caught.value, RuntimeError) or caught.group_contains(RuntimeError)
        assert (await other.client.call(Command.READ, 512, 512)).error == 0
    assert not export.clients


# The server has to go.


async def _fill(served: Served, count: int) -> None:
    await served.client.send(b"".join(served.client.compose(Command.READ, 0, 512) for _ in range(count)))


async def test_87_shutdown_finishes_what_is_in_flight_and_refuses_the_rest() -> None:
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.add("read")
    async with serving(export_of(gate)) as served:
        await _fill(served, REQUESTS_MAX + 10)
        await wait_until(lambda: len(gate.pending) == REQUESTS_MAX)
        served.session.shut_down()
        await settle()
        assert not served.task.done()
        gate.open_gate()
        await served.wait_ended()
        served.session._sock.close()
        replies = await served.client.read_to_end()
    errors = [replies[cookie].error for cookie in sorted(replies)]
    assert errors == [0] * REQUESTS_MAX + [Errno.ESHUTDOWN] * 10


async def test_shutdown_ends_an_idle_session_at_once() -> None:
    async with serving(export_of(MemoryDevice(SIZE))) as served:
        assert (await served.client.call(Command.READ, 0, 512)).error == 0
        served.session.shut_down()
        await served.wait_ended()


async def test_shutdown_does_not_wait_for_the_rest_of_a_write() -> None:
    async with serving(export_of(MemoryDevice(SIZE))) as served:
        await served.client.send(served.client.compose(Command.WRITE, 0, data=bytes(MIB))[: 300 * KIB])
        await settle()
        served.session.shut_down()
        await served.wait_ended()


async def test_shutdown_gives_up_on_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SHUTDOWN_TIMEOUT_S", 0.01)
    memory = MemoryDevice(SIZE)
    memory.data[:] = b"x" * SIZE
    async with serving(export_of(memory), socket_bytes=64 * KIB) as served:
        for _ in range(8):
            await served.client.ask(Command.READ, 0, MIB)
        await settle()
        served.session.shut_down()
        with pytest.raises(ConnectionAbortedError, match="does not read"):
            await served.wait_ended()


async def test_shutdown_does_not_give_up_on_a_slow_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SHUTDOWN_TIMEOUT_S", 0.001)
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.add("flush")
    async with serving(export_of(gate)) as served:
        cookie = await served.client.ask(Command.FLUSH)
        await gate.wait_pending("flush")
        looked_again = served.session._patience
        served.session.shut_down()
        await wait_until(lambda: served.session._patience not in (None, looked_again))
        first = served.session._patience
        await wait_until(lambda: served.session._patience is not first)
        gate.open_gate()
        assert (await served.client.reply(cookie)).error == 0
        await served.wait_ended()


async def test_disconnect_ends_the_session_once_the_device_is_done() -> None:
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.add("write")
    export = export_of(gate)
    async with serving(export) as served:
        await served.client.ask(Command.WRITE, 0, data=b"x" * 512)
        write = await gate.wait_pending("write")
        for client in export.clients:
            client.disconnect("the export was removed")
        await settle()
        assert not served.task.done()
        gate.release(write)
        with pytest.raises(ConnectionAbortedError, match="the export was removed"):
            await served.wait_ended()
    assert not export.clients


async def test_nothing_is_received_any_more_once_a_session_is_over() -> None:
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.add("read")
    async with serving(export_of(gate)) as served:
        await served.client.ask(Command.READ, 0, 512)
        read = await gate.wait_pending("read")
        served.session.disconnect("enough")
        await served.client.send(encode_request(Command.READ, 99, 0, 512) * 100)
        await settle()
        assert len(served.session._received) == 0
        gate.release(read)
        with pytest.raises(ConnectionAbortedError):
            await served.wait_ended()


async def test_a_connection_that_is_reset_ends_the_session() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        client = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours:
        ours.setblocking(False)
        async with serving(export_of(MemoryDevice(SIZE))) as served:
            # The same session, over TCP: only TCP has resets.
            session = session_module.Session(ours, served.session._export, served.negotiated)
            running = asyncio.ensure_future(session.run(b""))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            with pytest.raises(ConnectionResetError):
                async with asyncio.timeout(10):
                    await running
