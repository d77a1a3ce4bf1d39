"""What a client sends once it has an export: `nbd/transmission.py` alone, and a whole `server/session.py`."""

import asyncio
import socket
from collections import Counter
from contextlib import suppress

from nbdbackup.block.device import ReadableBuffer, WritableBuffer
from nbdbackup.block.filter import FilterDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.node import Node
from nbdbackup.errors import ProtocolError
from nbdbackup.nbd.agreement import ExportInfo, Negotiated
from nbdbackup.nbd.constants import (
    BASE_ALLOCATION,
    PAYLOAD_BYTES_ACCEPTED,
    Command,
    Errno,
    TransmissionFlags,
)
from nbdbackup.nbd.requests import Refusal, Request
from nbdbackup.nbd.transmission import Transmission
from nbdbackup.server.exports import Export
from nbdbackup.server.session import Session
from tests.fuzz.decoder import Cut, FuzzInput, in_pieces, whole
from tests.fuzz.requests import (
    CONTEXT_IDS,
    SIZE,
    Asked,
    Asking,
    Mode,
    count_replies,
    read_asking,
    request_stream,
)

LIMIT_S = 20.0

_ALL_FLAGS = ~TransmissionFlags.READ_ONLY
_WRITES = (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)
_MAGIC_BYTES = 4
_GARBAGE_BYTES_MAX = 4096


def transmission(data: bytes) -> str:
    """Which requests are refused, for exports of all kinds: nothing is let through that could do harm."""
    source = FuzzInput(data)
    mode = source.choose(tuple(Mode))
    flags = source.choose((_ALL_FLAGS, ~TransmissionFlags(0), TransmissionFlags.HAS_FLAGS))
    info = ExportInfo("disk", "", SIZE, flags, block_size_min=source.choose((1, 512, 4096)))
    contexts = tuple((number, f"x:{number}") for number in CONTEXT_IDS[: source.below(3)])
    protocol = Transmission(
        Negotiated(info, "disk", mode is not Mode.SIMPLE, contexts, mode is Mode.EXTENDED)
    )
    stream = request_stream(source, mode)
    asking = read_asking(stream, mode)
    for asked in asking.asked:
        _judge(protocol, info, asked, mode)
    _read_garbage(protocol, stream)
    return asking.end


def _judge(protocol: Transmission, info: ExportInfo, asked: Asked, mode: Mode) -> None:
    request = Request(*asked[:-1])
    if asked.command == Command.WRITE:
        request = request._replace(flags=request.flags & ~32)
    assert protocol.payload_bytes(request) == len(asked.payload)
    refusal: Refusal | None
    if asked.payload and asked.command == Command.BLOCK_STATUS:
        query = protocol.parse_status_query(request, asked.payload)
        refusal = query if isinstance(query, Refusal) else protocol.check(query.request)
        request = request if isinstance(query, Refusal) else query.request
        assert isinstance(query, Refusal) or set(query.context_ids) <= set(protocol.contexts)
    else:
        refusal = protocol.check(request)
    if refusal is not None:
        assert refusal.error in (Errno.EPERM, Errno.EINVAL, Errno.ENOSPC)
        replies = count_replies(protocol.reply_error(request, refusal), mode, [asked])
        assert replies == Counter([asked.cookie])
        return
    command = Command(request.command)
    assert command is Command.DISC or request.offset + request.length <= SIZE
    assert not (request.offset | request.length) % info.block_size_min or command is Command.DISC
    assert not (command in _WRITES and info.flags & TransmissionFlags.READ_ONLY)
    assert command not in (Command.READ, Command.WRITE) or request.length <= PAYLOAD_BYTES_ACCEPTED


def _read_garbage(protocol: Transmission, stream: bytes) -> None:
    """Any bytes are a request or a breach, wherever one begins to read."""
    for at in range(0, min(len(stream) - protocol.request_bytes, _GARBAGE_BYTES_MAX), 97):
        raw = bytearray(stream[at : at + protocol.request_bytes])
        with_magic = bytearray(stream[:_MAGIC_BYTES]) + raw[_MAGIC_BYTES:]
        for buffer in (raw, with_magic):
            try:
                request = protocol.unpack(buffer, 0)
                assert protocol.payload_bytes(request) <= 0xFFFFFFFF
            except ProtocolError:
                continue
            protocol.check(request)


class _Moody(FilterDevice):
    """Works in place or not, as the bits of `moods` say in turn."""

    def __init__(self, child: MemoryDevice, moods: int) -> None:
        super().__init__(child)
        self._moods = moods
        self._turn = 0

    def _is_willing(self) -> bool:
        self._turn += 1
        return bool(self._moods >> self._turn % 8 & 1)

    def read_nowait(self, offset: int, buffer: WritableBuffer) -> bool:
        return self._is_willing() and super().read_nowait(offset, buffer)

    def write_nowait(self, offset: int, data: ReadableBuffer) -> bool:
        return self._is_willing() and super().write_nowait(offset, data)


def session(data: bytes) -> str:
    """A whole session on a socket: every request that arrived is answered once, and only a breach ends it."""
    source = FuzzInput(data)
    mode = source.choose(tuple(Mode))
    read_only = source.below(8) == 7
    moods = source.number(8)
    stream = request_stream(source, mode)
    asking = read_asking(stream, mode)
    for cut in (whole, in_pieces):
        end, sent = asyncio.run(_serve(mode, read_only, moods, stream, cut))
        assert (end == "broken") == (asking.end == "broken"), (end, asking.end)
        _check_replies(sent, mode, asking)
    return asking.end


def _check_replies(sent: bytes, mode: Mode, asking: Asking) -> None:
    answered = [asked for asked in asking.asked if asked.command != Command.DISC or asked.payload]
    if asking.end == "broken":
        return  # replies that were not sent yet are lost, and the last one may be cut
    counts = count_replies(sent, mode, answered)
    assert counts is None or counts == Counter(asked.cookie for asked in answered)


async def _serve(mode: Mode, read_only: bool, moods: int, stream: bytes, cut: Cut) -> tuple[str, bytes]:
    """How the session ended, and all that it sent."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sock in (ours, theirs):
            sock.setblocking(False)
        device = MemoryDevice(SIZE)
        export = Export("disk", Node("disk", _Moody(device, moods)), read_only=read_only)
        contexts = ((CONTEXT_IDS[0], BASE_ALLOCATION),) if mode is not Mode.SIMPLE else ()
        agreed = Negotiated(export.info(), "disk", mode is not Mode.SIMPLE, contexts, mode is Mode.EXTENDED)
        served = Session(ours, export, agreed)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(_read_all(theirs))
            tasks.create_task(_send(theirs, stream, cut))
            try:
                await served.run(b"")
                end = "closed"
            except ProtocolError:
                end = "broken"
            ours.close()
            sent = await reading
    assert not export.clients
    return end, sent


async def _send(sock: socket.socket, stream: bytes, cut: Cut) -> None:
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        for piece in cut(stream):
            await loop.sock_sendall(sock, piece)
        sock.shutdown(socket.SHUT_WR)


async def _read_all(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    with suppress(ConnectionError):
        while part := await loop.sock_recv(sock, 1 << 20):
            received += part
    return bytes(received)
