"""Every NBD server that we know, as source and target: each form of replies, with and without TLS.

    server                  simple  structured  extended
    qemu-nbd                  x         x                   this system's (7.2)
    qemu-nbd-10               x         x          x        Debian 13's
    qemu-storage-daemon       x         x
    qemu-storage-daemon-10    x         x          x        Debian 13's
    nbdkit                    x         x                   this system's (1.32)
    nbdkit-1.42               x         x                   Debian 13's, which has no extended headers yet
    nbd-server                x                             the reference implementation
    nbdbackup                 x         x          x

A server's best form is agreed on when we ask for everything; the others are reached by asking for less.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import pytest

from nbdbackup.block.nbd import NbdDevice
from nbdbackup.block.nbd_session import RemoteOptions
from nbdbackup.extents import Allocation
from nbdbackup.monitor.services_backup import BackupRequest, TargetPath
from nbdbackup.nbd.client import RemoteExport
from tests.conftest import ServeFunction
from tests.support.certificates import Pki
from tests.support.daemon import composed
from tests.support.disks import MIB, sha256
from tests.support.foreign_servers import (
    ForeignServer,
    MakeCommand,
    nbd_server,
    nbdkit,
    newer_nbdkit,
    newer_qemu_nbd,
    own_server,
    qemu_nbd,
    qemu_storage_daemon,
)
from tests.support.newer_peers import newer
from tests.support.own_server import serving
from tests.support.peers import require
from tests.support.processes import run
from tests.support.server import COMMAND

SIZE = 4 * MIB + 4608
LIMIT_S = 60.0


class Form(IntEnum):
    """Of replies; each implies those before it."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


@dataclass(frozen=True, slots=True)
class Peer:
    """A server: its best form, and what serves a raw file, with TLS where there is a directory for it."""

    best: Form
    command: Callable[[Path, Path | None], MakeCommand]
    export: str = "disk"


def _qemu_tls(certificates: Path | None) -> list[str]:
    """The object "tls"."""
    if certificates is None:
        return []
    return ["--object", f"tls-creds-x509,id=tls,dir={certificates},endpoint=server,verify-peer=yes"]


def _qemu_nbd_tls(certificates: Path | None) -> list[str]:
    return [*_qemu_tls(certificates), "--tls-creds", "tls"] if certificates else []


def _nbdkit_tls(certificates: Path | None) -> list[str]:
    if certificates is None:
        return ["--tls=off"]
    return ["--tls=require", "--tls-verify-peer", f"--tls-certificates={certificates}"]


def _own_tls(certificates: Path | None) -> list[str]:
    return ["--tls-creds", str(certificates), "--tls-verify-peer"] if certificates else []


PEERS = {
    "qemu-nbd": Peer(Form.STRUCTURED, lambda image, tls: qemu_nbd(image, *_qemu_nbd_tls(tls))),
    "qemu-nbd-10": Peer(Form.EXTENDED, lambda image, tls: newer_qemu_nbd(image, *_qemu_nbd_tls(tls))),
    "qemu-storage-daemon": Peer(
        Form.STRUCTURED, lambda image, tls: qemu_storage_daemon(image, *_qemu_tls(tls))
    ),
    "qemu-storage-daemon-10": Peer(
        Form.EXTENDED,
        lambda image, tls: qemu_storage_daemon(image, *_qemu_tls(tls), words=newer("qemu-storage-daemon")),
    ),
    "nbdkit": Peer(Form.STRUCTURED, lambda image, tls: nbdkit(*_nbdkit_tls(tls), "file", image), ""),
    "nbdkit-1.42": Peer(
        Form.STRUCTURED, lambda image, tls: newer_nbdkit(*_nbdkit_tls(tls), image, plugin="file"), ""
    ),
    "nbd-server": Peer(Form.SIMPLE, nbd_server),
    "nbdbackup": Peer(Form.EXTENDED, lambda image, tls: own_server(image, *_own_tls(tls))),
}

EVERY_FORM = [
    pytest.param(peer, form, tls, id=f"{name}-{form.name.lower()}-{'tls' if tls else 'plain'}")
    for name, peer in PEERS.items()
    for form in Form
    if form <= peer.best
    for tls in (False, True)
]
BEST_FORM = [
    pytest.param(peer, tls, id=f"{name}-{peer.best.name.lower()}-{'tls' if tls else 'plain'}")
    for name, peer in PEERS.items()
    for tls in (False, True)
]


class World:
    """What a test needs: files, servers of them, and URIs for our client."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.source = directory / "source.img"
        self.target = directory / "target.img"
        with self.source.open("wb") as file:
            # Data at both ends, and a hole of 2 MiB between.
            file.write(random.Random(1).randbytes(MIB))
            file.seek(3 * MIB)
            file.write(random.Random(2).randbytes(SIZE - 3 * MIB))
        with self.target.open("wb") as file:
            file.truncate(SIZE)
        self._stack = stack
        self._pki = Pki(directory)
        self._certificates: tuple[Path, Path] | None = None

    def serve(self, peer: Peer, image: Path, tls: bool) -> str:
        """Let `peer` serve `image`; the URI for us."""
        if not tls:
            return self._stack.enter_context(ForeignServer(peer.command(image, None))).uri(peer.export)
        if self._certificates is None:
            self._certificates = self._pki.server(), self._pki.client()
        server, client = self._certificates
        place = self._stack.enter_context(ForeignServer(peer.command(image, server))).socket_path
        return f"nbds+unix:///{peer.export}?socket={place}&tls-certificates={client}"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, stack)


@asynccontextmanager
async def opened(uri: str, options: RemoteOptions) -> AsyncIterator[NbdDevice]:
    async with asyncio.timeout(LIMIT_S):
        device = await NbdDevice.open(uri, options=options)
        try:
            yield device
        finally:
            await device.close()


def form_of(export: RemoteExport) -> Form:
    if export.extended_headers:
        return Form.EXTENDED
    return Form.STRUCTURED if export.structured_replies else Form.SIMPLE


def asking_for(form: Form) -> RemoteOptions:
    return RemoteOptions(
        structured_replies=form >= Form.STRUCTURED, extended_headers=form >= Form.EXTENDED, connections_max=1
    )


async def content(device: NbdDevice) -> bytes:
    buffer = bytearray(device.size)
    await device.read(0, buffer)
    return bytes(buffer)


async def zero_bytes(device: NbdDevice) -> int:
    """How many bytes are said to be zero."""
    position = found = 0
    while position < device.size:
        for extent in await device.block_status(position, device.size - position):
            position += extent.length
            found += extent.length if extent.flags & Allocation.ZERO else 0
    assert position == device.size
    return found


async def change(device: NbdDevice) -> None:
    """Use every command that writes."""
    await device.write(5000, b"w" * 100_000, fua=True)
    await device.write_zeroes(200_000, 50_000)
    await device.trim(3 * MIB, 64 << 10)
    await device.cache(0, MIB)
    await device.flush()


@pytest.mark.parametrize(("peer", "form", "tls"), EVERY_FORM)
async def test_served_changed_and_backed_up_to(
    tmp_path: Path, world: World, peer: Peer, form: Form, tls: bool
) -> None:
    options = asking_for(form)
    before = world.source.read_bytes()
    async with opened(world.serve(peer, world.source, tls), options) as source:
        assert form_of(source.export) is form
        assert await content(source) == before
        assert (await zero_bytes(source) >= 2 * MIB - 4096) is (form > Form.SIMPLE)
        # Through our own server, as the source of `serve`.
        async with serving({"disk": source}) as uri, opened(uri, RemoteOptions()) as through:
            await change(through)
            after = await content(through)
    assert after == world.source.read_bytes() != before
    assert after[5000:105_000] == b"w" * 100_000
    assert after[200_000:250_000] == bytes(50_000)
    async with composed(tmp_path, remote=options) as daemon:
        daemon.add_file("disk", tmp_path / "disk.img", after)
        target = TargetPath(world.serve(peer, world.target, tls), True)
        job = daemon.jobs.get(await daemon.backups.start(BackupRequest("disk", target, auto_dismiss=False)))
        async with asyncio.timeout(LIMIT_S):
            await job.wait_concluded()
        assert job.error is None
        job.dismiss()
    assert world.target.read_bytes() == after


@pytest.mark.parametrize(("peer", "tls"), BEST_FORM)
def test_the_commands_use_the_best_form(world: World, serve: ServeFunction, peer: Peer, tls: bool) -> None:
    uri = world.serve(peer, world.source, tls)
    told = json.loads(run(*COMMAND, "info", "--json", uri))
    assert (told["TLS"], told["structured"], told["extended"]) == (
        tls,
        peer.best >= Form.STRUCTURED,
        peer.best >= Form.EXTENDED,
    )
    assert told["exports"][0]["export-size"] == SIZE
    packets = run(*COMMAND, "info", uri).splitlines()[0]
    how = "with" if tls else "without"
    assert packets == f"protocol: newstyle-fixed {how} TLS, using {peer.best.name.lower()} packets"
    extents = json.loads(run(*COMMAND, "map", "--json", uri))
    kinds = [extent["type"] for extent in extents]
    assert kinds == ([0] if peer.best is Form.SIMPLE else [0, 3, 0])
    server = serve({"disk": uri}, tcp=False)
    pulled = world.source.with_name("pulled.img")
    run(require("nbdcopy"), server.uri("disk"), pulled)
    server.cli("backup", "disk", world.serve(peer, world.target, tls))
    server.stop()
    assert sha256(pulled) == sha256(world.target) == sha256(world.source)
