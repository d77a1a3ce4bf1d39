"""kill -9 at random moments: no bitmap and no checkpoint says clean of what differs from its backup.

A client writes all the time while bitmaps and checkpoints are made, backed up and deleted at random, and the
server is killed, now and then while it starts, too. What a backup holds is what somebody read of the snapshot
of its instant. After each restart, with the disk as it is:

- whatever differs from a backup is dirty in what its bitmap, or its checkpoint and those after it, say;
- every write that was acknowledged is there;
- no bitmap is inconsistent, none is without an owner, and there is nothing to be cleaned up.
"""

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import ServeFunction
from tests.support.disks import make_disk
from tests.support.peers import require
from tests.support.processes import run
from tests.support.raw_client import CMD_READ, CMD_WRITE, RawClient
from tests.support.server import Server, ServerFailed

GRANULE = 65536
GRANULES = 128
SIZE = GRANULES * GRANULE
SECTOR = 512
HOP_WRITES = 100
"""After as many the client goes elsewhere: most granules have to be clean for the check to mean something."""
KILL_AFTER_S_MAX = 0.7
START_S_MAX = 0.5
CHECKPOINTS_MAX = 5
TIMEOUT_S = 30.0
SEEDS = int(os.environ.get("NBDBACKUP_CRASH_SEEDS", "25"))
"""Of the slow form: what CI has time for; a hundred take some ten minutes."""
CUT_OFF = (OSError, EOFError, AssertionError)
"""What a client sees of a server that is killed."""


class Killed(Exception):
    """The server went away in the middle of a command."""


class Qmp:
    """A client of the control socket, quicker to start than a command of the shell."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(str(server.control))
        self._stream = self._socket.makefile("rw")
        self._stream.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> object:
        """The command's answer, errors included."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._stream.write(json.dumps({"execute": command, "arguments": words}) + "\n")
            self._stream.flush()
            while line := self._stream.readline():
                answer = json.loads(line)
                if "return" in answer or "error" in answer:
                    return answer.get("return", answer.get("error"))
        except OSError as error:
            raise Killed from error
        raise Killed

    def close(self) -> None:
        with suppress(OSError):
            self._stream.close()
        self._socket.close()


class Writer(threading.Thread):
    """Writes single sectors until the server is gone; `tried` and `acknowledged` by their offsets."""

    def __init__(self, server: Server, seed: int) -> None:
        super().__init__()
        self._server = server
        self._random = random.Random(seed)
        self.tried: dict[int, list[bytes]] = {}
        self.acknowledged: dict[int, int] = {}
        """How many of the tried ones."""

    def run(self) -> None:
        with suppress(*CUT_OFF), RawClient(self._server) as client:
            client.go("disk")
            start = written = 0
            while True:
                if written % HOP_WRITES == 0:
                    start = self._random.randrange(GRANULES - 1) * GRANULE
                written += 1
                offset = start + self._random.randrange(2 * GRANULE // SECTOR) * SECTOR
                data = self._random.randbytes(8) * (SECTOR // 8)
                self.tried.setdefault(offset, []).append(data)
                client.request(CMD_WRITE, offset, SECTOR, data)
                assert client.simple_reply().error == 0
                self.acknowledged[offset] = len(self.tried[offset])

    def check(self, content: bytes) -> None:
        """What was acknowledged is in `content`, or something that was written over it later."""
        for offset, count in self.acknowledged.items():
            assert content[offset : offset + SECTOR] in self.tried[offset][count - 1 :]


@dataclass
class Crashes:
    """One disk, its server, and what backups of it hold, by the names of checkpoints and bitmaps."""

    server: Server
    disk: Path
    random: random.Random
    backups: dict[str, bytes] = field(default_factory=dict)
    names: Iterator[str] = field(default_factory=lambda: (f"c{number}" for number in range(10**6)))
    done: Counter[str] = field(default_factory=Counter)

    def round(self) -> None:
        """Writes and commands until a kill, a restart, and the check."""
        writer = Writer(self.server, self.random.randrange(1 << 30))
        writer.start()
        killer = threading.Timer(self.random.uniform(0.05, KILL_AFTER_S_MAX), self.server.process.kill)
        killer.start()
        try:
            self._command_until_killed()
        finally:
            killer.join(TIMEOUT_S)
            self.server.process.wait(TIMEOUT_S)
            writer.join(TIMEOUT_S)
        self._restart()
        writer.check(self.disk.read_bytes())
        self.check()
        self.done["kills"] += 1

    def _command_until_killed(self) -> None:
        with suppress(Killed, *CUT_OFF):
            qmp = Qmp(self.server)
            try:
                while True:
                    step = self.random.choice(
                        (self._checkpoint, self._checkpoint, self._delete, self._bitmap)
                    )
                    step(qmp)
                    self.done[step.__name__] += 1
            finally:
                qmp.close()

    def _restart(self) -> None:
        """Start it, and now and then kill it in the middle of that."""
        while True:
            assert self.server.process.stdout is not None
            self.server.process.stdout.close()
            if self.random.random() > 0.3:
                self.server.start()
                return
            killer = threading.Timer(self.random.uniform(0.05, START_S_MAX), self._kill_what_starts)
            killer.start()
            with suppress(ServerFailed):
                self.server.start()
            killer.join(TIMEOUT_S)
            self.server.kill()
            self.done["kills while starting"] += 1

    def _kill_what_starts(self) -> None:
        self.server.process.kill()

    # Steps.

    def _checkpoint(self, qmp: Qmp) -> None:
        if len(self._chain(qmp)) >= CHECKPOINTS_MAX:
            return self._delete(qmp)
        name = next(self.names)
        qmp.execute("x-nbdbackup-checkpoint-create", nodes=["disk"], name=name)
        self.backups[name] = self._read(f"disk@{name}")
        qmp.execute("x-nbdbackup-snapshot-drop", snapshots=[f"disk@{name}"])
        return None

    def _delete(self, qmp: Qmp) -> None:
        chain = self._chain(qmp)
        if chain:
            qmp.execute("x-nbdbackup-checkpoint-delete", name=self.random.choice(chain))

    def _bitmap(self, qmp: Qmp) -> None:
        """Back up with the bitmap b, by a pull that succeeds or fails."""
        qmp.execute("block-dirty-bitmap-add", node="disk", name="b", persistent=True)
        qmp.execute("x-nbdbackup-snapshot-create", nodes=["disk"], name="s", bitmap="b")
        self._pull(qmp)

    def _pull(self, qmp: Qmp) -> None:
        content = self._read("disk@s")
        is_pulled = self.random.random() < 0.7
        if is_pulled:
            self.backups["b"] = content
        qmp.execute("x-nbdbackup-snapshot-drop", snapshots=["disk@s"], pulled=is_pulled)

    def _chain(self, qmp: Qmp) -> list[str]:
        answer = qmp.execute("x-nbdbackup-query-checkpoints")
        assert isinstance(answer, list)
        return [found["name"] for found in answer]

    def _read(self, export: str) -> bytes:
        with RawClient(self.server) as client:
            client.go(export)
            client.request(CMD_READ, 0, SIZE)
            reply = client.simple_reply(SIZE)
            assert reply.error == 0
            return reply.data

    # The check.

    def check(self) -> None:
        """The bitmaps, against the disk as it is; nobody writes."""
        content = self.disk.read_bytes()
        qmp = Qmp(self.server)
        try:
            self._pull_again(qmp)
            chain = self._chain(qmp)
            listed = qmp.execute("query-named-block-nodes")
            assert qmp.execute("x-nbdbackup-query-leftovers") == []
            assert isinstance(listed, list)
            bitmaps = {bitmap["name"]: bitmap for bitmap in listed[0].get("dirty-bitmaps", [])}
            assert bitmaps.keys() - {"b"} == set(chain)
            assert not [bitmap for bitmap in bitmaps.values() if bitmap.get("inconsistent") or bitmap["busy"]]
            assert len(list((self.server.state_dir / "bitmaps").glob("*.bitmap"))) == len(bitmaps)
            for index, name in enumerate(chain):
                self._check_backup(name, chain[index:], content)
            if "b" in bitmaps:
                self._check_backup("b", ["b"], content)
        finally:
            qmp.close()

    def _pull_again(self, qmp: Qmp) -> None:
        """Deal with the snapshot that b was frozen with when the server was killed."""
        found = qmp.execute("x-nbdbackup-query-snapshots")
        assert isinstance(found, list)
        if any(snapshot["export"] == "disk@s" for snapshot in found):
            self._pull(qmp)
            self.done["pulls done again"] += 1

    def _check_backup(self, name: str, bitmaps: list[str], content: bytes) -> None:
        backup = self.backups.get(name)
        if backup is None:
            return  # killed before anybody had read it: there is no such backup
        changed = {
            number
            for number in range(GRANULES)
            if backup[number * GRANULE : (number + 1) * GRANULE]
            != content[number * GRANULE : (number + 1) * GRANULE]
        }
        dirty = set[int]().union(*(self._dirty(bitmap) for bitmap in bitmaps))
        assert changed <= dirty, f"{name}: {sorted(changed - dirty)} changed and are clean in {bitmaps}"
        self.done["checks"] += 1

    def _dirty(self, name: str) -> set[int]:
        command = (require("nbdinfo"), "--json", f"--map=qemu:dirty-bitmap:{name}")
        return {
            number
            for extent in json.loads(run(*command, self.server.uri("disk")))
            if extent["type"]
            for number in range(
                extent["offset"] // GRANULE, -(-(extent["offset"] + extent["length"]) // GRANULE)
            )
        }


def crash(serve: ServeFunction, directory: Path, seed: int, kills: int, *options: str) -> Counter[str]:
    """Kill a server of a new disk as many times; what was done."""
    disk = make_disk(directory / f"{seed}.img", SIZE)
    server = serve({"disk": disk}, options, state_dir=directory / f"state-{seed}")
    crashes = Crashes(server, disk, random.Random(seed))
    for _ in range(kills):
        crashes.round()
    server.stop()
    disk.unlink()
    return crashes.done


@pytest.mark.timeout(280)
@pytest.mark.parametrize("durability", ["process", "power"])
def test_no_bitmap_says_clean_of_a_change_whenever_the_server_is_killed(
    serve: ServeFunction, tmp_path: Path, durability: str
) -> None:
    done = crash(serve, tmp_path, 1, 6, "--bitmap-durability", durability)
    print(dict(done))
    assert done["kills"] == 6
    assert done["checks"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_bitmap_says_clean_of_a_change_in_many_lives_of_servers(
    serve: ServeFunction, tmp_path: Path
) -> None:
    done: Counter[str] = Counter()
    begun = time.monotonic()
    for seed in range(100, 100 + SEEDS):
        done += crash(
            serve, tmp_path, seed, 4, "--bitmap-durability", "power" if seed % 3 == 0 else "process"
        )
    print(f"{SEEDS} seeds in {time.monotonic() - begun:.0f} s, 0 failures: {dict(done)}")
    assert done["kills"] == 4 * SEEDS
