"""An NBD client with no manners: sends whatever bytes the test wants, over a plain socket.

It shares no code with the package, on purpose: a mistake in the package's idea of the wire
would otherwise be made on both ends. Every wait is bounded by the socket's timeout.
"""

import socket
import ssl
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from tests.support.server import Server

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META, OPT_SET_META = 8, 9, 10
REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
REP_ERROR = 1 << 31
ERR_UNSUP, ERR_POLICY, ERR_INVALID = REP_ERROR | 1, REP_ERROR | 2, REP_ERROR | 3
ERR_UNKNOWN, ERR_TOO_BIG = REP_ERROR | 6, REP_ERROR | 9

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_ZEROES, CMD_STATUS = range(8)
FLAG_FUA, FLAG_NO_HOLE, FLAG_DF, FLAG_REQ_ONE, FLAG_FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28

TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class OptionReply:
    """One reply of the negotiation."""

    option: int
    kind: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """One reply of the transmission; of a simple one, `kind` is None and `error` counts."""

    cookie: int
    error: int = 0
    data: bytes = b""
    flags: int = 1
    kind: int | None = None


class Listening(Protocol):
    """Whoever has a Unix socket to connect to."""

    @property
    def socket_path(self) -> Path | None:
        """Where it listens; None: by TCP alone."""


class RawClient:
    """One connection; a context manager that closes it."""

    def __init__(
        self, server: Server | Listening, transport: str = "unix", timeout_s: float = TIMEOUT_S
    ) -> None:
        if transport == "unix":
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(timeout_s)
            self.socket.connect(str(server.socket_path))
        else:
            assert isinstance(server, Server)
            self.socket = socket.create_connection(("127.0.0.1", server.port or 0), timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send these bytes; a server that hangs up meanwhile is no error."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes."""
        parts = bytearray()
        while len(parts) < length:
            part = self.socket.recv(length - len(parts))
            assert part, f"the server hung up after {len(parts)} of {length} bytes"
            parts += part
        return bytes(parts)

    def is_closed(self) -> bool:
        """Wait for the server's hanging up; False if it still talks."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def greet(self, flags: int = 3) -> None:
        """Read the greeting and answer with the client flags."""
        magic, ihaveopt, server_flags = struct.unpack(">QQH", self.receive(18))
        assert (magic, ihaveopt, server_flags) == (NBDMAGIC, IHAVEOPT, 3)
        self.send(struct.pack(">I", flags))

    def send_option(self, option: int, data: bytes = b"", length: int | None = None) -> None:
        """Send one option; `length` may lie."""
        self.send(struct.pack(">QII", IHAVEOPT, option, len(data) if length is None else length) + data)

    def option_reply(self) -> OptionReply:
        """Receive one reply."""
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == OPTION_REPLY_MAGIC
        return OptionReply(option, kind, self.receive(length))

    def option(self, option: int, data: bytes = b"") -> list[OptionReply]:
        """Send one option and receive its replies, the final one last."""
        self.send_option(option, data)
        replies = [self.option_reply()]
        while replies[-1].kind not in {REP_ACK} and not replies[-1].kind & REP_ERROR:
            replies.append(self.option_reply())
        assert all(reply.option == option for reply in replies)
        return replies

    def go(self, export: str, structured: bool = False, contexts: tuple[str, ...] = ()) -> int:
        """Negotiate up to transmission; the export's size."""
        self.greet()
        if structured or contexts:
            assert self.option(OPT_STRUCTURED_REPLY)[-1].kind == REP_ACK
        if contexts:
            replies = self.option(OPT_SET_META, meta_query(export, *contexts))
            assert len(replies) == len(contexts) + 1
        replies = self.option(OPT_GO, go_data(export))
        assert replies[-1].kind == REP_ACK, replies[-1]
        (info,) = [reply.data for reply in replies[:-1] if reply.data[:2] == b"\0\0"]
        size: int = struct.unpack_from(">Q", info, 2)[0]
        return size

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        flags: int = 0,
        cookie: int = 1,
        magic: int = REQUEST_MAGIC,
    ) -> None:
        """Send one request."""
        self.send(struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length) + data)

    def simple_reply(self, read_length: int = 0) -> Chunk:
        """Receive a simple reply, with so many bytes of data if it is no error."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == SIMPLE_REPLY_MAGIC, hex(magic)
        return Chunk(cookie, error, b"" if error else self.receive(read_length))

    def chunk(self) -> Chunk:
        """Receive one chunk of a structured reply, or a simple reply without data."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == SIMPLE_REPLY_MAGIC:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            return Chunk(cookie, error)
        assert magic == STRUCTURED_REPLY_MAGIC, hex(magic)
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        data = self.receive(length)
        error = struct.unpack_from(">I", data)[0] if kind & 0x8000 else 0
        return Chunk(cookie, error, data, flags, kind)

    def chunks(self) -> list[Chunk]:
        """Receive all chunks of one structured reply."""
        chunks = [self.chunk()]
        while not chunks[-1].flags & 1:
            chunks.append(self.chunk())
        return chunks


def wrapped(client: RawClient, certificates: Path) -> RawClient:
    """`client` on the other side of STARTTLS."""
    context = ssl.create_default_context(cafile=str(certificates / "ca-cert.pem"))
    if (certificates / "client-cert.pem").exists():
        context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
    return client


def go_data(export: str, *info_types: int) -> bytes:
    """The payload of INFO and GO."""
    name = export.encode()
    return struct.pack(f">I{len(name)}sH{len(info_types)}H", len(name), name, len(info_types), *info_types)


def meta_query(export: str, *queries: str) -> bytes:
    """The payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    name = export.encode()
    parts = [struct.pack(f">I{len(name)}sI", len(name), name, len(queries))]
    parts += [struct.pack(f">I{len(query)}s", len(query), query.encode()) for query in queries]
    return b"".join(parts)
