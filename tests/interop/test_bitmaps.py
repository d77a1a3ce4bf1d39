"""Dirty bitmaps as other programs see them: libnbd, qemu-img, and an incremental backup pulled by hand."""

import json
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, sha256
from tests.support.peers import require, require_libnbd_python
from tests.support.processes import attempt, run
from tests.support.server import Server

SIZE = 8 * MIB
CLUSTER = 65536

PULL = """
import sys, nbd

def pull(uri, target, contexts):
    '''Copy what is dirty in any of the contexts; without any, everything. The bytes copied.'''
    handle = nbd.NBD()
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    size, dirty = handle.get_size(), []
    for context in contexts:
        assert handle.can_meta_context(context), context
    def note(context, offset, entries, error):
        for length, status in zip(entries[::2], entries[1::2]):
            if status:
                dirty.append((offset, length))
            offset += length
        return 0
    offset = 0
    while contexts and offset < size:
        handle.block_status(min(size - offset, 1 << 30), offset, note)
        offset += min(size - offset, 1 << 30)
    with open(target, "r+b") as file:
        copied = 0
        for offset, length in sorted(set(dirty)) if contexts else [(0, size)]:
            for start in range(offset, offset + length, 1 << 20):
                file.seek(start)
                copied += file.write(handle.pread(min(1 << 20, offset + length - start), start))
    handle.shutdown()
    return copied

print(pull(sys.argv[1], sys.argv[2], sys.argv[3:]))
"""


def pull(uri: str, target: Path, *bitmaps: str) -> int:
    """Copy what is dirty in any of `bitmaps` (none: everything) over `target`; the bytes copied."""
    contexts = [f"qemu:dirty-bitmap:{bitmap}" for bitmap in bitmaps]
    return int(run(require_libnbd_python(), "-c", PULL, uri, target, *contexts))


def qemu_io(server: Server, *commands: str) -> None:
    """Do `commands` through the live export."""
    arguments = [word for command in commands for word in ("-c", command)]
    run(require("qemu-io"), "-f", "raw", server.uri("disk"), *arguments)


def nbdinfo_map(uri: str, bitmap: str) -> list[tuple[int, int]]:
    """The dirty ranges by nbdinfo."""
    command = (require("nbdinfo"), f"--map=qemu:dirty-bitmap:{bitmap}", "--json", uri)
    return [(found["offset"], found["length"]) for found in json.loads(run(*command)) if found["type"]]


def qemu_img_map(server: Server, export: str, bitmap: str) -> list[tuple[int, int]]:
    """The dirty ranges by qemu-img, to which a bitmap is what has no data."""
    options = (
        f"driver=nbd,server.type=unix,server.path={server.socket_path},export={export},"
        f"x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
    )
    found = json.loads(run(require("qemu-img"), "map", "--output=json", "--image-opts", options))
    return [(entry["start"], entry["length"]) for entry in found if not entry["data"]]


@pytest.fixture
def server(serve: ServeFunction, tmp_path: Path) -> Server:
    return serve(disk=make_disk(tmp_path / "disk.img", SIZE), tcp=False)


def test_libnbd_and_qemu_see_the_same_dirty_ranges(server: Server) -> None:
    server.cli("bitmap", "add", "disk", "b0")
    server.cli("bitmap", "add", "disk", "fine", "-g", "512")
    qemu_io(server, "write 100k 1k", f"write {SIZE - 1} 1", "discard 1M 128k", "write -z 2M 64k")
    expected = [(65536, 65536), (MIB, 2 * CLUSTER), (2 * MIB, CLUSTER), (SIZE - CLUSTER, CLUSTER)]
    assert nbdinfo_map(server.uri("disk"), "b0") == expected
    assert qemu_img_map(server, "disk", "b0") == expected
    assert nbdinfo_map(server.uri("disk"), "fine")[0] == (102400, 1024)


def test_nbdinfo_lists_the_bitmaps_of_the_node_and_of_its_snapshot(server: Server) -> None:
    server.cli("bitmap", "add", "disk", "b0")
    uri = server.cli("snapshot", "create", "disk", "--name", "s").stdout.strip()
    server.cli("bitmap", "add", "disk", "b1")
    for place, bitmaps in ((server.uri("disk"), ["b0", "b1"]), (uri, ["b0"])):
        contexts = json.loads(run(require("nbdinfo"), "--json", place))["exports"][0]["contexts"]
        assert [name for name in contexts if "bitmap" in name] == [f"qemu:dirty-bitmap:{b}" for b in bitmaps]
    refused = attempt(require("nbdinfo"), "--map=qemu:dirty-bitmap:b1", uri)
    assert refused.returncode != 0


def test_a_client_whose_bitmap_is_removed_gets_an_error_and_stays_connected(server: Server) -> None:
    server.cli("bitmap", "add", "disk", "b0")
    script = """
        import subprocess, sys, nbd
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.add_meta_context("qemu:dirty-bitmap:b0")
        handle.connect_uri(sys.argv[1])
        handle.block_status(65536, 0, lambda *_: 0)
        subprocess.run(sys.argv[2:], check=True)
        try:
            handle.block_status(65536, 0, lambda *_: 0)
        except nbd.Error as error:
            assert error.errno == "EINVAL", error
        else:
            raise AssertionError("there is no such bitmap")
        assert len(handle.pread(512, 0)) == 512
        handle.shutdown()
    """
    command = server.cli_command("bitmap", "remove", "disk", "b0")
    run(require_libnbd_python(), "-c", textwrap.dedent(script), server.uri("disk"), *command)


def test_an_incremental_backup_pulled_by_hand_equals_the_point_in_time(
    server: Server, tmp_path: Path
) -> None:
    disk, backup = server.sources["disk"], tmp_path / "backup.img"
    backup.write_bytes(bytes(SIZE))
    server.cli("bitmap", "add", "disk", "b0")
    full = server.cli("snapshot", "create", "disk", "--name", "full", "--bitmap", "b0").stdout.strip()
    qemu_io(server, "write -P 1 0 64k")
    assert pull(full, backup) == SIZE
    server.cli("snapshot", "drop", "disk@full", "--pulled")

    qemu_io(server, "write -P 2 1M 200k", "write -z 3M 64k", "write -P 3 8388607 1")
    expected = sha256(disk)
    uri = server.cli("snapshot", "create", "disk", "--name", "inc", "--bitmap", "b0").stdout.strip()
    qemu_io(server, "write -P 4 1M 64k", "write -P 5 5M 64k")
    assert nbdinfo_map(uri, "b0") == qemu_img_map(server, "disk@inc", "b0")
    # The write after the full snapshot, 4 clusters, the zeroes, and the last byte's cluster.
    assert pull(uri, backup, "b0") == 7 * CLUSTER
    assert sha256(backup) == expected
    server.cli("snapshot", "drop", "disk@inc", "--pulled")
    assert nbdinfo_map(server.uri("disk"), "b0") == [(MIB, CLUSTER), (5 * MIB, CLUSTER)]


def test_a_pull_that_failed_is_made_good_by_the_next(server: Server, tmp_path: Path) -> None:
    disk, backup = server.sources["disk"], tmp_path / "backup.img"
    server.cli("bitmap", "add", "disk", "b0")
    backup.write_bytes(disk.read_bytes())
    qemu_io(server, "write -P 2 1M 200k")
    server.cli("snapshot", "create", "disk", "--name", "failed", "--bitmap", "b0")
    qemu_io(server, "write -P 3 4M 64k")
    server.cli("snapshot", "drop", "disk@failed")
    uri = server.cli("snapshot", "create", "disk", "--name", "next", "--bitmap", "b0").stdout.strip()
    expected = sha256(disk)
    qemu_io(server, "write -P 5 0 8M")
    assert pull(uri, backup, "b0") == 5 * CLUSTER
    assert sha256(backup) == expected


def test_backups_by_checkpoints_equal_their_points_in_time(server: Server, tmp_path: Path) -> None:
    disk, chain, skipping = server.sources["disk"], tmp_path / "chain.img", tmp_path / "skipping.img"
    for target in (chain, skipping):
        target.write_bytes(bytes(SIZE))
    uris, hashes = [], []
    for number in range(3):
        uris.append(server.cli("checkpoint", "create", "disk", f"c{number}").stdout.strip())
        hashes.append(sha256(disk))
        qemu_io(server, f"write -P {number + 1} {number}M 100k", "write -P 9 7M 4k")
    assert pull(uris[0], chain) == pull(uris[0], skipping) == SIZE
    assert sha256(chain) == hashes[0]
    assert pull(uris[1], chain, "c0") == 3 * CLUSTER
    assert sha256(chain) == hashes[1]
    assert pull(uris[2], chain, "c1") == 3 * CLUSTER
    assert sha256(chain) == hashes[2]
    pull(uris[2], skipping, "c0", "c1")
    assert sha256(skipping) == hashes[2]
    server.cli("checkpoint", "delete", "c1")
    assert nbdinfo_map(server.uri("disk"), "c0") == [(0, 2 * CLUSTER), (MIB, 2 * CLUSTER), (7 * MIB, CLUSTER)]


def test_the_commands_say_what_they_did(server: Server) -> None:
    server.cli("bitmap", "add", "disk", "b0")
    qemu_io(server, "write 0 1")
    server.cli("bitmap", "add", "disk", "b1", "-g", "4K", "--disabled", "--temporary")
    assert server.cli("bitmap", "list").stdout.splitlines() == [
        "NODE  BITMAP  DIRTY  GRANULARITY  STATE",
        "disk  b0      64K    64K          recording, persistent",
        "disk  b1      0      4K           disabled",
    ]
    server.cli("bitmap", "merge", "disk", "b1", "b0", "disk:b0")
    server.cli("bitmap", "disable", "disk", "b0")
    server.cli("bitmap", "clear", "disk", "b0")
    server.cli("bitmap", "enable", "disk", "b1")
    listed = json.loads(server.cli("bitmap", "list", "disk", "--json").stdout)
    assert [(b["name"], b["count"], b["recording"]) for b in listed["disk"]] == [
        ("b1", 65536, True),
        ("b0", 0, False),
    ]
    server.cli("bitmap", "remove", "disk", "b1")
    assert server.cli("bitmap", "remove", "disk", "b0", "--json").stdout == "{}\n"
    assert json.loads(server.cli("bitmap", "list", "--json").stdout) == {"disk": []}

    (made,) = json.loads(server.cli("checkpoint", "create", "disk", "c1", "--json").stdout)
    assert made["export"] == "disk@c1"
    (listed_checkpoint,) = json.loads(server.cli("checkpoint", "list", "disk", "--json").stdout)
    assert (listed_checkpoint["name"], listed_checkpoint["parent"]) == ("c1", None)
    assert server.cli("checkpoint", "list").stdout.split()[7:11] == [
        "disk",
        "c1",
        listed_checkpoint["uuid"],
        "-",
    ]
    assert json.loads(server.cli("checkpoint", "delete", "c1", "--json").stdout)[0]["node"] == "disk"
    again = server.cli("checkpoint", "delete", "disk", "c1")
    assert (again.stdout, again.stderr) == ("", "there was no checkpoint c1 of disk\n")


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ("bitmap add no b", 10, "has no node 'no'; it has disk"),
        ("bitmap list no", 10, "has no node 'no'"),
        ("bitmap add disk b0", 1, "Bitmap already exists: b0"),
        ("bitmap add disk b -g 1000", 1, "Granularity must be power of 2 and at least 512"),
        ("bitmap remove disk no", 1, "Dirty bitmap 'no' not found"),
        ("bitmap merge disk b0 no:b0", 10, "has no node 'no'; it has disk"),
        ("bitmap merge disk no b0", 1, "Dirty bitmap 'no' not found"),
        ("bitmap merge disk b0", 2, "the following arguments are required: [NODE:]SOURCE"),
        ("snapshot create disk --bitmap no", 1, "Dirty bitmap 'no' not found"),
        ("checkpoint create no c", 10, "has no node 'no'"),
        ("checkpoint create disk b0", 1, "Bitmap already exists: b0"),
        ("checkpoint delete no c", 10, "has no node 'no'"),
        ("checkpoint list no", 10, "has no node 'no'"),
        ("backup no /nowhere/t --sync incremental --bitmap b0", 10, "has no node 'no'"),
        ("backup disk /nowhere/t --sync incremental --bitmap no", 1, "no directory"),
    ],
)
def test_what_fails_is_told_in_one_line(server: Server, words: str, status: int, text: str) -> None:
    server.cli("bitmap", "add", "disk", "b0")
    result: subprocess.CompletedProcess[str] = server.cli(*words.split(), check=False)
    assert (result.returncode, result.stdout) == (status, "")
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert server.snapshots() == []
