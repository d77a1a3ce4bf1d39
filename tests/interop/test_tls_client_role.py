"""The client role over TLS: exports of our server, nbdkit and qemu-nbd, and servers not to be trusted."""

import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import ClassVar

import pytest

from nbdbackup.block.device import BlockDevice
from nbdbackup.block.memory import MemoryDevice
from nbdbackup.block.nbd import NbdDevice
from nbdbackup.block.nbd_inquiry import list_contexts, list_exports
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.errors import NbdBackupError, ProtocolError, UsageError
from nbdbackup.tls.credentials import server_context
from tests.conformance.device_suite import MIB, DeviceSuite, MakeDevice
from tests.conftest import ServeFunction
from tests.interop.test_remote_reconnect import Load
from tests.support.certificates import KEY, Pki, psk_file, server_tls
from tests.support.disks import make_disk, make_sparse, sha256
from tests.support.foreign_servers import ForeignServer, MakeCommand, nbdkit, qemu_nbd
from tests.support.own_server import serving
from tests.support.peers import require
from tests.support.processes import run

SIZE = 8 * MIB
ONCE = RemoteOptions(reconnect_delay_s=0, connections_max=1)
PSK = pytest.mark.skipif(sys.version_info < (3, 13), reason="TLS with pre-shared keys needs Python 3.13")


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def nbdkit_tls(certificates: Path, *arguments: str | Path, mode: str = "require") -> MakeCommand:
    return nbdkit(f"--tls={mode}", f"--tls-certificates={certificates}", *arguments)


def qemu_nbd_tls(image: Path, certificates: Path, *arguments: str, verify_peer: bool = False) -> MakeCommand:
    verify = "yes" if verify_peer else "no"
    options = f"tls-creds-x509,id=tls,dir={certificates},endpoint=server,verify-peer={verify}"
    return qemu_nbd(image, "--object", options, "--tls-creds", "tls", *arguments)


def uri_of(server: ForeignServer, export: str, **parameters: object) -> str:
    """An nbds+unix:// URI; underscores in the names of `parameters` are dashes."""
    rest = "".join(f"&{name.replace('_', '-')}={value}" for name, value in parameters.items())
    return f"nbds+unix:///{export}?socket={server.socket_path}{rest}"


class TestOwnServer(DeviceSuite):
    sparse_size: ClassVar[int] = 64 * MIB + 513

    @pytest.fixture
    async def make_device(self, pki: Pki) -> AsyncIterator[MakeDevice]:
        tls = server_tls(server_context(pki.server(), verify_peer=True))
        client = pki.client()
        async with AsyncExitStack() as stack:

            async def make(size: int, content: Mapping[int, bytes]) -> BlockDevice:
                uri = await stack.enter_async_context(serving({"disk": MemoryDevice(size)}, tls=tls))
                device = await NbdDevice.open(f"{uri}&tls-certificates={client}")
                stack.push_async_callback(device.close)
                for offset, data in content.items():
                    await device.write(offset, data)
                return device

            yield make


class TestNbdkit(DeviceSuite):
    @pytest.fixture
    async def make_device(self, pki: Pki) -> AsyncIterator[MakeDevice]:
        certificates, client = pki.server(), pki.client()
        async with AsyncExitStack() as stack:

            async def make(size: int, content: Mapping[int, bytes]) -> BlockDevice:
                command = nbdkit_tls(certificates, "memory", str(size))
                server = stack.enter_context(ForeignServer(command))
                device = await NbdDevice.open(uri_of(server, "", tls_certificates=client))
                stack.push_async_callback(device.close)
                for offset, data in content.items():
                    await device.write(offset, data)
                return device

            yield make


# Whom we trust.


@pytest.fixture
def foreign() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def size_of(uri: str) -> int:
    device = await NbdDevice.open(uri, options=ONCE)
    await device.close()
    return device.size


async def refusal(uri: str) -> str:
    """Why `uri` cannot be opened, as one line that names it."""
    with pytest.raises(NbdBackupError) as caught:
        await size_of(uri)
    line = str(caught.value)
    assert "\n" not in line
    assert "_ssl.c" not in line
    return line


async def test_server_must_be_vouched_for_by_the_authority(
    tmp_path: Path, pki: Pki, foreign: ExitStack
) -> None:
    server = foreign.enter_context(ForeignServer(nbdkit_tls(pki.server(), "memory", str(SIZE))))
    assert await size_of(uri_of(server, "", tls_certificates=pki.client(None))) == SIZE
    (tmp_path / "other").mkdir()
    stranger = Pki(tmp_path / "other").client(None)
    for uri in (uri_of(server, "", tls_certificates=stranger), uri_of(server, "")):
        assert "TLS handshake failed: " in await refusal(uri)
        with pytest.raises(ProtocolError, match="TLS handshake failed"):
            await list_exports(uri)
    assert await size_of(uri_of(server, "", tls_certificates=stranger, tls_verify_peer="0")) == SIZE


async def test_server_must_have_the_name_that_we_connect_to(pki: Pki, foreign: ExitStack) -> None:
    certificates = pki.server(names=("disks.example",))
    server = foreign.enter_context(ForeignServer(nbdkit_tls(certificates, "memory", str(SIZE))))
    client = pki.client(None)
    # A Unix socket has no name to compare with, unless there is one in the URI.
    for name in ("disks.example", None):
        more = {} if name is None else {"tls_hostname": name}
        assert await size_of(uri_of(server, "", tls_certificates=client, **more)) == SIZE
    wrong = uri_of(server, "", tls_certificates=client, tls_hostname="localhost")
    assert "Hostname mismatch" in await refusal(wrong)


async def test_host_of_a_tcp_uri_is_the_name_to_compare_with(
    serve: ServeFunction, pki: Pki, tmp_path: Path
) -> None:
    disk, client = make_disk(tmp_path / "disk.img", SIZE), pki.client(None)
    certificates = pki.server(names=("localhost",))
    server = serve(disk=disk, options=["--tls-creds", str(certificates)])
    assert await size_of(f"nbds://localhost:{server.port}/disk?tls-certificates={client}") == SIZE
    assert "IP address mismatch" in await refusal(
        f"nbds://127.0.0.1:{server.port}/disk?tls-certificates={client}"
    )


async def test_expired_server_is_not_trusted(pki: Pki, foreign: ExitStack) -> None:
    certificates = pki.server(expired=True)
    server = foreign.enter_context(ForeignServer(nbdkit_tls(certificates, "memory", str(SIZE))))
    line = await refusal(uri_of(server, "", tls_certificates=pki.client(None)))
    assert "certificate has expired" in line


@pytest.mark.parametrize("program", ["nbdkit", "qemu-nbd"])
async def test_server_that_wants_a_certificate_gets_ours(
    tmp_path: Path, pki: Pki, foreign: ExitStack, program: str
) -> None:
    certificates = pki.server()
    if program == "nbdkit":
        command = nbdkit("--tls-verify-peer", *nbdkit_tls(certificates, "memory", str(SIZE))(Path("x"))[4:])
    else:
        command = qemu_nbd_tls(make_sparse(tmp_path / "d.img", SIZE), certificates, verify_peer=True)
    export = "" if program == "nbdkit" else "disk"
    server = foreign.enter_context(ForeignServer(command))
    assert await size_of(uri_of(server, export, tls_certificates=pki.client())) == SIZE
    line = await refusal(uri_of(server, export, tls_certificates=pki.client(None)))
    assert str(server.socket_path) in line


async def test_server_without_tls_is_not_used_in_the_clear(foreign: ExitStack, pki: Pki) -> None:
    server = foreign.enter_context(ForeignServer(nbdkit("--tls=off", "memory", str(SIZE))))
    assert "does not offer TLS" in await refusal(uri_of(server, "", tls_certificates=pki.client(None)))


async def test_server_that_requires_tls_says_what_to_do(foreign: ExitStack, pki: Pki) -> None:
    server = foreign.enter_context(ForeignServer(nbdkit_tls(pki.server(), "memory", str(SIZE))))
    assert "use an nbds:// or nbds+unix:// URI" in await refusal(server.uri())


@PSK
async def test_key_opens_the_servers_door(tmp_path: Path, foreign: ExitStack) -> None:
    keys = psk_file(tmp_path / "keys.psk", alice=KEY)
    command = nbdkit("--tls=require", f"--tls-psk={keys}", "memory", str(SIZE))
    server = foreign.enter_context(ForeignServer(command))
    uri = uri_of(server, "", tls_psk_file=keys)
    assert await size_of(uri.replace("unix://", "unix://alice@")) == SIZE
    assert "write NAME@" in await refusal(uri)
    wrong = psk_file(tmp_path / "wrong.psk", alice="f" * 32)
    assert "TLS" in await refusal(uri_of(server, "", tls_psk_file=wrong).replace("unix://", "unix://alice@"))


async def test_files_that_are_not_there_are_told_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory of certificates"):
        await size_of(f"nbds://localhost:1/x?tls-certificates={tmp_path}/none")


# What is done over it.


async def test_load_survives_a_tls_server_that_is_killed_and_started_again(
    tmp_path: Path, pki: Pki, foreign: ExitStack
) -> None:
    command = nbdkit_tls(pki.server(), "file", make_sparse(tmp_path / "disk.img", 16 * MIB))
    server = foreign.enter_context(ForeignServer(command))
    device = await NbdDevice.open(uri_of(server, "", tls_certificates=pki.client()))
    load = Load(device)
    async with load.running():
        for _ in range(2):
            await load.wait_progress(200)
            server.kill()
            server.start()
        await load.wait_progress(200)
    await device.close()


async def test_exports_and_contexts_are_listed_over_tls(tmp_path: Path, pki: Pki, foreign: ExitStack) -> None:
    command = qemu_nbd_tls(make_sparse(tmp_path / "d.img", SIZE), pki.server())
    server = foreign.enter_context(ForeignServer(command))
    uri = uri_of(server, "disk", tls_certificates=pki.client())
    assert list((await list_exports(uri)).descriptions) == ["disk"]
    assert await list_contexts(uri) == ["base:allocation"]


def test_remote_disk_is_served_and_backed_up_over_tls(tmp_path: Path, serve: ServeFunction, pki: Pki) -> None:
    """TLS on every hop: from a qcow2 behind qemu-nbd, through our server, to nbdkit."""
    certificates, client = pki.server(), pki.client()
    disk, target = make_disk(tmp_path / "disk.img", SIZE), make_sparse(tmp_path / "target.img", SIZE)
    image = tmp_path / "disk.qcow2"
    run(require("qemu-img"), "convert", "-O", "qcow2", disk, image)
    options = f"tls-creds-x509,id=tls,dir={certificates},endpoint=server,verify-peer=yes"
    source_command = qemu_nbd(image, "--object", options, "--tls-creds", "tls", format="qcow2")
    with (
        ForeignServer(source_command) as source,
        ForeignServer(nbdkit_tls(certificates, "file", target)) as sink,
    ):
        server = serve(
            {"disk": uri_of(source, "disk", tls_certificates=client)},
            options=["--tls-creds", str(certificates)],
        )
        pulled = tmp_path / "pulled.img"
        run(require("nbdcopy"), server.uri("disk", certificates=client), pulled)
        server.cli("backup", "disk", uri_of(sink, "", tls_certificates=client))
        server.stop()
    assert sha256(pulled) == sha256(target) == sha256(disk)


def test_info_and_map_look_through_tls(tmp_path: Path, pki: Pki, foreign: ExitStack) -> None:
    server = foreign.enter_context(ForeignServer(nbdkit_tls(pki.server(), "memory", str(SIZE))))
    uri = uri_of(server, "", tls_certificates=pki.client())
    info = json.loads(run(sys.executable, "-m", "nbdbackup", "info", "--json", uri))
    assert info["TLS"]
    assert info["exports"][0]["export-size"] == SIZE
    assert "with TLS" in run(sys.executable, "-m", "nbdbackup", "info", uri)
    assert run(sys.executable, "-m", "nbdbackup", "map", uri)
