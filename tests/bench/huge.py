"""`python -m tests.bench.huge`: a sparse disk of 16 TiB with 1 GiB dirty in 10,000 places.

Prints a table: how long the commands take that have to look at a whole bitmap, what memory they leave the
server with, and the longest stall of a client that writes 4 KiB at a time all the while.
"""

import argparse
import asyncio
import random
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu.qmp import QMPClient

from tests.support.raw_client import CMD_WRITE, RawClient
from tests.support.server import Server

TIB, GIB, MIB = 1 << 40, 1 << 30, 1 << 20
PLACES = 10_000
JOB_LIMIT_S = 600.0


class Prober:
    """Writes 4 KiB at a time to one place in a thread, and remembers the longest wait for a reply."""

    def __init__(self, server: Server, offset: int) -> None:
        self._server = server
        self._offset = offset
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._since = 0.0
        self.longest_s = 0.0
        self.writes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait_for_write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(60)

    def start_anew(self) -> None:
        """Forget what was; of a write that is under way, the time before this does not count."""
        self._since = time.perf_counter()
        self.longest_s = 0.0

    def wait_for_write(self) -> None:
        """Return when a write that is under way now, or the next one, was answered."""
        seen = self.writes
        while self.writes == seen and self._thread.is_alive():
            time.sleep(0.001)

    def _run(self) -> None:
        data = bytes(4096)
        with RawClient(self._server) as client:
            client.go("disk")
            while not self._ended.is_set():
                before = time.perf_counter()
                client.request(CMD_WRITE, self._offset, len(data), data)
                assert client.simple_reply().error == 0
                self.longest_s = max(self.longest_s, time.perf_counter() - max(before, self._since))
                self.writes += 1


def _dirty(server: Server, size: int) -> None:
    """Write 1 GiB in `PLACES` places of which no two are in the same cluster."""
    generator = random.Random(1)
    length = GIB // PLACES
    data = generator.randbytes(length)
    clusters = size // PLACES // (64 << 10)
    with RawClient(server) as client:
        client.go("disk")
        for number in range(PLACES):
            # Room for three clusters: the place need not be aligned.
            cluster = number * clusters + generator.randrange(clusters - 3)
            client.request(CMD_WRITE, (cluster << 16) + generator.randrange(65536), length, data)
            assert client.simple_reply().error == 0


class Table:
    """One row for each command that was measured."""

    def __init__(self, server: Server, prober: Prober) -> None:
        self._server = server
        self._prober = prober
        print("| command | seconds | longest stall of the client (ms) | server's memory after (MiB) |")
        print("|---|---:|---:|---:|")

    async def measure(self, name: str, doing: Callable[[], Awaitable[object]]) -> None:
        """Do it once, and print how that went."""
        self._prober.start_anew()
        before = time.perf_counter()
        await doing()
        seconds = time.perf_counter() - before
        await asyncio.to_thread(self._prober.wait_for_write)
        stall_ms, memory = self._prober.longest_s * 1000, self._server.rss_bytes() / MIB
        print(f"| {name} | {seconds:.3f} | {stall_ms:.1f} | {memory:.0f} |", flush=True)


async def _bench(server: Server, target: Path, size: int) -> None:
    client = QMPClient("bench")
    await client.connect(str(server.control))

    def run(command: str, **arguments: object) -> Callable[[], Awaitable[object]]:
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return lambda: client.execute(command, named)

    with Prober(server, size - MIB) as prober:
        table = Table(server, prober)
        await table.measure("(nothing, for 1 s)", lambda: asyncio.sleep(1))
        await table.measure(
            "bitmap add", run("block-dirty-bitmap-add", node="disk", name="b0", persistent=True)
        )
        await run("block-dirty-bitmap-add", node="disk", name="fine", granularity=4096)()
        await run("block-dirty-bitmap-add", node="disk", name="sum", disabled=True)()
        await table.measure("(1 GiB is written)", lambda: asyncio.to_thread(_dirty, server, size))
        merge = "block-dirty-bitmap-merge"
        await table.measure("bitmap merge", run(merge, node="disk", target="sum", bitmaps=["b0"]))
        merging = run(merge, node="disk", target="sum", bitmaps=["fine"])
        await table.measure("bitmap merge from 4 KiB granularity", merging)
        create = "x-nbdbackup-snapshot-create"
        # The state directory's file system may not hold files as long as this disk.
        taking = run(create, nodes=["disk"], name="s1", scratch=str(target.parent))
        await table.measure("snapshot create", taking)
        await table.measure("snapshot drop", run("x-nbdbackup-snapshot-drop", snapshots=["disk@s1"]))
        job = {"node": "disk", "target": str(target), "sync": "incremental", "bitmap": "b0", "job-id": "job"}
        with client.listener(names={"BLOCK_JOB_COMPLETED"}) as listener:
            await table.measure(
                "incremental backup: started", lambda: client.execute("x-nbdbackup-backup", job)
            )

            async def completed() -> None:
                event = await asyncio.wait_for(listener.get(), JOB_LIMIT_S)
                data = event["data"]
                assert isinstance(data, dict)
                assert "error" not in data, event
                print(f"<!-- {data} -->")

            await table.measure("incremental backup: done", completed)
    await client.disconnect()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.huge", description=__doc__)
    parser.add_argument("--size-tib", type=int, default=16)
    parser.add_argument("--directory", default="/dev/shm", help="a file system that can hold so long a file")
    arguments = parser.parse_args()
    size = arguments.size_tib * TIB
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        disk = Path(directory) / "disk.img"
        with disk.open("wb") as file:
            file.truncate(size)
        with Server({"disk": disk}) as server:
            asyncio.run(_bench(server, Path(directory) / "increment.img", size))


if __name__ == "__main__":
    main()
