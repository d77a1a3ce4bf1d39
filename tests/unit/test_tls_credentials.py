"""Credentials: what a server could not be used with is refused when it starts, in a line with the reason."""

import ssl
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from nbdbackup.errors import UsageError
from nbdbackup.tls.credentials import (
    client_context,
    client_psk_context,
    server_context,
    server_psk_context,
)
from nbdbackup.tls.keys import Keys
from tests.support.certificates import KEY, Pki, psk_file

OLD = sys.version_info < (3, 13)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, hostname: str | None = None) -> ssl.SSLObject:
    """Both sides in memory; the server's, once both are content."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server, server_hostname=hostname)
    for _ in range(5):
        for side in (theirs, ours):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    assert ours.version()
    return ours


def refusal(directory: Path, verify_peer: bool = False) -> str:
    with pytest.raises(UsageError) as caught:
        server_context(directory, verify_peer=verify_peer)
    line = str(caught.value)
    assert "\n" not in line
    assert str(directory) in line
    return line


def test_26_nothing_older_than_tls_1_2_and_no_renegotiation_or_resumption(pki: Pki) -> None:
    for context in (server_context(pki.server(), verify_peer=True), client_context(pki.client())):
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
        wanted = ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
        assert context.options & wanted == wanted


def test_26_client_of_tls_1_1_is_refused_and_one_of_1_2_is_not(pki: Pki) -> None:
    server = server_context(pki.server(), verify_peer=False)
    old = client_context(pki.client())
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake_hands(server, old, "localhost").version() == "TLSv1.2"
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        shake_hands(server, old, "localhost")


@pytest.mark.parametrize("missing", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_missing_file_is_named(pki: Pki, missing: str) -> None:
    directory = pki.server()
    (directory / missing).unlink()
    assert missing in refusal(directory)


@pytest.mark.parametrize("spoilt", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_file_that_is_no_pem_is_named(pki: Pki, spoilt: str) -> None:
    directory = pki.server()
    (directory / spoilt).write_text("nonsense")
    assert spoilt in refusal(directory)


def test_key_of_another_certificate_is_refused(pki: Pki) -> None:
    directory, other = pki.server("a"), pki.server("b")
    (directory / "server-key.pem").write_bytes((other / "server-key.pem").read_bytes())
    assert "is not the key of" in refusal(directory)


def test_encrypted_key_is_refused_rather_than_asked_for_its_password(pki: Pki) -> None:
    directory = pki.server()
    key = directory / "server-key.pem"
    secret = serialization.BestAvailableEncryption(b"secret")
    decrypted = serialization.load_pem_private_key(key.read_bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    key.write_bytes(decrypted.private_bytes(*form, secret))
    assert "is encrypted" in refusal(directory)


def test_certificate_that_every_client_would_refuse_is_refused_at_the_start(pki: Pki, tmp_path: Path) -> None:
    assert "expired" in refusal(pki.server("old", expired=True))
    (tmp_path / "other").mkdir()
    assert "would be refused by every client" in refusal(pki.server("lost", trusts=Pki(tmp_path / "other")))


def test_client_needs_a_certificate_of_the_authority_where_peers_are_verified(
    pki: Pki, tmp_path: Path
) -> None:
    server = server_context(pki.server(), verify_peer=True)
    name = shake_hands(server, client_context(pki.client("alice")), "localhost").getpeercert()
    assert name is not None
    assert (("commonName", "alice"),) in name["subject"]
    (tmp_path / "other").mkdir()
    others = Pki(tmp_path / "other")
    for directory in (
        pki.client(None),
        pki.client("late", expired=True),
        others.client("mallory", trusts=pki),
    ):
        with pytest.raises(ssl.SSLError):
            shake_hands(server, client_context(directory), "localhost")


def test_revoked_certificate_is_refused_and_the_others_are_not(pki: Pki) -> None:
    directory, alice, bob = pki.server(), pki.client("alice"), pki.client("bob")
    pki.revoke(directory, bob)
    server = server_context(directory, verify_peer=True)
    shake_hands(server, client_context(alice), "localhost")
    with pytest.raises(ssl.SSLError, match="revoked"):
        shake_hands(server, client_context(bob), "localhost")


def test_client_verifies_the_servers_name_and_authority_unless_told_not_to(pki: Pki, tmp_path: Path) -> None:
    server = server_context(pki.server(names=("disks.example", "127.0.0.1")), verify_peer=False)
    directory = pki.client()
    for name in ("disks.example", "127.0.0.1"):
        shake_hands(server, client_context(directory), name)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(server, client_context(directory), "other.example")
    shake_hands(server, client_context(directory, check_hostname=False), None)
    (tmp_path / "other").mkdir()
    stranger = Pki(tmp_path / "other").client()
    for context in (client_context(stranger, check_hostname=False), client_context()):
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(server, context, "disks.example")
    shake_hands(server, client_context(stranger, verify_peer=False), None)
    with pytest.raises(UsageError, match="no directory"):
        client_context(tmp_path / "nowhere", verify_peer=False)


def test_client_with_half_a_certificate_is_told_what_is_missing(pki: Pki) -> None:
    directory = pki.client("alice")
    (directory / "client-key.pem").unlink()
    with pytest.raises(UsageError, match=r"client-key\.pem"):
        client_context(directory)


# Pre-shared keys.


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "has no keys"),
        ("alice", "line 1: not NAME:HEX"),
        ("alice:xyz", "line 1: not NAME:HEX"),
        (f":{KEY}", "line 1: not NAME:HEX"),
        ("\nalice:0123", "line 2: a key has at least 16 bytes"),
        (f"alice:{KEY}\nalice:{KEY}", "line 2: 'alice' has a key already"),
        ("#" * (2 << 20), "longer than 1 MiB"),
    ],
)
def test_malformed_keys_are_refused_without_telling_them(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(content)
    with pytest.raises(UsageError, match=told) as caught:
        Keys.load(path)
    assert KEY not in str(caught.value)
    with pytest.raises(UsageError, match="No such file"):
        Keys.load(tmp_path / "none")


def test_keys_are_read_as_psktool_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(f"# keys\nalice:{KEY}\n\nbob:{KEY.upper()}00\n")
    assert Keys.load(path) == {"alice": bytes.fromhex(KEY), "bob": bytes.fromhex(KEY + "00")}


@pytest.mark.skipif(not OLD, reason="this Python has TLS with pre-shared keys")
def test_keys_are_refused_by_an_old_python_in_words(tmp_path: Path) -> None:
    path = psk_file(tmp_path / "keys.psk")
    told = r"needs Python 3\.13 or later.*use certificates"
    with pytest.raises(UsageError, match=told):
        server_psk_context(path)
    with pytest.raises(UsageError, match=told):
        client_psk_context(path, "alice")


@pytest.mark.skipif(OLD, reason="TLS with pre-shared keys needs Python 3.13")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_only_who_has_the_key_gets_in(tmp_path: Path, version: ssl.TLSVersion) -> None:
    path = psk_file(tmp_path / "keys.psk", alice=KEY, bob="f" * 32)
    server = server_psk_context(path)
    server.maximum_version = version
    assert shake_hands(server, client_psk_context(path, "alice")).version()
    wrong = psk_file(tmp_path / "wrong.psk", alice="f" * 32, mallory=KEY)
    for name in ("alice", "mallory"):
        with pytest.raises(ssl.SSLError):
            shake_hands(server, client_psk_context(wrong, name))
    with pytest.raises(UsageError, match="no key of 'carol'"):
        client_psk_context(path, "carol")
