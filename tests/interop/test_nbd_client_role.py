"""The client role against servers that others wrote: qemu-nbd and nbdkit."""

import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdbackup.errors import NotFoundError
from nbdbackup.nbd.client import ClientNegotiation, RemoteExport, encode_request
from nbdbackup.nbd.constants import Command, Errno, TransmissionFlags
from nbdbackup.nbd.reply_parser import Reply, ReplyParser
from tests.support import peers

TIMEOUT_S = 30
CONTENT = random.Random(7).randbytes(1 << 20) + bytes(1 << 20)


class Connection:
    """A blocking client over the sans-I/O pieces."""

    def __init__(self, connected: socket.socket, export: str, *, want_structured: bool = True) -> None:
        self._socket = connected
        negotiation = ClientNegotiation(export, want_structured=want_structured)
        while negotiation.result is None:
            data = self._socket.recv(65536)
            if not data:
                raise negotiation.closed()
            self._socket.sendall(negotiation.receive(data))
        self.export: RemoteExport = negotiation.result
        ids = [number for number, _ in self.export.contexts]
        self._parser = ReplyParser(structured=self.export.structured_replies, context_ids=ids)
        assert self._parser.receive(negotiation.leftover) == []
        self._cookie = 0

    def disconnect(self) -> None:
        self._socket.sendall(encode_request(Command.DISC, 0, 0, 0))

    def call(self, command: Command, offset: int = 0, length: int = 0, data: bytes = b"") -> Reply:
        self._cookie += 1
        self._parser.expect(command, self._cookie, offset, length)
        self._socket.sendall(encode_request(command, self._cookie, offset, length) + data)
        while True:
            received = self._socket.recv(65536)
            assert received, "the server hung up"
            answers = self._parser.receive(received)
            if answers:
                (reply,) = answers
                return reply


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(TIMEOUT_S)
        made.connect(str(path))
        yield made


@contextmanager
def running(command: list[str], path: Path) -> Iterator[Path]:
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not path.exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield path
    finally:
        server.terminate()
        server.wait(TIMEOUT_S)


def qemu_nbd(image: Path, path: Path) -> list[str]:
    program = peers.require("qemu-nbd")
    return [program, "-t", "-f", "raw", "-x", "disk", "-D", "a disk", "-k", str(path), str(image)]


def nbdkit(image: Path, path: Path) -> list[str]:
    return [peers.require("nbdkit"), "-f", "-U", str(path), "-e", "disk", "file", str(image)]


def nbdkit_oldest_newstyle(image: Path, path: Path) -> list[str]:
    # Without structured replies, as a server of some years ago.
    return [peers.require("nbdkit"), "-f", "--no-sr", "-U", str(path), "-e", "disk", "file", str(image)]


@pytest.mark.parametrize("server", [qemu_nbd, nbdkit, nbdkit_oldest_newstyle])
@pytest.mark.parametrize("want_structured", [True, False])
def test_client_reads_and_writes_what_the_server_has(
    tmp_path: Path, server: Callable[[Path, Path], list[str]], want_structured: bool
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(CONTENT)
    with (
        running(server(image, tmp_path / "nbd.sock"), tmp_path / "nbd.sock") as path,
        connected(path) as stream,
    ):
        client = Connection(stream, "disk", want_structured=want_structured)
        assert client.export.size == len(CONTENT)
        assert client.export.flags & TransmissionFlags.HAS_FLAGS
        granted = want_structured and server is not nbdkit_oldest_newstyle
        assert client.export.structured_replies == granted
        assert bytes(client.call(Command.READ, 4096, len(CONTENT) - 4096).data) == CONTENT[4096:]
        assert client.call(Command.WRITE, 512, 1024, b"w" * 1024).error == 0
        assert client.call(Command.FLUSH).error == 0
        assert (
            bytes(client.call(Command.READ, 0, 2048).data) == CONTENT[:512] + b"w" * 1024 + CONTENT[1536:2048]
        )
        past_end = client.call(Command.READ, len(CONTENT), 512)
        assert past_end.error == Errno.EINVAL
        if granted:
            ((number, name),) = client.export.contexts
            assert name == "base:allocation"
            status = client.call(Command.BLOCK_STATUS, 0, len(CONTENT)).status
            assert sum(extent.length for extent in status[number]) <= len(CONTENT)
        client.disconnect()


def test_export_that_qemu_nbd_does_not_have_is_not_found(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(CONTENT)
    with (
        running(qemu_nbd(image, tmp_path / "nbd.sock"), tmp_path / "nbd.sock") as path,
        connected(path) as stream,
        pytest.raises(NotFoundError, match="'nope'"),
    ):
        Connection(stream, "nope")
