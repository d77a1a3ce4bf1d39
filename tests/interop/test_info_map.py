"""`info` and `map` beside nbdinfo and qemu-img, about the same servers and files."""

import json
import subprocess
from pathlib import Path
from typing import cast

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_sparse
from tests.support.foreign_servers import (
    ForeignServer,
    MakeCommand,
    nbdkit,
    newer_nbdkit,
    newer_qemu_nbd,
    own_server,
    qemu_nbd,
)
from tests.support.newer_peers import newer
from tests.support.peers import require
from tests.support.processes import attempt, run
from tests.support.server import COMMAND

SIZE = 3 * MIB
HOLES = (0, 2 * MIB)
DATA = b"data" * 1024

Json = dict[str, object]


def nbdbackup(*arguments: str | Path) -> str:
    """What the command prints; it must succeed and complain of nothing."""
    return run(*COMMAND, *arguments)


def refused(*arguments: str | Path, status: int = 1) -> str:
    """The one line on standard error of a command that ends with `status`."""
    result = attempt(*COMMAND, *arguments)
    assert result.returncode == status, result
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data between two holes, and at the end."""
    path = make_sparse(tmp_path / "disk.img", SIZE)
    with path.open("r+b") as file:
        for offset in (MIB, SIZE - len(DATA)):
            file.seek(offset)
            file.write(DATA)
    return path


def servers(image: Path) -> dict[str, tuple[MakeCommand, str]]:
    """Each with the export to look at."""
    return {
        "qemu-nbd": (qemu_nbd(image, "-D", "a disk"), "disk"),
        "qemu-nbd -r -A": (qemu_nbd(image, "-r", "-A", "-e", "4"), "disk"),
        "nbdkit": (nbdkit("file", image), ""),
        "nbdkit --no-sr": (nbdkit("--no-sr", "file", image), ""),
        "nbdkit blocksize": (
            nbdkit("--filter=blocksize-policy", "file", image, "blocksize-minimum=4096"),
            "",
        ),
    }


SERVERS = pytest.mark.parametrize(
    "server", ["qemu-nbd", "qemu-nbd -r -A", "nbdkit", "nbdkit --no-sr", "nbdkit blocksize"]
)


@SERVERS
def test_info_tells_of_an_export_what_nbdinfo_tells(image: Path, server: str) -> None:
    command, export = servers(image)[server]
    with ForeignServer(command) as remote:
        uri = remote.uri(export)
        ours = json.loads(nbdbackup("info", "--json", uri))
        # This nbdinfo has not heard of extended headers.
        assert ours.pop("extended") is False
        theirs = json.loads(run(require("nbdinfo"), "--json", "--no-content", uri))
        ours_text = nbdbackup("info", uri).splitlines()
        theirs_text = run(require("nbdinfo"), "--no-content", uri).splitlines()
    [our_export], [their_export] = ours.pop("exports"), theirs.pop("exports")
    assert ours == theirs
    # Block sizes that a server does not tell are those that the specification assumes.
    assert their_export.items() <= our_export.items()
    assert set(theirs_text) <= set(ours_text)


@pytest.mark.parametrize("server", ["qemu-nbd", "nbdkit", "nbdbackup"])
def test_info_tells_what_the_newer_nbdinfo_tells(image: Path, server: str) -> None:
    command, export = {
        "qemu-nbd": (newer_qemu_nbd(image), "disk"),
        "nbdkit": (newer_nbdkit(image, plugin="file"), ""),
        "nbdbackup": (own_server(image, "-D", "a disk"), "disk"),
    }[server]
    with ForeignServer(command) as remote:
        uri = remote.uri(export)
        ours = json.loads(nbdbackup("info", "--json", uri))
        theirs = json.loads(run(*newer("nbdinfo"), "--json", "--no-content", uri))
        ours_text = nbdbackup("info", uri).splitlines()
        theirs_text = run(*newer("nbdinfo"), "--no-content", uri).splitlines()
        our_map, their_map = nbdbackup("map", uri), run(*newer("nbdinfo"), "--map", uri)
    [our_export], [their_export] = ours.pop("exports"), theirs.pop("exports")
    assert ours == theirs
    assert ours["extended"] is (server != "nbdkit")
    assert their_export.items() <= our_export.items()
    # It says "4096 (4K)" where the older one and we say "4096".
    assert {line for line in theirs_text if "block_size" not in line} <= set(ours_text)
    assert our_map == their_map


@pytest.mark.parametrize("server", ["qemu-nbd", "qemu-nbd -r -A", "nbdkit", "nbdkit blocksize"])
def test_map_of_an_export_is_nbdinfos(image: Path, server: str) -> None:
    command, export = servers(image)[server]
    with ForeignServer(command) as remote:
        uri = remote.uri(export)
        for options in ([], ["--totals"]):
            theirs = run(require("nbdinfo"), "--map", *options, uri)
            assert nbdbackup("map", *options, uri) == theirs
            json_theirs = json.loads(run(require("nbdinfo"), "--map", "--json", *options, uri))
            json_ours = json.loads(nbdbackup("map", "--json", *options, uri))
            for mine, yours in zip(json_ours, json_theirs, strict=True):
                if "percent" in mine:
                    assert mine.pop("percent") == pytest.approx(yours.pop("percent"), rel=1e-4)
                assert mine == yours


def test_map_of_a_server_without_block_status_is_all_data(image: Path) -> None:
    with ForeignServer(nbdkit("--no-sr", "file", image)) as remote:
        assert nbdbackup("map", remote.uri()).split() == ["0", str(SIZE), "0", "data"]
        assert "has no meta context base:allocation; it has none" in refused(
            "map", "--context", "base:allocation", remote.uri(), status=2
        )


def test_map_of_another_context_is_nbdinfos(image: Path) -> None:
    context = "qemu:allocation-depth"
    with ForeignServer(qemu_nbd(image, "-A")) as remote:
        uri = remote.uri("disk")
        theirs = run(require("nbdinfo"), f"--map={context}", uri)
        assert nbdbackup("map", "--context", context, uri) == theirs
        assert context in theirs or "local" in theirs
        told = refused("map", "--context", "qemu:dirty-bitmap:b", uri, status=2)
    assert "has no meta context qemu:dirty-bitmap:b; it has base:allocation, qemu:allocation-depth" in told


def test_map_of_a_dirty_bitmap_is_nbdinfos(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    run(require("qemu-img"), "create", "-q", "-f", "qcow2", image, str(SIZE))
    run(require("qemu-img"), "bitmap", "--add", "-f", "qcow2", image, "b")
    run(require("qemu-io"), "-f", "qcow2", "-c", "write 1M 64k", image)
    with ForeignServer(qemu_nbd(image, "-B", "b", "-r", format="qcow2")) as remote:
        uri = remote.uri("disk")
        theirs = run(require("nbdinfo"), "--map=qemu:dirty-bitmap:b", uri)
        assert nbdbackup("map", "--context", "qemu:dirty-bitmap:b", uri) == theirs
    assert "dirty" in theirs


def test_info_of_a_file_is_qemu_imgs(image: Path) -> None:
    theirs = json.loads(run(require("qemu-img"), "info", "-f", "raw", "--output=json", image))
    ours = json.loads(nbdbackup("info", "--json", image))
    assert ours == {key: theirs[key] for key in ("virtual-size", "filename", "format", "actual-size")}
    text = nbdbackup("info", image).splitlines()
    assert text[:3] == [f"image: {image}", "file format: raw", f"virtual size: 3M ({SIZE} bytes)"]


def test_map_of_a_file_agrees_with_qemu_img(image: Path) -> None:
    theirs = json.loads(run(require("qemu-img"), "map", "-f", "raw", "--output=json", image))
    ours = json.loads(nbdbackup("map", "--json", image))
    assert [(extent["offset"], extent["length"], extent["type"] == 3) for extent in ours] == [
        (extent["start"], extent["length"], extent["zero"]) for extent in theirs
    ]
    assert len(ours) == 4


def test_list_shows_every_export_of_a_server(tmp_path: Path, serve: ServeFunction, image: Path) -> None:
    other = make_sparse(tmp_path / "other.img", 4097)
    server = serve(tcp=False, disk=image, other=other, options=("-D", "for tests"))
    server.cli("snapshot", "create", "other", "--name", "s")
    theirs = json.loads(run(require("nbdinfo"), "--list", "--json", server.uri()))
    told = json.loads(nbdbackup("info", "--list", "--json", server.uri("no matter")))
    ours = {cast(str, export["export-name"]): export for export in told["exports"]}
    assert list(ours) == ["disk", "other", "other@s"]
    assert ours["other"]["export-size"] == 4097
    assert ours["other@s"]["is_read_only"]
    for export in theirs["exports"]:
        mine = ours[export["export-name"]]
        for differently in ("uri", "export-size-str"):
            export.pop(differently, None)
        assert export.items() <= mine.items()
        assert nbdbackup("info", str(mine["uri"])).startswith("protocol: newstyle-fixed without TLS")
    assert nbdbackup("info", "--list", server.uri()).count("export=") == 3


def test_nothing_is_locked_or_written(image: Path, serve: ServeFunction) -> None:
    serve(disk=image)
    before = image.stat().st_mtime_ns
    nbdbackup("info", image)
    nbdbackup("map", image)
    assert image.stat().st_mtime_ns == before


def test_what_cannot_be_looked_at_is_refused_in_one_line(tmp_path: Path, image: Path) -> None:
    gone = f"nbd+unix:///disk?socket={tmp_path}/gone"
    container = tmp_path / "disk.qcow2"
    run(require("qemu-img"), "create", "-q", "-f", "qcow2", container, "1M")
    for verb in ("info", "map"):
        assert "does not exist" in refused(verb, tmp_path / "missing")
        assert f"cannot connect to {gone}" in refused(verb, gone, status=10)
        no_files = f"nbds+unix:///x?socket={tmp_path}/gone&tls-certificates={tmp_path}/nowhere"
        assert "there is no directory of certificates" in refused(verb, no_files, status=2)
        assert "the scheme must be" in refused(verb, "http://localhost/x", status=2)
        assert "looks like a qcow2 image" in refused(verb, container, status=2)
        assert nbdbackup(verb, "-f", "raw", container)
    assert "--list is for the URI" in refused("info", "--list", image, status=2)
    assert "a file has only base:allocation" in refused("map", "--context", "x:y", image, status=2)
    with ForeignServer(qemu_nbd(image)) as remote:
        for verb in ("info", "map"):
            assert "no export named 'nope'" in refused(verb, remote.uri("nope"), status=10)


def test_names_that_a_server_chose_cannot_command_the_terminal(image: Path) -> None:
    with ForeignServer(qemu_nbd(image, "-D", "red \x1b[31m")) as remote:
        told = nbdbackup("info", remote.uri("disk"))
    assert "\x1b" not in told
    assert "description: red \\x1b[31m" in told


def test_map_stops_quietly_when_its_reader_has_enough(image: Path) -> None:
    command = " ".join(COMMAND) + f" map {image} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["0", str(MIB), "3", "hole,zero"]
    assert done.stderr == ""
