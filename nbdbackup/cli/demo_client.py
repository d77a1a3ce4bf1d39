"""A small blocking NBD client around the sans-I/O one: one request at a time over a Unix socket.

Enough to write to a disk and to read a snapshot where no other client is installed.
"""

import socket
from types import TracebackType

from nbdbackup.errors import DeviceError, ProtocolError
from nbdbackup.nbd.client import ClientNegotiation, RemoteExport, encode_request
from nbdbackup.nbd.constants import Command
from nbdbackup.nbd.reply_parser import Reply, ReplyParser

TIMEOUT_S = 30
RECEIVE_BYTES = 1 << 18


class DemoClient:
    """A connection to the export `name` of the server at `socket_path`; a context manager.

    Raises, here and in every method: OSError, ProtocolError, NotFoundError.
    """

    def __init__(self, socket_path: str, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._cookie = 0
        try:
            self._socket.settimeout(TIMEOUT_S)
            self._socket.connect(socket_path)
            self.export = self._negotiate(name)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "DemoClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Of the export, in bytes."""
        return self.export.size

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        return bytes(self._request(Command.READ, offset, length).data)

    def write(self, offset: int, data: bytes) -> None:
        """Store `data` at `offset`."""
        self._request(Command.WRITE, offset, len(data), data)

    def close(self) -> None:
        """Take leave; nothing may be under way."""
        try:
            self._socket.sendall(encode_request(Command.DISC, 0, 0, 0))
        except OSError:
            pass  # the server has left already
        self._socket.close()

    def _negotiate(self, name: str) -> RemoteExport:
        negotiation = ClientNegotiation(name)
        while negotiation.result is None:
            received = self._socket.recv(RECEIVE_BYTES)
            if not received:
                raise negotiation.closed()
            self._socket.sendall(negotiation.receive(received))
        export = negotiation.result
        self._parser = ReplyParser(
            structured=export.structured_replies, context_ids=[number for number, _ in export.contexts]
        )
        self._parser.receive(negotiation.leftover)
        return export

    def _request(self, command: Command, offset: int, length: int, payload: bytes = b"") -> Reply:
        self._cookie += 1
        self._parser.expect(command, self._cookie, offset, length)
        self._socket.sendall(encode_request(command, self._cookie, offset, length) + payload)
        while True:
            received = self._socket.recv(RECEIVE_BYTES)
            if not received:
                raise ProtocolError("the server closed the connection")
            for reply in self._parser.receive(received):
                if reply.error:
                    raise DeviceError(reply.error, reply.text or f"{command.name} failed with {reply.error}")
                return reply
