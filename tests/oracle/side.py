"""One daemon of the two: its process, its control socket, and all it has said.

Every side has a directory of its own with the same files in it; `{dir}` in arguments and options stands for
that directory, and in what a daemon answers its path is written `{dir}` again.
"""

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

from nbdbackup.job.events import Json
from tests.support.foreign_servers import ForeignServer, nbdkit
from tests.support.monitor import QmpClient
from tests.support.newer_peers import newer
from tests.support.peers import require

WAIT_S = 30.0
"""The limit on every wait."""
LINE_BYTES_MAX = 16 << 20
DIRECTORY = "{dir}"

Event = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Marker:
    """A command that was sent, in its place between the events."""

    command: str


class SideFailed(AssertionError):
    """A daemon did not do what a script cannot do without."""


class Side(ABC):
    """One daemon; a context manager that starts and ends it. Set once: `name`, `directory`."""

    name: str

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.history: list[Event | Marker] = []
        self.may_end = False
        """The script ends the daemon itself."""
        self._log = directory / "log"
        self._control = directory / "control.sock"
        self._stack = AsyncExitStack()
        self._client: QmpClient | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._clients: list[asyncio.subprocess.Process] = []

    @abstractmethod
    def command(self) -> list[str]:
        """What starts it, with its control socket at `_control`."""

    @property
    def nbd_socket(self) -> Path:
        """Where its NBD server listens, once it was started."""
        return self.directory / "nbd.sock"

    def here(self, value: Json) -> Json:
        """`value` with this side's directory for `{dir}`."""
        return _replaced(value, DIRECTORY, str(self.directory))

    def neutral(self, value: Json) -> Json:
        """`value` with `{dir}` for this side's directory."""
        return _replaced(value, str(self.directory), DIRECTORY)

    async def __aenter__(self) -> Self:
        self.directory.mkdir()
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command(), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            reader, writer = await self._connect()
            self._stack.callback(writer.close)
            self._client = QmpClient(reader, writer)
            await self._client.receive()
            await self._client.execute("qmp_capabilities")
        except BaseException:
            await self.kill()
            raise
        return self

    def is_ready(self) -> bool:
        """Whether it may be connected to."""
        return self._control.exists()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self._process is not None
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    if self.is_ready():
                        return await asyncio.open_unix_connection(self._control, limit=LINE_BYTES_MAX)
                except OSError:
                    pass
                if self._process.returncode is not None:
                    raise SideFailed(f"{self.name} did not start: {self.log()}")
                await asyncio.sleep(0.01)

    async def ask(self, message: Mapping[str, Json]) -> Mapping[str, Json]:
        """The whole answer to `message`."""
        assert self._client is not None
        self.history.append(Marker(str(message["execute"])))
        answer = await self._client.ask(self.here(message))
        self._take_events()
        neutral = self.neutral(answer)
        assert isinstance(neutral, dict)
        return neutral

    async def listed(self, command: str) -> list[Mapping[str, Json]]:
        """What a command without arguments lists."""
        answer = await self.ask({"execute": command})
        if not isinstance(answer.get("return"), list):
            raise SideFailed(f"{self.name}: {command}: {answer}\n{self.transcript()}")
        return cast(list[Mapping[str, Json]], answer["return"])

    async def wait_event(self, is_it: Callable[[Event], bool], start: int, what: str) -> int:
        """Wait until there is such an event at `start` of the history or later; the place after it."""
        assert self._client is not None
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    for place in range(start, len(self.history)):
                        entry = self.history[place]
                        if not isinstance(entry, Marker) and is_it(entry):
                            return place + 1
                    start = len(self.history)
                    await self._receive_event(what)
        except TimeoutError:
            raise SideFailed(f"{self.name}: {what} has not come; it said\n{self.transcript()}") from None

    async def _receive_event(self, what: str) -> None:
        assert self._client is not None
        message = await self._client.receive()
        if message is None:
            raise SideFailed(f"{self.name} has hung up before {what}; it said\n{self.transcript()}")
        assert "event" in message, message
        self._client.events.append(message)
        self._take_events()

    def _take_events(self) -> None:
        assert self._client is not None
        for event in self._client.events:
            neutral = self.neutral(event)
            assert isinstance(neutral, dict)
            self.history.append(neutral)
        self._client.events.clear()

    async def drain_events(self) -> None:
        """Take in every event that the daemon sent before it went away."""
        assert self._client is not None
        async with asyncio.timeout(WAIT_S):
            while (message := await self._client.receive()) is not None:
                self._client.events.append(message)
        self._take_events()

    def events(self) -> list[Event]:
        """Every event, in order."""
        return [entry for entry in self.history if not isinstance(entry, Marker)]

    def transcript(self) -> str:
        """What was said, for people."""
        lines = [
            f"  > {entry.command}" if isinstance(entry, Marker) else f"  {entry['event']} {entry['data']}"
            for entry in self.history[-40:]
        ]
        return "\n".join(lines)

    async def nbdkit(self, name: str, arguments: Sequence[str]) -> None:
        """Start nbdkit on `{dir}/NAME.sock`; it ends with this side."""
        words = [str(self.here(argument)) for argument in arguments]
        server = ForeignServer(nbdkit(*words))
        server.socket_path = self.directory / f"{name}.sock"
        self._stack.callback(server.__exit__, None, None, None)
        await asyncio.to_thread(server.start)

    async def wait_exit(self) -> int:
        """Wait until the daemon has ended by itself; its status."""
        assert self._process is not None
        async with asyncio.timeout(WAIT_S):
            return await self._process.wait()

    async def run_tool(self, *words: str | Path) -> tuple[int, str]:
        """Run a program on this side; its status and all it says."""
        process = await asyncio.create_subprocess_exec(
            *(str(self.here(str(word))) for word in words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(WAIT_S):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, str(self.neutral(output.decode(errors="replace")))

    async def connect(self, *words: str) -> asyncio.subprocess.Process:
        """Run an interactive client until this side ends, or its standard input is closed."""
        process = await asyncio.create_subprocess_exec(
            *(str(self.here(word)) for word in words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._clients.append(process)
        return process

    def log(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")

    async def __aexit__(self, *exception: object) -> None:
        try:
            assert self._process is not None
            if self._process.returncode is None and not self.may_end:
                self._process.terminate()
                async with asyncio.timeout(WAIT_S):
                    status = await self._process.wait()
                if exception[0] is None and (status != 0 or "Traceback" in self.log()):
                    raise SideFailed(f"{self.name} ended with status {status}\n{self.log()}")
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End everything at once, whatever has been started."""
        for process in (*self._clients, self._process):
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
        await self._stack.aclose()


class QemuSide(Side):
    """qemu-storage-daemon, this system's."""

    name = "qemu"

    def program(self) -> list[str]:
        """The words that run it."""
        return [require("qemu-storage-daemon")]

    def command(self) -> list[str]:
        """It writes its pid once everything is there."""
        chardev = f"socket,id=c,path={self._control},server=on,wait=off"
        monitor = ["--chardev", chardev, "--monitor", "chardev=c"]
        return [*self.program(), *monitor, "--pidfile", str(self._pid_file)]

    @property
    def _pid_file(self) -> Path:
        return self.directory / "pid"

    def is_ready(self) -> bool:
        """The socket alone is there too early: a client may be greeted twice."""
        return self._pid_file.exists()


class NewerQemuSide(QemuSide):
    """qemu-storage-daemon of Debian 13, for what this system's is known to do wrong."""

    name = "newer qemu"

    def program(self) -> list[str]:
        """Through its own dynamic linker."""
        return newer("qemu-storage-daemon")


class OwnSide(Side):
    """`nbdbackup serve` without a disk."""

    name = "ours"

    def command(self) -> list[str]:
        """Disks and listeners come by QMP."""
        command = [sys.executable, "-m", "nbdbackup", "serve", "--control", str(self._control)]
        return [*command, "--state-dir", str(self.directory / "state")]


def _replaced(value: Json, old: str, new: str) -> Json:
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {name: _replaced(member, old, new) for name, member in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return value
