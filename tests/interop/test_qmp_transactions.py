"""Transactions of stock QMP clients against a real server: backups of two disks, and what becomes of bitmaps.

What is compared is what other programs see: nbdinfo's map of each bitmap, and query-named-block-nodes.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdbackup.job.events import Json
from tests.conftest import ServeFunction
from tests.support.disks import MIB, make_disk
from tests.support.foreign_servers import ForeignServer, nbdkit
from tests.support.peers import require
from tests.support.processes import run
from tests.support.server import Server

CLUSTER = 65536
SIZE = 2 * MIB
DISKS = ("one", "two")
WRITES = {"one": (3, 7, 8), "two": (0, 20)}
"""Clusters that a client writes to."""
REFUSED_CLUSTER = 20
"""The target that fails refuses this one."""
WAIT_S = 60

Action = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Setting:
    """The server of both disks, and a target for each, `fails` one that refuses a cluster."""

    server: Server
    directory: Path
    fails: str

    def write(self) -> None:
        """Write to the clusters of `WRITES` as a client."""
        for disk, clusters in WRITES.items():
            words = [word for number in clusters for word in ("-c", f"write -P 0xab {number * CLUSTER} 512")]
            run(require("qemu-io"), "-f", "raw", *words, self.server.uri(disk))

    def maps(self) -> dict[str, set[int]]:
        """The dirty clusters of each disk's bitmap b0, by nbdinfo."""
        found: dict[str, set[int]] = {}
        for disk in DISKS:
            command = (require("nbdinfo"), "--map=qemu:dirty-bitmap:b0", "--json", self.server.uri(disk))
            dirty = [extent for extent in json.loads(run(*command)) if extent["type"]]
            found[disk] = {
                number
                for extent in dirty
                for number in range(
                    extent["offset"] // CLUSTER, -(-(extent["offset"] + extent["length"]) // CLUSTER)
                )
            }
        return found

    def content(self, name: str) -> bytes:
        """Of a disk, as a file, or of a target."""
        return (self.directory / f"{name}.img").read_bytes()


@pytest.fixture
def setting(tmp_path: Path, serve: ServeFunction) -> Iterator[Setting]:
    sources = {disk: make_disk(tmp_path / f"{disk}.img", SIZE, seed) for seed, disk in enumerate(DISKS)}
    for name in ("to-one", "to-two", "bad"):
        (tmp_path / f"{name}.img").write_bytes(bytes(SIZE))
    protect = f"protect={REFUSED_CLUSTER * CLUSTER}-{(REFUSED_CLUSTER + 1) * CLUSTER - 1}"
    refusing = nbdkit("--filter=protect", "file", tmp_path / "bad.img", protect)
    with ForeignServer(refusing) as bad:
        server = serve(sources, tcp=False)
        yield Setting(server, tmp_path, str(bad.socket_path))
        # While its targets are there still.
        server.stop()


def nodes_of(setting: Setting) -> list[dict[str, object]]:
    """The targets, as arguments of blockdev-add."""
    nodes: list[dict[str, object]] = [
        {"driver": "file", "node-name": f"to-{disk}", "filename": str(setting.directory / f"to-{disk}.img")}
        for disk in DISKS
    ]
    nodes.append({"driver": "nbd", "node-name": "bad", "server": {"type": "unix", "path": setting.fails}})
    return nodes


def backup(disk: str, target: str, **options: object) -> Action:
    """The backup of `disk` as a job of that name."""
    data = {"device": disk, "target": target, "job-id": disk, "auto-dismiss": False, **options}
    return {"type": "blockdev-backup", "data": data}


def bitmap(verb: str, disk: str, name: str, **options: object) -> Action:
    """A change of a bitmap."""
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": disk, "name": name, **options}}


INCREMENTAL = {"sync": "incremental", "bitmap": "b0"}
BEGINNING = [
    bitmap("add", "one", "b0"),
    bitmap("add", "two", "b0"),
    bitmap("add", "two", "off", disabled=True),
    backup("one", "to-one", sync="full"),
    backup("two", "to-two", sync="full"),
]
FAILING = [backup("one", "to-one", **INCREMENTAL), backup("two", "bad", **INCREMENTAL)]
SUCCEEDING = [backup("one", "to-one", **INCREMENTAL), backup("two", "to-two", **INCREMENTAL)]
GROUPED = {"completion-mode": "grouped"}


class Client:
    """QMPClient, and what these tests ask of it."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    async def execute(self, name: str, **arguments: object) -> object:
        """Run a command."""
        return await self._client.execute(name, {key.replace("_", "-"): arguments[key] for key in arguments})

    async def flags(self) -> dict[str, Json]:
        """What query-named-block-nodes tells of the disks' bitmaps."""
        nodes = await self.execute("query-named-block-nodes")
        assert isinstance(nodes, list)
        return {node["node-name"]: node.get("dirty-bitmaps") for node in nodes if node["node-name"] in DISKS}

    async def take(self, actions: Sequence[Action], **options: object) -> dict[str, str | None]:
        """Run a transaction, wait for its jobs and dismiss them; their errors."""
        with self._client.listener(names={"JOB_STATUS_CHANGE"}) as listener:
            await self.execute("transaction", actions=list(actions), **options)
            ended: set[object] = set()
            while ended != set(DISKS):
                data = (await listener.get())["data"]
                assert isinstance(data, dict)
                if data["status"] == "concluded":
                    ended.add(data["id"])
        return await self.dismiss()

    async def dismiss(self) -> dict[str, str | None]:
        """Dismiss the jobs, which have ended; their errors."""
        jobs = await self.execute("query-jobs")
        assert isinstance(jobs, list)
        for job in jobs:
            assert job["status"] == "concluded"
            await self.execute("job-dismiss", id=job["id"])
        return {job["id"]: job.get("error") for job in jobs}


@asynccontextmanager
async def connected(setting: Setting) -> AsyncIterator[Client]:
    client = QMPClient("test")
    async with asyncio.timeout(WAIT_S):
        await client.connect(str(setting.server.control))
        try:
            yield Client(client)
        finally:
            await client.disconnect()


async def test_qmp_client_backs_up_two_disks_or_neither(setting: Setting) -> None:
    async with connected(setting) as client:
        for node in nodes_of(setting):
            await client.execute("blockdev-add", **node)
        assert await client.take(BEGINNING) == {"one": None, "two": None}
        for disk in DISKS:
            assert setting.content(f"to-{disk}") == setting.content(disk)
        assert await asyncio.to_thread(setting.maps) == {"one": set(), "two": set()}
        await asyncio.to_thread(setting.write)
        before = await client.flags()

        errors = await client.take(FAILING, properties=GROUPED)
        assert errors["one"] == "Operation canceled"
        assert errors["two"] is not None
        assert await client.flags() == before
        assert await asyncio.to_thread(setting.maps) == {disk: set(WRITES[disk]) for disk in DISKS}

        assert await client.take(SUCCEEDING, properties=GROUPED) == {"one": None, "two": None}
        for disk in DISKS:
            assert setting.content(f"to-{disk}") == setting.content(disk)
        assert await asyncio.to_thread(setting.maps) == {"one": set(), "two": set()}


async def test_qmp_client_finds_nothing_changed_by_a_transaction_that_was_refused(setting: Setting) -> None:
    async with connected(setting) as client:
        for node in nodes_of(setting):
            await client.execute("blockdev-add", **node)
        await client.take(BEGINNING)
        await asyncio.to_thread(setting.write)
        before = await client.flags()
        actions = [
            bitmap("clear", "one", "b0"),
            bitmap("disable", "two", "b0"),
            bitmap("enable", "two", "off"),
            bitmap("add", "one", "b1"),
            *SUCCEEDING[:1],
            {"type": "abort", "data": {}},
        ]
        with pytest.raises(ExecuteError, match="Transaction aborted using Abort action"):
            await client.execute("transaction", actions=actions)
        assert await client.flags() == before
        assert await client.execute("query-jobs") == []
        assert await asyncio.to_thread(setting.maps) == {disk: set(WRITES[disk]) for disk in DISKS}


def typed(command: str, arguments: Mapping[str, object]) -> str:
    """A line for qmp-shell, which takes what is in brackets for JSON."""
    return " ".join([command, *(f"{key}={_word(value)}" for key, value in arguments.items())])


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


async def shell(setting: Setting, lines: Sequence[str]) -> str:
    """Type `lines` into qmp-shell; what it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qemu.qmp.qmp_shell", str(setting.server.control)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"HOME": str(setting.directory), "TERM": "dumb"},
    )
    try:
        async with asyncio.timeout(WAIT_S):
            output, _ = await process.communicate("".join(f"{line}\n" for line in lines).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_qmp_shell_backs_up_two_disks_or_neither(setting: Setting) -> None:
    adding = [typed("blockdev-add", node) for node in nodes_of(setting)]
    steps = [typed(str(action["type"]), action["data"]) for action in BEGINNING]  # type: ignore[arg-type]
    async with connected(setting) as client:
        said = await shell(setting, [*adding, "transaction(", *steps, ")"])
        assert "error" not in said, said
        await both_ended(client)
        assert await client.dismiss() == {"one": None, "two": None}
        for disk in DISKS:
            assert setting.content(f"to-{disk}") == setting.content(disk)
        await asyncio.to_thread(setting.write)
        before = await client.flags()

        said = await shell(setting, [typed("transaction", {"actions": FAILING, "properties": GROUPED})])
        assert "error" not in said, said
        await both_ended(client)
        errors = await client.dismiss()
        assert errors["one"] == "Operation canceled"
        assert errors["two"] is not None
        assert await client.flags() == before
        assert await asyncio.to_thread(setting.maps) == {disk: set(WRITES[disk]) for disk in DISKS}


async def both_ended(client: Client) -> None:
    """Wait for both jobs, which somebody else has started."""
    while True:
        jobs = await client.execute("query-jobs")
        assert isinstance(jobs, list)
        if [job["status"] for job in jobs] == ["concluded"] * len(DISKS):
            return
        await asyncio.sleep(0.02)
