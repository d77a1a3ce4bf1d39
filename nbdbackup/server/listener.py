"""Listening sockets: TCP and Unix."""

import errno
import os
import socket
import stat
from dataclasses import dataclass

from nbdbackup.errors import ConflictError, DeviceError, UsageError
from nbdbackup.nbd.uri import format_tcp, format_unix

BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Listener:
    """One bound, listening, non-blocking socket: TCP at (host, port), or Unix at `path`."""

    sock: socket.socket
    address: tuple[str, int] = ("", 0)
    path: str | None = None
    """Removed when the listener is closed."""

    def uri(self, export: str = "") -> str:
        """The NBD URI of `export` here; also what it was, once the listener is closed."""
        if self.path is not None:
            return format_unix(self.path, export)
        return format_tcp(*self.address, export)

    def close(self) -> None:
        """Stop listening. Once closed, the path is not ours any more: another server may have it."""
        if self.sock.fileno() < 0:
            return
        self.sock.close()
        if self.path is not None:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass


def listen_tcp(host: str, port: int) -> Listener:
    """Listen on `host`:`port`; port 0 picks a free one.

    Raises:
        UsageError: no such address here. ConflictError: the port is in use. DeviceError: not permitted.
    """
    where = f"{host}:{port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UsageError(f"cannot listen on {where}: {error.strerror}") from None
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _bind_error(where, error, "choose another with -p, or -p 0 for any free one") from error
    return Listener(sock, address=sock.getsockname()[:2])


def listen_unix(path: str) -> Listener:
    """Listen on a Unix socket at `path`; a stale socket there, with nobody listening, is replaced.

    Raises:
        ConflictError: somebody listens there, or something that is no socket is in the way.
        UsageError: the path is too long. DeviceError: it cannot be made.
    """
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno is None:
            raise UsageError(f"cannot listen on {path}: the path is too long for a socket") from None
        raise _bind_error(path, error, "choose another path") from error
    return Listener(sock, path=path)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConflictError(f"cannot listen on {path}: a file that is no socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise _bind_error(path, error, "choose another path") from error
            raise ConflictError(f"cannot listen on {path}: another server listens there") from None
        else:
            raise ConflictError(f"cannot listen on {path}: another server listens there")


def _bind_error(where: str, error: OSError, advice: str) -> Exception:
    line = f"cannot listen on {where}: {os.strerror(error.errno or errno.EIO)}; {advice}"
    if error.errno == errno.EADDRINUSE:
        return ConflictError(line)
    return DeviceError(error.errno or errno.EIO, line)
