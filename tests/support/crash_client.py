"""Clients of a server that is about to be killed: commands, and writes with a journal of what was answered.

A journal is what the disk and every point in time of it are held against. Each writer has a part of the disk
of its own and waits for each answer, so that after its first k requests there is exactly one content of the
part: a point in time has to be one of these.
"""

import json
import random
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tests.support.raw_client import CMD_FLUSH, CMD_READ, CMD_WRITE, CMD_ZEROES, FLAG_FUA, RawClient
from tests.support.server import Server

SECTOR = 512
LARGE_SECTORS_MAX = 320
HOP_REQUESTS = 100
"""After as many a writer goes elsewhere: most granules have to be clean for the checks to mean something."""
TIMEOUT_S = 30.0
ESHUTDOWN = 108
"""What a server that stops says to requests that come too late."""
CUT_OFF = (OSError, EOFError, AssertionError)
"""What a client sees of a server that is killed."""


class Killed(Exception):
    """The server went away in the middle of a command."""


class Qmp:
    """A client of the control socket, quicker to start than a command of the shell."""

    def __init__(self, server: Server) -> None:
        self.events: list[dict[str, object]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.connect(str(server.control))
            self._stream = self._socket.makefile("rw")
            self._receive()
            self.execute("qmp_capabilities")
        except OSError as error:
            self._socket.close()
            raise Killed from error

    def execute(self, command: str, **arguments: object) -> object:
        """The command's answer, errors included."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._stream.write(json.dumps({"execute": command, "arguments": words}) + "\n")
            self._stream.flush()
        except OSError as error:
            raise Killed from error
        while True:
            answer = self._receive()
            if "return" in answer or "error" in answer:
                return answer.get("return", answer.get("error"))

    def ask(self, command: str, **arguments: object) -> list[dict[str, object]]:
        """The list that `command` has to return."""
        answer = self.execute(command, **arguments)
        assert isinstance(answer, list), answer
        return answer

    def wait_job_ended(self, job: str) -> bool:
        """Whether it completed, and without an error."""
        while True:
            for event in self.events:
                data = event["data"]
                assert isinstance(data, dict)
                if event["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") and data["device"] == job:
                    return event["event"] == "BLOCK_JOB_COMPLETED" and "error" not in data
            self._receive()

    def close(self) -> None:
        with suppress(OSError):
            self._stream.close()
        self._socket.close()

    def _receive(self) -> dict[str, object]:
        try:
            line = self._stream.readline()
        except OSError as error:
            raise Killed from error
        if not line.endswith("\n"):
            raise Killed
        answer: dict[str, object] = json.loads(line)
        if "event" in answer:
            self.events.append(answer)
        return answer


def succeeded(answer: object) -> bool:
    """Whether a command did what it was asked for."""
    return not (isinstance(answer, dict) and "class" in answer)


def read_export(server: Server, export: str, size: int) -> bytes:
    """All of the export's bytes.

    Raises:
        OSError, EOFError, AssertionError: the server is gone, or cannot read.
    """
    with RawClient(server) as client:
        client.go(export)
        client.request(CMD_READ, 0, size)
        reply = client.simple_reply(size)
        assert reply.error == 0
        return reply.data


@dataclass
class Journal:
    """The changes of the disk's part from `start` on, which held `base`."""

    start: int
    base: bytes
    asked: list[tuple[int, bytes]] = field(default_factory=list)
    """Offset in the part, and the new bytes."""
    acknowledged: int = 0
    """How many of them were answered; the others may have been done, or in part."""
    flushed: int = 0
    """How many of them an answered flush covers."""

    @property
    def end(self) -> int:
        """Where the part ends."""
        return self.start + len(self.base)

    def check_disk(self, disk: bytes) -> None:
        """`disk` has what was acknowledged, and of anything else what may be there."""
        content = disk[self.start : self.end]
        expected = bytearray(self.base)
        for offset, data in self.asked[: self.acknowledged]:
            expected[offset : offset + len(data)] = data
        for offset, data in self.asked[self.acknowledged :]:
            for at in range(offset, offset + len(data), SECTOR):
                if content[at : at + SECTOR] == data[at - offset : at - offset + SECTOR]:
                    expected[at : at + SECTOR] = content[at : at + SECTOR]
        assert content == expected, f"{_first_difference(content, expected)}: acknowledged, and not there"

    def has_instant(self, disk: bytes, since: int, until: int) -> bool:
        """Whether the part is in `disk` as it was at one moment between `since` and `until` requests."""
        content = disk[self.start : self.end]
        wrong = {
            at
            for at in range(0, len(content), SECTOR)
            if content[at : at + SECTOR] != self.base[at : at + SECTOR]
        }
        if not wrong and since == 0:
            return True
        for count, (offset, data) in enumerate(self.asked[:until], 1):
            for at in range(offset, offset + len(data), SECTOR):
                if content[at : at + SECTOR] == data[at - offset : at - offset + SECTOR]:
                    wrong.discard(at)
                else:
                    wrong.add(at)
            if not wrong and count >= since:
                return True
        return since == 0 and not wrong


def _first_difference(one: bytes, other: bytes | bytearray) -> str:
    at = next(at for at in range(len(one)) if one[at] != other[at])
    return f"byte {at}"


class Writer(threading.Thread):
    """Changes its part of export `disk`, one request at a time, until the server is gone."""

    def __init__(self, server: Server, journal: Journal, seed: int) -> None:
        super().__init__()
        self.journal = journal
        self.errors: list[int] = []
        """Of requests that were refused, which ends it."""
        self._server = server
        self._random = random.Random(seed)
        self._place = 0

    def run(self) -> None:
        with suppress(*CUT_OFF), RawClient(self._server) as client:
            client.go("disk")
            for number in range(10**9):
                if number % HOP_REQUESTS == 0:
                    self._place = self._random.randrange(len(self.journal.base) // SECTOR)
                self._request(client)

    def _look_at(self, error: int) -> None:
        if error and error != ESHUTDOWN:
            self.errors.append(error)
        if error:
            raise EOFError

    def _request(self, client: RawClient) -> None:
        chance, journal = self._random.random(), self.journal
        if chance < 0.02:
            client.request(CMD_FLUSH)
            self._look_at(client.simple_reply().error)
            journal.flushed = journal.acknowledged
            return
        sectors = 1 if chance < 0.94 else self._random.randrange(2, LARGE_SECTORS_MAX)
        limit = len(journal.base) // SECTOR
        first = (self._place + self._random.randrange(256)) % limit
        sectors = min(sectors, limit - first)
        is_zero, is_durable = chance > 0.98, 0.9 < chance < 0.96
        data = bytes(sectors * SECTOR) if is_zero else self._random.randbytes(8) * (sectors * SECTOR // 8)
        offset = first * SECTOR
        journal.asked.append((offset, data))
        client.request(
            CMD_ZEROES if is_zero else CMD_WRITE,
            journal.start + offset,
            len(data),
            b"" if is_zero else data,
            flags=FLAG_FUA if is_durable else 0,
        )
        self._look_at(client.simple_reply().error)
        journal.acknowledged = len(journal.asked)


def acknowledged(journals: Sequence[Journal]) -> tuple[int, ...]:
    """How many changes of each part were acknowledged by now."""
    return tuple(journal.acknowledged for journal in journals)


def asked(journals: Sequence[Journal]) -> tuple[int, ...]:
    """How many changes of each part were begun by now."""
    return tuple(len(journal.asked) for journal in journals)
