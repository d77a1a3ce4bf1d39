"""Every kind of client, in each way of talking that it knows, in the clear and over TLS.

A row of the tables is a peer, its version, the replies that it has to end up with (the server's log says
which they were), and whether there is TLS. Two kinds of peers stand between us and a client of their own,
nbdkit's nbd plugin and qemu-storage-daemon's nbd driver; libnbd is used directly, to send what is wrong.

What is not here is elsewhere: QEMU's tools of Debian 12 and libnbd's in test_qemu_img, test_qemu_io,
test_libnbd and test_tls, Debian 13's in the clear in test_extended_headers, the kernel's in test_kernel.
nbdkit and QEMU ask for the best replies that they know and cannot be told not to, so that simple ones are
for libnbd and the kernel.
"""

import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.certificates import Pki
from tests.support.disks import MIB, make_sparse, sha256
from tests.support.foreign_servers import ForeignServer, MakeCommand
from tests.support.newer_peers import newer, newer_libnbd_python
from tests.support.peers import require, require_libnbd_python
from tests.support.processes import run
from tests.support.server import Server

SIZE = 8 * MIB
STRUCTURED, EXTENDED, SIMPLE = "structured", "extended", "simple"


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the matrix."""

    peer: str
    version: str
    replies: str
    tls: bool

    @property
    def is_newer(self) -> bool:
        """Whether it is Debian 13's."""
        return self.version in {"1.42", "1.22", "10.0"}

    def __str__(self) -> str:
        return "-".join([self.peer, self.version, self.replies, "tls" if self.tls else "plain"])


def rows(*table: tuple[str, str, str]) -> list[Row]:
    """Each line of the table in the clear and over TLS."""
    return [Row(*line, tls) for line in table for tls in (False, True)]


BRIDGES = rows(
    ("nbdkit", "1.32", STRUCTURED),
    ("nbdkit", "1.42", EXTENDED),
    ("qemu-storage-daemon", "7.2", STRUCTURED),
    ("qemu-storage-daemon", "10.0", EXTENDED),
)
LIBNBD = rows(
    ("libnbd", "1.14", SIMPLE),
    ("libnbd", "1.14", STRUCTURED),
    ("libnbd", "1.22", SIMPLE),
    ("libnbd", "1.22", STRUCTURED),
    ("libnbd", "1.22", EXTENDED),
)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def server(tmp_path: Path, serve: ServeFunction, pki: Pki) -> Callable[[bool], Server]:
    """Serves a disk that is one hole, as `disk`, with TLS for all or for none."""

    def start(tls: bool) -> Server:
        options = ["--tls-creds", str(pki.server()), "--tls-verify-peer"] if tls else []
        return serve(disk=make_sparse(tmp_path / "disk.img", SIZE), options=options)

    return start


def assert_talked(server: Server, row: Row) -> None:
    """Somebody used the disk in the way that `row` says, and nobody in another."""
    lines = [line for line in server.log().splitlines() if "uses export disk" in line]
    security = "TLSv1." if row.tls else "no TLS"
    assert lines
    assert all(f"({row.replies} replies, {security}" in line for line in lines), lines


# Those between us and a client of their own.


def nbdkit_bridge(row: Row, server: Server, certificates: Path) -> MakeCommand:
    if row.is_newer:
        words = newer("nbdkit")
        plugin = str(Path(words[2]) / "nbdkit" / "plugins" / "nbdkit-nbd-plugin.so")
    else:
        words, plugin = [require("nbdkit")], "nbd"
    place = [f"socket={server.socket_path}"]
    if row.tls:
        place = ["hostname=localhost", f"port={server.port}"]
        place += ["tls=require", f"tls-certificates={certificates}"]
    return lambda path: [*words, "-f", "-U", str(path), plugin, *place, "export=disk"]


def qemu_bridge(row: Row, server: Server, certificates: Path) -> MakeCommand:
    words = newer("qemu-storage-daemon") if row.is_newer else [require("qemu-storage-daemon")]
    place = f"server.type=unix,server.path={server.socket_path}"
    credentials: list[str] = []
    if row.tls:
        place = f"server.type=inet,server.host=localhost,server.port={server.port},tls-creds=tls"
        credentials = ["--object", f"tls-creds-x509,id=tls,dir={certificates},endpoint=client"]
    return lambda path: [
        *(*words, *credentials, "--blockdev", f"driver=nbd,node-name=disk,export=disk,discard=unmap,{place}"),
        *("--nbd-server", f"addr.type=unix,addr.path={path}"),
        *("--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"),
    ]


BRIDGE_COMMANDS: dict[str, Callable[[Row, Server, Path], MakeCommand]] = {
    "nbdkit": nbdkit_bridge,
    "qemu-storage-daemon": qemu_bridge,
}


@pytest.mark.parametrize("row", BRIDGES, ids=str)
def test_disk_is_written_mapped_and_read_by_way_of_another_servers_client(
    tmp_path: Path, server: Callable[[bool], Server], pki: Pki, row: Row
) -> None:
    ours = server(row.tls)
    image = tmp_path / "image.img"
    data = random.Random(3).randbytes(2 * MIB)
    image.write_bytes(data + bytes(3 * MIB) + data + bytes(MIB))
    with ForeignServer(BRIDGE_COMMANDS[row.peer](row, ours, pki.client())) as bridge:
        uri = bridge.uri("disk")
        run(require("nbdcopy"), "--flush", "--connections=1", image, uri)
        assert sha256(tmp_path / "disk.img") == sha256(image)
        mapped = [line.split() for line in run(require("nbdinfo"), "--map", uri).splitlines()]
        assert [(int(start), int(length), kind) for start, length, kind, *_ in mapped] == [
            (0, 2 * MIB, "0"),
            (2 * MIB, 3 * MIB, "3"),
            (5 * MIB, 2 * MIB, "0"),
            (7 * MIB, MIB, "3"),
        ]
        commands = (
            *("write -f -P 7 1M 1M", "write -z -u 0 512k", "write -P 9 4095 3", "discard 5M 1M", "flush"),
            *("read -P 7 1M 1M", "read -P 0 64k 448k", "read -P 9 4095 3", "read -P 0 5M 1M"),
        )
        words = [word for command in commands for word in ("-c", command)]
        assert "verification failed" not in run(require("qemu-io"), "-f", "raw", *words, uri)
        run(require("nbdcopy"), uri, tmp_path / "copy.img")
    assert sha256(tmp_path / "copy.img") == sha256(tmp_path / "disk.img")
    assert_talked(ours, row)


# libnbd, with its own checks switched off.

WRONG_REQUESTS = """
import errno, sys, nbd
uri, replies, tls = sys.argv[1:]

def error_of(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except nbd.Error as error:
        return error.errnum
    return None

h = nbd.NBD()
h.set_strict_mode(0)
h.set_uri_allow_local_file(True)
if replies == "simple":
    h.set_request_structured_replies(False)
elif hasattr(h, "set_request_extended_headers"):
    h.set_request_extended_headers(replies == "extended")
if replies != "simple":
    h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert h.get_tls_negotiated() == (tls == "tls")
size = h.get_size()
data = bytes(range(256)) * 64
for flags in (0, nbd.CMD_FLAG_FUA):
    h.pwrite(data, 4093, flags)
    assert h.pread(len(data), 4093) == data
wrong = [
    (errno.EINVAL, h.pread, (512, size)),
    (errno.EINVAL, h.pread, (2, size - 1)),
    (errno.EINVAL, h.pread, (512, (1 << 63) - 512)),
    (errno.ENOSPC, h.pwrite, (b"ab", size - 1)),
    (errno.ENOSPC, h.zero, (512, size)),
    (errno.EINVAL, h.trim, (512, size)),
    (errno.EINVAL, h.cache, (512, 0, 1 << 7)),
    (errno.EINVAL, h.pwrite, (b"a" * 512, 0, nbd.CMD_FLAG_NO_HOLE)),
    (errno.EINVAL, h.trim, (512, 0, nbd.CMD_FLAG_FAST_ZERO)),
    (errno.EINVAL, h.zero, (512, 0, 1 << 9)),
    (errno.EINVAL, h.flush, (1 << 3,)),
    (errno.EINVAL, h.block_status, (512, size, lambda *_: 0)),
]
for expected, call, arguments in wrong:
    found = error_of(call, *arguments)
    # Without structured replies there are no contexts, which libnbd knows for itself.
    known = call == h.block_status and replies == "simple" and found in (errno.ENOTSUP, errno.EINVAL)
    assert known or found == expected, (call, arguments, found)
    assert h.pread(len(data), 4093) == data
h.zero(size, 0)
assert h.pread(len(data), 4093) == bytes(len(data))
h.shutdown()
"""


def libnbd(row: Row) -> tuple[Sequence[str], dict[str, str] | None]:
    """The words that run a Python with that libnbd, and its environment."""
    return newer_libnbd_python() if row.is_newer else ([require_libnbd_python()], None)


@pytest.mark.parametrize("row", LIBNBD, ids=str)
def test_wrong_requests_of_libnbd_get_their_error_and_the_next_one_its_answer(
    server: Callable[[bool], Server], pki: Pki, row: Row
) -> None:
    ours = server(row.tls)
    uri = ours.uri("disk", "tcp" if row.tls else "unix", certificates=pki.client() if row.tls else None)
    words, environment = libnbd(row)
    result = subprocess.run(
        [*words, "-c", WRONG_REQUESTS, uri, row.replies, "tls" if row.tls else "plain"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert_talked(ours, row)


# QEMU's own tools of Debian 13, over TLS.


def test_newer_qemu_tools_write_map_and_read_over_tls(
    tmp_path: Path, server: Callable[[bool], Server], pki: Pki
) -> None:
    ours = server(True)
    credentials = ["--object", f"tls-creds-x509,id=tls,dir={pki.client()},endpoint=client"]
    target = f"driver=nbd,host=localhost,port={ours.port},export=disk,tls-creds=tls"
    image = tmp_path / "image.img"
    image.write_bytes(random.Random(4).randbytes(3 * MIB) + bytes(5 * MIB))
    convert = [*newer("qemu-img"), "convert", *credentials]
    run(*convert, "-n", "-f", "raw", "--target-image-opts", image, target)
    run(*convert, "-O", "raw", "--image-opts", target, tmp_path / "copy.img")
    assert sha256(tmp_path / "disk.img") == sha256(image) == sha256(tmp_path / "copy.img")
    commands = ("write -P 5 4M 1M", "discard 4M 512k", "flush", "read -P 0 4M 512k", "read -P 5 4608k 512k")
    words = [word for command in commands for word in ("-c", command)]
    told = run(*newer("qemu-io"), *credentials, *words, "--image-opts", target)
    assert "verification failed" not in told
    assert_talked(ours, Row("qemu", "10.0", EXTENDED, True))
