"""A server that requires TLS: clients that stall or leave on the way there hold nothing and nobody."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdbackup.block.memory import MemoryDevice
from nbdbackup.nbd.client import ClientNegotiation
from nbdbackup.server import handshake
from nbdbackup.server.exports import ExportTable
from nbdbackup.server.listener import Listener, listen_unix
from nbdbackup.server.server import Server
from nbdbackup.server.tls import ServerTls
from nbdbackup.tls.credentials import client_context, server_context
from nbdbackup.tls.stream import TlsStream
from tests.support import nbd_wire as wire
from tests.support.certificates import Pki, server_tls
from tests.support.sessions import export_of, open_descriptors, wait_until

WAIT_S = 10.0
GREETING_BYTES = 18
ACK = wire.option_reply(wire.STARTTLS, wire.ACK)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def tls(pki: Pki) -> ServerTls:
    return server_tls(server_context(pki.server(), verify_peer=False))


@pytest.fixture(scope="module")
def context(pki: Pki) -> ssl.SSLContext:
    return client_context(pki.client(), check_hostname=False)


@asynccontextmanager
async def running(tmp_path: Path, tls: ServerTls) -> AsyncIterator[tuple[Server, Listener]]:
    listener = listen_unix(str(tmp_path / "nbd.sock"))
    exports = ExportTable()
    exports.add(export_of(MemoryDevice(4096)))
    server = Server(exports, [listener], tls=tls)
    task = asyncio.get_running_loop().create_task(server.run())
    try:
        yield server, listener
    finally:
        server.stop()
        async with asyncio.timeout(WAIT_S):
            await task


async def take(sock: socket.socket, length: int) -> bytes:
    received = b""
    async with asyncio.timeout(WAIT_S):
        while len(received) < length:
            part = await asyncio.get_running_loop().sock_recv(sock, length - len(received))
            assert part, "the server hung up"
            received += part
    return received


async def up_to_starttls(listener: Listener) -> socket.socket:
    """A client that may begin its TLS handshake."""
    assert listener.path is not None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, listener.path)
    await take(sock, GREETING_BYTES)
    await loop.sock_sendall(sock, wire.client_flags() + wire.option(wire.STARTTLS))
    assert await take(sock, len(ACK)) == ACK
    return sock


async def say_nothing(sock: socket.socket, context: ssl.SSLContext) -> None:
    pass


async def say_half_a_hello(sock: socket.socket, context: ssl.SSLContext) -> None:
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    hello = outgoing.read()
    await asyncio.get_running_loop().sock_sendall(sock, hello[: len(hello) // 2])


async def ask_for_nothing(sock: socket.socket, context: ssl.SSLContext) -> None:
    await TlsStream(sock, context, server_side=False).handshake()


stalls = pytest.mark.parametrize("stall", [say_nothing, say_half_a_hello, ask_for_nothing])
Stall = Callable[[socket.socket, ssl.SSLContext], Awaitable[None]]


@stalls
async def test_client_that_stalls_in_the_tls_handshake_is_gone_after_the_limit(
    tmp_path: Path,
    tls: ServerTls,
    context: ssl.SSLContext,
    stall: Stall,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.5)
    async with running(tmp_path, tls) as (server, listener):
        before = open_descriptors()
        with await up_to_starttls(listener) as sock:
            await stall(sock, context)
            async with asyncio.timeout(WAIT_S):
                while await asyncio.get_running_loop().sock_recv(sock, 65536):
                    pass
        await wait_until(lambda: not server.client_count)
        assert open_descriptors() == before
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no export chosen within 0.5 s" in warning.getMessage()


@stalls
async def test_client_that_stalls_in_the_tls_handshake_does_not_keep_the_server_from_ending(
    tmp_path: Path, tls: ServerTls, context: ssl.SSLContext, stall: Stall
) -> None:
    async with running(tmp_path, tls) as (server, listener):
        sock = await up_to_starttls(listener)
        await stall(sock, context)
        await wait_until(lambda: server.client_count == 1)
    sock.close()


async def test_client_that_hangs_up_in_the_tls_handshake_leaves_nothing_behind(
    tmp_path: Path, tls: ServerTls, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, tls) as (server, listener):
        before = open_descriptors()
        (await up_to_starttls(listener)).close()
        await wait_until(lambda: not server.client_count)
        assert open_descriptors() == before
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_client_is_told_good_bye_when_the_server_ends(
    tmp_path: Path, tls: ServerTls, context: ssl.SSLContext
) -> None:
    """Otherwise it could not tell the end from somebody cutting the line."""
    async with running(tmp_path, tls) as (server, listener):
        sock = await up_to_starttls(listener)
        stream = TlsStream(sock, context, server_side=False)
        await stream.handshake()
        negotiation = ClientNegotiation("disk", tls=True)
        negotiation.receive(server_greeting())
        negotiation.receive(ACK)
        request = negotiation.tls_started()
        async with asyncio.timeout(WAIT_S):
            while negotiation.result is None:
                await stream.send_all(request)
                request = negotiation.receive(await stream.receive(65536))
        await wait_until(lambda: bool(server._sessions))
        server.stop()
        incoming = bytearray()
        async with asyncio.timeout(WAIT_S):
            while data := await asyncio.get_running_loop().sock_recv(sock, 65536):
                incoming += data
        stream._put(bytes(incoming))
        stream._put(b"")
        assert stream._ssl.read(1) == b""  # SSLEOFError, were there no good-bye
    sock.close()


def server_greeting() -> bytes:
    return b"NBDMAGICIHAVEOPT\x00\x03"
