"""Servers that lie, stall or fail, and what a remote device makes of them."""

import asyncio
import errno
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.nbd import NbdDevice
from nbdbackup.block.nbd_connection import Limits
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.errors import DeviceError, NbdBackupError, ProtocolError
from nbdbackup.nbd.constants import TransmissionFlags
from tests.support.foreign_servers import ForeignServer, nbdkit
from tests.support.gated import settle
from tests.support.own_server import serving
from tests.support.sessions import wait_until

LIMIT_S = 60.0
MIB = 1 << 20
QUICK = RemoteOptions(reconnect_delay_s=0, limits=Limits(connect_timeout_s=0.3, reply_timeout_s=0.3))

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def talking(directory: Path, talk: Talk) -> AsyncIterator[str]:
    """A server that does what `talk` does with each client; its URI."""
    path = directory / "s"
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        server.close()
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0))])


async def shake_hands(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int = MIB, flags: int = 0x0D
) -> None:
    """An old server: EXPORT_NAME, simple replies."""
    writer.write(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 0))
    await reader.readexactly(4 + 16)
    writer.write(struct.pack(">QH", size, flags) + bytes(124))


async def hold(reader: asyncio.StreamReader) -> None:
    """Say nothing until the client has left."""
    while await reader.read(65536):
        pass


async def say_garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await hold(reader)


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await hold(reader)


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def be_empty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await shake_hands(reader, writer, size=0)
    await hold(reader)


@pytest.mark.parametrize(
    ("talk", "complaint"),
    [
        (say_garbage, "greeting"),
        (say_nothing, r"no answer within 0\.3 s"),
        (hang_up, "closed the connection|reset by peer"),
        (be_empty, "is empty"),
    ],
)
async def test_what_is_no_usable_server_is_refused_with_its_uri(
    tmp_path: Path, talk: Talk, complaint: str
) -> None:
    async with asyncio.timeout(LIMIT_S), talking(tmp_path, talk) as uri:
        with pytest.raises(NbdBackupError, match=complaint) as caught:
            await NbdDevice.open(uri, options=QUICK)
        assert f"{tmp_path}/s" in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage that is no reply",
        struct.pack(">IIQ", 0x67446698, 0, 0xDEAD),
        struct.pack(">IHHQI", 0x668E33EF, 1, 1, 1, 1 << 31),
    ],
)
async def test_a_lying_reply_ends_the_connection_and_fails_the_request(tmp_path: Path, answer: bytes) -> None:
    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer)
        await reader.readexactly(28)
        writer.write(answer)
        await hold(reader)

    async with asyncio.timeout(LIMIT_S), talking(tmp_path, lie) as uri:
        device = await NbdDevice.open(uri, options=QUICK)
        with pytest.raises(DeviceError, match="connection to the server was lost: the server ") as caught:
            await device.read(0, bytearray(512))
        assert caught.value.errno == errno.EIO
        await device.close()


async def test_a_request_that_kills_the_server_each_time_fails_in_the_end(tmp_path: Path) -> None:
    clients = 0

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal clients
        clients += 1
        await shake_hands(reader, writer)
        await reader.readexactly(28)

    async with asyncio.timeout(LIMIT_S), talking(tmp_path, die) as uri:
        device = await NbdDevice.open(uri)
        with pytest.raises(DeviceError, match="READ failed 4 times: "):
            await device.read(0, bytearray(512))
        await device.close()
    assert 4 <= clients <= 5


async def test_server_that_answers_a_byte_at_a_time_is_understood(tmp_path: Path) -> None:
    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer)
        cookie = (await reader.readexactly(28))[8:16]
        for byte in struct.pack(">II", 0x67446698, 0) + cookie + b"slow":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        await hold(reader)

    async with asyncio.timeout(LIMIT_S), talking(tmp_path, dribble) as uri:
        device = await NbdDevice.open(uri, options=QUICK)
        buffer = bytearray(4)
        await device.read(0, buffer)
        assert buffer == b"slow"
        await device.close()


async def test_connection_that_was_given_up_does_not_touch_the_readers_memory(tmp_path: Path) -> None:
    async def stop_halfway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer)
        cookie = (await reader.readexactly(28))[8:16]
        writer.write(struct.pack(">II", 0x67446698, 0) + cookie + b"h" * (MIB // 2))
        await hold(reader)

    async with asyncio.timeout(LIMIT_S), talking(tmp_path, stop_halfway) as uri:
        device = await NbdDevice.open(uri, options=RemoteOptions(reconnect_delay_s=0))
        buffer = bytearray(MIB)
        reading = asyncio.create_task(device.read(0, buffer))
        await wait_until(lambda: buffer.count(b"h") == MIB // 2)
        [connection] = device._session._connections
        assert len(connection.get_buffer(-1)) == MIB // 2
        connection.fail(ConnectionResetError("the test says so"))
        # The read may be done again elsewhere, into the same memory.
        late = connection.get_buffer(-1)
        late[:] = b"x" * len(late)
        with pytest.raises(DeviceError):
            await reading
        assert buffer.count(b"x") == 0
        await device.close()


async def test_server_that_reads_nothing_does_not_make_memory_grow(tmp_path: Path) -> None:
    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer, size=1 << 40)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(LIMIT_S)

    data = bytes(MIB)
    async with asyncio.timeout(LIMIT_S), talking(tmp_path, ignore) as uri:
        device = await NbdDevice.open(uri, options=RemoteOptions(limits=Limits(reply_timeout_s=60)))
        writes = [asyncio.create_task(device.write(number * MIB, data)) for number in range(100)]
        await asyncio.wait(writes, timeout=0.3)
        [connection] = device._session._connections
        assert connection._transport is not None
        assert connection._transport.get_write_buffer_size() <= 4 * MIB
        assert connection.in_flight < 10
        connection.abandon()
        for write in writes:
            write.cancel()
        await asyncio.wait(writes)
        device._session._connections.clear()
        await device.close()


async def test_several_connections_are_used_where_the_server_allows_it() -> None:
    async with asyncio.timeout(LIMIT_S), serving({"disk": MemoryDevice(MIB)}) as uri:
        device = await NbdDevice.open(uri)
        assert device.export.flags & TransmissionFlags.CAN_MULTI_CONN
        await wait_until(lambda: len(device._session._connections) == 4)
        await settle()
        assert len(device._session._connections) == 4
        await device.close()


async def test_errors_of_the_server_keep_their_number_and_words() -> None:
    command = nbdkit("--filter=error", "memory", "1M", "error=ENOSPC", "error-pwrite-rate=1")
    with ForeignServer(command) as server:
        device = await NbdDevice.open(server.uri())
        with pytest.raises(DeviceError, match=r"failed to write: .*ENOSPC, No space left") as caught:
            await device.write(0, b"x")
        assert caught.value.errno == errno.ENOSPC
        await device.read(0, bytearray(512))
        await device.close()


async def test_slow_requests_are_under_way_together() -> None:
    with ForeignServer(nbdkit("--filter=delay", "memory", "16M", "rdelay=1")) as server:
        device = await NbdDevice.open(server.uri())
        started = asyncio.get_running_loop().time()
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            for number in range(12):
                tasks.create_task(device.read(number * MIB, bytearray(4096)))
        # One after the other they would take 12 s.
        assert asyncio.get_running_loop().time() - started < 6
        await device.close()


async def test_protocol_breach_names_the_server_when_it_is_opened(tmp_path: Path) -> None:
    async def impossible(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer, size=1 << 63)
        await hold(reader)

    async with asyncio.timeout(LIMIT_S), talking(tmp_path, impossible) as uri:
        with pytest.raises(ProtocolError, match=r"^nbd\+unix:///\?socket=.*impossible size"):
            await NbdDevice.open(uri, options=QUICK)
