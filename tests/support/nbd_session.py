"""A server in this process and a client that sends it bytes spelt by hand.

    async with serving(exports) as server, connected(server) as client:
        await client.option(wire.STRUCTURED_REPLY)
        await client.go("disk")
        await client.request(READ, 1, 0, 4096)
        reply = await client.reply(1)

Nothing here uses the package's definitions of the wire. Every wait has a limit.
"""

import asyncio
import struct
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from nbdbackup.server.exports import ExportTable
from nbdbackup.server.listener import listen_unix
from nbdbackup.server.server import Server
from tests.support import nbd_wire as wire

LIMIT_S = 30.0

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EIO, EINVAL, ENOSPC, ESHUTDOWN = 1, 5, 22, 28, 108

DONE = 1
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, STATUS_EXT = 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET = 0x8001, 0x8002

REQUEST_MAGIC, EXTENDED_REQUEST_MAGIC = 0x25609513, 0x21E41C71
SIMPLE_MAGIC, STRUCTURED_MAGIC, EXTENDED_MAGIC = 0x67446698, 0x668E33EF, 0x6E8A278C


@dataclass(slots=True)
class Answer:
    """The chunks of one reply, or its only message."""

    error: int = 0
    text: str = ""
    error_offset: int | None = None
    chunks: list[tuple[int, bytes]] = field(default_factory=list)
    """(type, payload) of each chunk, the last one with DONE; a simple reply's data has type -1."""
    offsets: set[int] = field(default_factory=set)
    """What the heads of extended chunks say."""

    @property
    def kinds(self) -> list[int]:
        return [kind for kind, _ in self.chunks]

    def data(self, offset: int, length: int) -> bytes:
        """A READ's bytes, which the chunks must cover exactly once (62)."""
        found = bytearray(length)
        covered = 0
        for kind, payload in self.chunks:
            if kind == -1:
                return payload
            start = struct.unpack_from(">Q", payload)[0] - offset
            count = len(payload) - 8 if kind == OFFSET_DATA else struct.unpack_from(">I", payload, 8)[0]
            assert kind in (OFFSET_DATA, OFFSET_HOLE)
            assert count > 0
            assert start == covered
            if kind == OFFSET_DATA:
                found[start : start + count] = payload[8:]
            else:
                assert len(payload) == 12
            covered += count
        assert covered == length
        return bytes(found)

    def status(self) -> dict[int, list[tuple[int, int]]]:
        """Extents by context id."""
        found: dict[int, list[tuple[int, int]]] = {}
        for kind, payload in self.chunks:
            if kind == STATUS:
                (number,) = struct.unpack_from(">I", payload)
                extents = list(struct.iter_unpack(">II", payload[4:]))
            else:
                assert kind == STATUS_EXT
                number, count = struct.unpack_from(">II", payload)
                extents = list(struct.iter_unpack(">QQ", payload[8:]))
                assert count == len(extents)
            assert number not in found
            found[number] = extents
        return found


class Client:
    """One connection. `extended` and `structured` are what was negotiated."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.extended = False
        self.structured = False
        self.flags = 0
        self.size = 0

    async def read(self, count: int) -> bytes:
        async with asyncio.timeout(LIMIT_S):
            return await self.reader.readexactly(count)

    async def ended(self) -> bytes:
        """Whatever else comes until the server closes."""
        async with asyncio.timeout(LIMIT_S):
            return await self.reader.read(-1)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        async with asyncio.timeout(LIMIT_S):
            await self.writer.drain()

    async def greet(self) -> None:
        assert await self.read(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        await self.send(wire.client_flags())

    async def option(self, code: int, payload: bytes = b"") -> list[wire.OptionAnswer]:
        """Send an option; all its answers."""
        await self.send(wire.option(code, payload))
        answers: list[wire.OptionAnswer] = []
        while not answers or not (answers[-1].reply == wire.ACK or answers[-1].reply >> 31):
            head = await self.read(20)
            option, reply, length = struct.unpack(">III", head[8:])
            answers.append(wire.OptionAnswer(option, reply, await self.read(length)))
        if answers[-1].reply == wire.ACK:
            self.extended |= code == wire.EXTENDED_HEADERS
            self.structured |= code in (wire.STRUCTURED_REPLY, wire.EXTENDED_HEADERS)
        return answers

    async def set_contexts(self, export: str, *names: str) -> dict[str, int]:
        """Select contexts; their ids."""
        answers = await self.option(wire.SET_META_CONTEXT, wire.meta_payload(export, names))
        assert answers[-1].reply == wire.ACK
        return {a.payload[4:].decode(): struct.unpack_from(">I", a.payload)[0] for a in answers[:-1]}

    async def go(self, export: str = "") -> None:
        answers = await self.option(wire.GO, wire.info_payload(export))
        assert answers[-1].reply == wire.ACK, answers
        self.size, self.flags = struct.unpack_from(">QH", answers[0].payload, 2)

    async def request(
        self, command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
    ) -> None:
        magic = EXTENDED_REQUEST_MAGIC if self.extended else REQUEST_MAGIC
        layout = ">IHHQQQ" if self.extended else ">IHHQQI"
        await self.send(struct.pack(layout, magic, flags, command, cookie, offset, length) + data)

    async def reply(self, cookie: int, data_bytes: int = 0) -> Answer:
        """The next whole reply, which must be to `cookie`; `data_bytes` come with a simple reply to READ."""
        answered, answer = await self.any_reply(data_bytes)
        assert answered == cookie
        return answer

    async def any_reply(self, data_bytes: int = 0, lengths: Sequence[int] = ()) -> tuple[int, Answer]:
        """The next whole reply and the cookie of its request; chunks of others must not come in between.

        `data_bytes` come behind a simple reply, or `lengths[cookie]` where there is one.
        """
        answer = Answer()
        cookie: int | None = None
        while True:
            (magic,) = struct.unpack(">I", await self.read(4))
            if magic == SIMPLE_MAGIC:
                assert not self.extended, "extended headers have no simple replies (48)"
                answer.error, echoed = struct.unpack(">IQ", await self.read(12))
                assert cookie is None
                data_bytes = lengths[echoed] if echoed < len(lengths) else data_bytes
                if data_bytes and not answer.error:
                    answer.chunks.append((-1, await self.read(data_bytes)))
                return echoed, answer
            if self.extended:
                assert magic == EXTENDED_MAGIC
                flags, kind, echoed, offset, length = struct.unpack(">HHQQQ", await self.read(28))
                answer.offsets.add(offset)
            else:
                assert magic == STRUCTURED_MAGIC
                flags, kind, echoed, length = struct.unpack(">HHQI", await self.read(16))
            assert cookie in (None, echoed)
            cookie = echoed
            self._add(answer, kind, await self.read(length))
            if flags & DONE:
                return echoed, answer

    def _add(self, answer: Answer, kind: int, payload: bytes) -> None:
        if kind & 0x8000:
            assert not answer.error, "at most one error (64)"
            answer.error, text_bytes = struct.unpack_from(">IH", payload)
            answer.text = payload[6 : 6 + text_bytes].decode()
            if kind == ERROR_OFFSET:
                (answer.error_offset,) = struct.unpack_from(">Q", payload, 6 + text_bytes)
        else:
            assert kind != NONE or not payload
            answer.chunks.append((kind, payload))

    async def call(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
    ) -> Answer:
        """A request and its reply."""
        await self.request(command, 77, offset, length, flags, data)
        return await self.reply(77, length if command == READ else 0)


@asynccontextmanager
async def serving(exports: ExportTable, server: Server | None = None) -> AsyncIterator[Server]:
    """A server of `exports` on a Unix socket, stopped at the end."""
    directory = tempfile.TemporaryDirectory(prefix="nbdbackup-test-")
    with directory:
        made = server or Server(exports, [listen_unix(str(Path(directory.name) / "s"))])
        running = asyncio.create_task(made.run())
        try:
            yield made
        finally:
            made.stop()
            async with asyncio.timeout(LIMIT_S):
                await running


@asynccontextmanager
async def connected(
    server: Server,
    options: Sequence[int] = (),
    export: str | None = "",
    contexts: Sequence[str] = (),
) -> AsyncIterator[Client]:
    """A client that asked for `options` and `contexts` and then, unless `export` is None, went for it."""
    path = server.listeners[0].path
    assert path is not None
    async with asyncio.timeout(LIMIT_S):
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 26)
    client = Client(reader, writer)
    try:
        await client.greet()
        for code in options:
            assert (await client.option(code))[-1].reply == wire.ACK
        if contexts:
            await client.set_contexts(export or "", *contexts)
        if export is not None:
            await client.go(export)
        yield client
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
