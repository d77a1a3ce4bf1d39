"""TLS with peers that have their own: QEMU, libnbd and fio as clients, and those that must not come in.

Numbers in names are those of the conformance list.
"""

import json
import ssl
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.interop.test_fio import fio_command
from tests.support.certificates import KEY, Pki, psk_file, subject
from tests.support.disks import MIB, make_disk, make_sparse, sha256
from tests.support.peers import require, require_libnbd_python
from tests.support.processes import attempt, run, wait_until
from tests.support.raw_client import (
    CMD_READ,
    ERR_INVALID,
    ERR_POLICY,
    OPT_ABORT,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    REP_ACK,
    REP_ERROR,
    RawClient,
    go_data,
    wrapped,
)
from tests.support.server import Server

ERR_TLS_REQD = REP_ERROR | 5
SIZE = 8 * MIB
transports = pytest.mark.parametrize("transport", ["unix", "tcp"])


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.img", SIZE)


@pytest.fixture
def client(pki: Pki) -> Path:
    """A client's directory."""
    return pki.client()


@pytest.fixture
def server(serve: ServeFunction, pki: Pki, disk: Path) -> Server:
    """One that requires TLS, of every client."""
    return serve(disk=disk, options=["--tls", "require", "--tls-creds", str(pki.server())])


def qemu_options(certificates: Path) -> list[str]:
    return ["--object", f"tls-creds-x509,id=tls,dir={certificates},endpoint=client"]


def qemu_image(server: Server, export: str, transport: str) -> str:
    """The `--image-opts` of an export with TLS."""
    place = f"host=127.0.0.1,port={server.port}" if transport == "tcp" else f"path={server.socket_path}"
    hostname = "" if transport == "tcp" else ",tls-hostname=localhost"
    return f"driver=nbd,{place},export={export},tls-creds=tls{hostname}"


def start_tls(client: RawClient, certificates: Path) -> RawClient:
    client.greet()
    assert [reply.kind for reply in client.option(OPT_STARTTLS)] == [REP_ACK]
    return wrapped(client, certificates)


def assert_logged(server: Server, *words: str) -> None:
    def found() -> bool:
        return any(all(word in line for word in words) for line in server.log().splitlines())

    wait_until(found, f"a line of the log with {words}")


# Peers.


@transports
def test_qemu_img_copies_over_tls_both_ways(
    tmp_path: Path, server: Server, client: Path, transport: str
) -> None:
    convert = [require("qemu-img"), "convert", *qemu_options(client)]
    image = make_disk(tmp_path / "image.img", SIZE, seed=5)
    target = qemu_image(server, "disk", transport)
    run(*convert, "-n", "-f", "raw", "--target-image-opts", image, target)
    assert sha256(tmp_path / "disk.img") == sha256(image)
    run(*convert, "-m", "16", "-W", "-O", "raw", "--image-opts", target, tmp_path / "copy.img")
    assert sha256(tmp_path / "copy.img") == sha256(image)


def test_qemu_io_reads_what_it_wrote_over_tls(server: Server, client: Path) -> None:
    commands = [
        "write -P 7 1M 3M",
        "write -z 2M 64k",
        "flush",
        "read -P 7 1M 1M",
        "read -P 0 2M 64k",
        "discard 3M 1M",
    ]
    words = [word for command in commands for word in ("-c", command)]
    image = qemu_image(server, "disk", "tcp")
    output = run(require("qemu-io"), *qemu_options(client), *words, "--image-opts", image)
    assert "verification failed" not in output
    assert output.count("read 1048576/1048576") == 1


def test_qemu_nbd_lists_over_tls(server: Server, client: Path) -> None:
    listed = run(
        *(require("qemu-nbd"), "--list", "-b", "127.0.0.1", "-p", str(server.port)),
        *(*qemu_options(client), "--tls-creds", "tls"),
    )
    assert "export: 'disk'" in listed
    assert f"size:  {SIZE}" in listed


@transports
def test_libnbd_speaks_tls_and_says_so(server: Server, client: Path, transport: str) -> None:
    uri = server.uri("disk", transport, certificates=client)
    info = json.loads(run(require("nbdinfo"), "--json", uri))
    assert info["TLS"]
    assert info["structured"]
    assert info["exports"][0]["export-size"] == SIZE
    assert "base:allocation" in info["exports"][0]["contexts"]
    assert run(require("nbdinfo"), "--map", uri)


@transports
def test_nbdcopy_on_four_connections_over_tls_is_byte_exact_both_ways(
    tmp_path: Path, serve: ServeFunction, pki: Pki, client: Path, transport: str
) -> None:
    image = make_disk(tmp_path / "image.img", 64 * MIB + 77, seed=2)
    target = make_sparse(tmp_path / "target.img", 64 * MIB + 77)
    server = serve(disk=target, options=["--tls-creds", str(pki.server())])
    four = ("--connections=4", "--requests=64", "--flush")
    uri = server.uri("disk", transport, certificates=client)
    run(require("nbdcopy"), *four, image, uri)
    assert sha256(target) == sha256(image)
    server.cli("snapshot", "create", "disk", "--name", "s")
    view = server.uri("disk@s", transport, certificates=client)
    run(require("nbdcopy"), *four, view, tmp_path / "copy.img")
    assert sha256(tmp_path / "copy.img") == sha256(image)


def test_crc_of_four_connections_at_depth_32_holds_over_tls(
    tmp_path: Path, serve: ServeFunction, pki: Pki
) -> None:
    size = 128 * MIB
    server = serve(disk=make_sparse(tmp_path / "disk.img", size), options=["--tls-creds", str(pki.server())])
    # fio lets no URI name files, and libnbd encrypts without them, too.
    command = fio_command(f"nbds+unix:///disk?socket={server.socket_path}", size, jobs=4)
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr
    report = json.loads(finished.stdout[finished.stdout.index("{") :])
    assert all(job["error"] == 0 for job in report["jobs"])


@pytest.mark.skipif(sys.version_info < (3, 13), reason="TLS with pre-shared keys needs Python 3.13")
def test_clients_with_a_key_come_in_and_others_do_not(
    tmp_path: Path, serve: ServeFunction, disk: Path
) -> None:
    keys = psk_file(tmp_path / "keys.psk")
    server = serve(disk=disk, options=["--tls-psk", str(keys)])
    place = f"127.0.0.1:{server.port}/disk?tls-psk-file="
    assert run(require("nbdinfo"), "--size", f"nbds://alice@{place}{keys}").strip() == str(SIZE)
    (tmp_path / "qemu").mkdir()
    psk_file(tmp_path / "qemu" / "keys.psk")
    options = f"tls-creds-psk,id=tls,dir={tmp_path / 'qemu'},username=alice,endpoint=client"
    run(
        *(require("qemu-img"), "info", "--object", options),
        *("--image-opts", f"driver=nbd,host=127.0.0.1,port={server.port},export=disk,tls-creds=tls"),
    )
    wrong = psk_file(tmp_path / "wrong.psk", alice="f" * 32, mallory=KEY)
    for name in ("alice", "mallory"):
        assert attempt(require("nbdinfo"), f"nbds://{name}@{place}{wrong}").returncode != 0
    assert attempt(require("nbdinfo"), f"nbd://127.0.0.1:{server.port}/disk").returncode != 0


# Modes.


def test_20_server_without_tls_says_so(serve: ServeFunction, disk: Path, client: Path) -> None:
    server = serve(disk=disk)
    with RawClient(server) as plain:
        plain.greet()
        assert plain.option(OPT_STARTTLS)[-1].kind == ERR_POLICY
        assert plain.option(OPT_LIST)[-1].kind == REP_ACK
    assert attempt(require("nbdinfo"), server.uri("disk", certificates=client)).returncode != 0


@transports
def test_21_client_without_tls_gets_tls_reqd_from_a_server_that_requires_it(
    server: Server, client: Path, transport: str
) -> None:
    with RawClient(server, transport) as plain:
        plain.greet()
        for option, data in (
            (OPT_LIST, b""),
            (OPT_INFO, go_data("disk")),
            (OPT_GO, go_data("disk")),
            (OPT_STRUCTURED_REPLY, b""),
            (77, b"unknown"),
        ):
            (reply,) = plain.option(option, data)
            assert reply.kind == ERR_TLS_REQD
            assert b"nbds://" in reply.data
        assert plain.option(OPT_ABORT)[-1].kind == REP_ACK
        assert plain.is_closed()
    with RawClient(server, transport) as plain:
        plain.greet()
        plain.send_option(1, b"disk")
        assert plain.is_closed()
    refused = attempt(require("nbdinfo"), server.uri("disk", transport).replace("nbds", "nbd", 1))
    assert refused.returncode != 0
    assert attempt(require("qemu-img"), "info", server.uri("disk", transport)).returncode != 0


def test_22_client_without_tls_sees_all_but_the_exports_for_tls_alone(
    tmp_path: Path, serve: ServeFunction, pki: Pki, client: Path, disk: Path
) -> None:
    server = serve(
        {"open": disk, "secret": make_disk(tmp_path / "secret.img", MIB)},
        options=["--tls", "on", "--tls-creds", str(pki.server()), "--tls-only", "secret"],
    )
    server.cli("snapshot", "create", "open", "secret", "--name", "s")

    def listed(uri: str) -> set[str]:
        return {
            export["export-name"]
            for export in json.loads(run(require("nbdinfo"), "--list", "--json", uri))["exports"]
        }

    assert listed(server.uri("")) == {"open", "open@s"}
    assert listed(server.uri("", certificates=client)) == {"open", "open@s", "secret", "secret@s"}
    for export in ("secret", "secret@s"):
        with RawClient(server) as plain:
            plain.greet()
            assert plain.option(OPT_GO, go_data(export))[-1].kind == ERR_TLS_REQD
            assert plain.option(OPT_GO, go_data("open"))[-1].kind == REP_ACK
        assert run(require("nbdinfo"), "--size", server.uri(export, certificates=client)).strip() == str(MIB)


def test_23_failed_tls_handshake_ends_the_connection(server: Server) -> None:
    with RawClient(server) as bad:
        bad.greet()
        assert bad.option(OPT_STARTTLS)[-1].kind == REP_ACK
        bad.send_option(OPT_LIST)
        # An alert at most, then the end: there is no way back to the clear.
        received = b""
        while part := bad.socket.recv(4096):
            received += part
        assert struct.pack(">Q", 0x3E889045565A9) not in received
    assert_logged(server, "WARNING", "TLS handshake failed")


def test_24_second_starttls_and_starttls_with_data_are_invalid(server: Server, client: Path) -> None:
    with RawClient(server) as peer:
        peer.greet()
        assert peer.option(OPT_STARTTLS, b"data")[-1].kind == ERR_INVALID
        assert peer.option(OPT_STARTTLS)[-1].kind == REP_ACK
        wrapped(peer, client)
        assert peer.option(OPT_STARTTLS)[-1].kind == ERR_INVALID
        assert peer.option(OPT_LIST)[-1].kind == REP_ACK


def test_25_what_was_agreed_on_in_the_clear_is_void_after_starttls(
    serve: ServeFunction, pki: Pki, client: Path, disk: Path
) -> None:
    server = serve(disk=disk, options=["--tls", "on", "--tls-creds", str(pki.server())])
    with RawClient(server) as peer:
        peer.greet()
        assert peer.option(OPT_STRUCTURED_REPLY)[-1].kind == REP_ACK
        assert peer.option(OPT_STARTTLS)[-1].kind == REP_ACK
        wrapped(peer, client)
        assert peer.option(OPT_GO, go_data("disk"))[-1].kind == REP_ACK
        peer.request(CMD_READ, 0, 4096)
        assert peer.simple_reply(4096).data == disk.read_bytes()[:4096]


def test_26_tls_1_1_is_not_spoken(server: Server, client: Path) -> None:
    with RawClient(server) as peer:
        peer.greet()
        peer.option(OPT_STARTTLS)
        context = ssl.create_default_context(cafile=str(client / "ca-cert.pem"))
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(peer.socket, server_hostname="localhost")
    assert_logged(server, "WARNING", "TLS handshake failed")


def test_27_request_in_the_clear_behind_starttls_is_never_answered(server: Server) -> None:
    with RawClient(server) as attacker:
        attacker.greet()
        starttls = struct.pack(">QII", 0x49484156454F5054, OPT_STARTTLS, 0)
        attacker.send(starttls + struct.pack(">QII", 0x49484156454F5054, OPT_LIST, 0))
        assert attacker.is_closed()
    assert_logged(server, "WARNING", "in the clear behind STARTTLS")


# Who may come in.


@pytest.fixture
def strict(serve: ServeFunction, pki: Pki, disk: Path) -> Server:
    """One that wants a certificate of every client."""
    return serve(disk=disk, options=["--tls-creds", str(pki.server()), "--tls-verify-peer"])


def size_of(server: Server, certificates: Path) -> int | None:
    """What a client with `certificates` learns, None if it is not let in."""
    result = attempt(require("nbdinfo"), "--size", server.uri("disk", "tcp", certificates=certificates))
    return int(result.stdout) if result.returncode == 0 else None


def test_only_clients_with_a_certificate_of_the_authority_come_in_where_peers_are_verified(
    tmp_path: Path, strict: Server, pki: Pki
) -> None:
    assert size_of(strict, pki.client("alice")) == SIZE
    assert size_of(strict, pki.client(None)) is None
    assert_logged(strict, "TLS handshake failed: peer did not return a certificate")
    assert size_of(strict, pki.client("late", expired=True)) is None
    assert_logged(strict, "TLS handshake failed: certificate has expired")
    (tmp_path / "other").mkdir()
    assert size_of(strict, Pki(tmp_path / "other").client("mallory", trusts=pki)) is None
    assert_logged(strict, "TLS handshake failed: unable to get local issuer certificate")
    assert size_of(strict, pki.client("bob")) == SIZE


def test_client_refuses_a_server_of_another_authority(tmp_path: Path, server: Server) -> None:
    (tmp_path / "other").mkdir()
    assert size_of(server, Pki(tmp_path / "other").client("alice")) is None


def test_revoked_certificate_does_not_come_in(serve: ServeFunction, pki: Pki, disk: Path) -> None:
    directory, alice, bob = pki.server(), pki.client("alice"), pki.client("bob")
    pki.revoke(directory, bob)
    server = serve(disk=disk, options=["--tls-creds", str(directory), "--tls-verify-peer"])
    assert size_of(server, alice) == SIZE
    assert size_of(server, bob) is None
    assert_logged(server, "TLS handshake failed: certificate revoked")


@pytest.mark.parametrize("by_file", [False, True])
def test_only_names_on_the_list_come_in(
    tmp_path: Path, serve: ServeFunction, pki: Pki, disk: Path, by_file: bool
) -> None:
    alice, bob, carol = (pki.client(name) for name in ("alice", "bob", "carol"))
    allowed = [subject(alice), subject(bob)]
    if by_file:
        (tmp_path / "names").write_text("\n".join(allowed) + "\n")
        options = ["--tls-authz-file", str(tmp_path / "names")]
    else:
        options = [word for name in allowed for word in ("--tls-authz", name)]
    server = serve(disk=disk, options=["--tls-creds", str(pki.server()), *options])
    assert [size_of(server, who) for who in (alice, bob, carol)] == [SIZE, SIZE, None]
    assert_logged(server, "WARNING", "not authorised", subject(carol))
    assert size_of(server, pki.client(None)) is None


# What is printed.


def test_uris_say_whether_tls_is_required(serve: ServeFunction, pki: Pki, disk: Path, tmp_path: Path) -> None:
    directory = str(pki.server())
    server = serve(disk=disk, options=["--tls", "on", "--tls-creds", directory])
    assert {uri.partition(":")[0] for uri in server.uris} == {"nbd", "nbd+unix"}
    server = serve(other=make_disk(tmp_path / "other.img", MIB), options=["--tls-creds", directory])
    assert {uri.partition(":")[0] for uri in server.uris} == {"nbds", "nbds+unix"}
    created = json.loads(server.cli("snapshot", "create", "other", "--json").stdout)
    assert "nbds+unix:///other" in json.dumps(created)


@pytest.mark.parametrize(
    ("tls", "warnings"),
    [([], 1), (["--tls", "on"], 1), (["--tls", "require"], 0)],
    ids=["off", "on", "require"],
)
def test_public_address_without_required_tls_is_warned_of_once(
    serve: ServeFunction, pki: Pki, disk: Path, tls: list[str], warnings: int
) -> None:
    credentials = ["--tls-creds", str(pki.server())] if tls else []
    server = serve(disk=disk, options=["-b", "0.0.0.0", "-p", "0", *tls, *credentials], tcp=False)
    lines = [line for line in server.log().splitlines() if "without TLS" in line]
    assert len(lines) == warnings
    assert all("WARNING" in line and "--tls require" in line for line in lines)


def test_unusable_credentials_end_the_start_with_one_line(pki: Pki, disk: Path) -> None:
    command = [sys.executable, "-m", "nbdbackup", "serve", "-p", "0", f"disk={disk}"]
    command += ["--state-dir", str(pki.root / "state"), "--control", str(pki.root / "c"), "--tls-creds"]
    for directory, told in (
        (pki.root / "nowhere", "No such file"),
        (pki.server("expired", expired=True), "certificate has expired"),
    ):
        refused = attempt(*command, directory)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.count("\n") == 1
        assert told in refused.stderr


def test_nbdsh_sees_structured_replies_and_contexts_after_starttls(server: Server, client: Path) -> None:
    script = f"""
import nbd
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.set_uri_allow_local_file(True)
h.connect_uri({server.uri("disk", "tcp", certificates=client)!r})
assert h.get_tls_negotiated()
assert h.get_structured_replies_negotiated()
assert h.can_meta_context("base:allocation")
h.pwrite(b"tls" * 100, 4093)
h.flush()
assert h.pread(300, 4093) == b"tls" * 100
h.shutdown()
"""
    run(require_libnbd_python(), "-c", script)
