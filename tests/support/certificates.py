"""Certificates of a test's own making, in the directories that QEMU, libnbd, nbdkit and nbdbackup read.

    pki = Pki(tmp_path)
    serve(options=["--tls", "require", "--tls-creds", str(pki.server())])
    run("nbdinfo", uri + "?tls-certificates=" + str(pki.client("alice")))

A directory has `ca-cert.pem`, and the certificate and key of one side. Names are DNS names, or addresses;
the subject of a client's is `CN=<name>,OU=...,O=...`.
"""

import datetime
import ssl
from collections.abc import Sequence
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from nbdbackup.nbd.agreement import TlsMode
from nbdbackup.server.tls import Credentials, ServerTls
from nbdbackup.tls.names import PeerName

SERVER_NAMES = ("localhost", "127.0.0.1", "::1")
KEY = "0123456789abcdef0123456789abcdef"


class Pki:
    """An authority, and whom it vouches for; directories are made below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.authority = trustme.CA()

    def server(
        self,
        directory: str = "server-pki",
        *,
        names: tuple[str, ...] = SERVER_NAMES,
        expired: bool = False,
        trusts: "Pki | None" = None,
    ) -> Path:
        """A server's directory; `trusts`: whose clients, if not of the same authority."""
        path = self._directory(directory, trusts)
        not_after = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1) if expired else None
        self._store(path, "server", self.authority.issue_cert(*names, not_after=not_after))
        return path

    def client(
        self,
        name: str | None = "client.example",
        *,
        directory: str | None = None,
        expired: bool = False,
        trusts: "Pki | None" = None,
    ) -> Path:
        """A client's directory; None: without a certificate of its own."""
        path = self._directory(directory or f"client-pki-{name}", trusts)
        if name is not None:
            not_after = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1) if expired else None
            certificate = self.authority.issue_cert(name, common_name=name, not_after=not_after)
            self._store(path, "client", certificate)
        return path

    def revoke(self, directory: Path, client: Path) -> None:
        """Put a list into `directory` that revokes the certificate in `client`."""
        revoked = x509.load_pem_x509_certificate((client / "client-cert.pem").read_bytes())
        issuer = x509.load_pem_x509_certificate(self.authority.cert_pem.bytes())
        key = serialization.load_pem_private_key(self.authority.private_key_pem.bytes(), None)
        now = datetime.datetime.now(datetime.UTC)
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(revoked.serial_number)
            .revocation_date(now - datetime.timedelta(hours=1))
            .build()
        )
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(now - datetime.timedelta(hours=1))
            .next_update(now + datetime.timedelta(days=1))
            .add_revoked_certificate(entry)
        )
        revocations = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
        (directory / "ca-crl.pem").write_bytes(revocations.public_bytes(serialization.Encoding.PEM))

    def _directory(self, name: str, trusts: "Pki | None") -> Path:
        path = self.root / name
        path.mkdir()
        (trusts or self).authority.cert_pem.write_to_path(str(path / "ca-cert.pem"))
        return path

    def _store(self, path: Path, role: str, certificate: trustme.LeafCert) -> None:
        certificate.private_key_pem.write_to_path(str(path / f"{role}-key.pem"))
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(str(path / f"{role}-cert.pem"), append=True)
        (path / f"{role}-key.pem").chmod(0o600)


def subject(directory: Path, role: str = "client") -> str:
    """The distinguished name of the certificate in `directory`, as RFC 4514 has it."""
    certificate = x509.load_pem_x509_certificate((directory / f"{role}-cert.pem").read_bytes())
    return certificate.subject.rfc4514_string()


def psk_file(path: Path, **keys: str) -> Path:
    """A file of pre-shared keys, hexadecimal; without `keys`, alice's."""
    path.write_text("".join(f"{name}:{key}\n" for name, key in (keys or {"alice": KEY}).items()))
    return path


def server_tls(context: ssl.SSLContext, authorised: Sequence[PeerName] | None = None) -> ServerTls:
    """TLS that every client must use, with credentials that do not change."""
    credentials = Credentials(context, authorised)
    return ServerTls(TlsMode.REQUIRE, lambda: credentials)
