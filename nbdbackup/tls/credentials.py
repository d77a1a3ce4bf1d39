"""TLS contexts from the files that QEMU, libnbd and nbdkit use too.

A directory of certificates:

    ca-cert.pem                        whom the other side's certificate must be signed by
    ca-crl.pem                         optional: certificates that are revoked
    server-cert.pem, server-key.pem    this server's own
    client-cert.pem, client-key.pem    this client's own, if the server wants one

Or a file of pre-shared keys, a line `NAME:HEX` for each client (`psktool` writes it).

Law: nothing older than TLS 1.2, no renegotiation (a read would have to write), no compression, and
no resumption, so that every connection proves anew who it is. A context is checked when it is made:
what every client would refuse is told to whoever starts the server, in one line.
"""

import ssl
import sys
from pathlib import Path

from nbdbackup.errors import UsageError
from nbdbackup.tls.keys import Keys

CA_CERTIFICATE = "ca-cert.pem"
REVOKED = "ca-crl.pem"
# TLS 1.2 with forward secrecy; 1.3 has its own suites, and always has it.
_PSK_CIPHERS = "kECDHEPSK+CHACHA20:kECDHEPSK"


class PskServerContext(ssl.SSLContext):
    """A server's context that remembers who was asked for.

    OpenSSL asks for a key without saying for which connection, but in the middle of a step of that one's
    handshake: who takes that step clears `identity` before and reads it after.
    """

    identity: str | None = None
    """Whose key was given out last."""


def server_context(directory: Path, *, verify_peer: bool, ask_peer: bool = False) -> ssl.SSLContext:
    """The server's side with the certificates in `directory`.

    `verify_peer`: clients must show one too; `ask_peer`: they may, and if they do, it must be a good one.

    Raises:
        UsageError: a file is missing or unfit, or the server's certificate is none that its CA vouches for.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    _load_own(context, directory, "server")
    _check_own(context, directory)
    if verify_peer or ask_peer:
        context.verify_mode = ssl.CERT_REQUIRED if verify_peer else ssl.CERT_OPTIONAL
        _load_authority(context, directory)
    return context


def server_files(directory: Path) -> list[Path]:
    """What `server_context` reads of `directory`; the last one need not be there."""
    return [directory / name for name in ("server-cert.pem", "server-key.pem", CA_CERTIFICATE, REVOKED)]


def server_psk_context(path: Path) -> PskServerContext:
    """The server's side with the keys in `path`.

    Raises:
        UsageError: the file is missing or malformed, or this Python is older than 3.13.
    """
    _need_psk()
    keys = Keys.load(path)
    context = PskServerContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    context.set_ciphers(_PSK_CIPHERS)

    def key_of(identity: str | None) -> bytes:
        context.identity = identity if identity in keys else None
        # An empty key ends the handshake.
        return keys.get(identity or "", b"")

    if sys.version_info >= (3, 13):
        context.set_psk_server_callback(key_of)
    return context


def client_context(
    directory: Path | None = None, *, verify_peer: bool = True, check_hostname: bool = True
) -> ssl.SSLContext:
    """The client's side with the certificates in `directory`; without one, with the system's authorities.

    `verify_peer`: the server's certificate must be signed by one of them, and, with `check_hostname`, be
    for the name that the handshake is told.

    Raises:
        UsageError: a file is missing or unfit.
    """
    if directory is not None and not directory.is_dir():
        raise UsageError(f"there is no directory of certificates {directory}")
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = check_hostname and verify_peer
    if not verify_peer:
        context.verify_mode = ssl.CERT_NONE
    elif directory is not None:
        _load_authority(context, directory)
    else:
        context.load_default_certs()
    if directory is not None and any((directory / f"client-{what}.pem").exists() for what in ("cert", "key")):
        _load_own(context, directory, "client")
    return context


def client_psk_context(path: Path, username: str) -> ssl.SSLContext:
    """The client's side with the key of `username` in `path`, which also proves who the server is.

    Raises:
        UsageError: the file is missing or malformed or has no such name, or this Python is older than 3.13.
    """
    _need_psk()
    keys = Keys.load(path)
    if username not in keys:
        raise UsageError(f"{path} has no key of {username!r}; write NAME@ before the host of the URI")
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers(_PSK_CIPHERS)
    if sys.version_info >= (3, 13):
        context.set_psk_client_callback(lambda hint: (username, keys[username]))
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    _harden(context)
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    if context.protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0


def _need_psk() -> None:
    if sys.version_info < (3, 13) or not ssl.HAS_PSK:
        raise UsageError(
            "TLS with pre-shared keys needs Python 3.13 or later, and this is "
            f"{sys.version_info.major}.{sys.version_info.minor}: use certificates"
        )


def _load_own(context: ssl.SSLContext, directory: Path, role: str) -> None:
    certificate, key = directory / f"{role}-cert.pem", directory / f"{role}-key.pem"
    for path in (certificate, key):
        _check_readable(path)

    def no_password() -> str:
        raise UsageError(f"{key} is encrypted, and nobody is here to type its password: store it decrypted")

    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"{key} is not the key of {certificate}") from None
        raise UsageError(
            f"{certificate} and {key} are no certificate and its key: {explain(error)}"
        ) from None


def _load_authority(context: ssl.SSLContext, directory: Path) -> None:
    for path in (directory / CA_CERTIFICATE, directory / REVOKED):
        if path.name == REVOKED:
            if not path.exists():
                continue
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        _check_readable(path)
        try:
            context.load_verify_locations(path)
        except ssl.SSLError as error:
            raise UsageError(f"{path} has no certificates in PEM: {explain(error)}") from None


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise UsageError(f"no TLS without {path}: {error.strerror}") from None


def _check_own(context: ssl.SSLContext, directory: Path) -> None:
    """Shake hands with ourselves, as a client that trusts the directory's CA."""
    judge = _context(ssl.PROTOCOL_TLS_CLIENT)
    judge.check_hostname = False
    _load_authority(judge, directory)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = judge.wrap_bio(to_client, to_server)
    try:
        for _ in range(4):
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    pass
    except ssl.SSLError as error:
        path = directory / "server-cert.pem"
        raise UsageError(f"{path} would be refused by every client: {explain(error)}") from None


def explain(error: ssl.SSLError) -> str:
    """What OpenSSL means, for a person."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message or "the certificate cannot be verified"
    if error.reason:
        return error.reason.lower().replace("_", " ")
    return error.strerror or str(error)
