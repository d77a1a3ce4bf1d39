"""Incremental backups by hand: the job copies what the bitmap tells; full plus incremental is the disk."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk, sha256
from tests.support.peers import require
from tests.support.processes import run
from tests.support.server import Server

SIZE = 16 * MIB + 4608
CLUSTER = 65536
OLD = b"\xee"
WRITES = [(3, 1), (7, 3), (100, 1), (256, 1)]
"""Clusters: the first, and how many."""


def write_clusters(server: Server) -> set[int]:
    """Write a few bytes into each cluster of `WRITES`, as a client; their numbers."""
    commands: list[str] = []
    dirty: set[int] = set()
    for first, count in WRITES:
        length = (count - 1) * CLUSTER + 512
        commands += ["-c", f"write -P {first % 251} {first * CLUSTER} {length}"]
        dirty |= set(range(first, first + count))
    run(require("qemu-io"), "-f", "raw", *commands, server.uri("disk"))
    return dirty


def dirty_clusters(server: Server, export: str = "disk") -> set[int]:
    """What nbdinfo tells of the bitmap b0."""
    told = run(require("nbdinfo"), "--json", "--map=qemu:dirty-bitmap:b0", server.uri(export))
    clusters: set[int] = set()
    for extent in json.loads(told):
        if extent["type"]:
            end = extent["offset"] + extent["length"]
            clusters |= set(range(extent["offset"] // CLUSTER, -(-end // CLUSTER)))
    return clusters


@pytest.mark.parametrize("scratch", ["none", "directory"])
def test_full_plus_incremental_is_the_point_in_time(
    tmp_path: Path, serve: ServeFunction, scratch: str
) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    chain = tmp_path / "chain.img"
    changes = tmp_path / "changes.img"
    changes.write_bytes(OLD * SIZE)
    place = ("--scratch", str(tmp_path) if scratch == "directory" else scratch)
    server = serve(disk=disk, tcp=False)
    server.cli("bitmap", "add", "disk", "b0")
    server.cli("backup", "disk", str(chain), *place)
    dirty = write_clusters(server)
    assert dirty_clusters(server) == dirty
    incremental = ("--sync", "incremental", "--bitmap", "b0", "-n", *place)
    ended = server.cli("backup", "disk", str(changes), *incremental, "--json")
    copied = sum(min(CLUSTER, SIZE - number * CLUSTER) for number in dirty)
    assert json.loads(ended.stdout)["len"] == copied
    assert dirty_clusters(server) == set()
    run(require("qemu-img"), "convert", "-O", "raw", server.uri("disk"), tmp_path / "now.img")
    whole, part = bytearray(chain.read_bytes()), changes.read_bytes()
    for number in range(-(-SIZE // CLUSTER)):
        piece = slice(number * CLUSTER, min((number + 1) * CLUSTER, SIZE))
        if number in dirty:
            whole[piece] = part[piece]
        else:
            assert part[piece] == OLD * (piece.stop - piece.start)
    assert bytes(whole) == (tmp_path / "now.img").read_bytes()
    server.cli("backup", "disk", str(chain), "--sync", "incremental", "--bitmap", "b0", "-n")
    assert sha256(chain) != sha256(tmp_path / "now.img"), "nothing was dirty any more"


def qmp(server: Server, command: str, arguments: Mapping[str, object]) -> None:
    """Run one command that returns nothing."""
    server.cli("qmp", json.dumps({"execute": command, "arguments": arguments}))


@pytest.mark.parametrize("mode", ["grouped", "individual"])
def test_a_cancel_with_grouped_completion_leaves_both_bitmaps_as_if_nothing_had_happened(
    tmp_path: Path, serve: ServeFunction, mode: str
) -> None:
    disk = make_disk(tmp_path / "disk.img", SIZE)
    for name in ("other", "t-disk", "t-other"):
        (tmp_path / f"{name}.img").write_bytes(OLD * SIZE)
    server = serve({"disk": disk, "other": tmp_path / "other.img"}, tcp=False)
    for name in ("disk", "other"):
        server.cli("bitmap", "add", name, "b0")
        file = {"driver": "file", "node-name": f"t-{name}", "filename": str(tmp_path / f"t-{name}.img")}
        qmp(server, "blockdev-add", file)
    dirty = write_clusters(server)
    run(require("qemu-io"), "-f", "raw", "-c", "write 0 512", server.uri("other"))
    actions = [
        {
            "type": "blockdev-backup",
            "data": {
                "device": name, "target": f"t-{name}", "sync": "incremental", "bitmap": "b0",
                "job-id": f"j-{name}", "speed": speed, "auto-dismiss": False,
                "x-perf": {"max-workers": 1, "max-chunk": CLUSTER},
            },
        }
        for name, speed in (("disk", 1), ("other", 0))
    ]  # fmt: skip
    qmp(server, "transaction", {"actions": actions, "properties": {"completion-mode": mode}})
    server.cli("job", "cancel", "j-disk")
    ended = server.cli("job", "watch", "--json", check=False)
    outcomes = {end["job-id"]: end["outcome"] for end in map(json.loads, ended.stdout.splitlines())}
    assert outcomes == {"j-disk": "cancelled", "j-other": "cancelled" if mode == "grouped" else "completed"}
    assert dirty_clusters(server, "disk") == dirty
    assert dirty_clusters(server, "other") == ({0} if mode == "grouped" else set())
