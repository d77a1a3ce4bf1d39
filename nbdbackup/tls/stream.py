"""TLS over a non-blocking socket, with the calls that a session makes of the socket itself.

    socket --ciphertext--> incoming BIO --SSL object--> recv_into's buffer
    socket <--ciphertext-- backlog <-- outgoing BIO <--SSL object-- send's data

Four traps, and what is done about them:

- Bytes that were received may be decrypted only in part when the caller's buffer is full. The socket
  will not become readable for the rest: `has_pending` says that there may be some.
- What was encrypted cannot be taken back when the socket takes no more. `send` then raises
  BlockingIOError and keeps what it has; the caller calls again with the same data once the socket is
  writable, and is told that it was sent only when the kernel has it all.
- A read that has to write, or a write that has to read, would need the other event. Only handshakes
  do that, and there is no second one: renegotiation is off (`credentials`). What little TLS itself
  has to say later (alerts) leaves with the next data, or with `close`; a peer that provokes more of it
  than `OUTGOING_BYTES_MAX` is disconnected.
- One peer must not keep the event loop: a call receives from the socket at most once.
"""

import asyncio
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from typing import cast

from nbdbackup.errors import ProtocolError
from nbdbackup.tls.credentials import PskServerContext, explain
from nbdbackup.tls.names import PeerName, of_certificate

RECEIVE_BYTES = 256 << 10
SEND_BYTES = 256 << 10
"""At most so much is encrypted at a time."""
OUTGOING_BYTES_MAX = 64 << 10
"""Ciphertext that waits although nothing was sent."""


class TlsStream:
    """TLS on `sock` (connected, non-blocking), which stays the caller's to close. First, `handshake`."""

    _received = memoryview(bytearray(RECEIVE_BYTES))
    """Of all streams together: what `recv_into` puts there, it takes out again at once."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
    ) -> None:
        # Set once.
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side, server_hostname)
        # Changing while running.
        self._key_name: str | None = None
        self._backlog = memoryview(b"")
        self._accepted = 0
        self._ended = False
        self._failure: OSError | None = None
        self.has_pending = False
        """`recv_into` may have more without the socket's becoming readable."""

    def fileno(self) -> int:
        """The socket's, to wait for."""
        return self._sock.fileno()

    @property
    def version(self) -> str:
        """ "TLSv1.3", say; "" before the handshake."""
        return self._ssl.version() or ""

    @property
    def peer_name(self) -> PeerName | None:
        """Who the peer has proved to be.

        By its certificate, if it was asked for one and that is verified, or, to a server, by its key.
        """
        return self._key_name or of_certificate(self._ssl.getpeercert())

    async def handshake(self) -> None:
        """Agree on keys; the caller limits the time.

        Raises:
            ProtocolError: the peer speaks no TLS, none that is acceptable, or is not who it must be.
            OSError: the connection broke.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._step()
                break
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                self._say_last_word()
                raise ProtocolError(f"TLS handshake failed: {explain(error)}") from None
            await loop.sock_sendall(self._sock, self._outgoing.read())
            data = await loop.sock_recv(self._sock, RECEIVE_BYTES)
            if not data:
                raise ProtocolError("TLS handshake failed: the peer hung up")
            self._incoming.write(data)
        await loop.sock_sendall(self._sock, self._outgoing.read())
        self.has_pending = True

    def _step(self) -> None:
        """Take the next step of the handshake. Raises ssl.SSLError, also for want of bytes."""
        context = self._ssl.context
        if not isinstance(context, PskServerContext):
            self._ssl.do_handshake()
            return
        context.identity = None
        try:
            self._ssl.do_handshake()
        finally:
            self._key_name = context.identity or self._key_name

    async def receive(self, length_max: int) -> bytes:
        """Wait for up to `length_max` bytes; b"" at the end of the stream.

        Raises:
            OSError: the connection broke.
        """
        loop = asyncio.get_running_loop()
        buffer = bytearray(length_max)
        while True:
            length = self._decrypt(memoryview(buffer))
            if length or self._ended:
                return bytes(memoryview(buffer)[:length])
            self._put(await loop.sock_recv(self._sock, RECEIVE_BYTES))

    async def send_all(self, data: bytes) -> None:
        """Send all of `data`.

        Raises:
            OSError: the connection broke.
        """
        loop = asyncio.get_running_loop()
        assert not self._backlog
        view = memoryview(data)
        while view:
            view = view[self._encrypt(view[:SEND_BYTES]) :]
            await loop.sock_sendall(self._sock, self._outgoing.read())

    def recv_into(self, buffer: memoryview) -> int:
        """Receive once. Returns the number of bytes, 0 at the end of the stream.

        Raises:
            BlockingIOError: nothing there. OSError: the connection broke.
        """
        if self.has_pending:
            length = self._decrypt(buffer)
            if length or self._ended:
                return length
        count = self._sock.recv_into(self._received)
        self._put(self._received[:count])
        length = self._decrypt(buffer)
        if not length and not self._ended:
            raise BlockingIOError
        return length

    def send(self, data: memoryview) -> int:
        """Send some of `data`; the number of bytes, all of which the kernel has.

        Raises:
            BlockingIOError: the socket takes no more now; call again with the same `data`.
            OSError: the connection broke.
        """
        return self.sendmsg((data,))

    def sendmsg(self, buffers: Iterable[memoryview]) -> int:
        """Send some of `buffers`, one after another; as `send`."""
        if not self._accepted:
            for data in buffers:
                self._accepted += self._encrypt(data[: SEND_BYTES - self._accepted])
                if self._accepted == SEND_BYTES:
                    break
            self._backlog = memoryview(self._outgoing.read())
        while self._backlog:
            self._backlog = self._backlog[self._sock.send(self._backlog) :]
        accepted, self._accepted = self._accepted, 0
        return accepted

    def close(self) -> None:
        """Say good-bye, as far as the socket takes it."""
        if not self._backlog and not self._failure:
            with suppress(OSError):
                self._ssl.unwrap()
            self._say_last_word()

    def _say_last_word(self) -> None:
        with suppress(OSError):
            self._sock.send(self._outgoing.read())

    def _put(self, ciphertext: bytes | memoryview) -> None:
        if ciphertext:
            self._incoming.write(ciphertext)
        else:
            self._incoming.write_eof()

    def _encrypt(self, data: memoryview) -> int:
        """Encrypt all of `data` into the outgoing BIO; its length."""
        done = 0
        try:
            while done < len(data):
                done += self._ssl.write(data[done:])
        except ssl.SSLError as error:
            raise _broken(error) from None
        return done

    def _decrypt(self, buffer: memoryview) -> int:
        """Fill `buffer` from what was received; 0 if there is nothing in it for it.

        A failure behind some bytes is kept for the next call.
        """
        if self._failure is not None:
            raise self._failure
        filled = 0
        self.has_pending = True
        try:
            while filled < len(buffer):
                # With a buffer it returns a number, whatever the stubs say.
                length = cast(int, self._ssl.read(len(buffer) - filled, buffer[filled:]))
                if not length:
                    self._ended = True
                    break
                filled += length
        except ssl.SSLWantReadError:
            self.has_pending = False
        except ssl.SSLEOFError:
            # Without a good-bye. NBD has its own, and no message ends where its stream does.
            self._ended = True
        except ssl.SSLError as error:
            self._failure = _broken(error)
        if self._outgoing.pending > OUTGOING_BYTES_MAX:
            self._failure = ConnectionAbortedError("TLS: the peer asks for more alerts than it reads")
        if self._failure is not None:
            self.has_pending = True
            if not filled:
                raise self._failure
        return filled


def _broken(error: ssl.SSLError) -> ConnectionError:
    return ConnectionAbortedError(f"TLS: {explain(error)}")
