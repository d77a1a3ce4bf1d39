"""Exports for certain clients: others find nothing there, whichever way they ask; and credentials renewed."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.certificates import KEY, Pki, psk_file, subject
from tests.support.disks import MIB, make_disk
from tests.support.newer_peers import newer
from tests.support.peers import require
from tests.support.processes import attempt, run, wait_until
from tests.support.raw_client import (
    ERR_UNKNOWN,
    OPT_GO,
    OPT_INFO,
    OPT_LIST_META,
    OPT_SET_META,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    REP_ACK,
    RawClient,
    go_data,
    meta_query,
    wrapped,
)
from tests.support.server import COMMAND, Server

EVERYBODY = {"open", "open@s"}


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def disks(tmp_path: Path) -> dict[str, Path]:
    """Of MIB, 2 MIB and 3 MIB, so that the size tells them apart."""
    return {
        name: make_disk(tmp_path / f"{name}.img", size * MIB)
        for size, name in enumerate(("secret", "open", "shared"), start=1)
    }


def listed(server: Server, certificates: Path, nbdinfo: tuple[str, ...] = ()) -> set[str]:
    """What LIST shows to a client with `certificates`."""
    told = run(
        *(nbdinfo or (require("nbdinfo"),)),
        "--list",
        "--json",
        server.uri("", "tcp", certificates=certificates),
    )
    return {export["export-name"] for export in json.loads(told)["exports"]}


def size_of(uri: str) -> int | None:
    """What a client learns from `uri`, None if there is nothing for it."""
    result = attempt(require("nbdinfo"), "--size", uri)
    return int(result.stdout) if result.returncode == 0 else None


def test_export_and_its_snapshots_are_there_for_the_named_clients_alone(
    serve: ServeFunction, pki: Pki, disks: dict[str, Path]
) -> None:
    alice, bob, nobody = pki.client("alice"), pki.client("bob"), pki.client(None)
    authz = [f"secret={subject(alice)}", f"shared={subject(alice)}", f"shared={subject(bob)}"]
    words = [word for entry in authz for word in ("--export-authz", entry)]
    server = serve(disks, options=["--tls-creds", str(pki.server()), *words])
    server.cli("snapshot", "create", *disks, "--name", "s")
    shown = {
        alice: EVERYBODY | {"secret", "secret@s", "shared", "shared@s"},
        bob: EVERYBODY | {"shared", "shared@s"},
        nobody: EVERYBODY,
    }
    for client, expected in shown.items():
        assert listed(server, client) == listed(server, client, tuple(newer("nbdinfo"))) == expected
        for export in sorted(shown[alice]):
            # By GO with nbdinfo; "secret" is the first source, so the default one for alice alone.
            size = disks[export.removesuffix("@s")].stat().st_size
            assert size_of(server.uri(export, "tcp", certificates=client)) == (
                size if export in expected else None
            )
        assert size_of(server.uri("", "tcp", certificates=client)) == (MIB if "secret" in expected else None)
    assert "export secret is hidden from" in server.log()
    assert subject(bob) in server.log()


def test_hidden_export_is_answered_like_a_name_that_nobody_has(
    serve: ServeFunction, pki: Pki, disks: dict[str, Path]
) -> None:
    alice, bob = pki.client("alice"), pki.client("bob")
    words = ["--export-authz", f"secret={subject(alice)}"]
    server = serve(disks, options=["--tls-creds", str(pki.server()), *words])
    for option, data in (
        (OPT_INFO, go_data),
        (OPT_GO, go_data),
        (OPT_LIST_META, meta_query),
        (OPT_SET_META, meta_query),
    ):
        with RawClient(server) as client:
            client.greet()
            assert client.option(OPT_STARTTLS)[-1].kind == REP_ACK
            wrapped(client, bob)
            assert client.option(OPT_STRUCTURED_REPLY)[-1].kind == REP_ACK
            hidden, unknown = client.option(option, data("secret")), client.option(option, data("nosuch"))
            assert [reply.kind for reply in hidden] == [reply.kind for reply in unknown] == [ERR_UNKNOWN]
            assert hidden[0].data == unknown[0].data.replace(b"nosuch", b"secret")
    with RawClient(server) as client:
        client.greet()
        client.option(OPT_STARTTLS)
        wrapped(client, bob)
        client.send_option(1, b"secret")
        assert client.is_closed()


def test_where_tls_is_a_choice_such_an_export_is_for_tls_alone(
    serve: ServeFunction, pki: Pki, disks: dict[str, Path]
) -> None:
    alice = pki.client("alice")
    words = ["--tls", "on", "--export-authz", f"secret={subject(alice)}"]
    server = serve(disks, options=["--tls-creds", str(pki.server()), *words])
    told = json.loads(run(require("nbdinfo"), "--list", "--json", server.uri("")))
    assert {export["export-name"] for export in told["exports"]} == {"open", "shared"}
    assert size_of(server.uri("secret", "tcp")) is None
    assert size_of(server.uri("secret", "tcp", certificates=alice)) == MIB


@pytest.mark.skipif(sys.version_info < (3, 13), reason="TLS with pre-shared keys needs Python 3.13")
@pytest.mark.parametrize("priority", ["", ":-VERS-TLS1.3"], ids=["tls1.3", "tls1.2"])
def test_with_keys_the_name_of_the_key_counts(
    tmp_path: Path, serve: ServeFunction, disks: dict[str, Path], priority: str
) -> None:
    keys = psk_file(tmp_path / "keys.psk", alice=KEY, bob="f" * 32)
    server = serve(disks, options=["--tls-psk", str(keys), "--export-authz", "secret=alice"])
    place = f"127.0.0.1:{server.port}/secret?tls-psk-file={keys}"
    if priority:
        place += f"&tls-priority=NORMAL{priority}:%2BECDHE-PSK:%2BDHE-PSK:%2BPSK"
    words = newer("nbdinfo") if priority else [require("nbdinfo")]
    assert run(*words, "--size", f"nbds://alice@{place}").strip() == str(MIB)
    assert attempt(*words, "--size", f"nbds://bob@{place}").returncode != 0
    assert run(*words, "--size", f"nbds://bob@{place}".replace("/secret?", "/open?")).strip() == str(2 * MIB)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--export-authz", "secret=CN=a"], "needs --tls-creds or --tls-psk"),
        (
            ["--tls-creds", "PKI", "--export-authz", "other=CN=a"],
            "not EXPORT=NAME with an EXPORT out of secret",
        ),
        (["--tls-creds", "PKI", "--export-authz", "secret="], "names no client"),
        (["--tls-creds", "PKI", "--export-authz", "secret=alice"], "'alice' is no distinguished name"),
    ],
)
def test_what_names_no_export_or_client_ends_the_start(
    pki: Pki, disks: dict[str, Path], arguments: list[str], told: str
) -> None:
    words = [str(pki.server()) if word == "PKI" else word for word in arguments]
    places = ("-p", "0", "--state-dir", str(pki.root / "state"), "--control", str(pki.root / "c"))
    refused = attempt(*COMMAND, "serve", *places, *words, f"secret={disks['secret']}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert told in refused.stderr


# Credentials renewed while the server runs.


def replace_with(directory: Path, other: Path, *names: str) -> None:
    """Put `names` of `other` into `directory`, as certificate managers do: each in one step."""
    for name in names:
        shutil.copy(other / name, directory / f"{name}.new")
        os.replace(directory / f"{name}.new", directory / name)


def test_renewed_certificate_is_used_without_a_restart_and_a_broken_one_is_not(
    serve: ServeFunction, pki: Pki, disks: dict[str, Path]
) -> None:
    directory = pki.server()
    (pki.root / "renewed").mkdir()
    renewed = Pki(pki.root / "renewed")
    old_client, new_client = pki.client("old"), renewed.client("new")
    server = serve(disks, options=["--tls-creds", str(directory)])
    old, new = (server.uri("open", "tcp", certificates=client) for client in (old_client, new_client))
    assert (size_of(old), size_of(new)) == (2 * MIB, None)
    # Half of a renewal: no certificate and its key.
    other = renewed.server()
    replace_with(directory, other, "server-cert.pem")
    assert (size_of(old), size_of(new)) == (2 * MIB, None)
    assert size_of(old) == 2 * MIB
    (complaint,) = [line for line in server.log().splitlines() if "the old ones stay" in line]
    assert "server-key.pem is not the key of" in complaint
    replace_with(directory, other, "server-key.pem", "ca-cert.pem")
    assert (size_of(old), size_of(new)) == (None, 2 * MIB)
    (directory / "server-key.pem").unlink()
    assert size_of(new) == 2 * MIB
    assert "the old ones stay: no TLS without" in server.log()


def test_revocation_and_list_of_names_count_from_the_next_connection(
    tmp_path: Path, serve: ServeFunction, pki: Pki, disks: dict[str, Path]
) -> None:
    directory, alice, bob = pki.server(), pki.client("alice"), pki.client("bob")
    names = tmp_path / "names"
    names.write_text(f"{subject(alice)}\n")
    server = serve(disks, options=["--tls-creds", str(directory), "--tls-authz-file", str(names)])
    uris = [server.uri("open", "tcp", certificates=client) for client in (alice, bob)]
    assert [size_of(uri) for uri in uris] == [2 * MIB, None]
    names.write_text(f"{subject(alice)}\n{subject(bob)}\n")
    assert [size_of(uri) for uri in uris] == [2 * MIB, 2 * MIB]
    pki.revoke(directory, alice)
    assert [size_of(uri) for uri in uris] == [None, 2 * MIB]
    wait_until(lambda: "certificate revoked" in server.log(), "a line on the revoked one")
