"""The server: accepting, negotiating, ending; one client's trouble is nobody else's."""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdbackup.block.device import BlockDevice, WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.nbd.client import ClientNegotiation
from nbdbackup.nbd.constants import Command
from nbdbackup.server import handshake
from nbdbackup.server import server as server_module
from nbdbackup.server.exports import ExportTable
from nbdbackup.server.listener import Listener, listen_tcp, listen_unix
from nbdbackup.server.server import Server
from tests.support.fleecing import make_gate, open_all_gates
from tests.support.gated import settle
from tests.support.sessions import Client, export_of, open_descriptors, wait_until

WAIT_S = 10.0
SIZE = 1 << 20


@pytest.fixture(autouse=True)
async def _gates_are_opened() -> AsyncIterator[None]:
    yield
    await open_all_gates()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "nbd.sock")


class Running:
    """A server and the task that runs it."""

    def __init__(self, server: Server, task: "asyncio.Task[None]") -> None:
        self.server = server
        self.task = task

    async def stop(self) -> None:
        """Stop, and wait for the end."""
        self.server.stop()
        async with asyncio.timeout(WAIT_S):
            await self.task


@asynccontextmanager
async def running(
    listeners: Sequence[Listener], *devices: BlockDevice, clients_max: int = 0
) -> AsyncIterator[Running]:
    """Serve `devices` as exports "0", "1" and so on."""
    exports = ExportTable()
    for index, device in enumerate(devices or (MemoryDevice(SIZE),)):
        exports.add(export_of(device, str(index)))
    server = Server(exports, listeners, clients_max)
    served = Running(server, asyncio.get_running_loop().create_task(server.run()))
    await settle()
    try:
        yield served
    finally:
        await served.stop()


async def open_connection(listener: Listener) -> socket.socket:
    """A connected socket; nothing was said yet."""
    sock = socket.socket(listener.sock.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    async with asyncio.timeout(WAIT_S):
        await asyncio.get_running_loop().sock_connect(sock, listener.sock.getsockname())
    return sock


async def connect(listener: Listener, export: str = "0") -> Client:
    """A client that has chosen `export`."""
    loop, sock = asyncio.get_running_loop(), await open_connection(listener)
    negotiation = ClientNegotiation(export)
    async with asyncio.timeout(WAIT_S):
        while negotiation.result is None:
            data = await loop.sock_recv(sock, 65536)
            assert data, "the server closed the connection"
            await loop.sock_sendall(sock, negotiation.receive(data))
    return Client(sock, structured=negotiation.result.structured_replies)


async def wait_closed(sock: socket.socket) -> None:
    """Return when the server has closed the connection."""
    async with asyncio.timeout(WAIT_S):
        try:
            while await asyncio.get_running_loop().sock_recv(sock, 65536):
                pass
        except ConnectionError:
            pass
    sock.close()


def exists(path: str) -> bool:
    return os.path.lexists(path)


async def test_every_listener_serves_every_export(path: str) -> None:
    listeners = [listen_unix(path), listen_tcp("127.0.0.1", 0)]
    memories = [MemoryDevice(SIZE), MemoryDevice(SIZE)]
    memories[1].data[:3] = b"one"
    async with running(listeners, *memories) as served:
        for listener in listeners:
            client = await connect(listener, "1")
            assert bytes((await client.call(Command.READ, 0, 3)).data) == b"one"
            client.sock.close()
        assert served.server.uris("1") == [listener.uri("1") for listener in listeners]
    assert not exists(path)


async def test_5_tcp_clients_are_not_delayed_and_dead_ones_are_noticed() -> None:
    listener = listen_tcp("127.0.0.1", 0)
    async with running([listener]) as served:
        client = await connect(listener)
        await wait_until(lambda: bool(served.server.sessions))
        (session,) = served.server.sessions
        assert isinstance(session._sock, socket.socket)
        assert session._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert session._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        client.sock.close()


async def test_clients_over_the_limit_wait_until_one_leaves(path: str) -> None:
    listener = listen_unix(path)
    async with running([listener], clients_max=1) as served:
        first = await connect(listener)
        second = asyncio.ensure_future(connect(listener))
        await settle()
        assert not second.done()
        assert served.server.client_count == 1
        first.sock.close()
        async with asyncio.timeout(WAIT_S):
            client = await second
        assert (await client.call(Command.READ, 0, 512)).error == 0
        client.sock.close()


async def test_many_clients_come_and_go_and_nothing_stays(path: str) -> None:
    listener = listen_unix(path)
    async with running([listener]) as served:
        descriptors, tasks = open_descriptors(), len(asyncio.all_tasks())
        for _ in range(5):
            clients = [await connect(listener) for _ in range(10)]
            for client in clients:
                assert (await client.call(Command.READ, 0, 512)).error == 0
            for client in clients:
                client.sock.close()
            await wait_until(lambda: served.server.client_count == 0)
        assert served.server.last_client_left.is_set()
        assert not served.server.exports.get("0").clients
        assert open_descriptors() == descriptors
        assert len(asyncio.all_tasks()) == tasks


async def test_a_probe_leaves_no_log_line(path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nbdbackup.server")
    listener = listen_unix(path)
    async with running([listener]) as served:
        (await open_connection(listener)).close()
        await wait_until(served.server.last_client_left.is_set)
    assert caplog.messages == []


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n" * 10])
async def test_garbage_closes_its_connection_with_one_log_line(
    garbage: bytes, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    listener = listen_unix(path)
    async with running([listener]) as served:
        sock = await open_connection(listener)
        await asyncio.get_running_loop().sock_sendall(sock, garbage)
        await wait_closed(sock)
        await wait_until(lambda: served.server.client_count == 0)
        client = await connect(listener)
        assert (await client.call(Command.READ, 0, 512)).error == 0
        client.sock.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_9_a_client_that_says_nothing_is_closed(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.01)
    listener = listen_unix(path)
    async with running([listener]):
        await wait_closed(await open_connection(listener))
    assert "no export chosen" in caplog.text


class Bug(FilterDevice):
    """Has a bug in its reads."""

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        return False

    async def read(self, offset: int, buffer: WritableBuffer) -> None:
        raise RuntimeError("a bug")


async def test_a_bug_ends_one_client_with_a_traceback_and_no_other(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    listener = listen_unix(path)
    async with running([listener], Bug(MemoryDevice(SIZE)), MemoryDevice(SIZE)) as served:
        unlucky, other = await connect(listener, "0"), await connect(listener, "1")
        await unlucky.ask(Command.READ, 0, 512)
        await wait_closed(unlucky.sock)
        assert (await other.call(Command.READ, 0, 512)).error == 0
        other.sock.close()
        assert not served.task.done()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "internal error" in record.message
    assert record.exc_info is not None


async def test_stopping_finishes_what_is_in_flight_and_drops_who_negotiates(path: str) -> None:
    gate = make_gate(MemoryDevice(SIZE))
    gate.kinds.add("write")
    listener = listen_unix(path)
    async with running([listener], gate) as served:
        writer, undecided = await connect(listener), await open_connection(listener)
        cookie = await writer.ask(Command.WRITE, 0, data=b"x" * 512)
        write = await gate.wait_pending("write")
        served.server.stop()
        await wait_closed(undecided)
        assert not served.task.done()
        assert not exists(path), "nobody new is accepted"
        gate.release(write)
        assert (await writer.reply(cookie)).error == 0
        await wait_closed(writer.sock)
        async with asyncio.timeout(WAIT_S):
            await served.task


async def test_a_removed_export_disconnects_its_client(path: str) -> None:
    listener = listen_unix(path)
    async with running([listener], MemoryDevice(SIZE), MemoryDevice(SIZE)) as served:
        gone, staying = await connect(listener, "0"), await connect(listener, "1")
        await wait_until(lambda: len(served.server.sessions) == 2)
        served.server.exports.remove("0", "it was dropped")
        await wait_closed(gone.sock)
        assert (await staying.call(Command.READ, 0, 512)).error == 0
        staying.sock.close()


async def test_a_failure_to_accept_is_logged_and_survived(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "ACCEPT_PAUSE_S", 0)
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, [OSError(errno.EMFILE, os.strerror(errno.EMFILE))] * 2

    async def failing_accept(sock: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return await accept(sock)

    monkeypatch.setattr(loop, "sock_accept", failing_accept)
    listener = listen_unix(path)
    async with running([listener], clients_max=1):
        client = await connect(listener)
        assert (await client.call(Command.READ, 0, 512)).error == 0
        client.sock.close()
    assert caplog.text.count("Too many open files") == 2
