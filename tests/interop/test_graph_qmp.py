"""QEMU's fleecing set-up and the life of exports, typed in as they are: here and in qemu-storage-daemon.

Re-expresses QEMU's tests image-fleecing and 307: each script runs on both sides, and both must show the
same bytes, errors and events.
"""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdbackup.job.events import Json
from tests.conftest import ServeFunction
from tests.support.monitor import QmpClient
from tests.support.peers import require

MIB = 1 << 20
DISK_BYTES = 64 * MIB
WAIT_S = 30.0
QEMU_IO_S = 60.0


@dataclass
class Side:
    """One daemon with a control socket; its exports are at `nbd`."""

    client: QmpClient
    directory: Path
    history: list[str] = field(default_factory=list)

    @property
    def nbd(self) -> Path:
        return self.directory / "nbd.sock"

    def image(self, name: str) -> str:
        return str(self.directory / f"{name}.img")

    async def run(self, command: str, **arguments: Json) -> None:
        """Note what the command is answered with, and the events up to then."""
        renamed = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer = await self.client.ask({"execute": command, "arguments": renamed})
        for event in self.client.events:
            self.history.append(f"{event['event']} {json.dumps(event['data'], sort_keys=True)}")
        self.client.events.clear()
        error = answer.get("error")
        if isinstance(error, dict):
            # Ours adds by whom.
            self.history.append(str(error["desc"]).partition(": by ")[0])
        else:
            self.history.append(f"{command}: {answer['return']}")

    async def start_server(self) -> None:
        address: Json = {"type": "unix", "data": {"path": str(self.nbd)}}
        await self.run("nbd-server-start", addr=address)

    def io(self, export: str, *commands: str, status: int = 0) -> None:
        """Run qemu-io's `commands` on the export, read-only if all of them read."""
        words = [require("qemu-io"), "-f", "raw", "-d", "unmap"]
        if all(command.startswith("read") for command in commands):
            words.append("-r")
        for command in commands:
            words += ["-c", command]
        words.append(f"nbd+unix:///{export}?socket={self.nbd}")
        result = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=QEMU_IO_S, check=False
        )
        assert (result.returncode, "Pattern verification failed" in result.stdout) == (status, False), (
            result.stdout + result.stderr
        )


@asynccontextmanager
async def qemu(directory: Path) -> AsyncIterator[Side]:
    path = directory / "control.sock"
    process = await asyncio.create_subprocess_exec(
        require("qemu-storage-daemon"),
        *("--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"),
    )
    try:
        async with _talking(path, directory) as side:
            yield side
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@asynccontextmanager
async def _talking(control: Path, directory: Path) -> AsyncIterator[Side]:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(control)
                break
            except OSError:
                await asyncio.sleep(0.02)
    client = QmpClient(reader, writer)
    try:
        await client.receive()
        assert await client.execute("qmp_capabilities") == {}
        yield Side(client, directory)
    finally:
        writer.close()


@pytest.fixture
async def sides(tmp_path: Path, serve: ServeFunction) -> AsyncIterator[list[Side]]:
    """Ours and QEMU's, each with the same images."""
    served = tmp_path / "served.img"
    served.write_bytes(b"\0" * 512)
    server = serve(served=served)
    async with AsyncExitStack() as stack:
        found = []
        for name in ("ours", "qemu"):
            directory = tmp_path / name
            directory.mkdir()
            for image in ("disk", "tmp"):
                with (directory / f"{image}.img").open("wb") as file:
                    file.truncate(DISK_BYTES)
            side = _talking(server.control, directory) if name == "ours" else qemu(directory)
            found.append(await stack.enter_async_context(side))
        yield found


async def _add_files(side: Side, *names: str) -> None:
    for name in names:
        await side.run("blockdev-add", driver="file", node_name=name, filename=side.image(name))


# QEMU's image-fleecing: each overwrite meets one of the patterns in another way.
PATTERNS = ((0x5D, 0), (0xD5, MIB), (0xDC, 32 * MIB), (0xCD, DISK_BYTES - (64 << 10)))
OVERWRITES = {
    "full": (0xAB, 0),
    "left": (0xAD, MIB - (32 << 10)),
    "right": (0x1D, 32 * MIB + (32 << 10)),
    "adjacent": (0xEA, DISK_BYTES - (128 << 10)),
}
PIECE = 64 << 10


@pytest.mark.parametrize("where", OVERWRITES)
async def test_image_fleecing_as_in_qemus_documentation(sides: list[Side], where: str) -> None:
    pattern, offset = OVERWRITES[where]
    for side in sides:
        await _add_files(side, "disk", "tmp")
        await side.start_server()
        await side.run("block-export-add", type="nbd", id="prepare", node_name="disk", writable=True)
        side.io("disk", *(f"write -P {value} {start} {PIECE}" for value, start in PATTERNS))
        await side.run("block-export-del", id="prepare", mode="hard")
        await side.run("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="tmp")
        await side.run("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
        await side.run("block-export-add", type="nbd", id="live", node_name="cbw", name="live", writable=True)
        await side.run("block-export-add", type="nbd", id="access", node_name="access", name="access")
        side.io("live", f"write -P {pattern} {offset} {PIECE}")
        side.io("access", *(f"read -P {value} {start} {PIECE}" for value, start in PATTERNS))
        # What was zeroes is zeroes, at either side of each pattern.
        side.io("access", f"read -P 0 {MIB - PIECE} {PIECE}", f"read -P 0 {DISK_BYTES - 2 * PIECE} {PIECE}")
        side.io("live", f"read -P {pattern} {offset} {PIECE}")
        for name in ("access", "live"):
            await side.run("block-export-del", id=name, mode="hard")
        for name in ("access", "cbw", "tmp", "disk"):
            await side.run("blockdev-del", node_name=name)
        await side.run("nbd-server-stop")
    ours, theirs = (_events_apart(side.history) for side in sides)
    assert ours == theirs


def _events_apart(history: list[str]) -> tuple[list[str], list[str]]:
    """Answers and events: an event may come before or after the answer to what caused it."""
    events = [line for line in history if line.startswith("BLOCK_")]
    return [line for line in history if line not in events], events


async def test_the_set_up_can_be_typed_in_one_piece(sides: list[Side]) -> None:
    for side in sides:
        inner: Json = {
            "driver": "copy-before-write",
            "file": {"driver": "raw", "file": {"driver": "file", "filename": side.image("disk")}},
            "target": {"driver": "file", "filename": side.image("tmp")},
            "node-name": "cbw",
        }
        await side.start_server()
        unmap: dict[str, Json] = {"discard": "unmap", "file": inner}
        await side.run("blockdev-add", driver="snapshot-access", node_name="access", **unmap)
        await side.run("block-export-add", type="nbd", id="live", node_name="cbw", writable=True)
        await side.run("block-export-add", type="nbd", id="access", node_name="access", writable=True)
        side.io("cbw", f"write -P 1 0 {MIB}")
        side.io("access", f"read -P 0 0 {MIB}", f"discard 0 {PIECE}")
        side.io("access", f"read 0 {PIECE}", status=1)
        side.io("access", f"read -P 0 {PIECE} {PIECE}")
        await side.run("blockdev-del", node_name="access")
        await side.run("nbd-server-stop")
        await side.run("blockdev-del", node_name="access")
        await side.run("blockdev-del", node_name="cbw")
    ours, theirs = (_events_apart(side.history) for side in sides)
    assert ours == theirs


async def test_life_of_exports_is_as_in_qemu(sides: list[Side]) -> None:
    for side in sides:
        await _add_files(side, "disk", "tmp")
        await side.run("nbd-server-stop")
        await side.start_server()
        await side.start_server()
        await side.run("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
        await side.run("block-export-add", type="nbd", id="e", node_name="tmp")
        await side.run("block-export-add", type="nbd", id="f", node_name="disk")
        await side.run("block-export-add", type="nbd", id="-", node_name="tmp")
        await side.run("block-export-add", type="nbd", id="g", node_name="nope")
        await side.run("block-export-add", type="nbd", id="g", node_name="tmp", name="x" * 4097)
        await side.run("block-export-add", type="nbd", id="g", node_name="tmp", description="x" * 4097)
        await side.run("block-export-add", type="nbd", id="g", node_name="tmp", bitmaps=["nope"])
        bitmap: Json = {"node": "tmp", "name": "nope"}
        await side.run("block-export-add", type="nbd", id="g", node_name="tmp", bitmaps=[bitmap])
        await side.run(
            "block-export-add", type="nbd", id="g", node_name="tmp", name="y", description="d" * 4096
        )
        await side.run("block-export-add", id="h", node_name="tmp")
        await side.run("block-export-add", type="zz", id="h", node_name="tmp")
        await side.run("block-export-add", type="nbd", id="h", node_name="tmp", writable=1)
        await side.run("block-export-add", type="nbd", id="h", node_name="tmp", zz=5)
        await side.run("blockdev-del", node_name="disk")
        await side.run("block-export-del", id="nope")
        await side.run("block-export-del", id="e", mode="zz")
        await side.run("block-export-del", id="e")
        await side.run("block-export-del", id="e")
        await side.run("blockdev-del", node_name="disk")
        await side.run("nbd-server-stop")
        await side.run("nbd-server-stop")
        await side.run("blockdev-del", node_name="tmp")
    ours, theirs = (_events_apart(side.history) for side in sides)
    assert ours == theirs


WRONG_NODES: list[dict[str, Json]] = [
    {"driver": "copy-before-write", "file": "nope", "target": "tmp"},
    {"driver": "copy-before-write", "file": "disk", "target": "nope"},
    {"driver": "copy-before-write", "file": "disk"},
    {"driver": "copy-before-write", "target": "disk"},
    {"driver": "copy-before-write", "file": 5, "target": "disk"},
    {"driver": "copy-before-write", "file": "disk", "target": {"driver": "zz"}},
    {"driver": "copy-before-write", "file": "disk", "target": {"driver": "file"}},
    {"driver": "copy-before-write", "file": "disk", "target": "tmp", "on-cbw-error": "zz"},
    {"driver": "copy-before-write", "file": "disk", "target": "tmp", "cbw-timeout": -1},
    {"driver": "copy-before-write", "file": "disk", "target": "tmp", "bitmap": 1},
    {"driver": "copy-before-write", "file": "disk", "target": "tmp", "bitmap": {"node": "disk"}},
    {
        "driver": "copy-before-write",
        "file": "disk",
        "target": "tmp",
        "bitmap": {"node": "disk", "name": "nope"},
    },
    {"driver": "copy-before-write", "file": "disk", "target": "read-only"},
    {"driver": "snapshot-access"},
    {"driver": "snapshot-access", "file": "nope"},
    {"driver": "raw", "file": "disk", "offset": DISK_BYTES + 1},
    {"driver": "raw", "file": "disk", "offset": 512, "size": DISK_BYTES},
    {"driver": "raw", "file": "disk", "size": 1000},
    {"driver": "raw", "file": "disk", "size": -1},
    {"driver": "nbd"},
    {"driver": "nbd", "server": {"type": "zz"}},
    {"driver": "nbd", "server": {"type": "inet", "host": "127.0.0.1"}},
    {"driver": "nbd", "server": {"type": "unix"}},
    {"driver": "nbd", "server": 5},
    {"driver": "null-co", "size": "x"},
]


async def test_errors_of_blockdev_add_are_qemus(sides: list[Side]) -> None:
    for side in sides:
        await _add_files(side, "disk", "tmp")
        await side.run("blockdev-add", driver="raw", node_name="read-only", file="tmp", read_only=True)
        for index, arguments in enumerate(WRONG_NODES):
            answer = await side.client.ask(
                {"execute": "blockdev-add", "arguments": {"node-name": f"n{index}", **arguments}}
            )
            side.history.append(f"{arguments}: {answer.get('error')}")
        await side.run("blockdev-add", driver="raw", node_name="1x", file="disk")
        await side.run("blockdev-add", driver="raw", node_name="x" * 32, file="disk")
        await side.run("blockdev-add", driver="raw", node_name="disk", file="tmp")
        await side.run("blockdev-add", driver="raw", file="tmp")
        await side.run("block-set-write-threshold", node_name="nope", write_threshold=1)
        await side.run("blockdev-del", node_name="tmp")
        await side.run("blockdev-del", node_name="nope")
    assert sides[0].history == sides[1].history


async def test_write_threshold_is_told_as_by_qemu(sides: list[Side]) -> None:
    for side in sides:
        await _add_files(side, "disk")
        await side.start_server()
        await side.run("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
        await side.run("block-set-write-threshold", node_name="disk", write_threshold=MIB)
        side.io("disk", f"write 0 {MIB}", f"write {MIB - 512} 4096", f"write {2 * MIB} 512")
        await side.run("block-set-write-threshold", node_name="disk", write_threshold=MIB)
        side.io("disk", f"write -z {MIB} 4096")
        await side.run("block-set-write-threshold", node_name="disk", write_threshold=0)
        side.io("disk", f"write {MIB} 4096")
        await side.run("block-export-del", id="e", mode="hard")
    ours, theirs = (_events_apart(side.history) for side in sides)
    assert len(ours[1]) == 3
    assert ours == theirs


SHOWN = ("node-name", "drv", "ro", "file", "write_threshold", "backing_file_depth", "detect_zeroes", "cache")


async def test_nodes_are_shown_as_by_qemu(sides: list[Side]) -> None:
    for side in sides:
        await _add_files(side, "disk", "tmp")
        await side.run("blockdev-add", driver="raw", node_name="raw", file="disk", read_only=True)
        await side.run("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="tmp")
        await side.run("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
        await side.run("block-set-write-threshold", node_name="disk", write_threshold=MIB)
        nodes = await side.client.execute("query-named-block-nodes")
        assert isinstance(nodes, list)
        for node in sorted(nodes, key=lambda node: str(node["node-name"])):
            if node["node-name"] != "served":
                shown = {name: node[name] for name in SHOWN} | {"image": node["image"]}
                text = repr(_sorted(shown))
                side.history.append(text.replace(str(side.directory), "DIR"))
    assert sides[0].history == sides[1].history


def _sorted(value: Json) -> Json:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value) if name != "actual-size"}
    return value


async def test_a_served_disk_is_fleeced_without_disconnecting_anybody(
    tmp_path: Path, serve: ServeFunction
) -> None:
    (tmp_path / "disk.img").write_bytes(b"\1" * MIB)
    (tmp_path / "tmp.img").write_bytes(bytes(MIB))
    server = serve(disk=tmp_path / "disk.img")
    async with _talking(server.control, tmp_path) as side:
        assert server.socket_path is not None
        (tmp_path / "nbd.sock").symlink_to(server.socket_path)
        await _add_files(side, "tmp")
        await side.run("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="tmp")
        await side.run("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
        await side.run("block-export-add", type="nbd", id="access", node_name="access")
        side.io("disk", f"write -P 2 0 {MIB}")
        side.io("access", f"read -P 1 0 {MIB}")
        assert all(line.endswith("{}") for line in side.history), side.history


async def test_image_fleecing_of_what_a_bitmap_has_as_in_qemu(sides: list[Side]) -> None:
    for side in sides:
        await _add_files(side, "disk", "tmp")
        await side.start_server()
        await side.run("block-dirty-bitmap-add", node="disk", name="b0")
        await side.run("block-export-add", type="nbd", id="prepare", node_name="disk", writable=True)
        side.io("disk", *(f"write -P {value} {start} {PIECE}" for value, start in PATTERNS[:2]))
        await side.run("block-export-del", id="prepare", mode="hard")
        of: Json = {"node": "disk", "name": "b0"}
        cbw: dict[str, Json] = {"driver": "copy-before-write", "file": "disk", "target": "tmp", "bitmap": of}
        await side.run("blockdev-add", node_name="cbw", **cbw)
        await side.run("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
        await side.run("block-export-add", type="nbd", id="live", node_name="cbw", writable=True)
        await side.run("block-export-add", type="nbd", id="access", node_name="access")
        side.io("cbw", f"write -P 1 0 {2 * MIB}")
        side.io("access", *(f"read -P {value} {start} {PIECE}" for value, start in PATTERNS[:2]))
        # The clusters beside them are no part of the point in time.
        side.io("access", f"read {PIECE} {PIECE}", status=1)
        await side.run("nbd-server-stop")
    ours, theirs = (_events_apart(side.history) for side in sides)
    assert ours == theirs


async def test_exported_bitmaps_are_as_in_qemu(sides: list[Side]) -> None:
    maps: list[str] = []
    for side in sides:
        await _add_files(side, "disk")
        await side.start_server()
        await side.run("block-dirty-bitmap-add", node="disk", name="b0")
        await side.run("block-export-add", type="nbd", id="e", node_name="disk", bitmaps=["b0"])
        await side.run(
            "block-export-add", type="nbd", id="e", node_name="disk", bitmaps=["b0"], writable=True
        )
        await side.run("block-export-add", type="nbd", id="f", node_name="disk", name="f", bitmaps=["b0"])
        for command in ("remove", "clear", "disable"):
            await side.run(f"block-dirty-bitmap-{command}", node="disk", name="b0")
        side.io("disk", f"write -P 1 {MIB} 512", f"write -z {4 * MIB} {MIB}")
        uri = f"nbd+unix:///disk?socket={side.nbd}"
        words = [require("nbdinfo"), "--map=qemu:dirty-bitmap:b0", uri]
        result = await asyncio.to_thread(
            subprocess.run, words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=QEMU_IO_S
        )
        maps.append(result.stdout)
        await side.run("block-export-del", id="e", mode="hard")
        await side.run("block-dirty-bitmap-remove", node="disk", name="b0")
    ours, theirs = (_events_apart(side.history) for side in sides)
    assert ours == theirs
    assert maps[0] == maps[1] != ""
