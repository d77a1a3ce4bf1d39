"""Clients that know extended headers: Debian 13's libnbd and qemu."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, sha256
from tests.support.newer_peers import newer, newer_libnbd_python
from tests.support.peers import require
from tests.support.processes import run
from tests.support.server import COMMAND, Server

GIB = 1 << 30

PROLOGUE = """
import nbd, sys
h = nbd.NBD()
for context in ("base:allocation", "qemu:allocation-depth"):
    h.add_meta_context(context)
h.connect_uri(sys.argv[1])
assert h.get_extended_headers_negotiated(), "no extended headers"

def status(*contexts, count=None, offset=0, flags=0):
    found = {}
    def seen(context, start, extents, error):
        assert start == offset and context not in found
        found[context] = list(extents)
    count = h.get_size() - offset if count is None else count
    if contexts:
        h.block_status_filter(count, offset, list(contexts), seen, flags)
    else:
        h.block_status_64(count, offset, seen, flags)
    return found

def fails(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        return error.errnum
    return None
"""


def libnbd(server: Server, script: str) -> str:
    """Run `script` with a connected handle `h`; what it prints."""
    words, environment = newer_libnbd_python()
    result = subprocess.run(
        [*words, "-c", PROLOGUE + script, server.uri("disk")],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """10 GiB, the bytes `x` in the 9th, the rest a hole."""
    path = tmp_path / "sparse.img"
    with path.open("wb") as disk:
        disk.truncate(10 * GIB)
        disk.seek(9 * GIB)
        disk.write(b"x" * MIB)
    return path


def test_libnbd_negotiates_extended_headers_and_reads_and_writes(serve: ServeFunction, sparse: Path) -> None:
    libnbd(
        serve(disk=sparse),
        """
assert h.get_protocol() == "newstyle-fixed" and h.can_block_status_payload()
data = bytes(range(256)) * 1000
for flags in (0, nbd.CMD_FLAG_FUA):
    h.pwrite(data, 12345, flags)
    assert h.pread(len(data), 12345) == data
big = b"b" * (20 << 20)
h.pwrite(big, 4 << 20)
assert h.pread(len(big), 4 << 20) == big
h.flush()
h.shutdown()
""",
    )


def test_51_73_libnbd_s_64_bit_requests_are_done_at_once(serve: ServeFunction, sparse: Path) -> None:
    libnbd(
        serve(disk=sparse),
        """
size = 10 << 30
assert status()["base:allocation"] == [(9 << 30, 3), (1 << 20, 0), ((1 << 30) - (1 << 20), 3)]
assert status()["qemu:allocation-depth"] == [(size, 1)]
assert status(count=5 << 30, flags=nbd.CMD_FLAG_REQ_ONE)["base:allocation"] == [(5 << 30, 3)]
assert status("qemu:allocation-depth", count=6 << 30) == {"qemu:allocation-depth": [(6 << 30, 1)]}
h.cache(size, 0)
h.zero(size, 0)
h.trim(size, 0)
assert status()["base:allocation"] == [(size, 3)]
h.shutdown()
""",
    )


def test_62_libnbd_is_told_of_holes(serve: ServeFunction, sparse: Path) -> None:
    told = libnbd(
        serve(disk=sparse),
        """
def chunk(data, offset, kind, error):
    print(offset - (9 << 30), len(data), kind)
mib = 1 << 20
read = h.pread_structured(3 * mib, (9 << 30) - mib, chunk)
assert read == bytes(mib) + b"x" * mib + bytes(mib)
h.shutdown()
""",
    )
    # 1 is data, 2 a hole
    assert told == f"{-MIB} {MIB} 2\n0 {MIB} 1\n{MIB} {MIB} 2\n"


def test_wrong_extended_requests_get_errors_and_the_connection_lives(
    serve: ServeFunction, sparse: Path
) -> None:
    libnbd(
        serve(disk=sparse),
        """
import errno
h.set_strict_mode(h.get_strict_mode() & ~(nbd.STRICT_BOUNDS | nbd.STRICT_COMMANDS | nbd.STRICT_FLAGS))
size = h.get_size()
assert fails(h.pread, 512, size) == errno.EINVAL
assert fails(h.pwrite, b"1" * 512, size) == errno.ENOSPC
assert fails(h.zero, 1 << 62, 512) == errno.ENOSPC
assert fails(h.trim, 1 << 62, 512) == errno.EINVAL
assert fails(h.block_status_64, 1 << 62, 512, lambda *a: 0) == errno.EINVAL
h.pread(512, 0)
h.shutdown()
""",
    )


def test_newer_nbdinfo_tells_what_the_older_one_does_and_extended_headers(
    tmp_path: Path, serve: ServeFunction
) -> None:
    server = serve(disk=make_disk(tmp_path / "disk.img", MIB + 1))
    newer_told = json.loads(run(*newer("nbdinfo"), "--json", server.uri("disk")))
    assert newer_told["extended"]
    older = json.loads(run(require("nbdinfo"), "--json", server.uri("disk")))["exports"][0]
    (export,) = newer_told["exports"]
    assert export.pop("can_block_status_payload")
    assert export == {key: older.get(key, export[key]) for key in export}


def test_newer_nbdcopy_copies_both_ways(tmp_path: Path, serve: ServeFunction) -> None:
    source = make_disk(tmp_path / "disk.img", 40 * MIB + 513)
    (tmp_path / "target.img").write_bytes(bytes(40 * MIB + 513))
    server = serve(disk=source, target=tmp_path / "target.img")
    copy = tmp_path / "copy.img"
    run(*newer("nbdcopy"), server.uri("disk"), str(copy))
    assert sha256(copy) == sha256(source)
    run(*newer("nbdcopy"), "--connections=4", server.uri("disk"), server.uri("target"))
    assert sha256(tmp_path / "target.img") == sha256(source)


def test_newer_qemu_img_maps_compares_and_converts(
    tmp_path: Path, serve: ServeFunction, sparse: Path
) -> None:
    server = serve(disk=sparse)
    extents = json.loads(run(*newer("qemu-img"), "map", "--output=json", server.uri("disk")))
    assert [(e["start"], e["length"], e["zero"]) for e in extents] == [
        (0, 9 * GIB, True),
        (9 * GIB, MIB, False),
        (9 * GIB + MIB, GIB - MIB, True),
    ]
    target = tmp_path / "out.qcow2"
    run(*newer("qemu-img"), "convert", "-O", "qcow2", server.uri("disk"), target)
    assert "identical" in run(*newer("qemu-img"), "compare", "-f", "raw", server.uri("disk"), target)


def test_newer_qemu_io_discards_and_zeroes(serve: ServeFunction, sparse: Path) -> None:
    server = serve(disk=sparse)
    commands = ("discard 9G 512K", "write -z -u 9728M 200M", "write -P 7 1M 1M", "read -P 7 1M 1M", "flush")
    words = [word for command in commands for word in ("-c", command)]
    run(*newer("qemu-io"), "-f", "raw", *words, server.uri("disk"))
    libnbd(server, "assert h.pread(512 << 10, 9 << 30) == bytes(512 << 10)")


def test_socket_activation_gives_a_server_for_one_command(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", MIB + 1)
    places = ("--control", str(tmp_path / "c"), "--state-dir", str(tmp_path / "state"))
    for words in ([require("nbdinfo")], newer("nbdinfo")):
        told = subprocess.run(
            [*words, "--size", "--", "[", *COMMAND, "serve", *places, str(disk), "]"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert (told.returncode, told.stdout) == (0, f"{MIB + 1}\n"), told.stderr
