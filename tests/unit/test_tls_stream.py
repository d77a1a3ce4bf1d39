"""A session over TLS, and the traps of TLS on a non-blocking socket."""

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.agreement import Negotiated
from nbdbackup.nbd.client import encode_request
from nbdbackup.nbd.constants import Command
from nbdbackup.server.exports import Export
from nbdbackup.server.session import Session
from nbdbackup.tls.credentials import client_context, server_context
from nbdbackup.tls.names import PeerName, parse
from nbdbackup.tls.stream import OUTGOING_BYTES_MAX, SEND_BYTES, TlsStream
from tests.support.certificates import Pki, server_tls, subject
from tests.support.sessions import export_of

WAIT_S = 10.0
KIB, MIB = 1 << 10, 1 << 20
versions = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def contexts(pki: Pki) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's."""
    return server_context(pki.server(), verify_peer=False), client_context(pki.client(), check_hostname=False)


def socket_pair(socket_bytes: int | None = None) -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
        if socket_bytes is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, socket_bytes)
    return ends


@asynccontextmanager
async def pair(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], socket_bytes: int | None = None
) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    """The server's stream and the client's, after the handshake."""
    ours, theirs = socket_pair(socket_bytes)
    with ours, theirs:
        server = TlsStream(ours, contexts[0], server_side=True)
        client = TlsStream(theirs, contexts[1], server_side=False)
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(server.handshake(), client.handshake())
        yield server, client


def receive_now(stream: TlsStream, length: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: stream.recv_into(memoryview(buffer))])


async def test_streams_carry_bytes_both_ways(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    data = random.Random(1).randbytes(3 * MIB + 5)
    async with pair(contexts) as (server, client), asyncio.timeout(WAIT_S):
        for sender, receiver in ((client, server), (server, client)):
            sending = asyncio.ensure_future(sender.send_all(data))
            received = b""
            while len(received) < len(data):
                received += await receiver.receive(100_000)
            await sending
            assert received == data


async def test_what_is_decrypted_but_not_taken_is_announced(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    """The socket has nothing more by then: only `has_pending` tells."""
    async with pair(contexts) as (server, client):
        await client.send_all(b"x" * 100_000)
        received = receive_now(server, 1000)
        with pytest.raises(BlockingIOError):
            server._sock.recv(1)
        with suppress(BlockingIOError):
            while server.has_pending:
                received += receive_now(server, 1000)
        assert len(received) == 100_000
        assert not server.has_pending


async def test_send_counts_only_what_the_kernel_has(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    data = random.Random(2).randbytes(MIB)
    async with pair(contexts, socket_bytes=8 * KIB) as (server, client), asyncio.timeout(WAIT_S):
        sent, refusals = 0, 0

        def send_more() -> None:
            nonlocal sent, refusals
            try:
                while sent < len(data):
                    sent += server.send(memoryview(data)[sent:])
            except BlockingIOError:
                refusals += 1
            else:
                asyncio.get_running_loop().remove_writer(server)

        asyncio.get_running_loop().add_writer(server, send_more)
        received = b""
        while len(received) < len(data):
            received += await client.receive(64 * KIB)
            assert sent <= len(received) + SEND_BYTES
        assert received == data
        assert refusals


@versions
async def test_the_end_behind_data_is_seen_although_the_socket_stays_quiet(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], version: ssl.TLSVersion
) -> None:
    """A client that says good-bye and waits for ours keeps the connection open."""
    contexts[1].maximum_version = version
    try:
        async with pair(contexts) as (server, client):
            assert server.version == {771: "TLSv1.2", 772: "TLSv1.3"}[version]
            await client.send_all(b"last words")
            client.close()
            assert receive_now(server, 1000) == b"last words"
            assert server.has_pending
            assert receive_now(server, 1000) == b""
            assert receive_now(server, 1000) == b""
    finally:
        contexts[1].maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED


async def test_an_end_without_good_bye_is_an_end_too(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async with pair(contexts) as (server, client):
        await client.send_all(b"data")
        client._sock.shutdown(socket.SHUT_WR)
        assert receive_now(server, 1000) == b"data"
        assert receive_now(server, 1000) == b""


async def test_a_forged_record_breaks_the_stream_after_what_came_before_it(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    async with pair(contexts) as (server, client):
        await client.send_all(b"genuine")
        client._sock.send(b"\x17\x03\x03\x00\x20" + b"f" * 32)
        assert receive_now(server, 1000) == b"genuine"
        for _ in range(2):
            with pytest.raises(ConnectionAbortedError, match="TLS: "):
                receive_now(server, 1000)


async def test_a_peer_that_provokes_alerts_and_reads_none_is_disconnected(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    """In TLS 1.2, each attempt at renegotiation gets one."""
    async with pair(contexts) as (server, client):
        server._outgoing.write(b"a" * (OUTGOING_BYTES_MAX + 1))
        await client.send_all(b"x")
        with pytest.raises(ConnectionAbortedError, match="more alerts"):
            receive_now(server, 1000)


@pytest.mark.parametrize(
    "garbage", [b"\0" * 600, b"\xff" * 600, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" * 300]
)
async def test_garbage_instead_of_a_client_hello_fails_the_handshake(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], garbage: bytes
) -> None:
    ours, theirs = socket_pair()
    with ours, theirs:
        theirs.send(garbage)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError, match="TLS handshake failed"):
            async with asyncio.timeout(WAIT_S):
                await TlsStream(ours, contexts[0], server_side=True).handshake()


# A session.


class Client:
    """Asks a session over TLS, and takes simple replies apart."""

    def __init__(self, stream: TlsStream) -> None:
        self.stream = stream
        self.received = bytearray()

    async def take(self, length: int) -> bytes:
        async with asyncio.timeout(WAIT_S):
            while len(self.received) < length:
                data = await self.stream.receive(256 * KIB)
                assert data, "the server hung up"
                self.received += data
        taken = bytes(self.received[:length])
        del self.received[:length]
        return taken

    async def reply(self, length: int = 0) -> tuple[int, bytes]:
        """A simple reply without error; its cookie and data."""
        head = await self.take(16)
        assert head[:8] == bytes.fromhex("6744669800000000")
        return int.from_bytes(head[8:]), await self.take(length)


@asynccontextmanager
async def session(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], export: Export, socket_bytes: int | None = None
) -> AsyncIterator[Client]:
    async with pair(contexts, socket_bytes) as (server, client):
        negotiated = Negotiated(export.info(), export.name, False, ())
        task = asyncio.get_running_loop().create_task(Session(server, export, negotiated).run(b""))
        try:
            yield Client(client)
            client.close()
            client._sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(WAIT_S):
                await task
        finally:
            task.cancel()
            await asyncio.wait([task], timeout=WAIT_S)


async def test_a_batch_longer_than_the_receive_buffer_is_served_without_another_byte(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    """Every request is in the server's TLS at once: the socket never becomes readable again."""
    count = 60_000
    async with session(contexts, export_of(MemoryDevice(MIB))) as client:
        requests = b"".join(encode_request(Command.READ, cookie, 0, 1) for cookie in range(count))
        sending = asyncio.ensure_future(client.stream.send_all(requests))
        for cookie in range(count):
            assert (await client.reply(1))[0] == cookie
        await sending


@pytest.mark.parametrize("socket_bytes", [None, 4 * KIB], ids=["default", "small"])
async def test_large_writes_and_reads_are_byte_exact(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], socket_bytes: int | None
) -> None:
    data = random.Random(3).randbytes(5 * MIB + 77)
    async with session(contexts, export_of(MemoryDevice(8 * MIB)), socket_bytes) as client:
        request = encode_request(Command.WRITE, 1, 4095, len(data)) + data
        sending = asyncio.ensure_future(client.stream.send_all(request))
        assert await client.reply() == (1, b"")
        await sending
        await client.stream.send_all(encode_request(Command.READ, 2, 4095, len(data)))
        assert await client.reply(len(data)) == (2, data)


async def test_requests_in_records_of_one_byte_are_understood(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    async with session(contexts, export_of(MemoryDevice(MIB))) as client:
        for byte in encode_request(Command.READ, 7, 0, 4):
            await client.stream.send_all(bytes([byte]))
        assert await client.reply(4) == (7, b"\0" * 4)


async def test_a_client_that_does_not_read_gets_everything_once_it_does(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    async with session(contexts, export_of(MemoryDevice(MIB)), socket_bytes=4 * KIB) as client:
        requests = b"".join(encode_request(Command.READ, cookie, 0, 64 * KIB) for cookie in range(64))
        await client.stream.send_all(requests)
        for cookie in range(64):
            assert await client.reply(64 * KIB) == (cookie, bytes(64 * KIB))


# Who may come in.


@pytest.mark.parametrize(
    ("authorised", "is_let_in"),
    [
        (lambda name: None, True),
        (lambda name: [parse(name)], True),
        (lambda name: [parse("CN=somebody"), parse(name)], True),
        (lambda name: [parse("CN=alice")], False),
        (lambda name: [], False),
    ],
)
async def test_only_clients_on_the_list_are_let_in(
    tmp_path: Path, authorised: Callable[[str], list[PeerName] | None], is_let_in: bool
) -> None:
    pki = Pki(tmp_path)
    alice = pki.client("alice")
    allowed = authorised(subject(alice))
    tls = server_tls(server_context(pki.server(), verify_peer=True), allowed)
    ours, theirs = socket_pair()
    with ours, theirs:
        client = TlsStream(theirs, client_context(alice, check_hostname=False), server_side=False)
        async with asyncio.timeout(WAIT_S):
            _, outcome = await asyncio.gather(client.handshake(), tls.accept(ours), return_exceptions=True)
        if is_let_in:
            assert isinstance(outcome, TlsStream)
            assert str(outcome.peer_name) == subject(alice)
        else:
            assert isinstance(outcome, ProtocolError)
            assert subject(alice) in str(outcome)
