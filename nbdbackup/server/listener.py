"""Listening sockets: TCP and Unix."""

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from nbdbackup.errors import ConflictError, DeviceError, UsageError
from nbdbackup.nbd.uri import format_tcp, format_unix

BACKLOG = 128

AddressRange: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Listener(msgspec.Struct, frozen=True):
    """One bound, listening, non-blocking socket: TCP at (host, port), or Unix at `path`."""

    sock: socket.socket
    address: tuple[str, int] = ("", 0)
    path: str | None = None
    owns_path: bool = True
    """Whether `path` is removed when the listener is closed."""

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        """The NBD URI of `export` here, for use with TLS or without; what it was, once closed."""
        if self.path is not None:
            return format_unix(self.path, export, tls=tls)
        return format_tcp(*self.address, export, tls=tls)

    @property
    def is_public(self) -> bool:
        """Whether other machines may be able to connect."""
        if self.sock.family == socket.AF_UNIX:
            return False
        return not ipaddress.ip_address(self.address[0].partition("%")[0]).is_loopback

    def close(self) -> None:
        """Stop listening. Once closed, the path is not ours any more: another server may have it."""
        if self.sock.fileno() < 0:
            return
        self.sock.close()
        if self.path is not None and self.owns_path:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass


def parse_range(text: str) -> AddressRange:
    """An address, or a range of them in CIDR notation.

    Raises:
        UsageError: it is neither.
    """
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise UsageError(
            f"'{text}' is no address range: write an address, or ADDRESS/BITS as in 10.0.0.0/8"
        ) from None


def is_allowed(family: int, address: tuple[object, ...] | str, allowed: Sequence[AddressRange]) -> bool:
    """Whether a client at `address`, as `accept` tells it, may connect; no range allows everybody.

    A Unix socket is not asked: its directory and mode say who may.
    """
    if not allowed or family == socket.AF_UNIX:
        return True
    client = ipaddress.ip_address(str(address[0]).partition("%")[0])
    if isinstance(client, ipaddress.IPv6Address) and client.ipv4_mapped is not None:
        client = client.ipv4_mapped
    return any(client.version == network.version and client in network for network in allowed)


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


def adopt(descriptor: int, name: str) -> Listener:
    """Listen on a socket that is open as `descriptor` and listens already; its owner calls it `name`.

    Raises:
        UsageError: it is no listening stream socket of a family that NBD is served on.
    """
    what = f"inherited socket {descriptor}" + (f" ({name})" if name else "")
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise UsageError(f"{what} cannot be used: {os.strerror(error.errno or errno.EBADF)}") from None
    if sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        problem = "is neither TCP nor a Unix socket"
    elif sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        problem = "is no stream socket that listens: use ListenStream= and Accept=no"
    else:
        sock.setblocking(False)
        sock.set_inheritable(False)
        name_there = sock.getsockname()
        if sock.family != socket.AF_UNIX:
            return Listener(sock, address=name_there[:2])
        # One in the abstract name space has bytes for its name, and no URI.
        return Listener(sock, path=name_there if isinstance(name_there, str) else "", owns_path=False)
    sock.detach()
    raise UsageError(f"{what} {problem}")


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
